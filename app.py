"""A playground in the browser: streams generated text with the probability of each token. Also an OpenAI endpoint.

python app.py                                          # the newest run, at http://127.0.0.1:7860
curl http://127.0.0.1:7860/v1/completions -d '{"prompt": "The ", "max_tokens": 50}'   # or an OpenAI client
python app.py --model_path out/shakespeare --temperature 0.9 --top_p 0.95
python app.py --model_path gpt2 --server_name 0.0.0.0  # other machines can connect
python export.py --model_path out/shakespeare --space space   # the same as a Hugging Face Space
"""

from flatgpt.cli.cli import from_command_line, parse, run_script
from config import AppConfig, InferConfig, UserError, model_path

if __name__ == "__main__":
    CONFIG = from_command_line(AppConfig, __doc__)

import base64
import contextlib
import dataclasses
import html
import importlib.util
import os
import re
import shlex
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

from flatgpt.inference.completions import STOP_LIMIT
from flatgpt.inference.model_queue import ModelQueue, Place
from flatgpt.inference.prepacking import prepare_for_decoding
from flatgpt.inference.web import serve, stream_html
from flatgpt.inference.writer import Writer
from flatgpt.interop import loading
from flatgpt.interop.hub import card_body
from flatgpt.runs import history
from flatgpt.runs.plots import plot_runs
from flatgpt.runtime.device import find_device, note

HERE = Path(__file__).resolve().parent


def main(config: AppConfig) -> None:
    """Serve the page and the API until Ctrl-C.

    Raises:
        UserError: gradio is not installed, or the address is not available.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("app.py needs gradio: pip install -r requirements-extra.txt, or pip install gradio")
    from flatgpt.inference.api import CompletionAPI, read_key  # imports what gradio brings along

    key, queue = read_key(config), ModelQueue(config.queue_limit)
    found, make_writer, described = load(config)
    facts = about(found)
    blocks = build(config, facts, make_writer, described, queue)
    api = CompletionAPI(config, queue, make_writer, facts[0], key)
    serve(blocks, config, queue, api.arguments())


def load(config: AppConfig) -> tuple[loading.ModelSource, Callable[[InferConfig], Writer], str]:
    """Load the model of the command line. The default in a folder of export.py --space is the folder's own model.

    Returns:
        the model's source, a function that returns a Writer for a visitor's settings, and size, device and updates as
        text.
    """
    if not model_path(config) and any((HERE / name).exists() for name in ("state.json", "config.json")):
        config = dataclasses.replace(config, model_path=str(HERE))
    device, found = find_device(config.device), loading.find(model_path(config), note)
    model, encoding = loading.load(found, device, config.context_length)
    parameters = model.num_params()  # before weights are quantized
    settings = prepare_for_decoding(config, model)
    described = f"{parameters:,} parameters, on "
    note("\n".join([f"{found.describe()}: {described}{settings.describe()}", *settings.path_lines()]))
    make_writer = partial(Writer, model=model, encoding=encoding, end_of_text=found.end_of_text)
    updates = f"; trained for {found.state['iter']:,} updates" if found.state.get("iter") else ""
    return found, make_writer, described + settings.describe(reasons=False) + updates


def request(config: AppConfig, prompt: str, stop: str, **options: object) -> InferConfig:
    """Return a visitor's input as settings of infer.py. Gradio has already checked the limits of the sliders.

    Args:
        stop: one string per line, with \\n for a newline.

    Raises:
        UserError: an option is outside its limits.
    """
    for name, text, limit in (("prompt", prompt, config.prompt_limit), ("stop", stop, STOP_LIMIT)):
        if len(text) > limit:
            raise UserError(f"{name}: {len(text):,} characters, at most {limit:,} here")
    stops = ["--stop=" + line.replace("\\n", "\n") for line in stop.splitlines() if line]
    options["parse_special"] = config.parse_special
    return parse(InferConfig, [f"--prompt={prompt}", *stops, *(f"--{key}={value}" for key, value in options.items())])


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
        wide, narrow = (base64.b64encode(plot_runs([log], format="svg", across=n)).decode() for n in (3, 1))
        data = "data:image/svg+xml;base64,"
        plots = f'<picture class="curve"><source media="(max-width: 700px)" srcset="{data}{narrow}">'
        plots += f'<img alt="training curves" src="{data}{wide}"></picture>'
    # A card begins with a YAML block and the model's name as a heading.
    heading, card = re.match(r"(?:---\n.*?\n---\n)?\s*(?:# *`?(.*?)`?\n)?(.*)", card, re.S).groups()
    return heading or name, card.strip(), plots


def build(
    config: AppConfig,
    facts: tuple[str, str, str],
    make_writer: Callable[[InferConfig], Writer],
    described: str,
    queue: ModelQueue,
):
    """Build the page as a gradio.Blocks. `facts` are those of `about`."""
    import gradio as gr

    name, card, plots = facts
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(InferConfig)}
    labels = {key: {"label": key.replace("_", " "), "info": text, "min_width": 300} for key, text in helps.items()}
    sliders = (  # key, minimum, maximum, step, initial value (may be out of range)
        ("num_samples", 1, config.sample_limit, 1, 1),
        ("max_new_tokens", 1, config.token_limit, 1, min(config.max_new_tokens, config.token_limit)),
        ("temperature", 0, 2, 0.05, config.effective_temperature),
        ("top_k", 0, 200, 1, config.top_k),
        ("top_p", 0.05, 1, 0.05, config.top_p),
        ("min_p", 0, 1, 0.01, config.min_p),
        ("repetition_penalty", 1, 2, 0.05, config.repetition_penalty),
    )

    async def write(prompt: str, stop: str, *values: object) -> AsyncIterator[list]:
        try:
            settings = request(config, prompt, stop, **dict(zip(options, values, strict=True)))
            unused = [gr.HTML(visible=False)] * (config.sample_limit - settings.num_samples)
            async with contextlib.aclosing(queue.stream(lambda: stream_html(make_writer(settings)))) as updates:
                async for update in updates:
                    if not isinstance(update, Place):
                        views, summary = update
                        yield [summary, *(gr.HTML(view, visible=True) for view in views), *unused]
                    elif update.ahead:
                        yield [f"queue: {update.ahead}/{update.waiting}", *[gr.skip()] * config.sample_limit]
        except UserError as error:
            raise gr.Error(html.escape(str(error).replace("--", "")), print_exception=False) from None

    with gr.Blocks(title=f"{name} · flatGPT", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {name}\n{described}")
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
                        integer = {"precision": 0} if step == 1 else {}
                        options[key] = gr.Slider(*limits, value, step=step, **integer, **labels[key])
                    options["seed"] = gr.Number(config.seed, precision=0, **labels["seed"])
                stop = gr.Textbox("", label="stop", info=f"{helps['stop']}; one per line, \\n for a newline", lines=2)
                options["ignore_eot"] = gr.Checkbox(config.ignore_eot, **labels["ignore_eot"])
            status = gr.Markdown("Shift+Enter also starts.", elem_id="status")
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
            concurrency_limit=None,  # `queue` is that of the API too
            trigger_mode="once",
            show_progress="minimal",
            show_progress_on=status,
            api_name="write",
        )
        end.click(None, cancels=[writing], api_visibility="private")
    return blocks.queue(max_size=config.queue_limit, api_open=False)  # an open API would bypass the queue


if __name__ == "__main__":
    if (HERE / "tiktoken_cache").is_dir():  # a Space contains its vocabulary
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(HERE / "tiktoken_cache"))
    run_script(main, CONFIG)
