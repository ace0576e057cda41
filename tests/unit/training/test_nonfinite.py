"""guard.py: updates that are not finite leave no trace, are named and counted; spikes; memory that is full."""

import copy
import csv
import dataclasses
import io
import math
import random
import re
from pathlib import Path

import pytest
import torch
from in_process import TINY, train_here
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train
from config import TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.runs import checkpoint
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext
from flatgpt.training.nonfinite import NonfiniteGuard, out_of_memory, require_finite

QUIET = ("--sample_tokens", 0, "--eval_batches", 1)
NAN, INF = math.nan, math.inf


def make_config(*words) -> TrainConfig:
    return cli.parse(TrainConfig, [*TINY, *map(str, (*QUIET, *words))])


def make_run(*words) -> train.TrainingRun:
    """Float16's scaler starts low enough for none of its gradients to overflow."""
    run = train.build_run(make_config(*words))
    if run.scaler.is_enabled():
        run.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return run


def bad_update(run: train.TrainingRun, i: int, how: str, real=train.train_step) -> tuple:
    """Update i with something wrong in it that is gone after it."""
    wrong = {"nan loss": lambda loss: loss * NAN, "inf loss": lambda loss: loss * INF}
    # the weights' gradients are as always: only the number is wrong
    wrong |= {"nan added": lambda loss: loss + NAN, "inf added": lambda loss: loss + INF}
    if how in wrong:
        forward, run.forward = run.forward, lambda x, y: wrong[how](forward(x, y))
        answer = real(run, i)
        run.forward = forward
        return answer
    factor = {"nan gradient": NAN, "inf gradient": INF}[how]
    hook = run.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * factor)
    answer = real(run, i)
    hook.remove()
    assert answer[0].isfinite()
    return answer


def state(run: train.TrainingRun) -> dict:
    """All that an update changes; None for what is not there yet."""
    names = {p: name for name, p in run.model.named_parameters()}
    moments = {f"{names[p]} {k}": v for p, entries in run.optimizer.state.items() for k, v in entries.items()}
    return copy.deepcopy({**run.model.state_dict(), **moments})


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def spoil(monkeypatch, numbers, how: str = "nan loss") -> list[int]:
    """From now on these updates of a run (from 0) are bad; returns the updates that are made, as they are made."""
    real, made = train.train_step, []

    def update(run, i):
        made.append(i)
        return bad_update(run, i, how, real) if i in numbers else real(run, i)

    monkeypatch.setattr(train, "train_step", update)
    return made


def rows(run: Path) -> list[dict]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# one update

HOW = ("nan loss", "inf loss", "nan added", "inf added", "nan gradient", "inf gradient")
CASES = [("float32", how) for how in HOW]
CASES += [(dtype, how) for dtype in ("bfloat16", "float16") for how in ("nan loss", "inf gradient")]
CASES += [("float16", "inf added"), ("float16", "nan added")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("dtype", "how"), CASES)
def test_bad_update_leaves_no_trace(tiny_data, optimizer, dtype, how):
    """The update after it goes on as in a run that did not have it."""
    words = ("--optimizer", optimizer, "--dtype", dtype, "--grad_accum_steps", 2, "--dropout", 0.1)
    run, undisturbed = make_run(*words), make_run(*words)
    assert run.scaler.is_enabled() == (dtype == "float16")
    for at in (0, 3):  # before the optimizer has any state, and after
        if at:
            train.train_step(run, at - 1)
            train.train_step(undisturbed, at - 1)
        before = state(run)
        bad_update(run, at, how)
        after = state(run)
        if at:
            assert_same(before, after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not any(value.any() for key, value in after.items() if key not in before), "zeros, if anything"
        assert all(p.grad is None for p in run.model.parameters())
        undisturbed.scaler.load_state_dict(run.scaler.state_dict())  # the scale may have been halved; no more than that
        for i in (at + 1, at + 2):
            train.train_step(run, i)
            train.train_step(undisturbed, i)
        assert not torch.equal(after["transformer.wte.weight"], run.model.transformer.wte.weight)
        assert_same(state(run), state(undisturbed))
    assert int(run.nonfinite_guard.skipped) == 2
    assert int(undisturbed.nonfinite_guard.skipped) == 0
    assert int(run.nonfinite_guard.in_a_row) == 0


def test_poisoned_weight_spoils_no_other(tiny_data):
    """As a cosmic ray would: put back, the run is as it was."""
    run = make_run()
    train.train_step(run, 0)
    before = state(run)
    weight = run.model.transformer.h[1].attn.c_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] = NAN
    loss, norm = train.train_step(run, 1)
    assert loss.isnan()
    assert norm.isnan()
    with torch.no_grad():
        weight.copy_(kept)
    assert_same(before, state(run))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overflow_of_float16s_gradients_is_counted_and_is_no_mistake(tiny_data, optimizer):
    run = make_run("--dtype", "float16", "--optimizer", optimizer)
    bad_update(run, 0, "inf gradient")
    row = {"iter": 1}
    assert run.nonfinite_guard.check(row, run.batches, run.ranks) == []
    assert row["skipped"] == 1
    assert run.scaler.get_scale() == 128
    bad_update(run, 1, "nan loss")
    with pytest.raises(UserError, match=r"^iter 2: the loss is nan"):
        run.nonfinite_guard.check(row, run.batches, run.ranks)


