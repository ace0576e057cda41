"""Score a text: its windows, the mean loss of a model over them, and the figures of eval.py, made of sums over tokens.

mean_loss(model, eval_batches(tokens, context_length, batch_size), to_device)
figures(measure(model, eval_batches(...), to_device), count_text(tokens, len(tokens), encoding))
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import tiktoken
import torch
from torch import Tensor, nn
from tqdm import tqdm

from flatgpt.data.shards import Tokens
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext

IGNORE = -1  # a target that is not scored
BUCKETS, BINS = 8, 15  # of positions in the context; of confidence
LOGITS_BYTES = {"cpu": 32e6, "cuda": 1e9, "mps": 256e6}  # float32 logits computed at once
TOKENS_PER_PASS = {"cpu": 4096, "mps": 16384, "cuda": 65536}  # on a CPU more are no faster
CHUNK_TOKENS = 1 << 18  # decoded at once

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, (B, T) int64 each; IGNORE where no target is scored


# ---------------------------------------------------------------------------------------------------------------------
# windows


def progress_bar(items: Iterable, ranks: DistributedContext) -> tqdm:
    """Return the items with a progress bar, which is shown on the first rank's terminal."""
    return tqdm(items, leave=False, disable=None if ranks.first else True)


def default_batch_size(T: int, device: torch.device) -> int:
    """Return the number of windows of T tokens that go through the model at once unless --batch_size is given."""
    return max(1, TOKENS_PER_PASS[device.type] // T)


def eval_batches(
    tokens: Tokens | np.ndarray,
    context_length: int,
    batch_size: int,
    limit: int = 0,
    ranks: DistributedContext = SINGLE_PROCESS,
    *,
    stride: int | None = None,
    first_id: int | None = None,
    progress: bool = False,
) -> Iterator[Batch]:
    """Yield batches of windows in order, with the incomplete last one; every token but the first is scored once.

    Args:
        tokens: at least two ids, or one where first_id is given.
        limit: number of batches, from the start; 0: all.
        ranks: the processes that take the batches in turn. All get the same number, as sharded models compute
            together: some a last batch without a scored target.
        stride: distance between the beginnings of two windows, at most context_length. A window scores its last
            tokens, those that no earlier one has scored. None: windows do not overlap.
        first_id: an id in front of the text, so that its first token is scored too. The last window then has full
            length (lm-evaluation-harness's loglikelihood_rolling).
        progress: show a progress bar on the first rank's terminal.
    """
    T, stride = context_length, stride or context_length
    front = np.array([] if first_id is None else [first_id], dtype=np.int64)
    n_targets = len(front) + len(tokens) - 1
    starts = range(0, max(0, n_targets - T) + stride, stride)[: limit * batch_size or None]

    def window(start: int) -> tuple[np.ndarray, int]:
        stop = min(start + T, n_targets)
        n_scored = stop - (start - stride + T if start else 0)
        start = start if first_id is None else max(0, stop - T)
        ids = tokens[max(0, start - len(front)) : stop + 1 - len(front)]
        return np.concatenate([front[start:], ids]), n_scored

    rounds = -(-len(starts) // (batch_size * ranks.world))
    numbers = range(ranks.rank, rounds * ranks.world, ranks.world)
    for n in progress_bar(numbers, ranks) if progress else numbers:
        rows = [window(start) for start in starts[n * batch_size : (n + 1) * batch_size]]
        yield make_batch(rows or [(window(0)[0], 0)], T)  # where none is left, a window of which nothing is scored


def make_batch(rows: Sequence[tuple[Sequence[int], int]], T: int) -> Batch:
    """Return the batch of (ids, number of the last of them that are scored), at most T + 1 ids each.

    Padding comes last: attention is causal, so it has no effect.
    """
    x, y = np.zeros((len(rows), T), dtype=np.int64), np.full((len(rows), T), IGNORE, dtype=np.int64)
    for row, (ids, n_scored) in enumerate(rows):
        n = len(ids) - 1
        x[row, :n] = ids[:-1]
        y[row, n - n_scored : n] = ids[len(ids) - n_scored :]
    return x, y


# ---------------------------------------------------------------------------------------------------------------------
# loss


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
    batches: Iterable[Batch],
    to_device: Callable[[np.ndarray], Tensor],
    ranks: DistributedContext = SINGLE_PROCESS,
) -> float:
    """Return the mean loss over all targets, in nats per token.

    Args:
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


def scored_logits(
    model: nn.Module, x: np.ndarray, y: np.ndarray, to_device: Callable[[np.ndarray], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits, (n, V) float32 and padding of -inf, and targets, (n,), of scored targets only, in chunks."""
    scored = np.flatnonzero(y >= 0)
    hidden = model.hidden_states(to_device(x)).flatten(0, 1)[to_device(scored)]  # (N, C)
    rows = max(16, int(LOGITS_BYTES[hidden.device.type] / 4 / model.config.vocab_size))
    for part, targets in zip(hidden.split(rows), to_device(y.ravel()[scored]).split(rows), strict=True):
        yield model.compute_logits(part, padded=True).float(), targets


# ---------------------------------------------------------------------------------------------------------------------
# figures


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    to_device: Callable[[np.ndarray], Tensor],
    ranks: DistributedContext = SINGLE_PROCESS,
) -> dict[str, np.ndarray]:
    """Return sums over all scored tokens of a GPT, for `figures`; arguments as in mean_loss.

    Returns:
        targets, predicted, correct, in_top5: number of tokens by id (V): by target; by the most likely id; of those
        targets that are the most likely id, and that are among the five most likely.
        position_tokens, position_loss: tokens, and sums of their losses in nats, by position in the context (T).
        bin_correct, bin_confidence: tokens whose target is the most likely id, and sums of that id's probability, by
        BINS equal bins of this probability.
    """
    V, T, sums = model.config.vocab_size, model.config.context_length, {}
    with evaluating(model):
        for x, y in batches:
            found = []
            for logits, labels in scored_logits(model, x, y, to_device):
                log_p = logits.log_softmax(-1)  # on a CPU six times as fast as logsumexp, whose exp is not vectorised
                top = log_p.topk(min(5, V))  # sorted
                losses, in_top5 = -log_p.gather(1, labels[:, None])[:, 0], (top.indices == labels[:, None]).any(-1)
                found.append((losses, in_top5, top.indices[:, 0], top.values[:, 0].exp()))
            losses, in_top5, best, confidences = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
            targets, positions = y[y >= 0], np.nonzero(y >= 0)[1]
            correct = best == targets
            # bin m holds (m, m + 1] / BINS; the NaN of a diverged model falls into the first one
            bins = np.clip(np.ceil(np.nan_to_num(confidences) * BINS).astype(np.int64) - 1, 0, BINS - 1)
            for name, index, weights, size in (
                ("targets", targets, None, V),
                ("predicted", best, None, V),
                ("correct", targets[correct], None, V),
                ("in_top5", targets[in_top5], None, V),
                ("position_tokens", positions, None, T),
                ("position_loss", positions, losses, T),
                ("bin_correct", bins[correct], None, BINS),
                ("bin_confidence", bins, confidences, BINS),
            ):
                sums[name] = sums.get(name, 0) + np.bincount(index, weights, size)  # float64 where there are weights
    return {name: ranks.sum(torch.from_numpy(values)).numpy() for name, values in sums.items()}


