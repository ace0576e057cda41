"""bench.py infer: each runner generates the same text, and the figures are those of the runners."""

import itertools
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import bench
from config import BenchConfig, UserError
from flatgpt.benchmarks import inference
from flatgpt.cli import cli
from model import GPT

pytestmark = pytest.mark.slow

SMALL = ["infer", "--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--context_length", "64", "--device", "cpu"]
SHORT = [*SMALL, "--vocab_size", "300", "--prompt_tokens", "16", "--new_tokens", "5", "--samples", "3", "--rounds", "3"]


@pytest.mark.parametrize("variants", [(), ("int8", "bfloat16_x3")])
def test_figures_are_medians_of_the_rounds(in_tmp, monkeypatch, variants):
    """Each runner is called once to warm up. Then its rounds take 4, 1 and 2 seconds to the first token, and a quarter
    of that to each later one. With --variants only those are timed."""

    def runner(*args):
        firsts = iter([1000.0, 4.0, 1.0, 2.0])
        return lambda: (first := next(firsts)) and [first + n * first / 4 for n in range(5)]

    def peer(*args, **options):
        runs = {1: runner(), 3: runner()}
        return lambda prompts: runs[len(prompts)]()

    class Here:  # a peer in this process
        def __init__(self, start, *args):
            self.run = start(*args)
            self.available = self.run is not None

        def __call__(self, prompts):
            return self.run(prompts)

        def close(self):
            pass

    monkeypatch.setattr(inference, "OwnProcess", Here)
    monkeypatch.setattr(inference, "flatgpt_peer", peer)
    monkeypatch.setattr(inference, "transformers_peer", peer)
    monkeypatch.setattr(inference, "ctranslate2_peer", lambda *args: None)  # as if it refused
    found = {"transformers": True, "ctranslate2": True}.get
    monkeypatch.setattr(inference, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=found)))
    monkeypatch.setattr(inference, "load_to_first_token", lambda model, config: 1.5)
    monkeypatch.setattr(inference, "read_bandwidth", lambda device: 40.0)
    bench.main(cli.parse(BenchConfig, [*SHORT, *(["--variants", *variants] if variants else []), "--json", "a.json"]))
    found = json.loads((in_tmp / "a.json").read_text())
    all_variants = [f"{name}{suffix}" for name in ("float32", "bfloat16", "int8") for suffix in ("", "_x3")]
    all_variants += [f"transformers_{name}" for name in all_variants[:4]]
    assert {key.removesuffix("_first_ms") for key in found if key.endswith("_first_ms")} == set(
        variants or all_variants
    )
    # two tokens a second after the prompt; 2 layers of 12 x 32 x 32 weights, and the head's 320 x 32: 1 byte for int8
    for name in variants or all_variants:
        assert found[f"{name}_tokens_per_s"] == (3 if name.endswith("_x3") else 1) * 5 / 4
        assert found[f"{name}_first_ms"] == 2000
        if size := {"float32": 4, "bfloat16": 2, "int8": 1}.get(name.removesuffix("_x3")):
            read = 2 * size * (2 * 12 * 32 * 32 + 320 * 32) / 1e9
            assert found[f"{name}_gb_per_s"] == pytest.approx(read)
            assert found[f"{name}_of_bandwidth"] == pytest.approx(read / 40)
    assert "prefill_tokens_per_s" not in found  # 512 tokens are more than the context
    assert found.get("load_to_first_token_s") == (None if variants else 1.5)


def test_runners_return_the_arrival_of_each_token(monkeypatch):
    """By a clock that advances by a second each time it is read: at the call, then at each token. The streamer of
    transformers is given the prompt before; it is not a token."""
    model, prompt, device = GPT(cli.parse(BenchConfig, SHORT).model()), [1, 2, 3], torch.device("cpu")
    runners = {
        partial(inference.flatgpt_peer(model, 4, "float32", device), [prompt]): [1, 2, 3, 4],
        partial(inference.transformers_peer(model, 4, "bfloat16", device), [prompt]): [2, 3, 4, 5],
        partial(inference.transformers_peer(model, 4, "bfloat16", device), [prompt] * 3): [2, 3, 4, 5],
    }
    for runner, arrivals in runners.items():
        monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        assert runner() == arrivals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL, "--context_length", "192"], "--vocab_size"),
        ([*SMALL, "--vocab_size", "300"], "prompt_tokens \\+ new_tokens = 192 do not fit context_length = 64"),
        ([*SHORT, "--variants", "int8", "int4"], r"^variants = int4: choose from float32, float32_x3, bfloat16"),
    ],
)
def test_what_cannot_be_measured_is_an_error_line(in_tmp, words, message):
    with pytest.raises(UserError, match=message):
        bench.main(cli.parse(BenchConfig, words))


@pytest.mark.extra("ctranslate2")
def test_runs_of_ctranslate2_write_what_ours_write(in_tmp, monkeypatch):
    """Greedy ids in float32, and the time of each token, for one prompt and for three."""
    import ctranslate2

    class Recorded(ctranslate2.Generator):
        def generate_batch(self, *args, **settings):
            results.extend(super().generate_batch(*args, **settings))

    monkeypatch.setattr(ctranslate2, "Generator", Recorded)
    model, prompts, device = GPT(cli.parse(BenchConfig, SHORT).model()).eval(), [[1, 2, 3]] * 3, torch.device("cpu")
    expected = model.generate(torch.tensor(prompts), max_new_tokens=4, greedy=True)[:, 3:].tolist()
    peer = inference.ctranslate2_peer(model, 4, "float32", device)
    for count in (1, 3):
        results: list = []
        assert len(peer(prompts[:count])) == 4
        assert [ids for result in results for ids in result.sequences_ids] == expected[:count]
    assert inference.ctranslate2_peer(model, 4, "float16", device) is None, "not on a CPU"


@pytest.mark.extra("gguf")
@pytest.mark.parametrize(("kind", "step"), [("F32", 0.0), ("BF16", 2.0**-8), ("Q8_0", 1 / 127)])
def test_a_gguf_file_holds_the_model(in_tmp, kind, step):
    """Read back by gguf: names, shapes and values; Q8_0 within half a step of its blocks of 32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    model = GPT(cli.parse(BenchConfig, SHORT).model())
    inference.write_gguf(model, in_tmp / "model.gguf", kind)
    tensors = {t.name: t for t in GGUFReader(in_tmp / "model.gguf").tensors}
    layer = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    names = {f"blk.{n}.{name}.{which}" for n in range(2) for name in layer for which in ("weight", "bias")}
    names |= {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"}
    assert set(tensors) == names
    for name, expected in (
        ("token_embd.weight", model.transformer.wte.weight[:300].detach()),
        ("blk.1.ffn_down.weight", model.transformer.h[1].mlp.c_proj.weight.detach()),
    ):
        got = torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type))
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= step * expected.abs().max()
