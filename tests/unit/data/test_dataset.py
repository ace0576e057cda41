"""Opening a dataset folder, its errors, and the order of batches, against a plain version of itself."""

import hashlib
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_files import cut, finished, flip, llmc, nanogpt, shard, tokens, wrong_id
from hypothesis import given, settings
from hypothesis import strategies as st

from config import PrepareConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import dataset, tokenizer
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset, shuffled
from flatgpt.data.sources import dataset_folder

# ---------------------------------------------------------------------------------------------------------------------
# a folder of flatGPT's


def test_finished_dataset(tmp_path):
    folder = finished(tmp_path / "d", {"train": [[1, 2], range(5)]}, shard_tokens=3)
    (folder / "progress.json").write_text('{"command": "x"}')  # killed before it was removed
    data = open_dataset(folder)
    assert data.tokens("train")[:].tolist() == [1, 2, 0, 1, 2, 3, 4]
    assert data.meta["splits"]["train"]["documents"] == 2
    # A run resumed with a later version of this code asks whether its data is the same.
    assert data.manifest_hash == hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"no split test; it has train: "):
        data.tokens("test")
    with pytest.raises(UserError, match="tokenizer gpt3"):
        open_dataset(finished(tmp_path / "other", {"train": [[1, 2]]}, tokenizer="gpt3"))


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("pydoc", {}, "does not exist: run python prepare_data.py pydoc --data_dir "),
        ("shakespeare_byte", {}, "does not exist: run python prepare_data.py shakespeare --tokenizer byte"),
        ("pydoc", {"train_000000.bin.tmp": ""}, "is not finished: run python prepare_data.py pydoc"),
        ("mine", {"val.bin": ""}, "is not finished: run python prepare_data.py text --input FILES --name mine"),
        ("mine", {"progress.json": '{"command": "cmd --a b"}', "train.bin": ""}, "is not finished: run cmd --a b"),
        ("pydoc", {"progress.json": '{"comm', "train.bin": ""}, "is not finished: run python prepare_data.py pydoc"),
        ("pydoc", {"progress.json": '{"command": 3}'}, "is not finished: run python prepare_data.py pydoc"),
        ("mine", {"meta.json": "", "train.bin": ""}, "meta.json is damaged"),
    ],
)
def test_unfinished_dataset_names_the_command(tmp_path, name, files, said):
    folder = nanogpt(tmp_path / name) if files else tmp_path / name
    for file, text in files.items():
        (folder / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        open_dataset(folder)
    assert str(folder) in str(caught.value)
    assert ("--data_dir" not in said) or shlex.quote(str(tmp_path)) in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "pydoc --tokenizer gpt2 --data_dir 'a b'",
        "wikitext103",
        "wikitext103 --name wikitext103_old",
        "fineweb --tokenizer p50k_base",
        "wikipedia --dump 20231101.simple",
        "wikipedia --dump 20231101.zh-min-nan --tokenizer byte",
        "wikipedia --tokenizer bpe:8192",
        "text --input FILES",
        "text --input FILES --tokenizer bpe:300 --data_dir there",
        "text --input FILES --name 'my data'",
        "text --input FILES --name=--x",
        "hub --repo user/some_stories",
        "hub --repo user/some --tokenizer byte",
    ],
)
def test_command_for_a_missing_dataset_makes_its_folder(in_tmp, words):
    """Also of a repository that was downloaded."""
    for repo in ("some", "some_stories"):
        Path("data/raw/hub/user", repo).mkdir(parents=True)
    config = cli.parse(PrepareConfig, shlex.split(words))
    with pytest.raises(UserError) as caught:
        open_dataset(dataset_folder(config))
    _, script, *again = shlex.split(str(caught.value).partition(" does not exist: run ")[2])
    made = cli.parse(PrepareConfig, again)
    assert (script, dataset_folder(made)) == ("prepare_data.py", dataset_folder(config))
    for key in ("source", "input", "repo", "dump", "tokenizer"):
        assert getattr(made, key) == getattr(config, key)


def test_command_for_a_missing_dataset_of_a_run_names_its_tokenizer(in_tmp):
    with pytest.raises(UserError, match=r"prepare_data\.py pydoc --tokenizer 'out/a b' --name pydoc_mine$"):
        open_dataset(Path("data/pydoc_mine"), Path("out/a b"))


