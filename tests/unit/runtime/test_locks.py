"""FolderLock: one process at a time, on file systems with flock, without it, and where it excludes nothing."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, running

from config import UserError
from flatgpt.runtime import files

pytestmark = pytest.mark.slow

FLOCK = {
    "flock": "",
    "no flock": "import errno, fcntl\ndef flock(*a): raise OSError(errno.ENOSYS, '')\nfcntl.flock = flock\n",
    "flock that excludes nothing": "import fcntl\nfcntl.flock = lambda *a: None\n",
}
IMPORTS = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
IMPORTS += (
    "from config import UserError\nfrom flatgpt.runtime import files\nfiles.HEARTBEAT, files.BEATS = 0.01, 10**6\n"
)
IMPORTS += "from flatgpt.runtime.files import FolderLock\n"


@pytest.fixture(params=list(FLOCK))
def file_system(request, monkeypatch) -> str:
    """Replaces flock in this process. Returns code that does so in another one."""
    code = FLOCK[request.param]
    if code:
        monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # undone at the end
        exec(code)
    return code


@contextlib.contextmanager
def other_process(folder: Path, before: str = "", then: str = "sys.stdin.read()"):
    """A process that has locked the folder; what it does next is code. It is killed at the end."""
    code = f"{before}{IMPORTS}with FolderLock(Path({str(folder)!r}), '--out') as lock:\n lock.acquire()\n"
    words = [sys.executable, "-c", f"{code} print('locked', flush=True)\n {then}"]
    with running(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process


def take(folder: Path) -> None:
    """Lock the folder and release it."""
    with files.FolderLock(folder, "--out_dir") as lock:
        lock.acquire()
        assert lock.is_held()
    assert not list(folder.glob(".lock*"))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        take(folder)
    return str(caught.value)


def test_lock_excludes_processes_until_they_end(tmp_path, file_system, waits):
    """One that was killed, and one whose parent has not noticed yet, block nobody. Nor does a clean exit."""
    with other_process(tmp_path, file_system) as owner:
        before = (tmp_path / ".lock").read_bytes()
        text = f"{tmp_path} is in use by process {owner.pid} on .*: wait for it, stop it, or choose another --out_dir"
        assert re.fullmatch(text, refused(tmp_path))
        assert files.in_use(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {".lock": before}
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # it remains as a zombie
        assert not files.in_use(tmp_path)
        assert (tmp_path / ".lock").exists()
        take(tmp_path)
    with other_process(tmp_path, file_system) as owner:
        owner.communicate("")
        assert owner.returncode == 0
        assert not list(tmp_path.iterdir())
    assert waits == []


def test_copy_of_a_folder_in_use_is_free(tmp_path, waits):
    """It has the lock file of a process that runs, but no heartbeat."""
    folder = tmp_path / "run"
    folder.mkdir()
    with other_process(folder):
        take(Path(shutil.copytree(folder, tmp_path / "copy")))
        assert waits == [5] * 4
        assert "is in use by" in refused(folder)


def test_process_id_that_was_used_again_blocks_nobody(tmp_path, file_system, waits):
    lock = tmp_path / ".lock"
    with other_process(tmp_path, file_system) as owner:
        content = lock.read_text()
        owner.communicate("")
    with running(["sleep", "600"]) as unrelated:
        lock.write_text(content.replace(f"process {owner.pid} ", f"process {unrelated.pid} "))
        take(tmp_path)
    assert waits == []


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The lock file of a process on another machine: its own, and flock does not reach it."""
    with other_process(tmp_path) as owner:
        content = (tmp_path / ".lock").read_text()
        owner.communicate("")
    _, machine, rest = content.split("\n", 2)
    (tmp_path / ".lock").write_text(f"process 7 on node1\n{machine[::-1]}\n{rest}")
    os.utime(tmp_path / ".lock", (1, 1))
    return tmp_path / ".lock"


def test_owner_on_another_machine_whose_heart_beats_is_respected(elsewhere, monkeypatch, capsys):
    """flock excludes nothing there. The clocks of the machines may differ."""
    sleeps = []
    monkeypatch.setattr(time, "sleep", lambda seconds: sleeps.append(seconds) or os.utime(elsewhere, (2, 2)))
    text = f"{elsewhere.parent} is in use by process 7 on node1: wait for it, stop it, or choose another --out_dir"
    assert refused(elsewhere.parent) == text
    assert (
        capsys.readouterr().err
        == f"{elsewhere.parent} is locked by process 7 on node1: waiting 20 s for its heartbeat\n"
    )
    assert sleeps == [5]
    os.utime(elsewhere)
    assert files.in_use(elsewhere.parent)


