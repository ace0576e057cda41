"""What goes wrong with a job of several processes, and how it ends: real ones, under torchrun. And Slurm's script."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_dataset
from test_train import rows, same, weights

import checkpoint
import runtime
from runtime import Stop

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
HERE = ("--standalone", "--nproc_per_node=2")
RUN = [*TINY, "--dropout", "0.1", "--grad_accum_steps", "4", "--sample_tokens", "0", "--lr_decay_iters", "200"]
LONG = ("--max_iters", "200", "--eval_interval", "20", "--save_interval", "10")
TRAIN = str(ROOT / "train.py")
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else a third of them failed
GONE = "another rank is gone"


class Job:
    """A launcher, its ranks, and what all of them print (in a file, so that no pipe fills up)."""

    def __init__(self, folder: Path, command: list, script: str, cwd: Path, env: dict):
        self.script, self.output, self.mark = script, folder / "printed.txt", f"FLATGPT_TEST_JOB={folder}"
        env = {**os.environ, "PYTHONPATH": "", "FLATGPT_TEST_JOB": str(folder), **env}
        with open(self.output, "ab") as file:
            self.launcher = subprocess.Popen(
                [str(word) for word in command], cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def printed(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def processes(self, *variables: str) -> list[int]:
        """Those of the job that run train.py, or what stands for it, with `RANK=1`, say, in their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                env = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if {self.mark, *variables} <= set(env) and self.script in words:
                    found.append(int(folder.name))
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        (pid,) = self.processes(f"RANK={number}")
        return pid

    def until(self, reached: Callable[[], bool], seconds: float = 120) -> None:
        """Wait, while the job runs."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.launcher.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def end(self, seconds: float = 120) -> int:
        """The launcher's exit code."""
        return self.launcher.wait(seconds)

    def kill(self) -> None:
        """All that is left of it."""
        if self.launcher.poll() is None:
            self.launcher.kill()
            self.launcher.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The jobs' current folder, with data/tiny in it; each gives its own --out_dir."""
    folder = tmp_path_factory.mktemp("home")
    make_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """The run of two ranks that nothing disturbs."""
    job = Job(home, [*TORCHRUN, *HERE, TRAIN, *RUN, *LONG, "--out_dir", "whole"], TRAIN, home, {})
    assert job.end() == 0, job.printed
    return home / "whole"


@pytest.fixture
def start(home, tmp_path):
    """start(*words) -> Job: torchrun train.py with RUN and the words, or another command. What is left is killed."""
    jobs = []

    def launch(*words, options: tuple = HERE, script: str = TRAIN, command: tuple = (), cwd=home, env=RESTARTS) -> Job:
        (folder := tmp_path / f"job{len(jobs)}").mkdir()
        command = command or (*TORCHRUN, *options, script)
        settings = (*RUN, "--data_dir", home / "data", "--out_dir", tmp_path / "run", *words)
        jobs.append(Job(folder, [*command, *settings], script, cwd, env))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.kill()


def logged(run: Path) -> int:
    """How many rows the log has by now."""
    return (run / "metrics.csv").read_text().count("\n") - 1 if (run / "metrics.csv").exists() else 0


def errors(job: Job) -> list[str]:
    """What it says to its user."""
    return [line for line in job.printed.splitlines() if line.startswith("error: ")]


def assert_same_run(run: Path, whole: Path) -> None:
    """Every iteration is logged once and alike, and weights and optimizer ended alike, bit for bit."""
    assert rows(run) == rows(whole)
    assert [int(row["iter"]) for row in rows(run)] == list(range(201))
    assert same(weights(run), weights(whole))
    ours, theirs = (checkpoint.load_train_state(r / "ckpt/last")["optimizer"]["state"] for r in (run, whole))
    assert all(same(ours[key], theirs[key]) for key in theirs)


