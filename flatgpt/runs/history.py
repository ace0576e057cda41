"""Read logs and settings of runs, find checkpoints, and print `train.py --list`. Does not import torch or numpy.

history = read(Path("out/shakespeare"))
history["train_loss"]   # one number per row, nan for empty cells
history.best            # (iter, loss)

recipe      parameters  data   train tokens  iters  hardware     time  bits/byte
quickstart     834,432  pydoc       419,063    600  2 CPU cores  54 s      1.817

run         parameters  data    iter  best loss  best iter     age  state
quickstart     834,432  pydoc    600     1.2592        600  40 min  finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import SOURCE_SETTINGS, ModelConfig, TrainConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.runs.run_log import ROWS, parse_rows
from flatgpt.runtime.files import in_use

LOG, STATE, RECIPE = ROWS, "state.json", "config.toml"
RECIPES = ("recipe", "parameters", "data", "train tokens", "iters", "hardware", "time", "bits/byte")
RUNS = ("run", "parameters", "data", "iter", "best loss", "best iter", "age", "state")
LEFT_ALIGNED = {"recipe", "run", "data", "hardware", "state"}
LINE_WIDTH, NAME_WIDTH, DATA_WIDTH = 100, 36, 20  # in characters; longer texts are truncated

# Vocabulary sizes for datasets that are not prepared yet. Copied from tokenizer_reader, which is slow to import.
SIZES = {"byte": 257, "gpt2": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284}


@dataclass(frozen=True)
class History:
    """The log and the settings of a run.

    Args:
        name: name of the run's folder.
        columns: columns of metrics.csv by name, all of the same length; nan for empty cells.
        state: state.json of the last checkpoint; {} before the first checkpoint.
        settings: settings of the run by key; {} if unknown.
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
        """Iteration and value (nats per token) of the lowest validation loss after iteration 0; None without one."""
        rows = zip(self["iter"], self["val_loss"], strict=True)
        losses = [(loss, i) for i, loss in rows if i > 0 and math.isfinite(loss)]
        return (int(min(losses)[1]), min(losses)[0]) if losses else None

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the model; None if unknown. Checkpoints of earlier versions do not store it."""
        known = {key: self.settings[key] for key in ModelConfig.__dataclass_fields__ if key in self.settings}
        stored = self.state.get("parameters")
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # settings of wrong types
            return stored if type(stored) is int else gpt2_parameters(ModelConfig(**known))
        return None


def gpt2_parameters(config: ModelConfig) -> int | None:
    """Return the number of parameters of a config in an unedited model.py; None without vocab_size.

    `--list` does not import torch, which would count the parameters of the model itself (GPT.num_params).
    """
    C, V, hidden = config.n_embd, config.vocab_size, round(config.mlp_ratio * config.n_embd)
    if not V:
        return None
    attn_bias = config.bias if config.attn_bias is None else config.attn_bias
    block = 4 * C * (C + attn_bias) + 2 * C * (hidden + 1) + (hidden + 3 * C) * config.bias
    learned = config.context_length * C * (config.position == "learned")
    head = V * C * (not config.tie_weights) + V * config.head_bias
    return V * C + learned + config.n_layer * block + C * (1 + config.bias) + head


# ---------------------------------------------------------------------------------------------------------------------
# finding runs and checkpoints


def follow(link: Path) -> Path:
    """Return the checkpoint that ckpt/last or ckpt/best names: a symlink, a file with its name, or a copy of it.

    `last` that names nothing, as in a copy without links, is the newest checkpoint. Other paths are returned unchanged.
    """
    if link.name not in ("last", "best") or link.is_dir() or not link.parent.is_dir():
        return link
    name = link.read_text(encoding="utf-8", errors="replace").strip() if link.is_file() else ""
    named = link.with_name(name) if re.fullmatch(r"iter_\d+", name) else link
    return named if named.is_dir() or link.name == "best" else next(iter(checkpoints(link.parent.parent)), named)


def read_state(folder: Path) -> dict | None:
    """Return the content of a checkpoint's state.json; None if it is missing or invalid."""
    state = read_table(folder / STATE, json.loads)
    saved_hash = state.pop("sha256", None)  # earlier versions did not write one
    valid = {"format", "iter", "config", "files"} <= set(state) and type(state["iter"]) is int
    valid = valid and all(isinstance(state.get(key, {}), dict) for key in ("config", "files", "recipe"))
    return state if valid and saved_hash in (None, hash_state(state)) else None


def hash_state(state: dict) -> str:
    """Return the SHA-256 that a checkpoint's state.json contains."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def iteration_of(folder: Path) -> int | None:
    """Return the iteration of a checkpoint's folder, also of a damaged one; None for other paths.

    In a copy that followed links, `last` and `best` are folders, too.
    """
    if folder.name in ("last", "best"):
        state = None if folder.is_symlink() else read_state(folder)
        return state and state["iter"]
    number = folder.name.removeprefix("iter_")
    return int(number) if number != folder.name and number.isdecimal() else None


def folders(path: Path) -> list[Path]:
    """Return a run's checkpoint folders, newest first, including damaged ones; for a checkpoint's path, only this one.

    Other folders, such as iter_000500.old, are ignored.
    """
    if (path / STATE).exists():
        return [path.resolve()]
    paths = *path.glob("ckpt/iter_*"), path / "ckpt/last", path / "ckpt/best"
    found = {folder: i for folder in paths if (i := iteration_of(folder)) is not None}
    return sorted(found, key=found.get, reverse=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoint folders with a valid state.json, newest first."""
    return [folder for folder in folders(run_dir) if read_state(folder)]


