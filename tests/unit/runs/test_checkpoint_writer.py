"""saver.py: what is saved is what was there, saves are one after the other, and what becomes of one that fails."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import TINY, train_here
from processes import ROOT
from safetensors.torch import load_file
from test_train import rows, same, weights

import train
from config import TrainConfig, UserError
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint_writer import CheckpointWriter

Usage = namedtuple("Usage", "total used free")  # what shutil.disk_usage gives


def parts(fill: float = 0.0, device: str = "cpu") -> dict:
    """As train.checkpoint_state makes them: nested dicts and lists, some of their tensors on the device."""
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


def fill_with(value: float, there: dict) -> None:
    """What training does to its tensors and dicts, in place."""
    for tensor in (*there["weights"].values(), *there["train_state"]["optimizer"]["state"][0].values()):
        tensor.fill_(value)
    there["train_state"]["optimizer"]["param_groups"][0]["lr"] = value
    there["train_state"]["row"] |= {"train_loss": value, "val_loss": value}


def state(iteration: int) -> dict:
    return {"iter": iteration, "config": {}, "finished": False}


def expect(folder: Path, value: float) -> None:
    """The checkpoint is whole, and all in it is of the same moment."""
    checkpoint.verify(folder)
    assert same(load_file(folder / "model.safetensors"), parts(value)["weights"])
    saved, expected = checkpoint.load_train_state(folder), parts(value)["train_state"]
    assert same(saved["optimizer"]["state"][0], expected["optimizer"]["state"][0])
    assert saved["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    assert saved["row"] == expected["row"]


def iters(run: Path) -> list[int]:
    return [checkpoint.read_state(folder)["iter"] for folder in checkpoint.checkpoints(run)]


@pytest.fixture
def start(tmp_path):
    """start(key=value, writes=, whole=) makes a CheckpointWriter for tmp_path; all of them are closed in the end."""
    made = []

    def make(writes=True, whole=lambda tensor: tensor, **keys) -> CheckpointWriter:
        made.append(CheckpointWriter(TrainConfig(out_dir=str(tmp_path), **keys), writes, whole))
        return made[-1]

    yield make
    for saver in made:
        saver.close()


class Gate:
    """Holds the real checkpoint.save up, before it looks at anything, until it is opened."""

    def __init__(self, real):
        self.real, self.opened, self.reached = real, threading.Event(), threading.Event()
        self.running, self.most, self.broken = 0, 0, None

    def __call__(self, *args, **kwargs):
        self.running += 1
        self.most = max(self.most, self.running)
        self.reached.set()
        try:
            assert self.opened.wait(60)
            if self.broken:
                raise self.broken
            return self.real(*args, **kwargs)
        finally:
            self.running -= 1


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(checkpoint.save)
    monkeypatch.setattr(checkpoint, "save", gate)
    yield gate
    gate.opened.set()


def beside(saver: CheckpointWriter, call: Callable, *args) -> threading.Thread:
    """Begin the call in a thread of its own, until it waits for the save in flight, or has ended."""
    waiting, wait = threading.Event(), saver.wait
    saver.wait = lambda: waiting.set() or wait()
    thread = threading.Thread(target=call, args=args)
    thread.start()
    while thread.is_alive() and not waiting.wait(0.01):
        pass
    return thread


# ---------------------------------------------------------------------------------------------------------------------
# what is saved


def test_saved_is_what_was_there_at_the_time(start, gate, tmp_path):
    """Training goes on while the thread writes: in tensors, in the row, in the optimizer's groups, in the state."""
    saver, there, said = start(), parts(1.0), state(1)
    saver.save(said, there)
    assert gate.reached.wait(60)
    fill_with(2.0, there)
    said["finished"] = True
    gate.opened.set()
    saver.wait()
    expect(tmp_path / "ckpt/iter_000001", 1.0)
    assert checkpoint.read_state(tmp_path / "ckpt/last")["finished"] is False


