"""Multiple-choice questions in HellaSwag's form, scored by the log-likelihood of each ending.

score_choices(model, encoding, read_choices("hellaswag_val.jsonl"), to_device)["choice_accuracy"]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from flatgpt.data.text_files import text_chunks
from flatgpt.data.tokenizer import start_ids
from flatgpt.evaluation.metrics import evaluating, make_batch, progress_bar, scored_logits
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from model import GPT

BATCH_TOKENS = 8192  # maximum per batch, with padding; a longer pair is a batch of its scores


class Question(NamedTuple):
    """A context, its possible endings, and the index of the correct one."""

    ctx: str
    endings: list[str]
    label: int


def read_choices(path: str) -> list[Question]:
    """Read questions from JSON lines with the keys `ctx`, `endings` and `label` (a number, or its digits).

    Other keys are ignored. lm-evaluation-harness's hellaswag builds contexts from activity_label, ctx_a and ctx_b; to
    reproduce its results, use its texts as ctx and endings.

    Raises:
        UserError: the file is empty or cannot be read, or a line is not a question. The message names file and line.
    """
    expected = "each line is JSON with ctx, endings (two or more, not empty) and label (index of the correct ending)"
    questions = []
    for number, line in enumerate("".join(text_chunks(Path(path))).split("\n"), 1):
        try:
            if line.strip():
                questions.append(_parse_question(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number:,}: {error}; {expected}") from None
    if not questions:
        raise UserError(f"{path} is empty: {expected}")
    return questions


def _parse_question(row: object) -> Question:
    """Return the question in a parsed line, or raise ValueError with the key and value that are wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}")
    ctx, endings, label = (row.get(key) for key in Question._fields)
    label = int(label) if str(label).isdecimal() else label
    if not isinstance(ctx, str):
        raise ValueError(f"ctx = {ctx!r}")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
        raise ValueError(f"endings = {endings!r}")
    if type(label) is not int or label not in range(len(endings)):
        raise ValueError(f"label = {label!r}")
    return Question(ctx, endings, label)


def encode_pairs(encoding: tiktoken.Encoding, question: Question) -> list[tuple[list[int], list[int]]]:
    """Return the ids of the context and of each ending, as lm-evaluation-harness tokenises them (_encode_pair, 0.4.13).

    The context is encoded without trailing white space, as n ids. Context, space and ending are encoded together; the
    ending's ids are those after the first n. An empty context becomes the result of tokenizer.start_ids: end-of-text,
    if there is one. Special tokens in the texts are encoded as plain text.
    """
    context = encoding.encode_ordinary(question.ctx.rstrip())
    wholes = [encoding.encode_ordinary(f"{question.ctx} {ending}") for ending in question.endings]
    return [(context or start_ids(encoding), whole[len(context) :]) for whole in wholes]


def log_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[list[int], list[int]]],
    to_device: Callable[[np.ndarray], Tensor],
    ranks: DistributedContext = SINGLE_PROCESS,
) -> np.ndarray:
    """Return the log-likelihood of each ending after its context, in nats: (n,) float64.

    A pair of more than context_length + 1 ids is truncated on the left. Uses no random numbers.

    Args:
        pairs: ids of a context, at least one, and of an ending, 1 to context_length.
        to_device: moves an array to the model's device.
        ranks: the processes that share the batches.
    """
    longest = model.config.context_length + 1
    rows = [((context + ending)[-longest:], len(ending)) for context, ending in pairs]
    # Similar lengths share a batch, to save padding. The longest are first, so that running out of memory shows early.
    order, batches = sorted(range(len(rows)), key=lambda k: -len(rows[k][0])), []
    while order:
        n = max(1, BATCH_TOKENS // (len(rows[order[0]][0]) - 1))
        batches.append(order[:n])
        order = order[n:]
    sums = np.zeros(len(rows))
    with evaluating(model):
        for batch in progress_bar(batches[ranks.rank :: ranks.world], ranks):
            x, y = make_batch([rows[k] for k in batch], len(rows[batch[0]][0]) - 1)
            losses = [
                F.cross_entropy(logits, targets, reduction="none")
                for logits, targets in scored_logits(model, x, y, to_device)
            ]
            row_of_loss, _ = np.nonzero(y >= 0)
            sums[batch] = -np.bincount(row_of_loss, torch.cat(losses).cpu().numpy())
    return ranks.sum(torch.from_numpy(sums)).numpy()


def score_choices(
    model: GPT,
    encoding: tiktoken.Encoding,
    questions: Sequence[Question],
    to_device: Callable[[np.ndarray], Tensor],
    ranks: DistributedContext = SINGLE_PROCESS,
) -> dict:
    """Answer each question with its most likely ending. Return metrics with the keys of report.ROWS.

    These are lm-evaluation-harness's acc, acc_norm (log-likelihood per character of the ending) and their standard
    errors (None for a single question). Among equal scores the first ending is chosen. All are NaN if a log-likelihood
    is NaN.

    Raises:
        UserError: an ending is longer than the model's context.
    """
    T, n = model.config.context_length, len(questions)
    pairs = [pair for question in questions for pair in encode_pairs(encoding, question)]
    longest = max((ending for _, ending in pairs), key=len)
    if len(longest) > T:
        text = encoding.decode(longest)[:40]
        raise UserError(f"an ending has {len(longest):,} tokens, more than context_length = {T:,}: {text!r}...")
    remaining = log_likelihoods(model, pairs, to_device, ranks)
    # by log-likelihood, and by log-likelihood per character
    correct = np.full(2, math.nan if np.isnan(remaining).any() else 0.0)
    for question in questions:
        scores, remaining = np.split(remaining, [len(question.endings)])
        characters = [len(ending) for ending in question.endings]
        correct += [scores.argmax() == question.label, (scores / characters).argmax() == question.label]
    metrics = {"questions": n}
    for key, share in zip(("choice_accuracy", "choice_accuracy_norm"), (correct / n).tolist(), strict=True):
        # n - 1: unbiased sample variance, as in lm-evaluation-harness
        metrics |= {key: share, f"{key}_stderr": math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None}
    return metrics
