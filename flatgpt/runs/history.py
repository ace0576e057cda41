"""Read a run's folder: the columns of metrics.csv, and what its checkpoints say about it. Neither torch nor numpy.

history = read(Path("out/shakespeare"))
history["train_loss"]   # a number for each row, nan where the log has none
history.best            # (iter, loss)
history.seconds         # training time up to each row
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import ModelConfig, UserError

LOG, STATE, RECIPE = "metrics.csv", "state.json", "config.toml"
CHECKPOINT = f"ckpt/last/{STATE}"


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

    def x_values(self, x: str) -> list[float]:
        """Return the x value of each row: iter, tokens, or time in seconds."""
        return self.seconds if x == "time" else self[x]

    @property
    def best(self) -> tuple[int, float] | None:
        """Iteration and nats per token of the lowest validation loss."""
        found = [(loss, i) for i, loss in zip(self["iter"], self["val_loss"], strict=True) if math.isfinite(loss)]
        return (int(min(found)[1]), min(found)[0]) if found else None

    @property
    def seconds(self) -> list[float]:
        """Time of all updates up to each row, without evaluations and saves; nan if the log has no step_ms.

        A row without step_ms, as the first one, counts with the step_ms of the row before it, else of the one after it.
        """
        known = [ms for ms in self["step_ms"] if math.isfinite(ms)]
        step_ms, before, total, seconds = known[0] if known else math.nan, 0.0, 0.0, []
        for i, ms in zip(self["iter"], self["step_ms"], strict=True):
            step_ms = ms if math.isfinite(ms) else step_ms
            total += (i - before) * step_ms / 1e3 if i > before else 0.0
            before = i
            seconds.append(total)
        return seconds

    @property
    def parameters(self) -> int | None:
        """Number of the model's parameters."""
        known = {key: self.settings[key] for key in ModelConfig.__dataclass_fields__ if key in self.settings}
        try:
            return ModelConfig(**known).num_params() if known.get("vocab_size") else None
        except TypeError:  # a state.json that was edited
            return None

    @property
    def device(self) -> str | None:
        """Name of the devices: `NVIDIA H200`, `2 x Tesla T4`, `AMD EPYC`."""
        name = self.state.get("cpu") if self.state.get("device") == "cpu" else self.state.get("device")
        ranks = self.state.get("ranks", 1)
        return f"{ranks} x {name}" if name and ranks > 1 else name


def newest(runs: Path = Path("out")) -> Path:
    """Return the folder of the run whose log was written last.

    Raises:
        UserError: there is none.
    """
    logs = sorted(runs.glob(f"*/{LOG}"), key=lambda file: file.stat().st_mtime)
    if not logs:
        raise UserError(f"no run in {runs}/ yet: train one (python train.py), or name the folder of one")
    return logs[-1].parent


def read(folder: Path) -> History:
    """Read the history of a run's folder, or of a folder with one checkpoint's files and a log. No log gives no rows.

    The run may be writing at the same time: lines that are not whole rows are ignored.

    Raises:
        UserError: no such folder, or a log that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a run's folder is expected, out/NAME")
    state = _read_table(folder / STATE, json.loads) or _read_table(folder / CHECKPOINT, json.loads)
    config = state.get("config")
    settings = config if isinstance(config, dict) else _read_table(folder / RECIPE, tomllib.loads)
    return History(Path(os.path.abspath(folder)).name, _read_columns(folder / LOG), state, settings)


def _read_columns(file: Path) -> dict[str, list[float]]:
    try:
        text = file.read_bytes().decode("utf-8-sig", errors="replace")  # spreadsheets write a byte order mark
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    lines, _, _ = text.replace("\0", "").rpartition("\n")
    keys, *rows = (line.split(",") for line in lines.splitlines() or [""])  # numbers only: nothing is quoted
    if "iter" not in keys:
        return {}
    numbers = [[_number(cell) for cell in row] for row in rows if len(row) == len(keys)]
    numbers = [row for row in numbers if math.isfinite(row[keys.index("iter")])]
    return {key: [row[n] for row in numbers] for n, key in enumerate(keys)}


def _number(text: str) -> float:
    try:
        return float(text or math.nan)
    except ValueError:
        return math.nan


def _read_table(file: Path, loads: Callable[[str], dict]) -> dict:
    """Return the content of a JSON or TOML file, {} if it has none."""
    try:
        content = loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
