"""benchmarks: what is made of measured figures, and how it is printed."""

import json
import re
import shlex

import pytest

import bench
from config import BenchConfig, UserError
from flatgpt.benchmarks import machine, measure, nanogpt, suites, training
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


def written(file, rows, dry_run=False) -> str:
    facts = {"cpu": "Xeon", "cores": 2, "cpu_flags": "amx_bf16", "read_gb_per_s": 27.5}
    report = {"command": "bench.py all", "torch": "2.13", "machine": facts, "rows": rows, "dry_run": dry_run}
    file.write_text(json.dumps(report))
    return str(file)


def test_merge_has_a_row_or_column_for_each_machine(in_tmp, capsys):
    """A row that one machine does not have is empty, and one that failed there has the error."""
    update = dict.fromkeys(suites.COLUMNS, 2.0) | {"mfu": None, "peers": {"nanoGPT": {"tokens_per_s": 10240.0}}}
    update |= {"ratios": {"nanoGPT": {"median": 2.0}}, "memory_ratios": {"nanoGPT": 0.5}}
    epyc = written(in_tmp / "EPYC.json", {"4 x 128": update, "text": {"error": "late"}})
    xeon = written(in_tmp / "Xeon.json", {"4 x 128": {"error": "late"}, "text": {"int8_tokens_per_s": 51.5}}, True)
    bench.main(cli.parse(BenchConfig, ["merge", "--input", epyc, xeon]))
    commands, *tables = capsys.readouterr().out.strip().split("\n\n")
    (names, _, *machines), (columns, _, ours, failed), text = (
        [re.split(r" *\| *", line)[1:-1] for line in table.splitlines()] for table in tables
    )
    assert re.fullmatch(r"- EPYC: `bench.py all`\n- Xeon: A dry run at toy size.*`bench.py all`", commands)
    assert names == ["machine", "cpu", "cores", "read_gb_per_s", "cpu_flags", "torch"], "no columns without a value"
    assert machines == [[name, "Xeon", "2", "27.5", "amx_bf16", "2.13"] for name in ("EPYC", "Xeon")]
    peers = [f"nanoGPT, {key}" for key in ("tokens_per_s", "times", "memory")]
    assert columns == ["shape", "machine", *(key for key in suites.COLUMNS if key != "mfu"), *peers, "error"]
    assert ours == ["4 x 128", "EPYC", *["2"] * 6, "10,240.0", "2", "0.5", ""]
    assert failed == ["4 x 128", "Xeon", *[""] * 9, "late"]
    assert text[0] == ["text", "EPYC", "Xeon"]
    assert text[2:] == [["error", "late", ""], ["int8_tokens_per_s", "", "51.5"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.json is not a result of bench\.py all"),
        ("[]", r"a\.json is not a result of bench\.py all"),
        ('{"command": "python bench.py train", "ms": 2}', r"a\.json is not a result of bench\.py all"),
        ('{"command": "c", "torch": "2", "dry_run": false, "rows": {"a": 1}}', r"a\.json is not a result"),
        ('{"command": "c", "torch": "2", "dry_run": false, "rows": {}}', "two files are named a,"),
        (None, "No such file"),
    ],
)
def test_files_that_cannot_be_merged_are_named(in_tmp, content, message):
    if content is not None:
        (in_tmp / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        bench.main(cli.parse(BenchConfig, ["merge", "--input", "a.json", "a.json"]))


def test_facts_of_the_machine(monkeypatch):
    monkeypatch.setattr(machine, "matmul_flops", lambda device, dtype: 3e11)
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 27.5)
    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    facts = machine.machine_facts()
    assert facts["float32_gflop_per_s"] == 300
    assert "bfloat16_gflop_per_s" not in facts, "far slower than float32, and of no use"
    assert facts["read_gb_per_s"] == 27.5
    assert facts["cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    assert facts.keys() | {"bfloat16_gflop_per_s"} >= set(suites.MACHINE_COLUMNS)


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
