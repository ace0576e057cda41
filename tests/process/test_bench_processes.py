"""bench.py's other processes: rows of a suite, train.py, nanoGPT, the tests for CUDA."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from in_process import TINY, make_dataset
from processes import ROOT, command
from stand_in import bench_here, nanogpt_checkout

from config import BenchConfig, UserError
from flatgpt.benchmarks import inference, measure, nanogpt, suites
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.runtime.device import DeviceSettings
from model import GPT

pytestmark = pytest.mark.slow


@pytest.fixture
def scripts(tiny_data, monkeypatch):
    """scripts(name, text): bench.py starts this text in place of the script of that name."""
    (tiny_data / "scripts").mkdir()
    monkeypatch.setattr(measure, "REPO_ROOT", tiny_data / "scripts")
    return lambda name, text: (tiny_data / "scripts" / name).write_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# rows of a suite

ROW = """
import json, os, subprocess, sys, time
words = sys.argv[1:]
print("working", file=sys.stderr)
if words[0] == "hang":
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); open('ready', 'w'); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        print(json.dumps({"figure": 2.5}), flush=True)
        time.sleep(600 if words[1] == "for good" else 0)
    sys.exit(1)
if words[1] == "fail":
    sys.exit("warning: hot\\nerror: too large")
if words[1] == "die":
    os.kill(os.getpid(), 9)
if words[1] == "stop":
    os.kill(os.getppid(), 15)
    time.sleep(600)
print(json.dumps({"words": words, "thp": os.environ.get("THP_MEM_ALLOC_ENABLE"), "figure": 1.5}))
"""


def test_rows_that_fail_do_not_end_the_others(scripts, tiny_data, monkeypatch, capsys):
    """Rows have the user's environment, not what find_device sets for this process. The files are written after each
    row: a signal during the last one keeps the others."""
    scripts("bench.py", ROW)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "7")
    monkeypatch.delitem(measure.USER_ENVIRONMENT, "THP_MEM_ALLOC_ENABLE", raising=False)
    for name in suites.DATASETS:
        make_dataset(tiny_data, name)
    rows = [{"label": name, "args": f"train {name}", "peer": True} for name in ("ok", "fail", "die")]
    rows += [{"label": name, "args": f"save {name}"} for name in ("alone", "stop")]
    monkeypatch.setattr(suites, "SUITES", {"all": rows})
    with pytest.raises(KeyboardInterrupt):
        bench_here("all", "--peer", "nanoGPT", nanogpt_checkout(tiny_data / "nanoGPT"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found = json.loads(Path("figures.json").read_text())["rows"]
    assert list(found) == ["ok", "fail", "die", "alone"]
    assert all(row.pop("seconds") > 0 for row in found.values())
    shared, peer = ["--data_dir", "data", "--device", "cpu"], ["--peer", "nanoGPT", str(tiny_data / "nanoGPT")]
    assert found["ok"] == {"words": ["train", "ok", *shared, *peer, "--json", "-"], "thp": None, "figure": 1.5}
    assert found["alone"]["words"] == ["save", "alone", *shared, "--json", "-"]
    assert (found["fail"], found["die"]) == ({"error": "too large"}, {"error": "killed by signal 9 after: working"})
    assert re.search(r"\| fail +\|.*\n.*\n\| error +\| too large", Path("figures.md").read_text())
    assert "working" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "mode", "grace"), [("limit", "", 20), ("limit", "for good", 0.2), ("Ctrl-C", "", 20)])
def test_a_row_that_is_interrupted_ends_with_its_children(scripts, monkeypatch, end, mode, grace):
    """At its limit or by Ctrl-C; its child, which no test may leave behind, ignores SIGINT. What it still writes to
    standard output is kept."""

    def sleep(seconds: float) -> None:
        if end == "Ctrl-C" and Path("ready").exists():
            raise KeyboardInterrupt
        time.sleep(seconds)

    def now() -> int:
        return 100 * (end == "limit" and Path("ready").exists())

    scripts("bench.py", ROW)
    monkeypatch.setattr(suites, "GRACE_SECONDS", grace)
    monkeypatch.setattr(suites, "time", SimpleNamespace(monotonic=now, sleep=sleep))
    if end == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            suites.run_row(["hang", mode], 77)
    else:
        found = suites.run_row(["hang", mode], 77)
        assert found.pop("error").startswith("timed out after 77 s: ")
        assert found == {"figure": 2.5} or mode == "for good"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run(in_tmp):
    """Every row of the list for a GPU, on the CPU, as a user starts it; the tests that need CUDA are only collected."""
    for name in suites.DATASETS:
        make_dataset(in_tmp, name)
    done = command("bench", "gpu", "--dry_run", "--json", "dry.json", cwd=in_tmp, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = json.loads((in_tmp / "dry.json").read_text())["rows"]
    assert list(rows) == [row["label"] for row in suites.SUITES["gpu"]]
    assert not [row for row in rows.values() if "error" in row]
    tests, updates, resumed, scaled, *_ = rows.values()
    assert (tests["collected_only"] > 10, tests["failed_tests"]) == (True, [])
    assert updates["ms"] > 0
    assert resumed["identical"]
    assert scaled["loss_scale"] > 0
    assert (in_tmp / "dry.md").read_text() == done.stdout
    assert {path.name for path in in_tmp.iterdir() if path.is_dir()} == {"data"}, "temporary folders are deleted"


TESTS = """
import os, pytest, signal

