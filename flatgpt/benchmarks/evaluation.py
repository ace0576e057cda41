"""bench.py eval: compare scoring with transformers."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from config import BenchConfig, UserError, run_dir
from flatgpt.benchmarks.inference import transformers_model
from flatgpt.benchmarks.measure import interleave, log, speedup
from flatgpt.data.dataset import open_dataset
from flatgpt.evaluation.metrics import default_batch_size, eval_batches, token_statistics
from flatgpt.inference.prepacking import prepack
from flatgpt.interop import loading
from flatgpt.runtime.device import select_device


def bench_eval(config: BenchConfig) -> dict:
    """Compare eval.py's stride protocol with the loop in https://huggingface.co/docs/transformers/perplexity.

    Both score the same tokens with the same context.

    Returns:
        medians over the rounds, and the median of their ratios.
    """
    device = select_device(config.device, "float32")
    source = loading.find(config.model_path or str(run_dir(config)), log)
    model, _ = loading.load(source, device.device)
    dataset = open_dataset(Path(config.data_dir) / config.dataset)
    tokens = dataset.tokens(config.split)
    ids, context_length = tokens[: config.text_tokens or len(tokens)], model.config.context_length
    if len(ids) < context_length:
        raise UserError(f"text_tokens = {len(ids):,}: a window has {context_length:,}; choose more")
    log(f"{source.describe()}; {len(ids):,} tokens of {dataset.folder} {config.split}; {device.describe()}")
    peer = transformers_model(model).to(device.device)
    text = torch.from_numpy(ids.astype(np.int64))[None].to(device.device)  # (1, tokens)
    model, T = prepack(model, device.dtype), context_length - 1  # transformers shifts the labels

    def flatgpt_loss() -> float:
        batches = eval_batches(ids, T, default_batch_size(T, device.device), stride=context_length // 2)
        sums = token_statistics(model, batches, device.to_device)
        return sums["position_loss"].sum() / sums["targets"].sum()

    def timed(loss: Callable[[], float]) -> tuple[float, float]:
        start = time.perf_counter()
        return loss(), time.perf_counter() - start

    runners = {"ours": flatgpt_loss, "transformers": lambda: transformers_loss(peer, text, context_length)}
    runners = {name: functools.partial(timed, loss) for name, loss in runners.items()}
    results = interleave(runners, config.rounds)
    figures: dict = {"tokens": len(ids) - 1, "window": context_length}
    seconds = {name: [duration for _, duration in rounds] for name, rounds in results.items()}
    for name, rounds in results.items():
        median = statistics.median(seconds[name])
        figures |= {f"{name}_s": median, f"{name}_tokens_per_s": (len(ids) - 1) / median}
        figures[f"{name}_perplexity"] = math.exp(rounds[-1][0])
    figures["times_as_fast"] = speedup(seconds["ours"], seconds["transformers"])["median"]
    return figures | {"machine": device.describe()}


@torch.no_grad()
def transformers_loss(peer, text: torch.Tensor, T: int) -> float:
    """Return transformers' loss in nats per token on a text (1, tokens), with one window of T tokens per forward pass.

    Tokens that an earlier window scored have the label -100.
    """
    loss, count, previous_stop = 0.0, 0, 0
    for start in range(0, text.shape[1] - T + T // 2, T // 2):
        stop = min(start + T, text.shape[1])
        window = text[:, start:stop]
        labels = window.clone()
        labels[:, : previous_stop - start] = -100
        scored = int((labels[:, 1:] != -100).sum())
        loss += float(peer(window, labels=labels).loss) * scored
        count, previous_stop = count + scored, stop
    return loss / count
