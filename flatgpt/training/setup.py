"""Build a run from its config: device, data, model and optimizer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor, nn

from config import PrepareConfig, ReportedByOtherRank, TrainConfig, UserError, run_dir
from flatgpt.data import tokenizer
from flatgpt.data.dataset import Dataset, TrainingBatches, Windows, open_dataset
from flatgpt.data.prepare import prepare
from flatgpt.interop.loading import load_pretrained
from flatgpt.interop.pretrained import read_tokenizer
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

    config: TrainConfig  # resolved: no `auto` and no derived value is left open
    device_settings: DeviceSettings
    ranks: DistributedContext
    dataset: Dataset
    encoding: tiktoken.Encoding | None  # for samples; None where there are none
    batches: TrainingBatches
    prefetcher: BatchPrefetcher  # of these batches, to the device
    model: GPT  # the plain module: saved, evaluated and sampled
    wrapped_model: nn.Module  # by DDP or fully_shard; the model itself on a single rank
    forward: Callable[..., Tensor]  # inputs, targets -> loss: the wrapped model, or its compiled form
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    nonfinite_guard: NonfiniteGuard


def load_dataset(config: TrainConfig, ranks: DistributedContext) -> Dataset:
    """Open and check the dataset on every rank. The default dataset is prepared first where it is missing."""
    folder = Path(config.data_dir) / config.dataset
    for turn in (ranks.first, ranks.local_rank == 0):  # then other machines, where they do not share the folder
        if config.dataset == "pydoc" and turn and not (folder / "meta.json").exists():
            print(f"{folder} is not there yet: preparing the reference that ships inside Python")
            prepare(PrepareConfig(source="pydoc", data_dir=config.data_dir))
        ranks.barrier()
    dataset = open_dataset(folder)
    with ThreadPoolExecutor(1) as thread:  # hashing a large dataset may take longer than a collective's timeout
        checks = [thread.submit(dataset.check, config.verify_data)] if ranks.local_rank == 0 else []
        ranks.poll_all(lambda: all(work.done() for work in checks))
        for work in checks:
            work.result()
    ranks.require_equal({f"dataset {folder}": dataset.manifest_hash})
    return dataset


def resolve_vocab_size(config: TrainConfig, dataset: Dataset) -> int:
    """Return vocab_size, by default the dataset's."""
    meta = dataset.meta
    if config.vocab_size is not None and config.vocab_size < meta["vocab_size"]:
        raise UserError(
            f"vocab_size = {config.vocab_size:,}: {dataset.folder} is tokenised with {meta['tokenizer']}, which has "
            f"{meta['vocab_size']:,} ids; leave vocab_size out, or take at least that"
        )
    return config.vocab_size or meta["vocab_size"]


EARLIER = "chosen when the run began"  # comes before the reason of that choice


def choose_device(config: TrainConfig, ranks: DistributedContext, chosen: dict) -> DeviceSettings:
    """Return the device, dtype and compile setting of a run. On CPUs rank 0 measures the dtype of `auto` for all ranks.

    Args:
        chosen: what `auto` chose when the resumed run began; empty for a new run.
    """
    settings, why = {"dtype": config.dtype, "compile": config.compile}, {}
    for key in ("dtype", "compile"):
        if settings[key] in ("auto", None) and chosen.get(key) is not None:
            reason = chosen.get("why", {}).get(key, "").removeprefix(EARLIER).removeprefix(": ")
            settings[key], why[key] = chosen[key], f"{EARLIER}: {reason}" if reason else EARLIER
    local_rank = ranks.local_rank if ranks.world > 1 else None
    device = find_device(config.device, local_rank)
    if settings["dtype"] == "auto":  # a collective: all ranks take part, whatever their device
        found = ranks.run_on_rank0(lambda: precision.faster_training_dtype(config) if device.type == "cpu" else None)
        if found and device.type == "cpu":
            settings["dtype"], why["dtype"] = found
    return select_device(config.device, settings["dtype"], settings["compile"], local_rank, why)


def load_encoding(config: TrainConfig, ranks: DistributedContext, name: str) -> tiktoken.Encoding | None:
    """Return the tokenizer for samples. Training needs none: where it cannot be loaded there are no samples."""
    encoding = None
    if config.sample_tokens:
        try:
            encoding = tokenizer.load(name)
        except UserError as error:
            note(f"warning: no samples will be written: {error}")
        if not ranks.all(encoding is not None):
            encoding = None
    return encoding


