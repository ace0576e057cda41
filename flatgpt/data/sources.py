"""Sources of text: their files, which are downloaded if they are missing, their splits, and the encoding tasks."""

from __future__ import annotations

import functools
import hashlib
import http.client
import itertools
import re
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import SOURCE_SETTINGS, PrepareConfig, UserError
from flatgpt.data import readers, splits, tokenizer
from flatgpt.data.chunks import Task, chunk_tasks
from flatgpt.data.encode import Encoded, encode_chunks, load_encoder, load_tokenizer
from flatgpt.data.hub import DUMP, Repository, known_commit, open_repository
from flatgpt.data.inputs import expand_inputs
from flatgpt.data.readers import Corpus, RawFile, file_tasks
from flatgpt.data.shards import SPLITS
from flatgpt.data.splits import Borders, CharacterBorders, choose_split, chunks_by_split, divide, split_by_characters
from flatgpt.data.text_files import file_format, text_chunks
from flatgpt.runtime.files import atomic_write, read_errors

# The common copy of tiny Shakespeare, from Karpathy's char-rnn (2015).
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MAX_COMPARED_BYTES = 100 << 20  # larger inputs are not searched for documents that are in two splits


@dataclass(frozen=True)
class Source:
    """Properties of a source, besides its SourceSettings in config.py.

    Args:
        revision: returns an identifier of the content, or None if that needs the hub.
        open: returns the files; may send requests to the hub.
        end_of_text: whether an end-of-text token follows each document.
        val_fraction: default share of documents for validation; None if the source has a validation split.
        joined: whether the rows are lines of one text, and are joined.
        language: the language's code, if it is always the same, for model cards.
        license: the license of the text, if it is always the same.
        repository: the dataset repository, if it is always the same.
    """

    revision: Callable[[PrepareConfig], str | None]
    open: Callable[[PrepareConfig], Corpus]
    end_of_text: bool = True
    val_fraction: float | None = 0.0005
    joined: bool = False
    language: str | None = None
    license: str | None = None
    repository: Repository | None = None


def hub_source(repository: Repository, **properties) -> Source:
    """Return a source that consists of files of a dataset repository with a known layout."""
    revision, files = (functools.partial(call, repository=repository) for call in (known_commit, open_repository))
    return Source(revision, files, repository=repository, **properties)


def single_text(name: str, text: str) -> Corpus:
    """Return the files of a source that is one text in memory."""
    return Corpus({"train": [RawFile(name, len(text.encode()), text=text)]})


def open_pydoc(config: PrepareConfig) -> Corpus:
    """Return the Python language reference from CPython's pydoc_data: about 0.5 MB, no download.

    Topics are in alphabetical order, without duplicates.
    """
    from pydoc_data.topics import topics

    return single_text("pydoc", "\n\n".join(dict.fromkeys(topics[name].strip("\n") for name in sorted(topics))) + "\n")


def open_shakespeare(config: PrepareConfig) -> Corpus:
    """Return tiny Shakespeare, downloaded if it is missing.

    Raises:
        UserError: the download fails, the content is wrong, or the file cannot be read or written.
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
        failure = f"{SHAKESPEARE_URL} could not be downloaded to {path} ({getattr(error, 'reason', error)})"
        raise UserError(f"{failure}: check the network, or copy the file to {path} (--raw_dir: the folder)") from None
    if (found := hashlib.sha256(content).hexdigest()) != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not tiny Shakespeare (SHA-256 {found[:16]}...): move it away to download it again")
    return Corpus({"train": [RawFile(path.name, len(content), path)]})


def text_revision(config: PrepareConfig) -> str:
    """Return the SHA-256 of the SHA-256s of the input files. Raise UserError if a text file cannot be decoded."""
    combined = hashlib.sha256()
    for split, files in open_text(config).files.items():
        combined.update(b"" if split == "train" else split.encode())
        for path in (file.path for file in files):
            digest = hashlib.sha256()
            try:
                if file_format(path) == "text":
                    for chunk in text_chunks(path, config.encoding):
                        digest.update(chunk.encode())
                else:
                    with read_errors(path), open(path, "rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").hexdigest().encode())
            except UserError:
                if not config.sample_size:  # a file behind the sample need not be valid; one in it is refused later
                    raise
            combined.update(digest.digest())
    return combined.hexdigest()


def open_text(config: PrepareConfig) -> Corpus:
    """Return the files of --input, --val_input and --test_input, in order. A file is in one split only, in train last.

    Raises:
        UserError: no file is left for a split.
    """
    patterns = {"val": config.val_input, "test": config.test_input, "train": config.input}
    taken, left_out, found, lines = set(), 0, {}, []
    for split, inputs in patterns.items():
        flag = "--input" if split == "train" else f"--{split}_input"
        paths = expand_inputs(inputs, config.column, config.encoding, lines.append, flag)
        found[split] = [path for path in paths if path.resolve() not in taken]
        left_out += len(paths) - len(found[split])
        taken |= {path.resolve() for path in paths}
        if paths and not found[split]:
            others = " or ".join(f"--{other}_input" for other in ("val", "test") if found.get(other))
            raise UserError(f"{flag}: all of its files are in {others} too; name other files")
    raw = {s: [RawFile(str(path), path.stat().st_size, path) for path in found[s]] for s in SPLITS if found[s]}
    if left_out:
        lines.append(f"note: input files that are left out, as --val_input or --test_input has them: {left_out:,}")
    return Corpus(raw, notice="\n".join(lines))


def note_shared(config: PrepareConfig, corpus: Corpus, log: Callable[[str], None]) -> None:
    """Log how many documents of the user's validation and test files are training documents too, if that is quick."""
    if sum(file.size for group in corpus.files.values() for file in group) > MAX_COMPARED_BYTES:
        return
    read = functools.partial(readers.documents, encoding=config.encoding)
    texts = {s: read(files, config.column, config.sample_size) for s, files in corpus.files.items()}
    train, *others = (dict(splits.documents(texts[split])) for split in SPLITS if split in texts)
    if shared := sum(len(train.keys() & other.keys()) for other in others):
        log(f"note: {shared:,} different documents of the validation or test files are in the training files too")


