"""Decoder + options -> an iterator of token ids, and their text as it comes. infer.py prints it, train.py shows it.

for token in generate(Decoder(model), prompt_ids, 100, SamplingConfig(top_p=0.9)): ...
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from config import SamplingConfig
from flatgpt.inference.decoder import Decoder
from flatgpt.runtime.device import seed_of

NUCLEUS = 2048  # tokens in which top_p looks for its mass first: the likeliest few are found faster than all are sorted

# ---------------------------------------------------------------------------------------------------------------------
# which token


def penalize_seen(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of seen ids, (B, V) bool, made less likely: divided where positive, else multiplied.

    Keskar et al., "CTRL", 2019, with transformers' treatment of negative logits.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits (B, V) with all but the k largest at minus infinity; ties with the k-th stay in."""
    kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits (B, V) with all but the likeliest that together reach probability top_p at minus infinity; ties stay in.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
    """
    probabilities = F.softmax(logits, dim=-1)
    few = min(NUCLEUS, logits.size(-1)) if logits.device.type == "cpu" else logits.size(-1)
    largest = probabilities.topk(few, dim=-1).values  # (B, few), falling
    if few < logits.size(-1) and bool((largest.sum(-1) < top_p).any()):
        largest = probabilities.sort(dim=-1, descending=True).values
    before = largest.cumsum(-1) - largest  # the mass of those that are likelier
    last = (before < top_p).sum(-1, keepdim=True).clamp_min(1) - 1
    return logits.masked_fill(probabilities < largest.gather(-1, last), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Logits (B, V) with those less likely than min_p times the likeliest at minus infinity.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024.
    """
    probabilities = F.softmax(logits, dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)


