"""Every name of a model leads to the same model; what is known of it, and what is refused."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from exported import T, export_here, save_run
from gpt2_reference import nanogpt_checkpoint, random_gpt2

import flatgpt
from config import TrainConfig, UserError
from flatgpt.cli.cli import parse
from flatgpt.interop import loading, pretrained
from model import GPT

IDS, FILES = torch.arange(T)[None], ("model.safetensors", "state.json")


def test_every_name_of_a_model(in_tmp, capsys):
    """Nothing is printed to standard output, where a notebook or a script may print text."""
    model = save_run()
    source = loading.find("out/r")
    assert (source.path, source.tokenizer, source.end_of_text) == (Path("out/r/ckpt/iter_000007"), "byte", False)
    assert source.describe() == "out/r/ckpt/iter_000007, iter 7"
    checkpoint = source.path
    export_here("--out", "hf")
    capsys.readouterr()
    exported = loading.find("hf")
    assert (exported.state, exported.tokenizer, exported.end_of_text, exported.describe()) == ({}, "byte", True, "hf")
    files = [checkpoint / "model.safetensors", checkpoint / "state.json", "out/r/metrics.csv"]
    for name in (None, "out/r", checkpoint, *files, "hf", "hf/model.safetensors", "hf/config.json"):
        again, encoding = flatgpt.load(name and str(name))
        assert torch.equal(again(IDS), model(IDS))
        assert (encoding.name, again.training) == ("byte", False)
        if name:
            assert torch.equal(GPT.from_pretrained(str(name))(IDS), model(IDS))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["out/r", "out/r/metrics.csv", *(f"out/r/ckpt/best/{n}" for n in ("", *FILES))])
def test_every_name_of_a_checkpoint_verifies_it(in_tmp, name):
    save_run()
    weights = Path("out/r/ckpt/best/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    warnings = []
    with pytest.raises(UserError, match="no usable checkpoint"):
        loading.find(name, warnings.append)
    assert "model.safetensors is damaged: its SHA-256 differs" in warnings[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer", 3), ("tokenizer", {"name": ["byte"], "ranks_sha256": "0"}), ("tokenizer", {"name": "byte"})]
    + [("data", value) for value in ([], {"folder": "x", "end_of_text": "no"}, {"folder": 3, "end_of_text": True})]
    + [("data", {"tokens": [3], "end_of_text": True}), ("command", 3), ("config", {"init_from": 3})],
)
def test_facts_of_a_checkpoint_that_have_another_type(in_tmp, key, value):
    """A run, a script or another program wrote state.json with its hash."""
    save_run(state={key: value})
    with pytest.raises(UserError, match=f"state.json is damaged: .*{key}") as caught:
        loading.load(loading.find("out/r"), "cpu")
    assert "\n" not in str(caught.value)


def test_a_smaller_context_and_a_text_of_that_model(in_tmp):
    """README's lines for a notebook."""
    whole = save_run()
    model, encoding = flatgpt.load(context_length=8)
    assert (model.config.context_length, len(model.transformer.wpe.weight)) == (8, 8)
    ids = torch.tensor([encoding.encode("99 green")])
    assert torch.equal(model(ids), whole(ids))
    assert encoding.decode(model.generate(ids, max_new_tokens=5)[0].tolist()).startswith("99 green")
    with pytest.raises(UserError, match=f"context_length = {T + 1}: .* trained with {T}, which is the maximum"):
        flatgpt.load(context_length=T + 1)


def test_a_name_on_the_hub_is_downloaded_once(in_tmp, host, capsys):
    """For every function that asks."""
    saved = save_run()
    export_here("--out", "hf")
    commit = host.publish("user/tiny", {p.name: p.read_bytes() for p in Path("hf").iterdir()}, kind="models")
    pretrained.fetch_once.cache_clear()
    assert torch.equal(GPT.from_pretrained("user/tiny")(IDS), saved(IDS))
    assert capsys.readouterr().err.splitlines()[-1] == f"user/tiny: commit {commit[:7]}, from the hub"
    started = GPT(parse(TrainConfig, ["--init_from", "user/tiny"], pretrained.initial_shape).model()).eval()
    loading.load_pretrained(started, "user/tiny")
    assert torch.equal(started(IDS), saved(IDS))
    assert "commit" not in capsys.readouterr().err
    pretrained.fetch_once.cache_clear()


def test_tokenizer_that_encodes_differently_now_is_refused(in_tmp):
    save_run()
    source = loading.find("out/r")
    changes = {
        "byte does not have the vocabulary": {"state": {"tokenizer": {"ranks_sha256": "0" * 64}}},
        "has 200 ids, tokenizer byte 257": {"state": {}, "config": dataclasses.replace(source.config, vocab_size=200)},
    }
    for message, fields in changes.items():
        with pytest.raises(UserError, match=message):
            loading.load(dataclasses.replace(source, **fields), "cpu")


