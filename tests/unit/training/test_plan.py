"""budget.py against what torch keeps, allocates and copies, and against arithmetic by hand."""

import contextlib
import ctypes
import dataclasses
import itertools
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import ModelConfig, TrainConfig
from flatgpt.data.dataset import Windows
from flatgpt.kernels import cross_entropy
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.training import plan
from flatgpt.training.optimizer import make_optimizer
from flatgpt.training.plan import activation_bytes, matmul_flops, memory, report
from model import GPT

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=64, vocab_size=100)
GPT2 = TrainConfig(
    n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257, batch_size=8, warmup_iters=715
)
XL = dataclasses.replace(GPT2, n_layer=48, n_head=25, n_embd=1600, batch_size=4, grad_accum_steps=128)
LOW = torch.bfloat16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def autocast(device: str, dtype: torch.dtype):
    return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def batch(config: ModelConfig, batch_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(config.vocab_size, (2, batch_size, config.context_length), device=device)
    return ids[0].clone(), ids[1].clone()


def kept_bytes(config: ModelConfig, batch_size: int, dtype: torch.dtype, device: str) -> int:
    """Of the tensors that autograd saves in a forward pass, each storage once, without parameters and buffers."""
    model = GPT(config).to(device)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}  # the storages themselves, else another could come to lie at the same address

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(device, dtype):
        loss = model(*batch(config, batch_size, device))
    assert loss.requires_grad
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


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


# ---------------------------------------------------------------------------------------------------------------------
# activations

KINDS = [
    {},
    {"dropout": 0.1},
    {"bias": False, "activation": "relu"},
    {"activation": "gelu", "mlp_ratio": 3.7, "dropout": 0.1},
    {"tie_weights": False, "head_bias": True},
    {"position": "rope"},
    {"position": "rope", "dropout": 0.1},
    {"attention": "manual"},
    {"attention": "manual", "dropout": 0.1},
    {"attention": "manual", "position": "rope"},
]
SHAPES = [
    ({}, 3),
    ({"n_head": 3, "n_embd": 60, "context_length": 40, "vocab_size": 50}, 2),  # a head size of 20 is padded to 24
    ({"n_layer": 4, "n_head": 4, "n_embd": 192, "context_length": 128, "vocab_size": 256}, 2),  # train.py's default
    ({"n_layer": 1, "context_length": 520}, 2),  # the fused kernel for bfloat16 on a CPU
    ({"context_length": 96}, 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_are_those_that_autograd_keeps(shape, dtype, device):
    changes, batch_size = shape
    for kind in KINDS:
        config = dataclasses.replace(SMALL, **(changes | kind))
        if device == "cpu" and dtype == torch.float16 and "context_length" in changes and batch_size > 1:
            continue  # a CPU takes seconds for these
        estimate, _ = activation_bytes(config, batch_size, dtype, device)
        kept = kept_bytes(config, batch_size, dtype, device)
        # on a CPU all but the loss's count of targets
        assert estimate == pytest.approx(kept, **({"abs": 4} if device == "cpu" else {"rel": 0.01})), kind


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [{}, {"bias": False}, {"tie_weights": False, "head_bias": True}], ids=str)
def test_a_large_batch_keeps_gradients_in_place_of_logits(head, dtype, device):
    config = dataclasses.replace(SMALL, vocab_size=12_000, **head)
    kept = {}
    for rows in (2, 3):  # the third takes the logits past cross_entropy.MIN_FUSED_LOGITS
        kept[rows], _ = activation_bytes(config, rows, dtype, device)
        assert kept[rows] == pytest.approx(kept_bytes(config, rows, dtype, device), rel=1e-3)
    assert kept[3] < kept[2] / 2


@pytest.mark.parametrize(
    ("changes", "dtype", "listed"),
    [
        ({"dropout": 0.1}, torch.float32, 957_476),
        ({"dropout": 0.1}, LOW, 658_484),
        ({"attention": "manual", "dropout": 0.1}, LOW, 1_007_620 - 2 * 64 * 64),  # listed with a mask for each layer
        ({"position": "rope"}, LOW, 700_980 + 4 * 64 * 16),  # listed without the angles, which were no tensor of theirs
        ({"n_embd": 60, "n_head": 3}, LOW, 1_262_388),
    ],
)
def test_activations_on_cuda_as_its_kernels_declare_them(changes, dtype, listed):
    """`listed`: kept_bytes on torch 2.13's CUDA build with FakeTensorMode, which needs no GPU. Batches of 3."""
    estimate, _ = activation_bytes(dataclasses.replace(SMALL, **changes), 3, dtype)
    assert estimate == pytest.approx(listed, rel=1e-4)


# chunks and softmax pieces that one is large enough for, and several of both
CHUNKS = [None, (2**20, 2**40), (100, 2**15)]


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS, ids=["plain", "one chunk", "chunks"])
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2000},  # the head has more to keep than a block
        {"vocab_size": 64, "context_length": 128, "dropout": 0.1},  # a block has
        {"vocab_size": 2000, "tie_weights": False, "head_bias": True},
    ],
    ids=str,
)
def test_peak_with_and_without_activation_checkpointing(changes, chunks, dtype, monkeypatch):
    if chunks:
        monkeypatch.setattr(cross_entropy, "MIN_FUSED_LOGITS", 0)
        monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", chunks[0])
        monkeypatch.setitem(cross_entropy.SOFTMAX_BYTES, "cpu", chunks[1])
    for checkpointing in (False, True):
        config = dataclasses.replace(SMALL, n_layer=6, activation_checkpointing=checkpointing, **changes)
        model, (x, y) = GPT(config), batch(config, 4, "cpu")
        pieces = memory(TrainConfig(**dataclasses.asdict(config), batch_size=4), dtype, "cpu")
        with Allocated(model) as allocated:
            with autocast("cpu", dtype):
                loss = model(x, y)
            # where the logits' gradients come later, autocast's copies of weights stay until here, but not until then
            if not checkpointing or chunks:
                assert allocated.now == pytest.approx(activation_bytes(config, 4, dtype, "cpu")[0], rel=1e-3)
            loss.backward()
        estimate = pieces["activations"] + pieces["workspace"]
        assert allocated.peak == pytest.approx(estimate, rel=0.02), estimate / allocated.peak


