"""peer.py: nanoGPT's model gets our batches, in order, and is trained as its own train.py trains it."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from in_process import TINY
from stand_in import nanogpt
from torch.nn import functional as F

from config import BenchConfig, UserError
from flatgpt.benchmarks import nanogpt as peer
from flatgpt.cli import cli
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset
from flatgpt.runtime.device import DeviceSettings

EAGER = DeviceSettings(torch.device("cpu"), torch.float32, False, {})


@pytest.fixture
def config(tiny_data):
    """Resolved, with two micro-batches an update."""
    words = ["train", *TINY, "--grad_accum_steps", "2", "--no-bias", "--peer", "nanoGPT", str(nanogpt(tiny_data / "n"))]
    return dataclasses.replace(cli.parse(BenchConfig, words), vocab_size=257)


def ours(config) -> TrainingBatches:
    windows = Windows(open_dataset(Path("data/tiny")).tokens("train"), config.context_length)
    return TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)


def test_batches_are_ours_in_order(config):
    update = peer.make_update(config, EAGER)
    for _ in range(3):
        update()
    seen, batches = sys.modules["nanogpt_model"].SEEN, ours(config)
    assert len(seen) == 6
    for (x, y, _), (i, micro) in zip(seen, ((i, m) for i in range(3) for m in range(2)), strict=True):
        expected = batches(i, micro)
        assert (x.numpy() == expected[0]).all()
        assert (y.numpy() == expected[1]).all()


def test_update_is_the_clipped_mean_gradient(config):
    update = peer.make_update(config, EAGER)
    model, batches = sys.modules["nanogpt_model"].GPT.made, ours(config)
    for i in range(2):  # the second would have the first one's gradient too, were that not taken away
        with torch.no_grad():
            model.head.weight.mul_((0.1, 200)[i])
        before = [p.detach().clone().requires_grad_() for p in model.parameters()]
        pairs = [map(torch.from_numpy, (a.copy() for a in batches(i, micro))) for micro in range(2)]
        losses = [F.cross_entropy((before[0][x] @ before[1].T).flatten(0, 1), y.flatten()) for x, y in pairs]
        gradients = torch.autograd.grad(sum(losses) / 2, before)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert (norm > 1) == (i == 1)  # the first is short enough to stay as it is
        update()
        for was, gradient, now in zip(before, gradients, model.parameters(), strict=True):
            torch.testing.assert_close(now.detach(), was.detach() - gradient / max(1, norm), atol=1e-5, rtol=1e-4)


def test_shape_and_optimizer_are_asked_of_its_own_code(config):
    peer.make_update(config, EAGER)
    model = sys.modules["nanogpt_model"].GPT.made
    expected = {"block_size": 32, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32}
    assert dataclasses.asdict(model.config) == expected | {"dropout": 0.0, "bias": False}
    assert model.asked == (0.1, 2e-3, (0.9, 0.99), "cpu")


def test_autocast_is_put_around_it_where_it_is_asked_for(config):
    for dtype, on in ((torch.float32, False), (torch.bfloat16, True)):
        peer.make_update(config, DeviceSettings(torch.device("cpu"), dtype, False, {}))()
        assert {autocast for _, _, autocast in sys.modules["nanogpt_model"].SEEN} == {on}


def test_gpt2s_vocabulary_is_rounded_up_as_nanogpt_does():
    assert [peer.their_vocab_size(v) for v in (257, 50257, 50304, 50281)] == [257, 50304, 50304, 50281]


def test_on_a_cpu_as_its_train_py_and_at_its_best(config):
    ways = peer.ways(config)
    assert list(ways) == ["nanoGPT", "nanoGPT_best"]
    assert (ways["nanoGPT"].dtype, ways["nanoGPT"].compile) == (torch.float32, False)
    assert ways["nanoGPT_best"].compile


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--activation", "relu"], "activation = relu"),
        (["--no-tie_weights"], "tie_weights = false"),
        (["--position", "rope"], "position = rope"),
        (["--mlp_ratio", "2"], r"mlp_ratio = 2\.0"),
        (["--attn_bias", "false"], "attn_bias = false"),
        (["--no-bias", "--attn_bias", "true"], "attn_bias = true"),
    ],
)
def test_what_its_model_lacks_is_refused_by_name(words, said):
    with pytest.raises(UserError, match=said):
        peer.require_same(cli.parse(BenchConfig, words), 1)


def test_what_its_model_has_is_taken():
    for words in (["--activation", "gelu"], ["--dropout", "0.2"], ["--no-bias", "--attn_bias", "false"]):
        peer.require_same(cli.parse(BenchConfig, words), 1)


def test_several_ranks_are_refused():
    with pytest.raises(UserError, match="torchrun started 2"):
        peer.require_same(BenchConfig(), 2)


def test_a_folder_without_its_files_is_refused(config, tmp_path):
    assert peer.folder(config, "model.py") == Path(config.peer[1])
    (Path(config.peer[1]) / "train.py").unlink()
    with pytest.raises(UserError, match=r"no train\.py"):
        peer.folder(config, "model.py", "train.py")


def test_a_process_of_its_own(config):
    with peer.Peer("nanoGPT", config, EAGER) as process:
        first = process.run(1)
        start = process.facts["start_s"]
        times = process.run(3)
        assert (len(first), len(times)) == (1, 3)
        assert min(times) > 0
        assert start is None or 1e-3 * first[0] < start  # it includes that update
        assert process.facts["start_s"] == start
        assert 0.05 < process.facts["peak_mem_gb"] < 5
        assert process.facts["machine"].endswith("float32, eager")
        assert "ms" not in process.facts
    assert process._process.returncode is not None


def test_one_that_ends_says_why_and_has_the_users_environment(config, monkeypatch):
    """What runtime.py sets for us is not there, although this process has it."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setitem(peer.ENVIRONMENT, "SAY_THP", "1")
    monkeypatch.delitem(peer.ENVIRONMENT, "THP_MEM_ALLOC_ENABLE", raising=False)  # the user's own
    with (
        peer.Peer("nanoGPT", config, EAGER) as process,
        pytest.raises(UserError, match="peer = nanoGPT ended: THP is not set"),
    ):
        process.run(2)


@pytest.mark.slow
def test_compiled(config):
    compiled = DeviceSettings(torch.device("cpu"), torch.bfloat16, True, {})
    with peer.Peer("nanoGPT_best", config, compiled) as process:
        assert len(process.run(2)) == 2
        assert process.facts["machine"].endswith("bfloat16, compiled")


@pytest.mark.gpu
def test_on_cuda_as_its_train_py(config):
    ((name, how),) = peer.ways(dataclasses.replace(config, device="cuda")).items()
    assert how.compile
    assert how.dtype != torch.float32
    with peer.Peer(name, config, how) as process:
        assert len(process.run(3)) == 3
        assert process.facts["peak_mem_gb"] > 0
