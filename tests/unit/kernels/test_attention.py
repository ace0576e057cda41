"""Attention and rotary positions against loops, complex numbers and torch's kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from random_models import SMALL

from flatgpt.kernels.attention import BF16_CPU_MAX_PLAIN_TOKENS, RotaryEmbedding, attention, rotate


def qkv(*shape: int) -> torch.Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible) -> torch.Tensor:
    """Attention, one query at a time; visible(b, t) gives the keys that it sees."""
    y = torch.zeros_like(q)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = visible(b, t)
        weights = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(q.size(-1))) for s in keys]
        y[b, h, t] = sum(w / sum(weights) * v[b, h, s] for w, s in zip(weights, keys, strict=True))
    return y


@pytest.mark.parametrize("path", [None, "manual", "fused", "plain"])
@pytest.mark.parametrize("D", [2, 6, 8])
@pytest.mark.parametrize("case", ["causal", "last token", "mask"])
def test_attention_equals_a_loop(case, D, path):
    q, k, v = qkv(2, 3, 5, D).double()
    q = q if case == "causal" else q[:, :, -1:]
    mask = None
    if case == "mask":  # row 1 sees two keys
        mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
        mask[1, ..., 2:] = False
    keys = {"causal": lambda b, t: range(t + 1), "last token": lambda b, t: range(5)}
    expected = loop(q, k, v, keys.get(case, lambda b, t: range((5, 2)[b])))
    torch.testing.assert_close(attention(q, k, v, mask, path=path), expected)
    assert attention(q.bfloat16(), k.float(), v.float(), mask, path=path).dtype == torch.float32  # the cache's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("autocast", [False, True])
def test_plain_operators_are_as_exact_as_the_fused_kernel(queries, dtype, autocast):
    """Against float64, with scores of 30, which bfloat16 would round to eighths; and of 1e6, beyond float16."""
    q, k, v = qkv(2, 2, 64, 16).to(dtype)
    q, k = q[:, :, -queries:] * 3, k * 3
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=queries > 1)
    with torch.autocast("cpu", dtype, enabled=autocast):
        fused = F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)
        plain = [attention(q, k, v, path="manual")]
        with torch.no_grad():
            plain.append(attention(q, k, v))
    for found in plain:
        assert found.dtype == dtype
        assert (found - expected).norm() < 1.5 * (fused - expected).norm()
    assert attention(q * 200, k * 200, v, path="manual").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_kernel_equals_plain_operators(dtype, monkeypatch):
    """Gradients too. The kernel sees 64 channels for a head of 57; short bf16 texts on a CPU do not use it."""
    seen = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: seen.append(q.shape) or real(q, *a, **k))
    for T in (5, BF16_CPU_MAX_PLAIN_TOKENS + 1):
        inputs = qkv(1, 2, T, 57).to(dtype).requires_grad_()
        results = []
        for manual in (False, True):
            y = attention(*inputs, path="manual" if manual else None)
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        for fused, plain in zip(*results, strict=True):
            assert (fused - plain).abs().max() < (1e-4 if dtype == torch.float32 else 0.03) * plain.abs().max()
    lengths = [5] * (dtype == torch.float32) + [BF16_CPU_MAX_PLAIN_TOKENS + 1]
    assert seen == [(1, 2, length, 64) for length in lengths]


@pytest.mark.parametrize("per_row", [False, True])
def test_rope_multiplies_complex_numbers(per_row):
    """RoFormer's definition: the pair (x_j, x_j+D/2) as a complex number, times exp(i position / 10,000^(2j/D))."""
    x = qkv(2, 3, 5, 16)[0]
    pairs = torch.complex(x[..., :8], x[..., 8:]).to(torch.complex128)
    angle = torch.outer(torch.arange(7, 12).double(), 10_000 ** (-2 * torch.arange(8).double() / 16))
    rotated = pairs * torch.polar(torch.ones_like(angle), angle)
    positions = torch.arange(7, 12).expand(2, 5) if per_row else torch.arange(7, 12)
    rope = RotaryEmbedding(SMALL)(positions)
    torch.testing.assert_close(rotate(x, rope), torch.cat((rotated.real, rotated.imag), -1).float(), rtol=0, atol=1e-5)
    assert rotate(x.bfloat16(), rope).dtype == torch.bfloat16
