"""What goes wrong with a run, of one process or of several, and how it ends: real ones, and Slurm's script."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
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
from in_process import TINY, make_dataset
from processes import ROOT, deliver, free_port, main_thread, waits_long
from run_files import assert_same_run, rows, same, weights
from safetensors.torch import load_file

from config import TrainConfig
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset
from flatgpt.runs import checkpoint
from flatgpt.runtime.stop import StopRequest

HERE = ("--standalone", "--nproc_per_node=2")
RUN = [*TINY, "--dropout", "0.1", "--grad_accum_steps", "4", "--sample_tokens", "0", "--lr_decay_iters", "200"]
LONG = ("--max_iters", "100", "--eval_interval", "20", "--save_interval", "10")
TRAIN = str(ROOT / "train.py")
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else a third of them failed
GONE = "another rank is gone"
NOTED = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class Submitted(ForkedProcess):
    """A process that is not of the fork_server: bash, and what it starts."""

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
    """The jobs' current folder, with data/tiny in it; each gives its own --out_dir."""
    folder = tmp_path_factory.mktemp("home")
    make_dataset(folder)
    return folder


@pytest.fixture
def start(fork_server, home, tmp_path):
    """start(*words) -> ForkedProcess: torchrun of a script with RUN and the words, killed after the test."""
    jobs = []

    def launch(*words, options: tuple = HERE, script: str = TRAIN, env=RESTARTS) -> ForkedProcess:
        settings = (*RUN, "--data_dir", home / "data", "--out_dir", tmp_path / "run", *words)
        words = ("torchrun", *options, script, *settings)
        jobs.append(ForkedProcess(fork_server, tmp_path / f"job{len(jobs)}", home, words, TORCHRUN, env))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.kill()


def logged(run: Path) -> int:
    """How many rows the log has by now."""
    return (run / "metrics.csv").read_text().count("\n") - 1 if (run / "metrics.csv").exists() else 0


