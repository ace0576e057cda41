"""decoder.py against the model without a cache."""

import os
import random
import subprocess
import sys
from pathlib import Path

import cuda_graphs
import pytest
import torch
from processes import ROOT
from random_models import random_model

from config import SamplingConfig
from flatgpt.inference.decoder import PREFILL_TOKENS, Decoder
from flatgpt.inference.prepacking import linear_classes, prepack
from flatgpt.inference.sampling import generate_batch
from flatgpt.runtime.device import compiler
from model import GPT

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[1], [2, 3, 4, 5], [9, 8, 7] * 3, list(range(14))]  # in a context of 12, each slides at another step


def lively(seed: int = 0, **changes) -> GPT:
    """A model whose greedy text does not repeat one token."""
    shape = {"n_layer": 2, "context_length": 12, "vocab_size": 30, "tie_weights": False, "bias": False, **changes}
    return random_model(seed, std=0.6, **shape)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_next(logits: torch.Tensor, model: GPT, texts: list[list[int]]) -> None:
    """(B, V) logits are those that the model gives for whole texts."""
    expected = torch.stack([model(torch.tensor([ids]))[0, -1] for ids in texts])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile", [False, True, None], ids=["eager", "compiled", "traced"])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_of_resets_prefills_and_steps(seed, position, compile, monkeypatch):
    """Against texts kept in lists. A prefill sets some of the rows, to equal texts and others, in one pass or several;
    in a full row a step replaces the last token.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Decoder, "LENGTH_MULTIPLE", 3)
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", 10)
    draw, model = random.Random(seed), lively(position=position)
    decoder = Decoder(model, compile)
    for rows, capacity in ((3, 7), (3, 7), (1, 12), (4, 9)):
        decoder.reset(rows, capacity)
        assert capacity <= decoder.capacity <= 12
        texts = [[] for _ in range(rows)]
        for act in range(12):
            if act % 3 == 2:
                new = [[draw.randrange(30) for _ in range(draw.randint(1, capacity))] for _ in range(2)]
                into = {row: draw.choice(new) for row in draw.sample(range(rows), draw.randint(1, rows))}
                texts = [list(into.get(row, text)) for row, text in enumerate(texts)]
                assert_next(decoder.prefill(into), model, [*into.values()])
            else:
                tokens = [draw.randrange(30) for _ in texts]
                texts = [[*text[: decoder.capacity - 1], i] for text, i in zip(texts, tokens, strict=True)]
                assert_next(decoder.decode_step(torch.tensor(tokens)), model, texts)
            assert decoder.lengths == [len(text) for text in texts]
    assert decoder.trace == (compile is None)


def test_prompts_share_forward_passes(monkeypatch):
    """Up to a number of tokens with padding; equal prompts are one. More than the number is a pass of its own."""
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", 10)
    model, shapes = lively(), []
    model.register_forward_pre_hook(lambda module, words: shapes.append(tuple(words[0].shape)))
    decoder, prompts = Decoder(model), [[1, 2, 3], [4], [1, 2, 3], [5] * 12, [6, 7, 8], [9] * 5, [9] * 4 + [1]]
    decoder.reset(len(prompts), 12)
    assert_next(decoder.prefill(dict(enumerate(prompts))), lively(), prompts)
    assert shapes == [(3, 3), (2, 5), (1, 12)]


def test_under_autocast_a_cpu_keeps_float32():
    """A step's precision is then that of its products; keys and values are rounded once, when they are made."""
    model = lively(n_layer=1)
    decoder = Decoder(model)
    with torch.autocast("cpu", torch.bfloat16):
        decoder.reset(1, 12)
        found = [decoder.prefill({0: [3, 1, 4]})[0]] + [decoder.decode_step(torch.tensor([i]))[0] for i in (1, 5, 9)]
    for n, logits in enumerate(found, 3):
        assert logits.dtype == torch.bfloat16
        expected = model(torch.tensor([[3, 1, 4, 1, 5, 9][:n]]))[0, -1]
        assert (logits - expected).abs().max() < 0.03 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# traces, CUDA graphs, the compiler


