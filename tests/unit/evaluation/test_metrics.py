"""metrics.py against a plain loop in float64, one window and one place at a time, and against scikit-learn."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score
from torch import Tensor
from torch.nn.functional import cross_entropy

from config import ModelConfig
from flatgpt.evaluation import metrics
from flatgpt.evaluation.metrics import Scores, mean_loss, measure
from flatgpt.evaluation.windows import eval_batches
from model import GPT

V, WINDOWS = 12, 40


def lively(T: int = 8, **changes) -> GPT:
    """A small model whose logits go far apart."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, **{"vocab_size": V, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return model


def text(T: int = 8, vocab_size: int = V) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, of which a fifth and the end of the last window are not scored, nor is a whole one."""
    rng = np.random.default_rng(T)
    x = rng.integers(vocab_size, size=(WINDOWS, T))
    y = np.where(rng.random((WINDOWS, T)) < 0.2, -1, rng.integers(vocab_size, size=(WINDOWS, T)))
    y[-1, T // 2 :] = -1
    y[3] = -1
    return x, y


def batches(data: tuple[np.ndarray, np.ndarray], size: int = WINDOWS):
    x, y = data
    return ((x[i : i + size], y[i : i + size]) for i in range(0, len(x), size))


@dataclass
class Plain:
    """What there is to know of each scored token."""

    losses: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    p: list[list[float]] = field(default_factory=list)  # of each id

    @property
    def greedy(self) -> list[int]:
        return [row.index(max(row)) for row in self.p]

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)


@torch.no_grad()
def plainly(model: GPT, data: tuple[np.ndarray, np.ndarray]) -> Plain:
    found = Plain()
    model.eval()
    for x, y in zip(*data, strict=True):
        logits = model(torch.from_numpy(x)[None])[0].double().tolist()
        for position, (row, target) in enumerate(zip(logits, y.tolist(), strict=True)):
            if target >= 0:
                largest = max(row)
                log_sum = largest + math.log(math.fsum(math.exp(logit - largest) for logit in row))
                found.losses.append(log_sum - row[target])
                found.targets.append(target)
                found.positions.append(position)
                found.p.append([math.exp(logit - log_sum) for logit in row])
    return found


def calibration_error(p: list[float], right: list[bool]) -> float:
    """Bins of confidence (0, 1/15], (1/15, 2/15], ...: gap between how often and how surely, by how many are in it."""
    error = 0.0
    for n in range(15):
        low, high = np.float32(n / 15), np.float32((n + 1) / 15)
        inside = [k for k, confidence in enumerate(p) if low < np.float32(confidence) <= high]
        if inside:
            accuracy = sum(right[k] for k in inside) / len(inside)
            confidence = sum(p[k] for k in inside) / len(inside)
            error += len(inside) / len(p) * abs(accuracy - confidence)
    return error


def buckets(T: int, positions: list[int], losses: list[float]) -> list[dict]:
    """Eighths of the context: that of place p is the n-th where n / 8 <= p / T < (n + 1) / 8."""
    found = []
    for n in range(8):
        inside = [p for p in range(T) if n * T <= 8 * p < (n + 1) * T]
        scored = [loss for p, loss in zip(positions, losses, strict=True) if p in inside]
        mean = pytest.approx(sum(scored) / len(scored), rel=1e-6) if scored else None
        if inside:
            found.append({"first": inside[0], "last": inside[-1], "tokens": len(scored), "loss": mean})
    return found


def weighted(targets: list[int], predicted: list[int]) -> dict:
    values = precision_recall_fscore_support(targets, predicted, average="weighted", zero_division=0)[:3]
    return dict(zip(("precision", "recall", "f1"), map(pytest.approx, values), strict=True))


def figures(scores: Scores) -> dict:
    names = ("tokens", "loss_sum", "loss", "accuracy", "top5_accuracy", "calibration_error", "by_position")
    return {name: getattr(scores, name) for name in names} | scores.weighted()


def same(one: Scores, other: Scores, rel: float) -> None:
    """All figures, those by position too."""
    one, other = figures(one), figures(other)
    for ours, theirs in zip(one.pop("by_position"), other.pop("by_position"), strict=True):
        assert ours == pytest.approx(theirs, rel=rel)
    assert one == pytest.approx(other, rel=rel)


# ---------------------------------------------------------------------------------------------------------------------
# the figures


@pytest.mark.parametrize("T", [1, 3, 7, 8, 13, 16])
def test_figures_equal_a_plain_loop_and_scikit_learn(T):
    model, data = lively(T), text(T)
    plain = plainly(model, data)
    greedy = plain.greedy
    right = [a == b for a, b in zip(greedy, plain.targets, strict=True)]
    got = measure(model, batches(data), torch.from_numpy)
    assert got.tokens == len(plain.targets) == (data[1] >= 0).sum()
    assert got.loss == pytest.approx(plain.loss, rel=1e-6)
    assert got.loss_sum == pytest.approx(math.fsum(plain.losses), rel=1e-6)
    assert got.accuracy == pytest.approx(accuracy_score(plain.targets, greedy))
    assert 0 < got.accuracy < got.top5_accuracy < 1
    top5 = top_k_accuracy_score(plain.targets, plain.p, k=5, labels=range(V))
    assert got.top5_accuracy == pytest.approx(top5)
    assert got.weighted() == weighted(plain.targets, greedy)
    assert got.calibration_error == pytest.approx(calibration_error([max(row) for row in plain.p], right), rel=1e-5)
    assert got.by_position == buckets(T, plain.positions, plain.losses)
    assert sum(bucket["tokens"] for bucket in got.by_position) == got.tokens
    assert json.loads(json.dumps(figures(got))) == figures(got)  # no numpy's numbers


@pytest.mark.parametrize("T", [3, 8])
def test_loss_alone_is_the_same(T):
    model, data = lively(T), text(T)
    plain = plainly(model, data)
    for size in (1, 7, WINDOWS):
        assert mean_loss(model, batches(data, size), torch.from_numpy) == pytest.approx(plain.loss, rel=1e-6)


@pytest.mark.parametrize("logits_bytes", [1, 4 * V * 33, 10**9])
@pytest.mark.parametrize("size", [1, 3, WINDOWS])
def test_batches_and_parts_do_not_show(monkeypatch, size, logits_bytes):
    """The head computes 16 rows of logits at least; here also 33, and all."""
    model, data, rows = lively(), text(), []
    whole = measure(model, batches(data), torch.from_numpy)
    head = model.compute_logits
    monkeypatch.setattr(
        model, "compute_logits", lambda hidden, **more: rows.append(len(hidden)) or head(hidden, **more)
    )
    monkeypatch.setitem(metrics.LOGITS_BYTES, "cpu", logits_bytes)
    same(measure(model, batches(data, size), torch.from_numpy), whole, rel=1e-6)
    assert sum(rows) == whole.tokens, "places that are not scored cost nothing"
    if size == WINDOWS:
        assert max(rows) == {1: 16, 10**9: whole.tokens}.get(logits_bytes, 33)


@pytest.mark.parametrize("vocab_size", [1, 2, 4, 5])
def test_small_vocabularies(vocab_size):
    model, data = lively(vocab_size=vocab_size), text(vocab_size=vocab_size)
    plain = plainly(model, data)
    got = measure(model, batches(data), torch.from_numpy)
    assert got.top5_accuracy == 1
    assert got.loss == pytest.approx(plain.loss, rel=1e-6, abs=1e-9)
    assert got.weighted() == weighted(plain.targets, plain.greedy)


def test_logits_of_thousands():
    """Beyond 88, exp is no float32 any more."""
    model, data = lively(), text()
    with torch.no_grad():
        model.transformer.wte.weight *= 500
        model.transformer.ln_f.weight *= 5
    plain = plainly(model, data)
    assert plain.loss > 1000
    assert measure(model, batches(data), torch.from_numpy).loss == pytest.approx(plain.loss, rel=1e-6)
    assert mean_loss(model, batches(data), torch.from_numpy) == pytest.approx(plain.loss, rel=1e-6)


def test_bfloat16_is_that_of_the_matrix_products_only():
    """Probabilities and losses are float32."""
    model, data = lively().bfloat16(), text()
    plain = plainly(model, data)
    got = measure(model, batches(data), torch.from_numpy)
    assert got.loss == pytest.approx(plain.loss, rel=1e-6)
    assert mean_loss(model, batches(data), torch.from_numpy) == pytest.approx(plain.loss, rel=1e-6)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_vocabularys_padding_never_counts(tie_weights):
    model, data = lively(tie_weights=tie_weights), text()
    tables = [model.transformer.wte] if tie_weights else [model.lm_head]
    for table in tables:
        assert len(table.weight) == 64
        with torch.no_grad():
            table.weight[V:] = 0
    clean = measure(model, batches(data), torch.from_numpy), mean_loss(model, batches(data), torch.from_numpy)
    for table in tables:
        with torch.no_grad():
            table.weight[V:] = 1000 * torch.randn(64 - V, 16)
    same(measure(model, batches(data), torch.from_numpy), clean[0], rel=1e-6)
    assert mean_loss(model, batches(data), torch.from_numpy) == pytest.approx(clean[1], rel=1e-6)


def test_sums_are_float64():
    """A float32 sum that stands at 2^26 does not move when 1 is added."""
    large, one = 2.0**26, math.log(math.e - 1)
    table = torch.tensor([[0.0, large], [0.0, one]])  # id -> logits
    model = torch.nn.Module()
    model.forward = lambda x, y, reduction: cross_entropy(table[x].flatten(0, 1), y.flatten(), reduction="none")
    rows = [(0, 0)] + [(1, 0)] * 50  # input, target: a loss of 2^26, then losses of ln(1 + e - 1) = 1
    pairs = ((np.array([[x]]), np.array([[y]])) for x, y in rows)
    assert mean_loss(model, pairs, torch.from_numpy) * 51 == pytest.approx(large + 50, abs=1e-3)
    together = np.array([row[0] for row in rows])[None], np.array([row[1] for row in rows])[None]
    assert mean_loss(model, [together], torch.from_numpy) * 51 == pytest.approx(large + 50, abs=1e-3)
    scores = Scores(2, 8)
    add(scores, losses=[large, *[1.0] * 50], positions=[0] * 51)
    assert scores.loss_sum == large + 50
    assert scores.by_position[0]["loss"] * 51 == pytest.approx(large + 50, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# sums by hand


def add(scores: Scores, **columns) -> None:
    """Tokens of which only that is of interest."""
    N = len(next(iter(columns.values())))
    plain = {"losses": 1.0, "targets": 0, "positions": 0, "in_top5": True, "confidences": 0.5, "greedy": 0}
    kinds = {"losses": np.float32, "confidences": np.float32}
    columns = {name: columns.get(name, [value] * N) for name, value in plain.items()}
    scores.add(**{name: np.array(values, dtype=kinds.get(name)) for name, values in columns.items()})


def test_calibration_error_by_hand():
    scores = Scores(2, 8)
    add(scores, confidences=[0.9, 0.91, 0.5, 0.52], greedy=[0, 1, 0, 0])  # bins 14, 14, 8, 8 of 15; targets are 0
    assert scores.calibration_error == pytest.approx((abs(1 - 1.81) + abs(2 - 1.02)) / 4)


def test_confidences_at_the_edges_of_bins():
    """n / 15 itself belongs below; the least that is more, above; 1 to the last bin, 0 to the first."""
    edges = np.arange(16, dtype=np.float32) / np.float32(15)
    above = np.nextafter(edges[:-1], np.float32(1))
    rng = np.random.default_rng(0)
    for confidences in (edges, above, np.concatenate([edges, above, above])):
        right = rng.random(len(confidences)) < 0.5
        scores = Scores(2, 8)
        add(scores, confidences=confidences, greedy=1 - right)
        # 0 is the confidence of nothing; in a plain loop it is the first bin's
        plain = calibration_error(np.maximum(confidences, 1e-30).tolist(), right.tolist())
        assert scores.calibration_error == pytest.approx(plain, rel=1e-6)


def test_buckets_that_are_not_reached():
    """A text that is shorter than the context."""
    scores = Scores(2, 20)
    add(scores, positions=[0, 1, 2, 3, 4], losses=[1, 2, 3, 4, 6])
    assert [(b["first"], b["last"], b["tokens"], b["loss"]) for b in scores.by_position] == [
        *((0, 2, 3, 2.0), (3, 4, 2, 5.0)),
        *((first, last, 0, None) for first, last in ((5, 7), (8, 9), (10, 12), (13, 14), (15, 17), (18, 19))),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# a sampled token


def test_sampled_tokens_are_scored_as_scikit_learn_does(monkeypatch):
    """Whatever was drawn for a place is compared with its target, also in parts; greedy figures stay."""
    model, data, drawn = lively(), text(), []
    generator = torch.Generator().manual_seed(5)

    def sampled(logits: Tensor) -> Tensor:
        drawn.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
        return drawn[-1]

    monkeypatch.setitem(metrics.LOGITS_BYTES, "cpu", 1)
    got = measure(model, batches(data, 7), torch.from_numpy, sampled=sampled)
    targets = plainly(model, data).targets
    assert got.weighted("sampled") == weighted(targets, torch.cat(drawn).tolist())
    same(got, measure(model, batches(data, 7), torch.from_numpy), rel=1e-12)
    assert got.sampled
    assert got.weighted("sampled") != got.weighted()


def test_sampled_frequencies():
    """Targets are the likeliest tokens, of which greedy finds all; drawn, each comes up as often as it is likely."""
    model, (x, _) = lively(), text()
    with torch.no_grad():
        p, y = model(torch.from_numpy(x)).double().softmax(-1).max(-1)
    generator, recalls = torch.Generator().manual_seed(1), []
    for _ in range(60):
        scores = measure(
            model,
            [(x, y.numpy())],
            torch.from_numpy,
            sampled=lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
        )
        recalls.append(scores.weighted("sampled")["recall"])
    deviation = float((p * (1 - p)).sum().sqrt()) / p.numel() / math.sqrt(len(recalls))
    assert np.mean(recalls) == pytest.approx(float(p.mean()), abs=4 * deviation)
    assert float(p.mean()) < 1 - 20 * deviation
    assert scores.accuracy == 1


# ---------------------------------------------------------------------------------------------------------------------
# ranks, training


def of_ranks(world: int, score: Callable):
    """What the last of so many ranks gets from score(share, total), when the others were there before it."""
    sums = []
    for rank in range(world):
        answer = score((rank, world), lambda mine: sums.append(mine.clone()) or torch.stack(sums).sum(0))
    assert len(sums) == world
    assert all(s.dtype == torch.float64 for s in sums)
    return answer


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_together_give_what_one_gives(world):
    """11 batches: of 3 and of 8 ranks some have a last one in which nothing is scored."""
    model, ids = lively(), np.random.default_rng(0).integers(V, size=8 * 4 * 10 + 7)

    def scored(share, total) -> Scores:
        return measure(model, eval_batches(ids, 8, 4, 0, share), torch.from_numpy, sampled=draw, total=total)

    def draw(logits: Tensor) -> Tensor:
        return logits.argmin(-1)

    alone = scored((0, 1), metrics.alone)
    together = of_ranks(world, scored)
    same(together, alone, rel=1e-12)
    assert together.weighted("sampled") == pytest.approx(alone.weighted("sampled"), rel=1e-12)
    assert alone.tokens == len(ids) - 1

    def loss(share, total) -> float:
        return mean_loss(model, eval_batches(ids, 8, 4, 0, share), torch.from_numpy, total)

    assert of_ranks(world, loss) == pytest.approx(loss((0, 1), metrics.alone), rel=1e-12)
    assert of_ranks(world, loss) == pytest.approx(alone.loss, rel=1e-6)


def test_each_batch_is_told():
    told, data = [], text()
    scores = measure(lively(), batches(data, 3), torch.from_numpy, each=told.append)
    assert told == [(y >= 0).sum() for _, y in batches(data, 3)]
    assert sum(told) == scores.tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("score", [mean_loss, measure])
def test_scoring_does_not_disturb_training(score, training):
    """Dropout is off for the score and on again after it, also when the data fail; no random number is drawn, and no
    graph is kept for gradients."""
    model, data, graphs = lively(dropout=0.5), text(), []
    expected = plainly(model, data).loss
    model.train(training)
    model.transformer.ln_f.register_forward_hook(lambda module, args, x: graphs.append(x.requires_grad))
    state = torch.get_rng_state()
    got = score(model, batches(data, 20), torch.from_numpy)
    assert (got if score is mean_loss else got.loss) == pytest.approx(expected, rel=1e-6)
    assert model.training is training

    def broken():
        yield data
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        score(model, broken(), torch.from_numpy)
    assert model.training is training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs == [False] * 3
