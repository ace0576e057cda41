"""Evaluate a model on a text: windows, mean loss, and the sums over tokens from which report.py computes metrics.

mean_loss(model, eval_batches(tokens, context_length, batch_size), to_device)
report.compute_metrics(token_statistics(model, eval_batches(...), to_device), count_text(tokens, len(tokens), encoding))
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
BINS = 15  # of confidence
LOGITS_BYTES = {"cpu": 32e6, "cuda": 1e9, "mps": 256e6}  # float32 logits computed at once
TOKENS_PER_PASS = {"cpu": 4096, "mps": 16384, "cuda": 65536}  # on a CPU, larger batches are not faster
CHUNK_TOKENS = 1 << 18  # decoded at once

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, (B, T) int64 each; IGNORE where no target is scored


# ---------------------------------------------------------------------------------------------------------------------
# windows


def progress_bar(items: Iterable, ranks: DistributedContext) -> tqdm:
    """Wrap items in a progress bar, shown on rank 0 only."""
    return tqdm(items, leave=False, disable=None if ranks.first else True)


def default_batch_size(T: int, device: torch.device) -> int:
    """Return the default number of windows of T tokens per batch."""
    return max(1, TOKENS_PER_PASS[device.type] // T)


def find_documents(
    tokens: Tokens | np.ndarray, end_of_text: int, limit: int = 0, context_length: int = 1
) -> np.ndarray:
    """Return start and stop of each text between end-of-text ids, without empty ones: (n, 2) int64.

    Args:
        limit: number of tokens, rounded up to whole windows of the last document; 0: all.
    """
    chunks = range(0, len(tokens), CHUNK_TOKENS)
    stops = [start + np.flatnonzero(tokens[start : start + CHUNK_TOKENS] == end_of_text) for start in chunks]
    stops = np.concatenate([*stops, [len(tokens)]])
    documents = np.stack([np.concatenate([[0], stops[:-1] + 1]), stops], axis=1)
    documents = documents[documents[:, 0] < documents[:, 1]]
    ends = np.cumsum(documents[:, 1] - documents[:, 0])  # as numbers of tokens
    if limit and len(documents) and limit < ends[-1]:
        last = int(np.searchsorted(ends, limit))
        documents = documents[: last + 1]
        start, stop = documents[last]
        remaining = limit - (ends[last] - (stop - start))
        documents[last, 1] = min(stop, start + math.ceil(remaining / context_length) * context_length)
    return documents


def eval_batches(
    tokens: Tokens | np.ndarray,
    context_length: int,
    batch_size: int,
    limit: int = 0,
    ranks: DistributedContext = SINGLE_PROCESS,
    *,
    stride: int | None = None,
    documents: np.ndarray | None = None,
    first_id: int | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Iterator[Batch]:
    """Yield batches of windows in order; the last one may be smaller. Every token except the first is scored once.

    Args:
        tokens: at least two ids, or one if there are documents.
        limit: number of tokens to score, rounded up to whole windows; 0: all. The windows do not depend on batch_size.
            Not used with documents.
        ranks: the processes that take the batches in turn. All get the same number, because sharded models need all
            ranks; the last batch of some ranks may have no scored target.
        stride: distance between the starts of consecutive windows, at most context_length. A window scores only the
            tokens that no earlier window has scored. None: windows do not overlap.
        documents: a result of find_documents. The windows are then those of lm-evaluation-harness's
            loglikelihood_rolling for each document: all its tokens are scored, the last window has full length if the
            document is long enough, and a batch is as wide as its longest window.
        first_id: the id before each document.
        progress: wraps the numbers of the batches, to show how many are done.
    """
    T = context_length
    if documents is None:
        n_windows, window = _strided_windows(tokens, T, stride or T, limit)
    else:
        n_windows, window = _rolling_windows(tokens, T, documents, first_id)
    batches_per_rank = -(-n_windows // (batch_size * ranks.world))
    batch_numbers = range(ranks.rank, batches_per_rank * ranks.world, ranks.world)
    for n in progress(batch_numbers):
        rows = [window(i) for i in range(n * batch_size, min((n + 1) * batch_size, n_windows))]
        rows = rows or [(window(0)[0], 0)]  # no window left: no scored target
        yield make_batch(rows, T if documents is None else max(len(ids) for ids, _ in rows) - 1)


Windows = tuple[int, Callable[[int], tuple[np.ndarray, int]]]  # how many; number -> ids, how many of the last to score


def _strided_windows(tokens: Tokens | np.ndarray, T: int, stride: int, limit: int) -> Windows:
    n_targets = len(tokens) - 1
    n_windows = -(-max(0, n_targets - T) // stride) + 1
    if limit:
        n_windows = min(n_windows, 1 + max(0, -(-(limit - T) // stride)))  # the first window scores T tokens

    def window(n: int) -> tuple[np.ndarray, int]:
        start, stop = n * stride, min(n * stride + T, n_targets)
        return tokens[start : stop + 1].astype(np.int64), stop - (start - stride + T if start else 0)

    return n_windows, window


def _rolling_windows(tokens: Tokens | np.ndarray, T: int, documents: np.ndarray, first_id: int | None) -> Windows:
    lengths = documents[:, 1] - documents[:, 0]
    windows_before = np.concatenate([[0], np.cumsum(-(-lengths // T))])  # (n + 1,) windows before each document

    def window(n: int) -> tuple[np.ndarray, int]:
        document = int(np.searchsorted(windows_before, n, side="right")) - 1
        start, end = documents[document].tolist()
        first = start + (n - int(windows_before[document])) * T  # scored
        stop = min(first + T, end)
        ids = tokens[max(start, stop - T - 1) : stop].astype(np.int64)
        return np.concatenate([[first_id], ids]) if stop - T <= start else ids, stop - first

    return int(windows_before[-1]), window


def make_batch(rows: Sequence[tuple[Sequence[int], int]], T: int) -> Batch:
    """Build a batch from rows of (ids, n_scored): at most T + 1 ids, of which the last n_scored are scored.

    Padding is on the right, where causal attention ignores it.
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
    """Context manager for evaluation mode without gradients. Uses no random numbers."""
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
        ranks: the processes that share the batches.
    """
    loss_sum, tokens = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for x, y in batches:
            tokens += int((y >= 0).sum())
            loss_sum += model(to_device(x), to_device(y), reduction="none").cpu().double().sum()  # mps has no float64
    sums = ranks.sum(torch.tensor([loss_sum, tokens], dtype=torch.float64))  # counts are exact up to 2^53
    return float(sums[0] / sums[1])


def scored_logits(
    model: nn.Module, x: np.ndarray, y: np.ndarray, to_device: Callable[[np.ndarray], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of logits, (n, V padded with -inf) float32, and of targets, (n,), for scored targets only."""
    scored = np.flatnonzero(y >= 0)
    hidden = model.hidden_states(to_device(x)).flatten(0, 1)[to_device(scored)]  # (N, C)
    rows = max(16, int(LOGITS_BYTES[hidden.device.type] / 4 / model.config.vocab_size))
    for part, targets in zip(hidden.split(rows), to_device(y.ravel()[scored]).split(rows), strict=True):
        yield model.compute_logits(part, padded=True).float(), targets


