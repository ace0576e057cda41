"""Training's micro-batches on the device, the next one made ready by a thread while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

Batches = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


class BatchPrefetcher:
    """What `batches(update, micro)` gives, in whatever order it is asked for; the one after it is prepared meanwhile.

    Args:
        batches: inputs and targets of a micro-batch, a pure function that is safe to call from a thread.
        device: where they go.
        micros: the micro-batches that this rank makes of each update, in their order.
    """

    def __init__(self, batches: Batches, device: torch.device, micros: range):
        self.batches, self.device, self.micros = batches, device, micros
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._next: tuple[tuple[int, int], Future] | None = None

    def __call__(self, update: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of that micro-batch on the device, (B, T) int64 each; on CUDA the copy does not wait."""
        ready = self._next[1].result() if self._next and self._next[0] == (update, micro) else None
        x, y = ready or self._prepare(update, micro)
        after = (update, micro + self.micros.step) if micro + self.micros.step in self.micros else None
        after = after or (update + 1, self.micros.start)
        self._next = after, self._thread.submit(self._prepare, *after)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _prepare(self, update: int, micro: int) -> tuple[Tensor, Tensor]:
        x, y = (torch.from_numpy(np.ascontiguousarray(array)) for array in self.batches(update, micro))
        if self.device.type != "cuda":
            return x, y
        with torch.cuda.device(self.device):  # each thread has its own
            return x.pin_memory(), y.pin_memory()
