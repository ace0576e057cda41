"""prepare_data.py as a user runs it: what it writes, what it prints, and how it says no."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import TEXT, command

import cli
import prepare_data
from config import PrepareConfig, TrainConfig


def test_own_files_end_to_end(tmp_path):
    """Folder and pattern, made, opened again, refused with other settings; the numbers printed are meta.json's."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_bytes(TEXT.encode())
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\r\n")
    words = ["text", "--input", "notes", "*.txt", "--tokenizer", "byte", "--name", "mine"]
    made = command("prepare_data", *words, cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    folder = tmp_path / "data" / "mine"
    assert {path.name for path in folder.iterdir()} == {"train_000000.bin", "val_000000.bin", "meta.json"}
    for split, entry in json.loads((folder / "meta.json").read_text())["splits"].items():
        row = rf"{split} +{entry['documents']} +{entry['tokens']:,} +{entry['bytes']:,} +[01]\.\d\d +1"
        assert re.search(row, made.stdout), made.stdout
    again = command("prepare_data", *words, cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    other = command("prepare_data", *words, "--val-fraction=0.3", cwd=tmp_path)
    assert (other.returncode, other.stdout) == (2, "")
    assert other.stderr.startswith("error: ")
    assert "val_fraction" in other.stderr
    assert other.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("text --input a.txt --tokenizer byte --data_dir a.txt/x", "a.txt/x/text_byte could not be written"),
        ("text --input a.txt --tokenizer gpt5", "tokenizer gpt5: unknown"),
        ("text --input none.txt --tokenizer byte", "--input none.txt: no such file"),
        ("shakespear", "did you mean shakespeare?"),
    ],
)
def test_mistake_is_one_error_line(tmp_path, words, said):
    (tmp_path / "a.txt").write_text("some text\n" * 10)
    answer = command("prepare_data", *words.split(), cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert said in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "keys", [{}, {"name": "mine"}, {"name": "quickstart"}, {"data_dir": "elsewhere"}, {"data_dir": "with space"}]
)
def test_command_that_it_names_trains_on_what_it_made(in_tmp, capsys, keys):
    """Also where a recipe has the dataset's name and trains on another one."""
    (in_tmp / "a.txt").write_bytes(TEXT.encode())
    prepare_data.main(PrepareConfig(source="text", input=("a.txt",), tokenizer="byte", **keys))
    verb, words = capsys.readouterr().out.split("next: python ")[1].split(" ", 1)
    config = cli.parse(TrainConfig, shlex.split(words))
    assert verb == "train.py"
    made = keys.get("name", "text_byte")
    assert (config.data_dir, config.dataset) == (keys.get("data_dir", "data"), made)
    assert Path(config.data_dir, made, "meta.json").exists()
