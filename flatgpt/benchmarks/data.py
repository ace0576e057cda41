"""How fast text becomes shards: prepare_data.py beside one process of plain encoding, and beside datasets.map.

Each way is a process of its own on the same parquet files; time and memory are those of the whole process tree.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from config import BenchConfig, PrepareConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.data import readers, tokenizer, workers
from flatgpt.data.sources import expand, open_pydoc

WIKIPEDIA_BYTES = 19e9  # of text, 20231101.en
FINEWEB_TOKENS = 10e9  # GPT-2's, sample/10BT


def write_parquet(config: BenchConfig, folder: Path) -> int:
    """Write the documents of `input`, again and again, as two parquet files of `size_mb` in all; their bytes of text.

    Row groups of 1,000 rows, as the hub's datasets have them.
    """
    import pyarrow
    import pyarrow.parquet

    texts, size = [], 0
    for text in _texts(config.input):
        texts.append(text)
        size += len(text)
        if size > config.size_mb * 1e6:
            break
    total, n = 0, 0
    schema = pyarrow.schema([("text", pyarrow.string())])
    for number in range(2):
        path = folder / f"train-{number:05d}-of-00002.parquet"
        with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
            while total < config.size_mb * 1e6 * (number + 1) / 2:
                rows = [texts[(n + k) % len(texts)] for k in range(1000)]
                writer.write_table(pyarrow.table({"text": rows}, schema))
                total, n = total + sum(len(row.encode()) for row in rows), n + 1000
    return total


def _texts(patterns: tuple[str, ...]) -> Iterator[str]:
    if not patterns:
        yield from open_pydoc(PrepareConfig(source="pydoc")).files["train"][0].text.split("\n\n")
    for path in expand(patterns):
        for part in readers.documents(path, "text"):
            yield part.text


def plain(folder: str) -> None:
    """One process, `encode_ordinary` document by document; prints the seconds of the encoding alone."""
    encoding = tokenizer.load("gpt2")
    seconds = 0.0
    for path in sorted(Path(folder).glob("*.parquet")):
        for task_rows in _thousands(readers.rows(path, "text")):
            began = time.perf_counter()
            for text in task_rows:
                encoding.encode_ordinary(text)
            seconds += time.perf_counter() - began
    print(seconds)


def _thousands(texts: Iterator[str]) -> Iterator[list[str]]:
    block = []
    for text in texts:
        block.append(text)
        if len(block) == 1000:
            yield block
            block = []
    yield block


def datasets_map(folder: str, processes: int, target: str) -> None:
    """The way of nanoGPT's data/openwebtext: datasets.map on many processes, then a memmap, filled in 1,024 steps."""
    import datasets
    import numpy as np
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    files = [str(path) for path in sorted(Path(folder).glob("*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=f"{target}/cache")

    def encode(row: dict) -> dict:
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    encoded = rows.map(encode, remove_columns=["text"], num_proc=processes)
    shards = np.memmap(f"{target}/train.bin", dtype=np.uint16, mode="w+", shape=(int(np.sum(encoded["len"])),))
    start = 0
    for number in range(1024):  # nanoGPT's number of batches
        # [:] reads a shard at once; by its name alone, as nanoGPT has it, datasets 4 and later reads row by row
        ids = np.concatenate(encoded.shard(1024, number, contiguous=True).with_format("numpy")[:]["ids"])
        shards[start : start + len(ids)] = ids
        start += len(ids)
    shards.flush()


def measure(words: list[str], cwd: str) -> tuple[float, float, str]:
    """Run a command to its end: seconds, peak memory of its process tree in GB (Linux: proportional), its output."""
    began, peak = time.perf_counter(), 0
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(words, cwd=cwd, env=environment, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.5)  # a look walks through all pages: more often would be part of what is measured
        seconds = time.perf_counter() - began
        out.seek(0)
        said = out.read()
    if process.returncode:
        raise UserError(f"{' '.join(words[:3])} failed: {said[-2000:]}")
    return seconds, peak / 1e9, said


def tree_memory(pid: int) -> int:
    """Bytes that a process and all below it hold, shared pages counted once; 0 where /proc does not say."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = 1024 * int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(tree_memory, map(int, (task / "children").read_text().split())))
    except OSError:
        pass
    return total


def bench_data(config: BenchConfig, say: Callable[[str], None]) -> dict:
    """Every way in turn, `rounds` times: medians of MB/s, the memory, and what large corpora take at that rate."""
    processes = config.workers or workers.cores()
    tokenizer.load("gpt2")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        raw = Path(folder).resolve() / "raw"
        raw.mkdir()
        size = write_parquet(config, raw)
        say(f"{size / 1e6:,.0f} MB of text in {raw}, {processes} processes, {config.rounds} rounds")
        source = repr(str(raw))
        ways = {
            "plain": ["-c", f"from flatgpt.benchmarks import data; data.plain({source})"],
            "ours": [f"{REPO_ROOT}/prepare_data.py", "text", "--input", str(raw), "--workers", str(processes)],
        }
        if importlib.util.find_spec("datasets"):
            ways["datasets_map"] = [
                "-c",
                f"from flatgpt.benchmarks import data; data.datasets_map({source}, {processes}, '.')",
            ]
        else:
            say("datasets is not installed: nothing beside it (pip install -r requirements-extra.txt)")
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(config.rounds):
            for way, words in ways.items():
                with tempfile.TemporaryDirectory(dir=folder) as target:
                    seconds, memory, said = measure([sys.executable, *words], target)
                    if way == "plain":
                        seconds = float(said)
                    if way == "ours":
                        meta = json.loads((Path(target) / "data" / "text" / "meta.json").read_text())
                found[way].append((seconds, memory))
                say(f"round {number + 1} {way:<12} {size / seconds / 1e6:6.1f} MB/s {memory:6.2f} GB")
    figures: dict = {"text_mb": size / 1e6, "processes": processes}
    tokens = sum(entry["tokens"] for entry in meta["splits"].values())
    for way, measured in found.items():
        seconds = statistics.median(s for s, _ in measured)
        figures[f"{way}_mb_per_s"] = size / seconds / 1e6
        figures[f"{way}_tokens_per_s"] = tokens / seconds
        figures[f"{way}_memory_gb"] = max(m for _, m in measured)
    rate = figures["ours_mb_per_s"] * 1e6
    figures["of_plain_times_processes"] = figures["ours_mb_per_s"] / figures["plain_mb_per_s"] / processes
    if "datasets_map" in found:
        figures["times_datasets_map"] = figures["ours_mb_per_s"] / figures["datasets_map_mb_per_s"]
    hours = {"wikipedia": WIKIPEDIA_BYTES / rate / 3600, "fineweb_10bt": FINEWEB_TOKENS * size / tokens / rate / 3600}
    for cores in (2, 16):
        figures |= {f"{name}_hours_{cores}_cores": figure * processes / cores for name, figure in hours.items()}
    return figures
