"""bench.py train, save, loss and resume: updates alone, beside nanoGPT's and during a save; whole runs of train.py."""

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
from flatgpt.benchmarks.measure import Process, in_turn, log, milliseconds, script, seconds_since_start, speedup
from flatgpt.cli.cli import recipe_text
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runs.run_log import peak_flops
from flatgpt.runtime.device import cpu_name, select_device
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from flatgpt.runtime.files import require_writable
from flatgpt.training.plan import matmul_flops
from flatgpt.training.reporting import summary
from flatgpt.training.resume import Progress, checkpoint_state
from flatgpt.training.setup import TrainingRun, build_run

PROFILED = 3  # updates
# lines of an evaluation, with groups for iter and loss: of run_log.format_row and of nanoGPT's train.py
OURS = r"iter +(\d+) .*\bval +([\d.]+)"
NANOGPT = r"step (\d+): train loss [\d.]+, val loss ([\d.]+)"
TIMES = ("step_ms", "tok_per_s", "mfu", "peak_mem_gb")  # columns of metrics.csv that differ between equal runs


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
        nanogpt.require_checkout(config)
    with contextlib.redirect_stdout(sys.stderr if ranks.first else sys.stdout):  # standard output is for figures
        run = build_run(config, ranks)
        print(summary(run))
    iters, device = itertools.count(), run.device_settings

    def time_updates(count: int = config.timed_updates) -> list[float]:
        return [milliseconds(device, lambda: train_step(run, next(iters))) for _ in range(count)]

    def start(name: str) -> nanogpt.Peer:
        return nanogpt.Peer(run.config, settings[name])

    settings = nanogpt.peer_settings(run.config) if config.peer else {}
    facts, ratios = {}, {}
    with contextlib.ExitStack() as stack:
        # On CUDA the peer compiles at the same time as this process: hosts of GPUs have enough cores.
        early = settings if device.device.type == "cuda" else ()
        started = {name: stack.enter_context(start(name)) for name in early}
        warmup = {"ours": time_updates(1)}
        start_s = seconds_since_start()
        warmup["ours"] += time_updates(config.warmup_updates - 1)
        timed = {"ours": [] if settings else time_updates()}
        for name in settings:  # one at a time: three models may not fit the memory
            with started.get(name) or start(name) as peer:
                warmup[name] = peer.answer()
                runners = {"ours": time_updates, name: functools.partial(peer.time_updates, config.timed_updates)}
                rounds = in_turn(runners, config.rounds)
            timed["ours"] += itertools.chain(*rounds["ours"])
            timed[name] = list(itertools.chain(*rounds[name]))
            ratios[name] = speedup(*([statistics.median(times) for times in each] for each in rounds.values()))
            facts[name] = peer.facts
    facts["ours"] = {"start_s": start_s, "peak_mem_gb": device.peak_memory_gb(), "machine": device.describe()}
    dtypes = {"ours": device.dtype} | {name: each.dtype for name, each in settings.items()}
    figures = {name: update_figures(run, warmup[name], timed[name], dtypes[name]) | facts[name] for name in timed}
    result = figures.pop("ours")
    if run.scaler.is_enabled():
        result["loss_scale"] = run.scaler.get_scale()
    if figures:
        memory_ratios = {name: result["peak_mem_gb"] / peer["peak_mem_gb"] for name, peer in figures.items()}
        result |= {"peers": figures, "ratios": ratios, "memory_ratios": memory_ratios}
    if config.profile:  # on all ranks, since they update together
        trace = config.profile if ranks.first else None
        result["top_ops"] = top_ops(lambda: train_step(run, next(iters)), device.device, trace)
    return result


