"""infer.py: where prompts come from, what is written and how it comes, and how it ends.

Most of it with models whose text is known beforehand: one says a script by heart, one draws at random.
"""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from processes import ROOT, command, running, waits_long

import infer
from config import InferConfig, ModelConfig
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.inference import writer
from flatgpt.inference.writer import Text, Writer
from flatgpt.runs import checkpoint
from model import GPT

BYTE = tokenizer.load("byte")
EOT = BYTE.eot_token
PLAIN = ["--device", "cpu", "--dtype", "float32"]


def save(model: GPT, name: str, end_of_text: bool = False) -> str:
    """A checkpoint of the model under the current folder; what --model_path takes."""
    state = {
        "iter": 7,
        "config": {**vars(model.config)},
        "tokenizer": {"name": "byte", "ranks_sha256": tokenizer.ranks_hash(BYTE)},
        "data": {"end_of_text": end_of_text},
    }
    train_state = {"optimizer": {}, "scaler": {}, "row": {}}
    return str(checkpoint.save(Path("out") / name, state, model.state_dict(), train_state, 1))


def empty(**changes) -> GPT:
    """A model with zeros in every matrix: its blocks change nothing."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "vocab_size": 257, "tie_weights": False}
    model = GPT(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1)
    return model


def by_heart(script: str | list[int], name: str = "script") -> str:
    """A model that says a script, whatever it reads: after n tokens comes the script's n-th, as far as it goes."""
    ids = list(script.encode()) if isinstance(script, str) else script
    C = max(8, len(ids))
    model = empty(n_embd=C, context_length=C)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(torch.eye(C))
        for place, token in enumerate(ids):
            model.lm_head.weight[token, place] += 100
    return save(model, name)


ALPHABET = "abcdefgh \né東".encode()


def at_random(eot: float = 0.0) -> str:
    """A model that draws from a few bytes, which of them hangs on all that it has read; and eot, this much likelier."""
    torch.manual_seed(0)
    model = empty(n_layer=2, n_head=2, n_embd=16, context_length=40, head_bias=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.5)
        model.lm_head.bias.fill_(-100)
        model.lm_head.bias[torch.tensor(list(ALPHABET))] = 0
        if eot:
            model.lm_head.bias[EOT] = eot
    return save(model, "random", end_of_text=True)


class Answer(NamedTuple):
    out: str
    err: str
    code: int

    @property
    def error(self) -> str:
        """What it said, of a run that ended with one error line and nothing else."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == 2, self
        assert len(lines) == 1, self
        assert self.err.endswith(lines[0] + "\n"), self
        return lines[0]


@pytest.fixture
def run(in_tmp, monkeypatch, capsys):
    """Run infer.py in this process and a temporary folder, as the command line does; `given` is standard input."""

    def run(*words, given: bytes = b"", encoding: str = "utf-8") -> Answer:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding=encoding))
        try:
            cli.run_script(lambda words: infer.main(cli.parse(InferConfig, words)), [*PLAIN, *map(str, words)])
        except SystemExit as end:
            return Answer(*capsys.readouterr(), end.code)
        return Answer(*capsys.readouterr(), 0)

    return run


@pytest.fixture
def texts(run):
    """Run it with --json; all of the report."""

    def texts(*words, **more) -> dict:
        done = run(*words, "--json", "report.json", **more)
        assert done.code == 0, done
        return json.loads(Path("report.json").read_text(encoding="utf-8"))

    return texts


def words_of(report: dict) -> list[str]:
    return [text["text"] for text in report["texts"]]


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# a trained model


@pytest.fixture
def trained(tiny_home, run, monkeypatch):
    """`run` in the folder of a trained run, which only is read there."""
    monkeypatch.chdir(tiny_home)
    return run


def test_text_follows_the_prompt_and_the_seed(trained):
    prompt, words = "99 green bottles", ("--max_new_tokens", 40)
    first = trained("--prompt", prompt, "--seed", 5, *words)
    assert first.out.startswith(prompt)
    assert len(first.out.encode(errors="replace")) > len(prompt) + 20
    assert trained("--prompt", prompt, "--seed", 5, *words).out == first.out
    assert trained("--prompt", prompt, "--seed", 6, *words).out != first.out
    assert "out/quickstart/ckpt/iter_000060, iter 60: " in first.err
    assert "iter 60" in first.err
    assert "float32" in first.err
    assert "40 tokens, the first after " in first.err


def test_greedy_three_times(trained):
    """And by transformers' rules: the likeliest token, whatever the seed."""
    base = ["--prompt", "green ", "--max_new_tokens", 30]
    ways = [["--temperature", 0], ["--greedy"], ["--top_k", 1], ["--greedy", "--seed", 9], ["--top_p", 1e-6]]
    assert len({trained(*base, *way).out for way in ways}) == 1
    assert trained(*base).out != trained(*base, "--greedy").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "float32"),
        (["--dtype", "bfloat16"], "bfloat16"),
        (["--dtype", "auto", "--quantize", "int8"], "int8"),
        (["--dtype", "bfloat16", "--quantize", "int8", "--num_samples", 3], "int8"),
    ],
)
def test_precision_that_computes_is_said(trained, words, said):
    done = trained("--prompt", "99 green bottles", "--max_new_tokens", 20, *words)
    assert done.code == 0
    assert f"on cpu, {said}, eager" in done.err
    assert done.out.count("99 green bottles") >= 1


