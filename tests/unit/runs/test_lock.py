"""RunLock: one process at a time trains in a folder, and no other process's folder is taken or overwritten."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from pathlib import Path

import pytest

from config import UserError
from flatgpt.runs import lock
from flatgpt.runs.lock import RunLock


@pytest.fixture
def locked():
    """locked(folder) -> RunLock that has tried to lock the folder. All are released at the end."""
    with contextlib.ExitStack() as stack:

        def acquire(folder: Path) -> RunLock:
            run_lock = stack.enter_context(RunLock(folder))
            run_lock.acquire()
            return run_lock

        yield acquire


def make_run(folder: Path) -> None:
    (folder / "ckpt/iter_000003").mkdir(parents=True)


def test_lock_follows_a_folder_that_is_moved_and_made_again(tmp_path, locked):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    first = locked(folder)
    assert not folder.exists(), "no folder is made"
    folder.mkdir()
    first.acquire()
    first.acquire()  # a second time changes nothing
    folder.rename(moved)
    assert not first.is_held()
    folder.mkdir()
    first.acquire()
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .*: wait for it, stop it, or take"):
        locked(folder)
    locked(moved)
    first.__exit__()
    locked(folder)


def test_another_locked_folder_in_the_same_place_is_not_taken(tmp_path, locked):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first, _ = locked(one), locked(two)
    one.rename(tmp_path / "away")
    two.rename(one)
    for _ in range(2):  # a refused call leaves no lock
        with pytest.raises(UserError, match="is in use by"):
            first.acquire()


def test_file_system_without_locks_is_a_warning(tmp_path, locked, monkeypatch, capsys):
    def flock(*words):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    locked(tmp_path).prepare_folder(False)
    text = f"warning: {tmp_path}/.lock cannot be locked (No locks available): no second process may train there\n"
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_that_found_no_folder_one_gets_it(tmp_path, locked, overwrite):
    """Minutes may pass between the look and the first file: both trained, into each other's checkpoints."""
    first, second = locked(tmp_path / "new"), locked(tmp_path / "new")
    first.prepare_folder(overwrite)
    with pytest.raises(UserError, match="is in use by"):
        second.prepare_folder(overwrite)
    assert first.is_held()


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_that_began_and_ended_meanwhile_is_left_alone(tmp_path, locked, overwrite):
    late = locked(tmp_path / "new")
    make_run(tmp_path / "new")
    with pytest.raises(UserError, match="another process has trained there meanwhile"):
        late.prepare_folder(overwrite)
    assert (tmp_path / "new/ckpt/iter_000003").is_dir()


def test_run_does_not_begin_in_a_folder_that_was_moved_away(tmp_path, locked):
    folder = tmp_path / "run"
    folder.mkdir()
    first = locked(folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="was moved away by another process meanwhile"):
        first.prepare_folder(False)


def test_overwrite_renames_runs_only_and_not_the_current_folder(in_tmp, locked):
    plain, run = in_tmp / "plain", in_tmp / "run"
    (plain / "other").mkdir(parents=True)
    make_run(run)
    (run / "below").mkdir()
    for folder in (plain, run):
        locked(folder).prepare_folder(overwrite=True)
    assert (plain / "other").is_dir()
    assert [path.name for path in run.iterdir()] == [".lock"]
    (old,) = in_tmp.glob("run.old-*")
    assert (old / "ckpt/iter_000003").is_dir()
    with pytest.raises(UserError, match="is in use by"):
        locked(run)
    copy = shutil.copytree(old, in_tmp / "copy")
    os.chdir(copy / "below")
    with pytest.raises(UserError, match="is where we are, and is not renamed"):
        locked(Path("..")).prepare_folder(overwrite=True)


def test_file_in_the_place_of_checkpoints_is_an_error(tmp_path, locked):
    (tmp_path / "ckpt").write_text("mine")
    with pytest.raises(UserError, match="ckpt is a file, where checkpoints go"):
        locked(tmp_path).prepare_folder(overwrite=False)
    assert (tmp_path / "ckpt").read_text() == "mine"


def test_in_use_sees_a_lock_and_writes_nothing(tmp_path, locked):
    run = tmp_path / "run"
    run.mkdir()
    assert not lock.in_use(run)
    assert not list(run.iterdir())
    first = locked(run)
    before = (run / ".lock").read_text()
    assert lock.in_use(run)
    assert (run / ".lock").read_text() == before
    first.__exit__()
    assert not lock.in_use(run)


def test_in_use_keeps_nobody_out(tmp_path, locked, monkeypatch):
    """A run that began while `train.py --list` looked at its folder would have been refused."""
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as in_use does
        assert not lock.in_use(tmp_path)
        monkeypatch.setattr(time, "sleep", lambda seconds: file.close())
        locked(tmp_path)
        assert lock.in_use(tmp_path)
