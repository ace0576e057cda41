"""Save, find, verify and load checkpoints.

out/<run>/ckpt/iter_000500/ has model.safetensors, train_state.pt and state.json. state.json is written last. It holds
size and SHA-256 of the other files, and its own SHA-256; a folder without a valid state.json is not a checkpoint.
`ckpt/last` and `ckpt/best` are relative symlinks, or files with the folder's name where none can be made. Nothing is
unpickled: weights are safetensors, and train_state.pt is read with weights_only=True.
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
    """A checkpoint whose files are not as they were written. The message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# saving


def save(
    run_dir: Path, state: dict, weights: dict[str, Tensor], train_state: dict, keep: int, keep_every: int | None = None
) -> Path:
    """Write a checkpoint, set `last` to it, and delete those that need not be kept.

    Args:
        state: the content of state.json, with `iter`. Format and files are added.
        weights: state dict of the raw model, not of a compiled or wrapped one.
        train_state: tensors and plain types, for resuming.
        keep: number of the newest checkpoints to keep, besides `best`.
        keep_every: keep all checkpoints whose iteration is a multiple of it.

    Returns:
        the checkpoint's folder.

    Raises:
        UserError: it could not be written. Earlier checkpoints are untouched.
    """
    folder, file = run_dir / "ckpt" / _name(state["iter"]), WEIGHTS
    partial = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, partial / WEIGHTS)
        file = TRAIN_STATE
        torch.save(train_state, partial / TRAIN_STATE)
        (partial / WEIGHTS).chmod((partial / TRAIN_STATE).stat().st_mode)  # safetensors makes it readable for its owner
        files = {name: fingerprint(partial / name) for name in (WEIGHTS, TRAIN_STATE)}
        file = STATE
        atomic_write(partial / STATE, state_file({"format": FORMAT, **state, "files": files}))
        for file in (*files, "."):
            _flush(partial / file)
        if folder.exists():  # a damaged one: a valid one would have been resumed
            move_aside(folder, "in the way of a new one")
        os.rename(partial, folder)
        _flush(folder.parent)
        set_link(run_dir, "last", state["iter"])
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
        if "inline_container" in reason:  # torch's "unexpected pos 64 vs 0"
            reason = "only a part of it was taken: a full disk, a quota or a limit of file sizes"
        needed, free = _num_bytes([weights, train_state]), shutil.disk_usage(run_dir).free if run_dir.exists() else 0
        raise UserError(
            f"checkpoint {folder} could not be written: {file}: {reason}. {needed / 1e6:,.1f} MB are needed, "
            f"{free / 1e6:,.1f} MB are free now. Still there: "
            f"{', '.join(path.name for path in checkpoints(run_dir)) or 'none'}. "
            "Make room; a run that ended goes on with --resume"
        ) from None
    linked = {follow(run_dir / "ckpt" / name).resolve() for name in ("last", "best")}
    for old in checkpoints(run_dir)[keep:]:
        if old.resolve() in linked or (keep_every and read_state(old)["iter"] % keep_every == 0):
            continue
        try:
            os.rename(old, partial)  # first, so that a half-deleted folder does not look like a checkpoint
            shutil.rmtree(partial)
        except OSError as error:  # on a network disk, another process may be reading it
            print(f"warning: {old} is no longer needed but cannot be deleted: {error.strerror}", file=sys.stderr)
    return folder


