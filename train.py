"""Train a GPT-2 style model: shards -> checkpoints and a log in out/<recipe>/.

python train.py                                   # the Python reference, in bytes: minutes on two CPU cores
python train.py --config shakespeare              # a recipe from configs/
python train.py --config mine.toml --lr 1e-3      # your own, with a change
python train.py --config shakespeare --resume     # go on where a run was stopped
python train.py --help                            # every key
"""

from cli import from_command_line, recipe_text, run_verb
from config import PrepareConfig, TrainConfig, run_dir

if __name__ == "__main__":
    CONFIG = from_command_line(TrainConfig, __doc__)

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import checkpoint
import tokenizer
from config import UserError
from dataset import Dataset, TrainingBatches, Windows, eval_batches, open_dataset
from metrics import require_finite, score
from model import GPT
from optim import learning_rate, make_optimizer
from preparation import prepare
from runlog import RunLog, StepClock, duration, peak_flops, start_wandb
from runtime import Machine, Stop, compile_forward, machine, reseed
from sampling import generate, stream_text
from shards import write_whole


@dataclass
class Run:
    """All that an update needs."""

    config: TrainConfig  # resolved: sizes, lengths, dtype and compile are settled
    machine: Machine
    dataset: Dataset
    encoding: tiktoken.Encoding | None  # for samples; training needs ids alone
    batches: TrainingBatches
    model: GPT  # the raw module: saved, evaluated and sampled
    forward: Callable[..., Tensor]  # the same, compiled where that pays: inputs, targets -> loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def update(run: Run, i: int) -> tuple[Tensor, Tensor]:
    """One optimizer update, number i (from 0). Returns its loss and gradient norm, on the device: no waiting here."""
    config = run.config
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(i, config)
    loss = torch.zeros((), device=run.machine.device)
    for micro in range(config.grad_accum_steps):
        x, y = (run.machine.to_device(array) for array in run.batches(i, micro))  # (B, T) each
        reseed(config.seed, i, micro)
        with run.machine.autocast():
            micro_loss = run.forward(x, y) / config.grad_accum_steps
        run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    run.scaler.unscale_(run.optimizer)
    norm = clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def setup(config: TrainConfig, chosen: dict | None = None) -> Run:
    """Machine, data, model and optimizer of a config, at update 0; bench.py times what comes from here.

    Args:
        chosen: what `auto` had chosen when the run that is resumed began; reused.
    """
    chosen = chosen or {}
    folder = Path(config.data_dir) / config.dataset
    if config.dataset == "pydoc" and not (folder / "meta.json").exists():
        print(f"{folder} is not there yet: preparing the reference that ships inside Python")
        prepare(PrepareConfig(source="pydoc", data_dir=config.data_dir))
    dataset = open_dataset(folder)
    meta = dataset.meta
    vocab_size = config.vocab_size or meta["vocab_size"]
    if vocab_size < meta["vocab_size"]:
        raise UserError(
            f"vocab_size = {vocab_size:,}: {folder} is tokenised with {meta['tokenizer']}, which has "
            f"{meta['vocab_size']:,} ids; leave vocab_size out, or take at least that"
        )
    encoding = None
    if config.sample_tokens:
        try:
            encoding = tokenizer.load(meta["tokenizer"])
        except UserError as why:  # training needs ids alone, and a night's run should not end for a sample
            print(f"warning: no samples will be written: {why}", file=sys.stderr)
    windows = Windows(dataset.tokens("train"), config.context_length, config.stride)
    for split, tokens in (("train", windows.tokens), ("val", dataset.tokens("val"))):
        if len(tokens) <= config.context_length:
            raise UserError(
                f"too little text: the {split} split of {folder} has {len(tokens):,} tokens, one window takes "
                f"context_length + 1 = {config.context_length + 1:,}; give more text, or a smaller --context_length"
            )
    per_update = config.batch_size * config.grad_accum_steps
    max_iters = config.max_iters or math.ceil(config.epochs * len(windows) / per_update)
    dtype = chosen.get("dtype", config.dtype) if config.dtype == "auto" else config.dtype
    compiled = chosen.get("compile") if config.compile is None else config.compile
    place = machine(config.device, dtype, compiled, max_iters * per_update * config.context_length * vocab_size)
    config = dataclasses.replace(
        config,
        vocab_size=vocab_size,
        max_iters=max_iters,
        lr_decay_iters=config.lr_decay_iters or max_iters,
        save_interval=config.save_interval or config.eval_interval,
        stride=windows.stride,
        dtype=str(place.dtype).removeprefix("torch."),
        compile=place.compile,
        out_dir=str(run_dir(config)),
    )
    if config.warmup_iters >= max_iters:
        print(f"note: the warm-up of {config.warmup_iters} updates is longer than the run of {max_iters}")
    if place.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in training; eval.py leaves it off
    torch.manual_seed(config.seed)
    model = GPT(config.model()).to(place.device)  # drawn on the CPU: the same weights on every device
    return Run(
        config=config,
        machine=place,
        dataset=dataset,
        encoding=encoding,
        batches=TrainingBatches(windows, config.batch_size, config.grad_accum_steps, config.seed),
        model=model,
        forward=compile_forward(model) if place.compile else model,
        optimizer=make_optimizer(model, config),
        scaler=place.scaler(),
    )


