"""bench.py: its figures fit each other and come from train.py's own update."""

import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from in_process import TINY
from stand_in import nanogpt

import bench
import train
from config import BenchConfig, UserError
from flatgpt.benchmarks import nanogpt as peer
from flatgpt.benchmarks import training
from flatgpt.cli import cli


def test_figures_of_the_update(tiny_data, monkeypatch):
    calls = []
    real = bench.update
    assert real is train.train_step
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
    assert figures["mfu_measured"] == pytest.approx(figures["tflop_per_s"] / figures["matmul_tflop_per_s"])
    assert figures["peak_mem_gb"] > 0.01
    assert figures["start_s"] > figures["first_ms"] / 1e3
    assert figures["command"].startswith("python bench.py ")
    assert not {"peers", "ratios", "top_ops"} & set(figures)


def test_figures_alone_on_standard_output(tiny_data, capsys):
    words = ["train", *TINY, "--warmup_updates", "1", "--timed_updates", "2", "--json", "-"]
    bench.main(cli.parse(BenchConfig, words))
    assert json.loads(capsys.readouterr().out)["ms"] > 0


@pytest.mark.parametrize("words", [["--resume", "x"], ["--overwrite"], ["--wandb", "offline"]])
def test_what_only_a_run_has_is_refused(words):
    with pytest.raises(UserError, match=rf"^{words[0][2:]} belongs to train\.py"):
        cli.parse(BenchConfig, ["train", *words])


def test_warm_up_is_apart_from_what_counts():
    figures = training.update_figures([900.0, 30.0, 10.0, 14.0], [4.0, 5.0, 6.0], 100, 7, 1e6, 5e5)
    assert (figures["first_ms"], figures["warmup_ms"], figures["ms"]) == (900, 14, 5)
    assert figures["tokens_per_s"] == 100 / 5e-3
    assert figures["mfu"] == pytest.approx(100 * 7 / 5e-3 / 1e6)
    assert figures["mfu_measured"] == pytest.approx(100 * 7 / 5e-3 / 5e5)
    assert (figures["ms_p10"], figures["ms_p90"]) == pytest.approx(tuple(np.percentile([4.0, 5.0, 6.0], (10, 90))))
    alone = training.update_figures([900.0], [4.0, 5.0], 100, 7, None, 5e5)
    assert (alone["warmup_ms"], alone["mfu"]) == (None, None)


class Slow:
    """Stands for peer.Peer: each update takes five seconds, or so it says."""

    log: list = []  # noqa: RUF012 - each test has its own

    def __init__(self, name, config, how):
        assert config.vocab_size == 257  # resolved
        self.name, self.asked = name, 0
        self.facts = {"start_s": 2.0, "peak_mem_gb": 1e3, "machine": f"{how.dtype}"}

    def ask(self, updates):
        self.asked = updates
        self.log.append((self.name, updates))

    def answer(self):
        return [5e3] * self.asked

    def run(self, updates):
        self.ask(updates)
        return self.answer()

    def close(self):
        if (self.name, "closed") not in self.log:
            self.log.append((self.name, "closed"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


@pytest.fixture
def beside(tiny_data, monkeypatch):
    """Words for a benchmark beside a slow peer; and what happens, in order."""
    log, real = [], bench.update
    monkeypatch.setattr(Slow, "log", log)
    monkeypatch.setattr(peer, "Peer", Slow)
    monkeypatch.setattr(bench, "update", lambda run, i: log.append(("ours", i)) or real(run, i))
    words = ["train", *TINY, "--warmup_updates", "2", "--timed_updates", "3", "--rounds", "2"]
    return [*words, "--peer", "nanoGPT", str(nanogpt(tiny_data / "nanoGPT")), "--json", "figures.json"], log


def test_peers_take_turns_with_us(beside, tiny_data, capsys):
    words, log = beside
    bench.main(cli.parse(BenchConfig, words))
    figures = json.loads((tiny_data / "figures.json").read_text())
    peers, turns, made = ("nanoGPT", "nanoGPT_best"), [("ours", 0), ("ours", 1)], 2
    for name in peers:  # one after the other: the first has gone when the second comes
        turns.append((name, 2))
        for _ in range(2):
            turns += [*(("ours", i) for i in range(made, made + 3)), (name, 3)]
            made += 3
        turns.append((name, "closed"))
    assert log == turns
    assert set(figures["peers"]) == set(peers)
    for name in peers:
        theirs = figures["peers"][name]
        assert (theirs["ms"], theirs["first_ms"], theirs["start_s"]) == (5000, 5000, 2)
        assert theirs["tokens_per_s"] == 4 * 32 / 5
        ratio = figures["ratios"][name]
        assert len(ratio["rounds"]) == 2
        assert ratio["median"] == pytest.approx(statistics.median(ratio["rounds"]))
        assert min(ratio["rounds"]) > 1
        assert 5000 / figures["ms_p90"] / 1.5 < ratio["median"] < 5000 / figures["ms_p10"] * 1.5
        assert figures["memory_ratios"][name] == pytest.approx(figures["peak_mem_gb"] / 1e3)
    printed = capsys.readouterr()
    head, *rows = printed.out.splitlines()
    assert head.split() == ["ours", "nanoGPT", "nanoGPT_best"]
    fast = next(row for row in rows if row.startswith("times as fast"))
    assert fast.split()[3:] == [f"{figures['ratios'][name]['median']:.2f}" for name in peers]
    assert printed.err.count("times as fast") == 4
    assert "nanoGPT: torch.float32" in rows


def test_what_a_peer_lacks_is_said_before_the_first_update(beside):
    words, log = beside
    with pytest.raises(UserError, match="position = rope"):
        bench.main(cli.parse(BenchConfig, [*words, "--position", "rope"]))
    shutil.rmtree("nanoGPT")
    with pytest.raises(UserError, match=r"no model\.py"):
        bench.main(cli.parse(BenchConfig, words))
    assert log == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--peer", "nanoGPT"], "--peer nanoGPT PATH is expected"),
        (["train", "--peer", "nanogpt", "x"], "peer = nanogpt x"),
        (["train", "--peer", "nanoGPT", "x", "y"], "peer = nanoGPT x y"),
        (["save", "--peer", "nanoGPT", "x"], "peer belongs to .* not to save"),
        (["infer", "--profile"], "profile belongs to .* not to infer"),
        (["train", "--target", "2"], "target belongs to .* not to train"),
        (["loss"], "--target X"),
        (["all", "--json", "x", "--dry_run"], "dry_run belongs to .* gpu, not to all"),
        (["train", "--variants", "int8"], "variants belongs to .* infer, not to train"),
        (["resume", "--max_iters", "1"], "--max_iters N, 2 or more"),
        (["resume", "--epochs", "1"], "--max_iters N, 2 or more"),
        (["all"], "--json FILE"),
        (["gpu", "--json", "-"], "--json FILE"),
        (["all", "--json", "x", "--timed_updates", "3"], "timed_updates: the rows"),
    ],
)
def test_words_that_do_not_fit(words, said):
    with pytest.raises(UserError, match=said):
        cli.parse(BenchConfig, words)


