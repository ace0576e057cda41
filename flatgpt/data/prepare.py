"""Make a dataset folder from a source. Worker processes encode tasks; the results are written in order.

To resume, prepare truncates the shards to the position in progress.json and continues with the next task. When the
dataset is finished, meta.json, the manifest, replaces progress.json.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import tiktoken

from config import SOURCE_SETTINGS, PrepareConfig, UserError, tokenizer_names
from flatgpt.data import tokenizer, workers
from flatgpt.data.chunks import Task
from flatgpt.data.dataset import PROGRESS, Dataset, open_dataset
from flatgpt.data.encode import load_encoder
from flatgpt.data.hub import DUMP
from flatgpt.data.readers import Corpus
from flatgpt.data.shards import DAMAGED, OUR_FILES, SPLITS, ShardWriter, count_tokens, is_count, read_meta, write_meta
from flatgpt.data.sources import SOURCES, Plan, dataset_folder, encode_task, make_plan, note_shared
from flatgpt.data.tokenizer import TOKENIZER_FILE, FileTokenizer
from flatgpt.data.tokenizer_files import END_OF_TEXT, tokenizer_json
from flatgpt.data.tokenizer_names import find as find_tokenizer
from flatgpt.data.tokenizer_training import TRAINED, add_special_tokens, split_texts, train, trained_size
from flatgpt.data.workers import RESUMABLE
from flatgpt.runtime.files import FolderLock, atomic_write

MIN_POOL_BYTES = 8 << 20  # encoding less text is faster than starting processes
SAVE_SECONDS = 10  # between two saves of progress.json
NOTHING_DONE = {"tasks": 0, "size": 0}  # progress of one split of the source


def prepare(config: PrepareConfig, log: Callable[[str], None] = print) -> Dataset:
    """Make or resume the dataset that the config describes, or open it if it is finished.

    Args:
        log: called with each line to print.

    Raises:
        UserError: bad input, too little text, a full disk, or the folder has another dataset.
    """
    source, given = SOURCES[config.source], config
    (name,) = tokenizer_names(config.tokenizer or SOURCE_SETTINGS[config.source].tokenizer)
    trained = trained_size(name, config.special_tokens)
    encoding = None if trained else find_tokenizer(name, config.data_dir)  # None: it has a known name
    if config.special_tokens and not trained:
        encoding = add_special_tokens(encoding or tokenizer.load(name), config.special_tokens)
    name = encoding.name if encoding else name
    config = dataclasses.replace(config, tokenizer=name)
    folder = dataset_folder(config)
    revision = source.revision(config)
    corpus = None if revision else source.open(config)
    settings = dataset_settings(config, revision or corpus.revision, encoding)
    if not config.overwrite and (meta := read_meta(folder)) is not None:
        check_settings(folder, "a dataset", meta, settings)
        (folder / PROGRESS).unlink(missing_ok=True)  # left if the last call was killed after it wrote meta.json
        log(f"{folder} already exists, with the same settings; nothing to do")
        return open_dataset(folder)
    if not trained:
        encoding = encoding or tokenizer.load(name)
        load_encoder(encoding, config.encoder)  # raise its errors before downloads
    corpus = corpus or source.open(config)
    if corpus.notice:
        log(corpus.notice)
    special = encoding.special_tokens_set if encoding else (END_OF_TEXT, *config.special_tokens)
    plan = make_plan(config, corpus, special if config.parse_special else (), log)
    if trained and "train" not in plan.splits:
        advice = "add train to --splits, or give the folder of a dataset that has the tokenizer: --tokenizer data/NAME"
        raise UserError(f"tokenizer {name} is trained on the training split: {advice}")
    with _locked(folder) as lock:
        finished = (folder / "meta.json").exists()
        if finished and not config.overwrite:  # another call has just finished it
            return prepare(given, log)
        try:  # also with --overwrite, an unfinished dataset of the same settings is resumed
            progress = None if finished else read_progress(folder, settings, corpus, plan.version)
        except UserError:
            if not config.overwrite:
                raise
            progress = None
        if progress is None:
            move_aside(folder, lock, corpus, log)
            progress = read_progress(folder, settings, corpus, plan.version)
        if trained:
            encoding = read_trained(folder, name, progress) or train(
                split_texts(config, corpus, plan, "train", config.tokenizer_sample_mb * 10**6),
                name,
                config.special_tokens,
                None if config.sample_size else min(plan.size, config.tokenizer_sample_mb * 10**6),
            )
        if progress["passes"]:
            log(f"{folder}: resuming")
        else:
            remove_unfinished(folder)
            if config.val_input or config.test_input:
                note_shared(config, corpus, log)
        write_tokenizer(folder, encoding, progress)
        entries = write_shards(config, folder, plan, encoding, progress)
        if changed := next((file for group in corpus.files.values() for file in group if file.has_changed()), None):
            remove_unfinished(folder)
            raise UserError(f"{changed.path} changed while it was read: run again when it is complete")
        ends = source.end_of_text and encoding.eot_token is not None
        meta = {key: value for key, value in settings.items() if value is not None}
        meta |= {"vocab_size": encoding.n_vocab, "ranks_sha256": tokenizer.ranks_hash(encoding)}
        meta |= {"eot_id": encoding.eot_token, "end_of_text": ends, "dtype": "uint16", "splits": entries}
        with _write_errors(folder):
            write_meta(folder, meta)
            (folder / PROGRESS).unlink()
    return open_dataset(folder)


def dataset_settings(config: PrepareConfig, revision: str, encoding: tiktoken.Encoding | None) -> dict:
    """Return the settings that identify a dataset, in the order in which meta.json has them.

    Args:
        revision: identifier of the source's content.
        encoding: the tokenizer, unless it has a known name or is trained.
    """
    val_fraction = SOURCES[config.source].val_fraction if config.val_fraction is None else config.val_fraction
    codec = codecs.lookup(config.encoding).name
    return {
        "source": config.source,
        "repo": config.repo,
        "subset": config.subset,
        "dump": None if config.dump == DUMP else config.dump,
        "files": list(config.files) or None,
        "column": None if config.column == "text" else config.column,
        "encoding": None if codec in ("utf-8", "utf-8-sig") else codec,
        "revision": revision,
        "tokenizer": config.tokenizer,
        "encoder": config.encoder,
        "shard_tokens": config.shard_tokens,
        "val_fraction": None if config.val_input else val_fraction,
        "test_fraction": config.test_fraction or None,
        "sample_size": config.sample_size,
        "only_splits": [split for split in SPLITS if split in config.splits] or None,
        "tokenizer_sha256": tokenizer.ranks_hash(encoding) if isinstance(encoding, FileTokenizer) else None,
        "tokenizer_sample_mb": config.tokenizer_sample_mb if TRAINED.fullmatch(config.tokenizer) else None,
        "special_tokens": list(config.special_tokens) or None,
        "parse_special": config.parse_special or None,
    }


def write_shards(
    config: PrepareConfig, folder: Path, plan: Plan, encoding: tiktoken.Encoding, progress: dict
) -> dict[str, dict]:
    """Encode the remaining tasks and append the results to the shards, in order.

    Args:
        progress: the result of read_progress; updated in place.

    Returns:
        The manifest entry of each split.

    Raises:
        UserError: bad input, a full disk or a killed worker. Finished work is kept.
    """
    from tqdm import tqdm

    if config.cluster:
        pool = workers.dask_cluster(config.cluster)
    elif plan.size < MIN_POOL_BYTES:
        pool = nullcontext(workers.in_this_process)
    else:
        pool = workers.local_pool(config.workers or workers.available_cores())
    positions, passes = progress["splits"], progress["passes"].values()
    make_writer = functools.partial(ShardWriter, folder, n_vocab=encoding.n_vocab, shard_tokens=config.shard_tokens)
    writers = {split: make_writer(split, position=positions.get(split)) for split in plan.splits}
    total, done = None if config.sample_size else plan.size, sum(state["size"] for state in passes)
    seconds = 0.1 if sys.stderr.isatty() else 60  # between updates of the progress bar
    bar = tqdm(None, folder.name, total, unit="B", unit_scale=True, initial=done, delay=seconds, mininterval=seconds)

    def tasks() -> Iterator[Task]:
        for split, split_tasks in plan.tasks.items():
            done = progress["passes"].get(split, NOTHING_DONE)["tasks"]
            for task in itertools.islice(split_tasks, done, None):
                yield task._replace(split=split)

    def save() -> float:
        with _write_errors(folder):
            for writer in writers.values():
                writer.flush()
            atomic_write(folder / PROGRESS, json.dumps(progress).encode())
        return time.monotonic()

    encode = functools.partial(
        encode_task, config, folder.absolute(), encoding.eot_token, plan.splits, plan.borders
    )  # absolute, for workers with another cwd
    noted = False
    try:
        saved = save()  # progress.json has the command that resumes
        with bar, pool as run_tasks:
            for task, (encoded, special) in run_tasks(encode, tasks()):
                if special and not noted:
                    noted = True
                    write = bar.write if sys.stderr.isatty() else print
                    write(tokenizer.SPECIAL_NOTE.format(repr(special)), file=sys.stderr)
                with _write_errors(folder):
                    for split, part in encoded.items():
                        writers[split].add(*part)
                state = progress["passes"].get(task.split, NOTHING_DONE)
                state = {"tasks": state["tasks"] + 1, "size": state["size"] + task.size}
                progress.update(  # one call, so that a signal cannot leave half an update
                    passes={**progress["passes"], task.split: state},
                    splits={split: writer.position() for split, writer in writers.items()},
                )
                bar.set_postfix_str(f"{sum(writer.tokens for writer in writers.values()):,} tokens", refresh=False)
                bar.update(task.size)
                if time.monotonic() - saved > SAVE_SECONDS:
                    saved = save()
        with _write_errors(folder):
            return {split: writer.close() for split, writer in writers.items()}
    except BaseException as error:
        with suppress(UserError):
            save()
        if isinstance(error, KeyboardInterrupt):
            print(f"{folder}: stopped; {RESUMABLE}", file=sys.stderr)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# the dataset folder


def check_settings(folder: Path, what: str, found: dict, settings: dict) -> None:
    """Raise UserError if settings differ from those of the dataset in the folder, with the differences."""
    found = {"encoder": "tiktoken", **found}  # the only encoder of earlier versions
    hashes = {"revision": "the text of the input"} if settings["source"] == "text" else {}
    changed = [key for key, value in settings.items() if found.get(key) != value]
    if differing := [hashes.get(key) or f"{key} {found.get(key)} (now {settings[key]})" for key in changed]:
        what = f"{folder} already has {what} with other settings: {'; '.join(differing)}"
        raise UserError(f"{what}. Choose another name with --name, or move it aside with --overwrite")


def read_trained(folder: Path, name: str, progress: dict) -> FileTokenizer | None:
    """Return the tokenizer that was trained for the unfinished dataset, or None. Raise UserError if it was changed."""
    if "tokenizer" not in progress:
        return None
    found = progress["tokenizer"]
    if (folder / TOKENIZER_FILE).is_file():
        encoding = tokenizer.load(name, folder, found["eot_id"])
        if tokenizer.ranks_hash(encoding) == found["ranks_sha256"]:
            return encoding
    if progress["passes"]:
        raise UserError(f"{folder / TOKENIZER_FILE} was changed or removed since the last call: move {folder} away")
    return None


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding, progress: dict) -> None:
    """Write the tokenizer.json of a tokenizer without a known name, which workers read. Remove that of another one."""
    with _write_errors(folder):
        if not isinstance(encoding, FileTokenizer):
            (folder / TOKENIZER_FILE).unlink(missing_ok=True)
            return
        progress["tokenizer"] = {"ranks_sha256": tokenizer.ranks_hash(encoding), "eot_id": encoding.eot_token}
        atomic_write(folder / PROGRESS, json.dumps(progress).encode())  # first: it says that the other file is ours
        atomic_write(folder / TOKENIZER_FILE, tokenizer_json(encoding))


def move_aside(folder: Path, lock: FolderLock, corpus: Corpus, log: Callable[[str], None]) -> None:
    """Rename the locked folder for --overwrite. Raise UserError if it contains files of the corpus."""
    for file in itertools.chain(*corpus.files.values()):
        if file.path and file.path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"overwrite: {folder} contains {file.path}, which is read; choose another --name")
    with _write_errors(folder):
        log(f"the existing {folder} was moved to {lock.move_aside()}")


@contextmanager
def _locked(folder: Path) -> Iterator[FolderLock]:
    """Create the folder and lock it against other calls. Remove it if it is empty afterwards."""
    try:
        with FolderLock(folder, "--data_dir") as lock:
            with _write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                for left in folder.glob(".*.json.*.tmp"):  # by a call that was killed
                    left.unlink()
            yield lock
    finally:
        with suppress(OSError):
            folder.rmdir()


def read_progress(folder: Path, settings: dict, corpus: Corpus, tasks: int) -> dict:
    """Return the state in the folder's progress.json, or an initial state.

    Args:
        tasks: the plan's version.

    Raises:
        UserError: settings, raw files or `tasks` differ from those of the unfinished dataset, or there are shards of
            other programs, or of a dataset without meta.json.
    """
    files = json.dumps([[file.name, file.size] for group in corpus.files.values() for file in group])
    raw, command = hashlib.sha256(files.encode()).hexdigest(), shlex.join(["python", *sys.argv])
    initial = {"tasks": tasks, "command": command, "settings": settings, "raw": raw, "passes": {}, "splits": {}}
    if not (folder / PROGRESS).exists():
        if others := sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob(TOKENIZER_FILE))):
            shards = f"{folder} contains other shards ({', '.join(others[:3])}), without meta.json and {PROGRESS}"
            raise UserError(f"{shards}: choose another --name, or move it aside with --overwrite")
        return initial
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        compared = [{**p["settings"], "raw files": p["raw"], "tasks": p["tasks"]} for p in (found, initial)]
        passes, splits = found["passes"].values(), found["splits"].values()
        counts = [state[key] for state in passes for key in NOTHING_DONE]
        counts += [split[key] for split in splits for key in ("waiting", "documents", "bytes")]
        if not all(map(is_count, counts)) or bool(passes) != bool(splits):
            raise ValueError("not the progress of a dataset")
        if sum(map(count_tokens, splits)):
            check_settings(folder, "an unfinished dataset", *compared)
        elif compared[0] != compared[1]:
            return initial  # no shard is finished: little is lost
    except DAMAGED:
        raise UserError(f"{folder / PROGRESS} is damaged: start again with --overwrite") from None
    return {**found, "command": command}


def remove_unfinished(folder: Path) -> None:
    """Remove the files of an unfinished dataset, first those that are of none without progress.json."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == PROGRESS):
        if OUR_FILES.fullmatch(path.name) or path.name.startswith(PROGRESS):
            path.unlink()


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Convert errors of writing to the folder to a UserError."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or folder} could not be written: {error.strerror}"
        resumable = f"{RESUMABLE}, or " * folder.is_dir()
        raise UserError(f"{problem}; {resumable}choose another folder: --data_dir") from None
