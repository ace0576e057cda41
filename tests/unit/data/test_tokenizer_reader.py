"""Tokenizers that are read from files: which are recognised as a named encoding, kept, or refused."""

import base64
import functools
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from scripts import SCRIPTS, read_text, saved, trained
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from config import UserError
from flatgpt.data import tokenizer, tokenizer_reader
from flatgpt.data.tokenizer_files import END_OF_TEXT, tokenizer_files, tokenizer_json
from flatgpt.data.tokenizer_reader import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(name): a folder with the files of an encoding. Read only."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for file, content in tokenizer_files(tokenizer.load(name), 1024).items():
            (folder / file).write_bytes(content)
        return folder

    return write


@pytest.fixture
def copy(written, tmp_path):
    return lambda name: Path(shutil.copytree(written(name), tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------------
# changes of a folder


def keep(*names: str):
    """Remove all other files."""
    return lambda folder: [file.unlink() for file in folder.iterdir() if file.name not in names]


def edit(change, *path: str):
    """Change what a path of keys leads to in tokenizer.json."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        change(functools.reduce(lambda value, key: value[key], path, content))
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


def replace(name: str, old: str, new: str):
    """Change the first `old` in vocab.json or merges.txt, without tokenizer.json."""

    def apply(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        text = (folder / name).read_bytes().decode()
        assert old in text
        (folder / name).write_bytes(text.replace(old, new, 1 if name == "vocab.json" else -1).encode())

    return apply


def transformers_own(*added: str):
    """The files that transformers saves after reading those of export.py."""

    def apply(folder: Path) -> None:
        reader = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        keep()(folder)
        reader.add_tokens(list(added))
        reader.save_pretrained(folder)

    return apply


def with_pad(folder: Path) -> None:
    """As older versions of transformers saved it."""
    ids = json.loads((folder / "vocab.json").read_bytes())
    keep("vocab.json", "merges.txt")(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": len(ids)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def with_a_merged_token(folder: Path) -> None:
    number = tokenizer.load("gpt2").encode_single_token("re")
    edit(lambda added: added.append({"id": number, "content": "re", "special": True, **FLAGS}), "added_tokens")(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
VOCAB, MERGES = ("model", "vocab"), ("model", "merges")
SAME = {
    "all files": lambda folder: None,
    "vocab and merges": keep("vocab.json", "merges.txt"),
    "transformers' own": transformers_own(),
    "end-of-text only added": edit(lambda ids: ids.pop(END_OF_TEXT), *VOCAB),
    "merges with CRLF": replace("merges.txt", "\n", "\r\n"),
    "merges without a version": replace("merges.txt", "#version: 0.2\n", ""),
}


@pytest.mark.parametrize("how", SAME)
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_named_encoding_is_recognised(name, how, copy, monkeypatch):
    """No other encoding is loaded, which may be a download."""
    folder = copy(name)
    SAME[how](folder)
    monkeypatch.setattr(tokenizer_reader, "load", {name: tokenizer.load(name)}.__getitem__)
    assert read(folder) is tokenizer.load(name)


@pytest.mark.parametrize(("name", "expected"), [("r50k_base", "gpt2"), *[(n, n) for n in ("p50k_base", "p50k_edit")]])
def test_relatives_of_gpt2_are_recognised(name, expected, written):
    assert read(written(name)) is tokenizer.load(expected)


def test_vocabulary_of_gpt2s_size_needs_no_download(copy, monkeypatch):
    """Only GPT-2's own, whose name would be another without the download."""

    def offline(name):
        raise UserError(f"tokenizer {name}: its vocabulary could not be downloaded")

    folder, ranks = copy("gpt2"), tokenizer.ranks_hash(tokenizer.load("gpt2"))
    monkeypatch.setattr(tokenizer_reader, "load", offline)
    encoding = read(folder)
    assert (encoding.name, encoding.eot_token) == ("gpt2", 50_256)
    assert isinstance(encoding, tokenizer.FileTokenizer)
    monkeypatch.setattr(tokenizer_reader, "GPT2_RANKS", ranks)
    with pytest.raises(UserError, match="could not be downloaded"):
        read(folder)


# What is added to a folder is kept: encoding, change, number of ids, added tokens among them
KEPT = {
    "tokens added by transformers": ("gpt2", transformers_own("[PAD]", "word", *(f"<{n}>" for n in range(22))), 24),
    "added_tokens.json": ("byte", with_pad, 1),
    "ids of two bytes swapped": ("gpt2", edit(lambda ids: ids.update(a=ids["b"], b=ids["a"]), *VOCAB), 0),
    "a token that no merge forms": ("byte", edit(lambda ids: ids.update(more=257), *VOCAB), 1),
    "an added token that merges form": ("gpt2", with_a_merged_token, 0),
}


@pytest.mark.parametrize("how", KEPT)
def test_added_tokens_are_kept(how, copy):
    name, change, more = KEPT[how]
    folder = copy(name)
    change(folder)
    encoding, auto, plain = read(folder), AutoTokenizer.from_pretrained(folder), tokenizer.load(name)
    assert isinstance(encoding, tokenizer.FileTokenizer)
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == (name, plain.n_vocab + more, plain.eot_token)
    for text in ("the word [PAD] <3> more\n<|endoftext|>ab", *SCRIPTS.values()):
        ids = tokenizer.encode_special(encoding, text)
        assert ids == auto.encode(text, add_special_tokens=False)
        assert encoding.decode(ids) == text
    for token, n in encoding._special_tokens.items():
        assert auto.convert_tokens_to_ids(token) == n
    assert tokenizer.ranks_hash(encoding) != tokenizer.ranks_hash(plain)


def test_tiktoken_file(copy, tmp_path):
    """GPT-2's pattern, and end-of-text after the last rank."""
    gpt2 = tokenizer.load("gpt2")
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in gpt2._mergeable_ranks.items())
    (tmp_path / "own.tiktoken").write_bytes(b"".join(lines))
    assert read(tmp_path / "own.tiktoken") is gpt2
    (tmp_path / "own.tiktoken").write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(bytes([n])), n) for n in range(255, -1, -1)) + b"YWI= 300\n"
    )
    encoding = read(tmp_path / "own.tiktoken")
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("own", 302, 301)
    assert encoding.encode_ordinary("abc") == [300, 99]