def _num_bytes(value) -> int:
    if isinstance(value, dict | list):
        return sum(map(_num_bytes, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, Tensor) else 0


def move_aside(folder: Path, reason: str) -> None:
    """Move a checkpoint to ckpt/lost-<time>/. Nothing is deleted."""
    lost = folder.parent / f"lost-{time.strftime('%Y%m%d-%H%M%S')}"
    lost.mkdir(exist_ok=True)
    os.rename(folder, lost / folder.name)
    print(f"{folder}, {reason}, is now in {lost}")


def mark_finished(folder: Path) -> None:
    """Record in a checkpoint's state.json that its run has ended, if that was decided after it was written."""
    folder = follow(folder)
    if state := read_state(folder):
        atomic_write(folder / STATE, state_file({**state, "finished": True}))


def state_file(state: dict) -> bytes:
    """Return the content of state.json: the state and its SHA-256."""
    return json.dumps({**state, "sha256": _hash(state)}, indent=1).encode()


def _hash(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def set_link(run_dir: Path, name: str, iteration: int) -> bool:
    """Atomically point the symlink ckpt/<name> at the checkpoint of an iteration.

    Returns:
        whether that checkpoint exists. If not, the link is removed.
    """
    link, partial = run_dir / "ckpt" / name, run_dir / "ckpt" / f".{name}.tmp"
    if read_state(run_dir / "ckpt" / _name(iteration)) is None:
        link.unlink(missing_ok=True)
        return False
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(_name(iteration))
    except OSError:  # a file system without symlinks; `follow` reads the file
        partial.write_text(_name(iteration))
    os.replace(partial, link)
    return True


def _name(iteration: int) -> str:
    return f"iter_{iteration:06d}"


def fingerprint(path: Path) -> dict:
    """Return a file's size and SHA-256."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# finding


def read_state(folder: Path) -> dict | None:
    """Return the content of a checkpoint's state.json, or None if it is missing or not valid."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        written = state.pop("sha256", None)  # earlier versions wrote none
        valid = {"format", "iter", "config", "files"} <= set(state) and isinstance(state["files"], dict)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    return state if valid and written in (None, _hash(state)) else None


def folders(path: Path) -> list[Path]:
    """Return a run's checkpoint folders, newest first, damaged ones too; or the checkpoint itself that has this path.

    A copy, iter_000500.old, is ignored.
    """
    if (path / STATE).exists():
        return [path.resolve()]
    found = [folder for folder in path.glob("ckpt/iter_*") if folder.name.removeprefix("iter_").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("iter_")), reverse=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's folders with a valid state.json, newest first."""
    return [folder for folder in folders(run_dir) if read_state(folder)]


def verify(folder: Path, names: tuple[str, ...] = (WEIGHTS, TRAIN_STATE)) -> dict:
    """Check these files of a checkpoint and return its state.

    Raises:
        DamagedCheckpointError: no valid state.json, or a file with another size or SHA-256.
        UserError: the format of another version.
    """
    state = read_state(folder)
    if state is None:
        raise DamagedCheckpointError(f"{folder / STATE} is missing or damaged")
    if state["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {state['format']}, this version reads {FORMAT}")
    for name in names:
        try:
            found = fingerprint(folder / name)
        except OSError as error:  # a bad sector, for example
            raise DamagedCheckpointError(f"{folder / name} cannot be read: {error.strerror}") from None
        if found != state["files"].get(name):
            raise DamagedCheckpointError(f"{folder / name} is damaged: its SHA-256 is not the one in state.json")
    return state


def first_valid(folders: list[Path], names: tuple[str, ...], log: Callable[[str], None]) -> tuple[Path, dict] | None:
    """Return the first checkpoint whose files are valid, with its state. Warn about each damaged one before it."""
    for folder in folders:
        try:
            return folder, verify(folder, names)
        except DamagedCheckpointError as error:
            log(f"warning: {error}; it is skipped")
    return None


def find(model_path: str | None, log: Callable[[str], None]) -> tuple[Path, dict]:
    """Find and verify the checkpoint that --model_path names. Returns its folder and its state.

    Args:
        model_path: the folder of a run (its `best`, else its `last`) or of a checkpoint. None: the newest run.

    Raises:
        UserError: nothing there, or nothing undamaged.
    """
    path = newest(file="ckpt/last") if model_path is None else Path(model_path)
    path = path.parent if path.name == WEIGHTS else follow(path)
    linked = [follow(path / "ckpt" / name) for name in ("best", "last")]
    candidates = [folder.resolve() for folder in (*linked, *folders(path)) if folder.exists()]
    found = first_valid(list(dict.fromkeys(candidates)), (WEIGHTS,), log)
    if found is None:
        raise UserError(f"model_path {path}: there is no usable checkpoint")
    return path if (path / STATE).exists() else path / "ckpt" / found[0].name, found[1]


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_weights(
    model: GPT, folder: Path, assign: bool = False, convert: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Load a checkpoint's weights into a model of the same shape.

    Args:
        assign: replace the model's tensors instead of copying into them.
        convert: called with a whole tensor and the model's tensor of that name; returns what is loaded, a shard for
            example.

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


def load_train_state(folder: Path, mmap: bool = False) -> dict:
    """Load the train_state that `save` wrote. Only tensors and plain types are unpickled.

    Args:
        mmap: read only the parts that are used.

    Raises:
        UserError: the file holds something else, or is no such file.
    """
    try:
        state = torch.load(folder / TRAIN_STATE, map_location="cpu", weights_only=True, mmap=mmap)
        valid = isinstance(state, dict) and {"optimizer", "scaler", "row"} <= set(state)
    except (pickle.UnpicklingError, RuntimeError, EOFError):  # torch's text explains how to load it anyway
        valid = False
    if not valid:
        raise UserError(f"{folder / TRAIN_STATE} is not loaded: it is no train state of tensors and plain types")
    return state
