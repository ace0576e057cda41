"""What a run takes, before it is started: parameters, FLOPs, time, and memory by piece. For `train.py --plan`.

Memory is worked out term by term, so that it can be read where it goes. Sizes are named as in model.py: B batch,
T time, C channels, H heads, D = C / H, V vocabulary. Eager mode: torch.compile fuses, and keeps less.
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
GPUS = ("T4", "A10G", "A100", "H100", "H200")  # of run_log's table, those that report() reckons with

# ---------------------------------------------------------------------------------------------------------------------
# activations


def activation_bytes(
    config: ModelConfig, batch_size: int, dtype: torch.dtype, device_type: str = "cuda", sharded: bool = False
) -> tuple[int, int]:
    """Bytes that autograd keeps from the training forward of one batch, (B, T) ids, until its backward pass.

    autocast's copies of weights in `dtype` are among them, parameters and buffers are not. The residual stream, and
    with it what LayerNorm reads, is float32 whatever `dtype` is; products read and write `dtype`.

    Args:
        dtype: of autocast; float32 means without.
        device_type: "cuda" or "cpu": kernels differ in what they keep.
        sharded: by ranks.py, which gathers the matrices of blocks in `dtype`: there is nothing to copy.

    Returns:
        when the loss was computed; with activation_checkpointing, which keeps each block's input only:
        when the last block has been computed again, else 0.
    """
    tokens, C = batch_size * config.context_length, config.n_embd
    stream = FLOAT32 * tokens * C
    # of rope: cosines and sines, for all blocks and heads
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
    """What is there beside activation_bytes at the same two moments, at the most."""
    tokens, C, size, V = batch_size * config.context_length, config.n_embd, dtype.itemsize, _padded(config)
    low = dtype != torch.float32
    # on their way through the MLP: the gradient of the stream, its copy for a product in `dtype`, and what that made
    in_block = FLOAT32 * tokens * C + size * tokens * (low * C + round(config.mlp_ratio * C))
    in_block = in_block if config.activation_checkpointing else 0
    if not _is_fused(config, tokens):
        # two gradients in float32, of the log-probabilities and of the logits, while the log-probabilities are there
        return 2 * FLOAT32 * tokens * config.vocab_size, in_block
    matrix, hidden = size * V * C, size * tokens * C
    rows = math.ceil(tokens / math.ceil(tokens / cross_entropy.CHUNK_ROWS[device_type]))
    at_once = min(rows, max(1, cross_entropy.SOFTMAX_BYTES[device_type] // (FLOAT32 * V)))
    # the head's input, also without the rows of no target, the matrix in `dtype`, and the logits of a chunk; then a
    # softmax's input and result, and after these the chunk's gradient of the matrix
    at_loss = FLOAT32 * tokens * C + hidden + low * matrix + size * rows * V
    at_loss += max(2 * FLOAT32 * at_once * V, matrix)
    if config.activation_checkpointing and low and not sharded:
        at_loss += config.n_layer * size * _matrix_elements(config)  # autocast's copies, there to the forward's end
    return at_loss, in_block


def _padded(config: ModelConfig) -> int:
    """V with the vocabulary's padding: the rows of the head's matrix."""
    return -(-config.vocab_size // 64) * 64


def _is_fused(config: ModelConfig, tokens: int) -> bool:
    """Whether the loss is fused_loss.py's, which computes gradients beside it."""
    return tokens * _padded(config) > cross_entropy.MIN_FUSED_LOGITS


def _head_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """The part of the last LayerNorm, the head and the loss in activation_bytes."""
    C = config.n_embd
    if _is_fused(config, tokens):  # not the LayerNorm's result, but its gradient
        return _norm_bytes(tokens, C, torch.float32) + _head_gradient_bytes(config)
    copy = 0 if dtype == torch.float32 else dtype.itemsize * _padded(config) * C
    logits = (FLOAT32 * config.vocab_size + INT64) * tokens  # log-probabilities of V ids, and targets
    return _norm_bytes(tokens, C, dtype) + copy + logits


def _head_gradient_bytes(config: ModelConfig) -> int:
    return FLOAT32 * _padded(config) * (config.n_embd + config.head_bias)


def _block_bytes(config: ModelConfig, batch_size: int, dtype: torch.dtype, device_type: str) -> int:
    """One block's part of activation_bytes, copies of its weights left out."""
    tokens, C, hidden = batch_size * config.context_length, config.n_embd, round(config.mlp_ratio * config.n_embd)
    norms = 2 * _norm_bytes(tokens, C, dtype)
    # the second product of the MLP reads the non-linearity's result; GELU's slope needs its input too, ReLU's does not
    mlp = dtype.itemsize * tokens * hidden * (1 if config.activation == "relu" else 2)
    dropouts = 2 * _dropout_bytes(config, tokens * C, dtype.itemsize, device_type)  # at the end of attention and MLP
    return norms + _attention_bytes(config, batch_size, dtype, device_type) + mlp + dropouts


