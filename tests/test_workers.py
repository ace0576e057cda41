"""prepare_data.py with processes: the same bytes for any number, here and on Dask; signals, deaths and memory."""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SYNTHETIC, command
from test_plan import held, small_blocks
from test_preparation import mixed
from test_sources import content, from_text, refusal

import preparation
import workers
from dataset import open_dataset

__all__ = ["small_blocks"]  # a fixture

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FEW = ("--tokenizer", "byte", "--shard_tokens", 250_000, "--workers", 2, "--name", "mine")


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A folder with big.jsonl, 83 MB, and whole/data/mine, the dataset that it makes: 330 shards."""
    folder = tmp_path_factory.mktemp("big")
    with open(folder / "big.jsonl", "w") as file:
        for n in range(100_000):
            file.write(json.dumps({"text": f"{n} green bottles hanging on the wall. " * 20}) + "\n")
    (folder / "whole").mkdir()
    done = command("prepare_data", "text", "--input", folder / "big.jsonl", *FEW, cwd=folder / "whole")
    assert (done.returncode, done.stderr) == (0, "")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def work(big, in_tmp):
    """The current folder, with the call that starts the work on big.jsonl there; ends what is left of it."""
    started = []

    def start(*words, wait: str = "train_000040.bin") -> subprocess.Popen:
        """Go as far as to that file."""
        call = [sys.executable, ROOT / "prepare_data.py", "text", "--input", big / "big.jsonl", *FEW, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        process = subprocess.Popen(list(map(str, call)), start_new_session=True, **pipes)
        started.append(process)
        wait_for(lambda: Path("data/mine", wait).exists() or process.poll() is not None, step=0.001)
        assert process.poll() is None, process.communicate()
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    shutil.rmtree("data", ignore_errors=True)


def wait_for(condition, seconds: float = 30, step: float = 0.02):
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(step)
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


def finished_shards() -> int:
    """Of whole tasks."""
    return len(json.loads(Path("data/mine/progress.json").read_text())["splits"]["train"]["files"])


def finish(big: Path, *words) -> None:
    """The same command again, without a signal: what it makes is whole."""
    done = command("prepare_data", "text", "--input", big / "big.jsonl", *FEW, *words, cwd=Path.cwd())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("data/mine: going on where the work was stopped\n")
    assert content(Path("data/mine")) == content(big / "whole/data/mine")


# ---------------------------------------------------------------------------------------------------------------------
# the same bytes


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_any_number_of_workers_gives_the_same_bytes(in_tmp, monkeypatch, name):
    pool, pools = workers.local_pool, []
    monkeypatch.setattr(workers, "local_pool", lambda n: pools.append(n) or pool(n))
    written = mixed()
    settings = {"tokenizer": name, "test_fraction": 0.1, "shard_tokens": 2000}
    here = from_text("in", **settings, name="here")
    assert pools == []
    assert name != "byte" or sorted(sum(held(here).values(), [])) == sorted(written)  # noqa: RUF017, it is short
    monkeypatch.setattr(preparation, "BLOCK", 0)  # nothing is too small for a pool
    for n in (1, 2, 3) if name == "byte" else (2,):
        assert content(from_text("in", **settings, name=f"of{n}", workers=n).folder) == content(here.folder)
    assert pools == ([1, 2, 3] if name == "byte" else [2])


def test_sample_of_a_pool_is_that_of_one_process(in_tmp, monkeypatch, small_blocks):
    """Tasks that went out ahead and are not needed change nothing."""
    mixed()
    here = from_text("in", sample_size=130, name="here")
    monkeypatch.setattr(preparation, "BLOCK", 0)
    assert content(from_text("in", sample_size=130, workers=2).folder) == content(here.folder)


@linux
def test_cores_are_those_that_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    assert workers.cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert workers.cores() == 1
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
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "data/mine: stopped; what is done is kept, and the same command goes on from there\n"
    wait_for(lambda: not any(map(alive, processes)), 5)
    assert finished_shards() >= 20
    finish(big)


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_it_goes_on_and_leaves_no_worker_behind(work, big, how):
    process = work()
    processes = family(process.pid)
    assert len(encoders(process.pid)) == 2
    process.send_signal(how)
    assert process.wait(20) == -how
    wait_for(lambda: not any(map(alive, processes)), 5)
    assert finished_shards() >= 20
    finish(big, "--workers", 1)


@linux
@pytest.mark.parametrize("asleep", ["nobody", "the workers", "their parent"])
def test_worker_that_is_killed_is_one_error_line(work, big, asleep):
    """Also in the middle of a message: with half a task in the pipe to it, or half of what it gives in the one back."""
    process = work()
    processes, doomed = family(process.pid), encoders(process.pid)[: 1 if asleep == "nobody" else 2]
    for each in {"nobody": [], "the workers": doomed, "their parent": [process.pid]}[asleep]:
        os.kill(each, signal.SIGSTOP)
    time.sleep(0.5)  # until the pipe is full
    for child in doomed:
        os.kill(child, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: a worker was killed, perhaps for memory (fewer: --workers N); what is done is kept")
    wait_for(lambda: not any(map(alive, processes)), 5)
    assert finished_shards() >= 20
    finish(big)


@linux
def test_bad_document_in_a_worker_is_one_error_line(big, in_tmp):
    shutil.copy(big / "big.jsonl", "bad.jsonl")
    with open("bad.jsonl", "a") as file:
        file.write('{"text": 7}\n')
    done = command("prepare_data", "text", "--input", "bad.jsonl", *FEW, cwd=in_tmp)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: bad.jsonl line 100,001: 'text' is a int, not a text\n"


@linux
def test_second_call_is_refused_and_the_first_goes_on(work, big):
    first = work()
    os.killpg(first.pid, signal.SIGSTOP)
    second = command("prepare_data", "text", "--input", big / "big.jsonl", *FEW, cwd=Path.cwd())
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == "error: data/mine: another prepare_data.py is at work in this folder; wait for it\n"
    os.killpg(first.pid, signal.SIGCONT)
    out, err = first.communicate(timeout=60)
    assert (first.returncode, err) == (0, ""), out
    assert content(Path("data/mine")) == content(big / "whole/data/mine")


@linux
def test_lock_ends_with_the_process_though_a_worker_hangs(work, big):
    """The workers do not hold it."""
    process = work()
    child = encoders(process.pid)[0]
    os.kill(child, signal.SIGSTOP)
    process.kill()
    process.wait(20)
    assert alive(child)
    handle = os.open("data/mine", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    finish(big)


# ---------------------------------------------------------------------------------------------------------------------
# Dask


@pytest.fixture(scope="module")
def dask() -> None:
    if importlib.util.find_spec("distributed") is None:
        reason = "distributed is not installed: pip install -r requirements-extra.txt"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@contextlib.contextmanager
def new_cluster(tmp_path_factory):
    """A scheduler and workers of one thread each, as `dask scheduler` and `dask worker` start them, elsewhere: they
    have neither our folder, nor our modules, nor GPT-2's vocabulary. Gives its address and the processes."""
    folder, processes = tmp_path_factory.mktemp("cluster"), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR"} | SYNTHETIC

    def start(what: str, *words) -> None:
        with open(folder / f"{len(processes)}.log", "w") as log:
            call = [sys.executable, "-m", f"distributed.cli.dask_{what}", *words]
            output = {"stdout": log, "stderr": log}
            processes.append(subprocess.Popen(call, cwd=folder, env=environment, **output))

    where = ("--host", "127.0.0.1", "--port", address.split(":")[-1], "--dashboard-address", "127.0.0.1:0")
    try:
        start("scheduler", *where)
        for _ in range(2):
            start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        wait_for(lambda: (folder / "0.log").read_text().count("Register worker addr") == 2)
        yield address, *processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(dask, tmp_path_factory):
    """For those that leave it as it was."""
    with new_cluster(tmp_path_factory) as there:
        yield there