# ---------------------------------------------------------------------------------------------------------------------
# refused

BPE = json.loads(trained())
MODEL, SPLIT = BPE["model"], BPE["pre_tokenizer"]["pretokenizers"]
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "word": 2}, "unk_token": "a"}


def pattern(regex: str) -> dict:
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPLIT[0], "pattern": {"Regex": regex}}, SPLIT[1]]}
    }


# changes of a trained tokenizer.json, what the message says
OTHER_KINDS = {
    "WordPiece": ({"model": {"type": "WordPiece", "vocab": {"[UNK]": 0}}}, "WordPiece tokenizers"),
    "Unigram": ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}}, "Unigram tokenizers"),
    "no type": ({"model": {"vocab": {}}}, "unknown tokenizers"),
    "SentencePiece": ({"model": {**MODEL, "byte_fallback": True}}, "SentencePiece BPE tokenizers"),
    "words": ({"model": WORDS}, "WordLevel tokenizers"),
    "letters as words": ({"model": {**WORDS, "vocab": {"a": 0}}}, "WordLevel tokenizers"),
    "CLIP's": ({"model": {**MODEL, "end_of_word_suffix": "</w>"}}, "BPE with prefixes or suffixes tokenizers"),
    "characters": ({"model": {**MODEL, "vocab": MODEL["vocab"] | {"가": 1500}}}, "'가' is not of a byte-level BPE"),
    "too large": ({"model": {**MODEL, "vocab": MODEL["vocab"] | {"more": 65_536}}}, "65,537 ids do not fit uint16"),
    "too large by a token": ({"added_tokens": [{"id": 65_536, "content": "more"}]}, "65,537 ids do not fit uint16"),
    "no ids for bytes": ({"model": {**MODEL, "vocab": {"a": 0}, "merges": []}}, "no token for 255 of the 256 bytes"),
    "other order": ({"model": {**MODEL, "merges": MODEL["merges"][::-1]}}, "merges do not have the order of its ids"),
    "words by spaces": ({"pre_tokenizer": {"type": "Whitespace"}}, "splits words by Whitespace"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "splits words by None"),
    "end of a line": (pattern(r"\s+$|\S+|\s+"), r"pattern .*\$.* not supported"),
    "repeated repetition": (pattern(r"\p{N}{1,3}+|\P{N}"), "pattern .* not supported"),
    "empty matches": (pattern(r"\p{L}*"), "pattern .* not supported"),
    "flags": (pattern(r"(?m:.)+|\n"), "pattern .* not supported"),
    "no pattern": (pattern(r"\p{L"), "pattern .* not supported"),
}


