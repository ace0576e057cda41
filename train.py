"""Train a GPT-2 style model: shards -> checkpoints and a log in out/<recipe>/.

python train.py                                   # configs/quickstart.toml: a minute on two CPU cores
python train.py --config shakespeare              # a recipe from configs/
python train.py --config mine.toml --lr 1e-3      # your own recipe, with one change
python train.py --resume out/shakespeare          # resume a stopped run, with its settings
python train.py --list                            # list recipes and runs
python train.py --config gpt2_124m --plan         # estimate size, memory and time without training
python train.py --resume out/shakespeare --show_batch 1234      # print the texts that update 1,234 was trained on
python train.py --max_minutes 5 --json result.json              # train for a fixed time; write the result
torchrun --standalone --nproc_per_node=2 train.py --config shakespeare --batch_size 8 --grad_accum_steps 2   # 2 devices
python train.py --help all                        # every key
"""

import sys

from flatgpt.cli.cli import from_command_line, run_script
from config import TrainConfig, run_dir
from flatgpt.cli.settings import read_recipe, recipe_text, recipes
from flatgpt.interop.pretrained import initial_shape, run_settings
from flatgpt.runs.run_list import print_list

if __name__ == "__main__":
    CONFIG = from_command_line(TrainConfig, __doc__, initial_shape, run_settings, "quickstart")
    if CONFIG.list:
        run_script(print_list, recipes(TrainConfig, sys.argv[1:]))
        sys.exit()
    if CONFIG.show_batch:
        from flatgpt.training.show_batch import show_batch

        run_script(show_batch, CONFIG)
        sys.exit()

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from config import UserError
from flatgpt.data.tokenizer import FileTokenizer
from flatgpt.data.tokenizer_files import tokenizer_json
from flatgpt.evaluation.metrics import default_batch_size, eval_batches, mean_loss
from flatgpt.runs import checkpoint
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runs.clock import RunClock
from flatgpt.runs.lock import RunLock
from flatgpt.runs.run_log import RunLog
from flatgpt.runs.trackers import start_tracker
from flatgpt.runtime.device import reseed
from flatgpt.runtime.distributed import (
    DistributedContext,
    full_tensor,
    grad_sync,
    join_process_group,
    local_grad_sum,
    shorten_timeout,
)
from flatgpt.runtime.files import require_writable, write_json
from flatgpt.runtime.stop import StopRequest
from flatgpt.training import reporting
from flatgpt.training.nonfinite import require_finite
from flatgpt.training.optimizer import apply_gradients, learning_rate
from flatgpt.training.plan import print_plan
from flatgpt.training.result import run_result
from flatgpt.training.resume import Progress, checkpoint_state, find_resume_checkpoint, restore_run, run_metadata
from flatgpt.training.setup import TrainingRun, build_run


def train_step(run: TrainingRun, i: int) -> tuple[Tensor, Tensor]:
    """Run optimizer update i (from 0). Does not synchronise with the device; non-finite updates are skipped.

    Returns:
        loss and gradient norm over all ranks, shape () each.
    """
    config, micros = run.config, run.ranks.micro_batches(run.config.grad_accum_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(i, config)
    loss = torch.zeros((), device=run.device_settings.device)
    for micro in micros:
        x, y = run.prefetcher(i, micro)  # (B, T) each
        if config.dropout:
            reseed(config.seed, i, micro)
        with grad_sync(run.wrapped_model, last=micro == micros[-1]):
            with run.device_settings.autocast():
                micro_loss = run.forward(x, y) / config.grad_accum_steps
            # A non-finite loss can have finite gradients. The factor is then NaN, so that the scaler skips the update.
            run.scaler.scale(micro_loss).backward(1 + 0 * micro_loss.detach())
        loss += micro_loss.detach()
    run.scaler.unscale_(run.optimizer)
    norm = full_tensor(clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf))
    local, loss = loss + local_grad_sum(run.wrapped_model), run.ranks.sum(loss)
    apply_gradients(run.optimizer, run.scaler, found_inf=run.nonfinite_guard.observe(i, loss, norm, local))
    run.model.zero_grad(set_to_none=True)
    return loss, norm


def evaluate(
    run: TrainingRun, stop_reason: Callable[[], int] = lambda: 0, progress: Callable[[range], Iterable[int]] = iter
) -> dict[str, float] | None:
    """Return the mean loss of each evaluated split, by its column in metrics.csv; None if interrupted.

    Args:
        stop_reason: called before each batch. If the result is nonzero, the evaluation is interrupted on all ranks.
        progress: wraps the numbers of the batches of a split, to show how many are done.
    """
    config, ranks, T, losses = run.config, run.ranks, run.config.context_length, {}
    stop_flags: list[bool] = []

    def not_stopped(batch) -> bool:
        stop_flags.append(bool(ranks.all_reduce_max(stop_reason())[0]))
        return not stop_flags[-1]

    # an update holds the activations of all blocks, an evaluation those of one
    blocks = 1 if config.activation_checkpointing else config.n_layer
    batch_size = min(config.batch_size * blocks, default_batch_size(T, run.device_settings.device))
    for split, column in run.eval_columns.items():
        tokens, limit = run.dataset.tokens(split), run.eval_tokens(split)
        batches = itertools.takewhile(not_stopped, eval_batches(tokens, T, batch_size, limit, ranks, progress=progress))
        with run.device_settings.autocast():
            losses[column] = mean_loss(run.model, batches, run.device_settings.to_device, ranks)
        if any(stop_flags):
            return None
    return losses


