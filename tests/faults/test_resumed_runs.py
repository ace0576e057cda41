"""Runs that stop anywhere and are resumed: to the bit, in their folder, and with what the user changes."""

import errno
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from in_process import TINY, train_here
from processes import ROOT, deliver, running
from run_files import assert_same_run, links, logged_iters, rows, saved_iters, snapshot, val_losses

import train
from config import TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.interop.pretrained import initial_shape, run_settings
from flatgpt.runs import checkpoint, history
from flatgpt.runtime.stop import StopRequest

pytestmark = pytest.mark.slow

RUN = Path("out/quickstart")
QUIET = ("--sample_tokens", 0)

# Rows, evaluations, saves and the end fall on different iterations.
ODD = (*QUIET, "--log_interval", 3, "--eval_interval", 4, "--save_interval", 5, "--max_iters", 14, "--dropout", 0.2)
ODD += ("--grad_accum_steps", 2, "--batch_size", 2, "--eval_batches", 3, "--lr", "2e-2", "--keep_checkpoints", 3)


class StopAfterLooks(StopRequest):
    """Asks the loop to stop after so many looks at `reason`, wherever that is."""

    looks = 10**9

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = itertools.count(1)

    def reason(self) -> int:
        return signal.SIGTERM if next(self.seen) >= self.looks else 0


@pytest.mark.parametrize(
    ("looks", "words", "every_time"),
    [
        (3, ("--dtype", "float32"), ()),
        (7, ("--dtype", "float16"), ("--save_minutes", 1e-9)),
        (7, ("--optimizer", "muon", "--lr", "5e-3"), ()),
    ],
    ids=["float32", "float16 and saves all the time", "muon"],
)
def test_run_that_was_stopped_anywhere_ends_as_the_undisturbed_one(tiny_data, monkeypatch, looks, words, every_time):
    whole = train_here(*ODD, *words, "--out_dir", "out/whole")
    assert logged_iters(whole) == [0, 3, 4, 5, 6, 8, 9, 10, 12, 14]
    losses = {i: loss for i, loss in val_losses(whole).items() if i}
    assert links(whole) == {"last": "iter_000014", "best": f"iter_{min(losses, key=losses.get):06d}"}
    real, stops = train.evaluate, set()

    def evaluate(*args):
        loss = real(*args)
        stops.update({"in an evaluation"} if loss is None else ())
        return loss

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "StopRequest", StopAfterLooks)
    for start in range(30):
        StopAfterLooks.looks = looks + start % 2
        try:
            train_here(*ODD, *words, *every_time, "--resume", "auto")
            break
        except SystemExit:
            i = saved_iters(RUN)[0]
            stops.add("at a row" if any(i % n == 0 for n in (3, 4, 5)) else "between rows")
    assert_same_run(RUN, whole)
    assert stops == {"in an evaluation", "between rows", "at a row"}


@pytest.mark.parametrize(
    ("moment", "folder", "command"),
    [
        ("before the first update", "a $b", "python train.py --config './a $b/config.toml'"),
        ("at an evaluation", "a $b", "python train.py --resume './a $b'"),
        ("at an evaluation", "auto", "python train.py --resume ./auto"),
        ("at an evaluation", "--x/y", "python train.py --resume ./--x/y"),
        ("at an evaluation", "out/quickstart", "python train.py --resume"),
    ],
)
def test_printed_command_continues_the_run(tiny_data, monkeypatch, capsys, moment, folder, command):
    """Before the first update there is nothing to resume; an evaluation that is due is left to the resumed run."""
    words = ("--max_iters", 5, "--eval_interval", 2, "--sample_tokens", 0)
    whole = train_here(*words, "--out_dir", "out/whole")
    name, count = ("evaluate", 1) if moment.startswith("before") else ("train_step", 4)
    real, calls = getattr(train, name), itertools.count(1)

    def interrupted(*args):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, name, interrupted)
        with pytest.raises(SystemExit) as ended:
            train_here(*words, f"--out_dir={folder}")
    assert ended.value.code == 128 + signal.SIGTERM
    assert rows(Path(folder))[-1]["val_loss"] == ""
    *_, said, typed = capsys.readouterr().out.splitlines()
    if moment.startswith("before"):
        assert said == "stopped at iter 0 of 5; nothing to save. To start again:"
    else:
        assert said == "stopped at iter 4 of 5; saved. To resume:"
    assert typed.strip() == command
    monkeypatch.setattr("flatgpt.training.reporting.draw_picture", lambda *_: None)
    train.train(cli.parse(TrainConfig, shlex.split(command)[2:], initial_shape, run_settings))
    assert_same_run(Path(folder), whole)


def to_pointers(ckpt: Path) -> None:
    """As on a file system that refuses symlinks."""
    for name in ("last", "best"):
        target = os.readlink(ckpt / name)
        (ckpt / name).unlink()
        (ckpt / name).write_text(target)


