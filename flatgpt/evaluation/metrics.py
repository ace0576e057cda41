"""Scores over a split: sums over tokens, and the figures made of them. For training the loss alone, for eval.py all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

BUCKETS, BINS = 8, 15
LOGITS_BYTES = {"cpu": 32e6, "cuda": 1e9, "mps": 256e6}  # float32 logits computed at once

# tokens that go through the blocks at once; on a CPU more are no faster
TOKENS_PER_PASS = {"cpu": 4096, "mps": 16384, "cuda": 65536}

Batches = Iterable[tuple[np.ndarray, np.ndarray]]
Total = Callable[[Tensor], Tensor]


def alone(sums: Tensor) -> Tensor:
    """The sum over ranks, where there is one."""
    return sums


def default_batch_size(T: int, device: torch.device) -> int:
    """The batch size for windows of T tokens, where nobody asks for one."""
    return max(1, TOKENS_PER_PASS[device.type] // T)


def rows_per_chunk(V: int, device: torch.device) -> int:
    """Rows of V logits that are computed at once."""
    return max(16, int(LOGITS_BYTES[device.type] / 4 / V))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and what was before afterwards. No random number is drawn, so training is not disturbed."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def mean_loss(
    model: nn.Module, batches: Batches, to_device: Callable[[np.ndarray], Tensor], total: Total = alone
) -> float:
    """Nats per token, over batches of inputs and targets, (B, T) each, -1 where a target is not scored.

    Args:
        to_device: moves one array to the model's device.
        total: sums a float64 tensor over ranks, each of which scores batches of its own.
    """
    loss_sum, tokens = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for x, y in batches:
            tokens += int((y >= 0).sum())
            loss_sum += model(to_device(x), to_device(y), reduction="none").double().sum().cpu()
    sums = total(torch.tensor([loss_sum, tokens], dtype=torch.float64))  # counts: exact to 2^53
    return float(sums[0] / sums[1])


class Scores:
    """Sums over scored tokens; figures are made from sums, never from means of means.

    Args:
        vocab_size: V, the classes of precision and recall.
        T: the context, of which each bucket of positions is an eighth.
        sampled: whether a sampled token is scored besides the greedy one.
    """

    def __init__(self, vocab_size: int, T: int, sampled: bool = False):
        self.T, self.sampled = T, sampled
        sizes = {"loss": 1, "top5": 1, "targets": vocab_size, "positions": 2 * BUCKETS, "bins": 3 * BINS}
        for name in ("greedy", "sampled") if sampled else ("greedy",):
            sizes |= {f"{name}_predicted": vocab_size, f"{name}_correct": vocab_size}
        self._flat = np.zeros(sum(sizes.values()))  # float64: counts are exact to 2^53
        self._sums = dict(zip(sizes, np.split(self._flat, np.cumsum(list(sizes.values()))[:-1]), strict=True))

    def add(
        self,
        losses: np.ndarray,
        targets: np.ndarray,
        positions: np.ndarray,
        in_top5: np.ndarray,
        confidences: np.ndarray,
        **predicted: np.ndarray,
    ) -> None:
        """Add scored tokens, (N,) each.

        Args:
            losses: nats.
            positions: 0 .. T - 1 in the context.
            in_top5: whether the target was among the five likeliest.
            confidences: probability of the greedy token.
            predicted: ids of the greedy token and, where asked for, of a sampled one.
        """
        sums, losses = self._sums, losses.astype(np.float64)
        sums["loss"] += losses.sum()
        sums["top5"] += in_top5.sum()
        _count(sums["targets"], targets)
        for name, ids in predicted.items():
            _count(sums[f"{name}_predicted"], ids)
            _count(sums[f"{name}_correct"], targets[targets == ids])
        buckets = positions * BUCKETS // self.T
        _count(sums["positions"][:BUCKETS], buckets)
        _count(sums["positions"][BUCKETS:], buckets, losses)
        # bin m: (m, m + 1] / 15; nan of a broken model counts somewhere, its loss says what it is
        bins = np.clip(np.ceil(np.nan_to_num(confidences) * BINS).astype(np.int64) - 1, 0, BINS - 1)
        _count(sums["bins"][:BINS], bins)
        _count(sums["bins"][BINS : 2 * BINS], bins, confidences.astype(np.float64))
        _count(sums["bins"][2 * BINS :], bins, (predicted["greedy"] == targets).astype(np.float64))

    def total(self, total: Total) -> None:
        """Make them the sums of all ranks."""
        self._flat[:] = total(torch.from_numpy(self._flat)).numpy()

    @property
    def tokens(self) -> int:
        """How many were scored."""
        return int(self._sums["targets"].sum())

    @property
    def loss_sum(self) -> float:
        """Nats."""
        return float(self._sums["loss"][0])

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of scored tokens that were the likeliest (top-1), 0 to 1."""
        return float(self._sums["greedy_correct"].sum()) / self.tokens

    @property
    def top5_accuracy(self) -> float:
        """Share of scored tokens that were among the five likeliest, 0 to 1."""
        return float(self._sums["top5"][0]) / self.tokens

    def weighted(self, which: str = "greedy") -> dict[str, float]:
        """Precision, recall and F1 of the predicted tokens: of each class, weighted by its share of the targets.

        A class that is never predicted has precision 0, as scikit-learn's zero_division=0.
        """
        support, predicted, right = (self._sums[n] for n in ("targets", f"{which}_predicted", f"{which}_correct"))
        share = support / support.sum()
        return {
            "precision": float((share * right / np.maximum(predicted, 1)).sum()),
            "recall": float(right.sum() / support.sum()),
            "f1": float((share * 2 * right / np.maximum(predicted + support, 1)).sum()),
        }

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: |accuracy - confidence| of the greedy token, over 15 equal bins of confidence.

        Guo et al., "On Calibration of Modern Neural Networks", 2017.
        """
        _, confidence, right = self._sums["bins"].reshape(3, BINS)
        return float(np.abs(right - confidence).sum()) / self.tokens

    @property
    def by_position(self) -> list[dict]:
        """Of each eighth of the context its first and last position (from 0), tokens scored and their mean loss."""
        counts, losses = self._sums["positions"].reshape(2, BUCKETS)
        edges = [-(-n * self.T // BUCKETS) for n in range(BUCKETS + 1)]
        return [
            {"first": a, "last": b - 1, "tokens": int(n), "loss": float(loss / n) if n else None}
            for (a, b), n, loss in zip(pairwise(edges), counts, losses, strict=True)
            if b > a
        ]


def _count(sums: np.ndarray, where: np.ndarray, weights: np.ndarray | None = None) -> None:
    sums += np.bincount(where, weights, minlength=len(sums))


def measure(
    model: nn.Module,
    batches: Batches,
    to_device: Callable[[np.ndarray], Tensor],
    *,
    sampled: Callable[[Tensor], Tensor] | None = None,
    total: Total = alone,
    each: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """All sums of a GPT over batches, as mean_loss takes them; the head computes scored places only, some at a time.

    Args:
        sampled: draws an id, (N,), from each row of logits, (N, V), to be scored besides the greedy one.
        each: is called after each batch with the tokens that were scored in it.
    """
    V = model.config.vocab_size
    scores = Scores(V, model.config.context_length, sampled is not None)
    with evaluating(model):
        for x, y in batches:
            places = np.flatnonzero(y.ravel() >= 0)
            hidden = model.hidden_states(to_device(x)).flatten(0, 1)[to_device(places)]  # (N, C)
            rows = rows_per_chunk(V, hidden.device)
            targets, found = to_device(y.ravel()[places]), []
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
                found.append(token_statistics(model.compute_logits(h, padded=True).float(), t, V, sampled))
            columns = {name: torch.cat([f[name] for f in found]).cpu().numpy() for name in found[0]}
            scores.add(targets=y.ravel()[places], positions=places % y.shape[1], **columns)
            each(len(places))
    scores.total(total)
    return scores


def token_statistics(
    logits: Tensor, targets: Tensor, V: int, sampled: Callable[[Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """What Scores.add takes, of logits (N, V), padded with -inf, and targets (N)."""
    found = {"sampled": sampled(logits[:, :V])} if sampled else {}
    log_p = logits.log_softmax(-1)  # six times as fast on a CPU as logsumexp, whose exp is not vectorised
    best = log_p.topk(min(5, V))  # sorted
    found |= {"greedy": best.indices[:, 0], "in_top5": (best.indices == targets[:, None]).any(-1)}
    losses = -log_p.gather(-1, targets[:, None])[:, 0]
    return found | {"losses": losses, "confidences": best.values[:, 0].exp()}
