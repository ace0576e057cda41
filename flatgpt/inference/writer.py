"""Continue prompts with a loaded model: the texts as they grow, speed figures and the report. For infer.py and app.py.

writer = Writer(config, prepare(config, model, encoding, end_of_text=True))
texts = [writer.text(config.prompt)]
for _ in writer.write(texts): ...   # texts[0].written grows
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor

from config import InferConfig, SamplingConfig, UserError, WriterConfig
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import faster_decoding_dtype, prepack
from flatgpt.inference.sampling import generate_batch, top_token_probs
from flatgpt.inference.text_stream import TextStream
from flatgpt.runtime.device import find_device, select_device
from model import GPT


def decoding_device(config: WriterConfig) -> torch.device:
    """Return the device to decode on.

    Raises:
        UserError: the device does not exist, or int8 weights cannot be multiplied in config.dtype on it.
    """
    device = find_device(config.device)
    if config.quantize and config.dtype == "float16" and device.type == "cpu":
        raise UserError("quantize = int8 multiplies in bfloat16 on a CPU: leave out dtype")
    return device


@dataclass(frozen=True)
class PreparedModel:
    """A model with its weights laid out for decoding. Several writers can share it.

    Args:
        start_ids: token ids that stand for an empty prompt.
        compile: whether decoding steps are compiled.
        machine: device, precision, and compiled or eager, in words.
    """

    model: GPT
    encoding: tiktoken.Encoding
    start_ids: list[int]
    compile: bool
    machine: str

    def describe(self) -> str:
        """Return the model's size and the machine, in words."""
        return f"{self.model.config.num_params():,} parameters, on {self.machine}"


def prepare(
    config: WriterConfig, model: GPT, encoding: tiktoken.Encoding, end_of_text: bool, compile: bool | None = None
) -> PreparedModel:
    """Choose the precision, and lay out the weights of a model for decoding, in place.

    Args:
        end_of_text: whether the training data has an end-of-text token between documents.
        compile: whether to compile decoding steps. None: on CUDA only.
    """
    device = model.transformer.wte.weight.device.type
    # Compiling pays off on a CPU for long int8 texts only: oneDNN's packed weights are faster (docs/speed.md).
    compile = device == "cuda" if compile is None else compile
    dtype, measured = config.dtype, None
    if dtype == "auto" and device == "cpu" and not config.quantize:
        dtype, measured = faster_decoding_dtype(model, compile)
    settings = select_device(config.device, dtype)
    prepack(model, settings.dtype, config.quantize, compile)
    precision = config.quantize or str(settings.dtype).removeprefix("torch.") + (f" ({measured})" if measured else "")
    described = f"{settings.name}, {precision}, {'compiled' if compile else 'eager'}"
    start_ids = [encoding.eot_token] if end_of_text else encoding.encode_ordinary("\n")
    return PreparedModel(model, encoding, start_ids, compile, described)


@dataclass
class Text:
    """One text: its prompt, and what has been generated so far.

    Args:
        ids: token ids of the prompt.
        written: generated characters that later tokens cannot change.
        tokens: number of generated tokens.
        ended: `length`, `end_of_text` or `stop`; None while the text grows.
        top_probs: ids and probabilities of the newest token and its alternatives, as top_token_probs returns them.
    """

    prompt: str
    ids: list[int]
    stream: TextStream
    written: str = ""
    tokens: int = 0
    ended: str | None = None
    top_probs: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def append(self, token: int, top_probs: list[tuple[int, float]]) -> None:
        """Add a token."""
        self.tokens, self.top_probs = self.tokens + 1, top_probs
        self.written += self.stream.feed(token)
        if self.stream.stopped:
            self.ended = "stop"

    def end(self, reason: str) -> None:
        """Add the characters that waited for more tokens. Does nothing if the text has ended."""
        if not self.ended:
            self.ended = reason
            self.written += self.stream.end()


