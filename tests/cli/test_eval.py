"""eval.py: reports against slow plain references, transformers and several ranks; and what it refuses."""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import transformers
from dataset_files import finished, nanogpt
from gpt2_reference import random_gpt2
from in_process import TEXT, make_dataset, train_here
from processes import ROOT
from scoring import rolling_loop, strided_loop

import eval as script
from config import EvalConfig, PrepareConfig, UserError
from flatgpt.cli import cli as command_line
from flatgpt.data import tokenizer
from flatgpt.data.dataset import open_dataset
from flatgpt.data.prepare import prepare
from flatgpt.evaluation import metrics
from flatgpt.evaluation.report import PROTOCOLS
from flatgpt.interop import loading

T, EOT = 32, 256  # of the byte models here
RUN, NAME = "out/quickstart", "out/quickstart/ckpt/iter_000060"
WORDS = "3 green bottles, naïve café 🎈\nand if 2 green ones should fall,\n"
BOM = b"\xef\xbb\xbf"
QUESTIONS = [
    {"ctx": "98 green bottles hanging on the", "endings": ["wall, and if", "zzz", "Q"], "label": 0},
    {"ctx": "there will be ", "endings": ["Q", "97 green bottles. Naïve café", "#!"], "label": "1", "source": "x"},
    {"ctx": "if 5 green bottles should accidentally", "endings": ["fall, there", "of the", "X"], "label": 2},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """data/tiny with end-of-text and out/quickstart; data/joined without and out/joined; gpt2_tiny by transformers."""
    folder = tmp_path_factory.mktemp("eval")
    make_dataset(folder)
    meta = make_dataset(folder, "joined").folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"end_of_text": False}))
    random_gpt2(n_positions=16, vocab_size=50257).save_pretrained(folder / "gpt2_tiny")
    with contextlib.chdir(folder):
        train_here("--max_iters", 60, "--eval_interval", 30, "--lr", "5e-3")
        train_here("--dataset", "joined", "--out_dir", "out/joined")
        write("t.txt", WORDS)
        write("c.jsonl", "\n".join(map(json.dumps, QUESTIONS)))
        make_dataset(folder, "bpe", "Other words. " * 100, encoding="gpt2")
        write("sampled.toml", "sampled = true")
        write("pickled.bin", pickle.dumps(list(range(1000))))
        write("bom.txt", BOM)
        write("bad.txt", BOM + b"ab\xffcd")
        write_ids("one.bin", [7])
        write_ids("ends.bin", [EOT] * 3)
        write_ids("beyond.bin", [1, 2, 257, 3])
    return folder


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch) -> None:
    monkeypatch.chdir(home)


def report(*words, model: str | Path | list = RUN) -> dict:
    """What eval.py writes with --json, run in this process; strict JSON."""
    models = model if isinstance(model, list) else [model]
    words = ["--device", "cpu", "--json", "report.json", *words, "--model_path", *models]
    script.main(command_line.parse(EvalConfig, [*map(str, words)]))
    return json.loads(Path("report.json").read_text(), parse_constant=pytest.fail)


