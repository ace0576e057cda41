"""Which checkpoint a run goes on from, whether it may, what becomes of what lies in its way, and the way back."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from pathlib import Path

import torch

import checkpoint
from checkpoint import TRAIN_STATE, WEIGHTS
from config import EXCLUSIVE, TrainConfig, UserError
from dataset import Dataset
from model import GPT
from ranks import is_sharded, part_of
from runtime import Machine
from shards import write_whole

# Keys that decide, with the model's, which run it is; and keys that only say how it was called.
FIXED = ("stride", "seed", "optimizer")
BATCH = ("batch_size", "grad_accum_steps")  # their product does
CALL = ("config", "resume", "overwrite", "out_dir", "data_dir", "device", "init_from", "plan", "gpus", "mfu")


def find_start(run_dir: Path, resume: str | None, overwrite: bool) -> tuple[Path, dict] | None:
    """The verified checkpoint that training goes on from, with its state; None to start anew.

    Args:
        resume: None, `latest`, `auto` (start anew when there is none), or a run's or checkpoint's folder.
        overwrite: a run that is there is no mistake; `move_away` takes care of it.

    Raises:
        UserError: there is a run and neither was asked for, or nothing to resume.
    """
    there = checkpoint.checkpoints(run_dir)
    if resume in ("latest", "auto"):
        found = checkpoint.first_good(there, (WEIGHTS, TRAIN_STATE), print)
        if found is None and (resume == "latest" or there):
            reason = "every checkpoint there is damaged" if there else "there is no checkpoint"
            remedy = "add --overwrite instead to start again" if there else "start without --resume"
            raise UserError(f"nothing to resume in {run_dir}: {reason}; {remedy}")
        return found
    if resume:
        path = Path(resume)
        if (path / "ckpt").is_dir():
            found = checkpoint.first_good(checkpoint.checkpoints(path), (WEIGHTS, TRAIN_STATE), print)
            if found is None:
                raise UserError(f"resume = {resume}: this run has no usable checkpoint")
            path = found[0]
        try:
            state = checkpoint.verify(path)
        except checkpoint.Damaged as why:
            raise UserError(f"resume = {resume}: {why}") from None
        if there and path.resolve().parent.parent != run_dir.resolve():
            raise UserError(
                f"resume = {resume} is of another run, and {run_dir} holds checkpoints of its own; "
                "give the new run an --out_dir of its own"
            )
        return path.resolve(), state
    if there and not overwrite:
        raise UserError(
            f"{run_dir} already holds a run (at iter {checkpoint.read_state(there[0])['iter']}): "
            "add --resume to go on with it, or --overwrite to start again (the old run moves away, nothing is deleted)"
        )
    return None


def check_same_run(folder: Path, state: dict, config: TrainConfig, manifest_hash: str) -> list[str]:
    """The settings that a resumed run changes, as sentences; those that would make it another run are refused.

    Raises:
        UserError: names all of the latter: the model's shape, the batch, the seed, the data.
    """
    saved, now = state["config"], dataclasses.asdict(config)
    fixed = {*FIXED, *dataclasses.asdict(config.model())} - {"dropout", "attention", "activation_checkpointing"}
    now = {k: v for k, v in now.items() if k not in dict(EXCLUSIVE) or v is not None}  # resolved into its other unit
    changed = {k: f"{k} = {v} (was {saved[k]})" for k, v in now.items() if k in saved and v != saved[k]}
    if math.prod(saved[k] for k in BATCH) != math.prod(now[k] for k in BATCH):  # the sequences of an update
        fixed |= set(BATCH)
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
    for folder in checkpoint.checkpoints(run_dir):
        if int(folder.name.removeprefix("iter_")) > after:
            lost = run_dir / "ckpt" / f"lost-{time.strftime('%Y%m%d-%H%M%S')}"
            lost.mkdir(exist_ok=True)
            os.rename(folder, lost / folder.name)
            print(f"{folder}, later than what is resumed, is now in {lost}")


def facts(config: TrainConfig, place: Machine, dataset: Dataset) -> dict:
    """What every state.json of a run says alike."""
    meta = dataset.meta
    return {
        "config": dataclasses.asdict(config),
        "chosen": {"dtype": config.dtype, "compile": config.compile, "why": place.why},
        "tokenizer": {"name": meta["tokenizer"], **{k: meta[k] for k in ("vocab_size", "ranks_sha256", "eot_id")}},
        "data": {
            "folder": str(dataset.folder),
            "manifest_sha256": dataset.manifest_hash,
            "end_of_text": meta["end_of_text"],
            "tokens": {split: entry["tokens"] for split, entry in meta["splits"].items()},
        },
        **checkpoint.provenance(place.name),
    }


def open_folder(config: TrainConfig, recipe: str, iteration: int, best_iter: int | None) -> bool:
    """Make a run's folder ready to go on at an iteration: older runs and later checkpoints move aside.

    Args:
        config: resolved.
        recipe: the same as TOML, which is written there.
        best_iter: of the best checkpoint so far.

    Returns:
        whether `best` leads to that checkpoint; it may have moved aside.
    """
    folder = Path(config.out_dir)
    if config.overwrite:
        move_away(folder)
    folder.mkdir(parents=True, exist_ok=True)
    set_aside(folder, after=iteration)
    write_whole(folder / "config.toml", recipe.encode())
    return best_iter is None or checkpoint.point(folder, "best", best_iter)


def restore(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict:
    """Load weights, optimizer and scaler of a verified checkpoint; returns the rest of its train state.

    Model and optimizer may be in parts (fully_shard): every rank reads the folder and keeps its own.
    """
    checkpoint.load_weights(model, folder, cut=part_of)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = is_sharded(params[0])
    train_state = checkpoint.load_train_state(folder, mmap=sharded)
    saved = train_state["optimizer"]
    if sharded:  # and so AdamW's
        for index, entries in saved["state"].items():
            entries.update({k: part_of(v, params[index]) for k, v in entries.items() if v.dim()})  # all but the steps
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, now in zip(optimizer.param_groups, settings, strict=True):
        group.update(now)  # load_state_dict brings back the old ones, whatever this call asks for
    if train_state["scaler"]:  # empty where the run has not been float16 so far
        scaler.load_state_dict(train_state["scaler"])
    return train_state