# ---------------------------------------------------------------------------------------------------------------------
# a process that dies, and machines


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_is_restarted_and_the_run_ends_as_if_nothing_had_been(start, whole, tmp_path, rank):
    run = tmp_path / "run"
    job = start(*LONG, "--resume", "auto", options=(*HERE, "--max_restarts=3"))
    job.until(lambda: logged(run) > 55)
    os.kill(job.rank(rank), signal.SIGKILL)
    assert job.end() == 0, job.printed
    assert "resuming from" in job.printed
    assert_same_run(run, whole)


@pytest.mark.slow
def test_two_machines_train_like_one(start, whole, tmp_path):
    """Two launchers with two ranks each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}")
    options += ("--rdzv_id=pair", "--local_addr=127.0.0.1")  # two hosts find their addresses themselves
    machines = [start("--max_iters", 20, "--eval_interval", 20, options=options) for _ in range(2)]
    for job in machines:
        assert job.end() == 0, job.printed
    assert sorted("done: 20 updates" in job.printed for job in machines) == [False, True]  # rank 0 alone speaks
    ours, theirs = ([float(r["train_loss"]) for r in rows(r)[1:21]] for r in (tmp_path / "run", whole))
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# a rank that raises: its own message, at once


FAULTY = f"""
import os, resource, runpy, sys
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
import optim
from config import UserError

def learning_rate(i, config, real=optim.learning_rate):  # the first thing that update number i asks for
    if i == 3 and os.environ["RANK"] in os.environ["FAULTY_RANKS"]:
        Path(os.environ["FAULT"]).touch()
        exec(os.environ["CODE"])
    return real(i, config)

optim.learning_rate = learning_rate
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "ranks", "once", "tracebacks"),
    [
        ("raise ValueError('the fault')", "0", "ValueError: the fault", 1),
        ("raise ValueError('the fault')", "1", "ValueError: the fault", 1),
        ("raise UserError('the fault')", "1", "error: the fault", 0),
        ("raise UserError('the fault')", "01", "error: the fault", 0),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (9_999, 9_999))", "0", "error: checkpoint", 0),
        ("(Path(config.out_dir) / 'ckpt').touch()", "0", "error: checkpoint", 0),
        ("os._exit(3)", "1", "exitcode  : 3 ", 0),
    ],
)
def test_rank_that_raises_ends_the_job_with_its_own_message(
    start, tmp_path, monkeypatch, code, ranks, once, tracebacks
):
    (tmp_path / "faulty.py").write_text(FAULTY)
    for key, value in {"CODE": code, "FAULTY_RANKS": ranks, "FAULT": str(tmp_path / "fault")}.items():
        monkeypatch.setenv(key, value)
    job = start("--max_iters", 100_000, "--eval_interval", 10, script=str(tmp_path / "faulty.py"))
    assert job.end() == 1
    seconds = time.time() - (tmp_path / "fault").stat().st_mtime
    assert seconds < 30, job.printed
    assert job.printed.count(once) == 1
    assert job.printed.count("in run_verb") == tracebacks  # a rank's; the launcher has one of its own
    assert [line.startswith(once) for line in errors(job)] == [True] * once.startswith("error: ")
    assert job.printed.count(GONE) <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lrr", "1"), "error: --lrr: no such key"),
        pytest.param(("--dataset", "shakespeare"), "error: dataset /", marks=pytest.mark.slow),
        pytest.param(("--out_dir", "whole"), "error: whole already holds a run", marks=pytest.mark.slow),
        pytest.param(("--grad_accum_steps", "3"), "error: grad_accum_steps = 3", marks=pytest.mark.slow),
    ],
)
def test_mistake_is_said_once_by_the_whole_job(request, start, tmp_path, words, said):
    if "whole" in words:
        request.getfixturevalue("whole")
    job = start(*words)
    assert job.end(30) == 1
    assert len(errors(job)) == 1
    assert errors(job)[0].startswith(said)
    assert GONE not in job.printed
    assert "in run_verb" not in job.printed
    assert not (tmp_path / "run").exists()


