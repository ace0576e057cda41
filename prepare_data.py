"""Turn text into token shards: data/<name>/<split>_000000.bin and meta.json.

python prepare_data.py shakespeare                        # tiny Shakespeare, GPT-2's BPE
python prepare_data.py shakespeare --tokenizer byte       # as byte ids, in data/shakespeare_byte
python prepare_data.py wikitext103                        # or wikipedia, fineweb; downloads go to data/raw
python prepare_data.py fineweb --sample_size 100_000      # the first 100,000 documents
python prepare_data.py hub --repo lucadiliello/english_wikipedia --column maintext
python prepare_data.py text --input book.txt notes/ '*.jsonl' --name mine
python prepare_data.py text --input train/ --val_input val/       # or --val_fraction 0: no validation split
python prepare_data.py text --input hindi/ --tokenizer bpe:8192   # trains a tokenizer of 8,192 ids on the text
python prepare_data.py text --input chats/ --tokenizer user/model --special_tokens '<|user|>' --parse_special
python prepare_data.py compare --input hindi/ --tokenizer gpt2 byte bpe:8192
python prepare_data.py --info data/mine                   # or --verify data/mine
"""

from flatgpt.cli.cli import from_command_line, run_script
from config import PrepareConfig
from flatgpt.cli.settings import RECIPES

if __name__ == "__main__":
    CONFIG = from_command_line(PrepareConfig, __doc__)

import re
import shlex
import time
import tomllib
from pathlib import Path

from config import UserError, count_of
from flatgpt.data import tokenizer
from flatgpt.data.comparison import compare
from flatgpt.data.dataset import PROGRESS, Dataset, open_dataset
from flatgpt.data.prepare import prepare
from flatgpt.data.sources import SOURCES


def table(dataset: Dataset) -> str:
    """Return the manifest's counts as a table: one row per split, and their total if there are several."""
    entries, keys = dict(dataset.meta["splits"]), ("documents", "tokens", "bytes")
    if len(entries) > 1:
        total = {key: sum(entry.get(key, 0) for entry in entries.values()) for key in keys}
        entries["total"] = {**total, "files": [file for entry in entries.values() for file in entry["files"]]}
    rows = [("split", *keys, "bytes/token", "shards")]
    for split, entry in entries.items():
        # Shards of other programs have no counts of documents and bytes.
        counts = [f"{entry[key]:,}" if entry.get(key) else "" for key in keys]
        ratio = f"{entry['bytes'] / entry['tokens']:.2f}" if entry.get("bytes") else ""
        rows.append((split, *counts, ratio, str(len(entry["files"]))))
    return aligned(rows)


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Return the rows as lines, with columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)


def info(dataset: Dataset) -> None:
    """Print the manifest, and the text of the first tokens of each split."""
    meta = dataset.meta
    for key, value in meta.items():
        if key != "splits":
            print(f"{key:<19} {value:,}" if type(value) is int else f"{key:<19} {value}")
    print(table(dataset))
    encoding = dataset.load_tokenizer()
    for split in meta["splits"]:
        ids = dataset.tokens(split)[:60].tolist()
        print(f"--- {split}, the first {len(ids)} tokens")
        print(encoding.decode(ids, errors="replace"))


def verify(dataset: Dataset) -> None:
    """Read and hash every shard. Raise UserError if any of them differs from the manifest."""
    if (dataset.folder / tokenizer.TOKENIZER_FILE).is_file():
        dataset.load_tokenizer()
    results = list(dataset.verify_shards())
    if errors := [re.split("[:;] move ", error)[0] for _, error in results if error]:  # without their advice
        raise UserError("; ".join(errors) + f". Move {dataset.folder} away and run prepare_data.py, or copy it again")
    verified = "all ids are in the vocabulary; no hashes to compare" if dataset.notice else "all match meta.json"
    print(f"{dataset.folder}: {count_of(len(results), 'shard')}, {verified}")


def has_dataset(folder: Path) -> bool:
    """Whether the folder has a dataset, which need not be finished."""
    return any(path.name in ("meta.json", PROGRESS) or path.suffix == ".bin" for path in folder.glob("*"))


def main(config: PrepareConfig) -> None:
    """Prepare a dataset and print its counts, verify or describe an existing one, or compare tokenizers."""
    for key, folder, action in (("verify", config.verify, verify), ("info", config.info, info)):
        if folder:
            path, data_dir = Path(folder), Path(config.data_dir)
            if not has_dataset(path):
                near = [data_dir / folder, *sorted((path if path.is_dir() else data_dir).glob("*"))]
                near = [shlex.quote(str(other)) for other in near if has_dataset(other)]
                hint = f"folders that have one: {', '.join(dict.fromkeys(near[:8]))}" if near else "give data/NAME"
                problem = "no dataset in this folder" if path.is_dir() else "no such folder"
                raise UserError(f"{key} = {folder}: {problem}; {hint}")
            dataset = open_dataset(Path(folder))
            if dataset.notice:
                print(dataset.notice)
            action(dataset)
    if config.source is None:
        return
    if config.source == "compare":
        print(aligned(compare(config)))
        return
    start = time.perf_counter()
    dataset = prepare(config)
    folder, meta = dataset.folder, dataset.meta
    seconds = time.perf_counter() - start
    print(f"{folder}: {meta['source']}, tokenizer {meta['tokenizer']} ({meta['vocab_size']:,} ids), {seconds:.1f} s")
    print(table(dataset))
    if license := SOURCES[config.source].license:
        print(f"license of the text: {license}")
    if "train" not in meta["splits"]:
        return
    name = folder.name
    recipes = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.toml"))}
    recipes = [key for key, r in recipes.items() if r.get("dataset") == name and "init_from" not in r]
    recipes.sort(key=lambda key: key != name)  # the recipe of that name first
    args = ["--config", recipes[0]] if recipes else ["--dataset", name, "--out_dir", f"out/{name}"]
    args = [] if name == "pydoc" else args  # the default of train.py
    if folder.parent != Path("data"):
        args += ["--data_dir", str(folder.parent)]
    print("next:", shlex.join(["python", "train.py", *args]))


if __name__ == "__main__":
    run_script(main, CONFIG)