@pytest.mark.parametrize("full", [False, True])
def test_check_names_all_files_that_are_damaged(tmp_path, monkeypatch, full):
    """Sizes of every split; without `full` the ids of small train and val splits, and no hash."""
    folder = finished(tmp_path / "d", {split: [range(30)] for split in ("train", "val", "test")}, 10)
    data = open_dataset(folder)
    data.check(full)
    assert list(data.verify_shards())[:2] == [("train_000000.bin", ""), ("train_000001.bin", "")]
    damage = {"train_000002": cut, "val_000000": wrong_id, "test_000001": Path.unlink, "val_000002": flip}
    damage |= {"test_000000": wrong_id}
    for name, harm in damage.items():
        harm(folder / f"{name}.bin")
    outside, sha256 = "id 257 at byte 18 is not in the vocabulary of 257", "SHA-256 differs from"
    found = {"train_000002": "18 bytes, but meta.json says 20", "val_000000": outside, "test_000001": "No such file"}
    found |= {"test_000000": outside, "val_000002": sha256} if full else {}

    def check() -> dict[str, str]:
        with pytest.raises(UserError) as caught:
            data.check(full)
        assert "\n" not in str(caught.value)
        return dict(re.findall(rf"{folder}/(\w+)\.bin(.*?)(?=; {folder}/|$)", str(caught.value)))

    assert check().keys() == found.keys()
    assert all(said in check()[name] for name, said in found.items())
    monkeypatch.setattr(dataset, "MAX_IDS_CHECKED_AT_START", 29)
    assert check().keys() == found.keys() - (set() if full else {"val_000000"})


# ---------------------------------------------------------------------------------------------------------------------
# shards that others wrote


def test_nanogpt_folder_is_a_dataset_of_gpt2s_tokens(tmp_path):
    ids = {"train": [50_256, *range(1000)], "val": [3, 2, 1]}
    folder = nanogpt(tmp_path / "owt", **ids)
    data = open_dataset(folder)
    assert {split: data.tokens(split)[:].tolist() for split in data.meta["splits"]} == ids
    assert data.notice == f"{folder} has no meta.json: read as nanoGPT shards of GPT-2 tokens"
    assert list(data.verify_shards()) == [("train.bin", ""), ("val.bin", "")]
    assert open_dataset(shutil.copytree(folder, tmp_path / "copy")).manifest_hash == data.manifest_hash
    nanogpt(folder, val=[1, 2])  # all that can be told without reading is the size
    assert open_dataset(folder).manifest_hash != data.manifest_hash
    assert open_dataset(nanogpt(tmp_path / "no val", train=[1, 2])).meta["splits"].keys() == {"train"}


def test_facts_of_gpt2_are_its_vocabularys(gpt2_vocabulary):
    """They are written down, so that a training run needs no vocabulary, and compared where one is loaded."""
    encoding = tokenizer.load("gpt2")
    ids = {"vocab_size": encoding.n_vocab, "eot_id": encoding.eot_token, "end_of_text": True}
    assert {"tokenizer": "gpt2", "ranks_sha256": tokenizer.ranks_hash(encoding), **ids} == dataset.EXTERNAL_META


def test_llmc_folder_is_a_dataset(tmp_path):
    """Files in the order of their names; others, as llm.c's evaluations with another header, are none of it."""
    for name, ids in (("train_000002", [4, 5]), ("train_000001", [1, 2, 3]), ("val_000000", [50_256, 7])):
        llmc(tmp_path / f"interval_{name}.bin", ids)  # `val` is a part of a word there
    llmc(tmp_path / "hellaswag_val.bin", [1, 2], magic=20240522)
    (tmp_path / "train_empty.bin").touch()
    data = open_dataset(tmp_path)
    assert data.tokens("train")[:].tolist() == [1, 2, 3, 4, 5]
    assert data.tokens("val")[:].tolist() == [50_256, 7]
    assert "read as llm.c shards of GPT-2 tokens" in data.notice
    windows = Windows(data.tokens("train"), 1)
    llmc(tmp_path / "interval_train_000002.bin", [4, 50_257])
    with pytest.raises(
        UserError, match=r"train_000002\.bin: id 50257 at byte 1,026 is not in the vocabulary of 50,257"
    ):
        windows.batch(np.array([0, 3]))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda folder: (folder / "meta.pkl").touch(), "character ids.*meta.pkl.*prepare_data.py text --input"),
        (
            lambda folder: (folder / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1}, "f": print})),
            "character ids.*meta.pkl is not read.*prepare_data.py text --input",
        ),
        (
            lambda folder: (folder / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1}})),
            r"train\.bin: id 2 at byte 2 is not in the vocabulary of 2",
        ),
        (
            lambda folder: shard(folder / "val.bin", [1, 50_257]),
            r"val\.bin: id 50257 at byte 2 is not in the vocabulary",
        ),
    ],
)
def test_shards_of_others_that_are_refused(tmp_path, write, said):
    write(nanogpt(tmp_path / "owt", train=[1, 2], val=[3, 4]))
    with pytest.raises(UserError, match=f"{tmp_path}/owt.*{said}"):
        open_dataset(tmp_path / "owt")


