"""run_list.py: the tables of recipes and runs, whatever lies in out/; and `train.py --list`."""

import fcntl
import io
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from processes import ROOT

from config import ModelConfig, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.data.sources import SOURCES
from flatgpt.interop import tokenizer_files
from flatgpt.runs import run_list
from flatgpt.runs.run_list import format_age, print_list

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 4, "vocab_size": 300}
PARAMETERS = f"{ModelConfig(**SHAPE).num_params():,}"
ROWS = "iter,val_loss\n0,5.5\n10,\n20,3.25\n30,3.5\n"
DAYS = 86400


def run(name: str, rows: str | None = ROWS, seconds: float = 300, saved: int = 30, **keys) -> Path:
    """A run's folder in out/, last written to so many seconds ago.

    Args:
        saved: the iteration of its checkpoint.
        keys: of its state.json, or, in capitals, of its settings.
    """
    folder = Path("out") / name
    last = folder / "ckpt" / "last"
    last.mkdir(parents=True)
    settings = {**SHAPE, "dataset": "mine", "max_iters": 40} | {k.lower(): v for k, v in keys.items() if k.isupper()}
    state = {"iter": saved, "config": settings} | {k: v for k, v in keys.items() if k.islower()}
    files = {last / "state.json": json.dumps(state)} | ({folder / "metrics.csv": rows} if rows else {})
    for file, content in files.items():
        file.write_text(content)
        os.utime(file, (time.time() - seconds,) * 2)
    return folder


@pytest.fixture
def shown(in_tmp, capsys):
    """What is printed of the runs in out/, and of recipes that are given: the lines."""

    def lines(**recipes) -> list[str]:
        print_list(recipes)
        return capsys.readouterr().out.splitlines()

    return lines


def row(lines: list[str], name: str) -> dict[str, str]:
    """The cells of a name's row by the head of their column."""
    at = next(n for n, line in enumerate(lines) if line.startswith(f"{name} "))
    head = next(line for line in lines[at::-1] if line.startswith(("run ", "recipe ")))
    found = [re.split(r"\s{2,}", line) for line in (head, lines[at])]
    return dict(zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# runs


def test_a_run_and_all_that_is_said_of_it(shown):
    run("small")
    assert row(shown(), "small") == {
        **{"run": "small", "parameters": PARAMETERS, "data": "mine", "iter": "30"},
        **{"best loss": "3.2500", "at": "20", "age": "5 min", "state": "stopped, 75%"},
    }


def test_the_newest_comes_first_by_its_row_or_checkpoint(shown):
    run("middle", seconds=2 * DAYS)
    run("old", seconds=900 * DAYS)
    run("saved", seconds=900 * DAYS)
    os.utime("out/saved/ckpt/last/state.json", (time.time() - DAYS,) * 2)
    run("row", seconds=900 * DAYS)
    os.utime("out/row/metrics.csv")
    assert [line.split()[0] for line in shown()] == ["run", "row", "saved", "middle", "old"]
    assert [row(shown(), name)["age"] for name in ("row", "saved", "middle", "old")] == [
        *("0 s", "24 h", "2 days", "900 days")
    ]


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        ({}, "stopped, 75%"),
        ({"finished": False, "MAX_ITERS": 31}, "stopped, 96%"),
        ({"finished": True}, "finished"),  # patience
        ({"finished": True, "saved": 20}, "stopped, 75%"),  # it went on after that
        ({"MAX_ITERS": 20}, "stopped, 100%"),
        ({"MAX_ITERS": None}, "stopped"),
    ],
)
def test_how_a_run_stands(shown, keys, state):
    run("small", **keys)
    assert row(shown(), "small")["state"] == state


def test_a_run_that_goes_on_is_told_from_one_that_was_killed(shown):
    folder = run("small", finished=True)
    Path("out/begun").mkdir()
    with open(folder / ".lock", "w") as one, open("out/begun/.lock", "w") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert row(shown(), "small")["state"] == "running, 75%"
        assert row(shown(), "begun") == {
            **{"run": "begun", "parameters": "-", "data": "-", "iter": "0", "best loss": "-", "at": "-"},
            **{"age": "0 s", "state": "running"},
        }
    assert row(shown(), "small")["state"] == "finished"
    assert "begun  no run: " in "\n".join(shown())


