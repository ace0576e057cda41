"""Save, find, verify and load checkpoints.

A checkpoint out/<run>/ckpt/iter_000500/ has model.safetensors, train_state.pt and state.json. state.json is written
last. It contains its own SHA-256, and the size and SHA-256 of the other files; a folder without a valid state.json is
not a checkpoint. `ckpt/last` and `ckpt/best` are relative symlinks or, on file systems without symlinks, files that
contain the folder's name. No arbitrary objects are unpickled: train_state.pt is read with weights_only=True.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import UserError
from flatgpt.runs.history import STATE, follow, newest
from flatgpt.runtime.files import atomic_write
from model import GPT

FORMAT = 1
WEIGHTS, TRAIN_STATE = "model.safetensors", "train_state.pt"


class DamagedCheckpointError(Exception):
    """A checkpoint file is missing or damaged. The message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# saving


def save(
    run_dir: Path, state: dict, weights: dict[str, Tensor], train_state: dict, keep: int, keep_every: int | None = None
) -> Path:
    """Write a checkpoint, point `last` to it, and delete old checkpoints.

    Args:
        state: content of state.json, including `iter`; `format` and `files` are added.
        weights: state dict of the unwrapped, uncompiled model.
        train_state: tensors and plain types, for resuming.
        keep: number of newest checkpoints to keep, besides `best`.
        keep_every: also keep all checkpoints whose iteration is a multiple of this.

    Returns:
        the checkpoint's folder.

    Raises:
        UserError: the checkpoint could not be written. Earlier checkpoints are unchanged.
    """
    folder, file = run_dir / "ckpt" / _folder_name(state["iter"]), WEIGHTS
    partial = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, partial / WEIGHTS)
        file = TRAIN_STATE
        torch.save(train_state, partial / TRAIN_STATE)
        (partial / WEIGHTS).chmod((partial / TRAIN_STATE).stat().st_mode)  # safetensors makes it owner-only
        files = {name: fingerprint(partial / name) for name in (WEIGHTS, TRAIN_STATE)}
        file = STATE
        atomic_write(partial / STATE, state_file({"format": FORMAT, **state, "files": files}))
        for file in (*files, "."):
            _fsync(partial / file)
        if folder.exists():  # it is damaged: the run would have resumed from a valid one
            move_aside(folder, "which a new checkpoint replaces")
        os.rename(partial, folder)
        _fsync(folder.parent)
        set_link(run_dir, "last", state["iter"])
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        if "inline_container" in reason:  # torch's "unexpected pos 64 vs 0"
            reason = "incomplete write: the disk is full, or a quota or file size limit is reached"
        needed, free = _num_bytes([weights, train_state]), shutil.disk_usage(run_dir).free if run_dir.exists() else 0
        raise UserError(
            f"checkpoint {folder} could not be written: {file}: {reason}. {needed / 1e6:,.1f} MB are needed, "
            f"{free / 1e6:,.1f} MB are free now. Existing checkpoints: "
            f"{', '.join(path.name for path in checkpoints(run_dir)) or 'none'}. "
            "Free disk space; if the run has stopped, resume it with --resume"
        ) from None
    linked = {follow(run_dir / "ckpt" / name).resolve() for name in ("last", "best")}
    for old in checkpoints(run_dir)[keep:]:
        if old.resolve() in linked or (keep_every and read_state(old)["iter"] % keep_every == 0):
            continue
        try:
            os.rename(old, partial)  # so that a partly deleted folder is not taken for a checkpoint
            shutil.rmtree(partial)
        except OSError as error:  # on a network file system, another process may be reading it
            print(f"warning: {old} is no longer needed but cannot be deleted: {error.strerror}", file=sys.stderr)
    return folder


