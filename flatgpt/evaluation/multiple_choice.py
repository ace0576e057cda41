"""Multiple-choice questions in HellaSwag's form, scored by the log-likelihood of each ending.

score_choices(model, encoding, read_choices("hellaswag_val.jsonl"), to_device)["choice_accuracy"]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from flatgpt.evaluation.metrics import evaluating, rows_per_chunk
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from model import GPT


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and the index of the correct one."""

    ctx: str
    endings: tuple[str, ...]
    label: int


def read_choices(path: str | Path) -> list[Question]:
    """Read questions from JSON lines with the keys `ctx`, `endings` and `label` (a number, or its digits).

    Other keys are ignored. lm-evaluation-harness's hellaswag builds its contexts from activity_label, ctx_a and ctx_b;
    its figures come from a file with those texts as ctx and endings.

    Raises:
        UserError: the file cannot be read or is empty, or a line is not a question; names file and line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            if text := line.decode("utf-8-sig").strip():
                questions.append(_parse_question(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number:,}: {error}") from None
    if not questions:
        raise UserError(f"{path} is empty: a line of JSON with ctx, endings and label is expected for each question")
    return questions


def _parse_question(line: str) -> Question:
    """Parse one line; ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}; an object with ctx, endings and label is expected")
    if missing := [key for key in ("ctx", "endings", "label") if key not in row]:
        raise ValueError(f"no key {missing[0]!r}, its keys are {', '.join(row)}")
    ctx, endings, label = row["ctx"], row["endings"], row["label"]
    if not isinstance(ctx, str):
        raise ValueError(f"ctx = {ctx!r}: a text is expected")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
        raise ValueError("endings: a list of two or more texts is expected, none of them empty")
    if isinstance(label, str) and re.fullmatch("[0-9]+", label):
        label = int(label)
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f"label = {label!r}: the correct ending's index is expected, 0 to {len(endings) - 1}")
    return Question(ctx, tuple(endings), label)


def encode_pairs(encoding: tiktoken.Encoding, question: Question) -> list[tuple[list[int], list[int]]]:
    """Return the ids of the context and of each ending, as lm-evaluation-harness tokenises them (_encode_pair, 0.4.13).

    White space at the end of the context belongs to the endings, after one more space. The context is encoded alone,
    and again together with the ending, whose ids are those beyond the context's number of ids. An empty context becomes
    end-of-text. Special tokens within a text are encoded as text.
    """
    text = question.ctx.rstrip()
    context = encoding.encode_ordinary(text)
    wholes = [encoding.encode_ordinary(f"{question.ctx} {ending}") for ending in question.endings]
    return [(context or [encoding.eot_token], whole[len(context) :]) for whole in wholes]


def log_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[list[int], list[int]]],
    to_device: Callable[[np.ndarray], Tensor],
    batch_tokens: int = 8192,
    ranks: DistributedContext = SINGLE_PROCESS,
    progress: Callable[[list], Iterable] = iter,
) -> np.ndarray:
    """Return the log-likelihood of each ending after its context, in nats: (n,) float64.

    A pair longer than context_length + 1 ids loses its first ones. Draws no random number.

    Args:
        pairs: ids of a context, at least one, and of an ending, 1 to context_length.
        to_device: moves an array to the model's device.
        batch_tokens: upper limit for a batch, with padding; a single pair may have more.
        ranks: the processes that share the batches.
        progress: wraps the list of batches, as tqdm does.
    """
    longest = model.config.context_length + 1
    sequences = [((context + ending)[-longest:], len(ending)) for context, ending in pairs]
    assert all(0 < n < len(ids) for ids, n in sequences), [(len(ids), n) for ids, n in sequences]
    sums = np.zeros(len(pairs))
    batches = _batches([len(ids) - 1 for ids, _ in sequences], batch_tokens)
    with evaluating(model):
        for batch in progress(batches[ranks.rank :: ranks.world]):
            rows = [sequences[n] for n in batch]
            x = np.zeros((len(rows), len(rows[0][0]) - 1), dtype=np.int64)  # the first is the longest
            scored = np.zeros(x.shape, dtype=bool)
            for row, (ids, n) in enumerate(rows):
                T = len(ids) - 1
                x[row, :T] = ids[:-1]  # attention is causal: the padding after them has no effect
                scored[row, T - n : T] = True
            targets = to_device(np.concatenate([ids[-n:] for ids, n in rows]))  # (N)
            hidden = model.hidden_states(to_device(x))[to_device(scored)]  # (N, C): no logits for the contexts
            chunk = rows_per_chunk(model.config.vocab_size, hidden.device)
            losses = [
                F.cross_entropy(model.compute_logits(h).float(), y, reduction="none")
                for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
            ]
            lengths = np.array([n for _, n in rows])
            sums[batch] = -np.add.reduceat(torch.cat(losses).cpu().double().numpy(), lengths.cumsum() - lengths)
    return ranks.sum(torch.from_numpy(sums)).numpy()


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length, the longest first, so that running out of memory shows up."""
    order, batches = sorted(range(len(lengths)), key=lambda n: -lengths[n]), []
    while order:
        rows = max(1, batch_tokens // lengths[order[0]])
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def score_choices(
    model: GPT,
    encoding: tiktoken.Encoding,
    questions: Sequence[Question],
    to_device: Callable[[np.ndarray], Tensor],
    **options,
) -> dict:
    """Answer each question with its most likely ending; returns figures under the keys of report.ROWS.

    They are lm-evaluation-harness's acc, acc_norm (log-likelihood per character of the ending) and their standard
    errors (NaN for a single question). Of equal endings the first counts.

    Args:
        options: as in log_likelihoods.

    Raises:
        UserError: an ending longer than the model's context, or log-likelihoods that are NaN.
    """
    T, pairs, n = model.config.context_length, [], len(questions)
    for number, question in enumerate(questions, 1):
        encoded = encode_pairs(encoding, question)
        if (longest := max(len(ending) for _, ending in encoded)) > T:
            raise UserError(
                f"question {number:,} ({question.ctx[:40]!r}) has an ending of {longest:,} tokens, and the model sees "
                f"{T:,} at once: leave that question out"
            )
        pairs += encoded
    sums = log_likelihoods(model, pairs, to_device, **options)
    if np.isnan(sums).any():
        raise UserError("the model's log-likelihoods are NaN: its training diverged; take an earlier checkpoint")
    correct = correct_norm = stop = 0
    for question in questions:
        start, stop = stop, stop + len(question.endings)
        characters = [len(ending) for ending in question.endings]
        correct += int(sums[start:stop].argmax()) == question.label
        correct_norm += int((sums[start:stop] / characters).argmax()) == question.label
    figures = {"questions": n}
    for key, share in (("choice_accuracy", correct / n), ("choice_accuracy_norm", correct_norm / n)):
        # n - 1: the unbiased variance of a sample, as lm-evaluation-harness has it
        figures |= {key: share, f"{key}_stderr": math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan}
    return figures
