"""Read JSON, write files atomically, and lock folders. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from config import UserError

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
except ImportError:  # Windows
    LOCK_EX = LOCK_NB = LOCK_SH = 0

    def flock(file: IO, operation: int) -> None:
        file.close()  # Windows does not rename open files


CANNOT_FLUSH = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def read_json(file: Path, remedy: str = "copy it again") -> dict:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is damaged, is not an object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(content := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has two values of {max(names, key=names.count)!r:.60}")
        return content

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is {wrong_kind(file) or 'damaged'}: {error}; {remedy}") from None
    return content


def wrong_kind(file: Path) -> str | None:
    """Return what a failed download left in place of a file; None if unknown."""
    with contextlib.suppress(OSError), open(file, "rb") as content:
        start = content.read(100).lstrip()
        if start.startswith(b"version https://git-lfs"):
            return "a pointer of Git LFS, not the file itself (git lfs pull)"
        if start.startswith(b"<"):
            return "a web page, not the file itself"
    return None


def write_json(figures: dict, target: str) -> None:
    """Write figures as JSON to a file, or to standard output for `-`. NaN and infinity become null.

    Raises:
        UserError: the file cannot be written; its previous content is kept.
    """
    text = json.dumps(_finite(figures), indent=1, allow_nan=False) + "\n"
    if target == "-":
        print(text, end="")
    else:
        write_output(text.encode(), target, "json")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Set the path of an OSError that is raised inside. Those of write, flush and fsync have none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it, so that no reader sees a partial file.

    The temporary name is hidden and unique, so that of several processes that write one file the last wins.

    Raises:
        OSError: the error names `path`; its previous content is kept.
    """
    partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            with open(partial, "xb") as file:
                file.write(content)
            fsync(partial)
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk. Does nothing where the file system has no such call, for example for folders.

    Raises:
        OSError: the flush failed; the error names the path.
    """
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


def write_output(content: bytes, target: str, key: str) -> None:
    """Write `content` to the file of the setting `key`, atomically unless it is a pipe or device.

    Raises:
        UserError: as in write_json.
    """
    try:
        if _is_device(target):
            Path(target).write_bytes(content)
        else:
            atomic_write(Path(os.path.realpath(target)), content)
    except OSError as error:
        raise UserError(f"{key} = {target}: cannot be written: {error.strerror}") from None


def require_writable(target: str | None, key: str) -> None:
    """Raise UserError if write_output could not write to `target`. Called before long work."""
    if target in (None, "-") or _is_device(target):
        return
    folder = Path(target).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(target).is_dir():
        raise UserError(f"{key} = {target}: cannot be written: no file can be created there")


def _is_device(target: str) -> bool:
    return target.startswith("/dev/") or Path(target).is_fifo()


# ---------------------------------------------------------------------------------------------------------------------
# locks

HEARTBEAT, BEATS = 5.0, 4  # seconds; the owner of a lock has ended if it misses as many heartbeats


class FolderLock(contextlib.AbstractContextManager):
    """A lock on a folder, so that only one process at a time works in it.

    <folder>/.lock names its owner, which sets the file's modification time every HEARTBEAT seconds and locks the file
    with flock. flock alone is not enough: some network file systems lack it, or grant it to every machine. The lock of
    a process that has ended is taken over: at once on the same machine, otherwise when BEATS heartbeats are missing.

    Args:
        setting: the setting that chooses the folder, for the message of an error.
    """

    def __init__(self, folder: Path, setting: str):
        self.folder, self.setting, self._path = folder, setting, folder.absolute() / ".lock"
        self._content, self._stop = "", threading.Event()

    def __exit__(self, *error) -> None:
        """Release the lock, if this process holds it."""
        if self in _open_files:
            self._stop.set()
            with contextlib.suppress(OSError):
                if self.is_held():
                    self._path.unlink()
            _open_files.pop(self).close()
        self._content = ""

    def is_held(self) -> bool:
        """Whether the path still is the locked folder, which may have been renamed."""
        return self._content != "" and _read_lock(self._path)[0] == self._content

    def acquire(self) -> None:
        """Lock the folder. Call it inside `with`, which also removes what an error leaves.

        Raises:
            UserError: another process holds the lock.
        """
        self.__exit__()
        tries, claim = 0, self._path.with_name(".lock.new")
        name = f"process {os.getpid()} on {socket.gethostname()}"
        content = "\n".join([name, *_identify(os.getpid()), secrets.token_hex(8)])
        # Only the process that creates .lock.new may replace .lock, and only if .lock still is as it was found.
        while not self.is_held():
            found, tries = self._wait_until_free(), tries + 1
            if tries % 50 == 0:  # 5 s, where milliseconds are enough: the process that created it was killed
                claim.unlink(missing_ok=True)
            try:
                with naming(self.folder / ".lock"):
                    file = open(claim, "x", encoding="utf-8")  # noqa: SIM115 - closed below
            except FileExistsError:
                time.sleep(0.1)
                continue
            try:
                with naming(self.folder / ".lock"):
                    with file:
                        file.write(content)
                    self._content, _open_files[self] = content, open(claim, "r+b", buffering=0)  # noqa: SIM115
                    with contextlib.suppress(OSError):
                        flock(_open_files[self], LOCK_EX | LOCK_NB)
                    if _read_lock(self._path)[0] == found:
                        os.replace(claim, self._path)
            finally:
                if not self.is_held():
                    claim.unlink(missing_ok=True)
        self._stop = threading.Event()
        threading.Thread(target=self._send_heartbeats, args=(self._stop,), name="heartbeat", daemon=True).start()

    def _wait_until_free(self) -> str:
        """Return the content of the lock file, whose owner has ended. Raise UserError if it has not."""
        content, beat, running = _read_lock(self._path)
        owner = content.partition("\n")[0] or "another process"
        if running is None:
            wait = f"waiting {HEARTBEAT * BEATS:.0f} s for its heartbeat"
            print(f"{self.folder} is locked by {owner}: {wait}", file=sys.stderr)
        for _ in range(BEATS if running is None else 0):
            time.sleep(HEARTBEAT)
            now, latest, _ = _read_lock(self._path)
            if now != content:  # released, or taken over
                return self._wait_until_free()
            if running := latest != beat:
                break
        if running:
            text = f"{self.folder} is in use by {owner}: wait for it, stop it, or choose another {self.setting}"
            raise UserError(text)
        return content

    def _send_heartbeats(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if self.is_held():
                    os.utime(self._path)


_open_files: dict[FolderLock, IO] = {}  # locked with flock
if hasattr(os, "register_at_fork"):  # a forked process closes them; it would keep the lock of a parent that is killed
    os.register_at_fork(after_in_child=_open_files.clear)


def in_use(folder: Path) -> bool:
    """Whether a process has locked the folder. Writes nothing, and does not wait for a heartbeat."""
    with contextlib.suppress(OSError):
        _, beat, running = _read_lock(folder / ".lock")
        return time.time() - beat < 60 if running is None else running  # the clocks of machines differ
    return False


def _read_lock(path: Path) -> tuple[str, float, bool | None]:
    """Return a lock file's content and modification time, and whether its owner runs (None: the heartbeat tells)."""
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    except (FileNotFoundError, NotADirectoryError):
        return "", 0.0, False
    with file:
        content, beat = file.read(), os.fstat(file.fileno()).st_mtime  # of an open file, it is current also on NFS
        try:
            flock(file, LOCK_SH | LOCK_NB)
            not_locked = True
        except OSError as error:
            if isinstance(error, BlockingIOError):
                return content, beat, True
            not_locked = False  # a file system without flock
    _, machine, pid, started, *_ = content.split("\n") + [""] * 3
    if not pid.isdecimal():  # no owner, or one of an earlier version, which used flock only
        return content, beat, False
    here, _, now = _identify(int(pid))
    running = now == started and int(pid) != os.getpid()
    if machine != here or not now or (running and not_locked):  # a copy of a folder in use contains its lock file
        return content, beat, None
    return content, beat, running


def _identify(pid: int) -> tuple[str, str, str]:
    """Return identifiers of this machine and of a process, and when the process started.

    The machine's changes with each boot, and between containers. The start is `-` if the process has ended, and empty
    if it is not known.
    """
    machine, started = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    try:
        if os.name != "nt":  # there it would be Ctrl-C
            os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = "-" if fields[0] in "ZX" else fields[19]  # Z: a zombie
    except ProcessLookupError:
        started = "-"
    except OSError:  # no /proc, or a process of another user
        pass
    return machine, str(pid), started
