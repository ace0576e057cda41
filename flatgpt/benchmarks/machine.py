"""Describe the CPU that a benchmark ran on, and bench.py merge: one table of the results of several machines."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path

import torch

from config import UserError
from flatgpt.benchmarks.measure import table
from flatgpt.data.workers import available_cores
from flatgpt.runtime.device import cpu_name
from flatgpt.runtime.precision import has_bfloat16

FLAGS = "avx|amx|vnni|bf16|fp16|fma|sve|asimd|i8mm"  # instructions that the speed of matrix products depends on
PRODUCT_SIZE = 2048  # rows and columns of both matrices
# columns of the table of updates, and figures of the other rows that merge prints
UPDATE_COLUMNS = ("ms", "tokens_per_s", "mfu_measured", "peak_mem_gb")
OTHER_FIGURES = ("tokens_per_s", "of_bandwidth", "mb_per_s", "during_to_outside", "times_as_fast", "to_first_token_s")
MACHINE_COLUMNS = ("cpu", "cores", "float32_gflop_per_s", "bfloat16_gflop_per_s", "read_gb_per_s", "cpu_flags")


def machine_facts() -> dict:
    """Return the CPU's name, family, model, flags and cores, and its measured speeds.

    The speeds are those of a product of two square matrices in float32 and bfloat16 (None: the CPU has no bfloat16), in
    GFLOP/s, and of reading memory, in GB/s, with torch's number of threads. Measuring takes about a second.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):  # systems other than Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (info.get("flags") or info.get("Features", "")).split()
    facts = {"cpu": cpu_name(), "cpu_family": info.get("cpu family"), "cpu_model": info.get("model")}
    facts |= {"cpu_flags": " ".join(sorted(flag for flag in flags if re.search(FLAGS, flag)))}
    facts |= {"cores": available_cores(), "threads": torch.get_num_threads()}
    facts |= {"float32_gflop_per_s": product_speed(torch.float32)}
    facts |= {"bfloat16_gflop_per_s": product_speed(torch.bfloat16) if has_bfloat16() else None}
    return facts | {"read_gb_per_s": read_bandwidth(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}


def product_speed(dtype: torch.dtype) -> float:
    """Return the GFLOP/s of a matrix product on the CPU: the best of six."""
    matrix, best = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype), 0.0
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * PRODUCT_SIZE**3 / (time.perf_counter() - start) / 1e9)
    return best


def read_bandwidth(device: torch.device) -> float:
    """Return the read bandwidth in GB/s: the best of five sums over 1 GB."""
    ones, best = torch.ones(250_000_000, device=device), 0.0
    for _ in range(5):
        start = time.perf_counter()
        ones.sum().item()
        best = max(best, 1.0 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------------------------------------------------------------
# bench.py merge


def merged(files: tuple[str, ...]) -> str:
    """Return the results of several machines as Markdown tables. A machine is named after its file.

    The tables are the machines, the updates with a row for each shape and machine, and for each other benchmark its
    figures with a column for each machine. What a machine did not measure is empty.

    Args:
        files: written by bench.py all.

    Raises:
        UserError: a file is not a result of bench.py all, or two files have the same name.
    """
    reports: dict[str, dict] = {}
    for file in map(Path, files):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            measured = all(isinstance(row, dict) for row in report["rows"].values()) and not report.get("dry_run")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is not a result of bench.py all: {type(error).__name__} {error}") from None
        if not measured:
            raise UserError(f"{file} is not a result of bench.py all, but of a dry run or another benchmark")
        if file.stem in reports:
            raise UserError(f"input: two files are named {file.stem}, and machines are named after their files")
        reports[file.stem] = report
    rows = {name: report["rows"] for name, report in reports.items()}
    facts = {name: report.get("machine", {}) | {"torch": report.get("torch")} for name, report in reports.items()}
    columns = (*MACHINE_COLUMNS, "torch", "date")
    tables = [[{"machine": name} | {key: facts[name].get(key) for key in columns} for name in reports], []]
    for label in dict.fromkeys(label for found in rows.values() for label in found):
        found = {name: rows[name].get(label, {}) for name in rows}
        if any("tflop_per_s" in row for row in found.values()):
            tables[1] += [{"shape": label, "machine": name} | update_columns(row) for name, row in found.items()]
        else:
            keys = dict.fromkeys(key for row in found.values() for key in row if key.endswith(OTHER_FIGURES))
            tables.append([{label: key} | {name: row.get(key) for name, row in found.items()} for key in keys])
    return "\n\n".join("\n".join(table(each)) for each in tables if each)


def update_columns(row: dict, columns: tuple[str, ...] = UPDATE_COLUMNS) -> dict:
    """Return the figures of an update, and for each peer its speed, ours relative to it, and its memory."""
    cells = {key: row.get(key) for key in columns}
    for name, peer in row.get("peers", {}).items():
        cells |= {f"{name}, tokens_per_s": peer["tokens_per_s"], f"{name}, times": row["ratios"][name]["median"]}
        cells |= {f"{name}, memory": row["memory_ratios"][name]}
    return cells