def record_evaluation(
    run: TrainingRun, progress: Progress, checkpoints: CheckpointWriter, losses: dict[str, float]
) -> None:
    """Record an evaluation. If val_loss is the best so far, the link `best` moves once its checkpoint is saved.

    Args:
        losses: without val_loss if the dataset has no val split. There is no best checkpoint then.
    """
    loss = losses.get("val_loss")
    require_finite(run.model, progress.iter, loss or 0.0)
    progress.row |= losses
    progress.val_loss = loss
    progress.eval_pending = False
    if loss is None:
        return
    progress.since_best += 1
    if progress.iter == 0 or (progress.best_loss is not None and loss >= progress.best_loss):
        return
    if run.config.on_save_error == "warn":  # otherwise a failed save ends the run
        checkpoints.wait()
    if run.ranks.all(checkpoints.failure is None):
        progress.best_loss, progress.best_iter, progress.since_best = loss, progress.iter, 0
        checkpoints.submit_after_save(checkpoint.set_link, Path(run.config.out_dir), "best", progress.iter)


def save(run: TrainingRun, progress: Progress, checkpoints: CheckpointWriter) -> None:
    """Wait for the previous save, then start to save a checkpoint of the current iteration."""
    checkpoints.wait()
    require_finite(run.model, progress.iter)
    state = {key: progress.row[key] for key in ("iter", "tokens", "epoch")} | progress.state_dict()
    checkpoints.save({**state, "finished": False}, checkpoint_state(run, progress))


def write_row(run: TrainingRun, progress: Progress, log: RunLog, clock: RunClock, evaluated: bool) -> None:
    """Write the newest row to the log and, after an evaluation, samples. A new model's are noise and left out."""
    config, i, row = run.config, progress.iter, progress.row
    log.write(row, clock.seconds_left(i, config.max_iters, config.eval_interval))
    if not evaluated or not run.encoding or not config.sample_tokens:
        return
    loss = row.get("val_loss", row.get("mean_loss"))
    uses_context = loss is not None and loss < run.unigram_entropy
    if i > 0 or uses_context:
        try:
            texts = reporting.generate_samples(run, run.config.seed)
            log.write_samples(row, config.sample_prompt, texts, whole=uses_context)
        except UserError as error:  # logits that are not finite, although the loss is
            log.print(f"warning: no sample at iter {i}: {error}")


def train_loop(
    run: TrainingRun, progress: Progress, checkpoints: CheckpointWriter, log: RunLog, stop: StopRequest
) -> int:
    """Train until max_iters is reached, patience is exhausted or a stop is requested.

    Returns:
        the stop reason: a signal number or StopRequest.TIME_IS_UP; 0 if the run finished.
    """
    config, ranks, start, reason = run.config, run.ranks, progress.iter, 0
    clock = RunClock(run.eval_updates(), progress.row.get("losses", ()))
    save_interval = config.save_interval or config.eval_interval
    intervals = config.log_interval, config.eval_interval, save_interval, config.max_iters
    if progress.forked:
        save(run, progress, checkpoints)
    while True:
        row_due, evaluated = progress.eval_pending or any(progress.iter % n == 0 for n in intervals), False
        if progress.eval_pending and not reason:  # after a stop, the resumed run evaluates
            # max_minutes does not interrupt the first evaluation, so that each start makes at least one update
            stop_reason = stop.reason if progress.iter > start else lambda: stop.signal or 0
            losses = evaluate(run, stop_reason, log.show_evaluation)
            if losses is None:
                reason = ranks.all_reduce_max(stop.reason())[0]
            else:
                record_evaluation(run, progress, checkpoints, losses)
                evaluated = True
        if row_due or reason:
            write_row(run, progress, log, clock, evaluated)
            clock.start_row(evaluated)
        if reason or progress.iter >= config.max_iters or progress.patience_exhausted(config.patience):
            return reason
        loss, norm = train_step(run, progress.iter)
        progress.iter += 1
        log.bar.update()
        if progress.iter == start + 1:  # the model is compiled and the optimizer's tensors exist
            shorten_timeout(config)
            gc.freeze()  # excludes lasting objects from garbage collections, which take 0.16 s otherwise
            checkpoints.allocate_buffers(checkpoint_state(run, progress))
        clock.count(loss)
        checkpoints.check()
        # after each update, so that all ranks save and stop at the same iteration
        reason, timer_due = ranks.all_reduce_max(stop.reason(), checkpoints.timer_due())
        progress.eval_pending = progress.iter % config.eval_interval == 0 or progress.iter >= config.max_iters
        if reason or timer_due or any(progress.iter % n == 0 for n in intervals):
            progress.row = reporting.metrics_row(run, progress.iter, loss, norm, clock)
            warning, error = run.nonfinite_guard.check(progress.row, run.batches, ranks)
            if warning:
                log.print(warning)
            if error:
                checkpoints.wait()  # for the save: torchrun kills all ranks when one exits
                raise UserError(error)
        if reason or timer_due or progress.eval_pending or progress.iter % save_interval == 0:
            with clock.paused():
                save(run, progress, checkpoints)  # before evaluation and sampling, which may fail


