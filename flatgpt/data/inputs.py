"""Find the files that --input names: paths, folders and glob patterns."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from config import UserError
from flatgpt.data.readers import RawFile, documents, walk
from flatgpt.data.text_files import FORMATS, file_format, suffixes


def expand_inputs(
    patterns: tuple[str, ...],
    column: str = "text",
    encoding: str = "utf-8",
    log: Callable[[str], None] = lambda line: None,
    flag: str = "--input",
) -> list[Path]:
    """Return the files for paths, folders (recursive, sorted) and glob patterns, in order and without duplicates.

    Of a folder, and of a pattern that does not name their suffix, only files of known formats are taken. Hidden files
    and folders are left out, and .json, .csv and .tsv files without the column, which may be settings or figures.

    Args:
        log: called with a line for each folder or pattern of which files were left out, and one for files of unknown
            formats that were named.
        flag: that names the patterns, for messages.

    Raises:
        UserError: there is no such file, none that can be read, or it is not a file.
    """
    files: dict[Path, Path] = {}
    unknown: Counter[str] = Counter()
    for pattern in patterns:
        path, left = Path(pattern), Counter()  # what is left out, by kind
        if path.is_file():
            found = [path]
        elif pattern and path.is_dir():
            found = _choose(_walk(path, left), "", left, column, encoding)
        elif pattern == "-" or (pattern and path.exists()):
            problem = f"{flag} {pattern} is a pipe or device, which can be read only once"
            raise UserError(f"{problem}: save its text in a file (.gz .zst .bz2 .xz are read as they are)")
        elif path.is_symlink():
            raise UserError(f"{flag} {pattern} is a link to {path.readlink()}, which does not exist")
        elif matches := _glob(pattern):
            if folders := sum(match.is_dir() for match in matches):
                left["folder" + "s" * (folders > 1)] = folders
            found = _choose([match for match in matches if not match.is_dir()], pattern, left, column, encoding)
        else:
            raise UserError(f"{flag} {pattern}: no such file")
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in (+left).most_common(8))
        if not found:
            formats = f"the formats are {' '.join(FORMATS)}, also with .gz .zst .bz2 .xz"
            raise UserError(f"{flag} {pattern}: no file to read, but {kinds or 'an empty folder'}; {formats}")
        if kinds:
            log(f"{pattern}: {len(found):,} file{'s' * (len(found) != 1)} read; left out: {kinds}")
        unknown.update(_label(file) for file in found if suffixes(file)[0] not in FORMATS)
        for file in found:
            files.setdefault(file.resolve(), file)
    if unknown:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in unknown.most_common(8))
        log(f"read as plain text, with any markup: {kinds}")
    return list(files.values())


def _glob(pattern: str) -> list[Path]:
    """Return what matches the pattern, sorted; for `**` files only. glob.glob would follow links in a circle."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(map(Path, glob.glob(pattern)))
    n = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    return [path for path in _walk(Path(*parts[:n]), Counter()) if _matches(path.parts[n:], parts[n:])]


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not parts and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _walk(folder: Path, left: Counter) -> list[Path]:
    """Return what a folder and its subfolders have, sorted, without hidden files and folders. Count these."""
    found = []
    for root, folders, names in walk(folder, lambda error: left.update(["unreadable"])):
        left["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [root / name for name in names if not name.startswith(".")]
    return sorted(found)


def _choose(paths: list[Path], pattern: str, left: Counter, column: str, encoding: str) -> list[Path]:
    """Return the files of known formats, and those whose suffix the pattern ends with. Count the others."""
    chosen = []
    for path in paths:
        if not path.is_file():
            left["broken or special"] += 1
        elif path.suffix and pattern.endswith(path.suffix):
            chosen.append(path)
        elif suffixes(path)[0] not in FORMATS:
            left[_label(path)] += 1
        elif file_format(path) in ("json", "csv") and not _has_text(path, column, encoding):
            left[f"{_label(path)} without readable {column!r}"] += 1
        else:
            chosen.append(path)
    return chosen


def _has_text(path: Path, column: str, encoding: str) -> bool:
    try:
        next(documents([RawFile(str(path), 0, path)], column, 1, encoding=encoding), None)
    except UserError:
        return False
    return True


def _label(path: Path) -> str:
    return "".join(suffixes(path)) or "without a suffix"
