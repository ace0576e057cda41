"""Linear layers with a weight layout for decoding, which reads all weights once per token.

Weights are cast, prepacked in oneDNN's blocked format, or quantized to int8. Other operations stay in float32, as under
autocast, so that a prepacked model gives the results of the trained one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError, WriterConfig
from flatgpt.runtime.choices import Choice, choose, has_bfloat16
from flatgpt.runtime.device import DTYPES, DeviceSettings, select_device
from model import GPT

# The blocks' layers are timed until their weights have this many elements. With the head's share, they exceed a CPU's
# cache in either dtype.
TIMED_ELEMENTS = 24_000_000


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


class TransposedLinear(CastLinear):
    """CastLinear with the weight stored as (in, out). Some CPUs multiply a single token faster by it."""

    def set_weight(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight.to(self.dtype).t().contiguous().t(), requires_grad=False)


class PrepackedLinear(CastLinear):
    """CastLinear on a CPU with the weight in oneDNN's blocked format, which is read at nearly full memory bandwidth.

    A row-major weight reaches half of that (docs/speed.md). torch.compile uses the same operators for frozen weights.
    """

    PREFILL_TOKENS = 512  # the block size is chosen for this many tokens: faster for a prompt, as fast for one token

    def set_weight(self, weight: Tensor) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype), self.PREFILL_TOKENS)
        self.register_buffer("weight", packed)

    def forward(self, x: Tensor) -> Tensor:
        return _traceable(_onednn_linear)(x.to(self.dtype), self.weight, self.bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045 - for torch.jit.script
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _vnni_linear(x: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Return float32 products of uint8 inputs, with scale 1 and zero point 128, and a prepacked int8 weight."""
    f32 = torch.float32
    return torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, weight, scale, zeros, None, 1.0, 0, f32, "none", [], "")


_scripted = cache(torch.jit.script)


def _traceable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function, or its TorchScript while a step is traced: tracing does not support empty lists."""
    return _scripted(function) if torch.jit.is_tracing() else function


def _as_traced(layer: nn.Module, x: Tensor) -> nn.Module:
    """Return the layer as a step of Decoder runs it: traced, so that its operators take no time in Python."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # torch.jit is deprecated
        warnings.simplefilter("ignore")
        return torch.jit.trace(layer, x, check_trace=False)
    return layer


def quantize_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a weight, (out, in), rounded to int8, and the scales of its rows, (out), in `dtype`."""
    scale = weight.abs().amax(dim=1).clamp_min(1e-5) / 127  # nonzero for a row of zeros
    scale = scale.to(dtype)  # before rounding, so that the weight is rounded with the stored scale
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(CastLinear):
    """CastLinear on a CPU with an int8 weight and one scale per output row."""

    GEMV_MAX_TOKENS = 48  # up to this many tokens, torch's int8 kernel for CPUs is faster than dequantizing the weight

    def set_weight(self, weight: Tensor) -> None:
        quantized, scale = quantize_rows(weight, self.dtype)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        few = x.numel() <= self.GEMV_MAX_TOKENS * x.size(-1)
        if few and x.size(-1) % 16 == 0:  # for other sizes it reads out of bounds
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class VNNILinear(CastLinear):
    """Like Int8Linear, but inputs are rounded to int8 too, one scale per token, for a CPU's int8 instructions."""

    def set_weight(self, weight: Tensor) -> None:
        quantized, scale = quantize_rows(weight, torch.float32)
        self.register_buffer("weight", torch.ops.onednn.qlinear_prepack(quantized, None))
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).float()
        scale = flat.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
        inputs = (flat / scale).round_().add_(128).to(torch.uint8)
        y = _traceable(_vnni_linear)(inputs, self.weight, self.scale, self.zeros).mul_(scale)
        y = y.to(self.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def linear_classes(
    device: torch.device, dtype: torch.dtype, quantize: str | None = None, compile: bool = False
) -> dict[str, type[CastLinear]]:
    """Return the Linear classes for `dtype` or int8 by name, the default first.

    torch.compile does not support oneDNN's formats and chooses the layout itself.
    """
    onednn, eager = torch.ops.mkldnn, device.type == "cpu" and not compile
    available = eager and torch.backends.mkldnn.is_available()
    if quantize == "int8":
        classes = {"bfloat16 inputs": Int8Linear}
        return classes | ({"int8 inputs": VNNILinear} if available and torch.cpu._is_vnni_supported() else {})
    if not eager:
        return {"row-major": CastLinear}
    supported = {torch.bfloat16: onednn._is_mkldnn_bf16_supported, torch.float16: onednn._is_mkldnn_fp16_supported}
    prepacked = available and (dtype == torch.float32 or supported[dtype]())
    classes = {"prepacked": PrepackedLinear} if prepacked else {}
    return classes | {"row-major": CastLinear, "transposed": TransposedLinear}


@torch.no_grad()
def prepack(
    model: GPT, dtype: torch.dtype, quantize: str | None = None, compile: bool = False, layout: str | None = None
) -> GPT:
    """Replace the model's Linear layers in place, and return the model. It can no longer be trained or saved.

    Args:
        dtype: dtype of the matrix products. On a CPU, bfloat16 is fastest for int8.
        quantize: "int8": quantize the weights, including the output head's; None: no quantization.
        compile: whether the model will be compiled. The compiler then chooses the layout of the weights.
        layout: the name of one of linear_classes. None: the default.
    """
    classes = linear_classes(model.transformer.wte.weight.device, dtype, quantize, compile)
    linear = classes[layout or next(iter(classes))]
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, linear(layer.weight, layer.bias, dtype))
    return model


