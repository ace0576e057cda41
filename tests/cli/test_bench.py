"""bench.py: its figures fit each other and come from train.py's own update; what cannot be timed is refused."""

import importlib.util
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from in_process import TINY
from processes import ROOT
from stand_in import bench_here

import bench
import train
from config import BenchConfig, UserError
from flatgpt.benchmarks import data, measure, training
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset
from flatgpt.training.setup import build_run

pytestmark = pytest.mark.slow

UPDATES = ("train", *TINY, "--warmup_updates", 2, "--timed_updates", 3)
EVAL = ("eval", "--model_path", "out/quickstart", "--dataset", "tiny", "--device", "cpu", "--rounds", 2)


def test_figures_of_the_update(tiny_data, monkeypatch, capsys):
    iters, real = [], bench.train_step
    assert real is train.train_step
    monkeypatch.setattr(bench, "train_step", lambda run, i: iters.append(i) or real(run, i))
    monkeypatch.setattr(training, "peak_flops", lambda name: 1e12)
    figures = bench_here(*UPDATES, "--profile")
    assert iters == list(range(5 + training.PROFILED_UPDATES))
    assert figures["ms_p10"] <= figures["ms"] <= figures["ms_p90"]
    assert figures["tokens_per_s"] == pytest.approx(4 * 32 / figures["ms"] * 1e3)
    # 2 layers, 32 wide, context 32: 24,576 in the blocks' matrices, 8,224 in the head, and vectors
    matrices = 2 * 12 * 32 * 32 + 257 * 32
    flops_per_token = figures["tflop_per_s"] * 1e12 / figures["tokens_per_s"]
    assert flops_per_token == pytest.approx(6 * matrices + 12 * 2 * 32 * 32, rel=0.06)
    assert figures["mfu"] == pytest.approx(figures["tflop_per_s"])
    assert figures["mfu_measured"] == pytest.approx(figures["tflop_per_s"] / figures["matmul_tflop_per_s"])
    assert figures["start_s"] > figures["first_ms"] / 1e3
    assert figures["command"].startswith("python bench.py ")
    ops = figures["top_ops"]
    assert len(ops) == 10
    assert [op["self_ms"] for op in ops] == sorted((op["self_ms"] for op in ops), reverse=True)
    assert 0.3 < sum(op["share"] for op in ops) <= 1
    events = [event["name"] for event in json.loads((tiny_data / "trace.json").read_text())["traceEvents"]]
    assert {op["name"] for op in ops} <= set(events)
    assert events.count("Optimizer.step#AdamW.step") == training.PROFILED_UPDATES
    assert ops[9]["name"] in capsys.readouterr().out
    bench.main(cli.parse(BenchConfig, [*map(str, UPDATES), "--json", "-"]))
    assert json.loads(capsys.readouterr().out)["ms"] > 0, "figures alone on standard output"


def test_figures_of_a_save(tiny_data):
    words = ("save", *TINY, "--warmup_updates", 1, "--timed_updates", 2, "--rounds", 2)
    before = set(tiny_data.iterdir())
    figures = bench_here(*words)
    assert figures["during_to_outside"] == pytest.approx(figures["ms_during"] / figures["ms_outside"])
    assert figures["updates_during"] >= 2
    assert 0 < figures["copy_ms"] < 1e3 * figures["save_s"] + figures["first_copy_ms"] + 1e3
    # weights, and two moments for each of them, in float32
    params = build_run(cli.parse(BenchConfig, [*map(str, words)])).model.num_params()
    assert 0 < figures["checkpoint_mb"] - 12e-6 * params < 0.1
    assert set(tiny_data.iterdir()) == before | {tiny_data / "figures.json"}, "the benchmark's checkpoints are gone"


@pytest.mark.parametrize("tokens", [33, 16 * 20 + 32, 0])
def test_transformers_loop_scores_the_same_tokens(tiny_home, monkeypatch, tokens):
    """The perplexities are equal, though a window of transformers scores one token less than it sees."""
    monkeypatch.chdir(tiny_home)
    found = bench_here(*EVAL, "--text_tokens", tokens)
    Path("figures.json").unlink()
    assert found["ours_perplexity"] == pytest.approx(found["transformers_perplexity"], rel=1e-5)
    assert found["tokens"] == (tokens or len(open_dataset(Path("data/tiny")).tokens("val"))) - 1
    assert found["ours_tokens_per_s"] == pytest.approx(found["tokens"] / found["ours_s"])
    assert 1 < found["ours_perplexity"] < 257


