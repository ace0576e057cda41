"""Print the tables of `train.py --list`: recipes and runs. Does not import torch or numpy.

recipe      parameters  data   train tokens  iters  hardware  time  bits/byte
quickstart     834,432  pydoc       419,063    600  2 cores   54 s      1.817

run         params  data   iter  tokens   time  tok/s  best loss  bits/byte     age  state
quickstart    834K  pydoc   600    614K    46s  13.4K     1.2592      1.817  40 min  finished
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from config import SOURCE_SETTINGS, TrainConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.runs.clock import duration
from flatgpt.runs.history import (
    LOG,
    RECIPE,
    STATE,
    follow,
    format_compact,
    gpt2_parameters,
    read,
    read_table,
    time_unit,
)
from flatgpt.runtime.files import in_use

RECIPES = ("recipe", "parameters", "data", "train tokens", "iters", "hardware", "time", "bits/byte")
RUNS = ("run", "params", "data", "iter", "tokens", "time", "tok/s", "best loss", "bits/byte", "age", "state")
LEFT_ALIGNED = {"recipe", "run", "data", "hardware", "state"}
SHRINKABLE = {"data": 10, "run": 12}  # columns that are truncated if a line is too long, and their minimum width
LINE_WIDTH, NAME_WIDTH, DATA_WIDTH = 120, 36, 20  # in characters; longer texts are truncated

# Vocabulary sizes for datasets that are not prepared yet. Copied from tokenizer_reader, which is slow to import.
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}


def print_list(recipes: dict[str, TrainConfig | UserError], runs: Path = Path("out")) -> None:
    """Print the recipes, smallest model first, and the runs, newest first.

    Args:
        recipes: config of each recipe by name, or its error.
        runs: parent folder of the runs.
    """
    if recipes:
        _print_table(RECIPES, _recipe_row, recipes)
        print()
    if folders := {path.name: path for path in runs.glob("[!.]*") if path.is_dir()}:
        _print_table(RUNS, _run_row, folders, LINE_WIDTH)
    else:
        print(f"no runs in {runs}/ yet")


def _print_table(headers: tuple[str, ...], make_row: Callable[..., tuple], items: dict, max_width: int = 10**9) -> None:
    """Print a table with one row per item, and errors below it. The first value of a row is only its sort key.

    Columns of SHRINKABLE are truncated where a line would be longer than max_width.
    """
    rows, errors = [], []
    for name, item in sorted(items.items()):
        try:
            rows.append(make_row(name, item))
        except Exception as error:  # a damaged run must not hide the others
            text = error if isinstance(error, UserError) else f"cannot be read: {error}"
            errors.append(f"{_truncate(name, NAME_WIDTH)}  {text}")
    rows = [headers, *(row[1:] for row in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for key in filter(headers.count, SHRINKABLE):
        excess, n = sum(widths) + 2 * len(widths) - 2 - max_width, headers.index(key)
        widths[n] -= max(0, min(excess, widths[n] - SHRINKABLE[key]))
    for row in rows:
        aligned = (str.ljust if key in LEFT_ALIGNED else str.rjust for key in headers)
        cells = (align(_truncate(cell, width), width) for cell, width, align in zip(row, widths, aligned, strict=True))
        print("  ".join(cells).rstrip())
    for error in errors:
        print(_truncate(error, LINE_WIDTH))


def _truncate(text: str, width: int) -> str:
    """Replace control characters, such as line breaks, and truncate the text to `width` characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= width else text[: width - 3] + "..."


def _format_count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _recipe_row(name: str, config: TrainConfig | UserError) -> tuple:
    if isinstance(config, UserError):
        raise config
    vocab_size, tokens = _dataset_facts(config)
    parameters = None
    if not config.init_from:  # init_from determines the shape
        parameters = gpt2_parameters(dataclasses.replace(config, vocab_size=config.vocab_size or vocab_size))
    iters = f"{config.max_iters:,}" if config.max_iters else f"{config.epochs:g} epochs"
    dataset = _truncate(config.dataset, DATA_WIDTH)
    meta = read_table(REPO_ROOT / "configs" / f"{name}.toml", tomllib.loads).get("meta", {})
    known = {"hardware": "-", "time": "unmeasured", "bits_per_byte": "-"} | meta
    measured = (str(known[key]) for key in ("hardware", "time", "bits_per_byte"))
    cells = name, _format_count(parameters), dataset, tokens, iters, *measured
    return parameters or math.inf, *cells


def _dataset_facts(config: TrainConfig) -> tuple[int | None, str]:
    """Return the vocabulary size of a recipe's dataset (None: unknown), and the text of its `train tokens` cell."""
    folder = Path(config.data_dir) / config.dataset
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta["vocab_size"], _format_count(meta["splits"].get("train", {}).get("tokens"))
    if (folder / "train.bin").is_file():  # nanoGPT's format: GPT-2 ids of two bytes
        return SIZES["gpt2"], _format_count((folder / "train.bin").stat().st_size // 2)
    name, _, tokenizer = config.dataset.partition("_")
    if not (source := SOURCE_SETTINGS.get(name)):
        return None, "not prepared"
    return SIZES.get(tokenizer or source.tokenizer), "made at start" if source.at_start else "not prepared"


def _run_row(name: str, folder: Path) -> tuple:
    running, files = in_use(folder), (folder / LOG, folder / RECIPE, follow(folder / "ckpt/last") / STATE)
    modified = [file.stat().st_mtime for file in files if file.exists()]
    if not running and not modified:
        raise UserError("not a run: it has no metrics.csv, config.toml or ckpt/")
    run = read(folder)
    saved, max_iters = run.state.get("iter", 0), run.settings.get("max_iters")
    last = int(run["iter"][-1]) if len(run) else saved
    best_loss = run.best[1] if run.best else None if len(run) else run.state.get("best_loss")
    percent = f", {min(100 * last // max_iters, 100)}%" if max_iters else ""
    finished = run.state.get("finished") and last <= saved
    state = f"running{percent}" if running else "finished" if finished else f"stopped{percent}"
    modified = max(modified, default=folder.stat().st_mtime)
    age = max(0, time.time() - modified)
    unit, size = time_unit(age)
    cells = {
        "run": _truncate(name, NAME_WIDTH),
        "params": run.parameters and format_compact(run.parameters),
        "data": _truncate(run.settings.get("dataset", "-"), DATA_WIDTH),
        "iter": _format_count(last),
        "tokens": run.tokens and format_compact(run.tokens),
        "time": run.seconds and duration(run.seconds),
        "tok/s": run.tokens and run.seconds and format_compact(run.tokens / run.seconds),
        "best loss": best_loss is not None and f"{best_loss:.4f}",
        "bits/byte": (bits := run.bits_per_byte(best_loss)) is not None and f"{bits:.3f}",
        "age": f"{age // size:,.0f} {unit}",
        "state": state,
    }
    return -modified, *(cells[key] or "-" for key in RUNS)
