"""Every name of a model leads to the same model; what is known of it, and what is refused."""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from exported import export_here
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from random_models import random_model

import flatgpt
from config import ModelConfig, TrainConfig, UserError
from flatgpt.cli.cli import parse
from flatgpt.data import tokenizer
from flatgpt.interop import loading, pretrained
from flatgpt.runs import checkpoint
from model import GPT

T = 32


@pytest.fixture(scope="module")
def home(tiny_home, tmp_path_factory) -> Path:
    """out/quickstart is the session's run, hf its export. Read only."""
    folder = tmp_path_factory.mktemp("loading")
    (folder / "out").mkdir()
    (folder / "out" / "quickstart").symlink_to(tiny_home / "out" / "quickstart")
    with contextlib.chdir(folder):
        export_here("--model_path", "out/quickstart", "--out", "hf")
    return folder


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


def load(path: str | None, **more):
    source = loading.find(path)
    return source, *loading.load(source, "cpu", **more)


def same(one: GPT, other: GPT) -> bool:
    """Whether all weights are equal; biases that only one of them has are zero."""
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], tensor) if name in one else not tensor.any() for name, tensor in other.items())


def save_run(run: Path, **changes) -> GPT:
    """A run's folder with one checkpoint of a random model of bytes."""
    model = random_model(context_length=24, vocab_size=257, **changes).eval()
    vocabulary = {"name": "byte", "ranks_sha256": tokenizer.ranks_hash(tokenizer.load("byte"))}
    state = {"iter": 7, "config": dataclasses.asdict(model.config), "tokenizer": vocabulary}
    checkpoint.save(run, state, model.state_dict(), {}, keep=1)
    return model


def test_every_name_of_a_model(here, capsys):
    """Nothing is printed to standard output, where a notebook or a script may print text."""
    source, model, encoding = load("out/quickstart")
    assert (source.tokenizer, encoding.name, source.state["iter"], model.training) == ("byte", "byte", 60, False)
    assert source.describe() == "out/quickstart/ckpt/iter_000060, iter 60"
    assert source.end_of_text is source.state["data"]["end_of_text"] is True
    for name in (None, "out/quickstart/ckpt/iter_000060", "out/quickstart/ckpt/iter_000060/model.safetensors"):
        other, again, _ = load(name)
        assert os.path.realpath(other.path) == os.path.realpath(source.path)
        assert same(model, again)
    for name in ("hf", "hf/model.safetensors"):
        exported, again, encoding = load(name)
        assert (exported.state, encoding.name, exported.describe(), exported.end_of_text) == ({}, "byte", "hf", True)
        assert same(model, again)
    for name in ("out/quickstart", "hf"):
        assert same(model, GPT.from_pretrained(name))
    assert capsys.readouterr().out == ""


def test_three_lines_in_a_notebook(here):
    """README's lines: the model, its tokenizer, and a text."""
    model, encoding = flatgpt.load("hf")
    ids = torch.tensor([encoding.encode("99 green")])
    assert encoding.decode(model.generate(ids, max_new_tokens=5, greedy=True)[0].tolist()).startswith("99 green")
    short = flatgpt.load(context_length=8)[0]
    assert short.config.context_length == 8
    assert torch.equal(short(ids), model(ids))
    with pytest.raises(UserError, match=f"context_length = {T + 1}: hf was trained with {T}; take at most that"):
        flatgpt.load("hf", context_length=T + 1)


def test_a_name_on_the_hub_is_downloaded_once(here, host, capsys, cli):
    """For every function that asks; also by infer.py, and for init_from."""
    commit = host.publish("user/tiny", {p.name: p.read_bytes() for p in Path("hf").iterdir()}, kind="models")
    pretrained.fetch_once.cache_clear()
    model = GPT.from_pretrained("user/tiny")
    assert same(load("hf")[1], model)
    assert capsys.readouterr().err.splitlines()[-1] == f"user/tiny: commit {commit[:7]}, from the hub"
    done = cli("infer", "--device", "cpu", "--model_path", "user/tiny", "--prompt", "99 green", "--max_new_tokens", 3)
    assert done.out.startswith("99 green")
    assert "commit" not in done.err
    config = parse(TrainConfig, ["--init_from", "user/tiny"], pretrained.initial_shape)
    started = GPT(dataclasses.replace(config.model(), vocab_size=model.config.vocab_size))
    loading.load_pretrained(started, "user/tiny")
    assert same(started, model)
    pretrained.fetch_once.cache_clear()


def test_tokenizer_that_encodes_differently_now_is_refused(here):
    source = loading.find("out/quickstart")
    other = source.state | {"tokenizer": source.state["tokenizer"] | {"ranks_sha256": "0" * 64}}
    with pytest.raises(UserError, match=r"iter_000060: tokenizer byte does not have the vocabulary of the model$"):
        loading.load(dataclasses.replace(source, state=other), "cpu")
    source = loading.find("hf")
    small = dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=200))
    with pytest.raises(UserError, match="the model has 200 ids, tokenizer byte 257"):
        loading.load(small, "cpu")