pytestmark = pytest.mark.gpu
def test_passes(): print("not among the figures")
def test_fails(): raise AssertionError
def test_skips(): pytest.skip()
def test_interrupts(): os.kill(os.getpid(), signal.SIGINT)
def test_never_runs(): pass
"""


def test_outcomes_are_counted_up_to_the_interruption(tmp_path):
    """In a process that takes the device for CUDA. SIGINT is what ends a row at its time limit."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "tests" / "test_import.py").write_text("import no_such_module")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    code = (
        f"import json, sys, pathlib, torch; sys.path.insert(0, {str(ROOT)!r}); sys.modules['xdist'] = None\n"
        "from flatgpt.benchmarks import suites\n"
        "suites.find_device, suites.REPO_ROOT = torch.device, pathlib.Path.cwd()\n"
        "print(json.dumps(suites.bench_tests(suites.BenchConfig(device='cuda'))))\n"
    )
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed = ["tests/test_import.py", "tests/test_it.py::test_fails"]
    counts = {"passed": 1, "failed": 2, "skipped": 1, "complete": False}
    assert json.loads(done.stdout) == counts | {"failed_tests": failed}
    assert "KeyboardInterrupt" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# bench.py resume and loss

# A train.py whose losses depend on the update. If it was resumed, relu changes a loss and gelu the weights. With seed 2
# it does not end.
TRAIN = """
import dataclasses, json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from config import TrainConfig
from flatgpt.cli import cli
config = cli.parse(TrainConfig, sys.argv[1:])
with open("configs.jsonl", "a") as file:
    file.write(json.dumps(dataclasses.asdict(config)) + "\\n")
if config.n_layer == 7:
    sys.exit("error: too deep")
print(f"iter      0 | val 4.0000")
print(f"iter    100 | val {{4 - config.seed}}.0000")
out, wrong = Path(config.out_dir), config.activation.replace("gelu_tanh", "") if config.resume else ""
(out / "ckpt" / "last").mkdir(parents=True, exist_ok=True)
rows = [f"{{i}},{{10 - i + 0.001 * (wrong == 'relu')}}" for i in range((config.max_iters or 0) + 1)]
(out / "metrics.csv").write_text("\\n".join(["iter,train_loss", *rows]))
(out / "ckpt/last/model.safetensors").write_text(wrong)
if config.seed == 2:
    assert not os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]), "each run compiles anew"
    time.sleep(600)
"""


@pytest.fixture
def fake_train(scripts, tiny_data):
    """train.py is TRAIN; a function that returns the settings of its runs."""
    scripts("train.py", TRAIN.format(root=str(ROOT)))
    return lambda: [json.loads(line) for line in (tiny_data / "configs.jsonl").read_text().splitlines()]


def test_one_run_stops_and_resumes_and_the_other_does_not(fake_train, tiny_data):
    figures = bench_here("resume", *TINY, "--max_iters", 9, "--dropout", 0.25)
    assert (figures["updates"], figures["identical"]) == (9, True)
    assert min(figures[f"{name}_s"] for name in ("stopped", "resumed", "uninterrupted")) > 0
    configs = fake_train()
    assert [(each["max_iters"], each["resume"] is not None) for each in configs] == [(4, False), (9, True), (9, False)]
    folders = [each["out_dir"] for each in configs]
    assert folders[0] == folders[1] != folders[2]
    assert not Path(folders[0]).exists()
    for each in configs:  # one schedule; a checkpoint where the first run ends; all losses
        assert (each["lr_decay_iters"], each["eval_interval"], each["log_interval"]) == (9, 4, 1)
        assert (each["dropout"], each["n_embd"]) == (0.25, 32)
    for words, message in (
        (("--activation", "relu"), r"the uninterrupted one: metrics.csv has train_loss = 10.001 and 10.0 at iter 0"),
        (("--activation", "gelu"), r"the uninterrupted one: the weights of the last checkpoint"),
        (("--n_layer", 7), r"train.py --config .* failed: too deep$"),
    ):
        with pytest.raises(UserError, match=message):
            bench_here("resume", *TINY, "--max_iters", 9, *words)


