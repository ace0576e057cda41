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

EAGER = DeviceSettings(torch.device("cpu"), torch.float32, False, {})


@pytest.fixture
def config(tiny_data):
    """Resolved, with two micro-batches per update."""
    words = ["train", *TINY, "--grad_accum_steps", "2", "--no-bias"]
    words += ["--peer", "nanoGPT", str(nanogpt_checkout(tiny_data / "n"))]
    return dataclasses.replace(cli.parse(BenchConfig, words), vocab_size=257)


def our_batches(config) -> TrainingBatches:
    windows = Windows(open_dataset(Path("data/tiny")).tokens("train"), config.context_length)
    return TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gets_our_batches_in_order_and_autocast_in_the_given_dtype(config, dtype):
    update = nanogpt.make_update(config, DeviceSettings(torch.device("cpu"), dtype, False, {}))
    for _ in range(3):
        update()
    seen, batches = sys.modules["nanogpt_model"].SEEN, our_batches(config)
    expected = [batches(i, micro) for i in range(3) for micro in range(2)]
    for (x, y, autocast), (inputs, targets) in zip(seen, expected, strict=True):
        assert (x.numpy() == inputs).all()
        assert (y.numpy() == targets).all()
        assert autocast == (dtype == torch.bfloat16)


def test_the_update_is_the_clipped_mean_gradient(config):
    update = nanogpt.make_update(config, EAGER)
    model, batches = sys.modules["nanogpt_model"].GPT.made, our_batches(config)
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


def test_its_own_code_makes_model_and_optimizer(config):
    nanogpt.make_update(config, EAGER)
    model = sys.modules["nanogpt_model"].GPT.made
    expected = {"block_size": 32, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32}
    assert dataclasses.asdict(model.config) == expected | {"dropout": 0.0, "bias": False}
    assert model.optimizer_words == (0.1, 2e-3, (0.9, 0.99), "cpu")
    assert [nanogpt.padded_vocab_size(v) for v in (257, 50257, 50304, 50281)] == [257, 50304, 50304, 50281]


def test_on_a_cpu_it_runs_as_its_train_py_and_at_its_best(config):
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
        ("--no-bias --attn_bias true", "attn_bias = true"),
        ("--activation gelu", None),
        ("--dropout 0.2", None),
        ("--no-bias --attn_bias false", None),
    ],
)
def test_shapes_that_its_model_cannot_have_are_refused(words, message):
    config = cli.parse(BenchConfig, words.split())
    if message is None:
        nanogpt.require_same_shape(config, 1)
        return
    with pytest.raises(UserError, match=message):
        nanogpt.require_same_shape(config, 1)


def test_several_ranks_and_missing_files_are_refused(config):
    with pytest.raises(UserError, match="torchrun started 2"):
        nanogpt.require_same_shape(BenchConfig(), 2)
    (Path(config.peer[1]) / "train.py").unlink()
    assert nanogpt.checkout(config, "model.py") == Path(config.peer[1])
    with pytest.raises(UserError, match=r"no train\.py"):
        nanogpt.checkout(config, "model.py", "train.py")


@pytest.mark.gpu
def test_on_cuda_it_runs_as_its_train_py(config):
    ((name, settings),) = nanogpt.peer_settings(dataclasses.replace(config, device="cuda")).items()
    assert settings.compile
    assert settings.dtype != torch.float32
    with nanogpt.Peer(name, config, settings) as peer:
        assert len(peer.time_updates(3)) == 3
        assert peer.facts["peak_mem_gb"] > 0
