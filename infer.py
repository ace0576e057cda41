"""Let a model write: checkpoint + prompt -> text on standard output.

python infer.py --prompt "First Citizen:"               # the newest run
python infer.py --model_path out/shakespeare --prompt "ROMEO:" --max_new_tokens 300 --temperature 0.9 --top_p 0.95
python infer.py --prompt "def " --num_samples 3 --seed 7 --stop $'\\n\\n'
python infer.py --prompts_file prompts.txt --json texts.json
echo "Once upon a time" | python infer.py -
"""

from config import InferConfig, SamplingConfig, UserError, model_path
from flatgpt.cli.cli import from_command_line, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(InferConfig, __doc__)

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from torch import Tensor

from flatgpt.inference.decoder import Decoder
from flatgpt.inference.prepacking import faster_decoding_dtype, prepack
from flatgpt.inference.sampling import TextStream, generate_batch
from flatgpt.interop import loading
from flatgpt.interop.loading import ModelSource
from flatgpt.runtime.device import find_device, select_device
from flatgpt.runtime.files import require_writable, write_json


def say(line: str) -> None:
    """Facts and figures; standard output is for text."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class Text:
    """One text: what it continues, and how far it is."""

    prompt: str
    ids: list[int]
    stream: TextStream
    written: str = ""
    tokens: int = 0
    ended: str | None = None  # length, end_of_text or stop

    def take(self, token: int) -> None:
        """Add a token's characters, as far as they are certain."""
        self.tokens += 1
        self.written += self.stream.feed(token)
        if self.stream.stopped:
            self.ended = "stop"

    def end(self, why: str) -> None:
        """Add what waited for more tokens."""
        if not self.ended:
            self.ended = why
            self.written += self.stream.end()


class Writer:
    """A loaded model that writes as config asks, and counts.

    Args:
        start: ids that an empty prompt stands for.
    """

    def __init__(self, config: InferConfig, decoder: Decoder, encoding: tiktoken.Encoding, start: list[int]):
        self.config, self.decoder, self.encoding, self.start = config, decoder, encoding, start
        self.rows = self.tokens = self.later = 0  # texts; tokens; tokens after each batch's first ones
        self.first, self.seconds = 0.0, 0.0  # until the very first tokens came; for the later ones
        self.context = decoder.model.config.context_length
        self.may_slide = True  # until that was said

    def text(self, prompt: str) -> Text:
        """A text to be written."""
        stream = TextStream(self.encoding, self.config.stop)
        return Text(prompt, self.encoding.encode_ordinary(prompt) or self.start, stream)

    def write(self, texts: list[Text], watch: Callable[[Tensor, Tensor], None] | None = None) -> Iterator[None]:
        """Continue texts to their ends, all at once; yields whenever they grew. `watch` as in generate_batch."""
        longest = max(len(text.ids) for text in texts)
        if longest + self.config.max_new_tokens - 1 > self.context and self.may_slide:
            self.may_slide = False
            dropped = f", the prompt's last {self.context:,} at first" if longest > self.context else ""
            say(
                f"note: up to {longest + self.config.max_new_tokens:,} tokens with the prompt; the model sees "
                f"{self.context:,} at once{dropped}, and then goes on from the newer {max(1, self.context // 2):,}"
            )
        began, came, compiling = time.perf_counter(), None, self.decoder.compile_seconds
        batch = generate_batch(
            self.decoder,
            [text.ids for text in texts],
            self.config.max_new_tokens,
            self.config,
            n_vocab=self.encoding.n_vocab,
            stop_ids=() if self.config.ignore_eot else (self.encoding.eot_token,),
            first_row=self.rows,
            on_sample=watch,
        )
        self.rows += len(texts)
        with contextlib.closing(batch):
            for tokens in batch:
                before, came = came, time.perf_counter()
                taken = 0
                for text, token in zip(texts, tokens, strict=True):
                    if token is None:
                        text.end("end_of_text")
                    elif not text.ended:
                        text.take(token)
                        taken += 1
                self.tokens += taken
                compiled, compiling = self.decoder.compile_seconds - compiling, self.decoder.compile_seconds
                if before is None:
                    self.first = self.first or came - began
                else:
                    self.later += taken
                    self.seconds += came - before - compiled
                yield
                if all(text.ended for text in texts):
                    break
        for text in texts:
            text.end("length" if text.tokens == self.config.max_new_tokens else "end_of_text")
        yield

    def pace(self) -> str:
        """What was written and how fast, for people."""
        line = f"{self.tokens:,} token{'s' * (self.tokens != 1)}, the first after {self.first:.2f} s"
        line += f", then {self.later / self.seconds:,.1f} tokens/s" if self.later else ""
        return line + (f"; compiling took {self.decoder.compile_seconds:.1f} s" if self.decoder.compile_seconds else "")


class Page:
    """Standard output: texts one after the other, the first that has not ended growing while it is written."""

    def __init__(self, titles: list[str], texts: list[Text], live: bool):
        self.titles, self.texts, self.live = titles, texts, live
        self.shown = -1  # characters of the first text on the page, -1: not even its prompt

    def look(self) -> None:
        """Print what is new."""
        while self.texts and (self.live or self.texts[0].ended):
            text = self.texts[0]
            if self.shown < 0:
                print(self.titles.pop(0) + text.prompt, end="")
                self.shown = 0
            new, self.shown = text.written[self.shown :], len(text.written)  # first: Ctrl-C prints nothing twice
            print(new, end="", flush=True)
            if not text.ended:
                return
            print(flush=True)
            self.texts, self.shown = self.texts[1:], -1

    def end(self) -> None:
        """Print the text that will not end by itself as far as it is."""
        if self.texts:
            self.live = True
            self.look()
            print(flush=True)


