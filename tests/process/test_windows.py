"""The scripts on Windows, without WSL: a process without the modules, functions and signals that Windows lacks."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from processes import ROOT

SMALL = "--n_layer 1 --n_head 2 --n_embd 32 --context_length 32 --batch_size 4 --eval_batches 1 --device cpu"


def test_quickstart_runs_without_what_windows_lacks(in_tmp):
    """Every module is imported, too. `last` and `best` are files."""
    train = f"train {SMALL} --dtype float32 --eval_interval 1 --sample_tokens 4"
    calls = ["prepare_data pydoc", f"{train} --max_iters 1", f"{train} --max_iters 2 --resume", "plot", "train --list"]
    calls += ["infer --max_new_tokens 4 --dtype float32", "eval --eval_batches 2"]
    words = [sys.executable, str(ROOT / "tests/support/windows.py"), json.dumps([shlex.split(call) for call in calls])]
    done = subprocess.run(words, env=os.environ | {"PYTHONUTF8": "0"}, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    assert Path("out/quickstart/ckpt/last").read_text() == "iter_000002"
    assert Path("out/quickstart/metrics.png").exists()
    assert b"warning" not in done.stderr
