"""prepare_data.py as a user runs it: what it writes, what it prints, and how it says no."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from dataset_files import WRITTEN, cut, flip, hub_data, write, wrong_id
from in_process import TEXT

import prepare_data
from config import PrepareConfig, TrainConfig
from flatgpt.cli import cli as command_line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("text --input a.txt --tokenizer byte --data_dir a.txt/x", "a.txt/x/text_byte could not be written"),
        ("text --input a.txt --tokenizer gpt5", "tokenizer gpt5: unknown"),
        ("text --input a.txt --tokenizer byte --encoder gigatoken", "--encoder gigatoken supports tokenizer gpt2"),
        ("shakespear", "did you mean shakespeare?"),
        ("text --input a.txt --tokenizer byte --splits eval", "splits = eval: one of train, val, test is expected"),
        ("text --input a.txt --val_fraction 0.5 --test_fraction 0.5", "no text is left for train"),
        ("text --input a.jsonl --tokenizer byte --column body", "a.jsonl line 1: no text 'body' in {'n': 'int'"),
        ("text", "source text needs --input"),
        ("", "source: missing"),
        ("text --input a.txt --tokenizer gpt2 byte", "several tokenizers apply to source compare, not text"),
        ("text --input a.txt --tokenizer bpe:99", "bpe:99: bpe:N needs a number of ids from 257"),
        ("text --input a.txt --tokenizer bpe:300 --encoder gigatoken", "--encoder gigatoken supports tokenizer gpt2"),
        ("text --input a.txt --parse_special --encoder gigatoken", "--parse_special needs --encoder tiktoken"),
        ("compare --tokenizer byte", "source compare needs --input"),
        ("compare --input a.txt --tokenizer byte --parse_special", "do not apply to source compare"),
        ("--info mine", "info = mine: no such folder; give data/NAME"),
        ("--verify .", "verify = .: no dataset in this folder; give data/NAME"),
        ("text --input a.txt --tokenizer byte --data_dir a.txt", "Not a directory; choose another folder: --data_dir"),
        ("text --input a.txt --tokenizer byte --splits val,test", "separate them by blanks: --splits val test"),
        ("text --input a.txt --name raw", "name = raw: this folder of data has the downloads; choose another"),
        ("text --input a.txt --tokenizer gpt2 --tokenizer_sample_mb 5", "applies to --tokenizer bpe:N"),
        ("text --input a.txt --tokenizer bpe:4,09", "several tokenizers apply to source compare"),
        ("text --input a.txt --tokenizer bpe:65_537", "bpe:65537: bpe:N needs a number of ids"),
        ("text --input a.txt --tokenizer o200k_base", "o200k_base: has 200,019 ids; at most 65,536 fit"),
        ("text --input a.txt --tokenizer folder", "folder/tokenizer.json is a folder; a file is expected"),
        ("text --input a.txt --tokenizer folder/tokenizer.json", "folder/tokenizer.json is a folder"),
    ],
)
def test_mistake_is_one_error_line(in_tmp, cli, words, said):
    Path("a.txt").write_text("some text\n" * 10)
    write(Path("a.jsonl"), ["some text"] * 10)
    Path("folder/tokenizer.json").mkdir(parents=True)
    assert said in cli("prepare_data", *words.split()).error
    assert not Path("data").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what it prints


@pytest.fixture
def made(in_tmp, cli):
    """data/mine: three splits, several shards each."""
    write(Path("a.jsonl"), WRITTEN)
    words = "text --input a.jsonl --tokenizer byte --name mine --test_fraction 0.2 --shard_tokens 1000"
    return cli("prepare_data", *words.split())


def test_table_has_the_manifests_numbers(made):
    assert (made.code, made.err) == (0, "")
    entries = json.loads(Path("data/mine/meta.json").read_text())["splits"]
    first, header, *lines, last = made.out.splitlines()
    assert re.fullmatch(r"data/mine: text, tokenizer byte \(257 ids\), \d+\.\d s", first)
    assert header.split() == ["split", "documents", "tokens", "bytes", "bytes/token", "shards"]
    sums = {key: sum(entry[key] for entry in entries.values()) for key in ("documents", "tokens", "bytes")}
    sums["files"] = [file for entry in entries.values() for file in entry["files"]]
    for line, (split, entry) in zip(lines, {**entries, "total": sums}.items(), strict=True):
        numbers = [f"{entry['documents']:,}", f"{entry['tokens']:,}", f"{entry['bytes']:,}"]
        ratio = f"{entry['bytes'] / entry['tokens']:.2f}"
        assert line.split() == [split, *numbers, ratio, str(len(entry["files"]))]
    assert last.startswith("next: python train.py")


def test_license_of_a_known_text_is_printed(in_tmp, cli):
    assert "\nlicense of the text: PSF-2.0\n" in cli("prepare_data", "pydoc").out


def test_info_says_what_the_manifest_says_and_shows_text(made, cli):
    meta = json.loads(Path("data/mine/meta.json").read_text())
    done = cli("prepare_data", "--info", "data/mine")
    assert (done.code, done.err) == (0, "")
    for key, value in meta.items():
        if key != "splits":
            text = f"{value:,}" if type(value) is int else str(value)
            assert re.search(rf"^{key} +{re.escape(text)}$", done.out, re.MULTILINE)
    assert "\n".join(made.out.splitlines()[1:-1]) in done.out
    for split in meta["splits"]:
        ids = Path(f"data/mine/{split}_000000.bin").read_bytes()[:40:2]
        assert f"--- {split}, the first 60 tokens\n{ids.decode(errors='ignore')[:10]}" in done.out


@pytest.mark.usefixtures("made")
def test_wrong_folder_or_tokenizer_is_answered_with_those_that_exist(cli):
    """A dataset's name is not its path."""
    for words, said in (
        ("--info mine", "info = mine: no such folder; folders that have one: data/mine"),
        ("--verify data", "verify = data: no dataset in this folder; folders that have one: data/mine"),
        ("--info nope", "info = nope: no such folder; folders that have one: data/mine"),
        ("text --input a.jsonl --tokenizer mine", "; did you mean --tokenizer data/mine?"),
    ):
        assert cli("prepare_data", *words.split()).error.endswith(said)


