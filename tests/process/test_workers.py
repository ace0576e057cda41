"""prepare_data.py with processes: the same bytes for any number, here and on Dask; signals, deaths and memory."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from dataset_files import mixed, texts_by_split
from prepared import content, from_text, refusal
from processes import ROOT, SYNTHETIC, command

from flatgpt.data import prepare, workers

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FEW = ("--tokenizer", "byte", "--shard_tokens", 100_000, "--workers", 2, "--name", "mine")

DONE = 23  # shards of the first ten tasks

# prepare_data.py with tasks of 256 KB, of which the 11th and later ones (of 32) wait until a file `go` exists: in the
# worker processes, which import this file too; with --cluster, in the process that was started.
HELD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from flatgpt.cli.cli import from_command_line, run_script
from config import PrepareConfig
import prepare_data
from flatgpt.data import encode, prepare, readers

readers.CHUNK_BYTES, prepare.MIN_POOL_BYTES = 1 << 18, 0
encode_task, advance = encode.encode_task, prepare.Preparation._advance

def hold():
    open(f"held_{{os.getpid()}}", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)

def held_encode_task(job, task):
    if task.read.args[-1] > 3150:  # the first line's number
        hold()
    return encode_task(job, task)

def held_advance(work, name, state, *words):
    advance(work, name, state, *words)
    if state["tasks"] == 10:
        hold()

if "--cluster" in sys.argv:
    prepare.Preparation._advance = held_advance
else:
    # as pickle sends it to a worker, by name
    held_encode_task.__module__, held_encode_task.__qualname__ = "flatgpt.data.encode", "encode_task"
    encode.encode_task = prepare.encode_task = held_encode_task
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


@pytest.fixture
def work(big, in_tmp):
    """A function that starts held.py on big.jsonl in the current folder; its processes end with the test."""
    started = []

    def start(*words) -> subprocess.Popen:
        """Start it and return once it is held: ten tasks are done, and each of two worker processes is in the middle
        of one."""
        call = [sys.executable, big / "held.py", "text", "--input", big / "big.jsonl", *FEW, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        process = subprocess.Popen(list(map(str, call)), start_new_session=True, **pipes)
        started.append(process)
        holding = 1 if "--cluster" in words else 2
        wait_for(lambda: len([*Path().glob("held_*")]) == holding or process.poll() is not None)
        wait_for(lambda: finished_shards() == DONE or process.poll() is not None)
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


def family(process: int) -> list[int]:
    """The process and its children, and theirs."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def encoders(process: int) -> list[int]:
    """Its worker processes."""

    def words(child: int) -> str:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{child}/cmdline").read_text()
        return ""

    return [child for child in family(process)[1:] if "spawn_main" in words(child)]


def full_pipes(process: int) -> int:
    """How many pipes of a process hold at least 60 KB: a message of which the rest has not been read."""
    found = {}
    for name in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{process}/fd/{name}")
            if target.startswith("pipe:") and target not in found:
                handle = os.open(f"/proc/{process}/fd/{name}", os.O_RDONLY | os.O_NONBLOCK)
                found[target] = struct.unpack("i", fcntl.ioctl(handle, termios.FIONREAD, bytes(4)))[0]
                os.close(handle)
    return sum(size >= 60_000 for size in found.values())


def finished_shards() -> int:
    """Of whole tasks."""
    return len(json.loads(Path("data/mine/progress.json").read_text())["splits"]["train"]["files"])


def finish(big: Path, *words) -> None:
    """The same command again, without a signal: what it makes is whole."""
    let_go()
    call = [sys.executable, big / "held.py", "text", "--input", big / "big.jsonl", *FEW, *words]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("data/mine: going on where the work was stopped\n")
    assert content(Path("data/mine")) == content(big / "whole/data/mine")


# ---------------------------------------------------------------------------------------------------------------------
# the same bytes


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_any_number_of_workers_gives_the_same_bytes(in_tmp, monkeypatch, name):
    pool, pools = workers.local_pool, []
    monkeypatch.setattr(workers, "local_pool", lambda n: pools.append(n) or pool(n))
    written = mixed()
    settings = {"tokenizer": name, "test_fraction": 0.1, "shard_tokens": 2000}
    here = from_text("in", **settings, name="here")
    assert pools == []
    assert name != "byte" or sorted(itertools.chain(*texts_by_split(here).values())) == sorted(written)
    monkeypatch.setattr(prepare, "MIN_POOL_BYTES", 0)
    for n in (1, 2, 3) if name == "byte" else (2,):
        assert content(from_text("in", **settings, name=f"of{n}", workers=n).folder) == content(here.folder)
    assert pools == ([1, 2, 3] if name == "byte" else [2])


