"""Make a dataset folder from a source: tasks are encoded by many processes and written in order; resumable.

progress.json names the task after which the shards were last known to be good: the next call truncates them to that and
continues. It is removed when meta.json, the manifest of a finished dataset, is written.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from config import PrepareConfig, UserError
from flatgpt.data import tokenizer, workers
from flatgpt.data.dataset import PROGRESS, Dataset, open_dataset
from flatgpt.data.encode import load_encoder
from flatgpt.data.readers import Corpus, Task
from flatgpt.data.shards import OUR_FILES, SPLITS, ShardWriter, read_meta, write_meta
from flatgpt.data.sources import DUMP, SOURCES, Plan, encode_task, make_plan
from flatgpt.runtime.files import atomic_write

MIN_POOL_BYTES = 8 << 20  # of text; less is done before a process has started
SAVE_SECONDS = 10  # between two saves of progress.json
NOTHING_DONE = {"tasks": 0, "size": 0}  # of one of the source's splits
RESUMABLE = "what is done is kept, and the same command goes on from there"


def dataset_folder(config: PrepareConfig) -> Path:
    """Return data_dir/name; the default name is that of the source, dump or repository, and of a tokenizer given."""
    name = config.repo.split("/")[-1] if config.source == "hub" else config.source
    if config.dump not in (None, DUMP):
        name += f"_{config.dump}"
    if config.tokenizer not in (None, SOURCES[config.source].tokenizer):
        name += f"_{config.tokenizer}"
    return Path(config.data_dir) / (config.name or name)


def prepare(config: PrepareConfig, log: Callable[[str], None] = print) -> Dataset:
    """Make the dataset that the config describes, continue it, or open it if it is finished.

    Args:
        log: called with lines of progress.

    Raises:
        UserError: bad input, too little text, no space on the disk, or the folder holds something else.
    """
    source, folder = SOURCES[config.source], dataset_folder(config)
    name = config.tokenizer or source.tokenizer
    tokenizer.check_name(name)
    revision = source.revision(config)
    corpus = None if revision else source.open(config)
    settings = {
        "source": config.source,
        "repo": config.repo,
        "dump": None if config.dump == DUMP else config.dump,
        "files": list(config.files) or None,
        "column": None if config.column == "text" else config.column,
        "revision": revision or corpus.revision,
        "tokenizer": name,
        "encoder": config.encoder,
        "shard_tokens": config.shard_tokens,
        "val_fraction": source.val_fraction if config.val_fraction is None else config.val_fraction,
        "test_fraction": config.test_fraction or None,
        "sample_size": config.sample_size,
        "only_splits": [split for split in SPLITS if split in config.splits] or None,
    }
    if (meta := read_meta(folder)) is not None:
        check_settings(folder, "a dataset", meta, settings)
        (folder / PROGRESS).unlink(missing_ok=True)  # of a call that was killed at the very end
        log(f"{folder} is there already, with these settings; nothing to do")
        return open_dataset(folder)
    encoding = tokenizer.load(name)
    load_encoder(encoding, config.encoder)  # its errors come before downloads
    corpus = corpus or source.open(config)
    if corpus.notice:
        log(corpus.notice)
    plan = make_plan(config, corpus)
    with _locked(folder):
        if read_meta(folder) is not None:  # another call has finished it meanwhile
            return prepare(config, log)
        progress = read_progress(folder, settings, corpus, 2 if config.sample_size else 1)
        if progress["passes"]:
            log(f"{folder}: going on where the work was stopped")
        else:
            remove_unfinished(folder)
        entries = write_shards(config, folder, plan, encoding.n_vocab, progress)
        for split, entry in entries.items():
            if entry["tokens"] < 2:
                remove_unfinished(folder)
                with suppress(OSError):  # it held something else
                    folder.rmdir()
                why = f"the {split} split of {folder.name} would have {entry['tokens']} tokens, and scoring needs 2"
                raise UserError(f"too little text: {why}; give more, or another --val_fraction, --test_fraction")
        meta = {key: value for key, value in settings.items() if value is not None}
        meta |= {"vocab_size": encoding.n_vocab, "ranks_sha256": tokenizer.ranks_hash(encoding)}
        meta |= {"eot_id": encoding.eot_token, "end_of_text": source.end_of_text, "dtype": "uint16", "splits": entries}
        with _write_errors(folder):
            write_meta(folder, meta)
            (folder / PROGRESS).unlink()
    return open_dataset(folder)


def write_shards(config: PrepareConfig, folder: Path, plan: Plan, n_vocab: int, progress: dict) -> dict[str, dict]:
    """Encode the tasks that are not done yet and append the results to the shards, in order.

    Args:
        progress: as read_progress returns it; kept up to date.

    Returns:
        The manifest's entry of each split.

    Raises:
        UserError: bad input, a full disk, a worker that was killed. The work that is done is kept.
    """
    from tqdm import tqdm

    if config.cluster:
        pool = workers.dask_cluster(config.cluster)
    elif plan.size < MIN_POOL_BYTES:
        pool = nullcontext(workers.in_this_process)
    else:
        pool = workers.local_pool(config.workers or workers.available_cores())
    writers = {
        split: ShardWriter(folder, split, n_vocab, config.shard_tokens, progress["splits"].get(split))
        for split in plan.splits
    }
    total, done = None if config.sample_size else plan.size, sum(each["size"] for each in progress["passes"].values())
    seconds = 0.1 if sys.stderr.isatty() else 60  # between two updates of the bar
    bar = tqdm(None, folder.name, total, unit="B", unit_scale=True, initial=done, delay=seconds, mininterval=seconds)

    def tasks() -> Iterator[Task]:
        for split, of_split in plan.tasks.items():
            done = progress["passes"].get(split, NOTHING_DONE)["tasks"]
            for task in itertools.islice(of_split, done, None):
                yield task._replace(split=split)

    def save() -> float:
        with _write_errors(folder):
            for writer in writers.values():
                writer.flush()
            atomic_write(folder / PROGRESS, json.dumps(progress).encode())
        return time.monotonic()

    try:
        saved = save()  # from now on the folder names the command that continues it
        with bar, pool as run:
            for task, encoded in run(functools.partial(encode_task, config, plan.splits, plan.held_out), tasks()):
                with _write_errors(folder):
                    for split, part in encoded.items():
                        writers[split].add(*part)
                state = progress["passes"].get(task.split, NOTHING_DONE)
                state = {"tasks": state["tasks"] + 1, "size": state["size"] + task.size}
                progress.update(  # in one step, which no signal interrupts
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
        elif isinstance(error, workers.WorkersLostError):
            raise UserError(f"{error}; {RESUMABLE}") from None
        raise


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def check_settings(folder: Path, what: str, found: dict, settings: dict) -> None:
    """Raise UserError, naming them, where settings differ from those of the dataset in the folder."""
    found = {"encoder": "tiktoken", **found}  # earlier versions knew no other
    if differing := [f"{key} {found.get(key)} (now {v})" for key, v in settings.items() if found.get(key) != v]:
        what = f"{folder} already holds {what} of other settings: {'; '.join(differing)}"
        raise UserError(f"{what}. Give this one a name of its own with --name, or move {folder} away")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder and lock it against a second call. The system releases the lock, also after kill -9."""
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another prepare_data.py is at work in this folder; wait for it") from None
        except OSError as error:  # a file system without locks
            print(f"warning: {folder} cannot be locked ({error.strerror})", file=sys.stderr)
        yield
    finally:
        os.close(handle)


