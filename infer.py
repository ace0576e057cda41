"""Generate text: checkpoint + prompt -> text on standard output.

python infer.py --prompt "First Citizen:"               # the newest run
python infer.py --model_path out/shakespeare --prompt "ROMEO:" --max_new_tokens 300 --temperature 0.9 --top_p 0.95
python infer.py --prompt "def " --num_samples 3 --seed 7 --stop $'\\n\\n'
python infer.py --prompts_file prompts.txt --json texts.json
echo "Once upon a time" | python infer.py -
"""

from config import InferConfig, UserError, model_path
from flatgpt.cli.cli import from_command_line, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(InferConfig, __doc__)

import contextlib
import sys
from pathlib import Path

from flatgpt.inference.writer import Text, Writer, prepare
from flatgpt.interop import loading
from flatgpt.runtime.device import find_device, note
from flatgpt.runtime.files import require_writable, write_json


def main(config: InferConfig) -> None:
    """Write num_samples texts from each prompt. Figures go to standard error: standard output is for text."""
    require_writable(config.json, "json")
    prompts = [] if config.interactive else read_prompts(config)
    device, found = find_device(config.device), loading.find(model_path(config), note)
    model, encoding = loading.load(found, device, config.context_length)
    prepared = prepare(config, model, encoding, found.end_of_text, config.compile)
    note(f"{found.describe()}: {prepared.describe()}")
    writer = Writer(config, prepared, note)
    if config.interactive:
        return converse(writer)
    facts = {"model": str(found.path), "iter": found.state.get("iter")}
    facts |= {"parameters": model.config.num_params(), "machine": prepared.machine}
    write_texts(writer, prompts, facts)


def read_prompts(config: InferConfig) -> list[str]:
    """Return the prompts that the command line names.

    Raises:
        UserError: a file that is not UTF-8 text, or that holds no prompt.
    """
    if config.prompts_file:
        lines = read_text(config.prompts_file).removesuffix("\n").split("\n")
        if lines == [""]:
            raise UserError(f"prompts_file = {config.prompts_file}: the file is empty; write one prompt per line")
        return lines
    if config.prompt_file or config.standard_input:
        return [read_text(config.prompt_file or "-").removesuffix("\n")]
    return [config.prompt]


def read_text(name: str) -> str:
    """Return the text of a file, or of standard input for `-`."""
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8("standard input" if name == "-" else name, error) from None


def not_utf8(name: str, error: UnicodeDecodeError) -> UserError:
    """Return the error that names the byte at which a text stops being UTF-8."""
    return UserError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}; convert it to UTF-8 first")


class ConsoleView:
    """Prints texts one after the other. The first one that has not ended is printed while it grows.

    Args:
        texts: each with the line above it, or an empty string.
        live: print a text while it grows, else once it has ended.
    """

    def __init__(self, texts: list[tuple[str, Text]], live: bool):
        self.texts, self.live = texts, live
        self.printed = 0  # characters of the first text that are printed, header and prompt included

    def update(self) -> None:
        """Print what is new."""
        while self.texts and (self.live or self.texts[0][1].ended):
            header, text = self.texts[0]
            content = header + text.prompt + text.written + "\n" * bool(text.ended)
            # The count is set first, so that nothing is printed twice after Ctrl-C.
            new, self.printed = content[self.printed :], len(content)
            print(new, end="", flush=True)
            if not text.ended:
                return
            self.texts, self.printed = self.texts[1:], 0

    def interrupt(self) -> None:
        """Print the current text as far as it has been generated."""
        if self.texts:
            self.live = True
            self.update()
            print(flush=True)


def write_texts(writer: Writer, prompts: list[str], facts: dict) -> None:
    """Write and print num_samples texts from each prompt, and the report that config.json names.

    Args:
        facts: about the model, for the report.
    """
    config, texts, headers = writer.config, [], []
    for n, prompt in enumerate(prompts, 1):
        for sample in range(1, config.num_samples + 1):
            parts = [f"prompt {n} of {len(prompts)}"] * (len(prompts) > 1)
            parts += [f"sample {sample} of {config.num_samples}"] * (config.num_samples > 1)
            headers.append(f"--- {', '.join(parts)}\n" if parts else "")
            texts.append(writer.text(prompt))
    view = ConsoleView([] if config.json == "-" else list(zip(headers, texts, strict=True)), config.stream_text)
    try:
        for start in range(0, len(texts), config.batch_size):
            for _ in writer.write(texts[start : start + config.batch_size]):
                view.update()
            if config.json not in (None, "-"):  # after each batch, in case a long run is killed
                write_json({**facts, **writer.report(texts)}, config.json)
    except KeyboardInterrupt:
        view.interrupt()
        raise
    finally:
        if writer.tokens:
            note(writer.summary())
        if config.json:
            write_json({**facts, **writer.report(texts)}, config.json)


def converse(writer: Writer) -> None:
    """Continue each prompt that is typed. Ctrl-C ends the current text; between texts it ends the program."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise not_utf8("standard input", error) from None
        text = writer.text(prompt)
        view = ConsoleView([("", text)], writer.config.stream_text)
        try:
            for _ in writer.write([text]):
                view.update()
        except KeyboardInterrupt:
            view.interrupt()


if __name__ == "__main__":
    run_script(main, CONFIG)
