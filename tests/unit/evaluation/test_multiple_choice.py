"""Multiple-choice questions against a loop over single tokens, and answers known by hand."""

import json
import math

import numpy as np
import pytest
import torch
from random_models import over_ranks, random_model
from scoring import CONTEXT, ENCODINGS, QUESTIONS, RANKS

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.evaluation import metrics, multiple_choice
from flatgpt.evaluation.multiple_choice import Question, encode_pairs, log_likelihoods, read_choices, score_choices
from model import GPT

WORDS = ENCODINGS["words"]


def choice_model(**changes) -> GPT:
    return random_model(**{"n_layer": 2, "context_length": CONTEXT, "vocab_size": len(RANKS) + 1, **changes})


def all_pairs(encoding=WORDS) -> list[tuple[list[int], list[int]]]:
    return [pair for question in QUESTIONS for pair in encode_pairs(encoding, question)]


@torch.no_grad()
def plain_log_likelihoods(model: GPT, encoding=WORDS) -> list[float]:
    """Each id of an ending alone, after those before it; without batches and padding."""
    sums = []
    for context, ending in all_pairs(encoding):
        ids, total = context + ending, 0.0
        start = max(0, len(ids) - CONTEXT - 1)
        for k in range(len(context), len(ids)):
            total += float(model(torch.tensor([ids[start:k]]))[0, -1].double().log_softmax(-1)[ids[k]])
        sums.append(total)
    return sums


def line(**changes) -> str:
    """A question as HellaSwag's file has it; a key that is None is left out."""
    row = {"ind": 24, "activity_label": "Roof", "ctx_a": "A", "ctx": "A man.", "endings": ["a", "b"], "label": 1}
    return json.dumps({key: value for key, value in {**row, **changes}.items() if value is not None})


def test_questions_are_read(tmp_path):
    """Labels as numbers or digits, other keys, a byte order mark, Windows' line ends, blank lines, no last line end."""
    file = tmp_path / "a.jsonl"
    rows = [line(), "", line(ctx="naïve 🎈\u2028", label="0", endings=["x", " é", "z"]), " \t", line(ctx="", label="1")]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    expected = [
        Question("A man.", ["a", "b"], 1),
        Question("naïve 🎈\u2028", ["x", " é", "z"], 0),
        Question("", ["a", "b"], 1),
    ]
    assert read_choices(file) == read_choices(file, "plain") == (expected, "plain")


HELLASWAG = {"activity_label": "Roof shingle", "ctx_a": " A man  is [header] up.", "ctx_b": "he Then,"}
HELLASWAG |= {
    "ctx": "A man is up. he Then,",
    "endings": [" [title] Climb [substeps] it. ", "b [title] c"],
    "label": "1",
}


