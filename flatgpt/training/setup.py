"""A run at its beginning: machine, data, model and optimizer of a config, and what they come to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor, nn

from config import PrepareConfig, TrainConfig, UserError, run_dir
from flatgpt.data import tokenizer
from flatgpt.data.dataset import Dataset, TrainingBatches, Windows, open_dataset
from flatgpt.data.prepare import prepare
from flatgpt.interop.loading import load_pretrained
from flatgpt.interop.pretrained import pretrained_tokenizer
from flatgpt.runs.run_log import peak_flops
from flatgpt.runtime import precision
from flatgpt.runtime.device import DeviceSettings, compile_forward, find_device, make_deterministic, note, select_device
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from flatgpt.runtime.parallel import wrap_model
from flatgpt.training import plan
from flatgpt.training.nonfinite import NonfiniteGuard
from flatgpt.training.optimizer import make_optimizer
from flatgpt.training.prefetch import BatchPrefetcher
from model import GPT


@dataclass
class TrainingRun:
    """Everything that an update needs."""

    config: TrainConfig  # resolved: sizes, lengths, dtype and compile are settled
    device_settings: DeviceSettings
    ranks: DistributedContext
    dataset: Dataset
    encoding: tiktoken.Encoding | None  # for samples; training needs ids alone
    batches: TrainingBatches
    prefetcher: BatchPrefetcher  # the same, on the device
    model: GPT  # the raw module: saved, evaluated and sampled
    wrapped_model: nn.Module  # the same on all ranks' devices together
    forward: Callable[..., Tensor]  # that, compiled where it pays: inputs, targets -> loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    nonfinite_guard: NonfiniteGuard


def find_dataset(config: TrainConfig, ranks: DistributedContext) -> Dataset:
    """The dataset of a config, the same on every rank; Python's reference is prepared where it is missing."""
    folder = Path(config.data_dir) / config.dataset
    for turn in (ranks.first, ranks.local_rank == 0):  # then other machines, where they do not share the folder
        if config.dataset == "pydoc" and turn and not (folder / "meta.json").exists():
            print(f"{folder} is not there yet: preparing the reference that ships inside Python")
            prepare(PrepareConfig(source="pydoc", data_dir=config.data_dir))
        ranks.barrier()
    dataset = open_dataset(folder)
    with ThreadPoolExecutor(1) as thread:  # hashing takes as long as the data is large
        checked = [thread.submit(dataset.check, config.verify_data)] if ranks.local_rank == 0 else []
        ranks.poll_all(lambda: all(work.done() for work in checked))
        for work in checked:
            work.result()
    ranks.require_equal({f"dataset {folder}": dataset.manifest_hash})
    return dataset


def _vocab_size(config: TrainConfig, dataset: Dataset) -> int:
    meta = dataset.meta
    if config.vocab_size is not None and config.vocab_size < meta["vocab_size"]:
        raise UserError(
            f"vocab_size = {config.vocab_size:,}: {dataset.folder} is tokenised with {meta['tokenizer']}, which has "
            f"{meta['vocab_size']:,} ids; leave vocab_size out, or take at least that"
        )
    return config.vocab_size or meta["vocab_size"]


EARLIER = "chosen when the run began"  # before the reason of that choice


def _machine(config: TrainConfig, ranks: DistributedContext, before: dict) -> DeviceSettings:
    """The device, dtype and compile setting of a run. On CPUs rank 0 measures the dtype of `auto` for all ranks.

    Args:
        before: what `auto` chose when the resumed run began; empty for a new run.
    """
    settled, why = {"dtype": config.dtype, "compile": config.compile}, {}
    for key in ("dtype", "compile"):
        if settled[key] in ("auto", None) and before.get(key) is not None:
            reason = before.get("why", {}).get(key, "").removeprefix(EARLIER).removeprefix(": ")
            settled[key], why[key] = before[key], f"{EARLIER}: {reason}" if reason else EARLIER
    local_rank = ranks.local_rank if ranks.world > 1 else None
    device = find_device(config.device, local_rank)
    if settled["dtype"] == "auto":  # all ranks take part, also where one of them has another device
        found = ranks.run_on_rank0(lambda: precision.faster_training_dtype(config) if device.type == "cpu" else None)
        if found and device.type == "cpu":
            settled["dtype"], why["dtype"] = found
    return select_device(config.device, settled["dtype"], settled["compile"], local_rank, why)


