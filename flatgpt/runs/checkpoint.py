"""Save, find, verify and load checkpoints.

A checkpoint out/<run>/ckpt/iter_000500/ has model.safetensors, train_state.pt and state.json, and tokenizer.json unless
its tokenizer has a known name. state.json is written last. It contains its own SHA-256, and the size and SHA-256 of the
other files; a folder without a valid state.json is not a checkpoint. `ckpt/last` and `ckpt/best` are relative symlinks
or, on file systems without symlinks, files that contain the folder's name. No arbitrary objects are unpickled:
train_state.pt is read with weights_only=True.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import UserError, first_line
from flatgpt.runs.history import STATE, checkpoints, folders, follow, hash_state, iteration_of, newest, read_state
from flatgpt.runtime.files import atomic_write, fsync
from model import GPT

FORMAT = 1
NO_SYMLINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
REMEDIES = {
    **dict.fromkeys(NO_SPACE, "Free disk space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make the folder writable"),
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f), or use a file system without such a limit",
    errno.ENAMETOOLONG: "Choose a shorter --out_dir",
}
WEIGHTS, TRAIN_STATE, TOKENIZER = "model.safetensors", "train_state.pt", "tokenizer.json"


class DamagedCheckpointError(UserError):
    """A checkpoint file is missing or damaged. The message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# saving


