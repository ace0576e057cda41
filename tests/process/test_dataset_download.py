"""Datasets as users have them: on the hub, with a download that is killed, and the shards of nanoGPT."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dataset_files import nanogpt
from hub_host import hub_environment
from in_process import TINY
from prepared import content, texts
from processes import ROOT, command, running

from flatgpt.data.dataset import open_dataset

pytestmark = pytest.mark.slow

ROWS = [f"text number {n}" for n in range(120)]
FIRST, SECOND = (f"train-0000{n}-of-00002.jsonl" for n in (0, 1))
FILES = {
    name: "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    for name, rows in ((FIRST, ROWS[:60]), (SECOND, ROWS[60:]))
}
RAW = Path("data/raw/hub/user/name")
WORDS = ["hub", "--repo", "user/name", "--tokenizer", "byte", "--val_fraction", "0.5"]


def test_killed_during_a_download(in_tmp, host):
    host.publish("user/name", FILES)
    halfway, killed = threading.Event(), threading.Event()
    host.faults[f"GET {SECOND}"] = iter([lambda: (halfway.set(), killed.wait(60))])
    env = {**os.environ, "PYTHONPATH": "", **hub_environment(host)}
    with running([sys.executable, ROOT / "prepare_data.py", *WORDS], env=env, stderr=subprocess.DEVNULL) as process:
        assert halfway.wait(60)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    killed.set()
    assert not (RAW / SECOND).exists()
    host.asked.clear()
    again = command("prepare_data", *WORDS, cwd=Path.cwd(), env=hub_environment(host))
    assert (again.returncode, again.stderr) == (0, "")
    assert host.fetched() == [SECOND]
    data = open_dataset(Path("data/name_byte"))
    assert sorted(texts(data, "train") + texts(data, "val")) == sorted(ROWS)
    host.stop()
    env = hub_environment(host, HF_HUB_OFFLINE="1")
    offline = command("prepare_data", *WORDS, "--name", "again", cwd=Path.cwd(), env=env)
    assert (offline.returncode, offline.stderr) == (0, "")
    assert content(Path("data/again")) == content(data.folder)


def test_shards_of_nanogpt_are_trained_and_scored(in_tmp, cli, gpt2_vocabulary):
    Path("data").mkdir()
    folder = nanogpt(Path("data/owt"), train=range(500), val=range(100))
    trained = cli("train", *TINY, "--dataset", "owt", "--max_iters", 2, "--eval_interval", 2, "--sample_tokens", 0)
    assert "data/owt has no meta.json: read as nanoGPT shards" in trained.out, trained.err
    scored = cli("eval", "--json", "-")
    assert f"{folder} has no meta.json" in scored.err
    assert json.loads(scored.out)["tokens"] == 99
