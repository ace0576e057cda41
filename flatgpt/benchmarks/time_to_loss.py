"""How long training takes to a validation loss: train.py in fresh processes, one a seed, beside nanoGPT's own train.py.

The clock runs from the start of the process to the line of the first evaluation that meets the target: imports,
compilation and evaluations are in it. Data is prepared before.
"""

from __future__ import annotations

import math
import pickle
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks import nanogpt as peer
from flatgpt.benchmarks.training import speedup
from flatgpt.data.dataset import open_dataset
from flatgpt.runtime.device import cpu_name, select_device

OURS = r"iter +(\d+) .*\bval +([\d.]+)"  # run_log.format_row
THEIRS = r"step (\d+): train loss [\d.]+, val loss ([\d.]+)"
# nanoGPT's README, "I only have a macbook": tiny Shakespeare's characters on a CPU
CPU_RECIPE = shlex.split(
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def bench_loss(config: BenchConfig, recipe: str, say: Callable[[str], None]) -> dict:
    """Seconds to config.target for each seed, a run of nanoGPT's after each.

    Args:
        recipe: the settings of train.py, as a recipe's text.

    Returns:
        `runs` has seed, seconds (None: never reached), iter and val_loss (of the evaluation that met it, or the last).
    """
    place = select_device(config.device, "float32")  # each run chooses its own precision
    if config.peer:
        dataset = open_dataset(Path(config.data_dir) / config.dataset)
        nanogpt = peer.folder(config, "train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
    runs, others = [], []
    with tempfile.TemporaryDirectory(dir=".") as name:
        temporary = Path(name).resolve()
        (temporary / "recipe.toml").write_text(recipe, encoding="utf-8")
        for seed in range(1, config.seeds + 1):
            words = [sys.executable, REPO_ROOT / "train.py", "--config", temporary / "recipe.toml", "--seed", seed]
            words += ["--out_dir", temporary / f"seed_{seed}"]
            run = until_loss(words, OURS, config.target, Path())
            runs.append({"seed": seed, **run})
            say(f"seed {seed} ours     {_seconds(run)}")
            if config.peer:
                folder = nanogpt_folder(temporary / f"nanogpt_{seed}", nanogpt, dataset)
                words = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
                if place.device.type == "cuda":
                    run = until_loss(words, THEIRS, config.target, folder)
                else:  # its README's line, to its end
                    run = until_loss([*words, *CPU_RECIPE], THEIRS, None, folder)
                others.append(run)
                pair = f": {run['seconds'] / runs[-1]['seconds']:.2f} times" if _both(runs[-1], run) else ""
                say(f"seed {seed} nanoGPT  {_seconds(run)}{pair}")
    found = {"target": config.target, "runs": runs, "seconds": _median(runs)}
    if others:
        found["peers"] = {"nanoGPT": {"runs": others, "seconds": _median(others)}}
        pairs = [(a["seconds"], b["seconds"]) for a, b in zip(runs, others, strict=True) if _both(a, b)]
        if pairs:
            found["ratios"] = {"nanoGPT": speedup(*map(list, zip(*pairs, strict=True)))}
    return found | {"machine": cpu_name() if place.device.type == "cpu" else place.name, "torch": torch.__version__}


def until_loss(words: list, pattern: str, target: float | None, folder: Path) -> dict:
    """Run a training command in a folder, until a line shows a loss of at most `target` (None: to its end).

    Args:
        pattern: of the line of an evaluation: groups iter and loss.

    Raises:
        UserError: it failed, with its last line.
    """
    found = {"seconds": None, "iter": None, "val_loss": None}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryDirectory() as cache:
        # whatever the run before has compiled is compiled again
        environment = {**peer.ENVIRONMENT, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
        began = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, words)), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            for line in process.stdout:
                if match := re.match(pattern, line):
                    found |= {"iter": int(match[1]), "val_loss": float(match[2])}
                    if target is not None and found["val_loss"] <= target:
                        return found | {"seconds": time.perf_counter() - began}
            if process.wait():
                said.seek(0)
                lines = said.read().strip().splitlines() or [f"exit code {process.returncode}"]
                raise UserError(f"{shlex.join(map(str, words[1:]))} failed: {lines[-1].removeprefix('error: ')}")
            return found | ({"seconds": time.perf_counter() - began} if target is None else {})
        finally:
            process.kill()  # what it would still save is temporary
            process.communicate()


def nanogpt_folder(folder: Path, nanogpt: Path, dataset) -> Path:
    """A folder that nanoGPT's train.py can run in: links to its files, and our ids as its data/shakespeare_char."""
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (folder / name).symlink_to((nanogpt / name).resolve())
    for split in ("train", "val"):
        tokens = dataset.tokens(split)
        tokens[0 : len(tokens)].astype("<u2").tofile(data / f"{split}.bin")
    vocab_size = peer.their_vocab_size(dataset.meta["vocab_size"])
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    return folder


def _both(one: dict, other: dict) -> bool:
    return None not in (one["seconds"], other["seconds"])


def _median(runs: list[dict]) -> float:
    """Of the seconds; infinite where half of the runs or more did not reach it."""
    return statistics.median(math.inf if run["seconds"] is None else run["seconds"] for run in runs)


def _seconds(run: dict) -> str:
    reached = "not reached" if run["seconds"] is None else f"{run['seconds']:8.1f} s"
    last = "no evaluation" if run["iter"] is None else f"iter {run['iter']:>6}, val {run['val_loss']:.4f}"
    return f"{reached:>11}, {last}"


def loss_table(found: dict) -> str:
    """What bench_loss found, as text."""
    others = found["peers"]["nanoGPT"]["runs"] if "peers" in found else []
    lines = [f"seconds to a validation loss of {found['target']:g}"]
    for n, run in enumerate(found["runs"]):
        lines.append(f"seed {run['seed']:<3} {_seconds(run)}" + (f"   nanoGPT {_seconds(others[n])}" if others else ""))
    median = found["seconds"]
    lines.append("median   " + (f"{median:,.1f} s" if math.isfinite(median) else "not reached"))
    if others:
        lines[-1] += f"   nanoGPT {found['peers']['nanoGPT']['seconds']:,.1f} s"
    if "ratios" in found:
        ratio = found["ratios"]["nanoGPT"]
        pairs = ", ".join(f"{each:.2f}" for each in ratio["rounds"])
        lines.append(f"times as fast: {ratio['median']:.2f} (pair by pair: {pairs})")
    return "\n".join([*lines, f"{found['machine']}, torch {found['torch']}"])