def to_folders(ckpt: Path) -> None:
    """As `cp -rL`, S3 and zip leave it."""
    for name in ("last", "best"):
        target = os.readlink(ckpt / name)
        (ckpt / name).unlink()
        shutil.copytree(ckpt / target, ckpt / name)


def to_nothing(ckpt: Path, target: str = "") -> None:
    for name in ("last", "best"):
        (ckpt / name).unlink()
        if target:
            (ckpt / name).symlink_to(target)


def to_best_alone(ckpt: Path) -> None:
    to_folders(ckpt)
    for name in ("last", "iter_000030", "iter_000060"):
        shutil.rmtree(ckpt / name)


COPIES = {
    "pointers": (to_pointers, 30, 60),
    "folders": (to_folders, 30, 60),
    "no links": (to_nothing, 60, 60),
    "dangling": (lambda ckpt: to_nothing(ckpt, "iter_000099"), 60, 60),
    "best alone": (to_best_alone, 30, 30),
}


@pytest.mark.parametrize(("change", "best", "last"), COPIES.values(), ids=COPIES)
def test_run_is_read_and_resumed_whatever_a_copy_made_of_its_links(run_copy, cli, monkeypatch, change, best, last):
    """Each reader finds the best or newest checkpoint; a resumed run ends as the original and keeps its checkpoints."""
    ckpt, words = (
        RUN / "ckpt",
        ("--eval_interval", 30, "--lr", "5e-3", "--max_iters", 61, *QUIET, "--keep_checkpoints", 9),
    )
    (ckpt / "best").unlink()
    (ckpt / "best").symlink_to("iter_000030")
    whole = Path(shutil.copytree(RUN, "out/whole", symlinks=True))
    change(ckpt)
    losses = val_losses(RUN)
    for script in ("eval", "infer"):
        done = cli(script, "--model_path", RUN, "--device", "cpu", *["--prompt", "a"] * (script == "infer"))
        assert (done.code, re.search(r"iter +(\d+)", done.out + done.err)[1]) == (0, str(best))
    for name, found in ((RUN, best), (ckpt / "last", last)):
        train_here("--init_from", name, "--max_iters", 1, "--out_dir", "out/new", *QUIET, "--overwrite")
        assert val_losses(Path("out/new"))[0] == pytest.approx(losses[found], abs=1e-5)
    assert history.read(RUN).state["iter"] == last
    if change is to_pointers:
        monkeypatch.setattr(os, "symlink", refuse_symlink)
    train_here(*words, "--resume")
    train_here(*words, "--resume", whole / f"ckpt/iter_{last:06d}", "--out_dir", whole)
    assert_same_run(RUN, whole)
    assert saved_iters(RUN) == [61, 60, 30]
    assert not list(ckpt.glob("lost-*"))


def refuse_symlink(*words, **settings) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_last_names_the_resumed_checkpoint_while_later_ones_are_moved_aside(run_copy, monkeypatch):
    """And `best` that of then: they lead nowhere at no moment, not even if the process is killed."""
    real, seen = checkpoint.move_aside, []

    def move_aside(*words):
        seen.append(links(RUN))
        real(*words)

    monkeypatch.setattr(checkpoint, "move_aside", move_aside)
    train_here(*QUIET, "--lr", "5e-3", "--eval_interval", 40, "--max_iters", 31, "--resume", RUN / "ckpt/iter_000030")
    assert seen == [{"last": "iter_000030"}], "iter 30 was saved before it was evaluated"


def test_half_written_checkpoint_is_removed_at_the_next_start(tiny_data):
    train_here(*QUIET, "--max_iters", 3)
    (RUN / "ckpt/.iter_000009.tmp").mkdir()
    (RUN / "ckpt/.iter_000009.tmp/model.safetensors").write_bytes(b"half")
    train_here(*QUIET, "--max_iters", 4, "--resume")
    assert sorted(path.name for path in (RUN / "ckpt").iterdir()) == ["best", "iter_000003", "iter_000004", "last"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--resume", "is finished (iter 4 of 4): to train on, add --max_iters N"),
        ("--resume auto", "is finished (iter 4 of 4): to train on, add --max_iters N"),
        ("--resume out/quickstart/ckpt/last --out_dir out/new", "is finished (iter 4 of 4): to train on"),
        ("--resume --max_iters 3", "is at iter 4, past max_iters = 3: to train on, add --max_iters N"),
        ("--resume --max_iters 9 --patience 2", "(iter 4 of 9, no new best in 2 evaluations): to train on, add --pati"),
        ("--resume --max_iters 5", ""),
        ("--resume --max_iters 9 --patience 3", ""),
        ("--resume out/quickstart/ckpt/iter_000003", ""),
    ],
)
def test_run_that_is_finished_says_how_to_train_on_and_changes_nothing(tiny_data, monkeypatch, capsys, words, said):
    """The exit code is 0: a job that was requeued has nothing to do."""
    losses = iter((9.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0))  # the best is that of iteration 2
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
    train_here(*QUIET, "--max_iters", 4, "--eval_interval", 1, "--keep_checkpoints", 9)
    before, _ = snapshot(Path("out")), capsys.readouterr()
    monkeypatch.setattr("flatgpt.training.reporting.draw_picture", lambda *_: None)
    train.train(cli.parse(TrainConfig, words.split(), initial_shape, run_settings))
    *_, last = capsys.readouterr().out.splitlines()
    assert said in last
    lock = str(RUN / ".lock")
    assert (snapshot(Path("out")) | {lock: None} == before | {lock: None}) == bool(said)


