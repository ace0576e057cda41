"""Exported tokenizer files: transformers reads them and gives tiktoken's ids; GPT-2's are OpenAI's."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import TEXT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flatgpt.data import tokenizer
from flatgpt.data.tokenizer_files import END_OF_TEXT, tokenizer_files

pytestmark = pytest.mark.slow

NAMES = ("byte", "gpt2", "r50k_base", "p50k_base", "p50k_edit")
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # tiktoken's cache has these files
TEXTS = (
    TEXT[:500],
    "👩‍👩‍👧‍👦 🏳️‍🌈👍🏽 🇫🇷x🎈 e\u0301 \u0301 क्षि Z\u0335\u0321",
    "東京 人工智能,你好 Привет мир שלום ‏مرحبا नमस्ते สวัสดี 안녕 ქართული",
    "\0a\0\0 \x01\x1b[0m\x7f\x80\x85\x9f \x1c\x1d\x1e\x1f \v\f \ue000\uffff\U0010ffff",
    "one\r\ntwo\rthree\n\n\n\tfour\t\tfive \t six\n ",
    "a" + " " * 2 + "b" + " " * 24 + "d" + " " * 25 + "e" + " " * 26 + "f" + " " * 99,
    "a\xa0b \xa0 c\u2003\u2009d\u3000e\u2028f\u2029g\u200bh\u202fi\ufeffj\u1680k\u180el \u2003",
    "it's it’s I'll I’ll we've they'd you're I'm don't DON'T I'LL 's' ''s ' s ’s 'süd 'll've",
    "1234567890 3.14 ١٢٣ ४५६ ⅷ ½ ² 𝟘𝟙 1a2b 一二三" + "x" * 3000 + "=" * 3000,
    "Ġthe Ċ Ġ ĉ ÃĤ <|endoftext <|end|> |endoftext|> [PAD]",  # what the files write for bytes is text like any other
)


def save(folder: Path, files: dict[str, bytes]) -> Path:
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def auto(folder: Path):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def vocab_and_merges(folder: Path):
    """What a reader without the tokenizers library reads."""
    copy = folder.with_name(f"{folder.name}_slow")
    return auto(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("tokenizer.json"), dirs_exist_ok=True))


def tokenizer_json(folder: Path):
    """tokenizer.json alone, as servers read it: its pattern and decoder count."""
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


READERS = {"auto": auto, "vocab and merges": vocab_and_merges, "tokenizer.json": tokenizer_json}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """read(name, reader): an encoding's files as transformers reads them, written and read once."""

    @functools.cache
    def write(name: str) -> Path:
        return save(tmp_path_factory.mktemp(name), tokenizer_files(tokenizer.load(name), 1024))

    return functools.cache(lambda name, reader="auto": READERS[reader](write(name)))


@pytest.mark.usefixtures("gpt2_vocabulary")
def test_files_of_gpt2_are_openais():
    files = tokenizer_files(tokenizer.load("gpt2"), 1024)
    assert files["merges.txt"] == tiktoken.load.read_file_cached(f"{OPENAI}/vocab.bpe")
    ids = json.loads(files["vocab.json"])
    assert ids == json.loads(tiktoken.load.read_file_cached(f"{OPENAI}/encoder.json"))
    model = json.loads(files["tokenizer.json"])["model"]
    assert (model["vocab"], len(model["merges"])) == (ids, 50_000)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_tiktokens_and_text_comes_back(name, reader, read):
    reference, encoding = read(name, reader), tokenizer.load(name)
    assert len(reference) == encoding.n_vocab
    if reader != "tokenizer.json":
        assert type(reference).__name__ == "GPT2Tokenizer"
        assert reference.bos_token_id == reference.eos_token_id == reference.unk_token_id == encoding.eot_token
        assert (reference.pad_token, reference.model_max_length) == (None, 1024)
        assert reference.clean_up_tokenization_spaces is False
    for text in TEXTS:
        ids = reference.encode(text)
        assert ids == encoding.encode_ordinary(text)
        assert reference.decode(ids) == text
    for text in (
        END_OF_TEXT * 2,
        f" {END_OF_TEXT}\n{END_OF_TEXT} ",
        "the <|fim_prefix|>x<|fim_suffix|> y<|fim_middle|>",
    ):
        assert reference.encode(text) == encoding.encode(text, allowed_special="all")
        assert reference.decode(reference.encode(text)) == text
    assert reference.decode(reference.encode(f"a{END_OF_TEXT} b"), skip_special_tokens=True) == "a b"


@pytest.mark.parametrize("reader", READERS)
def test_a_vocabulary_with_holes(reader, tmp_path):
    """GPT-2's pattern, tokens that several pairs could make, end-of-text in the middle."""
    tokens = [b"aa", b"aaa", b"ab", b"aab", b"bc", b"abc", b" a", b" aaa", b"  ", b"   ", b"\n\n", b"\xc3\xa9", b"aaaa"]
    ranks = {bytes([255 - n]): n for n in range(256)} | {token: 260 + 2 * n for n, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "p50k_base", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 263}
    )
    reference = READERS[reader](save(tmp_path, tokenizer_files(encoding, 64)))
    holes = {256, 257, 258, 259, 261, *range(265, encoding.n_vocab, 2)}
    assert {n for n in range(encoding.n_vocab) if reference.convert_ids_to_tokens(n) is None} == holes

    @settings(max_examples=100)
    @given(st.one_of(st.text("abc \né"), st.text(st.characters(exclude_categories=["Cs"]))))
    def check(text):
        ids = reference.encode(text + END_OF_TEXT)
        assert ids == encoding.encode(text + END_OF_TEXT, allowed_special="all")
        assert reference.decode(ids) == text + END_OF_TEXT

    check()


@pytest.mark.slow
def test_every_code_point(read):
    """Letters, digits and white space are the same to both libraries' regular expressions."""
    reference, encoding = read("gpt2"), tokenizer.load("gpt2")
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 1024):
        text = "".join(f"a{c}b1{c}2 {c}! {c}" for c in map(chr, points[start : start + 1024]))
        assert reference.encode(text) == encoding.encode_ordinary(text), hex(points[start])
