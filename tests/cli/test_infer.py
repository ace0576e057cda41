"""infer.py: sources of prompts, the generated texts, how they are printed, how they end, and the report.

Most tests use models whose output is known: a scripted one, and one that draws random characters.
"""

import io
import itertools
import json
import shutil
import signal
import sys
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
SEVERAL = "abc\n\nhgfedcba hgfedcba 東東é\nb\n"  # prompts; some texts end early, some outgrow the context
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


def texts(report: dict) -> list[str]:
    return [text["text"] for text in report["texts"]]


def ends(report: dict) -> list[tuple[str, str, int]]:
    return [(text["text"], text["ended"], text["tokens"]) for text in report["texts"]]


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# a trained model


@pytest.fixture
def trained(tiny_home, run, monkeypatch):
    """`run` in the folder of a trained run."""
    monkeypatch.chdir(tiny_home)
    return run


def test_text_follows_the_prompt_and_the_seed(trained):
    words = ("--prompt", "99 green bottles", "--max_new_tokens", 40)
    first = trained(*words, "--seed", 5)
    assert first.out.startswith("99 green bottles")
    assert len(first.out) > 30
    assert trained(*words, "--seed", 5).out == first.out
    assert trained(*words, "--seed", 6).out != first.out
    assert "out/quickstart/ckpt/iter_000060, iter 60: 34,720 parameters, on cpu, float32, eager\n" in first.err
    assert "40 tokens, the first after " in first.err


def test_greedy_by_any_option_is_the_same(trained):
    base = ["--prompt", "green ", "--max_new_tokens", 30]
    ways = [["--temperature", 0], ["--greedy"], ["--top_k", 1], ["--greedy", "--seed", 9], ["--top_p", 1e-6]]
    assert len({trained(*base, *way).out for way in ways}) == 1
    assert trained(*base).out != trained(*base, "--greedy").out


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        (["--dtype", "bfloat16"], "bfloat16"),
        (["--dtype", "auto", "--quantize", "int8"], "int8"),
        (["--dtype", "bfloat16", "--quantize", "int8", "--num_samples", 3], "int8"),
    ],
)
def test_precision_is_named(trained, words, precision):
    done = trained("--prompt", "99 green bottles", "--max_new_tokens", 20, *words)
    assert f"on cpu, {precision}, eager" in done.err
    assert "99 green bottles" in done.out


def test_weights_and_state_are_all_that_is_read(trained, tiny_run, tmp_path, monkeypatch):
    """A checkpoint to give away needs neither optimizer, run nor data."""
    expected = trained("--prompt", "99").out
    monkeypatch.chdir(tmp_path)
    Path("given").mkdir()
    for name in ("model.safetensors", "state.json"):
        shutil.copy(tiny_run / "ckpt/last" / name, "given")
    assert trained("--prompt", "99", "--model_path", "given").out == expected


# ---------------------------------------------------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize("prompt", ["ROMEO:", UNUSUAL, "two\nlines", " ends with blanks  ", "-", "\n", "none"])
def test_prompt_on_the_command_line(run, prompt):
    done = run("--prompt", prompt, "--model_path", random_model(), "--json", "a.json")
    (text,) = json.loads(Path("a.json").read_text())["texts"]
    assert (text["prompt"], text["prompt_tokens"]) == (prompt, len(prompt.encode()))
    assert done.out == prompt + text["text"] + "\n"


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("one", "one"),
        ("one\n", "one"),
        ("one\n\n", "one\n"),
        ("one\r\ntwo\r\n", "one\ntwo"),
        ("\ufeffone\n", "one"),
        ("", ""),
        ("\n", ""),
        (f" {UNUSUAL} \n", f" {UNUSUAL} "),
        ("-\n", "-"),
    ],
)
def test_prompt_of_a_file_or_standard_input_loses_one_newline(report, content, prompt):
    words = ["--model_path", scripted("x" * 12), "--max_new_tokens", 1]
    assert report("--prompt_file", write("a.txt", content), *words)["texts"][0]["prompt"] == prompt
    assert report("-", *words, stdin=content)["texts"][0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        (f"\n {UNUSUAL} \n\n", ["", f" {UNUSUAL} ", ""]),
        ("\ufeff-", ["-"]),
    ],
)
def test_file_with_one_prompt_per_line(report, content, prompts):
    found = report("--prompts_file", write("a.txt", content), "--model_path", random_model(), "--max_new_tokens", 2)
    assert [text["prompt"] for text in found["texts"]] == prompts


