"""Sums over batches and ranks, and what scoring leaves unchanged; tests/parity compares the figures themselves."""

import json
import math

import numpy as np
import pytest
import torch
from random_models import over_ranks, random_model
from torch.nn.functional import cross_entropy

from flatgpt.evaluation import metrics
from flatgpt.evaluation.metrics import Scores, mean_loss, measure
from flatgpt.evaluation.windows import eval_batches
from flatgpt.runtime.distributed import SINGLE_PROCESS

V, T = 12, 8
IDS = np.random.default_rng(0).integers(V, size=8 * 4 * 10 + 7)


def batches(size: int = 4):
    return eval_batches(IDS, T, size)


def assert_same(one: Scores, other: Scores) -> None:
    one, other = one.figures(), other.figures()
    for bucket, expected in zip(one.pop("loss_by_position"), other.pop("loss_by_position"), strict=True):
        assert bucket == pytest.approx(expected, rel=1e-6)
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("logits_bytes", [1, 4 * V * 33, 10**9])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_batch_size_and_chunks_change_no_figure(monkeypatch, size, logits_bytes):
    """At least 16 rows of logits are computed at once; here also 33, and all."""
    model, rows, told = random_model(), [], []
    whole = measure(model, batches(), torch.from_numpy)
    head = model.compute_logits
    monkeypatch.setattr(
        model, "compute_logits", lambda hidden, **more: rows.append(len(hidden)) or head(hidden, **more)
    )
    monkeypatch.setitem(metrics.LOGITS_BYTES, "cpu", logits_bytes)
    assert_same(measure(model, batches(size), torch.from_numpy, progress=told.append), whole)
    assert sum(rows) == sum(told) == whole.tokens == len(IDS) - 1, "targets that are not scored cost nothing"
    if size == 40:
        assert max(rows) == {1: 16, 10**9: 40 * T}.get(logits_bytes, 33)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_padding_of_the_vocabulary_is_never_scored(tie_weights):
    model = random_model(tie_weights=tie_weights)
    table = (model.transformer.wte if tie_weights else model.lm_head).weight
    assert len(table) == 64
    found = []
    for padding in (0.0, 1000.0):
        with torch.no_grad():
            table[V:] = padding * torch.ones(64 - V, 16)
        found.append((measure(model, batches(), torch.from_numpy), mean_loss(model, batches(), torch.from_numpy)))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_sums_are_float64():
    """A float32 sum of 2^26 does not change if 1 is added."""
    large = 2.0**26
    table = torch.tensor([[0.0, large], [0.0, math.log(math.e - 1)]])  # id -> logits: losses of 2^26 and 1
    model = torch.nn.Module()
    model.forward = lambda x, y, **more: cross_entropy(table[x].flatten(0, 1), y.flatten(), reduction="none")
    x, y = np.array([[0] + [1] * 50]), np.zeros((1, 51), dtype=np.int64)
    for given in ([(x, y)], [(x[:, n : n + 1], y[:, n : n + 1]) for n in range(51)]):
        assert mean_loss(model, given, torch.from_numpy) * 51 == pytest.approx(large + 50, abs=1e-3)
    scores = Scores(2, 8)
    add(scores, losses=[large, *[1.0] * 50])
    assert scores.loss_sum == large + 50


def add(scores: Scores, **columns) -> None:
    """Add tokens of which only some properties are given."""
    n = len(next(iter(columns.values())))
    defaults = {"losses": 1.0, "targets": 0, "positions": 0, "in_top5": True, "confidences": 0.5, "greedy": 0}
    types = {"losses": np.float32, "confidences": np.float32}
    columns = {name: columns.get(name, [value] * n) for name, value in defaults.items()}
    scores.add(**{name: np.array(values, dtype=types.get(name)) for name, values in columns.items()})


def test_calibration_error_by_hand():
    """Bins 14, 14, 8 and 8 of 15; a confidence of n / 15 belongs to the bin below, 0 to the first one."""
    scores = Scores(2, 8)
    add(scores, confidences=[0.9, 0.91, 0.5, 0.52], greedy=[0, 1, 0, 0])
    assert scores.figures()["calibration_error"] == pytest.approx((abs(1 - 1.81) + abs(2 - 1.02)) / 4)
    edge = np.float32(3) / np.float32(15)
    for confidences, gap in (
        ([edge, edge - 0.01], abs(1 - 2 * edge + 0.01)),
        ([edge, np.nextafter(edge, np.float32(1))], edge + 1 - edge),
        ([0.0, 0.05], abs(1 - 0.05)),
        ([0.99, 1.0], abs(1 - 1.99)),
    ):
        scores = Scores(2, 8)
        add(scores, confidences=confidences, greedy=[1, 0])
        assert scores.figures()["calibration_error"] == pytest.approx(gap / 2, rel=1e-5)


def test_positions_without_a_token():
    """A text that is shorter than the context; figures are Python's numbers, for JSON."""
    scores = Scores(2, 20)
    add(scores, positions=[0, 1, 2, 3, 4], losses=[1, 2, 3, 4, 6])
    got = scores.figures()
    assert [tuple(bucket.values()) for bucket in got["loss_by_position"]] == [
        *((0, 2, 3, 2.0), (3, 4, 2, 5.0)),
        *((first, last, 0, None) for first, last in ((5, 7), (8, 9), (10, 12), (13, 14), (15, 17), (18, 19))),
    ]
    assert json.loads(json.dumps(got)) == got


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_together_give_the_figures_of_one(world):
    """11 batches: with 3 and 8 ranks some have a last one in which nothing is scored."""
    model = random_model()

    def scores(ranks=SINGLE_PROCESS) -> Scores:
        return measure(model, eval_batches(IDS, T, 4, 0, (ranks.rank, ranks.world)), torch.from_numpy, ranks)

    def loss(ranks=SINGLE_PROCESS) -> float:
        return mean_loss(model, eval_batches(IDS, T, 4, 0, (ranks.rank, ranks.world)), torch.from_numpy, ranks)

    assert_same(over_ranks(world, scores), scores())
    assert over_ranks(world, loss) == pytest.approx(loss(), rel=1e-12)
    assert over_ranks(world, loss) == pytest.approx(scores().figures()["loss"], rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("score", [mean_loss, measure])
def test_scoring_does_not_disturb_training(score, training):
    """Dropout is off meanwhile, also if the data fail; no random number is drawn and no graph is kept."""
    expected, graphs = mean_loss(random_model(), batches(), torch.from_numpy), []
    model = random_model(dropout=0.5).train(training)
    model.transformer.ln_f.register_forward_hook(lambda module, args, x: graphs.append(x.requires_grad))
    state = torch.get_rng_state()
    got = score(model, batches(), torch.from_numpy)
    assert (got if score is mean_loss else got.figures()["loss"]) == pytest.approx(expected, rel=1e-6)

    def broken():
        yield from batches()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        score(model, broken(), torch.from_numpy)
    assert model.training is training
    assert torch.is_grad_enabled()
    assert graphs
    assert not any(graphs)
    assert torch.equal(torch.get_rng_state(), state)
