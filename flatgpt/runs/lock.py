"""One process at a time trains in a run's folder."""

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
    """An OS file lock on <folder>/.lock, released when the process exits."""

    def __init__(self, run_dir: Path):
        self.run_dir, self._file = run_dir, None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.close()
        self._file = None

    def acquire(self) -> None:
        """Lock the folder, if it exists; again where it is not the folder that was locked.

        Raises:
            UserError: another process holds the lock.
        """
        path = self.run_dir / ".lock"
        while self.run_dir.is_dir() and not self.is_held():
            self.__exit__()
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the lock is held
            try:
                _lock(self._file)
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read() or "another process"
                self.__exit__()
                text = f"{self.run_dir} is in use by {owner}: wait for it, stop it, or take another --out_dir"
                raise UserError(text) from None
            except OSError as error:  # a file system without locks
                text = f"warning: {path} cannot be locked ({error.strerror}): no second process may train there"
                print(text, file=sys.stderr)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def is_held(self) -> bool:
        """Whether the folder is still the one that was locked: it may have been moved away."""
        path = self.run_dir / ".lock"
        return self._file is not None and path.exists() and os.path.samestat(path.stat(), os.fstat(self._file.fileno()))

    def prepare_folder(self, overwrite: bool) -> None:
        """Make the folder for a new run, or check that it is still the locked one.

        Args:
            overwrite: rename an existing run to <folder>.old-<time>.

        Raises:
            UserError: another process was faster, or the folder to rename is the current one.
        """
        folder = self.run_dir
        if self._file is None:  # it did not exist
            folder.mkdir(parents=True, exist_ok=True)
            self.acquire()
            if any(folder.glob("ckpt/iter_*")):
                raise UserError(f"{folder}: another process has trained there meanwhile; take another --out_dir")
        if not self.is_held():
            raise UserError(f"{folder} was moved away by another process meanwhile: start again")
        if overwrite and (folder / "ckpt").exists():
            if Path.cwd().is_relative_to(folder.resolve()):
                raise UserError(f"overwrite: {folder} is where we are, and is not renamed; take another --out_dir")
            old = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(folder, old)
            print(f"the run that was in {folder} is now in {old}")
            folder.mkdir()
            self.acquire()


def _lock(file: TextIO) -> None:
    """Lock an open file exclusively. Raises BlockingIOError where another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # in_use holds a lock for a moment
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(run_dir: Path) -> bool:
    """Whether a process trains in a folder now. Writes nothing; False on a file system without locks."""
    try:
        with open(run_dir / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # FileNotFoundError: never locked
        return isinstance(error, BlockingIOError)
    return False
