"""A playground in the browser: prompt -> text as it is generated, with the probability of each token.

python app.py                                          # the newest run, at http://127.0.0.1:7860
python app.py --model_path out/shakespeare --temperature 0.9 --top_p 0.95
python app.py --model_path gpt2 --server_name 0.0.0.0  # other machines can connect
python export.py --model_path out/shakespeare --space space   # the same as a Hugging Face Space
"""

from config import AppConfig, InferConfig, UserError, model_path
from flatgpt.cli.cli import from_command_line, parse, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(AppConfig, __doc__)

import base64
import dataclasses
import html
import importlib.util
import math
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import tiktoken

from flatgpt.inference.prepacking import prepare_for_decoding
from flatgpt.inference.writer import Text, Writer
from flatgpt.interop import loading
from flatgpt.interop.hub import card_body
from flatgpt.runs import history
from flatgpt.runs.plots import plot_runs
from flatgpt.runtime.device import find_device, note

HERE = Path(__file__).resolve().parent
STOP_LIMIT = 200  # most characters of a visitor's stop strings
ALTERNATIVES = 5  # most likely tokens that are listed for each token
HINT = " · point at a token to see what else might have been there"
UPDATE_SECONDS = 0.1  # time between two updates of the page
DARKEST = 8.0  # surprise in nats from which on a token has the darkest shade
STYLE = """
.text { white-space: break-spaces; overflow-wrap: anywhere; unicode-bidi: plaintext; padding: 12px; line-height: 1.7;
  font-family: var(--font-mono); font-size: 0.9rem; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.text .prompt { font-weight: 700; }
.text .token { background: rgb(0 114 178 / calc(var(--s) * 0.45)); border-radius: 2px; }
.text .token:hover { outline: 2px solid rgb(0 114 178); }
.text .token:hover::after { content: attr(data-odds); position: fixed; bottom: 12px; left: 50%; z-index: 100;
  transform: translateX(-50%); white-space: pre; padding: 10px 14px; border-radius: 8px; line-height: 1.5;
  background: #1b1f24; color: #fff; box-shadow: 0 2px 12px rgb(0 0 0 / 0.4); max-width: 94vw; overflow: hidden;
  pointer-events: none; }
#status { min-height: 3rem; }
#status .wrap { height: 100%; }
#texts { flex-wrap: wrap; }
#texts > * { flex: 1 1 280px; min-width: 0; }
.curve { overflow-x: auto; }
.curve img { width: 100%; min-width: 640px; }
footer { display: none !important; }
"""
# A model card may come from a stranger, and an image on another server would tell that server who opened the page.
# The hub is allowed, as cards of Spaces keep their images there.
POLICY = """<meta http-equiv="Content-Security-Policy" content="form-action 'none'; media-src 'self';
  img-src 'self' data: https://huggingface.co https://*.huggingface.co">"""

# Nothing leaves this machine, and nothing but the page is served.
DISABLED = ("share", "show_error", "ssr_mode", "mcp_server", "enable_monitoring", "run_history")