def test_buffers_made_while_a_save_is_in_flight_are_not_written_over(start, gate, tmp_path):
    """A run that goes on from another run's checkpoint saves before its first update, and makes its buffers after
    that: what was then in the thread's hands became the state of one update later, under a fitting SHA-256."""
    saver, there = start(), parts(1.0)
    saver.save(state(1), there)
    assert gate.reached.wait(60)
    fill_with(2.0, there)
    reserving = beside(saver, saver.allocate_buffers, there)
    gate.opened.set()
    reserving.join(60)
    saver.wait()
    expect(tmp_path / "ckpt/iter_000001", 1.0)


def test_one_save_at_a_time(start, gate, tmp_path):
    """The second one waits, and its tensors are not copied before: the buffers belong to the first."""
    saver, there = start(), parts(1.0)
    saver.save(state(1), there)
    assert gate.reached.wait(60)
    fill_with(2.0, there)
    there["train_state"]["row"] = {"iter": 2, "train_loss": 2.0}
    second = beside(saver, saver.save, state(2), there)
    assert second.is_alive()
    gate.opened.set()
    second.join(60)
    assert not second.is_alive()
    saver.wait()
    assert gate.most == 1
    expect(tmp_path / "ckpt/iter_000001", 1.0)
    expect(tmp_path / "ckpt/iter_000002", 2.0)


def test_buffers_are_made_once(start, gate, monkeypatch):
    """Finding fresh memory takes several times as long as a copy."""
    gate.opened.set()
    saver, seen, made = start(), [], []
    real, empty = gate.real, torch.empty
    monkeypatch.setattr(gate, "real", lambda *args: seen.append((args[2], args[3])) or real(*args))
    saver.allocate_buffers(parts())
    monkeypatch.setattr(torch, "empty", lambda *size, **how: made.append(size) or empty(*size, **how))
    there = parts(1.0)
    for iteration in (1, 2):
        saver.save(state(iteration), there)
    saver.wait()
    assert made == []
    (first, first_state), (second, second_state) = seen
    moments = [train_state["optimizer"]["state"][0]["exp_avg"] for train_state in (first_state, second_state)]
    for a, b, own in [*((first[k], second[k], there["weights"][k]) for k in first), (*moments, torch.empty(1))]:
        assert a.data_ptr() == b.data_ptr() != own.data_ptr()


def test_tensor_of_another_shape_or_dtype_gets_a_buffer_of_its_own(start, tmp_path):
    saver, there = start(), parts(1.0)
    saver.save(state(1), there)
    there["weights"] = {"w": torch.arange(5.0), "b": torch.full((4,), 3, dtype=torch.int64), "c": torch.ones(2)}
    saver.save(state(2), there)
    saver.wait()
    saved = load_file(tmp_path / "ckpt/iter_000002/model.safetensors")
    assert same(saved, there["weights"])
    assert saved["b"].dtype == torch.int64  # which torch.equal does not ask


def test_sharded_tensors_are_put_together_on_every_rank_in_the_same_order(start, tmp_path):
    """whole() is a collective: a rank that left one out would leave the others waiting."""
    seen = {True: [], False: []}
    for writes in (True, False):
        saver = start(writes, lambda tensor, order=seen[writes]: order.append(tuple(tensor.shape)) or tensor + 1)
        saver.allocate_buffers(parts(1.0))
        saver.save(state(5 if writes else 6), parts(1.0))
        saver.submit_after_save(Path.touch, tmp_path / f"then of {writes}")
        saver.wait()
    assert seen[True] == seen[False]
    assert len(seen[True]) == 2 * 4
    assert iters(tmp_path) == [5]
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt", "then of True"}
    saved = load_file(tmp_path / "ckpt/last/model.safetensors")
    assert same(saved, {"w": torch.full((3, 4), 2.0), "b": torch.full((4,), 2.0)})


# ---------------------------------------------------------------------------------------------------------------------
# when, and in which order


def test_what_comes_after_a_save_comes_after_it_and_in_order(start, gate, tmp_path):
    saver, done = start(), []
    saver.save(state(1), parts(1.0))
    saver.submit_after_save(lambda word: done.append((word, iters(tmp_path))), "first")
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 1)
    saver.submit_after_save(lambda word: done.append((word, os.readlink(tmp_path / "ckpt/best"))), "second")
    assert gate.reached.wait(60)
    assert done == []
    gate.opened.set()
    saver.wait()
    assert done == [("first", [1]), ("second", "iter_000001")]


