"""benchmarks: what is made of measured figures, and how it is printed."""

import re
import shlex

import pytest

from config import BenchConfig
from flatgpt.benchmarks import measure, nanogpt, suites, training
from flatgpt.cli import cli
from flatgpt.runs.run_log import format_row


def test_runners_take_turns_and_ratios_are_those_of_the_rounds(capsys):
    order = []
    runners = {name: lambda name=name: order.append(name) or len(order) for name in ("a", "b")}
    assert measure.interleave(runners, 2) == {"a": [1, 3], "b": [2, 4]}
    assert order == ["a", "b", "a", "b"]
    assert capsys.readouterr().err.splitlines()[3].startswith("round 2 of 2, b: ")
    assert measure.speedup([2.0, 2.0, 1.0], [2.0, 6.0, 2.0]) == {"median": 2.0, "rounds": [1.0, 3.0, 2.0]}


def test_figures_are_a_table_with_a_column_for_each_peer():
    found = {"command": "python bench.py", "ms": 1234.5, "mfu": None, "runs": [{"seed": 1, "seconds": 2.5}]}
    found |= {"peers": {"nanoGPT": {"ms": 0.25, "machine": "cpu"}}, "ratios": {"nanoGPT": {"rounds": [1.5, 2.0]}}}
    lines = measure.figure_lines(found)
    cells = [re.split(r" *\| *", line)[1:-1] for line in lines[:5]]
    assert cells[0] == ["", "ours", "nanoGPT"]
    assert cells[2:] == [
        ["ms", "1,234.5", "0.25"],
        ["runs 1", "seed 1, seconds 2.5", ""],
        ["ratios", "", "rounds 1.5 2"],
    ]
    assert lines[5:] == ["ours, command: python bench.py", "nanoGPT, machine: cpu"]


def test_table_of_a_suite():
    row = dict.fromkeys(suites.COLUMNS, 2.0) | {"mfu": None, "peers": {"nanoGPT": {"tokens_per_s": 10240.0}}}
    row |= {"ratios": {"nanoGPT": {"median": 2.5, "rounds": []}}, "memory_ratios": {"nanoGPT": 0.5}}
    rows = {"a": row, "b": dict.fromkeys(suites.COLUMNS, 3.0), "c": {"error": "late", "failed": 1, "machine": "cpu"}}
    found = {"command": "bench.py gpu", "device": "H200", "torch": "2.11", "dry_run": True, "rows": rows}
    title, _, *table, _, last = suites.markdown(found).splitlines()
    assert re.match("A dry run at toy size.* H200, torch 2.11: `bench.py gpu`$", title)
    cells = [re.split(r" *\| *", line)[1:-1] for line in table]
    assert cells[0] == ["shape", *suites.COLUMNS, *(f"nanoGPT, {key}" for key in ("tokens_per_s", "times", "memory"))]
    assert cells[2] == ["a", "2", "2", "2", "", "2", "2", "2", "10,240.0", "2.5", "0.5"]
    assert cells[3] == ["b", *["3"] * 7, "", "", ""]
    assert last == "- c: error late, failed 1"


@pytest.mark.parametrize("row", suites.SUITES["all"] + suites.SUITES["gpu"], ids=lambda row: row["label"])
def test_rows_are_commands_that_bench_takes(row):
    config = cli.parse(BenchConfig, [*shlex.split(row["args"]), *["--peer", "nanoGPT", "x"] * ("peer" in row)])
    if "peer" in row:
        nanogpt.require_same_shape(config, 1)
    for letter, value in (("B", config.batch_size), ("T", config.context_length)):
        if f", {letter} " in row["label"]:
            assert f", {letter} {value:,}" in row["label"]
    assert config.dataset in suites.DATASETS or config.what in ("data", "infer", "tests")
    assert sum(row["limit"] for row in suites.SUITES["gpu"]) <= 600


def test_lines_of_our_log_are_understood():
    row = {"iter": 250, "train_loss": 1.5, "val_loss": 1.8858, "lr": 1e-3, "grad_norm": 0.5, "step_ms": 12.0}
    assert training.re.match(training.EVAL_LINE, format_row(row)).groups() == ("250", "1.8858")
    assert not training.re.match(training.EVAL_LINE, format_row({**row, "val_loss": None}))
