"""plot.py: which runs are drawn into which file, what is said of those that cannot be, and --watch."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
from processes import ROOT, command

import plot
from config import PlotConfig, UserError
from flatgpt.cli import cli
from flatgpt.runs.run_log import KEYS

HEADER = ",".join(KEYS) + "\n"
FIRST = "0,0,0,,5.5,,,,,,,,\n"
ROWS = "10,2560,0.1,4.5,,0.0001,2.5,,0,,,,0.4\n20,5120,0.2,4.1,4.2,0.0002,2.1,,0,50,5120,,0.4\n"
PNG = b"\x89PNG\r\n\x1a\n"


def make(folder: Path | str, text: str = HEADER + FIRST + ROWS) -> Path:
    """A run's folder with a log."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)
    return folder


def draw(*words) -> None:
    """plot.py in this process."""
    plot.main(cli.parse(PlotConfig, list(map(str, words))))


def refusal(*words) -> str:
    with pytest.raises(UserError) as caught:
        draw(*words)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn, and where it goes


def test_a_run_as_a_user_draws_it(in_tmp):
    make("out/a")
    done = command("plot", "out/a", cwd=in_tmp)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out/a/metrics.png: to iter 20\n", "")
    assert matplotlib.image.imread("out/a/metrics.png").shape[1] == 1600
    assert sorted(os.listdir("out/a")) == ["metrics.csv", "metrics.png"]


def test_names_of_files(in_tmp, capsys):
    make("out/a")
    make("out/b")
    draw("out/a", "--svg")
    assert b"<svg" in Path("out/a/metrics.svg").read_bytes()
    draw("out/a", "out/b")
    assert Path("metrics.png").read_bytes().startswith(PNG)
    draw("out/a", "out/b", "--out", "both.svg", "--x", "time")
    assert b"time of the updates (s)" in Path("both.svg").read_bytes()
    draw("out/b", "--out", "one.png")
    assert Path("one.png").read_bytes().startswith(PNG)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "out/a/metrics.svg: to iter 20",
        "metrics.png: 2 runs",
        "both.svg: 2 runs",
        "one.png: to iter 20",
    ]
    assert said.err == ""


def test_without_a_name_the_newest(in_tmp, capsys):
    for age, name in ((20, "old"), (10, "new"), (30, "older")):
        log = make(f"out/{name}") / "metrics.csv"
        os.utime(log, (1e9 - age, 1e9 - age))
    draw()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("out/new/metrics.png: to iter 20\n", "the newest run: out/new\n")


def test_runs_of_one_name_are_told_apart(in_tmp):
    for name in ("x/run", "y/run", "z"):
        make(name)
    draw("x/run", "y/run", "z", "--svg")
    for name in (b">x/run, best 4.2000<", b">y/run, best 4.2000<", b">", b"/z, best 4.2000<"):
        assert name in Path("metrics.svg").read_bytes()


