"""Which tokens each protocol scores, and with how much context, against plain loops."""

from collections.abc import Iterable

import numpy as np
import pytest
from dataset_files import tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from flatgpt.evaluation.windows import IGNORE, Prefixed, Protocol, eval_batches

FIRST, START = 7, 100  # the id in front of a text, and the text's first one: 100, 101, 102, ...
Pairs = list[tuple[list[int], list[int]]]  # of each window its inputs, and those of its last targets that are scored

quick = settings(max_examples=150)


def strided_loop(text: list[int], max_length: int, stride: int) -> Pairs:
    """The loop of transformers' documentation on the perplexity of models with a fixed length.

    A window there has `max_length` ids, whose labels the model shifts by one: its first id is not a target.
    """
    pairs, prev_end = [], 0
    for begin in range(0, len(text), stride):
        end = min(begin + max_length, len(text))
        unscored = prev_end - begin if prev_end else 0  # labels that the loop sets to -100
        pairs.append((text[begin : end - 1], text[begin:end][max(1, unscored) :]))
        prev_end = end
        if end == len(text):
            break
    return pairs


def rolling_loop(text: list[int], T: int) -> Pairs:
    """Chunks of T targets, the last one shorter; each has the T inputs before its end, if there are as many."""
    ids, pairs = [FIRST, *text], []
    for start in range(0, len(text), T):
        end = min(start + T, len(text))
        pairs.append((ids[max(0, end - T) : end], text[start:end]))
    return pairs


def expected(text: list[int], T: int, protocol: str, stride: int) -> Pairs:
    """The windows that have a target."""
    pairs = rolling_loop(text, T) if protocol == "rolling" else strided_loop(text, T + 1, stride)
    return [pair for pair in pairs if pair[1]]


@st.composite
def cases(draw) -> tuple[list[int], int, str, int]:
    """A text, T, a protocol and its stride."""
    T = draw(st.integers(1, 12))
    protocol = draw(st.sampled_from(["window", "stride", "rolling"]))
    stride = draw(st.integers(1, T)) if protocol == "stride" else T
    return list(range(START, START + draw(st.integers(0, 60)))), T, protocol, stride


def batches(ids, T: int, protocol: str, stride: int, batch_size: int, **more) -> list:
    ids = np.array(ids, dtype=np.uint16) if isinstance(ids, list) else ids
    rolling = protocol == "rolling"
    ids = Prefixed(ids, FIRST) if rolling else ids
    more |= {} if protocol == "window" else {"stride": stride, "full": rolling}
    return list(eval_batches(ids, T, batch_size, **more))


def read(batches: Iterable) -> Pairs:
    """The windows of batches without their padding (no id of these tests is 0)."""
    pairs = []
    for x, y in batches:
        for inputs, targets in zip(x, y, strict=True):
            n = np.count_nonzero(inputs)
            scored = targets != IGNORE
            assert inputs[:n].all()
            assert not scored[n:].any()
            assert scored[n - scored.sum() : n].all(), "the last ones of a window"
            pairs.append((inputs[:n].tolist(), targets[scored].tolist()))
    return pairs


@quick
@given(cases(), st.integers(1, 9), st.integers(0, 5))
def test_windows_equal_a_plain_loop(case, batch_size, limit):
    """Every token but the first (rolling: every one) is scored once; and the count of what windows score is right."""
    text, T, protocol, stride = case
    plain = expected(*case)
    assert [t for _, targets in plain for t in targets] == (text if protocol == "rolling" else text[1:])
    got = batches(*case, batch_size, limit=limit)
    for n, (x, y) in enumerate(got):
        assert x.shape == y.shape == (len(x), T)
        assert x.dtype == y.dtype == np.int64
        assert len(x) == batch_size if n + 1 < len(got) else 1 <= len(x) <= batch_size
    assert read(got) == (plain[: limit * batch_size] if limit else plain)
    rolling = protocol == "rolling"
    windows = Protocol(len(text) + rolling, T, stride, full=rolling)
    assert len(windows) == len(plain)
    sums = np.cumsum([len(targets) for _, targets in plain]).tolist()
    assert [windows.scored(n) for n in range(1, len(plain) + 1)] == sums


@pytest.mark.parametrize("length", [2, 5, 6, 23])
def test_windows_span_shard_files(tmp_path, length):
    text = list(range(START, START + length))
    files = tokens(tmp_path, *np.array_split(text, -(-length // 4)))  # up to 4 ids each
    for protocol, stride in (("window", 5), ("stride", 3), ("rolling", 5)):
        assert read(batches(files, 5, protocol, stride, 2)) == expected(text, 5, protocol, stride)


@quick
@given(cases(), st.integers(1, 4), st.integers(0, 6), st.integers(1, 5))
def test_ranks_share_the_batches_in_turn(case, batch_size, limit, world):
    """All get the same number: some a last batch of one window without a scored target."""
    whole = batches(*case, batch_size, limit=limit)
    for rank in range(world):
        share, own = batches(*case, batch_size, limit=limit, share=(rank, world)), whole[rank::world]
        assert len(share) == -(-len(whole) // world)
        for got, wanted in zip(share, own, strict=False):
            assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
        for x, y in share[len(own) :]:
            assert x.shape == y.shape == (1, case[1])
            assert (y == IGNORE).all()


@quick
@given(st.integers(0, 6), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9))
def test_slices_of_prefixed_tokens(length, start, stop):
    ids = np.arange(START, START + length, dtype=np.uint16)
    part = Prefixed(ids, 65535)[start:stop]
    assert part.tolist() == [65535, *ids.tolist()][start:stop]
    assert part.dtype == np.uint16


class Endless:
    """10^15 ids, each its index modulo 50,000; records how many were read at once."""

    most = 0

    def __len__(self) -> int:
        return 10**15

    def __getitem__(self, span: slice) -> np.ndarray:
        self.most = max(self.most, span.stop - span.start)
        return (np.arange(span.start, min(span.stop, 10**15)) % 50_000).astype(np.uint16)


@pytest.mark.parametrize(("protocol", "stride"), [("window", 1000), ("stride", 300), ("rolling", 1000)])
def test_windows_are_computed_on_demand(protocol, stride):
    """The last batch of a text that fits into no memory."""
    text, rolling, batch_size = Endless(), protocol == "rolling", 4
    windows = len(Protocol(len(text) + rolling, 1000, stride, rolling))
    assert windows == (1 - (-(10**15 - 1001) // 300) if protocol == "stride" else 10**12)
    count = -(-windows // batch_size)
    ((x, y),) = batches(text, 1000, protocol, stride, batch_size, share=(count - 1, count))
    assert len(x) == windows - (count - 1) * batch_size
    assert y[y != IGNORE].max() == y[-1].max() == 49_999
    assert text.most <= 1001
