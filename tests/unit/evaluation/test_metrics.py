"""Windows and counts of a text against plain loops; sums over batches and ranks; figures by hand.

tests/parity compares the figures of a model with scikit-learn's.
"""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from dataset_files import tokens
from hypothesis import assume, example, given
from hypothesis import strategies as st
from random_models import over_ranks, random_model
from scoring import FIRST, read_windows, rolling_loop, strided_loop
from torch.nn.functional import cross_entropy

from flatgpt.data import tokenizer
from flatgpt.evaluation import metrics
from flatgpt.evaluation.metrics import count_text, eval_batches, mean_loss, token_statistics
from flatgpt.evaluation.report import compute_metrics
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext

V, T = 12, 8
IDS = np.random.default_rng(0).integers(V, size=8 * 4 * 10 + 7)
COUNTS = {"bytes": 20, "words": 4, "lines": 1}


# ---------------------------------------------------------------------------------------------------------------------
# windows


@given(st.data())
def test_windows_equal_a_plain_loop(data):
    """Every token but the first (rolling: every one) is scored once, up to `limit`; ranks take the batches in turn."""
    T, batch_size, limit, world = (data.draw(st.integers(*span)) for span in ((1, 12), (1, 9), (0, 70), (1, 4)))
    protocol, text = data.draw(st.sampled_from(["window", "stride", "rolling"])), list(range(100, 160))
    text, rolling = text[: data.draw(st.integers(2, 60))], protocol == "rolling"
    if rolling:  # documents, some of them empty, and end-of-text anywhere
        for place in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=8)):
            text[place] = FIRST
        assume(set(text) != {FIRST})
    stride = data.draw(st.integers(1, T)) if protocol == "stride" else T
    plain = rolling_loop(text, T) if rolling else strided_loop(text, T + 1, stride)
    assert [target for _, targets in plain for target in targets] == [i for i in text[not rolling :] if i != FIRST]
    before = [sum(len(targets) for _, targets in plain[:n]) for n in range(len(plain))]
    plain = [pair for pair, tokens in zip(plain, before, strict=True) if not limit or tokens < limit]
    expected = [plain[n : n + batch_size] for n in range(0, len(plain), batch_size)]
    options = {"stride": None if protocol == "window" else stride, "rolling": rolling, "limit": limit}
    assert read_windows(text, T, batch_size, **options) == expected
    for rank in range(world):  # all get the same number: some a last batch without a target
        idle = [[(plain[0][0], [])]] * (rank >= len(expected) % world > 0)
        found = read_windows(text, T, batch_size, ranks=DistributedContext(rank, world), **options)
        assert found == expected[rank::world] + idle


# ---------------------------------------------------------------------------------------------------------------------
# sums


def scored(model, batches=None, ranks=SINGLE_PROCESS) -> dict:
    batches = eval_batches(IDS, T, 4) if batches is None else batches
    return compute_metrics(token_statistics(model, batches, torch.from_numpy, ranks), COUNTS)


def assert_same(one: dict, other: dict) -> None:
    for bucket, expected in zip(one.pop("loss_by_position"), other.pop("loss_by_position"), strict=True):
        assert bucket == pytest.approx(expected, rel=1e-6)
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(("logits_bytes", "most"), [(1, 16), (4 * V * 33, 33), (10**9, 40 * T)])
@pytest.mark.parametrize("size", [3, 40])
def test_batch_size_and_chunks_change_no_figure(monkeypatch, size, logits_bytes, most):
    """Logits are computed of targets that are scored only, and of at least 16 at once."""
    model, rows = random_model(), []
    whole, head = scored(model), model.compute_logits
    monkeypatch.setattr(model, "compute_logits", lambda x, **more: rows.append(len(x)) or head(x, **more))
    monkeypatch.setitem(metrics.LOGITS_BYTES, "cpu", logits_bytes)
    assert_same(scored(model, eval_batches(IDS, T, size)), whole)
    assert sum(rows) == len(IDS) - 1
    assert max(rows) == min(most, size * T)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_together_give_the_figures_of_one(world):
    """11 batches: with 3 and 8 ranks some have a last one in which nothing is scored."""
    model = random_model()

    def loss(ranks=SINGLE_PROCESS) -> float:
        return mean_loss(model, eval_batches(IDS, T, 4, ranks=ranks), torch.from_numpy, ranks)

    both = over_ranks(world, lambda ranks: scored(model, eval_batches(IDS, T, 4, ranks=ranks), ranks))
    assert over_ranks(world, loss) == pytest.approx(loss(), rel=1e-12)
    assert loss() == pytest.approx(both["loss"], rel=1e-6)
    assert_same(both, scored(model))


def test_mean_loss_is_a_float64_sum():
    """A float32 sum of 2^26 does not change if 1 is added."""
    table = torch.tensor([[0.0, 2.0**26], [0.0, math.log(math.e - 1)]])  # id -> logits: losses of 2^26 and 1
    model = torch.nn.Module()
    model.forward = lambda x, y, **more: cross_entropy(table[x].flatten(0, 1), y.flatten(), reduction="none")
    x, y = np.array([[0] + [1] * 50]), np.zeros((1, 51), dtype=np.int64)
    for batches in ([(x, y)], [(x[:, n : n + 1], y[:, n : n + 1]) for n in range(51)]):
        assert mean_loss(model, batches, torch.from_numpy) * 51 == pytest.approx(2**26 + 50, abs=1e-3)


