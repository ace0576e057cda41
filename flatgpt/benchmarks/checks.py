"""bench.py tests and bench.py resume: run the tests that need CUDA; check that resuming is exact on this device."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks import nanogpt
from flatgpt.runtime.device import find_device

TIMES = ("step_ms", "tok_per_s", "mfu", "peak_mem_gb")  # columns of metrics.csv that differ between equal runs


class Outcomes:
    """A pytest plugin that counts the collected tests and keeps the outcome of each test that ran, by node id."""

    def __init__(self):
        self.collected, self.by_test = 0, {}

    def pytest_collection_finish(self, session) -> None:
        self.collected = len(session.items)

    def pytest_collectreport(self, report) -> None:
        if report.failed:  # a file that cannot be imported
            self.by_test[report.nodeid] = "failed"

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.by_test[report.nodeid] = report.outcome


def bench_tests(config: BenchConfig) -> dict:
    """Run the tests marked gpu. Without CUDA they are only collected, which imports every test file.

    Where SIGINT ends them early (a row's time limit, Ctrl-C), `complete` is false, and the counts are of the tests that
    had ended.

    Raises:
        UserError: a package that the tests need is missing, or pytest did not run.
    """
    for package in ("pytest", "pytest-timeout", "hypothesis"):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"bench.py tests: {package} is not installed: pip install -r requirements-dev.txt")
    import pytest

    words = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", str(REPO_ROOT / "tests")]
    cuda, outcomes = find_device(config.device).type == "cuda", Outcomes()
    if not cuda:
        words.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        # most of their time is compilation, which runs on the CPU
        words += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    with contextlib.chdir(REPO_ROOT), contextlib.redirect_stdout(sys.stderr):  # hypothesis writes to the current folder
        code = pytest.main(words, plugins=[outcomes])
    ended = list(outcomes.by_test.values())
    if not ended and (cuda or not outcomes.collected):
        raise UserError(f"pytest {shlex.join(words)} ran no test and ended with exit code {int(code)}")
    counts = {outcome: ended.count(outcome) for outcome in ("passed", "failed", "skipped")}
    failed = sorted(name for name, outcome in outcomes.by_test.items() if outcome == "failed")
    counts |= {"failed_tests": failed, "complete": code != pytest.ExitCode.INTERRUPTED}
    return counts if cuda else counts | {"collected_only": outcomes.collected}


def bench_resume(config: BenchConfig, recipe: str, say: Callable[[str], None]) -> dict:
    """Train with train.py, stop after half of max_iters and resume; compare with an uninterrupted run.

    Losses in metrics.csv and the last checkpoint's weights have to be equal bit for bit.

    Args:
        recipe: the settings of train.py, as a recipe's text.

    Returns:
        the number of updates, `identical`, and the seconds of each of the three runs.

    Raises:
        UserError: a run failed, or the resumed run differs from the uninterrupted one.
    """
    whole, half, figures = config.max_iters, config.max_iters // 2, {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
        shared = ["--config", folder / "recipe.toml", "--lr_decay_iters", whole, "--eval_interval", half]
        resumed, uninterrupted = folder / "resumed", folder / "uninterrupted"
        for run, words in (
            ("stopped", ["--out_dir", resumed, "--max_iters", half]),
            ("resumed", ["--out_dir", resumed, "--max_iters", whole, "--resume"]),
            ("uninterrupted", ["--out_dir", uninterrupted, "--max_iters", whole]),
        ):
            words, began = list(map(str, [*shared, "--log_interval", 1, *words])), time.perf_counter()
            command = [sys.executable, str(REPO_ROOT / "train.py"), *words]
            done = subprocess.run(
                command, env=nanogpt.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if done.returncode:
                lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
                raise UserError(f"train.py {shlex.join(words)} failed: {lines[-1].removeprefix('error: ')}")
            figures[f"{run}_s"] = time.perf_counter() - began
            say(f"{run:<13} {figures[f'{run}_s']:6.1f} s")
        if found := difference(resumed, uninterrupted):
            raise UserError(f"the resumed run differs from the uninterrupted one: {found}")
    return {"updates": whole, "identical": True} | figures


def difference(one: Path, other: Path) -> str | None:
    """The first difference between two runs' logs or last weights; None if there is none."""
    for a, b in zip(*map(_rows, (one, other)), strict=False):
        for key in a:
            if a[key] != b[key] and key not in TIMES:
                return f"metrics.csv has {key} = {a[key]} and {b[key]} at iter {a['iter']} and {b['iter']}"
    counts = [len(_rows(run)) for run in (one, other)]
    if counts[0] != counts[1]:
        return f"metrics.csv has {counts[0]} and {counts[1]} rows"
    weights, others = (load_file(run / "ckpt" / "last" / "model.safetensors") for run in (one, other))
    unequal = [name for name in weights if not torch.equal(weights[name], others[name])]
    if unequal:
        largest = max((weights[name] - others[name]).abs().max().item() for name in unequal)
        return f"{len(unequal)} of {len(weights)} tensors differ, by at most {largest:.3g}; the first is {unequal[0]}"
    return None


def _rows(run: Path) -> list[dict]:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
