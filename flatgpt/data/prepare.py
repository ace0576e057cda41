"""Make a dataset folder from a source: tasks are encoded by many processes and written in order; resumable."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from config import PrepareConfig, UserError
from flatgpt.data import tokenizer, workers
from flatgpt.data.dataset import PROGRESS, Dataset, open_dataset
from flatgpt.data.encode import encode_task, load_encoder
from flatgpt.data.progress import (
    RESUMABLE,
    check_settings,
    done_bytes,
    locked,
    read_progress,
    remove_unfinished,
    write_errors,
)
from flatgpt.data.shards import SPLITS, ShardWriter, read_meta, write_meta
from flatgpt.data.sources import DUMP, SOURCES
from flatgpt.data.split import Pass, make_passes
from flatgpt.runtime.files import atomic_write

MIN_POOL_BYTES = 8 << 20  # of text; less is done before a process has started
SAVE_SECONDS = 10  # between two saves of progress.json
LINE_SECONDS = 60  # between two lines of progress where there is no terminal


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
    corpus, revision = None, source.revision(config)
    if revision is None:
        corpus = source.open(config)
        revision = corpus.revision
    settings = {
        "source": config.source,
        "repo": config.repo,
        "dump": None if config.dump == DUMP else config.dump,
        "files": list(config.files) or None,
        "column": None if config.column == "text" else config.column,
        "revision": revision,
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
    with locked(folder):
        if read_meta(folder) is not None:  # another call has finished it meanwhile
            return prepare(config, log)
        progress = read_progress(folder, config, settings, corpus)
        if progress["passes"]:
            log(f"{folder}: going on where the work was stopped")
        passes = make_passes(config, corpus, settings["val_fraction"] or 0, folder, done_bytes(progress))
        work = Preparation(config, folder, encoding.n_vocab, passes, progress)
        entries = work.run()
        for split, entry in entries.items():
            if entry["tokens"] < 2:
                remove_unfinished(folder)
                raise UserError(
                    f"too little text: the {split} split of {folder.name} would have {entry['tokens']} tokens, and it "
                    "takes 2 to score one; give more text" + f", or a larger --{split}_fraction" * (split != "train")
                )
        if forced := work.progress["cuts"]:
            log(
                f"note: cut in {forced:,} place{'s' * (forced > 1)}, in runs of more than "
                f"{tokenizer.MAX_ENCODE_CHARS:,} characters without a break, which would not fit memory; ids next to a "
                "cut may differ"
            )
        meta = {
            **{key: value for key, value in settings.items() if value is not None},
            "vocab_size": encoding.n_vocab,
            "ranks_sha256": tokenizer.ranks_hash(encoding),
            "eot_id": encoding.eot_token,
            "end_of_text": source.end_of_text,
            "dtype": "uint16",
            "splits": entries,
        }
        with write_errors(folder):
            write_meta(folder, meta)
            (folder / PROGRESS).unlink()
    return open_dataset(folder)


class Preparation:
    """Encodes the tasks of all passes and appends what they give to the shards, in order.

    Args:
        progress: as read_progress returns it; kept up to date.
    """

    def __init__(self, config: PrepareConfig, folder: Path, n_vocab: int, passes: list[Pass], progress: dict):
        self.config, self.folder, self.passes, self.progress = config, folder, passes, progress
        self.size = max(done_bytes(progress), sum(each.size for each in passes))
        self.started = self.saved = self.last_logged = time.monotonic()
        if not progress["passes"]:
            remove_unfinished(folder)
        outputs = [split for split in SPLITS for each in passes if split in each.job.outputs]
        self.writers = {
            split: ShardWriter(folder, split, n_vocab, config.shard_tokens, progress["splits"].get(split))
            for split in outputs
        }
        self.tokens_before = sum(writer.tokens for writer in self.writers.values())

    def run(self) -> dict[str, dict]:
        """Do all the work; return the manifest's entry of each split.

        Raises:
            UserError: bad input, a full disk, a worker that was killed. The work that is done is kept.
        """
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.size,
            initial=done_bytes(self.progress),
            desc=self.folder.name,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        try:
            self._save()  # from now on the folder names the command that continues it
            with self.bar, self._workers() as run_tasks:
                for each in self.passes:
                    self._run_pass(each, run_tasks)
            with write_errors(self.folder):
                return {split: writer.close() for split, writer in self.writers.items()}
        except BaseException as error:
            with suppress(UserError):
                self._save()
            if isinstance(error, KeyboardInterrupt):
                print(f"{self.folder}: stopped; {RESUMABLE}", file=sys.stderr)
            elif workers.is_killed_worker(error):
                raise UserError(f"a worker was killed, perhaps for memory (fewer: --workers N); {RESUMABLE}") from None
            elif self.config.cluster and isinstance(error, OSError):
                raise UserError(f"the cluster at {self.config.cluster} was lost ({error}); {RESUMABLE}") from None
            raise

    def _workers(self):
        if self.config.cluster:
            return workers.dask_cluster(self.config.cluster)
        if self.size < MIN_POOL_BYTES:
            return workers.this_process()
        return workers.local_pool(self.config.workers or workers.available_cores())

    def _run_pass(self, each: Pass, run_tasks: Callable) -> None:
        """Do the tasks of a pass that are not done yet."""
        state = self.progress["passes"].setdefault(each.name, {"tasks": 0, "size": 0, "done": False})
        if state["done"]:
            return
        todo = itertools.islice(each.tasks(), state["tasks"], None)
        for task, encoded in run_tasks(functools.partial(encode_task, each.job), todo):
            with write_errors(self.folder):
                for split, part in encoded.items():
                    self.writers[split].add(part.ids, part.documents, part.bytes)
            state = {**state, "tasks": state["tasks"] + 1, "size": state["size"] + task.size}
            self._advance(each.name, state, sum(part.forced_splits for part in encoded.values()), task.size)
        self._advance(each.name, {**state, "done": True}, 0, 0)

    def _advance(self, name: str, state: dict, forced_splits: int, size: int) -> None:
        """Record a finished task in memory, and now and then on the disk."""
        shards = sum(len(position["files"]) for position in self.progress["splits"].values())
        self.progress = {
            **self.progress,
            "passes": {**self.progress["passes"], name: state},
            "splits": {split: writer.position() for split, writer in self.writers.items()},
            "cuts": self.progress["cuts"] + forced_splits,
        }
        now, tokens = time.monotonic(), sum(writer.tokens for writer in self.writers.values())
        speed = f"{tokens:,} tokens, {(tokens - self.tokens_before) / (now - self.started) / 1e6:.2f}M tokens/s"
        self.bar.update(size)
        self.bar.set_postfix_str(speed, refresh=False)
        if self.bar.disable and now - self.last_logged > LINE_SECONDS:
            self.last_logged = now
            done = done_bytes(self.progress) / max(1, self.size)
            print(f"{self.folder}: {done:.0%}, {speed}", file=sys.stderr, flush=True)
        if now - self.saved > SAVE_SECONDS or shards < sum(len(writer.files) for writer in self.writers.values()):
            self._save()

    def _save(self) -> None:
        with write_errors(self.folder):
            for writer in self.writers.values():
                writer.flush()
            atomic_write(self.folder / PROGRESS, json.dumps(self.progress).encode())
        self.saved = time.monotonic()