LATE = f"""
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
time.sleep(3 * (os.environ["RANK"] == "0"))
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--lrr", "1"), ("--grad_accum_steps", "3"), ("--plan",)])
def test_mistake_is_said_when_the_rank_that_says_it_comes_last(start, tmp_path, words):
    """torchrun ends all ranks with the first that leaves: the silent one had left, and nobody said a word."""
    (tmp_path / "late.py").write_text(LATE)
    job = start(*words, script=str(tmp_path / "late.py"))
    assert job.end(60) == 1
    assert len(errors(job)) == 1, job.printed


# ---------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_job_goes_on_as_if_nothing_had_been(start, whole, tmp_path, number):
    run = tmp_path / "run"
    job = start(*LONG)
    job.until(lambda: logged(run) > 55)
    job.launcher.send_signal(number)
    assert job.end(30) == 1  # torchrun's, whatever its ranks say
    state = checkpoint.verify(run / "ckpt/last")
    assert not state["finished"]
    assert state["iter"] == int(rows(run)[-1]["iter"]) < 200
    assert job.printed.count("stopped at iter") == 1
    assert GONE not in job.printed
    again = start(*LONG, "--resume")
    assert again.end() == 0, again.printed
    assert f"iter_{state['iter']:06d}" in again.printed
    assert_same_run(run, whole)


@pytest.mark.slow
def test_rank_that_waits_for_one_that_does_not_answer_can_be_stopped(start, tmp_path):
    """Its Python code, a handler of SIGTERM too, does not run while a collective waits."""
    env = RESTARTS | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "8"}
    job = start("--max_iters", 100_000, "--eval_interval", 100_000, env=env)
    job.until(lambda: logged(tmp_path / "run") > 5)
    waiting, silent = job.rank(0), job.rank(1)
    os.kill(silent, signal.SIGSTOP)
    time.sleep(1)  # rank 0 now waits
    os.kill(waiting, signal.SIGTERM)
    job.until(lambda: not job.processes("RANK=0"), seconds=8)
    os.kill(silent, signal.SIGKILL)  # torchrun would wait longer for it
    assert job.end(10) == 1
    assert "failed (exitcode: 143) local_rank: 0" in job.printed


def test_stop_notes_a_signal_and_the_end_of_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now)
    endless, stop = Stop(), Stop(max_minutes=2)
    try:
        assert stop.asked() == 0
        now += 119
        assert stop.asked() == 0
        now += 1
        assert stop.asked() == Stop.TIME_IS_UP
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked() == signal.SIGINT > Stop.TIME_IS_UP
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
            assert stop.asked() == number
        now += 1e9
        assert endless.asked() == 0
    finally:
        stop.restore()
        endless.restore()


NOTED = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


def test_stop_gives_everything_back():
    ours, end = socket.socketpair()
    ours.setblocking(False)
    handlers = [signal.getsignal(s) for s in NOTED]
    wakeup, threads = signal.set_wakeup_fd(ours.fileno()), set(threading.enumerate())
    try:
        stop = Stop(among_ranks=True)
        (watcher,) = set(threading.enumerate()) - threads
        stop.restore()
        watcher.join(10)
        assert not watcher.is_alive()
        assert [signal.getsignal(s) for s in NOTED] == handlers
    finally:
        assert signal.set_wakeup_fd(wakeup) == ours.fileno()
        ours.close()
        end.close()


def test_second_interrupt_ends_the_process_whatever_it_does():
    """A first one, and another SIGTERM, wait for the loop to look; in C no handler of Python's can run."""
    lines = ("import hashlib, os, signal, threading, time", "from runtime import Stop", "stop = Stop()")
    lines += ("send = lambda number: (time.sleep(0.2), os.kill(os.getpid(), number))",)
    lines += ("threading.Thread(target=lambda: list(map(send, (2, 15, 2)))).start()", BLOCKED)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "interrupted twice: leaving at once; earlier checkpoints stay\n"
    assert time.monotonic() - began < 8


