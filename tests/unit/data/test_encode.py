"""Documents become the ids that encode_ordinary has for each alone, with every encoder, in any batches and tasks."""

import concurrent.futures
import functools
import hashlib
import itertools
import os
import pickle
import random
import sys

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from flatgpt.data import encode, tokenizer
from flatgpt.data.encode import Job, Task, choose_split, encode_chunks, encode_task, load_encoder
from flatgpt.data.readers import Chunk

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # as OpenAI published it
MARKS = [EOT, EOT[:-1], EOT[1:], "<|", "|>", "endoftext", "<|fim_prefix|>"]
WORDS = ["the", "Naïve", "東京", "e\u0301", "👩‍👩", "\u200b", "\0", "'s", "'ll", "'", "2024", "...", *MARKS]
SPACES = [chr(n) for n in range(0x3001) if chr(n).isspace()]  # with U+001C to 1F, which are none to tiktoken
TEXT = st.lists(st.sampled_from([*WORDS, *(f" {word}" for word in WORDS), *SPACES]) | st.text(max_size=3), max_size=30)
DOCUMENTS = st.lists(TEXT.map("".join).filter(bool), max_size=9)


def small_bpe(name: str, pattern: str) -> tiktoken.Encoding:
    """Bytes, and all that two and four of these characters make: a split in the wrong place changes ids."""
    ranks = {bytes([b]): b for b in range(256)}
    pairs = [a + b for a in " \nabe1.'" for b in " \nabe1.'"]
    for token in [*pairs, *(a + b for a in pairs for b in pairs)]:
        ranks[token.encode()] = len(ranks)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


GIGATOKEN = pytest.param("gigatoken", marks=pytest.mark.extra("gigatoken"))


@functools.cache
def encoding_of(name: str) -> tiktoken.Encoding:
    """`small` is GPT-2's pattern with a few merges, `other` another pattern."""
    if name == "other":
        return small_bpe("other", r"\S+\s+|\S+|\s+")
    return small_bpe("gpt2", GPT2_PATTERN) if name == "small" else tokenizer.load(name)


@pytest.fixture(scope="module", params=["byte", "small", "gpt2", "p50k_base", "other", GIGATOKEN])
def encoder(request):
    """(encoding, encode) of each tokenizer with tiktoken, and of `gpt2` with gigatoken."""
    if request.param != "gigatoken":
        return encoding_of(request.param), load_encoder(encoding_of(request.param))
    return encoding_of("gpt2"), load_encoder(encoding_of("gpt2"), "gigatoken")


def plain(encoding, documents, end_of_text: bool) -> list[int]:
    eot = [encoding.eot_token] * end_of_text
    return [i for text in documents for i in (*encoding.encode_ordinary(text), *eot)]


