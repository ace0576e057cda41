"""Linear layers with a weight layout for decoding, which reads all weights once per token.

Weights are cast, prepacked in oneDNN's blocked format, or quantized to int8. Other operations stay in float32, as under
autocast, so that a prepacked model gives the results of the trained one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError, WriterConfig
from flatgpt.runtime.choices import Choice, choose, has_bfloat16
from flatgpt.runtime.device import DTYPES, DeviceSettings, select_device
from model import GPT

# Layers are timed until their weights have this many elements, which exceed a CPU's cache in either dtype.
TIMED_ELEMENTS = 32_000_000


class CastLinear(nn.Module):
    """nn.Linear that computes in `dtype`, for inputs of any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.set_weight(weight)

    def set_weight(self, weight: Tensor) -> None:
        """Store a weight, (out, in), in the layout for decoding."""
        self.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)  # inductor does not freeze buffers

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias)


class PrepackedLinear(CastLinear):
    """CastLinear on a CPU with the weight in oneDNN's blocked format, which is read at nearly full memory bandwidth.

    A row-major weight reaches half of that (docs/speed.md). torch.compile uses the same operators for frozen weights.
    """

    PREFILL_TOKENS = 512  # the block size is chosen for this many tokens: faster for a prompt, as fast for one token

    def set_weight(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype), self.PREFILL_TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


class Int8Linear(CastLinear):
    """CastLinear with an int8 weight and one scale per output row."""

    GEMV_MAX_TOKENS = 48  # up to this many tokens, torch's int8 kernel for CPUs is faster than dequantizing the weight

    def set_weight(self, weight: Tensor) -> None:
        scale = weight.abs().amax(dim=1).clamp_min(1e-5) / 127  # (out); nonzero for a row of zeros, also in float16
        scale = scale.to(self.dtype)  # before rounding, so that the weight is rounded with the stored scale
        quantized = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(quantized.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        few = x.numel() <= self.GEMV_MAX_TOKENS * x.size(-1)
        if x.device.type == "cpu" and few and x.size(-1) % 16 == 0:  # for other sizes it reads out of bounds
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        elif self.dtype == torch.float16:  # sums of integers times x would exceed its range
            y = F.linear(x, self.weight * self.scale[:, None])
        else:  # on a GPU, torch.compile fuses this into one kernel that reads int8
            y = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def linear_class(device: torch.device, dtype: torch.dtype, compile: bool) -> type[CastLinear]:
    """Return the fastest Linear class for `dtype`. torch.compile does not support oneDNN's blocked format."""
    if compile or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return CastLinear
    onednn = torch.ops.mkldnn
    supported = {torch.bfloat16: onednn._is_mkldnn_bf16_supported, torch.float16: onednn._is_mkldnn_fp16_supported}
    return PrepackedLinear if dtype == torch.float32 or supported[dtype]() else CastLinear


@torch.no_grad()
def prepack(model: GPT, dtype: torch.dtype, quantize: str | None = None, compile: bool = False) -> GPT:
    """Replace the model's Linear layers in place, and return the model. It can no longer be trained or saved.

    Args:
        dtype: dtype of the matrix products. On a CPU, bfloat16 is fastest for int8.
        quantize: "int8": quantize the weights, including the output head's; None: no quantization.
        compile: whether the model will be compiled. The compiler then chooses the layout of the weights.
    """
    device = model.transformer.wte.weight.device
    layout = Int8Linear if quantize == "int8" else linear_class(device, dtype, compile)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, layout(layer.weight, layer.bias, dtype))
    return model


def prepare_for_decoding(config: WriterConfig, model: GPT, compile: bool | None = None) -> DeviceSettings:
    """Choose the dtype and prepack the model in place.

    Args:
        compile: whether to compile the decoding step. None: no; on CUDA, Decoder then captures the eager step. On a
            CPU, compilation is faster only for long int8 texts (docs/speed.md).

    Raises:
        UserError: int8 weights do not support config.dtype or this device.
    """
    dtype, why, on_cpu = config.dtype, {}, model.transformer.wte.weight.device.type == "cpu"
    if config.quantize and not on_cpu:
        raise UserError("quantize = int8 is for CPUs: on a GPU bfloat16 is faster (docs/speed.md); leave out quantize")
    if compile is None and model.transformer.wte.weight.device.type == "cuda":
        compile, why["compile"] = False, "a CUDA graph for each step"
    if on_cpu and config.quantize:
        if dtype == "float16":
            raise UserError("quantize = int8 computes in bfloat16 on a CPU: leave out dtype")
        dtype = "bfloat16"
    elif on_cpu and dtype == "auto":
        dtype, why["dtype"] = faster_decoding_dtype(model, bool(compile))
    settings = select_device(config.device, dtype, compile, why=why)
    prepack(model, settings.dtype, config.quantize, settings.compile)
    if config.quantize:
        settings.why["dtype"] = f"{config.quantize} weights"
    return settings


def faster_decoding_dtype(model: GPT, compile: bool = False) -> Choice:
    """Return the dtype that decodes one token faster on a CPU.

    The result does not depend on the batch size, so that a seed always gives the same text.

    Args:
        model: a model that is not prepacked.
        compile: as in prepack.
    """
    if not has_bfloat16():
        return Choice("float32", "this CPU has no bfloat16")
    config = model.config
    timed, size = [], 0
    for layer in (*model.transformer.h.modules(), model.lm_head):
        if isinstance(layer, nn.Linear) and size < TIMED_ELEMENTS:
            timed.append(layer)
            size += layer.weight.numel()

    def matmuls(dtype: torch.dtype) -> list[Callable]:
        layout = linear_class(torch.device("cpu"), dtype, compile)
        return [partial(layout(layer.weight, layer.bias, dtype), torch.ones(1, layer.in_features)) for layer in timed]

    shape = (
        f", {config.n_layer} layers, {config.n_embd} wide, MLP {config.mlp_ratio:g} times, {config.vocab_size} ids"
        f"{', compiled' * compile}"
    )
    candidates = {name: partial(matmuls, DTYPES[name]) for name in ("float32", "bfloat16")}
    return choose("matmuls of one token", candidates, shape)


def prepacked_bytes(model: GPT) -> int:
    """Return the size of the weights that are read for each token, in bytes."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, CastLinear)]
    return sum(weight.numel() * weight.element_size() for weight in weights)
