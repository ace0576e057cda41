"""Save, find, verify and load: `out/<run>/ckpt/iter_000500/` with model.safetensors, train_state.pt and state.json.

state.json, written last, holds size and SHA-256 of the other two, and its own: a folder without a valid one is none.
`ckpt/last` and `ckpt/best` are relative symlinks, replaced by rename. Nothing here unpickles: weights are safetensors,
train_state.pt is read with weights_only=True.
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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import UserError
from flatgpt.runtime.files import atomic_write
from model import GPT

FORMAT = 1
WEIGHTS, TRAIN_STATE, STATE = "model.safetensors", "train_state.pt", "state.json"


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what was written; the message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# saving


def save(
    run_dir: Path, state: dict, weights: dict[str, Tensor], train_state: dict, keep: int, keep_every: int | None = None
) -> Path:
    """Write one checkpoint and move `last` to it; of the others keep the newest K - 1, `best`, and every N-th.

    Args:
        run_dir: the run's folder.
        state: what state.json says, `iter` among it; format and files are added here.
        weights: of the raw module, never of a compiled or wrapped one.
        train_state: tensors and plain types, for resuming.
        keep: how many of the newest checkpoints stay.
        keep_every: those whose iteration is a multiple of it stay too.

    Returns:
        the checkpoint's folder.

    Raises:
        UserError: it could not be written; what was there before is untouched.
    """
    folder, writing = run_dir / "ckpt" / _name(state["iter"]), WEIGHTS
    partial = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, partial / WEIGHTS)
        writing = TRAIN_STATE
        torch.save(train_state, partial / TRAIN_STATE)
        (partial / WEIGHTS).chmod((partial / TRAIN_STATE).stat().st_mode)  # safetensors lets nobody else read it
        files = {name: fingerprint(partial / name) for name in (WEIGHTS, TRAIN_STATE)}
        writing = STATE
        write_state(partial, {"format": FORMAT, **state, "files": files})
        for writing in (*files, "."):
            _flush(partial / writing)
        if folder.exists():  # damaged, else the run would have gone on from there
            move_aside(folder, "in the way of a new one")
        os.rename(partial, folder)
        _flush(folder.parent)
        point(run_dir, "last", state["iter"])
    except (OSError, RuntimeError, SafetensorError) as why:
        reason = why.strerror if isinstance(why, OSError) and why.strerror else (str(why).splitlines() or [""])[0]
        if "inline_container" in reason:  # torch's "unexpected pos 64 vs 0"
            reason = "only a part of it was taken: a full disk, a quota or a limit of file sizes"
        size, partly = _size([weights, train_state]), sum(path.stat().st_size for path in partial.glob("*"))
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(run_dir).free if run_dir.exists() else 0
        there = ", ".join(f"iter {read_state(p)['iter']}" for p in checkpoints(run_dir))
        raise UserError(
            f"checkpoint {folder} could not be written: {writing}: {reason}. {size / 1e6:,.1f} MB are needed, "
            f"{partly / 1e6:,.1f} MB were written, {free / 1e6:,.1f} MB are free now. "
            f"Still there: {there or 'none'}. Make room; a run that ended goes on with --resume"
        ) from None
    linked = {(run_dir / "ckpt" / name).resolve() for name in ("last", "best")}
    for old in checkpoints(run_dir)[keep:]:
        if old.resolve() not in linked and not (keep_every and read_state(old)["iter"] % keep_every == 0):
            try:
                os.rename(old, partial)  # first: half a folder must not look like a checkpoint
                shutil.rmtree(partial)
            except OSError as why:  # somebody reads it on a network's disk, say
                print(f"warning: {old}, which is not needed any more, stays: {why.strerror}", file=sys.stderr)
    return folder


def _size(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, Tensor) else 0


def move_aside(folder: Path, why: str) -> None:
    """Move a checkpoint to ckpt/lost-<time>/ beside it: nothing is deleted."""
    lost = folder.parent / f"lost-{time.strftime('%Y%m%d-%H%M%S')}"
    lost.mkdir(exist_ok=True)
    os.rename(folder, lost / folder.name)
    print(f"{folder}, {why}, is now in {lost}")


def mark_finished(folder: Path) -> None:
    """Have a checkpoint's state.json say that its run is over, where that was decided after it was written."""
    if state := read_state(folder):
        write_state(folder, {**state, "finished": True})


def write_state(folder: Path, state: dict) -> None:
    atomic_write(folder / STATE, state_file(state))


def state_file(state: dict) -> bytes:
    """The content of state.json: the state, and its own SHA-256."""
    return json.dumps({**state, "sha256": _hash(state)}, indent=1).encode()


