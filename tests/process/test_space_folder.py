"""The folder of export.py --space needs nothing but itself and the packages it requires."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request

import pytest
from exported import export_here, files_in, save_run
from processes import SYNTHETIC

from flatgpt.data import tokenizer

ALONE = """
import json, socket
def refuse(*words):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
import app, flatgpt
model, encoding = flatgpt.load(".")
print(json.dumps([app.__file__, encoding.encode_ordinary("Hello é")]))
"""


@pytest.mark.parametrize(("encoding", "env"), [("byte", {"PYTHONPATH": ""}), ("gpt2", SYNTHETIC)])
def test_modules_model_and_vocabulary_are_in_the_folder(in_tmp, monkeypatch, encoding, env):
    save_run(encoding=encoding, n_embd=4, vocab_size=tokenizer.load(encoding).n_vocab)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "9.8.7")
        export_here("--space", "s")
    assert sum(name.startswith("tiktoken_cache/") for name in files_in("s")) == 2 * (encoding == "gpt2")
    env = {**os.environ, **env, "TIKTOKEN_CACHE_DIR": "tiktoken_cache", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd="s", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(in_tmp / "s/app.py"), tokenizer.load(encoding).encode_ordinary("Hello é")]


@pytest.mark.extra("gradio")
def test_app_starts_in_the_folder(in_tmp):
    save_run()
    export_here("--space", "s")
    shutil.rmtree("out")
    env = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR" and not k.startswith("GRADIO_SERVER_")}
    env |= {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "app.py"]
    with subprocess.Popen(words, cwd="s", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as app:
        try:
            printed = iter(app.stdout.readline, "")
            url = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in printed)))
            with urllib.request.urlopen(f"{url[0]}/config", timeout=60) as response:
                answer = json.load(response)
        finally:
            app.kill()
    assert answer["components"]
    assert str(in_tmp) not in json.dumps(answer)
