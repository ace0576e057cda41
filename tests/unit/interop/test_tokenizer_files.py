"""Which encoding a folder's tokenizer files hold, and files that are refused."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from processes import ROOT

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.interop import tokenizer_files as module
from flatgpt.interop.tokenizer_files import END, identify_encoding, tokenizer_files


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


def test_files_of_byte():
    """No merges; ids are bytes; both files of settings name the end-of-text, as readers read one or the other."""
    files = tokenizer_files(tokenizer.load("byte"), 64)
    assert files["merges.txt"] == b"#version: 0.2\n"
    ids = json.loads(files["vocab.json"])
    assert sorted(ids.values()) == list(range(257))
    assert (ids["!"], ids["Ġ"], ids["Ċ"], ids["é"], ids["Ń"], ids[END]) == (33, 32, 10, 0xE9, 0xAD, 256)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads(files[file])
        assert {settings[key] for key in ("bos_token", "eos_token", "unk_token")} == {END}


def test_another_pattern_cannot_be_exported():
    letters = {bytes([byte]): byte for byte in range(256)}
    other = tiktoken.Encoding("words", pat_str=r"\w+|\W+", mergeable_ranks=letters, special_tokens={END: 256})
    with pytest.raises(UserError, match=r"words.*GPT-2.*gpt2.*byte"):
        tokenizer_files(other, 64)


# ---------------------------------------------------------------------------------------------------------------------
# changes of a folder


def keep(*names: str):
    """Remove all other files."""
    return lambda folder: [file.unlink() for file in folder.iterdir() if file.name not in names]


def edit(file: str, change, *path: str):
    """Change the content of a JSON file, or what a path of keys leads to in it."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_bytes())
        change(functools.reduce(lambda value, key: value[key], path, content))
        (folder / file).write_text(json.dumps(content))

    return apply


def edit_merges(change):
    def apply(folder: Path) -> None:
        keep("vocab.json", "merges.txt")(folder)
        merges = folder / "merges.txt"
        merges.write_bytes(change(merges.read_bytes()))

    return apply


def transformers_own(*added: str):
    """The files that transformers saves after reading those of export.py."""

    def apply(folder: Path) -> None:
        from transformers import AutoTokenizer

        reader = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        keep()(folder)
        reader.add_tokens(list(added))
        reader.save_pretrained(folder)

    return apply


def with_pad(folder: Path) -> None:
    keep("vocab.json", "merges.txt")(folder)
    ids = json.loads((folder / "vocab.json").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({END: ids[END], "[PAD]": len(ids)}))


def end_of_text_only_added(folder: Path) -> None:
    edit("tokenizer.json", lambda ids: ids.pop(END), "model", "vocab")(folder)
    keep("tokenizer.json")(folder)


def every_token_added(content: dict) -> None:
    """Added tokens stand for themselves as written: Ġ for a Ġ and not for a space."""
    content["added_tokens"] = [{"id": n, "content": token} for token, n in content["model"]["vocab"].items()]
    content["model"]["vocab"].clear()


def swap(items) -> None:
    """Swap two values of a dict or list."""
    one, other = ("a", "b") if isinstance(items, dict) else (0, 1)
    items[one], items[other] = items[other], items[one]


def swap_lines(text: bytes) -> bytes:
    version, one, two, rest = text.split(b"\n", 3)
    return b"\n".join((version, two, one, rest))


