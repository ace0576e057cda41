"""bench.py infer and eval: the speed of generation and of scoring, in turn with transformers and llama.cpp."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from config import BenchConfig, SamplingConfig, UserError, run_dir
from flatgpt.benchmarks.measure import Process, in_turn, log, script, speedup
from flatgpt.data import tokenizer
from flatgpt.data.dataset import open_dataset
from flatgpt.evaluation.metrics import default_batch_size, eval_batches, token_statistics
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import prepack, prepacked_bytes
from flatgpt.inference.sampling import generate_batch
from flatgpt.interop import loading
from flatgpt.interop.export_folder import export_problems, hugging_face_config, to_hugging_face
from flatgpt.runs import checkpoint
from flatgpt.runtime.device import find_device, select_device
from model import GPT

PREFILL = 512  # tokens of the prompt whose prefill is timed
KINDS = {  # dtype and quantization of our variants
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
}
Runner = Callable[[], list[float]]  # generates greedily, and returns the seconds from the call to each token


def bench_infer(config: BenchConfig) -> dict:
    """Time all variants in turn: medians of the rounds. Weights are random: the time of a step does not depend on them.

    The peers have the same weights and prompt.
    """
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
    log(f"{model.num_params():,} parameters, {len(ids)} prompt tokens, {config.new_tokens} new tokens, on {device}")
    known, runners, weight_bytes = [], {}, {}

    def wanted(name: str) -> bool:
        known.append(name)
        return not config.variants or name in config.variants

    @functools.cache
    def decoder(kind: str, compile: bool) -> Decoder:
        dtype, quantize = KINDS[kind]
        copy = GPT(shape)
        copy.load_state_dict(model.state_dict())
        return Decoder(prepack(copy.to(device).eval(), dtype, quantize, compile), compile)

    for kind, compile in itertools.product(KINDS, sorted({False, device.type == "cuda" or bool(config.compile)})):
        name = kind + "_compiled" * compile
        if wanted(name):
            runners[name] = decoder_runner(decoder(kind, compile), [ids], config.new_tokens)
            weight_bytes[name] = prepacked_bytes(decoder(kind, compile).model)  # that a step reads
        if kind == "bfloat16" and wanted(several := f"{name}_x{config.samples}"):
            runners[several] = decoder_runner(decoder(kind, compile), [ids] * config.samples, config.new_tokens)
    if shape.context_length >= PREFILL and wanted("prefill"):
        prompt = torch.randint(shape.vocab_size, (PREFILL,)).tolist()
        runners["prefill"] = decoder_runner(decoder("bfloat16", False), [prompt], 1)
    for package, make_runner, kinds in (
        ("transformers", transformers_runner, ("float32", "bfloat16")),
        ("llama_cpp", llama_cpp_runner, ("float32", "bfloat16", "q8_0")),
    ):
        if not importlib.util.find_spec(package):
            log(f"{package} is not installed: it is left out")
        elif shape.position == "learned" and shape.tie_weights and shape.bias:
            for kind in kinds:
                if wanted(name := f"{package}_{kind}"):
                    runners[name] = make_runner(model, ids, config.new_tokens, kind, device)
    if unknown := set(config.variants) - set(known):
        raise UserError(f"variants = {' '.join(sorted(unknown))}: there are {', '.join(known)}")
    for runner in runners.values():
        runner()  # warm-up: compilation, memory, the kernels' first calls
    results = in_turn(runners, config.rounds)
    figures: dict = {"read_gb_per_s": read_bandwidth(device)}
    for name, rounds in results.items():
        first = statistics.median(times[0] for times in rounds)
        if name == "prefill":
            figures["prefill_tokens_per_s"] = PREFILL / first
            continue
        texts = config.samples if name.endswith(f"_x{config.samples}") else 1
        figures[f"{name}_tokens_per_s"] = texts * statistics.median(len(times) / times[-1] for times in rounds)
        figures[f"{name}_first_ms"] = 1e3 * first
        if name in weight_bytes:
            steps_per_s = statistics.median((len(times) - 1) / (times[-1] - times[0]) for times in rounds)
            figures[f"{name}_gb_per_s"] = weight_bytes[name] * steps_per_s / 1e9
            figures[f"{name}_of_bandwidth"] = figures[f"{name}_gb_per_s"] / figures["read_gb_per_s"]
    if not config.variants:
        figures["load_to_first_token_s"] = load_to_first_token(model, config)
    return figures


def _arrivals(tokens: Iterable, began: float) -> list[float]:
    return [time.perf_counter() - began for _ in tokens]


def decoder_runner(decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> Runner:
    """Return a runner that continues all prompts at once."""
    greedy = SamplingConfig(greedy=True)
    return lambda: _arrivals(generate_batch(decoder, prompts, new_tokens, greedy), time.perf_counter())


def transformers_model(model: GPT):
    """Return transformers' GPT-2 with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if reasons := export_problems(model):
        raise UserError(f"transformers cannot compute this model: {'; '.join(reasons)}")
    peer = GPT2LMHeadModel(GPT2Config(**hugging_face_config(model.config, 0, "float32")))
    peer.load_state_dict(to_hugging_face(model), strict=False)  # a tied head is stored once
    return peer.eval()