@pytest.mark.parametrize("score", [mean_loss, token_statistics])
def test_scoring_does_not_disturb_training(score):
    """Dropout is off meanwhile, also if the device fails; no random number is drawn and no graph is kept."""
    model, graphs, state = random_model(dropout=0.5).train(), [], torch.get_rng_state()
    expected = mean_loss(random_model(), eval_batches(IDS, T, 4), torch.from_numpy)
    torch.set_rng_state(state)
    model.transformer.ln_f.register_forward_hook(lambda module, args, x: graphs.append(x.requires_grad))
    found = score(model, eval_batches(IDS, T, 4), torch.from_numpy)
    loss = found if score is mean_loss else compute_metrics(found, COUNTS)["loss"]
    assert loss == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ZeroDivisionError):
        score(model, eval_batches(IDS, T, 4), lambda array: 1 / 0)
    assert (model.training, torch.is_grad_enabled(), set(graphs)) == (True, True, {False})
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# figures


def sums(losses: list[float]) -> dict[str, np.ndarray]:
    """Of 8 tokens at the first of 16 positions: the targets are 0 and, twice, 1; 0 is the most likely each time."""
    by_position = np.array([*losses, *[0.0] * 8])
    by_id = {"targets": [6, 2], "predicted": [8, 0], "correct": [6, 0], "in_top5": [4, 0]}
    bins = {"bin_correct": [0, 6, 0], "bin_confidence": [0, 4.0, 0]}
    counted = {name: np.array(values) for name, values in (by_id | bins).items()}
    return counted | {"position_tokens": np.repeat([1, 0], 8), "position_loss": by_position}


def test_figures_by_hand():
    """Two bits a token: 16 bits over 20 bytes and 4 words."""
    found = compute_metrics(sums([2 * math.log(2)] * 8), COUNTS)
    positions = found.pop("loss_by_position")
    assert [tuple(bucket.values())[:3] for bucket in positions] == [(n, n + 1, 2 * (n < 8)) for n in range(0, 16, 2)]
    assert [bucket["loss"] for bucket in positions] == [pytest.approx(2 * math.log(2))] * 4 + [None] * 4
    shares = {"accuracy": 0.75, "recall": 0.75, "top5_accuracy": 0.5, "calibration_error": 0.25}
    shares |= {"precision": 0.75 * 0.75, "f1": 0.75 * 2 * 6 / (8 + 6)}
    means = {"loss": 2 * math.log(2), "perplexity": 4, "word_perplexity": 2**4, "bits_per_byte": 16 / 20}
    assert found == pytest.approx(COUNTS | {"tokens": 8} | shares | means)
    found = compute_metrics(sums([800.0] * 8), dict.fromkeys(COUNTS, 0))
    assert (found["perplexity"], found["word_perplexity"], found["bits_per_byte"]) == (math.inf, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# bytes, words and lines

# Letters of one to four bytes; all white space that split() knows; characters that only look like it.
LETTERS = "aé東🎈\u200b\ufeff\x00\ufffd"
SPACES = "".join(char for char in map(chr, range(0x3001)) if char.isspace())
TEXTS = st.text(st.sampled_from(LETTERS) | st.sampled_from(SPACES) | st.sampled_from(" \n"), max_size=20)
BYTES, SMALL = tokenizer.load("byte"), st.integers(1, 9)  # ids decoded at once


def count(encoding, ids: list[int], chunk: int) -> tuple[int, int, int]:
    with mock.patch.object(metrics, "CHUNK_TOKENS", chunk):
        return tuple(count_text(np.array([*ids, 97], dtype=np.uint16), len(ids), encoding).values())


@given(TEXTS, SMALL)
@example("".join(f"{space}{letter}" for space in SPACES for letter in LETTERS), 5)
def test_words_are_those_of_split(text, chunk):
    """Chunks cut words and characters, and tokens of gpt2 hold parts of characters."""
    gpt2 = tokenizer.load("gpt2")
    for encoding, ids in ((BYTES, list(text.encode())), (gpt2, gpt2.encode_ordinary(text))):
        assert count(encoding, ids, chunk) == (len(text.encode()), len(text.split()), text.count("\n"))


@given(st.lists(st.integers(0, 255) | st.sampled_from([*"東🎈 \n".encode(), 256, 257, 300, 65535]), max_size=30), SMALL)
def test_special_tokens_end_words_and_have_no_bytes(ids, chunk):
    """Also ids beyond the tokenizer's, and within a character; broken characters count as letters."""
    texts = [[]]
    for each in ids:
        texts.append([]) if each > 255 else texts[-1].append(each)
    decoded = [bytes(part).decode("utf-8", "replace") for part in texts]
    words, lines = sum(len(text.split()) for text in decoded), sum(text.count("\n") for text in decoded)
    assert count(BYTES, ids, chunk) == (sum(map(len, texts)), words, lines)


def test_wikitext_has_the_numbers_of_the_literature(tmp_path, real_text, gpt2_vocabulary, monkeypatch):
    """Of its 4,358 lines the rows that Hugging Face has keep 2,891 ends: empty ones have none."""
    from pyarrow.parquet import read_table

    column = read_table(real_text / "wikitext103" / "test-00000-of-00001.parquet")["text"]
    encoding = tokenizer.load("gpt2")
    ids = np.array(encoding.encode_ordinary("".join(column.to_pylist())), np.uint16)
    monkeypatch.setattr(metrics, "CHUNK_TOKENS", 10_000)
    split = tokens(tmp_path, *np.array_split(ids, 3))
    assert len(split) == 283_287
    assert count_text(split, len(split), encoding) == {"bytes": 1_287_656, "words": 241_211, "lines": 2891}
