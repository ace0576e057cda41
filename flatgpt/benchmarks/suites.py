"""bench.py all and gpu: lists of benchmarks for a CPU and for a GPU. Each row is a process of its own.

A row that fails or reaches its time limit becomes an error, and the next row starts; the files are written after each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

from config import BenchConfig, UserError
from flatgpt.benchmarks import nanogpt
from flatgpt.benchmarks.measure import USER_ENVIRONMENT, format_value, log, script
from flatgpt.benchmarks.training import cell
from flatgpt.data.dataset import open_dataset
from flatgpt.runtime.device import cpu_name
from flatgpt.runtime.files import write_json, write_output

DATASETS = ("shakespeare", "shakespeare_byte")
BYTES = "--dataset shakespeare_byte --n_layer 6 --n_head 6 --n_embd 384 --context_length 256 --no-bias"
GPT2 = "--config gpt2_{} --dataset shakespeare --grad_accum_steps 1 --no-fsdp --no-bias"
SMALL, MEDIUM, XL = (GPT2.format(size) for size in ("124m", "350m", "1558m"))
RESUMED = (
    "resume --config gpt2_124m --dataset shakespeare --grad_accum_steps 2 --n_layer 2 --batch_size 8 --dropout 0.1 "
    "--deterministic --max_iters 20 --sample_tokens 0"
)
VARIANTS = "bfloat16 bfloat16_x64 bfloat16_compiled bfloat16_compiled_x64"
# smol-GPT's 22M model, with a head and an activation that nanoGPT has too
SMOL = "--config wikitext103_22m --dataset shakespeare --grad_accum_steps 1 --tie_weights --activation gelu_tanh"


class Row(NamedTuple):
    """One benchmark: the arguments of bench.py, its time limit in seconds, and whether it takes --peer."""

    label: str
    words: str
    limit: int = 3600
    peer: bool = False


def train_row(label: str, words: str, warmup: int, timed: int, limit: int = 3600, peer: bool = False) -> Row:
    """Return a row of bench.py train."""
    return Row(label, f"train {words} --warmup_updates {warmup} --timed_updates {timed}", limit, peer)


# Without biases, as nanoGPT trains.
# On 2 cores one update of the larger shapes takes seconds, nanoGPT's up to a minute: 20 minutes in total.
ALL = (
    train_row("4 x 128, bytes, B 12, T 64", "--config shakespeare_char_cpu --rounds 5", 20, 40, peer=True),
    train_row("6 x 384, bytes, B 12, T 256", f"{BYTES} --batch_size 12", 2, 3, peer=True),
    train_row("GPT-2 124M, B 2, T 256", f"{SMALL} --batch_size 2 --context_length 256", 2, 2, peer=True),
    train_row("GPT-2 124M, B 2, T 1,024", f"{SMALL} --batch_size 2 --rounds 2", 1, 2, peer=True),
    train_row("smol-GPT 22M, B 32, T 196", f"{SMOL} --dropout 0", 2, 2, peer=True),
    train_row("GPT-2 124M, B 8, T 1,024", f"{SMALL} --batch_size 8 --rounds 1", 1, 2, peer=True),
    Row("a save, GPT-2 124M, B 1, T 1,024", f"save {SMALL} --batch_size 1 --warmup_updates 1 --timed_updates 2"),
    Row("text to shards", "data --size_mb 100 --rounds 1"),
    Row("text by GPT-2 124M", "infer --config gpt2_124m"),
    Row("scores of out/shakespeare_char_cpu", "eval --config shakespeare_char_cpu --split val --rounds 1"),
)
# The most valuable rows come first, since the list may be cut short. Seconds on an H200, imports and compilation
# included: the tests and the resumed run were not measured to their ends, the others took 57, 19, 26, 58, 40, 19 and
# 35. The limits are 600 in total. Compiling 24 and 48 layers would take about 55 and 90: those rows are eager.
GPU = (
    Row("tests that need CUDA", "tests", 150),
    train_row("GPT-2 124M, B 64, T 1,024", f"{SMALL} --batch_size 64", 5, 5, 75, peer=True),
    Row("resumed, 2 x 768, B 8, T 1,024", RESUMED, 105),
    train_row(
        "GPT-2 124M, B 64, T 1,024, float16, eager", f"{SMALL} --batch_size 64 --dtype float16 --no-compile", 5, 20, 30
    ),
    train_row("GPT-2 124M, B 64, T 1,024, Muon", f"{SMALL} --batch_size 64 --optimizer muon", 5, 20, 40),
    Row("text by GPT-2 124M, 1 and 64 at once", f"infer --config gpt2_124m --samples 64 --variants {VARIANTS}", 70),
    Row("text by GPT-2 124M, int8", "infer --config gpt2_124m --variants int8 int8_compiled", 50),
    train_row("GPT-2 350M, B 32, T 1,024, eager", f"{MEDIUM} --batch_size 32 --no-compile", 5, 10, 30),
    train_row("GPT-2 1.5B, B 8, T 1,024, eager", f"{XL} --batch_size 8 --no-compile", 5, 10, 50),
)
SUITES = {"all": ALL, "gpu": GPU}
# --dry_run: arguments that are added to those of a row, by its first. DRY_LIMIT leaves time for a slow machine.
TOY = "--n_layer 1 --n_head 2 --n_embd 32 --context_length 64"
DRY_WORDS = {
    "tests": "",
    "train": f"{TOY} --batch_size 2 --warmup_updates 1 --timed_updates 2 --rounds 1",
    "resume": f"{TOY} --batch_size 2 --max_iters 4 --eval_batches 2",
    "infer": f"{TOY} --vocab_size 300 --prompt_tokens 16 --new_tokens 4 --rounds 1 --compile",
}
DRY_LIMIT = 600
GRACE = 20  # seconds from SIGINT to SIGKILL; pytest-xdist waits 10 for a test that hangs
COLUMNS = {  # of the table of updates, by figure
    "ms": "ms",
    "tokens_per_s": "tokens/s",
    "tflop_per_s": "TFLOP/s",
    "mfu": "MFU",
    "mfu_measured": "of a product",
    "peak_mem_gb": "GB",
    "start_s": "start, s",
}


def bench_suite(config: BenchConfig, command: str) -> None:
    """Run the rows of config.what in turn; write figures to config.json and a table beside it, and print the table.

    Raises:
        UserError: before the first row, if data, a GPU or the peer is missing.
    """
    on_cuda = config.what == "gpu" and not config.dry_run
    if on_cuda and not torch.cuda.is_available():
        raise UserError(
            "bench.py gpu needs a GPU, and torch sees none here; bench.py all and gpu --dry_run are for CPUs"
        )
    if config.peer:
        nanogpt.checkout(config, "model.py", "train.py")
    missing = []
    for name in DATASETS:
        try:
            open_dataset(Path(config.data_dir) / name)
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("; ".join(missing))
    device, name = ("cuda", torch.cuda.get_device_name()) if on_cuda else ("cpu", cpu_name())
    found = {"command": command, "device": name, "torch": torch.__version__, "dry_run": config.dry_run, "rows": {}}
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM ends the row too
    try:
        for row in SUITES[config.what]:
            words, limit = shlex.split(row.words), row.limit
            if config.dry_run:
                words, limit = [*words, *shlex.split(DRY_WORDS[words[0]])], DRY_LIMIT
            words += ["--data_dir", config.data_dir, "--device", device]
            words += ["--peer", *config.peer] if row.peer and config.peer else []
            log(f"--- {row.label}: python bench.py {shlex.join(words)}")
            began = time.perf_counter()
            found["rows"][row.label] = run_row(words, limit) | {"seconds": time.perf_counter() - began}
            write_json(found, config.json)
            write_output(markdown(found).encode(), str(Path(config.json).with_suffix(".md")), "json")
    finally:
        signal.signal(signal.SIGTERM, handler)
    print(markdown(found), end="")


def run_row(words: list[str], limit: float) -> dict:
    """Return the figures of one benchmark; `error` has its last line if it failed or reached its limit in seconds."""
    last = ""

    def forward() -> None:
        nonlocal last
        for line in process.stderr:
            log(f"    {line.rstrip()}")
            last = line.strip() or last

    with tempfile.TemporaryFile("w+") as stdout:
        streams = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        command = script("bench.py", *words, "--json", "-")
        process, timeout = subprocess.Popen(command, env=USER_ENVIRONMENT, process_group=0, **streams), None
        reader = threading.Thread(target=forward, daemon=True)
        reader.start()
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timeout = f"ended after its limit of {limit} s: {last}"
        finally:  # after Ctrl-C as well
            end(process)
            reader.join()
            process.stderr.close()
        stdout.seek(0)
        text = stdout.read()
    if timeout:
        with contextlib.suppress(json.JSONDecodeError):  # bench.py tests prints the outcomes of the tests that ended
            return {"error": timeout} | json.loads(text)
        return {"error": timeout}
    if process.returncode < 0:
        return {"error": f"ended by signal {-process.returncode} after: {last}"}  # 9 may mean that memory ran out
    return {"error": last.removeprefix("error: ")} if process.returncode else json.loads(text)


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
    """Return all rows as Markdown: a table of updates, and a list of what else was measured or failed."""
    rows = found["rows"]
    updates = {label: row for label, row in rows.items() if "tflop_per_s" in row}
    peers = list(dict.fromkeys(name for row in updates.values() for name in row.get("peers", ())))
    dry = "A dry run at toy size: its figures are not results. " * found.get("dry_run", False)
    lines = [f"{dry}{found['device']}, torch {found['torch']}: `{found['command']}`", ""]
    if updates:
        heads = ["shape", *COLUMNS.values()]
        heads += [f"{name}, {what}" for name in peers for what in ("tokens/s", "times", "memory")]
        table = [heads, ["---"] * len(heads)]
        for label, row in updates.items():
            table.append([label, *(cell(row, key) for key in COLUMNS)])
            for name in peers:
                figures = row.get("peers", {}).get(name)
                table[-1] += (
                    [cell(figures, "tokens_per_s"), f"{row['ratios'][name]['median']:.2f}"] if figures else ["", ""]
                )
                table[-1].append(f"{row['memory_ratios'][name]:.0%}" if figures else "")
        lines += [*(f"| {' | '.join(cells)} |" for cells in table), ""]
    for label, row in rows.items():
        if label not in updates:
            facts = [f"error: {row['error']}"] if "error" in row else []
            facts += [f"{k} {format_value(v)}" for k, v in row.items() if isinstance(v, list | int | float) and v != []]
            lines.append(f"- {label}: {', '.join(facts)}")
    return "\n".join(lines).rstrip() + "\n"