def test_runs_to_a_loss_in_turn_with_nanogpt_on_the_same_ids(fake_train, tiny_data):
    folder = nanogpt_checkout(tiny_data / "nanoGPT")
    before = {*tiny_data.iterdir(), tiny_data / "figures.json", tiny_data / "configs.jsonl"}
    words = ("loss", *TINY, "--target", 2.5, "--lr", 3e-3)
    found = bench_here(*words, "--seeds", 3, "--peer", "nanoGPT", "nanoGPT", "--plot", "curve.png")
    assert set(tiny_data.iterdir()) == before | {tiny_data / "curve.png"}, "nothing else is left behind"
    assert matplotlib.image.imread("curve.png").shape == (640, 1280, 4)
    configs = fake_train()
    assert [(each["seed"], each["lr"], each["n_embd"]) for each in configs] == [(n, 3e-3, 32) for n in (1, 2, 3)]
    assert len({each["out_dir"] for each in configs}) == 3
    first, second, third = found["runs"]  # the second was ended when it reached the loss
    assert [each[1:] for each in first.pop("evaluations")] == [[0, 4], [100, 3]]
    assert first == {"seed": 1, "seconds": None, "iter": 100, "val_loss": 3}
    assert (second["iter"], second["val_loss"], third["val_loss"]) == (100, 2, 1)
    # the middle of two seconds and one that never came
    assert found["seconds"] == max(second["seconds"], third["seconds"])
    sizes = {split: 2 * len(open_dataset(Path("data/tiny")).tokens(split)) for split in ("train", "val")}
    call = {"words": [nanogpt.RECIPE, *nanogpt.CPU_RECIPE], "meta": {"vocab_size": 257}} | sizes
    assert [json.loads(each) for each in (folder / "said.jsonl").read_text().splitlines()] == [call] * 3
    peer = found["peers"]["nanoGPT"]["runs"]  # a whole process each, whatever loss it reaches
    assert [each["val_loss"] for each in peer] == [2.1] * 3
    rounds = [peer[n]["seconds"] / found["runs"][n]["seconds"] for n in (1, 2)]
    assert found["ratios"]["nanoGPT"]["rounds"] == pytest.approx(rounds)
    assert bench_here(*words, "--seeds", 2)["seconds"] is None, "half of them have no median"


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's updates, and the start of infer.py


@pytest.mark.slow
def test_nanogpt_is_timed_in_turn(tiny_data, monkeypatch):
    """It has the user's environment: what find_device sets for this process is not there."""
    dtypes = {"nanoGPT": torch.float32, "nanoGPT_best": torch.bfloat16}  # compilation is slow
    settings = {name: DeviceSettings(torch.device("cpu"), dtype, False, {}) for name, dtype in dtypes.items()}
    monkeypatch.setattr(nanogpt, "peer_settings", lambda config: settings)
    words = ("train", *TINY, "--no-bias", "--warmup_updates", 2, "--timed_updates", 3, "--rounds", 2)
    words += ("--peer", "nanoGPT", nanogpt_checkout(tiny_data / "n"))
    figures = bench_here(*words)
    for name, peer in figures["peers"].items():
        assert 0 < peer["ms_p10"] <= peer["ms"] <= peer["ms_p90"]
        assert peer["tokens_per_s"] == pytest.approx(4 * 32 / peer["ms"] * 1e3)
        assert peer["first_ms"] / 1e3 < peer["start_s"]  # it includes that update
        assert peer["machine"].endswith(f"{str(dtypes[name]).removeprefix('torch.')}, eager")
        rounds = figures["ratios"][name]["rounds"]
        assert len(rounds) == 2
        assert figures["ratios"][name]["median"] == pytest.approx(sum(rounds) / 2)
        assert figures["memory_ratios"][name] == pytest.approx(figures["peak_mem_gb"] / peer["peak_mem_gb"])
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setitem(measure.USER_ENVIRONMENT, "SAY_THP", "1")
    monkeypatch.delitem(measure.USER_ENVIRONMENT, "THP_MEM_ALLOC_ENABLE", raising=False)
    for more, message in (((), "nanogpt failed: THP is not set"), (("--position", "rope"), "position = rope")):
        with pytest.raises(UserError, match=message):
            bench_here(*words, *more)
    (tiny_data / "n" / "model.py").unlink()
    with pytest.raises(UserError, match=r"no model\.py"):
        bench_here(*words)


@pytest.mark.slow
def test_loading_is_timed_up_to_the_first_token(in_tmp, monkeypatch):
    """Two starts of infer.py, of which the first fills the page cache and does not count."""
    words = "infer --n_layer 2 --n_head 2 --n_embd 32 --context_length 64 --vocab_size 300 --rounds 1 --device cpu"
    config = cli.parse(BenchConfig, words.split())
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=iter([0, 50, 100, 103]).__next__))
    assert inference.load_to_first_token(GPT(config.model()), config) == 3
    assert not list(in_tmp.iterdir())
