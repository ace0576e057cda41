"""Read the folders of runs: logs and settings, and the tables that `train.py --list` prints. Neither torch nor numpy.

history = read(Path("out/shakespeare"))
history["train_loss"]   # a number for each row, nan where the log has none
history.best            # (iter, loss)

recipe      parameters  data   train tokens  iters
quickstart   1,853,760  pydoc       419,063  2,000

run         parameters  data    iter  best loss     at     age  state
quickstart   1,853,760  pydoc  2,000     1.2552  2,000  40 min  finished
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import ModelConfig, TrainConfig, UserError
from flatgpt.runs.lock import in_use

LOG, STATE, RECIPE = "metrics.csv", "state.json", "config.toml"
RECIPES = ("recipe", "parameters", "data", "train tokens", "iters")
RUNS = ("run", "parameters", "data", "iter", "best loss", "at", "age", "state")
LEFT_ALIGNED = {"recipe", "run", "data", "state"}
LINE_WIDTH, NAME_WIDTH, DATA_WIDTH = 100, 36, 20  # in characters; longer texts are cut

# Vocabulary sizes and default tokenizers of datasets that are not prepared yet. Copies of tokenizer_files.SIZES and of
# sources.SOURCES, whose modules take long to import.
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}
TOKENIZERS = {"pydoc": "byte", "shakespeare": "gpt2", "wikitext103": "gpt2", "wikipedia": "gpt2", "fineweb": "gpt2"}


@dataclass(frozen=True)
class History:
    """The log and the settings of a run.

    Args:
        name: of its folder.
        columns: metrics.csv by column name, all of one length; nan where a row has no number.
        state: state.json of its last checkpoint; {} before the first one.
        settings: of the run, by key; {} if unknown.
    """

    name: str
    columns: dict[str, list[float]]
    state: dict
    settings: dict

    def __getitem__(self, key: str) -> list[float]:
        return self.columns.get(key, [math.nan] * len(self))

    def __len__(self) -> int:
        return len(self.columns.get("iter", ()))

    @property
    def best(self) -> tuple[int, float] | None:
        """Iteration and nats per token of the lowest validation loss."""
        found = [(loss, i) for i, loss in zip(self["iter"], self["val_loss"], strict=True) if math.isfinite(loss)]
        return (int(min(found)[1]), min(found)[0]) if found else None

    @property
    def parameters(self) -> int | None:
        """Number of the model's parameters."""
        known = {key: self.settings[key] for key in ModelConfig.__dataclass_fields__ if key in self.settings}
        return ModelConfig(**known).num_params() if known.get("vocab_size") else None


def follow(link: Path) -> Path:
    """Return the checkpoint that ckpt/last or ckpt/best leads to, also where it is a file, not a symlink."""
    is_file = link.name in ("last", "best") and link.is_file()
    return link.with_name(link.read_text(encoding="utf-8")) if is_file else link


def newest(runs: Path = Path("out"), file: str = LOG) -> Path:
    """Return the folder of the run in which this file was written last.

    Raises:
        UserError: there is none.
    """
    files = runs.glob(f"*/{file}")
    if not (found := max(files, key=lambda path: path.lstat().st_mtime, default=None)):
        raise UserError(f"no run in {runs}/ yet: train one (python train.py), or name the folder of one")
    return runs / found.relative_to(runs).parts[0]


