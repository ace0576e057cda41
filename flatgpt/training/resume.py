"""Find, validate and restore the checkpoint that a run resumes from; collect the contents of checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from config import START_ONLY, TrainConfig, UserError, count_of
from flatgpt import REPO_ROOT
from flatgpt.data import tokenizer
from flatgpt.interop.pretrained import checkpoints_to_resume, shape
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint import TRAIN_STATE
from flatgpt.runs.history import iteration_of, run_of
from flatgpt.runs.lock import RunLock
from flatgpt.runtime.device import cpu_name
from flatgpt.runtime.distributed import shard_like
from flatgpt.runtime.files import atomic_write
from flatgpt.training.data import count_eval_tokens
from flatgpt.training.nonfinite import require_resumable
from flatgpt.training.optimizer import CombinedOptimizer, optimizer_on_meta
from flatgpt.training.setup import TrainingRun
from flatgpt.training.show_batch import BATCH
from model import GPT

# Settings that identify a run, besides the model's; and settings that may change in a resume without a message.
FIXED = ("stride", "seed", "optimizer", "init_from", "eval_tokens")
SILENT = (*START_ONLY, "out_dir", "epochs", "warmup_fraction", "eval_batches")  # the last three are resolved

# ---------------------------------------------------------------------------------------------------------------------
# contents of a checkpoint


@dataclass
class Progress:
    """Progress of a run: iteration, newest log row, and results of evaluations."""

    iter: int = 0
    row: dict = field(default_factory=lambda: {"iter": 0, "tokens": 0, "epoch": 0.0})  # newest log row
    eval_pending: bool = True  # `iter` has not been evaluated yet
    val_loss: float | None = None  # from the newest evaluation
    best_loss: float | None = None
    best_iter: int | None = None
    since_best: int = 0  # evaluations since best_iter
    forked: bool = False  # resumed from another run's checkpoint; no checkpoint in this run's folder yet
    tracker_ids: dict = field(default_factory=lambda: {"wandb_id": None, "trackio_id": None})

    def patience_exhausted(self, patience: int | None) -> bool:
        """Return whether the last `patience` evaluations found no new best loss."""
        return patience is not None and self.best_iter is not None and self.since_best >= patience

    def state_dict(self) -> dict:
        """Return the fields that state.json and train_state.pt store."""
        keys = "val_loss", "best_loss", "best_iter", "since_best", "eval_pending"
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, train_state: dict, state: dict) -> None:
        """Restore the fields from a checkpoint's train_state.pt and state.json."""
        saved = state["config"]
        # old checkpoints have no eval_pending: they were saved before the evaluation of their iteration
        self.eval_pending = self.iter % saved["eval_interval"] == 0 or self.iter >= saved["max_iters"]
        for key in self.state_dict().keys() & train_state.keys():
            setattr(self, key, train_state[key])
        self.tracker_ids = {key: state.get(key) for key in self.tracker_ids}


def checkpoint_state(run: TrainingRun, progress: Progress) -> dict:
    """Return the tensors and plain values of a checkpoint, which `restore` loads."""
    train_state = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    train_state |= {"health": run.nonfinite_guard.state_dict(), "row": progress.row, **progress.state_dict()}
    return {"weights": run.model.state_dict(), "train_state": train_state}


