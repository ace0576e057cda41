"""sampling.py against a slow loop without a cache, softmax by hand, and Python's own UTF-8 decoder."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenizer
from config import ModelConfig
from model import GPT
from sampling import filter_top_k, generate, stream_text

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=30, tie_weights=False)


def lively(**changes) -> GPT:
    """A model with matrices so large that greedy text does not repeat one token."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.5)
    return model.eval()


def constant(logits: list[float], **changes) -> GPT:
    """A model with these logits, whatever it reads."""
    sizes = {"vocab_size": len(logits), "n_layer": 1, "head_bias": True, "context_length": 64}
    model = GPT(dataclasses.replace(CONFIG, **{**sizes, **changes}))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias[: len(logits)] = torch.tensor(logits)
    return model.eval()


@torch.no_grad()
def slow_greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The likeliest token, again and again, all computed anew; of a window that is too long the newer half stays."""
    context = model.config.context_length
    ids, window = list(prompt), list(prompt[-context:])
    for _ in range(count):
        if len(window) > context:
            window = ids[-max(1, context // 2) :]
        token = model(torch.tensor([window]))[0, -1].argmax().item()
        ids.append(token)
        window.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("context", [1, 2, 7, 8])
def test_greedy_equals_a_loop_without_a_cache(context, position):
    """Prompts of one id, of a full context, and longer; 20 new tokens slide the window several times."""
    model = lively(context_length=context, position=position)
    seen = set()
    for length in range(1, context + 4):
        prompt = [(7 * i + length) % 30 for i in range(length)]
        expected = slow_greedy(model, prompt, 20)
        assert list(generate(model, prompt, 20, temperature=0)) == expected, length
        seen |= set(expected)
    assert len(seen) > 3


def test_seed_decides_the_text():
    model = lively()
    texts = [tuple(generate(model, [1], 30, seed=seed)) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_prompt_must_not_be_empty():
    with pytest.raises(AssertionError):
        next(generate(lively(), [], 1))


# ---------------------------------------------------------------------------------------------------------------------
# which token


@pytest.mark.parametrize("k", [1, 3, 29, 30, 99])
def test_top_k_keeps_exactly_the_likeliest(k):
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    kept = filter_top_k(logits, k)
    for row, kept_row in zip(logits.tolist(), kept.tolist(), strict=True):
        best = sorted(range(30), key=lambda i: -row[i])[:k]
        assert kept_row == [row[i] if i in best else -np.inf for i in range(30)]


LOGITS = [1.0, -0.5, 0.3, 2.0, 0.0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "allowed"),
    [(1.0, None, (0, 1, 2, 3, 4)), (0.5, None, (0, 1, 2, 3, 4)), (2.0, None, (0, 1, 2, 3, 4)), (1.5, 3, (0, 2, 3))],
)
def test_frequencies_follow_softmax_of_logits_over_temperature(temperature, top_k, allowed):
    """Pearson's chi-squared: with 4 degrees of freedom, above 23.5 by chance once in ten thousand."""
    n = 3000
    drawn = list(generate(constant(LOGITS), [0], n, temperature=temperature, top_k=top_k, seed=1))
    weights = np.array([np.exp(LOGITS[i] / temperature) if i in allowed else 0.0 for i in range(5)])
    expected = n * weights / weights.sum()
    counts = np.bincount(drawn, minlength=5)
    assert not counts[expected == 0].any()
    chi_squared = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e)
    assert chi_squared < 23.5, (counts, expected)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_k": 50, "temperature": 5.0}])
def test_ids_beyond_the_tokenizer_are_never_drawn(options):
    """The model's vocabulary may be larger (50,304); with top_k, the extra ids take no place among the k."""
    model = constant([0.0, 1.0, 1.5, 0.5, 20.0, 30.0])
    drawn = set(generate(model, [0], 200, n_vocab=4, **options))
    assert max(drawn) < 4
    if options.get("top_k") == 2:
        assert drawn == {1, 2}


def test_stop_ids_end_the_text_unseen():
    model = lively()
    text = list(generate(model, [3], 30, temperature=0))
    stop = text[10]
    stopped = list(generate(model, [3], 30, temperature=0, stop_ids=(99, stop)))
    assert stopped == text[: text.index(stop)]


# ---------------------------------------------------------------------------------------------------------------------
# what it leaves as it was


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_left_alone(training):
    """Dropout is off while it writes, on again after; also when nobody reads to the end, and between two tokens
    gradients flow as before."""
    model = lively(dropout=0.5)
    expected = slow_greedy(model, [1, 2], 20)
    model.train(training)
    state = torch.get_rng_state()
    assert list(generate(model, [1, 2], 20, temperature=0)) == expected
    assert model.training is training
    ids = generate(model, [1, 2], 20)
    next(ids)
    assert not torch.is_inference_mode_enabled()
    ids.close()
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_bfloat16(position):
    """Every token is, for a float32 model without a cache, as good as the best."""
    model = lively(position=position)
    with torch.autocast("cpu", torch.bfloat16):
        ids = [1, 2, 3, *generate(model, [1, 2, 3], 5, temperature=0)]
        assert len(list(generate(model, [1, 2, 3], 30))) == 30  # beyond a full context
    with torch.no_grad():
        for end in range(3, 8):
            logits = model(torch.tensor([ids[:end]]))[0, -1]
            assert logits[ids[end]] > logits.max() - 0.05 * (logits.max() - logits.min())


# ---------------------------------------------------------------------------------------------------------------------
# text

BYTE = tokenizer.load("byte")


def check_stream(text: str, encoding) -> list[str]:
    """Pieces of text as its ids come; each is whole, and all that is known by then."""
    fed, said, pieces = b"", "", []

    def feed():
        nonlocal fed
        for i in encoding.encode_ordinary(text):
            fed += encoding.decode_single_token_bytes(i)
            yield i

    for piece in stream_text(feed(), encoding):
        said += piece
        pieces.append(piece)
        assert text.startswith(said)
        assert len(said.encode()) > len(fed) - 4  # at most a character's first bytes wait
    assert said == text
    return pieces


TEXT = "Naïve café, 東京 and 中文 🎈👩‍🚀!"


def test_characters_come_whole_and_at_once():
    assert check_stream(TEXT, BYTE) == list(TEXT)  # a byte is a token, so a piece is a character


def test_characters_cut_over_gpt2_tokens(gpt2_vocabulary):
    encoding = tokenizer.load("gpt2")
    assert len(encoding.encode_ordinary("🎈")) > 1
    check_stream(TEXT, encoding)


@given(st.binary(max_size=12) | st.lists(st.sampled_from([*"a東🎈".encode(), 0xFF, 0xC0, 0xED])).map(bytes))
def test_bytes_that_are_no_text_become_replacement_characters(data):
    """As tiktoken's own decode has them."""
    assert "".join(stream_text(iter(data), BYTE)) == data.decode("utf-8", "replace") == BYTE.decode(list(data))
