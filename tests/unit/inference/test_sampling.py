"""sampling.py against transformers' logits processors, and against slow loops without a cache."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from random_models import generate, random_model

from config import SamplingConfig, UserError
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack
from flatgpt.inference.sampling import NOISE_ROWS, TOP_P_CANDIDATES, generate_batch, process_logits, top_token_logprobs
from model import GPT

GREEDY = SamplingConfig(temperature=0)
FREE = SamplingConfig(temperature=1.0, seed=5)
ALL = SamplingConfig(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=6)
# Several rows of one prompt; windows that slide at different steps, two at the first; a prompt longer than the context,
# and another with the same end.
PROMPTS = [[1], [2, 3, 4], [2, 3, 4], [5] * 8, list(range(12)), [1], [29, 28, *range(4, 12)], [7, 8, 9, 10, 11, 12]]
POSITIONS = pytest.mark.parametrize("position", ["learned", "rope"])


def varied_model(**changes) -> GPT:
    """A model whose greedy text does not repeat one token; a context of 8, 30 ids."""
    return random_model(std=0.6, **{"n_layer": 2, "vocab_size": 30, "tie_weights": False, "bias": False, **changes})


def constant(logits: list[float]) -> GPT:
    """A model with these logits, whatever it reads."""
    model = random_model(vocab_size=len(logits), tie_weights=False, head_bias=True, context_length=64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias[: len(logits)] = torch.tensor(logits)
    return model


@torch.no_grad()
def slow_greedy(model: GPT, prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """The most likely token, again and again, without a cache; of a window that is too long the newer half stays."""
    context = model.config.context_length
    ids, window = list(prompt), list(prompt[-context:])
    for _ in range(count):
        if len(window) > context:
            window = ids[-max(1, context // 2) :]
        logits = model(torch.tensor([window]))[0, -1].double().tolist()
        for i in set(ids):
            logits[i] *= penalty if logits[i] < 0 else 1 / penalty
        ids.append(logits.index(max(logits)))
        window.append(ids[-1])
    return ids[len(prompt) :]


def together(decoder: Decoder, prompts: list[list[int]], count: int, options: SamplingConfig, **kwargs) -> list[list]:
    """The texts of a batch, in which a row that has ended gets None."""
    rows = zip(*generate_batch(decoder, prompts, count, options, **kwargs), strict=True)
    return [[token for token in row if token is not None] for row in rows]


@pytest.fixture(params=["trained", "prepacked", "compiled"])
def prepare(request, monkeypatch):
    """A function from model to decoder; the compiled decoder works as with a compiler, but without one."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Decoder, "LENGTH_MULTIPLE", 3)
    if request.param == "prepacked":
        return lambda model: Decoder(prepack(model, torch.float32))
    return lambda model: Decoder(model, compile=request.param == "compiled")


# ---------------------------------------------------------------------------------------------------------------------
# texts


@POSITIONS
@pytest.mark.parametrize("context", [1, 2, 8])
def test_greedy_batch_equals_a_loop_without_a_cache(context, position, prepare):
    """20 new tokens slide the window several times; the penalty counts what the window has left behind."""
    model = varied_model(context_length=context, position=position)
    decoder = prepare(varied_model(context_length=context, position=position))
    for prompts, penalty in ((PROMPTS, 1.0), ([[4, 4], [9]], 1.7)):
        expected = [slow_greedy(model, ids, 20, penalty) for ids in prompts]
        assert together(decoder, prompts, 20, dataclasses.replace(GREEDY, repetition_penalty=penalty)) == expected
        assert len(set(itertools.chain(*expected))) > 3


@pytest.mark.parametrize("options", [GREEDY, FREE, ALL], ids=["greedy", "free", "all"])
def test_batch_equals_one_by_one_with_rows_that_end_at_different_steps(options, prepare):
    """Each row ends before one of its stop ids; the others continue as if nothing had happened."""
    decoder = prepare(varied_model())
    free = [generate(decoder, ids, 25, options, first_row=row) for row, ids in enumerate(PROMPTS, 3)]
    assert all(len(text) == 25 for text in free)
    assert together(decoder, PROMPTS, 25, options, first_row=3) == free
    stop_ids = (free[1][4], free[4][9], 99)
    ends = [min([text.index(i) for i in stop_ids if i in text], default=25) for text in free]
    assert len(set(ends)) > 2
    expected = [text[:end] for text, end in zip(free, ends, strict=True)]
    assert together(decoder, PROMPTS, 25, options, first_row=3, stop_ids=stop_ids) == expected
    assert together(decoder, PROMPTS[:1] * 2, 25, GREEDY, stop_ids=range(30)) == []


