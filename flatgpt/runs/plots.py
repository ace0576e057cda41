"""Plot the metrics of one or several runs (losses, learning rate, speed, memory), and the losses of bench.py loss.

matplotlib simplifies paths, so long logs do not result in large files.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from flatgpt.runs.clock import duration
from flatgpt.runs.history import History, format_compact, time_unit

# Okabe and Ito's palette for color-blind readers, with a darker yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00", "#B3A500")
LINES = ("-", "-.", ":")  # of runs 1 to 8, 9 to 16, 17 to 24
STYLE = {
    "figure.dpi": 200,  # a width of 8 inches is 1,600 pixels; at half that size, the smallest text is 10 pixels high
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "text.parse_math": False,  # a run's name may contain dollar signs
    "svg.fonttype": "none",  # keep text as text
}
LOSSES = ("train_loss", "val_loss", "train_split_loss")
EVALUATED = ("val_loss", "train_split_loss")  # of evaluations, not of updates
PANELS = {  # column of metrics.csv -> title of its small panel
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "step_ms": "time per update (ms)",
    "tok_per_s": "tokens/s",
    "peak_mem_gb": "peak memory (GB)",
    "loss_scale": "loss scale",
}
NOISY = ("train_loss", "grad_norm", "step_ms", "tok_per_s")  # plotted smoothed; for a single run, also unsmoothed
LOG_SPANS = {"loss": 4, "lr": math.inf}  # minimum max/min of a logarithmic axis; default: 10
# Half-width of the smoothing window: a share of all rows, and at most a share of the rows before its center.
SMOOTHING, EARLY_SMOOTHING = 0.02, 0.15
MAX_MARKERS, NAME_LENGTH = 40, 30  # per curve; characters of a run's name
Curve = tuple[np.ndarray, np.ndarray]  # x and y


def has_values(run: History, x: str) -> bool:
    """Whether a run has values to plot over an x axis: iter, tokens or time."""
    return any(len(_read_curve(run, _x_values(run, x), key)[0]) for key in (*LOSSES, *PANELS))


def _x_values(run: History, x: str) -> np.ndarray:
    """Return the x value of each row; nan if it is not finite, as in a damaged log.

    `time` is the total time of the updates in s, without evaluations and saves.
    """
    xs = np.array(run.update_seconds if x == "time" else run[x])
    return np.where(np.isfinite(xs), xs, np.nan)


def _loss_scales(runs: Sequence[History]) -> tuple[str, list[dict[str, float]]]:
    """Return the unit of the losses, and for each run the factor of each split's losses to it.

    Losses in nats per token of different tokenizers cannot be compared. They are plotted as bits per byte, if the size
    of the text is known.
    """
    if len({run.tokenizer for run in runs} - {None}) < 2:
        return "nats per token", [{"train": 1.0, "val": 1.0}] * len(runs)
    scales = [{split: run.bits_per_byte(1.0, split) for split in ("train", "val")} for run in runs]
    scales = [{split: scale[split] or scale["train"] for split in scale} for scale in scales]  # there may be no val
    if all(scale["train"] for scale in scales):
        return "bits per byte", scales
    return "nats per token of different tokenizers, which cannot be compared", [{"train": 1.0, "val": 1.0}] * len(runs)


def _read_curve(run: History, xs: np.ndarray, key: str) -> Curve:
    """Return the curve of a column. If the value of an update is not finite, y is nan, which plots a gap.

    Rows without an x value and rows without an update are skipped. A column without values has no points.
    """
    ys, lr = np.array(run[key]), np.array(run["lr"])  # rows of an update have a learning rate
    included = np.isfinite(xs) & (np.isfinite(ys) | (np.isfinite(lr) & (key not in EVALUATED)))
    ys = np.where(np.isfinite(ys), ys, np.nan)[included]
    return (xs[included], ys) if np.isfinite(ys).any() else (ys[:0], ys[:0])


def plot_runs(runs: Sequence[History], x: str = "iter", format: str = "png", across: int = 3) -> bytes:
    """Plot one or several runs and return the image. Panels without values are omitted.

    Args:
        runs: runs for which `has_values` is true.
        x: the x axis: iter, tokens or time.
        format: png (1,600 pixels wide) or svg.
        across: number of small panels in a row: 3, or 1 for a narrow screen.
    """
    columns, unit = [_x_values(run, x) for run in runs], ""
    if x == "time":
        unit, size = time_unit(max(map(np.nanmax, columns)))
        columns = [xs / size for xs in columns]
    first, last = min(map(np.nanmin, columns)), max(map(np.nanmax, columns))
    margin = 0.02 * (last - first) or 0.5
    loss_unit, scales = _loss_scales(runs)
    curves = {key: list(map(_read_curve, runs, columns, [key] * len(runs))) for key in (*LOSSES, *PANELS)}
    for key in LOSSES:
        split = "val" if key == "val_loss" else "train"
        curves[key] = [(xs, ys * scale[split]) for (xs, ys), scale in zip(curves[key], scales, strict=True)]
    curves = {key: lines for key, lines in curves.items() if any(len(xs) for xs, _ in lines)}
    panels = [key for key in PANELS if key in curves]
    panels += panels[-1:] * (-len(panels) % across)  # the last panel fills its row
    mosaic = [["loss"] * across] * 2 if any(key in curves for key in LOSSES) else []
    mosaic += [panels[n : n + across] for n in range(0, len(panels), across)]
    # ignore the user's matplotlibrc, and warnings about characters that the font does not have
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        height = 0.7 + 1.6 * len(mosaic) + (0.17 * len(runs) if len(runs) > 1 else 0)  # with the legend's lines
        figure, file = Figure(figsize=(8, height)), io.BytesIO()
        for panel, axes in figure.subplot_mosaic(mosaic).items():
            _plot_panel(axes, panel, curves, loss_unit)
            axes.set_xlim(first - margin, last + margin)
            axes.xaxis.get_major_locator().set_params(integer=x != "time", nbins=8 if panel == "loss" else 4)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: format_tick(value))
        figure.set_figwidth(8 if across > 1 else 4.5)
        labels = {"iter": "iter (updates done)", "tokens": "tokens trained on", "time": f"time of the updates ({unit})"}
        figure.supxlabel(labels[x], fontsize="medium")
        _add_title(figure, runs, [scale["val"] for scale in scales])
        figure.savefig(file, format=format)
    return file.getvalue()


def _plot_panel(axes: Axes, panel: str, curves: dict[str, list[Curve]], loss_unit: str) -> None:
    """Plot the curves of one panel: `loss` or a key of PANELS."""
    keys = [key for key in LOSSES if key in curves] if panel == "loss" else [panel]
    single = len(curves[keys[0]]) == 1
    values = np.concatenate([ys for key in keys for _, ys in curves[key]])
    log = np.nanmin(values) > 0 and np.nanmax(values) >= LOG_SPANS.get(panel, 10) * np.nanmin(values)
    for key in keys:
        for n, (xs, ys) in enumerate(curves[key]):
            style = {"color": COLORS[n % 8], "linestyle": LINES[n // 8 % 3], "linewidth": 1.4}
            style["marker"] = "." if len(xs) < MAX_MARKERS else ""
            if key == "val_loss":
                style |= {"linewidth": 1.8, "marker": "o", "markersize": 4, "label": "validation"}
                style |= {"markevery": math.ceil(len(xs) / MAX_MARKERS)} | ({"color": COLORS[1]} if single else {})
            elif key == "train_split_loss":
                style |= {"linestyle": "--", "marker": "", "label": "training split"}
                style |= {"color": COLORS[2]} if single else {}
            elif panel == "loss":
                style |= {"label": "training (smoothed)"} if single else {"linewidth": 0.8}
            if key in NOISY:
                if single:
                    axes.plot(xs, ys, color=style["color"], linewidth=0.7, alpha=0.35)
                ys = smooth(ys, log)
            axes.plot(xs, ys, **style)
            ys = np.where(xs > 0, ys, np.nan)  # a new model is never the best
            if key == "val_loss" and np.isfinite(ys).any():
                best, star_style = np.nanargmin(ys), {"markersize": 12, "markeredgecolor": "white", "zorder": 5}
                axes.plot(xs[best], ys[best], "*", color=style["color"], label="best", **star_style)
    axes.set_title(PANELS.get(panel, f"loss ({loss_unit})" + ": validation bold, training thin" * (not single)))
    if panel == "loss" and single:
        axes.legend()
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel != "loss":
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _add_title(figure: Figure, runs: Sequence[History], scales: Sequence[float]) -> None:
    """Add name, best loss, tokens, time and size of a single run, or a legend of several runs.

    Args:
        scales: the factor of each run's validation losses to the unit of the plot.
    """
    labels = []
    for run, scale in zip(runs, scales, strict=True):
        label = run.name if len(run.name) <= NAME_LENGTH else f"{run.name[:13]}…{run.name[-16:]}"
        label += f", best {run.best[1] * scale:.4f} at iter {run.best[0]:,}" if run.best else ""
        label += f", {format_compact(run.tokens)} tokens" if run.tokens else ""
        labels.append(label + (f", {duration(run.seconds)}" if run.seconds else ""))
    if len(runs) == 1:
        facts = [runs[0].parameters and f"{runs[0].parameters:,} parameters", runs[0].state.get("device")]
        figure.suptitle(f"{labels[0]}\n{', '.join(map(str, filter(None, facts)))}".rstrip())
    else:
        styles = [{"color": COLORS[n % 8], "linestyle": LINES[n // 8 % 3]} for n in range(len(runs))]
        handles = [Line2D([], [], linewidth=1.8, **style) for style in styles]
        figure.legend(handles, labels, loc="outside upper center", ncols=1)


def plot_losses(results: dict[str, list[dict]], title: str) -> bytes:
    """Plot the validation loss of benchmark runs by the seconds since each process started. Return the image, a PNG.

    Args:
        results: the runs of each project by its name, as returned by train_until_loss. Evaluations before the first
            update are left out.
    """
    image = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 3.2))
        axes = figure.subplots()
        for color, (name, runs) in zip(COLORS, results.items(), strict=False):
            for run, label in zip(runs, [name, *[None] * len(runs)], strict=False):  # one entry of the legend
                points = [(seconds, loss) for seconds, i, loss in run["evaluations"] if i > 0]
                axes.plot(*np.reshape(points, (-1, 2)).T, "o-", color=color, linewidth=1.4, markersize=3, label=label)
        axes.set_xlim(left=0)
        axes.set(title=title, xlabel="seconds since the process started", ylabel="validation loss (nats per token)")
        axes.legend()
        figure.savefig(image)
    return image.getvalue()


def smooth(ys: np.ndarray, log: bool = False) -> np.ndarray:
    """Return centered moving averages, which do not lag. nan stays nan.

    Args:
        log: average logarithms, so that a spike does not become wide on a logarithmic axis.
    """
    known, n = np.isfinite(ys), np.arange(len(ys))
    width = np.minimum(SMOOTHING * len(ys), EARLY_SMOOTHING * n).astype(int)  # smaller where losses fall fast
    start, end = n - width, np.minimum(n + width + 1, len(ys))
    means = np.log(ys) if log else ys
    for _ in range(2):  # averaging twice turns a spike into a triangle, not a rectangle
        sums, counts = (np.append(0, np.cumsum(a)) for a in (np.where(known, means, 0), known))
        means = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(known, np.exp(means) if log else means, np.nan)


def format_tick(value: float) -> str:
    """Format a tick label: 0.0003, 1.5, 2,000, 1.5M."""
    unit, size = next((pair for pair in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if abs(value) >= pair[1]), ("", 1))
    return f"{value / size:,.6g}{unit}"
