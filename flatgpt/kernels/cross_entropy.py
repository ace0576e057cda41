"""The output head and its cross-entropy in one step, which never holds the logits of a whole batch.

A logit's gradient is known as soon as its row is: softmax minus one-hot. So the forward pass goes through the rows in
chunks, makes logits, turns them into their gradients where they lie, and multiplies these out at once: what is kept for
the backward pass is as large as the hidden states and the matrix. Sizes in the comments as in model.py; N = B T rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows whose logits are there at once, as many as keep the matrix products busy; and bytes of float32 logits that a
# softmax goes through at once: on a CPU they stay in its cache (docs/speed.md).
CHUNK_ROWS = {"cpu": 1024, "cuda": 8192, "mps": 2048}
SOFTMAX_BYTES = {"cpu": 2**23, "cuda": 2**28, "mps": 2**27}
MIN_FUSED_LOGITS = 2**21  # logits of a batch that plain operators are as fast for


def use_fused_loss(rows: int, ids: int) -> bool:
    """Whether fused_loss is the faster way to train on so many rows of logits."""
    return rows * ids > MIN_FUSED_LOGITS and torch.is_grad_enabled()


def fused_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, vocab_size: int, one_kernel: Callable | None = None
) -> Tensor:
    """The mean cross-entropy of the logits x @ weight.T + bias, in nats, a float32 scalar.

    Args:
        x: (N, C) hidden states.
        weight: (V, C), V with the vocabulary's padding, which has no say in the loss.
        bias: (V) or None.
        targets: (N) int64; -1 where there is none to score.
    """
    return _FusedLoss.apply(x, weight, bias, targets, vocab_size, one_kernel)


def fused_loss_outside_graph(device: torch.device) -> Callable:
    """fused_loss for a forward that is compiled: left out of its graph, on CUDA with a kernel for the softmax."""
    one_kernel = torch.compile(_gradient_in_one_kernel, dynamic=False) if device.type == "cuda" else None
    return torch.compiler.disable(partial(fused_loss, one_kernel=one_kernel))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, V, one_kernel):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        N, low, seen = len(x), weight.to(dtype), (targets >= 0)[:, None]
        scored, at = (x * seen).to(dtype), targets.clamp(min=0)[:, None]  # (N, C), (N, 1)
        rows = -(-N // -(-N // CHUNK_ROWS[kind]))  # chunks of equal size, but for the last
        buffer = torch.empty(rows, len(weight), dtype=dtype, device=x.device)
        losses, dx, dweight = torch.empty(N, 1, device=x.device), torch.empty_like(x), torch.zeros_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        # sums over the rows of a chunk can leave float16's range
        unit = 2**10 if dtype == torch.float16 else 1
        inputs = scored / unit if unit > 1 else scored
        for first in range(0, N, rows):
            part = slice(first, first + rows)
            logits = torch.mm(scored[part], low.t(), out=buffer[: len(scored[part])])  # (rows, V)
            if bias is not None:
                logits += bias
            if one_kernel:
                losses[part], gradient = one_kernel(logits, at[part], V)
            else:
                losses[part], gradient = _gradient_in_place(logits, at[part], V)
            dx[part] = gradient @ low
            dweight.add_(gradient.t() @ inputs[part], alpha=unit)
            if bias is not None:
                dbias += (gradient.t() @ seen[part].to(dtype))[:, 0]
        ctx.scored = seen.sum()
        ctx.save_for_backward(dx.mul_(seen), dweight, dbias)
        return (losses * seen).sum() / ctx.scored

    @staticmethod
    def backward(ctx, gradient):
        scale = gradient / ctx.scored
        return *(g if g is None else g.mul_(scale) for g in ctx.saved_tensors), None, None, None


def _gradient_in_place(logits: Tensor, at: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """The losses, (n, 1), of the ids `at`, (n, 1), and the logits' gradients, (n, V padded), where the logits were."""
    n, padded = logits.shape
    rows = min(n, max(1, SOFTMAX_BYTES[logits.device.type] // (4 * padded)))
    # set aside once: memory of this size is given back to the system each time, and finding it anew takes longest
    wide, chances = torch.empty(2, rows, padded, device=logits.device)
    losses = torch.empty(n, 1, device=logits.device)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        f, p, here = wide[: len(at[part])], chances[: len(at[part])], at[part]
        f.copy_(logits[part])
        f[:, V:] = -torch.inf
        torch.softmax(f, -1, out=p)
        # The largest p, at least 1 / V, says the sum of exponentials without another pass. It is added last: large
        # logits would round it away.
        losses[part] = f.amax(-1, keepdim=True) - f.gather(1, here) - p.amax(-1, keepdim=True).log()
        p.scatter_(1, here, p.gather(1, here) - 1)
        logits[part] = p
    return losses, logits


def _gradient_in_one_kernel(logits: Tensor, at: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """The same for a compiler, which fuses it all."""
    column = torch.arange(logits.size(1), device=logits.device)
    log_p = F.log_softmax(torch.where(column < V, logits.float(), -torch.inf), -1)
    return -log_p.gather(1, at), (log_p.exp() - (column == at).float()).type_as(logits)
