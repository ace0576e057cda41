"""Weights & Biases: what a run stores there, without a key and without a network, and under which id it goes on."""

import base64
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from in_process import train_here
from processes import ROOT

import train

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="  # PNG, 1 x 1
LOG = f"""
import base64, sys
from pathlib import Path
from flatgpt.runs.run_log import RunLog
from flatgpt.runs.run_log import start_wandb
log = RunLog(Path("."), 0, 3, start_wandb(sys.argv[1], "flatgpt", Path("."), {{"lr": 0.25}}, "abcd1234"))
log.write({{"iter": 20, "train_loss": 2.5}})
log.write({{"iter": 10, "train_loss": 2.25, "val_loss": 3.5}})
log.write_samples({{"iter": 10, "val_loss": 3.5}}, ["a", "東"], ["ab <b>", "東京 🎈"])
log.write_picture(base64.b64decode("{DOT}"))
log.close()
"""
NOWHERE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("mode", "env", "said"),
    [
        ("offline", {}, ""),
        ("online", {}, "warning: wandb online: no API key"),
        pytest.param(
            "online", NOWHERE, "warning: wandb online: ", marks=pytest.mark.slow
        ),  # it tries for half a minute
    ],
)
def test_run_is_stored_and_asks_nothing(tmp_path, mode, env, said):
    """Also a row of a lower iteration, as after a resume. online becomes offline, with a warning."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **env}
    call = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", LOG, mode], timeout=120, **call)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert bool(done.stderr) == ("wandb sync" in done.stderr) == bool(said)
    assert "Traceback" not in done.stderr
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-abcd1234.wandb")
    content = stored.read_bytes()
    assert content.count(b"train_loss") >= 2
    assert all(value in content for value in (b"2.5", b"2.25", b"3.5", b"0.25"))
    (table,) = stored.parent.glob("files/media/table/*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["iter", "prompt", "text"],
        "data": [[10, "a", "ab <b>"], [10, "東", "東京 🎈"]],
    }
    (picture,) = stored.parent.glob("files/media/images/*.png")
    assert picture.read_bytes() == base64.b64decode(DOT)


def test_run_goes_on_under_its_id_after_a_part_of_the_training_without_wandb(tiny_data, monkeypatch):
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
