"""Choose the fastest of several implementations on a CPU by timing them. `auto` stands for such a choice.

The CPU's flags do not determine which is fastest. Of two CPUs with AVX512-BF16 and without AMX, an Intel Xeon
multiplies in bfloat16 at half the speed of float32, an AMD Zen 4 at twice the speed (docs/speed.md). The modules that
own implementations list them as candidates: kernels/attention.py, kernels/cross_entropy.py, inference/prepacking.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from config import UserError
from flatgpt.runtime.device import cpu_name, note
from flatgpt.runtime.files import write_output

MIN_SECONDS = 0.1  # minimum measuring time, all candidates together
# Slow steps and busy machines take longer: up to MAX_SECONDS, until each step has run MIN_REPEATS times, and twice in
# nearly its shortest time.
MIN_REPEATS, MAX_SECONDS, NEARLY = 10, 3.0, 1.1
MIN_SPEEDUP = 1.05  # of a candidate over those listed before it; a smaller one may be noise
MAX_FLOPS = 1e9  # of a step that is timed: about 10 ms on one core

# Name -> function that makes the steps to time. Defaults, and what is more accurate, come first.
Candidates = dict[str, Callable[[], list[Callable]]]


class Choice(NamedTuple):
    """The name of the chosen candidate, and why: the measured times. Empty if there was only one candidate."""

    name: str
    why: str


def has_bfloat16() -> bool:
    """Return whether oneDNN has bfloat16 matmuls for this CPU. Other implementations are far slower than float32."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_is_mkldnn_bf16_supported")
        and operators._is_mkldnn_bf16_supported()
    )


def measure(candidates: Candidates, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return the seconds of all steps of each candidate. No random number is drawn.

    The candidates take turns, and the shortest time of each step counts, so that other load on the machine does not
    affect the comparison.

    Args:
        clock: returns the current time in seconds.
    """
    with torch.random.fork_rng(devices=[]):
        steps = {name: make() for name, make in candidates.items()}
        for step in itertools.chain(*steps.values()):
            step()  # warm-up: oneDNN creates a kernel for each shape
        shortest = {name: [[math.inf, math.inf] for _ in steps[name]] for name in steps}  # the two shortest times
        order, measured, rounds, steady = list(steps), 0.0, 0, False
        while measured < MIN_SECONDS or (measured < MAX_SECONDS and (rounds < MIN_REPEATS or not steady)):
            for name in order:
                for i, step in enumerate(steps[name]):
                    started = clock()
                    step()
                    elapsed = clock() - started
                    shortest[name][i] = sorted((*shortest[name][i], elapsed))[:2]
                    measured += elapsed
            order.reverse()
            rounds += 1
            totals = [[sum(column) for column in zip(*times, strict=True)] for times in shortest.values()]
            steady = all(second <= NEARLY * first for first, second in totals)
    return {name: sum(first for first, _ in times) for name, times in shortest.items()}


def choose(label: str, candidates: Candidates, shape: str = "") -> Choice:
    """Return the fastest candidate, from the cache if it was measured before on this CPU.

    A candidate is chosen only if it is MIN_SPEEDUP times as fast as those listed before it. The cache makes the choice,
    and with it the digits of all results, the same the next time. If its file cannot be read or written, candidates are
    measured each time.

    Args:
        label: what is timed.
        shape: everything else that the choice depends on, besides label, CPU, number of threads and torch.
    """
    if len(candidates) == 1:
        return Choice(*candidates, "")
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # limits the instructions that oneDNN uses
    key = (
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()} {isa}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: {label}{shape}, {' or '.join(candidates)}"
    )
    if key in (cached := _read_cache()) and cached[key].name in candidates:
        return cached[key]
    seconds = measure(candidates)
    chosen = next(name for name in seconds if seconds[name] < MIN_SPEEDUP * min(seconds.values()))
    others = "".join(f", {name} {1e3 * seconds[name]:.3g}" for name in seconds if name != chosen)
    choice = Choice(chosen, f"{label}: {1e3 * seconds[chosen]:.3g} ms{others}")
    content = {**_read_cache(), key: choice}  # another process may have written to it
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({k: {"dtype": name, "why": why} for k, (name, why) in content.items()}, indent=1)
        write_output(f"{text}\n".encode(), str(file), "cache")
    except (OSError, RuntimeError, UserError) as error:
        _note_once(f"note: measured choices cannot be cached and may differ at the next start ({error})")
    return choice


_note_once = functools.cache(note)


def cache_file() -> Path:
    """Return the path of the cache file. Raise RuntimeError if the user has no home folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / "flatgpt" / "precision.json"


def _read_cache() -> dict[str, Choice]:
    """Return the entries of the cache file, or no entries if it is missing or damaged."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
        return {key: Choice(str(entry["dtype"]), str(entry["why"])) for key, entry in content.items()}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return {}
