"""Find, validate and restore the checkpoint that a run resumes from."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from config import EXCLUSIVE, UserError
from flatgpt import REPO_ROOT
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint import TRAIN_STATE, WEIGHTS
from flatgpt.runs.history import follow
from flatgpt.runs.lock import RunLock
from flatgpt.runtime.device import cpu_name
from flatgpt.runtime.files import atomic_write
from flatgpt.runtime.parallel import is_sharded, shard_like
from flatgpt.training.muon import Muon
from flatgpt.training.optimizer import MuonAndAdamW
from flatgpt.training.setup import TrainingRun

# Settings that identify a run, with those of the model; and settings of the call, which a resume may change silently.
FIXED = ("stride", "seed", "optimizer")
BATCH = ("batch_size", "grad_accum_steps")  # their product identifies a run
CALL = ("config", "resume", "overwrite", "out_dir", "data_dir", "device", "init_from", "list", "plan", "gpus", "mfu")


def find_resume_checkpoint(lock: RunLock, resume: str | None, overwrite: bool) -> tuple[Path, dict] | None:
    """Return the verified checkpoint to resume from, with its state; None to start from the beginning.

    Args:
        lock: of the run's folder; it is acquired here.
        resume: None, `latest`, `auto` (start from the beginning where there is no run), or the folder of a run or a
            checkpoint.
        overwrite: an existing run is no error; RunLock.prepare_folder moves it away.

    Raises:
        UserError: the folder is in use; it holds a run, and neither was asked for; or there is nothing to resume.
    """
    lock.acquire()
    run_dir = lock.run_dir
    existing = checkpoint.folders(run_dir)
    if resume in ("latest", "auto"):
        found = checkpoint.first_valid(existing, (WEIGHTS, TRAIN_STATE), print)
        if found is None and (resume == "latest" or existing):
            reason = "every checkpoint there is damaged" if existing else "there is no checkpoint"
            remedy = "add --overwrite instead to start again" if existing else "start without --resume"
            raise UserError(f"nothing to resume in {run_dir}: {reason}; {remedy}")
        return found
    if resume:
        path = follow(Path(resume))
        if (path / "ckpt").is_dir():
            found = checkpoint.first_valid(checkpoint.folders(path), (WEIGHTS, TRAIN_STATE), print)
            if found is None:
                raise UserError(f"resume = {resume}: this run has no usable checkpoint")
            path = found[0]
        try:
            state = checkpoint.verify(path)
        except checkpoint.DamagedCheckpointError as error:
            raise UserError(f"resume = {resume}: {error}") from None
        if existing and path.resolve().parent.parent != run_dir.resolve():
            raise UserError(
                f"resume = {resume} is of another run, and {run_dir} holds checkpoints of its own; "
                "give the new run an --out_dir of its own"
            )
        return path.resolve(), state
    if existing and not overwrite:
        raise UserError(
            f"{run_dir} already holds a run (at iter {int(existing[0].name.removeprefix('iter_'))}): "
            "add --resume to go on with it, or --overwrite to start again (the old run moves away, nothing is deleted)"
        )
    return None


def require_same_run(folder: Path, state: dict, run: TrainingRun) -> list[str]:
    """Return the lines that describe a resume: the checkpoint, and which settings changed or stay.

    Raises:
        UserError: lists all differences that would make it another run: model, batch, seed, data, tokenizer.
    """
    config, saved = run.config, state["config"]
    now = dataclasses.asdict(config)
    fixed = {*FIXED, *dataclasses.asdict(config.model())} - {"dropout", "attention", "activation_checkpointing"}
    now = {k: v for k, v in now.items() if k not in dict(EXCLUSIVE) or v is not None}  # given in the other unit
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in now.items()}  # as JSON has it
    # earlier versions had one sample_prompt
    saved = {k: [v] if isinstance(v, str) and isinstance(now.get(k), list) else v for k, v in saved.items()}
    changed = {k: f"{k} = {v} (was {saved[k]})" for k, v in now.items() if k in saved and v != saved[k]}
    if math.prod(saved[k] for k in BATCH) != math.prod(now[k] for k in BATCH):  # the sequences of an update
        fixed |= set(BATCH)
    differing = [changed[k] for k in sorted(fixed & set(changed))]
    tokenizer, meta = state["tokenizer"], run.dataset.meta
    if (tokenizer["name"], tokenizer["ranks_sha256"]) != (meta["tokenizer"], meta["ranks_sha256"]):
        differing.append(f"tokenizer = {meta['tokenizer']} (was {tokenizer['name']})")
    if state["data"]["manifest_sha256"] != run.dataset.manifest_hash:
        differing.append(f"the data: {config.data_dir}/{config.dataset} is not the dataset it was trained on")
    if differing:
        raise UserError(
            f"{folder} cannot go on with these settings: {'; '.join(differing)}. "
            "Set them back, or start a run of its own with another --out_dir"
        )
    allowed = [text for key, text in changed.items() if key not in {*fixed, *CALL}]
    lines = [f"resuming from {folder}" + (f", with {'; '.join(allowed)}" if allowed else "")]
    if state["iter"] > config.max_iters:
        lines.append(f"note: it is past max_iters = {config.max_iters} already: nothing is left to train")
    if "max_iters" in changed and "lr_decay_iters" not in changed:
        lines.append(f"note: the schedule stays: lr_decay_iters = {config.lr_decay_iters}, as the run began")
    conditions = bitwise_conditions(run).items()
    if inexact := [f"{key} = {now} (was {state.get(key)})" for key, now in conditions if state.get(key) != now]:
        lines.append(f"note: equal to rounding, not to the bit: {'; '.join(inexact)}")
    return lines


def archive_later_checkpoints(run_dir: Path, after: int) -> None:
    """Move checkpoints later than iteration `after` to <run_dir>/ckpt/lost-<time>/, and delete half-written ones."""
    for partial in run_dir.glob("ckpt/.iter_*.tmp"):
        shutil.rmtree(partial)
    for folder in checkpoint.folders(run_dir):
        if int(folder.name.removeprefix("iter_")) > after:
            checkpoint.move_aside(folder, "later than what is resumed")


def provenance() -> dict:
    """Return the command line, commit and Python version for state.json, with secrets of the environment masked."""

    def git(*words: str) -> str | None:
        call = ["git", "-C", REPO_ROOT, *words]
        try:
            return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    status, command = git("status", "--porcelain"), "\0".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name, re.IGNORECASE) and len(value) >= 8:
            command = command.replace(value, f"${name}")
    return {
        "command": command.split("\0"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
    }


def run_metadata(run: TrainingRun) -> dict:
    """Return what state.json says in every checkpoint of a run."""
    config, meta = run.config, run.dataset.meta
    return {
        "config": dataclasses.asdict(config),
        "chosen": {"dtype": config.dtype, "compile": config.compile, "why": run.device_settings.why},
        "tokenizer": {"name": meta["tokenizer"], **{k: meta[k] for k in ("vocab_size", "ranks_sha256", "eot_id")}},
        "data": {
            "folder": str(run.dataset.folder),
            "manifest_sha256": run.dataset.manifest_hash,
            "end_of_text": meta["end_of_text"],
            "tokens": {split: entry["tokens"] for split, entry in meta["splits"].items()},
        },
        **provenance(),
        **bitwise_conditions(run),
    }


def bitwise_conditions(run: TrainingRun) -> dict:
    """Return what has to stay the same for a resumed run to be bit-identical."""
    machine = {"device": run.device_settings.name, "cpu": cpu_name(), "threads": torch.get_num_threads()}
    return machine | {"ranks": run.ranks.world, "torch": torch.__version__}


@dataclass
class Progress:
    """How far a run has come, and what its evaluations have found."""

    iter: int = 0
    row: dict = field(default_factory=lambda: {"iter": 0, "tokens": 0, "epoch": 0.0})  # of the newest logged iteration
    eval_pending: bool = True  # `iter` is to be evaluated
    val_loss: float | None = None  # of the newest evaluation
    best_loss: float | None = None
    best_iter: int | None = None
    since_best: int = 0  # evaluations since best_iter
    forked: bool = False  # resumed from another run's checkpoint, and not saved in this run's folder yet
    wandb_id: str | None = None

    def patience_exhausted(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations found no new best loss."""
        return patience is not None and self.best_iter is not None and self.since_best >= patience

    def state_dict(self) -> dict:
        """Return what every checkpoint stores, in state.json and train_state.pt."""
        keys = "val_loss", "best_loss", "best_iter", "since_best", "eval_pending"
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, train_state: dict, state: dict) -> None:
        """Continue from a checkpoint's train_state.pt and state.json."""
        for key in self.state_dict():
            if key in train_state:
                setattr(self, key, train_state[key])
        if "eval_pending" not in train_state:  # written before that key existed, always ahead of the evaluation
            before = state["config"]
            self.eval_pending = self.iter % before["eval_interval"] == 0 or self.iter >= before["max_iters"]
        self.wandb_id = state["wandb_id"]


