"""Save, find, verify and load: `out/<run>/ckpt/iter_000500/` with model.safetensors, train_state.pt and state.json.

state.json is written last and holds size and SHA-256 of the other two: a folder without a valid one does not exist.
`ckpt/last` and `ckpt/best` are relative symlinks, replaced by rename. Nothing here unpickles: weights are safetensors,
train_state.pt is read with weights_only=True.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tokenizer
from config import ModelConfig, TrainConfig, UserError
from model import GPT
from shards import write_whole

FORMAT = 1
# Keys that decide, with the model's, which run it is; and keys that only say how it was called.
BATCH = ("batch_size", "grad_accum_steps", "stride", "seed")
CALL = ("config", "resume", "overwrite", "out_dir", "data_dir", "device")
WEIGHTS, TRAIN_STATE, STATE = "model.safetensors", "train_state.pt", "state.json"


class Damaged(Exception):  # noqa: N818 - it names what the checkpoint is
    """A checkpoint that is not what was written; the message names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# saving


def save(run_dir: Path, state: dict, model: GPT, train_state: dict, keep: int) -> Path:
    """Write one checkpoint and move `last` to it; of the others keep the newest K - 1, and `best`.

    Args:
        run_dir: the run's folder.
        state: what state.json says, `iter` among it; format and files are added here.
        model: the raw module, never a compiled or wrapped one.
        train_state: tensors and plain types, for resuming.
        keep: how many of the newest checkpoints stay.

    Returns:
        the checkpoint's folder.

    Raises:
        UserError: it could not be written; what was there before is untouched.
    """
    folder = run_dir / "ckpt" / _name(state["iter"])
    partial = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / WEIGHTS)
        torch.save(train_state, partial / TRAIN_STATE)
        files = {name: _fingerprint(partial / name) for name in (WEIGHTS, TRAIN_STATE)}
        write_whole(partial / STATE, json.dumps({"format": FORMAT, **state, "files": files}, indent=1).encode())
        for name in (*files, "."):
            _flush(partial / name)
        if folder.exists() and read_state(folder) is None:
            shutil.rmtree(folder)  # without a valid state.json it never was a checkpoint
        os.rename(partial, folder)
        _flush(folder.parent)
        point(run_dir, "last", state["iter"])
    except (OSError, RuntimeError, SafetensorError) as why:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(run_dir).free if run_dir.exists() else 0
        raise UserError(
            f"checkpoint {folder} could not be written ({why}); {free / 1e6:,.0f} MB are free there. "
            "Make room and start again with --resume; earlier checkpoints are untouched"
        ) from None
    linked = {(run_dir / "ckpt" / name).resolve() for name in ("last", "best")}
    for old in checkpoints(run_dir)[keep:]:
        if old.resolve() not in linked:
            (old / STATE).unlink()  # first: half a folder must not look like a checkpoint
            shutil.rmtree(old)
    return folder


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


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def provenance(device: str) -> dict:
    """What made this: command line, code and machine (`device`: its name), for state.json."""

    def git(*words: str) -> str | None:
        here = Path(__file__).resolve().parent
        try:
            answer = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10, check=True)
            return answer.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    status = git("status", "--porcelain")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
    }


# ---------------------------------------------------------------------------------------------------------------------
# finding


def read_state(folder: Path) -> dict | None:
    """A checkpoint's state.json, None where there is no valid one."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return state if isinstance(state, dict) and {"format", "iter", "config", "files"} <= set(state) else None
    except (OSError, ValueError):
        return None


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, newest first."""
    found = [p for p in run_dir.glob("ckpt/iter_*") if read_state(p)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("iter_")), reverse=True)


def verify(folder: Path, names: tuple[str, ...] = (WEIGHTS, TRAIN_STATE)) -> dict:
    """The state of a checkpoint whose files are as they were written.

    Raises:
        Damaged: no valid state.json, or a file with another size or SHA-256.
        UserError: a format of another version.
    """
    state = read_state(folder)
    if state is None:
        raise Damaged(f"{folder / STATE} is missing or damaged")
    if state["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {state['format']}, this version reads {FORMAT}")
    for name in names:
        path, written = folder / name, state["files"].get(name)
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if _fingerprint(path) != written:
            raise Damaged(f"{path} is damaged: its size or SHA-256 is not the one in state.json")
    return state


