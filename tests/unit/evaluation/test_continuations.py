"""Prompts and their continuations: selection, generation against one prompt at a time, figures by hand."""

import collections
import importlib.machinery
import importlib.util
import math
import sys

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import generate, random_model

from config import ModelConfig, SamplingConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.data.shards import Tokens
from flatgpt.evaluation.continuations import (
    Prompt,
    distinct,
    generate_continuations,
    repetition,
    require_packages,
    select_prompts,
    text_after,
)
from flatgpt.inference.decoder import Decoder
from flatgpt.runtime.distributed import DistributedContext
from model import GPT

BYTES, EOT = tokenizer.load("byte"), 256
# eight letters and end-of-text, id 8, which models draw soon
SMALL = tiktoken.Encoding(
    "small", pat_str=".", mergeable_ranks={b"%c" % (97 + n): n for n in range(8)}, special_tokens={"<|endoftext|>": 8}
)
FREE = SamplingConfig(temperature=1.0, seed=3)
quick = settings(max_examples=100)


@quick
@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 20), st.integers(1, 20))
def test_prompts_are_spread_over_the_split(length, n, prompt_tokens, new_tokens):
    """Each id is its index in the split."""
    span, split = prompt_tokens + new_tokens, np.arange(length, dtype=np.uint16)
    if length < span:
        with pytest.raises(UserError, match=f"do not fit into a split of {length}: lower --prompt_tokens or"):
            select_prompts(split, n, prompt_tokens, new_tokens, end_of_text=-1)
        return
    prompts = select_prompts(split, n, prompt_tokens, new_tokens, end_of_text=-1)
    starts = [prompt.ids[0] for prompt in prompts]
    assert len(prompts) == len(set(starts)) == min(n, length - span + 1)
    for start, prompt in zip(starts, prompts, strict=True):
        assert (len(prompt.ids), len(prompt.reference)) == (prompt_tokens, new_tokens)
        assert prompt.ids + prompt.reference == list(range(start, start + span))
    assert starts[0] == 0
    if len(starts) > 1:
        steps = np.diff(starts)
        assert starts[-1] == length - span
        assert steps.max() - steps.min() <= 1


@quick
@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_references_end_before_end_of_text(ids, n, prompt_tokens, new_tokens):
    """A prompt that end-of-text follows is left out; prompts may hold it."""
    split = np.array(ids, dtype=np.uint16)
    expected = []
    for prompt in select_prompts(split, n, prompt_tokens, new_tokens, end_of_text=9):
        if text := "".join(map(str, prompt.reference)).split("0")[0]:
            expected.append(Prompt(prompt.ids, [int(i) for i in text]))
    if expected:
        assert select_prompts(split, n, prompt_tokens, new_tokens, end_of_text=0) == expected
    else:
        with pytest.raises(UserError, match=r"after each of the \d+ prompts comes end-of-text"):
            select_prompts(split, n, prompt_tokens, new_tokens, end_of_text=0)


def test_only_the_prompts_and_references_are_read(tmp_path, monkeypatch):
    """Of shards, across their borders; Python's ints, which JSON takes."""
    ids = np.random.default_rng(0).integers(0, 50_000, size=1000).astype("<u2")
    files = [(tmp_path / f"{n}.bin", None) for n in range(3)]
    for (file, _), part in zip(files, np.split(ids, [300, 301]), strict=True):
        file.write_bytes(part.tobytes())
    read, getitem = [], Tokens.__getitem__
    monkeypatch.setattr(Tokens, "__getitem__", lambda self, span: (read.append(span), getitem(self, span))[1])
    prompts = select_prompts(Tokens(files), 10, 40, 50, end_of_text=-1)
    starts = [n * 910 // 9 for n in range(10)]
    assert [prompt.ids + prompt.reference for prompt in prompts] == [ids[s : s + 90].tolist() for s in starts]
    assert read == [slice(s, s + 90) for s in starts]
    assert {type(i) for prompt in prompts for i in prompt.ids + prompt.reference} == {int}


# ---------------------------------------------------------------------------------------------------------------------
# generation


def decoder() -> Decoder:
    """Of a model with ids beyond SMALL's."""
    return Decoder(random_model(n_layer=2, context_length=32, vocab_size=20))


def cyclic_model(cycle: list[int]) -> GPT:
    """A model of bytes whose most likely next id is the one that follows in the cycle."""
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=320, context_length=64, vocab_size=257, tie_weights=False))
    with torch.no_grad():
        for p in (*model.transformer.h.parameters(), model.transformer.wpe.weight, model.lm_head.weight):
            p.zero_()
        model.transformer.wte.weight.copy_(torch.eye(320))
        for current, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            model.lm_head.weight[following, current] = 10
    return model


RNG = np.random.default_rng(1)
PROMPTS = [Prompt(RNG.integers(0, 8, 10).tolist(), RNG.integers(0, 8, 12).tolist()) for _ in range(7)]


