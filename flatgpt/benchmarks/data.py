"""bench.py data: compare prepare_data.py with plain encoding in one process and with datasets.map.

Each runs in a separate process on the same parquet file. Time and memory are measured for its whole process tree.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

from config import BenchConfig, PrepareConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.benchmarks.measure import Process, interleave, log, script
from flatgpt.data import parquet, readers, tokenizer, workers
from flatgpt.data.inputs import expand_inputs
from flatgpt.data.sources import open_pydoc

ROW_GROUP = 1000  # rows, as in datasets on the hub


def bench_data(config: BenchConfig) -> dict:
    """Time all three, interleaved. Return medians over the rounds, and peak memory."""
    processes = config.workers or workers.available_cores()
    tokenizer.load("gpt2")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = Path(folder).resolve() / "text.parquet"
        size = write_parquet(config, file)
        log(f"{size / 1e6:,.0f} MB of text in {file}, {processes} processes, {config.rounds} rounds")
        call = f"from flatgpt.benchmarks import data; data.{{}}({str(file)!r}, {processes})"
        commands = {
            "plain": [sys.executable, "-c", call.format("encode_plain")],
            "ours": script("prepare_data.py", "text", "--input", file, "--workers", processes),
            "datasets_map": [sys.executable, "-c", call.format("encode_with_datasets")],
        }
        if not importlib.util.find_spec("datasets"):
            del commands["datasets_map"]
            log("datasets is not installed and is skipped (pip install -r requirements-extra.txt)")

        def run(name: str) -> tuple[float, float, str]:
            seconds, memory_gb, output = run_and_measure(commands[name], folder)
            return float(output.split()[0]) if name == "plain" else seconds, memory_gb, output

        results = interleave({name: functools.partial(run, name) for name in commands}, config.rounds)
    figures: dict = {"text_mb": size / 1e6, "processes": processes}
    tokens = int(results["plain"][0][2].split()[1])
    for name, rounds in results.items():
        seconds = statistics.median(duration for duration, _, _ in rounds)
        figures[f"{name}_mb_per_s"] = size / seconds / 1e6
        figures[f"{name}_tokens_per_s"] = tokens / seconds
        figures[f"{name}_memory_gb"] = max(memory_gb for _, memory_gb, _ in rounds)
    figures["of_plain_times_processes"] = figures["ours_mb_per_s"] / figures["plain_mb_per_s"] / processes
    if "datasets_map" in results:
        figures["times_datasets_map"] = figures["ours_mb_per_s"] / figures["datasets_map_mb_per_s"]
    return figures


def write_parquet(config: BenchConfig, file: Path) -> int:
    """Write `size_mb` of text as parquet by repeating the documents of `input`. Return the text's size in bytes."""
    import pyarrow
    import pyarrow.parquet

    if config.input:
        files = [readers.RawFile(str(path), 0, path) for path in expand_inputs(config.input)]
        documents = (chunk.text for task in readers.file_tasks(files, "text") for chunk in task.read())
    else:
        documents = iter(open_pydoc(PrepareConfig(source="pydoc")).files["train"][0].text.split("\n\n"))
    endless, total = itertools.cycle(documents), 0
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
        while total < config.size_mb * 1e6:
            rows = list(itertools.islice(endless, ROW_GROUP))
            if not rows:
                raise UserError(f"input = {' '.join(config.input)}: these files contain no documents")
            writer.write_table(pyarrow.table({"text": rows}, schema))
            total += sum(len(row.encode()) for row in rows)
    return total


def run_and_measure(command: list[str], folder: str) -> tuple[float, float, str]:
    """Run a command. Return its duration in s, the peak memory of its process tree in GB, and its output."""
    offline = {"PYTHONPATH": str(REPO_ROOT), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as cwd:
        start, peak = time.perf_counter(), 0
        with Process(command, offline, cwd=cwd) as process:
            while process.poll() is None:
                peak = max(peak, tree_memory(process.pid))
                time.sleep(0.5)  # reading smaps walks all pages, so frequent polling would slow the process
            seconds = time.perf_counter() - start
            process.require_success()
            return seconds, peak / 1e9, process.stdout.read()


def tree_memory(pid: int) -> int:
    """Return the memory of a process and its descendants in bytes, with shared pages counted once; 0 without /proc."""
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


# ---------------------------------------------------------------------------------------------------------------------
# benchmarked processes


def encode_plain(file: str, processes: int) -> None:
    """Encode each document with encode_ordinary. Print the encoding time in seconds and the number of tokens.

    One end-of-text token per document is counted.
    """
    encoding, seconds, tokens = tokenizer.load("gpt2"), 0.0, 0
    rows = (chunk.text for chunk in parquet.rows(Path(file), "text"))
    while texts := list(itertools.islice(rows, ROW_GROUP)):
        start = time.perf_counter()
        lengths = [len(encoding.encode_ordinary(text)) for text in texts]
        seconds += time.perf_counter() - start
        tokens += sum(lengths) + len(lengths)
    print(seconds, tokens)


def encode_with_datasets(file: str, processes: int) -> None:
    """Encode like nanoGPT's data/openwebtext: datasets.map in many processes, then a memmap, in 1,024 batches."""
    import datasets
    import numpy as np
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    rows = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir="cache")

    def encode(row: dict) -> dict:
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    encoded = rows.map(encode, remove_columns=["text"], num_proc=processes)
    shards = np.memmap("train.bin", dtype=np.uint16, mode="w+", shape=(int(np.sum(encoded["len"])),))
    start = 0
    for number in range(1024):  # nanoGPT's number of batches
        # [:] reads a shard at once. nanoGPT's ["ids"] alone reads row by row in datasets 4 and later.
        ids = np.concatenate(encoded.shard(1024, number, contiguous=True).with_format("numpy")[:]["ids"])
        shards[start : start + len(ids)] = ids
        start += len(ids)
    shards.flush()