class NoWaiting(TorchDispatchMode):
    """Fails where a number is taken from a tensor: on a GPU the host would wait for it there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_update_waits_for_the_device(tiny_data, monkeypatch):
    def waits(*args):
        raise AssertionError("the host waits for the device")

    run, muon = make_run("--grad_accum_steps", 2), make_run("--optimizer", "muon")
    with monkeypatch.context() as patch, NoWaiting():
        for name in ("tolist", "numpy", "cpu"):  # no dispatcher hears of these on a CPU
            patch.setattr(torch.Tensor, name, waits)
        for i in range(3):
            train.train_step(run, i)
            train.train_step(muon, i)
        with pytest.raises(AssertionError, match="waits"):
            run.nonfinite_guard.check({"iter": 3}, run.batches, run.ranks)


def test_note_needs_no_number(tiny_data):
    """On `meta` tensors have no values at all, and whoever asks for one gets an error."""
    value = torch.zeros((), device="meta")
    for scaled in (False, True):
        guard = NonfiniteGuard(make_config(), value.device, scaled)
        assert guard.observe(0, value, value, value).is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.check({"iter": 1}, None, SINGLE_PROCESS)


# ---------------------------------------------------------------------------------------------------------------------
# the whole run


def test_weights_and_losses_that_are_not_finite_are_not_saved(tiny_data):
    model = make_run().model
    require_finite(model, 5, 2.3)
    with pytest.raises(UserError, match=r"^the validation loss is inf at iter 5: the run has diverged"):
        require_finite(model, 5, INF)
    for value in (NAN, INF, -INF):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.weight[0, 0] = value
        with pytest.raises(UserError, match=r"^a weight is not finite at iter 5: the run has diverged"):
            require_finite(model, 5)


@pytest.mark.parametrize(("how", "text"), [("nan loss", "the loss is nan"), ("inf added", "the loss is inf")])
def test_run_stops_at_the_next_row_and_names_the_first_bad_update(tiny_data, monkeypatch, how, text):
    words = (*QUIET, "--log_interval", 5, "--eval_interval", 100, "--save_interval", 5, "--max_iters", 30)
    words += ("--grad_accum_steps", 2)
    made = spoil(monkeypatch, (6, 8), how)
    with pytest.raises(UserError) as caught:
        train_here(*words)
    message = str(caught.value)
    assert message.startswith(f"iter 7: {text}; its batch there: ")
    batches = train.build_run(make_config(*words)).batches
    windows = ", ".join(str(int(w)) for micro in (0, 1) for w in batches.indices(6, micro))
    assert f"training windows {windows} (window w begins at token 32 w)" in message
    assert "--on_nonfinite skip" in message
    assert made == list(range(10)), "it ends with the row of iter 10"
    run = Path("out/quickstart")
    assert [row["iter"] for row in rows(run)] == ["0", "5"]
    assert [checkpoint.read_state(folder)["iter"] for folder in checkpoint.checkpoints(run)] == [5]
    assert all(t.isfinite().all() for t in load_file(run / "ckpt/last/model.safetensors").values())
    checkpoint.verify(run / "ckpt/last")


def test_gradient_is_named_where_the_loss_is_finite(tiny_data, monkeypatch):
    spoil(monkeypatch, (1,), "nan gradient")
    with pytest.raises(UserError) as caught:
        train_here(*QUIET, "--batch_size", 10, "--grad_accum_steps", 2)
    assert str(caught.value).startswith("iter 2: the norm of the gradient is nan; its batch there: training windows ")
    listed = re.search(r"windows ([\d, ]+) and 4 more \(window", str(caught.value))
    assert listed.group(1).count(",") == 15
    assert not Path("out/quickstart/ckpt").exists()


def test_skip_warns_counts_and_goes_on(tiny_data, monkeypatch, capsys):
    words = (*QUIET, "--log_interval", 5, "--eval_interval", 100, "--max_iters", 20, "--on_nonfinite", "skip")
    spoil(monkeypatch, (6, 7, 13))
    run = train_here(*words)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: iter 7: the loss is nan; its batch there: training windows ")
    assert warnings[0].endswith("It was not applied (on_nonfinite = skip); 2 left out so far")
    assert warnings[1].startswith("warning: iter 14: ")
    assert [(row["iter"], row["skipped"]) for row in rows(run)] == [
        *(("0", ""), ("5", "0"), ("10", "2"), ("15", "3"), ("20", "3"))
    ]
    assert checkpoint.read_state(run / "ckpt/last")["finished"]


LONG = (*QUIET, "--eval_interval", 100, "--lr_decay_iters", 60, "--on_nonfinite", "skip", "--max_iters")


def test_twenty_bad_updates_in_a_row_end_the_run(tiny_data, monkeypatch):
    made = spoil(monkeypatch, range(3, 23))
    with pytest.raises(UserError, match=r"^20 updates in a row, up to iter 23, had a loss or gradient that is not"):
        train_here(*LONG, 60)
    assert made == list(range(23))


def test_nineteen_in_a_row_do_not(tiny_data, monkeypatch):
    spoil(monkeypatch, [*range(3, 22), *range(23, 42)])
    run = train_here(*LONG, 44)
    assert rows(run)[-1]["skipped"] == "38"


def test_twenty_between_two_rows_end_the_run_too(tiny_data, monkeypatch):
    spoil(monkeypatch, range(3, 23))
    with pytest.raises(UserError, match=r"^20 updates in a row, up to iter 40, "):
        train_here(*LONG, 60, "--log_interval", 40)


@pytest.mark.parametrize("end", [21, 22])
def test_counts_go_on_after_a_resume(tiny_data, monkeypatch, end):
    """Bad ones from iter 4 to iter 22 or 23, the resume between them."""
    spoil(monkeypatch, range(3, end + 1))
    train_here(*LONG, 12)
    if end == 22:
        with pytest.raises(UserError, match=r"^20 updates in a row, up to iter 23, "):
            train_here(*LONG, 30, "--resume")
    else:
        run = train_here(*LONG, 30, "--resume")
        assert [row["skipped"] for row in rows(run)[-2:]] == ["19", "19"]


def test_float16s_skips_count_among_the_twenty(tiny_data, monkeypatch):
    """Also with on_nonfinite = stop: none of them is a mistake, all of them together are."""
    words = (*LONG, 60, "--dtype", "float16", "--on_nonfinite", "stop")
    made = spoil(monkeypatch, range(30, 50), "inf gradient")
    with pytest.raises(UserError, match=r"^20 updates in a row, up to iter 50, "):
        train_here(*words)
    assert made == list(range(50))


# ---------------------------------------------------------------------------------------------------------------------
# ranks


@dataclasses.dataclass(frozen=True)
class Pretended(DistributedContext):
    """A rank among others, whose answers are known."""

    answers: tuple = ()

    def all_gather(self, value):
        """The others' answers beside this rank's own."""
        assert value == self.answers[self.rank]
        return list(self.answers)


@pytest.mark.parametrize(
    ("own", "named", "micros"),
    [
        ((1.0, NAN), "rank 1", (1, 3)),
        ((INF, 1.0), "rank 0", (0, 2)),
        ((NAN, NAN), "rank 0, 1", (0, 1, 2, 3)),
        ((1.0, 1.0), "rank 0, 1", (0, 1, 2, 3)),  # their sum overflowed
    ],
)
def test_the_guilty_rank_is_named_with_its_windows(tiny_data, own, named, micros):
    run = make_run("--grad_accum_steps", 4, "--batch_size", 2)
    windows = ", ".join(str(int(w)) for micro in micros for w in run.batches.indices(11, micro))
    for rank in (0, 1):
        ranks = Pretended(rank, 2, rank, 2, tuple(map(math.isfinite, own)))
        guard, good = NonfiniteGuard(run.config, torch.device("cpu"), False), torch.tensor(1.0)
        guard.observe(10, good, good, good)
        skip = guard.observe(11, torch.tensor(NAN), good, torch.tensor(own[rank]))  # the loss is everybody's
        assert float(skip) == 1.0
        with pytest.raises(UserError) as caught:
            guard.check({"iter": 12}, run.batches, ranks)
        expected = f"iter 12: the loss is nan on {named}; its batch there: training windows {windows} (window"
        assert str(caught.value).startswith(expected)


# ---------------------------------------------------------------------------------------------------------------------
# spikes


def falling(rows: int, seed: int) -> list[dict]:
    """A loss as they are: fast at first, then slowly, with noise."""
    noise = random.Random(seed)
    losses = [2 + 3 * math.exp(-n / 30) + 2 / (1 + n / 50) + noise.gauss(0, 0.08) for n in range(rows)]
    return [{"iter": 10 * n, "train_loss": loss} for n, loss in enumerate(losses)]


def fresh() -> NonfiniteGuard:
    return NonfiniteGuard(TrainConfig(), torch.device("cpu"), False)


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_loss_is_no_spike(seed):
    guard = fresh()
    assert [said for row in falling(2000, seed) for said in guard.spike(row)] == []


def test_loss_that_stands_still_is_no_spike():
    """Its deviation is nothing but rounding."""
    for loss in (2.3, 1 / 3, 4.1e-7):
        guard = fresh()
        assert [said for n in range(300) for said in guard.spike({"iter": n, "train_loss": loss})] == []


def test_rise_is_reported_with_its_numbers():
    guard, losses = fresh(), falling(200, 1)
    assert not any(guard.spike(row) for row in losses)
    mean, deviation = guard.mean, math.sqrt(guard.square - guard.mean**2)
    assert mean == pytest.approx(sum(row["train_loss"] for row in losses[-40:]) / 40, abs=0.1)
    assert 0.05 < deviation < 0.3
    assert guard.spike({"iter": 2000, "train_loss": mean + 5.9 * deviation}) == []
    mean, deviation = guard.mean, math.sqrt(guard.square - guard.mean**2)
    loss = mean + 6.1 * deviation
    assert guard.spike({"iter": 2010, "train_loss": loss}) == [
        f"warning: iter 2010: loss {loss:.4f} is a spike, {6.1 * deviation:.4f} above the mean of rows before it "
        f"({mean:.4f}, standard deviation {deviation:.4f})"
    ]


def test_first_rows_and_nan_are_no_spikes():
    guard = fresh()
    for n in range(20):
        assert guard.spike({"iter": n, "train_loss": 2 + n % 2 / 10 if n < 19 else 50.0}) == []
    before = guard.state_dict()
    assert guard.spike({"iter": 20, "train_loss": NAN}) == []
    assert guard.spike({"iter": 20, "train_loss": INF}) == []
    assert guard.state_dict() == before, "else no later mean would be finite"
    assert len(guard.spike({"iter": 21, "train_loss": 500.0})) == 1


@pytest.mark.parametrize("cut", [1, 15, 120, 131])
def test_state_survives_a_checkpoint(cut):
    losses = falling(200, 2)
    for n, more in ((100, 9), (130, 90), (131, 90), (160, 2000)):  # each widens what is usual
        losses[n]["train_loss"] += more
    whole, first, second = fresh(), fresh(), fresh()
    for guard, part in ((whole, range(cut)), (first, range(cut))):
        for i in part:
            bad = torch.tensor(NAN if i % 3 else 1.0)
            guard.observe(i, bad, bad, bad)
    said = [whole.spike(row) for row in losses]
    assert sum(map(len, said)) >= 3
    before = [first.spike(row) for row in losses[:cut]]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert before + [second.spike(row) for row in losses[cut:]] == said
    assert second.state_dict() == whole.state_dict()


def test_spike_is_reported_in_a_run(tiny_data, monkeypatch, capsys):
    """At a logged update, and nothing is done about it."""
    real = train.train_step

    def update(run, i):
        loss, norm = real(run, i)
        return loss + 40 * (i == 25), norm

    monkeypatch.setattr(train, "train_step", update)
    run = train_here(*LONG, 28, "--lr", "1e-5", "--min_lr", "1e-5")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert re.match(r"warning: iter 26: loss 4\d\.\d{4} is a spike, ", warning)
    assert checkpoint.read_state(run / "ckpt/last")["iter"] == 28


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_smaller_batches_that_are_proposed_make_the_same_updates():
    proposed = 0
    for world in (1, 2, 3, 4, 8):
        for batch_size in range(2, 26):
            for steps in range(world, 6 * world, world):
                config = dataclasses.replace(TrainConfig(), batch_size=batch_size, grad_accum_steps=steps)
                text = out_of_memory(config, "NVIDIA T4", 14.9, world)
                pair = r"--batch_size (\d+) --grad_accum_steps (\d+) \((\d+) sequences = ([\d,]+) tokens an update, as"
                smaller, more, total, tokens = re.search(pair, text).groups()
                assert int(smaller) * int(more) == int(total) == batch_size * steps
                assert int(smaller) < batch_size
                assert int(more) % world == 0
                assert int(tokens.replace(",", "")) == int(total) * config.context_length
                proposed += batch_size % 2 or int(smaller) == batch_size // 2
    assert proposed == 5 * 24 * 5, "the half of it, where there is one"


def test_what_frees_memory_is_listed_and_nothing_that_is_on_already():
    def asked(world: int, **settings) -> list[str]:
        text = out_of_memory(dataclasses.replace(TrainConfig(), **settings), "NVIDIA T4", 14.9, world)
        assert text.startswith("NVIDIA T4 is out of memory at batch_size = ")
        assert "the peak was 14.90 GB" in text
        return re.findall(r"--[a-z_]+", text)

    smaller, rest = ["--batch_size", "--grad_accum_steps"], ["--context_length", "--plan"]
    assert asked(1) == [*smaller, "--activation_checkpointing", *rest]
    assert asked(1, activation_checkpointing=True) == [*smaller, *rest]
    assert asked(1, batch_size=1, grad_accum_steps=8) == ["--activation_checkpointing", *rest]
    assert asked(1, batch_size=1, activation_checkpointing=True) == rest
    assert asked(2, grad_accum_steps=2) == [*smaller, "--activation_checkpointing", "--fsdp", *rest]
    assert asked(2, grad_accum_steps=2, fsdp=True) == [*smaller, "--activation_checkpointing", *rest]
    assert asked(2, grad_accum_steps=2, optimizer="muon") == [*smaller, "--activation_checkpointing", *rest]
    assert "--batch_size" not in asked(4, batch_size=1, grad_accum_steps=4)


def test_memory_that_is_full_is_one_error_and_the_checkpoints_stay(tiny_data, monkeypatch):
    real = train.train_step

    def update(run, i):
        if i == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(run, i)

    monkeypatch.setattr(train, "train_step", update)
    with pytest.raises(UserError) as caught:
        train_here(*QUIET, "--grad_accum_steps", 2)
    message = str(caught.value)
    assert message.startswith("cpu is out of memory at batch_size = 4, grad_accum_steps = 2; the peak was ")
    assert "--batch_size 2 --grad_accum_steps 4 (8 sequences = 256 tokens an update, as before)" in message
    assert "\n" not in message
    assert checkpoint.verify(Path("out/quickstart/ckpt/last"))["iter"] == 3
