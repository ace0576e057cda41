"""Tokenizer files: transformers reads them and gives tiktoken's ids; and what a folder holds is told from its ids."""

import base64
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import TEXT
from processes import ROOT

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.interop import tokenizer_files as vocabulary
from flatgpt.interop.tokenizer_files import END, identify_encoding, tokenizer_files

quick = settings(max_examples=100)
# GPT-2's, as OpenAI published it (encoder.py); tiktoken has a faster way to write it
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
NAMES = ("byte", "gpt2", "r50k_base", "p50k_base", "p50k_edit")
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # tiktoken's cache has these files
SHA256 = {  # of r50k_base.tiktoken and p50k_base.tiktoken, as tiktoken checks them (tiktoken_ext/openai_public.py)
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "p50k_base": "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
}

NASTY = {
    "empty": "",
    "text": TEXT[:500],
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈👍🏽 🇫🇷x🎈",
    "Chinese": "東京 人工智能,你好 世界。",
    "scripts": "Привет мир שלום ‏مرحبا नमस्ते สวัสดี 안녕 ქართული",
    "combining": "e\u0301 n\u0303o \u0301 a\u0300\u0301\u0302 क्षि Z\u0335\u0321\u0353",
    "controls": "\0a\0\0 \x01\x1b[0m\x7f\x80\x85\x9f \x1c\x1d\x1e\x1f \v\f",
    "lines": "one\r\ntwo\rthree\n\n\n\tfour\t\tfive \t six\n ",
    "spaces": "a" + " " * 2 + "b" + " " * 3 + "c" + " " * 24 + "d" + " " * 25 + "e" + " " * 26 + "f" + " " * 99,
    "only spaces": " " * 777,
    "trailing": "ends in one ",
    "other spaces": "a\xa0b \xa0 c\u2003\u2009d\u3000e\u2028f\u2029g\u200bh\u202fi\ufeffj\u1680k\u180el \u2003",
    "contractions": "it's it’s I'll I’ll we've they'd you're I'm don't DON'T I'LL 's' ''s ' s ’s 'süd 'll've",
    "digits": "1234567890 3.14 ١٢٣ ४५६ ⅷ ½ ² 𝟘𝟙 1a2b 一二三",
    "letters": "x" * 3000,
    "signs": "=" * 3000 + "#" * 17 + "!?" * 50,
    "code": "def f(x):\n        return x ** 2  # a . b , c ! n't 'm\n\n\n" * 5,
    "visible": "Ġthe Ċ Ġ ĉ ÃĤ",  # what the files write for bytes is text like any other
    "marks": "<|endoftext <|end|> |endoftext|> [PAD] <s> <unk>",
    "rare": "\ue000\uffff\U0010ffff\U000e0001 ß ẞ ŉ ﬃ Å",
}


def openais(name: str) -> tiktoken.Encoding:
    """tokenizer.load's; but p50k_base, which is GPT-2's with runs of blanks, need not be fetched."""
    if name != "p50k_base":
        return tokenizer.load(name)
    gpt2 = tokenizer.load("gpt2")
    ranks = {token: gpt2.encode_single_token(token) for token in gpt2.token_byte_values()}
    ranks |= {b" " * n: 50255 + n for n in range(2, 26)}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders, written once, with the files of an encoding."""

    @functools.cache
    def write(name: str) -> Path:
        return save(tmp_path_factory.mktemp(name), tokenizer_files(tokenizer.load(name), 1024))

    return write


def save(folder: Path, files: dict[str, bytes]) -> Path:
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def auto(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def auto_without_backend(folder: Path):
    """As a reader without the tokenizers library does: vocab.json and merges.txt."""
    with_files = folder.with_name(f"{folder.name}_slow")
    shutil.copytree(folder, with_files, ignore=shutil.ignore_patterns("tokenizer.json"), dirs_exist_ok=True)
    return auto(with_files)


def backend(folder: Path):
    """tokenizer.json and nothing else, as servers read it: what it says of pattern and decoder counts."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


READERS = {"auto": auto, "vocab and merges": auto_without_backend, "tokenizer.json": backend}


