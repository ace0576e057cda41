"""Muon: steps along the orthogonal matrix nearest to the momentum of a matrix's gradients.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. Matrices of one
shape are iterated as one batch, which is faster for small ones (docs/speed.md) than torch.optim.Muon's loop. Steps are
scaled as in "Muon is scalable for LLM training" (Liu et al., 2025) to the usual size of AdamW's, so that learning rate
and weight decay mean the same for both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

A, B, C, ITERATIONS = 3.4445, -4.7750, 2.0315, 5  # Jordan et al.'s; singular values end between 0.7 and 1.2
RMS = 0.2  # root mean square of a step's entries, in learning rates


class Muon(torch.optim.Optimizer):
    """Muon for two-dimensional parameters.

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
        shapes: dict[tuple, list[tuple[Tensor, dict]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    key = p.size(0) // group["parts"], p.size(1), group["lr"], group["weight_decay"], group["momentum"]
                    shapes.setdefault(key, []).append(p)
        for (rows, columns, lr, weight_decay, momentum), params in shapes.items():
            grads = torch.cat([p.grad.view(-1, rows, columns) for p in params])  # (n, rows, columns)
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                state.setdefault("momentum_buffer", torch.zeros_like(p))
            old_mean = torch.cat([state["momentum_buffer"].view(-1, rows, columns) for state in states])
            mean = old_mean.lerp(grads, 1 - momentum)
            lookahead, decay = grads.lerp(mean, momentum), 1 - lr * weight_decay
            if self.found_inf is not None:
                skip = self.found_inf > 0
                mean, lookahead = torch.where(skip, old_mean, mean), torch.where(skip, 0, lookahead)
                decay = torch.where(skip, 1, decay)
            steps = orthogonalized(lookahead) * (-lr * RMS * math.sqrt(max(rows, columns)))
            first = 0
            for p, state in zip(params, states, strict=True):
                last = first + p.size(0) // rows
                state["momentum_buffer"].copy_(mean[first:last].view_as(p))
                p.mul_(decay).add_(steps[first:last].reshape(p.shape))
                first = last


def orthogonalized(x: Tensor) -> Tensor:
    """Return matrices (n, rows, columns) with singular values near 1, by Newton-Schulz iterations in bfloat16."""
    x = x.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values are at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x
