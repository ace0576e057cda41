"""checks.py: test outcomes are counted, and a resumed run that differs from the uninterrupted one is an error."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import TINY
from processes import ROOT
from safetensors.torch import save_file

import bench
from config import BenchConfig, UserError
from flatgpt.benchmarks import checks
from flatgpt.benchmarks.checks import difference
from flatgpt.cli import cli

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
    """In a process of its own that takes the device for CUDA. SIGINT is what ends a row at its time limit."""
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


@pytest.mark.parametrize("package", ["pytest", "pytest-timeout", "hypothesis"])
def test_a_missing_package_is_one_error_line(monkeypatch, package):
    real = importlib.util.find_spec
    missing = package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(UserError, match=f"^bench.py tests: {package} is not installed: pip install"):
        bench.main(cli.parse(BenchConfig, ["tests", "--device", "cpu"]))


# ---------------------------------------------------------------------------------------------------------------------
# resuming


def make_run(folder: Path, losses: list[float], weight: float = 1.0, ms: float = 5.0) -> Path:
    (folder / "ckpt" / "last").mkdir(parents=True)
    lines = [f"{i},{loss},{ms}\n" for i, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("iter,train_loss,step_ms\n" + "".join(lines))
    weights = {"a": torch.ones(3), "b": torch.tensor([weight])}
    save_file(weights, folder / "ckpt" / "last" / "model.safetensors")
    return folder


def test_difference_of_runs(tmp_path):
    one = make_run(tmp_path / "one", [3.0, 2.0], ms=4.0)
    assert difference(one, make_run(tmp_path / "same", [3.0, 2.0])) is None
    other = make_run(tmp_path / "loss", [3.0, 2.5])
    assert difference(one, other) == "metrics.csv has train_loss = 2.0 and 2.5 at iter 1 and 1"
    assert difference(one, make_run(tmp_path / "short", [3.0])) == "metrics.csv has 2 and 1 rows"
    other = make_run(tmp_path / "weight", [3.0, 2.0], weight=1.25)
    assert difference(one, other) == "1 of 2 tensors differ, by at most 0.25; the first is b"


# A train.py whose losses depend on the update and, if a file `wrong` exists, on whether it was resumed.
FAKE = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
value = lambda key: words[words.index(key) + 1]
with open(Path(__file__).with_name("words.jsonl"), "a") as file:
    file.write(json.dumps(words) + "\\n")
if Path(value("--config")).read_text().count("n_layer = 7"):
    sys.exit("error: too deep")
out, wrong = Path(value("--out_dir")), Path(__file__).with_name("wrong").exists() and "--resume" in words
(out / "ckpt" / "last").mkdir(parents=True, exist_ok=True)
rows = [f"{i},{10 - i + 0.001 * wrong}" for i in range(int(value("--max_iters")) + 1)]
(out / "metrics.csv").write_text("\\n".join(["iter,train_loss", *rows]))
header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
(out / "ckpt/last/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
"""


@pytest.fixture
def fake(in_tmp, monkeypatch):
    """A function that runs bench.py resume on FAKE; and the folder that FAKE is in."""
    (in_tmp / "house").mkdir()
    (in_tmp / "house" / "train.py").write_text(FAKE)
    monkeypatch.setattr(checks, "REPO_ROOT", in_tmp / "house")

    def run(*words: str) -> dict:
        bench.main(cli.parse(BenchConfig, ["resume", *TINY, "--max_iters", "9", *words, "--json", "figures.json"]))
        return json.loads((in_tmp / "figures.json").read_text())

    return run, in_tmp / "house"


def test_one_run_stops_and_resumes_and_the_other_does_not(fake):
    run, house = fake
    figures = run("--dropout", "0.25")
    assert (figures["updates"], figures["identical"]) == (9, True)
    assert min(figures[f"{run}_s"] for run in ("stopped", "resumed", "uninterrupted")) > 0
    first, second, third = map(json.loads, (house / "words.jsonl").read_text().splitlines())
    assert first[-2:] == ["--max_iters", "4"]
    assert second[-3:] == ["--max_iters", "9", "--resume"]
    assert third[-2:] == ["--max_iters", "9"]
    folders = [words[words.index("--out_dir") + 1] for words in (first, second, third)]
    assert folders[0] == folders[1] != folders[2]
    for words in (first, second, third):  # one schedule; a checkpoint where the first run ends; all losses
        assert words[words.index("--lr_decay_iters") + 1] == "9"
        assert words[words.index("--eval_interval") + 1] == "4"
        assert words[words.index("--log_interval") + 1] == "1"
    assert not Path(folders[0]).exists()


def test_a_resumed_run_that_differs_is_an_error(fake):
    run, house = fake
    (house / "wrong").touch()
    with pytest.raises(UserError, match=r"the uninterrupted one: metrics.csv has train_loss = 10.001 and 10.0 at"):
        run()


def test_a_run_that_fails_says_why(fake):
    run, _ = fake
    with pytest.raises(UserError, match=r"train.py --config .* failed: too deep$"):
        run("--n_layer", "7")
