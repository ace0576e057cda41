"""Log a run: metrics.csv, samples.txt, lines on the terminal, a progress bar, and optionally Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from flatgpt.runtime.files import atomic_write, write_output

if TYPE_CHECKING:
    from torch import Tensor

KEYS = (
    "iter",  # updates done
    "tokens",  # trained on so far
    "epoch",  # passes over the training split so far, a fraction
    "train_loss",  # nats per token, of this update
    "val_loss",  # nats per token, if this iteration was evaluated
    "lr",  # of this update
    "grad_norm",  # before clipping
    "loss_scale",  # float16 only
    "skipped",  # updates skipped so far
    "step_ms",  # milliseconds per update since the row before, without evaluations and saves
    "tok_per_s",
    "mfu",  # share of the device's peak, if that is known
    "peak_mem_gb",  # 10^9 bytes
)

ROWS, SAMPLES, PICTURE = "metrics.csv", "samples.txt", "metrics.png"
# patterns of one entry, whose first group is the iteration
ROW, SAMPLE = rb"^(\d+),.*\n", rb"^=== iter (\d+) .*\n(?:(?!===).*\n)*"

# Dense half-precision peak in TFLOP/s from NVIDIA's data sheets, by a part of torch.cuda.get_device_name(). The first
# entry that fits is used.
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
    """Return the peak FLOP/s of a device, None if it is not in the table."""
    if "Laptop" in device_name or "MIG" in device_name:  # a slower chip of the same name; a part of a GPU
        return None
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


class StepClock:
    """Measures the time of updates between two rows of the log.

    Evaluations, saves and the first update, which may compile, are not included. It is read only where the host has
    waited for the device anyway.
    """

    def __init__(self):
        self.began, self.updates, self.warm = 0.0, 0, False

    def start(self) -> None:
        """Start measuring. The device must be idle."""
        self.began, self.updates = time.perf_counter(), 0

    def count(self, loss: Tensor) -> None:
        """Count an update that was launched. The first one is waited for and not counted."""
        if self.warm:
            self.updates += 1
        else:
            loss.item()
            self.warm = True
            self.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that passes inside."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def ms_per_update(self) -> float | None:
        """Return milliseconds per update since `start`; None before the first counted update."""
        return 1e3 * (time.perf_counter() - self.began) / self.updates if self.updates else None


class AppendFile:
    """A text file that entries are appended to. What cannot be written is kept, and written with a later entry.

    Args:
        entries: their name in messages.
    """

    def __init__(self, path: Path, entries: str):
        self.path, self.entries, self._waiting, self._warned = path, entries, b"", False
        self._file = None  # opened for the first entry

    def append(self, entry: str) -> None:
        """Write what waits, and this entry."""
        self._waiting += entry.encode()
        try:
            self._file = self._file or open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                text = f"warning: {self.path}: {error.strerror}; {self.entries} wait until there is room"
                tqdm.write(text, file=sys.stderr)  # above the bar
            self._warned = True

    def close(self) -> None:
        """Close the file, with a warning if entries are lost."""
        if self._waiting:
            print(f"warning: {self.path}: the last {self.entries} found no room", file=sys.stderr)
        if self._file:
            self._file.close()


class RunLog:
    """Writes the rows and samples of one run.

    Args:
        run_dir: folder of metrics.csv and samples.txt; None on ranks that write no files.
        start_iter: 0, or the iteration that the run resumes from. Later rows move to metrics.lost.csv, and the row of
            this iteration is removed, as it is written again; the same holds for samples.
        max_iters: the end of the progress bar.
        wandb_run: result of `start_wandb`.
    """

    def __init__(self, run_dir: Path | None, start_iter: int, max_iters: int, wandb_run=None):
        self.folder, self.max_iters, self.wandb_run, self._warned = run_dir, max_iters, wandb_run, False
        rows, samples = (run_dir / name if run_dir else Path(os.devnull) for name in (ROWS, SAMPLES))
        if run_dir:
            _rewind(rows, start_iter, ROW, (",".join(KEYS) + "\n").encode())
            _rewind(samples, start_iter, SAMPLE)
        self._rows, self._samples = AppendFile(rows, "rows"), AppendFile(samples, "samples")
        self._began: tuple[float, int] | None = None  # time and iteration from which the time left is estimated
        # disable=None: no bar if stderr is no terminal
        self.bar = tqdm(
            total=max_iters, initial=start_iter, unit="iter", disable=None if run_dir else True, dynamic_ncols=True
        )

    def print(self, text: str) -> None:
        """Print lines on standard output, above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def write(self, row: dict) -> None:
        """Log one row of KEYS. Missing keys and None are empty cells."""
        row = {key: row.get(key) for key in KEYS}
        cells = ("" if v is None else f"{v:.9g}" if isinstance(v, float) else str(v) for v in row.values())
        self._rows.append(",".join(cells) + "\n")
        i, now, seconds_left = row["iter"], time.perf_counter(), None
        if row["step_ms"]:
            self._began = self._began or (now - row["step_ms"] / 1e3, i - 1)
            seconds_left = (now - self._began[0]) / (i - self._began[1]) * max(0, self.max_iters - i)
        text = format_row(row, len(str(self.max_iters)), seconds_left)
        if row["val_loss"] is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # no-color.org
            text = f"\033[1m{text}\033[0m"  # bold
        self.print(text)
        self._call_wandb(lambda wandb, run: run.log({key: value for key, value in row.items() if value is not None}))

    def write_samples(self, row: dict, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Print the samples of an evaluation and append them to samples.txt.

        Args:
            row: of the evaluation.
            texts: each begins with its prompt.
        """
        i, table = row["iter"], [[row["iter"], *pair] for pair in zip(prompts, texts, strict=True)]
        self.print("\n---\n".join([f"--- sample after {i} updates\n{texts[0]}", *texts[1:]]) + "\n---")
        for _, prompt, text in table:
            title = f"=== iter {i} | val {row['val_loss']:.4f} | prompt {json.dumps(prompt, ensure_ascii=False)}"
            # so that no line of the text looks like a title
            self._samples.append(f"{title}\n{re.sub('^===', ' ===', text, flags=re.M)}\n\n")
        columns = ["iter", "prompt", "text"]
        self._call_wandb(lambda wandb, run: run.log({"iter": i, "samples": wandb.Table(columns, table)}))

    def write_picture(self, png: bytes) -> None:
        """Write metrics.png, whole or not at all."""
        path = str(self.folder / PICTURE)
        write_output(png, path, "picture")
        self._call_wandb(lambda wandb, run: run.log({"metrics": wandb.Image(path)}))

    def _call_wandb(self, call: Callable) -> None:
        """Run call(wandb, run) if there is a wandb run. A failure there (a full disk, no service) is a warning."""
        if self.wandb_run is None:
            return
        import wandb

        try:
            call(wandb, self.wandb_run)
        except Exception as error:
            if not self._warned:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                tqdm.write(f"warning: wandb: {reason}; what it misses is in {self.folder}", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        """Close the bar, the files and the wandb run."""
        self.bar.close()
        self._rows.close()
        self._samples.close()
        self._call_wandb(lambda wandb, run: run.finish())


def format_row(row: dict, width: int = 6, seconds_left: float | None = None) -> str:
    """Format one row for the terminal. Missing values leave their columns empty.

    Args:
        width: characters of the iteration.
    """
    columns = (
        ("train_loss", "loss {:7.4f}"),
        ("val_loss", "val {:7.4f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "norm {:5.2f}"),
        ("step_ms", "{:8,.1f} ms"),
        ("tok_per_s", "{:7,.0f} tok/s"),
    )
    texts = [f"iter {row['iter']:>{width}}"]
    for key, form in columns:
        value = row.get(key)
        texts.append(" " * len(form.format(0)) if value is None else form.format(value))
    texts += [f"mfu {row['mfu']:5.1%}"] if row.get("mfu") is not None else []
    texts += [f"eta {duration(seconds_left)}"] if seconds_left is not None else []
    return " | ".join(texts).rstrip(" |")


def _rewind(path: Path, start_iter: int, entry: bytes, header: bytes = b"") -> None:
    """Keep a file's entries before start_iter and move later ones to a second file, metrics.lost.csv for metrics.csv.

    Args:
        entry: pattern of an entry; its first group is the iteration.
        header: first line of both files.
    """
    content = path.read_bytes() if path.exists() else b""
    # in bytes: a killed process can leave half an entry, a power cut anything
    entries = [(int(found[1]), found[0]) for found in re.finditer(entry, content, re.M)]
    if lost := b"".join(text for i, text in entries if i > start_iter):
        lost_path = path.with_name(f"{path.stem}.lost{path.suffix}")
        with open(lost_path, "ab") as file:
            file.write(lost if file.tell() else header + lost)
    if content or header:
        atomic_write(path, header + b"".join(text for i, text in entries if i < start_iter))


def start_wandb(mode: str, project: str, run_dir: Path, config: dict, run_id: str | None = None):
    """Start a wandb run; None for mode `disabled` or if wandb fails. Asks no question.

    `online` without a key or without a network becomes `offline`, with a warning: `wandb sync` uploads it later.

    Args:
        run_id: of the run that is resumed, so that its curves continue.
    """
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        print("warning: wandb is not installed (pip install wandb); continuing without it", file=sys.stderr)
        return None

    settings = {"project": project, "name": run_dir.name, "id": run_id, "resume": "allow", "config": config}
    settings |= {"dir": str(run_dir), "settings": wandb.Settings(init_timeout=30, silent=True)}
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            if attempt == "online" and not wandb.login(prompt=False, verify=False):
                raise wandb.errors.UsageError("no API key (wandb login, or WANDB_API_KEY)")
            run = wandb.init(mode=attempt, **settings)
            run.define_metric("*", step_metric="iter")  # not step=: wandb drops rows of a lower step after a resume
            return run
        except Exception as error:  # UsageError, CommError, and errors of its service without a common class
            instead = "logging offline, wandb sync uploads it" if attempt == "online" else "going on without it"
            print(f"warning: wandb {attempt}: {str(error).splitlines()[0]}; {instead}", file=sys.stderr)
            wandb.teardown()  # otherwise its service keeps the run's id
    return None


def duration(seconds: float) -> str:
    """Format a duration: 1h05m, 1m15s, 5s."""
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
