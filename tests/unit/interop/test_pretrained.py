"""Which weights a name means, their model's shape and tokenizer, and what is refused, without torch."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from config import ModelConfig, UserError
from flatgpt.interop import pretrained
from flatgpt.interop.pretrained import check_shape, find_pretrained, pretrained_shape, pretrained_tokenizer

GPT2 = {  # what transformers writes for OpenAI's smallest model, with what it leaves out
    **{"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_ctx": 1024, "n_positions": 1024},
    **{"vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05},
}
CHECKPOINT = {
    **{"n_layer": 3, "n_head": 2, "n_embd": 32, "context_length": 16, "vocab_size": 257, "bias": False},
    **{"attn_bias": True, "head_bias": True, "tie_weights": False, "mlp_ratio": 2.5, "activation": "relu"},
    **{"position": "rope", "dropout": 0.3, "attention": "manual", "activation_checkpointing": True, "lr": 0.1},
}


def make_folder(path: Path, **files) -> Path:
    """A folder of files: JSON for dicts, else empty ones. `__` in a name stands for a dot."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content) if isinstance(content, dict) else "")
    return path


def hugging_face(path: Path, **changes) -> str:
    config = {key: value for key, value in {**GPT2, **changes}.items() if value != "left out"}
    return str(make_folder(path, config__json=config, model__safetensors=None))


def flatgpt_checkpoint(path: Path, **changes) -> Path:
    state = {"config": {**CHECKPOINT, **changes}, "tokenizer": {"name": "byte"}}
    return make_folder(path, state__json=state, model__safetensors=None)


def test_import_loads_the_standard_library_only():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); old = set(sys.modules)\n"
    code += "from flatgpt.interop import pretrained\nnew = set(sys.modules) - old\n"
    code += "print({m.split('.')[0] for m in new} - set(sys.stdlib_module_names))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert eval(answer.stdout) == {"flatgpt", "config"}, answer


# ---------------------------------------------------------------------------------------------------------------------
# finding


def test_a_run_means_its_best_else_its_last(tmp_path):
    run, ckpt = str(tmp_path / "run"), tmp_path / "run/ckpt"
    ckpt.mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint yet, neither ckpt/best nor ckpt/last"):
        find_pretrained(run)
    for name in ("iter_000001", "iter_000002"):
        flatgpt_checkpoint(ckpt / name)
    os.symlink("iter_000002", ckpt / "last")
    assert find_pretrained(run) == ckpt / "iter_000002"
    os.symlink("iter_000009", ckpt / "best")  # does not exist
    assert find_pretrained(run) == ckpt / "iter_000002"
    (ckpt / "best").unlink()
    os.symlink("iter_000001", ckpt / "best")
    assert find_pretrained(run) == ckpt / "iter_000001"
    copied = flatgpt_checkpoint(tmp_path / "copy/ckpt/best")  # without links
    assert find_pretrained(str(tmp_path / "copy")) == copied


def test_folders_and_files_of_weights(tmp_path):
    for weights in ("model.safetensors", "model.safetensors.index.json"):
        folder = make_folder(tmp_path / f"of {weights}", config__json=GPT2, pytorch_model__bin=None, **{weights: None})
        assert find_pretrained(str(folder)) == find_pretrained(str(folder / weights)) == folder
    nanogpt = make_folder(tmp_path / "out-shakespeare", ckpt__pt=None)
    assert find_pretrained(str(nanogpt)) == find_pretrained(str(nanogpt / "ckpt.pt")) == nanogpt / "ckpt.pt"


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        (None, ".", "no such folder; a run's folder .* is expected"),
        ((), ".", "no weights are there; a run's folder .* is expected"),
        (("config.json",), ".", "config.json is there, model.safetensors is missing"),
        (("state.json", "config.json", "model.safetensors.index.json"), ".", "state.json is there, model.safetensors"),
        (("model.safetensors",), "model.safetensors", "model.safetensors alone does not say its model's shape"),
        (("config.json", "pytorch_model.bin"), ".", r"is a pickle.*anybody's code.*GPT2LMHeadModel.*'\)$"),
        (("config.json", "pytorch_model.bin.index.json"), ".", "is a pickle"),
        (("config.json", "model.safetensors", "pytorch_model.bin"), "pytorch_model.bin", "is a pickle"),
    ],
)
def test_unusable_weights(tmp_path, files, named, message):
    if files is not None:
        make_folder(tmp_path / "x", **dict.fromkeys(files))
    path = str(tmp_path / "x" / named)
    for function in (find_pretrained, pretrained_shape, pretrained_tokenizer):
        with pytest.raises(UserError, match=message) as error:
            function(path)
        assert str(error.value).startswith(f"init_from = {path}: ")
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# shape and tokenizer