@pytest.fixture(scope="module")
def read(written):
    """Tokenizers as transformers reads them, each read once."""
    return functools.cache(lambda name, reader="auto": READERS[reader](written(name)))


# ---------------------------------------------------------------------------------------------------------------------
# the files


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_files_of_gpt2_are_openais():
    files = tokenizer_files(tokenizer.load("gpt2"), 1024)
    assert files["merges.txt"] == tiktoken.load.read_file_cached(f"{OPENAI}/vocab.bpe")
    ids = json.loads(files["vocab.json"])
    assert ids == json.loads(tiktoken.load.read_file_cached(f"{OPENAI}/encoder.json"))
    assert files["merges.txt"].decode().split("\n")[:4] == ["#version: 0.2", "Ġ t", "Ġ a", "h e"]
    model = json.loads(files["tokenizer.json"])["model"]
    assert (model["vocab"], len(model["merges"])) == (ids, 50_000)


@pytest.mark.usefixtures("gpt2_vocabulary")
@pytest.mark.parametrize(("name", "theirs"), [("gpt2", "r50k_base"), ("p50k_base", "p50k_base")])
def test_relatives_of_gpt2_have_its_ids(name, theirs):
    """OpenAI's files of r50k and p50k, written from GPT-2's ids."""
    ours = openais(name)
    lines = [base64.b64encode(t) + b" %d\n" % ours.encode_single_token(t) for t in ours.token_byte_values()]
    lines.sort(key=lambda line: int(line.split()[1]))
    assert hashlib.sha256(b"".join(lines)).hexdigest() == SHA256[theirs]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_tiktokens_and_text_comes_back(name, reader, read):
    theirs, ours = read(name, reader), tokenizer.load(name)
    for what, text in NASTY.items():
        ids = theirs.encode(text)
        assert ids == ours.encode_ordinary(text), what
        assert theirs.decode(ids) == text, what


@pytest.mark.parametrize("reader", ["auto", "tokenizer.json"])
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_any_text(name, reader, read):
    theirs, ours = read(name, reader), tokenizer.load(name)

    @quick
    @given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'sdmtlvreĠ1\xa0"))))
    def check(text):
        ids = theirs.encode(text)
        assert ids == ours.encode(text, allowed_special="all")  # hypothesis tries END too, which this file names
        assert theirs.decode(ids) == text

    check()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_within_a_text(name, reader, read):
    theirs, ours = read(name, reader), tokenizer.load(name)
    for text in (
        END,
        f"{END}{END}",
        f"a {END} b",
        f" {END}\n{END} ",
        "the <|fim_prefix|>x<|fim_suffix|> y<|fim_middle|>",
    ):
        assert theirs.encode(text) == ours.encode(text, allowed_special="all")
        assert theirs.decode(theirs.encode(text)) == text
    assert theirs.decode(theirs.encode(f"a{END} b"), skip_special_tokens=True) == "a b"


@pytest.mark.parametrize("name", NAMES)
def test_settings(name, read):
    theirs, ours = read(name), tokenizer.load(name)
    assert (type(theirs).__name__, theirs.is_fast) == ("GPT2Tokenizer", True)
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.unk_token_id == ours.eot_token
    assert theirs.pad_token is None
    assert theirs.model_max_length == 1024
    assert theirs.clean_up_tokenization_spaces is False
    assert len(theirs) == ours.n_vocab
    assert {theirs.convert_tokens_to_ids(mark) for mark in ours.special_tokens_set} == {
        ours.encode_single_token(mark) for mark in ours.special_tokens_set
    }


def test_with_a_models_config_beside_it(written, tmp_path):
    """The folder of a whole model says GPT-2 twice, and transformers asks config.json first."""
    from transformers import GPT2Config

    folder = shutil.copytree(written("gpt2"), tmp_path / "model")
    GPT2Config(n_embd=8, n_head=2, n_layer=1).save_pretrained(folder)
    theirs = auto(folder)
    assert (type(theirs).__name__, theirs.encode(TEXT)) == (
        "GPT2Tokenizer",
        tokenizer.load("gpt2").encode_ordinary(TEXT),
    )