def sample(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One id of each row by softmax of its logits, (B, V) -> (B), with noise of the row's own generator.

    An exponential race: the id with the largest probability / exponential noise is one drawn by probability. Rounding
    that differs between batches shifts each probability a little, and hardly ever the winner.
    """
    noise = torch.empty_like(logits)
    for row, generator in zip(noise, generators, strict=True):
        row.uniform_(generator=generator)
    noise = -noise.clamp_min_(2.0**-25).log_()  # a uniform number can be 0
    return (F.softmax(logits, dim=-1) / noise).argmax(-1)


class Sampler:
    """Chooses the next ids of a batch, in transformers' order: penalty, temperature, top_k, top_p, min_p.

    Args:
        prompts: ids of each row, which the penalty counts as seen.
        first_row: number of the first row. Row r draws from its own generator, of the seed and r.
        n_vocab: ids from here on are never drawn.
    """

    def __init__(
        self,
        options: SamplingConfig,
        prompts: Sequence[Sequence[int]],
        first_row: int,
        n_vocab: int,
        device: torch.device,
    ):
        self.options, self.n_vocab = options, n_vocab
        rows = range(first_row, first_row + len(prompts))
        self.generators = [torch.Generator(device).manual_seed(seed_of(options.seed, row)) for row in rows]
        self.seen = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), n_vocab, dtype=torch.bool, device=device)
            for row, ids in zip(self.seen, prompts, strict=True):
                row[torch.tensor([i for i in ids if i < n_vocab], dtype=torch.int64, device=device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) -> ids (B)."""
        options, logits = self.options, logits[:, : self.n_vocab].float()
        if self.seen is not None:
            logits = penalize_seen(logits, self.seen, options.repetition_penalty)
        if options.effective_temperature == 0:
            tokens = logits.argmax(-1)
        else:
            logits = logits / options.effective_temperature
            if options.top_k:
                logits = keep_top_k(logits, options.top_k)
            if options.top_p < 1:
                logits = keep_top_p(logits, options.top_p)
            if options.min_p > 0:
                logits = keep_min_p(logits, options.min_p)
            tokens = sample(logits, self.generators)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens


def top_token_probs(logits: Tensor, tokens: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """Of each row of logits (B, V): the id that was drawn, one of tokens (B), then the k likeliest, falling.

    Returns:
        pairs of id and probability, by softmax: as the model has it, before temperature and filters.
    """
    probabilities = F.softmax(logits.float(), dim=-1)
    best = probabilities.topk(min(k, logits.size(-1)), dim=-1)
    ids = torch.cat([tokens[:, None], best.indices], dim=-1)  # (B, 1 + k)
    found = torch.cat([probabilities.gather(-1, tokens[:, None]), best.values], dim=-1)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), found.tolist(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# token after token


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
    """New ids after each prompt, a list of one per row at a time; None where a row has ended.

    A row's ids are those it gets alone, as far as float32's rounding allows. When its context is full, the newer half
    is kept and computed again, at positions from 0.

    Args:
        prompts: at least one id each; of one longer than the context, the end is used.
        n_vocab: ids from here on are never drawn (the tokenizer's size, where the model's vocabulary is larger).
        stop_ids: ids that end a row; they are not yielded.
        first_row: number of the first row, which its random numbers belong to.
        on_sample: is given each step's logits (B, V), of the ids that can be drawn, and the ids (B) that were.
    """
    model = decoder.model
    context = model.config.context_length
    assert all(prompts), "generate needs at least one id to start from"
    texts, live = [list(ids) for ids in prompts], set(range(len(prompts)))
    drawable = min(n_vocab or model.config.vocab_size, model.config.vocab_size)
    sampler = Sampler(options, prompts, first_row, drawable, decoder.device)
    was_training = model.training
    model.eval()
    try:
        decoder.reset(len(texts), min(context, max(map(len, texts)) + max_new_tokens))
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, ids in enumerate(texts):
            alike.setdefault(tuple(ids[-context:]), []).append(row)
        logits = _in_rows([(rows, decoder.prefill(rows, ids)) for ids, rows in alike.items()])
        for n in range(1, max_new_tokens + 1):
            tokens = sampler(logits)
            if on_sample:
                on_sample(logits[:, :drawable], tokens)
            copied = _copy(tokens)
            # On CUDA the device computes on while the host reads and prints; the first step may have to be compiled.
            ahead = decoder.device.type == "cuda" and 1 < n < max_new_tokens and not _full(decoder, live)
            if ahead:
                logits = decoder.decode_step(tokens)
            found = copied()
            live -= {row for row in live if found[row] in stop_ids}
            if not live:
                return
            for row in live:
                texts[row].append(found[row])
            yield [token if row in live else None for row, token in enumerate(found)]
            if not ahead and n < max_new_tokens:
                full = _full(decoder, live)
                if full < live:
                    logits = decoder.decode_step(tokens)
                for row in full:
                    kept = texts[row][-max(1, context // 2) :]
                    logits[row] = decoder.prefill([row], kept)
    finally:
        model.train(was_training)


def generate(
    decoder: Decoder, prompt: Sequence[int], max_new_tokens: int, options: SamplingConfig, **more
) -> Iterator[int]:
    """New token ids after one prompt, one by one; arguments as in generate_batch."""
    return (tokens[0] for tokens in generate_batch(decoder, [prompt], max_new_tokens, options, **more))


def _full(decoder: Decoder, live: set[int]) -> set[int]:
    return {row for row in live if decoder.lengths[row] == decoder.capacity}


def _in_rows(read: list[tuple[list[int], Tensor]]) -> Tensor:
    """(B, V) logits from those of prompts and the rows that have them."""
    order = sorted((row, n) for n, (rows, _) in enumerate(read) for row in rows)
    return torch.stack([read[n][1] for _, n in order])


def _copy(tokens: Tensor) -> Callable[[], list[int]]:
    """Start to copy ids to the host; calling the result waits for just that, not for what was launched since."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return lambda: (done.synchronize(), host.tolist())[1]


# ---------------------------------------------------------------------------------------------------------------------
# text


class TextStream:
    """Ids of one text -> its characters, as soon as nothing that comes can change them.

    Bytes wait until their character is whole; those that are no UTF-8 become U+FFFD, as tiktoken's decode has them.
    Characters that may begin a stop string wait until it is clear.

    Args:
        stop: strings that end the text; neither they nor what follows them is given out.
    """

    def __init__(self, encoding: tiktoken.Encoding, stop: Sequence[str] = ()):
        self.stopped = False
        self._encoding, self._stop, self._held = encoding, stop, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that are certain now; empty once the text has stopped."""
        return self._certain(self._decoder.decode(self._encoding.decode_single_token_bytes(token)))

    def end(self) -> str:
        """What was waiting, when no more tokens come."""
        text = self._certain(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _certain(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:  # the one that was complete first
            text, self._held, self.stopped = self._held[: min(found)[1]], "", True
            return text
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                break
        else:
            length = 0
        split = len(self._held) - length
        text, self._held = self._held[:split], self._held[split:]
        return text


def stream_text(ids: Iterable[int], encoding: tiktoken.Encoding, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of ids as it comes, never half a character nor part of a stop string; ends after one."""
    stream = TextStream(encoding, stop)
    for token in ids:
        if text := stream.feed(token):
            yield text
        if stream.stopped:
            return
    if text := stream.end():
        yield text
