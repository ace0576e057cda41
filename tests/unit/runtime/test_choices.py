"""choices.py: the fastest candidate is chosen, by injected times, for every kind of choice; choices are cached."""

import json
import math
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from in_process import TINY

from config import InferConfig, ModelConfig, TrainConfig
from flatgpt.cli import cli
from flatgpt.inference import prepacking
from flatgpt.kernels.attention import attention_steps
from flatgpt.kernels.cross_entropy import loss_steps
from flatgpt.runtime import choices
from flatgpt.training import setup
from model import GPT


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The file of cached choices, in a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/flatgpt/precision.json"


@pytest.fixture
def both(monkeypatch):
    """bfloat16 is available, whatever the CPU."""
    monkeypatch.setattr(prepacking, "has_bfloat16", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


class Steps:
    """Fake candidates: each step advances a fake clock by a given time.

    Args:
        seconds: for each candidate, a list for each step: the seconds of its calls in order; the last is repeated.
    """

    def __init__(self, **seconds: list[list[float]]):
        self.seconds, self.now = seconds, 0.0
        self.candidates = {name: partial(self._make, name) for name in seconds}

    def _make(self, name: str) -> list:
        return [self._step(iter(times), times[-1]) for times in self.seconds[name]]

    def _step(self, times, last):
        def step():
            self.now += next(times, last)

        return step

    def measured(self) -> dict[str, float]:
        return choices.measure(self.candidates, lambda: self.now)

    def chosen(self, monkeypatch) -> str:
        measure = choices.measure
        with monkeypatch.context() as patch:
            patch.setattr(choices, "measure", lambda candidates: measure(candidates, lambda: self.now))
            choice = choices.choose("steps", self.candidates)
        return f"{choice.name}: {choice.why}"


# ---------------------------------------------------------------------------------------------------------------------
# the choice


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ((2e-3, 1e-3), "b: steps: 1 ms, a 2"),
        ((1e-3, 2e-3), "a: steps: 1 ms, b 2"),
        ((1.06e-3, 1e-3), "b: steps: 1 ms, a 1.06"),
        ((1.04e-3, 1e-3), "a: steps: 1.04 ms, b 1"),  # within noise
        ((1.1e-3, 1.04e-3, 1e-3), "b: steps: 1.04 ms, a 1.1, c 1"),  # the first that is as fast as the fastest
        ((3e-3, 2e-3, 1e-3), "c: steps: 1 ms, a 3, b 2"),
    ],
)
def test_the_fastest_is_chosen(monkeypatch, seconds, chosen):
    """The first calls, which set up kernels, do not count. All times are in the text."""
    steps = Steps(**{name: [[9.0, time]] for name, time in zip("abc", seconds, strict=False)})
    assert steps.chosen(monkeypatch) == chosen


def test_other_work_on_the_machine_does_not_affect_the_choice():
    """All timed calls of b are slow, except for two of each step, in different rounds. They are waited for."""
    slow, a = 0.015, [[2e-3], [2e-3]]
    b = [[slow, 1e-3, *[slow] * 50, 1e-3, slow], [slow, slow, 1e-3, *[slow] * 60, 1e-3, slow]]
    assert Steps(a=a, b=b).measured() == pytest.approx({"a": 4e-3, "b": 2e-3})


@pytest.mark.parametrize(
    ("a", "b", "least", "most"),
    [(1e-4, 1e-4, 0.1, 0.11), (2e-2, 1e-2, 0.3, 0.31), (3.0, 3.0, 6.0, 6.1)],
)
def test_measuring_ends(a, b, least, most):
    """After 0.1 s; slow steps after 10 repeats or 3 s; very slow ones after one round."""
    steps = Steps(a=[[0, a]], b=[[0, b]])
    steps.measured()
    assert least <= steps.now <= most


def test_a_single_candidate_is_not_measured(measured):
    assert choices.choose("steps", {"a": list}).name == "a"
    assert measured() == []


