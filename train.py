"""Train a GPT-2 style model: shards -> checkpoints and a log in out/<recipe>/.

python train.py                                   # the Python reference, in bytes: minutes on two CPU cores
python train.py --config shakespeare              # a recipe from configs/
python train.py --config mine.toml --lr 1e-3      # your own, with a change
python train.py --config shakespeare --resume     # go on where a run was stopped
python train.py --list                            # the recipes, and the runs so far
python train.py --config gpt2_124m --plan         # how large, how long, on which GPU; trains nothing
torchrun --standalone --nproc_per_node=2 train.py --config shakespeare --batch_size 8 --grad_accum_steps 2   # 2 devices
python train.py --help                            # every key
"""

import sys

from config import TrainConfig, run_dir
from flatgpt.cli.cli import from_command_line, recipe_text, recipes, run_script
from flatgpt.interop.pretrained import initial_shape
from flatgpt.runs.run_list import print_list

if __name__ == "__main__":
    CONFIG = from_command_line(TrainConfig, __doc__, initial_shape)
    if CONFIG.list:
        run_script(print_list, recipes(TrainConfig, sys.argv[1:]))
        sys.exit()

import dataclasses
import gc
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from config import ReportedByOtherRank, UserError
from flatgpt.evaluation.metrics import default_batch_size, mean_loss
from flatgpt.evaluation.windows import eval_batches
from flatgpt.runs import checkpoint, history
from flatgpt.runs.checkpoint_writer import CheckpointWriter
from flatgpt.runs.lock import RunLock
from flatgpt.runs.plots import plot_runs, render
from flatgpt.runs.run_log import PICTURE, RunLog, StepClock, duration, peak_flops, start_wandb
from flatgpt.runtime.device import find_device, reseed, select_device
from flatgpt.runtime.distributed import DistributedContext, join_process_group, shorten_timeout
from flatgpt.runtime.parallel import full_tensor, gradients, local_grad_sum
from flatgpt.runtime.stop import StopRequest
from flatgpt.training import resume, samples
from flatgpt.training.nonfinite import out_of_memory, require_finite
from flatgpt.training.optimizer import apply_gradients, learning_rate
from flatgpt.training.setup import TrainingRun, build_run, print_plan, summary


def train_step(run: TrainingRun, i: int) -> tuple[Tensor, Tensor]:
    """One optimizer update, number i (from 0), on the device: no waiting here. It is left out if it is not finite.

    Returns:
        the loss and the gradient's norm, of all ranks together.
    """
    config, mine = run.config, run.ranks.micro_batches(run.config.grad_accum_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(i, config)
    loss = torch.zeros((), device=run.device_settings.device)
    for micro in mine:
        x, y = run.prefetcher(i, micro)  # (B, T) each
        if config.dropout:
            reseed(config.seed, i, micro)
        with gradients(run.wrapped_model, last=micro == mine[-1]):
            with run.device_settings.autocast():
                micro_loss = run.forward(x, y) / config.grad_accum_steps
            # nan where the loss is not finite: its gradients can be, and float16's scaler looks at those alone
            run.scaler.scale(micro_loss).backward(1 + 0 * micro_loss.detach())
        loss += micro_loss.detach()
    run.scaler.unscale_(run.optimizer)
    norm = full_tensor(clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf))
    own, loss = loss + local_grad_sum(run.wrapped_model), run.ranks.sum(loss)
    apply_gradients(run.optimizer, run.scaler, found_inf=run.nonfinite_guard.observe(i, loss, norm, own))
    return loss, norm


def evaluate(run: TrainingRun, asked: Callable[[], int] = lambda: 0) -> float | None:
    """Validation loss, nats per token, over the first eval_batches batches of the split (0: all of it).

    Args:
        asked: whether this rank is asked to stop: then there is no loss.
    """
    config, ranks, stopped = run.config, run.ranks, False
    tokens, share = run.dataset.tokens("val"), (ranks.rank, ranks.world)
    T = config.context_length
    rows = config.batch_size if config.eval_batches else default_batch_size(T, run.device_settings.device)
    batches = eval_batches(tokens, T, rows, config.eval_batches, share)

    def until_asked() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal stopped
        for batch in batches:
            if stopped := bool(ranks.all_reduce_max(asked())[0]):
                return
            yield batch

    with run.device_settings.autocast():
        loss = mean_loss(run.model, until_asked(), run.device_settings.to_device, ranks.sum)
    return None if stopped else loss


# ---------------------------------------------------------------------------------------------------------------------
# saving and running


