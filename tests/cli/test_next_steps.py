"""The commands that scripts print as the next step run, as a shell would run them."""

import itertools
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from in_process import TEXT, TINY, Result

from flatgpt.runtime.stop import StopRequest

# Added to a printed command, so that it takes a second.
SMALL = {
    "train": "--max_iters 1 --eval_tokens 32 --sample_tokens 0 --device cpu --dtype float32 --optimizer adamw "
    "--n_layer 1 --n_head 1 --n_embd 16 --context_length 16 --batch_size 2",
    "eval": "--eval_tokens 32",
    "infer": "--max_new_tokens 4",
    "export": "--dry_run",
    "prepare_data": "",
}
INPUTS = {"YOUR_FILES": "a.txt", "FILES": "a.txt", "FILE": "a.txt", "mine": "yours"}


@pytest.fixture
def home(in_tmp) -> Path:
    (in_tmp / "a.txt").write_text(TEXT, encoding="utf-8")
    return in_tmp


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of ours in a message, such as `next: python train.py --config x`."""
    return [shlex.split(line) for line in re.findall(r"^(?:next: | +|error: .*: run )python (\w+\.py.*)$", text, re.M)]


def follow(cli, text: str) -> list[Result]:
    """Run the commands in a message at a small size; all succeed. Return their results."""
    results = []
    for script, *words in commands(text):
        verb = script.removesuffix(".py")
        results.append(cli(verb, *(INPUTS.get(word, word) for word in words), *SMALL[verb].split()))
        assert results[-1].code == 0, (script, words, results[-1])
    assert results, text
    return results


@pytest.mark.parametrize(
    "words",
    [
        "pydoc",
        "text --input a.txt --tokenizer byte",
        "text --input a.txt --tokenizer byte --name 'my notes' --data_dir 'with space'",
        "text --input a.txt --tokenizer byte --name shakespeare_byte",
        "text --input a.txt --tokenizer byte --name -x",
    ],
)
def test_after_preparing_data(home, cli, words):
    made = cli("prepare_data", *shlex.split(words))
    assert made.code == 0, made
    (trained,) = follow(cli, made.out)
    assert made.out.partition(": ")[0] in trained.out  # trains on what was made


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_after_shakespeare(home, cli, real_text, gpt2_vocabulary, tokenizer):
    shutil.copytree(real_text / "shakespeare", home / "raw/shakespeare")
    (trained,) = follow(cli, cli("prepare_data", "shakespeare", "--tokenizer", tokenizer, "--raw_dir", "raw").out)
    assert "data/shakespeare" in trained.out


def test_after_training(home, cli):
    """A finished run is read by infer.py and eval.py, and more text can be prepared."""
    cli("prepare_data", "text", "--input", "a.txt", "--tokenizer", "byte", "--name", "tiny")
    done = cli("train", *TINY, "--out_dir", "out/my run", "--eval_tokens", 64)
    assert [words[0] for words in commands(done.out)] == ["infer.py", "eval.py", "prepare_data.py"]
    follow(cli, done.out.replace("--name mine", "--name yours --tokenizer byte"))


@pytest.mark.parametrize("updates", [0, 3])
def test_after_a_stop(home, cli, monkeypatch, updates):
    """A stopped run continues; one without an update starts again."""
    cli("prepare_data", "text", "--input", "a.txt", "--tokenizer", "byte", "--name", "tiny")
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "reason", lambda self: signal.SIGINT * (next(calls) >= updates))
        first = property(lambda self: None if updates else signal.SIGINT, lambda self, value: None)
        patch.setattr(StopRequest, "signal", first, raising=False)  # asked for in the first evaluation
        stopped = cli("train", *TINY, "--out_dir", "out/my run")
    assert f"stopped at iter {updates} of 6" in stopped.out
    (script, *words), *others = commands(stopped.out)
    assert (script, others) == ("train.py", [])
    continued = cli("train", *words)
    assert continued.code == 0
    assert "done: " in continued.out


def test_after_export(tiny_run, home, cli):
    follow(cli, cli("export", "--model_path", tiny_run, "--out", "hf folder").out)


def test_missing_dataset(home, cli):
    """The command in the error makes the dataset."""
    missing = cli("train", "--dataset", "notes", *SMALL["train"].split())
    assert missing.code == 2
    follow(cli, missing.err)
    assert (home / "data/notes/meta.json").is_file()
