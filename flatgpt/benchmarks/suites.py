"""Lists of benchmarks: `bench.py all` for a CPU, `bench.py gpu` for a GPU. Each row is a process of its own.

A row that fails or takes too long is an error line, and the others go on; the files are written after each row.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from config import BenchConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks import nanogpt
from flatgpt.data.dataset import open_dataset
from flatgpt.runtime.device import cpu_name
from flatgpt.runtime.files import write_json, write_output

DATASETS = ("shakespeare", "shakespeare_byte")
BYTES = "--dataset shakespeare_byte --n_layer 6 --n_head 6 --n_embd 384 --context_length 256 --no-bias"
GPT2 = "--config gpt2_{} --dataset shakespeare --grad_accum_steps 1 --no-fsdp --no-bias"
SMALL = GPT2.format("124m")
# smol-GPT's 22M model, with a head and a non-linearity that nanoGPT has too
SMOL = "--config wikitext103_22m --dataset shakespeare --grad_accum_steps 1 --tie_weights --activation gelu_tanh"


class Row(NamedTuple):
    """One benchmark: `words` are bench.py's, `limit` is the most seconds that it may take."""

    label: str
    words: str
    limit: int = 3600
    peer: bool = False  # whether it takes --peer


# Without biases, as nanoGPT trains.
# On 2 cores a single update of the larger shapes takes seconds, nanoGPT's up to a minute: 20 minutes in all.
ALL = (
    Row(
        "4 x 128, bytes, B 12, T 64",
        "train --config shakespeare_char_cpu --warmup_updates 20 --timed_updates 40 --rounds 5",
        peer=True,
    ),
    Row(
        "6 x 384, bytes, B 12, T 256", f"train {BYTES} --batch_size 12 --warmup_updates 2 --timed_updates 3", peer=True
    ),
    Row(
        "GPT-2 124M, B 2, T 256",
        f"train {SMALL} --batch_size 2 --context_length 256 --warmup_updates 2 --timed_updates 2",
        peer=True,
    ),
    Row(
        "GPT-2 124M, B 2, T 1,024",
        f"train {SMALL} --batch_size 2 --warmup_updates 1 --timed_updates 2 --rounds 2",
        peer=True,
    ),
    Row("smol-GPT 22M, B 32, T 196", f"train {SMOL} --dropout 0 --warmup_updates 2 --timed_updates 2", peer=True),
    Row(
        "GPT-2 124M, B 8, T 1,024",
        f"train {SMALL} --batch_size 8 --warmup_updates 1 --timed_updates 2 --rounds 1",
        peer=True,
    ),
    Row("a save, GPT-2 124M, B 1, T 1,024", f"save {SMALL} --batch_size 1 --warmup_updates 1 --timed_updates 2"),
    Row("text to shards", "data --size_mb 100 --rounds 1"),
    Row("text by GPT-2 124M", "infer --config gpt2_124m"),
    Row("scores of out/shakespeare_char_cpu", "eval --config shakespeare_char_cpu --split val --rounds 1"),
)
# The most valuable rows come first, as the list may be cut short. Expected seconds on an H200, none of them measured:
# imports and data 10, compiling an update of 12 layers 35 (nanoGPT's at the same time), compiling a decoding step 12,
# updates 5 to 15: 90 + 55 + 45 + 20 + 20 (from the compiler's cache) + 45 + 30 + 20 + 35 = 360. The limits are 600 in
# all. Compiling 24 and 48 layers would take about 55 and 90: those rows are eager.
GPU = (
    Row("tests that need CUDA", "tests", 110),
    Row("GPT-2 124M, B 64, T 1,024", f"train {SMALL} --batch_size 64 --timed_updates 5", 90, peer=True),
    Row(
        "resumed, 2 x 768, B 8, T 1,024",
        "resume --config gpt2_124m --dataset shakespeare --grad_accum_steps 2 --n_layer 2 --batch_size 8 --dropout 0.1 "
        "--deterministic --max_iters 20 --sample_tokens 0",
        80,
    ),
    Row("GPT-2 124M, B 64, T 1,024, float16, eager", f"train {SMALL} --batch_size 64 --dtype float16 --no-compile", 40),
    Row("GPT-2 124M, B 64, T 1,024, Muon", f"train {SMALL} --batch_size 64 --optimizer muon", 50),
    Row(
        "text by GPT-2 124M, 1 and 64 at once",
        "infer --config gpt2_124m --samples 64 "
        "--variants bfloat16 bfloat16_x64 bfloat16_compiled bfloat16_compiled_x64",
        60,
    ),
    Row("text by GPT-2 124M, int8", "infer --config gpt2_124m --variants int8 int8_compiled", 50),
    Row(
        "GPT-2 350M, B 32, T 1,024, eager",
        f"train {GPT2.format('350m')} --batch_size 32 --timed_updates 10 --no-compile",
        60,
    ),
    Row(
        "GPT-2 1.5B, B 8, T 1,024, eager",
        f"train {GPT2.format('1558m')} --batch_size 8 --timed_updates 10 --no-compile",
        60,
    ),
)
SUITES = {"all": ALL, "gpu": GPU}
# --dry_run: the words added to those of a row, by the first of them. DRY_LIMIT leaves time for a slow machine.
TOY = "--n_layer 1 --n_head 2 --n_embd 32 --context_length 64"
DRY_WORDS = {
    "tests": "",
    "train": f"{TOY} --batch_size 2 --warmup_updates 1 --timed_updates 2 --rounds 1",
    "resume": f"{TOY} --batch_size 2 --max_iters 4 --eval_batches 2",
    "infer": f"{TOY} --vocab_size 300 --prompt_tokens 16 --new_tokens 4 --rounds 1 --compile",
}
DRY_LIMIT = 600
GRACE = 20  # seconds from SIGINT to SIGKILL; pytest-xdist waits 10 for a test that hangs


