"""Training updates of nanoGPT's model with the shape and batches of a config, in a process of their own.

The separate process keeps memory and environment apart. It reads a line of JSON for each request and answers with
another: first the settings, then {"updates": n} any number of times. The update is that of nanoGPT's train.py:
autocast, scaler, clipping, the model's own configure_optimizers, and the next batch fetched between forward and
backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks.measure import USER_ENVIRONMENT, failure, milliseconds, seconds_since_start
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset
from flatgpt.runtime.device import DTYPES, DeviceSettings, find_device, select_device
from flatgpt.runtime.precision import faster_training_dtype

GRAD_CLIP = 1.0  # nanoGPT's


def checkout(config: BenchConfig, *files: str) -> Path:
    """Return the folder that --peer names. Raise UserError if one of these files of nanoGPT is missing."""
    path = Path(config.peer[1])
    for file in files:
        if not (path / file).is_file():
            raise UserError(f"peer = nanoGPT {path}: it has no {file}; give the folder of a checkout of nanoGPT")
    return path


def require_same_shape(config: BenchConfig, world: int) -> None:
    """Raise UserError if nanoGPT cannot train a model of this shape, or not on several ranks.

    Its GELU is always the exact one, which takes the same time.
    """
    c = config
    unsupported = {
        "activation": c.activation not in ("gelu", "gelu_tanh"),
        "tie_weights": not c.tie_weights,
        "position": c.position != "learned",
        "mlp_ratio": c.mlp_ratio != 4,
        "attn_bias": c.attn_bias not in (None, c.bias),
    }
    found = [f"{key} = {str(getattr(c, key)).lower()}" for key, wrong in unsupported.items() if wrong]
    if found:
        raise UserError(f"peer = nanoGPT has no {', no '.join(found)}: change that, or leave --peer out")
    if world > 1:
        raise UserError(f"peer = nanoGPT runs on one device, torchrun started {world} processes: leave one of them out")


def padded_vocab_size(vocab_size: int) -> int:
    """Return the vocabulary size that nanoGPT uses: it pads GPT-2's 50,257 ids, and no other number."""
    return 50304 if vocab_size == 50257 else vocab_size


def peer_settings(config: BenchConfig) -> dict[str, DeviceSettings]:
    """Return the device settings to run nanoGPT with, by name.

    On a CPU: those of its train.py with --compile=False, its recommendation for a CPU (eager float32), and the fastest
    for its model (compiled, autocast in the faster dtype). Elsewhere those of its train.py.
    """
    device = find_device(config.device)
    if device.type != "cpu":
        return {"nanoGPT": select_device(config.device, "auto", device.type == "cuda")}
    faster, _ = faster_training_dtype(config)
    return {"nanoGPT": select_device("cpu", "float32"), "nanoGPT_best": select_device("cpu", faster, True)}


class Peer:
    """A process that trains nanoGPT's model.

    Args:
        name: for messages.
        config: resolved, as build_run returns it.

    Attributes:
        facts: start_s, peak_mem_gb and machine, after the first answer.
    """

    def __init__(self, name: str, config: BenchConfig, settings: DeviceSettings):
        self.name, self.facts = name, {}
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flatgpt.benchmarks.nanogpt"],
            env={**USER_ENVIRONMENT, "PYTHONPATH": str(REPO_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        dtype = str(settings.dtype).removeprefix("torch.")
        device = {"device": str(settings.device), "dtype": dtype, "compile": settings.compile}
        self._send({"config": dataclasses.asdict(config), **device})

    def _send(self, message: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # answer() reports it
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def request(self, updates: int) -> None:
        """Start some updates, without waiting for them."""
        self._send({"updates": updates})

    def answer(self) -> list[float]:
        """Wait for the requested updates, and return the milliseconds of each.

        Raises:
            UserError: the process has ended; with the last line of its output.
        """
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._stderr.seek(0)
            raise failure(f"peer = {self.name}", self._stderr.read(), code)
        self.facts = json.loads(answer)
        return self.facts.pop("ms")

    def time_updates(self, count: int) -> list[float]:
        """Run some updates, and return the milliseconds of each."""
        self.request(count)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# the process


def load_model_module(path: Path):
    """Import nanoGPT's model.py, under a name other than that of this repository's model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def make_update(config: BenchConfig, device: DeviceSettings) -> Callable[[], None]:
    """Return a function that trains nanoGPT's model by one update per call."""
    nanogpt = load_model_module(checkout(config))
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
    prefetched = (tuple(map(device.to_device, batches(*which))) for which in order)
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
    """Answer the requests on standard input, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nanoGPT's model prints
    settings = json.loads(sys.stdin.readline())
    device = DeviceSettings(torch.device(settings["device"]), DTYPES[settings["dtype"]], settings["compile"], {})
    update, facts = make_update(BenchConfig(**settings["config"]), device), {}
    for line in sys.stdin:
        times = []
        for _ in range(json.loads(line)["updates"]):
            times.append(milliseconds(device, update))
            facts = facts or {"start_s": seconds_since_start(), "machine": device.describe()}
        figures = facts | {"ms": times, "peak_mem_gb": device.peak_memory_gb()}
        print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    serve()
