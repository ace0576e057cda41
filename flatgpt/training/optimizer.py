"""Optimizers, their parameter groups, and learning-rate schedules as pure functions of the update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from config import TrainConfig
from model import GPT

# Coefficients of Jordan et al.; singular values end between 0.7 and 1.2.
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MUON_RMS = 0.2  # root mean square of a step's entries, in learning rates
ONECYCLE_START = 1 / 25  # of lr at update 0, as in torch's OneCycleLR


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW | MuonAndAdamW:
    """Return fused AdamW (Loshchilov and Hutter, 2019), or Muon for the blocks' matrices and AdamW for the rest.

    Matrices, embeddings included, have weight decay; vectors have none.
    """
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    hidden_ids = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in hidden_ids]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=True)
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
        self.parts = {"muon": muon, "adamw": adamw}
        self.found_inf: Tensor | None = None

    @property
    def param_groups(self) -> list[dict]:
        """The groups of both."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Apply the gradients, unless `found_inf` is 1. Does not synchronise with the device."""
        for part in self.parts.values():
            part.found_inf = self.found_inf
            part.step()

    def state_dict(self) -> dict:
        """Return both states by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}


class Muon(torch.optim.Optimizer):
    """Muon for two-dimensional parameters: steps along the orthogonal matrix nearest to the momentum of the gradients.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. Matrices of one shape are iterated
    as one batch, which is faster for small ones (docs/speed.md) than torch.optim.Muon's loop. Steps are scaled as in
    "Muon is scalable for LLM training" (Liu et al., 2025) to the usual size of AdamW's, so that learning rate and
    weight decay mean the same for both.

    Args:
        params: groups; `parts` is the number of matrices stacked in each parameter (3 for queries, keys and values),
            which are orthogonalised one by one.
        momentum: decay of the mean of the gradients (Nesterov).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})
        self.found_inf: Tensor | None = None  # where 1, a step changes nothing; read on the device

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients."""
        shapes: dict[tuple, list[Tensor]] = {}
        for group in self.param_groups:
            settings = group["lr"], group["weight_decay"], group["momentum"]
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.size(0) // group["parts"], p.size(1), *settings), []).append(p)
        for (rows, columns, lr, weight_decay, momentum), params in shapes.items():
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
            grads = torch.cat([p.grad.view(-1, rows, columns) for p in params])  # (n, rows, columns)
            old_mean = torch.cat([buffer.view(-1, rows, columns) for buffer in buffers])
            mean = old_mean.lerp(grads, 1 - momentum)
            lookahead, decay = grads.lerp(mean, momentum), 1 - lr * weight_decay
            if self.found_inf is not None:
                skip = self.found_inf > 0
                mean, lookahead = torch.where(skip, old_mean, mean), torch.where(skip, 0, lookahead)
                decay = torch.where(skip, 1, decay)
            steps = orthogonalized(lookahead) * (-lr * MUON_RMS * math.sqrt(max(rows, columns)))
            sizes = [p.size(0) // rows for p in params]
            for p, buffer, new, step in zip(params, buffers, mean.split(sizes), steps.split(sizes), strict=True):
                buffer.copy_(new.view_as(p))
                p.mul_(decay).add_(step.reshape(p.shape))


def orthogonalized(x: Tensor) -> Tensor:
    """Return matrices (n, rows, columns) with singular values near 1, by Newton-Schulz iterations in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = x.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values are at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def apply_gradients(
    optimizer: torch.optim.AdamW | MuonAndAdamW, scaler: torch.amp.GradScaler, found_inf: Tensor
) -> None:
    """Make a step. Where found_inf, shape (), is 1.0, weights, moments and counts stay unchanged."""
    optimizer.found_inf = found_inf  # the fused kernels read it on the device,
    # except on mps before torch's pull request 186360: there the host reads it
    if found_inf.device.type != "mps" or not found_inf.item():
        scaler.step(optimizer)
    scaler.update()


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
        peak = max(warmup - 1, 0)
        if update < peak:
            return _cosine(update / peak, config.lr * ONECYCLE_START, config.lr)
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
