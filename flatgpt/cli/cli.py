"""Run a script: `--help`, `error:` lines, exit codes and Ctrl-C.

Standard library only, so that `--help` and errors do not wait for torch to be imported.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import io
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import flatgpt
from config import COMMON, ReportedByOtherRank, UserError
from flatgpt.cli.settings import parse, value_type_of
from flatgpt.cli.streams import OWN, Stream


def help_text(cls, usage: str, all_keys: bool = False) -> str:
    """Return the text of `--help`: usage, and the help, allowed values and default of the common keys, or of all."""
    columns, lines, section = min(shutil.get_terminal_size().columns, 120), [usage.strip(), ""], None
    common = COMMON.get(cls.__name__, "").split() if not all_keys else []
    for field in dataclasses.fields(cls):
        meta, (value_type, _) = field.metadata, value_type_of(cls, field)
        section = meta.get("section", section)
        if common and field.name not in common:
            continue
        if section:
            lines += ["", f"{section}:"]
            section = None
        if meta.get("positional"):
            flag = field.name + " ..." * (value_type is tuple)
        elif value_type is bool:
            flag = f"--{ {False: '', True: 'no-', None: '[no-]'}[field.default] }{field.name}"
        else:
            value = {int: "N", float: "X", str: "TEXT", tuple: "TEXT ..."}[value_type]
            value = "|".join(meta["choices"]) if "choices" in meta else value
            flag = f"--{field.name} " + (f"[{value}]" if "bare" in meta else value)
        text = meta["help"]
        if meta.get("positional") and "choices" in meta:
            text += f": {', '.join(meta['choices'])}"
        if value_type is not tuple and not (meta.get("positional") and field.default is None):
            default = meta.get("none", "none") if field.default is None else field.default
            text += f" [{str(default).lower() if value_type is bool else default or repr(default)}]"
        text = textwrap.indent(textwrap.fill(text, columns - 35), " " * 35)
        lines.append(f"  {flag:<32} {text.lstrip()}" if len(flag) <= 32 else f"  {flag}\n{text}")
    if common:
        lines += ["", f"--help all: all {len(dataclasses.fields(cls))} settings."]
    return "\n".join(lines)


def from_command_line(cls, usage: str, *options):
    """Return parse(cls, sys.argv, *options). Prints and exits on `--help` and `--version` (0) and on errors (2)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports can turn a KeyboardInterrupt into another error
    atexit.register(gc.freeze)  # avoids garbage collection at exit, which takes 0.5 s
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # closed by the caller
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
    words = sys.argv[1:]
    if "--version" in words:
        run_script(print, f"flatGPT {flatgpt.__version__}")
        sys.exit(0)
    if "--help" in words or "-h" in words:
        asked = words[words.index("--help" if "--help" in words else "-h") + 1 :]
        run_script(print, help_text(cls, usage, asked[:1] == ["all"]))
        sys.exit(0)
    return run_script(lambda words: parse(cls, words, *options), words)


@contextlib.contextmanager
def _keyboard_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, if from_command_line has made it end the process."""
    ends_process = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if ends_process:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends_process:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main: Callable, config, every_rank: bool = False):
    """Return main(config). A UserError becomes one `error:` line and exit code 2, Ctrl-C exit code 130.

    Args:
        every_rank: print the error of any rank, because only one rank raises it. Otherwise all ranks raise the same
            error, and the first rank of each machine prints it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    stdout, stderr = Stream(sys.stdout, "standard output"), Stream(sys.stderr, "standard error")
    try:
        with _keyboard_interrupts(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            result = main(config)
            sys.stdout.flush()  # inside `try`, which handles a closed pipe
        return result
    except UserError as error:
        not_first = not every_rank and "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
        if not_first or isinstance(error, ReportedByOtherRank):
            time.sleep(20)  # torchrun ends all ranks when one exits; let the printing rank exit first
        else:
            print(f"error: {error}", file=stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # missing or read-only file, or full disk
        if isinstance(error, ConnectionError):
            if error.filename not in OWN:  # a connection to another process
                raise
            sys.exit(141)  # `| head` closed the pipe
        file = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {file}{error.strerror or error}", file=stderr, flush=True)
        sys.exit(2)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # what is buffered would fail again at exit, and change the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
