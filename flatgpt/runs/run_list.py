"""The tables of recipes and runs that `train.py --list` prints. Does not import torch.

recipe      parameters  data   train tokens  iters
quickstart   1,853,760  pydoc       419,063  2,000

run         parameters  data    iter  best loss     at     age  state
quickstart   1,853,760  pydoc  2,000     1.2552  2,000  40 min  finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from config import TrainConfig, UserError
from flatgpt.runs import history
from flatgpt.runs.lock import in_use

RECIPES = ("recipe", "parameters", "data", "train tokens", "iters")
RUNS = ("run", "parameters", "data", "iter", "best loss", "at", "age", "state")
LEFT_ALIGNED = {"recipe", "run", "data", "state"}
LINE_WIDTH, DATA_WIDTH, MIN_NAME_WIDTH = 100, 20, 16  # in terminal columns; longer texts are cut

# Vocabulary sizes and default tokenizers of datasets that are not prepared yet. Copies of tokenizer_files.SIZES and of
# sources.SOURCES, whose modules take long to import.
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
TOKENIZERS = {"pydoc": "byte", "shakespeare": "gpt2", "wikitext103": "gpt2", "wikipedia": "gpt2", "fineweb": "gpt2"}

Row = tuple[float, tuple[str, ...]]  # sort key and cells


def print_list(recipes: dict[str, TrainConfig | UserError], runs: Path = Path("out")) -> None:
    """Print the recipes, smallest model first, and the runs, newest first. Under torchrun only rank 0 prints.

    Args:
        recipes: by name, or what is wrong with it.
        runs: folder of the runs' folders.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if recipes:
        print(_table(RECIPES, _rows(_recipe_row, recipes.items())) + "\n")
    try:
        folders = sorted(path for path in runs.iterdir() if not path.name.startswith(".") and not path.is_file())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        print(f"no runs in {runs}/ yet" if missing else f"no runs to be seen: {runs}: {error.strerror}")
        return
    moved = [path for path in folders if re.search(r"\.old-\d{8}-\d{6}$", path.name)]
    rows = _rows(_run_row, ((path.name, path) for path in folders if path not in moved))
    print(_table(RUNS, rows) if rows else f"no runs in {runs}/ yet")
    if moved:
        print(f"\nleft out, moved aside by --overwrite: {len(moved)}, {runs}/*.old-<time>")


def _rows(make_row: Callable[..., Row], items: Iterable[tuple]) -> list[tuple[str, ...]]:
    """Return the cells of each item, sorted. At the end, name and error of the items for which there are none."""
    rows, errors = [], []
    for name, item in items:
        try:
            rows.append(make_row(name, item))
        except Exception as error:  # the row of a damaged run must not hide the others
            text = f"is damaged: {error}"
            if isinstance(error, UserError):
                text = " ".join(str(error).split())
            elif isinstance(error, OSError):
                text = f"cannot be read: {error.strerror}: {error.filename}"
            errors.append((name, text))
    return [cells for _, cells in sorted(rows)] + errors


def _recipe_row(name: str, config: TrainConfig | UserError) -> Row:
    if isinstance(config, UserError):
        raise config
    vocab_size, tokens = _dataset_facts(config)
    vocab_size = config.vocab_size or vocab_size
    if config.init_from:  # the model has the shape of those weights
        folder = Path(config.init_from)
        parameters = history.read(folder).parameters if folder.is_dir() else None
    else:
        parameters = dataclasses.replace(config, vocab_size=vocab_size).num_params() if vocab_size else None
    length = f"{config.max_iters:,}" if config.max_iters else f"{config.epochs:g} epochs"
    return float("inf") if parameters is None else parameters, (
        *(name, _count(parameters), _cut(config.dataset, DATA_WIDTH), tokens, length),
    )


def _dataset_facts(config: TrainConfig) -> tuple[int | None, str]:
    """Return the vocabulary size of a recipe's dataset, and its training tokens or why there are none."""
    folder = Path(config.data_dir) / config.dataset
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        train = meta["splits"].get("train")
        return meta["vocab_size"], _count(train and train["tokens"])
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None, "damaged"
    if (folder / "train.bin").is_file():  # nanoGPT's: GPT-2's ids, two bytes each
        return SIZES["gpt2"], _count((folder / "train.bin").stat().st_size // 2)
    source, _, tokenizer = config.dataset.partition("_")
    known = SIZES.get(tokenizer or TOKENIZERS[source]) if source in TOKENIZERS else None
    return known, "made at start" if config.dataset == "pydoc" else "not prepared"


def _run_row(name: str, folder: Path) -> Row:
    running = in_use(folder)
    if not running and not any((folder / part).exists() for part in (history.LOG, history.RECIPE, "ckpt")):
        raise UserError("no run: neither metrics.csv nor config.toml nor ckpt/ is here")
    run = history.read(folder)
    saved, max_iters = run.state.get("iter", 0), run.settings.get("max_iters")
    last = int(run["iter"][-1]) if len(run) else saved
    at, loss = (run.best or (None, None)) if len(run) else (run.state.get("best_iter"), run.state.get("best_loss"))
    part = f", {min(100 * last // max_iters, 100)}%" if max_iters else ""
    finished = run.state.get("finished") and last <= saved
    state = f"running{part}" if running else "finished" if finished else f"stopped{part}"
    files = [file for file in (folder / history.LOG, folder / history.CHECKPOINT) if file.exists()]
    written = max(file.stat().st_mtime for file in files or [folder])
    return -written, (
        *(name, _count(run.parameters), _cut(run.settings.get("dataset", "-"), DATA_WIDTH), _count(last)),
        *("-" if loss is None else f"{loss:.4f}", _count(at), format_age(time.time() - written), state),
    )


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def format_age(seconds: float) -> str:
    """Format a duration in one unit: `59 s`, `59 min`, `47 h`, `2 days`."""
    for unit, size, limit in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < size * limit:
            return f"{max(0, int(seconds // size))} {unit}"
    return f"{seconds // 86400:,.0f} days"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Format aligned cells. A row of two cells is a name and an error, which takes the space of the other columns."""
    full = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(_width(cell) for cell in column) for column in zip(*full, strict=True)][1:]
    room = max(LINE_WIDTH - sum(2 + width for width in widths), MIN_NAME_WIDTH)
    rows = [(_cut(name, room), *cells) for name, *cells in [head, *rows]]
    widths.insert(0, max(_width(name) for name, *_ in rows))
    lines = []
    for row in rows:
        line = ""
        for cell, width, key in zip(row, widths, head, strict=False):
            if len(row) == 2 < len(head) and key != head[0]:
                line += cell
            else:
                space = " " * (width - _width(cell))
                line += (cell + space if key in LEFT_ALIGNED else space + cell) + "  "
        lines.append(_cut(line.rstrip(), LINE_WIDTH))
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    """Replace control characters and line ends, and cut the text to a width."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    if _width(text) <= width:
        return text
    while _width(text) > width - 3:
        text = text[:-1]
    return text + "..."


def _width(text: str) -> int:
    """Return the columns of a text on a terminal: two for an emoji or ideograph, none for a combining character."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )
