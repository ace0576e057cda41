"""bench.py tests and resume: run the tests that need CUDA; check that resuming is exact on this device."""

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
from pathlib import Path

import torch
from safetensors.torch import load_file

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks.measure import USER_ENVIRONMENT, failure, log, script, write_recipe
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


def bench_resume(config: BenchConfig) -> dict:
    """Train with train.py, stop after half of max_iters and resume; compare with an uninterrupted run.

    Losses in metrics.csv and the weights of the last checkpoint have to be equal bit for bit.

    Returns:
        the number of updates, `identical`, and the seconds of each of the three runs.

    Raises:
        UserError: a run failed, or the resumed run differs from the uninterrupted one.
    """
    max_iters, half, figures = config.max_iters, config.max_iters // 2, {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        shared = ["--config", write_recipe(config, folder), "--lr_decay_iters", max_iters, "--eval_interval", half]
        for run, words in (
            ("stopped", ["--out_dir", folder / "resumed", "--max_iters", half]),
            ("resumed", ["--out_dir", folder / "resumed", "--max_iters", max_iters, "--resume"]),
            ("uninterrupted", ["--out_dir", folder / "uninterrupted", "--max_iters", max_iters]),
        ):
            command, began = script("train.py", *shared, "--log_interval", 1, *words), time.perf_counter()
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            done = subprocess.run(command, env=USER_ENVIRONMENT, **streams)
            if done.returncode:
                raise failure(command, done.stdout, done.returncode)
            figures[f"{run}_s"] = time.perf_counter() - began
            log(f"{run:<13} {figures[f'{run}_s']:6.1f} s")
        if found := difference(folder / "resumed", folder / "uninterrupted"):
            raise UserError(f"the resumed run differs from the uninterrupted one: {found}")
    return {"updates": max_iters, "identical": True} | figures


def difference(one: Path, other: Path) -> str | None:
    """Return the first difference between the logs or the last weights of two runs; None if there is none."""
    tables = []
    for run in (one, other):
        with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    for a, b in zip(*tables, strict=False):
        for key in a:
            if a[key] != b[key] and key not in TIMES:
                return f"metrics.csv has {key} = {a[key]} and {b[key]} at iter {a['iter']} and {b['iter']}"
    if len(tables[0]) != len(tables[1]):
        return f"metrics.csv has {len(tables[0])} and {len(tables[1])} rows"
    weights, others = (load_file(run / "ckpt" / "last" / "model.safetensors") for run in (one, other))
    unequal = [name for name in weights if not torch.equal(weights[name], others[name])]
    if unequal:
        largest = max((weights[name] - others[name]).abs().max().item() for name in unequal)
        return f"{len(unequal)} of {len(weights)} tensors differ, by at most {largest:.3g}; the first is {unequal[0]}"
    return None