@pytest.mark.parametrize("layout", [None, "prepacked", "row-major", "transposed", "bfloat16 inputs", "int8 inputs"])
def test_traced_steps_have_the_digits_of_eager_ones(layout, capsys):
    """Also where adjust_logits is edited. All decoders of a model share a trace for each batch size, and have another
    for rows that differ in length.
    """
    model = lively(n_embd=32)
    model.adjust_logits = lambda logits: 15 * torch.tanh(logits / 15)
    if layout:
        quantize = "int8" if "inputs" in layout else None
        known = layout in linear_classes(torch.device("cpu"), torch.bfloat16, quantize)
        prepack(model, torch.bfloat16, quantize, layout=layout if known else None)  # else this CPU does not have it
    calls = []
    model.register_forward_pre_hook(lambda module, words: calls.append(1))
    for prompts, traces in (([[5, 6]] * 2, 1), (PROMPTS[:1], 1), (PROMPTS[1:3], 1), ([[7]] * 2, 0), (PROMPTS[1:3], 0)):
        eager, traced = Decoder(model), Decoder(model, None)
        for decoder in (eager, traced):
            decoder.reset(len(prompts), 12)
            decoder.prefill(dict(enumerate(prompts)))
        calls.clear()
        for token in (3, 1, 4):
            tokens = torch.full((len(prompts),), token)
            assert torch.equal(traced.decode_step(tokens), eager.decode_step(tokens))
        assert len(calls) == 3 + 2 * traces  # a step is run before it is traced
        model.transformer.h[0].ln_1.weight.mul_(0.9)
    assert traced.trace
    assert capsys.readouterr().err == ""


def test_step_that_cannot_be_traced_is_one_warning(capsys):
    """Such as an edit of the model that reads values of tensors: a trace would repeat the first ones."""
    model = lively()
    model.adjust_logits = lambda logits: logits / max(1.0, logits.abs().max().item() / 30)
    assert_same_texts(Decoder(model, None), Decoder(model))
    message = "warning: the decoding step could not be traced, continuing without it: the model reads values of tensors"
    assert capsys.readouterr().err == f"{message} in Python\n"


def captured(model: GPT, compile: bool | None = None) -> Decoder:
    """A decoder that captures its steps, as on CUDA."""
    decoder = Decoder(model, compile)
    decoder.capture, decoder.trace = True, False
    return decoder


