"""bench.py infer: the speed of text generation, in turn with transformers and llama.cpp on the same shape and prompt.

Weights are random: the time of a step does not depend on them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import BenchConfig, SamplingConfig, UserError
from flatgpt.benchmarks.measure import failure, in_turn, log, script
from flatgpt.data import tokenizer
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack, prepacked_bytes
from flatgpt.inference.sampling import generate_batch
from flatgpt.runs import checkpoint
from flatgpt.runtime.device import find_device
from model import GPT

PREFILL = 512  # tokens of the prompt whose prefill is timed
Runner = Callable[[], list[float]]  # generates greedily, and returns the seconds from the call to each token


def bench_infer(config: BenchConfig) -> dict:
    """Time all variants in turn: medians of the rounds."""
    device, shape = find_device(config.device), config.model()
    length = config.prompt_tokens + config.new_tokens
    if length > shape.context_length:
        raise UserError(
            f"prompt_tokens + new_tokens = {length} do not fit context_length = {shape.context_length}: take fewer"
        )
    if shape.vocab_size is None:
        raise UserError("bench.py infer reads no data: give --vocab_size, or a recipe that has it: --config gpt2_124m")
    torch.manual_seed(config.seed)
    model = GPT(shape)
    ids = torch.randint(shape.vocab_size, (config.prompt_tokens,)).tolist()
    log(
        f"{model.num_params():,} parameters, {config.prompt_tokens} prompt tokens, {config.new_tokens} new tokens, "
        f"on {device}"
    )
    runners, weight_bytes = our_runners(model, ids, config, device)
    peers_support = shape.position == "learned" and shape.tie_weights and shape.bias
    for package, make_runners in (("transformers", transformers_runners), ("llama_cpp", llama_cpp_runners)):
        if config.variants and not any(variant.startswith(package) for variant in config.variants):
            continue
        if importlib.util.find_spec(package) is None:
            log(f"{package} is not installed: it is left out")
        elif peers_support:
            made = make_runners(model, ids, config.new_tokens, device)
            runners |= {f"{package}_{name}": runner for name, runner in made.items()}
    if unknown := set(config.variants) - set(runners):
        raise UserError(f"variants = {' '.join(sorted(unknown))}: there are {', '.join(runners)}")
    runners = {name: runner for name, runner in runners.items() if not config.variants or name in config.variants}
    for runner in runners.values():
        runner()  # warm-up: compilation, memory, the kernels' first calls
    timed = {name: lambda _, runner=runner: runner() for name, runner in runners.items()}
    results = in_turn(timed, config.rounds, lambda name, latest: f"{_rate(latest[name]):9,.1f} tokens/s")
    figures: dict = {"read_gb_per_s": read_bandwidth(device)}
    for name, rounds in results.items():
        if name == "prefill":
            figures["prefill_tokens_per_s"] = PREFILL / statistics.median(times[0] for times in rounds)
            continue
        rows = config.samples if name.endswith(f"_x{config.samples}") else 1
        figures[f"{name}_tokens_per_s"] = rows * statistics.median(map(_rate, rounds))
        figures[f"{name}_first_ms"] = 1e3 * statistics.median(times[0] for times in rounds)
        if name in weight_bytes:
            steps_per_s = statistics.median((len(times) - 1) / (times[-1] - times[0]) for times in rounds)
            figures[f"{name}_gb_per_s"] = weight_bytes[name] * steps_per_s / 1e9
            figures[f"{name}_of_bandwidth"] = figures[f"{name}_gb_per_s"] / figures["read_gb_per_s"]
    if not config.variants:
        figures["load_to_first_token_s"] = load_to_first_token(model, config)
    return figures


def _rate(times: list[float]) -> float:
    """Tokens per second from the call to the last token, prefill included."""
    return len(times) / times[-1]


def _arrivals(tokens: Iterable, began: float) -> list[float]:
    return [time.perf_counter() - began for _ in tokens]


# ---------------------------------------------------------------------------------------------------------------------
# what is timed


def our_runners(
    model: GPT, ids: list[int], config: BenchConfig, device: torch.device
) -> tuple[dict[str, Runner], dict[str, int]]:
    """Return the variants of our decoder by name, and the bytes of weights that a step of each reads."""
    runners, weight_bytes = {}, {}
    for dtype, quantize in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")):
        for compile in sorted({False, device.type == "cuda" or bool(config.compile)}):
            copy = GPT(model.config)
            copy.load_state_dict(model.state_dict())
            decoder = Decoder(prepack(copy.to(device).eval(), dtype, quantize, compile), compile)
            name = (quantize or str(dtype).removeprefix("torch.")) + "_compiled" * compile
            runners[name] = decoder_runner(decoder, [ids], config.new_tokens)
            weight_bytes[name] = prepacked_bytes(copy)
            if dtype == torch.bfloat16 and not quantize:
                runners[f"{name}_x{config.samples}"] = decoder_runner(
                    decoder, [ids] * config.samples, config.new_tokens
                )
                if copy.config.context_length >= PREFILL and not compile:
                    prompt = torch.randint(copy.config.vocab_size, (PREFILL,)).tolist()
                    runners["prefill"] = decoder_runner(decoder, [prompt], 1)
    return runners, weight_bytes


def decoder_runner(decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> Runner:
    """Return a runner that continues all prompts at once."""
    greedy = SamplingConfig(greedy=True)
    return lambda: _arrivals(generate_batch(decoder, prompts, new_tokens, greedy), time.perf_counter())


class ArrivalStreamer:
    """A streamer of transformers: it is given the prompt first, then each token."""

    def __init__(self):
        self.began, self.times = time.perf_counter(), []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter() - self.began)

    def end(self) -> None:
        pass


def transformers_runners(model: GPT, ids: list[int], new_tokens: int, device: torch.device) -> dict[str, Runner]:
    """Return runners of transformers' GPT-2 of the same shape with its default settings, by dtype."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    shape = {key: getattr(c, key) for key in ("vocab_size", "n_embd", "n_layer", "n_head")}
    runners: dict[str, Runner] = {}
    for dtype in (torch.float32, torch.bfloat16):
        peer = GPT2LMHeadModel(GPT2Config(n_positions=c.context_length, **shape)).to(device, dtype).eval()
        peer.generation_config.eos_token_id = None  # it must not end early
        prompt = torch.tensor([ids], device=device)

        def run(peer=peer, prompt=prompt) -> list[float]:
            streamer = ArrivalStreamer()
            more = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
            peer.generate(prompt, max_new_tokens=new_tokens, do_sample=False, streamer=streamer, **more)
            return streamer.times[1:]

        runners[str(dtype).removeprefix("torch.")] = run
    return runners


