"""A playground in the browser: prompt -> text as it is made, with the probability of each token.

python app.py                                          # the newest run, at http://127.0.0.1:7860
python app.py --model_path out/shakespeare --temperature 0.9 --top_p 0.95
python app.py --model_path gpt2 --server_name 0.0.0.0  # seen by other machines
python export.py --model_path out/shakespeare --space space   # the same as a Hugging Face Space
"""

import os
from pathlib import Path

from config import AppConfig, InferConfig, UserError
from flatgpt.cli.cli import from_command_line, parse, run_script

if __name__ == "__main__":
    CONFIG = from_command_line(AppConfig, __doc__)

import base64
import dataclasses
import html
import math
import re
import shlex
import threading
import time
from collections.abc import Iterator

import tiktoken

from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import top_token_probs
from flatgpt.interop.model_card import body
from flatgpt.runs import history
from flatgpt.runs.plots import plot_runs, render
from infer import Writer, load

HERE = Path(__file__).resolve().parent
SHOWN = 5  # alternatives to each token
DARK = 8.0  # nats of surprise that shade a token as dark as can be
PAUSE = 0.1  # seconds between two pictures of growing texts
HINT = " · point at a token to see what else might have been there"
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
#told { min-height: 3rem; }
#told .wrap { height: 100%; }
#texts { flex-wrap: wrap; }
#texts > * { flex: 1 1 280px; min-width: 0; }
.curve { overflow-x: auto; }
.curve img { width: 100%; min-width: 640px; }
footer { display: none !important; }
"""
# A card may be somebody else's: no pictures from elsewhere, which tell who looks; Spaces have their own on the hub.
POLICY = """<meta http-equiv="Content-Security-Policy" content="form-action 'none'; media-src 'self';
  img-src 'self' data: https://huggingface.co https://*.huggingface.co">"""


