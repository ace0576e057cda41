"""Prepare the next micro-batch in a thread while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

Batches = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


class BatchPrefetcher:
    """Returns micro-batches in any order. A thread prepares the one that follows the newest.

    Args:
        batches: (update, micro) -> inputs and targets; a pure, thread-safe function.
        device: of the returned tensors.
        micros: this rank's micro-batches of each update.
    """

    def __init__(self, batches: Batches, device: torch.device, micros: range):
        self.batches, self.device, self.micros = batches, device, micros
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[tuple[int, int], Future] | None = None

    def __call__(self, update: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets on the device, (B, T) int64 each. Does not synchronise with CUDA."""
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
        with torch.cuda.device(self.device):  # the current device is a thread's own setting
            return x.pin_memory(), y.pin_memory()
