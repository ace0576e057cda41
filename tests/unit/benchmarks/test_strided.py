"""strided.py: both ways score the same tokens with the same context."""

import math
from pathlib import Path

import pytest

from config import BenchConfig, UserError
from flatgpt.benchmarks import evaluation
from flatgpt.cli import cli
from flatgpt.data.dataset import open_dataset


@pytest.fixture
def bench(tiny_home, monkeypatch):
    monkeypatch.chdir(tiny_home)
    words = ["eval", "--model_path", "out/quickstart", "--dataset", "tiny", "--device", "cpu", "--rounds", "2"]
    return lambda *more: evaluation.bench_eval(cli.parse(BenchConfig, [*words, *map(str, more)]), lambda line: None)


@pytest.mark.parametrize("tokens", [33, 100, 16 * 20 + 32, 0])
def test_perplexities_agree(bench, tokens):
    """To the digit, though ours has windows of one token less: theirs score one less than they see."""
    got = bench("--text_tokens", tokens)
    assert got["ours_perplexity"] == pytest.approx(got["transformers_perplexity"], rel=1e-5)
    assert got["tokens"] == (tokens or len(open_dataset(Path("data/tiny")).tokens("val"))) - 1
    assert got["ours_tokens_per_s"] == pytest.approx(got["tokens"] / got["ours_s"])
    assert 1 < got["ours_perplexity"] < 257
    assert math.isfinite(got["times_as_fast"])


def test_what_cannot_be_compared_is_said(bench):
    with pytest.raises(UserError, match="text_tokens = 7: one window has 32; take more"):
        bench("--text_tokens", 7)
    with pytest.raises(UserError, match="no split test"):
        bench("--split", "test")
