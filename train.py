"""Train a GPT-2 style model: shards -> checkpoints and a log in out/<recipe>/.

python train.py                                   # the Python reference, in bytes: minutes on two CPU cores
python train.py --config shakespeare              # a recipe from configs/
python train.py --config mine.toml --lr 1e-3      # your own, with a change
python train.py --config shakespeare --resume     # go on where a run was stopped
python train.py --config gpt2_124m --plan         # how large, how long, on which GPU; trains nothing
torchrun --standalone --nproc_per_node=2 train.py --config shakespeare --batch_size 8 --grad_accum_steps 2   # 2 devices
python train.py --help                            # every key
"""

from cli import from_command_line, recipe_text, run_verb
from config import TrainConfig, run_dir

if __name__ == "__main__":
    CONFIG = from_command_line(TrainConfig, __doc__)

import dataclasses
import math
import os
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import checkpoint
import resume
from config import SaidElsewhere, UserError
from dataset import eval_batches
from metrics import require_finite, score
from optim import learning_rate
from ranks import Ranks, full_tensor, gradients, join, whole
from run import Run, describe, print_plan, setup
from runlog import RunLog, StepClock, duration, peak_flops, start_wandb
from runtime import Stop, find_device, reseed, uncompiled
from sampling import generate, stream_text


