"""trained.py: every name of a model leads to the same model; what is known of it, and what is refused."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from in_process import train_here

import export
import infer
import train
from config import ExportConfig, InferConfig, TrainConfig, UserError, run_dir
from flatgpt.cli import cli
from flatgpt.interop import loading, pretrained
from flatgpt.interop.pretrained import initial_shape

CPU = torch.device("cpu")
T = 32


@pytest.fixture
def here(tiny_home, tmp_path, monkeypatch) -> Path:
    """The current folder: out/quickstart is the trained run, hf its export."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quickstart").symlink_to(tiny_home / "out" / "quickstart")
    monkeypatch.chdir(tmp_path)
    export.main(cli.parse(ExportConfig, ["--model_path", "out/quickstart", "--out", "hf"]))
    return tmp_path


def loaded(path: str | None, **more):
    found = loading.find(path, print)
    return found, *loading.load(found, CPU, **more)


def weights(model) -> dict[str, torch.Tensor]:
    return model.state_dict()


def same(one, other) -> bool:
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], tensor) if name in one else not tensor.any() for name, tensor in other.items())


def test_every_way_to_name_a_run(here):
    found, model, encoding = loaded("out/quickstart")
    assert (found.tokenizer, encoding.name, found.state["iter"]) == ("byte", "byte", 60)
    assert found.describe() == "out/quickstart/ckpt/iter_000060, iter 60"
    assert not model.training
    for name in (None, "out/quickstart/ckpt/iter_000060", "out/quickstart/ckpt/iter_000060/model.safetensors"):
        other, again, _ = loaded(name)
        assert os.path.realpath(other.path) == os.path.realpath(found.path)
        assert same(model, again)


def test_tokenizer_that_encodes_differently_now_is_refused(here):
    found = loading.find("out/quickstart", print)
    other = found.state | {"tokenizer": found.state["tokenizer"] | {"ranks_sha256": "0" * 64}}
    with pytest.raises(UserError, match=r"iter_000060: tokenizer byte has not the vocabulary that the model knows$"):
        loading.load(dataclasses.replace(found, state=other), CPU)


def test_an_exported_folder_is_the_same_model(here):
    found, model, encoding = loaded("hf")
    assert (found.state, found.tokenizer, encoding.name, found.describe()) == ({}, "byte", "byte", "hf")
    assert found.end_of_text, "nobody says, and most had"
    assert same(loaded("out/quickstart")[1], model)


def test_a_name_on_the_hub(here, host, capsys):
    """Fetched once for all that ask, trained on, and written with."""
    commit = host.publish("user/tiny", {p.name: p.read_bytes() for p in Path("hf").iterdir()}, kind="models")
    pretrained._fetched.cache_clear()
    _, model, _ = loaded("user/tiny")
    assert same(loaded("hf")[1], model)
    assert capsys.readouterr().err.splitlines() == [f"user/tiny: commit {commit[:7]}, from the hub"]
    infer.main(cli.parse(InferConfig, ["--model_path", "user/tiny", "--prompt", "99 green", "--max_new_tokens", "3"]))
    printed = capsys.readouterr()
    assert printed.out.startswith("99 green")
    assert "commit" not in printed.err
    assert cli.parse(TrainConfig, ["--init_from", "user/tiny"], initial_shape).n_embd == 32
    pretrained._fetched.cache_clear()


def test_training_begins_with_weights_of_the_hub(tiny_data, here, host):
    host.publish("user/tiny", {p.name: p.read_bytes() for p in Path("hf").iterdir()}, kind="models")
    pretrained._fetched.cache_clear()
    words = [
        "--dataset",
        "tiny",
        "--init_from",
        "user/tiny",
        "--max_iters",
        "1",
        "--eval_interval",
        "1",
        "--lr",
        "1e-9",
    ]
    words += ["--min_lr", "0", "--sample_tokens", "0", "--device", "cpu", "--dtype", "float32", "--out_dir", "out/more"]
    config = cli.parse(TrainConfig, words, initial_shape)
    train.train(config)
    for name, tensor in weights(loaded(str(run_dir(config)))[1]).items():
        assert torch.allclose(tensor, weights(loaded("hf")[1])[name], atol=1e-6)
    pretrained._fetched.cache_clear()


def test_fewer_positions(here):
    idx = torch.arange(8)[None]
    whole, short = loaded("hf")[1], loaded("hf", context_length=8)[1]
    assert short.config.context_length == 8
    assert torch.equal(short(idx), whole(idx))
    assert loaded("out/quickstart", context_length=8)[1].transformer.wpe.weight.shape == (8, 32)
    with pytest.raises(UserError, match=f"context_length = {T + 1}: hf was trained with {T}; take at most that"):
        loaded("hf", context_length=T + 1)


def test_end_of_text_is_what_the_data_had(tiny_data):
    train_here("--max_iters", 1, "--eval_interval", 1)
    found = loading.find("out/quickstart", print)
    assert found.end_of_text is found.state["data"]["end_of_text"] is True


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out/nothing", "model_path out/nothing: no such folder; a run's folder .* or nanoGPT's ckpt.pt is expected"),
        ("a/b/c", "no such folder; .*a name on the hub"),
        ("empty", "model_path = empty: no weights are there"),
    ],
)
def test_nothing_there(in_tmp, path, message):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        loading.find(path, print)


def test_a_tokenizer_that_nobody_knows(in_tmp):
    """nanoGPT's character model: 65 ids, whose characters are in a pickle."""
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=65, bos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf")
    with pytest.raises(UserError, match=re.escape("model_path = hf: nothing there says which tokenizer")):
        loading.find("hf", print)


def test_a_vocabulary_larger_than_the_models(here):
    found = loading.find("hf", print)
    small = dataclasses.replace(found, config=dataclasses.replace(found.config, vocab_size=200))
    with pytest.raises(UserError, match="the model has 200 ids, tokenizer byte 257"):
        loading.load(small, CPU)
