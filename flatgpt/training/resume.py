"""Which checkpoint a run goes on from, whether it may, what becomes of what lies in its way, and the way back."""

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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import EXCLUSIVE, UserError
from flatgpt import REPO_ROOT
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint import TRAIN_STATE, WEIGHTS
from flatgpt.runs.lock import RunLock
from flatgpt.runtime.device import cpu_name
from flatgpt.runtime.files import atomic_write
from flatgpt.runtime.parallel import is_sharded, shard_like
from flatgpt.training.muon import Muon
from flatgpt.training.optimizer import MuonAndAdamW
from flatgpt.training.setup import TrainingRun

# Keys that decide, with the model's, which run it is; and keys that only say how it was called.
FIXED = ("stride", "seed", "optimizer")
BATCH = ("batch_size", "grad_accum_steps")  # their product does
CALL = ("config", "resume", "overwrite", "out_dir", "data_dir", "device", "init_from", "list", "plan", "gpus", "mfu")


def find_resume_checkpoint(claim: RunLock, resume: str | None, overwrite: bool) -> tuple[Path, dict] | None:
    """The verified checkpoint that training goes on from, with its state; None to start anew.

    Args:
        claim: to the run's folder, which is taken.
        resume: None, `latest`, `auto` (start anew when there is none), or a run's or checkpoint's folder.
        overwrite: a run that is there is no mistake; RunLock.prepare_folder takes care of it.

    Raises:
        UserError: there is a run and neither was asked for, or nothing to resume, or somebody trains there.
    """
    claim.acquire()
    run_dir = claim.run_dir
    there = checkpoint.folders(run_dir)
    if resume in ("latest", "auto"):
        found = checkpoint.first_valid(there, (WEIGHTS, TRAIN_STATE), print)
        if found is None and (resume == "latest" or there):
            reason = "every checkpoint there is damaged" if there else "there is no checkpoint"
            remedy = "add --overwrite instead to start again" if there else "start without --resume"
            raise UserError(f"nothing to resume in {run_dir}: {reason}; {remedy}")
        return found
    if resume:
        path = Path(resume)
        if (path / "ckpt").is_dir():
            found = checkpoint.first_valid(checkpoint.folders(path), (WEIGHTS, TRAIN_STATE), print)
            if found is None:
                raise UserError(f"resume = {resume}: this run has no usable checkpoint")
            path = found[0]
        try:
            state = checkpoint.verify(path)
        except checkpoint.DamagedCheckpointError as why:
            raise UserError(f"resume = {resume}: {why}") from None
        if there and path.resolve().parent.parent != run_dir.resolve():
            raise UserError(
                f"resume = {resume} is of another run, and {run_dir} holds checkpoints of its own; "
                "give the new run an --out_dir of its own"
            )
        return path.resolve(), state
    if there and not overwrite:
        raise UserError(
            f"{run_dir} already holds a run (at iter {int(there[0].name.removeprefix('iter_'))}): "
            "add --resume to go on with it, or --overwrite to start again (the old run moves away, nothing is deleted)"
        )
    return None


def require_same_run(folder: Path, state: dict, run: TrainingRun) -> list[str]:
    """What a user should know of the resuming: the checkpoint, what is different now, what stays as it was.

    Raises:
        UserError: names all differences that would make it another run: model, batch, seed, data, tokenizer.
    """
    config, saved = run.config, state["config"]
    now = dataclasses.asdict(config)
    fixed = {*FIXED, *dataclasses.asdict(config.model())} - {"dropout", "attention", "activation_checkpointing"}
    now = {k: v for k, v in now.items() if k not in dict(EXCLUSIVE) or v is not None}  # resolved into its other unit
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in now.items()}  # as JSON has it
    # sample_prompt was one text once
    saved = {k: [v] if isinstance(v, str) and isinstance(now.get(k), list) else v for k, v in saved.items()}
    changed = {k: f"{k} = {v} (was {saved[k]})" for k, v in now.items() if k in saved and v != saved[k]}
    if math.prod(saved[k] for k in BATCH) != math.prod(now[k] for k in BATCH):  # the sequences of an update
        fixed |= set(BATCH)
    differing = [changed[k] for k in sorted(fixed & set(changed))]
    then, there = state["tokenizer"], run.dataset.meta
    if (then["name"], then["ranks_sha256"]) != (there["tokenizer"], there["ranks_sha256"]):
        differing.append(f"tokenizer = {there['tokenizer']} (was {then['name']})")
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
    exact = [f"{key} = {now} (was {state.get(key)})" for key, now in _exact(run).items() if state.get(key) != now]
    if exact:
        lines.append(f"note: equal to rounding, not to the bit: {'; '.join(exact)}")
    return lines


def archive_later_checkpoints(run_dir: Path, after: int) -> None:
    """Move checkpoints later than iteration `after` to <run_dir>/ckpt/lost-<time>/: a resumed run writes them anew.

    Half-written ones, which a killed process left, are removed.
    """
    for partial in run_dir.glob("ckpt/.iter_*.tmp"):
        shutil.rmtree(partial)
    for folder in checkpoint.folders(run_dir):
        if int(folder.name.removeprefix("iter_")) > after:
            checkpoint.move_aside(folder, "later than what is resumed")


def provenance() -> dict:
    """What made this: command line, code and Python, for state.json. Secrets of the environment are left out."""

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
    """What every state.json of a run says alike."""
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
        **_exact(run),
    }


def _exact(run: TrainingRun) -> dict:
    """Where these are the same, a resumed run is equal to the bit."""
    machine = {"device": run.device_settings.name, "cpu": cpu_name(), "threads": torch.get_num_threads()}
    return machine | {"ranks": run.ranks.world, "torch": torch.__version__}


