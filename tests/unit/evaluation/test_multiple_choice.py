"""choices.py against a loop over single places, lm-evaluation-harness's own figures, and answers known by hand."""

import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import transformers

from config import ModelConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.evaluation import metrics
from flatgpt.evaluation.multiple_choice import (
    ChoiceScores,
    Question,
    encode_pair,
    log_likelihoods,
    read_choices,
    score_choices,
)
from flatgpt.interop.huggingface import hugging_face_weights
from flatgpt.interop.pretrained import pretrained_shape
from model import GPT

T = 24
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's pattern
MERGES = [(b".", b" "), (b"n", b" "), (b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"o", b"n")]


def new_encoding(pattern: str) -> tiktoken.Encoding:
    """A vocabulary of bytes, MERGES and end-of-text."""
    ranks = {bytes([b]): b for b in range(256)} | {a + b: 256 + n for n, (a, b) in enumerate(MERGES)}
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 262})


# In the second a token may hold a word's last character and the blank behind it.
ENCODINGS = {"words": new_encoding(WORDS), "no borders": new_encoding(r"[\s\S]+")}
V = 263

LONG = "the cat sat on the mat. then it slept on and on. "  # longer than T
QUESTIONS = [
    Question("the cat sat on", ("the mat.", "a hat", "then", "on on on"), 0),
    Question("the dog ran on.", ("on and on", "then off"), 1),
    Question("", ("no context", "the start", "x"), 1),
    Question(" \n", ("only a blank", "x"), 0),
    Question("ends in blanks \t ", ("the end", "none", "on. the"), 2),
    Question(LONG, ("the end", "on and on the end of it", "x"), 1),
    Question(LONG * 3, ("t" * (T - 1), "x"), 0),  # with its blank an ending of T tokens
    Question("naïve 東京 🎈.", ("café 🎈", "on", "é"), 2),
    Question("<|endoftext|>", ("<|endoftext|> x", "y"), 0),
]


def lively(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": T, "vocab_size": V, **changes})
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return model


def by_hand(model: GPT, context: list[int], ending: list[int]) -> float:
    """Each id of the ending alone, after those before it; without batches and padding."""
    ids, total = context + ending, 0.0
    start = max(0, len(ids) - T - 1)
    for at in range(len(context), len(ids)):
        logits = model(torch.tensor([ids[start:at]]))[0, -1].tolist()
        total += logits[ids[at]] - math.log(sum(math.exp(value) for value in logits))
    return total


@torch.no_grad()
def expected(model: GPT, encoding: tiktoken.Encoding) -> list[float]:
    model.eval()
    pairs = [pair for q in QUESTIONS for pair in encode_pair(encoding, q.ctx, q.endings)]
    return [by_hand(model, *pair) for pair in pairs]


def all_pairs(encoding: tiktoken.Encoding = ENCODINGS["words"]) -> list:
    return [pair for q in QUESTIONS for pair in encode_pair(encoding, q.ctx, q.endings)]


# ---------------------------------------------------------------------------------------------------------------------
# reading


def line(**changes) -> str:
    """A question as HellaSwag's file has it; a key that is None is left out."""
    row = {"ind": 24, "activity_label": "Roof", "ctx_a": "A", "ctx": "A man.", "endings": ["a", "b"], "label": 1}
    return json.dumps({key: value for key, value in {**row, **changes}.items() if value is not None})


def test_questions_are_read(tmp_path):
    """A number or its digits as the label, other keys, a byte order mark, Windows' line ends, blank lines, no last
    line end."""
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
        (line(endings=None), "no key 'endings'"),
        (line(label=None), "no key 'label'"),
        (line(ctx=7), "ctx = 7: a text is expected"),
        (line(endings="ab"), "endings: a list of two or more texts is expected, none of them empty"),
        (line(endings=["a"], label=0), "endings: a list of two or more texts"),
        (line(endings=["a", ""]), "endings: a list of two or more texts"),
        (line(endings=["a", 5]), "endings: a list of two or more texts"),
        (line(label=2), "label = 2: the right ending's number is expected, 0 to 1"),
        (line(label=-1), "label = -1: "),
        (line(label="2"), "label = 2: "),
        (line(label=""), "label = '': "),  # HellaSwag's test split
        (line(label="-1"), "label = '-1': "),
        (line(label="²"), "label = '²': "),
        (line(label=True), "label = True: "),
        (line(label=1.0), "label = 1.0: "),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:40],
)
def test_a_line_that_is_no_question_is_named(tmp_path, bad, words):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([line().encode(), b"", bad if isinstance(bad, bytes) else bad.encode(), b"{"]))
    with pytest.raises(UserError) as error:
        read_choices(file)
    assert str(error.value).startswith(f"{file} line 3: {words}")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf\r\n \n"])
