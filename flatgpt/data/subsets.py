"""Choose files of a dataset repository: those of one subset, by split.

The subsets are those of the dataset card, which is the YAML at the start of README.md, or else the folders.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import PurePosixPath

from config import PrepareConfig, UserError
from flatgpt.data.shards import SPLITS

# Words in file and folder names, and the split that each stands for.
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "dev": "val"}
SPLIT_WORDS |= {"valid": "val", "validation": "val"}
DEFAULT = ""  # name of the subset that is used if none is chosen
SHOWN = 8  # names in a message


def group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Group files by the split that the file name, or else a folder name, contains; `train` if none does."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split_of(name), []).append(name)
    return {split: found[split] for split in SPLITS if split in found}


def split_of(name: str) -> str:
    """Return the split of a file of this name."""
    words = [w for part in reversed(PurePosixPath(name).parts) for w in re.split(r"[^a-z]+", part.lower())]
    return next((SPLIT_WORDS[w] for w in words if w in SPLIT_WORDS), "train")


def card_subsets(card: dict | None) -> dict[str, list[tuple[str, str]]]:
    """Return the subsets of a dataset card: {name: (glob pattern of files, split or "")}; DEFAULT if one is.

    Args:
        card: the card's YAML. Its `configs` are as in the documentation of the datasets library.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    configs = (card or {}).get("configs")
    for entry in configs if isinstance(configs, list) else ():
        if not isinstance(entry, dict) or not isinstance(name := entry.get("config_name"), str):
            continue
        folder, data_files = entry.get("data_dir"), entry.get("data_files") or "*"
        patterns = []
        for item in data_files if isinstance(data_files, list) else [data_files]:
            path, split = (item.get("path"), item.get("split")) if isinstance(item, dict) else (item, None)
            for pattern in path if isinstance(path, list) else [path]:
                pattern = f"{folder.strip('/')}/{pattern}" if folder else str(pattern)
                patterns.append((pattern.removeprefix("./"), split_of(str(split)) if split else ""))
        found[name] = patterns
        if name == "default" or entry.get("default") is True:
            found[DEFAULT] = patterns
    return found if len(found) != 1 else {**found, DEFAULT: patterns}


def choose_files(config: PrepareConfig, names: Iterable[str], subsets: dict | None = None) -> dict[str, list[str]]:
    """Return the files of --subset, or of the only or default subset, by split. With --files, return all.

    Of a folder, the parquet files are chosen, or all files if there are none.

    Args:
        names: of the files.
        subsets: result of `card_subsets`; None: not known.

    Raises:
        UserError: there is no such subset, or there are several.
    """
    names, subset = list(names), config.subset
    if config.source != "hub" or config.files:
        return group_by_split(names)
    found: dict[str, list[str]] = {}
    patterns = (subsets or {}).get(subset or DEFAULT, ())
    for name in names:
        if splits := [split or split_of(name) for pattern, split in patterns if fnmatch(name, pattern)]:
            found.setdefault(splits[0], []).append(name)
    if found:
        return {split: found[split] for split in SPLITS if split in found}
    folders = {name: _folder(name) for name in names}
    below = [name for name in names if subset is None or f"{folders[name]}/".startswith(f"{subset}/")]
    chosen = below or [name for name in names if folders[name].endswith(f"/{subset}")]
    chosen = [name for name in chosen if name.endswith(".parquet")] or chosen
    known = sorted({*(subsets or ())} - {DEFAULT})
    known = known if len(known) > 1 else sorted({folders[name] for name in chosen or names})
    if subset and not chosen:
        if subsets is None:  # the hub may have it
            return {}
        if subset in known:
            files = " ".join(dict.fromkeys(pattern for pattern, _ in patterns))
            advice = "for other formats try --revision refs/convert/parquet"
            raise UserError(
                f"subset {subset} of dataset {config.repo} has no parquet or JSON lines in {files}: {advice}"
            )
        likely = dict.fromkeys([*difflib.get_close_matches(subset, known, SHOWN), *known])
        raise UserError(f"dataset {config.repo} has no subset {subset}; it has {_list(list(likely))}")
    if len(known) > 1 and not (subset and (below or len({folders[name] for name in chosen}) == 1)):
        files = f"files with --files '{folders[chosen[0]]}/*' (all: '*.parquet')"
        advice = f"choose one with --subset {shlex.quote(known[0])}, or {files}"
        raise UserError(f"dataset {config.repo} has {len(known)} subsets ({_list(known)}): {advice}")
    return group_by_split(chosen)


def _list(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _folder(name: str) -> str:
    """Return the folder of a file, without folders of splits such as `train` at its end."""
    folder = PurePosixPath(name).parent
    while folder.name.removeprefix("partial-") in SPLIT_WORDS:
        folder = folder.parent
    return str(folder)
