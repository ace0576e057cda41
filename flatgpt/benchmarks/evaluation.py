"""How fast a text is scored: eval.py's stride protocol beside the loop of transformers' documentation, in turn.

https://huggingface.co/docs/transformers/perplexity; its model is ours, as export.py writes it, and each window scores
the same tokens with the same context.
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
from flatgpt.data.dataset import open_dataset
from flatgpt.evaluation.metrics import default_batch_size, measure
from flatgpt.evaluation.windows import eval_batches
from flatgpt.inference.prepacking import prepack
from flatgpt.interop import loading
from flatgpt.interop.huggingface import export_problems, hugging_face_config, to_hugging_face
from flatgpt.runtime.device import DeviceSettings, select_device
from model import GPT

Runner = Callable[[], float]  # scores the text: nats per token


def bench_eval(config: BenchConfig, say: Callable[[str], None]) -> dict:
    """Both ways in turn, `rounds` times: medians, and the median of the rounds' ratios."""
    place = select_device(config.device, "float32")
    found = loading.find(config.model_path or str(run_dir(config)), say)
    model, _ = loading.load(found, place.device)
    dataset = open_dataset(Path(config.data_dir) / config.dataset)
    tokens = dataset.tokens(config.split)
    ids = tokens[: config.text_tokens or len(tokens)]
    if len(ids) < model.config.context_length:
        raise UserError(f"text_tokens = {len(ids):,}: one window has {model.config.context_length:,}; take more")
    say(f"{found.describe()}; {len(ids):,} tokens of {dataset.folder} {config.split}; {place.describe()}")
    peer = theirs(model, ids, place.device)
    ways = {"ours": ours(prepack(model, place.dtype), ids, place), "transformers": peer}
    seconds, losses = {name: [] for name in ways}, {}
    for number in range(config.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            losses[name] = way()
            seconds[name].append(time.perf_counter() - began)
            say(f"round {number + 1} {name:<12} {seconds[name][-1]:8.1f} s, perplexity {math.exp(losses[name]):.4f}")
    figures: dict = {"tokens": len(ids) - 1, "window": model.config.context_length}
    for name in ways:
        median = statistics.median(seconds[name])
        figures |= {f"{name}_s": median, f"{name}_tokens_per_s": (len(ids) - 1) / median}
        figures[f"{name}_perplexity"] = math.exp(losses[name])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return figures | {
        "times_as_fast": statistics.median(ratios),
        "machine": place.describe(),
        "torch": torch.__version__,
    }


def ours(model: GPT, ids: np.ndarray, place: DeviceSettings) -> Runner:
    """eval.py's whole report. A window of transformers' shifts its labels inside, so that it scores one less."""
    T, stride = model.config.context_length - 1, model.config.context_length // 2

    def score() -> float:
        batches = eval_batches(ids, T, default_batch_size(T, place.device), stride=stride)
        return measure(model, batches, place.to_device).loss

    return score


def theirs(model: GPT, ids: np.ndarray, device: torch.device) -> Runner:
    """One window after the other, labels of -100 where an earlier one has scored, its mean loss times its count."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if reasons := export_problems(model.config):
        raise UserError(f"transformers cannot compute this model: {'; '.join(reasons)}")
    peer = GPT2LMHeadModel(GPT2Config(**hugging_face_config(model.config, 0, "float32")))
    peer.load_state_dict(to_hugging_face(model.state_dict(), model.config), strict=False)  # a tied head is stored once
    peer.to(device).eval()
    T, text = model.config.context_length, torch.from_numpy(ids.astype(np.int64))[None].to(device)

    @torch.no_grad()
    def score() -> float:
        loss, count, before = 0.0, 0, 0
        for start in range(0, text.shape[1], T // 2):
            stop = min(start + T, text.shape[1])
            window = text[:, start:stop]
            labels = window.clone()
            labels[:, : before - start] = -100
            scored = int((labels[:, 1:] != -100).sum())
            loss += float(peer(window, labels=labels).loss) * scored
            count, before = count + scored, stop
            if stop == text.shape[1]:
                return loss / count

    return score
