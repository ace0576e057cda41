"""sampling.py against slow loops without a cache and softmax by hand; parity/ has transformers' processors."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_model

from config import SamplingConfig
from flatgpt.inference import sampling
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack
from flatgpt.inference.sampling import (
    NUCLEUS,
    Sampler,
    generate,
    generate_batch,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_seen,
    top_token_probs,
)
from model import GPT

CPU = torch.device("cpu")
GREEDY = SamplingConfig(temperature=0)
FREE = SamplingConfig(temperature=1.0, seed=5)
OPTIONS = {
    "greedy": GREEDY,
    "greedy, penalty": dataclasses.replace(GREEDY, repetition_penalty=1.7),
    "free": FREE,
    "top_k": dataclasses.replace(FREE, top_k=5),
    "all": SamplingConfig(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=6),
}
# Several rows of one prompt; windows that slide at different steps, two at the first; a prompt longer than the context,
# and another with the same end.
PROMPTS = [[1], [2, 3, 4], [2, 3, 4], [5] * 8, list(range(12)), [1], [29, 28, *range(4, 12)], [7, 8, 9, 10, 11, 12]]
POSITIONS = pytest.mark.parametrize("position", ["learned", "rope"])


def varied_model(**changes) -> GPT:
    """A model whose greedy text does not repeat one token; a context of 8, 30 ids."""
    shape = {"n_layer": 2, "vocab_size": 30, "tie_weights": False, "bias": False, **changes}
    return random_model(std=0.6, **shape)


def constant(logits: list[float]) -> GPT:
    """A model with these logits, whatever it reads."""
    model = random_model(vocab_size=len(logits), tie_weights=False, head_bias=True, context_length=64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias[: len(logits)] = torch.tensor(logits)
    return model


def penalized(logits: torch.Tensor, seen: set[int], penalty: float) -> list[float]:
    """What penalize_seen does to a row, id by id."""
    return [
        x if i not in seen else x / penalty if x > 0 else x * penalty for i, x in enumerate(logits.double().tolist())
    ]


@torch.no_grad()
def slow_greedy(model: GPT, prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """The most likely token, again and again, without a cache; of a window that is too long the newer half stays."""
    context = model.config.context_length
    ids, window = list(prompt), list(prompt[-context:])
    for _ in range(count):
        if len(window) > context:
            window = ids[-max(1, context // 2) :]
        logits = penalized(model(torch.tensor([window]))[0, -1], set(ids), penalty)
        token = logits.index(max(logits))
        ids.append(token)
        window.append(token)
    return ids[len(prompt) :]


def together(decoder: Decoder, prompts: list[list[int]], count: int, options: SamplingConfig, **kwargs) -> list[list]:
    """The texts of a batch. A row that has ended gets None from then on, and the last step has a live row."""
    steps = list(generate_batch(decoder, prompts, count, options, **kwargs))
    assert all(any(token is not None for token in step) for step in steps)
    texts = []
    for row in range(len(prompts)):
        ids = [step[row] for step in steps]
        end = ids.index(None) if None in ids else len(ids)
        assert ids[end:] == [None] * (len(ids) - end)
        texts.append(ids[:end])
    return texts


def one_by_one(decoder: Decoder, prompts: list[list[int]], count: int, options: SamplingConfig, **kwargs) -> list[list]:
    first = kwargs.pop("first_row", 0)
    return [
        list(generate(decoder, ids, count, options, first_row=row, **kwargs)) for row, ids in enumerate(prompts, first)
    ]


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
@pytest.mark.parametrize("context", [1, 2, 7, 8])
def test_greedy_equals_a_loop_without_a_cache(context, position, prepare):
    """Prompts of one id, of a full context, and longer; 20 new tokens slide the window several times."""
    model = varied_model(context_length=context, position=position)
    decoder = prepare(varied_model(context_length=context, position=position))
    seen = set()
    for length in range(1, context + 4):
        prompt = [(7 * i + length) % 30 for i in range(length)]
        expected = slow_greedy(model, prompt, 20)
        assert list(generate(decoder, prompt, 20, GREEDY)) == expected, length
        seen |= set(expected)
    assert len(seen) > 3


@POSITIONS
def test_greedy_batch_equals_a_loop_without_a_cache(position, prepare):
    """With a penalty too, which counts what the window has left behind; batches leave nothing to the next one."""
    model, decoder = varied_model(position=position), prepare(varied_model(position=position))
    for prompts in (PROMPTS, [[4, 4], [9]], PROMPTS[::-1]):
        before = [list(ids) for ids in prompts]
        for name, penalty in (("greedy", 1), ("greedy, penalty", 1.7)):
            expected = [slow_greedy(model, ids, 20, penalty) for ids in prompts]
            assert together(decoder, prompts, 20, OPTIONS[name]) == expected
        assert prompts == before


@pytest.mark.parametrize("name", OPTIONS)
def test_batch_equals_one_by_one_with_rows_that_end_at_different_steps(name, prepare):
    """Each row ends before one of its stop ids; the others continue as if nothing had happened."""
    decoder = prepare(varied_model())
    free = one_by_one(decoder, PROMPTS, 25, OPTIONS[name], first_row=3)
    assert all(len(text) == 25 for text in free)
    assert together(decoder, PROMPTS, 25, OPTIONS[name], first_row=3) == free

    def ends(stop_ids: tuple[int, ...]) -> list[int]:
        return [min([text.index(i) for i in stop_ids if i in text], default=25) for text in free]

    stop_ids = (99, *max(itertools.combinations(range(30), 2), key=lambda pair: len(set(ends(pair)))))
    assert len(set(ends(stop_ids))) > 2
    expected = [text[:end] for text, end in zip(free, ends(stop_ids), strict=True)]
    for write in (one_by_one, together):
        assert write(decoder, PROMPTS, 25, OPTIONS[name], first_row=3, stop_ids=stop_ids) == expected


@settings(max_examples=25, derandomize=True)  # rounding is another in a batch: once in very long, a token too
@given(data=st.data(), position=st.sampled_from(["learned", "rope"]), context=st.integers(1, 10))
def test_any_batch_equals_one_by_one(data, position, context):
    prompts = data.draw(st.lists(st.lists(st.integers(0, 24), min_size=1, max_size=14), min_size=1, max_size=5))
    options = SamplingConfig(
        temperature=data.draw(st.sampled_from([0, 0.7, 1.5])),
        top_k=data.draw(st.sampled_from([0, 3, 100])),
        top_p=data.draw(st.sampled_from([1.0, 0.5])),
        min_p=data.draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 0.8, 1.4])),
        seed=data.draw(st.integers(0, 2**63 - 1)),
    )
    kwargs = {"n_vocab": 25, "first_row": data.draw(st.integers(0, 9))}
    kwargs["stop_ids"] = data.draw(st.sets(st.integers(0, 5)))
    count = data.draw(st.integers(0, 20))
    decoder = Decoder(varied_model(position=position, context_length=context))
    assert together(decoder, prompts, count, options, **kwargs) == one_by_one(
        decoder, prompts, count, options, **kwargs
    )


def test_nothing_is_computed_after_the_last_row_has_ended(monkeypatch):
    decoder, steps = Decoder(varied_model()), []
    step = decoder.decode_step
    monkeypatch.setattr(decoder, "decode_step", lambda tokens: steps.append(1) or step(tokens))
    text = list(generate(decoder, [3], 30, GREEDY))
    assert len(steps) <= 29
    steps.clear()
    end = next(n for n in range(3, 30) if text[n] not in text[:n])
    assert list(generate_batch(decoder, [[3], [3]], 30, GREEDY, stop_ids=[text[end]])) == [[i, i] for i in text[:end]]
    assert len(steps) <= end
    assert list(generate_batch(decoder, [[3], [3]], 30, GREEDY, stop_ids=[text[0]])) == []
    assert list(generate_batch(decoder, [[3], [3]], 0, GREEDY)) == []


@pytest.mark.parametrize("name", ["greedy", "all"])
def test_a_device_that_computes_ahead_of_the_host_writes_the_same(name, monkeypatch):
    """On CUDA the next step begins before the ids are read; here on a CPU that claims to be CUDA."""

    class Ahead:
        device = SimpleNamespace(type="cuda")

        def __getattr__(self, name: str):
            return getattr(decoder, name)

    decoder = Decoder(varied_model())
    free = together(decoder, PROMPTS, 25, OPTIONS[name])
    stop_ids = (free[1][3], free[4][9])
    expected = [together(decoder, PROMPTS, count, OPTIONS[name], stop_ids=stop_ids) for count in (1, 2, 25)]
    monkeypatch.setattr(sampling, "Sampler", lambda *args: Sampler(*args[:-1], CPU))
    found = [together(Ahead(), PROMPTS, count, OPTIONS[name], stop_ids=stop_ids) for count in (1, 2, 25)]
    assert found == expected


def test_samples_follow_the_seed_and_the_number_of_their_row():
    decoder = Decoder(varied_model())
    texts = together(decoder, [[1]] * 12, 10, FREE)
    assert len(set(map(tuple, texts))) == 12
    assert together(decoder, [[1]] * 12, 10, FREE) == texts
    assert together(decoder, [[1]] * 5, 10, FREE, first_row=4) == texts[4:9]
    for seed in (1, 2**63 - 1):
        assert together(decoder, [[1]] * 12, 10, dataclasses.replace(FREE, seed=seed)) != texts


@pytest.mark.parametrize("prompts", [[[]], [[1], []]])
def test_prompt_must_not_be_empty(prompts):
    with pytest.raises(AssertionError):
        next(generate_batch(Decoder(varied_model()), prompts, 1, FREE))


@pytest.mark.parametrize("context", [8, 5003])
def test_prompt_of_5000_ids(context):
    """Far longer than the context, and almost filling one."""
    model = varied_model(n_layer=1, context_length=context, position="rope")
    prompt = [(i * i) % 30 for i in range(5000)]
    expected = slow_greedy(model, prompt, 6, 1.7)
    found = together(Decoder(model), [prompt, [3], prompt], 6, OPTIONS["greedy, penalty"])
    assert found == [expected, slow_greedy(model, [3], 6, 1.7), expected]


def test_on_sample_gets_the_logits_that_each_token_is_sampled_from():
    """As a pass without a cache computes them, of the ids below n_vocab; and the ids that are yielded."""
    model, seen = random_model(std=0.1, vocab_size=30), []
    prompts, options = [[3, 1], [4]], dataclasses.replace(FREE, top_k=3, repetition_penalty=2.0)
    on_sample = lambda logits, ids: seen.append((logits, ids))  # noqa: E731
    steps = list(generate_batch(Decoder(model), prompts, 4, options, n_vocab=25, on_sample=on_sample))
    assert [ids.tolist() for _, ids in seen] == steps
    texts = [list(ids) for ids in prompts]
    for logits, ids in seen:
        expected = torch.stack([model(torch.tensor([text]))[0, -1, :25] for text in texts])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["greedy", "all"])
def test_mode_and_random_state_stay(training, name, monkeypatch):
    """Dropout is off while it writes and on again afterwards; also when nobody reads to the end or a step fails."""
    model = varied_model(dropout=0.5)
    decoder = Decoder(model)
    expected = together(decoder, [[1, 2], [3]], 20, OPTIONS[name])
    model.train(training)
    state = torch.get_rng_state()
    assert together(decoder, [[1, 2], [3]], 20, OPTIONS[name]) == expected
    assert model.transformer.drop.training is training
    ids = generate(decoder, [1, 2], 20, OPTIONS[name])
    next(ids)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    ids = generate_batch(decoder, [[1, 2]], 20, OPTIONS[name])
    next(ids)
    ids.close()
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(decoder, "decode_step", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(generate(decoder, [1, 2], 20, FREE))
    assert model.training is training
    assert not torch.is_inference_mode_enabled()


def test_model_can_be_trained_after_it_has_written():
    """Tensors made in inference mode cannot be part of a loss."""
    model = varied_model().train()
    before = list(generate(Decoder(model), [1], 20, GREEDY))
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
    after = list(generate(Decoder(model), [1], 20, GREEDY))
    assert after == slow_greedy(model, [1], 20) != before


@POSITIONS
def test_bfloat16(position):
    """Every token is, for a float32 model without a cache, nearly as good as the best."""
    model = varied_model(position=position)
    decoder, texts = Decoder(model), [[1, 2, 3], [4]]
    with torch.autocast("cpu", torch.bfloat16):
        texts = [ids + new for ids, new in zip(texts, together(decoder, texts, 5, GREEDY), strict=True)]
        assert [len(text) for text in together(decoder, [[1, 2, 3], [4]], 30, FREE)] == [30, 30]  # beyond the context
    for ids in texts:
        for end in range(len(ids) - 5, len(ids)):
            logits = model(torch.tensor([ids[:end]]))[0, -1]
            assert logits[ids[end]] > logits.max() - 0.05 * (logits.max() - logits.min())


# ---------------------------------------------------------------------------------------------------------------------
# one token


def softmax(row: torch.Tensor) -> list[float]:
    weights = [math.exp(x) for x in (row - row.max()).double().tolist()]
    total = math.fsum(weights)
    return [w / total for w in weights]


def slow_top_p(row: torch.Tensor, top_p: float) -> set[int]:
    """The most likely ids, one after the other, until they reach top_p."""
    p, kept, mass = softmax(row), set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        kept.add(i)
        mass += p[i]
    return kept


def slow_min_p(row: torch.Tensor, min_p: float) -> set[int]:
    p = softmax(row)
    largest = max(p)
    return {i for i, x in enumerate(p) if x >= min_p * largest}


def assert_kept(logits: torch.Tensor, kept: torch.Tensor, expected: list[set[int]]) -> None:
    """The expected ids have the logits they had, the others minus infinity."""
    for row, kept_row, ids in zip(logits, kept, expected, strict=True):
        stay = torch.zeros(len(row), dtype=torch.bool)
        stay[list(ids)] = True
        assert torch.equal(kept_row, row.masked_fill(~stay, -math.inf))


def random_logits(vocab_size: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 3, 29, 30, 99])
def test_top_k_keeps_exactly_the_most_likely(k):
    logits = random_logits(30)
    expected = [set(sorted(range(30), key=row.__getitem__)[-k:]) for row in logits.tolist()]
    assert_kept(logits, keep_top_k(logits, k), expected)


@pytest.mark.parametrize("vocab_size", [30, NUCLEUS, 3 * NUCLEUS])
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
@pytest.mark.parametrize(
    ("keep", "slow", "values"),
    [(keep_top_p, slow_top_p, (1e-9, 0.2, 0.9, 0.999)), (keep_min_p, slow_min_p, (1e-6, 0.05, 0.5, 1.0))],
    ids=["top_p", "min_p"],
)
def test_top_p_and_min_p_keep_exactly_the_most_likely(keep, slow, values, scale, vocab_size):
    """Flat logits, whose mass the top NUCLEUS ids do not hold, and steep ones."""
    logits = random_logits(vocab_size, scale)
    for value in values:
        assert_kept(logits, keep(logits, value), [slow(row, value) for row in logits])


def test_top_p_of_a_row_does_not_depend_on_the_others():
    """The mass of one row is within the top NUCLEUS ids, that of another is not."""
    logits = random_logits(3 * NUCLEUS) * torch.tensor([0.01, 5, 0.5, 1])[:, None]
    kept = keep_top_p(logits, 0.8)
    counts = kept.isfinite().sum(-1)
    assert counts.min() < NUCLEUS < counts.max()
    assert torch.equal(torch.cat([keep_top_p(row[None], 0.8) for row in logits]), kept)


@pytest.mark.parametrize("keep", [lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.6)])
def test_equally_likely_tokens_stay_together(keep):
    """Two tokens are asked for: the most likely one, of probability 0.52, and one of two of 0.19. All three stay."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert_kept(logits, keep(logits), [{1, 2, 3}])
    assert_kept(torch.zeros(1, 5), keep(torch.zeros(1, 5)), [{0, 1, 2, 3, 4}])


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_penalty_lowers_seen_ids(penalty):
    logits, ids = random_logits(30), [{1, 2}, {3, 4, 5}, {0, 29, 7}, {9}]
    seen = torch.tensor([[i in row for i in range(30)] for row in ids])
    expected = [penalized(row, those, penalty) for row, those in zip(logits, ids, strict=True)]
    torch.testing.assert_close(penalize_seen(logits, seen, penalty), torch.tensor(expected))


