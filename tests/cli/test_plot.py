"""plot.py: which runs are drawn into which file, and --watch."""

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
from flatgpt.cli.cli import parse
from flatgpt.runs.run_log import KEYS

HEADER = ",".join(KEYS) + "\n"
FIRST = "0,0,0,,5.5,,,,,,,,\n"
ROWS = "10,2560,0.1,4.5,,0.0001,2.5,,0,,,,0.4\n20,5120,0.2,4.1,4.2,0.0002,2.1,,0,50,5120,,0.4\n"
PNG = b"\x89PNG\r\n\x1a\n"


def make(folder: Path | str, text: str = HEADER + FIRST + ROWS) -> Path:
    """Make a run's folder with a log."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("words", "file", "out", "err"),
    [
        ("out/a", "out/a/metrics.png", "out/a/metrics.png: to iter 20\n", ""),
        ("", "out/b/metrics.png", "out/b/metrics.png: to iter 20\n", "the newest run: out/b\n"),
        ("out/a --svg", "out/a/metrics.svg", "out/a/metrics.svg: to iter 20\n", ""),
        ("out/a out/b", "metrics.png", "metrics.png: 2 runs\n", ""),
        ("out/a out/b --out both.svg --x time", "both.svg", "both.svg: 2 runs\n", ""),
        ("out/a ./out/a/ link --out one.png", "one.png", "one.png: to iter 20\n", ""),
        (
            "empty out/a",
            "metrics.png",
            "metrics.png: to iter 20\n",
            "warning: empty: left out, no rows in metrics.csv there\n",
        ),
        (
            *("out/a foreign --x tokens", "metrics.png", "metrics.png: to iter 20\n"),
            "warning: foreign: left out, no rows in metrics.csv there that tell tokens\n",
        ),
    ],
)
def test_files_and_what_is_printed(cli, in_tmp, words, file, out, err):
    for name, age in (("a", 20), ("b", 10)):
        os.utime(make(f"out/{name}") / "metrics.csv", (1e9 - age, 1e9 - age))
    make("foreign", "iter,val_loss\n1,5\n")
    Path("empty").mkdir()
    Path("link").symlink_to("out/a")
    before = set(Path().rglob("*"))
    assert cli("plot", *words.split()) == (0, out, err)
    assert set(Path().rglob("*")) - before == {Path(file)}
    if file.endswith(".svg"):
        assert b"<svg" in Path(file).read_bytes()
        assert b"time of the updates (s)" in Path(file).read_bytes() or "time" not in words
    else:
        assert matplotlib.image.imread(file).shape[1] == 1600


def test_runs_of_one_name_are_told_apart(cli, in_tmp):
    for name in ("x/run", "y/run", "z"):
        make(name)
    assert cli("plot", "x/run", "y/run", "z", "--svg").code == 0
    for name in (b">x/run, best 4.2000<", b">y/run, best 4.2000<", b"/z, best 4.2000<"):
        assert name in Path("metrics.svg").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        HEADER + FIRST,
        HEADER + FIRST + ROWS + "30,7680,0.3,4.0",
        HEADER + FIRST + ROWS + "30,7680,0.3,nan,nan,0.0003,inf,65536,3,,,,\n",
        HEADER + FIRST + "10,,,nan,,,,,,,,,\n",
        HEADER + "\0\0\0\n" + ROWS,
        "iter,val_loss\n0,5\n10,0\n",
        "iter,lr\n0,0\n",
        HEADER + "0,,,0,0,0,0,0,0,0,0,0,0\n",
        HEADER + "0,,,1e38,1e-38,1e38,1e38,,,1e38,1e38,,1e38\n10,,,1,1,1,1,,,1,1,,1\n",
        HEADER + "-5,,,1,1,1,1,,,1,1,,1\n",
        HEADER + ROWS + FIRST,
    ],
)
@pytest.mark.parametrize("x", ["iter", "time"])
def test_damaged_and_unusual_logs_are_drawn(tmp_path, text, x):
    run = make(tmp_path / "r", text)
    plot.main(parse(PlotConfig, [str(run), "--x", x]))
    assert (run / "metrics.png").read_bytes().startswith(PNG)


def test_failed_write_leaves_the_earlier_picture(cli, in_tmp, monkeypatch):
    run = make("a")
    cli("plot", "a")
    before = (run / "metrics.png").read_bytes()

    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cli("plot", "a").error == "error: out = a/metrics.png: cannot be written: No space left on device"
    assert (run / "metrics.png").read_bytes() == before
    assert sorted(os.listdir(run)) == ["metrics.csv", "metrics.png"]


def test_importing_plots_does_not_import_matplotlib_or_torch():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flatgpt.runs.plots import plot_runs\n"
    code += "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------------------
# --watch


@pytest.fixture
def watch(monkeypatch, capsys):
    """watch(change, ...) -> (out, err): plot.py a --watch. Each pause makes the next change."""

    def run(*changes) -> tuple[str, str]:
        pauses, remaining = [], iter(changes)

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            try:
                next(remaining)()
            except StopIteration:
                raise KeyboardInterrupt from None

        monkeypatch.setattr(plot.time, "sleep", pause)
        with contextlib.suppress(KeyboardInterrupt):
            plot.main(parse(PlotConfig, ["a", "--watch"]))
        assert min(pauses) >= 2
        return capsys.readouterr()

    return run


def append(text: str):
    def change() -> None:
        with open("a/metrics.csv", "a") as log:
            log.write(text)

    return change


def test_watch_draws_each_change_once(in_tmp, watch):
    make("a", HEADER)
    printed = watch(append(FIRST), lambda: None, append(ROWS), lambda: None)
    assert printed.out == "a/metrics.png: to iter 0\na/metrics.png: to iter 20\n"
    assert printed.err.startswith("waiting: a: nothing to draw")
    assert printed.err.count("\n") == 1


def test_watch_survives_a_folder_that_moves_away(in_tmp, watch):
    """train.py --overwrite moves the old run while plot.py draws it."""
    make("a")
    printed = watch(lambda: os.rename("a", "a.old"), lambda: make("a", HEADER + FIRST))
    assert printed.out == "a/metrics.png: to iter 20\na/metrics.png: to iter 0\n"
    assert printed.err.startswith("waiting: a: no such folder")
