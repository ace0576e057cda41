"""plots.py: what is read in the picture of one run and of several, and that any log is drawn."""

import itertools
import math
import random

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from flatgpt.runs import history, plots
from flatgpt.runs.history import History
from flatgpt.runs.plots import has_values, plot_runs, smooth
from flatgpt.runs.run_log import KEYS

pytestmark = pytest.mark.slow

NAN = math.nan


@pytest.fixture(autouse=True)
def coarse_pixels(monkeypatch):
    """A quarter of the resolution, which is drawn in half the time."""
    monkeypatch.setitem(plots.STYLE, "figure.dpi", 50)


FACTS = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 8, "vocab_size": 99}
LOSS, LEGEND = "loss (nats per token)", ["training (smoothed)", "validation", "best"]
SMALL = ["learning rate", "gradient norm", "time per update (ms)", "tokens/s", "peak memory (GB)"]


def run(updates: int = 400, every: int = 10, name: str = "r", facts: bool = True, **changes) -> History:
    """Return the history of a run: a row before the first update, then one every so many updates.

    Args:
        changes: a function of the iteration for a column; None leaves the column out.
    """
    functions = {
        "tokens": lambda i: 256.0 * i,
        "train_loss": lambda i: (4 + 6 * math.exp(-i / 60) + 0.1 * math.sin(i)) if i else NAN,
        "val_loss": lambda i: 4.2 + 6 * math.exp(-i / 60) if i % 100 == 0 else NAN,
        "lr": lambda i: 1e-3 * min(1, i / 100) if i else NAN,
        "grad_norm": lambda i: 1 + 0.3 * math.sin(i) if i else NAN,
        "step_ms": lambda i: 6000.0 if i > every else NAN,
        "tok_per_s": lambda i: 5000.0 - i % 7 if i > every else NAN,
        "peak_mem_gb": lambda i: 1.5 if i else NAN,
        **changes,
    }
    iters = range(0, updates + 1, every)
    columns = {"iter": [float(i) for i in iters]} | {key: [f(i) for i in iters] for key, f in functions.items() if f}
    return History(name, columns, {"device": "Abacus"} if facts else {}, FACTS if facts else {})


@pytest.fixture
def drawn(monkeypatch):
    """drawn(run, ..., x="iter") -> the figure of the picture. Its parts neither overlap nor lie outside."""

    def draw(*runs: History, x: str = "iter") -> Figure:
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, *words, **settings: figures.append(figure))
            plot_runs(runs, x)
        (figure,) = figures
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        parts = [*figure.axes, *figure.legends, *filter(None, (figure._suptitle, figure._supxlabel))]
        boxes = [part.get_tightbbox(renderer) for part in parts]
        assert not any(one.padded(-1).overlaps(other.padded(-1)) for one, other in itertools.combinations(boxes, 2))
        assert all(figure.bbox.padded(1).containsx(x) for box in boxes for x in (box.x0, box.x1))
        for axes in figure.axes:
            ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            ticks = [text.get_window_extent(renderer) for at, text in ticks if axes.viewLim.containsx(at)]
            assert all(one.x1 + 10 < other.x0 for one, other in itertools.pairwise(ticks)), "room between the numbers"
        return figure

    return draw


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title("left") for axes in figure.axes]


def lines(figure: Figure, panel: str) -> list:
    return next(axes for axes in figure.axes if axes.get_title("left").startswith(panel)).lines


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn


def test_one_run(drawn):
    history = run()
    figure = drawn(history)
    assert titles(figure) == [LOSS, *SMALL]
    title = "r, best 4.2076 at iter 400, 102K tokens, 40m00s\n28,896 parameters, Abacus"
    assert {*LEGEND, "iter (updates done)", title} <= {*texts(figure)}
    raw, smoothed, validation, star = lines(figure, LOSS)
    assert list(raw.get_ydata()) == history["train_loss"][1:]
    assert raw.get_color() == smoothed.get_color() != validation.get_color()
    assert list(validation.get_xdata()) == [0, 100, 200, 300, 400]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([400], [history.best[1]])
    (rate,) = lines(figure, "learning rate")
    assert list(rate.get_ydata()) == history["lr"][1:]