def read_prompts(config: InferConfig) -> list[str]:
    """The prompts that the command line asks for.

    Raises:
        UserError: a file that is not there, is no text, or holds no prompt.
    """
    if config.prompts_file:
        lines = _read(config.prompts_file).removesuffix("\n").split("\n")
        if lines == [""]:
            raise UserError(f"prompts_file = {config.prompts_file}: it is empty; a prompt a line is expected")
        return lines
    if config.prompt_file or config.standard_input:
        return [_read(config.prompt_file or "-").removesuffix("\n")]
    return [config.prompt]


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as why:
        where = "standard input" if name == "-" else name
        raise UserError(f"{where}: no UTF-8 text: {why.reason} at byte {why.start}; convert it first") from None


def load(config: InferConfig) -> tuple[Writer, ModelSource, dict]:
    """The model that config asks for, laid out for writing; where it was found; and facts about it."""
    device = find_device(config.device)
    if config.quantize and config.dtype == "float16" and device.type == "cpu":
        raise UserError("quantize = int8 takes bfloat16 products on a CPU: leave out dtype")
    found = loading.find(model_path(config), say)
    model, encoding = loading.load(found, device, config.context_length)
    facts = {"model": str(found.path), "iter": found.state.get("iter"), "parameters": model.num_params()}
    # On a CPU compiling pays for long int8 texts only; else oneDNN's packed weights are faster (docs/speed.md).
    compile = device.type == "cuda" if config.compile is None else config.compile
    dtype, measured = config.dtype, None
    if dtype == "auto" and device.type == "cpu" and not config.quantize:
        dtype, measured = faster_decoding_dtype(model, compile)
    place = select_device(config.device, dtype)
    decoder = Decoder(prepack(model, place.dtype, config.quantize, compile), compile)
    precision = config.quantize or str(place.dtype).removeprefix("torch.") + (f" ({measured})" if measured else "")
    facts["machine"] = f"{place.name}, {precision}, {'compiled' if compile else 'eager'}"
    say(f"{found.describe()}: {facts['parameters']:,} parameters, on {facts['machine']}")
    start = [encoding.eot_token] if found.end_of_text else encoding.encode_ordinary("\n")
    return Writer(config, decoder, encoding, start), found, facts


def converse(writer: Writer) -> None:
    """Prompts from the terminal, each continued on its own; Ctrl-C ends a text, and between texts the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as why:
            raise UserError(f"standard input: no UTF-8 text: {why.reason} at byte {why.start}") from None
        text = writer.text(prompt)
        page = Page([""], [text], writer.config.stream_text)
        try:
            for _ in writer.write([text]):
                page.look()
        except KeyboardInterrupt:
            page.end()


def report(config: InferConfig, writer: Writer, texts: list[Text]) -> dict:
    """What --json writes."""
    settings = [f.name for f in dataclasses.fields(SamplingConfig)] + ["max_new_tokens", "stop", "ignore_eot"]
    return {
        "settings": {key: getattr(config, key) for key in settings} | {"temperature": config.effective_temperature},
        "tokens": sum(text.tokens for text in texts),
        "seconds_to_first_token": writer.first,
        "tokens_per_s": writer.later / writer.seconds if writer.later else None,
        "texts": [
            {
                "prompt": text.prompt,
                "text": text.written,
                "prompt_tokens": len(text.ids),
                "tokens": text.tokens,
                "ended": text.ended or "interrupted",
            }
            for text in texts[: writer.rows]
        ],
    }


def main(config: InferConfig) -> None:
    """Write num_samples texts from each prompt; what was chosen is said on standard error."""
    require_writable(config.json, "json")
    prompts = [] if config.interactive else read_prompts(config)
    writer, _, facts = load(config)
    if config.interactive:
        return converse(writer)
    texts, titles = [], []
    for n, prompt in enumerate(prompts, 1):
        for sample in range(1, config.num_samples + 1):
            parts = [f"prompt {n} of {len(prompts)}"] * (len(prompts) > 1)
            parts += [f"sample {sample} of {config.num_samples}"] * (config.num_samples > 1)
            titles.append(f"--- {', '.join(parts)}\n" if parts else "")
            texts.append(writer.text(prompt))
    page = Page(titles, list(texts), config.stream_text)
    look = page.look if config.json != "-" else lambda: None
    try:
        for start in range(0, len(texts), config.batch_size):
            for _ in writer.write(texts[start : start + config.batch_size]):
                look()
            if config.json not in (None, "-"):  # what there is, in case that a long night ends early
                write_json({**facts, **report(config, writer, texts)}, config.json)
    except KeyboardInterrupt:
        if config.json != "-":
            page.end()
        raise
    finally:
        if writer.tokens:
            say(writer.pace())
        if config.json:
            write_json({**facts, **report(config, writer, texts)}, config.json)


if __name__ == "__main__":
    run_script(main, CONFIG)
