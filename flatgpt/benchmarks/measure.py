"""What the benchmarks share: measuring in turn, other processes, and figures as text."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from config import UserError
from flatgpt import REPO_ROOT

if TYPE_CHECKING:
    from flatgpt.runtime.device import DeviceSettings  # imports torch, which bench.py data does without

T = TypeVar("T")
USER_ENVIRONMENT = dict(os.environ)  # for other processes: find_device changes this process's own


def log(line: str) -> None:
    """Print a line of progress to standard error; standard output is for figures."""
    print(line, file=sys.stderr, flush=True)


def milliseconds(device: DeviceSettings, work: Callable[[], Any]) -> float:
    """Return the time of one call, including the work that it leaves to the device."""
    device.synchronize()
    began = time.perf_counter()
    work()
    device.synchronize()
    return 1e3 * (time.perf_counter() - began)


def seconds_since_start() -> float | None:
    """Return the age of this process; None where the system does not tell (not Linux)."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return None
    ticks = int(stat.rpartition(")")[2].split()[19])  # field 22 of proc(5): the time of the start, since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def in_turn(runners: dict[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call all runners once a round, so that a machine that becomes slower does so for all of them.

    Returns:
        the results of each runner, by round.
    """
    results: dict[str, list[T]] = {name: [] for name in runners}
    for number in range(1, rounds + 1):
        for name, runner in runners.items():
            began = time.perf_counter()
            results[name].append(runner())
            log(f"round {number} of {rounds}, {name}: {time.perf_counter() - began:,.1f} s")
    return results


def speedup(ours: list[float], theirs: list[float]) -> dict:
    """Return theirs / ours of each pair of times, which were measured in turn, and the median of these ratios."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "rounds": ratios}


# ---------------------------------------------------------------------------------------------------------------------
# other processes


def script(name: str, *words: Any) -> list[str]:
    """Return the command that starts a script of this repository."""
    return [sys.executable, str(REPO_ROOT / name), *map(str, words)]


class Process(subprocess.Popen):
    """A process with the user's environment, which is killed at the end of the `with` block.

    Its standard output is a pipe. Its standard error is the temporary file `error_file`.

    Args:
        environment: variables to add.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, **options):
        self.error_file = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by __exit__
        streams = {"stdout": subprocess.PIPE, "stderr": self.error_file, "text": True, "errors": "replace"}
        super().__init__(command, env=USER_ENVIRONMENT | (environment or {}), **streams, **options)

    def last_error(self) -> str:
        """Return the last line of standard error, else the exit code."""
        self.error_file.seek(0)
        lines = self.error_file.read().strip().splitlines() or [f"exit code {self.returncode}"]
        return lines[-1].removeprefix("error: ")

    def require_success(self) -> None:
        """Wait for the end of the process. Raise UserError if it failed."""
        if self.wait():
            raise UserError(f"{shlex.join(self.args[1:])} failed: {self.last_error()}")

    def __exit__(self, *error) -> None:
        self.kill()
        super().__exit__(*error)
        self.error_file.close()


# ---------------------------------------------------------------------------------------------------------------------
# figures as text


def format_value(value: Any) -> str:
    """Return a figure as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else "" if value is None else str(value)


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table with a column for each key."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, ["---"] * len(heads), *([format_value(row.get(head)) for head in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells if row]


def figure_lines(found: dict) -> list[str]:
    """Return figures as a table with a column for each peer, and texts as lines below it."""
    columns, rows = {"ours": found, **found.get("peers", {})}, []
    for key, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for n in range(len(value)):
                rows.append(
                    {"": f"{key} {n + 1}"} | {name: each[key][n] for name, each in columns.items() if key in each}
                )
        elif isinstance(value, dict) and key != "peers":  # by peer
            rows.append({"": key, **value})
        elif isinstance(value, bool | int | float | list):
            rows.append({"": key} | {name: each.get(key) for name, each in columns.items()})
    texts = [(name, key, text) for name, figures in columns.items() for key, text in figures.items()]
    return table(rows) + [f"{name}, {key}: {text}" for name, key, text in texts if isinstance(text, str)]