def made_up() -> tiktoken.Encoding:
    """GPT-2's pattern; a hole in the ids, tokens that several pairs could make, end-of-text in the middle."""
    tokens = [b"aa", b"aaa", b"ab", b"aab", b"bc", b"abc", b" a", b" aaa", b"  ", b"   ", b"\n\n", b"\xc3\xa9", b"aaaa"]
    ranks = {bytes([255 - n]): n for n in range(256)} | {token: 260 + 2 * n for n, token in enumerate(tokens)}
    return tiktoken.Encoding("p50k_base", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 263})


@pytest.mark.parametrize("reader", READERS)
def test_made_up_vocabulary_with_holes(reader, tmp_path):
    ours = made_up()
    theirs = READERS[reader](save(tmp_path, tokenizer_files(ours, 64)))
    assert json.loads((tmp_path / "vocab.json").read_bytes())[END] == theirs.convert_tokens_to_ids(END) == 263
    assert {number for number in range(ours.n_vocab) if theirs.convert_ids_to_tokens(number) is None} == {
        256, 257, 258, 259, 261, *range(265, ours.n_vocab, 2)
    }  # fmt: skip

    @quick
    @given(st.one_of(st.text("abc \né"), st.text(st.characters(exclude_categories=["Cs"]))))
    def check(text):
        ids = theirs.encode(text + END)
        assert ids == ours.encode(text + END, allowed_special="all")
        assert theirs.decode(ids) == text + END

    check()


def test_byte_has_no_merges_and_ids_of_bytes():
    files = tokenizer_files(tokenizer.load("byte"), 64)
    assert files["merges.txt"] == b"#version: 0.2\n"
    ids = json.loads(files["vocab.json"])
    assert sorted(ids.values()) == list(range(257))
    assert (ids["!"], ids["Ġ"], ids["Ċ"], ids["é"], ids["Ń"], ids[END]) == (33, 32, 10, 0xE9, 0xAD, 256)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_both_files_of_settings_name_the_ends(file):
    """Some readers know one, some the other, and not all have GPT-2's ends without being told."""
    said = json.loads(tokenizer_files(tokenizer.load("byte"), 64)[file])
    assert (said["bos_token"], said["eos_token"], said["unk_token"]) == (END, END, END)


def test_another_pattern_is_refused():
    letters = {bytes([byte]): byte for byte in range(256)}
    other = tiktoken.Encoding("words", pat_str=r"\w+|\W+", mergeable_ranks=letters, special_tokens={END: 256})
    with pytest.raises(UserError, match=r"words.*GPT-2.*gpt2.*byte"):
        tokenizer_files(other, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte", "gpt2", "p50k_base"])
def test_real_text(name, gpt2_vocabulary, real_text, tmp_path):
    """WikiText-103's test split; as one text and line by line."""
    from pyarrow import parquet

    rows = parquet.read_table(real_text / "wikitext103" / "test-00000-of-00001.parquet")["text"].to_pylist()
    ours = openais(name)
    theirs = auto(save(tmp_path, tokenizer_files(ours, 1024)))
    text = "".join(rows)
    ids = theirs.encode(text)
    assert ids == ours.encode_ordinary(text)
    assert theirs.decode(ids) == text
    assert theirs(rows)["input_ids"] == ours.encode_ordinary_batch(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2"])
def test_every_code_point(name, read):
    """Letters, digits and white space are the same to both libraries' regular expressions."""
    theirs, ours = read(name), tokenizer.load(name)
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 1024):
        text = "".join(f"a{c}b1{c}2 {c}! {c}" for c in map(chr, points[start : start + 1024]))
        assert theirs.encode(text) == ours.encode_ordinary(text), hex(points[start])


# ---------------------------------------------------------------------------------------------------------------------
# what a folder holds


def half(folder: Path, *kept: str) -> None:
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()


def transformers_own(folder: Path, *added: str) -> None:
    theirs = auto(folder)
    half(folder)
    theirs.add_tokens(list(added))
    theirs.save_pretrained(folder)


def edit(file: Path, change) -> None:
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def with_pad(folder: Path) -> None:
    half(folder, "vocab.json", "merges.txt")
    ids = json.loads((folder / "vocab.json").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({END: ids[END], "[PAD]": len(ids)}))


def end_only_added(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda content: content["model"]["vocab"].pop(END))
    half(folder, "tokenizer.json")


def with_crlf(folder: Path) -> None:
    half(folder, "vocab.json", "merges.txt")
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))