@linux
def test_cores_are_those_that_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    assert workers.available_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert workers.available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


# ---------------------------------------------------------------------------------------------------------------------
# stopped, killed, in each other's way


@linux
@pytest.mark.parametrize("everybody", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_is_one_line_and_the_work_is_kept(work, big, everybody):
    """From a terminal it reaches all processes of the group, from kill -INT the first one only."""
    process = work()
    processes = family(process.pid)
    assert len(encoders(process.pid)) == 2
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
    let_go()  # it waits for the tasks in progress
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, "")
    assert err == "data/mine: stopped; what is done is kept, and the same command goes on from there\n"
    wait_for(lambda: not any(map(alive, processes)))
    assert finished_shards() == DONE
    finish(big)


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_it_goes_on_and_leaves_no_worker_behind(work, big, how):
    process = work()
    processes = family(process.pid)
    assert len(encoders(process.pid)) == 2
    process.send_signal(how)
    assert process.wait(100) == -how
    wait_for(lambda: not any(map(alive, processes)))
    assert finished_shards() == DONE
    finish(big, "--workers", 1)


@linux
@pytest.mark.parametrize("killed", ["one", "all", "all, writing"])
def test_worker_that_is_killed_is_one_error_line(work, big, killed):
    """In the middle of a message: half a task is in the pipe to the workers, or half a result in the pipe back."""
    process = work()
    processes, doomed = family(process.pid), encoders(process.pid)[: 1 if killed == "one" else 2]
    wait_for(lambda: full_pipes(process.pid) == 1)
    if killed == "all, writing":
        process.send_signal(signal.SIGSTOP)
        let_go()
        wait_for(lambda: full_pipes(process.pid) == 2)
    for child in doomed:
        os.kill(child, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: a worker was killed, perhaps for memory (fewer: --workers N); what is done is kept")
    wait_for(lambda: not any(map(alive, processes)))
    assert finished_shards() == DONE
    finish(big)


@linux
def test_bad_document_in_a_worker_is_one_error_line(big, in_tmp):
    shutil.copy(big / "big.jsonl", "bad.jsonl")
    with open("bad.jsonl", "a") as file:
        file.write('{"text": 7}\n')
    let_go()
    call = [sys.executable, big / "held.py", "text", "--input", "bad.jsonl", *map(str, FEW)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: bad.jsonl line 10,001: 'text' is a int, not a text\n"


@linux
def test_second_call_is_refused_and_the_first_goes_on(work, big):
    first = work()
    second = command("prepare_data", "text", "--input", big / "big.jsonl", *FEW, cwd=Path.cwd())
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == "error: data/mine: another prepare_data.py is at work in this folder; wait for it\n"
    let_go()
    out, err = first.communicate(timeout=100)
    assert (first.returncode, err) == (0, ""), out
    assert content(Path("data/mine")) == content(big / "whole/data/mine")


@linux
def test_lock_ends_with_the_process_though_a_worker_hangs(work, big):
    """The workers do not hold it."""
    process = work()
    child = encoders(process.pid)[0]
    os.kill(child, signal.SIGSTOP)
    process.kill()
    process.wait(100)
    assert alive(child)
    handle = os.open("data/mine", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    finish(big)


# ---------------------------------------------------------------------------------------------------------------------
# Dask


@contextlib.contextmanager
def new_cluster(tmp_path_factory):
    """A scheduler and workers of one thread each, as `dask scheduler` and `dask worker` start them, elsewhere: they
    run this checkout, and have neither our folder nor GPT-2's vocabulary. Gives its address and the processes."""
    folder, processes = tmp_path_factory.mktemp("cluster"), []
    environment = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *SYNTHETIC.values()])

    def start(what: str, *words) -> None:
        with open(folder / f"{len(processes)}.log", "w") as log:
            call = [sys.executable, "-m", f"distributed.cli.dask_{what}", *words]
            output = {"stdout": log, "stderr": log}
            processes.append(subprocess.Popen(call, cwd=folder, env=environment, **output))

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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """For those that leave it as it was."""
    with new_cluster(tmp_path_factory) as there:
        yield there


@pytest.fixture
def doomed(tmp_path_factory):
    with new_cluster(tmp_path_factory) as there:
        yield there


@pytest.mark.extra("distributed")
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_dask_gives_the_same_bytes(cluster, in_tmp, name):
    mixed()
    settings = {"tokenizer": name, "test_fraction": 0.1, "shard_tokens": 2000}
    here = from_text("in", **settings, name="here")
    there = from_text("in", **settings, name="there", cluster=cluster[0])
    assert content(there.folder) == content(here.folder)


@pytest.mark.extra("distributed")
@pytest.mark.parametrize("dies", [1, 2])
def test_dask_worker_that_is_killed_changes_nothing(doomed, work, big, dies):
    address, *processes = doomed
    process = work("--cluster", address)
    processes[dies].kill()
    let_go()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, out + err
    assert content(Path("data/mine")) == content(big / "whole/data/mine")


@pytest.mark.extra("distributed")
def test_ctrl_c_while_dask_works(cluster, work, big):
    process = work("--cluster", cluster[0])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, "")
    assert "data/mine: stopped; what is done is kept, and the same command goes on from there\n" in err
    finish(big)


