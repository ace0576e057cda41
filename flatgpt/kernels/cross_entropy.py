"""Fused output head and cross-entropy, which never stores the logits of a whole batch.

The gradient of a row's logits depends on that row alone: softmax minus one-hot. The forward pass processes the rows in
chunks. For each chunk it computes the logits, overwrites them with their gradient, and from that computes the gradients
of hidden states and weight, which are kept for the backward pass. N = B * T rows in the comments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows per chunk: enough for efficient matrix products.
CHUNK_ROWS = {"cpu": 1024, "cuda": 8192, "mps": 2048}
# Bytes of float32 logits per softmax: on a CPU they fit into its cache (docs/speed.md).
SOFTMAX_BYTES = {"cpu": 2**23, "cuda": 2**28, "mps": 2**27}
MIN_FUSED_LOGITS = 2**21  # up to this number of logits per batch, plain operators are as fast
MAX_PLAIN_LOGITS = 2**24  # up to this number, which plain operators store in float32, a CPU may be faster with them


def use_fused_loss(rows: int, vocab_size: int, path: str | None = None) -> bool:
    """Return whether to use fused_loss for a training batch of this size.

    Args:
        path: "fused" or "plain": what is faster in training on this CPU. Default: by the number of logits.
    """
    fused = path == "fused" if path else rows * vocab_size > MIN_FUSED_LOGITS
    return fused and torch.is_grad_enabled()


def fused_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocab_size: int,
    adjust_logits: Callable[[Tensor], Tensor] = lambda logits: logits,
    softmax_gradient: Callable | None = None,
) -> Tensor:
    """Compute the mean cross-entropy of adjust_logits(x @ weight.T + bias), in nats, a float32 scalar.

    Args:
        x: (N, C) hidden states.
        weight: (V, C), V with the vocabulary's padding, which does not affect the loss.
        bias: (V) or None.
        targets: (N) int64; -1 is ignored.
        vocab_size: V without the padding.
        adjust_logits: differentiable function of logits (n, vocab_size), which must not modify them in place. It costs
            nothing if it returns its argument.
        softmax_gradient: function that computes losses and gradients of logits. Default: gradient_in_place.
    """
    probe = x.new_zeros(1, vocab_size)
    adjusted = adjust_logits(probe)
    if adjusted.requires_grad:  # it has parameters; only plain operators compute their gradients
        logits = F.linear(x, weight, bias)[:, :vocab_size]
        return F.cross_entropy(adjust_logits(logits).float(), targets, ignore_index=-1)
    adjust = None if adjusted is probe else adjust_logits
    return _FusedLoss.apply(x, weight, bias, targets, vocab_size, adjust, softmax_gradient or gradient_in_place)


def fused_loss_outside_graph(device: torch.device, compile: Callable[[Callable, Callable], Callable]) -> Callable:
    """Return fused_loss for a compiled model: excluded from the graph, and on CUDA with a compiled softmax.

    Args:
        compile: compiles its first argument, and calls its second one if the compiler fails.
    """
    kernel = compile(gradient_in_one_kernel, gradient_in_place) if device.type == "cuda" else None
    return torch.compiler.disable(partial(fused_loss, softmax_gradient=kernel))


def loss_steps(path: str, N: int, C: int, V: int, dtype: torch.dtype) -> list[Callable]:
    """Return a function to time: a forward and backward pass of the head and the loss with `path`, as in training."""
    x, weight, targets = torch.ones(N, C), torch.ones(V, C), torch.zeros(N, dtype=torch.int64)
    inputs = [x.requires_grad_(), weight.requires_grad_()]

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if path == "fused":
                loss = fused_loss(x, weight, None, targets, V)
            else:
                loss = F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)
        torch.autograd.grad(loss, inputs)

    return [step]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, V, adjust, softmax_gradient):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        N, cast_weight, scored = len(x), weight.to(dtype), (targets >= 0)[:, None]
        inputs, ids = (x * scored).to(dtype), targets.clamp(min=0)[:, None]  # (N, C), (N, 1)
        rows = -(-N // -(-N // CHUNK_ROWS[device]))  # chunks of equal size, except for the last
        buffer = torch.empty(rows, len(weight), dtype=dtype, device=x.device)
        losses, dx, dweight = torch.empty(N, 1, device=x.device), torch.empty_like(x), torch.zeros_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        scale = 2**10 if dtype == torch.float16 else 1  # sums over the rows of a chunk can exceed float16's range
        scaled_inputs = inputs / scale if scale > 1 else inputs
        for start in range(0, N, rows):
            chunk = slice(start, start + rows)
            logits = torch.mm(inputs[chunk], cast_weight.t(), out=buffer[: len(inputs[chunk])])  # (rows, V padded)
            if bias is not None:
                logits += bias
            if adjust is None:
                losses[chunk], gradient = softmax_gradient(logits, ids[chunk], V)
            else:
                with torch.enable_grad():
                    raw = logits[:, :V].detach().requires_grad_()
                    adjusted = adjust(raw)
                losses[chunk], gradient = softmax_gradient(adjusted.detach().clone(), ids[chunk], V)
                logits[:, :V] = torch.autograd.grad(adjusted, raw, gradient)[0]
                logits[:, V:] = 0
                gradient = logits
            dx[chunk] = gradient @ cast_weight
            dweight.add_(gradient.t() @ scaled_inputs[chunk], alpha=scale)
            if bias is not None:
                dbias += (gradient.t() @ scored[chunk].to(dtype))[:, 0]
        ctx.count = scored.sum()
        ctx.save_for_backward(dx.mul_(scored), dweight, dbias)
        return (losses * scored).sum() / ctx.count

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would give zeros in some cases
            raise RuntimeError("the fused loss has no second derivative: use F.cross_entropy of the model's logits")
        scale = gradient / ctx.count
        return *(g if g is None else g.mul_(scale) for g in ctx.saved_tensors), None, None, None, None


def gradient_in_place(logits: Tensor, ids: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Return losses (n, 1) of target ids (n, 1), and the gradient of logits (n, V padded), which overwrites them."""
    n, padded = logits.shape
    rows = min(n, max(1, SOFTMAX_BYTES[logits.device.type] // (4 * padded)))
    # Allocate once: blocks of this size are returned to the system when freed, and allocating them is slow.
    logits_buffer, probs_buffer = torch.empty(2, rows, padded, device=logits.device)
    losses = torch.empty(n, 1, device=logits.device)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        part_ids = ids[part]
        z, p = logits_buffer[: len(part_ids)], probs_buffer[: len(part_ids)]
        z.copy_(logits[part])
        z[:, V:] = -torch.inf
        torch.softmax(z, -1, out=p)
        # -log p[target] = max(z) - z[target] - log(max(p)): log-sum-exp without another pass. The last term, at most
        # log(V), is added last, so that large logits do not round it away.
        losses[part] = z.amax(-1, keepdim=True) - z.gather(1, part_ids) - p.amax(-1, keepdim=True).log()
        p.scatter_(1, part_ids, p.gather(1, part_ids) - 1)
        logits[part] = p
    return losses, logits


def gradient_in_one_kernel(logits: Tensor, ids: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Like gradient_in_place, but not in place and with operators that torch.compile fuses."""
    column = torch.arange(logits.size(1), device=logits.device)
    log_p = F.log_softmax(torch.where(column < V, logits.float(), -torch.inf), -1)
    return -log_p.gather(1, ids), (log_p.exp() - (column == ids).float()).type_as(logits)
