"""Build a run from its config: device, data, model and optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import TrainConfig, UserError, run_dir
from flatgpt.data.dataset import Dataset, TrainingBatches, resolve_data_settings
from flatgpt.data.tokenizer import TOKENIZER_FILE
from flatgpt.interop.loading import load_pretrained
from flatgpt.kernels.attention import BF16_CPU_MAX_PLAIN_TOKENS, attention_steps
from flatgpt.kernels.cross_entropy import MAX_PLAIN_LOGITS, MIN_FUSED_LOGITS, loss_steps
from flatgpt.runtime.choices import MAX_FLOPS, Choice, choose, has_bfloat16
from flatgpt.runtime.device import DeviceSettings, compile_forward, find_device, make_deterministic, select_device
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext, wrap_model
from flatgpt.training.data import count_eval_tokens, load_dataset, load_encoding
from flatgpt.training.nonfinite import NonfiniteGuard
from flatgpt.training.optimizer import CombinedOptimizer, make_optimizer, resolve_schedule
from model import GPT

ENTROPY_TOKENS = 1_000_000  # of the training split, whose frequencies are counted


@dataclass
class TrainingRun:
    """The objects that a training update uses."""

    config: TrainConfig  # resolved: `auto` and derived values are set
    device_settings: DeviceSettings
    ranks: DistributedContext
    dataset: Dataset
    encoding: tiktoken.Encoding | None  # of samples and checkpoints; None: no samples, and its name is enough
    batches: TrainingBatches
    prefetcher: BatchPrefetcher  # moves batches to the device
    model: GPT  # the plain module, to save, evaluate and sample
    wrapped_model: nn.Module  # wrapped by DDP or fully_shard; the plain model on a single rank
    forward: Callable[..., Tensor]  # inputs, targets -> loss: the wrapped model, or its compiled form
    optimizer: torch.optim.Optimizer | CombinedOptimizer
    scaler: torch.amp.GradScaler
    nonfinite_guard: NonfiniteGuard

    @property
    def eval_columns(self) -> dict[str, str]:
        """{split: column of metrics.csv} of the losses that an evaluation computes."""
        columns = {"val": "val_loss"} | ({"train": "train_split_loss"} if self.config.eval_train else {})
        return {split: columns[split] for split in columns if split in self.dataset.meta["splits"]}

    def eval_tokens(self, split: str) -> int:
        """Return the number of tokens of a split that an evaluation scores: in train, no more than in val."""
        splits = self.dataset.meta["splits"]
        scored = [splits[name]["tokens"] - 1 for name in {split, "val"} & splits.keys()]  # all but the first
        return min([*scored, self.config.eval_tokens or scored[0]])

    def eval_updates(self) -> float:
        """Return how many updates take about as long as an evaluation: a forward pass is a third of an update."""
        tokens = sum(map(self.eval_tokens, self.eval_columns))
        return tokens / (3 * self.batches.per_update * self.config.context_length)

    @functools.cached_property
    def unigram_entropy(self) -> float:
        """The loss of a model that ignores the context, in nats per token: the entropy of the tokens' frequencies."""
        counts = np.bincount(self.batches.windows.tokens[:ENTROPY_TOKENS])
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