@pytest.mark.usefixtures("made")
def test_verify_of_what_is_whole(cli):
    shards = len(list(Path("data/mine").glob("*.bin")))
    done = cli("prepare_data", "--verify", "data/mine")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"data/mine: {shards} shards, all match meta.json\n"


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("damage", "said"),
    [(flip, "SHA-256"), (wrong_id, "id 257 at byte"), (cut, "truncated"), (Path.unlink, "No such file")],
)
def test_verify_and_info_name_what_is_damaged(cli, damage, said):
    for name in ("train_000001.bin", "test_000000.bin"):
        damage(Path("data/mine", name))
    error = cli("prepare_data", "--verify", "data/mine").error
    assert error.startswith("error: data/mine/train_000001.bin")
    assert "; data/mine/test_000000.bin" in error
    assert (error.count(said), error.lower().count("move ")) == (2, 1)
    assert "val_0" not in error
    if damage in (cut, Path.unlink):
        assert cli("prepare_data", "--info", "data/mine").error.startswith("error: data/mine/")
    Path("data/mine/meta.json").unlink()
    assert "dataset data/mine is not finished: run python" in cli("prepare_data", "--verify", "data/mine").error


def test_nothing_to_do_takes_no_raw_files_where_the_revision_names_them(in_tmp, cli):
    commit = "0123456789" * 4
    hub_data({"train.jsonl": WRITTEN}, revision=commit)
    shutil.rmtree("raw")
    words = ["hub", "--repo", "user/data", "--revision", commit, "--tokenizer", "byte", "--val_fraction", 0.1]
    done = cli("prepare_data", *words, "--raw_dir", "raw")
    assert done.out.startswith("data/data_byte already exists, with the same settings; nothing to do\n")
    assert not Path("raw").exists()


