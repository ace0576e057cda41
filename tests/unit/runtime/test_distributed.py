"""distributed.py in one process: how an update is divided, and what torchrun's environment must be."""

import atexit
import os
import re
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.nn.parallel import DistributedDataParallel

from config import (
    ModelConfig,
    ReportedByOtherRank,
    TrainConfig,
    UserError,
    first_line,
    record_failure,
)
from flatgpt.runtime.distributed import (
    SINGLE_PROCESS,
    DistributedContext,
    full_tensor,
    grad_sync,
    is_sharded,
    join_process_group,
    local_grad_sum,
    shard_like,
    wrap_model,
)
from model import GPT

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture
def set_ranks(monkeypatch):
    """set_ranks(rank, local_rank, world, local_world): torchrun's variables; None: unset."""

    def change(*values: object) -> None:
        for name, value in zip(VARIABLES, values, strict=True):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return change


def test_torchrun_ends_with_the_error_of_the_rank_that_failed(monkeypatch, tmp_path):
    """Not with that of a rank that it has stopped for it."""
    failures = {}
    for rank, text in ((1, "error: rank 0 has not responded"), (0, None)):
        file = str(tmp_path / f"{rank}.json")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        if text:
            record_failure(text)
        failures[rank] = ProcessFailure(rank, pid=7, exitcode=2 if text else -15, error_file=file)
    *_, last, frame = str(ChildFailedError("train.py", failures)).splitlines()
    assert (last.strip(), set(frame)) == ("traceback : error: rank 0 has not responded", {"="})
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no folder" / "error.json"))
    record_failure("a file that cannot be written is no second error")


@given(st.integers(1, 70), st.integers(1, 70), st.integers(2, 9))
def test_advice_is_the_same_update_if_there_is_one(batch_size, steps, world):
    """It has the largest batch that is not larger than the user's, as a device may have no memory for more."""
    assume(steps % world)
    with pytest.raises(UserError) as refused:
        TrainConfig(batch_size=batch_size, grad_accum_steps=steps).require_equal_shares(world)
    small, many = map(int, re.search(r"--batch_size (\d+) --grad_accum_steps (\d+) ", str(refused.value)).groups())
    total = batch_size * steps
    assert many % world == 0
    assert small <= batch_size
    assert small * many == next(n for n in range(total, total + world) if n % world == 0)
    assert not [b for b in range(small + 1, batch_size + 1) if small * many % (b * world) == 0]
    assert ("the same updates" in str(refused.value)) == (small * many == total)


@given(st.integers(1, 70), st.integers(1, 9))
def test_each_micro_batch_belongs_to_one_rank(steps, world):
    shares = [DistributedContext(rank, world).micro_batches(steps) for rank in range(world)]
    assert sorted(n for share in shares for n in share) == list(range(steps))
    assert max(map(len, shares)) - min(map(len, shares)) <= (steps % world > 0)


@pytest.mark.parametrize(
    ("values", "batch_size", "steps", "message"),
    [
        ((0, 0, 2, 2), 3, 1, r"= 1 .* all devices .* by 2: use .* 2 --grad_accum_steps 2 \(4 sequences, not 3\)"),
        ((0, 0, 4, 4), 4, 6, r"by 4: use --batch_size 3 --grad_accum_steps 8 \(the same updates\)"),
        ((None, None, 2, None), 4, 2, "WORLD_SIZE = 2: .* are inconsistent"),  # some clusters set WORLD_SIZE alone
        (("x", 0, 2, 1), 4, 2, "WORLD_SIZE = 2: .* are inconsistent"),
        ((2, 0, 2, 1), 4, 2, "WORLD_SIZE = 2: .* are inconsistent"),
    ],
)
def test_ranks_that_cannot_train_together_are_refused_before_any_work(set_ranks, values, batch_size, steps, message):
    set_ranks(*values)
    config = TrainConfig(batch_size=batch_size, grad_accum_steps=steps)
    with pytest.raises(UserError, match=message), join_process_group(config):
        pytest.fail("it joined")


def test_errors_that_all_ranks_know_are_reported_by_rank_0(set_ranks, monkeypatch, capsys):
    set_ranks(1, 1, 2, 2)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored afterwards
    with pytest.raises(ReportedByOtherRank), join_process_group(TrainConfig(grad_accum_steps=1)):
        pytest.fail("it joined")
    print("by a rank other than 0")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("values", [(None,) * 4, (0, 0, 1, 1)])
def test_a_single_process_makes_no_process_group(set_ranks, values):
    """Also if torchrun started it: collectives would only cost time."""
    set_ranks(*values)
    stdout = sys.stdout
    with join_process_group(TrainConfig(grad_accum_steps=3)) as ranks:
        assert ranks == SINGLE_PROCESS
        assert ranks.first
        assert not dist.is_initialized()
        assert sys.stdout is stdout
        value = torch.ones(2)
        assert ranks.sum(value) is value
        assert ranks.all_reduce_max(3, 1) == [3, 1]
        assert ranks.all_gather(5) == [5]
        assert (ranks.all(True), ranks.all(False)) == (True, False)
        assert ranks.run_on_rank0(lambda: 5) == 5
        ranks.require_equal({"dataset": "hash"})
        ranks.barrier()


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
NCCL = "NCCL error in: NCCLUtils.cpp:77, {}, NCCL version 2.27.3\n{}\nLast error:\n{}"
SHM = "Error while creating shared memory segment /dev/shm/nccl-8x2V (size 9637888)"


@pytest.mark.parametrize(
    ("error", "exited"),
    [
        (RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError(f"{GLOO}Read error [127.0.0.1]:4711: Connection reset by peer"), True),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), True),
        (dist.DistBackendError(NCCL.format("remote process exited or", "ncclRemoteError: A call failed", "-")), True),
        (
            dist.DistBackendError(NCCL.format("unhandled system error", "ncclSystemError: (e.g. socket, malloc)", SHM)),
            False,
        ),
        (dist.DistNetworkError("The server socket has failed to listen on any local network address"), False),
        (dist.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined."), False),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
        (RuntimeError("Broken pipe"), False),
        (RuntimeError(), False),
    ],
)
def test_only_known_errors_mean_that_another_rank_has_exited(set_ranks, monkeypatch, capsys, waits, error, exited):
    """Others keep their traceback: NCCL's for a small /dev/shm mentions sockets, too."""

    def leave(code: int):
        raise SystemExit(f"exit {code}")

    set_ranks(0, 0, 2, 2)
    monkeypatch.setattr(dist, "init_process_group", lambda *words, **more: None)
    monkeypatch.setattr(atexit, "register", lambda *words: None)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(BaseException) as left, join_process_group(TrainConfig(grad_accum_steps=2)):  # noqa: PT011
        raise error
    assert str(left.value) == "exit 1" if exited else left.value is error
    expected = f"rank 0: another rank has exited, so this one exits ({first_line(error)})\n"
    assert capsys.readouterr().err == expected * exited


# ---------------------------------------------------------------------------------------------------------------------
# one model on several ranks; with several processes: process/test_ranks.py


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_summed_in_the_last_micro_batch_only(group):
    """With fully_shard the flag is persistent: it has to be set again for the last one."""
    model, seen = DistributedDataParallel(torch.nn.Linear(2, 2)), []
    sharded = torch.nn.Linear(2, 2)
    sharded.set_requires_gradient_sync = seen.append
    for last in (False, True):
        with grad_sync(model, last):
            assert model.require_backward_grad_sync == last
        with grad_sync(sharded, last):
            assert seen.pop() is last


def test_other_tensors_are_unchanged():
    tensor = torch.ones(3)
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
