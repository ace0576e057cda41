"""bench.py: its figures fit each other and come from train.py's own update; what cannot be timed is refused."""

import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
from pathlib import Path

import pytest
import torch
from in_process import TINY, make_dataset
from stand_in import nanogpt_checkout

import bench
import train
from config import BenchConfig, UserError
from flatgpt.benchmarks import nanogpt, suites, training
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.training.setup import build_run


def run(*words) -> dict:
    """The figures that bench.py writes."""
    bench.main(cli.parse(BenchConfig, [*map(str, words), "--json", "figures.json"]))
    return json.loads(Path("figures.json").read_text())


def test_figures_of_the_update(tiny_data, monkeypatch):
    iters, real = [], bench.train_step
    assert real is train.train_step
    monkeypatch.setattr(bench, "train_step", lambda run, i: iters.append(i) or real(run, i))
    figures = run("train", *TINY, "--warmup_updates", 2, "--timed_updates", 5)
    assert iters == list(range(7))
    assert figures["ms_p10"] <= figures["ms"] <= figures["ms_p90"]
    assert figures["tokens_per_s"] == pytest.approx(4 * 32 / figures["ms"] * 1e3)
    # 2 layers, 32 wide, context 32: 24,576 in the blocks' matrices, 8,224 in the head, and vectors
    matrices = 2 * 12 * 32 * 32 + 257 * 32
    flops_per_token = figures["tflop_per_s"] * 1e12 / figures["tokens_per_s"]
    assert flops_per_token == pytest.approx(6 * matrices + 12 * 2 * 32 * 32, rel=0.06)
    assert figures["mfu"] is None
    assert figures["mfu_measured"] == pytest.approx(figures["tflop_per_s"] / figures["matmul_tflop_per_s"])
    assert figures["peak_mem_gb"] > 0.01
    assert figures["start_s"] > figures["first_ms"] / 1e3
    assert figures["command"].startswith("python bench.py ")
    assert figures["torch"] == torch.__version__
    assert not {"peers", "ratios", "top_ops"} & set(figures)


def test_figures_alone_on_standard_output(tiny_data, capsys):
    words = ["train", *TINY, "--warmup_updates", "1", "--timed_updates", "2", "--json", "-"]
    bench.main(cli.parse(BenchConfig, words))
    assert json.loads(capsys.readouterr().out)["ms"] > 0


class SlowPeer:
    """Stands for nanogpt.Peer; each of its updates takes five seconds."""

    log: list = []  # noqa: RUF012 - each test has its own

    def __init__(self, name, config, settings):
        assert config.vocab_size == 257  # resolved
        self.name, self.requested = name, 0
        self.facts = {"start_s": 2.0, "peak_mem_gb": 1e3, "machine": f"{settings.dtype}"}

    def request(self, updates):
        self.requested = updates
        self.log.append((self.name, updates))

    def answer(self):
        return [5e3] * self.requested

    def time_updates(self, count):
        self.request(count)
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
    log, real = [], bench.train_step
    monkeypatch.setattr(SlowPeer, "log", log)
    monkeypatch.setattr(nanogpt, "Peer", SlowPeer)
    monkeypatch.setattr(bench, "train_step", lambda run, i: log.append(("ours", i)) or real(run, i))
    words = ["train", *TINY, "--warmup_updates", "2", "--timed_updates", "3", "--rounds", "2"]
    return [*words, "--peer", "nanoGPT", str(nanogpt_checkout(tiny_data / "nanoGPT"))], log


def test_peers_take_turns_with_us(beside, capsys):
    words, log = beside
    figures = run(*words)
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
        peer = figures["peers"][name]
        assert (peer["ms"], peer["first_ms"], peer["start_s"], peer["tokens_per_s"]) == (5000, 5000, 2, 4 * 32 / 5)
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


def test_what_a_peer_lacks_is_reported_before_the_first_update(beside):
    words, log = beside
    with pytest.raises(UserError, match="position = rope"):
        run(*words, "--position", "rope")
    shutil.rmtree("nanoGPT")
    with pytest.raises(UserError, match=r"no model\.py"):
        run(*words)
    assert log == []


def test_profile(tiny_data, capsys):
    ops = run("train", *TINY, "--warmup_updates", 1, "--timed_updates", 2, "--profile")["top_ops"]
    assert len(ops) == 10
    assert [op["self_ms"] for op in ops] == sorted((op["self_ms"] for op in ops), reverse=True)
    assert 0.3 < sum(op["share"] for op in ops) <= 1
    events = [event["name"] for event in json.loads((tiny_data / "trace.json").read_text())["traceEvents"]]
    assert {op["name"] for op in ops} <= set(events)
    assert events.count("Optimizer.step#AdamW.step") == training.PROFILED
    assert ops[9]["name"] in capsys.readouterr().out