def test_several_runs(drawn):
    """Names are cut in the middle, and dollar signs are no mathematics."""
    runs = [run(name="a" * 20 + "b" * 20), run(800, name="b"), run(600, name="_c$x$", val_loss=None)]
    figure = drawn(*runs)
    (legend,) = figure.legends
    labels = [f"{'a' * 13}…{'b' * 16}, best 4.2076 at iter 400, 102K tokens, 40m00s"]
    labels += ["b, best 4.2000 at iter 800, 205K tokens, 1h20m", "_c$x$, 154K tokens, 1h00m"]
    assert [text.get_text() for text in legend.get_texts()] == labels
    colours = [handle.get_color() for handle in legend.legend_handles]
    assert [line.get_color() for line in lines(figure, "learning rate")] == colours
    assert len(set(colours)) == 3
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.viewLim.containsx(0)) == ("linear", True)
    figure = drawn(*(run(name=f"{n} " + "x" * 250) for n in range(9)))
    assert len({(line.get_color(), line.get_linestyle()) for line in lines(figure, "learning rate")}) == 9


def test_losses_of_different_tokenizers_are_bits_per_byte_or_said_to_differ(drawn):
    def trained_with(tokenizer: str | None, bytes_per_token: int | None) -> History:
        made = run()
        if tokenizer:
            made.state["tokenizer"] = {"name": tokenizer, "ranks_sha256": f"hash of {tokenizer}"}
        if bytes_per_token:
            size = {"train": bytes_per_token, "val": 2 * bytes_per_token}
            made.state["data"] = {"tokens": {"train": 1, "val": 1}, "bytes": size}
        return made

    figure = drawn(trained_with("byte", 1), trained_with("gpt2", 4))
    assert titles(figure)[0].startswith("loss (bits per byte): ")
    validation, training = (next(x for x in lines(figure, "loss") if len(x.get_xdata()) == n) for n in (5, 40))
    assert validation.get_ydata()[-1] == pytest.approx(4.2076 / math.log(2) / 2, abs=1e-4)
    assert training.get_ydata()[0] == pytest.approx(run()["train_loss"][1] / math.log(2), rel=0.01)
    assert figure.legends[0].get_texts()[1].get_text().startswith("r, best 0.7588 at iter 400")
    unknown = drawn(trained_with("byte", 1), trained_with("gpt2", None))
    assert titles(unknown)[0].startswith("loss (nats per token of different tokenizers, which cannot be compared)")
    for other in (trained_with("byte", None), trained_with(None, None)):
        assert titles(drawn(trained_with("byte", 1), other))[0].startswith(f"{LOSS}: ")


def test_new_model_is_not_the_best(drawn):
    early = run(50, val_loss=lambda i: 5.5 if i == 0 else NAN)
    assert "*" not in [line.get_marker() for line in lines(drawn(early), LOSS)]


@pytest.mark.parametrize(("x", "label", "end"), [("tokens", "tokens trained on", 102_400), ("time", "(min)", 40)])
def test_other_x_axes(drawn, x, label, end):
    drawn(run(600_000, every=1000), run(19_073, every=100), x=x)
    figure = drawn(run(), x=x)
    assert figure.get_supxlabel().endswith(label)
    assert lines(figure, LOSS)[2].get_xdata()[-1] == pytest.approx(end)


def test_only_panels_with_values_are_drawn(drawn):
    small = "lr", "grad_norm", "peak_mem_gb", "step_ms", "tok_per_s"
    assert titles(drawn(run(**dict.fromkeys(small), facts=False))) == [LOSS]
    assert titles(drawn(run(train_loss=None, val_loss=None))) == SMALL


def test_values_that_are_not_finite_are_gaps_and_rows_of_an_evaluation_are_none(drawn):
    history = run(grad_norm=lambda i: math.inf if 100 <= i < 200 else 1.0)
    for key in ("train_loss", "lr", "grad_norm"):
        history.columns[key][30] = NAN
    figure = drawn(history)
    for line in lines(figure, "gradient norm"):
        assert [x for x, y in zip(*line.get_data(), strict=True) if math.isnan(y)] == list(range(100, 200, 10))
    assert not np.isnan(lines(figure, LOSS)[0].get_ydata()).any()