def checkpoint_state(run: TrainingRun, row: dict, progress: dict) -> dict:
    """What a checkpoint is made of; the row is logged again after a resume."""
    train_state = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    train_state |= {"health": run.nonfinite_guard.state_dict(), "row": row, **progress}
    return {"weights": run.model.state_dict(), "train_state": train_state}


def save(run: TrainingRun, saver: CheckpointWriter, row: dict, progress: dict, facts: dict) -> None:
    """Begin to write the checkpoint of iteration row["iter"], when the one before it has arrived."""
    run.ranks.poll_all(saver.idle)
    require_finite(run.model, row["iter"])
    state = {key: row[key] for key in ("iter", "tokens", "epoch")} | progress | facts
    state["finished"] = False  # until its end has been evaluated too
    saver.save(state, checkpoint_state(run, row, progress))


def look(run: TrainingRun, saver: CheckpointWriter, row: dict) -> list[str]:
    """Return warnings about non-finite updates. Before an error, wait until the save in flight is complete."""
    try:
        return run.nonfinite_guard.check(row, run.batches, run.ranks)
    except UserError:
        run.ranks.poll_all(saver.idle)  # torchrun would end rank 0 with the first that leaves
        raise


def train(config: TrainConfig) -> None:
    """Train as the config says, from the beginning or from a checkpoint, until its end or until it is stopped."""
    if config.plan:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise ReportedByOtherRank  # the first says that it takes no torchrun
        print_plan(config)
        return
    with join_process_group(config, find_device) as ranks, RunLock(run_dir(config)) as claim:
        try:
            train_on(ranks, claim, config)
        except torch.OutOfMemoryError:
            place = select_device(config.device, "float32", local_rank=ranks.local_rank if ranks.world > 1 else None)
            raise UserError(out_of_memory(config, place.name, place.peak_memory_gb(), ranks.world)) from None


