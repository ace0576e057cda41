"""Estimate size, memory and time of a run before it starts, for `train.py --plan`.

Memory is estimated for CUDA kernels in eager mode. It was within 1% of an H200's peak; compiled, the peak was 5% higher
(docs/speed.md). Sizes are named as in model.py: B batch, T time, C channels, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from config import ModelConfig, TrainConfig, UserError, count_of, format_decimal
from flatgpt.data.dataset import Windows, open_dataset, resolve_data_settings
from flatgpt.kernels import cross_entropy
from flatgpt.runs.clock import duration
from flatgpt.runtime.device import peak_flops
from flatgpt.runtime.distributed import DistributedContext
from flatgpt.training.optimizer import optimizer_on_meta
from flatgpt.training.setup import choose_device
from model import GPT

FLOAT32, INT64 = 4, 8  # bytes
GPUS = ("T4", "A10G", "A100", "H100", "H200")  # rows of --plan; device.py has their peak FLOP/s


def print_plan(config: TrainConfig, ranks: DistributedContext) -> None:
    """Print the size, memory and time of a run without training. Uses the dataset's counts if it is prepared."""
    device_settings, folder, windows = choose_device(config, ranks, {}), Path(config.data_dir) / config.dataset, None
    if config.vocab_size is None or any(folder.glob("*.bin")):
        try:
            config, windows = resolve_data_settings(config, open_dataset(folder))
        except UserError as error:
            raise UserError(f"{error}; or add --vocab_size for a plan without the dataset") from None
    model, dtype = GPT.on_meta_device(config.model()), "bfloat16" if config.dtype == "auto" else config.dtype
    components = memory(config, getattr(torch, dtype), config.gpus)
    lines = [*size_lines(config, model, str(folder), windows), ""]
    precision = f"{dtype}, eager (compiled: 5% more)"
    lines.append(
        f"memory   GB on {'each of ' * (config.gpus > 1)}{count_of(config.gpus, 'device')} with {precision}; "
        "save buffers are in pinned host memory"
    )
    lines += [f"         {name:<24}{format_decimal(size / 1e9, 3):>10}" for name, size in components.items()]
    if config.max_iters:
        lines += ["", f"time     on {config.gpus} of these devices, at mfu = {config.mfu:g} (half precision)"]
        tokens = config.max_iters * config.batch_size * config.grad_accum_steps * config.context_length
        peaks = {name: peak_flops(f"NVIDIA {name}") for name in GPUS}
        local_peak = peak_flops(device_settings.name) or matmul_flops(device_settings.device, device_settings.dtype)
        peaks[f"here: {device_settings.name}"] = local_peak
        for name, peak in peaks.items():
            seconds = tokens * model.flops_per_token() / (peak * config.mfu * config.gpus)
            estimate = f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else duration(seconds)
            estimate = "under a minute" if seconds < 60 else estimate
            lines.append(f"         {name:<24}{peak / 1e12:>10,.4g} TFLOP/s{estimate:>15}")
    print("\n".join(lines))


def size_lines(config: TrainConfig, model: GPT, data: str, windows: Windows | None) -> list[str]:
    """Return lines about the model, its data, an update and the run.

    Args:
        config: vocab_size is set.
        data: name of the dataset.
        windows: None if the dataset is not prepared.
    """
    T, params, flops = config.context_length, model.num_params(), model.flops_per_token()
    W, per_update = len(windows) if windows else 0, config.batch_size * config.grad_accum_steps
    tokens = (config.max_iters or 0) * per_update * T
    counts = f": {len(windows.tokens):,} training tokens, {count_of(W, 'window')}" if W else " is not prepared"
    per_epoch = f"; {format_decimal(W / per_update, 1)} updates per epoch" if W else ""
    lines = [
        f"model    {params:,} parameters: {count_of(config.n_layer, 'layer')}, {count_of(config.n_head, 'head')}, "
        f"n_embd {config.n_embd}, context {T:,}, vocabulary {config.vocab_size:,}; {flops:,} FLOPs per token",
        f"data     {data}{counts}",
        f"update   {count_of(config.batch_size, 'sequence')} x {config.grad_accum_steps} x {count_of(T, 'token')} = "
        f"{count_of(per_update * T, 'token')}{per_epoch}",
    ]
    if tokens:
        epochs = f"{format_decimal(config.max_iters * per_update / W, 2)} epochs, " if W else ""
        text = f"{count_of(config.max_iters, 'update')} = {count_of(tokens, 'token')} = {epochs}"
        text += f"{format_decimal(tokens / params, 1)} tokens per parameter"
        lines.append(f"run      {text}, {tokens * flops:.3g} FLOPs")
    return lines


