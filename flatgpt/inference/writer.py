"""Generate texts with a loaded model, and measure the speed. Used by infer.py and app.py.

writer = Writer(config, model, encoding, end_of_text=True)
texts = [writer.text(config.prompt)]
for _ in writer.write(texts): ...   # texts[0].written grows
"""

from __future__ import annotations

import codecs
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import tiktoken
import torch
from torch import Tensor

from config import InferConfig, SamplingConfig, count_of
from flatgpt.data import tokenizer
from flatgpt.inference.decoder import PREFILL_TOKENS, Decoder
from flatgpt.inference.sampling import NonFiniteLogitsError, TokenLogprobs, generate_batch, top_token_logprobs
from model import GPT

SCORED_ROWS = 256  # tokens of a prompt whose logits are computed at once: those of a large vocabulary need much memory


class Text:
    """A prompt and its continuation. Each character is added as soon as no later token can change it.

    Bytes are held back until their character is complete. Invalid UTF-8 becomes U+FFFD, as in tiktoken's decode.
    Characters that may be the start of a stop string are held back until later characters decide.

    Args:
        prompt: a text, or token ids. A character that its last ids leave incomplete belongs to the continuation.
        stop: strings that end the text. It is cut before the first stop string.
        start_ids: ids that replace an empty prompt.
        parse_special: encode added tokens in the prompt as their ids.

    Attributes:
        written: the characters so far, without the prompt.
        tokens: number of tokens after the prompt.
        ended: why the text ended: `stop`, or the reason passed to `end`; None if it has not ended.
        logprobs: for each token after the prompt, its log-probability and that of its alternatives, if they were asked
            for.
        end_logprobs: the same for the end-of-text token, if it ended the text.
        prompt_logprobs: the same for each id of the prompt but the first; Writer.score sets it.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        prompt: str | Sequence[int] = "",
        stop: Sequence[str] = (),
        start_ids: Sequence[int] = (),
        parse_special: bool = False,
    ):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if isinstance(prompt, str):
            self.prompt = prompt
            self.ids = tokenizer.encode(encoding, prompt, parse_special) if prompt else start_ids
        else:
            self.prompt, self.ids = self._decoder.decode(encoding.decode_bytes(prompt)), prompt
        self.written, self.tokens = "", 0
        self.ended: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.end_logprobs: TokenLogprobs | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._encoding, self._stop, self._pending = encoding, stop, ""

    def append(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Add a token."""
        self.tokens += 1
        self.logprobs += [logprobs] if logprobs else []
        self._add(self._decoder.decode(self._encoding.decode_single_token_bytes(token)))

    def end(self, reason: str = "length", logprobs: TokenLogprobs | None = None) -> None:
        """End the text and add the characters that were held back. Does nothing if the text has ended.

        Args:
            logprobs: of the end-of-text token, if that is the reason.
        """
        if not self.ended:
            self._add(self._decoder.decode(b"", final=True))
        if not self.ended:
            self.ended, self.written, self.end_logprobs = reason, self.written + self._pending, logprobs

    def _add(self, characters: str) -> None:
        self._pending += characters
        found = [(start + len(stop), start) for stop in self._stop if (start := self._pending.find(stop)) >= 0]
        if found:
            split, self.ended = min(found)[1], "stop"  # the stop string that was complete first
        else:  # hold back characters that may be the start of a stop string
            starts = range(len(self._pending))
            may_stop = (n for n in starts if any(stop.startswith(self._pending[n:]) for stop in self._stop))
            split = next(may_stop, len(self._pending))
        self.written += self._pending[:split]
        self._pending = self._pending[split:]