def test_no_question_at_all(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl is empty: a line of JSON with ctx, endings and label"):
        read_choices(tmp_path / "a.jsonl")


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=r"cannot be read: (Is a directory|No such file)"):
            read_choices(path)


# ---------------------------------------------------------------------------------------------------------------------
# tokens


def test_the_border_by_hand():
    def text(ids: list[int]) -> list[bytes]:
        return [words.decode_single_token_bytes(i) for i in ids]

    words, merged = ENCODINGS.values()
    [(context, one), (again, two)] = encode_pair(words, "to \t ", ["the", "x"])
    assert context == again
    assert [text(ids) for ids in (context, one, two)] == [
        [b"t", b"o"],
        [b" ", b"\t", b" ", b" the"],
        [b" ", b"\t", b" ", b" ", b"x"],
    ]
    assert [text(ids) for ids in encode_pair(words, "", ["the"])[0]] == [[b"<|endoftext|>"], [b" the"]]
    # ". " is one token, which the context alone does not have: the ending loses its blank
    assert [text(ids) for ids in encode_pair(merged, "to.", ["the"])[0]] == [[b"t", b"o", b"."], [b"t", b"he"]]


def their_tokenizer(folder: Path, use_regex: bool) -> transformers.PreTrainedTokenizerFast:
    """ENCODINGS as transformers has them."""

    def spell(raw: bytes) -> str:
        """Hugging Face writes byte b as a printable character."""
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in plain]
        return "".join(chr(b) if b in plain else chr(256 + others.index(b)) for b in raw)

    bytes_alone = {spell(bytes([b])): b for b in range(256)}
    merges = [(spell(a), spell(b)) for a, b in MERGES]
    vocabulary = bytes_alone | {a + b: 256 + n for n, (a, b) in enumerate(merges)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    settings = {"version": "1.0", "pre_tokenizer": level, "decoder": level}
    settings["model"] = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    file = str(folder / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")


@pytest.fixture(params=ENCODINGS)
def both(request, tmp_path):
    """lm-evaluation-harness's reader of a transformers model; the same model here, and its encoding."""
    if importlib.util.find_spec("lm_eval") is None:
        reason = "lm-eval is not installed: pip install -r requirements-extra.txt"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": T, "vocab_size": V}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**settings, bos_token_id=262, eos_token_id=262)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    model = GPT(ModelConfig(**pretrained_shape(str(tmp_path))))
    model.load_state_dict(hugging_face_weights(tmp_path, model.config))
    reader = HFLM(theirs, tokenizer=their_tokenizer(tmp_path, request.param == "words"), batch_size=3, device="cpu")
    return reader, model, ENCODINGS[request.param]


# But for blank contexts, which the harness does not take, and text that spells end-of-text: there it becomes that.
SHARED = [q for q in QUESTIONS if q.ctx != " \n" and "<|" not in q.ctx]


@pytest.mark.extra
def test_log_likelihoods_equal_the_harness(both):
    from lm_eval.api.instance import Instance

    reader, model, encoding = both
    asked = [(q.ctx, f" {ending}") for q in SHARED for ending in q.endings]
    answers = reader.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(asked)])
    pairs = [pair for q in SHARED for pair in encode_pair(encoding, q.ctx, q.endings)]
    got = log_likelihoods(model, pairs, torch.from_numpy)
    assert len(got) == len(answers) == 20
    assert got.tolist() == pytest.approx([answer for answer, _ in answers], rel=1e-5)