def test_newest_best_and_every_nth_are_kept(start, tmp_path):
    """K + 3 saves of one run; `best` moves in its turn, and no save before it prunes what it will lead to."""
    saver = start(keep_checkpoints=2, keep_every=30)
    for iteration in (10, 20, 30, 40, 50):
        saver.save(state(iteration), parts(iteration))
        if iteration == 10:
            saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 10)
    saver.wait()
    assert iters(tmp_path) == [50, 40, 30, 10]
    assert os.readlink(tmp_path / "ckpt/last") == "iter_000050"
    for iteration in (10, 30, 50):
        expect(tmp_path / f"ckpt/iter_{iteration:06d}", float(iteration))


def test_check_waits_for_nothing_and_close_for_all(start, gate, tmp_path):
    saver, found = start(), []
    saver.save(state(1), parts(1.0))
    saver.submit_after_save(Path.touch, tmp_path / "then")
    saver.check()  # while the gate is closed
    assert not (tmp_path / "then").exists()
    closing = threading.Thread(
        target=lambda: (saver.close(), found.extend([iters(tmp_path), (tmp_path / "then").exists()]))
    )
    closing.start()
    with contextlib.suppress(RuntimeError):  # no new work is taken: it is closing
        while closing.is_alive():
            saver.submit_after_save(time.sleep, 0)
    gate.opened.set()
    closing.join(60)
    assert found == [[1], True]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_saves_have_a_lower_priority_than_training(start):
    found, saver = [], start()
    saver.submit_after_save(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    saver.wait()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found == [min(own + 10, 19)]


def test_minutes_between_saves(start, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert not start().timer_due()  # save_minutes = none
    saver = start(save_minutes=2.0)
    for passed, due in ((0.0, False), (119.0, False), (120.0, True), (130.0, True)):
        now[0] = 1000 + passed
        assert saver.timer_due() is due
    saver.save(state(1), parts())
    assert not saver.timer_due()
    now[0] = 1130 + 119
    assert not saver.timer_due()
    now[0] = 1130 + 120
    assert saver.timer_due()


# ---------------------------------------------------------------------------------------------------------------------
# what fails


def test_failed_save_ends_the_run_at_the_next_check(start, gate):
    saver, gate.broken = start(), UserError("no room")
    saver.save(state(1), parts())
    assert gate.reached.wait(60)
    saver.check()  # still in flight
    gate.opened.set()
    saver.close()
    with pytest.raises(UserError, match="no room"):
        saver.check()
    saver.check()  # it is said once


@pytest.mark.parametrize("last", ["save", "wait", "allocate_buffers"])
def test_failed_save_ends_the_run_wherever_it_is_waited_for(start, gate, tmp_path, last):
    gate.opened.set()
    saver, gate.broken = start(), UserError("no room")
    saver.save(state(1), parts())
    calls = {"save": (state(2), parts()), "wait": (), "allocate_buffers": (parts(),)}
    with pytest.raises(UserError, match="no room"):
        getattr(saver, last)(*calls[last])
    gate.broken = None
    saver.save(state(3), parts())  # it is said once
    saver.wait()
    assert iters(tmp_path) == [3]


@pytest.mark.parametrize("why", [UserError("no room"), OSError(28, "No space left on device", "x")])
def test_failed_save_can_be_a_warning(start, gate, tmp_path, capsys, why):
    gate.opened.set()
    saver, gate.broken = start(on_save_error="warn"), why
    saver.save(state(1), parts(1.0))
    saver.wait()
    assert saver.failure is why
    assert capsys.readouterr().err == f"warning: {why}. Training goes on (on_save_error = warn)\n"
    gate.broken = None
    saver.save(state(2), parts(2.0))
    saver.wait()
    assert saver.failure is None
    assert capsys.readouterr().err == ""
    expect(tmp_path / "ckpt/last", 2.0)


@pytest.mark.parametrize("on_save_error", ["stop", "warn"])
def test_what_would_come_after_a_failed_save_is_left_out(start, gate, tmp_path, on_save_error):
    """It went on as if the save had worked: the link `best` was removed (it would have led to nothing), the best
    checkpoint pruned soon after, the one before marked finished, and the run ended with exit code 0."""
    gate.opened.set()
    saver = start(on_save_error=on_save_error, keep_checkpoints=1)
    saver.save(state(1), parts(1.0))
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 1)
    saver.wait()
    gate.broken = UserError("no room")
    saver.save(state(2), parts(2.0))
    saver.submit_after_save(checkpoint.set_link, tmp_path, "best", 2)
    saver.submit_after_save(checkpoint.mark_finished, tmp_path / "ckpt/last")
    if on_save_error == "stop":
        with pytest.raises(UserError, match="no room"):
            saver.wait()
    else:
        saver.wait()
        assert saver.failure is gate.broken
    saver.close()
    assert os.readlink(tmp_path / "ckpt/best") == "iter_000001"
    assert checkpoint.read_state(tmp_path / "ckpt/last")["finished"] is False


@pytest.mark.parametrize("on_save_error", ["stop", "warn"])
def test_mistakes_of_the_program_are_not_swallowed(start, gate, on_save_error):
    gate.opened.set()
    saver, gate.broken = start(on_save_error=on_save_error), ZeroDivisionError()
    saver.save(state(1), parts())
    with pytest.raises(ZeroDivisionError):
        saver.wait()


# ---------------------------------------------------------------------------------------------------------------------
# room


@pytest.fixture
def room(monkeypatch):
    """room(n): the disk has n times as many bytes free as parts() take."""
    size = (12 + 4 + 1 + 12) * 4
    return lambda times: monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(times * size)))


