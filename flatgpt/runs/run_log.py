"""Log a run to metrics.csv, samples.txt, the terminal (with a progress bar) and, optionally, Weights & Biases."""

from __future__ import annotations

import contextlib
import itertools
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

from config import first_line
from flatgpt.runtime.files import atomic_write, write_output

if TYPE_CHECKING:
    from torch import Tensor

KEYS = (
    "iter",  # number of updates so far
    "tokens",  # trained on so far
    "epoch",  # passes over the training split so far, fractional
    "train_loss",  # nats per token, of this update
    "val_loss",  # nats per token, if this iteration was evaluated
    "lr",  # learning rate of this update
    "grad_norm",  # before clipping
    "loss_scale",  # float16 only
    "skipped",  # updates skipped so far
    "step_ms",  # milliseconds per update since the previous row, without evaluations and saves
    "tok_per_s",
    "mfu",  # model FLOPs utilization, if the device's peak is known
    "peak_mem_gb",  # 10^9 bytes
)

ROWS, SAMPLES, PICTURE = "metrics.csv", "samples.txt", "metrics.png"
# Regular expressions of an entry, whose first group is the iteration, and of the start of one at the end of the file,
# which a crash leaves. A sample's text may end without a line break.
ROW = rb"^(\d{1,18})(?:,[\w.+-]*){%d}\n" % (len(KEYS) - 1)
SAMPLE = rb"^=== iter (\d{1,18}) .*\n(?:(?!===).*\n)*(?:(?!===).+\Z)?"
PARTIAL = rb"(?:\d[\d,.+\-ainfe]*|={1,3}|=== i?t?e?|=== iter.*)?"

# Dense half-precision peak in TFLOP/s from NVIDIA's data sheets, by a part of torch.cuda.get_device_name(). The first
# match is used.
PEAK_TFLOPS = {"H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10G": 70}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "T4": 65, "V100": 125, "RTX 4090": 165, "RTX 3090": 71}


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a device; None if unknown."""
    if "Laptop" in device_name or "MIG" in device_name:  # slower than the full GPU of this name
        return None
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


class StepClock:
    """Measures the time of updates between two rows of the log.

    Evaluations, saves and the first update, which may compile, are not included. Read it only when the device is idle.
    """

    def __init__(self):
        self.start_time, self.updates, self.warm = 0.0, 0, False

    def start(self) -> None:
        """Start measuring. The device must be idle."""
        self.start_time, self.updates = time.perf_counter(), 0

    def count(self, loss: Tensor) -> None:
        """Count a launched update. The first one is not counted: wait for it, then start measuring."""
        if self.warm:
            self.updates += 1
        else:
            loss.item()
            self.warm = True
            self.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the `with` block."""
        pause_start = time.perf_counter()
        yield
        self.start_time += time.perf_counter() - pause_start

    def ms_per_update(self) -> float | None:
        """Return milliseconds per update since `start`; None before the first counted update."""
        return 1e3 * (time.perf_counter() - self.start_time) / self.updates if self.updates else None


class AppendFile:
    """A text file to append entries to. If writing fails, entries are kept and written with a later one.

    Args:
        entries: name of the entries in messages.
    """

    def __init__(self, path: Path, entries: str):
        self.path, self.entries, self._unwritten, self._warned = path, entries, b"", False
        self._file = None  # opened for the first entry

    def append(self, entry: str) -> None:
        """Write the unwritten entries and this one."""
        self._unwritten += entry.encode()
        try:
            self._file = self._file or open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                text = f"warning: {self.path}: {error.strerror}; {self.entries} are kept until they can be written"
                tqdm.write(text, file=sys.stderr)  # above the progress bar
            self._warned = True

    def close(self) -> None:
        """Close the file, with a warning if entries are lost."""
        if self._unwritten:
            print(f"warning: {self.path}: the last {self.entries} could not be written", file=sys.stderr)
        if self._file:
            self._file.close()


