"""Plot the metrics of one or several runs: losses, learning rate, gradient norm, speed and memory.

matplotlib is imported when a figure is drawn. It simplifies paths itself, so long logs make no large files.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from config import UserError
from flatgpt.runs.history import RECIPE, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for all kinds of colour vision, its yellow darker; markers and dashes are for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00", "#B3A500")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
INCHES, DPI = 8, 200  # 1,600 pixels wide; shown at half that width, the smallest text is 10 pixels high
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "text.parse_math": False,  # the name of a run may contain dollar signs
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "flatgpt",  # the same log gives the same file
}
RAW = {"linewidth": 0.7, "alpha": 0.35}
LOG_SPAN, LOSS_LOG_SPAN = 10, 4  # an axis is logarithmic if its largest value is so many times the smallest
MAX_MARKERS = 40  # on one line
NAME_LENGTH, LINE_LENGTH = 48, 125  # characters of a run's name, and of a line as wide as the figure
# A value is weighted with exp(-distance / width) in the mean at another iteration. The width is this share of the run,
# and less near its beginning, where losses fall fast: NEAR of the distance from there.
SMOOTHING, NEAR = 0.015, 0.1
TIME_UNITS = (("s", 1, 180), ("min", 60, 3 * 3600), ("h", 3600, 4 * 86400), ("days", 86400, math.inf))
# The small panels: title by column of metrics.csv, whether it is smoothed, and whether the axis may be logarithmic.
PANELS = {
    "lr": ("learning rate", False, False),
    "grad_norm": ("gradient norm", True, True),
    "step_ms": ("time per update (ms)", True, True),
    "tok_per_s": ("tokens/s", True, True),
    "peak_mem_gb": ("peak memory (GB)", False, True),
    "loss_scale": ("loss scale", False, True),
}
LOSSES = ("train_loss", "val_loss")
Curve = tuple[list[float], list[float], list[float]]  # iterations, x and y values


@dataclass(frozen=True)
class PlottedRun:
    """A run with its curves by column, and the colour and dashes of its lines."""

    history: History
    xs: list[float]
    curves: dict[str, Curve]
    style: dict
    marker: str


def read_curve(history: History, xs: Sequence[float], key: str) -> Curve | None:
    """Return the curve of a column; y is nan, a gap, where an update's value is not finite.

    Rows without an x value, and rows of an evaluation only, are left out.
    """
    rows = [
        (i, x, y if math.isfinite(y) else math.nan)
        for i, x, y, lr in zip(history["iter"], xs, history[key], history["lr"], strict=True)
        if math.isfinite(x) and (math.isfinite(y) or (key != "val_loss" and math.isfinite(lr)))
    ]
    return tuple(map(list, zip(*rows, strict=True))) if any(math.isfinite(y) for _, _, y in rows) else None


def plot_runs(histories: Sequence[History], x: str = "iter") -> Figure:
    """Draw one run, or several in each panel. Runs and panels without values are left out.

    Args:
        x: the x axis: iter, tokens or time.

    Raises:
        UserError: none of the runs has values to draw.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    runs, x_label = _prepare(histories, x)
    if not runs:
        raise UserError(f"{', '.join(history.name for history in histories)}: nothing in the log to draw along {x}")
    panels = [key for key in PANELS if any(key in run.curves for run in runs)]
    rows = math.ceil(len(panels) / 3)
    groups = [panels[row * len(panels) // rows : (row + 1) * len(panels) // rows] for row in range(rows)]
    mosaic = [[key for key in group for _ in range(6 // len(group))] for group in groups]
    heights = [1.0] * rows
    if any(key in run.curves for run in runs for key in LOSSES):
        mosaic, heights = [["loss"] * 6, *mosaic], [2.0, *heights]
    with _style():
        figure = Figure(figsize=(INCHES, 0.7 + 1.6 * sum(heights)))
        all_axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
        if "loss" in all_axes:
            _plot_losses(all_axes["loss"], runs)
        for key in panels:
            _plot_panel(all_axes[key], key, runs)
        xs = [value for run in runs for value in run.xs if math.isfinite(value)]
        margin = 0.02 * (max(xs) - min(xs)) or 0.5
        for axes in figure.axes:
            axes.set_xlim(min(xs) - margin, max(xs) + margin)
            _set_ticks(axes, integer=x != "time" or len(set(xs)) == 1)
        figure.supxlabel(x_label, fontsize="medium")
        _add_title(figure, runs)
    return figure


def render(figure: Figure, format: str) -> bytes:
    """Return the content of the figure's file: png, 1,600 pixels wide, or svg."""
    file = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # boxes stand for letters that the font does not have
        figure.savefig(file, format=format, dpi=DPI, metadata={"Date": None} if format == "svg" else None)
    return file.getvalue()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Use STYLE over matplotlib's defaults, without the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _prepare(histories: Sequence[History], x: str) -> tuple[list[PlottedRun], str]:
    """Return the runs that have values, and the label of the x axis."""
    columns = [history.x_values(x) for history in histories]
    label = {"iter": "iter (updates done)", "tokens": "tokens trained on"}.get(x)
    if x == "time":
        longest = max((s for column in columns for s in column if math.isfinite(s)), default=0.0)
        unit, size = next((unit, size) for unit, size, below in TIME_UNITS if longest < below)
        columns, label = [[s / size for s in column] for column in columns], f"time of the updates ({unit})"
    runs = []
    for history, xs in zip(histories, columns, strict=True):
        if curves := {key: found for key in (*LOSSES, *PANELS) if (found := read_curve(history, xs, key))}:
            n = len(runs)
            style = {"color": COLOURS[n % len(COLOURS)], "linestyle": DASHES[n % len(DASHES)]}
            runs.append(PlottedRun(history, xs, curves, style, MARKERS[n % len(MARKERS)]))
    return runs, label


def _plot_losses(axes: Axes, runs: Sequence[PlottedRun]) -> None:
    single = len(runs) == 1
    axes.set_title("loss (nats per token)" + ": validation bold, training thin" * (not single))
    values = [y for run in runs for key in LOSSES if key in run.curves for y in run.curves[key][2]]
    log = _use_log_scale(axes, values, LOSS_LOG_SPAN)
    for run in runs:
        if "train_loss" in run.curves:
            look = {"linewidth": 1.4, "label": "training (smoothed)"} if single else {"linewidth": 0.8, "alpha": 0.8}
            _plot_smoothed(axes, run.curves["train_loss"], single, log, color=run.style["color"], **look)
        if "val_loss" in run.curves:
            _, xs, ys = run.curves["val_loss"]
            look = {**run.style, "color": COLOURS[1] if single else run.style["color"], "linewidth": 1.8}
            look |= {"marker": run.marker, "markersize": 4, "markevery": math.ceil(len(xs) / MAX_MARKERS)}
            axes.plot(xs, ys, label="validation", **look)
            best = min(range(len(ys)), key=ys.__getitem__)
            star = {"markersize": 12, "markeredgecolor": "white", "zorder": 5, "label": "best"}
            axes.plot(xs[best], ys[best], "*", color=look["color"], **star)
    if single:
        if skipped := skipped_updates(runs[0].history, runs[0].xs):
            look = {"color": "black", "markersize": 7, "linestyle": "none", "transform": axes.get_xaxis_transform()}
            axes.plot(skipped, [0.03] * len(skipped), "|", label="update skipped", **look)
        axes.legend()


def _plot_panel(axes: Axes, key: str, runs: Sequence[PlottedRun]) -> None:
    title, smoothed, may_be_log = PANELS[key]
    axes.set_title(title)
    single, with_values = len(runs) == 1, [run for run in runs if key in run.curves]
    curves = [run.curves[key] for run in with_values]
    shown = [ys if single or not smoothed else smooth(iters, ys) for iters, _, ys in curves]
    values = [y for ys in shown for y in ys if math.isfinite(y)]
    log = may_be_log and _use_log_scale(axes, values, LOG_SPAN)
    for run, curve in zip(with_values, curves, strict=True):
        if smoothed:
            _plot_smoothed(axes, curve, single, log, linewidth=1.4, **run.style)
        else:
            _plot_line(axes, *curve[1:], linewidth=1.4, **run.style)
    if not log:
        axes.set_ylim(0, 1.08 * max(values) or 1)


def _plot_smoothed(axes: Axes, curve: Curve, raw: bool, log: bool, **look) -> None:
    """Draw the smoothed curve, and faintly the raw one if asked."""
    iters, xs, ys = curve
    if raw:
        _plot_line(axes, xs, ys, color=look["color"], **RAW)
    _plot_line(axes, xs, smooth(iters, ys, log), **look)


def _plot_line(axes: Axes, xs: list[float], ys: list[float], **look) -> None:
    axes.plot(xs, ys, **look)
    known = [False, *map(math.isfinite, ys), False]
    # a line does not show points between gaps, such as a run's only row
    if isolated := [n for n in range(len(ys)) if known[n + 1] and not known[n] and not known[n + 2]]:
        look |= {"linestyle": "none", "marker": ".", "label": None}
        axes.plot([xs[n] for n in isolated], [ys[n] for n in isolated], **look)


def _use_log_scale(axes: Axes, values: Sequence[float], span: float) -> bool:
    """Make the y axis logarithmic if no value is negative and the positive ones span so much. Return whether it is."""
    known = [y for y in values if y > 0]
    if not known or max(known) < span * min(known) or any(y < 0 for y in values):
        return False
    axes.set_yscale("log", nonpositive="mask")
    return True


def _set_ticks(axes: Axes, integer: bool) -> None:
    """Put a few round numbers on both axes, along x only integers if asked."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    steps, columns = [1, 2, 2.5, 5, 10], len(axes.get_subplotspec().colspan)  # of six
    axes.xaxis.set_major_locator(MaxNLocator(2 * columns, steps=steps, integer=integer, min_n_ticks=1))
    log = axes.get_yscale() == "log"
    ticks = log_ticks(*axes.get_ylim(), 6) if log else []
    axes.yaxis.set_major_locator(FixedLocator(ticks) if ticks else MaxNLocator(5, steps=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis, largest in ((axes.xaxis, axes.get_xlim()[1]), (axes.yaxis, 0 if log else axes.get_ylim()[1])):
        axis.set_major_formatter(lambda value, _, largest=largest: format_tick(value, largest))


def _add_title(figure: Figure, runs: Sequence[PlottedRun]) -> None:
    """Add the title, and for several runs a legend below it."""
    from matplotlib.lines import Line2D

    facts, bests = [], [run.history.best for run in runs]
    for history in (run.history for run in runs):
        recipe, count = Path(history.settings.get("config") or RECIPE), history.parameters
        # the recipe of a resumed run can be the config.toml in its folder
        name = shorten([history.name if recipe.name == RECIPE else recipe.stem], NAME_LENGTH)[0]
        facts.append((name, f"{format_tick(float(f'{count:.3g}'))} parameters" if count else "", history.device))
    shared = [values[0] for values in zip(*facts, strict=True) if values[0] and len(set(values)) == 1]
    if len(runs) == 1:
        best = f"best validation loss {bests[0][1]:.4f} at iter {bests[0][0]:,}" if bests[0] else "no validation loss"
        figure.suptitle(f"{', '.join(shared)}\n{best}", fontsize="large")
        return
    names = shorten([run.history.name for run in runs], NAME_LENGTH)
    labels = [f"{name}, best {best[1]:.4f}" if best else name for name, best in zip(names, bests, strict=True)]
    columns = max(1, min(4, LINE_LENGTH // (max(map(len, labels)) + 12)))
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(runs) / columns))
    handles = [Line2D([], [], marker=run.marker, markersize=4, linewidth=1.8, **run.style) for run in runs]
    options = {"ncols": columns, "handlelength": 3.5, "title_fontsize": "large"}
    title = ", ".join([f"{len(runs)} runs", *shared])
    figure.legend(handles, labels, loc="outside upper center", title=title, **options)


# ---------------------------------------------------------------------------------------------------------------------
# curves, numbers and names


def skipped_updates(history: History, xs: Sequence[float]) -> list[float]:
    """Return the x values of rows in which updates were skipped, or had a loss that is not finite."""
    found, before = [], 0.0
    for x, lr, loss, skipped in zip(xs, history["lr"], history["train_loss"], history["skipped"], strict=True):
        if math.isfinite(x) and (skipped > before or (math.isfinite(lr) and not math.isfinite(loss))):
            found.append(x)
        before = skipped if math.isfinite(skipped) else before
    return found


def smooth(iters: Sequence[float], values: Sequence[float], log: bool = False) -> list[float]:
    """Return exponentially weighted means over the neighbours on both sides, which do not lag behind; nan stays nan.

    Weights depend on the distance in iterations and are divided by their sum over finite values (as Adam's bias
    correction does): neither the ends of a run nor gaps shift the curve.

    Args:
        log: of the logarithms, so that a spike does not become wide on a logarithmic axis.
    """
    if not values:
        return []
    decays = [0.0]  # of the weights from one row to the next
    for before, i in itertools.pairwise(iters):
        width = min(SMOOTHING * (iters[-1] - iters[0]), NEAR * ((before + i) / 2 - iters[0]))
        decays.append(math.exp(-abs(i - before) / width) if width > 0 else 0.0)
    known = [math.isfinite(y) and (y > 0 or not log) for y in values]
    terms = [(math.log(y) if log else y) if k else 0.0 for y, k in zip(values, known, strict=True)]
    left = _decayed_sums(terms, known, decays)
    right = _decayed_sums(terms[::-1], known[::-1], [0.0, *decays[:0:-1]])[::-1]
    means = [
        (before + after - y) / (weight_before + weight_after - 1) if k else math.nan
        for (before, weight_before), (after, weight_after), y, k in zip(left, right, terms, known, strict=True)
    ]
    return [math.exp(mean) for mean in means] if log else means


def _decayed_sums(terms: list[float], weights: list[bool], decays: list[float]) -> list[tuple[float, float]]:
    """Return running sums of terms and weights, which are multiplied by a row's decay before the row is added."""
    sums, total, total_weight = [], 0.0, 0.0
    for term, weight, decay in zip(terms, weights, decays, strict=True):
        total, total_weight = total * decay + term, total_weight * decay + weight
        sums.append((total, total_weight))
    return sums


def format_tick(value: float, largest: float = 0.0) -> str:
    """Format a number on an axis: 0.0003, 1.5, 2,000, 1.5M; in the unit of the axis's largest value, if given."""
    size = max(abs(value), abs(largest))
    unit, by = next(((unit, by) for unit, by in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if size >= by), ("", 1.0))
    if value == 0:
        return "0"
    if size >= 1e15 or abs(value) < 1e-4:
        return f"{value:.3g}".replace("e+", "e").replace("e-0", "e-")
    return f"{value / by:.6g}{unit}" if unit or abs(value) < 1000 else f"{value:,.6g}" if value % 1 else f"{value:,.0f}"


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return three to `most` round numbers on a logarithmic axis, or none if it is too short for three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) <= most:
            break
    return ticks[:: math.ceil(len(ticks) / most)] if len(ticks) >= 3 else []


def shorten(names: Sequence[str], most: int) -> list[str]:
    """Shorten names to so many characters: drop the words that all begin with, then the middle."""
    if max(map(len, names)) > most and len(names) > 1:
        shared = os.path.commonprefix(names)  # noqa: RUF071 - characters are meant
        start = 1 + max(shared[:-1].rfind(separator) for separator in "_-./ ")
        names = ["…" + name[start:] if start > 1 else name for name in names]
    tail = (most - 1) // 2
    return [name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[-tail:]}" for name in names]
