"""Token ids -> text that can be printed while more ids come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

import tiktoken


class TextStream:
    """Decodes the ids of one text into characters, each as soon as no later id can change it.

    Bytes wait until their character is complete. Bytes that are not UTF-8 become U+FFFD, as in tiktoken's decode.
    Characters that may begin a stop string wait until that is decided.

    Args:
        stop: strings that end the text; neither they nor what follows them is returned.
    """

    def __init__(self, encoding: tiktoken.Encoding, stop: Sequence[str] = ()):
        self.stopped = False
        self._encoding, self._stop, self._pending = encoding, stop, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Add an id; return the characters that are final now, none after a stop string."""
        return self._release(self._decoder.decode(self._encoding.decode_single_token_bytes(token)))

    def end(self) -> str:
        """Return what was waiting for more ids."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._pending
        self._pending = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        self._pending += text
        found = [(start + len(stop), start) for stop in self._stop if (start := self._pending.find(stop)) >= 0]
        if found:  # the stop string that was complete first
            text, self._pending, self.stopped = self._pending[: min(found)[1]], "", True
            return text
        starts = range(max(0, len(self._pending) - max(map(len, self._stop), default=0)), len(self._pending))
        candidates = (n for n in starts if any(stop.startswith(self._pending[n:]) for stop in self._stop))
        split = next(candidates, len(self._pending))  # where a stop string may have begun
        text, self._pending = self._pending[:split], self._pending[split:]
        return text


def stream_text(ids: Iterable[int], encoding: tiktoken.Encoding, stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text of ids while they come, in whole characters; end at a stop string."""
    stream = TextStream(encoding, stop)
    for token in ids:
        if text := stream.feed(token):
            yield text
        if stream.stopped:
            return
    if text := stream.end():
        yield text