def figures(sums: dict[str, np.ndarray], counts: dict[str, int]) -> dict:
    """Return the figures of a text under the keys of report.ROWS.

    Precision, recall and F1 are those of each class, weighted by its share of the targets (scikit-learn's
    average="weighted", zero_division=0). calibration_error is the expected calibration error over 15 equal bins of
    confidence (Guo et al., 2017). loss_by_position has a dict for each eighth of the context.

    Args:
        sums: as measure returns them.
        counts: of the text, as count_text returns them.
    """
    support, predicted, correct = sums["targets"], sums["predicted"], sums["correct"]
    n, nats, T = int(support.sum()), float(sums["position_loss"].sum()), len(sums["position_loss"])
    by_position = []
    for inside in np.split(np.arange(T), np.flatnonzero(np.diff(np.arange(T) * BUCKETS // T)) + 1):
        tokens, loss = int(sums["position_tokens"][inside].sum()), float(sums["position_loss"][inside].sum())
        mean = loss / tokens if tokens else None
        by_position.append({"first": int(inside[0]), "last": int(inside[-1]), "tokens": tokens, "loss": mean})
    return counts | {
        "tokens": n,
        "loss": nats / n,
        "perplexity": _exp(nats / n),
        "word_perplexity": _exp(nats / counts["words"]) if counts["words"] else None,
        "bits_per_byte": nats / math.log(2) / counts["bytes"] if counts["bytes"] else None,
        "accuracy": float(correct.sum() / n),
        "top5_accuracy": float(sums["in_top5"].sum() / n),
        "precision": float((support * correct / np.maximum(predicted, 1)).sum() / n),
        "recall": float(correct.sum() / n),
        "f1": float((support * 2 * correct / np.maximum(predicted + support, 1)).sum() / n),
        "calibration_error": float(np.abs(sums["bin_correct"] - sums["bin_confidence"]).sum() / n),
        "loss_by_position": by_position,
    }


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)


def count_text(tokens: Tokens | np.ndarray, stop: int, encoding: tiktoken.Encoding) -> dict[str, int]:
    """Count the text of ids [0, stop), decoded in chunks.

    Returns:
        bytes: in UTF-8. Special tokens and ids beyond the tokenizer's have none.
        words: separated by white space (str.split) or special tokens.
        lines: line ends. They are not words.
    """
    special = np.zeros(1 << 16, dtype=bool)
    special[encoding.n_vocab :] = True
    special[[encoding.encode_single_token(word) for word in encoding.special_tokens_set]] = True
    space = encoding.encode_single_token(b" ")  # stands for special tokens, which end a word
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    size, words, lines, in_word = 0, 0, 0, False
    for start in range(0, stop, CHUNK_TOKENS):
        ids = tokens[start : min(start + CHUNK_TOKENS, stop)]
        data = encoding.decode_bytes(np.where(special[ids], space, ids).tolist())
        size += len(data) - int(special[ids].sum())
        if text := decoder.decode(data, final=start + CHUNK_TOKENS >= stop):
            words += len(text.split()) - (in_word and not text[0].isspace())
            lines += text.count("\n")
            in_word = not text[-1].isspace()
    return {"bytes": size, "words": words, "lines": lines}
