"""Distributed training and evaluation with DDP or fully_shard, on one machine or several.

Each rank has its own device and computes every world-th micro-batch of an update. NCCL reduces tensors on GPUs. All
other communication uses Gloo on the CPU, so that it never waits for a GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import EvalConfig, ReportedByOtherRank, TrainConfig, UserError, first_line, record_failure
from flatgpt.runtime.device import find_device

# What errors of Gloo, the TCP store and NCCL contain if another rank has exited.
PEER_EXITED = "closed by peer|reset by peer|broken pipe|got 0 bytes|ncclRemoteError"


@dataclass(frozen=True)
class DistributedContext:
    """Rank of this process, number of ranks (`world`), and collectives, which are no-ops for a single process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only rank that writes files and prints."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command that starts a script with this number of ranks."""
        if self.world == 1:
            return "python"
        command = f"torchrun --standalone --nproc_per_node={self.world}"
        return command if self.world == self.local_world else "torchrun ..."

    def micro_batches(self, grad_accum_steps: int) -> range:
        """Return the indices of the update's micro-batches that belong to this rank."""
        return range(self.rank, grad_accum_steps, self.world)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor on the CPU or on the ranks' devices."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Return the maximum over ranks of each number."""
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def all(self, condition: bool) -> bool:
        """Return whether the condition holds on every rank."""
        return not self.all_reduce_max(not condition)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_reduce_max(0)

    def poll_all(self, done: Callable[[], bool]) -> None:
        """Poll until done() is true on every rank. Waiting in a single collective would reach its timeout."""
        while not self.all(done()):
            time.sleep(0.02)

    def warn_once(self, text: str) -> None:
        """Print a line to standard error, on the first of the ranks that call this."""
        if _first_to_report(self, "warning"):
            print(text, file=sys.stderr)

    def all_gather(self, value: Any) -> list:
        """Return a list of the values of all ranks. Values have plain types."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def run_on_rank0(self, work: Callable[[], Any]) -> Any:
        """Call work() on rank 0 and return its result on every rank. UserError and OSError are raised on every rank."""
        if self.world == 1:
            return work()
        outcome = [None, None]  # result, error
        if self.first:
            try:
                outcome[0] = work()
            except (UserError, OSError) as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Raise UserError if a rank's values differ from those of rank 0. The message names the keys."""
        gathered = self.all_gather(facts)
        for rank, values in enumerate(gathered):
            if differing := [key for key, value in gathered[0].items() if values[key] != value]:
                raise UserError(
                    f"{', '.join(differing)} of rank {rank} is not that of rank 0: every machine must have the same "
                    "files and settings"
                )


SINGLE_PROCESS = DistributedContext()


def shorten_timeout(config: TrainConfig) -> None:
    """Set Gloo's timeout to config.rank_timeout. Called after the first update, in which ranks may still compile.

    NCCL keeps the longer timeout, so that Gloo's is reached first: after NCCL's, the unresponsive rank is unknown.
    """
    if dist.is_initialized():
        gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
        gloo._set_default_timeout(timedelta(seconds=config.rank_timeout))


