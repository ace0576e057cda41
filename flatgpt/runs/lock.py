"""A lock on a run's folder, so that only one process trains in it."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

from config import UserError


class RunLock:
    """An OS file lock on <run_dir>/.lock, released when the process exits."""

    def __init__(self, run_dir: Path):
        self.run_dir, self._file = run_dir, None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.close()
        self._file = None

    def acquire(self) -> None:
        """Lock the folder if it exists. If another folder has replaced the locked one, lock the new one.

        Raises:
            UserError: another process holds the lock.
        """
        path = self.run_dir / ".lock"
        while self.run_dir.is_dir() and not self.is_held():
            self.__exit__()
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open while the lock is held
            try:
                _lock(self._file)
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read() or "another process"
                self.__exit__()
                text = f"{self.run_dir} is in use by {owner}: wait for it, stop it, or choose another --out_dir"
                raise UserError(text) from None
            except OSError as error:  # a file system without locks
                text = f"warning: {path} cannot be locked ({error.strerror}): do not train there in a second process"
                print(text, file=sys.stderr)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def is_held(self) -> bool:
        """Whether the path still is the locked folder, which may have been renamed."""
        path = self.run_dir / ".lock"
        return self._file is not None and path.exists() and os.path.samestat(path.stat(), os.fstat(self._file.fileno()))

    def prepare_folder(self, overwrite: bool) -> None:
        """Create the folder of a new run, or check that it is still locked.

        Args:
            overwrite: rename the folder of an existing run to <run_dir>.old-<time>.

        Raises:
            UserError: another process has used or moved the folder, or the folder to rename is the current one.
        """
        folder = self.run_dir
        if self._file is None:  # the folder did not exist
            folder.mkdir(parents=True, exist_ok=True)
            self.acquire()
            if any(folder.glob("ckpt/iter_*")):
                raise UserError(
                    f"{folder}: another process has trained there in the meantime; choose another --out_dir"
                )
        if not self.is_held():
            raise UserError(f"{folder} was moved by another process in the meantime: start again")
        if overwrite and (folder / "ckpt").exists():
            if Path.cwd().is_relative_to(folder.resolve()):
                raise UserError(
                    f"overwrite: {folder} contains the current folder and is not renamed; choose another --out_dir"
                )
            old = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(folder, old)
            print(f"the existing run in {folder} was moved to {old}")
            folder.mkdir()
            self.acquire()


def _lock(file: TextIO) -> None:
    """Lock an open file exclusively. Raise BlockingIOError if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # in_use() holds a lock for a moment
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(run_dir: Path) -> bool:
    """Whether a process is training in a folder. Writes nothing. False on file systems without locks."""
    try:
        with open(run_dir / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # FileNotFoundError: never locked
        return isinstance(error, BlockingIOError)
    return False
