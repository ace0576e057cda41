"""The figures of eval.py against a plain loop in float64 and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from random_models import random_model
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score

from flatgpt.evaluation.metrics import mean_loss, token_statistics
from flatgpt.evaluation.report import compute_metrics


def targets_and_inputs(T: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of 40 windows: a fifth of the targets, one whole window and the end of the last one are not scored."""
    rng = np.random.default_rng(T)
    x = rng.integers(vocab_size, size=(40, T))
    y = np.where(rng.random((40, T)) < 0.2, -1, rng.integers(vocab_size, size=(40, T)))
    y[-1, T // 2 :] = y[3] = -1
    return x, y


@torch.no_grad()
def plain_scores(model, x: np.ndarray, y: np.ndarray) -> tuple[list[int], list[int], list[float], list[list[float]]]:
    """(targets, positions, losses, probabilities of each id) of each scored token, in Python's float64."""
    targets, positions, losses, probabilities = [], [], [], []
    for inputs, wanted in zip(x, y, strict=True):
        for position, logits in enumerate(model.eval()(torch.from_numpy(inputs)[None])[0].double().tolist()):
            if (target := int(wanted[position])) >= 0:
                largest = max(logits)
                log_sum = largest + math.log(math.fsum(math.exp(logit - largest) for logit in logits))
                targets.append(target)
                positions.append(position)
                losses.append(log_sum - logits[target])
                probabilities.append([math.exp(logit - log_sum) for logit in logits])
    return targets, positions, losses, probabilities


def expected_calibration_error(confidences: list[float], correct: list[bool]) -> float:
    """The sum over 15 bins, open below and closed above, of the bin's share times |accuracy - mean confidence|."""
    error = 0.0
    for n in range(15):
        low, high = np.float32(n / 15), np.float32((n + 1) / 15)
        inside = [k for k, confidence in enumerate(confidences) if low < np.float32(confidence) <= high]
        error += abs(sum(correct[k] for k in inside) - sum(confidences[k] for k in inside)) / len(confidences)
    return error


TOLERANCE = {"rel": 1e-5, "abs": 1e-6}
COUNTS = {"bytes": 0, "words": 0, "lines": 0}


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize(("T", "V"), [(1, 12), (3, 2), (7, 12), (8, 1), (8, 12), (13, 5), (16, 12)])
def test_figures_equal_a_plain_loop_and_scikit_learn(T, V, tie_weights):
    model, (x, y) = random_model(context_length=T, vocab_size=V, tie_weights=tie_weights), targets_and_inputs(T, V)
    targets, positions, losses, probabilities = plain_scores(model, x, y)
    greedy = [row.index(max(row)) for row in probabilities]
    got = compute_metrics(token_statistics(model, [(x, y)], torch.from_numpy), COUNTS)
    assert got["tokens"] == len(targets)
    assert got["loss"] == pytest.approx(np.mean(losses), **TOLERANCE)
    assert mean_loss(model, [(x, y)], torch.from_numpy) == pytest.approx(np.mean(losses), **TOLERANCE)
    assert got["accuracy"] == pytest.approx(accuracy_score(targets, greedy))
    top5 = top_k_accuracy_score(targets, probabilities, k=5, labels=range(V)) if V > 5 else 1
    assert got["top5_accuracy"] == pytest.approx(top5)
    expected = precision_recall_fscore_support(targets, greedy, average="weighted", zero_division=0)[:3]
    assert [got["precision"], got["recall"], got["f1"]] == pytest.approx(expected)
    correct = [a == b for a, b in zip(greedy, targets, strict=True)]
    calibration = expected_calibration_error([max(row) for row in probabilities], correct)
    assert got["calibration_error"] == pytest.approx(calibration, rel=1e-4, abs=1e-6)
    for n, bucket in enumerate(k for k in range(8) if any(k * T <= 8 * p < (k + 1) * T for p in range(T))):
        inside = [p for p in range(T) if bucket * T <= 8 * p < (bucket + 1) * T]
        scored = [loss for loss, p in zip(losses, positions, strict=True) if p in inside]
        mean = pytest.approx(np.mean(scored), **TOLERANCE) if scored else None
        row = {"first": inside[0], "last": inside[-1], "tokens": len(scored), "loss": mean}
        assert got["loss_by_position"][n] == row