SAME = {
    "all files": lambda folder: None,
    "tokenizer.json": keep("tokenizer.json"),
    "vocab and merges": keep("vocab.json", "merges.txt"),
    "tokenizer.json and vocab": keep("tokenizer.json", "vocab.json"),
    "transformers' own": transformers_own(),
    "transformers' own, 24 more tokens": transformers_own("[PAD]", "word", *(f"<{n}>" for n in range(22))),
    "added_tokens.json": with_pad,
    "end-of-text only added": end_of_text_only_added,
    "merges with CRLF": edit_merges(lambda text: text.replace(b"\n", b"\r\n")),
    "merges without a version": edit_merges(lambda text: text.removeprefix(b"#version: 0.2\n")),
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


VOCAB = ("model", "vocab")
# encoding, change, the file that the message names
OTHERS = {
    "ids swapped in tokenizer.json": ("byte", edit("tokenizer.json", swap, *VOCAB), "tokenizer.json"),
    "ids swapped in gpt2's": ("gpt2", edit("tokenizer.json", swap, *VOCAB), "tokenizer.json"),
    "ids swapped in vocab.json": ("byte", edit("vocab.json", swap), "vocab.json"),
    "another token": ("byte", edit("vocab.json", lambda ids: ids.update(zz=ids.pop("a"))), "vocab.json"),
    "one id more": ("byte", edit("tokenizer.json", lambda ids: ids.update(more=257), *VOCAB), "tokenizer.json"),
    "one id less": ("byte", edit("tokenizer.json", lambda ids: ids.pop("a"), *VOCAB), "tokenizer.json"),
    "no ids": ("byte", edit("tokenizer.json", dict.clear, *VOCAB), "tokenizer.json"),
    "every token added": ("byte", edit("tokenizer.json", every_token_added), "tokenizer.json"),
    "an added token within the ids": (
        "byte",
        edit("tokenizer.json", lambda tokens: tokens.append({"id": 5, "content": "five"}), "added_tokens"),
        "tokenizer.json",
    ),
    "WordPiece": ("byte", edit("tokenizer.json", lambda m: m.update(type="WordPiece"), "model"), "tokenizer.json"),
    "Unigram": (
        "byte",
        edit("tokenizer.json", lambda m: m.update(type="Unigram", vocab=[]), "model"),
        "tokenizer.json",
    ),
    "a merge more": ("byte", edit("tokenizer.json", lambda m: m.append("a b"), "model", "merges"), "tokenizer.json"),
    "merges swapped": ("gpt2", edit("tokenizer.json", swap, "model", "merges"), "tokenizer.json"),
    "merges.txt swapped": ("gpt2", edit_merges(swap_lines), "vocab.json"),
    "too large": ("byte", lambda folder: os.truncate(folder / "tokenizer.json", 1 << 26), "tokenizer.json"),
    "BERT's": ("byte", lambda folder: (keep()(folder), (folder / "vocab.txt").touch()), "vocab.txt"),
    "SentencePiece's": ("byte", lambda folder: (keep()(folder), (folder / "spiece.model").touch()), "spiece.model"),
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_vocabularies_are_refused(how, copy):
    name, change, file = OTHERS[how]
    folder = copy(name)
    change(folder)
    with pytest.raises(UserError, match=r"vocabulary that flatGPT does not have.*gpt2") as caught:
        identify_encoding(folder)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize(("there", "missing"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_a_vocabulary_is_refused(there, missing, copy):
    folder = copy("byte")
    keep(there)(folder)
    (folder / missing).mkdir()  # not a file
    with pytest.raises(UserError, match=rf"{missing} is missing.*{there}"):
        identify_encoding(folder)


def test_files_that_disagree_are_refused(written, copy):
    folder = copy("byte")
    shutil.copy(written("gpt2") / "tokenizer.json", folder)
    with pytest.raises(UserError, match=r"disagree.*tokenizer.json is gpt2's, vocab.json is byte's"):
        identify_encoding(folder)


DAMAGED = {
    "cut": b'{"a": 1, "b',
    "no JSON": b"<html>404</html>",
    "no UTF-8": b'{"\xff": 1}',
    "a list": b"[1, 2]",
    "null": b"null",
    "deep": b"[" * 200_000,
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "true for 1": b'{"a": true}',
    "model is text": b'{"model": "BPE"}',
    "vocab is null": b'{"model": {"type": "BPE", "vocab": null, "merges": []}}',
    "merges of numbers": b'{"model": {"vocab": {"a": 0}, "merges": [[1, 2]]}}',
    "merges are missing": b'{"model": {"vocab": {"a": 0}}}',
    "added is a number": b'{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": 3}',
    "added without an id": b'{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "a"}]}',
}


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "added_tokens.json"])
@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_files_are_named(how, file, copy):
    folder = copy("byte")
    keep("vocab.json", "merges.txt")(folder)
    (folder / file).write_bytes(DAMAGED[how])
    with pytest.raises(UserError, match=rf"{file} is damaged: .*copy it again"):
        identify_encoding(folder)


def test_damaged_merges_are_named(copy):
    folder = copy("byte")
    (folder / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"merges.txt is damaged"):
        identify_encoding(folder)


def test_folders_without_a_vocabulary(tmp_path):
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer.json").mkdir()
    os.mkfifo(tmp_path / "vocab.json")  # reading it would never end
    assert identify_encoding(tmp_path) is None


@pytest.mark.parametrize("size", [256, 258, 50_256, 50_258])
def test_nothing_is_loaded_for_a_vocabulary_of_another_size(size, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", lambda name: pytest.fail(f"{name} is loaded, which may be a download"))
    (tmp_path / "vocab.json").write_text(json.dumps({str(n): n for n in range(size)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"vocab.json holds a vocabulary that flatGPT does not have"):
        identify_encoding(tmp_path)


def test_no_heavy_library_is_imported():
    heavy = ("torch", "transformers", "tokenizers", "huggingface_hub")
    code = "import sys; from flatgpt.interop import tokenizer_files\n"
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
