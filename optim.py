"""Parameter groups, AdamW, and learning-rate schedules as pure functions of the update."""

from __future__ import annotations

import math

import torch
from torch import nn

from config import TrainConfig


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices decay (embeddings among them, as GPT-2's trainers do), vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), in torch's fused form, which CUDA, mps and CPUs have."""
    groups = param_groups(model, config.weight_decay)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate(update: int, config: TrainConfig) -> float:
    """The learning rate of update `update` (from 0).

    A linear warm-up that starts above zero and meets lr at update warmup_iters, then `schedule` down to min_lr at
    update lr_decay_iters, and min_lr from there on. lr_decay_iters has to be resolved.
    """
    if update < config.warmup_iters:
        return config.lr * (update + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.lr
    if update >= config.lr_decay_iters:
        return config.min_lr
    done = (update - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)  # 0 to 1
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + share * (config.lr - config.min_lr)
