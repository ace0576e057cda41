"""eval.py: reports against slow plain references, transformers and several ranks; and what it refuses."""

import contextlib
import json
import math
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import transformers
from gpt2_reference import random_gpt2
from in_process import TEXT, make_dataset, train_here
from processes import ROOT

import eval as script
from config import EvalConfig, PrepareConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.data.prepare import prepare
from flatgpt.evaluation import text as evaluation_text
from flatgpt.interop import loading

T, EOT = 32, 256  # of the byte models here
RUN = "out/quickstart"
WORDS = "3 green bottles, naïve café 🎈\nand if 2 green ones should fall,\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """data/tiny with end-of-text and out/quickstart; data/joined without and out/joined."""
    folder = tmp_path_factory.mktemp("eval")
    make_dataset(folder)
    meta = make_dataset(folder, "joined").folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"end_of_text": False}))
    with contextlib.chdir(folder):
        train_here("--max_iters", 60, "--eval_interval", 30, "--lr", "5e-3")
        train_here("--dataset", "joined", "--out_dir", "out/joined")
    return folder


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch) -> None:
    monkeypatch.chdir(home)


def run(*words) -> None:
    script.main(cli.parse(EvalConfig, ["--device", "cpu", *map(str, words)]))


def report(*words, model: str | Path | list = RUN) -> dict:
    """What eval.py writes with --json, run in this process; strict JSON."""
    run("--json", "report.json", *words, "--model_path", *(model if isinstance(model, list) else [model]))
    return json.loads(Path("report.json").read_text(), parse_constant=pytest.fail)


def refusal(*words, model: str | Path | list = RUN) -> str:
    """The message with which eval.py refuses; one line."""
    with pytest.raises(UserError) as caught:
        report(*words, model=model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def near(report, tolerance: float):
    """The report with pytest.approx around its floats."""
    if isinstance(report, dict):
        return {key: near(value, tolerance) for key, value in report.items()}
    if isinstance(report, list):
        return [near(value, tolerance) for value in report]
    return pytest.approx(report, rel=tolerance) if isinstance(report, float) else report


def byte_model():
    return loading.load(loading.find(RUN, print), torch.device("cpu"))[0]


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def write_ids(name: str, ids) -> str:
    np.array(ids, dtype="<u2").tofile(name)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# figures and protocols


def context_starts(protocol: str, n: int, stride: int | None) -> dict[int, int]:
    """Where the context of each scored id of n begins; for rolling of the ids with end-of-text in front."""
    if protocol == "stride":
        stride = stride or T // 2
        return {i: 0 if i <= T else -(-(i - T) // stride) * stride for i in range(1, n)}
    starts = {i: (i - 1) // T * T for i in range(1, n)}
    if protocol == "rolling":  # the last window is full
        starts |= {i: max(0, n - 1 - T) for i in starts if starts[i] == starts[n - 1]}
    return starts


@pytest.mark.parametrize(
    ("protocol", "stride", "length"),
    [
        *[("window", None, n) for n in (2, T, T + 1, T + 2, 130)],
        *[("stride", None, n) for n in (2, T + 1, T + 2, 130)],
        *[("stride", s, 99) for s in (1, 7, T)],
        *[("rolling", None, n) for n in (1, T - 1, T, T + 1, 130)],
    ],
)
@torch.no_grad()
def test_figures_equal_a_plain_loop(protocol, stride, length):
    """One token at a time, with its context; tests/parity compares the figures that need no text."""
    text, rolling = (WORDS * 3).encode(), protocol == "rolling"
    ids = [*text[:60], EOT, *text[60 : length - 1]] if length > 61 else [*text[:length]]
    words = ["--protocol", protocol, "--test_data_path", write_ids("ids.bin", ids), "--batch_size", 2]
    got = report(*words, *(["--stride", stride] if stride else []))
    read, model, losses, by_bucket = [EOT] * rolling + ids, byte_model(), [], [[] for _ in range(8)]
    for i, start in context_starts(protocol, len(read), stride).items():
        losses.append(-float(model(torch.tensor([read[start:i]]))[0, -1].double().log_softmax(-1)[read[i]]))
        by_bucket[(i - 1 - start) // (T // 8)].append(losses[-1])
    nats = math.fsum(losses)
    bytes_scored = sum(i != EOT for i in ids) - (not rolling)  # otherwise the first token is read only
    whole = b"".join(b"\0 " if i == EOT else bytes([i]) for i in ids).replace(b"\0", b"").decode(errors="replace")
    assert (got["tokens"], got["bytes"], got["words"]) == (len(losses), bytes_scored, len(whole.split()))
    assert got["lines"] == whole.count("\n")
    assert got["loss"] == pytest.approx(nats / len(losses), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_scored, rel=1e-5)
    per_word = nats / len(whole.split())
    assert got["word_perplexity"] == (pytest.approx(math.exp(per_word), rel=1e-4) if per_word < 700 else None)
    for bucket, expected in zip(got["loss_by_position"], by_bucket, strict=True):
        assert bucket["tokens"] == len(expected)
        assert bucket["loss"] == (pytest.approx(np.mean(expected), rel=1e-5) if expected else None)


def test_the_default_is_the_whole_validation_split_of_the_run():
    """The digits do not change from call to call, nor, but for rounding, with batch_size; no random number is drawn."""
    ids, state = np.fromfile("data/tiny/val_000000.bin", dtype="<u2"), torch.get_rng_state()
    got = report()
    assert (got["tokens"], got["text"]) == (len(ids) - 1, "data/tiny val")
    assert got["bytes"] == (ids[1:] != EOT).sum() < len(ids) - 1
    assert report() == got
    assert report("--batch_size", 3)["loss"] == pytest.approx(got["loss"], rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report_names_how_it_was_made(capsys):
    got = report("--protocol", "stride", "--dtype", "bfloat16")
    assert (got["model"], got["iter"], got["dtype"]) == (f"{RUN}/ckpt/iter_000060", 60, "bfloat16")
    assert (got["window"], got["stride"], got["protocol"]) == (T, T // 2, "stride")
    printed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    printed = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in printed}
    assert printed[""] == [got["protocol_means"]]
    assert printed["dtype"] == ["bfloat16", "of the matrix products"]
    for label, key in (("loss", "loss"), ("word perplexity", "word_perplexity"), ("bits per byte", "bits_per_byte")):
        assert printed[label] == [f"{got[key]:,.4f}", got["units"][key]]
    exact = report("--protocol", "stride")
    assert exact["dtype"] == "float32"
    assert got["loss"] != exact["loss"]
    assert got["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_rolling_says_when_the_data_had_no_end_of_text():
    never = "which the model's data never had"
    assert report("--protocol", "rolling", model="out/joined")["protocol_means"].endswith(never)
    assert never not in report("--protocol", "rolling")["protocol_means"]
    assert never not in report(model="out/joined")["protocol_means"]


def test_first_batches_only():
    got = report("--eval_batches", 2, "--batch_size", 4)
    assert (got["tokens"], got["eval_batches"]) == (2 * 4 * T, 2)
    assert got["protocol_means"].endswith("; first 2 batches")
    ids = np.fromfile("data/tiny/val_000000.bin", dtype="<u2")[: 2 * 4 * T + 1]
    text = bytes(ids[ids != EOT].astype(np.uint8)).decode(errors="replace")
    assert (got["words"], got["lines"]) == (len(text.split()), text.count("\n"))
    assert report("--eval_batches", 10**6)["tokens"] == report()["tokens"]


def test_smol_gpts_six_lines(capsys):
    got = report("--format", "smol")
    keys = ("loss", "perplexity", "precision", "recall", "f1", "accuracy")
    assert capsys.readouterr().out.splitlines() == [f"Test {key}: {got[key]:.4f}" for key in keys]


def test_json_on_standard_output_and_pictures(cli, tmp_path):
    """cli runs the script with its command line."""
    expected = report()
    done = cli("eval", "--device", "cpu", "--model_path", RUN, "--json", "-", "--plot", tmp_path / "one.png")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == expected
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG\r\n")
    report("--context_length", 4, "--plot", tmp_path / "two.png", model=[RUN, "out/joined"])
    assert (tmp_path / "two.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------------
# which text


def test_other_split_and_other_dataset(tmp_path):
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    assert report("--split", "train")["tokens"] == meta["splits"]["train"]["tokens"] - 1
    make_dataset(tmp_path, "other", "Other words of another book. " * 100)
    assert report("--dataset", "other", "--data_dir", tmp_path / "data")["text"] == f"{tmp_path}/data/other val"


def test_the_dataset_of_the_run_may_have_moved(tmp_path, monkeypatch):
    shutil.copytree("data/tiny", tmp_path / "moved/tiny")
    expected = report()
    shutil.copytree(RUN, tmp_path / RUN, symlinks=True)
    monkeypatch.chdir(tmp_path)
    got = report("--data_dir", "moved")
    assert (got["text"], got["loss"]) == ("moved/tiny val", expected["loss"])
    assert "dataset data/tiny is not there" in refusal()


def test_a_file_of_ids(capsys):
    text = "If 3 green bottles 🎈".encode()
    got = report("--test_data_path", write_ids("bare.bin", [*text, EOT, *text]))
    assert (got["tokens"], got["bytes"]) == (2 * len(text), 2 * len(text) - 1)
    assert "the model's tokenizer, byte" in capsys.readouterr().err
    assert report("--test_data_path", "data/tiny/val_000000.bin")["loss"] == report()["loss"]
    assert "taken as" not in capsys.readouterr().err


BOM, MIXED = b"\xef\xbb\xbf", "one\r\ntwo\n\n three 🎈 <|endoftext|> \t naïve\r東京 \ufeff isn't \n"


@pytest.mark.parametrize("encoding", ["byte", "gpt2"])
def test_text_equals_the_same_text_prepared(encoding, request, tmp_path, monkeypatch):
    """A file given to --text and to prepare_data.py, also if it is encoded in chunks."""
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 100)
    model = RUN if encoding == "byte" else request.getfixturevalue("gpt2_folder")
    file = tmp_path / "mixed.txt"
    file.write_bytes(BOM + (MIXED * 5).encode())
    settings = {"tokenizer": encoding, "data_dir": str(tmp_path), "name": "same", "splits": ("val",)}
    prepare(PrepareConfig(source="text", input=(str(file),), val_fraction=0.999999, **settings), lambda line: None)
    ids = np.fromfile(tmp_path / "same/val_000000.bin", dtype="<u2")
    assert ids[-1] == tokenizer.load(encoding).eot_token
    one = report("--text", file, model=model)
    two = report("--test_data_path", write_ids("same.bin", ids[:-1]), model=model)
    assert one.pop("text") == str(file)
    two.pop("text")
    assert one == two
    assert one["tokens"] == len(tokenizer.load(encoding).encode_ordinary(MIXED * 5)) - 1
    assert report("--text", file, "--protocol", "rolling", model=model)["bytes"] == len(MIXED.encode()) * 5


def test_figures_beyond_float64():
    """A language without spaces: all of the text is one word. JSON knows no infinity."""
    got = report("--text", write("cn.txt", "東京都は日本の首都である。" * 40))
    assert (got["words"], got["word_perplexity"]) == (1, None)
    assert got["loss"] * got["tokens"] > 710
    assert report("--text", write("blank.txt", " \n" * 40))["word_perplexity"] is None


def test_a_diverged_model(tmp_path, capsys):
    """Its figures are NaN; the report is JSON all the same."""
    model = random_gpt2(n_positions=8, vocab_size=50257)
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    model.save_pretrained(tmp_path)
    got = report("--text", write("t.txt", WORDS), "--format", "smol", model=tmp_path)
    assert (got["loss"], got["perplexity"], got["bits_per_byte"]) == (None, None, None)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 6
    assert f"warning: {tmp_path}: the loss is NaN" in printed.err


def test_a_pipe_is_read_by_one_model_only():
    read, wrote = os.pipe()
    os.write(wrote, WORDS.encode())
    os.close(wrote)
    assert report("--text", f"/dev/fd/{read}", "--protocol", "rolling")["bytes"] == len(WORDS.encode())
    for key in ("text", "choices"):
        assert "a pipe is read once" in refusal(f"--{key}", f"/dev/fd/{read}", model=[RUN, RUN])
    os.close(read)


# ---------------------------------------------------------------------------------------------------------------------
# refusals and recipes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset tiny --text t.txt", "dataset and text exclude each other"),
        ("--test_data_path x.bin --dataset tiny", "dataset and test_data_path exclude each other"),
        ("--choices c.jsonl --text t.txt", "text and choices exclude each other"),
        ("--stride 8", "stride = 8 belongs to --protocol stride, not to window"),
        ("--stride 8 --protocol rolling", "stride = 8 belongs to --protocol stride, not to rolling"),
        ("--protocol stride --stride 33", "stride = 33: a window has 32 tokens"),
        ("--stride 0 --protocol stride", "--stride = 0: at least 1 is expected"),
        ("--choices c.jsonl --protocol rolling", "protocol is for text"),
        ("--choices c.jsonl --generate 2", "generate is for text"),
        ("--choices c.jsonl --format smol", "format is for text"),
        ("--choices c.jsonl --plot x.png", "plot is for text"),
        ("--choices c.jsonl --eval_batches 2", "eval_batches is for text"),
        ("--plot x.pdf", "plot = x.pdf: a name that ends in .png is expected"),
        ("--greedy --top_k 3", "greedy chooses the most likely token: leave out top_k"),
        ("--context_length 33", f"{RUN}/ckpt/iter_000060 was trained with 32; take at most that"),
        ("--sampled", "--sampled: was removed: precision, recall and F1 of the most likely token are always"),
        ("--no-sampled", "--no-sampled: was removed"),
        ("--config sampled.toml", "sampled.toml: sampled: was removed"),
        ("--split test", "no split test; it has train, val"),
        ("--dataset nowhere", "dataset data/nowhere is not there"),
        ("--text one.txt", "two are needed to score one, or --protocol rolling"),
        ("--test_data_path one.bin", "two are needed to score one"),
        ("--test_data_path pickled.bin", "prepare_data.py text"),
        ("--test_data_path beyond.bin", "id 257 at byte 4"),
        ("--test_data_path book.txt", "test_data_path = book.txt: uint16 ids are expected; a text is scored by --text"),
        pytest.param(
            "--generate 3 --prompt_tokens 1000000", "do not fit into a split of", marks=pytest.mark.extra("sacrebleu")
        ),
        ("--json nowhere/x.json", "json = nowhere/x.json: cannot be written"),
        ("--plot folder.png", "plot = folder.png: cannot be written"),
        ("--text empty.txt", "text = empty.txt: it is empty"),
        ("--text bom.txt", "text = bom.txt: it is empty"),
        ("--text missing.txt", "missing.txt: cannot be read: No such file or directory"),
        ("--text bad.txt", "bad.txt: not UTF-8: byte 0xff at offset 2;"),
        ("--text bad_bom.txt", "bad_bom.txt: not UTF-8: byte 0xff at offset 5;"),
        ("--text bad_late.txt", "bad_late.txt: not UTF-8: byte 0xff at offset 2,100,000;"),
        ("--text bad_end.txt", "bad_end.txt: not UTF-8: byte 0xc3 at offset 150,000;"),
        ("--text utf16.txt", "utf16.txt: not UTF-8: byte 0xff at offset 0;"),
    ],
)
def test_refusals(words, message, tmp_path, monkeypatch):
    shutil.copytree("data", tmp_path / "data")
    shutil.copytree(RUN, tmp_path / RUN, symlinks=True)
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "sampled.toml": b"sampled = true",
        "one.txt": b"a",
        "book.txt": WORDS.encode(),
        "pickled.bin": pickle.dumps(list(range(1000))),
        "empty.txt": b"",
        "bom.txt": BOM,
        "bad.txt": b"ab\xffcd",
        "bad_bom.txt": BOM + b"ab\xffcd",
        "bad_late.txt": b"ab\n" * 700_000 + b"\xff",
        "bad_end.txt": b"ab\n" * 50_000 + "é".encode()[:1],
        "utf16.txt": "naïve".encode("utf-16"),
    }.items():
        write(name, content)
    write_ids("one.bin", [7])
    write_ids("beyond.bin", [1, 2, 257, 3])
    Path("folder.png").mkdir()
    assert message in refusal(*words.split())


def test_removed_setting_in_a_recipe_of_training():
    """A recipe serves all scripts; only eval.py refuses its removed setting."""
    from config import InferConfig

    assert cli.parse(InferConfig, ["--config", write("sampled.toml", "sampled = true")]).seed == 1337


def test_ids_of_another_tokenizer_are_refused(home, gpt2_folder):
    make_dataset(home, "bpe", "Other words. " * 100, encoding="gpt2")
    for words in (["--dataset", "bpe"], ["--test_data_path", "data/bpe/val_000000.bin"]):
        message = refusal(*words)
        assert "is tokenised with gpt2, the model" in message
        assert message.endswith("or give the text itself: --text FILE")
        assert report(*words, model=gpt2_folder)["tokens"] > 10


@pytest.mark.parametrize(
    ("words", "model", "message"),
    [
        ("--json nowhere/x.json", RUN, "cannot be written"),
        ("--generate 3", RUN, "pip install -r requirements-extra.txt"),
        ("", [RUN, "nowhere"], "model_path = nowhere: no such folder"),
    ],
)
def test_refused_before_a_model_is_loaded(words, model, message, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *words: pytest.fail("the work had begun"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert message in refusal(*words.split(), model=model)


def test_training_keys_of_a_recipe_do_not_change_what_is_measured():
    lines = ["stride = 4", "batch_size = 3", 'dtype = "bfloat16"', "context_length = 16", "eval_batches = 1"]
    lines += ["seed = 7", 'dataset = "elsewhere"', f'out_dir = "{RUN}"']
    write("mine.toml", "\n".join(lines))
    words = ["--test_data_path", "data/tiny/val_000000.bin"]  # replaces the recipe's dataset
    run("--config", "mine.toml", "--json", "report.json", *words)
    assert json.loads(Path("report.json").read_text()) == report(*words)


def test_without_a_path_the_newest_run_is_scored():
    os.utime("out/joined/ckpt/last/state.json")
    run("--json", "report.json")
    newest = json.loads(Path("report.json").read_text())["model"]
    assert newest == str(loading.find(None, print).path)
    assert newest.startswith("out/joined/")


def test_ctrl_c_leaves_no_file(monkeypatch, tmp_path):
    def interrupted(*words, **more):
        assert len(list(tmp_path.glob("flatgpt-*/text.bin"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(script, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--model_path", RUN, "--text", write("t.txt", WORDS))
    assert not list(tmp_path.glob("flatgpt-*"))


# ---------------------------------------------------------------------------------------------------------------------
# several models, and those of other projects


@pytest.fixture(scope="module")
def gpt2_folder(home) -> str:
    """A small model that transformers saved, without tokenizer files; its vocabulary's size is OpenAI's."""
    random_gpt2(n_positions=16, vocab_size=50257).save_pretrained(home / "gpt2_tiny")
    return "gpt2_tiny"


@torch.no_grad()
def transformers_loss(model: transformers.GPT2LMHeadModel, text: str, width: int) -> float:
    """Nats per token over windows that do not overlap."""
    ids, nats = tiktoken.get_encoding("gpt2").encode_ordinary(text), 0.0
    for start in range(0, len(ids) - 1, width):
        window = torch.tensor([ids[start : start + width + 1]])
        logits = model(window[:, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return nats / (len(ids) - 1)


def test_a_hugging_face_folder_is_scored_as_transformers_does(gpt2_folder):
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder)
    text = write("some.txt", TEXT[:400])
    got = report("--text", text, model=gpt2_folder)
    assert got["loss"] == pytest.approx(transformers_loss(model, TEXT[:400], 16), rel=1e-5)
    assert (got["model"], got["iter"], got["window"]) == ("gpt2_tiny", None, 16)
    assert got["bytes"] == len(TEXT[:400].encode()) - 2  # "99" is one token
    cropped = report("--text", text, "--context_length", 8, model=gpt2_folder)
    assert (cropped["window"], [bucket["last"] for bucket in cropped["loss_by_position"]]) == (8, [*range(8)])
    assert cropped["loss"] == pytest.approx(transformers_loss(model, TEXT[:400], 8), rel=1e-5)
    assert report("--text", text, "--context_length", 1, "--protocol", "stride", model=gpt2_folder)["window"] == 1
    assert "give --dataset, --test_data_path or --text" in refusal(model=gpt2_folder)
    longer = refusal("--text", text, "--context_length", 17, model=gpt2_folder)
    assert longer == "context_length = 17: gpt2_tiny was trained with 16; take at most that"


def test_models_side_by_side(gpt2_folder, capsys):
    """Of two tokenizers: bytes and words are the same, so figures per byte and per word can be compared."""
    text = write("some.txt", TEXT[:300])
    words = ["--text", text, "--protocol", "rolling"]
    both = report(*words, model=[RUN, gpt2_folder])
    table = capsys.readouterr().out.splitlines()
    each = [report(*words, model=path) for path in (RUN, gpt2_folder)]
    assert both == {"models": each}
    assert each[0]["tokens"] > each[1]["tokens"]
    for got in each:
        assert (got["bytes"], got["words"]) == (len(TEXT[:300].encode()), len(TEXT[:300].split()))
    row = next(line.split() for line in table if line.startswith("bits per byte"))
    assert row[3:5] == [f"{r['bits_per_byte']:.4f}" for r in each]
    message = refusal("--dataset", "tiny", model=[RUN, gpt2_folder])
    assert "tokenised with byte, the model gpt2_tiny was trained with gpt2" in message


# ---------------------------------------------------------------------------------------------------------------------
# multiple choice and continuations


QUESTIONS = [
    {"ctx": "98 green bottles hanging on the", "endings": ["wall, and if", "zzz", "Q"], "label": 0},
    {"ctx": "there will be ", "endings": ["Q", "97 green bottles. Naïve café", "#!"], "label": "1", "source": "x"},
    {"ctx": "if 5 green bottles should accidentally", "endings": ["fall, there", "of the", "X"], "label": 2},
]


def test_multiple_choice(capsys):
    """The figures themselves are compared in test_multiple_choice.py."""
    write("c.jsonl", "\n".join(map(json.dumps, QUESTIONS)))
    got = report("--choices", "c.jsonl")
    assert (got["questions"], got["window"], got["text"]) == (3, T, "c.jsonl")
    assert (got["choice_accuracy"], got["choice_accuracy_norm"]) == pytest.approx((1 / 3, 2 / 3))
    assert "accuracy, normalised  0.6667  share of questions" in capsys.readouterr().out
    both = report("--choices", "c.jsonl", model=[RUN, "out/joined"])["models"]
    assert [r["model"] for r in both] == [f"{RUN}/ckpt/iter_000060", "out/joined/ckpt/iter_000006"]
    single = write("c.jsonl", json.dumps(QUESTIONS[0]))
    assert report("--choices", single)["choice_accuracy_stderr"] is None  # JSON knows no NaN
    write("c.jsonl", json.dumps(QUESTIONS[0]) + "\n{\n")
    assert refusal("--choices", "c.jsonl").startswith("c.jsonl line 2: not JSON")


@pytest.mark.extra("sacrebleu", "rouge_score")
def test_continuations(ranks, home, tmp_path):
    """Figures and texts are compared in test_continuations.py and tests/parity."""
    words = ["--generate", 5, "--prompt_tokens", 12, "--max_new_tokens", 20, "--eval_batches", 1]
    one, two = in_one_process_and_two(ranks, home, tmp_path, [words, [*words, "--greedy"]])
    sampled, greedy = one
    assert two == near(one, 1e-6)
    assert (sampled["prompts"], sampled["bleu_signature"][:8]) == (5, "nrefs:1|")
    assert sampled["prompts_mean"] == "20 tokens after 12, temperature 0.8, seed 1337"
    assert greedy["prompts_mean"].startswith("20 tokens after 12, temperature 0,")
    assert sampled["repetition"] != greedy["repetition"] > 0
    assert sampled["reference_repetition"] == greedy["reference_repetition"]


# ---------------------------------------------------------------------------------------------------------------------
# memory


def peak(*words) -> int:
    """Bytes of Python's and numpy's memory at most; torch's own, which never hold a text, are not counted."""
    tracemalloc.start()
    try:
        report(*words)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_file_is_not_read_into_memory():
    with open("large.bin", "wb") as file:
        file.truncate(400_000_000)  # zeros, which take no room on the disk
    try:
        assert peak("--test_data_path", "large.bin", "--eval_batches", 1) < 60_000_000
    finally:
        os.unlink("large.bin")


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(evaluation_text, "CHUNK_TOKENS", 2048)
    rng, sizes = np.random.default_rng(0), (2_000, 20_000)
    paths = [write_ids(f"{size}.bin", rng.integers(97, 123, size)) for size in sizes]
    report("--test_data_path", paths[0])  # what is loaded once is not counted
    few, many = (peak("--test_data_path", path, "--batch_size", 8) for path in paths)
    assert many - few < 4 * (sizes[1] - sizes[0])  # less than a float32 for each token