def build_run(
    config: TrainConfig, ranks: DistributedContext = SINGLE_PROCESS, chosen: dict | None = None
) -> TrainingRun:
    """Device, data, model and optimizer of a config, at update 0; bench.py times what comes from here.

    Args:
        chosen: what `auto` had chosen when the run that is resumed began; reused.
    """
    own = ("config", "out_dir", "data_dir", "resume", "init_from")  # paths, which machines may have their own of
    ranks.require_equal({key: value for key, value in dataclasses.asdict(config).items() if key not in own})
    dataset = find_dataset(config, ranks)
    folder, meta = dataset.folder, dataset.meta
    vocab_size = _vocab_size(config, dataset)
    theirs = pretrained_tokenizer(config.init_from) if config.init_from and chosen is None else None
    if theirs not in (None, meta["tokenizer"]):
        raise UserError(
            f"init_from = {config.init_from} was trained with tokenizer {theirs}, {folder} is tokenised with "
            f"{meta['tokenizer']}: prepare the text with {theirs}"
        )
    encoding = None
    if config.sample_tokens:
        try:
            encoding = tokenizer.load(meta["tokenizer"])
        except UserError as why:  # training needs ids alone, and a night's run should not end for a sample
            note(f"warning: no samples will be written: {why}")
        if not ranks.all(encoding is not None):
            encoding = None
    windows = Windows(dataset.tokens("train"), config.context_length, config.stride)
    for split, tokens in (("train", windows.tokens), ("val", dataset.tokens("val"))):
        if len(tokens) <= config.context_length:
            raise UserError(
                f"too little text: the {split} split of {folder} has {len(tokens):,} tokens, one window takes "
                f"context_length + 1 = {config.context_length + 1:,}; give more text, or a smaller --context_length"
            )
    per_update = config.batch_size * config.grad_accum_steps
    max_iters = config.max_iters or math.ceil(config.epochs * len(windows) / per_update)
    place = _machine(config, ranks, chosen or {})
    lr_decay_iters = config.lr_decay_iters or max_iters
    warmup_iters = config.warmup_iters
    if warmup_iters is None:
        warmup_iters = round(config.warmup_fraction * lr_decay_iters)
    config = dataclasses.replace(
        config,
        vocab_size=vocab_size,
        max_iters=max_iters,
        lr_decay_iters=lr_decay_iters,
        warmup_iters=warmup_iters,
        save_interval=config.save_interval or config.eval_interval,
        stride=windows.stride,
        dtype=str(place.dtype).removeprefix("torch."),
        compile=place.compile,
        out_dir=str(run_dir(config)),
    )
    ranks.require_equal({"dtype": config.dtype, "compile": config.compile})  # auto may choose for each its own
    if config.warmup_iters >= max_iters:
        print(f"note: the warm-up of {config.warmup_iters} updates is longer than the run of {max_iters}")
    # eager CPUs give the same bits anyway; compiled ones add up the embedding's gradient as threads come
    if config.deterministic or (place.device.type == "cpu" and place.compile):
        make_deterministic()
    if place.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in training; eval.py leaves it off
    torch.manual_seed(config.seed)
    model = GPT(config.model())  # drawn on the CPU: the same weights on every device
    if config.init_from and chosen is None:
        load_pretrained(model, config.init_from)
    ranks.require_equal({"initial weights": [float(p.detach().double().sum()) for p in model.parameters()]})
    if not config.fsdp or ranks.world == 1:  # else it goes there part by part
        model.to(place.device)
    together, scaler = wrap_model(model, ranks, place.device, place.dtype, config.fsdp), place.scaler()
    batches = TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)
    return TrainingRun(
        config=config,
        device_settings=place,
        ranks=ranks,
        dataset=dataset,
        encoding=encoding,
        batches=batches,
        prefetcher=BatchPrefetcher(batches, place.device, ranks.micro_batches(config.grad_accum_steps)),
        model=model,
        wrapped_model=together,
        forward=compile_forward(together, ranks.all) if place.compile else together,
        optimizer=make_optimizer(model, config),
        scaler=scaler,
        nonfinite_guard=NonfiniteGuard(config, place.device, scaler.is_enabled()),
    )


def summary(run: TrainingRun) -> str:
    """The arithmetic of a run, before its first update."""
    config, W = run.config, len(run.batches.windows)
    per_update, params, data = run.batches.per_update, run.model.num_params(), run.dataset.notice or run.dataset.folder
    tokens = config.max_iters * per_update * config.context_length
    return "\n".join(
        (
            f"model    {params:,} parameters: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
            f"context {config.context_length}, {config.vocab_size:,} ids ({run.dataset.meta['tokenizer']})",
            f"data     {data}: {len(run.batches.windows.tokens):,} training tokens, {W:,} windows",
            f"update   {config.batch_size} sequences x {config.grad_accum_steps} x {config.context_length} tokens = "
            f"{per_update * config.context_length:,} tokens; {W / per_update:,.1f} updates an epoch",
            f"run      {config.max_iters:,} updates = {tokens:,} tokens = {config.max_iters * per_update / W:.2f} "
            f"epochs, {tokens / params:.1f} tokens per parameter",
            f"machine  {run.device_settings.describe()}{run.ranks.describe(config.fsdp)}",
            f"folder   {config.out_dir}",
        )
    )


def print_plan(config: TrainConfig) -> None:
    """How large a run is and how long it takes, without training; of the data only what is there."""
    tokens, place = None, _machine(config, SINGLE_PROCESS, {})
    folder = Path(config.data_dir) / config.dataset
    if (folder / "meta.json").exists() or any(folder.glob("*.bin")) or config.vocab_size is None:
        try:
            dataset = open_dataset(folder)
        except UserError as why:
            raise UserError(f"{why}; or give --vocab_size, for the plan without it") from None
        config = dataclasses.replace(config, vocab_size=_vocab_size(config, dataset))
        tokens = len(dataset.tokens("train"))
    peak = peak_flops(place.name) or plan.matmul_flops(place.device, place.dtype)
    print(plan.report(config, tokens, (place.name, peak)))