@pytest.mark.parametrize("shared", [1, 5, 32])
def test_samples_follow_the_seed_and_the_number_of_their_row(shared, monkeypatch):
    """Also if rows share a generator, as on CUDA, in one block or in several."""
    monkeypatch.setitem(NOISE_ROWS, "cpu", shared)
    decoder = Decoder(varied_model())
    texts = together(decoder, [[1]] * 12, 10, FREE)
    assert len(set(map(tuple, texts))) == 12
    assert together(decoder, [[1]] * 5, 10, FREE, first_row=4) == texts[4:9]
    for seed in (1, 2**63 - 1):
        assert together(decoder, [[1]] * 12, 10, dataclasses.replace(FREE, seed=seed)) != texts


@pytest.mark.gpu
def test_samples_on_a_gpu_follow_the_number_of_their_row():
    decoder = Decoder(varied_model().cuda())
    texts = together(decoder, [[1]] * 40, 10, FREE)
    assert len(set(map(tuple, texts))) > 35
    assert together(decoder, [[1]] * 5, 10, FREE, first_row=30) == texts[30:35]


def test_ids_beyond_the_tokenizer_are_never_sampled():
    """A model's vocabulary can be larger (50,304); the extra ids take no place among the k of top_k."""
    decoder = Decoder(constant([0.0, 1.0, 1.5, 0.5, 20.0, 30.0]))
    for options, allowed in (
        (GREEDY, {2}),
        (FREE, {0, 1, 2, 3}),
        (SamplingConfig(top_k=2, repetition_penalty=1.1), {1, 2}),
    ):
        assert set(generate(decoder, [0, 5], 100, options, n_vocab=4)) == allowed


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_stay(training):
    """Dropout is off while it writes and on again afterwards; also when nobody reads to the end."""
    model = varied_model(dropout=0.5)
    decoder = Decoder(model)
    expected = generate(decoder, [1, 2], 20, ALL)
    model.train(training)
    state = torch.get_rng_state()
    assert generate(decoder, [1, 2], 20, ALL) == expected
    assert model.transformer.drop.training is training
    steps = generate_batch(decoder, [[1, 2]], 20, ALL)
    next(steps)
    steps.close()
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# one token

PROCESSORS = {
    "repetition_penalty": (1.9, transformers.RepetitionPenaltyLogitsProcessor),
    "temperature": (1.6, transformers.TemperatureLogitsWarper),
    "top_k": (20, transformers.TopKLogitsWarper),
    "top_p": (0.93, transformers.TopPLogitsWarper),
    "min_p": (0.06, transformers.MinPLogitsWarper),
}


