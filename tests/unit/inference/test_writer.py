"""Text of writer.py against Python's own UTF-8 and a slow search for stop strings."""

import codecs
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vocabularies import HINDI, THAI, bpe, characters

from flatgpt.data import tokenizer
from flatgpt.inference.writer import Text


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_characters_come_whole_and_at_once(name):
    """At most the first bytes of a character wait; GPT-2's tokens cut characters too."""
    encoding, whole, fed = tokenizer.load(name), "Naïve café, 東京 and 中文 🎈👩‍🚀!", b""
    text = Text(encoding)
    for token in encoding.encode_ordinary(whole):
        text.append(token)
        fed += encoding.decode_single_token_bytes(token)
        assert whole.startswith(text.written)
        assert len(text.written.encode()) > len(fed) - 4
    assert text.written == whole


class Pieces(list):
    """An encoding whose ids 0, 1, 2 and so on are the pieces of some bytes, cut at random."""

    def __init__(self, data: bytes, seed: int):
        rng = random.Random(seed)
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(len(data) + 1)))
        super().__init__(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))

    decode_single_token_bytes = list.__getitem__

    def encode_ordinary(self, prompt: str) -> list:
        return []


def until_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first (the longest of these), and whether there is one."""
    for end in range(1, len(text) + 1):
        if found := [len(s) for s in stop if text[:end].endswith(s)]:
            return text[: end - max(found)], True
    return text, False


def final(text: str, stop: list[str]) -> str:
    """The part of a text without stop strings that no continuation can change."""
    return text[: min((len(text) - n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=len(text))]


@settings(max_examples=100)
@given(
    st.text(st.sampled_from("aaabb東🎈"), max_size=25).map(str.encode)
    | st.lists(st.sampled_from([*b"aab", *"東".encode(), 0xFF, 0xC0, 0xED]), max_size=25).map(bytes),
    st.lists(st.text(st.sampled_from("aaab東\ufffd"), min_size=1, max_size=5), max_size=3),
    st.integers(0, 2**32),
)
@example(b"aabaabaaab", ["aabaaa", "baab"], 0)
@example("abab🎈".encode(), ["b", "ab"], 0)
@example(b"ab\xe6\x9d", ["b\ufffd"], 0)  # complete at the text's very end, and not before
@example(b"aab", ["aabb", "ab🎈"], 0)
def test_stop_strings_end_the_text_however_it_is_cut(data, stop, seed):
    """Never a part of a stop string, nothing twice; what was held back comes when the text ends without one."""
    pieces, decoder = Pieces(data, seed), codecs.getincrementaldecoder("utf-8")("replace")
    text, decoded = Text(pieces, stop=stop), ""
    for token, piece in enumerate(pieces):
        decoded += decoder.decode(piece)
        text.append(token)
        so_far, stopped = until_stop(decoded, stop)
        assert text.written == (so_far if stopped else final(decoded, stop))
        assert text.ended == ("stop" if stopped else None)
        if stopped:
            break
    text.end("length")
    expected, stopped = until_stop(data.decode("utf-8", "replace"), stop)
    assert (text.written, text.ended) == (expected, "stop" if stopped else "length")


@pytest.mark.parametrize("text", [HINDI, THAI, "🎈👩‍🚀 e\u0301 한국어\n"])
def test_no_part_of_a_character_is_shown_in_any_script(text, in_tmp):
    """The tokens of a small vocabulary hold parts of characters and parts of two characters."""
    encoding, written = bpe(size=300), []
    streamed = Text(encoding)
    for token in encoding.encode_ordinary(text):
        streamed.append(token)
        assert text.startswith(streamed.written)
        written.append(streamed.written)
    assert len({*written}) < len(written)  # some tokens completed no character
    assert streamed.written == text


@pytest.mark.parametrize(
    ("letters", "end_of_text", "expected"), [("ab\n", True, "\n"), ("ab\n", False, "\n"), ("ba", True, "a")]
)
def test_start_of_a_text_of_characters(letters, end_of_text, expected):
    """They have no end-of-text: a newline, else the first character."""
    encoding = characters(letters)
    assert encoding.decode(tokenizer.start_ids(encoding, end_of_text)) == expected
