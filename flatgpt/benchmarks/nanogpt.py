"""Run nanoGPT for comparison: its train.py on flatGPT's dataset, or updates of its model in a subprocess.

The subprocess separates memory and environment. It reads a line with the settings, and then lines with a number of
updates. For each of these, it runs the updates and writes a line of JSON. An update does the same as nanoGPT's
train.py: autocast, gradient scaling and clipping, the optimizer of configure_optimizers, and a prefetch of the next
batch between forward and backward.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks.measure import Process, milliseconds, seconds_since_start
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset
from flatgpt.runtime.device import DeviceSettings, find_device, select_device
from flatgpt.training.setup import faster_training_dtype

GRAD_CLIP = 1.0  # the default of nanoGPT
RECIPE = "config/train_shakespeare_char.py"
# nanoGPT's README, "I only have a macbook": character-level tiny Shakespeare on a CPU
CPU_RECIPE = shlex.split(
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def require_checkout(config: BenchConfig) -> None:
    """Raise UserError if --peer does not name a checkout of nanoGPT."""
    for file in ("model.py", "train.py", "configurator.py", RECIPE):
        if not Path(config.peer[1], file).is_file():
            raise UserError(
                f"peer = {' '.join(config.peer)}: this folder has no {file}; give the folder of a nanoGPT checkout"
            )


def require_same_shape(config: BenchConfig, world: int) -> None:
    """Raise UserError if nanoGPT cannot train a model of this shape, or if there are several ranks.

    nanoGPT always computes the exact GELU. On a CPU in float32, the tanh approximation takes three times as long.
    """
    supported = {"activation": ("gelu", "gelu_tanh"), "tie_weights": (True,), "position": ("learned",)}
    supported |= {"mlp_ratio": (4,), "attn_bias": (None, config.bias)}
    settings = {key: getattr(config, key) for key in supported}
    unsupported = [f"{key} = {str(value).lower()}" for key, value in settings.items() if value not in supported[key]]
    if unsupported:
        raise UserError(f"peer = nanoGPT does not support {', '.join(unsupported)}: change it, or leave out --peer")
    if world > 1:
        raise UserError(
            f"peer = nanoGPT runs on one device, but torchrun started {world} processes: leave out one of them"
        )


def padded_vocab_size(vocab_size: int) -> int:
    """Return the vocabulary size that nanoGPT uses. It pads only GPT-2's 50,257 ids."""
    return 50304 if vocab_size == 50257 else vocab_size


def train_command(config: BenchConfig, folder: Path) -> list[str]:
    """Return the command that trains nanoGPT's recipe in its checkout, on a copy of the dataset in a new folder."""
    dataset = open_dataset(Path(config.data_dir) / config.dataset)
    folder.mkdir()
    for split in ("train", "val"):
        tokens = dataset.tokens(split)
        tokens[0 : len(tokens)].astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": padded_vocab_size(dataset.meta["vocab_size"])}))
    cpu = [] if find_device(config.device).type == "cuda" else CPU_RECIPE
    return [sys.executable, "train.py", RECIPE, f"--dataset={folder}", f"--out_dir={folder}", *cpu]


def peer_settings(config: BenchConfig) -> dict[str, DeviceSettings]:
    """Return the device settings for nanoGPT by name of the result.

    On a CPU there are two: those that nanoGPT's README recommends (eager, float32), and the fastest ones (compiled,
    autocast in the faster dtype). On other devices: those of nanoGPT's train.py.
    """
    device = find_device(config.device)
    if device.type != "cpu":
        return {"nanoGPT": select_device(config.device, "auto", device.type == "cuda")}
    faster, _ = faster_training_dtype(config)
    return {"nanoGPT": select_device("cpu", "float32"), "nanoGPT_best": select_device("cpu", faster, True)}


class Peer(Process):
    """A subprocess that trains nanoGPT's model. It starts with the warm-up updates.

    Args:
        config: resolved config, as returned by build_run.
        settings: device settings, as returned by peer_settings.

    Attributes:
        facts: start_s, peak_mem_gb and machine; empty before the first `receive`.
    """

    def __init__(self, config: BenchConfig, settings: DeviceSettings):
        command = [sys.executable, "-P", "-m", "flatgpt.benchmarks.nanogpt"]
        super().__init__(command, {"PYTHONPATH": str(REPO_ROOT)}, stdin=subprocess.PIPE)
        self._send(pickle.dumps((config, settings)).hex())
        self._send(config.warmup_updates)
        self.facts = {}

    def _send(self, message: str | int) -> None:
        with contextlib.suppress(BrokenPipeError):  # `receive` reports the error
            os.write(self.stdin.fileno(), f"{message}\n".encode())

    def receive(self) -> list[float]:
        """Return the milliseconds of each requested update. The first call returns those of the warm-up.

        Raises:
            UserError: the process failed.
        """
        line = self.stdout.readline()
        if not line:
            self.require_success()
        self.facts = json.loads(line)
        return self.facts.pop("ms")

    def time_updates(self, count: int) -> list[float]:
        """Run `count` updates and return the milliseconds of each."""
        self._send(count)
        return self.receive()


# ---------------------------------------------------------------------------------------------------------------------
# the subprocess


def make_update(config: BenchConfig, device: DeviceSettings) -> Callable[[], None]:
    """Return a function that runs one update of nanoGPT's model."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(config.peer[1]) / "model.py")
    nanogpt = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses needs the entry
    spec.loader.exec_module(nanogpt)
    if device.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(config.seed)
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "dropout", "bias")}
    shape |= {"block_size": config.context_length, "vocab_size": padded_vocab_size(config.vocab_size)}
    model = nanogpt.GPT(nanogpt.GPTConfig(**shape)).to(device.device)
    betas, scaler = (config.beta1, config.beta2), device.scaler()
    optimizer = model.configure_optimizers(config.weight_decay, config.lr, betas, device.device.type)
    forward = torch.compile(model) if device.compile else model
    tokens = open_dataset(Path(config.data_dir) / config.dataset).tokens("train")
    windows = Windows(tokens, config.context_length, config.stride)
    batches = TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)
    order = ((i, micro) for i in range(sys.maxsize) for micro in range(config.grad_accum_steps))
    prefetched = (tuple(map(device.to_device, batches(*step))) for step in order)
    x, y = next(prefetched)  # (B, T) each

    def update() -> None:
        nonlocal x, y
        for _ in range(config.grad_accum_steps):
            with device.autocast():
                loss = forward(x, y)[1] / config.grad_accum_steps
            x, y = next(prefetched)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), GRAD_CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return update


def serve() -> None:
    """Run the updates that standard input requests, until it is closed."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nanoGPT's model prints to standard output
    config, device = pickle.loads(bytes.fromhex(sys.stdin.readline()))
    update, facts = make_update(config, device), {}
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            times.append(milliseconds(device, update))
            facts = facts or {"start_s": seconds_since_start(), "machine": device.describe()}
        figures = facts | {"ms": times, "peak_mem_gb": device.peak_memory_gb()}
        print(json.dumps(figures), file=output, flush=True)


if __name__ == "__main__":
    serve()
