"""Measure whether float32 or bfloat16 is faster on a CPU. `--dtype auto` selects the faster one.

The CPU's flags do not determine this. Of two CPUs with AVX512-BF16 and without AMX, an Intel Xeon multiplies in
bfloat16 at half the speed of float32, an AMD Zen 4 at twice the speed (docs/speed.md).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from config import TrainConfig, UserError
from flatgpt.runtime.device import note
from flatgpt.runtime.files import write_output

MIN_SECONDS = 0.1  # minimum measuring time, both dtypes together
# Slow matmuls and busy machines take longer: up to MAX_SECONDS, until each step has run MIN_REPEATS times.
MIN_REPEATS, MAX_SECONDS = 20, 1.0
MIN_SPEEDUP = 1.05  # of bfloat16 over float32; a smaller one may be noise, and float32 is more accurate
MAX_FLOPS = 2e9  # of the matmul that is timed: about 20 ms on one core
CHOICES = ("float32", "bfloat16")


def has_bfloat16() -> bool:
    """Return whether oneDNN has bfloat16 matmuls for this CPU. Other implementations are far slower than float32."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_is_mkldnn_bf16_supported")
        and operators._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def faster_dtype(
    label: str,
    flops: float,
    make_steps: Callable[[torch.dtype], list[Callable]],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[str, str]:
    """Return the faster of float32 and bfloat16 for a list of steps, and the measured speeds as text.

    The dtypes alternate, and the shortest time of each step counts, so that other load on the machine does not affect
    the choice.

    Args:
        label: the name of the measurement in the text.
        flops: floating-point operations of all steps together.
        make_steps: returns the steps in a dtype.
        clock: returns the current time in seconds.
    """
    if not has_bfloat16():
        return "float32", "this CPU has no bfloat16"
    steps = {name: make_steps(getattr(torch, name)) for name in CHOICES}
    for step in itertools.chain(*steps.values()):
        step()  # warm-up: oneDNN creates a kernel for each shape
    best = {name: [math.inf] * len(steps[name]) for name in CHOICES}
    order, measured, rounds = list(CHOICES), 0.0, 0
    while measured < MIN_SECONDS or (rounds < MIN_REPEATS and measured < MAX_SECONDS):
        for name in order:
            for i, step in enumerate(steps[name]):
                started = clock()
                step()
                elapsed = clock() - started
                best[name][i] = min(best[name][i], elapsed)
                measured += elapsed
        order.reverse()
        rounds += 1
    total = {name: sum(best[name]) for name in CHOICES}
    chosen, other = CHOICES if total["float32"] < MIN_SPEEDUP * total["bfloat16"] else CHOICES[::-1]
    speed = {name: f"{float(f'{flops / seconds / 1e9:.3g}'):,g}" for name, seconds in total.items()}  # three digits
    return chosen, f"{label}: {speed[chosen]} GFLOP/s, {other} {speed[other]}"


def faster_training_dtype(config: TrainConfig) -> tuple[str, str]:
    """Return the faster dtype for training, measured with the MLP's first matmul over one micro-batch's tokens."""
    C, hidden = config.n_embd, round(config.mlp_ratio * config.n_embd)
    tokens = max(1, min(config.batch_size * config.context_length, int(MAX_FLOPS / (2 * C * hidden))))

    def matmul(dtype: torch.dtype) -> list[Callable]:
        x, weight = torch.ones(tokens, C, dtype=dtype), torch.ones(hidden, C, dtype=dtype)
        return [lambda: F.linear(x, weight)]

    return faster_dtype(f"matmul {tokens:,} x {C:,} x {hidden:,}", 2 * tokens * C * hidden, matmul)


# ---------------------------------------------------------------------------------------------------------------------
# choices that are cached


def cached_choice(key: str, choose: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Return the cached choice for a key. If there is none, call choose() and write its result to the cache.

    If the cache file cannot be read or written, choose() is called each time.

    Args:
        key: everything that the choice depends on.
    """
    if key in (cached := _read_cache()):
        return cached[key]
    choice = choose()
    content = {**_read_cache(), key: choice}  # another process may have written to it
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({k: {"dtype": dtype, "why": why} for k, (dtype, why) in content.items()}, indent=1)
        write_output(f"{text}\n".encode(), str(file), "cache")
    except (OSError, RuntimeError, UserError) as error:
        note(f"note: the choice of {choice[0]} cannot be cached ({error}); pass --dtype {choice[0]} to set it")
    return choice


def cache_file() -> Path:
    """Return the path of the cache file. Raise RuntimeError if the user has no home folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / "flatgpt" / "precision.json"


def _read_cache() -> dict[str, tuple[str, str]]:
    """Return the entries of the cache file, or no entries if it is missing or damaged."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
        return {key: (entry["dtype"], entry["why"]) for key, entry in content.items() if entry["dtype"] in CHOICES}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return {}