# ---------------------------------------------------------------------------------------------------------------------
# text -> ids


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, end_of_text=st.booleans(), batch=st.integers(0, 200))
def test_batches_of_documents_have_the_ids_of_each_alone(encoder, documents, end_of_text, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARS", batch)
        found = encode_chunks(*encoder, map(Chunk, documents), end_of_text)
    assert found.ids.dtype == np.dtype("<u2")
    assert found.ids.tolist() == plain(encoder[0], documents, end_of_text)
    assert (found.documents, found.bytes) == (len(documents), sum(len(text.encode()) for text in documents))


@pytest.mark.parametrize("end_of_text", [False, True])
@pytest.mark.parametrize(
    "text", ["it's we're I'll", "'reab'veel ", "a  b\n\nc ", "x1 22", "東京 é\u2003\u3000🎈", "''s 's", EOT + "'t"]
)
def test_documents_do_not_run_into_each_other(encoder, text, end_of_text):
    """A text that is split everywhere: each part is encoded as if it were alone."""
    for first in range(1, len(text) - 1):
        documents = [text[:first], text[first : first + 1], text[first + 1 :]]
        found = encode_chunks(*encoder, map(Chunk, documents), end_of_text)
        assert found.ids.tolist() == plain(encoder[0], documents, end_of_text), documents


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(8, 60))
def test_long_documents_are_split_where_no_id_changes(encoder, documents, length):
    """Chunks of one document have no end-of-text between them; forced splits are counted."""
    chunks, forced = [], 0
    for text in documents:
        parts = list(tokenizer.split_text([text], 4 * length))
        chunks += [Chunk(part, int(part is parts[-1][0]), cut) for part, cut in parts]
        forced += sum(cut for _, cut in tokenizer.split_text([text], length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "MAX_ENCODE_CHARS", length)
        found = encode_chunks(*encoder, chunks, True)
    encoding = encoder[0]
    assert found.documents == len(documents)
    if encoding.name != "other":
        assert found.forced_splits == (0 if encoding.name == "byte" else forced)
        if not found.forced_splits:
            assert found.ids.tolist() == plain(encoding, documents, True)
    stops = np.flatnonzero(found.ids == encoding.eot_token)
    assert [encoding.decode(part[:-1].tolist()) for part in np.split(found.ids, stops + 1)[:-1]] == documents


def test_pattern_other_than_gpt2s_is_never_split(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 8)
    other, text = encoding_of("other"), "ab ab\nab " * 10 + EOT + "a" * 50
    found = encode_chunks(other, load_encoder(other), [Chunk(text), Chunk("a")], True)
    assert (found.ids.tolist(), found.forced_splits) == (plain(other, [text, "a"], True), 0)


@pytest.mark.parametrize(
    ("run", "forced"),
    [("x" * 3_000_000, 3), (" " * 1_000_000 + "a", 1), (" " * 999_999 + "a", 1), ("\n" * 999_990 + "a", 0)],
    ids=["letters", "blanks", "fewer blanks", "newlines"],
)
def test_long_run_is_split_and_comes_back(run, forced):
    """tiktoken alone takes such a run as one match, and overflows its stack on a million blanks before a word."""
    encoding = tokenizer.load("gpt2")
    text = f"It's far: {run}\nthe end"
    found = encode_chunks(encoding, load_encoder(encoding), [Chunk(text)], False)
    assert found.forced_splits == forced
    assert encoding.decode(found.ids.tolist()) == text


@pytest.mark.parametrize("name", ["tiktoken", GIGATOKEN])
def test_real_text(gpt2_vocabulary, real_text, name):
    text = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    encoding = tokenizer.load("gpt2")
    documents = [text, *text.splitlines(keepends=True)[:5000]]
    found = encode_chunks(encoding, load_encoder(encoding, name), map(Chunk, documents), True)
    assert len(text) > tokenizer.MAX_ENCODE_CHARS
    assert (found.ids.tolist(), found.forced_splits) == (plain(encoding, documents, True), 0)


# ---------------------------------------------------------------------------------------------------------------------
# gigatoken


@pytest.mark.extra("gigatoken")
def test_gigatoken_has_the_ids_of_every_character(gpt2_vocabulary):
    """Those that it knows as letters and tiktoken does not are encoded by tiktoken."""
    encoding = tokenizer.load("gpt2")
    giga, plain = load_encoder(encoding, "gigatoken"), load_encoder(encoding)
    points = [*range(0x3100), *range(0x3100, 0xD800, 13), *range(0xE000, 0x110000, 29)]
    texts = [f"a{c}a1{c}1!{c}! {c}\n{c}'s" for c in map(chr, points)]
    for first in range(0, len(texts), 999):
        batch = texts[first : first + 999]
        ends = [True] * len(batch)
        assert giga(batch, ends).tolist() == plain(batch, ends).tolist(), hex(points[first])


@pytest.mark.extra("gigatoken")
def test_gigatoken_is_built_anew_before_its_cache_is_large(monkeypatch):
    encode._gigatoken_encoder.cache_clear()
    giga = load_encoder(encoding_of("gpt2"), "gigatoken")
    built = []
    for n in range(4):
        monkeypatch.setattr(encode, "REBUILD_CHARS", 50 if n > 1 else 10**9)
        assert giga([f"word{n} " * 20], [True]).tolist() == plain(encoding_of("gpt2"), [f"word{n} " * 20], True)
        built.append(giga._tokenizer)
    assert [later is not earlier for earlier, later in itertools.pairwise(built)] == [False, True, True]


class WrongTokenizer:
    """Stands in for gigatoken.Tokenizer: no text has an id."""

    @classmethod
    def from_tiktoken(cls, path, pretokenizer, special_tokens):
        return cls()

    def encode_batch(self, texts, parallel):
        rows = type("Rows", (), {})()
        rows.layout = type("Layout", (), {})()
        rows.layout.content = type("Content", (), {"data": np.zeros(0, np.uint32)})
        rows.layout.offsets = type("Offsets", (), {"data": np.zeros(len(texts) + 1, np.int64)})
        return rows


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("gpt2", None, "--encoder gigatoken needs gigatoken: pip install -r requirements-extra.txt (gigatoken)"),
        ("gpt2", WrongTokenizer, "gigatoken's ids of tokenizer gpt2 are not tiktoken's: take --encoder tiktoken"),
        ("byte", WrongTokenizer, "--encoder gigatoken: not for tokenizer byte, only for gpt2, r50k_base, p50k_base"),
        ("other", WrongTokenizer, "--encoder gigatoken: not for tokenizer other"),
    ],
)
def test_gigatoken_that_cannot_be_used_is_one_error(monkeypatch, name, module, message):
    stand_in = module and type(sys)("gigatoken")
    if module:
        stand_in.Tokenizer = module
    monkeypatch.setitem(sys.modules, "gigatoken", stand_in)
    encode._gigatoken_encoder.cache_clear()
    with pytest.raises(UserError) as caught:
        load_encoder(encoding_of(name), "gigatoken")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.extra("gigatoken")
