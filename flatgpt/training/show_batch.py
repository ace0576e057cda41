"""Show the documents in the batch of an update, for `train.py --show_batch`. Does not import torch."""

from __future__ import annotations

import math
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from config import TrainConfig, UserError, count_of, escape_controls
from flatgpt.data.dataset import Dataset, TrainingBatches, open_dataset, resolve_data_settings
from flatgpt.interop.pretrained import checkpoints_to_resume
from flatgpt.runs.history import RECIPE, folders, read_state
from flatgpt.runtime.files import require_writable, write_json

BATCH = ("batch_size", "grad_accum_steps")  # their product identifies a run


def show_batch_command(run_dir: str, n: int) -> str:
    """Return the command that shows the batch of update n (from 1) of a run, which need not have a checkpoint."""
    recipe = f"{run_dir if run_dir[0] != '-' else f'./{run_dir}'}/{RECIPE}"
    return f"python train.py --config {shlex.quote(recipe)} --show_batch {n}"


def show_batch(config: TrainConfig) -> None:
    """Print each sequence in the batch of update config.show_batch (from 1): where it lies, and its documents.

    Only reads: a run that is training is not disturbed. With config.json, the same is written as one JSON object.

    Raises:
        UserError: the run has fewer updates, or its dataset is missing or was changed.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    require_writable(config.json, "json")
    dataset = open_dataset(Path(config.data_dir) / config.dataset)
    config, windows = resolve_data_settings(config, dataset)
    require_batches_of_run(config, dataset)
    n, T = config.show_batch, config.context_length
    if n > config.max_iters:
        raise UserError(f"show_batch = {n}: the run has {count_of(config.max_iters, 'update')}; choose one of them")
    try:
        encoding = dataset.load_tokenizer()
    except UserError as error:
        encoding = None
        print(f"warning: ids are shown instead of text: {error}", file=sys.stderr)
    batches = TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)
    facts = {"update": n, "max_iters": config.max_iters, "dataset": str(dataset.folder)}
    facts |= {"manifest_sha256": dataset.manifest_hash, "tokenizer": dataset.meta["tokenizer"]}
    facts |= {"batch_size": config.batch_size, "grad_accum_steps": config.grad_accum_steps, "context_length": T}
    shown = []
    if config.json != "-":
        print(
            f"update {n} of {config.max_iters}, whose loss is in row iter {n} of metrics.csv: "
            f"{count_of(batches.per_update, 'sequence')} of {T:,} + 1 tokens of {dataset.notice or dataset.folder} "
            f"({facts['tokenizer']})\n"
        )
    for sequence in _sequences(batches, n - 1, dataset, encoding):
        if config.json != "-":
            print(_sequence_text(sequence))
        shown.append(sequence)
    if config.json:
        write_json({**facts, "sequences": shown}, config.json)


def require_batches_of_run(config: TrainConfig, dataset: Dataset) -> None:
    """Raise UserError if a run is named that has a checkpoint, and its data, or settings of its batches, are others."""
    found: list[Path] = []
    if config.resume:
        _, found = checkpoints_to_resume(config)
    elif Path(config.config or "").name == RECIPE:
        found = folders(Path(config.config).parent)
    state = next(filter(None, map(read_state, found)), {})
    if state.get("data", {}).get("manifest_sha256", dataset.manifest_hash) != dataset.manifest_hash:
        raise UserError(
            f"{dataset.folder} is not the dataset that the run was trained on: restore it, or give the folder that "
            "has it with --data_dir"
        )
    current, saved = vars(config), vars(config) | state.get("config", {})
    keys = ["seed", "stride", "context_length"]
    if math.prod(current[key] for key in BATCH) != math.prod(saved[key] for key in BATCH):
        keys += BATCH
    if differing := [f"{key} = {current[key]} (was {saved[key]})" for key in keys if current[key] != saved[key]]:
        raise UserError(f"the run has other batches: {', '.join(differing)}; leave out what differs from its settings")


def _sequences(
    batches: TrainingBatches, update: int, dataset: Dataset, encoding: tiktoken.Encoding | None
) -> Iterator[dict]:
    """Yield a description of each sequence of update `update` (from 0)."""
    windows, eot = batches.windows, dataset.meta["eot_id"]
    micros = range(batches.per_update // batches.batch_size)
    order = (int(window) for micro in micros for window in batches.indices(update, micro))
    for number, window in enumerate(order):
        start = window * windows.stride
        ids = windows.tokens[start : start + windows.T + 1].tolist()
        shard, offset = windows.tokens.locate(start)
        last_shard, _ = windows.tokens.locate(start + windows.T)
        yield {
            "sequence": number,
            "micro_batch": number // batches.batch_size,
            "epoch": (update * batches.per_update + number) // len(windows),
            "window": window,
            "first_token": start,
            "shard": Path(shard.path).name,
            "first_token_in_shard": offset,
            "last_shard": Path(last_shard.path).name,
            "end_of_text_id": eot,
            "documents": encoding and _documents(encoding, ids, eot),
            "ids": ids,
        }


def _documents(encoding: tiktoken.Encoding, ids: list[int], eot: int | None) -> list[str]:
    """Return the texts before, between and after the end-of-text tokens. Ids without a token become `<id N>`."""
    documents = [b""]
    for n in ids:
        if n == eot:
            documents.append(b"")
            continue
        try:
            documents[-1] += encoding.decode_single_token_bytes(n)
        except KeyError:
            documents[-1] += b"<id %d>" % n
    return [text.decode(errors="replace") for text in documents]


def _sequence_text(sequence: dict) -> str:
    """Return a sequence of `_sequences` as text: a title, its lines after `| `, and a line at each end of a text."""
    title = "=== sequence {sequence}, micro-batch {micro_batch}: window {window} of epoch {epoch}, from id "
    title += "{first_token_in_shard} of {shard}" + " to {last_shard}" * (sequence["shard"] != sequence["last_shard"])
    lines = [title.format_map(sequence)]
    if sequence["documents"] is None:
        lines += textwrap.wrap(" ".join(map(str, sequence["ids"])), 100, initial_indent="| ", subsequent_indent="| ")
    for n, document in enumerate(sequence["documents"] or ()):
        lines += [f"--- end of text (id {sequence['end_of_text_id']})"] * (n > 0)
        lines += [f"| {line}" for line in escape_controls(document).split("\n")] if document else []
    return "\n".join(lines) + "\n"