def prepare_for_decoding(
    config: WriterConfig, model: GPT, compile: bool | None = None, rows: int = 1
) -> DeviceSettings:
    """Choose the dtype and prepack the model in place.

    Args:
        compile: whether to compile the decoding step. None: no; on CUDA, Decoder then captures the eager step. On a
            CPU, compilation is faster only for long int8 texts (docs/speed.md).
        rows: number of texts that are generated at once.

    Raises:
        UserError: int8 weights do not support config.dtype or this device.
    """
    dtype, why, paths, on_cpu = config.dtype, {}, {}, model.transformer.wte.weight.device.type == "cpu"
    if config.quantize and not on_cpu:
        raise UserError("quantize = int8 is for CPUs: on a GPU bfloat16 is faster (docs/speed.md); leave out quantize")
    if compile is None and model.transformer.wte.weight.device.type == "cuda":
        compile, why["compile"] = False, "a CUDA graph for each step"
    if on_cpu and config.quantize:
        if dtype == "float16":
            raise UserError("quantize = int8 computes in bfloat16 on a CPU: leave out dtype")
        dtype = "bfloat16"
    if on_cpu:
        faster, layout = choose_linear(model, dtype, config.quantize, bool(compile), rows)
        if dtype == "auto":
            dtype, why["dtype"] = faster.name, faster.why or "this CPU has no bfloat16"
        paths["linear"], why["linear"] = layout
    settings = select_device(config.device, dtype, compile, why=why)
    prepack(model, settings.dtype, config.quantize, settings.compile, paths.get("linear"))
    if config.quantize:
        settings.why["dtype"] = f"{config.quantize} weights"
    return dataclasses.replace(settings, paths=paths)


def choose_linear(
    model: GPT, dtype: str, quantize: str | None = None, compile: bool = False, rows: int = 1
) -> tuple[Choice, Choice]:
    """Return the dtype and the layout that decode fastest on a CPU.

    The dtype does not depend on the number of texts, so that a seed gives the same text, to rounding.

    Args:
        model: a model that is not prepacked.
        dtype: `auto`: the faster of float32 and bfloat16.
        quantize, compile: as in prepack.
        rows: number of texts that are generated at once. The layout is timed with 8 tokens if there are several.
    """
    config, timed, size, total = model.config, [], 0, 0
    for layer in model.transformer.h.modules():
        if isinstance(layer, nn.Linear):
            if size < TIMED_ELEMENTS:
                timed.append((layer.weight, layer.bias))
                size += layer.weight.numel()
            total += layer.weight.numel()
    # As many of the head's rows, so that it weighs as much as in a step. It is larger than a cache, the others are not.
    rows_of_head = -(-len(model.lm_head.weight) * size // total)
    timed.append((model.lm_head.weight[:rows_of_head], None))

    @torch.no_grad()
    def matmuls(kind: type[CastLinear], dtype: str, tokens: int) -> list[Callable]:
        pairs = [(kind(*pair, DTYPES[dtype]), torch.ones(1, tokens, pair[0].size(1))) for pair in timed]
        return [partial(layer if compile else _as_traced(layer, x), x) for layer, x in pairs]

    shape = (
        f", {config.n_layer} layers, {config.n_embd} wide, MLP {config.mlp_ratio:g} times, {config.vocab_size} ids"
        f"{', compiled' * compile}"
    )

    def layout(dtype: str, tokens: int) -> tuple[Choice, type[CastLinear]]:
        kinds = linear_classes(torch.device("cpu"), DTYPES[dtype], quantize, compile)
        candidates = {name: partial(matmuls, kind, dtype, tokens) for name, kind in kinds.items()}
        label = f"{quantize or dtype} matmuls of {tokens} token{'s' * (tokens > 1)}"
        choice = choose(label, candidates, shape)
        return choice, kinds[choice.name]

    names = (dtype,) if dtype != "auto" else ("float32", "bfloat16")[: 1 + has_bfloat16()]
    dtypes = {name: lambda name=name: matmuls(layout(name, 1)[1], name, 1) for name in names}
    faster = choose("matmuls of 1 token", dtypes, shape)
    return faster, layout(faster.name, 8 if rows > 1 else 1)[0]