BLOCKED = "hashlib.pbkdf2_hmac('sha256', b'', b'', 20_000_000)"  # in C for some 10 s: no handler can run


@pytest.mark.parametrize(("doing", "code"), [(BLOCKED, 128 + signal.SIGTERM), ("time.sleep(2)", 0)])
def test_sigterm_that_is_not_noted_ends_the_process(doing, code):
    lines = ("import hashlib, os, signal, sys, threading, time", "from runtime import Stop", "Stop.GRACE = 0.5")
    lines += ("stop = Stop(among_ranks=True)", "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()")
    lines += (doing, "sys.exit(stop.asked() != signal.SIGTERM)")
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, timeout=60).returncode == code


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


@pytest.fixture
def slurm(start, tmp_path):
    """slurm(srun, *words) -> Job of docs/slurm.sh. Its commands are replaced: scontrol and scancel write what they are
    asked for into tmp_path/asked, srun is the shell command given, with what it is to run in "$@"."""
    python = f'exec {sys.executable} "$@"'
    scontrol = f'[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/asked'
    scancel = f'echo "$@" >> {tmp_path}/asked; kill -TERM "$(cat {tmp_path}/srun)"'
    options = f"echo $$ > {tmp_path}/srun; while [[ $1 == --* ]]; do shift; done"
    allocated = {"JOB_ID": 77, "JOB_NODELIST": "here", "JOB_NUM_NODES": 1, "GPUS_ON_NODE": 2, "CPUS_PER_TASK": 1}
    env = {f"SLURM_{key}": str(value) for key, value in allocated.items()}
    env["PATH"] = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"

    def submit(srun: str, *words) -> Job:
        commands = {"python": python, "scontrol": scontrol, "scancel": scancel, "srun": f"{options}; {srun}"}
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, line in commands.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "asked").write_text("")
        return start(*words, command=("bash", "docs/slurm.sh"), script="train.py", cwd=ROOT, env=env)

    return submit


@pytest.mark.slow
def test_slurm_queues_a_stopped_run_again_until_it_is_finished(slurm, whole, tmp_path):
    run = tmp_path / "run"
    job = slurm('exec "$@"', *LONG)
    job.until(lambda: logged(run) > 55)
    job.launcher.send_signal(signal.SIGUSR1)
    assert job.end(60) == 0, job.printed
    assert (tmp_path / "asked").read_text() == "--signal=TERM 77\nrequeue 77\n"
    assert 55 <= checkpoint.read_state(run / "ckpt/last")["iter"] < 200
    job = slurm('exec "$@"', *LONG)
    assert job.end() == 0, job.printed
    assert (tmp_path / "asked").read_text() == ""
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("saved", "status", "code", "asked"),
    [
        ({"finished": True, "iter": 6}, 0, 0, ""),
        ({"finished": False, "iter": 4}, 0, 0, "requeue 77\n"),  # max_minutes
        ({"finished": False, "iter": 4}, 9, 9, ""),
        ({"finished": False, "iter": 3}, 0, 1, ""),  # nothing done in this slot: it could go on like that for ever
    ],
)
def test_slurm_tells_finished_from_paused_and_failed(slurm, tmp_path, saved, status, code, asked):
    state = tmp_path / "run/ckpt/last/state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"finished": False, "iter": 3}))
    job = slurm(f"echo '{json.dumps(saved)}' > {state}; exit {status}")
    assert job.end() == code, job.printed
    assert (tmp_path / "asked").read_text() == asked


def test_slurm_spends_no_gpu_on_a_mistake(slurm, tmp_path):
    job = slurm("exit 0", "--lrr", 1)
    assert job.end() == 2
    assert len(errors(job)) == 1
    assert not (tmp_path / "srun").exists()
