"""run_list.py: the tables of `train.py --list`."""

import fcntl
import json
import os
import re
import time
import tomllib
from pathlib import Path

import pytest

from config import ModelConfig, TrainConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.cli import cli
from flatgpt.data import tokenizer_reader
from flatgpt.runs import run_list
from flatgpt.runs.history import format_compact, gpt2_parameters
from flatgpt.runs.run_list import print_list

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 4, "vocab_size": 300}
PARAMETERS = format_compact(gpt2_parameters(ModelConfig(**SHAPE)))
ROWS = "iter,val_loss\n0,5.5\n10,\n20,3.25\n30,3.5\n"
DAY = 86400


def run(name: str, rows: str | None = ROWS, seconds: float = 300, saved: int = 30, **keys) -> Path:
    """Make a run's folder in out/, last written to so many seconds ago.

    Args:
        saved: the iteration of its checkpoint.
        keys: of its state.json, or, in capitals, of its settings.
    """
    last = Path("out") / name / "ckpt" / "last"
    last.mkdir(parents=True)
    settings = {**SHAPE, "dataset": "mine", "max_iters": 40} | {k.lower(): v for k, v in keys.items() if k.isupper()}
    state = {"iter": saved, "config": settings} | {k: v for k, v in keys.items() if k.islower()}
    files = {last / "state.json": json.dumps(state)} | ({last.parents[1] / "metrics.csv": rows} if rows else {})
    for file, content in files.items():
        file.write_text(content)
        os.utime(file, (time.time() - seconds,) * 2)
    return last.parents[1]


@pytest.fixture
def shown(in_tmp, capsys):
    """shown(name=recipe) -> the lines printed of these recipes and of the runs in out/."""

    def lines(**recipes) -> list[str]:
        print_list(recipes)
        return capsys.readouterr().out.splitlines()

    return lines


def row(lines: list[str], name: str) -> dict[str, str]:
    """Return the cells of a name's row by the head of their column."""
    at = next(n for n, line in enumerate(lines) if line.startswith(f"{name} "))
    head = next(line for line in lines[at::-1] if line.startswith(("run ", "recipe ")))
    found = [re.split(r"\s{2,}", line) for line in (head, lines[at])]
    return dict(zip(*found, strict=True))


def test_runs_and_what_is_said_of_them(shown):
    """The newest come first. What the log does not have is taken from the checkpoint, or is a dash."""
    for file in ("out/recipe/config.toml", "out/rows/metrics.csv", "out/.hidden/metrics.csv", "out/a_file"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(ROWS if "csv" in file else 'n_embd = 8\ndataset = "mine"\nmax_iters = 10\n')
        os.utime(file, (time.time() - (30 if "rows" in file else 0),) * 2)
    run("small")
    run("no_log", rows=None, best_iter=10, best_loss=4.0, seconds=2 * DAY)
    run("no_best", rows="iter,val_loss\n0,\n1000000,nan\n", best_iter=10, best_loss=4.0, seconds=900 * DAY)
    run("x" * 50, DATASET="two\nlines\x1b[2J" + "y" * 20, seconds=3600)
    lines = shown()
    expected = [
        ("run", "params", "data", "iter", "tokens", "time", "tok/s", "best loss", "bits/byte", "age", "state"),
        ("recipe", "-", "mine", "0", "-", "-", "-", "-", "-", "0 s", "stopped, 0%"),
        ("rows", "-", "-", "30", "-", "-", "-", "3.2500", "-", "30 s", "stopped"),
        ("small", PARAMETERS, "mine", "30", "-", "-", "-", "3.2500", "-", "5 min", "stopped, 75%"),
        ("x" * 21 + "...", PARAMETERS, "two lin...", "30", *"---", "3.2500", "-", "1 h", "stopped, 75%"),
        ("no_log", PARAMETERS, "mine", "30", *"---", "4.0000", "-", "2 d", "stopped, 75%"),
        ("no_best", PARAMETERS, "mine", "1,000,000", *"---", "-", "-", "900 d", "stopped, 100%"),
    ]
    assert [tuple(re.split(r"\s{2,}", line)) for line in lines] == expected
    state, end = lines[0].index("state"), lines[0].index("iter") + len("iter")
    assert all(line[state - 1] == " " != line[state] and line[end - 1] != " " for line in lines), "aligned"


def test_what_compares_runs(shown):
    """Loss with tokens, time and speed of the updates; as bits per byte also between tokenizers. A line has a limit."""
    text = {"tokens": {"train": 10, "val": 1000}, "bytes": {"train": 30, "val": 4000}}
    rows = "iter,tokens,step_ms,val_loss\n0,0,,5.5\n10,100000,,\n1000000,10000000000,100,3.25\n"
    run("n" * 36, rows, data=text, parameters=1_557_611_200, DATASET="d" * 20)
    lines = shown()
    assert max(map(len, lines)) == 120
    (name,) = (line.split()[0] for line in lines if line.startswith("n"))
    assert row(lines, name) == {
        **{"run": name, "params": "1.56B", "data": "ddddddd...", "iter": "1,000,000", "tokens": "10B"},
        **{
            "time": "27h46m",
            "tok/s": "100K",
            "best loss": "3.2500",
            "bits/byte": "1.172",
            "age": "5 min",
            "state": "stopped, 100%",
        },
    }


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        ({"finished": False, "MAX_ITERS": 31}, "stopped, 96%"),
        ({"finished": True}, "finished"),  # patience
        ({"finished": True, "saved": 20}, "stopped, 75%"),  # it went on after that
        ({"MAX_ITERS": None}, "stopped"),
    ],
)
def test_how_a_run_stands(shown, keys, state):
    folder = run("small", **keys)
    assert row(shown(), "small")["state"] == state
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert row(shown(), "small")["state"].startswith("running")


