"""Which tokens each protocol scores, and with how much context, against plain loops."""

import importlib.util
import os
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import tokens

from flatgpt.evaluation.windows import IGNORE, Prefixed, Protocol, eval_batches

FIRST, HERE = 7, 100  # the id in front of a text, and the text's first one: 100, 101, 102, ...
Pairs = list[tuple[list[int], list[int]]]  # of each window its inputs, and those of its last targets that are scored

quick = settings(max_examples=150)


def strided_loop(text: list[int], max_length: int, stride: int) -> Pairs:
    """The loop of transformers' documentation on perplexity of models of fixed length.

    A window there has `max_length` ids, whose labels the model shifts by one: its first id is no target.
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


def rolling_loop(text: list[int], first: int, T: int) -> Pairs:
    """Parts of T ids, the last one shorter; the inputs end before its last id and are T, where there are so many."""
    ids, pairs = [first, *text], []
    for done in range(0, len(text), T):
        end = min(done + T, len(text))
        pairs.append((ids[max(0, end - T) : end], text[done:end]))
    return pairs


@st.composite
def asked(draw) -> tuple[list[int], int, str, int]:
    """A text, T, a protocol and its stride."""
    T = draw(st.integers(1, 12))
    protocol = draw(st.sampled_from(["window", "stride", "rolling"]))
    stride = draw(st.integers(1, T)) if protocol == "stride" else T
    length = draw(st.integers(0, 60))
    return list(range(HERE, HERE + length)), T, protocol, stride


def expected(text: list[int], T: int, protocol: str, stride: int) -> Pairs:
    """The windows that have something to score: none of a text of one id."""
    pairs = rolling_loop(text, FIRST, T) if protocol == "rolling" else strided_loop(text, T + 1, stride)
    return [pair for pair in pairs if pair[1]]


def batches(text: list[int], T: int, protocol: str, stride: int, batch_size: int, **more) -> list:
    ids = np.array(text, dtype=np.uint16)
    rolling = protocol == "rolling"
    return list(
        eval_batches(Prefixed(ids, FIRST) if rolling else ids, T, batch_size, stride=stride, full=rolling, **more)
    )


def read(batches: Iterable) -> Pairs:
    """The windows of batches, without what fills them up (no id of these tests is 0)."""
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


def alike(one: tuple, other: tuple) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# what is scored


@quick
@given(asked(), st.integers(1, 9), st.integers(0, 5))
def test_windows_equal_a_plain_loop(asked, batch_size, limit):
    """Every token but the first (rolling: every one) is scored once, with the context that it has there."""
    text, T, protocol, _ = asked
    plain = expected(*asked)
    assert [t for _, targets in plain for t in targets] == (text if protocol == "rolling" else text[1:])
    got = batches(*asked, batch_size, limit=limit)
    for n, (x, y) in enumerate(got):
        assert x.shape == y.shape == (len(x), T)
        assert x.dtype == y.dtype == np.int64
        assert len(x) == batch_size if n + 1 < len(got) else 1 <= len(x) <= batch_size
    assert read(got) == (plain[: limit * batch_size] if limit else plain)


@quick
@given(asked())
def test_count_of_what_the_first_windows_score(asked):
    text, T, protocol, stride = asked
    rolling = protocol == "rolling"
    windows = Protocol(len(text) + rolling, T, stride, full=rolling)
    plain = expected(*asked)
    assert len(windows) == len(plain)
    sums = np.cumsum([len(targets) for _, targets in plain]).tolist()
    assert [windows.scored(n) for n in range(1, len(plain) + 1)] == sums


@quick
@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 9))
def test_without_more_words_windows_do_not_overlap(length, T, batch_size):
    text = np.arange(HERE, HERE + length, dtype=np.uint16)
    pairs = read(eval_batches(text, T, batch_size))
    assert [target for _, targets in pairs for target in targets] == text[1:].tolist()
    assert [inputs[0] for inputs, _ in pairs] == [HERE + n * T for n in range(len(pairs))]


@pytest.mark.parametrize("length", [2, 5, 6, 23])
def test_windows_over_several_files(tmp_path, length):
    """Of 4 ids each, or fewer."""
    text = list(range(HERE, HERE + length))
    files = tokens(tmp_path, *np.array_split(text, -(-length // 4)))
    assert read(eval_batches(files, 5, 2)) == strided_loop(text, 6, 5)
    assert read(eval_batches(files, 5, 2, stride=3)) == strided_loop(text, 6, 3)
    assert read(eval_batches(Prefixed(files, FIRST), 5, 2, full=True)) == rolling_loop(text, FIRST, 5)


@quick
@given(asked(), st.integers(1, 4), st.integers(0, 6), st.integers(1, 5))
def test_ranks_share_the_batches_in_turn(asked, batch_size, limit, world):
    """All have equally many: some a last one of one window in which nothing is to be scored."""
    whole = batches(*asked, batch_size, limit=limit)
    for rank in range(world):
        share = batches(*asked, batch_size, limit=limit, share=(rank, world))
        mine = whole[rank::world]
        assert len(share) == -(-len(whole) // world)
        assert all(map(alike, share, mine))
        for x, y in share[len(mine) :]:
            assert x.shape == y.shape == (1, asked[1])
            assert (y == IGNORE).all()


# ---------------------------------------------------------------------------------------------------------------------
# an id in front


@quick
@given(st.integers(0, 6), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9))
def test_slices_with_an_id_in_front(length, start, stop):
    ids = np.arange(HERE, HERE + length, dtype=np.uint16)
    prefixed = Prefixed(ids, 65535)
    assert len(prefixed) == 1 + length
    part = prefixed[start:stop]
    assert part.tolist() == [65535, *ids.tolist()][start:stop]
    assert part.dtype == np.uint16


# ---------------------------------------------------------------------------------------------------------------------
# long texts


class Endless:
    """10^15 ids, each its place modulo 50,000; knows how many were read at once."""

    most = 0

    def __len__(self) -> int:
        return 10**15

    def __getitem__(self, span: slice) -> np.ndarray:
        self.most = max(self.most, span.stop - span.start)
        return (np.arange(span.start, min(span.stop, 10**15)) % 50_000).astype(np.uint16)


@pytest.mark.parametrize("protocol", ["window", "stride", "rolling"])
def test_windows_are_computed_and_not_listed(protocol):
    """The first and the last batch of a text that no memory holds."""
    text, T, batch_size = Endless(), 1000, 4
    more = {"window": {}, "stride": {"stride": 300}, "rolling": {"full": True}}[protocol]
    ids = Prefixed(text, FIRST) if protocol == "rolling" else text
    x, _ = next(eval_batches(ids, T, batch_size, **more))
    assert x[0, 1] == (0 if protocol == "rolling" else 1)
    windows = len(Protocol(len(ids), T, **{"stride": T, **more}))
    assert windows == {"window": 10**12, "stride": 1 - (-(10**15 - 1 - T) // 300), "rolling": 10**12}[protocol]
    count = -(-windows // batch_size)
    ((x, y),) = eval_batches(ids, T, batch_size, share=(count - 1, count), **more)
    assert len(x) == windows - (count - 1) * batch_size
    assert y[y != IGNORE].max() == y[-1].max() == 49_999
    assert text.most <= T + 1


# ---------------------------------------------------------------------------------------------------------------------
# the harness's own


@pytest.mark.extra
def test_rolling_windows_equal_the_harness():
    if importlib.util.find_spec("lm_eval") is None:
        reason = "lm-eval is not installed: pip install -r requirements-extra.txt"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for T in range(1, 9):
        for length in range(1, 40):
            text = list(range(HERE, HERE + length))
            theirs = map(make_disjoint_window, get_rolling_token_windows(text, FIRST, max_seq_len=T, context_len=1))
            # a context, and what is predicted after it; the model reads both but for the last id
            pairs = [((context + scored)[:-1], scored) for context, scored in theirs]
            assert read(batches(text, T, "rolling", T, 3)) == pairs