class Writer:
    """Generates texts with the settings of `config`, and counts tokens and time.

    Args:
        model: a model that is prepared for decoding. Several Writers can share it.
        end_of_text: whether the training data has an end-of-text token between documents. It then replaces an empty
            prompt; otherwise tokenizer.start_ids says what does.
        log: called once with a note if a text can exceed the context.
    """

    def __init__(
        self,
        config: InferConfig,
        model: GPT,
        encoding: tiktoken.Encoding,
        end_of_text: bool,
        log: Callable[[str], None] | None = None,
    ):
        self.config, self.encoding = config, encoding
        self.start_ids = tokenizer.start_ids(encoding, end_of_text)
        self.decoder = Decoder(model, config.compile)
        self.rows = self.tokens = 0  # texts started, tokens generated
        self.first_seconds = 0.0  # from the start of the first batch to its first tokens
        self.timed_tokens, self.timed_seconds = 0, 0.0  # without the first tokens of each batch
        self._log = log

    def text(self, prompt: str | Sequence[int]) -> Text:
        """Return a new Text for a prompt or token ids. Log a note if it can exceed the context, once per Writer."""
        text = Text(self.encoding, prompt, self.config.stop, self.start_ids, self.config.parse_special)
        tokens, context = len(text.ids) + self.config.max_new_tokens, self.decoder.model.config.context_length
        if self._log and tokens > context + 1:
            start = f", at first the prompt's last {context:,}" if len(text.ids) > context else ""
            self._log(
                f"note: prompt and text can reach {tokens:,} tokens; the context holds {context:,}{start}; when it is "
                f"full, generation continues from the newest {max(1, context // 2):,}"
            )
            self._log = None
        return text

    def write(self, texts: list[Text], logprobs: int | None = None) -> Iterator[None]:
        """Continue texts in one batch until all have ended. Yield after each token, and once more at the end.

        Args:
            logprobs: number of most likely tokens to store in Text.logprobs beside the sampled one. None: that of the
                config, whose None stores nothing.
        """
        logprobs = self.config.logprobs if logprobs is None else logprobs
        newest: list[TokenLogprobs | None] = [None] * len(texts)

        def store_logprobs(logits: Tensor, tokens: Tensor) -> None:
            newest[:] = top_token_logprobs(logits, tokens, logprobs)

        started, last = time.perf_counter(), None
        batch = generate_batch(
            self.decoder,
            [text.ids for text in texts],
            self.config.max_new_tokens,
            self.config,
            n_vocab=self.encoding.n_vocab,
            stop_ids=() if self.config.ignore_eot else (self.encoding.eot_token,),  # None is no id
            first_row=self.rows,
            on_sample=None if logprobs is None else store_logprobs,
        )
        self.rows += len(texts)
        for tokens in batch:
            now, before = time.perf_counter(), self.tokens
            for text, token, token_logprobs in zip(texts, tokens, newest, strict=True):
                if token is None:
                    text.end("end_of_text", token_logprobs)
                elif not text.ended:
                    self.tokens += 1
                    text.append(token, token_logprobs)
            if last is None:
                self.first_seconds = self.first_seconds or now - started
            else:
                self.timed_tokens += self.tokens - before
                self.timed_seconds += now - last
            last = now
            yield
            if all(text.ended for text in texts):
                break
        for text, token_logprobs in zip(texts, newest, strict=True):
            if text.tokens == self.config.max_new_tokens:
                text.end("length")
            text.end("end_of_text", token_logprobs)
        yield

    @torch.inference_mode()
    def score(self, texts: Sequence[Text], logprobs: int) -> Iterator[None]:
        """Compute the log-probability of each id of the prompts after the first. Yield after each forward pass.

        Args:
            texts: each with at most context_length + 1 ids. Those of similar length share forward passes of at most
                PREFILL_TOKENS tokens.
            logprobs: number of most likely tokens to store in Text.prompt_logprobs beside that of the prompt.

        Raises:
            NonFiniteLogitsError: the logits are NaN.
        """
        model, device = self.decoder.model, self.decoder.device
        remaining = sorted(texts, key=lambda text: -len(text.ids))
        while remaining:
            T = max(1, len(remaining[0].ids) - 1)
            n = max(1, PREFILL_TOKENS[device.type] // T)
            batch, remaining = remaining[:n], remaining[n:]
            ids = [[*text.ids, *[0] * (T + 1 - len(text.ids))] for text in batch]  # causal: padding changes nothing
            hidden = model.hidden_states(torch.tensor(ids, device=device)[:, :-1])  # (B, T, C)
            for text, states in zip(batch, hidden, strict=True):
                targets = torch.tensor(text.ids[1:], dtype=torch.int64, device=device)
                parts = zip(states[: len(targets)].split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True)
                for part, labels in parts:
                    logits = model.compute_logits(part)
                    text.prompt_logprobs += top_token_logprobs(logits, labels, logprobs, self.encoding.n_vocab)
                if any(math.isnan(logprob) for ((_, logprob), *_) in text.prompt_logprobs):
                    raise NonFiniteLogitsError(model.name, logits.dtype)
            yield

    def tokens_per_s(self) -> float | None:
        """Return the speed without first tokens and compilation; None if no other tokens were generated."""
        return self.timed_tokens / (self.timed_seconds - self.decoder.compile_seconds) if self.timed_tokens else None

    def summary(self) -> str:
        """Return the number of tokens and the speed as text."""
        line = f"{count_of(self.tokens, 'token')}, the first after {self.first_seconds:.2f} s"
        line += f", then {speed:,.1f} tokens/s" if (speed := self.tokens_per_s()) else ""
        made = "compiling" if self.decoder.compile else "capturing a CUDA graph"
        return line + (f"; {made} took {self.decoder.compile_seconds:.1f} s" if self.decoder.compile_seconds else "")

    def report(self, texts: list[Text]) -> dict:
        """Return settings, measurements and the started texts, as infer.py --json writes them."""
        keys = [field.name for field in dataclasses.fields(SamplingConfig)] + ["max_new_tokens", "stop", "ignore_eot"]
        settings = {key: getattr(self.config, key) for key in keys}
        return {
            "settings": settings | {"temperature": self.config.effective_temperature},
            "tokens": sum(text.tokens for text in texts),
            "seconds_to_first_token": self.first_seconds,
            "tokens_per_s": self.tokens_per_s(),
            "texts": [
                {
                    "prompt": text.prompt,
                    "text": text.written,
                    "prompt_tokens": len(text.ids),
                    "tokens": text.tokens,
                    "ended": text.ended or "interrupted",
                }
                | ({} if self.config.logprobs is None else {"logprobs": [*map(self._describe, text.logprobs)]})
                for text in texts[: self.rows]
            ],
        }

    def _describe(self, logprobs: TokenLogprobs) -> dict:
        """Return a token's entry of the report. A token that is a part of a character has escapes such as \\xe2."""
        (token, *top) = (
            {
                "token": self.encoding.decode_single_token_bytes(id).decode("utf-8", "backslashreplace"),
                "id": id,
                "logprob": logprob,
            }
            for id, logprob in logprobs
        )
        return token | {"top": top}
