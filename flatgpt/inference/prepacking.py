"""Linear layers whose weights are laid out for decoding, where each token reads all of them once.

Weights are cast, prepacked in oneDNN's blocks, or quantised to int8. What is between the Linear layers stays float32,
as under autocast, so that a prepacked model computes what the trained one does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError, WriterConfig
from flatgpt.runtime.device import DeviceSettings, cpu_name, select_device
from flatgpt.runtime.precision import cached_choice, faster_dtype
from model import GPT

# Layers are timed until their weights have this many elements: in both precisions more than a CPU's cache holds.
TIMED_ELEMENTS = 32_000_000


class CastLinear(nn.Module):
    """nn.Linear in `dtype`, whatever the precision of its input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.store(weight)

    def store(self, weight: Tensor) -> None:
        """Set `weight` to its layout for decoding."""
        self.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)  # inductor freezes no buffers

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias)


class PrepackedLinear(CastLinear):
    """CastLinear on a CPU, its weight in the blocks that oneDNN reads in sequence, at nearly the memory's bandwidth.

    Plain rows reach half of that (docs/speed.md). torch.compile uses the same operators for frozen weights.
    """

    PREFILL_TOKENS = 512  # blocks for products of so many tokens: as fast for one token, and faster for a prompt

    def store(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype), self.PREFILL_TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


class Int8Linear(CastLinear):
    """CastLinear with an int8 weight and a scale for each output row."""

    GEMV_MAX_TOKENS = 48  # up to so many tokens torch's CPU kernel for int8 is faster than a dequantised weight

    def store(self, weight: Tensor) -> None:
        scale = weight.abs().amax(dim=1).clamp_min(1e-5) / 127  # (out); not 0 for a row of zeros, in float16 either
        scale = scale.to(self.dtype)  # before the weight is rounded, so that the rounding fits the stored scale
        quantized = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(quantized.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        few = x.numel() <= self.GEMV_MAX_TOKENS * x.size(-1)
        if x.device.type == "cpu" and few and x.size(-1) % 16 == 0:  # with other sizes it reads beyond the rows
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:  # on a GPU the compiler makes one kernel of this, which reads int8
            y = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def linear_class(device: torch.device, dtype: torch.dtype, compile: bool) -> type[CastLinear]:
    """Return the Linear layer that multiplies fastest in `dtype`. torch.compile does not accept oneDNN's blocks."""
    if compile or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return CastLinear
    onednn = torch.ops.mkldnn
    needs = {torch.bfloat16: onednn._is_mkldnn_bf16_supported, torch.float16: onednn._is_mkldnn_fp16_supported}
    return PrepackedLinear if dtype == torch.float32 or needs[dtype]() else CastLinear


@torch.no_grad()
def prepack(model: GPT, dtype: torch.dtype, quantize: str | None = None, compile: bool = False) -> GPT:
    """Replace the model's Linear layers, in place. Afterwards it can only compute, not be trained or saved.

    Args:
        dtype: of the matrix products. On a CPU bfloat16 is fastest for int8.
        quantize: "int8": weights of 8 bits, the head's too; None: none.
        compile: the model will be compiled. The compiler lays out weights itself.

    Returns:
        the model.
    """
    device = model.transformer.wte.weight.device
    layout = Int8Linear if quantize == "int8" else linear_class(device, dtype, compile)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, layout(layer.weight, layer.bias, dtype))
    return model


def prepare_for_decoding(config: WriterConfig, model: GPT, compile: bool | None = None) -> DeviceSettings:
    """Choose the precision, and prepack the model, in place.

    Args:
        compile: whether to compile decoding steps. None: on CUDA only. On a CPU it is faster for long int8 texts only
            (docs/speed.md).

    Raises:
        UserError: int8 weights cannot be multiplied in config.dtype on this device.
    """
    dtype, why, on_cpu = config.dtype, {}, model.transformer.wte.weight.device.type == "cpu"
    if on_cpu and config.quantize:
        if dtype == "float16":
            raise UserError("quantize = int8 multiplies in bfloat16 on a CPU: leave out dtype")
        dtype = "bfloat16"
    elif on_cpu and dtype == "auto":
        dtype, why["dtype"] = faster_decoding_dtype(model, bool(compile))
    settings = select_device(config.device, dtype, compile, why=why)
    prepack(model, settings.dtype, config.quantize, settings.compile)
    if config.quantize:
        settings.why["dtype"] = f"{config.quantize} weights"
    return settings


def faster_decoding_dtype(model: GPT, compile: bool = False) -> tuple[str, str]:
    """The precision in which a CPU decodes one token faster, and the measured speeds, as text.

    It is measured once and cached, so that a seed gives the same text the next time. For the same reason it does not
    depend on the batch size.

    Args:
        model: a model that is not prepacked yet.
        compile: as in prepack.
    """
    config = model.config
    timed, size = [], 0
    for layer in (*model.transformer.h.modules(), model.lm_head):
        if isinstance(layer, nn.Linear) and size < TIMED_ELEMENTS:
            timed.append(layer)
            size += layer.weight.numel()

    def matmuls(dtype: torch.dtype) -> list[Callable]:
        layout = linear_class(torch.device("cpu"), dtype, compile)
        return [partial(layout(layer.weight, layer.bias, dtype), torch.ones(1, layer.in_features)) for layer in timed]

    key = (
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: {config.n_layer} layers, {config.n_embd} wide, MLP {config.mlp_ratio:g} times, "
        f"{config.vocab_size} ids{', compiled' * compile}"
    )
    return cached_choice(key, lambda: faster_dtype("matmuls of one token", 2 * size, matmuls))


def prepacked_bytes(model: GPT) -> int:
    """Bytes of the weights that are read for each token."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, CastLinear)]
    return sum(weight.numel() * weight.element_size() for weight in weights)