def refusal(*words, model: str | Path | list = RUN) -> str:
    """The message with which eval.py refuses; one line."""
    with pytest.raises(UserError) as caught:
        report(*words, model=model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(name: str | Path, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def write_ids(name: str, ids) -> str:
    return write(name, np.array(ids, dtype="<u2").tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# figures and protocols


@pytest.mark.parametrize(
    ("protocol", "stride", "length"),
    [
        *(("window", None, n) for n in (2, T + 1, 130)),
        *(("stride", s, n) for s, n in ((None, 130), (7, 99), (T, 99))),
        *(("rolling", None, n) for n in (1, T, 130)),
    ],
)
@torch.no_grad()
def test_figures_equal_a_plain_loop(protocol, stride, length):
    """One window at a time; tests/parity compares the figures that need no text."""
    text, rolling = (WORDS * 3).encode(), protocol == "rolling"
    ids = [*text[:60], EOT, *text[60 : length - 1]] if length > 61 else [*text[:length]]
    words = ["--protocol", protocol, "--test_data_path", write_ids("ids.bin", ids), "--batch_size", 2]
    got = report(*words, *(["--stride", stride] if stride else []))
    model, _ = loading.load(loading.find(RUN, print), torch.device("cpu"))
    windows, nats = rolling_loop(ids, T, EOT) if rolling else strided_loop(ids, T + 1, got.get("stride", T)), 0.0
    for inputs, targets in windows:
        log_p = model(torch.tensor([inputs]))[0].double().log_softmax(-1)[-len(targets) :]
        nats -= float(log_p.gather(1, torch.tensor(targets)[:, None]).sum())
    bytes_scored = sum(i != EOT for i in ids) - (not rolling)  # otherwise the first token is read only
    ends = ids.count(EOT)
    whole = b"".join(b"\0 " if i == EOT else bytes([i]) for i in ids).replace(b"\0", b"").decode(errors="replace")
    tokens = len(ids) - (ends if rolling else 1)
    assert (got["tokens"], got["bytes"], got["words"]) == (tokens, bytes_scored, len(whole.split()))
    expected = (1 + ends, 0) if rolling else (None, ends or None)
    assert (got.get("documents"), got.get("end_of_text_tokens")) == expected
    assert (got["lines"], got["window"]) == (whole.count("\n"), T)
    assert got.get("stride") == (stride or T // 2 if protocol == "stride" else None)
    assert got["loss"] == pytest.approx(nats / got["tokens"], rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_scored, rel=1e-5)
    per_word = nats / len(whole.split())
    assert got["word_perplexity"] == (pytest.approx(math.exp(per_word), rel=1e-4) if per_word < 700 else None)


def test_the_default_is_the_whole_validation_split_of_the_run(cli, tmp_path):
    """The digits do not change from call to call, nor, but for rounding, with batch_size; no random number is drawn."""
    ids, state = np.fromfile("data/tiny/val_000000.bin", dtype="<u2"), torch.get_rng_state()
    got = report()
    assert (got["model"], got["iter"], got["text"], got["dtype"]) == (NAME, 60, "data/tiny val", "float32")
    assert (got["tokens"], got["bytes"]) == (len(ids) - 1, (ids[1:] != EOT).sum())
    assert report("--batch_size", 3)["loss"] == pytest.approx(got["loss"], rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    words = ["eval", "--device", "cpu", "--model_path", RUN]
    done = cli(*words, "--json", "-", "--plot", tmp_path / "one.png")
    assert (done.code, done.err, json.loads(done.out)) == (0, "", got)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n")
    printed = cli(*words, "--protocol", "stride", "--dtype", "bfloat16").out
    assert f"{PROTOCOLS['stride']}\n" in printed
    assert "bfloat16  of the matrix products\n" in printed
    low, exact = (report("--protocol", "stride", "--dtype", dtype)["loss"] for dtype in ("bfloat16", "float32"))
    assert f"  {low:.4f}  {got['units']['loss']}\n" in printed
    assert low == pytest.approx(exact, rel=0.02)
    assert low != exact


def test_the_protocol_says_what_is_special(cli):
    """A part of the split; end-of-text in front, where the model's data never had it."""
    got, never = report("--eval_batches", 2, "--batch_size", 4, "--split", "train"), "which is not in the model's"
    assert (got["tokens"], got["eval_batches"], got["text"]) == (2 * 4 * T, 2, "data/tiny train")
    assert got["protocol_means"].endswith(f"; first {2 * 4 * T} tokens")
    ids = np.fromfile("data/tiny/train_000000.bin", dtype="<u2")[: 2 * 4 * T + 1]
    text = bytes(ids[ids != EOT].astype(np.uint8)).decode(errors="replace")
    assert (got["words"], got["lines"]) == (len(text.split()), text.count("\n"))
    for model, protocol, said in ((RUN, "rolling", False), ("out/joined", "rolling", True), ("out/joined", "", False)):
        words = ["--protocol", protocol] if protocol else []
        assert (never in report(*words, model=model)["protocol_means"]) == said


# ---------------------------------------------------------------------------------------------------------------------
# which text


def test_the_dataset_of_the_run_may_have_moved(tmp_path, monkeypatch):
    shutil.copytree("data/tiny", tmp_path / "moved/tiny")
    expected = report()
    shutil.copytree(RUN, tmp_path / RUN, symlinks=True)
    monkeypatch.chdir(tmp_path)
    got = report("--data_dir", "moved")
    assert (got["text"], got["loss"]) == ("moved/tiny val", expected["loss"])
    assert report("--dataset", "tiny", "--data_dir", "moved")["text"] == "moved/tiny val"
    assert "dataset data/tiny does not exist" in refusal()


def test_files_of_ids(capsys, tmp_path):
    """Of a dataset of another program, too."""
    text = "If 3 green bottles 🎈".encode()
    got = report("--test_data_path", write_ids("bare.bin", [*text, EOT, *text]))
    assert (got["tokens"], got["bytes"]) == (2 * len(text), 2 * len(text) - 1)
    assert "the model's tokenizer, byte" in capsys.readouterr().err
    assert report("--test_data_path", "data/tiny/val_000000.bin")["loss"] == report()["loss"]
    assert "read as" not in capsys.readouterr().err
    folder = finished(tmp_path / "zeros", {"val": [[5, 0] * 20]})  # without the manifest they look like uint32
    assert report("--test_data_path", folder / "val_000000.bin")["tokens"] == 39
    folder = nanogpt(tmp_path / "owt", train=range(99), val=range(50))
    assert report("--dataset", "owt", "--data_dir", tmp_path, model="gpt2_tiny")["tokens"] == 49
    assert open_dataset(folder).notice in capsys.readouterr().err


MIXED = "one\r\ntwo\n\n three 🎈 <|endoftext|> \t naïve\r東京 \ufeff isn't \n"


@pytest.mark.parametrize("encoding", ["byte", "gpt2"])
def test_text_equals_the_same_text_prepared(encoding, tmp_path, monkeypatch):
    """A file given to --text and to prepare_data.py, also if it is encoded in chunks; and standard input."""
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 100)
    model, file = {"byte": RUN, "gpt2": "gpt2_tiny"}[encoding], write(tmp_path / "mixed.txt", BOM + MIXED.encode() * 5)
    settings = {"tokenizer": encoding, "data_dir": str(tmp_path), "name": "same", "splits": ("val",)}
    prepare(PrepareConfig(source="text", input=(str(file),), val_fraction=0.999999, **settings), lambda line: None)
    ids = np.fromfile(tmp_path / "same/val_000000.bin", dtype="<u2")
    assert ids[-1] == tokenizer.load(encoding).eot_token
    one = report("--text", file, model=model)
    two = report("--test_data_path", write_ids("same.bin", ids[:-1]), model=model)
    assert one | {"text": "same.bin"} == two
    assert one["tokens"] == len(tokenizer.load(encoding).encode_ordinary(MIXED * 5)) - 1
    read, wrote = os.pipe()
    os.write(wrote, BOM + MIXED.encode() * 5)
    os.close(wrote)
    standard_input = os.dup(0)
    os.dup2(read, 0)
    assert report("--text", "-", model=model) == one | {"text": "/dev/stdin"}
    for key, path in (("text", "-"), ("choices", "/dev/stdin")):
        assert "a pipe can be read once only" in refusal(f"--{key}", path, model=[RUN, RUN])
    os.dup2(standard_input, 0)


def test_word_perplexity_beyond_the_range_of_floats():
    """A language without spaces, whose text is one word."""
    got = report("--text", write("cn.txt", "東京都は日本の首都である。" * 40))
    assert (got["words"], got["word_perplexity"], got["loss"] * got["tokens"] > 710) == (1, None, True)


@pytest.mark.parametrize(
    "words",
    [
        "--text t.txt",
        "--text t.txt --protocol stride --plot nan.png",
        "--text t.txt --protocol rolling --dtype float16",
        "--choices c.jsonl",
        pytest.param(
            "--text t.txt --generate 2 --prompt_tokens 4 --max_new_tokens 6",
            marks=pytest.mark.extra("sacrebleu", "rouge_score"),
        ),
    ],
)
def test_figures_of_a_diverged_model_are_null(words, tmp_path, capsys):
    """Every number that is measured, none of which would mean anything; and one warning."""
    model = random_gpt2(n_positions=16, vocab_size=50257)
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    model.save_pretrained(tmp_path)
    figures = {key for key, value in report(*words.split()).items() if isinstance(value, float)}
    assert "warning" not in capsys.readouterr().err
    got = report(*words.split(), model=tmp_path)
    assert {key for key in figures if got.get(key) is not None} == set()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        f"warning: {tmp_path}: the {'choice_accuracy' if 'c.jsonl' in words else 'loss'} is NaN"
    )
    assert ("float16 overflowed" in warnings[0]) == ("float16" in words)


# ---------------------------------------------------------------------------------------------------------------------
# refusals and recipes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--choices c.jsonl --text t.txt", "text and choices exclude each other"),
        *(
            (f"--choices c.jsonl --{words}", f"{words.split()[0]} is for text")
            for words in ("protocol rolling", "generate 2", "format smol", "plot x.png", "eval_batches 2")
        ),
        ("--choices_format plain --text t.txt", "choices_format = plain is for --choices: add --choices"),
        ("--protocol stride --stride 33", "stride = 33 is larger than the window of 32 tokens"),
        ("--context_length 33", f"context_length = 33: {NAME} was trained with 32, which is the maximum"),
        ("--config sampled.toml", "sampled.toml: sampled: removed; precision, recall and F1"),
        ("--split test", "no split test; it has train, val"),
        ("--test_data_path one.bin", "one.bin has 1 token, protocol window needs at least 2"),
        ("--test_data_path data/tiny", "a .bin file is expected; for a dataset's folder, use --data_dir"),
        ("--test_data_path pickled.bin", "pickled.bin is a Python pickle"),
        ("--test_data_path beyond.bin", "id 257 at byte 4"),
        ("--test_data_path book.txt", "test_data_path = book.txt: expected uint16 ids; to evaluate a text, use --text"),
        pytest.param(
            "--generate 3 --prompt_tokens 1000000", "lower --prompt_tokens", marks=pytest.mark.extra("sacrebleu")
        ),
        ("--test_data_path ends.bin --protocol rolling", "ends.bin has 3 tokens, all of them end-of-text"),
        ("--text bom.txt --protocol rolling", "bom.txt has 0 tokens, protocol rolling needs at least 1"),
        ("--text bad.txt", "bad.txt line 1: byte 0xff is not UTF-8"),
        ("--dataset bpe", f"data/bpe val is tokenized with gpt2, but the model {NAME} was trained with byte"),
        ("--test_data_path data/bpe/val_000000.bin", "or evaluate the text itself: --text FILE"),
        ("--choices t.txt", "t.txt line 1: not JSON (Extra data"),
    ],
)
def test_refusals(words, message):
    assert message in refusal(*words.split())


@pytest.mark.parametrize(
    ("words", "model", "message"),
    [
        (
            "--generate 3",
            RUN,
            "sacrebleu and rouge_score: pip install -r requirements-extra.txt, or pip install sacrebleu rouge-score",
        ),
        ("", [RUN, "nowhere"], "model_path = nowhere: no such folder"),
    ],
)
def test_refused_before_a_model_is_loaded(words, model, message, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *words: pytest.fail("the work had begun"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert message in refusal(*words.split(), model=model)


def test_training_keys_of_a_recipe_do_not_change_what_is_measured():
    lines = ["stride = 4", "batch_size = 3", 'dtype = "bfloat16"', "context_length = 16", "eval_batches = 1"]
    lines += ["seed = 7", 'dataset = "elsewhere"']
    write("mine.toml", "\n".join(lines))
    words = ["--test_data_path", "data/tiny/val_000000.bin"]  # replaces the recipe's dataset
    assert report("--config", "mine.toml", *words) == report(*words)


# ---------------------------------------------------------------------------------------------------------------------
# models of other projects, several models


@torch.no_grad()
def transformers_loss(model: transformers.GPT2LMHeadModel, text: str, width: int) -> float:
    """Nats per token over windows that do not overlap."""
    ids, nats = tiktoken.get_encoding("gpt2").encode_ordinary(text), 0.0
    for inputs, targets in strided_loop(ids, width + 1, width):
        logits = model(torch.tensor([inputs])).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
    return nats / (len(ids) - 1)


def test_a_hugging_face_folder_is_scored_as_transformers_does():
    model = transformers.GPT2LMHeadModel.from_pretrained("gpt2_tiny")
    words = ["--text", write("some.txt", TEXT[:400])]
    for width in (16, 8):
        got = report(*words, "--context_length", width, model="gpt2_tiny")
        assert got["loss"] == pytest.approx(transformers_loss(model, TEXT[:400], width), rel=1e-5)
        assert (got["model"], got["iter"], got["window"]) == ("gpt2_tiny", None, width)
        assert got["bytes"] == len(TEXT[:400].encode()) - 2  # "99" is one token
    assert report(*words, "--context_length", 1, "--protocol", "stride", model="gpt2_tiny")["stride"] == 1
    assert "gpt2_tiny does not name a dataset: add --dataset, --test_data_path or --text" in refusal(model="gpt2_tiny")


@torch.no_grad()
def test_stride_equals_the_loop_of_transformers_documentation():
    """It shifts the labels, so that a window has a target less than ids. As printed there it also counts one token less
    than it scores in each window but the first."""
    model, (width, stride), previous = transformers.GPT2LMHeadModel.from_pretrained("gpt2_tiny"), (16, 5), 0
    ids, nats, weights = torch.tensor([tiktoken.get_encoding("gpt2").encode_ordinary(TEXT[:400])]), [], []
    for start in range(0, ids.size(1), stride):
        stop = min(start + width, ids.size(1))
        labels = ids[:, start:stop].clone()
        labels[:, : previous - start if previous else 0] = -100
        nats.append(float(model(ids[:, start:stop], labels=labels).loss))
        weights.append(int((labels[:, 1:] != -100).sum()))
        previous = stop
        if stop == ids.size(1):
            break
    words = ["--text", write("some.txt", TEXT[:400]), "--protocol", "stride", "--stride", stride]
    got = report(*words, "--context_length", width - 1, model="gpt2_tiny")
    assert got["tokens"] == sum(weights) == ids.size(1) - 1
    assert got["perplexity"] == pytest.approx(math.exp(np.average(nats, weights=weights)), rel=1e-5)
    printed_there = math.exp(np.average(nats, weights=[weights[0], *(n - 1 for n in weights[1:])]))
    assert got["perplexity"] == pytest.approx(printed_there, rel=0.02)
    assert report(*words, model="gpt2_tiny")["perplexity"] != pytest.approx(got["perplexity"], rel=1e-5)


def test_models_side_by_side(capsys):
    """Of two tokenizers: bytes and words are the same, so figures per byte and per word can be compared."""
    words, models = ["--text", "t.txt", "--protocol", "rolling"], [RUN, "gpt2_tiny"]
    both = report(*words, "--plot", "two.png", model=models)
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("bits per byte"))
    assert row[3:5] == [f"{found['bits_per_byte']:.4f}" for found in both["models"]]
    assert both == {"models": [report(*words, model=path) for path in models]}
    assert {(found["bytes"], found["words"]) for found in both["models"]} == {(len(WORDS.encode()), len(WORDS.split()))}
    assert Path("two.png").stat().st_size > 5000


def test_multiple_choice(capsys):
    """The figures themselves are compared in test_multiple_choice.py."""
    got = report("--choices", "c.jsonl")
    assert (got["questions"], got["window"], got["text"], got["choices_format"]) == (3, T, "c.jsonl", "plain")
    rows = [row | {"activity_label": "Song", "ctx_a": row["ctx"], "ctx_b": "x"} for row in QUESTIONS]
    write("hellaswag.jsonl", "\n".join(map(json.dumps, rows)))
    assert report("--choices", "hellaswag.jsonl")["choices_format"] == "hellaswag"
    plain = report("--choices", "hellaswag.jsonl", "--choices_format", "plain")
    assert plain == got | {"text": "hellaswag.jsonl"}
    capsys.readouterr()
    report("--choices", "c.jsonl")
    assert (got["choice_accuracy"], got["choice_accuracy_norm"]) == pytest.approx((1 / 3, 2 / 3))
    assert "accuracy, normalised  0.6667  share of questions" in capsys.readouterr().out
    both = report("--choices", write("single.jsonl", json.dumps(QUESTIONS[0])), model=[RUN, "out/joined"])["models"]
    assert [found["model"] for found in both] == [NAME, "out/joined/ckpt/iter_000006"]
    assert both[0]["choice_accuracy_stderr"] is None  # JSON knows no NaN


# ---------------------------------------------------------------------------------------------------------------------
# memory, several ranks


def test_memory_does_not_grow_with_the_text(monkeypatch):
    """Python's and numpy's; torch's own never holds a text."""
    monkeypatch.setattr(metrics, "CHUNK_TOKENS", 2048)
    rng, sizes, peaks = np.random.default_rng(0), (2_000, 20_000), []
    paths = [write_ids(f"{size}.bin", rng.integers(97, 123, size)) for size in sizes]
    for path in (paths[0], *paths):  # what is loaded once is not counted
        tracemalloc.start()
        report("--test_data_path", path, "--batch_size", 8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 4 * (sizes[1] - sizes[0])  # less than a float32 for each token


def test_ranks_give_the_figures_of_one(ranks, home):
    """The second rank has a batch less. Sums and texts of more ranks are compared in tests/unit."""
    words = ["--protocol", "rolling", "--batch_size", 5, "--eval_batches", 3]
    calls = ["--device", "cpu", "--model_path", RUN, *map(str, words), "--json", "two.json"]
    done = ranks(2, *calls, script=ROOT / "eval.py", cwd=home)
    assert done.code == 0, done.output
    assert done.output.count("model  ") == 1, done.output  # only the first rank prints
    text = Path("two.json").read_text()
    assert report(*words) == json.loads(text, parse_float=lambda number: pytest.approx(float(number), rel=1e-6))


@pytest.mark.extra("sacrebleu", "rouge_score")
def test_continuations():
    """Figures and texts are compared in test_continuations.py and tests/parity."""
    words = ["--generate", 5, "--prompt_tokens", 12, "--max_new_tokens", 20, "--eval_batches", 1]
    sampled, greedy = report(*words), report(*words, "--greedy", "--repetition_penalty", 1.2)
    assert (sampled["prompts"], sampled["bleu_signature"][:8]) == (5, "nrefs:1|")
    assert sampled["prompts_mean"] == "20 tokens after prompts of 12, temperature 0.8, seed 1337"
    assert greedy["prompts_mean"] == "20 tokens after prompts of 12, temperature 0, seed 1337, repetition_penalty 1.2"
    assert sampled["distinct_1"] != greedy["distinct_1"] > 0
    assert sampled["reference_repetition"] == greedy["reference_repetition"]


def test_ranks_report_an_error_once(ranks, home):
    done = ranks(2, "--device", "cpu", "--model_path", "nowhere", script=ROOT / "eval.py", cwd=home)
    assert done.code != 0
    assert len(re.findall("^error: model_path = nowhere: no such folder", done.output, re.M)) == 1