@pytest.mark.parametrize(
    ("changes", "logarithmic", "numbers"),
    [
        ({"train_loss": lambda i: 10.8 * math.exp(-i / 250), "val_loss": None}, [LOSS], ["3", "5"]),
        ({"grad_norm": lambda i: 80.0 if i == 200 else 1.0}, ["gradient norm"], ["1", "10"]),
        ({"step_ms": lambda i: 3000.0 if i == 200 else 200.0}, ["time per update (ms)"], ["500", "1,000"]),
        ({"lr": lambda i: 1e-6 * (i + 1), "grad_norm": lambda i: 300.0 - i}, [], ["0.0002"]),
    ],
)
def test_axes_are_logarithmic_where_values_span_much(drawn, changes, logarithmic, numbers):
    figure = drawn(run(**changes))
    assert [axes.get_title("left") for axes in figure.axes if axes.get_yscale() == "log"] == logarithmic
    assert {*numbers} <= {*texts(figure)}


HEADER = ",".join(KEYS[:13]) + "\n"  # of earlier versions
ROWS = "10,2560,0.1,4.5,,0.0001,2.5,,0,,,,0.4\n20,5120,0.2,4.1,4.2,0.0002,2.1,,0,50,5120,,0.4\n"


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "0,0,0,,5.5,,,,,,,,\n",
        HEADER + ROWS + "30,7680,0.3,nan,nan,0.0003,inf,65536,3,,,,\n" + "40,7680,0.3,4.0",
        HEADER + "10,,,nan,,,,,,9,,,\n20,,,1,,,,,,9,,,\n",
        "iter,lr\n0,0\n",
        HEADER + "0,,,0,0,0,0,0,0,0,0,0,0\n",
        HEADER + "0,,,1e38,1e-38,1e38,1e38,,,1e38,1e38,,1e38\n10,,,1,1,1,1,,,1,1,,1\n",
        HEADER + ROWS + ROWS,
        HEADER + ROWS + "30,inf,0.3,4,4,0.0003,2,,0,inf,5120,,0.4\n",
        HEADER + "10,2560,,4,4,,,,,9,,,\n20,inf,,4,4,,,,,inf,,,\n",
    ],
)
def test_unusual_logs_are_drawn(tmp_path, text):
    """Also beside a damaged state.json."""
    (tmp_path / "metrics.csv").write_text(text)
    (tmp_path / "state.json").write_text('{"device": 7, "tokenizer": 7, "data": [7], "parameters": "7"}')
    read = history.read(tmp_path)
    for x in ("iter", "time", *(["tokens"] if "256" in text else [])):
        assert has_values(read, x)
        assert plot_runs([read], x).startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# files, curves and numbers


def test_long_log_makes_no_large_file():
    draws = random.Random(0)
    noisy = {key: lambda i: 5 + draws.gauss(0, 1) for key in ("train_loss", "grad_norm", "step_ms", "tok_per_s")}
    long = run(20_000, every=1, **noisy)
    assert len(plot_runs([long], format="svg")) < 1_000_000
    assert len(plot_runs([long])) < 500_000


def test_users_style_and_missing_letters_do_not_matter(recwarn):
    before, shown = dict(matplotlib.rcParams), run(name="日本 <$x^2$>", facts=False)
    expected = plot_runs([shown])
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"axes.facecolor": "black", "savefig.bbox": "tight", "savefig.transparent": True}):
        assert plot_runs([shown]) == expected
    assert "日本 &lt;$x^2$&gt;, best" in plot_runs([shown], format="svg").decode(), "text stays text"
    assert not list(recwarn)


def test_smoothing_removes_noise_does_not_lag_and_keeps_gaps():
    noisy = 5 + np.random.default_rng(0).normal(size=2000)
    assert abs(smooth(noisy)[200:] - 5).max() < 0.5
    falling = 4 + 6.8 * np.exp(-np.arange(400) / 10)
    assert smooth(falling) == pytest.approx(falling, abs=0.4)
    step = smooth(np.repeat([0.0, 1.0], 500))
    assert step[490] == pytest.approx(1 - step[509], abs=0.02)
    ys = np.full(100, 2.0)
    ys[40:50] = NAN
    assert smooth(ys) == pytest.approx(ys, nan_ok=True)
    spike = np.ones(200)
    spike[100] = 1e4
    assert smooth(spike, log=True).max() < 20 < 500 < smooth(spike).max()
    assert len(smooth(np.array([]))) == 0
