"""Scores over a split: sums of loss, tokens and hits, and the figures made of them. For training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens; figures are made from sums, never from means of means.

    Attributes:
        loss_sum: nats, summed in float64.
        tokens: how many tokens were scored.
        correct: how many of them were the likeliest.
        bytes: bytes of text that the scored tokens stand for (end-of-text: none).
    """

    loss_sum: float
    tokens: int
    correct: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token: exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits, per byte of text: comparable across tokenizers."""
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def accuracy(self) -> float:
        """Share of scored tokens that were the likeliest (top-1), 0 to 1."""
        return self.correct / self.tokens


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    to_device: Callable[[np.ndarray], Tensor],
    token_bytes: np.ndarray,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Scores:
    """Score a model on batches of inputs and targets, (B, T) each, -1 where a target is not scored.

    The model's mode is put back, and no random number is drawn, so training is not disturbed.

    Args:
        to_device: moves one array to the model's device.
        token_bytes: (vocabulary,) bytes of text per id.
        total: sums a float64 tensor over ranks, each of which scores batches of its own.
    """
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.int64)
    tokens = text_bytes = 0
    try:
        for x, y in batches:
            scored = y[y >= 0]
            tokens += scored.size
            # ids that a recipe's vocab_size adds beyond the tokenizer's stand for no text
            text_bytes += int(token_bytes[scored[scored < len(token_bytes)]].sum())
            targets = to_device(y).flatten()
            logits = model(to_device(x)).flatten(0, 1).float()  # (B T, V)
            losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
            loss_sum += losses.cpu().double().sum()
            correct += (logits.argmax(-1) == targets).sum().cpu()
    finally:
        model.train(was_training)
    sums = total(torch.tensor([loss_sum, tokens, correct, text_bytes], dtype=torch.float64))  # counts: exact to 2^53
    return Scores(float(sums[0]), *(int(count) for count in sums[1:]))
