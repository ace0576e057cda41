"""device.py: what `auto` selects on which hardware, precision, random state, the compiler and its failure."""

import contextlib
import itertools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import TINY, first_fast, train_here
from mps import mps_machine
from processes import ROOT
from run_files import rows, weights

import model
from config import ModelConfig, UserError
from flatgpt.kernels.cross_entropy import CHUNK_ROWS
from flatgpt.runtime.device import compile_forward, compiler, find_device, peak_flops, reseed, select_device
from model import GPT

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50)


@pytest.fixture
def hardware(monkeypatch):
    """Make torch report other hardware: hardware(cuda=(7, 5)), hardware(mps=True), hardware() for a CPU alone."""

    def report(cuda=None, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return report


# ---------------------------------------------------------------------------------------------------------------------
# choices


@pytest.mark.parametrize(
    ("there", "device", "dtype", "compiles", "why"),
    [
        ({"cuda": (8, 0)}, "cuda", torch.bfloat16, True, "capability 8.0 supports it"),
        ({"cuda": (7, 5)}, "cuda", torch.float16, True, "capability 7.5 does not support bfloat16"),
        ({"mps": True}, "mps", torch.float32, False, "no fast bfloat16"),
        ({}, "cpu", torch.float32, False, "bfloat16 was not measured"),
    ],
)
def test_auto(hardware, there, device, dtype, compiles, why):
    hardware(**there)
    found = select_device("auto", "auto", None)
    assert (found.device.type, found.dtype, found.compile) == (device, dtype, compiles)
    assert why in found.why["dtype"]
    assert found.why["compile"]


def test_settings_are_described_with_the_reasons_of_auto(hardware, capsys):
    hardware(cuda=(9, 0))
    found = select_device("cpu", "float32", True)
    assert (found.device, found.dtype, found.compile, found.why) == (torch.device("cpu"), torch.float32, True, {})
    assert re.fullmatch(r"cpu \((1 thread|\d+ threads)\), float32, compiled", found.describe())
    chosen = select_device("cpu", "bfloat16", None, why={"dtype": "it is faster"})
    assert chosen.describe().endswith(f"bfloat16 (it is faster), eager ({chosen.why['compile']})")
    assert capsys.readouterr().err == ""
    select_device("cpu", "float16")
    assert "slow on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("world", "device", "torch_version", "message"),
    [
        ("1", "mps", None, r"^device = mps: .*use --device cpu$"),
        ("1", "cuda:1", None, r"^device = cuda:1: .*use --device cpu$"),
        ("2", "cpu", None, r"^WORLD_SIZE = 2: .* without torchrun$"),
        ("1", "cpu", "2.9.1+cpu", r"^torch 2.9.1 can execute code of a file .* CVE-2026"),
        ("1", "cpu", "2.10.0", None),
    ],
)
def test_what_cannot_be_used_is_refused(hardware, monkeypatch, world, device, torch_version, message):
    hardware()
    monkeypatch.setenv("WORLD_SIZE", world)
    if torch_version:
        monkeypatch.setattr(torch, "__version__", torch_version)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        assert find_device(device).type == "cpu"


@pytest.mark.parametrize(
    ("gpus", "device", "local_rank", "found"),
    [
        (4, "cuda:3", None, "cuda:3"),
        (4, "cuda:0", None, "cuda:0"),
        (4, "cuda", None, "cuda:0"),
        (4, "auto", 2, "cuda:2"),
        (4, "cuda:4", None, "device = cuda:4: this machine has 4 GPUs; use --device cuda:0 to cuda:3"),
        (1, "cuda:1", None, "device = cuda:1: this machine has 1 GPU; use --device cuda:0"),
        (4, "cuda:1", 0, "device = cuda:1: each process of torchrun uses a GPU of its own; use --device cuda, and"),
    ],
)
def test_a_gpu_is_chosen_by_its_number(hardware, monkeypatch, gpus, device, local_rank, found):
    """It becomes the current one, on which torch captures graphs and launches kernels."""
    current = [0]
    hardware(cuda=(9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: current.append(number))
    if not found.startswith("cuda"):
        with pytest.raises(UserError, match=f"^{found}"):
            find_device(device, local_rank)
    else:
        assert str(find_device(device, local_rank)) == found == f"cuda:{current[-1]}"


# ---------------------------------------------------------------------------------------------------------------------
# what the settings do


@pytest.mark.filterwarnings("error")  # torch.autocast warns when it is asked for float32
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_autocast_is_of_the_matrix_products(name):
    settings = select_device("cpu", name)
    linear, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with settings.autocast():
        y = linear(x)
        assert y.dtype == getattr(torch, name)
        assert torch.nn.functional.cross_entropy(y.float(), torch.tensor([0, 1])).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu") == (name != "float32")
    assert linear.weight.dtype == torch.float32
    assert settings.scaler().is_enabled() == (name == "float16")


def test_arrays_are_copied_even_if_not_contiguous():
    array = np.arange(24, dtype=np.int64).reshape(4, 6)[::2, ::-2]
    tensor = select_device("cpu", "float32").to_device(array)
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == array.tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage includes the peak of the starting process on Linux")
def test_peak_memory_excludes_that_of_the_process_that_started_this_one():
    code = "from flatgpt.runtime.device import select_device; print(select_device('cpu', 'float32').peak_memory_gb())"
    start = f"import os, sys; len(b'1' * 1_200_000_000); os.execv(sys.executable, [sys.executable, '-c', {code!r}])"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, cwd=ROOT, check=True, timeout=120)
    assert 0.05 < float(done.stdout) < 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_freed_memory_is_kept_for_later_tensors():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    select_device("cpu", "float32")
    tensor = torch.ones(20_000_000)
    there, size = resident(), tensor.nbytes
    del tensor
    assert resident() > there - size / 2