def read(folder: Path) -> History:
    """Read the history of a run's folder, or of a folder with one checkpoint's files and a log. No log gives no rows.

    The run may be writing at the same time: lines that are not whole rows are ignored.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a run's folder is expected, out/NAME")
    state = _read_table(folder / STATE, json.loads) or _read_table(follow(folder / "ckpt/last") / STATE, json.loads)
    settings = state.get("config") or _read_table(folder / RECIPE, tomllib.loads)
    return History(Path(os.path.abspath(folder)).name, _read_columns(folder / LOG), state, settings)


def _read_table(file: Path, loads: Callable[[str], dict]) -> dict:
    """Return the content of a JSON or TOML file, {} if it cannot be read."""
    try:
        return loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _read_columns(file: Path) -> dict[str, list[float]]:
    try:
        text = file.read_bytes().decode("utf-8-sig", errors="replace")  # spreadsheets write a byte order mark
    except FileNotFoundError:
        return {}
    lines, _, _ = text.replace("\0", "").rpartition("\n")
    keys, *lines = (line.split(",") for line in lines.splitlines() or [""])  # numbers only: nothing is quoted
    if "iter" not in keys:
        return {}
    rows = [row for row in map(_numbers, lines) if len(row) == len(keys) and math.isfinite(row[keys.index("iter")])]
    return {key: [row[n] for row in rows] for n, key in enumerate(keys)}


def _numbers(cells: list[str]) -> list[float]:
    """Return the numbers of a row, nan for an empty cell. Other cells make no row."""
    try:
        return [float(cell or math.nan) for cell in cells]
    except ValueError:
        return []


# ---------------------------------------------------------------------------------------------------------------------
# train.py --list


def print_list(recipes: dict[str, TrainConfig | UserError], runs: Path = Path("out")) -> None:
    """Print the recipes, smallest model first, and the runs, newest first.

    Args:
        recipes: by name, or what is wrong with it.
        runs: folder of the runs' folders.
    """
    if recipes:
        _print_table(RECIPES, _recipe_row, recipes)
        print()
    if folders := {path.name: path for path in runs.glob("[!.]*") if path.is_dir()}:
        _print_table(RUNS, _run_row, folders)
    else:
        print(f"no runs in {runs}/ yet")


def _print_table(head: tuple[str, ...], make_row: Callable[..., tuple], items: dict) -> None:
    """Print the rows of the items, sorted by their first value, which is not printed; errors are below the table."""
    rows, errors = [], []
    for name, item in sorted(items.items()):
        try:
            rows.append(make_row(name, item))
        except Exception as error:  # the row of a damaged run must not hide the others
            text = error if isinstance(error, UserError) else f"cannot be read: {error}"
            errors.append(f"{_cut(name, NAME_WIDTH)}  {text}")
    rows = [head, *(row[1:] for row in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, head, strict=True)
        cells = (cell.ljust(width) if key in LEFT_ALIGNED else cell.rjust(width) for cell, width, key in cells)
        print("  ".join(cells).rstrip())
    for error in errors:
        print(_cut(error, LINE_WIDTH))


def _cut(text: str, width: int) -> str:
    """Replace line ends and other control characters, and cut the text to a width."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= width else text[: width - 3] + "..."


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _recipe_row(name: str, config: TrainConfig | UserError) -> tuple:
    if isinstance(config, UserError):
        raise config
    vocab_size, tokens = _dataset_facts(config)
    parameters, vocab_size = None, config.vocab_size or vocab_size
    if vocab_size and not config.init_from:  # otherwise the model has the shape of those weights
        parameters = dataclasses.replace(config, vocab_size=vocab_size).num_params()
    length = f"{config.max_iters:,}" if config.max_iters else f"{config.epochs:g} epochs"
    return parameters or math.inf, name, _count(parameters), _cut(config.dataset, DATA_WIDTH), tokens, length


def _dataset_facts(config: TrainConfig) -> tuple[int | None, str]:
    """Return the vocabulary size of a recipe's dataset, and its training tokens, if they are counted."""
    folder = Path(config.data_dir) / config.dataset
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta["vocab_size"], _count(meta["splits"].get("train", {}).get("tokens"))
    if (folder / "train.bin").is_file():  # nanoGPT's: GPT-2's ids, two bytes each
        return SIZES["gpt2"], _count((folder / "train.bin").stat().st_size // 2)
    source, _, tokenizer = config.dataset.partition("_")
    known = SIZES.get(tokenizer or TOKENIZERS[source]) if source in TOKENIZERS else None
    return known, "made at start" if config.dataset == "pydoc" else "not prepared"


def _run_row(name: str, folder: Path) -> tuple:
    running, files = in_use(folder), (folder / LOG, folder / RECIPE, follow(folder / "ckpt/last") / STATE)
    written = [file.stat().st_mtime for file in files if file.exists()]
    if not running and not written:
        raise UserError("no run: neither metrics.csv nor config.toml nor ckpt/ is here")
    run = read(folder)
    saved, max_iters = run.state.get("iter", 0), run.settings.get("max_iters")
    last = int(run["iter"][-1]) if len(run) else saved
    at, loss = (run.best or (None, None)) if len(run) else (run.state.get("best_iter"), run.state.get("best_loss"))
    part = f", {min(100 * last // max_iters, 100)}%" if max_iters else ""
    finished = run.state.get("finished") and last <= saved
    state = f"running{part}" if running else "finished" if finished else f"stopped{part}"
    written = max(written, default=folder.stat().st_mtime)
    age = max(0, time.time() - written)
    unit, size = time_unit(age)
    return (
        *(-written, _cut(name, NAME_WIDTH), _count(run.parameters), _cut(run.settings.get("dataset", "-"), DATA_WIDTH)),
        *(_count(last), "-" if loss is None else f"{loss:.4f}", _count(at), f"{age // size:,.0f} {unit}", state),
    )


def time_unit(seconds: float) -> tuple[str, int]:
    """Return the name and the seconds of the unit for a duration."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    return next((unit, size) for unit, size in units if seconds >= size or size == 1)
