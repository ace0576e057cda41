"""What each script refuses: one `error:` line, exit code 2, and what the line names. Nothing is written.

A row is a script, its words, and what the line must contain: the key or file, the value, what to do.
"""

import os
from pathlib import Path

import pytest

REFUSALS = [
    ("bench", "--list", "list belongs to train.py"),
    # plot.py
    ("plot", "none", "none: no such folder; a run's folder is expected, out/NAME"),
    ("plot", "a none", "none: no such folder"),
    ("plot", "none --watch", "none: no such folder"),
    ("plot", "empty", "empty: nothing to draw, no rows in metrics.csv there; name another run, or wait"),
    ("plot", "empty empty2", "empty, empty2: nothing to draw"),
    ("plot", "a --x tokens", "a: nothing to draw, no rows in metrics.csv there that tell tokens;"),
    ("plot", "a --x time", "a: nothing to draw, no rows in metrics.csv there that tell time;"),
    ("plot", "a --out a.pdf", "out = a.pdf: a name that ends in .png or .svg is expected"),
    ("plot", "a --out a.png --svg", "out = a.png: a name that ends in .svg is expected"),
    ("plot", "a --out no/a.png", "out = no/a.png: cannot be written: no file can be made there"),
    ("plot", "a --x epoch", "--x = epoch: one of iter, tokens, time is expected"),
    ("plot", "", "no run in out/ yet: train one (python train.py), or name the folder of one"),
]


@pytest.mark.parametrize(("script", "words", "said"), REFUSALS, ids=[f"{row[0]} {row[1]}" for row in REFUSALS])
def test_refusal(cli, in_tmp, script, words, said):
    for name in ("a", "empty", "empty2"):
        Path(name).mkdir()
    Path("a/metrics.csv").write_text("iter,val_loss\n1,5\n")
    done = cli(script, *words.split())
    assert said in done.error
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert sorted(os.listdir()) == ["a", "empty", "empty2"]