def test_tokenizer_of_a_model_without_a_vocabulary(in_tmp):
    """A vocabulary of GPT-2's size is taken for GPT-2's, also with nanoGPT's padding. Other sizes are unknown."""
    for size in (50257, 50304):
        torch.save(nanogpt_checkpoint(random_gpt2(vocab_size=size, n_embd=2)), "ckpt.pt")
        assert loading.find(".").path == Path("ckpt.pt")
        model, encoding = flatgpt.load("ckpt.pt", context_length=8)
        assert (encoding.name, model.config.vocab_size) == ("gpt2", size)
    random_gpt2(vocab_size=65).save_pretrained("characters")
    with pytest.raises(UserError, match="model_path = characters: the tokenizer of this model is unknown"):
        loading.find("characters")


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ("", "absent", "no such folder; a run's folder .* or nanoGPT's ckpt.pt is expected"),
        ("", "a/b/c", "no such folder; .*a model on the hub"),
        ("notes.txt", "x", "no weights in this folder"),
        ("ckpt/lost/state.json", "x", "no weights in this folder"),
        ("config.json", "x", "this folder has only config.json"),
        ("model.safetensors", "x/model.safetensors", "this folder has only model.safetensors"),
        ("config.json pytorch_model.bin", "x", r"pickle.*arbitrary code.*GPT2LMHeadModel.*'\)$"),
        ("config.json pytorch_model.bin.index.json", "x", "is a pickle"),
        ("config.json model.safetensors pytorch_model.bin", "x/pytorch_model.bin", "is a pickle"),
    ],
)
def test_names_that_lead_to_no_model(in_tmp, files, name, message):
    for file in files.split():
        Path("x", file).parent.mkdir(parents=True, exist_ok=True)
        Path("x", file).touch()
    for key in ("init_from", "model_path"):
        with pytest.raises(UserError, match=f"^{key} = {name}: .*{message}"):
            pretrained.find(name, key)


# ---------------------------------------------------------------------------------------------------------------------
# init_from


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_initial_weights_of_a_run(in_tmp, position):
    saved = save_run(position=position, bias=False, tie_weights=False)
    config = parse(TrainConfig, ["--init_from", "out/r"], pretrained.initial_shape)
    assert pretrained.shape(config) == pretrained.shape(saved.config)
    lengths = (8, T, 2 * T) if position == "rope" else (8, T)  # RoPE has no longest context
    for length in lengths:
        model, ids = GPT(dataclasses.replace(config.model(), context_length=length)).eval(), IDS[:, :length]
        loading.load_pretrained(model, "out/r")
        torch.testing.assert_close(model(ids), saved(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1, "attention": "manual", "activation_checkpointing": True, "attn_bias": True}, None),
        ({"context_length": 48}, "context_length = 48: .* was trained with 32"),
        # their tensors would fit
        ({"n_head": 4}, r"n_head = 4 \(weights: 2\); leave out"),
        ({"activation": "gelu", "n_layer": 6}, r"n_layer = 6 \(weights: 2\), activation = gelu \(weights: gelu_tanh\)"),
        ({"attn_bias": False}, r"attn_bias = False \(weights: True\)"),
    ],
    ids=str,
)
def test_initial_weights_of_another_shape(in_tmp, changes, message):
    model = GPT(dataclasses.replace(save_run().config, **changes))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        loading.load_pretrained(model, "out/r")


def test_a_run_means_its_best_else_its_last(in_tmp):
    """Copies without links too. Damaged weights are an error."""
    model, ckpt = save_run(), Path("out/r/ckpt")
    shutil.copytree(ckpt / "iter_000007", ckpt / "iter_000009")
    for best, found in (("iter_000009", "iter_000009"), ("iter_000011", "iter_000007")):  # the latter does not exist
        (ckpt / "best").unlink()
        (ckpt / "best").symlink_to(best)
        assert pretrained.find("out/r") == ckpt / found
    shutil.copytree(ckpt / "iter_000007", "copy/ckpt/best")
    assert pretrained.find("copy") == Path("copy/ckpt/best")
    shutil.copytree(ckpt / "iter_000007", "no_links/ckpt/iter_000007")
    Path("no_links/ckpt/last").write_text("iter_000007")  # where symlinks are refused
    for name in ("no_links", "no_links/ckpt/last"):
        assert pretrained.find(name) == Path("no_links/ckpt/iter_000007")
    file = ckpt / "iter_000007/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"init_from = out/r: .*model.safetensors is damaged"):
        loading.load_pretrained(GPT(model.config), "out/r")