def test_owner_on_another_machine_that_is_gone_is_replaced(elsewhere, waits, capsys):
    """A job that Slurm moves to another node goes on by itself."""
    assert not files.in_use(elsewhere.parent)
    take(elsewhere.parent)
    assert waits == [5] * 4
    assert capsys.readouterr().err.count("\n") == 1


def test_owner_on_another_machine_that_ends_meanwhile_is_replaced_at_once(elsewhere, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: elsewhere.unlink())
    take(elsewhere.parent)


def test_lock_has_a_heartbeat_which_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT", 0.001)
    path = tmp_path / ".lock"
    with files.FolderLock(tmp_path, "--out") as lock:
        lock.acquire()
        for _ in range(2):
            os.utime(path, (1, 1))
            deadline = time.monotonic() + 60
            while path.stat().st_mtime == 1:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        (thread,) = (thread for thread in files.threading.enumerate() if thread.name == "heartbeat")
    thread.join(60)
    assert not thread.is_alive()


# Eight processes lock the folder at once, ten times. Prints how many have succeeded each time.
RACE = """
for turn in range(10):
    if turn % 2:
        Path(".lock").write_text(stale)
    (start, go), (told, tell), (held, release) = os.pipe(), os.pipe(), os.pipe()
    for child in range(8):
        if not os.fork():
            os.close(go); os.close(release)
            os.read(start, 1)
            try:
                with FolderLock(Path("."), "") as lock:
                    lock.acquire()
                    os.write(tell, b"+")
                    os.read(held, 1)
                    stale = Path(".lock").read_text()
            except UserError:
                os.write(tell, b"-")
            os._exit(0)
    os.close(go)
    answers = b""
    while len(answers) < 8:
        answers += os.read(told, 8)
    if not turn:
        stale = Path(".lock").read_text()
    os.close(release)
    for child in range(8):
        os.wait()
    print(answers.count(b"+"), sorted(os.listdir()), flush=True)
"""


@pytest.mark.parametrize("before", FLOCK.values(), ids=FLOCK)
def test_of_processes_that_start_at_once_one_gets_the_lock(tmp_path, before):
    """Also if the process that held it before was killed."""
    done = subprocess.run(
        [sys.executable, "-c", before + IMPORTS + RACE], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert (done.stdout, done.stderr.count("Traceback")) == ("1 []\n" * 10, 0)


def test_process_that_locks_the_folder_between_a_look_and_a_write_keeps_it(tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack:

        def open_late(path, mode="r", **keys):
            if mode == "xb":
                monkeypatch.undo()
                stack.enter_context(other_process(tmp_path))
            return open(path, mode, **keys)

        monkeypatch.setattr(files, "open", open_late, raising=False)
        assert "is in use by" in refused(tmp_path)


def test_child_of_a_killed_owner_does_not_hold_the_lock(tmp_path, waits):
    """For example the worker of a data loader. Nor does it release the lock of its parent."""
    fork = "read, write = os.pipe()\n if not os.fork():\n  "
    with other_process(
        tmp_path, then=f"{fork}sys.exit()\n os.wait()\n print('ended', flush=True)\n os.read(read, 1)"
    ) as owner:
        assert owner.stdout.readline() == "ended\n"
        assert "is in use by" in refused(tmp_path)
    with other_process(
        # the child speaks: until it runs, it has what it inherits
        tmp_path,
        then="os.fork() and os.wait()\n print(os.getpid(), flush=True)\n os.read(os.pipe()[0], 1)",
    ) as owner:
        child = int(owner.stdout.readline())
        try:
            owner.kill()
            owner.wait()
            take(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)
    assert waits == []


@pytest.mark.parametrize(
    "left", [b"", b"process 1 on node1", b"\xff\0" * 99, b"x\ny\nz\n", b"process 9999999999 on x\n\n1\n1"]
)
def test_lock_file_of_an_earlier_version_or_a_power_cut_blocks_nobody(tmp_path, waits, left):
    (tmp_path / ".lock").write_bytes(left)
    assert not files.in_use(tmp_path)
    take(tmp_path)
    assert waits == []


def test_process_that_was_killed_while_it_locked_the_folder_blocks_nobody(tmp_path, waits):
    (tmp_path / ".lock.new").touch()
    take(tmp_path)


@pytest.mark.parametrize(("name", "code"), [("replace", errno.EIO), ("open", errno.EACCES)])
def test_lock_that_cannot_be_written_is_an_error_with_the_path(tmp_path, monkeypatch, name, code):
    def fail(*args, **keys):
        raise OSError(code, os.strerror(code), str(args[0]))

    monkeypatch.setattr(files.os if name == "replace" else files, name, fail, raising=False)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        take(tmp_path)
    assert caught.value.filename.removesuffix(".new") == str(tmp_path / ".lock")
    assert not list(tmp_path.iterdir())
