"""What eval.py found, for people: a table with each figure's unit, smol-GPT's six lines, a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from flatgpt.evaluation.metrics import Scores
from flatgpt.evaluation.text_stats import TextCounts

LIKELIEST = "of the likeliest token, weighted by the targets' classes"
DRAWN = "of a token drawn at temperature 1, weighted likewise"
# Key -> (label, what the figure is counted in or divided by), in the table's order.
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
    "bytes": ("bytes", "of text scored"),
    "words": ("words", "of the text, its first token's too; split at white space, line ends are not counted"),
    "lines": ("line ends", ""),
    "loss": ("loss", "nats per token scored"),
    "perplexity": ("token perplexity", "exp(loss)"),
    "word_perplexity": ("word perplexity", "exp(sum of losses / words)"),
    "bits_per_byte": ("bits per byte", "sum of losses / ln 2 / bytes"),
    "accuracy": ("top-1 accuracy", "share of tokens that were the likeliest"),
    "top5_accuracy": ("top-5 accuracy", "share of tokens among the five likeliest"),
    "precision": ("precision", LIKELIEST),
    "recall": ("recall", LIKELIEST),
    "f1": ("F1", LIKELIEST),
    "sampled_precision": ("precision, sampled", DRAWN),
    "sampled_recall": ("recall, sampled", DRAWN),
    "sampled_f1": ("F1, sampled", DRAWN),
    "calibration_error": ("calibration error", "expected: |accuracy - probability| of the likeliest token, 15 bins"),
    "questions": ("questions", ""),
    "choice_accuracy": ("accuracy", "share of questions; the likeliest ending"),
    "choice_accuracy_stderr": ("  standard error", ""),
    "choice_accuracy_norm": ("accuracy, normalised", "share of questions; the likeliest ending per character"),
    "choice_accuracy_norm_stderr": ("  standard error", ""),
    "prompts": ("prompts continued", ""),
    "prompts_mean": ("", ""),
    "bleu": ("BLEU", "0 to 100, of all continuations"),
    "bleu_signature": ("  sacrebleu", ""),
    "rouge_l": ("ROUGE-L", "mean F-measure, 0 to 1"),
    "distinct_1": ("distinct-1", "different words / words"),
    "reference_distinct_1": ("  of the text itself", ""),
    "distinct_2": ("distinct-2", "different pairs of words / pairs"),
    "reference_distinct_2": ("  of the text itself", ""),
    "repetition": ("repetition", "share of runs of 4 tokens that were there before"),
    "reference_repetition": ("  of the text itself", ""),
}


def figures(scores: Scores, counts: TextCounts) -> dict:
    """Every figure of scored text under ROWS' keys, and the losses by position."""
    answer = {
        "tokens": scores.tokens,
        "bytes": counts.bytes,
        "words": counts.words,
        "lines": counts.lines,
        "loss": scores.loss,
        "perplexity": _exp(scores.loss),
        "word_perplexity": _exp(scores.loss_sum / counts.words) if counts.words else None,
        "bits_per_byte": scores.loss_sum / math.log(2) / counts.bytes if counts.bytes else None,
        "accuracy": scores.accuracy,
        "top5_accuracy": scores.top5_accuracy,
        **scores.weighted(),
    }
    if scores.sampled:
        answer |= {f"sampled_{name}": value for name, value in scores.weighted("sampled").items()}
    return answer | {"calibration_error": scores.calibration_error, "loss_by_position": scores.by_position}


def units(report: dict) -> dict[str, str]:
    """What each figure of a report is counted in or divided by, where it has to be said."""
    said = {key: unit for key, (_, unit) in ROWS.items() if unit} | {"loss_by_position": "nats per token scored there"}
    return {key: said[key] for key in report if key in said}


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)


def table(reports: Sequence[dict]) -> str:
    """The reports side by side, a figure a line, with what it is divided by; what all have in common once."""
    rows = []
    for key, (label, unit) in ROWS.items():
        values = [report.get(key) for report in reports]
        if any(value is not None for value in values):
            once = isinstance(values[0], str) and len(set(values)) == 1
            rows.append((label, [_text(value) for value in (values[:1] if once else values)], unit))
    if len({report["window"] for report in reports}) > 1:
        rows.append(("loss by position", ["the windows differ: see --json or --plot"], ""))
    else:
        for n, bucket in enumerate(reports[0].get("loss_by_position", [])):
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
        return f"{value:.4g}" if abs(value) >= 1e9 else f"{value:,.4f}"  # of text without blanks, per word, say
    return f"{value:,}" if isinstance(value, int) else str(value)


def smol(reports: Sequence[dict]) -> str:
    """smol-GPT's six lines of each report, below the model's name where there are several.

    Precision, recall, F1 and accuracy are a sampled token's where one was scored, as there. Its accuracy divided the
    matches by the batch size, this one by the tokens: it is recall, weighted, by definition.
    """
    blocks = []
    for report in reports:
        prefix = "sampled_" if "sampled_f1" in report else ""
        values = {"loss": report["loss"], "perplexity": report["perplexity"]}
        values |= {name: report[f"{prefix}{name}"] for name in ("precision", "recall", "f1")}
        values["accuracy"] = report["sampled_recall"] if prefix else report["accuracy"]
        name = [str(report["model"])] * (len(reports) > 1)
        blocks.append("\n".join(name + [f"Test {key}: {value:.4f}" for key, value in values.items()]))
    return "\n\n".join(blocks)


def draw_positions(reports: Sequence[dict]) -> bytes:
    """The loss by position in the context, a line a model, as a PNG file's content."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for report in reports:
        buckets = [b for b in report["loss_by_position"] if b["tokens"]]
        edges = [b["first"] for b in buckets] + [buckets[-1]["last"] + 1]
        axes.stairs([b["loss"] for b in buckets], edges, baseline=None, linewidth=2, label=report["model"])
    axes.set_xlabel("position in the context (tokens before it)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{reports[0]['text']}, protocol {reports[0]['protocol']}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