def run_of(path: Path) -> Path | None:
    """Return the folder of the run at a path, which may be a checkpoint; None for a checkpoint outside of a run."""
    for place in (path, path.resolve()):
        if place.parent.name == "ckpt" and re.fullmatch(r"iter_\d+|best|last", place.name):
            return place.parent.parent
    return None if (path / STATE).exists() else path


def newest(runs: Path = Path("out"), file: str = LOG) -> Path:
    """Return the folder of the run with the most recently modified `file`, which may be a pattern.

    Raises:
        UserError: no run has this file.
    """
    files = runs.glob(f"*/{file}")
    if not (found := max(files, key=lambda path: path.lstat().st_mtime, default=None)):
        raise UserError(f"no run in {runs}/ yet: train one (python train.py), or give the folder of a run")
    return runs / found.relative_to(runs).parts[0]


# ---------------------------------------------------------------------------------------------------------------------
# reading logs and settings


def read(folder: Path) -> History:
    """Read the history in a run's folder or an exported checkpoint's folder. Without metrics.csv, it has no rows.

    Incomplete rows are ignored, because the run may be writing at the same time.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        problem = "a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; a run's folder is expected, out/NAME")
    candidates = (folder, follow(folder / "ckpt/last"), *folders(folder))
    state = next(filter(None, (read_table(path / STATE, json.loads) for path in candidates)), {})
    settings = state.get("config")
    if not settings or not isinstance(settings, dict):
        settings = read_table(folder / RECIPE, tomllib.loads)
    return History(Path(os.path.abspath(folder)).name, _read_columns(folder / LOG), state, settings)


def read_table(file: Path, loads: Callable[[str], dict]) -> dict:
    """Return the content of a JSON or TOML file; {} if it cannot be read."""
    try:
        content = loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_columns(file: Path) -> dict[str, list[float]]:
    """Return the columns of metrics.csv by name; {} if it is missing. Print a warning if something is skipped."""
    skipped: list[str] = []
    found = parse_rows(file.read_bytes() if file.exists() else b"", skipped)
    columns, _ = next(found, ([], []))
    rows = [values for _, values in found]
    if skipped:
        print(f"warning: {file}: {len(skipped)} lines or cells are skipped: {skipped[0][:40]!r} ...", file=sys.stderr)
    return {key: [row[n] for row in rows] for n, key in enumerate(columns)}


# ---------------------------------------------------------------------------------------------------------------------
# train.py --list


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
        _print_table(RUNS, _run_row, folders)
    else:
        print(f"no runs in {runs}/ yet")


def _print_table(headers: tuple[str, ...], make_row: Callable[..., tuple], items: dict) -> None:
    """Print a table with one row per item, and errors below it. The first value of a row is only its sort key."""
    rows, errors = [], []
    for name, item in sorted(items.items()):
        try:
            rows.append(make_row(name, item))
        except Exception as error:  # a damaged run must not hide the others
            text = error if isinstance(error, UserError) else f"cannot be read: {error}"
            errors.append(f"{_truncate(name, NAME_WIDTH)}  {text}")
    rows = [headers, *(row[1:] for row in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, headers, strict=True)
        cells = (cell.ljust(width) if key in LEFT_ALIGNED else cell.rjust(width) for cell, width, key in cells)
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
    duration = f"{config.max_iters:,}" if config.max_iters else f"{config.epochs:g} epochs"
    dataset = _truncate(config.dataset, DATA_WIDTH)
    meta = read_table(REPO_ROOT / "configs" / f"{name}.toml", tomllib.loads).get("meta", {})
    measured = meta.get("time", "not measured"), str(meta.get("bits_per_byte", "-"))
    cells = name, _format_count(parameters), dataset, tokens, duration, meta.get("hardware", "-"), *measured
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
    best_iter, best_loss = run.best or (None, None)
    if not len(run):  # without a log
        best_iter, best_loss = run.state.get("best_iter"), run.state.get("best_loss")
    percent = f", {min(100 * last // max_iters, 100)}%" if max_iters else ""
    finished = run.state.get("finished") and last <= saved
    state = f"running{percent}" if running else "finished" if finished else f"stopped{percent}"
    modified = max(modified, default=folder.stat().st_mtime)
    age = max(0, time.time() - modified)
    unit, size = time_unit(age)
    dataset = _truncate(run.settings.get("dataset", "-"), DATA_WIDTH)
    loss = "-" if best_loss is None else f"{best_loss:.4f}"
    return (
        *(-modified, _truncate(name, NAME_WIDTH), _format_count(run.parameters), dataset, _format_count(last)),
        *(loss, _format_count(best_iter), f"{age // size:,.0f} {unit}", state),
    )


def time_unit(seconds: float) -> tuple[str, int]:
    """Return the name and the length in seconds of the largest unit that is not longer than a duration."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    return next((unit, size) for unit, size in units if seconds >= size or size == 1)