class Page:
    """One text as HTML that only grows: the prompt, then a span for each token with what might have been instead."""

    def __init__(self, prompt: str, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.html = f'<div class="text"><span class="prompt">{html.escape(prompt)}</span>'
        self._waiting: list[str] = []  # the odds of tokens whose characters are not certain yet
        self._surprise = 0.0  # of these, in nats

    def add(self, characters: str, odds: list[tuple[int, float]] | None) -> None:
        """What a text grew by, and what sampling.top_token_probs said of the token, None at its end."""
        if odds:
            self._waiting.append(self._table(odds))
            self._surprise -= math.log(max(odds[0][1], 1e-9))
        if characters:
            told = html.escape("\n\n".join(self._waiting)).replace("\n", "&#10;")
            self.html += f'<span class="token" style="--s:{min(self._surprise / DARK, 1):.2f}" data-odds="{told}">'
            self.html += f"{html.escape(characters)}</span>"
            self._waiting, self._surprise = [], 0.0

    def _table(self, odds: list[tuple[int, float]]) -> str:
        """A line for each of the likeliest; the drawn one is marked, and added where it is none of them."""
        drawn, *best = odds
        lines = [*best, *([] if drawn[0] in dict(best) else [drawn])]
        return "\n".join(f"{'▸' if id == drawn[0] else ' '} {p:6.1%}  {self._visible(id)}" for id, p in lines)

    def _visible(self, id: int) -> str:
        text = self.encoding.decode_single_token_bytes(id).decode("utf-8", "backslashreplace")
        return "“" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + "”"


class Playground:
    """A loaded model, and what a visitor may ask of it."""

    def __init__(self, config: AppConfig):
        self.config = config
        names = {f.name for f in dataclasses.fields(InferConfig)} & {f.name for f in dataclasses.fields(AppConfig)}
        asked = {name: getattr(config, name) for name in names}
        if not (config.model_path or config.config or config.out_dir) and any(
            (HERE / name).exists() for name in ("state.json", "config.json")
        ):
            asked["model_path"] = str(HERE)  # a folder that export.py --space wrote
        # compiled steps are for one length and take half a minute: not for visitors
        self.writer, self.found, facts = load(InferConfig(**asked, compile=False))
        path, self.parameters = self.found.path, facts["parameters"]
        self.folder = path.parent.parent if path.parent.name == "ckpt" else path
        when = f", after {facts['iter']:,} updates" if facts["iter"] else ""
        self.facts = f"{self.parameters:,} parameters{when}; on {facts['machine']}"
        # what a card says first is its YAML block and the model's name
        said = re.match(r"(?:---\n.*?\n---\n)?\s*(?:# *`?(.*?)`?\n)?(.*)", self._card(), re.S)
        self.name, self.card = said[1] or self.folder.resolve().name, said[2].strip()

    def _card(self) -> str:
        """The model card that lies with the model, else a new one."""
        file = self.found.path / "README.md"
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
        name = self.folder.resolve().name
        return body(
            self.found.path,
            self.found.state,
            self.found.config,
            name=name,
            tokenizer=self.found.tokenizer,
            parameters=self.parameters,
            dtype="float32",
            recipe="",
            use=f"```sh\npython infer.py --model_path {shlex.quote(f'out/{name}')} --prompt 'Once upon a time'\n```",
            as_trained=True,
        )

    def curve(self) -> str:
        """The run's log as a picture within the page; empty where there is none."""
        if not self.folder.is_dir() or not len(logged := history.read(self.folder)):
            return ""
        data = base64.b64encode(render(plot_runs([logged]), "svg")).decode()
        picture_of = f'<img alt="losses, learning rate, speed" src="data:image/svg+xml;base64,{data}">'
        return f'<div class="curve">{picture_of}</div>'

    def settings(self, prompt: str, stop: str, **asked: object) -> InferConfig:
        """What a visitor asks for, as infer.py would take it.

        Args:
            stop: a string a line, with \\n for a line's end.

        Raises:
            UserError: says what is out of its limits.
        """
        limits = {"max_new_tokens": self.config.token_limit, "num_samples": self.config.sample_limit}
        stops = [line.replace("\\n", "\n") for line in stop.splitlines() if line]
        if len(prompt) > self.config.prompt_limit:
            raise UserError(f"the prompt has {len(prompt):,} characters: at most {self.config.prompt_limit:,} here")
        if len(stops) > 8 or len(stop) > 200:
            raise UserError("stop: at most 8 strings, together 200 characters, here")
        words = [f"--prompt={prompt}", *(f"--stop={text}" for text in stops)]
        for key, value in asked.items():
            whole = isinstance(value, float) and value.is_integer()  # a slider's 40.0
            words.append(f"--{key}={int(value) if whole else value}")
        settings = parse(InferConfig, words)
        for key, limit in limits.items():
            if getattr(settings, key) > limit:
                raise UserError(f"{key} = {getattr(settings, key):,}: at most {limit:,} here")
        return settings

    def write(self, settings: InferConfig) -> Iterator[tuple[list[Page], str]]:
        """Pages that grow, and a line about them; a decoder of its own, as an earlier visitor's may not have ended."""
        writer = Writer(settings, Decoder(self.writer.decoder.model), self.writer.encoding, self.writer.start)
        writer.may_slide = False  # nobody reads its note
        texts = [writer.text(settings.prompt) for _ in range(settings.num_samples)]
        pages, shown = [Page(settings.prompt, writer.encoding) for _ in texts], [0] * len(texts)
        odds: list = []

        def watch(logits, tokens) -> None:
            odds[:] = top_token_probs(logits, tokens, SHOWN)

        counts, drawn = [0] * len(texts), 0.0
        for _ in writer.write(texts, watch):
            for n, (text, page) in enumerate(zip(texts, pages, strict=True)):
                page.add(text.written[shown[n] :], odds[n] if text.tokens > counts[n] else None)
                shown[n], counts[n] = len(text.written), text.tokens
            if time.perf_counter() - drawn > PAUSE:
                drawn = time.perf_counter()
                yield pages, f"{writer.tokens:,} tokens"
        yield pages, writer.pace()


def build(playground: Playground):
    """The page, a gradio.Blocks."""
    import gradio as gr

    config = playground.config
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(InferConfig)}
    sliders = (  # from, to, step, at first; what the command line asks for may lie outside
        ("num_samples", 1, config.sample_limit, 1, 1),
        ("max_new_tokens", 1, config.token_limit, 1, min(config.max_new_tokens, config.token_limit)),
        ("temperature", 0, 2, 0.05, config.effective_temperature),
        ("top_k", 0, 200, 1, config.top_k),
        ("top_p", 0.05, 1, 0.05, config.top_p),
        ("min_p", 0, 1, 0.01, config.min_p),
        ("repetition_penalty", 1, 2, 0.05, config.repetition_penalty),
    )

    def labelled(key: str) -> dict:
        return {"label": key.replace("_", " "), "info": helps[key]}

    def write(prompt, stop, *values) -> Iterator[list]:
        try:
            settings = playground.settings(prompt, stop, **dict(zip(controls, values, strict=True)))
        except UserError as why:
            raise gr.Error(html.escape(str(why).replace("--", "")), print_exception=False) from None
        empty = [gr.HTML(visible=False)] * (config.sample_limit - settings.num_samples)
        for pages, told in playground.write(settings):
            yield [f"{told}{HINT}", *(gr.HTML(page.html, visible=True) for page in pages), *empty]

    with gr.Blocks(title=f"{playground.name} · flatGPT", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {playground.name}\n{playground.facts}")
        with gr.Tab("Write"):
            prompt = gr.Textbox(
                "", label="Prompt", info=helps["prompt"], lines=3, max_length=config.prompt_limit, autofocus=True
            )
            with gr.Row():
                start = gr.Button("Write", variant="primary", min_width=100)
                end = gr.Button("Stop", min_width=100)
            with gr.Accordion("Options", open=False):
                with gr.Row():
                    controls = {
                        key: gr.Slider(
                            min(low, value), max(high, value), value, step=step, min_width=300, **labelled(key)
                        )
                        for key, low, high, step, value in sliders
                    }
                    controls["seed"] = gr.Number(config.seed, precision=0, min_width=300, **labelled("seed"))
                info = f"{helps['stop']}; one a line, \\n for a line's end"
                stop = gr.Textbox("", label="stop", info=info, lines=2)
                controls["ignore_eot"] = gr.Checkbox(config.ignore_eot, **labelled("ignore_eot"))
            told = gr.Markdown("Shift+Enter writes too.", elem_id="told")
            with gr.Row(elem_id="texts"):
                texts = [gr.HTML(visible=False) for _ in range(config.sample_limit)]
        with gr.Tab("About"):
            gr.HTML(playground.curve())
            gr.Markdown(playground.card, latex_delimiters=[])
        writing = gr.on(
            [start.click, prompt.submit],
            write,
            [prompt, stop, *controls.values()],
            [told, *texts],
            concurrency_limit=1,
            trigger_mode="once",
            show_progress="minimal",
            show_progress_on=told,
            api_name="write",
        )
        end.click(None, cancels=[writing], api_visibility="private")
    return blocks.queue(max_size=config.queue_limit, api_open=False)  # open: requests may go past the queue


def main(config: AppConfig) -> None:
    """Serve the page until Ctrl-C."""
    try:
        import gradio  # noqa: F401 - slow to load: before the model
    except ImportError:
        raise UserError("app.py needs gradio: pip install -r requirements-extra.txt, or pip install gradio") from None
    playground = Playground(config)
    blocks, name = build(playground), config.server_name
    try:
        server, url, _ = blocks.launch(
            server_name=f"[{name}]" if name and ":" in name else name,  # of IPv6, as in a URL
            server_port=config.server_port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            max_file_size=1,
            footer_links=[],
            css=STYLE,
            head=POLICY,
        )
    except OSError:
        where = f"server_name = {config.server_name}, server_port = {config.server_port}"
        why = "the port is taken, or the address is none of this machine's"
        raise UserError(f"{where}: cannot listen there: {why}; give others, or leave them out") from None
    server.uploaded_file_dir = os.devnull  # where no folder can be made: not even an empty file is taken
    print(f"{url.rstrip('/')} - Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


if __name__ == "__main__":
    if (HERE / "tiktoken_cache").is_dir():  # a Space brings its vocabulary along
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(HERE / "tiktoken_cache"))
    run_script(main, CONFIG)
