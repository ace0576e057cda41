"""plots.py: what is drawn of one run and of several, read from matplotlib's figure, and the files."""

import dataclasses
import io
import itertools
import math
import random

import matplotlib
import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from config import UserError
from flatgpt.runs.history import History
from flatgpt.runs.plots import COLOURS, format_tick, log_ticks, plot_runs, render, shorten, smooth
from flatgpt.runs.run_log import KEYS

NAN = math.nan
FACTS = {"config": "configs/small.toml", "n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 8, "vocab_size": 99}
SMALL = ["learning rate", "gradient norm", "time per update (ms)", "tokens/s", "peak memory (GB)"]
LOSS = "loss (nats per token)"


def run(updates: int = 400, every: int = 10, name: str = "r", facts: bool = True, evaluate: int = 100, **changes):
    """Return the history of a run: a row before the first update, then one every so many updates.

    Args:
        changes: a function of the iteration for a column; None leaves the column empty.
    """
    functions = {
        "tokens": lambda i: 256.0 * i,
        "train_loss": lambda i: (4 + 6 * math.exp(-i / 60) + 0.1 * math.sin(i)) if i else NAN,
        "val_loss": lambda i: 4.2 + 6 * math.exp(-i / 60) if i % evaluate == 0 else NAN,
        "lr": lambda i: 1e-3 * min(1, i / 100) if i else NAN,
        "grad_norm": lambda i: 1 + 0.3 * math.sin(i) if i else NAN,
        "skipped": lambda i: 0.0,
        "step_ms": lambda i: 50 + i % 7 if i > every else NAN,
        "tok_per_s": lambda i: 5000.0 - i % 7 if i > every else NAN,
        "peak_mem_gb": lambda i: 1.5 if i else NAN,
        **changes,
    }
    iters = list(range(0, updates + 1, every))
    columns = {"iter": [float(i) for i in iters]} | {key: [f(i) for i in iters] for key, f in functions.items() if f}
    assert set(columns) <= set(KEYS)
    state = {"device": "cpu", "cpu": "Abacus", "ranks": 1} if facts else {}
    return History(name, columns, state, dict(FACTS) if facts else {})


def titles(figure) -> list[str]:
    return [axes.get_title("left") for axes in figure.axes]


def panel(figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title("left").startswith(title))


def labelled(axes, label: str):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


def legend_texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def tick_labels(axis) -> list:
    low, high = sorted(axis.get_view_interval())
    shown = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [text for value, text in shown if low <= value <= high and text.get_text()]


def assert_readable(figure) -> None:
    """Nothing overlaps or lies outside, each axis has numbers, and text has 9 pixels in a picture 800 pixels wide."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    legends = [legend for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)) if legend]
    heads = [text for text in (figure._suptitle, figure._supxlabel, *figure.legends) if text]
    boxes = [part.get_window_extent(renderer) for part in heads]
    boxes += [axes.get_tightbbox(renderer) for axes in figure.axes]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))  # half a pixel of rounding, and the width of a line
    numbers = [tick_labels(axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    for texts in numbers:
        assert texts
        assert len({text.get_text() for text in texts}) == len(texts)
        extents = [text.get_window_extent(renderer) for text in texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(extents, 2))
    texts = [text for texts in numbers for text in texts] + [axes._left_title for axes in figure.axes]
    texts += [text for legend in legends for text in legend.get_texts()]
    assert all(text.get_fontsize() / 72 * 800 / figure.get_figwidth() >= 9 for text in texts)
    for box in boxes + [text.get_window_extent(renderer) for text in texts if text.get_text()]:
        assert min(box.x0, box.y0) >= -1
        assert box.x1 <= figure.bbox.x1 + 1
        assert box.y1 <= figure.bbox.y1 + 1


# ---------------------------------------------------------------------------------------------------------------------
# one run


def test_one_run():
    figure = plot_runs([run()])
    assert titles(figure) == [LOSS, *SMALL]
    best = 4.2 + 6 * math.exp(-400 / 60)
    title = f"small, 28,900 parameters, Abacus\nbest validation loss {best:.4f} at iter 400"
    assert (figure.get_suptitle(), figure.get_supxlabel()) == (title, "iter (updates done)")
    loss = figure.axes[0]
    assert legend_texts(loss.get_legend()) == ["training (smoothed)", "validation", "best"]
    validation, star = labelled(loss, "validation"), labelled(loss, "best")
    assert (list(validation.get_xdata()), validation.get_marker()) == ([0, 100, 200, 300, 400], "o")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([400], [best])
    (raw,) = [line for line in loss.lines if line.get_alpha()]
    assert list(raw.get_ydata()) == run()["train_loss"][1:]
    assert raw.get_color() == labelled(loss, "training (smoothed)").get_color() != validation.get_color()
    (rate,) = panel(figure, "learning rate").lines
    assert list(rate.get_ydata()) == run()["lr"][1:]
    assert_readable(figure)


@pytest.mark.parametrize(
    ("history", "title"),
    [
        (run(facts=False, val_loss=None, name="folder"), "folder\nno validation loss"),
        # resumed with --config out/small/config.toml: that name says nothing
        (
            dataclasses.replace(run(name="small"), settings=FACTS | {"config": "out/small/config.toml"}),
            "small, 28,900 par",
        ),
    ],
)
def test_title_has_the_known_facts(history, title):
    assert plot_runs([history]).get_suptitle().startswith(title)


@pytest.mark.parametrize(
    ("empty", "shown"),
    [
        (["peak_mem_gb"], [LOSS, *SMALL[:4]]),
        (["peak_mem_gb", "step_ms", "tok_per_s"], [LOSS, *SMALL[:2]]),
        (["lr", "grad_norm", "peak_mem_gb", "step_ms", "tok_per_s"], [LOSS]),
        (["train_loss", "val_loss"], SMALL),
    ],
)
def test_only_panels_with_values_are_drawn_and_they_fill_their_rows(empty, shown):
    figure = plot_runs([run(**dict.fromkeys(empty), mfu=lambda i: NAN)])
    assert titles(figure) == shown
    spans = [axes.get_subplotspec() for axes in figure.axes]
    cells = sorted((row, column) for span in spans for row in span.rowspan for column in span.colspan)
    columns = max(column for _, column in cells) + 1
    assert cells == [(row, column) for row in sorted({row for row, _ in cells}) for column in range(columns)]
    assert_readable(figure)


@pytest.mark.parametrize(
    ("history", "x"),
    [(History("r", {}, {}, {}), "iter"), (run(tokens=None), "tokens"), (History("r", {"iter": [0.0]}, {}, {}), "time")],
)
def test_nothing_to_draw_is_an_error(history, x):
    with pytest.raises(UserError, match=f"r: nothing in the log to draw along {x}"):
        plot_runs([history], x)


@pytest.mark.parametrize("x", ["iter", "tokens", "time"])
@pytest.mark.parametrize("updates", [0, 10])
def test_one_row_is_drawn_as_a_point(updates, x):
    figure = plot_runs([run(updates)], x)
    assert list(labelled(figure.axes[0], "best").get_xdata()) == [0]
    assert len(figure.axes) == (4 if updates and x != "time" else 1)
    for axes in figure.axes[1:]:
        assert [len(line.get_xdata()) for line in axes.lines if line.get_marker() == "."][:1] == [1]
    assert_readable(figure)


def test_values_that_are_not_finite_are_gaps():
    changes = {"grad_norm": lambda i: math.inf if 100 <= i < 200 else 1.0}
    figure = plot_runs([run(**changes, train_loss=lambda i: NAN if i == 300 else 4.0)])
    norm = panel(figure, "gradient norm")
    for line in norm.lines:
        assert [x for x, y in zip(*line.get_data(), strict=True) if math.isnan(y)] == list(range(100, 200, 10))
    assert norm.get_ylim() == (0, pytest.approx(1.08))
    assert list(labelled(figure.axes[0], "update skipped").get_xdata()) == [300]
    figure = plot_runs([run(grad_norm=lambda i: 2.0 if i in (50, 300, 310) else NAN)])
    points = [line for line in panel(figure, "gradient norm").lines if line.get_marker() == "."]
    assert [list(line.get_xdata()) for line in points] == [[50], [50]]


def test_rows_of_an_evaluation_only_do_not_cut_the_lines():
    history = run()
    for key in ("train_loss", "lr", "grad_norm"):
        history.columns[key][20] = NAN
    for axes in plot_runs([history]).axes[:3]:
        assert not any(math.isnan(y) for line in axes.lines for y in line.get_ydata())


def test_skipped_updates_are_marked_where_the_count_rises():
    skipped = {0: 0, 10: 3, 20: 3, 30: NAN, 40: 3}
    figure = plot_runs([run(skipped=lambda i: skipped.get(i, 5.0), loss_scale=lambda i: 2.0 ** (16 - i // 40))])
    assert list(labelled(figure.axes[0], "update skipped").get_xdata()) == [10, 50]
    assert "1,000" in [text.get_text() for text in tick_labels(panel(figure, "loss scale").yaxis)]
    assert_readable(figure)


@pytest.mark.parametrize(
    ("changes", "logarithmic"),
    [
        ({"train_loss": lambda i: 10.8 * math.exp(-i / 45), "val_loss": None}, [LOSS]),
        ({"grad_norm": lambda i: 300.0 if i == 200 else 1.0}, ["gradient norm"]),
        ({"step_ms": lambda i: 3000.0 if i == 200 else 50.0}, ["time per update (ms)"]),
        ({"lr": lambda i: 1e-6 * (i + 1)}, []),
        ({"tok_per_s": lambda i: 0.0}, []),
        ({"train_loss": lambda i: 0.0 if i > 300 else 3.0 + i, "val_loss": None}, [LOSS]),
        ({"train_loss": lambda i: 300.0 - i, "val_loss": None}, []),
    ],
)
def test_axes_are_logarithmic_where_values_span_much(changes, logarithmic):
    figure = plot_runs([run(**changes)])
    assert [axes.get_title("left") for axes in figure.axes if axes.get_yscale() == "log"] == logarithmic
    assert all(axes.get_yscale() == "log" or axes.get_ylim()[0] == 0 for axes in figure.axes[1:])
    assert "$" not in " ".join(text.get_text() for axes in figure.axes for text in tick_labels(axes.yaxis))
    assert_readable(figure)


@pytest.mark.parametrize(
    ("x", "label", "end"),
    [("tokens", "tokens trained on", 102_400), ("time", "time of the updates (min)", pytest.approx(40))],
)
def test_other_x_axes(x, label, end):
    figure = plot_runs([run(evaluate=400, step_ms=lambda i: 6000.0)], x)
    assert figure.get_supxlabel() == label
    assert list(labelled(figure.axes[0], "validation").get_xdata()) == [0, end]
    assert_readable(figure)


# ---------------------------------------------------------------------------------------------------------------------
# several runs


def test_several_runs():
    histories = [run(name="a"), run(800, name="b"), run(600, name="_c$x$", val_loss=None)]
    figure = plot_runs(histories)
    (legend,) = figure.legends
    assert legend_texts(legend) == [*(f"{h.name}, best {h.best[1]:.4f}" for h in histories[:2]), "_c$x$"]
    assert legend.get_title().get_text() == "3 runs, small, 28,900 parameters, Abacus"
    colours = [handle.get_color() for handle in legend.legend_handles]
    assert colours == list(COLOURS[:3])
    for history, colour in zip(histories, colours, strict=True):
        lines = [line for line in figure.axes[0].lines if line.get_color() == colour]
        thin = min(lines, key=lambda line: line.get_linewidth())
        assert thin.get_xdata()[-1] == history["iter"][-1]
        bold = [line.get_linewidth() for line in lines if line.get_label() == "validation"]
        assert bold == [pytest.approx(1.8)] * bool(history.best)
    assert len({handle.get_marker() for handle in legend.legend_handles}) == 3
    assert len({str(handle._unscaled_dash_pattern) for handle in legend.legend_handles}) == 3
    assert [line.get_color() for line in panel(figure, "learning rate").lines] == colours
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert_readable(figure)


def test_title_has_what_the_runs_share():
    other = run(name="b")
    other.settings.update(n_layer=4, config=None)
    (legend,) = plot_runs([run(name="a"), other]).legends
    assert legend.get_title().get_text() == "2 runs, Abacus"


def test_many_runs_with_long_names():
    names = [f"a_sweep_of_learning_rates_and_weight_decays_lr_{n}e-4_decay_0.{n}_seed_{n}_of_many" for n in range(9)]
    figure = plot_runs([run(name=name) for name in names])
    (legend,) = figure.legends
    assert [text[:7] for text in legend_texts(legend)] == [f"…lr_{n}e-" for n in range(9)]
    assert_readable(figure)
    assert_readable(plot_runs([run(name="x" * 255), run(name="y" * 255)]))
    assert_readable(plot_runs([run(facts=False, name="x" * 255)]))


def test_run_without_x_values_is_left_out():
    figure = plot_runs([run(name="a"), run(name="b", tokens=None), run(name="c")], "tokens")
    assert [text[0] for text in legend_texts(figure.legends[0])] == ["a", "c"]


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_png():
    content = render(plot_runs([run()]), "png")
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) < 300_000
    image = matplotlib.image.imread(io.BytesIO(content))
    assert image.shape[1] == 1600
    assert (image[0, 0, :3] == 1).all()


def test_svg_has_its_text_and_is_the_same_each_time():
    content = render(plot_runs([run()]), "svg")
    assert content == render(plot_runs([run()]), "svg")
    assert b">gradient norm</text>" in content
    for name, text in (("a<b>&", b"a&lt;b&gt;&amp;"), ("_c$x^2$", b">_c$x^2$<")):
        assert text in render(plot_runs([run(facts=False, name=name)]), "svg").replace(b"\n", b"<")


def test_long_log_makes_no_large_file():
    draws = random.Random(0)
    noisy = {key: lambda i: 5 + draws.gauss(0, 1) for key in ("train_loss", "grad_norm", "step_ms", "tok_per_s")}
    figure = plot_runs([run(20_000, every=1, **noisy)])
    assert len(render(figure, "svg")) < 1_000_000
    assert len(render(figure, "png")) < 500_000


def test_letters_that_the_font_does_not_have_are_no_warning(recwarn):
    render(plot_runs([run(name="日本", facts=False)]), "png")
    assert not list(recwarn)


def test_users_style_and_this_one_do_not_mix():
    before = dict(matplotlib.rcParams)
    expected = render(plot_runs([run()]), "png")
    assert dict(matplotlib.rcParams) == before
    users = {"lines.marker": "o", "axes.facecolor": "black", "savefig.bbox": "tight", "savefig.transparent": True}
    with matplotlib.rc_context(users):
        assert render(plot_runs([run()]), "png") == expected


# ---------------------------------------------------------------------------------------------------------------------
# curves, numbers and names


def test_smoothing_removes_noise_and_does_not_lag():
    iters = [*range(0, 1000, 10), *range(1000, 2000, 100)]
    for log in (False, True):
        assert smooth(iters, [3.0] * len(iters), log) == pytest.approx([3.0] * len(iters), abs=1e-12)
    assert (smooth([7], [2.0]), smooth([], [])) == ([2.0], [])
    draws = random.Random(0)
    means = smooth(list(range(0, 20_000, 10)), [5 + draws.gauss(0, 1) for _ in range(2000)])[200:]
    assert max(abs(y - 5) for y in means) < 0.5
    iters = list(range(10, 4010, 10))
    losses = [4 + 6.8 * math.exp(-i / 100) for i in iters]
    assert smooth(iters, losses) == pytest.approx(losses, abs=0.12)
    step = smooth(range(0, 10_010, 10), [0.0] * 500 + [1.0] * 501)
    assert step[490] == pytest.approx(1 - step[510], abs=0.02)  # both sides are weighted alike


def test_smoothing_weights_rows_by_their_distance_in_iterations():
    iters = [*range(0, 5000, 100), 5001, 5002, 5003, *range(5100, 10_001, 100)]
    means = dict(zip(iters, smooth(iters, [9.0 if 5000 < i < 5004 else 1.0 for i in iters]), strict=True))
    assert means[5002] > 4.5
    assert means[4000] < 1.1


def test_smoothing_ignores_gaps_and_narrows_spikes_on_logarithmic_axes():
    ys = [2.0] * 100
    ys[40:50], ys[70] = [NAN] * 10, math.inf
    means = smooth(range(0, 1000, 10), ys)
    assert [n for n, mean in enumerate(means) if math.isnan(mean)] == [*range(40, 50), 70]
    assert [mean for mean in means if mean == mean] == pytest.approx([2.0] * 89)
    ys = [1.0] * 200
    ys[100] = 1e4
    assert max(smooth(range(200), ys, log=True)) < 20 < 500 < max(smooth(range(200), ys))
    assert math.isnan(smooth(range(3), [1.0, 0.0, 1.0], log=True)[1])


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        *((0, 0, "0"), (2000, 0, "2,000"), (12.5, 20, "12.5"), (1234.5, 2000, "1,234.5"), (0.1 + 0.2, 1, "0.3")),
        *((0.0006, 0.001, "0.0006"), (3e-5, 1e-4, "3e-5"), (2.5e-5, 1e-4, "2.5e-5"), (1.5e6, 0, "1.5M")),
        *((500_000, 2e6, "0.5M"), (500_000, 0, "500,000"), (1e8, 0, "100M"), (3e11, 0, "300B"), (5e12, 0, "5T")),
        *((1e20, 0, "1e20"), (-2, 5, "-2")),
    ],
)
def test_numbers_on_axes(value, largest, text):
    assert format_tick(value, largest) == text


@pytest.mark.parametrize("most", [4, 6, 8])
def test_ticks_of_logarithmic_axes(most):
    for low, ratio in itertools.product((3e-5, 0.4, 1.0, 77.0, 2.2e6), (1.2, 5, 11, 60, 1e3, 1e5, 1e9, 1e30)):
        ticks = log_ticks(low, low * ratio, most)
        assert ticks == sorted(set(ticks))
        assert all(low <= tick <= low * ratio for tick in ticks)
        assert 3 <= len(ticks) <= most or (ratio <= 5 and not ticks)
    assert log_ticks(0.9, 11, 6) == [1, 2, 5, 10]
    assert log_ticks(0.75, 6, 6) == [1, 1.5, 2, 3, 4, 5]


def test_long_names_are_shortened_and_stay_different():
    assert shorten(["a", "b"], 5) == ["a", "b"]
    long = [f"tinystories_sweep_lr_{n}e-4_wd_0.1" for n in (1, 2)]
    assert shorten(long, 20) == ["…lr_1e-4_wd_0.1", "…lr_2e-4_wd_0.1"]
    assert shorten(["x" * 30 + "y" * 30], 11) == ["xxxxx…yyyyy"]
    assert shorten(["run", "a_much_longer_name_of_a_run"], 12) == ["run", "a_much…a_run"]
    for start in ("q" * 99, "a_" * 40 + "x" * 60):
        short = shorten([start + "1", start + "2"], 21)
        assert max(map(len, short)) <= 21
        assert len(set(short)) == 2
