"""Fixtures that several test files share. What they are made of lies in tests/support/; docs/testing.md lists them."""

import contextlib
import importlib.util
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import hypothesis
import pytest
from forked import TORCHRUN, ForkedProcess, start_server
from in_process import TINY, Clock, Gate, make_dataset, reset_torch, run_script
from processes import ROOT, free_port, require_none_left

# One thread, also in the processes that tests start: tiny models gain nothing from more, and tests may run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A temporary cache folder, set before any module copies the environment: tests neither read nor write the user's.
# matplotlib's font cache stays there, as it takes seconds to build.
USER_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
os.environ.setdefault("MPLCONFIGDIR", os.path.join(USER_CACHE, "matplotlib"))
CACHE = tempfile.TemporaryDirectory(prefix="flatgpt_tests_")
os.environ["XDG_CACHE_HOME"] = CACHE.name

# No deadlines: the machine may be busy. In continuous integration the examples are the same each time.
hypothesis.settings.register_profile(
    "flatgpt",
    deadline=None,
    database=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flatgpt")

# A background job of a script ignores SIGINT, nohup ignores SIGHUP, and child processes inherit ignored signals. With a
# handler here, children start with the default action.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) == signal.SIG_IGN:
        ignored = signal.default_int_handler if number == signal.SIGINT else lambda *_: None
        signal.signal(number, ignored)


def pytest_collection_modifyitems(items) -> None:
    """Give tests marked slow, browser or extra a time limit of ten minutes, unless they have a timeout mark."""
    for item in items:
        marked = {mark.name for mark in item.iter_markers()}
        if marked & {"slow", "browser", "extra"} and "timeout" not in marked:
            item.add_marker(pytest.mark.timeout(600))


def pytest_runtest_setup(item) -> None:
    """Skip a test marked extra("package") where the package is not installed. In continuous integration it fails."""
    packages = {package for mark in item.iter_markers("extra") for package in mark.args}
    if missing := sorted(package for package in packages if importlib.util.find_spec(package) is None):
        reason = f"not installed: {', '.join(missing)}: pip install -r requirements-extra.txt"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


# ---------------------------------------------------------------------------------------------------------------------
# around every test


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_session():
    """Check all processes that tests started. The first fixture of a session is the last to be torn down."""
    yield
    require_none_left()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(request):
    """Check the processes that a test started in its call phase; those of shared fixtures live longer."""
    yield
    require_none_left(f"{request.node.nodeid} (call)")


@pytest.fixture(autouse=True)
def torch_as_before():
    """Reset torch's global settings that a run in this process changes."""
    yield
    reset_torch()


USER_TIKTOKEN_CACHE, USER_ENCODINGS = os.environ.get("TIKTOKEN_CACHE_DIR"), {}


@pytest.fixture(scope="session", autouse=True)
def synthetic_vocabulary(tmp_path_factory):
    """Let tests and their processes use a synthetic "gpt2" encoding of GPT-2's size and pattern."""
    from tiktoken_ext.synthetic import files

    folder = tmp_path_factory.mktemp("tiktoken_cache")
    for name, content in files().items():
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# data


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A temporary folder, which is the current one during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_chunks(monkeypatch):
    """Data preparation with tasks of 300 bytes and chunks of 400, so that a small input makes many of both."""
    from flatgpt.data import chunks

    monkeypatch.setattr(os, "fsync", lambda file: None)  # a slow disk shall not make slow tests
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    monkeypatch.setattr(chunks.split_document, "__defaults__", (400,))


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The folder of real text that FLATGPT_TEST_DATA names."""
    folder = os.environ.get("FLATGPT_TEST_DATA")
    if not folder:
        pytest.skip("FLATGPT_TEST_DATA is not set: it names a folder with shakespeare/input.txt and wikitext103/")
    return Path(folder)


@pytest.fixture
def gpt2_vocabulary():
    """GPT-2's own vocabulary in place of the synthetic one, from the cache that TIKTOKEN_CACHE_DIR names."""
    import tiktoken.registry

    from flatgpt.data import tokenizer

    if not USER_TIKTOKEN_CACHE:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: it names tiktoken's cache with GPT-2's vocabulary")
    forget = tokenizer._load_named.cache_clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", USER_TIKTOKEN_CACHE)
        patch.setattr(tiktoken.registry, "ENCODINGS", USER_ENCODINGS)
        forget()
        yield
    forget()


@pytest.fixture
def tiny_data(in_tmp):
    """A temporary folder with data/tiny, which is the current one during the test."""
    make_dataset(in_tmp)
    return in_tmp


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory) -> Path:
    """A folder with data/tiny and a trained out/quickstart. Read only."""
    home = tmp_path_factory.mktemp("home")
    make_dataset(home)
    with contextlib.chdir(home):
        done = run_script("train", *TINY, "--max_iters", 60, "--eval_interval", 30, "--lr", "5e-3")
    assert done.code == 0, done.err
    return home