def _hash(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def point(run_dir: Path, name: str, iteration: int) -> bool:
    """Make the symlink ckpt/<name> lead to the checkpoint of an iteration; it is never half written.

    Returns:
        whether that checkpoint is there; where it is not, the link is removed.
    """
    target, link = run_dir / "ckpt" / name, run_dir / "ckpt" / f".{name}.tmp"
    if read_state(run_dir / "ckpt" / _name(iteration)) is None:
        target.unlink(missing_ok=True)
        return False
    link.unlink(missing_ok=True)
    link.symlink_to(_name(iteration))
    os.replace(link, target)
    return True


def _name(iteration: int) -> str:
    return f"iter_{iteration:06d}"


def fingerprint(path: Path) -> dict:
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
    """A checkpoint's state.json, None where there is no valid one."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(state, dict) or not {"format", "iter", "config", "files"} <= set(state):
        return None
    if not isinstance(state["files"], dict) or not isinstance(state["config"], dict):
        return None
    written = state.pop("sha256", None)  # earlier versions wrote none
    return state if written in (None, _hash(state)) else None


def folders(run_dir: Path) -> list[Path]:
    """The run's folders of checkpoints, newest first, damaged ones too; a copy, iter_000500.old, is none."""
    found = [p for p in run_dir.glob("ckpt/iter_*") if p.name.removeprefix("iter_").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("iter_")), reverse=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """Those with a valid state.json."""
    return [folder for folder in folders(run_dir) if read_state(folder)]


def verify(folder: Path, names: tuple[str, ...] = (WEIGHTS, TRAIN_STATE)) -> dict:
    """The state of a checkpoint whose files are as they were written.

    Raises:
        DamagedCheckpointError: no valid state.json, or a file with another size or SHA-256.
        UserError: a format of another version.
    """
    state = read_state(folder)
    if state is None:
        raise DamagedCheckpointError(f"{folder / STATE} is missing or damaged")
    if state["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {state['format']}, this version reads {FORMAT}")
    for name in names:
        try:
            if fingerprint(folder / name) != state["files"].get(name):
                raise DamagedCheckpointError(
                    f"{folder / name} is damaged: its size or SHA-256 is not the one in state.json"
                )
        except OSError as why:  # a bad sector, say
            raise DamagedCheckpointError(f"{folder / name} is missing or cannot be read: {why.strerror}") from None
    return state


def first_valid(folders: list[Path], names: tuple[str, ...], say: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The first checkpoint that verifies, with its state; damaged ones are named and passed over."""
    for folder in folders:
        try:
            return folder, verify(folder, names)
        except DamagedCheckpointError as why:
            say(f"warning: {why}; trying the checkpoint before it")
    return None


def find(model_path: str | None, say: Callable[[str], None], runs: Path = Path("out")) -> tuple[Path, dict]:
    """The checkpoint that --model_path means, verified, with its state.

    A run's folder means its `best`, else its `last`; a checkpoint's folder means itself; None means the newest run.

    Raises:
        UserError: nothing there, or nothing undamaged.
    """
    if model_path is None:
        marks = sorted(runs.glob("*/ckpt/last"), key=lambda p: p.lstat().st_mtime)
        if not marks:
            raise UserError(f"no run in {runs}/ yet: train one (python train.py), or name one with --model_path")
        path = marks[-1].parent.parent
    else:
        path = Path(model_path)
    path = path.parent if path.name == WEIGHTS else path
    if not path.exists():
        raise UserError(f"model_path {path}: no such folder; a run's folder (out/NAME) or a checkpoint is expected")
    if (path / STATE).exists() or not (path / "ckpt").is_dir():
        try:
            return path, verify(path, (WEIGHTS,))
        except DamagedCheckpointError as why:
            hint = f"; other checkpoints lie in {path.resolve().parent}" if path.name.startswith("iter_") else ""
            raise UserError(f"model_path {path} is no usable checkpoint: {why}{hint}") from None
    linked = [(path / "ckpt" / name).resolve() for name in ("best", "last") if (path / "ckpt" / name).exists()]
    found = first_valid(list(dict.fromkeys([*linked, *folders(path.resolve())])), (WEIGHTS,), say)
    if found is None:
        raise UserError(f"model_path {path}: this run has no usable checkpoint yet")
    return path / "ckpt" / found[0].name, found[1]


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_weights(
    model: GPT, folder: Path, assign: bool = False, cut: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Args:
        assign: put them in its place, instead.
        cut: makes of a whole tensor what is to be copied into the model's, its second argument.
    """
    try:
        weights, there = load_file(folder / WEIGHTS), model.state_dict()
        if cut:
            weights = {name: cut(t, there[name]) if name in there else t for name, t in weights.items()}
        model.load_state_dict(weights, assign=assign)
    except (RuntimeError, SafetensorError) as why:
        raise UserError(f"{folder / WEIGHTS} does not fit its config: {str(why).splitlines()[-1].strip()}") from None


def load_train_state(folder: Path, mmap: bool = False) -> dict:
    """What `save` was given as train_state; loaded without unpickling anything but tensors and plain types.

    Args:
        mmap: read only what is used of it.

    Raises:
        UserError: it holds something else, or is no such file.
    """
    try:
        state = torch.load(folder / TRAIN_STATE, map_location="cpu", weights_only=True, mmap=mmap)
        if isinstance(state, dict) and {"optimizer", "scaler", "row"} <= set(state):
            return state
        why = "it is no train state"
    except pickle.UnpicklingError:  # its own text explains how to run what is in there
        why = "it holds more than tensors and plain types, and reading that could run anybody's code"
    except (RuntimeError, EOFError) as error:
        why = str(error).split("\n")[0]
    raise UserError(f"{folder / TRAIN_STATE} is not loaded: {why}")
