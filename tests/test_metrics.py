"""metrics.py against a plain loop over windows and figures worked out by hand."""

import math

import numpy as np
import pytest
import torch

from config import ModelConfig
from metrics import Scores, score
from model import GPT

V, T, WINDOWS = 12, 8, 7
RNG = np.random.default_rng(0)
X = RNG.integers(V, size=(WINDOWS, T))
Y = np.where(RNG.random((WINDOWS, T)) < 0.2, -1, RNG.integers(V, size=(WINDOWS, T)))
Y[-1, 3:] = -1  # the incomplete last window
BYTES = np.array([1, 2, 0, 5, 1, 3, 7, 1, 4, 2])  # ids 10 and 11 are the model's own: no text


def lively(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def batches(size: int):
    return ((X[i : i + size], Y[i : i + size]) for i in range(0, WINDOWS, size))


def reference(model: GPT) -> Scores:
    """One window at a time, one place at a time."""
    model.eval()
    loss_sum, tokens, correct, text_bytes = 0.0, 0, 0, 0
    for x, y in zip(X, Y, strict=True):
        logits = model(torch.from_numpy(x)[None])[0].double().tolist()
        for row, target in zip(logits, y.tolist(), strict=True):
            if target >= 0:
                loss_sum += math.log(sum(math.exp(value) for value in row)) - row[target]
                tokens += 1
                correct += row[target] == max(row)
                text_bytes += int(BYTES[target]) if target < len(BYTES) else 0
    return Scores(loss_sum, tokens, correct, text_bytes)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_score_equals_a_plain_loop(size):
    model = lively()
    expected = reference(model)
    assert 0 < expected.correct < expected.tokens < WINDOWS * T
    got = score(model, batches(size), torch.from_numpy, BYTES)
    assert (got.tokens, got.correct, got.bytes) == (expected.tokens, expected.correct, expected.bytes)
    assert got.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert type(got.bytes) is int


def test_batch_size_does_not_show():
    sums = [score(lively(), batches(size), torch.from_numpy, BYTES).loss_sum for size in (1, 2, 5, 7)]
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-6)


def test_sums_are_float64():
    """A float32 sum that stands at 2^26 does not move when 1 is added."""
    large, one = 2.0**26, math.log(math.e - 1)
    model = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, large], [0.0, one]]))  # id -> logits
    rows = [(0, 0)] + [(1, 0)] * 50  # input, target: a loss of 2^26, then losses of ln(1 + e - 1) = 1
    pairs = ((np.array([[x]]), np.array([[y]])) for x, y in rows)
    assert score(model, pairs, torch.from_numpy, np.ones(2)).loss_sum == pytest.approx(large + 50, abs=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_does_not_disturb_training(training):
    """Dropout is off for the score and on again after it, also when the data fail; no random number is drawn, and no
    graph is kept for gradients."""
    model, graphs = lively(dropout=0.5), []
    expected = reference(model).loss_sum
    model.train(training)
    model.register_forward_hook(lambda module, args, logits: graphs.append(logits.requires_grad))
    state = torch.get_rng_state()
    assert score(model, batches(4), torch.from_numpy, BYTES).loss_sum == pytest.approx(expected, rel=1e-6)
    assert model.training is training

    def broken():
        yield X, Y
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        score(model, broken(), torch.from_numpy, BYTES)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs == [False] * 3


def test_figures():
    """8 bits over 4 tokens that stand for 2 bytes."""
    scores = Scores(loss_sum=8 * math.log(2), tokens=4, correct=3, bytes=2)
    assert scores.loss == pytest.approx(2 * math.log(2))
    assert scores.perplexity == pytest.approx(4)
    assert scores.bits_per_byte == pytest.approx(4)
    assert scores.accuracy == 0.75


def test_figures_at_the_edge():
    assert math.isnan(Scores(1.0, 1, 0, bytes=0).bits_per_byte)
    assert Scores(1e4, 1, 0, 0).perplexity == math.inf
