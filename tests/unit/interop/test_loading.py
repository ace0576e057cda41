"""Every name of a model leads to the same model; what is known of it, and what is refused."""

import contextlib
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from exported import T, export_here, save_run
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from transformers import AutoTokenizer
from vocabularies import TEXT, bpe, characters, save_run_of, write_bpe, write_model, write_nanogpt_characters

import flatgpt
from config import TrainConfig, UserError
from flatgpt.cli.settings import parse
from flatgpt.data.tokenizer import encode_special
from flatgpt.data.tokenizer_files import tokenizer_json
from flatgpt.interop import loading, pretrained
from flatgpt.runs import checkpoint
from model import GPT

IDS, FILES = torch.arange(T)[None], ("model.safetensors", "state.json")


def test_every_name_of_a_model(in_tmp, capsys):
    """Nothing is printed to standard output, where a notebook or a script may print text."""
    model = save_run()
    source = loading.find("out/r")
    assert (source.path, source.encoding.name, source.end_of_text) == (Path("out/r/ckpt/iter_000007"), "byte", False)
    assert source.describe() == "out/r/ckpt/iter_000007, iter 7"
    checkpoint = source.path
    export_here("--out", "hf")
    capsys.readouterr()
    exported = loading.find("hf")
    facts = exported.state, exported.encoding.name, exported.end_of_text, exported.describe()
    assert facts == ({}, "byte", True, "hf")
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


def test_a_vocabulary_on_the_hub_has_the_name_of_its_repository(in_tmp, host):
    """Not that of the commit, which is the folder's in the cache."""
    write_model("bpe", write_bpe("bpe"))
    host.publish("user/own", {p.name: p.read_bytes() for p in Path("bpe").iterdir()}, kind="models")
    pretrained.fetch_once.cache_clear()
    assert loading.find("user/own").encoding.name == "own"
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
    random_gpt2(vocab_size=65).save_pretrained("other")
    with pytest.raises(UserError, match=r"model_path = other: the tokenizer of this model is unknown: .*\.json"):
        loading.find("other")


@pytest.mark.parametrize("place", ["checkout/out/meta.pkl", "checkout/data/shakespeare_char/meta.pkl"])
def test_characters_of_nanogpt(in_tmp, place):
    """Beside ckpt.pt, or where nanoGPT's sample.py finds them."""
    letters, path = characters("ab\nc"), Path("checkout/out/ckpt.pt")
    path.parent.mkdir(parents=True)
    torch.save(nanogpt_checkpoint(random_gpt2(vocab_size=4)), path)
    problem = "has 4 ids.*copy nanoGPT's data/shakespeare_char/meta.pkl to checkout/out/meta.pkl"
    with pytest.raises(UserError, match=problem):
        flatgpt.load(str(path))
    write_nanogpt_characters(place, letters.ids)
    model, encoding = flatgpt.load(str(path))
    assert (encoding.encode("cab\n"), encoding.decode([3, 1, 0]), encoding.eot_token) == ([3, 1, 2, 0], "ca\n", None)
    assert model.config.vocab_size == 4
    write_nanogpt_characters(place, characters("abcde").ids)
    with pytest.raises(UserError, match=f"{place} has 5 characters, but checkout/out/ckpt.pt has 4 ids"):
        loading.find(str(path))
    Path(place).write_bytes(pickle.dumps({"stoi": {"a": torch.zeros(2)}}))
    with pytest.raises(UserError, match=f"{place} is not read"):
        loading.find(str(path))


def test_a_checkpoint_with_a_tokenizer_of_its_own(in_tmp):
    """The checkpoint's folder is enough, under any name."""
    encoding = bpe()
    model = save_run_of(encoding)
    shutil.copytree("out/r/ckpt/iter_000007", "elsewhere")
    for name in (None, "out/r", "elsewhere"):
        again, found = flatgpt.load(name)
        assert torch.equal(again(IDS), model(IDS))
        assert (found.name, found.eot_token, found.encode_ordinary(TEXT)) == (
            *(encoding.name, encoding.eot_token, encoding.encode_ordinary(TEXT)),
        )
    state = json.loads(Path("elsewhere/state.json").read_text())
    assert checkpoint.fingerprint(Path("elsewhere/tokenizer.json")) == state["files"]["tokenizer.json"]