# ---------------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_are_those_of_an_update(optimizer):
    config = TrainConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50, optimizer=optimizer)
    model = GPT(config.model())
    chosen = make_optimizer(model, config)
    model(*batch(config, 2, "cpu")).backward()
    chosen.step()
    state = [t for per_weight in chosen.state.values() for t in per_weight.values() if torch.is_tensor(t) and t.dim()]
    pieces = memory(config, torch.float32, "cpu")
    assert pieces["weights"] == sum(p.nbytes for p in model.parameters())
    assert pieces["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert pieces["optimizer"] == sum(t.nbytes for t in state)


def test_memory_on_several_devices():
    one = memory(dataclasses.replace(GPT2, grad_accum_steps=8), LOW)
    eight = memory(dataclasses.replace(GPT2, grad_accum_steps=8), LOW, gpus=8)
    several = ("weights", "gradients", "optimizer", "activations", "workspace")
    assert one["peak"] == eight["peak"] == sum(one[name] for name in several)  # DDP: the same on each
    alone = memory(GPT2, LOW)  # no gradients from another pass
    assert alone["peak"] == one["peak"] - one["gradients"]
    sharded = memory(dataclasses.replace(GPT2, grad_accum_steps=8, fsdp=True), LOW, gpus=8)
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == one[name] // 8
    block, padded = 12 * 768**2 + 13 * 768, 50304
    assert sharded["gathered"] == 2 * block + 4 * ((padded + 1024) * 768 + 2 * 768)
    assert one["activations"] - sharded["activations"] == 12 * 2 * 12 * 768**2
    assert sharded["save buffers"] == one["weights"] + one["optimizer"]
    # the passes of a device are summed whole, before the devices' sums are cut
    summed = memory(dataclasses.replace(GPT2, grad_accum_steps=16, fsdp=True), LOW, gpus=8)
    assert summed["gradients"] == one["weights"]


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
            with autocast("cuda", LOW):
                loss = model(*batch(config, config.batch_size, "cuda"))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() - before
    assert memory(config, LOW)["peak"] == pytest.approx(peak, rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("device", DEVICES)
def test_save_buffers(device, tmp_path):
    """What saving adds to the process's memory."""
    config = TrainConfig(n_layer=4, n_head=8, n_embd=512, context_length=64, vocab_size=1000)
    with torch.device(device):
        model = GPT(config.model())
    model(*torch.zeros((2, 1, 4), dtype=torch.int64, device=device)).backward()
    optimizer = make_optimizer(model, config)
    optimizer.step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the copy could go where something was freed
    before = _resident_bytes()
    saver = CheckpointWriter(dataclasses.replace(config, out_dir=str(tmp_path)))
    saver.allocate_buffers({"weights": model.state_dict(), "train_state": {"optimizer": optimizer.state_dict()}})
    pieces = memory(config, LOW, device)
    # CUDA's pinned memory comes in blocks whose sizes are powers of two.
    tolerance = (0.2 if device == "cpu" else 0.5) * pieces["weights"]
    assert _resident_bytes() - before == pytest.approx(pieces["save buffers"], abs=tolerance)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---------------------------------------------------------------------------------------------------------------------
# time, and the whole text


def test_matmul_flops_is_that_of_the_fastest_product_and_ends_with_a_long_one(monkeypatch):
    """The first product of a size takes three times as long. 512 is the fastest size, 1,024 takes over 0.03 s."""
    rates = {256: 8e9, 512: 1e10, 1024: 9e9}
    times = itertools.chain.from_iterable((0, 3 * 2 * n**3 / rate, 0, 2 * n**3 / rate) for n, rate in rates.items())
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=times.__next__))
    assert matmul_flops(torch.device("cpu"), torch.float32) == pytest.approx(1e10)
    assert [*times] == []


