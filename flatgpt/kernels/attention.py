"""Scaled dot-product attention with the fastest operators for device, dtype and shapes, and rotary position embedding
(Su et al., "RoFormer", 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig

# Up to this length torch's fused CPU kernel is slower in bfloat16 than plain operators (docs/speed.md).
BF16_CPU_MAX_PLAIN_TOKENS = 512


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, path: str | None = None
) -> Tensor:
    """Compute attention of T queries to S keys. Either T = S, or T = 1 and the query belongs to the last key.

    Args:
        q: queries, (B, H, T, D).
        k, v: keys and values, (B, H, S, D). The result has their dtype.
        mask: bool, broadcastable to (B, H, T, S), true where a key is visible to a query. None: causal, each query
            sees its own key and those before it.
        dropout: probability that an attention weight is dropped.
        path: "manual": manual_attention in float32. In training on a CPU, "fused": torch's kernel, or "plain": plain
            operators. Default: by device, dtype and T.

    Returns:
        (B, H, T, D).
    """
    T, D, on_cpu = q.size(2), q.size(3), q.device.type == "cpu"
    q, causal = q.type_as(k), mask is None and bool(T > 1)  # bool: while a step is traced, sizes are tensors
    # For a single token on a GPU, plain operators are faster with torch.compile.
    plain = T == 1 and torch.compiler.is_compiling()
    if on_cpu:
        small = k.dtype == torch.bfloat16 and T <= BF16_CPU_MAX_PLAIN_TOKENS
        plain = path == "plain" if path and torch.is_grad_enabled() else small
    if path == "manual" or plain:
        if causal:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (T, T)
        # In training on a CPU, float32 scores of bfloat16 queries would make updates 14% slower (docs/speed.md).
        fast = on_cpu and path != "manual" and torch.is_grad_enabled()
        dtype = k.dtype if fast else torch.promote_types(k.dtype, torch.float32)
        return manual_attention(q, k, v, mask, dropout, dtype)
    if D % 8 and T > 1:
        # Fused kernels of GPUs before Ampere need head sizes that are multiples of 8. Zeros do not change the scores.
        q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))  # (B, H, ..., D rounded up)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=1 / math.sqrt(D))
    return y[..., :D]


def manual_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute attention with plain operators. Arguments as in `attention`, but without a mask all keys are visible.

    Args:
        dtype: dtype of the scores and their softmax. Rounding a score of 10 to bfloat16 changes its weight by up to 3%.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(dtype), k.to(dtype)
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, H, T, S): similarity of each query to each key
        if mask is not None:  # on a CPU, adding takes a third less time than masked_fill on the scores
            scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
        weights = F.softmax(scores, dim=-1)  # each row sums to 1
        return F.dropout(weights, dropout).type_as(v) @ v


def attention_steps(path: str, B: int, H: int, T: int, D: int, dtype: torch.dtype, dropout: float) -> list[Callable]:
    """Return a function to time: a forward and backward pass of `attention` with `path`, as in training."""
    qkv = torch.ones(B, T, 3, H, D, dtype=dtype, requires_grad=True)  # as Attention.c_attn computes it
    dy = torch.ones(B, T, H, D, dtype=dtype)

    def step() -> None:
        y = attention(*qkv.transpose(1, 3).unbind(2), dropout=dropout, path=path)  # (B, H, T, D)
        torch.autograd.grad(y.transpose(1, 2), qkv, dy)

    return [step]


Rope = tuple[Tensor, Tensor]  # cosines and sines


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embedding: base 10,000, the first half of D paired with the second."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        half = config.n_embd // config.n_head // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device="cpu") / half)  # (D/2)
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32, device="cpu"), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (context_length, D/2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> Rope:
        """Return cosines and sines, each ([B,] 1, T, D/2), of positions, (T) or (B, T)."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys, (B, H, T, D), by the angles of their positions."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)