def test_resumed_run_keeps_its_shape_whatever_becomes_of_init_from(tiny_data):
    """The same command again, as Slurm's script runs it, when that folder has gone or holds another model."""

    def again(*more) -> list[int]:
        shape = "--n_layer 2 --n_head 2 --n_embd 32 --context_length 32 "
        words = [*" ".join(TINY).replace(shape, "").split(), "--init_from", "out/first", "--max_iters"]
        train.train(cli.parse(TrainConfig, [*words, *map(str, more)], initial_shape, run_settings))
        return logged_iters(RUN)

    source = train_here("--out_dir", "out/first")
    assert again(3, "--resume", "auto") == [0, 1, 2, 3]
    assert val_losses(RUN)[0] == pytest.approx(val_losses(source)[6], rel=1e-6)
    source.rename("out/gone")
    assert again(4, "--resume", "auto") == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="init_from = out/first: no such folder"):
        again(4, "--out_dir", "out/new")
    train_here("--n_layer", 3, "--out_dir", "out/first")
    assert again(5, "--resume") == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# a folder that is in use


@pytest.fixture
def owner(tiny_data):
    """A process that trains in out/quickstart, has saved, and is stopped by SIGSTOP."""
    words = [sys.executable, ROOT / "train.py", *TINY, *QUIET, "--save_interval", 10]
    words += ["--max_iters", 100_000, "--eval_interval", 100_000, "--eval_batches", 1]
    with open("printed.txt", "wb") as file, running(words, stdout=file, stderr=file) as process:
        deadline = time.monotonic() + 120
        while not (RUN / "ckpt/last").exists():
            assert process.poll() is None, Path("printed.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        deliver(process.pid, signal.SIGSTOP)
        yield process


def test_second_process_is_refused_touches_nothing_and_comes_after_a_crash(owner):
    before = snapshot(Path.cwd())
    text = f"{RUN} is in use by process {owner.pid} on {socket.gethostname()}: wait for it, stop it, or choose another"
    for words in ((), ("--resume",), ("--resume", "auto"), ("--resume", RUN / "ckpt/last"), ("--overwrite",)):
        with pytest.raises(UserError) as caught:
            train_here(*QUIET, *words)
        assert str(caught.value).startswith(text), words
        assert snapshot(Path.cwd()) == before, words
    saved = checkpoint.read_state(RUN / "ckpt/last")["iter"]
    owner.kill()
    owner.wait()
    assert (RUN / ".lock").exists(), "a killed process does not remove it"
    words = (*QUIET, "--eval_batches", 1, "--lr_decay_iters", saved + 2, "--max_iters")
    train_here(*words, saved + 1, "--resume", "auto")
    train_here(*words, saved + 2, "--resume")  # the run before released its lock
    assert checkpoint.read_state(RUN / "ckpt/last")["iter"] == saved + 2


def test_run_that_fails_releases_its_folder_and_keeps_the_users_config(tiny_data, monkeypatch):
    mine = RUN / "config.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# mine\nlr = 1e-3\n")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda run, i: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_here(*QUIET, "--max_iters", 1)
    train_here(*QUIET, "--max_iters", 1)
    assert "# mine\nlr = 1e-3\n" in [path.read_text() for path in RUN.glob("config.toml.old-*")]


def test_secrets_of_the_environment_are_in_no_file_and_no_output(tiny_data, monkeypatch, capfd):
    """In the command line that state.json keeps, the name stands for it."""
    value = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", value)
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--sample_prompt", value, f"--data_dir=x{value}y"])
    train_here("--max_iters", 1)
    masked = "$AWS_SECRET_ACCESS_KEY"
    command = checkpoint.read_state(RUN / "ckpt/last")["command"]
    assert command == ["train.py", "--sample_prompt", masked, f"--data_dir=x{masked}y"]
    assert [path for path in RUN.rglob("*") if path.is_file() and value.encode() in path.read_bytes()] == []
    assert value not in "".join(capfd.readouterr())
