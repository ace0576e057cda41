"""Model cards: the hub's metadata, the facts in the text, and what is not published."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from config import ExportConfig, ModelConfig, TrainConfig
from flatgpt.data import tokenizer
from flatgpt.interop.hub import model_card
from flatgpt.interop.loading import ModelSource
from model import GPT

CONFIG = ModelConfig(n_layer=3, n_head=2, n_embd=32, context_length=48, vocab_size=50304, mlp_ratio=2.0)
TRAINED = {**vars(TrainConfig()), **vars(CONFIG), "eval_batches": 20}
DATA = {
    "folder": "data/books",
    "end_of_text": True,
    "manifest_sha256": "0" * 64,
    "tokens": {"train": 1_234_567, "val": 8_910},
}
STATE = {
    "iter": 1200,
    "tokens": 3_456_000,
    "epoch": 2.5,
    "val_loss": 3.5,
    "config": TRAINED,
    "tokenizer": {"name": "gpt2"},
    "data": DATA,
    "command": ["train.py", "--config", "shakespeare", "--lr", "1e-3"],
    "git_commit": "a" * 40,
    "device": "NVIDIA H200",
    "cpu": "AMD EPYC",
    "ranks": 8,
    "wandb_id": "secretid",
}


@pytest.fixture
def write(in_tmp):
    """write(state, ...) -> the card of a checkpoint whose log has these losses, its dataset this meta.json."""

    def write(state=STATE, meta=None, val_loss=3.25, name="books", **options) -> str:
        Path("run").mkdir(exist_ok=True)
        log = f"iter,train_loss,val_loss\n1100,3.6,3.5\n1200,3.3,{val_loss}\n12000,1,1\n"
        Path("run/metrics.csv").write_text(log)
        if meta:
            Path("data/books").mkdir(parents=True, exist_ok=True)
            Path("data/books/meta.json").write_text(json.dumps(meta))
            digest = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
            state = {**state, "data": {**DATA, "manifest_sha256": digest}}
        source = ModelSource(Path("run/ckpt/iter_001200"), CONFIG, tokenizer.load("gpt2"), state)
        recipe = f"lr = 0.001\nsample_prompt = {json.dumps(name)}\n" if state else ""
        return model_card(source, ExportConfig(**options), name=name, recipe=recipe)

    return write


def metadata(text: str) -> dict:
    """Return the metadata as huggingface_hub reads it."""
    return ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    ("meta", "datasets", "language"),
    [
        ({"source": "wikitext103"}, ["Salesforce/wikitext"], "en"),
        ({"source": "wikipedia"}, ["wikimedia/wikipedia"], "en"),
        ({"source": "wikipedia", "dump": "20231101.de"}, ["wikimedia/wikipedia"], "de"),
        ({"source": "wikipedia", "dump": "20231101.simple"}, ["wikimedia/wikipedia"], None),
        ({"source": "hub", "repo": "some/corpus"}, ["some/corpus"], None),
        ({"source": "text"}, None, None),
    ],
)
def test_metadata_of_sources(write, meta, datasets, language):
    text = write(meta={"revision": "b08601e", **meta})
    assert (metadata(text).get("datasets"), metadata(text).get("language")) == (datasets, language)
    assert f"- source: `{meta['source']}`\n" in text
    assert "- revision: `b08601e`\n" in text
    public = {"wikitext103", "wikipedia"} & {meta["source"]}
    assert ("- license of the text: `CC BY-SA 3.0 and GFDL`\n" in text) == bool(public)
    Path("data/books/meta.json").write_text("{}")  # another dataset now
    assert "- source" not in write()


@pytest.mark.parametrize(
    ("init_from", "base", "named"),
    [
        ("gpt2", "gpt2", "gpt2"),
        ("some/model@v1", "some/model", "some/model@v1"),
        ("/home/me/old", None, "another model"),
        (None, None, None),
    ],
)
def test_initial_weights(write, init_from, base, named):
    text = write({**STATE, "config": {**TRAINED, "init_from": init_from}})
    assert metadata(text).get("base_model") == base
    assert (f"weights of: `{named}`" in text) if named else ("started from" not in text)


@pytest.mark.parametrize(("val_loss", "known"), [(3.25, True), ("", False), ("nan", False)])
def test_evaluation_of_this_checkpoint(write, val_loss, known):
    """In the text and in the model-index. The val_loss in state.json is of the evaluation before."""
    text = write(val_loss=val_loss, name="my\nmodel")
    results = ModelCard(text).data.eval_results or []
    found = {r.metric_type: (r.dataset_name, r.dataset_type, r.dataset_split, r.metric_value) for r in results}
    names = ("books", "books", "val")
    expected = {"loss": (*names, 3.25), "perplexity": (*names, pytest.approx(math.exp(3.25), abs=1e-4))}
    assert found == (expected if known else {})
    assert ("- val_loss: `3.2500`\n- perplexity: `25.7903`\n- train_loss: `3.3000`\n" in text) == known
    assert "3.5" not in text
    assert not known or ModelCard(text).data.model_name == "my model"


def test_facts(write):
    text = write()
    for part in (
        *("# `books`\n", "trained with flatGPT", "- n_layer: `3`\n", "- mlp_ratio: `2.0`\n", "- tokenizer: `gpt2`\n"),
        *("- tokens, train: `1,234,567`\n", "document: `True`\n", "- updates: `1,200`\n", "- epoch: `2.5`\n"),
        *("- device: `NVIDIA H200`\n", "- ranks: `8`\n", f"- git_commit: `{'a' * 40}`\n", "- eval_batches: `20`\n"),
        *("python train.py --config shakespeare --lr 1e-3`\n", "```toml\nlr = 0.001\n", "--model_path FOLDER"),
        *(f"{GPT.on_meta_device(CONFIG).num_params():,} parameters", "Its context length is 48 tokens."),
    ):
        assert part in text
    assert "- device: `AMD EPYC`\n" in write({**STATE, "device": "cpu"})
    assert 'pipeline("text-generation", "me/books")' in write(push="me/books")
    assert ("were not compared" in write(), "were not compared" in write(verify=False)) == (False, True)
    earlier = {key: STATE[key] for key in ("iter", "config", "tokenizer")} | {"data": {"end_of_text": False}}
    assert "document: `False`\n- updates: `1,200`\n" in write(earlier)
    text = write({})
    assert "The training settings and data are unknown" in text
    assert metadata(text) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2"]}


def test_nothing_identifies_the_machine(write, tmp_path):
    command = ["train.py", "--data_dir", "/home/me/corpora", "--out_dir=/scratch/me/out", "--config", "~/mine.toml"]
    config = {**TRAINED, "data_dir": "/home/me/corpora", "out_dir": "/scratch/me/out", "wandb_project": "secret"}
    text = write({**STATE, "command": [*command, "--lr", "1e-3"], "config": config})
    assert "train.py --data_dir .../corpora --out_dir=.../out --config .../mine.toml --lr 1e-3" in text
    assert not re.search(rf"/home|/scratch|secret|~/|{tmp_path}", text)


@pytest.mark.parametrize(
    "text", ["a`b", "``", "[x](http://y)", "a: [", "\n# title\n", "\n```\n# title\n```\n", "|é东|"]
)
def test_markup_in_names_has_no_effect(write, text):
    """Outside of code the page is the same as with plain names."""

    def page(text: str) -> tuple[dict, list[str]]:
        state = {**STATE, "command": ["train.py", "--sample_prompt", text]}
        card = write(state, {"source": "hub", "repo": text, "revision": text}, name=text)
        body = card.partition("---\n\n")[2].partition("```toml")[0]
        return metadata(card), [re.sub("`.*`", "code", line) for line in body.splitlines()]

    data, body = page(text)
    assert data["datasets"] == [text]
    assert data["model-index"][0]["name"] == " ".join(text.split())
    assert body == page("plain")[1]
