"""formats.py: nanoGPT's ckpt.pt against a slow plain model of its layout, and files that are refused."""

import io
import math
import os
import pickle
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from config import ModelConfig, UserError
from flatgpt.interop import loading
from flatgpt.interop.huggingface import nanogpt_shape, nanogpt_weights
from flatgpt.interop.pretrained import SHAPE
from model import GPT

T, V, C, HEADS = 24, 65, 32, 4
ARGS = {"n_layer": 2, "n_head": HEADS, "n_embd": C, "block_size": T, "bias": True, "vocab_size": V, "dropout": 0.1}
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))


def tensors(bias: bool = True, vocab_size: int = V) -> dict[str, Tensor]:
    """Random weights under nanoGPT's names; its matrices lie (out, in), and the head is the embedding again."""
    torch.manual_seed(0)
    sizes = {"transformer.wte.weight": (vocab_size, C), "transformer.wpe.weight": (T, C)}
    for block in ("transformer.h.0", "transformer.h.1"):
        sizes |= {f"{block}.ln_1.weight": (C,), f"{block}.ln_2.weight": (C,)}
        sizes |= {f"{block}.attn.c_attn.weight": (3 * C, C), f"{block}.attn.c_proj.weight": (C, C)}
        sizes |= {f"{block}.mlp.c_fc.weight": (4 * C, C), f"{block}.mlp.c_proj.weight": (C, 4 * C)}
    sizes["transformer.ln_f.weight"] = (C,)
    if bias:
        sizes |= {name[:-6] + "bias": size[:1] for name, size in sizes.items() if ".w" not in name[:14]}
    weights = {name: torch.randn(size) * 0.2 for name, size in sizes.items()}
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def contents(weights: dict[str, Tensor] | None = None, **args) -> dict:
    """What nanoGPT's train.py saves."""
    weights = tensors() if weights is None else weights
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(V, C)}}, "param_groups": [{"lr": 1e-3}]}
    saved = {"model": weights, "optimizer": moments, "model_args": {**ARGS, **args}, "iter_num": 2000}
    return saved | {"best_val_loss": torch.tensor(1.88), "config": {"dataset": "shakespeare_char", "compile": False}}


@pytest.fixture
def file(tmp_path) -> Path:
    """Where a checkpoint goes."""
    return tmp_path / "ckpt.pt"


