"""prepare_data.py with processes: the same bytes for any number, here and on Dask; signals, deaths and memory."""

import contextlib
import gc
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_files import mixed
from in_process import first_fast
from prepared import content, from_text, refusal
from processes import ROOT, SYNTHETIC, command, running

from config import UserError
from flatgpt.data import prepare, workers

pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FEW = ("--tokenizer", "byte", "--shard_tokens", 100_000, "--workers", 2, "--name", "mine")

# prepare_data.py with tasks of 256 KB. When ten tasks (of 32) are recorded, it waits until a file `go` exists.
HELD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from flatgpt.cli.cli import from_command_line, run_script
from config import PrepareConfig
import prepare_data
from flatgpt.data import chunks, prepare

chunks.CHUNK_BYTES, prepare.MIN_POOL_BYTES, prepare.SAVE_SECONDS = 1 << 18, 0, -1
write, saves = prepare.atomic_write, []

def write_and_hold(path, content):
    write(path, content)
    saves.append(path)
    if len(saves) == 11:  # the first one is before the first task
        open("held", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.01)

prepare.atomic_write = write_and_hold
if __name__ == "__main__":
    run_script(prepare_data.main, from_command_line(PrepareConfig, prepare_data.__doc__))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A folder with big.jsonl, 8 MB; held.py; and whole/data/mine, the dataset of big.jsonl: 80 shards."""
    folder = tmp_path_factory.mktemp("big")
    with open(folder / "big.jsonl", "w") as file:
        for n in range(10_000):
            file.write(json.dumps({"text": f"{n} green bottles hanging on the wall. " * 20}) + "\n")
    (folder / "held.py").write_text(HELD)
    (folder / "whole").mkdir()
    done = command("prepare_data", "text", "--input", folder / "big.jsonl", *FEW, cwd=folder / "whole")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def held_command(big: Path, *words) -> list[str]:
    return [str(word) for word in (sys.executable, big / "held.py", "text", "--input", big / "big.jsonl", *FEW, *words)]


@pytest.fixture
def work(big, in_tmp):
    """A function that starts held.py on big.jsonl in the current folder; its processes end with the test."""
    started = []

    def start(*words) -> subprocess.Popen:
        """Start it and return once it is held."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        process = subprocess.Popen(held_command(big, *words), start_new_session=True, **pipes)
        started.append(process)
        wait_for(lambda: Path("held").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def let_go() -> None:
    """Let all tasks go on."""
    Path("go").touch()


def wait_for(condition, seconds: float = 100):
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


def family(process: int) -> dict[int, str]:
    """The process and its children, and theirs, with their command lines; without those that have ended."""
    found, todo = {}, [process]
    for each in todo:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0]
            found |= {each: Path(f"/proc/{each}/cmdline").read_text()} if state not in "ZX" else {}
            for children in Path(f"/proc/{each}/task").glob("*/children"):
                todo += map(int, children.read_text().split())
    return found


def encoders(process: int) -> list[int]:
    """Its worker processes."""
    return [child for child, words in family(process).items() if "spawn_main" in words]