@pytest.fixture
def doomed(dask, tmp_path_factory):
    with new_cluster(tmp_path_factory) as there:
        yield there


@pytest.mark.extra
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_dask_gives_the_same_bytes(cluster, in_tmp, name):
    mixed()
    settings = {"tokenizer": name, "test_fraction": 0.1, "shard_tokens": 2000}
    here = from_text("in", **settings, name="here")
    there = from_text("in", **settings, name="there", cluster=cluster[0])
    assert content(there.folder) == content(here.folder)


@pytest.mark.extra
@pytest.mark.parametrize("dies", [1, 2])
def test_dask_worker_that_is_killed_changes_nothing(doomed, work, big, dies):
    address, *processes = doomed
    process = work("--cluster", address)
    processes[dies].kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert content(Path("data/mine")) == content(big / "whole/data/mine")


@pytest.mark.extra
def test_ctrl_c_while_dask_works(cluster, work, big):
    process = work("--cluster", cluster[0])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "data/mine: stopped; what is done is kept, and the same command goes on from there\n" in err
    finish(big)


@pytest.mark.extra
def test_dask_scheduler_that_is_killed_is_an_error(doomed, work, big):
    address, scheduler, *_ = doomed
    process = work("--cluster", address)
    scheduler.kill()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, ""), err
    assert err.splitlines()[-1].startswith("error: ")
    assert "what is done is kept" in err.splitlines()[-1]
    finish(big)


