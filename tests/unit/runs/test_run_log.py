"""run_log.py: metrics.csv and samples.txt through resumes and kills, the terminal, clocks and peaks, wandb."""

import base64
import contextlib
import csv
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_process import TINY, train_here
from processes import ROOT, command, running

import train
from flatgpt.runs import run_log
from flatgpt.runs.run_log import KEYS, RunLog, StepClock, duration, peak_flops, start_wandb


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
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [header, "0" + 12 * ","]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"], "no samples, no file of them"


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
    log(tmp_path, 30, 30)  # loses nothing
    assert (iters(file), iters(lost)) == ([0, 10, 20, 30], [30, 40])


@pytest.mark.parametrize("missing", [4, 6, 30, 70])
@pytest.mark.parametrize("start", [15, 40])
def test_half_a_last_line_is_dropped(tmp_path, missing, start):
    """A killed process leaves one. Half a number would be a wrong one."""
    log(tmp_path, 0, 10, 20, 30, **dict.fromkeys(KEYS[1:], 123.456789))
    file = tmp_path / "metrics.csv"
    file.write_bytes(file.read_bytes()[:-missing])
    log(tmp_path, start)
    assert iters(file) == [i for i in (10, 20) if i < start]
    assert iters(tmp_path / "metrics.lost.csv") == [i for i in (20,) if i > start]


def test_rows_wait_while_the_disk_is_full(tmp_path):
    """A limit of file sizes, in a process of its own, stands in for the full disk. No row is cut."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from flatgpt.runs.run_log import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = RunLog(Path({str(tmp_path)!r}), 0, 9)
for i in range(9):
    size = i and (log.folder / "metrics.csv").stat().st_size
    limit = {{3: size + 2, 6: resource.RLIM_INFINITY, 8: size + 2}}.get(i)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    log.write({{"iter": i, "tokens": 10 * i}})
log.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "metrics.csv"
    lines = path.read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [*([str(i), str(10 * i)] for i in range(8)), ["8", ""]]
    assert [line for line in done.stderr.splitlines() if "metrics.csv" in line] == [
        f"warning: {path}: File too large; rows wait until there is room",
        f"warning: {path}: its last 1 rows found no room",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# the terminal


def test_rows_are_aligned_and_tell_the_time_left(tmp_path, clock, capsys):
    """By step_ms at first, later by all the time that passed."""
    now = clock(run_log)
    row = {"train_loss": 1.23456, "lr": 1e-3, "grad_norm": 0.456, "step_ms": 1234.56, "tok_per_s": 98765.4}
    run = RunLog(tmp_path, 0, max_iters=2000)
    run.write({"iter": 0, "val_loss": 10.8})
    run.write({**row, "iter": 10})
    now.now += 20
    run.write({**row, "iter": 20, "val_loss": 2.0, "mfu": 0.4123})
    run.write({**row, "iter": 9000})  # a resumed run that is past its end
    run.close()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "iter    0 |              | val 10.8000",
        "iter   10 | loss  1.2346 |             | lr 1.00e-03 | norm  0.46 |  1,234.6 ms |  98,765 tok/s | eta 40m57s",
        "iter   20 | loss  1.2346 | val  2.0000 | lr 1.00e-03 | norm  0.46 |  1,234.6 ms |  98,765 tok/s | mfu 41.2% "
        "| eta 1h06m",
        "iter 9000 | loss  1.2346 |             | lr 1.00e-03 | norm  0.46 |  1,234.6 ms |  98,765 tok/s | eta 0s",
    ]
    assert printed.err == "", "no bar where stderr is no terminal"


ON_A_TERMINAL = """
import resource, signal
from pathlib import Path; from flatgpt.runs.run_log import RunLog
log = RunLog(Path("."), 0, 300)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
for i in (100, 200, 300):
    log.bar.update(100)
    log.write({"iter": i, "train_loss": 1.5, "val_loss": 2.5 if i == 200 else None})
