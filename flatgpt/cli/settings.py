"""Read settings: TOML recipes and command lines, for the dataclasses of config.py.

Precedence, from low to high: field defaults, initial_shape, the recipe's `base`, `--config recipe.toml`, `--key value`.
On a resume, the run's own settings replace the first two, and a recipe only counts where it was edited since.
Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import shlex
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from config import EXCLUSIVE, SCRIPT_CONFIGS, START_ONLY, TOGETHER, UserError, checked
from flatgpt import REPO_ROOT
from flatgpt.cli.foreign_flags import ADVICE, ALIASES

RECIPES = REPO_ROOT / "configs"
META = ("about", "hardware", "time", "loss", "bits_per_byte", "verified")  # keys of a recipe's [meta], for --list
SYNTAX = 'write settings as `key = value`, with strings in "" and true or false'
PATHS = {"model_path": "--model_path", "resume": "--resume", "input": "text --input"}  # flags of a path by key
_types = functools.cache(typing.get_type_hints)  # uncached, 1 ms per key of a recipe


def value_type_of(cls, field) -> tuple[type, bool]:
    """Return the type of the field's values, and whether None is allowed."""
    hint = _types(cls)[field.name]
    if typing.get_origin(hint) is tuple:
        return tuple, False
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not types.NoneType), True
    return hint, False


def _convert(cls, field, value, from_words: bool):
    """Convert a value to its field's type. Raise ValueError if it is not among the choices or exceeds the limits."""
    value_type, optional = value_type_of(cls, field)
    meta = field.metadata
    if optional and value == "" and from_words:  # such as a shell variable that is not set
        raise ValueError("it is empty; give a value, or none")
    if optional and isinstance(value, str) and value.lower() in {"none", meta.get("none", "none").lower()}:
        return None
    is_path = not meta.get("verbatim")
    if value_type is tuple:
        value = (value,) if isinstance(value, str) else value
        if not all(isinstance(item, str) for item in value):
            raise ValueError("a list of strings is expected")
        return tuple(map(os.path.expanduser, value)) if is_path else tuple(value)
    if isinstance(value, str) and is_path:
        value = os.path.expanduser(value)
    if from_words and value_type is bool:
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
    elif value_type in (int, float) and from_words:
        with contextlib.suppress(ValueError):  # `checked` refuses what is not a number
            value = value_type(value)
    try:
        return checked(value, value_type, meta)
    except ValueError as error:
        raise ValueError(f"{error}{_suggestion(value, meta.get('choices', ()))}") from None


def _refuse_foreign_value(name: str | None, value) -> None:
    """Raise ValueError if another project's value of a key has another meaning here."""
    if advice := ADVICE.get(f"{name}={value}".lower()):
        raise ValueError(advice)


def _suggestion(word: str, known) -> str:
    """Return " (did you mean ...?)" with the most similar known word, or an empty string."""
    close = _closest(str(word), known)
    return f" (did you mean {close}?)" if close else ""


def _closest(word: str, known) -> str | None:
    """Return the first known word that starts with `word`, else the most similar one; None if none is similar."""
    longer = [one for one in known if len(word) > 2 and one.startswith(word)]
    return next(iter(longer or difflib.get_close_matches(word, list(known), 1)), None)


@functools.cache
def _fields(cls) -> dict[str, dataclasses.Field]:
    """Return {name: field}, also by the names that other projects use for the same setting."""
    own = {field.name: field for field in dataclasses.fields(cls)}
    return {name: own[key] for name, key in ALIASES.items() if key in own} | own


def _explain_unknown(cls, name: str) -> str:
    """Return what to do about a key that the script does not have."""
    own = [field.name for field in dataclasses.fields(cls)]
    if name in own:
        return f"no such key; write --{name}=VALUE"
    if name in ADVICE:
        return ADVICE[name]
    if others := [other for other in SCRIPT_CONFIGS if name in _fields(other)]:
        key, scripts = _fields(others[0])[name].name, [other.__doc__.partition(":")[0] for other in others]
        return f"a setting of {', '.join(scripts)}{f' ({key})' * (key != name)}, not of this script; leave it out"
    return f"no such key{_suggestion(name, own)}; --help all lists all keys"