def _attention_bytes(config: ModelConfig, batch_size: int, dtype: torch.dtype, device_type: str) -> int:
    """What is kept between the attention's two Linear layers, the input of the second among it."""
    T, C, H, size = config.context_length, config.n_embd, config.n_head, dtype.itemsize
    tokens, pairs, result = batch_size * T, batch_size * H * T * T, size * batch_size * T * C
    on_cpu, rope, one = device_type == "cpu", config.position == "rope", 1 in (batch_size, H)
    # q, k and v lie in the one tensor that c_attn wrote. What makes some of them anew, apart from each other, leaves
    # the whole of it in memory for those that it does not make anew.
    if config.attention == "manual" or (on_cpu and dtype == torch.bfloat16 and T <= 512):
        # products want heads apart: copies, unless B or H is 1; and q is made anew, divided by the root of D
        qkv = (5 if rope else 4) * C if one else 3 * C
        weights = size if on_cpu else FLOAT32  # autocast has softmax in float32 on CUDA, in `dtype` on a CPU
        kept = size * tokens * qkv + weights * pairs  # and softmax's result
        if config.dropout or weights != size:
            kept += size * pairs  # what v is multiplied with is a tensor of its own
        return kept + _dropout_bytes(config, pairs, weights, device_type) + result
    padded = H * -(-(C // H) // 8) * 8  # fused_attention fills head sizes up to a multiple of 8
    if on_cpu and config.dropout:  # torch has no CPU kernel with dropout: plain products, in float32
        qkv = 5 * C if padded == C and one and size == FLOAT32 else 3 * padded
        return FLOAT32 * (tokens * qkv + 3 * pairs) + result  # softmax, noise, their product
    qkv = 3 * padded if padded != C else 5 * C if rope else 3 * C
    kept = size * tokens * (qkv + padded) + FLOAT32 * tokens * H  # and the kernel's result and log-sum-exp
    # the next layer reads the result as it is, where the heads of a token lie side by side: flash kernels lay it out
    # like q, CUDA's for float32 does so always
    as_it_is = padded == C and (not rope or (dtype == torch.float32 and not on_cpu))
    return kept if as_it_is else kept + result


def _norm_bytes(tokens: int, C: int, dtype: torch.dtype) -> int:
    """A LayerNorm's float32 input, mean and deviation, and its result in the precision of the product that follows."""
    return FLOAT32 * tokens * (C + 2) + dtype.itemsize * tokens * C


def _dropout_bytes(config: ModelConfig, elements: int, itemsize: int, device_type: str) -> int:
    """CUDA's kernel keeps a byte per element, whether it stayed; elsewhere it is a factor in the tensor's precision."""
    return elements * (1 if device_type == "cuda" else itemsize) if config.dropout else 0


def _matrix_elements(config: ModelConfig) -> int:
    """Elements in the four matrices of a block."""
    return config.n_embd * (4 * config.n_embd + 2 * round(config.mlp_ratio * config.n_embd))


# ---------------------------------------------------------------------------------------------------------------------
# memory, time


def memory(config: TrainConfig, dtype: torch.dtype, device_type: str = "cuda", gpus: int = 1) -> dict[str, int]:
    """Bytes by piece: on each of `gpus` devices, and (`save buffers`) in the host's memory.

    `peak` is the most of the pieces before it that is there at one moment: at the loss, with activation_checkpointing
    also where the backward pass begins with the last block (activations and workspace are those of the larger of the
    two), or, where no earlier pass has left gradients, at the end of the backward pass. vocab_size has to be set. The
    terms of sharded training are those of ranks.py.
    """
    model = GPT.on_meta_device(config.model())
    in_blocks = sum(p.numel() for p in model.transformer.h.parameters())
    tables = sum(p.numel() for p in model.parameters()) - in_blocks  # the vocabulary's padding is memory too
    sharded = config.fsdp and gpus > 1
    part = gpus if sharded else 1
    several = config.grad_accum_steps > gpus  # passes of a device, whose gradients are summed before devices' are
    weights = FLOAT32 * (tables + in_blocks)
    # AdamW has two moments; Muon has one, of the blocks' matrices
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
    if sharded:  # whole at one time: the tables in float32, from forward to backward, and a block in `dtype`
        pieces["gathered"] = FLOAT32 * tables + dtype.itemsize * in_blocks // config.n_layer
    passing = activations + workspace + pieces.get("gathered", 0)
    # a single pass's gradients come when its activations go; but DDP sets memory aside for them once
    apart = not several and (gpus == 1 or sharded)
    moving = max(pieces["gradients"], passing) if apart else pieces["gradients"] + passing
    pieces["peak"] = pieces["weights"] + pieces["optimizer"] + moving
    pieces["save buffers"] = weights + moments  # saver.py's, of rank 0
    return pieces


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product, tried in growing sizes for about a quarter of a second.

    Stands in for the peak of a device that is not in run_log's table, a CPU say.
    """
    best, n, seconds = 0.0, 128, 0.0
    while seconds < 0.03 and n < 8192:  # a product eight times as long is the last
        n *= 2
        a = torch.randn(n, n, device=device).to(dtype)
        for _ in range(2):  # the first of a size may set up its kernel
            began = time.perf_counter()
            (a @ a)[0, 0].item()  # item() waits for the device
            seconds = time.perf_counter() - began
            best = max(best, 2 * n**3 / seconds)
    return best


def report(config: TrainConfig, train_tokens: int | None, here: tuple[str, float] | None) -> str:
    """The text of `--plan`: what the run is, what it takes on each of config.gpus devices, and how long.

    Args:
        config: vocab_size is set.
        train_tokens: of the training split, None where the data is not prepared.
        here: name and FLOP/s of the device at hand, beside those of GPUS.
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
    """One line for each piece, without and with activation_checkpointing."""
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
    """One line for each kind of device."""
    rows = [(name, peak_flops(f"NVIDIA {name}")) for name in GPUS] + ([(f"here: {here[0]}", here[1])] if here else [])
    width = max(24, *(len(name) for name, _ in rows))
    lines = [f"time     of {config.gpus} such, at mfu = {config.mfu:g} of the peak (half precision)"]
    for name, peak in rows:
        seconds = flops / (peak * config.mfu * config.gpus)
        span = f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else duration(seconds)
        lines.append(f"         {name:<{width}}{peak / 1e12:>10,.4g} TFLOP/s{span:>14}")
    return lines
