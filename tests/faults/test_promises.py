"""Promises that involve several modules: checked data, checkpoints, equal ranks, rows of the log."""

import math
import os
import re
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from in_process import TINY, train_here
from processes import ROOT
from run_files import rows

import train
from config import TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.runs import checkpoint
from flatgpt.training import reporting, setup

RUN = Path("out/quickstart")
QUIET = ("--sample_tokens", 0)


def change_id(split: str, to: int) -> str:
    """Set the last id of a split's last shard; returns the shard's path."""
    path = sorted(Path("data/tiny").glob(f"{split}_*.bin"))[-1]
    raw = path.read_bytes()
    assert raw[-2:] != to.to_bytes(2, "little")
    path.write_bytes(raw[:-2] + to.to_bytes(2, "little"))
    return str(path)


def test_each_fault_in_the_table_has_a_test():
    table = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)::(test_\w+)` \|$", table, re.M)
    assert len(named) == len(re.findall(r"^\| ", table, re.M)) - 1
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        assert f"def {test}(" in path.read_text(encoding="utf-8"), (file, test)


# ---------------------------------------------------------------------------------------------------------------------
# data


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_are_checked_before_the_first_update(tiny_data, split):
    """Including ids that no batch of this run contains."""
    path = change_id(split, 257)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: id 257 at byte .* is not in the vocabulary of 257"):
        train_here(*QUIET, "--eval_batches", 1)
    assert not Path("out").exists()


def test_verify_data_finds_a_changed_id(tiny_data):
    path = change_id("val", 7)
    train_here(*QUIET, "--out_dir", "out/unverified")
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: SHA-256 differs from meta\.json"):
        train_here(*QUIET, "--verify_data")
    assert not RUN.exists()


def test_each_micro_batch_has_its_own_dropout_masks(tiny_data, measured, monkeypatch):
    measured("fused")
    seen, real = [], torch.nn.functional.dropout

    def dropout(x, *words, **more):
        y = real(x, *words, **more)
        seen.append(bytes((y == 0).flatten().tolist()))
        return y

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    prepared = setup.build_run(cli.parse(TrainConfig, [*TINY, "--dropout", "0.5", "--grad_accum_steps", "2"]))
    for i in range(2):
        train.train_step(prepared, i)
    assert len(seen) == 4 * 5, "one after the embedding and two in each block, in each of four forward passes"
    assert len(set(seen)) == len(seen)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("what", ["evaluation", "sample"])
def test_checkpoint_is_completed_if_the_evaluation_or_sample_after_it_fails(tiny_data, monkeypatch, what):
    """The save is still in progress when the evaluation or sample fails."""
    failed, where, name = (
        threading.Event(),
        *{"evaluation": (train, "evaluate"), "sample": (reporting, "generate_samples")}[what],
    )
    real, save = getattr(where, name), checkpoint.save

    def fails(run, *words):
        if run.optimizer.state:  # after updates
            failed.set()
            raise RuntimeError("the fault")
        return real(run, *words)

    def slow(*words):
        assert failed.wait(60)
        return save(*words)

    monkeypatch.setattr(where, name, fails)
    monkeypatch.setattr(checkpoint, "save", slow)
    with pytest.raises(RuntimeError, match="the fault"):
        train_here("--save_interval", 100)
    assert checkpoint.verify(RUN / "ckpt/last")["iter"] == 3


def test_nothing_is_written_into_a_folder_that_took_the_place_of_a_moved_run(tiny_data, monkeypatch):
    moved, real = Path("out/moved"), train.train_step

    def update(run, i):
        if i == 4:
            deadline = time.monotonic() + 60
            while not (RUN / "ckpt/best").exists():  # the last file of the save before
                assert time.monotonic() < deadline
                time.sleep(0.01)
            RUN.rename(moved)
            RUN.mkdir()
            (RUN / "theirs.txt").write_text("theirs")
        return real(run, i)

    monkeypatch.setattr(train, "train_step", update)
    with pytest.raises(UserError, match=f"^{RUN} is no longer the folder that this run started in: nothing is saved"):
        train_here("--max_iters", 20)
    assert [path.name for path in RUN.rglob("*")] == ["theirs.txt"]
    assert [folder.name for folder in checkpoint.checkpoints(moved)] == ["iter_000003"]
    assert 6 <= int(rows(moved)[-1]["iter"]) < 9, "it ends at the next save"


def test_space_for_a_checkpoint_is_checked_after_the_first_update(tiny_data, monkeypatch):
    updates, real = [], train.train_step
    usage = namedtuple("usage", "total used free")(0, 0, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(train, "train_step", lambda run, i: updates.append(run) or real(run, i))
    with pytest.raises(UserError) as caught:
        train_here(*QUIET, "--n_embd", 256)
    (made,) = updates
    # weights and AdamW's two moments in float32, with the vocabulary padded to a multiple of 64
    megabytes = 12 * (made.model.num_params() + (320 - 257) * 256) / 1e6
    assert str(caught.value).startswith(f"{RUN} has 1 MB free, a checkpoint of this run needs {megabytes:.0f} MB")
    assert not list(RUN.glob("ckpt/*"))


def test_nonfinite_weight_is_never_saved(tiny_data, monkeypatch):
    """Although the loss and gradient of its update were finite."""
    real = train.train_step

    def update(run, i):
        made = real(run, i)
        if i == 4:
            with torch.no_grad():
                run.model.transformer.ln_f.weight[3] = torch.inf
        return made

    monkeypatch.setattr(train, "train_step", update)
    with pytest.raises(UserError, match=r"^a weight is not finite at iter 5: "):
        train_here(*QUIET, "--save_interval", 5, "--eval_interval", 100, "--max_iters", 20)
    assert not list(RUN.glob("ckpt/iter_*"))


def test_loss_whose_save_failed_is_not_the_best(tiny_data, monkeypatch):
    """A higher loss after it, whose checkpoint is saved, becomes the best."""
    losses, save = iter((5.0, 4.0, 2.0, 3.0)), checkpoint.save

    def full(run_dir, state, *rest):
        if state["iter"] == 4:
            raise UserError("no room")
        return save(run_dir, state, *rest)

    monkeypatch.setattr(train, "evaluate", lambda *words: {"val_loss": next(losses)})
    monkeypatch.setattr(checkpoint, "save", full)
    train_here(*QUIET, "--eval_interval", 2, "--on_save_error", "warn")
    assert [row["val_loss"] for row in rows(RUN) if row["val_loss"]] == ["5", "4", "2", "3"]
    assert os.readlink(RUN / "ckpt/best") == "iter_000006"


# ---------------------------------------------------------------------------------------------------------------------
# two ranks


TWO = (*TINY, *QUIET, "--grad_accum_steps", 2)
WATCHED_TIMEOUT = """
def learning_rate(i, config, real=optim.learning_rate):  # the first thing that update i asks for
    gloo = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    with open(folder + "/timeouts.txt", "a") as file:
        print(i, int(gloo.options._timeout.total_seconds()), file=file)
    return real(i, config)

optim.learning_rate = learning_rate
"""


def test_timeout_is_doubled_in_the_first_update(start_ranks, tiny_data):
    """Some ranks may still be compiling."""
    words = (*TWO, "--rank_timeout", 100, "--max_iters", 3, "--log_interval", 10)
    processes = start_ranks(*words, cwd=tiny_data, world=2, code=WATCHED_TIMEOUT)
    assert [process.wait() for process in processes] == [0, 0], processes[0].output
    for process in processes:
        seen = dict(line.split() for line in (process.folder / "timeouts.txt").read_text().splitlines())
        assert seen == {"0": "200", "1": "100", "2": "100"}


def test_only_rank_0_asks_git(start_ranks, tiny_data):
    """The repository may be on a slow file system. state.json has the commit, and whether files differ from it."""
    git = tiny_data / "git"
    git.write_text("#!/bin/sh\necho $RANK $* >> asked.txt\necho '# branch.oid 0832fec'\necho '? new.py'\n")
    git.chmod(0o755)
    code = f"os.environ['PATH'] = {str(tiny_data)!r} + ':' + os.environ['PATH']"
    processes = start_ranks(*TWO, "--max_iters", 1, cwd=tiny_data, world=2, code=code)
    assert [process.wait() for process in processes] == [0, 0], processes[0].output
    (line,) = Path("asked.txt").read_text().splitlines()
    assert line.startswith("0 ")
    state = checkpoint.read_state(RUN / "ckpt/last")
    assert (state["git_commit"], state["git_dirty"]) == ("0832fec", True)


OTHER_WEIGHTS = """
def init_weights(self, real=model.GPT.init_weights):
    real(self)
    if os.environ["RANK"] == "1":
        with torch.no_grad():
            list(self.parameters())[-1][0] += 1e-6

model.GPT.init_weights = init_weights
"""


# each machine resolves auto by itself
OTHER_DTYPE = """
from flatgpt.training import setup as run

def select_device(device, dtype, *words, real=run.select_device):
    return real(device, "float16" if os.environ["RANK"] == "1" else "float32", *words)

run.select_device = select_device
"""


@pytest.mark.parametrize(
    ("code", "words", "what"),
    [(OTHER_WEIGHTS, (), "initial weights"), (OTHER_DTYPE, ("--dtype", "auto"), "dtype")],
    ids=["weights", "dtype"],
)
def test_ranks_with_other_weights_or_settings_are_refused(start_ranks, tiny_data, code, words, what):
    processes = start_ranks(*TWO, *words, cwd=tiny_data, world=2, code=code)
    said = f"error: {what} of rank 1 is not that of rank 0: every machine must have the same files and settings"
    processes[0].wait_until(lambda: any(said in process.output or process.code == 0 for process in processes))
    assert any(said in process.output for process in processes), processes[0].output
    for process in processes:  # the rank that does not report waits
        process.kill()
        process.wait()
    assert not RUN.exists()


# ---------------------------------------------------------------------------------------------------------------------
# rows, samples


def test_row_of_the_log_has_the_figures_of_its_update(tiny_data, monkeypatch):
    made, real = [], train.train_step

    def update(run, i):
        made.append(real(run, i))
        return made[-1]

    monkeypatch.setattr(train, "train_step", update)
    words = ("--lr", "1e-2", "--warmup_iters", 4, "--schedule", "constant", "--grad_accum_steps", 2)
    logged = rows(train_here(*QUIET, *words))
    windows = (open_dataset(Path("data/tiny")).meta["splits"]["train"]["tokens"] - 1) // 32
    assert [row["iter"] for row in logged] == ["0", "1", "2", "3", "4", "5", "6"]
    for i, (row, (loss, norm)) in enumerate(zip(logged[1:], made, strict=True), 1):
        assert int(row["tokens"]) == i * 4 * 2 * 32
        assert float(row["epoch"]) == pytest.approx(i * 4 * 2 / windows)
        assert float(row["train_loss"]) == pytest.approx(loss.item())
        assert float(row["grad_norm"]) == pytest.approx(norm.item())
        assert float(row["lr"]) == pytest.approx(1e-2 * min(1, i / 5))
        assert row["skipped"] == "0"


def test_samples_of_all_evaluations_use_the_same_random_numbers(tiny_data):
    """Weights that do not change write the same text each time, and a different one with a different seed."""

    def written(name: str, *words) -> list[str]:
        folder = train_here("--lr", 1e-30, "--min_lr", 0, "--sample_tokens", 40, "--out_dir", f"out/{name}", *words)
        parts = re.split(r"^=== iter \d+ .*\n", (folder / "samples.txt").read_text(), flags=re.M)
        return parts[1:]

    first = written("first")
    assert len(first) == 2, "none of a model before its first update"
    assert len(set(first)) == 1
    again, other = (written(f"seed_{seed}", "--init_from", "out/first", "--seed", seed) for seed in (1337, 1338))
    assert again == first, "the same weights"
    assert set(other).isdisjoint(first)


# ---------------------------------------------------------------------------------------------------------------------
# updates that are not finite, memory, saves


def test_nonfinite_loss_ends_the_run_at_the_next_row(tiny_data, monkeypatch):
    """What was saved stays."""
    real, made = train.train_step, []

    def train_step(run, i):
        made.append(i)
        forward = run.forward
        if i in (6, 8):
            run.forward = lambda x, y: forward(x, y) + math.nan
        answer = real(run, i)
        run.forward = forward
        return answer

    monkeypatch.setattr(train, "train_step", train_step)
    words = ("--log_interval", 5, "--eval_interval", 100, "--save_interval", 5, "--max_iters", 30)
    with pytest.raises(UserError, match=r"^iter 7: the loss is nan; training windows of its batch: "):
        train_here(*QUIET, *words)
    assert made == list(range(10)), "it ends with the row of iter 10"
    assert [row["iter"] for row in rows(RUN)] == ["0", "5"]
    assert [checkpoint.verify(folder)["iter"] for folder in checkpoint.checkpoints(RUN)] == [5]


def test_out_of_memory_is_one_error_and_the_checkpoints_stay(tiny_data, monkeypatch):
    real = train.train_step

    def train_step(run, i):
        if i == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(run, i)

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(UserError) as caught:
        train_here(*QUIET, "--grad_accum_steps", 2)
    message = str(caught.value)
    assert message.startswith("CUDA out of memory. Tried to allocate 20.00 MiB")
    assert "--batch_size 2 --grad_accum_steps 4 (the same updates)" in message
    assert checkpoint.verify(RUN / "ckpt/last")["iter"] == 3


def test_run_whose_last_save_failed_ends_with_an_error(tiny_data, monkeypatch):
    """Although a failed save is a warning: its weights are nowhere. `best` and `last` lead where they led."""
    save = checkpoint.save

    def full(run_dir, state, *rest):
        if state["iter"] == 6:
            raise UserError("no room")
        return save(run_dir, state, *rest)

    words = (*QUIET, "--on_save_error", "warn", "--lr", "5e-3")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(UserError, match="the run ended at iter 6, but its last save failed: no room"):
            train_here(*words)
    assert {name: os.readlink(RUN / "ckpt" / name) for name in ("best", "last")} == dict.fromkeys(
        ("best", "last"), "iter_000003"
    )
    assert checkpoint.read_state(RUN / "ckpt/last")["finished"] is False
    train_here(*words, "--resume")
    assert checkpoint.verify(RUN / "ckpt/best")["iter"] == 6