def test_two_files_are_all_that_is_read(trained, tmp_path):
    """A checkpoint to give away: no optimizer, no run, no data."""
    for name in ("model.safetensors", "state.json"):
        (tmp_path / "given").mkdir(exist_ok=True)
        shutil.copy(Path("out/quickstart/ckpt/last") / name, tmp_path / "given" / name)
    expected = trained("--prompt", "99").out
    os.chdir(tmp_path)
    assert not Path("data").exists()
    assert trained("--prompt", "99", "--model_path", "given").out == expected


def test_no_run_yet(tmp_path):
    done = command("infer", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: no run in out/ yet: train one (python train.py), or name one with --model_path\n"


# ---------------------------------------------------------------------------------------------------------------------
# prompts


UNUSUAL = "Once 🎈 upon 東京\tun café — 中文"


PROMPTS = ("ROMEO:", UNUSUAL, "two\nlines", " ends with blanks  ", "-", "\n")
SOURCES = ("--prompt", "--prompt_file", "--prompts_file", "-")


@pytest.mark.parametrize(
    ("source", "prompt"), [(s, p) for s in SOURCES for p in PROMPTS if not (s == "--prompts_file" and "\n" in p)]
)
def test_each_source_gives_the_prompt_to_the_letter(run, source, prompt):
    model = at_random()
    words = {
        "--prompt": ["--prompt", prompt],
        "--prompt_file": ["--prompt_file", write("a.txt", prompt + "\n")],
        "--prompts_file": ["--prompts_file", write("a.txt", prompt + "\n")],
        "-": ["-"],
    }[source]
    done = run(*words, "--model_path", model, "--json", "a.json", "--greedy", given=prompt.encode() + b"\n")
    text = json.loads(Path("a.json").read_text())["texts"][0]
    assert text["prompt"] == prompt
    assert text["prompt_tokens"] == len(prompt.encode())
    assert done.out == prompt + text["text"] + "\n"
    assert text["text"] == words_of(json.loads(run("--prompt", prompt, *PLAIN, "--greedy", "--json", "-").out))[0]


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("one", "one"),
        ("one\n", "one"),
        ("one\n\n", "one\n"),
        ("one\ntwo\n", "one\ntwo"),
        ("one\r\ntwo\r\n", "one\ntwo"),
        ("\ufeffone\n", "one"),
        ("", ""),
        ("\n", ""),
    ],
)
def test_file_of_one_prompt_loses_one_newline_at_its_end(texts, content, prompt):
    words = ["--model_path", by_heart("x" * 12), "--max_new_tokens", 1]
    assert texts("--prompt_file", write("a.txt", content), *words)["texts"][0]["prompt"] == prompt
    assert texts("-", *words, given=content.encode())["texts"][0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        (f"\n{UNUSUAL}\n\n", ["", UNUSUAL, ""]),
        ("one", ["one"]),
    ],
)
def test_file_with_a_prompt_a_line(texts, content, prompts):
    report = texts("--prompts_file", write("a.txt", content), "--model_path", at_random(), "--max_new_tokens", 2)
    assert [text["prompt"] for text in report["texts"]] == prompts


