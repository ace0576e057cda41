"""A disk that fills while a run saves: what is lost, what is said, and how the run goes on."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from in_process import TINY, train_here
from processes import ROOT
from run_files import rows, same, weights

from flatgpt.runs import checkpoint

LARGER = ("--n_embd", 64, "--sample_tokens", 0, "--max_iters", 15)  # 1.5 MB a checkpoint


class Disk:
    """A small disk, mounted where only those see it whom `holder` keeps a place for.

    Attributes:
        folder: as they see it.
        seen: the same, from here.
    """

    def __init__(self, folder: Path, how: list[str], size: str):
        script = 'mount -t tmpfs -o size="$1" none "$2" && echo ready && exec sleep 600'
        self.folder, self.how = folder, how
        self.holder = subprocess.Popen(
            ["unshare", *how, "sh", "-c", script, "sh", size, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.ready = self.holder.stdout.readline() == b"ready\n"
        self.seen = Path(f"/proc/{self.holder.pid}/root{folder}")

    def inside(self, *words) -> list[str]:
        """The command that runs a command where the disk is."""
        user = ["--user", "--preserve-credentials"] if "--user" in self.how else []
        return ["nsenter", *user, "--mount", "--target", str(self.holder.pid), *map(str, words)]

    def train(self, *words) -> subprocess.CompletedProcess:
        """train.py, its run on the disk; what it prints lies in printed.txt and said.txt of the current folder."""
        call = [sys.executable, ROOT / "train.py", *TINY, *LARGER, "--out_dir", self.folder / "run", *words]
        there = self.inside("env", "-C", Path.cwd(), *call)
        with open("printed.txt", "w") as out, open("said.txt", "w") as err:
            done = subprocess.run(there, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=300)
        return subprocess.CompletedProcess(
            there, done.returncode, Path("printed.txt").read_text(), Path("said.txt").read_text()
        )

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()


@pytest.fixture
def disk(tiny_data, tmp_path):
    """disk(size): a Disk of that size, 4m for one."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no unshare or nsenter here (Linux, util-linux)")
    made = []

    def make(size: str) -> Disk:
        (tmp_path / "disk").mkdir()
        for how in (["--mount"], ["--user", "--mount", "--map-root-user"]):
            made.append(Disk(tmp_path / "disk", how, size))
            if made[-1].ready:
                return made[-1]
        pytest.skip("unshare may not mount here, neither as it is nor with --user")

    yield make
    for one in made:
        one.close()


@pytest.mark.slow
def test_full_disk_ends_the_run_and_with_room_it_goes_on(disk, tmp_path):
    place = disk("3500k")
    words = ("--keep_checkpoints", 9, "--resume", "auto")
    done = place.train(*words)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        rf"error: checkpoint {place.folder}/run/ckpt/iter_000009 could not be written: "
        r"(model\.safetensors: .*No space left on device.*|train_state\.pt: only a part of it was taken: a full .*)\. "
        r"1\.5 MB are needed, 0\.\d MB were written, 0\.\d MB are free now\. "
        r"Still there: iter 6, iter 3\. Make room; a run that ended goes on with --resume\n",
        done.stderr,
    ), done.stderr
    run = place.seen / "run"
    assert [checkpoint.verify(folder)["iter"] for folder in checkpoint.checkpoints(run)] == [6, 3]
    assert {p.name for p in (run / "ckpt").iterdir()} == {"last", "best", "iter_000006", "iter_000003"}
    subprocess.run(place.inside("mount", "-o", "remount,size=16m", place.folder), check=True)
    done = place.train(*words)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {place.folder}/run/ckpt/iter_000006" in done.stdout
    whole = train_here(*LARGER, "--keep_checkpoints", 9, "--out_dir", "out/whole")
    assert [checkpoint.read_state(folder)["iter"] for folder in checkpoint.checkpoints(run)] == [15, 12, 9, 6, 3]
    assert same(weights(run), weights(whole))
    assert rows(run) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_full_disk_can_be_a_warning(disk, tmp_path, room):
    """A thread makes room, or nobody does: the checkpoint of the end is what the exit code is about."""
    place, stop = disk("9m"), threading.Event()
    (place.seen / "ballast").write_bytes(bytes(7_000_000))

    def make_room() -> None:
        while not stop.wait(0.02):
            if Path("said.txt").exists() and Path("said.txt").read_text().count("could not be written") >= 2:
                (place.seen / "ballast").unlink()
                return

    helper = threading.Thread(target=make_room)
    if room:
        helper.start()
    try:
        words = ("--max_iters", 1000 if room else 60, "--eval_interval", 20, "--keep_checkpoints", 1)
        done = place.train("--on_save_error", "warn", "--eval_batches", 2, *words)
    finally:
        stop.set()
    run, said = place.seen / "run", done.stderr.splitlines()
    error = None if room else said.pop()
    assert len(said) >= 2
    for line in said:
        assert re.match(
            r"warning: checkpoint .*could not be written: .* Training goes on \(on_save_error = warn\)$", line
        )
    first = int(re.search(r"iter_(\d+) could not be written", said[0])[1])
    assert int(rows(run)[-1]["iter"]) == (1000 if room else 60)  # metrics.csv has its page of the disk
    if room:
        assert done.returncode == 0, done.stderr
        assert checkpoint.verify(run / "ckpt/last")["iter"] == 1000
        assert checkpoint.read_state(run / "ckpt/last")["finished"]
    else:
        assert done.returncode == 2
        assert error.startswith("error: the run ends at iter 60, and its last checkpoint is not there: checkpoint ")
        assert checkpoint.verify(run / "ckpt/last")["iter"] == first - 20
        assert not checkpoint.read_state(run / "ckpt/last")["finished"]
