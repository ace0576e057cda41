"""What several test files share: a tiny dataset, a tiny trained run, the command line, real text where it is."""

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# One thread, also in the processes that tests start: tiny models gain nothing from more, and tests may run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

# A temporary cache folder, set before any module copies the environment: tests neither read nor write the user's.
# matplotlib's font cache stays there, as it takes seconds to build.
before = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
os.environ.setdefault("MPLCONFIGDIR", os.path.join(before, "matplotlib"))
CACHE = tempfile.TemporaryDirectory(prefix="flatgpt_tests_")
os.environ["XDG_CACHE_HOME"] = CACHE.name

# No deadline: the machine may be busy. In continuous integration the examples are the same each time.
hypothesis.settings.register_profile("flatgpt", deadline=None, database=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("flatgpt")

# A background job of a script ignores SIGINT, nohup ignores SIGHUP, and child processes inherit ignored signals. With a
# handler here, children start with the default action.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) == signal.SIG_IGN:
        ignored = signal.default_int_handler if number == signal.SIGINT else lambda *_: None
        signal.signal(number, ignored)


def pytest_collection_modifyitems(items) -> None:
    """Give tests marked slow, browser or extra a time limit of ten minutes, unless they have a timeout mark."""
    for item in items:
        marked = {mark.name for mark in item.iter_markers()}
        if marked & {"slow", "browser", "extra"} and "timeout" not in marked:
            item.add_marker(pytest.mark.timeout(600))


# ---------------------------------------------------------------------------------------------------------------------
# no process outlives its test


MARK = f"FLATGPT_TESTS={os.getpid()}"  # in the environment of all processes that tests start, and of their children
os.environ.update([MARK.split("=")])
SHARED = ("resource_tracker", "forkserver")  # multiprocessing's helper processes, which end with this process


def started_here(by: str = "") -> dict[int, str]:
    """Processes that tests started and that still run, with their command lines.

    Args:
        by: only those that this test started: a part of its PYTEST_CURRENT_TEST, which pytest sets for each phase.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or of another user
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if MARK not in variables or int(folder.name) == os.getpid():
                continue
            test = next((line for line in variables if line.startswith("PYTEST_CURRENT_TEST=")), "")
            words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
            if words and by in test and not any(name in words for name in SHARED):
                found[int(folder.name)] = f"{words[:300]} ({test})"
    return found


def require_none_left(by: str = "") -> None:
    """Fail if processes still run after half a minute, and kill them."""
    deadline = time.monotonic() + 30
    while (left := started_here(by)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert not left, "processes outlive their test:\n" + "\n".join(left.values())


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_session():
    """Check all processes that tests started. The first fixture of a session is the last to be torn down."""
    yield
    require_none_left()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(request):
    """Check the processes that a test started in its call phase; those of shared fixtures live longer."""
    yield
    require_none_left(f"{request.node.nodeid} (call)")


@pytest.fixture(autouse=True)
def torch_as_before():
    """Reset torch's global settings that a run in this process changes."""
    yield
    if "torch" in sys.modules:
        import torch

        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def deliver(process: int, number: int) -> None:
    """Send a signal and return once it is no longer pending, so that two of the same number are not merged into one.

    After SIGSTOP, return once the process has stopped.
    """
    os.kill(process, number)
    bit = 1 << (number - 1)
    while True:
        try:
            lines = [
                dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
                for task in Path(f"/proc/{process}/task").iterdir()
            ]
        except (FileNotFoundError, ProcessLookupError):
            return
        states = {task["State"][0] for task in lines}
        if number == signal.SIGSTOP:
            if states <= set("TZ"):
                return
        elif states <= set("TZX") or not any(int(t[key], 16) & bit for t in lines for key in ("SigPnd", "ShdPnd")):
            return
        time.sleep(0.002)


def main_thread(process: int) -> tuple[str, int]:
    """State of a process's main thread, and its CPU time in clock ticks (1/100 s). Without /proc, the time of day."""
    if not Path("/proc").exists():
        return "S", int(100 * time.monotonic())
    fields = Path(f"/proc/{process}/task/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def waits_long(process: int) -> bool:
    """Whether a process's main thread sleeps and uses no CPU time for 0.2 s."""
    before = main_thread(process)
    time.sleep(0.2)
    return not Path("/proc").exists() or (before[0] == "S" and main_thread(process) == before)


def free_port() -> int:
    """A free port, outside the range of ephemeral ports, which the system could give to another process meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


TEXT = "".join(
    f"{n} green bottles hanging on the wall, and if {n} green bottles should accidentally fall, "
    f"there will be {n - 1} green bottles. Naïve café, 東京, 🎈!\n"
    for n in range(99, 0, -1)
)


def command(verb: str, *words, cwd, env: dict | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a verb as a user does, in `cwd`; standard output and error as text."""
    environment = {**os.environ, **SYNTHETIC, "PYTHONIOENCODING": "utf-8", **(env or {})}
    return subprocess.run(
        [sys.executable, str(ROOT / f"{verb}.py"), *map(str, words)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


@contextlib.contextmanager
def running(words: list, **settings):
    """Start a process; at the end of the block it is killed and its pipes are closed."""
    with subprocess.Popen([str(word) for word in words], **settings) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """The temporary folder, as the current one: data/ and out/ of a test go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The folder of real text that FLATGPT_TEST_DATA names."""
    folder = os.environ.get("FLATGPT_TEST_DATA")
    if not folder:
        pytest.skip("FLATGPT_TEST_DATA is not set: it names a folder with shakespeare/input.txt and wikitext103/")
    return Path(folder)


GPT2_CACHE, GPT2_ENCODINGS = os.environ.get("TIKTOKEN_CACHE_DIR"), {}  # the loaded encodings of the user's cache
# Environment of processes that use the synthetic vocabulary. tiktoken finds its plugin in the folder of this file.
SYNTHETIC = {"PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture(scope="session", autouse=True)
def synthetic_vocabulary(tmp_path_factory):
    """A tiktoken cache whose "gpt2" is synthetic, of GPT-2's size and pattern, for all tests and their processes."""
    from tiktoken_ext.synthetic import files

    folder = tmp_path_factory.mktemp("tiktoken_cache")
    for name, content in files().items():
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield


@pytest.fixture
def gpt2_vocabulary():
    """GPT-2's own vocabulary in place of the synthetic one, from the cache that TIKTOKEN_CACHE_DIR names."""
    import tiktoken.registry

    from flatgpt.data import tokenizer

    if not GPT2_CACHE:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: it names tiktoken's cache with GPT-2's vocabulary")
    forget = tokenizer.load.cache_clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", GPT2_CACHE)
        patch.setattr(tiktoken.registry, "ENCODINGS", GPT2_ENCODINGS)
        forget()
        yield
    forget()


# A model that trains in a second; every test that needs another size changes what it needs.
TINY = shlex.split(
    "--dataset tiny --n_layer 2 --n_head 2 --n_embd 32 --context_length 32 --batch_size 4 --warmup_iters 2 "
    "--max_iters 6 --eval_interval 3 --log_interval 1 --sample_tokens 8 --device cpu --dtype float32"
)


def make_dataset(folder: Path, name: str = "tiny", text: str = TEXT, encoding: str = "byte"):
    """A dataset of the text in folder/data/<name>."""
    from config import PrepareConfig
    from flatgpt.data.prepare import prepare

    file = folder / f"{name}.txt"
    file.write_text(text, encoding="utf-8")
    settings = {"name": name, "tokenizer": encoding, "data_dir": str(folder / "data")}
    return prepare(PrepareConfig(source="text", input=(str(file),), **settings), log=lambda line: None)


def train_here(*words, picture: bool = False) -> Path:
    """Train in this process and in the current folder, with TINY settings and changes; the run's folder.

    Args:
        picture: draw it at the end, as a user's run does; it takes half a second.
    """
    import train
    from config import TrainConfig, run_dir
    from flatgpt.cli import cli
    from flatgpt.interop.pretrained import initial_shape

    config = cli.parse(TrainConfig, [*TINY, *map(str, words)], initial_shape)
    with contextlib.nullcontext() if picture else unittest.mock.patch.object(train, "draw"):
        train.train(config)
    return run_dir(config)


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A Hugging Face hub on this machine, with nothing on it."""
    from hub_host import serving

    yield from serving(monkeypatch, tmp_path)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Nobody waits; for how long they would have."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def tiny_data(in_tmp):
    """The current, temporary folder, with data/tiny in it."""
    make_dataset(in_tmp)
    return in_tmp


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory) -> Path:
    """A folder with data/tiny and a trained out/quickstart, to read from only."""
    home = tmp_path_factory.mktemp("home")
    make_dataset(home)
    done = command("train", *TINY, "--max_iters", 60, "--eval_interval", 30, "--lr", "5e-3", cwd=home)
    assert done.returncode == 0, done.stderr
    return home


# ---------------------------------------------------------------------------------------------------------------------
# many short lives: processes forked where torch is imported already (3 s of a core otherwise, torchrun's ranks each)


NURSERY = f"""
import atexit, faulthandler, gc, json, multiprocessing, os, runpy, select, signal, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
# what a life imports; no thread has begun yet
import matplotlib.figure, numpy.random, torch._dynamo, torch.distributed.run, model, train
from flatgpt.runs import checkpoint
from flatgpt.training import optimizer as optim
gc.freeze()  # else garbage collection in each life copies the memory pages of these objects
children = {{}}
while True:
    if select.select([sys.stdin], [], [], 0.005)[0]:
        if not (line := sys.stdin.readline()):
            [os.kill(pid, signal.SIGKILL) for pid in children]
            sys.exit()
        born, pid = json.loads(line), os.fork()
        if not pid:
            break
        children[pid] = born["folder"]
        print(pid, flush=True)
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with open(children.pop(pid) + "/code.tmp", "w") as file:
                file.write(str(os.waitstatus_to_exitcode(status)))
            os.rename(file.name, file.name.removesuffix(".tmp"))
folder = born["folder"]
for key, value in born["env"].items():
    os.environ.pop(key, None) if value is None else os.environ.update({{key: value}})
output = os.open(folder + "/printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
[os.dup2(descriptor, number) for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output))]
faulthandler.register(signal.SIGUSR2)  # prints the stacks of all threads, also while they wait in C; ranks inherit it
os.chdir(born["cwd"])
sys.argv = born["words"]
exec(born["code"])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# torchrun, whose ranks are forked from it: its Popen does that, and the rest of it is as it is.
LAUNCHER = """
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

class Rank(multiprocessing.get_context("fork").Process):
    def __init__(self, args, env, **streams):
        super().__init__(args=(list(args[2:]), env))  # without `python -u`
        sys.stdout.flush()
        self.start()

    def run(self):
        os.setsid()
        gc.freeze()  # the launcher's objects, some with threads that are not here
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.closerange(3, 1024)
        atexit._clear()
        sys.argv, env = self._args
        os.environ.clear()
        os.environ.update(env)
        with open(folder + "/rank" + env["RANK"], "w") as file:
            file.write(str(os.getpid()))
        sys.stdout.reconfigure(line_buffering=True)
        for name, module in list(sys.modules.items()):  # ours read the environment as they are imported
            file = getattr(module, "__file__", None) or ""
            if name.startswith("flatgpt") or os.path.dirname(file) == sys.path[0]:
                del sys.modules[name]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            atexit._run_exitfuncs()

    def poll(self):
        return self.exitcode

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while self.exitcode is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", seconds)
            time.sleep(0.01)

subprocess_handler.Popen = Rank
sys.exit(torch.distributed.run.main())
"""


class Life:
    """One process of train.py; what it printed and its exit code lie in its folder."""

    def __init__(self, nursery: subprocess.Popen, folder: Path, cwd: Path, words: list, code: str, env: dict):
        folder.mkdir()
        self.folder = folder
        born = {"folder": str(folder), "cwd": str(cwd), "words": [str(w) for w in words], "code": code, "env": env}
        nursery.stdin.write(json.dumps(born) + "\n")
        nursery.stdin.flush()
        self.pid = int(nursery.stdout.readline())

    @property
    def printed(self) -> str:
        file = self.folder / "printed.txt"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    @property
    def code(self) -> int | None:
        """The exit code, as subprocess has it; None while it lives."""
        file = self.folder / "code"
        return int(file.read_text()) if file.exists() else None

    def rank(self, number: int) -> int:
        """The process of a rank, where this is their launcher."""
        return int((self.folder / f"rank{number}").read_text())

    def until(self, reached: Callable[[], bool], seconds: float = 90) -> None:
        """Wait, while it lives."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.code is None, self.printed
            assert time.monotonic() < deadline, self.explained()
            time.sleep(0.002)

    def until_marked(self) -> None:
        """Wait until its code has come to here()."""
        self.until((self.folder / "here").exists)

    def go_on(self) -> None:
        """Let it return from here()."""
        (self.folder / "go").touch()

    def send(self, number: int) -> None:
        """A signal, if it is still there."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                deliver(self.pid, number)

    def end(self, seconds: float = 90) -> int:
        """The exit code, once there is one."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            assert time.monotonic() < deadline, self.explained()
            time.sleep(0.002)
        return self.code

    def processes(self) -> list[int]:
        """It and all that print where it does: its ranks."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "fd/1") == str(self.folder / "printed.txt"):
                    found.append(int(process.name))
        return sorted(found)

    def explained(self) -> str:
        """What it printed, and where each thread of its processes is now: a hang that is rare has to tell at once."""
        ranks = {file.read_text(): file.name for file in self.folder.glob("rank*")}
        for process in self.processes():
            with contextlib.suppress(OSError), open(self.folder / "printed.txt", "a") as output:
                print(f"--- process {process} {ranks.get(str(process), '')}", file=output)
                for task in sorted(Path(f"/proc/{process}/task").iterdir()):  # Gloo's threads have no Python stack
                    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                    print(f"{(task / 'comm').read_text().strip()}: {state} {(task / 'wchan').read_text()}", file=output)
                output.flush()
                deliver(process, signal.SIGUSR2)
                deadline = time.monotonic() + 5
                while not waits_long(process) and time.monotonic() < deadline:
                    pass  # it prints; a thread that computes goes on with that
        return self.printed

    def kill(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="session")
def nursery():
    env = {**os.environ, **SYNTHETIC, "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    yield process
    process.stdin.close()
    try:
        process.wait(60)
    finally:
        process.kill()
        process.wait()
