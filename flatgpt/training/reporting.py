"""What a run reports: its size, its metrics, its picture, how it ended, and what to do when memory is full."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from config import TrainConfig, UserError
from flatgpt.runs import history
from flatgpt.runs.run_log import PICTURE, RunLog, duration, peak_flops
from flatgpt.runtime.device import select_device
from flatgpt.runtime.distributed import DistributedContext
from flatgpt.runtime.stop import StopRequest
from flatgpt.training.optimizer import learning_rate
from flatgpt.training.resume import Progress
from flatgpt.training.setup import TrainingRun


def summary(run: TrainingRun) -> str:
    """Return the sizes and counts of a run, to be printed before its first update."""
    config, W = run.config, len(run.batches.windows)
    per_update, params, data = run.batches.per_update, run.model.num_params(), run.dataset.notice or run.dataset.folder
    tokens = config.max_iters * per_update * config.context_length
    return "\n".join(
        (
            f"model    {params:,} parameters: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
            f"context {config.context_length}, {config.vocab_size:,} ids ({run.dataset.meta['tokenizer']})",
            f"data     {data}: {len(run.batches.windows.tokens):,} training tokens, {W:,} windows",
            f"update   {config.batch_size} sequences x {config.grad_accum_steps} x {config.context_length} tokens = "
            f"{per_update * config.context_length:,} tokens; {W / per_update:,.1f} updates an epoch",
            f"run      {config.max_iters:,} updates = {tokens:,} tokens = {config.max_iters * per_update / W:.2f} "
            f"epochs, {tokens / params:.1f} tokens per parameter",
            f"machine  {run.device_settings.describe()}{run.ranks.describe(config.fsdp)}",
            f"folder   {config.out_dir}",
        )
    )


def metrics_row(run: TrainingRun, i: int, loss: Tensor, norm: Tensor, step_ms: float | None) -> dict:
    """Return the metrics of the newest update, the i-th (from 1). Waits for the device."""
    tokens, peak = run.batches.per_update * run.config.context_length, peak_flops(run.device_settings.name)
    tok_per_s = 1e3 * tokens / step_ms if step_ms else None
    row = {
        "iter": i,
        "tokens": i * tokens,
        "epoch": i * run.batches.per_update / len(run.batches.windows),
        "train_loss": loss.item(),
        "lr": learning_rate(i - 1, run.config),
        "grad_norm": norm.item(),
        "step_ms": step_ms,
        "tok_per_s": tok_per_s,
        "mfu": tok_per_s * run.model.flops_per_token() / (peak * run.ranks.world) if peak and tok_per_s else None,
        "peak_mem_gb": run.device_settings.peak_memory_gb(),
    }
    if run.scaler.is_enabled():
        row["loss_scale"] = run.scaler.get_scale()
    return row


def draw_picture(log: RunLog, folder: Path) -> None:
    """Draw the run so far as metrics.png. A failure is a warning."""
    log.bar.close()  # so that matplotlib's messages come below it
    try:
        from flatgpt.runs.plots import plot_runs  # here, as it imports matplotlib

        log.write_picture(plot_runs([history.read(folder)]))
        log.print(f"picture  {folder / PICTURE}")
    except Exception as error:  # a full disk, a font, a broken installation
        print(f"warning: {folder / PICTURE} was not drawn: {error}", file=sys.stderr)


def closing_message(run: TrainingRun, progress: Progress, reason: int, seconds: float) -> str:
    """Return the last lines of a run: how it ended, and the commands that come next.

    Args:
        reason: why it was stopped: a signal's number or StopRequest.TIME_IS_UP; 0 where it came to its end.
        seconds: since the loop began.
    """
    config, i = run.config, progress.iter
    folder = shlex.quote(config.out_dir)
    if reason == 0:
        lines = []
        if i < config.max_iters:
            lines.append(f"stopped at iter {i}: no new best in {progress.since_best} evaluations (patience)")
        best = f"best validation loss {progress.best_loss:.4f} at iter {progress.best_iter}"
        lines += [
            f"done: {i:,} updates, {best}, {duration(seconds)}. Next:",
            f"  python infer.py --model_path {folder} --prompt 'The '",
            f"  python eval.py --model_path {folder}",
            "  python prepare_data.py text --input YOUR_FILES --name mine",
        ]
        return "\n".join(lines)
    why = f": max_minutes = {config.max_minutes} are over" if reason == StopRequest.TIME_IS_UP else ""
    kept = ", and saved; to go on:" if i else ", before there was anything to save; to start again:"
    command = f"{run.ranks.launcher} train.py --config {shlex.quote(str(Path(config.out_dir) / 'config.toml'))}"
    return f"stopped at iter {i} of {config.max_iters}{why}{kept}\n  {command}{' --resume' * (i > 0)}"


@contextlib.contextmanager
def explain_out_of_memory(config: TrainConfig, ranks: DistributedContext) -> Iterator[None]:
    """Turn torch.OutOfMemoryError into a UserError that names the settings which need less memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        device = select_device(config.device, "float32", local_rank=ranks.local_rank if ranks.world > 1 else None)
        text = out_of_memory_message(config, device.name, device.peak_memory_gb(), ranks.world)
        raise UserError(text) from None


def out_of_memory_message(config: TrainConfig, device: str, peak_gb: float, world: int) -> str:
    """Return the message for a device out of memory: settings that make the same updates with less."""
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
