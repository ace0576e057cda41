"""bench.py train, save, loss and resume: time training updates, updates during a save, and whole runs of train.py."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import filecmp
import functools
import itertools
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from config import BenchConfig, TrainConfig, UserError
from flatgpt.benchmarks import nanogpt
from flatgpt.benchmarks.measure import Process, interleave, log, milliseconds, script, seconds_since_start, speedup
from flatgpt.cli.settings import recipe_text
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runs.history import follow
from flatgpt.runs.plots import plot_losses
from flatgpt.runtime.device import cpu_name, peak_flops, select_device
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from flatgpt.runtime.files import require_writable, write_output
from flatgpt.training.plan import matmul_flops
from flatgpt.training.reporting import summary
from flatgpt.training.resume import Progress, checkpoint_state
from flatgpt.training.setup import TrainingRun, build_run

PROFILED_UPDATES = 3
# evaluation lines of run_log.format_row and of nanoGPT's train.py; the groups are iter and validation loss
EVAL_LINE = r"iter +(\d+) .*\bval +([\d.]+)"
NANOGPT_EVAL_LINE = r"step (\d+): train loss [\d.]+, val loss ([\d.]+)"
TIMING_COLUMNS = ("step_ms", "tok_per_s", "mfu", "peak_mem_gb")  # of metrics.csv, ignored in comparisons


def bench_train(
    config: BenchConfig, train_step: Callable[[TrainingRun, int], Any], ranks: DistributedContext = SINGLE_PROCESS
) -> dict:
    """Time each update separately; with --peer, interleaved with nanoGPT's updates.

    Args:
        train_step: train.py's function.
    """
    require_writable(config.profile, "profile")
    if config.peer:
        nanogpt.require_same_shape(config, ranks.world)
        nanogpt.require_checkout(config)
    # rank 0 reserves standard output for figures
    with contextlib.redirect_stdout(sys.stderr if ranks.first else sys.stdout):
        run = build_run(config, ranks)
        print(summary(run))
    iters, device = itertools.count(), run.device_settings

    def time_updates(count: int = config.timed_updates) -> list[float]:
        return [milliseconds(device, lambda: train_step(run, next(iters))) for _ in range(count)]

    def start_peer(name: str) -> nanogpt.Peer:
        return nanogpt.Peer(run.config, settings[name])

    settings = nanogpt.peer_settings(run.config) if config.peer else {}
    facts, ratios = {}, {}
    with contextlib.ExitStack() as stack:
        # On CUDA, the peer starts now and compiles in parallel, because GPU machines have enough cores.
        concurrent = settings if device.device.type == "cuda" else ()
        started = {name: stack.enter_context(start_peer(name)) for name in concurrent}
        warmup = {"ours": time_updates(1)}
        start_s = seconds_since_start()
        warmup["ours"] += time_updates(config.warmup_updates - 1)
        timed = {"ours": [] if settings else time_updates()}
        for name in settings:  # one at a time: three models may not fit in memory
            with started.get(name) or start_peer(name) as peer:
                warmup[name] = peer.receive()
                runners = {"ours": time_updates, name: functools.partial(peer.time_updates, config.timed_updates)}
                rounds = interleave(runners, config.rounds)
            timed["ours"] += itertools.chain(*rounds["ours"])
            timed[name] = list(itertools.chain(*rounds[name]))
            ratios[name] = speedup(*([statistics.median(times) for times in results] for results in rounds.values()))
            facts[name] = peer.facts
    facts["ours"] = {"start_s": start_s, "peak_mem_gb": device.peak_memory_gb(), "machine": device.describe()}
    dtypes = {"ours": device.dtype} | {name: peer_device.dtype for name, peer_device in settings.items()}
    figures = {name: update_figures(run, warmup[name], timed[name], dtypes[name]) | facts[name] for name in timed}
    result = figures.pop("ours")
    if run.scaler.is_enabled():
        result["loss_scale"] = run.scaler.get_scale()
    if figures:
        memory_ratios = {name: result["peak_mem_gb"] / peer["peak_mem_gb"] for name, peer in figures.items()}
        result |= {"peers": figures, "ratios": ratios, "memory_ratios": memory_ratios}
    if config.profile:  # on all ranks, since an update needs all of them
        trace = config.profile if ranks.first else None
        result["top_ops"] = top_ops(lambda: train_step(run, next(iters)), device.device, trace)
    return result


def update_figures(run: TrainingRun, warmup: list[float], timed: list[float], dtype: torch.dtype) -> dict:
    """Return speed figures of training updates.

    Args:
        warmup: milliseconds of the warm-up updates; the first one includes compilation.
        timed: milliseconds of the timed updates, at least two.
        dtype: dtype of the matrix product that `mfu_measured` is relative to.
    """
    device, world = run.device_settings, run.ranks.world
    median, deciles = statistics.median(timed), statistics.quantiles(timed, n=10, method="inclusive")
    tokens_per_s = 1e3 * run.batches.per_update * run.config.context_length / median
    flops, peak = tokens_per_s * run.model.flops_per_token() / world, peak_flops(device.name)  # per device
    matmul = matmul_flops(device.device, dtype)
    return {
        "ms": median,
        "ms_p10": deciles[0],
        "ms_p90": deciles[-1],
        "first_ms": warmup[0],
        "warmup_ms": statistics.median(warmup[1:]) if warmup[1:] else None,
        "tokens_per_s": tokens_per_s,
        "tflop_per_s": world * flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mfu_measured": flops / matmul,
        "matmul_tflop_per_s": world * matmul / 1e12,
    }


def top_ops(work: Callable[[], object], device: torch.device, trace: str | None) -> list[dict]:
    """Profile updates and return the ten operations with the largest share of the device time.

    Operations are kernels on CUDA, and torch operators on other devices. Figures are per update.

    Args:
        work: runs one update.
        trace: file for the profiler's trace in Chrome's format; None: not written.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        for _ in range(PROFILED_UPDATES):
            work()
    if trace:
        profiler.export_chrome_trace(trace)
    kind, time = (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    times = {op: getattr(op, time) for op in profiler.key_averages() if op.device_type == kind}  # microseconds
    total = sum(times.values())
    n = PROFILED_UPDATES
    return [
        {"name": op.key, "calls": op.count / n, "self_ms": us / 1e3 / n, "share": us / total}
        for op, us in sorted(times.items(), key=lambda item: -item[1])[:10]
    ]


def bench_save(
    config: BenchConfig,
    train_step: Callable[[TrainingRun, int], Any],
    save: Callable[[TrainingRun, Progress, CheckpointWriter], None],
) -> dict:
    """Time updates with and without a concurrent save, interleaved, and the part of a save that blocks training.

    Args:
        train_step, save: train.py's functions.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(sys.stderr):
        run = build_run(dataclasses.replace(config, out_dir=folder))
        print(summary(run))
        writer, progress = CheckpointWriter(run.config, metadata={"config": {}}), Progress()
        iters, device = itertools.count(), run.device_settings

        def time_update() -> float:
            return milliseconds(device, lambda: train_step(run, next(iters)))

        for _ in range(config.warmup_updates):
            time_update()
        first_copy = milliseconds(device, lambda: writer.allocate_buffers(checkpoint_state(run, progress)))
        outside, during, copies, seconds = [], [], [], []
        for number in range(1, config.rounds + 1):
            outside += [time_update() for _ in range(config.timed_updates)]
            progress.row["iter"] = number
            copies.append(milliseconds(device, lambda: save(run, progress, writer)))
            start, writing = time.perf_counter(), True
            while writing:
                during.append(time_update())
                writing = not writer.idle()
            seconds.append(time.perf_counter() - start)
            writer.check()  # raises if the save failed
        size = sum(path.stat().st_size for path in follow(Path(folder) / "ckpt" / "last").iterdir())
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
# whole runs of train.py


def write_recipe(config: BenchConfig, folder: str) -> Path:
    """Write the settings of train.py to a recipe, and return its path."""
    settings = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
    recipe = Path(folder).resolve() / "recipe.toml"
    recipe.write_text(recipe_text(settings), encoding="utf-8")
    return recipe


def bench_loss(config: BenchConfig) -> dict:
    """Measure the time to a validation loss of config.target for each seed, interleaved with nanoGPT's train.py.

    Time is measured from the start of the process to the output of the first evaluation that reaches the target. It
    includes imports, compilation and evaluations, but not data preparation. On a CPU, nanoGPT's time is that of its
    whole recipe, regardless of the loss.

    Returns:
        `runs`, each with seed, seconds (inf: target not reached), iter and val_loss (of the evaluation that reached the
        target, else of the last one) and all evaluations; `seconds`, their median; the same for `peers`; `ratios` if
        both reached the target.
    """
    device, seeds = select_device(config.device, "float32"), itertools.count(1)  # train.py selects its own precision
    on_cuda = device.device.type == "cuda"
    require_writable(config.plot, "plot")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        recipe = write_recipe(config, folder)

        def train() -> dict:
            args = ("--config", recipe, "--seed", seed := next(seeds), "--out_dir", recipe.parent / f"seed_{seed}")
            return {"seed": seed} | train_until_loss(script("train.py", *args), EVAL_LINE, config.target)

        runners = {"ours": train}
        if config.peer:
            nanogpt.require_checkout(config)
            command = nanogpt.train_command(config, recipe.parent / "nanogpt")
            target = config.target if on_cuda else None
            runners["nanoGPT"] = lambda: train_until_loss(command, NANOGPT_EVAL_LINE, target, cwd=config.peer[1])
        results = interleave(runners, config.seeds)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in results.items()}
    medians = {name: {"runs": runs, "seconds": statistics.median(seconds[name])} for name, runs in results.items()}
    figures = {"target": config.target, **medians.pop("ours"), "machine": device.name if on_cuda else cpu_name()}
    if config.peer:
        figures["peers"] = medians
        if pairs := [pair for pair in zip(*seconds.values(), strict=True) if max(pair) < math.inf]:
            figures["ratios"] = {"nanoGPT": speedup(*zip(*pairs, strict=True))}
    if config.plot:
        ours = f"flatGPT, {Path(config.config).stem if config.config else config.dataset}"
        curves = {ours if name == "ours" else name: runs for name, runs in results.items()}
        write_output(plot_losses(curves, figures["machine"]), config.plot, "plot")
    return figures


def train_until_loss(command: list[str], pattern: str, target: float | None, **options) -> dict:
    """Run a training command until an evaluation reaches a loss of at most `target`; None: until it exits.

    Args:
        pattern: regular expression of an evaluation line, with groups for iter and loss.

    Returns:
        seconds (inf: target not reached), iter and val_loss of the last evaluation, and `evaluations`: seconds, iter
        and val_loss of each.

    Raises:
        UserError: the command failed. The message has its last line.
    """
    result = {"seconds": math.inf, "iter": None, "val_loss": None, "evaluations": []}
    with tempfile.TemporaryDirectory() as cache:
        # an empty compiler cache, so that no run reuses the compilation of an earlier one
        environment, start = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": cache}, time.perf_counter()
        with Process(command, environment, **options) as process:
            for line in process.stdout:
                if match := re.match(pattern, line):
                    seconds = time.perf_counter() - start
                    result |= {"iter": int(match[1]), "val_loss": float(match[2])}
                    result["evaluations"].append((seconds, result["iter"], result["val_loss"]))
                    if target is not None and result["val_loss"] <= target:
                        return result | {"seconds": seconds}
            process.require_success()
            return result | ({"seconds": time.perf_counter() - start} if target is None else {})


def bench_resume(config: BenchConfig) -> dict:
    """Train with train.py, stop after half of max_iters and resume. Compare with an uninterrupted run.

    The rows of metrics.csv, without timing columns, and the weights of the last checkpoint must be bitwise equal.

    Returns:
        the number of updates, `identical`, and the seconds of each of the three runs.

    Raises:
        UserError: a run failed, or the resumed run differs from the uninterrupted one.
    """
    max_iters, half, figures = config.max_iters, config.max_iters // 2, {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        recipe = write_recipe(config, folder)
        shared = ("--config", recipe, "--lr_decay_iters", max_iters, "--eval_interval", half, "--log_interval", 1)
        folders = [recipe.parent / name for name in ("resumed", "uninterrupted")]
        for run, args in (
            ("stopped", ("--out_dir", folders[0], "--max_iters", half)),
            ("resumed", ("--out_dir", folders[0], "--max_iters", max_iters, "--resume")),
            ("uninterrupted", ("--out_dir", folders[1], "--max_iters", max_iters)),
        ):
            start = time.perf_counter()
            with Process(script("train.py", *shared, *args)) as process:
                process.communicate()
                process.require_success()
            figures[f"{run}_s"] = time.perf_counter() - start
            log(f"{run:<13} {figures[f'{run}_s']:6.1f} s")
        if mismatch := first_difference(*folders):
            raise UserError(f"the resumed run differs from the uninterrupted one: {mismatch}")
    return {"updates": max_iters, "identical": True} | figures


def first_difference(run: Path, other: Path) -> str | None:
    """Return the first difference between the logs or final weights of two runs; None if they are equal."""
    logs = [csv.DictReader((folder / "metrics.csv").read_text().splitlines()) for folder in (run, other)]
    for a, b in itertools.zip_longest(*logs, fillvalue={}):
        for key in a | b:
            if a.get(key) != b.get(key) and key not in TIMING_COLUMNS:
                return f"metrics.csv has {key} = {a.get(key)} and {b.get(key)} at iter {a.get('iter', b.get('iter'))}"
    same = filecmp.cmp(*(follow(folder / "ckpt/last") / "model.safetensors" for folder in (run, other)), shallow=False)
    return None if same else "the weights of the last checkpoint"
