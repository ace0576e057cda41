"""nanoGPT's model beside ours: the same shape and batches, in a process of its own, so that memory and environment are.

`Peer` starts `python peer.py`, which reads a line of JSON for each thing it is asked and answers with another: first
the settings, then {"updates": n} again and again. What is timed is an update as nanoGPT's train.py makes it: autocast,
scaler, clipping, the model's own configure_optimizers, and the next batch fetched between forward and backward.
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
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks.training import seconds_since_start
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset
from flatgpt.runtime.device import DTYPES, DeviceSettings, find_device, select_device
from flatgpt.runtime.precision import faster_training_dtype

ENVIRONMENT = dict(os.environ)  # as the user has it: runtime.py changes it for us alone
GRAD_CLIP = 1.0


def folder(config: BenchConfig, *files: str) -> Path:
    """The folder that --peer names; UserError where it lacks one of these files of nanoGPT's."""
    path = Path(config.peer[1])
    for file in files:
        if not (path / file).is_file():
            raise UserError(
                f"peer = nanoGPT {path}: there is no {file} in it; give the folder of a checkout of nanoGPT"
            )
    return path


def require_same(config: BenchConfig, ranks: int) -> None:
    """Raise UserError where nanoGPT's model cannot have our shape; its GELU is the exact one, which costs the same."""
    c = config
    lacks = {
        "activation": c.activation not in ("gelu", "gelu_tanh"),
        "tie_weights": not c.tie_weights,
        "position": c.position != "learned",
        "mlp_ratio": c.mlp_ratio != 4,
        "attn_bias": c.attn_bias not in (None, c.bias),
    }
    found = [f"{key} = {str(getattr(c, key)).lower()}" for key, wrong in lacks.items() if wrong]
    if found:
        raise UserError(f"peer = nanoGPT has no {', no '.join(found)}: change that, or leave --peer out")
    if ranks > 1:
        raise UserError(f"peer = nanoGPT runs on one device, torchrun started {ranks} processes: leave one of them out")


def their_vocab_size(vocab_size: int) -> int:
    """nanoGPT rounds GPT-2's 50,257 ids up, by its own default, and no other number."""
    return 50304 if vocab_size == 50257 else vocab_size


def ways(config: BenchConfig) -> dict[str, DeviceSettings]:
    """How nanoGPT runs on the config's device, by name.

    On a CPU: as its train.py does with --compile=False, its line for a CPU (eager float32), and the best that its
    model gives, compiled and with autocast put around it. On CUDA as its train.py does: compiled, half precision.
    """
    device = find_device(config.device)
    if device.type != "cpu":
        return {"nanoGPT": select_device(config.device, "auto", device.type == "cuda")}
    faster, _ = faster_training_dtype(config)
    return {"nanoGPT": select_device("cpu", "float32"), "nanoGPT_best": select_device("cpu", faster, True)}


class Peer:
    """One process that trains nanoGPT's model.

    Args:
        config: resolved, as setup gives it.
    """

    def __init__(self, name: str, config: BenchConfig, how: DeviceSettings):
        self.name, self.facts = name, {}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flatgpt.benchmarks.nanogpt"],
            env={**ENVIRONMENT, "PYTHONPATH": str(REPO_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        dtype = str(how.dtype).removeprefix("torch.")
        self._send(
            {"config": dataclasses.asdict(config), "device": str(how.device), "dtype": dtype, "compile": how.compile}
        )

    def _send(self, message: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # answer() says why
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def ask(self, updates: int) -> None:
        """Have it make so many updates."""
        self._send({"updates": updates})

    def answer(self) -> list[float]:
        """The milliseconds of each update asked for. `facts` then has start_s, peak_mem_gb and machine.

        Raises:
            UserError: the process has ended, with the last that it said.
        """
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._said.seek(0)
            lines = self._said.read().strip().splitlines() or [f"exit code {code}"]
            raise UserError(f"peer = {self.name} ended: {lines[-1]}")
        self.facts = json.loads(answer)
        return self.facts.pop("ms")

    def run(self, updates: int) -> list[float]:
        """ask and answer."""
        self.ask(updates)
        return self.answer()

    def close(self) -> None:
        """End the process, which has nothing to save."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# the process


def load_model(path: Path):
    """nanoGPT's model.py, under a name that is not our own model.py's."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def make_update(config: BenchConfig, place: DeviceSettings) -> Callable[[], None]:
    """A function that trains nanoGPT's model by one update more each time."""
    theirs = load_model(folder(config))
    if place.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(config.seed)
    shape = theirs.GPTConfig(
        block_size=config.context_length,
        vocab_size=their_vocab_size(config.vocab_size),
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        dropout=config.dropout,
        bias=config.bias,
    )
    model = theirs.GPT(shape).to(place.device)
    betas, scaler = (config.beta1, config.beta2), place.scaler()
    optimizer = model.configure_optimizers(config.weight_decay, config.lr, betas, place.device.type)
    forward = torch.compile(model) if place.compile else model
    tokens = open_dataset(Path(config.data_dir) / config.dataset).tokens("train")
    windows = Windows(tokens, config.context_length, config.stride)
    batches = TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)
    order = ((i, micro) for i in range(sys.maxsize) for micro in range(config.grad_accum_steps))
    ready = (tuple(map(place.to_device, batches(*which))) for which in order)
    x, y = next(ready)  # (B, T) each

    def update() -> None:
        nonlocal x, y
        for _ in range(config.grad_accum_steps):
            with place.autocast():
                loss = forward(x, y)[1] / config.grad_accum_steps
            x, y = next(ready)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), GRAD_CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return update


def serve() -> None:
    """Read what is asked from standard input, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nanoGPT's model prints
    settings = json.loads(sys.stdin.readline())
    config = BenchConfig(**settings["config"])
    place = DeviceSettings(torch.device(settings["device"]), DTYPES[settings["dtype"]], settings["compile"], {})
    update, facts = make_update(config, place), {}
    for line in sys.stdin:
        times = []
        for _ in range(json.loads(line)["updates"]):
            place.synchronize()
            began = time.perf_counter()
            update()
            place.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
            facts = facts or {"start_s": seconds_since_start(), "machine": place.describe()}
        more = {"ms": times, "peak_mem_gb": place.peak_memory_gb()}
        print(json.dumps(facts | more), file=answers, flush=True)


if __name__ == "__main__":
    serve()
