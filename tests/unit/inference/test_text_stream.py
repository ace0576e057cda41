"""text_stream.py against Python's own UTF-8 and a slow search for stop strings."""

import codecs
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flatgpt.data import tokenizer
from flatgpt.inference.text_stream import TextStream, stream_text

BYTE = tokenizer.load("byte")
TEXT = "Naïve café, 東京 and 中文 🎈👩‍🚀!"


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_characters_come_whole_and_at_once(name):
    """At most the first bytes of a character wait; GPT-2's tokens cut characters too."""
    encoding, fed, received = tokenizer.load(name), b"", ""
    assert len(encoding.encode_ordinary("🎈")) > 1

    def feed():
        nonlocal fed
        for i in encoding.encode_ordinary(TEXT):
            fed += encoding.decode_single_token_bytes(i)
            yield i

    for piece in stream_text(feed(), encoding):
        received += piece
        assert TEXT.startswith(received)
        assert len(received.encode()) > len(fed) - 4
    assert received == TEXT
    for stop in ("中文", "🎈", "\u200d", "京 a"):
        assert "".join(stream_text(encoding.encode_ordinary(TEXT), encoding, [stop])) == TEXT[: TEXT.index(stop)]


@given(st.binary(max_size=12) | st.lists(st.sampled_from([*"a東🎈".encode(), 0xFF, 0xC0, 0xED])).map(bytes))
def test_bytes_that_are_not_utf8_become_replacement_characters(data):
    assert "".join(stream_text(iter(data), BYTE)) == data.decode("utf-8", "replace") == BYTE.decode(list(data))


class Pieces(list):
    """An encoding whose ids 0, 1, 2 and so on are the pieces of some bytes, cut at random."""

    def __init__(self, data: bytes, seed: int):
        rng = random.Random(seed)
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(len(data) + 1)))
        super().__init__(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))

    decode_single_token_bytes = list.__getitem__


def until_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first (the longest of these), and whether there is one."""
    for end in range(1, len(text) + 1):
        if found := [len(s) for s in stop if text[:end].endswith(s)]:
            return text[: end - max(found)], True
    return text, False


def final(text: str, stop: list[str]) -> str:
    """The part of a text without stop strings that no continuation can change."""
    return text[: min((len(text) - n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=len(text))]


@settings(max_examples=300)
@given(
    st.text(st.sampled_from("aaabb東🎈"), max_size=25).map(str.encode)
    | st.lists(st.sampled_from([*b"aab", *"東".encode(), 0xFF]), max_size=25).map(bytes),
    st.lists(st.text(st.sampled_from("aaab東\ufffd"), min_size=1, max_size=5), max_size=3),
    st.integers(0, 2**32),
)
@example(b"aabaabaaab", ["aabaaa", "baab"], 0)
@example("abab🎈".encode(), ["b", "ab"], 0)
@example(b"ab\xe6\x9d", ["b\ufffd"], 0)  # complete at the text's very end, and not before
@example(b"aab", ["aabb", "ab🎈"], 0)
def test_stop_strings_end_the_text_however_it_is_cut(data, stop, seed):
    """Never a part of a stop string, nothing twice; what was held back comes when the text ends without one."""
    expected, stops = until_stop(data.decode("utf-8", "replace"), stop)
    pieces = Pieces(data, seed)
    assert "".join(stream_text(range(len(pieces)), pieces, stop)) == expected
    stream, decoder = TextStream(pieces, tuple(stop)), codecs.getincrementaldecoder("utf-8")("replace")
    text = received = ""
    for token, piece in enumerate(pieces):
        text += decoder.decode(piece)
        received += stream.feed(token)
        so_far, stopped = until_stop(text, stop)
        assert stream.stopped is stopped
        assert received == (so_far if stopped else final(text, stop))
    assert received + stream.end() == expected
    assert stream.stopped is stops
    assert stream.end() == ""


def test_nothing_is_read_after_a_stop_string():
    """The ids could come from a slow model."""
    ids = iter(b"one, two, three")
    assert list(stream_text(ids, BYTE, [", t", "e, t"])) == ["o", "n"]
    assert bytes(ids) == b"wo, three"