@dataclass
class Position:
    """Where a run is when its loop begins."""

    row: dict  # of the newest update
    progress: dict  # what evaluations have found so far
    saved: int | None = None  # iteration of the checkpoint in the run's own folder that it goes on from
    evaluated: int | None = None  # the same, where an evaluation came after it: to be made again
    wandb_id: str | None = None


def restore_run(start: tuple[Path, dict] | None, run: TrainingRun, claim: RunLock, recipe: str) -> Position:
    """Make a run's folder ready, and bring the run to where its checkpoint is; every rank calls it.

    Older runs, and checkpoints later than the one that it goes on from, move aside.

    Args:
        start: what find_resume_checkpoint gave.
        claim: to the folder, which is taken.
        recipe: run.config as TOML, which is written there.

    Raises:
        UserError: another run's checkpoint, or not the same one on every machine.
    """
    config, ranks, folder = run.config, run.ranks, claim.run_dir
    progress = {"val_loss": None, "best_loss": None, "best_iter": None, "since_best": 0}
    at = Position({"iter": 0, "tokens": 0, "epoch": 0.0}, progress)
    if start:
        path, state = start
        print("\n".join(require_same_run(path, state, run)))
        if not ranks.all(path.is_dir()):
            reason = "out_dir has to be a folder that all machines share" if ranks.world > 1 else "start again"
            raise UserError(f"{path} has gone meanwhile, or is not there on every machine: {reason}")
        ranks.require_equal({f"checkpoint {path}": checkpoint.read_state(path)})  # its files' hashes too
        train_state = restore(path, run)
        at.row = train_state["row"]
        if path.resolve().parent == (folder / "ckpt").resolve():  # not another run's: that one's best is not ours
            progress |= {key: train_state[key] for key in progress if key in train_state}
            at.saved, at.wandb_id, before = at.row["iter"], state["wandb_id"], state["config"]
            if at.saved % before["eval_interval"] == 0 or at.saved >= before["max_iters"]:
                at.evaluated = at.saved  # for the log and for `best`

    def make_ready() -> bool:
        claim.prepare_folder(config.overwrite)
        toml = folder / "config.toml"
        if not start and toml.exists() and toml.read_bytes() != recipe.encode():  # somebody's own
            os.replace(toml, toml.with_name(f"config.toml.old-{time.strftime('%Y%m%d-%H%M%S')}"))
        archive_later_checkpoints(folder, after=at.row["iter"])
        atomic_write(folder / "config.toml", recipe.encode())
        return progress["best_iter"] is None or checkpoint.set_link(folder, "best", progress["best_iter"])

    if not ranks.run_on_rank0(make_ready):  # the best checkpoint has moved aside, too
        progress["best_loss"] = progress["best_iter"] = None
    return at


def restore(folder: Path, run: TrainingRun) -> dict:
    """Load weights, optimizer, scaler and health of a verified checkpoint; returns the rest of its train state.

    Model and optimizer may be in parts (fully_shard): every rank reads the folder and keeps its own.

    Raises:
        UserError: a tensor is missing or of another shape than the model's; nothing has been loaded then.
    """
    optimizer, params = run.optimizer, [p for group in run.optimizer.param_groups for p in group["params"]]
    sharded = is_sharded(params[0])
    train_state = checkpoint.load_train_state(folder, mmap=sharded)
    saved, left_out = train_state["optimizer"], train_state.get("health", {}).get("skipped", 0)
    names = {p: name for name, p in run.model.named_parameters()}
    if unlike := state_mismatches(saved, optimizer, names, applied=train_state["row"]["iter"] > left_out):
        more = f", and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise UserError(f"{folder / TRAIN_STATE} is of another model or optimizer: {'; '.join(unlike[:3])}{more}")
    checkpoint.load_weights(run.model, folder, convert=shard_like)
    if sharded:  # and so AdamW's
        for index, entries in saved["state"].items():
            entries.update(
                {k: shard_like(v, params[index]) for k, v in entries.items() if v.dim()}
            )  # all but the steps
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, now in zip(optimizer.param_groups, settings, strict=True):
        group.update(now)  # load_state_dict brings back the old ones, whatever this call asks for
    if train_state["scaler"]:  # empty where the run has not been float16 so far
        run.scaler.load_state_dict(train_state["scaler"])
    if "health" in train_state:
        run.nonfinite_guard.load_state_dict(train_state["health"])
    return train_state


MOMENTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


def state_mismatches(
    saved: dict, optimizer: torch.optim.Optimizer | MuonAndAdamW, names: dict[Tensor, str], applied: bool
) -> list[str]:
    """What of a saved optimizer is not this one's: torch itself takes other shapes, and goes without some.

    Args:
        applied: whether it has made an update; before the first one it has nothing.
    """
    if isinstance(optimizer, MuonAndAdamW):
        pairs = (saved.get("muon"), optimizer.muon), (saved.get("adamw"), optimizer.adamw)
        return [text for part, its in pairs for text in state_mismatches(part or {}, its, names, applied)]
    sides = saved.get("param_groups", []), optimizer.param_groups
    sizes, expected = ([len(group["params"]) for group in side] for side in sides)
    if sizes != expected:
        return [f"its groups have {sizes} parameters, not {expected}"]
    found, moments = [], saved.get("state", {})
    indices, params = ([p for group in side for p in group["params"]] for side in sides)
    for index, param in zip(indices, params, strict=True):
        for name in MOMENTS[type(optimizer)] if moments or applied else ():
            tensor = moments.get(index, {}).get(name)
            there = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else "missing"
            like = f"() {torch.float32}" if name == "step" else f"{tuple(param.shape)} {param.dtype}"
            if there != like:
                found.append(f"{name} of {names[param]} is {there}, not {like}")
    return found
