"""bench.py all, gpu and tests: run a list of benchmarks, each in a subprocess, or the tests that need CUDA.

If a row fails or times out, its error is recorded and the next row starts. Files are written after each row.
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
from flatgpt.benchmarks.machine import machine_facts
from flatgpt.benchmarks.measure import Process, log, script, table
from flatgpt.data.dataset import open_dataset
from flatgpt.runtime.device import cpu_name, find_device
from flatgpt.runtime.files import write_json, write_output

SUITES = tomllib.loads((REPO_ROOT / "flatgpt/benchmarks/suites.toml").read_text(encoding="utf-8"))
DATASETS = ("shakespeare", "shakespeare_byte")  # that the rows use
GRACE_SECONDS = 20  # seconds from SIGINT to SIGKILL; pytest-xdist waits 10 s for a hanging test
# columns of the Markdown tables of machines and of updates, and the figures of other benchmarks that are printed
MACHINE_COLUMNS = ("cpu", "cores", "float32_gflop_per_s", "bfloat16_gflop_per_s", "read_gb_per_s", "cpu_flags", "date")
COLUMNS = ("ms", "tokens_per_s", "tflop_per_s", "mfu", "mfu_measured", "peak_mem_gb", "start_s")
FIGURES = ("tokens_per_s", "of_bandwidth", "mb_per_s", "during_to_outside", "times_as_fast", "to_first_token_s")
FIGURES += ("passed", "failed", "failed_tests", "identical", "error")


def run_suite(config: BenchConfig, command: str) -> None:
    """Run the rows of a list. After each row, write all figures to config.json and a table to the .md file beside it.

    Raises:
        UserError: a dataset, the GPU or the peer is missing. Checked before the first row.
    """
    on_cuda = config.what == "gpu" and not config.dry_run
    if on_cuda and not torch.cuda.is_available():
        raise UserError("bench.py gpu needs a CUDA GPU, and torch finds none; for CPUs: bench.py all, or gpu --dry_run")
    if config.peer:
        nanogpt.require_checkout(config)
    for name in DATASETS:
        open_dataset(Path(config.data_dir) / name)
    device, name = ("cuda", torch.cuda.get_device_name()) if on_cuda else ("cpu", cpu_name())
    report = {"command": command, "device": name, "torch": torch.__version__, "dry_run": config.dry_run}
    report |= {"machine": machine_facts(), "rows": {}}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM also stops the row
    for row in SUITES[config.what]:
        args = shlex.split(row["args"])
        limit = 3600 if config.dry_run else row.get("limit", 3600)
        args += shlex.split(SUITES["dry_run"][args[0]]) if config.dry_run else []
        args += ["--data_dir", config.data_dir, "--device", device]
        args += ["--peer", *config.peer] if "peer" in row and config.peer else []
        log(f"--- {row['label']}: python bench.py {shlex.join(args)}")
        start = time.perf_counter()
        report["rows"][row["label"]] = run_row(args, limit) | {"seconds": time.perf_counter() - start}
        write_json(report, config.json)
        text = markdown({name: report})
        write_output(text.encode(), str(Path(config.json).with_suffix(".md")), "json")
    print(text, end="")


def run_row(args: list[str], limit: float) -> dict:
    """Run one benchmark in a subprocess and return its figures, with `error` if it failed or timed out.

    After a timeout, the figures that it prints when interrupted are kept: bench.py tests prints the finished tests.

    Args:
        args: arguments of bench.py.
        limit: timeout in seconds.
    """
    deadline, offset = time.monotonic() + limit, 0
    with Process(script("bench.py", *args, "--json", "-"), process_group=0) as process:
        try:
            while True:
                timed_out, running = time.monotonic() > deadline, process.poll() is None
                text = os.pread(process.error_file.fileno(), 1 << 20, offset)  # does not move the file position
                offset += len(text)
                print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)
                if timed_out or not running:
                    break
                time.sleep(0.1)
        finally:  # after Ctrl-C as well
            terminate_group(process)
        last_line, code = process.last_error(), process.returncode
        try:
            figures = json.loads(process.stdout.read())
        except json.JSONDecodeError:
            figures = {}
    if running:
        return {"error": f"timed out after {limit} s: {last_line}"} | figures
    if code < 0:
        last_line = f"killed by signal {-code} after: {last_line}"  # signal 9: probably out of memory
    return {"error": last_line} if code else figures


def terminate_group(process: Process) -> None:
    """Stop a process and its children: SIGINT, then SIGKILL once it has exited or after GRACE_SECONDS seconds."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def merged(files: tuple[str, ...]) -> str:
    """Return the results of several machines as Markdown. A machine is named after its file.

    Raises:
        UserError: a file was not written by bench.py all or gpu, or two files have the same name.
    """
    reports: dict[str, dict] = {}
    for file in map(Path, files):
        if file.stem in reports:
            raise UserError(f"input: two files are named {file.stem}, and machines are named after their files")
        try:
            reports[file.stem] = json.loads(file.read_text(encoding="utf-8"))
            markdown({file.stem: reports[file.stem]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is not a result of bench.py all: {type(error).__name__} {error}") from None
    return markdown(reports)


def markdown(reports: dict[str, dict]) -> str:
    """Return reports by machine as Markdown tables. What a machine did not measure is empty.

    The tables are the machines, the updates with a row for each shape and machine, and for each other benchmark its
    figures with a column for each machine.
    """
    commands, machines, updates = [], [], []
    for name, report in reports.items():
        facts = {key: report.get("machine", {}).get(key) for key in MACHINE_COLUMNS}
        dry = "A dry run at toy size: its figures are not results. " * report["dry_run"]
        machines.append({"machine": name} | facts | {"torch": report["torch"]})
        commands.append(f"- {name}: {dry}`{report['command']}`")
    tables = [machines, updates]
    for label in dict.fromkeys(label for report in reports.values() for label in report["rows"]):
        rows = {name: report["rows"].get(label, {}) for name, report in reports.items()}
        if any("ms" in row for row in rows.values()):  # training
            for name, row in rows.items():
                if not row:  # not measured there
                    continue
                cells = {"shape": label, "machine": name} | {key: row.get(key) for key in COLUMNS}
                for peer, figures in row.get("peers", {}).items():
                    cells |= {f"{peer}, tokens_per_s": figures.get("tokens_per_s")}
                    cells |= {f"{peer}, times": row["ratios"][peer]["median"]}
                    cells |= {f"{peer}, memory": row["memory_ratios"].get(peer)}
                updates.append(cells | ({"error": row["error"]} if "error" in row else {}))
        else:
            keys = dict.fromkeys(key for row in rows.values() for key in row if key.endswith(FIGURES))
            tables.append([{label: key} | {name: row.get(key) for name, row in rows.items()} for key in keys])
    return "\n\n".join("\n".join(lines) for lines in (commands, *map(table, tables)) if lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# tests that need CUDA


class Outcomes:
    """A pytest plugin that records the names of the tests by outcome."""

    def pytest_sessionfinish(self, session) -> None:
        stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
        self.collected = session.testscollected
        outcomes = ("passed", "skipped", "failed", "error")
        self.names = {outcome: {report.nodeid for report in stats.get(outcome, ())} for outcome in outcomes}


def bench_tests(config: BenchConfig) -> dict:
    """Run the tests marked gpu. Without CUDA, only collect them, which imports every test file.

    If SIGINT stops the tests (a row's timeout, Ctrl-C), `complete` is false and only finished tests are counted.

    Raises:
        UserError: a package that the tests need is missing, or pytest did not run.
    """
    for package in ("pytest", "pytest-timeout", "hypothesis"):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"bench.py tests: {package} is not installed: pip install -r requirements-dev.txt")
    import pytest

    args = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", str(REPO_ROOT / "tests")]
    cuda, outcomes = find_device(config.device).type == "cuda", Outcomes()
    if not cuda:
        args.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        # most of the time is compilation, which runs on the CPU
        args += ["-n", "auto", "--maxprocesses", "8"]
    with contextlib.chdir(REPO_ROOT), contextlib.redirect_stdout(sys.stderr):  # hypothesis writes to the current folder
        code = pytest.main(args, plugins=[outcomes])
    if code > pytest.ExitCode.INTERRUPTED:
        raise UserError(f"pytest {shlex.join(args)} ran no test and exited with code {int(code)}")
    failed = outcomes.names["failed"] | outcomes.names["error"]
    figures = {"passed": len(outcomes.names["passed"] - failed), "failed": len(failed)}
    figures |= {"skipped": len(outcomes.names["skipped"]), "failed_tests": sorted(failed)}
    figures["complete"] = code != pytest.ExitCode.INTERRUPTED
    return figures if cuda else figures | {"collected_only": outcomes.collected}
