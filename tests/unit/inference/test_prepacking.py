"""prepacking.py against torch's plain products in float32, the trained model, and the same under autocast."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_models import random_ids, small_model

import train
from config import InferConfig, PrepareConfig, TrainConfig, UserError, run_dir
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.data.prepare import prepare
from flatgpt.evaluation.metrics import eval_batches, mean_loss
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import (
    CastLinear,
    Int8Linear,
    PrepackedLinear,
    TransposedLinear,
    VNNILinear,
    linear_classes,
    prepack,
    prepare_for_decoding,
)
from flatgpt.interop.loading import find, load
from model import GPT

CPU = torch.device("cpu")
PLAIN = (CastLinear, TransposedLinear, PrepackedLinear)
KINDS = [(kind, dtype) for kind in PLAIN for dtype in (torch.float32, torch.bfloat16, torch.float16)]
KINDS += [(Int8Linear, torch.bfloat16), (VNNILinear, torch.bfloat16)]


def kept(weight: torch.Tensor, kind: type, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that the layer stands for, in float32; int8's in numpy, row by row."""
    if not issubclass(kind, Int8Linear | VNNILinear):
        return weight.to(dtype).float()
    rows, dtype = [], torch.float32 if kind is VNNILinear else dtype
    for row in weight.numpy():
        scale = torch.tensor(max(float(np.abs(row).max()), 1e-5) / 127).to(dtype).item()
        rows.append(np.clip(np.round(row / np.float32(scale)), -127, 127) * scale)
    return torch.tensor(np.array(rows), dtype=torch.float32)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Inputs rounded to 255 steps between the largest of each token and its negative, in float32."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
    return (x / scale).round() * scale