@pytest.mark.parametrize("how", OTHER_KINDS)
def test_other_kinds_are_refused(how, tmp_path):
    change, said = OTHER_KINDS[how]
    with pytest.raises(
        UserError, match=rf"{tmp_path}/tokenizer.json: .*{said}.*; choose another tokenizer: gpt2, byte"
    ):
        read_text(tmp_path, BPE | change)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("vocab.txt", "WordPiece"),
        ("spiece.model", "SentencePiece"),
        ("tokenizer.model", "SentencePiece"),
        ("model.bin", "is not a tokenizer's file"),
    ],
)
def test_other_files_are_refused(file, said, tmp_path):
    assert read(tmp_path) is None
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"{tmp_path}/{file}.*{said}.*; choose another"):
        read(tmp_path / file)
    if file != "model.bin":
        with pytest.raises(UserError, match=said):
            read(tmp_path)


# encoding, change, the file that the message names
DAMAGED = {
    "another merge in merges.txt": ("gpt2", replace("merges.txt", "\nh e\n", "\nhe\n"), "vocab.json"),
    "another token in vocab.json": ("byte", replace("vocab.json", '"a"', '"zz"'), "vocab.json"),
    "an id that is none": ("byte", replace("vocab.json", '"a": 97', '"a": [97]'), "vocab.json"),
    "a number that is no id": ("byte", replace("vocab.json", '"a": 97', '"a": 97.5'), "vocab.json"),
    "a negative id": ("byte", replace("vocab.json", '"a": 97', '"a": -1'), "vocab.json"),
    "one id less": ("byte", edit(lambda ids: ids.pop("a"), *VOCAB), "tokenizer.json"),
    "a merge more": ("byte", edit(lambda merges: merges.append("a b"), *MERGES), "tokenizer.json"),
    "an id twice": ("byte", edit(lambda added: added.append({"id": 5, "content": "5"}), "added_tokens"), "tokenizer"),
    "no merges": ("byte", edit(lambda model: model.pop("merges"), "model"), "tokenizer.json"),
    "vocab.json alone": ("byte", keep("vocab.json"), "vocab.json"),
    "merges.txt alone": ("byte", keep("merges.txt"), "merges.txt"),
    "cut": ("byte", lambda folder: (folder / "tokenizer.json").write_text('{"a": 1, "b'), "tokenizer.json"),
    "a list": ("byte", lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    "deep": ("byte", lambda folder: (folder / "tokenizer.json").write_text("[" * 200_000), "tokenizer.json"),
    "not UTF-8": ("byte", lambda folder: (folder / "tokenizer.json").write_bytes(b'{"\xff": 1}'), "tokenizer.json"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_files_are_refused(how, copy):
    name, change, file = DAMAGED[how]
    folder = copy(name)
    change(folder)
    with pytest.raises(UserError, match=rf"{folder}/{file}"):
        read(folder)


# ---------------------------------------------------------------------------------------------------------------------
# the token between documents

# added tokens, other files, what is found
ENDS = {
    "GPT-2's": ("<|endoftext|>", {}, "<|endoftext|>"),
    "a usual one": ("<s> <pad> </s> <unk>", {}, "</s>"),
    "only one at the beginning": ("<s> <pad>", {}, "<s>"),
    "none": ("<pad> <unk>", {}, None),
    "named": ("<|endoftext|> <|end|>", {"tokenizer_config": {"eos_token": "<|end|>"}}, "<|end|>"),
    "named with its flags": (
        "<s> </s>",
        {"tokenizer_config": {"eos_token": {"content": "<s>", "lstrip": True}}},
        "<s>",
    ),
    "named in the map": ("<|endoftext|> </s>", {"special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
    "named by the model": ("<|endoftext|> <x>", {"config": {"eos_token_id": 1501}}, "<x>"),
    "named by a list": ("<|endoftext|> <x>", {"config": {"eos_token_id": [1501, 1500]}}, "<x>"),
    "named, but missing": ("<|endoftext|>", {"tokenizer_config": {"eos_token": "</s>"}}, "<|endoftext|>"),
    "no name": ("<|endoftext|>", {"tokenizer_config": {"eos_token": None}}, "<|endoftext|>"),
    "an id of another vocabulary": ("</s>", {"config": {"eos_token_id": 50_256}}, "</s>"),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_end_of_text(how, files, tmp_path):
    added, others, expected = ENDS[how]
    added = {token: 1500 + n for n, token in enumerate(added.split())}
    model = {**MODEL, "vocab": {token: n for token, n in MODEL["vocab"].items() if token != END_OF_TEXT}}
    tokens = [{"id": n, "content": token, "special": True, **FLAGS} for token, n in added.items()]
    folder = saved(tmp_path, BPE | {"model": model, "added_tokens": tokens}, **others)
    if files != "tokenizer.json":
        (folder / "tokenizer.json").unlink()
        saved(folder, "", vocab=model["vocab"] | added)
        (folder / "tokenizer.json").unlink()
        (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in MODEL["merges"]))
    encoding = read(folder)
    assert (encoding.end_of_text, encoding.eot_token) == (expected, added.get(expected))
    assert encoding._special_tokens == {"<unused 0>": 0, **added}  # an id that no token has
    assert tokenizer.find_special(encoding, "<unused 0>") is None
    assert encoding.decode([0]) == "<unused 0>"
    if files == "tokenizer.json":  # what a dataset or checkpoint says of it counts more than the files beside it
        last = len(added) - 1
        assert tokenizer.load("name", folder, 1500 + last).end_of_text == [*added][last]
        assert tokenizer.load("name", folder, None).eot_token is None


def test_hash_covers_all_that_changes_ids(tmp_path):
    token = {"id": 1500, "content": "<x>", "special": True, **FLAGS}
    changes = (
        {},
        pattern(r"\S+|\s+"),
        {"added_tokens": [*BPE["added_tokens"], token]},
        {"added_tokens": [*BPE["added_tokens"], {**token, "content": "<y>"}]},
        {"added_tokens": [*BPE["added_tokens"], {**token, "lstrip": True}]},
    )
    hashes = [tokenizer.ranks_hash(read_text(tmp_path, BPE | change)) for change in changes]
    assert len({*hashes}) == len(hashes)
    assert tokenizer.ranks_hash(read_text(tmp_path, json.dumps(BPE, indent=2))) == hashes[0]


def test_normalizer_and_prefix_space_are_removed(tmp_path, capsys):
    """A note says so once. The tokenizer.json of datasets, checkpoints and exports has none, so that ids are ours."""
    change = {"normalizer": {"type": "NFC"}}
    change["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [SPLIT[0], {**SPLIT[1], "add_prefix_space": True}]}
    for _ in range(2):
        encoding = read_text(tmp_path, BPE | change)
    reference, text = Tokenizer.from_str(tokenizer_json(encoding).decode()), "e\u0301 ﬁ"
    assert reference.encode(text).ids == encoding.encode_ordinary(text)
    said = capsys.readouterr().err
    assert re.fullmatch(r"note: .*tokenizer.json: its prefix space and its normalizer \(NFC\) is not applied.*\n", said)


# ---------------------------------------------------------------------------------------------------------------------
# characters

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak. 東京 🎈 नमस्ते\t\x00Ġ"


def nanogpt(text: str) -> dict:
    """As data/shakespeare_char/prepare.py of nanoGPT."""
    chars = sorted(set(text))
    stoi, itos = {ch: i for i, ch in enumerate(chars)}, dict(enumerate(chars))
    return {"vocab_size": len(chars), "itos": itos, "stoi": stoi}


def pickled(folder: Path, content: bytes | object) -> Path:
    (folder / "meta.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return folder / "meta.pkl"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_characters_of_nanogpt(protocol, tmp_path):
    meta = nanogpt(TEXT)
    pickled(tmp_path, pickle.dumps(meta, protocol))
    encoding = read(tmp_path)
    assert isinstance(encoding, tokenizer.CharacterTokenizer)
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == (tmp_path.name, meta["vocab_size"], None)
    ids = encoding.encode_ordinary(TEXT)
    assert ids == [meta["stoi"][char] for char in TEXT]
    assert encoding.decode(ids) == TEXT
    assert encoding.decode_single_token_bytes(meta["stoi"]["東"]) == "東".encode()
    assert tokenizer.encode_special(encoding, TEXT) == ids
    assert tokenizer.find_special(encoding, TEXT) is None


def test_exported_characters(tmp_path):
    """transformers reads them, and they are read back."""
    encoding = tokenizer.CharacterTokenizer("own", nanogpt(TEXT)["stoi"])
    for file, content in tokenizer_files(encoding, 64).items():
        (tmp_path / file).write_bytes(content)
    auto, back = AutoTokenizer.from_pretrained(tmp_path), tokenizer.load("own", tmp_path, None)
    assert isinstance(back, tokenizer.CharacterTokenizer)
    assert tokenizer.ranks_hash(back) == tokenizer.ranks_hash(encoding)
    assert (len(auto), auto.model_max_length, auto.eos_token) == (encoding.n_vocab, 64, None)
    for text in (TEXT, TEXT[::-1], " ", "\n\n  a", "", "🎈" * 1000):
        ids = back.encode_ordinary(text)
        assert auto.encode(text) == ids
        assert auto.decode(ids) == text
    auto.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again").ids == encoding.ids
    copied = pickle.loads(pickle.dumps(back))
    assert (copied.ids, copied.content) == (back.ids, back.content)


@pytest.mark.parametrize("char", ["Z", "é", "𝟘", "\ud800", "\u0301"])
def test_missing_character_is_named_with_its_place(char):
    encoding = tokenizer.CharacterTokenizer("own", nanogpt(TEXT)["stoi"])
    with pytest.raises(UserError, match=rf"tokenizer own .*U\+{ord(char):04X}.* line 2, column 3 of the text") as error:
        encoding.encode_ordinary(f"First\nme{char}")
    error.value.args[0].encode()


class Call:
    """Runs a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


recursive: dict = {"stoi": {"a": 0}}
recursive["itos"] = recursive
PLAIN = pickle.dumps(nanogpt("ab"), 4)
BAD_PICKLES = {
    "a call": {"stoi": Call(Path.touch, (Path("evil"),))},
    "a call, protocol 0": pickle.dumps(Call(exec, ("open('evil', 'w')",)), 0),
    "a call beside the characters": nanogpt("ab") | {"more": Call(exec, ("open('evil', 'w')",))},
    "a class": {"stoi": {"a": 0}, "more": Path},
    "a persistent id": b"Px\n.",
    "memory for indices": b"\x80\x04}r\xff\xff\xff\xff.",
    "memory for text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "memory for bytes": b"\x80\x05\x96" + b"\0" * 5 + b"\1\0\0.",
    "a missing index": b"\x80\x04h\x07.",
    "empty": b"",
    "text": b"not a pickle",
    "no stack": b".",
    "other content": {"words": {}},
    "a list": [1, 2],
    "no dict": {"stoi": 5},
    "no characters": {"stoi": {}},
    "words": {"stoi": {"a": 0, "bc": 1}},
    "numbers": {"stoi": {0: "a"}},
    "bytes": {"stoi": {b"a": 0}},
    "half a character": {"stoi": {"\ud800": 0}},
    "a hole": {"stoi": {"a": 0, "b": 2}},
    "an id twice": {"stoi": {"a": 0, "b": 0}},
    "a truth value": {"stoi": {"a": False, "b": 1}},
    "a text as an id": {"stoi": {"a": "0"}},
    "a huge id": {"stoi": {"a": 0, "b": 10**4000}},
    "a huge id, protocol 0": pickle.dumps({"stoi": {"a": 0, "b": 1}}, 0).replace(b"I1", b"I" + b"9" * 9999),
    "too many": {"stoi": {chr(n): n for n in range(0x10000, 0x20001)}},
    **{f"{n} bytes": PLAIN[:n] for n in range(1, len(PLAIN))},
}


@pytest.mark.parametrize("how", BAD_PICKLES)
def test_other_pickles_are_refused(how, in_tmp):
    path = pickled(in_tmp, BAD_PICKLES[how])
    with pytest.raises(UserError, match=rf"^{path}"):
        read(path)
    assert not Path("evil").exists()


def test_dictionary_that_contains_itself(tmp_path):
    assert read(pickled(tmp_path, recursive)).ids == {"a": 0}
