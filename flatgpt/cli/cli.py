"""TOML recipes, the command line generated from config.py's dataclasses, `--help`, and `error:` lines.

Precedence: a field's default < what initial_shape gives < `--config recipe.toml` (after the recipe's own `base`)
< `--key value`.
Standard library only, so that `--help` and errors come before torch is imported.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import functools
import gc
import io
import json
import math
import os
import shutil
import sys
import textwrap
import time
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from config import EXCLUSIVE, REMOVED, SCRIPT_CONFIGS, ReportedByOtherRank, UserError
from flatgpt import REPO_ROOT

RECIPES = REPO_ROOT / "configs"


_types = functools.cache(typing.get_type_hints)  # 1 ms for each key of each recipe otherwise


def _kind(cls, field) -> tuple[type, bool]:
    """Return the type of the field's value, and whether None is allowed."""
    hint = _types(cls)[field.name]
    if typing.get_origin(hint) is tuple:
        return tuple, False
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not types.NoneType), True
    return hint, False


def _convert(cls, field, value, from_words: bool):
    """Convert a value to its field's type and check choices and limits. ValueError says what is allowed."""
    kind, optional = _kind(cls, field)
    meta = field.metadata
    if optional and isinstance(value, str) and value.lower() in {"none", meta.get("none", "none").lower()}:
        return None
    if kind is tuple:
        value = (value,) if isinstance(value, str) else value
        if not all(isinstance(item, str) for item in value):
            raise ValueError("a list of texts is expected")
        return tuple(value)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    if from_words and kind is bool:
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
    elif kind in (int, float) and (from_words or (kind is float and type(value) is int)):
        try:
            value = kind(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{expected} is expected") from None
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{expected} is expected")
    if "choices" in meta and value not in meta["choices"]:
        raise ValueError(f"one of {', '.join(meta['choices'])} is expected{_nearest(value, meta['choices'])}")
    for limit, wrong, word in (
        ("low", lambda v, b: v < b, "at least"),
        ("high", lambda v, b: v > b, "at most"),
        ("above", lambda v, b: v <= b, "more than"),
        ("below", lambda v, b: v >= b, "less than"),
    ):
        if limit in meta and wrong(value, meta[limit]):
            raise ValueError(f"{word} {meta[limit]} is expected")
    return value


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _fields(cls) -> dict[str, dataclasses.Field]:
    """Return the fields by name and by alias."""
    return {name: f for f in dataclasses.fields(cls) for name in (f.name, *f.metadata.get("alias", ()))}


def _read_recipe(cls, name: str, problems: list[str], seen: tuple[Path, ...] = ()) -> list[dict]:
    """Return the recipe's layers of {key: value}, its `base` recipes first. Problems are appended, not raised."""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        path = RECIPES / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.toml"))
        problems.append(f"config = {name}: no such file; recipes: {', '.join(known)}{_nearest(name, known)}")
        return []
    if path.resolve() in seen:
        problems.append(f"{path}: base leads back to this same file")
        return []
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not valid TOML: {error}")
        return []
    layers = []
    if "base" in table:
        base = str(table.pop("base"))
        beside = path.parent / f"{base}.toml"
        layers = _read_recipe(cls, str(beside) if beside.is_file() else base, problems, (*seen, path.resolve()))
    fields = {name: f for name, f in _fields(cls).items() if f.metadata.get("recipe", True) and name != "config"}
    # One recipe serves all scripts: the keys of other scripts are ignored.
    of_other_scripts = {n for other in SCRIPT_CONFIGS for n in (*_fields(other), *REMOVED.get(other.__name__, ()))}
    of_other_scripts -= {*fields, *REMOVED.get(cls.__name__, ()), "config"}
    layer = {}
    for key, value in table.items():
        if key in of_other_scripts:
            continue
        if key not in fields:
            removed = REMOVED.get(cls.__name__, {}).get(key)
            problems.append(f"{path}: {key}: {removed or 'no such key' + _nearest(key, fields)}")
            continue
        try:
            layer[fields[key].name] = _convert(cls, fields[key], value, from_words=False)
        except ValueError as error:
            problems.append(f"{path}: {key} = {value!r}: {error}")
    return [*layers, layer]


def _read_words(cls, words: Sequence[str], problems: list[str]) -> dict:
    """Return {key: value} of the command line: `--key value`, `--key=value`, `--flag`, `--no-flag`; `-` equals `_`."""
    fields = _fields(cls)
    positional = [f for f in dataclasses.fields(cls) if f.metadata.get("positional")]
    layer: dict = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if not positional:
                problems.append(f"{word}: not expected here (every setting is --key value)")
                continue
            several = _kind(cls, positional[0])[0] is tuple  # takes all positional words
            field, key, values = positional[0] if several else positional.pop(0), word, [word]
        else:
            key, equals, value = word[2:].partition("=")
            name = key.replace("-", "_")
            positive = name.removeprefix("no_")
            negated = name not in fields and positive in fields and not equals
            negated = negated and _kind(cls, fields[positive])[0] is bool
            field = fields.get(positive if negated else name)
            if field is None:
                removed = REMOVED.get(cls.__name__, {}).get(positive)
                unknown = f"no such key{_nearest(name, fields)}; --help lists them all"
                problems.append(f"--{key}: {removed or unknown}")
                while words and not words[0].startswith("--"):
                    words.pop(0)  # its value
                continue
            kind, optional = _kind(cls, field)
            states = {"true", "false"} | ({"none", field.metadata.get("none", "none")} if optional else set())
            values = [value] if equals else []
            if kind is bool and not equals:
                boolean = words and words[0].lower() in states
                values = [words.pop(0)] if boolean and not negated else ["false" if negated else "true"]
            elif not equals:
                many = kind is tuple
                while words and not words[0].startswith("--") and (not values or (many and words[0] != "-")):
                    values.append(words.pop(0))
            if not values and "bare" in field.metadata:
                layer.setdefault(field.name, field.metadata["bare"])  # keep a value given by an alias
                continue
            if not values:
                problems.append(f"--{key}: a value is missing (one that begins with -- is written --{key}=VALUE)")
                continue
        try:
            if _kind(cls, field)[0] is tuple:
                layer[field.name] = layer.get(field.name, ()) + _convert(cls, field, values, from_words=True)
            else:
                layer[field.name] = _convert(cls, field, values[0], from_words=True)
        except ValueError as error:
            problems.append(f"{field.name if field.metadata.get('positional') else '--' + key} = {values[0]}: {error}")
    return layer


def parse(cls, words: Sequence[str], initial_shape: Callable[[typing.Any], dict] | None = None):
    """Return the config of a script from command-line words.

    Args:
        initial_shape: called with the config so far; returns settings that rank above the defaults and below the
            recipe, or raises UserError, which joins the other problems.

    Raises:
        UserError: with all problems of the recipe, the command line and their combination.
    """
    # what Python reads bytes that are not UTF-8 as; they could not be written to config.toml
    undecoded = [word for word in words if any("\ud800" <= c <= "\udfff" for c in word)]
    problems = [f"{word!r} is no text here: set LC_ALL=C.UTF-8, or take another name" for word in undecoded]
    typed = _read_words(cls, words, problems)
    layers = _read_recipe(cls, typed["config"], problems) if typed.get("config") else []
    settings: dict = {}
    for layer in [*layers, typed]:
        for one, other in EXCLUSIVE:
            if layer.get(one) is not None and layer.get(other) is not None:
                problems.append(f"{one} and {other} exclude each other: give one of them")
            for name, rival in ((one, other), (other, one)):
                if layer.get(name) is not None and rival in _fields(cls):
                    settings[rival] = None
        settings.update(layer)
    if initial_shape:
        try:
            settings = initial_shape(cls(**settings)) | settings
        except UserError as error:
            problems.append(str(error))
    if not problems:
        config = cls(**settings)
        problems = config.problems()
    if problems:
        numbered = "".join(f"\n  {n}. {p}" for n, p in enumerate(problems, 1))
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{numbered}")
    return config


def recipes(cls, words: Sequence[str]) -> dict:
    """Return the config of each recipe in configs/ with these words, or its UserError, by name.

    The weights of `--init_from` are not looked up: on the hub that could take minutes.
    """
    found = {}
    for path in sorted(RECIPES.glob("*.toml")):
        try:
            found[path.stem] = parse(cls, [*words, "--config", path.stem])
        except UserError as error:
            found[path.stem] = UserError(str(error).replace(f"{path}: ", ""))
    return found


def recipe_text(config) -> str:
    """Return a resolved config as a recipe: `--config` with it gives the same config."""
    left_out = {"config", "resume", "overwrite", "list", "plan", "gpus", "mfu"}  # of the call, not of the run
    left_out |= {one for one, other in EXCLUSIVE if getattr(config, other, None) is not None}
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in left_out}
    # JSON's strings, numbers and booleans are valid TOML
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in settings.items() if v is not None]
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# running a script