def _merge(cls, layers: list[dict], problems: list[str]) -> dict:
    """Return the settings of all layers; later ones rank higher. A value also replaces the keys that it excludes."""
    settings: dict = {}
    for layer in layers:
        for pair in EXCLUSIVE:
            given = [key for key in pair if layer.get(key) is not None]
            if len(given) == 2:
                problems.append(f"{' and '.join(pair)} exclude each other: give one of them")
            settings |= {key: None for key in pair if given and key in _fields(cls)}
        replaced = {key for keys in TOGETHER if layer.keys() & {*keys} for key in keys}
        settings = {key: value for key, value in settings.items() if key not in replaced} | layer
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
    if path.suffix == ".py":
        problems.append(f"config = {name}: recipes are TOML, not Python; in {path.stem}.toml, {SYNTAX}")
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        unreadable = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else None
        problems.append(f"{path}: {unreadable or f'not valid TOML ({error}); {SYNTAX}'}")
        return {}
    meta = table.pop("meta", {})
    if unknown := [key for key in meta if key not in META] if isinstance(meta, dict) else [str(meta)]:
        keys = f"the keys of [meta] are {', '.join(META)}"
        problems.append(f"{path}: [meta] {', '.join(unknown)}: {keys}; settings belong above it")
    below = {}
    if "base" in table:
        base = str(table.pop("base"))
        beside = path.parent / f"{base}.toml"
        below = read_recipe(cls, str(beside) if beside.is_file() else base, problems, (*seen, path.resolve()))
    if "out_dir" in table and path.name == "config.toml" and (path.parent / "ckpt").is_dir():
        table["out_dir"] = str(path.parent)  # a run's own recipe, wherever its folder and the current one are
    return _merge(cls, [below, _convert_table(cls, path, table, problems)], problems)


def _convert_table(cls, path: Path, table: dict, problems: list[str]) -> dict:
    """Return the table of a TOML file as {key: value}. Errors are appended to problems."""
    others = {field.name for other in SCRIPT_CONFIGS for field in dataclasses.fields(other)}
    layer = {}
    for key, value in table.items():
        field = _fields(cls).get(key)
        ours = field and (field.name == key or key not in others)
        if ours and field.metadata.get("recipe", True) and key != "config":
            try:
                _refuse_foreign_value(key, value)
                layer[field.name] = _convert(cls, field, value, from_words=False)
            except ValueError as error:
                problems.append(f"{path}: {key} = {value!r}: {error}")
        elif key == "config" or not any(key in _fields(other) for other in SCRIPT_CONFIGS):
            problems.append(f"{path}: {key}: {'no such key' if key == 'config' else _explain_unknown(cls, key)}")
    return layer  # without the keys of other scripts, so that all scripts can read the same recipe


def _read_words(cls, words: Sequence[str], problems: list[str]) -> dict:
    """Parse `--key value`, `--key=value`, `--flag` and `--no-flag` as {key: value}. In keys, `-` is equal to `_`."""
    positional = [field for field in dataclasses.fields(cls) if field.metadata.get("positional")]
    layer: dict = {}
    words = list(words)
    while words:
        word = words.pop(0)
        try:
            if word.startswith("--"):
                field, name, values = _read_flag(cls, word, words, lists=not positional)
            else:
                field, name, values = _read_argument(cls, word, words, positional), None, [word]
            if values is None:  # the flag alone
                layer.setdefault(field.name, field.metadata["bare"])  # keep a value given by an alias
                continue
        except ValueError as error:
            problems.append(f"{word.partition('=')[0]}: {error}")
            continue
        try:
            _refuse_foreign_value(name, values[0])
            many = value_type_of(cls, field)[0] is tuple
            value = values if many else field.metadata.get("separator", "").join(values)
            value = _convert(cls, field, value, from_words=True)
            layer[field.name] = layer.get(field.name, ()) + value if many else value
        except ValueError as error:
            problems.append(f"{word.partition('=')[0] if name else field.name} = {values[0]}: {error}")
    return layer


