"""One run's log: metrics.csv always, a progress bar, wandb when asked; throughput and MFU."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

KEYS = (
    "iter",  # updates done
    "tokens",  # trained on so far
    "epoch",  # passes over the training split so far, a fraction
    "train_loss",  # nats per token, of this one update
    "val_loss",  # nats per token, where this iteration was evaluated
    "lr",  # of this update
    "grad_norm",  # before clipping
    "loss_scale",  # float16 only
    "skipped",  # updates that float16's scaler has skipped so far
    "step_ms",  # milliseconds per update since the row before, evaluations left out
    "tok_per_s",
    "mfu",  # share of the device's peak, where that is known
    "peak_mem_gb",  # 10^9 bytes
)

# Dense half-precision peak in TFLOP/s, by the words in torch.cuda.get_device_name(), from NVIDIA's data sheets; the
# first entry that fits counts.
PEAK_TFLOPS = {
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "A10G": 70,
    "L40S": 362,
    "L4": 121,
    "T4": 65,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that the data sheet promises for a device, None for one that is not in the table."""
    if "Laptop" in device_name or "MIG" in device_name:  # another chip under the same number; a part of one
        return None
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


class StepClock:
    """Times the updates between two rows of the log; evaluations, saves and the first update (it compiles) are not
    in it. Read only where the host has waited for the device anyway."""

    def __init__(self):
        self.began, self.updates, self.warm = 0.0, 0, False

    def start(self) -> None:
        """From here on only updates happen; the device is idle."""
        self.began, self.updates = time.perf_counter(), 0

    def count(self, loss: Tensor) -> None:
        """One update was launched. The first one is waited for and not counted: it may compile."""
        if self.warm:
            self.updates += 1
        else:
            loss.item()
            self.warm = True
            self.start()

    def ms_per_update(self) -> float | None:
        """Milliseconds per update since `start`; None before the first counted update."""
        if not self.updates:
            return None
        return 1e3 * (time.perf_counter() - self.began) / self.updates


class RunLog:
    """Writes rows of KEYS for one run.

    Args:
        run_dir: metrics.csv lies here; None on ranks that keep no log.
        start_iter: 0, or the iteration that a resumed run goes on from: later rows move to metrics.lost.csv, and the
            row of that iteration makes way for the one that is written again.
        max_iters: the end of the bar.
        wandb_run: what `start_wandb` gave, or None.
    """

    def __init__(self, run_dir: Path | None, start_iter: int, max_iters: int, wandb_run=None):
        self.path = run_dir / "metrics.csv" if run_dir else Path(os.devnull)
        self.wandb_run = wandb_run
        if run_dir:
            _rewind(self.path, start_iter)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._unwritten, self._told = b"", False
        if self._file.tell() == 0:
            self._append(KEYS)
        # disable=None: no bar where stderr is no terminal; there every row is a line instead
        self.bar = tqdm(
            total=max_iters, initial=start_iter, unit="iter", disable=None if run_dir else True, dynamic_ncols=True
        )

    def say(self, text: str) -> None:
        """Print lines on standard output, above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def write(self, row: dict) -> None:
        """Log one row; missing keys and None stay empty."""
        row = {key: row.get(key) for key in KEYS}
        self._append([f"{v:.9g}" if isinstance(v, float) else v for v in row.values()])
        if row["val_loss"] is not None or self.bar.disable:
            self.say(line(row))
        if row["train_loss"] is not None:
            self.bar.set_postfix_str(f"loss {row['train_loss']:.3f}", refresh=False)
        if self.wandb_run is not None:
            self.wandb_run.log({key: value for key, value in row.items() if value is not None})

    def _append(self, values: Sequence) -> None:
        """One line more in the file. Where the disk is full it waits, as part of a line does, for the next one."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        self._unwritten += text.getvalue().encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as why:
            if not self._told:
                print(f"warning: {self.path}: {why.strerror}; rows wait until there is room", file=sys.stderr)
            self._told = True

    def close(self) -> None:
        """End the bar, the file and the wandb run."""
        self.bar.close()
        if self._unwritten:
            print(f"warning: {self.path}: its last {self._unwritten.count(10)} rows found no room", file=sys.stderr)
        self._file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def line(row: dict) -> str:
    """One row for a person."""
    parts = (
        ("train_loss", "loss {:.4f}"),
        ("val_loss", "val {:.4f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "norm {:.2f}"),
        ("step_ms", "{:,.1f} ms"),
        ("tok_per_s", "{:,.0f} tok/s"),
        ("mfu", "mfu {:.1%}"),
    )
    shown = [form.format(row[key]) for key, form in parts if row.get(key) is not None]
    return " | ".join([f"iter {row['iter']:>6}", *shown])


def _rewind(path: Path, start_iter: int) -> None:
    """Keep the rows before start_iter; those after it move to metrics.lost.csv beside it."""
    if not path.exists():
        return
    # a killed process can leave half a line, a power cut anything
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    header, *lines = whole.split("\n")
    iters = [int(first) if (first := line.partition(",")[0]).isdigit() else math.inf for line in lines]
    lost = [line for line, i in zip(lines, iters, strict=True) if i > start_iter]
    if lost:
        lost_path = path.with_name("metrics.lost.csv")
        known = lost_path.exists()
        with open(lost_path, "a", encoding="utf-8") as file:
            file.write("\n".join([*([] if known else [header]), *lost]) + "\n")
    kept = [line for line, i in zip(lines, iters, strict=True) if i < start_iter]
    partial = path.with_suffix(".tmp")
    partial.write_text("\n".join([",".join(KEYS), *kept]) + "\n", encoding="utf-8")
    os.replace(partial, path)


def start_wandb(mode: str, project: str, run_dir: Path, config: dict, run_id: str | None = None):
    """A wandb run, or None for mode `disabled`. Never asks a question, never ends the training.

    `online` without a key or without a network becomes `offline`, with a notice: `wandb sync` uploads it later.

    Args:
        run_id: of the run that is resumed, so that its curves go on.
    """
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        print("warning: wandb is not installed (pip install wandb): going on without it", file=sys.stderr)
        return None
    settings = wandb.Settings(init_timeout=30, silent=True)
    common = {"project": project, "name": run_dir.name, "id": run_id, "resume": "allow", "config": config}
    common |= {"dir": str(run_dir), "settings": settings}
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            if attempt == "online" and not wandb.login(prompt=False, verify=False):
                raise wandb.errors.UsageError("no API key (wandb login, or WANDB_API_KEY)")
            run = wandb.init(mode=attempt, **common)
            break
        except Exception as error:  # UsageError, CommError, and errors of its service that have no class in common
            instead = "logging offline, wandb sync uploads it" if attempt == "online" else "going on without it"
            print(f"warning: wandb {attempt}: {str(error).splitlines()[0]}; {instead}", file=sys.stderr)
            wandb.teardown()  # else its service holds on to the run's id
    else:
        return None
    run.define_metric("*", step_metric="iter")  # not step=: wandb drops rows that come at a lower step after a resume
    return run


def summary(values: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of at least two values."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]


def duration(seconds: float) -> str:
    """75 -> 1m15s, for people."""
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