def without_version(folder: Path) -> None:
    half(folder, "vocab.json", "merges.txt")
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().removeprefix(b"#version: 0.2\n"))


SAME = {
    "all files": lambda folder: None,
    "tokenizer.json": lambda folder: half(folder, "tokenizer.json"),
    "vocab and merges": lambda folder: half(folder, "vocab.json", "merges.txt"),
    "tokenizer.json and half the others": lambda folder: half(folder, "tokenizer.json", "vocab.json"),
    "transformers' own": transformers_own,
    "transformers' own with more tokens": lambda folder: transformers_own(folder, "[PAD]", "word"),
    "24 more tokens": lambda folder: transformers_own(folder, *(f"<{n}>" for n in range(24))),
    "added_tokens.json": with_pad,
    "end-of-text is only added": end_only_added,
    "merges with CRLF": with_crlf,
    "merges without a version": without_version,
}


@pytest.fixture
def copy(written, tmp_path):
    return lambda name: Path(shutil.copytree(written(name), tmp_path / name))


@pytest.mark.parametrize("how", SAME)
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_recognised(name, how, copy, monkeypatch):
    """And nothing is loaded, maybe over the network, that cannot be it."""
    folder = copy(name)
    SAME[how](folder)
    monkeypatch.setattr(vocabulary, "load", {name: tokenizer.load(name)}.__getitem__)
    assert identify_encoding(folder) == name


@pytest.mark.parametrize(
    ("name", "said"), [("r50k_base", "gpt2"), ("p50k_base", "p50k_base"), ("p50k_edit", "p50k_edit")]
)
def test_relatives_of_gpt2_recognised(name, said, written):
    assert identify_encoding(written(name)) == said


