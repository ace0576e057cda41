"""infer.py: what is written, and how it comes."""

import subprocess
import sys
import time

import pytest
from conftest import ROOT, command

import cli
import infer
from config import InferConfig


@pytest.fixture
def write(tiny_home, monkeypatch, capsys):
    """Run infer.py in this process; its (standard output, standard error)."""
    monkeypatch.chdir(tiny_home)

    def run(*words) -> tuple[str, str]:
        infer.main(cli.parse(InferConfig, ["--device", "cpu", "--max_new_tokens", "40", *map(str, words)]))
        return capsys.readouterr()

    return run


def test_text_follows_the_prompt_and_the_seed(write):
    prompt = "99 green bottles"
    first, said = write("--prompt", prompt, "--seed", 5)
    assert first.startswith(prompt)
    assert len(first.encode(errors="replace")) > len(prompt) + 20
    assert write("--prompt", prompt, "--seed", 5)[0] == first
    assert write("--prompt", prompt, "--seed", 6)[0] != first
    assert "out/quickstart/ckpt/iter_000060: " in said
    assert "iter 60" in said


def test_streamed_or_not_is_the_same_text(write):
    assert write("--stream_text")[0] == write("--no-stream_text")[0]


def test_several_samples_differ_and_each_has_its_own_seed(write):
    texts = write("--num_samples", 3, "--seed", 1, "--prompt", "if ")[0]
    parts = texts.split("--- sample ")[1:]
    bodies = [part.split("\n", 1)[1] for part in parts]
    assert len(set(bodies)) == 3
    assert bodies[2] == write("--seed", 3, "--prompt", "if ")[0]


def test_greedy_and_top_1_agree(write):
    assert write("--temperature", 0, "--prompt", "green ")[0] == write("--top_k", 1, "--prompt", "green ")[0]


def test_no_prompt_and_a_prompt_longer_than_the_context(write):
    assert write()[0].strip()
    long = "green bottles " * 30
    assert write("--prompt", long)[0].startswith(long)


def test_text_comes_while_it_is_made(tiny_home):
    """The first piece is there long before the last."""
    words = [sys.executable, str(ROOT / "infer.py"), "--prompt", "99", "--max_new_tokens", "3000", "--device", "cpu"]
    process = subprocess.Popen(words, cwd=tiny_home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.read(12)
    first = time.monotonic()
    rest = process.stdout.read()
    assert process.wait() == 0
    assert len(rest) > 500
    assert time.monotonic() - first > 0.2


def test_closed_pipe_is_no_traceback(tiny_home):
    words = [sys.executable, str(ROOT / "infer.py"), "--max_new_tokens", "3000", "--device", "cpu"]
    process = subprocess.Popen(words, cwd=tiny_home, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 141
    assert "Traceback" not in said


def test_no_run_yet(tmp_path):
    done = command("infer", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: no run in out/ yet: train one (python train.py), or name one with --model_path\n"
