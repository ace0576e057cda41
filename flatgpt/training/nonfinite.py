"""Detect updates whose loss or gradient is not finite, on the device, and end the run or skip them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from config import UserError
from flatgpt.data.dataset import TrainingBatches
from flatgpt.runtime.distributed import DistributedContext

MAX_CONSECUTIVE_SKIPS = 20  # float16's scale of 2^16 has reached 1 before
NO_ITER = 2**62
COUNTS = "skipped", "in_a_row", "longest"
REMEDY = "with a smaller --lr, more --warmup_iters or --dtype float32"


class NonfiniteGuard:
    """Counts a run's non-finite updates on its device. Only `check`, once a logged row, waits for the device.

    Args:
        on_nonfinite: `stop` or `skip`.
        device: of losses and norms.
        scaled: gradients go through float16's scaler, which finds its scale by overflows: only a loss can be an error.
    """

    def __init__(self, on_nonfinite: str, device: torch.device, scaled: bool):
        self.on_nonfinite, self.scaled = on_nonfinite, scaled
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, dtype=torch.int64, device=device)
        self.first = torch.tensor(NO_ITER, device=device)  # first bad update since the last check, from 0
        self.values = torch.zeros(3, device=device)  # loss and norm of that update, and this rank's share of them

    def observe(self, i: int, loss: Tensor, norm: Tensor, local: Tensor) -> Tensor:
        """Count update i (from 0). Does not synchronise with the device.

        Args:
            loss: of all ranks together; shape () as the others.
            norm: of the gradient of all ranks together.
            local: any number that is finite if and only if this rank's own loss and gradients are.

        Returns:
            1.0 if the update has to be skipped, else 0.0: `found_inf` of torch's optimizers.
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
        """Add `skipped` to the row, and return a warning and an error about the updates since the last check, or "".

        An error ends the run: an update was not finite and on_nonfinite is `stop`, or too many in a row were skipped.
        Waits for the device.
        """
        row["skipped"], longest, first = torch.stack((self.skipped, self.longest, self.first)).tolist()
        warning = error = ""
        if first != NO_ITER:
            loss, norm, local = self.values.tolist()
            finite = ranks.all_gather(math.isfinite(local))  # by rank
            suspects = [rank for rank in range(ranks.world) if not finite[rank]] or list(range(ranks.world))
            micros = [m for m in range(batches.per_update // batches.batch_size) if m % ranks.world in suspects]
            windows = [int(w) for m in micros for w in batches.indices(first, m)]
            what = f"norm of the gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
            on = f" on rank {', '.join(map(str, suspects))}" if ranks.world > 1 else ""
            shown = ", ".join(map(str, windows[:16])) + ", ..." * (len(windows) > 16)
            text = (
                f"iter {first + 1}: the {what}{on}; its batch there: training windows {shown} (window w begins at "
                f"token {batches.windows.stride} w). It was not applied"
            )
            if self.on_nonfinite == "stop":
                error = (
                    f"{text}, and the run ends here; what was saved stays. Go on from it with a smaller --lr or "
                    "--dtype float32, or leave such updates out with --on_nonfinite skip"
                )
            else:
                warning = f"warning: {text} (on_nonfinite = skip); {row['skipped']} left out so far"
        if longest >= MAX_CONSECUTIVE_SKIPS and not error:
            error = (
                f"{longest} updates in a row, up to iter {row['iter']}, had a loss or gradient that is not finite: the "
                f"run has diverged; what was saved stays. Go on from it, or start again, {REMEDY}"
            )
        self.longest = self.in_a_row.clone()
        self.first = torch.full_like(self.first, NO_ITER)
        return warning, error

    def state_dict(self) -> dict:
        """Return the counts that a resumed run continues."""
        unused = dict.fromkeys(("mean", "square", "rows"), 0)  # earlier versions of flatGPT need these keys
        return {name: int(getattr(self, name)) for name in COUNTS} | unused

    def load_state_dict(self, state: dict) -> None:
        """Continue from these counts."""
        for name in COUNTS:
            setattr(self, name, torch.full_like(self.skipped, state[name]))


def require_finite(model: nn.Module, i: int, loss: float = 0.0) -> None:
    """Raise UserError where a weight or the validation loss is NaN or infinite at iteration i."""
    weights = [p.detach() for p in model.parameters()]
    sums = torch.stack([(w.to_local() if hasattr(w, "to_local") else w).sum() for w in weights])  # local: fully_shard
    if not math.isfinite(loss) or not sums.isfinite().all():
        what = f"the validation loss is {loss}" if not math.isfinite(loss) else "a weight is not finite"
        raise UserError(
            f"{what} at iter {i}: the run has diverged. Go back to a checkpoint before it (--resume FOLDER/ckpt/best, "
            f"say) or start again, {REMEDY}"
        )