class RunLog:
    """Writes the rows and samples of one run.

    Args:
        run_dir: folder of metrics.csv and samples.txt; None on ranks that write no files.
        start_iter: 0, or the iteration that the run resumes from. Later rows are moved to metrics.lost.csv. The row of
            this iteration is removed, because it is written again. The same applies to samples.
        max_iters: total of the progress bar.
        wandb_run: result of `start_wandb`.
    """

    def __init__(self, run_dir: Path | None, start_iter: int, max_iters: int, wandb_run=None):
        self.folder, self.max_iters, self.wandb_run, self._warned = run_dir, max_iters, wandb_run, False
        rows, samples = (run_dir / name if run_dir else Path(os.devnull) for name in (ROWS, SAMPLES))
        if run_dir:
            _rewind(rows, start_iter, ROW, (",".join(KEYS) + "\n").encode())
            _rewind(samples, start_iter, SAMPLE)
        self._rows, self._samples = AppendFile(rows, "rows"), AppendFile(samples, "samples")
        self._eta_start: tuple[float, int] | None = None  # start of the ETA estimate: time and iteration
        # disable=None: no bar if stderr is not a terminal
        self.bar = tqdm(
            total=max_iters, initial=start_iter, unit="iter", disable=None if run_dir else True, dynamic_ncols=True
        )

    def print(self, text: str) -> None:
        """Print lines on standard output, above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def write(self, row: dict) -> None:
        """Log a row with values for KEYS. Missing values and None become empty cells."""
        row = {key: row.get(key) for key in KEYS}
        cells = ("" if v is None else f"{v:.9g}" if isinstance(v, float) else str(v) for v in row.values())
        self._rows.append(",".join(cells) + "\n")
        i, now, seconds_left = row["iter"], time.perf_counter(), None
        if row["step_ms"]:
            self._eta_start = self._eta_start or (now - row["step_ms"] / 1e3, i - 1)
            seconds_left = (now - self._eta_start[0]) / (i - self._eta_start[1]) * max(0, self.max_iters - i)
        text = format_row(row, len(str(self.max_iters)), seconds_left)
        if row["val_loss"] is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # no-color.org
            text = f"\033[1m{text}\033[0m"  # bold
        self.print(text)
        self._call_wandb(lambda wandb, run: run.log({key: value for key, value in row.items() if value is not None}))

    def write_samples(self, row: dict, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Print the samples of an evaluation and append them to samples.txt.

        Args:
            row: row of the evaluation.
            texts: one per prompt, including the prompt.
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
        """Write metrics.png atomically."""
        path = str(self.folder / PICTURE)
        write_output(png, path, "picture")
        self._call_wandb(lambda wandb, run: run.log({"metrics": wandb.Image(path)}))

    def _call_wandb(self, call: Callable) -> None:
        """Run call(wandb, run) if a wandb run is active. Errors, such as a full disk, are printed as a warning."""
        if self.wandb_run is None:
            return
        import wandb

        try:
            call(wandb, self.wandb_run)
        except Exception as error:
            if not self._warned:
                text = f"warning: wandb: {first_line(error)}; the missing data is in {self.folder}"
                tqdm.write(text, file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        """Close the bar, the files and the wandb run."""
        self.bar.close()
        self._rows.close()
        self._samples.close()
        self._call_wandb(lambda wandb, run: run.finish())


def format_row(row: dict, width: int = 6, seconds_left: float | None = None) -> str:
    """Format a row for the terminal. Columns of missing values are empty.

    Args:
        width: width of the iteration in characters.
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
    for key, template in columns:
        value = row.get(key)
        texts.append(" " * len(template.format(0)) if value is None else template.format(value))
    texts += [f"mfu {row['mfu']:5.1%}"] if row.get("mfu") is not None else []
    texts += [f"eta {duration(seconds_left)}"] if seconds_left is not None else []
    return " | ".join(texts).rstrip(" |")