def errors(job: ForkedProcess) -> list[str]:
    """What it says to its user."""
    return [line for line in job.output.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------------------------------------------------------------
# many short lives


@pytest.fixture(scope="module")
def forked(fork_server, home, tmp_path_factory):
    """forked(out_dir, *words) -> ForkedProcess of each rank: train.py with RUN and the words; code runs in it before.

    Several ranks get what torchrun would set, but no launcher: their own exit codes are seen, and nobody ends them.
    """
    lives = []

    def give_birth(run: Path, *words, world: int = 1, code: str = "") -> list[ForkedProcess]:
        folder, port = tmp_path_factory.mktemp("lives"), free_port()
        words = (TRAIN, *RUN, "--out_dir", run, *words)
        alike = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(world):
            env = {"RANK": rank, "LOCAL_RANK": rank, **alike} if world > 1 else {}
            env = {key: str(value) for key, value in env.items()}
            lives.append(ForkedProcess(fork_server, folder / str(rank), home, words, code, env))
        return lives[-world:]

    yield give_birth
    for life in lives:
        life.send(signal.SIGKILL)


def ends(lives: list[ForkedProcess]) -> list[int]:
    """The exit codes of all ranks."""
    return [life.wait() for life in lives]


SHORT = ("--max_iters", "12", "--eval_interval", "6", "--save_interval", "4", "--keep_checkpoints", "9")
SHORT += ("--eval_batches", "12")  # else the split is a single pass, and nobody looks for a stop in it
HOOKS = """
import time
from pathlib import Path
updates = 0

def here():  # tells the test that this point is reached, and waits until the test lets it go on
    Path(folder, "here").touch()
    end = time.monotonic() + 300
    while not Path(folder, "go").exists():
        assert time.monotonic() < end, "the test did not let it go on"
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
def undisturbed(forked, home):
    """undisturbed(world) -> the run of SHORT by so many ranks."""

    def run(world: int) -> Path:
        folder = home / f"undisturbed_{world}"
        if not folder.exists():
            lives = forked(folder, *SHORT, world=world)
            assert ends(lives) == [0] * world, lives[0].output
        return folder

    return run


@pytest.fixture(scope="module")
def whole(forked, home) -> Path:
    """The run of LONG by two ranks that nothing disturbs."""
    lives = forked(home / "whole", *LONG, world=2)
    assert ends(lives) == [0, 0], lives[0].output
    return home / "whole"


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "world"), [(n, w) for n in NOTED for w in (1, 2) if (n, w) != (signal.SIGUSR1, 1)])
def test_stopped_at_any_moment_it_goes_on_as_if_nothing_had_been(forked, undisturbed, tmp_path, number, moment, world):
    """SIGTERM and SIGUSR1 come twice, the second time to rank 0 alone, SIGUSR1 at first to the last one alone (to a
    single process it is what SIGTERM is)."""
    run = tmp_path / "run"
    lives = forked(run, *SHORT, world=world, code=HOOKS + MOMENTS[moment])
    lives[0].wait_for_mark()
    for turn in range(1 if number == signal.SIGINT else 2):
        for life in lives[:1] if turn else lives[-1:] if number == signal.SIGUSR1 else lives:
            life.send(number)
    for life in lives:
        life.release()
    assert ends(lives) == [128 + number] * world, lives[0].output
    state = checkpoint.verify(run / "ckpt/last")
    assert not state["finished"]
    expected = {"step": (8,), "evaluation": (6,), "save": (9, 10, 11, 12)}
    assert state["iter"] in expected[moment]
    assert lives[0].output.count(f"stopped at iter {state['iter']} of 12, and saved; to go on:") == 1
    assert [row["val_loss"] != "" for row in rows(run)[6:7]] == [moment != "evaluation"]
    again = forked(run, *SHORT, "--resume", world=world)
    assert ends(again) == [0] * world, again[0].output
    assert f"ckpt/iter_{state['iter']:06d}" in again[0].output
    assert_same_run(run, undisturbed(world))


@pytest.mark.slow
def test_killed_at_20_moments_while_saving_all_the_time_it_ends_as_if_nothing_had_been(forked, tmp_path):
    """A moment is so many rows in the log and a part of the next; where they are there when a life begins, it is in the
    first 0.2 s, before or after it has read its checkpoint."""
    words = ("--n_layer", 1, "--n_head", 1, "--n_embd", 16, "--context_length", 16, "--batch_size", 2)
    words += ("--grad_accum_steps", 2, "--max_iters", 150, "--eval_interval", 25, "--eval_batches", 2)
    words += ("--save_interval", 1)
    run, whole = tmp_path / "run", tmp_path / "whole"
    (alone,) = forked(whole, *words)
    assert alone.wait() == 0, alone.output
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")  # pytest shows it where the test fails
    chance, said, resumed = random.Random(seed), "", set()
    for moment in sorted(chance.uniform(0, 90) for _ in range(20)):
        earliest = time.monotonic() + chance.uniform(0, 0.2)
        (life,) = forked(run, *words, "--resume", "auto")
        life.wait_until(lambda goal=moment, then=earliest: logged(run) > goal and time.monotonic() > then)
        time.sleep(0.02 * (moment % 1))
        life.send(signal.SIGKILL)
        assert life.wait() == -signal.SIGKILL, life.output
        said += life.output
        resumed |= set(re.findall(r"resuming from .*/(iter_\d+)", life.output))
        for folder in checkpoint.checkpoints(run):
            checkpoint.verify(folder)
    (life,) = forked(run, *words, "--resume", "auto")
    assert life.wait() == 0, life.output
    assert "damaged" not in said + life.output
    assert len(resumed) > 8, "too few of the moments were in training"
    assert_same_run(run, whole)
    assert not list((run / "ckpt").glob(".*")), "half-written folders stay"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_second_interrupt_leaves_at_once_and_loses_nothing_saved(forked, undisturbed, tmp_path, moment, world):
    run = tmp_path / "run"
    lives = forked(run, *SHORT, world=world, code=HOOKS + MOMENTS[moment])
    lives[0].wait_for_mark()
    for _ in range(2):
        for life in lives:
            life.send(signal.SIGINT)
    assert ends(lives) == [130] * world, "each ends while it is held"
    assert "interrupted twice: leaving at once" in lives[0].output  # the others may be through with the first by then
    # a save that is being written when the evaluation after it begins may not have arrived
    assert checkpoint.verify(run / "ckpt/last")["iter"] in {"evaluation": (4, 6), "save": (6,)}[moment]
    again = forked(run, *SHORT, "--resume", world=world)
    assert ends(again) == [0] * world, again[0].output
    assert_same_run(run, undisturbed(world))


def test_second_interrupt_leaves_a_collective_too(forked, undisturbed, tmp_path):
    """Rank 0 waits for one that is stopped; Python's handlers do not run there."""
    run = tmp_path / "run"
    backward = 'hook(torch.Tensor, "backward", lambda *words: updates == 8 and Path(folder, "backward").touch())'
    lives = forked(run, *SHORT, world=2, code=f"{HOOKS}{MOMENTS['step']}\n{backward}")
    for life in lives:
        life.wait_for_mark()
    lives[1].send(signal.SIGSTOP)
    lives[0].release()
    lives[0].wait_until((lives[0].folder / "backward").exists)
    lives[0].wait_until(lambda: waits_long(lives[0].pid))
    lives[0].send(signal.SIGINT)
    assert lives[0].code is None, "it did not wait"
    lives[0].send(signal.SIGINT)
    assert lives[0].wait() == 130
    lives[1].send(signal.SIGKILL)
    lives[1].wait()
    again = forked(run, *SHORT, "--resume", world=2)
    assert ends(again) == [0, 0], again[0].output
    assert_same_run(run, undisturbed(2))


# ---------------------------------------------------------------------------------------------------------------------
# four ranks, and from one number of them to another


LARGE = ("--n_embd", 192, "--lr", "5e-3")  # 0.9 million weights: DDP's first bucket is 1 MB
# parallel.wrap_model without the backward pass after which DDP rebuilds its buckets
UNSETTLED = """
import inspect; from flatgpt.runtime import parallel
code, settling = inspect.getsource(parallel._wrap_with_ddp), "model(ids, ids).backward()"
assert code.count(settling) == 1
exec(code.replace(settling, "pass"), vars(parallel))
"""


@pytest.mark.slow
def test_four_ranks_go_on_to_the_bit_and_would_not_with_other_buckets(forked, tmp_path):
    words = (*LARGE, "--max_iters", 8, "--eval_interval", 4, "--save_interval", 2, "--keep_checkpoints", 9)
    whole, run, control = (tmp_path / name for name in ("whole", "run", "control"))
    assert ends(forked(whole, *words, world=4)) == [0] * 4
    lives = forked(run, *words, world=4)
    lives[0].wait_until(lambda: logged(run) > 5)
    lives[3].send(signal.SIGKILL)
    assert lives[3].wait() == -signal.SIGKILL
    assert ends(lives[:3]) == [1] * 3
    shutil.copytree(run, control, symlinks=True)
    assert checkpoint.verify(run / "ckpt/last")["iter"] in (4, 6)
    lives = forked(run, *words, "--resume", world=4)
    assert ends(lives) == [0] * 4, lives[0].output
    assert_same_run(run, whole)
    lives = forked(control, *words, "--resume", world=4, code=UNSETTLED)
    assert ends(lives) == [0] * 4, lives[0].output
    assert not same(weights(control), weights(whole))
    losses = [[float(row["train_loss"]) for row in rows(r)[1:]] for r in (control, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "it is another order, not another sum"


@pytest.mark.slow
def test_ranks_1_2_4_2_1_make_the_updates_of_one(forked, tmp_path):
    words = (*LARGE, "--eval_interval", 5)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ends(forked(whole, *words, "--max_iters", 25)) == [0]
    for turn, world in enumerate((1, 2, 4, 2, 1), 1):
        lives = forked(run, *words, "--resume", "auto", "--max_iters", 5 * turn, world=world)
        assert ends(lives) == [0] * world, lives[0].output
        assert f"; {world} ranks, DDP" in lives[0].output or world == 1
    ours, theirs = ([float(row["train_loss"]) for row in rows(r)[1:]] for r in (run, whole))
    assert len(ours) == 25
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# a rank with numbers that are not finite


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
WRAPPER_PREFIXES = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import model
from flatgpt.runs import checkpoint
from flatgpt.training import optimizer as optim
"""


def wrapped(folder: Path, code: str) -> str:
    """A script that runs the code and then is train.py; `folder` in it is this one."""
    end = f"runpy.run_path({TRAIN!r}, run_name='__main__')\n"
    (folder / "wrapped.py").write_text(f"{WRAPPER_PREFIXES}folder = {str(folder)!r}\n{HOOKS}\n{code}\n{end}")
    return str(folder / "wrapped.py")


def windows(home: Path, update: int, micros: tuple) -> str:
    """Which ones an update has in these micro-batches, as a message lists them."""
    batches = TrainingBatches(Windows(open_dataset(home / "data/tiny").tokens("train"), 32), 4, 4, TrainConfig().seed)
    return ", ".join(str(w) for micro in micros for w in batches.indices(update, micro))


@pytest.mark.slow
def test_nan_on_one_rank_ends_the_job_and_names_it(start, home, tmp_path):
    run = tmp_path / "run"
    script = wrapped(tmp_path, f"KIND = 'loss'\n{POISON}")
    job = start(*SHORT, "--log_interval", 2, script=script)
    assert job.wait() == 1
    (error,) = errors(job)
    shown = windows(home, 7, (1, 3))
    said = f"error: iter 8: the loss is nan on rank 1; its batch there: training windows {shown} (window w begins at"
    assert error.startswith(said)
    assert "what was saved stays" in error
    assert "in run_script" not in job.output
    assert [folder.name for folder in checkpoint.checkpoints(run)] == ["iter_000006", "iter_000004"]
    for folder in checkpoint.checkpoints(run):
        checkpoint.verify(folder)
        assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())
    assert rows(run)[-1]["iter"] == "6"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_on_one_rank_is_left_out_on_all(forked, home, tmp_path, kind):
    run = tmp_path / "run"
    code = f"{HOOKS}\nKIND = {kind!r}\n{POISON}"
    lives = forked(run, *SHORT, "--on_nonfinite", "skip", world=2, code=code)
    assert ends(lives) == [0, 0], lives[0].output
    what = "the loss is nan" if kind == "loss" else "the norm of the gradient is nan"
    shown = windows(home, 7, (1, 3))
    warning = f"warning: iter 8: {what} on rank 1; its batch there: training windows {shown} (window w begins at"
    assert lives[0].output.count("warning: ") == lives[0].output.count(warning) == 1
    assert [int(row["skipped"] or 0) for row in rows(run)] == [0] * 8 + [1] * 5
    for i in (4, 6, 8, 12):
        ours, theirs = (torch.load(life.folder / f"{i}_{rank}.pt") for rank, life in enumerate(lives))
        assert same(ours, theirs)
        assert all(t.isfinite().all() for t in ours.values())


# ---------------------------------------------------------------------------------------------------------------------
# ranks that stall or die


@pytest.mark.slow
def test_stalled_rank_is_named_where_rank_0_has_the_store(forked, tmp_path):
    """All jobs at once, as they mostly wait."""
    cases = dict.fromkeys(("step 0 of 2", "step 1 of 2", "evaluation 0 of 2", "evaluation 1 of 2", "step 0 of 3"))
    for case in cases:
        moment, _, _, world = case.split()
        words = (*SHORT, "--rank_timeout", 10, "--grad_accum_steps", 6)
        cases[case] = forked(tmp_path / case, *words, world=int(world), code=HOOKS + MOMENTS[moment])
    for case, lives in cases.items():
        silent = lives[int(case.split()[1])]
        silent.wait_for_mark()
        silent.send(signal.SIGSTOP)
        for life in lives:
            life.release()
    for case, lives in cases.items():
        rank = int(case.split()[1])
        silent, others = lives[rank], lives[:rank] + lives[rank + 1 :]
        assert ends(others) == [1] * len(others)
        silent.send(signal.SIGKILL)
        said = [line for life in others for line in life.output.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, case
        assert said[0].startswith(f"error: rank {rank} has not answered for 10 s (--rank_timeout)")
        assert checkpoint.verify(tmp_path / case / "ckpt/last")["iter"] in (4, 6)  # its rank 0 may not have come to 6


@pytest.mark.slow
def test_stalled_rank_is_named_where_torchrun_has_the_store(start, tmp_path):
    jobs = []
    for rank in range(2):
        words = ("--max_iters", 100_000, "--eval_interval", 100_000, "--save_interval", 10, "--rank_timeout", 5)
        run, env = tmp_path / str(rank), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
        jobs.append((rank, run, start(*words, "--out_dir", run, env=env)))
    for rank, run, job in jobs:
        job.wait_until((run / "ckpt/last").exists)
        os.kill(job.rank(rank), signal.SIGSTOP)
    for rank, run, job in jobs:
        job.wait_until(lambda job=job: "closing signal SIGTERM" in job.output)
        os.kill(job.rank(rank), signal.SIGKILL)  # torchrun does so after 30 s
        assert job.wait() == 1
        (error,) = errors(job)
        assert error.startswith(f"error: rank {rank} has not answered for 5 s (--rank_timeout)")
        assert f"failed (exitcode: 1) local_rank: {1 - rank}" in job.output
        assert checkpoint.verify(run / "ckpt/last")["iter"] >= 10


def test_rank_that_dies_while_a_checkpoint_is_written_costs_nothing_saved(forked, undisturbed, tmp_path):
    run = tmp_path / "run"
    lives = forked(run, *SHORT, world=2, code=HOOKS + MOMENTS["save"])
    lives[0].wait_for_mark()
    lives[1].send(signal.SIGKILL)
    lives[1].wait()
    lives[0].send(signal.SIGTERM)  # as torchrun does where a rank is gone
    lives[0].release()
    assert lives[0].wait() in (1, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert checkpoint.verify(run / "ckpt/last")["iter"] == 8, "what was in flight arrives"
    again = forked(run, *SHORT, "--resume", world=2)
    assert ends(again) == [0, 0], again[0].output
    assert_same_run(run, undisturbed(2))


# ---------------------------------------------------------------------------------------------------------------------
# a process that dies, and machines


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_is_restarted_and_the_run_ends_as_if_nothing_had_been(start, whole, tmp_path, rank):
    run = tmp_path / "run"
    job = start(*LONG, "--resume", "auto", options=(*HERE, "--max_restarts=3"))
    job.wait_until(lambda: logged(run) > 25)
    os.kill(job.rank(rank), signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert "resuming from" in job.output
    assert_same_run(run, whole)


@pytest.mark.slow
def test_two_machines_train_like_one(start, whole, tmp_path):
    """Two launchers with two ranks each."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ("--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}")
    options += ("--rdzv_id=pair", "--local_addr=127.0.0.1")  # two hosts find their addresses themselves
    machines = [start("--max_iters", 20, "--eval_interval", 20, options=options) for _ in range(2)]
    for job in machines:
        assert job.wait() == 0, job.output
    assert sorted("done: 20 updates" in job.output for job in machines) == [False, True]  # rank 0 alone speaks
    ours, theirs = ([float(r["train_loss"]) for r in rows(r)[1:21]] for r in (tmp_path / "run", whole))
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# a rank that raises: its own message, at once


FAULTY = f"""
import os, resource, runpy, sys
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from flatgpt.training import optimizer as optim
from config import UserError

def learning_rate(i, config, real=optim.learning_rate):  # the first thing that update number i asks for
    if i == 3 and os.environ["RANK"] in os.environ["FAULTY_RANKS"]:
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
def test_rank_that_raises_ends_the_job_with_its_own_message(start, tmp_path, code, ranks, once, tracebacks):
    (tmp_path / "faulty.py").write_text(FAULTY)
    env = RESTARTS | {"CODE": code, "FAULTY_RANKS": ranks}
    job = start("--max_iters", 100_000, "--eval_interval", 10, script=str(tmp_path / "faulty.py"), env=env)
    assert job.wait() == 1
    assert job.output.count(once) == 1
    assert job.output.count("in run_script") == tracebacks  # a rank's; the launcher has one of its own
    assert [line.startswith(once) for line in errors(job)] == [True] * once.startswith("error: ")
    assert job.output.count(GONE) <= 1


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
    assert job.wait() == 1
    assert len(errors(job)) == 1
    assert errors(job)[0].startswith(said)
    assert GONE not in job.output
    assert "in run_script" not in job.output
    assert not (tmp_path / "run").exists()


LATE = f"""
import os, runpy, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
silent, sleep = Path(__file__).with_name("silent"), time.sleep
if os.environ["RANK"] == "0":
    while not silent.exists():
        sleep(0.01)
else:
    time.sleep = lambda seconds: (silent.touch(), sleep(seconds))  # as a rank that prints nothing does before it exits
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--lrr", "1"), ("--grad_accum_steps", "3"), ("--plan",)])
def test_mistake_is_said_when_the_rank_that_says_it_comes_last(start, tmp_path, words):
    """torchrun ends all ranks with the first that leaves: the silent one had left, and nobody said a word."""
    (tmp_path / "late.py").write_text(LATE)
    job = start(*words, script=str(tmp_path / "late.py"))
    assert job.wait() == 1
    assert len(errors(job)) == 1, job.output


# ---------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.slow
@pytest.mark.parametrize("number", NOTED)
def test_stopped_job_goes_on_as_if_nothing_had_been(start, forked, whole, tmp_path, number):
    run = tmp_path / "run"
    job = start(*LONG, options=(*HERE, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"))  # SIGUSR1 ends it otherwise
    job.wait_until(lambda: logged(run) > 25)
    job.send(number)
    assert job.wait() == 1  # torchrun's, whatever its ranks say
    state = checkpoint.verify(run / "ckpt/last")
    assert not state["finished"]
    assert state["iter"] == int(rows(run)[-1]["iter"]) < 100
    assert job.output.count("stopped at iter") == 1
    assert GONE not in job.output
    again = forked(run, *LONG, "--resume", world=2)
    assert ends(again) == [0, 0], again[0].output
    assert f"iter_{state['iter']:06d}" in again[0].output
    assert_same_run(run, whole)


@pytest.mark.slow
def test_rank_that_waits_for_one_that_does_not_answer_can_be_stopped(start, tmp_path):
    """Its Python code, a handler of SIGTERM too, does not run while a collective waits."""
    env = RESTARTS | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "8"}
    job = start("--max_iters", 100_000, "--eval_interval", 100_000, env=env)
    job.wait_until(lambda: logged(tmp_path / "run") > 5)
    waiting, silent = job.rank(0), job.rank(1)
    deliver(silent, signal.SIGSTOP)
    job.wait_until(lambda: waits_long(waiting))
    deliver(waiting, signal.SIGTERM)
    job.wait_until(lambda: not Path(f"/proc/{waiting}").exists())
    os.kill(silent, signal.SIGKILL)  # torchrun would wait longer for it
    assert job.wait() == 1
    assert "failed (exitcode: 143) local_rank: 0" in job.output


def test_stop_notes_a_signal_and_the_end_of_time(monkeypatch):
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


def test_ranks_whose_launcher_is_gone_are_asked_to_stop(monkeypatch):
    """A signal that torchrun does not handle, SIGUSR1 say, ends it; its ranks trained on, and held the folder."""
    stop, alone = StopRequest(among_ranks=True), StopRequest()
    try:
        assert stop.reason() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.reason() == signal.SIGTERM
        assert alone.reason() == 0, "a single process may outlive its shell: nohup"
    finally:
        alone.restore()
        stop.restore()


SLOW = f"""
import runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from flatgpt.runs import checkpoint; from flatgpt.data import dataset
def save(*words, real=checkpoint.save):
    time.sleep(4.5)
    return real(*words)
def check(self, full, real=dataset.Dataset.check):
    time.sleep(7.5)
    return real(self, full)
checkpoint.save, dataset.Dataset.check = save, check
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("ends", [0, 128 + signal.SIGUSR1])
def test_saves_longer_than_the_timeout_are_waited_for(start, tmp_path, ends):
    """Rank 0 was said to hang; and at a stop the other rank left at once, so that torchrun ended rank 0 as it saved."""
    (tmp_path / "slow.py").write_text(SLOW)
    words = ("--max_iters", 2 if ends == 0 else 100_000, "--save_interval", 2, "--eval_interval", 4)
    words += ("--rank_timeout", 3)
    env = RESTARTS | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    job = start(*words, "--on_save_error", "warn", script=str(tmp_path / "slow.py"), env=env)
    if ends:
        job.wait_until(lambda: logged(tmp_path / "run") > 1)
        os.kill(job.rank(1), signal.SIGUSR1)
    assert job.wait() == (1 if ends else 0), job.output
    assert errors(job) == []
    assert GONE not in job.output
    newest = checkpoint.checkpoints(tmp_path / "run")[0]
    assert checkpoint.verify(newest)["iter"] == int(rows(tmp_path / "run")[-1]["iter"])
    assert not list((tmp_path / "run/ckpt").glob(".*.tmp"))


def test_stop_gives_everything_back():
    ours, end = socket.socketpair()
    ours.setblocking(False)
    handlers = [signal.getsignal(s) for s in NOTED]
    wakeup, threads = signal.set_wakeup_fd(ours.fileno()), set(threading.enumerate())
    try:
        stop = StopRequest(among_ranks=True)
        (watcher,) = set(threading.enumerate()) - threads
        stop.restore()
        watcher.join(60)
        assert not watcher.is_alive()
        assert [signal.getsignal(s) for s in NOTED] == handlers
    finally:
        assert signal.set_wakeup_fd(wakeup) == ours.fileno()
        ours.close()
        end.close()


@contextlib.contextmanager
def stopping(doing: str, among_ranks: bool, grace: float = 60):
    """A process that creates a StopRequest and then runs the code `doing`; yields once that code is running."""
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
def test_second_interrupt_ends_the_process_whatever_it_does(among_ranks, numbers):
    """In C no handler of Python's can run. torchrun makes a SIGTERM of its second Ctrl-C."""
    with stopping(BLOCKED, among_ranks) as process:
        for number in numbers:
            deliver(process.pid, number)
        assert process.wait(90) == 128 + signal.SIGINT
        assert process.stderr.read() == "interrupted twice: leaving at once; earlier checkpoints stay\n"


NOTES = """
while stop.reason() != signal.SIGTERM or not timers:
    time.sleep(0.01)
timers[0].finished.wait()
sys.exit(0)
"""  # it runs until the grace period is over


@pytest.mark.parametrize(("doing", "code"), [(BLOCKED, 128 + signal.SIGTERM), (NOTES, 0)])
def test_sigterm_that_is_not_noted_ends_the_process(doing, code):
    with stopping(doing, among_ranks=True, grace=0.5) as process:
        deliver(process.pid, signal.SIGTERM)
        assert process.wait(90) == code


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


@pytest.fixture
def slurm(home, tmp_path):
    """slurm(srun, *words) -> docs/slurm.sh at work, with RUN and the words. Its commands are replaced: scontrol and
    scancel write what they are asked for into tmp_path/asked, srun is the shell command given, with what it is to run
    in "$@"."""
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
def test_slurm_queues_a_stopped_run_again_until_it_is_finished(slurm, whole, tmp_path):
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
    job = slurm(f"echo '{json.dumps(saved)}' > {shlex.quote(str(state))}; exit {status}")
    assert job.wait() == code, job.output
    assert (tmp_path / "asked").read_text() == asked


def test_slurm_spends_no_gpu_on_a_mistake(slurm, tmp_path):
    job = slurm("exit 0", "--lrr", 1)
    assert job.wait() == 2
    assert len(errors(job)) == 1
    assert not (tmp_path / "srun").exists()