class Writer:
    """Writes texts as `config` asks, and counts tokens and time.

    Args:
        log: receives a note when a text outgrows the context, once.
    """

    def __init__(self, config: InferConfig, prepared: PreparedModel, log: Callable[[str], None] | None = None):
        self.config, self.encoding, self.start_ids = config, prepared.encoding, prepared.start_ids
        self.decoder = Decoder(prepared.model, prepared.compile)
        self.rows = self.tokens = 0  # texts begun, tokens generated
        self.first_seconds = 0.0  # from the start of the first batch to its first tokens
        self.timed_tokens, self.timed_seconds = 0, 0.0  # after the first tokens of each batch, compilation left out
        self._log = log

    def text(self, prompt: str) -> Text:
        """Return a new text that continues a prompt."""
        ids = self.encoding.encode_ordinary(prompt) or self.start_ids
        return Text(prompt, ids, TextStream(self.encoding, self.config.stop))

    def write(self, texts: list[Text], top_probs: int = 0) -> Iterator[None]:
        """Continue texts in one batch to their ends. Yields after each token, and once all have ended.

        Args:
            top_probs: store the probabilities of each new token and of so many most likely ones in its text.
        """
        self._log_context(texts)
        probs: list[list[tuple[int, float]]] = [[] for _ in texts]

        def store_probs(logits: Tensor, tokens: Tensor) -> None:
            probs[:] = top_token_probs(logits, tokens, top_probs)

        started, last, compiling = time.perf_counter(), None, self.decoder.compile_seconds
        batch = generate_batch(
            self.decoder,
            [text.ids for text in texts],
            self.config.max_new_tokens,
            self.config,
            n_vocab=self.encoding.n_vocab,
            stop_ids=() if self.config.ignore_eot else (self.encoding.eot_token,),
            first_row=self.rows,
            on_sample=store_probs if top_probs else None,
        )
        self.rows += len(texts)
        with contextlib.closing(batch):
            for tokens in batch:
                now, before = time.perf_counter(), self.tokens
                for text, token, of_token in zip(texts, tokens, probs, strict=True):
                    if token is None:
                        text.end("end_of_text")
                    elif not text.ended:
                        self.tokens += 1
                        text.append(token, of_token)
                compiled, compiling = self.decoder.compile_seconds - compiling, self.decoder.compile_seconds
                if last is None:
                    self.first_seconds = self.first_seconds or now - started
                else:
                    self.timed_tokens += self.tokens - before
                    self.timed_seconds += now - last - compiled
                last = now
                yield
                if all(text.ended for text in texts):
                    break
        for text in texts:
            text.end("length" if text.tokens == self.config.max_new_tokens else "end_of_text")
        yield

    def _log_context(self, texts: list[Text]) -> None:
        """Log once that a text outgrows the context."""
        longest, context = max(len(text.ids) for text in texts), self.decoder.model.config.context_length
        if self._log and longest + self.config.max_new_tokens - 1 > context:
            start = f", at first the prompt's last {context:,}" if longest > context else ""
            self._log(
                f"note: prompt and text can reach {longest + self.config.max_new_tokens:,} tokens; the model sees "
                f"{context:,} at once{start}, and continues from the newest {max(1, context // 2):,} when they are full"
            )
            self._log = None

    def summary(self) -> str:
        """Return the number of tokens and the speed, in words."""
        line = f"{self.tokens:,} token{'s' * (self.tokens != 1)}, the first after {self.first_seconds:.2f} s"
        line += f", then {self.timed_tokens / self.timed_seconds:,.1f} tokens/s" if self.timed_tokens else ""
        return line + (f"; compiling took {self.decoder.compile_seconds:.1f} s" if self.decoder.compile_seconds else "")

    def report(self, texts: list[Text]) -> dict:
        """Return settings, figures and the texts that have been begun, as infer.py --json writes them."""
        settings = [f.name for f in dataclasses.fields(SamplingConfig)] + ["max_new_tokens", "stop", "ignore_eot"]
        return {
            "settings": {key: getattr(self.config, key) for key in settings}
            | {"temperature": self.config.effective_temperature},
            "tokens": sum(text.tokens for text in texts),
            "seconds_to_first_token": self.first_seconds,
            "tokens_per_s": self.timed_tokens / self.timed_seconds if self.timed_tokens else None,
            "texts": [
                {
                    "prompt": text.prompt,
                    "text": text.written,
                    "prompt_tokens": len(text.ids),
                    "tokens": text.tokens,
                    "ended": text.ended or "interrupted",
                }
                for text in texts[: self.rows]
            ],
        }
