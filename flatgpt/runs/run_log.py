"""One run's log: metrics.csv, samples.txt, lines, a progress bar, wandb when asked; throughput and MFU."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from flatgpt.runtime.files import write_output

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

ROWS, SAMPLES, PICTURE = "metrics.csv", "samples.txt", "metrics.png"
ROW, SAMPLE = rb"^(\d+),.*\n", rb"^=== iter (\d+) .*\n(?:(?!===).*\n)*"

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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that passes inside."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def ms_per_update(self) -> float | None:
        """Milliseconds per update since `start`; None before the first counted update."""
        if not self.updates:
            return None
        return 1e3 * (time.perf_counter() - self.began) / self.updates


class Record:
    """A file that grows by pieces. Those that find no room on the disk, or no whole one, wait for the next.

    Args:
        what: the pieces' name in messages.
        header: what the file begins with.
    """

    def __init__(self, path: Path, what: str, header: str = ""):
        self.path, self.what, self.header = path, what, header.encode()
        self._file: io.FileIO | None = None  # until the first piece
        self._waiting: list[bytes] = []
        self._told = False

    def append(self, piece: str) -> None:
        """Write it to the file, after what waits."""
        self._waiting.append(piece.encode())
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
                if self._file.tell() == 0:
                    self._waiting[0] = self.header + self._waiting[0]
            while self._waiting:
                written = self._file.write(self._waiting[0])
                self._waiting[0] = self._waiting[0][written:]
                self._waiting = self._waiting[not self._waiting[0] :]
        except OSError as why:
            if not self._told:
                text = f"warning: {self.path}: {why.strerror}; {self.what} wait until there is room"
                tqdm.write(text, file=sys.stderr)  # above the bar
            self._told = True

    def close(self) -> None:
        """Say what did not find room."""
        if self._waiting:
            print(f"warning: {self.path}: its last {len(self._waiting)} {self.what} found no room", file=sys.stderr)
        if self._file:
            self._file.close()


class RunLog:
    """Writes rows of KEYS and samples for one run.

    Args:
        run_dir: metrics.csv and samples.txt lie here; None on ranks that keep no log.
        start_iter: 0, or the iteration that a resumed run goes on from: later rows move to metrics.lost.csv, and the
            row of that iteration makes way for the one that is written again; samples likewise.
        max_iters: the end of the bar.
        wandb_run: what `start_wandb` gave, or None.
    """

    def __init__(self, run_dir: Path | None, start_iter: int, max_iters: int, wandb_run=None):
        self.folder, self.max_iters, self.wandb_run, self._told = run_dir, max_iters, wandb_run, False
        rows, samples = (run_dir / name if run_dir else Path(os.devnull) for name in (ROWS, SAMPLES))
        header = ",".join(KEYS) + "\n"
        if run_dir:
            _rewind(rows, start_iter, ROW, header)
            _rewind(samples, start_iter, SAMPLE)
        self._rows, self._samples = Record(rows, "rows", header), Record(samples, "samples")
        self._first: tuple[float, int] | None = None  # when and at which iteration the updates' time was known first
        # disable=None: no bar where stderr is no terminal
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
        cells = ("" if v is None else f"{v:.9g}" if isinstance(v, float) else str(v) for v in row.values())
        self._rows.append(",".join(cells) + "\n")
        text = line(row, len(str(self.max_iters)), self._seconds_left(row))
        self.say(_bold(text) if row["val_loss"] is not None else text)
        if row["train_loss"] is not None:
            self.bar.set_postfix_str(f"loss {row['train_loss']:.3f}", refresh=False)
        self._wandb(lambda wandb, run: run.log({key: value for key, value in row.items() if value is not None}))

    def _seconds_left(self, row: dict) -> float | None:
        """Until max_iters: by the updates' time at first, then by all that passed, evaluations and saves too."""
        i, seconds = row["iter"], row["step_ms"] and row["step_ms"] / 1e3
        if seconds is None:
            return None
        self._first = self._first or (time.perf_counter(), i)
        if i > self._first[1]:
            seconds = (time.perf_counter() - self._first[0]) / (i - self._first[1])
        return seconds * max(0, self.max_iters - i)  # a resumed run can be past it

    def write_samples(self, row: dict, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Print what a model made of prompts at an evaluation, and keep it in samples.txt.

        Args:
            row: the evaluation's.
            texts: they begin with their prompts.
        """
        i = row["iter"]
        self.say("\n---\n".join([f"--- sample after {i} updates\n{texts[0]}", *texts[1:]]) + "\n---")
        for prompt, text in zip(prompts, texts, strict=True):
            title = f"=== iter {i} | val {row['val_loss']:.4f} | prompt {json.dumps(prompt, ensure_ascii=False)}"
            # no line of the text looks like a title
            self._samples.append(f"{title}\n{re.sub('^===', ' ===', text, flags=re.M)}\n\n")
        data = [[i, *pair] for pair in zip(prompts, texts, strict=True)]
        self._wandb(lambda wandb, run: run.log({"iter": i, "samples": wandb.Table(["iter", "prompt", "text"], data)}))

    def write_picture(self, png: bytes) -> None:
        """Keep a picture of the run as metrics.png, whole or not at all."""
        path = str(self.folder / PICTURE)
        write_output(png, path, "picture")
        self._wandb(lambda wandb, run: run.log({"metrics": wandb.Image(path)}))

    def _wandb(self, call: Callable) -> None:
        """call(wandb, its run), where there is one; what fails there ends no run: a full disk, a service that died."""
        if self.wandb_run is None:
            return
        import wandb

        try:
            call(wandb, self.wandb_run)
        except Exception as why:
            if not self._told:
                said = (str(why).splitlines() or [type(why).__name__])[0]
                tqdm.write(f"warning: wandb: {said}; what it misses is in {self.folder}", file=sys.stderr)
            self._told = True

    def close(self) -> None:
        """End the bar, the files and the wandb run."""
        self.bar.close()
        self._rows.close()
        self._samples.close()
        self._wandb(lambda wandb, run: run.finish())


def line(row: dict, width: int = 6, seconds_left: float | None = None) -> str:
    """One row for a person; what it has not leaves its column empty.

    Args:
        width: characters of an iteration.
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
        text = form.format(0 if row.get(key) is None else row[key])
        texts.append(" " * len(text) if row.get(key) is None else text)
    texts += [f"mfu {row['mfu']:5.1%}"] if row.get("mfu") is not None else []
    texts += [f"eta {duration(seconds_left)}"] if seconds_left is not None else []
    return " | ".join(texts).rstrip(" |")


def _bold(text: str) -> str:
    """For a terminal that shows it, and a person who has not set NO_COLOR (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[1m{text}\033[0m"


def _rewind(path: Path, start_iter: int, entry: bytes, header: str = "") -> None:
    """Keep the entries before start_iter; those after it move to a file beside it, metrics.lost.csv for metrics.csv.

    Args:
        entry: a pattern of them; its first group is the iteration.
        header: what comes before the first one.
    """
    if not path.exists():
        return
    # bytes as they are: a killed process can leave half an entry, a power cut anything
    entries = [(int(found[1]), found[0]) for found in re.finditer(entry, path.read_bytes(), re.M)]
    lost = [each for i, each in entries if i > start_iter]
    if lost:
        lost_path = path.with_name(f"{path.stem}.lost{path.suffix}")
        known = lost_path.exists()
        with open(lost_path, "ab") as file:
            file.write(b"".join([header.encode() * (not known), *lost]))
    partial = path.with_suffix(".tmp")
    partial.write_bytes(header.encode() + b"".join(each for i, each in entries if i < start_iter))
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
