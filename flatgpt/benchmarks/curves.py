"""Plot the validation losses of bench.py loss by time."""

from __future__ import annotations

import io

import matplotlib.style
from matplotlib.figure import Figure

from flatgpt.runs.plots import COLORS, STYLE


def plot_losses(results: dict[str, list[dict]], title: str) -> bytes:
    """Plot the validation loss of each run by the seconds since its process started, and return the image, a PNG.

    Args:
        results: the runs of each project by its name, as returned by train_until_loss. Evaluations before the first
            update are left out.
    """
    image = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 3.2))
        axes = figure.subplots()
        for color, (name, runs) in zip(COLORS, results.items(), strict=False):
            for n, run in enumerate(runs):
                evaluated = [(seconds, loss) for seconds, i, loss in run["evaluations"] if i > 0]
                xs, ys = [seconds for seconds, _ in evaluated], [loss for _, loss in evaluated]
                label = name if n == 0 else None
                axes.plot(xs, ys, "o-", color=color, linewidth=1.4, markersize=3, label=label)
        axes.set_xlim(left=0)
        axes.set(title=title, xlabel="seconds since the process started", ylabel="validation loss (nats per token)")
        axes.legend()
        figure.savefig(image)
    return image.getvalue()
