"""Lists of benchmarks: `bench.py all` for a CPU, `bench.py gpu` for a GPU. Each row is a process of its own.

A row that fails is an error line, and the others go on; the files are written after each row.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import peer
from config import BenchConfig, UserError
from dataset import open_dataset
from outputs import write_json, write_output
from runtime import cpu_name

HOUSE = Path(__file__).resolve().parent
DATASETS = ("shakespeare", "shakespeare_byte")
BYTES = "--dataset shakespeare_byte --n_layer 6 --n_head 6 --n_embd 384 --context_length 256 --no-bias"
GPT2 = "--config gpt2_{} --dataset shakespeare --grad_accum_steps 1 --no-fsdp --no-bias"
SMALL = GPT2.format("124m")
# smol-GPT's 22M model, with a head and a non-linearity that nanoGPT has too
SMOL = "--config wikitext103_22m --dataset shakespeare --grad_accum_steps 1 --tie_weights --activation gelu_tanh"
CHARACTERS = f"{BYTES} --config shakespeare_char_fast --batch_size 64"

# label, words of bench.py, whether it takes --peer. Without biases, as nanoGPT trains.
# On 2 cores a single update of the larger shapes takes seconds, nanoGPT's up to a minute: 20 minutes in all.
ALL = (
    (
        "4 x 128, bytes, B 12, T 64",
        "train --config shakespeare_char_cpu --warmup_updates 20 --timed_updates 40 --rounds 5",
        True,
    ),
    ("6 x 384, bytes, B 12, T 256", f"train {BYTES} --batch_size 12 --warmup_updates 2 --timed_updates 3", True),
    (
        "GPT-2 124M, B 2, T 256",
        f"train {SMALL} --batch_size 2 --context_length 256 --warmup_updates 2 --timed_updates 2",
        True,
    ),
    (
        "GPT-2 124M, B 2, T 1,024",
        f"train {SMALL} --batch_size 2 --warmup_updates 1 --timed_updates 2 --rounds 2",
        True,
    ),
    ("smol-GPT 22M, B 32, T 196", f"train {SMOL} --dropout 0 --warmup_updates 2 --timed_updates 2", True),
    ("GPT-2 124M, B 8, T 1,024", f"train {SMALL} --batch_size 8 --warmup_updates 1 --timed_updates 2 --rounds 1", True),
    ("a save, GPT-2 124M, B 1, T 1,024", f"save {SMALL} --batch_size 1 --warmup_updates 1 --timed_updates 2", False),
    ("text to shards", "data --size_mb 100 --rounds 1", False),
    ("text by GPT-2 124M", "infer --config gpt2_124m", False),
    (
        "scores of out/shakespeare_char_cpu",
        "eval --config shakespeare_char_cpu --split val --rounds 1",
        False,
    ),
)
# On an H200, in seconds: imports and data 10, then compiling, about 35, 55 and 90 for 12, 24 and 48 layers (nanoGPT's
# at the same time), updates 5 to 15: 55 + 50 + 50 + 15 + 70 + 20 (from the compiler's cache) + 100 + 115 = 475.
# The time from start to first update is that of the rows without a peer.
GPU = (
    ("GPT-2 124M, B 64, T 1,024", f"train {SMALL} --batch_size 64 --timed_updates 5", True),
    ("GPT-2 124M, B 32, T 1,024", f"train {SMALL} --batch_size 32 --timed_updates 5", True),
    ("GPT-2 124M, B 16, T 1,024", f"train {SMALL} --batch_size 16", False),
    ("GPT-2 124M, B 16, T 1,024, eager", f"train {SMALL} --batch_size 16 --no-compile", False),
    ("GPT-2 350M, B 32, T 1,024", f"train {GPT2.format('350m')} --batch_size 32 --timed_updates 4", True),
    ("GPT-2 124M, B 64, T 1,024, Muon", f"train {SMALL} --batch_size 64 --optimizer muon", False),
    ("6 x 384, bytes, B 64, T 256, to 1.47", f"loss {CHARACTERS} --target 1.47 --seeds 1", True),
    (
        "GPT-2 1.5B, B 8, T 1,024",
        f"train {GPT2.format('1558m')} --batch_size 8 --warmup_updates 3 --timed_updates 3",
        True,
    ),
)
SUITES = {"all": ALL, "gpu": GPU}


def bench_suite(config: BenchConfig, command: str, say: Callable[[str], None]) -> None:
    """Run the rows of config.what, on a CPU or on CUDA, in turn: figures to config.json, a table beside it and said.

    Raises:
        UserError: before the first row, where data, a GPU or the peer is missing.
    """
    if config.what == "gpu" and not torch.cuda.is_available():
        raise UserError("bench.py gpu needs a GPU, and torch sees none here; bench.py all is for CPUs")
    if config.peer:
        peer.folder(config, "model.py", "train.py")
    missing = []
    for name in DATASETS:
        try:
            open_dataset(Path(config.data_dir) / name)
        except UserError as why:
            missing.append(str(why))
    if missing:
        raise UserError("; ".join(missing))
    device, name = ("cuda", torch.cuda.get_device_name()) if config.what == "gpu" else ("cpu", cpu_name())
    shared = ["--data_dir", config.data_dir, "--device", device]
    found = {"command": command, "device": name, "torch": torch.__version__, "rows": {}}
    for label, text, with_peer in SUITES[config.what]:
        words = [*shlex.split(text), *shared, *(["--peer", *config.peer] if with_peer and config.peer else [])]
        say(f"--- {label}: python bench.py {shlex.join(words)}")
        found["rows"][label] = run_row(words, say)
        write_json(found, config.json)
        write_output(markdown(found).encode(), str(Path(config.json).with_suffix(".md")), "json")
    print(markdown(found), end="")


def run_row(words: list[str], say: Callable[[str], None]) -> dict:
    """The figures of one benchmark, or {"error": the last that it said}."""
    command, last = [sys.executable, str(HOUSE / "bench.py"), *words, "--json", "-"], ""
    with tempfile.TemporaryFile("w+") as answer:
        streams = {"stdout": answer, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=peer.ENVIRONMENT, **streams) as process:
            for line in process.stderr:
                say(f"    {line.rstrip()}")
                last = line.strip() or last
        answer.seek(0)
        if process.returncode < 0:
            return {"error": f"ended by signal {-process.returncode} after: {last}"}  # 9: memory ran out, say
        if process.returncode:
            return {"error": last.removeprefix("error: ")}
        return json.loads(answer.read())


def markdown(found: dict) -> str:
    """All rows as Markdown: a table of updates, a table of seconds to a loss, a list of what else was measured."""
    rows = found["rows"]
    updates = {label: row for label, row in rows.items() if "tflop_per_s" in row}
    losses = {label: row for label, row in rows.items() if "target" in row}
    text = [f"{found['device']}, torch {found['torch']}: `{found['command']}`\n"]
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
    for label, row in losses.items():
        theirs = row.get("peers", {}).get("nanoGPT", {}).get("seconds")
        seconds = "not reached" if row["seconds"] is None else f"{row['seconds']:,.1f} s"
        beside = f", nanoGPT {theirs:,.1f} s" if theirs else ""
        ratio = f", {row['ratios']['nanoGPT']['median']:.2f} times as fast" if "ratios" in row else ""
        text.append(f"- {label}: {seconds}{beside}{ratio}")
    for label, row in rows.items():
        if "error" in row:
            text.append(f"- {label}: error: {row['error']}")
        elif label not in updates | losses:
            figures = [f"{key} {value:,.2f}" for key, value in row.items() if isinstance(value, float)]
            text.append(f"- {label}: {', '.join(figures)}")
    return "\n".join(text).rstrip() + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