def run_metadata(run: TrainingRun, recipe: dict, resume_from: tuple[Path, dict] | None) -> dict:
    """Return the constant part of a run's state.json. Secrets from environment variables are masked in `command`.

    Args:
        recipe: what the recipe of this start says, if there is one. A later resume compares it with what it says then.
        resume_from: the result of find_resume_checkpoint.
    """
    config, settings, meta = run.config, run.device_settings, run.dataset.meta
    tokenizer_facts = {"name": meta["tokenizer"], **{k: meta[k] for k in ("vocab_size", "ranks_sha256", "eot_id")}}
    if isinstance(encoding := run.encoding, tokenizer.FileTokenizer):  # it may have more tokens than the data's
        tokenizer_facts = {"name": encoding.name, "vocab_size": encoding.n_vocab}
        tokenizer_facts |= {"ranks_sha256": tokenizer.ranks_hash(encoding), "eot_id": encoding.eot_token}
    command = "\0".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        call = ["git", "-C", REPO_ROOT, "status", "--porcelain=v2", "--branch"]
        status = subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        status = []
    commit = next((line.split()[-1] for line in status if re.match("# branch.oid [0-9a-f]", line)), None)
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name, re.IGNORECASE) and len(value) >= 8:
            command = command.replace(value, f"${name}")
    return {
        "config": dataclasses.asdict(config),
        "recipe": (resume_from[1].get("recipe", {}) if resume_from else {}) | recipe,
        "parameters": GPT.on_meta_device(config.model()).num_params(),  # run.model may be sharded
        "chosen": {"dtype": config.dtype, "compile": config.compile, "paths": settings.paths, "why": settings.why},
        "tokenizer": tokenizer_facts,
        "data": {
            "folder": str(run.dataset.folder),
            "manifest_sha256": run.dataset.manifest_hash,
            "end_of_text": meta["end_of_text"],
            "tokens": {split: entry["tokens"] for split, entry in meta["splits"].items()},
            "bytes": {split: entry.get("bytes") for split, entry in meta["splits"].items()},
        },
        "command": command.split("\0"),
        "git_commit": commit,
        "git_dirty": any(not line.startswith("#") for line in status) if status else None,
        "python": platform.python_version(),
        **bitwise_conditions(run),
    }