@pytest.mark.extra
def test_no_dask_workers(doomed, in_tmp):
    address, _, *processes = doomed
    for process in processes:
        process.terminate()
        process.wait(20)
    Path("a.txt").write_text("some text\n" * 100)
    done = command("prepare_data", "text", "--input", "a.txt", "--tokenizer=byte", "--cluster", address, cwd=in_tmp)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: cluster = {address}: the scheduler has no workers; start some with")


@pytest.mark.extra
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense"])
def test_no_dask_scheduler(dask, in_tmp, address):
    Path("a.txt").write_text("some text\n" * 100)
    begun = time.monotonic()
    done = command("prepare_data", "text", "--input", "a.txt", "--tokenizer=byte", "--cluster", address, cwd=in_tmp)
    assert time.monotonic() - begun < 20
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: cluster = {address}: no scheduler answers (")


def test_cluster_without_dask_is_one_error_line(in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    Path("a.txt").write_text("some text\n" * 100)
    answer = refusal("a.txt", cluster="tcp://127.0.0.1:1")
    assert answer == "--cluster needs Dask: pip install -r requirements-extra.txt (distributed)"


# ---------------------------------------------------------------------------------------------------------------------
# much


def lines_of(path: Path, n: int) -> None:
    with open(path, "w") as file:
        file.writelines(f'{{"text": "{k}"}}\n' for k in range(n))


def test_a_million_tiny_documents(in_tmp):
    lines_of(Path("a.jsonl"), 1_000_000)
    done = command("prepare_data", "text", "--input", "a.jsonl", "--tokenizer", "byte", "--name", "mine", cwd=in_tmp)
    assert (done.returncode, done.stderr) == (0, "")
    data = open_dataset(Path("data/mine"))
    entries = data.meta["splits"]
    assert sum(entry["documents"] for entry in entries.values()) == 1_000_000
    assert sum(entry["bytes"] for entry in entries.values()) == sum(len(str(n)) for n in range(1_000_000))
    numbers = [
        int(part) for split in entries for part in data.tokens(split)[:].astype("u1").tobytes().split(b"\0")[:-1]
    ]
    assert sorted(numbers) == list(range(1_000_000))


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


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "txt"])
def test_memory_does_not_grow_with_the_input(in_tmp, kind):
    """A parquet file of 300 MB in one row group, and a text file of 200 MB, which is one document."""
    make_text(Path("a.txt"), 200_000_000 if kind == "txt" else 300_000_000)
    if kind == "parquet":
        code = (
            "import pyarrow as pa, pyarrow.parquet as pq\n"
            "raw = open('a.txt').read()\n"
            "rows = pa.array([raw[k : k + 2000] for k in range(0, len(raw), 2000)])\n"
            "pq.write_table(pa.table({'text': rows}), 'a.parquet', row_group_size=10**9, use_dictionary=False)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    words = ["text", "--input", f"a.{kind}", "--tokenizer", "byte", "--workers", 2, "--shard_tokens", 10_000_000]
    process = subprocess.Popen(
        [sys.executable, ROOT / "prepare_data.py", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.05)
    assert (process.returncode, process.stderr.read()) == (0, b"")
    process.stderr.close()
    shutil.rmtree("data")
    for path in in_tmp.glob("a.*"):
        path.unlink()
    assert 100e6 < peak < (1 << 30) + 2 * 300_000_000