def test_one_run_given_twice_is_one(in_tmp, capsys):
    make("a")
    Path("link").symlink_to("a")
    draw("a", "./a/", "link")
    assert capsys.readouterr().out == "link/metrics.png: to iter 20\n"


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
def test_logs_as_they_come(tmp_path, text):
    run = make(tmp_path / "r", text)
    for x in ("iter", "time"):
        draw(run, "--x", x)
        assert (run / "metrics.png").read_bytes().startswith(PNG)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "error: none: no such folder; a run's folder is expected, out/NAME"),
        (["a", "none"], "error: none: no such folder"),
        (["none", "--watch"], "error: none: no such folder"),
        (["empty"], "error: empty: nothing to draw, no rows in metrics.csv there; name another run, or wait"),
        (["a", "--out", "a.pdf"], "error: out = a.pdf: a name that ends in .png or .svg is expected"),
        (["a", "--out", "a.png", "--svg"], "error: out = a.png: a name that ends in .svg is expected"),
        (["a", "--out", "no/a.png"], "error: out = no/a.png: cannot be written: no file can be made there"),
        (["a", "--x", "epoch"], "error: --x = epoch: one of iter, tokens, time is expected"),
        ([], "error: no run in out/ yet: train one (python train.py), or name the folder of one"),
    ],
)
def test_mistakes_are_one_line(in_tmp, monkeypatch, capsys, words, said):
    make("a")
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["plot.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run_script(plot.main, cli.from_command_line(PlotConfig, ""))
    assert end.value.code == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.startswith(said)
    assert answer.err.count("\n") == 1
    assert sorted(os.listdir()) == ["a", "empty"]


def test_an_empty_one_of_several_is_left_out(in_tmp, capsys):
    make("a")
    make("header", HEADER)
    Path("empty").mkdir()
    draw("empty", "a", "header")
    said = capsys.readouterr()
    assert said.out == "metrics.png: to iter 20\n"
    assert said.err == "warning: empty, header: left out, no rows in metrics.csv there\n"
    assert "empty, header: nothing to draw" in refusal("empty", "header")


def test_rows_without_the_axis_are_said(in_tmp, capsys):
    make("a")
    make("foreign", "iter,val_loss\n1,5\n")
    for x in ("tokens", "time"):
        assert f"foreign: nothing to draw, no rows in metrics.csv there that tell {x};" in refusal("foreign", "--x", x)
        draw("a", "foreign", "--x", x)
        assert f"warning: foreign: left out, no rows in metrics.csv there that tell {x}\n" == capsys.readouterr().err


def test_a_fault_leaves_the_picture_before_it(in_tmp, monkeypatch):
    run = make("a")
    draw(run)
    before = (run / "metrics.png").read_bytes()

    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "out = a/metrics.png: cannot be written: No space left on device" in refusal(run)
    assert (run / "metrics.png").read_bytes() == before
    assert sorted(os.listdir(run)) == ["metrics.csv", "metrics.png"]


def test_what_train_and_app_import_is_light():
    """Only what is drawn loads matplotlib; torch is nobody's business here."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from plot import plot_runs, render\n"
    code += "print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------------------
# --watch


@contextlib.contextmanager
def watching(*words, seconds: float = 0.02):
    """plot.py --watch with short waits; lines that it prints are read from it, and it is stopped as by Ctrl-C."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import plot\n"
    code += "from config import PlotConfig\nfrom flatgpt.cli import cli\n"
    code += f"plot.SECONDS, plot.REST = {seconds}, 0; cli.run_script(plot.main, cli.parse(PlotConfig, sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read() + process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_watch_draws_when_a_log_has_grown(in_tmp):
    run = make("a", HEADER)
    with watching("a") as process:
        assert process.stderr.readline().startswith("waiting: a: nothing to draw")
        with open(run / "metrics.csv", "a") as log:
            log.write(FIRST)
        assert process.stdout.readline() == "a/metrics.png: to iter 0\n"
        before = (run / "metrics.png").read_bytes()
        with open(run / "metrics.csv", "a") as log:
            log.write(ROWS)
        assert process.stdout.readline() == "a/metrics.png: to iter 20\n"
        assert (run / "metrics.png").read_bytes() != before


def test_watch_outlives_a_folder_that_moves_away(in_tmp):
    """train.py --overwrite moves the old run aside while somebody watches it."""
    make("a")
    with watching("a") as process:
        assert process.stdout.readline() == "a/metrics.png: to iter 20\n"
        os.rename("a", "a.old")
        assert process.stderr.readline().startswith("waiting: a: no such folder")
        os.rename(make("b", HEADER + FIRST), "a")
        assert process.stdout.readline() == "a/metrics.png: to iter 0\n"


def test_watch_draws_once_what_does_not_change(in_tmp, monkeypatch, capsys):
    make("a")
    looks = []

    def wait(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(KeyboardInterrupt):
        draw("a", "--watch")
    assert capsys.readouterr().out == "a/metrics.png: to iter 20\n"
    assert min(looks) >= 2