def test_what_cannot_be_read_comes_last_and_hides_nothing(shown):
    assert shown() == ["no runs in out/ yet"]
    run("good")
    run("a_folder").joinpath("metrics.csv").unlink()
    Path("out/a_folder/metrics.csv").mkdir()
    run("wide").joinpath("ckpt/last/state.json").write_text('{"config": {"max_iters": "x"}}')
    Path("out/empty").mkdir()
    lines = shown()
    assert lines[1].startswith("good ")
    assert lines[2:4] == [
        "a_folder  cannot be read: [Errno 21] Is a directory: 'out/a_folder/metrics.csv'",
        "empty  not a run: it has no metrics.csv, config.toml or ckpt/",
    ]
    assert lines[4].startswith("wide  cannot be read: ")


# ---------------------------------------------------------------------------------------------------------------------
# train.py --list: recipes


def recipe(*words) -> TrainConfig:
    return cli.parse(TrainConfig, list(map(str, words)))


def test_recipes_the_smallest_first_and_what_is_wrong_with_others(shown):
    Path("data/mine").mkdir(parents=True)
    Path("data/mine/meta.json").write_text("{")
    lines = shown(
        large=recipe("--n_layer", 12),
        small=recipe("--n_layer", 1),
        long=recipe("--epochs", 2.5, "--n_layer", 30),
        tuned=recipe("--init_from", "gpt2"),
        wrong=UserError("2 problems:\n  1. one\n  2. " + "two" * 100),
        damaged=recipe("--dataset", "mine"),
    )
    names = ["recipe", "small", "large", "long", "tuned", "damaged", "wrong"]
    assert [line.split()[0] for line in lines[:7]] == names
    assert (row(lines, "long")["iters"], row(lines, "tuned")["parameters"]) == ("2.5 epochs", "-")
    assert lines[5].startswith("damaged  cannot be read: ")
    assert (lines[6][:9], len(lines[6]), lines[6][-3:]) == ("wrong  2 ", 120, "...")
    assert lines[7:] == ["", "no runs in out/ yet"]


@pytest.mark.parametrize(
    ("dataset", "words", "ids", "tokens"),
    [
        ("pydoc", (), 257, "made at start"),
        ("shakespeare", (), 50257, "made at start"),
        ("shakespeare_byte", (), 257, "made at start"),
        ("prepared", (), 99, "12,345"),
        ("nanogpt", (), 50257, "1,000"),
        ("mine", (), None, "not prepared"),
        ("mine", ("--vocab_size", 1000), 1000, "not prepared"),
    ],
)
def test_parameters_follow_from_the_recipe_or_the_data(shown, dataset, words, ids, tokens):
    for name in ("prepared", "nanogpt"):
        Path("data", name).mkdir(parents=True)
    Path("data/prepared/meta.json").write_text('{"vocab_size": 99, "splits": {"train": {"tokens": 12345}}}')
    Path("data/nanogpt/train.bin").write_bytes(bytes(2000))
    parameters = f"{gpt2_parameters(recipe('--vocab_size', ids)):,}" if ids else "-"
    cells = {"recipe": "it", "parameters": parameters, "data": dataset, "train tokens": tokens, "iters": "2,000"}
    cells |= {"hardware": "-", "time": "unmeasured", "bits/byte": "-"}  # no recipe of this name has a [meta]
    assert row(shown(it=recipe("--dataset", dataset, *words)), "it") == cells


def test_facts_of_any_type_are_shown(shown, monkeypatch):
    """Numbers and lists of a recipe's [meta] are texts."""
    monkeypatch.setattr(run_list, "REPO_ROOT", Path())
    Path("configs").mkdir()
    Path("configs/mine.toml").write_text('[meta]\ntime = 54\nhardware = ["GPU"]\nbits_per_byte = 1.5\n')
    cells = row(shown(mine=TrainConfig()), "mine")
    assert (cells["hardware"], cells["time"], cells["bits/byte"]) == ("['GPU']", "54", "1.5")


def test_what_a_recipe_states_about_its_result(shown):
    cells = row(shown(quickstart=recipe()), "quickstart")
    meta = tomllib.loads((REPO_ROOT / "configs/quickstart.toml").read_text(encoding="utf-8"))["meta"]
    assert [cells[key] for key in ("hardware", "time", "bits/byte")] == ["2 cores", meta["time"], "1.817"]


def test_ids_known_beforehand_are_the_tokenizers():
    assert run_list.SIZES == tokenizer_reader.SIZES
