"""Write files atomically. Standard library only."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from config import UserError


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
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it: no reader sees a part of it."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_output(content: bytes, target: str, key: str) -> None:
    """Write the file that a setting names. Pipes and devices are written to directly. Raises as write_json."""
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
    """Raise UserError if write_output could not write there: before hours of work instead of after."""
    if target in (None, "-") or _is_device(target):
        return
    folder = Path(target).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(target).is_dir():
        raise UserError(f"{key} = {target}: cannot be written: no file can be made there")


def _is_device(target: str) -> bool:
    return target.startswith("/dev/") or Path(target).is_fifo()