@pytest.mark.parametrize(
    ("words", "content", "said"),
    [
        (["--prompt_file", "none.txt"], None, "error: none.txt: No such file or directory"),
        (["--prompts_file", "none.txt"], None, "error: none.txt: No such file or directory"),
        (["--prompt_file", "out"], None, "error: out: Is a directory"),
        (["--prompts_file", "out"], None, "error: out: Is a directory"),
        (["--prompts_file", "a.txt"], b"", "error: prompts_file = a.txt: the file is empty"),
        (["--prompt_file", "a.txt"], b"caf\xe9\n", "error: a.txt: not UTF-8 text: "),
        (["--prompts_file", "a.txt"], b"one\n\xff\xfet\n", "error: a.txt: not UTF-8 text: "),
        (["-"], b"one \xf0\x9f", "error: standard input: not UTF-8 text: "),
    ],
)
def test_prompts_that_cannot_be_read_are_an_error_line(run, words, content, said):
    by_heart("x")
    if content is not None:
        write("a.txt", content)
    done = run(*words, given=content or b"")
    assert done.error.startswith(said)
    assert done.out == ""


def test_place_of_the_byte_that_is_no_text_is_told(run):
    by_heart("x")
    assert "at byte 5" in run("--prompt_file", write("a.txt", b"hello\xff")).error


@pytest.mark.parametrize(
    "words",
    [
        [*one, *other]
        for one, other in itertools.combinations(
            (["-"], ["--prompt", "x"], ["--prompt_file", "a"], ["--prompts_file", "a"], ["--interactive"]), 2
        )
    ],
    ids=" ".join,
)
def test_one_source_at_a_time(run, words):
    names = [word for word in words if word.startswith("-")]
    assert run(*words).error == f"error: {' and '.join(names)} exclude each other: give one of them"


def test_word_that_stands_alone_is_a_mistake(run):
    assert "hello" in run("hello").error


@pytest.mark.parametrize(("end_of_text", "said"), [(True, "E"), (False, "N")])
def test_empty_prompt_starts_where_a_text_of_the_data_does(texts, end_of_text, said):
    """The model says E after end-of-text, N after a new line."""
    model = empty()
    with torch.no_grad():
        for place, (before, after) in enumerate(((EOT, "E"), (ord("\n"), "N"))):
            model.transformer.wte.weight[before, place] = 1
            model.lm_head.weight[ord(after), place] = 100
    words = ["--model_path", save(model, "start", end_of_text), "--max_new_tokens", 1]
    for given in ([], ["--prompt", ""], ["--prompts_file", write("a.txt", "\n\n")]):
        report = texts(*words, *given)
        assert set(words_of(report)) == {said}
        assert report["texts"][0]["prompt"] == ""
        assert report["texts"][0]["prompt_tokens"] == 1


def test_prompt_longer_than_the_context(run):
    """5,000 tokens: the model reads their end; that is said once, however many texts there are."""
    end = "abc\nefgh é" * 3 + "abcdefg"
    assert len(end.encode()) == 40
    long = "ab" + "東" * 1656 + end
    words = ["--model_path", at_random(), "--greedy", "--max_new_tokens", 30, "--json", "a.json"]
    done = run("--prompt_file", write("a.txt", long), *words, "--num_samples", 3, "--batch_size", 1)
    assert done.code == 0
    assert done.err.count("note: ") == 1
    assert "5,040 tokens" in done.err
    assert "sees 40 at once and starts from the prompt's last 40" in done.err
    report = json.loads(Path("a.json").read_text())
    assert report["texts"][0]["prompt_tokens"] == 5010
    assert done.out.count(long) == 3
    assert words_of(report)[0] == words_of(json.loads(run("--prompt", end, *words[:-1], "-").out))[0]
    assert run("--prompt", "abc", "--max_new_tokens", 38).err.count("note: ") == 0
    assert run("--prompt", "abc", "--max_new_tokens", 39).err.count("note: ") == 1