def write_result(run: TrainingRun, stdout: TextIO, *facts) -> None:
    """Write the result of a run to the file that config.json names; facts are those of run_result."""
    if run.config.json and run.ranks.first:
        with contextlib.redirect_stdout(stdout):
            write_json(run_result(run, *facts), run.config.json)


def train_on(ranks: DistributedContext, lock: RunLock, config: TrainConfig, stdout: TextIO) -> None:
    """Train on one rank. On return, DDP is freed before its process group is destroyed; otherwise it can hang."""
    resume_from = ranks.run_on_rank0(lambda: find_resume_checkpoint(lock, config))
    path, state = resume_from or (None, None)
    run = build_run(config, ranks, state, path)
    config, folder = run.config, Path(run.config.out_dir)
    print(reporting.summary(run))
    progress = restore_run(resume_from, run, lock, recipe_text(config))
    if progress is None:
        write_result(run, stdout, resume_from[1], 0, resume_from[1]["iter"], 0.0)
        return
    tracker = start_tracker(config, folder, progress.iter, progress.tracker_ids) if ranks.first else None
    log = RunLog(folder if ranks.first else None, progress.iter, config.max_iters, tracker)
    recipe = read_recipe(TrainConfig, config.config, []) if config.config else {}
    metadata = {**run_metadata(run, recipe, resume_from), **tracker.ids} if tracker else {}
    ranks.barrier()  # trackers and git may take long
    vocabulary = tokenizer_json(run.encoding) if isinstance(run.encoding, FileTokenizer) else None
    checkpoints = CheckpointWriter(config, ranks, metadata, lock.is_held, vocabulary)
    stop, start, started = StopRequest(config.max_minutes, ranks.world > 1), progress.iter, time.perf_counter()
    try:
        reason = train_loop(run, progress, checkpoints, log, stop)
        if not reason:
            checkpoints.submit_after_save(checkpoint.mark_finished, folder / "ckpt" / "last", progress.state_dict())
        checkpoints.wait()
        if error := checkpoints.failure:
            raise UserError(f"the run ended at iter {progress.iter}, but its last save failed: {error}")
        seconds, losses = time.perf_counter() - started, {}
        if config.json and reason == StopRequest.TIME_IS_UP and "val_loss" not in progress.row:
            # the result of a fixed time is that of its last weights; the log has no row of it, as a resume repeats it
            losses = evaluate(run, lambda: stop.signal or 0) or {}
        if ranks.first and reason in (0, StopRequest.TIME_IS_UP):  # after a signal there is no time to plot
            reporting.draw_picture(log, folder)
    except UserError as error:
        checkpoints.close()  # the save in flight may be the first one
        ours = lock.is_held() or not ranks.first  # only rank 0 holds it
        next_start = reporting.next_start(run, bool(checkpoint.folders(folder))) if ours else ""
        raise UserError(f"{error}. {next_start}".rstrip(". ")) from error
    finally:
        checkpoints.close()  # waits for the save in flight
        log.close()
        gc.unfreeze()
        stop.restore()
    print(reporting.closing_message(run, progress, reason, start, seconds))
    newest = {"val_loss": losses["val_loss"], "val_iter": progress.iter} if "val_loss" in losses else {}
    facts = metadata | progress.row | progress.state_dict() | newest
    write_result(run, stdout, facts, reason, start, seconds)
    if reason > StopRequest.TIME_IS_UP:
        raise SystemExit(128 + reason)


def train(config: TrainConfig) -> None:
    """Train from scratch or from a checkpoint; with config.plan, print the plan instead."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if config.json == "-" else stdout), join_process_group(config) as ranks:
        if config.plan:
            print_plan(config, ranks)
            return
        ranks.run_on_rank0(lambda: require_writable(config.json, "json", created=run_dir(config)))
        with RunLock(run_dir(config)) as lock, reporting.explain_out_of_memory(config):
            train_on(ranks, lock, config, stdout)


if __name__ == "__main__":
    run_script(train, CONFIG, every_rank=True)
