"""bench.py infer: each runner generates the same text, and the figures are those of the runners."""

import importlib.util
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from random_models import generate

import bench
from config import BenchConfig, SamplingConfig, UserError
from flatgpt.benchmarks import inference
from flatgpt.cli import cli
from flatgpt.inference.decoder import Decoder
from model import GPT

SMALL = ["infer", "--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--context_length", "64", "--device", "cpu"]
SHORT = [*SMALL, "--vocab_size", "300", "--prompt_tokens", "16", "--new_tokens", "5", "--samples", "3", "--rounds", "2"]


@pytest.fixture
def figures(in_tmp, monkeypatch):
    """The figures of a small shape, with fixed figures of loading and memory."""

    def run(*words) -> dict:
        monkeypatch.setattr(inference, "load_to_first_token", lambda model, config: 1.5)
        monkeypatch.setattr(inference, "read_bandwidth", lambda device: 40.0)
        bench.main(cli.parse(BenchConfig, [*SHORT, *words, "--json", "figures.json"]))
        return json.loads((in_tmp / "figures.json").read_text())

    return run


def test_figures_are_medians_of_the_rounds(figures, monkeypatch):
    """Each runner is called once to warm up. Then its rounds take 4, 1 and 2 seconds to the first token, and a quarter
    of that to each later one."""

    def runner(*args):
        firsts = iter([1000.0, 4.0, 1.0, 2.0])
        return lambda: (first := next(firsts)) and [first + n * first / 4 for n in range(5)]

    monkeypatch.setattr(inference, "decoder_runner", runner)
    monkeypatch.setattr(inference, "transformers_runners", lambda *args: {"float32": runner(), "bfloat16": runner()})
    found = figures("--rounds", "3")
    for name in ("float32", "bfloat16", "int8", "transformers_float32", "transformers_bfloat16"):
        assert found[f"{name}_tokens_per_s"] == 5 / 4
        assert found[f"{name}_first_ms"] == 2000
    assert found["bfloat16_x3_tokens_per_s"] == 3 * 5 / 4
    # two tokens a second after the prompt; 2 layers of 12 x 32 x 32 weights, and the head's 320 x 32: 1 byte for int8
    for name, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        read = 2 * size * (2 * 12 * 32 * 32 + 320 * 32) / 1e9
        assert found[f"{name}_gb_per_s"] == pytest.approx(read)
        assert found[f"{name}_of_bandwidth"] == pytest.approx(read / 40)
    assert "prefill_tokens_per_s" not in found  # 512 tokens are more than the context
    assert found["load_to_first_token_s"] == 1.5


def test_runners_return_the_arrival_of_each_token(monkeypatch):
    """By a clock that advances by a second each time it is read: at the call, then at each token. The streamer of
    transformers is given the prompt before; it is not a token."""
    model = GPT(cli.parse(BenchConfig, SHORT).model())
    runners = inference.transformers_runners(model, [1, 2, 3], 4, torch.device("cpu"))
    assert runners.keys() == {"float32", "bfloat16"}
    runners["ours"] = inference.decoder_runner(Decoder(model), [[1, 2, 3]], 4)
    for name, runner in runners.items():
        monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        assert runner() == ([1, 2, 3, 4] if name == "ours" else [2, 3, 4, 5])


def test_only_the_given_variants_are_timed(figures):
    found = figures("--rounds", "1", "--variants", "int8", "bfloat16_x3")
    timed = {key.removesuffix("_tokens_per_s") for key in found if key.endswith("_tokens_per_s")}
    assert timed == {"int8", "bfloat16_x3"}
    assert "load_to_first_token_s" not in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL, "--context_length", "192"], "--vocab_size"),
        ([*SMALL, "--vocab_size", "300"], "prompt_tokens \\+ new_tokens = 192 do not fit context_length = 64"),
        ([*SHORT, "--variants", "int8", "int4"], r"^variants = int4: there are float32, bfloat16, bfloat16_x3, int8$"),
    ],
)
def test_what_cannot_be_measured_is_an_error_line(in_tmp, words, message):
    with pytest.raises(UserError, match=message):
        bench.main(cli.parse(BenchConfig, words))


@pytest.mark.extra("gguf")
def test_a_gguf_file_holds_the_model(in_tmp):
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


@pytest.mark.extra("gguf")
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python compiles for a quarter of an hour"
)
def test_llama_cpp_generates_the_same_ids(in_tmp):
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
    ids = [token for token, _ in zip(peer.generate(prompt, temp=0.0), range(20), strict=False)]
    assert ids == generate(Decoder(model), prompt, 20, SamplingConfig(greedy=True))
    assert len(set(ids)) > 3