# ---------------------------------------------------------------------------------------------------------------------
# many texts


SEVERAL = "abc\n\nhgfedcba hgfedcba 東東é\nb\n"


@pytest.mark.parametrize("words", [[], ["--greedy"], ["--top_p", 0.9, "--repetition_penalty", 1.3]], ids=str)
def test_text_is_the_one_it_gets_alone(texts, words):
    """However many are written at once: prompts of all lengths, some of which end early, some slide."""
    model = at_random(eot=-1)
    words = ["--model_path", model, "--num_samples", 3, "--max_new_tokens", 60, "--stop", "bf", *words]
    words = [*words, "--prompts_file", write("a.txt", SEVERAL)]
    alone = texts(*words, "--batch_size", 1)
    assert len(alone["texts"]) == 12
    if "--greedy" not in words:
        assert {text["ended"] for text in alone["texts"]} == {"stop", "end_of_text", "length"}
    for size in (2, 5, 12, 32):
        together = texts(*words, "--batch_size", size)
        assert together["texts"] == alone["texts"], size
        assert together["settings"] == alone["settings"]


def test_texts_of_the_first_prompt_do_not_hang_on_the_others(texts):
    words = ["--model_path", at_random(), "--num_samples", 2, "--max_new_tokens", 60]
    alone = texts("--prompt", "abc", *words)
    assert texts("--prompts_file", write("a.txt", SEVERAL), *words)["texts"][:2] == alone["texts"]


def test_samples_differ_and_follow_the_seed(texts):
    """As many random numbers as texts; a batch's first is not another's."""
    words = ["--model_path", at_random(), "--prompts_file", write("a.txt", "abc\nabc\n")]
    words += ["--num_samples", 4, "--max_new_tokens", 12]
    for size in (32, 3):
        first = words_of(texts(*words, "--batch_size", size))
        assert len(set(first)) == 8
        assert words_of(texts(*words, "--batch_size", size)) == first
        assert not set(words_of(texts(*words, "--batch_size", size, "--seed", 9))) & set(first)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("live", ["--stream_text", "--no-stream_text"])
def test_headers(run, live, batch_size):
    model = at_random()
    report, expected = {}, ""
    for prompts, samples in ((1, 1), (1, 3), (2, 1), (2, 3)):
        words = ["--prompts_file", write("a.txt", "abc\nb\n"[: 4 if prompts == 1 else None]), "--model_path", model]
        done = run(
            *words,
            live,
            "--max_new_tokens",
            9,
            "--num_samples",
            samples,
            "--batch_size",
            batch_size,
            "--json",
            "a.json",
        )
        report, expected = json.loads(Path("a.json").read_text()), ""
        for n, text in enumerate(report["texts"]):
            prompt, sample = divmod(n, samples)
            parts = [f"prompt {prompt + 1} of 2"] if prompts == 2 else []
            parts += [f"sample {sample + 1} of 3"] if samples == 3 else []
            expected += (f"--- {', '.join(parts)}\n" if parts else "") + text["prompt"] + text["text"] + "\n"
        assert done.out == expected
    assert "--- prompt 2 of 2, sample 1 of 3\nb" in expected


# ---------------------------------------------------------------------------------------------------------------------
# how it comes


