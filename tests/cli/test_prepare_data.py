"""prepare_data.py as a user runs it: what it writes, what it prints, and how it says no."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from dataset_files import WRITTEN, cut, flip, hub_data, write, wrong_id
from in_process import TEXT
from processes import command

import prepare_data
from config import PrepareConfig, TrainConfig
from flatgpt.cli import cli


def run(capsys, *words) -> tuple[int, str, str]:
    """prepare_data.py in this process: its exit code, standard output and standard error."""
    try:
        cli.run_script(lambda words: prepare_data.main(cli.parse(PrepareConfig, words)), list(map(str, words)))
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


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
        ("text --input a.txt --tokenizer byte --encoder gigatoken", "--encoder gigatoken: not for tokenizer byte"),
        ("shakespear", "did you mean shakespeare?"),
        ("text --input a.txt --tokenizer byte --splits test", "splits = test: text has train, val; --test_fraction"),
        ("text --input a.txt --tokenizer byte --splits eval", "splits = eval: one of train, val, test is expected"),
        ("text --input a.txt --val_fraction 0.5 --test_fraction 0.5", "leave nothing to train on"),
        ("text --input a.txt --tokenizer byte --shard_tokens 0", "shard_tokens = 0"),
        (
            "text --input a.jsonl --tokenizer byte --column body",
            "a.jsonl line 1: no key 'body', its keys are n, text",
        ),
        ("text --input a.txt --sample_size 0", "sample_size = 0"),
        ("text", "source text needs --input"),
        ("", "source: missing"),
        ("text --input a.txt --info .", "leave out text"),
        ("--info mine", "dataset mine is not there: run python prepare_data.py text --input FILES --name mine"),
        ("--verify mine", "dataset mine is not there: run python prepare_data.py text --input FILES --name mine"),
        ("--info a.txt", "dataset a.txt is not there"),
    ],
)
def test_mistake_is_one_error_line(in_tmp, capsys, words, said):
    Path("a.txt").write_text("some text\n" * 10)
    write(Path("a.jsonl"), ["some text"] * 10)
    code, out, err = run(capsys, *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert said in err
    assert not Path("data").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what it prints


def made(**keys):
    """data/mine: three splits, several shards each."""
    write(Path("a.jsonl"), WRITTEN)
    settings = {"test_fraction": 0.2, "tokenizer": "byte", "name": "mine", "shard_tokens": 1000, **keys}
    config = PrepareConfig(source="text", input=("a.jsonl",), **settings)
    return prepare_data.prepare(config, lambda line: None)


def test_table_has_the_manifests_numbers_and_the_seconds(in_tmp, capsys):
    write(Path("a.jsonl"), WRITTEN)
    words = ["text", "--input", "a.jsonl", "--tokenizer", "byte", "--test_fraction", 0.2, "--shard_tokens", 1000]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    entries = json.loads(Path("data/text_byte/meta.json").read_text())["splits"]
    lines = out.splitlines()
    assert lines[0] == "data/text_byte: text, tokenizer byte (257 ids)"
    assert lines[1].split() == ["split", "documents", "tokens", "bytes", "bytes/token", "shards", "seconds"]
    sums = {key: sum(entry[key] for entry in entries.values()) for key in ("documents", "tokens", "bytes")}
    sums["files"] = [file for entry in entries.values() for file in entry["files"]]
    for line, (split, entry) in zip(lines[2:6], {**entries, "total": sums}.items(), strict=True):
        numbers = [f"{entry['documents']:,}", f"{entry['tokens']:,}", f"{entry['bytes']:,}"]
        ratio = f"{entry['bytes'] / entry['tokens']:.2f}"
        seconds = line.split()[6:]
        assert line.split()[:6] == [split, *numbers, ratio, str(len(entry["files"]))]
        assert len(seconds) == (split == "total")
        assert all(re.fullmatch(r"\d+\.\d", text) for text in seconds)
    assert lines[6].startswith("next: python train.py")
    assert len(lines) == 7


def test_table_without_seconds(in_tmp):
    """Of several splits it has the sums; of one it has not."""
    data = made()
    lines = prepare_data.table(data).splitlines()
    assert lines[0].split()[-1] == "shards"
    assert [line.split()[0] for line in lines[1:]] == ["train", "val", "test", "total"]
    assert prepare_data.table(data, 12.345).splitlines()[-1].endswith(" 12.3")
    one = made(splits=("val",), name="one")
    assert [line.split()[0] for line in prepare_data.table(one).splitlines()] == ["split", "val"]
    assert prepare_data.table(one, 0.5).splitlines()[-1].split()[0] == "total"


def test_info_says_what_the_manifest_says_and_shows_text(in_tmp, capsys):
    data = made()
    code, out, err = run(capsys, "--info", data.folder)
    assert (code, err) == (0, "")
    for key, value in data.meta.items():
        if key != "splits":
            assert re.search(rf"^{key} +{value:,}$" if type(value) is int else rf"^{key} +{value}$", out, re.MULTILINE)
    assert prepare_data.table(data) in out
    for split in data.meta["splits"]:
        start = bytes(i for i in data.tokens(split)[:60].tolist() if i < 256).decode(errors="ignore")[:10]
        assert f"--- {split}, the first 60 tokens\n{start}" in out


def test_verify_of_what_is_whole(in_tmp, capsys):
    data = made()
    shards = sum(len(entry["files"]) for entry in data.meta["splits"].values())
    assert shards > 5
    answer = f"data/mine: {shards} shards, sizes, ids and SHA-256 as written\n"
    assert run(capsys, "--verify", "data/mine") == (0, answer, "")
    made(splits=("val",), name="one", shard_tokens=10**6)
    assert run(capsys, "--verify", "data/one")[1] == "data/one: 1 shard, sizes, ids and SHA-256 as written\n"
    code, out, _ = run(capsys, "--verify", "data/mine", "--info", "data/one")
    assert code == 0
    assert answer in out
    assert "--- val, the first 60 tokens" in out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "its SHA-256 is not meta.json's"),
        (wrong_id, "id 257 at byte"),
        (cut, "truncated"),
        (Path.unlink, "cannot be read: No such file"),
    ],
)
def test_verify_names_all_that_is_damaged(in_tmp, capsys, damage, said):
    made()
    for name in ("train_000001.bin", "test_000000.bin"):
        damage(Path("data/mine", name))
    code, out, err = run(capsys, "--verify", "data/mine")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: data/mine/train_000001.bin")
    assert "; data/mine/test_000000.bin" in err
    assert err.count(said) == 2
    assert "val_0" not in err
    assert err.endswith("Move the folder away and run prepare_data.py again\n")


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_info_of_what_is_damaged_names_the_file(in_tmp, capsys, damage):
    made()
    damage(Path("data/mine/val_000000.bin"))
    code, _, err = run(capsys, "--info", "data/mine")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: data/mine/val_000000.bin")


@pytest.mark.parametrize("flag", ["--info", "--verify"])
def test_unfinished_dataset_is_not_looked_at(in_tmp, capsys, flag):
    made()
    Path("data/mine/meta.json").unlink()
    code, out, err = run(capsys, flag, "data/mine")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: dataset data/mine is not finished: run python prepare_data.py")


def test_nothing_to_do_takes_neither_vocabulary_nor_network(tmp_path):
    write(tmp_path / "a.jsonl", WRITTEN)
    words = ["text", "--input", "a.jsonl", "--tokenizer", "gpt2", "--name"]
    first = command("prepare_data", *words, "mine", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    (tmp_path / "empty").mkdir()
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:1")
    nowhere |= {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "no_proxy": "", "NO_PROXY": ""}
    other = command("prepare_data", *words, "other", cwd=tmp_path, env=nowhere)
    assert (other.returncode, other.stdout, other.stderr.count("\n")) == (2, "", 1)
    assert other.stderr.startswith("error: tokenizer gpt2: its vocabulary could not be fetched")
    assert not (tmp_path / "data/other").exists()
    again = command("prepare_data", *words, "mine", cwd=tmp_path, env=nowhere)
    assert (again.returncode, again.stderr) == (0, "")
    first_lines, again_lines = first.stdout.splitlines(), again.stdout.splitlines()
    assert again_lines[0] == "data/mine is there already, with these settings; nothing to do"
    assert again_lines[1:5] == first_lines[:4]
    assert again_lines[-1] == first_lines[-1]


def test_nothing_to_do_takes_no_raw_files_where_the_revision_names_them(in_tmp, capsys):
    commit = "0123456789" * 4
    made = hub_data({"train.jsonl": WRITTEN}, revision=commit)
    before = prepare_data.table(made)
    shutil.rmtree("raw")
    words = ["hub", "--repo", "user/data", "--revision", commit, "--tokenizer", "byte", "--val_fraction", 0.1]
    code, out, _ = run(capsys, *words, "--raw_dir", "raw")
    assert code == 0
    assert out.startswith("data/data_byte is there already, with these settings; nothing to do\n")
    assert before.splitlines()[1].split()[:5] == out.splitlines()[3].split()[:5]
    assert not Path("raw").exists()


def test_nothing_to_train_on_names_no_next_command(in_tmp, capsys):
    write(Path("a.jsonl"), WRITTEN)
    code, out, _ = run(capsys, "text", "--input", "a.jsonl", "--tokenizer", "byte", "--splits", "val")
    assert code == 0
    assert "next:" not in out


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
