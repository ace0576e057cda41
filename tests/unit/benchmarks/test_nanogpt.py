"""nanogpt.py: nanoGPT's model gets our batches in order, and is trained as its own train.py trains it."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from in_process import TINY
from stand_in import nanogpt_checkout
from torch.nn import functional as F

from config import BenchConfig, UserError
from flatgpt.benchmarks import nanogpt
from flatgpt.cli import cli
from flatgpt.data.dataset import TrainingBatches, Windows, open_dataset
from flatgpt.runtime.device import DeviceSettings


@pytest.fixture
def config(tiny_data):
    """Resolved, with two micro-batches per update."""
    words = ["train", *TINY, "--grad_accum_steps", "2", "--no-bias"]
    words += ["--peer", "nanoGPT", str(nanogpt_checkout(tiny_data / "n"))]
    return dataclasses.replace(cli.parse(BenchConfig, words), vocab_size=257)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_update_is_the_clipped_mean_gradient_of_our_batches(config, dtype):
    """Its own code makes the model and the optimizer, SGD at lr 1. Autocast is on in bfloat16."""
    update = nanogpt.make_update(config, DeviceSettings(torch.device("cpu"), dtype, False, {}))
    module, exact = sys.modules["nanogpt_model"], dtype == torch.float32
    model = module.GPT.made
    shape = {"block_size": 32, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32}
    assert dataclasses.asdict(model.config) == shape | {"dropout": 0.0, "bias": False}
    assert model.optimizer_words == (0.1, 2e-3, (0.9, 0.99), "cpu")
    windows = Windows(open_dataset(Path("data/tiny")).tokens("train"), config.context_length)
    batches = TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)
    for i in range(2):  # the second would have the first one's gradient too, were that not taken away
        with torch.no_grad():
            model.head.weight.mul_((0.1, 200)[i])
        before = [p.detach().clone().requires_grad_() for p in model.parameters()]
        pairs = [tuple(torch.from_numpy(a.copy()) for a in batches(i, micro)) for micro in range(2)]
        update()
        for (x, y), (seen_x, seen_y, autocast) in zip(pairs, module.SEEN[2 * i :], strict=True):
            assert torch.equal(x, seen_x)
            assert torch.equal(y, seen_y)
            assert autocast != exact
        losses = [F.cross_entropy((before[0][x] @ before[1].T).flatten(0, 1), y.flatten()) for x, y in pairs]
        gradients = torch.autograd.grad(sum(losses) / 2, before)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert (norm > 1) == (i == 1)  # the first is short enough to stay as it is
        for was, gradient, now in zip(before, gradients, model.parameters(), strict=True):
            expected = was.detach() - gradient / max(1, norm)
            torch.testing.assert_close(now.detach(), expected, atol=1e-5 if exact else 0.02, rtol=1e-4)


def test_on_a_cpu_it_runs_as_its_train_py_and_at_its_best(config):
    assert [nanogpt.padded_vocab_size(v) for v in (257, 50257, 50304, 50281)] == [257, 50304, 50304, 50281]
    settings = nanogpt.peer_settings(config)
    assert list(settings) == ["nanoGPT", "nanoGPT_best"]
    assert (settings["nanoGPT"].dtype, settings["nanoGPT"].compile) == (torch.float32, False)
    assert settings["nanoGPT_best"].compile


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--activation relu", "activation = relu"),
        ("--no-tie_weights", "tie_weights = false"),
        ("--position rope", "position = rope"),
        ("--mlp_ratio 2", r"mlp_ratio = 2\.0"),
        ("--attn_bias false", "attn_bias = false"),
        ("--activation gelu --dropout 0.2 --no-bias --attn_bias false", "torchrun started 2"),
    ],
)
def test_shapes_that_its_model_cannot_have_and_several_ranks_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        nanogpt.require_same_shape(cli.parse(BenchConfig, words.split()), 2)


@pytest.mark.gpu
def test_on_cuda_it_runs_as_its_train_py(config):
    ((_, settings),) = nanogpt.peer_settings(dataclasses.replace(config, device="cuda")).items()
    assert settings.compile
    assert settings.dtype != torch.float32
    with nanogpt.Peer(config, settings) as peer:
        assert len(peer.receive() + peer.time_updates(3)) == config.warmup_updates + 3
        assert peer.facts["peak_mem_gb"] > 0
