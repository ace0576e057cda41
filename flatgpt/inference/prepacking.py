"""A model's Linear layers, laid out to be read once per token: in another precision, in blocks, or as int8.

What is between them stays float32, as under autocast, so that a packed model computes what the trained one does.
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

# Matrices are timed until they have this many elements. In both precisions they are larger than a CPU's cache.
TIMED_ELEMENTS = 32_000_000


class CastLinear(nn.Module):
    """nn.Linear in `dtype`, whatever comes in."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)  # inductor freezes parameters, not buffers
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias)


class PrepackedLinear(nn.Module):
    """The same on a CPU, the matrix in the blocks that oneDNN reads one after the other: near to what memory gives.

    Plain rows reach half of that (docs/speed.md). These are the operators that torch.compile takes for frozen weights.
    """

    PREFILL_TOKENS = 512  # laid out for products of so many tokens: for one as fast, and faster for a prompt

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), self.PREFILL_TOKENS)
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")

    @staticmethod
    def supports(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether oneDNN is there, and this processor computes in `dtype`."""
        if device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        mkldnn = torch.ops.mkldnn
        if not hasattr(mkldnn, "_linear_pointwise"):
            return False
        return (
            dtype == torch.float32
            or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
            or (dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported())
        )


class Int8Linear(nn.Module):
    """nn.Linear with its matrix in int8 and a scale for each output row; the products take inputs in `dtype`."""

    GEMV_MAX_TOKENS = (
        48  # tokens for which torch's kernel on CPUs is faster than products with the matrix made whole again
    )

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        scale = weight.abs().amax(dim=1).clamp_min(1e-5) / 127  # (out); a row of zeros has one too, in float16 as well
        scale = scale.to(dtype)  # first, so that what is rounded to whole numbers fits the scale as it is kept
        quantized = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(quantized.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        few = x.numel() <= self.GEMV_MAX_TOKENS * x.size(-1)
        if x.device.type == "cpu" and few and x.size(-1) % 16 == 0:  # with others it reads beyond the rows
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:  # compiled on a GPU, this becomes one kernel that reads int8
            y = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def prepack(model: GPT, dtype: torch.dtype, quantize: str | None = None, compile: bool = False) -> GPT:
    """Exchange the model's Linear layers, in place: from then on it can compute only, not be trained, saved or counted.

    Args:
        dtype: of the matrix products. Int8's kernel on CPUs takes bfloat16 only.
        quantize: `int8`: weights of 8 bits, the head's too; None: none.
        compile: the compiler will see it; it lays out weights by itself, and cannot look into oneDNN's blocks.

    Returns:
        the model, its head a layer of its own.
    """
    device = model.transformer.wte.weight.device
    if quantize == "int8":
        kind, dtype = Int8Linear, torch.bfloat16 if device.type == "cpu" else dtype
    else:
        kind = _layout(device, dtype, compile)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, kind(layer.weight, layer.bias, dtype))
    return model


def _layout(device: torch.device, dtype: torch.dtype, compile: bool) -> type[CastLinear] | type[PrepackedLinear]:
    return PrepackedLinear if PrepackedLinear.supports(device, dtype) and not compile else CastLinear


def faster_decoding_dtype(model: GPT, compile: bool = False) -> tuple[str, str]:
    """The precision in which a CPU decodes one token faster, and the measured speeds, as text.

    It is measured once and cached, so that a seed gives the same text the next time. For the same reason it does not
    depend on the batch size.

    Args:
        model: a model that is not packed yet.
        compile: as prepack takes it.
    """
    c = model.config
    layers = [layer for layer in model.transformer.h.modules() if isinstance(layer, nn.Linear)]
    timed, size = defaultdict(list), 0  # by shape
    for layer in (*layers, model.lm_head):
        timed[layer.weight.shape].append(layer)
        size += layer.weight.numel()
        if size >= TIMED_ELEMENTS:
            break

    def matmuls(dtype: torch.dtype) -> list[list[Callable]]:
        kind = _layout(torch.device("cpu"), dtype, compile)
        inputs = {shape: torch.ones(1, 1, shape[1]) for shape in timed}
        return [
            [partial(kind(layer.weight, layer.bias, dtype), inputs[shape]) for layer in same]
            for shape, same in timed.items()
        ]

    key = (
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: {c.n_layer} layers, {c.n_embd} wide, MLP {c.mlp_ratio:g} times, "
        f"{c.vocab_size} ids{', compiled' * compile}"
    )
    return cached_choice(key, lambda: faster_dtype("matmuls of one token", 2 * size, matmuls))


def prepacked_bytes(model: GPT) -> int:
    """Bytes of the matrices that each token's products read."""
    layers = [layer for layer in model.modules() if isinstance(layer, CastLinear | PrepackedLinear | Int8Linear)]
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
