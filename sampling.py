"""Model + options -> an iterator of token ids, and their text as it comes. infer.py prints it, train.py shows it."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, KVCache


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits (..., V) with all but the k largest at minus infinity; ties with the k-th stay in."""
    kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    n_vocab: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[int]:
    """New token ids after the prompt, one by one.

    Each token costs one forward of one token, because keys and values are cached. When the context is full, the newer
    half of it is kept and computed again, at positions from 0.

    Args:
        prompt: at least one id; of a longer one than the context, the end is used.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest only.
        seed: of this text's own generator; training's and other texts' draws are not touched.
        n_vocab: ids from here on are never drawn (the tokenizer's size, where the model's vocabulary is larger).
        stop_ids: ids that end the text; they are not yielded.
    """
    context = model.config.context_length
    weight = model.transformer.wte.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    cache = KVCache(model.config, 1, weight.device, dtype)
    ids, was_training = list(prompt), model.training
    assert ids, "generate needs at least one id to start from"
    new = ids[-context:]  # ids that are not in the cache yet
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache.length + len(new) > context:
                new, cache.length = ids[-max(1, context // 2) :], 0
            logits = model(torch.tensor([new], device=weight.device), cache=cache)[0, -1, :n_vocab].float()  # (V)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                logits = logits / temperature
                logits = filter_top_k(logits, top_k) if top_k else logits
                token = int(torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator))
            if token in stop_ids:
                return
            ids.append(token)
            new = [token]
            yield token
    finally:
        model.train(was_training)


def stream_text(ids: Iterator[int], encoding: tiktoken.Encoding) -> Iterator[str]:
    """The text of ids as it comes, never half a character: bytes wait until their character is whole.

    Bytes that are no UTF-8 become U+FFFD, as tiktoken's decode has them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        if text := decoder.decode(encoding.decode_single_token_bytes(token)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
