"""Training one model on the devices of several ranks: DDP, or sharded with fully_shard."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatgpt.runtime.distributed import DistributedContext


def wrap_model(
    model: nn.Module, ranks: DistributedContext, device: torch.device, dtype: torch.dtype, fsdp: bool
) -> nn.Module:
    """Wrap a model with DDP, or shard it in place with fully_shard. A single rank gets the model itself.

    With fully_shard each rank keeps a shard of weights, optimizer state and reduced gradients. Weights are gathered for
    computation: those of attention and MLP modules in `dtype`, others in float32. Gradients are summed in float32.
    """
    if ranks.world == 1:
        return model
    return _shard(model, ranks, device, dtype) if fsdp else _wrap_with_ddp(model, device)


def _wrap_with_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers; 2.11 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    model.local_grad_sum = torch.zeros((), device=device)
    model.register_comm_hook(model.local_grad_sum, _sum)
    # After its first backward pass DDP rebuilds its buckets in the order of the gradients. Do that before any update:
    # otherwise a resumed run sums its first gradients in another order, which changes the result from three ranks up.
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
    model(ids, ids).backward()
    model.zero_grad(set_to_none=True)
    return model


def _shard(model: nn.Module, ranks: DistributedContext, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    param_dtype = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        for module in (block.attn, block.mlp):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, as with DDP
            module.set_force_sum_reduction_for_comms(True)  # Gloo has no other reduction
    return model


def local_grad_sum(model: nn.Module) -> Tensor | float:
    """Return the sum of this rank's gradients before their reduction, and reset it; 0 without DDP.

    It is not finite if any of these gradients is not.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    total = model.local_grad_sum.clone()
    model.local_grad_sum.zero_()
    return total


def _sum(local_grad_sum, bucket):  # DDP rejects annotations that are strings
    """A communication hook that sums gradients over ranks, where DDP would average them.

    Multiplying the losses by the number of ranks instead would make float16 overflow sooner: the scaler would then skip
    more updates on more devices.
    """
    local_grad_sum += bucket.buffer().sum()
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda done: done.value()[0])


@contextlib.contextmanager
def gradients(model: nn.Module, last: bool) -> Iterator[None]:
    """A context for forward and backward of a micro-batch. Gradients are summed over ranks in the last one only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard
        model.set_requires_gradient_sync(last)
    yield


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing that class, which takes 0.8 s."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every rank has to call it. Other tensors are returned unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as `like` is sharded; return it unchanged if `like` is not."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
