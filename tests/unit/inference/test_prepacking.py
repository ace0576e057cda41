"""packing.py against torch's plain products in float32, the trained model, and the same under autocast."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from config import ModelConfig, PrepareConfig, TrainConfig, run_dir
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.data.prepare import prepare
from flatgpt.evaluation.metrics import eval_batches, mean_loss
from flatgpt.inference.decoder import KVCache
from flatgpt.inference.prepacking import CastLinear, Int8Linear, PrepackedLinear, prepack, prepacked_bytes
from flatgpt.interop.loading import find, load
from model import GPT

CPU = torch.device("cpu")
SIZES = [(64, 192), (32, 65), (57, 65), (30, 3), (1, 1)]  # (in, out)
SHAPES = [(1,), (7,), (2, 5), (1, 1), (3, 1), (4, 4), (17,), (2, 300)]  # before the last dimension
KINDS = [(CastLinear, torch.float32), (CastLinear, torch.bfloat16), (CastLinear, torch.float16)]
KINDS += [(PrepackedLinear, torch.float32), (PrepackedLinear, torch.bfloat16), (PrepackedLinear, torch.float16)]
KINDS += [(Int8Linear, torch.bfloat16)]
IDS_OF_KINDS = [f"{kind.__name__}-{dtype}" for kind, dtype in KINDS]


def layer(n_in: int, n_out: int, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix whose rows differ in size, one of them zeros; and a bias that nobody overlooks."""
    torch.manual_seed(n_in + 1000 * n_out)
    weight = torch.randn(n_out, n_in) * torch.logspace(-2, 0, n_out)[:, None]
    weight[n_out // 2] = 0
    return weight, torch.randn(n_out) * 2 if bias else None


def kept(weight: torch.Tensor, kind: type, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that the layer stands for, in float32; int8's in numpy, row by row."""
    if kind is not Int8Linear:
        return weight.to(dtype).float()
    rows = []
    for row in weight.numpy():
        scale = torch.tensor(max(float(np.abs(row).max()), 1e-12) / 127).to(dtype).item()
        rows.append(np.clip(np.round(row / np.float32(scale)), -127, 127) * scale)
    return torch.tensor(np.array(rows), dtype=torch.float32)


def is_product(answer: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether an answer is the product in float32, but for what its own precision rounds away.

    The sum of all that is added up bounds the rounding: a product is rounded once in 16 bits and at each step in 32,
    int8's is rounded again when it has its bias.
    """
    if bias is not None:
        bias = bias.to(answer.dtype).float()
    x = x.to(answer.dtype).float()
    largest = F.linear(x.abs(), matrix.abs(), None if bias is None else bias.abs())
    steps = 16 if answer.dtype == torch.float32 else 2
    off = (answer.float() - F.linear(x, matrix, bias)).abs()
    return bool((off <= steps * torch.finfo(answer.dtype).eps * largest + 1e-9).all())


def supported(kind: type, dtype: torch.dtype) -> None:
    if kind is PrepackedLinear and not PrepackedLinear.supports(CPU, dtype):
        pytest.skip(f"oneDNN computes no {dtype} here")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=IDS_OF_KINDS)
def test_layer_equals_plain_products(kind, dtype, size, bias):
    """Sizes that are no multiple of what a processor takes at once too: int8's kernel reads past their ends."""
    supported(kind, dtype)
    weight, b = layer(*size, bias)
    packed, matrix = kind(weight, b, dtype), kept(weight, kind, dtype)
    for shape in SHAPES:
        x = torch.randn(*shape, size[0])
        answer = packed(x)
        assert answer.dtype == dtype
        assert answer.shape == (*shape, size[1])
        assert is_product(answer, x, matrix, b), shape
        assert torch.equal(packed(x.to(dtype)), answer), "x is rounded, once"


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=IDS_OF_KINDS)
def test_inputs_that_do_not_lie_one_after_the_other(kind, dtype):
    """As the last places of a batch do not."""
    supported(kind, dtype)
    weight, b = layer(64, 48, True)
    packed, matrix = kind(weight, b, dtype), kept(weight, kind, dtype)
    x = torch.randn(3, 5, 64).to(dtype)
    for part in (x[:, -1:], x[:, ::2], x.transpose(0, 1), x[1:2], x[..., 1, :]):
        assert is_product(packed(part), part, matrix, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_int8_is_off_by_half_a_step(size, dtype):
    """A step is a 127th of the row's largest number; the scale itself is rounded, and the largest may lose that."""
    weight, _ = layer(*size, False)
    packed = Int8Linear(weight, None, dtype)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert packed.weight.dtype == torch.int8
    off = (packed.weight.float() * packed.scale.float()[:, None] - weight).abs()
    assert bool((off <= step * (0.5 + 128 * torch.finfo(dtype).eps)).all())
    assert not packed.weight[size[1] // 2].any(), "zeros stay zeros"
    assert bool((packed.scale > 0).all()), "what 0 / 0 becomes as int8, no standard says"
    assert int(packed.weight.min()) >= -127


def test_int8_takes_the_sign_and_uses_all_of_its_range():
    packed = Int8Linear(torch.tensor([[1.0, -1.0, 0.5, 0.0], [-2.0, 1.0, 0.0, 2.0]]), None, torch.float32)
    assert packed.weight.tolist() == [[127, -127, 64, 0], [-127, 64, 0, 127]]
    assert packed.scale.tolist() == pytest.approx([1 / 127, 2 / 127])


# ---------------------------------------------------------------------------------------------------------------------
# whole models

V, T = 70, 24  # V is no multiple of 64: the head is padded
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(2))
MODELS = {
    "tied": {},
    "untied": {"tie_weights": False},
    "head bias": {"tie_weights": False, "head_bias": True},
    "no biases": {"bias": False},
    "attention's biases only": {"bias": False, "attn_bias": True},
    "rope": {"position": "rope"},
    "odd sizes": {"n_embd": 30, "n_head": 3, "mlp_ratio": 2.7, "activation": "relu"},
}


def trained(**changes) -> GPT:
    """A model with large random numbers in every parameter, in eval mode; zeros in the vocabulary's padding."""
    torch.manual_seed(0)
    sizes = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=T, vocab_size=V)
    model = GPT(dataclasses.replace(sizes, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
        for table in (model.transformer.wte, model.lm_head):
            if table is not None:
                table.weight[V:] = 0
    return model.eval()


def spread_of(logits: torch.Tensor) -> float:
    return logits.std().item()


def kinds(model: GPT) -> set[type]:
    return {
        type(m) for m in model.modules() if isinstance(m, torch.nn.Linear | CastLinear | PrepackedLinear | Int8Linear)
    }


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_packed_model_computes_what_the_trained_one_does(changes, compile):
    """In float32 to its last digits, in bfloat16 what autocast gives; without a cache and with one."""
    reference = trained(**changes)
    logits, loss = reference(IDS), reference(IDS, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_loss = reference(IDS).float(), reference(IDS, TARGETS)
    packed = prepack(trained(**changes), torch.float32, compile=compile)
    assert torch.allclose(packed(IDS), logits, rtol=1e-5, atol=1e-5)
    assert packed(IDS, TARGETS).item() == pytest.approx(loss.item(), abs=1e-5)
    cache = KVCache(packed.config, 3, T, torch.float32, CPU)
    assert torch.allclose(packed(IDS, cache=cache)[:, 0], logits[:, -1], rtol=1e-5, atol=1e-5)
    packed = prepack(trained(**changes), torch.bfloat16, compile=compile)
    assert packed(IDS).dtype == torch.bfloat16
    off, lost = (packed(IDS).float() - rounded).abs().mean(), (logits - rounded).abs().mean()
    assert off < 0.3 * lost, "as if the rest was rounded too, or nothing at all"
    assert packed(IDS, TARGETS).item() == pytest.approx(rounded_loss.item(), abs=2e-3)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_int8_is_close(changes):
    logits = trained(**changes)(IDS)
    packed = prepack(trained(**changes), torch.bfloat16, "int8")
    assert kinds(packed) == {Int8Linear}
    off = (packed(IDS).float() - logits).std().item()
    assert 0 < off < 0.03 * spread_of(logits), off / spread_of(logits)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_every_linear_layer_goes_and_nothing_else(quantize):
    model = trained()
    others = {
        name: p.clone() for name, p in model.named_parameters() if "wte" in name or "wpe" in name or "ln_" in name
    }
    assert len(others) == 2 + 4 * 2 + 2
    packed = prepack(model, torch.bfloat16, quantize)
    assert packed is model
    assert torch.nn.Linear not in kinds(packed)
    now = dict(packed.named_parameters())
    for name, before in others.items():
        assert now[name].dtype == torch.float32
        assert torch.equal(now[name], before), name


@pytest.mark.parametrize("changes", [MODELS["tied"], MODELS["head bias"]], ids=["tied", "head bias"])
def test_no_id_of_the_padding_comes_out(changes):
    for dtype, quantize in ((torch.float32, None), (torch.bfloat16, "int8")):
        packed = prepack(trained(**changes), dtype, quantize)
        assert packed(IDS).shape == (3, T, V)


def test_which_layers_are_taken(monkeypatch):
    """oneDNN's where it is, except for the compiler; where it is off, plain ones that give the same."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(PrepackedLinear, "supports", staticmethod(lambda device, dtype: dtype == torch.float32))
    assert kinds(prepack(trained(), torch.float32)) == {PrepackedLinear}
    assert kinds(prepack(trained(), torch.float32, compile=True)) == {CastLinear}
    assert kinds(prepack(trained(), torch.bfloat16)) == {CastLinear}
    assert kinds(packed := prepack(trained(), torch.float32, "int8")) == {Int8Linear}
    assert packed.lm_head.dtype == packed.transformer.h[0].mlp.c_fc.scale.dtype == torch.bfloat16
    assert kinds(prepack(trained(), torch.bfloat16, "int8", compile=True)) == {Int8Linear}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_without_onednn_the_same_comes_out(monkeypatch, dtype):
    packed = prepack(trained(), dtype)(IDS).float()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not PrepackedLinear.supports(CPU, dtype)
    plain = prepack(trained(), dtype)
    assert kinds(plain) == {CastLinear}
    off = (plain(IDS).float() - packed).abs().mean().item()
    assert off <= 2 * torch.finfo(dtype).eps * spread_of(packed), off


def test_what_a_processor_cannot_compute_is_not_packed(monkeypatch):
    mkldnn = torch.ops.mkldnn
    monkeypatch.setattr(mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert not PrepackedLinear.supports(CPU, torch.bfloat16)
    assert not PrepackedLinear.supports(CPU, torch.float16)
    assert PrepackedLinear.supports(CPU, torch.float32) == torch.backends.mkldnn.is_available()
    assert not PrepackedLinear.supports(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert PrepackedLinear.supports(CPU, torch.bfloat16) == torch.backends.mkldnn.is_available()
    assert not PrepackedLinear.supports(CPU, torch.float16)


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}], ids=["tied", "untied"])
def test_bytes_that_each_token_reads(changes, monkeypatch):
    """12 C^2 numbers a block and the head's, padded to 128 rows; the embedding is looked up, not read through."""
    numbers = 2 * 12 * 32**2 + 128 * 32
    for available in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)  # noqa: B023
        assert prepacked_bytes(prepack(trained(**changes), torch.float32)) == 4 * numbers
        assert prepacked_bytes(prepack(trained(**changes), torch.bfloat16)) == 2 * numbers
        assert prepacked_bytes(prepack(trained(**changes), torch.bfloat16, "int8")) == numbers
    assert prepacked_bytes(trained(**changes)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "quantize", "off"),
    [
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 0.03),
        (torch.float16, None, 0.004),
        (torch.bfloat16, "int8", 0.03),
        (torch.float16, "int8", 0.03),
    ],
)
@torch.no_grad()
def test_on_a_gpu(dtype, quantize, off):
    model = trained(tie_weights=False, head_bias=True)
    logits = model(IDS)
    packed = prepack(model.to("cuda"), dtype, quantize)
    assert kinds(packed) == {Int8Linear if quantize else CastLinear}
    assert (packed(IDS.cuda()).float().cpu() - logits).std().item() < off * spread_of(logits)


@pytest.mark.slow
def test_int8_costs_less_than_a_hundredth_of_the_loss(in_tmp, real_text):
    """A recipe's model after a seventh of its updates, on text that it has not seen."""
    prepare(PrepareConfig(source="shakespeare", tokenizer="byte", raw_dir=str(real_text)), log=lambda line: None)
    words = "--max_iters 300 --eval_interval 300 --sample_tokens 0 --device cpu --compile false"
    config = cli.parse(TrainConfig, ["--config", "shakespeare_char_cpu", *words.split()])
    train.train(config)
    found = find(str(run_dir(config)), print)
    tokens, losses = open_dataset(Path(found.state["data"]["folder"])).tokens("val"), {}
    for name, dtype, quantize in (
        ("float32", torch.float32, None),
        ("bfloat16", torch.bfloat16, None),
        ("int8", torch.bfloat16, "int8"),
    ):
        model, _ = load(found, CPU)
        if name != "float32":  # which is the model as it was trained
            prepack(model, dtype, quantize)
        losses[name] = mean_loss(model, eval_batches(tokens, config.context_length, 64), torch.from_numpy)
    print(losses)
    assert losses["float32"] < 2.6, losses
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3), losses
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.01), losses
    assert len(set(losses.values())) == 3, losses
