"""Optimizers, their parameter groups, and learning-rate schedules as pure functions of the update."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from config import TrainConfig
from flatgpt.training.muon import Muon

ONECYCLE_START = 1 / 25  # of lr at update 0, as in torch's OneCycleLR


def param_groups(params: list[Tensor], weight_decay: float) -> list[dict]:
    """Return two AdamW groups: matrices, embeddings included, have weight decay; vectors have none."""
    matrices = [p for p in params if p.dim() >= 2]
    vectors = [p for p in params if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW | MuonAndAdamW:
    """Return fused AdamW (Loshchilov and Hutter, 2019), or Muon for the blocks' matrices and AdamW for the rest."""
    params = list(model.parameters())
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    hidden_ids = {id(p) for p in hidden}
    groups = param_groups([p for p in params if id(p) not in hidden_ids], config.weight_decay)
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.optimizer == "adamw":
        return adamw
    qkv_ids = {id(block.attn.c_attn.weight) for block in model.transformer.h}  # three stacked matrices each
    matrices = [
        {"params": [p for p in hidden if id(p) in qkv_ids], "parts": 3},
        {"params": [p for p in hidden if id(p) not in qkv_ids]},
    ]
    return MuonAndAdamW(Muon(matrices, config.lr, config.weight_decay, momentum=config.beta1), adamw)


class MuonAndAdamW:
    """Two optimizers with the interface of one, so that both skip an update with an overflow in either."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        self.param_groups = [*muon.param_groups, *adamw.param_groups]
        self.found_inf: Tensor | None = None

    def step(self) -> None:
        """Apply the gradients, unless `found_inf` is 1. Does not synchronise with the device."""
        self.muon.found_inf = self.adamw.found_inf = self.found_inf
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of both."""
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """Return both states by name."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load both states."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self) -> dict:
        """The state of each parameter."""
        return {**self.adamw.state, **self.muon.state}


def apply_gradients(
    optimizer: torch.optim.AdamW | MuonAndAdamW, scaler: torch.amp.GradScaler, found_inf: Tensor
) -> None:
    """Step and clear the gradients. Where found_inf, shape (), is 1.0, weights, moments and counts stay unchanged."""
    optimizer.found_inf = found_inf  # the fused kernels read it on the device,
    # except on mps before torch's pull request 186360: there the host reads it
    if found_inf.device.type != "mps" or not found_inf.item():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def learning_rate(update: int, config: TrainConfig) -> float:
    """Return the learning rate of an update (from 0). The config has to be resolved.

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


def _cosine(progress: float, first: float, last: float) -> float:
    """Half a cosine wave from `first` (progress = 0) to `last` (progress = 1)."""
    return last + 0.5 * (1 + math.cos(math.pi * progress)) * (first - last)
