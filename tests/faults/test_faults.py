"""Faults of a run in one process or several: signals, kills, hangs, errors of a rank; and docs/slurm.sh."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import TORCHRUN, ForkedProcess
from in_process import TINY, first_fast, make_dataset
from processes import ROOT, deliver, free_port, main_thread
from run_files import assert_same_run, rows, same

from config import TrainConfig
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset
from flatgpt.runs import checkpoint
from flatgpt.runtime.stop import StopRequest

HERE = ("--standalone", "--nproc_per_node=2")
RUN = [*TINY, "--dropout", "0.1", "--grad_accum_steps", "4", "--sample_tokens", "0", "--lr_decay_iters", "200"]
LONG = ("--max_iters", "100", "--eval_interval", "20", "--save_interval", "10")
TRAIN = str(ROOT / "train.py")
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else a third of them failed
GONE = "another rank has exited"
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class Submitted(ForkedProcess):
    """A process that fork_server does not fork: bash, with the processes that it starts."""

    def __init__(self, folder: Path, command: list, cwd: Path, env: dict):
        folder.mkdir()
        self.folder = folder
        with open(folder / "output.txt", "ab") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=cwd, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT
            )
        self.pid = self.process.pid

    @property
    def code(self) -> int | None:
        return self.process.poll()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The current folder of the jobs, with data/tiny. Each job has its own --out_dir."""
    folder = tmp_path_factory.mktemp("home")
    make_dataset(folder)
    return folder


@pytest.fixture
def start_job(fork_server, home, tmp_path):
    """start_job(*words, code="") -> ForkedProcess: torchrun of train.py with RUN and the words, after the code.

    It is killed after the test.
    """
    jobs = []

    def launch(*words, options: tuple = HERE, code: str = "", env=RESTARTS) -> ForkedProcess:
        script = tmp_path / f"job{len(jobs)}.py"
        script.write_text(
            f"import os, runpy, sys, time; from pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
            f"runpy.run_path({TRAIN!r}, run_name='__main__')\n"
        )
        settings = (*RUN, "--data_dir", home / "data", "--out_dir", tmp_path / "run", *words)
        words = ("torchrun", *options, script, *settings)
        jobs.append(ForkedProcess(fork_server, tmp_path / f"job{len(jobs)}", home, words, TORCHRUN, env))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.kill()


def logged(run: Path) -> int:
    """Return the number of rows in the log so far."""
    return (run / "metrics.csv").read_text().count("\n") - 1 if (run / "metrics.csv").exists() else 0