def update(run: Run, i: int) -> tuple[Tensor, Tensor]:
    """One optimizer update, number i (from 0), on the device: no waiting here.

    Returns:
        this rank's share of the loss, to be summed over ranks; the gradient's norm.
    """
    config, mine = run.config, run.ranks.micro_batches(run.config.grad_accum_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(i, config)
    loss = torch.zeros((), device=run.machine.device)
    for micro in mine:
        x, y = (run.machine.to_device(array) for array in run.batches(i, micro))  # (B, T) each
        reseed(config.seed, i, micro)
        with gradients(run.spread, last=micro == mine[-1]):
            with run.machine.autocast():
                micro_loss = run.forward(x, y) / config.grad_accum_steps
            run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    run.scaler.unscale_(run.optimizer)
    norm = full_tensor(clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def evaluate(run: Run) -> float:
    """Validation loss, nats per token, over the first eval_batches batches of the split (0: all of it)."""
    config, ranks = run.config, run.ranks
    tokens, share = run.dataset.tokens("val"), (ranks.rank, ranks.world)
    batches = eval_batches(tokens, config.context_length, config.batch_size, config.eval_batches, share)
    no_bytes = np.zeros(config.vocab_size, dtype=np.int64)  # bits per byte are eval.py's
    with run.machine.autocast():
        return score(run.model, batches, run.machine.to_device, no_bytes, ranks.sum).loss


def sample(run: Run, seed: int) -> str:
    """A text by the model as it is now, the prompt included."""
    config, end = run.config, run.encoding.eot_token
    prompt = run.encoding.encode_ordinary(config.sample_prompt) or [end]

    def draw() -> list[int]:  # always as many: ranks that hold parts of the model compute together
        ids = generate(
            run.model, prompt, config.sample_tokens, temperature=0.8, seed=seed, n_vocab=run.encoding.n_vocab
        )
        with run.machine.autocast(), uncompiled(run.model):
            return list(ids)

    ids = draw() if run.model is run.spread else run.ranks.from_first(draw)
    ids = ids[: ids.index(end)] if end in ids else ids
    text = config.sample_prompt + "".join(stream_text(iter(ids), run.encoding))
    # a young model draws control characters, which could change the terminal's state
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# saving and running


def save(run: Run, row: dict, progress: dict, facts: dict) -> None:
    """Write the checkpoint of iteration row["iter"]; the row goes with it, to be logged again after a resume."""
    config, first = run.config, run.ranks.first
    weights, optimizer = (whole(part.state_dict(), keep=first) for part in (run.model, run.optimizer))
    state = {key: row[key] for key in ("iter", "tokens", "epoch")} | progress | facts
    state["finished"] = row["iter"] >= config.max_iters
    train_state = {"optimizer": optimizer, "scaler": run.scaler.state_dict(), "row": row, **progress}
    run.ranks.from_first(
        lambda: checkpoint.save(Path(config.out_dir), state, weights, train_state, config.keep_checkpoints)
    )


# ---------------------------------------------------------------------------------------------------------------------


def train(config: TrainConfig) -> None:
    """Train as the config says, from the beginning or from a checkpoint, until its end or until it is stopped."""
    if config.plan:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SaidElsewhere  # the first says that it takes no torchrun
        print_plan(config)
        return
    with join(config, find_device) as ranks:
        train_on(ranks, config)


def train_on(ranks: Ranks, config: TrainConfig) -> None:
    """What each rank does."""
    start = ranks.from_first(lambda: resume.find_start(run_dir(config), config.resume, config.overwrite))
    if start and config.lr_decay_iters is None and config.epochs is None:
        # the schedule that the run was started with stays, also when max_iters is raised
        config = dataclasses.replace(config, lr_decay_iters=start[1]["config"]["lr_decay_iters"])
    run = setup(config, ranks, chosen=start[1]["chosen"] if start else None)
    config = run.config
    print(describe(run))
    row = {"iter": 0, "tokens": 0, "epoch": 0.0}
    progress = {"val_loss": None, "best_loss": None, "best_iter": None, "since_best": 0}
    folder, saved, evaluated, wandb_id = Path(config.out_dir), None, None, None
    if start:
        changed = resume.check_same_run(*start, config, run.dataset.manifest_hash)
        print(f"resuming from {start[0]}" + (f", with {'; '.join(changed)}" if changed else ""))
        if not ranks.all(start[0].is_dir()):
            raise UserError(f"{start[0]} is not there on every machine: out_dir has to be a folder that they share")
        ranks.require_alike({f"checkpoint {start[0]}": checkpoint.read_state(start[0])})  # its files' hashes too
        train_state = resume.restore(start[0], run.model, run.optimizer, run.scaler)
        row = train_state["row"]
        if start[0].resolve().parent == (folder / "ckpt").resolve():  # not another run's: that one's best is not ours
            progress |= {key: train_state[key] for key in progress if key in train_state}
            saved, wandb_id, before = row["iter"], start[1]["wandb_id"], start[1]["config"]
            if saved % before["eval_interval"] == 0 or saved >= before["max_iters"]:
                evaluated = saved  # after it was saved: done again, for the log and for `best`
    at = row["iter"], progress["best_iter"]
    if not ranks.from_first(lambda: resume.open_folder(config, recipe_text(config), *at)):
        progress["best_loss"] = progress["best_iter"] = None
    wandb_run = None
    if ranks.first:
        wandb_run = start_wandb(config.wandb, config.wandb_project, folder, dataclasses.asdict(config), wandb_id)
    log = RunLog(folder if ranks.first else None, row["iter"], config.max_iters, wandb_run)
    ranks.wait()  # wandb's servers may take their time
    facts = resume.facts(config, run.machine, run.dataset) | {"wandb_id": wandb_run.id if wandb_run else wandb_id}
    i, began, clock, stop = row["iter"], time.perf_counter(), StepClock(), Stop(config.max_minutes, ranks.world > 1)
    asked, over = 0, False  # a stop, from outside; the end of patience
    try:
        while True:
            done = i >= config.max_iters
            evaluating = i % config.eval_interval == 0 or done or i == evaluated
            if i > 0 and saved != i and (evaluating or asked or i % config.save_interval == 0):
                save(run, row, progress, facts)  # before evaluation and samples get a chance to fail
                saved = i
            if evaluating and (done or not asked):  # whoever stops it is in a hurry: resuming evaluates
                row["val_loss"] = progress["val_loss"] = evaluate(run)
                require_finite(run.model, "validation loss", row["val_loss"], i)
                progress["since_best"] += 1
                if saved == i and (progress["best_loss"] is None or row["val_loss"] < progress["best_loss"]):
                    progress |= {"best_loss": row["val_loss"], "best_iter": i, "since_best": 0}
                    ranks.from_first(lambda: checkpoint.point(folder, "best", i))  # noqa: B023 - called at once
                over = config.patience is not None and progress["since_best"] >= config.patience and saved == i
            if row["iter"] == i:
                log.write(row)
                if "val_loss" in row and run.encoding:
                    log.say(f"--- sample after {i} updates\n{sample(run, seed=config.seed + i)}\n---")
                clock.start()
            if done or over or asked:
                break
            loss, norm = update(run, i)
            i += 1
            log.bar.update()
            clock.count(loss)
            asked = ranks.largest(stop.asked())  # once an update, so that row and checkpoint of all ranks agree
            due = (config.log_interval, config.eval_interval, config.save_interval, config.max_iters)
            if asked or any(i % interval == 0 for interval in due):
                row = log_row(run, i, loss, norm, clock)
                require_finite(run.model, "training loss", row["train_loss"], i)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{run.machine.name} has not enough memory for batch_size = {config.batch_size}: halve it and double "
            f"grad_accum_steps = {config.grad_accum_steps} (the same updates, dropout aside), or add "
            "--activation_checkpointing"
        ) from None
    finally:
        log.close()
        stop.restore()
    if done or over:
        if over and not done:
            ranks.from_first(lambda: checkpoint.mark_finished(folder / "ckpt" / "last"))
            print(f"stopped at iter {i}: no new best in {progress['since_best']} evaluations (patience)")
        best = f"best validation loss {progress['best_loss']:.4f} at iter {progress['best_iter']}"
        print(f"done: {i:,} updates, {best}, {duration(time.perf_counter() - began)}. Next:")
        print(f"  python infer.py --model_path {folder} --prompt 'The '")
        print(f"  python eval.py --model_path {folder}")
        print("  python prepare_data.py text --input YOUR_FILES --name mine")
    else:
        why = f": max_minutes = {config.max_minutes} are over" if asked == Stop.TIME_IS_UP else ""
        print(f"stopped at iter {i} of {config.max_iters}{why}, and saved; to go on:")
        print(f"  {ranks.launcher} train.py --config {shlex.quote(str(folder / 'config.toml'))} --resume")
        if asked != Stop.TIME_IS_UP:
            raise SystemExit(128 + asked)


def log_row(run: Run, i: int, loss: Tensor, norm: Tensor, clock: StepClock) -> dict:
    """The row of the update that was just made, the i-th. Waits for the device: the one sync of a logged update."""
    loss, norm = run.ranks.sum(loss).item(), norm.item()
    tokens = run.batches.per_update * run.config.context_length
    step_ms = clock.ms_per_update()
    tok_per_s = 1e3 * tokens / step_ms if step_ms else None
    peak = peak_flops(run.machine.name)
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
        "peak_mem_gb": run.machine.peak_memory_gb(),
    }
    if run.scaler.is_enabled():
        # AdamW does not count a step that the scaler skips, so what it lacks was skipped
        steps = next(iter(run.optimizer.state.values()), {"step": 0})["step"]
        row |= {"loss_scale": run.scaler.get_scale(), "skipped": i - int(steps)}
    return row


if __name__ == "__main__":
    run_verb(train, CONFIG, every_rank=True)
