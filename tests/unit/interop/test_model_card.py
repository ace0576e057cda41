"""card.py: what the hub reads, what a person reads, what is known and what is not published."""

import csv
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from config import ModelConfig, TrainConfig
from flatgpt.interop.model_card import card

CONFIG = ModelConfig(
    n_layer=3, n_head=2, n_embd=32, context_length=48, vocab_size=50304, mlp_ratio=2.0, tie_weights=False
)
TRAINED = {**vars(TrainConfig()), **vars(CONFIG), "dtype": "bfloat16", "eval_batches": 0}
STATE = {
    "iter": 1200,
    "tokens": 3_456_000,
    "epoch": 2.5,
    "val_loss": 3.5,
    "config": TRAINED,
    "tokenizer": {"name": "gpt2"},
    "data": {
        "folder": "data/books",
        "end_of_text": True,
        "manifest_sha256": "0" * 64,
        "tokens": {"train": 1_234_567, "val": 8_910},
    },
    "command": ["train.py", "--config", "shakespeare", "--lr", "1e-3"],
    "git_commit": "a" * 40,
    "git_dirty": False,
    "python": "3.11.7",
    "torch": "2.13.0",
    "device": "NVIDIA H200",
    "cpu": "AMD EPYC",
    "ranks": 1,
    "wandb_id": "secretid",
}


def write(state=STATE, path=Path("nowhere/ckpt/iter_001200"), config=CONFIG, **changes) -> str:
    facts = {"name": "books", "repo": None, "tokenizer": "gpt2", "parameters": 1_000_000, "dtype": "float32"}
    return card(path, state, config, **{**facts, "recipe": "lr = 0.001\n" if state else "", **changes})


def metadata(text: str) -> dict:
    """As huggingface_hub reads it."""
    return ModelCard(text).data.to_dict()


