"""Read JSON, write files atomically, and lock folders. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import lzma
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from config import UserError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error  # an OSError would name the file again
        raise UserError(f"{file} is {wrong_kind(file) or 'damaged'}: {reason}; {remedy}") from None
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


@contextlib.contextmanager
def read_errors(path: Path):
    """Convert errors of reading a file to a UserError."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError, EOFError, lzma.LZMAError) as error:  # includes those of pyarrow
        remedy = "; if it is damaged or incomplete, move it away and download or copy it again"
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".") + remedy
        raise UserError(f"{path}: cannot be read: {reason}") from None


def write_json(figures: dict, target: str) -> None:
    """Write figures as JSON to a file, or to standard output for `-`. NaN and infinity become null.

    Raises:
        UserError: the file cannot be written; its previous content is kept.
    """
    finite = json.loads(json.dumps(figures), parse_constant=lambda name: None)
    text = json.dumps(finite, indent=1) + "\n"
    if target == "-":
        print(text, end="")
    else:
        write_output(text.encode(), target, "json")


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
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


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
        raise UserError(f"{key} = {target} cannot be written: {error.strerror}") from None


def require_writable(target: str | None, key: str, created: Path | None = None) -> None:
    """Raise UserError if write_output could not write to `target`. Called before long work.

    Args:
        created: a folder that the work creates where it does not exist yet.
    """
    if target in (None, "-") or _is_device(target):
        return
    folder = Path(target).resolve().parent
    if created and folder == created.resolve() and not folder.exists():
        return
    if not folder.is_dir():
        problem = f"there is no folder {Path(target).parent}"
    elif Path(target).is_dir():
        problem = "it is a folder"
    elif not os.access(folder, os.W_OK):
        problem = "no file can be created there"
    else:
        return
    raise UserError(f"{key} = {target} cannot be written, because {problem}; choose another")


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
        self._content, self._held = "", contextlib.ExitStack()

    def __exit__(self, *error) -> None:
        """Release the lock, except in a fork of the process that holds it."""
        if self._content.startswith(f"process {os.getpid()} "):
            self._held.close()
            with contextlib.suppress(OSError):
                if self.is_held():
                    self._path.unlink()
        self._content = ""

    def is_held(self) -> bool:
        """Whether the path still is the locked folder, which may have been renamed."""
        return self._content != "" and _read_lock(self._path)[0] == self._content

    def acquire(self) -> None:
        """Lock the folder. Call it inside `with`.

        Raises:
            UserError: another process holds the lock.
        """
        self.__exit__()
        tries, claim = 0, self._path.with_name(".lock.new")
        # Only the process that creates .lock.new may replace .lock, and only if .lock still is as it was found.
        while not self.is_held():
            found, tries = self._wait_until_free(), tries + 1
            if tries % 50 == 0:  # 5 s, where milliseconds are enough: the process that created it was killed
                claim.unlink(missing_ok=True)
            try:
                file = open(claim, "xb")  # noqa: SIM115 - closed below
            except FileExistsError:
                time.sleep(0.1)
                continue
            try:
                with naming(self.folder / ".lock"), file:
                    self._content = "\n".join([*_identify(os.getpid()), str(os.fstat(file.fileno()).st_ino)])
                    file.write(self._content.encode())
                if _read_lock(self._path)[0] == found:
                    os.replace(claim, self._path)
            finally:
                if not self.is_held():
                    claim.unlink(missing_ok=True)
        if fcntl:
            with contextlib.suppress(OSError):
                file = self._held.enter_context(self._path.open("r+b"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        released = threading.Event()
        self._held.callback(released.set)
        threading.Thread(target=self._send_heartbeats, args=(released,), name="heartbeat", daemon=True).start()

    def move_aside(self) -> Path:
        """Rename the locked folder to <folder>.old-<time>, lock an empty one in its place, and return the old one.

        Raises:
            UserError: the current folder is in it.
        """
        if Path.cwd().is_relative_to(self.folder.resolve()):
            problem = f"overwrite: {self.folder} contains the current folder and is not renamed"
            raise UserError(f"{problem}; choose another {self.setting}")
        name = f"{self.folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        old = next(path for path in map(self.folder.with_name, names) if not path.exists())
        os.rename(self.folder, old)
        (old / ".lock").unlink()
        self.folder.mkdir()
        self.acquire()
        return old

    def _wait_until_free(self) -> str:
        """Return the content of the lock file, whose owner has ended. Raise UserError if it has not."""
        content, beat, running = _read_lock(self._path)
        owner = content.partition("\n")[0] or "another process"
        if running is None:
            wait = f"waiting {HEARTBEAT * BEATS:.0f} s for its heartbeat"
            print(f"{self.folder} is locked by {owner}: {wait}", file=sys.stderr)
            for _ in range(BEATS):
                time.sleep(HEARTBEAT)
                now, latest, _ = _read_lock(self._path)
                if (now, latest) != (content, beat):
                    running = now == content  # otherwise it was released, or taken over
                    break
        if running:
            text = f"{self.folder} is in use by {owner}: wait for it, stop it, or choose another {self.setting}"
            raise UserError(text)
        return content

    def _send_heartbeats(self, released: threading.Event) -> None:
        while not released.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if self.is_held():
                    os.utime(self._path)


def in_use(folder: Path) -> bool:
    """Whether a process has locked the folder. Writes nothing, and does not wait for a heartbeat."""
    _, beat, running = _read_lock(folder / ".lock")
    return abs(time.time() - beat) < 60 if running is None else running  # the clocks of machines differ


def _read_lock(path: Path) -> tuple[str, float, bool | None]:
    """Return a lock file's content and modification time, and whether its owner runs (None: the heartbeat tells)."""
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    except (FileNotFoundError, NotADirectoryError):
        return "", 0.0, False
    with file:
        content, status = file.read(), os.fstat(file.fileno())  # of an open file, it is current also on NFS
        if owner := re.fullmatch(r"(process (\d{1,9}) on .*\n.*)\n(.*)\n(\d+)", content):
            process, started = _identify(int(owner[2]))
            running, is_copy = started == owner[3], owner[4] != str(status.st_ino)  # a copy of a folder in use
            if process == owner[1] and started and not (running and is_copy):
                return content, status.st_mtime, running
        running = None if owner else False  # earlier versions used flock only
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # others: a file system without flock
            running = True if isinstance(error, BlockingIOError) else running
    return content, status.st_mtime, running


def _identify(pid: int) -> tuple[str, str]:
    """Return a name of the process with its machine, in two lines, and when it started.

    The machine's identifier changes with each boot, and between containers. The start is `-` if the process has ended,
    and empty if it is not known.
    """
    name, started = f"process {pid} on {socket.gethostname()}\n", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        name += f"{boot} {os.readlink('/proc/self/ns/pid')}"
    try:
        if os.name != "nt":  # there it would be Ctrl-C
            os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = "-" if fields[0] in "ZX" else fields[19]  # Z: a zombie
    except ProcessLookupError:
        started = "-"
    except OSError:  # no /proc, or a process of another user
        pass
    return name, started
