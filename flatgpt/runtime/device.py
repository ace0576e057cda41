"""Device, dtype, compilation and random state of a run. States what `auto` selected, and why."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DeviceSettings:
    """The device of a run, the dtype of its matrix products, and whether it is compiled.

    Attributes:
        why: the reason of each choice that `auto` made, by 'dtype' and 'compile'.
    """

    device: torch.device
    dtype: torch.dtype
    compile: bool
    why: dict[str, str]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return torch.autocast for `dtype`; a null context for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, which is enabled for float16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy a numpy array to the device; asynchronously on CUDA."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def synchronize(self) -> None:
        """Wait until the device has completed its queued work."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def peak_memory_gb(self) -> float:
        """Return the peak of memory in use, in 10^9 bytes: of the device on CUDA, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux KiB

    @property
    def name(self) -> str:
        """The name of a GPU, `NVIDIA H200` for example, else the type of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def describe(self) -> str:
        """Return the settings and their reasons as one line."""
        count = torch.get_num_threads()
        threads = f" ({count} thread{'s' * (count > 1)})" if self.device.type == "cpu" else ""
        reasons = {key: f" ({self.why[key]})" if key in self.why else "" for key in ("dtype", "compile")}
        dtype, mode = str(self.dtype).removeprefix("torch."), "compiled" if self.compile else "eager"
        return f"{self.name}{threads}, {dtype}{reasons['dtype']}, {mode}{reasons['compile']}"


def note(text: str) -> None:
    """Print a line to standard error, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def find_device(device: str, local_rank: int | None = None) -> torch.device:
    """Return the device for a name or `auto`, and prepare this process for it.

    Args:
        local_rank: the GPU to take, by torchrun's LOCAL_RANK; None: the script uses a single device.

    Raises:
        UserError: the device does not exist, or torch is too old to read files safely.
    """
    if local_rank is None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: this script uses one device; start it without torchrun"
        )
    release = torch.__version__.split("+")[0]
    if tuple(map(int, release.split(".")[:2])) < (2, 10):
        raise UserError(
            f"torch {release} can be made to run code by a file that it only reads (weights_only=True: CVE-2025-32434 "
            "before 2.6, CVE-2026-24747 before 2.10): pip install -r requirements.txt"
        )
    # Huge pages for large CPU tensors (Linux): with 50,257 ids, page faults on the logits took over half of an update
    # (docs/speed.md). torch reads the variable once, when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _keep_freed_memory()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name, found in available.items() if found]
    if device == "auto":
        device = names[0]
    elif device not in names:
        raise UserError(
            f"device = {device}: torch {torch.__version__} sees none here; take --device {' or '.join(names)}"
        )
    if device != "cuda":
        return torch.device(device)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local_rank is not None and processes > gpus:
        raise UserError(
            f"nproc_per_node = {processes}: this machine has {gpus} GPU{'s' * (gpus > 1)}, and each process takes one; "
            f"start torchrun with --nproc_per_node={gpus}"
        )
    if local_rank:
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank or 0)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for later tensors. Returning it to the system took a fifth of an update on a CPU.

    Blocks over 256 MB are still returned: keeping them would leave large holes (docs/speed.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # missing on macOS and musl
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h's numbers
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**28)


def make_deterministic() -> None:
    """Make torch use deterministic algorithms: equal results for an equal number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses CUDA's matrix products without it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would take time for memory that is never read


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
    """Resolve `auto` (for compile: None). The dtype for a CPU is float32 here; precision.py measures.

    Args:
        local_rank: as for find_device.
        why: reasons for choices that the caller has made, by 'dtype' and 'compile'.

    Raises:
        UserError: as find_device.
    """
    found, why = find_device(device, local_rank), dict(why or {})
    if found.type == "cuda":
        major, minor = torch.cuda.get_device_capability(found)
        name, units = ("bfloat16", "it") if major >= 8 else ("float16", "no bfloat16 units")
        auto_dtype = name, f"capability {major}.{minor} has {units}"
        auto_compile = True, "pays on CUDA"
    elif found.type == "mps":
        auto_dtype, auto_compile = ("float32", "this device has no fast bfloat16"), (False, "mps runs eager")
    else:
        auto_dtype = "float32", "no other was measured"
        auto_compile = False, "on a CPU it saves little and takes half a minute"  # docs/speed.md
    if dtype == "auto":
        dtype, why["dtype"] = auto_dtype
    elif dtype == "float16" and found.type == "cpu":
        note("note: float16 is slow on a CPU; bfloat16 or float32 is faster")
    if compile is None:
        compile, why["compile"] = auto_compile
    return DeviceSettings(found, DTYPES[dtype], compile, why)


def compile_forward(model: nn.Module, agree: Callable[[bool], bool] = bool) -> Callable[..., Tensor]:
    """Compile the model's forward. If the compiler fails, warn once and use the eager forward.

    Args:
        model: as wrap_model returns it. With fully_shard, each sharded module is compiled by itself.
        agree: returns whether its argument is true on every rank.
    """
    if hasattr(model, "unshard"):
        for block in model.transformer.h:
            for module in (block.attn, block.mlp):
                module.compile(dynamic=False)
        return model
    getattr(model, "module", model).exclude_loss_from_compile()  # DDP's module is the model
    compiled = torch.compile(model, dynamic=False)
    chosen = None

    def first_step(x: Tensor, y: Tensor) -> None:  # the backward is compiled when it is first run
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            loss = compiled(x, y)
            with torch.autocast(x.device.type, enabled=False):  # as in training
                loss.backward()

    def forward(x: Tensor, y: Tensor) -> Tensor:
        nonlocal chosen
        if chosen is None:
            with getattr(model, "no_sync", contextlib.nullcontext)():  # no rank waits for one whose compiler fails
                succeeded = compiles(lambda: first_step(x, y))
            chosen = compiled if agree(succeeded) else model
            model.zero_grad(set_to_none=True)
        return chosen(x, y)

    return forward


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """Return a context for generation: sharded modules that are compiled would compile anew for each length."""
    return torch.compiler.set_stance("force_eager") if hasattr(model, "unshard") else contextlib.nullcontext()


def compiles(step: Callable[[], object]) -> bool:
    """Run a compiled step for the first time. If the compiler fails, warn and return False."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    try:
        step()
    except TorchDynamoException as error:
        note(f"warning: torch.compile failed, going on without it: {str(error).strip().splitlines()[0]}")
        return False
    return True


def seed_of(*key: int) -> int:
    """Return a seed for a generator that depends on all numbers of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def reseed(*key: int) -> None:
    """Seed torch's generators from a key (seed, update, micro-batch).

    Dropout masks are then a function of the key, and no random state is stored to resume.
    """
    torch.manual_seed(seed_of(*key))
