"""sampling.py against slow loops without a cache, transformers' processors, softmax by hand, and Python's own UTF-8."""

import codecs
import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import ModelConfig, SamplingConfig
from flatgpt.data import tokenizer
from flatgpt.inference import sampling
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack
from flatgpt.inference.sampling import (
    NUCLEUS,
    Sampler,
    TextStream,
    generate,
    generate_batch,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_seen,
    stream_text,
    top_token_probs,
)
from model import GPT

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=30, tie_weights=False)
CPU = torch.device("cpu")
GREEDY = SamplingConfig(temperature=0)
FREE = SamplingConfig(temperature=1.0, seed=5)
OPTIONS = {
    "greedy": GREEDY,
    "greedy, penalty": dataclasses.replace(GREEDY, repetition_penalty=1.7),
    "free": FREE,
    "top_k": dataclasses.replace(FREE, top_k=5),
    "top_p": dataclasses.replace(FREE, top_p=0.6),
    "min_p": dataclasses.replace(FREE, min_p=0.1),
    "penalty": dataclasses.replace(FREE, repetition_penalty=1.5),
    "all": SamplingConfig(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=6),
}
quick = settings(max_examples=60)


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


def penalized(logits: torch.Tensor, seen: set[int], penalty: float) -> list[float]:
    """What penalize_seen does to a row, id by id."""
    return [
        x if i not in seen else x / penalty if x > 0 else x * penalty for i, x in enumerate(logits.double().tolist())
    ]


@torch.no_grad()
def slow_greedy(model: GPT, prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """The likeliest token, again and again, all computed anew; of a window that is too long the newer half stays."""
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


def together(decoder: Decoder, prompts: list[list[int]], count: int, options: SamplingConfig, **more) -> list[list]:
    """The texts of a batch; a row that has ended says nothing any more, and the batch goes on while one writes."""
    steps = list(generate_batch(decoder, prompts, count, options, **more))
    assert all(any(token is not None for token in step) for step in steps)
    texts = []
    for row in range(len(prompts)):
        said = [step[row] for step in steps]
        end = said.index(None) if None in said else len(said)
        assert said[end:] == [None] * (len(said) - end)
        texts.append(said[:end])
    return texts


def alone(decoder: Decoder, prompts: list[list[int]], count: int, options: SamplingConfig, **more) -> list[list]:
    """The same, one after the other."""
    first = more.pop("first_row", 0)
    return [
        list(generate(decoder, ids, count, options, first_row=row, **more)) for row, ids in enumerate(prompts, first)
    ]


@pytest.fixture(params=["trained", "packed", "compiled"])
def prepare(request, monkeypatch):
    """Model -> decoder, each way there is; of the compiled one its way of computing, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Decoder, "LENGTH_MULTIPLE", 3)
    if request.param == "packed":
        return lambda model: Decoder(prepack(model, torch.float32))
    return lambda model: Decoder(model, compile=request.param == "compiled")


# ---------------------------------------------------------------------------------------------------------------------
# token after token


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("context", [1, 2, 7, 8])
def test_greedy_equals_a_loop_without_a_cache(context, position, prepare):
    """Prompts of one id, of a full context, and longer; 20 new tokens slide the window several times."""
    model = lively(context_length=context, position=position)
    decoder = prepare(lively(context_length=context, position=position))
    seen = set()
    for length in range(1, context + 4):
        prompt = [(7 * i + length) % 30 for i in range(length)]
        expected = slow_greedy(model, prompt, 20)
        assert list(generate(decoder, prompt, 20, GREEDY)) == expected, length
        seen |= set(expected)
    assert len(seen) > 3


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_greedy_batch_equals_a_loop_without_a_cache(position, prepare):
    """With a penalty too, which counts what the window has left behind. Another batch in between leaves no traces."""
    model = lively(position=position)
    decoder = prepare(lively(position=position))
    for prompts in (PROMPTS, [[4, 4], [9]], PROMPTS[::-1]):
        for name, penalty in (("greedy", 1), ("greedy, penalty", 1.7)):
            expected = [slow_greedy(model, ids, 20, penalty) for ids in prompts]
            assert together(decoder, prompts, 20, OPTIONS[name]) == expected


# Several rows of one prompt; windows that slide at different steps, two at the first; a prompt longer than the context,
# and another with the same end.
PROMPTS = [[1], [2, 3, 4], [2, 3, 4], [5] * 8, list(range(12)), [1], [29, 28, *range(4, 12)], [7, 8, 9, 10, 11, 12]]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("context", [1, 8])
def test_batch_equals_one_by_one(name, context, prepare):
    decoder = prepare(lively(context_length=context))
    expected = alone(decoder, PROMPTS, 20, OPTIONS[name], first_row=3)
    assert all(len(text) == 20 for text in expected)
    assert together(decoder, PROMPTS, 20, OPTIONS[name], first_row=3) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_a_batch_end_at_different_steps(name, prepare):
    """Each before one of its stop ids, which is not given out; the others write on as if nothing had been."""
    decoder = prepare(lively())
    free = alone(decoder, PROMPTS, 25, OPTIONS[name])

    def ends(stop_ids: tuple[int, ...]) -> list[int]:
        return [min([text.index(i) for i in stop_ids if i in text], default=25) for text in free]

    stop_ids = (99, *max(itertools.combinations(range(30), 2), key=lambda pair: len(set(ends(pair)))))
    assert len(set(ends(stop_ids))) > 2
    expected = [text[:end] for text, end in zip(free, ends(stop_ids), strict=True)]
    assert alone(decoder, PROMPTS, 25, OPTIONS[name], stop_ids=stop_ids) == expected
    assert together(decoder, PROMPTS, 25, OPTIONS[name], stop_ids=stop_ids) == expected


def test_batch_ends_with_its_last_row():
    """Nothing is computed after that."""
    decoder = Decoder(lively())
    steps = []
    step = decoder.decode_step
    decoder.decode_step = lambda tokens: steps.append(1) or step(tokens)
    text = list(generate(decoder, [3], 30, GREEDY))
    assert len(steps) <= 29
    steps.clear()
    end = next(n for n in range(4, 30) if text[n] not in text[:n])
    assert list(generate_batch(decoder, [[3], [3]], 30, GREEDY, stop_ids=[text[end]])) == [[i, i] for i in text[:end]]
    assert len(steps) <= end
    assert list(generate_batch(decoder, [[3], [3]], 30, GREEDY, stop_ids=[text[0]])) == []
    assert list(generate_batch(decoder, [[3], [3]], 0, GREEDY)) == []


@settings(quick, max_examples=25, derandomize=True)  # rounding is another in a batch: once in very long, a token too
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
    more = {"n_vocab": 25, "first_row": data.draw(st.integers(0, 9)), "stop_ids": data.draw(st.sets(st.integers(0, 5)))}
    count = data.draw(st.integers(0, 20))
    decoder = Decoder(lively(position=position, context_length=context))
    assert together(decoder, prompts, count, options, **more) == alone(decoder, prompts, count, options, **more)


@pytest.mark.parametrize("name", ["greedy", "all"])
def test_a_device_that_runs_ahead_of_the_host_writes_the_same(name, monkeypatch):
    """On CUDA the next step is begun before the tokens are read; here on a CPU that says it is CUDA."""

    class Ahead:
        device = SimpleNamespace(type="cuda")

        def __getattr__(self, name: str):
            return getattr(decoder, name)

    decoder = Decoder(lively())
    free = together(decoder, PROMPTS, 25, OPTIONS[name])
    stop_ids = (free[1][3], free[4][9])
    expected = [together(decoder, PROMPTS, count, OPTIONS[name], stop_ids=stop_ids) for count in (1, 2, 25)]
    monkeypatch.setattr(sampling, "Sampler", lambda *words: Sampler(*words[:-1], CPU))
    found = [together(Ahead(), PROMPTS, count, OPTIONS[name], stop_ids=stop_ids) for count in (1, 2, 25)]
    assert found == expected


def test_seed_decides_the_text():
    decoder = Decoder(lively())
    options = [dataclasses.replace(FREE, seed=seed) for seed in (1, 1, 2, 3, 2**63 - 1)]
    texts = [tuple(generate(decoder, [1], 30, o)) for o in options]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_samples_of_a_prompt_differ_and_are_found_again_by_their_number():
    decoder = Decoder(lively())
    texts = together(decoder, [[1]] * 12, 10, FREE)
    assert len(set(map(tuple, texts))) == 12
    assert together(decoder, [[1]] * 12, 10, FREE) == texts
    assert together(decoder, [[1]] * 5, 10, FREE, first_row=4) == texts[4:9]


def test_prompt_must_not_be_empty():
    decoder = Decoder(lively())
    for prompts in ([[]], [[1], []]):
        with pytest.raises(AssertionError):
            next(generate_batch(decoder, prompts, 1, FREE))


def test_prompts_are_left_as_they_are():
    prompts = [[1, 2], [3]]
    together(Decoder(lively()), prompts, 5, FREE)
    assert prompts == [[1, 2], [3]]


@pytest.mark.parametrize("context", [8, 5003])
def test_prompt_of_5000_ids(context):
    """Longer than the context by far, and almost filling one."""
    model = lively(n_layer=1, context_length=context, position="rope")
    prompt = [(i * i) % 30 for i in range(5000)]
    count = 6 if context > 8 else 12
    expected = slow_greedy(model, prompt, count, 1.7)
    found = together(Decoder(model), [prompt, [3], prompt], count, OPTIONS["greedy, penalty"])
    assert found == [expected, slow_greedy(model, [3], count, 1.7), expected]


# ---------------------------------------------------------------------------------------------------------------------
# which token: by hand, and by transformers

NO_IDS = torch.zeros(4, 0, dtype=torch.int64)


def chances(row: torch.Tensor) -> list[float]:
    weights = [math.exp(x - row.max().item()) for x in row.double().tolist()]
    total = math.fsum(weights)
    return [w / total for w in weights]


def assert_kept(logits: torch.Tensor, kept: torch.Tensor, expected: list[set[int]]) -> None:
    """Those expected as they were, the others at minus infinity."""
    for row, kept_row, ids in zip(logits, kept, expected, strict=True):
        stay = torch.zeros(len(row), dtype=torch.bool)
        stay[list(ids)] = True
        wrong = kept_row != row.masked_fill(~stay, -math.inf)
        assert wrong.nonzero().flatten().tolist() == []


def random_logits(vocabulary: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 3, 29, 30, 99])
def test_top_k_keeps_exactly_the_likeliest(k):
    logits = random_logits(30)
    kept = keep_top_k(logits, k)
    assert_kept(logits, kept, [set(sorted(range(30), key=row.__getitem__)[-k:]) for row in logits.tolist()])
    assert torch.equal(kept, transformers.TopKLogitsWarper(k)(NO_IDS, logits))


def slow_top_p(row: torch.Tensor, top_p: float) -> set[int]:
    """The likeliest, one after the other, until they reach top_p."""
    p, kept, mass = chances(row), set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        kept.add(i)
        mass += p[i]
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
@pytest.mark.parametrize("vocabulary", [30, NUCLEUS, 3 * NUCLEUS])
def test_top_p_keeps_the_likeliest_that_reach_it(vocabulary, scale, top_p):
    """Flat logits, whose mass the likeliest NUCLEUS do not hold, and steep ones."""
    logits = random_logits(vocabulary, scale)
    kept = keep_top_p(logits, top_p)
    assert_kept(logits, kept, [slow_top_p(row, top_p) for row in logits])
    assert torch.equal(kept, transformers.TopPLogitsWarper(top_p)(NO_IDS, logits))


def test_likeliest_have_the_models_probabilities():
    """The one that was drawn first, however unlikely; others by softmax of the plain logits."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    drawn = torch.tensor([4, 19, 0])
    for row, found, token in zip(
        logits.double().numpy(), top_token_probs(logits, drawn, 5), drawn.tolist(), strict=True
    ):
        probabilities = np.exp(row) / np.exp(row).sum()
        ids = [token, *np.argsort(-probabilities, kind="stable")[:5].tolist()]
        assert [p for _, p in found] == pytest.approx(probabilities[ids].tolist(), rel=1e-5)
        assert found[0][0] == token
    assert [len(row) for row in top_token_probs(logits[:, :3], torch.zeros(3, dtype=torch.int64), 5)] == [4, 4, 4]


def test_on_sample_sees_what_each_token_is_drawn_from():
    """Logits as a pass without a cache has them, of ids that can be drawn; the tokens are those that are given out."""
    model, seen = GPT(CONFIG).eval(), []
    prompts, options = [[3, 1], [4]], dataclasses.replace(FREE, top_k=3, repetition_penalty=2.0)
    steps = list(
        generate_batch(
            Decoder(model), prompts, 4, options, n_vocab=25, on_sample=lambda logits, ids: seen.append((logits, ids))
        )
    )
    assert [ids.tolist() for _, ids in seen] == steps
    texts = [list(ids) for ids in prompts]
    for logits, ids in seen:
        expected = torch.stack([model(torch.tensor([text]))[0, -1, :25] for text in texts])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)


def test_top_p_of_a_row_does_not_depend_on_the_others():
    """One row's mass is within the likeliest NUCLEUS, another's is not."""
    logits = random_logits(3 * NUCLEUS) * torch.tensor([0.01, 5, 0.5, 1])[:, None]
    kept = keep_top_p(logits, 0.8)
    counts = kept.isfinite().sum(-1)
    assert counts.min() < NUCLEUS < counts.max()
    for n in range(4):
        assert torch.equal(keep_top_p(logits[n : n + 1], 0.8), kept[n : n + 1])


@pytest.mark.parametrize("keep", [lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.6)])
def test_equally_likely_tokens_stay_together(keep):
    """Two tokens are asked for: the likeliest, of probability 0.52, and one of two of 0.19 each. Both of these stay."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert_kept(logits, keep(logits), [{1, 2, 3}])
    assert_kept(torch.zeros(1, 5), keep(torch.zeros(1, 5)), [{0, 1, 2, 3, 4}])


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_min_p_keeps_those_near_the_likeliest(min_p, scale):
    logits = random_logits(30, scale)
    kept = keep_min_p(logits, min_p)
    rows = [chances(row) for row in logits]
    assert_kept(logits, kept, [{i for i, p in enumerate(row) if p >= min_p * max(row)} for row in rows])
    assert torch.equal(kept, transformers.MinPLogitsWarper(min_p)(NO_IDS, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_penalty_takes_seen_ids_down(penalty):
    logits = random_logits(30)
    ids = [[1, 2, 2], [3, 4, 5], [0, 29, 7], [9, 9, 9]]
    seen = torch.zeros(4, 30, dtype=torch.bool)
    for row, those in zip(seen, ids, strict=True):
        row[those] = True
    found = penalize_seen(logits, seen, penalty)
    expected = [penalized(row, set(those), penalty) for row, those in zip(logits, ids, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(
        found, transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), logits), rtol=0, atol=0
    )


@pytest.mark.parametrize("vocabulary", [30, 2 * NUCLEUS])
def test_all_together_in_transformers_order(vocabulary, monkeypatch):
    """Options of which each changes what the next one keeps; the penalty counts the prompt and what was drawn since."""
    options = SamplingConfig(temperature=1.6, top_k=20, top_p=0.93, min_p=0.06, repetition_penalty=1.9)
    processors = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
            transformers.TemperatureLogitsWarper(options.temperature),
            transformers.TopKLogitsWarper(options.top_k),
            transformers.TopPLogitsWarper(options.top_p),
            transformers.MinPLogitsWarper(options.min_p),
        ]
    )
    left = []
    monkeypatch.setattr(sampling, "sample", lambda logits, generators: left.append(logits) or logits.argmax(-1))
    prompts = [[1, 2], [3, 4], [5, 5], [0, 29]]
    sampler = Sampler(options, prompts, 0, vocabulary, CPU)
    ids = torch.tensor(prompts)
    for n in range(6):
        logits = 3 * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(n % 2))
        tokens = sampler(torch.cat((logits, torch.full((4, 3), 99.0)), dim=1))  # three ids that no tokenizer has
        expected = processors(ids, logits)
        assert torch.equal(left[-1], expected)
        assert 1 < expected[0].isfinite().sum() < 20
        ids = torch.cat((ids, tokens[:, None]), dim=1)


def test_sampler_leaves_its_logits_alone():
    """On a GPU they are memory that a recorded step writes."""
    logits = random_logits(30)
    before = logits.clone()
    for options in (*OPTIONS.values(), SamplingConfig(temperature=0.5)):
        Sampler(options, [[1]] * 4, 0, 30, CPU)(logits)
    assert torch.equal(logits, before)


LOGITS = [1.0, -0.5, 0.3, 2.0, 0.0]


def chi_squared(drawn: list[int], weights: list[float]) -> float:
    """Pearson's: with 4 degrees of freedom, above 23.5 by chance once in ten thousand."""
    counts = np.bincount(drawn, minlength=len(weights))
    expected = len(drawn) * np.array(weights) / sum(weights)
    assert not counts[expected == 0].any()
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(
    ("temperature", "more", "allowed"),
    [
        (None, {}, (0, 1, 2, 3, 4)),
        (1.0, {}, (0, 1, 2, 3, 4)),
        (0.5, {}, (0, 1, 2, 3, 4)),
        (2.0, {}, (0, 1, 2, 3, 4)),
        (1.5, {"top_k": 3}, (0, 2, 3)),
        (1.0, {"top_p": 0.7}, (0, 3)),
        (1.0, {"min_p": 0.15}, (0, 2, 3)),
    ],
)
def test_frequencies_follow_softmax_of_logits_over_temperature(temperature, more, allowed, rows):
    """Of one text, and over the texts of a batch; without a temperature, of 0.8."""
    options = SamplingConfig(temperature=temperature, seed=1, **more)
    weights = [math.exp(x / (temperature or 0.8)) if i in allowed else 0.0 for i, x in enumerate(LOGITS)]
    drawn = together(Decoder(constant(LOGITS)), [[0]] * rows, 2000 // rows, options)
    assert chi_squared([*itertools.chain(*drawn)], weights) < 23.5
    assert rows == 1 or len({text[0] for text in drawn}) > 1  # rows do not share their numbers


def test_rows_draw_independently_of_each_other():
    """Pairs of neighbours, and of one row's successive tokens: each of 25 pairs as often as its chance says."""
    texts = together(Decoder(constant(LOGITS)), [[0]] * 40, 50, FREE)
    weights = [math.exp(x) for x in LOGITS]
    pairs = [a * b for a in weights for b in weights]
    neighbours = [
        5 * a + b for one, two in zip(texts[::2], texts[1::2], strict=True) for a, b in zip(one, two, strict=True)
    ]
    successive = [5 * a + b for text in texts for a, b in zip(text[::2], text[1::2], strict=True)]
    for drawn in (neighbours, successive):
        assert chi_squared(drawn, pairs) < 62.5  # 24 degrees of freedom, once in 30,000


@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), SamplingConfig(top_k=2), SamplingConfig(temperature=5.0, top_k=50)],
    ids=str,
)
def test_ids_beyond_the_tokenizer_are_never_drawn(options):
    """The model's vocabulary may be larger (50,304); with top_k, the extra ids take no place among the k."""
    model = constant([0.0, 1.0, 1.5, 0.5, 20.0, 30.0])
    drawn = {i for text in together(Decoder(model), [[0], [1, 2]], 100, options, n_vocab=4) for i in text}
    assert max(drawn) < 4
    if options.top_k == 2:
        assert drawn == {1, 2}
    assert max(map(max, together(Decoder(model), [[0], [1, 2]], 10, options))) >= 4  # they could have been


def test_greedy_is_temperature_0_is_top_k_1():
    decoder = Decoder(lively())
    expected = together(decoder, PROMPTS, 20, GREEDY)
    for options in (SamplingConfig(greedy=True), SamplingConfig(top_k=1), SamplingConfig(top_k=1, temperature=9)):
        assert together(decoder, PROMPTS, 20, options) == expected


# ---------------------------------------------------------------------------------------------------------------------
# what it leaves as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["greedy", "all"])
def test_mode_and_random_state_are_left_alone(training, name):
    """Dropout is off while it writes, on again after; also when nobody reads to the end, and between two tokens
    gradients flow as before."""
    model = lively(dropout=0.5)
    decoder = Decoder(model)
    expected = together(decoder, [[1, 2], [3]], 20, OPTIONS[name])
    assert name != "greedy" or expected[0] == slow_greedy(model, [1, 2], 20)
    model.train(training)
    state = torch.get_rng_state()
    assert together(decoder, [[1, 2], [3]], 20, OPTIONS[name]) == expected
    assert model.training is training
    assert model.transformer.drop.training is training
    for ids in (generate(decoder, [1, 2], 20, OPTIONS[name]), generate_batch(decoder, [[1, 2]], 20, OPTIONS[name])):
        next(ids)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        ids.close()
        assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_is_left_alone_when_a_step_fails(monkeypatch):
    model = lively().train()
    decoder = Decoder(model)
    monkeypatch.setattr(decoder, "decode_step", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(generate(decoder, [1, 2], 20, FREE))
    assert model.training
    assert not torch.is_inference_mode_enabled()


def test_model_learns_on_after_it_has_written():
    """What inference mode makes cannot be part of a loss."""
    model = lively().train()
    before = list(generate(Decoder(model), [1], 20, GREEDY))
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
    after = list(generate(Decoder(model), [1], 20, GREEDY))
    assert after == slow_greedy(model, [1], 20) != before


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_bfloat16(position):
    """Every token is, for a float32 model without a cache, as good as the best."""
    model = lively(position=position)
    decoder = Decoder(model)
    with torch.autocast("cpu", torch.bfloat16):
        texts = [[1, 2, 3], [4]]
        for row, text in enumerate(together(decoder, texts, 5, GREEDY)):
            texts[row] = texts[row] + text
        assert [len(text) for text in together(decoder, [[1, 2, 3], [4]], 30, FREE)] == [30, 30]  # beyond the context
    with torch.no_grad():
        for ids in texts:
            for end in range(len(ids) - 5, len(ids)):
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


def test_characters_cut_over_gpt2_tokens():
    encoding = tokenizer.load("gpt2")
    assert len(encoding.encode_ordinary("🎈")) > 1
    check_stream(TEXT, encoding)
    for stop in ("中文", "🎈", "\u200d", "京 a"):
        assert "".join(stream_text(encoding.encode_ordinary(TEXT), encoding, [stop])) == TEXT[: TEXT.index(stop)]


@given(st.binary(max_size=12) | st.lists(st.sampled_from([*"a東🎈".encode(), 0xFF, 0xC0, 0xED])).map(bytes))
def test_bytes_that_are_no_text_become_replacement_characters(data):
    """As tiktoken's own decode has them."""
    assert "".join(stream_text(iter(data), BYTE)) == data.decode("utf-8", "replace") == BYTE.decode(list(data))


class Cut(list):
    """An encoding whose ids 0, 1, 2 and so on are the pieces of some bytes, cut at random."""

    def __init__(self, data: bytes, seed: int):
        draw = random.Random(seed)
        cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(len(data) + 1)))
        super().__init__(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))

    decode_single_token_bytes = list.__getitem__


def until_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of those that are at once, the longest."""
    for end in range(1, len(text) + 1):
        if found := [len(s) for s in stop if text[:end].endswith(s)]:
            return text[: end - max(found)], True
    return text, False


def certain(text: str, stop: list[str]) -> str:
    """Of a text that has not stopped, what no continuation can take back."""
    return text[: min((len(text) - n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=len(text))]


LETTERS = st.sampled_from("aaabb東🎈")


@settings(quick, max_examples=300)
@given(
    st.text(LETTERS, max_size=25).map(str.encode)
    | st.lists(st.sampled_from([*b"aab", *"東".encode(), 0xFF]), max_size=25).map(bytes),
    st.lists(st.text(st.sampled_from("aaab東\ufffd"), min_size=1, max_size=5), max_size=3),
    st.integers(0, 2**32),
)
@example(b"aabaabaaab", ["aabaaa", "baab"], 0)
@example("abab🎈".encode(), ["b", "ab"], 0)
@example(b"ab\xe6\x9d", ["b\ufffd"], 0)  # complete at the text's very end, and not before
@example(b"aab", ["aabb", "ab🎈"], 0)
def test_stop_strings_end_the_text_however_it_is_cut(data, stop, seed):
    """Never a part of a stop string, nor anything twice; what was held back is given out when no stop comes."""
    text = data.decode("utf-8", "replace")
    expected, stops = until_stop(text, stop)
    pieces = Cut(data, seed)
    assert "".join(stream_text(range(len(pieces)), pieces, stop)) == expected
    stream = TextStream(pieces, tuple(stop))
    said, decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
    come = ""
    for token, piece in enumerate(pieces):
        come += decoder.decode(piece)
        said += stream.feed(token)
        so_far, stopped = until_stop(come, stop)
        assert stream.stopped is stopped
        assert said == (so_far if stopped else certain(come, stop))
    assert said + stream.end() == expected
    assert stream.stopped is stops
    assert stream.end() == ""


def test_nothing_is_read_after_a_stop():
    """What writes the ids could be a slow model."""
    ids = iter(b"one, two, three")
    assert list(stream_text(ids, BYTE, [", t", "e, t"])) == ["o", "n"]
    assert bytes(ids) == b"wo, three"
