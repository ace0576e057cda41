"""The processes that train or score one model: one, or those that torchrun starts, on one machine or several.

Each rank has a device of its own and takes every world-th micro-batch of an update. What ranks agree on goes over the
CPU (Gloo), so that it never waits for a GPU; gradients and losses go over NCCL where there are GPUs.
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
    """Who this process is among `world`; without torchrun the only one, for whom nothing here costs anything."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those on this machine
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command in front of train.py that starts as many ranks again."""
        if self.world == 1:
            return "python"
        return (
            f"torchrun --standalone --nproc_per_node={self.world}" if self.world == self.local_world else "torchrun ..."
        )

    def describe(self, fsdp: bool) -> str:
        """For the end of a line; empty for a single rank."""
        return f"; {self.world} ranks, {'fully_shard' if fsdp else 'DDP'}" if self.world > 1 else ""

    def micro_batches(self, grad_accum_steps: int) -> range:
        """This rank's micro-batches of an update, by their number among all."""
        return range(self.rank, grad_accum_steps, self.world)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the CPU or on the ranks' devices."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Of each of these numbers the largest that a rank has: how they agree to stop."""
        if self.world == 1:
            return list(numbers)
        box = torch.tensor(numbers)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def all(self, yes: bool) -> bool:
        """Whether it is so on every rank."""
        return not self.all_reduce_max(not yes)[0]

    def barrier(self) -> None:
        """Until all ranks have come here."""
        self.all_reduce_max(0)

    def poll_all(self, done: Callable[[], bool]) -> None:
        """Until it is done on every rank: by asking, as no single collective may take as long as that can."""
        while not self.all(done()):
            time.sleep(0.02)

    def all_gather(self, value: Any) -> list:
        """The values that all ranks have here, by rank; plain types."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def run_on_rank0(self, work: Callable[[], Any]) -> Any:
        """What rank 0 gets from work(), on every rank; the others wait. A UserError or OSError there is everyone's."""
        if self.world == 1:
            return work()
        box = [None, None]
        if self.first:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = str(error)
            except OSError as why:
                box[1] = f"{why.filename or 'a file'}: {why.strerror or why}"
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Raise UserError, with the key, where ranks (on other machines, say) have another value than rank 0."""
        gathered = self.all_gather(facts)
        for rank, values in enumerate(gathered):
            if differing := [key for key, value in gathered[0].items() if values[key] != value]:
                raise UserError(
                    f"{', '.join(differing)} of rank {rank} is not that of rank 0: every machine has to have the same "
                    "files and settings"
                )


SINGLE_PROCESS = DistributedContext()


def equal_pair(batch_size: int, grad_accum_steps: int, world: int) -> tuple[int, int]:
    """(batch_size, grad_accum_steps) of the same update, as near as can be, that `world` ranks can share.

    Sequences per update stay where `world` divides them, else become the next multiple of it.
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
    """After the first update: from now on ranks wait for each other only as long as rank_timeout says.

    NCCL keeps the longer limit, so that what is heard first is Gloo's, which can say who is missing.
    """
    if dist.is_initialized():
        gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
        gloo._set_default_timeout(timedelta(seconds=config.rank_timeout))


