"""parallel.py in one process. With several: process/test_ranks.py."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import ModelConfig
from flatgpt.runtime.distributed import DistributedContext
from flatgpt.runtime.parallel import full_tensor, gradients, is_sharded, local_grad_sum, shard_like, wrap_model
from model import GPT


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_sums_gradients_in_the_last_micro_batch_only(group):
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    with gradients(model, last=False):
        assert not model.require_backward_grad_sync
    with gradients(model, last=True):
        assert model.require_backward_grad_sync
    assert model.require_backward_grad_sync


def test_fully_shard_sums_gradients_in_the_last_micro_batch_only():
    """The flag is persistent: it has to be set again for the last one."""
    seen = []
    model = torch.nn.Linear(2, 2)
    model.set_requires_gradient_sync = seen.append
    for last in (False, True):
        with gradients(model, last):
            assert seen.pop() is last
    assert not seen


def test_other_models_and_tensors_are_unchanged():
    with gradients(torch.nn.Linear(2, 2), last=False):
        pass
    tensor = torch.ones(3)
    assert not is_sharded(tensor)
    assert full_tensor(tensor) is tensor
    assert shard_like(tensor, like=torch.zeros(3)) is tensor


def test_sharded_tensors_are_gathered_and_sharded_again(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    full = torch.arange(6.0).reshape(3, 2)
    part = distribute_tensor(full, init_device_mesh("cpu", (1,)), [Shard(0)])
    assert is_sharded(part)
    assert type(full_tensor(part)) is torch.Tensor
    assert torch.equal(full_tensor(part), full)
    again = shard_like(full + 1, like=part)
    assert isinstance(again, DTensor)
    assert again.placements == part.placements
    assert torch.equal(again.to_local(), full + 1)


def test_local_grad_sum_shows_nonfinite_gradients(group):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=4, vocab_size=9))
    assert local_grad_sum(model) == 0.0
    ddp = wrap_model(model, DistributedContext(world=2), torch.device("cpu"), torch.float32, fsdp=False)
    assert all(p.grad is None for p in model.parameters()), "those of the pass that settles the buckets are removed"
    idx = torch.arange(4)[None]
    local_grad_sum(ddp)
    for weight, finite in ((1.0, True), (float("nan"), False), (1.0, True)):
        (weight * ddp(idx, idx)).backward()
        assert local_grad_sum(ddp).isfinite() == finite
        model.zero_grad()


def test_ddp_buckets_keep_one_order(group, monkeypatch):
    """Otherwise DDP sums the first gradients after a resume in another order than those of an uninterrupted run."""
    seen = []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda buffer, **more: seen.append(buffer.clone()) or real(buffer, **more))
    torch.manual_seed(0)
    config = ModelConfig(n_layer=3, n_head=2, n_embd=192, context_length=8, vocab_size=300)  # several buckets
    model = wrap_model(GPT(config), DistributedContext(world=2), torch.device("cpu"), torch.float32, fsdp=False)
    idx = torch.arange(8)[None]
    passes = []
    for _ in range(3):
        seen.clear()
        model(idx, idx).backward()
        passes.append(list(seen))
        model.zero_grad()
    assert len(passes[0]) > 1
    for later in passes[1:]:
        assert [len(bucket) for bucket in later] == [len(bucket) for bucket in passes[0]]
        assert all(torch.equal(a, b) for a, b in zip(passes[0], later, strict=True))