@pytest.fixture(scope="session")
def tiny_run(tiny_home) -> Path:
    """The folder of a run that was trained once a session. Read only."""
    return tiny_home / "out" / "quickstart"


@pytest.fixture
def run_copy(tiny_home, in_tmp) -> Path:
    """A copy of tiny_run to damage, out/quickstart in the current folder, with the dataset next to it."""
    shutil.copytree(tiny_home, in_tmp, symlinks=True, dirs_exist_ok=True)
    return Path("out/quickstart")


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A Hugging Face hub on this machine, with nothing on it."""
    from hub_host import serving

    yield from serving(monkeypatch, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# in this process


@pytest.fixture
def cli():
    """cli("train", "--lr", 1e-3, stdin="") -> Result(code, out, err): run a script in this process."""
    return run_script


@pytest.fixture
def gate(monkeypatch):
    """gate(module, "function") -> Gate: block the function's calls until the test opens the gate."""
    gates = []

    def install(owner, name: str) -> Gate:
        gates.append(Gate(getattr(owner, name)))
        monkeypatch.setattr(owner, name, gates[-1])
        return gates[-1]

    yield install
    for each in gates:
        each.open()


@pytest.fixture
def clock(monkeypatch):
    """clock(module) -> Clock: replace the module's `time` by a clock that the test sets."""
    clock = Clock()

    def install(owner) -> Clock:
        monkeypatch.setattr(owner, "time", clock.module)
        return clock

    return install


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(*names): from here on, candidates of these names take 1 ms and all others 2 ms.

    Returns the list of what was measured: the names of the candidates. The cache of choices is empty.
    """
    from flatgpt.runtime import choices

    timed = []

    def set_choice(*names):
        def measure(candidates):
            timed.append(tuple(candidates))
            return {name: 1e-3 if name in names else 2e-3 for name in candidates}

        monkeypatch.setattr(choices, "measure", measure)
        return timed

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return set_choice


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """time.sleep returns at once and appends its argument here."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def scripted_model():
    """scripted_model("text") -> GPT whose greedy output is the text; scripted.save_model makes a checkpoint of it."""
    from scripted import scripted_model

    return scripted_model


# ---------------------------------------------------------------------------------------------------------------------
# in other processes


@pytest.fixture(scope="session")
def fork_server():
    """The process that ForkedProcess forks."""
    with start_server() as process:
        yield process


@pytest.fixture(scope="module")
def scripts():
    """scripts.run("train --lr 1e-3", cwd) -> Result: runs scripts in forked processes."""
    from forked import Scripts

    scripts = Scripts()
    yield scripts
    scripts.close()


@pytest.fixture(scope="module")
def start_ranks(fork_server, tmp_path_factory):
    """start_ranks(*words, cwd=, world=1, code="") -> the ForkedProcess of each rank: train.py after the code.

    Several ranks get torchrun's variables but no launcher, so that tests see their exit codes and nothing ends them.
    """
    processes = []

    def start(*words, cwd: Path, world: int = 1, code: str = "") -> list[ForkedProcess]:
        folder = tmp_path_factory.mktemp("ranks")
        alike = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for rank in range(world):
            env = {"RANK": rank, "LOCAL_RANK": rank, **alike} if world > 1 else {}
            env = {key: str(value) for key, value in env.items()}
            processes.append(
                ForkedProcess(fork_server, folder / str(rank), cwd, [ROOT / "train.py", *words], code, env)
            )
        return processes[-world:]

    yield start
    for process in processes:
        process.kill()


@pytest.fixture(scope="module")
def ranks(fork_server, tmp_path_factory):
    """ranks(2, *words, cwd=) -> ForkedProcess that has ended: torchrun with so many ranks of train.py or a script."""

    def run(number: int, *words, cwd: Path, script: Path = ROOT / "train.py", threads: str | None = "1"):
        words = ("torchrun", "--standalone", f"--nproc_per_node={number}", script, *words)
        folder = tmp_path_factory.mktemp("ranks") / "0"
        process = ForkedProcess(fork_server, folder, cwd, words, TORCHRUN, {"OMP_NUM_THREADS": threads})
        try:
            process.wait(300)
        finally:
            process.kill()
        return process

    return run
