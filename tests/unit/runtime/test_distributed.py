"""distributed.py in one process: how an update is divided, and what torchrun's environment must be."""

import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from config import ReportedByOtherRank, TrainConfig, UserError
from flatgpt.runtime.device import find_device
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext, equal_pair, join_process_group

WORLD = st.integers(1, 9)
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


@pytest.mark.parametrize(
    ("batch_size", "steps", "world", "pair"),
    [
        (16, 1, 2, (8, 2)),
        (12, 40, 8, (12, 40)),
        (4, 3, 2, (3, 4)),  # not (6, 2): a device may have no memory for a larger batch than was asked for
        (3, 1, 2, (2, 2)),  # 3 sequences become 4
        (1, 1, 8, (1, 8)),
    ],
)
def test_equal_pair_examples(batch_size, steps, world, pair):
    assert equal_pair(batch_size, steps, world) == pair


@given(st.integers(1, 70), st.integers(1, 70), WORLD)
def test_equal_pair_is_the_same_update_if_there_is_one(batch_size, steps, world):
    total, (small, many) = batch_size * steps, equal_pair(batch_size, steps, world)
    assert many % world == 0
    assert small <= batch_size
    assert small * many == next(n for n in range(total, total + world) if n % world == 0)
    larger = range(small + 1, batch_size + 1)
    assert not [b for b in larger if small * many % (b * world) == 0], "the largest batch is taken"
    if steps % world == 0:
        assert (small, many) == (batch_size, steps)


@given(st.integers(1, 70), WORLD)
def test_each_micro_batch_belongs_to_one_rank(steps, world):
    shares = [DistributedContext(rank, world).micro_batches(steps) for rank in range(world)]
    assert sorted(n for share in shares for n in share) == list(range(steps))
    assert max(map(len, shares)) - min(map(len, shares)) <= (steps % world > 0)


@pytest.mark.parametrize(
    ("values", "batch_size", "steps", "message"),
    [
        (
            (0, 0, 2, 2),
            16,
            1,
            r"steps = 1 .* all devices .* by 2: take --batch_size 8 --grad_accum_steps 2 \(the same",
        ),
        ((0, 0, 2, 2), 3, 1, r"by 2: take --batch_size 2 --grad_accum_steps 2 \(4 sequences, not 3\)"),
        ((0, 0, 4, 4), 4, 6, r"by 4: take --batch_size 3 --grad_accum_steps 8 \(the same updates\)"),
        ((None, None, 2, None), 4, 2, "WORLD_SIZE = 2, .* do not fit"),  # some clusters set WORLD_SIZE alone
        (("x", 0, 2, 1), 4, 2, "WORLD_SIZE = 2, .* do not fit"),
        ((0, 0, 2, 0), 4, 2, "WORLD_SIZE = 2, .* do not fit"),
        ((2, 0, 2, 1), 4, 2, "WORLD_SIZE = 2, .* do not fit"),
    ],
)
def test_ranks_that_cannot_train_together_are_refused_before_any_work(set_ranks, values, batch_size, steps, message):
    set_ranks(*values)
    config = TrainConfig(batch_size=batch_size, grad_accum_steps=steps)
    join = join_process_group(config, lambda *words: pytest.fail("a device was searched for"))
    with pytest.raises(UserError, match=message), join:
        pytest.fail("it joined")


def test_errors_that_all_ranks_know_are_reported_by_rank_0(set_ranks, monkeypatch, capsys):
    set_ranks(1, 1, 2, 2)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored afterwards
    with pytest.raises(ReportedByOtherRank), join_process_group(TrainConfig(grad_accum_steps=1), find_device):
        pytest.fail("it joined")
    print("by a rank other than 0")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("values", [(None,) * 4, (0, 0, 1, 1)])
def test_a_single_process_makes_no_process_group(set_ranks, values):
    """Also if torchrun started it: collectives would only cost time."""
    set_ranks(*values)
    stdout = sys.stdout
    with join_process_group(TrainConfig(grad_accum_steps=3), find_device) as ranks:
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