@contextlib.contextmanager
def join_process_group(
    config: TrainConfig | EvalConfig, find_device: Callable[[str, int], torch.device]
) -> Iterator[DistributedContext]:
    """The ranks that torchrun started, joined; a mistake on any of them is said once and ends all.

    Args:
        find_device: of config.device and the local rank.

    Raises:
        UserError: no device for this rank, or an update that cannot be shared by so many.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [os.environ[name] for name in names if name in os.environ]
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    whole_numbers = len(given) == 4 and all(word.isdecimal() for word in given)
    ranks = DistributedContext(*map(int, given)) if several and whole_numbers else SINGLE_PROCESS
    if several and not (ranks.rank < ranks.world and ranks.local_rank < ranks.local_world <= ranks.world != 1):
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, and {', '.join(names)} do not fit each other: start several "
            "ranks with torchrun, which sets them, and a single one with WORLD_SIZE unset"
        )
    if ranks.world == 1:
        yield ranks
        return
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what the first says is enough, to the end
    try:
        if isinstance(config, TrainConfig):
            _require_equal_shares(config, ranks.world)
        device_type = find_device(config.device, ranks.local_rank).type
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's choice, not the user's
            torch.set_num_threads(max(1, _cores() // ranks.local_world))
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        longer = timedelta(seconds=2 * config.rank_timeout)  # in the first update some ranks still compile
        dist.init_process_group(backend, timeout=longer)
        atexit.register(_leave, codes := [])
        try:
            yield ranks
        except SystemExit as stop:  # agreed upon
            dist.destroy_process_group()
            # Here and not at the end of Python: DDP, which the frames of this exception hold, would take Gloo down with
            # the interpreter's lock held, and wait for a thread of Gloo's that waits for that lock (one in 10 did).
            _leave([stop.code])
        dist.destroy_process_group()
        codes.append(0)
    except UserError as error:
        if not _first_to_say(ranks, str(error)):
            raise ReportedByOtherRank from None
        if ranks.world > 1:
            time.sleep(1)  # the store that the others ask goes with rank 0
        raise
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        if re.search("timed? ?out", first_line, re.IGNORECASE):
            goes_on = ", and goes on from its last checkpoint with --resume" * isinstance(config, TrainConfig)
            report_unresponsive_ranks(ranks, config.rank_timeout, goes_on)
        elif not _peer_is_gone(error):
            raise
        else:
            print(f"rank {ranks.rank}: another rank is gone, leaving ({first_line})", file=sys.stderr)
        time.sleep(3)  # torchrun names as the cause whoever leaves first, and ends the others
        os._exit(1)  # at once: a process group whose peers are gone can hang while it is taken down


def _leave(codes: list[int]) -> None:
    """End the process with its code, where it comes to its end, without taking Python down.

    DDP keeps Gloo's threads alive, and one that lets go of a tensor meanwhile aborts it (pytorch issue 190489).
    """
    with contextlib.suppress(OSError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    if codes:
        os._exit(codes[0])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_to_say(ranks: DistributedContext, text: str) -> bool:
    """Whether no other rank has said this yet."""
    if not dist.is_initialized():
        return ranks.local_rank == 0
    try:
        return dist.distributed_c10d._get_default_store().add(f"said: {text}", 1) == 1
    except RuntimeError:  # the store went with rank 0
        return True


def report_unresponsive_ranks(ranks: DistributedContext, seconds: float, goes_on: str) -> None:
    """Say which rank the others have waited for in vain: every one of these comes here, that one does not."""
    store, silent = dist.distributed_c10d._get_default_store(), [0]  # a store that does not answer is rank 0's

    def ask() -> None:
        store.set(f"waits {ranks.rank}", "")
        time.sleep(2)  # for the others' clocks to come to the same end
        missing = [rank for rank in range(ranks.world) if not store.check([f"waits {rank}"])]
        silent[:] = missing if _first_to_say(ranks, "silent") else []

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(5)
    if silent:
        # where no store counts who has said it, one of them speaks to the user
        speaker = "error" if not asking.is_alive() or ranks.rank == 1 else f"rank {ranks.rank}"
        print(
            f"{speaker}: rank {', '.join(map(str, silent))} has not answered for {seconds:g} s (--rank_timeout): it "
            f"hangs, or its machine does; the run ends{goes_on}",
            file=sys.stderr,
            flush=True,
        )


def _peer_is_gone(error: RuntimeError) -> bool:
    words = ("closed by peer", "reset by peer", "Broken pipe", "ocket", "recvValue", "sendBytes")  # Gloo and the store
    return any(word in str(error) for word in (*words, "ncclRemoteError", "remote process exited"))
