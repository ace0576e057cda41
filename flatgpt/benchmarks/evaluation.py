"""bench.py eval: the speed of eval.py's stride protocol, in turn with the loop of transformers' documentation.

https://huggingface.co/docs/transformers/perplexity; its model has the same weights, as export.py writes them, and each
window scores the same tokens with the same context.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from config import BenchConfig, UserError, run_dir
from flatgpt.benchmarks.measure import in_turn, log, speedup
from flatgpt.data.dataset import open_dataset
from flatgpt.evaluation.metrics import default_batch_size, eval_batches, measure
from flatgpt.inference.prepacking import prepack
from flatgpt.interop import loading
from flatgpt.interop.export_folder import export_problems, hugging_face_config, to_hugging_face
from flatgpt.runtime.device import select_device
from model import GPT


def bench_eval(config: BenchConfig) -> dict:
    """Time both loops in turn: medians of the rounds, and the median of their ratios."""
    device = select_device(config.device, "float32")
    found = loading.find(config.model_path or str(run_dir(config)), log)
    model, _ = loading.load(found, device.device)
    dataset = open_dataset(Path(config.data_dir) / config.dataset)
    tokens = dataset.tokens(config.split)
    ids, context_length = tokens[: config.text_tokens or len(tokens)], model.config.context_length
    if len(ids) < context_length:
        raise UserError(f"text_tokens = {len(ids):,}: one window has {context_length:,}; take more")
    log(f"{found.describe()}; {len(ids):,} tokens of {dataset.folder} {config.split}; {device.describe()}")
    score_with_transformers = transformers_loop(model, ids, device.device)
    model, T = (
        prepack(model, device.dtype),
        context_length - 1,
    )  # transformers shifts labels: a window of T + 1 scores T

    def score() -> float:
        batches = eval_batches(ids, T, default_batch_size(T, device.device), stride=context_length // 2)
        sums = measure(model, batches, device.to_device)
        return sums["position_loss"].sum() / sums["targets"].sum()

    def timed(score: Callable[[], float]) -> Callable[[int], tuple[float, float]]:
        def run(_: int) -> tuple[float, float]:
            began = time.perf_counter()
            loss = score()
            return time.perf_counter() - began, math.exp(loss)

        return run

    results = in_turn(
        {"ours": timed(score), "transformers": timed(score_with_transformers)},
        config.rounds,
        lambda name, latest: f"{latest[name][0]:8.1f} s, perplexity {latest[name][1]:.4f}",
    )
    figures: dict = {"tokens": len(ids) - 1, "window": context_length}
    seconds = {name: [s for s, _ in rounds] for name, rounds in results.items()}
    for name, rounds in results.items():
        median = statistics.median(seconds[name])
        figures |= {f"{name}_s": median, f"{name}_tokens_per_s": (len(ids) - 1) / median}
        figures[f"{name}_perplexity"] = rounds[-1][1]
    figures["times_as_fast"] = speedup(seconds["ours"], seconds["transformers"])["median"]
    return figures | {"machine": device.describe()}


def transformers_loop(model: GPT, ids: np.ndarray, device: torch.device) -> Callable[[], float]:
    """Return a function that scores the text with transformers, and returns nats per token.

    It takes one window at a time, with labels of -100 for the tokens that an earlier window scored.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if reasons := export_problems(model):
        raise UserError(f"transformers cannot compute this model: {'; '.join(reasons)}")
    peer = GPT2LMHeadModel(GPT2Config(**hugging_face_config(model.config, 0, "float32")))
    peer.load_state_dict(to_hugging_face(model), strict=False)  # a tied head is stored once
    peer.to(device).eval()
    T, text = model.config.context_length, torch.from_numpy(ids.astype(np.int64))[None].to(device)  # (1, tokens)

    @torch.no_grad()
    def score() -> float:
        loss, count, previous_stop = 0.0, 0, 0
        for start in range(0, text.shape[1], T // 2):
            stop = min(start + T, text.shape[1])
            window = text[:, start:stop]
            labels = window.clone()
            labels[:, : previous_stop - start] = -100
            scored = int((labels[:, 1:] != -100).sum())
            loss += float(peer(window, labels=labels).loss) * scored
            count, previous_stop = count + scored, stop
            if stop == text.shape[1]:
                break
        return loss / count

    return score
