"""Read logs and settings of runs, and find their checkpoints. Does not import torch or numpy.

history = read(Path("out/shakespeare"))
history["train_loss"]   # one number per row, nan for empty cells
history.best            # (iter, loss)
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import ModelConfig, UserError
from flatgpt.runs.run_log import ROWS, parse_rows

LOG, STATE, RECIPE = ROWS, "state.json", "config.toml"


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
    def update_seconds(self) -> list[float]:
        """Time of the updates up to each row in s, without evaluations and saves; nan if no row has step_ms.

        A row without step_ms, such as that of the first update, counts as the next one that has it.
        """
        step_ms = [*self["step_ms"]]
        following = next(filter(math.isfinite, reversed(step_ms)), math.nan)
        for n in reversed(range(len(step_ms))):
            following = step_ms[n] = step_ms[n] if math.isfinite(step_ms[n]) else following
        updates = [i - before for before, i in itertools.pairwise([0, *self["iter"]])]
        times = [count * ms / 1e3 if count > 0 else 0.0 for count, ms in zip(updates, step_ms, strict=True)]
        return [*itertools.accumulate(times)]

    @property
    def seconds(self) -> float | None:
        """Time of all updates in s, without evaluations and saves; None if unknown."""
        return next((s for s in self.update_seconds[-1:] if 0 < s < math.inf), None)

    @property
    def tokens(self) -> int | None:
        """Number of tokens trained on; None if unknown."""
        return next((int(n) for n in self["tokens"][-1:] if 0 < n < math.inf), None)

    @property
    def tokenizer(self) -> str | None:
        """What identifies the tokenizer, whose losses per token can be compared; None before the first checkpoint."""
        facts = self.state.get("tokenizer")
        return facts.get("ranks_sha256", facts.get("name")) if isinstance(facts, dict) else None

    def bits_per_byte(self, loss: float | None, split: str = "val") -> float | None:
        """Return a loss (nats per token) in bits per byte, which can be compared between tokenizers.

        Assumes the bytes per token of the whole split; None if they or the loss are not known. Checkpoints of earlier
        versions do not store them: they are read from the dataset's meta.json, if that has as many tokens.
        """
        with contextlib.suppress(AttributeError, KeyError, TypeError, ZeroDivisionError):  # unknown or damaged
            data = self.state.get("data", {})
            tokens, size = (data.get(key, {}).get(split) for key in ("tokens", "bytes"))
            if not size:
                folder = data.get("folder") or os.path.join(self.settings["data_dir"], self.settings["dataset"])
                stored = read_table(Path(folder) / "meta.json", json.loads)["splits"][split]
                if tokens in (None, stored["tokens"]):
                    tokens, size = stored["tokens"], stored["bytes"]
            return loss / math.log(2) * tokens / size
        return None

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

    `train.py --list` does not import torch, which would count the parameters of the model itself (GPT.num_params).
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


def format_compact(number: float) -> str:
    """Format a positive number with three significant digits: 950, 12.3K, 124M, 1.56B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def time_unit(seconds: float) -> tuple[str, int]:
    """Return the name and the length in seconds of the largest unit that is not longer than a duration."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    return next((unit, size) for unit, size in units if seconds >= size or size == 1)