def bench_suite(config: BenchConfig, command: str, say: Callable[[str], None]) -> None:
    """Run the rows of config.what, on a CPU or on CUDA, in turn: figures to config.json, a table beside it and said.

    Raises:
        UserError: before the first row, where data, a GPU or the peer is missing.
    """
    on_cuda = config.what == "gpu" and not config.dry_run
    if on_cuda and not torch.cuda.is_available():
        raise UserError(
            "bench.py gpu needs a GPU, and torch sees none here; bench.py all and gpu --dry_run are for CPUs"
        )
    if config.peer:
        nanogpt.folder(config, "model.py", "train.py")
    missing = []
    for name in DATASETS:
        try:
            open_dataset(Path(config.data_dir) / name)
        except UserError as why:
            missing.append(str(why))
    if missing:
        raise UserError("; ".join(missing))
    device, name = ("cuda", torch.cuda.get_device_name()) if on_cuda else ("cpu", cpu_name())
    shared = ["--data_dir", config.data_dir, "--device", device]
    found = {"command": command, "device": name, "torch": torch.__version__, "dry_run": config.dry_run, "rows": {}}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the row too
    try:
        for row in SUITES[config.what]:
            words, limit = shlex.split(row.words), row.limit
            if config.dry_run:
                words, limit = [*words, *shlex.split(DRY_WORDS[words[0]])], DRY_LIMIT
            words += [*shared, *(["--peer", *config.peer] if row.peer and config.peer else [])]
            say(f"--- {row.label}: python bench.py {shlex.join(words)}")
            began = time.perf_counter()
            found["rows"][row.label] = run_row(words, limit, say) | {"seconds": time.perf_counter() - began}
            write_json(found, config.json)
            write_output(markdown(found).encode(), str(Path(config.json).with_suffix(".md")), "json")
    finally:
        signal.signal(signal.SIGTERM, before)
    print(markdown(found), end="")


