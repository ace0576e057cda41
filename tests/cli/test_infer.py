"""infer.py: sources of prompts, the generated texts, how they are printed, how they end, and the report.

Most tests use models whose output is known: a scripted one, and one that draws random characters.
"""

import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from scripted import save_model, scripted_model, zero_model

import infer
from config import InferConfig
from flatgpt.cli import cli as command_line
from flatgpt.data import tokenizer
from flatgpt.inference import writer
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.writer import Text, Writer

EOT = tokenizer.load("byte").eot_token
UNUSUAL = "Once 🎈 upon 東京\tun café — 中文"
LIVE = pytest.mark.parametrize("live", ["--stream_text", "--no-stream_text"])


def scripted(script: str | list[int]) -> str:
    """Save a scripted model. Returns what --model_path takes."""
    return save_model(scripted_model(script), "out/script")


def random_model(eot: float = 0.0) -> str:
    """Save a model that draws from a few bytes, depending on all it has read, and end-of-text with logit `eot`."""
    torch.manual_seed(0)
    model = zero_model(n_layer=2, n_head=2, n_embd=16, context_length=40, head_bias=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.5)
        model.lm_head.bias.fill_(-100)
        model.lm_head.bias[torch.tensor(list("abcdefgh \né東".encode()))] = 0
        if eot:
            model.lm_head.bias[EOT] = eot
    return save_model(model, "out/random", end_of_text=True)


@pytest.fixture
def run(cli, in_tmp):
    """run(*words) -> Result of infer.py in a temporary folder."""
    return lambda *words, **more: cli("infer", "--device", "cpu", "--dtype", "float32", *words, **more)


@pytest.fixture
def report(run):
    """report(*words) -> the report of infer.py, which has to succeed."""

    def report(*words, **more) -> dict:
        done = run(*words, "--json", "report.json", **more)
        assert done.code == 0, done
        return json.loads(Path("report.json").read_text())

    return report


def ends(report: dict) -> list[tuple[str, str, int]]:
    return [(text["text"], text["ended"], text["tokens"]) for text in report["texts"]]


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def test_text_follows_the_prompt_and_the_seed(tiny_home, run, monkeypatch):
    """Of a trained run, the newest one. The precision is named."""
    monkeypatch.chdir(tiny_home)
    words = ("--prompt", "99 green bottles", "--max_new_tokens", 40)
    first = run(*words, "--seed", 5)
    assert first.out.startswith("99 green bottles")
    assert len(first.out) > 30
    assert run(*words, "--seed", 5).out == first.out
    assert run(*words, "--seed", 6).out != first.out
    assert "quickstart/ckpt/iter_000060, iter 60: 34,720 parameters, on cpu (1 thread), float32, eager" in first.err
    assert "40 tokens, the first after " in first.err
    int8 = run(*words, "--dtype", "auto", "--quantize", "int8")
    assert "bfloat16 (int8 weights), eager" in int8.err
    assert int8.out.startswith("99 green bottles")


@pytest.mark.parametrize(
    ("words", "content", "prompts"),
    [
        (["--prompt", f" {UNUSUAL}\n "], "", [f" {UNUSUAL}\n "]),
        (["--prompt", "-"], "", ["-"]),
        ([], "", [""]),
        *(
            (source, content, [prompt])
            for source in (["-"], ["--prompt_file", "a.txt"])  # one newline at the end is dropped
            for content, prompt in (("one\n\n", "one\n"), ("\ufeffone\r\ntwo\r\n", "one\ntwo"), ("", ""), ("-", "-"))
        ),
        (["--prompts_file", "a.txt"], "one\r\ntwo\nthree", ["one", "two", "three"]),
        (["--prompts_file", "a.txt"], f"\ufeff\n {UNUSUAL} \n\n", ["", f" {UNUSUAL} ", ""]),
    ],
)
def test_sources_of_prompts(report, words, content, prompts):
    write("a.txt", content)
    found = report(*words, "--model_path", random_model(), "--max_new_tokens", 2, stdin=content)["texts"]
    assert [text["prompt"] for text in found] == prompts
    assert [text["prompt_tokens"] for text in found] == [len(prompt.encode()) or 1 for prompt in prompts]


