"""Runs as one picture: losses, learning rate, gradient norm, speed, memory. matplotlib is loaded where it is drawn."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from config import UserError
from flatgpt.runs.curves import POINTS, format_tick, isolated_points, log_ticks, shorten, smooth, thin, time_unit
from flatgpt.runs.history import RECIPE, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

# Okabe and Ito's palette, which all kinds of colour vision tell apart, its yellow, too light for lines, last; markers
# and dashes are for those who print it grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00", "#B3A500")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
INCHES, DPI = 8, 200  # 1,600 pixels; at half of them, as a page shows it, the smallest text has 10
STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.framealpha": 0.7,
    "legend.edgecolor": "none",
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a run's name may have dollars
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "flatgpt",  # the same log, the same file
}
RAW = {"linewidth": 0.7, "alpha": 0.35}
SPAN, LOSS_SPAN = 10, 4  # largest / smallest value from which on an axis is logarithmic
UNLIKE = 20  # longest / shortest run from which on x is, so that both are seen
MOST_MARKERS = 40  # on a line
NAME, CHARACTERS = 48, 125  # of a run's name, of a line of text as wide as the picture


@dataclass(frozen=True)
class Panel:
    """One of the small ones: a column of the log."""

    key: str
    title: str
    smooth: bool = True
    log: bool = True  # where the values span much


PANELS = (
    Panel("lr", "learning rate", smooth=False, log=False),
    Panel("grad_norm", "gradient norm"),
    Panel("step_ms", "time per update (ms)"),
    Panel("tok_per_s", "tokens/s"),
    Panel("peak_mem_gb", "peak memory (GB)", smooth=False),
    Panel("loss_scale", "loss scale", smooth=False),
)
LOSSES = ("train_loss", "val_loss")
KEYS = (*LOSSES, *(panel.key for panel in PANELS))


@dataclass(frozen=True)
class Run:
    """A run that is drawn, and how.

    Args:
        xs: where its rows lie on the axis; nan: nowhere.
        lines: columns of the log that have something to draw, as `line` gives them.
    """

    history: History
    xs: list[float]
    lines: dict[str, tuple[list[float], list[float], list[float]]]
    colour: str
    marker: str
    dashes: str | tuple

    def skipped(self) -> list[float]:
        """Where updates were left out, or had a loss that is not finite."""
        rows = zip(self.xs, self.history["lr"], self.history["train_loss"], self.history["skipped"], strict=True)
        found, before = [], 0.0
        for x, lr, loss, skipped in rows:
            if math.isfinite(x) and (skipped > before or (math.isfinite(lr) and not math.isfinite(loss))):
                found.append(x)
            before = skipped if math.isfinite(skipped) else before
        return found


def line(history: History, xs: Sequence[float], key: str) -> tuple[list[float], list[float], list[float]] | None:
    """Iterations, places on the axis and values of a column; nan where an update gave none that is finite.

    Rows that have no place, or were never meant to have a value, are left out: a line goes on over them.
    """
    ys = history[key]
    if not any(map(math.isfinite, ys)):
        return None
    kept = [
        (i, x, y if math.isfinite(y) else math.nan)
        for i, x, y, lr in zip(history["iter"], xs, ys, history["lr"], strict=True)
        if math.isfinite(x) and (math.isfinite(y) or (key != "val_loss" and math.isfinite(lr)))
    ]
    return tuple(map(list, zip(*kept, strict=True))) if any(math.isfinite(y) for _, _, y in kept) else None


def plot_runs(histories: Sequence[History], x: str = "iter") -> Figure:
    """The picture of one run, or of several in each panel; runs and panels without anything to draw are left out.

    Args:
        x: along what, as History.along has it.

    Raises:
        UserError: none of them has anything to draw there.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    runs, label = _runs(histories, x)
    if not runs:
        raise UserError(f"{', '.join(history.name for history in histories)}: nothing in the log to draw along {x}")
    panels = [panel for panel in PANELS if any(panel.key in run.lines for run in runs)]
    losses = any(key in run.lines for run in runs for key in LOSSES)
    with _style():
        rows = math.ceil(len(panels) / 3)
        heights = [2.0] * losses + [1.0] * rows
        drawn = Figure(figsize=(INCHES, 0.7 + 1.6 * sum(heights)))
        grid = drawn.add_gridspec(len(heights), 6, height_ratios=heights)
        if losses:
            _draw_losses(_axes(drawn, grid[0, :], runs), runs)
        for row in range(rows):
            there = panels[row * len(panels) // rows : (row + 1) * len(panels) // rows]
            width = 6 // len(there)
            for n, panel in enumerate(there):
                _draw_panel(_axes(drawn, grid[losses + row, n * width : (n + 1) * width], runs), panel, runs)
        for axes in drawn.axes:
            _number(axes, whole=x != "time" or len({place for run in runs for place in run.xs}) == 1)
        drawn.supxlabel(label, fontsize="medium")
        _head(drawn, runs)
    return drawn


def render(drawn: Figure, format: str) -> bytes:
    """The content of its file: png, 1,600 pixels wide, or svg."""
    file = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font has not: boxes
        drawn.savefig(file, format=format, dpi=DPI, metadata={"Date": None} if format == "svg" else None)
    return file.getvalue()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """STYLE over matplotlib's defaults: a matplotlibrc of the user's is for pictures of his own."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _runs(histories: Sequence[History], x: str) -> tuple[list[Run], str]:
    """How each is drawn, and what the axis is called."""
    columns = [history.x_values(x) for history in histories]
    label = {"iter": "iter (updates done)", "tokens": "tokens trained on"}.get(x)
    if x == "time":
        unit, size = time_unit(max((s for column in columns for s in column if math.isfinite(s)), default=0.0))
        columns, label = [[s / size for s in column] for column in columns], f"time of the updates ({unit})"
    runs = []
    for run, xs in zip(histories, columns, strict=True):
        if lines := {key: found for key in KEYS if (found := line(run, xs, key))}:
            n = len(runs)
            runs.append(Run(run, xs, lines, COLOURS[n % 8], MARKERS[n % 8], DASHES[n % 4]))
    return runs, label


def _draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    single = len(runs) == 1
    axes.set_title("loss (nats per token)" + ": validation bold, training thin" * (not single))
    log = _scale(axes, [y for run in runs for key in LOSSES if key in run.lines for y in run.lines[key][2]], LOSS_SPAN)
    for run in runs:
        if "train_loss" in run.lines:
            iters, xs, ys = run.lines["train_loss"]
            means = smooth(iters, ys, log)
            if single:
                _draw_line(axes, xs, ys, color=run.colour, **RAW)
                _draw_line(axes, xs, means, color=run.colour, linewidth=1.4, label="training (smoothed)")
            else:
                _draw_line(axes, xs, means, color=run.colour, linewidth=0.8, alpha=0.8)
        if "val_loss" in run.lines:
            _draw_validation(axes, run, single)
    if single:
        if skipped := runs[0].skipped():
            look = {"color": "black", "markersize": 7, "linestyle": "none", "transform": axes.get_xaxis_transform()}
            skipped = skipped[:: math.ceil(len(skipped) / POINTS)]
            axes.plot(skipped, [0.03] * len(skipped), "|", label="update skipped", **look)
        axes.legend()


def _draw_validation(axes: Axes, run: Run, single: bool) -> None:
    """With each evaluation, as long as markers have room, and the best."""
    from matplotlib.patheffects import withStroke

    _, xs, ys = run.lines["val_loss"]
    colour, best = COLOURS[1] if single else run.colour, min(range(len(ys)), key=ys.__getitem__)
    every = math.ceil(len(xs) / MOST_MARKERS)
    look = {"color": colour, "linestyle": run.dashes, "linewidth": 1.8, "marker": run.marker, "markersize": 4}
    axes.plot(xs, ys, markevery=every, label="validation", **look)
    axes.plot(xs[best], ys[best], "*", color=colour, markersize=12, markeredgecolor="white", zorder=5, label="best")
    if single:
        share = (xs[best] - xs[0]) / (xs[-1] - xs[0] or 1)
        side = "left" if share < 0.1 else "right" if share > 0.9 else "center"
        place = {"xytext": (0, 8), "textcoords": "offset points", "horizontalalignment": side, "zorder": 6}
        text = axes.annotate(f"{ys[best]:.4f}", (xs[best], ys[best]), color=colour, weight="bold", **place)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """One column: of a single run as it is, faint, and smoothed; of several smoothed alone."""
    axes.set_title(panel.title)
    there = [run for run in runs if panel.key in run.lines]
    lines = [run.lines[panel.key] for run in there]
    shown = [ys if len(runs) == 1 or not panel.smooth else smooth(iters, ys) for iters, _, ys in lines]
    values = [y for ys in shown for y in ys if math.isfinite(y)]
    log = panel.log and _scale(axes, values, SPAN)
    for run, (iters, xs, ys) in zip(there, lines, strict=True):
        if panel.smooth and len(runs) == 1:
            _draw_line(axes, xs, ys, color=run.colour, **RAW)
        means = smooth(iters, ys, log) if panel.smooth else ys
        _draw_line(axes, xs, means, color=run.colour, linestyle=run.dashes, linewidth=1.4)
    if not log:
        axes.set_ylim(0, 1.08 * max(values) or 1)


def _draw_line(axes: Axes, xs: list[float], ys: list[float], **look) -> None:
    xs, ys = thin(xs, ys, log=axes.get_xscale() == "log")
    axes.plot(xs, ys, **look)
    if points := isolated_points(ys):  # a run's first row, say
        look |= {"linestyle": "none", "marker": ".", "label": None}
        axes.plot([xs[n] for n in points], [ys[n] for n in points], **look)


def _scale(axes: Axes, values: Sequence[float], span: float) -> bool:
    """Make the axis logarithmic where values span so much, and none is negative; whether it is."""
    known = [y for y in values if y > 0]
    if not known or max(known) < span * min(known) or any(y < 0 for y in values):
        return False
    axes.set_yscale("log", nonpositive="mask")
    return True


def _axes(drawn: Figure, place: SubplotSpec, runs: Sequence[Run]) -> Axes:
    """A panel with its limits along x, the same for all."""
    axes = drawn.add_subplot(place)
    places = [[x for x in run.xs if math.isfinite(x)] for run in runs]
    low, high = min(map(min, places)), max(map(max, places))
    ends = [max(xs) for xs in places if max(xs) > 0]
    if ends and max(ends) > UNLIKE * min(ends):
        axes.set_xscale("log", nonpositive="mask")
        axes.set_xlim(min(x for xs in places for x in xs if x > 0) / 1.2, high * 1.2)
    else:
        margin = 0.02 * (high - low) or 0.5
        axes.set_xlim(low - margin, high + margin)
    return axes


def _number(axes: Axes, whole: bool) -> None:
    """Few round numbers on both axes.

    Args:
        whole: none between 1 and 2 along x.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    columns = len(axes.get_subplotspec().colspan)  # of six
    for axis, most, few, kind in (
        (axes.xaxis, 2 * columns, 2 + columns, {"integer": whole, "min_n_ticks": 1}),
        (axes.yaxis, 5, 6, {}),
    ):
        (low, high), log = axis.get_view_interval(), axis.get_scale() == "log"
        ticks = log_ticks(low, high, few) if log else []
        rounded = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], **kind)
        axis.set_major_locator(FixedLocator(ticks) if ticks else rounded)
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _, largest=0 if log else high: format_tick(value, largest))


