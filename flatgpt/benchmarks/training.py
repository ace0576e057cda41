"""What the milliseconds of updates come to: figures, a table of contenders, and which operations take the time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PROFILED = 3  # updates
ROWS = {  # of the table: what it says, and how
    "ms": ("ms per update", "{:,.2f}"),
    "ms_p10": ("  10th percentile", "{:,.2f}"),
    "ms_p90": ("  90th percentile", "{:,.2f}"),
    "first_ms": ("first update, ms", "{:,.0f}"),
    "warmup_ms": ("rest of the warm-up, ms", "{:,.2f}"),
    "start_s": ("start to first update, s", "{:,.1f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "tflop_per_s": ("TFLOP/s", "{:,.3f}"),
    "mfu": ("MFU, of the data sheet", "{:.1%}"),
    "mfu_measured": ("MFU, of a matrix product", "{:.1%}"),
    "matmul_tflop_per_s": ("matrix product, TFLOP/s", "{:,.3f}"),
    "peak_mem_gb": ("peak memory, GB", "{:,.2f}"),
}


def seconds_since_start() -> float | None:
    """How long ago this process was started: None where the system does not say (not Linux)."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return None
    ticks = int(stat.rpartition(")")[2].split()[19])  # field 22 of proc(5), since the machine was started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def update_figures(
    warm: list[float], timed: list[float], tokens: int, flops_per_token: int, peak: float | None, matmul: float
) -> dict:
    """Figures of updates.

    Args:
        warm: milliseconds of those that do not count, the first of them compiles.
        timed: milliseconds of those that count, two or more.
        tokens: of an update.
        peak: FLOP/s that the data sheet promises, of all devices together; None: not known.
        matmul: FLOP/s of a matrix product here, of all devices together.
    """
    median, tenths = statistics.median(timed), statistics.quantiles(timed, n=10, method="inclusive")
    flops = 1e3 * tokens / median * flops_per_token
    return {
        "ms": median,
        "ms_p10": tenths[0],
        "ms_p90": tenths[-1],
        "first_ms": warm[0],
        "warmup_ms": statistics.median(warm[1:]) if warm[1:] else None,
        "tokens_per_s": 1e3 * tokens / median,
        "tflop_per_s": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mfu_measured": flops / matmul,
        "matmul_tflop_per_s": matmul / 1e12,
    }


def speedup(ours: list[float], theirs: list[float]) -> dict:
    """Pairs of times for the same work, measured in turn: theirs / ours of each pair, and the median of those."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "rounds": ratios}


def table(found: dict) -> str:
    """What `bench.py train` found as text: a column for each contender, ours first."""
    columns = {"ours": found, **found.get("peers", {})}
    rows = [["", *columns]]
    for key, (label, form) in ROWS.items():
        if found[key] is not None:
            cells = [column[key] for column in columns.values()]
            rows.append([label, *("" if cell is None else form.format(cell) for cell in cells)])
    for key, label in (("ratios", "times as fast"), ("memory_ratios", "ours / its memory")):
        if key in found:
            ratios = [ratio["median"] if key == "ratios" else ratio for ratio in found[key].values()]
            rows.append([label, "", *(f"{ratio:.2f}" for ratio in ratios)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:<{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    lines += [f"{name}: {column['machine']}" for name, column in columns.items()]
    return "\n".join([*lines, f"torch {found['torch']}"])


def top_ops(work: Callable[[], object], device: torch.device, trace: str | None) -> list[dict]:
    """The ten operations that take most of the device's time, per update: kernels on CUDA, torch's operators elsewhere.

    Args:
        work: one update; called PROFILED times.
        trace: file for all that the profiler noted, in Chrome's format; None: not written.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        for _ in range(PROFILED):
            work()
    if trace:
        profiler.export_chrome_trace(trace)
    where = DeviceType.CUDA if cuda else DeviceType.CPU
    times = [
        (op.key, op.count, op.self_device_time_total if cuda else op.self_cpu_time_total)  # microseconds
        for op in profiler.key_averages()
        if op.device_type == where
    ]
    total = sum(time for _, _, time in times)
    return [
        {"name": name, "calls": calls / PROFILED, "self_ms": time / 1e3 / PROFILED, "share": time / total}
        for name, calls, time in sorted(times, key=lambda op: -op[2])[:10]
    ]


def ops_table(ops: list[dict]) -> str:
    """top_ops as text."""
    lines = [f"{'ten most expensive operations, per update':<60} {'calls':>8} {'self ms':>10} {'share':>7}"]
    lines += [f"{op['name'][:60]:<60} {op['calls']:>8,.0f} {op['self_ms']:>10,.2f} {op['share']:>7.1%}" for op in ops]
    return "\n".join(lines)
