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
from processes import ROOT
from run_files import rows, weights

import train
from config import TrainConfig
from flatgpt.cli import cli
from flatgpt.runs import checkpoint
from flatgpt.runtime import device

BASE = [*TINY, *shlex.split("--dropout 0.1 --grad_accum_steps 4 --lr 5e-3 --max_iters 20 --eval_interval 10")]
BASE += ["--keep_checkpoints", "9"]

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
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", str(script)]
        + [str(word) for word in words],
        cwd=cwd,
        env={key: value for key, value in environment.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def in_one_job(home: Path, runs: dict[str, str], before: str = "") -> tuple[Path, str]:
    """Return a script that makes these runs, BASE with the words by name, after some code; and its argument."""
    script = home / f"several_{next(iter(runs))}.py"
    script.write_text(SEVERAL.format(before=before))
    words = [[*BASE, *shlex.split(changes), "--out_dir", f"out/{name}"] for name, changes in runs.items()]
    return script, json.dumps(words)


def wrapped(home: Path, code: str) -> Path:
    """Return a script that runs some code before train.py."""
    script = home / "wrapped.py"
    script.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return script


def alone(home: Path, runs: dict[str, str]) -> None:
    """Make these runs in this process."""
    with contextlib.chdir(home):
        for name, changes in runs.items():
            train.train(cli.parse(TrainConfig, [*BASE, *shlex.split(changes), "--out_dir", f"out/{name}"]))


def assert_same_run(run: Path, other: Path, loss: float = 1e-5, val: float = 1e-6) -> None:
    """Each iteration is logged once, with equal figures up to relative tolerances, and the weights are equal."""
    ours, theirs = rows(run), rows(other)
    assert [row["iter"] for row in ours] == [row["iter"] for row in theirs] == [str(i) for i in range(len(ours))]
    assert len(ours) > 1
    tolerances = {"train_loss": loss, "grad_norm": 25 * loss, "val_loss": val, "lr": 0, "tokens": 0}
    for key, tolerance in tolerances.items():
        assert [bool(row[key]) for row in ours] == [bool(row[key]) for row in theirs], key
        values = [[float(row[key]) for row in table if row[key]] for table in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=tolerance, abs=0, nan_ok=key == "grad_norm"), key
    # float16: an overflow on one rank is an overflow on all; and losses are not multiplied by the number of ranks
    for key in ("skipped", "loss_scale"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    if loss < 1e-4:
        torch.testing.assert_close(weights(run), weights(other), atol=3 * loss, rtol=0)
    assert "_then_" not in run.name or (run / "metrics.lost.csv").exists(), "it has resumed from its middle"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The current folder of the jobs, with data/tiny and all runs of this file in out/."""
    folder = tmp_path_factory.mktemp("ranks")
    make_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def job_of_two(home) -> subprocess.CompletedProcess:
    """out/one by one process, which all others are compared with; out/two by two ranks, as a user starts them."""
    alone(home, {"one": ""})
    words = (*BASE, "--out_dir", "out/two", "--json", "two.json")
    return torchrun(2, ROOT / "train.py", *words, cwd=home, threads=None)


def test_two_ranks_make_the_updates_of_one(home, job_of_two):
    """Rank 0 alone prints and writes. The ranks share the cores, whatever torchrun sets OMP_NUM_THREADS to."""
    one, two = home / "out/one", home / "out/two"
    assert_same_run(two, one)
    assert {p.relative_to(two) for p in two.rglob("*")} == {p.relative_to(one) for p in one.rglob("*")}
    result = json.loads((home / "two.json").read_text())
    assert (result["ranks"], result["iter"], result["tokens"]) == (2, 20, 20 * 16 * 32)
    lines = job_of_two.stdout.splitlines()
    for start in ("model ", "data ", "update ", "run ", "machine ", "folder ", "done: "):
        assert len([line for line in lines if line.startswith(start)]) == 1, start
    assert [int(line.split()[1]) for line in lines if line.startswith("iter ")] == list(range(21))
    assert len([line for line in lines if line.startswith("--- sample after")]) == 2
    threads = max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else os.cpu_count() // 2
    assert re.search(rf"^machine  cpu \({threads} threads?\), float32", job_of_two.stdout, re.M)
    assert "Traceback" not in job_of_two.stderr
    assert "warning" not in job_of_two.stderr.lower().replace("userwarning", "")


# ---------------------------------------------------------------------------------------------------------------------
# other numbers of ranks, wrappers and dtypes, and from one to another


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
VARIANTS = {
    "untied": "--no-tie_weights",
    "checkpointed": "--activation_checkpointing",
    "bfloat16": "--dtype bfloat16",
    "float16": "--dtype float16",
    "rope": "--position rope",
}
DDP = VARIANTS | {
    "muon": "--optimizer muon",
    "pair": "--batch_size 3 --grad_accum_steps 4 --dropout 0",  # without dropout, whose masks follow the micro-batches
    "patience": "--lr 1 --warmup_iters 11 --eval_interval 2 --patience 1 --max_iters 100 --lr_decay_iters 20",
    "timed": "--max_minutes 1e-4 --json timed.json",
}
ALONE = VARIANTS | {"muon": "--optimizer muon", "pair": "--batch_size 4 --grad_accum_steps 3 --dropout 0"}


@pytest.fixture(scope="module")
def out(ranks, home, job_of_two) -> Path:
    """The folder of all runs: by DDP <variant>, with fully_shard fsdp_<variant>, by one process <variant>_alone."""
    out = home / "out"

    def half(run: str, other: str) -> str:
        """Copy a run; return the words with which the copy is resumed from its middle."""
        shutil.copytree(out / run, out / f"{run}_then_{other}", symlinks=True)
        return f"--resume out/{run}_then_{other}/ckpt/iter_000010"

    def job(number: int, runs: dict[str, str], before: str = "") -> None:
        script, words = in_one_job(home, runs, before)
        done = ranks(number, words, script=script, cwd=home)
        assert done.code == 0, done.output

    job(2, DDP | {"one_then_two": half("one", "two")}, PREPARED)
    job(2, {"fsdp": "--fsdp"} | {f"fsdp_{name}": f"{words} --fsdp" for name, words in VARIANTS.items()}, PREPARED)
    resumed = {f"{run}_then_fsdp": f"{half(run, 'fsdp')} --fsdp" for run in ("fsdp", "two")}
    job(2, {"timed": "--resume"} | resumed)
    job(4, {"four": "", "two_then_four": half("two", "four")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.DeviceSettings, "scaler", high_scale)
        alone(home, {f"{name}_alone": words for name, words in ALONE.items()})
        alone(home, {f"{run}_then_one": half(run, "one") for run in ("two", "fsdp")})
    return out


HALF = {"loss": 2e-4, "val": 2e-4}  # the wrappers and the number of ranks round at different places
SHARDED = {"loss": 9e-5, "val": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "other", "tolerances"),
    [
        *(("four", "one", {}), ("one_then_two", "one", {}), ("two_then_four", "one", {}), ("two_then_one", "one", {})),
        *((name, f"{name}_alone", {}) for name in ("untied", "checkpointed", "rope", "pair")),
        *(("muon", "muon_alone", HALF), ("float16", "float16_alone", HALF), ("timed", "one", {})),
        *((f"fsdp_{name}", name, SHARDED) for name in ("untied", "checkpointed", "rope")),
        *(("fsdp", "two", SHARDED), ("fsdp_bfloat16", "bfloat16", HALF), ("fsdp_float16", "float16", HALF)),
        *((f"{run}", "one", SHARDED) for run in ("fsdp_then_one", "fsdp_then_fsdp", "two_then_fsdp")),
    ],
)
def test_updates_are_those_of_other_ranks_and_wrappers(out, run, other, tolerances):
    assert_same_run(out / run, out / other, **tolerances)


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "ddp"), [("fsdp", "two"), ("fsdp_untied", "untied")])
def test_checkpoints_of_fully_shard_equal_those_of_ddp(out, sharded, ddp):
    assert len({frozenset(p.relative_to(out / run) for p in (out / run).rglob("*")) for run in (sharded, ddp)}) == 1
    ours, theirs = (checkpoint.load_train_state(out / run / "ckpt/last") for run in (sharded, ddp))
    assert ours.keys() == theirs.keys()
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_patience_and_time_end_all_ranks(out):
    """torchrun restarts a job whose exit code is not 0: the next run of it would not have started."""
    state = checkpoint.read_state(out / "patience/ckpt/last")
    assert state["finished"]
    assert state["iter"] == int(rows(out / "patience")[-1]["iter"]) < 100
    result = json.loads((out.parent / "timed.json").read_text())
    assert (result["state"], result["val_iter"]) == ("max_minutes", result["iter"])
    first, *_, last = map(checkpoint.read_state, sorted((out / "timed/ckpt").glob("iter_*")))
    assert 0 < first["iter"] < 20
    assert (first["finished"], last["finished"]) == (False, True), "it has been resumed"


# ---------------------------------------------------------------------------------------------------------------------
# threads, data, the compiler


CORES = "os.sched_getaffinity = lambda process: range(6)\n"


@pytest.mark.slow
def test_rank_0_measures_and_ranks_share_the_cores(ranks, home, tmp_path, monkeypatch):
    """Rank 1 would find another dtype and other operators. Of six cores each rank takes three."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = CORES + (
        "from flatgpt.runtime import choices\nfirst = os.environ['RANK'] == '0'\n"
        "best = ('bfloat16', 'plain') if first else ('float32', 'fused')\n"
        "say = lambda: print(os.environ['RANK'], 'measures', file=sys.stderr)\n"
        "choices.measure = lambda candidates: say() or {name: 1 + (name not in best) for name in candidates}"
    )
    words = (*BASE, "--dtype", "auto", "--max_iters", 1, "--out_dir", "out/measured")
    done = ranks(2, *words, script=wrapped(home, code), cwd=home, threads=None)
    assert done.code == 0, done.output
    assert re.search(r"^machine  cpu \(3 threads\), bfloat16 \(.*float32 2e\+03\), eager", done.output, re.M)
    assert re.findall(r"^\d measures$", done.output, re.M) == ["0 measures"] * 3
    chosen = checkpoint.read_state(home / "out/measured/ckpt/last")["chosen"]
    assert (chosen["dtype"], chosen["paths"]) == ("bfloat16", {"attention": "plain", "loss": "plain"})


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
    (error,) = (line for line in done.output.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {what} of rank 1 is not that of rank 0")
    assert "in run_script" not in done.output
    assert not [*tmp_path.glob("machine*/out"), *tmp_path.glob("out")]


@pytest.mark.slow
def test_compiled_ranks_make_nearly_the_updates_of_eager_ones(home):
    """The compiler draws other dropout masks and rounds to bfloat16 at other places."""
    words = "--dtype bfloat16 --n_layer 1 --dropout 0 --lr 1e-3 --max_iters 6 --sample_tokens 0"
    runs = {
        "eager": f"{words} --no-compile",
        "compiled": f"{words} --compile",
        "compiled_checkpointed": f"{words} --compile --activation_checkpointing",
        "compiled_fsdp": f"{words} --compile --fsdp",
    }
    done = torchrun(2, *in_one_job(home, runs), cwd=home)
    assert done.stdout.count("bfloat16, compiled") == 3
    assert "torch.compile failed" not in done.stderr
    for name in list(runs)[1:]:
        assert_same_run(home / "out" / name, home / "out/eager", loss=1e-3, val=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "failing", "tolerances"), [("", "1", {}), ("--fsdp", "1", SHARDED), ("--fsdp", "01", SHARDED)]
)
def test_ranks_go_on_if_a_compiler_fails(ranks, home, job_of_two, words, failing, tolerances):
    """The others neither wait nor end. The compiler is a stand-in, which compiles nothing."""
    code = (
        "import torch\ndef missing(*args): raise RuntimeError('no compiler')\n"
        f"fails = os.environ['RANK'] in '{failing}'\n"
        "torch.compile = lambda function, **options: missing if fails else function"
    )
    out = home / f"out/failing{words}{failing}"
    done = ranks(2, *BASE, *words.split(), "--compile", "--out_dir", out, script=wrapped(home, code), cwd=home)
    assert done.code == 0, done.output
    assert done.output.count("warning: torch.compile failed, continuing without it: no compiler\n") == 1
    assert_same_run(out, home / "out/one", **tolerances)


@pytest.mark.gpu
def test_gpus_make_nearly_the_updates_of_one(home):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    words = "--device cuda --dtype bfloat16 --compile --dropout 0"
    runs = {"nccl": words, "nccl_fsdp": f"{words} --fsdp", "nccl_both": f"{words} --fsdp --activation_checkpointing"}
    assert "torch.compile failed" not in torchrun(2, *in_one_job(home, runs), cwd=home).stderr
    alone(home, {"one_gpu": words})
    for name in runs:
        assert_same_run(home / "out" / name, home / "out/one_gpu", loss=5e-3, val=5e-3)
