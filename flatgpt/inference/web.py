"""HTML of generated texts, style sheet and server for app.py."""

from __future__ import annotations

import html
import math
import os
import sys
import threading
import time
from collections.abc import Iterator

import tiktoken

from config import AppConfig, UserError, first_line
from flatgpt.inference.model_queue import ModelQueue
from flatgpt.inference.sampling import TokenLogprobs
from flatgpt.inference.writer import Text, Writer

ALTERNATIVES = 5  # number of most likely tokens to list for each token
HINT = " · point at a token to see the most likely tokens in its place"
UPDATE_SECONDS = 0.1  # time between two updates of the page
DARKEST = 8.0  # surprisal in nats at which the shade of a token is darkest
STYLE = """
.text { white-space: break-spaces; overflow-wrap: anywhere; unicode-bidi: plaintext; padding: 12px; line-height: 1.7;
  font-family: var(--font-mono); font-size: 0.9rem; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.text .prompt { font-weight: 700; }
.text .token { background: rgb(0 114 178 / calc(var(--s) * 0.45)); border-radius: 2px; }
.dark .text .token { background: rgb(86 180 233 / calc(var(--s) * 0.55)); }
.text .token:hover { outline: 2px solid rgb(0 114 178); }
.text .token:hover::after { content: attr(data-odds); position: fixed; bottom: 12px; left: 50%; z-index: 100;
  transform: translateX(-50%); white-space: pre; padding: 10px 14px; border-radius: 8px; line-height: 1.5;
  background: #1b1f24; color: #fff; box-shadow: 0 2px 12px rgb(0 0 0 / 0.4); max-width: 94vw; overflow: hidden;
  border: 1px solid rgb(255 255 255 / 0.25); pointer-events: none; }
#status { min-height: 3rem; }
#status .wrap { height: 100%; }
#texts { flex-wrap: wrap; }
#texts > * { flex: 1 1 280px; min-width: 0; }
#texts .html-container { padding: 0; }
.curve img { width: 100%; }
.prose code { white-space: pre-wrap; overflow-wrap: anywhere; }
body:not(.dark) .gradio-container { --block-info-text-color: var(--neutral-600); }
footer { display: none !important; }
"""
# A model card may be untrusted: an image on another server would tell that server who opens the page.
# The hub is allowed because cards of Spaces store their images there.
POLICY = """<meta http-equiv="Content-Security-Policy" content="form-action 'none'; media-src 'self';
  img-src 'self' data: https://huggingface.co https://*.huggingface.co">"""

# features of gradio that send data to other servers, or serve more than the page
DISABLED = ("share", "show_error", "ssr_mode", "mcp_server", "enable_monitoring", "run_history")


class HtmlView:
    """HTML of one text: the prompt, then a span for each token. Content is only appended.

    Attributes:
        html: the HTML so far. Its outermost element is left open, which browsers accept.
    """

    def __init__(self, text: Text, encoding: tiktoken.Encoding):
        self.html = f'<div class="text"><span class="prompt">{html.escape(text.prompt)}</span>'
        self._text, self._encoding = text, encoding
        self._characters = self._tokens = 0  # numbers of characters and tokens in the HTML

    def update(self) -> None:
        """Append new characters, with the tokens since the last ones."""
        text = self._text
        if characters := text.written[self._characters :]:
            tokens = text.logprobs[self._tokens :]
            surprisal = -sum(logprobs[0][1] for logprobs in tokens)
            odds = html.escape("\n\n".join(map(self._table, tokens))).replace("\n", "&#10;")
            self.html += f'<span class="token" style="--s:{min(surprisal / DARKEST, 1):.2f}" data-odds="{odds}">'
            self.html += f"{html.escape(characters)}</span>"
            self._characters, self._tokens = len(text.written), len(text.logprobs)

    def _table(self, logprobs: TokenLogprobs) -> str:
        """Return a line per most likely token. The sampled token is marked, and appended if it is not among them."""
        (sampled, _), *likely = logprobs
        lines = []
        for id, logprob in dict([*likely, logprobs[0]]).items():
            text = self._encoding.decode_single_token_bytes(id).decode("utf-8", "backslashreplace")
            printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
            lines.append(f"{'▸' if id == sampled else ' '} {math.exp(logprob):6.1%}  “{printable}”")
        return "\n".join(lines)


def stream_html(writer: Writer) -> Iterator[tuple[list[str], str]]:
    """Generate num_samples texts. Yield the HTML of each and a status line for each update of the page."""
    texts = [writer.text(writer.config.prompt) for _ in range(writer.config.num_samples)]
    views = [HtmlView(text, writer.encoding) for text in texts]
    updated = 0.0
    for _ in writer.write(texts, logprobs=ALTERNATIVES):
        for view in views:
            view.update()
        if time.perf_counter() - updated > UPDATE_SECONDS:
            updated = time.perf_counter()
            yield [view.html for view in views], f"{writer.tokens:,} tokens{HINT}"
    yield [view.html for view in views], writer.summary() + HINT


def serve(blocks, config: AppConfig, queue: ModelQueue, more: dict) -> None:
    """Serve a gradio.Blocks until Ctrl-C.

    Args:
        queue: runs the page's requests. It is closed at the end.
        more: arguments of the FastAPI application: `routes` beside the page's, and `middleware`.

    Raises:
        UserError: the address is not available.
    """
    server_name, server_port = config.server_name, config.server_port
    try:
        server, url, _ = blocks.launch(
            server_name=server_name,
            server_port=server_port,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=1,
            max_threads=config.queue_limit + 40,  # the page's requests wait in `queue` only
            app_kwargs=more,
            footer_links=[],
            css=STYLE,
            head=POLICY,
            **dict.fromkeys(DISABLED, False),
        )
    except OSError as error:
        given = {"server_name": server_name, "server_port": server_port}
        names = ", ".join(f"{key} = {value}" for key, value in given.items() if value is not None) or "server_port"
        reason = first_line(error).partition(" You can specify")[0].rstrip(".")  # gradio names its own variables
        raise UserError(
            f"{names}: cannot listen ({reason}); the port is in use, or the address is of another machine: choose "
            "others, or leave them out"
        ) from None
    server.uploaded_file_dir = os.devnull  # no folder can be created there, so that even empty files are refused
    url = url.rstrip("/")
    print(f"{url} - stop with Ctrl-C" + f"; for OpenAI clients: {url}/v1" * bool(more["routes"]), flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        queue.close()  # exiting during a torch operation aborts
        blocks.close(verbose=False)
        sys.stdout.flush()
        os._exit(130)  # sys.exit would crash if one of the server's threads still runs
