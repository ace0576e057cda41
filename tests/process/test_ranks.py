"""The same recipe gives the same model on 1, 2 and 4 ranks, with DDP and with fully_shard, and after a resume."""

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
from in_process import TINY, make_dataset
from processes import ROOT, command
from run_files import rows, weights

import train
from config import TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.runs import checkpoint
from flatgpt.runtime import device
from flatgpt.runtime.distributed import equal_pair

BASE = [*TINY, *shlex.split("--dropout 0.1 --grad_accum_steps 4 --lr 5e-3 --max_iters 20 --eval_interval 10")]
BASE += ["--keep_checkpoints", "9"]
HALF = "ckpt/iter_000010"

# Several runs in one job: the ranks stay joined from one to the next.
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
    """Run a script with a real torchrun; threads: OMP_NUM_THREADS, None: unset."""
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
    """several(number, runs, before): run BASE with each of these changes in one job, after some code."""

    def launch(number: int, runs: list[tuple[str, str]], before: str = "") -> None:
        script, words = in_one_job(home, runs, before)
        done = ranks(number, words, script=script, cwd=home)
        assert done.code == 0, done.output

    return launch


def in_one_job(home: Path, runs: list[tuple[str, str]], before: str = "") -> tuple[Path, str]:
    """Return a script that makes these runs, and its argument."""
    script = home / f"several_{runs[0][0]}.py"
    script.write_text(SEVERAL.format(before=before))
    return script, json.dumps([[*BASE, *shlex.split(words), "--out_dir", f"out/{name}"] for name, words in runs])


def wrapped(home: Path, code: str) -> Path:
    """Return a script that runs some code before train.py."""
    script = home / "wrapped.py"
    script.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return script


def alone(home: Path, name: str, words: str = "") -> Path:
    """Run BASE with changes in this process; return the run's folder."""
    with contextlib.chdir(home):
        train.train(cli.parse(TrainConfig, [*BASE, *shlex.split(words), "--out_dir", f"out/{name}"]))
    return home / "out" / name


def copied(run: Path, name: str) -> tuple[str, str]:
    """Copy a run; return the changes to BASE with which the copy is resumed from its middle."""
    shutil.copytree(run, run.with_name(name), symlinks=True)
    return name, f"--resume out/{name}/{HALF}"


def assert_same_rows(run: Path, other: Path, loss: float = 1e-5, norm: float = 1e-4, val: float = 1e-6) -> None:
    """Each iteration is logged once, with equal figures up to relative tolerances."""
    ours, theirs = rows(run), rows(other)
    assert [row["iter"] for row in ours] == [row["iter"] for row in theirs] == [str(i) for i in range(len(ours))]
    assert len(ours) > 1
    for key, tolerance in (("train_loss", loss), ("grad_norm", norm), ("val_loss", val), ("lr", 0), ("tokens", 0)):
        assert [bool(row[key]) for row in ours] == [bool(row[key]) for row in theirs], key
        values = [[float(row[key]) for row in table if row[key]] for table in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=tolerance, abs=0, nan_ok=key == "grad_norm"), key