SOURCES = (["-"], ["--prompt", "x"], ["--prompt_file", "a"], ["--prompts_file", "a"], ["--interactive"])


@pytest.mark.parametrize(
    ("words", "content", "names"),
    [
        (["--prompt_file", "none.txt"], "", ["none.txt: No such file"]),
        (["--prompts_file", "out"], "", ["out: Is a directory"]),
        (["--prompts_file", "a.txt"], "", ["prompts_file = a.txt", "empty"]),
        (["--prompt_file", "a.txt"], b"caf\xe9\n", ["a.txt: not UTF-8", "at byte 3"]),
        (["--prompts_file", "a.txt"], b"one\n\xff\xfet\n", ["a.txt: not UTF-8", "at byte 4"]),
        (["-"], b"one \xf0\x9f", ["standard input: not UTF-8", "at byte 4"]),
        (["--interactive"], b"caf\xe9\n", ["standard input: not UTF-8", "at byte 3"]),
        (["--interactive", "--json", "a.json"], "", ["--interactive", "json"]),
        (["--interactive", "--num_samples", "2"], "", ["--interactive", "num_samples"]),
        (["hello"], "", ["hello"]),
        (["--stop", ""], "", ["stop = ''"]),
        (["--json", "none/a.json"], "", ["json = none/a.json", "cannot be written"]),
        (["--json", "out"], "", ["json = out", "cannot be written"]),
        (["--model_path", "nowhere"], "", ["nowhere", "no such folder"]),
        (["--quantize", "int8", "--dtype", "float16"], "", ["int8", "bfloat16", "dtype"]),
        (["--quantize", "int8", "--dtype", "float32"], "", ["int8", "dtype"]),
        *(
            ([*one, *other], "", [one[0], other[0], "exclude each other"])
            for one, other in itertools.combinations(SOURCES, 2)
        ),
    ],
)
def test_refusals(run, words, content, names):
    scripted("xyz")
    done = run(*words, stdin=Path(write("a.txt", content)).read_bytes())
    assert all(name in done.error for name in names), done.error
    assert done.out == ""


def test_without_a_run_it_says_how_to_make_one(run):
    assert "python train.py" in run().error


@pytest.mark.parametrize(("end_of_text", "expected"), [(True, "E"), (False, "N")])
def test_empty_prompt_starts_as_a_text_of_the_data_does(report, end_of_text, expected):
    """The model says E after end-of-text and N after a newline."""
    model = zero_model()
    with torch.no_grad():
        for n, (before, after) in enumerate(((EOT, "E"), (ord("\n"), "N"))):
            model.transformer.wte.weight[before, n] = 1
            model.lm_head.weight[ord(after), n] = 100
    words = ["--model_path", save_model(model, "out/start", end_of_text=end_of_text), "--max_new_tokens", 1]
    for source in ([], ["--prompts_file", write("a.txt", "\n\n")]):
        found = report(*words, *source)
        assert set(texts(found)) == {expected}
        assert (found["texts"][0]["prompt"], found["texts"][0]["prompt_tokens"]) == ("", 1)


def test_prompt_longer_than_the_context(run):
    """The model reads the prompt's end. A note says so once, however many texts there are."""
    end = "abc\nefgh é" * 3 + "abcdefg"
    long = "ab" + "東" * 1656 + end
    assert (len(end.encode()), len(long.encode())) == (40, 5010)
    words = ["--model_path", random_model(), "--greedy", "--max_new_tokens", 30]
    done = run("--prompt_file", write("a.txt", long), *words, "--num_samples", 3, "--batch_size", 1)
    assert done.err.count("note: ") == 1
    assert "5,040 tokens; the model sees 40 at once, at first the prompt's last 40, and" in done.err
    assert done.out.count(long + run("--prompt", end, *words).out.removeprefix(end)) == 3
    assert run("--prompt", "abc", "--max_new_tokens", 38).err.count("note: ") == 0
    assert run("--prompt", "abc", "--max_new_tokens", 39).err.count("note: ") == 1


