"""Reports of a run: summary, metrics rows, samples, plot and final message, and advice when memory runs out."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unicodedata import category

import torch
from torch import Tensor

from config import SamplingConfig, TrainConfig, UserError, count_of, run_dir
from flatgpt.data.tokenizer import FileTokenizer, encode_ordinary, start_ids
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate_batch
from flatgpt.runs import history
from flatgpt.runs.clock import RunClock, duration
from flatgpt.runs.run_log import PICTURE, RunLog
from flatgpt.runtime.device import peak_flops, uncompiled
from flatgpt.runtime.stop import StopRequest
from flatgpt.training.optimizer import learning_rate
from flatgpt.training.plan import size_lines
from flatgpt.training.resume import Progress
from flatgpt.training.setup import TrainingRun


def summary(run: TrainingRun) -> str:
    """Return the sizes and settings of a run, printed before its first update."""
    config, settings = run.config, run.device_settings
    data = f"{run.dataset.notice or run.dataset.folder} ({run.dataset.meta['tokenizer']})"
    ranks = f"; {run.ranks.world} ranks, {'fully_shard' if config.fsdp else 'DDP'}" if run.ranks.world > 1 else ""
    lines = [
        *size_lines(config, run.model, data, run.batches.windows),
        f"machine  {settings.describe()}{ranks}",
        *settings.path_lines(),
        f"folder   {config.out_dir}",
    ]
    if "val" not in run.dataset.meta["splits"]:
        lines.append(
            f"note: {run.dataset.folder} has no val split: there is no validation loss and no best checkpoint; the "
            "newest one is used instead"
        )
    return "\n".join(lines)


def metrics_row(run: TrainingRun, i: int, loss: Tensor, norm: Tensor, clock: RunClock) -> dict:
    """Return the metrics of the newest update, i (from 1). Synchronises with the device.

    `losses` is not logged: a resumed run needs it for the mean of its next row.
    """
    losses, step_ms = clock.end_row()
    finite = list(filter(math.isfinite, losses))  # other updates were skipped
    tokens = run.batches.per_update * run.config.context_length
    tok_per_s = 1e3 * tokens / step_ms if step_ms else None
    return {
        "iter": i,
        "tokens": i * tokens,
        "epoch": i * run.batches.per_update / len(run.batches.windows),
        "train_loss": loss.item(),
        "mean_loss": sum(finite) / len(finite) if finite else None,
        "losses": losses,
        "lr": learning_rate(i - 1, run.config),
        "grad_norm": norm.item(),
        "loss_scale": run.scaler.get_scale() if run.scaler.is_enabled() else None,
        "step_ms": step_ms,
        "tok_per_s": tok_per_s,
        "mfu": model_flops_utilization(run, tok_per_s),
        "peak_mem_gb": run.device_settings.peak_memory_gb(),
    }


def model_flops_utilization(run: TrainingRun, tok_per_s: float | None) -> float | None:
    """Return the FLOPs of a speed over the peak FLOPs of all devices; None if one of them is not known."""
    peak = peak_flops(run.device_settings.name)
    return tok_per_s * run.model.flops_per_token() / (peak * run.ranks.world) if peak and tok_per_s else None


def generate_samples(run: TrainingRun, seed: int) -> list[str]:
    """Continue each sample_prompt; return texts with their prompts. Random numbers depend only on the seed."""
    config, encoding = run.config, run.encoding
    prompts = [
        start_ids(encoding, end_of_text=not prompt) if prompt in ("", "\n") else encode_ordinary(encoding, prompt)
        for prompt in config.sample_prompt
    ]

    def sample_ids() -> list[list[int]]:  # of a fixed length: a sharded model needs all ranks for each token
        options = SamplingConfig(temperature=0.8, seed=seed)
        steps = generate_batch(Decoder(run.model), prompts, config.sample_tokens, options, n_vocab=encoding.n_vocab)
        with run.device_settings.autocast(), uncompiled(run.model):
            return [list(row) for row in zip(*steps, strict=True)]

    sampled = sample_ids() if run.model is run.wrapped_model else run.ranks.run_on_rank0(sample_ids)
    texts = []
    for prompt, ids in zip(config.sample_prompt, sampled, strict=True):
        ids = ids[: ids.index(encoding.eot_token)] if encoding.eot_token in ids else ids
        text = prompt + encoding.decode(ids)
        # control characters could change the state of the terminal
        texts.append("".join(c if category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in text))
    return texts


def draw_picture(log: RunLog, folder: Path) -> None:
    """Plot the run so far to metrics.png. A failure is only a warning."""
    log.bar.close()  # so that matplotlib's messages appear below it
    try:
        from flatgpt.runs.plots import plot_runs  # imports matplotlib

        log.write_picture(plot_runs([history.read(folder)]))
        log.print(f"picture  {folder / PICTURE}")
    except Exception as error:  # such as a full disk, a missing font or a broken installation
        print(f"warning: {folder / PICTURE} was not drawn: {error}", file=sys.stderr)


def closing_message(run: TrainingRun, progress: Progress, reason: int, start: int, seconds: float) -> str:
    """Return the final message of a run: how it ended, and the next commands.

    Args:
        reason: the stop reason: a signal number or StopRequest.TIME_IS_UP; 0 if the run finished.
        start: the iteration at which the training loop started.
        seconds: time since then.
    """
    config, i, folder = run.config, progress.iter, shlex.quote(run.config.out_dir)
    if reason:
        cause = f" (max_minutes = {config.max_minutes})" if reason == StopRequest.TIME_IS_UP else ""
        saved = "saved" if i else "nothing to save"
        return f"stopped at iter {i} of {config.max_iters}{cause}; {saved}. {next_start(run, i > 0, chr(10) + '  ')}"
    prompt = "" if isinstance(run.encoding, FileTokenizer) else " --prompt 'The '"  # it may have no such characters
    early = f"stopped at iter {i}: no new best in {count_of(progress.since_best, 'evaluation')} (patience)\n"
    updates = count_of(i, "update") + (f", of which {i - start:,} in this start" if start else "")
    best = ""
    if progress.best_iter is not None:
        best = f", best validation loss {progress.best_loss:.4f} at iter {progress.best_iter}"
    split = "" if "val" in run.dataset.meta["splits"] else " --split train"  # eval.py's default is val
    return (
        f"{early * (i < config.max_iters)}done: {updates}{best}, {duration(seconds)}. Next:\n"
        f"  python infer.py --model_path {folder}{prompt}\n"
        f"  python eval.py --model_path {folder}{split}\n"
        "  python prepare_data.py text --input YOUR_FILES --name mine"
    )


def next_start(run: TrainingRun, saved: bool, separator: str = " ") -> str:
    """Return the command that resumes a run that has stopped, or starts it again if it has no checkpoint."""
    # `--resume auto` and `--resume --name` do not name a folder
    out_dir = run.config.out_dir
    path = out_dir if "/" in out_dir and out_dir[0] != "-" else f"./{out_dir}"
    words = f"--resume {shlex.quote(path)}" if saved else f"--config {shlex.quote(path + '/config.toml')}"
    if saved and Path(path) == run_dir(TrainConfig()):
        words = "--resume"
    return f"To {'resume' if saved else 'start again'}:{separator}{run.ranks.launcher} train.py {words}"


@contextlib.contextmanager
def explain_out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn torch.OutOfMemoryError into a UserError with settings that need less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = str(error).partition(" If reserved")[0].rstrip(".")  # without the advice about the allocator
        half = 1 if config.batch_size % 2 else config.batch_size // 2
        steps = config.grad_accum_steps * config.batch_size // half
        smaller_batch = (
            f"--batch_size {half} --grad_accum_steps {steps} (the same updates); " if config.batch_size > 1 else ""
        )
        raise UserError(
            f"{text}. Try, in this order: {smaller_batch}--activation_checkpointing (the same updates, "
            "slower); --fsdp on several devices; a smaller --context_length or model (train.py --plan estimates "
            "memory)"
        ) from None
