"""Model cards: the hub's metadata, the facts in the text, and what is not published."""

import csv
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from config import ModelConfig, TrainConfig
from flatgpt.interop.loading import ModelSource
from flatgpt.interop.model_card import card_body, model_card

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
EARLIER = "validation loss 3.5000 nats per token, at an evaluation before this checkpoint"


def write(
    state=STATE, path=Path("nowhere/ckpt/iter_001200"), tokenizer="gpt2", name="books", repo=None, **shape
) -> str:
    source = ModelSource(path, ModelConfig(**{**vars(CONFIG), **shape}), tokenizer, state)
    recipe = f"lr = 0.001\nsample_prompt = {json.dumps(name)}\n" if state else ""
    return model_card(source, name=name, repo=repo, dtype="float32", recipe=recipe)


def metadata(text: str) -> dict:
    """Return the metadata as huggingface_hub reads it."""
    return ModelCard(text).data.to_dict()


def dataset(folder: Path, **meta) -> dict:
    """Return a state whose dataset exists, with this meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(meta).encode()
    (folder / "meta.json").write_bytes(content)
    data = {**STATE["data"], "folder": str(folder), "manifest_sha256": hashlib.sha256(content).hexdigest()}
    return {**STATE, "data": data}


def run_with_log(run: Path, *rows: tuple) -> Path:
    """Write the log of a run, and return the path of its checkpoint."""
    run.mkdir()
    with open(run / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("iter", "train_loss", "val_loss"), *rows])
    return run / "ckpt/iter_001200"


# ---------------------------------------------------------------------------------------------------------------------
# metadata


def test_metadata_without_a_known_source():
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "flatgpt"]}
    assert metadata(write()) == expected
    assert metadata(write({})) == {**expected, "tags": ["gpt2"]}


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


def test_a_changed_dataset_is_not_described(tmp_path):
    state = dataset(tmp_path / "data/books", source="wikitext103", revision="b08601e")
    (tmp_path / "data/books/meta.json").write_text(json.dumps({"source": "shakespeare", "revision": "x"}))
    text = write(state)
    assert "source `" not in text
    assert "datasets" not in metadata(text)
    assert "tokens: train 1,234,567, val 8,910" in text
    assert state["data"]["manifest_sha256"] in text


@pytest.mark.parametrize(
    ("init_from", "base", "part"),
    [
        (None, None, None),
        ("gpt2", "gpt2", "weights of `gpt2`"),
        ("some/model@v1", "some/model", "weights of `some/model@v1`"),
        *((path, None, "weights of another model") for path in ("../old/run", "/home/me/old", "out/earlier")),
    ],
)
def test_initial_weights(in_tmp, init_from, base, part):
    (in_tmp / "out").mkdir()
    text = write({**STATE, "config": {**TRAINED, "init_from": init_from}})
    assert metadata(text).get("base_model") == base
    assert (part in text) if part else ("started from" not in text)
    assert init_from is None or base is not None or init_from not in text


@pytest.mark.parametrize(
    ("meta", "dataset_type"), [({"source": "text"}, "books"), ({"source": "hub", "repo": "some/corpus"}, "some/corpus")]
)
def test_evaluation_of_this_checkpoint(tmp_path, meta, dataset_type):
    """In the text and in the model-index. The val_loss in state.json is of the evaluation before."""
    rows = [(1100, 3.6, 3.5), (1200, 3.3, 3.25), (12000, 1, 1)]
    text = write(
        dataset(tmp_path / "books", revision="x", **meta), run_with_log(tmp_path / "run", *rows), name="my\nmodel"
    )
    perplexity = math.exp(3.25)
    for part in (
        f"validation loss 3.2500 nats per token, perplexity {perplexity:.2f}: the mean over all of the val split",
        "in windows of 48 tokens that do not overlap, computed in bfloat16 like the training",
        "training loss of the last update 3.3000 nats per token",
    ):
        assert part in text
    assert "3.5000" not in text
    data = ModelCard(text).data
    assert data.model_name == "my model"
    found = {
        r.metric_type: (r.dataset_name, r.dataset_type, r.dataset_split, r.metric_value) for r in data.eval_results
    }
    names = ("books", dataset_type, "val")
    assert found == {"loss": (*names, 3.25), "perplexity": (*names, pytest.approx(perplexity, abs=1e-4))}


def test_evaluation_of_a_part_of_the_split(tmp_path):
    state = {**STATE, "config": {**TRAINED, "eval_batches": 20, "batch_size": 16}}
    text = write(state, run_with_log(tmp_path / "run", (1200, 3.3, 3.25)))
    assert "the mean over the first 20 batches of 16 windows of the val split" in text


@pytest.mark.parametrize("loss", ["", "nan"])
def test_without_an_evaluation_of_this_checkpoint(tmp_path, loss):
    """Not evaluated, or a copied checkpoint without its run."""
    path = run_with_log(tmp_path / "run", (1200, 3.3, loss))
    assert (EARLIER in write(path=path)) == (loss == "")
    assert EARLIER in write()
    assert EARLIER in write(path=tmp_path / "run/copies/iter_001200")
    assert "model-index" not in metadata(write(path=path))
    assert "validation loss" not in write({**STATE, "val_loss": None})


# ---------------------------------------------------------------------------------------------------------------------
# text

NO_EOT = {**STATE, "data": {**STATE["data"], "end_of_text": False}}
FEWER = {key: STATE[key] for key in ("iter", "config", "tokenizer")} | {"data": {"end_of_text": False}}


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {},
            [
                *("# `books`", "trained with flatGPT", "| layers | 3 |", "| MLP hidden size | 64 |"),
                *("| output head | a separate matrix |", "| context | 48 tokens, learned positions |"),
                *("| tokenizer | gpt2 (tiktoken), vocab_size 50,304 |", "- tokens: train 1,234,567, val 8,910"),
                *("- end-of-text after each document: yes", "- 1,200 updates, 3,456,000 tokens, 2.50 epochs\n"),
                *("- on NVIDIA H200\n", "- python 3.11.7, torch 2.13.0, flatGPT " + "a" * 40 + "\n"),
                *("python train.py --config shakespeare --lr 1e-3", "```toml\nlr = 0.001\n"),
                *(f"{CONFIG.num_params():,} parameters", "Its context is 48 tokens.", "`user/name` stands for"),
            ],
        ),
        ({"state": {**STATE, "ranks": 8}}, ["- on 8 x NVIDIA H200\n"]),
        ({"state": {**STATE, "git_dirty": True}}, ["a" * 40 + ", with local changes\n"]),
        ({"state": {**STATE, "device": "cpu"}}, ["- on AMD EPYC\n"]),
        ({"state": NO_EOT}, ["end-of-text after each document: no"]),
        ({"state": FEWER}, ["- 1,200 updates\n"]),  # written by an earlier version
        ({"context_length": 16}, ["| context | 16 tokens (of 48 in training)"]),
        ({"tie_weights": True}, ["| output head | tied to the token embedding |"]),
        ({"tokenizer": "byte"}, ["| tokenizer | UTF-8 bytes"]),
        ({"bias": False}, ["| biases | none (stored as zeros) |"]),
        ({"bias": True}, ["| biases | everywhere |"]),
        ({"attn_bias": False}, ["| biases | not in attention (stored as zeros there) |"]),
        ({"bias": False, "attn_bias": True}, ["| biases | in attention only (zeros elsewhere) |"]),
        ({"repo": "me/books"}, ['pipeline("text-generation", "me/books")', "infer.py --model_path me/books --prompt"]),
        (
            {"state": {}},
            ["in the format of Hugging Face transformers", "Its training and its data are not known here."],
        ),
    ],
)
def test_facts(keys, parts):
    text = write(**keys)
    for part in parts:
        assert part in text
    assert ("stands for" in text) == ("repo" not in keys)
    assert bool(re.search("## (Data|Training)|toml|trained with flatGPT", text)) == (keys.get("state") != {})


def test_the_weights_as_trained():
    source = ModelSource(Path("x"), ModelConfig(**{**vars(CONFIG), "bias": False}), "gpt2", STATE)
    text = card_body(source, name="books", use="Open it.", as_trained=True)
    assert "stored as zeros" not in text
    assert "## Use\n\nOpen it.\n" in text


# ---------------------------------------------------------------------------------------------------------------------
# what is not published


def test_nothing_identifies_the_machine(tmp_path):
    command = ["train.py", "--data_dir", "/home/me/corpora", "--out_dir=/scratch/me/out", "--config", "~/mine.toml"]
    command += ["--init_from", "C:\\Users\\me\\old", "--lr", "1e-3", "--dataset", "books"]
    config = {**TRAINED, "data_dir": "/home/me/corpora", "out_dir": "/scratch/me/out", "wandb_project": "secret"}
    state = dataset(tmp_path / "books", source="text", revision="f" * 64)
    text = write({**state, "command": command, "config": config})
    assert "python train.py --data_dir .../corpora --out_dir=.../out --config .../mine.toml" in text
    assert "--init_from .../old --lr 1e-3 --dataset books" in text
    assert not re.search(r"/home|/scratch|Users|secret|~/", text)
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "text",
    [
        *("a`b", "`", "``", "<b>x</b>", "[x](http://y)", "---", "a: [", "\n# title\n", "\n```\n# title\n```\n"),
        *("é東", "|x|", "📝"),
    ],
)
def test_markup_in_names_has_no_effect(tmp_path, text):
    """Outside of code spans and fences the page is the same as with plain names."""

    def page(text: str, name: str) -> tuple[dict, list[str]]:
        state = dataset(tmp_path / "books", source="hub", repo=text, revision=text)
        state = {**state, "command": ["train.py", "--sample_prompt", text]}
        card = write(state, run_with_log(tmp_path / name, (1200, 3.3, 3.25)), name=text)
        return metadata(card), outline(re.fullmatch(r"---\n.*?\n---\n(.*)", card, re.DOTALL)[1])

    data, lines = page(text, "run")
    assert data["datasets"] == [text]
    assert data["model-index"][0]["name"] == " ".join(text.split())
    assert lines == page("plain", "other")[1]


def outline(text: str) -> list[str]:
    """Return the lines outside of fences, code spans as `code`, by CommonMark's rules."""
    lines, fence = [], None
    for line in text.splitlines():
        ticks = re.fullmatch("(`{3,})([^`]*)", line)
        if fence is None and ticks:
            fence = ticks[1]
        elif fence is not None:
            if ticks and len(ticks[1]) >= len(fence) and not ticks[2].strip():
                fence = None
        else:
            line = re.sub("[0-9a-f]{64}", "hash", line)
            lines.append(re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "`code`", line))
    assert fence is None
    return lines
