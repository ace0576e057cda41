"""pretrained.py: which folder is meant, what its model's shape is, and what is refused, without torch."""

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

GPT2 = {  # what transformers writes for OpenAI's smallest, and nothing that it leaves out
    **{"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_ctx": 1024, "n_positions": 1024},
    **{"vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05},
}
OURS = {
    **{"n_layer": 3, "n_head": 2, "n_embd": 32, "context_length": 16, "vocab_size": 257, "bias": False},
    **{"attn_bias": True, "head_bias": True, "tie_weights": False, "mlp_ratio": 2.5, "activation": "relu"},
    **{"position": "rope", "dropout": 0.3, "attention": "manual", "activation_checkpointing": True, "lr": 0.1},
}


def folder_of(path: Path, **files) -> Path:
    """A folder of files: JSON for dicts, else empty ones. `__` in a name stands for its dot."""
    path.mkdir(parents=True)
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else ""
        (path / name.replace("__", ".")).write_text(text)
    return path


def hugging_face(path: Path, **changes) -> str:
    return str(folder_of(path / "hf", config__json={**GPT2, **changes}, model__safetensors=None))


def ours(path: Path, **changes) -> Path:
    state = {"config": {**OURS, **changes}, "tokenizer": {"name": "byte"}}
    return folder_of(path, state__json=state, model__safetensors=None)


def test_import_loads_the_standard_library_only():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); old = set(sys.modules)\n"
    code += "from flatgpt.interop import pretrained\nnew = set(sys.modules) - old\n"
    code += "print({m.split('.')[0] for m in new} - set(sys.stdlib_module_names))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert eval(answer.stdout) == {"flatgpt", "config"}, answer


# ---------------------------------------------------------------------------------------------------------------------
# finding


def test_a_run_means_its_best_else_its_last(tmp_path):
    for name in ("iter_000001", "iter_000002"):
        ours(tmp_path / "run/ckpt" / name)
    os.symlink("iter_000002", tmp_path / "run/ckpt/last")
    assert find_pretrained(str(tmp_path / "run")) == tmp_path / "run/ckpt/iter_000002"
    os.symlink("iter_000009", tmp_path / "run/ckpt/best")  # leads nowhere
    assert find_pretrained(str(tmp_path / "run")) == tmp_path / "run/ckpt/iter_000002"
    (tmp_path / "run/ckpt/best").unlink()
    os.symlink("iter_000001", tmp_path / "run/ckpt/best")
    assert find_pretrained(str(tmp_path / "run")) == tmp_path / "run/ckpt/iter_000001"


def test_a_run_copied_without_links(tmp_path):
    ours(tmp_path / "run/ckpt/best")
    assert find_pretrained(str(tmp_path / "run")) == tmp_path / "run/ckpt/best"


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_or_a_file_of_weights(tmp_path, weights):
    folder = folder_of(tmp_path / "hf", **{"config__json": GPT2, weights: None, "pytorch_model__bin": None})
    assert find_pretrained(str(folder)) == find_pretrained(str(folder / weights)) == folder
    assert not pretrained.is_flatgpt(folder)
    assert pretrained.is_flatgpt(find_pretrained(str(ours(tmp_path / "ours") / "model.safetensors")))


def test_nanogpts_file_or_its_folder(tmp_path):
    folder = folder_of(tmp_path / "out-shakespeare", **{"ckpt.pt": None})
    assert find_pretrained(str(folder)) == find_pretrained(str(folder / "ckpt.pt")) == folder / "ckpt.pt"


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        (None, ".", "no such folder; a run's folder .* is expected"),
        ((), ".", "no weights are there; a run's folder .* is expected"),
        (("config.json",), ".", "config.json is there, model.safetensors is missing"),
        (("state.json",), ".", "state.json is there, model.safetensors is missing"),
        (("state.json", "config.json", "model.safetensors.index.json"), ".", "state.json is there, model.safetensors"),
        (("model.safetensors",), "model.safetensors", "model.safetensors alone does not say its model's shape"),
        (("config.json", "pytorch_model.bin"), ".", r"is a pickle.*anybody's code.*GPT2LMHeadModel.*'\)$"),
        (("config.json", "pytorch_model.bin.index.json"), ".", "is a pickle"),
        (("config.json", "model.safetensors", "pytorch_model.bin"), "pytorch_model.bin", "is a pickle"),
    ],
)
def test_what_is_not_usable_is_said(tmp_path, files, named, message):
    if files is not None:
        folder_of(tmp_path / "x", **dict.fromkeys(files))
    path = str(tmp_path / "x" / named)
    for ask in (find_pretrained, pretrained_shape, pretrained_tokenizer):
        with pytest.raises(UserError, match=message) as error:
            ask(path)
        assert str(error.value).startswith(f"init_from = {path}: ")
        assert "\n" not in str(error.value)


def test_heads_that_do_not_share_the_width(tmp_path):
    path = hugging_face(tmp_path, n_embd=48, n_head=5)
    with pytest.raises(UserError, match="n_embd = 48 is no multiple of n_head = 5"):
        pretrained_shape(path)