class Pieces(io.StringIO):
    """Standard output that remembers what came in one piece."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text: str) -> int:
        self.pieces += [text] if text else []
        return super().write(text)


@pytest.fixture
def pieces(run, monkeypatch):
    """What standard output got, piece by piece."""

    def pieces(*words) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out := Pieces())
            assert run(*words).code == 0
        assert "".join(out.pieces) == out.getvalue()
        return out.pieces

    return pieces


SAID = "naïve 東京 👩‍🚀!"


def test_characters_come_one_by_one_and_whole(pieces):
    words = ["--model_path", by_heart(SAID), "--prompt", "p", "--max_new_tokens", len(SAID.encode())]
    assert pieces(*words) == ["p", *SAID, "\n"]
    assert pieces(*words, "--no-stream_text") == ["p", SAID, "\n"]
    assert pieces(*words[:-1], 3) == ["p", "n", "a", "�", "\n"], "half a character is one that is none"


def test_what_may_become_a_stop_string_waits(pieces):
    script = "a EN END. ENDX rest"
    words = ["--model_path", by_heart(script), "--prompt", "p", "--stop", "ENDX", "--max_new_tokens", 18]
    assert pieces(*words) == ["p", "a", " ", "EN ", "END.", " ", "\n"]
    assert pieces(*words, "--no-stream_text") == ["p", "a EN END. ", "\n"]
    cut = pieces(*words[:-1], 4)
    assert cut == ["p", "a", " ", "EN", "\n"], "what waits when it ends is no stop string"


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_first_text_of_a_batch_is_shown_while_the_others_wait(pieces, batch_size):
    words = ["--model_path", by_heart(SAID), "--prompt", "p", "--max_new_tokens", len(SAID.encode())]
    shown = pieces(*words, "--num_samples", 3, "--batch_size", batch_size)
    assert shown[: len(SAID) + 2] == ["--- sample 1 of 3\np", *SAID, "\n"]
    if batch_size == 1:
        assert shown[len(SAID) + 2 :] == [p for n in "23" for p in (f"--- sample {n} of 3\np", *SAID, "\n")]
    elif batch_size == 32:
        assert shown[len(SAID) + 2 :] == [p for n in "23" for p in (f"--- sample {n} of 3\np", SAID, "\n")]


@pytest.mark.parametrize("words", [[], ["--num_samples", 4, "--stop", "a", "b"], ["--greedy", "--quantize", "int8"]])
def test_streamed_or_not_is_the_same_text(run, words):
    """Of a model that makes halves of characters, too."""
    words = ["--model_path", at_random(eot=0.5), "--max_new_tokens", 50, "--dtype", "bfloat16", *words]
    assert run(*words).out == run(*words, "--no-stream_text").out


@pytest.mark.parametrize("interactive", [False, True])
def test_terminal_that_is_not_utf8(run, monkeypatch, interactive):
    """Its question marks are no traceback; what is read is UTF-8 all the same, as from files."""
    model, out = by_heart("-東!"), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    words = ["--interactive" if interactive else "-", "--model_path", model, "--max_new_tokens", 3]
    assert run(*words, given="é\n".encode(), encoding="ascii").code == 0
    assert out.buffer.getvalue() == b"??\n"


# ---------------------------------------------------------------------------------------------------------------------
# where it ends


def ends(report: dict) -> list[tuple[str, str, int]]:
    return [(text["text"], text["ended"], text["tokens"]) for text in report["texts"]]


def test_length(texts):
    words = ["--model_path", by_heart("abcdefgh"), "--prompt", "p"]
    for length in (1, 2, 8):
        assert ends(texts(*words, "--max_new_tokens", length)) == [("abcdefgh"[:length], "length", length)]
    assert ends(texts(*words))[0][1:] == ("length", 200)


def test_end_of_text(run, texts):
    model = by_heart([*b"ab", EOT, *b"cd"])
    words = ["--model_path", model, "--prompt", "p", "--max_new_tokens", 5]
    assert ends(texts(*words)) == [("ab", "end_of_text", 2)]
    assert run(*words).out == "pab\n"
    assert ends(texts(*words, "--ignore_eot")) == [("ab<|endoftext|>cd", "length", 5)]
    assert ends(texts(*words[:-1], 3)) == [("ab", "end_of_text", 2)]
    assert ends(texts(*words[:-1], 2)) == [("ab", "length", 2)]
    assert ends(texts(*words, "--prompt", "pqr")) == [("", "end_of_text", 0)]
    assert run(*words, "--prompt", "pqr").out == "pqr\n"


@pytest.mark.parametrize(
    ("stops", "text", "tokens"),
    [
        (["--stop", "d"], "abc", 4),
        (["--stop", "x", "--stop", "cd"], "ab", 4),
        (["--stop", "x", "cd"], "ab", 4),
        (["--stop=e", "--stop=cd"], "ab", 4),
        (["--stop", "cdef", "--stop", "de"], "abc", 5),
        (["--stop", "\n\n"], "abcdef", 8),
        (["--stop", "東"], "abcdef\n\n", 11),
        (["--stop", "abc"], "", 3),
        (["--stop", "p"], "abcdef\n\n東!", 12),
        (["--stop", "pa"], "abcdef\n\n東!", 12),
    ],
)
def test_stop_strings(run, texts, stops, text, tokens):
    """The first that is complete ends the text; the prompt is not searched."""
    words = ["--model_path", by_heart("abcdef\n\n東!"), "--prompt", "p", "--max_new_tokens", 12, *stops]
    report = texts(*words)
    assert ends(report) == [(text, "length" if tokens == 12 else "stop", tokens)]
    assert run(*words).out == f"p{text}\n"
    assert report["tokens"] == tokens


def test_texts_of_a_batch_end_on_their_own(texts):
    """By a stop string, end-of-text and length; what a text that has ended goes on with is not in it."""
    model = by_heart([*b"abXcdef", EOT, *b"ghijklmn"])
    prompts = write("a.txt", "p\npqrs\n" + "p" * 9 + "\n")
    report = texts("--model_path", model, "--prompts_file", prompts, "--stop", "X", "--max_new_tokens", 6)
    assert ends(report) == [("ab", "stop", 3), ("cdef", "end_of_text", 4), ("ghijkl", "length", 6)]
    assert report["tokens"] == 3 + 4 + 6


def test_closed_pipe_is_no_traceback(tiny_home):
    """Also while the second of several texts is written."""
    words = [sys.executable, str(ROOT / "infer.py"), "--max_new_tokens", "3000", "--device", "cpu"]
    words += ["--num_samples", "3", "--batch_size", "1"]
    with running(words, cwd=tiny_home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert any(b"--- sample 2" in line for line in process.stdout)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 141
    assert "Traceback" not in said
    assert "error" not in said


# ---------------------------------------------------------------------------------------------------------------------
# the report


def test_report_has_settings_texts_and_figures(texts):
    model = by_heart("abc")
    report = texts("--model_path", model, "--prompt", "p", "--max_new_tokens", 3, "--stop", "x", "y", "--top_p", 0.5)
    assert report.pop("seconds_to_first_token") > 0
    assert report.pop("tokens_per_s") > 0
    assert report == {
        "model": model,
        "iter": 7,
        "parameters": 257 * 8 * 2 + 8 * 8 + 12 * 8 * 8 + 13 * 8 + 2 * 8,
        "machine": "cpu, float32, eager",
        "settings": {
            "temperature": 0.8,
            "greedy": False,
            "top_k": 0,
            "top_p": 0.5,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": 1337,
            "max_new_tokens": 3,
            "stop": ["x", "y"],
            "ignore_eot": False,
        },
        "tokens": 3,
        "texts": [{"prompt": "p", "text": "abc", "prompt_tokens": 1, "tokens": 3, "ended": "length"}],
    }


@pytest.mark.parametrize(("words", "heat"), [(["--greedy"], 0), (["--temperature", 0], 0), (["--temperature", 2], 2)])
def test_report_names_the_temperature_that_counts(texts, words, heat):
    assert texts("--model_path", by_heart("x"), *words, "--max_new_tokens", 1)["settings"]["temperature"] == heat


def test_report_of_a_single_token_has_no_pace(texts):
    assert texts("--model_path", by_heart("xy"), "--max_new_tokens", 1)["tokens_per_s"] is None


@pytest.mark.parametrize("live", ["--stream_text", "--no-stream_text"])
def test_report_on_standard_output_is_all_there_is(run, texts, live):
    words = ["--model_path", at_random(), "--prompt", UNUSUAL, "--num_samples", 3, "--max_new_tokens", 9, live]
    done = run(*words, "--json", "-")
    report = json.loads(done.out)
    assert done.out.startswith("{")
    assert done.out.endswith("}\n")
    assert report["texts"] == texts(*words)["texts"]
    assert report["texts"][0]["prompt"] == UNUSUAL
    assert done.err.count("tokens/s") == 1


def test_report_is_there_after_each_batch(run, monkeypatch):
    """A night of prompts may end by a power cut."""
    write, there = Writer.write, []

    def looking(writer, texts):
        there.append(len(json.loads(Path("a.json").read_text())["texts"]) if Path("a.json").exists() else 0)
        return write(writer, texts)

    monkeypatch.setattr(Writer, "write", looking)
    words = ["--num_samples", 5, "--batch_size", 2, "--max_new_tokens", 2, "--json", "a.json"]
    assert run("--model_path", by_heart("abc"), *words).code == 0
    assert there == [0, 2, 4]
    assert len(json.loads(Path("a.json").read_text())["texts"]) == 5


@pytest.mark.parametrize("target", ["none/a.json", "out"])
def test_report_that_cannot_be_written_is_an_error_line(run, target):
    by_heart("xyz")
    assert run("--json", target, "--max_new_tokens", 2).error.startswith(f"error: json = {target}: cannot be written: ")


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.fixture
def ctrl_c(monkeypatch):
    """Have the signal come while a text takes its n-th token."""

    def ctrl_c(*numbers: int) -> None:
        append, count = Text.append, itertools.count(1)

        def interrupted(text, *more) -> None:
            append(text, *more)
            if next(count) in numbers:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Text, "append", interrupted)

    return ctrl_c


@pytest.mark.parametrize("live", ["--stream_text", "--no-stream_text"])
def test_interrupted_texts_are_reported(run, ctrl_c, live):
    """Two batches of two; it comes in the second, after three tokens of each."""
    model = by_heart("abcdefgh")
    words = ["--prompt", "p", "--model_path", model, "--max_new_tokens", 8, "--num_samples", 5, "--batch_size", 2]
    ctrl_c(8 * 2 + 6)
    done = run(*words, live, "--json", "a.json")
    assert done.code == 130
    assert done.out.endswith("\n")
    assert not done.out.endswith("\n\n")
    assert done.out.startswith("--- sample 1 of 5\npabcdefgh\n--- sample 2 of 5\npabcdefgh\n")
    assert done.err.splitlines()[-1].startswith("2"), "the pace comes last"
    report = json.loads(Path("a.json").read_text())
    assert ends(report) == [*[("abcdefgh", "length", 8)] * 2, *[("abc", "interrupted", 3)] * 2]


def test_interrupted_report_on_standard_output(run, ctrl_c):
    ctrl_c(3)
    done = run("--prompt", "p", "--model_path", by_heart("abcdefgh"), "--json", "-")
    assert done.code == 130
    assert ends(json.loads(done.out)) == [("abc", "interrupted", 3)]
    assert done.out.startswith("{"), "and nothing else"


def test_interrupted_for_real(tiny_home, tmp_path):
    """Of a process, while it writes to a pipe: a text of a million tokens comes while it is made."""
    words = [sys.executable, str(ROOT / "infer.py"), "--device", "cpu", "--max_new_tokens", "1000000"]
    words += ["--json", str(tmp_path / "a.json"), "--prompt", "99"]
    with running(words, cwd=tiny_home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        written = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        more, said = process.communicate(timeout=90)
        assert process.returncode == 130
    assert "Traceback" not in said.decode()
    shown = (written + more).decode()
    assert shown.endswith("\n")
    (text,) = json.loads((tmp_path / "a.json").read_text())["texts"]
    assert text["ended"] == "interrupted"
    assert len(text["text"]) >= len(shown) - 3
    assert shown.rstrip("\n").startswith("99")
    assert text["text"].startswith(shown[2:-1]), "all that was shown is in it"


# ---------------------------------------------------------------------------------------------------------------------
# a conversation


def test_conversation(run):
    """Each line on its own; the texts' random numbers differ, and are those of so many samples."""
    model = at_random()
    words = ["--model_path", model, "--max_new_tokens", 12]
    done = run("--interactive", *words, given=f"abc\nabc\n\n{UNUSUAL}".encode())
    assert done.code == 0
    assert "Traceback" not in done.err
    samples = words_of(json.loads(run("--prompt", "abc", "--num_samples", 2, *words, "--json", "-").out))
    assert done.out.startswith(f"abc{samples[0]}\nabc{samples[1]}\n")
    assert samples[0] != samples[1]
    assert f"\n{UNUSUAL}" in done.out


