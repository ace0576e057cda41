"""BatchPrefetcher: which batches it returns, and what its thread prepares meanwhile."""

import threading

import numpy as np
import pytest
import torch

from flatgpt.training.setup import BatchPrefetcher

CPU = torch.device("cpu")


class Recorded:
    """Batches that say which they are. `asked` has the batch and the thread of each call; those in `broken` fail."""

    def __init__(self, broken=()):
        self.asked, self.broken, self.changed = [], broken, threading.Condition()

    def __call__(self, update: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        with self.changed:
            self.asked.append(((update, micro), threading.current_thread()))
            self.changed.notify()
        if (update, micro) in self.broken:
            raise ValueError(f"batch {update}, {micro}")
        x = np.array([[update, micro, 5]])
        return x[:, :-1], x[:, 1:]  # views, as of a window

    def wait(self, count: int) -> list[tuple[int, int]]:
        """Return which were asked for, once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, 60)
            return [key for key, _ in self.asked]


@pytest.mark.parametrize(
    ("micros", "asked", "after"),
    [
        (range(3), (0, 0), (0, 1)),
        (range(3), (0, 2), (1, 0)),
        (range(1), (4, 0), (5, 0)),
        (range(1, 4, 2), (0, 1), (0, 3)),  # the second of two ranks
        (range(1, 4, 2), (0, 3), (1, 1)),
    ],
)
def test_next_batch_of_this_rank_is_prepared_in_a_thread(micros, asked, after):
    batches = Recorded()
    prefetcher = BatchPrefetcher(batches, CPU, micros)
    prefetcher(*asked)
    assert batches.wait(2) == [asked, after]
    x, y = prefetcher(*after)
    assert (x.tolist(), y.tolist()) == ([list(after)], [[after[1], 5]])
    assert batches.wait(3).count(after) == 1
    here, thread, again = (thread for _, thread in batches.asked)
    assert here is threading.current_thread() is not thread is again
    del prefetcher  # its thread ends, although nobody took the last batch
    thread.join(60)
    assert not thread.is_alive()


def test_error_in_the_thread_is_raised_where_its_batch_is_asked_for():
    batches = Recorded(broken=[(0, 1), (1, 1)])
    prefetcher = BatchPrefetcher(batches, CPU, range(2))
    assert prefetcher(0, 0)[0].tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="batch 0, 1"):
        prefetcher(0, 1)
    assert prefetcher(1, 0)[0].tolist() == [[1, 0]]
    assert prefetcher(2, 0)[0].tolist() == [[2, 0]]  # nobody asked for (1, 1)
