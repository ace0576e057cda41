"""benchmarks: what is made of measured times, and how it is printed."""

import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import make_dataset
from safetensors.torch import save_file
from stand_in import nanogpt_checkout

import bench
from config import BenchConfig, UserError
from flatgpt.benchmarks import measure, nanogpt, suites, time_to_loss, training
from flatgpt.benchmarks.checks import difference
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.runs.run_log import format_row

UPDATES = {
    **{"ms": 5.0, "tokens_per_s": 25600.0, "tflop_per_s": 0.25, "mfu": None, "mfu_measured": 0.125, "start_s": 3.0},
    **{"peak_mem_gb": 1.25, "machine": "NVIDIA H200, bfloat16, compiled", "ratios": {"nanoGPT": {"median": 2.5}}},
    **{"peers": {"nanoGPT": {"tokens_per_s": 10240.0}}, "memory_ratios": {"nanoGPT": 0.5}},
}


def test_runners_take_turns(capsys):
    order = []
    runners = {name: lambda n, name=name: order.append(f"{name}{n}") or 2 * n for name in ("a", "b")}
    results = measure.in_turn(runners, 2, lambda name, latest: f"is {latest[name]} of {len(latest)}")
    assert order == ["a1", "b1", "a2", "b2"]
    assert results == {"a": [2, 4], "b": [2, 4]}
    assert capsys.readouterr().err.splitlines()[1::2] == ["round 1 b is 2 of 2", "round 2 b is 4 of 2"]
    assert measure.speedup([2.0, 2.0, 1.0], [2.0, 6.0, 2.0]) == {"median": 2.0, "rounds": [1.0, 3.0, 2.0]}


def test_failed_commands_are_reported_with_their_last_line():
    assert str(measure.failure(["python", "a b.py"], "x\nerror: y\n", 2)) == "'a b.py' failed: y"
    assert str(measure.failure("peer", "", 7)) == "peer failed: exit code 7"


def test_warm_up_is_apart_from_what_counts():
    figures = training.update_figures([900.0, 30.0, 10.0, 14.0], [4.0, 5.0, 6.0], 100, 7, 1e6, 5e5)
    assert (figures["first_ms"], figures["warmup_ms"], figures["ms"]) == (900, 14, 5)
    assert figures["tokens_per_s"] == 100 / 5e-3
    assert figures["mfu"] == pytest.approx(100 * 7 / 5e-3 / 1e6)
    assert figures["mfu_measured"] == pytest.approx(100 * 7 / 5e-3 / 5e5)
    assert [figures["ms_p10"], figures["ms_p90"]] == pytest.approx(np.percentile([4.0, 5.0, 6.0], (10, 90)).tolist())
    alone = training.update_figures([900.0], [4.0, 5.0], 100, 7, None, 5e5)
    assert (alone["warmup_ms"], alone["mfu"]) == (None, None)


def test_shares_are_of_all_operations():
    a = torch.ones(300, 300)
    ops = training.top_ops(lambda: [a @ a for _ in range(4)], torch.device("cpu"), None)
    assert {op["name"]: op["calls"] for op in ops}["aten::mm"] == 4
    assert sum(op["share"] for op in ops) == pytest.approx(1)  # so few that all are among the ten


# ---------------------------------------------------------------------------------------------------------------------
# resumed runs