def transformers_runner(model: GPT, ids: list[int], new_tokens: int, kind: str, device: torch.device) -> Runner:
    """Return a runner of transformers with its default settings."""
    peer = transformers_model(model).to(device, KINDS[kind][0])
    peer.generation_config.eos_token_id = None  # it must not end early
    prompt = torch.tensor([ids], device=device)
    settings = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}

    def run() -> list[float]:
        began, times = time.perf_counter(), []
        streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter() - began), end=lambda: None)
        peer.generate(prompt, max_new_tokens=new_tokens, streamer=streamer, **settings)
        return times[1:]  # it is given the prompt first

    return run


def llama_cpp_runner(model: GPT, ids: list[int], new_tokens: int, kind: str, device: torch.device) -> Runner:
    """Return a runner of llama.cpp with as many threads as torch."""
    import llama_cpp

    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}[kind])
        more = {"n_threads": torch.get_num_threads(), "verbose": False, "use_mmap": False}
        peer = llama_cpp.Llama(str(path), n_ctx=model.config.context_length, **more)

    def run() -> list[float]:
        peer.reset()  # otherwise it keeps its cache of the prompt
        began = time.perf_counter()
        return _arrivals(itertools.islice(peer.generate(ids, temp=0.0), new_tokens), began)

    return run


def write_gguf(model: GPT, path: Path, kind: str) -> None:
    """Write a GPT-2 with tied weights and all biases as GGUF without a tokenizer.

    Args:
        kind: gguf's type of the matrices; the other tensors are F32.
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
        dtype = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), dtype), raw_dtype=dtype)
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
    encoding = tokenizer.load("gpt2" if model.config.vocab_size >= 50257 else "byte")
    name = {"name": encoding.name, "ranks_sha256": tokenizer.ranks_hash(encoding)}
    state = {"iter": 0, "tokenizer": name, "data": {"end_of_text": False}, "config": dataclasses.asdict(model.config)}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint.save(Path(folder), state, model.state_dict(), {}, keep=1)
        words = ("--model_path", folder, "--device", config.device, "--prompt", "The", "--max_new_tokens", 1)
        seconds = []
        for _ in range(config.rounds + 1):  # the first one fills the page cache
            began = time.perf_counter()
            with Process(script("infer.py", *words, "--no-compile")) as process:
                process.stdout.read(1)  # the prompt is printed when the first token is there
                seconds.append(time.perf_counter() - began)
                process.communicate()
                process.require_success()
    return statistics.median(seconds[1:])


# ---------------------------------------------------------------------------------------------------------------------
# scoring


def bench_eval(config: BenchConfig) -> dict:
    """Time eval.py's stride protocol in turn with the loop of transformers' documentation, on the same tokens.

    Each window of https://huggingface.co/docs/transformers/perplexity scores the same tokens with the same context.

    Returns:
        medians of the rounds, and the median of their ratios.
    """
    device = select_device(config.device, "float32")
    found = loading.find(config.model_path or str(run_dir(config)), log)
    model, _ = loading.load(found, device.device)
    dataset = open_dataset(Path(config.data_dir) / config.dataset)
    tokens = dataset.tokens(config.split)
    ids, context_length = tokens[: config.text_tokens or len(tokens)], model.config.context_length
    if len(ids) < context_length:
        raise UserError(f"text_tokens = {len(ids):,}: one window has {context_length:,}; take more")
    log(f"{found.describe()}; {len(ids):,} tokens of {dataset.folder} {config.split}; {device.describe()}")
    peer = transformers_model(model).to(device.device)
    text = torch.from_numpy(ids.astype(np.int64))[None].to(device.device)  # (1, tokens)
    model, T = prepack(model, device.dtype), context_length - 1  # transformers shifts labels: T + 1 tokens score T

    def ours() -> float:
        batches = eval_batches(ids, T, default_batch_size(T, device.device), stride=context_length // 2)
        sums = token_statistics(model, batches, device.to_device)
        return sums["position_loss"].sum() / sums["targets"].sum()

    def timed(loss: Callable[[], float]) -> tuple[float, float]:
        began = time.perf_counter()
        return loss(), time.perf_counter() - began

    runners = {"ours": ours, "transformers": lambda: transformers_loss(peer, text, context_length)}
    runners = {name: functools.partial(timed, loss) for name, loss in runners.items()}
    results = in_turn(runners, config.rounds)
    figures: dict = {"tokens": len(ids) - 1, "window": context_length}
    seconds = {name: [each for _, each in rounds] for name, rounds in results.items()}
    for name, rounds in results.items():
        median = statistics.median(seconds[name])
        figures |= {f"{name}_s": median, f"{name}_tokens_per_s": (len(ids) - 1) / median}
        figures[f"{name}_perplexity"] = math.exp(rounds[-1][0])
    figures["times_as_fast"] = speedup(seconds["ours"], seconds["transformers"])["median"]
    return figures | {"machine": device.describe()}


@torch.no_grad()
def transformers_loss(peer, text: torch.Tensor, T: int) -> float:
    """Return transformers' nats per token of a text (1, tokens), one window of T tokens at a time.

    Labels of -100 stand for the tokens that an earlier window scored.
    """
    loss, count, previous_stop = 0.0, 0, 0
    for start in range(0, text.shape[1] - T + T // 2, T // 2):
        stop = min(start + T, text.shape[1])
        window = text[:, start:stop]
        labels = window.clone()
        labels[:, : previous_stop - start] = -100
        scored = int((labels[:, 1:] != -100).sum())
        loss += float(peer(window, labels=labels).loss) * scored
        count, previous_stop = count + scored, stop
    return loss / count
