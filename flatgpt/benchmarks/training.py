"""bench.py train and save: the time of training updates, alone, beside nanoGPT's, and while a checkpoint is written."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from config import BenchConfig
from flatgpt.benchmarks import nanogpt
from flatgpt.benchmarks.measure import aligned, in_turn, milliseconds, seconds_since_start, speedup
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runs.run_log import peak_flops
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from flatgpt.runtime.files import require_writable
from flatgpt.training.plan import matmul_flops
from flatgpt.training.reporting import summary
from flatgpt.training.resume import Progress, checkpoint_state
from flatgpt.training.setup import TrainingRun, build_run

PROFILED = 3  # updates
FIGURES = {  # of an update: label and format
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


def bench_train(
    config: BenchConfig, train_step: Callable[[TrainingRun, int], Any], ranks: DistributedContext = SINGLE_PROCESS
) -> dict:
    """Time each update by itself; with --peer, in turn with those of nanoGPT.

    Args:
        train_step: train.py's.
    """
    require_writable(config.profile, "profile")
    if config.peer:
        nanogpt.require_same_shape(config, ranks.world)
        nanogpt.checkout(config, "model.py")
    with contextlib.redirect_stdout(sys.stderr if ranks.first else sys.stdout):  # standard output is for figures
        run = build_run(config, ranks)
        print(summary(run))
    iters, device = itertools.count(), run.device_settings

    def time_updates(count: int) -> list[float]:
        return [milliseconds(device, lambda: train_step(run, next(iters))) for _ in range(count)]

    settings = nanogpt.peer_settings(run.config) if config.peer else {}
    with contextlib.ExitStack() as stack:

        def start(name: str) -> nanogpt.Peer:
            peer = stack.enter_context(nanogpt.Peer(name, run.config, settings[name]))
            peer.request(config.warmup_updates)
            return peer

        # On CUDA the peer compiles at the same time as this process: hosts of GPUs have enough cores.
        started = {name: start(name) for name in settings if device.device.type == "cuda"}
        warmup = {"ours": time_updates(1)}
        start_s = seconds_since_start()
        warmup["ours"] += time_updates(config.warmup_updates - 1)
        timed = {"ours": [] if settings else time_updates(config.timed_updates)}
        facts, ratios = {}, {}
        for name in settings:  # one at a time: three models may not fit the memory
            peer = started.get(name) or start(name)
            warmup[name] = peer.answer()
            runners = {"ours": lambda _: time_updates(config.timed_updates)}
            runners[name] = lambda _, peer=peer: peer.time_updates(config.timed_updates)
            rounds = in_turn(runners, config.rounds, _progress)
            timed["ours"] += itertools.chain(*rounds["ours"])
            timed[name] = list(itertools.chain(*rounds[name]))
            ratios[name] = speedup(*(list(map(statistics.median, rounds[each])) for each in ("ours", name)))
            facts[name] = peer.facts
            peer.close()
    facts["ours"] = {"start_s": start_s, "peak_mem_gb": device.peak_memory_gb(), "machine": device.describe()}
    tokens, peak = run.batches.per_update * run.config.context_length, peak_flops(device.name)
    dtypes = {"ours": device.dtype} | {name: each.dtype for name, each in settings.items()}
    matmuls = {dtype: ranks.world * matmul_flops(device.device, dtype) for dtype in set(dtypes.values())}
    flops_per_token, peak = run.model.flops_per_token(), peak and ranks.world * peak
    figures = {
        name: update_figures(warmup[name], times, tokens, flops_per_token, peak, matmuls[dtypes[name]]) | facts[name]
        for name, times in timed.items()
    }
    result = figures.pop("ours")
    if run.scaler.is_enabled():
        result["loss_scale"] = run.scaler.get_scale()
    if figures:
        result |= {"peers": figures, "ratios": ratios}
        result["memory_ratios"] = {name: result["peak_mem_gb"] / figures[name]["peak_mem_gb"] for name in figures}
    if config.profile:  # on all ranks, since they update together
        trace = config.profile if ranks.first else None
        result["top_ops"] = top_ops(lambda: train_step(run, next(iters)), device.device, trace)
    return result


def _progress(name: str, latest: dict[str, list[float]]) -> str:
    ms = {each: statistics.median(times) for each, times in latest.items()}
    return f"{ms[name]:,.1f} ms" + (f": {ms[name] / ms['ours']:.2f} times as fast" if name != "ours" else "")


def bench_save(
    config: BenchConfig,
    train_step: Callable[[TrainingRun, int], Any],
    save: Callable[[TrainingRun, Progress, CheckpointWriter], None],
) -> dict:
    """Time updates with and without a save beside them, in turn, and what of a save the loop waits for.

    Args:
        train_step, save: train.py's.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(sys.stderr):
        run = build_run(dataclasses.replace(config, out_dir=folder))
        print(summary(run))
        writer, iters, device = (
            CheckpointWriter(run.config, metadata={"config": {}}),
            itertools.count(),
            run.device_settings,
        )
        progress = Progress()

        def time_update() -> float:
            return milliseconds(device, lambda: train_step(run, next(iters)))

        for _ in range(config.warmup_updates):
            time_update()
        first_copy = milliseconds(device, lambda: writer.allocate_buffers(checkpoint_state(run, progress)))
        outside, during, copies, seconds = [], [], [], []
        for number in range(1, config.rounds + 1):
            outside += [time_update() for _ in range(config.timed_updates)]
            progress.row["iter"], written = number, threading.Event()
            copies.append(milliseconds(device, lambda: save(run, progress, writer)))
            began = time.perf_counter()
            writer.submit_after_save(written.set)
            while not written.is_set():
                during.append(time_update())
                writer.check()  # raises if the save failed, which would leave `written` unset
            seconds.append(time.perf_counter() - began)
            writer.wait()
        size = sum(path.stat().st_size for path in (Path(folder) / "ckpt" / "last").iterdir())
        writer.close()
    return {
        "ms_outside": statistics.median(outside),
        "ms_during": statistics.median(during),
        "during_to_outside": statistics.median(during) / statistics.median(outside),
        "updates_during": len(during),
        "copy_ms": statistics.median(copies),
        "first_copy_ms": first_copy,
        "save_s": statistics.median(seconds),
        "checkpoint_mb": size / 1e6,
        "machine": device.describe(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# figures


def update_figures(
    warmup: list[float], timed: list[float], tokens: int, flops_per_token: int, peak: float | None, matmul: float
) -> dict:
    """Return the figures of updates.

    Args:
        warmup: milliseconds of the updates that are not counted; the first of them compiles.
        timed: milliseconds of the updates that are counted, at least two.
        tokens: per update.
        peak: FLOP/s of all devices together by their data sheet; None: unknown.
        matmul: measured FLOP/s of a matrix product on all devices together.
    """
    median, tenths = statistics.median(timed), statistics.quantiles(timed, n=10, method="inclusive")
    flops = 1e3 * tokens / median * flops_per_token
    return {
        "ms": median,
        "ms_p10": tenths[0],
        "ms_p90": tenths[-1],
        "first_ms": warmup[0],
        "warmup_ms": statistics.median(warmup[1:]) if warmup[1:] else None,
        "tokens_per_s": 1e3 * tokens / median,
        "tflop_per_s": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mfu_measured": flops / matmul,
        "matmul_tflop_per_s": matmul / 1e12,
    }


def cell(figures: dict, key: str) -> str:
    """Return a figure of an update as text; empty where it is unknown."""
    return "" if figures[key] is None else FIGURES[key][1].format(figures[key])


def train_table(found: dict) -> list[str]:
    """Return the lines of a table of bench_train's figures, with a column for each peer."""
    columns = {"ours": found, **found.get("peers", {})}
    rows = [["", *columns]]
    rows += [
        [label, *(cell(column, key) for column in columns.values())]
        for key, (label, _) in FIGURES.items()
        if found[key] is not None
    ]
    if "ratios" in found:
        rows.append(["times as fast", "", *(f"{ratio['median']:.2f}" for ratio in found["ratios"].values())])
        rows.append(["ours / its memory", "", *(f"{ratio:.2f}" for ratio in found["memory_ratios"].values())])
    lines = [*aligned(rows), *(f"{name}: {column['machine']}" for name, column in columns.items())]
    lines.append(f"torch {found['torch']}")
    if ops := found.get("top_ops"):
        heads = ["ten most expensive operations, per update", "calls", "self ms", "share"]
        cells = [[op["name"][:60], f"{op['calls']:,.0f}", f"{op['self_ms']:,.2f}", f"{op['share']:.1%}"] for op in ops]
        lines += ["", *aligned([heads, *cells])]
    return lines


def top_ops(work: Callable[[], object], device: torch.device, trace: str | None) -> list[dict]:
    """Return the ten operations with the largest share of the device's time, per update.

    These are kernels on CUDA and torch's operators elsewhere.

    Args:
        work: one update; called PROFILED times.
        trace: file for the profiler's trace in Chrome's format; None: not written.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        for _ in range(PROFILED):
            work()
    if trace:
        profiler.export_chrome_trace(trace)
    device_type = DeviceType.CUDA if cuda else DeviceType.CPU
    times = [
        (op.key, op.count, op.self_device_time_total if cuda else op.self_cpu_time_total)  # microseconds
        for op in profiler.key_averages()
        if op.device_type == device_type
    ]
    total = sum(time for _, _, time in times)
    return [
        {"name": name, "calls": calls / PROFILED, "self_ms": time / 1e3 / PROFILED, "share": time / total}
        for name, calls, time in sorted(times, key=lambda op: -op[2])[:10]
    ]
