"""Learning rates against torch's schedulers and numbers by hand, parameter groups, and Muon against torch's."""

import math

import cuda_graphs
import pytest
import torch

from config import ModelConfig, TrainConfig
from flatgpt.training.optimizer import Muon, apply_gradients, learning_rate, make_optimizer, orthogonalize
from model import GPT


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", {35: 1e-4 + 9e-4 * (2 + math.sqrt(2)) / 4, 60: 5.5e-4, 110: 1e-4, 111: 1e-4, 10_000: 1e-4}),
        ("linear", {35: 1e-4 + 9e-4 * 0.75, 60: 5.5e-4, 110: 1e-4, 10_000: 1e-4}),
        ("constant", {35: 1e-3, 60: 1e-3, 110: 1e-3, 10_000: 1e-3}),
        ("wsd", {88: 1e-3, 99: 5.5e-4, 110: 1e-4, 10_000: 1e-4}),  # its last fifth: 22 updates
    ],
)
def test_learning_rate(schedule, rates):
    """The warm-up begins above zero, so that the first batch is not wasted."""
    warm_up = {0: 1e-3 / 11, 4: 5e-3 / 11, 9: 1e-2 / 11, 10: 1e-3}
    config = TrainConfig(lr=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110, schedule=schedule)
    for update, rate in (warm_up | rates).items():
        assert learning_rate(update, config) == pytest.approx(rate, rel=1e-12), update


@pytest.mark.parametrize("total", [10, 50, 137])
def test_onecycle_is_torchs(total):
    warmup = round(0.3 * total)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 6e-4, total_steps=total, pct_start=warmup / total, final_div_factor=100, cycle_momentum=False
    )
    config = TrainConfig(lr=6e-4, min_lr=2.4e-7, warmup_iters=warmup, lr_decay_iters=total, schedule="onecycle")
    for update in range(total):
        assert learning_rate(update, config) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        if update < total - 1:
            scheduler.step()
    assert learning_rate(total, config) == pytest.approx(config.min_lr)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "onecycle"])
@pytest.mark.parametrize(("end", "warmup"), [(1, 0), (1, 1), (2, 2), (10, 10), (10, 0), (5, 9)])
def test_short_runs_and_long_warm_ups_have_a_rate(schedule, end, warmup):
    for share in (0.001, 1.0):
        settings = {"warmup_iters": warmup, "lr_decay_iters": end, "schedule": schedule, "decay_fraction": share}
        config = TrainConfig(lr=1e-3, min_lr=1e-4, **settings)
        rates = [learning_rate(update, config) for update in range(end + warmup + 2)]
        assert 1e-3 / 25.001 < min(rates) <= max(rates) <= 1e-3
        assert rates[-1] == pytest.approx(1e-4)


def named(model: GPT, group: dict) -> set[str]:
    """Names of the parameters in a group."""
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False, "head_bias": True}, {"position": "rope"}], ids=str)
def test_exactly_the_matrices_decay(changes):
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, context_length=8, vocab_size=50, **changes))
    decaying, still = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.3, 0)
    assert named(model, decaying) == {name for name, p in model.named_parameters() if p.dim() == 2}
    assert named(model, still) == {name for name, p in model.named_parameters() if p.dim() == 1}


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, context_length=8, vocab_size=50))
    optimizer = make_optimizer(
        model, TrainConfig(lr=1e-2, weight_decay=0.3, beta1=0.8, optimizer="muon", dtype="float32")
    )
    stacked, others, decaying, still = optimizer.param_groups
    names = {name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    assert named(model, stacked) == {name for name in names if "c_attn" in name}
    assert named(model, others) == {name for name in names if "c_attn" not in name}
    assert named(model, decaying) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert named(model, still) == {name for name, p in model.named_parameters() if p.dim() == 1}
    for group in (stacked, others):
        found = group["parts"], group["lr"], group["weight_decay"], group["momentum"]
        assert found == (3 if group is stacked else 1, 1e-2, 0.3, 0.8)


SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32), (24, 8), (8, 8)]  # the first of a kind has three parts, as c_attn


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_torchs_muon(momentum, monkeypatch):
    """In float32. It takes each matrix by itself. A parameter without a gradient stays."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # the precision of torch's iterations
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [
        {"params": [p for p in params if len(p) == 24], "parts": 3},
        {"params": [p for p in params if len(p) != 24]},
    ]
    ours = Muon(groups, lr=0.02, weight_decay=0.1, momentum=momentum, dtype=torch.float32)
    parts = [torch.nn.Parameter(m.clone()) for p in params for m in p.detach().split(8 if len(p) == 24 else len(p))]
    settings = {"weight_decay": 0.1, "momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon(parts, lr=0.02, nesterov=True, **settings)
    for lr in (0.02, 0.05, 0.01):
        for p in params[:-1]:
            p.grad = torch.randn(p.shape)
        grads = [m for p in params[:-1] for m in p.grad.split(8 if len(p) == 24 else len(p))]
        for part, grad in zip(parts, grads, strict=False):
            part.grad = grad.clone()
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = lr
        ours.step()
        theirs.step()
        found, expected = (torch.cat([p.detach().flatten() for p in each]) for each in (params, parts))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * lr)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_update_does_not_wait_for_the_device(optimizer):
    """Neither one that is applied nor one that is skipped; the scale is halved after that. Graph raises for a wait."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=8, vocab_size=50))
    chosen = make_optimizer(model, TrainConfig(lr=1e-2, optimizer=optimizer, dtype="float16"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, scale in ((1.0, 2.0**10), (math.inf, 2.0**9), (1.0, 2.0**9)):
        before = [p.detach().clone() for p in model.parameters()]
        loss = model(*torch.randint(50, (2, 2, 8)))
        with cuda_graphs.Graph():
            scaler.scale(loss).backward(torch.tensor(factor))
            scaler.unscale_(chosen)
            apply_gradients(chosen, scaler, torch.tensor(float(factor == math.inf)))
        model.zero_grad()
        same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert (all(same), any(same)) == ((True, True) if factor == math.inf else (False, False))
        assert scaler.get_scale() == scale


def test_any_optimizer_skips_an_update_that_is_not_finite():
    """One that does not read found_inf by itself."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.NAdam([p]), torch.amp.GradScaler("cpu", enabled=False)
    for found_inf, changes in ((1.0, False), (0.0, True)):
        p.grad = torch.ones(2)
        apply_gradients(optimizer, scaler, torch.tensor(found_inf))
        assert (p[0] != 1, bool(optimizer.state)) == (changes, changes)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 3e-3)])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e9])
@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8)])
def test_iterations_in_each_dtype(shape, size, dtype, tolerance):
    """Against the polynomial of the singular values in float64. The size of gradients does not matter, nor do zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = orthogonalize((size * x).float(), dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), u * s[:, None] @ vt, rtol=0, atol=tolerance)
    assert not orthogonalize(torch.zeros(shape), dtype).any()