def help_text(cls, usage: str) -> str:
    """Return the text of `--help`: usage, then each key with its help, allowed values and default."""
    columns = min(shutil.get_terminal_size().columns, 120)
    lines = [usage.strip(), ""]
    for field in dataclasses.fields(cls):
        meta, (kind, _) = field.metadata, _kind(cls, field)
        if "section" in meta:
            lines += ["", f"{meta['section']}:"]
        if meta.get("positional"):
            flag = field.name + " ..." * (kind is tuple)
        elif kind is bool:
            flag = f"--[no-]{field.name}"
        else:
            value = {int: "N", float: "X", str: "TEXT", tuple: "TEXT ..."}[kind]
            value = "|".join(meta["choices"]) if "choices" in meta else value
            flag = f"--{field.name} " + (f"[{value}]" if "bare" in meta else value)
        text = meta["help"]
        if meta.get("positional") and "choices" in meta:
            text += f": {', '.join(meta['choices'])}"
        if kind is not tuple and not (meta.get("positional") and field.default is None):
            default = meta.get("none", "none") if field.default is None else field.default
            text += f" [{str(default).lower() if kind is bool else default or repr(default)}]"
        if "alias" in meta:
            text += f" (also {', '.join('--' + a for a in meta['alias'])})"
        text = textwrap.indent(textwrap.fill(text, columns - 35), " " * 35)
        lines.append(f"  {flag:<32} {text.lstrip()}" if len(flag) <= 32 else f"  {flag}\n{text}")
    return "\n".join(lines)