@pytest.mark.parametrize(
    ("words", "content", "names"),
    [
        (["--prompt_file", "none.txt"], "", ["none.txt: No such file"]),
        (["--prompts_file", "a.txt"], "", ["prompts_file = a.txt", "empty"]),
        (
            ["--prompt_file", "a.txt"],
            b"caf\xe9\n",
            ["a.txt line 1: byte 0xe9 is not", "iconv -f CP1252"],
        ),
        (["--prompts_file", "a.txt"], "one\n".encode("utf-16-be"), ["a.txt looks like UTF-16-BE", "iconv -f UTF-16BE"]),
        (["-"], b"one\0two", ["standard input line 1: a NUL character"]),
        (["-"], b"one \xf0\x9f", ["standard input line 1: byte 0xf0 is not UTF-8"]),
        (["--interactive"], b"caf\xe9\n", ["standard input: byte 0xe9 is not UTF-8"]),
        (["--json", "none/a.json"], "", ["json = none/a.json", "cannot be written"]),
        (["--model_path", "nowhere"], "", ["nowhere", "no such folder"]),
        (["--quantize", "int8", "--dtype", "float16"], "", ["int8", "bfloat16", "dtype"]),
    ],
)
def test_refusals(run, words, content, names):
    scripted("xyz")
    done = run(*words, stdin=Path(write("a.txt", content)).read_bytes())
    assert all(name in done.error for name in names), done.error
    assert done.out == ""


@pytest.mark.parametrize(("end_of_text", "expected"), [(True, "E"), (False, "N")])
def test_empty_prompt_starts_as_a_text_of_the_data_does(run, end_of_text, expected):
    """The model says E after end-of-text and N after a newline."""
    model = zero_model()
    with torch.no_grad():
        for n, (before, after) in enumerate(((EOT, "E"), (ord("\n"), "N"))):
            model.transformer.wte.weight[before, n] = 1
            model.lm_head.weight[ord(after), n] = 100
    words = ["--model_path", save_model(model, "out/start", end_of_text=end_of_text), "--max_new_tokens", 1]
    assert run(*words).out == f"{expected}\n"


def test_prompt_longer_than_the_context(run):
    """The model reads the prompt's end. A note says so once, however many texts there are."""
    end = "abc\nefgh é" * 3 + "abcdefg"
    long = "ab" + "東" * 1656 + end
    assert (len(end.encode()), len(long.encode())) == (40, 5010)
    words = ["--model_path", random_model(), "--greedy", "--max_new_tokens", 30]
    done = run("--prompt_file", write("a.txt", long), *words, "--num_samples", 3, "--batch_size", 1)
    assert done.err.count("note: ") == 1
    assert "5,040 tokens; the context holds 40, at first the prompt's last 40; when" in done.err
    assert done.out.count(long + run("--prompt", end, *words).out.removeprefix(end)) == 3
    assert [run("--prompt", "abc", "--max_new_tokens", n).err.count("note: ") for n in (38, 39)] == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# several texts, and how they are printed


@pytest.mark.parametrize("options", [[], ["--greedy"], ["--top_p", 0.9, "--repetition_penalty", 1.3]], ids=str)
def test_text_does_not_depend_on_the_others(report, options):
    """Some texts end early, some outgrow the context."""
    words = ["--model_path", random_model(eot=-1), "--num_samples", 3, "--max_new_tokens", 60, "--stop", "bf", *options]
    several = [*words, "--prompts_file", write("a.txt", "abc\n\nhgfedcba hgfedcba 東東é\nabc\n")]
    alone = report(*several, "--batch_size", 1)["texts"]
    for size in (2, 5, 32):
        assert report(*several, "--batch_size", size)["texts"] == alone, size
    assert report("--prompt", "abc", *words)["texts"] == alone[:3]
    if "--greedy" not in options:
        assert {text["ended"] for text in alone} == {"stop", "end_of_text", "length"}
        assert len({text["text"] for text in alone}) == 12


@LIVE
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_headers(run, report, live, batch_size):
    words = ["--model_path", random_model(), "--max_new_tokens", 9, "--batch_size", batch_size, live]
    words += ["--num_samples", 3, "--prompts_file", write("a.txt", "abc\nb\n")]
    headers = [f"--- prompt {prompt} of 2, sample {sample} of 3\n" for prompt in (1, 2) for sample in (1, 2, 3)]
    texts = zip(headers, report(*words)["texts"], strict=True)
    assert run(*words).out == "".join(header + text["prompt"] + text["text"] + "\n" for header, text in texts)