def read_progress(folder: Path, settings: dict, corpus: Corpus, tasks: int) -> dict:
    """Return the state of the work in this folder, or the state of a new one.

    Args:
        tasks: version of how files are cut into tasks: work is continued only where the tasks are the same.

    Raises:
        UserError: other settings or other raw files.
    """
    files = json.dumps([[file.name, file.size] for group in corpus.files.values() for file in group])
    raw, command = hashlib.sha256(files.encode()).hexdigest(), shlex.join(["python", *sys.argv])
    fresh = {"tasks": tasks, "command": command, "settings": settings, "raw": raw, "passes": {}, "splits": {}}
    if not (folder / PROGRESS).exists():
        return fresh
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        facts = [{**each["settings"], "raw files": each["raw"], "tasks": each["tasks"]} for each in (found, fresh)]
        if any(split["files"] for split in found["splits"].values()):
            check_settings(folder, "an unfinished dataset", *facts)
        elif facts[0] != facts[1]:
            return fresh  # no shard is finished: nothing is lost
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / PROGRESS} is damaged: move {folder} away and run again") from None
    return {**found, "command": command}


def remove_unfinished(folder: Path) -> None:
    """Remove the files of an unfinished dataset."""
    for path in folder.iterdir():
        if OUR_FILES.fullmatch(path.name) or path.name.startswith(PROGRESS):
            path.unlink()


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn errors of writing there into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder} could not be written: {error.strerror}; {RESUMABLE}") from None
