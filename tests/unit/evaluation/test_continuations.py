"""Prompts and their continuations: selection, generation against one prompt at a time, figures by hand."""

from fractions import Fraction

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from random_models import generate, over_ranks, random_model

from config import SamplingConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.evaluation.continuations import distinct, generate_continuations, repetition, select_prompts, text_after
from flatgpt.inference.decoder import Decoder

BYTES, EOT = tokenizer.load("byte"), 256
# eight letters and end-of-text, id 8, which models draw soon
SMALL = tiktoken.Encoding(
    "small", pat_str=".", mergeable_ranks={b"%c" % (97 + n): n for n in range(8)}, special_tokens={"<|endoftext|>": 8}
)
RNG = np.random.default_rng(1)
PROMPTS = [(RNG.integers(0, 8, 10).tolist(), RNG.integers(0, 8, 12).tolist()) for _ in range(7)]


@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.integers(0, 400))
@example(345, 22, 1, 1, 0)
def test_prompts_are_spread_over_the_split(length, n, prompt_tokens, new_tokens, eot):
    """Each id is its index in the split; a reference ends before end-of-text, and a prompt has one."""
    last, expected = length - prompt_tokens - new_tokens, []
    count = min(n, last + 1)
    for start in (int(Fraction(i * last, max(1, count - 1))) for i in range(count)):  # linspace rounds
        stop = start + prompt_tokens + new_tokens
        ids = list(range(start, min(stop, eot) if eot >= start + prompt_tokens else stop))
        expected += [(ids[:prompt_tokens], ids[prompt_tokens:])] * (len(ids) > prompt_tokens)
    arguments = np.arange(length, dtype=np.uint16), n, prompt_tokens, new_tokens, eot
    if expected:
        assert select_prompts(*arguments) == expected
    else:
        with pytest.raises(
            UserError, match=f"found no prompt of {prompt_tokens} tokens .* in a split of {length} tokens: lower"
        ):
            select_prompts(*arguments)


@pytest.mark.parametrize("new_tokens", [12, 60], ids=["", "beyond the context"])
def test_batch_size_and_ranks_change_no_continuation(new_tokens):
    """Each is what its prompt gets alone, with random numbers of its own, of the tokenizer's ids up to end-of-text."""
    options = SamplingConfig(temperature=1.0, seed=3)
    decoder, prompts = Decoder(random_model(n_layer=2, context_length=32, vocab_size=20)), [*PROMPTS, PROMPTS[0]]
    alone = [
        generate(decoder, ids, new_tokens, options, first_row=row, n_vocab=9, stop_ids=(8,))
        for row, (ids, _) in enumerate(prompts)
    ]
    arguments = decoder, SMALL, prompts, new_tokens, options
    assert {i for ids in alone for i in ids} == set(range(8))
    assert min(map(len, alone)) < new_tokens
    assert alone[0] != alone[-1]
    for batch_size in (1, 3, 8):
        assert generate_continuations(*arguments, batch_size) == alone
    for world in (2, 9):  # with 9 some ranks have no batch
        assert over_ranks(world, lambda ranks: generate_continuations(*arguments, 2, ranks)) == alone


@given(st.text(max_size=12), st.integers(0, 40))
def test_a_split_character_belongs_to_the_part_that_ends_it(text, at):
    ids = [*text.encode()]
    complete = bytes(ids[:at]).decode(errors="ignore")
    assert text_after(BYTES, ids[:at], ids[at:]) == text[len(complete) :]


def test_text_distinct_and_repetition_by_hand():
    """n-grams do not span texts; repetition is the mean over sequences of at least 4 ids."""
    balloon = [*"🎈".encode()]
    assert text_after(BYTES, [*b"a", *balloon[:3]], [*b"b", *balloon[:2]]) == "\ufffdb\ufffd"
    assert text_after(BYTES, [*b"a", EOT, *b"b"], [*b" c"]) == " c"
    texts = ["a b  a\nb", "a c", "", "b"]
    assert distinct(texts, 1) == pytest.approx(3 / 7)  # a b c of a b a b a c b
    assert distinct(texts, 2) == pytest.approx(3 / 4)  # ab ba ac of ab ba ab ac
    assert distinct(["a", "b"], 2) is None
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repetition([[7] * 8, [1, 2, 3, 4], [1, 2, 3, 4], [7] * 3, []]) == pytest.approx(0.8 / 3)
    assert repetition([[1, 2, 3], []]) is None
