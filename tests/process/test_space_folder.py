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


@pytest.mark.extra("gradio")
def test_app_starts_in_the_folder(in_tmp):
    """It finds the code, the model and the tokenizer's vocabulary there."""
    save_run(encoding="gpt2", n_embd=4, vocab_size=50257)
    export_here("--space", "s")
    assert sum(name.startswith("tiktoken_cache/") for name in files_in("s")) == 2
    shutil.rmtree("out")
    env = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR" and not k.startswith("GRADIO_SERVER_")}
    env |= {**SYNTHETIC, "HF_HUB_OFFLINE": "1"}
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
