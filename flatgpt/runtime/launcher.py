"""What a rank of torchrun needs besides communication: an equal share of an update, and an error that is seen."""

from __future__ import annotations

import contextlib
import json
import os
import time

from config import TrainConfig, UserError


def record_failure(text: str) -> None:
    """Write an error to the file that torchrun reads when this rank exits. Does nothing without torchrun.

    torchrun repeats the earliest error as the root cause at the end of its output, after a traceback of its own.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)


def require_equal_shares(config: TrainConfig, world: int) -> None:
    """Raise UserError if `world` does not divide grad_accum_steps.

    The message suggests settings with as many sequences per update, rounded up to a multiple of `world`.
    """
    if config.grad_accum_steps % world == 0:
        return
    sequences = config.batch_size * config.grad_accum_steps
    total = -(-sequences // world) * world
    steps = next(n for n in range(world, total + 1, world) if total % n == 0 and total // n <= config.batch_size)
    difference = "the same updates" if total == sequences else f"{total} sequences, not {sequences}"
    raise UserError(
        f"grad_accum_steps = {config.grad_accum_steps} is the number of passes of all devices together and cannot be "
        f"divided by {world}: use --batch_size {total // steps} --grad_accum_steps {steps} ({difference})"
    )
