"""Resumable preparation state, and the dataset folder's lock.

progress.json names the task after which the shards were last known to be good: the next call truncates them to that and
continues. It is removed when meta.json, the manifest of a finished dataset, is written.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from config import PrepareConfig, UserError
from flatgpt.data.dataset import PROGRESS
from flatgpt.data.readers import Corpus
from flatgpt.data.shards import OUR_FILES

RESUMABLE = "what is done is kept, and the same command goes on from there"


def check_settings(folder: Path, what: str, found: dict, settings: dict) -> None:
    """Raise UserError, naming them, where settings differ from those of the dataset in the folder."""
    found = {"encoder": "tiktoken", **found}  # earlier versions knew no other
    differing = [f"{key} {found.get(key)} (now {v})" for key, v in settings.items() if found.get(key) != v]
    if differing:
        raise UserError(
            f"{folder} already holds {what} of other settings: {'; '.join(differing)}. "
            f"Give this one a name of its own with --name, or move {folder} away"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and lock it against a second call; remove it again if it is still empty."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror}; another place: --data_dir") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it, also after kill -9
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another prepare_data.py is at work in this folder; wait for it") from None
    finally:
        os.close(handle)
        with suppress(OSError):
            for path in created:
                path.rmdir()


def read_progress(folder: Path, config: PrepareConfig, settings: dict, corpus: Corpus) -> dict:
    """Return the state of the work in this folder, or the state of a new one.

    Raises:
        UserError: other settings, other raw files, or shards that flatGPT did not write.
    """
    raw = json.dumps([[file.name, file.size] for group in corpus.files.values() for file in group])
    fresh = {
        # how files are cut into tasks: work is continued only where the tasks are the same
        "tasks": 2 if config.sample_size else 1,
        "command": command_line(config),
        "settings": settings,
        "raw": hashlib.sha256(raw.encode()).hexdigest(),
        "passes": {},
        "splits": {},
        "cuts": 0,
    }
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        if not any(split["files"] for split in found["splits"].values()) and any(
            found[key] != fresh[key] for key in ("tasks", "settings", "raw")
        ):
            return fresh  # no shard is finished: nothing is lost
        check_settings(folder, "an unfinished dataset", found["settings"], settings)
        if found["tasks"] != fresh["tasks"]:
            raise UserError(f"{folder}: another version of flatGPT began this dataset: move {folder} away")
        if found["raw"] != fresh["raw"]:
            raise UserError(f"{folder}: the raw files changed since this dataset was begun: move {folder} away")
        return {**found, "command": fresh["command"]}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / PROGRESS} is damaged: move {folder} away and run again") from None
    others = [path.name for path in folder.glob("*.bin") if not OUR_FILES.fullmatch(path.name)]
    if others:
        raise UserError(f"{folder} holds other shards ({', '.join(sorted(others)[:3])}): give --name, or move it away")
    return fresh


def command_line(config: PrepareConfig) -> str:
    """Return the command line of this config."""
    words = ["python", "prepare_data.py", config.source]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "source" and value != field.default:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def remove_unfinished(folder: Path) -> None:
    """Remove the files of an unfinished dataset."""
    for path in [*folder.glob("*.bin"), *folder.glob("*.tmp"), folder / PROGRESS]:
        if OUR_FILES.fullmatch(path.name) or path.name.startswith(PROGRESS):
            path.unlink(missing_ok=True)


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn errors of writing there into a UserError."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or folder} could not be written: {error.strerror}"
        raise UserError(f"{what}; not finished: {RESUMABLE}") from None


def done_bytes(progress: dict) -> int:
    """Return the bytes of text that are done."""
    return sum(state["size"] for state in progress["passes"].values())
