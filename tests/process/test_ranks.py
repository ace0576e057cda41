"""ranks.py, and that the same recipe gives the same model on 1, 2 and 4 processes, which torchrun starts here."""

import contextlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import TORCHRUN, ForkedProcess
from hypothesis import given
from hypothesis import strategies as st
from in_process import TINY, make_dataset
from processes import ROOT, command
from run_files import rows, weights

import train
from config import ReportedByOtherRank, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.runs import checkpoint
from flatgpt.runtime import device
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext, equal_pair, join_process_group

WORLD = st.integers(1, 9)


# ---------------------------------------------------------------------------------------------------------------------
# shares


@pytest.mark.parametrize(
    ("batch_size", "steps", "world", "pair"),
    [
        (16, 1, 2, (8, 2)),
        (16, 1, 8, (2, 8)),
        (12, 40, 8, (12, 40)),
        (4, 3, 2, (3, 4)),  # not (6, 2): a device may have no room for more than it was given
        (4, 6, 4, (3, 8)),
        (3, 1, 2, (2, 2)),  # 3 sequences become 4
        (5, 3, 2, (4, 4)),
        (16, 1, 3, (6, 3)),
        (1, 1, 8, (1, 8)),
    ],
)
def test_equal_pair_table(batch_size, steps, world, pair):
    assert equal_pair(batch_size, steps, world) == pair


@given(st.integers(1, 70), st.integers(1, 70), WORLD)
def test_equal_pair_is_the_same_update_where_there_is_one(batch_size, steps, world):
    total, (small, many) = batch_size * steps, equal_pair(batch_size, steps, world)
    assert many % world == 0
    assert small <= batch_size
    assert small * many == next(n for n in range(total, total + world) if n % world == 0)
    larger = range(small + 1, batch_size + 1)
    assert not [b for b in larger if small * many % (b * world) == 0], "devices are not used as fully as they could be"
    if steps % world == 0:
        assert (small, many) == (batch_size, steps)


@given(st.integers(1, 70), WORLD)
def test_every_micro_batch_is_of_one_rank(steps, world):
    shares = [DistributedContext(rank, world).micro_batches(steps) for rank in range(world)]
    assert sorted(n for share in shares for n in share) == list(range(steps))
    assert max(map(len, shares)) - min(map(len, shares)) <= (steps % world > 0)


def as_rank(monkeypatch, rank: int, world: int) -> None:
    """This process's environment as torchrun sets it."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(world))


@pytest.mark.parametrize(
    ("batch_size", "steps", "world", "advice"),
    [
        (16, 1, 2, "take --batch_size 8 --grad_accum_steps 2 (the same updates)"),
        (3, 1, 2, "take --batch_size 2 --grad_accum_steps 2 (4 sequences, not 3)"),
        (4, 6, 4, "take --batch_size 3 --grad_accum_steps 8 (the same updates)"),
    ],
)
def test_update_that_cannot_be_shared_is_refused_before_any_work(monkeypatch, batch_size, steps, world, advice):
    as_rank(monkeypatch, 0, world)
    config = TrainConfig(batch_size=batch_size, grad_accum_steps=steps)
    with (
        pytest.raises(UserError) as caught,
        join_process_group(config, lambda *words: pytest.fail("a device was asked for")),
    ):
        pytest.fail("it was let in")
    assert f"grad_accum_steps = {steps} counts the passes of all devices together" in str(caught.value)
    assert f"cannot be shared by {world}: {advice}" in str(caught.value)


def test_ranks_but_the_first_leave_what_all_know_unsaid(monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    with pytest.raises(ReportedByOtherRank), join_process_group(TrainConfig(grad_accum_steps=1), device.find_device):
        pytest.fail("it was let in")
    print("by a rank that is not the first")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "given",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_environment_that_is_not_torchruns_is_refused(monkeypatch, given):
    """Some clusters set WORLD_SIZE alone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=r"WORLD_SIZE = 2, .* do not fit"),
        join_process_group(TrainConfig(), device.find_device),
    ):
        pytest.fail("it was let in")