def restore_run(start: tuple[Path, dict] | None, run: TrainingRun, lock: RunLock, recipe: str) -> Progress:
    """Prepare the run's folder, and load the checkpoint where there is one. Every rank calls it.

    Earlier runs, and checkpoints later than the one resumed, are moved aside.

    Args:
        start: what find_resume_checkpoint returned.
        lock: of the run's folder, acquired.
        recipe: run.config as TOML, to be written there.

    Raises:
        UserError: the checkpoint is another run's, or is not the same on every machine.
    """
    config, ranks, folder, progress = run.config, run.ranks, lock.run_dir, Progress()
    if start:
        path, state = start
        print("\n".join(require_same_run(path, state, run)))
        if not ranks.all(path.is_dir()):
            reason = "out_dir has to be a folder that all machines share" if ranks.world > 1 else "start again"
            raise UserError(f"{path} has gone meanwhile, or is not there on every machine: {reason}")
        ranks.require_equal({f"checkpoint {path}": checkpoint.read_state(path)})  # with the hashes of its files
        train_state = restore(path, run)
        progress.row, progress.iter = train_state["row"], train_state["row"]["iter"]
        progress.forked = path.resolve().parent != (folder / "ckpt").resolve()
        progress.eval_pending = False
        if not progress.forked:  # the best of another run is not this run's
            progress.load_state_dict(train_state, state)
    progress.eval_pending |= progress.iter % config.eval_interval == 0 or progress.iter >= config.max_iters

    def prepare_folder() -> bool:
        lock.prepare_folder(config.overwrite)
        toml = folder / "config.toml"
        if not start and toml.exists() and toml.read_bytes() != recipe.encode():  # the user's file
            os.replace(toml, toml.with_name(f"config.toml.old-{time.strftime('%Y%m%d-%H%M%S')}"))
        archive_later_checkpoints(folder, after=progress.iter)
        atomic_write(folder / "config.toml", recipe.encode())
        return progress.best_iter is None or checkpoint.set_link(folder, "best", progress.best_iter)

    if not ranks.run_on_rank0(prepare_folder):  # the best checkpoint was moved aside too
        progress.best_loss = progress.best_iter = None
    return progress