# ---------------------------------------------------------------------------------------------------------------------
# several texts


@pytest.mark.parametrize("options", [[], ["--greedy"], ["--top_p", 0.9, "--repetition_penalty", 1.3]], ids=str)
def test_text_does_not_depend_on_the_others(report, options):
    words = ["--model_path", random_model(eot=-1), "--num_samples", 3, "--max_new_tokens", 60, "--stop", "bf", *options]
    several = [*words, "--prompts_file", write("a.txt", SEVERAL)]
    alone = report(*several, "--batch_size", 1)
    assert len(alone["texts"]) == 12
    if "--greedy" not in options:
        assert {text["ended"] for text in alone["texts"]} == {"stop", "end_of_text", "length"}
    for size in (2, 5, 32):
        assert report(*several, "--batch_size", size)["texts"] == alone["texts"], size
    assert report("--prompt", "abc", *words)["texts"] == alone["texts"][:3]


@pytest.mark.parametrize("size", [32, 3])
def test_samples_differ_and_follow_the_seed(report, size):
    words = ["--model_path", random_model(), "--prompts_file", write("a.txt", "abc\nabc\n"), "--num_samples", 4]
    words += ["--max_new_tokens", 12, "--batch_size", size]
    first = texts(report(*words))
    assert len(set(first)) == 8
    assert texts(report(*words)) == first
    assert not set(texts(report(*words, "--seed", 9))) & set(first)


@LIVE
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_headers(run, live, batch_size):
    words = [
        "--model_path",
        random_model(),
        "--max_new_tokens",
        9,
        "--batch_size",
        batch_size,
        live,
        "--json",
        "a.json",
    ]
    for prompts, samples in itertools.product((1, 2), (1, 3)):
        file = write("a.txt", "abc\nb\n"[: 4 * prompts])
        done = run(*words, "--prompts_file", file, "--num_samples", samples)
        expected = ""
        for n, text in enumerate(json.loads(Path("a.json").read_text())["texts"]):
            parts = [f"prompt {n // samples + 1} of 2"] if prompts == 2 else []
            parts += [f"sample {n % samples + 1} of 3"] if samples == 3 else []
            expected += (f"--- {', '.join(parts)}\n" if parts else "") + text["prompt"] + text["text"] + "\n"
        assert done.out == expected
    assert "--- prompt 2 of 2, sample 1 of 3\nb" in done.out


# ---------------------------------------------------------------------------------------------------------------------
# streaming


class Pieces(io.StringIO):
    """Standard output that keeps what each call wrote."""

    def write(self, text: str) -> int:
        self.pieces = [*getattr(self, "pieces", []), *([text] if text else [])]
        return super().write(text)


@pytest.fixture
def pieces(in_tmp, monkeypatch):
    """pieces(model, *words) -> what standard output received, piece by piece."""

    def pieces(model: str, *words) -> list[str]:
        config = command_line.parse(InferConfig, ["--model_path", model, "--device", "cpu", "--prompt", "p", *words])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out := Pieces())
            infer.main(config)
        return out.pieces

    return pieces


WHOLE = "naïve 東京 👩‍🚀!"
ALL_TOKENS = ("--max_new_tokens", str(len(WHOLE.encode())))


def test_characters_come_one_by_one_and_whole(pieces):
    model = scripted(WHOLE)
    assert pieces(model, *ALL_TOKENS) == ["p", *WHOLE, "\n"]
    assert pieces(model, *ALL_TOKENS, "--no-stream_text") == ["p", WHOLE, "\n"]
    assert pieces(model, "--max_new_tokens", "3") == ["p", "n", "a", "\ufffd", "\n"]