def _num_bytes(value) -> int:
    if isinstance(value, dict | list):
        return sum(map(_num_bytes, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, Tensor) else 0


def move_aside(folder: Path, reason: str) -> None:
    """Move a checkpoint to ckpt/lost-<time>/, without deleting anything.

    Args:
        reason: for the printed message, which begins with "<folder>, <reason>,".
    """
    lost = folder.parent / f"lost-{time.strftime('%Y%m%d-%H%M%S')}"
    lost.mkdir(exist_ok=True)
    os.rename(folder, lost / folder.name)
    print(f"{folder}, {reason}, was moved to {lost}")


def mark_finished(folder: Path) -> None:
    """Set `finished` in the state.json of a checkpoint that was saved before its run was known to be finished."""
    folder = follow(folder)
    if state := read_state(folder):
        atomic_write(folder / STATE, state_file({**state, "finished": True}))


def state_file(state: dict) -> bytes:
    """Return the content of state.json: the state and its SHA-256."""
    return json.dumps({**state, "sha256": _hash(state)}, indent=1).encode()


def _hash(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def set_link(run_dir: Path, name: str, iteration: int) -> bool:
    """Atomically point the symlink ckpt/<name> to the checkpoint of an iteration.

    Returns:
        whether this checkpoint exists. If not, the link is removed.
    """
    link, partial = run_dir / "ckpt" / name, run_dir / "ckpt" / f".{name}.tmp"
    if read_state(run_dir / "ckpt" / _folder_name(iteration)) is None:
        link.unlink(missing_ok=True)
        return False
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(_folder_name(iteration))
    except OSError:  # a file system without symlinks; `follow` reads the file
        partial.write_text(_folder_name(iteration))
    os.replace(partial, link)
    return True


def _folder_name(iteration: int) -> str:
    return f"iter_{iteration:06d}"


def fingerprint(path: Path) -> dict:
    """Return a file's size in bytes and its SHA-256."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# finding


def read_state(folder: Path) -> dict | None:
    """Return the content of a checkpoint's state.json; None if it is missing or invalid."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        saved_hash = state.pop("sha256", None)  # earlier versions did not write one
        valid = {"format", "iter", "config", "files"} <= set(state) and type(state["iter"]) is int
        valid = valid and all(isinstance(state[key], dict) for key in ("config", "files"))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    return state if valid and saved_hash in (None, _hash(state)) else None


def folders(path: Path) -> list[Path]:
    """Return a run's checkpoint folders, newest first, including damaged ones; for a checkpoint's path, only this one.

    Other folders, such as iter_000500.old, are ignored.
    """
    if (path / STATE).exists():
        return [path.resolve()]
    found = [folder for folder in path.glob("ckpt/iter_*") if folder.name.removeprefix("iter_").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("iter_")), reverse=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoint folders with a valid state.json, newest first."""
    return [folder for folder in folders(run_dir) if read_state(folder)]


def verify(folder: Path, names: tuple[str, ...] = (WEIGHTS, TRAIN_STATE)) -> dict:
    """Verify the given files of a checkpoint and return its state.

    Raises:
        DamagedCheckpointError: state.json is not valid, or the size or SHA-256 of a file does not match.
        UserError: the checkpoint has the format of another version.
    """
    state = read_state(folder)
    if state is None:
        raise DamagedCheckpointError(f"{folder / STATE} is missing or damaged")
    if state["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {state['format']} is not supported, only format {FORMAT}")
    for name in names:
        try:
            found = fingerprint(folder / name)
        except OSError as error:  # for example a bad sector
            raise DamagedCheckpointError(f"{folder / name} cannot be read: {error.strerror}") from None
        if found != state["files"].get(name):
            raise DamagedCheckpointError(f"{folder / name} is damaged: its SHA-256 differs from the one in state.json")
    return state


def first_valid(folders: list[Path], names: tuple[str, ...], log: Callable[[str], None]) -> tuple[Path, dict] | None:
    """Return the first valid checkpoint and its state; None if all are damaged. Log a warning for each damaged one."""
    for folder in folders:
        try:
            return folder, verify(folder, names)
        except DamagedCheckpointError as error:
            log(f"warning: {error}; it is skipped")
    return None


def find(model_path: str | None, log: Callable[[str], None]) -> tuple[Path, dict]:
    """Find and verify the checkpoint at `model_path`. Return its folder and its state.

    Args:
        model_path: folder of a checkpoint or of a run (its `best`, else its `last`); None: the newest run.

    Raises:
        UserError: the path has no undamaged checkpoint.
    """
    path = newest(file="ckpt/last") if model_path is None else Path(model_path)
    path = path.parent if path.name == WEIGHTS else follow(path)
    linked = [follow(path / "ckpt" / name) for name in ("best", "last")]
    candidates = [folder.resolve() for folder in (*linked, *folders(path)) if folder.exists()]
    found = first_valid(list(dict.fromkeys(candidates)), (WEIGHTS,), log)
    if found is None:
        raise UserError(f"model_path = {path}: no usable checkpoint")
    return path if (path / STATE).exists() else path / "ckpt" / found[0].name, found[1]


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_weights(
    model: GPT, folder: Path, assign: bool = False, convert: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Load a checkpoint's weights into a model of the same shape.

    Args:
        assign: replace the model's tensors instead of copying into them.
        convert: called with each full tensor and the model's tensor of the same name; returns the tensor to load, for
            example a shard.

    Raises:
        UserError: the weights do not fit the model.
    """
    try:
        weights, current = load_file(folder / WEIGHTS), model.state_dict()
        if convert:
            weights = {name: convert(t, current[name]) if name in current else t for name, t in weights.items()}
        model.load_state_dict(weights, assign=assign)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} does not fit its config: {str(error).splitlines()[-1].strip()}") from None


def load_train_state(folder: Path) -> dict:
    """Load the train_state that `save` wrote. Only tensors and plain types are unpickled.

    The tensors are mapped from the file: the ranks of a machine share one copy in memory, and read only what they use.
    Copy a tensor to keep it.

    Raises:
        UserError: the file is not a valid train state.
    """
    try:
        state = torch.load(folder / TRAIN_STATE, map_location="cpu", weights_only=True, mmap=True)
        valid = isinstance(state, dict) and {"optimizer", "scaler", "row"} <= set(state)
    except (pickle.UnpicklingError, RuntimeError, EOFError):  # torch's message advises weights_only=False
        valid = False
    if not valid:
        raise UserError(f"{folder / TRAIN_STATE} is not loaded: it is not a train state of tensors and plain types")
    return state
