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
from flatgpt.runs.checkpoint_writer import Saver
from flatgpt.runs.lock import Claim

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
    before, real, looked = snapshot(RUN), train.update, []

    def update(run, i):
        (old,) = Path("out").glob("quickstart.old-*")
        with Claim(RUN) as another, pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
            another.take()
        with Claim(old) as free:
            free.take()
        looked.append(i)
        return real(run, i)

    monkeypatch.setattr(train, "update", update)
    train_here(*QUIET, "--overwrite")
    (old,) = Path("out").glob("quickstart.old-*")
    assert looked == list(range(6))
    theirs = {key.replace(str(old), str(RUN)): value for key, value in snapshot(old).items()}
    assert theirs == before


def test_lock_follows_a_folder_that_is_moved_and_made_anew(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with Claim(folder) as lock:
        lock.take()
        assert not folder.exists(), "a claim makes no folder"
        folder.mkdir()
        lock.take()
        lock.take()  # a second time costs nothing
        folder.rename(moved)
        folder.mkdir()
        with Claim(folder) as other:
            lock.take()
            with pytest.raises(UserError, match="is in use by"):
                other.take()
        with Claim(moved) as other:
            other.take()
    with Claim(folder) as other:
        other.take()


def test_folder_of_another_that_came_in_its_place_is_not_taken_for_its_own(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    with Claim(one) as lock, Claim(two) as other:
        lock.take()
        other.take()
        one.rename(tmp_path / "away")
        two.rename(one)
        for _ in range(2):  # a refusal is no lock either
            with pytest.raises(UserError, match="is in use by"):
                lock.take()


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
        patch.setattr(train, "update", fails)
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
        with Claim(folder) as first, Claim(folder) as second:
            first.take(), second.take()
            first.enter(overwrite)
            with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
                second.enter(overwrite)
            assert first.held()
        shutil.rmtree(folder)


def test_run_that_was_made_and_has_ended_meanwhile_is_left_alone(tmp_path):
    folder = tmp_path / "new"
    with Claim(folder) as late:
        late.take()
        checkpoint_in(folder)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="another process has trained there meanwhile"):
                late.enter(overwrite)
            late.__exit__()
            late._file = None
    assert (folder / "ckpt/iter_000003").is_dir()


def test_folder_that_was_moved_away_is_no_place_to_begin_or_to_save_in(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Claim(folder) as claimed:
        claimed.take()
        assert claimed.held()
        folder.rename(tmp_path / "moved")
        assert not claimed.held()
        with pytest.raises(UserError, match="was moved away by another process meanwhile"):
            claimed.enter(False)
        folder.mkdir()
        saver = Saver(TrainConfig(out_dir=str(folder)), owned=claimed.held)
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
        with Claim(folder) as claimed:
            claimed.take()
            claimed.enter(overwrite=True)
    assert (plain / "other").is_dir()
    assert not (run / "ckpt").exists()
    (old,) = in_tmp.glob("run.old-*")
    os.chdir(old / "below")
    with Claim(Path("..")) as claimed:
        claimed.take()
        with pytest.raises(UserError, match="is where we are, and is not renamed"):
            claimed.enter(overwrite=True)
    assert (old / "ckpt/iter_000003").is_dir()


def test_file_where_checkpoints_go_is_noticed_before_training(tmp_path):
    (tmp_path / "ckpt").write_text("mine")
    with Claim(tmp_path) as claimed:
        claimed.take()
        with pytest.raises(UserError, match="ckpt is a file, where checkpoints go"):
            claimed.enter(overwrite=False)
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
        with Claim(tmp_path) as claimed:
            claimed.take()
            assert lock.in_use(tmp_path)