def finish(big: Path, *words) -> None:
    """The same command again, without a signal: it goes on, and what it makes is whole."""
    assert json.loads(Path("data/mine/progress.json").read_text())["passes"]["train"]["tasks"] >= 10
    let_go()
    done = subprocess.run(held_command(big, *words), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("data/mine: resuming\n")
    assert content(Path("data/mine")) == content(big / "whole/data/mine")


# ---------------------------------------------------------------------------------------------------------------------
# in order


def test_results_come_in_order_and_few_tasks_are_read_ahead():
    submitted = []

    def submit(function, task):
        submitted.append(task)
        return SimpleNamespace(result=lambda: function(task))

    for n, found in enumerate(workers.in_order(submit, 4, lambda task: task * task, range(20))):
        assert found == (n, n * n)
        assert submitted == list(range(min(20, n + 4)))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", first_fast(["gpt2", "byte"]))
def test_any_number_of_workers_gives_the_same_bytes(in_tmp, monkeypatch, name):
    pool, pools = workers.local_pool, []
    monkeypatch.setattr(workers, "local_pool", lambda n: pools.append(n) or pool(n))
    mixed()
    settings = {"tokenizer": name, "test_fraction": 0.1, "shard_tokens": 2000}
    here = from_text("in", **settings, name="here")
    assert pools == []
    monkeypatch.setattr(prepare, "MIN_POOL_BYTES", 0)
    for n in (1, 3) if name == "byte" else (2,):
        assert content(from_text("in", **settings, name=f"of{n}", workers=n).folder) == content(here.folder)
    assert pools == ([1, 3] if name == "byte" else [2])


# ---------------------------------------------------------------------------------------------------------------------
# stopped, killed, in each other's way


@linux
@pytest.mark.parametrize("everybody", first_fast([True, False]), ids=["terminal", "kill"])
def test_ctrl_c_is_one_line_and_the_work_is_kept(work, big, everybody):
    """From a terminal it reaches all processes of the group, from kill -INT the first one only."""
    process = work()
    processes = family(process.pid)
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, "")
    assert err == "data/mine: stopped; run the same command again to resume\n"
    wait_for(lambda: not any(map(family, processes)))
    finish(big)


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_it_goes_on_and_leaves_no_worker_behind(work, big, how):
    """A worker that hangs does not hold the lock of the folder."""
    process = work()
    processes, (hanging, _) = family(process.pid), encoders(process.pid)
    os.kill(hanging, signal.SIGSTOP)
    process.send_signal(how)
    assert process.wait(100) == -how
    finish(big, "--workers", 1)
    assert family(hanging)
    os.kill(hanging, signal.SIGCONT)
    wait_for(lambda: not any(map(family, processes)))


@linux
@pytest.mark.parametrize("killed", first_fast([1, 2]))
def test_worker_that_is_killed_is_one_error_line(work, big, killed):
    process = work()
    processes = family(process.pid)
    for child in encoders(process.pid)[:killed]:
        os.kill(child, signal.SIGKILL)
    let_go()
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(
        "error: a worker was killed, perhaps out of memory (use fewer with --workers N); run the same"
    )
    wait_for(lambda: not any(map(family, processes)))
    finish(big)


def die_while_sending(task) -> None:
    """Kill this process, a worker, when it has sent the length of a message and a part of it."""
    (connection,) = [each for each in gc.get_objects() if isinstance(each, Connection)]
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)


def test_worker_that_is_killed_while_it_sends_is_an_error():
    with pytest.raises(UserError, match="a worker was killed"), workers.local_pool(2) as run:
        list(run(die_while_sending, range(9)))


def test_error_in_a_worker_has_its_traceback():
    with pytest.raises(ValueError, match="invalid literal") as caught, workers.local_pool(1) as run:
        list(run(int, ["1", "x"]))
    assert "function(task)" in caught.value.__notes__[0]


# ---------------------------------------------------------------------------------------------------------------------
# Dask


@pytest.fixture
def cluster(tmp_path_factory):
    """A scheduler and two workers of one thread each, as `dask scheduler` and `dask worker` start them, elsewhere: they
    run this checkout, and do not have our current folder. Gives its address and the processes."""
    folder, processes = tmp_path_factory.mktemp("cluster"), []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *SYNTHETIC.values()])}

    def start(what: str, *words) -> None:
        with open(folder / f"{len(processes)}.log", "w") as log:
            call = [sys.executable, "-m", f"distributed.cli.dask_{what}", *words]
            processes.append(subprocess.Popen(call, cwd=folder, env=environment, stdout=log, stderr=log))

    def said(pattern: str) -> list[str]:
        """Matches in the scheduler's log."""
        return re.findall(pattern, (folder / "0.log").read_text())

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        (address,) = wait_for(lambda: said(r"Scheduler at: +(tcp://127\.0\.0\.1:\d+)\n"))
        for _ in range(2):
            start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        wait_for(lambda: len(said("Register worker addr")) == 2)
        yield address, *processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.extra("distributed")