def test_characters_of_nanogpt_are_the_tokenizer_of_their_shards(tmp_path):
    folder = nanogpt(tmp_path / "chars", train=[1, 2, 0, 2], val=[2])
    stoi = {"\n": 0, "h": 1, "\u00e4": 2}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "stoi": stoi, "itos": {0: "\n"}}))
    data = open_dataset(folder)
    assert data.notice == f"{folder} has no meta.json: read as nanoGPT shards of the characters in meta.pkl"
    encoding = data.load_tokenizer()
    assert encoding.decode(data.tokens("train")[:].tolist()) == "h\u00e4\n\u00e4"
    assert encoding.encode_ordinary("\u00e4h") == [2, 1]
    facts = {"tokenizer": "characters", "vocab_size": 3, "eot_id": None, "end_of_text": False}
    facts["ranks_sha256"] = tokenizer.ranks_hash(encoding)
    assert facts.items() <= data.meta.items()


# ---------------------------------------------------------------------------------------------------------------------
# windows and their order


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 11, 23])
def test_windows(tmp_path, length, stride):
    """Window w holds ids [wS, wS + T], targets one later, over the borders of files of 4 ids; whole ones only."""
    ids, T = np.arange(100, 100 + length), 5
    windows = Windows(tokens(tmp_path, *np.array_split(ids, -(-length // 4))), T, stride)
    plain = [ids[s : s + T + 1].tolist() for s in range(0, length, stride or T) if s + T + 1 <= length]
    assert len(windows) == len(plain)
    if plain:
        order = [len(plain) - 1, *range(len(plain))]
        x, y = windows.batch(np.array(order, dtype=np.uint64))
        assert x.dtype == y.dtype == np.int64
        assert x.tolist() == [plain[w][:-1] for w in order]
        assert y.tolist() == [plain[w][1:] for w in order]


def order(n: int, batch_size: int, accum: int, seed: int, sequences: int) -> list[int]:
    """The windows of a run's first sequences, each update asked for alone, the last one first."""
    found = {}
    for update in reversed(range(-(-sequences // (batch_size * accum)))):
        run = TrainingBatches(Windows(np.arange(n + 1), 1), batch_size, accum, seed)
        for micro in range(accum):
            found[update, micro] = run(update, micro)[0][:, 0].tolist()
    return [window for key in sorted(found) for window in found[key]][:sequences]


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 20), st.sampled_from([1, 2, 3, 8]), st.integers(0, 9))
def test_an_epoch_visits_each_window_once(n, batch_size, accum, seed):
    """Whatever divides what, for any stops and ranks: a micro-batch does not depend on the ones before it."""
    found = order(n, batch_size, accum, seed, 3 * n)
    for epoch in range(3):
        assert sorted(found[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert found == order(n, 1, 1, seed, 3 * n)


def test_order_depends_on_seed_and_epoch_alone():
    found = order(100, 10, 1, 1, 200)
    assert found[:100] != found[100:], "another epoch, another order"
    assert found[:100] != sorted(found[:100])
    assert order(100, 10, 1, 2, 100) != found[:100]


def test_the_order_never_changes():
    """A run resumed with a later version of this code has to see the same batches."""
    assert shuffled(np.arange(10), 10, 1337, 0).tolist() == [1, 0, 4, 8, 9, 6, 5, 3, 2, 7]
    expected = [497442890562, 41744100471, 697370113489, 865257653240]
    assert shuffled(np.arange(4), 10**12, 2**40, 10**6).tolist() == expected
