"""configs/: every recipe parses and states what to expect, its model has the size it states, and it learns."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from in_process import make_dataset
from run_files import rows

import train
from config import PrepareConfig, TrainConfig, run_dir
from flatgpt.cli import cli, settings
from flatgpt.data import tokenizer
from flatgpt.data.sources import dataset_folder
from flatgpt.interop.pretrained import initial_shape
from model import GPT

RECIPES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(settings.RECIPES.glob("*.toml"))}
HUGGING_FACE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


@pytest.fixture
def gpt2_folder(in_tmp):
    """What finetune_shakespeare begins with, as far as the command line looks at it."""
    folder = in_tmp / "gpt2"  # a folder comes before the hub
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | HUGGING_FACE))
    (folder / "model.safetensors").touch()


def recipe(name: str, *words) -> TrainConfig:
    return cli.parse(TrainConfig, ["--config", name, *map(str, words)], initial_shape)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_what_to_expect(name, gpt2_folder):
    """Hardware and, if it was measured, the result; the tokens of an update, and the command that makes its data."""
    config = recipe(name)
    assert config.model().problems() == []
    meta = tomllib.loads(RECIPES[name])["meta"]
    assert meta.keys() in (set(settings.META), {"about", "hardware"})
    if name in BYTES:
        assert meta["bits_per_byte"] == pytest.approx(meta["loss"] / np.log(2), abs=1e-3)
    comment = re.match(r"(#.*\n)+", RECIPES[name].replace("\\\n#", ""))[0]
    per_update = config.batch_size * config.grad_accum_steps * config.context_length
    assert f"= {per_update:,} an update" in comment
    assert f"{config.max_iters:,} updates = " in comment
    if name.startswith("gpt2"):
        assert (per_update, config.grad_accum_steps % 8) == (524_288, 0), "on 1 or 8 devices"
    commands = re.findall(r"python prepare_data\.py (.*)$", comment, re.MULTILINE)
    assert commands or name == "quickstart"  # train.py prepares that one by itself
    for command in commands:
        assert dataset_folder(cli.parse(PrepareConfig, shlex.split(command))).name == config.dataset


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("shakespeare_134m", 134_117_376, 134_117_376),  # SmallGPT's own code
        ("fineweb_92m_t4x2", 91_605_384, 91_605_384),  # GPT2's
        ("wikitext103_22m", 21_993_024, 21_993_024),  # smol-GPT's
        ("wikipedia_130m", 134_750_000, 134_748_265),  # SmollGPT says 134.75M
        ("shakespeare_124m", 124_439_808, 124_475_904),  # 47 ids more than GPT-2
        ("gpt2_124m", 124_439_808, 124_439_808),  # OpenAI's
        ("gpt2_350m", 354_823_168, 354_823_168),
        ("gpt2_774m", 774_030_080, 774_030_080),
        ("gpt2_1558m", 1_557_611_200, 1_557_611_200),
    ],
)
def test_parameters(name, theirs, ours):
    assert GPT.on_meta_device(recipe(name).model()).num_params() == ours == pytest.approx(theirs, rel=1e-3)
    assert f"{ours:,}" in RECIPES[name]


# ---------------------------------------------------------------------------------------------------------------------
# 200 updates of each, scaled down

SMALL = shlex.split(
    "--n_layer 2 --n_embd 64 --n_head 2 --context_length 32 --batch_size 4 --grad_accum_steps 1 --max_iters 200 "
    "--device cpu --compile false --dtype auto --log_interval 1 --eval_interval 200 --eval_batches 1 --sample_tokens 0"
)
BYTES = {"quickstart", "shakespeare_char_cpu", "shakespeare_char_fast"}
IDS = 1000  # of GPT-2's: a head of all 50,257 took most of the time


@pytest.fixture
def first_ids(gpt2_vocabulary, monkeypatch) -> None:
    """GPT-2's vocabulary ends with the merges of its first 1,000 ids."""
    real = tokenizer.load
    whole = real("gpt2")
    ranks = {token: rank for token, rank in whole._mergeable_ranks.items() if rank < IDS}
    special = {"<|endoftext|>": IDS}
    cut = tiktoken.Encoding("gpt2", pat_str=whole._pat_str, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tokenizer, "load", lambda name, *more: cut if name == "gpt2" else real(name, *more))


def learn(name: str, text: str) -> tuple[float, float]:
    """(mean of the last 20 losses, the training split's unigram entropy) of a recipe, in the current folder."""
    config = recipe(name)
    # GPT-2's ids are p50k_base's, which has 24 runs of blanks besides and is not in tiktoken's cache here
    dataset = make_dataset(Path(), config.dataset, text, "byte" if name in BYTES else "gpt2")
    # Adam's rate goes with 1 / width (Yang et al., Tensor Programs V, 2022); 0.005 is the highest that a recipe has
    scale = min(config.n_embd / 64, max(1.0, 0.005 / config.lr))
    changes = ["--lr", config.lr * scale, "--vocab_size", dataset.meta["vocab_size"]]
    changes += ["--min_lr", "none" if config.min_lr is None else config.min_lr * scale]
    if (config.warmup_iters or 0) > 20:
        changes += ["--warmup_iters", 10]
    if config.stride:
        changes += ["--stride", 32 * config.stride // config.context_length]
    config = recipe(name, *SMALL, *changes)
    train.train(config)
    losses = [float(row["train_loss"]) for row in rows(run_dir(config))[1:]]
    assert len(losses) == 200
    tokens = dataset.tokens("train")
    shares = np.bincount(tokens[0 : len(tokens)]) / len(tokens)
    shares = shares[shares > 0]
    return float(np.mean(losses[-20:])), float(-(shares * np.log(shares)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_scaled_down_learns_more_than_the_frequencies_of_tokens(name, in_tmp, real_text, first_ids):
    """On an excerpt of 3,400 tokens: 200 updates of 128 tokens go over it 7 times."""
    text = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")[:8_000]
    if first := re.search('init_from = "(.*)"', RECIPES[name]):
        Path(first[1]).symlink_to("out/gpt2_124m")
        learn("gpt2_124m", text)
    loss, entropy = learn(name, text)
    print(f"{name}: {loss:.4f}, unigram entropy {entropy:.4f}")  # docs/results.md
    assert loss < entropy
