"""bench.py infer: compare generation with transformers, llama.cpp and CTranslate2."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from config import BenchConfig, ModelConfig, SamplingConfig, UserError
from flatgpt.benchmarks.machine import read_bandwidth
from flatgpt.benchmarks.measure import OwnProcess, Process, interleave, log, script
from flatgpt.data import tokenizer
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import choose_linear, prepack
from flatgpt.inference.sampling import generate_batch
from flatgpt.interop.export_folder import export_problems, hugging_face_config, to_hugging_face
from flatgpt.runs import checkpoint
from flatgpt.runtime.device import find_device
from model import GPT

PREFILL_TOKENS = 512  # length of the prompt for the prefill benchmark
PRECISIONS = {  # dtype and quantization of flatGPT's variants
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
}
# Generates greedily for prompts, and returns the time of each token in seconds since the call.
Peer = Callable[[list[list[int]]], list[float]]


def bench_infer(config: BenchConfig) -> dict:
    """Time all variants, interleaved. Return medians over the rounds. Each precision of each has its own process.

    All variants have the same prompt and random weights. The time of a step does not depend on the weights.
    """
    device, shape = find_device(config.device), config.model()
    length = config.prompt_tokens + config.new_tokens
    if length > shape.context_length:
        raise UserError(
            f"prompt_tokens + new_tokens = {length} do not fit context_length = {shape.context_length}: choose fewer"
        )
    if shape.vocab_size is None:
        raise UserError("bench.py infer needs --vocab_size, or a recipe that sets it, such as --config gpt2_124m")
    torch.manual_seed(config.seed)
    model = GPT(shape)
    ids = torch.randint(shape.vocab_size, (config.prompt_tokens,)).tolist()
    log(f"{model.num_params():,} parameters, {len(ids)} prompt tokens, {config.new_tokens} new tokens, on {device}")
    names, runners = [], {}
    batches = {"": [ids], f"_x{config.samples}": [ids] * config.samples}

    def selected(name: str) -> bool:
        names.append(name)
        return not config.variants or name in config.variants

    on_cuda, modes = device.type == "cuda", [False if config.compile is False else None]  # None: infer.py's default
    if config.compile or (on_cuda and config.compile is None):
        modes.append(True)
    precisions = [name for name in PRECISIONS if name != "int8" or not on_cuda]
    peers = [
        (precision + "_compiled" * bool(compile), functools.partial(flatgpt_peer, compile=compile), precision, batches)
        for precision, compile in itertools.product(precisions, modes)
    ]
    for package, make_peer, precisions in (
        ("transformers", transformers_peer, ("float32", "bfloat16")),
        ("llama_cpp", llama_cpp_peer, ("float32", "bfloat16", "q8_0")),
        ("ctranslate2", ctranslate2_peer, ("float32", "bfloat16", "int8")),
    ):
        if not importlib.util.find_spec(package):
            log(f"{package} is not installed and is skipped")
        elif shape.position == "learned" and shape.tie_weights and shape.bias:
            # the Python interface of llama.cpp generates one text at a time
            supported = batches if package != "llama_cpp" else {"": [ids]}
            peers += [(f"{package}_{precision}", make_peer, precision, supported) for precision in precisions]
    if shape.context_length >= PREFILL_TOKENS:
        prompt = torch.randint(shape.vocab_size, (PREFILL_TOKENS,)).tolist()
        peers.append(("prefill", functools.partial(flatgpt_peer, compile=False), "bfloat16", {"": [prompt]}))
    with contextlib.ExitStack() as stack:
        for name, make_peer, precision, prompts in peers:
            if chosen := [suffix for suffix in prompts if selected(name + suffix)]:
                new_tokens = 1 if name == "prefill" else config.new_tokens
                peer = OwnProcess(start_peer, make_peer, shape, config.seed, new_tokens, precision, device)
                stack.callback(peer.close)
                for suffix in chosen if peer.available else ():
                    runners[name + suffix] = functools.partial(peer, prompts[suffix])
        if unknown := set(config.variants) - set(names):
            raise UserError(f"variants = {' '.join(sorted(unknown))}: choose from {', '.join(names)}")
        for runner in runners.values():
            runner()  # warm-up: compilation, memory allocation, first kernel launches
        results = interleave(runners, config.rounds)
    figures: dict = {"read_gb_per_s": read_bandwidth(device)}
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    sizes = {"float32": 4 * weights, "bfloat16": 2 * weights, "int8": weights}  # bytes that a step of ours reads
    for name, rounds in results.items():
        first = statistics.median(times[0] for times in rounds)
        if name == "prefill":
            figures["prefill_tokens_per_s"] = PREFILL_TOKENS / first
            continue
        texts = config.samples if name.endswith(f"_x{config.samples}") else 1
        figures[f"{name}_tokens_per_s"] = texts * statistics.median(len(times) / times[-1] for times in rounds)
        figures[f"{name}_first_ms"] = 1e3 * first
        if size := sizes.get(name.split("_")[0]):
            steps_per_s = statistics.median((len(times) - 1) / (times[-1] - times[0]) for times in rounds)
            figures[f"{name}_gb_per_s"] = size * steps_per_s / 1e9
            figures[f"{name}_of_bandwidth"] = figures[f"{name}_gb_per_s"] / figures["read_gb_per_s"]
    if not config.variants:
        figures["load_to_first_token_s"] = load_to_first_token(model, config)
    return figures


def start_peer(make_peer: Callable, shape: ModelConfig, seed: int, *args) -> Peer | None:
    """Return a peer with the weights of bench_infer's model. Called in the peer's process."""
    torch.manual_seed(seed)
    return make_peer(GPT(shape), *args)


def _token_times(tokens: Iterable, start: float) -> list[float]:
    return [time.perf_counter() - start for _ in tokens]


def flatgpt_peer(
    model: GPT, new_tokens: int, precision: str, device: torch.device, compile: bool | None = None
) -> Peer:
    """Return a peer that generates as infer.py does, with the layouts that it chooses for the number of texts."""
    find_device(device.type)
    dtype, quantize = PRECISIONS[precision]

    @functools.cache
    def packed(layout: str | None) -> GPT:
        copy = GPT(model.config)
        copy.load_state_dict(model.state_dict())
        return prepack(copy.to(device).eval(), dtype, quantize, bool(compile), layout)

    @functools.cache
    def decoder(rows: int) -> Decoder:
        if device.type != "cpu":
            return Decoder(packed(None), compile)
        name = str(dtype).removeprefix("torch.")
        return Decoder(packed(choose_linear(model, name, quantize, bool(compile), rows)[1].name), compile)

    def run(prompts: list[list[int]]) -> list[float]:
        made, greedy = decoder(len(prompts)), SamplingConfig(greedy=True)
        return _token_times(generate_batch(made, prompts, new_tokens, greedy), time.perf_counter())

    return run


def transformers_model(model: GPT):
    """Return transformers' GPT-2 model with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if reasons := export_problems(model.config):
        raise UserError(f"transformers does not support this model: {'; '.join(reasons)}")
    peer = GPT2LMHeadModel(GPT2Config(**hugging_face_config(model.config, 0, "float32")))
    peer.load_state_dict(to_hugging_face(model), strict=False)  # the state dict has no tied head
    return peer.eval()