@pytest.mark.usefixtures("small_chunks")
def test_dask_gives_the_same_bytes(cluster, in_tmp):
    mixed()
    for name in ("byte", "gpt2"):
        settings = {"tokenizer": name, "test_fraction": 0.1, "shard_tokens": 2000}
        here = from_text("in", **settings, name=f"here_{name}")
        there = from_text("in", **settings, name=f"there_{name}", cluster=cluster[0])
        assert content(there.folder) == content(here.folder)


@pytest.mark.extra("distributed")
@pytest.mark.parametrize(("part", "code"), [("worker", 0), ("scheduler", 2)])
def test_dask_cluster_of_which_a_part_is_killed(cluster, work, big, part, code):
    """A worker changes nothing. Without a scheduler the work ends, and goes on without a cluster."""
    address, scheduler, worker, _ = cluster
    process = work("--cluster", address)
    (worker if part == "worker" else scheduler).kill()
    let_go()
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, out + err
    if part == "worker":
        assert content(Path("data/mine")) == content(big / "whole/data/mine")
        return
    assert re.match(r"error: the cluster at tcp://.*; run the same command again", err.splitlines()[-1])
    finish(big)


@pytest.mark.extra("distributed")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", None])
def test_dask_cluster_that_cannot_be_used_is_one_error_line(request, in_tmp, address):
    """No scheduler, or one without workers."""
    if address is None:
        address, _, *processes = request.getfixturevalue("cluster")
        for process in processes:
            process.terminate()
            process.wait(100)
    Path("a.txt").write_text("some text\n" * 100)
    done = command("prepare_data", "text", "--input", "a.txt", "--tokenizer=byte", "--cluster", address, cwd=in_tmp)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: cluster = {address}")
    assert "start workers in a checkout" in done.stderr


def test_cluster_without_dask_is_one_error_line(in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    Path("a.txt").write_text("some text\n" * 100)
    answer = refusal("a.txt", cluster="tcp://127.0.0.1:1")
    assert answer == "--cluster needs Dask: pip install -r requirements-extra.txt (distributed)"


# ---------------------------------------------------------------------------------------------------------------------
# much


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "txt"])
def test_memory_does_not_grow_with_the_input(in_tmp, kind):
    """A parquet file in one row group, and a text file, which is one document. From 100 MB on the workers'
    queues are full: another 150 MB of input take less than half of that in memory."""
    words = np.array([f"{n % 977}{'abcdefgh'[n % 8] * (n % 9)} " for n in range(50_000)])
    random, peaks = np.random.default_rng(1), []
    for megabytes in (100, 250):
        rows = ["".join(words[random.integers(0, len(words), 300)]) for _ in range(500 * megabytes)]
        if kind == "txt":
            Path("a.txt").write_text("\n".join(rows))
        else:
            pq.write_table(pa.table({"text": rows}), "a.parquet", row_group_size=10**9, use_dictionary=False)
        words_of_call = ["text", "--input", f"a.{kind}", "--tokenizer", "byte", "--workers", 2, "--name", megabytes]
        with running([sys.executable, ROOT / "prepare_data.py", *words_of_call], stdout=subprocess.DEVNULL) as process:
            peaks.append(0)
            while process.poll() is None:
                sizes = [re.findall(r"^Pss: +(\d+)", smaps(each), re.M) for each in family(process.pid)]
                peaks[-1] = max(peaks[-1], sum(1024 * int(size) for found in sizes for size in found))
                time.sleep(0.05)
            assert process.returncode == 0
    assert peaks[0] > 100e6, "it was measured"
    assert peaks[1] - peaks[0] < 75_000_000


def smaps(process: int) -> str:
    """What a process has in memory; what it shares with others counts in part."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/smaps_rollup").read_text()
    return ""
