"""A small disk that fills while a run saves: what is said, what stays valid, and how the run goes on."""

import gc
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from in_process import train_here
from run_files import rows, same, saved_iters, weights

from config import UserError
from flatgpt.runs import checkpoint


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
    gc.collect()  # an error keeps the frames alive that have files open there
    if mounted:
        subprocess.run(["umount", "disk"], check=True)


@pytest.mark.slow
def test_full_disk_ends_the_run_and_with_room_it_goes_on(tiny_data, small_disk):
    small_disk("size=3500k")
    run, larger = Path("disk/run"), ("--n_embd", 64, "--sample_tokens", 0, "--max_iters", 15, "--keep_checkpoints", 9)
    with pytest.raises(UserError) as caught:
        train_here(*larger, "--out_dir", run, "--resume", "auto")
    assert re.fullmatch(
        r"checkpoint disk/run/ckpt/iter_000009 \(1\.5 MB\) could not be written: "
        r"(model\.safetensors|train_state\.pt): .*No space left on device.* \(0\.\d MB are free now\)\. "
        r"Free disk space\. Existing checkpoints: iter_000006, iter_000003\. "
        r"To resume: python train\.py --resume disk/run",
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
