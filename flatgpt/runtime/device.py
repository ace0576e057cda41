"""Select device, dtype and compilation, state the reasons for `auto`'s choices, and seed random generators."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError, count_of, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense half-precision peak in TFLOP/s from NVIDIA's data sheets, by a part of torch.cuda.get_device_name(). The first
# match is used.
PEAK_TFLOPS = {"H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10G": 70}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "T4": 65, "V100": 125, "RTX 4090": 165, "RTX 3090": 71}


@dataclass(frozen=True)
class DeviceSettings:
    """The device, the dtype of matrix products, and whether the model is compiled.

    Attributes:
        why: the reasons for the choices of `auto`, with keys 'dtype', 'compile' and those of `paths`.
        paths: implementations that were chosen by timing them on a CPU (choices.py), by what they compute.
    """

    device: torch.device
    dtype: torch.dtype
    compile: bool
    why: dict[str, str]
    paths: dict[str, str] = field(default_factory=dict)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return torch.autocast for `dtype`; a null context for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, enabled for float16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy a numpy array to the device; asynchronously on CUDA."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def synchronize(self) -> None:
        """Wait until the device has completed all queued work."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def peak_memory_gb(self) -> float:
        """Return the peak memory in 10^9 bytes: allocated GPU memory on CUDA, else resident memory of the process.

        On Windows, the latter is NaN.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        with contextlib.suppress(
            OSError
        ):  # Linux, where getrusage includes the peak of the process that started this one
            return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
        with contextlib.suppress(ImportError):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes
        return math.nan

    @property
    def name(self) -> str:
        """The name of the GPU, such as `NVIDIA H200`, or the type of another device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def describe(self, reasons: bool = True) -> str:
        """Return the settings as one line, by default with their reasons."""
        threads = f" ({count_of(torch.get_num_threads(), 'thread')})" if self.device.type == "cpu" else ""
        why = {key: f" ({self.why[key]})" if reasons and key in self.why else "" for key in ("dtype", "compile")}
        dtype = str(self.dtype).removeprefix("torch.")
        mode = "compiled" if self.compile and not compiler.failed else "eager"
        return f"{self.name}{threads}, {dtype}{why['dtype']}, {mode}{why['compile']}"

    def path_lines(self) -> list[str]:
        """Return a line for each of `paths`, with its reason."""
        return [f"{kind:<8} {path} ({self.why[kind]})" for kind, path in self.paths.items() if self.why[kind]]