def test_conversation_takes_the_stops(run):
    words = ["--model_path", by_heart("abXcd"), "--stop", "X", "--max_new_tokens", 5]
    assert run("--interactive", *words, given=b"p\npqr\n").out == "pab\n" + "pqr\n"


def test_conversation_without_a_word(run):
    by_heart("x")
    done = run("--interactive")
    assert (done.out, done.code) == ("", 0)


@pytest.mark.parametrize("live", ["--stream_text", "--no-stream_text"])
def test_interrupted_in_a_conversation_ends_a_text_only(run, ctrl_c, live):
    words = ["--model_path", by_heart("abcdefgh"), "--max_new_tokens", 7, "--interactive", live]
    ctrl_c(3)
    done = run(*words, given=b"p\npq\n")
    assert done.code == 0
    assert done.out == "pabc\npqbcdefgh\n"


def test_conversation_in_bytes_that_are_no_text(run):
    by_heart("x")
    assert "UTF-8" in run("--interactive", given=b"caf\xe9\n").error


def test_conversation_is_not_reported(run):
    for words in (["--json", "a.json"], ["--num_samples", "2"]):
        assert "--interactive writes one text at a time" in run("--interactive", *words).error


def test_conversation_for_real(tiny_home):
    """Two Ctrl-C: during a text, and while it waits for the next."""
    words = [sys.executable, "-u", str(ROOT / "infer.py"), "--device", "cpu", "--interactive"]
    words += ["--max_new_tokens", "1000000", "--stop", "\n"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running([*words, "--greedy", "--ignore_eot"], cwd=tiny_home, **pipes) as process:
        for prompt in (b"99 green", b"98 green"):
            process.stdin.write(prompt + b"\n")
            process.stdin.flush()
            assert process.stdout.read(30).startswith(prompt)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline().endswith(b"\n")
        while not waits_long(process.pid):  # for the next line
            pass
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=90)[1]
        assert process.returncode == 130
    assert "Traceback" not in said.decode()


