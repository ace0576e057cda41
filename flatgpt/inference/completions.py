"""Requests and answers of OpenAI's completion API, apart from HTTP.

completion = Completion(parse_request(body, config), make_writer)
for choices in completion.steps(): ...
"""

from __future__ import annotations

import codecs
import json
import reprlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tiktoken

from config import AppConfig, InferConfig, UserError, checked, count_of
from flatgpt.inference.writer import Text, Writer

STOP_LIMIT = 200  # maximum total length of a request's stop strings, in characters
# Numbers of a request: the field of InferConfig whose limits they have, and OpenAI's default.
NUMBERS = {
    "n": ("num_samples", 1),
    "temperature": ("temperature", 1.0),
    "top_p": ("top_p", 1.0),
    "seed": ("seed", 0),
    "top_k": ("top_k", 0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
}
FLAGS = ("echo", "stream", "ignore_eot")
# Fields of OpenAI's API that are supported only with the value that changes nothing.
UNSUPPORTED = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "suffix": ""}
KNOWN = {"prompt", "model", "user", "max_tokens", "stop", "logprobs", "best_of", "stream_options"}
KNOWN |= {*NUMBERS, *FLAGS, *UNSUPPORTED}
LOGPROBS_LIMIT = 20
LOWEST_LOGPROB = -9999.0  # JSON has no -inf


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request.

    Attributes:
        prompts: texts, or token ids.
        settings: its prompt is not used, and max_new_tokens can be 0.
        logprobs: number of most likely tokens to list for each token; None: no log-probabilities.
        echo: the prompt is a part of the answer.
        stream, include_usage: answer in parts; the last has the numbers of tokens.
    """

    prompts: Sequence[str | list[int]]
    settings: InferConfig
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool


def body_limit(config: AppConfig) -> int:
    """Return the maximum size of a request's body in bytes: the largest valid one, with each character escaped."""
    return 65_536 + 12 * config.prompt_limit * config.sample_limit


def parse_request(body: bytes, config: AppConfig) -> CompletionRequest:
    """Return the request in the body of a POST to /v1/completions. Fields that are null count as absent.

    Raises:
        UserError: it is not JSON, a value is invalid or exceeds the limits of `config`, or a field is not supported.
    """
    try:
        given = json.loads(body)
        body.decode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"the body is a JSON {type(given).__name__}: an object is expected")
    given = {key: value for key, value in given.items() if value is not None}
    if unknown := given.keys() - KNOWN:
        names = ", ".join(sorted(map(reprlib.repr, unknown)))
        raise UserError(f"not supported: {names}; the fields are {', '.join(sorted(KNOWN))}")
    for key, neutral in UNSUPPORTED.items():
        if given.get(key, neutral) != neutral:
            raise UserError(f"{key} = {reprlib.repr(given[key])}: not supported; leave it out")
    for key in ("model", "user"):
        _value(given, key, "")
    max_tokens = _value(given, "max_tokens", min(16, config.token_limit), {"low": 0})
    if max_tokens > config.token_limit:
        raise UserError(f"max_tokens = {reprlib.repr(max_tokens)}: at most {config.token_limit:,} here (token_limit)")
    fields = InferConfig.__dataclass_fields__
    numbers = {key: _value(given, key, default, fields[name].metadata) for key, (name, default) in NUMBERS.items()}
    flags = {key: _value(given, key, config.ignore_eot if key == "ignore_eot" else False) for key in FLAGS}
    logprobs = _value(given, "logprobs", 0, {"low": 0, "high": LOGPROBS_LIMIT}) if "logprobs" in given else None
    if (best_of := given.get("best_of", numbers["n"])) != numbers["n"]:
        raise UserError(f"best_of = {reprlib.repr(best_of)}: not supported, unless it equals n = {numbers['n']}")
    options = _value(given, "stream_options", {})
    include_usage = _value(options, "include_usage", False)
    if options and (not flags["stream"] or options.keys() - {"include_usage"}):
        raise UserError("stream_options: only include_usage is supported, and only with stream = true")
    if numbers["temperature"] == 0:  # the most likely token passes these filters, whatever their values
        numbers |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if "seed" not in given:
        numbers["seed"] = secrets.randbits(62)
    prompts = _prompts(given, config)
    if (total := len(prompts) * numbers["n"]) > config.sample_limit:
        raise UserError(
            f"{count_of(len(prompts), 'prompt')} times n = {numbers['n']} are {total:,} texts: at most "
            f"{config.sample_limit} in a request (sample_limit of the server)"
        )
    settings = InferConfig(
        **{NUMBERS[key][0]: value for key, value in numbers.items()},
        max_new_tokens=max_tokens,
        stop=_stop(given),
        ignore_eot=flags["ignore_eot"],
        parse_special=config.parse_special,
    )
    return CompletionRequest(prompts, settings, logprobs, flags["echo"], flags["stream"], include_usage)


def _value(given: dict, key: str, default, limits: Mapping | None = None):
    """Return a field of a request, or the default. Raise UserError if it has another type or exceeds the limits."""
    value = given.get(key, default)
    try:
        return checked(value, type(default), limits or {})
    except ValueError as error:
        raise UserError(f"{key} = {reprlib.repr(value)}: {error}") from None


def _stop(given: dict) -> tuple[str, ...]:
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"stop = {reprlib.repr(stop)}: a string or a list of strings is expected, none of them empty")
    if (length := sum(map(len, stop))) > STOP_LIMIT:
        raise UserError(f"stop: {length:,} characters in all, at most {STOP_LIMIT} here")
    return tuple(stop)