def build_run(
    config: TrainConfig, ranks: DistributedContext = SINGLE_PROCESS, resumed: dict | None = None
) -> TrainingRun:
    """Build everything that an update needs, and resolve the config. Weights are those before update 0.

    Args:
        resumed: state.json of the checkpoint that the run resumes from: its schedule and the choices of `auto` stay.

    Raises:
        UserError: settings, data and initial weights do not fit each other, or ranks differ.
    """
    paths = ("config", "out_dir", "data_dir", "resume", "init_from")  # these may differ between machines
    ranks.require_equal({key: value for key, value in dataclasses.asdict(config).items() if key not in paths})
    dataset = load_dataset(config, ranks)
    folder, meta = dataset.folder, dataset.meta
    vocab_size = resolve_vocab_size(config, dataset)
    initial_tokenizer = read_tokenizer(config.init_from) if config.init_from and not resumed else None
    if initial_tokenizer not in (None, meta["tokenizer"]):
        raise UserError(
            f"init_from = {config.init_from} was trained with tokenizer {initial_tokenizer}, {folder} is tokenised "
            f"with {meta['tokenizer']}: prepare the text with {initial_tokenizer}"
        )
    encoding = load_encoding(config, ranks, meta["tokenizer"])
    windows = Windows(dataset.tokens("train"), config.context_length, config.stride)
    for split, tokens in (("train", windows.tokens), ("val", dataset.tokens("val"))):
        if len(tokens) <= config.context_length:
            raise UserError(
                f"too little text: the {split} split of {folder} has {len(tokens):,} tokens, one window takes "
                f"context_length + 1 = {config.context_length + 1:,}; give more text, or a smaller --context_length"
            )
    per_update = config.batch_size * config.grad_accum_steps
    max_iters = config.max_iters or math.ceil(config.epochs * len(windows) / per_update)
    device_settings = choose_device(config, ranks, resumed["chosen"] if resumed else {})
    device, compiled = device_settings.device, device_settings.compile
    lr_decay_iters = config.lr_decay_iters
    if lr_decay_iters is None:  # a resumed run keeps its schedule, even where max_iters was raised
        lr_decay_iters = resumed["config"]["lr_decay_iters"] if resumed else max_iters
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
        dtype=str(device_settings.dtype).removeprefix("torch."),
        compile=compiled,
        out_dir=str(run_dir(config)),
    )
    ranks.require_equal({"dtype": config.dtype, "compile": compiled})  # where each has resolved `auto` by itself
    if config.warmup_iters >= max_iters:
        print(f"note: the warm-up of {config.warmup_iters} updates is longer than the run of {max_iters}")
    # Eager CPU code is deterministic; compiled code adds up the embedding's gradient in the order of its threads.
    if config.deterministic or (device.type == "cpu" and compiled):
        make_deterministic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(config.seed)
    model = GPT(config.model())  # initialised on the CPU: the same weights on every device
    if config.init_from and not resumed:
        load_pretrained(model, config.init_from)
    ranks.require_equal({"initial weights": [float(p.detach().double().sum()) for p in model.parameters()]})
    if not config.fsdp or ranks.world == 1:  # fully_shard moves its shards by itself
        model.to(device)
    wrapped_model = wrap_model(model, ranks, device, device_settings.dtype, config.fsdp)
    scaler = device_settings.scaler()
    batches = TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)
    return TrainingRun(
        config=config,
        device_settings=device_settings,
        ranks=ranks,
        dataset=dataset,
        encoding=encoding,
        batches=batches,
        prefetcher=BatchPrefetcher(batches, device, ranks.micro_batches(config.grad_accum_steps)),
        model=model,
        wrapped_model=wrapped_model,
        forward=compile_forward(wrapped_model, ranks.all) if compiled else wrapped_model,
        optimizer=make_optimizer(model, config),
        scaler=scaler,
        nonfinite_guard=NonfiniteGuard(config.on_nonfinite, device, scaler.is_enabled()),
    )


def print_plan(config: TrainConfig) -> None:
    """Print the size, memory and time of a run without training. Uses the dataset's counts where it is prepared."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise ReportedByOtherRank  # the first rank of the machine prints
    tokens, device = None, choose_device(config, SINGLE_PROCESS, {})
    folder = Path(config.data_dir) / config.dataset
    if (folder / "meta.json").exists() or any(folder.glob("*.bin")) or config.vocab_size is None:
        try:
            dataset = open_dataset(folder)
        except UserError as error:
            raise UserError(f"{error}; or give --vocab_size, for the plan without it") from None
        config = dataclasses.replace(config, vocab_size=resolve_vocab_size(config, dataset))
        tokens = len(dataset.tokens("train"))
    peak = peak_flops(device.name) or plan.matmul_flops(device.device, device.dtype)
    print(plan.report(config, tokens, (device.name, peak)))