def test_room_for_less_than_one_checkpoint(start, room, tmp_path, capsys):
    room(0.99)
    with pytest.raises(UserError, match=rf"^{tmp_path} has 0 MB free, a checkpoint of this run takes 0 MB: make room"):
        start().allocate_buffers(parts())
    saver = start(on_save_error="warn")
    saver.allocate_buffers(parts())
    assert "warning: " in (said := capsys.readouterr().err)
    assert "make room, or take an --out_dir on another disk. Training goes on" in said
    assert saver.failure
    saver.save(state(1), parts(1.0))  # there was room after all
    saver.wait()
    assert saver.failure is None
    start(writes=False).allocate_buffers(parts())  # no business of that rank's


@pytest.mark.parametrize(
    ("keys", "there", "more"),
    [
        ({"keep_checkpoints": 2}, 0, 3),  # the newest two and best
        ({"keep_checkpoints": 2}, 2, 1),
        ({"keep_checkpoints": 1}, 2, 0),
        ({"keep_checkpoints": 2, "max_iters": 100, "keep_every": 10}, 0, 13),
    ],
)
def test_room_for_fewer_than_will_be_kept(start, room, tmp_path, capsys, keys, there, more):
    """One more is there while it is written."""
    for iteration in range(there):
        checkpoint.save(tmp_path, state(iteration), **parts(), keep=9)
    room(more + 1)
    start(**keys).allocate_buffers(parts())
    assert capsys.readouterr().out == ""
    room(more + 0.99)
    if more:
        start(**keys).allocate_buffers(parts())
        assert re.search(
            rf"^note: .* MB free; up to {more} more checkpoints of 0 MB will be kept", capsys.readouterr().out
        )


# ---------------------------------------------------------------------------------------------------------------------
# a real run


