"""Describe the CPU that a benchmark runs on, and measure its speeds."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import torch

from flatgpt.data.workers import available_cores
from flatgpt.runtime.choices import has_bfloat16
from flatgpt.runtime.device import cpu_name
from flatgpt.training.plan import matmul_flops

# instructions that the speed of matrix products depends on, of x86 and of ARM
FLAGS = r"fma|avx2|avx512f|avx_vnni|(avx512|amx)_(bf16|fp16|vnni|int8)|asimddp|i8mm|bf16|sve2?"


def machine_facts() -> dict:
    """Return the CPU's name, family, model, flags and cores, and its measured speeds.

    The speeds are those of a product of two square matrices in float32 and, if the CPU has it, in bfloat16, in GFLOP/s,
    and of reading memory, in GB/s, with torch's number of threads. Measuring takes about a second.
    """
    device, info = torch.device("cpu"), {}
    with contextlib.suppress(OSError):  # systems other than Linux
        info = dict(re.findall(r"^(.*?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M))
    flags = (info.get("flags") or info.get("Features", "")).split()
    speeds = {"float32_gflop_per_s": matmul_flops(device, torch.float32) / 1e9}
    if has_bfloat16():
        speeds["bfloat16_gflop_per_s"] = matmul_flops(device, torch.bfloat16) / 1e9
    facts = {"cpu": cpu_name(), "cpu_family": info.get("cpu family"), "cpu_model": info.get("model")}
    facts |= {"cpu_flags": " ".join(sorted(filter(re.compile(FLAGS).fullmatch, flags))), "cores": available_cores()}
    facts |= {"threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    return facts | speeds | {"read_gb_per_s": read_bandwidth(device)}


def read_bandwidth(device: torch.device) -> float:
    """Return the read bandwidth in GB/s: the best of five sums over 1 GB."""
    ones, best = torch.ones(250_000_000, device=device), 0.0
    for _ in range(5):
        start = time.perf_counter()
        ones.sum().item()
        best = max(best, 1.0 / (time.perf_counter() - start))
    return best