def test_top_token_probs_are_the_models():
    """The sampled id first, however unlikely; then the most likely ones by softmax of the plain logits."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    sampled = [4, 19, 0]
    found = top_token_probs(logits, torch.tensor(sampled), 5)
    for row, pairs, token in zip(logits.double().numpy(), found, sampled, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        ids = [token, *np.argsort(-p, kind="stable")[:5].tolist()]
        assert pairs[0][0] == token
        assert [value for _, value in pairs] == pytest.approx(p[ids].tolist(), rel=1e-5)
    assert [len(row) for row in top_token_probs(logits[:, :3], torch.zeros(3, dtype=torch.int64), 5)] == [4, 4, 4]


def test_sampler_does_not_change_its_logits():
    """On a GPU they are memory that a recorded step writes."""
    logits = random_logits(30)
    before = logits.clone()
    for options in (*OPTIONS.values(), SamplingConfig(temperature=0.5)):
        Sampler(options, [[1]] * 4, 0, 30, CPU)(logits)
    assert torch.equal(logits, before)


LOGITS = [1.0, -0.5, 0.3, 2.0, 0.0]


def chi_squared(sampled: list[int], weights: list[float]) -> float:
    """Pearson's statistic."""
    counts = np.bincount(sampled, minlength=len(weights))
    expected = len(sampled) * np.array(weights) / sum(weights)
    assert not counts[expected == 0].any()
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(
    ("temperature", "settings", "allowed"),
    [
        (None, {}, (0, 1, 2, 3, 4)),
        (0.5, {}, (0, 1, 2, 3, 4)),
        (2.0, {}, (0, 1, 2, 3, 4)),
        (1.5, {"top_k": 3}, (0, 2, 3)),
        (1.0, {"top_p": 0.7}, (0, 3)),
        (1.0, {"min_p": 0.15}, (0, 2, 3)),
    ],
)
def test_frequencies_follow_softmax_of_logits_over_temperature(temperature, settings, allowed, rows):
    """Of one text, and over the texts of a batch; the default temperature is 0.8."""
    options = SamplingConfig(temperature=temperature, seed=1, **settings)
    weights = [math.exp(x / (temperature or 0.8)) if i in allowed else 0.0 for i, x in enumerate(LOGITS)]
    texts = together(Decoder(constant(LOGITS)), [[0]] * rows, 2000 // rows, options)
    assert chi_squared([*itertools.chain(*texts)], weights) < 23.5  # 4 degrees of freedom: once in ten thousand
    assert rows == 1 or len({text[0] for text in texts}) > 1  # rows do not share their numbers


def test_rows_and_steps_are_sampled_independently():
    """Of the pairs of two rows, and of one row's successive tokens, each is as frequent as its probability."""
    texts = together(Decoder(constant(LOGITS)), [[0]] * 40, 50, FREE)
    weights = [math.exp(x) for x in LOGITS]
    rows = [zip(one, two, strict=True) for one, two in zip(texts[::2], texts[1::2], strict=True)]
    steps = [zip(text[::2], text[1::2], strict=True) for text in texts]
    for pairs in (rows, steps):
        sampled = [5 * a + b for pair in pairs for a, b in pair]
        assert chi_squared(sampled, [a * b for a in weights for b in weights]) < 62.5  # 24 degrees: once in 30,000


@pytest.mark.parametrize(
    "options", [*OPTIONS.values(), SamplingConfig(top_k=2), SamplingConfig(temperature=5.0, top_k=50)], ids=str
)
def test_ids_beyond_the_tokenizer_are_never_sampled(options):
    """A model's vocabulary can be larger (50,304); the extra ids take no place among the k of top_k."""
    model = constant([0.0, 1.0, 1.5, 0.5, 20.0, 30.0])
    sampled = {i for text in together(Decoder(model), [[0], [1, 2]], 100, options, n_vocab=4) for i in text}
    assert max(sampled) < 4
    if options.top_k == 2:
        assert sampled == {1, 2}
    assert max(map(max, together(Decoder(model), [[0], [1, 2]], 10, options))) >= 4  # they could have been


@pytest.mark.parametrize("settings", [{"greedy": True}, {"top_k": 1}, {"top_k": 1, "temperature": 9}], ids=str)
def test_greedy_is_temperature_0_is_top_k_1(settings):
    decoder = Decoder(varied_model())
    assert together(decoder, PROMPTS, 20, SamplingConfig(**settings)) == together(decoder, PROMPTS, 20, GREEDY)