def test_shape_is_every_field_but_those_of_training():
    training = {"dropout", "attention", "activation_checkpointing"}
    assert set(pretrained.SHAPE) == {f.name for f in dataclasses.fields(ModelConfig)} - training


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"n_positions": 512}, {"context_length": 512}),  # n_ctx is an old name, which transformers no longer reads
        ({"n_positions": "left out"}, {}),
        ({"n_inner": None}, {"mlp_ratio": 4.0}),
        ({"n_inner": 1000}, {"mlp_ratio": 1000 / 768}),
        ({"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "gelu"}, {"activation": "gelu"}),
        ({"activation_function": "relu"}, {"activation": "relu"}),
        ({"tie_word_embeddings": False}, {"tie_weights": False}),
        ({"reorder_and_upcast_attn": True, "scale_attn_weights": True}, {}),
    ],
    ids=str,
)
def test_shape_of_hugging_faces_variants(tmp_path, changes, expected):
    gpt2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257)
    shape = pretrained_shape(hugging_face(tmp_path / "hf", **changes))
    assert shape == {key: getattr(gpt2, key) for key in pretrained.SHAPE} | expected


def test_every_width_of_the_hidden_layer_survives_as_a_ratio():
    assert all(round(inner / n_embd * n_embd) == inner for n_embd in (48, 768, 1600) for inner in range(1, 7000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = llama: only gpt2 is supported"),
        ({"activation_function": "silu"}, "activation_function = silu: one of gelu_new, .* is expected"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False changes .* computes True only"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True changes"),
        ({"add_cross_attention": True}, "add_cross_attention = True changes"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06 changes"),
        ({"n_layer": "12"}, "n_layer = '12': a whole number of at least 1 and at most 10,000 is expected"),
        ({"n_head": 0}, "n_head = 0"),
        ({"n_embd": None}, "n_embd = None"),
        ({"n_positions": True}, "n_positions = True"),
        ({"n_inner": 0}, "n_inner = 0"),
        ({"vocab_size": 65537}, "vocab_size = 65537: a whole number of at least 1 and at most 65,536 is expected"),
        ({"n_embd": 48, "n_head": 5}, "n_embd = 48 is not a multiple of n_head = 5"),
    ],
    ids=str,
)
def test_models_of_another_kind_are_refused_by_name(tmp_path, changes, message):
    path = hugging_face(tmp_path / "hf", **changes)
    with pytest.raises(UserError, match=message) as error:
        pretrained_shape(path)
    assert str(error.value).startswith(path)


def test_shape_of_a_checkpoint(tmp_path):
    """Fields younger than the checkpoint have their defaults."""
    assert pretrained_shape(str(flatgpt_checkpoint(tmp_path / "new"))) == {k: CHECKPOINT[k] for k in pretrained.SHAPE}
    counts = {key: CHECKPOINT[key] for key in pretrained.COUNTS}
    state = {"config": counts, "tokenizer": {"name": "byte"}}
    old = make_folder(tmp_path / "old", state__json=state, model__safetensors=None)
    assert pretrained_shape(str(old)) == {key: getattr(ModelConfig(**counts), key) for key in pretrained.SHAPE}
    with pytest.raises(UserError, match=r"state.json: vocab_size = None: a whole number"):
        pretrained_shape(str(flatgpt_checkpoint(tmp_path / "bad", vocab_size=None)))


@pytest.mark.parametrize("name", ["state.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged: "), ("[]", "is damaged: an object of keys"), ("\xff", "is damaged: "), ("{}", "json")],
)
def test_damaged_json(tmp_path, name, content, message):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    for function in (pretrained_shape, pretrained_tokenizer):
        with pytest.raises(UserError, match=message) as error:
            function(str(tmp_path))
        assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("state", [{}, {"config": 1, "tokenizer": {"name": "byte"}}, {"config": {}, "tokenizer": None}])
def test_a_state_of_something_else(tmp_path, state):
    folder = make_folder(tmp_path / "x", state__json=state, model__safetensors=None)
    with pytest.raises(UserError, match=r"state.json is not a flatGPT checkpoint's"):
        pretrained_shape(str(folder))


def test_tokenizer(tmp_path):
    """A vocabulary of GPT-2's size is taken for GPT-2's, also with nanoGPT's padding."""
    assert pretrained_tokenizer(str(flatgpt_checkpoint(tmp_path / "run"))) == "byte"
    for size, name in ((50257, "gpt2"), (50304, "gpt2"), (50258, None)):
        assert pretrained_tokenizer(hugging_face(tmp_path / str(size), vocab_size=size)) == name


# ---------------------------------------------------------------------------------------------------------------------
# a config of another shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 256, "dropout": 0.1, "attention": "manual", "activation_checkpointing": True}, None),
        ({"attn_bias": True}, None),  # as bias is
        ({"n_head": 6}, r"n_head = 6 \(there 12\); leave out"),
        ({"activation": "gelu", "n_layer": 6}, r"n_layer = 6 \(there 12\), activation = gelu \(there gelu_tanh\)"),
        ({"attn_bias": False}, r"attn_bias = False \(there True\)"),
        ({"vocab_size": 50304}, r"vocab_size = 50304 \(there 50257\)"),
        ({"position": "rope"}, "position = rope"),
    ],
    ids=str,
)
def test_shape_has_to_be_that_of_the_weights(tmp_path, changes, message):
    path = hugging_face(tmp_path / "hf")
    config = ModelConfig(**{**pretrained_shape(path), **changes})
    if message is None:
        check_shape(config, path)
        return
    with pytest.raises(UserError, match=message) as error:
        check_shape(config, path)
    assert str(error.value).startswith(f"init_from = {path} ")
