"""bench.py loss: how long train.py takes to reach a validation loss, one run per seed, in turn with nanoGPT's train.py.

The clock runs from the start of the process to the line of the first evaluation that reaches the target: imports,
compilation and evaluations count. Preparing the data does not.
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
from pathlib import Path

from config import BenchConfig
from flatgpt.benchmarks import nanogpt
from flatgpt.benchmarks.measure import USER_ENVIRONMENT, aligned, failure, in_turn, script, speedup, write_recipe
from flatgpt.data.dataset import Dataset, open_dataset
from flatgpt.runtime.device import cpu_name, select_device

OURS = r"iter +(\d+) .*\bval +([\d.]+)"  # run_log.format_row
NANOGPT = r"step (\d+): train loss [\d.]+, val loss ([\d.]+)"
# nanoGPT's README, "I only have a macbook": tiny Shakespeare's characters on a CPU
CPU_RECIPE = shlex.split(
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def bench_loss(config: BenchConfig) -> dict:
    """Measure the seconds to config.target for each seed.

    On a CPU, nanoGPT's time is that of its whole recipe, whatever loss it reaches.

    Returns:
        `runs`, each with seed, seconds (None: not reached), iter and val_loss (of the evaluation that reached the
        target, else of the last); `seconds`, their median; the same of `peers`; `ratios` where both have seconds.
    """
    device = select_device(config.device, "float32")  # for its name; each run selects its own precision
    on_cuda = device.device.type == "cuda"
    if config.peer:
        dataset = open_dataset(Path(config.data_dir) / config.dataset)
        files = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
        checkout = nanogpt.checkout(config, *files)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        recipe = write_recipe(config, folder)

        def train(seed: int) -> dict:
            words = ("--config", recipe, "--seed", seed, "--out_dir", folder / f"seed_{seed}")
            return {"seed": seed, **until_loss(script("train.py", *words), OURS, config.target, Path())}

        def train_nanogpt(seed: int) -> dict:
            command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *([] if on_cuda else CPU_RECIPE)]
            cwd = nanogpt_folder(folder / f"nanogpt_{seed}", checkout, dataset)
            return until_loss(command, NANOGPT, config.target if on_cuda else None, cwd)

        runners = {"ours": train, **({"nanoGPT": train_nanogpt} if config.peer else {})}
        results = in_turn(runners, config.seeds, lambda name, latest: _describe(latest[name]), label="seed")
    medians = {
        name: {"runs": runs, "seconds": statistics.median(map(_seconds, runs))} for name, runs in results.items()
    }
    figures = {"target": config.target, **medians.pop("ours")}
    if config.peer:
        figures["peers"] = medians
        pairs = [
            pair
            for pair in zip(*(map(_seconds, runs) for runs in results.values()), strict=True)
            if max(pair) < math.inf
        ]
        if pairs:
            figures["ratios"] = {"nanoGPT": speedup(*map(list, zip(*pairs, strict=True)))}
    return figures | {"machine": device.name if on_cuda else cpu_name()}


def until_loss(command: list[str], pattern: str, target: float | None, cwd: Path) -> dict:
    """Run a training command until a line shows a loss of at most `target`, then end it.

    Args:
        pattern: of an evaluation's line, with groups for iter and loss.
        target: None: run the command to its end.

    Raises:
        UserError: it failed; with its last line.
    """
    found = {"seconds": None, "iter": None, "val_loss": None}
    with tempfile.TemporaryFile("w+") as stderr, tempfile.TemporaryDirectory() as cache:
        # an empty compiler cache: otherwise a run would profit from the compilation of the one before
        environment = {**USER_ENVIRONMENT, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            for line in process.stdout:
                if match := re.match(pattern, line):
                    found |= {"iter": int(match[1]), "val_loss": float(match[2])}
                    if target is not None and found["val_loss"] <= target:
                        return found | {"seconds": time.perf_counter() - began}
            if code := process.wait():
                stderr.seek(0)
                raise failure(command, stderr.read(), code)
            return found | ({"seconds": time.perf_counter() - began} if target is None else {})
        finally:
            process.kill()
            process.communicate()


def nanogpt_folder(folder: Path, checkout: Path, dataset: Dataset) -> Path:
    """Make a folder in which nanoGPT's train.py runs: links to its files, and the dataset as data/shakespeare_char."""
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (folder / name).symlink_to((checkout / name).resolve())
    for split in ("train", "val"):
        tokens = dataset.tokens(split)
        tokens[0 : len(tokens)].astype("<u2").tofile(data / f"{split}.bin")
    vocab_size = nanogpt.padded_vocab_size(dataset.meta["vocab_size"])
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    return folder


def _seconds(run: dict) -> float:
    return math.inf if run["seconds"] is None else run["seconds"]


def _describe(run: dict) -> str:
    reached = f"{run['seconds']:,.1f} s" if run["seconds"] is not None else "not reached"
    return (
        f"{reached}, no evaluation"
        if run["iter"] is None
        else f"{reached}, iter {run['iter']:>6}, val {run['val_loss']:.4f}"
    )


def loss_table(found: dict) -> list[str]:
    """Return the lines of a table of bench_loss's figures."""
    columns = {"ours": found, **found.get("peers", {})}
    rows = [[f"seconds to a validation loss of {found['target']:g}", *columns]]
    for n, run in enumerate(found["runs"]):
        rows.append([f"seed {run['seed']}", *(_describe(column["runs"][n]) for column in columns.values())])
    medians = (column["seconds"] for column in columns.values())
    rows.append(["median", *(f"{median:,.1f} s" if math.isfinite(median) else "not reached" for median in medians)])
    lines = aligned(rows)
    if ratio := found.get("ratios", {}).get("nanoGPT"):
        pairs = ", ".join(f"{each:.2f}" for each in ratio["rounds"])
        lines.append(f"times as fast: {ratio['median']:.2f} (pair by pair: {pairs})")
    return [*lines, f"{found['machine']}, torch {found['torch']}"]