def test_bfloat16_is_not_timed_if_the_cpu_lacks_it(measured, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    timed = measured("bfloat16")
    assert setup.faster_training_dtype(train_config()) == ("float32", "this CPU has no bfloat16")
    assert prepacking.choose_linear(model(), "auto")[0].name == "float32"
    assert timed == [("row-major", "transposed")]


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


def train_config(words: str = "") -> TrainConfig:
    return cli.parse(TrainConfig, [*TINY, "--vocab_size", "300", *words.split()])


@pytest.fixture
def candidates(monkeypatch) -> dict:
    """What is measured from here on, by label, which is not timed."""
    seen = {}

    def choose(label, candidates, shape=""):
        seen[label] = candidates
        return choices.Choice(next(iter(candidates)), label)

    monkeypatch.setattr(setup, "choose", choose)
    return seen


def test_training_times_shapes_of_the_run(candidates):
    """With as many tokens, sequences and heads as 1 or 2 GFLOP allow. Large vocabularies have no plain loss."""
    words = "--n_embd 1600 --n_head 25 --batch_size 16 --context_length 512 --vocab_size 50257 --dtype bfloat16"
    config = train_config(words)
    assert setup.faster_training_dtype(config).name == "float32"
    settings = setup.choose_device(config, setup.SINGLE_PROCESS, {})
    assert setup.choose_paths(config, settings, setup.SINGLE_PROCESS, {}).paths == {"attention": "plain"}
    assert [*candidates] == ["matmul 48 x 1,600 x 6,400", "bfloat16 1 x 4 x 512 x 64"]
    results = [step() for make in candidates["matmul 48 x 1,600 x 6,400"].values() for step in make()]
    assert [(y.shape, y.dtype) for y in results] == [((48, 6400), dtype) for dtype in DTYPES]
    assert (results[0] == 1600).all()  # a matmul of ones
    config = train_config("--batch_size 8 --context_length 513 --n_embd 512")
    assert [*setup.choose_paths(config, settings, setup.SINGLE_PROCESS, {}).paths] == ["loss"]
    config = train_config("--batch_size 8 --vocab_size 4000 --n_embd 512")
    assert [*setup.choose_paths(config, settings, setup.SINGLE_PROCESS, {}).paths] == ["attention", "loss"]
    assert [*candidates][3:] == ["bfloat16 8 x 2 x 32 x 256", "bfloat16 161 x 512 x 4032"]


DTYPES = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["fused", "plain"])
def test_steps_of_training_use_their_operators(dtype, path):
    """Forward and backward, with the dtype's own kernels."""
    attention = attention_steps(path, 2, 2, 4, 8, dtype, 0.0)
    loss = loss_steps(path, 6, 8, 64, dtype)
    with torch.profiler.profile() as profile:
        for step in (*attention, *loss):
            step()
    names = {event.name for event in profile.events()}
    used = {"aten::scaled_dot_product_attention": path == "fused", "_FusedLossBackward": path == "fused"}
    used |= {"NllLossBackward0": path == "plain", "SoftmaxBackward0": path == "plain"}
    for name, expected in used.items():
        assert any(name in each for each in names) == expected, name


FOUND = r"{}: [\d.e-]+ ms, (float32|bfloat16) [\d.e-]+|this CPU has no bfloat16"


def test_this_cpu_is_measured():
    whole = model()
    before = torch.get_rng_state()
    name, why = setup.faster_training_dtype(config := train_config("--dropout 0.1"))
    assert name in ("float32", "bfloat16")
    assert re.fullmatch(FOUND.format("matmul 128 x 32 x 128"), why)
    faster, layout = prepacking.choose_linear(whole, "auto")
    assert re.fullmatch(FOUND.format("matmuls of 1 token") + "|", faster.why)
    assert layout.name in prepacking.linear_classes(torch.device("cpu"), torch.float32)
    settings = setup.choose_device(config, setup.SINGLE_PROCESS, {})
    paths = setup.choose_paths(config, settings, setup.SINGLE_PROCESS, {}).paths
    assert [{*paths}, {*paths.values()} - {"fused", "plain"}] == [{"attention", "loss"}, set()]
    assert torch.equal(torch.get_rng_state(), before)  # no random number is drawn


# ---------------------------------------------------------------------------------------------------------------------
# choices that are cached


SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 8, "vocab_size": 70}


def model(**changes) -> GPT:
    return GPT(ModelConfig(**SHAPE | changes))


LAYOUTS = ("prepacked", "row-major", "transposed")