def train_on(ranks: DistributedContext, claim: RunLock, config: TrainConfig) -> None:
    """What each rank does."""
    start = ranks.run_on_rank0(lambda: resume.find_resume_checkpoint(claim, config.resume, config.overwrite))
    if start and config.lr_decay_iters is None:
        # the schedule that the run was started with stays, also when max_iters is raised
        config = dataclasses.replace(config, lr_decay_iters=start[1]["config"]["lr_decay_iters"])
    run = build_run(config, ranks, chosen=start[1]["chosen"] if start else None)
    config = run.config
    print(summary(run))
    at = resume.restore_run(start, run, claim, recipe_text(config))
    folder, row, progress, saved = Path(config.out_dir), at.row, at.progress, at.saved
    wandb_run = None
    if ranks.first:
        wandb_run = start_wandb(config.wandb, config.wandb_project, folder, dataclasses.asdict(config), at.wandb_id)
    log = RunLog(folder if ranks.first else None, row["iter"], config.max_iters, wandb_run)
    ranks.barrier()  # wandb's servers may take their time
    facts = resume.run_metadata(run) | {"wandb_id": wandb_run.id if wandb_run else at.wandb_id}
    i, began, clock, stop = (
        row["iter"],
        time.perf_counter(),
        StepClock(),
        StopRequest(config.max_minutes, ranks.world > 1),
    )
    saver = CheckpointWriter(config, ranks.first, full_tensor, claim.is_held)
    asked, save_now, over = 0, 0, False  # a stop, from outside; save_minutes; the end of patience
    intervals = config.log_interval, config.eval_interval, config.save_interval, config.max_iters
    try:
        while True:
            done = i >= config.max_iters
            evaluating = i % config.eval_interval == 0 or done or i == at.evaluated
            if i > 0 and saved != i and (evaluating or asked or save_now or i % config.save_interval == 0):
                began_save = time.perf_counter()
                save(run, saver, row, progress, facts)  # before evaluation and samples get a chance to fail
                saved = i
                clock.began += time.perf_counter() - began_save
            # Whoever stops it is in a hurry: what is left out, a resumed run does. But max_minutes does not cut the
            # evaluation that a run begins with, so that each slot of time makes an update at least.
            cut = stop.reason if i > at.row["iter"] else lambda: stop.signal or 0
            if evaluating and not asked and (loss := evaluate(run, cut)) is None:
                asked = ranks.all_reduce_max(stop.reason())[0]
            elif evaluating and not asked:
                require_finite(run.model, i, loss)
                row["val_loss"] = progress["val_loss"] = loss
                progress["since_best"] += 1
                better = progress["best_loss"] is None or loss < progress["best_loss"]
                if better and config.on_save_error == "warn":  # else a save that fails ends the run
                    ranks.poll_all(saver.idle)
                    saver.check()
                if saved == i and better and ranks.all(saver.failure is None):
                    progress |= {"best_loss": loss, "best_iter": i, "since_best": 0}
                    saver.submit_after_save(checkpoint.set_link, folder, "best", i)
                over = config.patience is not None and progress["since_best"] >= config.patience and saved == i
            if row["iter"] == i and (asked or "val_loss" in row or any(i % n == 0 for n in intervals)):
                log.write(row)
                if "val_loss" in row and run.encoding:
                    log.write_samples(row, config.sample_prompt, samples.generate_samples(run, config.seed))
                clock.start()
            if done or over or asked:
                break
            loss, norm = train_step(run, i)
            i += 1
            log.bar.update()
            if not clock.warm:  # compiled by now, and the optimizer has its tensors
                shorten_timeout(config)
                gc.freeze()  # what is there now stays; looking through all of it takes 0.16 s now and then
                saver.allocate_buffers(checkpoint_state(run, row, progress))
            clock.count(loss)
            saver.check()
            # once an update, so that row and checkpoint of all ranks agree
            asked, save_now = ranks.all_reduce_max(stop.reason(), saver.timer_due())
            due = any(i % n == 0 for n in intervals)
            if due or asked or save_now:
                row = log_row(run, i, loss, norm, clock)
                for text in look(run, saver, row) + (run.nonfinite_guard.spike(row) if due else []):
                    log.print(text)
        if not asked:
            saver.submit_after_save(checkpoint.mark_finished, folder / "ckpt" / "last")
        ranks.poll_all(saver.idle)
        saver.check()
        if saver.failure:
            raise UserError(f"the run ends at iter {i}, and its last checkpoint is not there: {saver.failure}")
        if ranks.first and asked in (0, StopRequest.TIME_IS_UP):  # whoever stops it is in a hurry
            draw(log, folder)
    finally:
        saver.close()  # what is in flight arrives
        log.close()
        gc.unfreeze()
        stop.restore()
    if (done or over) and not asked:
        if over and not done:
            print(f"stopped at iter {i}: no new best in {progress['since_best']} evaluations (patience)")
        best = f"best validation loss {progress['best_loss']:.4f} at iter {progress['best_iter']}"
        print(f"done: {i:,} updates, {best}, {duration(time.perf_counter() - began)}. Next:")
        print(f"  python infer.py --model_path {shlex.quote(str(folder))} --prompt 'The '")
        print(f"  python eval.py --model_path {shlex.quote(str(folder))}")
        print("  python prepare_data.py text --input YOUR_FILES --name mine")
    else:
        why = f": max_minutes = {config.max_minutes} are over" if asked == StopRequest.TIME_IS_UP else ""
        kept = ", and saved; to go on:" if saved == i else ", before there was anything to save; to start again:"
        print(f"stopped at iter {i} of {config.max_iters}{why}{kept}")
        command = f"{ranks.launcher} train.py --config {shlex.quote(str(folder / 'config.toml'))}"
        print(f"  {command}{' --resume' * (saved == i)}")
        if asked != StopRequest.TIME_IS_UP:
            raise SystemExit(128 + asked)


def draw(log: RunLog, folder: Path) -> None:
    """The run so far as metrics.png: a picture that fails ends no run."""
    log.bar.close()  # matplotlib may have to say something
    try:
        log.write_picture(render(plot_runs([history.read(folder)]), "png"))
        log.print(f"picture  {folder / PICTURE}")
    except Exception as why:  # a full disk, a font, a broken installation
        print(f"warning: {folder / PICTURE} was not drawn: {why}", file=sys.stderr)


def log_row(run: TrainingRun, i: int, loss: Tensor, norm: Tensor, clock: StepClock) -> dict:
    """The row of the update that was just made, the i-th. Waits for the device: the one sync of a logged update."""
    loss, norm = loss.item(), norm.item()
    tokens = run.batches.per_update * run.config.context_length
    step_ms = clock.ms_per_update()
    tok_per_s = 1e3 * tokens / step_ms if step_ms else None
    peak = peak_flops(run.device_settings.name)
    row = {
        "iter": i,
        "tokens": i * tokens,
        "epoch": i * run.batches.per_update / len(run.batches.windows),
        "train_loss": loss,
        "lr": learning_rate(i - 1, run.config),
        "grad_norm": norm,
        "step_ms": step_ms,
        "tok_per_s": tok_per_s,
        "mfu": tok_per_s * run.model.flops_per_token() / (peak * run.ranks.world) if peak and tok_per_s else None,
        "peak_mem_gb": run.device_settings.peak_memory_gb(),
    }
    if run.scaler.is_enabled():
        row["loss_scale"] = run.scaler.get_scale()
    return row


if __name__ == "__main__":
    run_script(train, CONFIG, every_rank=True)