def test_gigatoken_names_an_encoding_whose_ids_have_gaps():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 300}
    gaps = tiktoken.Encoding("p50k_base", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 256})
    with pytest.raises(UserError, match=r"gigatoken cannot take tokenizer p50k_base \(.*\): take --encoder tiktoken"):
        load_encoder(gaps, "gigatoken")


@pytest.mark.parametrize("name", ["tiktoken", GIGATOKEN])
def test_threads_of_one_process_do_not_mix_their_ids(name):
    """A Dask worker does as many tasks at once as it has threads."""
    encoding, chance = encoding_of("gpt2"), random.Random(0)
    documents = ["".join(chance.choices("abcdefg ", k=20_000)) for _ in range(20)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: load_encoder(encoding, name)([text], [False]).tolist(), documents))
    assert found == [encoding.encode_ordinary(text) for text in documents]


# ---------------------------------------------------------------------------------------------------------------------
# tasks


def read() -> list[str]:
    return [f"document {n}" for n in range(200)]


JOB = Job("byte", "tiktoken", True, None, ("train", "val", "test"), 0.25, 0.15)


@pytest.mark.parametrize("outputs", [("train", "val", "test"), ("val",), ("test", "train")])
def test_task_gives_each_split_its_documents(outputs):
    """Read by the worker or sent to it: the hash decides, or the chunk; and a pass over one split takes all."""
    job = Job(**{**vars(JOB), "outputs": outputs})
    expected = {split: [] for split in outputs}
    for text in read():
        expected.get(choose_split([text], 0.25, 0.15), []).append(text)
    for task in (Task(0, read=read), Task(0, tuple(map(Chunk, read())))):
        found = encode_task(*pickle.loads(pickle.dumps((job, task))))
        assert {split: part.ids.tolist() for split, part in found.items()} == {
            split: plain(encoding_of("byte"), texts, True) for split, texts in expected.items()
        }
        assert [part.documents for part in found.values()] == [len(texts) for texts in expected.values()]
    decided = encode_task(job, Task(0, tuple(Chunk(text, split=outputs[0]) for text in read())))
    whole = encode_task(Job(**{**vars(job), "split": outputs[0]}), Task(0, read=read))
    for found in (decided, whole):
        assert [part.documents for part in found.values()] == [200] + [0] * (len(outputs) - 1)


def test_vocabulary_folder_of_a_worker_takes_precedence_over_the_jobs(monkeypatch):
    task = Task(0, (Chunk("a"),))
    for own, job, expected in (("own", "job", "own"), (None, None, None), (None, "job", "job")):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", own) if own else monkeypatch.delenv("TIKTOKEN_CACHE_DIR", False)
        encode_task(Job(**{**vars(JOB), "vocabulary": job}), task)
        assert os.environ.get("TIKTOKEN_CACHE_DIR") == expected


def test_choice_of_a_split_never_changes():
    """Pinned: a dataset that is made again has the same splits."""
    chosen = [choose_split([f"document {n}"], 0.2, 0.1) for n in range(60)]
    letters = {"train": "r", "val": "a", "test": "e"}
    assert "".join(letters[split] for split in chosen) == "rrerrrrerararrraaerearrrrrrrerrrrrraarearrrrrrrrrrrrararrrar"
    odd = [choose_split([text], 0.3, 0.3) for text in ("", "\n", "naïve 🎈", "東京", "a", "b")]
    assert odd == ["test", "val", "val", "val", "val", "train"]


@settings(max_examples=60)
@given(st.lists(st.text()), st.floats(0, 0.5), st.floats(0, 0.5))
def test_choice_is_a_keyed_hash_of_the_text(chunks, val, test):
    digest = hashlib.blake2b("".join(chunks).encode(), digest_size=8, key=b"flatgpt split").digest()
    position = int(digest.hex(), 16) / 2**64
    assert choose_split(chunks, val, test) == (
        "test" if position < test else "val" if position < test + val else "train"
    )


@pytest.mark.parametrize(("val", "test"), [(0.1, 0), (0.1, 0.05), (0.5, 0.25), (0.0005, 0)])
def test_shares_are_near_the_fractions(val, test):
    """Within four standard deviations; and a split that is made larger keeps all that it had."""
    texts = [f"a text, {n}" for n in range(20_000)]
    chosen = [choose_split([text], val, test) for text in texts]
    for split, share in (("val", val), ("test", test)):
        assert abs(chosen.count(split) - 20_000 * share) <= 4 * (20_000 * share * (1 - share)) ** 0.5
    more = [choose_split([text], 1.5 * val, test) for text in texts]
    assert all(now == before for now, before in zip(more, chosen, strict=True) if before != "train")
