"""Generate text: checkpoint + prompt -> text on standard output.

python infer.py --prompt "First Citizen:"               # the newest run
python infer.py --model_path out/shakespeare --prompt "ROMEO:" --max_new_tokens 300 --temperature 0.9 --top_p 0.95
python infer.py --prompt "def " --num_samples 3 --seed 7 --stop $'\\n\\n'
python infer.py --prompts_file prompts.txt --json texts.json
echo "Once upon a time" | python infer.py -
"""

from flatgpt.cli.cli import from_command_line, run_script
from config import InferConfig, UserError, model_path

if __name__ == "__main__":
    CONFIG = from_command_line(InferConfig, __doc__)

import contextlib
import sys
from pathlib import Path

from flatgpt.data.text_files import decode
from flatgpt.inference.prepacking import prepare_for_decoding
from flatgpt.inference.sampling import NonFiniteLogitsError
from flatgpt.inference.writer import Text, Writer
from flatgpt.interop import loading
from flatgpt.runtime.device import find_device, note
from flatgpt.runtime.files import naming, require_writable, write_json


def main(config: InferConfig) -> None:
    """Generate num_samples texts per prompt. Texts go to standard output, everything else to standard error."""
    require_writable(config.json, "json")
    prompts = [] if config.interactive else read_prompts(config)
    device, found = find_device(config.device), loading.find(model_path(config), note)
    model, encoding = loading.load(found, device, config.context_length)
    parameters = model.num_params()  # before weights are quantized
    rows = min(config.batch_size, config.num_samples * len(prompts))
    settings = prepare_for_decoding(config, model, config.compile, rows)
    first = f"{found.describe()}: {parameters:,} parameters, on {settings.describe()}"
    note("\n".join([first, *settings.path_lines()]))
    writer = Writer(config, model, encoding, found.end_of_text, note)
    if config.interactive:
        return run_interactive(writer)
    facts = {"model": str(found.path), "iter": found.state.get("iter")}
    facts |= {"parameters": parameters, "machine": settings.describe()}
    write_texts(writer, prompts, facts)


def read_prompts(config: InferConfig) -> list[str]:
    """Return the prompts of the command line, a file or standard input.

    Raises:
        UserError: the input is not text, or prompts_file is empty.
    """
    name = config.prompts_file or config.prompt_file or config.standard_input
    if not name:
        return [config.prompt]
    with naming("standard input" if name == "-" else name):
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    text = "".join(decode([data], "standard input" if name == "-" else name)).replace("\r\n", "\n").removesuffix("\n")
    if not config.prompts_file:
        return [text]
    if not text:
        raise UserError(f"prompts_file = {name}: the file is empty; write one prompt per line")
    return text.split("\n")


def write_batch(writer: Writer, texts: list[Text], headers: list[str]) -> None:
    """Generate a batch of texts and print them in order. The first unfinished text is streamed.

    Args:
        headers: the line above each text, or an empty string. Texts beyond len(headers) are not printed.
    """
    waiting, printed = list(zip(headers, texts, strict=False)), 0
    try:
        for _ in writer.write(texts):
            while waiting and (writer.config.stream_text or waiting[0][1].ended):
                header, text = waiting[0]
                content = header + text.prompt + text.written + "\n" * bool(text.ended)
                # The count is set first, so that nothing is printed twice after Ctrl-C.
                new, printed = content[printed:], len(content)
                print(new, end="", flush=True)
                if not text.ended:
                    break
                waiting, printed = waiting[1:], 0
    except (KeyboardInterrupt, NonFiniteLogitsError):
        for header, text in waiting[:1]:  # the current text, as far as it was generated
            print((header + text.prompt + text.written)[printed:], flush=True)
        raise


def write_texts(writer: Writer, prompts: list[str], facts: dict) -> None:
    """Generate and print num_samples texts per prompt, and write the report to config.json.

    Args:
        facts: entries of the report that describe the model.
    """
    config, texts, headers = writer.config, [], []
    for n, prompt in enumerate(prompts, 1):
        for sample in range(1, config.num_samples + 1):
            parts = [f"prompt {n} of {len(prompts)}"] * (len(prompts) > 1)
            parts += [f"sample {sample} of {config.num_samples}"] * (config.num_samples > 1)
            headers.append(f"--- {', '.join(parts)}\n" if parts else "")
            texts.append(writer.text(prompt))
    if config.json == "-":
        headers = []
    try:
        for start in range(0, len(texts), config.batch_size):
            batch = slice(start, start + config.batch_size)
            write_batch(writer, texts[batch], headers[batch])
            if config.json not in (None, "-"):  # after each batch, in case the process is killed
                write_json({**facts, **writer.report(texts)}, config.json)
    finally:
        if writer.tokens:
            note(writer.summary())
        if config.json:
            write_json({**facts, **writer.report(texts)}, config.json)


def run_interactive(writer: Writer) -> None:
    """Continue each line of standard input. Ctrl-C ends the current text, or the program between texts."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            problem = f"standard input: byte 0x{error.object[error.start]:02x} is not UTF-8"
            raise UserError(f"{problem}: set the terminal to UTF-8") from None
        try:
            text = writer.text(prompt)
        except UserError as error:  # a character that the tokenizer does not have
            note(f"error: {error}")
            continue
        with contextlib.suppress(KeyboardInterrupt):
            write_batch(writer, [text], [""])


if __name__ == "__main__":
    run_script(main, CONFIG)
