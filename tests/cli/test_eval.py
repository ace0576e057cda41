"""eval.py: the report, against slow plain references, transformers and other counts of ranks; and what it refuses."""

import contextlib
import json
import math
import os
import pickle
import shutil
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import transformers
from forked import ForkedProcess
from in_process import TEXT, make_dataset, train_here
from processes import ROOT
from test_continuations import extras

import eval as verb
from config import EvalConfig, PrepareConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.data.prepare import prepare
from flatgpt.evaluation import text_stats as counting
from flatgpt.interop import loading
from flatgpt.runtime.distributed import DistributedContext

__all__ = ["extras"]  # fixtures

T, EOT = 32, 256  # of the byte models here
RUN = "out/quickstart"
WORDS = "3 green bottles, naïve café 🎈\nand if 2 green ones should fall,\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """data/tiny, which has end-of-text, and out/quickstart; data/joined, which has none, and out/joined."""
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


def asked(*words) -> EvalConfig:
    return cli.parse(EvalConfig, ["--device", "cpu", *map(str, words)])


def report(*words, model: str | Path | list = RUN) -> dict:
    """What eval.py writes with --json, called in this process; strict JSON."""
    verb.main(asked("--json", "report.json", *words, "--model_path", *(model if isinstance(model, list) else [model])))
    return json.loads(Path("report.json").read_text(), parse_constant=pytest.fail)


def refusal(*words, model: str | Path | list = RUN) -> str:
    """Why eval.py does not do it: one line."""
    with pytest.raises(UserError) as caught:
        report(*words, model=model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def alike(one: dict, two: dict, tolerance: float) -> bool:
    """Relative, of numbers; the rest has to be the same."""
    return one.keys() == two.keys() and all(
        value == (pytest.approx(two[key], rel=tolerance) if isinstance(value, float) else two[key])
        for key, value in one.items()
    )


def byte_model():
    return loading.load(loading.find(RUN, print), torch.device("cpu"))[0]


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def write_ids(name: str, ids: list[int]) -> str:
    np.array(ids, dtype="<u2").tofile(name)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# every figure, one token at a time


def contexts(protocol: str, n: int, stride: int | None = None) -> dict[int, int]:
    """Where the context of each scored id of n begins; of rolling, ids with end-of-text in front."""
    if protocol == "stride":
        stride = stride or T // 2
        return {i: 0 if i <= T else -(-(i - T) // stride) * stride for i in range(1, n)}
    starts = {i: (i - 1) // T * T for i in range(1, n)}
    if protocol == "rolling":  # the last window is full
        starts |= {i: max(0, n - 1 - T) for i in starts if starts[i] == starts[n - 1]}
    return starts


@torch.no_grad()
def plain_figures(model, ids: list[int], starts: dict[int, int]) -> dict:
    """Each id on its own, told by those from its context's start up to it; every figure from its definition."""
    losses, ranks, best, confidence, position = [], [], [], [], []
    targets = [ids[i] for i in starts]
    for i, start in starts.items():
        p = model(torch.tensor([ids[start:i]]))[0, -1].double().softmax(-1)
        losses.append(-math.log(p[ids[i]]))
        ranks.append(int((p > p[ids[i]]).sum()))
        best.append(int(p.argmax()))
        confidence.append(float(p.max()))
        position.append(i - 1 - start)
    n, right = len(targets), [a == b for a, b in zip(best, targets, strict=True)]
    precision = f1 = calibration = 0
    for label in set(targets):
        hit = sum(t == b == label for t, b in zip(targets, best, strict=True))
        support, said = targets.count(label), best.count(label)
        precision += support / n * (hit / said if said else 0)
        f1 += support / n * 2 * hit / (support + said)
    for b in range(15):
        inside = [k for k in range(n) if b / 15 < confidence[k] <= (b + 1) / 15]
        calibration += abs(sum(right[k] for k in inside) - sum(confidence[k] for k in inside)) / n
    buckets = [[losses[k] for k in range(n) if position[k] // (T // 8) == b] for b in range(8)]
    return {
        "tokens": n,
        "loss": sum(losses) / n,
        "perplexity": math.exp(sum(losses) / n),
        "accuracy": sum(right) / n,
        "top5_accuracy": sum(rank < 5 for rank in ranks) / n,
        "precision": precision,
        "recall": sum(right) / n,
        "f1": f1,
        "calibration_error": calibration,
        "loss_by_position": [
            {"first": 4 * b, "last": 4 * b + 3, "tokens": len(some), "loss": sum(some) / len(some) if some else None}
            for b, some in enumerate(buckets)
        ],
    }


@pytest.mark.parametrize(
    ("protocol", "stride", "length"),
    [
        *[("window", None, n) for n in (2, T, T + 1, T + 2, 130)],
        *[("stride", None, n) for n in (2, T + 1, T + 2, 130)],
        *[("stride", s, 99) for s in (1, 7, T)],
        *[("rolling", None, n) for n in (1, T - 1, T, T + 1, 130)],
    ],
)
def test_figures_equal_a_plain_loop(protocol, stride, length):
    text = (WORDS * 3).encode()
    ids = [*text[:60], EOT, *text[60 : length - 1]] if length > 61 else [*text[:length]]
    words = ["--protocol", protocol, "--test_data_path", write_ids("ids.bin", ids), "--batch_size", 2]
    got = report(*words, *(["--stride", stride] if stride else []))
    rolling = protocol == "rolling"
    seen = [EOT] * rolling + ids
    expected = plain_figures(byte_model(), seen, contexts(protocol, len(seen), stride))
    for bucket, theirs in zip(got.pop("loss_by_position"), expected.pop("loss_by_position"), strict=True):
        assert alike(bucket, theirs, 1e-5)
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    # of the text, the first token is read only, but for rolling
    bytes_scored = sum(i != EOT for i in ids) - (not rolling)
    whole = b"".join(b"\0 " if i == EOT else bytes([i]) for i in ids).replace(b"\0", b"").decode(errors="replace")
    nats = expected["loss"] * expected["tokens"]
    assert (got["tokens"], got["bytes"], got["words"]) == (expected["tokens"], bytes_scored, len(whole.split()))
    assert got["lines"] == whole.count("\n")
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_scored, rel=1e-5)
    per_word = nats / len(whole.split())
    assert got["word_perplexity"] == (pytest.approx(math.exp(per_word), rel=1e-4) if per_word < 700 else None)


def test_the_default_is_all_of_the_runs_own_validation_split():
    ids = np.fromfile("data/tiny/val_000000.bin", dtype="<u2")
    got = report()
    assert (got["tokens"], got["text"]) == (len(ids) - 1, "data/tiny val")
    assert got["bytes"] == (ids[1:] != EOT).sum() < len(ids) - 1


def test_the_report_names_how_it_was_made(capsys):
    got = report("--protocol", "stride", "--dtype", "bfloat16")
    assert (got["model"], got["iter"], got["dtype"]) == (f"{RUN}/ckpt/iter_000060", 60, "bfloat16")
    assert (got["window"], got["stride"]) == (T, T // 2)
    assert got["protocol"] == "stride"
    assert got["protocol_means"].startswith("overlapping windows")
    assert got["units"]["loss"] == "nats per token scored"
    assert set(got["units"]) > {"perplexity", "word_perplexity", "bits_per_byte", "accuracy", "top5_accuracy"}
    assert "line ends" in got["units"]["words"]
    printed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    printed = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in printed}
    assert printed["protocol"] == ["stride"]
    assert printed[""] == [got["protocol_means"]]
    assert printed["window"] == [f"{T}", "tokens"]
    assert printed["stride"] == [f"{T // 2}", "tokens"]
    assert printed["dtype"] == ["bfloat16", "of the matrix products"]
    for label, key in (("loss", "loss"), ("word perplexity", "word_perplexity"), ("bits per byte", "bits_per_byte")):
        assert printed[label] == [f"{got[key]:,.4f}", got["units"][key]]
    exact = report("--protocol", "stride")
    assert exact["dtype"] == "float32"
    assert got["loss"] != exact["loss"]
    assert got["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert "stride" not in report()


def test_rolling_says_when_the_data_never_had_end_of_text(capsys):
    never = "which the model's data never had"
    assert never not in report("--protocol", "rolling")["protocol_means"]
    assert report("--protocol", "rolling", model="out/joined")["protocol_means"].endswith(never)
    assert never in capsys.readouterr().out
    assert never not in report(model="out/joined")["protocol_means"]


def test_twice_the_same_digits_and_any_batch_size():
    first = report()
    assert report() == first
    assert report("--batch_size", 3)["loss"] == pytest.approx(first["loss"], rel=1e-6)


def test_first_batches_only():
    got = report("--eval_batches", 2, "--batch_size", 4)
    assert got["tokens"] == 2 * 4 * T
    assert got["eval_batches"] == 2
    assert got["protocol_means"].endswith("; first 2 batches")
    ids = np.fromfile("data/tiny/val_000000.bin", dtype="<u2")[: 2 * 4 * T + 1]
    text = bytes(ids[ids != EOT].astype(np.uint8)).decode(errors="replace")
    assert (got["words"], got["lines"]) == (len(text.split()), text.count("\n"))
    assert report("--eval_batches", 10**6)["tokens"] == report()["tokens"]


def test_training_goes_on_as_if_nothing_had_been():
    state = torch.get_rng_state()
    report("--sampled")
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# a sampled token


def test_sampled_figures_are_the_seeds():
    first = report("--sampled")
    assert report("--sampled") == first
    other = report("--sampled", "--seed", 5)
    keys = {"sampled_precision", "sampled_recall", "sampled_f1"}
    assert first.keys() - report().keys() == keys
    assert {key for key in first if key != "units" and first[key] != other[key]} == keys


def test_sampled_tokens_are_drawn_at_temperature_one():
    """The share of tokens that are met is on average the probability that the model gave them."""
    text = write("bottles.txt", TEXT[:9000])
    got = report("--text", text, "--sampled", "--temperature", 0.5)
    ids, model = torch.tensor([*Path(text).read_bytes()]), byte_model()
    with torch.no_grad():
        met = [
            model(ids[None, s : s + T])[0, : len(ids) - 1 - s].softmax(-1).gather(-1, ids[s + 1 : s + T + 1, None])
            for s in range(0, len(ids) - 1, T)
        ]
    p = torch.cat(met).double()
    spread = float((p * (1 - p)).sum().sqrt()) / len(p)
    assert len(p) == got["tokens"]
    assert abs(got["sampled_recall"] - float(p.mean())) < 4 * spread
    assert got["recall"] - got["sampled_recall"] > 10 * spread


def test_each_batch_has_random_numbers_of_its_own_on_any_rank():
    def drawn(rank: int, world: int) -> list[float]:
        generator = torch.Generator()
        batches = verb._reseeding(iter(range(4 // world)), generator, 7, (rank, world))
        return [torch.rand((), generator=generator).item() for _ in batches]

    assert len(set(drawn(0, 1))) == 4
    assert drawn(0, 2) + drawn(1, 2) == drawn(0, 1)[::2] + drawn(0, 1)[1::2]


@pytest.mark.parametrize("sampled", [False, True])
def test_six_lines_as_smol_gpts(capsys, sampled):
    got = report("--format", "smol", *(["--sampled"] if sampled else []))
    values = [got["loss"], got["perplexity"]]
    values += [got["sampled_" * sampled + key] for key in ("precision", "recall", "f1", "recall")]
    labels = ("loss", "perplexity", "precision", "recall", "f1", "accuracy")
    lines = [f"Test {label}: {value:.4f}" for label, value in zip(labels, values, strict=True)]
    assert capsys.readouterr().out.splitlines() == lines


# ---------------------------------------------------------------------------------------------------------------------
# which text


def test_other_split_and_other_dataset(home, tmp_path):
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    assert report("--split", "train")["tokens"] == meta["splits"]["train"]["tokens"] - 1
    make_dataset(tmp_path, "other", "Other words of another book. " * 100)
    assert report("--dataset", "other", "--data_dir", tmp_path / "data")["text"] == f"{tmp_path}/data/other val"
    assert "no split test; it has train, val" in refusal("--split", "test")
    assert "dataset data/nowhere is not there" in refusal("--dataset", "nowhere")


def test_the_runs_data_may_have_moved(tmp_path, monkeypatch):
    """Its folder is no more where it was trained: data_dir has it."""
    shutil.copytree("data/tiny", tmp_path / "moved/tiny")
    expected = report()
    shutil.copytree(RUN, tmp_path / RUN, symlinks=True)
    monkeypatch.chdir(tmp_path)
    got = report("--data_dir", "moved")
    assert got["text"] == "moved/tiny val"
    assert got["loss"] == expected["loss"]
    assert "dataset data/tiny is not there" in refusal()


def test_bare_file_takes_the_models_tokenizer(capsys):
    text = "If 3 green bottles 🎈".encode()
    got = report("--test_data_path", write_ids("bare.bin", [*text, EOT, *text]))
    assert got["tokens"] == 2 * len(text)
    assert got["bytes"] == 2 * len(text) - 1  # the first byte is not scored, end-of-text stands for none
    assert "the model's tokenizer, byte" in capsys.readouterr().err
    got = report("--test_data_path", "data/tiny/val_000000.bin")
    assert got["loss"] == report()["loss"]
    assert "taken as" not in capsys.readouterr().err


BOM, NASTY = b"\xef\xbb\xbf", "one\r\ntwo\n\n three 🎈 <|endoftext|> \t naïve\r東京 \ufeff isn't \n"


@pytest.mark.parametrize("encoding", ["byte", "gpt2"])
def test_text_equals_the_same_text_prepared(encoding, request, tmp_path):
    """One file, by way of --text and by way of prepare_data.py."""
    model = RUN if encoding == "byte" else request.getfixturevalue("gpt2_folder")
    file = tmp_path / "nasty.txt"
    file.write_bytes(BOM + (NASTY * 5).encode())
    settings = {"tokenizer": encoding, "data_dir": str(tmp_path), "name": "same", "splits": ("val",)}
    prepare(PrepareConfig(source="text", input=(str(file),), val_fraction=0.999999, **settings), log=lambda line: None)
    ids = np.fromfile(tmp_path / "same/val_000000.bin", dtype="<u2")
    assert ids[-1] == tokenizer.load(encoding).eot_token
    one = report("--text", file, model=model)
    two = report("--test_data_path", write_ids("same.bin", ids[:-1]), model=model)
    assert one.pop("text") == str(file)
    two.pop("text")
    assert one == two
    assert one["tokens"] == len(tokenizer.load(encoding).encode_ordinary(NASTY * 5)) - 1
    assert report("--text", file, "--protocol", "rolling", model=model)["bytes"] == len(NASTY.encode()) * 5


@pytest.mark.parametrize("encoding", ["byte", "gpt2"])
def test_a_text_in_pieces_has_the_ids_of_the_whole(encoding, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 70_000)
    text = "".join(f"{n} green\r\nbottles hanging 🎈, and  if {n * n} fall…\n" for n in range(40_000))
    assert len(text) > 1 << 20
    enc = tokenizer.load(encoding)
    parts = list(verb.encode_file(write("large.txt", BOM + text.encode()), enc))
    assert len(parts) > 20
    if encoding == "byte":
        assert np.concatenate(parts).tolist() == [*text.encode()]
    else:
        assert np.concatenate(parts).tolist() == enc.encode_ordinary(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text = bad.txt: it is empty"),
        (BOM, "text = bad.txt: it is empty"),
        (None, "bad.txt: cannot be read: No such file or directory"),
        (b"ab\xffcd", "bad.txt: not UTF-8: byte 0xff at offset 2;"),
        (BOM + b"ab\xffcd", "bad.txt: not UTF-8: byte 0xff at offset 5;"),
        (b"ab\n" * 700_000 + b"\xff", "bad.txt: not UTF-8: byte 0xff at offset 2,100,000;"),
        (b"ab\n" * 50_000 + "é".encode()[:1], "bad.txt: not UTF-8: byte 0xc3 at offset 150,000;"),
        ("naïve".encode("utf-16"), "bad.txt: not UTF-8: byte 0xff at offset 0;"),
    ],
    ids=["empty", "BOM", "missing", "byte 2", "byte 5", "second piece", "end", "UTF-16"],
)
def test_a_text_that_is_none(content, message):
    Path("bad.txt").unlink(missing_ok=True)
    if content is not None:
        write("bad.txt", content)
    assert refusal("--text", "bad.txt").startswith(message)


def test_a_text_of_one_token():
    assert "takes two to score one, or --protocol rolling" in refusal("--text", write("one.txt", "a"))
    assert report("--text", "one.txt", "--protocol", "rolling")["tokens"] == 1
    assert "takes two to score one" in refusal("--test_data_path", write_ids("one.bin", [7]))


def test_files_that_hold_no_ids_of_this_model():
    path = write("ids.bin", pickle.dumps(list(range(1000))))
    assert "pickle" in refusal("--test_data_path", path)
    assert "prepare_data.py text" in refusal("--test_data_path", path)
    assert "id 257 at byte 4" in refusal("--test_data_path", write_ids("ids.bin", [1, 2, 257, 3]))


def test_other_tokenizer_is_refused(home, gpt2_folder):
    make_dataset(home, "bpe", "Other words. " * 100, encoding="gpt2")
    for words in (["--dataset", "bpe"], ["--test_data_path", "data/bpe/val_000000.bin"]):
        message = refusal(*words)
        assert "is tokenised with gpt2, the model" in message
        assert "was trained with byte: prepare the text with" in message
        assert message.endswith("or give the text itself: --text FILE")
        assert report(*words, model=gpt2_folder)["tokens"] > 10


def test_figures_that_no_number_holds():
    """A language without blanks: all of the text is one word, its perplexity beyond float64. JSON knows no infinity."""
    got = report("--text", write("cn.txt", "東京都は日本の首都である。" * 40))
    assert got["words"] == 1
    assert got["loss"] * got["tokens"] > 710
    assert got["word_perplexity"] is None
    assert got["bits_per_byte"] > 1
    assert report("--text", write("blank.txt", " \n" * 40))["word_perplexity"] is None


def test_a_model_that_has_diverged(tmp_path, capsys):
    """Its figures are no numbers; the report is JSON all the same, and smol-GPT's lines are six."""
    model = of_transformers(n_positions=8)
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    model.save_pretrained(tmp_path)
    got = report("--text", write("t.txt", WORDS), "--format", "smol", model=tmp_path)
    assert (got["loss"], got["perplexity"], got["bits_per_byte"]) == (None, None, None)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 6
    assert f"warning: {tmp_path}: the loss is no number" in printed.err


def test_a_pipe_is_read_once():
    """By the first of two models, or in part by each rank: wrong figures without a word."""
    read, wrote = os.pipe()
    os.write(wrote, WORDS.encode())
    os.close(wrote)
    assert report("--text", f"/dev/fd/{read}", "--protocol", "rolling")["bytes"] == len(WORDS.encode())
    for key in ("text", "choices"):
        assert "a pipe is read once" in refusal(f"--{key}", f"/dev/fd/{read}", model=[RUN, RUN])
    os.close(read)


def test_a_text_is_no_file_of_ids():
    message = refusal("--test_data_path", write("book.txt", WORDS * 2))
    assert message == "test_data_path = book.txt: uint16 ids are expected there; a text is scored by --text book.txt"


# ---------------------------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset tiny --text t.txt", "dataset and text exclude each other: give one of them"),
        ("--test_data_path x.bin --dataset tiny", "dataset and test_data_path exclude each other: give one of them"),
        ("--choices c.jsonl --text t.txt", "text and choices exclude each other: give one of them"),
        ("--stride 8", "stride = 8 belongs to --protocol stride, not to window: leave it out"),
        ("--stride 8 --protocol rolling", "stride = 8 belongs to --protocol stride, not to rolling: leave it out"),
        ("--protocol stride --stride 33", "stride = 33: a window has 32 tokens and cannot score more of them"),
        ("--stride 0 --protocol stride", "--stride = 0: at least 1 is expected"),
        ("--choices c.jsonl --protocol rolling", "protocol is for text, not for --choices: leave it out"),
        ("--choices c.jsonl --sampled", "sampled is for text, not for --choices: leave it out"),
        ("--choices c.jsonl --generate 2", "generate is for text, not for --choices: leave it out"),
        ("--choices c.jsonl --format smol", "format is for text, not for --choices: leave it out"),
        ("--choices c.jsonl --plot x.png", "plot is for text, not for --choices: leave it out"),
        ("--choices c.jsonl --eval_batches 2", "eval_batches is for text, not for --choices: leave it out"),
        ("--plot x.pdf", "plot = x.pdf: a name that ends in .png is expected"),
        ("--greedy --top_k 3", "greedy takes the likeliest token: leave out top_k"),
        ("--context_length 33", f"{RUN}/ckpt/iter_000060 was trained with 32; take at most that"),
    ],
)
def test_settings_that_cannot_be_meant(words, message):
    assert message in refusal(*words.split())


def test_a_recipes_training_keys_stay_with_training():
    """One recipe serves all verbs, and what these keys are for training would change what is measured."""
    lines = ["stride = 4", "batch_size = 3", 'dtype = "bfloat16"', "context_length = 16", "eval_batches = 1"]
    lines += ["seed = 7", 'dataset = "elsewhere"', f'out_dir = "{RUN}"']
    write("mine.toml", "\n".join(lines))
    words = ["--test_data_path", "data/tiny/val_000000.bin", "--sampled"]  # which wins over the recipe's dataset
    verb.main(asked("--config", "mine.toml", "--json", "report.json", *words))
    got = json.loads(Path("report.json").read_text())
    assert got == report(*words)
    assert got["text"] == "data/tiny/val_000000.bin"


def test_the_newest_run_without_a_path(home):
    os.utime("out/joined/ckpt/last/state.json")
    verb.main(asked("--json", "report.json"))
    newest = json.loads(Path("report.json").read_text())["model"]
    assert newest == str(loading.find(None, print).path)
    assert newest.startswith("out/joined/")


def test_a_smaller_context():
    got = report("--context_length", 8, "--text", write("t.txt", WORDS))
    ids, model = [*WORDS.encode()], byte_model()
    losses = []
    with torch.no_grad():
        for i in range(1, len(ids)):
            logits = model(torch.tensor([ids[(i - 1) // 8 * 8 : i]]))[0, -1].double()
            losses.append(-float(logits.log_softmax(-1)[ids[i]]))
    assert got["window"] == 8
    assert got["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert [bucket["last"] for bucket in got["loss_by_position"]] == [*range(8)]
    assert report("--context_length", 1, "--protocol", "stride")["window"] == 1


def test_a_picture_of_the_losses_by_position(tmp_path):
    report("--plot", tmp_path / "positions.png")
    assert (tmp_path / "positions.png").read_bytes().startswith(b"\x89PNG\r\n")
    report("--context_length", 4, "--plot", tmp_path / "two.png", model=[RUN, "out/joined"])
    assert (tmp_path / "two.png").stat().st_size > 5000


@pytest.mark.parametrize("key", ["json", "plot"])
def test_what_cannot_be_written_is_refused_before_the_work(key, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "find", lambda *words: pytest.fail("work had begun"))
    (tmp_path / "folder.png").mkdir()
    for target in (tmp_path / "nowhere/x.png", tmp_path / "folder.png"):
        message = f"{key} = {target}: cannot be written: no file can be made there"
        assert refusal(f"--{key}", target) == message


# ---------------------------------------------------------------------------------------------------------------------
# several models, and those of others


def with_noise(model: transformers.GPT2LMHeadModel) -> transformers.GPT2LMHeadModel:
    """Large random numbers in every parameter, so that a mistake in any shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def of_transformers(**changes) -> transformers.GPT2LMHeadModel:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 50257, **changes}
    return with_noise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)))


@pytest.fixture(scope="module")
def gpt2_folder(home) -> str:
    """A small model that transformers saved, without tokenizer files, as OpenAI's vocabulary has no other size."""
    of_transformers().save_pretrained(home / "theirs")
    return "theirs"


@torch.no_grad()
def their_loss(model: transformers.GPT2LMHeadModel, text: str, T: int) -> float:
    """Nats per token, transformers' own, over windows that do not overlap."""
    ids = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    nats = 0.0
    for start in range(0, len(ids) - 1, T):
        window = torch.tensor([ids[start : start + T + 1]])
        count = window.shape[1] - 1
        # a window's last id is told, and read by nobody: the model has no place for it
        logits = model(window[:, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")) if count else 0.0
    return nats / (len(ids) - 1)


def test_a_hugging_face_folder_is_scored_as_transformers_does(gpt2_folder):
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder)
    text = write("some.txt", TEXT[:400])
    got = report("--text", text, model=gpt2_folder)
    assert got["loss"] == pytest.approx(their_loss(model, TEXT[:400], 16), rel=1e-5)
    assert (got["model"], got["iter"], got["window"]) == ("theirs", None, 16)
    assert got["bytes"] == len(TEXT[:400].encode()) - 2  # "99" is one token
    cropped = report("--text", text, "--context_length", 5, model=gpt2_folder)
    assert cropped["loss"] == pytest.approx(their_loss(model, TEXT[:400], 5), rel=1e-5)
    assert "give --dataset, --test_data_path or --text" in refusal(model=gpt2_folder)
    longer = refusal("--text", text, "--context_length", 17, model=gpt2_folder)
    assert longer == "context_length = 17: theirs was trained with 16; take at most that"


def test_a_folder_with_a_pickle_only_is_refused(gpt2_folder):
    Path("pickled").mkdir()
    shutil.copy(f"{gpt2_folder}/config.json", "pickled")
    torch.save(of_transformers().state_dict(), "pickled/pytorch_model.bin")
    message = refusal("--text", "some.txt", model="pickled")
    assert message.startswith("model_path = pickled: pytorch_model.bin is a pickle")


def test_nanogpts_checkpoint_is_scored_as_transformers_does():
    """Written in nanoGPT's layout: linear layers, torch.compile's prefix, 50,304 rows, a head that is the embedding."""
    theirs = of_transformers(vocab_size=50304, activation_function="gelu")
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {n: p.T.contiguous() if n.endswith(turned) else p for n, p in theirs.state_dict().items()}
    saved = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        "model_args": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": 50304},
        "optimizer": {"state": {}, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95)}]},
        "iter_num": 5,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "openwebtext"},
    }
    saved["model_args"]["dropout"] = 0.0
    torch.save(saved, "ckpt.pt")
    text = write("some.txt", TEXT[:400])
    got = report("--text", text, model="ckpt.pt")
    assert got["loss"] == pytest.approx(their_loss(theirs, TEXT[:400], 16), rel=1e-5)
    assert "give --dataset, --test_data_path or --text" in refusal(model="ckpt.pt")
    saved["model_args"]["vocab_size"] = 65  # of characters
    torch.save(saved, "chars.pt")
    assert "nothing there says which tokenizer" in refusal("--text", text, model="chars.pt")


def test_models_side_by_side(gpt2_folder, capsys):
    """Of two tokenizers: bytes and words are the same, so figures per byte and per word compare."""
    text = write("some.txt", TEXT[:300])
    words = ["--text", text, "--protocol", "rolling"]
    both = report(*words, model=[RUN, gpt2_folder])
    assert list(both) == ["models"]
    table = capsys.readouterr().out.splitlines()
    each = [report(*words, model=path) for path in (RUN, gpt2_folder)]
    assert both["models"] == each
    one, two = each
    assert one["tokens"] > two["tokens"]
    assert one["bytes"] == two["bytes"] == len(TEXT[:300].encode())
    assert one["words"] == two["words"] == len(TEXT[:300].split())
    row = next(line.split() for line in table if line.startswith("bits per byte"))
    assert row[3:5] == [f"{r['bits_per_byte']:.4f}" for r in each]
    assert sum(line.startswith("text") for line in table) == 1
    assert not [line for line in table if line.startswith("at ")]  # their contexts differ
    message = refusal("--dataset", "tiny", model=[RUN, gpt2_folder])
    assert "tokenised with byte, the model theirs was trained with gpt2" in message


def test_a_missing_model_is_told_before_another_is_scored(monkeypatch):
    monkeypatch.setattr(verb, "measure", lambda *words, **more: pytest.fail("hours of work"))
    assert "model_path nowhere: no such folder" in refusal(model=[RUN, "nowhere"])


# ---------------------------------------------------------------------------------------------------------------------
# multiple choice


QUESTIONS = [
    {"ctx": "98 green bottles hanging on the", "endings": ["wall, and if", "zzz", "Q"], "label": 0},
    {"ctx": "there will be ", "endings": ["Q", "97 green bottles. Naïve café", "#!"], "label": "1", "source": "x"},
    {"ctx": "if 5 green bottles should accidentally", "endings": ["fall, there", "of the", "X"], "label": 2},
]


@torch.no_grad()
def test_multiple_choice(capsys):
    write("c.jsonl", "\n".join(map(json.dumps, QUESTIONS)))
    got = report("--choices", "c.jsonl")
    model, plain, per_character = byte_model(), 0, 0
    for question in QUESTIONS:
        scores = []
        for ending in question["endings"]:
            ids, scored = [*f"{question['ctx'].rstrip()} {ending}".encode()], len(ending.encode()) + 1
            if question["ctx"].endswith(" "):  # a blank there counts to the ending
                ids, scored = [*f"{question['ctx']} {ending}".encode()], scored + 1
            ids = ids[-T - 1 :]
            log_p = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
            scores.append(sum(float(log_p[k - 1, ids[k]]) for k in range(len(ids) - scored, len(ids))))
        plain += int(np.argmax(scores)) == int(question["label"])
        lengths = [len(ending) for ending in question["endings"]]
        per_character += int(np.argmax(np.divide(scores, lengths))) == int(question["label"])
    assert (got["questions"], got["window"], got["text"]) == (3, T, "c.jsonl")
    assert got["choice_accuracy"] == pytest.approx(plain / 3)
    assert got["choice_accuracy_norm"] == pytest.approx(per_character / 3)
    assert (plain, per_character) == (1, 2)
    assert "accuracy, normalised  0.6667  share of questions" in capsys.readouterr().out
    both = report("--choices", "c.jsonl", model=[RUN, "out/joined"])["models"]
    assert [r["model"] for r in both] == [f"{RUN}/ckpt/iter_000060", "out/joined/ckpt/iter_000006"]
    single = write("c.jsonl", json.dumps(QUESTIONS[0]))
    assert report("--choices", single)["choice_accuracy_stderr"] is None  # of one question there is none


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "c.jsonl line 2: not JSON"),
        ('{"ctx": "a"}', "c.jsonl line 2: no key 'endings', its keys are ctx"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "c.jsonl line 2: label = 2: the right ending's number"),
        (json.dumps({"ctx": "a", "endings": ["b", "c" * 40], "label": 0}), "question 2 ('a') has an ending of 41"),
    ],
)
def test_a_broken_file_of_choices(line, message):
    write("c.jsonl", f"{json.dumps(QUESTIONS[0])}\n{line}\n")
    assert refusal("--choices", "c.jsonl").startswith(message)


