"""The windows in which a text is scored, as numpy arrays; never imports torch.

window   windows do not overlap; every token but the first is scored once
stride   windows begin `stride` tokens apart; each scores its last tokens, those that no earlier window has scored
rolling  as window, with one id in front of the text, so that the first token is scored too; the last window has full
         length and scores the remaining tokens (lm-evaluation-harness's loglikelihood_rolling)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flatgpt.data.shards import Tokens

IGNORE = -1  # a target that is not scored


class Prefixed:
    """Tokens with one id in front of them."""

    def __init__(self, tokens: Tokens, first: int):
        self.tokens, self.first = tokens, first

    def __len__(self) -> int:
        return 1 + len(self.tokens)

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        ids = self.tokens[max(0, start - 1) : max(0, stop - 1)]
        return ids if start else np.concatenate([np.array([self.first][: stop - start], ids.dtype), ids])


@dataclass(frozen=True)
class Protocol:
    """Windows over a text of `length` ids, in which input i has target i + 1.

    Args:
        length: number of ids; for rolling with the one in front.
        T: inputs of a window.
        stride: distance between the first inputs of two windows.
        full: whether the last window begins early enough to have T inputs.
    """

    length: int
    T: int
    stride: int
    full: bool = False

    def __len__(self) -> int:
        return 1 + max(0, -(-(self.length - 1 - self.T) // self.stride)) if self.length > 1 else 0

    def window(self, k: int) -> tuple[int, int, int]:
        """Return (first input, number of inputs, number of targets scored: the last ones) of window k."""
        start, targets = k * self.stride, self.length - 1
        stop = min(start + self.T, targets)
        scored = stop - (start - self.stride + self.T if k else 0)
        start = max(0, stop - self.T) if self.full else start
        return start, stop - start, scored

    def scored(self, windows: int) -> int:
        """Return the number of targets that the first windows score together."""
        start, inputs, _ = self.window(windows - 1)
        return start + inputs


def eval_batches(
    tokens: Tokens | Prefixed,
    context_length: int,
    batch_size: int,
    limit: int = 0,
    share: tuple[int, int] = (0, 1),
    *,
    stride: int | None = None,
    full: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of windows in order, with the incomplete last one; by default every token but the first is scored.

    Args:
        limit: number of batches, from the start; 0: all.
        share: (rank, world): every world-th batch, from the rank-th on. All ranks get the same number, as sharded
            models compute together: some a last batch without a scored target.
        stride, full: as in Protocol; without stride windows do not overlap.

    Yields:
        inputs and targets, (B, T) int64 each; targets that are not scored are IGNORE.
    """
    T, (rank, world) = context_length, share
    protocol = Protocol(len(tokens), T, stride or T, full)
    count = -(-len(protocol) // batch_size)
    count = min(limit, count) if limit else count
    for n in range(rank, -(-count // world) * world, world):
        rows = range(n * batch_size, min((n + 1) * batch_size, len(protocol))) if n < count else range(1)
        x = np.zeros((len(rows), T), dtype=np.int64)
        y = np.full((len(rows), T), IGNORE, dtype=np.int64)
        for row, k in enumerate(rows):
            start, inputs, scored = protocol.window(k)
            ids = tokens[start : start + inputs + 1].astype(np.int64)
            x[row, :inputs] = ids[:-1]
            if n < count:
                y[row, inputs - scored : inputs] = ids[inputs - scored + 1 :]
        yield x, y
