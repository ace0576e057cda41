"""Sample tokens from logits, and generate a batch of texts with a decoder.

for (token,) in generate_batch(Decoder(model), [prompt_ids], 100, SamplingConfig(top_p=0.9)): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config import SamplingConfig, UserError
from flatgpt.inference.decoder import Decoder
from flatgpt.runtime.device import seed_of

# On a CPU, top_p first takes this many top tokens, which is faster than sorting all. If they do not reach it, it sorts.
TOP_P_CANDIDATES = 2048
# Rows that share a generator: each launch makes the random numbers of this many rows, those that are not used too.
NOISE_ROWS = {"cpu": 1, "cuda": 32, "mps": 1}

TokenLogprobs = list[tuple[int, float]]  # ids and log-probabilities: the sampled id, then the most likely, descending


class NonFiniteLogitsError(UserError):
    """A model computed NaN or infinite logits, so that no token can be chosen.

    Args:
        name: the model's, in the message.
        dtype: of the logits.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(f"{name}: its logits are NaN or infinite: {nonfinite_cause(dtype)}")


def nonfinite_cause(dtype: torch.dtype) -> str:
    """Return why logits that were computed in `dtype` may be NaN, and what to do, for messages."""
    if dtype == torch.float16:
        return "float16 overflowed, the weights are damaged, or the run diverged; use --dtype float32"
    return "the weights are damaged, or the run diverged; use an earlier checkpoint"


# ---------------------------------------------------------------------------------------------------------------------
# one token