def test_a_choice_is_measured_once(measured, cache, both):
    """For each model shape, CPU, number of threads and torch version; neither weights nor context length matter."""
    timed = measured("bfloat16", "transposed")
    chosen = prepacking.choose_linear(model(), "auto")
    measured("float32", "row-major")
    assert prepacking.choose_linear(model(), "auto") == chosen
    assert prepacking.choose_linear(model(context_length=16), "auto") == chosen
    assert prepacking.choose_linear(model(), "bfloat16")[1] == chosen[1]
    assert timed == [("float32", "bfloat16"), LAYOUTS]
    assert prepacking.choose_linear(model(), "auto", rows=3)[1].name == "row-major"  # of 8 tokens
    assert prepacking.choose_linear(model(), "auto", rows=2)[0] == chosen[0]
    entries = json.loads(cache.read_text())
    key = next(iter(entries))
    assert entries[key] == {"dtype": "bfloat16", "why": "matmuls of 1 token: 1 ms, float32 2"}
    assert f"torch {torch.__version__}" in key
    assert os.listdir(cache.parent) == ["precision.json"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_packed_in_the_chosen_layout(measured, both, dtype, layout):
    measured(dtype, layout)
    packed = model()
    settings = prepacking.prepare_for_decoding(InferConfig(device="cpu"), packed)
    kind = prepacking.linear_classes(torch.device("cpu"), torch.float32)[layout]
    assert {type(m) for m in packed.modules() if isinstance(m, prepacking.CastLinear)} == {kind}
    assert settings.dtype == getattr(torch, dtype)
    assert settings.path_lines()[0].startswith(f"linear   {layout} ({dtype} matmuls of 1 token: 1 ms, ")


OTHERS = {
    "processor": (choices, "cpu_name", lambda: "another"),
    "instructions": (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    "threads": (torch, "get_num_threads", lambda: 77),
    "torch": (torch, "__version__", "2.99.0"),
}


@pytest.mark.parametrize("change", [*OTHERS, "compile", "n_layer", "n_embd", "vocab_size", "mlp_ratio"])
def test_another_machine_or_shape_is_measured_anew(measured, both, monkeypatch, change):
    """The home folder may be shared between machines. The first choice stays cached."""
    measured("bfloat16")
    prepacking.choose_linear(model(), "auto")
    measured("float32")
    shape = {change: 2 * SHAPE.get(change, 1)} if change not in (*OTHERS, "compile") else {}
    with monkeypatch.context() as patch:
        if change in OTHERS:
            patch.setattr(*OTHERS[change])
        assert prepacking.choose_linear(model(**shape), "auto", compile=change == "compile")[0].name == "float32"
    assert prepacking.choose_linear(model(), "auto")[0].name == "bfloat16"


@pytest.mark.parametrize(("limit", "timed", "compile"), [(10**9, 9, True), (5 * 32 * 32, 4, False)])
def test_the_matmuls_of_one_token_are_timed(monkeypatch, both, limit, timed, compile):
    """With each matrix of the model as prepack lays it out, the head last; of a large model a part of blocks and head.

    The step is traced, as Decoder runs it, unless the compiler replaces it.
    """
    seen = {}

    def choose(label, candidates, shape):
        seen[label] = {name: make() for name, make in candidates.items()}
        return choices.Choice([*candidates][-1], label)

    monkeypatch.setattr(prepacking, "choose", choose)
    monkeypatch.setattr(prepacking, "TIMED_ELEMENTS", limit)
    whole = model(vocab_size=200)
    prepacking.choose_linear(whole, "auto", compile=compile)
    matrices = [p for name, p in whole.named_parameters() if p.dim() == 2 and "wpe" not in name]
    matrices = [*matrices[1:timed], matrices[0]]
    share = sum(len(m.flatten()) for m in matrices[:-1]) / (24 * 32 * 32)  # of the blocks
    matrices[-1] = matrices[-1][: math.ceil(256 * share)]
    for dtype in ("float32", "bfloat16"):
        kinds = prepacking.linear_classes(torch.device("cpu"), getattr(torch, dtype), compile=compile)
        steps = seen[f"{dtype} matmuls of 1 token"]
        last = seen["matmuls of 1 token"][dtype]
        assert [*steps] == [*kinds]
        for kind, layers in zip([*kinds.values(), [*kinds.values()][-1]], [*steps.values(), last], strict=True):
            names = {getattr(step.func, "original_name", type(step.func).__name__) for step in layers}
            assert names == {kind.__name__}
            assert all(isinstance(step.func, torch.jit.ScriptModule) != compile for step in layers)
            for step, weight in zip(layers, matrices, strict=True):  # the input is ones; biases are zero at first
                y = step()
                assert y.dtype == getattr(torch, dtype)
                torch.testing.assert_close(y[0, 0].float(), weight.sum(1), atol=0.05, rtol=0.05)
    assert isinstance(whole.transformer.h[0].mlp.c_fc, torch.nn.Linear)  # the model is not changed


@pytest.mark.parametrize(
    "damaged", [b"{", b"[]", b'{"key": {"dtype": "bfloat16"}}', b'{"key": {"dtype": "b", "why": []}}', b"\xff\xfe"]
)
def test_a_damaged_cache_file_is_replaced(cache, measured, capsys, damaged):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(damaged)
    for name in "ba":
        measured(name)
        assert choices.choose("steps", {"a": list, "b": list}).name == "b"
    assert capsys.readouterr() == ("", "")


def test_a_cached_candidate_that_no_longer_exists_is_measured_anew(cache, measured):
    measured("a")
    choices.choose("steps", {"a": list, "b": list})
    cache.write_text(cache.read_text().replace('"a"', '"older"'))
    measured("b")
    assert choices.choose("steps", {"a": list, "b": list}).name == "b"


@pytest.mark.parametrize("home", [True, False])
def test_without_a_cache_it_is_measured_each_time(cache, measured, monkeypatch, capsys, home):
    """One note says so. A read-only home is not among the cases, as root can write there."""
    choices._note_once.cache_clear()
    if home:
        cache.mkdir(parents=True)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # the user has no entry in /etc/passwd
    for name in "ab":
        measured(name)
        assert choices.choose("steps", {"a": list, "b": list}).name == name
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"note: .* cannot be cached .*\n", err)
    assert not Path("~").exists()


def test_path_of_the_cache_file(cache, monkeypatch, tmp_path):
    assert choices.cache_file() == cache
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "not/absolute"):  # to be ignored by the XDG specification
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert choices.cache_file() == tmp_path / ".cache/flatgpt/precision.json"
