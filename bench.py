"""Time what the other verbs run.

python bench.py train                                   # the update of the default recipe
python bench.py train --config shakespeare --dtype float32 --no-compile --json -
python bench.py train --config shakespeare_char_cpu --peer nanoGPT ../nanoGPT    # beside a checkout of it, in turn
python bench.py train --config gpt2_124m --grad_accum_steps 1 --profile          # what takes the time; trace.json
python bench.py loss --config shakespeare_char_cpu --target 1.9 --peer nanoGPT ../nanoGPT    # seconds to that loss
python bench.py save --config gpt2_124m --batch_size 1   # updates beside a save, and the wait for its copy
python bench.py data --input 'data/raw/wikipedia/*'      # text -> shards, beside plain encoding and datasets.map
python bench.py infer --config gpt2_124m                # tokens/s of text, beside transformers and llama.cpp
python bench.py eval --model_path out/wikitext103_22m --dataset wikitext103 --split test   # beside transformers
python bench.py all --json cpu.json --peer nanoGPT ../nanoGPT   # docs/speed.md's tables: cpu.json, cpu.md
python bench.py gpu --json gpu.json --peer nanoGPT ../nanoGPT   # for a GPU, in about 6 minutes (docs/testing.md)
python bench.py gpu --json dry.json --dry_run            # each row of that list at toy size, on the CPU
python bench.py resume --config shakespeare_char_cpu --max_iters 20   # a resumed run is bit for bit one not stopped
python bench.py tests                                    # the tests that need CUDA
"""

from config import BenchConfig, TrainConfig
from flatgpt.cli.cli import from_command_line, recipe_text, run_script
from flatgpt.interop.pretrained import initial_shape

if __name__ == "__main__":
    CONFIG = from_command_line(BenchConfig, __doc__, initial_shape)

import contextlib
import dataclasses
import itertools
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flatgpt.benchmarks import nanogpt, suites
from flatgpt.benchmarks.checks import bench_resume, bench_tests
from flatgpt.benchmarks.data import bench_data
from flatgpt.benchmarks.evaluation import bench_eval
from flatgpt.benchmarks.inference import bench_infer
from flatgpt.benchmarks.time_to_loss import bench_loss, loss_table
from flatgpt.benchmarks.training import ops_table, seconds_since_start, speedup, table, top_ops, update_figures
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runs.run_log import peak_flops
from flatgpt.runtime.device import find_device
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext, join_process_group
from flatgpt.runtime.files import require_writable, write_json
from flatgpt.training.plan import matmul_flops
from flatgpt.training.reporting import summary
from flatgpt.training.resume import Progress, checkpoint_state
from flatgpt.training.setup import TrainingRun, build_run
from train import save, train_step


def milliseconds(bench: TrainingRun, work: Callable[[], Any]) -> float:
    """How long some work takes, on the device too."""
    bench.device_settings.synchronize()
    began = time.perf_counter()
    work()
    bench.device_settings.synchronize()
    return 1e3 * (time.perf_counter() - began)


def bench_save(config: BenchConfig) -> dict:
    """Time updates with and without a save beside them, in turn, and what of a save the loop waits for."""
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(sys.stderr):
        bench = build_run(dataclasses.replace(config, out_dir=folder))
        print(summary(bench))
        saver, made = CheckpointWriter(bench.config, metadata={"config": {}}), itertools.count()
        progress = Progress()

        def one() -> float:
            return milliseconds(bench, partial(train_step, bench, next(made)))

        for _ in range(config.warmup_updates):
            one()
        first_copy = milliseconds(bench, lambda: saver.allocate_buffers(checkpoint_state(bench, progress)))
        outside, during, copies, seconds = [], [], [], []
        for number in range(1, config.rounds + 1):
            outside += [one() for _ in range(config.timed_updates)]
            progress.row["iter"], written = number, threading.Event()
            copies.append(milliseconds(bench, lambda: save(bench, progress, saver)))
            began = time.perf_counter()
            saver.submit_after_save(written.set)
            while not written.is_set():
                during.append(one())
                saver.check()  # a save that failed does not set it
            seconds.append(time.perf_counter() - began)
            saver.wait()
        size = sum(path.stat().st_size for path in (Path(folder) / "ckpt" / "last").iterdir())
        saver.close()
    return {
        "ms_outside": statistics.median(outside),
        "ms_during": statistics.median(during),
        "during_to_outside": statistics.median(during) / statistics.median(outside),
        "updates_during": len(during),
        "copy_ms": statistics.median(copies),
        "first_copy_ms": first_copy,
        "save_s": statistics.median(seconds),
        "checkpoint_mb": size / 1e6,
        "machine": bench.device_settings.describe(),
        "torch": torch.__version__,
    }