def dataset(folder: Path, **meta) -> dict:
    """A state that was trained on a dataset which is there; meta.json says what its source is."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(meta).encode()
    (folder / "meta.json").write_bytes(content)
    data = {**STATE["data"], "folder": str(folder), "manifest_sha256": hashlib.sha256(content).hexdigest()}
    return {**STATE, "data": data}


def log(run: Path, *rows: dict) -> Path:
    """The log of a run; the path of its checkpoint."""
    run.mkdir()
    with open(run / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["iter", "train_loss", "val_loss"])
        writer.writeheader()
        writer.writerows(rows)
    return run / "ckpt/iter_001200"


# ---------------------------------------------------------------------------------------------------------------------
# what the hub reads


def test_metadata_without_a_known_source():
    assert metadata(write()) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "flatgpt"],
    }
    assert metadata(write({}))["tags"] == ["gpt2"]


@pytest.mark.parametrize(
    ("meta", "datasets", "language"),
    [
        ({"source": "wikitext103"}, ["Salesforce/wikitext"], ["en"]),
        ({"source": "fineweb"}, ["HuggingFaceFW/fineweb-edu"], ["en"]),
        ({"source": "wikipedia"}, ["wikimedia/wikipedia"], ["en"]),
        ({"source": "wikipedia", "dump": "20231101.de"}, ["wikimedia/wikipedia"], ["de"]),
        ({"source": "wikipedia", "dump": "20231101.simple"}, ["wikimedia/wikipedia"], None),
        ({"source": "hub", "repo": "some/corpus"}, ["some/corpus"], None),
        ({"source": "shakespeare"}, None, ["en"]),
        ({"source": "pydoc"}, None, ["en"]),
        ({"source": "text"}, None, None),
    ],
)
def test_metadata_of_sources(tmp_path, meta, datasets, language):
    text = write(dataset(tmp_path / "data/books", revision="b08601e", **meta))
    assert metadata(text).get("datasets") == datasets
    assert metadata(text).get("language") == language
    assert f"dataset `books`: source `{meta['source']}`, revision `b08601e`" in text
    assert (f"repository `{datasets[0]}` on the Hugging Face hub" in text) if datasets else ("repository `" not in text)


def test_another_dataset_under_the_same_name_is_not_described(tmp_path):
    state = dataset(tmp_path / "data/books", source="wikitext103", revision="b08601e")
    (tmp_path / "data/books/meta.json").write_text(json.dumps({"source": "shakespeare", "revision": "x"}))
    text = write(state)
    assert "source `" not in text
    assert "datasets" not in metadata(text)
    assert "tokens: train 1,234,567, val 8,910" in text
    assert state["data"]["manifest_sha256"] in text


@pytest.mark.parametrize(
    ("init_from", "base", "said"),
    [
        (None, None, None),
        ("gpt2", "gpt2", "weights of `gpt2`"),
        ("some/model@v1", "some/model", "weights of `some/model@v1`"),
        ("../old/run", None, "weights of another model"),
        ("/home/me/old", None, "weights of another model"),
        ("out/earlier", None, "weights of another model"),
    ],
)
def test_what_training_began_with(in_tmp, init_from, base, said):
    (in_tmp / "out").mkdir()
    text = write({**STATE, "config": {**TRAINED, "init_from": init_from}})
    assert metadata(text).get("base_model") == base
    assert (said in text) if said else ("began with" not in text)
    assert init_from is None or base is not None or init_from not in text


# ---------------------------------------------------------------------------------------------------------------------
# what a person reads


def test_facts():
    text = write()
    for fact in (
        "# `books`",
        "1,000,000 parameters, trained with flatGPT",
        "| layers | 3 |",
        "| width of the MLP | 64 |",
        "| output head | a matrix of its own |",
        "| context | 48 tokens, learned positions |",
        "| tokenizer | gpt2 (tiktoken's name), the model has 50,304 ids |",
        "- tokens: train 1,234,567, val 8,910",
        "- end-of-text after each document: yes",
        "- 1,200 updates, 3,456,000 tokens, 2.50 epochs\n",
        "- on NVIDIA H200\n",
        "- python 3.11.7, torch 2.13.0, flatGPT " + "a" * 40 + "\n",
        "python train.py --config shakespeare --lr 1e-3",
        "```toml\nlr = 0.001\n```",
        "It sees 48 tokens at once.",
    ):
        assert fact in text, fact


def test_variations():
    many = {**STATE, "ranks": 8, "git_dirty": True}
    assert "- on 8 x NVIDIA H200\n" in write(many)
    assert "a" * 40 + ", with local changes\n" in write(many)
    assert "- on AMD EPYC\n" in write({**STATE, "device": "cpu"})
    no_text = {**STATE, "data": {**STATE["data"], "end_of_text": False}}
    assert "end-of-text after each document: no" in write(no_text)
    short = ModelConfig(**{**vars(CONFIG), "context_length": 16, "bias": False, "tie_weights": True})
    assert "| context | 16 tokens (of 48 in training)" in write(config=short)
    assert "| biases | none (stored as zeros) |" in write(config=short)
    assert "| output head | the token embedding's matrix |" in write(config=short)
    assert "| tokenizer | bytes of UTF-8" in write(tokenizer="byte")


@pytest.mark.parametrize(
    ("bias", "attn_bias", "said"),
    [(True, None, "everywhere"), (True, False, "not in attention"), (False, True, "in attention only")],
)
def test_biases(bias, attn_bias, said):
    config = ModelConfig(**{**vars(CONFIG), "bias": bias, "attn_bias": attn_bias})
    assert f"| biases | {said}" in write(config=config)


def test_use_names_the_repository():
    text = write(repo="me/books")
    assert 'pipeline("text-generation", "me/books")' in text
    assert "python infer.py --model_path me/books --prompt" in text
    assert "stands for" not in text
    assert "`user/name` stands for this repository" in write()


def test_the_loss_is_this_checkpoints(tmp_path):
    """state.json is written before it is known, and has that of the evaluation before."""
    rows = {"iter": 1100, "train_loss": 3.6, "val_loss": 3.5}, {"iter": 1200, "train_loss": 3.3, "val_loss": 3.25}
    text = write(path=log(tmp_path / "run", *rows, {"iter": 12000, "train_loss": 1, "val_loss": 1}))
    assert (
        f"validation loss 3.2500 nats per token, perplexity {math.exp(3.25):.2f}: the mean over all of the val" in text
    )
    assert "in windows of 48 tokens that do not overlap, computed in bfloat16 as training was" in text
    assert "training loss of the last update 3.3000 nats per token" in text
    assert "3.5000" not in text


def test_the_loss_of_a_part_of_the_split(tmp_path):
    path = log(tmp_path / "run", {"iter": 1200, "train_loss": 3.3, "val_loss": 3.25})
    state = {**STATE, "config": {**TRAINED, "eval_batches": 20, "batch_size": 16}}
    assert "the mean over the first 20 batches of 16 windows of the val split" in write(state, path)


def test_the_loss_where_the_log_has_none(tmp_path):
    """Not evaluated there, or a checkpoint without its run."""
    path = log(tmp_path / "run", {"iter": 1200, "train_loss": 3.3, "val_loss": ""})
    said = "validation loss 3.5000 nats per token, at an evaluation before this checkpoint"
    assert said in write(path=path)
    assert said in write()
    log(tmp_path / "other", {"iter": 1200, "train_loss": 3.3, "val_loss": 3.25})
    assert said in write(path=tmp_path / "other/copies/iter_001200")
    assert "validation loss" not in write({**STATE, "val_loss": None})


def test_of_a_model_that_others_trained():
    text = write({}, Path("some/folder"))
    assert "1,000,000 parameters, in the layout of Hugging Face's transformers, written by flatGPT" in text
    assert "How it was trained, and on what, is not known here." in text
    assert not re.search("## (Data|Training)|toml|trained with flatGPT", text)


def test_of_an_old_state_with_fewer_facts():
    fewer = {key: STATE[key] for key in ("iter", "config", "tokenizer")} | {"data": {"end_of_text": False}}
    assert "- 1,200 updates\n" in write(fewer)


# ---------------------------------------------------------------------------------------------------------------------
# what is not published, and what could break out


def test_nothing_of_the_machine(tmp_path):
    command = ["train.py", "--data_dir", "/home/me/corpora", "--out_dir=/scratch/me/out", "--config", "~/mine.toml"]
    command += ["--init_from", "C:\\Users\\me\\old", "--lr", "1e-3", "--dataset", "books"]
    config = {**TRAINED, "data_dir": "/home/me/corpora", "out_dir": "/scratch/me/out", "wandb_project": "hidden"}
    state = dataset(tmp_path / "books", source="text", revision="f" * 64)
    text = write({**state, "command": command, "config": config})
    assert "python train.py --data_dir .../corpora --out_dir=.../out --config .../mine.toml" in text
    assert "--init_from .../old --lr 1e-3 --dataset books" in text
    assert not re.search(r"/home|/scratch|Users|secretid|hidden|~/", text)
    assert str(tmp_path) not in text


NASTY = (
    "a`b",
    "`",
    "``",
    "<b>x</b>",
    "[x](http://y)",
    "---",
    "a: [",
    "\n# title\n",
    "\n```\n# title\n```\n",
    "é東",
    "|x|",
)


@pytest.mark.parametrize("text", NASTY)
def test_names_and_words_stay_what_they_are(tmp_path, text):
    """Where Markdown reads: with its code spans and fences taken out, nothing of the text is left."""
    state = dataset(tmp_path / "books", source="hub", repo=text, revision=text)
    state = {**state, "command": ["train.py", "--sample_prompt", text]}
    page = write(state, name=text, recipe=f"sample_prompt = {json.dumps(text)}\n")
    assert metadata(page)["datasets"] == [text]
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", page, re.DOTALL).groups()
    assert len(front.splitlines()) == 4
    plain = write({**state, "command": ["train.py"]}, name="books", recipe="lr = 0.001\n").partition("\n---\n")[2]
    assert outline(body) == outline(plain)


def outline(text: str) -> list[str]:
    """The lines of a page that are no code, by CommonMark's rules for fences and spans; code spans as `code`."""
    lines, fence = [], None
    for line in text.splitlines():
        ticks = re.fullmatch("(`{3,})([^`]*)", line)
        if fence is None and ticks:
            fence = ticks[1]
        elif fence is not None:
            if ticks and len(ticks[1]) >= len(fence) and not ticks[2].strip():
                fence = None
        else:
            lines.append(re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "`code`", line))
    assert fence is None
    return lines
