"""Time what the other verbs run.

python bench.py train                                   # the update of the default recipe
python bench.py train --config shakespeare --dtype float32 --no-compile --json -
python bench.py data --input 'data/raw/wikipedia/*'      # text -> shards, beside plain encoding and datasets.map
"""

from cli import from_command_line, run_verb, write_json
from config import BenchConfig

if __name__ == "__main__":
    CONFIG = from_command_line(BenchConfig, __doc__)

import contextlib
import sys
import time

import torch

from ranks import ALONE, Ranks, join
from run import describe, setup
from runlog import peak_flops, summary
from runtime import find_device
from throughput import bench_data
from train import update


def bench_train(config: BenchConfig, ranks: Ranks = ALONE) -> dict:
    """Time train.py's own update function, each update on its own; warm-up (and compilation) apart."""
    with contextlib.redirect_stdout(sys.stderr if ranks.first else sys.stdout):  # standard output is for figures
        bench = setup(config, ranks)
        print(describe(bench))
    times = []
    for i in range(config.warmup_updates + config.timed_updates):
        bench.machine.synchronize()
        began = time.perf_counter()
        update(bench, i)
        bench.machine.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
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
    if config.what == "data":
        show(bench_data(config, say), config)
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