@pytest.mark.parametrize("compile", [None, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_captured_steps_write_the_same(position, compile, monkeypatch, capsys):
    """A shape is captured once while it lasts; then its steps are replayed."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    graphs = cuda_graphs.stand_in(monkeypatch)
    decoder = captured(lively(position=position), compile)
    assert_same_texts(decoder, Decoder(lively(position=position)))
    assert len(graphs) == 3
    assert sum(graph.replays for graph in graphs) > 40
    assert decoder.compile_seconds > 0
    assert capsys.readouterr().err == ""


def test_step_that_cannot_be_captured_is_one_warning(monkeypatch, capsys):
    """Such as a model whose adjust_logits waits for the device. An out-of-memory error is not hidden."""
    graphs = cuda_graphs.stand_in(monkeypatch)
    model = lively()
    model.adjust_logits = lambda logits: logits / max(1.0, logits.abs().max().item() / 30)
    assert_same_texts(captured(model), Decoder(model))
    assert len(graphs) == 1
    message = "no CUDA graph could be captured, continuing without it: CUDA error: operation not permitted when stream"
    assert capsys.readouterr().err == f"warning: {message} is capturing\n"
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: (_ for _ in ()).throw(torch.OutOfMemoryError("too large")))
    with pytest.raises(torch.OutOfMemoryError):
        list(generate_batch(captured(lively()), PROMPTS, 3, GREEDY))


def compiler_that_raises(error: Exception):
    """A torch.compile that fails when its result is first used."""

    def call(*words):
        raise error

    return lambda function, **options: call


NO_COMPILER = torch._dynamo.exc.TorchDynamoException("no compiler\nmore about it")


def test_compiler_that_fails_is_one_warning(monkeypatch, capsys):
    """Also when shapes change, for each of which it would be tried. An out-of-memory error is not hidden."""
    expected = list(generate_batch(Decoder(lively()), PROMPTS, 20, GREEDY))
    monkeypatch.setattr(torch, "compile", compiler_that_raises(NO_COMPILER))
    decoder = Decoder(lively(), compile=True)
    for prompts in (PROMPTS, PROMPTS[:2]):
        found = list(generate_batch(decoder, prompts, 20, GREEDY))
        assert found == [step[: len(prompts)] for step in expected]
    assert capsys.readouterr().err == "warning: torch.compile failed, continuing without it: no compiler\n"
    monkeypatch.setattr(compiler, "failed", False)
    monkeypatch.setattr(torch, "compile", compiler_that_raises(torch.OutOfMemoryError("too large")))
    with pytest.raises(torch.OutOfMemoryError):
        list(generate_batch(Decoder(lively(), compile=True), PROMPTS, 3, GREEDY))


def assert_same_texts(compiled: Decoder, eager: Decoder, **kwargs) -> None:
    """In two shapes, the first of them twice before the other and once after it."""
    for prompts in (PROMPTS, PROMPTS, PROMPTS[2:], PROMPTS[::-1]):
        expected = list(generate_batch(eager, prompts, 20, GREEDY, **kwargs))
        assert kwargs or len({tuple(step) for step in expected}) > 5
        assert list(generate_batch(compiled, prompts, 20, GREEDY, **kwargs)) == expected, prompts


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_step_writes_the_same(packed, capsys, tmp_path, monkeypatch):
    """A model as trained, and packed; a second one with other weights, which the first one's code has to leave."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was compiled before neither helps nor harms
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in (0, 1):
        model = prepack(lively(seed), torch.float32, compile=True) if packed else lively(seed)
        assert_same_texts(Decoder(model, compile=True), Decoder(lively(seed)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # it was compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_broken_compiler_is_one_warning(tmp_path):
    """There is no C++ compiler at CXX; nothing compiled before may help out."""
    code = (
        "from test_decoder import Decoder, assert_same_texts, lively\n"
        "assert_same_texts(Decoder(lively(), compile=True), Decoder(lively()))\n"
    )
    env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests/support", ROOT / "tests", Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: torch.compile failed, continuing without it: ")
    assert done.stderr.count("warning:") == 1


# ---------------------------------------------------------------------------------------------------------------------
# what only a GPU shows


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["eager", "captured", "compiled", "packed and compiled", "broken compiler"])
def test_gpu_writes_what_a_cpu_writes(kind, capsys, monkeypatch):
    """The next step begins before the tokens are read, rows end at different steps, and steps are recorded."""
    torch._dynamo.reset()
    if kind == "broken compiler":
        monkeypatch.setattr(torch, "compile", compiler_that_raises(NO_COMPILER))
    model = lively().cuda()
    compile = {"eager": False, "captured": None}.get(kind, True)
    decoder = Decoder(prepack(model, torch.float32, compile=True) if "packed" in kind else model, compile)
    for stop_ids in ((), (3,)):
        assert_same_texts(decoder, Decoder(lively()), stop_ids=stop_ids)
    assert decoder.capture == (kind != "eager")
    assert capsys.readouterr().err.count("warning") == (kind == "broken compiler")


@pytest.mark.gpu
def test_gpu_in_bfloat16():
    """Captured, compiled and eager steps agree up to rounding."""
    found = []
    for compile in (False, None, True):
        decoder = Decoder(prepack(lively().cuda(), torch.bfloat16, compile=bool(compile)), compile)
        decoder.reset(2, 9)
        decoder.prefill({0: [1, 2, 3], 1: [4]})
        steps = [decoder.decode_step(torch.tensor([i, i + 1], device="cuda")) for i in range(5)]
        found.append(torch.stack(steps).float())
    for steps in found[1:]:
        assert (found[0] - steps).abs().max() < 0.05 * found[0].abs().max()
