"""What there is to train, and what was trained: recipes and runs as two tables, for `train.py --list`. No torch.

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
WORDS = ("data", "state")  # and the first; what is in the other columns stands at their right end
WIDTH, DATA = 100, 20  # columns on the terminal: of a line, and of a dataset's name; what is longer is cut
NAME = 16  # that many are left to a run's name, at least

# How many ids a dataset will have that is not there yet: by its name, which is that of its source, with a tokenizer
# that is not the source's own. Numbers of vocabulary.SIZES, tokenizers of sources.SOURCES: those load a lot.
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
OWN = {"pydoc": "byte", "shakespeare": "gpt2", "wikitext103": "gpt2", "wikipedia": "gpt2", "fineweb": "gpt2"}

Row = tuple[float, tuple[str, ...]]  # what its place depends on, and its cells


def print_list(recipes: dict[str, TrainConfig | UserError], runs: Path = Path("out")) -> None:
    """Print the recipes, the smallest model first, and the runs, the newest first; under torchrun, the first rank.

    Args:
        recipes: by name, or what is wrong with it.
        runs: the folder of the runs' folders.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if recipes:
        print(_table(RECIPES, _rows(_recipe, recipes.items())) + "\n")
    try:
        there = sorted(path for path in runs.iterdir() if not path.name.startswith(".") and not path.is_file())
    except OSError as why:
        missing = isinstance(why, FileNotFoundError)
        print(f"no runs in {runs}/ yet" if missing else f"no runs to be seen: {runs}: {why.strerror}")
        return
    aside = [path for path in there if re.search(r"\.old-\d{8}-\d{6}$", path.name)]
    rows = _rows(_run, ((path.name, path) for path in there if path not in aside))
    print(_table(RUNS, rows) if rows else f"no runs in {runs}/ yet")
    if aside:
        print(f"\nleft out, moved aside by --overwrite: {len(aside)}, {runs}/*.old-<time>")


# ---------------------------------------------------------------------------------------------------------------------
# rows


def _rows(make: Callable[..., Row], things: Iterable[tuple]) -> list[tuple[str, ...]]:
    """The cells of each thing's row, in order; where it has none, its name and why, at the end."""
    rows, others = [], []
    for name, thing in things:
        name = _text(name, WIDTH)
        try:
            rows.append(make(name, thing))
        except UserError as why:
            others.append((name, _text(" ".join(str(why).split()), WIDTH)))
        except OSError as why:
            others.append((name, f"cannot be read: {why.strerror}: {_text(str(why.filename), WIDTH)}"))
        except Exception as why:  # whatever a crash, a bad disk or an editor left there: it hides no other row
            others.append((name, f"is damaged: {_text(str(why), WIDTH)}"))
    return [cells for _, cells in sorted(rows)] + others


def _recipe(name: str, config: TrainConfig | UserError) -> Row:
    if isinstance(config, UserError):
        raise config
    ids, tokens = _data(config)
    if config.init_from:  # the model's shape is that of those weights
        there = Path(config.init_from)
        parameters = history.read(there).parameters if there.is_dir() else None
    else:
        ids = config.vocab_size or ids
        parameters = dataclasses.replace(config, vocab_size=ids).num_params() if ids else None
    length = f"{config.max_iters:,}" if config.max_iters else f"{config.epochs:g} epochs"
    order = float("inf") if parameters is None else parameters
    return order, (name, _count(parameters), _text(config.dataset, DATA), tokens, length)


def _data(config: TrainConfig) -> tuple[int | None, str]:
    """How many ids the dataset of a recipe has, and its training tokens, or that there are none yet."""
    folder = Path(config.data_dir) / config.dataset
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        train = meta["splits"].get("train")
        return meta["vocab_size"], _count(train and train["tokens"])
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None, "damaged"
    if (folder / "train.bin").is_file():  # nanoGPT's, which has GPT-2's ids, two bytes each
        return SIZES["gpt2"], _count((folder / "train.bin").stat().st_size // 2)
    source, _, tokenizer = config.dataset.partition("_")
    known = SIZES.get(tokenizer or OWN[source]) if source in OWN else None
    return known, "made at start" if config.dataset == "pydoc" else "not prepared"


def _run(name: str, folder: Path) -> Row:
    busy = in_use(folder)
    if not busy and not any((folder / part).exists() for part in (history.LOG, history.RECIPE, "ckpt")):
        raise UserError("no run: neither metrics.csv nor config.toml nor ckpt/ is here")
    run = history.read(folder)
    state, settings = run.state, run.settings
    saved = state.get("iter", 0)
    last = int(run["iter"][-1]) if len(run) else saved
    at, loss = (run.best or (None, None)) if len(run) else (state.get("best_iter"), state.get("best_loss"))
    part = f", {min(100 * last // settings['max_iters'], 100)}%" if settings.get("max_iters") else ""
    over = state.get("finished") and last <= saved
    shown = f"running{part}" if busy else "finished" if over else f"stopped{part}"
    files = [folder / history.LOG, folder / history.CHECKPOINT]
    written = max(file.stat().st_mtime for file in ([file for file in files if file.exists()] or [folder]))
    cells = (
        *(name, _count(run.parameters), _text(settings.get("dataset", "-"), DATA), _count(last)),
        *("-" if loss is None else f"{loss:.4f}", _count(at), age(time.time() - written), shown),
    )
    return -written, cells


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def age(seconds: float) -> str:
    """How long ago, in one unit, for people: `59 s`, `59 min`, `47 h`, `2 days`."""
    for unit, size, limit in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < size * limit:
            return f"{max(0, int(seconds // size))} {unit}"
    return f"{seconds // 86400:,.0f} days"


# ---------------------------------------------------------------------------------------------------------------------
# a table, for a terminal


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Lines of aligned cells; a row of two is a name and a text, which goes over the other columns."""
    whole = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(map(_width, column)) for column in zip(*whole, strict=True)]
    left = WIDTH - sum(2 + width for width in widths[1:])
    widths[0] = min(max(_width(row[0]) for row in [head, *rows]), max(left, NAME))
    lines = []
    for name, *cells in [head, *rows]:
        line = _pad(_cut(name, widths[0]), widths[0], left=True)
        if len(cells) == 1:
            lines.append(_cut(f"{line}  {cells[0]}", WIDTH))
            continue
        for cell, width, key in zip(cells, widths[1:], head[1:], strict=True):
            line += "  " + _pad(cell, width, left=key in WORDS)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _pad(text: str, width: int, left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text


def _text(text: str, width: int) -> str:
    """A name of somebody's choice as it may be printed: no control characters, no line ends, not too long."""
    return _cut("".join(c if c.isprintable() else "\ufffd" for c in text), width)


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    text = text[:width]
    while _width(text) > width - 3:
        text = text[:-1]
    return text + "..."


def _width(text: str) -> int:
    """Columns on a terminal: two of an emoji or an ideograph, none of an accent that goes onto another character."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )
