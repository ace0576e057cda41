"""decoder.py against the model without a cache."""

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT

from config import ModelConfig, SamplingConfig
from flatgpt.inference import decoder as decoder_module
from flatgpt.inference.decoder import Decoder, KVCache
from flatgpt.inference.prepacking import prepack
from flatgpt.inference.sampling import generate_batch
from model import GPT

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=12, vocab_size=30)
GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[1], [2, 3, 4, 5], [9, 8, 7] * 3, list(range(14))]  # in a context of 12, each slides at another step


def lively(seed: int = 0, **changes) -> GPT:
    """A model with matrices so large that greedy text does not repeat one token."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.5)
    return model.eval()


def assert_next(logits: torch.Tensor, model: GPT, texts: list[list[int]]) -> None:
    """(B, V) logits are those that the model gives for whole texts."""
    expected = torch.stack([model(torch.tensor([ids]))[0, -1] for ids in texts])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def without_compiler(monkeypatch):
    """What the compiler would get is run as it is; its capacity is a multiple of three."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Decoder, "LENGTH_MULTIPLE", 3)


KINDS = pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
POSITIONS = pytest.mark.parametrize("position", ["learned", "rope"])


# ---------------------------------------------------------------------------------------------------------------------
# prefill and decode_step


@KINDS
@POSITIONS
@pytest.mark.parametrize("lengths", [(1, 4, 2, 7), (3, 3, 3, 3), (8, 1, 1, 1)])
def test_logits_equal_those_without_a_cache(lengths, position, compile, without_compiler):
    model = lively(position=position)
    decoder = Decoder(model, compile)
    decoder.reset(4, 11)
    draw = random.Random(0)
    texts = [[draw.randrange(30) for _ in range(n)] for n in lengths]
    assert_next(torch.stack([decoder.prefill([row], ids) for row, ids in enumerate(texts)]), model, texts)
    assert decoder.lengths == list(lengths)
    while max(map(len, texts)) < 11:
        tokens = [draw.randrange(30) for _ in texts]
        texts = [[*ids, token] for ids, token in zip(texts, tokens, strict=True)]
        assert_next(decoder.decode_step(torch.tensor(tokens)), model, texts)
        assert decoder.lengths == [len(ids) for ids in texts]


@KINDS
def test_row_that_is_full_disturbs_no_other(compile, without_compiler):
    """It loses its last token, and can be filled again with a shorter prompt."""
    model = lively()
    decoder = Decoder(model, compile)
    decoder.reset(2, 6)
    texts = [[1, 2, 3, 4, 5], [9, 8]]
    for row, ids in enumerate(texts):
        decoder.prefill([row], ids)
    for token, full in ((11, 6), (12, 6), (13, 6)):
        texts = [[*texts[0][:5], token], [*texts[1], token]]
        assert_next(decoder.decode_step(torch.tensor([token] * 2)), model, texts)
        assert decoder.lengths == [full, len(texts[1])]
    texts[0] = [13, 14]
    assert_next(decoder.prefill([0], texts[0])[None], model, texts[:1])
    assert_next(decoder.decode_step(torch.tensor([3, 4])), model, [[*texts[0], 3], [*texts[1], 4]])
    decoder.prefill([0, 1], [5] * 6)
    assert_next(decoder.decode_step(torch.tensor([3, 4])), model, [[5] * 5 + [3], [5] * 5 + [4]])


@KINDS
@POSITIONS
@settings(max_examples=40)
@given(data=st.data())
def test_any_order_of_resets_prefills_and_steps(position, compile, data):
    """Against texts kept in lists; a prefill may go into several rows, and a reset may change the shape."""
    model = lively(position=position)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "compile", lambda function, **options: function)
        patch.setattr(Decoder, "LENGTH_MULTIPLE", 3)
        decoder = Decoder(model, compile)
        for _ in range(data.draw(st.integers(1, 3), "resets")):
            rows, capacity = data.draw(st.integers(1, 4), "rows"), data.draw(st.integers(1, 12), "capacity")
            decoder.reset(rows, capacity)
            assert capacity <= decoder.capacity <= 12
            texts = [[] for _ in range(rows)]
            for _ in range(data.draw(st.integers(0, 8), "acts")):
                if data.draw(st.booleans(), "read"):
                    ids = data.draw(st.lists(st.integers(0, 29), min_size=1, max_size=capacity), "ids")
                    into = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True), "into")
                    texts = [list(ids) if row in into else text for row, text in enumerate(texts)]
                    assert_next(decoder.prefill(into, ids)[None], model, [ids])
                else:
                    tokens = data.draw(st.lists(st.integers(0, 29), min_size=rows, max_size=rows), "tokens")
                    texts = [[*text[: decoder.capacity - 1], i] for text, i in zip(texts, tokens, strict=True)]
                    assert_next(decoder.decode_step(torch.tensor(tokens)), model, texts)
                assert decoder.lengths == [len(text) for text in texts]


