"""run_log.py: metrics.csv and samples.txt through resumes, kills and full disks, the terminal and clocks."""

import contextlib
import csv
import os
import pty
import re
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from dataset_files import full_disk

from flatgpt.runs import clock as run_clock
from flatgpt.runs import run_log
from flatgpt.runs.clock import RunClock
from flatgpt.runs.run_log import KEYS, RunLog


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def iters(path: Path) -> list[int]:
    return [int(row["iter"]) for row in rows(path)] if path.exists() else []


def log(folder: Path, start: int, *written: int, **values) -> None:
    """Log rows of these iterations for a run that resumes from `start`."""
    run = RunLog(folder, start, max_iters=100)
    for i in written:
        run.write({"iter": i, **values})
    run.close()


# ---------------------------------------------------------------------------------------------------------------------
# metrics.csv


def test_values_come_back_to_the_last_bit_of_float32_and_at_once(tmp_path):
    """A run that is killed has its rows on the disk."""
    floats = [float(np.float32(x)) for x in (10.824905, 1e-8, 123456.789, 2e-4, 1 / 3)]
    keys = ("train_loss", "lr", "tok_per_s", "grad_norm", "epoch")
    run = RunLog(tmp_path, 0, max_iters=10)
    run.write({"iter": 1, "tokens": 10_000_000_001, **dict(zip(keys, floats, strict=True)), "mfu": None})
    (row,) = rows(tmp_path / "metrics.csv")
    assert [np.float32(row[key]) for key in keys] == [np.float32(x) for x in floats]
    assert (row["iter"], row["tokens"]) == ("1", "10000000001")
    assert all(row[key] == "" for key in set(KEYS) - {"iter", "tokens", *keys})
    run.close()


def test_columns_keep_their_names_and_order(tmp_path):
    """Spreadsheets and scripts rely on them, and the files of earlier runs have them."""
    log(tmp_path, 0, 0)
    header = "iter,tokens,epoch,train_loss,val_loss,lr,grad_norm,loss_scale,skipped,step_ms,tok_per_s,mfu,peak_mem_gb"
    lines = [f"{header},mean_loss,train_split_loss", "0" + 14 * ","]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == lines
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"], "no samples, no file of them"


def test_log_of_an_earlier_version_gets_the_new_columns(tmp_path, capsys):
    """At their end, and in the rows that are moved aside, too. It is no edit."""
    for name in ("metrics.csv", "metrics.lost.csv"):
        old = [",".join(KEYS[:13]), "10,5" + 11 * ",", "20,9" + 11 * ",", "30,7,0.1,2"]  # the last is half a row
        (tmp_path / name).write_text("\n".join(old[: 2 if "lost" in name else 4]) + "\n" * ("lost" in name))
    log(tmp_path, 15, 15, mean_loss=2.5)
    assert rows(tmp_path / "metrics.csv")[0] == dict.fromkeys(KEYS, "") | {"iter": "10", "tokens": "5"}
    assert rows(tmp_path / "metrics.csv")[1]["mean_loss"] == "2.5"
    assert [(row["iter"], row["train_split_loss"]) for row in rows(tmp_path / "metrics.lost.csv")] == [
        ("10", ""),
        ("20", ""),
    ]
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_resume_moves_later_rows_to_a_second_file(tmp_path):
    """The row of the checkpoint's iteration is written again. Each file has one header, however often it is resumed."""
    file, lost = tmp_path / "metrics.csv", tmp_path / "metrics.lost.csv"
    log(tmp_path, 0, 0, 10, 20, 30, train_loss=1.0)
    log(tmp_path, 20, 20, 30, 40, train_loss=2.0)
    assert [row["train_loss"] for row in rows(file)] == ["1", "1", "2", "2", "2"]
    assert (iters(file), iters(lost)) == ([0, 10, 20, 30, 40], [30])
    log(tmp_path, 30)
    assert (iters(file), iters(lost)) == ([0, 10, 20], [30, 40])
    assert [row["train_loss"] for row in rows(lost)] == ["1", "2"]
    assert file.read_text().count("iter") == lost.read_text().count("iter") == 1


