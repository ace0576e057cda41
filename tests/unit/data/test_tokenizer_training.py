"""Tokenizers that are trained or get special tokens: their ids, their determinism, what they read and refuse."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from prepared import content, files, from_text, refusal
from processes import ROOT
from tokenizers import Tokenizer

from config import UserError
from flatgpt.data import prepare as preparation
from flatgpt.data import tokenizer, tokenizer_files, tokenizer_names
from flatgpt.data.dataset import open_dataset
from flatgpt.data.tokenizer_training import add_special_tokens, train

pytestmark = pytest.mark.slow

EOT, USER, BOT = "<|endoftext|>", "<|user|>", "<|assistant|>"
HINDI = "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n"
GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.\n"
KOREAN = "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.\n"
TEXT = (HINDI + GREEK + KOREAN) * 30 + "\n".join(unicodedata.name(chr(n), "") for n in range(0x900, 0xD00))


@pytest.fixture(scope="module")
def trained():
    return train([TEXT], "bpe:600", [USER, BOT])


def test_ids_are_bytes_then_merges_then_end_of_text_and_special_tokens(trained):
    assert trained.n_vocab == 600
    assert sorted(trained.decode_single_token_bytes(n) for n in range(256)) == [bytes([b]) for b in range(256)]
    assert [trained.decode([n]) for n in range(597, 600)] == [EOT, USER, BOT]
    assert trained.eot_token == 597
    assert "मनुष्यों" in {trained.decode([n]).strip() for n in range(600)}, "marks are kept with their letters"


def test_file_gives_the_librarys_own_ids(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_files.tokenizer_json(trained))
    reference, back = Tokenizer.from_file(str(path)), tokenizer.load("bpe:600", tmp_path, 597)
    assert tokenizer.ranks_hash(back) == tokenizer.ranks_hash(trained)
    for text in (TEXT, "ไม่มี wörter 🎈👩‍👩 123456\r\n\t  x", "a" * 1000, "".join(map(chr, range(1, 0xD800, 7)))):
        assert back.encode_ordinary(text) == reference.encode(text).ids
        assert back.decode(back.encode_ordinary(text)) == text
    chat = f"{USER}नमस्ते{BOT} καλημέρα{EOT}"
    assert tokenizer.encode_special(back, chat) == reference.encode(chat).ids


def test_same_text_gives_the_same_file_with_any_number_of_threads():
    """The text is as long as several batches of the library, which count words in parallel."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hashlib, pydoc_data.topics as t\n"
        "from flatgpt.data.tokenizer_training import train\n"
        "from flatgpt.data.tokenizer_files import tokenizer_json\n"
        "texts = [t.topics[name] for name in sorted(t.topics)]\n"
        "print(hashlib.sha256(tokenizer_json(train(texts, 'bpe:1000'))).hexdigest())"
    )
    found = set()
    for threads, seed in (("1", "0"), ("4", "1")):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(ROOT)]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"tokenizer": "bpe:256"}, "a number of ids from 257 (256 bytes, <|endoftext|>) to 65,536"),
        ({"tokenizer": "bpe:258", "special_tokens": (USER, BOT)}, "from 259 (256 bytes, <|endoftext|> and 2 special"),
        ({"tokenizer": "bpe:65537"}, "to 65,536"),
        ({"tokenizer": "bpe:many"}, "bpe:many"),
        ({"tokenizer": "bpe:"}, "bpe:N needs a number"),
        ({"tokenizer": "bpe:9000"}, "gives only 264 ids: choose a smaller N or more text"),
        ({"tokenizer": "bpe:258", "special_tokens": (EOT,)}, f"{EOT}: tokenizer bpe:258 has this token already"),
        ({"tokenizer": "byte", "special_tokens": (USER, USER)}, "given twice"),
        ({"tokenizer": "byte", "special_tokens": ("",)}, "only white space"),
        ({"tokenizer": "byte", "special_tokens": ("a",)}, "has this token already"),
        ({"tokenizer": "bpe:260", "splits": ("val",)}, "trained on the training split"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(in_tmp, words, said):
    files(in_tmp, a="some text\n" * 20)
    assert said in refusal("a.txt", **words)
    assert not list(Path("data").glob("*"))


def test_error_of_reading_the_text_ends_the_training():
    def texts():
        yield TEXT
        raise UserError("a.txt: cannot be read")

    with pytest.raises(UserError, match="cannot be read"):
        train(texts(), "bpe:300")


def test_missing_library_is_named_before_text_is_read(in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install -r requirements-extra.txt (tokenizers)" in refusal("nothing.txt", tokenizer="bpe:300")


# ---------------------------------------------------------------------------------------------------------------------
# datasets


def test_dataset_of_a_trained_tokenizer(in_tmp):
    """The folder's tokenizer.json has the ids of its shards; validation text trains nothing."""
    files(in_tmp, a=TEXT, b="zzqqzzqq xxjjxxjj\n" * 300)
    data = from_text("a.txt", "b.txt", tokenizer="bpe:600", val_fraction=0.2, special_tokens=(USER,))
    assert data.folder == Path("data/text_bpe600")
    encoding = data.load_tokenizer()
    assert {key: data.meta[key] for key in ("tokenizer", "vocab_size", "eot_id")} == {
        "tokenizer": "bpe:600",
        "vocab_size": 600,
        "eot_id": encoding.eot_token,
    }
    assert not any(b"zzq" in encoding.decode_single_token_bytes(n) for n in range(600))
    text = "".join(encoding.decode(data.tokens(split)[:].tolist()) for split in ("train", "val"))
    assert text.replace(EOT, "") == TEXT + "zzqqzzqq xxjjxxjj\n" * 300
    lines = []
    assert from_text("a.txt", "b.txt", log=lines.append, tokenizer="bpe:600", val_fraction=0.2, special_tokens=(USER,))
    assert "nothing to do" in lines[0]
    assert "tokenizer_sample_mb 100 (now 7)" in refusal(
        "a.txt", "b.txt", tokenizer="bpe:600", val_fraction=0.2, special_tokens=(USER,), tokenizer_sample_mb=7
    )


def test_worker_processes_read_the_tokenizer_of_the_folder(in_tmp, monkeypatch):
    files(in_tmp, a=TEXT)
    whole = content(from_text("a.txt", tokenizer="bpe:500", name="one").folder)
    monkeypatch.setattr(preparation, "MIN_POOL_BYTES", 0)
    assert content(from_text("a.txt", tokenizer="bpe:500", name="two", workers=2).folder) == whole


def test_another_tokenizer_of_the_same_name_is_refused(in_tmp):
    files(in_tmp, a=TEXT)
    Path("mine").mkdir()
    for n, size in enumerate(("bpe:300", "bpe:400")):
        Path("mine/tokenizer.json").write_bytes(tokenizer_files.tokenizer_json(train([TEXT], size)))
        if n == 0:
            data = from_text("a.txt", tokenizer="mine")
            assert (data.folder.name, data.meta["tokenizer"]) == ("text_mine", "mine")
            assert data.folder.joinpath("tokenizer.json").read_bytes() == Path("mine/tokenizer.json").read_bytes()
    assert "tokenizer_sha256" in refusal("a.txt", tokenizer="mine/tokenizer.json")
    other = from_text("a.txt", tokenizer="data/text_mine", name="other")
    assert other.meta["ranks_sha256"] == data.meta["ranks_sha256"]
    data.folder.joinpath("tokenizer.json").write_bytes(Path("mine/tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="was changed"):
        open_dataset(data.folder).load_tokenizer()
    data.folder.joinpath("tokenizer.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        open_dataset(data.folder)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("failing", ["train", "write_shards", "encode_task"])
def test_interrupted_training_and_encoding_are_continued(in_tmp, monkeypatch, failing):
    """A dataset that was stopped equals one that was not; a finished tokenizer is not trained again."""
    files(in_tmp, a=TEXT)
    words = {"tokenizer": "bpe:500", "shard_tokens": 2000}
    whole = content(from_text("a.txt", name="one", **words).folder)
    calls, function = [], getattr(preparation, failing)

    def stop(*args, **keys):
        calls.append(failing)
        if len(calls) == (2 if failing == "encode_task" else 1):
            raise KeyboardInterrupt
        return function(*args, **keys)

    monkeypatch.setattr(preparation, failing, stop)
    with pytest.raises(KeyboardInterrupt):
        from_text("a.txt", name="two", **words)
    monkeypatch.setattr(preparation, failing, function)
    assert Path("data/two").exists() == (failing != "train")
    if failing == "encode_task":
        monkeypatch.setattr(preparation, "train", lambda *_: pytest.fail("trained again"))
    assert content(from_text("a.txt", name="two", **words).folder) == whole


@pytest.mark.usefixtures("small_chunks")
def test_changed_tokenizer_of_an_unfinished_dataset_is_refused(in_tmp, monkeypatch):
    files(in_tmp, a=TEXT)
    encode_task, calls = preparation.encode_task, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_task(*args)

    monkeypatch.setattr(preparation, "encode_task", stop)
    with pytest.raises(KeyboardInterrupt):
        from_text("a.txt", tokenizer="bpe:500", name="mine", shard_tokens=500)
    kept = content(Path("data/mine"))
    Path("data/mine/tokenizer.json").write_bytes(tokenizer_files.tokenizer_json(train([TEXT[::-1]], "bpe:500")))
    words = {"tokenizer": "bpe:500", "name": "mine", "shard_tokens": 500}
    assert "tokenizer.json was changed or removed" in refusal("a.txt", **words)
    Path("data/mine/tokenizer.json").unlink()
    assert "tokenizer.json was changed or removed" in refusal("a.txt", **words)
    Path("data/mine/tokenizer.json").write_bytes(kept["tokenizer.json"])
    assert from_text("a.txt", **words).meta["vocab_size"] == 500


def test_sample_is_spread_over_the_files(in_tmp, monkeypatch):
    """A sample of half the text is every second part of it, not the first half."""
    found, encoding = [], train([TEXT], "bpe:300")
    monkeypatch.setattr(preparation, "train", lambda texts, *_: found.extend(texts) or encoding)
    for n in range(10):
        Path(f"{n}.txt").write_text(f"{n} bottles\n" * 100_000)
    from_text("*.txt", tokenizer="bpe:300", tokenizer_sample_mb=5)
    assert [(text[0], len(text)) for text in found] == [(n, 1_000_000) for n in "02468"]


# ---------------------------------------------------------------------------------------------------------------------
# special tokens


@pytest.mark.parametrize("name", ["byte", "gpt2", "trained"])
def test_added_tokens_follow_the_last_id(trained, tmp_path, name):
    encoding = trained if name == "trained" else tokenizer.load(name)
    new = ["<|user", "<|user|>>", "<s>"]  # one contains a token, one is contained
    added = add_special_tokens(encoding, new)
    assert [added.encode_single_token(token) for token in new] == list(range(encoding.n_vocab, encoding.n_vocab + 3))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_files.tokenizer_json(added))
    back = tokenizer.load(added.name, tmp_path, added.eot_token)
    assert tokenizer.ranks_hash(back) == tokenizer.ranks_hash(added)
    text = f"{EOT}a<|user|>>b <|user|> <|user <s>é\n"
    assert back.encode_ordinary(text) == encoding.encode_ordinary(text)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_special(back, text) == reference.encode(text).ids


def test_characters_get_no_special_tokens():
    with pytest.raises(UserError, match="characters only"):
        add_special_tokens(tokenizer.CharacterTokenizer("characters", {"a": 0}), [USER])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_parse_special_makes_one_id_of_each_added_token(in_tmp, monkeypatch, capfd, workers):
    monkeypatch.setattr(preparation, "MIN_POOL_BYTES", 0 if workers > 1 else 1 << 30)
    text = f"{USER}hello{BOT}{EOT} world\n" * 40
    files(in_tmp, a=text)
    words = {"special_tokens": (USER, BOT), "val_fraction": 0.5, "workers": workers}
    plain = from_text("a.txt", name="plain", **words)
    err = capfd.readouterr().err
    assert err.count("note: the text contains '<|user|>'") == err.count("--parse_special makes it one id") == 1
    data = from_text("a.txt", name="parsed", parse_special=True, **words)
    assert "note" not in capfd.readouterr().err
    assert (plain.meta.get("parse_special"), data.meta["parse_special"]) == (None, True)
    encoding = data.load_tokenizer()
    tokens = {token: encoding.encode_single_token(token) for token in (USER, BOT)}
    for prepared, count in ((plain, 0), (data, 40)):
        ids = [i for split in ("train", "val") for i in prepared.tokens(split)[:].tolist()]
        assert [ids.count(n) for n in tokens.values()] == [count, count]
        assert encoding.decode(ids).replace(EOT, "") == text.replace(EOT, "")
    assert "parse_special None (now True)" in refusal("a.txt", name="plain", parse_special=True, **words)


# ---------------------------------------------------------------------------------------------------------------------
# what --tokenizer names


def test_characters_of_nanogpt(in_tmp):
    """A character tokenizer has no token between documents."""
    import pickle

    files(in_tmp, a="hello world\n" * 20, b="hällo\n" * 20)
    characters = sorted(set("hello world\n"))
    stoi = {char: n for n, char in enumerate(characters)}
    Path("chars").mkdir()
    Path("chars/meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": {}}))
    data = from_text("a.txt", tokenizer="chars/meta.pkl")
    assert (data.folder.name, data.meta["eot_id"], data.meta["end_of_text"]) == ("text_chars", None, False)
    assert json.loads((data.folder / "meta.json").read_text())["eot_id"] is None
    ids = [i for split in ("train", "val") for i in data.tokens(split)[:].tolist()]
    assert "".join(characters[i] for i in ids) == "hello world\n" * 20
    assert data.load_tokenizer().decode(ids) == "hello world\n" * 20
    assert "no character 'ä' (U+00E4), which is in line 1, column 2" in refusal("b.txt", tokenizer="chars", name="b")


@pytest.mark.parametrize("name", ["no/such/file.json", "none", "nothing/"])
def test_a_path_that_does_not_exist(in_tmp, name):
    files(in_tmp, a="text\n" * 20)
    assert "unknown; use one of gpt2" in refusal("a.txt", tokenizer=name)


def test_tokenizer_of_a_run_is_found_in_its_checkpoints(trained, tmp_path):
    for n in (10, 20):
        folder = tmp_path / f"run/ckpt/iter_{n:06d}"
        folder.mkdir(parents=True)
        state = {"name": "bpe:600", "vocab_size": 600, "ranks_sha256": "", "eot_id": 597}
        (folder / "state.json").write_text(json.dumps({"tokenizer": state}))
        (folder / "tokenizer.json").write_bytes(tokenizer_files.tokenizer_json(trained))
    for path in (tmp_path / "run", folder):
        found = tokenizer_names.find(str(path))
        assert (found.name, tokenizer.ranks_hash(found)) == ("bpe:600", tokenizer.ranks_hash(trained))


def test_named_encodings_are_found_by_their_vocabulary(tmp_path):
    """A copy of GPT-2's files is GPT-2."""
    for file, text in tokenizer_files.tokenizer_files(tokenizer.load("gpt2"), 1024).items():
        (tmp_path / file).write_bytes(text)
    found = tokenizer_names.find(str(tmp_path))
    assert type(found) is tiktoken.Encoding
    assert found.name == "gpt2"


def test_tokenizer_of_a_model_on_the_hub(trained, in_tmp, host):
    """Its files are downloaded once, without weights; then no network is needed."""
    files(in_tmp, a=TEXT)
    named = {"tokenizer.json": tokenizer_files.tokenizer_json(trained), "config.json": b"{}"}
    host.publish("user/hindi-gpt", {**named, "model.safetensors": b"weights"}, kind="models")
    data = from_text("a.txt", tokenizer="user/hindi-gpt")
    assert (data.folder.name, data.meta["tokenizer"]) == ("text_hindi-gpt", "hindi-gpt")
    assert data.meta["ranks_sha256"] == tokenizer.ranks_hash(trained)
    assert "model.safetensors" not in host.fetched()
    host.stop()
    assert from_text("a.txt", tokenizer="user/hindi-gpt", name="again").meta["vocab_size"] == 600


def test_hub_has_no_tokenizer_of_this_name(in_tmp, host):
    files(in_tmp, a=TEXT)
    host.publish("user/empty", {"config.json": b"{}"}, kind="models")
    assert "user/none: no such file or folder" in refusal("a.txt", tokenizer="user/none")
    assert "has no tokenizer.json and no vocab.json" in refusal("a.txt", tokenizer="user/empty")
