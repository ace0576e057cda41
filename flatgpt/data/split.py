"""Decide which documents make which split, and cut the files of a source into tasks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config import PrepareConfig, UserError
from flatgpt.data import readers
from flatgpt.data.encode import Job, Task, choose_split
from flatgpt.data.readers import Chunk, Corpus, RawFile
from flatgpt.data.shards import SPLITS
from flatgpt.data.sources import SOURCES

FEW_DOCUMENTS = 100  # fewer are split by characters, because whole documents would be too coarse
BYTES_PER_TOKEN = 4  # of GPT-2's BPE, to estimate the size of shards: Wikipedia has 4.5, Shakespeare 3.3


@dataclass(frozen=True)
class Pass:
    """The work on one of the source's splits.

    Args:
        tasks: yields the tasks, the same ones each time.
        size: bytes of text, an estimate with --sample_size.
    """

    name: str
    job: Job
    tasks: Callable[[], Iterator[Task]]
    size: int


def make_passes(config: PrepareConfig, corpus: Corpus, val_fraction: float, folder: Path, done: int) -> list[Pass]:
    """Decide which of the source's splits makes which of the dataset's; download missing files.

    The source's splits are kept. Where it has no `val`, or no `test` and one is asked for, that is held out of `train`:
    by a hash of each document or, of fewer than FEW_DOCUMENTS, by characters, from the end.

    Args:
        val_fraction: share of the documents of train where there is no val.
        folder: of the dataset.
        done: bytes of text that are already in it.

    Raises:
        UserError: splits that do not exist, no space on the disk, and what fetching and reading raise.
    """
    source, name = SOURCES[config.source], config.tokenizer or SOURCES[config.source].tokenizer
    fractions = {"val": val_fraction, "test": config.test_fraction or 0}
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and split in corpus.files:
            raise UserError(f"{config.source} has a {split} split of its own: leave --{split}_fraction out")
    held_out = {s: f for s, f in fractions.items() if f and s not in corpus.files and "train" in corpus.files}
    available = [split for split in SPLITS if split in corpus.files or split in held_out]
    if unknown := [split for split in config.splits if split not in available]:
        hint = "; --test_fraction makes one" if unknown == ["test"] and held_out else ""
        raise UserError(f"splits = {', '.join(unknown)}: {config.source} has {', '.join(available)}{hint}")
    vocabulary = os.environ.get("TIKTOKEN_CACHE_DIR")
    common = {
        "tokenizer": name,
        "encoder": config.encoder,
        "end_of_text": source.end_of_text,
        "vocabulary": vocabulary and os.path.abspath(vocabulary),
    }
    jobs = {}
    for split in corpus.files:
        shared = held_out if split == "train" else {}
        outputs = tuple(s for s in available if s in (split, *shared) and s in (config.splits or available))
        if outputs:
            fractions = {f"{s}_fraction": fraction for s, fraction in shared.items()}
            jobs[split] = Job(split=None if shared else split, outputs=outputs, **common, **fractions)
    bytes_per_byte = 2 if name == "byte" else 2 / BYTES_PER_TOKEN  # of shards, per byte of text
    missing = [file for split in jobs for file in corpus.files[split] if file.missing]
    if missing and not config.sample_size:  # a sample downloads files one by one, until it has enough
        size = sum(file.size for file in missing)
        require_space({Path(config.raw_dir): size, folder: 2 * size * bytes_per_byte})
        for file in missing:
            file.local_path()
    passes = [make_pass(config, split, corpus.files[split], job) for split, job in jobs.items()]
    require_space({folder: max(0, sum(each.size for each in passes) - done) * bytes_per_byte})
    return passes


def make_pass(config: PrepareConfig, name: str, files: list[RawFile], job: Job) -> Pass:
    """Make the pass over the files of one of the source's splits."""
    limit, column = config.sample_size, config.column
    complete = not any(file.missing for file in files)
    size = sum(f.size if f.text else readers.text_bytes(f.path, column) for f in files if not f.missing)
    if SOURCES[config.source].joined:
        return Pass(name, job, lambda: chunk_tasks(joined_rows(files, column, limit), 0), size)
    in_train = dataclasses.replace(job, split="train")
    count = characters = 0
    if limit or job.split is None:  # how long the documents are, and whether they are few
        for chunk in read_chunks(files, column, in_train, min(limit or FEW_DOCUMENTS, FEW_DOCUMENTS)):
            count, characters = count + chunk.documents, characters + len(chunk.text)
    if limit:
        sample = characters * limit // max(1, count)
        size = min(sample, size) if complete else sample
    if job.split is None and count < FEW_DOCUMENTS:
        train = int(characters * (1 - job.val_fraction - job.test_fraction))
        val = int(characters * (1 - job.test_fraction)) - train
        chars_per_split = {"train": train, "val": val, "test": characters - train - val}
        chunks = functools.partial(read_chunks, files, column, in_train, limit)
        return Pass(name, job, lambda: chunk_tasks(split_by_characters(chunks(), chars_per_split), 0), size)
    if limit:
        return Pass(name, job, lambda: chunk_tasks(read_chunks(files, column, job, limit)), size)
    root = Path.cwd() if config.cluster else Path()  # a cluster's workers run in other folders
    return Pass(name, job, lambda: file_tasks(files, column, job, root), size)