def run_row(words: list[str], limit: float, say: Callable[[str], None]) -> dict:
    """The figures of one benchmark; if it failed or reached its limit in seconds, `error` has its last line."""
    command, last = [sys.executable, str(REPO_ROOT / "bench.py"), *words, "--json", "-"], ""

    def forward() -> None:
        nonlocal last
        for line in process.stderr:
            say(f"    {line.rstrip()}")
            last = line.strip() or last

    with tempfile.TemporaryFile("w+") as answer:
        streams = {"stdout": answer, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        process, late = subprocess.Popen(command, env=nanogpt.ENVIRONMENT, process_group=0, **streams), None
        reader = threading.Thread(target=forward, daemon=True)
        reader.start()
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = f"ended after its limit of {limit} s: {last}"
        finally:  # after Ctrl-C as well
            end(process)
            reader.join()
            process.stderr.close()
        answer.seek(0)
        text = answer.read()
    if late:
        figures = {}
        with contextlib.suppress(json.JSONDecodeError):  # bench.py tests prints the figures of the tests that had ended
            figures = json.loads(text)
        return {"error": late} | figures
    if process.returncode < 0:
        return {"error": f"ended by signal {-process.returncode} after: {last}"}  # 9 may mean that memory ran out
    if process.returncode:
        return {"error": last.removeprefix("error: ")}
    return json.loads(text)


def end(process: subprocess.Popen) -> None:
    """End a process group: SIGINT, as from Ctrl-C; after its leader's exit, or GRACE seconds, SIGKILL."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def markdown(found: dict) -> str:
    """All rows as Markdown: a table of updates, and a list of what else was measured or failed."""
    rows = found["rows"]
    updates = {label: row for label, row in rows.items() if "tflop_per_s" in row}
    dry = "A dry run at toy size: its figures are not results. " * found.get("dry_run", False)
    text = [f"{dry}{found['device']}, torch {found['torch']}: `{found['command']}`\n"]
    if updates:
        names = list(dict.fromkeys(name for row in updates.values() for name in row.get("peers", {})))
        heads = ["shape", "ms", "tokens/s", "TFLOP/s", "MFU", "of a product", "GB", "start, s"]
        text.append(_line(heads + [f"{name}, {what}" for name in names for what in ("tokens/s", "times", "memory")]))
        text.append(_line(["---"] * (len(heads) + 3 * len(names))))
        for label, row in updates.items():
            cells = [label, f"{row['ms']:,.1f}", f"{row['tokens_per_s']:,.0f}", f"{row['tflop_per_s']:,.2f}"]
            cells += ["" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_measured")]
            cells += [f"{row['peak_mem_gb']:.2f}", "" if row["start_s"] is None else f"{row['start_s']:.1f}"]
            for name in names:
                theirs = row.get("peers", {}).get(name)
                cells += [
                    f"{theirs['tokens_per_s']:,.0f}" if theirs else "",
                    f"{row['ratios'][name]['median']:.2f}" if theirs else "",
                    f"{row['memory_ratios'][name]:.0%}" if theirs else "",
                ]
            text.append(_line(cells))
        text.append("")
    for label, row in rows.items():
        if label not in updates:
            text.append(f"- {label}: {', '.join(_facts(row))}")
    return "\n".join(text).rstrip() + "\n"


def _facts(row: dict) -> list[str]:
    """What is said of a row outside the table."""
    said = [f"error: {row['error']}"] if "error" in row else []
    for key, value in row.items():
        if isinstance(value, list) and value:
            said.append(f"{key} {' '.join(map(str, value))}")
        elif isinstance(value, bool):
            said.append(f"{key} {str(value).lower()}")
        elif isinstance(value, int | float):
            said.append(f"{key} {value:,.2f}" if isinstance(value, float) else f"{key} {value:,}")
    return said


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
