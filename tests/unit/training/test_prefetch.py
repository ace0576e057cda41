"""feed.py: what it gives, and what its thread prepares meanwhile."""

import threading
import time

import numpy as np
import pytest
import torch

from flatgpt.data.dataset import TrainingBatches, Windows
from flatgpt.training.prefetch import BatchPrefetcher

CPU = torch.device("cpu")
ORDERS = [
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)],
    [(7, 0), (7, 1), (7, 2), (8, 0)],  # resumed
    [(0, 0), (0, 0), (0, 1), (0, 1)],
    [(3, 2), (0, 1), (9, 0), (9, 2), (2, 0), (2, 1)],
]


class Recorded:
    """Batches that say which they are, and remember who asked for them.

    Args:
        broken: those that fail.
        wait: they wait for this.
    """

    def __init__(self, broken=(), wait: threading.Event | None = None):
        self.calls, self.broken, self.wait = [], broken, wait

    def __call__(self, update: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        if self.wait:
            self.wait.wait(60)
        self.calls.append((update, micro, threading.current_thread()))
        if (update, micro) in self.broken:
            raise ValueError(f"batch {update}, {micro}")
        x = np.array([[update, micro, 5]])
        return x[:, :-1], x[:, 1:]  # views, as of a window

    def until(self, count: int) -> list[tuple[int, int]]:
        """Which were asked for, once there are as many; then a little longer, in case there are more."""
        end = time.monotonic() + 60
        while len(self.calls) < count and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.01)
        return [(update, micro) for update, micro, _ in self.calls]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_batches_are_the_same_in_whatever_order_they_are_asked_for(order):
    batches = TrainingBatches(Windows(np.arange(1000) % 251, 16, 5), 4, 3, seed=1)
    feed = BatchPrefetcher(batches, CPU, range(3))
    given = [(feed(*key), batches(*key)) for key in order]  # compared at the end: none is written over
    for found, expected in given:
        for tensor, array in zip(found, expected, strict=True):
            assert tensor.dtype == torch.int64
            assert np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize(
    ("micros", "asked", "after"),
    [
        (range(3), (0, 0), (0, 1)),
        (range(3), (0, 2), (1, 0)),
        (range(3), (7, 1), (7, 2)),
        (range(1), (4, 0), (5, 0)),
        (range(1, 4, 2), (0, 1), (0, 3)),  # the second of two ranks
        (range(1, 4, 2), (0, 3), (1, 1)),
        (range(2, 8, 3), (6, 5), (7, 2)),
    ],
)
def test_the_next_of_this_rank_is_prepared_in_a_thread(micros, asked, after):
    batches = Recorded()
    feed = BatchPrefetcher(batches, CPU, micros)
    feed(*asked)
    assert batches.until(2) == [asked, after]
    assert batches.calls[0][2] is threading.current_thread()
    assert batches.calls[1][2] is not threading.current_thread()
    x, y = feed(*after)
    assert (x.tolist(), y.tolist()) == ([list(after)], [[after[1], 5]])
    assert len(batches.until(3)) == 3  # it was not made again
    assert batches.calls[2][2] is batches.calls[1][2]  # one thread


def test_each_is_prepared_once_through_several_updates():
    batches = Recorded()
    feed = BatchPrefetcher(batches, CPU, range(1, 4, 2))
    keys = [(update, micro) for update in range(7, 10) for micro in (1, 3)]
    for key in keys:
        assert feed(*key)[0].tolist() == [list(key)]
    assert batches.until(7) == [*keys, (10, 1)]


def test_a_batch_is_given_without_waiting_for_the_next():
    ready = threading.Event()
    batches = Recorded()
    feed = BatchPrefetcher(batches, CPU, range(2))
    feed(0, 0)
    batches.until(2)
    batches.wait = ready  # (1, 0) is not to be had
    assert feed(0, 1)[0].tolist() == [[0, 1]]
    assert len(batches.calls) == 2
    ready.set()


def test_what_goes_wrong_in_the_thread_is_raised_where_its_batch_is_asked_for():
    batches = Recorded(broken=[(0, 1)])
    feed = BatchPrefetcher(batches, CPU, range(2))
    assert feed(0, 0)[0].tolist() == [[0, 0]]
    batches.until(2)
    with pytest.raises(ValueError, match="batch 0, 1"):
        feed(0, 1)
    assert feed(1, 0)[0].tolist() == [[1, 0]]
    assert feed(1, 1)[0].tolist() == [[1, 1]]


def test_a_batch_that_is_never_asked_for_may_be_broken():
    """The one after a run's last, say."""
    batches = Recorded(broken=[(0, 1)])
    feed = BatchPrefetcher(batches, CPU, range(2))
    feed(0, 0)
    batches.until(2)
    assert feed(5, 0)[0].tolist() == [[5, 0]]
    assert feed(5, 1)[0].tolist() == [[5, 1]]


def test_its_thread_ends_with_it():
    batches = Recorded()
    feed = BatchPrefetcher(batches, CPU, range(2))
    feed(0, 0)
    batches.until(2)
    (thread,) = {thread for *_, thread in batches.calls if thread is not threading.current_thread()}
    assert thread.is_alive()
    del feed  # with a batch that nobody takes
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.gpu
def test_on_a_gpu():
    device = torch.device("cuda", 0)
    batches = Recorded()
    feed = BatchPrefetcher(batches, device, range(2))
    for key in ((0, 0), (0, 1), (1, 0)):
        x, y = feed(*key)
        assert x.device == y.device == device
        assert x.tolist() == [list(key)]