@pytest.mark.parametrize(("missing", "start"), [(4, 40), (70, 15)])
def test_half_a_last_line_is_dropped(tmp_path, missing, start):
    """A killed process leaves one. Half a number would be a wrong one."""
    log(tmp_path, 0, 10, 20, 30, **dict.fromkeys(KEYS[1:], 123.456789))
    file = tmp_path / "metrics.csv"
    file.write_bytes(file.read_bytes()[:-missing])
    log(tmp_path, start)
    assert iters(file) == [i for i in (10, 20) if i < start]
    assert iters(tmp_path / "metrics.lost.csv") == [i for i in (20,) if i > start]


def reordered(text: str) -> str:
    """As another program writes it: one column is missing, one is new, and the order is another."""
    cells = [line.split(",") for line in text.splitlines()]
    return "".join(",".join([*row[:0:-1], "note" if row[0] == "iter" else "good", row[0]]) + "\n" for row in cells)


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (lambda text: text.replace(",", ";").replace(".", ",").replace("\n", "\r\n"), 3),
        (lambda text: text.replace(",", "\t").removesuffix("\n"), 3),
        (lambda text: "\ufeff" + re.sub(r"[^,\n]+", lambda cell: f'"{cell[0]}"', text).replace("\n", "\r\n"), 3),
        (lambda text: re.sub(r"[^,\n]+", lambda cell: f'"{cell[0]}"', text.replace(".", "；")).replace("；", ","), 3),
        (reordered, 3),
        (lambda text: "# mine\n\n" + text + '"the best run', 3),
        (lambda text: (text + "# caf\u00e9\n").encode("latin-1"), 3),
        (lambda text: text.replace("\n10,", "\nten,"), 2),
        (lambda text: text.replace("iter", "step"), 0),
        (lambda text: b"\x89PNG\r\n" + bytes(range(256)), 0),
    ],
)
def test_edited_rows_are_read_and_the_edited_file_is_kept(tmp_path, capsys, edit, kept):
    file, copy = tmp_path / "metrics.csv", tmp_path / "metrics.changed-1.csv"
    values = {"tokens": 5_000_000_000, "val_loss": 2.25, "lr": 1e-5, "step_ms": 1234.5, "train_loss": float("nan")}
    log(tmp_path, 0, 0, 10, 20, **values)
    before = rows(file)
    content = edit(file.read_text())
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(content)
    capsys.readouterr()
    log(tmp_path, 30)
    assert copy.read_bytes() == content
    warning = f"warning: {file} was edited: what can be read is kept, and all of it in {copy}\n"
    assert capsys.readouterr().err == warning
    assert rows(file) == {3: before, 2: before[::2], 0: []}[kept]
    text = file.read_bytes()
    log(tmp_path, 30)
    assert file.read_bytes() == text
    assert not (tmp_path / "metrics.changed-2.csv").exists(), "its own form is no edit"


RESTS = [b"\0" * 4096, b"\n", b"30,150", b"30,1\0\0", b"30,1,nan,-inf,1e-05", 5000 * b"4" + 12 * b"," + b"\n"]


@pytest.mark.parametrize("rest", RESTS, ids=range(len(RESTS)))
def test_what_a_crash_leaves_is_no_edit(tmp_path, capsys, rest):
    log(tmp_path, 0, 0, 10, 20)
    (tmp_path / "metrics.csv").write_bytes((tmp_path / "metrics.csv").read_bytes() + rest)
    log(tmp_path, 25)
    assert iters(tmp_path / "metrics.csv") == [0, 10, 20]
    (tmp_path / "metrics.csv").write_bytes((tmp_path / "metrics.csv").read_bytes().partition(b"\n")[2])
    log(tmp_path, 25)
    assert iters(tmp_path / "metrics.csv") == [0, 10, 20], "a header that is missing is written again"
    assert (len(list(tmp_path.iterdir())), capsys.readouterr().err) == (1, "")


def test_rows_that_are_lost_start_on_a_line_of_their_own(tmp_path):
    """The file may have been edited, or cut by a crash."""
    log(tmp_path, 0, 0, 10, 20, 30)
    (tmp_path / "metrics.lost.csv").write_text("iter;tokens\n20;1")
    log(tmp_path, 20)
    assert (tmp_path / "metrics.lost.csv").read_text() == "iter;tokens\n20;1\n30" + 14 * "," + "\n"


