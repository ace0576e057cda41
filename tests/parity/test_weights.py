"""Pretrained weights in the formats of transformers and nanoGPT: logits and loss are those of transformers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from safetensors.torch import load_file, save_file, save_model

from config import UserError
from flatgpt.interop import loading, pretrained
from model import GPT

T, V = 24, 301  # V is not a multiple of 64
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
SHAPES = [
    {},
    {"n_inner": 88},
    {"n_inner": 32, "tie_word_embeddings": False},  # the MLP's matrices are square: no size tells their layout
    {"activation_function": "gelu", "vocab_size": 320},
    {"activation_function": "gelu_pytorch_tanh", "reorder_and_upcast_attn": True},
    {"activation_function": "relu", "n_head": 4},
]


def read(path: Path, context_length: int = T) -> GPT:
    config = pretrained.read_config(str(path))
    model = GPT(dataclasses.replace(config, context_length=context_length))
    loading.load_pretrained(model, str(path))
    return model.eval()


@torch.no_grad()
def assert_same(model: GPT, reference: transformers.GPT2LMHeadModel) -> None:
    ids = IDS[:, : model.config.context_length]
    expected = reference(ids, labels=ids)  # labels are shifted inside
    assert (model(ids) - expected.logits).abs().max() < 1e-4
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.loss.item(), abs=1e-4)


@pytest.mark.parametrize("changes", SHAPES, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def test_hugging_face_folder(tmp_path, changes):
    """Of one file, or several."""
    reference, shards = random_gpt2(**changes), len(changes) == 1
    reference.save_pretrained(tmp_path, max_shard_size="20kB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    for length in (8, T):
        assert_same(read(tmp_path, length), reference)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_nanogpt_file(tmp_path, prefix, bias):
    """nanoGPT saves to the same name again and again, while the model that was read from it lives."""
    reference, file = random_gpt2(activation_function="gelu", n_head=4), tmp_path / "ckpt.pt"
    if not bias:
        for name, parameter in reference.named_parameters():
            torch.nn.init.zeros_(parameter) if name.endswith(".bias") else None
    torch.save(nanogpt_checkpoint(reference, prefix, bias), file)
    model, short = read(file), read(file, context_length=8)
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert_same(model, reference)
    assert_same(short, reference)


def test_names_without_prefix_and_stored_masks(tmp_path):
    """OpenAI's models on the hub have GPT2Model's names and the causal mask of every block; old nanoGPTs a mask too."""
    reference, mask = random_gpt2(activation_function="gelu"), torch.ones(T, T).tril()[None, None]
    reference.transformer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "wte.weight" in weights
    weights |= {"h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)}
    weights |= {"lm_head.weight": weights["wte.weight"].clone()}  # a tied head that is stored
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(read(tmp_path), reference)
    saved = nanogpt_checkpoint(reference)
    saved["model"] |= {"transformer.h.0.attn.bias": mask}
    del saved["model_args"]["bias"]  # of versions without this setting
    torch.save(saved, tmp_path / "ckpt.pt")
    assert_same(read(tmp_path / "ckpt.pt"), reference)


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
@pytest.mark.parametrize("shards", [1, 2])
def test_head_that_is_stored_without_its_embedding(tmp_path, shards, prefix):
    """save_model of safetensors stores tied weights once, under the name that comes first in the alphabet."""
    reference, file = random_gpt2(), tmp_path / "model.safetensors"
    reference.save_pretrained(tmp_path)
    save_model(reference, file)
    weights = {prefix + name: tensor for name, tensor in load_file(file).items()}
    assert f"{prefix}lm_head.weight" in weights
    assert f"{prefix}transformer.wte.weight" not in weights
    names, file_of = sorted(weights), {}
    file.unlink()
    for n in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{n + 1:05}-of-{shards:05}.safetensors"
        save_file({key: weights[key] for key in names[n::shards]}, tmp_path / name, {"format": "pt"})
        file_of |= dict.fromkeys(names[n::shards], name)
    if shards > 1:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    assert_same(read(tmp_path), reference)
    if not prefix:
        assert_same(read(tmp_path), transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize(
    ("tied", "changes", "message"),
    [
        (True, {"lm_head.weight": 1.0}, "lm_head.weight differs from transformer.wte.weight, but its config ties them"),
        (False, {"lm_head.weight": 1.0}, None),
        (False, {"lm_head.weight": None}, 'missing "lm_head.weight"; its weights, its config or model.py are of'),
        (False, {"transformer.wte.weight": None}, 'does not fit its config: missing "transformer.wte.weight"; '),
        (True, {"transformer.wte.weight": None, "lm_head.weight": None}, 'missing "transformer.wte.weight", "lm_head'),
    ],
)
def test_heads_that_are_not_the_embedding(tmp_path, tied, changes, message):
    reference = random_gpt2(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for name, change in changes.items():
        weights[name] = change and weights[name] + change
    save_file({name: w for name, w in weights.items() if w is not None}, tmp_path / "model.safetensors")
    if message:
        with pytest.raises(UserError, match=message):
            read(tmp_path)
    else:
        assert_same(read(tmp_path), transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


def test_half_precision_becomes_float32_and_padding_is_zero(tmp_path):
    references = random_gpt2(tie_word_embeddings=False).bfloat16(), random_gpt2(activation_function="gelu").half()
    references[0].save_pretrained(tmp_path)
    torch.save(nanogpt_checkpoint(references[1]), tmp_path / "ckpt.pt")
    for path, reference in zip((tmp_path, tmp_path / "ckpt.pt"), references, strict=True):
        weights = loading.read_weights(path, pretrained.read_config(str(path)))
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert not weights["transformer.wte.weight"][V:].any()
        assert_same(read(path), reference.float())
