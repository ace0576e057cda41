"""Who trains in a run's folder: one process at a time."""

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
    """A run's folder belongs to one process: a lock of the system's on <folder>/.lock, which ends with its owner."""

    def __init__(self, run_dir: Path):
        self.run_dir, self._file = run_dir, None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *why) -> None:
        if self._file:
            self._file.close()

    def acquire(self) -> None:
        """Lock the folder, where it is there; anew where it is not the one that was locked.

        Raises:
            UserError: another process has it.
        """
        path = self.run_dir / ".lock"
        while self.run_dir.is_dir() and not self._holds(path):
            if self._file:
                self._file.close()
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
            try:
                _lock(self._file)
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read() or "another process"
                self._file.close()
                self._file = None
                raise UserError(
                    f"{self.run_dir} is in use by {owner}: wait for it, stop it, or take another --out_dir"
                ) from None
            except OSError as why:  # a file system without locks
                text = f"warning: {path} cannot be locked ({why.strerror}): no second process may train there"
                print(text, file=sys.stderr)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def is_held(self) -> bool:
        """Whether the folder still is the one that was locked, and not moved away by somebody."""
        return self._holds(self.run_dir / ".lock")

    def prepare_folder(self, overwrite: bool) -> None:
        """Make the folder for a run that begins, or be sure of the one that was locked before.

        Args:
            overwrite: rename the run that is there, if there is one, to <folder>.old-<time>.

        Raises:
            UserError: another process came meanwhile, or we are in the folder that is to be renamed.
        """
        folder = self.run_dir
        if self._file is None:  # there was none to lock
            folder.mkdir(parents=True, exist_ok=True)
            self.acquire()
            if any(folder.glob("ckpt/iter_*")):
                raise UserError(f"{folder}: another process has trained there meanwhile; take another --out_dir")
        if not self.is_held():
            raise UserError(f"{folder} was moved away by another process meanwhile: start again")
        if (folder / "ckpt").is_file() and not overwrite:
            raise UserError(
                f"{folder / 'ckpt'} is a file, where checkpoints go: move it away, or take another --out_dir"
            )
        if overwrite and (folder / "ckpt").exists():
            here = Path.cwd()
            if folder.resolve() in (here, *here.parents):
                raise UserError(f"overwrite: {folder} is where we are, and is not renamed; take another --out_dir")
            old = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(folder, old)
            print(f"the run that was in {folder} is now in {old}")
            folder.mkdir()
            self.acquire()

    def _holds(self, path: Path) -> bool:
        return self._file is not None and path.exists() and os.path.samestat(path.stat(), os.fstat(self._file.fileno()))


def _lock(file: TextIO) -> None:
    """Lock an open file for this process alone; BlockingIOError where another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # it may only look: in_use
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(run_dir: Path) -> bool:
    """Whether a process trains in a folder now, as far as its file system has locks; nothing is written there.

    The lock is tried as one of many, who only look, and given back at once.
    """
    try:
        with open(run_dir / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked, or not to be read
        return False
    return False
