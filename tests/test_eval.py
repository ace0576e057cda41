"""eval.py: the report, against a slow plain reference, and what it refuses."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, make_dataset

import checkpoint
import cli
import eval as verb
from config import EvalConfig, UserError


def figures(home, monkeypatch, *words) -> dict:
    """The report of eval.py, run in this process."""
    monkeypatch.chdir(home)
    target = home / "report.json"
    verb.main(cli.parse(EvalConfig, ["--device", "cpu", "--json", str(target), *map(str, words)]))
    return json.loads(target.read_text())


def test_report_equals_a_plain_loop(tiny_home, monkeypatch, capsys):
    got = figures(tiny_home, monkeypatch)
    folder, state = checkpoint.find(str(tiny_home / "out/quickstart"), print)
    model, _ = checkpoint.load_model(folder, state, torch.device("cpu"))
    ids = torch.from_numpy(np.fromfile(tiny_home / "data/tiny/val_000000.bin", dtype="<u2").astype(np.int64))
    loss, correct, T = 0.0, 0, 32
    with torch.no_grad():
        for start in range(0, len(ids) - 1, T):  # the last window is shorter
            x, y = ids[start : start + T + 1][:-1], ids[start : start + T + 1][1:]
            logits = model(x[None])[0].double()
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(-1) == y).sum())
    n = len(ids) - 1
    text_bytes = int((ids[1:] != 256).sum())
    assert got["tokens"] == n
    assert got["bytes"] == text_bytes
    assert got["loss"] == pytest.approx(loss / n, rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(loss / n), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(loss / math.log(2) / text_bytes, rel=1e-6)
    assert got["accuracy"] == pytest.approx(correct / n, abs=1e-3)
    assert 0 < got["accuracy"] < 1
    assert (got["window"], got["dtype"], got["iter"]) == (32, "float32", 60)
    printed = capsys.readouterr().out
    assert f"{got['loss']:.4f}  nats per token" in printed
    assert "share of tokens" in printed


def test_twice_the_same_digits_and_any_batch_size(tiny_home, monkeypatch):
    first = figures(tiny_home, monkeypatch)
    assert figures(tiny_home, monkeypatch) == first
    assert figures(tiny_home, monkeypatch, "--batch_size", 3)["loss"] == pytest.approx(first["loss"], rel=1e-6)


def test_first_batches_only(tiny_home, monkeypatch):
    got = figures(tiny_home, monkeypatch, "--eval_batches", 2, "--batch_size", 4)
    assert got["tokens"] == 2 * 4 * 32
    assert "first 2 batches" in got["protocol"]


def test_other_split_and_other_dataset(tiny_home, monkeypatch):
    meta = json.loads((tiny_home / "data/tiny/meta.json").read_text())
    assert figures(tiny_home, monkeypatch, "--split", "train")["tokens"] == meta["splits"]["train"]["tokens"] - 1
    make_dataset(tiny_home, "other", "Other words of another book. " * 100)
    assert "data/other val" in figures(tiny_home, monkeypatch, "--dataset", "other")["data"]
    with pytest.raises(UserError, match="no split test; it has train, val"):
        figures(tiny_home, monkeypatch, "--split", "test")


def test_bare_file_takes_the_models_tokenizer(tiny_home, monkeypatch, tmp_path, capsys):
    path = tmp_path / "ids.bin"
    text = "If 3 green bottles 🎈".encode()
    np.array([*text, 256, *text], dtype="<u2").tofile(path)
    got = figures(tiny_home, monkeypatch, "--test_data_path", path)
    assert got["tokens"] == 2 * len(text)
    assert got["bytes"] == 2 * len(text) - 1  # the first byte is not scored, end-of-text stands for none
    assert "the model's tokenizer, byte" in capsys.readouterr().err
    inside = tiny_home / "data/tiny/val_000000.bin"
    whole = figures(tiny_home, monkeypatch)
    assert figures(tiny_home, monkeypatch, "--test_data_path", inside)["loss"] == whole["loss"]


def test_file_on_the_command_line_wins_over_the_recipes_dataset(tiny_home, monkeypatch):
    (tiny_home / "mine.toml").write_text('dataset = "elsewhere"\nout_dir = "out/quickstart"\ndtype = "bfloat16"\n')
    got = figures(tiny_home, monkeypatch, "--config", "mine.toml", "--test_data_path", "data/tiny/val_000000.bin")
    assert (got["data"], got["dtype"]) == ("data/tiny/val_000000.bin", "float32")


def test_what_is_refused(tiny_home, monkeypatch, tmp_path):
    path = tmp_path / "ids.bin"
    path.write_bytes(pickle.dumps(list(range(1000))))
    with pytest.raises(UserError, match=r"pickle .*prepare_data\.py text"):
        figures(tiny_home, monkeypatch, "--test_data_path", path)
    np.array([1, 2, 257, 3], dtype="<u2").tofile(path)
    with pytest.raises(UserError, match="id 257 at byte 4"):
        figures(tiny_home, monkeypatch, "--test_data_path", path)
    np.array([1], dtype="<u2").tofile(path)
    with pytest.raises(UserError, match="takes two to score one"):
        figures(tiny_home, monkeypatch, "--test_data_path", path)
    with pytest.raises(UserError, match="exclude each other"):
        figures(tiny_home, monkeypatch, "--test_data_path", path, "--dataset", "tiny")


def test_other_tokenizer_is_refused(tiny_home, monkeypatch, gpt2_vocabulary):
    make_dataset(tiny_home, "bpe", "Other words. " * 100, encoding="gpt2")
    with pytest.raises(UserError, match="tokenised with gpt2, the model was trained with byte"):
        figures(tiny_home, monkeypatch, "--dataset", "bpe")


def test_json_alone_on_standard_output(tiny_home):
    done = command("eval", "--config", "quickstart", "--json", "-", "--device", "cpu", cwd=tiny_home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "out/quickstart/ckpt/iter_000060"
