"""Muon: steps for matrices along the orthogonal matrix nearest to the gradients' mean.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. All matrices of one shape go through its
iteration together, which suits small ones (docs/speed.md); torch.optim.Muon takes one after the other. Step sizes are
Moonlight's (Liu et al., "Muon is scalable for LLM training", 2025): as large as AdamW's usually are, so that learning
rate and weight decay mean the same for both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

A, B, C, ITERATIONS = 3.4445, -4.7750, 2.0315, 5  # Jordan's: singular values come to between 0.7 and 1.2
RMS = 0.2  # of an entry of a step, in learning rates


class Muon(torch.optim.Optimizer):
    """For matrices alone, nothing of it depends on what is in them.

    Args:
        params: groups; `parts` of one says how many matrices lie below each other in each of its parameters (3 where
            those of queries, keys and values do): each is one of its own.
        momentum: decay of the mean of the gradients; the step looks ahead by it (Nesterov).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})
        self.found_inf: Tensor | None = None  # where 1, a step changes nothing, and nobody waits to know

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients that are there."""
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
            before = torch.cat([state["momentum_buffer"].view(-1, rows, columns) for state in states])
            mean = before.lerp(grads, 1 - momentum)
            ahead, decay = grads.lerp(mean, momentum), 1 - lr * weight_decay
            if self.found_inf is not None:
                skip = self.found_inf > 0
                mean, ahead = torch.where(skip, before, mean), torch.where(skip, 0, ahead)
                decay = torch.where(skip, 1, decay)
            steps = orthogonalized(ahead) * (-lr * RMS * math.sqrt(max(rows, columns)))
            first = 0
            for p, state in zip(params, states, strict=True):
                last = first + p.size(0) // rows
                state["momentum_buffer"].copy_(mean[first:last].view_as(p))
                p.mul_(decay).add_(steps[first:last].reshape(p.shape))
                first = last


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1 by Newton and Schulz's iteration.

    In bfloat16, where it converges all the same.
    """
    x = x.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # none is above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x
