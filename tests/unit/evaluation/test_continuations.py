"""continuation.py: cutting by properties, continuing against one prompt at a time, figures against plain counts,
sacrebleu and rouge-score."""

import collections
import dataclasses
import importlib.machinery
import importlib.util
import math
import os
import sys

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ModelConfig, SamplingConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.data.shards import Tokens
from flatgpt.evaluation.continuations import (
    Place,
    compare,
    continue_all,
    cut,
    distinct,
    repetition,
    require,
    text_after,
)
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate
from model import GPT

BYTES, EOT = tokenizer.load("byte"), 256
# eight letters and end-of-text, id 8, which models draw soon
SMALL = tiktoken.Encoding(
    "small", pat_str=".", mergeable_ranks={b"%c" % (97 + n): n for n in range(8)}, special_tokens={"<|endoftext|>": 8}
)
FREE = SamplingConfig(temperature=1.0, seed=3)
quick = settings(max_examples=100)


# ---------------------------------------------------------------------------------------------------------------------
# cutting


@quick
@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 20), st.integers(1, 20))
def test_places_are_spread_over_the_split(length, n, prompt_tokens, new_tokens):
    """Each id says where it is."""
    span, split = prompt_tokens + new_tokens, np.arange(length, dtype=np.uint16)
    if length < span:
        with pytest.raises(UserError, match=f"do not fit into a split of {length}: lower --prompt_tokens or"):
            cut(split, n, prompt_tokens, new_tokens, end_of_text=-1)
        return
    places = cut(split, n, prompt_tokens, new_tokens, end_of_text=-1)
    starts = [place.prompt[0] for place in places]
    n = min(n, length - span + 1)  # no place comes twice
    assert len(places) == len(set(starts)) == n
    for place in places:
        assert (len(place.prompt), len(place.reference)) == (prompt_tokens, new_tokens)
        assert place.prompt + place.reference == list(range(place.prompt[0], place.prompt[0] + span))
    steps = np.diff(starts)
    assert starts[0] == 0
    if n > 1:
        assert starts[-1] == length - span
        assert steps.max() - steps.min() <= 1
        assert steps.min() >= span or length < n * span


@quick
@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_references_end_before_end_of_text(ids, n, prompt_tokens, new_tokens):
    """And where it comes at once, the place is left out; prompts may hold it."""
    split = np.array(ids, dtype=np.uint16)
    uncut = cut(split, n, prompt_tokens, new_tokens, end_of_text=9)
    expected = []
    for place in uncut:
        text = "".join(map(str, place.reference)).split("0")[0]
        if text:
            expected.append(Place(place.prompt, [int(i) for i in text]))
    if not expected:
        with pytest.raises(UserError, match=r"after each of the \d+ prompts comes end-of-text"):
            cut(split, n, prompt_tokens, new_tokens, end_of_text=0)
    else:
        assert cut(split, n, prompt_tokens, new_tokens, end_of_text=0) == expected


