"""chart.py: what is on the picture of a run and of several, read off matplotlib's own figure, and its files."""

import dataclasses
import io
import itertools
import math

import matplotlib
import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from config import UserError
from flatgpt.runs.history import History
from flatgpt.runs.plots import COLOURS, plot_runs, render
from flatgpt.runs.run_log import KEYS

NAN = math.nan
FACTS = {"config": "configs/small.toml", "n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 8, "vocab_size": 99}
SMALL = ("learning rate", "gradient norm", "time per update (ms)", "tokens/s", "peak memory (GB)")


def run(updates: int = 400, every: int = 10, name: str = "r", facts: bool = True, evaluate: int = 100, **changes):
    """A run as train.py logs it: a row before the first update, then one every so many.

    Args:
        changes: a function of the iteration for a column; None: the column stays empty.
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
    columns = {"iter": [float(i) for i in iters]}
    columns |= {key: [f(i) for i in iters] for key, f in functions.items() if f}
    state = {"device": "cpu", "cpu": "Abacus", "ranks": 1} if facts else {}
    assert set(columns) <= set(KEYS)
    return History(name, columns, state, dict(FACTS) if facts else {})


def titles(drawn) -> list[str]:
    return [axes.get_title("left") for axes in drawn.axes]


def panel(drawn, title: str):
    return next(axes for axes in drawn.axes if axes.get_title("left").startswith(title))


def lines(axes, label: str | None = None) -> list:
    return [line for line in axes.lines if label is None or line.get_label() == label]


def words(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def labels(axis) -> list:
    low, high = sorted(axis.get_view_interval())
    shown = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [text for place, text in shown if low <= place <= high and text.get_text()]


def assert_readable(drawn) -> None:
    """Nothing lies on something else or outside; each axis has numbers; letters have 9 pixels at 800 in all."""
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    renderer = canvas.get_renderer()
    legends = [legend for legend in (*drawn.legends, *(axes.get_legend() for axes in drawn.axes)) if legend]
    heads = [text for text in (drawn._suptitle, drawn._supxlabel, *drawn.legends) if text]
    boxes = [part.get_window_extent(renderer) for part in heads]
    boxes += [axes.get_tightbbox(renderer) for axes in drawn.axes]
    for one, other in itertools.combinations(boxes, 2):
        # the axes' boxes have half a pixel of rounding and the width of a line
        assert not one.padded(-1).overlaps(other.padded(-1))
    numbers = [labels(axis) for axes in drawn.axes for axis in (axes.xaxis, axes.yaxis)]
    for texts in numbers:
        assert texts
        assert len({text.get_text() for text in texts}) == len(texts)
        extents = [text.get_window_extent(renderer) for text in texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(extents, 2))
    letters = [text for texts in numbers for text in texts] + [axes.title for axes in drawn.axes]
    letters += [axes._left_title for axes in drawn.axes]
    letters += [text for legend in legends for text in legend.get_texts()]
    for text in letters:
        assert text.get_fontsize() / 72 * 800 / drawn.get_figwidth() >= 9
    for box in boxes + [text.get_window_extent(renderer) for text in letters if text.get_text()]:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= drawn.bbox.x1 + 1
        assert box.y1 <= drawn.bbox.y1 + 1


# ---------------------------------------------------------------------------------------------------------------------
# one run


def test_one_run():
    drawn = plot_runs([run()])
    assert titles(drawn) == ["loss (nats per token)", *SMALL]
    best = 4.2 + 6 * math.exp(-400 / 60)
    head = drawn.get_suptitle()
    assert head == f"small, 28,900 parameters, Abacus\nbest validation loss {best:.4f} at iter 400"
    assert drawn.get_supxlabel() == "iter (updates done)"
    loss = drawn.axes[0]
    assert words(loss.get_legend()) == ["training (smoothed)", "validation", "best"]
    assert [text.get_text() for text in loss.texts] == [f"{best:.4f}"]
    (validation,) = lines(loss, "validation")
    assert list(validation.get_xdata()) == [0, 100, 200, 300, 400]
    assert validation.get_marker() == "o"
    (star,) = lines(loss, "best")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([400], [best])
    (smoothed,) = lines(loss, "training (smoothed)")
    (raw,) = [line for line in loss.lines if line.get_alpha()]
    assert list(raw.get_ydata()) == run()["train_loss"][1:]
    assert raw.get_linewidth() < smoothed.get_linewidth()
    assert raw.get_color() == smoothed.get_color() != validation.get_color()
    (rate,) = panel(drawn, "learning rate").lines
    assert list(rate.get_ydata()) == run()["lr"][1:]
    assert_readable(drawn)


def test_facts_that_nobody_knows_are_left_out():
    drawn = plot_runs([run(facts=False, val_loss=None, name="alone")])
    assert drawn.get_suptitle() == "alone\nno validation loss"
    assert words(drawn.axes[0].get_legend()) == ["training (smoothed)"]


@pytest.mark.parametrize(
    ("left_out", "remain"),
    [
        (["peak_mem_gb"], SMALL[:4]),
        (["peak_mem_gb", "step_ms", "tok_per_s"], SMALL[:2]),
        (["grad_norm"], (SMALL[0], *SMALL[2:])),
    ],
)
def test_no_empty_panels(left_out, remain):
    drawn = plot_runs([run(**dict.fromkeys(left_out), mfu=lambda i: NAN)])
    assert titles(drawn) == ["loss (nats per token)", *remain]
    assert_readable(drawn)


def test_panels_fill_their_rows():
    for count in range(6):
        keys = ("lr", "grad_norm", "step_ms", "tok_per_s", "peak_mem_gb")[count:]
        drawn = plot_runs([run(**dict.fromkeys(keys))])
        spans = [axes.get_subplotspec() for axes in drawn.axes]
        cells = sorted((row, column) for span in spans for row in span.rowspan for column in span.colspan)
        rows = {row for row, _ in cells}
        assert cells == [(row, column) for row in sorted(rows) for column in range(6)]


def test_without_losses_the_rest_is_drawn():
    drawn = plot_runs([run(train_loss=None, val_loss=None)])
    assert titles(drawn) == list(SMALL)
    assert_readable(drawn)


def test_nothing_to_draw_is_said():
    with pytest.raises(UserError, match="r: nothing in the log to draw along iter"):
        plot_runs([History("r", {}, {}, {})])
    with pytest.raises(UserError, match="nothing in the log to draw along tokens"):
        plot_runs([run(tokens=None)], "tokens")
    with pytest.raises(UserError, match="nothing"):
        plot_runs([History("r", {"iter": [0.0, 1.0]}, {}, {})])


@pytest.mark.parametrize("x", ["iter", "tokens", "time"])
@pytest.mark.parametrize("updates", [0, 10])
def test_one_row_is_a_point(updates, x):
    """A line of one point shows nothing."""
    drawn = plot_runs([run(updates)], x)
    (star,) = lines(drawn.axes[0], "best")
    assert list(star.get_xdata()) == [0]
    assert len(drawn.axes) == (4 if updates and x != "time" else 1)
    for axes in drawn.axes[1:]:
        marked = [line for line in axes.lines if line.get_marker() == "." and len(line.get_xdata())]
        assert all(len(line.get_xdata()) == 1 for line in marked)
        assert marked
    if updates == 0:
        assert [text.get_text() for text in labels(drawn.axes[0].xaxis)] == ["0"]
    assert_readable(drawn)


def test_values_that_are_not_finite_are_gaps():
    drawn = plot_runs(
        [run(grad_norm=lambda i: math.inf if 100 <= i < 200 else 1.0, train_loss=lambda i: NAN if i == 300 else 4.0)]
    )
    norm = panel(drawn, "gradient norm")
    for line in norm.lines:
        gap = [x for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if math.isnan(y)]
        assert gap == list(range(100, 200, 10))
    assert norm.get_ylim() == (0, pytest.approx(1.08))
    (raw,) = [line for line in drawn.axes[0].lines if line.get_alpha()]
    assert [x for x, y in zip(raw.get_xdata(), raw.get_ydata(), strict=True) if math.isnan(y)] == [300]
    (ticks,) = lines(drawn.axes[0], "update skipped")
    assert list(ticks.get_xdata()) == [300]
    assert "update skipped" in words(drawn.axes[0].get_legend())


def test_a_point_between_gaps_is_seen():
    drawn = plot_runs([run(grad_norm=lambda i: 2.0 if i in (50, 300, 310) else NAN)])
    marked = [line for line in panel(drawn, "gradient norm").lines if line.get_marker() == "."]
    assert [list(line.get_xdata()) for line in marked] == [[50], [50]]


def test_rows_of_an_evaluation_alone_do_not_cut_the_lines():
    history = run()
    for key in ("train_loss", "lr", "grad_norm"):
        history.columns[key][20] = NAN
    for axes in plot_runs([history]).axes[:3]:
        for line in axes.lines:
            assert not any(math.isnan(y) for y in line.get_ydata())


def test_skipped_updates_are_marked_where_the_count_rises():
    skipped = {0: 0, 10: 3, 20: 3, 30: NAN, 40: 3}
    history = run(skipped=lambda i: skipped.get(i, 5.0), loss_scale=lambda i: 2.0 ** (16 - i // 40))
    drawn = plot_runs([history])
    (ticks,) = lines(drawn.axes[0], "update skipped")
    assert list(ticks.get_xdata()) == [10, 50]
    scale = panel(drawn, "loss scale")
    assert scale.get_yscale() == "log"
    assert "1,000" in [text.get_text() for text in labels(scale.yaxis)]
    assert_readable(drawn)


@pytest.mark.parametrize(
    ("changes", "logarithmic"),
    [
        ({}, []),
        ({"train_loss": lambda i: 10.8 * math.exp(-i / 45), "val_loss": None}, ["loss"]),
        ({"grad_norm": lambda i: 300.0 if i == 200 else 1.0}, ["gradient norm"]),
        ({"step_ms": lambda i: 3000.0 if i == 200 else 50.0}, ["time per"]),
        ({"lr": lambda i: 1e-6 * (i + 1)}, []),
        ({"tok_per_s": lambda i: 0.0}, []),
        ({"train_loss": lambda i: 4 + math.exp(i / 10), "val_loss": lambda i: 4 + math.exp(i / 10)}, ["loss"]),
        ({"train_loss": lambda i: 0.0 if i > 300 else 3.0 + i, "val_loss": None}, ["loss"]),
        ({"train_loss": lambda i: 300.0 - i, "val_loss": None}, []),
    ],
)
def test_axes_are_logarithmic_where_values_span_much(changes, logarithmic):
    drawn = plot_runs([run(**changes)])
    found = [axes.get_title("left") for axes in drawn.axes if axes.get_yscale() == "log"]
    assert [title[: len(start)] for title, start in zip(found, logarithmic, strict=True)] == logarithmic
    for axes in drawn.axes[1:]:
        assert axes.get_yscale() == "log" or axes.get_ylim()[0] == 0
    numbers = " ".join(text.get_text() for axes in drawn.axes for text in labels(axes.yaxis))
    assert "$" not in numbers
    assert_readable(drawn)


def test_along_tokens_and_time():
    drawn = plot_runs([run(evaluate=400)], "tokens")
    assert drawn.get_supxlabel() == "tokens trained on"
    assert list(lines(drawn.axes[0], "validation")[0].get_xdata()) == [0, 102_400]
    history = run(evaluate=400, step_ms=lambda i: 6000.0)
    drawn = plot_runs([history], "time")
    assert drawn.get_supxlabel() == "time of the updates (min)"
    assert list(lines(drawn.axes[0], "validation")[0].get_xdata()) == pytest.approx([0, 40])
    assert_readable(drawn)


def test_the_value_of_the_best_lies_inside_wherever_it_is():
    for place in (0, 200, 400):
        drawn = plot_runs([run(val_loss=lambda i, place=place: 5 + abs(i - place) / 100 if i % 100 == 0 else NAN)])
        FigureCanvasAgg(drawn).draw()
        (text,) = drawn.axes[0].texts
        assert text.get_text() == "5.0000"
        inner, outer = text.get_window_extent(), drawn.axes[0].bbox
        assert outer.x0 <= inner.x0 < inner.x1 <= outer.x1 + 1
        assert outer.y0 <= inner.y0 < inner.y1 <= outer.y1


def test_markers_have_room():
    drawn = plot_runs([run(5000, evaluate=10)])
    (validation,) = lines(drawn.axes[0], "validation")
    assert len(validation.get_xdata()) == 501
    assert 500 / validation.get_markevery() < 50


# ---------------------------------------------------------------------------------------------------------------------
# several


def test_several_runs():
    histories = [run(name="a"), run(800, name="b"), run(600, name="_c$x$", val_loss=None)]
    drawn = plot_runs(histories)
    (legend,) = drawn.legends
    assert words(legend) == [
        *(f"{history.name}, best {history.best[1]:.4f}" for history in histories[:2]),
        "_c$x$",
    ]
    assert legend.get_title().get_text() == "3 runs, small, 28,900 parameters, Abacus"
    assert drawn.get_suptitle() == ""
    loss = drawn.axes[0]
    assert loss.get_title("left") == "loss (nats per token): validation bold, training thin"
    assert not loss.texts
    shown = [handle.get_color() for handle in legend.legend_handles]
    assert shown == list(COLOURS[:3])
    for history, colour in zip(histories, shown, strict=True):
        mine = [line for line in loss.lines if line.get_color() == colour]
        thin = min(mine, key=lambda line: line.get_linewidth())
        assert thin.get_xdata()[-1] == history["iter"][-1]
        if history.best:
            bold = next(line for line in mine if line.get_label() == "validation")
            assert bold.get_linewidth() >= 2 * thin.get_linewidth()
    assert len({handle.get_marker() for handle in legend.legend_handles}) == 3
    assert len({str(handle._unscaled_dash_pattern) for handle in legend.legend_handles}) == 3
    rates = panel(drawn, "learning rate").lines
    assert [line.get_color() for line in rates] == shown
    assert len({axes.get_xlim() for axes in drawn.axes}) == 1
    assert_readable(drawn)


def test_what_they_do_not_share_is_not_in_the_title():
    other = run(name="b")
    other.settings["n_layer"] = 4
    other.settings["config"] = None
    (legend,) = plot_runs([run(name="a"), other]).legends
    assert legend.get_title().get_text() == "2 runs, Abacus"


def test_many_runs_with_long_names():
    names = [f"a_sweep_of_learning_rates_and_weight_decays_lr_{n}e-4_decay_0.{n}_seed_{n}_of_many" for n in range(9)]
    drawn = plot_runs([run(name=name) for name in names])
    (legend,) = drawn.legends
    shown = words(legend)
    assert [text.startswith(f"…lr_{n}e-4") for n, text in enumerate(shown)] == [True] * 9
    assert_readable(drawn)
    few = plot_runs([run(name="a"), run(name="b")])
    FigureCanvasAgg(few).draw()
    assert drawn.axes[0].bbox.height > 0.9 * few.axes[0].bbox.height  # the legend takes no panel's room
    assert_readable(plot_runs([run(name="x" * 255), run(name="y" * 255)]))
    assert_readable(plot_runs([dataclasses.replace(run(facts=False), name="x" * 255)]))


def test_runs_of_very_unlike_length_are_both_seen():
    drawn = plot_runs([run(100, name="short"), run(20_000, name="long")])
    for axes in drawn.axes:
        assert axes.get_xscale() == "log"
        assert axes.get_xlim()[0] > 0
    assert_readable(drawn)
    assert plot_runs([run(100), run(1000, name="b")]).axes[0].get_xscale() == "linear"
    assert plot_runs([run(0, name="new"), run(1000, name="b")]).axes[0].get_xscale() == "linear"


def test_a_run_without_anything_there_is_left_out():
    drawn = plot_runs([run(name="a"), run(name="b", tokens=None), run(name="c")], "tokens")
    assert [text[0] for text in words(drawn.legends[0])] == ["a", "c"]
    assert plot_runs([run(name="a"), History("empty", {}, {}, {})]).get_suptitle().startswith("small")


def test_one_noisy_column_of_several_runs_is_scaled_by_what_is_drawn():
    drawn = plot_runs([run(name=name, grad_norm=lambda i: 12.0 if i == 200 else 1.0) for name in "ab"])
    assert panel(drawn, "gradient norm").get_yscale() == "linear"


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_a_png():
    content = render(plot_runs([run()]), "png")
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) < 300_000
    image = matplotlib.image.imread(io.BytesIO(content))
    assert image.shape[1] == 1600
    assert (image[0, 0, :3] == 1).all()


def test_an_svg_has_its_text_and_comes_out_alike():
    content = render(plot_runs([run(name="a<b>&")]), "svg")
    assert content == render(plot_runs([run(name="a<b>&")]), "svg")
    assert b">gradient norm</text>" in content
    assert b"small, 28,900 parameters, Abacus" in content
    assert b"a&lt;b&gt;&amp;" in render(plot_runs([run(facts=False, name="a<b>&")]), "svg")
    assert b">_c$x^2$\n" in render(plot_runs([run(facts=False, name="_c$x^2$")]), "svg").replace(b"</text>", b"\n")


def test_letters_that_the_font_has_not_are_no_warning(recwarn):
    render(plot_runs([run(name="日本", facts=False)]), "png")
    assert not list(recwarn)


def test_the_style_is_ours_alone():
    """We leave a user's matplotlibrc as it is, and it leaves our pictures as they are."""
    before = dict(matplotlib.rcParams)
    plain = render(plot_runs([run()]), "png")
    assert dict(matplotlib.rcParams) == before
    his = {"lines.marker": "o", "axes.facecolor": "black", "savefig.bbox": "tight", "savefig.transparent": True}
    with matplotlib.rc_context(his):
        assert render(plot_runs([run()]), "png") == plain


def test_a_run_that_went_on_with_its_own_recipe_has_its_folders_name():
    """As train.py says it: --config out/small/config.toml --resume. That name says nothing."""
    again = run(name="small")
    again.settings["config"] = "out/small/config.toml"
    assert plot_runs([again]).get_suptitle().startswith("small, 28,900 parameters")


def test_many_rows_are_no_large_file():
    drawn = plot_runs([run(20_000, every=1)])
    assert all(len(line.get_xdata()) < 2100 for axes in drawn.axes for line in axes.lines)
    assert len(render(drawn, "svg")) < 500_000
