"""bench.py's other processes: rows of a suite, train.py, nanoGPT, the tests for CUDA."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_process import TINY, make_dataset
from processes import ROOT, command
from stand_in import nanogpt_checkout

import bench
from config import BenchConfig, UserError
from flatgpt.benchmarks import inference, measure, nanogpt, suites, time_to_loss
from flatgpt.benchmarks.suites import Row
from flatgpt.benchmarks.time_to_loss import NANOGPT, OURS, until_loss
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.runtime.device import DeviceSettings
from model import GPT


def run(*words) -> dict:
    """The figures that bench.py writes."""
    bench.main(cli.parse(BenchConfig, [*map(str, words), "--json", "figures.json"]))
    return json.loads(Path("figures.json").read_text())


@pytest.fixture
def scripts(tiny_data, monkeypatch):
    """scripts(name, text): bench.py starts this text in place of the script of that name."""
    (tiny_data / "scripts").mkdir()
    monkeypatch.setattr(measure, "REPO_ROOT", tiny_data / "scripts")
    return lambda name, text: (tiny_data / "scripts" / name).write_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# rows of a suite

ROW = """
import json, os, sys
words = sys.argv[1:]
print("working", file=sys.stderr)
if words[0] == "hang":
    import subprocess, time
    code = "import fcntl, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); f = open('lock', 'w'); "
    code += "fcntl.flock(f, fcntl.LOCK_EX); print('ready', flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        print(json.dumps({"figure": 2.5}))
        time.sleep(600 if words[1] == "for good" else 0)
    sys.exit(1)
if words[1] == "fail":
    sys.exit("warning: hot\\nerror: too large")
if words[1] == "die":
    os.kill(os.getpid(), 9)
print(json.dumps({"words": words, "thp": os.environ.get("THP_MEM_ALLOC_ENABLE"), "figure": 1.5}))
"""


def test_rows_that_fail_do_not_end_the_others(scripts, tiny_data, monkeypatch, capsys):
    """Rows have the user's environment, not what find_device sets for this process."""
    scripts("bench.py", ROW)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "7")
    monkeypatch.delitem(measure.USER_ENVIRONMENT, "THP_MEM_ALLOC_ENABLE", raising=False)
    for name in suites.DATASETS:
        make_dataset(tiny_data, name)
    rows = [Row(name, f"train {name}", peer=True) for name in ("ok", "fail", "die")]
    monkeypatch.setattr(suites, "SUITES", {"all": [*rows, Row("save", "save ok")]})
    found = run("all", "--peer", "nanoGPT", nanogpt_checkout(tiny_data / "nanoGPT"))
    assert list(found["rows"]) == ["ok", "fail", "die", "save"]
    assert all(row.pop("seconds") > 0 for row in found["rows"].values())
    shared = ["--data_dir", "data", "--device", "cpu"]
    peer = ["--peer", "nanoGPT", str(tiny_data / "nanoGPT")]
    words = ["train", "ok", *shared, *peer, "--json", "-"]
    assert found["rows"]["ok"] == {"words": words, "thp": None, "figure": 1.5}
    assert found["rows"]["save"]["words"] == ["save", "ok", *shared, "--json", "-"]
    assert found["rows"]["fail"] == {"error": "too large"}
    assert found["rows"]["die"] == {"error": "ended by signal 9 after: working"}
    text, printed = Path("figures.md").read_text(), capsys.readouterr()
    assert printed.out == text
    assert "- fail: error: too large, seconds" in text
    assert "- save: words save ok --data_dir data --device cpu --json -, figure 1.50, seconds" in text
    assert "working" in printed.err


