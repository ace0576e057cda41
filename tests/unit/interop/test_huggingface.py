"""formats.py: transformers' GPT-2 folders against transformers itself,."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from config import ModelConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.interop import loading, pretrained
from flatgpt.interop.huggingface import crop_positions, hugging_face_weights
from flatgpt.runs import checkpoint
from model import GPT

T, V = 24, 301  # V is no multiple of 64
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))


def theirs(**changes) -> transformers.GPT2LMHeadModel:
    """A tiny model with large random numbers in every parameter, biases and gains too: a mistake in any shows."""
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": T, "vocab_size": V, "bos_token_id": 0}
    settings |= {"eos_token_id": 0, "attn_implementation": "eager", **changes}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def shape(folder: Path, **changes) -> ModelConfig:
    return ModelConfig(**{**pretrained.pretrained_shape(str(folder)), **changes})


def ours(folder: Path, **changes) -> GPT:
    model = GPT(shape(folder, **changes))
    model.load_state_dict(hugging_face_weights(folder, model.config))
    return model.eval()


@torch.no_grad()
def assert_same(model: GPT, other: transformers.GPT2LMHeadModel) -> None:
    ids = IDS[:, : model.config.context_length]
    answer = other(ids, labels=ids)  # labels are shifted inside
    assert (model(ids) - answer.logits).abs().max() < 1e-4
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(answer.loss.item(), abs=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, transformers.GPT2LMHeadModel]:
    """A tied model and the folder it was saved in, to read from only."""
    folder, model = tmp_path_factory.mktemp("hf"), theirs()
    model.save_pretrained(folder)
    return folder, model


def altered(tmp_path: Path, model, drop: str = "", settings: dict | None = None, **tensors) -> Path:
    """The model saved with one tensor left out, others added or replaced; `__` in a name stands for its dot."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(drop, None)
    weights |= {name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(weights, tmp_path / "model.safetensors")
    if settings:
        config = json.loads((tmp_path / "config.json").read_text()) | settings
        (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# parity


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 88},
        {"n_inner": 32, "tie_word_embeddings": False},  # mlp's matrices are square: layout cannot be told by shape
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "relu", "n_head": 4},
        {"vocab_size": 320},
        {"reorder_and_upcast_attn": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_logits_and_loss_equal_transformers(tmp_path, changes, shards):
    model = theirs(**changes)
    model.save_pretrained(tmp_path, max_shard_size="20kB" if shards else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert_same(ours(tmp_path), model)


def test_names_without_prefix_and_old_buffers(tmp_path):
    """OpenAI's models on the hub are such: GPT2Model's names, and the causal mask stored in every block."""
    model = theirs()
    mask = torch.ones(T, T).tril()[None, None]
    altered(tmp_path, model.transformer, h__0__attn__bias=mask, h__1__attn__masked_bias=torch.tensor(-1e4))
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_same(ours(tmp_path), model)


def test_a_tied_head_that_was_stored_all_the_same(tmp_path):
    model = theirs()
    altered(tmp_path, model, lm_head__weight=model.transformer.wte.weight.detach().clone())
    assert_same(ours(tmp_path), model)


def test_weights_are_float32_and_padding_is_zero(tmp_path):
    model = theirs(tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path)
    weights = hugging_face_weights(tmp_path, shape(tmp_path))
    assert {w.dtype for w in weights.values()} == {torch.float32}
    for name, table in (("transformer.wte.weight", model.transformer.wte), ("lm_head.weight", model.lm_head)):
        assert weights[name].shape == (320, 32)
        assert not weights[name][V:].any()
        assert torch.equal(weights[name][:V], table.weight.float())
    assert_same(ours(tmp_path), model.float())


@pytest.mark.parametrize("context_length", [1, 8, T])
def test_a_shorter_context_is_the_first_positions(saved, context_length):
    folder, model = saved
    short = ours(folder, context_length=context_length)
    ids = IDS[:, :context_length]
    with torch.no_grad():
        assert (short(ids) - model(ids).logits).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def refused(folder: Path, message: str, **changes) -> str:
    with pytest.raises(UserError, match=message) as error:
        hugging_face_weights(folder, shape(folder, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 25}, "context_length = 25: the model to begin with has 24 learned positions; take at most"),
        ({"vocab_size": 320}, r"model.safetensors: transformer.wte.weight is 301 x 32, 320 x 32 is expected"),
        ({"vocab_size": 300}, "wte.weight is 301 x 32, 300 x 32 is expected"),
        ({"mlp_ratio": 2.0}, r"h.0.mlp.c_fc.bias is 128, 64 is expected"),
        ({"n_layer": 3}, r"model.safetensors: transformer.h.2.ln_1.weight is missing"),
        ({"n_layer": 1}, r"transformer.h.1.attn.c_attn.bias has no place in a GPT-2 of this shape"),
        ({"tie_weights": False}, "lm_head.weight is missing"),
        ({"tie_weights": False, "head_bias": True}, "lm_head.weight is missing"),
        ({"position": "rope"}, "transformer.wpe.weight has no place"),
    ],
)
def test_a_config_of_another_shape(saved, changes, message):
    refused(saved[0], message, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "transformer.h.1.mlp.c_proj.bias"}, "transformer.h.1.mlp.c_proj.bias is missing"),
        ({"score__weight": torch.zeros(2, 32)}, "score.weight has no place"),
        ({"transformer__h__0__mlp__c_fc__weight": torch.zeros(128, 32)}, "c_fc.weight is 128 x 32, 32 x 128 is"),
        ({"transformer__h__0__mlp__c_fc__weight": torch.zeros(32)}, "c_fc.weight is 32, 32 x 128 is"),
        ({"transformer__wpe__weight": torch.zeros(T, 31)}, "wpe.weight is 24 x 31, 24 x 32 is expected"),
        ({"transformer__ln_f__weight": torch.zeros(32, dtype=torch.int8)}, "ln_f.weight is 32 of int8, 32 is expected"),
        ({"lm_head__weight": torch.zeros(V, 32)}, "lm_head.weight is not transformer.wte.weight, though config.json"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    refused(altered(tmp_path, theirs(), **change), message)


@pytest.mark.parametrize("damage", ["empty", "half", "tail", "header", "pointer"])
def test_a_damaged_file_is_named(tmp_path, damage):
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 548105171\n"
    damaged = {"empty": b"", "half": content[: len(content) // 2], "tail": content[:-1], "pointer": pointer}
    file.write_bytes(damaged.get(damage, b"\xff" * 16 + content[16:]))
    assert refused(tmp_path, "is damaged: .*; copy it again").startswith(str(file))


def test_a_missing_or_damaged_shard(tmp_path):
    theirs().save_pretrained(tmp_path, max_shard_size="20kB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(tmp_path, "is damaged: ").startswith(str(shard))
    shard.unlink()
    assert refused(tmp_path, r"is missing, which model.safetensors.index.json names").startswith(str(shard))


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', "[[1]]"]
)
def test_a_damaged_index(tmp_path, index):
    theirs().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, r"model.safetensors.index.json is damaged: ")


# ---------------------------------------------------------------------------------------------------------------------
# both kinds, through what init_from says


def save_ours(run: Path, **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=257, **changes)).eval()
    encoding = tokenizer.load("byte")
    named = {"name": "byte", "ranks_sha256": tokenizer.ranks_hash(encoding)}
    state = {"iter": 7, "config": dataclasses.asdict(model.config), "tokenizer": named}
    checkpoint.save(run, state, model.state_dict(), {}, keep=1)
    return model


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("context_length", [8, T])
def test_begin_with_a_run(tmp_path, position, context_length):
    there = save_ours(tmp_path / "run", position=position, bias=False, tie_weights=False)
    model = GPT(shape(tmp_path / "run", context_length=context_length)).eval()
    loading.load_pretrained(model, str(tmp_path / "run"))
    ids = IDS[:, :context_length] % 257
    torch.testing.assert_close(model(ids), there(ids), rtol=0, atol=1e-6)


def test_rope_has_no_longest_context(tmp_path):
    save_ours(tmp_path / "run", position="rope")
    loading.load_pretrained(GPT(shape(tmp_path / "run", context_length=2 * T)), str(tmp_path / "run"))


def test_begin_with_a_hugging_face_folder(saved):
    folder, theirs = saved
    model = GPT(shape(folder)).eval()
    loading.load_pretrained(model, str(folder / "model.safetensors"))
    assert_same(model, theirs)


def test_beginning_refuses_what_does_not_fit(tmp_path):
    save_ours(tmp_path / "run")
    run = str(tmp_path / "run")
    with pytest.raises(UserError, match=r"n_head = 4 \(there 2\)"):  # it would load
        loading.load_pretrained(GPT(shape(tmp_path / "run", n_head=4)), run)
    with pytest.raises(UserError, match="context_length = 48: the model to begin with has 24"):
        loading.load_pretrained(GPT(shape(tmp_path / "run", context_length=48)), run)
    file = tmp_path / "run/ckpt/last/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"init_from = .*model.safetensors is damaged"):
        loading.load_pretrained(GPT(shape(tmp_path / "run")), run)


def test_cropping_leaves_what_it_was_given(saved):
    weights = hugging_face_weights(saved[0], shape(saved[0]))
    short = crop_positions(weights, 5)
    assert len(short["transformer.wpe.weight"]) == 5
    assert len(weights["transformer.wpe.weight"]) == T
    assert math.prod(short["transformer.wte.weight"].shape) == 320 * 32
