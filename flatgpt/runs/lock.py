"""A lock on a run's folder, so that only one process trains in it."""

from __future__ import annotations

from pathlib import Path

from config import UserError
from flatgpt.runtime.files import FolderLock


class RunLock(FolderLock):
    """The lock on a run's folder, which need not exist yet."""

    def __init__(self, folder: Path):
        super().__init__(folder, "--out_dir")

    def acquire(self) -> None:
        """Lock the folder if it exists. If another folder has replaced the locked one, lock the new one.

        Raises:
            UserError: another process holds the lock.
        """
        if self.folder.is_dir() and not self.is_held():
            super().acquire()

    def prepare_folder(self, overwrite: bool) -> None:
        """Create the folder of a new run, or check that it is still locked.

        Args:
            overwrite: rename the folder of an existing run to <folder>.old-<time>.

        Raises:
            UserError: another process has used or moved the folder, or the folder to rename is the current one.
        """
        folder = self.folder
        if not self._content:  # the folder did not exist
            folder.mkdir(parents=True, exist_ok=True)
            self.acquire()
            if any(folder.glob("ckpt/iter_*")):
                raise UserError(
                    f"{folder}: another process has trained there in the meantime; choose another --out_dir"
                )
        if not self.is_held():
            raise UserError(f"{folder} was moved by another process in the meantime: start again")
        if overwrite and (folder / "ckpt").exists():
            print(f"the existing run in {folder} was moved to {self.move_aside()}")