def transformers_peer(model: GPT, new_tokens: int, precision: str, device: torch.device) -> Peer:
    """Return a peer of transformers with its default settings."""
    peer = transformers_model(model).to(device, PRECISIONS[precision][0])
    peer.generation_config.eos_token_id = None  # do not stop early

    def run(prompts: list[list[int]]) -> list[float]:
        batch = torch.tensor(prompts, device=device)
        settings = {"do_sample": False, "attention_mask": torch.ones_like(batch), "pad_token_id": 0}
        start, times = time.perf_counter(), []
        streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter() - start), end=lambda: None)
        peer.generate(batch, max_new_tokens=new_tokens, streamer=streamer, **settings)
        return times[1:]  # the streamer receives the prompt first

    return run


@torch.no_grad()
def ctranslate2_peer(model: GPT, new_tokens: int, precision: str, device: torch.device) -> Peer | None:
    """Return a peer of CTranslate2 with as many threads as torch; None if it refuses the precision on this device."""
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    if precision not in ctranslate2.get_supported_compute_types(device.type):
        return log(f"ctranslate2 does not support {precision} on this {device.type} and is skipped")
    ids = {str(n): n for n in range(model.config.vocab_size)}  # its tokens are texts
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "0")
    spec = GPT2Loader()(transformers_model(model), SimpleNamespace(get_vocab=lambda: ids, **special))
    spec.validate()
    spec.optimize(quantization=precision)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        spec.save(folder)
        options = {"compute_type": precision, "intra_threads": torch.get_num_threads()}
        peer = ctranslate2.Generator(folder, device.type, **options)
    settings = {"max_length": new_tokens, "min_length": new_tokens, "include_prompt_in_result": False}

    def run(prompts: list[list[int]]) -> list[float]:
        start, times = time.perf_counter(), [[] for _ in prompts]

        def receive(token) -> bool:
            times[token.batch_id].append(time.perf_counter() - start)
            return False  # do not stop

        peer.generate_batch([[str(n) for n in ids] for ids in prompts], callback=receive, **settings)
        return times[0]

    return run