def swap_ids(ids: dict) -> None:
    ids["a"], ids["b"] = ids["b"], ids["a"]


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def swap_lines(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    lines[1], lines[2] = lines[2], lines[1]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def rename(ids: dict) -> None:
    ids["zz"] = ids.pop("a")


def add_to_vocab(ids: dict) -> None:
    ids["more"] = len(ids)


def of_model(change):
    return lambda folder: edit(folder / "tokenizer.json", lambda content: change(content["model"]["vocab"]))


def of_vocab(change):
    return lambda folder: edit(folder / "vocab.json", change)


def all_added(folder: Path) -> None:
    """Every token an added one: these stand for themselves as written, Ġ for a Ġ and no blank."""

    def change(content):
        vocab = content["model"]["vocab"]
        content["added_tokens"] = [{"id": number, "content": token} for token, number in vocab.items()]
        vocab.clear()

    edit(folder / "tokenizer.json", change)


def of_content(change):
    return lambda folder: edit(folder / "tokenizer.json", change)


# name: (what is changed, the file that the message names)
OTHERS = {
    "ids swapped in tokenizer.json": (of_model(swap_ids), "tokenizer.json"),
    "ids swapped in vocab.json": (of_vocab(swap_ids), "vocab.json"),
    "another token in tokenizer.json": (of_model(rename), "tokenizer.json"),
    "another token in vocab.json": (of_vocab(rename), "vocab.json"),
    "one id more in tokenizer.json": (of_model(add_to_vocab), "tokenizer.json"),
    "one id more in vocab.json": (of_vocab(add_to_vocab), "vocab.json"),
    "one id less": (of_model(lambda ids: ids.pop("a")), "tokenizer.json"),
    "an empty vocabulary": (of_model(dict.clear), "tokenizer.json"),
    "every token added": (all_added, "tokenizer.json"),
    "another kind of model": (of_content(lambda content: content["model"].update(type="WordPiece")), "tokenizer.json"),
    "a merge more": (of_content(lambda content: content["model"]["merges"].append("a b")), "tokenizer.json"),
    "an added token in the encoding's place": (
        of_content(lambda content: content["added_tokens"].append({"id": 5, "content": "five"})),
        "tokenizer.json",
    ),
    "too large": (lambda folder: os.truncate(folder / "tokenizer.json", 1 << 26), "tokenizer.json"),
}
OF_MERGES = {
    "merges swapped in tokenizer.json": (of_content(swap_merges), "tokenizer.json"),
    "merges swapped in merges.txt": (swap_lines, "vocab.json"),
}


@pytest.mark.parametrize(
    ("name", "how"), [*(("byte", how) for how in OTHERS), *(("gpt2", how) for how in [*OF_MERGES, *list(OTHERS)[:1]])]
)
def test_another_vocabulary_of_equal_size_is_refused(name, how, copy):
    folder, (change, file) = copy(name), (OTHERS | OF_MERGES)[how]
    change(folder)
    with pytest.raises(UserError) as caught:
        identify_encoding(folder)
    assert str(folder / file) in str(caught.value)
    assert "gpt2" in str(caught.value)


def test_unigram_models_are_refused(tmp_path):
    """SentencePiece's, whose vocabulary is a list."""
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁the", -3.5]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    with pytest.raises(UserError, match=r"tokenizer.json.*vocabulary that flatGPT does not have"):
        identify_encoding(tmp_path)


@pytest.mark.parametrize("file", ["vocab.txt", "spiece.model", "tokenizer.model"])
def test_files_of_other_kinds_are_refused(file, tmp_path):
    (tmp_path / file).write_bytes(b"\0")
    with pytest.raises(UserError, match=file):
        identify_encoding(tmp_path)


@pytest.mark.parametrize(("there", "missing"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_a_vocabulary_is_refused(there, missing, copy):
    folder = copy("byte")
    half(folder, there)
    (folder / missing).mkdir()
    with pytest.raises(UserError, match=rf"{missing} is missing.*{there}"):  # the folder of that name is no file
        identify_encoding(folder)


def test_files_that_disagree_are_refused(written, copy):
    folder = copy("byte")
    shutil.copy(written("gpt2") / "tokenizer.json", folder)
    with pytest.raises(UserError, match=r"disagree.*tokenizer.json is gpt2's, vocab.json is byte's"):
        identify_encoding(folder)


DAMAGED = {
    "cut": b'{"a": 1, "b',
    "empty": b"",
    "no JSON": b"<html>404</html>",
    "no UTF-8": b'{"\xff": 1}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "deep": b"[" * 200_000,
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "true for 1": b'{"a": true}',
    "text for an id": b'{"a": "1"}',
    "no model": b'{"version": "1.0"}',
    "model is text": b'{"model": "BPE"}',
    "model is null": b'{"model": null}',
    "vocab is null": b'{"model": {"type": "BPE", "vocab": null, "merges": []}}',
    "merges of numbers": b'{"model": {"vocab": {"a": 0}, "merges": [[1, 2]]}}',
    "merges are missing": b'{"model": {"vocab": {"a": 0}}}',
    "added is a number": b'{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": 3}',
    "added without an id": b'{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "a"}]}',
    "added is a list": b'{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": [], "id": 1}]}',
}


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "added_tokens.json"])
@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_files_are_named(how, file, copy):
    folder = copy("byte")
    half(folder, "vocab.json", "merges.txt")
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
    os.mkfifo(tmp_path / "vocab.json")  # reading it would wait for ever
    assert identify_encoding(tmp_path) is None


@pytest.mark.parametrize("size", [256, 258, 50_256, 50_258])
def test_nothing_is_loaded_for_a_vocabulary_of_another_size(size, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "load", lambda name: pytest.fail(f"{name} is loaded, which may be a download"))
    (tmp_path / "vocab.json").write_text(json.dumps({str(number): number for number in range(size)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"vocab.json holds a vocabulary that flatGPT does not have"):
        identify_encoding(tmp_path)


def test_needs_no_library_of_theirs():
    heavy = ("torch", "transformers", "tokenizers", "huggingface_hub")
    code = "import sys; from flatgpt.interop import tokenizer_files\n"
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
