"""Measure the speed and memory of the other scripts.

python bench.py train                                   # updates of the default recipe
python bench.py train --config shakespeare --dtype float32 --no-compile --json -
python bench.py train --config shakespeare_char_cpu --peer nanoGPT ../nanoGPT    # compared with nanoGPT
python bench.py train --config gpt2_124m --grad_accum_steps 1 --profile          # the most expensive operations
python bench.py loss --config shakespeare_char_cpu --target 1.9 --peer nanoGPT ../nanoGPT    # time to this loss
python bench.py save --config gpt2_124m --batch_size 1   # updates during a save, and the time of its copy
python bench.py data --input 'data/raw/wikipedia/*'      # text -> shards, compared with datasets.map
python bench.py infer --config gpt2_124m                # tokens/s, compared with transformers and llama.cpp
python bench.py eval --model_path out/wikitext103_22m --dataset wikitext103 --split test   # with transformers
python bench.py all --json cpu.json --peer nanoGPT ../nanoGPT   # the tables of docs/speed.md: cpu.json, cpu.md
python bench.py merge --input epyc.json xeon.json        # one table of the results of several machines
python bench.py gpu --json gpu.json --peer nanoGPT ../nanoGPT   # on a GPU, about 8 minutes (docs/testing.md)
python bench.py gpu --json dry.json --dry_run            # the same rows at toy size, on the CPU
python bench.py resume --config shakespeare_char_cpu --max_iters 20   # check that resuming changes no result
python bench.py tests                                    # run the tests that need CUDA
"""

from flatgpt.cli.cli import from_command_line, run_script
from config import BenchConfig
from flatgpt.interop.pretrained import initial_shape

if __name__ == "__main__":
    CONFIG = from_command_line(BenchConfig, __doc__, initial_shape)

import shlex
import sys
from functools import partial

import torch

from flatgpt.benchmarks.data import bench_data
from flatgpt.benchmarks.evaluation import bench_eval
from flatgpt.benchmarks.inference import bench_infer
from flatgpt.benchmarks.machine import machine_facts
from flatgpt.benchmarks.measure import figure_lines
from flatgpt.benchmarks.suites import SUITES, bench_tests, merged, run_suite
from flatgpt.benchmarks.training import bench_loss, bench_resume, bench_save, bench_train
from flatgpt.runtime.distributed import join_process_group
from flatgpt.runtime.files import require_writable, write_json
from train import save, train_step

BENCHMARKS = {  # single-process ones; `train` also runs under torchrun
    "loss": bench_loss,
    "save": partial(bench_save, train_step=train_step, save=save),
    "data": bench_data,
    "infer": bench_infer,
    "eval": bench_eval,
    "resume": bench_resume,
    "tests": bench_tests,
}


def main(config: BenchConfig) -> None:
    """Run one benchmark and print its figures."""
    require_writable(config.json, "json")
    command = f"bench.py {shlex.join(sys.argv[1:])}"
    if config.what == "merge":
        print(merged(config.input), end="")
    elif config.what in SUITES:
        run_suite(config, f"python {command}")
    elif config.what == "train":
        with join_process_group(config) as ranks:
            figures = bench_train(config, train_step, ranks)
            if ranks.first:
                report(config, f"{ranks.launcher} {command}", figures)
    else:
        report(config, f"python {command}", BENCHMARKS[config.what](config))


def report(config: BenchConfig, command: str, figures: dict) -> None:
    """Print the figures and, with --json, write them to its file. `--json -` prints JSON only."""
    machine = machine_facts() if config.what in ("train", "infer") else {}
    figures = {"command": command} | machine | figures | {"torch": torch.__version__}
    if config.json != "-":
        print("\n".join(figure_lines(figures)))
    if config.json:
        write_json(figures, config.json)


if __name__ == "__main__":
    run_script(main, CONFIG, every_rank=True)