# ---------------------------------------------------------------------------------------------------------------------
# continuations


@torch.no_grad()
def plain_greedy(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest ids after a prompt, one by one, up to end-of-text."""
    written = []
    while len(written) < count:
        written.append(int(model(torch.tensor([prompt + written]))[0, -1].argmax()))
        if written[-1] == EOT:
            return written[:-1]
    return written


def repeated(ids: list[int]) -> float:
    """Share of the runs of 4 that were there before."""
    runs = [tuple(ids[k : k + 4]) for k in range(len(ids) - 3)]
    return sum(run in runs[:k] for k, run in enumerate(runs)) / len(runs)


@pytest.mark.extra
def test_continuations(extras, ranks, home, tmp_path):
    words = ["--generate", 5, "--prompt_tokens", 12, "--max_new_tokens", 20, "--eval_batches", 1]
    got = report(*words)
    assert (got["prompts"], got["bleu_signature"][:8]) == (5, "nrefs:1|")
    assert 0 <= got["bleu"] <= 100
    assert 0 <= got["rouge_l"] <= 1
    assert 0 < got["distinct_1"] <= 1
    assert 0 < got["distinct_2"] <= 1
    greedy = report(*words, "--greedy")
    ids = np.fromfile("data/tiny/val_000000.bin", dtype="<u2").tolist()
    starts = [n * (len(ids) - 32) // 4 for n in range(5)]
    assert EOT not in ids[:-1]
    written = [plain_greedy(byte_model(), ids[start : start + 12], 20) for start in starts]
    assert greedy["repetition"] == pytest.approx(np.mean([repeated(text) for text in written])) != got["repetition"]
    references = [ids[start + 12 : start + 32] for start in starts]
    references = [text[: text.index(EOT)] if EOT in text else text for text in references]
    assert greedy["reference_repetition"] == pytest.approx(np.mean([repeated(text) for text in references]))
    one, two = in_one_process_and_two(ranks, home, tmp_path, [words, [*words, "--greedy"]])
    assert one == [got, greedy]
    assert {
        key: two[0][key] for key in got if key[:4] in ("bleu", "roug", "dist", "repe", "refe")
    }.items() <= got.items()
    assert two[1]["repetition"] == greedy["repetition"]
    short = refusal("--generate", 3, "--prompt_tokens", 10**6)
    assert "do not fit into a split of" in short


def test_missing_packages_are_told_before_the_work(monkeypatch):
    monkeypatch.setattr(loading, "find", lambda *words: pytest.fail("work had begun"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal("--generate", 3).endswith("pip install -r requirements-extra.txt")


# ---------------------------------------------------------------------------------------------------------------------
# memory


def peak(*words) -> int:
    """Bytes of Python's and numpy's memory at the most; torch's own, which a text is never in, are not counted."""
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
    monkeypatch.setattr(counting, "PIECE", 2048)
    rng = np.random.default_rng(0)
    sizes = (2_000, 20_000)
    paths = [write_ids(f"{size}.bin", rng.integers(97, 123, size)) for size in sizes]
    report("--test_data_path", paths[0])  # what is loaded once is not counted
    few, many = (peak("--test_data_path", path, "--batch_size", 8) for path in paths)
    assert many - few < 4 * (sizes[1] - sizes[0])  # less than a float32 of each token


# ---------------------------------------------------------------------------------------------------------------------
# as a process, and as several


@pytest.fixture
def life(fork_server, home, tmp_path):
    """life(*words, code) -> ForkedProcess: eval.py in a process of its own; code is run before it."""
    lives = []

    def start(*words, code: str = "") -> ForkedProcess:
        words = [ROOT / "eval.py", "--device", "cpu", *words]
        lives.append(ForkedProcess(fork_server, tmp_path / f"life{len(lives)}", home, words, code, {}))
        return lives[-1]

    yield start
    for each in lives:
        each.kill()


def test_json_alone_on_standard_output(life):
    alone = life("--model_path", RUN, "--json", "-")
    assert alone.wait() == 0, alone.output
    assert json.loads(alone.output) == report()


def test_a_mistake_is_one_line(life):
    wrong = life("--model_path", "nowhere")
    assert wrong.wait() == 2
    assert wrong.output.startswith("error: model_path nowhere: no such folder")
    assert wrong.output.count("\n") == 1


def test_closed_pipe_is_no_traceback(life):
    """`| head`"""
    closed = "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
    piped = life("--model_path", RUN, "--eval_batches", 1, code=closed)
    assert piped.wait() == 141
    assert piped.output == ""


def test_ctrl_c(life, tmp_path):
    """No traceback, and nothing of the text stays behind."""
    code = f"import pathlib, tempfile; from flatgpt.evaluation import metrics\ntempfile.tempdir = {str(tmp_path)!r}\n"
    code += "def measure(*words, **more):\n pathlib.Path(folder, 'here').touch(); time.sleep(60)\n"
    code += "metrics.measure = measure"
    stopped = life("--model_path", RUN, "--text", write("t.txt", WORDS), code=code)
    stopped.wait_for_mark()
    assert len(list(tmp_path.glob("flatgpt-*/text.bin"))) == 1
    stopped.send(signal.SIGINT)
    assert stopped.wait() == 130
    assert stopped.output == ""
    assert not list(tmp_path.glob("flatgpt-*"))


# Several reports in one job, since each start costs time: the ranks stay joined from one to the next.
SEVERAL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from flatgpt.cli import cli
import eval as verb
import torch.distributed as dist
from config import EvalConfig
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *words, **more: dist.is_initialized() or join(*words, **more)
dist.destroy_process_group = lambda: None
for words in json.loads(sys.argv[1]):
    verb.main(cli.parse(EvalConfig, words))
leave()
"""


def in_one_process_and_two(ranks, home, tmp_path, several: list[list]) -> tuple[list[dict], list[dict]]:
    """The reports of these words, by one process and by two ranks."""
    script, calls = tmp_path / "several.py", []
    script.write_text(SEVERAL)
    for n, words in enumerate(several):
        target = str(tmp_path / f"{n}.json")
        calls.append(["--device", "cpu", "--model_path", RUN, *map(str, words), "--json", target])
    done = ranks(2, json.dumps(calls), script=script, cwd=home)
    assert done.code == 0, done.output
    two = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(len(several))]
    heads = [line for line in done.output.splitlines() if line.startswith(("model ", "Test loss"))]
    assert len(heads) == len(several), done.output  # the first rank speaks, and it alone
    return [report(*words) for words in several], two


def test_ranks_give_the_figures_of_one(ranks, home, tmp_path):
    """Also where the second rank has a batch less, and where it has none."""
    write("t.txt", WORDS)
    write("c.jsonl", "\n".join(map(json.dumps, QUESTIONS * 3)))
    several = [
        ["--sampled", "--batch_size", 3],
        ["--protocol", "stride", "--stride", 10, "--batch_size", 8],
        ["--protocol", "rolling", "--batch_size", 5, "--eval_batches", 3, "--sampled"],
        ["--protocol", "rolling", "--text", "t.txt", "--format", "smol"],
        ["--choices", "c.jsonl"],
    ]
    one, two = in_one_process_and_two(ranks, home, tmp_path, several)
    for first, both in zip(one, two, strict=True):
        for buckets in zip(first.pop("loss_by_position", []), both.pop("loss_by_position", []), strict=True):
            assert alike(*buckets, 1e-6)
        assert alike(first, both, 1e-6), (first, both)


def test_the_first_rank_alone_writes(monkeypatch, capsys):
    class Second(DistributedContext):
        def sum(self, value):
            return value

    @contextlib.contextmanager
    def join(*words):
        yield Second(1, 2, 1, 2)

    monkeypatch.setattr(verb, "join", join)
    verb.main(asked("--model_path", RUN, "--json", "second.json", "--plot", "second.png", "--batch_size", 8))
    assert capsys.readouterr() == ("", "")
    assert not [*Path().glob("second.*")]


def test_ranks_say_a_mistake_once(ranks, home):
    done = ranks(2, "--device", "cpu", "--model_path", "nowhere", script=ROOT / "eval.py", cwd=home)
    assert done.code != 0
    assert done.output.count("error: model_path nowhere: no such folder") == 1