def test_run_from_another_runs_checkpoint_saves_it_as_it_was(tiny_data, monkeypatch):
    """The same as above, end to end: the save lasts until training waits for it after its first update."""
    first = train_here("--max_iters", 3)
    save, wait, update, updates, go = checkpoint.save, CheckpointWriter.wait, train.train_step, [], threading.Event()

    def counted(run, i):
        updates.append(i)
        if len(updates) == 2:  # it has not waited
            go.set()
        return update(run, i)

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(CheckpointWriter, "wait", lambda saver: (updates and go.set()) or wait(saver))
    monkeypatch.setattr(checkpoint, "save", lambda *args: go.wait(60) and save(*args))
    fork = train_here("--resume", first, "--out_dir", "out/fork", "--max_iters", 5, "--keep_checkpoints", 9)
    before, after = (load_file(run / "ckpt/iter_000003/model.safetensors") for run in (first, fork))
    assert same(before, after)
    assert checkpoint.load_train_state(fork / "ckpt/iter_000003")["row"]["iter"] == 3


def test_last_checkpoint_that_cannot_be_written_is_not_the_end_of_a_good_run(tiny_data, monkeypatch, capsys):
    """Warned of, gone on, and yet: the run's weights are nowhere. `best` and `last` lead where they led."""
    real = checkpoint.save

    def full(run_dir, state, *rest):
        if state["iter"] == 6:
            raise UserError("no room")
        return real(run_dir, state, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match="the run ends at iter 6, and its last checkpoint is not there: no room"):
        train_here("--on_save_error", "warn", "--lr", "5e-3")
    run = Path("out/quickstart")
    assert {p.name: os.readlink(p) for p in run.glob("ckpt/*") if p.is_symlink()} == {
        "best": "iter_000003",
        "last": "iter_000003",
    }
    assert checkpoint.read_state(run / "ckpt/last")["finished"] is False
    assert float(rows(run)[-1]["val_loss"]) < float(rows(run)[3]["val_loss"])  # it would have been the best
    monkeypatch.setattr(checkpoint, "save", real)
    train_here("--on_save_error", "warn", "--lr", "5e-3", "--resume")
    assert checkpoint.verify(run / "ckpt/best")["iter"] == 6


# ---------------------------------------------------------------------------------------------------------------------
# a disk that fills

LARGER = ("--n_embd", 64, "--sample_tokens", 0, "--max_iters", 15)  # 1.5 MB a checkpoint


