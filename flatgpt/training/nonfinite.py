"""Detect non-finite values: in updates, on the device; in weights; and in a checkpoint that a run resumes from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from config import UserError, count_of
from flatgpt.data.dataset import TrainingBatches
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint import TRAIN_STATE, WEIGHTS, DamagedCheckpointError
from flatgpt.runs.history import STATE
from flatgpt.runtime.distributed import DistributedContext
from flatgpt.training.show_batch import show_batch_command

MAX_CONSECUTIVE_SKIPS = 20  # more than the 16 halvings of float16's loss scale from 2^16 to 1
NO_ITER = 2**62
COUNTS = "skipped", "in_a_row", "longest"
SCALER = "scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"
# Types of the values that a resume reads from a checkpoint's files, by dotted key
NUMBER, MISSING = int | float, EllipsisType  # earlier versions and other dtypes do not save each value
PROGRESS = {"val_loss": NUMBER | None, "best_loss": NUMBER | None, "best_iter": int | None}
PROGRESS |= {"since_best": int, "eval_pending": bool | MISSING}
TYPES = {
    STATE: {"finished": bool, "chosen": dict, "chosen.why": dict | MISSING, "data.manifest_sha256": str}
    | {"chosen.paths": dict | MISSING, "wandb_id": str | None, "trackio_id": str | None | MISSING, **PROGRESS}
    | {f"config.{key}": int for key in ("eval_interval", "max_iters", "batch_size", "grad_accum_steps")},
    TRAIN_STATE: {"optimizer": dict, "scaler": dict, "health": dict | MISSING, **PROGRESS}
    | {"row.iter": int, "row.tokens": int, "row.epoch": NUMBER}
    | {f"scaler.{key}": NUMBER | MISSING for key in SCALER}
    | {f"health.{key}": int | MISSING for key in COUNTS},
}
REMEDY = "from an earlier checkpoint or from the start, with a smaller --lr, more --warmup_iters or --dtype float32"


class NonfiniteGuard:
    """Count non-finite updates on the device. Only `check` synchronises with it, once per logged row.

    Args:
        on_nonfinite: `stop` or `skip`.
        run_dir: the run's folder, for messages.
        device: the device of losses and norms.
        scaled: a GradScaler is used (float16). It causes overflows to find its scale, so that only a non-finite loss is
            an error.
    """

    def __init__(self, on_nonfinite: str, run_dir: str, device: torch.device, scaled: bool):
        self.on_nonfinite, self.run_dir, self.scaled = on_nonfinite, run_dir, scaled
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, dtype=torch.int64, device=device)
        self.first = torch.tensor(NO_ITER, device=device)  # first bad update since the last check (from 0)
        self.values = torch.zeros(3, device=device)  # `loss`, `norm` and `local` of that update

    def observe(self, i: int, loss: Tensor, norm: Tensor, local: Tensor) -> Tensor:
        """Record update i (from 0). Does not synchronise with the device.

        Args:
            loss: loss over all ranks, shape () like the others.
            norm: gradient norm over all ranks.
            local: a number that is finite if and only if the loss and gradients of this rank are finite.

        Returns:
            1.0 if the update must be skipped, else 0.0: `found_inf` of torch's optimizers.
        """
        skip = ~(loss + norm).isfinite()
        bad = ~loss.isfinite() if self.scaled else skip
        self.skipped += skip
        self.in_a_row = (self.in_a_row + 1) * skip
        self.longest = torch.maximum(self.longest, self.in_a_row)
        is_first = bad & (self.first == NO_ITER)
        self.first = torch.where(is_first, i, self.first)
        self.values = torch.where(is_first, torch.stack((loss, norm, local)), self.values)
        return skip.float()

    def check(self, row: dict, batches: TrainingBatches, ranks: DistributedContext) -> tuple[str, str]:
        """Add `skipped` to the row. Return a warning and an error about the updates since the last check, or "".

        The error, which ends the run, is set if an update was not finite and on_nonfinite is `stop`, or if too many
        updates in a row were skipped. Synchronises with the device.
        """
        row["skipped"], longest, first = torch.stack((self.skipped, self.longest, self.first)).tolist()
        warning = error = ""
        if first != NO_ITER:
            loss, norm, local = self.values.tolist()
            finite = ranks.all_gather(math.isfinite(local))  # by rank
            suspects = [rank for rank in range(ranks.world) if not finite[rank]] or list(range(ranks.world))
            micros = [m for m in range(batches.per_update // batches.batch_size) if m % ranks.world in suspects]
            windows = [int(w) for m in micros for w in batches.indices(first, m)]
            cause = f"norm of the gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
            where = f" on rank {', '.join(map(str, suspects))}" if ranks.world > 1 else ""
            listed = ", ".join(map(str, windows[:16])) + ", ..." * (len(windows) > 16)
            message = (
                f"iter {first + 1}: the {cause}{where}; training windows of its batch: {listed} (window w starts at "
                f"token {batches.windows.stride} * w; their texts: {show_batch_command(self.run_dir, first + 1)}). The "
                "update was skipped"
            )
            if self.on_nonfinite == "stop":
                error = f"{message}, and the run ends. Go on {REMEDY}, or skip such updates with --on_nonfinite skip"
            else:
                skipped = count_of(row["skipped"], "update")
                warning = f"warning: {message} (on_nonfinite = skip); {skipped} skipped so far"
        if longest >= MAX_CONSECUTIVE_SKIPS and not error:
            error = (
                f"{longest} updates in a row, up to iter {row['iter']}, had a non-finite loss or gradient: the run "
                f"has diverged. Go on {REMEDY}"
            )
        self.longest = self.in_a_row.clone()
        self.first = torch.full_like(self.first, NO_ITER)
        return warning, error

    def state_dict(self) -> dict:
        """Return the counts, to be saved in a checkpoint."""
        unused = dict.fromkeys(("mean", "square", "rows"), 0)  # earlier versions of flatGPT require these keys
        return {name: int(getattr(self, name)) for name in COUNTS} | unused

    def load_state_dict(self, state: dict) -> None:
        """Restore the counts from a checkpoint."""
        for name in COUNTS:
            setattr(self, name, torch.full_like(self.skipped, state.get(name, 0)))


def require_finite(model: nn.Module, i: int, loss: float = 0.0) -> None:
    """Raise UserError if a weight or the validation loss at iteration i is NaN or infinite."""
    weights = [p.detach() for p in model.parameters()]
    # with fully_shard, of the local shards
    sums = torch.stack([(w.to_local() if hasattr(w, "to_local") else w).sum() for w in weights])
    if not math.isfinite(loss) or not sums.isfinite().all():
        cause = f"the validation loss is {loss}" if not math.isfinite(loss) else "a weight is not finite"
        raise UserError(f"{cause} at iter {i}: the run has diverged. Go on {REMEDY}")


def require_resumable(folder: Path) -> dict:
    """Verify a checkpoint, the types of its values, and that its weights and moments are finite. Return its state.

    Raises:
        DamagedCheckpointError: names the file, and the value or the tensor.
    """
    contents = {STATE: checkpoint.verify(folder), TRAIN_STATE: checkpoint.load_train_state(folder)}
    try:
        contents[WEIGHTS] = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{folder / WEIGHTS} cannot be loaded: {error}") from None
    for file, content in contents.items():
        values, types = dict(_flatten(content)), TYPES.get(file, {})
        wrong = [key for key, expected in types.items() if not isinstance(values.get(key, ...), expected)]
        wrong = [f"{key} = {values[key]!r:.50}" if key in values else f"{key} is missing" for key in wrong]
        if file == TRAIN_STATE and not wrong and values["row.iter"] != contents[STATE]["iter"]:
            wrong = [f"row.iter = {values['row.iter']}, but {STATE} has {contents[STATE]['iter']}"]
        for key, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                low, high = map(float, value.aminmax())  # one pass; takes less time than the SHA-256
                if not math.isfinite(low + high) or (key.endswith("exp_avg_sq") and low < 0):
                    wrong.append(f"{key} has values {low} to {high}")
        if wrong:
            raise DamagedCheckpointError(f"{folder / file} cannot be resumed: {wrong[0]}")
    return contents[STATE]


def _flatten(values: dict | list, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values of nested dicts and lists, at every level, with their dotted keys."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield f"{prefix}{key}", value
        if isinstance(value, dict | list):
            yield from _flatten(value, f"{prefix}{key}.")
