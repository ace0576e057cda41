"""Every name of a model leads to the same model; what is known of it, and what is refused."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from random_models import random_model

import flatgpt
from config import ModelConfig, TrainConfig, UserError
from flatgpt.cli import cli as command_line
from flatgpt.data import tokenizer
from flatgpt.interop import loading, pretrained
from flatgpt.interop.pretrained import initial_shape, pretrained_shape
from flatgpt.runs import checkpoint
from model import GPT

T = 32


@pytest.fixture(scope="module")
def home(tiny_home, tmp_path_factory) -> Path:
    """out/quickstart is the session's run, hf its export. Read only."""
    import export
    from config import ExportConfig

    folder = tmp_path_factory.mktemp("loading")
    (folder / "out").mkdir()
    (folder / "out" / "quickstart").symlink_to(tiny_home / "out" / "quickstart")
    with contextlib.chdir(folder):
        export.main(command_line.parse(ExportConfig, ["--model_path", "out/quickstart", "--out", "hf"]))
    return folder


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


def load(path: str | None, **more):
    source = loading.find(path, print)
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


def test_every_name_of_a_run(here):
    source, model, encoding = load("out/quickstart")
    assert (source.tokenizer, encoding.name, source.state["iter"]) == ("byte", "byte", 60)
    assert source.describe() == "out/quickstart/ckpt/iter_000060, iter 60"
    assert source.end_of_text is source.state["data"]["end_of_text"] is True
    assert not model.training
    for name in (None, "out/quickstart/ckpt/iter_000060", "out/quickstart/ckpt/iter_000060/model.safetensors"):
        other, again, _ = load(name)
        assert os.path.realpath(other.path) == os.path.realpath(source.path)
        assert same(model, again)


def test_an_exported_folder_is_the_same_model(here):
    source, model, encoding = load("hf")
    assert (source.state, source.tokenizer, encoding.name, source.describe()) == ({}, "byte", "byte", "hf")
    assert source.end_of_text
    assert same(load("out/quickstart")[1], model)


def test_three_lines_in_a_notebook(here):
    """README's lines: the model, its tokenizer, and a text."""
    model, encoding = flatgpt.load("hf")
    ids = torch.tensor([encoding.encode("99 green")])
    assert torch.equal(model(ids), load("hf")[1](ids))
    assert encoding.decode(model.generate(ids, max_new_tokens=5, greedy=True)[0].tolist()).startswith("99 green")
    assert flatgpt.load(context_length=8)[0].config.context_length == 8


def test_a_nanogpt_file_of_gpt2s_vocabulary(tmp_path):
    """Padded to 50,304 ids, as nanoGPT does it."""
    reference = random_gpt2(activation_function="gelu", vocab_size=50304)
    torch.save(nanogpt_checkpoint(reference), tmp_path / "ckpt.pt")
    _, model, encoding = load(str(tmp_path / "ckpt.pt"), context_length=8)
    assert (encoding.name, model.config.vocab_size) == ("gpt2", 50304)
    with torch.no_grad():
        ids = torch.tensor([encoding.encode_ordinary("a b c")])
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-4


def test_a_name_on_the_hub_is_downloaded_once(here, host, capsys, cli):
    """For every function that asks; also by infer.py, and for init_from."""
    commit = host.publish("user/tiny", {p.name: p.read_bytes() for p in Path("hf").iterdir()}, kind="models")
    pretrained.fetch_once.cache_clear()
    _, model, _ = load("user/tiny")
    assert same(load("hf")[1], model)
    assert capsys.readouterr().err.splitlines()[-1] == f"user/tiny: commit {commit[:7]}, from the hub"
    done = cli("infer", "--device", "cpu", "--model_path", "user/tiny", "--prompt", "99 green", "--max_new_tokens", 3)
    assert done.out.startswith("99 green")
    assert "commit" not in done.err
    config = command_line.parse(TrainConfig, ["--init_from", "user/tiny"], initial_shape)
    assert config.n_embd == 32
    started = GPT(ModelConfig(**pretrained_shape("user/tiny")))
    loading.load_pretrained(started, "user/tiny")
    assert same(started, model)
    pretrained.fetch_once.cache_clear()


def test_a_smaller_context(here):
    ids = torch.arange(8)[None]
    whole, short = load("hf")[1], load("hf", context_length=8)[1]
    assert short.config.context_length == 8
    assert torch.equal(short(ids), whole(ids))
    assert load("out/quickstart", context_length=8)[1].transformer.wpe.weight.shape == (8, 32)
    with pytest.raises(UserError, match=f"context_length = {T + 1}: hf was trained with {T}; take at most that"):
        load("hf", context_length=T + 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out/nothing", "model_path out/nothing: no such folder; a run's folder .* or nanoGPT's ckpt.pt is expected"),
        ("a/b/c", "no such folder; .*a name on the hub"),
        ("empty", "model_path = empty: no weights are there"),
        ("characters", re.escape("model_path = characters: nothing there says which tokenizer")),
    ],
)
def test_names_that_lead_to_no_model(in_tmp, path, message):
    """characters: nanoGPT's character model of 65 ids, whose characters are in a pickle."""
    Path("empty").mkdir()
    random_gpt2(vocab_size=65).save_pretrained("characters")
    with pytest.raises(UserError, match=message):
        loading.find(path, print)


def test_tokenizer_that_encodes_differently_now_is_refused(here):
    source = loading.find("out/quickstart", print)
    other = source.state | {"tokenizer": source.state["tokenizer"] | {"ranks_sha256": "0" * 64}}
    with pytest.raises(UserError, match=r"iter_000060: tokenizer byte does not have the vocabulary of the model$"):
        loading.load(dataclasses.replace(source, state=other), "cpu")
    source = loading.find("hf", print)
    small = dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=200))
    with pytest.raises(UserError, match="the model has 200 ids, tokenizer byte 257"):
        loading.load(small, "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# init_from


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("context_length", [8, 24])
def test_initial_weights_of_a_run(tmp_path, position, context_length):
    saved = save_run(tmp_path / "run", position=position, bias=False, tie_weights=False)
    shape = pretrained_shape(str(tmp_path / "run")) | {"context_length": context_length}
    model = GPT(ModelConfig(**shape)).eval()
    loading.load_pretrained(model, str(tmp_path / "run"))
    ids = torch.arange(context_length)[None]
    torch.testing.assert_close(model(ids), saved(ids), rtol=0, atol=1e-6)
    if position == "rope":  # has no longest context
        loading.load_pretrained(GPT(ModelConfig(**shape | {"context_length": 48})), str(tmp_path / "run"))


def test_initial_weights_that_do_not_fit(tmp_path):
    save_run(tmp_path / "run")
    run, shape = str(tmp_path / "run"), pretrained_shape(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"n_head = 4 \(there 2\)"):  # their sizes fit
        loading.load_pretrained(GPT(ModelConfig(**shape | {"n_head": 4})), run)
    with pytest.raises(UserError, match="context_length = 48: the pretrained model has 24"):
        loading.load_pretrained(GPT(ModelConfig(**shape | {"context_length": 48})), run)
    file = tmp_path / "run/ckpt/last/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"init_from = .*model.safetensors is damaged"):
        loading.load_pretrained(GPT(ModelConfig(**shape)), run)