def plain_logits(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """nanoGPT's forward pass in float64, one head and one text at a time: (T) -> (T, V)."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for block in ("transformer.h.0", "transformer.h.1"):
        heads = []
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(C, -1)
        for head in range(HEADS):
            part = slice(head * C // HEADS, (head + 1) * C // HEADS)
            scores = q[:, part] @ k[:, part].T / math.sqrt(C // HEADS)
            scores[torch.ones_like(scores).triu(1).bool()] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # nn.GELU(), not the tanh one
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def ours(file: Path, **changes) -> GPT:
    model = GPT(ModelConfig(**{**nanogpt_shape(file), **changes}))
    model.load_state_dict(nanogpt_weights(file, model.config))
    return model.eval()


@torch.no_grad()
def assert_same(model: GPT, weights: dict[str, Tensor]) -> None:
    ids = IDS[:, : model.config.context_length]
    expected = torch.stack([plain_logits(weights, row) for row in ids])
    assert (model(ids) - expected).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# what is read


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_logits(file, prefix, bias):
    weights = tensors(bias)
    torch.save(contents({prefix + name: t for name, t in weights.items()}, bias=bias), file)
    assert_same(ours(file), weights)


def test_shape(file):
    torch.save(contents(tensors(bias=False), bias=False), file)
    shape = nanogpt_shape(file)
    assert set(shape) == set(SHAPE)
    assert shape == {
        **{"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 24, "vocab_size": 65, "bias": False},
        **{"attn_bias": None, "head_bias": False, "tie_weights": True, "mlp_ratio": 4.0, "activation": "gelu"},
        "position": "learned",
    }


def test_padding_is_zero_and_half_precision_becomes_float32(file):
    weights = {name: t.half() for name, t in tensors().items()}
    torch.save(contents(weights), file)
    got = nanogpt_weights(file, ModelConfig(**nanogpt_shape(file)))
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert got["transformer.wte.weight"].shape == (128, C)
    assert not got["transformer.wte.weight"][V:].any()
    assert torch.equal(got["transformer.wte.weight"][:V], weights["transformer.wte.weight"].float())


@pytest.mark.parametrize("context_length", [1, 7])
def test_a_shorter_context(file, context_length):
    torch.save(contents(), file)
    assert_same(ours(file, context_length=context_length), tensors())


def test_old_versions(file):
    """Without a switch for biases, and with the causal mask stored in each block."""
    mask = torch.ones(T, T).tril()[None, None]
    saved = contents(tensors() | {f"transformer.h.{n}.attn.bias": mask for n in (0, 1)})
    del saved["model_args"]["bias"]
    torch.save(saved, file)
    assert_same(ours(file), tensors())


def test_the_file_may_be_written_anew_while_its_weights_are_in_use(file):
    """nanoGPT saves to the same name again and again, and the file was mapped into memory."""
    torch.save(contents(), file)
    weights = nanogpt_weights(file, ModelConfig(**nanogpt_shape(file)))
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    for name, tensor in tensors().items():
        if name != "lm_head.weight":
            assert torch.equal(weights[name][: len(tensor)], tensor), name


def test_by_its_name(file):
    """Of GPT-2's vocabulary, padded as nanoGPT pads it."""
    torch.save(contents(tensors(vocab_size=50304), vocab_size=50304), file)
    found = loading.find(str(file), print)
    model, encoding = loading.load(found, torch.device("cpu"), context_length=8)
    assert (encoding.name, model.config.vocab_size) == ("gpt2", 50304)
    assert_same(model, tensors(vocab_size=50304))


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def refused(file: Path, message: str) -> None:
    """Both functions say so, in one line that names the file."""
    config = ModelConfig(n_layer=2, n_head=HEADS, n_embd=C, context_length=T, vocab_size=V, activation="gelu")
    for read in (nanogpt_shape, lambda file: nanogpt_weights(file, config)):
        with pytest.raises(UserError, match=message) as error:
            read(file)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)  # torch's own advice is to run what is in there


