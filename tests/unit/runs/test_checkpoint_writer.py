"""CheckpointWriter: saves hold the values of one moment, follow one another, and a failed one has no consequences."""

import os
import shutil
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config import TrainConfig, UserError
from flatgpt.runs import checkpoint, checkpoint_writer
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext


class OtherRank(DistributedContext):
    """Rank 1 of 2, whose collectives return this rank's own values."""

    def __init__(self):
        super().__init__(rank=1, world=2)

    def all_reduce_max(self, *numbers: int) -> list[int]:
        return list(numbers)


def make_tensors(fill: float = 0.0, device: str = "cpu") -> dict:
    """Return nested dicts and lists of the kind that train.py saves."""
    moments = {"step": torch.tensor(fill), "exp_avg": torch.full((3, 4), fill, device=device)}
    groups = [{"lr": fill, "betas": (0.9, 0.99), "params": [0]}]
    return {
        "weights": {"w": torch.full((3, 4), fill, device=device), "b": torch.full((4,), fill, device=device)},
        "train_state": {
            "optimizer": {"state": {0: moments}, "param_groups": groups},
            "scaler": {},
            "row": {"iter": int(fill), "train_loss": fill},
        },
    }


def overwrite(tensors: dict, value: float) -> None:
    """Change tensors and dicts in place, as training does."""
    for tensor in (*tensors["weights"].values(), *tensors["train_state"]["optimizer"]["state"][0].values()):
        tensor.fill_(value)
    tensors["train_state"]["optimizer"]["param_groups"][0]["lr"] = value
    tensors["train_state"]["row"] |= {"iter": int(value), "train_loss": value}


def make_state(iteration: int) -> dict:
    return {"iter": iteration, "finished": False}


def assert_saved(folder: Path, value: float) -> None:
    """Assert that a checkpoint is valid and that all its values are of one moment."""
    checkpoint.verify(folder)
    saved = {"weights": load_file(folder / "model.safetensors"), "train_state": checkpoint.load_train_state(folder)}
    expected = make_tensors(value)
    torch.testing.assert_close(saved["weights"], expected["weights"], rtol=0, atol=0)
    states = [each["train_state"].pop("optimizer") for each in (saved, expected)]
    torch.testing.assert_close(states[0]["state"][0], states[1]["state"][0], rtol=0, atol=0)
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert saved["train_state"] == expected["train_state"]


def saved_iters(run_dir: Path) -> list[int]:
    return [checkpoint.read_state(folder)["iter"] for folder in checkpoint.checkpoints(run_dir)]


@pytest.fixture
def writer(tmp_path):
    """writer(ranks=SINGLE_PROCESS, key=value) -> CheckpointWriter for tmp_path. All are closed at the end."""
    made = []

    def make(ranks=SINGLE_PROCESS, still_locked=lambda: True, **settings) -> CheckpointWriter:
        config = TrainConfig(out_dir=str(tmp_path), **settings)
        made.append(CheckpointWriter(config, ranks, {"config": {}}, still_locked))
        return made[-1]

    yield make
    for each in made:
        each.close()


def in_thread_until_waiting(writer: CheckpointWriter, call, *args) -> threading.Thread:
    """Start a call in a thread, and return once it waits for the save in flight."""
    waiting, wait = threading.Event(), writer.wait
    writer.wait = lambda: waiting.set() or wait()
    thread = threading.Thread(target=call, args=args)
    thread.start()
    assert waiting.wait(60)
    return thread


# ---------------------------------------------------------------------------------------------------------------------
# what is saved


@pytest.mark.parametrize("next_call", ["allocate_buffers", "save"])
def test_save_holds_the_values_of_the_call(writer, gate, tmp_path, next_call):
    """Training changes everything while the thread writes; a second save or new buffers must wait for it."""
    held, saver, tensors, state = gate(checkpoint, "save"), writer(), make_tensors(1.0), make_state(1)
    saver.save(state, tensors)
    held.wait()
    overwrite(tensors, 2.0)
    state |= {"iter": 2, "finished": True}
    args = {"allocate_buffers": (tensors,), "save": (state, tensors)}[next_call]
    thread = in_thread_until_waiting(saver, getattr(saver, next_call), *args)
    held.open()
    thread.join(60)
    saver.wait()
    assert held.most == 1
    assert_saved(tmp_path / "ckpt/iter_000001", 1.0)
    assert checkpoint.read_state(tmp_path / "ckpt/iter_000001")["finished"] is False
    if next_call == "save":
        assert_saved(tmp_path / "ckpt/iter_000002", 2.0)