def _read_flag(cls, word: str, words: list[str], lists: bool) -> tuple[dataclasses.Field, str, list[str] | None]:
    """Return the field of a word `--key` or `--key=value`, its name as written, and its values; None: there are none.

    Args:
        words: the words after it. Its values are removed.
        lists: whether keys with a `separator` take several words.
    """
    fields = _fields(cls)
    key, equals, value = word[2:].partition("=")
    name = key.replace("-", "_")
    positive = name.removeprefix("no_")
    negated = name not in fields and positive in fields and not equals
    negated = negated and value_type_of(cls, fields[positive])[0] is bool
    field = fields.get(positive if negated else name)
    if field is None:
        _take_values(words)
        raise ValueError(_explain_unknown(cls, name if name in ADVICE else positive))
    value_type, optional = value_type_of(cls, field)
    if equals:
        return field, name, [value]
    if value_type is bool:
        states = {"true", "false"} | ({"none", field.metadata.get("none", "none")} if optional else set())
        boolean = words and words[0].lower() in states and not negated
        return field, name, [words.pop(0)] if boolean else ["false" if negated else "true"]
    many = value_type is tuple or ("separator" in field.metadata and lists)
    values = _take_values(words, None if many else 1)
    if not values and "bare" not in field.metadata:
        raise ValueError(f"a value is missing (write {word}=VALUE if it starts with --)")
    return field, name, values or None


def _take_values(words: list[str], limit: int | None = None) -> list[str]:
    """Remove and return the words before the next flag, at most `limit`. A `-` can only be the first one."""
    count = next((n for n, word in enumerate(words) if word.startswith("--") or (n and word == "-")), len(words))
    taken = words[: min(count, limit or count)]
    del words[: len(taken)]
    return taken


def _read_argument(cls, word: str, words: list[str], positional: list[dataclasses.Field]) -> dataclasses.Field:
    """Return the field of a word that belongs to no flag.

    Args:
        words: the words after it. If it is a misspelt flag, its values are removed.
        positional: the fields that can still be given; changed if one is used up.
    """
    field = positional[0] if positional else None
    if field is None or word not in field.metadata.get("choices", (word,)):
        if correction := _correction(_fields(cls), word):
            if correction[2:] in _fields(cls):
                _take_values(words, 1)
            raise ValueError(f"write {correction}")
        if field is None:
            raise ValueError("not expected here (settings have the form --key value)")
    several = value_type_of(cls, field)[0] is tuple  # takes all positional arguments
    return field if several else positional.pop(0)


def _correction(fields: dict, word: str) -> str | None:
    """Return how to write a word that is neither a flag nor expected; None if that is not known."""
    key, equals, value = word.lstrip("-\u2013\u2014").partition("=")  # text processors make dashes of hyphens
    # infer.py and app.py continue words, which can be the name of a key
    if key.replace("-", "_") in fields and (equals or key != word or "prompt" not in fields):
        return f"--{key}{equals}{shlex.quote(value) if value else ''}"
    if "config" in fields and (word.endswith((".toml", ".py")) or (RECIPES / f"{word}.toml").is_file()):
        known = [] if Path(word).exists() else sorted(path.stem for path in RECIPES.glob("*.toml"))
        like = _closest(Path(word).stem.removeprefix("train_"), known)  # nanoGPT's config/train_NAME.py
        return f"--config {shlex.quote(like or word)}"
    if Path(word).exists() or "/" in word:
        flag = next((flag for key, flag in PATHS.items() if key in fields), None)
        return flag and f"{flag} {shlex.quote(word)}"
    return f"--prompt {shlex.quote(word)}" if "prompt" in fields else None


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
    undecoded = [os.fsencode(word) for word in words if any("\ud800" <= c <= "\udfff" for c in word)]
    problems = [f"{str(word)[1:]} is not valid UTF-8: write it again, whole characters only" for word in undecoded]
    typed = _read_words(cls, words, problems)
    recipe = read_recipe(cls, typed["config"], problems) if typed.get("config") else {}
    settings = _merge(cls, [recipe, typed], problems)
    if typed.get("config") and not recipe and problems:
        run_settings = initial_shape = None  # what an unreadable recipe sets, such as the run's folder, is not known
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