def bitwise_conditions(run: TrainingRun) -> dict:
    """Return the values that must not change for a resumed run to be bit-identical."""
    machine = {"device": run.device_settings.name, "cpu": cpu_name(), "threads": torch.get_num_threads()}
    return machine | {"ranks": run.ranks.world, "torch": torch.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# choice and validation of a checkpoint


def find_resume_checkpoint(lock: RunLock, config: TrainConfig) -> tuple[Path, dict] | None:
    """Return the verified checkpoint to resume from, with its state; None to start from scratch.

    Args:
        lock: the lock of the run's folder. This function acquires it.

    Raises:
        UserError: the folder is in use; it contains a run, and neither resume nor overwrite is set; or there is
            nothing to resume.
    """
    parent = next(path for path in (lock.folder.absolute(), *lock.folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = "cannot be written to" if parent.is_dir() else "is a file"
        raise UserError(f"out_dir = {lock.folder}: {parent} {problem}; choose another --out_dir")
    lock.acquire()
    existing = checkpoint.folders(lock.folder)
    if existing and not config.resume and not config.overwrite:
        raise UserError(
            f"{lock.folder} already contains a run (at iter {iteration_of(existing[0])}): add --out_dir "
            f"{shlex.quote(str(free_folder(lock.folder)))} to keep both, --resume to continue it, or --overwrite to "
            "start again (the old run is moved aside, not deleted)"
        )
    source, folders = checkpoints_to_resume(config) if config.resume else (None, [])
    if not folders:
        return None
    found = checkpoint.first_valid(folders, require_resumable, print)
    if found is None:
        reason = "every checkpoint is damaged; to start again, use --overwrite instead"
        others = [path for path in checkpoint.folders(folders[0].parent.parent) if path.resolve() not in folders]
        if other := checkpoint.first_valid(others, require_resumable, log=lambda warning: None):
            reason = f"it is damaged; to resume from another checkpoint: --resume {shlex.quote(str(other[0]))}"
        raise UserError(f"nothing to resume in {source}: {reason}")
    if existing and found[0].resolve().parent.parent != lock.folder.resolve():
        raise UserError(
            f"resume = {config.resume} belongs to another run, and {lock.folder} already contains a run; "
            "choose another --out_dir"
        )
    return found


def free_folder(folder: Path) -> Path:
    """Return the first of NAME-2, NAME-3 ... beside a folder that does not exist. A longer number may be a date."""
    name, number = re.fullmatch(r"(.*?)(?:-(\d{1,3}))?", folder.name).groups()
    paths = (folder.with_name(f"{name}-{n}") for n in itertools.count(int(number or 1) + 1))
    return next(path for path in paths if not path.exists())


def require_same_run(folder: Path, state: dict, run: TrainingRun) -> list[str]:
    """Check that a checkpoint belongs to this run. Return messages about changed settings.

    Raises:
        UserError: a setting that identifies a run differs: model, batch, seed, data or tokenizer. All are listed.
    """
    config, saved = run.config, state["config"]
    saved = {**saved, "eval_tokens": count_eval_tokens(saved) or None}
    current = json.loads(json.dumps(dataclasses.asdict(config)))  # with lists in place of tuples, as in state.json
    fixed = {*FIXED, *shape(config)}
    if math.prod(saved[k] for k in BATCH) != math.prod(current[k] for k in BATCH):  # sequences per update
        fixed |= set(BATCH)
    changed = {k: f"{k} = {v} (was {saved[k]})" for k, v in current.items() if k in saved and v != saved[k]}
    differing = [changed[k] for k in sorted(fixed & changed.keys())]
    if state["data"]["manifest_sha256"] != run.dataset.manifest_hash:  # the manifest includes the tokenizer
        differing.append(f"the data: {config.data_dir}/{config.dataset} is not the dataset that the run was trained on")
    if differing:
        raise UserError(
            f"{folder} cannot be resumed with these settings: {'; '.join(differing)}. "
            "Restore the old values, or start a new run with another --out_dir"
        )
    allowed = [text for key, text in changed.items() if key not in {*fixed, *SILENT}]
    lines = [f"resuming from {folder}" + " with" * bool(allowed), *(f"  {text}" for text in allowed)]
    decay_iters, length = config.lr_decay_iters, config.max_iters
    if "max_iters" in changed and "lr_decay_iters" not in changed and decay_iters != length:
        remedy = f"to end it with the run, add --lr_decay_iters {length}"
        lines.append(f"note: the schedule is unchanged: lr_decay_iters = {decay_iters}; {remedy}")
    conditions = bitwise_conditions(run).items()
    if inexact := [f"{key} = {value} (was {state.get(key)})" for key, value in conditions if state.get(key) != value]:
        lines.append(f"note: not bit-identical, because of {'; '.join(inexact)}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# restoring a checkpoint


def finished_message(folder: Path, state: dict, config: TrainConfig) -> str | None:
    """Return how the run of a checkpoint has ended and how to extend it; None if there is something left to do."""
    i, run = state["iter"], run_of(folder) or folder
    if i > config.max_iters:
        return f"{run} is at iter {i}, past max_iters = {config.max_iters}: to train on, add --max_iters N"
    if not state.get("finished"):
        return None
    if i == config.max_iters:
        return f"{run} is finished (iter {i} of {i}): to train on, add --max_iters N"
    since_best = state["since_best"]
    if not Progress(best_iter=state["best_iter"], since_best=since_best).patience_exhausted(config.patience):
        return None
    reason = f"iter {i} of {config.max_iters}, no new best in {count_of(since_best, 'evaluation')}"
    return f"{run} is finished ({reason}): to train on, add --patience with a larger number, or none"


def restore_run(resume_from: tuple[Path, dict] | None, run: TrainingRun, lock: RunLock, recipe: str) -> Progress | None:
    """Prepare the run's folder and load the checkpoint, if any. Every rank must call it.

    An earlier run and checkpoints later than the resumed one are moved aside.

    Args:
        resume_from: the result of find_resume_checkpoint.
        lock: the lock of the run's folder, acquired.
        recipe: run.config as TOML, for config.toml.

    Returns:
        where training starts; None if the run is finished. Then this is printed, and nothing is changed.

    Raises:
        UserError: the checkpoint belongs to another run, or differs between machines.
    """
    config, ranks, folder, progress = run.config, run.ranks, lock.folder, Progress()
    if resume_from:
        path, state = resume_from
        changes, finished = require_same_run(path, state, run), finished_message(path, state, config)
        print(finished or "\n".join(changes))
        if finished:
            return None
        ranks.require_equal({f"checkpoint {path}": checkpoint.read_state(path)})  # includes the hashes of its files
        train_state = restore(path, run)
        progress = Progress(train_state["row"]["iter"], train_state["row"], eval_pending=False)
        progress.forked = path.resolve().parent != (folder / "ckpt").resolve()
        if not progress.forked:  # the best loss of another run does not count
            progress.load_state_dict(train_state, state)
    progress.eval_pending |= progress.iter % config.eval_interval == 0 or progress.iter >= config.max_iters

    def prepare_folder() -> bool:
        lock.prepare_folder(config.overwrite)
        toml = folder / "config.toml"
        if toml.exists() and toml.read_bytes() != recipe.encode():  # keep the user's file
            os.replace(toml, toml.with_name(f"config.toml.old-{time.strftime('%Y%m%d-%H%M%S')}"))
        for half_written in folder.glob("ckpt/.iter_*.tmp"):
            shutil.rmtree(half_written, ignore_errors=True)  # a save of its iteration names the cause
        checkpoint.set_link(folder, "last", progress.iter)  # first, so that it always names a checkpoint
        best_exists = checkpoint.set_link(folder, "best", progress.best_iter)
        for later in checkpoint.folders(folder):
            if iteration_of(later) > progress.iter:
                checkpoint.move_aside(later, "later than the resumed checkpoint")
        atomic_write(toml, recipe.encode())
        return best_exists

    if not ranks.run_on_rank0(prepare_folder):  # the best checkpoint no longer exists
        progress.best_loss = progress.best_iter = None
    return progress


def restore(folder: Path, run: TrainingRun) -> dict:
    """Load weights, optimizer, scaler and skip counts of a verified checkpoint; return its train state.

    Model and optimizer may be sharded (fully_shard): every rank reads the files and keeps its shard.

    Raises:
        UserError: a tensor is missing, or its shape or dtype is not the model's. Then nothing is loaded.
    """
    train_state = checkpoint.load_train_state(folder)
    saved, expected = train_state["optimizer"], optimizer_on_meta(run.config).state_dict()
    parts = [(saved, expected, run.optimizer)]
    if isinstance(run.optimizer, CombinedOptimizer):
        parts = [(saved.get(name, {}), expected[name], part) for name, part in run.optimizer.optimizers.items()]
    if not all(fits_optimizer(state, layout) for state, layout, _ in parts):
        raise UserError(f"{folder / TRAIN_STATE} belongs to another model or optimizer")
    checkpoint.load_weights(run.model, folder, convert=shard_like)
    for state, _, optimizer in parts:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for index, moments in state["state"].items():  # copied one by one: they lie in the file, which may be deleted
            for key, value in moments.items():
                p = params[index]  # step counts have no dimension; load_state_dict moves them where they are read
                moments[key] = shard_like(value, p).to(p.device, copy=True) if value.dim() else value.clone()
        # with the settings of this run, not the saved ones
        optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    if train_state["scaler"]:  # empty unless the dtype was float16
        run.scaler.load_state_dict({**run.scaler.state_dict(), **train_state["scaler"]})
    if "health" in train_state:
        run.nonfinite_guard.load_state_dict(train_state["health"])
    return train_state


def fits_optimizer(saved: dict, expected: dict) -> bool:
    """Return whether a saved state has the parameters, names, shapes and dtypes of the expected one, or no moments yet.

    load_state_dict does not check them.
    """

    def layout(state: dict) -> tuple[list, dict]:
        moments = {p: {k: (t.shape, t.dtype) for k, t in found.items()} for p, found in state["state"].items()}
        return [group["params"] for group in state["param_groups"]], moments

    try:
        groups, moments = layout(expected)
        return layout(saved) in ((groups, moments), (groups, {}))
    except (AttributeError, KeyError, TypeError):  # values of other types
        return False
