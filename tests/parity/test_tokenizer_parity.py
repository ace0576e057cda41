"""Byte-level BPEs of the tokenizers library: the encoding read from their files gives the same ids and texts."""

import functools
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import first_fast
from scripts import PRE_TOKENIZERS, SCRIPTS, read_text, train, trained, without_content
from test_tokenizer_files_parity import TEXTS
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from flatgpt.data import tokenizer, tokenizer_reader
from flatgpt.data.tokenizer_files import tokenizer_files, tokenizer_json

pytestmark = pytest.mark.slow

NAMES = "".join(f"{unicodedata.name(chr(n), '')} {chr(n)}\n" for n in range(0xA0, 0x3000) if chr(n).isprintable())
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def write(folder, encoding):
    folder.mkdir()
    for file, content in tokenizer_files(encoding, 1024).items():
        (folder / file).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """read(how): the encoding, the Tokenizer, and AutoTokenizers of the exported files: as they came, and written."""

    @functools.cache
    def read(how: str):
        folder = tmp_path_factory.mktemp("read")
        encoding = read_text(folder, trained(how))
        written = (write(folder / name, e) for name, e in (("came", encoding), ("new", without_content(encoding))))
        return encoding, Tokenizer.from_str(trained(how)), *written

    return read


def check(encoding, reference, *exported, text: str):
    ids = encoding.encode_ordinary(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert encoding.decode(ids) == text
    assert encoding.encode_to_numpy(text).tolist() == ids
    for auto in exported:
        assert auto.encode(text, add_special_tokens=False) == ids
        assert auto.decode(ids) == text


@pytest.mark.parametrize("how", first_fast(PRE_TOKENIZERS))
def test_ids_on_real_text(how, read):
    for text in (*SCRIPTS.values(), *TEXTS, NAMES):
        check(*read(how), text=text.replace("<|endoftext|>", ""))


@pytest.mark.parametrize("how", PRE_TOKENIZERS)
def test_hash_is_the_same_for_a_file_that_was_written_anew(how, read, tmp_path):
    encoding, *_ = read(how)
    written = read_text(tmp_path, tokenizer_json(without_content(encoding)).decode())
    assert tokenizer.ranks_hash(written) == tokenizer.ranks_hash(encoding)


@pytest.mark.parametrize("how", PRE_TOKENIZERS)
def test_ids_on_random_unicode(how, read):
    pieces = st.sampled_from(
        [*"".join(SCRIPTS.values()).split(), *" \n\t'1", "  ", "\r\n", "12345", "'S", "\u0301", "…"]
    )

    @settings(max_examples=50)
    @given(st.one_of(UNICODE, st.lists(pieces).map("".join)))
    def check_one(text):
        check(*read(how), text=text)

    check_one()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["marks", "GPT-2"])
@pytest.mark.parametrize(
    "text",
    [
        " ".join(SCRIPTS.values()).replace("\n", " ") * 600,
        "क्षि" * 250_000,
        "a" * 1_000_000,
        " " * (tokenizer.MAX_ENCODE_CHARS - 1) + "a",
    ],
    ids=["all scripts", "one word", "one letter", "blanks"],
)
def test_line_of_a_million_characters(how, text, read):
    encoding, reference, *_ = read(how)
    check(encoding, reference, text=text[:1_000_000])


@pytest.mark.slow
@pytest.mark.parametrize("how", PRE_TOKENIZERS)
def test_every_code_point(how, read):
    """Letters, marks, digits and white space are the same to the regular expressions of both libraries."""
    encoding, reference, *_ = read(how)
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4096):
        text = "".join(f"a{c}b1{c}2 {c}! {c}" for c in map(chr, points[start : start + 4096]))
        ids = encoding.encode_ordinary(text)
        assert ids == reference.encode(text).ids, hex(points[start])
        assert encoding.decode(ids) == text


def test_every_byte_string_comes_back(read):
    encoding, *_ = read("marks")

    @given(st.binary())
    def check_one(data):
        assert encoding.decode_bytes([encoding.encode_single_token(bytes([byte])) for byte in data]) == data
        text = data.decode(errors="replace")
        assert encoding.decode_bytes(encoding.encode_ordinary(text)) == text.encode()

    check_one()


def test_single_token_of_several_characters_comes_back(read):
    encoding, reference, *_ = read("marks")
    for n in range(encoding.n_vocab):
        token = encoding.decode_single_token_bytes(n)
        assert encoding.encode_single_token(token) == n
        assert reference.decode([n], skip_special_tokens=False) == token.decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# added tokens

