"""Optimizers, their parameter groups, and learning-rate schedules as pure functions of the update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from config import TrainConfig
from flatgpt.runtime.device import DTYPES
from model import GPT

# Coefficients from Jordan et al.; they bring singular values to between 0.7 and 1.2.
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MUON_RMS = 0.2  # root mean square of a step's entries, as a multiple of the learning rate
MIN_LR = 2e-4  # of a config without min_lr
ONECYCLE_START = 1 / 25  # learning rate at update 0, as a multiple of lr: that of torch's OneCycleLR


def decay_groups(params: Iterable[Tensor], config: TrainConfig) -> list[dict]:
    """Return parameter groups: weight decay applies to matrices, including embeddings, but not to vectors."""
    params = list(params)
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(params: Iterable[Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019), fused except on the meta device."""
    groups = decay_groups(params, config)
    fused = groups[0]["params"][0].device.type != "meta"
    return torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=fused)


def make_muon(model: GPT, config: TrainConfig) -> CombinedOptimizer:
    """Return Muon for the blocks' matrices and AdamW for the rest."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    muon_ids = {id(p) for p in matrices}
    qkv_ids = {id(block.attn.c_attn.weight) for block in model.transformer.h}  # three stacked matrices each
    groups = [
        {"params": [p for p in matrices if id(p) in qkv_ids], "parts": 3},
        {"params": [p for p in matrices if id(p) not in qkv_ids]},
    ]
    muon = Muon(groups, config.lr, config.weight_decay, momentum=config.beta1, dtype=DTYPES[config.dtype])
    return CombinedOptimizer(
        muon=muon, adamw=make_adamw((p for p in model.parameters() if id(p) not in muon_ids), config)
    )


# The values of --optimizer.
OPTIMIZERS: dict[str, Callable[[GPT, TrainConfig], torch.optim.Optimizer | CombinedOptimizer]] = {
    "adamw": lambda model, config: make_adamw(model.parameters(), config),
    "muon": make_muon,
}


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer | CombinedOptimizer:
    """Return the optimizer that the config names. The config must be resolved."""
    return OPTIMIZERS[config.optimizer](model, config)


def optimizer_on_meta(config: TrainConfig) -> torch.optim.Optimizer | CombinedOptimizer:
    """Return the optimizer after an update on the meta device: its state has names, shapes and dtypes, but no memory.

    The config must be resolved.
    """
    model = GPT.on_meta_device(config.model())
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer = make_optimizer(model, config)
    optimizer.step()
    return optimizer


class CombinedOptimizer:
    """Optimizers of different parameters, by name, with the interface of one. All have to read `found_inf`."""

    found_inf: Tensor | None = None  # GradScaler sets it on the device and deletes it after the step
    _step_supports_amp_scaling = True  # otherwise GradScaler waits for the device to read it

    def __init__(self, **optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        """Parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """State of all optimizers, by parameter."""
        return {p: state for optimizer in self.optimizers.values() for p, state in optimizer.state.items()}

    def step(self) -> None:
        """Apply the gradients, unless `found_inf` is 1. Does not synchronise with the device."""
        for optimizer in self.optimizers.values():
            optimizer.found_inf = self.found_inf
            optimizer.step()

    def state_dict(self) -> dict:
        """Return the states of all optimizers, by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}


class Muon(torch.optim.Optimizer):
    """Muon for two-dimensional parameters: steps along the orthogonal matrix nearest to the momentum of the gradients.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. Matrices of one shape are processed
    as one batch. For small matrices this is faster than torch.optim.Muon's loop (docs/speed.md). Steps are scaled to
    the usual size of AdamW's, as in "Muon is scalable for LLM training" (Liu et al., 2025), so that both optimizers use
    the same learning rate and weight decay.

    Args:
        params: parameter groups. `parts` is the number of matrices stacked in each parameter, such as 3 for queries,
            keys and values. Each matrix is orthogonalised by itself.
        momentum: decay of the running mean of gradients (Nesterov momentum).
        dtype: dtype of the Newton-Schulz iterations. That of the run's matrix products is fast on its device.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float, dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})
        self.dtype = dtype
        self.found_inf: Tensor | None = None  # 1: step() changes nothing; read on the device

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients, unless `found_inf` is 1."""
        groups: dict[tuple, list[Tensor]] = {}
        for group in self.param_groups:
            settings = group["lr"], group["weight_decay"], group["momentum"]
            for p in group["params"]:
                if p.grad is not None:
                    groups.setdefault((p.size(0) // group["parts"], p.size(1), *settings), []).append(p)
        for (rows, columns, lr, weight_decay, momentum), params in groups.items():
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
            grads = torch.cat([p.grad.view(-1, rows, columns) for p in params])  # (n, rows, columns)
            old_mean = torch.cat([buffer.view(-1, rows, columns) for buffer in buffers])
            mean = old_mean.lerp(grads, 1 - momentum)
            lookahead, decay = grads.lerp(mean, momentum), 1 - lr * weight_decay
            if self.found_inf is not None:
                skip = self.found_inf > 0
                mean, lookahead = torch.where(skip, old_mean, mean), torch.where(skip, 0, lookahead)
                decay = torch.where(skip, 1, decay)
            steps, scale = orthogonalize(lookahead, self.dtype), -lr * MUON_RMS * math.sqrt(max(rows, columns))
            sizes = [p.size(0) // rows for p in params]
            for p, buffer, new, step in zip(params, buffers, mean.split(sizes), steps.split(sizes), strict=True):
                buffer.copy_(new.view_as(p))
                p.mul_(decay).add_(step.reshape(p.shape), alpha=scale)  # the product in float32


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of matrices (n, rows, columns) near 1, by Newton-Schulz iterations in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    # Singular values are then at most 1, also within float16's range.
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def apply_gradients(
    optimizer: torch.optim.Optimizer | CombinedOptimizer, scaler: torch.amp.GradScaler, found_inf: Tensor
) -> None:
    """Run an optimizer step. If found_inf, shape (), is 1.0, weights, moments and step counts stay unchanged."""
    optimizer.found_inf = found_inf
    # Fused optimizers, and those above, read found_inf on the device. For others the host reads it, and on mps, before
    # torch's pull request 186360.
    on_device = getattr(optimizer, "_step_supports_amp_scaling", False) and found_inf.device.type != "mps"
    if on_device or not found_inf.item():
        scaler.step(optimizer)
    scaler.update()


def resolve_schedule(config: TrainConfig, new_run: bool = True) -> TrainConfig:
    """Return the config with lr_decay_iters, warmup_iters and min_lr set. max_iters must be set.

    Args:
        new_run: shorten a warm-up that would take the whole schedule to a tenth of it.
    """
    end, warmup, min_lr = config.lr_decay_iters or config.max_iters, config.warmup_iters, config.min_lr
    if warmup is None:
        warmup = round(config.warmup_fraction * end)
    if warmup >= end and new_run:
        length = "lr_decay_iters" if config.lr_decay_iters else "max_iters"
        print(f"note: warmup_iters = {warmup} is not below {length} = {end}: it is shortened to {end // 10}")
        warmup = end // 10
    if min_lr is None:
        min_lr = MIN_LR if config.lr >= MIN_LR else config.lr / 10
    return dataclasses.replace(config, lr_decay_iters=end, warmup_iters=warmup, min_lr=min_lr)


def learning_rate(update: int, config: TrainConfig) -> float:
    """Return the learning rate of an update (from 0). The config must be resolved.

    A linear warm-up starts above zero and reaches lr at update warmup_iters. Then, by schedule:
        cosine, linear: decay to min_lr at update lr_decay_iters, then min_lr;
        constant: lr;
        wsd (warm-up, stable, decay: Hu et al., MiniCPM, 2024): lr, then linear to min_lr over the last decay_fraction.
    onecycle is torch's OneCycleLR: a cosine from lr / 25 to lr at update warmup_iters - 1, and another one to min_lr at
    update lr_decay_iters - 1.
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
    """Interpolate along half a cosine wave, from `first` (progress 0) to `last` (progress 1)."""
    return last + 0.5 * (1 + math.cos(math.pi * progress)) * (first - last)