@pytest.mark.parametrize("batch_size", ["1", "2", "32"])
def test_first_text_of_a_batch_is_printed_while_the_others_wait(pieces, batch_size):
    shown = pieces(scripted(WHOLE), *ALL_TOKENS, "--num_samples", "3", "--batch_size", batch_size)
    live, waited = ([f"--- sample {n} of 3\np", *text, "\n"] for n, text in ((1, WHOLE), (2, [WHOLE])))
    assert shown[: len(live)] == live
    if batch_size == "32":
        assert shown[len(live) : len(live) + 3] == waited
    if batch_size == "1":
        assert shown[len(live) :] == [p for n in "23" for p in (f"--- sample {n} of 3\np", *WHOLE, "\n")]


@pytest.mark.parametrize("source", ["-", "--interactive"])
def test_terminal_that_is_not_utf8(run, source):
    """Characters that it cannot show become question marks; input is read as UTF-8, as files are."""
    words = [source, "--model_path", scripted("-東!"), "--max_new_tokens", 3]
    assert run(*words, stdin="é\n".encode(), encoding="ascii")[:2] == (0, "??\n")


# ---------------------------------------------------------------------------------------------------------------------
# ends

WITH_EOT = [*b"ab", EOT, *b"cd"]
WITH_STOPS = "abcdef\n\n東!"


@pytest.mark.parametrize(
    ("script", "words", "end"),
    [
        ("abcdefgh", [1], ("a", "length", 1)),
        ("abcdefgh", [8], ("abcdefgh", "length", 8)),
        (WITH_EOT, [5], ("ab", "end_of_text", 2)),
        (WITH_EOT, [3], ("ab", "end_of_text", 2)),
        (WITH_EOT, [2], ("ab", "length", 2)),
        (WITH_EOT, [5, "--ignore_eot"], ("ab<|endoftext|>cd", "length", 5)),
        ([EOT], [5], ("", "end_of_text", 0)),
        (WITH_STOPS, [12, "--stop", "d"], ("abc", "stop", 4)),
        (WITH_STOPS, [12, "--stop", "x", "cd"], ("ab", "stop", 4)),
        (WITH_STOPS, [12, "--stop=e", "--stop=cd"], ("ab", "stop", 4)),
        (WITH_STOPS, [12, "--stop", "\n\n"], ("abcdef", "stop", 8)),
        (WITH_STOPS, [12, "--stop", "abc"], ("", "stop", 3)),
        (WITH_STOPS, [12, "--stop", "pa"], (WITH_STOPS, "length", 12)),  # the prompt is not searched
    ],
)
def test_end_of_a_text(run, report, script, words, end):
    words = ["--model_path", scripted(script), "--prompt", "p", "--max_new_tokens", *words]
    found = report(*words)
    assert ends(found) == [end]
    assert found["tokens"] == end[2]
    assert run(*words).out == f"p{end[0]}\n"


def test_texts_of_a_batch_end_independently(report):
    model = scripted([*b"abXcdef", EOT, *b"ghijklmn"])
    prompts = write("a.txt", "p\npqrs\n" + "p" * 9 + "\n")
    found = report("--model_path", model, "--prompts_file", prompts, "--stop", "X", "--max_new_tokens", 6)
    assert ends(found) == [("ab", "stop", 3), ("cdef", "end_of_text", 4), ("ghijkl", "length", 6)]
    assert found["tokens"] == 3 + 4 + 6


# ---------------------------------------------------------------------------------------------------------------------
# the report


def test_report(report):
    model = scripted("abc")
    words = ["--model_path", model, "--prompt", "p", "--stop", "x", "y", "--top_p", 0.5]
    found = report(*words, "--max_new_tokens", 3)
    assert min(found["seconds_to_first_token"], found["tokens_per_s"]) > 0
    facts = {"model": model, "iter": 7, "parameters": 5064, "machine": "cpu, float32, eager", "tokens": 3}
    assert {key: found[key] for key in facts} == facts
    settings = {"temperature": 0.8, "greedy": False, "top_k": 0, "top_p": 0.5, "min_p": 0.0, "repetition_penalty": 1.0}
    settings |= {"seed": 1337, "max_new_tokens": 3, "stop": ["x", "y"], "ignore_eot": False}
    assert found["settings"] == settings
    assert found["texts"] == [{"prompt": "p", "text": "abc", "prompt_tokens": 1, "tokens": 3, "ended": "length"}]
    one_token = report(*words[:-2], "--max_new_tokens", 1, "--greedy")
    assert (one_token["tokens_per_s"], one_token["settings"]["temperature"]) == (None, 0)


