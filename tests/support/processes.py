"""Starting, watching and ending real processes."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Environment of processes that use the synthetic vocabulary: tiktoken finds its plugin in tests/tiktoken_ext.
SYNTHETIC = {"PYTHONPATH": str(ROOT / "tests")}
MARK = f"FLATGPT_TESTS={os.getpid()}"  # in the environment of all processes that tests start, and of their children
os.environ.update([MARK.split("=")])
# helper processes of multiprocessing and of torch's compiler, which end with this process
SHARED = ("resource_tracker", "forkserver", "compile_worker")


def started_by_tests(test: str = "") -> dict[int, str]:
    """Return the processes that tests started and that still run, with their command lines.

    Args:
        test: only those that this test started: a part of its PYTEST_CURRENT_TEST, which pytest sets for each phase.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or of another user
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if MARK not in variables or int(folder.name) == os.getpid():
                continue
            started_by = next((line for line in variables if line.startswith("PYTEST_CURRENT_TEST=")), "")
            words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
            if words and test in started_by and not any(name in words for name in SHARED):
                found[int(folder.name)] = f"{words[:300]} ({started_by})"
    return found


def require_none_left(test: str = "") -> None:
    """Fail if processes still run after half a minute, and kill them."""
    deadline = time.monotonic() + 30
    while (left := started_by_tests(test)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert not left, "processes outlive their test:\n" + "\n".join(left.values())


def command(script: str, *words, cwd, env: dict | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a script in a new process, as a user does. Standard output and error are text."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, words)],
        cwd=cwd,
        env={**os.environ, **SYNTHETIC, "PYTHONIOENCODING": "utf-8", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


@contextlib.contextmanager
def running(words: list, **settings):
    """Start a process. At the end of the block it is killed and its pipes are closed."""
    with subprocess.Popen([str(word) for word in words], **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def deliver(process: int, number: int) -> None:
    """Send a signal and return once it is no longer pending, so that two of the same number are not merged into one.

    After SIGSTOP, return once the process has stopped.
    """
    os.kill(process, number)
    bit = 1 << (number - 1)
    while True:
        try:
            threads = [
                dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
                for task in Path(f"/proc/{process}/task").iterdir()
            ]
        except (FileNotFoundError, ProcessLookupError):
            return
        states = {thread["State"][0] for thread in threads}
        pending = [int(thread[key], 16) & bit for thread in threads for key in ("SigPnd", "ShdPnd")]
        if number == signal.SIGSTOP:
            if states <= set("TZ"):
                return
        elif states <= set("TZX") or not any(pending):
            return
        time.sleep(0.002)


def main_thread(process: int) -> tuple[str, int]:
    """Return the state of a process's main thread, and its CPU time in clock ticks (without /proc, the time of day)."""
    if not Path("/proc").exists():
        return "S", int(100 * time.monotonic())
    fields = Path(f"/proc/{process}/task/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def waits_long(process: int) -> bool:
    """Return whether a process's main thread sleeps and uses no CPU time for 0.2 s."""
    before = main_thread(process)
    time.sleep(0.2)
    return not Path("/proc").exists() or (before[0] == "S" and main_thread(process) == before)


def free_port() -> int:
    """Return a free port outside the range of ephemeral ports, which the system could give to another process."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