@pytest.mark.parametrize(
    "keys", [{}, {"name": "quickstart"}, {"name": "shakespeare"}, {"data_dir": "with space"}, {"splits": ("val",)}]
)
def test_command_that_it_names_trains_on_what_it_made(in_tmp, capsys, keys):
    """Also where a recipe has the dataset's name and trains on another one; none without a training split."""
    (in_tmp / "a.txt").write_bytes(TEXT.encode())
    prepare_data.main(PrepareConfig(source="text", input=("a.txt",), tokenizer="byte", **keys))
    _, _, last = capsys.readouterr().out.partition("next: python ")
    if "splits" in keys:
        assert last == ""
        return
    verb, *words = shlex.split(last)
    config = command_line.parse(TrainConfig, words)
    assert verb == "train.py"
    made = keys.get("name", "text_byte")
    assert (config.data_dir, config.dataset) == (keys.get("data_dir", "data"), made)
    assert Path(config.data_dir, made, "meta.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def test_compare_prints_a_row_for_each_tokenizer(in_tmp, cli):
    """The figures are those of a plain count over the last tenth of the text. A tokenizer that fails is said to."""
    text = "naïve cafés\n" * 1000
    Path("a.txt").write_bytes(text.encode())
    done = cli("prepare_data", *["compare", "--input", "a.txt", "--tokenizer", "byte", "bpe:268", "bpe:900"])
    assert (done.code, done.err) == (0, "")
    assert "1,400 bytes, 200 words" in done.out
    assert "tokenizer bpe:900: the training split gives only" in done.out
    rows = [line.split() for line in done.out.splitlines()[-4:]]
    unused = 257 - len(set(text.encode()))
    assert rows[0] == ["tokenizer", "ids", "bytes/token", "tokens/word", "unused", "ids"]
    assert rows[1] == ["byte", "257", "1.00", "7.00", str(unused), f"({unused / 257:.0%})"]
    assert rows[2][:4] == ["bpe:268", "268", "4.67", "1.50"]  # naïve, cafés and the line end
    assert rows[3] == ["bpe:900"]
    assert not Path("data").exists()


@pytest.mark.parametrize("name", ["bpe:1,000", "bpe:1_000"])
def test_digits_of_bpe_may_be_grouped(in_tmp, cli, name):
    Path("a.txt").write_text(" ".join(f"word{n} word{n}" for n in range(2000)))
    done = cli("prepare_data", *["text", "--input", "a.txt", "--tokenizer", name])
    assert done.out.startswith("data/text_bpe1000: text, tokenizer bpe:1000 (1,000 ids)")
    rows = cli("prepare_data", *["compare", "--input", "a.txt", "--tokenizer", name, "byte"]).out.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["bpe:1000", "byte"]


def test_source_may_follow_the_tokenizer(in_tmp, cli):
    Path("a.txt").write_text("some text\n" * 100)
    done = cli("prepare_data", *["--tokenizer", "byte", "text", "--input", "a.txt"])
    assert done.out.startswith("data/text_byte: text,")


def test_info_shows_text_of_the_folders_own_tokenizer(in_tmp, cli):
    Path("a.txt").write_text("some text\n" * 100)
    made = cli("prepare_data", *["text", "--input", "a.txt", "--tokenizer", "bpe:260", "--name", "mine"])
    assert made.out.startswith("data/mine: text, tokenizer bpe:260 (260 ids)")
    done = cli("prepare_data", "--info", "data/mine")
    assert "--- val, the first" in done.out
    assert done.out.count("some text") > 9
    assert cli("prepare_data", "--verify", "data/mine").out == "data/mine: 2 shards, all match meta.json\n"
