"""Configs and weights of other projects' files; what is refused, none of whose code runs."""

import contextlib
import json
import os
import pickle
import shlex
from pathlib import Path

import pytest
import torch
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from safetensors.torch import load_file, save_file

from config import ModelConfig, UserError
from flatgpt.interop import loading
from flatgpt.interop.pretrained import find, read_config
from model import GPT

GPT2 = {  # what transformers writes for OpenAI's smallest model
    **{"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_ctx": 1024, "n_positions": 1024},
    **{"vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05},
}


@pytest.fixture
def write(tmp_path):
    """write("config.json", content): the folder with this file and one for weights."""

    def write_file(name: str, content: dict | bytes) -> str:
        (tmp_path / "model.safetensors").touch()
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(tmp_path)

    return write_file


def refused(path: Path | str, message: str) -> None:
    """Config or weights are refused in one line that names the file."""
    with pytest.raises(UserError, match=message) as error:
        loading.load_pretrained(GPT(read_config(str(path))), str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's own advice is to run the code in the file


# ---------------------------------------------------------------------------------------------------------------------
# config


@pytest.mark.parametrize(("n_positions", "expected"), [(512, 512), (None, 1024)])
def test_number_of_positions(write, n_positions, expected):
    """n_ctx is an old name, which transformers no longer reads."""
    settings = {key: value for key, value in {**GPT2, "n_positions": n_positions}.items() if value is not None}
    assert read_config(write("config.json", settings)).context_length == expected


def test_fields_younger_than_the_checkpoint_have_their_defaults(write):
    counts = {"n_layer": 3, "n_head": 2, "n_embd": 32, "context_length": 16, "vocab_size": 257}
    assert read_config(write("state.json", {"config": counts | {"lr": 0.1}})) == ModelConfig(**counts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama': .* only gpt2"),
        ({"activation_function": "silu"}, "activation_function = 'silu': .* only gelu_new or"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False: .* only True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"n_layer": "12"}, "n_layer = '12': a whole number is expected"),
        ({"n_positions": True}, "n_positions = True: a whole number is expected"),
        ({"n_positions": 10**30}, "n_positions = 1000.*at most 10000000 is expected"),
        ({"n_inner": 0}, "n_inner = 0: at least 1"),
        ({"n_inner": [64]}, r"n_inner = \[64\]: a whole number"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = None: true or false"),
        ({"activation_function": ["relu"]}, r"activation_function = \['relu'\]: .* only gelu_new or"),
        ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map = .*: model.py supports only None"),
        ({"vocab_size": 65537}, "vocab_size = 65537: at most 65536 is expected"),
        ({"n_embd": 48, "n_head": 5}, "n_embd = 48 is not a multiple of n_head = 5"),
    ],
    ids=str,
)
def test_models_of_another_kind_are_refused_by_name(write, changes, message):
    refused(write("config.json", GPT2 | changes), message)


@pytest.mark.parametrize("name", ["state.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "damaged: .*") for content in (b"{", b"[1]", b"[]", b"3", b"null", b"\xff", b"[" * 100_000)),
        (b"{}", "(n_layer = None: a whole number is expected|config = None is not an object).*"),
        (b'{"n_layer": 1, "config": {}, "n_layer": 2}', "damaged: it has two values of 'n_layer'; "),
        (b"\n<!DOCTYPE html><html>Log in</html>", "a web page, not the file itself: .*"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS.*git lfs pull.*"),
    ],
)
def test_damaged_settings(write, name, content, message):
    refused(write(name, content), f"{name}(:| is).* {message}copy it again")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layer", "12", "a whole number"),
        ("n_embd", -4, "at least 1"),
        ("vocab_size", None, "a whole number"),
        ("context_length", 2**62, "at most 10000000"),
        ("bias", "x", "true or false"),
        ("tie_weights", 0, "true or false"),
        ("activation", "zz", "one of gelu_tanh, gelu, relu"),
        ("activation", {}, "a string"),
        ("position", ["rope"], "a string"),
        ("dropout", -1, "at least 0"),
        ("mlp_ratio", float("nan"), "a number"),
        ("mlp_ratio", 1e30, "at most 1000"),
        ("mlp_ratio", 10**400, "a number"),
        ("head_bias", True, None),  # needs an untied head
    ],
)
def test_values_of_a_checkpoint_that_no_setting_can_have(write, key, value, message):
    counts = {"n_layer": 3, "n_head": 2, "n_embd": 32, "context_length": 16, "vocab_size": 257}
    said = f"state.json: {key} = .*: {message} is expected" if message else "is damaged: head_bias needs"
    refused(write("state.json", {"config": counts | {key: value}}), said)


@pytest.mark.parametrize("kind", ["Hugging Face", "nanoGPT", "flatGPT"])
@pytest.mark.parametrize("change", [{"n_layer": 10_000}, {"n_embd": 10**6}, {"n_positions": 10**7}], ids=str)
def test_model_that_is_larger_than_its_weights_is_not_built(tmp_path, monkeypatch, kind, change):
    model = random_gpt2()
    model.save_pretrained(tmp_path)
    sizes = {key: getattr(model.config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")}
    sizes |= change
    if kind == "Hugging Face":
        (tmp_path / "config.json").write_text(json.dumps(sizes))
    elif kind == "nanoGPT":
        (tmp_path / "model.safetensors").unlink()
        sizes["block_size"] = sizes["n_positions"]
        torch.save(nanogpt_checkpoint(model, **sizes), tmp_path / "ckpt.pt")
        (tmp_path / "config.json").unlink()
    else:
        sizes["context_length"] = sizes["n_positions"]
        (tmp_path / "state.json").write_text(json.dumps({"config": sizes}))
    with pytest.raises(UserError, match=r"describes a model of .* parameters, but the weights have "):
        read_config(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# weights


@pytest.mark.parametrize("nanogpt", [False, True], ids=["Hugging Face", "nanoGPT"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("transformer.h.1.mlp.c_proj.bias", None, "missing .*transformer.h.1.mlp.c_proj.bias"),
        ("score.weight", lambda _: torch.zeros(2, 32), "unexpected .*score.weight"),
        ("transformer.h.0.mlp.c_fc.weight", lambda matrix: matrix.T, "mismatch for transformer.h.0.mlp.c_fc.weight"),
        ("transformer.h.0.mlp.c_fc.weight", lambda matrix: matrix[0], "mismatch for transformer.h.0.mlp.c_fc.weight"),
        (
            "transformer.wte.weight",
            lambda table: table[1:],
            "(mismatch for|lm_head.weight differs from) transformer.wte",
        ),
        ("transformer.wpe.weight", lambda table: table[1:], "mismatch for transformer.wpe.weight"),
        ("transformer.wpe.weight", lambda table: table[0, 0], "does not fit its config"),
        ("transformer.ln_f.weight", lambda vector: vector.to(torch.int8), "ln_f.weight' is torch.int8: quantized"),
        ("lm_head.weight", lambda _: torch.zeros(301, 32), "lm_head.weight differs from transformer.wte.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, name, change, message, nanogpt):
    reference = random_gpt2(activation_function="gelu")
    reference.save_pretrained(tmp_path)
    content, file = nanogpt_checkpoint(reference), tmp_path / "model.safetensors"
    weights = content["model"] if nanogpt else load_file(file)
    tensor = weights.pop(name, None)
    weights |= {name: change(tensor).contiguous()} if change else {}
    if nanogpt:
        torch.save(content, file := tmp_path / "ckpt.pt")
    else:
        save_file(weights, file)
    refused(file if nanogpt else tmp_path, message)


def test_missing_and_damaged_safetensors_are_named(tmp_path):
    random_gpt2().save_pretrained(tmp_path, max_shard_size="20kB")
    shard, index = sorted(tmp_path.glob("model-*.safetensors"))[1], tmp_path / "model.safetensors.index.json"
    content = shard.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 548105171\n"
    damaged = "damaged"
    for body, kind in {
        b"": damaged,
        content[:-1]: damaged,
        b"\xff" * 16 + content[16:]: damaged,
        pointer: r"a pointer of Git LFS, not the file itself \(git lfs pull\)",
        b"<html>Log in</html>": "a web page, not the file itself",
    }.items():
        shard.write_bytes(body)
        refused(tmp_path, f"{shard.name} is {kind}.*: copy it again")
    shard.unlink()
    refused(tmp_path, f"{shard.name} is missing")
    for text in ("{}", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        refused(tmp_path, f"{index.name} is damaged: .*; copy it again")
    for name in ('["a"]', "3", '"../a.safetensors"'):
        index.write_text(f'{{"weight_map": {{"a": {name}, "b": "b.safetensors"}}}}')
        refused(tmp_path, f"{index.name}: .* is not a safetensors file in the same folder")


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt


class Payload:
    """Unpickling it runs a command, as any pickle may."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.canary))}",)


@pytest.mark.parametrize("key", ["model", "optimizer"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_no_code_of_a_malicious_pickle_runs(tmp_path, form, key):
    file, canary, contents = tmp_path / "ckpt.pt", tmp_path / "canary", nanogpt_checkpoint(random_gpt2())
    contents[key] = {**contents.get(key, {}), "x": Payload(canary)}
    if form == "bare":
        file.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, file, _use_new_zipfile_serialization=form == "zip")
    refused(file, "is not loaded: .* could run arbitrary code")
    assert not canary.exists()
    torch.load(file, weights_only=False) if form != "bare" else pickle.loads(file.read_bytes())
    assert canary.exists()  # the payload works


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_nanogpt_files(tmp_path):
    """Cut, of another kind, or changed somewhere in its pickle, which raises errors of all kinds."""
    file, contents = tmp_path / "ckpt.pt", nanogpt_checkpoint(random_gpt2())
    for content in ([1], {"a": 1}, torch.zeros(3), contents | {"model": [1]}, contents | {"model": {"w": 3}}):
        torch.save(content, file)
        refused(file, r"is not a nanoGPT checkpoint: it must contain model \(tensors by name\) and model_args")
    torch.save(nanogpt_checkpoint(random_gpt2(), block_size=24.0), file)
    assert find(str(tmp_path)) == file
    refused(file, "block_size = 24.0: a whole number is expected")
    torch.save(contents, file)
    whole = file.read_bytes()
    start = whole.index(b"data.pkl") + 8
    for damaged in (b"", whole[:-10], b"First Citizen:\n"):
        file.write_bytes(damaged)
        refused(file, "is not loaded: it is damaged")
    file.write_bytes(b"<html>Log in</html>")
    refused(file, "is not loaded: it is a web page, not the file itself$")
    for k in range(start, start + 1200, 25):
        file.write_bytes(whole[:k] + bytes([whole[k] ^ 0x55]) + whole[k + 1 :])
        with contextlib.suppress(UserError):
            read_config(str(file))