class Disk:
    """A small disk, mounted where only those see it whom `holder` keeps a place for.

    Attributes:
        folder: as they see it.
        seen: the same, from here.
    """

    def __init__(self, folder: Path, how: list[str], size: str):
        script = 'mount -t tmpfs -o size="$1" none "$2" && echo ready && exec sleep 600'
        self.folder, self.how = folder, how
        self.holder = subprocess.Popen(
            ["unshare", *how, "sh", "-c", script, "sh", size, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.ready = self.holder.stdout.readline() == b"ready\n"
        self.seen = Path(f"/proc/{self.holder.pid}/root{folder}")

    def inside(self, *words) -> list[str]:
        """The command that runs a command where the disk is."""
        user = ["--user", "--preserve-credentials"] if "--user" in self.how else []
        return ["nsenter", *user, "--mount", "--target", str(self.holder.pid), *map(str, words)]

    def train(self, *words) -> subprocess.CompletedProcess:
        """train.py, its run on the disk; what it prints lies in printed.txt and said.txt of the current folder."""
        call = [sys.executable, ROOT / "train.py", *TINY, *LARGER, "--out_dir", self.folder / "run", *words]
        there = self.inside("env", "-C", Path.cwd(), *call)
        with open("printed.txt", "w") as out, open("said.txt", "w") as err:
            done = subprocess.run(there, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=300)
        return subprocess.CompletedProcess(
            there, done.returncode, Path("printed.txt").read_text(), Path("said.txt").read_text()
        )

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()


@pytest.fixture
def disk(tiny_data, tmp_path):
    """disk(size): a Disk of that size, 4m for one."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no unshare or nsenter here (Linux, util-linux)")
    made = []

    def make(size: str) -> Disk:
        (tmp_path / "disk").mkdir()
        for how in (["--mount"], ["--user", "--mount", "--map-root-user"]):
            made.append(Disk(tmp_path / "disk", how, size))
            if made[-1].ready:
                return made[-1]
        pytest.skip("unshare may not mount here, neither as it is nor with --user")

    yield make
    for one in made:
        one.close()


@pytest.mark.slow
def test_full_disk_ends_the_run_and_with_room_it_goes_on(disk, tmp_path):
    place = disk("3500k")
    words = ("--keep_checkpoints", 9, "--resume", "auto")
    done = place.train(*words)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^note: .* MB free; up to 10 more checkpoints of 1 MB will be kept", done.stdout, re.MULTILINE)
    assert re.fullmatch(
        rf"error: checkpoint {place.folder}/run/ckpt/iter_000009 could not be written: "
        r"(model\.safetensors: .*No space left on device.*|train_state\.pt: only a part of it was taken: a full .*)\. "
        r"1\.5 MB are needed, 0\.\d MB were written, 0\.\d MB are free now\. "
        r"Still there: iter 6, iter 3\. Make room; a run that ended goes on with --resume\n",
        done.stderr,
    ), done.stderr
    run = place.seen / "run"
    assert [checkpoint.verify(folder)["iter"] for folder in checkpoint.checkpoints(run)] == [6, 3]
    assert {p.name for p in (run / "ckpt").iterdir()} == {"last", "best", "iter_000006", "iter_000003"}
    subprocess.run(place.inside("mount", "-o", "remount,size=16m", place.folder), check=True)
    done = place.train(*words)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {place.folder}/run/ckpt/iter_000006" in done.stdout
    whole = train_here(*LARGER, "--keep_checkpoints", 9, "--out_dir", "out/whole")
    assert iters(run) == [15, 12, 9, 6, 3]
    assert same(weights(run), weights(whole))
    assert rows(run) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_full_disk_can_be_a_warning(disk, tmp_path, room):
    """A thread makes room, or nobody does: the checkpoint of the end is what the exit code is about."""
    place, stop = disk("9m"), threading.Event()
    (place.seen / "ballast").write_bytes(bytes(7_000_000))

    def make_room() -> None:
        while not stop.wait(0.02):
            if Path("said.txt").exists() and Path("said.txt").read_text().count("could not be written") >= 2:
                (place.seen / "ballast").unlink()
                return

    helper = threading.Thread(target=make_room)
    if room:
        helper.start()
    try:
        words = ("--max_iters", 1000 if room else 60, "--eval_interval", 20, "--keep_checkpoints", 1)
        done = place.train("--on_save_error", "warn", "--eval_batches", 2, *words)
    finally:
        stop.set()
    run, said = place.seen / "run", done.stderr.splitlines()
    error = None if room else said.pop()
    assert len(said) >= 2
    for line in said:
        assert re.match(
            r"warning: checkpoint .*could not be written: .* Training goes on \(on_save_error = warn\)$", line
        )
    first = int(re.search(r"iter_(\d+) could not be written", said[0])[1])
    assert int(rows(run)[-1]["iter"]) == (1000 if room else 60)  # metrics.csv has its page of the disk
    if room:
        assert done.returncode == 0, done.stderr
        assert checkpoint.verify(run / "ckpt/last")["iter"] == 1000
        assert checkpoint.read_state(run / "ckpt/last")["finished"]
    else:
        assert done.returncode == 2
        assert error.startswith("error: the run ends at iter 60, and its last checkpoint is not there: checkpoint ")
        assert checkpoint.verify(run / "ckpt/last")["iter"] == first - 20
        assert not checkpoint.read_state(run / "ckpt/last")["finished"]


# ---------------------------------------------------------------------------------------------------------------------
# what only a GPU shows


@pytest.mark.gpu
def test_buffers_of_a_gpus_tensors_are_pinned(start, gate, tmp_path):
    saver, there, seen = start(), parts(1.0, "cuda"), []
    real = gate.real
    gate.real = lambda *args: seen.append(args[2]["w"]) or real(*args)
    saver.allocate_buffers(there)
    saver.save(state(1), there)
    fill_with(2.0, there)
    torch.cuda.synchronize()
    gate.opened.set()
    saver.wait()
    assert seen[0].is_pinned()
    assert not seen[0].is_cuda
    expect(tmp_path / "ckpt/iter_000001", 1.0)