def without(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def of_another_run(file: Path) -> None:
    file.write_bytes(tokenizer_json(bpe("other", size=350)))


@pytest.mark.parametrize("damage", [without, cut, of_another_run])
def test_a_damaged_tokenizer_of_a_checkpoint(in_tmp, damage):
    save_run_of(bpe())
    damage(Path("out/r/ckpt/iter_000007/tokenizer.json"))
    warnings = []
    with pytest.raises(UserError, match="no usable checkpoint"):
        loading.find("out/r", warnings.append)
    assert "tokenizer.json" in warnings[0]


def test_a_tokenizer_of_another_run_with_its_hash(in_tmp):
    """A checkpoint that is put together by hand is refused by the hash of the vocabulary."""
    save_run_of(bpe())
    state = checkpoint.read_state(Path("out/r/ckpt/best"))
    of_another_run(Path("out/r/ckpt/best/tokenizer.json"))
    state["files"]["tokenizer.json"] = checkpoint.fingerprint(Path("out/r/ckpt/best/tokenizer.json"))
    Path("out/r/ckpt/best/state.json").write_bytes(checkpoint.state_file(state))
    with pytest.raises(UserError, match="tokenizer bpe does not have the vocabulary that the model was trained with"):
        flatgpt.load()


def test_a_stray_tokenizer_beside_a_checkpoint_of_bytes(in_tmp):
    """Old checkpoints have no file of their tokenizer."""
    save_run()
    bpe("out/r/ckpt/best/")
    assert flatgpt.load()[1].name == "byte"


def test_added_tokens_in_the_middle_of_the_ids(in_tmp):
    reference = write_bpe("bpe")
    data = json.loads(Path("bpe/tokenizer.json").read_text())
    shifted = {token["content"]: 300 + n for n, token in enumerate(data["added_tokens"])}
    for token in data["added_tokens"]:
        token["id"] = shifted[token["content"]]
    vocabulary, offset = data["model"]["vocab"], len(shifted)
    ordinary = sorted((n, token) for token, n in vocabulary.items() if token not in shifted)
    data["model"]["vocab"] = {token: n + offset * (n >= 300) for n, (_, token) in enumerate(ordinary)} | shifted
    Path("bpe/tokenizer.json").write_text(json.dumps(data))
    settings = json.loads(Path("bpe/tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)  # which has the ids too
    Path("bpe/tokenizer_config.json").write_text(json.dumps(settings))
    write_model("bpe", reference)
    theirs, encoding = AutoTokenizer.from_pretrained("bpe"), flatgpt.load("bpe")[1]
    text = TEXT + "<|user|>hi<|assistant|>" + TEXT
    assert encode_special(encoding, text) == theirs.encode(text)
    assert (encoding.eot_token, encoding.n_vocab) == (theirs.eos_token_id, len(theirs))


def test_a_tokenizer_larger_than_the_embedding(in_tmp):
    reference = write_bpe("bpe")
    write_model("bpe", reference, vocab_size=len(reference) - 1)
    with pytest.raises(UserError, match=f"bpe: the model has {len(reference) - 1} ids, tokenizer bpe {len(reference)}"):
        flatgpt.load("bpe")


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


def test_byte_order_marks_in_the_files_of_a_hugging_face_folder(tiny_run, in_tmp, cli):
    """Some editors write them."""
    assert cli("export", "--model_path", tiny_run, "--out", "hf").code == 0
    expected = cli("infer", "--model_path", "hf", "--prompt", "3 green", "--max_new_tokens", 8, "--json", "-")
    for file in in_tmp.glob("hf/*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = cli("infer", "--model_path", "hf", "--prompt", "3 green", "--max_new_tokens", 8, "--json", "-")
    assert found.code == 0, found
    assert [json.loads(done.out)["texts"] for done in (found, expected)] == [json.loads(expected.out)["texts"]] * 2
