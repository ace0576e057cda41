"""bench.py: its figures fit each other and come from train.py's own update."""

import json

import pytest
from conftest import TINY

import bench
import cli
import train
from config import BenchConfig, UserError


def test_figures_of_the_update(tiny_data, monkeypatch):
    calls = []
    real = bench.update
    assert real is train.update
    monkeypatch.setattr(bench, "update", lambda run, i: calls.append(i) or real(run, i))
    words = ["train", *TINY, "--warmup_updates", "2", "--timed_updates", "5", "--json", "figures.json"]
    bench.main(cli.parse(BenchConfig, words))
    figures = json.loads((tiny_data / "figures.json").read_text())
    assert calls == list(range(7))
    assert figures["ms_p10"] <= figures["ms"] <= figures["ms_p90"]
    assert figures["tokens_per_s"] == pytest.approx(4 * 32 / figures["ms"] * 1e3)
    # 2 layers, 32 wide, context 32: 24,576 in the blocks' matrices, 8,224 in the head, and vectors
    matrices = 2 * 12 * 32 * 32 + 257 * 32
    assert figures["tflop_per_s"] * 1e12 / figures["tokens_per_s"] == pytest.approx(
        6 * matrices + 12 * 2 * 32 * 32, rel=0.06
    )
    assert figures["mfu"] is None
    assert figures["peak_mem_gb"] > 0.01


def test_figures_alone_on_standard_output(tiny_data, capsys):
    words = ["train", *TINY, "--warmup_updates", "1", "--timed_updates", "2", "--json", "-"]
    bench.main(cli.parse(BenchConfig, words))
    assert json.loads(capsys.readouterr().out)["ms"] > 0


@pytest.mark.parametrize("words", [["--resume", "x"], ["--overwrite"], ["--wandb", "offline"]])
def test_what_only_a_run_has_is_refused(words):
    with pytest.raises(UserError, match=rf"^{words[0][2:]} belongs to train\.py"):
        cli.parse(BenchConfig, ["train", *words])


def test_figures_of_a_save(tiny_data):
    words = ["save", *TINY, "--warmup_updates", "1", "--timed_updates", "2", "--rounds", "2", "--json", "figures.json"]
    before = set(tiny_data.iterdir())
    bench.main(cli.parse(BenchConfig, words))
    figures = json.loads((tiny_data / "figures.json").read_text())
    assert figures["during_to_outside"] == pytest.approx(figures["ms_during"] / figures["ms_outside"])
    assert figures["updates_during"] >= 2
    assert 0 < figures["copy_ms"] < 1e3 * figures["save_s"] + figures["first_copy_ms"] + 1e3
    # weights, and two moments for each of them, in float32
    params = train.setup(cli.parse(BenchConfig, words)).model.num_params()
    assert 0 < figures["checkpoint_mb"] - 12e-6 * params < 0.1
    assert set(tiny_data.iterdir()) == before | {tiny_data / "figures.json"}, "the benchmark's checkpoints are gone"
