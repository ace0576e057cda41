"""suites.py: each row in a process of its own, what failed as an error line, the files written after each."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from in_process import make_dataset
from processes import command
from stand_in import nanogpt

import bench
from config import BenchConfig, UserError
from flatgpt.benchmarks import nanogpt as peer
from flatgpt.benchmarks import suites
from flatgpt.benchmarks.suites import Row
from flatgpt.cli import cli

# a bench.py that says what it was asked to do
FAKE = """
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
print(json.dumps({"words": words, "figure": 1.5}))
"""
UPDATES = {
    **{"ms": 5.0, "tokens_per_s": 25600.0, "tflop_per_s": 0.25, "mfu": None, "mfu_measured": 0.125, "start_s": 3.0},
    **{"peak_mem_gb": 1.25, "machine": "NVIDIA H200, bfloat16, compiled", "ratios": {"nanoGPT": {"median": 2.5}}},
    **{"peers": {"nanoGPT": {"tokens_per_s": 10240.0}}, "memory_ratios": {"nanoGPT": 0.5}},
}


@pytest.fixture
def home(in_tmp, monkeypatch):
    """A folder with the datasets that rows want, and a bench.py that is FAKE."""
    for name in suites.DATASETS:
        make_dataset(in_tmp, name)
    (in_tmp / "house").mkdir()
    (in_tmp / "house" / "bench.py").write_text(FAKE)
    monkeypatch.setattr(suites, "REPO_ROOT", in_tmp / "house")
    return in_tmp


def run(monkeypatch, rows: list, *words) -> dict:
    monkeypatch.setattr(suites, "SUITES", {"all": rows})
    bench.main(cli.parse(BenchConfig, ["all", "--json", "all.json", *words]))
    return json.loads(Path("all.json").read_text())


def test_rows_that_fail_do_not_end_the_others(home, monkeypatch, capsys):
    rows = [
        Row("one", "train ok", peer=True),
        Row("two", "train fail", peer=True),
        Row("three", "train die", peer=True),
        Row("four", "save ok"),
    ]
    found = run(monkeypatch, rows, "--peer", "nanoGPT", str(nanogpt(home / "nanoGPT")))
    assert list(found["rows"]) == ["one", "two", "three", "four"]
    shared = ["--data_dir", "data", "--device", "cpu"]
    given = ["--peer", "nanoGPT", str(home / "nanoGPT")]
    assert found["rows"]["one"]["words"] == ["train", "ok", *shared, *given, "--json", "-"]
    assert found["rows"]["four"]["words"] == ["save", "ok", *shared, "--json", "-"]
    assert all(row.pop("seconds") > 0 for row in found["rows"].values())
    assert found["rows"]["two"] == {"error": "too large"}
    assert found["rows"]["three"] == {"error": "ended by signal 9 after: working"}
    assert found["torch"]
    text = (home / "all.md").read_text()
    assert "- two: error: too large, seconds" in text
    assert "- four: words save ok --data_dir data --device cpu --json -, figure 1.50, seconds" in text
    printed = capsys.readouterr()
    assert printed.out == text
    assert "working" in printed.err


def test_files_are_written_after_each_row(home, monkeypatch):
    """Also if a signal ends the list: SIGTERM acts as Ctrl-C does."""
    seen = []

    def row(words, limit, say):
        files = [Path(name) for name in ("all.json", "all.md")]
        seen.append([file.read_text() if file.exists() else "" for file in files])
        if words[0] == "save":
            os.kill(os.getpid(), signal.SIGTERM)
        return UPDATES

    def missed(*words):
        pytest.fail("the signal was not handled")

    before = signal.signal(signal.SIGTERM, missed)
    try:
        monkeypatch.setattr(suites, "run_row", row)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, [Row("one", "train"), Row("two", "save")])
        assert signal.getsignal(signal.SIGTERM) is missed
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen[0] == ["", ""]
    assert list(json.loads(seen[1][0])["rows"]) == ["one"]
    assert "| one |" in seen[1][1]


def test_rows_have_the_users_environment(home, monkeypatch):
    """What runtime.py sets for us would reach the peers below."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "7")
    monkeypatch.delitem(peer.ENVIRONMENT, "THP_MEM_ALLOC_ENABLE", raising=False)
    text = "import json, os\nprint(json.dumps({'thp': os.environ.get('THP_MEM_ALLOC_ENABLE')}))"
    (home / "house" / "bench.py").write_text(text)
    assert suites.run_row(["train"], 60, print) == {"thp": None}


