"""plot.py: which runs are drawn into which file, and --watch; and what works without torch."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from processes import ROOT

import plot
from config import PlotConfig
from flatgpt.cli.settings import parse
from flatgpt.runs.run_log import KEYS

pytestmark = pytest.mark.slow

HEADER = ",".join(KEYS[:13]) + "\n"  # of earlier versions
FIRST = "0,0,0,,5.5,,,,,,,,\n"
ROWS = "10,2560,0.1,4.5,,0.0001,2.5,,0,,,,0.4\n20,5120,0.2,4.1,4.2,0.0002,2.1,,0,50,5120,,0.4\n"


def make(folder: Path | str, text: str = HEADER + FIRST + ROWS) -> Path:
    """Make a run's folder with a log."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("words", "file", "out", "err"),
    [
        ("out/a README.md out/b", "metrics.png", "2 runs\n", "warning: README.md: skipped, not a run's folder\n"),
        ("out/a", "out/a/metrics.png", "to iter 20\n", ""),
        ("", "out/b/metrics.png", "to iter 20\n", "the newest run: out/b\n"),
        ("out/a --svg", "out/a/metrics.svg", "to iter 20\n", ""),
        ("out/a out/b", "metrics.png", "2 runs\n", ""),
        ("out/a out/b --out both.svg --x time", "both.svg", "2 runs\n", ""),
        ("out/a ./out/a/ link --out one.png", "one.png", "to iter 20\n", ""),
        (
            "empty out/a foreign --x tokens",
            "metrics.png",
            "to iter 20\n",
            "warning: empty, foreign: skipped, metrics.csv has no",
        ),
    ],
)
def test_files_and_what_is_printed(cli, in_tmp, words, file, out, err):
    for name, age in (("a", 20), ("b", 10)):
        os.utime(make(f"out/{name}") / "metrics.csv", (1e9 - age, 1e9 - age))
    make("foreign", "iter,val_loss\n1,5\n")
    Path("README.md").touch()
    Path("empty").mkdir()
    Path("link").symlink_to("out/a")
    before = set(Path().rglob("*"))
    done = cli("plot", *words.split())
    assert (done.code, done.out) == (0, f"{file}: {out}")
    assert done.err == err or (err and done.err.startswith(err))
    assert set(Path().rglob("*")) - before == {Path(file)}
    if file.endswith(".svg"):
        assert b"time of the updates (s)" in Path(file).read_bytes() or "time" not in words
    else:
        assert matplotlib.image.imread(file).shape[1] == 1600


def test_file_in_place_of_a_run(cli, in_tmp):
    for name in ("a.json", "b.json"):
        Path(name).touch()
    for words in (["a.json"], ["a.json", "b.json"]):
        assert cli("plot", *words).error.startswith("error: a.json: a file; a run's folder is expected")


def test_runs_of_one_name_are_told_apart(cli, in_tmp):
    for name in ("x/run", "y/run"):
        make(name)
    assert cli("plot", "x/run", "y/run", "--svg").code == 0
    for name in (b">x/run, best 4.2000", b">y/run, best 4.2000"):
        assert name in Path("metrics.svg").read_bytes()


def test_watch_draws_each_change_once_and_survives_a_folder_that_moves_away(in_tmp, monkeypatch, capsys):
    """train.py --overwrite moves the old run while plot.py draws it. Each pause makes the next change."""
    log = make("a", HEADER) / "metrics.csv"
    changes = [
        lambda: log.write_text(HEADER + FIRST),
        lambda: None,
        lambda: os.rename("a", "a.old"),
        lambda: make("a"),
    ]

    def pause(seconds: float) -> None:
        assert seconds >= 2
        if not changes:
            raise KeyboardInterrupt
        changes.pop(0)()

    monkeypatch.setattr(plot.time, "sleep", pause)
    with contextlib.suppress(KeyboardInterrupt):
        plot.main(parse(PlotConfig, ["a", "--watch"]))
    printed = capsys.readouterr()
    assert printed.out == "a/metrics.png: to iter 0\na/metrics.png: to iter 20\n"
    assert [line[:30] for line in printed.err.splitlines()] == [
        "waiting: a: metrics.csv has no",
        "waiting: a: no such folder; a ",
    ]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["train.py", "--list"],
            ["gpt2_124m  ", "  124,439,808  ", "finetune_shakespeare ", "quickstart  ", "finished"],
        ),
        (["plot.py"], ["to iter 60"]),
        (["train.py", "--resume", "--show_batch", "3"], ["update 3 of 60, ", "| ttles should accidentally fall, t"]),
    ],
)
def test_without_torch(run_copy, words, parts):
    code = f"import runpy, sys; sys.argv, sys.path[0], sys.modules['torch'] = {words!r}, {str(ROOT)!r}, None\n"
    code += f"runpy.run_path({str(ROOT / words[0])!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in parts), done.stdout