@pytest.mark.extra
def test_accuracies_equal_the_harness(both):
    """Its own multiple_choice task, from the questions to the report."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    reader, model, encoding = both
    rows = datasets.Dataset.from_list([dataclasses.asdict(q) for q in SHARED])
    settings = {
        "task": "mine",
        "custom_dataset": lambda **settings: {"test": rows},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["ctx"],
        "doc_to_choice": lambda row: row["endings"],
        "doc_to_target": lambda row: row["label"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    report = lm_eval.evaluate(reader, {"mine": ConfigurableTask(config=settings)}, bootstrap_iters=100)["results"][
        "mine"
    ]
    got = score_choices(model, encoding, SHARED, torch.from_numpy)
    assert got.accuracy == pytest.approx(report["acc,none"])
    assert got.accuracy_norm == pytest.approx(report["acc_norm,none"])
    assert got.accuracy_stderr == pytest.approx(report["acc_stderr,none"])
    assert got.accuracy_norm_stderr == pytest.approx(report["acc_norm_stderr,none"])


# ---------------------------------------------------------------------------------------------------------------------
# sums


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_log_likelihoods_equal_a_plain_loop(name, batch_tokens):
    model, encoding = lively(), ENCODINGS[name]
    got = log_likelihoods(model, all_pairs(encoding), torch.from_numpy, batch_tokens)
    assert got.dtype == np.float64
    assert got.tolist() == pytest.approx(expected(model, encoding), rel=1e-5)


@pytest.mark.parametrize("changes", [{"position": "rope"}, {"tie_weights": False, "head_bias": True}], ids=str)
def test_other_models(changes):
    model = lively(**changes)
    got = log_likelihoods(model, all_pairs(), torch.from_numpy)
    assert got.tolist() == pytest.approx(expected(model, ENCODINGS["words"]), rel=1e-5)


@pytest.mark.parametrize(("batch_tokens", "logits"), [(8192, 10**6), (60, 10**6), (100, 40), (8192, 7), (5, 1)])
def test_a_pass_keeps_to_its_limits(monkeypatch, batch_tokens, logits):
    """Tokens with their padding, where a single pair does not have more; logits of the endings' places alone."""
    model, pairs, seen, heads = lively(), all_pairs(), [], []
    hidden, head = model.hidden_states, model.compute_logits
    monkeypatch.setitem(metrics.LOGITS_BYTES, "cpu", 4 * V * logits)
    monkeypatch.setattr(model, "hidden_states", lambda x: (seen.append(tuple(x.shape)), hidden(x))[1])
    monkeypatch.setattr(model, "compute_logits", lambda x: (heads.append(len(x)), head(x))[1])
    got = log_likelihoods(model, pairs, torch.from_numpy, batch_tokens)
    assert got.tolist() == pytest.approx(expected(lively(), ENCODINGS["words"]), rel=1e-5)
    lengths = sorted((min(T, len(context) + len(ending) - 1) for context, ending in pairs), reverse=True)
    first = 0
    for rows, width in seen:  # by falling length, as many as go
        assert width == lengths[first]
        first += rows
        assert rows * width <= batch_tokens or rows == 1
        assert first == len(pairs) or (rows + 1) * width > batch_tokens
    assert first == len(pairs)
    assert max(heads) <= max(16, logits)  # 16 at least
    assert sum(heads) == sum(len(ending) for _, ending in pairs)


@pytest.mark.parametrize("world", [2, 3, 50])
def test_ranks_share_the_batches(world):
    """Each computes some, and their sums are one process's, bit for bit; 50 are more than there are batches."""
    model, more = lively(), {"batch_tokens": 60}
    whole = log_likelihoods(model, all_pairs(), torch.from_numpy, **more)
    mine = [log_likelihoods(model, all_pairs(), torch.from_numpy, share=(r, world), **more) for r in range(world)]
    assert (np.count_nonzero(mine, axis=0) == 1).all()
    assert np.count_nonzero(mine[0]) < len(whole)
    assert np.array_equal(sum(mine), whole)
    one = score_choices(model, ENCODINGS["words"], QUESTIONS, torch.from_numpy)
    given = []

    def total(sums: torch.Tensor) -> torch.Tensor:
        given.append(sums.dtype)
        return torch.from_numpy(sum(mine))

    for rank in range(world):
        share = {"share": (rank, world), "total": total}
        assert score_choices(model, ENCODINGS["words"], QUESTIONS, torch.from_numpy, **share, **more) == one
    assert set(given) == {torch.float64}