# ---------------------------------------------------------------------------------------------------------------------
# several ranks

# Several reports in one job, since each start costs time: the ranks stay joined from one to the next.
SEVERAL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from flatgpt.cli import cli
import eval as script
import torch.distributed as dist
from config import EvalConfig, UserError
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *words, **more: dist.is_initialized() or join(*words, **more)
dist.destroy_process_group = lambda: None
for words in json.loads(sys.argv[1]):
    script.main(cli.parse(EvalConfig, words))
leave()
"""


def in_one_process_and_two(ranks, home, tmp_path, several: list[list]) -> tuple[list[dict], list[dict]]:
    """The reports of these words, by one process and by two ranks."""
    file, calls = tmp_path / "several.py", []
    file.write_text(SEVERAL)
    for n, words in enumerate(several):
        calls.append(["--device", "cpu", "--model_path", RUN, *map(str, words), "--json", str(tmp_path / f"{n}.json")])
    done = ranks(2, json.dumps(calls), script=file, cwd=home)
    assert done.code == 0, done.output
    two = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(len(several))]
    heads = [line for line in done.output.splitlines() if line.startswith(("model ", "Test loss"))]
    assert len(heads) == len(several), done.output  # only the first rank prints
    return [report(*words) for words in several], two


def test_ranks_give_the_figures_of_one(ranks, home, tmp_path):
    """Also if the second rank has a batch less, and if it has none."""
    write("t.txt", WORDS)
    write("c.jsonl", "\n".join(map(json.dumps, QUESTIONS * 3)))
    several = [
        ["--batch_size", 3],
        ["--protocol", "stride", "--stride", 10, "--batch_size", 8],
        ["--protocol", "rolling", "--batch_size", 5, "--eval_batches", 3],
        ["--protocol", "rolling", "--text", "t.txt", "--format", "smol"],
        ["--choices", "c.jsonl"],
    ]
    one, two = in_one_process_and_two(ranks, home, tmp_path, several)
    assert two == near(one, 1e-6)


def test_ranks_report_an_error_once(ranks, home):
    done = ranks(2, "--device", "cpu", "--model_path", "nowhere", script=ROOT / "eval.py", cwd=home)
    assert done.code != 0
    assert done.output.count("error: model_path = nowhere: no such folder") == 1