def test_random_numbers_are_a_function_of_the_key():
    """(seed, update, micro-batch): no two keys share their draws, and what was drawn before does not count."""
    keys = [(1, 2, 3), (1, 3, 2), (12, 3, 0), (1, 23, 0), (1337, 0, 0), (2**63 - 1, 10**6, 7)]

    def draws(key: tuple) -> tuple:
        reseed(*key)
        return tuple(torch.rand(4).tolist())

    first = [draws(key) for key in keys]
    assert [draws(key) for key in reversed(keys)] == first[::-1]
    assert len(set(first)) == len(keys)


@pytest.mark.slow
def test_runs_on_mps_are_those_of_a_cpu(tiny_data, cli, measured):
    """mps has no float64, and a copy that nothing waits for reads memory that may already be freed."""
    measured("fused")
    words = (*TINY, "--optimizer", "muon", "--vocab_size", 20_000)  # so many ids that the loss is fused
    cpu, mps = train_here(*words, "--out_dir", "out/cpu"), Path("out/mps")
    words = ("train", *words, "--device", "auto", "--dtype", "auto", "--out_dir", mps, "--lr_decay_iters", 6)
    with mps_machine():
        done = [cli(*words, "--max_iters", 3), cli(*words, "--resume")]
        done += [cli("infer", "--device", "mps", "--max_new_tokens", 4), cli("eval", "--device", "mps")]
    assert [each.code for each in done] == [0] * 4, [each.err for each in done]
    assert "machine  mps, " in done[1].out
    assert rows(mps) == rows(cpu)
    torch.testing.assert_close(weights(mps), weights(cpu), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# the compiler


def batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randint(50, (2, 4, 16), generator=torch.Generator().manual_seed(0)).to(device))


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        pytest.param("cpu", "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("cuda", "float32", 1e-4, marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", 2e-2, marks=pytest.mark.gpu),
    ],
)
def test_compiled_loss_and_gradients_equal_eager_ones(device, dtype, tolerance):
    """The compiled ones are compared twice, as the first call compiles."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = GPT(SMALL).to(device)
    names, answers = list(model.state_dict()), {}
    compiled = compile_forward(model)
    for name, forward in (("eager", model), ("first", compiled), ("second", compiled)):
        model.zero_grad()
        with select_device(device, dtype).autocast():
            loss = forward(*batch(device))
        loss.backward()
        answers[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # it was compiled, once and in one piece
    assert list(model.state_dict()) == names  # the raw module is not touched
    for name in ("first", "second"):
        torch.testing.assert_close(answers[name], answers["eager"], rtol=tolerance, atol=tolerance)


def fails_in(name: str, after: int):
    """A torch.compile that fails for functions of this name, after so many calls; -1: before the first one."""

    def compile(function, **options):
        calls = itertools.count()
        if name != getattr(function, "__name__", "GPT"):
            return function

        def call(*args):
            if next(calls) >= after:
                raise RuntimeError("Failed to find C compiler. Please specify via CC\nor set triton.knobs")
            return function(*args)

        return call if after >= 0 else call()

    return compile


@pytest.mark.parametrize(
    ("name", "after"),
    first_fast([("GPT", 2), ("GPT", -1), ("GPT", 0), ("gradient_in_one_kernel", 0), ("gradient_in_one_kernel", 2)]),
)
def test_compiler_that_fails_at_any_call_is_one_warning(tiny_data, cli, measured, monkeypatch, name, after):
    """The loss has its own kernel on CUDA, which is compiled for the last, smaller chunk of rows too."""
    measured("fused")
    words = ("train", *TINY, "--vocab_size", 20_000, "--max_iters", 3, "--sample_tokens", 0)
    assert cli(*words, "--out_dir", "out/eager", "--deterministic").code == 0
    real = model.fused_loss_outside_graph
    monkeypatch.setattr(model, "fused_loss_outside_graph", lambda device, compile: real(torch.device("cuda"), compile))
    monkeypatch.setitem(CHUNK_ROWS, "cpu", 50)
    monkeypatch.setattr(torch, "compile", fails_in(name, after))
    done = cli(*words, "--out_dir", "out/compiled", "--compile")
    assert done.code == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: torch.compile failed, continuing without it: Failed to find C compiler. " + "Please specify via CC"
    ]
    torch.testing.assert_close(weights(Path("out/compiled")), weights(Path("out/eager")), rtol=0, atol=1e-5)


def test_compiler_that_fails_for_the_backward_is_one_warning(monkeypatch, capsys):
    from torch._dynamo.backends.common import aot_autograd  # slow to import

    def fail(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._functorch.config.force_non_lazy_backward_lowering", False)  # the default
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=fail)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend))
    model = GPT(SMALL)
    forward = compile_forward(model)
    losses = [forward(*batch()) for _ in range(2)]
    losses[0].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert losses[0] == losses[1] == model(*batch())
    assert capsys.readouterr().err.count("warning: torch.compile failed") == 1


def test_error_of_the_model_is_not_one_of_the_compiler(capsys):
    """It is raised, and the next call is compiled."""
    forward = compile_forward(GPT(SMALL))
    with pytest.raises(RuntimeError, match="Long"):
        forward(*(ids.float() for ids in batch()))
    assert not compiler.failed
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_broken_compiler_is_one_warning(tmp_path):
    """There is no C++ compiler at CXX; nothing compiled before may help out."""
    code = (
        "import torch\nfrom test_device import GPT, SMALL, batch, compile_forward\n"
        "torch.manual_seed(0); model = GPT(SMALL); forward = compile_forward(model)\n"
        "losses = [forward(*batch()) for _ in range(3)]; losses[0].backward()\n"
        "print(all(loss == model(*batch()) for loss in losses), model.transformer.wte.weight.grad.any().item())\n"
    )
    env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests/support", Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True True\n"
    assert done.stderr.startswith("warning: torch.compile failed, continuing without it: ")
    assert done.stderr.count("warning:") == 1


# ---------------------------------------------------------------------------------------------------------------------
# what only a GPU shows


@pytest.mark.gpu
def test_auto_on_this_gpu():
    found = select_device("auto", "auto", None)
    assert found.device.type == "cuda"
    assert found.compile
    bf16 = torch.cuda.get_device_capability()[0] >= 8
    assert found.dtype == (torch.bfloat16 if bf16 else torch.float16)
    assert found.name == torch.cuda.get_device_properties(0).name


@pytest.mark.gpu
def test_float16_updates_move_the_weights_and_stay_finite():
    """The scale begins at 65,536: gradients that overflow are skipped until it fits."""
    settings = select_device("cuda", "float16")
    torch.manual_seed(0)
    model = GPT(SMALL).cuda()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), settings.scaler()
    losses = []
    for _ in range(30):
        with settings.autocast():
            loss = model(*batch("cuda"))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    for old, p in zip(before, model.parameters(), strict=True):
        assert p.isfinite().all()
        assert not torch.equal(old, p)


@pytest.mark.gpu
def test_peak_memory_on_the_gpu():
    settings = select_device("cuda", "float32")
    torch.cuda.reset_peak_memory_stats()  # else the peak of the tests before it counts
    before = settings.peak_memory_gb()
    ballast = settings.to_device(np.ones(250_000_000, dtype=np.float32))  # 1 GB
    settings.synchronize()
    assert ballast.is_cuda
    assert before + 0.99 < settings.peak_memory_gb() < before + 1.1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        *(("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121)),
        *(("NVIDIA L40", None), ("NVIDIA T400 4GB", None), ("AMD Instinct MI300X", None)),
        *(("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None)),
    ],
)
def test_peak_flops(name, tflops):
    """That of a chip with a similar name is not taken: a wrong MFU is worse than none."""
    assert peak_flops(name) == (tflops and 1e12 * tflops)