def note(text: str) -> None:
    """Print a line to standard error, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def find_device(device: str, local_rank: int | None = None) -> torch.device:
    """Return the device for `auto`, a type or a GPU's name such as cuda:1, and prepare this process for it.

    Args:
        local_rank: torchrun's LOCAL_RANK, the index of the GPU to use; None: the script supports one device only.

    Raises:
        UserError: the device is not available, or torch is too old to read files safely.
    """
    if local_rank is None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: this script uses one device; start it without torchrun"
        )
    release = torch.__version__.split("+")[0]
    if tuple(map(int, release.split(".")[:2])) < (2, 10):
        raise UserError(
            f"torch {release} can execute code of a file that it loads with weights_only=True (CVE-2025-32434 before "
            "2.6, CVE-2026-24747 before 2.10): pip install -r requirements.txt"
        )
    _keep_freed_memory()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name, is_available in available.items() if is_available]
    kind, _, index = (names[0] if device == "auto" else device).partition(":")
    if kind not in names:
        raise UserError(
            f"device = {device}: torch {torch.__version__} does not find it; use --device {' or '.join(names)}"
        )
    if kind != "cuda":
        return torch.device(kind)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local_rank is not None and index:
        raise UserError(
            f"device = cuda:{index}: each process of torchrun uses a GPU of its own; use --device cuda, and choose the "
            "GPUs with the environment variable CUDA_VISIBLE_DEVICES"
        )
    if local_rank is not None and processes > gpus:
        raise UserError(
            f"nproc_per_node = {processes}: this machine has {count_of(gpus, 'GPU')}, and each process needs one; "
            f"start torchrun with --nproc_per_node={gpus}"
        )
    if index and int(index) >= gpus:
        last = f"cuda:{gpus - 1}" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise UserError(f"device = cuda:{index}: this machine has {count_of(gpus, 'GPU')}; use --device {last}")
    number = int(index or local_rank or 0)
    if number:
        torch.cuda.set_device(number)
    return torch.device("cuda", number)


@functools.cache  # a second call would extend the heap again
def _keep_freed_memory() -> None:
    """Make glibc reuse freed memory, in a heap with huge pages (Linux).

    Without it, updates on a CPU take up to a fifth longer (docs/speed.md). Blocks over 256 MB are still returned to the
    system: keeping them would fragment the heap.
    """
    with contextlib.suppress(AttributeError, TypeError, OSError, ValueError):  # missing on macOS, musl and Windows
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold, madv_hugepage = -1, -3, 14  # constants of malloc.h and mman.h
        block, huge_page = 2**28, 2**21
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_threshold, block)
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        # Extend the heap by half of the machine's memory, 16 GB at most. Pages are not used until they are written to.
        count = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, 2**34) // block
        blocks = [libc.malloc(ctypes.c_size_t(block - huge_page)) for _ in range(count)]
        for address in blocks:
            libc.free(ctypes.c_void_p(address))
        if not all(blocks):  # a limit was reached: return all
            libc.malloc_trim(0)
            return
        start, end = -(-min(blocks) // huge_page) * huge_page, libc.sbrk(0)
        if start < end:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), madv_hugepage)


def make_deterministic() -> None:
    """Make torch use deterministic algorithms. Results are then the same for the same number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would take time; such memory is never read


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a device; None if unknown."""
    if "Laptop" in device_name or "MIG" in device_name:  # slower than the full GPU of this name
        return None
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


def cpu_name() -> str:
    """Return the processor's model name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def select_device(
    device: str,
    dtype: str,
    compile: bool | None = False,
    local_rank: int | None = None,
    why: dict[str, str] | None = None,
) -> DeviceSettings:
    """Resolve `auto` (None for compile). On a CPU, `auto` is float32 here; choices.py can measure a faster dtype.

    Args:
        local_rank: as in find_device.
        why: the reasons for choices of the caller, with keys 'dtype' and 'compile'.

    Raises:
        UserError: as in find_device.
    """
    selected, why = find_device(device, local_rank), dict(why or {})
    if selected.type == "cuda":
        major, minor = torch.cuda.get_device_capability(selected)
        name, support = ("bfloat16", "supports it") if major >= 8 else ("float16", "does not support bfloat16")
        auto_dtype = name, f"capability {major}.{minor} {support}"
        auto_compile = True, "faster on CUDA"
    elif selected.type == "mps":
        auto_dtype, auto_compile = ("float32", "mps has no fast bfloat16"), (False, "not used on mps")
    else:
        auto_dtype = "float32", "bfloat16 was not measured"
        auto_compile = False, "compilation saves little on a CPU and takes half a minute"  # docs/speed.md
    if dtype == "auto":
        dtype, why["dtype"] = auto_dtype
    elif dtype == "float16" and selected.type == "cpu":
        note("note: float16 is slow on a CPU; bfloat16 or float32 is faster")
    if compile is None:
        compile, why["compile"] = auto_compile
    return DeviceSettings(selected, DTYPES[dtype], compile, why)


compiler = SimpleNamespace(failed=False)  # once it has failed, compiled functions of this process run eagerly


def compile_or_run(
    function: Callable, eager: Callable | None = None, warn: Callable[[str], None] = note, **options
) -> Callable:
    """Compile a function. If the compiler fails, at the first call or at a later one, warn once and run it eagerly.

    Args:
        eager: called in place of `function` when the compiler has failed.
        warn: prints a line.
        options: of the compiler.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=False, options=options))

    def call(*args):
        if compiler.failed:
            return (eager or function)(*args)
        try:
            return compiled()(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # missing compilers, libraries and folders raise errors of many types
            result = (eager or function)(*args)  # raises an error that is not the compiler's again
            if not compiler.failed:
                warn(f"warning: torch.compile failed, continuing without it: {first_line(error)}")
            compiler.failed = True
            return result

    return call


def compile_forward(model: nn.Module, warn: Callable[[str], None] = note) -> Callable[..., Tensor]:
    """Compile the model's forward and backward. A rank whose compiler fails runs them eagerly, others compiled.

    Args:
        model: a model from wrap_model. With fully_shard, each sharded module is compiled separately.
        warn: as in compile_or_run.
    """
    from torch._functorch import config as compiler_config  # slow to import

    if hasattr(compiler_config, "force_non_lazy_backward_lowering"):  # not part of torch's interface
        # compile the backward in the call of the forward, which handles errors
        compiler_config.force_non_lazy_backward_lowering = True
    if hasattr(model, "unshard"):
        for block in model.transformer.h:
            for module in (block.attn, block.mlp):
                module.forward = compile_or_run(module.forward, warn=warn)
        return model
    # DDP's module is the model
    getattr(model, "module", model).exclude_loss_from_compile(functools.partial(compile_or_run, warn=warn))
    return compile_or_run(model, warn=warn)


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """Return a context for generation. Compiled sharded modules run eagerly: each new length would recompile them."""
    return torch.compiler.set_stance("force_eager") if hasattr(model, "unshard") else contextlib.nullcontext()


def seed_of(*key: int) -> int:
    """Return a seed for a generator, derived from all numbers of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def reseed(*key: int) -> None:
    """Seed torch's generators from a key (seed, update, micro-batch).

    Dropout masks are then a function of the key, so that checkpoints need no random state.
    """
    torch.manual_seed(seed_of(*key))