def checkpoint_state(run: TrainingRun, progress: Progress) -> dict:
    """Return the tensors and plain values of a checkpoint, which `restore` loads."""
    train_state = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    train_state |= {"health": run.nonfinite_guard.state_dict(), "row": progress.row, **progress.state_dict()}
    return {"weights": run.model.state_dict(), "train_state": train_state}


def restore(folder: Path, run: TrainingRun) -> dict:
    """Load weights, optimizer, scaler and skip counts of a verified checkpoint; return its train state.

    Model and optimizer may be sharded (fully_shard): every rank reads the files and keeps its shard.

    Raises:
        UserError: a tensor is missing, or its shape or dtype is not the model's. Nothing has been loaded then.
    """
    optimizer, params = run.optimizer, [p for group in run.optimizer.param_groups for p in group["params"]]
    sharded = is_sharded(params[0])
    train_state = checkpoint.load_train_state(folder, mmap=sharded)
    saved, skipped = train_state["optimizer"], train_state.get("health", {}).get("skipped", 0)
    names = {p: name for name, p in run.model.named_parameters()}
    if found := state_mismatches(saved, optimizer, names, has_stepped=train_state["row"]["iter"] > skipped):
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(f"{folder / TRAIN_STATE} is of another model or optimizer: {'; '.join(found[:3])}{more}")
    checkpoint.load_weights(run.model, folder, convert=shard_like)
    if sharded:
        for index, entries in saved["state"].items():  # all but the step counts, which have no dimension
            entries.update({k: shard_like(v, params[index]) for k, v in entries.items() if v.dim()})
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, current in zip(optimizer.param_groups, settings, strict=True):
        group.update(current)  # load_state_dict restores the old settings, but this call's config counts
    if train_state["scaler"]:  # empty unless the dtype was float16
        run.scaler.load_state_dict(train_state["scaler"])
    if "health" in train_state:
        run.nonfinite_guard.load_state_dict(train_state["health"])
    return train_state


MOMENTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


def state_mismatches(
    saved: dict, optimizer: torch.optim.Optimizer | MuonAndAdamW, names: dict[Tensor, str], has_stepped: bool
) -> list[str]:
    """List the differences between a saved optimizer state and this optimizer; load_state_dict accepts most of them.

    Args:
        saved: a state_dict.
        names: of the parameters.
        has_stepped: whether an update was applied; before that there may be no moments.
    """
    if isinstance(optimizer, MuonAndAdamW):
        pairs = (saved.get("muon"), optimizer.muon), (saved.get("adamw"), optimizer.adamw)
        return [text for part, single in pairs for text in state_mismatches(part or {}, single, names, has_stepped)]
    groups = saved.get("param_groups", []), optimizer.param_groups
    sizes, expected_sizes = ([len(group["params"]) for group in side] for side in groups)
    if sizes != expected_sizes:
        return [f"its groups have {sizes} parameters, not {expected_sizes}"]
    mismatches, state = [], saved.get("state", {})
    indices, params = ([p for group in side for p in group["params"]] for side in groups)
    for index, param in zip(indices, params, strict=True):
        for name in MOMENTS[type(optimizer)] if state or has_stepped else ():
            tensor = state.get(index, {}).get(name)
            found = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else "missing"
            expected = f"() {torch.float32}" if name == "step" else f"{tuple(param.shape)} {param.dtype}"
            if found != expected:
                mismatches.append(f"{name} of {names[param]} is {found}, not {expected}")
    return mismatches
