"""Which encoding a folder's tokenizer files hold, and files that are refused."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import tiktoken
from flatgpt.interop.tokenizer_files import END_OF_TEXT, identify_encoding, tokenizer_files
from transformers import AutoTokenizer

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.interop import tokenizer_files as module


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


def test_another_pattern_cannot_be_exported():
    letters = {bytes([byte]): byte for byte in range(256)}
    other = tiktoken.Encoding("words", pat_str=r"\w+|\W+", mergeable_ranks=letters, special_tokens={END_OF_TEXT: 256})
    with pytest.raises(UserError, match=r"words.*GPT-2.*gpt2.*byte"):
        tokenizer_files(other, 64)


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
    (folder / "tokenizer.json").unlink()
    ids = json.loads((folder / "vocab.json").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({END_OF_TEXT: ids[END_OF_TEXT], "[PAD]": len(ids)}))


VOCAB, MERGES = ("model", "vocab"), ("model", "merges")
SAME = {
    "all files": lambda folder: None,
    "vocab and merges": keep("vocab.json", "merges.txt"),
    "transformers' own": transformers_own(),
    "transformers' own, 24 more tokens": transformers_own("[PAD]", "word", *(f"<{n}>" for n in range(22))),
    "added_tokens.json": with_pad,
    "end-of-text only added": edit(lambda ids: ids.pop(END_OF_TEXT), *VOCAB),
    "merges with CRLF": replace("merges.txt", "\n", "\r\n"),
    "merges without a version": replace("merges.txt", "#version: 0.2\n", ""),
}


@pytest.mark.parametrize("how", SAME)
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_encoding_is_identified(name, how, copy, monkeypatch):
    """No other encoding is loaded, which may be a download."""
    folder = copy(name)
    SAME[how](folder)
    monkeypatch.setattr(module, "load", {name: tokenizer.load(name)}.__getitem__)
    assert identify_encoding(folder) == name


@pytest.mark.parametrize(("name", "expected"), [("r50k_base", "gpt2"), *[(n, n) for n in ("p50k_base", "p50k_edit")]])
def test_relatives_of_gpt2_are_identified(name, expected, written):
    assert identify_encoding(written(name)) == expected


# encoding, change, the file that the message names
REFUSED = {
    "ids swapped in gpt2's": ("gpt2", edit(lambda ids: ids.update(a=ids["b"], b=ids["a"]), *VOCAB), "tokenizer.json"),
    "merges in another order": ("gpt2", edit(lambda merges: merges.append(merges.pop(0)), *MERGES), "tokenizer.json"),
    "another merge in merges.txt": ("gpt2", replace("merges.txt", "\nh e\n", "\nhe\n"), "vocab.json"),
    "another token in vocab.json": ("byte", replace("vocab.json", '"a"', '"zz"'), "vocab.json"),
    "an id that is none": ("byte", replace("vocab.json", '"a": 97', '"a": [97]'), "vocab.json"),
    "one id more": ("byte", edit(lambda ids: ids.update(more=257), *VOCAB), "tokenizer.json"),
    "one id less": ("byte", edit(lambda ids: ids.pop("a"), *VOCAB), "tokenizer.json"),
    "a merge more": ("byte", edit(lambda merges: merges.append("a b"), *MERGES), "tokenizer.json"),
    "an id twice": ("byte", edit(lambda added: added.append({"id": 5, "content": "5"}), "added_tokens"), "tokenizer"),
    "WordPiece": ("byte", edit(lambda model: model.pop("merges"), "model"), "tokenizer.json"),
    "Unigram": ("byte", edit(lambda model: model.update(vocab=[]), "model"), "tokenizer.json"),
    "BERT's": ("byte", lambda folder: (keep()(folder), (folder / "vocab.txt").touch()), "vocab.txt"),
    "vocab.json alone": ("byte", keep("vocab.json"), "vocab.json"),
    "merges.txt alone": ("byte", keep("merges.txt"), "merges.txt"),
    "cut": ("byte", lambda folder: (folder / "tokenizer.json").write_text('{"a": 1, "b'), "tokenizer.json"),
    "deep": ("byte", lambda folder: (folder / "tokenizer.json").write_text("[" * 200_000), "tokenizer.json"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_other_and_damaged_vocabularies_are_refused(how, copy, monkeypatch):
    name, change, file = REFUSED[how]
    folder = copy(name)
    change(folder)
    monkeypatch.setattr(module, "load", {name: tokenizer.load(name)}.__getitem__)
    with pytest.raises(UserError, match=rf"{folder}/{file}.* vocabulary"):
        identify_encoding(folder)
