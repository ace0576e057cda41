"""A small disk that is full or read-only: what train.py and prepare_data.py say, and how they go on."""

import gc
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from in_process import train_here
from prepared import from_text, refusal
from run_files import rows, same, saved_iters, weights

from config import UserError
from flatgpt.data.dataset import open_dataset
from flatgpt.runs import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(in_tmp):
    """small_disk("size=1m"): mount a file system in the folder disk/, or change the one that is mounted there."""
    Path("disk").mkdir()
    mounted = []

    def mount(options: str) -> None:
        call = ["mount", "-t", "tmpfs", "-o", f"{'remount,' * bool(mounted)}{options}", "none", "disk"]
        if shutil.which("mount") is None or subprocess.run(call, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here: it takes root, and Linux")
        mounted.append(options)

    yield mount
    gc.collect()  # an error keeps the frames alive that have the files open
    if mounted:
        subprocess.run(["umount", "disk"], check=True)


def test_full_disk_ends_the_run_and_with_room_it_goes_on(tiny_data, small_disk):
    small_disk("size=3500k")
    run, larger = Path("disk/run"), ("--n_embd", 64, "--sample_tokens", 0, "--max_iters", 15, "--keep_checkpoints", 9)
    with pytest.raises(UserError) as caught:
        train_here(*larger, "--out_dir", run, "--resume", "auto")
    assert re.fullmatch(
        r"checkpoint disk/run/ckpt/iter_000009 could not be written: "
        r"(model\.safetensors: .*No space left on device.*|train_state\.pt: only a part of it was taken: a full .*)\. "
        r"1\.5 MB are needed, 0\.\d MB are free now\. "
        r"Still there: iter_000006, iter_000003\. Make room; a run that ended goes on with --resume",
        str(caught.value),
    ), caught.value
    assert [checkpoint.verify(folder)["iter"] for folder in checkpoint.checkpoints(run)] == [6, 3]
    assert {path.name for path in (run / "ckpt").iterdir()} == {"last", "best", "iter_000006", "iter_000003"}
    small_disk("size=16m")
    train_here(*larger, "--out_dir", run, "--resume", "auto")
    whole = train_here(*larger, "--out_dir", "out/whole")
    assert saved_iters(run) == [15, 12, 9, 6, 3]
    assert same(weights(run), weights(whole))
    assert rows(run) == rows(whole)


def test_full_disk_stops_a_preparation_that_goes_on_later(small_disk, monkeypatch):
    small_disk("size=1m")
    texts = [f"{n} bottles " * 100 for n in range(1500)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"name": "mine", "data_dir": "disk"}
    assert "GB are needed in" in refusal("a.jsonl", **settings)  # by the estimate
    assert not list(Path("disk").iterdir())
    with monkeypatch.context() as patch:  # an estimate that is too low
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        for _ in range(2):
            assert "No space left on device" in refusal("a.jsonl", shard_tokens=100_000, **settings)
        assert len(list(Path("disk/mine").glob("train_*.bin"))) >= 4
    small_disk("size=20m")
    from_text("a.jsonl", shard_tokens=100_000, **settings)
    splits = open_dataset(Path("disk/mine")).meta["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(texts)


def test_read_only_disk_is_an_error(small_disk):
    Path("a.txt").write_text("some text\n" * 1000)
    small_disk("ro")
    answer = refusal("a.txt", data_dir="disk")
    assert answer == "disk/text_byte could not be written: Read-only file system; another place: --data_dir"