def assert_same_run(run: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Rows and weights are equal. A run that resumed from its middle has moved its later rows away."""
    if "then" in run.name:
        assert (run / "metrics.lost.csv").exists()
    assert_same_rows(run, other, **({} if tolerance < 1e-4 else {"loss": 1e-4, "norm": 1e-4, "val": 1e-4}))
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The current folder of the jobs, with data/tiny and all runs of this file in out/."""
    folder = tmp_path_factory.mktemp("ranks")
    make_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def one(home) -> Path:
    """The run of one process, which all others are compared with."""
    return alone(home, "one")


@pytest.fixture(scope="module")
def job_of_two(home) -> subprocess.CompletedProcess:
    """The same by two ranks, as a user starts them."""
    done = torchrun(2, ROOT / "train.py", *BASE, "--out_dir", "out/two", cwd=home, threads=None)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def two(home, job_of_two) -> Path:
    return home / "out/two"


def test_two_ranks_make_the_updates_of_one(one, two, job_of_two):
    """Rank 0 alone prints and writes. The ranks share the cores, whatever torchrun sets OMP_NUM_THREADS to."""
    assert_same_run(two, one)
    assert {p.relative_to(two) for p in two.rglob("*")} == {p.relative_to(one) for p in one.rglob("*")}
    lines = job_of_two.stdout.splitlines()
    for start in ("model ", "data ", "update ", "run ", "machine ", "folder ", "done: "):
        assert len([line for line in lines if line.startswith(start)]) == 1, start
    assert [int(line.split()[1]) for line in lines if line.startswith("iter ")] == list(range(21))
    assert len([line for line in lines if line.startswith("--- sample after")]) == 3
    threads = max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else os.cpu_count() // 2
    assert re.search(rf"^machine  cpu \({threads} threads?\), float32", job_of_two.stdout, re.M)
    assert "Traceback" not in job_of_two.stderr
    assert "warning" not in job_of_two.stderr.lower().replace("userwarning", "")


# ---------------------------------------------------------------------------------------------------------------------
# more ranks, and from one number of them to another


@pytest.fixture(scope="module")
def on_four(several, home, two) -> Path:
    several(4, [("four", ""), copied(two, "two_then_four")])
    return home / "out"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["four", "two_then_four"])
def test_four_ranks_make_the_updates_of_one(one, on_four, name):
    assert_same_run(on_four / name, one)


# float16's scale starts so high that the first updates overflow, some of them on one rank only. And rank 1 learns from
# rank 0 alone that the time is up.
def high_scale(self: "device.DeviceSettings") -> torch.amp.GradScaler:
    return torch.amp.GradScaler(self.device.type, init_scale=2.0**24, enabled=self.dtype == torch.float16)


PREPARED = f"""
import os, torch; from flatgpt.runtime import device as runtime, stop
{inspect.getsource(high_scale)}
runtime.DeviceSettings.scaler = high_scale
if os.environ["RANK"] == "1":
    stop.StopRequest.reason = lambda self: 0
"""
# Records the dtypes of gathered weights.
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
    runs = [*VARIANTS.items(), copied(one, "one_then_two"), ("timed", "--max_minutes 1e-4")]
    several(2, runs, PREPARED)
    return home / "out"


@pytest.fixture(scope="module")
def sharded(several, home, two, on_two) -> Path:
    """fully_shard on two ranks: out/fsdp_<variant>."""
    names = ("untied", "checkpointed", "bfloat16", "float16", "rope")
    runs = [("fsdp", "--fsdp"), *((f"fsdp_{name}", f"{VARIANTS[name]} --fsdp") for name in names)]
    several(2, runs, PREPARED + WATCHED)
    copies = [copied(home / "out/fsdp", "fsdp_then_fsdp"), copied(two, "two_then_fsdp")]
    several(2, [("timed", "--resume"), *((name, f"{words} --fsdp") for name, words in copies)])
    return home / "out"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied", "checkpointed", "rope", "muon", "pair", "one_then_two"])
def test_ddp_makes_the_updates_of_one_process(home, one, on_two, name):
    if name == "pair":  # without dropout, whose masks follow the micro-batches
        assert equal_pair(4, 3, 2) == (3, 4)
        assert_same_rows(on_two / "pair", alone(home, "pair_alone", "--batch_size 4 --grad_accum_steps 3 --dropout 0"))
    elif name == "muon":  # its steps come from bfloat16 products, where rounding differences show earlier
        run = alone(home, "muon_alone", VARIANTS["muon"])
        assert_same_rows(on_two / "muon", run, loss=1e-4, norm=1e-3, val=1e-4)
    else:
        assert_same_run(on_two / name, one if name == "one_then_two" else alone(home, f"{name}_alone", VARIANTS[name]))


