"""Whether a run is well: updates that are not finite are seen on the device and not applied, spikes are reported."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from config import TrainConfig, UserError
from flatgpt.data.dataset import TrainingBatches
from flatgpt.runtime.distributed import DistributedContext

MAX_CONSECUTIVE_SKIPS = 20  # updates in a row that are not applied: float16's scale of 2^16 has reached 1 before
NO_ITER = 2**62
SMOOTHING, ROWS, DEVIATIONS = 0.05, 20, 6  # a spike: so far above the mean of at least so many logged losses


class NonfiniteGuard:
    """What is counted of one run's updates, on its device: nobody waits for it but the row of a log.

    Args:
        config: resolved.
        device: where losses and norms are.
        scaled: gradients go through float16's scaler, which finds its scale by overflows: only losses can be bad.
    """

    def __init__(self, config: TrainConfig, device: torch.device, scaled: bool):
        self.config, self.scaled = config, scaled
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, dtype=torch.int64, device=device)
        self.first = torch.tensor(NO_ITER, device=device)  # bad update since the newest look, from 0
        self.values = torch.zeros(3, device=device)  # its loss, its norm, and what this rank gave to them
        self.mean, self.square, self.rows = 0.0, 0.0, 0

    def observe(self, i: int, loss: Tensor, norm: Tensor, own: Tensor) -> Tensor:
        """Count update i (from 0) without waiting for it.

        Args:
            loss: of all ranks together; () as the others.
            norm: of the gradient of all ranks together.
            own: anything that is finite as long as this rank's own loss and gradients are.

        Returns:
            1.0 if the update has to be left out, else 0.0: `found_inf`, as torch's optimizers call it.
        """
        skip = ~(loss + norm).isfinite()
        bad = ~loss.isfinite() if self.scaled else skip
        self.skipped += skip
        self.in_a_row = (self.in_a_row + 1) * skip
        self.longest = torch.maximum(self.longest, self.in_a_row)
        newly = bad & (self.first == NO_ITER)
        self.first = torch.where(newly, i, self.first)
        self.values = torch.where(newly, torch.stack((loss, norm, own)), self.values)
        return skip.float()

    def check(self, row: dict, batches: TrainingBatches, ranks: DistributedContext) -> list[str]:
        """Wait for the counts, at a logged update; what a user should hear. Adds `skipped` to the row.

        Raises:
            UserError: an update was bad and on_nonfinite is `stop`, or too many in a row were left out.
        """
        counts = torch.stack((self.skipped, self.longest, self.first)).tolist()
        row["skipped"], longest, first = counts
        said = []
        if first != NO_ITER:
            loss, norm, own = self.values.tolist()
            text = self._where(first, loss, norm, ranks.all_gather(math.isfinite(own)), batches, ranks)
            if self.config.on_nonfinite == "stop":
                raise UserError(
                    f"{text}. It was not applied, and the run ends here; what was saved stays. Go on from it with "
                    "a smaller --lr or --dtype float32, or leave such updates out with --on_nonfinite skip"
                )
            said.append(f"warning: {text}. It was not applied (on_nonfinite = skip); {row['skipped']} left out so far")
        if longest >= MAX_CONSECUTIVE_SKIPS:
            raise UserError(
                f"{longest} updates in a row, up to iter {row['iter']}, had a loss or gradient that is not finite: the "
                "run has diverged; what was saved stays. Go on from it, or start again, with a smaller --lr, more "
                "--warmup_iters or --dtype float32"
            )
        self.longest = self.in_a_row.clone()
        self.first = torch.full_like(self.first, NO_ITER)
        return said

    def _where(
        self, i: int, loss: float, norm: float, fine: list[bool], batches: TrainingBatches, ranks: DistributedContext
    ) -> str:
        """What was bad of update i, on which rank, and which windows of the data it had there."""
        what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
        guilty = [rank for rank in range(ranks.world) if not fine[rank]] or list(range(ranks.world))
        micros = range(self.config.grad_accum_steps)
        windows = [int(w) for m in micros if m % ranks.world in guilty for w in batches.indices(i, m)]
        shown = ", ".join(map(str, windows[:16])) + f" and {len(windows) - 16} more" * (len(windows) > 16)
        on = f" on rank {', '.join(map(str, guilty))}" if ranks.world > 1 else ""
        return (
            f"iter {i + 1}: the {what}{on}; its batch there: training windows {shown} (window w begins at token "
            f"{batches.windows.stride} w)"
        )

    def spike(self, row: dict) -> list[str]:
        """What a user should hear of a logged row's loss, and its part in the mean of them."""
        loss, said = row["train_loss"], []
        if not math.isfinite(loss):
            return said
        deviation = math.sqrt(max(self.square - self.mean**2, 0.0))
        if self.rows >= ROWS and loss > self.mean + DEVIATIONS * deviation:
            said.append(
                f"warning: iter {row['iter']}: loss {loss:.4f} is a spike, {loss - self.mean:.4f} above the mean of "
                f"rows before it ({self.mean:.4f}, standard deviation {deviation:.4f})"
            )
        weight = max(SMOOTHING, 1 / (self.rows + 1))
        self.mean += weight * (loss - self.mean)
        self.square += weight * (loss**2 - self.square)
        self.rows += 1
        return said

    def state_dict(self) -> dict:
        """What a resumed run has to know."""
        counts = {name: int(getattr(self, name)) for name in ("skipped", "in_a_row", "longest")}
        return counts | {name: getattr(self, name) for name in ("mean", "square", "rows")}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        for name in ("skipped", "in_a_row", "longest"):
            setattr(self, name, torch.full_like(self.skipped, state[name]))
        self.mean, self.square, self.rows = (state[name] for name in ("mean", "square", "rows"))


