"""The sources of text: their files, downloaded where they are missing, their splits, and the tasks over both."""

from __future__ import annotations

import functools
import glob
import hashlib
import http.client
import itertools
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import PrepareConfig, UserError
from flatgpt.data import readers, tokenizer
from flatgpt.data.encode import Encoded, encode_chunks, load_encoder
from flatgpt.data.hub import HubFiles, known_commit, open_repository
from flatgpt.data.readers import Chunk, Corpus, RawFile, Task, chunk_tasks, file_tasks
from flatgpt.data.shards import SPLITS
from flatgpt.runtime.files import atomic_write

# The copy in common use, from Karpathy's char-rnn (2015).
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SPLIT_HASH = hashlib.blake2b(digest_size=8, key=b"flatgpt split")
DUMP = "20231101.en"  # Wikipedia's, by default
# Dataset repositories known by name, the commits that flatGPT was written against, and the files in them.
REPOSITORIES = {
    "wikitext103": ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-103-raw-v1/*.parquet"),
    "wikipedia": ("wikimedia/wikipedia", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", "{dump}/*.parquet"),
    "fineweb": ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample/10BT/*.parquet"),
}
FEW_DOCUMENTS = 100  # fewer are split by characters, because whole documents would be too coarse


@dataclass(frozen=True)
class Source:
    """What prepare needs to know about a source.

    Args:
        tokenizer: the default tokenizer.
        revision: identifies the content without a network; None where only the hub knows.
        open: returns the files; may ask the hub.
        end_of_text: whether an end-of-text token follows each document.
        val_fraction: default share of validation text; None for a source with a validation split.
        joined: whether the rows are lines of one running text, to be joined again.
    """

    tokenizer: str
    revision: Callable[[PrepareConfig], str | None]
    open: Callable[[PrepareConfig], Corpus]
    end_of_text: bool = True
    val_fraction: float | None = 0.0005
    joined: bool = False


def hub_files(config: PrepareConfig) -> HubFiles:
    """Return the files of the dataset repository that the config's source names."""
    root = Path(config.raw_dir) / config.source
    if config.source == "hub":
        patterns = config.files or ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
        return HubFiles(config.repo, config.revision or "main", patterns, root / config.repo)
    repo, commit, pattern = REPOSITORIES[config.source]
    dump, splits = config.dump or DUMP, SPLITS if config.source == "wikitext103" else ()
    patterns = (pattern.format(dump=dump),)
    return HubFiles(repo, config.revision or commit, patterns, root, flat=dump == DUMP, splits=splits)


def open_pydoc(config: PrepareConfig) -> Corpus:
    """Return the Python language reference that comes with CPython: about 0.5 MB, no download.

    Topics are in alphabetical order; duplicates are left out.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(dict.fromkeys(topics[name].strip("\n") for name in sorted(topics))) + "\n"
    return Corpus({"train": [RawFile("pydoc", len(text.encode()), text=text)]})


def open_shakespeare(config: PrepareConfig) -> Corpus:
    """Return tiny Shakespeare, downloaded if it is missing.

    Raises:
        UserError: no network, another content, or a file that cannot be read or written.
    """
    path = Path(config.raw_dir) / "shakespeare" / "input.txt"
    try:
        if not path.exists():
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
                content = response.read()
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content)
        content = path.read_bytes()
    except (OSError, http.client.HTTPException) as error:
        what = f"{SHAKESPEARE_URL} could not be downloaded to {path} ({getattr(error, 'reason', error)})"
        raise UserError(f"{what}: check the network, or put the file there (another folder: --raw_dir)") from None
    if (found := hashlib.sha256(content).hexdigest()) != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not tiny Shakespeare (SHA-256 {found[:16]}...): move it away to download it again")
    return Corpus({"train": [RawFile(path.name, len(content), path)]})


def text_revision(config: PrepareConfig) -> str:
    """Return the SHA-256 over the SHA-256s of the user's files. Raises UserError for text that is not UTF-8."""
    combined = hashlib.sha256()
    for path in expand(config.input):
        digest = hashlib.sha256()
        if readers.file_format(path) == "text":
            for chunk in readers.text_chunks(path):
                digest.update(chunk.encode())
        else:
            with readers.read_errors(path), open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").hexdigest().encode())
        combined.update(digest.digest())
    return combined.hexdigest()


def open_text(config: PrepareConfig) -> Corpus:
    """Return the user's files, in the order given."""
    return Corpus({"train": [RawFile(str(path), path.stat().st_size, path) for path in expand(config.input)]})


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """Return the files that paths, folders (recursive, sorted) and glob patterns name; each file once, in order."""
    files: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(tuple(readers.FORMATS)) and p.is_file())
        elif not path.exists():
            found = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
        if not found:
            raise UserError(f"--input {pattern}: no such file, and no {' '.join(readers.FORMATS)} file found by it")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _repository(**facts) -> Source:
    return Source("gpt2", lambda c: known_commit(hub_files(c)), lambda c: open_repository(c, hub_files(c)), **facts)


ONE_TEXT = {"end_of_text": False, "val_fraction": 0.1}
SOURCES = {
    "pydoc": Source("byte", lambda _: f"Python {sys.version.split()[0]}", open_pydoc, **ONE_TEXT),
    "shakespeare": Source("gpt2", lambda _: SHAKESPEARE_SHA256, open_shakespeare, **ONE_TEXT),
    "wikitext103": _repository(end_of_text=False, val_fraction=None, joined=True),
    "wikipedia": _repository(),
    "fineweb": _repository(),
    "hub": _repository(),
    "text": Source("gpt2", text_revision, open_text, val_fraction=0.1),
}


# ---------------------------------------------------------------------------------------------------------------------
# splits, and the tasks over them


class Plan(NamedTuple):
    """How a dataset is made.

    Attributes:
        splits: of the dataset.
        held_out: the shares of the documents of train that go to other splits.
        tasks: over the files of each of the source's splits.
        size: bytes of these files.
    """

    splits: list[str]
    held_out: dict[str, float]
    tasks: dict[str, Iterator[Task]]
    size: int


def make_plan(config: PrepareConfig, corpus: Corpus) -> Plan:
    """Decide which of the source's splits makes which of the dataset's; download missing files.

    The source's splits are kept. Where it has no `val`, or no `test` and one is asked for, that is held out of `train`.

    Raises:
        UserError: splits that do not exist, a fraction of one that the source has, and what reading raises.
    """
    source = SOURCES[config.source]
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and split in corpus.files:
            raise UserError(f"{config.source} has a {split} split of its own: leave --{split}_fraction out")
    fractions = {"val": config.val_fraction or source.val_fraction, "test": config.test_fraction}
    held_out = {s: f for s, f in fractions.items() if f and s not in corpus.files and "train" in corpus.files}
    available = [split for split in SPLITS if split in corpus.files or split in held_out]
    if unknown := [split for split in config.splits if split not in available]:
        hint = "; --test_fraction makes one" if unknown == ["test"] and held_out else ""
        raise UserError(f"splits = {', '.join(unknown)}: {config.source} has {', '.join(available)}{hint}")
    splits = [split for split in available if split in (config.splits or available)]
    shares = {split: held_out if split == "train" else {} for split in corpus.files}
    files = {split: group for split, group in corpus.files.items() if {split, *shares[split]} & {*splits}}
    if not config.sample_size:  # a sample downloads files one by one, until it has enough
        for file in itertools.chain(*files.values()):
            file.local_path()
    tasks = {split: split_tasks(config, group, shares[split]) for split, group in files.items()}
    return Plan(splits, held_out, tasks, sum(file.size for group in files.values() for file in group))


def split_tasks(config: PrepareConfig, files: list[RawFile], held_out: dict[str, float]) -> Iterator[Task]:
    """Yield the tasks over one of the source's splits, the same ones each time.

    Args:
        held_out: the fractions of the documents that go to other splits: by a hash of each document or, of fewer than
            FEW_DOCUMENTS, by characters, from the end.
    """
    limit, column = config.sample_size, config.column
    if SOURCES[config.source].joined:
        return chunk_tasks(joined_rows(files, column, limit), 0)
    choose = functools.partial(choose_split, held_out) if held_out else None

    def documents(limit: int | None, choose: Callable | None = None) -> Iterator[Chunk]:
        count = 0
        for task in file_tasks(files, column, choose):
            for chunk in task.read():
                yield chunk
                count += chunk.documents
                if count == limit:
                    return

    if held_out:
        count = characters = 0
        for chunk in documents(min(limit or FEW_DOCUMENTS, FEW_DOCUMENTS)):
            count, characters = count + chunk.documents, characters + len(chunk.text)
        if count < FEW_DOCUMENTS:
            val, test = held_out.get("val", 0), held_out.get("test", 0)
            borders = int(characters * (1 - val - test)), int(characters * (1 - test)), characters
            return chunk_tasks(split_by_characters(documents(limit), borders), 0)
    return chunk_tasks(documents(limit, choose)) if limit else file_tasks(files, column, choose)


def split_by_characters(chunks: Iterable[Chunk], borders: tuple[int, int, int]) -> Iterator[Chunk]:
    """Split the text of all chunks at these characters into train, val and test.

    A document at a border becomes one document of both splits.
    """
    start = 0
    for chunk in chunks:
        for split, (first, last) in zip(SPLITS, itertools.pairwise((0, *borders)), strict=True):
            if part := chunk.text[max(0, first - start) : max(0, last - start)]:
                yield Chunk(part, 1 if last - start <= len(chunk.text) else chunk.documents, split)
        start += len(chunk.text)


def joined_rows(files: Iterable[RawFile], column: str, limit: int | None) -> Iterator[Chunk]:
    """Yield the rows of the files joined to one text, `limit` rows at most; a chunk's documents are its rows."""
    rows = counted = 0
    chunks = (chunk for file in files for chunk in readers.rows(file.local_path(), column, empty=True))

    def blocks() -> Iterator[str]:
        nonlocal rows
        for task in chunk_tasks(itertools.islice(chunks, limit)):
            block = list(task.read())
            rows += len(block)
            yield "".join(chunk.text for chunk in block)

    for chunk in readers.split_document(blocks()):
        yield chunk._replace(documents=rows - counted)
        counted = rows


# ---------------------------------------------------------------------------------------------------------------------
# in the workers


def encode_task(config: PrepareConfig, splits: list[str], held_out: dict[str, float], task: Task) -> dict[str, Encoded]:
    """Encode the documents of a task, in order: what encode_chunks returns, for each split that the task has.

    The result depends on the arguments alone, so any number of workers, here or on a cluster, writes the same bytes.

    Args:
        splits, held_out: of the plan.
    """
    source = SOURCES[config.source]
    encoding = tokenizer.load(config.tokenizer or source.tokenizer)
    encode = load_encoder(encoding, config.encoder)
    by_split: dict[str, list[Chunk]] = {}
    for chunk in task.read():
        split = chunk.split or task.split
        if held_out and split == "train" and not chunk.split:
            split = choose_split(held_out, [chunk.text])
        if split in splits:
            by_split.setdefault(split, []).append(chunk)
    return {split: encode_chunks(encoding, encode, chunks, source.end_of_text) for split, chunks in by_split.items()}


def choose_split(held_out: dict[str, float], chunks: Iterable[str]) -> str:
    """Return the split of a document, by a keyed hash of its text: equal texts go to one split, in every dataset.

    Args:
        held_out: the shares of the documents that go to val and test.
        chunks: the text of the document, in any chunks.
    """
    digest = SPLIT_HASH.copy()  # a keyed hash takes several times as long to create
    for text in chunks:
        digest.update(text.encode())
    position = int.from_bytes(digest.digest(), "big") / 2**64
    test = held_out.get("test", 0)
    return "test" if position < test else "val" if position < test + held_out.get("val", 0) else "train"