def test_a_run_without_checkpoints(tmp_path):
    (tmp_path / "run/ckpt").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint yet, neither ckpt/best nor ckpt/last"):
        find_pretrained(str(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------------------------
# shape and tokenizer


def test_shape_is_every_field_but_those_of_training():
    training = {"dropout", "attention", "activation_checkpointing"}
    assert set(pretrained.SHAPE) == {f.name for f in dataclasses.fields(ModelConfig)} - training


def test_shape_of_gpt2(tmp_path):
    expected = ModelConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257)
    shape = pretrained_shape(hugging_face(tmp_path))
    assert shape == {key: getattr(expected, key) for key in pretrained.SHAPE}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_positions": 512}, {"context_length": 512}),  # n_ctx is an old name, which transformers no longer reads
        ({"n_inner": None}, {"mlp_ratio": 4.0}),
        ({"n_inner": 1000}, {"mlp_ratio": 1000 / 768}),
        ({"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "gelu"}, {"activation": "gelu"}),
        ({"activation_function": "relu"}, {"activation": "relu"}),
        ({"tie_word_embeddings": False}, {"tie_weights": False}),
        ({"reorder_and_upcast_attn": True, "scale_attn_weights": True}, {}),
    ],
)
def test_shape_of_hugging_faces_variants(tmp_path, changes, expected):
    shape = pretrained_shape(hugging_face(tmp_path, **changes))
    (tmp_path / "plain").mkdir()
    assert shape == pretrained_shape(hugging_face(tmp_path / "plain")) | expected


def test_n_ctx_where_there_is_no_n_positions(tmp_path):
    config = {key: value for key, value in GPT2.items() if key != "n_positions"}
    folder = folder_of(tmp_path / "hf", config__json=config, model__safetensors=None)
    assert pretrained_shape(str(folder))["context_length"] == 1024


def test_every_width_of_the_hidden_layer_survives_as_a_ratio():
    assert all(round(inner / n_embd * n_embd) == inner for n_embd in (48, 768, 1600) for inner in range(1, 7000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = llama: only gpt2 is known"),
        ({"model_type": None}, "model_type = None"),
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
    ],
)
def test_models_of_another_kind_are_refused_by_name(tmp_path, changes, message):
    path = hugging_face(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        pretrained_shape(path)
    assert str(error.value).startswith(f"{path}/config.json: ")


def test_shape_of_a_checkpoint_of_ours(tmp_path):
    path = str(ours(tmp_path / "ckpt-1"))
    assert pretrained_shape(path) == {key: OURS[key] for key in pretrained.SHAPE}


def test_fields_younger_than_the_checkpoint_have_their_defaults(tmp_path):
    counts = {key: OURS[key] for key in pretrained.COUNTS}
    folder = folder_of(tmp_path / "x", state__json={"config": counts, "tokenizer": {"name": "byte"}})
    (folder / "model.safetensors").touch()
    expected = ModelConfig(**counts)
    assert pretrained_shape(str(folder)) == {key: getattr(expected, key) for key in pretrained.SHAPE}


@pytest.mark.parametrize("name", ["state.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "message"), [("{", "is damaged: "), ("[]", "is damaged: an object of keys"), ("\xff", "is damaged: ")]
)
def test_damaged_json(tmp_path, name, content, message):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    for ask in (pretrained_shape, pretrained_tokenizer):
        with pytest.raises(UserError, match=message) as error:
            ask(str(tmp_path))
        assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("state", [{}, {"config": 1, "tokenizer": {"name": "byte"}}, {"config": {}, "tokenizer": None}])
def test_a_state_of_something_else(tmp_path, state):
    folder = folder_of(tmp_path / "x", state__json=state, model__safetensors=None)
    with pytest.raises(UserError, match=r"state.json is not a flatGPT checkpoint's"):
        pretrained_shape(str(folder))


def test_a_state_with_a_wrong_count(tmp_path):
    with pytest.raises(UserError, match=r"state.json: vocab_size = None: a whole number"):
        pretrained_shape(str(ours(tmp_path / "x", vocab_size=None)))


def test_tokenizer(tmp_path):
    assert pretrained_tokenizer(str(ours(tmp_path / "ours"))) == "byte"
    assert pretrained_tokenizer(hugging_face(tmp_path)) == "gpt2"
    (tmp_path / "other").mkdir()
    assert pretrained_tokenizer(hugging_face(tmp_path / "other", vocab_size=50258)) is None


# ---------------------------------------------------------------------------------------------------------------------
# a shape that was changed


def asked(path: str, **changes) -> ModelConfig:
    return ModelConfig(**{**pretrained_shape(path), **changes})


def test_training_and_context_may_differ(tmp_path):
    path = hugging_face(tmp_path)
    check_shape(asked(path, context_length=256, dropout=0.1, attention="manual", activation_checkpointing=True), path)
    check_shape(asked(path, attn_bias=True), path)  # as bias is
    (tmp_path / "b").mkdir()
    path = str(ours(tmp_path / "b/ours", bias=False, attn_bias=False))
    check_shape(asked(path, attn_bias=None), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 6}, r"n_head = 6 \(there 12\); leave out"),
        ({"activation": "gelu", "n_layer": 6}, r"n_layer = 6 \(there 12\), activation = gelu \(there gelu_tanh\)"),
        ({"attn_bias": False}, r"attn_bias = False \(there True\)"),
        ({"vocab_size": 50304}, r"vocab_size = 50304 \(there 50257\)"),
        ({"position": "rope"}, "position = rope"),
    ],
)
def test_a_shape_that_is_not_the_weights_is_refused(tmp_path, changes, message):
    path = hugging_face(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        check_shape(asked(path, **changes), path)
    assert str(error.value).startswith(f"init_from = {path} ")