@pytest.mark.parametrize("world", [None, 1])
def test_one_process_joins_nobody(monkeypatch, world):
    """Also one that torchrun started: a process group would cost it time and sums that it does not need."""
    if world:
        as_rank(monkeypatch, 0, world)
    said = sys.stdout
    with join_process_group(TrainConfig(grad_accum_steps=3), device.find_device) as alone:
        assert alone == SINGLE_PROCESS
        assert alone.first
        assert not dist.is_initialized()
        assert sys.stdout is said
        value = torch.ones(2)
        assert alone.sum(value) is value
        assert alone.all_reduce_max(3, 1) == [3, 1]
        assert alone.all_gather(5) == [5]
        assert alone.all(True)
        assert not alone.all(False)
        assert alone.run_on_rank0(lambda: 5) == 5
        alone.require_equal({"dataset": "hash"})
        alone.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# real processes

BASE = [*TINY, *shlex.split("--dropout 0.1 --grad_accum_steps 4 --lr 5e-3 --max_iters 20 --eval_interval 10")]
BASE += ["--keep_checkpoints", "9"]
HALF = "ckpt/iter_000010"

# Several runs in one job, since each start costs seconds: the ranks stay joined from one to the next.
SEVERAL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train; from flatgpt.cli import cli
import torch.distributed as dist
from config import TrainConfig
{{before}}
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *words, **more: dist.is_initialized() or join(*words, **more)
dist.destroy_process_group = lambda: None
for words in json.loads(sys.argv[1]):
    train.train(cli.parse(TrainConfig, words))
    torch.compiler.reset()