def test_characters_come_one_by_one_and_whole(in_tmp, monkeypatch):
    """The first text of a batch while the others wait."""
    whole, printed = "naïve 東京 👩‍🚀!", []

    def record(text: str = "\n", file=None, **more) -> None:
        if file is None and text:
            printed.append(text)

    monkeypatch.setattr("builtins.print", record)
    words = ["--model_path", scripted(whole), "--device", "cpu", "--prompt", "p", "--max_new_tokens"]
    length, headers = str(len(whole.encode())), [f"--- sample {n} of 2\np" for n in (1, 2)]
    for more, expected in (
        ([length], ["pn", *whole[1:], "\n"]),
        ([length, "--no-stream_text"], [f"p{whole}\n"]),
        (["3"], ["pn", "a", "\ufffd\n"]),
        ([length, "--num_samples", "2"], [f"{headers[0]}n", *whole[1:], "\n", f"{headers[1]}{whole}\n"]),
    ):
        infer.main(command_line.parse(InferConfig, [*words, *more]))
        assert printed == expected
        printed.clear()


@pytest.mark.parametrize("source", ["-", "--interactive"])
def test_terminal_that_is_not_utf8(run, source):
    """Characters that it cannot show become question marks; input is read as UTF-8, as files are."""
    words = [source, "--model_path", scripted("-東!"), "--max_new_tokens", 3]
    assert run(*words, stdin="é\n".encode(), encoding="ascii")[:2] == (0, "??\n")


# ---------------------------------------------------------------------------------------------------------------------
# ends, and the report

WITH_EOT = [*b"ab", EOT, *b"cd"]
WITH_STOPS = "abcdef\n\n東!"


@pytest.mark.parametrize(
    ("script", "words", "end"),
    [
        ("abcdefgh", [8], ("abcdefgh", "length", 8)),
        (WITH_EOT, [3], ("ab", "end_of_text", 2)),
        (WITH_EOT, [2], ("ab", "length", 2)),
        (WITH_EOT, [5, "--ignore_eot"], ("ab<|endoftext|>cd", "length", 5)),
        ([EOT], [5], ("", "end_of_text", 0)),
        (WITH_STOPS, [12, "--stop", "x", "cd"], ("ab", "stop", 4)),
        (WITH_STOPS, [12, "--stop=e", "--stop=cd"], ("ab", "stop", 4)),
        (WITH_STOPS, [12, "--stop", "\n\n"], ("abcdef", "stop", 8)),
        (WITH_STOPS, [12, "--stop", "abc"], ("", "stop", 3)),
        (WITH_STOPS, [12, "--stop", "pa"], (WITH_STOPS, "length", 12)),  # the prompt is not searched
    ],
)
def test_end_of_a_text(run, report, script, words, end):
    words = ["--model_path", scripted(script), "--prompt", "p", "--max_new_tokens", *words]
    assert ends(report(*words)) == [end]
    assert run(*words).out == f"p{end[0]}\n"


def test_report(run, report):
    model = scripted("abc")
    words = ["--model_path", model, "--prompt", "p", "--stop", "x", "y", "--top_p", 0.5, "--max_new_tokens", 3]
    found = report(*words)
    assert min(found["seconds_to_first_token"], found["tokens_per_s"]) > 0
    assert found["machine"].startswith("cpu (1 thread), float32, eager")
    facts = {"model": model, "iter": 7, "parameters": 5064, "tokens": 3}
    assert {key: found[key] for key in facts} == facts
    settings = {"temperature": 0.8, "greedy": False, "top_k": 0, "top_p": 0.5, "min_p": 0.0, "repetition_penalty": 1.0}
    settings |= {"seed": 1337, "max_new_tokens": 3, "stop": ["x", "y"], "ignore_eot": False}
    assert found["settings"] == settings
    assert found["texts"] == [{"prompt": "p", "text": "abc", "prompt_tokens": 1, "tokens": 3, "ended": "length"}]
    on_stdout = run(*words, "--json", "-")
    assert json.loads(on_stdout.out)["texts"] == found["texts"]
    assert on_stdout.err.count("tokens/s") == 1
    assert report(*words, "--max_new_tokens", 1)["tokens_per_s"] is None


