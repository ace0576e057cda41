"""One model on the devices of many ranks: DDP, or with fully_shard in parts."""

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
    """The model as the ranks train it together: DDP, or with `fsdp` in parts; the model itself for a single rank.

    DDP holds a copy of everything on each device. fully_shard changes the model in place: each rank keeps a part of
    weights, optimizer state and, once they are summed, gradients; what an attention or MLP needs is gathered when it is
    needed, in `dtype`, tables and LayerNorms in float32. Gradients are summed in float32.
    """
    if ranks.world == 1:
        return model
    if not fsdp:
        devices = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():  # 2.13 has another name for broadcast_buffers, which 2.11 does not know
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
        model.local_grad_sum = torch.zeros((), device=device)
        model.register_comm_hook(model.local_grad_sum, _sum)
        # After its first backward pass DDP lays out its buckets anew, as gradients came. Let that be before any update:
        # else a resumed run sums its first gradients in another order, from three ranks up with another result.
        nothing = torch.zeros((1, 1), dtype=torch.int64, device=device)
        model(nothing, nothing).backward()
        model.zero_grad(set_to_none=True)
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    low = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for part in model.modules():
        if hasattr(part, "unshard"):
            part.set_gradient_divide_factor(1.0)  # sums, as in DDP
            part.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
    return model


def local_grad_sum(model: nn.Module) -> Tensor | float:
    """A number that is finite as long as this rank's gradients were, before they were summed; 0 where nobody knows."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    taken = model.local_grad_sum.clone()
    model.local_grad_sum.zero_()
    return taken


def _sum(own, bucket):  # DDP does not accept annotations that are texts
    """Gradients of ranks added up, where DDP would take their mean; their sum on this rank goes to `own`.

    The mean of losses that were multiplied by `world` is no way out: in float16 they overflow sooner, and the scaler
    would skip more updates on more devices.
    """
    own += bucket.buffer().sum()
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda done: done.value()[0])


@contextlib.contextmanager
def gradients(model: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients are summed over ranks in the last one only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard's
        model.set_requires_gradient_sync(last)
    yield


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it only (a DTensor, whose class takes 0.8 s to import)."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks put together; every rank has to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `like` is; all of it where that is not sharded."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
