"""How fast text is written: our decoder beside transformers' generate and llama.cpp, same shape, same prompt, in turn.

A way of writing is a function that writes a text greedily and returns when each token was there, in seconds from the
start. Weights are random: how long a step takes does not depend on them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import BenchConfig, SamplingConfig, UserError
from flatgpt import REPO_ROOT
from flatgpt.data import tokenizer
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack, prepacked_bytes
from flatgpt.inference.sampling import generate_batch
from flatgpt.runs import checkpoint
from flatgpt.runtime.device import find_device
from model import GPT

PREFILL = 512  # tokens of the prompt whose reading is timed
Runner = Callable[[], list[float]]


def bench_infer(config: BenchConfig, say: Callable[[str], None]) -> dict:
    """Every way in turn, `rounds` times: medians."""
    device = find_device(config.device)
    shape = config.model()
    wanted, prompt = config.prompt_tokens + config.new_tokens, config.prompt_tokens
    if wanted > shape.context_length:
        raise UserError(
            f"prompt_tokens + new_tokens = {wanted} do not fit context_length = {shape.context_length}: take fewer"
        )
    if shape.vocab_size is None:
        raise UserError("bench.py infer reads no data: give --vocab_size, or a recipe that has it: --config gpt2_124m")
    torch.manual_seed(config.seed)
    first = GPT(shape)
    weights = first.state_dict()
    ids = torch.randint(shape.vocab_size, (prompt,)).tolist()
    say(f"{first.num_params():,} parameters, {prompt} tokens of prompt, {config.new_tokens} new ones, on {device}")
    ways: dict[str, Runner] = {}
    read: dict[str, int] = {}  # bytes of weights that a step reads
    for dtype, quantize in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")):
        for compile in sorted({False, device.type == "cuda" or bool(config.compile)}):
            model = GPT(shape)
            model.load_state_dict(weights)
            decoder = Decoder(prepack(model.to(device).eval(), dtype, quantize, compile), compile)
            name = (quantize or str(dtype).removeprefix("torch.")) + "_compiled" * compile
            ways[name] = _ours(decoder, [ids], config.new_tokens)
            read[name] = prepacked_bytes(model)
            if dtype == torch.bfloat16 and not quantize:
                ways[f"{name}_x{config.samples}"] = _ours(decoder, [ids] * config.samples, config.new_tokens)
                if shape.context_length >= PREFILL and not compile:
                    ways["prefill"] = _prefill(decoder, shape.vocab_size)
    for name, find, package in (
        ("transformers", _transformers, "transformers"),
        ("llama_cpp", _llama_cpp, "llama_cpp"),
    ):
        if config.variants and not any(way.startswith(name) for way in config.variants):
            continue
        if importlib.util.find_spec(package) is None:
            say(f"{package} is not installed: nothing of it beside")
        elif shape.position == "learned" and shape.tie_weights and shape.bias:
            ways |= {f"{name}_{kind}": way for kind, way in find(first, ids, config.new_tokens, device).items()}
    if unknown := set(config.variants) - set(ways):
        raise UserError(f"variants = {' '.join(sorted(unknown))}: there are {', '.join(ways)}")
    ways = {name: way for name, way in ways.items() if not config.variants or name in config.variants}
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # compilation, memory, the kernels' first calls
    for number in range(config.rounds):
        for name, way in ways.items():
            times = way()
            found[name].append(times)
            say(f"round {number + 1} {name:<24} {_rate(times):9,.1f} tokens/s")
    figures: dict = {"read_gb_per_s": read_bandwidth(device)}
    for name, rounds in found.items():
        if name == "prefill":
            figures["prefill_tokens_per_s"] = PREFILL / statistics.median(times[0] for times in rounds)
            continue
        rows = config.samples if name.endswith(f"_x{config.samples}") else 1
        figures[f"{name}_tokens_per_s"] = rows * statistics.median(map(_rate, rounds))
        figures[f"{name}_first_ms"] = 1e3 * statistics.median(times[0] for times in rounds)
        if name in read:
            steps = statistics.median((len(times) - 1) / (times[-1] - times[0]) for times in rounds)
            figures[f"{name}_gb_per_s"] = read[name] * steps / 1e9
            figures[f"{name}_of_bandwidth"] = figures[f"{name}_gb_per_s"] / figures["read_gb_per_s"]
    if not config.variants:
        figures["load_to_first_token_s"] = _load(first, config, say)
    return figures | {"torch": torch.__version__}


def _rate(times: list[float]) -> float:
    """Tokens per second from the call to the last token, the prompt's reading included."""
    return len(times) / times[-1]


def _arrivals(tokens: Iterable, began: float) -> list[float]:
    return [time.perf_counter() - began for _ in tokens]


def _ours(decoder: Decoder, prompts: list[list[int]], new: int) -> Runner:
    greedy = SamplingConfig(greedy=True)
    return lambda: _arrivals(generate_batch(decoder, prompts, new, greedy), time.perf_counter())


