"""What the benchmarks share: measuring in turn, starting the scripts, and printing figures."""

from __future__ import annotations

import dataclasses
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from config import BenchConfig, TrainConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.cli.cli import recipe_text

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


def in_turn(
    runners: dict[str, Callable[[int], T]], rounds: int, describe: Callable[[str, dict[str, T]], str], label="round"
) -> dict[str, list[T]]:
    """Call all runners once a round, so that a machine that becomes slower does so for all of them.

    Args:
        runners: functions of the round's number, from 1.
        describe: of a runner's name and the latest result of each runner: the text of its line of progress.

    Returns:
        the results of each runner, by round.
    """
    results: dict[str, list[T]] = {name: [] for name in runners}
    for number in range(1, rounds + 1):
        for name, runner in runners.items():
            results[name].append(runner(number))
            latest = {each: found[-1] for each, found in results.items() if found}
            log(f"{label} {number} {name:<{max(map(len, runners))}} {describe(name, latest)}")
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


def write_recipe(config: BenchConfig, folder: Path) -> Path:
    """Write the settings of train.py as a recipe, and return its path."""
    settings = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
    recipe = folder.resolve() / "recipe.toml"
    recipe.write_text(recipe_text(settings), encoding="utf-8")
    return recipe


def failure(command: str | list, output: str, code: int) -> UserError:
    """Return the error for a command that failed, with the last line of its output."""
    name = command if isinstance(command, str) else shlex.join(map(str, command[1:]))
    lines = output.strip().splitlines() or [f"exit code {code}"]
    return UserError(f"{name} failed: {lines[-1].removeprefix('error: ')}")


# ---------------------------------------------------------------------------------------------------------------------
# figures as text


def format_value(value: Any) -> str:
    """Return a figure as text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def aligned(rows: list[list[str]]) -> list[str]:
    """Return the rows of a table as lines: the first column aligned to the left, the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([f"{row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))])
        for row in rows
    ]