def test_only_what_is_cut_is_read(tmp_path, monkeypatch):
    """Of shards, across their borders; plain numbers, which JSON and dictionaries take."""
    ids = np.random.default_rng(0).integers(0, 50_000, size=1000).astype("<u2")
    files = [(tmp_path / f"{n}.bin", None) for n in range(3)]
    for (file, _), part in zip(files, np.split(ids, [300, 301]), strict=True):
        file.write_bytes(part.tobytes())
    tokens, read, real = Tokens(files), [], Tokens.__getitem__
    monkeypatch.setattr(Tokens, "__getitem__", lambda self, span: (read.append(span), real(self, span))[1])
    places = cut(tokens, 10, 40, 50, end_of_text=-1)
    starts = [n * 910 // 9 for n in range(10)]
    assert [place.prompt + place.reference for place in places] == [ids[s : s + 90].tolist() for s in starts]
    assert read == [slice(s, s + 90) for s in starts]
    assert {type(i) for place in places for i in place.prompt + place.reference} == {int}


# ---------------------------------------------------------------------------------------------------------------------
# continuing


def lively() -> GPT:
    """A model with ids beyond SMALL's."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=20))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.5)
    return model


def following(cycle: list[int]) -> GPT:
    """A model of bytes that after each id of the cycle sees nothing but the one behind it."""
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=320, context_length=64, vocab_size=257, tie_weights=False))
    with torch.no_grad():
        for p in (*model.transformer.h.parameters(), model.transformer.wpe.weight, model.lm_head.weight):
            p.zero_()
        model.transformer.wte.weight.copy_(torch.eye(320))
        for here, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            model.lm_head.weight[after, here] = 10
    return model


RNG = np.random.default_rng(1)
PLACES = [Place(RNG.integers(0, 8, 10).tolist(), RNG.integers(0, 8, 12).tolist()) for _ in range(7)]


@pytest.mark.parametrize("new_tokens", [12, 60], ids=["", "beyond the context"])
@pytest.mark.parametrize("options", [FREE, SamplingConfig(greedy=True, repetition_penalty=1.3)], ids=["free", "greedy"])
def test_batches_and_ranks_do_not_show(options, new_tokens):
    """Prompt r's continuation is what it gets alone, with random numbers of its own."""
    model = lively()
    decoder, more = Decoder(model), {"n_vocab": 9, "stop_ids": (8,)}
    alone = [
        [*generate(decoder, place.prompt, new_tokens, options, first_row=row, **more)]
        for row, place in enumerate(PLACES)
    ]
    assert len({len(ids) for ids in alone}) > 1, "some end sooner than others"
    for batch_size in (1, 3, 7, 32):
        assert continue_all(decoder, SMALL, PLACES, new_tokens, options, batch_size) == alone
    for world in (2, 3, 9):  # with 9 there are ranks without a batch
        shares, parts = [(rank, world) for rank in range(world)], []
        for share in shares:
            continue_all(
                decoder, SMALL, PLACES, new_tokens, options, 2, share, lambda mine, p=parts: p.append(mine) or p
            )
        assert sum(map(len, parts)) == 7
        for share in shares:
            got = continue_all(decoder, SMALL, PLACES, new_tokens, options, 2, share, lambda mine, p=parts: p)
            assert got == alone
    assert model.training


def test_equal_prompts_go_on_differently():
    written = continue_all(Decoder(lively()), SMALL, [PLACES[0]] * 4, 12, FREE, batch_size=2)
    assert len(set(map(tuple, written))) == 4


def test_only_ids_of_the_tokenizer_are_written():
    """The model's vocabulary is larger; end-of-text ends a text and is no part of it."""
    written = continue_all(Decoder(lively()), SMALL, PLACES * 4, 40, SamplingConfig(temperature=3.0))
    assert {i for ids in written for i in ids} == set(range(8))
    assert len(written) == 28


def test_a_text_that_ends():
    """After c comes end-of-text, and a continuation may be empty."""
    places = [Place([*prompt], [0]) for prompt in (b"a", b"c", b"xyza")]
    written = continue_all(Decoder(following([*b"abc", EOT])), BYTES, places, 9, SamplingConfig(greedy=True))
    assert written == [[*b"bc"], [], [*b"bc"]]


def test_batches_can_be_watched():
    seen = []
    share = {"batch_size": 2, "share": (1, 2), "watch": lambda batches: seen.extend(batches) or batches}
    continue_all(Decoder(lively()), SMALL, PLACES, 2, FREE, **share)
    assert seen == [2, 6]


# ---------------------------------------------------------------------------------------------------------------------
# text


@quick
@given(st.text(max_size=12), st.integers(0, 40))
def test_a_character_belongs_to_the_text_that_ends_it(text, at):
    """Wherever a text is cut, also inside a character, the second part's is what is not certain after the first."""
    ids = [*text.encode()]
    certain = bytes(ids[:at]).decode(errors="ignore")
    assert text_after(BYTES, ids[:at], ids[at:]) == text[len(certain) :]


def test_text_by_hand():
    balloon = [*"🎈".encode()]
    assert text_after(BYTES, [*b"a", *balloon[:3]], [balloon[3], *b"!"]) == "🎈!"
    assert text_after(BYTES, [*b"a", *balloon[:3]], [*b"b", *balloon[:2]]) == "\ufffdb\ufffd"
    assert text_after(BYTES, [*b"a", EOT, *b"b"], [*b" c"]) == " c"
    assert text_after(BYTES, [255], [*b"x"]) == "x"


def test_gpt2_emoji():
    encoding = tokenizer.load("gpt2")
    ids = encoding.encode_ordinary("a 🎈 b")
    assert len(ids) > 4, "the balloon is several tokens"
    texts = [text_after(encoding, ids[:at], ids[at:]) for at in range(len(ids) + 1)]
    assert [*dict.fromkeys(texts)] == ["a 🎈 b", " 🎈 b", "🎈 b", " b", ""]


# ---------------------------------------------------------------------------------------------------------------------
# figures


def test_distinct_by_hand():
    """Words of all texts together; pairs do not reach from one text into the next; any white space separates."""
    texts = ["a b  a\nb", "a c", "", "b"]
    assert distinct(texts, 1) == pytest.approx(3 / 7)  # a b c of a b a b a c b
    assert distinct(texts, 2) == pytest.approx(3 / 4)  # ab ba ac of ab ba ab ac
    assert math.isnan(distinct(["", " "], 1))
    assert math.isnan(distinct(["a", "b"], 2))


def test_repetition_by_hand():
    assert repetition([[1, 2, 3, 4, 5]]) == 0
    assert repetition([[7] * 8]) == pytest.approx(1 - 1 / 5)
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    # the mean over texts, whatever their length; shorter ones than 4 have no say; nothing is shared between texts
    assert repetition([[7] * 8, [1, 2, 3, 4], [1, 2, 3, 4], [7] * 3, []]) == pytest.approx(0.8 / 3)
    assert math.isnan(repetition([[1, 2, 3], []]))


@quick
@given(st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=5), st.integers(1, 5))
def test_figures_equal_plain_counts(sequences, n):
    texts = [" ".join(map(str, ids)) for ids in sequences]
    everywhere, shares = collections.Counter(), []
    for ids in sequences:
        counts = collections.Counter(tuple(ids[i] for i in range(at, at + n)) for at in range(len(ids) + 1 - n))
        everywhere += counts
        if counts:
            shares.append(sum(count - 1 for count in counts.values()) / sum(counts.values()))
    expected = len(everywhere) / sum(everywhere.values()) if everywhere else math.nan
    assert distinct(texts, n) == pytest.approx(expected, nan_ok=True)
    assert repetition(sequences, n) == pytest.approx(np.mean(shares) if shares else math.nan, nan_ok=True)


