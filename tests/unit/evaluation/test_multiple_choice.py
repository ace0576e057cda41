"""Multiple-choice questions against a loop over single tokens, and answers known by hand."""

import json
import math

import numpy as np
import pytest
import tiktoken
import torch
from random_models import over_ranks, random_model

from config import UserError
from flatgpt.data import tokenizer
from flatgpt.evaluation import metrics
from flatgpt.evaluation.multiple_choice import Question, encode_pairs, log_likelihoods, read_choices, score_choices
from flatgpt.runtime.distributed import SINGLE_PROCESS
from model import GPT

T = 24
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's
MERGES = [(b".", b" "), (b"n", b" "), (b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"o", b"n")]


def new_encoding(pattern: str) -> tiktoken.Encoding:
    """A vocabulary of bytes, MERGES and end-of-text."""
    ranks = {bytes([b]): b for b in range(256)} | {a + b: 256 + n for n, (a, b) in enumerate(MERGES)}
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 262})


# In the second a token may hold a word's last character and the space behind it.
ENCODINGS = {"words": new_encoding(PATTERN), "no borders": new_encoding(r"[\s\S]+")}
WORDS, V = ENCODINGS["words"], 263

LONG = "the cat sat on the mat. then it slept on and on. "  # longer than T
QUESTIONS = [
    Question("the cat sat on", ("the mat.", "a hat", "then", "on on on"), 0),
    Question("the dog ran on.", ("on and on", "then off"), 1),
    Question("", ("no context", "the start", "x"), 1),
    Question(" \n", ("only a space", "x"), 0),
    Question("ends in spaces \t ", ("the end", "none", "on. the"), 2),
    Question(LONG, ("the end", "on and on the end of it", "x"), 1),
    Question(LONG * 3, ("t" * (T - 1), "x"), 0),  # with its space an ending of T tokens
    Question("naïve 東京 🎈.", ("café 🎈", "on", "é"), 2),
    Question("<|endoftext|>", ("<|endoftext|> x", "y"), 0),
]


def choice_model(**changes) -> GPT:
    return random_model(**{"n_layer": 2, "context_length": T, "vocab_size": V, **changes})


def all_pairs(encoding: tiktoken.Encoding = WORDS) -> list[tuple[list[int], list[int]]]:
    return [pair for question in QUESTIONS for pair in encode_pairs(encoding, question)]


@torch.no_grad()
def plain_log_likelihoods(model: GPT, encoding: tiktoken.Encoding = WORDS) -> list[float]:
    """Each id of an ending alone, after those before it; without batches and padding."""
    sums = []
    for context, ending in all_pairs(encoding):
        ids, total = context + ending, 0.0
        start = max(0, len(ids) - T - 1)
        for k in range(len(context), len(ids)):
            logits = model.eval()(torch.tensor([ids[start:k]]))[0, -1].double()
            total += float(logits.log_softmax(-1)[ids[k]])
        sums.append(total)
    return sums


# ---------------------------------------------------------------------------------------------------------------------
# reading and tokenising


def line(**changes) -> str:
    """A question as HellaSwag's file has it; a key that is None is left out."""
    row = {"ind": 24, "activity_label": "Roof", "ctx_a": "A", "ctx": "A man.", "endings": ["a", "b"], "label": 1}
    return json.dumps({key: value for key, value in {**row, **changes}.items() if value is not None})


def test_questions_are_read(tmp_path):
    """Labels as numbers or digits, other keys, a byte order mark, Windows' line ends, blank lines, no last line end."""
    file = tmp_path / "a.jsonl"
    rows = [line(), "", line(ctx="naïve 🎈", label="0", endings=["x", " é", "z"]), " \t", line(ctx="", label="1")]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert read_choices(str(file)) == [
        Question("A man.", ("a", "b"), 1),
        Question("naïve 🎈", ("x", " é", "z"), 0),
        Question("", ("a", "b"), 1),
    ]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "not JSON (Expecting property name"),
        (b'{"ctx": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        ("[" * 100_000, "not JSON ("),
        ("[1]", "a list; an object with ctx, endings and label is expected"),
        (line(ctx=None), "no key 'ctx', its keys are ind, activity_label, ctx_a, endings, label"),
        (line(label=None), "no key 'label'"),
        (line(ctx=7), "ctx = 7: a text is expected"),
        *((line(endings=bad, label=0), "endings: a list of two or more") for bad in ("ab", ["a"], ["a", ""], ["a", 5])),
        (line(label=2), "label = 2: the correct ending's index is expected, 0 to 1"),
        # '' is HellaSwag's test split
        *((line(label=bad), f"label = {bad!r}: ") for bad in (-1, "", "-1", "²", True, 1.0)),
        (line(label="2"), "label = 2: "),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:40],
)
def test_a_line_that_is_no_question_is_named(tmp_path, bad, words):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([line().encode(), b"", bad if isinstance(bad, bytes) else bad.encode(), b"{"]))
    with pytest.raises(UserError) as error:
        read_choices(file)
    assert str(error.value).startswith(f"{file} line 3: {words}")


def test_files_without_a_question(tmp_path):
    for content in (b"", b"\xef\xbb\xbf\r\n \n"):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl is empty: a line of JSON with ctx, endings and label"):
            read_choices(tmp_path / "a.jsonl")
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=r"cannot be read: (Is a directory|No such file)"):
            read_choices(path)


