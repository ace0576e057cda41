"""Command lines and TOML recipes for the dataclasses of config.py, `--help`, and `error:` lines.

Precedence, from low to high: field defaults, initial_shape, the recipe's `base`, `--config recipe.toml`, `--key value`.
On a resume, the run's own settings replace the first two, and a recipe only counts where it was edited since.
Standard library only, so that `--help` and errors do not wait for torch to be imported.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import difflib
import functools
import gc
import io
import json
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

from config import EXCLUSIVE, REMOVED, SCRIPT_CONFIGS, START_ONLY, ReportedByOtherRank, UserError, checked
from flatgpt import REPO_ROOT
from flatgpt.cli.streams import OWN, Stream

RECIPES = REPO_ROOT / "configs"
_types = functools.cache(typing.get_type_hints)  # uncached, 1 ms per key of a recipe


def _value_type(cls, field) -> tuple[type, bool]:
    """Return the type of the field's values, and whether None is allowed."""
    hint = _types(cls)[field.name]
    if typing.get_origin(hint) is tuple:
        return tuple, False
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not types.NoneType), True
    return hint, False


def _convert(cls, field, value, from_words: bool):
    """Convert a value to its field's type. Raise ValueError if it is not among the choices or exceeds the limits."""
    value_type, optional = _value_type(cls, field)
    meta = field.metadata
    if optional and value == "" and from_words:  # such as a shell variable that is not set
        raise ValueError("it is empty; give a value, or none")
    if optional and isinstance(value, str) and value.lower() in {"none", meta.get("none", "none").lower()}:
        return None
    if value_type is tuple:
        value = (value,) if isinstance(value, str) else value
        if not all(isinstance(item, str) for item in value):
            raise ValueError("a list of strings is expected")
        return tuple(value)
    if from_words and value_type is bool:
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
    elif value_type in (int, float) and from_words:
        with contextlib.suppress(ValueError):  # `checked` refuses what is not a number
            value = value_type(value)
    try:
        return checked(value, value_type, meta)
    except ValueError as error:
        raise ValueError(f"{error}{_suggestion(value, meta.get('choices', ()))}") from None


