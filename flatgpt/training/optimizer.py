"""Parameter groups, AdamW and Muon, and learning-rate schedules as pure functions of the update."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from config import TrainConfig
from flatgpt.training.muon import Muon

ONECYCLE_START = 1 / 25  # of lr, at update 0: torch's OneCycleLR has the same default


def param_groups(params: list[Tensor], weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices decay (embeddings among them, as GPT-2's trainers do), vectors do not."""
    matrices = [p for p in params if p.dim() >= 2]
    vectors = [p for p in params if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW | MuonAndAdamW:
    """AdamW (Loshchilov and Hutter, 2019), in torch's fused form, which CUDA, mps and CPUs have; or Muon beside it."""
    params = list(model.parameters())
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    known = {id(p) for p in hidden}
    groups = param_groups([p for p in params if id(p) not in known], config.weight_decay)
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.optimizer == "adamw":
        return adamw
    stacked = {id(block.attn.c_attn.weight) for block in model.transformer.h}  # queries', keys' and values'
    split = [
        {"params": [p for p in hidden if id(p) in stacked], "parts": 3},
        {"params": [p for p in hidden if id(p) not in stacked]},
    ]
    return MuonAndAdamW(Muon(split, config.lr, config.weight_decay, momentum=config.beta1), adamw)


class MuonAndAdamW:
    """Two optimizers that the training loop, a GradScaler and a checkpoint see as one.

    One, so that a float16 update with an overflow anywhere is skipped by both.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        self.param_groups = [*muon.param_groups, *adamw.param_groups]
        self.found_inf: Tensor | None = None

    def step(self) -> None:
        """Apply the gradients that are there, unless `found_inf` is set to 1, as AdamW does by itself on the device."""
        self.muon.found_inf = self.adamw.found_inf = self.found_inf
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget them."""
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """Both states, by name."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take both back."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self) -> dict:
        """Per parameter, of both."""
        return {**self.adamw.state, **self.muon.state}


def apply_gradients(
    optimizer: torch.optim.AdamW | MuonAndAdamW, scaler: torch.amp.GradScaler, found_inf: Tensor
) -> None:
    """Step and clear the gradients. Where found_inf, shape (), is 1.0, weights, moments and counts stay unchanged."""
    optimizer.found_inf = found_inf  # AdamW's fused kernels look at it on the device
    # but mps's do not before torch has pull request 186360: there the host waits for it
    if found_inf.device.type != "mps" or not found_inf.item():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def learning_rate(update: int, config: TrainConfig) -> float:
    """The learning rate of update `update` (from 0). warmup_iters and lr_decay_iters have to be resolved.

    A linear warm-up that starts above zero and meets lr at update warmup_iters; from there
        cosine, linear: down to min_lr at update lr_decay_iters, and min_lr after it;
        constant: lr;
        wsd (warm-up, stable, decay: Hu et al., MiniCPM, 2024): lr, then linear to min_lr over the last decay_fraction.
    onecycle is torch's OneCycleLR: from lr / 25 up to lr by a cosine, which update warmup_iters - 1 meets, and by
    another one down to min_lr, which update lr_decay_iters - 1 meets.
    """
    warmup, end = config.warmup_iters, config.lr_decay_iters
    if config.schedule == "onecycle":
        if update < warmup - 1:
            return _cosine(update / (warmup - 1), config.lr * ONECYCLE_START, config.lr)
        peak = max(warmup - 1, 0)
        return _cosine(min(1.0, (update - peak) / max(end - 1 - peak, 1)), config.lr, config.min_lr)
    if update < warmup:
        return config.lr * (update + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    if update >= end:
        return config.min_lr
    if config.schedule == "cosine":
        return _cosine((update - warmup) / (end - warmup), config.lr, config.min_lr)
    start = warmup if config.schedule == "linear" else max(warmup, end - math.ceil(config.decay_fraction * end))
    return config.lr + max(0, update - start) / (end - start) * (config.min_lr - config.lr)


def _cosine(done: float, first: float, last: float) -> float:
    """Half a cosine wave from `first` (done = 0) to `last` (done = 1)."""
    return last + 0.5 * (1 + math.cos(math.pi * done)) * (first - last)
