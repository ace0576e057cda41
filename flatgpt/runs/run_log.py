"""Log a run to metrics.csv, samples.txt, the terminal (with a progress bar) and a tracker."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from config import TrainConfig, count_of, format_decimal
from flatgpt.runs.clock import duration
from flatgpt.runs.trackers import Tracker
from flatgpt.runtime.files import atomic_write, write_output

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
    "mean_loss",  # mean of train_loss over the updates since the previous row, at most the last 1,000
    "train_split_loss",  # nats per token of the training split, measured as val_loss (eval_train)
)

ROWS, SAMPLES, PICTURE = "metrics.csv", "samples.txt", "metrics.png"
# Regular expressions of an entry, whose first group is the iteration, and of the start of one at the end of the file,
# which a crash leaves. A sample's text may end without a line break.
ROW = rb"^(\d{1,18})(?:,[\w.+-]*){%d}\n" % (len(KEYS) - 1)
SAMPLE_PREVIEW = 60  # characters of a sample that are printed while it is still noise
SAMPLE = rb"^=== iter (\d{1,18}) .*\n(?:(?!===).*\n)*(?:(?!===).+\Z)?"
PARTIAL = rb"(?:\d[\d,.+\-ainfe]*|={1,3}|=== i?t?e?|=== iter.*)?"


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
        tracker: logs rows, samples and the picture as well; `close` ends it.
    """

    def __init__(self, run_dir: Path | None, start_iter: int, max_iters: int, tracker: Tracker | None = None):
        self.folder, self.max_iters, self._iter = run_dir, max_iters, start_iter
        self.tracker = tracker or Tracker(TrainConfig(), run_dir, {})
        rows, samples = (run_dir / name if run_dir else Path(os.devnull) for name in (ROWS, SAMPLES))
        if run_dir:
            _rewind(rows, start_iter, ROW, (",".join(KEYS) + "\n").encode())
            _rewind(samples, start_iter, SAMPLE)
        self._rows, self._samples = AppendFile(rows, "rows"), AppendFile(samples, "samples")
        self._shown = 0.0  # when the bar last showed an evaluation
        self.bar = tqdm(
            total=max_iters,
            initial=start_iter,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            disable=None if run_dir else True,  # None: no bar if stderr is not a terminal
            dynamic_ncols=True,
        )

    def print(self, text: str) -> None:
        """Print lines on standard output, above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def show_evaluation(self, batches: Sequence) -> Iterator:
        """Yield the batches, and show in the bar how many are done, at most ten times a second."""
        for done, batch in enumerate(batches):
            if (now := time.monotonic()) - self._shown >= 0.1:
                self._shown = now
                self.bar.set_postfix_str(f"evaluating {done:,}/{len(batches):,} batches")
            yield batch

    def write(self, row: dict, seconds_left: float | None = None) -> None:
        """Log a row with values for KEYS. Missing values and None become empty cells."""
        row = {key: row.get(key) for key in KEYS}
        cells = ("" if v is None else f"{v:.9g}" if isinstance(v, float) else str(v) for v in row.values())
        self._rows.append(",".join(cells) + "\n")
        text = format_row(row, len(str(self.max_iters)), seconds_left)
        self.bar.set_postfix_str("" if seconds_left is None else f"eta {duration(seconds_left)}", refresh=False)
        if row["val_loss"] is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # no-color.org
            text = f"\033[1m{text}\033[0m"  # bold
        self.print(text)
        self._iter = row["iter"]
        self.tracker.log({key: value for key, value in row.items() if value is not None})

    def write_samples(self, row: dict, prompts: Sequence[str], texts: Sequence[str], whole: bool = True) -> None:
        """Print the samples of an evaluation and append them to samples.txt.

        Args:
            row: row of the evaluation.
            texts: one per prompt, including the prompt.
            whole: print the texts, not only the start of the first one in a line.
        """
        i, table = row["iter"], [[row["iter"], *pair] for pair in zip(prompts, texts, strict=True)]
        title = f"--- sample after {count_of(i, 'update')}"
        if whole:
            self.print("\n---\n".join([f"{title}\n{texts[0]}", *texts[1:]]) + "\n---")
        else:
            self.print(f"{title} (still noise; whole in {SAMPLES}): {texts[0][:SAMPLE_PREVIEW]!r}")
        for _, prompt, text in table:
            loss = "" if row.get("val_loss") is None else f" | val {row['val_loss']:.4f}"
            title = f"=== iter {i}{loss} | prompt {json.dumps(prompt, ensure_ascii=False)}"
            # so that no line of the text looks like a title
            self._samples.append(f"{title}\n{re.sub('^===', ' ===', text, flags=re.M)}\n\n")
        self.tracker.log_samples(table)

    def write_picture(self, png: bytes) -> None:
        """Write metrics.png atomically."""
        path = self.folder / PICTURE
        write_output(png, str(path), "picture")
        self.tracker.log_picture(self._iter, path)

    def close(self) -> None:
        """Close the bar, the files and the tracker."""
        self.bar.close()
        self._rows.close()
        self._samples.close()
        self.tracker.finish()


def format_row(row: dict, width: int = 6, seconds_left: float | None = None) -> str:
    """Format a row for the terminal. Columns of missing values are empty.

    Args:
        width: width of the iteration in characters.
    """
    columns = (
        ("train_loss", "loss {:7.4f}"),
        ("mean_loss", "mean {:7.4f}"),
        ("val_loss", "val {:7.4f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "norm {:>5}"),
        ("step_ms", "{:8,.1f} ms"),
        ("tok_per_s", "{:7,.0f} tok/s"),
    )
    texts = [f"iter {row['iter']:>{width}}"]
    for key, template in columns:
        value = row.get(key)
        value = format_decimal(value, 2) if key == "grad_norm" and value is not None else value
        texts.append(" " * len(template.format(0)) if value is None else template.format(value))
    texts += [f"mfu {format_decimal(100 * row['mfu'], 1):>4}%"] if row.get("mfu") is not None else []
    texts += [f"train split {row['train_split_loss']:7.4f}"] if row.get("train_split_loss") is not None else []
    texts += [f"eta {duration(seconds_left)}"] if seconds_left is not None else []
    return " | ".join(texts).rstrip(" |")


def _rewind(path: Path, start_iter: int, entry: bytes, header: bytes = b"") -> None:
    """Keep the entries before start_iter, and move those after it to another file, such as metrics.lost.csv.

    Args:
        entry: regular expression of an entry; the first group is the iteration.
        header: first line of both files.
    """
    content = _add_columns(path.read_bytes(), header) if path.exists() else b""
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
        before = _add_columns(lost_path.read_bytes(), header) if lost_path.exists() else header
        atomic_write(lost_path, _end_line(before) + _end_line(lost))
    if content or header:
        atomic_write(path, header + _end_line(b"".join(text for i, text in entries if i < start_iter)))


def _add_columns(content: bytes, header: bytes) -> bytes:
    """Add the newest columns, which are the last ones, to a file of an earlier version."""
    first, _, rows = content.partition(b"\n")
    if not first or not header.startswith(first + b","):
        return content
    return header + rows.replace(b"\n", b"," * (header.count(b",") - first.count(b",")) + b"\n")


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