def test_rows_wait_while_the_disk_is_full(tmp_path, capsys):
    """No row is cut: what was written of one is completed when there is room."""
    path, run = tmp_path / "metrics.csv", RunLog(tmp_path, 0, 9)
    for written in (range(3), range(3, 6), range(6, 8), [8]):
        with full_disk(path.stat().st_size + (2 if written[0] in (3, 8) else 1000)):
            for i in written:
                run.write({"iter": i, "tokens": 10 * i})
    run.close()
    lines = path.read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [*([str(i), str(10 * i)] for i in range(8)), ["8", ""]]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path}: File too large; rows are kept until they can be written",
        f"warning: {path}: the last rows could not be written",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# the terminal


def test_rows_are_aligned_and_tell_the_time_left(tmp_path, capsys):
    """Small figures keep a digit that is not 0."""
    row = {"train_loss": 1.23456, "mean_loss": 1.5, "lr": 1e-3, "step_ms": 1234.56, "tok_per_s": 98765.4}
    run = RunLog(tmp_path, 0, max_iters=2000)
    list(run.show_evaluation([0]))
    run.write({"iter": 0, "val_loss": 10.8})
    run.write({**row, "iter": 10, "grad_norm": 0.456}, 2457)
    run.write({**row, "iter": 20, "grad_norm": 0.00123, "val_loss": 2.0, "train_split_loss": 1.75, "mfu": 0.4123}, 3800)
    run.write({**row, "iter": 9000, "grad_norm": 3e-7, "mfu": 1.23e-4}, 0)
    run.close()
    printed = capsys.readouterr()
    speed = " 1,234.6 ms |  98,765 tok/s"
    assert printed.out.splitlines() == [
        "iter    0 |              |              | val 10.8000",
        f"iter   10 | loss  1.2346 | mean  1.5000 |             | lr 1.00e-03 | norm  0.46 | {speed} | eta 40m57s",
        f"iter   20 | loss  1.2346 | mean  1.5000 | val  2.0000 | lr 1.00e-03 | norm 0.001 | {speed} | mfu 41.2% "
        "| train split  1.7500 | eta 1h03m",
        f"iter 9000 | loss  1.2346 | mean  1.5000 |             | lr 1.00e-03 | norm 3e-07 | {speed} | mfu 0.01% "
        "| eta 0s",
    ]
    assert printed.err == "", "no bar where stderr is no terminal"


def test_time_left_counts_the_evaluations_and_not_the_first_update(clock):
    """An update takes 2 s, the first one 500 s; an evaluation with its sample and save takes 60 s."""
    now, run = clock(run_clock), RunClock(eval_updates=7)

    def update(seconds: float = 2.0, loss: float = 1.0) -> None:
        now.now += seconds
        run.count(loss)

    assert run.seconds_left(0, 100, 25) is None
    now.now += 60
    run.start_row(evaluated=True)
    for i in range(1, 31):
        update(*((500.0, 5.0) if i == 1 else (2.0, 3.0)))
        if i % 10 == 0 or i == 25:
            losses, ms = run.end_row()
            assert losses[:2] == ([5.0, 3.0] if i == 10 else [3.0, 3.0])
            assert (len(losses), ms) == ((10, 10, 5, 5)[(10, 20, 25, 30).index(i)], pytest.approx(2000))
            now.now += 60 * (i == 25)
            run.start_row(evaluated=i == 25)
        if i in (10, 20):
            assert run.seconds_left(i, 100, 25) == pytest.approx(2 * (100 - i) + 4 * 60)
    assert run.seconds_left(30, 100, 25) == pytest.approx(2 * 70 + 3 * 60)
    assert run.seconds_left(30, 101, 25) == pytest.approx(2 * 71 + 4 * 60)
    assert run.seconds_left(101, 101, 25) == run.seconds_left(150, 100, 25) == 0
    resumed = RunClock(eval_updates=7)
    for attempt in (0, 1):
        now.now += 2
        resumed.count(1.0)
        assert attempt == 0 or resumed.seconds_left(30, 100, 25) == pytest.approx(2 * 70 + 3 * 7 * 2)