@pytest.mark.parametrize(
    ("error", "mode", "grace"),
    [
        (subprocess.TimeoutExpired, "until told", 20),
        (subprocess.TimeoutExpired, "for good", 0.2),
        (KeyboardInterrupt, "until told", 20),
    ],
)
def test_a_row_that_is_interrupted_ends_with_its_children(scripts, monkeypatch, error, mode, grace):
    """At its limit or by Ctrl-C; its child ignores SIGINT. What it still writes to standard output is kept."""
    scripts("bench.py", ROW)
    ready, real = threading.Event(), subprocess.Popen.wait

    def wait(process, timeout=None):
        if timeout != 77:
            return real(process, timeout)
        assert ready.wait(60)
        raise error(process.args, timeout) if error is subprocess.TimeoutExpired else error

    monkeypatch.setattr(suites, "GRACE", grace)
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    monkeypatch.setattr(suites, "log", lambda line: ready.set() if line.strip() == "ready" else None)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            suites.run_row(["hang", mode], 77)
    else:
        found = suites.run_row(["hang", mode], 77)
        assert found["error"] == "ended after its limit of 77 s: ready"
        assert mode == "for good" or found["figure"] == 2.5
    with open("lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the child has it


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run(in_tmp):
    """Every row of the list for a GPU, on the CPU, as a user starts it; the tests that need CUDA are only collected."""
    for name in suites.DATASETS:
        make_dataset(in_tmp, name)
    done = command("bench", "gpu", "--dry_run", "--json", "dry.json", cwd=in_tmp, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = json.loads((in_tmp / "dry.json").read_text())["rows"]
    assert list(rows) == [row.label for row in suites.GPU]
    assert not [row for row in rows.values() if "error" in row]
    assert all(row["seconds"] > 0 for row in rows.values())
    tests, updates, resumed, scaled, *_ = rows.values()
    assert (tests["collected_only"] > 50, tests["failed_tests"]) == (True, [])
    assert updates["ms"] > 0
    assert resumed["identical"]
    assert scaled["loss_scale"] > 0
    assert (in_tmp / "dry.md").read_text() == done.stdout
    assert {path.name for path in in_tmp.iterdir() if path.is_dir()} == {"data"}, "temporary folders are deleted"


# ---------------------------------------------------------------------------------------------------------------------
# bench.py tests

TESTS = """
import os, pytest, signal

@pytest.fixture
def broken():
    raise ValueError

@pytest.fixture
def ends_badly():
    yield
    raise ValueError

pytestmark = pytest.mark.gpu
def test_passes(): print("not among the figures")
def test_fails(): raise AssertionError
def test_skips(): pytest.skip()
def test_setup(broken): pass
def test_teardown(ends_badly): pass
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
        "import json, sys, pathlib, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.modules['xdist'] = None\n"
        "from flatgpt.benchmarks import checks\n"
        "checks.find_device, checks.REPO_ROOT = torch.device, pathlib.Path.cwd()\n"
        "from config import BenchConfig\n"
        "print(json.dumps(checks.bench_tests(BenchConfig(device='cuda'))))\n"
    )
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed = ["test_import.py", "test_it.py::test_fails", "test_it.py::test_setup", "test_it.py::test_teardown"]
    assert json.loads(done.stdout) == {
        **{"passed": 1, "failed": 4, "skipped": 1, "complete": False},
        "failed_tests": [f"tests/{name}" for name in failed],
    }
    assert "KeyboardInterrupt" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# bench.py resume and loss

# A train.py whose losses depend on the update and, with activation relu, on whether it was resumed.
TRAIN = """
import dataclasses, json, sys
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
out, wrong = Path(config.out_dir), config.activation == "relu" and config.resume is not None
(out / "ckpt" / "last").mkdir(parents=True, exist_ok=True)
rows = [f"{{i}},{{10 - i + 0.001 * wrong}}" for i in range((config.max_iters or 0) + 1)]
(out / "metrics.csv").write_text("\\n".join(["iter,train_loss", *rows]))
header = b'{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'
(out / "ckpt/last/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
"""


@pytest.fixture
def fake_train(scripts, tiny_data):
    """train.py is TRAIN; a function that returns the settings of its runs."""
    scripts("train.py", TRAIN.format(root=str(ROOT)))
    return lambda: [json.loads(line) for line in (tiny_data / "configs.jsonl").read_text().splitlines()]


def test_one_run_stops_and_resumes_and_the_other_does_not(fake_train, tiny_data):
    figures = run("resume", *TINY, "--max_iters", 9, "--dropout", 0.25)
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--activation", "relu"), r"the uninterrupted one: metrics.csv has train_loss = 10.001 and 10.0 at"),
        (("--n_layer", 7), r"train.py --config .* failed: too deep$"),
    ],
)
def test_a_resumed_run_that_differs_or_fails_is_an_error(fake_train, words, message):
    with pytest.raises(UserError, match=message):
        run("resume", *TINY, "--max_iters", 9, *words)


def test_each_seed_is_a_run_of_train_with_all_settings(fake_train, tiny_data, capsys):
    before = {*tiny_data.iterdir(), tiny_data / "figures.json", tiny_data / "configs.jsonl"}
    found = run("loss", *TINY, "--target", 2.5, "--seeds", 3, "--lr", 3e-3, "--activation", "relu")
    configs = fake_train()
    assert [each["seed"] for each in configs] == [1, 2, 3]
    settings = {(each["lr"], each["activation"], each["n_embd"], each["dataset"]) for each in configs}
    assert settings == {(3e-3, "relu", 32, "tiny")}
    assert len({each["out_dir"] for each in configs}) == 3
    first, second, third = found["runs"]
    assert (first["seed"], first["seconds"], first["iter"], first["val_loss"]) == (1, None, 100, 3)
    assert (second["iter"], second["val_loss"], third["val_loss"]) == (100, 2, 1)
    # the middle of two seconds and one that never came
    assert found["seconds"] == max(second["seconds"], third["seconds"])
    assert "peers" not in found
    assert "not reached, iter    100, val 3.0000" in capsys.readouterr().out
    assert set(tiny_data.iterdir()) == before, "nothing is left behind"
    assert run("loss", *TINY, "--target", 2.5, "--seeds", 2)["seconds"] is None, "half of the runs have no median"


def test_nanogpt_trains_beside_it_on_the_same_ids(fake_train, tiny_data, capsys):
    folder = nanogpt_checkout(tiny_data / "nanoGPT")
    words = ("loss", *TINY, "--target", 2.05, "--seeds", 3, "--peer", "nanoGPT", "nanoGPT")
    found = run(*words)
    calls = [json.loads(each) for each in (folder / "said.jsonl").read_text().splitlines()]
    assert len(calls) == 3
    dataset = open_dataset(Path("data/tiny"))
    for each in calls:
        assert each["words"] == ["config/train_shakespeare_char.py", *time_to_loss.CPU_RECIPE]
        assert each["meta"] == {"vocab_size": 257}
        assert (each["train"], each["val"]) == tuple(2 * len(dataset.tokens(split)) for split in ("train", "val"))
    ours, peer = found["runs"], found["peers"]["nanoGPT"]["runs"]
    assert [each["val_loss"] for each in peer] == [2.1] * 3
    assert None not in [each["seconds"] for each in peer]  # its recipe's whole process, whatever it reaches
    assert ours[0]["seconds"] is None  # and makes no pair
    rounds = [peer[n]["seconds"] / ours[n]["seconds"] for n in (1, 2)]
    assert found["ratios"]["nanoGPT"]["rounds"] == pytest.approx(rounds)
    assert f"times as fast: {sum(rounds) / 2:.2f}" in capsys.readouterr().out
    (folder / "configurator.py").unlink()
    with pytest.raises(UserError, match=r"no configurator\.py"):
        run(*words)
    assert len(fake_train()) == 3, "refused before the first run"


LOSS_REACHED = """
import os, time
open("pid", "w").write(str(os.getpid()))
print("iter      0 | val 4.1000 | lr 1e-3")
print("iter     10 | loss 1.0000 | lr 1e-3")
print("iter     20 | loss 1.0000 | val 2.0000 | norm 1.9")
time.sleep(600)
"""
LONG_OUTPUT = """
print("step 8: train loss 1.0000, val loss 2.5000", flush=True)
print("more\\n" * 100_000, flush=True)
open("ended", "w").close()
"""


@pytest.mark.parametrize(
    ("text", "pattern", "target", "found"),
    [
        (LOSS_REACHED, OURS, 2.0, {"seconds": 30.5, "iter": 20, "val_loss": 2.0}),
        ('print("iter 0 | val 4.1")\nprint("iter 9 | val 2.0001")', OURS, 2.0, {"iter": 9, "val_loss": 2.0001}),
        (LONG_OUTPUT, NANOGPT, None, {"seconds": 31.5, "iter": 8, "val_loss": 2.5}),
        ('import sys\nprint("iter 0 | val 4.1")\nsys.exit("error: no such thing")', OURS, 2.0, "no such thing"),
    ],
)
def test_the_clock_stops_when_the_loss_is_reached(in_tmp, monkeypatch, text, pattern, target, found):
    """The process is ended then. Without a target the whole process counts: the second clock is later when it ended."""
    monkeypatch.delitem(measure.USER_ENVIRONMENT, "PYTHONUNBUFFERED", raising=False)
    clock = SimpleNamespace(perf_counter=iter([100.0, 130.5]).__next__)
    if target is None:
        clock.perf_counter = lambda: 100 + 31.5 * Path("ended").exists()
    monkeypatch.setattr(time_to_loss, "time", clock)
    Path("script.py").write_text(text)
    if isinstance(found, str):
        with pytest.raises(UserError, match=rf"script\.py failed: {found}"):
            until_loss([sys.executable, "script.py"], pattern, target, in_tmp)
        return
    assert until_loss([sys.executable, "script.py"], pattern, target, in_tmp) == {"seconds": None} | found
    if Path("pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path("pid").read_text()), 0)


def test_each_run_has_an_empty_compiler_cache(in_tmp):
    Path("script.py").write_text(
        "import os\nfolder = os.environ['TORCHINDUCTOR_CACHE_DIR']\n"
        "open('folders', 'a').write(f'{folder} {len(os.listdir(folder))}\\n')\n"
    )
    for _ in range(2):
        until_loss([sys.executable, "script.py"], OURS, 2.0, in_tmp)
    folders, counts = zip(*[line.rsplit(" ", 1) for line in Path("folders").read_text().splitlines()], strict=True)
    assert len(set(folders)) == 2
    assert counts == ("0", "0")


@pytest.mark.slow
def test_a_real_run_to_a_loss(tiny_data):
    found = run("loss", *TINY, "--target", 5.5, "--seeds", 1, "--max_iters", 200, "--eval_interval", 5)
    (only,) = found["runs"]
    assert only["val_loss"] <= 5.5
    assert 0 < only["iter"] < 200
    assert only["seconds"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's updates, and the start of infer.py


@pytest.fixture
def start_peer(tiny_data):
    words = ["train", *TINY, "--no-bias", "--peer", "nanoGPT", str(nanogpt_checkout(tiny_data / "n"))]
    config = dataclasses.replace(cli.parse(BenchConfig, words), vocab_size=257)
    return lambda dtype=torch.float32, compile=False: nanogpt.Peer(
        "nanoGPT", config, DeviceSettings(torch.device("cpu"), dtype, compile, {})
    )


def test_a_peer_times_its_updates(start_peer):
    with start_peer() as peer:
        first = peer.time_updates(1)
        start_s = peer.facts["start_s"]
        times = peer.time_updates(3)
        assert (len(first), len(times)) == (1, 3)
        assert min(times) > 0
        assert start_s is None or 1e-3 * first[0] < start_s  # it includes that update
        assert peer.facts["start_s"] == start_s
        assert 0.05 < peer.facts["peak_mem_gb"] < 5
        assert peer.facts["machine"].endswith("float32, eager")
        assert "ms" not in peer.facts
    assert peer._process.returncode is not None


def test_a_peer_that_ends_says_why_and_has_the_users_environment(start_peer, monkeypatch):
    """What find_device sets for this process is not there."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setitem(measure.USER_ENVIRONMENT, "SAY_THP", "1")
    monkeypatch.delitem(measure.USER_ENVIRONMENT, "THP_MEM_ALLOC_ENABLE", raising=False)
    with start_peer() as peer, pytest.raises(UserError, match="peer = nanoGPT failed: THP is not set"):
        peer.time_updates(2)


@pytest.mark.slow
def test_a_compiled_peer(start_peer):
    with start_peer(torch.bfloat16, True) as peer:
        assert len(peer.time_updates(2)) == 2
        assert peer.facts["machine"].endswith("bfloat16, compiled")


@pytest.mark.slow
def test_loading_is_timed_up_to_the_first_token(in_tmp, monkeypatch):
    """Two starts of infer.py, of which the first fills the page cache and does not count."""
    words = "infer --n_layer 2 --n_head 2 --n_embd 32 --context_length 64 --vocab_size 300 --rounds 1 --device cpu"
    config = cli.parse(BenchConfig, words.split())
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=iter([0, 50, 100, 103]).__next__))
    assert inference.load_to_first_token(GPT(config.model()), config) == 3
    assert not list(in_tmp.iterdir())