def test_what_is_missing_is_taken_from_the_checkpoint_or_is_a_dash(shown):
    run("no_log", rows=None, best_iter=10, best_loss=4.0)
    run("no_best", rows="iter,val_loss\n0,\n30,nan\n", best_iter=10, best_loss=4.0)
    for name in ("only_recipe", "only_rows"):
        (Path("out") / name).mkdir()
    Path("out/only_recipe/config.toml").write_text('n_embd = 8\ndataset = "mine"\nmax_iters = 10\n')
    Path("out/only_rows/metrics.csv").write_text(ROWS)
    lines = shown()
    expected = {
        "no_log": (PARAMETERS, "mine", "30", "4.0000", "10", "stopped, 75%"),
        "no_best": (PARAMETERS, "mine", "30", "-", "-", "stopped, 75%"),
        "only_recipe": ("-", "mine", "0", "-", "-", "stopped, 0%"),
        "only_rows": ("-", "-", "30", "3.2500", "20", "stopped"),
    }
    for name, cells in expected.items():
        found = row(lines, name)
        assert (*list(found.values())[1:6], found["state"]) == cells


def test_what_cannot_be_read_comes_last_and_hides_nothing(shown, monkeypatch):
    run("good")
    run("a_folder").joinpath("metrics.csv").unlink()
    Path("out/a_folder/metrics.csv").mkdir()
    run("wide").joinpath("ckpt/last/state.json").write_text('{"config": {"max_iters": "x"}}')
    Path("out/empty").mkdir()
    Path("out/gone").symlink_to("nowhere")
    Path("out/a_file").write_text("")
    Path("out/.hidden").mkdir()
    lines = shown()
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[2:]}
    assert lines[1].startswith("good ")
    assert list(said) == ["a_folder", "empty", "gone", "wide"]
    assert said["a_folder"] == "out/a_folder/metrics.csv cannot be read: Is a directory"
    assert said["empty"] == said["gone"] == "no run: neither metrics.csv nor config.toml nor ckpt/ is here"
    assert said["wide"].startswith("is damaged: ")
    monkeypatch.setattr(Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "No", str(path))))
    assert "good      cannot be read: No: out/good/metrics.csv" in shown()


def test_damaged_state_leaves_what_the_log_says(shown):
    run("small").joinpath("ckpt/last/state.json").write_text("{")
    assert row(shown(), "small")["best loss"] == "3.2500"


def test_runs_moved_aside_are_counted_only(shown):
    run("small")
    for name in ("small.old-20260102-030405", "small.old-20260102-030406", "mine.old-one"):
        run(name)
    lines = shown()
    assert sorted(line.split()[0] for line in lines[1:3]) == ["mine.old-one", "small"]
    assert lines[3:] == ["", "left out, moved aside by --overwrite: 2, out/*.old-<time>"]