def test_figures_of_a_save(tiny_data):
    words = ["save", *TINY, "--warmup_updates", "1", "--timed_updates", "2", "--rounds", "2"]
    before = set(tiny_data.iterdir())
    figures = run(*words)
    assert figures["during_to_outside"] == pytest.approx(figures["ms_during"] / figures["ms_outside"])
    assert figures["updates_during"] >= 2
    assert 0 < figures["copy_ms"] < 1e3 * figures["save_s"] + figures["first_copy_ms"] + 1e3
    # weights, and two moments for each of them, in float32
    params = build_run(cli.parse(BenchConfig, words)).model.num_params()
    assert 0 < figures["checkpoint_mb"] - 12e-6 * params < 0.1
    assert set(tiny_data.iterdir()) == before | {tiny_data / "figures.json"}, "the benchmark's checkpoints are gone"


EVAL = ("eval", "--model_path", "out/quickstart", "--dataset", "tiny", "--device", "cpu", "--rounds", 2)


@pytest.mark.parametrize("tokens", [33, 100, 16 * 20 + 32, 0])
def test_transformers_loop_scores_the_same_tokens(tiny_home, monkeypatch, tokens):
    """The perplexities are equal, though a window of transformers scores one token less than it sees."""
    monkeypatch.chdir(tiny_home)
    found = run(*EVAL, "--text_tokens", tokens)
    Path("figures.json").unlink()
    assert found["ours_perplexity"] == pytest.approx(found["transformers_perplexity"], rel=1e-5)
    assert found["tokens"] == (tokens or len(open_dataset(Path("data/tiny")).tokens("val"))) - 1
    assert found["ours_tokens_per_s"] == pytest.approx(found["tokens"] / found["ours_s"])
    assert 1 < found["ours_perplexity"] < 257
    assert math.isfinite(found["times_as_fast"])


def test_files_of_a_suite_are_written_after_each_row(in_tmp, monkeypatch):
    """Also if a signal ends it: SIGTERM acts as Ctrl-C does."""
    seen = []

    def run_row(words, limit):
        files = [Path(name) for name in ("figures.json", "figures.md")]
        seen.append([file.read_text() if file.exists() else "" for file in files])
        if words[0] == "save":
            os.kill(os.getpid(), signal.SIGTERM)
        return {"passed": 2}

    def missed(*words):
        pytest.fail("the signal was not handled")

    for name in suites.DATASETS:
        make_dataset(in_tmp, name)
    monkeypatch.setattr(suites, "SUITES", {"all": [suites.Row("one", "train"), suites.Row("two", "save")]})
    monkeypatch.setattr(suites, "run_row", run_row)
    before = signal.signal(signal.SIGTERM, missed)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("all")
        assert signal.getsignal(signal.SIGTERM) is missed
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen[0] == ["", ""]
    assert list(json.loads(seen[1][0])["rows"]) == ["one"]
    assert "- one: passed 2" in seen[1][1]


# ---------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --resume x", r"^resume belongs to train\.py"),
        ("train --overwrite", r"^overwrite belongs to train\.py"),
        ("train --wandb offline", r"^wandb belongs to train\.py"),
        ("train --peer nanoGPT", "--peer nanoGPT PATH is expected"),
        ("train --peer nanogpt x", "peer = nanogpt x"),
        ("train --peer nanoGPT x y", "peer = nanoGPT x y"),
        ("save --peer nanoGPT x", "peer belongs to .* not to save"),
        ("infer --profile", "profile belongs to .* not to infer"),
        ("train --target 2", "target belongs to .* not to train"),
        ("loss", "--target X"),
        ("all --json x --dry_run", "dry_run belongs to .* gpu, not to all"),
        ("train --variants int8", "variants belongs to .* infer, not to train"),
        ("resume --max_iters 1", "--max_iters N, 2 or more"),
        ("resume --epochs 1", "--max_iters N, 2 or more"),
        ("all", "--json FILE"),
        ("gpu --json -", "--json FILE"),
        ("all --json x --timed_updates 3", "timed_updates: the rows"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        cli.parse(BenchConfig, words.split())


@pytest.mark.parametrize("key", ["profile", "json"])
def test_files_that_cannot_be_written_are_found_before_the_work(in_tmp, key):
    with pytest.raises(UserError, match=f"{key} = no/file"):  # otherwise the error would be the missing dataset
        bench.main(cli.parse(BenchConfig, ["train", *TINY, f"--{key}", "no/file"]))


def test_too_short_a_text_and_a_missing_split_are_refused(tiny_home, monkeypatch):
    monkeypatch.chdir(tiny_home)
    for words, message in (
        (("--text_tokens", 7), "text_tokens = 7: one window has 32; take more"),
        (("--split", "test"), "no split test"),
    ):
        with pytest.raises(UserError, match=message):
            run(*EVAL, *words)


@pytest.mark.parametrize("package", ["pytest", "pytest-timeout", "hypothesis"])
def test_a_missing_package_is_an_error_line(monkeypatch, package):
    real, missing = importlib.util.find_spec, package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(UserError, match=f"^bench.py tests: {package} is not installed: pip install"):
        bench.main(cli.parse(BenchConfig, ["tests", "--device", "cpu"]))