def errors(job: ForkedProcess) -> list[str]:
    """Return the error lines of a job."""
    return [line for line in job.output.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------------------------------------------------------------
# many short runs


@pytest.fixture(scope="module")
def start(start_ranks, home):
    """start(out_dir, *words, world=2, code="") -> the ForkedProcess of each rank: train.py with RUN and the words."""

    def launch(run: Path, *words, world: int = 2, code: str = "") -> list[ForkedProcess]:
        return start_ranks(*RUN, "--out_dir", run, *words, cwd=home, world=world, code=code)

    return launch


def assert_completes(processes: list[ForkedProcess]) -> None:
    """Wait for all ranks, which have to end with exit code 0."""
    assert [process.wait() for process in processes] == [0] * len(processes), processes[0].output


SHORT = ("--max_iters", "12", "--eval_interval", "6", "--save_interval", "4", "--keep_checkpoints", "9")
SHORT += ("--eval_batches", "12")  # otherwise the split is a single batch, and no stop is checked in it
HOOKS = """
import time
from pathlib import Path
updates = 0

def here():  # tell the test that this point is reached, and wait for the test
    Path(folder, "here").touch()
    end = time.monotonic() + 300
    while not Path(folder, "go").exists():
        assert time.monotonic() < end, "the test did not continue it"
        time.sleep(0.002)

def hook(where, name, before):
    real = getattr(where, name)
    setattr(where, name, lambda *words, **more: (before(*words), real(*words, **more))[1])

def count(i, config):
    global updates
    updates = i + 1

hook(optim, "learning_rate", count)  # the first thing that update i asks for
"""
MOMENTS = {
    "step": 'hook(optim, "learning_rate", lambda i, config: here() if i == 7 else None)',
    "evaluation": 'hook(model.GPT, "hidden_states", lambda self, *words: updates and not self.training and here())',
    "save": 'hook(checkpoint, "save", lambda run_dir, state, *words: here() if state["iter"] == 8 else None)',
}


@pytest.fixture(scope="module")
def uninterrupted(start, home) -> Path:
    """A run of SHORT on two ranks."""
    assert_completes(start(home / "uninterrupted", *SHORT))
    return home / "uninterrupted"


@pytest.fixture(scope="module")
def reference(start, home) -> Path:
    """An uninterrupted run of LONG on two ranks."""
    assert_completes(start(home / "reference", *LONG))
    return home / "reference"


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", first_fast(SIGNALS))
def test_resume_after_a_stop_at_any_moment_is_exact(start, uninterrupted, tmp_path, number, moment):
    """SIGTERM and SIGUSR1 are sent twice, the second time to rank 0 only; the first SIGUSR1 goes to rank 1 only."""
    run = tmp_path / "run"
    processes = start(run, *SHORT, code=HOOKS + MOMENTS[moment])
    processes[0].wait_for_mark()
    for process in processes[-1:] if number == signal.SIGUSR1 else processes:
        process.send(number)
    if number != signal.SIGINT:
        processes[0].send(number)
    for process in processes:
        process.release()
    assert [process.wait() for process in processes] == [128 + number] * 2, processes[0].output
    state = checkpoint.verify(run / "ckpt/last")
    assert not state["finished"]
    assert state["iter"] in {"step": (8,), "evaluation": (6,), "save": (9, 10, 11, 12)}[moment]
    assert processes[0].output.count(f"stopped at iter {state['iter']} of 12; saved. To resume:") == 1
    assert [row["val_loss"] != "" for row in rows(run)[6:7]] == [moment != "evaluation"]
    again = start(run, *SHORT, "--resume")
    assert_completes(again)
    assert f"ckpt/iter_{state['iter']:06d}" in again[0].output
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_resume_after_20_kills_is_exact(start, tmp_path):
    """A moment is a number of log rows and a fraction of the next. If the log has them when a process starts, the kill
    comes in its first 0.2 s, before or after it has read its checkpoint.
    """
    words = ("--n_layer", 1, "--n_head", 1, "--n_embd", 16, "--context_length", 16, "--batch_size", 2)
    words += ("--grad_accum_steps", 2, "--max_iters", 150, "--eval_interval", 25, "--eval_batches", 2)
    words += ("--save_interval", 1)
    run, reference = tmp_path / "run", tmp_path / "reference"
    assert_completes(start(reference, *words, world=1))
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # shown by pytest if the test fails
    chance, said, resumed = random.Random(seed), "", set()
    for moment in sorted(chance.uniform(0, 90) for _ in range(20)):
        earliest = time.monotonic() + chance.uniform(0, 0.2)
        (process,) = start(run, *words, "--resume", "auto", world=1)
        process.wait_until(lambda goal=moment, then=earliest: logged(run) > goal and time.monotonic() > then)
        time.sleep(0.02 * (moment % 1))
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.output
        said += process.output
        resumed |= set(re.findall(r"resuming from .*/(iter_\d+)", process.output))
        for folder in checkpoint.checkpoints(run):
            checkpoint.verify(folder)
    last = start(run, *words, "--resume", "auto", world=1)
    assert_completes(last)
    assert "damaged" not in said + last[0].output
    assert len(resumed) > 8, "too few of the moments were in training"
    assert_same_run(run, reference)
    assert not list((run / "ckpt").glob(".*")), "half-written folders stay"


@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_second_interrupt_exits_at_once_and_keeps_checkpoints(start, uninterrupted, tmp_path, moment):
    run = tmp_path / "run"
    processes = start(run, *SHORT, code=HOOKS + MOMENTS[moment])
    processes[0].wait_for_mark()
    for _ in range(2):
        for process in processes:
            process.send(signal.SIGINT)
    assert [process.wait() for process in processes] == [130] * 2, "each process exits although it is blocked"
    assert "interrupted twice: exiting now" in processes[0].output  # other ranks may have handled the first already
    # the save before an evaluation may not be complete
    assert checkpoint.verify(run / "ckpt/last")["iter"] in {"evaluation": (4, 6), "save": (6,)}[moment]
    assert_completes(start(run, *SHORT, "--resume"))
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_resume_on_four_ranks_is_exact(start, tmp_path):
    """From three ranks up it depends on the order in which DDP sums, which follows its buckets."""
    words = ("--n_embd", 192, "--lr", "5e-3")  # 0.9 million weights: DDP's first bucket is 1 MB
    words += ("--max_iters", 8, "--eval_interval", 4, "--save_interval", 2, "--keep_checkpoints", 9)
    reference, run = tmp_path / "reference", tmp_path / "run"
    assert_completes(start(reference, *words, world=4))
    processes = start(run, *words, world=4)
    processes[0].wait_until(lambda: logged(run) > 5)
    processes[3].send(signal.SIGKILL)
    assert [process.wait() for process in processes] == [1, 1, 1, -signal.SIGKILL]
    assert checkpoint.verify(run / "ckpt/last")["iter"] in (4, 6)
    assert_completes(start(run, *words, "--resume", world=4))
    assert_same_run(run, reference)


# ---------------------------------------------------------------------------------------------------------------------
# non-finite values on one rank


POISON = """
import math, torch; from flatgpt.training import nonfinite as health

def forward(self, *words, real=model.GPT.forward, **more):
    loss = real(self, *words, **more)
    if self.training and updates == 8 and os.environ["RANK"] == "1":
        if KIND == "loss":
            loss = loss * math.nan
        else:
            loss.register_hook(lambda gradient: gradient * math.nan)
    return loss

model.GPT.forward = forward
kept = lambda model, i, *loss: torch.save(model.state_dict(), f"{folder}/{i}_{os.environ['RANK']}.pt")
hook(health, "require_finite", kept)
"""


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_on_one_rank_is_skipped_on_all(start, home, tmp_path, kind):
    run = tmp_path / "run"
    processes = start(run, *SHORT, "--on_nonfinite", "skip", code=f"{HOOKS}\nKIND = {kind!r}\n{POISON}")
    assert_completes(processes)
    what = "the loss is nan" if kind == "loss" else "the norm of the gradient is nan"
    batches = TrainingBatches(Windows(open_dataset(home / "data/tiny").tokens("train"), 32), 4, 4, TrainConfig().seed)
    shown = ", ".join(str(window) for micro in (1, 3) for window in batches.indices(7, micro))
    warning = f"warning: iter 8: {what} on rank 1; training windows of its batch: {shown} (window w starts at"
    assert processes[0].output.count("warning: ") == processes[0].output.count(warning) == 1
    assert [int(row["skipped"] or 0) for row in rows(run)] == [0] * 8 + [1] * 5
    for i in (4, 6, 8, 12):
        ours, theirs = (torch.load(process.folder / f"{i}_{rank}.pt") for rank, process in enumerate(processes))
        assert same(ours, theirs)
        assert all(t.isfinite().all() for t in ours.values())


# ---------------------------------------------------------------------------------------------------------------------
# ranks that stall or die


@pytest.mark.slow
def test_stalled_rank_is_named(start, tmp_path):
    """All jobs run at once, as they mostly wait."""
    cases = dict.fromkeys(("step 0 of 2", "step 1 of 2", "evaluation 0 of 2", "evaluation 1 of 2", "step 0 of 3"))
    for case in cases:
        moment, _, _, world = case.split()
        words = (*SHORT, "--rank_timeout", 10, "--grad_accum_steps", 6)
        cases[case] = start(tmp_path / case, *words, world=int(world), code=HOOKS + MOMENTS[moment])
    for case, processes in cases.items():
        silent = processes[int(case.split()[1])]
        silent.wait_for_mark()
        silent.send(signal.SIGSTOP)
        for process in processes:
            process.release()
    for case, processes in cases.items():
        rank = int(case.split()[1])
        silent, others = processes[rank], processes[:rank] + processes[rank + 1 :]
        assert [process.wait() for process in others] == [1] * len(others)
        silent.send(signal.SIGKILL)
        said = [line for process in others for line in process.output.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, case
        assert said[0].startswith(f"error: rank {rank} has not responded for 10 s (--rank_timeout)")
        assert checkpoint.verify(tmp_path / case / "ckpt/last")["iter"] in (4, 6)  # its rank 0 may not have come to 6


def test_rank_that_dies_during_a_save_loses_no_checkpoint(start, uninterrupted, tmp_path):
    run = tmp_path / "run"
    processes = start(run, *SHORT, code=HOOKS + MOMENTS["save"])
    processes[0].wait_for_mark()
    processes[1].send(signal.SIGKILL)
    processes[1].wait()
    processes[0].send(signal.SIGTERM)  # as torchrun does where a rank is gone
    processes[0].release()
    assert processes[0].wait() in (1, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert checkpoint.verify(run / "ckpt/last")["iter"] == 8, "what was in flight arrives"
    assert_completes(start(run, *SHORT, "--resume"))
    assert_same_run(run, uninterrupted)


# ---------------------------------------------------------------------------------------------------------------------
# a process that dies, and machines


@pytest.mark.slow
def test_restart_of_a_killed_rank_is_exact(start_job, reference, tmp_path):
    run = tmp_path / "run"
    job = start_job(*LONG, "--resume", "auto", options=(*HERE, "--max_restarts=3"))
    job.wait_until(lambda: logged(run) > 25)
    os.kill(job.rank(0), signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert "resuming from" in job.output
    assert_same_run(run, reference)


@pytest.mark.slow
def test_two_machines_train_as_one(start_job, reference, tmp_path):
    """Two launchers with two ranks each."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ("--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}")
    options += ("--rdzv_id=pair", "--local_addr=127.0.0.1")  # two hosts find their addresses themselves
    machines = [start_job("--max_iters", 20, "--eval_interval", 20, options=options) for _ in range(2)]
    for job in machines:
        assert job.wait() == 0, job.output
    assert sorted("done: 20 updates" in job.output for job in machines) == [False, True]  # rank 0 alone speaks
    ours, theirs = ([float(r["train_loss"]) for r in rows(r)[1:21]] for r in (tmp_path / "run", reference))
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# a rank that raises: its own message, at once


FAULTY = """
import resource; from config import UserError; from flatgpt.training import optimizer as optim

def learning_rate(i, config, real=optim.learning_rate):  # the first thing that update number i asks for
    if i == 3 and os.environ["RANK"] in RANKS:
        exec(CODE)
    return real(i, config)

optim.learning_rate = learning_rate
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "ranks", "once", "tracebacks"),
    [
        ("raise ValueError('the fault')", "1", "ValueError: the fault", 1),
        ("raise UserError('the fault')", "01", "error: the fault", 0),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (9_999, 9_999))", "0", "error: checkpoint", 0),
        ("os._exit(3)", "1", "exitcode  : 3 ", 0),
    ],
)
def test_rank_that_raises_ends_the_job_with_its_own_message(start_job, code, ranks, once, tracebacks):
    code = f"RANKS, CODE = {ranks!r}, {code!r}\n{FAULTY}"
    job = start_job("--max_iters", 100_000, "--eval_interval", 10, code=code)
    assert job.wait() == 1
    assert once.startswith("error: ") or job.output.count(once) == 1  # torchrun repeats an error line at its end
    assert job.output.count("in run_script") == tracebacks  # a rank's; the launcher has one of its own
    assert [line.startswith(once) for line in errors(job)] == [True] * once.startswith("error: ")
    assert job.output.count(GONE) <= 1


def test_mistake_is_reported_once_by_a_job(start_job, tmp_path):
    job = start_job("--lrr", "1")
    assert job.wait() == 1
    (error,) = errors(job)
    assert error.startswith("error: --lrr: no such key")
    assert GONE not in job.output
    assert "in run_script" not in job.output
    assert not (tmp_path / "run").exists()


LATE = """
silent, sleep = Path(__file__).with_name("silent"), time.sleep
if os.environ["RANK"] == "0":
    while not silent.exists():
        sleep(0.01)
else:
    time.sleep = lambda seconds: (silent.touch(), sleep(seconds))  # as a rank that prints nothing does before it exits
"""


@pytest.mark.slow
def test_mistake_is_reported_if_the_reporting_rank_is_the_slowest(start_job):
    """torchrun ends all ranks when one exits. A rank that exited silently ended the one that had yet to report."""
    job = start_job("--grad_accum_steps", "3", code=LATE)
    assert job.wait() == 1
    assert len(errors(job)) == 1, job.output
    assert "traceback : error: grad_accum_steps = 3" in job.output.splitlines()[-2], "torchrun's last words"


# ---------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.slow
def test_resume_of_an_interrupted_job_is_exact(start_job, start, reference, tmp_path):
    run = tmp_path / "run"
    job = start_job(*LONG)
    job.wait_until(lambda: logged(run) > 25)
    job.send(signal.SIGINT)
    assert job.wait() == 1  # torchrun's, whatever its ranks say
    state = checkpoint.verify(run / "ckpt/last")
    assert not state["finished"]
    assert state["iter"] == int(rows(run)[-1]["iter"]) < 100
    assert job.output.count("stopped at iter") == 1
    assert GONE not in job.output
    again = start(run, *LONG, "--resume")
    assert_completes(again)
    assert f"iter_{state['iter']:06d}" in again[0].output
    assert_same_run(run, reference)


def test_stop_request_records_signals_and_the_end_of_its_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    endless, stop = StopRequest(), StopRequest(max_minutes=2)
    try:
        assert stop.reason() == 0
        now += 119
        assert stop.reason() == 0
        now += 1
        assert stop.reason() == StopRequest.TIME_IS_UP
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == signal.SIGINT > StopRequest.TIME_IS_UP
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
            assert stop.reason() == number
        now += 1e9
        assert endless.reason() == 0
    finally:
        stop.restore()
        endless.restore()


def test_ranks_stop_if_torchrun_is_gone(monkeypatch):
    """A signal that torchrun does not handle, such as SIGUSR1, ends torchrun. Its ranks went on training."""
    stop, alone = StopRequest(among_ranks=True), StopRequest()
    try:
        assert stop.reason() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.reason() == signal.SIGTERM
        assert alone.reason() == 0, "a single process may outlive its shell: nohup"
    finally:
        alone.restore()
        stop.restore()


SLOW = """
from flatgpt.runs import checkpoint; from flatgpt.data import dataset
def save(*words, real=checkpoint.save):
    time.sleep(4.5)
    return real(*words)
def check(self, full, real=dataset.Dataset.check):
    time.sleep(7.5)
    return real(self, full)
checkpoint.save, dataset.Dataset.check = save, check
"""


@pytest.mark.slow
def test_saves_may_take_longer_than_the_timeout(start_job, tmp_path):
    """Rank 0 was reported as hanging; after a stop the other rank exited, and torchrun ended rank 0 during its save."""
    words = ("--max_iters", 100_000, "--save_interval", 2, "--eval_interval", 4, "--rank_timeout", 3)
    env = RESTARTS | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    job = start_job(*words, "--on_save_error", "warn", code=SLOW, env=env)
    job.wait_until(lambda: logged(tmp_path / "run") > 1)
    os.kill(job.rank(1), signal.SIGUSR1)
    assert job.wait() == 1, job.output
    assert errors(job) == []
    assert GONE not in job.output
    newest = checkpoint.checkpoints(tmp_path / "run")[0]
    assert checkpoint.verify(newest)["iter"] == int(rows(tmp_path / "run")[-1]["iter"])
    assert not list((tmp_path / "run/ckpt").glob(".*.tmp"))


def test_stop_request_restores_handlers_and_ends_its_thread():
    ours, end = socket.socketpair()
    ours.setblocking(False)
    handlers = [signal.getsignal(s) for s in SIGNALS]
    wakeup, threads = signal.set_wakeup_fd(ours.fileno()), set(threading.enumerate())
    try:
        stop = StopRequest(among_ranks=True)
        (watcher,) = set(threading.enumerate()) - threads
        stop.restore()
        watcher.join(60)
        assert not watcher.is_alive()
        assert [signal.getsignal(s) for s in SIGNALS] == handlers
    finally:
        assert signal.set_wakeup_fd(wakeup) == ours.fileno()
        ours.close()
        end.close()


@contextlib.contextmanager
def stopping(doing: str, among_ranks: bool, grace: float = 60):
    """A process that creates a StopRequest and runs the code `doing`. Yields once that code is running."""
    lines = (
        "import hashlib, signal, sys, threading, time",
        "from flatgpt.runtime.stop import StopRequest",
        f"StopRequest.GRACE = {grace}",
    )
    lines += ("timers, timer = [], threading.Timer",)
    lines += ("threading.Timer = lambda *words: timers.append(timer(*words)) or timers[-1]",)
    lines += (f"stop = StopRequest(among_ranks={among_ranks})", "print('ready', flush=True)", doing)
    words = [sys.executable, "-c", "\n".join(lines)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            _, before = main_thread(process.pid)
            while doing == BLOCKED and main_thread(process.pid)[1] < before + 10:
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


BLOCKED = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"  # 15 minutes in C: no Python handler can run


@pytest.mark.parametrize(("among_ranks", "numbers"), [(False, (2, 15, 2)), (True, (2, 15))])
def test_second_interrupt_ends_a_process_that_is_busy_in_c(among_ranks, numbers):
    """Python's handlers do not run while C code runs. torchrun forwards its second Ctrl-C as SIGTERM."""
    with stopping(BLOCKED, among_ranks) as process:
        for number in numbers:
            deliver(process.pid, number)
        assert process.wait(90) == 128 + signal.SIGINT
        assert process.stderr.read() == "interrupted twice: exiting now; earlier checkpoints are kept\n"


NOTES = """
while stop.reason() != signal.SIGTERM or not timers:
    time.sleep(0.01)
timers[0].finished.wait()
sys.exit(0)
"""  # it runs until the grace period is over


@pytest.mark.parametrize(("doing", "code"), [(BLOCKED, 128 + signal.SIGTERM), (NOTES, 0)])
def test_sigterm_that_is_not_recorded_ends_the_process(doing, code):
    with stopping(doing, among_ranks=True, grace=0.5) as process:
        deliver(process.pid, signal.SIGTERM)
        assert process.wait(90) == code


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


@pytest.fixture
def slurm(home, tmp_path):
    """slurm(srun, *words) -> docs/slurm.sh with RUN and the words, as a running process.

    scontrol and scancel are replaced by commands that write their arguments to tmp_path/asked, srun by the given shell
    command, which has the command to run in "$@".
    """
    python = f'exec "{sys.executable}" "$@"'
    asked, pid = (shlex.quote(str(tmp_path / name)) for name in ("asked", "srun"))
    scontrol = f'[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" >> {asked}'
    scancel = f'echo "$@" >> {asked}; kill -TERM "$(cat {pid})"'
    options = f"echo $$ > {pid}; while [[ $1 == --* ]]; do shift; done"
    allocated = {"JOB_ID": 77, "JOB_NODELIST": "here", "JOB_NUM_NODES": 1, "GPUS_ON_NODE": 2, "CPUS_PER_TASK": 1}
    env = {f"SLURM_{key}": str(value) for key, value in allocated.items()}
    env |= {"PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
    jobs = []

    def submit(srun: str, *words) -> Submitted:
        commands = {"python": python, "scontrol": scontrol, "scancel": scancel, "srun": f"{options}; {srun}"}
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, line in commands.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "asked").write_text("")
        settings = (*RUN, "--data_dir", home / "data", "--out_dir", tmp_path / "run", *words)
        jobs.append(Submitted(tmp_path / f"job{len(jobs)}", ["bash", "docs/slurm.sh", *settings], ROOT, env))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.kill()
        job.wait()


@pytest.mark.slow
def test_slurm_requeues_a_stopped_run_until_it_is_finished(slurm, reference, tmp_path):
    run = tmp_path / "run"
    job = slurm('exec "$@"', *LONG)
    job.wait_until(lambda: logged(run) > 25)
    job.send(signal.SIGUSR1)
    assert job.wait() == 0, job.output
    assert (tmp_path / "asked").read_text() == "--signal=TERM 77\nrequeue 77\n"
    assert 25 <= checkpoint.read_state(run / "ckpt/last")["iter"] < 100
    job = slurm('exec "$@"', *LONG)
    assert job.wait() == 0, job.output
    assert (tmp_path / "asked").read_text() == ""
    assert_same_run(run, reference)


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
    state = tmp_path / "run/ckpt/iter_000003/state.json"
    state.parent.mkdir(parents=True)
    (tmp_path / "run/ckpt/last").write_text("iter_000003")  # a file system without symlinks
    common = {"format": 1, "config": {"max_iters": 6}, "files": {}}
    state.write_text(json.dumps({**common, "finished": False, "iter": 3}))
    job = slurm(f"echo '{json.dumps(common | saved)}' > {shlex.quote(str(state))}; exit {status}")
    assert job.wait() == code, job.output
    assert (tmp_path / "asked").read_text() == asked


def test_slurm_starts_nothing_after_a_mistake(slurm, tmp_path):
    job = slurm("exit 0", "--lrr", 1)
    assert job.wait() == 2
    assert len(errors(job)) == 1
    assert not (tmp_path / "srun").exists()
