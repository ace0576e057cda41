"""RunLock: one process at a time trains in a folder, and no other process's folder is taken or overwritten."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from config import UserError
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
    folder = tmp_path / "run"
    first = locked(folder)
    assert not folder.exists(), "no folder is made"
    folder.mkdir()
    first.acquire()
    first.acquire()  # a second time changes nothing
    folder.rename(tmp_path / "moved")
    assert not first.is_held()
    with pytest.raises(UserError, match="was moved by another process in the meantime"):
        first.prepare_folder(overwrite=False)
    folder.mkdir()
    first.acquire()
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .*: wait for it, stop it, or choose"):
        locked(folder)
    first.__exit__()
    locked(folder)


def test_of_two_that_found_no_folder_one_gets_it(tmp_path, locked):
    """Minutes may pass between the look and the first file: both trained, into each other's checkpoints."""
    first, second, late = (locked(tmp_path / "new") for _ in range(3))
    first.prepare_folder(overwrite=True)
    with pytest.raises(UserError, match="is in use by"):
        second.prepare_folder(overwrite=True)
    assert first.is_held()
    make_run(tmp_path / "new")
    first.__exit__()
    with pytest.raises(UserError, match="another process has trained there in the meantime"):
        late.prepare_folder(overwrite=True)
    assert (tmp_path / "new/ckpt/iter_000003").is_dir()


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
    assert [path.name for path in old.iterdir()] == ["ckpt", "below"], "the old run is not in use"
    assert (old / "ckpt/iter_000003").is_dir()
    with pytest.raises(UserError, match="is in use by"):
        locked(run)
    os.chdir(shutil.copytree(old, in_tmp / "copy") / "below")
    with pytest.raises(UserError, match="contains the current folder and is not renamed"):
        locked(Path("..")).prepare_folder(overwrite=True)
