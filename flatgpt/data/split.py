"""The files of a source -> passes over them: which documents make which split, and how much there is to do."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config import PrepareConfig, UserError
from flatgpt.data import encode, readers
from flatgpt.data.encode import Job, Task
from flatgpt.data.readers import Chunk, Corpus, RawFile
from flatgpt.data.shards import SPLITS
from flatgpt.data.sources import SOURCES

FEW_DOCUMENTS = 100  # below this a split by documents would be too coarse
BYTES_PER_TOKEN = 4  # of GPT-2's BPE, to estimate shards: Wikipedia has 4.5, Shakespeare 3.3


@dataclass(frozen=True)
class Pass:
    """The tasks over one of the source's splits; `limit`: of how many documents at most, None: of all."""

    name: str
    job: Job
    tasks: Callable[[], Iterator[Task]]
    limit: int | None = None


@dataclass(frozen=True)
class Plan:
    """What there is to do. `splits`: the dataset's; `size`: bytes of text, an estimate with --sample_size."""

    passes: list[Pass]
    splits: list[str]
    size: int


def make_plan(config: PrepareConfig, corpus: Corpus, val_fraction: float, folder: Path, done: int) -> Plan:
    """Decide which split comes from where; fetch what is missing; make sure that there is room.

    The splits that the source has are kept. Without a `val`, it is taken out of `train` (and `test`, when asked for):
    by a hash of each document, or, where there are fewer than 100, by characters, from the end.

    Args:
        val_fraction: share of the documents in train, where there is no val.
        folder: of the dataset.
        done: bytes of text that are already in it.

    Raises:
        UserError: splits that there are not, no room, and what fetching and reading raise.
    """
    has = list(corpus.files)
    fractions = {"val": val_fraction, "test": config.test_fraction or 0}
    for split, given in (("val", config.val_fraction), ("test", config.test_fraction)):
        if given and split in has:
            raise UserError(f"{config.source} has a {split} split of its own: leave --{split}_fraction out")
    taken_out = [split for split in fractions if fractions[split] and split not in has and "train" in has]
    there = [split for split in SPLITS if split in [*has, *taken_out]]
    if unknown := [split for split in config.splits if split not in there]:
        hint = "; --test_fraction makes one" if unknown == ["test"] and taken_out else ""
        raise UserError(f"splits = {', '.join(unknown)}: {config.source} has {', '.join(there)}{hint}")
    splits = [split for split in there if split in (config.splits or there)]
    job = Job(
        tokenizer=config.tokenizer or SOURCES[config.source].tokenizer,
        end_of_text=SOURCES[config.source].end_of_text,
        column=config.column,
        val_fraction=fractions["val"] if "val" in taken_out else 0,
        test_fraction=fractions["test"] if "test" in taken_out else 0,
        splits=(),
        vocabulary=os.environ.get("TIKTOKEN_CACHE_DIR") and os.path.abspath(os.environ["TIKTOKEN_CACHE_DIR"]),
    )
    gives = {split: [s for s in splits if s == split or (split == "train" and s in taken_out)] for split in has}
    used = {split: corpus.files[split] for split in has if gives[split]}
    missing = [file for files in used.values() for file in files if file.missing]
    if missing and not config.sample_size:  # a sample fetches what it needs, file by file
        size = sum(file.size for file in missing)
        _make_sure_of_room({Path(config.raw_dir): size, folder: _shard_bytes(2 * size, job)})
        for file in missing:
            file.local_path()
    passes, size = [], 0
    for split, files in used.items():
        own = dataclasses.replace(job, splits=tuple(gives[split]))
        made, text = _pass(config, split, files, own, bool(taken_out) and split == "train")
        passes.append(made)
        size += text
    _make_sure_of_room({folder: _shard_bytes(max(0, size - done), job)})
    return Plan(passes, splits, size)


def _pass(config: PrepareConfig, split: str, files: list[RawFile], job: Job, shared: bool) -> tuple[Pass, int]:
    """The pass over one of the source's splits, and its bytes of text; `shared`: documents go to other splits too."""
    limit, column = config.sample_size, job.column
    paths = functools.partial(_paths, files, absolute=config.cluster is not None)
    if SOURCES[config.source].joined:
        joined = functools.partial(encode.joined, job=job, split=split, limit=limit)
        return Pass(split, job, lambda: joined(paths())), _text_bytes(files, column)
    count, characters, few = _count(_parts(files, column, limit)) if shared or limit else (0, 0, False)
    size = _text_bytes(files, column)
    if limit:
        sample = characters * limit // max(1, count)
        size = sample if any(file.missing for file in files) else min(size, sample)
    if shared and few:
        train = int(characters * (1 - job.val_fraction - job.test_fraction))
        val = int(characters * (1 - job.test_fraction)) - train
        rooms = {"train": train, "val": val, "test": characters - train - val}
        return Pass(split, job, lambda: encode.cut_by_characters(_parts(files, column, limit), rooms)), size
    fixed = None if shared else split
    return Pass(split, job, lambda: encode.whole_documents(paths(), job, fixed), limit), size


def _paths(files: list[RawFile], absolute: bool) -> Iterator[tuple[str, Path]]:
    """Name and path of each file, fetched when it is asked for; absolute for workers in other folders."""
    for file in files:
        yield file.name, file.local_path().absolute() if absolute else file.local_path()


def _parts(files: list[RawFile], column: str, limit: int | None) -> Iterator[Chunk]:
    """The documents of the files, the first `limit`."""
    count = 0
    for file in files:
        for part in readers.split_document([file.text]) if file.text else readers.documents(file.local_path(), column):
            yield part
            count += part.last
            if count == limit:
                return


def _count(parts: Iterator[Chunk]) -> tuple[int, int, bool]:
    """Documents, their characters, and whether there are fewer than FEW_DOCUMENTS; of more, the first so many."""
    count = characters = 0
    for part in parts:
        count += part.last
        characters += len(part.text)
        if count == FEW_DOCUMENTS:
            return count, characters, False
    return count, characters, True


def _text_bytes(files: list[RawFile], column: str) -> int:
    """Bytes of text in the files that are here."""
    here = [file for file in files if not file.missing]
    return sum(file.size if file.text else readers.text_bytes(file.path, column) for file in here)


def _shard_bytes(text: int, job: Job) -> int:
    return 2 * text if job.tokenizer == "byte" else 2 * text // BYTES_PER_TOKEN


def _make_sure_of_room(wanted: dict[Path, int]) -> None:
    """UserError where the disks of these folders lack so many bytes; two folders on one disk share it."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in wanted.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disk = there.stat().st_dev
        disks[disk] = (there, size + disks.get(disk, (there, 0))[1])
    for there, size in disks.values():
        if size > (free := shutil.disk_usage(there).free):
            raise UserError(
                f"about {size / 1e9:,.2f} GB are needed in {there}, {free / 1e9:,.2f} GB are free: "
                "make room, choose another disk with --data_dir and --raw_dir, or take fewer documents: --sample_size"
            )