def from_command_line(cls, usage: str, initial_shape: Callable[[typing.Any], dict] | None = None):
    """Return the script's config from sys.argv. Prints and exits on `--help` (0) and on errors (2)."""
    atexit.register(gc.freeze)  # otherwise garbage collection at exit takes half a second
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # closed by the caller
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        run_script(print, help_text(cls, usage))
        sys.exit(0)
    # no traceback on Ctrl-C during the imports, before run_script handles it
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    return run_script(lambda words: parse(cls, words, initial_shape), sys.argv[1:])


def run_script(main: Callable, config, every_rank: bool = False):
    """Return main(config). A UserError becomes one `error:` line and exit code 2, Ctrl-C exit code 130.

    Args:
        every_rank: print the errors of all ranks, as they make sure that each error is raised by one of them only.
            Otherwise only the first rank of each machine prints its error, as all ranks have the same.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    try:
        result = main(config)
        sys.stdout.flush()  # here, where a closed pipe is handled
        return result
    except UserError as error:
        not_first = not every_rank and "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
        if not_first or isinstance(error, ReportedByOtherRank):
            time.sleep(20)  # torchrun ends all ranks once one exits, which must be the one that prints
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a file or folder that is missing or read-only, or a full disk
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr, flush=True)
        sys.exit(2)
