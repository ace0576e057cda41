"""The result of a run as one JSON object, for `train.py --json`."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import statistics
from pathlib import Path

import flatgpt
from flatgpt.runs import history
from flatgpt.runs.run_log import KEYS
from flatgpt.runtime.stop import StopRequest
from flatgpt.training import reporting
from flatgpt.training.resume import SILENT, run_metadata
from flatgpt.training.setup import TrainingRun

# Settings that determine neither weights nor losses: of files, the log, the machine; the data has a hash of its own.
NOT_HASHED = (*SILENT, "data_dir", "dataset", "device", "verify_data", "rank_timeout", "log_interval", "sample_tokens")
NOT_HASHED += ("sample_prompt", "save_interval", "save_minutes", "keep_checkpoints", "keep_every", "on_save_error")
NOT_HASHED += ("wandb", "wandb_project", "tracker")


def run_result(run: TrainingRun, state: dict, reason: int, start: int, seconds: float) -> dict:
    """Return the result of a run. Values that are not known are None.

    `state` is how it ended: `finished` (at max_iters), `patience`, `max_minutes` or `signal`, which `signal` names.
    `iter`, `tokens`, `epochs`, `flops` and `update_seconds` (the time of the updates, without evaluations and saves)
    count the whole run. This start counts from `start_iter`: `seconds` is its time with evaluations and saves,
    `tok_per_s` its tokens over these seconds, `tok_per_s_steady` the median of its rows of metrics.csv, from which
    `mfu` follows. `peak_mem_gb` is that of rank 0, in 10^9 bytes.

    Losses are in nats per token: `val_loss` is the newest evaluation's, at `val_iter`; `best_loss` the lowest, at
    `best_iter`; `train_loss` the mean over the updates since the row before the last one. Those in bits per byte, which
    can be compared between tokenizers, assume the bytes per token of the whole split.

    `config_sha256` is the hash of `config` as JSON with sorted keys: the settings, resolved, without those of files,
    log and machine (NOT_HASHED). `dataset_sha256` is the hash of the dataset's meta.json, which has those of all
    shards. The other keys are those of state.json.

    Args:
        state: the content of state.json at the end of the run; with `val_iter` if val_loss is of a later evaluation.
        reason: the stop reason: a signal number or StopRequest.TIME_IS_UP; 0 if the run finished.
        start: the iteration at which this start began.
        seconds: time since then.
    """
    state = run_metadata(run, {}, None) | state  # checkpoints of earlier versions lack keys
    config, folder, i = run.config, run.config.out_dir, state["iter"]
    log = history.read(Path(folder))
    known = {key: [(int(n), x) for n, x in zip(log["iter"], log[key], strict=True) if math.isfinite(x)] for key in KEYS}
    last = {key: known[key][-1] if known[key] else (None, None) for key in KEYS}
    flops, tokens = run.model.flops_per_token(), run.batches.per_update * config.context_length
    steady = [value for n, value in known["tok_per_s"] if n > start]
    steady = statistics.median(steady) if steady else None
    ended = {0: "finished" if i >= config.max_iters else "patience", StopRequest.TIME_IS_UP: "max_minutes"}
    settings = {key: value for key, value in vars(config).items() if key not in NOT_HASHED}
    text = json.dumps(settings, sort_keys=True)
    return {
        "run": folder,
        "state": ended.get(reason, "signal"),
        "signal": signal.Signals(reason).name if reason not in ended else None,
        "iter": i,
        "max_iters": config.max_iters,
        "tokens": i * tokens,
        "epochs": state["epoch"],
        "val_loss": state["val_loss"],
        "val_iter": state.get("val_iter", last["val_loss"][0]),
        "best_loss": state["best_loss"],
        "best_iter": state["best_iter"],
        "train_loss": last["mean_loss"][1],
        "val_bits_per_byte": log.bits_per_byte(state["val_loss"]),
        "best_bits_per_byte": log.bits_per_byte(state["best_loss"]),
        "start_iter": start,
        "seconds": seconds,
        "update_seconds": log.update_seconds[-1] if len(log) else None,
        "tok_per_s": (i - start) * tokens / seconds if i > start else None,
        "tok_per_s_steady": steady,
        "mfu": reporting.model_flops_utilization(run, steady),
        "peak_mem_gb": run.device_settings.peak_memory_gb(),
        "parameters": state["parameters"],
        "flops_per_token": flops,
        "flops": i * tokens * flops,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "config": settings,
        "dataset": state["data"]["folder"],
        "dataset_sha256": state["data"]["manifest_sha256"],
        "tokenizer": state["tokenizer"]["name"],
        "dtype": config.dtype,
        "compile": config.compile,
        **{key: state[key] for key in ("device", "cpu", "threads", "ranks", "torch", "python")},
        "flatgpt": flatgpt.__version__,
        **{key: state[key] for key in ("git_commit", "git_dirty", "command")},
    }
