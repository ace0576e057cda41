"""Linear layers whose weights are laid out for decoding, where each token reads all of them once.

Weights are cast, prepacked in oneDNN's blocks, or quantised to int8. What is between the Linear layers stays float32,
as under autocast, so that a prepacked model computes what the trained one does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatgpt.runtime.device import cpu_name
from flatgpt.runtime.precision import cached_choice, faster_dtype
from model import GPT

# Layers are timed until their weights have this many elements: in both precisions more than a CPU's cache holds.
TIMED_ELEMENTS = 32_000_000


class CastLinear(nn.Module):
    """nn.Linear in `dtype`, whatever the precision of its input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)  # inductor freezes parameters, not buffers
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias)


class PrepackedLinear(nn.Module):
    """CastLinear on a CPU, its weight in the blocks that oneDNN reads in sequence, at nearly the memory's bandwidth.

    Plain rows reach half of that (docs/speed.md). torch.compile uses the same operators for frozen weights.
    """

    PREFILL_TOKENS = 512  # blocks for products of so many tokens: as fast for one token, and faster for a prompt

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), self.PREFILL_TOKENS)
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")

    @staticmethod
    def supports(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether oneDNN is available and multiplies in `dtype` on this processor."""
        mkldnn = torch.ops.mkldnn
        if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(mkldnn, "_linear_pointwise"):
            return False
        if dtype == torch.bfloat16:
            return mkldnn._is_mkldnn_bf16_supported()
        return dtype == torch.float32 or (dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported())


class Int8Linear(nn.Module):
    """nn.Linear with an int8 weight and a scale for each output row; it multiplies in `dtype`."""

    GEMV_MAX_TOKENS = 48  # up to so many tokens torch's CPU kernel for int8 is faster than a dequantised weight

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        scale = weight.abs().amax(dim=1).clamp_min(1e-5) / 127  # (out); not 0 for a row of zeros, in float16 either
        scale = scale.to(dtype)  # before the weight is rounded, so that the rounding fits the stored scale
        quantized = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(quantized.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        few = x.numel() <= self.GEMV_MAX_TOKENS * x.size(-1)
        if x.device.type == "cpu" and few and x.size(-1) % 16 == 0:  # with other sizes it reads beyond the rows
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:  # on a GPU the compiler makes one kernel of this, which reads int8
            y = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def prepack(model: GPT, dtype: torch.dtype, quantize: str | None = None, compile: bool = False) -> GPT:
    """Replace the model's Linear layers, in place. Afterwards it can only compute, not be trained or saved.

    Args:
        dtype: of the matrix products. On a CPU, int8's are always in bfloat16.
        quantize: "int8": weights of 8 bits, the head's too; None: none.
        compile: the model will be compiled. The compiler lays out weights itself and does not accept oneDNN's blocks.

    Returns:
        the model.
    """
    device = model.transformer.wte.weight.device
    if quantize == "int8":
        layout, dtype = Int8Linear, torch.bfloat16 if device.type == "cpu" else dtype
    else:
        layout = _layout(device, dtype, compile)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, layout(layer.weight, layer.bias, dtype))
    return model


def _layout(device: torch.device, dtype: torch.dtype, compile: bool) -> type[CastLinear] | type[PrepackedLinear]:
    return PrepackedLinear if PrepackedLinear.supports(device, dtype) and not compile else CastLinear


def faster_decoding_dtype(model: GPT, compile: bool = False) -> tuple[str, str]:
    """The precision in which a CPU decodes one token faster, and the measured speeds, as text.

    It is measured once and cached, so that a seed gives the same text the next time. For the same reason it does not
    depend on the batch size.

    Args:
        model: a model that is not prepacked yet.
        compile: as in prepack.
    """
    config = model.config
    layers = [layer for layer in model.transformer.h.modules() if isinstance(layer, nn.Linear)]
    timed, size = defaultdict(list), 0  # by shape
    for layer in (*layers, model.lm_head):
        timed[layer.weight.shape].append(layer)
        size += layer.weight.numel()
        if size >= TIMED_ELEMENTS:
            break

    def matmuls(dtype: torch.dtype) -> list[list[Callable]]:
        layout = _layout(torch.device("cpu"), dtype, compile)
        return [
            [partial(layout(layer.weight, layer.bias, dtype), torch.ones(1, 1, shape[1])) for layer in same_shape]
            for shape, same_shape in timed.items()
        ]

    key = (
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: {config.n_layer} layers, {config.n_embd} wide, MLP {config.mlp_ratio:g} times, "
        f"{config.vocab_size} ids{', compiled' * compile}"
    )
    return cached_choice(key, lambda: faster_dtype("matmuls of one token", 2 * size, matmuls))


def prepacked_bytes(model: GPT) -> int:
    """Bytes of the weights that are read for each token."""
    layers = [layer for layer in model.modules() if isinstance(layer, CastLinear | PrepackedLinear | Int8Linear)]
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