def main(config: AppConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: gradio is not installed, or the address cannot be listened on.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("app.py needs gradio: pip install -r requirements-extra.txt, or pip install gradio")
    blocks = build(config, *load(config))
    try:
        server, url, _ = blocks.launch(
            server_name=config.server_name,
            server_port=config.server_port,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=1,
            footer_links=[],
            css=STYLE,
            head=POLICY,
            **dict.fromkeys(DISABLED, False),
        )
    except OSError:
        raise UserError(
            f"server_name = {config.server_name}, server_port = {config.server_port}: cannot listen there: the port is "
            "in use, or the address does not belong to this machine; choose others, or leave them out"
        ) from None
    server.uploaded_file_dir = os.devnull  # no folder can be created there, so that even empty files are refused
    print(f"{url.rstrip('/')} - stop with Ctrl-C", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)  # waits for a text in progress: torch aborts a process that ends meanwhile


def load(config: AppConfig) -> tuple[loading.ModelSource, Callable[[InferConfig], Writer], str]:
    """Load the model that the command line names; in a folder that export.py --space wrote, its model.

    Returns:
        where it is, a function that makes a writer for a visitor's settings, and its size and the machine in words.
    """
    if not model_path(config) and any((HERE / name).exists() for name in ("state.json", "config.json")):
        config = dataclasses.replace(config, model_path=str(HERE))
    device, found = find_device(config.device), loading.find(model_path(config), note)
    model, encoding = loading.load(found, device, config.context_length)
    # A step compiles for half a minute, for one length of text: too long for visitors.
    machine = prepare_for_decoding(config, model, compile=False).describe()
    described = f"{model.num_params():,} parameters, on {machine}"
    note(f"{found.describe()}: {described}")
    return found, partial(Writer, model=model, encoding=encoding, end_of_text=found.end_of_text), described


def request(config: AppConfig, prompt: str, stop: str, **options: object) -> InferConfig:
    """Return what a visitor asks for as settings of infer.py. Gradio has checked that sliders are within their limits.

    Args:
        stop: a string per line, with \\n for a newline.

    Raises:
        UserError: an option is out of its limits.
    """
    for name, text, limit in (("prompt", prompt, config.prompt_limit), ("stop", stop, STOP_LIMIT)):
        if len(text) > limit:
            raise UserError(f"{name}: {len(text):,} characters, at most {limit:,} here")
    words = ["--stop=" + line.replace("\\n", "\n") for line in stop.splitlines() if line]
    return parse(InferConfig, [f"--prompt={prompt}", *words, *(f"--{key}={value}" for key, value in options.items())])


def about(found: loading.ModelSource) -> tuple[str, str, str]:
    """Return the model's name, its card as Markdown, and the plots of its run as HTML (empty without a log)."""
    run = found.path.parent.parent if found.path.parent.name == "ckpt" else found.path
    name, file, plots = run.resolve().name, found.path / "README.md", ""
    if file.is_file():
        card = file.read_text(encoding="utf-8", errors="replace")
    else:
        use = f"```sh\npython infer.py --model_path {shlex.quote(f'out/{name}')} --prompt 'Once upon a time'\n```"
        card = card_body(found, name=name, use=use)
    if run.is_dir() and len(log := history.read(run)):
        svg = base64.b64encode(plot_runs([log], format="svg")).decode()
        plots = f'<div class="curve"><img alt="training curves" src="data:image/svg+xml;base64,{svg}"></div>'
    # A card begins with a YAML block and the model's name as a heading.
    heading, card = re.match(r"(?:---\n.*?\n---\n)?\s*(?:# *`?(.*?)`?\n)?(.*)", card, re.S).groups()
    return heading or name, card.strip(), plots


class HtmlView:
    """The HTML of one text: the prompt, then a span for each token. It only grows.

    Attributes:
        html: the HTML so far. Its outermost element is left open, which browsers accept.
    """

    def __init__(self, text: Text, encoding: tiktoken.Encoding):
        self.html = f'<div class="text"><span class="prompt">{html.escape(text.prompt)}</span>'
        self._text, self._encoding = text, encoding
        self._characters = self._tokens = 0  # of the text, that have been seen
        self._waiting: list[list[tuple[int, float]]] = []  # top_probs of tokens whose characters are not certain yet

    def update(self) -> None:
        """Add what is new. Call it after each token."""
        text = self._text
        if text.tokens > self._tokens:
            self._waiting.append(text.top_probs)
            self._tokens = text.tokens
        if characters := text.written[self._characters :]:
            surprise = -sum(math.log(max(probs[0][1], 1e-9)) for probs in self._waiting)
            odds = html.escape("\n\n".join(map(self._table, self._waiting))).replace("\n", "&#10;")
            self.html += f'<span class="token" style="--s:{min(surprise / DARKEST, 1):.2f}" data-odds="{odds}">'
            self.html += f"{html.escape(characters)}</span>"
            self._waiting, self._characters = [], len(text.written)

    def _table(self, top_probs: list[tuple[int, float]]) -> str:
        """Return a line for each of the most likely tokens, the chosen one marked, and appended if it is not one."""
        (chosen, _), *likely = top_probs
        lines = []
        for id, p in dict([*likely, top_probs[0]]).items():
            text = self._encoding.decode_single_token_bytes(id).decode("utf-8", "backslashreplace")
            printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
            lines.append(f"{'▸' if id == chosen else ' '} {p:6.1%}  “{printable}”")
        return "\n".join(lines)


def stream_html(writer: Writer) -> Iterator[tuple[list[str], str]]:
    """Write num_samples texts. Yields the HTML of each and a status line whenever the page should be updated."""
    texts = [writer.text(writer.config.prompt) for _ in range(writer.config.num_samples)]
    views = [HtmlView(text, writer.encoding) for text in texts]
    updated = 0.0
    for _ in writer.write(texts, top_probs=ALTERNATIVES):
        for view in views:
            view.update()
        if time.perf_counter() - updated > UPDATE_SECONDS:
            updated = time.perf_counter()
            yield [view.html for view in views], f"{writer.tokens:,} tokens{HINT}"
    yield [view.html for view in views], writer.summary() + HINT


def build(config: AppConfig, found: loading.ModelSource, make_writer: Callable[[InferConfig], Writer], described: str):
    """Return the page, a gradio.Blocks."""
    import gradio as gr

    name, card, plots = about(found)
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(InferConfig)}
    labels = {key: {"label": key.replace("_", " "), "info": text, "min_width": 300} for key, text in helps.items()}
    sliders = (  # key, least, most, step, initial value, which may lie outside
        ("num_samples", 1, config.sample_limit, 1, 1),
        ("max_new_tokens", 1, config.token_limit, 1, min(config.max_new_tokens, config.token_limit)),
        ("temperature", 0, 2, 0.05, config.effective_temperature),
        ("top_k", 0, 200, 1, config.top_k),
        ("top_p", 0.05, 1, 0.05, config.top_p),
        ("min_p", 0, 1, 0.01, config.min_p),
        ("repetition_penalty", 1, 2, 0.05, config.repetition_penalty),
    )

    def write(prompt: str, stop: str, *values: object) -> Iterator[list]:
        try:
            settings = request(config, prompt, stop, **dict(zip(options, values, strict=True)))
        except UserError as error:
            raise gr.Error(html.escape(str(error).replace("--", "")), print_exception=False) from None
        unused = [gr.HTML(visible=False)] * (config.sample_limit - settings.num_samples)
        # Visitors share no writer: the texts of an earlier one may still be in progress.
        for pages, line in stream_html(make_writer(settings)):
            yield [line, *(gr.HTML(page, visible=True) for page in pages), *unused]

    with gr.Blocks(title=f"{name} · flatGPT", analytics_enabled=False) as blocks:
        updates = f"; trained for {found.state['iter']:,} updates" if found.state.get("iter") else ""
        gr.Markdown(f"# {name}\n{described}{updates}")
        with gr.Tab("Write"):
            box = {"lines": 3, "max_length": config.prompt_limit, "autofocus": True}
            prompt = gr.Textbox("", label="Prompt", info=helps["prompt"], **box)
            with gr.Row():
                start = gr.Button("Write", variant="primary", min_width=100)
                end = gr.Button("Stop", min_width=100)
            with gr.Accordion("Options", open=False):
                with gr.Row():
                    options = {}
                    for key, low, high, step, value in sliders:
                        limits = min(low, value), max(high, value)
                        whole = {"precision": 0} if step == 1 else {}
                        options[key] = gr.Slider(*limits, value, step=step, **whole, **labels[key])
                    options["seed"] = gr.Number(config.seed, precision=0, **labels["seed"])
                stop = gr.Textbox("", label="stop", info=f"{helps['stop']}; one per line, \\n for a newline", lines=2)
                options["ignore_eot"] = gr.Checkbox(config.ignore_eot, **labels["ignore_eot"])
            status = gr.Markdown("Shift+Enter writes, too.", elem_id="status")
            with gr.Row(elem_id="texts"):
                texts = [gr.HTML(visible=False) for _ in range(config.sample_limit)]
        with gr.Tab("About"):
            gr.HTML(plots)
            gr.Markdown(card, latex_delimiters=[])
        writing = gr.on(
            [start.click, prompt.submit],
            write,
            [prompt, stop, *options.values()],
            [status, *texts],
            concurrency_limit=1,
            trigger_mode="once",
            show_progress="minimal",
            show_progress_on=status,
            api_name="write",
        )
        end.click(None, cancels=[writing], api_visibility="private")
    return blocks.queue(max_size=config.queue_limit, api_open=False)  # open: requests could go past the queue


if __name__ == "__main__":
    if (HERE / "tiktoken_cache").is_dir():  # a Space contains its vocabulary
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(HERE / "tiktoken_cache"))
    run_script(main, CONFIG)