def require_space(needed: dict[Path, float]) -> None:
    """Raise UserError where the disks of these folders have fewer bytes free; folders on one disk share them."""
    disks: dict[int, tuple[Path, float]] = {}
    for folder, size in needed.items():
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        disk = existing.stat().st_dev
        disks[disk] = existing, size + disks.get(disk, (existing, 0))[1]
    for existing, size in disks.values():
        if size > (free := shutil.disk_usage(existing).free):
            raise UserError(
                f"about {size / 1e9:,.2f} GB are needed in {existing}, {free / 1e9:,.2f} GB are free: "
                "make room, choose another disk with --data_dir and --raw_dir, or take fewer documents: --sample_size"
            )


# ---------------------------------------------------------------------------------------------------------------------
# files -> chunks


def read_chunks(files: Iterable[RawFile], column: str, job: Job, limit: int | None = None) -> Iterator[Chunk]:
    """Yield the documents of the files, the first `limit`, long ones in chunks whose split is decided."""
    count = 0
    for file in files:
        split = job.split
        for chunk in readers.split_document([file.text]) if file.text else readers.documents(file.local_path(), column):
            if split is None and not chunk.documents:  # the hash takes the whole document: read it once for that
                split = choose_split(readers.text_chunks(file.path), job.val_fraction, job.test_fraction)
            yield chunk._replace(split=split)
            count += chunk.documents
            if count == limit:
                return


def split_by_characters(chunks: Iterable[Chunk], chars_per_split: dict[str, int]) -> Iterator[Chunk]:
    """Give each split so many characters, in order; a document at a border becomes one document of both splits."""
    borders = iter([(split, chars) for split, chars in chars_per_split.items() if chars])
    left = 0
    for chunk in chunks:
        text = chunk.text
        while text:
            if not left:
                split, left = next(borders)
            head, text = text[:left], text[left:]
            left -= len(head)
            ends = not left or (chunk.documents and not text)
            yield Chunk(head, int(bool(ends)), chunk.forced_split and not text, split)


def joined_rows(files: Iterable[RawFile], column: str, limit: int | None) -> Iterator[Chunk]:
    """Yield the rows of the files joined to one text, `limit` rows at most; a chunk's documents are its rows."""
    rows = counted = 0

    def blocks() -> Iterator[str]:
        nonlocal rows
        texts = (text for file in files for text in readers.rows(file.local_path(), column, empty=True))
        for task in chunk_tasks(map(Chunk, itertools.islice(texts, limit))):
            rows += len(task.chunks)
            yield "".join(chunk.text for chunk in task.chunks)

    for chunk in readers.split_document(blocks()):
        yield chunk._replace(documents=rows - counted)
        counted = rows


# ---------------------------------------------------------------------------------------------------------------------
# files, chunks -> tasks


def chunk_tasks(chunks: Iterable[Chunk], size: int | None = None) -> Iterator[Task]:
    """Yield tasks of at least `size` characters, by default CHUNK_BYTES, over the chunks."""
    size = readers.CHUNK_BYTES if size is None else size
    waiting, characters = [], 0

    def task() -> Task:
        return Task(sum(len(chunk.text.encode()) for chunk in waiting), tuple(waiting))

    for chunk in chunks:
        waiting.append(chunk)
        characters += len(chunk.text)
        if characters >= size:
            yield task()
            waiting, characters = [], 0
    if waiting:
        yield task()


def file_tasks(files: Iterable[RawFile], column: str, job: Job, root: Path) -> Iterator[Task]:
    """Yield tasks over all documents of the files, in order; files are downloaded when their turn comes."""
    for file_format, group in itertools.groupby(files, lambda file: readers.file_format(file.path)):
        if file_format == "text":  # small files share a task
            yield from chunk_tasks(read_chunks(group, column, job))
        else:
            for file in group:
                make = line_tasks if file_format == "jsonl" else row_tasks
                yield from make(root / file.local_path(), column)


def line_tasks(path: Path, column: str) -> Iterator[Task]:
    """Yield tasks over the lines of a JSON lines file, which travel to the worker."""
    total, done = path.stat().st_size, 0
    for line, block in readers.line_chunks(path):
        # how much of a compressed file is left is unknown: assume that text is three times as large
        size = len(block) if path.name.endswith("l") else min(len(block) // 3, total - done)
        done += size
        yield Task(size, read=functools.partial(readers.parse_lines, block, column, path, line))


def row_tasks(path: Path, column: str) -> Iterator[Task]:
    """Yield tasks over row groups of a parquet file, which the worker reads."""
    start = size = 0
    groups = readers.row_groups(path, column)
    for n, (_, group_size) in enumerate(groups):
        large = group_size > 4 * readers.CHUNK_BYTES  # than fits into a worker's memory: read here, in chunks
        size += 0 if large else group_size
        stop = n if large else n + 1
        if stop > start and (large or size >= readers.CHUNK_BYTES or n == len(groups) - 1):
            yield Task(size, read=functools.partial(readers.rows, path, column, start, stop))
            start, size = stop, 0
        if large:
            yield from chunk_tasks(map(Chunk, readers.rows(path, column, n, n + 1)))
            start = n + 1
