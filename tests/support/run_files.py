"""What a run has written: rows of metrics.csv, weights, checkpoints; and comparing two runs to the bit."""

import csv
import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from flatgpt.runs import checkpoint
from flatgpt.runs.history import follow

TIMES = ("step_ms", "tok_per_s", "mfu", "peak_mem_gb")  # columns that differ between equal runs


def rows(run_dir: Path) -> list[dict]:
    """Return the rows of metrics.csv without times."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def logged_iters(run_dir: Path) -> list[int]:
    return [int(row["iter"]) for row in rows(run_dir)]


def val_losses(run_dir: Path) -> dict[int, float]:
    """Return the validation losses by iteration."""
    return {int(row["iter"]): float(row["val_loss"]) for row in rows(run_dir) if row["val_loss"]}


def weights(run_dir: Path) -> dict:
    """Return the weights of the newest checkpoint."""
    return load_file(follow(run_dir / "ckpt" / "last") / "model.safetensors")


def saved_iters(run_dir: Path) -> list[int]:
    """Return the iterations of the valid checkpoints, newest first."""
    return [checkpoint.read_state(folder)["iter"] for folder in checkpoint.checkpoints(run_dir)]


def links(run_dir: Path) -> dict[str, str]:
    """Return the names of the checkpoints that `best` and `last` lead to, by symlinks or files."""
    paths = [run_dir / "ckpt" / name for name in ("last", "best")]
    return {path.name: follow(path).resolve().name for path in paths if os.path.lexists(path)}


def same(a, b) -> bool:
    """Whether nested dicts and lists of tensors and plain values are equal to the bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def final_state(run_dir: Path) -> dict:
    """Return everything that a run ended with, times left out: rows, weights, optimizer, progress, links."""
    state = checkpoint.load_train_state(follow(run_dir / "ckpt" / "last"))
    state["row"] = {key: value for key, value in state["row"].items() if key not in TIMES}
    return {"rows": rows(run_dir), "weights": weights(run_dir), "links": links(run_dir), **state}


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Assert that a run is finished and ended as the other one, to the bit."""
    assert checkpoint.verify(follow(run_dir / "ckpt" / "last"))["finished"]
    found, expected = final_state(run_dir), final_state(whole)
    assert found["rows"] == expected["rows"]
    assert found.keys() == expected.keys()
    assert [key for key in expected if not same(found[key], expected[key])] == []


def snapshot(folder: Path) -> dict:
    """Return the contents of a folder: hashes of files, targets of links."""
    return {
        str(path): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
    }