def test_batches_can_be_watched():
    seen = []

    def watch(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    score_choices(lively(), ENCODINGS["words"], QUESTIONS, torch.from_numpy, batch_tokens=60, watch=watch)
    assert sorted(n for batch in seen for n in batch) == list(range(len(all_pairs())))


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_as_it_was(training):
    """Dropout is off for the score and on again after it, also when the data fail; no random number is drawn, and no
    graph is kept."""
    model, graphs = lively(dropout=0.5), []
    answer = expected(model, ENCODINGS["words"])
    model.train(training)
    model.transformer.ln_f.register_forward_hook(lambda module, args, x: graphs.append(x.requires_grad))
    state = torch.get_rng_state()
    assert log_likelihoods(model, all_pairs(), torch.from_numpy).tolist() == pytest.approx(answer, rel=1e-5)
    assert model.training is training

    def broken(array):
        raise OSError("the device is gone")

    with pytest.raises(OSError, match="the device is gone"):
        log_likelihoods(model, all_pairs(), broken)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs == [False]


# ---------------------------------------------------------------------------------------------------------------------
# figures


def indifferent(**changes) -> GPT:
    """A model of bytes to which all ids are alike: an ending costs ln 257 for each of its bytes, and for the blank."""
    model = lively(**{"vocab_size": 257, **changes})
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("endings", "plain", "norm"),
    [
        (("abc", "a", "ab"), 1, 0),  # -4 -2 -3; -4/3 -2 -3/2: the blank is no character of the ending
        (("ab", "ééé"), 0, 0),  # -3 -7; -3/2 -7/3: characters, not their bytes (-3/2 -7/6)
        (("a", "abcd", "dcba"), 0, 1),  # the first of two that are alike
    ],
)
def test_answers_by_hand(endings, plain, norm):
    for label in range(len(endings)):
        got = score_choices(indifferent(), tokenizer.load("byte"), [Question("x", endings, label)], torch.from_numpy)
        assert got == ChoiceScores(1, int(label == plain), int(label == norm))


def test_accuracies_are_those_of_the_sums():
    model, encoding = lively(), ENCODINGS["words"]
    sums, correct, correct_norm = iter(expected(model, encoding)), 0, 0
    for q in QUESTIONS:
        own = {ending: next(sums) for ending in q.endings}
        correct += max(own, key=own.get) == q.endings[q.label]
        correct_norm += max(own, key=lambda e: own[e] / len(e)) == q.endings[q.label]
    got = score_choices(model, encoding, QUESTIONS, torch.from_numpy)
    assert got == ChoiceScores(len(QUESTIONS), correct, correct_norm)
    assert 0 < correct != correct_norm > 0


def test_standard_errors():
    scores, answers = ChoiceScores(5, 2, 4), np.array([1, 1, 0, 0, 0])
    assert (scores.accuracy, scores.accuracy_norm) == (0.4, 0.8)
    assert scores.accuracy_stderr == pytest.approx(answers.std(ddof=1) / math.sqrt(5))
    assert scores.accuracy_norm_stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 4))
    assert math.isnan(ChoiceScores(1, 1, 1).accuracy_stderr)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.correct = 5


def test_an_ending_longer_than_the_model_sees_is_refused():
    """T tokens are the most: before the first of them there has to be one."""
    fits = [QUESTIONS[0], Question("x", ("y", "a" * (T - 1)), 0)]
    score_choices(indifferent(), tokenizer.load("byte"), fits, torch.from_numpy)
    too_long = [QUESTIONS[0], Question("x", ("y", "a" * T), 0)]
    with pytest.raises(
        UserError, match=r"question 2 \('x'\) has an ending of 25 tokens, and the model sees 24 at once"
    ):
        score_choices(indifferent(), tokenizer.load("byte"), too_long, torch.from_numpy)


def test_a_diverged_model_is_no_score():
    model = lively()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    with pytest.raises(UserError, match="nan: its training diverged"):
        score_choices(model, ENCODINGS["words"], QUESTIONS, torch.from_numpy)
