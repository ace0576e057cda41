"""Running scripts in the process of the tests, and taking control of time and of threads there."""

import contextlib
import io
import os
import runpy
import shlex
import signal
import sys
import threading
import unittest.mock
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from processes import ROOT

TEXT = "".join(
    f"{n} green bottles hanging on the wall, and if {n} green bottles should accidentally fall, "
    f"there will be {n - 1} green bottles. Naïve café, 東京, 🎈!\n"
    for n in range(99, 0, -1)
)
# A model that trains in a second. Tests that need another size override what they need.
TINY = shlex.split(
    "--dataset tiny --n_layer 2 --n_head 2 --n_embd 32 --context_length 32 --batch_size 4 --warmup_iters 2 "
    "--max_iters 6 --eval_interval 3 --log_interval 1 --sample_tokens 8 --device cpu --dtype float32"
)


class Result(NamedTuple):
    """The exit code of a script and its output."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one `error:` line with which a script has ended."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert (self.code, len(lines)) == (2, 1), self
        assert self.err.endswith(lines[0] + "\n"), self
        return lines[0]


def run_script(script: str, *words, stdin: str | bytes = "", encoding: str = "utf-8") -> Result:
    """Run a script with these words as sys.argv in this process and the current folder.

    Args:
        encoding: of standard input and output.
    """
    stdin = stdin.encode(encoding) if isinstance(stdin, str) else stdin
    streams = [io.TextIOWrapper(io.BytesIO(data), encoding, write_through=True) for data in (stdin, b"", b"")]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    changes = {"argv": [f"{script}.py", *map(str, words)], "excepthook": sys.excepthook}
    changes |= dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
    code = 0
    with unittest.mock.patch.multiple(sys, **changes), unittest.mock.patch.dict(os.environ):
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            reset_torch()
    return Result(code, *(stream.buffer.getvalue().decode(encoding) for stream in streams[1:]))


def reset_torch() -> None:
    """Reset the global settings that a run changes: those of torch, and whether its compiler has failed."""
    if torch := sys.modules.get("torch"):
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    if device := sys.modules.get("flatgpt.runtime.device"):
        device.compiler.failed = False


def first_fast(cases: Iterable) -> list:
    """Return the cases of a test, all but the first marked slow."""
    first, *others = cases
    others = [case if isinstance(case, tuple) else (case,) for case in others]
    return [first, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


def make_dataset(folder: Path, name: str = "tiny", text: str = TEXT, encoding: str = "byte", **more):
    """Make a dataset of the text in folder/data/<name>, with more settings of prepare_data.py, and return it."""
    from config import PrepareConfig
    from flatgpt.data.prepare import prepare

    file = folder / f"{name}.txt"
    file.write_text(text, encoding="utf-8")
    settings = {"name": name, "tokenizer": encoding, "data_dir": str(folder / "data")} | more
    return prepare(PrepareConfig(source="text", input=(str(file),), **settings), lambda line: None)


def train_here(*words, picture: bool = False) -> Path:
    """Train in this process and the current folder, with TINY and these words. Returns the run's folder.

    Functions of train.py can be replaced, which `cli` does not allow: it runs a fresh copy of the script.

    Args:
        picture: draw metrics.png at the end, as a user's run does; it takes half a second.
    """
    import train
    from config import TrainConfig, run_dir
    from flatgpt.cli import cli
    from flatgpt.interop.pretrained import initial_shape, run_settings

    config = cli.parse(TrainConfig, [*TINY, *map(str, words)], initial_shape, run_settings)
    with contextlib.nullcontext() if picture else unittest.mock.patch("flatgpt.training.reporting.draw_picture"):
        train.train(config)
    return run_dir(config)


class Gate:
    """Blocks the calls of a function until `open` is called. `error` is raised after that in its place, if set."""

    def __init__(self, function):
        self.function, self.error = function, None
        self._reached, self._opened = threading.Event(), threading.Event()
        self.running, self.most = 0, 0  # calls in progress now, and the most at one time

    def __call__(self, *args, **kwargs):
        self.running += 1
        self.most = max(self.most, self.running)
        self._reached.set()
        try:
            assert self._opened.wait(60), "the gate was not opened"
            if self.error:
                raise self.error
            return self.function(*args, **kwargs)
        finally:
            self.running -= 1

    def wait(self) -> None:
        """Wait until the function has been called."""
        assert self._reached.wait(60), "the gate was not reached"

    def open(self) -> None:
        """Let the calls that wait, and all later ones, through."""
        self._opened.set()


class Clock:
    """A clock that a test sets. It stands in for the module `time` where a module has imported it.

    Attributes:
        now: seconds.
        sleeps: the durations of all calls of sleep, which returns at once and moves the clock.
    """

    def __init__(self):
        self.now, self.sleeps = 1000.0, []
        read = lambda: self.now  # noqa: E731
        self.module = SimpleNamespace(time=read, monotonic=read, perf_counter=read, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