def describe(run: Run) -> str:
    """The arithmetic of a run, before its first update."""
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
            f"machine  {run.machine.describe()}",
            f"folder   {config.out_dir}",
        )
    )


def evaluate(run: Run) -> float:
    """Validation loss, nats per token, over the first eval_batches batches of the split (0: all of it)."""
    config = run.config
    batches = eval_batches(run.dataset.tokens("val"), config.context_length, config.batch_size, config.eval_batches)
    no_bytes = np.zeros(config.vocab_size, dtype=np.int64)  # bits per byte are eval.py's
    with run.machine.autocast():
        return score(run.model, batches, run.machine.to_device, no_bytes).loss


def sample(run: Run, seed: int) -> str:
    """A text by the model as it is now, the prompt included."""
    config = run.config
    with run.machine.autocast():
        ids = generate(
            run.model,
            run.encoding.encode_ordinary(config.sample_prompt) or [run.encoding.eot_token],
            config.sample_tokens,
            temperature=0.8,
            seed=seed,
            n_vocab=run.encoding.n_vocab,
            stop_ids=(run.encoding.eot_token,),
        )
        text = config.sample_prompt + "".join(stream_text(ids, run.encoding))
    # a young model draws control characters, which could change the terminal's state
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# resuming and saving


def restore(run: Run, folder: Path, state: dict) -> dict:
    """Load weights, optimizer and scaler of a verified checkpoint into a run; returns the rest of its train state."""
    changed = checkpoint.check_same_run(folder, state, run.config, run.dataset.manifest_hash)
    print(f"resuming from {folder}" + (f", with {'; '.join(changed)}" if changed else ""))
    checkpoint.load_weights(run.model, folder)
    train_state = checkpoint.load_train_state(folder)
    settings = [{k: group[k] for k in ("weight_decay", "betas", "eps")} for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(train_state["optimizer"])
    for group, now in zip(run.optimizer.param_groups, settings, strict=True):
        group.update(now)  # load_state_dict brings back the old ones, whatever this call asks for
    if train_state["scaler"]:  # empty where the run has not been float16 so far
        run.scaler.load_state_dict(train_state["scaler"])
    return train_state


def run_facts(run: Run) -> dict:
    """What every state.json of a run says alike."""
    meta, place = run.dataset.meta, run.machine
    return {
        "config": dataclasses.asdict(run.config),
        "chosen": {"dtype": run.config.dtype, "compile": run.config.compile, "why": place.why},
        "tokenizer": {"name": meta["tokenizer"], **{k: meta[k] for k in ("vocab_size", "ranks_sha256", "eot_id")}},
        "data": {
            "folder": str(run.dataset.folder),
            "manifest_sha256": run.dataset.manifest_hash,
            "end_of_text": meta["end_of_text"],
            "tokens": {split: entry["tokens"] for split, entry in meta["splits"].items()},
        },
        **checkpoint.provenance(place.name),
    }


def save(run: Run, row: dict, progress: dict, facts: dict) -> None:
    """Write the checkpoint of iteration row["iter"]; the row goes with it, to be logged again after a resume."""
    state = {key: row[key] for key in ("iter", "tokens", "epoch")} | progress | facts
    train_state = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "row": row, **progress}
    checkpoint.save(Path(run.config.out_dir), state, run.model, train_state, run.config.keep_checkpoints)


# ---------------------------------------------------------------------------------------------------------------------


