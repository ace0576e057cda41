"""Reports of eval.py: the metrics of a text, a table with units, smol-GPT's six lines, a plot of loss by position."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

BUCKETS = 8  # of positions in the context


class Metric(NamedTuple):
    """A row of the report of a text.

    Attributes:
        value: returns the metric from a namespace with the sums of token_statistics, the counts of count_text, and
            tokens: number of scored tokens;
            nats: sum of the losses;
            ranked: as tokens, but NaN if the loss is: NaN logits have no ranks, so that their shares are NaN too.
    """

    label: str
    unit: str
    value: Callable[[SimpleNamespace], float | None]


GREEDY = "of the most likely token, weighted by class frequency"
# Key in the report -> metric, in the report's order. Precision, recall and F1 are averages over classes, weighted by
# their share of the targets (scikit-learn's average="weighted", zero_division=0). calibration_error: Guo et al., 2017.
METRICS = {
    "loss": Metric("loss", "nats per scored token", lambda s: s.nats / s.tokens),
    "perplexity": Metric("token perplexity", "exp(loss)", lambda s: _exp(s.nats / s.tokens)),
    "word_perplexity": Metric(
        "word perplexity", "exp(sum of losses / words)", lambda s: _exp(s.nats / s.words) if s.words else None
    ),
    "bits_per_byte": Metric(
        "bits per byte", "sum of losses / ln 2 / bytes", lambda s: s.nats / math.log(2) / s.bytes if s.bytes else None
    ),
    "accuracy": Metric("top-1 accuracy", "share of targets ranked first", lambda s: s.correct.sum() / s.ranked),
    "top5_accuracy": Metric(
        "top-5 accuracy", "share of targets ranked in the first five", lambda s: s.in_top5.sum() / s.ranked
    ),
    "precision": Metric(
        "precision", GREEDY, lambda s: (s.targets * s.correct / np.maximum(s.predicted, 1)).sum() / s.ranked
    ),
    "recall": Metric("recall", GREEDY, lambda s: s.correct.sum() / s.ranked),
    "f1": Metric(
        "F1", GREEDY, lambda s: (s.targets * 2 * s.correct / np.maximum(s.predicted + s.targets, 1)).sum() / s.ranked
    ),
    "calibration_error": Metric(
        "calibration error",
        "expected calibration error, 15 bins",
        lambda s: np.abs(s.bin_correct - s.bin_confidence).sum() / s.tokens,
    ),
}


# Key -> (label, unit or definition), in the table's order.
ROWS = {
    "model": ("model", ""),
    "iter": ("iter", ""),
    "text": ("text", ""),
    "protocol": ("protocol", ""),
    "protocol_means": ("", ""),
    "window": ("window", "tokens"),
    "stride": ("stride", "tokens"),
    "dtype": ("dtype", "of the matrix products"),
    "tokens": ("tokens", "scored"),
    "end_of_text_tokens": ("  end-of-text", "of these tokens; they count 0 bytes"),
    "documents": ("documents", "separated by end-of-text, which is not scored; each begins without context"),
    "bytes": ("bytes", "of scored text"),
    "words": ("words", "split at white space, without line ends; the first token's word is counted"),
    "lines": ("line ends", ""),
    **{key: (metric.label, metric.unit) for key, metric in METRICS.items()},
    "choices_format": (
        "format",
        "hellaswag: texts as in lm-evaluation-harness's task; plain: ctx and endings as given",
    ),
    "questions": ("questions", ""),
    "choice_accuracy": ("accuracy", "share of questions whose most likely ending is correct"),
    "choice_accuracy_stderr": ("  standard error", ""),
    "choice_accuracy_norm": (
        "accuracy, normalised",
        "share of questions whose most likely ending per character is correct",
    ),
    "choice_accuracy_norm_stderr": ("  standard error", ""),
    "prompts": ("prompts continued", ""),
    "prompts_mean": ("", ""),
    "bleu": ("BLEU", "0 to 100, of all continuations"),
    "bleu_signature": ("  sacrebleu", ""),
    "rouge_l": ("ROUGE-L", "mean F-measure, 0 to 1"),
    "distinct_1": ("distinct-1", "distinct words / words"),
    "reference_distinct_1": ("  of the references", ""),
    "distinct_2": ("distinct-2", "distinct pairs of words / pairs"),
    "reference_distinct_2": ("  of the references", ""),
    "repetition": ("repetition", "share of 4-grams of tokens that are repeated"),
    "reference_repetition": ("  of the references", ""),
}
PROTOCOLS = {
    "window": "windows do not overlap; every token except the first is scored once",
    "stride": "windows overlap; each scores the tokens not scored by earlier windows; the first token is not scored",
    "rolling": "as in lm-evaluation-harness: every token of each document is scored once, the first after end-of-text",
    "choices": "log-likelihood of each ending after its context, as in lm-evaluation-harness's multiple_choice",
}
UNITS = {key: unit for key, (_, unit) in ROWS.items() if unit} | {"loss_by_position": "nats per scored token"}


def compute_metrics(sums: dict[str, np.ndarray], counts: dict[str, int]) -> dict:
    """Return the counts, the values of METRICS, and loss_by_position: a dict for each eighth of the context.

    Args:
        sums: the result of token_statistics.
        counts: the result of count_text.
    """
    tokens, nats, T = int(sums["targets"].sum()), float(sums["position_loss"].sum()), len(sums["position_loss"])
    found = SimpleNamespace(**sums, **counts, tokens=tokens, nats=nats, ranked=math.nan if math.isnan(nats) else tokens)
    values = {key: metric.value(found) for key, metric in METRICS.items()}
    values = {key: value if value is None else float(value) for key, value in values.items()}  # numpy's are not JSON
    by_position = []
    for bucket in np.split(np.arange(T), np.flatnonzero(np.diff(np.arange(T) * BUCKETS // T)) + 1):
        count, loss = int(sums["position_tokens"][bucket].sum()), float(sums["position_loss"][bucket].sum())
        mean = loss / count if count else None
        by_position.append({"first": int(bucket[0]), "last": int(bucket[-1]), "tokens": count, "loss": mean})
    return {**counts, "tokens": tokens, **values, "loss_by_position": by_position}


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)


def table(reports: Sequence[dict]) -> str:
    """Return the reports side by side, one metric per line with its unit. Texts that all share are written once."""
    rows = []
    for key, (label, unit) in ROWS.items():
        values = [report.get(key) for report in reports]
        if any(value is not None for value in values):
            shared = isinstance(values[0], str) and len(set(values)) == 1
            rows.append((label, [_text(value) for value in (values[:1] if shared else values)], unit))
    buckets = reports[0].get("loss_by_position", [])
    if buckets and len({report["window"] for report in reports}) > 1:
        rows.append(("loss by position", ["the windows differ: see --json or --plot"], ""))
    else:
        for n, bucket in enumerate(buckets):
            label, unit = f"at {bucket['first']:,} to {bucket['last']:,}", "loss by position in the context" * (n == 0)
            rows.append((label, [_text(report["loss_by_position"][n]["loss"]) for report in reports], unit))
    left = max(len(label) for label, _, _ in rows)
    columns = [values for _, values, _ in rows if len(values) > 1]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    lines = []
    for label, values, unit in rows:
        cells = [value.ljust(width) for value, width in zip(values, widths, strict=True)] if len(values) > 1 else values
        lines.append("  ".join([label.ljust(left), *cells, unit]).rstrip())
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.4g}" if abs(value) >= 1e9 else f"{value:,.4f}"
        )  # such as word perplexity of text without spaces
    return f"{value:,}" if isinstance(value, int) else str(value)


def smol(reports: Sequence[dict]) -> str:
    """Return smol-GPT's six lines for each report, below the model's name if there are several reports.

    Accuracy is per token; smol-GPT itself divides by the batch size.
    """
    blocks = []
    for report in reports:
        name = [str(report["model"])] * (len(reports) > 1)
        keys = ("loss", "perplexity", "precision", "recall", "f1", "accuracy")
        blocks.append("\n".join(name + [f"Test {key}: {report[key]:.4f}" for key in keys]))
    return "\n\n".join(blocks)


def draw_positions(reports: Sequence[dict]) -> bytes:
    """Plot the loss by position in the context, with a line for each report. Return a PNG image."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    # names may contain dollar signs, and characters that the font does not have
    with rc_context({"text.parse_math": False}), warnings.catch_warnings(action="ignore"):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for report in reports:
            buckets = [b for b in report["loss_by_position"] if b["tokens"]]
            edges = [b["first"] for b in buckets] + [buckets[-1]["last"] + 1]
            axes.stairs([b["loss"] for b in buckets], edges, baseline=None, linewidth=2, label=report["model"])
        axes.set(xlabel="position in the context (tokens before it)", ylabel="loss (nats per token)")
        axes.set_title(f"{reports[0]['text']}, protocol {reports[0]['protocol']}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(fontsize="small")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
