"""precision.py: the faster dtype is chosen, by injected times; choices for decoding are cached."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from in_process import TINY

from config import ModelConfig, TrainConfig
from flatgpt.cli import cli
from flatgpt.inference import prepacking
from flatgpt.runtime import precision
from model import GPT

FLOAT32, BFLOAT16 = ("float32", "as measured: 7 GFLOP/s"), ("bfloat16", "as measured: 9 GFLOP/s")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The file of cached choices, in a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/flatgpt/precision.json"


class Steps:
    """Fake matmuls: each call advances a fake clock by a given time.

    Args:
        seconds: for each dtype, a list for each step: the seconds of its calls in order; the last is repeated.
    """

    def __init__(self, **seconds: list[list[float]]):
        self.seconds, self.now, self.calls = seconds, 0.0, 0

    def make(self, dtype: torch.dtype) -> list:
        return [self._step(iter(times), times[-1]) for times in self.seconds[str(dtype).removeprefix("torch.")]]

    def _step(self, times, last):
        def step():
            self.now += next(times, last)
            self.calls += 1

        return step

    def chosen(self) -> tuple[str, str]:
        return precision.faster_dtype("a matmul", 6e6, self.make, lambda: self.now)


@pytest.fixture
def both(monkeypatch):
    """bfloat16 is available, whatever the CPU."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)


# ---------------------------------------------------------------------------------------------------------------------
# the choice


@pytest.mark.parametrize(
    ("exact", "low", "chosen"),
    [
        (2e-3, 1e-3, "bfloat16: 6 GFLOP/s, float32 3"),  # Zen 4
        (1e-3, 2e-3, "float32: 6 GFLOP/s, bfloat16 3"),  # Xeon without AMX
        (1.06e-3, 1e-3, "bfloat16: 6 GFLOP/s, float32 5.66"),
        (1.04e-3, 1e-3, "float32: 5.77 GFLOP/s, bfloat16 6"),  # within noise
        (4e-6, 5e-6, "float32: 1,500 GFLOP/s, bfloat16 1,200"),
    ],
)
def test_the_faster_is_chosen(both, exact, low, chosen):
    """The first calls, which set up kernels, do not count. Both speeds are in the text."""
    name, why = Steps(float32=[[5.0, exact]], bfloat16=[[9.0, low]]).chosen()
    assert f"{name}: {why.removeprefix('a matmul: ')}" == chosen


def test_other_work_on_the_machine_does_not_affect_the_choice(both):
    """All timed calls in bfloat16 are slow, except for one of each step, in different rounds."""
    slow, exact = 0.015, [[2e-3], [2e-3]]
    low = [[1e-3, 1e-3, *[slow] * 30], [1e-3, slow, 1e-3, *[slow] * 30]]
    assert Steps(float32=exact, bfloat16=low).chosen() == ("bfloat16", "a matmul: 3 GFLOP/s, float32 1.5")


@pytest.mark.parametrize(
    ("exact", "low", "least", "most"),
    [(1e-4, 1e-4, 0.1, 0.11), (2e-2, 1e-2, 0.6, 0.61), (3.0, 3.0, 6.0, 6.1)],
)
def test_measuring_ends(both, exact, low, least, most):
    """After 0.1 s; slow matmuls after 20 repeats or 1 s; very slow ones after one round."""
    steps = Steps(float32=[[0, exact]], bfloat16=[[0, low]])
    steps.chosen()
    assert least <= steps.now <= most


def test_bfloat16_is_not_timed_if_the_cpu_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    steps = Steps(float32=[[1e-3]], bfloat16=[[1e-3]])
    assert steps.chosen() == ("float32", "this CPU has no bfloat16")
    assert steps.calls == 0


def test_training_times_a_matmul_of_the_models_width(monkeypatch):
    """Over as many tokens as 2 GFLOP allow: 2e9 / (2 * 1600 * 6400)."""
    seen = {}

    def faster(what, flops, make):
        seen.update(what=what, flops=flops, made=[step() for dtype in DTYPES for step in make(dtype)])
        return BFLOAT16

    monkeypatch.setattr(precision, "faster_dtype", faster)
    words = "--n_embd 1600 --n_head 25 --batch_size 16 --context_length 1024"
    assert precision.faster_training_dtype(cli.parse(TrainConfig, words.split())) == BFLOAT16
    assert seen["what"] == "matmul 97 x 1,600 x 6,400"
    assert seen["flops"] == 2 * 97 * 1600 * 6400
    assert [(y.shape, y.dtype) for y in seen["made"]] == [((97, 6400), dtype) for dtype in DTYPES]
    assert (seen["made"][0] == 1600).all()  # a matmul of ones


DTYPES = torch.float32, torch.bfloat16
FOUND = r"{}: [\d.,]+ GFLOP/s, (float32|bfloat16) [\d.,]+|this CPU has no bfloat16"


def test_this_cpu_is_measured():
    whole = model()
    before = torch.get_rng_state()
    name, why = precision.faster_training_dtype(cli.parse(TrainConfig, TINY))
    assert name in precision.CHOICES
    assert re.fullmatch(FOUND.format("matmul 128 x 32 x 128"), why)
    name, why = prepacking.faster_decoding_dtype(whole)
    assert name in precision.CHOICES
    assert re.fullmatch(FOUND.format("matmuls of one token"), why)
    assert torch.equal(torch.get_rng_state(), before)  # no random number is drawn


