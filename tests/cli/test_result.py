"""train.py --json: the result of a run."""

import json
import math
import shutil
import signal
import statistics
from pathlib import Path

import pytest
import torch
from in_process import TINY, make_dataset, train_here
from run_files import rows

import train
from config import UserError
from flatgpt.data.shards import file_sha256
from flatgpt.runs import checkpoint, history

QUIET = ("--sample_tokens", 0)


def result(*words, file: str = "result.json") -> dict:
    """Train, and return what was written to the file."""
    train_here(*QUIET, "--json", file, *words)
    return json.loads(Path(file).read_text())


def test_it_agrees_with_the_log_and_the_checkpoint(cli, tiny_data):
    """On standard output it stands alone."""
    done = cli("train", *TINY, *QUIET, "--eval_tokens", 640, "--max_iters", 8, "--json", "-")
    found, run = json.loads(done.out), Path("out/quickstart")
    assert "iter 8 | loss" in done.err
    log, state = history.read(run), checkpoint.read_state(run / "ckpt/last")
    expected = {
        **{"run": "out/quickstart", "state": "finished", "signal": None, "iter": 8, "max_iters": 8, "start_iter": 0},
        **{"tokens": 8 * 4 * 32, "val_loss": state["val_loss"], "val_iter": 8, "best_loss": state["best_loss"]},
        **{"best_iter": state["best_iter"], "train_loss": log["mean_loss"][-1], "parameters": state["parameters"]},
        **{"epochs": pytest.approx(log["epoch"][-1]), "update_seconds": log.seconds, "mfu": None, "tokenizer": "byte"},
        **{"tok_per_s": pytest.approx(8 * 4 * 32 / found["seconds"]), "flops": 8 * 4 * 32 * found["flops_per_token"]},
        **{"tok_per_s_steady": statistics.median(log["tok_per_s"][2:]), "dataset": "data/tiny", "dtype": "float32"},
        **{"dataset_sha256": file_sha256(Path("data/tiny/meta.json")), "compile": False, "torch": torch.__version__},
        **{key: state[key] for key in ("device", "cpu", "threads", "ranks", "git_commit", "command")},
    }
    assert {key: found[key] for key in expected} == expected
    assert found["seconds"] > 0 < found["update_seconds"]
    text = json.loads(Path("data/tiny/meta.json").read_text())["splits"]["val"]
    bits = [found[f"{name}_loss"] / math.log(2) * text["tokens"] / text["bytes"] for name in ("val", "best")]
    assert [found[f"{name}_bits_per_byte"] for name in ("val", "best")] == pytest.approx(bits)
    report = json.loads(cli("eval", "--json", "-", "--device", "cpu").out)
    whole = result("--max_iters", 8, "--overwrite")
    assert whole["best_bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=2e-3)


def test_hash_is_of_what_determines_the_result(tiny_data):
    first = result("--out_dir", "out/a", "--log_interval", 3)
    assert {"lr", "seed", "batch_size", "eval_tokens"} <= first["config"].keys()
    assert not {"out_dir", "log_interval", "json", "data_dir", "keep_checkpoints"} & first["config"].keys()
    shutil.copytree("data", "elsewhere")
    words = ("--data_dir", "elsewhere", "--lr_decay_iters", 6, "--keep_every", 1)  # lr_decay_iters is what it was
    assert result("--out_dir", "out/b", *words)["config_sha256"] == first["config_sha256"]
    assert result("--out_dir", "out/c", "--lr", 1e-3)["config_sha256"] != first["config_sha256"]
    shutil.rmtree("data/tiny")
    make_dataset(tiny_data, text="another text\n" * 1000)
    other = result("--out_dir", "out/d")
    assert other["config_sha256"] == first["config_sha256"]
    assert other["dataset_sha256"] != first["dataset_sha256"]


def test_fixed_time_gives_the_loss_of_the_last_weights(cli, tiny_data):
    """Exit code 0. The log has no row of that evaluation: a resumed run is not changed by it."""
    words = (*TINY, *QUIET, "--max_iters", 100_000, "--eval_interval", 100_000)
    done = cli("train", *words, "--max_minutes", 1e-7, "--json", "out/quickstart/result.json")
    assert done.code == 0, done.err
    found = json.loads(Path("out/quickstart/result.json").read_text())
    assert (found["state"], found["iter"], found["val_iter"], found["best_loss"]) == ("max_minutes", 1, 1, None)
    report = json.loads(cli("eval", "--json", "-", "--device", "cpu").out)
    assert found["val_loss"] == pytest.approx(report["loss"], rel=1e-5)
    assert [row["val_loss"] for row in rows(Path("out/quickstart"))][1:] == [""]


def test_how_a_run_ended(tiny_data, monkeypatch):
    losses = iter((5.0, 4.0, 4.5))
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
        found = result("--patience", 1, "--max_iters", 60)
    assert (found["state"], found["iter"], found["best_loss"], found["val_loss"]) == ("patience", 6, 4.0, 4.5)
    again = result("--resume", "--patience", 1, "--max_iters", 60)
    same = ("state", "iter", "tokens", "best_loss", "val_loss", "update_seconds", "config_sha256", "command")
    assert {key: again[key] for key in same} == {key: found[key] for key in same}, "also of a finished run"
    assert (again["start_iter"], again["tok_per_s"], again["tok_per_s_steady"]) == (6, None, None)
    monkeypatch.setattr(train.StopRequest, "reason", lambda stop: signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        result("--overwrite", file="signal.json")
    found = json.loads(Path("signal.json").read_text())
    assert (end.value.code, found["state"], found["signal"]) == (128 + signal.SIGTERM, "signal", "SIGTERM")


def test_resumed_run_counts_the_whole_run_and_this_start(tiny_data):
    first = result("--max_iters", 6)
    second = result("--max_iters", 9, "--resume")
    assert (second["iter"], second["start_iter"], second["tokens"]) == (9, 6, 9 * 4 * 32)
    assert second["update_seconds"] > first["update_seconds"]
    assert second["tok_per_s"] == pytest.approx(3 * 4 * 32 / second["seconds"])


def test_run_that_fails_writes_none(tiny_data, monkeypatch):
    Path("result.json").write_text("before")
    monkeypatch.setattr(train, "train_step", lambda run, i: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result()
    assert Path("result.json").read_text() == "before"


@pytest.mark.parametrize("file", ["none/result.json", "data", "out/quickstart/none/x.json"])
def test_file_that_cannot_be_written_is_an_error_before_the_run(cli, tiny_data, file):
    error = cli("train", *TINY, "--json", file).error
    assert error.startswith(f"error: json = {file} cannot be written, because ")
    assert not Path("out").exists()


def test_list_and_plan_have_no_result(cli, tiny_data):
    for word in ("--list", "--plan"):
        assert "json is for training and --show_batch" in cli("train", *TINY, word, "--json", "-").error
    Path("mine.toml").write_text('json = "report.json"\n')  # of eval.py
    with pytest.raises(UserError):
        train_here("--config", "mine.toml", "--lr", -1)
    train_here("--config", "mine.toml", *QUIET)
    assert not Path("report.json").exists()
