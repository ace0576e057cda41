"""Time and mean loss of updates, the remaining time of a run, and durations as text."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_MEAN = 1000  # updates; more would take memory on the device and in checkpoints


class RunClock:
    """Measures updates between two rows of the log, and estimates the remaining time of a run.

    The time of an update is without evaluations, saves and the first update, which may compile. The estimate counts
    the evaluations that are left, with their saves and samples, as long as those so far.

    Args:
        eval_updates: the number of updates that take as long as an evaluation. Used until one was measured.
        losses: of the updates before a resumed one, since the row before it.
    """

    def __init__(self, eval_updates: float, losses: Iterable[float] = ()):
        now = time.perf_counter()
        self.eval_updates, self.eval_seconds, self.evaluations = eval_updates, 0.0, 0
        self.row_start, self.row_updates, self.row_end, self.warm = now, 0, now, False
        self.first_start, self.updates = now, 0  # of all updates but the first; the start moves by each evaluation
        self.losses: deque[Tensor | float] = deque(losses, maxlen=MAX_MEAN)  # of the updates since the previous row

    def start_row(self, evaluated: bool = False) -> None:
        """Start to measure the updates of the next row. The device must be idle.

        Args:
            evaluated: there was an evaluation since `end_row`.
        """
        now = time.perf_counter()
        if evaluated:
            self.eval_seconds, self.evaluations = self.eval_seconds + now - self.row_end, self.evaluations + 1
            self.first_start += now - self.row_end
        self.row_start, self.row_updates = now, 0
        self.losses.clear()

    def count(self, loss: Tensor) -> None:
        """Count a launched update. The time of the first one is not measured."""
        self.losses.append(loss)
        if self.warm:
            self.row_updates, self.updates = self.row_updates + 1, self.updates + 1
        else:
            float(loss)  # waits for the update
            self.warm, self.row_start = True, time.perf_counter()
            self.first_start = self.row_start

    def end_row(self) -> tuple[list[float], float | None]:
        """Wait for the device. Return the losses of the updates since the previous row, and ms per update.

        The losses are those of the last MAX_MEAN updates at most. The time is None before the second update.
        """
        losses = [float(loss) for loss in self.losses]
        self.row_end = time.perf_counter()
        return losses, 1e3 * (self.row_end - self.row_start) / self.row_updates if self.row_updates else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the `with` block from the time of an update."""
        pause_start = time.perf_counter()
        yield
        self.row_start += time.perf_counter() - pause_start

    def seconds_left(self, i: int, max_iters: int, eval_interval: int) -> float | None:
        """Return an estimate of the seconds until the end, after iteration i; None if it is not known yet."""
        if not self.updates:
            return None
        updates = max(0, max_iters - i)
        evaluations = math.ceil(max_iters / eval_interval) - i // eval_interval if updates else 0
        per_update = (time.perf_counter() - self.first_start) / self.updates
        per_evaluation = self.eval_seconds / self.evaluations if self.evaluations else self.eval_updates * per_update
        return updates * per_update + evaluations * per_evaluation


def duration(seconds: float) -> str:
    """Format a duration: 1h05m, 1m15s, 5s."""
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
