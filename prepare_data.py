"""Turn text into token shards: data/<name>/<split>_000000.bin and meta.json.

python prepare_data.py shakespeare                        # tiny Shakespeare, GPT-2's BPE
python prepare_data.py shakespeare --tokenizer byte       # the same in bytes: data/shakespeare_byte
python prepare_data.py text --input book.txt notes/ '*.md' --name mine
python prepare_data.py pydoc                              # the reference inside Python: the default of train.py
"""

from cli import RECIPES, from_command_line, run_verb
from config import PrepareConfig

if __name__ == "__main__":
    CONFIG = from_command_line(PrepareConfig, __doc__)

import shlex
import time
import tomllib
from pathlib import Path

from sources import prepare


def table(dataset) -> str:
    """The manifest's counts, one line a split."""
    rows = [("split", "documents", "tokens", "bytes", "bytes/token", "shards")]
    for split, entry in dataset.meta["splits"].items():
        ratio = entry["bytes"] / entry["tokens"]
        counts = (f"{entry[key]:,}" for key in ("documents", "tokens", "bytes"))
        rows.append((split, *counts, f"{ratio:.2f}", str(len(entry["files"]))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)


def main(config: PrepareConfig) -> None:
    """Prepare one dataset and say what came of it."""
    began = time.perf_counter()
    dataset = prepare(config)
    meta = dataset.meta
    print(f"{dataset.folder}: {meta['source']}, tokenizer {meta['tokenizer']} ({meta['vocab_size']:,} ids)")
    print(table(dataset))
    name = dataset.folder.name
    recipes = [p.stem for p in sorted(RECIPES.glob("*.toml")) if tomllib.loads(p.read_text()).get("dataset") == name]
    choice = f"--config {recipes[0]}" if recipes else f"--dataset {name} --out_dir out/{name}"
    choice = "" if name == "pydoc" else choice  # train.py's own default
    if dataset.folder.parent != Path("data"):
        choice += f" --data_dir {shlex.quote(str(dataset.folder.parent))}"
    print(f"{time.perf_counter() - began:.1f} s; next: python train.py {choice}".rstrip())


if __name__ == "__main__":
    run_verb(main, CONFIG)
