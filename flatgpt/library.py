"""A loaded model for notebooks and other programs: generate, stream and score text. See flatgpt.load."""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import difflib
import os
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import tiktoken
import torch

from config import InferConfig, SamplingConfig, UserError, checked, count_of
from flatgpt.cli.settings import value_type_of
from flatgpt.data.encode import encode_text
from flatgpt.evaluation.metrics import default_batch_size, eval_batches, mean_loss
from flatgpt.inference.prepacking import prepare_for_decoding
from flatgpt.inference.writer import Text, Writer
from flatgpt.interop import loading
from flatgpt.runtime.device import find_device, note
from model import GPT

# The settings of infer.py that `generate` takes.
OPTIONS = (*(field.name for field in dataclasses.fields(SamplingConfig)), "num_samples", "max_new_tokens", "stop")
OPTIONS += ("ignore_eot", "parse_special", "batch_size")
STREAMS: weakref.WeakSet[Iterator] = weakref.WeakSet()  # of `stream`


@atexit.register
def close_streams() -> None:
    """Close the iterators of `stream` that a program still holds at its end, while torch can still be used."""
    for pieces in list(STREAMS):
        with contextlib.suppress(ValueError):  # another thread is in it
            pieces.close()


class LanguageModel:
    """A model and its tokenizer. Methods can be called from several threads; they print notes to standard error only.

    Attributes:
        model: the model in float32, in evaluation mode.
        tokenizer: its tiktoken.Encoding.
        source: path, config and, of a flatGPT checkpoint, metadata of the weights.
    """

    model: GPT
    tokenizer: tiktoken.Encoding
    source: loading.ModelSource

    def __init__(
        self,
        name: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        context_length: int | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        **settings,
    ):
        name = os.path.expanduser(name) if isinstance(name, str | os.PathLike) else name
        settings |= {"model_path": name, "device": str(device), "context_length": context_length}
        settings["dtype"] = str(dtype).removeprefix("torch.")
        self._config = infer_config(settings)
        self.source = loading.find(self._config.model_path)
        found = find_device(self._config.device)
        self.model, self.tokenizer = loading.load(self.source, found, self._config.context_length)
        self._lock = threading.Lock()
        self._decoding_model, self._decoding_weights = self.model, None

    def __getitem__(self, index: int):  # also for `model, tokenizer = flatgpt.load(...)`
        return (self.model, self.tokenizer)[index]

    def __repr__(self) -> str:
        return f"<flatGPT model {self.source.describe()}: {count_of(self.model.num_params(), 'parameter')}>"

    def generate(self, prompt: str = "", **options) -> str | list[str]:
        """Return the text that the model generates after a prompt, without the prompt.

        It is that of infer.py with the same settings: the same seed gives the same text.

        Args:
            prompt: empty: start a new text.
            options: settings of infer.py, with its defaults and limits: max_new_tokens (200), temperature (0.8),
                greedy, top_k, top_p, min_p, repetition_penalty, seed (1337), stop (a string or several), ignore_eot,
                parse_special, num_samples, batch_size.

        Returns:
            a string; with num_samples above 1 a list of strings.

        Raises:
            UserError: an option is unknown or outside its limits, the tokenizer lacks a character of the prompt, or the
                model's logits are not finite.
        """
        writer = self._writer(prompt, options)
        texts = [writer.text(prompt) for _ in range(writer.config.num_samples)]
        for start in range(0, len(texts), writer.config.batch_size):
            for _ in self._steps(writer, texts[start : start + writer.config.batch_size]):
                pass
        written = [text.written for text in texts]
        return written if len(written) > 1 else written[0]

    def stream(self, prompt: str = "", **options) -> Iterator[str]:
        """Return an iterator over the pieces of the text that `generate` returns, as soon as they are known.

        A piece has at least one character. Closing the iterator ends the generation and frees its memory.

        Args:
            options: as in `generate`, without num_samples.

        Raises:
            UserError: as in `generate`. Wrong options are reported by the call, before the first piece.
        """
        writer = self._writer(prompt, options)
        if writer.config.num_samples > 1:
            raise UserError(f"num_samples = {writer.config.num_samples}: stream returns one text; use generate")
        STREAMS.add(pieces := self._pieces(writer, writer.text(prompt)))
        return pieces

    def loss(self, text: str, parse_special: bool = False) -> float:
        """Return the mean loss of a text in nats per token: the `loss` of `eval.py --text` with its defaults.

        The tokens are divided into windows of context_length that do not overlap. Every token except the first is
        scored once, with the tokens before it in its window as context. No end-of-text token is added. It is computed
        in float32.

        Args:
            parse_special: encode added tokens, such as <|endoftext|>, as their ids.

        Raises:
            UserError: the text has fewer than two tokens, or the tokenizer lacks a character.
        """
        if not isinstance(text, str):
            raise UserError(f"text = {text!r:.60}: a string is expected")
        ids = encode_text(self.tokenizer, [text], parse_special)
        if len(ids) < 2:
            raise UserError(f"text = {text!r}: it has {count_of(len(ids), 'token')}; a loss needs at least 2")
        T, device = self.model.config.context_length, self.model.transformer.wte.weight.device
        batches = eval_batches(ids, T, default_batch_size(T, device))
        return mean_loss(self.model, batches, lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device))

    def _writer(self, prompt: str, options: dict) -> Writer:
        """Return a Writer with checked options. It has a copy of the model that is prepared for decoding.

        The copy shares the weights that keep their dtype and layout. It is made again after the weights have changed.
        """
        for key in options:
            if key not in OPTIONS:
                near = difflib.get_close_matches(key, OPTIONS, 1)
                hint = f"did you mean {near[0]}?" if near else f"options: {', '.join(OPTIONS)}"
                hint = "it is an option of flatgpt.load" if key in ("device", "dtype", "quantize", "compile") else hint
                raise UserError(f"{key}: no such option of generate and stream; {hint}")
        parameters = list(self.model.parameters())
        config = infer_config({"prompt": prompt, **options}, self._config)
        config = dataclasses.replace(config, device=str(parameters[0].device))  # the model may have been moved
        with self._lock:
            weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
            if weights != self._decoding_weights:
                shared = copy.deepcopy(self.model, {id(p): p for p in parameters}).eval()
                prepare_for_decoding(config, shared, config.compile)
                self._decoding_model, self._decoding_weights = shared, weights
            return Writer(config, self._decoding_model, self.tokenizer, self.source.end_of_text, note)

    def _steps(self, writer: Writer, texts: list[Text]) -> Iterator[None]:
        """Yield after each step of a batch. Threads take turns: a step may capture a CUDA graph, or trace the model."""
        with contextlib.closing(writer.write(texts)) as steps:
            while True:
                with self._lock:
                    if next(steps, steps) is steps:
                        return
                yield

    def _pieces(self, writer: Writer, text: Text) -> Iterator[str]:
        length = 0
        with contextlib.closing(self._steps(writer, [text])) as steps:
            for _ in steps:
                if piece := text.written[length:]:
                    length += len(piece)
                    yield piece


def infer_config(values: dict, base: InferConfig | None = None) -> InferConfig:
    """Return infer.py's settings from Python values, which are checked as those of a recipe are.

    Args:
        base: the values of other settings; None: the defaults.

    Raises:
        UserError: lists all problems.
    """
    base, fields, settings, problems = base or InferConfig(), InferConfig.__dataclass_fields__, {}, []
    for key, given in values.items():
        kind, optional = value_type_of(InferConfig, fields[key])
        value = given.item() if isinstance(given, np.generic) else given
        try:
            if kind is tuple:
                value = () if value is None else (value,) if isinstance(value, str) else tuple(value)
                value = tuple(checked(item, str, {}) for item in value)
            elif value is not None or not optional:
                value = checked(value, kind, fields[key].metadata)
        except (TypeError, ValueError) as error:
            problem = "strings are expected" if kind is tuple else error
            problems.append(f"{key} = {given!r:.60}: {problem}")
        settings[key] = value
    if problems := problems or dataclasses.replace(base, **settings).problems():
        raise UserError("; ".join(problems))
    return dataclasses.replace(base, **settings)
