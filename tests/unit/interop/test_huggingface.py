"""Weights that are refused, in both formats of other projects; tests/parity/test_weights.py compares what is loaded."""

import json
from pathlib import Path

import pytest
import torch
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from safetensors.torch import load_file, save_file

from config import ModelConfig, UserError
from flatgpt.interop.huggingface import hugging_face_weights
from flatgpt.interop.nanogpt import nanogpt_weights
from flatgpt.interop.pretrained import pretrained_shape

T, V = 24, 301


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Hugging Face folder, to read from only."""
    folder = tmp_path_factory.mktemp("hf")
    random_gpt2().save_pretrained(folder)
    return folder


def refused(folder: Path, message: str, **changes) -> str:
    config = ModelConfig(**{**pretrained_shape(str(folder)), **changes})
    with pytest.raises(UserError, match=message) as error:
        hugging_face_weights(folder, config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 25}, "context_length = 25: the pretrained model has 24 learned positions; take at most"),
        ({"vocab_size": 320}, r"model.safetensors: transformer.wte.weight is 301 x 32, 320 x 32 is expected"),
        ({"mlp_ratio": 2.0}, r"h.0.mlp.c_fc.bias is 128, 64 is expected"),
        ({"n_layer": 3}, r"model.safetensors: transformer.h.2.ln_1.weight is missing"),
        ({"n_layer": 1}, r"transformer.h.1.attn.c_attn.bias is not in a GPT-2 of this shape"),
        ({"tie_weights": False}, "lm_head.weight is missing"),
        ({"position": "rope"}, "transformer.wpe.weight is not in a GPT-2"),
    ],
)
def test_a_config_of_another_shape(saved, changes, message):
    refused(saved, message, **changes)


@pytest.mark.parametrize("nanogpt", [False, True], ids=["Hugging Face", "nanoGPT"])
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("transformer.h.1.mlp.c_proj.bias", None, "transformer.h.1.mlp.c_proj.bias is missing"),
        ("score.weight", torch.zeros(2, 32), "score.weight is not in a GPT-2"),
        ("transformer.h.0.mlp.c_fc.weight", torch.zeros(32), r"c_fc.weight is 32, \d+ x \d+ is"),
        ("transformer.h.0.mlp.c_fc.weight", "transposed", "c_fc.weight is .* is expected"),
        ("transformer.wte.weight", torch.zeros(V + 1, 32), "wte.weight is 302 x 32, 301 x 32 is expected"),
        ("transformer.wpe.weight", torch.zeros(T, 31), "wpe.weight is 24 x 31, 24 x 32 is expected"),
        ("transformer.wpe.weight", torch.zeros(T - 1, 32), "context_length = 24: .* has 23 learned positions"),
        ("transformer.ln_f.weight", torch.zeros(32, dtype=torch.int8), "ln_f.weight is 32 of int8, 32 is expected"),
        ("lm_head.weight", torch.zeros(V, 32), "lm_head.weight is not transformer.wte.weight, (though|which nanoGPT)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, name, tensor, message, nanogpt):
    reference = random_gpt2(activation_function="gelu")
    reference.save_pretrained(tmp_path)
    content = nanogpt_checkpoint(reference)
    weights = content["model"] if nanogpt else load_file(tmp_path / "model.safetensors")
    if tensor is None:
        del weights[name]
    else:
        weights[name] = weights[name].T.contiguous() if isinstance(tensor, str) else tensor
    if not nanogpt:
        save_file(weights, tmp_path / "model.safetensors")
        refused(tmp_path, message)
        return
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=message):
        nanogpt_weights(tmp_path / "ckpt.pt", ModelConfig(**pretrained_shape(str(tmp_path / "ckpt.pt"))))


@pytest.mark.parametrize("damage", ["empty", "half", "tail", "header", "pointer"])
def test_a_damaged_file_is_named(tmp_path, saved, damage):
    content = (saved / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 548105171\n"
    damaged = {"empty": b"", "half": content[: len(content) // 2], "tail": content[:-1], "pointer": pointer}
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    file = tmp_path / "model.safetensors"
    file.write_bytes(damaged.get(damage, b"\xff" * 16 + content[16:]))
    assert refused(tmp_path, "is damaged: .*; copy it again").startswith(str(file))


def test_missing_and_damaged_shards(tmp_path):
    random_gpt2().save_pretrained(tmp_path, max_shard_size="20kB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(tmp_path, "is damaged: ").startswith(str(shard))
    shard.unlink()
    assert refused(tmp_path, r"is missing, which model.safetensors.index.json names").startswith(str(shard))
    for index in ("{", "[]", "{}", {"weight_map": 1}, {"weight_map": {}}, [[1]]):
        text = index if isinstance(index, str) else json.dumps(index)
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refused(tmp_path, r"model.safetensors.index.json is damaged: .*; copy it again")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    refused(tmp_path, r"\.\./b.safetensors is not a safetensors file in the same folder")
