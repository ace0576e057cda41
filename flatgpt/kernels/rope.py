"""Rotary position embedding (Su et al., "RoFormer", 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from config import ModelConfig

Rope = tuple[Tensor, Tensor]  # cosines and sines


class RotaryEmbedding(nn.Module):
    """Angles of positions: base 10,000, the first half of D paired with the second."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        half = config.n_embd // config.n_head // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device="cpu") / half)  # (D/2)
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32, device="cpu"), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context_length, D/2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> Rope:
        """Positions (T) or (B, T) -> cosines and sines of their angles, ([B,] 1, T, D/2): the same for all heads."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys, (B, H, T, D), by the angles of their positions."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)
