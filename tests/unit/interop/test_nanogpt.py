"""nanoGPT's ckpt.pt: its model's shape, and files that are refused, none of whose code runs."""

import io
import os
import pickle
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from gpt2_reference import nanogpt_checkpoint, random_gpt2

from config import ModelConfig, UserError
from flatgpt.interop.nanogpt import nanogpt_shape, nanogpt_weights
from flatgpt.interop.pretrained import SHAPE, pretrained_shape


@pytest.fixture(scope="module")
def reference():
    return random_gpt2(activation_function="gelu")


@pytest.fixture
def contents(reference) -> dict:
    return nanogpt_checkpoint(reference)


@pytest.fixture
def file(tmp_path) -> Path:
    """Where a checkpoint goes."""
    return tmp_path / "ckpt.pt"


def refused(file: Path, message: str) -> None:
    """Shape and weights are refused in one line that names the file."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=24, vocab_size=301, activation="gelu")
    for read in (nanogpt_shape, lambda file: nanogpt_weights(file, config)):
        with pytest.raises(UserError, match=message) as error:
            read(file)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)  # torch's own advice is to run the code in the file


def test_shape(file, reference):
    torch.save(nanogpt_checkpoint(reference, bias=False), file)
    assert nanogpt_shape(file) == {
        **{"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 24, "vocab_size": 301, "bias": False},
        **{"attn_bias": None, "head_bias": False, "tie_weights": True, "mlp_ratio": 4.0, "activation": "gelu"},
        "position": "learned",
    }
    assert set(nanogpt_shape(file)) == set(SHAPE)


class Payload:
    """Unpickling it runs a command, as any pickle may."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.canary))}",)


@pytest.mark.parametrize("key", ["model", "model_args", "optimizer", "best_val_loss", "beside"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_no_code_of_a_malicious_pickle_runs(file, tmp_path, contents, form, key):
    canary = tmp_path / "canary"
    contents[key] = {**contents[key], "x": Payload(canary)} if key[:5] in ("model", "optim") else Payload(canary)
    if form == "bare":
        file.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, file, _use_new_zipfile_serialization=form == "zip")
    refused(file, "more than tensors and plain types" if form == "zip" else "a zip file, as torch.save writes it, is")
    assert not canary.exists()
    torch.load(file, weights_only=False) if form != "bare" else pickle.loads(file.read_bytes())
    assert canary.exists()  # the payload works


def test_functions_of_torch_are_refused_too(file, contents):
    torch.save(contents | {"config": torch.nn.functional.relu}, file)
    refused(file, "more than tensors and plain types")


@pytest.mark.parametrize("damage", ["empty", "half", "tail", "text", "pointer", "another zip"])
def test_a_damaged_file(file, contents, damage):
    torch.save(contents, file)
    content, other = file.read_bytes(), io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a.txt", "a")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 548105171\n"
    damaged = {"empty": b"", "half": content[: len(content) // 2], "tail": content[:-10], "text": b"First Citizen:\n"}
    file.write_bytes(damaged.get(damage, pointer if damage == "pointer" else other.getvalue()))
    refused(file, "is damaged or not a checkpoint of nanoGPT: ")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_wrong_instruction_in_its_pickle(file, contents):
    """torch's unpickler raises a KeyError or UnicodeDecodeError there, among others."""
    torch.save(contents, file)
    content = file.read_bytes()
    start, raised = content.index(b"data.pkl") + 8, set()
    for k in range(start, start + 1200, 7):
        file.write_bytes(content[:k] + bytes([content[k] ^ 0x55]) + content[k + 1 :])
        try:
            nanogpt_shape(file)
        except UserError as error:
            raised.add(str(error).partition(": ")[2].partition(":")[0])
    assert {"KeyError", "UnicodeDecodeError"} <= raised


@pytest.mark.parametrize("key", ["whole", "model"])
@pytest.mark.parametrize("content", [[1], {"a": 1}, {1: torch.zeros(3)}, torch.zeros(3)], ids=str)
def test_other_things_that_torch_saves(file, contents, content, key):
    torch.save(content if key == "whole" else contents | {"model": content}, file)
    refused(file, r"is not a checkpoint of nanoGPT: model \(tensors by name\) and model_args are expected")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layer", None, "n_layer = None: a whole number of at least 1 and at most 10,000 is expected"),
        ("n_layer", 0, "n_layer = 0: "),
        ("block_size", 24.0, "block_size = 24.0: a whole number of at least 1"),
        ("vocab_size", 70_000, "vocab_size = 70000: a whole number of at least 1 and at most 65,536"),
        ("n_head", True, "n_head = True: "),
        ("n_head", 5, "n_embd = 32 is not a multiple of n_head = 5"),
        ("bias", 1, "bias = 1: true or false"),
    ],
)
def test_wrong_values_in_model_args(file, reference, key, value, message):
    torch.save(nanogpt_checkpoint(reference, **{key: value}), file)
    with pytest.raises(UserError, match=message) as error:
        pretrained_shape(str(file))
    assert str(error.value).startswith(str(file))
