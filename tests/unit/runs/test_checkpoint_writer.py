"""CheckpointWriter: saves hold the values of one moment, follow one another, and a failed one has no consequences."""

import os
import shutil
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from run_files import same, weights

from config import TrainConfig, UserError
from flatgpt.runs import checkpoint, checkpoint_writer
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runtime.distributed import DistributedContext


class OtherRank(DistributedContext):
    """Rank 1 of 2, whose collectives return this rank's own values."""

    def __init__(self):
        super().__init__(rank=1, world=2)

    def all_reduce_max(self, *numbers: int) -> list[int]:
        return list(numbers)


def make_tensors(fill: float = 0.0, device: str = "cpu") -> dict:
    """Return nested dicts and lists of the kind that train.py saves."""
    moments = {"step": torch.tensor(fill), "exp_avg": torch.full((3, 4), fill, device=device)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": fill, "betas": (0.9, 0.99), "params": [0]}]}
    return {
        "weights": {"w": torch.full((3, 4), fill, device=device), "b": torch.full((4,), fill, device=device)},
        "train_state": {"optimizer": optimizer, "scaler": {}, "row": {"iter": int(fill), "train_loss": fill}},
    }


def overwrite(tensors: dict, value: float) -> None:
    """Change tensors and dicts in place, as training does."""
    for tensor in (*tensors["weights"].values(), *tensors["train_state"]["optimizer"]["state"][0].values()):
        tensor.fill_(value)
    tensors["train_state"]["optimizer"]["param_groups"][0]["lr"] = value
    tensors["train_state"]["row"] |= {"iter": int(value), "train_loss": value}


def make_state(iteration: int) -> dict:
    return {"iter": iteration, "finished": False}


def assert_saved(run_dir: Path, value: float) -> None:
    """Assert that the newest checkpoint is valid and that all its values are of one moment."""
    last = run_dir / "ckpt/last"
    checkpoint.verify(last)
    assert same({"weights": weights(run_dir), "train_state": checkpoint.load_train_state(last)}, make_tensors(value))


@pytest.fixture
def writer(tmp_path):
    """writer(key=value) -> CheckpointWriter for tmp_path. All are closed at the end."""
    made = []

    def make(*ranks: DistributedContext, **settings) -> CheckpointWriter:
        config = TrainConfig(out_dir=str(tmp_path), **settings)
        made.append(CheckpointWriter(config, *ranks, metadata={"config": {}}))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def fail_saves(monkeypatch):
    """fail_saves(error): each save from now on raises the error."""

    def install(error: Exception) -> None:
        def save(*args):
            raise error

        monkeypatch.setattr(checkpoint, "save", save)

    return install


@pytest.mark.parametrize("next_call", ["allocate_buffers", "save"])
def test_save_holds_the_values_of_the_call(writer, gate, tmp_path, next_call):
    """Training changes everything while the thread writes; a second save or new buffers must wait for it."""
    held, saver, tensors, state = gate(checkpoint, "save"), writer(), make_tensors(1.0), make_state(1)
    saver.save(state, tensors)
    held.wait()
    overwrite(tensors, 2.0)
    state |= {"iter": 2, "finished": True}
    saver.check()  # does not wait
    waiting, wait = threading.Event(), saver.wait
    saver.wait = lambda: waiting.set() or wait()
    args = {"allocate_buffers": (tensors,), "save": (state, tensors)}[next_call]
    thread = threading.Thread(target=getattr(saver, next_call), args=args)
    thread.start()
    assert waiting.wait(60)
    held.open()
    thread.join(60)
    saver.wait()
    assert held.most == 1
    assert_saved(tmp_path, 2.0 if next_call == "save" else 1.0)
    assert checkpoint.read_state(tmp_path / "ckpt/iter_000001")["finished"] is False


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_saves_have_a_lower_priority_than_training(writer):
    found, saver = [], writer()
    saver.submit_after_save(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    saver.wait()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found == [min(own + 10, 19)]


def test_save_minutes_count_from_the_newest_save(writer, clock):
    now = clock(checkpoint_writer)
    never, saver = writer(), writer(save_minutes=2.0)
    for seconds, due in ((119, False), (1, True), (10, True)):
        now.now += seconds
        assert saver.timer_due() is due
    saver.save(make_state(1), make_tensors())
    assert not saver.timer_due()
    assert not never.timer_due()


# ---------------------------------------------------------------------------------------------------------------------
# failures


@pytest.mark.parametrize("call", ["check", "allocate_buffers", "save"])
def test_failed_save_ends_the_run_at_the_next_call(writer, fail_saves, call):
    saver = writer()
    fail_saves(UserError("no room"))
    saver.save(make_state(1), make_tensors())
    saver.close()
    args = {"save": (make_state(2), make_tensors()), "allocate_buffers": (make_tensors(),)}.get(call, ())
    with pytest.raises(UserError, match="no room"):
        getattr(saver, call)(*args)
    saver.check()  # an error is raised once


def test_failed_save_can_be_a_warning(writer, fail_saves, monkeypatch, tmp_path, capsys):
    real, saver, error = checkpoint.save, writer(on_save_error="warn"), OSError(28, "No space left on device", "x")
    fail_saves(error)
    saver.save(make_state(1), make_tensors(1.0))
    saver.wait()
    assert saver.failure is error
    assert capsys.readouterr().err == f"warning: {error}. Training continues (on_save_error = warn)\n"
    monkeypatch.setattr(checkpoint, "save", real)
    saver.save(make_state(2), make_tensors(2.0))
    saver.wait()
    assert (saver.failure, capsys.readouterr().err) == (None, "")
    assert_saved(tmp_path, 2.0)


@pytest.mark.parametrize("on_save_error", ["stop", "warn"])
def test_work_after_a_failed_save_is_skipped(writer, fail_saves, tmp_path, on_save_error):
    """It ran: `best` led to nothing, its former checkpoint was pruned, and an older one was marked finished."""
    saver = writer(on_save_error=on_save_error, keep_checkpoints=1)
    saver.save(make_state(1), make_tensors(1.0))
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 1)
    saver.wait()
    fail_saves(UserError("no room"))
    saver.save(make_state(2), make_tensors(2.0))
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 2)
    saver.submit_after_save(checkpoint.mark_finished, tmp_path / "ckpt/last", {})
    saver.close()
    assert os.readlink(tmp_path / "ckpt/best") == "iter_000001"
    assert checkpoint.read_state(tmp_path / "ckpt/last")["finished"] is False