def test_speed_leaves_compiling_out(run, monkeypatch):
    """However long the compiler takes at the second token, the figure is that of the others."""
    real, now = writer.Decoder.decode_step, 0.0

    def slow(self, tokens):
        nonlocal now
        now += 0.1
        if not self.compile_seconds:
            now += 0.5
            self.compile_seconds = 0.5
        return real(self, tokens)

    monkeypatch.setattr(writer.Decoder, "decode_step", slow)
    monkeypatch.setattr(writer, "time", SimpleNamespace(perf_counter=lambda: now))
    done = run("--model_path", by_heart("abcdefgh"), "--prompt", "a", "--max_new_tokens", 6, "--json", "a.json")
    assert "; compiling took 0.5 s" in done.err
    assert json.loads(Path("a.json").read_text())["tokens_per_s"] == pytest.approx(10)


def test_report_is_whole_or_the_one_before(run, monkeypatch):
    """A disk that fills while the second report is written leaves the first; a missing folder is said at once."""
    words = ["--model_path", by_heart("abcdefgh"), "--prompt", "a", "--max_new_tokens", 3, "--json"]
    assert run(*words, "a.json").code == 0
    before = Path("a.json").read_bytes()

    def full(self, *more, **words):
        with open(self, "wb") as file:
            file.write(b"{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "a.json: cannot be written: No space left on device" in run(*words, "a.json").error
    assert Path("a.json").read_bytes() == before
    assert not list(Path().glob(".a.json*"))
    done = run(*words, "nowhere/a.json")
    assert done.out == ""
    assert "nowhere/a.json: cannot be written" in done.error


def test_the_word_none_is_a_prompt(run):
    assert run("--model_path", by_heart("abcdefgh"), "--prompt", "none", "--max_new_tokens", 3).out == "nonedef\n"


def test_closed_streams_are_no_traceback(tiny_home):
    for closed in ("<&-", ">&-", "2>&-"):
        words = f"'{sys.executable}' '{ROOT / 'infer.py'}' - --device cpu --max_new_tokens 3 {closed}"
        done = subprocess.run(["sh", "-c", words], cwd=tiny_home, capture_output=True, text=True, input="green")
        assert "Traceback" not in done.stderr + done.stdout
        assert "parameters" not in done.stdout
        assert done.returncode == 0, done