def _prefill(decoder: Decoder, vocab_size: int) -> Runner:
    ids = torch.randint(vocab_size, (PREFILL,)).tolist()
    return lambda: _arrivals(generate_batch(decoder, [ids], 1, SamplingConfig(greedy=True)), time.perf_counter())


class _Clock:
    """transformers' streamer: it is given the prompt first, then each token."""

    def __init__(self):
        self.began, self.times = time.perf_counter(), []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter() - self.began)

    def end(self) -> None:
        pass


def _transformers(model: GPT, ids: list[int], new: int, device: torch.device) -> dict[str, Runner]:
    """transformers' own GPT-2 of the same shape, as it comes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head
    )
    ways: dict[str, Runner] = {}
    for dtype in (torch.float32, torch.bfloat16):
        peer = GPT2LMHeadModel(theirs).to(device, dtype).eval()
        peer.generation_config.eos_token_id = None  # it must not end early
        prompt = torch.tensor([ids], device=device)

        def write(peer=peer, prompt=prompt) -> list[float]:
            clock = _Clock()
            more = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
            peer.generate(prompt, max_new_tokens=new, do_sample=False, streamer=clock, **more)
            return clock.times[1:]

        ways[str(dtype).removeprefix("torch.")] = write
    return ways


def _llama_cpp(model: GPT, ids: list[int], new: int, device: torch.device) -> dict[str, Runner]:
    """llama.cpp with as many threads as torch, on files that the package gguf writes."""
    import llama_cpp
    from gguf import GGMLQuantizationType as Kind

    ways: dict[str, Runner] = {}
    for name, kind in (("float32", Kind.F32), ("bfloat16", Kind.BF16), ("q8_0", Kind.Q8_0)):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            peer = llama_cpp.Llama(
                str(path),
                n_ctx=model.config.context_length,
                n_threads=torch.get_num_threads(),
                verbose=False,
                use_mmap=False,
            )

        def write(peer=peer) -> list[float]:
            peer.reset()  # else it keeps what it knows of the prompt
            tokens = peer.generate(ids, temp=0.0)
            began = time.perf_counter()
            return _arrivals((token for token, _ in zip(tokens, range(new), strict=False)), began)

        ways[name] = write
    return ways


def write_gguf(model: GPT, path: Path, kind) -> None:
    """A GPT-2 with tied weights and all biases as llama.cpp's file, matrices as `kind`, without a tokenizer."""
    import gguf

    names = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    names |= {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
    c, writer = model.config, gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(round(c.mlp_ratio * c.n_embd))
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        module, _, which = name.removeprefix("transformer.").rpartition(".")
        if module.startswith("h."):
            _, layer, module = module.split(".", 2)
            target = f"blk.{layer}.{names[module]}"
        else:
            target = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}[module]
        array = tensor[: c.vocab_size].numpy() if module == "wte" else tensor.numpy()
        matrix = tensor.dim() == 2 and module != "wpe"
        raw = gguf.quants.quantize(np.ascontiguousarray(array), kind if matrix else gguf.GGMLQuantizationType.F32)
        writer.add_tensor(f"{target}.{which}", raw, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bandwidth(device: torch.device) -> float:
    """GB/s at which a sum over 1 GB reads memory: the best of five."""
    ones, best = torch.ones(250_000_000, device=device), 0.0
    for _ in range(5):
        began = time.perf_counter()
        ones.sum().item()
        best = max(best, 1.0 / (time.perf_counter() - began))
    return best


def _load(model: GPT, config: BenchConfig, say: Callable[[str], None]) -> float:
    """Seconds from the start of `infer.py`, eager, to its first token: imports, loading, packing, the prompt."""
    try:
        encoding = tokenizer.load("gpt2" if model.config.vocab_size >= 50257 else "byte")
    except UserError as why:
        say(f"loading is timed with bytes as tokens: {why}")
        encoding = tokenizer.load("byte")
    name = {"name": encoding.name, "ranks_sha256": tokenizer.ranks_hash(encoding)}
    state = {"iter": 0, "tokenizer": name, "data": {"end_of_text": False}, "config": dataclasses.asdict(model.config)}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint.save(Path(folder), state, model.state_dict(), {}, keep=1)
        words = [sys.executable, str(REPO_ROOT / "infer.py"), "--model_path", folder, "--device", config.device]
        words += ["--prompt", "The", "--max_new_tokens", "1", "--no-compile"]
        taken = []
        for _ in range(config.rounds + 1):  # the first one fills the page cache
            began = time.perf_counter()
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                came = process.stdout.read(1)  # the prompt is printed when the first token is there
                taken.append(time.perf_counter() - began)
                said = process.communicate()[1].decode()
            if not came:
                raise UserError(f"infer.py failed: {said[-2000:]}")
    return statistics.median(taken[1:])
