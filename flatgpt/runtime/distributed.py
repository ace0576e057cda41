"""Ranks: the processes that train or score one model, on one machine or several.

Each rank has its own device and takes every world-th micro-batch of an update. Gradients and losses travel over NCCL
between GPUs. Everything else travels over Gloo on the CPU, so that it never waits for a GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from config import EvalConfig, ReportedByOtherRank, TrainConfig, UserError


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process among `world` ranks, and their collectives, which are no-ops for a single process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command that starts a script with as many ranks."""
        if self.world == 1:
            return "python"
        return (
            f"torchrun --standalone --nproc_per_node={self.world}" if self.world == self.local_world else "torchrun ..."
        )

    def describe(self, fsdp: bool) -> str:
        """Return the number of ranks as the end of a line; empty for a single rank."""
        return f"; {self.world} ranks, {'fully_shard' if fsdp else 'DDP'}" if self.world > 1 else ""

    def micro_batches(self, grad_accum_steps: int) -> range:
        """Return the indices of this rank's micro-batches among those of an update."""
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
        """Poll until done() holds on every rank. A single collective that took as long would reach its timeout."""
        while not self.all(done()):
            time.sleep(0.02)

    def all_gather(self, value: Any) -> list:
        """Return the values of all ranks, by rank; plain types."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def run_on_rank0(self, work: Callable[[], Any]) -> Any:
        """Call work() on rank 0 and return its result on every rank. Its UserError or OSError is raised on all."""
        if self.world == 1:
            return work()
        message = [None, None]  # result, error
        if self.first:
            try:
                message[0] = work()
            except UserError as error:
                message[1] = str(error)
            except OSError as error:
                message[1] = f"{error.filename or 'a file'}: {error.strerror or error}"
        dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        if message[1] is not None:
            raise UserError(message[1])
        return message[0]

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Raise UserError with the keys whose values differ from those of rank 0, on another machine for example."""
        gathered = self.all_gather(facts)
        for rank, values in enumerate(gathered):
            if differing := [key for key, value in gathered[0].items() if values[key] != value]:
                raise UserError(
                    f"{', '.join(differing)} of rank {rank} is not that of rank 0: every machine has to have the same "
                    "files and settings"
                )


SINGLE_PROCESS = DistributedContext()


