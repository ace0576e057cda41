"""Time what the other verbs run.

python bench.py train                                   # the update of the default recipe
python bench.py train --config shakespeare --dtype float32 --no-compile --json -
python bench.py save --config gpt2_124m --batch_size 1   # updates beside a save, and the wait for its copy
python bench.py data --input 'data/raw/wikipedia/*'      # text -> shards, beside plain encoding and datasets.map
python bench.py infer --config gpt2_124m                # tokens/s of text, beside transformers and llama.cpp
python bench.py eval --model_path out/wikitext103_22m --dataset wikitext103 --split test   # beside transformers
"""

from cli import from_command_line, run_verb
from config import BenchConfig

if __name__ == "__main__":
    CONFIG = from_command_line(BenchConfig, __doc__)

import contextlib
import dataclasses
import itertools
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

from latency import bench_infer
from outputs import write_json
from ranks import ALONE, Ranks, join
from run import Run, describe, setup
from runlog import peak_flops, summary
from runtime import find_device
from saver import Saver
from strided import bench_eval
from throughput import bench_data
from train import parts, save, update


def milliseconds(bench: Run, work: Callable[[], Any]) -> float:
    """How long some work takes, on the device too."""
    bench.machine.synchronize()
    began = time.perf_counter()
    work()
    bench.machine.synchronize()
    return 1e3 * (time.perf_counter() - began)


def bench_save(config: BenchConfig) -> dict:
    """Time updates with and without a save beside them, in turn, and what of a save the loop waits for."""
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(sys.stderr):
        bench = setup(dataclasses.replace(config, out_dir=folder))
        print(describe(bench))
        saver, made = Saver(bench.config), itertools.count()
        row = {"iter": 0, "tokens": 0, "epoch": 0.0}

        def one() -> float:
            return milliseconds(bench, partial(update, bench, next(made)))

        for _ in range(config.warmup_updates):
            one()
        first_copy = milliseconds(bench, lambda: saver.reserve(parts(bench, row, {})))
        outside, during, copies, seconds = [], [], [], []
        for number in range(1, config.rounds + 1):
            outside += [one() for _ in range(config.timed_updates)]
            row["iter"], written = number, threading.Event()
            copies.append(milliseconds(bench, lambda: save(bench, saver, row, {}, {"config": {}})))
            began = time.perf_counter()
            saver.then(written.set)
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
        "machine": bench.machine.describe(),
        "torch": torch.__version__,
    }


def bench_train(config: BenchConfig, ranks: Ranks = ALONE) -> dict:
    """Time train.py's own update function, each update on its own; warm-up (and compilation) apart."""
    with contextlib.redirect_stdout(sys.stderr if ranks.first else sys.stdout):  # standard output is for figures
        bench = setup(config, ranks)
        print(describe(bench))
    times = [
        milliseconds(bench, partial(update, bench, i)) for i in range(config.warmup_updates + config.timed_updates)
    ]
    median, p10, p90 = summary(times[config.warmup_updates :])
    tokens = bench.batches.per_update * bench.config.context_length
    peak = peak_flops(bench.machine.name)
    flops = 1e3 * tokens / median * bench.model.flops_per_token()
    return {
        "ms": median,
        "ms_p10": p10,
        "ms_p90": p90,
        "first_ms": times[0],
        "tokens_per_s": 1e3 * tokens / median,
        "tflop_per_s": flops / 1e12,
        "mfu": flops / peak / ranks.world if peak else None,
        "peak_mem_gb": bench.machine.peak_memory_gb(),
        "machine": bench.machine.describe(),
        "torch": torch.__version__,
    }


def say(line: str) -> None:
    """Progress; standard output is for figures."""
    print(line, file=sys.stderr, flush=True)


def main(config: BenchConfig) -> None:
    """Run one benchmark and print its figures."""
    alone = {"data": partial(bench_data, say=say), "save": bench_save, "infer": partial(bench_infer, say=say)}
    alone["eval"] = partial(bench_eval, say=say)
    if config.what in alone:
        show(alone[config.what](config), config)
        return
    with join(config, find_device) as ranks:
        figures = bench_train(config, ranks)
        if ranks.first:
            show(figures, config)


def show(figures: dict, config: BenchConfig) -> None:
    """Print the figures, write them where --json says, or both."""
    width = max(map(len, figures))
    if config.json != "-":
        for key, value in figures.items():
            if value is not None:
                print(f"{key:<{width}} {value:,.2f}" if isinstance(value, float) else f"{key:<{width}} {value}")
    if config.json:
        write_json(figures, config.json)


if __name__ == "__main__":
    run_verb(main, CONFIG, every_rank=True)