def test_missing_data_and_devices_are_errors_before_the_first_row(in_tmp, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for what, message in (("all", r"prepare_data\.py shakespeare$"), ("gpu", "needs a CUDA GPU")):
        with pytest.raises(UserError, match=message):
            bench_here(what)
    assert not list(in_tmp.iterdir())


@pytest.fixture
def texts(in_tmp, gpt2_vocabulary) -> list[str]:
    """Different texts, which lie in texts.jsonl."""
    texts = [f"{n} green bottles hanging on the wall, {n * n} more in the cellar." for n in range(3000)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


DATA = ("data", "--size_mb", 1, "--rounds", 1, "--workers", 1, "--input")


def test_bench_data_figures(texts, monkeypatch):
    """The expected numbers of tokens are tiktoken's."""
    without = SimpleNamespace(find_spec=lambda name: None)  # without datasets.map, which is slow
    monkeypatch.setattr(data, "importlib", SimpleNamespace(util=without))
    found = bench_here(*DATA, "texts.jsonl")
    assert sorted(os.listdir()) == ["figures.json", "texts.jsonl"]
    gpt2, size, tokens = tiktoken.get_encoding("gpt2"), 0, 0
    for text in itertools.cycle(texts):
        size, tokens = size + len(text), tokens + len(gpt2.encode_ordinary(text)) + 1  # and end-of-text
        if size >= found["text_mb"] * 1e6 - 0.5:
            break
    assert size == pytest.approx(found["text_mb"] * 1e6)
    assert 1 <= found["text_mb"] < 1.2
    for way in ("plain", "ours"):
        ratio = found[f"{way}_tokens_per_s"] / found[f"{way}_mb_per_s"]
        assert ratio == pytest.approx(1e6 * tokens / size)
    share = found["ours_mb_per_s"] / found["plain_mb_per_s"]
    assert found["of_plain_times_processes"] == pytest.approx(share)
    assert "times_datasets_map" not in found


def test_bench_data_that_fails_gives_no_figures(texts, in_tmp, monkeypatch):
    """Whether the text is missing or a process ends with an error."""
    (in_tmp / "house").mkdir()
    for name in ("flatgpt", "config.py"):
        (in_tmp / "house" / name).symlink_to(ROOT / name)
    (in_tmp / "house/prepare_data.py").write_text("raise SystemExit('no encoder')")
    monkeypatch.setattr(measure, "REPO_ROOT", in_tmp / "house")
    for given, said in (("absent.jsonl", "absent.jsonl"), ("texts.jsonl", "failed: no encoder")):
        with pytest.raises((UserError, OSError), match=said):
            bench_here(*DATA, given)
        assert not Path("figures.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --overwrite", r"^overwrite applies to train\.py"),
        ("train --peer nanoGPT", "--peer nanoGPT PATH is expected"),
        ("save --peer nanoGPT x", "peer applies to .* not to save"),
        ("all --json x --dry_run", "dry_run applies to .* gpu, not to all"),
        ("resume --max_iters 1", "--max_iters N, 2 or more"),
        ("gpu --json -", "--json FILE"),
        ("all --json x --timed_updates 3", "timed_updates: bench.py all has fixed settings"),
        ("train --profile no/file", "profile = no/file"),
        ("train --json no/file", "json = no/file"),
        ("eval --model_path out/quickstart --dataset tiny --text_tokens 7", "a window has 32; choose more"),
        ("eval --model_path out/quickstart --dataset tiny --split test", "no split test"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_home, monkeypatch, words, message):
    monkeypatch.chdir(tiny_home)
    with pytest.raises(UserError, match=message):
        bench.main(cli.parse(BenchConfig, words.split()))


def test_a_missing_package_is_an_error_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "pytest_timeout" or None)
    with pytest.raises(UserError, match=r"^bench\.py tests: pytest-timeout is not installed: pip install"):
        bench.main(BenchConfig(what="tests"))