@pytest.mark.slow
def test_fully_shard_makes_the_updates_of_ddp(two, on_two, sharded):
    for name in ("untied", "checkpointed", "rope"):
        assert_same_rows(sharded / f"fsdp_{name}", on_two / name, loss=1e-4, norm=1e-4, val=1e-4)
    assert_same_run(sharded / "fsdp", two, 1e-4)
    # bfloat16 has 8 bits; DDP's autocast and fully_shard's policy round at different places
    assert_same_rows(sharded / "fsdp_bfloat16", on_two / "bfloat16", loss=2e-4, norm=5e-3, val=2e-4)


@pytest.mark.slow
def test_weights_are_gathered_in_the_dtype_of_the_run(home, sharded):
    """Autocast would hide an error: twice the traffic between GPUs for the same results."""
    mlp = [["mlp", f"torch.{dtype}"] for dtype in ("bfloat16", "float16", "float32")]
    for rank in range(2):
        assert json.loads((home / f"gathered_{rank}").read_text()) == [*mlp, ["norm", "torch.float32"]]


@pytest.mark.slow
def test_float16_skips_the_same_updates_everywhere(home, on_two, sharded):
    """An overflow on one rank is an overflow on all, otherwise their weights would diverge. And losses are not
    multiplied by the number of ranks, which would overflow sooner on more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.DeviceSettings, "scaler", high_scale)
        single = alone(home, "one_float16", VARIANTS["float16"])
    skipped = [int(row["skipped"]) for row in rows(on_two / "float16")[1:]]
    assert skipped[:2] == [1, 2]
    assert 3 < skipped[-1] < 10
    for other in (sharded / "fsdp_float16", single):
        for key in ("skipped", "loss_scale"):
            assert [row[key] for row in rows(other)] == [row[key] for row in rows(on_two / "float16")]
        assert_same_rows(other, on_two / "float16", loss=2e-4, norm=5e-3, val=2e-4)


def layout(value):
    """Replace each tensor by its shape and dtype."""
    if isinstance(value, dict):
        return {key: layout(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [layout(item) for item in value]
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "_untied"])
def test_checkpoints_of_fully_shard_equal_those_of_ddp(two, on_two, sharded, name):
    pair = sharded / f"fsdp{name}", on_two / name[1:] if name else two
    assert len({frozenset(p.relative_to(run) for p in run.rglob("*")) for run in pair}) == 1
    assert layout(weights(pair[0])) == layout(weights(pair[1]))
    ours, theirs = (checkpoint.load_train_state(run / "ckpt/last") for run in pair)
    assert ours.keys() == theirs.keys()
    assert layout(ours["optimizer"]) == layout(theirs["optimizer"])
    states = [state["optimizer"]["state"] for state in (ours, theirs)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_sharded_run_is_read_by_eval_and_infer(home, sharded):
    done = command("eval", "--model_path", "out/fsdp", "--device", "cpu", "--json", "-", cwd=home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(float(rows(sharded / "fsdp")[-1]["val_loss"]), abs=1e-5)
    words = ("--prompt", "99 green", "--temperature", 0, "--max_new_tokens", 8, "--device", "cpu")
    done = command("infer", "--model_path", "out/fsdp", *words, cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("99 green")


@pytest.mark.slow
def test_runs_are_resumed_with_another_wrapper_and_by_one_process(home, one, two, sharded):
    for run, name in ((sharded / "fsdp", "fsdp_then_one"), (two, "two_then_one")):
        alone(home, *copied(run, name))
    assert_same_run(home / "out/two_then_one", one)
    for name in ("fsdp_then_one", "fsdp_then_fsdp", "two_then_fsdp"):
        assert_same_run(sharded / name, one, 1e-4)


def test_muon_is_refused_with_fully_shard():
    with pytest.raises(UserError, match="optimizer = muon"):
        cli.parse(TrainConfig, [*BASE, "--optimizer", "muon", "--fsdp"])


# ---------------------------------------------------------------------------------------------------------------------
# ends, threads, data, the compiler


@pytest.mark.slow
def test_patience_and_time_end_all_ranks(one, on_two, sharded):
    """torchrun restarts a job whose exit code is not 0: the next run of it would not have started."""
    state = checkpoint.read_state(on_two / "patience/ckpt/last")
    assert state["finished"]
    assert state["iter"] == int(rows(on_two / "patience")[-1]["iter"]) < 100
    first, *_, last = sorted((on_two / "timed/ckpt").glob("iter_*"))
    assert 0 < checkpoint.read_state(first)["iter"] < 20
    assert not checkpoint.read_state(first)["finished"]
    assert checkpoint.read_state(last)["finished"], "it has been resumed"
    assert_same_rows(on_two / "timed", one)


CORES = "from flatgpt.runtime import distributed\ndistributed._cores = lambda: 6\n"


@pytest.mark.slow
def test_rank_0_measures_the_dtype_and_ranks_share_the_cores(ranks, home):
    """Rank 1 would find another dtype. Of six cores each rank takes three."""
    code = CORES + (
        "from flatgpt.runtime import precision\nfirst = os.environ['RANK'] == '0'\n"
        "measured = 'bfloat16' if first else 'float32'\n"
        "say = lambda: print(os.environ['RANK'], 'measures', file=sys.stderr)\n"
        "precision.faster_dtype = lambda *work: (measured, say() or 'found')"
    )
    words = (*BASE, "--dtype", "auto", "--max_iters", 1, "--out_dir", "out/measured")
    done = ranks(2, *words, script=wrapped(home, code), cwd=home, threads=None)
    assert done.code == 0, done.output
    assert re.search(r"^machine  cpu \(3 threads\), bfloat16 \(found\), eager", done.output, re.M)
    assert re.findall(r"^\d measures$", done.output, re.M) == ["0 measures"]
    assert checkpoint.read_state(home / "out/measured/ckpt/last")["chosen"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_number_of_threads_that_the_user_sets_is_kept(home):
    """With a real torchrun: torch reads the variable when it is imported."""
    words = (*BASE, "--max_iters", 1, "--out_dir", "out/threads_2")
    done = torchrun(2, wrapped(home, CORES), *words, cwd=home, threads="2")
    assert done.returncode == 0, done.stderr
    assert "machine  cpu (2 threads)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "what"),
    [
        # an older recipe: weights would diverge, or ranks would wait for each other
        ("sys.argv += ['--lr', '1e-2', '--eval_interval', '7'] if RANK == '1' else []", "lr, eval_interval"),
        ("os.chdir('machine' + RANK)", "dataset data/tiny"),
    ],
)
def test_settings_and_data_that_differ_between_ranks_are_refused(ranks, tmp_path, code, what):
    make_dataset(tmp_path)
    for rank, text in enumerate(("The same text. ", "The same text? ")):
        (tmp_path / f"machine{rank}").mkdir()
        make_dataset(tmp_path / f"machine{rank}", text=text * 500)
    done = ranks(2, *BASE, script=wrapped(tmp_path, f"RANK = os.environ['RANK']\n{code}"), cwd=tmp_path)
    assert done.code == 1
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    alike = "every machine has to have the same files and settings"
    assert errors == [f"error: {what} of rank 1 is not that of rank 0: {alike}"]
    assert "in run_script" not in done.output
    assert not [*tmp_path.glob("machine*/out"), *tmp_path.glob("out")]


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
        assert_same_rows(home / "out" / name, home / "out/eager", loss=1e-3, norm=2e-2, val=1e-3)


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
        assert_same_rows(home / "out" / name, home / "out/one_gpu", loss=5e-3, norm=5e-2, val=5e-3)