def test_report_of_gpt2_124m_on_eight_gpus():
    config = dataclasses.replace(GPT2, batch_size=16, grad_accum_steps=32, max_iters=19073, gpus=8, dataset="fineweb")
    text = report(config, 9_998_000_000, ("Some GPU", 100e12))
    assert "124,439,808 parameters: 12 layers" in text
    assert "855,166,464 FLOPs per token" in text
    assert "data/fineweb: 9,998,000,000 training tokens" in text
    assert "epoch    9,763,671 windows = 9,997,999,104 tokens = 19,069.7 updates" in text
    assert "16 sequences x 32 x 1024 tokens = 524,288 tokens, 4 passes on each of 8 devices" in text
    assert "19,073 updates = 9,999,745,024 tokens = 1.00 epochs, 80.4 tokens per parameter; 8.55e+18 FLOPs" in text
    rows = {line.split("  ")[0]: line.split()[-2:] for line in map(str.strip, text.splitlines()) if line}
    assert rows["weights"] == ["0.50", "0.50"]
    pieces = memory(config, LOW, gpus=8)
    assert rows["peak"][0] == f"{pieces['peak'] / 1e9:.2f}"
    assert rows["A100"] == ["TFLOP/s", "2h22m"]  # 9,999,745,024 x 855,166,464 / (8 x 312e12 x 0.4) = 8,565 s
    assert rows["here: Some GPU"] == ["TFLOP/s", "7h25m"]
    assert max(map(len, text.splitlines())) <= 120


def test_report_counts_days_when_it_takes_long():
    text = report(dataclasses.replace(XL, max_iters=76292, mfu=0.5), None, None)
    days = 76292 * 4 * 128 * 1024 * 10_279_555_200 / (312e12 * 0.5) / 86400
    assert f"{days:,.1f} days" in text


def test_report_without_data_has_no_epochs():
    by_epochs = dataclasses.replace(XL, max_iters=None, epochs=4.0, dataset="fineweb")
    text = report(by_epochs, None, None)
    assert "data/fineweb is not prepared: no epochs" in text
    assert "1,557,611,200 parameters" in text
    assert "peak" in text
    assert "run " not in text
    assert "time " not in text
    text = report(dataclasses.replace(by_epochs, max_iters=100, epochs=None), None, None)
    assert "100 updates = 52,428,800 tokens = 0.0 tokens per parameter" in text
    assert "A100" in text


@pytest.mark.parametrize("stride", [None, 7, 100])
def test_report_counts_windows_as_the_data_does(stride):
    config = TrainConfig(vocab_size=256, context_length=32, stride=stride, max_iters=None, epochs=3.0, batch_size=5)
    windows = len(Windows(range(1000), 32, stride))
    text = report(config, 1000, None)
    assert f"epoch    {windows:,} windows = {windows * 32:,} tokens" in text
    assert f"run      {-(-3 * windows // 5):,} updates" in text


def test_report_says_what_does_not_fit():
    config = TrainConfig(vocab_size=256, gpus=8, device="cpu", grad_accum_steps=12, dtype="float32")
    text = report(config, 128, None)
    assert "data/pydoc has 128 training tokens, fewer than a window's 129: no epochs" in text
    assert "8 devices cannot share 12 passes equally" in text
    assert "float32" in text
    assert "bfloat16" not in text
