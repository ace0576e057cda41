"""Write checkpoints in a background thread. Training only waits for a copy into buffers.

At most one save is in flight. Work that has to follow it, such as moving `best`, runs in the same thread, and only if
the save succeeded: otherwise `best` would point to nothing, and its former checkpoint would be pruned.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import TrainConfig, UserError
from flatgpt.runs import checkpoint
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext, full_tensor


def lower_thread_priority() -> None:
    """Lower the calling thread's priority: at equal priority torch's threads wait for it in turn (docs/speed.md)."""
    if sys.platform == "linux":  # where each thread has its own niceness
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10)


class CheckpointWriter:
    """Saves the checkpoints of one run. Rank 0 writes; the other ranks help to gather sharded tensors.

    Args:
        config: resolved.
        ranks: every rank calls `save`, `allocate_buffers` and `wait` at the same time.
        metadata: what state.json of every checkpoint says.
        still_locked: whether the folder is still the one that the run began in.

    Attributes:
        failure: the newest save's error, where that save failed and training went on.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: DistributedContext = SINGLE_PROCESS,
        metadata: dict | None = None,
        still_locked: Callable[[], bool] = lambda: True,
    ):
        self.run_dir, self.config, self.ranks = Path(config.out_dir), config, ranks
        self.metadata, self.still_locked = metadata or {}, still_locked
        self.failure: Exception | None = None
        self._last_save = time.monotonic()
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "save", lower_thread_priority)
        self._tasks: list[Future] = []
        self._succeeded = True  # the newest save that the thread has tried

    def timer_due(self) -> bool:
        """Whether save_minutes have passed since the newest save."""
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def allocate_buffers(self, tensors: dict) -> None:
        """Allocate buffers for these nested tensors, and check that the disk has room for a checkpoint.

        Fresh memory takes several times as long as a copy.

        Raises:
            UserError: no checkpoint fits, and on_save_error is `stop`; or an earlier save failed, as in `save`.
        """
        self.wait()  # a save in flight reads the buffers
        self._copy(tensors)
        size, free = sum(b.nbytes for b in self._buffers.values()), shutil.disk_usage(self.run_dir).free
        if self.ranks.first and free < size:
            text = f"{self.run_dir} has {free / 1e6:,.0f} MB free, a checkpoint of this run takes {size / 1e6:,.0f} MB"
            self._fail(UserError(f"{text}: make room, or take an --out_dir on another disk"))

    def save(self, state: dict, tensors: dict) -> None:
        """Start to write a checkpoint. Waits for the save before it and for the copy.

        Args:
            state: what state.json says besides the metadata.
            tensors: `weights` and `train_state`, copied as they are now.

        Raises:
            UserError: the save before it failed, and on_save_error is `stop`.
        """
        self.wait()
        state, copied, self._last_save = {**state, **self.metadata}, self._copy(tensors), time.monotonic()

        def write() -> None:
            self._succeeded, keep = False, (self.config.keep_checkpoints, self.config.keep_every)
            if not self.still_locked():
                raise UserError(f"{self.run_dir} is no longer the folder that this run began in: nothing is saved")
            checkpoint.save(self.run_dir, state, copied["weights"], copied["train_state"], *keep)
            self._succeeded = True

        self._submit(write)

    def submit_after_save(self, work: Callable, *args) -> None:
        """Do this work once everything submitted before is on the disk; skip it where the newest save failed."""
        self._submit(lambda: self._succeeded and work(*args))

    def _submit(self, work: Callable) -> None:
        if self.ranks.first:
            self._tasks.append(self._thread.submit(work))

    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return all(task.done() for task in self._tasks)

    def check(self) -> None:
        """Raise or print the error of a save that has failed, as on_save_error says. Does not wait."""
        while self._tasks and self._tasks[0].done():
            try:
                self._tasks.pop(0).result()
                if self._succeeded:  # otherwise this task was skipped
                    self.failure = None
            except (UserError, OSError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.config.on_save_error == "stop":
            raise error
        self.failure = error
        print(f"warning: {error}. Training goes on (on_save_error = warn)", file=sys.stderr)

    def wait(self) -> None:
        """Wait until nothing is in flight on any rank, then `check`."""
        self.ranks.poll_all(self.idle)
        self.check()

    def close(self) -> None:
        """Wait until nothing is in flight on this rank, whatever the outcome."""
        self._thread.shutdown()

    def _copy(self, value: Any, name: str = "") -> Any:
        """Return nested dicts and lists with their tensors copied into the buffers; None for them on other ranks."""
        if isinstance(value, dict):
            return {key: self._copy(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, f"{name}/{n}") for n, item in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        value = full_tensor(value)
        if not self.ranks.first:
            return None
        if name not in self._buffers:
            self._buffers[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self._buffers[name].copy_(value)