def _suggestion(word: str, known) -> str:
    """Return " (did you mean ...?)" with the most similar known word, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _fields(cls) -> dict[str, dataclasses.Field]:
    """Return {name or alias: field}."""
    return {name: f for f in dataclasses.fields(cls) for name in (f.name, *f.metadata.get("alias", ()))}


def _merge(cls, layers: list[dict], problems: list[str]) -> dict:
    """Return the settings of all layers; later ones rank higher. A value also replaces the keys that it excludes."""
    settings: dict = {}
    for layer in layers:
        for pair in EXCLUSIVE:
            given = [key for key in pair if layer.get(key) is not None]
            if len(given) == 2:
                problems.append(f"{' and '.join(pair)} exclude each other: give one of them")
            settings |= {key: None for key in pair if given and key in _fields(cls)}
        settings |= layer
    return settings


def read_recipe(cls, name: str, problems: list[str], seen: tuple[Path, ...] = ()) -> dict:
    """Return {key: value} of a recipe and its `base`. Errors are appended to problems."""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        path = RECIPES / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.toml"))
        problems.append(f"config = {name}: no such file; recipes: {', '.join(known)}{_suggestion(name, known)}")
        return {}
    if path.resolve() in seen:
        problems.append(f"{path}: `base` refers to this recipe again")
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problem = "cannot be read" if isinstance(error, OSError) else "not valid TOML"
        problems.append(f"{path}: {problem}: {error}")
        return {}
    below = {}
    if "base" in table:
        base = str(table.pop("base"))
        beside = path.parent / f"{base}.toml"
        below = read_recipe(cls, str(beside) if beside.is_file() else base, problems, (*seen, path.resolve()))
    return _merge(cls, [below, _convert_table(cls, path, table, problems)], problems)


def _convert_table(cls, path: Path, table: dict, problems: list[str]) -> dict:
    """Return the table of a TOML file as {key: value}. Errors are appended to problems."""
    fields = {name: f for name, f in _fields(cls).items() if f.metadata.get("recipe", True) and name != "config"}
    # Keys of other scripts are ignored, so that all scripts can read the same recipe.
    of_other_scripts = {n for other in SCRIPT_CONFIGS for n in (*_fields(other), *REMOVED.get(other.__name__, ()))}
    of_other_scripts -= {*fields, *REMOVED.get(cls.__name__, ()), "config"}
    layer = {}
    for key, value in table.items():
        if key in of_other_scripts:
            continue
        if key not in fields:
            removed = REMOVED.get(cls.__name__, {}).get(key)
            problems.append(f"{path}: {key}: {removed or 'no such key' + _suggestion(key, fields)}")
            continue
        try:
            layer[fields[key].name] = _convert(cls, fields[key], value, from_words=False)
        except ValueError as error:
            problems.append(f"{path}: {key} = {value!r}: {error}")
    return layer


def _read_words(cls, words: Sequence[str], problems: list[str]) -> dict:
    """Parse `--key value`, `--key=value`, `--flag` and `--no-flag` as {key: value}. In keys, `-` is equal to `_`."""
    fields = _fields(cls)
    positional = [f for f in dataclasses.fields(cls) if f.metadata.get("positional")]
    layer: dict = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if not positional:
                problems.append(f"{word}: not expected here (settings have the form --key value)")
                continue
            several = _value_type(cls, positional[0])[0] is tuple  # takes all positional arguments
            field, key, values = positional[0] if several else positional.pop(0), word, [word]
        else:
            key, equals, value = word[2:].partition("=")
            name = key.replace("-", "_")
            positive = name.removeprefix("no_")
            negated = name not in fields and positive in fields and not equals
            negated = negated and _value_type(cls, fields[positive])[0] is bool
            field = fields.get(positive if negated else name)
            if field is None:
                removed = REMOVED.get(cls.__name__, {}).get(positive)
                unknown = f"no such key{_suggestion(name, fields)}; --help lists all keys"
                problems.append(f"--{key}: {removed or unknown}")
                while words and not words[0].startswith("--"):
                    words.pop(0)  # its value
                continue
            value_type, optional = _value_type(cls, field)
            states = {"true", "false"} | ({"none", field.metadata.get("none", "none")} if optional else set())
            values = [value] if equals else []
            if value_type is bool and not equals:
                boolean = words and words[0].lower() in states
                values = [words.pop(0)] if boolean and not negated else ["false" if negated else "true"]
            elif not equals:
                many = value_type is tuple or ("separator" in field.metadata and not positional)
                while words and not words[0].startswith("--") and (not values or (many and words[0] != "-")):
                    values.append(words.pop(0))
            if not values and "bare" in field.metadata:
                layer.setdefault(field.name, field.metadata["bare"])  # keep a value given by an alias
                continue
            if not values:
                problems.append(f"--{key}: a value is missing (write --{key}=VALUE if it starts with --)")
                continue
        try:
            many = _value_type(cls, field)[0] is tuple
            value = values if many else field.metadata.get("separator", "").join(values)
            value = _convert(cls, field, value, from_words=True)
            layer[field.name] = layer.get(field.name, ()) + value if many else value
        except ValueError as error:
            problems.append(f"{field.name if field.metadata.get('positional') else '--' + key} = {values[0]}: {error}")
    return layer


def _first_valid(cls, tables: dict[Path, dict], problems: list[str]) -> dict:
    """Return the first table without a problem as {key: value}. Print a warning about those before it."""
    for path, table in tables.items():
        found = [] if table else ["missing or damaged"]
        layer = _merge(cls, [_convert_table(cls, path, table, found)], found)
        if not (found := found or cls(**layer).problems()):
            return layer
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: the settings in {path} are not used: {found[0]}", file=sys.stderr)
    problems.append(f"the run has no settings that can be used; the last were those in {path}: {found[0]}")
    return {}


def parse(cls, words: Sequence[str], initial_shape=None, run_settings=None, default_recipe: str | None = None):
    """Return the config of a script from command-line words.

    Args:
        initial_shape: called with the config; returns settings that replace defaults but not given values.
        run_settings: called with the config; returns None, or what replaces the defaults on a resume: tables by file,
            of which the first valid one is used; and the recipe as it was, whose unchanged keys do not count.
        default_recipe: recipe of a new run if none of `--config`, `--dataset` and `--init_from` is given.

    Raises:
        UserError: lists all problems of the recipe, the command line and their combination, and those of the functions.
    """
    # Python decodes invalid bytes as surrogates, which cannot be written to config.toml
    undecoded = [word for word in words if any("\ud800" <= c <= "\udfff" for c in word)]
    problems = [f"{word!r} cannot be decoded: set LC_ALL=C.UTF-8, or use another name" for word in undecoded]
    typed = _read_words(cls, words, problems)
    recipe = read_recipe(cls, typed["config"], problems) if typed.get("config") else {}
    settings = _merge(cls, [recipe, typed], problems)
    try:
        if run := run_settings and run_settings(cls(**settings)):
            tables, said = run
            edited = {k: v for k, v in recipe.items() if k not in said or json.dumps(v) != json.dumps(said[k])}
            settings = _merge(cls, [_first_valid(cls, tables, problems), edited, typed], problems)
        elif default_recipe and not typed.keys() & {"config", "dataset", "init_from"}:
            typed["config"] = default_recipe
            settings = _merge(cls, [read_recipe(cls, default_recipe, problems), typed], problems)
        elif initial_shape:
            settings = initial_shape(cls(**settings)) | settings
    except UserError as error:
        problems.append(str(error))
    if problems := list(dict.fromkeys(problems or cls(**settings).problems())):  # a recipe is merged twice
        numbered = "".join(f"\n  {n}. {p}" for n, p in enumerate(problems, 1))
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{numbered}")
    return cls(**settings)


def recipes(cls, words: Sequence[str]) -> dict:
    """Return {name: config, or its UserError} of the recipes in configs/, each with these words.

    Does not read the weights of `--init_from`, as a download could take minutes.
    """
    found = {}
    for path in sorted(RECIPES.glob("*.toml")):
        try:
            found[path.stem] = parse(cls, [*words, "--config", path.stem])
        except UserError as error:
            found[path.stem] = UserError(str(error).replace(f"{path}: ", ""))
    return found


def recipe_text(config) -> str:
    """Return the text of a recipe with which `--config` gives this config."""
    left_out = {*START_ONLY, *(one for one, other in EXCLUSIVE if getattr(config, other, None) is not None)}
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in left_out}
    # strings, numbers and booleans in JSON are valid TOML
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in settings.items() if v is not None)


# ---------------------------------------------------------------------------------------------------------------------
# running a script


def help_text(cls, usage: str) -> str:
    """Return the text of `--help`: usage, and the help, allowed values and default of each key."""
    columns, lines = min(shutil.get_terminal_size().columns, 120), [usage.strip(), ""]
    for field in dataclasses.fields(cls):
        meta, (value_type, _) = field.metadata, _value_type(cls, field)
        if "section" in meta:
            lines += ["", f"{meta['section']}:"]
        if meta.get("positional"):
            flag = field.name + " ..." * (value_type is tuple)
        elif value_type is bool:
            flag = f"--[no-]{field.name}"
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
        if "alias" in meta:
            text += f" (also {', '.join('--' + a for a in meta['alias'])})"
        text = textwrap.indent(textwrap.fill(text, columns - 35), " " * 35)
        lines.append(f"  {flag:<32} {text.lstrip()}" if len(flag) <= 32 else f"  {flag}\n{text}")
    return "\n".join(lines)


def from_command_line(cls, usage: str, *options):
    """Return parse(cls, sys.argv, *options). Prints and exits on `--help` (0) and on errors (2)."""
    atexit.register(gc.freeze)  # avoids garbage collection at exit, which takes 0.5 s
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # closed by the caller
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        run_script(print, help_text(cls, usage))
        sys.exit(0)
    # no traceback for Ctrl-C during imports; later run_script handles it
    sys.excepthook = lambda cls, *args: None if cls is KeyboardInterrupt else sys.__excepthook__(cls, *args)
    return run_script(lambda words: parse(cls, words, *options), sys.argv[1:])


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
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
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