@pytest.mark.extra("distributed")
def test_dask_scheduler_that_is_killed_is_an_error(doomed, work, big):
    address, scheduler, *_ = doomed
    process = work("--cluster", address)
    scheduler.kill()
    let_go()
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, ""), err
    assert err.splitlines()[-1].startswith("error: ")
    assert "what is done is kept" in err.splitlines()[-1]
    finish(big)


@pytest.mark.extra("distributed")
def test_no_dask_workers(doomed, in_tmp):
    address, _, *processes = doomed
    for process in processes:
        process.terminate()
        process.wait(100)
    Path("a.txt").write_text("some text\n" * 100)
    done = command("prepare_data", "text", "--input", "a.txt", "--tokenizer=byte", "--cluster", address, cwd=in_tmp)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: cluster = {address}: the scheduler has no workers; start some in a checkout")


@pytest.mark.extra("distributed")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense"])
def test_no_dask_scheduler(in_tmp, address):
    Path("a.txt").write_text("some text\n" * 100)
    done = command("prepare_data", "text", "--input", "a.txt", "--tokenizer=byte", "--cluster", address, cwd=in_tmp)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: cluster = {address}: no scheduler answers (")


def test_cluster_without_dask_is_one_error_line(in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    Path("a.txt").write_text("some text\n" * 100)
    answer = refusal("a.txt", cluster="tcp://127.0.0.1:1")
    assert answer == "--cluster needs Dask: pip install -r requirements-extra.txt (distributed)"


# ---------------------------------------------------------------------------------------------------------------------
# much


def memory(process: int) -> int:
    """Bytes of the process and all its children, what they share once."""
    total = 0
    for each in family(process):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def make_text(path: Path, size: int) -> None:
    """Text of that size: words in no order, so that no two pieces are alike."""
    words = np.array([f"{n % 977}{'abcdefgh'[n % 8] * (n % 9)} " for n in range(50_000)])
    random = np.random.default_rng(1)
    with open(path, "w") as file:
        while file.tell() < size:
            file.write("".join(words[random.integers(0, len(words), 500_000)]) + "\n")


def peak_memory(path: Path) -> int:
    """The peak memory in bytes of prepare_data.py and its workers on a file."""
    words = ["text", "--input", path, "--tokenizer", "byte", "--workers", 2, "--shard_tokens", 10_000_000]
    call, pipes = [sys.executable, ROOT / "prepare_data.py", *words], {"stdout": subprocess.DEVNULL}
    peak = 0
    with subprocess.Popen(list(map(str, call)), stderr=subprocess.PIPE, **pipes) as process:
        try:
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                time.sleep(0.05)
            assert (process.returncode, process.stderr.read()) == (0, b"")
        finally:
            process.kill()
    shutil.rmtree("data")
    return peak


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "txt"])
def test_memory_does_not_grow_with_the_input(in_tmp, kind):
    """A parquet file in one row group, and a text file, which is one document. From 100 MB on the workers'
    queues are full: another 150 MB of input take less than half of that in memory."""
    peaks = []
    for size in (100_000_000, 250_000_000):
        make_text(Path("a.txt"), size)
        if kind == "parquet":
            code = (
                "import pyarrow as pa, pyarrow.parquet as pq\n"
                "raw = open('a.txt').read()\n"
                "rows = pa.array([raw[k : k + 2000] for k in range(0, len(raw), 2000)])\n"
                "pq.write_table(pa.table({'text': rows}), 'a.parquet', row_group_size=10**9, use_dictionary=False)\n"
            )
            subprocess.run([sys.executable, "-c", code], check=True)
        peaks.append(peak_memory(Path(f"a.{kind}")))
        for path in in_tmp.glob("a.*"):
            path.unlink()
    assert peaks[0] > 100e6, "it was measured"
    assert peaks[1] - peaks[0] < 75_000_000
