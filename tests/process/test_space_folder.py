"""The folder of export.py --space needs nothing but itself and the packages it requires."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from exported import export_here, files_in, save_run
from processes import SYNTHETIC

from flatgpt.data import tokenizer
from flatgpt.interop import space

ALONE = """
import importlib.util, json, pathlib, socket
def refuse(*words):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
here = pathlib.Path.cwd()
files = [file for file in sorted(here.glob("*.py")) if file.stem != "app" or importlib.util.find_spec("gradio")]
ours = [importlib.import_module(file.stem) for file in files]
import torch
from flatgpt.interop import loading
source = loading.find(".", print)
model, encoding = loading.load(source, torch.device("cpu"))
print(json.dumps([[str(pathlib.Path(module.__file__).parent) for module in ours], encoding.encode_ordinary("Hello é")]))
"""


@pytest.mark.parametrize(("encoding", "env"), [("byte", {"PYTHONPATH": ""}), ("gpt2", SYNTHETIC)])
def test_modules_model_and_vocabulary_are_in_the_folder(in_tmp, monkeypatch, encoding, env):
    monkeypatch.setattr(space, "gradio_version", lambda: "9.8.7")
    save_run(encoding=encoding, n_embd=4, vocab_size=tokenizer.load(encoding).n_vocab)
    export_here("--space", "s")
    assert sum(name.startswith("tiktoken_cache/") for name in files_in("s")) == 2 * (encoding == "gpt2")
    env = {**os.environ, **env, "TIKTOKEN_CACHE_DIR": "tiktoken_cache", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd="s", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folders, ids = json.loads(done.stdout)
    assert set(folders) == {str(in_tmp / "s")}
    assert ids == tokenizer.load(encoding).encode_ordinary("Hello é")


@pytest.mark.extra("gradio")
def test_app_starts_in_the_folder(in_tmp):
    save_run()
    export_here("--space", "s")
    shutil.rmtree("out")
    env = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR" and not k.startswith("GRADIO_SERVER_")}
    env |= {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "app.py"], cwd=Path("s"), env=env, **pipes) as app:
        try:
            printed = []  # up to the line with its address, at a free port
            while not (url := re.search(r"http://127\.0\.0\.1:\d+", printed[-1] if printed else "")):
                printed.append(app.stdout.readline())
                assert printed[-1], printed
            with urllib.request.urlopen(f"{url[0]}/config", timeout=60) as response:
                answer = json.load(response)
        finally:
            app.kill()
    assert answer["components"]
    assert str(in_tmp) not in json.dumps(answer)