@pytest.mark.parametrize("new_tokens", [12, 60], ids=["", "beyond the context"])
@pytest.mark.parametrize("options", [FREE, SamplingConfig(greedy=True, repetition_penalty=1.3)], ids=["free", "greedy"])
def test_batch_size_and_ranks_change_no_continuation(options, new_tokens):
    """Prompt r's continuation is what it gets alone, with its own random numbers."""
    model, arguments = decoder(), (SMALL, PROMPTS, new_tokens, options)
    alone = [
        generate(model, prompt.ids, new_tokens, options, first_row=row, n_vocab=9, stop_ids=(8,))
        for row, prompt in enumerate(PROMPTS)
    ]
    for batch_size in (1, 3, 7):
        assert generate_continuations(model, *arguments, batch_size) == alone
    for world in (2, 9):  # with 9 some ranks have no batch
        parts = []

        class PlayedRank(DistributedContext):
            def all_gather(self, value, parts=parts):
                parts.append(value)
                return parts

        ranks = [PlayedRank(rank, world) for rank in range(world)]
        last = [generate_continuations(model, *arguments, 2, rank) for rank in ranks][-1]
        assert sum(map(len, parts)) == 7
        assert last == alone


def test_equal_prompts_get_different_continuations_of_the_tokenizers_ids():
    """The model's vocabulary is larger; end-of-text ends a text and is not part of it."""
    options = SamplingConfig(temperature=3.0)
    seen = []
    progress = {"batch_size": 8, "progress": lambda batches: seen.extend(batches) or batches}
    written = generate_continuations(decoder(), SMALL, [PROMPTS[0]] * 28, 40, options, **progress)
    assert len(set(map(tuple, written))) > 14
    assert {i for ids in written for i in ids} == set(range(8))
    assert seen == [0, 8, 16, 24]


def test_continuations_that_end():
    """After c comes end-of-text, and a continuation may be empty."""
    prompts = [Prompt([*prompt], [0]) for prompt in (b"a", b"c", b"xyza")]
    model = Decoder(cyclic_model([*b"abc", EOT]))
    written = generate_continuations(model, BYTES, prompts, 9, SamplingConfig(greedy=True))
    assert written == [[*b"bc"], [], [*b"bc"]]


# ---------------------------------------------------------------------------------------------------------------------
# text and figures


@quick
@given(st.text(max_size=12), st.integers(0, 40))
def test_a_split_character_belongs_to_the_part_that_ends_it(text, at):
    ids = [*text.encode()]
    complete = bytes(ids[:at]).decode(errors="ignore")
    assert text_after(BYTES, ids[:at], ids[at:]) == text[len(complete) :]


def test_text_by_hand():
    balloon = [*"🎈".encode()]
    assert text_after(BYTES, [*b"a", *balloon[:3]], [*b"b", *balloon[:2]]) == "\ufffdb\ufffd"
    assert text_after(BYTES, [*b"a", EOT, *b"b"], [*b" c"]) == " c"
    assert text_after(BYTES, [255], [*b"x"]) == "x"
    gpt2 = tokenizer.load("gpt2")
    ids = gpt2.encode_ordinary("a 🎈 b")
    texts = [text_after(gpt2, ids[:at], ids[at:]) for at in range(len(ids) + 1)]
    assert [*dict.fromkeys(texts)] == ["a 🎈 b", " 🎈 b", "🎈 b", " b", ""]


def test_distinct_and_repetition_by_hand():
    """n-grams do not span texts; repetition is the mean over sequences of at least 4 ids."""
    texts = ["a b  a\nb", "a c", "", "b"]
    assert distinct(texts, 1) == pytest.approx(3 / 7)  # a b c of a b a b a c b
    assert distinct(texts, 2) == pytest.approx(3 / 4)  # ab ba ac of ab ba ab ac
    assert math.isnan(distinct(["a", "b"], 2))
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repetition([[7] * 8, [1, 2, 3, 4], [1, 2, 3, 4], [7] * 3, []]) == pytest.approx(0.8 / 3)
    assert math.isnan(repetition([[1, 2, 3], []]))


@quick
@given(st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=5), st.integers(1, 5))
def test_distinct_and_repetition_equal_plain_counts(sequences, n):
    total, shares = collections.Counter(), []
    for ids in sequences:
        counts = collections.Counter(tuple(ids[i] for i in range(at, at + n)) for at in range(len(ids) + 1 - n))
        total += counts
        if counts:
            shares.append(sum(count - 1 for count in counts.values()) / sum(counts.values()))
    expected = len(total) / sum(total.values()) if total else math.nan
    assert distinct([" ".join(map(str, ids)) for ids in sequences], n) == pytest.approx(expected, nan_ok=True)
    assert repetition(sequences, n) == pytest.approx(np.mean(shares) if shares else math.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("missing", "names"),
    [(["sacrebleu"], "sacrebleu"), (["sacrebleu", "rouge_score"], "sacrebleu and rouge-score")],
)
def test_missing_packages_are_named_with_the_install_line(monkeypatch, missing, names):
    for module in ("sacrebleu", "rouge_score"):
        present = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(module, None))
        monkeypatch.setitem(sys.modules, module, None if module in missing else present)
    with pytest.raises(UserError) as error:
        require_packages()
    assert str(error.value) == f"BLEU and ROUGE need {names}: pip install -r requirements-extra.txt"
