"""Write files atomically. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from config import UserError

CANNOT_FLUSH = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


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


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it, so that no reader sees a partial file."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(content)
    fsync(partial)
    os.replace(partial, path)


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk. Does nothing where the file system has no such call, for example for folders.

    Raises:
        OSError: the flush failed; the error names the path.
    """
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def write_output(content: bytes, target: str, key: str) -> None:
    """Write `content` to the file of the setting `key`, atomically unless it is a pipe or device.

    Raises:
        UserError: as in write_json.
    """
    path = Path(target).resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # train.py and plot.py --watch share a file
    try:
        if _is_device(target):
            Path(target).write_bytes(content)
        else:
            partial.write_bytes(content)
            os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
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