def test_tokenizer_of_a_model_without_a_vocabulary(in_tmp):
    """A vocabulary of GPT-2's size is taken for GPT-2's, also with nanoGPT's padding. Other sizes are unknown."""
    for size in (50257, 50304):
        torch.save(nanogpt_checkpoint(random_gpt2(activation_function="gelu", vocab_size=size)), "ckpt.pt")
        source, model, encoding = load(".", context_length=8)
        assert (source.path, encoding.name, model.config.vocab_size) == (Path("ckpt.pt"), "gpt2", size)
    random_gpt2(vocab_size=65).save_pretrained("characters")
    with pytest.raises(UserError, match="model_path = characters: nothing there says which tokenizer"):
        loading.find("characters")


# what is there -> the name, and words of the message
REFUSED = {
    "nothing": ((), "absent", "no such folder; a run's folder .* or nanoGPT's ckpt.pt is expected"),
    "not on the hub": ((), "a/b/c", "no such folder; .*a name on the hub"),
    "empty": (("x/notes.txt",), "x", "no weights are there"),
    "settings": (("x/config.json",), "x", "only config.json is there"),
    "weights": (("x/model.safetensors",), "x/model.safetensors", "only model.safetensors is there"),
    "pickle": (("x/config.json", "x/pytorch_model.bin"), "x", r"pickle.*anybody's code.*GPT2LMHeadModel.*'\)$"),
    "pickles": (("x/config.json", "x/pytorch_model.bin.index.json"), "x", "is a pickle"),
    "named pickle": (
        ("x/config.json", "x/model.safetensors", "x/pytorch_model.bin"),
        "x/pytorch_model.bin",
        "is a pickle",
    ),
    "a run that has saved nothing": (("x/ckpt/lost/state.json",), "x", "no weights are there"),
}


@pytest.mark.parametrize(("files", "name", "message"), REFUSED.values(), ids=REFUSED)
def test_names_that_lead_to_no_model(in_tmp, files, name, message):
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with pytest.raises(UserError, match=message) as error:
        pretrained.find(name)
    assert str(error.value).startswith(f"init_from = {name}: ")
    assert "\n" not in str(error.value)
    if not any("ckpt" in file for file in files):
        with pytest.raises(UserError, match=f"^model_path = {name}: .*{message}"):
            loading.find(name)


# ---------------------------------------------------------------------------------------------------------------------
# init_from


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("context_length", [8, 24])
def test_initial_weights_of_a_run(tmp_path, position, context_length):
    saved = save_run(tmp_path / "run", position=position, bias=False, tie_weights=False)
    config = parse(TrainConfig, ["--init_from", str(tmp_path / "run")], pretrained.initial_shape).model()
    assert pretrained.shape(config) == pretrained.shape(saved.config)
    model = GPT(dataclasses.replace(config, context_length=context_length)).eval()
    loading.load_pretrained(model, str(tmp_path / "run"))
    ids = torch.arange(context_length)[None]
    torch.testing.assert_close(model(ids), saved(ids), rtol=0, atol=1e-6)
    if position == "rope":  # has no longest context
        loading.load_pretrained(GPT(dataclasses.replace(config, context_length=48)), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1, "attention": "manual", "activation_checkpointing": True, "attn_bias": True}, None),
        ({"context_length": 48}, "context_length = 48: .* was trained with 24"),
        # their tensors would fit
        ({"n_head": 4}, r"n_head = 4 \(there 2\); leave out"),
        ({"activation": "gelu", "n_layer": 6}, r"n_layer = 6 \(there 1\), activation = gelu \(there gelu_tanh\)"),
        ({"attn_bias": False}, r"attn_bias = False \(there True\)"),
    ],
    ids=str,
)
def test_initial_weights_of_another_shape(tmp_path, changes, message):
    saved, run = save_run(tmp_path / "run"), str(tmp_path / "run")
    model = GPT(dataclasses.replace(saved.config, **changes))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        loading.load_pretrained(model, run)


def test_a_run_means_its_best_else_its_last(tmp_path):
    """Copies without links too. Damaged weights are an error."""
    save_run(tmp_path / "run")
    run, ckpt = str(tmp_path / "run"), tmp_path / "run/ckpt"
    shutil.copytree(ckpt / "iter_000007", ckpt / "iter_000009")
    assert pretrained.find(run) == ckpt / "iter_000007"
    (ckpt / "best").symlink_to("iter_000011")  # does not exist
    assert pretrained.find(run) == ckpt / "iter_000007"
    (ckpt / "best").unlink()
    (ckpt / "best").symlink_to("iter_000009")
    assert pretrained.find(run) == ckpt / "iter_000009"
    shutil.copytree(ckpt / "iter_000009", tmp_path / "copy/ckpt/best")
    assert pretrained.find(str(tmp_path / "copy")) == tmp_path / "copy/ckpt/best"
    file = ckpt / "best/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"init_from = .*model.safetensors is damaged"):
        loading.load_pretrained(GPT(ModelConfig(**pretrained.shape(pretrained.read_config(run)))), run)