def make_run(folder: Path, losses: list[float], weight: float = 1.0, ms: float = 5.0) -> Path:
    (folder / "ckpt" / "last").mkdir(parents=True)
    lines = [f"{i},{loss},{ms}\n" for i, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("iter,train_loss,step_ms\n" + "".join(lines))
    weights = {"a": torch.ones(3), "b": torch.tensor([weight])}
    save_file(weights, folder / "ckpt" / "last" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("losses", "weight", "found"),
    [
        ([3.0, 2.0], 1.0, None),
        ([3.0, 2.5], 1.0, "metrics.csv has train_loss = 2.0 and 2.5 at iter 1 and 1"),
        ([3.0], 1.0, "metrics.csv has 2 and 1 rows"),
        ([3.0, 2.0], 1.25, "1 of 2 tensors differ, by at most 0.25; the first is b"),
    ],
)
def test_difference_of_runs(tmp_path, losses, weight, found):
    one = make_run(tmp_path / "one", [3.0, 2.0], ms=4.0)
    assert difference(one, make_run(tmp_path / "other", losses, weight)) == found


# ---------------------------------------------------------------------------------------------------------------------
# time to a loss


def test_lines_of_our_log_are_understood():
    row = {"iter": 250, "train_loss": 1.5, "val_loss": 1.8858, "lr": 1e-3, "grad_norm": 0.5, "step_ms": 12.0}
    match = time_to_loss.re.match(time_to_loss.OURS, format_row(row))
    assert (match[1], match[2]) == ("250", "1.8858")
    assert not time_to_loss.re.match(time_to_loss.OURS, format_row({**row, "val_loss": None}))


def test_nanogpt_trains_on_our_ids(tiny_data):
    dataset, checkout = open_dataset(Path("data/tiny")), nanogpt_checkout(tiny_data / "nanoGPT")
    folder = time_to_loss.nanogpt_folder(tiny_data / "folder", checkout, dataset)
    val = dataset.tokens("val")
    assert (folder / "data" / "shakespeare_char" / "val.bin").read_bytes() == val[0 : len(val)].astype("<u2").tobytes()
    assert (folder / "train.py").read_text() == (checkout / "train.py").read_text()


def test_table_of_losses():
    runs = [{"seed": 1, "seconds": 2.5, "iter": 10, "val_loss": 1.5}, dict.fromkeys(("seconds", "iter", "val_loss"))]
    runs[1]["seed"] = 2
    found = {"target": 2.0, "runs": runs, "seconds": math.inf, "machine": "cpu", "torch": "2.13"}
    head, first, second, median, end = time_to_loss.loss_table(found)
    assert head.startswith("seconds to a validation loss of 2")
    assert first.endswith("2.5 s, iter     10, val 1.5000")
    assert second.endswith("not reached, no evaluation")
    assert (median.split(maxsplit=1)[1], end) == ("not reached", "cpu, torch 2.13")


# ---------------------------------------------------------------------------------------------------------------------
# suites


def test_table_of_a_suite():
    found = {"command": "python bench.py gpu", "device": "NVIDIA H200", "torch": "2.11.0"}
    alone = {key: value for key, value in UPDATES.items() if key not in ("peers", "ratios", "memory_ratios")}
    tests = {"passed": 40, "failed": 1, "failed_tests": ["a.py::b"], "complete": False, "error": "late", "mb": 1.5}
    found["rows"] = {"a": UPDATES, "b": alone | {"mfu": 0.5}, "c": tests}
    lines = suites.markdown(found).splitlines()
    assert lines[0] == "NVIDIA H200, torch 2.11.0: `python bench.py gpu`"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert cells[2] == ["a", "5.00", "25,600", "0.250", "", "12.5%", "1.25", "3.0", "10,240", "2.50", "50%"]
    assert cells[3] == ["b", "5.00", "25,600", "0.250", "50.0%", "12.5%", "1.25", "3.0", "", "", ""]
    assert {len(row) for row in cells} == {11}
    assert lines[-1] == "- c: error: late, passed 40, failed 1, failed_tests a.py::b, complete false, mb 1.50"
    assert suites.markdown(found | {"dry_run": True}).startswith("A dry run at toy size")


def test_missing_data_and_devices_are_reported_before_anything_runs(in_tmp, monkeypatch):
    monkeypatch.setattr(suites, "run_row", lambda *words: pytest.fail("it ran"))
    monkeypatch.setattr(suites.torch.cuda, "is_available", lambda: False)
    make_dataset(in_tmp, "shakespeare")
    for what, message in (("all", r"prepare_data\.py shakespeare --tokenizer byte$"), ("gpu", "needs a GPU")):
        with pytest.raises(UserError, match=message):
            bench.main(cli.parse(BenchConfig, [what, "--json", "a.json"]))
    assert not Path("a.json").exists()


@pytest.mark.parametrize("row", [*suites.ALL, *suites.GPU], ids=lambda row: row.label)
def test_rows_are_commands_that_bench_takes(row):
    config = cli.parse(BenchConfig, [*shlex.split(row.words), *(["--peer", "nanoGPT", "x"] if row.peer else [])])
    if row.peer:
        nanogpt.require_same_shape(config, 1)
    for letter, value in (("B", config.batch_size), ("T", config.context_length)):
        if f", {letter} " in row.label:
            assert f", {letter} {value:,}" in row.label
    assert config.dataset in suites.DATASETS or config.what in ("data", "infer", "tests")


def test_labels_are_unique_and_a_gpu_is_held_for_ten_minutes():
    for rows in suites.SUITES.values():
        assert len({row.label for row in rows}) == len(rows)
    assert sum(row.limit for row in suites.GPU) <= 600