def test_capacity():
    """As many as asked for; where shapes have to be few, in steps of 128; the context is the end of both."""
    eager, compiled = Decoder(lively(context_length=300)), Decoder(lively(context_length=300), compile=True)
    for asked, found, rounded in ((1, 1, 128), (128, 128, 128), (129, 129, 256), (256, 256, 256), (257, 257, 300)):
        for decoder, expected in ((eager, found), (compiled, rounded)):
            decoder.reset(2, asked)
            assert decoder.capacity == expected
    for decoder in (eager, compiled):
        for asked in (300, 301, 5000):
            decoder.reset(1, asked)
            assert decoder.capacity == 300


def test_prompt_longer_than_the_capacity_is_refused():
    decoder = Decoder(lively())
    decoder.reset(1, 4)
    with pytest.raises((AssertionError, RuntimeError)):
        decoder.prefill([0], [1, 2, 3, 4, 5])


@KINDS
def test_step_works_in_the_memory_it_has(compile, without_compiler, monkeypatch):
    """A cache is made at the first reset, and when its shape changes."""
    made = []
    monkeypatch.setattr(decoder_module, "KVCache", lambda *words: made.append(words[1:3]) or KVCache(*words))
    decoder = Decoder(lively(), compile)
    decoder.reset(2, 9)
    decoder.reset(2, 9)
    assert made == [(2, 9)]
    decoder.decode_step(torch.tensor([1, 2]))
    decoder.reset(3, 9)
    decoder.reset(3, 12)
    assert made == [(2, 9), (3, 9), (3, 12)]


def test_under_autocast_a_cpu_keeps_float32():
    """A step's precision is then that of its products; keys and values are rounded once, when they are made."""
    model = lively(n_layer=1)
    decoder = Decoder(model)
    with torch.autocast("cpu", torch.bfloat16):
        decoder.reset(1, 12)
        found = [decoder.prefill([0], [3, 1, 4])] + [decoder.decode_step(torch.tensor([i]))[0] for i in (1, 5, 9)]
    texts = [[3, 1, 4], [3, 1, 4, 1], [3, 1, 4, 1, 5], [3, 1, 4, 1, 5, 9]]
    for logits, ids in zip(found, texts, strict=True):
        assert logits.dtype == torch.bfloat16
        expected = model(torch.tensor([ids]))[0, -1]
        assert (logits - expected).abs().max() < 0.03 * expected.abs().max()


def test_outside_of_inference_mode_too():
    """One decoder under generate's inference mode, then under no_grad, then with gradients on: none are kept."""
    model = lively()
    decoder = Decoder(model)
    list(generate_batch(decoder, PROMPTS[:2], 3, GREEDY))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            decoder.reset(2, 7)
            first = decoder.prefill([0, 1], [1, 2])
            logits = decoder.decode_step(torch.tensor([3, 4]))
        assert not first.requires_grad
        assert not logits.requires_grad
        assert_next(logits, model, [[1, 2, 3], [1, 2, 4]])


# ---------------------------------------------------------------------------------------------------------------------
# the compiler


def broken(function, **options):
    """A compiler that fails when it is first used."""

    def call(*words):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nmore about it")

    return call


def test_compiler_that_fails_is_one_warning(monkeypatch, capsys):
    """Also when shapes change, for each of which it would be tried."""
    expected = list(generate_batch(Decoder(lively()), PROMPTS, 20, GREEDY))
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(Decoder, "LENGTH_MULTIPLE", 2)
    decoder = Decoder(lively(), compile=True)
    for prompts, count in ((PROMPTS, 20), (PROMPTS, 20), (PROMPTS[:2], 20), (PROMPTS[:2], 3)):
        found = list(generate_batch(decoder, prompts, count, GREEDY))
        assert found == [step[: len(prompts)] for step in expected[:count]]
    assert capsys.readouterr().err == "warning: torch.compile failed, going on without it: no compiler\n"