def test_hellaswag(tmp_path):
    """By hand; tests/parity compares with lm-evaluation-harness. Some lines of WikiHow have no ctx_b."""
    file = tmp_path / "a.jsonl"
    lines = [HELLASWAG, {**HELLASWAG, "activity_label": "How to [title] sing", "ctx_a": "Sing.", "ctx_b": ""}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    endings = [" Climb it.", "b. c"]
    contexts = ["Roof shingle: A man is up. He then,", "How to. sing: Sing."]
    assert read_choices(file) == ([Question(context, endings, 1) for context in contexts], "hellaswag")
    plain, format = read_choices(file, "plain")
    assert (format, plain[0]) == ("plain", Question("A man is up. he Then,", HELLASWAG["endings"], 1))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{", "not JSON (Expecting property name"),
        ("[" * 100_000, ""),
        ("[1]", "a list"),
        (line(ctx=None), "ctx = None"),
        (line(ctx=7), "ctx = 7"),
        *((line(endings=bad, label=0), f"endings = {bad!r}") for bad in ("ab", ["a"], ["a", ""], ["a", 5])),
        (line(label=None), "label = None"),
        # '' is HellaSwag's test split
        *((line(label=bad), f"label = {bad!r}") for bad in (2, -1, "", "-1", "²", True, 1.0)),
    ],
    ids=lambda value: value[:40],
)
def test_a_line_that_is_no_question_is_named(tmp_path, bad, named):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([line(), "", bad, "{"]), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_choices(file)
    assert str(error.value).startswith(f"{file} line 3: {named}")
    lines = [HELLASWAG, HELLASWAG | {"ctx_b": None}], [HELLASWAG | {"endings": ["[a]", "b"]}]
    for rows, found in zip(lines, ("line 2: ctx_b = None, where the", r"line 1: endings = \['', 'b'\]"), strict=True):
        file.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(UserError, match=found):
            read_choices(file)
    file.write_bytes(b"\xef\xbb\xbf\r\n \n")
    with pytest.raises(UserError, match=r"a\.jsonl is empty: each line is JSON with ctx, endings"):
        read_choices(file)


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("words", {"position": "rope"}), ("no borders", {"tie_weights": False, "head_bias": True})],
    ids=["words", "no borders"],
)
def test_log_likelihoods_equal_a_plain_loop(name, changes, batch_tokens, monkeypatch):
    """Also shared by ranks; a batch has as many tokens as fit, or a single pair, and logits of the endings only."""
    model, pairs, seen, logits = choice_model(**changes), all_pairs(ENCODINGS[name]), [], []
    expected = plain_log_likelihoods(model, ENCODINGS[name])
    hidden, head = model.hidden_states, model.compute_logits
    monkeypatch.setattr(multiple_choice, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setitem(metrics.LOGITS_BYTES, "cpu", 4 * 263 * 40)
    monkeypatch.setattr(model, "hidden_states", lambda x: seen.append(x.shape) or hidden(x))
    monkeypatch.setattr(model, "compute_logits", lambda x, **more: logits.append(len(x)) or head(x, **more))
    found = log_likelihoods(model, pairs, torch.from_numpy)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert sum(rows for rows, _ in seen) == len(pairs)
    assert all(rows * width <= batch_tokens or rows == 1 for rows, width in seen)
    assert sum(logits) == sum(len(ending) for _, ending in pairs)
    assert max(logits) <= 40
    for world in (2, 50):  # 50 are more than there are batches
        assert np.array_equal(over_ranks(world, lambda r: log_likelihoods(model, pairs, torch.from_numpy, r)), found)


def test_a_context_and_an_ending_of_a_million_blanks():
    """They overflow the stack of tiktoken's regular expressions if they are encoded in one call."""
    blanks = " " * 1_100_000
    ((context, short), (_, long)) = encode_pairs(WORDS, Question(f"{blanks}a{blanks}", ["b", f"\n{blanks}c"], 0))
    assert (len(context), len(short)) == (1_100_001, 1_100_002)
    assert WORDS.decode(context + long) == f"{blanks}a{blanks} \n{blanks}c"


def uniform_model() -> GPT:
    """A model of bytes to which all ids are equally likely: an ending costs ln 257 for each byte, and for its space."""
    model = choice_model(vocab_size=257)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("endings", "plain", "norm"),
    [
        (("abc", "a", "ab"), 1, 0),  # -4 -2 -3; -4/3 -2 -3/2: the space is not a character of the ending
        (("ab", "ééé"), 0, 0),  # -3 -7; -3/2 -7/3: characters, not bytes (-3/2 -7/6)
        (("a", "abcd", "dcba"), 0, 1),  # the first of two that are equal
    ],
)
def test_answers_by_hand(endings, plain, norm):
    for label in range(len(endings)):
        questions = [Question("x", endings, label)]
        got = score_choices(uniform_model(), tokenizer.load("byte"), questions, torch.from_numpy)
        assert (got["choice_accuracy"], got["choice_accuracy_norm"]) == (label == plain, label == norm)
        assert got["choice_accuracy_stderr"] is None, "of a single question there is none"
    questions, n = [Question("x", endings, label) for label in range(len(endings))], len(endings)
    got = score_choices(uniform_model(), tokenizer.load("byte"), questions, torch.from_numpy)
    assert got["choice_accuracy_norm"] == pytest.approx(1 / n)
    assert got["choice_accuracy_norm_stderr"] == pytest.approx(np.std([1] + [0] * (n - 1), ddof=1) / math.sqrt(n))


def test_what_cannot_be_scored():
    """An ending has to fit into the context; one of CONTEXT tokens, as in QUESTIONS, does."""
    too_long, diverged = [QUESTIONS[0], Question("x", ["y", "a" * CONTEXT], 0)], choice_model()
    with pytest.raises(UserError, match=r"the ending ' aa.* has 25 tokens, more than context_length = 24: "):
        score_choices(uniform_model(), tokenizer.load("byte"), too_long, torch.from_numpy)
    torch.nn.init.constant_(diverged.transformer.ln_f.weight, math.nan)
    figures = score_choices(diverged, WORDS, QUESTIONS, torch.from_numpy)
    assert figures.pop("questions") == len(QUESTIONS)
    assert all(map(math.isnan, figures.values()))