def test_bugs_are_raised(writer, fail_saves):
    fail_saves(ZeroDivisionError())
    saver = writer(on_save_error="warn")
    saver.save(make_state(1), make_tensors())
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_disk_without_room_for_a_checkpoint(writer, monkeypatch, capsys):
    """Other ranks do not look at the disk."""
    usage = namedtuple("usage", "total used free")(0, 0, (12 + 4 + 1 + 12) * 4 - 1)  # a byte less than make_tensors()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    saver = writer(on_save_error="warn")
    saver.allocate_buffers(make_tensors())
    assert saver.failure
    assert "free disk space, or choose an --out_dir on another disk. Training continues" in capsys.readouterr().err
    writer(OtherRank()).allocate_buffers(make_tensors())


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on CUDA."""

    is_cuda = True


def test_host_memory_that_cannot_be_pinned_is_a_note(writer, monkeypatch, tmp_path, capsys):
    """And from then on it is not tried again. Saves hold the same values."""
    real, asked = torch.empty, []

    def empty(*args, pin_memory=False, **settings):
        if pin_memory:
            asked.append(args)
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return real(*args, **settings)

    monkeypatch.setattr(torch, "empty", empty)
    saver, tensors = writer(), make_tensors(1.0)
    saver.allocate_buffers({"weights": {name: t.as_subclass(OnCuda) for name, t in tensors["weights"].items()}})
    said = "note: saves wait longer, because host memory cannot be pinned: CUDA error: out of memory\n"
    assert (capsys.readouterr().err, len(asked)) == (said, 1)
    saver.save(make_state(1), tensors)
    saver.wait()
    assert_saved(tmp_path, 1.0)


def test_a_refused_priority_fails_no_save(writer, monkeypatch, tmp_path):
    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refused)
    saver = writer()
    saver.save(make_state(1), make_tensors(1.0))
    saver.wait()
    assert_saved(tmp_path, 1.0)


@pytest.mark.gpu
def test_buffers_of_cuda_tensors_are_pinned(writer, gate, tmp_path):
    held, saver, tensors, pinned = gate(checkpoint, "save"), writer(), make_tensors(1.0, "cuda"), []
    save = held.function
    held.function = lambda *args: pinned.append(args[2]["w"].is_pinned()) or save(*args)
    saver.allocate_buffers(tensors)
    saver.save(make_state(1), tensors)
    overwrite(tensors, 2.0)
    torch.cuda.synchronize()
    held.open()
    saver.wait()
    assert pinned == [True]
    assert_saved(tmp_path, 1.0)