def first_good(folders: list[Path], names: tuple[str, ...], say: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The first checkpoint that verifies, with its state; damaged ones are named and passed over."""
    for folder in folders:
        try:
            return folder, verify(folder, names)
        except Damaged as why:
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
        except Damaged as why:
            hint = f"; other checkpoints lie in {path.resolve().parent}" if path.name.startswith("iter_") else ""
            raise UserError(f"model_path {path} is no usable checkpoint: {why}{hint}") from None
    linked = [(path / "ckpt" / name).resolve() for name in ("best", "last") if (path / "ckpt" / name).exists()]
    found = first_good(list(dict.fromkeys([*linked, *checkpoints(path.resolve())])), (WEIGHTS,), say)
    if found is None:
        raise UserError(f"model_path {path}: this run has no usable checkpoint yet")
    folder, state = found
    return path / "ckpt" / folder.name, state


def find_start(run_dir: Path, resume: str | None, overwrite: bool) -> tuple[Path, dict] | None:
    """The verified checkpoint that training goes on from, with its state; None to start anew.

    Args:
        resume: None, `latest`, `auto` (start anew when there is none), or a run's or checkpoint's folder.
        overwrite: a run that is there is no mistake; `move_away` takes care of it.

    Raises:
        UserError: there is a run and neither was asked for, or nothing to resume.
    """
    there = checkpoints(run_dir)
    if resume in ("latest", "auto"):
        found = first_good(there, (WEIGHTS, TRAIN_STATE), print)
        if found is None and (resume == "latest" or there):
            reason = "every checkpoint there is damaged" if there else "there is no checkpoint"
            remedy = "add --overwrite instead to start again" if there else "start without --resume"
            raise UserError(f"nothing to resume in {run_dir}: {reason}; {remedy}")
        return found
    if resume:
        path = Path(resume)
        if (path / "ckpt").is_dir():
            found = first_good(checkpoints(path), (WEIGHTS, TRAIN_STATE), print)
            if found is None:
                raise UserError(f"resume = {resume}: this run has no usable checkpoint")
            path = found[0]
        try:
            state = verify(path)
        except Damaged as why:
            raise UserError(f"resume = {resume}: {why}") from None
        if there and path.resolve().parent.parent != run_dir.resolve():
            raise UserError(
                f"resume = {resume} is of another run, and {run_dir} holds checkpoints of its own; "
                "give the new run an --out_dir of its own"
            )
        return path.resolve(), state
    if there and not overwrite:
        raise UserError(
            f"{run_dir} already holds a run (at iter {read_state(there[0])['iter']}): "
            "add --resume to go on with it, or --overwrite to start again (the old run moves away, nothing is deleted)"
        )
    return None


def check_same_run(folder: Path, state: dict, config: TrainConfig, manifest_hash: str) -> list[str]:
    """The settings that a resumed run changes, as sentences; those that would make it another run are refused.

    Raises:
        UserError: names all of the latter: the model's shape, the batch, the seed, the data.
    """
    saved, now = state["config"], dataclasses.asdict(config)
    fixed = {*BATCH, *dataclasses.asdict(config.model())} - {"dropout", "attention", "activation_checkpointing"}
    changed = {k: f"{k} = {v} (was {saved.get(k)})" for k, v in now.items() if v != saved.get(k)}
    differing = [changed[k] for k in sorted(fixed & set(changed))]
    if state["data"]["manifest_sha256"] != manifest_hash:
        differing.append(f"the data: {config.data_dir}/{config.dataset} is not the dataset it was trained on")
    if differing:
        raise UserError(
            f"{folder} cannot go on with these settings: {'; '.join(differing)}. "
            "Set them back, or start a run of its own with another --out_dir"
        )
    return [text for key, text in changed.items() if key not in {*fixed, *CALL}]


def move_away(run_dir: Path) -> None:
    """Rename a run's folder, where there is one, to <run_dir>.old-<time>, for --overwrite."""
    if run_dir.exists():
        old = run_dir.with_name(f"{run_dir.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        os.rename(run_dir, old)
        print(f"the run that was in {run_dir} is now in {old}")


def set_aside(run_dir: Path, after: int) -> None:
    """Move checkpoints later than iteration `after` to <run_dir>/ckpt/lost-<time>/: a resumed run writes them anew.

    Half-written ones, which a killed process left, are removed.
    """
    for partial in run_dir.glob("ckpt/.iter_*.tmp"):
        shutil.rmtree(partial)
    for folder in checkpoints(run_dir):
        if int(folder.name.removeprefix("iter_")) > after:
            lost = run_dir / "ckpt" / f"lost-{time.strftime('%Y%m%d-%H%M%S')}"
            lost.mkdir(exist_ok=True)
            os.rename(folder, lost / folder.name)
            print(f"{folder}, later than what is resumed, is now in {lost}")


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_model(folder: Path, state: dict, device: torch.device) -> tuple[GPT, tiktoken.Encoding]:
    """The model of a verified checkpoint, in evaluation mode, and the tokenizer that it was trained with.

    Raises:
        UserError: a tokenizer that encodes differently now, or weights that do not fit the config.
    """
    encoding = tokenizer.load(state["tokenizer"]["name"])
    if tokenizer.ranks_hash(encoding) != state["tokenizer"]["ranks_sha256"]:
        raise UserError(
            f"{folder}: tokenizer {encoding.name} has not the vocabulary here that the model was trained with"
        )
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    with torch.device("meta"):  # no time is spent on initial weights
        model = GPT(ModelConfig(**{k: v for k, v in state["config"].items() if k in known}))
    load_weights(model, folder, assign=True)
    return model.to(device).eval(), encoding


def load_weights(model: GPT, folder: Path, assign: bool = False) -> None:
    """Copy a checkpoint's weights into a model of the same shape (`assign`: put them in its place)."""
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), assign=assign)
    except (RuntimeError, SafetensorError) as why:
        raise UserError(f"{folder / WEIGHTS} does not fit its config: {str(why).splitlines()[-1].strip()}") from None


def load_train_state(folder: Path) -> dict:
    """What `save` was given as train_state; loaded without unpickling anything but tensors and plain types."""
    return torch.load(folder / TRAIN_STATE, map_location="cpu", weights_only=True)
