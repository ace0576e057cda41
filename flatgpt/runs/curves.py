"""A log's columns as lines on paper, numbers and names as a picture can show them. Standard library only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

# A value weighs exp(-distance) in the mean at another; a distance of 1 is this share of the run's updates, near its
# beginning, where losses fall fast, NEAR of the way from there.
SMOOTHING, NEAR = 0.015, 0.1
POINTS = 2000  # of a line; more than that nobody sees


def smooth(iters: Sequence[float], values: Sequence[float], log: bool = False) -> list[float]:
    """Exponentially weighted means over the neighbours on both sides, so that the line is not late; nan stays nan.

    Weights are by distance in iterations, and divided by their sum over finite values (what Adam calls bias
    correction): neither the ends of a run nor gaps in it pull the line.

    Args:
        log: of the logarithms: one spike is no tent on a logarithmic axis.
    """
    if not values:
        return []
    span = SMOOTHING * (iters[-1] - iters[0])
    decays = [0.0]  # of the weights from one row to the next
    for before, i in itertools.pairwise(iters):
        width = min(span, NEAR * ((before + i) / 2 - iters[0]))
        decays.append(math.exp(-abs(i - before) / width) if width > 0 else 0.0)
    known = [math.isfinite(y) and (y > 0 or not log) for y in values]
    terms = [(math.log(y) if log else y) if k else 0.0 for y, k in zip(values, known, strict=True)]
    sums, weights = [0.0] * len(terms), [0.0] * len(terms)
    for rows, steps in ((range(len(terms)), decays), (range(len(terms) - 1, -1, -1), [*decays[1:], 0.0])):
        total = weight = 0.0
        for n in rows:
            total, weight = total * steps[n], weight * steps[n]
            sums[n], weights[n] = sums[n] + total, weights[n] + weight  # so far without the row itself
            total, weight = total + terms[n], weight + known[n]
    means = [(s + y) / (w + 1) if k else math.nan for s, y, w, k in zip(sums, terms, weights, known, strict=True)]
    return [math.exp(mean) for mean in means] if log else means


def thin(xs: Sequence[float], ys: Sequence[float], log: bool = False) -> tuple[list[float], list[float]]:
    """About POINTS points that look the same: of each stretch of x the lowest and the highest; of all nan one, a gap.

    Args:
        log: x is on a logarithmic axis; what it does not show, 0 and below, is left out.
    """
    rows = [n for n in range(len(xs)) if xs[n] > 0 or not log]
    if len(rows) > POINTS:
        places = [math.log(xs[n]) if log else xs[n] for n in rows]
        width = 2 * (max(places) - min(places)) / POINTS or 1.0
        stretches: dict[int, list[int]] = {}
        for n, place in zip(rows, places, strict=True):
            stretches.setdefault(int((place - places[0]) / width), []).append(n)
        rows = []
        for stretch in stretches.values():
            known = [n for n in stretch if math.isfinite(ys[n])] or stretch[:1]
            rows += sorted({min(known, key=ys.__getitem__), max(known, key=ys.__getitem__)})
    return [xs[n] for n in rows], [ys[n] for n in rows]


def isolated_points(ys: Sequence[float]) -> list[int]:
    """Points between gaps, which no line shows."""
    known = [False, *map(math.isfinite, ys), False]
    return [n for n in range(len(ys)) if known[n + 1] and not known[n] and not known[n + 2]]


def format_tick(value: float, largest: float = 0.0) -> str:
    """A number on an axis: 0.0003, 1.5, 2,000, 1.5M; in the unit of the axis's largest, where that is given."""
    size = max(abs(value), abs(largest))
    unit, by = next(((unit, by) for unit, by in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if size >= by), ("", 1.0))
    if value == 0:
        return "0"
    if size >= 1e15 or abs(value) < 1e-4:
        return f"{value:.3g}".replace("e+", "e").replace("e-0", "e-")
    return f"{value / by:.6g}{unit}" if unit or abs(value) < 1000 else f"{value:,.6g}" if value % 1 else f"{value:,.0f}"


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Three or more round numbers on a logarithmic axis; none where it is too short for that."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) <= most:
            break
    return ticks[:: math.ceil(len(ticks) / most)] if len(ticks) >= 3 else []


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which an axis of that length reads well, and its seconds."""
    units = (("s", 1, 180), ("min", 60, 3 * 3600), ("h", 3600, 4 * 86400), ("days", 86400, math.inf))
    return next((name, size) for name, size, below in units if seconds < below)


def shorten(names: Sequence[str], most: int) -> list[str]:
    """Names of at most so many characters: without the words that all begin with, then without their middle."""
    if max(map(len, names)) > most and len(names) > 1:
        alike = [len(set(letters)) == 1 for letters in zip(*names, strict=False)]
        shared = names[0][: [*alike, False].index(False)]
        start = 1 + max(shared[:-1].rfind(separator) for separator in "_-./ ")
        names = ["…" + name[start:] if start > 1 else name for name in names]
    tail = (most - 1) // 2
    return [name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[-tail:]}" for name in names]