def equal_pair(batch_size: int, grad_accum_steps: int, world: int) -> tuple[int, int]:
    """Return the (batch_size, grad_accum_steps) nearest to the given pair that `world` ranks can share.

    The sequences per update stay the same if `world` divides them, else become the next multiple of it.
    """
    total = -(-batch_size * grad_accum_steps // world) * world
    steps = next(n for n in range(world, total + 1, world) if total % n == 0 and total // n <= batch_size)
    return total // steps, steps


def _require_equal_shares(config: TrainConfig, world: int) -> None:
    if config.grad_accum_steps % world:
        batch_size, steps = equal_pair(config.batch_size, config.grad_accum_steps, world)
        total = config.batch_size * config.grad_accum_steps
        same = "the same updates" if batch_size * steps == total else f"{batch_size * steps} sequences, not {total}"
        raise UserError(
            f"grad_accum_steps = {config.grad_accum_steps} counts the passes of all devices together and cannot be "
            f"shared by {world}: take --batch_size {batch_size} --grad_accum_steps {steps} ({same})"
        )


def shorten_timeout(config: TrainConfig) -> None:
    """Set Gloo's timeout to config.rank_timeout; called after the first update, in which ranks may still compile.

    NCCL keeps the longer timeout, so that Gloo's is reached first: only there the missing rank is known.
    """
    if dist.is_initialized():
        gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
        gloo._set_default_timeout(timedelta(seconds=config.rank_timeout))


@contextlib.contextmanager
def join_process_group(
    config: TrainConfig | EvalConfig, find_device: Callable[[str, int], torch.device]
) -> Iterator[DistributedContext]:
    """Join the ranks that torchrun started. An error on any of them is reported once and ends all.

    Args:
        find_device: called with config.device and the local rank.

    Raises:
        UserError: there is no device for this rank, or the ranks cannot share an update equally.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    complete = all(value.isdecimal() for value in values)
    ranks = DistributedContext(*map(int, values)) if several and complete else SINGLE_PROCESS
    if several and not (ranks.rank < ranks.world and ranks.local_rank < ranks.local_world <= ranks.world != 1):
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, and {', '.join(names)} do not fit each other: start several "
            "ranks with torchrun, which sets them, and a single one with WORLD_SIZE unset"
        )
    if ranks.world == 1:
        yield ranks
        return
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        if isinstance(config, TrainConfig):
            _require_equal_shares(config, ranks.world)
        device_type = find_device(config.device, ranks.local_rank).type
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's choice, not the user's
            torch.set_num_threads(max(1, _cores() // ranks.local_world))
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        longer = timedelta(seconds=2 * config.rank_timeout)  # until shorten_timeout
        dist.init_process_group(backend, timeout=longer)
        atexit.register(_leave, codes := [])
        try:
            yield ranks
        except SystemExit as stop:  # which all ranks raise
            dist.destroy_process_group()
            # Exit here, not at the end of Python: DDP, which the frames of this exception hold, would destroy Gloo with
            # the GIL held, and wait for a thread of Gloo that waits for the GIL (one process in 10 did).
            _leave([stop.code])
        dist.destroy_process_group()
        codes.append(0)
    except UserError as error:
        if not _first_to_report(ranks, str(error)):
            raise ReportedByOtherRank from None
        time.sleep(1)  # rank 0 holds the store that the others ask
        raise
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        if re.search("timed? ?out", first_line, re.IGNORECASE):
            advice = ", and goes on from its last checkpoint with --resume" * isinstance(config, TrainConfig)
            report_unresponsive_ranks(ranks, config.rank_timeout, advice)
        elif not _peer_is_gone(error):
            raise
        else:
            print(f"rank {ranks.rank}: another rank is gone, leaving ({first_line})", file=sys.stderr)
        time.sleep(3)  # torchrun reports the first process that exits as the cause, and ends the others
        os._exit(1)  # destroying a process group whose peers are gone can hang


def _leave(codes: list[int]) -> None:
    """Exit with a code, if there is one, without finalizing Python.

    DDP keeps Gloo's threads alive, and one that frees a tensor during finalization aborts the process (pytorch issue
    190489).
    """
    with contextlib.suppress(OSError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    if codes:
        os._exit(codes[0])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_to_report(ranks: DistributedContext, text: str) -> bool:
    """Return whether no other rank has reported this text yet."""
    if not dist.is_initialized():
        return ranks.local_rank == 0
    try:
        return dist.distributed_c10d._get_default_store().add(f"reported: {text}", 1) == 1
    except RuntimeError:  # rank 0 has ended, and the store with it
        return True


def report_unresponsive_ranks(ranks: DistributedContext, seconds: float, advice: str) -> None:
    """Print which ranks the others waited for in vain. All ranks but those call this, after their timeout."""
    store, missing = dist.distributed_c10d._get_default_store(), [0]  # rank 0 holds the store

    def ask_store() -> None:
        store.set(f"waits {ranks.rank}", "")
        time.sleep(2)  # the timeouts of other ranks may end later
        absent = [rank for rank in range(ranks.world) if not store.check([f"waits {rank}"])]
        missing[:] = absent if _first_to_report(ranks, "unresponsive") else []

    thread = threading.Thread(target=ask_store, daemon=True)
    thread.start()
    thread.join(5)
    if missing:
        # Without the store, it is unknown who has reported: rank 1 prints the error, others a line with their rank.
        prefix = "error" if not thread.is_alive() or ranks.rank == 1 else f"rank {ranks.rank}"
        print(
            f"{prefix}: rank {', '.join(map(str, missing))} has not answered for {seconds:g} s (--rank_timeout): it "
            f"hangs, or its machine does; the run ends{advice}",
            file=sys.stderr,
            flush=True,
        )


def _peer_is_gone(error: RuntimeError) -> bool:
    words = ("closed by peer", "reset by peer", "Broken pipe", "ocket", "recvValue", "sendBytes")  # Gloo and the store
    return any(word in str(error) for word in (*words, "ncclRemoteError", "remote process exited"))