def test_report_is_written_after_each_batch(run, monkeypatch):
    """A long run may end by a power cut."""
    real, reported = Writer.write, []

    def counting(self, texts):
        reported.append(len(json.loads(Path("a.json").read_text())["texts"]) if Path("a.json").exists() else 0)
        return real(self, texts)

    monkeypatch.setattr(Writer, "write", counting)
    words = ["--num_samples", 5, "--batch_size", 2, "--max_new_tokens", 2, "--json", "a.json"]
    assert run("--model_path", scripted("abc"), *words).code == 0
    assert reported == [0, 2, 4]


def test_speed_leaves_the_capture_out(run, clock, monkeypatch):
    """The first decoding step is captured in half a second; each takes 0.1 s."""
    real, time = Decoder.decode_step, clock(writer)

    def slow(self, tokens):
        time.now += 0.1 if self.compile_seconds else 0.6
        self.compile_seconds = 0.5
        return real(self, tokens)

    monkeypatch.setattr(Decoder, "decode_step", slow)
    done = run("--model_path", scripted("abcdefgh"), "--prompt", "a", "--max_new_tokens", 6)
    assert "then 10.0 tokens/s; capturing a CUDA graph took 0.5 s" in done.err


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C, interactive mode


@pytest.fixture
def ctrl_c(monkeypatch):
    """ctrl_c(n): send SIGINT once a text has received the n-th token of all."""

    def ctrl_c(number: int) -> None:
        real, count = Text.append, itertools.count(1)

        def interrupted(*args) -> None:
            real(*args)
            if next(count) == number:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Text, "append", interrupted)

    return ctrl_c


@LIVE
def test_interrupted_texts_are_printed_and_reported(run, ctrl_c, live):
    """Ctrl-C comes in the second of two batches, after three tokens of each text."""
    words = ["--prompt", "p", "--model_path", scripted("abcdefgh"), "--max_new_tokens", 8, "--num_samples", 5]
    for json_file in ("a.json", "-"):
        ctrl_c(8 * 2 + 6)
        done = run(*words, "--batch_size", 2, live, "--json", json_file)
        assert done.code == 130
        assert done.err.splitlines()[-1].startswith("22 tokens, ")
        found = json.loads(done.out if json_file == "-" else Path(json_file).read_text())
        assert ends(found) == [*[("abcdefgh", "length", 8)] * 2, *[("abc", "interrupted", 3)] * 2]
        if json_file != "-":
            assert done.out == "".join(f"--- sample {n} of 5\npabc{'defgh' * (n < 3)}\n" for n in (1, 2, 3))


@pytest.mark.parametrize("words", ["--greedy", "", "--dtype bfloat16 --quantize int8", "--dtype float16"])
@LIVE
def test_logits_that_are_not_finite_are_an_error(cli, in_tmp, live, words):
    """The embedding of position 3 is damaged. What was written before is printed and reported."""
    model = scripted_model("abcdefgh")
    model.transformer.wpe.weight.data[3] = float("nan")
    words = [
        "--model_path",
        save_model(model, "out/diverged"),
        "--device",
        "cpu",
        "--num_samples",
        2,
        live,
        *words.split(),
    ]
    for file in ("a.json", "-"):
        done = cli("infer", *words, "--prompt", "p", "--json", file)
        assert done.code == 2
        error = done.err.splitlines()[-1]
        assert error.startswith("error: out/diverged/ckpt/iter_000007: its logits are NaN or infinite: ")
        assert ("--dtype float32" in error) == ("float16" in words)
        found = json.loads(done.out if file == "-" else Path(file).read_text())
        assert ends(found) == [("abc", "interrupted", 3)] * 2
    assert cli("infer", *words, "--prompt", "p").out == "--- sample 1 of 2\npabc\n"


def test_each_line_is_continued(run):
    """Its texts are those that --num_samples gives."""
    words = ["--model_path", random_model(), "--max_new_tokens", 12]
    done = run("--interactive", *words, stdin=f"abc\nabc\n\n{UNUSUAL}")
    assert done.code == 0
    samples = json.loads(run("--prompt", "abc", "--num_samples", 2, *words, "--json", "-").out)["texts"]
    assert done.out.startswith("".join(f"abc{sample['text']}\n" for sample in samples))
    assert f"\n{UNUSUAL}" in done.out


@LIVE
def test_ctrl_c_ends_the_current_text_only(run, ctrl_c, live):
    words = ["--model_path", scripted("abcdefgh"), "--max_new_tokens", 7, "--interactive", live, "--stop", "g"]
    ctrl_c(3)
    assert run(*words, stdin="p\npq\n")[:2] == (0, "pabc\npqbcdef\n")
