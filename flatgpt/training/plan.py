"""Estimate parameters, FLOPs, time and memory of a run before it starts, for `train.py --plan`.

Memory is summed term by term. Sizes are named as in model.py: B batch, T time, C channels, H heads, D = C / H,
V vocabulary. The estimate is for eager mode; torch.compile needs less.
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from config import ModelConfig, TrainConfig
from flatgpt.kernels import cross_entropy
from flatgpt.runs.run_log import duration, peak_flops
from model import GPT

FLOAT32, INT64 = 4, 8  # bytes
GPUS = ("T4", "A10G", "A100", "H100", "H200")  # rows of --plan; in the table of run_log

# ---------------------------------------------------------------------------------------------------------------------
# activations


def activation_bytes(
    config: ModelConfig, batch_size: int, dtype: torch.dtype, device_type: str = "cuda", sharded: bool = False
) -> tuple[int, int]:
    """Return the bytes that autograd keeps between the forward and backward pass of one batch of (B, T) ids.

    They include autocast's copies of weights in `dtype`, but not parameters and buffers. The residual stream, which
    LayerNorm reads, is float32; matrix products read and write `dtype`.

    Args:
        dtype: of autocast; float32 means no autocast.
        device_type: "cuda" or "cpu", whose kernels keep different tensors.
        sharded: by fully_shard, which gathers the blocks' matrices in `dtype`, so that nothing is copied.

    Returns:
        bytes after the loss; and with activation_checkpointing, which keeps the input of each block only, bytes after
        the last block was recomputed, else 0.
    """
    tokens, C = batch_size * config.context_length, config.n_embd
    stream = FLOAT32 * tokens * C
    # rope keeps cosines and sines, which all blocks and heads share
    position = INT64 if config.position == "learned" else FLOAT32 * (C // config.n_head)
    embedding = INT64 * tokens + position * config.context_length
    embedding += _dropout_bytes(config, tokens * C, FLOAT32, device_type)
    block = _block_bytes(config, batch_size, dtype, device_type)
    if dtype != torch.float32 and not sharded:
        block += dtype.itemsize * _matrix_elements(config)
    head = _head_bytes(config, tokens, dtype)
    if config.activation_checkpointing:
        inputs = embedding + config.n_layer * stream
        return inputs + head, inputs - stream + block + _head_gradient_bytes(config)
    return embedding + config.n_layer * block + head, 0


def workspace_bytes(
    config: ModelConfig, batch_size: int, dtype: torch.dtype, device_type: str = "cuda", sharded: bool = False
) -> tuple[int, int]:
    """Return the largest temporary memory at the two moments of activation_bytes."""
    tokens, C, size, V = batch_size * config.context_length, config.n_embd, dtype.itemsize, _padded(config)
    has_copies = dtype != torch.float32
    # in the MLP's backward pass: the gradient of the stream, its copy in `dtype`, and the product of that copy
    in_block = FLOAT32 * tokens * C + size * tokens * (has_copies * C + round(config.mlp_ratio * C))
    in_block = in_block if config.activation_checkpointing else 0
    if not _is_fused(config, tokens):
        # the gradients of log-probabilities and logits, both float32
        return 2 * FLOAT32 * tokens * config.vocab_size, in_block
    matrix, hidden = size * V * C, size * tokens * C
    rows = math.ceil(tokens / math.ceil(tokens / cross_entropy.CHUNK_ROWS[device_type]))
    at_once = min(rows, max(1, cross_entropy.SOFTMAX_BYTES[device_type] // (FLOAT32 * V)))
    # the head's input, with and without the rows that have no target, the matrix in `dtype`, and the logits of a chunk;
    # and the softmax's input and result, or after them the chunk's gradient of the matrix
    at_loss = FLOAT32 * tokens * C + hidden + has_copies * matrix + size * rows * V
    at_loss += max(2 * FLOAT32 * at_once * V, matrix)
    if config.activation_checkpointing and has_copies and not sharded:
        at_loss += (
            config.n_layer * size * _matrix_elements(config)
        )  # autocast's copies, kept until the forward pass ends
    return at_loss, in_block


def _padded(config: ModelConfig) -> int:
    """The padded vocabulary: rows of the head's matrix."""
    return -(-config.vocab_size // 64) * 64


def _is_fused(config: ModelConfig, tokens: int) -> bool:
    """Whether the loss is the fused cross entropy, which computes gradients in its forward pass."""
    return tokens * _padded(config) > cross_entropy.MIN_FUSED_LOGITS


def _head_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Activation bytes of the last LayerNorm, the head and the loss."""
    C = config.n_embd
    if _is_fused(config, tokens):  # the gradient of the LayerNorm's result replaces that result
        return _norm_bytes(tokens, C, torch.float32) + _head_gradient_bytes(config)
    copy = 0 if dtype == torch.float32 else dtype.itemsize * _padded(config) * C
    logits = (FLOAT32 * config.vocab_size + INT64) * tokens  # log-probabilities of V ids, and targets
    return _norm_bytes(tokens, C, dtype) + copy + logits


def _head_gradient_bytes(config: ModelConfig) -> int:
    return FLOAT32 * _padded(config) * (config.n_embd + config.head_bias)


def _block_bytes(config: ModelConfig, batch_size: int, dtype: torch.dtype, device_type: str) -> int:
    """Activation bytes of one block, without copies of its weights."""
    tokens, C, hidden = batch_size * config.context_length, config.n_embd, round(config.mlp_ratio * config.n_embd)
    norms = 2 * _norm_bytes(tokens, C, dtype)
    # the second Linear keeps the activation's result; GELU keeps its input too, ReLU does not
    mlp = dtype.itemsize * tokens * hidden * (1 if config.activation == "relu" else 2)
    dropouts = 2 * _dropout_bytes(config, tokens * C, dtype.itemsize, device_type)  # after attention and MLP
    return norms + _attention_bytes(config, batch_size, dtype, device_type) + mlp + dropouts


def _attention_bytes(config: ModelConfig, batch_size: int, dtype: torch.dtype, device_type: str) -> int:
    """Activation bytes between the attention's two Linear layers, with the input of the second."""
    T, C, H, size = config.context_length, config.n_embd, config.n_head, dtype.itemsize
    tokens, pairs, result = batch_size * T, batch_size * H * T * T, size * batch_size * T * C
    on_cpu, rope, one = device_type == "cpu", config.position == "rope", 1 in (batch_size, H)
    # q, k and v are views of the tensor that c_attn returned, which stays in memory as long as one of them is used
    if config.attention == "manual" or (on_cpu and dtype == torch.bfloat16 and T <= 512):
        # matrix products need contiguous heads: copies, unless B or H is 1; and q is scaled into a new tensor
        qkv = (5 if rope else 4) * C if one else 3 * C
        weights = size if on_cpu else FLOAT32  # autocast computes softmax in float32 on CUDA, in `dtype` on a CPU
        kept = size * tokens * qkv + weights * pairs  # with softmax's result
        if config.dropout or weights != size:
            kept += size * pairs  # the factor of v is another tensor
        return kept + _dropout_bytes(config, pairs, weights, device_type) + result
    padded = H * -(-(C // H) // 8) * 8  # head sizes are padded to a multiple of 8
    if on_cpu and config.dropout:  # torch has no CPU kernel with dropout: plain products in float32
        qkv = 5 * C if padded == C and one and size == FLOAT32 else 3 * padded
        return FLOAT32 * (tokens * qkv + 3 * pairs) + result  # softmax, noise, their product
    qkv = 3 * padded if padded != C else 5 * C if rope else 3 * C
    kept = size * tokens * (qkv + padded) + FLOAT32 * tokens * H  # with the kernel's result and log-sum-exp
    # no copy for the next layer where the heads of a token are contiguous: flash kernels lay the result out like q,
    # CUDA's float32 kernel always does
    as_it_is = padded == C and (not rope or (dtype == torch.float32 and not on_cpu))
    return kept if as_it_is else kept + result


def _norm_bytes(tokens: int, C: int, dtype: torch.dtype) -> int:
    """A LayerNorm's float32 input, mean and deviation, and its result in the dtype of the product that follows."""
    return FLOAT32 * tokens * (C + 2) + dtype.itemsize * tokens * C


def _dropout_bytes(config: ModelConfig, elements: int, itemsize: int, device_type: str) -> int:
    """CUDA's kernel keeps a byte per element; elsewhere the mask has the tensor's dtype."""
    return elements * (1 if device_type == "cuda" else itemsize) if config.dropout else 0


def _matrix_elements(config: ModelConfig) -> int:
    """Elements in the four matrices of a block."""
    return config.n_embd * (4 * config.n_embd + 2 * round(config.mlp_ratio * config.n_embd))


# ---------------------------------------------------------------------------------------------------------------------
# memory, time


def memory(config: TrainConfig, dtype: torch.dtype, device_type: str = "cuda", gpus: int = 1) -> dict[str, int]:
    """Return bytes by piece on each of `gpus` devices, and of the `save buffers` in the host's memory.

    `peak` is the largest sum of pieces at one moment: at the loss; with activation_checkpointing also at the start of
    the backward pass (activations and workspace are those of the larger moment); or, where no earlier pass has left
    gradients, at the end of the backward pass. vocab_size has to be set.
    """
    model = GPT.on_meta_device(config.model())
    in_blocks = sum(p.numel() for p in model.transformer.h.parameters())
    tables = sum(p.numel() for p in model.parameters()) - in_blocks  # with the vocabulary's padding
    sharded = config.fsdp and gpus > 1
    part = gpus if sharded else 1
    several = config.grad_accum_steps > gpus  # a device adds up the gradients of its passes
    weights = FLOAT32 * (tables + in_blocks)
    # AdamW keeps two moments, Muon one of each matrix of the blocks
    muon = config.n_layer * _matrix_elements(config) if config.optimizer == "muon" else 0
    moments = 2 * weights - FLOAT32 * muon
    way = config, config.batch_size, dtype, device_type, sharded
    activations, workspace = max(zip(activation_bytes(*way), workspace_bytes(*way), strict=True), key=sum)
    pieces = {
        "weights": weights // part,
        "gradients": weights // (1 if several else part),
        "optimizer": moments // part,
        "activations": activations,
        "workspace": workspace,
    }
    if sharded:  # at once: the float32 embeddings from forward to backward, and one block in `dtype`
        pieces["gathered"] = FLOAT32 * tables + dtype.itemsize * in_blocks // config.n_layer
    passing = activations + workspace + pieces.get("gathered", 0)
    # gradients of a single pass replace its activations; but DDP allocates buckets for them in advance
    apart = not several and (gpus == 1 or sharded)
    moving = max(pieces["gradients"], passing) if apart else pieces["gradients"] + passing
    pieces["peak"] = pieces["weights"] + pieces["optimizer"] + moving
    pieces["save buffers"] = weights + moments  # of CheckpointWriter on rank 0
    return pieces


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest square matrix product, measured in about a quarter of a second.

    It stands in for the peak of devices that are not in the table of run_log, such as CPUs.
    """
    best, n, seconds = 0.0, 128, 0.0
    while seconds < 0.03 and n < 8192:  # the next size takes eight times as long
        n *= 2
        a = torch.randn(n, n, device=device).to(dtype)
        for _ in range(2):  # the first may initialise a kernel
            began = time.perf_counter()
            (a @ a)[0, 0].item()  # item() waits for the device
            seconds = time.perf_counter() - began
            best = max(best, 2 * n**3 / seconds)
    return best


def report(config: TrainConfig, train_tokens: int | None, here: tuple[str, float] | None) -> str:
    """Return the text of `--plan`: size, memory on each of config.gpus devices, and time.

    Args:
        config: vocab_size is set.
        train_tokens: of the training split; None where the data is not prepared.
        here: name and FLOP/s of this machine's device.
    """
    model, T, gpus = GPT.on_meta_device(config.model()), config.context_length, config.gpus
    params, per_token = model.num_params(), model.flops_per_token()
    per_update = config.batch_size * config.grad_accum_steps  # sequences
    windows = max(0, (train_tokens - 1 - T) // (config.stride or T) + 1) if train_tokens else 0
    iters = config.max_iters or (math.ceil(config.epochs * windows / per_update) if windows else None)
    data = f"data     {config.data_dir}/{config.dataset}"
    if windows:
        data += f": {train_tokens:,} training tokens\nepoch    {windows:,} windows = {windows * T:,} tokens"
        data += f" = {windows / per_update:,.1f} updates"
    elif train_tokens:
        data += f" has {train_tokens:,} training tokens, fewer than a window's {T + 1:,}: no epochs"
    else:
        data += " is not prepared: no epochs"
    if config.grad_accum_steps % gpus:
        share = f"; {gpus} devices cannot share {config.grad_accum_steps} passes equally"
    else:
        share = f", {config.grad_accum_steps // gpus} passes on each of {gpus} devices" if gpus > 1 else ""
    lines = [
        f"model    {params:,} parameters: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
        f"context {T}, {config.vocab_size:,} ids",
        f"         {per_token:,} FLOPs per token, forward and backward",
        data,
        f"update   {config.batch_size} sequences x {config.grad_accum_steps} x {T} tokens = {per_update * T:,} tokens"
        + share,
    ]
    if iters:
        tokens = iters * per_update * T
        epochs = f"{iters * per_update / windows:.2f} epochs, " if windows else ""
        lines.append(
            f"run      {iters:,} updates = {tokens:,} tokens = {epochs}{tokens / params:.1f} tokens per parameter; "
            f"{tokens * per_token:.3g} FLOPs"
        )
    lines += ["", *_memory_table(config)]
    return "\n".join([*lines, "", *_time_table(config, tokens * per_token, here)] if iters else lines)


def _memory_table(config: TrainConfig) -> list[str]:
    """Return a line for each piece, without and with activation_checkpointing."""
    dtype = getattr(torch, "bfloat16" if config.dtype == "auto" else config.dtype)
    device_type = "cpu" if config.device == "cpu" else "cuda"
    ways = (dataclasses.replace(config, activation_checkpointing=on) for on in (False, True))
    off, on = (memory(way, dtype, device_type, config.gpus) for way in ways)
    unit, name = (1e9, "GB") if off["peak"] >= 1e9 else (1e6, "MB")
    where = f"on each of {config.gpus} devices" if config.gpus > 1 else "on the device"
    precision = str(dtype).removeprefix("torch.") + (" (float16 on a T4, as large)" if config.dtype == "auto" else "")
    rows = [(piece, f"{off[piece] / unit:,.2f}", f"{on[piece] / unit:,.2f}") for piece in off]
    rows = [("activation_checkpointing", "off", "on"), *rows]
    return [
        f"memory   {name} {where}, save buffers in the host's; {precision}",
        *(f"         {piece:<24}{first:>10}{second:>10}" for piece, first, second in rows),
    ]


def _time_table(config: TrainConfig, flops: float, here: tuple[str, float] | None) -> list[str]:
    """Return a line for each kind of device."""
    rows = [(name, peak_flops(f"NVIDIA {name}")) for name in GPUS] + ([(f"here: {here[0]}", here[1])] if here else [])
    width = max(24, *(len(name) for name, _ in rows))
    lines = [f"time     of {config.gpus} such, at mfu = {config.mfu:g} of the peak (half precision)"]
    for name, peak in rows:
        seconds = flops / (peak * config.mfu * config.gpus)
        span = f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else duration(seconds)
        lines.append(f"         {name:<{width}}{peak / 1e12:>10,.4g} TFLOP/s{span:>14}")
    return lines