def train(config: TrainConfig) -> None:
    """Train as the config says, from the beginning or from a checkpoint, to max_iters or until a signal."""
    start = checkpoint.find_start(run_dir(config), config.resume, config.overwrite)
    if start and config.lr_decay_iters is None and config.epochs is None:
        # the schedule that the run was started with stays, also when max_iters is raised
        config = dataclasses.replace(config, lr_decay_iters=start[1]["config"]["lr_decay_iters"])
    run = setup(config, chosen=start[1]["chosen"] if start else None)
    config = run.config
    print(describe(run))
    row = {"iter": 0, "tokens": 0, "epoch": 0.0}
    progress = {"val_loss": None, "best_loss": None, "best_iter": None}
    folder, saved, evaluated, wandb_id = Path(config.out_dir), None, None, None
    if start:
        train_state = restore(run, *start)
        row = train_state["row"]
        if start[0].resolve().parent == (folder / "ckpt").resolve():  # not another run's: that one's best is not ours
            progress = {key: train_state[key] for key in progress}
            saved, wandb_id, before = row["iter"], start[1]["wandb_id"], start[1]["config"]
            if saved % before["eval_interval"] == 0 or saved >= before["max_iters"]:
                evaluated = saved  # after it was saved: done again, for the log and for `best`
    if config.overwrite:
        checkpoint.move_away(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.set_aside(folder, after=row["iter"])
    if progress["best_iter"] and not checkpoint.point(folder, "best", progress["best_iter"]):
        progress["best_loss"] = progress["best_iter"] = None
    write_whole(folder / "config.toml", recipe_text(config).encode())
    wandb_run = start_wandb(config.wandb, config.wandb_project, folder, dataclasses.asdict(config), wandb_id)
    facts = run_facts(run) | {"wandb_id": wandb_run.id if wandb_run else wandb_id}
    log = RunLog(folder, row["iter"], config.max_iters, wandb_run)
    i, began, clock, stop, stopping = row["iter"], time.perf_counter(), StepClock(), Stop(), False
    try:
        while True:
            done = i >= config.max_iters
            last = done or stopping
            evaluating = i % config.eval_interval == 0 or done or i == evaluated
            if i > 0 and saved != i and (evaluating or last or i % config.save_interval == 0):
                save(run, row, progress, facts)  # before evaluation and samples get a chance to fail
                saved = i
            if evaluating and (done or not stopping):  # whoever stops it is in a hurry: resuming evaluates
                row["val_loss"] = progress["val_loss"] = evaluate(run)
                require_finite(run.model, "validation loss", row["val_loss"], i)
                if saved == i and (progress["best_loss"] is None or row["val_loss"] < progress["best_loss"]):
                    progress["best_loss"], progress["best_iter"] = row["val_loss"], i
                    checkpoint.point(folder, "best", i)
            if row["iter"] == i:
                log.write(row)
                if "val_loss" in row and run.encoding:
                    log.say(f"--- sample after {i} updates\n{sample(run, seed=config.seed + i)}\n---")
                clock.start()
            if last:
                break
            loss, norm = update(run, i)
            i += 1
            log.bar.update()
            clock.count(loss)
            stopping = stop.signal is not None  # looked at once an update, so that row and checkpoint agree
            due = (config.log_interval, config.eval_interval, config.save_interval, config.max_iters)
            if stopping or any(i % interval == 0 for interval in due):
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
    if done:
        best = f"best validation loss {progress['best_loss']:.4f} at iter {progress['best_iter']}"
        print(f"done: {i:,} updates, {best}, {duration(time.perf_counter() - began)}. Next:")
        print(f"  python infer.py --model_path {folder} --prompt 'The '")
        print(f"  python eval.py --model_path {folder}")
        print("  python prepare_data.py text --input YOUR_FILES --name mine")
    else:
        print(f"stopped at iter {i} of {config.max_iters}, and saved; to go on:")
        print(f"  python train.py --config {shlex.quote(str(folder / 'config.toml'))} --resume")
        raise SystemExit(128 + stop.signal)


def log_row(run: Run, i: int, loss: Tensor, norm: Tensor, clock: StepClock) -> dict:
    """The row of the update that was just made, the i-th. Waits for the device: the one sync of a logged update."""
    loss, norm = loss.item(), norm.item()
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
        "mfu": tok_per_s * run.model.flops_per_token() / peak if peak and tok_per_s else None,
        "peak_mem_gb": run.machine.peak_memory_gb(),
    }
    if run.scaler.is_enabled():
        # AdamW does not count a step that the scaler skips, so what it lacks was skipped
        steps = next(iter(run.optimizer.state.values()))["step"]
        row |= {"loss_scale": run.scaler.get_scale(), "skipped": i - int(steps)}
    return row


if __name__ == "__main__":
    run_verb(train, CONFIG)
