"""bench.py all, gpu and tests: lists of benchmarks, each row in a process of its own; and the tests that need CUDA.

A row that fails or reaches its time limit becomes an error, and the next row starts. Files are written after each row.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import torch

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks import nanogpt
from flatgpt.benchmarks.measure import Process, format_value, log, script, table
from flatgpt.data.dataset import open_dataset
from flatgpt.runtime.device import cpu_name, find_device
from flatgpt.runtime.files import write_json, write_output

SUITES = tomllib.loads((REPO_ROOT / "flatgpt/benchmarks/suites.toml").read_text())
DATASETS = ("shakespeare", "shakespeare_byte")  # of the rows
GRACE = 20  # seconds from SIGINT to SIGKILL; pytest-xdist waits 10 for a test that hangs
COLUMNS = ("ms", "tokens_per_s", "tflop_per_s", "mfu", "mfu_measured", "peak_mem_gb", "start_s")  # of the table


def run_suite(config: BenchConfig, command: str) -> None:
    """Run the rows of a list in turn; write figures to config.json and a table beside it after each of them.

    Raises:
        UserError: before the first row, if data, a GPU or the peer is missing.
    """
    on_cuda = config.what == "gpu" and not config.dry_run
    if on_cuda and not torch.cuda.is_available():
        raise UserError("bench.py gpu needs a GPU, and torch sees none here; for CPUs: bench.py all, or gpu --dry_run")
    if config.peer:
        nanogpt.require_checkout(config)
    for name in DATASETS:
        open_dataset(Path(config.data_dir) / name)
    device, name = ("cuda", torch.cuda.get_device_name()) if on_cuda else ("cpu", cpu_name())
    found = {"command": command, "device": name, "torch": torch.__version__, "dry_run": config.dry_run, "rows": {}}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM ends the row too
    for row in SUITES[config.what]:
        words = shlex.split(row["words"])
        limit = 3600 if config.dry_run else row.get("limit", 3600)
        words += shlex.split(SUITES["dry_run"][words[0]]) if config.dry_run else []
        words += ["--data_dir", config.data_dir, "--device", device]
        words += ["--peer", *config.peer] if "peer" in row and config.peer else []
        log(f"--- {row['label']}: python bench.py {shlex.join(words)}")
        began = time.perf_counter()
        found["rows"][row["label"]] = run_row(words, limit) | {"seconds": time.perf_counter() - began}
        write_json(found, config.json)
        write_output(markdown(found).encode(), str(Path(config.json).with_suffix(".md")), "json")
    print(markdown(found), end="")


def run_row(words: list[str], limit: float) -> dict:
    """Return the figures of one benchmark in a process of its own, with `error` if it failed or reached its limit.

    At its limit, what it prints when it is interrupted counts: bench.py tests has the outcomes of the tests that ended.
    """
    deadline, shown = time.monotonic() + limit, 0
    with Process(script("bench.py", *words, "--json", "-"), process_group=0) as process:
        try:
            while True:
                late, running = time.monotonic() > deadline, process.poll() is None
                text = os.pread(process.error_file.fileno(), 1 << 20, shown)  # leaves the process's own position
                shown += len(text)
                print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)
                if late or not running:
                    break
                time.sleep(0.1)
        finally:  # after Ctrl-C as well
            end_group(process)
        last, code = process.last_error(), process.returncode
        try:
            figures = json.loads(process.stdout.read())
        except json.JSONDecodeError:
            figures = {}
    if running:
        return {"error": f"ended after its limit of {limit} s: {last}"} | figures
    if code < 0:
        last = f"ended by signal {-code} after: {last}"  # 9 may mean that memory ran out
    return {"error": last} if code else figures


def end_group(process: Process) -> None:
    """End a process and its children: SIGINT, as from Ctrl-C; SIGKILL after its exit or GRACE seconds."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def markdown(found: dict) -> str:
    """Return all rows as Markdown: a table of updates, and a list of what else was measured or failed."""
    updates, others = [], []
    for label, row in found["rows"].items():
        if "tflop_per_s" not in row:
            facts = {key: value for key, value in row.items() if key == "error" or not isinstance(value, str)}
            others.append(f"- {label}: {format_value(facts)}")
            continue
        cells = {"shape": label} | {key: row[key] for key in COLUMNS}
        for name, peer in row.get("peers", {}).items():
            cells |= {f"{name}, tokens_per_s": peer["tokens_per_s"], f"{name}, times": row["ratios"][name]["median"]}
            cells |= {f"{name}, memory": row["memory_ratios"][name]}
        updates.append(cells)
    dry = "A dry run at toy size: its figures are not results. " * found["dry_run"]
    title = f"{dry}{found['device']}, torch {found['torch']}: `{found['command']}`"
    return "\n".join([title, "", *table(updates), "", *others]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# tests


class Outcomes:
    """A pytest plugin that keeps the names of the tests by outcome."""

    def pytest_sessionfinish(self, session) -> None:
        stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
        self.collected = session.testscollected
        outcomes = ("passed", "skipped", "failed", "error")
        self.names = {outcome: {report.nodeid for report in stats.get(outcome, ())} for outcome in outcomes}


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
        words += ["-n", "auto", "--maxprocesses", "8"]
    with contextlib.chdir(REPO_ROOT), contextlib.redirect_stdout(sys.stderr):  # hypothesis writes to the current folder
        code = pytest.main(words, plugins=[outcomes])
    if code > pytest.ExitCode.INTERRUPTED:
        raise UserError(f"pytest {shlex.join(words)} ran no test and ended with exit code {int(code)}")
    failed = outcomes.names["failed"] | outcomes.names["error"]
    figures = {"passed": len(outcomes.names["passed"] - failed), "failed": len(failed)}
    figures |= {"skipped": len(outcomes.names["skipped"]), "failed_tests": sorted(failed)}
    figures["complete"] = code != pytest.ExitCode.INTERRUPTED
    return figures if cuda else figures | {"collected_only": outcomes.collected}