def _prompts(given: dict, config: AppConfig) -> list[str | list[int]]:
    prompt = given.get("prompt")
    several = isinstance(prompt, list) and prompt and all(isinstance(each, str | list) for each in prompt)
    prompts = prompt if several else [prompt]
    for each in prompts:
        if isinstance(each, str):
            if any("\ud800" <= char <= "\udfff" for char in each):
                raise UserError("prompt: it has half of a surrogate pair, which is not a character")
        elif not isinstance(each, list) or not each or not all(type(id) is int for id in each):
            raise UserError(
                f"prompt = {reprlib.repr(prompt)}: a string, a list of token ids, or a list of these is expected; "
                "lists of token ids are not empty"
            )
        if len(each) > config.prompt_limit:
            unit = "characters" if isinstance(each, str) else "token ids"
            raise UserError(f"prompt: {len(each):,} {unit}, at most {config.prompt_limit:,} here (prompt_limit)")
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# answers


class Choice:
    """One text of an answer, which is taken as a whole or in parts."""

    def __init__(self, index: int, text: Text, request: CompletionRequest, encoding: tiktoken.Encoding):
        self._index, self._text, self._request, self._encoding = index, text, request, encoding
        self._characters = self._tokens = 0  # taken so far
        self._finished = False
        self._offset = 0  # of the next token's first character
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        given = text.ids if request.prompts[index // request.settings.num_samples] else []
        self._echoed = given if request.echo else []
        if not request.echo:
            self._decoder.decode(encoding.decode_bytes(given))  # whose last character may be incomplete

    def take(self) -> dict | None:
        """Return what is new as an entry of `choices`; None if nothing is."""
        text, length = self._text, self._characters
        written = text.prompt * self._request.echo + text.written
        if self._finished or not (text.ended or len(written) > length):
            return None
        self._characters, self._finished = len(written), bool(text.ended)
        reason = "length" if text.ended == "length" else "stop"
        logprobs = None if self._request.logprobs is None else self._take_logprobs(len(written))
        return {
            "index": self._index,
            "text": written[length:],
            "logprobs": logprobs,
            "finish_reason": reason if text.ended else None,
        }

    def _take_logprobs(self, length: int) -> dict:
        """Return the tokens that start in the first `length` characters. Those of a stop string are left out."""
        text, names = self._text, ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        echoed = [[(self._echoed[0], None)], *text.prompt_logprobs] if self._echoed else []
        ended = [text.end_logprobs] if text.end_logprobs else []
        found, entries = [], [*echoed, *text.logprobs, *ended][self._tokens :]
        for (id, logprob), *top in entries:
            if self._offset >= length and text.ended in (None, "stop"):
                break
            likely = None if logprob is None else dict(map(self._describe, [*top, (id, logprob)]))
            name, logprob = self._describe((id, logprob))
            found.append((name, logprob, likely, self._offset))
            self._offset += len(self._decoder.decode(self._encoding.decode_single_token_bytes(id)))
            self._tokens += 1
        columns = zip(*found, strict=True) if found else [()] * len(names)
        return {name: list(column) for name, column in zip(names, columns, strict=True)}

    def _describe(self, entry: tuple[int, float | None]) -> tuple[str, float | None]:
        """Return a token's text and log-probability. A token that is a part of a character has its bytes."""
        data = self._encoding.decode_single_token_bytes(entry[0])
        try:
            name = data.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return name, None if entry[1] is None else max(entry[1], LOWEST_LOGPROB)


class Completion:
    """The answer to a request: n texts for each prompt.

    Args:
        make_writer: returns a Writer for the settings of a request.

    Raises:
        UserError: a prompt has a character or an id that the tokenizer lacks, or too many tokens for their
            log-probabilities.
    """

    def __init__(self, request: CompletionRequest, make_writer: Callable[[InferConfig], Writer]):
        self.request, self._n = request, request.settings.num_samples
        self._writer = writer = make_writer(request.settings)
        for id in (id for prompt in request.prompts if not isinstance(prompt, str) for id in prompt):
            try:
                writer.encoding.decode_single_token_bytes(id)
            except (KeyError, OverflowError):
                last = writer.encoding.n_vocab - 1
                raise UserError(f"prompt: {reprlib.repr(id)} is not a token id: ids are from 0 to {last:,}") from None
        self._texts = [writer.text(prompt) for prompt in request.prompts for _ in range(self._n)]
        self._scored = request.echo and request.logprobs is not None  # log-probabilities of the prompts, too
        longest, context = max(len(text.ids) for text in self._texts), writer.decoder.model.config.context_length
        if self._scored and longest > context + 1:
            raise UserError(
                f"prompt: {longest:,} tokens; with echo and logprobs, a prompt has at most {context + 1:,}, the "
                "model's context and one more"
            )

    def steps(self) -> Iterator[list[dict]]:
        """Yield lists of choices: what is new in each text after each step, or without `stream` all at the end.

        Raises:
            NonFiniteLogitsError: the model's logits are NaN or infinite.
        """
        request, choices = self.request, []
        if self._scored:
            for _ in self._writer.score(self._texts[:: self._n], request.logprobs):
                yield []
        for index, text in enumerate(self._texts):
            text.prompt_logprobs = self._texts[index // self._n * self._n].prompt_logprobs
            choices.append(Choice(index, text, request, self._writer.encoding))
            if request.settings.max_new_tokens == 0:
                text.end("length")
        if request.settings.max_new_tokens:
            for _ in self._writer.write(self._texts, request.logprobs):
                yield [part for choice in choices if (part := choice.take())] if request.stream else []
        yield [part for choice in choices if (part := choice.take())]

    def usage(self) -> dict:
        """Return the numbers of tokens: those of each prompt once, and those generated, end-of-text included."""
        prompt = sum(len(text.ids) for text in self._texts[:: self._n])
        completion = sum(text.tokens + (text.ended == "end_of_text") for text in self._texts)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