def test_an_evaluation_is_shown_in_the_bar(tmp_path, clock):
    """Ten times a second at most, until the next row."""
    now, run = clock(run_log), RunLog(tmp_path, 0, 100)
    seen = []
    run.bar.set_postfix_str = lambda text, refresh=True: seen.append(text)
    batches = run.show_evaluation(range(1200))
    for done in range(5):
        now.now += 0.06
        assert next(batches) == done
    run.write({"iter": 0, "val_loss": 2.0}, 75.0)
    assert seen == [f"evaluating {done}/1,200 batches" for done in (0, 2, 4)] + ["eta 1m15s"]
    run.close()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_rows_and_bar_on_a_terminal(tmp_path, monkeypatch, no_color):
    """Whole lines above the bar, which stays at the end; evaluations are bold."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    monkeypatch.setenv("NO_COLOR", no_color)
    with open(terminal, "w") as tty, monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, tty)
        run = RunLog(tmp_path, 0, 200)
        for i, loss in ((100, None), (200, 2.5)):
            run.bar.update(100)
            run.write({"iter": i, "train_loss": 1.5, "mean_loss": 1.75, "val_loss": loss}, 10.0)
        run.close()
    seen = b""
    with contextlib.suppress(OSError):  # at its end
        while data := os.read(screen, 1 << 16):
            seen += data
    os.close(screen)
    # what a line shows in the end: a carriage return begins it again
    lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in seen.decode().split("\n")]
    lines = [re.sub(r"[ |]+\| eta", " | eta", line) for line in lines]
    plain = "iter 200 | loss  1.5000 | mean  1.7500 | val  2.5000 | eta 10s"
    bold = plain if no_color else f"\033[1m{plain}\033[0m"
    assert [line for line in lines if "iter " in line] == ["iter 100 | loss  1.5000 | mean  1.7500 | eta 10s", bold]
    bar = next(line for line in lines if line.startswith("100%"))
    assert "200/200" in bar
    assert bar.count("eta") == 1, "tqdm has an estimate of its own, which knows nothing of evaluations"


# ---------------------------------------------------------------------------------------------------------------------
# samples.txt


def log_samples(run: RunLog, i: int, *texts: str) -> None:
    run.write_samples({"iter": i, "val_loss": 1.0 + i}, [text[:1] for text in texts], texts)


@pytest.mark.parametrize("text", ["text\n\nof two parts", "\ra\r\n=== iter 5 | v\x85\u2028=== iter 5 | v\0\n===\n"])
def test_samples_continue_where_the_run_resumes(tmp_path, text):
    """Those before it stay as they are, to the byte; half a sample, which a kill leaves, is dropped."""
    file = tmp_path / "samples.txt"
    for start in (0, 10):
        run = RunLog(tmp_path, start, max_iters=20)
        for i in range(start, 20, 5):
            log_samples(run, i, text, "\u2028\x85")
        run.close()
        if not start:
            before = file.read_bytes()
            file.write_bytes(before + b"=== iter 20 | val 1.")
    assert file.read_bytes() == before
    assert (tmp_path / "samples.lost.txt").read_bytes() == before[before.index(b"=== iter 15") :]


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (lambda text: text.replace(b"\n", b"\r\n"), [0, 5]),
        (lambda text: text.rstrip(b"\n"), [0, 5]),
        (lambda text: text.replace(b"=== iter 0 |", b"=== my favourite |"), [5]),
        (lambda text: text.replace(b"=== iter 5 |", b"=== 5 |"), [0]),
        (lambda text: b"\xef\xbb\xbf" + text, [5]),
        (lambda text: text.decode().encode("utf-16"), []),
        (lambda text: text + b"=== the end\n", [0, 5]),
    ],
)
def test_edited_samples_are_kept(tmp_path, capsys, edit, kept):
    """Entries that can be read stay as they are; if there is other text, the whole file is copied."""
    file, copy = tmp_path / "samples.txt", tmp_path / "samples.changed-1.txt"
    run = RunLog(tmp_path, 0, max_iters=20)
    for i in (0, 5):
        log_samples(run, i, "text\nof two lines")
    run.close()
    content = edit(file.read_bytes())
    file.write_bytes(content)
    capsys.readouterr()
    RunLog(tmp_path, 10, max_iters=20).close()
    found = file.read_bytes()
    assert [int(i) for i in re.findall(rb"^=== iter (\d+)", found, re.M)] == kept
    assert found.count(b"of two lines") == len(kept)
    if copy.exists():
        assert copy.read_bytes() == content
        assert capsys.readouterr().err.endswith(f"was edited: what can be read is kept, and all of it in {copy}\n")
    else:
        assert found == content + b"\n" * (not content.endswith(b"\n"))
