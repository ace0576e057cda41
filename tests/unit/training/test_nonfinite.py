"""NonfiniteGuard: what it counts and reports about updates that are not finite."""

import math
from types import SimpleNamespace

import pytest
import torch

from config import UserError
from flatgpt.runtime.distributed import SINGLE_PROCESS
from flatgpt.training.nonfinite import MAX_CONSECUTIVE_SKIPS, NonfiniteGuard, require_finite

NAN, INF = math.nan, math.inf
# Micro-batch m of update i has one window, 10 i + m.
BATCHES = SimpleNamespace(
    batch_size=1, per_update=4, windows=SimpleNamespace(stride=32), indices=lambda i, micro: [10 * i + micro]
)


def make_guard(on_nonfinite: str, scaled: bool = False) -> NonfiniteGuard:
    return NonfiniteGuard(on_nonfinite, "out/r", torch.device("cpu"), scaled)


def observe(guard: NonfiniteGuard, i: int, loss: float = 1.0, norm: float = 1.0) -> float:
    return float(guard.observe(i, *map(torch.tensor, (loss, norm, loss + norm))))


def check(guard: NonfiniteGuard, i: int, ranks=SINGLE_PROCESS) -> tuple[str, str, int]:
    """Return the warning, the error and the number of skipped updates."""
    row = {"iter": i}
    return *guard.check(row, BATCHES, ranks), row["skipped"]


@pytest.mark.parametrize(
    ("values", "text"),
    [((NAN, 1.0), "the loss is nan"), ((INF, 1.0), "the loss is inf"), ((1.0, NAN), "the norm of the gradient is nan")],
)
def test_first_bad_update_is_named_with_its_windows(values, text):
    stop, skip = make_guard("stop"), make_guard("skip")
    for guard in (stop, skip):
        assert [observe(guard, 5), observe(guard, 6, *values), observe(guard, 7, NAN)] == [0.0, 1.0, 1.0]
    said = f"iter 7: {text}; training windows of its batch: 60, 61, 62, 63 (window w starts at token 32 * w; their "
    said += "texts: python train.py --config out/r/config.toml --show_batch 7). The"
    warning, error, skipped = check(stop, 10)
    assert (warning, error[: len(said)], skipped) == ("", said, 2)
    assert "--on_nonfinite skip" in error
    warning, error, skipped = check(skip, 10)
    assert (warning.removeprefix("warning: ")[: len(said)], error, skipped) == (said, "", 2)
    observe(skip, 10)
    assert check(skip, 11) == ("", "", 2)


@pytest.mark.parametrize(
    ("finite", "ranks", "windows"),
    [
        ([True, False], "rank 1", "111, 113"),
        ([False, True], "rank 0", "110, 112"),
        ([False, False], "rank 0, 1", "110, 111, 112, 113"),
        ([True, True], "rank 0, 1", "110, 111, 112, 113"),  # only their sum overflowed
    ],
)
def test_rank_at_fault_is_named_with_its_windows(finite, ranks, windows):
    observe(guard := make_guard("stop"), 11, NAN)
    _, error, _ = check(guard, 12, SimpleNamespace(world=2, all_gather=lambda value: finite))
    assert error.startswith(f"iter 12: the loss is nan on {ranks}; training windows of its batch: {windows} (window")


def test_overflow_of_float16_gradients_is_counted_and_no_error():
    guard = make_guard("stop", scaled=True)
    assert observe(guard, 0, 1.0, INF) == 1.0
    assert check(guard, 1) == ("", "", 1)
    observe(guard, 1, NAN)
    assert check(guard, 2)[1].startswith("iter 2: the loss is nan")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("last_row", [MAX_CONSECUTIVE_SKIPS, 40])
@pytest.mark.parametrize("bad", [MAX_CONSECUTIVE_SKIPS - 1, MAX_CONSECUTIVE_SKIPS])
def test_twenty_in_a_row_end_the_run(scaled, last_row, bad):
    """Also where the row comes after good ones, and where the run was resumed from a checkpoint between them."""
    guard = make_guard("stop" if scaled else "skip", scaled)
    for i in range(last_row):
        if i == 7:
            check(guard, i)
            resumed = make_guard(guard.on_nonfinite, scaled)
            # earlier versions stored the mean of the logged losses, too
            resumed.load_state_dict(guard.state_dict() | {"mean": 2.5, "square": 6.3, "rows": 40})
            guard = resumed
        observe(guard, i, norm=INF if i < bad else 1.0)
    _, error, skipped = check(guard, last_row)
    assert skipped == bad
    expected = f"20 updates in a row, up to iter {last_row}, had a non-finite loss" if bad == 20 else ""
    assert error[: len(expected)] == expected
    assert bool(error) == (bad == 20)


def test_weights_and_losses_that_are_not_finite_are_refused():
    model = torch.nn.Linear(3, 2)
    require_finite(model, 5, 2.3)
    with pytest.raises(UserError, match=r"^the validation loss is inf at iter 5: the run has diverged"):
        require_finite(model, 5, INF)
    for value in (NAN, INF, -INF):
        with torch.no_grad():
            model.weight[0, 0] = value
        with pytest.raises(UserError, match=r"^a weight is not finite at iter 5: the run has diverged"):
            require_finite(model, 5)