ADDED = {
    "overlapping": [
        AddedToken("<|a|>", special=True),
        AddedToken("<|a|>b", special=True),
        AddedToken("a|>", special=True),
    ],
    "white space": [
        AddedToken("<l>", lstrip=True, special=True),
        AddedToken("<r>", rstrip=True, special=True),
        AddedToken("<b>", lstrip=True, rstrip=True, special=True),
        AddedToken(" <w", special=True),
    ],
    "words": [AddedToken("a", single_word=True), AddedToken("aa", normalized=False), AddedToken("1", single_word=True)],
    "not special": [
        AddedToken("a<", normalized=True),
        AddedToken("<|a|>", special=True),
        AddedToken("b", normalized=True),
    ],
    "blanks": [AddedToken(" " * n, normalized=True) for n in range(2, 5)] + [AddedToken("<l>", lstrip=True)],
    "in another script": [AddedToken("<|उपयोगकर्ता|>", special=True), AddedToken("가")],
    "merged from others": [AddedToken("and", special=True), AddedToken("!", special=True)],
}
PARTS = [*" \n\tabé1_½ि!가", "  ", "\x1c", "\u3000", "\u200d", "Ⓐ", "<", "|>", "aa", "and", "in dignity "]


@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_are_found_as_by_autotokenizer(kind, tmp_path):
    """With the flags of tokenizer.json, and from an export that did not keep the file."""
    reference = Tokenizer.from_str(trained())
    reference.add_tokens(ADDED[kind])
    encoding = read_text(tmp_path / "read", reference.to_str())
    came = write(tmp_path / "came", encoding)
    new = write(tmp_path / "new", without_content(encoding))
    again = tokenizer.load("new", tmp_path / "new", encoding.eot_token)
    assert tokenizer.ranks_hash(again) == tokenizer.ranks_hash(encoding)
    assert {token.content for token in ADDED[kind]} < encoding.special_tokens_set

    @settings(max_examples=200)
    @given(st.lists(st.sampled_from([*PARTS, *(token.content for token in ADDED[kind])]), max_size=12).map("".join))
    def check_one(text):
        ids = tokenizer.encode_special(encoding, text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        for auto in (came, new):
            assert auto.encode(text, add_special_tokens=False) == ids
            assert auto.decode(ids) == encoding.decode(ids)
        found = tokenizer.find_special(encoding, text)
        assert found in text if found else encoding.encode_ordinary(text) == ids

    check_one()
    for token in ADDED[kind]:
        assert came.convert_tokens_to_ids(token.content) == encoding._special_tokens[token.content]


@pytest.mark.slow
def test_every_character_beside_a_single_word(tmp_path):
    """Newer letters than Python's unicodedata knows are not compared."""
    reference = Tokenizer.from_str(trained())
    reference.add_tokens([AddedToken("x", single_word=True)])
    encoding = read_text(tmp_path, reference.to_str())
    characters = (chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000)
    characters = [char for char in characters if unicodedata.category(char) != "Cn"]
    for start in range(0, len(characters), 4096):
        text = "".join(f"\n{char}x\nx{char}" for char in characters[start : start + 4096])
        assert tokenizer.encode_special(encoding, text) == reference.encode(text).ids, characters[start]


def test_chat(tmp_path):
    """<|user|> and <|assistant|>, added to GPT-2's vocabulary by transformers."""
    plain = write(tmp_path / "plain", tokenizer.load("gpt2"))
    plain.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    plain.save_pretrained(tmp_path / "chat")
    encoding = tokenizer_reader.read(tmp_path / "chat")
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("chat", 50_259, 50_256)
    text = "<|user|>hi there<|assistant|>hello, how are you<|user|>fine<|endoftext|>"
    ids = tokenizer.encode_special(encoding, text)
    assert ids == plain.encode(text)
    assert [n for n in ids if n >= 50_256] == [50_257, 50_258, 50_257, 50_256]
    assert tokenizer.find_special(encoding, text) == "<|user|>"
    assert encoding.encode_ordinary(text) == tokenizer.load("gpt2").encode_ordinary(text)
    assert write(tmp_path / "exported", encoding).encode(text) == ids
    came, exported = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("chat", "exported"))
    assert came == exported


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies as they are trained


def test_merges_of_small_vocabularies_are_read(tmp_path):
    """Few letters and long words make many overlapping pairs."""
    for seed in range(60):
        chance = random.Random(seed)
        letters = "abcé"[: chance.randint(1, 4)]
        words = ["".join(chance.choices(letters, k=chance.randint(1, 40))) for _ in range(chance.randint(1, 40))]
        reference = train([" ".join(words)], chance.choice(["marks", "GPT-2"]), chance.randint(258, 600))
        encoding = read_text(tmp_path, reference.to_str())
        for _ in range(5):
            text = " ".join("".join(chance.choices(letters, k=chance.randint(1, 60))) for _ in range(5))
            assert encoding.encode_ordinary(text) == reference.encode(text).ids


@pytest.mark.parametrize("special", [(), ("<s>", "<pad>", "</s>", "<unk>", "<mask>")])
def test_special_tokens_may_have_the_first_ids(special, tmp_path):
    reference = train(SCRIPTS.values(), size=600, special=special)
    encoding = read_text(tmp_path, reference.to_str())
    assert encoding.n_vocab == 600
    assert encoding.eot_token == (2 if special else None)
    assert [encoding.decode([n]) for n in range(len(special))] == list(special)
    check(encoding, reference, text=SCRIPTS["Greek"])
    assert tokenizer.encode_special(encoding, "<s>a</s>") == reference.encode("<s>a</s>").ids