leave()
"""


def torchrun(number: int, script: Path, *words, cwd: Path, threads: str | None = "1") -> subprocess.CompletedProcess:
    """Run a script in so many processes; threads: OMP_NUM_THREADS, None where the user has not set it."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": threads}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", str(script)]
        + [str(word) for word in words],
        cwd=cwd,
        env={key: value for key, value in environment.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def several(ranks, home):
    """several(number, runs, before) -> ForkedProcess: BASE with changes, a run after another in one job, after code."""

    def launch(number: int, runs: list[tuple[str, str]], before: str = "") -> ForkedProcess:
        script, words = in_one_job(home, runs, before)
        done = ranks(number, words, script=script, cwd=home)
        assert done.code == 0, done.output
        return done

    return launch


def in_one_job(home: Path, runs: list[tuple[str, str]], before: str = "") -> tuple[Path, str]:
    """A script that makes these runs, and its argument."""
    script = home / f"several_{runs[0][0]}.py"
    script.write_text(SEVERAL.format(before=before))
    return script, json.dumps([[*BASE, *shlex.split(words), "--out_dir", f"out/{name}"] for name, words in runs])


def wrapped(home: Path, code: str) -> Path:
    """A script that does something before it is train.py."""
    script = home / "wrapped.py"
    script.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return script


def alone(home: Path, name: str, words: str = "") -> Path:
    """BASE with changes, in this process; the run's folder."""
    with contextlib.chdir(home):
        train.train(cli.parse(TrainConfig, [*BASE, *shlex.split(words), "--out_dir", f"out/{name}"]))
    return home / "out" / name


def copied(run: Path, name: str) -> Path:
    """A copy of a run, to go on from its middle and in its place."""
    return shutil.copytree(run, run.with_name(name), symlinks=True)


def assert_alike(run: Path, other: Path, loss: float = 1e-5, norm: float = 1e-4, val: float = 1e-6) -> None:
    """Every iteration is logged once, and alike: relative tolerances."""
    ours, theirs = rows(run), rows(other)
    assert [row["iter"] for row in ours] == [row["iter"] for row in theirs] == [str(i) for i in range(len(ours))]
    assert len(ours) > 1
    for key, tolerance in (("train_loss", loss), ("grad_norm", norm), ("val_loss", val), ("lr", 0), ("tokens", 0)):
        assert [bool(row[key]) for row in ours] == [bool(row[key]) for row in theirs], key
        values = [[float(row[key]) for row in table if row[key]] for table in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=tolerance, abs=0, nan_ok=key == "grad_norm"), key


def assert_weights_alike(run: Path, other: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The current folder of the jobs, with data/tiny and, in out/, all runs of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    make_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def one(home) -> Path:
    """The run of one process: what all others are compared with."""
    return alone(home, "one")


@pytest.fixture(scope="module")
def two_said(home) -> subprocess.CompletedProcess:
    done = torchrun(2, ROOT / "train.py", *BASE, "--out_dir", "out/two", cwd=home, threads=None)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def two(home, two_said) -> Path:
    """The same by two ranks, as a user starts them."""
    return home / "out/two"


def test_two_ranks_make_the_updates_of_one(one, two):
    assert_alike(two, one)
    assert_weights_alike(two, one)


def test_only_the_first_of_two_ranks_speaks_and_writes(home, one, two, two_said):
    """torchrun's choice of one thread a rank is not ours: it gives them the cores there are."""
    assert {p.relative_to(two) for p in two.rglob("*")} == {p.relative_to(one) for p in one.rglob("*")}
    said = two_said.stdout.splitlines()
    for start in ("model ", "data ", "update ", "run ", "machine ", "folder ", "done: "):
        assert len([line for line in said if line.startswith(start)]) == 1, start
    assert [int(line.split()[1]) for line in said if line.startswith("iter ")] == list(range(21))
    assert len([line for line in said if line.startswith("--- sample after")]) == 3
    threads = max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else os.cpu_count() // 2
    assert re.search(rf"^machine  cpu \({threads} threads?\), float32", two_said.stdout, re.M)
    assert "Traceback" not in two_said.stderr
    assert "warning" not in two_said.stderr.lower().replace("userwarning", "")


# ---------------------------------------------------------------------------------------------------------------------
# more ranks, and from one number of them to another


@pytest.fixture(scope="module")
def on_four(several, home, two) -> Path:
    copied(two, "two_then_four")
    several(4, [("four", ""), ("two_then_four", f"--resume out/two_then_four/{HALF}")])
    return home / "out"


@pytest.mark.slow
def test_four_ranks_make_the_updates_of_one(one, on_four):
    assert_alike(on_four / "four", one)
    assert_weights_alike(on_four / "four", one)


@pytest.mark.slow
def test_two_ranks_are_resumed_by_four(one, on_four):
    run = on_four / "two_then_four"
    assert (run / "metrics.lost.csv").exists(), "it did go back to the middle"
    assert_alike(run, one)
    assert_weights_alike(run, one)


@pytest.mark.slow
def test_two_ranks_are_resumed_by_one(home, one, two):
    run = copied(two, "two_then_one")
    alone(home, run.name, f"--resume out/{run.name}/{HALF}")
    assert (run / "metrics.lost.csv").exists()
    assert_alike(run, one)
    assert_weights_alike(run, one)


# float16's scale begins so high that the first updates overflow, some of them only in a rank's part of the gradients;
# and it is by the first rank alone that the second one knows of the time.
def high_scale(machine: "device.DeviceSettings") -> torch.amp.GradScaler:
    return torch.amp.GradScaler(machine.device.type, init_scale=2.0**24, enabled=machine.dtype == torch.float16)


PREPARED = f"""
import os, torch; from flatgpt.runtime import device as runtime, stop
{inspect.getsource(high_scale)}
runtime.DeviceSettings.scaler = high_scale
if os.environ["RANK"] == "1":
    stop.StopRequest.reason = lambda self: 0
"""
# What a model in parts has gathered while it computes.
WATCHED = """
import model
from pathlib import Path
seen, mlp, block = set(), model.MLP.forward, model.Block.forward
def note(what, dtype):
    seen.add((what, str(dtype)))
    Path("gathered_" + os.environ["RANK"]).write_text(json.dumps(sorted(seen)))
def watched_mlp(self, x):
    note("mlp", self.c_fc.weight.dtype)
    return mlp(self, x)
def watched_block(self, x, *words):
    note("norm", self.ln_1.weight.dtype)
    return block(self, x, *words)
model.MLP.forward, model.Block.forward = watched_mlp, watched_block
"""
VARIANTS = {
    "untied": "--no-tie_weights",
    "checkpointed": "--activation_checkpointing",
    "bfloat16": "--dtype bfloat16",
    "float16": "--dtype float16",
    "rope": "--position rope",
    "muon": "--optimizer muon",
    "pair": "--batch_size 3 --grad_accum_steps 4 --dropout 0",
    "patience": "--lr 1 --warmup_iters 11 --eval_interval 2 --patience 1 --max_iters 100 --lr_decay_iters 20",
}


@pytest.fixture(scope="module")
def on_two(several, home, one, two) -> Path:
    """DDP on two ranks."""
    copied(one, "one_then_two")
    runs = [*VARIANTS.items(), ("one_then_two", f"--resume out/one_then_two/{HALF}")]
    several(2, [*runs, ("timed", "--max_minutes 1e-4")], PREPARED)
    return home / "out"


@pytest.fixture(scope="module")
def on_one_in_float16(home) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.DeviceSettings, "scaler", high_scale)
        return alone(home, "one_float16", VARIANTS["float16"])


@pytest.fixture(scope="module")
def in_parts(several, home, two, on_two) -> Path:
    """fully_shard on two ranks: out/fsdp_<variant>."""
    names = ("untied", "checkpointed", "bfloat16", "float16", "rope")
    runs = [("fsdp", "--fsdp"), *((f"fsdp_{name}", f"{VARIANTS[name]} --fsdp") for name in names)]
    several(2, runs, PREPARED + WATCHED)
    copied(home / "out/fsdp", "fsdp_then_fsdp")
    copied(two, "two_then_fsdp")
    resumed = [(name, f"--fsdp --resume out/{name}/{HALF}") for name in ("fsdp_then_fsdp", "two_then_fsdp")]
    several(2, resumed)
    return home / "out"


@pytest.mark.slow
def test_one_process_is_resumed_by_two(one, on_two):
    assert (on_two / "one_then_two/metrics.lost.csv").exists()
    assert_alike(on_two / "one_then_two", one)
    assert_weights_alike(on_two / "one_then_two", one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied", "checkpointed", "rope"])
def test_variants_on_two_ranks_make_the_updates_of_one(home, on_two, name):
    run = alone(home, f"{name}_alone", VARIANTS[name])
    assert_alike(on_two / name, run)
    assert_weights_alike(on_two / name, run)


@pytest.mark.slow
def test_muon_on_two_ranks_makes_the_updates_of_one(home, on_two):
    """Its steps come from bfloat16 products, which show the last digit of a gradient earlier."""
    run = alone(home, "muon_alone", VARIANTS["muon"])
    assert_alike(on_two / "muon", run, loss=1e-4, norm=1e-3, val=1e-4)


@pytest.mark.slow
def test_equal_pair_makes_the_same_updates(home, on_two):
    """Dropout aside: its masks follow the micro-batches."""
    assert equal_pair(4, 3, 2) == (3, 4)
    run = alone(home, "pair_alone", "--batch_size 4 --grad_accum_steps 3 --dropout 0")
    assert_alike(on_two / "pair", run)


def test_muon_is_refused_in_parts():
    with pytest.raises(UserError, match="optimizer = muon needs whole matrices, fsdp = true cuts them"):
        cli.parse(TrainConfig, [*BASE, "--optimizer", "muon", "--fsdp"])


# ---------------------------------------------------------------------------------------------------------------------
# in parts


@pytest.mark.slow
def test_model_in_parts_makes_the_updates_of_ddp(two, on_two, in_parts):
    for name in ("untied", "checkpointed", "rope"):
        assert_alike(in_parts / f"fsdp_{name}", on_two / name, loss=1e-4, norm=1e-4, val=1e-4)
    assert_alike(in_parts / "fsdp", two, loss=1e-4, norm=1e-4, val=1e-4)
    assert_weights_alike(in_parts / "fsdp", two, 1e-4)


@pytest.mark.slow
def test_model_in_parts_makes_nearly_the_updates_of_ddp_in_bfloat16(on_two, in_parts):
    """bfloat16 has 8 bits; DDP's autocast and fully_shard's policy round at different places."""
    assert_alike(in_parts / "fsdp_bfloat16", on_two / "bfloat16", loss=2e-4, norm=5e-3, val=2e-4)


@pytest.mark.slow
def test_parts_are_gathered_in_the_dtype_of_the_run(home, in_parts):
    """Autocast would hide it: twice the traffic between GPUs for the same numbers."""
    for rank in range(2):
        seen = [tuple(pair) for pair in json.loads((home / f"gathered_{rank}").read_text())]
        assert seen == [
            *(("mlp", f"torch.{dtype}") for dtype in ("bfloat16", "float16", "float32")),
            ("norm", "torch.float32"),
        ]


@pytest.mark.slow
def test_float16_skips_the_same_updates_everywhere(on_one_in_float16, on_two, in_parts):
    """An overflow in one rank's part of the gradients has to be every rank's, or their weights would part. And a loss
    multiplied by the number of ranks, to undo a mean over them, would overflow sooner on more."""
    skipped = [int(row["skipped"]) for row in rows(on_two / "float16")[1:]]
    assert skipped[:2] == [1, 2]
    assert 3 < skipped[-1] < 10
    for other in (in_parts / "fsdp_float16", on_one_in_float16):
        for key in ("skipped", "loss_scale"):
            assert [row[key] for row in rows(other)] == [row[key] for row in rows(on_two / "float16")]
        assert_alike(other, on_two / "float16", loss=2e-4, norm=5e-3, val=2e-4)


def layout(value):
    """Dicts and lists with each tensor's shape and dtype in its place, and plain values as they are."""
    if isinstance(value, dict):
        return {key: layout(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [layout(item) for item in value]
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "_untied"])
def test_checkpoint_of_a_model_in_parts_is_ddps(home, two, on_two, in_parts, name):
    pair = in_parts / f"fsdp{name}", on_two / name[1:] if name else two
    assert len({frozenset(p.relative_to(run) for p in run.rglob("*")) for run in pair}) == 1
    assert layout(weights(pair[0])) == layout(weights(pair[1]))
    ours, theirs = (checkpoint.load_train_state(run / "ckpt/last") for run in pair)
    assert layout(ours["optimizer"]) == layout(theirs["optimizer"])
    assert ours.keys() == theirs.keys()
    for index, entries in theirs["optimizer"]["state"].items():
        for key, tensor in entries.items():
            torch.testing.assert_close(ours["optimizer"]["state"][index][key], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_model_in_parts_is_read_by_eval_and_infer(home, in_parts):
    done = command("eval", "--model_path", "out/fsdp", "--device", "cpu", "--json", "-", cwd=home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(float(rows(in_parts / "fsdp")[-1]["val_loss"]), abs=1e-5)
    words = ("--prompt", "99 green", "--temperature", 0, "--max_new_tokens", 8, "--device", "cpu")
    done = command("infer", "--model_path", "out/fsdp", *words, cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("99 green")


@pytest.mark.slow
def test_model_in_parts_is_resumed_by_all(home, one, in_parts):
    copied(in_parts / "fsdp", "fsdp_then_one")
    alone(home, "fsdp_then_one", f"--resume out/fsdp_then_one/{HALF}")
    for name in ("fsdp_then_one", "fsdp_then_fsdp", "two_then_fsdp"):
        assert (in_parts / name / "metrics.lost.csv").exists()
        assert_alike(in_parts / name, one, loss=1e-4, norm=1e-4, val=1e-4)
        assert_weights_alike(in_parts / name, one, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# ends, threads, data, the compiler


@pytest.mark.slow
def test_patience_ends_all_ranks(on_two):
    """torchrun starts again what does not exit with 0; the job would not have come to its next run."""
    state = checkpoint.read_state(on_two / "patience/ckpt/last")
    assert state["finished"]
    assert state["iter"] == int(rows(on_two / "patience")[-1]["iter"]) < 100


@pytest.mark.slow
def test_time_ends_all_ranks_and_the_run_goes_on(ranks, home, one, on_two):
    state = checkpoint.read_state(on_two / "timed/ckpt/last")
    assert not state["finished"]
    assert 0 < state["iter"] < 20
    done = ranks(2, *BASE, "--out_dir", "out/timed", "--resume", cwd=home)
    assert done.code == 0, done.output
    assert_alike(on_two / "timed", one)
    assert checkpoint.read_state(on_two / "timed/ckpt/last")["finished"]


SIX = "from flatgpt.runtime import distributed\ndistributed._cores = lambda: 6"


@pytest.mark.slow
def test_ranks_share_the_cores(ranks, home):
    """Six for two; torchrun's own choice of one thread does not count."""
    words = (*BASE, "--max_iters", 1, "--out_dir", "out/threads_3")
    done = ranks(2, *words, script=wrapped(home, SIX), cwd=home, threads=None)
    assert done.code == 0, done.output
    assert "machine  cpu (3 threads)" in done.output


@pytest.mark.slow
def test_number_of_threads_that_the_user_asks_for_counts(home):
    """Not ranks: torch reads it as it is imported."""
    words = (*BASE, "--max_iters", 1, "--out_dir", "out/threads_2")
    done = torchrun(2, wrapped(home, SIX), *words, cwd=home, threads="2")
    assert done.returncode == 0, done.stderr
    assert "machine  cpu (2 threads)" in done.stdout


STUCK = """
import os, threading
import torch.distributed as dist
def elsewhere():
    threading.Event().wait()
dist.init_process_group("gloo")
elsewhere() if os.environ["RANK"] == "1" else dist.barrier()
"""


@pytest.mark.slow
def test_job_that_does_not_end_tells_where_each_rank_is(fork_server, tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    words = ("torchrun", "--standalone", "--nproc_per_node=2", script)
    life = ForkedProcess(fork_server, tmp_path / "life", tmp_path, words, TORCHRUN, {})
    try:
        life.wait_until(lambda: all(f" in {name}\n" in life.output_and_stacks() for name in ("barrier", "elsewhere")))
        with pytest.raises(AssertionError, match=r"(?s)--- process \d+ rank0\n.* in barrier\n"):
            life.wait(0)
    finally:
        life.kill()
    assert "pt_gloo_runloop: S " in life.output


@pytest.mark.slow
def test_precision_that_rank_0_measures_is_everyones(ranks, home):
    """It measures alone; the other would have found the opposite."""
    code = (
        "from flatgpt.runtime import precision\nfirst = os.environ['RANK'] == '0'\n"
        "measured = 'bfloat16' if first else 'float32'\n"
        "say = lambda: print(os.environ['RANK'], 'measures', file=sys.stderr)\n"
        "precision.faster_dtype = lambda *work: (measured, say() or 'found')"
    )
    words = (*BASE, "--dtype", "auto", "--max_iters", 1, "--out_dir", "out/measured")
    done = ranks(2, *words, script=wrapped(home, code), cwd=home)
    assert done.code == 0, done.output
    assert re.search(r"^machine  cpu \(.*\), bfloat16 \(found\), eager", done.output, re.M)
    assert re.findall(r"^\d measures$", done.output, re.M) == ["0 measures"]
    assert checkpoint.read_state(home / "out/measured/ckpt/last")["chosen"]["dtype"] == "bfloat16"


ALIKE = "every machine has to have the same files and settings"


@pytest.mark.slow
def test_settings_that_differ_between_ranks_are_refused(ranks, home):
    """An older copy of a recipe: ranks would drift apart, as only gradients are summed, or wait for each other."""
    code = "sys.argv += ['--lr', '1e-2', '--eval_interval', '7'] if os.environ['RANK'] == '1' else []"
    done = ranks(2, *BASE, "--out_dir", "out/apart", script=wrapped(home, code), cwd=home)
    assert done.code == 1
    said = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert said == ["error: lr, eval_interval of rank 1 is not that of rank 0: " + ALIKE]
    assert not (home / "out/apart").exists()


@pytest.mark.slow
def test_data_that_differ_between_ranks_are_refused(ranks, tmp_path):
    """Two machines, of which one has an older copy."""
    for rank, text in enumerate(("The same text. ", "The same text? ")):
        (tmp_path / f"machine{rank}").mkdir()
        make_dataset(tmp_path / f"machine{rank}", text=text * 500)
    done = ranks(2, *BASE, script=wrapped(tmp_path, "os.chdir('machine' + os.environ['RANK'])"), cwd=tmp_path)
    assert done.code == 1
    said = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert said == ["error: dataset data/tiny of rank 1 is not that of rank 0: " + ALIKE]
    assert "in run_script" not in done.output
    assert not list(tmp_path.glob("machine*/out"))


@pytest.mark.slow
def test_compiled_ranks_make_nearly_the_updates_of_eager_ones(home):
    """The compiler draws other dropout masks and rounds to bfloat16 at other places."""
    words = "--dtype bfloat16 --n_layer 1 --dropout 0 --lr 1e-3 --max_iters 6 --sample_tokens 0"
    runs = [
        ("eager", f"{words} --no-compile"),
        ("compiled", f"{words} --compile"),
        ("compiled_checkpointed", f"{words} --compile --activation_checkpointing"),
        ("compiled_fsdp", f"{words} --compile --fsdp"),
    ]
    done = torchrun(2, *in_one_job(home, runs), cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bfloat16, compiled") == 3
    assert "torch.compile failed" not in done.stderr
    for name, _ in runs[1:]:
        assert_alike(home / "out" / name, home / "out/eager", loss=1e-3, norm=2e-2, val=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# what only GPUs show


@pytest.mark.gpu
def test_gpus_make_nearly_the_updates_of_one(home):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    words = "--device cuda --dtype bfloat16 --compile --dropout 0"
    runs = [
        ("nccl", words),
        ("nccl_fsdp", f"{words} --fsdp"),
        ("nccl_checkpointed", f"{words} --fsdp --activation_checkpointing"),
    ]
    done = torchrun(2, *in_one_job(home, runs), cwd=home)
    assert done.returncode == 0, done.stderr
    assert "torch.compile failed" not in done.stderr
    alone(home, "one_gpu", words)
    for name, _ in runs:
        assert_alike(home / "out" / name, home / "out/one_gpu", loss=5e-3, norm=5e-2, val=5e-3)
