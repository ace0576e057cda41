"""A run as it lies on the disk: metrics.csv -> columns, and what its checkpoints say of it. Neither torch nor numpy.

history = read(Path("out/shakespeare"))
history["train_loss"]   # a number for each row, nan where the log has none
history.best            # (iter, loss)
history.seconds         # of training, up to each row
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from config import ModelConfig, UserError

LOG, STATE, RECIPE = "metrics.csv", "state.json", "config.toml"
CHECKPOINT = f"ckpt/last/{STATE}"


@dataclass(frozen=True)
class History:
    """What is known of a run.

    Args:
        name: its folder's.
        columns: metrics.csv by key, all of one length; nan where a row has no value, or none that is a number.
        state: state.json of its last checkpoint; {} before the first one.
        settings: of the run, by key; {} where nobody says.
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
        """Where each row lies on an axis: iter, tokens, or time in seconds."""
        return self.seconds if x == "time" else self[x]

    @property
    def best(self) -> tuple[int, float] | None:
        """Iteration and nats per token of the lowest validation loss."""
        found = [(loss, i) for i, loss in zip(self["iter"], self["val_loss"], strict=True) if math.isfinite(loss)]
        return (int(min(found)[1]), min(found)[0]) if found else None

    @property
    def seconds(self) -> list[float]:
        """Of all updates up to each row; nan where the log never says how long one takes.

        The log has no clock: evaluations and saves are not in step_ms, so not in this. A row without step_ms, as the
        first one is, counts with the speed of the row before it, else of the one after it.
        """
        known = [ms for ms in self["step_ms"] if math.isfinite(ms)]
        speed, before, total, answer = known[0] if known else math.nan, 0.0, 0.0, []
        for i, ms in zip(self["iter"], self["step_ms"], strict=True):
            speed = ms if math.isfinite(ms) else speed
            total += (i - before) * speed / 1e3 if i > before else 0.0
            before = i
            answer.append(total)
        return answer

    @property
    def parameters(self) -> int | None:
        """How many the model has."""
        known = {key: self.settings[key] for key in ModelConfig.__dataclass_fields__ if key in self.settings}
        try:
            return ModelConfig(**known).num_params() if known.get("vocab_size") else None
        except TypeError:  # somebody's own state.json
            return None

    @property
    def device(self) -> str | None:
        """What computed: `NVIDIA H200`, `2 x Tesla T4`, `AMD EPYC`."""
        name = self.state.get("cpu") if self.state.get("device") == "cpu" else self.state.get("device")
        ranks = self.state.get("ranks", 1)
        return f"{ranks} x {name}" if name and ranks > 1 else name


def newest(runs: Path = Path("out")) -> Path:
    """The run's folder whose log was written last.

    Raises:
        UserError: there is none.
    """
    logs = sorted(runs.glob(f"*/{LOG}"), key=lambda file: file.stat().st_mtime)
    if not logs:
        raise UserError(f"no run in {runs}/ yet: train one (python train.py), or name the folder of one")
    return logs[-1].parent


def read(folder: Path) -> History:
    """The history of a run's folder, or of a folder with one checkpoint's files and a log; without a log, no rows.

    A run may be writing: half a last line does not count, nor does a line that is not a row.

    Raises:
        UserError: no such folder, or a log that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a run's folder is expected, out/NAME")
    state = _json(folder / STATE) or _json(folder / CHECKPOINT)
    config = state.get("config")
    settings = config if isinstance(config, dict) else _recipe(folder / RECIPE)
    return History(Path(os.path.abspath(folder)).name, _columns(folder / LOG), state, settings)


def _columns(file: Path) -> dict[str, list[float]]:
    try:
        text = file.read_bytes().decode("utf-8-sig", errors="replace")  # a spreadsheet puts a mark before it
    except FileNotFoundError:
        return {}
    except OSError as why:
        raise UserError(f"{file} cannot be read: {why.strerror}") from None
    whole, _, _ = text.replace("\0", "").rpartition("\n")
    keys, *rows = (line.split(",") for line in whole.splitlines() or [""])  # numbers alone: nothing is quoted
    if "iter" not in keys:
        return {}
    at = keys.index("iter")
    rows = [row for row in rows if len(row) == len(keys) and math.isfinite(_number(row[at]))]
    return {key: [_number(row[n]) for row in rows] for n, key in enumerate(keys)}


def _number(text: str) -> float:
    try:
        return float(text or math.nan)
    except ValueError:
        return math.nan


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _recipe(file: Path) -> dict:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
