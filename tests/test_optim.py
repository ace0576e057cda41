"""optim.py against torch's schedulers, numbers by hand, and AdamW written out."""

import math

import pytest
import torch

from config import ModelConfig, TrainConfig
from model import GPT
from optim import learning_rate, make_optimizer, param_groups

RATES = {"lr": 1e-3, "min_lr": 1e-4, "warmup_iters": 10, "lr_decay_iters": 110}


@pytest.mark.parametrize(
    ("update", "cosine", "linear", "constant"),
    [
        (0, 1e-3 / 11, 1e-3 / 11, 1e-3 / 11),  # not 0: the first batch is not wasted
        (4, 5e-3 / 11, 5e-3 / 11, 5e-3 / 11),
        (9, 1e-2 / 11, 1e-2 / 11, 1e-2 / 11),
        (10, 1e-3, 1e-3, 1e-3),
        (35, 1e-4 + 9e-4 * (2 + math.sqrt(2)) / 4, 1e-4 + 9e-4 * 0.75, 1e-3),
        (60, 5.5e-4, 5.5e-4, 1e-3),
        (110, 1e-4, 1e-4, 1e-3),
        (111, 1e-4, 1e-4, 1e-3),
        (10_000, 1e-4, 1e-4, 1e-3),
    ],
)
def test_learning_rate(update, cosine, linear, constant):
    for schedule, expected in {"cosine": cosine, "linear": linear, "constant": constant}.items():
        assert learning_rate(update, TrainConfig(**RATES, schedule=schedule)) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_warm_up_is_torchs():
    optimizers = {name: torch.optim.SGD([torch.zeros(1)], lr=1e-3) for name in ("cosine", "linear")}
    torchs = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizers["cosine"], T_max=50, eta_min=1e-4),
        "linear": torch.optim.lr_scheduler.LinearLR(optimizers["linear"], 1.0, 0.1, total_iters=50),
    }
    for update in range(51):
        for schedule, scheduler in torchs.items():
            config = TrainConfig(lr=1e-3, min_lr=1e-4, warmup_iters=0, lr_decay_iters=50, schedule=schedule)
            assert learning_rate(update, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
            optimizers[schedule].step()
            scheduler.step()


@pytest.mark.parametrize("warmup", [10, 20])
def test_warm_up_as_long_as_the_run_or_longer(warmup):
    config = TrainConfig(lr=1e-3, min_lr=1e-4, warmup_iters=warmup, lr_decay_iters=10)
    rates = [learning_rate(update, config) for update in range(warmup + 2)]
    assert rates[:warmup] == pytest.approx([1e-3 * (i + 1) / (warmup + 1) for i in range(warmup)])
    assert rates[warmup:] == [1e-4, 1e-4]


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, context_length=8, vocab_size=50, **changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_weights": False, "head_bias": True}, {"position": "rope", "bias": False}],
    ids=["gpt2", "untied", "rope"],
)
def test_exactly_the_matrices_decay(changes):
    """The weights of Linear and Embedding; a tied one is there once."""
    model = small(**changes)
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    decaying, still = param_groups(model, 0.3)
    assert decaying["weight_decay"] == 0.3
    assert still["weight_decay"] == 0
    grouped = [id(p) for p in decaying["params"] + still["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    assert {id(p) for p in decaying["params"]} == {id(w) for w in matrices}


def test_updates_equal_adamw_written_out():
    """Loshchilov and Hutter's algorithm 2, in float64; the rate changes, as a schedule changes it. eps is large so
    that its place shows."""
    lrs, decay, beta1, beta2, eps = (1e-2, 3e-2, 2e-2, 1e-2, 5e-3), 0.3, 0.8, 0.95, 1e-3
    model = small()
    config = TrainConfig(lr=1.0, weight_decay=decay, beta1=beta1, beta2=beta2, eps=eps)
    optimizer = make_optimizer(model, config)
    assert optimizer.defaults["fused"]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    named = dict(model.named_parameters())
    expected = {name: p.detach().double().clone() for name, p in named.items()}
    mean = {name: torch.zeros_like(p) for name, p in expected.items()}
    square = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in enumerate(lrs, start=1):
        for name, p in named.items():
            p.grad = torch.randn(p.shape) * 10.0 ** (step - 4)
            g = p.grad.double()
            mean[name] = beta1 * mean[name] + (1 - beta1) * g
            square[name] = beta2 * square[name] + (1 - beta2) * g**2
            upward = mean[name] / (1 - beta1**step) / ((square[name] / (1 - beta2**step)).sqrt() + eps)
            vector = name.endswith("bias") or ".ln_" in name
            expected[name] -= lr * (upward + (0 if vector else decay) * expected[name])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for name, p in named.items():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=0, atol=1e-6, msg=f"{name}, {step}")
