"""muon.py against torch.optim.Muon, which takes one matrix at a time, and against singular values."""

import copy

import pytest
import torch

from flatgpt.training.muon import Muon, orthogonalized

SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32), (24, 8), (8, 8)]  # the first of a kind has three parts, as c_attn


def matrices(seed: int = 0) -> list[torch.nn.Parameter]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def groups(params: list) -> list[dict]:
    return [
        {"params": [p for p in params if len(p) == 24], "parts": 3},
        {"params": [p for p in params if len(p) != 24]},
    ]


def give_gradients(params: list, seed: int) -> None:
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_torch_which_takes_each_matrix_by_itself(momentum):
    params = matrices()
    ours = Muon(groups(params), lr=0.02, weight_decay=0.1, momentum=momentum)
    parts = [torch.nn.Parameter(m.clone()) for p in params for m in p.detach().split(8 if len(p) == 24 else len(p))]
    theirs = torch.optim.Muon(
        parts, lr=0.02, weight_decay=0.1, momentum=momentum, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step, lr in enumerate((0.02, 0.05, 0.01)):
        give_gradients(params, seed=step)
        grads = [m for p in params for m in p.grad.split(8 if len(p) == 24 else len(p))]
        for part, grad in zip(parts, grads, strict=True):
            part.grad = grad.clone()
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = lr
        ours.step()
        theirs.step()
        found = torch.cat([p.detach().flatten() for p in params])
        torch.testing.assert_close(
            found, torch.cat([p.detach().flatten() for p in parts]), rtol=0, atol=1e-2 * lr
        )  # bfloat16


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalized(1e-3 * torch.randn(shape)).float())
    assert singular.max() < 1.3
    assert singular.median() > 0.65


def test_no_gradient_is_no_step():
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8, dtype=torch.bfloat16))
    params = matrices()
    optimizer = Muon(groups(params), lr=0.1, weight_decay=0.1, momentum=0.9)
    before = params[2].detach().clone()
    give_gradients(params, seed=0)
    params[2].grad = None
    optimizer.step()
    assert torch.equal(params[2], before)
    assert not torch.equal(params[3], matrices()[3])


def test_a_step_left_out_leaves_no_trace():
    """Gradients that are not finite among them: weights and means stay, and what follows is as if it had not been."""
    skipping, other = matrices(), matrices()
    optimizers = [Muon(groups(params), lr=0.1, weight_decay=0.1, momentum=0.9) for params in (skipping, other)]
    for params, optimizer in zip((skipping, other), optimizers, strict=True):
        give_gradients(params, seed=1)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    before = copy.deepcopy((skipping, optimizers[0].state_dict()["state"]))
    give_gradients(skipping, seed=2)
    skipping[0].grad[0, 0], skipping[1].grad[0, 0] = torch.nan, torch.inf
    optimizers[0].found_inf = torch.ones(())
    optimizers[0].step()
    torch.testing.assert_close((skipping, optimizers[0].state_dict()["state"]), before, rtol=0, atol=0)
    for params, optimizer in zip((skipping, other), optimizers, strict=True):
        give_gradients(params, seed=3)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    torch.testing.assert_close(skipping, other, rtol=0, atol=0)


def test_its_state_goes_on():
    params, others = matrices(), matrices()
    first = Muon(groups(params), lr=0.1, weight_decay=0.1, momentum=0.9)
    give_gradients(params, seed=1)
    first.step()
    second = Muon(groups(others), lr=0.1, weight_decay=0.1, momentum=0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    for each, optimizer in ((params, first), (others, second)):
        give_gradients(each, seed=2)
        optimizer.step()
    torch.testing.assert_close(params, others, rtol=0, atol=0)
