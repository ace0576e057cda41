"""Scripts in processes that are forked from one which has imported torch: 0.1 s each, where a new one takes 3 s.

`start_server` starts that process, and `ForkedProcess` runs a script in a fork of it. `torchrun` with TORCHRUN as its
code runs torchrun there, whose ranks are forked as well. `Scripts` runs command lines in forks of a process that has
imported none of the project's modules.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT, SYNTHETIC, deliver, free_port

SERVER = f"""
import atexit, faulthandler, gc, json, multiprocessing, os, runpy, select, signal, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
exec(sys.argv[1])  # what the scripts import; no thread has started yet
gc.freeze()  # otherwise garbage collection in each fork copies the memory pages of these objects
children = {{}}
while True:
    if select.select([sys.stdin], [], [], 0.005)[0]:
        if not (line := sys.stdin.readline()):
            [os.kill(pid, signal.SIGKILL) for pid in children]
            sys.exit()
        request, pid = json.loads(line), os.fork()
        if not pid:
            break
        children[pid] = request["folder"]
        print(pid, flush=True)
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with open(children.pop(pid) + "/code.tmp", "w") as file:
                file.write(str(os.waitstatus_to_exitcode(status)))
            os.rename(file.name, file.name.removesuffix(".tmp"))
folder = request["folder"]
for key, value in request["env"].items():
    os.environ.pop(key, None) if value is None else os.environ.update({{key: value}})
