"""configs/: every recipe parses, its comment's arithmetic holds, its model has the size it says, and it learns."""

import csv
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from in_process import make_dataset

import train
from config import PrepareConfig, TrainConfig, UserError, run_dir
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.data.dataset import Windows
from flatgpt.data.prepare import dataset_folder
from flatgpt.interop.pretrained import initial_shape
from model import GPT

RECIPES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(cli.RECIPES.glob("*.toml"))}
HUGGING_FACE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


@pytest.fixture
def gpt2_folder(in_tmp):
    """What finetune_shakespeare begins with, as far as the command line looks at it."""
    folder = in_tmp / "out" / "gpt2_124m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | HUGGING_FACE))
    (folder / "model.safetensors").touch()


def recipe(name: str, *words) -> TrainConfig:
    return cli.parse(TrainConfig, ["--config", name, *map(str, words)], initial_shape)


def comment(name: str) -> list[str]:
    """The lines above a recipe's first key; a command that goes on in the next one is whole."""
    return re.match(r"(#.*\n)+", RECIPES[name].replace("\\\n#", ""))[0].splitlines()


def number(word: str) -> float:
    return float(word.replace(",", ""))


# ---------------------------------------------------------------------------------------------------------------------
# what a recipe says


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses_and_says_what_to_expect(name, gpt2_folder):
    assert recipe(name).model().problems() == []
    said = "\n".join(comment(name)).lower()
    for word in ("hardware", "time", "loss", "tokens: ", "data: "):
        assert word in said, word


def test_finetuning_without_its_weights_is_an_error_line(in_tmp):
    with pytest.raises(UserError, match="init_from = out/gpt2_124m: no such folder"):
        recipe("finetune_shakespeare")


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"quickstart"}))  # train.py prepares that one by itself
def test_dataset_is_what_the_command_makes(name, gpt2_folder):
    commands = re.findall(r"python prepare_data\.py (.*)$", "\n".join(comment(name)), re.MULTILINE)
    assert commands
    for command in commands:
        made = dataset_folder(cli.parse(PrepareConfig, shlex.split(command)))
        assert made.name == recipe(name).dataset, command


NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNITS = {"": 1, " million": 1e6, " billion": 1e9}
SUM = re.compile(rf"({NUMBER}(?: [x/] {NUMBER})+) = ({NUMBER})( million| billion)?")


def agree(value: float, shown: str, unit: str) -> bool:
    """Whether a value is the shown number, to its last digit."""
    half_a_digit = 0.5 * 10.0 ** -len(shown.partition(".")[2]) * UNITS[unit]
    return abs(value - number(shown) * UNITS[unit]) <= half_a_digit * (1 + 1e-9)


@pytest.mark.parametrize("name", RECIPES)
def test_arithmetic_in_the_comment(name):
    """Every A x B / C = D is right."""
    sums = SUM.findall(" ".join(line.removeprefix("# ") for line in comment(name)))
    assert sums
    for left, right, unit in sums:
        first, *rest = re.split(" ([x/]) ", left)
        value = number(first)
        for sign, factor in zip(rest[::2], rest[1::2], strict=True):
            value = value * number(factor) if sign == "x" else value / number(factor)
        assert agree(value, right, unit), (left, value, right, unit)


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_of_the_comment_are_the_settings(name, gpt2_folder):
    config, said = recipe(name), "\n".join(comment(name))
    per_update = config.batch_size * config.grad_accum_steps * config.context_length
    assert f"= {per_update:,} an update" in said
    total, unit = re.search(rf"{config.max_iters:,} updates = ({NUMBER})( million| billion)?", said).groups("")
    assert agree(config.max_iters * per_update, total, unit), (config.max_iters * per_update, total, unit)


def epochs(config: TrainConfig, train_tokens: int, number: float) -> float:
    """Updates in so many epochs."""
    windows = Windows(np.zeros(train_tokens, dtype=np.uint8), config.context_length, config.stride)
    return number * len(windows) / (config.batch_size * config.grad_accum_steps)