def test_table():
    found = {"command": "python bench.py gpu", "device": "NVIDIA H200", "torch": "2.11.0"}
    alone = {key: value for key, value in UPDATES.items() if key not in ("peers", "ratios", "memory_ratios")}
    tests = {"passed": 40, "failed": 1, "failed_tests": ["a.py::b"], "complete": False, "error": "late"}
    found["rows"] = {"a": UPDATES, "b": alone | {"mfu": 0.5}, "c": tests}
    lines = suites.markdown(found).splitlines()
    assert lines[0] == "NVIDIA H200, torch 2.11.0: `python bench.py gpu`"
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == [
        *("a", "5.0", "25,600", "0.25", "", "12.5%", "1.25", "3.0", "10,240", "2.50", "50%")
    ]
    assert [cell.strip() for cell in lines[5].split("|")[1:-1]][4:] == ["50.0%", "12.5%", "1.25", "3.0", "", "", ""]
    assert {line.count("|") for line in lines[2:6]} == {12}
    assert lines[-1] == "- c: error: late, passed 40, failed 1, failed_tests a.py::b, complete false"
    assert suites.markdown(found | {"dry_run": True}).startswith("A dry run at toy size")


def test_missing_data_is_said_before_anything_runs(in_tmp, monkeypatch):
    make_dataset(in_tmp, "shakespeare")
    monkeypatch.setattr(suites, "run_row", lambda *words: pytest.fail("it ran"))
    with pytest.raises(UserError, match=r"prepare_data\.py shakespeare --tokenizer byte$"):
        run(monkeypatch, [Row("one", "train")])


def test_a_gpu_has_to_be_there(home, monkeypatch):
    monkeypatch.setattr(suites.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"bench\.py gpu needs a GPU"):
        bench.main(cli.parse(BenchConfig, ["gpu", "--json", "gpu.json"]))
    assert not Path("gpu.json").exists()


@pytest.mark.parametrize("row", [row for rows in suites.SUITES.values() for row in rows], ids=lambda row: row.label)
def test_rows_are_commands_that_bench_takes(row):
    given = ["--peer", "nanoGPT", "x"] if row.peer else []
    config = cli.parse(BenchConfig, [*shlex.split(row.words), *given])
    if row.peer:
        peer.require_same(config, 1)
    for letter, value in (("B", config.batch_size), ("T", config.context_length)):
        if f", {letter} " in row.label:
            assert f", {letter} {value:,}" in row.label
    assert config.dataset in suites.DATASETS or config.what in ("data", "infer", "tests")


def test_lists_fit_their_files_and_their_time():
    for rows in suites.SUITES.values():
        assert len({row.label for row in rows}) == len(rows)
    assert sum(row.limit for row in suites.GPU) <= 600


@pytest.fixture
def stopped(home, monkeypatch):
    """run_row on a process that hangs and has a child that ignores SIGINT; `error` is raised once both have started."""

    def run(error: type, *words: str) -> dict:
        ready, real = threading.Event(), subprocess.Popen.wait

        def wait(process, timeout=None):
            if timeout != 77:
                return real(process, timeout)
            assert ready.wait(60)
            raise error(process.args, timeout) if error is subprocess.TimeoutExpired else error

        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        return suites.run_row(["hang", *words], 77, lambda line: ready.set() if line.strip() == "ready" else None)

    return run


def no_child() -> bool:
    with open("lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the child has it
    return True


def test_a_row_over_its_limit_is_ended_with_its_children(stopped):
    """It is interrupted as by Ctrl-C; what it still writes to standard output is kept."""
    found = stopped(subprocess.TimeoutExpired, "until told")
    assert found == {"error": "ended after its limit of 77 s: ready", "figure": 2.5}
    assert no_child()


def test_a_row_that_does_not_end_is_killed(stopped, monkeypatch):
    monkeypatch.setattr(suites, "GRACE", 0.2)
    assert stopped(subprocess.TimeoutExpired, "for good")["error"] == "ended after its limit of 77 s: ready"
    assert no_child()


def test_ctrl_c_ends_the_row_with_its_children(stopped):
    with pytest.raises(KeyboardInterrupt):
        stopped(KeyboardInterrupt, "until told")
    assert no_child()


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