WIKITEXT = Repository(
    "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-103-raw-v1/*.parquet", SPLITS
)
WIKIPEDIA = Repository("wikimedia/wikipedia", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", "{dump}/*.parquet")
FINEWEB = Repository("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample/10BT/*.parquet")
CREATIVE_COMMONS = "CC BY-SA 3.0 and GFDL"  # as the repositories of WikiText and Wikipedia state
SINGLE_TEXT = {"end_of_text": False, "val_fraction": 0.1}
SOURCES = {
    "pydoc": Source(
        lambda _: f"Python {sys.version.split()[0]}", open_pydoc, language="en", license="PSF-2.0", **SINGLE_TEXT
    ),
    "shakespeare": Source(
        lambda _: SHAKESPEARE_SHA256, open_shakespeare, language="en", license="public domain", **SINGLE_TEXT
    ),
    "wikitext103": hub_source(
        WIKITEXT, language="en", license=CREATIVE_COMMONS, end_of_text=False, val_fraction=None, joined=True
    ),
    "wikipedia": hub_source(WIKIPEDIA, language="en", license=CREATIVE_COMMONS),
    "fineweb": hub_source(FINEWEB, language="en", license="ODC-By 1.0 and Common Crawl's terms of use"),
    "hub": Source(known_commit, open_repository),
    "text": Source(text_revision, open_text, val_fraction=0.1),
}


def dataset_folder(config: PrepareConfig) -> Path:
    """Return data_dir/name. The default name has the source or repository, and what is not default."""
    parts = [config.repo.split("/")[-1] if config.source == "hub" else config.source, config.subset]
    parts += [None if config.dump == DUMP else config.dump]
    parts += [None if config.tokenizer == SOURCE_SETTINGS[config.source].tokenizer else config.tokenizer]
    name = "_".join(re.sub(r"[^\w.-]", "", part) for part in parts if part)
    return Path(config.data_dir) / (config.name or name)


# ---------------------------------------------------------------------------------------------------------------------
# splits and tasks


class Plan(NamedTuple):
    """The work for a dataset.

    Attributes:
        splits: splits of the dataset.
        borders: the result of `divide`; None if no split is held out of the source's train documents.
        tasks: {split of the source: its tasks}.
        size: size of the files in bytes.
        version: of the division into tasks and splits; only work of the same version can be resumed.
    """

    splits: list[str]
    borders: Borders
    tasks: dict[str, Iterator[Task]]
    size: int
    version: int


def make_plan(
    config: PrepareConfig, corpus: Corpus, special_tokens: Iterable[str] = (), log: Callable[[str], None] = print
) -> Plan:
    """Return the splits and tasks of a dataset, and download missing files.

    Splits of the source are kept. A missing `val`, and a missing `test` with --test_fraction, is held out of `train`.

    Args:
        special_tokens: texts that are not split.
        log: called with a line about the download.

    Raises:
        UserError: a split does not exist or has too little text, a fraction is for a split that the source has, or a
            file cannot be read.
    """
    source, name = SOURCES[config.source], dataset_folder(config).name
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction is not None and split in corpus.files:
            advice = "choose the others with --splits" if fraction == 0 else f"leave out --{split}_fraction"
            raise UserError(f"{config.source} has its own {split} split: {advice}")
    val_fraction = source.val_fraction if config.val_fraction is None else config.val_fraction
    fractions = {"val": val_fraction, "test": config.test_fraction}
    held_out = {s: f for s, f in fractions.items() if f and s not in corpus.files and "train" in corpus.files}
    available = [split for split in SPLITS if split in corpus.files or split in held_out]
    if unknown := [split for split in config.splits if split not in available]:
        hint = "; --test_fraction makes one" if unknown == ["test"] and held_out else ""
        raise UserError(f"splits = {', '.join(unknown)}: {config.source} has {', '.join(available)}{hint}")
    splits = [split for split in available if split in (config.splits or available)]
    read = {"train" if split in held_out else split for split in splits}
    files = {split: group for split, group in corpus.files.items() if split in read}
    if not config.sample_size:  # a sample downloads files only until it has enough documents
        missing = [file for file in itertools.chain(*files.values()) if file.fetch and not file.path.exists()]
        if missing:
            megabytes = -(-sum(file.size for file in missing) // 10**6)
            text = f"downloading {len(missing):,} file{'s' * (len(missing) > 1)}, {megabytes:,} MB, to {config.raw_dir}"
            share = "train" in read and "train" not in splits
            reason = f": {', '.join(splits)} is a share of all their documents" * share
            log(f"{text}{reason}; --sample_size N needs the first documents only")
        for file in missing:
            file.local_path()
    borders, way, tasks = None, 0, {}
    for split, group in files.items():
        if held_out and split == "train":
            documents = readers.documents(group, config.column, config.sample_size, encoding=config.encoding)
            borders, way = divide(documents, held_out, splits, name, special_tokens)
        else:
            first = next((chunk.text for task in split_tasks(config, group) for chunk in task.read()), "")
            if len(first) + source.end_of_text < 2:
                text = f"the {split} split of {name} would have {len(first)} characters"
                raise UserError(f"too little text: {text}; omit it with --splits")
        tasks[split] = split_tasks(config, group, borders if split == "train" else None)
    size = sum(file.size for group in files.values() for file in group)
    return Plan(splits, borders, tasks, size, version=1 + bool(config.sample_size) + 2 * way)


def split_tasks(config: PrepareConfig, files: list[RawFile], borders: Borders = None) -> Iterator[Task]:
    """Return the tasks of one split of the source, the same in each call.

    Args:
        borders: the result of `divide`, if other splits are held out of this one.
    """
    limit, column, encoding = config.sample_size, config.column, config.encoding
    if SOURCES[config.source].joined:
        return chunk_tasks(readers.joined_rows(files, column, limit), 0)
    if isinstance(borders, CharacterBorders):
        chunks = readers.documents(files, column, limit, encoding=encoding)
        return chunk_tasks(split_by_characters(chunks, borders), 0)
    choose = functools.partial(choose_split, borders) if borders else None
    if limit:
        return chunk_tasks(readers.documents(files, column, limit, choose, encoding))
    return file_tasks(files, column, choose, encoding)


# ---------------------------------------------------------------------------------------------------------------------
# run in workers


def encode_task(
    config: PrepareConfig, folder: Path, end_of_text_id: int | None, splits: list[str], borders: Borders, task: Task
) -> tuple[dict[str, Encoded], str | None]:
    """Encode the documents of a task, in order.

    The result depends only on the arguments, so that the shards do not depend on the number or kind of workers.

    Args:
        folder: of the dataset. It contains the tokenizer.json of a tokenizer without a known name.
        end_of_text_id: the tokenizer's.
        splits, borders: as in Plan.

    Returns:
        {split: result of encode_chunks}; and the first added token that was encoded as ordinary characters.
    """
    source, special = SOURCES[config.source], config.parse_special
    encoding = load_tokenizer(config.tokenizer or SOURCE_SETTINGS[config.source].tokenizer, folder, end_of_text_id)
    encode = load_encoder(encoding, config.encoder, special)
    by_split = {split: chunks for split, chunks in chunks_by_split(borders, task).items() if split in splits}
    texts = () if special else (chunk.text for chunks in by_split.values() for chunk in chunks)
    ordinary = next(filter(None, (tokenizer.find_special(encoding, text) for text in texts)), None)
    ends = source.end_of_text and encoding.eot_token is not None
    return {s: encode_chunks(encoding, encode, chunks, ends, special) for s, chunks in by_split.items()}, ordinary
