"""Shared parts of the benchmarks: interleaved timing, subprocesses, and formatting."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from config import UserError
from flatgpt import REPO_ROOT

if TYPE_CHECKING:
    from flatgpt.runtime.device import DeviceSettings  # imports torch, which bench.py data does not need

T = TypeVar("T")
USER_ENVIRONMENT = dict(os.environ)  # for subprocesses; find_device changes os.environ


def log(line: str) -> None:
    """Print a progress message to standard error. Standard output is reserved for figures."""
    print(line, file=sys.stderr, flush=True)


def milliseconds(device: DeviceSettings, work: Callable[[], Any]) -> float:
    """Return the duration of one call in milliseconds, including the device work that it launches."""
    device.synchronize()
    start = time.perf_counter()
    work()
    device.synchronize()
    return 1e3 * (time.perf_counter() - start)


def seconds_since_start() -> float | None:
    """Return the seconds since this process started; None on systems other than Linux."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return None
    ticks = int(stat.rpartition(")")[2].split()[19])  # starttime in proc(5), since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def interleave(runners: dict[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call every runner once per round, so that a change in machine speed affects all of them.

    Returns:
        for each runner, its result of each round.
    """
    results: dict[str, list[T]] = {name: [] for name in runners}
    for number in range(1, rounds + 1):
        for name, runner in runners.items():
            start = time.perf_counter()
            results[name].append(runner())
            log(f"round {number} of {rounds}, {name}: {time.perf_counter() - start:,.1f} s")
    return results


def speedup(ours: list[float], theirs: list[float]) -> dict:
    """Return the ratio theirs / ours for each pair of times, and the median of these ratios."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "rounds": ratios}


# ---------------------------------------------------------------------------------------------------------------------
# subprocesses


def script(name: str, *args: Any) -> list[str]:
    """Return the command that runs a script of this repository."""
    return [sys.executable, str(REPO_ROOT / name), *map(str, args)]


class Process(subprocess.Popen):
    """A subprocess with the user's environment, killed at the end of the `with` block.

    Its standard output is a pipe, and its standard error the temporary file `error_file`.

    Args:
        environment: additional variables.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, **options):
        self.error_file = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by __exit__
        streams = {"stdout": subprocess.PIPE, "stderr": self.error_file, "text": True, "errors": "replace"}
        super().__init__(command, env=USER_ENVIRONMENT | (environment or {}), **streams, **options)

    def last_error(self) -> str:
        """Return the last line of standard error, or the exit code if it is empty."""
        self.error_file.seek(0)
        lines = self.error_file.read().strip().splitlines() or [f"exit code {self.returncode}"]
        return lines[-1].removeprefix("error: ")

    def require_success(self) -> None:
        """Wait for the process to exit. Raise UserError if it failed."""
        if self.wait():
            raise UserError(f"{shlex.join(self.args[1:])} failed: {self.last_error()}")

    def __exit__(self, *error) -> None:
        self.kill()
        super().__exit__(*error)
        self.error_file.close()


class OwnProcess:
    """Calls a function in another process, where its threads and memory do not slow down other measurements.

    Args:
        make: called there once with `args`. It returns the function, or None.
    """

    def __init__(self, make: Callable[..., Callable | None], *args: Any):
        self._executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.available: bool = self._executor.submit(_make, make, args).result()

    def __call__(self, *args: Any) -> Any:
        return self._executor.submit(_call, args).result()

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()


def _make(make: Callable, args: tuple) -> bool:
    global _function
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _function = make(*args)
    return _function is not None


def _call(args: tuple) -> Any:
    return _function(*args)


def _exit_with_parent() -> None:
    """Exit when the parent process ends. An executor's process would stay if the parent is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# formatting


def format_value(value: Any) -> str:
    """Format a figure as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else "" if value is None else str(value)


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table with one column per key that has a value; no lines without rows."""
    headers = list(dict.fromkeys(key for row in rows for key in row if any(row.get(key) is not None for row in rows)))
    cells = [headers, ["---"] * len(headers), *([format_value(row.get(header)) for header in headers] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells if row]


def figure_lines(figures: dict) -> list[str]:
    """Return the lines of a table with one column per peer, and then the figures that are strings."""
    columns, rows = {"ours": figures, **figures.get("peers", {})}, []
    for key, value in figures.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for n in range(len(value)):  # lists, such as all evaluations of a run, are for --json
                entries = {name: column[key][n].items() for name, column in columns.items() if key in column}
                short = {name: {k: v for k, v in e if not isinstance(v, list)} for name, e in entries.items()}
                rows.append({"": f"{key} {n + 1}"} | short)
        elif isinstance(value, dict) and key != "peers":  # by peer
            rows.append({"": key, **value})
        elif isinstance(value, bool | int | float | list):
            rows.append({"": key} | {name: column.get(key) for name, column in columns.items()})
    texts = [(name, key, text) for name, column in columns.items() for key, text in column.items()]
    return table(rows) + [f"{name}, {key}: {text}" for name, key, text in texts if isinstance(text, str)]
