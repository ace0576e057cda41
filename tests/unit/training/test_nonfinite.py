"""NonfiniteGuard: updates that are not finite leave no trace, are named and counted, and cost no synchronisation."""

import copy
import io
import math
import re

import pytest
import torch
from in_process import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import train
from config import TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from flatgpt.training.nonfinite import MAX_CONSECUTIVE_SKIPS, NonfiniteGuard, require_finite

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")


def make_run(*words) -> train.TrainingRun:
    """Return a run at update 0. Float16's scale is low enough that no gradient overflows."""
    run = train.build_run(cli.parse(TrainConfig, [*TINY, "--sample_tokens", "0", *map(str, words)]))
    if run.scaler.is_enabled():
        run.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return run


def bad_step(run: train.TrainingRun, i: int, fault: str) -> None:
    """Run update i with a fault in its loss or its gradient."""
    losses = {"nan loss": lambda loss: loss * NAN, "inf loss": lambda loss: loss * INF}
    losses |= {"nan added": lambda loss: loss + NAN, "inf added": lambda loss: loss + INF}  # the gradients are finite
    if fault in losses:
        forward, run.forward = run.forward, lambda x, y: losses[fault](forward(x, y))
        train.train_step(run, i)
        run.forward = forward
        return
    factor = {"nan gradient": NAN, "inf gradient": INF}[fault]
    hook = run.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * factor)
    loss, _ = train.train_step(run, i)
    hook.remove()
    assert loss.isfinite()


def training_state(run: train.TrainingRun) -> dict:
    """Return a copy of weights and moments."""
    names = {p: name for name, p in run.model.named_parameters()}
    moments = {f"{names[p]} {k}": v for p, entries in run.optimizer.state.items() for k, v in entries.items()}
    return copy.deepcopy({**run.model.state_dict(), **moments})


def assert_same(a: dict, b: dict) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


FAULTS = ("nan loss", "inf loss", "nan added", "inf added", "nan gradient", "inf gradient")
CASES = [("float32", fault) for fault in FAULTS]
CASES += [(dtype, fault) for dtype in ("bfloat16", "float16") for fault in ("nan loss", "inf gradient")]
CASES += [("float16", "inf added")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("dtype", "fault"), CASES)
def test_bad_update_leaves_no_trace(tiny_data, optimizer, dtype, fault):
    """The updates after it are those of a run that did not have it."""
    words = ("--optimizer", optimizer, "--dtype", dtype, "--grad_accum_steps", 2, "--dropout", 0.1)
    run, undisturbed = make_run(*words), make_run(*words)
    before = training_state(run)
    bad_step(run, 0, fault)  # before the optimizer has any state
    after = training_state(run)
    assert_same({key: after[key] for key in before}, before)
    assert not any(value.any() for key, value in after.items() if key not in before), "moments are zero, if there"
    for i in (1, 2, 4):
        if i == 4:
            before = training_state(run)
            bad_step(run, 3, fault)
            assert_same(training_state(run), before)
            assert all(p.grad is None for p in run.model.parameters())
        undisturbed.scaler.load_state_dict(run.scaler.state_dict())  # the scale may have been halved
        train.train_step(run, i)
        train.train_step(undisturbed, i)
        assert_same(training_state(run), training_state(undisturbed))
    counts = run.nonfinite_guard.state_dict()
    assert (counts["skipped"], counts["in_a_row"]) == (2, 0)


