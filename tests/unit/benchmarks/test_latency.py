"""latency.py: each way writes the same text, and the figures are those of the ways."""

import importlib.util
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import bench
from config import BenchConfig, SamplingConfig, UserError
from flatgpt.benchmarks import inference
from flatgpt.cli import cli
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import Int8Linear, prepack
from flatgpt.inference.sampling import generate
from model import GPT

SMALL = ["infer", "--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--context_length", "64", "--device", "cpu"]
SHORT = [*SMALL, "--vocab_size", "300", "--prompt_tokens", "16", "--new_tokens", "5", "--samples", "3", "--rounds", "2"]


@pytest.fixture
def figures(in_tmp, monkeypatch):
    """The figures of a small shape, with fixed figures of loading and memory."""

    def run(*words) -> dict:
        monkeypatch.setattr(inference, "_load", lambda model, config, say: 1.5)
        monkeypatch.setattr(inference, "read_bandwidth", lambda device: 40.0)
        bench.main(cli.parse(BenchConfig, [*SHORT, *words, "--json", "figures.json"]))
        return json.loads((in_tmp / "figures.json").read_text())

    return run


def test_figures_are_medians_of_the_rounds(figures, monkeypatch):
    """Of each way, by what it returns: a call to warm up, then rounds of 4, 1 and 2 seconds to the first token, and a
    quarter of that to each later one."""

    def way():
        firsts = iter([1000.0, 4.0, 1.0, 2.0])
        return lambda: (first := next(firsts)) and [first + n * first / 4 for n in range(5)]

    monkeypatch.setattr(inference, "_ours", lambda decoder, prompts, new: way())
    monkeypatch.setattr(inference, "_transformers", lambda *args: {"float32": way(), "bfloat16": way()})
    found = figures("--rounds", "3")
    for name in ("float32", "bfloat16", "int8", "transformers_float32", "transformers_bfloat16"):
        assert found[f"{name}_tokens_per_s"] == 5 / 4
        assert found[f"{name}_first_ms"] == 2000
    assert found["bfloat16_x3_tokens_per_s"] == 3 * 5 / 4
    # two tokens a second after the prompt; 2 layers of 12 x 32 x 32 weights, and the head's 320 x 32
    for name, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        read = 2 * size * (2 * 12 * 32 * 32 + 320 * 32) / 1e9
        assert found[f"{name}_gb_per_s"] == pytest.approx(read)
        assert found[f"{name}_of_bandwidth"] == pytest.approx(read / 40)
    assert "prefill_tokens_per_s" not in found  # 512 tokens are more than the context
    assert found["load_to_first_token_s"] == 1.5


def test_ways_say_when_each_token_came(monkeypatch):
    """By a clock that is a second later each time it is read: first at the call, then at each token. The streamer of
    transformers is given the prompt before; it is not a token."""
    config = cli.parse(BenchConfig, SHORT)
    model = GPT(config.model())
    ways = inference._transformers(model, [1, 2, 3], 4, torch.device("cpu"))
    assert ways.keys() == {"float32", "bfloat16"}
    ways["ours"] = inference._ours(Decoder(model), [[1, 2, 3]], 4)
    for name, way in ways.items():
        monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        assert way() == ([1, 2, 3, 4] if name == "ours" else [2, 3, 4, 5])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SMALL, "--context_length", "192"], "--vocab_size"),
        ([*SMALL, "--vocab_size", "300"], "prompt_tokens \\+ new_tokens = 192 do not fit context_length = 64"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words, said):
    with pytest.raises(UserError, match=said):
        bench.main(cli.parse(BenchConfig, words))


def test_ways_that_are_asked_for_and_no_others(figures):
    found = figures("--rounds", "1", "--variants", "int8", "bfloat16_x3")
    timed = {key.removesuffix("_tokens_per_s") for key in found if key.endswith("_tokens_per_s")}
    assert timed == {"int8", "bfloat16_x3"}
    assert "load_to_first_token_s" not in found
    with pytest.raises(UserError, match=r"^variants = int4: there are float32, bfloat16, bfloat16_x3, int8$"):
        figures("--variants", "int8", "int4")


@pytest.mark.slow
def test_loading_is_timed_up_to_the_first_token(in_tmp, monkeypatch):
    """Two starts of infer.py, of which the first fills the page cache and does not count."""
    config = cli.parse(BenchConfig, [*SHORT, "--rounds", "1"])
    times = iter([0, 50, 100, 103])
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=times.__next__))
    assert inference._load(GPT(config.model()), config, print) == 3
    assert not list(in_tmp.iterdir())


@pytest.mark.extra
def test_llama_cpps_file_holds_the_model(in_tmp):
    """Read back by gguf: names, shapes and values; Q8_0 within half a step of its blocks of 32."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model = GPT(cli.parse(BenchConfig, SHORT).model())
    for kind in (Kind.F32, Kind.BF16, Kind.Q8_0):
        inference.write_gguf(model, in_tmp / "model.gguf", kind)
        tensors = {t.name: t for t in GGUFReader(in_tmp / "model.gguf").tensors}
        assert len(tensors) == len(model.state_dict())
        head = tensors["token_embd.weight"]
        got = torch.tensor(dequantize(head.data, head.tensor_type))
        expected = model.transformer.wte.weight[:300].detach()
        assert got.shape == expected.shape
        step = {Kind.F32: 0.0, Kind.BF16: 2.0**-8, Kind.Q8_0: 1 / 127}[kind] * expected.abs().max()
        assert (got - expected).abs().max() <= step
        block = tensors["blk.1.ffn_down.weight"]
        assert torch.tensor(dequantize(block.data, block.tensor_type)).shape == (32, 128)


@pytest.mark.extra
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python compiles for a quarter of an hour"
)
def test_llama_cpp_writes_what_we_write(in_tmp):
    """Greedy, float32: the file means the same to llama.cpp."""
    torch.manual_seed(0)
    model = GPT(cli.parse(BenchConfig, SHORT).model()).eval()
    with torch.no_grad():
        for p in model.parameters():  # lively: each next token clear
            p.mul_(5 if p.dim() == 2 else 1)
    import llama_cpp
    from gguf import GGMLQuantizationType as Kind

    inference.write_gguf(model, in_tmp / "model.gguf", Kind.F32)
    peer = llama_cpp.Llama("model.gguf", n_ctx=64, n_threads=1, verbose=False)
    prompt = [5, 200, 17, 3]
    theirs = [token for token, _ in zip(peer.generate(prompt, temp=0.0), range(20), strict=False)]
    assert theirs == list(generate(Decoder(model), prompt, 20, SamplingConfig(greedy=True)))
    assert len(set(theirs)) > 3


def test_packed_models_are_what_is_measured(monkeypatch, figures):
    """int8 means Int8Linear, the head's too."""
    seen = []
    real = prepack

    def spy(model, dtype, quantize=None, compile=False):
        seen.append((dtype, quantize, compile))
        return real(model, dtype, quantize, compile)

    monkeypatch.setattr(inference, "prepack", spy)
    figures("--rounds", "1")
    low = torch.bfloat16
    assert seen == [(torch.float32, None, False), (low, None, False), (low, "int8", False)]
    assert isinstance(real(GPT(cli.parse(BenchConfig, SHORT).model()), low, "int8").lm_head, Int8Linear)