class Payload:
    """Unpickling it runs a command, as anybody's pickle may."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.canary))}",)


@pytest.mark.parametrize("place", ["model", "model_args", "optimizer", "config", "best_val_loss", "beside"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_nothing_of_a_malicious_pickle_runs(file, tmp_path, form, place):
    saved, canary = contents(), tmp_path / "canary"
    if place in ("model", "model_args", "optimizer", "config"):
        saved[place] = {**saved[place], "x": Payload(canary)}
    else:
        saved[place] = Payload(canary)
    if form == "bare":
        file.write_bytes(pickle.dumps(saved))
    else:
        torch.save(saved, file, _use_new_zipfile_serialization=form == "zip")
    refused(file, "more than tensors and plain types" if form == "zip" else "a zip file, as torch.save writes it, is")
    assert not canary.exists()
    torch.load(file, weights_only=False) if form != "bare" else pickle.loads(file.read_bytes())
    assert canary.exists()  # it was a live one


def test_a_planted_function_of_torch_is_refused_too(file):
    """Not only what everybody knows as dangerous."""
    torch.save(contents() | {"config": torch.nn.functional.relu}, file)
    refused(file, "more than tensors and plain types")


@pytest.mark.parametrize("damage", ["empty", "half", "tail", "text", "pointer", "another zip"])
def test_a_damaged_file(file, damage):
    torch.save(contents(), file)
    content, other = file.read_bytes(), io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a.txt", "a")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 548105171\n"
    damaged = {"empty": b"", "half": content[: len(content) // 2], "tail": content[:-10], "text": b"First Citizen:\n"}
    file.write_bytes(damaged.get(damage, pointer if damage == "pointer" else other.getvalue()))
    refused(file, "is damaged or no checkpoint of nanoGPT's: ")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_wrong_instruction_in_its_pickle(file):
    """Whatever torch's unpickler meets there: it raises what it raises."""
    torch.save(contents(), file)
    content = file.read_bytes()
    start, raised = content.index(b"data.pkl") + 8, set()
    for place in range(start, start + 1200, 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            nanogpt_shape(file)
        except UserError as error:
            raised.add(str(error).partition(": ")[2].partition(":")[0])
    assert {"KeyError", "UnicodeDecodeError"} <= raised  # as torch has them


@pytest.mark.parametrize("content", [[1], tensors(), {"model": tensors()}, {"model_args": ARGS}])
def test_other_things_that_torch_saves(file, content):
    torch.save(content, file)
    refused(file, r"is no checkpoint of nanoGPT's: model \(tensors by name\) and model_args are expected")


@pytest.mark.parametrize("model", [torch.zeros(3), {"a": 1}, {1: torch.zeros(3)}, [torch.zeros(3)]])
def test_a_model_that_is_none(file, model):
    torch.save(contents() | {"model": model}, file)
    refused(file, "is no checkpoint of nanoGPT's")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layer", None, "n_layer = None: a whole number from 1 to 10,000 is expected"),
        ("n_layer", 0, "n_layer = 0: "),
        ("n_layer", 10_001, "n_layer = 10001: "),
        ("block_size", 24.0, "block_size = 24.0: a whole number from 1 to"),
        ("block_size", -1, "block_size = -1: "),
        ("vocab_size", 70_000, "vocab_size = 70000: a whole number from 1 to 65,536"),
        ("n_head", True, "n_head = True: "),
        ("n_head", 5, "n_embd = 32 is not a multiple of n_head = 5"),
        ("n_embd", "32", "n_embd = 32: "),
        ("bias", 1, "bias = 1: true or false"),
        ("bias", None, "bias = None: true or false"),
    ],
)
def test_wrong_sizes_in_model_args(file, key, value, message):
    torch.save(contents(**{key: value}), file)
    with pytest.raises(UserError, match=message) as error:
        nanogpt_shape(file)
    assert str(error.value).startswith(str(file))


def test_missing_sizes(file):
    saved = contents()
    del saved["model_args"]["block_size"]
    torch.save(saved, file)
    with pytest.raises(UserError, match="block_size = None: a whole number"):
        nanogpt_shape(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "transformer.h.1.mlp.c_proj.bias"}, "transformer.h.1.mlp.c_proj.bias is missing"),
        (
            {"transformer.h.2.ln_1.weight": torch.zeros(C)},
            r"transformer.h.2.ln_1.weight has no place in a GPT-2 of this",
        ),
        ({"transformer.h.0.mlp.c_fc.weight": torch.zeros(C, 4 * C)}, "c_fc.weight is 32 x 128, 128 x 32 is expected"),
        ({"transformer.wte.weight": torch.zeros(V + 1, C)}, "wte.weight is 66 x 32, 65 x 32 is expected"),
        ({"transformer.wpe.weight": torch.zeros(T - 1, C)}, "context_length = 24: .* has 23 learned positions"),
        ({"transformer.ln_f.weight": torch.zeros(C, dtype=torch.int8)}, "ln_f.weight is 32 of int8, 32 is expected"),
        ({"lm_head.weight": torch.zeros(V, C)}, "lm_head.weight is not transformer.wte.weight, which nanoGPT ties"),
    ],
)
def test_tensors_that_do_not_fit(file, change, message):
    weights = tensors() | {name: t for name, t in change.items() if name != "drop"}
    weights.pop(change.get("drop"), None)
    torch.save(contents(weights), file)
    with pytest.raises(UserError, match=message):
        nanogpt_weights(file, ModelConfig(**nanogpt_shape(file)))