def llama_cpp_peer(model: GPT, new_tokens: int, precision: str, device: torch.device) -> Peer:
    """Return a peer of llama.cpp with as many threads as torch. It generates for the first prompt only."""
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params()
    # Its AMX kernels for quantized matrices stop the process (llama.cpp's issue 20824).
    defaults.use_extra_bufts = False
    patch = mock.patch("llama_cpp.llama_cpp.llama_model_default_params", return_value=defaults)
    with tempfile.TemporaryDirectory(dir=".") as folder, patch:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}[precision])
        options = {"n_threads": torch.get_num_threads(), "verbose": False, "use_mmap": False}
        peer = llama_cpp.Llama(str(path), n_ctx=model.config.context_length, **options)

    def run(prompts: list[list[int]]) -> list[float]:
        peer.reset()  # clear the KV cache
        start = time.perf_counter()
        return _token_times(itertools.islice(peer.generate(prompts[0], temp=0.0), new_tokens), start)

    return run


def write_gguf(model: GPT, path: Path, matrix_type: str) -> None:
    """Write a GPT-2 model with tied weights and all biases as GGUF, without a tokenizer.

    Args:
        matrix_type: GGUF type of the matrices; the other tensors are F32.
    """
    import gguf

    c, writer = model.config, gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(round(c.mlp_ratio * c.n_embd))
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for name, tensor in model.state_dict().items():
        array = (tensor[: c.vocab_size] if "wte" in name else tensor).numpy()
        matrix = tensor.dim() == 2 and "wpe" not in name
        dtype = gguf.GGMLQuantizationType[matrix_type if matrix else "F32"]
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_to_first_token(model: GPT, config: BenchConfig) -> float:
    """Return the seconds from the start of infer.py --no-compile to its first token, including imports and loading."""
    encoding = tokenizer.load("gpt2" if model.config.vocab_size >= 50257 else "byte")
    name = {"name": encoding.name, "ranks_sha256": tokenizer.ranks_hash(encoding)}
    state = {"iter": 0, "tokenizer": name, "data": {"end_of_text": False}, "config": dataclasses.asdict(model.config)}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint.save(Path(folder), state, model.state_dict(), {}, keep=1)
        args = ("--model_path", folder, "--device", config.device, "--prompt", "The", "--max_new_tokens", 1)
        seconds = []
        for _ in range(config.rounds + 1):  # the first run fills the page cache
            start = time.perf_counter()
            with Process(script("infer.py", *args, "--no-compile")) as process:
                process.stdout.read(1)  # infer.py prints the prompt with the first token
                seconds.append(time.perf_counter() - start)
                process.communicate()
                process.require_success()
    return statistics.median(seconds[1:])
