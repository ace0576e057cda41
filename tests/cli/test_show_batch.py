"""train.py --show_batch: the documents that an update was trained on."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from in_process import TINY, train_here
from run_files import snapshot

import train
from config import PrepareConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.data.dataset import Dataset
from flatgpt.data.prepare import prepare
from flatgpt.runs.lock import RunLock

WORDS = ("--batch_size", 3, "--grad_accum_steps", 2, "--sample_tokens", 0, "--stride", 20)


@pytest.fixture
def documents(in_tmp) -> list[str]:
    """The training texts of data/tiny, which are shorter than a window; its shards have 100 ids."""
    texts = [f"Text {n}\x1b[2J über\n{'la ' * (n % 7)}" for n in range(120)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"name": "tiny", "tokenizer": "byte", "shard_tokens": 100}
    prepare(PrepareConfig(source="text", input=("texts.jsonl",), **settings), lambda line: None)
    return texts


def trained_on(*words) -> list[list[list[int]]]:
    """Train. Return the ids that each update has read, a list per sequence with inputs and last target."""
    batches, real = [], train.train_step

    def train_step(run, i):
        forward, rows = run.forward, []

        def record(x, y):
            rows.extend(torch.cat([x, y[:, -1:]], dim=1).tolist())
            return forward(x, y)

        run.forward = record
        answer = real(run, i)
        run.forward = forward
        batches.append(rows)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        train_here(*words)
    return batches


def test_it_is_what_the_update_was_trained_on(documents, cli):
    """Update N is the one whose loss is in row iter N. From the settings of a run, of its recipe, or typed again."""
    batches = trained_on(*WORDS, "--max_iters", 40, "--eval_interval", 40)
    shards = {path.name: path.read_bytes() for path in Path("data/tiny").glob("train_*.bin")}
    whole = b"".join(shards[name] for name in sorted(shards))
    spans = 0
    for n in (1, 6, 39, 40):
        done = cli("train", "--resume", "--show_batch", n, "--json", "-")
        found = json.loads(done.out)
        assert (found["update"], found["max_iters"], found["tokenizer"], done.err) == (n, 40, "byte", "")
        assert [sequence["ids"] for sequence in found["sequences"]] == batches[n - 1]
        for at, sequence in enumerate(found["sequences"]):
            assert (sequence["sequence"], sequence["micro_batch"]) == (at, at // 3)
            assert sequence["first_token"] == 20 * sequence["window"]
            ids = b"".join(i.to_bytes(2, "little") for i in sequence["ids"])
            assert whole.startswith(ids, 2 * sequence["first_token"])
            assert shards[sequence["shard"]].startswith(ids[:2], 2 * sequence["first_token_in_shard"])
            spans += sequence["shard"] != sequence["last_shard"]
            assert len(sequence["documents"]) == sequence["ids"].count(256) + 1
            assert {*sequence["documents"][1:-1]} <= {*documents}
            decoded = "<|endoftext|>".join(sequence["documents"])
            assert decoded == tokenizer.load("byte").decode(sequence["ids"])
    assert spans, "a window that spans two shards"
    assert {sequence["epoch"] for sequence in found["sequences"]} != {0}
    typed = cli("train", *TINY, *WORDS, "--max_iters", 40, "--show_batch", 40)
    for words in (
        "--config out/quickstart/config.toml",
        "--resume out/quickstart",
        "--resume out/quickstart/ckpt/best",
    ):
        assert cli("train", *words.split(), "--show_batch", 40) == typed


def test_text_and_json_say_the_same(documents, cli):
    words = (*TINY, *WORDS, "--show_batch", 3, "--json")
    done = cli("train", *words, "batch.json")
    assert Path("batch.json").read_text() == cli("train", *words, "-").out
    head, _, text = done.out.partition("\n\n")
    assert head == (
        "update 3 of 6, whose loss is in row iter 3 of metrics.csv: 6 sequences of 32 + 1 tokens of data/tiny (byte)"
    )
    found = json.loads(Path("batch.json").read_text())["sequences"]
    parts = text.split("\n\n=== ")
    assert len(parts) == len(found) == 6
    for part, sequence in zip(parts, found, strict=True):
        title, *lines = part.removeprefix("=== ").strip("\n").split("\n")
        place = f"from id {sequence['first_token_in_shard']} of {sequence['shard']}"
        assert title.startswith(
            f"sequence {sequence['sequence']}, micro-batch {sequence['micro_batch']}: window {sequence['window']} of "
            f"epoch {sequence['epoch']}, {place}"
        )
        shown = "\n".join(line.removeprefix("| ") for line in lines).split("--- end of text (id 256)")
        expected = [document.replace("\x1b", "\\x1b") for document in sequence["documents"]]
        assert [document.strip("\n") for document in shown] == [document.strip("\n") for document in expected]
    assert "\x1b" not in done.out


def test_a_run_in_progress_is_only_read(documents, cli):
    run = train_here(*WORDS)
    before = snapshot(Path())
    with RunLock(run) as lock:
        lock.acquire()
        during = snapshot(Path())
        assert cli("train", "--resume", run, "--show_batch", 2).code == 0
        assert snapshot(Path()) == during
    assert snapshot(Path()) == before


def test_a_run_without_a_checkpoint_is_shown_from_its_recipe(documents, cli):
    """As after a loss that was not finite before the first save."""
    run = train_here(*WORDS)
    shown = cli("train", "--resume", run, "--show_batch", 2)
    shutil.rmtree(run / "ckpt")
    command = "python train.py --config out/quickstart/config.toml --show_batch 2"
    error = cli("train", "--resume", run, "--show_batch", 2).error
    assert error.endswith(f"there is no checkpoint; its settings are there: {command}")
    assert cli("train", "--config", run / "config.toml", "--show_batch", 2) == shown


def test_without_a_tokenizer_ids_are_shown(documents, cli, monkeypatch):
    def load_tokenizer(dataset):
        raise UserError("no network")

    words = (*TINY, *WORDS, "--show_batch", 3)
    found = json.loads(cli("train", *words, "--json", "-").out)["sequences"]
    monkeypatch.setattr(Dataset, "load_tokenizer", load_tokenizer)
    done = cli("train", *words)
    assert done.err == "warning: ids are shown instead of text: no network\n"
    lines = done.out.split("\n\n")[1].split("\n")[1:]
    assert " ".join(line.removeprefix("| ") for line in lines) == " ".join(map(str, found[0]["ids"]))
    assert json.loads(cli("train", *words, "--json", "-").out)["sequences"][0]["documents"] is None


ERRORS = [
    ("--show_batch 7", "show_batch = 7: the run has 6 updates; choose one of them"),
    ("--show_batch 0", "--show_batch = 0: at least 1 is expected"),
    ("--show_batch 3 --plan", "show_batch and list or plan exclude each other: give one of them"),
    ("--show_batch 3 --dataset none", "dataset data/none does not exist: run python prepare_data.py text"),
    ("--show_batch 3 --data_dir other", "other/tiny is not the dataset that the run was trained on: restore it"),
    ("--show_batch 3 --seed 1", "the run has other batches: seed = 1 (was 1337); leave out what differs from its"),
    ("--show_batch 3 --batch_size 2", "the run has other batches: batch_size = 2 (was 3); leave out what differs"),
    ("--show_batch 3 --json none/x.json", "json = none/x.json cannot be written, because there is no folder none"),
]


def test_errors(documents, cli):
    train_here(*WORDS)
    shutil.copytree("data/tiny", "other/tiny")
    meta = Path("other/tiny/meta.json")
    meta.write_text(meta.read_text().replace('"source": ', '"source":'))
    for words, message in ERRORS:
        done = cli("train", "--resume", *words.split())
        assert done.error.startswith(f"error: {message}")
        assert done.out == ""


def test_changed_number_of_micro_batches_is_the_same_batch(documents, cli):
    train_here(*WORDS)
    found = [
        json.loads(cli("train", "--resume", "--show_batch", 3, "--json", "-", *words).out)["sequences"]
        for words in ((), ("--batch_size", 2, "--grad_accum_steps", 3))
    ]
    assert [s["ids"] for s in found[0]] == [s["ids"] for s in found[1]]
    assert [s["micro_batch"] for s in found[1]] == [0, 0, 1, 1, 2, 2]


def test_only_the_first_rank_prints(documents, cli, monkeypatch):
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert cli("train", *TINY, "--show_batch", 3) == (0, "", "")
