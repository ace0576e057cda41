"""claim.py: one process at a time trains in a run's folder, and nobody's folder is taken from him."""

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from in_process import TINY, train_here
from processes import ROOT, command

import train
from config import TrainConfig, UserError
from flatgpt.runs import checkpoint, lock
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runs.lock import RunLock

RUN = Path("out/quickstart")
QUIET = ("--sample_tokens", 0)


def snapshot(folder: Path) -> dict:
    """What is in a folder, to the byte."""
    return {
        str(path): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
    }


@pytest.fixture
def owner(tiny_data):
    """A process that trains in out/quickstart, has saved, and stands still for now."""
    words = [sys.executable, str(ROOT / "train.py"), *TINY, *map(str, QUIET), "--save_interval", "10"]
    words += ["--max_iters", "100000", "--eval_interval", "100000", "--eval_batches", "1"]
    with open("printed.txt", "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not (RUN / "ckpt/last").exists():
            assert process.poll() is None, Path("printed.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{process.pid}/task")
        while any(") T" not in (task / "stat").read_text() for task in tasks.glob("*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def test_second_process_is_refused_touches_nothing_and_comes_after_a_crash(owner):
    before = snapshot(Path.cwd())
    expected = (
        f"{RUN} is in use by process {owner.pid} on {socket.gethostname()}: wait for it, stop it, or take another"
    )
    ways = [(), ("--resume",), ("--resume", "auto"), ("--resume", RUN / "ckpt/last"), ("--overwrite",)]
    for words in ways:
        with pytest.raises(UserError) as caught:
            train_here(*QUIET, *words)
        assert str(caught.value).startswith(expected), words
        assert snapshot(Path.cwd()) == before, words
    done = command("train", *TINY, "--overwrite", cwd=Path.cwd())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1
    assert snapshot(Path.cwd()) == before
    saved = checkpoint.read_state(RUN / "ckpt/last")["iter"]

    owner.kill()
    owner.wait()
    assert (RUN / ".lock").exists(), "it could not remove it"
    words = (*QUIET, "--lr_decay_iters", saved + 2, "--max_iters")
    train_here(*words, saved + 1, "--resume", "auto")
    train_here(*words, saved + 2, "--resume")  # and nothing is left of that one's in this process
    assert checkpoint.read_state(RUN / "ckpt/last")["iter"] == saved + 2


def test_overwrite_moves_the_old_folder_and_locks_the_new_one(tiny_data, monkeypatch):
    train_here(*QUIET)
    before, real, looked = snapshot(RUN), train.train_step, []

    def update(run, i):
        (old,) = Path("out").glob("quickstart.old-*")
        with RunLock(RUN) as another, pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
            another.acquire()
        with RunLock(old) as free:
            free.acquire()
        looked.append(i)
        return real(run, i)

    monkeypatch.setattr(train, "train_step", update)
    train_here(*QUIET, "--overwrite")
    (old,) = Path("out").glob("quickstart.old-*")
    assert looked == list(range(6))
    theirs = {key.replace(str(old), str(RUN)): value for key, value in snapshot(old).items()}
    assert theirs == before


def test_lock_follows_a_folder_that_is_moved_and_made_anew(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with RunLock(folder) as lock:
        lock.acquire()
        assert not folder.exists(), "a claim makes no folder"
        folder.mkdir()
        lock.acquire()
        lock.acquire()  # a second time costs nothing
        folder.rename(moved)
        folder.mkdir()
        with RunLock(folder) as other:
            lock.acquire()
            with pytest.raises(UserError, match="is in use by"):
                other.acquire()
        with RunLock(moved) as other:
            other.acquire()
    with RunLock(folder) as other:
        other.acquire()


def test_folder_of_another_that_came_in_its_place_is_not_taken_for_its_own(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    with RunLock(one) as lock, RunLock(two) as other:
        lock.acquire()
        other.acquire()
        one.rename(tmp_path / "away")
        two.rename(one)
        for _ in range(2):  # a refusal is no lock either
            with pytest.raises(UserError, match="is in use by"):
                lock.acquire()


def test_file_system_without_locks_is_a_warning(tiny_data, monkeypatch, capsys):
    def flock(*words):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    train_here(*QUIET, "--max_iters", 3)
    train_here(*QUIET, "--max_iters", 4, "--resume")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert (
        warnings
        == [f"warning: {RUN}/.lock cannot be locked (No locks available): no second process may train there"] * 2
    )
    assert checkpoint.read_state(RUN / "ckpt/last")["iter"] == 4


def test_run_that_fails_gives_its_folder_back(tiny_data, monkeypatch):
    def fails(run, i):
        raise UserError("no")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", fails)
        with pytest.raises(UserError, match="no"):
            train_here(*QUIET)
    train_here(*QUIET)


# ---------------------------------------------------------------------------------------------------------------------
# two that begin at once


def checkpoint_in(folder: Path) -> None:
    (folder / "ckpt/iter_000003").mkdir(parents=True)


def test_of_two_that_find_no_folder_one_gets_it(tmp_path):
    """Minutes of compiling may lie between the look and the first file: both trained, into each other's checkpoints."""
    folder = tmp_path / "new"
    for overwrite in (False, True):
        with RunLock(folder) as first, RunLock(folder) as second:
            first.acquire(), second.acquire()
            first.prepare_folder(overwrite)
            with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
                second.prepare_folder(overwrite)
            assert first.is_held()
        shutil.rmtree(folder)


def test_run_that_was_made_and_has_ended_meanwhile_is_left_alone(tmp_path):
    folder = tmp_path / "new"
    with RunLock(folder) as late:
        late.acquire()
        checkpoint_in(folder)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="another process has trained there meanwhile"):
                late.prepare_folder(overwrite)
            late.__exit__()
            late._file = None
    assert (folder / "ckpt/iter_000003").is_dir()


def test_folder_that_was_moved_away_is_no_place_to_begin_or_to_save_in(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder) as claimed:
        claimed.acquire()
        assert claimed.is_held()
        folder.rename(tmp_path / "moved")
        assert not claimed.is_held()
        with pytest.raises(UserError, match="was moved away by another process meanwhile"):
            claimed.prepare_folder(False)
        folder.mkdir()
        saver = CheckpointWriter(TrainConfig(out_dir=str(folder)), still_locked=claimed.is_held)
        saver.save({"iter": 1}, {"weights": {}, "train_state": {}})
        with pytest.raises(UserError, match="is no longer the folder that this run began in"):
            saver.wait()
        saver.close()
    assert not list(folder.glob("ckpt/*"))


def test_overwrite_moves_runs_only_and_not_where_we_are(in_tmp):
    plain, run = in_tmp / "plain", in_tmp / "run"
    (plain / "other").mkdir(parents=True)
    checkpoint_in(run)
    (run / "below").mkdir()
    for folder in (plain, run):
        with RunLock(folder) as claimed:
            claimed.acquire()
            claimed.prepare_folder(overwrite=True)
    assert (plain / "other").is_dir()
    assert not (run / "ckpt").exists()
    (old,) = in_tmp.glob("run.old-*")
    os.chdir(old / "below")
    with RunLock(Path("..")) as claimed:
        claimed.acquire()
        with pytest.raises(UserError, match="is where we are, and is not renamed"):
            claimed.prepare_folder(overwrite=True)
    assert (old / "ckpt/iter_000003").is_dir()


def test_file_where_checkpoints_go_is_noticed_before_training(tmp_path):
    (tmp_path / "ckpt").write_text("mine")
    with RunLock(tmp_path) as claimed:
        claimed.acquire()
        with pytest.raises(UserError, match="ckpt is a file, where checkpoints go"):
            claimed.prepare_folder(overwrite=False)
    assert (tmp_path / "ckpt").read_text() == "mine"


def test_config_of_the_users_own_is_kept(tiny_data):
    mine = RUN / "config.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# mine\nlr = 1e-3\n")
    train_here(*QUIET, "--config", mine, "--out_dir", RUN)
    (kept,) = RUN.glob("config.toml.old-*")
    assert kept.read_text() == "# mine\nlr = 1e-3\n"


def test_in_use_is_seen_and_nothing_is_touched(owner):
    before = snapshot(RUN)
    assert lock.in_use(RUN)
    assert snapshot(RUN) == before
    owner.kill()
    owner.wait()
    assert not lock.in_use(RUN)
    assert snapshot(RUN) == before
    assert not lock.in_use(Path("data"))
    assert not Path("data/.lock").exists()


def test_who_only_looks_keeps_nobody_out(tmp_path, monkeypatch):
    """A run that began while `train.py --list` looked at its folder would have been refused."""
    with open(tmp_path / ".lock", "w") as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        assert not lock.in_use(tmp_path)  # nor each other
        monkeypatch.setattr(time, "sleep", lambda seconds: looks.close())
        with RunLock(tmp_path) as claimed:
            claimed.acquire()
            assert lock.in_use(tmp_path)
