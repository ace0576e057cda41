"""suites.py: each row in a process of its own, what failed as an error line, the files written after each."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import make_dataset
from stand_in import nanogpt

import bench
import cli
import peer
import suites
from config import BenchConfig, UserError

# a bench.py that says what it was asked to do
FAKE = """
import json, os, sys
words = sys.argv[1:]
print("working", file=sys.stderr)
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
    monkeypatch.setattr(suites, "HOUSE", in_tmp / "house")
    return in_tmp


def run(monkeypatch, rows: tuple, *words) -> dict:
    monkeypatch.setattr(suites, "SUITES", {"all": rows})
    bench.main(cli.parse(BenchConfig, ["all", "--json", "all.json", *words]))
    return json.loads(Path("all.json").read_text())


def test_rows_that_fail_do_not_end_the_others(home, monkeypatch, capsys):
    rows = [
        ("one", "train ok", True),
        ("two", "train fail", True),
        ("three", "train die", True),
        ("four", "save ok", False),
    ]
    found = run(monkeypatch, tuple(rows), "--peer", "nanoGPT", str(nanogpt(home / "nanoGPT")))
    assert list(found["rows"]) == ["one", "two", "three", "four"]
    shared = ["--data_dir", "data", "--device", "cpu"]
    given = ["--peer", "nanoGPT", str(home / "nanoGPT")]
    assert found["rows"]["one"]["words"] == ["train", "ok", *shared, *given, "--json", "-"]
    assert found["rows"]["four"]["words"] == ["save", "ok", *shared, "--json", "-"]
    assert found["rows"]["two"] == {"error": "too large"}
    assert found["rows"]["three"] == {"error": "ended by signal 9 after: working"}
    assert found["torch"]
    text = (home / "all.md").read_text()
    assert "- two: error: too large\n" in text
    assert "- four: figure 1.50\n" in text
    printed = capsys.readouterr()
    assert printed.out == text
    assert "working" in printed.err


def test_files_are_written_after_each_row(home, monkeypatch):
    seen = []

    def row(words, say):
        files = [Path(name) for name in ("all.json", "all.md")]
        seen.append([file.read_text() if file.exists() else "" for file in files])
        if words[0] == "save":
            raise KeyboardInterrupt
        return UPDATES

    monkeypatch.setattr(suites, "run_row", row)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, (("one", "train", True), ("two", "save", False)))
    assert seen[0] == ["", ""]
    assert list(json.loads(seen[1][0])["rows"]) == ["one"]
    assert "| one |" in seen[1][1]


def test_rows_have_the_users_environment(home, monkeypatch):
    """What runtime.py sets for us would reach the peers below."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "7")
    monkeypatch.delitem(peer.ENVIRONMENT, "THP_MEM_ALLOC_ENABLE", raising=False)
    text = "import json, os\nprint(json.dumps({'thp': os.environ.get('THP_MEM_ALLOC_ENABLE')}))"
    (home / "house" / "bench.py").write_text(text)
    assert suites.run_row(["train"], print) == {"thp": None}


def test_table():
    found = {"command": "python bench.py gpu", "device": "NVIDIA H200", "torch": "2.11.0"}
    alone = {key: value for key, value in UPDATES.items() if key not in ("peers", "ratios", "memory_ratios")}
    loss = {"target": 1.47, "seconds": 20.0, "peers": {"nanoGPT": {"seconds": 90.0}}}
    loss["ratios"] = {"nanoGPT": {"median": 4.5}}
    found["rows"] = {"a": UPDATES, "b": alone | {"mfu": 0.5}, "c": loss, "d": {"target": 1.0, "seconds": None}}
    lines = suites.markdown(found).splitlines()
    assert lines[0] == "NVIDIA H200, torch 2.11.0: `python bench.py gpu`"
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == [
        *("a", "5.0", "25,600", "0.25", "", "12.5%", "1.25", "3.0", "10,240", "2.50", "50%")
    ]
    assert [cell.strip() for cell in lines[5].split("|")[1:-1]][4:] == ["50.0%", "12.5%", "1.25", "3.0", "", "", ""]
    assert {line.count("|") for line in lines[2:6]} == {12}
    assert "- c: 20.0 s, nanoGPT 90.0 s, 4.50 times as fast" in lines
    assert "- d: not reached" in lines


def test_missing_data_is_said_before_anything_runs(in_tmp, monkeypatch):
    make_dataset(in_tmp, "shakespeare")
    monkeypatch.setattr(suites, "run_row", lambda words, say: pytest.fail("it ran"))
    with pytest.raises(UserError, match=r"prepare_data\.py shakespeare --tokenizer byte$"):
        run(monkeypatch, (("one", "train", True),))


def test_a_gpu_has_to_be_there(home, monkeypatch):
    monkeypatch.setattr(suites.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"bench\.py gpu needs a GPU"):
        bench.main(cli.parse(BenchConfig, ["gpu", "--json", "gpu.json"]))
    assert not Path("gpu.json").exists()


@pytest.mark.parametrize(
    ("label", "words", "with_peer"),
    [row for rows in suites.SUITES.values() for row in rows],
    ids=lambda value: str(value)[:40],
)
def test_rows_are_commands_that_bench_takes(label, words, with_peer):
    given = ["--peer", "nanoGPT", "x"] if with_peer else []
    config = cli.parse(BenchConfig, [*shlex.split(words), *given])
    if with_peer:
        peer.require_same(config, 1)
    for letter, value in (("B", config.batch_size), ("T", config.context_length)):
        if f", {letter} " in label:
            assert f", {letter} {value:,}" in label
    assert config.dataset in suites.DATASETS or config.what in ("data", "infer")
    assert len({label for label, _, _ in suites.ALL}) == len(suites.ALL)
