"""Which files of which dataset repository make a source, those in --raw_dir and those that have to be fetched.

wikitext103, wikipedia and fineweb are repositories that are known by name; hub is any other with parquet or JSON lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from config import PrepareConfig, UserError
from flatgpt.data import hub
from flatgpt.data.readers import Corpus, RawFile
from flatgpt.data.shards import SPLITS

DUMP = "20231101.en"  # Wikipedia's, by default
# What datasets call their splits, in the names of files and folders.
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "dev": "val"}
SPLIT_WORDS |= {"valid": "val", "validation": "val"}
NUMBERED = re.compile(r"(.*?)(\d{5})-of-(\d{5})")  # train-00000-of-00041.parquet


@dataclass(frozen=True)
class HubFiles:
    """Which files of which repository make a source.

    Args:
        revision: as asked: a commit, a branch or a tag.
        root: the folder in raw_dir where they lie under their names in the repository.
        flat: whether files in `root` itself, without the repository's folders, are these too (put there by hand).
        splits: what the repository is known to have.
        check: what a user can have got wrong.
    """

    repo: str
    revision: str
    patterns: tuple[str, ...]
    root: Path
    flat: bool = True
    splits: tuple[str, ...] = ()
    check: str = "--revision"


# The commits are those that flatGPT was written against.
def wikitext103(config: PrepareConfig) -> HubFiles:
    commit = config.revision or "b08601e04326c79dfdd32d625aee71d232d685c3"
    root = Path(config.raw_dir) / "wikitext103"
    return HubFiles("Salesforce/wikitext", commit, ("wikitext-103-raw-v1/*.parquet",), root, splits=SPLITS)


def wikipedia(config: PrepareConfig) -> HubFiles:
    commit = config.revision or "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
    dump, root = config.dump or DUMP, Path(config.raw_dir) / "wikipedia"
    return HubFiles(
        "wikimedia/wikipedia", commit, (f"{dump}/*.parquet",), root, dump == DUMP, check="--dump (20231101.simple, say)"
    )


def fineweb(config: PrepareConfig) -> HubFiles:
    commit = config.revision or "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    return HubFiles("HuggingFaceFW/fineweb-edu", commit, ("sample/10BT/*.parquet",), Path(config.raw_dir) / "fineweb")


def hub_repository(config: PrepareConfig) -> HubFiles:
    patterns = config.files or ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
    root = Path(config.raw_dir) / "hub" / config.repo
    return HubFiles(config.repo, config.revision or "main", patterns, root, check="--files and --revision")


def _cached_listing(files: HubFiles) -> hub.Listing | None:
    return hub.cached_listing(files.root, files.repo, files.revision, files.patterns)


def commit(files: HubFiles) -> str | None:
    listing = _cached_listing(files)
    return listing.commit if listing else files.revision if hub.COMMIT.fullmatch(files.revision) else None


def open_files(config: PrepareConfig, files: HubFiles) -> Corpus:
    """The source's files: those in raw_dir, the rest to be fetched when they are needed.

    A folder that was filled by hand is taken as it is, unless its files' numbers (-00000-of-00041) or known splits
    tell of others.
    """
    notice = ""
    if listing := _cached_listing(files):
        if listing.commit != files.revision:
            noted = hub.listing_file(files.root, files.repo, files.revision, files.patterns)
            notice = f"{files.repo} {files.revision}: commit {listing.commit}, as {noted} has it from the last time"
    else:
        there = _by_hand(files)
        names = by_split(_choose(config, there))
        wanted = [split for split in files.splits if split in (config.splits or files.splits)]
        names = {split: names[split] for split in wanted or names if split in names}
        if names and all(split in names and complete(names[split]) for split in wanted or names):
            raw = {s: [RawFile(n, there[n].stat().st_size, there[n]) for n in v] for s, v in names.items()}
            count = sum(map(len, names.values()))
            notice = f"{files.root}: taking its {count} file{'s' * (count > 1)} as they are, without asking the hub"
            return Corpus(raw, files.revision, notice)
        listing = hub.list_remote(files.root, files.repo, files.revision, files.patterns, files.check)
    names = by_split(_choose(config, listing.files))
    raw = {split: [_listed(files, listing, name) for name in group] for split, group in names.items()}
    return Corpus(raw, listing.commit, notice)


def _choose(config: PrepareConfig, names: Iterable[str]) -> list[str]:
    """Without --files: a repository's parquet files where it has any, and of one folder."""
    if config.source != "hub" or config.files:
        return list(names)
    chosen = [name for name in names if name.endswith(".parquet")] or list(names)
    folders = sorted({str(PurePosixPath(name).parent) for name in chosen})
    if len(folders) > 1:
        raise UserError(
            f"dataset {config.repo} has its files in {len(folders)} folders ({', '.join(folders[:8])}"
            f"{', ...' * (len(folders) > 8)}): choose with --files '{folders[0]}/*' (all: '*.parquet')"
        )
    return chosen


def _listed(files: HubFiles, listing: hub.Listing, name: str) -> RawFile:
    flat = files.root / PurePosixPath(name).name
    path = flat if files.flat and flat.exists() else files.root / name
    size, notes = listing.files[name], hub.download_metadata(files.root, name)
    if path.exists() and path.stat().st_size != size:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, the hub's file has {size:,}: truncated, or of another "
            "revision; move it away to have it fetched again"
        )
    if path.exists() and notes and listing.commit != notes[0] and listing.hashes[name] != notes[1]:
        raise UserError(f"{path} was fetched at another revision: move it away to have this one's fetched")
    return RawFile(name, size, path, fetch=lambda: hub.download_file(listing, name, files.root, files.check))


def _by_hand(files: HubFiles) -> dict[str, Path]:
    """Files that somebody put into raw_dir and that match, {name in the repository or plain name: path}, sorted."""
    root, found = files.root, {}
    for path in sorted(root.rglob("*")) if root.is_dir() else []:
        name = path.relative_to(root).as_posix()
        if not path.is_file() or name.startswith(".") or hub.download_metadata(root, name):
            continue
        plain = files.flat and "/" not in name and any(fnmatch(name, p.rsplit("/", 1)[-1]) for p in files.patterns)
        if plain or any(fnmatch(name, p) for p in files.patterns):
            found[name] = path
    return found


def by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of files by the split that they speak of (in the file's name, else in its folders'), else `train`."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = [w for part in reversed(PurePosixPath(name).parts) for w in re.split(r"[^a-z]+", part.lower())]
        split = next((SPLIT_WORDS[w] for w in words if w in SPLIT_WORDS), "train")
        found.setdefault(split, []).append(name)
    return {split: found[split] for split in SPLITS if split in found}


def complete(names: list[str]) -> bool:
    """Whether names that say `-00000-of-00041` are all there; names without numbers always are."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := NUMBERED.match(name):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    return all(len(found) == total for (_, total), found in numbers.items())
