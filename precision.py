"""The precision that `auto` takes on a CPU: float32 or bfloat16, whichever is measured to be faster.

The CPU's flags do not tell. Of two CPUs with AVX512-BF16 and without AMX, an Intel Xeon multiplies in bfloat16 at half
of float32's speed, an AMD Zen 4 at twice (docs/speed.md).
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
from outputs import write_output
from runtime import note

SECONDS = 0.1  # of measuring, both precisions together
TIMES, LIMIT = 20, 1.0  # of slow products and on a busy machine: each kind so many times, within so many seconds
CLEARLY = 1.05  # bfloat16 has to be so many times as fast: within noise float32 is taken, which is more exact
FLOPS = 2e9  # of the product that is timed, at most: some 20 ms on one core
CHOICES = ("float32", "bfloat16")


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU. torch's own products are many times slower than float32's."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_is_mkldnn_bf16_supported")
        and operators._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def faster(
    what: str,
    flops: float,
    make: Callable[[torch.dtype], list[list[Callable]]],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[str, str]:
    """The faster of float32 and bfloat16 for some work, and the figures that were measured, as text.

    The two take turns, and the shortest time of each kind of step counts, so that other work on the machine does not
    decide.

    Args:
        what: the name of the work.
        flops: floating point operations of all steps together.
        make: returns the steps of the work in a precision; each list has those that take equally long.
        clock: returns seconds.
    """
    if not has_bfloat16():
        return "float32", "this CPU has no bfloat16"
    works = {name: make(getattr(torch, name)) for name in CHOICES}
    for steps in itertools.chain(*works.values()):
        steps[0]()  # sets up a kernel
    best = {name: [math.inf] * len(kinds) for name, kinds in works.items()}
    fewest = min(map(len, itertools.chain(*works.values())))
    order, spent, times = list(CHOICES), 0.0, 0
    while spent < SECONDS or (times < TIMES and spent < LIMIT):
        for name in order:
            for kind, steps in enumerate(works[name]):
                for step in steps:
                    began = clock()
                    step()
                    taken = clock() - began
                    best[name][kind] = min(best[name][kind], taken)
                    spent += taken
        order.reverse()
        times += fewest
    total = {
        name: sum(len(steps) * seconds for steps, seconds in zip(works[name], best[name], strict=True))
        for name in CHOICES
    }
    chosen, other = CHOICES if total["float32"] < CLEARLY * total["bfloat16"] else CHOICES[::-1]
    speed = {name: f"{float(f'{flops / seconds / 1e9:.3g}'):,g}" for name, seconds in total.items()}  # three digits
    return chosen, f"{what}: {speed[chosen]} GFLOP/s, {other} {speed[other]}"


def for_training(config: TrainConfig) -> tuple[str, str]:
    """The faster precision for a run, measured with the MLP's first product over the tokens of one micro-batch."""
    C, hidden = config.n_embd, round(config.mlp_ratio * config.n_embd)
    tokens = max(1, min(config.batch_size * config.context_length, int(FLOPS / (2 * C * hidden))))

    def product(dtype: torch.dtype) -> list[list[Callable]]:
        x, weight = torch.ones(tokens, C, dtype=dtype), torch.ones(hidden, C, dtype=dtype)
        return [[lambda: F.linear(x, weight)]]

    return faster(f"a product of {tokens:,} x {C:,} x {hidden:,}", 2 * tokens * C * hidden, product)


# ---------------------------------------------------------------------------------------------------------------------
# choices that are kept


def remembered(key: str, choose: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """The choice that was made for this key before, else choose() and keep it in a file of the user's.

    A file that cannot be read or written is not an error: the choice is then made each time.

    Args:
        key: everything that the choice depends on.
    """
    if key in (kept := _kept()):
        return kept[key]
    choice = choose()
    if key in (kept := _kept()):  # another process was first: both take what is in the file
        return kept[key]
    content = {**kept, key: choice}
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({k: {"dtype": dtype, "why": why} for k, (dtype, why) in content.items()}, indent=1)
        write_output(f"{text}\n".encode(), str(file), "cache")
    except (OSError, RuntimeError, UserError) as why:
        note(f"note: the choice of {choice[0]} cannot be kept for the next run ({why}); --dtype {choice[0]} fixes it")
    return choice


def cache_file() -> Path:
    """The file in which choices are kept. Raises RuntimeError where the user has no home folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / "flatgpt" / "precision.json"


def _kept() -> dict[str, tuple[str, str]]:
    """The valid entries of the file."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {
        key: (each["dtype"], each["why"])
        for key, each in entries
        if isinstance(each, dict) and each.get("dtype") in CHOICES and isinstance(each.get("why"), str)
    }