def _rewind(path: Path, start_iter: int, entry: bytes, header: bytes = b"") -> None:
    """Keep the entries before start_iter, and move those after it to another file, such as metrics.lost.csv.

    Args:
        entry: regular expression of an entry; the first group is the iteration.
        header: first line of both files.
    """
    content = path.read_bytes() if path.exists() else b""
    written = content.rstrip(b"\0")  # a power failure can leave zeros at the end
    if not re.fullmatch(PARTIAL, re.sub(entry, b"", written, flags=re.M).removeprefix(header).strip()):
        copies = (path.with_name(f"{path.stem}.changed-{n}{path.suffix}") for n in itertools.count(1))
        atomic_write(copy := next(copy for copy in copies if not copy.exists()), content)
        print(f"warning: {path} was edited: what can be read is kept, and all of it in {copy}", file=sys.stderr)
        if header:
            columns, *rows = [cells for cells, _ in parse_rows(content, [])] or [[]]
            rows = (dict(zip(columns, cells, strict=True)) for cells in rows)
            written = "".join(",".join(row.get(key, "") for key in KEYS) + "\n" for row in rows).encode()
    entries = [(int(found[1]), found[0]) for found in re.finditer(entry, written, re.M)]
    if lost := b"".join(text for i, text in entries if i > start_iter):
        lost_path = path.with_name(f"{path.stem}.lost{path.suffix}")
        before = lost_path.read_bytes() if lost_path.exists() else header
        atomic_write(lost_path, _end_line(before) + _end_line(lost))
    if content or header:
        atomic_write(path, header + _end_line(b"".join(text for i, text in entries if i < start_iter)))


def _end_line(text: bytes) -> bytes:
    return text + b"\n" if text and not text.endswith(b"\n") else text


def parse_rows(content: bytes, skipped: list[str]) -> Iterator[tuple[list[str], list[float]]]:
    """Yield the columns' names in metrics.csv and no values; then the cells and values of each row, nan if empty.

    What spreadsheet programs write is read too: separators `,` `;` and tab, quotes, decimal commas, a byte order mark.
    The start of a row at the end is ignored, because the run may be writing at the same time.

    Args:
        skipped: lines that are not rows, and cells that are not numbers, are appended to it.
    """
    text = content.decode("utf-8-sig", errors="replace").replace("\0", "")
    whole, _, last = text.rpartition("\n")
    columns, separator, at = [], ",", 0
    for line in (whole if re.fullmatch(PARTIAL.decode(), last) else text).splitlines():
        separator = separator if columns else max(",;\t", key=line.count)
        unquoted = re.sub('"([^"]*)"', lambda cell: cell[1].replace(",", "."), line) if '"' in line else line
        cells = [cell.strip().replace(",", ".") for cell in unquoted.split(separator)]
        if not columns and "iter" in cells:
            columns, at = cells, cells.index("iter")
            yield columns, []
        elif len(cells) == len(columns) and re.fullmatch(r"[0-9]{1,18}", cells[at]):
            values = [math.nan] * len(cells)
            for n, cell in enumerate(cells):
                try:
                    values[n] = float(cell or "nan")
                except ValueError:
                    skipped.append(cell)
                    cells[n] = ""
            yield cells, values
        elif line.strip():
            skipped.append(line)


def start_wandb(mode: str, project: str, run_dir: Path, config: dict, run_id: str | None = None):
    """Start a wandb run without prompting; return None for mode `disabled` or if wandb fails.

    Without an API key or network, `online` becomes `offline` with a warning; `wandb sync` uploads the run later.

    Args:
        run_id: wandb id of the run to resume, so that its curves continue.
    """
    if mode == "disabled":
        return None
    try:
        import wandb
    except Exception as error:  # not installed, or a broken installation
        text = f"warning: wandb: {first_line(error)}; continuing without it (to install it: pip install wandb)"
        print(text, file=sys.stderr)
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
        except Exception as error:  # UsageError, CommError, and other errors without a common base class
            fallback = "logging offline, wandb sync uploads it" if attempt == "online" else "continuing without wandb"
            print(f"warning: wandb {attempt}: {first_line(error)}; {fallback}", file=sys.stderr)
            wandb.teardown()  # otherwise its service still holds the run's id
    return None


def duration(seconds: float) -> str:
    """Format a duration: 1h05m, 1m15s, 5s."""
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