def activation_bytes(config: ModelConfig, batch_size: int, dtype: torch.dtype, sharded: bool = False) -> int:
    """Return the peak memory of a forward and backward pass in bytes, without parameters and gradients.

    The residual stream, which LayerNorm reads, is float32; matrix products read and write `dtype`. With
    activation_checkpointing only the input of each block is kept, and one block at a time is recomputed.

    Args:
        dtype: the dtype of autocast; float32: no autocast.
        sharded: with fully_shard, which gathers the blocks' matrices in `dtype`, so that autocast makes no copies.
    """
    T, C, H, L, V = config.context_length, config.n_embd, config.n_head, config.n_layer, config.vocab_size
    tokens, hidden, padded, size = batch_size * T, round(config.mlp_ratio * C), -(-V // 64) * 64, dtype.itemsize
    mixed, dropout, rope = dtype != torch.float32, bool(config.dropout), config.position == "rope"
    stream, in_dtype = FLOAT32 * tokens * C, size * tokens * C  # (B, T, C)
    norm = stream + FLOAT32 * 2 * tokens  # input, mean and deviation of a LayerNorm
    if config.attention == "manual":  # q, k, v; softmax in float32 and `dtype`; dropout mask
        attention = 3 * in_dtype + tokens * H * T * (FLOAT32 + size * (mixed or dropout) + dropout)
    else:  # q, k, v, log-sum-exp; with RoPE, copies of q, k and the result
        attention = (3 + 3 * rope) * in_dtype + FLOAT32 * tokens * H
    mlp = size * tokens * hidden * (1 if config.activation == "relu" else 2)  # GELU also keeps its input
    masks = 2 * dropout * tokens * C  # after attention and MLP; a byte per element
    matrices = size * C * (4 * C + 2 * hidden) * (mixed and not sharded)  # autocast's copies
    block = 2 * norm + 3 * in_dtype + attention + mlp + masks + matrices  # with the inputs of three matrix products
    embedding = INT64 * tokens + T * (FLOAT32 * (C // H) if rope else INT64) + dropout * tokens * C
    head_gradient = FLOAT32 * padded * (C + config.head_bias)
    if tokens * padded > cross_entropy.MIN_FUSED_LOGITS:  # the loss computes gradients in its forward pass
        head = norm + stream + head_gradient  # the gradient of the LayerNorm's output replaces the output
        rows, matrix = min(tokens, cross_entropy.CHUNK_ROWS["cuda"]), size * padded * C
        softmax = 2 * min(FLOAT32 * rows * padded, cross_entropy.SOFTMAX_BYTES["cuda"])  # its input and output
        # the head's input, with and without rows that have no target; the matrix in `dtype`; the logits of a chunk;
        # and the softmax or, after it, the chunk's gradient of the matrix in `dtype`
        workspace = stream + in_dtype + mixed * matrix + size * rows * padded + max(softmax, mixed * matrix)
        workspace += config.activation_checkpointing * L * matrices  # kept until the forward pass ends
    else:
        head = norm + in_dtype + size * padded * C * mixed + (FLOAT32 * V + INT64) * tokens
        workspace = 2 * FLOAT32 * tokens * V  # the gradients of log-probabilities and logits, both float32
    if not config.activation_checkpointing:
        return embedding + L * block + head + workspace
    # backward pass of the MLP: the gradient of the stream in `dtype`, and its product with c_proj's weight
    recomputed = block + head_gradient + size * tokens * (mixed * C + hidden)
    return embedding + L * stream + max(head + workspace, recomputed)


def memory(config: TrainConfig, dtype: torch.dtype, gpus: int = 1) -> dict[str, int]:
    """Return the bytes of each component on each of `gpus` devices, and of the `save buffers` in host memory.

    `activations` include temporary memory. `peak` is the largest sum at any time. vocab_size must be set.
    """
    model = GPT.on_meta_device(config.model())
    block_params = sum(p.numel() for p in model.transformer.h.parameters())
    other_params = sum(p.numel() for p in model.parameters()) - block_params  # with the vocabulary's padding
    sharded = config.fsdp and gpus > 1
    shards = gpus if sharded else 1
    accumulate = config.grad_accum_steps > gpus  # a device sums the gradients of several passes
    weights = FLOAT32 * (other_params + block_params)
    optimizer = optimizer_on_meta(dataclasses.replace(config, dtype="float32"))
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    components = {
        "weights": weights // shards,
        "gradients": weights // (1 if accumulate else shards),
        "optimizer": sum(t.nbytes for t in moments) // shards,
        "activations": activation_bytes(config, config.batch_size, dtype, sharded),
    }
    if sharded:  # gathered: the float32 embeddings from forward to backward, and one block in `dtype`
        components["weights"] += FLOAT32 * other_params + dtype.itemsize * block_params // config.n_layer
    # gradients of a single pass reuse the memory of its activations, except with DDP, which allocates buckets first
    reused = min(components["gradients"], components["activations"]) if not accumulate and (gpus == 1 or sharded) else 0
    # a copy of each weight and moment, pinned: torch rounds each allocation up to a power of two
    buffers = sum(1 << (t.nbytes - 1).bit_length() for t in (*model.parameters(), *moments))
    return components | {"peak": sum(components.values()) - reused, "save buffers": buffers}


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest square matrix product, measured in about a quarter of a second.

    Used as the peak FLOP/s of devices that run_log does not list, such as CPUs.
    """
    best, n, seconds = 0.0, 128, 0.0
    while seconds < 0.03 and n < 8192:  # the next size takes eight times as long
        n *= 2
        a = torch.randn(n, n, device=device).to(dtype)
        for _ in range(2):  # the first run may initialise a kernel
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # item() waits for the device
            seconds = time.perf_counter() - start
            best = max(best, 2 * n**3 / seconds)
    return best