def test_the_border_of_context_and_ending_by_hand():
    def tokens(encoding, ctx: str, *endings: str) -> list[list[list[bytes]]]:
        pairs = encode_pairs(encoding, Question(ctx, endings, 0))
        return [[[encoding.decode_single_token_bytes(i) for i in ids] for ids in pair] for pair in pairs]

    assert tokens(WORDS, "to \t ", "the", "x") == [
        [[b"t", b"o"], [b" ", b"\t", b" ", b" the"]],
        [[b"t", b"o"], [b" ", b"\t", b" ", b" ", b"x"]],
    ]
    assert tokens(WORDS, "", "the") == [[[b"<|endoftext|>"], [b" the"]]]
    # ". " is one token, which the context alone does not have: the ending loses its space
    assert tokens(ENCODINGS["no borders"], "to.", "the") == [[[b"t", b"o", b"."], [b"t", b"he"]]]


# ---------------------------------------------------------------------------------------------------------------------
# log-likelihoods


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("words", {}),
        ("no borders", {}),
        ("words", {"position": "rope"}),
        ("words", {"tie_weights": False, "head_bias": True}),
    ],
    ids=str,
)
def test_log_likelihoods_equal_a_plain_loop(name, changes):
    model, encoding = choice_model(**changes), ENCODINGS[name]
    expected = plain_log_likelihoods(model, encoding)
    for batch_tokens in (1, 60, 8192):
        got = log_likelihoods(model, all_pairs(encoding), torch.from_numpy, batch_tokens)
        assert got.dtype == np.float64
        assert got.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("batch_tokens", "logits"), [(8192, 10**6), (60, 10**6), (100, 40), (8192, 7), (5, 1)])
def test_a_batch_keeps_to_its_limits(monkeypatch, batch_tokens, logits):
    """Tokens with their padding, unless a single pair has more; logits of the endings only, 16 rows at least."""
    model, pairs, widths, logit_rows = choice_model(), all_pairs(), [], []
    hidden_states, compute_logits = model.hidden_states, model.compute_logits
    monkeypatch.setitem(metrics.LOGITS_BYTES, "cpu", 4 * V * logits)
    monkeypatch.setattr(model, "hidden_states", lambda x: (widths.append(tuple(x.shape)), hidden_states(x))[1])
    monkeypatch.setattr(
        model, "compute_logits", lambda x, **more: (logit_rows.append(len(x)), compute_logits(x, **more))[1]
    )
    log_likelihoods(model, pairs, torch.from_numpy, batch_tokens)
    lengths = sorted((min(T, len(context) + len(ending) - 1) for context, ending in pairs), reverse=True)
    first = 0
    for rows, width in widths:  # the longest first, as many as fit
        assert width == lengths[first]
        first += rows
        assert rows * width <= batch_tokens or rows == 1
        assert first == len(pairs) or (rows + 1) * width > batch_tokens
    assert first == len(pairs)
    assert max(logit_rows) <= max(16, logits)
    assert sum(logit_rows) == sum(len(ending) for _, ending in pairs)


@pytest.mark.parametrize("world", [2, 50])
def test_ranks_share_the_batches(world):
    """Their sums are those of one process, bit for bit; 50 ranks are more than there are batches."""
    model, seen = choice_model(), []

    def progress(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    def score(ranks=SINGLE_PROCESS) -> np.ndarray:
        return log_likelihoods(model, all_pairs(), torch.from_numpy, 60, ranks, progress)

    together = over_ranks(world, score)
    assert sorted(n for batch in seen for n in batch) == list(range(len(all_pairs())))
    assert np.array_equal(together, score())


def test_scoring_leaves_the_model_as_it_was():
    """Dropout is off meanwhile, also if the device fails; no random number is drawn."""
    model, state = choice_model(dropout=0.5).train(), torch.get_rng_state()
    one, two = (log_likelihoods(model, all_pairs(), torch.from_numpy) for _ in range(2))
    assert np.array_equal(one, two)
    with pytest.raises(ZeroDivisionError):
        log_likelihoods(model, all_pairs(), lambda array: 1 / 0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# figures


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
        assert math.isnan(got["choice_accuracy_stderr"]), "of a single question there is none"


def test_accuracies_follow_from_the_log_likelihoods():
    model, correct, correct_norm = choice_model(), [], []
    sums = iter(plain_log_likelihoods(model))
    for question in QUESTIONS:
        own = {ending: next(sums) for ending in question.endings}
        correct.append(max(own, key=own.get) == question.endings[question.label])
        correct_norm.append(max(own, key=lambda e, own=own: own[e] / len(e)) == question.endings[question.label])
    assert score_choices(model, WORDS, QUESTIONS, torch.from_numpy) == {
        "questions": 9,
        "choice_accuracy": pytest.approx(np.mean(correct)),
        "choice_accuracy_stderr": pytest.approx(np.std(correct, ddof=1) / 3),
        "choice_accuracy_norm": pytest.approx(np.mean(correct_norm)),
        "choice_accuracy_norm_stderr": pytest.approx(np.std(correct_norm, ddof=1) / 3),
    }
    assert 0 < sum(correct) != sum(correct_norm) > 0


def test_an_ending_longer_than_the_context_is_refused():
    """T tokens fit: one has to come before the first of them."""
    for length in (T - 1, T):
        questions = [QUESTIONS[0], Question("x", ("y", "a" * length), 0)]
        if length < T:
            score_choices(uniform_model(), tokenizer.load("byte"), questions, torch.from_numpy)
            continue
        with pytest.raises(UserError, match=r"question 2 \('x'\) has an ending of 25 tokens, and the model sees 24 at"):
            score_choices(uniform_model(), tokenizer.load("byte"), questions, torch.from_numpy)


def test_a_diverged_model_has_no_score():
    model = choice_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    with pytest.raises(UserError, match="NaN: its training diverged"):
        score_choices(model, WORDS, QUESTIONS, torch.from_numpy)
