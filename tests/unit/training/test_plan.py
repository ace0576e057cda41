"""plan.py: memory against what torch allocates."""

import dataclasses
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import ModelConfig, TrainConfig
from flatgpt.kernels import cross_entropy
from flatgpt.training.optimizer import make_optimizer
from flatgpt.training.plan import activation_bytes, memory
from model import GPT

SMALL = ModelConfig(n_layer=6, n_head=2, n_embd=32, context_length=64, vocab_size=100)
GPT2 = TrainConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257, batch_size=8)


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are alive, and their peak; what lives within an
    operation only is not seen.

    Args:
        model: its parameters do not count.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.alive, self.now, self.peak = {p.untyped_storage()._cdata for p in model.parameters()}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key: int, nbytes: int) -> None:
        self.alive.remove(key)
        self.now -= nbytes


KINDS = [
    {},
    {"bias": False, "activation": "relu"},
    {"activation": "gelu", "mlp_ratio": 3.7},
    {"tie_weights": False, "head_bias": True, "vocab_size": 2000},
    {"position": "rope"},
    {"attention": "manual"},
    {"attention": "manual", "position": "rope"},
]


# The fused CPU kernel of attention keeps what CUDA's does; in bfloat16 it is used for long windows only.
CASES = [(kind, torch.float32) for kind in KINDS]
CASES += [({"context_length": 520, **kind}, torch.bfloat16) for kind in KINDS[:5]]
CASES += [({"activation_checkpointing": True, "vocab_size": 2000}, torch.float32)]
CASES += [({"activation_checkpointing": True, "vocab_size": 64, "context_length": 520}, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_activations_are_those_of_a_forward_and_backward_pass(kind, dtype, fused, monkeypatch):
    for sizes in (cross_entropy.CHUNK_ROWS, cross_entropy.SOFTMAX_BYTES):
        monkeypatch.setitem(sizes, "cpu", sizes["cuda"])
    if fused:
        monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", 0)
    config = dataclasses.replace(SMALL, **kind)
    model, ids = GPT(config), torch.randint(config.vocab_size, (2, 4, config.context_length))
    with Allocated(model) as allocated:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(ids[0], ids[1])
        loss.backward()
    assert activation_bytes(config, 4, dtype) == pytest.approx(allocated.peak, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "dtype", "listed"),
    [
        ({"dropout": 0.1}, torch.float32, 957_476),
        ({"dropout": 0.1}, torch.bfloat16, 658_484),
        ({"attention": "manual", "dropout": 0.1}, torch.bfloat16, 1_007_620 - 2 * 64 * 64),  # a mask for each layer
        ({"position": "rope"}, torch.bfloat16, 700_980 + 4 * 64 * 16),  # and the angles
    ],
)
def test_activations_on_cuda_as_its_kernels_declare_them(changes, dtype, listed):
    """`listed`: what autograd keeps on torch 2.13's CUDA build with FakeTensorMode. Batches of 3."""
    gradients_of_logits = 2 * 4 * 3 * 64 * 100
    estimate = activation_bytes(dataclasses.replace(SMALL, n_layer=2, **changes), 3, dtype)
    assert estimate == pytest.approx(listed + gradients_of_logits, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_are_those_of_an_update(optimizer):
    config = TrainConfig(
        n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50, optimizer=optimizer, dtype="float32"
    )
    model = GPT(config.model())
    model(*torch.randint(50, (2, 2, 16))).backward()
    chosen = make_optimizer(model, config)
    chosen.step()
    parts = [chosen] if optimizer == "adamw" else chosen.optimizers.values()
    state = [t for part in parts for moments in part.state.values() for t in moments.values() if t.dim()]
    pieces = memory(config, torch.float32)
    assert pieces["weights"] == sum(p.nbytes for p in model.parameters())
    assert pieces["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert pieces["optimizer"] == sum(t.nbytes for t in state)
    buffers = [t.nbytes for t in (*model.parameters(), *state)]
    assert pieces["save buffers"] == sum(2 ** math.ceil(math.log2(size)) for size in buffers), "as torch pins them"


@pytest.mark.parametrize(
    ("changes", "dtype", "measured"),
    [
        ({"batch_size": 64}, torch.float16, 25.93),
        ({"batch_size": 32, "n_layer": 24, "n_head": 16, "n_embd": 1024}, torch.bfloat16, 36.12),
        ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, torch.bfloat16, 46.79),
    ],
)
def test_peaks_that_an_h200_measured(changes, dtype, measured):
    """Of eager updates, in GB (docs/speed.md)."""
    config = dataclasses.replace(GPT2, bias=False, grad_accum_steps=1, **changes)
    assert memory(config, dtype)["peak"] / 1e9 == pytest.approx(measured, rel=0.015)


def test_memory_on_several_devices():
    def pieces(gpus: int, **changes) -> dict[str, int]:
        return memory(dataclasses.replace(GPT2, **changes), torch.bfloat16, gpus)

    one, alone = pieces(1, grad_accum_steps=8), pieces(1)
    assert one["peak"] == sum(one[name] for name in ("weights", "gradients", "optimizer", "activations"))
    assert alone["peak"] == one["peak"] - one["gradients"]  # no gradients from another pass
    assert pieces(8, grad_accum_steps=8) == one  # DDP: the same on each
    sharded = pieces(8, grad_accum_steps=8, fsdp=True)
    block, tables = 12 * 768**2 + 13 * 768, (50304 + 1024) * 768 + 2 * 768
    assert sharded["weights"] == one["weights"] // 8 + 2 * block + 4 * tables
    assert (sharded["gradients"], sharded["optimizer"]) == (one["gradients"] // 8, one["optimizer"] // 8)
    assert one["activations"] - sharded["activations"] == 12 * 2 * 12 * 768**2  # autocast's copies
    # the passes of a device are summed whole, before the devices' sums are cut
    assert pieces(8, grad_accum_steps=16, fsdp=True)["gradients"] == one["weights"]


@pytest.mark.gpu
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_gpt2_124m_on_a_gpu(checkpointing, passes):
    config = dataclasses.replace(GPT2, grad_accum_steps=passes, activation_checkpointing=checkpointing)
    before = torch.cuda.memory_allocated()
    model = GPT(config.model()).cuda()
    optimizer = make_optimizer(model, config)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        for _ in range(passes):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(*torch.randint(50257, (2, 8, 1024), device="cuda"))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() - before
    assert memory(config, torch.bfloat16)["peak"] == pytest.approx(peak, rel=0.15)