def _head(drawn: Figure, runs: Sequence[Run]) -> None:
    """The title; of several runs the legend, under one."""
    from matplotlib.lines import Line2D

    facts = [_facts(run.history) for run in runs]
    same = [values[0] for values in zip(*facts, strict=True) if values[0] and len(set(values)) == 1]
    bests = [run.history.best for run in runs]
    if len(runs) == 1:
        said = f"best validation loss {bests[0][1]:.4f} at iter {bests[0][0]:,}" if bests[0] else "no validation loss"
        drawn.suptitle(f"{', '.join(same)}\n{said}", fontsize="large")
        return
    names = shorten([run.history.name for run in runs], NAME)
    labels = [f"{name}, best {best[1]:.4f}" if best else name for name, best in zip(names, bests, strict=True)]
    columns = max(1, min(4, CHARACTERS // (max(map(len, labels)) + 12)))
    drawn.set_figheight(drawn.get_figheight() + 0.15 * math.ceil(len(runs) / columns))
    handles = [
        Line2D([], [], color=run.colour, marker=run.marker, linestyle=run.dashes, markersize=4, linewidth=1.8)
        for run in runs
    ]
    looks = {"ncols": columns, "handlelength": 3.5, "title_fontsize": "large"}
    title = ", ".join([f"{len(runs)} runs", *same])
    drawn.legend(handles, labels, loc="outside upper center", title=title, **looks)


def _facts(history: History) -> tuple[str, str, str]:
    """Recipe, size and device; empty where nobody knows."""
    recipe, count = Path(history.settings.get("config") or RECIPE), history.parameters
    # a run that goes on has its own recipe, which lies in its folder, and no name
    name = shorten([history.name if recipe.name == RECIPE else recipe.stem], NAME)[0]
    return name, f"{format_tick(float(f'{count:.3g}'))} parameters" if count else "", history.device or ""