def require_finite(model: nn.Module, i: int, loss: float = 0.0) -> None:
    """Raise UserError where a weight or the validation loss is nan or infinite, at iteration i; before it is saved."""
    parts = [p.detach() for p in model.parameters()]
    weights = torch.stack([(p.to_local() if hasattr(p, "to_local") else p).sum() for p in parts])  # fully_shard's
    if not math.isfinite(loss) or not weights.isfinite().all():
        what = f"the validation loss is {loss}" if not math.isfinite(loss) else "a weight is not finite"
        raise UserError(
            f"{what} at iter {i}: the run has diverged. Go back to a checkpoint before it (--resume FOLDER/ckpt/best, "
            "say) or start again, with a smaller --lr, more --warmup_iters or --dtype float32"
        )


def out_of_memory(config: TrainConfig, device: str, peak_gb: float, world: int) -> str:
    """The message for a device whose memory is full: the keys that make it less, at the same updates."""
    total = config.batch_size * config.grad_accum_steps
    smaller = [n for n in range(1, config.batch_size) if total % n == 0 and (total // n) % world == 0]
    remedies = []
    if smaller:
        half = min(smaller, key=lambda n: (abs(n - config.batch_size / 2), n))
        remedies.append(
            f"--batch_size {half} --grad_accum_steps {total // half} ({total} sequences = "
            f"{total * config.context_length:,} tokens an update, as before)"
        )
    if not config.activation_checkpointing:
        remedies.append("--activation_checkpointing (the same updates, slower)")
    if world > 1 and not config.fsdp and config.optimizer != "muon":
        remedies.append(f"--fsdp (weights and optimizer in {world} parts)")
    remedies.append("a smaller --context_length or model (train.py --plan says what takes how much)")
    return (
        f"{device} is out of memory at batch_size = {config.batch_size}, grad_accum_steps = {config.grad_accum_steps}; "
        f"the peak was {peak_gb:.2f} GB. In this order: {'; '.join(remedies)}"
    )