inputs = os.open(folder + "/input.txt" if request["separate"] else os.devnull, os.O_RDONLY)
output, errors = (
    os.open(f"{{folder}}/{{name}}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for name in ("output", "errors" if request["separate"] else "output")
)
[os.dup2(descriptor, number) for number, descriptor in enumerate((inputs, output, errors))]
faulthandler.register(signal.SIGUSR2)  # prints the stacks of all threads, also while they wait in C; ranks inherit it
os.chdir(request["cwd"])
sys.argv = request["words"]
exec(request["code"])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OTHERS = """
import matplotlib.figure, matplotlib.font_manager, numpy.random, safetensors.torch, tiktoken, torch._dynamo
import torch.distributed, torch.nn.parallel, tqdm
"""
OURS = """
import matplotlib.figure, numpy.random, torch._dynamo, torch.distributed.run, model, train
from flatgpt.runs import checkpoint
from flatgpt.training import optimizer as optim
"""

# Exit before the interpreter tears down its modules, which takes up to a second.
QUICK_EXIT = """
def run_path(path, run_name, real=runpy.run_path):
    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    code = 1
    atexit.register(leave)  # registered first, so that it is called last
    try:
        real(path, run_name=run_name)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise

runpy.run_path = run_path
"""

# torchrun with its subprocess.Popen replaced by a fork.
TORCHRUN = """
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

class Rank(multiprocessing.get_context("fork").Process):
    def __init__(self, args, env, **streams):
        super().__init__(args=(list(args[2:]), env))  # without `python -u`
        sys.stdout.flush()
        self.start()

    def run(self):
        os.setsid()
        gc.freeze()  # the launcher's objects, some of which have threads that do not exist here
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
        for name, module in list(sys.modules.items()):  # flatGPT's modules read the environment when imported
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


@contextlib.contextmanager
def start_server(preload: str = OURS, env: dict | None = None):
    """Start the process that forks. It ends with the block, and its forks with it."""
    env = {**os.environ, **SYNTHETIC, "PYTHONIOENCODING": "utf-8", **(env or {})}
    words = [sys.executable, "-c", SERVER, preload]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    yield process
    process.stdin.close()
    try:
        process.wait(60)
    finally:
        process.kill()
        process.wait()


class ForkedProcess:
    """A script in a process of its own. Its output and its exit code are files in a folder.

    Args:
        folder: made here.
        words: the script and its arguments.
        code: Python code that runs before the script.
        env: changes to the environment; None removes a variable.
        stdin: standard input; standard error then has a file of its own, errors.txt. None: no standard input.
    """

    def __init__(
        self,
        server: subprocess.Popen,
        folder: Path,
        cwd: Path,
        words: list,
        code: str,
        env: dict,
        stdin: str | None = None,
    ):
        folder.mkdir()
        self.folder = folder
        request = {"folder": str(folder), "cwd": str(cwd), "words": [str(w) for w in words], "code": code, "env": env}
        request["separate"] = stdin is not None
        (folder / "input.txt").write_text(stdin or "", encoding="utf-8")
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    @property
    def output(self) -> str:
        """Standard output and standard error so far."""
        file = self.folder / "output.txt"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    @property
    def code(self) -> int | None:
        """The exit code, as subprocess has it; None while the process runs."""
        file = self.folder / "code"
        return int(file.read_text()) if file.exists() else None

    def rank(self, number: int) -> int:
        """Return the process id of a rank that this torchrun started."""
        return int((self.folder / f"rank{number}").read_text())

    def wait_until(self, reached: Callable[[], bool], seconds: float = 90) -> None:
        """Wait until a condition holds; fail if the process ends before that."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.code is None, self.output
            assert time.monotonic() < deadline, self.output_and_stacks()
            time.sleep(0.002)

    def wait_for_mark(self) -> None:
        """Wait until its code has come to here()."""
        self.wait_until((self.folder / "here").exists)

    def release(self) -> None:
        """Let it return from here()."""
        (self.folder / "go").touch()

    def send(self, number: int) -> None:
        """Send a signal, if the process still runs."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                deliver(self.pid, number)

    def wait(self, seconds: float = 90) -> int:
        """Wait for its end and return the exit code."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            assert time.monotonic() < deadline, self.output_and_stacks()
            time.sleep(0.002)
        return self.code

    def processes(self) -> list[int]:
        """Return the ids of this process and of its ranks, which all write to its output."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "fd/1") == str(self.folder / "output.txt"):
                    found.append(int(process.name))
        return sorted(found)

    def output_and_stacks(self) -> str:
        """Return its output, with the Python stacks of all threads of its processes: what a hang waits for."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                deliver(process, signal.SIGUSR2)
                time.sleep(2)  # it prints
        return self.output

    def kill(self) -> None:
        """Kill it and its ranks."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------------
# command lines


@dataclass(frozen=True)
class Result:
    """The exit code of a call (negative: the signal that ended it) and its output."""

    code: int
    stdout: str
    stderr: str


class Scripts:
    """Runs scripts as a user does: a command line, a working folder, separate stdout and stderr, an exit code.

    One thread, so that sums are computed in a fixed order; no network.

    Args:
        env: additions to the environment; torch reads some variables when it is imported.
    """

    ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}  # noqa: RUF012

    def __init__(self, env: dict[str, str] | None = None):
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._server = self._stack.enter_context(start_server(OTHERS, self.ENVIRONMENT | (env or {})))
        self._calls = 0

    def run(self, line: str, cwd: Path, stdin: str = "", root: Path = ROOT) -> Result:
        """Run a command line such as `train --config x.toml`.

        Args:
            root: the checkout whose scripts and modules are used.
        """
        return self._run(line, cwd, stdin, [{}], root)[0]

    def run_ranks(self, line: str, cwd: Path, world: int) -> list[Result]:
        """Run it on several ranks, with the environment variables that torchrun sets. Returns the results by rank."""
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = str(free_port())
        return self._run(line, cwd, "", [{"RANK": str(n), "LOCAL_RANK": str(n), **shared} for n in range(world)])

    def _run(self, line: str, cwd: Path, stdin: str, environments: list[dict], root: Path = ROOT) -> list[Result]:
        script, *words = shlex.split(line)
        code, started = f"sys.path[0] = {str(root)!r}\n{QUICK_EXIT}", []
        for env in environments:
            self._calls += 1
            folder, argv = self._folder / str(self._calls), [root / f"{script}.py", *words]
            started.append(ForkedProcess(self._server, folder, cwd, argv, code, env, stdin))
        try:
            codes = [process.wait(100) for process in started]
        finally:
            for process in started:
                process.kill()
        errors = [(process.folder / "errors.txt").read_text(encoding="utf-8") for process in started]
        return [Result(*each) for each in zip(codes, (process.output for process in started), errors, strict=True)]

    def close(self) -> None:
        """End the process that forks."""
        self._stack.close()