log.close()
"""


@pytest.mark.parametrize(("setting", "bold"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_rows_and_bar_on_a_terminal(tmp_path, setting, bold):
    """Whole lines above the bar, which stays at the end; evaluations are bold; a warning is a line of its own."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", **setting}
    seen = b""
    words = [sys.executable, "-c", ON_A_TERMINAL]
    with running(words, cwd=tmp_path, env=env, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        with contextlib.suppress(OSError):  # at its end
            while data := os.read(screen, 1 << 16):
                seen += data
        assert process.wait(60) == 0
    os.close(screen)
    # what a line shows in the end: a carriage return begins it again
    lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in seen.decode().split("\n")]
    expected = ["iter 100 | loss  1.5000", "iter 200 | loss  1.5000 | val  2.5000", "iter 300 | loss  1.5000"]
    expected[1] = f"\033[1m{expected[1]}\033[0m" if bold else expected[1]
    assert [line for line in lines if "iter " in line] == expected
    assert "warning: metrics.csv: File too large; rows wait until there is room" in lines
    (bar,) = [line for line in lines if line.startswith("100%")]
    assert all(text in bar for text in ("300/300", "loss 1.500"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (5.4, "5s"), (59.6, "1m00s"), (75, "1m15s"), (3599.6, "1h00m"), (3661, "1h01m"), (90_000, "25h00m")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------------------------------
# samples.txt


def log_samples(run: RunLog, i: int, *texts: str) -> None:
    run.write_samples({"iter": i, "val_loss": 1.0 + i}, [text[:1] for text in texts], texts)


def test_samples_have_their_iteration_and_loss(tmp_path, capsys):
    run = RunLog(tmp_path, 0, max_iters=20)
    log_samples(run, 0, "a b\n=== iter 9 | val", "\n東京 🎈")
    log_samples(run, 10, "ab", "\n")
    run.close()
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8") == (
        '=== iter 0 | val 1.0000 | prompt "a"\na b\n === iter 9 | val\n\n'
        '=== iter 0 | val 1.0000 | prompt "\\n"\n\n東京 🎈\n\n'
        '=== iter 10 | val 11.0000 | prompt "a"\nab\n\n=== iter 10 | val 11.0000 | prompt "\\n"\n\n\n\n'
    )
    assert capsys.readouterr().out.startswith("--- sample after 0 updates\na b\n")


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


# ---------------------------------------------------------------------------------------------------------------------
# speed


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        *(("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362)),
        *(("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("Tesla T4", 65)),
        *(
            ("Tesla V100-SXM2-16GB", 125),
            ("NVIDIA GeForce RTX 4090", 165),
            ("AMD Instinct MI300X", None),
            ("cpu", None),
        ),
    ],
)
def test_peak_flops(name, tflops):
    assert peak_flops(name) == (tflops and 1e12 * tflops)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA L40", "NVIDIA L4"),
        ("NVIDIA A10", "NVIDIA A10G"),
        ("NVIDIA T400 4GB", "Tesla T4"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H200 NVL", "NVIDIA H200"),
    ],
)
def test_peak_of_a_chip_with_a_similar_name_is_not_taken(name, known):
    """They have other peaks on their data sheets; a wrong MFU is worse than none."""
    assert peak_flops(name) != peak_flops(known)


def test_clock_leaves_out_the_first_update_and_pauses(clock):
    now, steps, loss = clock(run_log), StepClock(), torch.tensor(1.0)
    steps.start()
    now.now += 30  # the first update compiles
    steps.count(loss)
    assert steps.ms_per_update() is None
    for _ in range(4):
        now.now += 0.25
        steps.count(loss)
    with steps.paused():
        now.now += 10  # a save
    assert steps.ms_per_update() == pytest.approx(250)
    now.now += 60  # an evaluation
    steps.start()
    assert steps.ms_per_update() is None
    now.now += 0.5
    steps.count(loss)
    assert steps.ms_per_update() == pytest.approx(500)


# ---------------------------------------------------------------------------------------------------------------------
# wandb

WANDB = """
import base64, sys
from pathlib import Path
from flatgpt.runs.run_log import RunLog, start_wandb
run = start_wandb(sys.argv[1], "flatgpt", Path("."), {"lr": 0.25}, sys.argv[2])
log = RunLog(Path("."), 0, 3, run)
log.write({"iter": 20, "train_loss": 2.5, "val_loss": None})
log.write({"iter": 10, "train_loss": 2.25, "val_loss": 3.5})
log.write_samples({"iter": 10, "val_loss": 3.5}, ["a", "東"], ["ab <b>", "東京 🎈"])
log.write_picture(base64.b64decode(sys.argv[3]))
log.close()
"""
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="  # PNG, 1 x 1


def with_wandb(folder: Path, mode: str, **env: str) -> tuple[str, Path]:
    """Log as a user without settings of wandb's does; standard error, and the file that wandb stored."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), **env}
    argv = [sys.executable, "-c", WANDB, mode, "abcd1234", DOT]
    done = subprocess.run(
        argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (stored,) = folder.glob("wandb/offline-run-*/run-abcd1234.wandb")
    return done.stderr, stored


def records(data: bytes) -> list:
    """What is in a .wandb file: LevelDB's log format, 7 bytes in, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    found, at, record = [], 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # no header fits: the block's rest is padding
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or last part
            found.append(Record.FromString(record))
            record = b""
    return found


def history_of(file: Path) -> list[dict]:
    """What was logged to wandb, a dict each time; keys of nested values joined by dots."""
    logged = []
    for record in records(file.read_bytes()):
        row = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        logged += [{key: value for key, value in row.items() if not key.startswith("_")}] * bool(row)
    return logged


def check_stored(file: Path) -> None:
    """Rows, also the one of a lower iteration, without the empty values; samples, the picture, and the config."""
    stored = records(file.read_bytes())
    *rows, samples, picture = history_of(file)
    assert rows == [{"iter": 20, "train_loss": 2.5}, {"iter": 10, "train_loss": 2.25, "val_loss": 3.5}]
    assert samples["iter"] == 10
    table = json.loads((file.parent / "files" / samples["samples.path"]).read_text())
    assert table["columns"] == ["iter", "prompt", "text"]
    assert table["data"] == [[10, "a", "ab <b>"], [10, "東", "東京 🎈"]]
    assert (file.parent / "files" / picture["metrics.path"]).read_bytes() == base64.b64decode(DOT)
    (metric,) = (r.metric for r in stored if r.HasField("metric"))
    assert (metric.glob_name, metric.step_metric) == ("*", "iter")
    config = {u.key: u.value_json for r in stored for u in r.run.config.update}
    assert config["lr"] == "0.25"


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_without_a_key(tmp_path, mode):
    """online asks nothing: it becomes offline, and says so."""
    said, stored = with_wandb(tmp_path, mode)
    check_stored(stored)
    if mode == "offline":
        assert said == ""
    else:
        assert said.startswith("warning: wandb online: no API key")
        assert said.count("\n") == 1


@pytest.mark.slow
def test_wandb_without_a_network(tmp_path):
    """wandb tries for half a minute."""
    said, stored = with_wandb(tmp_path, "online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    check_stored(stored)
    assert "warning: wandb online: " in said
    assert "wandb sync" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_wandb_under_its_id(tiny_data):
    """A folder for each start, which `wandb sync` makes one run of; the rows go on, samples and picture are there.

    wandb names the folders by the second; a start of train.py takes longer than that."""
    words = ("--wandb", "offline", "--wandb_project", "p", "--max_iters")
    for more in ((*words, 3), (*words, 6, "--resume")):
        done = command("train", *TINY, *more, cwd=tiny_data)
        assert (done.returncode, done.stderr) == (0, "")
    first, second = sorted(Path("out/quickstart/wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name
    for file, there in ((first, [0, 1, 2, 3]), (second, [3, 4, 5, 6])):
        logged = history_of(file)
        assert [row["iter"] for row in logged if "tokens" in row] == there
        tables = [row for row in logged if row.get("samples._type") == "table-file"]
        assert [row["iter"] for row in tables] == [i for i in there if i % 3 == 0]
        assert logged[-1]["metrics._type"] == "image-file"
        picture = file.parent / "files" / logged[-1]["metrics.path"]
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.read_bytes() == Path("out/quickstart/metrics.png").read_bytes()
    assert iters(Path("out/quickstart/metrics.csv")) == [*range(7)]


def test_wandb_run_goes_on_after_a_part_of_the_training_without_it(tiny_data, monkeypatch):
    asked = []

    def start(mode, project, folder, config, run_id):
        if mode == "disabled":
            return None
        asked.append(run_id)
        return SimpleNamespace(id="abcd1234", log=lambda row: None, finish=lambda: None)

    monkeypatch.setattr(train, "start_wandb", start)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    for i, mode in ((2, "offline"), (4, "disabled"), (6, "offline")):
        train_here("--max_iters", i, "--wandb", mode, "--sample_tokens", 0, "--resume", "auto")
    assert asked == [None, "abcd1234"]


def test_wandb_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    """Its service is gone for a while, its temporary folder is full: said once, and the log is whole."""
    took = []

    def fail(*words):
        raise OSError(28, "No space left on device")

    def take(row):
        took.append(row)
        if row.get("iter") == 10 or row == "end":
            raise ConnectionError

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=fail, Image=fail))
    run = RunLog(tmp_path, 0, 20, SimpleNamespace(log=take, finish=lambda: take("end")))
    for i in (0, 10, 20):
        run.write({"iter": i})
    log_samples(run, 20, "ab")
    run.write_picture(base64.b64decode(DOT))
    run.close()
    assert took == [{"iter": 0}, {"iter": 10}, {"iter": 20}, "end"]
    assert capsys.readouterr().err == f"warning: wandb: ConnectionError; what it misses is in {tmp_path}\n"
    assert iters(tmp_path / "metrics.csv") == [0, 10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.png", "samples.txt"]


def test_wandb_that_is_not_installed(tmp_path, monkeypatch, capsys):
    """Without --wandb it is not even imported."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb: ImportError
    assert start_wandb("disabled", "flatgpt", tmp_path, {}) is None
    assert capsys.readouterr().err == ""
    assert start_wandb("online", "flatgpt", tmp_path, {}) is None
    assert "pip install wandb" in capsys.readouterr().err
