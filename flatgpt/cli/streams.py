"""Standard output and standard error of a script. Standard library only."""

from __future__ import annotations

import re
from typing import TextIO

from config import escape_controls

# What flatGPT and tqdm write themselves: a text in bold, and a bar's movements of the cursor before and after its text.
OWN = {"standard output": r"(\x1b\[1m)([^\x1b]*)(\x1b\[0m)", "standard error": r"(\r|\n*(?:\x1b\[A)+)(.*?)(\r?)"}


class Stream:
    """A standard stream. On a terminal it shows control characters as escapes.

    A terminal would obey those in generated text, and in names and messages from files of others. An OSError of
    standard output has its name; one of standard error is ignored, because it could not be reported.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name, self._terminal = stream, name, stream.isatty()

    def __getattr__(self, attribute: str):
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        if self._terminal:
            own = re.fullmatch(OWN[self._name], text, re.DOTALL)
            before, shown, after = own.groups() if own else ("", text, "")
            text = before + escape_controls(shown) + after
        return self._call(self._stream.write, text)

    def flush(self) -> None:
        self._call(self._stream.flush)

    def _call(self, function, *args):
        try:
            return function(*args)
        except OSError as error:
            error.filename = self._name
            if self._name == "standard output":
                raise
