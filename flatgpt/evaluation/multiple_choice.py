"""Multiple-choice questions in HellaSwag's form, scored by the likelihood that a model gives each ending.

scores = score_choices(model, encoding, read_choices("hellaswag_val.jsonl"), to_device)
scores.accuracy, scores.accuracy_norm
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
from flatgpt.evaluation.metrics import alone, evaluating, rows_per_chunk
from model import GPT

# ---------------------------------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class Question:
    """A context, how it may go on, and the number of the right ending, from 0."""

    ctx: str
    endings: tuple[str, ...]
    label: int


def read_choices(path: str | Path) -> list[Question]:
    """The questions of a file of JSON lines with keys `ctx`, `endings` and `label` (a number, or its digits).

    Other keys are ignored. lm-evaluation-harness's hellaswag makes its contexts of activity_label, ctx_a and ctx_b, and
    cleans them: its figures come from a file that has those texts as ctx and endings.

    Raises:
        UserError: the file cannot be read, has no question, or a line is none; names file and line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as why:
        raise UserError(f"{path}: cannot be read: {why.strerror}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            if text := line.decode("utf-8-sig").strip():
                questions.append(_question(text))
        except (ValueError, RecursionError) as why:
            raise UserError(f"{path} line {number:,}: {why}") from None
    if not questions:
        raise UserError(f"{path} is empty: a line of JSON with ctx, endings and label is expected for each question")
    return questions


def _question(line: str) -> Question:
    """Raises ValueError where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as why:
        raise ValueError(f"not JSON ({why})") from None
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
        raise ValueError(f"label = {label!r}: the right ending's number is expected, 0 to {len(endings) - 1}")
    return Question(ctx, tuple(endings), label)


# ---------------------------------------------------------------------------------------------------------------------
# scoring


@dataclass(frozen=True)
class ChoiceScores:
    """How many questions were answered rightly.

    Attributes:
        correct: where the right ending's log-likelihood is the largest (lm-evaluation-harness: acc).
        correct_norm: where it is, divided by the ending's characters (acc_norm). Of equals the first counts.
    """

    questions: int
    correct: int
    correct_norm: int

    @property
    def accuracy(self) -> float:
        """Share of questions, 0 to 1."""
        return self.correct / self.questions

    @property
    def accuracy_norm(self) -> float:
        """Share of questions, 0 to 1."""
        return self.correct_norm / self.questions

    @property
    def accuracy_stderr(self) -> float:
        """Standard error of accuracy, were the questions drawn from many; nan for a single one."""
        return self._stderr(self.accuracy)

    @property
    def accuracy_norm_stderr(self) -> float:
        """Standard error of accuracy_norm."""
        return self._stderr(self.accuracy_norm)

    def _stderr(self, p: float) -> float:
        # n - 1: the estimate without bias of a sample's variance, as lm-evaluation-harness has it
        return math.sqrt(p * (1 - p) / (self.questions - 1)) if self.questions > 1 else math.nan


def encode_pair(encoding: tiktoken.Encoding, ctx: str, endings: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """The ids of a context and of each of its endings, as lm-evaluation-harness has them (_encode_pair, 0.4.13).

    White space at the context's end counts to the ending, which begins with one more blank. The context is encoded
    alone, and again with the ending behind it; of the latter, the ids from the context's number on are the ending's.
    A context without a token is end-of-text. Text that spells a special token is text.
    """
    text = ctx.rstrip()
    blanks = ctx[len(text) :]
    context = encoding.encode_ordinary(text)
    pairs = [(context, encoding.encode_ordinary(f"{text}{blanks} {ending}")[len(context) :]) for ending in endings]
    return [(context or [encoding.eot_token], ending) for context, ending in pairs]


def log_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[list[int], list[int]]],
    to_device: Callable[[np.ndarray], Tensor],
    batch_tokens: int = 8192,
    share: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] = alone,
    watch: Callable[[list], Iterable] = iter,
) -> np.ndarray:
    """The log-likelihood of each ending after its context, in nats: (n,) float64.

    Of a pair longer than the model's context_length the last context_length + 1 ids are taken: the last one is only
    predicted. The model's mode is put back, and no random number is drawn.

    Args:
        pairs: ids of a context, one at least, and of an ending, one to context_length.
        to_device: moves one array to the model's device.
        batch_tokens: that go through the model at once, padding too, or those of a single pair.
        share: (rank, world): this process computes every world-th batch.
        total: sums a float64 tensor over ranks.
        watch: gives the list of batches one by one, and may show how far it is.
    """
    longest = model.config.context_length + 1
    sequences = [((context + ending)[-longest:], len(ending)) for context, ending in pairs]
    assert all(0 < n < len(ids) for ids, n in sequences), [(len(ids), n) for ids, n in sequences]
    sums = np.zeros(len(pairs))
    batches = _batches([len(ids) - 1 for ids, _ in sequences], batch_tokens)
    with evaluating(model):
        for batch in watch(batches[share[0] :: share[1]]):
            rows = [sequences[n] for n in batch]
            x = np.zeros((len(rows), len(rows[0][0]) - 1), dtype=np.int64)  # the first is the longest
            scored = np.zeros(x.shape, dtype=bool)
            for row, (ids, n) in enumerate(rows):
                T = len(ids) - 1
                x[row, :T] = ids[:-1]  # what stands behind them does not reach them
                scored[row, T - n : T] = True
            targets = to_device(np.concatenate([ids[-n:] for ids, n in rows]))  # (N)
            hidden = model.hidden_states(to_device(x))[to_device(scored)]  # (N, C): the head is spared the contexts
            some = rows_per_chunk(model.config.vocab_size, hidden.device)
            losses = [
                F.cross_entropy(model.compute_logits(h).float(), y, reduction="none")
                for h, y in zip(hidden.split(some), targets.split(some), strict=True)
            ]
            lengths = np.array([n for _, n in rows])
            sums[batch] = -np.add.reduceat(torch.cat(losses).cpu().double().numpy(), lengths.cumsum() - lengths)
    return total(torch.from_numpy(sums)).numpy()


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of sequences in batches of similar length; the longest first, so that want of memory shows at once."""
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
    **more,
) -> ChoiceScores:
    """Answer the questions by the likelihood of their endings; further arguments as in log_likelihoods.

    Raises:
        UserError: an ending that is longer than the model's context, or a model whose logits are no numbers.
    """
    T, pairs = model.config.context_length, []
    for number, question in enumerate(questions, 1):
        found = encode_pair(encoding, question.ctx, question.endings)
        if (most := max(len(ending) for _, ending in found)) > T:
            raise UserError(
                f"question {number:,} ({question.ctx[:40]!r}) has an ending of {most:,} tokens, and the model sees "
                f"{T:,} at once: leave that question out"
            )
        pairs += found
    sums = log_likelihoods(model, pairs, to_device, **more)
    if np.isnan(sums).any():
        raise UserError("the model's log-likelihoods are nan: its training diverged; take an earlier checkpoint")
    correct = correct_norm = stop = 0
    for question in questions:
        start, stop = stop, stop + len(question.endings)
        characters = [len(ending) for ending in question.endings]
        correct += int(sums[start:stop].argmax()) == question.label
        correct_norm += int((sums[start:stop] / characters).argmax()) == question.label
    return ChoiceScores(len(questions), correct, correct_norm)
