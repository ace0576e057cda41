"""What the machine gives: device, precision, compiler, random state. Says what `auto` chose, and why."""

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
    """Where a run computes and how; `why` says for each choice of `auto` what decided it."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    why: dict[str, str]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in `dtype`; what needs float32 stays in it. Nothing at all for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that float16's small gradients do not vanish; does nothing for other dtypes."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def to_device(self, array: np.ndarray) -> Tensor:
        """A numpy array as a tensor on the device; on CUDA the copy does not wait."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given; for clocks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory_gb(self) -> float:
        """Most memory in use so far, 10^9 bytes: the device's on CUDA, else the process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux KiB

    @property
    def name(self) -> str:
        """What the device calls itself: `NVIDIA H200`, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def describe(self) -> str:
        """One line for people."""
        count = torch.get_num_threads()
        threads = f" ({count} thread{'s' * (count > 1)})" if self.device.type == "cpu" else ""
        dtype = str(self.dtype).removeprefix("torch.") + self._reason("dtype")
        return f"{self.name}{threads}, {dtype}, {'compiled' if self.compile else 'eager'}{self._reason('compile')}"

    def _reason(self, choice: str) -> str:
        return f" ({self.why[choice]})" if choice in self.why else ""


def note(text: str) -> None:
    """Say something on standard error, once where torchrun started several of us."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def find_device(device: str, local_rank: int | None = None) -> torch.device:
    """The device that `auto` or a name means; of several GPUs the one that belongs to the rank.

    Args:
        local_rank: this process's number among torchrun's on this machine; None: the verb uses a single device.

    Raises:
        UserError: a device that is not there.
    """
    if local_rank is None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: this verb uses one device; start it without torchrun"
        )
    _require_safe_torch()
    # Huge pages for large CPU tensors (Linux): with 50,257 ids over half of an update was page faults on the logits
    # (docs/speed.md). torch reads this once, when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _keep_memory()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    elif not available[device]:
        there = " or ".join(name for name, yes in available.items() if yes)
        raise UserError(f"device = {device}: torch {torch.__version__} sees none here; take --device {there}")
    if device != "cuda":
        return torch.device(device)
    asked, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local_rank is not None and asked > there:
        raise UserError(
            f"nproc_per_node = {asked}: this machine has {there} GPU{'s' * (there > 1)}, and each process takes one; "
            f"start torchrun with --nproc_per_node={there}"
        )
    if local_rank:
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank or 0)


def _keep_memory() -> None:
    """Have glibc keep freed memory for the next tensors, else each update gives it back and finds it anew.

    That took a fifth of an update on a CPU (docs/speed.md). Pieces over 256 MB are given back: holes would cost more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS and musl have none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h's numbers
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**28)


def _require_safe_torch() -> None:
    release = torch.__version__.split("+")[0]
    if tuple(map(int, release.split(".")[:2])) < (2, 10):
        raise UserError(
            f"torch {release} can be made to run code by a file that it only reads (weights_only=True: CVE-2025-32434 "
            "before 2.6, CVE-2026-24747 before 2.10): pip install -r requirements.txt"
        )


def make_deterministic() -> None:
    """Have this process compute the same bits twice, where it computes with the same number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses CUDA's matrix products
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, for memory that nobody reads


def cpu_name() -> str:
    """The processor's model, as the system calls it."""
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
    """Settle what is `auto` (compile: None). On a CPU `auto` is float32 here; precision.py measures.

    Args:
        local_rank: as find_device takes it.
        why: reasons for what the caller has chosen, by 'dtype' and 'compile'.

    Raises:
        UserError: a device that is not there.
    """
    place, why = find_device(device, local_rank), dict(why or {})
    if dtype == "auto":
        dtype, why["dtype"] = _auto_dtype(place)
    elif dtype == "float16" and place.type == "cpu":
        note("note: float16 is slow on a CPU; bfloat16 or float32 is faster")
    if compile is None:
        compile, why["compile"] = _auto_compile(place)
    return DeviceSettings(place, DTYPES[dtype], compile, why)


def _auto_dtype(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bfloat16", f"capability {major}.{minor} has it"
        return "float16", f"capability {major}.{minor} has no bfloat16 units"
    return "float32", "no other was measured" if device.type == "cpu" else "this device has no fast bfloat16"


def _auto_compile(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        return True, "pays on CUDA"
    if device.type == "mps":
        return False, "mps runs eager"
    return False, "on a CPU it saves little and takes half a minute"  # docs/speed.md


def compile_forward(model: nn.Module, agree: Callable[[bool], bool] = bool) -> Callable[..., Tensor]:
    """torch.compile of the model's forward; where the compiler fails, one warning and the plain forward.

    Args:
        model: as the ranks share it; of one that fully_shard has cut, each part is compiled on its own.
        agree: whether something holds on every rank.
    """
    if hasattr(model, "unshard"):
        for block in model.transformer.h:
            for part in (block.attn, block.mlp):
                part.compile(dynamic=False)
        return model
    getattr(model, "module", model).exclude_loss_from_compile()  # DDP's module is the model
    compiled = torch.compile(model, dynamic=False)
    chosen = None

    def forward(x: Tensor, y: Tensor) -> Tensor:
        nonlocal chosen
        if chosen is None:
            with getattr(model, "no_sync", contextlib.nullcontext)():  # a rank that fails is waited for by none
                works = _compiles(compiled, x, y)
            chosen = compiled if agree(works) else model
            model.zero_grad(set_to_none=True)
        return chosen(x, y)

    return forward


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """For text: the parts that compile_forward compiled would be compiled anew for each of its lengths."""
    return torch.compiler.set_stance("force_eager") if hasattr(model, "unshard") else contextlib.nullcontext()


def _compiles(compiled: Callable[..., Tensor], x: Tensor, y: Tensor) -> bool:
    """Whether forward and backward go through the compiler, tried once: the backward is compiled when it is first used.

    Leaves gradients behind, and the random state as it was.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to load, and needed only here

    try:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            loss = compiled(x, y)
            with torch.autocast(x.device.type, enabled=False):  # as training does it
                loss.backward()
    except TorchDynamoException as error:
        first = str(error).strip().splitlines()[0]
        note(f"warning: torch.compile failed, going on without it: {first}")
        return False
    return True


def seed_of(*key: int) -> int:
    """A seed for a generator, of its own for each key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def reseed(*key: int) -> None:
    """Seed torch's generators from a key (seed, update, micro-batch): dropout masks follow the key, and no random
    state has to be stored to resume."""
    torch.manual_seed(seed_of(*key))