def test_only_errors_of_the_compiler_are_caught(monkeypatch):
    """An out-of-memory error is not hidden."""

    def fails(*words):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    with pytest.raises(torch.OutOfMemoryError):
        list(generate_batch(Decoder(lively(), compile=True), PROMPTS, 3, GREEDY))


def assert_same_texts(compiled: Decoder, eager: Decoder) -> None:
    """In two shapes, the first of them twice before the other and once after it."""
    for prompts in (PROMPTS, PROMPTS, PROMPTS[2:], PROMPTS[::-1]):
        expected = list(generate_batch(eager, prompts, 20, GREEDY))
        assert len({tuple(step) for step in expected}) > 5
        assert list(generate_batch(compiled, prompts, 20, GREEDY)) == expected, prompts


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_step_writes_the_same(packed, capsys, tmp_path, monkeypatch):
    """A model as trained, and packed; a second one with other weights, which the first one's code has to leave."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was compiled before neither helps nor harms
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def prepared(seed: int) -> GPT:
        model = lively(seed)
        return prepack(model, torch.float32, compile=True) if packed else model

    for seed in (0, 1):
        assert_same_texts(Decoder(prepared(seed), compile=True), Decoder(lively(seed)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # it was compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_broken_compiler_is_one_warning(tmp_path):
    """There is no C++ compiler at CXX; nothing compiled before may help out."""
    code = (
        "from test_decoder import Decoder, GREEDY, PROMPTS, generate_batch, lively\n"
        "eager, compiled = Decoder(lively()), Decoder(lively(), compile=True)\n"
        "for prompts in (PROMPTS, PROMPTS[1:], PROMPTS):\n"
        "    expected = list(generate_batch(eager, prompts, 20, GREEDY))\n"
        "    print(list(generate_batch(compiled, prompts, 20, GREEDY)) == expected)\n"
    )
    env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests/support", ROOT / "tests", Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n" * 3
    assert done.stderr.startswith("warning: torch.compile failed, going on without it: ")
    assert done.stderr.count("warning:") == 1


# ---------------------------------------------------------------------------------------------------------------------
# what only a GPU shows


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_recorded_step_writes_the_same(packed, capsys):
    """Compiled and sent as one; rows of different lengths, across slides, and again after resets."""
    torch._dynamo.reset()

    def prepared() -> GPT:
        model = lively().cuda()
        return prepack(model, torch.float32, compile=True) if packed else model

    assert_same_texts(Decoder(prepared(), compile=True), Decoder(lively().cuda()))
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_recorded_step_without_a_compiler_writes_the_same(monkeypatch, capsys):
    """What the warning says is gone on with is recorded too."""
    monkeypatch.setattr(torch, "compile", broken)
    assert_same_texts(Decoder(lively().cuda(), compile=True), Decoder(lively().cuda()))
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.gpu
def test_gpu_writes_what_a_cpu_writes():
    """Where the next step begins before the tokens are read; also when rows end at different steps."""
    texts = list(zip(*generate_batch(Decoder(lively()), PROMPTS, 20, GREEDY), strict=True))
    stop_ids = (texts[0][5], texts[2][3])
    expected = list(generate_batch(Decoder(lively()), PROMPTS, 20, GREEDY, stop_ids=stop_ids))
    for compile in (False, True):
        decoder = Decoder(lively().cuda(), compile)
        assert list(generate_batch(decoder, PROMPTS, 20, GREEDY, stop_ids=stop_ids)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_gpu_in_bfloat16(quantize):
    """Compiled and eager steps agree up to rounding; the cache is in the products' precision."""
    found = []
    for compile in (False, True):
        decoder = Decoder(prepack(lively().cuda(), torch.bfloat16, quantize, compile), compile)
        decoder.reset(2, 9)
        decoder.prefill([0, 1], [1, 2, 3])
        decoder.prefill([1], [4])
        found.append(
            torch.stack([decoder.decode_step(torch.tensor([i, i + 1], device="cuda")) for i in range(5)]).float()
        )
        assert decoder._cache.k[0].dtype == torch.bfloat16
    assert (found[0] - found[1]).abs().max() < 0.05 * found[0].abs().max()
