"""Checkpoints beside training: the loop waits for one copy into buffers, a thread hashes and writes them.

One save is in flight at most. What has to come after it, moving `best` for one, is done by the same thread in its turn,
and only where the save has arrived: else `best` would lead to nothing, and the checkpoint that it led to be pruned.
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


def lower_thread_priority() -> None:
    """A thread that takes turns with torch's makes them all wait: updates took 2.8 times as long (docs/speed.md)."""
    if sys.platform == "linux":  # where a thread has a niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10)


class CheckpointWriter:
    """Saves the checkpoints of one run.

    Args:
        config: resolved: its folder, what is kept there, and what a failed save means.
        writes: False on ranks that only help to put sharded tensors together.
        whole: makes a sharded tensor whole; called on every rank, for every tensor in the same order.
        still_locked: whether the folder still is the one that the run began in.

    Attributes:
        failure: of the newest save, where that failed and training went on.
    """

    def __init__(
        self,
        config: TrainConfig,
        writes: bool = True,
        whole: Callable[[Tensor], Tensor] = lambda t: t,
        still_locked: Callable[[], bool] = lambda: True,
    ):
        self.run_dir, self.config, self.writes, self.whole = Path(config.out_dir), config, writes, whole
        self.still_locked = still_locked
        self.failure: Exception | None = None
        self._began = time.monotonic()  # the newest save, or before it this
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "save", lower_thread_priority)
        self._tasks: list[Future] = []
        self._arrived = True  # the newest save, as far as the thread has come

    def timer_due(self) -> bool:
        """Whether save_minutes are over since the newest save."""
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self._began >= 60 * minutes

    def allocate_buffers(self, parts: dict) -> None:
        """Make the buffers for such parts (finding fresh memory takes several times as long as a copy), and look for
        room on the disk.

        Raises:
            UserError: not even one checkpoint fits, and on_save_error is `stop`; or a save has failed, as in `save`.
        """
        self.wait()  # a save may be in flight, and its copies are in these buffers
        self._copy(parts)
        if not self.writes:
            return
        size, free = sum(b.nbytes for b in self._buffers.values()), shutil.disk_usage(self.run_dir).free
        for_good = self.config.max_iters // self.config.keep_every if self.config.keep_every else 0
        kept = self.config.keep_checkpoints + 1 + for_good - len(checkpoint.checkpoints(self.run_dir))
        if free < size:
            text = f"{self.run_dir} has {free / 1e6:,.0f} MB free, a checkpoint of this run takes {size / 1e6:,.0f} MB"
            self._fail(UserError(f"{text}: make room, or take an --out_dir on another disk"))
        elif free < size * (kept + 1):  # one more while it is written
            print(
                f"note: {self.run_dir} has {free / 1e6:,.0f} MB free; up to {kept} more checkpoints of "
                f"{size / 1e6:,.0f} MB will be kept, and one is being written meanwhile"
            )

    def save(self, state: dict, parts: dict) -> None:
        """Begin to write a checkpoint: state, and the `weights` and `train_state` in parts as they are now.

        Waits for the save before it, and for the copy.

        Raises:
            UserError: the save before it failed, and on_save_error is `stop`.
        """
        self.wait()
        state, copied, self._began = dict(state), self._copy(parts), time.monotonic()

        def write() -> None:
            self._arrived, keep = False, (self.config.keep_checkpoints, self.config.keep_every)
            if not self.still_locked():
                raise UserError(f"{self.run_dir} is no longer the folder that this run began in: nothing is saved")
            checkpoint.save(self.run_dir, state, copied["weights"], copied["train_state"], *keep)
            self._arrived = True

        self._submit(write)

    def submit_after_save(self, work: Callable, *args) -> None:
        """Do this work when all that was begun before it is on the disk; where a save failed, leave it out."""
        self._submit(lambda: self._arrived and work(*args))

    def _submit(self, work: Callable) -> None:
        if self.writes:
            self._tasks.append(self._thread.submit(work))

    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return all(task.done() for task in self._tasks)

    def check(self) -> None:
        """Raise UserError, or warn, as on_save_error says, where a save has failed; waits for nothing."""
        while self._tasks and self._tasks[0].done():
            try:
                self._tasks.pop(0).result()
                if self._arrived:  # else this is what was left out
                    self.failure = None
            except (UserError, OSError) as why:
                self._fail(why)

    def _fail(self, why: Exception) -> None:
        if self.config.on_save_error == "stop":
            raise why
        self.failure = why
        print(f"warning: {why}. Training goes on (on_save_error = warn)", file=sys.stderr)

    def wait(self) -> None:
        """Until nothing is in flight; then as `check`."""
        for task in self._tasks:
            task.exception()
        self.check()

    def close(self) -> None:
        """Until nothing is in flight, whatever became of it."""
        self._thread.shutdown()

    def _copy(self, parts: dict) -> dict:
        """Dicts and lists with their tensors copied into the buffers; with None for them on ranks that do not write."""
        cuda = set()

        def copy(value: Any, name: str) -> Any:
            if isinstance(value, dict):
                return {key: copy(item, f"{name}/{key}") for key, item in value.items()}
            if isinstance(value, list):
                return [copy(item, f"{name}/{n}") for n, item in enumerate(value)]
            if not isinstance(value, Tensor):
                return value
            value = self.whole(value)
            if not self.writes:
                return None
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[name] = buffer
            if value.is_cuda:
                cuda.add(value.device)
            return buffer.copy_(value, non_blocking=True)

        copied = copy(parts, "")
        for device in cuda:
            torch.cuda.synchronize(device)
        return copied