@pytest.mark.parametrize("vocab_size", [30, 3 * TOP_P_CANDIDATES])
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("names", [*([name] for name in PROCESSORS), [*PROCESSORS]], ids=" ".join)
def test_settings_as_transformers_processors(names, scale, vocab_size):
    """Each setting alone, and all together. TOP_P_CANDIDATES ids reach top_p for steep logits, not for flat ones."""
    logits = scale * torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2], [3, 4], [5, 5], [0, 29]])
    seen = torch.zeros(4, vocab_size, dtype=torch.bool).scatter_(1, ids, True)
    options = SamplingConfig(**{"temperature": 1.0, **{name: PROCESSORS[name][0] for name in names}})
    reference = transformers.LogitsProcessorList(PROCESSORS[name][1](PROCESSORS[name][0]) for name in names)
    assert torch.equal(process_logits(logits, seen, options), reference(ids, logits))


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e-320, 1e-46, 1e-39, 1e-30, 1e-8, 1e30, 1e39, 1e300])
def test_extreme_settings_give_the_probabilities_of_float64(name, value):
    """Greedy or uniform in the limit. The numbers exceed float32's range, in which logits are divided."""
    if name in ("top_p", "min_p") and value > 1:
        pytest.skip("a probability")
    logits = torch.tensor([[2.0, 1.5, -3.0, 0.0, -0.25], [-1.0, -2.0, -30.0, -4.0, -4.5]])
    seen = torch.tensor([[False, True, True, True, False], [True, True, False, False, True]])
    options = SamplingConfig(**{"temperature": 1.0, name: value})
    found = process_logits(logits, seen, options).softmax(-1)
    p, expected = options.repetition_penalty, logits.double().numpy()
    with np.errstate(over="ignore"):  # 1 / 1e-320 is infinite
        expected = np.where(seen, np.where(expected > 0, expected / p, expected * p), expected)
        expected = np.minimum(expected, 1e308)
        expected = np.exp((expected - expected.max(-1, keepdims=True)) / options.temperature)
    expected[expected < (1 if name == "top_p" else options.min_p)] = 0
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [GREEDY, FREE, ALL], ids=["greedy", "free", "all"])
def test_logits_that_are_not_finite_choose_no_token(options, bad, prepare):
    """A position's embedding is damaged: texts end before it with an error, and those that have ended do not count."""
    model = varied_model()
    model.transformer.wpe.weight.data[6, 0] = bad
    decoder, steps = prepare(model), []
    with pytest.raises(UserError, match=r"^the model: its logits are NaN or infinite: the weights are damaged"):
        steps.extend(generate_batch(decoder, PROMPTS[:3], 9, options))
    assert len(steps) == 4, "the third token after three"
    assert model.training is False
    last = steps[3]
    assert len(together(decoder, PROMPTS[:1], 6, options)[0]) == 6
    with pytest.raises(UserError):
        together(decoder, PROMPTS[:3], 9, options, stop_ids=[last[0]])


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}], ids=str)
def test_equally_likely_tokens_stay_together(settings):
    """Probability 0.52, twice 0.19 and less: top_k and top_p ask for two tokens, and all three stay."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = process_logits(logits, logits > 9, SamplingConfig(temperature=1.0, **settings))
    assert kept.tolist() == [[-math.inf, 3.0, 2.0, 2.0, -math.inf]]


def test_top_token_logprobs_are_the_models():
    """The sampled id first, however unlikely; then the most likely ones by softmax of the plain logits."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    found = top_token_logprobs(logits, torch.tensor([4, 19, 0]), 5)
    for row, pairs, token in zip(logits.double().numpy(), found, [4, 19, 0], strict=True):
        log_p = row - np.log(np.exp(row).sum())
        ids = [token, *np.argsort(-row, kind="stable")[:5].tolist()]
        assert pairs[0][0] == token
        assert [value for _, value in pairs] == pytest.approx(log_p[ids].tolist(), rel=1e-5)
    lengths = {k: [*map(len, top_token_logprobs(logits[:, :3], torch.zeros(3, dtype=torch.int64), k))] for k in (0, 5)}
    assert lengths == {0: [1, 1, 1], 5: [4, 4, 4]}


LOGITS = [1.0, -0.5, 0.3, 2.0, 0.0]


def chi_squared(sampled: list[int], weights: list[float]) -> float:
    """Pearson's statistic."""
    counts = np.bincount(sampled, minlength=len(weights))
    expected = len(sampled) * np.array(weights) / sum(weights)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [None, 0.5, 2.0])
def test_frequencies_follow_softmax_of_logits_over_temperature(temperature):
    """The default temperature is 0.8. Successive tokens of a row, and those of two rows, are independent."""
    texts = together(Decoder(constant(LOGITS)), [[0]] * 40, 50, SamplingConfig(temperature=temperature, seed=1))
    weights = [math.exp(x / (temperature or 0.8)) for x in LOGITS]
    assert chi_squared([*itertools.chain(*texts)], weights) < 23.5  # 4 degrees of freedom: once in ten thousand
    rows = [zip(one, two, strict=True) for one, two in zip(texts[::2], texts[1::2], strict=True)]
    steps = [zip(text[::2], text[1::2], strict=True) for text in texts]
    for pairs in (rows, steps):
        sampled = [5 * a + b for pair in pairs for a, b in pair]
        assert chi_squared(sampled, [a * b for a in weights for b in weights]) < 62.5  # 24 degrees: once in 30,000