@contextlib.contextmanager
def join_process_group(config: TrainConfig | EvalConfig) -> Iterator[DistributedContext]:
    """Join the process group of torchrun's ranks. An error on any rank is reported once and ends all ranks.

    Raises:
        UserError: there is no device for this rank, or the ranks cannot share an update equally.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield SINGLE_PROCESS
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    ranks = DistributedContext(*map(int, values)) if all(map(str.isdecimal, values)) else SINGLE_PROCESS
    if not (ranks.rank < ranks.world and ranks.local_rank < ranks.local_world <= ranks.world != 1):
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: {', '.join(names)} are inconsistent: start several ranks with "
            "torchrun, which sets them; for a single process, unset WORLD_SIZE"
        )
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        if isinstance(config, TrainConfig):
            config.require_equal_shares(ranks.world)
        device_type = find_device(config.device, ranks.local_rank).type
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's choice, not the user's
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // ranks.local_world))
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=2 * config.rank_timeout))  # until shorten_timeout
        atexit.register(_exit_without_finalizing, codes := [])
        try:
            yield ranks
        except SystemExit as stop:  # raised by all ranks
            dist.destroy_process_group()
            # Exit here instead of finalizing Python. The frames of this exception keep DDP alive. DDP would destroy
            # Gloo with the GIL held, and wait for a thread of Gloo that waits for the GIL (1 process in 10 hung).
            _exit_without_finalizing([stop.code])
        dist.destroy_process_group()
        codes.append(0)
    except UserError as error:
        if not _first_to_report(ranks, str(error.__cause__ or error)):  # without a rank's advice
            raise ReportedByOtherRank from None
        time.sleep(1)  # rank 0 holds the store that the other ranks still need
        raise
    except RuntimeError as error:
        reason = first_line(error)
        if not isinstance(error, dist.DistError) and "/gloo/" not in reason:
            raise
        unresponsive = dist.is_initialized() and re.search("timed? ?out", reason, re.IGNORECASE)
        if not unresponsive and not re.search(PEER_EXITED, str(error), re.IGNORECASE):
            raise
        what = "no response" if unresponsive else "another rank has exited, so this one exits"
        print(f"rank {ranks.rank}: {what} ({reason})", file=sys.stderr, flush=True)
        if unresponsive:
            advice = "; --resume continues from the last checkpoint, if any" * isinstance(config, TrainConfig)
            _report_unresponsive_ranks(ranks, config.rank_timeout, advice)
        time.sleep(3)  # torchrun reports the first process that exits as the cause, and ends the others
        os._exit(1)  # destroying a process group whose peers have exited can hang


def _exit_without_finalizing(codes: list[int]) -> None:
    """Flush the output, then exit with codes[0] if there is a code.

    DDP keeps Gloo's threads alive. A thread that frees a tensor while Python finalizes aborts the process (pytorch
    issue 190489).
    """
    with contextlib.suppress(OSError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    if codes:
        os._exit(codes[0])


def _first_to_report(ranks: DistributedContext, text: str) -> bool:
    """Return whether no other rank has reported this text yet."""
    if not dist.is_initialized():
        return ranks.local_rank == 0
    try:
        return dist.distributed_c10d._get_default_store().add(f"reported: {text}", 1) == 1
    except RuntimeError:  # rank 0 has exited, and the store with it
        return True


def _report_unresponsive_ranks(ranks: DistributedContext, seconds: float, advice: str) -> None:
    """Print the ranks that did not respond. The other ranks call this after their timeout."""
    store, missing = dist.distributed_c10d._get_default_store(), [0]  # rank 0 holds the store

    def query_store() -> None:
        store.set(f"waits {ranks.rank}", "")
        time.sleep(2)  # the timeouts of other ranks may expire later
        absent = [rank for rank in range(ranks.world) if not store.check([f"waits {rank}"])]
        missing[:] = absent if _first_to_report(ranks, "unresponsive") else []

    thread = threading.Thread(target=query_store, daemon=True)
    thread.start()
    thread.join(5)
    if missing:
        # Without the store, a rank cannot know who has reported: rank 1 prints the error, others print their rank.
        prefix = "error" if not thread.is_alive() or ranks.rank == 1 else f"rank {ranks.rank}"
        names = ", ".join(map(str, missing))
        text = f"rank {names} has not responded for {seconds:g} s (--rank_timeout): the process or its machine hangs"
        record_failure(text := f"{prefix}: {text}; the run ends{advice}")
        print(text, file=sys.stderr, flush=True)


def wrap_model(
    model: nn.Module, ranks: DistributedContext, device: torch.device, dtype: torch.dtype, fsdp: bool
) -> nn.Module:
    """Wrap a model with DDP, or shard it in place with fully_shard. For a single rank, return the model unchanged.

    With fully_shard, each rank keeps a shard of weights, optimizer state and summed gradients. Weights are gathered for
    computation: those of attention and MLP modules in `dtype`, others in float32. Gradients are summed in float32.
    """
    if ranks.world == 1:
        return model
    if fsdp:
        return _shard(model, ranks, device, dtype)
    devices = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers; 2.11 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    model.local_grad_sum = torch.zeros((), device=device)
    model.register_comm_hook(model.local_grad_sum, _sum)
    # After its first backward pass, DDP rebuilds its buckets in the order of the gradients. Do that before any update:
    # otherwise a resumed run sums its first gradients in another order, which changes results with three or more ranks.
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
            module.set_force_sum_reduction_for_comms(True)  # Gloo supports no other reduction
    return model


def local_grad_sum(model: nn.Module) -> Tensor | float:
    """Return the sum of this rank's gradients before their reduction, and reset it; 0 without DDP.

    The sum is not finite if any of these gradients is not finite.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    total = model.local_grad_sum.clone()
    model.local_grad_sum.zero_()
    return total


def _sum(local_grad_sum, bucket):  # DDP rejects annotations that are strings
    """Sum gradients over ranks, as a communication hook. By default, DDP averages them.

    Multiplying the losses by the number of ranks instead would make float16 overflow sooner, so that the scaler would
    skip more updates.
    """
    local_grad_sum += bucket.buffer().sum()
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda done: done.value()[0])


def grad_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Return a context for forward and backward of a micro-batch. Gradients are summed over ranks if it is the last."""
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor. Importing that class would take 0.8 s."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every rank must call this. Other tensors are returned unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as `like` is sharded; return it unchanged if `like` is not."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
