"""bench.py data: the speed of prepare_data.py, in turn with plain encoding in one process and with datasets.map.

Each is a process of its own on the same parquet files; time and memory are those of its whole process tree.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from config import BenchConfig, PrepareConfig
from flatgpt import REPO_ROOT
from flatgpt.benchmarks.measure import USER_ENVIRONMENT, failure, in_turn, log, script
from flatgpt.data import readers, tokenizer, workers
from flatgpt.data.sources import expand, open_pydoc

WIKIPEDIA_BYTES = 19e9  # of text, 20231101.en
FINEWEB_TOKENS = 10e9  # GPT-2's, sample/10BT
ROW_GROUP = 1000  # rows, as in the hub's datasets


def bench_data(config: BenchConfig) -> dict:
    """Time all three in turn: medians of the rounds, peak memory, and the hours that large corpora would take."""
    processes = config.workers or workers.available_cores()
    tokenizer.load("gpt2")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        raw = Path(folder).resolve() / "raw"
        raw.mkdir()
        size = write_parquet(config, raw)
        log(f"{size / 1e6:,.0f} MB of text in {raw}, {processes} processes, {config.rounds} rounds")
        call = "from flatgpt.benchmarks import data; data."
        commands = {
            "plain": [sys.executable, "-c", f"{call}encode_plainly({str(raw)!r})"],
            "ours": script("prepare_data.py", "text", "--input", raw, "--workers", processes),
            "datasets_map": [sys.executable, "-c", f"{call}encode_with_datasets({str(raw)!r}, {processes}, '.')"],
        }
        if not importlib.util.find_spec("datasets"):
            del commands["datasets_map"]
            log("datasets is not installed: it is left out (pip install -r requirements-extra.txt)")
        tokens = 0

        def run(name: str) -> tuple[float, float]:
            nonlocal tokens
            with tempfile.TemporaryDirectory(dir=folder) as cwd:
                seconds, memory_gb, output = run_and_watch(commands[name], cwd)
                if name == "plain":
                    seconds = float(output)
                elif name == "ours":
                    splits = json.loads((Path(cwd) / "data" / "text" / "meta.json").read_text())["splits"]
                    tokens = sum(split["tokens"] for split in splits.values())
            return seconds, memory_gb

        results = in_turn(
            {name: lambda _, name=name: run(name) for name in commands},
            config.rounds,
            lambda name, latest: f"{size / latest[name][0] / 1e6:6.1f} MB/s {latest[name][1]:6.2f} GB",
        )
    figures: dict = {"text_mb": size / 1e6, "processes": processes}
    for name, rounds in results.items():
        seconds = statistics.median(s for s, _ in rounds)
        figures[f"{name}_mb_per_s"] = size / seconds / 1e6
        figures[f"{name}_tokens_per_s"] = tokens / seconds
        figures[f"{name}_memory_gb"] = max(memory_gb for _, memory_gb in rounds)
    rate = figures["ours_mb_per_s"] * 1e6
    figures["of_plain_times_processes"] = figures["ours_mb_per_s"] / figures["plain_mb_per_s"] / processes
    if "datasets_map" in results:
        figures["times_datasets_map"] = figures["ours_mb_per_s"] / figures["datasets_map_mb_per_s"]
    hours = {"wikipedia": WIKIPEDIA_BYTES / rate / 3600, "fineweb_10bt": FINEWEB_TOKENS * size / tokens / rate / 3600}
    for cores in (2, 16):
        figures |= {f"{name}_hours_{cores}_cores": figure * processes / cores for name, figure in hours.items()}
    return figures


def write_parquet(config: BenchConfig, folder: Path) -> int:
    """Write two parquet files of `size_mb` together, repeating the documents of `input`; return their bytes of text."""
    import pyarrow
    import pyarrow.parquet

    texts, size = [], 0
    for text in _documents(config.input):
        texts.append(text)
        size += len(text)
        if size > config.size_mb * 1e6:
            break
    endless, total = itertools.cycle(texts), 0
    schema = pyarrow.schema([("text", pyarrow.string())])
    for number in range(2):
        path = folder / f"train-{number:05d}-of-00002.parquet"
        with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
            while total < config.size_mb * 1e6 * (number + 1) / 2:
                rows = list(itertools.islice(endless, ROW_GROUP))
                writer.write_table(pyarrow.table({"text": rows}, schema))
                total += sum(len(row.encode()) for row in rows)
    return total


def _documents(patterns: tuple[str, ...]) -> Iterator[str]:
    if not patterns:
        yield from open_pydoc(PrepareConfig(source="pydoc")).files["train"][0].text.split("\n\n")
    files = [readers.RawFile(str(path), 0, path) for path in expand(patterns)]
    for task in readers.file_tasks(files, "text"):
        for chunk in task.read():
            yield chunk.text


# ---------------------------------------------------------------------------------------------------------------------
# the processes


def encode_plainly(folder: str) -> None:
    """Encode document by document with encode_ordinary; print the seconds of the encoding alone."""
    encoding, seconds = tokenizer.load("gpt2"), 0.0
    for path in sorted(Path(folder).glob("*.parquet")):
        rows = iter(readers.rows(path, "text"))
        while group := list(itertools.islice(rows, ROW_GROUP)):
            began = time.perf_counter()
            for chunk in group:
                encoding.encode_ordinary(chunk.text)
            seconds += time.perf_counter() - began
    print(seconds)


def encode_with_datasets(folder: str, processes: int, target: str) -> None:
    """Encode as nanoGPT's data/openwebtext does: datasets.map in many processes, then a memmap, in 1,024 steps."""
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


def run_and_watch(command: list[str], cwd: str) -> tuple[float, float, str]:
    """Run a command to its end; return its seconds, the peak memory of its process tree in GB, and its output."""
    began, peak = time.perf_counter(), 0
    offline = {"PYTHONPATH": str(REPO_ROOT), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out:
        streams = {"stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=cwd, env={**USER_ENVIRONMENT, **offline}, **streams)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.5)  # reading smaps walks all pages: more often, it would slow the process down
        seconds = time.perf_counter() - began
        out.seek(0)
        output = out.read()
    if process.returncode:
        raise failure(command, output, process.returncode)
    return seconds, peak / 1e9, output


def tree_memory(pid: int) -> int:
    """Return the bytes that a process and its descendants hold, shared pages counted once; 0 without /proc."""
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
