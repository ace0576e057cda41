"""Pretrained weights in the formats of transformers and nanoGPT: logits and loss are those of transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from safetensors.torch import load_file, save_file

from config import ModelConfig
from flatgpt.interop import loading
from flatgpt.interop.huggingface import hugging_face_weights
from flatgpt.interop.nanogpt import nanogpt_weights
from flatgpt.interop.pretrained import pretrained_shape
from model import GPT

T, V = 24, 301  # V is not a multiple of 64
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
SHAPES = [
    {},
    {"n_inner": 88},
    {"n_inner": 32, "tie_word_embeddings": False},  # the MLP's matrices are square: no size tells their layout
    {"activation_function": "gelu"},
    {"activation_function": "gelu_pytorch_tanh"},
    {"activation_function": "relu", "n_head": 4},
    {"vocab_size": 320},
    {"reorder_and_upcast_attn": True},
]


def read(path: Path, **changes) -> GPT:
    """The model that a path names, with changes of its config."""
    model = GPT(ModelConfig(**{**pretrained_shape(str(path)), **changes}))
    loading.load_pretrained(model, str(path))
    return model.eval()


@torch.no_grad()
def assert_same(model: GPT, reference: transformers.GPT2LMHeadModel) -> None:
    ids = IDS[:, : model.config.context_length]
    expected = reference(ids, labels=ids)  # labels are shifted inside
    assert (model(ids) - expected.logits).abs().max() < 1e-4
    if ids.shape[1] > 1:
        assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.loss.item(), abs=1e-4)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("changes", SHAPES, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def test_hugging_face_folder(tmp_path, changes, shards):
    reference = random_gpt2(**changes)
    reference.save_pretrained(tmp_path, max_shard_size="20kB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert_same(read(tmp_path), reference)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_nanogpt_file(tmp_path, prefix, bias):
    reference = random_gpt2(activation_function="gelu", n_head=4)
    if not bias:
        for name, parameter in reference.named_parameters():
            torch.nn.init.zeros_(parameter) if name.endswith(".bias") else None
    torch.save(nanogpt_checkpoint(reference, prefix, bias), tmp_path / "ckpt.pt")
    assert_same(read(tmp_path / "ckpt.pt"), reference)


@pytest.mark.parametrize("context_length", [1, 8])
def test_a_shorter_context_has_the_first_positions(tmp_path, context_length):
    reference = random_gpt2(activation_function="gelu")
    reference.save_pretrained(tmp_path / "hf")
    torch.save(nanogpt_checkpoint(reference), tmp_path / "ckpt.pt")
    for path in (tmp_path / "hf", tmp_path / "ckpt.pt"):
        assert_same(read(path, context_length=context_length), reference)


def test_names_without_prefix_and_stored_masks(tmp_path):
    """OpenAI's models on the hub have GPT2Model's names and the causal mask of every block; old nanoGPTs a mask too."""
    reference, mask = random_gpt2(activation_function="gelu"), torch.ones(T, T).tril()[None, None]
    reference.transformer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "wte.weight" in weights
    save_file(
        weights | {"h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)}, tmp_path / "model.safetensors"
    )
    assert_same(read(tmp_path), reference)
    saved = nanogpt_checkpoint(reference)
    saved["model"] |= {"transformer.h.0.attn.bias": mask}
    del saved["model_args"]["bias"]  # of versions without this setting
    torch.save(saved, tmp_path / "ckpt.pt")
    assert_same(read(tmp_path / "ckpt.pt"), reference)


def test_a_tied_head_that_is_stored(tmp_path):
    reference = random_gpt2()
    reference.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, tmp_path / "model.safetensors")
    assert_same(read(tmp_path), reference)


def test_half_precision_becomes_float32_and_padding_is_zero(tmp_path):
    reference = random_gpt2(tie_word_embeddings=False).bfloat16()
    reference.save_pretrained(tmp_path)
    torch.save(nanogpt_checkpoint(random_gpt2(activation_function="gelu").half()), tmp_path / "ckpt.pt")
    found = [hugging_face_weights(tmp_path, ModelConfig(**pretrained_shape(str(tmp_path / "model.safetensors"))))]
    found.append(nanogpt_weights(tmp_path / "ckpt.pt", ModelConfig(**pretrained_shape(str(tmp_path / "ckpt.pt")))))
    for weights in found:
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert weights["transformer.wte.weight"].shape == (320, 32)
        assert not weights["transformer.wte.weight"][V:].any()
    assert torch.equal(found[0]["lm_head.weight"][:V], reference.lm_head.weight.float())
    assert_same(read(tmp_path / "model.safetensors"), reference.float())


def test_a_nanogpt_file_may_be_rewritten_while_its_weights_are_in_use(tmp_path):
    """nanoGPT saves to the same name again and again, and the file was mapped into memory."""
    reference, file = random_gpt2(activation_function="gelu"), tmp_path / "ckpt.pt"
    torch.save(nanogpt_checkpoint(reference), file)
    model = read(file)
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert_same(model, reference)