def test_lengths_of_recipes_that_speak_of_epochs():
    assert math.floor(epochs(recipe("shakespeare_134m"), 301_966, 15)) == recipe("shakespeare_134m").max_iters
    fineweb = recipe("fineweb_92m_t4x2")
    assert math.ceil(epochs(fineweb, 206_130_153 * 9 // 10, 20)) == fineweb.max_iters
    assert math.floor(epochs(fineweb, 206_130_153 * 9 // 10, 4)) == fineweb.save_interval
    wikipedia = recipe("wikipedia_130m")
    assert math.ceil(5 * 2.05e9 / (64 * 4 * 1024)) == wikipedia.max_iters
    assert wikipedia.warmup_fraction * wikipedia.max_iters == pytest.approx(wikipedia.max_iters / 5 / 5)


GPT2 = {"gpt2_124m": 124_439_808, "gpt2_350m": 354_823_168, "gpt2_774m": 774_030_080, "gpt2_1558m": 1_557_611_200}


@pytest.mark.parametrize("name", GPT2)
def test_updates_of_gpt2_are_half_a_million_tokens_on_1_or_8_devices(name):
    config = recipe(name)
    assert config.batch_size * config.grad_accum_steps * config.context_length == 524_288
    assert config.grad_accum_steps % 8 == 0
    assert config.fsdp == (name == "gpt2_1558m")


# ---------------------------------------------------------------------------------------------------------------------
# sizes


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("shakespeare_134m", 134_117_376, 134_117_376),  # SmallGPT's own code
        ("fineweb_92m_t4x2", 91_605_384, 91_605_384),  # GPT2's
        ("wikitext103_22m", 21_993_024, 21_993_024),  # smol-GPT's
        ("wikipedia_130m", 134_750_000, 134_748_265),  # SmollGPT says 134.75M
        ("shakespeare_124m", 124_439_808, 124_475_904),  # 47 ids more than GPT-2
        ("shakespeare_124m_onecycle", 124_439_808, 124_475_904),
        *((name, count, count) for name, count in GPT2.items()),  # OpenAI's
    ],
)
def test_parameters(name, theirs, ours):
    with torch.device("meta"):
        params = GPT(recipe(name).model()).num_params()
    assert params == ours == pytest.approx(theirs, rel=1e-3)
    assert f"{ours:,}" in "\n".join(comment(name)) or name.endswith("onecycle")


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
    monkeypatch.setattr(tokenizer, "load", lambda name: cut if name == "gpt2" else real(name))


def learn(name: str, text: str) -> tuple[float, float]:
    """(mean of the last 20 losses, the training split's unigram entropy) of a recipe, in the current folder."""
    config = recipe(name)
    # GPT-2's ids are p50k_base's, which has 24 runs of blanks besides and is not in tiktoken's cache here
    dataset = make_dataset(Path(), config.dataset, text, "byte" if name in BYTES else "gpt2")
    # Adam's rate goes with 1 / width (Yang et al., Tensor Programs V, 2022); 0.005 is the highest that a recipe has
    scale = min(config.n_embd / 64, max(1.0, 0.005 / config.lr))
    changes = ["--lr", config.lr * scale, "--min_lr", config.min_lr * scale]
    ids = 257 if name in BYTES else 50_257
    assert config.init_from or (config.vocab_size or ids) >= ids
    changes += ["--vocab_size", dataset.meta["vocab_size"]]
    if (config.warmup_iters or 0) > 20:
        changes += ["--warmup_iters", 10]
    if config.stride:
        changes += ["--stride", 32 * config.stride // config.context_length]
    config = recipe(name, *SMALL, *changes)
    train.train(config)
    with open(run_dir(config) / "metrics.csv", newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(losses) == 200
    tokens = dataset.tokens("train")
    shares = np.bincount(tokens[0 : len(tokens)]) / len(tokens)
    shares = shares[shares > 0]
    return float(np.mean(losses[-20:])), float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(
    "name", [name if name in BYTES else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_recipe_scaled_down_learns_more_than_the_frequencies_of_tokens(name, in_tmp, real_text, first_ids):
    """On an excerpt of 3,400 tokens: 200 updates of 128 tokens go over it 7 times."""
    text = (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8")[:8_000]
    if first := re.search('init_from = "out/(.*)"', RECIPES[name]):
        learn(first[1], text)
    loss, entropy = learn(name, text)
    print(f"{name}: {loss:.4f}, unigram entropy {entropy:.4f}")
    assert loss < entropy


@pytest.mark.slow
def test_bfloat16_ends_where_float32_does(in_tmp, real_text):
    """The character recipe, in full: both losses are what nanoGPT's takes five times as long to reach."""
    make_dataset(Path(), "shakespeare_byte", (real_text / "shakespeare" / "input.txt").read_text(encoding="utf-8"))
    losses = {}
    for dtype in ("bfloat16", "float32"):
        words = ["--sample_tokens", 0, "--seed", 1, "--dtype", dtype, "--out_dir", dtype, "--device", "cpu"]
        train.train(recipe("shakespeare_char_fast", *words))
        with open(f"{dtype}/metrics.csv", newline="") as file:
            losses[dtype] = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]][-1]
    print(losses)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
    assert max(losses.values()) < 1.898
