"""Run the project's scripts as a user does: a command line, a working folder, separate stdout and stderr, an exit code.

Importing torch takes three seconds of CPU time. Each call therefore runs in a process forked from one that has imported
the third-party modules the scripts use, and none of the project's own. Run as a program, this file is that process: it
reads a line of JSON for each request and answers with the exit codes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("matplotlib.figure", "matplotlib.font_manager", "numpy.random", "safetensors.torch", "tiktoken")
PRELOADED += ("torch._dynamo", "torch.distributed", "torch.nn.parallel", "tqdm")
SECONDS = 100  # time limit of a call, only against hanging
# One thread, so that sums are computed in a fixed order; no network.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Result:
    """The exit code of a call (negative: the signal that ended it) and its output."""

    code: int
    stdout: str
    stderr: str


class Scripts:
    """Runs scripts until it is closed.

    Args:
        env: additions to the environment; torch reads some variables when it is imported.
    """

    def __init__(self, env: dict[str, str] | None = None):
        environment = {
            key: value for key, value in {**os.environ, **ENVIRONMENT, **(env or {})}.items() if value is not None
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the test runner, which closes this
        )

    def run(self, line: str, cwd: Path, stdin: str = "") -> Result:
        """Run a command line such as `train --config x.toml`."""
        return self._run(line, cwd, stdin, [{}])[0]

    def run_ranks(self, line: str, cwd: Path, world: int) -> list[Result]:
        """Run it on several ranks, with the environment variables that torchrun sets. Returns the results by rank."""
        from processes import free_port  # imported here, as the process that forks must not import it

        port = free_port()
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environments = [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in range(world)]
        return self._run(line, cwd, "", [{key: str(value) for key, value in env.items()} for env in environments])

    def _run(self, line: str, cwd: Path, stdin: str, environments: list[dict]) -> list[Result]:
        script, *words = shlex.split(line)
        with tempfile.TemporaryDirectory() as folder:
            files = [[f"{folder}/{rank}.{name}" for name in ("in", "out", "err")] for rank in range(len(environments))]
            for names in files:
                Path(names[0]).write_bytes(stdin.encode())
            calls = [
                {"argv": [str(ROOT / f"{script}.py"), *words], "cwd": str(cwd), "env": env, "files": names}
                for env, names in zip(environments, files, strict=True)
            ]
            self._process.stdin.write(json.dumps(calls) + "\n")
            self._process.stdin.flush()
            codes = json.loads(self._process.stdout.readline())
            printed = [[Path(name).read_text(encoding="utf-8") for name in names[1:]] for names in files]
        return [Result(code, *texts) for code, texts in zip(codes, printed, strict=True)]

    def close(self) -> None:
        """Wait for the call in progress, if any, and end the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# ---------------------------------------------------------------------------------------------------------------------
# the process that forks

CODE: list[int] = []  # the exit code, in a child whose script has ended


def serve() -> None:
    """Fork a process for each call of each request, until standard input ends."""
    atexit.register(leave)  # registered first, so that it is called last
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # so that garbage collection in a child skips these objects
    pids: list[int] = []

    def kill(*_) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    while line := sys.stdin.readline():
        for call in json.loads(line):
            if not (pid := os.fork()):
                return become(**call)
            pids.append(pid)
        signal.alarm(SECONDS)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        signal.alarm(0)
        pids.clear()
        print(json.dumps(codes), flush=True)


def become(argv: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Set this process up as `python script.py words` would be, and run the script."""
    os.setpgid(0, 0)  # a group of its own: the processes that it starts are killed with it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, (name, flags) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        os.dup2(os.open(name, flags, 0o600), number)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    code = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        CODE.append(code)


def leave() -> None:
    """Exit a child before the interpreter tears down its modules, which takes up to a second."""
    if CODE:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(CODE[0])


if __name__ == "__main__":
    serve()