class BatchPrefetcher:
    """Callable that returns a micro-batch. A thread prepares the next one in advance.

    Args:
        batches: a pure, thread-safe function.
        device: the device of the returned tensors.
        micros: indices of this rank's micro-batches in each update.
    """

    def __init__(self, batches: TrainingBatches, device: torch.device, micros: range):
        self.batches, self.device, self.micros = batches, device, micros
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[int, int] | None = None
        self._prepared: Future | None = None

    def __call__(self, update: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets on the device, (B, T) int64 each. Does not synchronise with CUDA."""
        x, y = self._prepared.result() if self._next == (update, micro) else self._prepare(update, micro)
        following = micro + self.micros.step
        self._next = (update, following) if following in self.micros else (update + 1, self.micros.start)
        self._prepared = self._thread.submit(self._prepare, *self._next)
        pinned = self.device.type == "cuda"  # other memory may be freed before an asynchronous copy reads it
        return x.to(self.device, non_blocking=pinned), y.to(self.device, non_blocking=pinned)

    def _prepare(self, update: int, micro: int) -> tuple[Tensor, Tensor]:
        x, y = (torch.from_numpy(np.ascontiguousarray(array)) for array in self.batches(update, micro))
        if self.device.type != "cuda":
            return x, y
        with torch.cuda.device(self.device):  # each thread has its own current device
            return x.pin_memory(), y.pin_memory()


def choose_device(config: TrainConfig, ranks: DistributedContext, chosen: dict) -> DeviceSettings:
    """Return the device, dtype and compile setting of a run. On CPUs, rank 0 measures the faster dtype for `auto`.

    Args:
        chosen: the choices of `auto` at the start of a resumed run, with reasons; empty for a new run.
    """
    settings, reasons = {"dtype": config.dtype, "compile": config.compile}, {}
    why = chosen.get("why") or {}
    for key, setting in settings.items():
        if chosen.get(key) is not None and (setting in ("auto", None) or (setting == chosen[key] and key in why)):
            settings[key], reasons[key] = chosen[key], why.get(key, "chosen when the run started")
    local_rank = ranks.local_rank if ranks.world > 1 else None
    if settings["dtype"] == "auto" and find_device(config.device, local_rank).type == "cpu":
        settings["dtype"], reasons["dtype"] = ranks.run_on_rank0(lambda: faster_training_dtype(config))
    return select_device(config.device, settings["dtype"], settings["compile"], local_rank, reasons)


def faster_training_dtype(config: TrainConfig) -> Choice:
    """Return the faster dtype for training, measured with the MLP's first matmul over one micro-batch's tokens."""
    if not has_bfloat16():
        return Choice("float32", "this CPU has no bfloat16")
    C, hidden = config.n_embd, round(config.mlp_ratio * config.n_embd)
    tokens = max(1, min(config.batch_size * config.context_length, int(MAX_FLOPS / (2 * C * hidden))))

    def matmul(dtype: torch.dtype) -> list[Callable]:
        x, weight = torch.ones(tokens, C, dtype=dtype), torch.ones(hidden, C, dtype=dtype)
        return [lambda: F.linear(x, weight)]

    candidates = {name: partial(matmul, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return choose(f"matmul {tokens:,} x {C:,} x {hidden:,}", candidates)


def choose_paths(
    config: TrainConfig, settings: DeviceSettings, ranks: DistributedContext, chosen: dict
) -> DeviceSettings:
    """Return settings with the faster operators for attention and loss in training on a CPU, which rank 0 measures.

    They are measured with this run's shapes, with fewer sequences and heads where a step would take long.

    Args:
        config: vocab_size is set.
        chosen: as in choose_device. A run of an earlier version, which stored no paths, keeps those of that version.
    """
    dtype = str(settings.dtype).removeprefix("torch.")
    if settings.device.type != "cpu" or settings.compile or config.deterministic or dtype == "float16":
        return settings
    if chosen.get("dtype") == dtype:
        paths = chosen.get("paths") or {}
        why = {kind: (chosen.get("why") or {}).get(kind, "chosen when the run started") for kind in paths}
        return dataclasses.replace(settings, paths=paths, why=settings.why | why)

    B, T, C, H = config.batch_size, config.context_length, config.n_embd, config.n_head
    D, V = C // H, -(-config.vocab_size // 64) * 64  # V padded
    pairs = max(torch.get_num_threads(), int(MAX_FLOPS / (14 * T * T * D)))  # of B and H; 7 products, (T, T, D) each
    heads, rows = min(H, pairs), min(B * T, max(64, int(MAX_FLOPS / (3 * C * V))))  # 3 products, (rows, C, V) each
    kinds = {}  # plain operators store attention weights and logits, so that they are not measured for large ones
    if config.attention != "manual" and T <= BF16_CPU_MAX_PLAIN_TOKENS:
        sizes = min(B, max(1, pairs // heads)), heads, T, D
        default = "plain" if settings.dtype == torch.bfloat16 else "fused"
        kinds["attention"] = partial(attention_steps, dropout=config.dropout), sizes, default
    if B * T * V <= MAX_PLAIN_LOGITS:
        kinds["loss"] = loss_steps, (rows, C, V), "fused" if B * T * V > MIN_FUSED_LOGITS else "plain"

    def measure(make: Callable, sizes: tuple[int, ...], default: str) -> Choice:
        paths = sorted(("fused", "plain"), key=lambda path: path != default)
        candidates = {path: partial(make, path, *sizes, dtype=settings.dtype) for path in paths}
        return choose(f"{dtype} {' x '.join(map(str, sizes))}", candidates, f", dropout {config.dropout:g}")

    found = ranks.run_on_rank0(lambda: {kind: measure(*kinds[kind]) for kind in kinds})
    paths, why = ({kind: choice[i] for kind, choice in found.items()} for i in (0, 1))
    return dataclasses.replace(settings, paths=paths, why=settings.why | why)


def build_run(
    config: TrainConfig,
    ranks: DistributedContext = SINGLE_PROCESS,
    resumed: dict | None = None,
    checkpoint: Path | None = None,
) -> TrainingRun:
    """Build a TrainingRun with initial weights, and resolve its config.

    Args:
        resumed: state.json of the checkpoint that the run resumes from. Its choices of `auto` are kept.
        checkpoint: its folder, whose tokenizer is kept.

    Raises:
        UserError: settings, data and initial weights are inconsistent, or ranks differ in them.
    """
    paths = ("config", "out_dir", "data_dir", "resume", "init_from")  # may differ between machines
    ranks.require_equal({key: value for key, value in dataclasses.asdict(config).items() if key not in paths})
    dataset = load_dataset(config, ranks)
    init_from = None if resumed else config.init_from
    stored = checkpoint and (checkpoint / TOKENIZER_FILE).is_file()
    encoding = load_encoding(config, ranks, dataset, str(checkpoint) if stored else init_from)
    config, windows = resolve_data_settings(config, dataset)
    if encoding and config.vocab_size < encoding.n_vocab:
        raise UserError(
            f"vocab_size = {config.vocab_size:,}: tokenizer {encoding.name} has {encoding.n_vocab:,} ids; set "
            "vocab_size to at least this number, or choose other weights"
        )
    chosen = resumed["chosen"] if resumed else {}
    device_settings = choose_device(config, ranks, chosen)
    device, dtype = device_settings.device, str(device_settings.dtype).removeprefix("torch.")
    ranks.require_equal({"dtype": dtype, "compile": device_settings.compile})
    device_settings = choose_paths(config, device_settings, ranks, chosen)
    # the same validation windows in the whole run, even if a resume changes batch_size
    same_batches = resumed and config.eval_batches and config.eval_batches == resumed["config"].get("eval_batches")
    config = dataclasses.replace(
        resolve_schedule(config, new_run=not resumed),
        eval_tokens=count_eval_tokens(resumed["config"] if same_batches else vars(config)) or None,
        dtype=dtype,
        compile=device_settings.compile,
        out_dir=str(run_dir(config)),
    )
    # Eager CPU code is deterministic; compiled code sums the embedding's gradient in varying order.
    if config.deterministic or (device.type == "cpu" and config.compile):
        make_deterministic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(config.seed)
    model = GPT(config.model())  # initialised on the CPU: the same weights on every device
    model.loss_path = device_settings.paths.get("loss")
    for block in model.transformer.h:
        block.attn.path = device_settings.paths.get("attention", block.attn.path)
    if init_from:
        load_pretrained(model, init_from)
    sums = [float(p.detach().double().sum()) for p in model.parameters()]
    ranks.require_equal({"initial weights": sums})
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
        forward=compile_forward(wrapped_model, ranks.warn_once) if config.compile else wrapped_model,
        optimizer=make_optimizer(model, config),
        scaler=scaler,
        nonfinite_guard=NonfiniteGuard(config.on_nonfinite, config.out_dir, device, scaler.is_enabled()),
    )