def save(
    run_dir: Path,
    state: dict,
    weights: dict[str, Tensor],
    train_state: dict,
    keep: int,
    keep_every: int | None = None,
    tokenizer: bytes | None = None,
) -> Path:
    """Write a checkpoint, point `last` to it, and delete old checkpoints.

    Args:
        state: content of state.json, including `iter`; `format` and `files` are added.
        weights: state dict of the unwrapped, uncompiled model.
        train_state: tensors and plain types, for resuming.
        keep: number of newest checkpoints to keep, besides `best`.
        keep_every: also keep all checkpoints whose iteration is a multiple of this.
        tokenizer: content of tokenizer.json; None: the tokenizer's name is enough to load it.

    Returns:
        the checkpoint's folder.

    Raises:
        UserError: the checkpoint could not be written. Earlier checkpoints are unchanged.
    """
    folder = run_dir / "ckpt" / _folder_name(state["iter"])
    partial = folder.with_name(f".{folder.name}.tmp")
    file = partial.name
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        file = WEIGHTS
        save_file({k: v.contiguous() for k, v in weights.items()}, partial / file)
        file = TRAIN_STATE
        with open(partial / file, "wb") as opened:  # of a path, torch does not report why a write failed
            torch.save(train_state, opened)
        with contextlib.suppress(OSError):  # safetensors makes it owner-only; not every file system has modes
            (partial / WEIGHTS).chmod((partial / TRAIN_STATE).stat().st_mode)
        if tokenizer is not None:
            file = TOKENIZER
            (partial / file).write_bytes(tokenizer)
        files = {}
        for file in (WEIGHTS, TRAIN_STATE, *[TOKENIZER] * (tokenizer is not None)):
            files[file] = fingerprint(partial / file)
            fsync(partial / file)
        file = STATE
        atomic_write(partial / STATE, state_file({"format": FORMAT, **state, "files": files}))
        file = partial.name
        fsync(partial)
        if folder.exists():  # it is damaged: the run would have resumed from a valid one
            move_aside(folder, "which a new checkpoint replaces")
        os.rename(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason, size, existing = _explain(error, run_dir), _num_bytes([weights, train_state]), "unknown"
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # the disk may have failed
            existing = ", ".join(path.name for path in checkpoints(run_dir)) or "none"
        raise UserError(
            f"checkpoint {folder} ({size / 1e6:,.1f} MB) could not be written: {file}: {reason}. "
            f"Existing checkpoints: {existing}"
        ) from None
    set_link(run_dir, "last", state["iter"])
    old = folder.parent
    try:
        linked = []
        for name in ("last", "best"):
            with contextlib.suppress(FileNotFoundError):  # Path.exists would hide other errors from Python 3.12 on
                linked.append(follow(run_dir / "ckpt" / name).stat())
        for old in checkpoints(run_dir)[keep:]:
            is_linked = any(os.path.samestat(old.stat(), link) for link in linked)
            if not is_linked and not (keep_every and iteration_of(old) % keep_every == 0):
                os.rename(old, partial)  # so that a partly deleted folder is not taken for a checkpoint
                shutil.rmtree(partial)
    except OSError as error:  # on a network file system, another process may be reading it
        print(f"warning: old checkpoints are not deleted: {old}: {error.strerror}", file=sys.stderr)
    return folder


def _explain(error: Exception, run_dir: Path) -> str:
    """Return why a write in the run's folder failed, and what to do about it."""
    while error.__context__ and not isinstance(error, OSError):  # torch raises another error when it closes the file
        error = error.__context__
    in_text = re.search(r"os error (\d+)", str(error))  # safetensors'
    code = int(in_text[1]) if in_text else getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or first_line(error)
    if code in NO_SPACE:
        reason += f" ({shutil.disk_usage(run_dir).free / 1e6:,.1f} MB are free now)"
    return f"{reason}. {REMEDIES.get(code, 'Check the disk')}"


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


def mark_finished(folder: Path, results: dict) -> None:
    """Set `finished`, and the results of the last evaluation, in the state.json of a checkpoint saved before both."""
    folder = follow(folder)
    if state := read_state(folder):
        atomic_write(folder / STATE, state_file({**state, **results, "finished": True}))


def state_file(state: dict) -> bytes:
    """Return the content of state.json: the state and its SHA-256."""
    return json.dumps({**state, "sha256": hash_state(state)}, indent=1).encode()


def set_link(run_dir: Path, name: str, iteration: int | None) -> bool:
    """Atomically point ckpt/<name> to the checkpoint of an iteration: a symlink, or a file where links are refused.

    Returns:
        whether this checkpoint exists. If not, the link is removed.

    Raises:
        UserError: the link could not be written. It is unchanged.
    """
    link, partial = run_dir / "ckpt" / name, run_dir / "ckpt" / f".{name}.tmp"
    target = None if iteration is None else _folder_name(iteration)
    try:
        mode = 0
        with contextlib.suppress(FileNotFoundError):
            mode = link.lstat().st_mode  # from Python 3.14 on, is_symlink hides errors
        if stat.S_ISDIR(mode):
            _restore_copy(link)
        if target is None or not (link.with_name(target) / STATE).exists():
            link.unlink(missing_ok=True)
            return False
        fsync(link.parent)  # the checkpoint's name
        partial.unlink(missing_ok=True)
        try:
            if os.name == "nt":  # Windows does not replace a link to a folder
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            partial.symlink_to(target)
            os.replace(partial, link)
        except OSError as error:
            if error.errno not in NO_SYMLINKS:
                raise
            atomic_write(link, target.encode())
    except OSError as error:
        raise UserError(f"{link} could not be set to {target}, which is complete: {_explain(error, run_dir)}") from None
    return True


def _restore_copy(link: Path) -> None:
    """Give a checkpoint at `last` or `best`, as in a copy that followed links, the name of its iteration again.

    If a valid checkpoint has this name, the copy of it is removed.
    """
    state = read_state(link)
    folder = link.with_name(_folder_name(state["iter"])) if state else link
    if state and not (folder.exists() and first_valid([folder], verify, print)):
        if folder.exists():
            move_aside(folder, f"which {link.name} replaces")
        os.rename(link, folder)
    elif state and state == read_state(folder):
        shutil.rmtree(link)
    else:
        move_aside(link, "which is a folder instead of a link")


def _folder_name(iteration: int) -> str:
    return f"iter_{iteration:06d}"


def fingerprint(path: Path) -> dict:
    """Return a file's size in bytes and its SHA-256."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# finding


def verify(folder: Path, names: tuple[str, ...] = (WEIGHTS, TRAIN_STATE)) -> dict:
    """Verify the given files of a checkpoint, and its tokenizer.json if it has one. Return its state.

    Raises:
        DamagedCheckpointError: state.json is not valid, or the size or SHA-256 of a file does not match.
        UserError: the checkpoint has the format of another version.
    """
    state = read_state(folder)
    if state is None:
        raise DamagedCheckpointError(f"{folder / STATE} is missing or damaged")
    if state["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {state['format']} is not supported, only format {FORMAT}")
    for name in (*names, *[TOKENIZER] * (TOKENIZER in state["files"])):
        try:
            found = fingerprint(folder / name)
        except OSError as error:  # for example a bad sector
            raise DamagedCheckpointError(f"{folder / name} cannot be read: {error.strerror}") from None
        if found != state["files"].get(name):
            raise DamagedCheckpointError(f"{folder / name} is damaged: its SHA-256 differs from the one in state.json")
    return state


def first_valid(
    folders: list[Path], check: Callable[[Path], dict], log: Callable[[str], None]
) -> tuple[Path, dict] | None:
    """Return the first valid checkpoint and its state; None if all are damaged. Log a warning for each damaged one.

    Args:
        check: `verify`, or another function that returns the state or raises DamagedCheckpointError.
    """
    for folder in folders:
        try:
            return folder, check(folder)
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
    path = newest(file=f"ckpt/*/{STATE}") if model_path is None else Path(model_path)
    path = follow(path.parent if path.name == WEIGHTS else path)
    linked = [follow(path / "ckpt" / name) for name in ("best", "last")]
    candidates = [folder.resolve() for folder in (*linked, *folders(path)) if folder.exists()]
    found = first_valid(list(dict.fromkeys(candidates)), lambda folder: verify(folder, (WEIGHTS,)), log)
    if found is None:
        problem = "all are damaged: copy the run again" if candidates else "none was saved yet: wait for the run"
        raise UserError(f"model_path = {path} has no usable checkpoint; {problem}, or choose another --model_path")
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
        DamagedCheckpointError: the file is not a train state.
    """
    state, reason = None, ""
    try:
        state = torch.load(folder / TRAIN_STATE, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # torch's message advises weights_only=False
        pass
    except Exception as error:  # a wrong file can raise any
        reason = f" ({first_line(error)})"
    if not isinstance(state, dict) or not {"optimizer", "scaler", "row"} <= set(state):
        raise DamagedCheckpointError(
            f"{folder / TRAIN_STATE} is not loaded: it is not a train state of tensors and plain types{reason}"
        )
    return state