def test_buffers_are_allocated_once(writer, monkeypatch):
    """Fresh memory takes several times as long as a copy."""
    saver, made, empty = writer(), [], torch.empty
    saver.allocate_buffers(make_tensors())
    monkeypatch.setattr(torch, "empty", lambda *size, **settings: made.append(size) or empty(*size, **settings))
    for iteration in (1, 2):
        saver.save(make_state(iteration), make_tensors(float(iteration)))
    saver.wait()
    assert made == []


def test_changed_shapes_and_dtypes_are_saved(writer, tmp_path):
    saver, tensors = writer(), make_tensors(1.0)
    saver.save(make_state(1), tensors)
    tensors["weights"] = {"w": torch.arange(5.0), "b": torch.full((4,), 3, dtype=torch.int64), "c": torch.ones(2)}
    saver.save(make_state(2), tensors)
    saver.wait()
    saved = load_file(tmp_path / "ckpt/iter_000002/model.safetensors")
    torch.testing.assert_close(saved, tensors["weights"], rtol=0, atol=0)


def test_every_rank_gathers_all_tensors_in_the_same_order(writer, monkeypatch, tmp_path):
    """full_tensor is a collective: a rank that left one out would block the others. Only rank 0 writes."""
    gathered = []
    monkeypatch.setattr(checkpoint_writer, "full_tensor", lambda t: gathered.append(tuple(t.shape)) or t + 1)
    for iteration, ranks in ((5, SINGLE_PROCESS), (6, OtherRank())):
        saver = writer(ranks)
        saver.allocate_buffers(make_tensors())
        saver.save(make_state(iteration), make_tensors(1.0))
        saver.submit_after_save(Path.touch, tmp_path / f"after {iteration}")
        saver.wait()
    assert gathered[:8] == gathered[8:]
    assert len(gathered) == 16
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "after 5"}
    saved = load_file(tmp_path / "ckpt/last/model.safetensors")
    assert all((tensor == 2).all() for tensor in saved.values())


# ---------------------------------------------------------------------------------------------------------------------
# order and time


def test_work_after_a_save_runs_after_it_and_in_order(writer, gate, tmp_path):
    held, saver, done = gate(checkpoint, "save"), writer(), []
    saver.save(make_state(1), make_tensors(1.0))
    saver.submit_after_save(lambda: done.append(saved_iters(tmp_path)))
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 1)
    saver.submit_after_save(lambda: done.append(os.readlink(tmp_path / "ckpt/best")))
    held.wait()
    saver.check()  # does not wait
    assert done == []
    held.open()
    saver.close()  # waits
    assert done == [[1], "iter_000001"]


