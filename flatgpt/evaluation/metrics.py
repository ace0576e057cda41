"""The mean loss of a model, for training, and all figures of eval.py. Both divide sums over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext

BUCKETS, BINS = 8, 15  # of positions in the context; of confidence
LOGITS_BYTES = {"cpu": 32e6, "cuda": 1e9, "mps": 256e6}  # float32 logits computed at once
TOKENS_PER_PASS = {"cpu": 4096, "mps": 16384, "cuda": 65536}  # on a CPU more are no faster

Batches = Iterable[tuple[np.ndarray, np.ndarray]]


def default_batch_size(T: int, device: torch.device) -> int:
    """Return the number of windows of T tokens that go through the model at once unless --batch_size is given."""
    return max(1, TOKENS_PER_PASS[device.type] // T)


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """Return the number of rows of logits that are computed at once."""
    return max(16, int(LOGITS_BYTES[device.type] / 4 / vocab_size))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and back afterwards. Draws no random number."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def mean_loss(
    model: nn.Module,
    batches: Batches,
    to_device: Callable[[np.ndarray], Tensor],
    ranks: DistributedContext = SINGLE_PROCESS,
) -> float:
    """Return the mean loss over all targets, in nats per token.

    Args:
        batches: inputs and targets, (B, T) each; a target of -1 is not scored.
        to_device: moves an array to the model's device.
        ranks: the processes that score the other batches.
    """
    loss_sum, tokens = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for x, y in batches:
            tokens += int((y >= 0).sum())
            loss_sum += model(to_device(x), to_device(y), reduction="none").double().sum().cpu()
    sums = ranks.sum(torch.tensor([loss_sum, tokens], dtype=torch.float64))  # counts are exact up to 2^53
    return float(sums[0] / sums[1])


class Scores:
    """Sums over scored tokens, from which all figures are computed.

    Args:
        vocab_size: number of classes of precision and recall (V).
        T: context length; losses are also summed for each eighth of it.
    """

    def __init__(self, vocab_size: int, T: int):
        self.T = T
        sizes = {"top5_correct": 1} | dict.fromkeys(("targets", "predicted", "greedy_correct"), vocab_size)
        sizes |= dict.fromkeys(("bucket_tokens", "bucket_loss"), BUCKETS)
        sizes |= dict.fromkeys(("bin_confidence", "bin_correct"), BINS)
        self._flat = np.zeros(sum(sizes.values()))  # float64: counts are exact up to 2^53
        self._sums = dict(zip(sizes, np.split(self._flat, np.cumsum([*sizes.values()])[:-1]), strict=True))

    def add(
        self,
        losses: np.ndarray,
        targets: np.ndarray,
        positions: np.ndarray,
        greedy: np.ndarray,
        confidences: np.ndarray,
        in_top5: np.ndarray,
    ) -> None:
        """Add N scored tokens, (N,) each.

        Args:
            losses: nats.
            positions: 0 to T - 1 in the context.
            greedy: id of the most likely token.
            confidences: its probability.
            in_top5: whether the target is among the five most likely tokens.
        """
        # bin m holds (m, m + 1] / 15; the NaN of a diverged model falls into the first one
        bins = np.clip(np.ceil(np.nan_to_num(confidences) * BINS).astype(np.int64) - 1, 0, BINS - 1)
        buckets, correct = positions * BUCKETS // self.T, greedy == targets
        self._sums["top5_correct"] += in_top5.sum()
        for name, index, weights in (
            ("targets", targets, None),
            ("predicted", greedy, None),
            ("greedy_correct", targets[correct], None),
            ("bucket_tokens", buckets, None),
            ("bucket_loss", buckets, losses.astype(np.float64)),
            ("bin_confidence", bins, confidences.astype(np.float64)),
            ("bin_correct", bins, correct.astype(np.float64)),
        ):
            self._sums[name] += np.bincount(index, weights, minlength=len(self._sums[name]))

    def all_reduce(self, ranks: DistributedContext) -> None:
        """Replace the sums by those over all ranks."""
        self._flat[:] = ranks.sum(torch.from_numpy(self._flat)).numpy()

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self._sums["targets"].sum())

    @property
    def loss_sum(self) -> float:
        """Sum of the losses, in nats."""
        return float(self._sums["bucket_loss"].sum())

    def figures(self) -> dict:
        """Return the figures under the keys of report.ROWS.

        Precision, recall and F1 are those of each class, weighted by its share of the targets (scikit-learn's
        average="weighted", zero_division=0). calibration_error is the expected calibration error over 15 equal bins of
        confidence (Guo et al., 2017). loss_by_position has a dict for each eighth of the context.
        """
        sums, n = self._sums, self.tokens
        support, predicted, correct = sums["targets"], sums["predicted"], sums["greedy_correct"]
        accuracy = float(correct.sum()) / n
        edges = [-(-k * self.T // BUCKETS) for k in range(BUCKETS + 1)]
        return {
            "tokens": n,
            "loss": self.loss_sum / n,
            "accuracy": accuracy,
            "top5_accuracy": float(sums["top5_correct"][0]) / n,
            "precision": float((support * correct / np.maximum(predicted, 1)).sum() / n),
            "recall": accuracy,
            "f1": float((support * 2 * correct / np.maximum(predicted + support, 1)).sum() / n),
            "calibration_error": float(np.abs(sums["bin_correct"] - sums["bin_confidence"]).sum()) / n,
            "loss_by_position": [
                {"first": a, "last": b - 1, "tokens": int(count), "loss": float(total / count) if count else None}
                for (a, b), count, total in zip(
                    pairwise(edges), sums["bucket_tokens"], sums["bucket_loss"], strict=True
                )
                if b > a
            ],
        }


def measure(
    model: nn.Module,
    batches: Batches,
    to_device: Callable[[np.ndarray], Tensor],
    ranks: DistributedContext = SINGLE_PROCESS,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Scores:
    """Score a GPT on batches; arguments as in mean_loss. Logits are computed for scored targets only, in chunks.

    Args:
        progress: called after each batch with the number of tokens scored in it.
    """
    V = model.config.vocab_size
    scores = Scores(V, model.config.context_length)
    with evaluating(model):
        for x, y in batches:
            scored = np.flatnonzero(y.ravel() >= 0)
            hidden = model.hidden_states(to_device(x)).flatten(0, 1)[to_device(scored)]  # (N, C)
            targets, rows = y.ravel()[scored], rows_per_chunk(V, hidden.device)
            chunks = zip(hidden.split(rows), to_device(targets).split(rows), strict=True)
            found = [token_statistics(model.compute_logits(h, padded=True).float(), t, V) for h, t in chunks]
            columns = {name: torch.cat([f[name] for f in found]).cpu().numpy() for name in found[0]}
            scores.add(targets=targets, positions=scored % y.shape[1], **columns)
            progress(len(scored))
    scores.all_reduce(ranks)
    return scores


def token_statistics(logits: Tensor, targets: Tensor, V: int) -> dict[str, Tensor]:
    """Return what Scores.add takes of logits, (N, V) and padding of -inf, and targets, (N,)."""
    log_p = logits.log_softmax(-1)  # on a CPU six times as fast as logsumexp, whose exp is not vectorised
    top = log_p.topk(min(5, V))  # sorted
    return {
        "losses": -log_p.gather(-1, targets[:, None])[:, 0],
        "greedy": top.indices[:, 0],
        "confidences": top.values[:, 0].exp(),
        "in_top5": (top.indices == targets[:, None]).any(-1),
    }