class NoSynchronisation(TorchDispatchMode):
    """Fails where a number is read from a tensor: on a GPU the host would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


def test_update_does_not_synchronise_with_the_device(tiny_data, monkeypatch):
    def waits(*args):
        raise AssertionError("the host waits for the device")

    adamw, muon = make_run("--grad_accum_steps", 2), make_run("--optimizer", "muon")
    with monkeypatch.context() as patch, NoSynchronisation():
        for name in ("tolist", "numpy", "cpu"):  # on a CPU these do not pass the dispatcher
            patch.setattr(torch.Tensor, name, waits)
        for i in range(3):
            train.train_step(adamw, i)
            train.train_step(muon, i)
        with pytest.raises(AssertionError, match="waits"):
            adamw.nonfinite_guard.check({"iter": 3}, adamw.batches, adamw.ranks)


# ---------------------------------------------------------------------------------------------------------------------
# what is counted and said


class FakeBatches:
    """Window 10 i + m for micro-batch m of update i."""

    batch_size, per_update = 1, 4

    class windows:  # noqa: N801 - an attribute of TrainingBatches
        stride = 32

    def indices(self, i: int, micro: int) -> list[int]:
        return [10 * i + micro]


def observe(guard: NonfiniteGuard, i: int, loss: float = 1.0, norm: float = 1.0, local: float = 1.0) -> float:
    return float(guard.observe(i, *map(torch.tensor, (loss, norm, local))))


def check(guard: NonfiniteGuard, i: int, ranks: DistributedContext = SINGLE_PROCESS) -> tuple[list[str], int]:
    """Return the warnings and the number of skipped updates."""
    row = {"iter": i}
    return guard.check(row, FakeBatches(), ranks), row["skipped"]


@pytest.mark.parametrize(
    ("values", "text"),
    [((NAN, 1.0), "the loss is nan"), ((INF, 1.0), "the loss is inf"), ((1.0, NAN), "the norm of the gradient is nan")],
)
def test_first_bad_update_is_named_with_its_windows(values, text):
    stop, skip = (NonfiniteGuard(way, CPU, scaled=False) for way in ("stop", "skip"))
    for guard in (stop, skip):
        assert [observe(guard, 5), observe(guard, 6, *values), observe(guard, 7, NAN)] == [0.0, 1.0, 1.0]
    said = f"iter 7: {text}; its batch there: training windows 60, 61, 62, 63 (window w begins at token 32 w)"
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        check(stop, 10)
    assert "--on_nonfinite skip" in str(caught.value)
    warning = f"warning: {said}. It was not applied (on_nonfinite = skip); 2 left out so far"
    assert check(skip, 10) == ([warning], 2)
    observe(skip, 10)
    assert check(skip, 11) == ([], 2)


def test_long_lists_of_windows_are_cut(monkeypatch):
    monkeypatch.setattr(FakeBatches, "indices", lambda self, i, micro: range(5 * micro, 5 * micro + 5))
    guard = NonfiniteGuard("skip", CPU, scaled=False)
    observe(guard, 0, NAN)
    (warning,), _ = check(guard, 1)
    assert "windows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 4 more (window" in warning


def test_overflow_of_float16_gradients_is_counted_and_no_error():
    guard = NonfiniteGuard("stop", CPU, scaled=True)
    assert observe(guard, 0, 1.0, INF) == 1.0
    assert check(guard, 1) == ([], 1)
    observe(guard, 1, NAN)
    with pytest.raises(UserError, match=r"^iter 2: the loss is nan"):
        check(guard, 2)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("last_row", [MAX_CONSECUTIVE_SKIPS, 40])
def test_twenty_in_a_row_end_the_run(scaled, last_row):
    """Also where the row comes after good ones, and where the run was resumed from a checkpoint between them."""
    on_nonfinite = "stop" if scaled else "skip"
    for bad in (MAX_CONSECUTIVE_SKIPS - 1, MAX_CONSECUTIVE_SKIPS):
        guard = NonfiniteGuard(on_nonfinite, CPU, scaled)
        for i in range(last_row):
            if i == 7:
                check(guard, i)
                file = io.BytesIO()
                torch.save(guard.state_dict(), file)
                file.seek(0)
                guard = NonfiniteGuard(on_nonfinite, CPU, scaled)
                guard.load_state_dict(torch.load(file, weights_only=True))
            observe(guard, i, norm=INF if i < bad else 1.0)
        if bad == MAX_CONSECUTIVE_SKIPS:
            with pytest.raises(
                UserError, match=rf"^20 updates in a row, up to iter {last_row}, had a loss or gradient"
            ):
                check(guard, last_row)
        else:
            assert check(guard, last_row)[1] == 19


def test_state_of_earlier_versions_loads():
    """They stored the mean of the logged losses too, and need its keys to load a newer checkpoint."""
    guard = NonfiniteGuard("skip", CPU, scaled=False)
    guard.load_state_dict({"skipped": 3, "in_a_row": 1, "longest": 2, "mean": 2.5, "square": 6.3, "rows": 40})
    assert guard.state_dict() == {"skipped": 3, "in_a_row": 1, "longest": 2, "mean": 0, "square": 0, "rows": 0}


class FakeRank(DistributedContext):
    """A rank of two, which knows what both have."""

    def __init__(self, rank: int, values: list):
        super().__init__(rank, 2)
        object.__setattr__(self, "values", values)

    def all_gather(self, value) -> list:
        assert value == self.values[self.rank]
        return self.values


@pytest.mark.parametrize(
    ("local", "ranks", "windows"),
    [
        ((1.0, NAN), "rank 1", "111, 113"),
        ((INF, 1.0), "rank 0", "110, 112"),
        ((NAN, NAN), "rank 0, 1", "110, 111, 112, 113"),
        ((1.0, 1.0), "rank 0, 1", "110, 111, 112, 113"),  # only their sum overflowed
    ],
)
def test_rank_at_fault_is_named_with_its_windows(local, ranks, windows):
    for rank in (0, 1):
        guard = NonfiniteGuard("stop", CPU, scaled=False)
        assert observe(guard, 11, NAN, local=local[rank]) == 1.0
        with pytest.raises(UserError, match=rf"^iter 12: the loss is nan on {ranks}; .* windows {windows} \(window"):
            check(guard, 12, FakeRank(rank, list(map(math.isfinite, local))))


def test_weights_and_losses_that_are_not_finite_are_refused(tiny_data):
    model = make_run().model
    require_finite(model, 5, 2.3)
    with pytest.raises(UserError, match=r"^the validation loss is inf at iter 5: the run has diverged"):
        require_finite(model, 5, INF)
    for value in (NAN, INF, -INF):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.weight[0, 0] = value
        with pytest.raises(UserError, match=r"^a weight is not finite at iter 5: the run has diverged"):
            require_finite(model, 5)
