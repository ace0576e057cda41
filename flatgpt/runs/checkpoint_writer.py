"""Write checkpoints in a background thread. Training waits only for a copy into buffers.

At most one save is in flight. Work that depends on it, such as updating `best`, runs in the same thread and only if the
save succeeded. Otherwise `best` would be a dangling link, and its previous target would be deleted.
"""

from __future__ import annotations

import contextlib
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
    """Lower the calling thread's priority, so that torch's threads do not wait for it (docs/speed.md)."""
    if sys.platform == "linux":  # the only system with a niceness per thread
        with contextlib.suppress(OSError):  # some containers refuse it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10)


class CheckpointWriter:
    """Saves the checkpoints of a run. Rank 0 writes them; all ranks gather sharded tensors.

    Args:
        config: resolved config.
        ranks: `save`, `allocate_buffers` and `wait` are collective calls.
        metadata: keys that every checkpoint's state.json contains.
        still_locked: returns whether the run's folder is still the locked one.
        tokenizer: as in checkpoint.save.

    Attributes:
        failure: error of the newest save if it failed and training continued, else None.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: DistributedContext = SINGLE_PROCESS,
        metadata: dict | None = None,
        still_locked: Callable[[], bool] = lambda: True,
        tokenizer: bytes | None = None,
    ):
        self.run_dir, self.config, self.ranks = Path(config.out_dir), config, ranks
        self.metadata, self.still_locked, self.tokenizer = metadata or {}, still_locked, tokenizer
        self.failure: Exception | None = None
        self._last_save = time.monotonic()
        self._buffers: dict[str, Tensor] = {}
        self._pin = True
        self._thread = ThreadPoolExecutor(1, "save", lower_thread_priority)
        self._tasks: list[Future] = []
        self._succeeded = True  # whether the newest started save succeeded

    def timer_due(self) -> bool:
        """Whether save_minutes have passed since the newest save."""
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def allocate_buffers(self, tensors: dict) -> None:
        """Allocate buffers for nested tensors, and check that a checkpoint fits on the disk.

        Allocation takes several times as long as a copy, so it is done before the first save.

        Raises:
            UserError: with on_save_error = stop, a checkpoint does not fit, or an earlier save failed.
        """
        self.wait()  # the save in flight reads the buffers
        self._copy(tensors)
        size, free = sum(b.nbytes for b in self._buffers.values()), shutil.disk_usage(self.run_dir).free
        if self.ranks.first and free < size:
            text = f"{self.run_dir} has {free / 1e6:,.0f} MB free, a checkpoint of this run needs {size / 1e6:,.0f} MB"
            self._fail(UserError(f"{text}: free disk space, or choose an --out_dir on another disk"))

    def save(self, state: dict, tensors: dict) -> None:
        """Copy the tensors and start to write a checkpoint. Wait for the previous save first.

        Args:
            state: content of state.json besides the metadata.
            tensors: `weights` and `train_state`.

        Raises:
            UserError: with on_save_error = stop, the previous save failed.
        """
        self.wait()
        state, copied, self._last_save = {**state, **self.metadata}, self._copy(tensors), time.monotonic()

        def write() -> None:
            self._succeeded, keep = False, (self.config.keep_checkpoints, self.config.keep_every)
            if not self.still_locked():
                raise UserError(f"{self.run_dir} is no longer the folder that this run started in: nothing is saved")
            checkpoint.save(self.run_dir, state, copied["weights"], copied["train_state"], *keep, self.tokenizer)
            self._succeeded = True

        self._submit(write)

    def submit_after_save(self, work: Callable, *args) -> None:
        """Call work(*args) in the thread after all earlier saves; skip the call if the newest save failed."""
        self._submit(lambda: self._succeeded and work(*args))

    def _submit(self, work: Callable) -> None:
        if self.ranks.first:
            self._tasks.append(self._thread.submit(work))

    def idle(self) -> bool:
        """Whether no task is in flight on this rank."""
        return all(task.done() for task in self._tasks)

    def check(self) -> None:
        """Raise or print the errors of finished tasks, depending on on_save_error. Does not wait."""
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
        print(f"warning: {error}. Training continues (on_save_error = warn)", file=sys.stderr)

    def wait(self) -> None:
        """Wait until no task is in flight on any rank, then call `check`."""
        self.ranks.poll_all(self.idle)
        self.check()

    def close(self) -> None:
        """Wait until no task is in flight on this rank. Does not report errors."""
        self._thread.shutdown()

    def _copy(self, value: Any, name: str = "") -> Any:
        """Copy the tensors of nested dicts and lists into the buffers. On ranks other than 0, tensors become None."""
        if isinstance(value, dict):
            return {key: self._copy(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, f"{name}/{n}") for n, item in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        value = full_tensor(value)
        if not self.ranks.first:
            return None
        if name not in self._buffers and value.is_cuda and self._pin:
            try:
                self._buffers[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pin, text = False, str(error).partition("\n")[0]
                print(f"note: saves wait longer, because host memory cannot be pinned: {text}", file=sys.stderr)
        if name not in self._buffers:
            self._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
        return self._buffers[name].copy_(value)