@LIVE
def test_report_on_standard_output_replaces_the_text(run, report, live):
    words = ["--model_path", random_model(), "--prompt", UNUSUAL, "--num_samples", 3, "--max_new_tokens", 9, live]
    done = run(*words, "--json", "-")
    assert json.loads(done.out)["texts"] == report(*words)["texts"]
    assert done.err.count("tokens/s") == 1


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
    assert len(json.loads(Path("a.json").read_text())["texts"]) == 5


def test_report_stays_when_the_disk_is_full(run, monkeypatch):
    words = ["--model_path", scripted("abcdefgh"), "--prompt", "a", "--max_new_tokens", 3, "--json", "a.json"]
    assert run(*words).code == 0
    before = Path("a.json").read_bytes()

    def full(self, *more, **words):
        with open(self, "wb") as file:
            file.write(b"{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "a.json: cannot be written: No space left on device" in run(*words).error
    assert Path("a.json").read_bytes() == before
    assert not list(Path().glob(".a.json*"))


def test_speed_leaves_compilation_out(run, clock, monkeypatch):
    """The first decoding step compiles for half a second; each takes 0.1 s."""
    real, time = Decoder.decode_step, clock(writer)

    def slow(self, tokens):
        time.now += 0.1
        if not self.compile_seconds:
            time.now += 0.5
            self.compile_seconds = 0.5
        return real(self, tokens)

    monkeypatch.setattr(Decoder, "decode_step", slow)
    done = run("--model_path", scripted("abcdefgh"), "--prompt", "a", "--max_new_tokens", 6, "--json", "a.json")
    assert "; compiling took 0.5 s" in done.err
    assert json.loads(Path("a.json").read_text())["tokens_per_s"] == pytest.approx(10)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


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
    ctrl_c(8 * 2 + 6)
    done = run(*words, "--batch_size", 2, live, "--json", "a.json")
    assert done.code == 130
    assert done.out == "".join(f"--- sample {n} of 5\npabc{'defgh' * (n < 3)}\n" for n in (1, 2, 3))
    assert done.err.splitlines()[-1].startswith("22 tokens, ")
    found = json.loads(Path("a.json").read_text())
    assert ends(found) == [*[("abcdefgh", "length", 8)] * 2, *[("abc", "interrupted", 3)] * 2]


def test_interrupted_report_on_standard_output(run, ctrl_c):
    ctrl_c(3)
    done = run("--prompt", "p", "--model_path", scripted("abcdefgh"), "--json", "-")
    assert done.code == 130
    assert ends(json.loads(done.out)) == [("abc", "interrupted", 3)]


# ---------------------------------------------------------------------------------------------------------------------
# interactive


def test_each_line_is_continued(run):
    """Its texts are those that --num_samples gives."""
    words = ["--model_path", random_model(), "--max_new_tokens", 12]
    done = run("--interactive", *words, stdin=f"abc\nabc\n\n{UNUSUAL}")
    assert done.code == 0
    samples = texts(json.loads(run("--prompt", "abc", "--num_samples", 2, *words, "--json", "-").out))
    assert done.out.startswith(f"abc{samples[0]}\nabc{samples[1]}\n")
    assert samples[0] != samples[1]
    assert f"\n{UNUSUAL}" in done.out


@pytest.mark.parametrize(("stdin", "out"), [("p\npqr\n", "pab\npqr\n"), ("", "")])
def test_stop_strings_end_each_text(run, stdin, out):
    words = ["--model_path", scripted("abXcd"), "--stop", "X", "--max_new_tokens", 5]
    assert run("--interactive", *words, stdin=stdin)[:2] == (0, out)


@LIVE
def test_ctrl_c_ends_the_current_text_only(run, ctrl_c, live):
    words = ["--model_path", scripted("abcdefgh"), "--max_new_tokens", 7, "--interactive", live]
    ctrl_c(3)
    assert run(*words, stdin="p\npq\n")[:2] == (0, "pabc\npqbcdefgh\n")