def llama_cpp_runners(model: GPT, ids: list[int], new_tokens: int, device: torch.device) -> dict[str, Runner]:
    """Return runners of llama.cpp with as many threads as torch, by the type of the matrices in its file."""
    import llama_cpp
    from gguf import GGMLQuantizationType as Kind

    runners: dict[str, Runner] = {}
    for name, kind in (("float32", Kind.F32), ("bfloat16", Kind.BF16), ("q8_0", Kind.Q8_0)):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            more = {"n_threads": torch.get_num_threads(), "verbose": False, "use_mmap": False}
            peer = llama_cpp.Llama(str(path), n_ctx=model.config.context_length, **more)

        def run(peer=peer) -> list[float]:
            peer.reset()  # otherwise it keeps its cache of the prompt
            tokens = peer.generate(ids, temp=0.0)
            began = time.perf_counter()
            return _arrivals((token for token, _ in zip(tokens, range(new_tokens), strict=False)), began)

        runners[name] = run
    return runners


def write_gguf(model: GPT, path: Path, kind) -> None:
    """Write a GPT-2 with tied weights and all biases as GGUF without a tokenizer; matrices have the type `kind`."""
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
    """Return the GB/s at which a sum over 1 GB reads memory: the best of five."""
    ones, best = torch.ones(250_000_000, device=device), 0.0
    for _ in range(5):
        began = time.perf_counter()
        ones.sum().item()
        best = max(best, 1.0 / (time.perf_counter() - began))
    return best


def load_to_first_token(model: GPT, config: BenchConfig) -> float:
    """Return the seconds from the start of infer.py, eager, to its first token: imports, loading, prepack, prefill."""
    try:
        encoding = tokenizer.load("gpt2" if model.config.vocab_size >= 50257 else "byte")
    except UserError as error:
        log(f"loading is timed with bytes as tokens: {error}")
        encoding = tokenizer.load("byte")
    name = {"name": encoding.name, "ranks_sha256": tokenizer.ranks_hash(encoding)}
    state = {"iter": 0, "tokenizer": name, "data": {"end_of_text": False}, "config": dataclasses.asdict(model.config)}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint.save(Path(folder), state, model.state_dict(), {}, keep=1)
        words = ["--model_path", folder, "--device", config.device, "--prompt", "The", "--max_new_tokens", 1]
        command, seconds = script("infer.py", *words, "--no-compile"), []
        for _ in range(config.rounds + 1):  # the first one fills the page cache
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                arrived = process.stdout.read(1)  # the prompt is printed when the first token is there
                seconds.append(time.perf_counter() - began)
                stderr = process.communicate()[1].decode()
            if not arrived:
                raise failure(command, stderr, process.returncode)
    return statistics.median(seconds[1:])