def bench_train(config: BenchConfig, ranks: DistributedContext = SINGLE_PROCESS) -> dict:
    """Time train.py's own update function, each update on its own, and another project's beside it, in turn."""
    require_writable(config.profile, "profile")
    if config.peer:
        nanogpt.require_same(config, ranks.world)
        nanogpt.folder(config, "model.py")
    with contextlib.redirect_stdout(sys.stderr if ranks.first else sys.stdout):  # standard output is for figures
        bench = build_run(config, ranks)
        print(summary(bench))
    made, place = itertools.count(), bench.device_settings

    def ours(updates: int) -> list[float]:
        return [milliseconds(bench, partial(train_step, bench, next(made))) for _ in range(updates)]

    others = nanogpt.ways(bench.config) if config.peer else {}
    with contextlib.ExitStack() as stack:

        def begin(name: str) -> nanogpt.Peer:
            other = stack.enter_context(nanogpt.Peer(name, bench.config, others[name]))
            other.ask(config.warmup_updates)
            return other

        # on CUDA its compiler runs beside ours: hosts of GPUs have cores
        early = {name: begin(name) for name in others if place.device.type == "cuda"}
        warm = {"ours": ours(1)}
        start_s = seconds_since_start()
        warm["ours"] += ours(config.warmup_updates - 1)
        timed = {"ours": [] if others else ours(config.timed_updates)}
        facts, ratios = {}, {}
        for name in others:  # one at a time: three models of a size may not fit the memory
            other, pairs = early.get(name) or begin(name), []
            warm[name], timed[name] = other.answer(), []
            for number in range(1, config.rounds + 1):
                times = ours(config.timed_updates), other.run(config.timed_updates)
                timed["ours"] += times[0]
                timed[name] += times[1]
                pairs.append(tuple(map(statistics.median, times)))
                mine, its = pairs[-1]
                say(f"round {number} ours {mine:,.1f} ms, {name} {its:,.1f} ms: {its / mine:.2f} times as fast")
            ratios[name], facts[name] = speedup(*map(list, zip(*pairs, strict=True))), other.facts
            other.close()
    facts["ours"] = {"start_s": start_s, "peak_mem_gb": place.peak_memory_gb(), "machine": place.describe()}
    tokens, peak = bench.batches.per_update * bench.config.context_length, peak_flops(place.name)
    dtypes = {name: others[name].dtype if name in others else place.dtype for name in timed}
    products = {dtype: ranks.world * matmul_flops(place.device, dtype) for dtype in set(dtypes.values())}
    per_token, peak = bench.model.flops_per_token(), peak and ranks.world * peak
    found = {
        name: update_figures(warm[name], times, tokens, per_token, peak, products[dtypes[name]]) | facts[name]
        for name, times in timed.items()
    }
    answer = found.pop("ours") | {"torch": torch.__version__}
    if bench.scaler.is_enabled():
        answer["loss_scale"] = bench.scaler.get_scale()
    if found:
        answer |= {"peers": found, "ratios": ratios}
        answer["memory_ratios"] = {name: answer["peak_mem_gb"] / found[name]["peak_mem_gb"] for name in found}
    if config.profile:  # all ranks, as they update together
        trace = config.profile if ranks.first else None
        answer["top_ops"] = top_ops(lambda: train_step(bench, next(made)), place.device, trace)
    return answer


def say(line: str) -> None:
    """Progress; standard output is for figures."""
    print(line, file=sys.stderr, flush=True)


def main(config: BenchConfig) -> None:
    """Run one benchmark and print its figures."""
    require_writable(config.json, "json")
    alone = {"data": partial(bench_data, say=say), "save": bench_save, "infer": partial(bench_infer, say=say)}
    alone["eval"] = partial(bench_eval, say=say)
    recipe = recipe_text(TrainConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}))
    alone["loss"] = partial(bench_loss, recipe=recipe, say=say)
    alone |= {"resume": partial(bench_resume, recipe=recipe, say=say), "tests": bench_tests}
    command = f"bench.py {shlex.join(sys.argv[1:])}"
    if config.what in suites.SUITES:
        suites.bench_suite(config, f"python {command}", say)
        return
    if config.what in alone:
        show({"command": f"python {command}"} | alone[config.what](config), config)
        return
    with join_process_group(config, find_device) as ranks:
        figures = bench_train(config, ranks)
        if ranks.first:
            show({"command": f"{ranks.launcher} {command}"} | figures, config)


def show(figures: dict, config: BenchConfig) -> None:
    """Print the figures, write them where --json says, or both."""
    if config.json != "-":
        if config.what == "train":
            print(table(figures))
        elif config.what == "loss":
            print(loss_table(figures))
        else:
            width = max(map(len, figures))
            for key, value in figures.items():
                if value is not None:
                    print(f"{key:<{width}} {value:,.2f}" if isinstance(value, float) else f"{key:<{width}} {value}")
        if "top_ops" in figures:
            print("\n" + ops_table(figures["top_ops"]))
    if config.json:
        write_json(figures, config.json)


if __name__ == "__main__":
    run_script(main, CONFIG, every_rank=True)