def test_no_runs_yet(shown, monkeypatch):
    assert shown() == ["no runs in out/ yet"]
    Path("out").mkdir()
    assert shown() == ["no runs in out/ yet"]
    Path("out").rmdir()
    Path("out").write_text("")
    assert shown() == ["no runs to be seen: out: Not a directory"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((-100, "0 s"), (0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h")),
        *((2 * DAYS - 1, "47 h"), (2 * DAYS, "2 days"), (3 * DAYS - 1, "2 days"), (1000 * DAYS, "1,000 days")),
    ],
)
def test_age(seconds, said):
    assert format_age(seconds) == said


# ---------------------------------------------------------------------------------------------------------------------
# the table


def columns(text: str) -> int:
    """On a terminal, of a text without combining characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def test_columns_are_aligned_whatever_the_names(shown):
    names = ("a", "shakespeare_char_fast", "🎈 of 東京", "x" * 200, "東" * 80, "two\nlines\x1b[2J", "Naïve café")
    for n, name in enumerate(names):
        run(name, seconds=60 * n, MAX_ITERS=10 ** (n + 2), DATASET="wikipedia_p50k_base" * (n + 1))
    Path("out", "y" * 150).mkdir()
    lines = shown()
    assert len(lines) == len(names) + 2
    assert all(columns(line) <= 100 for line in lines)
    state = lines[0].index("state")
    for line in lines[1:-1]:
        cut = next(n for n in range(len(line)) if columns(line[:n]) == state)
        assert line[cut - 2 : cut + 7] == "  stopped", line
    text = "\n".join(lines)
    assert all(
        f"\n{name}  " in text for name in ("a", "shakespeare_char_fast", "🎈 of 東京", "two\ufffdlines\ufffd[2J")
    )
    assert re.search(r"\nx{10,}\.\.\.  ", text)
    assert re.search(r"\n東{5,}\.\.\. {2,3}", text)
    assert re.match(r"y{10,}\.\.\.  no run: ", lines[-1])
    assert "  wikipedia_p50k_ba...  " in text


def test_accents_of_their_own_take_no_column(shown):
    run("cafe\u0301", seconds=60)
    run("cafes")
    lines = shown()
    assert (lines[1].index(PARAMETERS), lines[2].index(PARAMETERS)) == (13, 12)


def test_numbers_stand_at_the_right(shown):
    run("small")
    run("large", rows="iter,val_loss\n1000000,12.5\n", seconds=90, N_EMBD=800)
    head, *lines = shown()
    for key in ("parameters", "iter", "best loss", "at", "age"):
        end = re.search(rf"(?<=  ){key}(?=  )", head).end()
        assert all(line[end - 1] != " " and line[end] == " " for line in lines), key


def test_terminal_that_is_not_utf8(in_tmp, monkeypatch):
    run("東京")
    run("\udcff")  # Python's for a byte that is no UTF-8
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    cli.run_script(print_list, {})
    assert sorted(line.split()[0] for line in output.buffer.getvalue().splitlines()[1:]) == [b"?", b"??"]


# ---------------------------------------------------------------------------------------------------------------------
# recipes


def recipe(*words) -> TrainConfig:
    return cli.parse(TrainConfig, list(words))


def data(name: str, meta: str) -> None:
    Path("data", name).mkdir(parents=True)
    Path("data", name, "meta.json").write_text(meta)


def test_recipes_the_smallest_first_and_what_is_wrong_with_others(shown):
    lines = shown(
        large=recipe("--n_layer", "12"),
        small=recipe("--n_layer", "1"),
        long=recipe("--epochs", "2.5", "--n_layer", "30"),
        wrong=UserError("2 problems:\n  1. one\n  2. " + "two" * 100),
        unknown=recipe("--dataset", "mine"),
    )
    assert lines[-2:] == ["", "no runs in out/ yet"]
    assert [line.split()[0] for line in lines[:-2]] == ["recipe", "small", "large", "long", "unknown", "wrong"]
    assert row(lines, "small") == {
        **{"recipe": "small", "data": "pydoc", "train tokens": "made at start", "iters": "2,000"},
        "parameters": f"{recipe('--n_layer', '1', '--vocab_size', '257').num_params():,}",
    }
    assert (row(lines, "long")["iters"], row(lines, "unknown")["parameters"]) == ("2.5 epochs", "-")
    assert row(lines, "unknown")["train tokens"] == "not prepared"
    assert lines[-3].startswith("wrong    2 problems: 1. one 2. twotwo")
    assert (len(lines[-3]), lines[-3][-3:]) == (100, "...")


@pytest.mark.parametrize(
    ("dataset", "words", "ids"),
    [
        ("shakespeare", (), 50257),
        ("shakespeare_byte", (), 257),
        ("wikipedia_p50k_base", (), 50281),
        ("shakespeare", ("--vocab_size", "50304"), 50304),
        ("prepared", (), 99),
        ("prepared", ("--vocab_size", "1000"), 1000),
        ("nanogpt", (), 50257),
        ("shakespeare_mine", (), None),
        ("mine", (), None),
        ("mine_byte", (), None),
        ("mine", ("--vocab_size", "1000"), 1000),
    ],
)
def test_parameters_follow_from_the_recipe_or_the_data(shown, dataset, words, ids):
    data("prepared", json.dumps({"vocab_size": 99, "splits": {"train": {"tokens": 12345}}}))
    Path("data/nanogpt").mkdir()
    Path("data/nanogpt/train.bin").write_bytes(bytes(2000))
    config = recipe("--dataset", dataset, *words)
    found = row(shown(it=config), "it")
    assert found["parameters"] == (f"{recipe('--vocab_size', str(ids)).num_params():,}" if ids else "-")
    assert found["train tokens"] == {"prepared": "12,345", "nanogpt": "1,000"}.get(dataset, "not prepared")


def test_ids_known_beforehand_are_the_tokenizers():
    assert run_list.SIZES == tokenizer_files.SIZES
    assert {name: SOURCES[name].tokenizer for name in SOURCES if name not in ("hub", "text")} == run_list.TOKENIZERS


@pytest.mark.parametrize(
    "meta", ["{", "[]", "{}", '{"vocab_size": 9, "splits": []}', '{"vocab_size": 9, "splits": {"train": 1}}']
)
def test_data_that_is_damaged(shown, meta):
    data("mine", meta)
    assert row(shown(it=recipe("--dataset", "mine")), "it")["train tokens"] == "damaged"


def test_data_without_a_train_split(shown):
    data("mine", '{"vocab_size": 9, "splits": {"val": {"tokens": 5}}}')
    assert row(shown(it=recipe("--dataset", "mine")), "it")["train tokens"] == "-"


def test_recipe_that_goes_on_from_a_run_has_its_size(shown):
    run("small")
    lines = shown(there=recipe("--init_from", "out/small"), hub=recipe("--init_from", "gpt2"))
    assert (row(lines, "there")["parameters"], row(lines, "hub")["parameters"]) == (PARAMETERS, "-")


# ---------------------------------------------------------------------------------------------------------------------
# train.py --list


def test_command_lists_recipes_and_a_real_run(cli, tiny_run, tiny_home, monkeypatch):
    monkeypatch.chdir(tiny_home)
    done = cli("train", "--list")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert row(lines, "gpt2_124m")["parameters"] == "124,439,808"
    assert row(lines, "finetune_shakespeare")["iters"] == "20"
    found = row(lines[lines.index("") :], tiny_run.name)
    assert (found["data"], found["iter"], found["state"]) == ("tiny", "60", "finished")
    assert found["at"] in ("30", "60")
    assert 0 < float(found["best loss"]) < 6
    assert all(columns(line) <= 100 for line in lines)


def test_command_line_changes_the_recipes_and_only_the_first_rank_prints(cli, run_copy, monkeypatch):
    Path("data").rename("elsewhere")
    words = ("--list", "--data_dir", "elsewhere", "--dataset", "tiny", "--vocab_size", 300, "--n_layer", 2)
    for key, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    printed = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        printed[rank] = cli("train", *words)
    assert [done.code for done in printed.values()] == [0, 0]
    assert printed["1"].out == ""
    found = row(printed["0"].out.splitlines(), "shakespeare")
    tokens = json.loads(Path("elsewhere/tiny/meta.json").read_text())["splits"]["train"]["tokens"]
    assert (found["data"], found["train tokens"]) == ("tiny", f"{tokens:,}")


def test_neither_torch_nor_numpy_is_loaded(tiny_home):
    code = (
        "import runpy, sys\n"
        f"sys.argv, sys.path[0] = ['train.py', '--list'], {str(ROOT)!r}\n"
        f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "print([m for m in ('torch', 'numpy', 'tiktoken') if m in sys.modules])\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tiny_home, capture_output=True, text=True)
    assert answer.stdout.endswith("\nexit None\n[]\n"), answer
