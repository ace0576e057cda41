"""prepare_data.py on a small file system, full or read-only."""

import gc
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from prepared import from_text, refusal

from flatgpt.data.dataset import open_dataset

FOLDER = Path("data/mine")


@pytest.fixture
def small_disk(in_tmp):
    """A file system of one megabyte in data/, and a function that mounts it again with other options."""
    Path("data").mkdir()

    def mount(*words) -> bool:
        return subprocess.run(["mount", "-t", "tmpfs", *words, "none", "data"], capture_output=True).returncode == 0

    if shutil.which("mount") is None or not mount("-o", "size=1m"):
        pytest.skip("no file system can be mounted here: it takes root, and Linux")
    yield lambda options: mount("-o", f"remount,{options}") or pytest.fail("remount")
    gc.collect()  # an error keeps the frames alive that have the files open
    subprocess.run(["umount", "data"], check=True)


@pytest.mark.slow
def test_full_disk_stops_a_preparation_that_goes_on_later(small_disk):
    texts = [f"{n} bottles " * 100 for n in range(1500)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for _ in range(2):
        assert "No space left on device" in refusal("a.jsonl", name="mine", shard_tokens=100_000)
    assert len(list(FOLDER.glob("train_*.bin"))) >= 4
    small_disk("size=20m")
    from_text("a.jsonl", name="mine", shard_tokens=100_000)
    splits = open_dataset(FOLDER).meta["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(texts)


@pytest.mark.slow
def test_read_only_disk_is_an_error(small_disk):
    Path("a.txt").write_text("some text\n" * 1000)
    small_disk("ro")
    answer = refusal("a.txt")
    assert answer.startswith("data/text_byte could not be written: Read-only file system")
