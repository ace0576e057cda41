"""How far the making of a dataset came: its folder's lock, progress.json, and what is in the way.

progress.json says after which task the shards were last known good: the next call cuts them back to that and goes on.
It is removed when meta.json is there, the manifest of a finished dataset.
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

TASKS = 1  # how files are cut into tasks; another number cannot go on from the same place
KEPT = "what is done is kept, and the same command goes on from there"


def check_settings(folder: Path, what: str, there: dict, settings: dict) -> None:
    differing = [f"{k} {there.get(k)} (now {v})" for k, v in settings.items() if there.get(k) != v]
    if differing:
        raise UserError(
            f"{folder} already holds {what} of other settings: {'; '.join(differing)}. "
            f"Give this one a name of its own with --name, or move {folder} away"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made and locked against a second call; removed again if nothing came into it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as why:
        raise UserError(f"{folder} could not be written: {why.strerror}; another place: --data_dir") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it, also after kill -9
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another prepare_data.py is at work in this folder; wait for it") from None
    finally:
        os.close(handle)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def read_progress(folder: Path, config: PrepareConfig, settings: dict, corpus: Corpus) -> dict:
    """How far the work in this folder came; a fresh start where there is none.

    Raises:
        UserError: other settings, other raw files, or other people's files.
    """
    raw = json.dumps([[file.name, file.size] for group in corpus.files.values() for file in group])
    fresh = {
        "tasks": TASKS,
        "command": again(config),
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
            return fresh  # not one shard was finished: nothing is lost by starting anew
        check_settings(folder, "an unfinished dataset", found["settings"], settings)
        if found["tasks"] != TASKS:
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


def again(config: PrepareConfig) -> str:
    """The command line that gives this config."""
    words = ["python", "prepare_data.py", config.source]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "source" and value != field.default:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def remove_unfinished(folder: Path) -> None:
    """Remove what prepare wrote into a folder that has no manifest."""
    for path in [*folder.glob("*.bin"), *folder.glob("*.tmp"), folder / PROGRESS]:
        if OUR_FILES.fullmatch(path.name) or path.name.startswith(PROGRESS):
            path.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the system says against writing there, as UserError."""
    try:
        yield
    except OSError as why:
        what = f"{why.filename or folder} could not be written: {why.strerror}"
        raise UserError(f"{what}; not finished: {KEPT}") from None


def done_bytes(progress: dict) -> int:
    """Bytes of text that are done."""
    return sum(state["size"] for state in progress["passes"].values())