def test_profile(tiny_data, capsys):
    words = ["train", *TINY, "--warmup_updates", "1", "--timed_updates", "2", "--profile", "--json", "figures.json"]
    bench.main(cli.parse(BenchConfig, words))
    ops = json.loads((tiny_data / "figures.json").read_text())["top_ops"]
    assert len(ops) == 10
    assert [op["self_ms"] for op in ops] == sorted((op["self_ms"] for op in ops), reverse=True)
    assert 0.3 < sum(op["share"] for op in ops) <= 1
    events = [event["name"] for event in json.loads((tiny_data / "trace.json").read_text())["traceEvents"]]
    assert {op["name"] for op in ops} <= set(events)
    assert events.count("Optimizer.step#AdamW.step") == training.PROFILED
    assert ops[9]["name"] in capsys.readouterr().out


@pytest.mark.parametrize("key", ["profile", "json"])
def test_what_cannot_be_written_is_found_before_the_work(in_tmp, key):
    with pytest.raises(UserError, match=f"{key} = no/file"):  # else: that there is no dataset
        bench.main(cli.parse(BenchConfig, ["train", *TINY, f"--{key}", "no/file"]))


def test_shares_are_of_all_operations():
    a = torch.ones(300, 300)
    ops = training.top_ops(lambda: [a @ a for _ in range(4)], torch.device("cpu"), None)
    assert {op["name"]: op["calls"] for op in ops}["aten::mm"] == 4
    assert sum(op["share"] for op in ops) == pytest.approx(1)  # so few that all are among the ten


def test_figures_of_a_save(tiny_data):
    words = ["save", *TINY, "--warmup_updates", "1", "--timed_updates", "2", "--rounds", "2", "--json", "figures.json"]
    before = set(tiny_data.iterdir())
    bench.main(cli.parse(BenchConfig, words))
    figures = json.loads((tiny_data / "figures.json").read_text())
    assert figures["during_to_outside"] == pytest.approx(figures["ms_during"] / figures["ms_outside"])
    assert figures["updates_during"] >= 2
    assert 0 < figures["copy_ms"] < 1e3 * figures["save_s"] + figures["first_copy_ms"] + 1e3
    # weights, and two moments for each of them, in float32
    params = train.build_run(cli.parse(BenchConfig, words)).model.num_params()
    assert 0 < figures["checkpoint_mb"] - 12e-6 * params < 0.1
    assert set(tiny_data.iterdir()) == before | {tiny_data / "figures.json"}, "the benchmark's checkpoints are gone"