def test_newest_best_and_every_nth_are_kept(writer, tmp_path):
    """`best` moves in its turn, and no earlier save prunes its new checkpoint."""
    saver = writer(keep_checkpoints=2, keep_every=30)
    for iteration in (10, 20, 30, 40, 50):
        saver.save(make_state(iteration), make_tensors(float(iteration)))
        if iteration == 10:
            saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 10)
    saver.wait()
    assert saved_iters(tmp_path) == [50, 40, 30, 10]
    assert os.readlink(tmp_path / "ckpt/last") == "iter_000050"


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_saves_have_a_lower_priority_than_training(writer):
    found, saver = [], writer()
    saver.submit_after_save(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    saver.wait()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found == [min(own + 10, 19)]


def test_save_minutes_count_from_the_newest_save(writer, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    never, saver = writer(), writer(save_minutes=2.0)
    for seconds, due in ((0, False), (119, False), (120, True), (130, True), (249, False), (250, True)):
        if seconds == 249:
            saver.save(make_state(1), make_tensors())
        now[0] = 1000 + seconds
        assert saver.timer_due() is due
    assert not never.timer_due()


# ---------------------------------------------------------------------------------------------------------------------
# failures


def fail_saves(monkeypatch, error: Exception) -> None:
    def save(*args):
        raise error

    monkeypatch.setattr(checkpoint, "save", save)


@pytest.mark.parametrize("call", ["check", "wait", "allocate_buffers", "save"])
def test_failed_save_ends_the_run_at_the_next_call(writer, monkeypatch, call):
    saver = writer()
    fail_saves(monkeypatch, UserError("no room"))
    saver.save(make_state(1), make_tensors())
    saver.close()
    args = {"save": (make_state(2), make_tensors()), "allocate_buffers": (make_tensors(),)}.get(call, ())
    with pytest.raises(UserError, match="no room"):
        getattr(saver, call)(*args)
    saver.check()  # an error is raised once


@pytest.mark.parametrize("error", [UserError("no room"), OSError(28, "No space left on device", "x")])
def test_failed_save_can_be_a_warning(writer, monkeypatch, tmp_path, capsys, error):
    saver = writer(on_save_error="warn")
    with monkeypatch.context() as patch:
        fail_saves(patch, error)
        saver.save(make_state(1), make_tensors(1.0))
        saver.wait()
    assert saver.failure is error
    assert capsys.readouterr().err == f"warning: {error}. Training goes on (on_save_error = warn)\n"
    saver.save(make_state(2), make_tensors(2.0))
    saver.wait()
    assert saver.failure is None
    assert capsys.readouterr().err == ""
    assert_saved(tmp_path / "ckpt/last", 2.0)


@pytest.mark.parametrize("on_save_error", ["stop", "warn"])
def test_work_after_a_failed_save_is_skipped(writer, monkeypatch, tmp_path, on_save_error):
    """It ran: `best` led to nothing, its former checkpoint was pruned, and an older one was marked finished."""
    saver = writer(on_save_error=on_save_error, keep_checkpoints=1)
    saver.save(make_state(1), make_tensors(1.0))
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 1)
    saver.wait()
    fail_saves(monkeypatch, UserError("no room"))
    saver.save(make_state(2), make_tensors(2.0))
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 2)
    saver.submit_after_save(checkpoint.mark_finished, tmp_path / "ckpt/last")
    saver.close()
    assert os.readlink(tmp_path / "ckpt/best") == "iter_000001"
    assert checkpoint.read_state(tmp_path / "ckpt/last")["finished"] is False


@pytest.mark.parametrize("on_save_error", ["stop", "warn"])
def test_bugs_are_raised(writer, monkeypatch, on_save_error):
    fail_saves(monkeypatch, ZeroDivisionError())
    saver = writer(on_save_error=on_save_error)
    saver.save(make_state(1), make_tensors())
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_nothing_is_saved_in_a_folder_that_was_moved_away(writer, tmp_path):
    saver = writer(still_locked=lambda: False)
    saver.save(make_state(1), make_tensors())
    with pytest.raises(UserError, match="is no longer the folder that this run began in: nothing is saved"):
        saver.wait()
    assert not list(tmp_path.iterdir())


def test_disk_without_room_for_a_checkpoint(writer, monkeypatch, tmp_path, capsys):
    size = (12 + 4 + 1 + 12) * 4  # bytes of make_tensors()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size - 1))
    with pytest.raises(UserError, match=rf"^{tmp_path} has 0 MB free, a checkpoint of this run takes 0 MB: make room"):
        writer().allocate_buffers(make_tensors())
    saver = writer(on_save_error="warn")
    saver.allocate_buffers(make_tensors())
    assert saver.failure
    assert "make room, or take an --out_dir on another disk. Training goes on" in capsys.readouterr().err
    saver.save(make_state(1), make_tensors(1.0))
    saver.wait()
    assert saver.failure is None
    writer(OtherRank()).allocate_buffers(make_tensors())  # the other ranks do not look at the disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size))
    writer().allocate_buffers(make_tensors())


@pytest.mark.gpu
def test_buffers_of_cuda_tensors_are_pinned(writer, gate, monkeypatch, tmp_path):
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
    assert_saved(tmp_path / "ckpt/iter_000001", 1.0)
