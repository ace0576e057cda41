"""What several test files share: a tiny dataset, a tiny trained run, the command line, real text where it is."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

# One thread, also in the processes that tests start: tiny models gain nothing from more, and tests may run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

TEXT = "".join(
    f"{n} green bottles hanging on the wall, and if {n} green bottles should accidentally fall, "
    f"there will be {n - 1} green bottles. Naïve café, 東京, 🎈!\n"
    for n in range(99, 0, -1)
)


def command(verb: str, *words, cwd, env: dict | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a verb as a user does, in `cwd`; standard output and error as text."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8", **(env or {})}
    return subprocess.run(
        [sys.executable, str(ROOT / f"{verb}.py"), *map(str, words)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """The temporary folder, as the current one: data/ and out/ of a test go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The folder of real text that FLATGPT_TEST_DATA names."""
    folder = os.environ.get("FLATGPT_TEST_DATA")
    if not folder:
        pytest.skip("FLATGPT_TEST_DATA is not set: it names a folder with shakespeare/input.txt and wikitext103/")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2_vocabulary() -> None:
    """GPT-2's vocabulary is at hand without a network."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: it names tiktoken's cache with GPT-2's vocabulary")


# A model that trains in a second; every test that needs another size changes what it needs.
TINY = shlex.split(
    "--dataset tiny --n_layer 2 --n_head 2 --n_embd 32 --context_length 32 --batch_size 4 --warmup_iters 2 "
    "--max_iters 6 --eval_interval 3 --log_interval 1 --sample_tokens 8 --device cpu --dtype float32"
)


def make_dataset(folder: Path, name: str = "tiny", text: str = TEXT, encoding: str = "byte"):
    """A dataset of the text in folder/data/<name>."""
    from config import PrepareConfig
    from preparation import prepare

    file = folder / f"{name}.txt"
    file.write_text(text, encoding="utf-8")
    settings = {"name": name, "tokenizer": encoding, "data_dir": str(folder / "data")}
    return prepare(PrepareConfig(source="text", input=(str(file),), **settings), say=lambda line: None)


def train_here(*words) -> Path:
    """Train in this process and in the current folder, with TINY settings and changes; the run's folder."""
    import cli
    import train
    from config import TrainConfig, run_dir

    config = cli.parse(TrainConfig, [*TINY, *map(str, words)])
    train.train(config)
    return run_dir(config)


@pytest.fixture
def tiny_data(in_tmp):
    """The current, temporary folder, with data/tiny in it."""
    make_dataset(in_tmp)
    return in_tmp


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory) -> Path:
    """A folder with data/tiny and a trained out/quickstart, to read from only."""
    home = tmp_path_factory.mktemp("home")
    make_dataset(home)
    done = command("train", *TINY, "--max_iters", 60, "--eval_interval", 30, "--lr", "5e-3", cwd=home)
    assert done.returncode == 0, done.stderr
    return home