def process_logits(logits: Tensor, seen: Tensor, options: SamplingConfig) -> Tensor:
    """Apply the sampling settings to logits, (B, V), in transformers' order. Ids tied with the last kept id stay.

    repetition_penalty: Keskar et al., "CTRL", 2019; negative logits as transformers treats them.
    top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
    min_p: Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024.

    Args:
        seen: (B, V) bool, true for ids to which the penalty applies.
    """
    if options.repetition_penalty != 1:
        penalty = _limit_factor(options.repetition_penalty)
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalized, logits)
    if options.effective_temperature:
        logits = logits / _limit_factor(options.effective_temperature)
    if options.top_k:
        kth = logits.topk(min(options.top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if options.top_p < 1:
        probs = F.softmax(logits, dim=-1)
        logits = logits.masked_fill(probs < top_p_threshold(probs, options.top_p), -torch.inf)
    if options.min_p > 0:
        min_logit = logits.amax(-1, keepdim=True) + math.log(options.min_p)
        logits = logits.masked_fill(logits < min_logit, -torch.inf)
    return logits


def _limit_factor(factor: float) -> float:
    """Return the closest factor that does not overflow float32 logits. Beyond, probabilities are 0 and 1, or equal."""
    return min(max(factor, 1e-15), 1e30)


def top_p_threshold(probs: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability that top_p keeps in each row, (B, V) -> (B, 1)."""
    V = probs.size(-1)
    count = min(TOP_P_CANDIDATES, V) if probs.device.type == "cpu" else V
    largest = probs.topk(count, dim=-1).values  # (B, count), descending
    if count < V and bool((largest.sum(-1) < top_p).any()):
        largest = probs.sort(dim=-1, descending=True).values
    mass_before = largest.cumsum(-1) - largest
    last = (mass_before < top_p).sum(-1, keepdim=True).clamp_min(1) - 1
    return largest.gather(-1, last)


def add_noise(logits: Tensor, generators: Sequence[torch.Generator], first: int = 0) -> Tensor:
    """Return numbers, (B, V), whose argmax is a sample of softmax(logits) per row.

    Gumbel-max sampling in its exponential form: probability / exponential noise. Rounding differences between batch
    sizes hardly ever change the result.

    Args:
        generators: one for each block of NOISE_ROWS rows.
        first: number of rows of the first block before the first row of logits.
    """
    rows = NOISE_ROWS[logits.device.type]
    noise = logits.new_empty(len(generators) * rows, logits.size(-1))
    for block, generator in zip(noise.split(rows), generators, strict=True):
        block.uniform_(generator=generator)  # always of the same shape: a row's numbers depend on it
    noise = -noise[first : first + len(logits)].clamp_min_(2.0**-25).log_()  # a uniform number can be 0
    return F.softmax(logits, dim=-1) / noise


def top_token_logprobs(logits: Tensor, tokens: Tensor, k: int, n_vocab: int | None = None) -> list[TokenLogprobs]:
    """Return the log-probabilities of the sampled ids, (B), and of the k most likely ids, per row of logits, (B, V).

    They are the model's, before temperature, filters and penalty.

    Args:
        n_vocab: ids from n_vocab on are not listed among the most likely.
    """
    log_p = logits.float().log_softmax(-1)
    listed = log_p[:, :n_vocab]
    best = listed.topk(min(k, listed.size(-1)), dim=-1)
    ids = torch.cat([tokens[:, None], best.indices], dim=-1)  # (B, 1 + k)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), log_p.gather(-1, ids).tolist(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# texts


@torch.inference_mode()
def generate_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    options: SamplingConfig,
    *,
    n_vocab: int | None = None,
    stop_ids: Sequence[int] = (),
    first_row: int = 0,
    on_sample: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[list[int | None]]:
    """Continue each prompt. Yield a list per step: the new id of each row, or None if the row has ended.

    Up to float32 rounding, a row's ids do not depend on the other rows. When a row's context is full, the newer half is
    processed again from position 0, and the older half is dropped.

    Args:
        prompts: at least one id each; only the last context_length ids are used.
        n_vocab: ids from n_vocab on are never sampled; the tokenizer's size if the model's vocabulary is larger.
        stop_ids: ids that end a row; they are not yielded.
        first_row: number of the first row. A row's random numbers depend on the seed and the row's number.
        on_sample: called in each step with the logits of the ids below n_vocab, (B, n_vocab), and the sampled ids (B).

    Raises:
        NonFiniteLogitsError: the logits of a row that has not ended are NaN or infinite.
    """
    model, device = decoder.model, decoder.device
    context, on_cuda = model.config.context_length, device.type == "cuda"
    n_vocab = min(n_vocab or model.config.vocab_size, model.config.vocab_size)
    if not all(prompts):
        raise ValueError("each prompt needs at least one id")
    texts, live = [list(ids) for ids in prompts], set(range(len(prompts)))
    first_block, first_noise = divmod(first_row, NOISE_ROWS[device.type])
    blocks = range(first_block, (first_row + len(prompts) - 1) // NOISE_ROWS[device.type] + 1)
    generators = [torch.Generator(device).manual_seed(seed_of(options.seed, block)) for block in blocks]
    seen = torch.zeros(len(prompts), n_vocab, dtype=torch.bool, device=device)
    for row, ids in enumerate(texts):
        seen[row, [i for i in ids if i < n_vocab]] = True
    was_training = model.training
    model.eval()
    try:
        decoder.reset(len(texts), min(context, max(map(len, texts)) + max_new_tokens))
        logits = decoder.prefill({row: ids[-context:] for row, ids in enumerate(texts)})  # (B, V)
        for n in range(1, max_new_tokens + 1):
            scores = process_logits(logits[:, :n_vocab].float(), seen, options)
            if options.effective_temperature:
                scores = add_noise(scores, generators, first_noise)
            largest, tokens = scores.max(-1)
            seen.scatter_(1, tokens[:, None], True)
            if on_sample:
                on_sample(logits[:, :n_vocab], tokens)
            # It is NaN if any logit is. -1 tells the host, without another synchronisation on CUDA.
            checked = torch.where(largest.abs() < torch.inf, tokens, -1)
            host_tokens, step_queued = checked.to("cpu", non_blocking=on_cuda), False
            if on_cuda:
                copied = torch.cuda.current_stream().record_event()
                # The GPU computes the next step while the host handles these ids. The first ids are handled before:
                # compilation would delay them.
                step_queued = 1 < n < max_new_tokens and not _full_rows(decoder, live)
                if step_queued:
                    logits = decoder.decode_step(tokens)
                copied.synchronize()
            new_ids = host_tokens.tolist()
            if any(new_ids[row] < 0 for row in live):
                raise NonFiniteLogitsError(model.name, logits.dtype)
            live -= {row for row in live if new_ids[row] in stop_ids}
            if not live:
                return
            for row in live:
                texts[row].append(new_ids[row])
            yield [token if row in live else None for row, token in enumerate(new_ids)]
            if not step_queued and n < max_new_tokens:
                full = _full_rows(decoder, live)
                if full < live:
                    logits = decoder.decode_step(tokens)
                if full:
                    logits[list(full)] = decoder.prefill({row: texts[row][-max(1, context // 2) :] for row in full})
    finally:
        model.train(was_training)


def _full_rows(decoder: Decoder, live: set[int]) -> set[int]:
    return {row for row in live if decoder.lengths[row] == decoder.capacity}
