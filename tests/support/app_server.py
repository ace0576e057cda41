"""A running app.py, and requests to it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from processes import ROOT, free_port, running


def values(**changes) -> dict:
    """Return what the page sends, with changes."""
    sent = {"prompt": "99 green", "stop": "", "num_samples": 1, "max_new_tokens": 20, "temperature": 0.8, "top_k": 0}
    sent |= {"top_p": 1, "min_p": 0, "repetition_penalty": 1, "seed": 5, "ignore_eot": False}
    return sent | changes


class Server:
    """A running app.py, and requests to it.

    Attributes:
        url: the page's.
    """

    def __init__(self, process: subprocess.Popen, port: int):
        self.port, lines = port, []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("http"):
                break
        self.url = lines[-1].split(" ")[0]
        assert self.url.startswith("http"), "".join(lines)

    def get(self, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        """Return status and body of the answer to a GET request, or to a POST request with a body."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def begin(self, **changes) -> str:
        """Call the page's function. Returns the route of its events."""
        _, started = self.get("/gradio_api/call/write", {"data": list(values(**changes).values())})
        return f"/gradio_api/call/write/{json.loads(started)['event_id']}"

    def write(self, **changes) -> str:
        """Call the page's function. Returns all events that the server sends."""
        return self.get(self.begin(**changes))[1]


@contextlib.contextmanager
def serving(home: Path, *words, **env: str):
    """Run app.py in a folder. At the end of the block it is stopped with Ctrl-C."""
    port = free_port()
    settings = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO")}
    settings |= {"GRADIO_SERVER_PORT": str(port), "HOME": str(home), "PYTHONPATH": "", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with running([sys.executable, ROOT / "app.py", *words], cwd=home, env=settings, **pipes) as process:
        yield Server(process, port)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 130, (process.returncode, said)