# ---------------------------------------------------------------------------------------------------------------------
# choices that are cached


SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 8, "vocab_size": 70}


def model(**changes) -> GPT:
    return GPT(ModelConfig(**SHAPE | changes))


def test_a_choice_is_measured_once(measured, cache):
    """For each model shape, CPU, number of threads and torch version; neither weights nor context length matter."""
    assert measured(BFLOAT16) == []
    assert prepacking.faster_decoding_dtype(model()) == BFLOAT16
    count = measured(FLOAT32)
    assert prepacking.faster_decoding_dtype(model()) == BFLOAT16
    assert prepacking.faster_decoding_dtype(model(context_length=16)) == BFLOAT16
    assert count == ["matmuls of one token"]
    ((key, entry),) = json.loads(cache.read_text()).items()
    assert entry == {"dtype": "bfloat16", "why": "as measured: 9 GFLOP/s"}
    assert f"torch {torch.__version__}" in key
    assert os.listdir(cache.parent) == ["precision.json"]


OTHERS = {
    "processor": (prepacking, "cpu_name", lambda: "another"),
    "instructions": (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    "threads": (torch, "get_num_threads", lambda: 77),
    "torch": (torch, "__version__", "2.99.0"),
}


@pytest.mark.parametrize("change", [*OTHERS, "compile", "n_layer", "n_embd", "vocab_size", "mlp_ratio"])
def test_another_machine_or_shape_is_measured_anew(measured, monkeypatch, change):
    """The home folder may be shared between machines. The first choice stays cached."""
    measured(BFLOAT16)
    prepacking.faster_decoding_dtype(model())
    measured(FLOAT32)
    shape = {change: 2 * SHAPE.get(change, 1)} if change not in (*OTHERS, "compile") else {}
    with monkeypatch.context() as patch:
        if change in OTHERS:
            patch.setattr(*OTHERS[change])
        assert prepacking.faster_decoding_dtype(model(**shape), change == "compile") == FLOAT32
    assert prepacking.faster_decoding_dtype(model()) == BFLOAT16


@pytest.mark.parametrize(("limit", "timed", "compile"), [(10**9, 9, True), (5 * 32 * 32, 3, False)])
def test_the_matmuls_of_one_token_are_timed(monkeypatch, limit, timed, compile):
    """With each matrix of the model as prepack lays it out, the head last; of a large model the first ones."""
    made = {}

    def faster(what, flops, make):
        for dtype in DTYPES:
            steps = make(dtype)
            made[dtype] = [step() for step in steps]
            layout = prepacking.linear_class(torch.device("cpu"), dtype, compile)
            assert all(isinstance(step.func, layout) for step in steps)
        made["flops"] = flops
        return FLOAT32

    monkeypatch.setattr(prepacking, "faster_dtype", faster)
    monkeypatch.setattr(prepacking, "TIMED_ELEMENTS", limit)
    whole = model(vocab_size=200)
    prepacking.faster_decoding_dtype(whole, compile)
    matrices = [p for name, p in whole.named_parameters() if p.dim() == 2 and "wpe" not in name]
    matrices = [*matrices[1:], matrices[0]][:timed]
    assert made["flops"] == 2 * sum(p.numel() for p in matrices)
    for dtype in DTYPES:
        for y, weight in zip(made[dtype], matrices, strict=True):  # the input is ones; biases are zero at first
            assert y.dtype == dtype
            torch.testing.assert_close(y[0].float(), weight.sum(1), atol=0.05, rtol=0.05)
    assert isinstance(whole.transformer.h[0].mlp.c_fc, torch.nn.Linear)  # the model is not changed


@pytest.mark.parametrize(
    "damaged", [b"{", b"[]", b'{"key": {"dtype": "bfloat16"}}', b'{"key": {"dtype": "int8", "why": ""}}', b"\xff\xfe"]
)
def test_a_damaged_cache_file_is_replaced(cache, capsys, damaged):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(damaged)
    assert precision.cached_choice("key", lambda: FLOAT32) == FLOAT32
    assert precision.cached_choice("key", lambda: BFLOAT16) == FLOAT32
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("home", [True, False])
def test_without_a_cache_it_is_measured_each_time(cache, monkeypatch, capsys, home):
    """One note says so. A read-only home is not among the cases, as root can write there."""
    if home:
        cache.mkdir(parents=True)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # the user has no entry in /etc/passwd
    for choice in (FLOAT32, BFLOAT16):
        assert precision.cached_choice("key", lambda choice=choice: choice) == choice
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(rf"note: .* cannot be cached .*--dtype {choice[0]} .*\n", err)
    assert not Path("~").exists()


def test_path_of_the_cache_file(cache, monkeypatch, tmp_path):
    assert precision.cache_file() == cache
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "not/absolute"):  # to be ignored by the XDG specification
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert precision.cache_file() == tmp_path / ".cache/flatgpt/precision.json"