# ---------------------------------------------------------------------------------------------------------------------
# metrics


def token_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    to_device: Callable[[np.ndarray], Tensor],
    ranks: DistributedContext = SINGLE_PROCESS,
) -> dict[str, np.ndarray]:
    """Return sums over all scored tokens, for `report.compute_metrics`. Arguments as in mean_loss.

    Returns:
        targets, predicted: number of tokens by target id, and by most likely id (V).
        correct, in_top5: number of tokens whose target is the most likely id, or in the top 5, by target id (V).
        position_tokens, position_loss: number of tokens, and sum of losses in nats, by position in the context (T).
        bin_correct, bin_confidence: number of correct tokens, and sum of the most likely id's probability, in BINS
            equal bins of this probability.
    """
    V, T, sums = model.config.vocab_size, model.config.context_length, {}
    with evaluating(model):
        for x, y in batches:
            parts = []
            for logits, labels in scored_logits(model, x, y, to_device):
                log_p = logits.log_softmax(-1)  # on a CPU six times as fast as logsumexp, whose exp is not vectorised
                top = log_p.topk(min(5, V))  # sorted
                values = {
                    "loss": -log_p.gather(1, labels[:, None])[:, 0],
                    "in_top5": (top.indices == labels[:, None]).any(-1),
                    "best": top.indices[:, 0],
                    "confidence": top.values[:, 0].exp(),
                }
                parts.append(values)
            token = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in values}
            targets, positions = y[y >= 0], np.nonzero(y >= 0)[1]
            correct = token["best"] == targets
            # bin m holds (m / BINS, (m + 1) / BINS]; NaN goes into bin 0
            bins = np.clip(np.ceil(np.nan_to_num(token["confidence"]) * BINS).astype(np.int64) - 1, 0, BINS - 1)
            for name, index, weights, size in (
                ("targets", targets, None, V),
                ("predicted", token["best"], None, V),
                ("correct", targets[correct], None, V),
                ("in_top5", targets[token["in_top5"]], None, V),
                ("position_tokens", positions, None, T),
                ("position_loss", positions, token["loss"], T),
                ("bin_correct", bins[correct], None, BINS),
                ("bin_confidence", bins, token["confidence"], BINS),
            ):
                sums[name] = sums.get(name, 0) + np.bincount(index, weights, size)  # float64 if there are weights
    return {name: ranks.sum(torch.from_numpy(values)).numpy() for name, values in sums.items()}


def count_text(tokens: Tokens | np.ndarray, stop: int, encoding: tiktoken.Encoding) -> dict[str, int]:
    """Count bytes, words and lines in the text of ids [0, stop).

    Returns:
        bytes: in UTF-8. Special tokens, and ids that the tokenizer does not have, count as 0.
        words: separated by white space (str.split) or special tokens.
        lines: line ends, which are not words.
    """
    special = np.ones(1 << 16, dtype=bool)
    special[[encoding.encode_single_token(token) for token in encoding.token_byte_values()]] = False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    size, words, lines, in_word = 0, 0, 0, False
    for start in range(0, stop, CHUNK_TOKENS):
        ids = tokens[start : min(start + CHUNK_TOKENS, stop)]
        first, *others = np.split(ids, np.flatnonzero(special[ids]))
        parts = [first, *(part[1:] for part in others)]
        data = b" ".join(encoding.decode_bytes(part.tolist()) for part in parts)  # special tokens end a word
        size += len(data) - len(others)
        if text := decoder.decode(data, final=start + CHUNK_TOKENS >= stop):
            words += len(text.split()) - (in_word and not text[0].isspace())
            lines += text.count("\n")
            in_word = not text[-1].isspace()
    return {"bytes": size, "words": words, "lines": lines}