@pytest.mark.parametrize("size", [(64, 192), (57, 65), (30, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_layer_equals_plain_products(kind, dtype, size):
    """Sizes that are no multiple of what a processor takes at once too: int8's kernel reads past their ends."""
    if kind not in (linear_classes(CPU, dtype) | linear_classes(CPU, dtype, "int8")).values():
        pytest.skip(f"oneDNN computes no {dtype} here")
    n_in, n_out = size
    torch.manual_seed(0)
    weight = torch.randn(n_out, n_in) * torch.logspace(-2, 0, n_out)[:, None]  # rows differ in size, one is zeros
    weight[n_out // 2] = 0
    matrix = kept(weight, kind, dtype)
    inputs = [torch.randn(*shape, n_in) for shape in ((1,), (2, 5), (4, 4), (2, 300))]
    inputs += [inputs[1][:, -1:], inputs[2].transpose(0, 1)]  # not contiguous, as the last places of a batch
    inputs += [300 * inputs[2], 300 * inputs[3]]  # large ones
    for bias in (None, torch.randn(n_out) * 2):
        layer, b = kind(weight, bias, dtype), None if bias is None else bias.to(dtype).float()
        for x in inputs:
            answer, x = layer(x), x.to(dtype).float() if kind is not VNNILinear else rounded(x)
            assert (answer.dtype, answer.shape) == (dtype, (*x.shape[:-1], n_out))
            # The sum of all that is added up bounds the rounding, once in 16 bits and at each step in 32.
            largest = F.linear(x.abs(), matrix.abs(), None if b is None else b.abs())
            steps = 16 if dtype == torch.float32 else 2
            off = (answer.float() - F.linear(x, matrix, b)).abs()
            assert bool((off <= steps * torch.finfo(dtype).eps * largest + 1e-9).all())


# ---------------------------------------------------------------------------------------------------------------------
# whole models

V = 70  # no multiple of 64: the head is padded
IDS, TARGETS = random_ids(vocab_size=V), random_ids(seed=2, vocab_size=V)
MODELS = {
    "tied": {},
    "head bias": {"tie_weights": False, "head_bias": True},
    "attention's biases only": {"bias": False, "attn_bias": True},
    "odd sizes, rope": {"n_embd": 30, "n_head": 3, "mlp_ratio": 2.7, "activation": "relu", "position": "rope"},
}


def kinds(model: GPT) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear | CastLinear)}


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_packed_model_computes_what_the_trained_one_does(changes, onednn, monkeypatch):
    """In float32 to its last digits, in bfloat16 what autocast gives, in int8 nearly that; with a cache too."""
    reference = small_model(vocab_size=V, **changes)
    logits, loss = reference(IDS), reference(IDS, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_loss = reference(IDS).float(), reference(IDS, TARGETS)
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    packed = prepack(small_model(vocab_size=V, **changes), torch.float32)
    torch.testing.assert_close(packed(IDS), logits, rtol=1e-5, atol=1e-5)
    assert packed(IDS, TARGETS).item() == pytest.approx(loss.item(), abs=1e-5)
    decoder = Decoder(packed)
    decoder.reset(1, IDS.size(1))
    torch.testing.assert_close(decoder.prefill({0: IDS[0].tolist()}), logits[:1, -1], rtol=1e-5, atol=1e-5)
    packed = prepack(small_model(vocab_size=V, **changes), torch.bfloat16)
    assert packed(IDS).dtype == torch.bfloat16
    off, lost = (packed(IDS).float() - rounded).abs().mean(), (logits - rounded).abs().mean()
    assert off < 0.3 * lost, "as if the rest was rounded too, or nothing at all"
    assert packed(IDS, TARGETS).item() == pytest.approx(rounded_loss.item(), abs=2e-3)
    packed = prepack(small_model(vocab_size=V, **changes), torch.bfloat16, "int8")
    assert kinds(packed) == {Int8Linear}
    assert 0 < (packed(IDS).float() - logits).std() < 0.03 * logits.std()


def test_which_layers_are_taken(monkeypatch):
    """oneDNN's by default where it multiplies in the precision, except for the compiler."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda name=name: name == "bf16")
    for dtype, default in ((torch.float32, "prepacked"), (torch.bfloat16, "prepacked"), (torch.float16, "row-major")):
        classes = linear_classes(CPU, dtype)
        assert next(iter(classes)) == default
        assert {*classes} == {default, "row-major", "transposed"}
    assert linear_classes(CPU, torch.float32, compile=True) == {"row-major": CastLinear}
    assert linear_classes(torch.device("cuda"), torch.float32) == {"row-major": CastLinear}


@pytest.mark.parametrize(
    ("compile", "mode"), [(None, "eager (a CUDA graph for each step)"), (True, "compiled"), (False, "eager")]
)
def test_settings_on_cuda(compile, mode, monkeypatch):
    """Steps are captured by default, without compiling; int8 is slower than bfloat16 there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr("flatgpt.inference.prepacking.prepack", lambda *words: None)
    table = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    model = SimpleNamespace(transformer=SimpleNamespace(wte=table))
    with pytest.raises(UserError, match="quantize = int8 is for CPUs"):
        prepare_for_decoding(InferConfig(device="cuda", quantize="int8"), model, compile)
    settings = prepare_for_decoding(InferConfig(device="cuda"), model, compile)
    assert settings.describe() == f"NVIDIA H200, bfloat16 (capability 9.0 supports it), {mode}"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)])
@torch.no_grad()
def test_on_a_gpu(dtype, off):
    model = small_model(vocab_size=V, tie_weights=False, head_bias=True)
    logits = model(IDS)
    packed = prepack(model.to("cuda"), dtype)
    assert kinds(packed) == {CastLinear}
    assert (packed(IDS.cuda()).float().cpu() - logits).std() < off * logits.std()


@pytest.mark.slow
def test_int8_costs_less_than_a_hundredth_of_the_loss(in_tmp, real_text):
    """A recipe's model after a seventh of its updates, on text that it has not seen."""
    prepare(PrepareConfig(source="shakespeare", tokenizer="byte", raw_dir=str(real_text)), log=lambda line: None)
    words = "--max_iters 300 --eval_interval 300 --sample_tokens 0 --device cpu --compile false"
    config = cli.parse(TrainConfig, ["--config", "shakespeare_char_cpu", *words.split()])
    train.train(config)
    found = find(str(run_dir(config)), print)
    tokens, losses = open_dataset(Path(found.state["data"]["folder"])).tokens("val"), {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.bfloat16)):
        model = prepack(load(found, CPU)[0], dtype, "int8" if name == "int8" else None)
        losses[name] = mean_loss(model, eval_batches(tokens, config.context_length, 64), torch.from_numpy)
    assert losses["float32"] < 2.6, losses
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3), losses
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.01), losses
    assert len(set(losses.values())) == 3, losses
