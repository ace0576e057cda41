"""optim.py against torch's schedulers, numbers by hand, and AdamW written out."""

import math

import pytest
import torch

from config import ModelConfig, TrainConfig
from flatgpt.training.optimizer import learning_rate, make_optimizer, param_groups
from model import GPT

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


@pytest.mark.parametrize(
    ("update", "expected"),
    [(0, 1e-3 / 11), (9, 1e-2 / 11), (10, 1e-3), (88, 1e-3), (99, 5.5e-4), (110, 1e-4), (111, 1e-4), (10_000, 1e-4)],
)
def test_wsd_stays_and_then_falls(update, expected):
    """Its last fifth: 22 of 110 updates, from 88 on."""
    config = TrainConfig(**RATES, schedule="wsd", decay_fraction=0.2)
    assert learning_rate(update, config) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["wsd", "onecycle"])
def test_short_runs_and_long_decays_have_a_rate(schedule):
    for end, warmup, share in ((1, 0, 0.2), (1, 1, 1.0), (2, 2, 0.001), (10, 10, 1.0), (10, 0, 1.0), (5, 9, 0.5)):
        config = TrainConfig(
            lr=1e-3, min_lr=1e-4, warmup_iters=warmup, lr_decay_iters=end, schedule=schedule, decay_fraction=share
        )
        rates = [learning_rate(update, config) for update in range(end + warmup + 2)]
        assert min(rates) > 1e-3 / 25.001
        assert max(rates) <= 1e-3
        assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("total", [10, 50, 137])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_onecycle_is_torchs(total, share):
    """Its rates; its cycle of beta1 is left out, as everywhere else beta1 is what it was set to."""
    warmup = round(share * total)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 6e-4, total_steps=total, pct_start=warmup / total, final_div_factor=100, cycle_momentum=False
    )
    config = TrainConfig(
        lr=6e-4, min_lr=6e-4 / 25 / 100, warmup_iters=warmup, lr_decay_iters=total, schedule="onecycle"
    )
    for update in range(total):
        assert learning_rate(update, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        if update < total - 1:
            scheduler.step()
    assert learning_rate(total, config) == pytest.approx(config.min_lr)


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
    decaying, still = param_groups(list(model.parameters()), 0.3)
    assert decaying["weight_decay"] == 0.3
    assert still["weight_decay"] == 0
    grouped = [id(p) for p in decaying["params"] + still["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    assert {id(p) for p in decaying["params"]} == {id(w) for w in matrices}


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def muon_step(config: TrainConfig, lr: float = 1e-2):
    """A small model before and after one update with random gradients, and those gradients, by name."""
    model = small()
    optimizer = make_optimizer(model, config)
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    torch.manual_seed(1)
    for p in named.values():
        p.grad = torch.randn(p.shape)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return before, named, optimizer


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    config = TrainConfig(lr=1e-2, weight_decay=0.1, beta1=0.8, optimizer="muon")
    before, named, optimizer = muon_step(config)
    hidden = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
    names = {name for name, p in named.items() if id(p) in hidden}
    assert names == {name for name, p in named.items() if ".h." in name and p.dim() == 2}
    adamw = dict(small().named_parameters())  # the same initial weights
    reference = torch.optim.AdamW(
        param_groups([adamw[n] for n in named if n not in names], 0.1), lr=1e-2, betas=(0.8, 0.99)
    )
    for name, p in adamw.items():
        p.grad = named[name].grad.clone()
    reference.step()
    for name in named.keys() - names:
        torch.testing.assert_close(named[name], adamw[name], rtol=0, atol=1e-6)
    for name in names:
        mean = optimizer.state[named[name]]["momentum_buffer"]
        torch.testing.assert_close(mean, (1 - 0.8) * named[name].grad, msg="beta1 is AdamW's")
    for name in names:  # an orthogonal step, 0.2 sqrt(max(rows, columns)) lr in size; Newton-Schulz is within 30%
        steps = before[name] * (1 - 1e-2 * 0.1) - named[name].detach()
        for step in steps.split(8) if "c_attn" in name else [steps]:  # queries, keys and values: a step for each
            singular = torch.linalg.svdvals(step / (1e-2 * 0.2 * max(step.shape) ** 0.5))
            assert singular.min() > 0.6
            assert singular.max() < 1.3, name


def test_muon_steps_are_adamws_in_size():
    """match_rms_adamw: a first AdamW step moves every weight by lr; a Muon step has 0.2 to 0.4 of that as its RMS."""
    before, named, optimizer = muon_step(TrainConfig(lr=1e-2, weight_decay=0.0, optimizer="muon"))
    for group in optimizer.muon.param_groups:
        for p in group["params"]:
            name = next(n for n, q in named.items() if q is p)
            rms = float((p.detach() - before[name]).square().mean().sqrt())
            assert 0.1 * 1e-2 < rms < 0.4 * 1e-2