def update_figures(run: TrainingRun, warmup: list[float], timed: list[float], dtype: torch.dtype) -> dict:
    """Return the figures of updates.

    Args:
        warmup: milliseconds of the updates that are not counted; the first of them compiles.
        timed: milliseconds of the updates that are counted, at least two.
        dtype: of the matrix product with which they are compared.
    """
    device, world = run.device_settings, run.ranks.world
    median, tenths = statistics.median(timed), statistics.quantiles(timed, n=10, method="inclusive")
    tokens_per_s = 1e3 * run.batches.per_update * run.config.context_length / median
    flops, peak = tokens_per_s * run.model.flops_per_token() / world, peak_flops(device.name)  # of one device
    matmul = matmul_flops(device.device, dtype)
    return {
        "ms": median,
        "ms_p10": tenths[0],
        "ms_p90": tenths[-1],
        "first_ms": warmup[0],
        "warmup_ms": statistics.median(warmup[1:]) if warmup[1:] else None,
        "tokens_per_s": tokens_per_s,
        "tflop_per_s": world * flops / 1e12,
        "mfu": flops / peak if peak else None,
        "mfu_measured": flops / matmul,
        "matmul_tflop_per_s": world * matmul / 1e12,
    }


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
    kind, time = (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    times = {op: getattr(op, time) for op in profiler.key_averages() if op.device_type == kind}  # microseconds
    total = sum(times.values())
    return [
        {"name": op.key, "calls": op.count / PROFILED, "self_ms": us / 1e3 / PROFILED, "share": us / total}
        for op, us in sorted(times.items(), key=lambda item: -item[1])[:10]
    ]


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
            began, writing = time.perf_counter(), True
            while writing:
                during.append(time_update())
                writing = not writer.idle()
            seconds.append(time.perf_counter() - began)
            writer.check()  # raises if the save failed
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
# whole runs of train.py


def write_recipe(config: BenchConfig, folder: str) -> Path:
    """Write the settings of train.py as a recipe, and return its path."""
    settings = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
    recipe = Path(folder).resolve() / "recipe.toml"
    recipe.write_text(recipe_text(settings), encoding="utf-8")
    return recipe


def bench_loss(config: BenchConfig) -> dict:
    """Measure the seconds to config.target for each seed, in turn with nanoGPT's train.py.

    The clock runs from the start of the process to the line of the first evaluation that reaches the target: imports,
    compilation and evaluations count. Preparing the data does not. On a CPU, nanoGPT's time is that of its whole
    recipe, whatever loss it reaches.

    Returns:
        `runs`, each with seed, seconds (inf: not reached), iter and val_loss (of the evaluation that reached the
        target, else of the last); `seconds`, their median; the same of `peers`; `ratios` where both have seconds.
    """
    device, seeds = select_device(config.device, "float32"), itertools.count(1)  # each run selects its own precision
    on_cuda = device.device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=".") as folder:
        recipe = write_recipe(config, folder)

        def train() -> dict:
            words = ("--config", recipe, "--seed", seed := next(seeds), "--out_dir", recipe.parent / f"seed_{seed}")
            return {"seed": seed} | until_loss(script("train.py", *words), OURS, config.target)

        runners = {"ours": train}
        if config.peer:
            nanogpt.require_checkout(config)
            command = nanogpt.train_command(config, recipe.parent / "nanogpt")
            target = config.target if on_cuda else None
            runners["nanoGPT"] = lambda: until_loss(command, NANOGPT, target, cwd=config.peer[1])
        results = in_turn(runners, config.seeds)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in results.items()}
    medians = {name: {"runs": runs, "seconds": statistics.median(seconds[name])} for name, runs in results.items()}
    figures = {"target": config.target, **medians.pop("ours"), "machine": device.name if on_cuda else cpu_name()}
    if config.peer:
        figures["peers"] = medians
        if pairs := [pair for pair in zip(*seconds.values(), strict=True) if max(pair) < math.inf]:
            figures["ratios"] = {"nanoGPT": speedup(*zip(*pairs, strict=True))}
    return figures


def until_loss(command: list[str], pattern: str, target: float | None, **options) -> dict:
    """Run a training command until an evaluation has a loss of at most `target`, then end it. None: run it to its end.

    Raises:
        UserError: it failed; with its last line.
    """
    found = {"seconds": math.inf, "iter": None, "val_loss": None}
    with tempfile.TemporaryDirectory() as cache:
        # an empty compiler cache: otherwise a run would profit from the compilation of the one before
        environment, began = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": cache}, time.perf_counter()
        with Process(command, environment, **options) as process:
            for line in process.stdout:
                if match := re.match(pattern, line):
                    found |= {"iter": int(match[1]), "val_loss": float(match[2])}
                    if target is not None and found["val_loss"] <= target:
                        return found | {"seconds": time.perf_counter() - began}
            process.require_success()
            return found | ({"seconds": time.perf_counter() - began} if target is None else {})


def bench_resume(config: BenchConfig) -> dict:
    """Train with train.py, stop after half of max_iters and resume; compare with an uninterrupted run.

    Losses in metrics.csv and the weights of the last checkpoint have to be equal bit for bit.

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
        for run, words in (
            ("stopped", ("--out_dir", folders[0], "--max_iters", half)),
            ("resumed", ("--out_dir", folders[0], "--max_iters", max_iters, "--resume")),
            ("uninterrupted", ("--out_dir", folders[1], "--max_iters", max_iters)),
        ):
            began = time.perf_counter()
            with Process(script("train.py", *shared, *words)) as process:
                process.communicate()
                process.require_success()
            figures[f"{run}_s"] = time.perf_counter() - began
            log(f"{run:<13} {figures[f'{run}_s']:6.1f} s")
        if found := difference(*folders):
            raise UserError(f"the resumed run differs from the uninterrupted one: {found}")
    return {"updates": max_iters, "identical": True} | figures


def difference(one: Path, other: Path) -> str | None:
    """Return the first difference between the logs or the last weights of two runs; None if there is none."""
    logs = [csv.DictReader((run / "metrics.csv").read_text().splitlines()) for run in (one, other)]
    for a, b in itertools.zip_longest(*logs, fillvalue={}):
        for key in a | b:
            if a.get(key) != b.get(key) and key not in TIMES:
                return f"metrics.csv has {key} = {a.get(key)} and {b.get(key)} at iter {a.get('iter', b.get('iter'))}"
    same = filecmp.cmp(*(run / "ckpt" / "last" / "model.safetensors" for run in (one, other)), shallow=False)
    return None if same else "the weights of the last checkpoint"
