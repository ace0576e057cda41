"""curves.py: lines that are smooth and not late, thinned lines that look the same, numbers and names for people."""

import itertools
import math
import random

import pytest

from flatgpt.runs.curves import POINTS, format_tick, isolated_points, log_ticks, shorten, smooth, thin, time_unit

NAN = math.nan


def noisy(rows: int, spread: float = 1.0) -> list[float]:
    draws = random.Random(0)
    return [5 + draws.gauss(0, spread) for _ in range(rows)]


def test_what_does_not_change_stays():
    iters = [*range(0, 1000, 10), *range(1000, 2000, 100)]
    assert smooth(iters, [3.0] * len(iters)) == pytest.approx([3.0] * len(iters), abs=1e-12)
    assert smooth(iters, [3.0] * len(iters), log=True) == pytest.approx([3.0] * len(iters), abs=1e-12)
    assert smooth([7], [2.0]) == [2.0]
    assert smooth([], []) == []


def test_noise_goes():
    iters, ys = list(range(0, 20_000, 10)), noisy(2000)
    rest = smooth(iters, ys)[200:]
    assert max(abs(y - 5) for y in rest) < 0.5 < max(abs(y - 5) for y in ys)
    assert abs(sum(rest) / len(rest) - 5) < 0.05


def test_a_steep_beginning_is_not_late():
    iters = list(range(10, 4010, 10))
    losses = [4 + 6.8 * math.exp(-i / 100) for i in iters]
    means = smooth(iters, losses)
    assert max(abs(mean - loss) for mean, loss in zip(means, losses, strict=True)) < 0.12
    assert means[0] == pytest.approx(losses[0], abs=0.05)


def test_both_sides_count_alike():
    ys = [0.0] * 500 + [1.0] * 501
    means = smooth(range(0, 10_010, 10), ys)
    assert means[490] == pytest.approx(1 - means[510], abs=0.02)
    assert 0 < means[495] < 0.5 < means[505] < 1
    assert all(one <= other + 1e-12 for one, other in itertools.pairwise(means))


def test_weights_are_by_distance_in_iterations():
    """Rows that lie close weigh each other, not those far away."""
    iters = [*range(0, 5000, 100), 5001, 5002, 5003, *range(5100, 10_001, 100)]
    ys = [9.0 if 5000 < i < 5004 else 1.0 for i in iters]
    means = dict(zip(iters, smooth(iters, ys), strict=True))
    assert means[5002] > 4.5
    assert means[4000] < 1.1


def test_nan_is_a_gap_that_pulls_nothing():
    iters, ys = range(0, 1000, 10), [2.0] * 100
    ys[40:50], ys[70] = [NAN] * 10, math.inf
    means = smooth(iters, ys)
    assert [n for n, mean in enumerate(means) if math.isnan(mean)] == [*range(40, 50), 70]
    assert [mean for mean in means if mean == mean] == pytest.approx([2.0] * 89)
    assert all(map(math.isnan, smooth(iters, [NAN] * 100)))


def test_a_spike_is_no_tent_on_a_logarithmic_axis():
    ys = [1.0] * 200
    ys[100] = 1e4
    assert max(smooth(range(200), ys)) > 500
    assert max(smooth(range(200), ys, log=True)) < 20
    assert math.isnan(smooth(range(3), [1.0, 0.0, 1.0], log=True)[1])


def test_thinned_lines_look_the_same():
    rows = 100_000
    xs, ys = list(range(rows)), noisy(rows)
    ys[33_333], ys[66_666] = 99.0, -99.0
    ys[50_000:60_000] = [NAN] * 10_000
    some, values = thin(xs, ys)
    assert POINTS / 2 < len(some) <= POINTS + 2
    assert some == sorted(some)
    assert (values[some.index(33_333)], values[some.index(66_666)]) == (99.0, -99.0)
    assert all(ys[x] == y or math.isnan(y) for x, y in zip(some, values, strict=True))
    assert sum(map(math.isnan, values)) > 10
    assert not any(50_000 <= x < 60_000 for x, y in zip(some, values, strict=True) if y == y)
    assert thin(xs[:POINTS], ys[:POINTS]) == (xs[:POINTS], ys[:POINTS])


def test_thinned_for_a_logarithmic_axis_the_beginning_stays():
    xs = list(range(100_000))
    some, _ = thin(xs, [float(x) for x in xs], log=True)
    assert some[:5] == [1, 2, 3, 4, 5]
    assert len(some) <= POINTS + 2
    assert thin([0, 1], [3.0, 4.0], log=True) == ([1], [4.0])


def test_points_that_no_line_shows():
    assert isolated_points([1.0, NAN, 2.0, 3.0, NAN, 4.0]) == [0, 5]
    assert isolated_points([NAN, NAN]) == isolated_points([]) == []
    assert isolated_points([1.0]) == [0]


@pytest.mark.parametrize(
    ("value", "largest", "said"),
    [
        (0, 0, "0"),
        (2000, 0, "2,000"),
        (12.5, 20, "12.5"),
        (1234.5, 2000, "1,234.5"),
        (0.1 + 0.2, 1, "0.3"),
        (0.0006, 0.001, "0.0006"),
        (3e-5, 1e-4, "3e-5"),
        (2.5e-5, 1e-4, "2.5e-5"),
        (1.5e6, 0, "1.5M"),
        (500_000, 2e6, "0.5M"),
        (500_000, 0, "500,000"),
        (1e8, 0, "100M"),
        (3e11, 0, "300B"),
        (5e12, 0, "5T"),
        (1e20, 0, "1e20"),
        (-2, 5, "-2"),
    ],
)
def test_numbers_on_axes(value, largest, said):
    assert format_tick(value, largest) == said


@pytest.mark.parametrize("most", [4, 6, 8])
def test_ticks_of_logarithmic_axes(most):
    for low, ratio in itertools.product((3e-5, 0.4, 1.0, 77.0, 2.2e6), (1.2, 5, 11, 60, 1e3, 1e5, 1e9, 1e30)):
        ticks = log_ticks(low, low * ratio, most)
        assert ticks == sorted(set(ticks))
        assert all(low <= tick <= low * ratio for tick in ticks)
        assert 3 <= len(ticks) <= most or (ratio <= 5 and not ticks)
    assert log_ticks(0.9, 11, 6) == [1, 2, 5, 10]
    assert log_ticks(0.75, 6, 6) == [1, 1.5, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0, "s"), (100, "s"), (1000, "min"), (20_000, "h"), (1e6, "days"), (1e9, "days")]
)
def test_units_of_time(seconds, unit):
    assert time_unit(seconds)[0] == unit
    assert seconds / time_unit(seconds)[1] < 180 or unit == "days"


def test_names_shortened():
    assert shorten(["a", "b"], 5) == ["a", "b"]
    long = [f"tinystories_sweep_lr_{n}e-4_wd_0.1" for n in (1, 2)]
    assert shorten(long, 20) == ["…lr_1e-4_wd_0.1", "…lr_2e-4_wd_0.1"]
    assert shorten(["x" * 30 + "y" * 30], 11) == ["xxxxx…yyyyy"]
    for names in (["q" * 99 + "1", "q" * 99 + "2"], ["a_" * 40 + "x" * 60 + "1", "a_" * 40 + "x" * 60 + "2"]):
        short = shorten(names, 21)
        assert max(map(len, short)) <= 21
        assert len(set(short)) == 2
    assert shorten(["run", "a_much_longer_name_of_a_run"], 12) == ["run", "a_much…a_run"]
