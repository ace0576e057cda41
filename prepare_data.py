"""Turn text into token shards: data/<name>/<split>_000000.bin and meta.json.

python prepare_data.py shakespeare                        # tiny Shakespeare, GPT-2's BPE
python prepare_data.py shakespeare --tokenizer byte       # the same in bytes: data/shakespeare_byte
python prepare_data.py wikitext103                        # or wikipedia, fineweb: downloaded, and kept in data/raw
python prepare_data.py fineweb --sample_size 100_000      # its first 100,000 documents
python prepare_data.py hub --repo lucadiliello/english_wikipedia --column maintext
python prepare_data.py text --input book.txt notes/ '*.jsonl' --name mine
python prepare_data.py --info data/mine                   # or --verify data/mine
"""

from config import PrepareConfig
from flatgpt.cli.cli import RECIPES, from_command_line, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(PrepareConfig, __doc__)

import shlex
import time
import tomllib
from pathlib import Path

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.data.dataset import Dataset, open_dataset
from flatgpt.data.prepare import prepare

SAMPLE = 60  # tokens of each split that --info shows


def table(dataset: Dataset, seconds: float | None = None) -> str:
    """The manifest's counts, one line a split, and a line of sums where there are several or `seconds` are given."""
    rows = [("split", "documents", "tokens", "bytes", "bytes/token", "shards", "seconds")]
    entries = dict(dataset.meta["splits"])
    keys = ("documents", "tokens", "bytes")
    if seconds is not None or len(entries) > 1:
        sums = {key: sum(entry.get(key, 0) for entry in entries.values()) for key in keys}
        entries["total"] = {**sums, "files": [f for entry in entries.values() for f in entry["files"]]}
    for split, entry in entries.items():
        counts = [
            f"{entry[key]:,}" if entry.get(key) else "" for key in keys
        ]  # shards that others wrote have tokens only
        ratio = f"{entry['bytes'] / entry['tokens']:.2f}" if entry.get("bytes") else ""
        time_taken = f"{seconds:.1f}" if split == "total" and seconds is not None else ""
        rows.append((split, *counts, ratio, str(len(entry["files"])), time_taken))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines if seconds is not None else [line.removesuffix("seconds").rstrip() for line in lines])


def info(dataset: Dataset) -> None:
    """Print the manifest and the first tokens of each split as text."""
    meta = dataset.meta
    for key, value in meta.items():
        if key != "splits":
            print(f"{key:<14} {value:,}" if type(value) is int else f"{key:<14} {value}")
    print(table(dataset))
    encoding = tokenizer.load(meta["tokenizer"])
    for split in meta["splits"]:
        ids = dataset.tokens(split)[:SAMPLE].tolist()
        print(f"--- {split}, the first {len(ids)} tokens")
        print(encoding.decode(ids, errors="replace"))


def verify(dataset: Dataset) -> None:
    """Read and hash every shard; UserError names those that are not as they were written."""
    found = [(name, wrong) for name, wrong in dataset.verify_shards()]
    wrong = [why for _, why in found if why]
    if wrong:
        raise UserError("; ".join(wrong) + ". Move the folder away and run prepare_data.py again")
    what = "ids in the vocabulary; no hashes to compare with" if dataset.notice else "sizes, ids and SHA-256 as written"
    print(f"{dataset.folder}: {len(found)} shard{'s' * (len(found) != 1)}, {what}")


def main(config: PrepareConfig) -> None:
    """Prepare one dataset and say what came of it; or look at one."""
    for folder, look in ((config.verify, verify), (config.info, info)):
        if folder:
            dataset = open_dataset(Path(folder))
            if dataset.notice:
                print(dataset.notice)
            look(dataset)
    if config.source is None:
        return
    began = time.perf_counter()
    dataset = prepare(config)
    meta = dataset.meta
    print(f"{dataset.folder}: {meta['source']}, tokenizer {meta['tokenizer']} ({meta['vocab_size']:,} ids)")
    print(table(dataset, time.perf_counter() - began))
    if "train" not in meta["splits"]:
        return
    name = dataset.folder.name
    recipes = [p.stem for p in sorted(RECIPES.glob("*.toml")) if tomllib.loads(p.read_text()).get("dataset") == name]
    choice = f"--config {recipes[0]}" if recipes else f"--dataset {name} --out_dir out/{name}"
    choice = "" if name == "pydoc" else choice  # train.py's own default
    if dataset.folder.parent != Path("data"):
        choice += f" --data_dir {shlex.quote(str(dataset.folder.parent))}"
    print(f"next: python train.py {choice}".rstrip())


if __name__ == "__main__":
    run_script(main, CONFIG)