@pytest.fixture
def extras() -> None:
    if any(importlib.util.find_spec(module) is None for module in ("sacrebleu", "rouge_score")):
        reason = "sacrebleu or rouge-score is not installed: pip install -r requirements-extra.txt"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def place(prompt: str, reference: str) -> Place:
    return Place([*prompt.encode()], [*reference.encode()])


@pytest.mark.extra
def test_figures_equal_the_libraries(extras):
    """Called plainly; also empty continuations, lower case, other scripts, text that WikiText's way has taken apart."""
    import sacrebleu
    from rouge_score import rouge_scorer

    require()
    references = [
        "the cat sat on the mat .",
        "it slept , and SLEPT on .",
        "naïve café 🎈",
        "東京 is a city of cities .",
    ]
    texts = ["the cat slept on the mat .", "it slept on and on .", "", "東京 is the cities of a city ."]
    places = [place(f"p{n} ", text) for n, text in enumerate(references)] * 30
    got = compare(BYTES, places, [[*text.encode()] for text in texts] * 30)
    bleu = sacrebleu.corpus_bleu(texts * 30, [references * 30], force=True)
    assert 10 < bleu.score < 90
    assert got.bleu == pytest.approx(bleu.score)
    assert got.bleu_signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    each = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, texts, strict=True)]
    assert got.rouge_l == pytest.approx(np.mean(each))
    assert 0 < got.rouge_l < 1
    assert got.prompts == 120
    assert (got.distinct_1, got.distinct_2) == (distinct(texts * 30, 1), distinct(texts * 30, 2))
    assert (got.reference_distinct_1, got.reference_distinct_2) == (
        distinct(references * 30, 1),
        distinct(references * 30, 2),
    )
    assert got.repetition == pytest.approx(repetition([[*text.encode()] for text in texts]))
    assert got.reference_repetition == pytest.approx(repetition([[*text.encode()] for text in references]))
    assert len({got.distinct_1, got.distinct_2, got.reference_distinct_1, got.reference_distinct_2}) == 4


@pytest.mark.extra
def test_no_advice_about_wikitext(extras, caplog):
    """sacrebleu warns of 100 lines with a blank in front of the full stop, which is how WikiText is."""
    places = [place("p", "the cat sat on the mat .")] * 100
    compare(BYTES, places, [p.reference for p in places])
    assert not caplog.records


@pytest.mark.extra
def test_a_model_that_knows_the_text(extras):
    """It repeats the references: 100 and 1, and their other figures are its own."""
    cycle = [*b"abcd efg\nhij\tklmno\rpqrst\x0buvwxyz"]
    split = np.array(cycle * 40, dtype=np.uint16)
    places = cut(split, 9, 5, 60, EOT)
    written = continue_all(Decoder(following(cycle)), BYTES, places, 60, SamplingConfig(greedy=True), batch_size=4)
    assert written == [p.reference for p in places]
    got = compare(BYTES, places, written)
    assert got.bleu == pytest.approx(100)
    assert got.rouge_l == 1
    assert got.distinct_1 == got.reference_distinct_1 < got.distinct_2 == got.reference_distinct_2 < 1
    assert 0 < got.repetition == got.reference_repetition < 1


@pytest.mark.extra
def test_characters_that_the_cut_has_split(extras):
    """Emoji of four bytes, and places at all of them: the text of both sides has no half character at its start."""
    split = np.frombuffer(("🎈 one two three four five six 🚀 " * 60).encode(), np.uint8).astype(np.uint16)
    places = cut(split, 50, 10, 62, EOT)
    assert len({p.prompt[0] & 0xC0 == 0x80 for p in places}) == 2
    got = compare(BYTES, places, [p.reference for p in places])
    assert (got.bleu, got.rouge_l) == (pytest.approx(100), 1)
    assert not any(text_after(BYTES, p.prompt, p.reference).startswith("\ufffd") for p in places)
    assert dataclasses.asdict(got)["prompts"] == 50


@pytest.mark.parametrize(
    ("missing", "names"),
    [
        (["sacrebleu"], "sacrebleu"),
        (["rouge_score"], "rouge-score"),
        (["sacrebleu", "rouge_score"], "sacrebleu and rouge-score"),
    ],
)
def test_what_is_missing_is_said_with_its_install_line(monkeypatch, missing, names):
    for module in ("sacrebleu", "rouge_score"):
        there = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(module, None))
        monkeypatch.setitem(sys.modules, module, None if module in missing else there)
    with pytest.raises(UserError) as error:
        require()
    assert str(error.value) == f"BLEU and ROUGE need {names}: pip install -r requirements-extra.txt"
