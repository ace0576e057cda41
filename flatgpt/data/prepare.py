"""A source -> a dataset folder: its tasks done in order, on many processes; safe to stop at any moment."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from config import PrepareConfig, UserError
from flatgpt.data import encode, tokenizer, workers
from flatgpt.data.dataset import PROGRESS, Dataset, open_dataset
from flatgpt.data.encode import CHUNK_BYTES
from flatgpt.data.progress import KEPT, check_settings, done_bytes, locked, read_progress, remove_unfinished, writing
from flatgpt.data.shards import SPLITS, ShardWriter, read_meta, write_meta
from flatgpt.data.sources import DUMP, SOURCES
from flatgpt.data.split import Pass, Plan, make_plan
from flatgpt.runtime.files import atomic_write

SAVE_SECONDS = 10  # between two notes of how far it came
LINE_SECONDS = 60  # between two lines of progress where there is no terminal


def dataset_folder(config: PrepareConfig) -> Path:
    """data_dir/name; name is the source's (dump's, repository's), and the tokenizer's where that is not its own."""
    name = config.repo.split("/")[-1] if config.source == "hub" else config.source
    if config.dump not in (None, DUMP):
        name += f"_{config.dump}"
    if config.tokenizer not in (None, SOURCES[config.source].tokenizer):
        name += f"_{config.tokenizer}"
    return Path(config.data_dir) / (config.name or name)


def prepare(config: PrepareConfig, log: Callable[[str], None] = print) -> Dataset:
    """Make the dataset that the config describes, go on with it, or open it if it is there already.

    Args:
        log: takes lines of progress.

    Raises:
        UserError: bad input, too little of it, no room, or the folder holds something else.
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
    corpus = corpus or source.open(config)
    if corpus.notice:
        log(corpus.notice)
    with locked(folder):
        if read_meta(folder) is not None:  # another call has finished it meanwhile
            return prepare(config, log)
        progress = read_progress(folder, config, settings, corpus)
        if progress["passes"]:
            log(f"{folder}: going on where the work was stopped")
        plan = make_plan(config, corpus, settings["val_fraction"] or 0, folder, done_bytes(progress))
        run = Run(config, folder, encoding.n_vocab, plan, progress)
        entries = run()
        for split, entry in entries.items():
            if entry["tokens"] < 2:
                remove_unfinished(folder)
                raise UserError(
                    f"too little text: the {split} split of {folder.name} would have {entry['tokens']} tokens, and it "
                    "takes 2 to score one; give more text" + f", or a larger --{split}_fraction" * (split != "train")
                )
        if cuts := run.progress["cuts"]:
            log(
                f"note: cut in {cuts:,} place{'s' * (cuts > 1)}, in runs of more than {tokenizer.MAX_ENCODE_CHARS:,} "
                "characters without a break, which would not fit memory; ids next to a cut may differ"
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
        with writing(folder):
            write_meta(folder, meta)
            (folder / PROGRESS).unlink()
    return open_dataset(folder)


# ---------------------------------------------------------------------------------------------------------------------
# the work


class Run:
    """Does a plan's tasks in order, on many processes, and writes what they give.

    Args:
        progress: as read_progress gives it; kept up to date.
    """

    def __init__(self, config: PrepareConfig, folder: Path, n_vocab: int, plan: Plan, progress: dict):
        self.config, self.folder, self.plan, self.progress = config, folder, plan, progress
        self.begun = self.saved = self.told = time.monotonic()
        if not progress["passes"]:
            remove_unfinished(folder)
        self.writers = {
            split: ShardWriter(folder, split, n_vocab, config.shard_tokens, progress["splits"].get(split))
            for split in plan.splits
        }
        self.tokens_before = sum(writer.tokens for writer in self.writers.values())
        self.bar = None

    def __call__(self) -> dict[str, dict]:
        """Do it all; the manifest's entry of each split.

        Raises:
            UserError: bad input, a full disk, a worker that died. What was done is noted.
        """
        from tqdm import tqdm

        done = done_bytes(self.progress)
        self.bar = tqdm(
            total=max(done, self.plan.size),
            initial=done,
            desc=self.folder.name,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        try:
            self._save()  # from now on the folder says what it is
            with self.bar, self._workers() as pool:
                for each in self.plan.passes:
                    self._do(each, pool)
            with writing(self.folder):
                return {split: writer.close() for split, writer in self.writers.items()}
        except BaseException as why:
            with suppress(UserError):
                self._save()
            if isinstance(why, KeyboardInterrupt):
                print(f"{self.folder}: stopped; {KEPT}", file=sys.stderr)
            elif workers.died(why):
                raise UserError(f"a worker was killed, perhaps for memory (fewer: --workers N); {KEPT}") from None
            elif self.config.cluster and isinstance(why, OSError):
                raise UserError(f"the cluster at {self.config.cluster} was lost ({why}); {KEPT}") from None
            raise

    def _workers(self):
        if self.config.cluster:
            return workers.dask_cluster(self.config.cluster)
        if self.plan.size < 2 * CHUNK_BYTES:  # done before a process has started
            return workers.here()
        return workers.local_pool(self.config.workers or workers.cores())

    def _do(self, each: Pass, pool: workers.WorkerPool) -> None:
        """One pass, from where it is: tasks go out ahead, and what they give is written in their order."""
        state = self.progress["passes"].setdefault(each.name, {"tasks": 0, "documents": 0, "size": 0, "done": False})
        if state["done"]:
            return
        todo = itertools.islice(each.tasks(), state["tasks"], None)
        window, in_window = deque(), 0
        while True:
            left = sys.maxsize if each.limit is None else each.limit - state["documents"]
            while len(window) < pool.max_in_flight and in_window < left and (task := next(todo, None)):
                window.append((task, pool.executor.submit(encode.encode, each.job, task)))
                in_window += task.documents
            if not window or left <= 0:
                break
            task, future = window.popleft()
            in_window -= task.documents
            found, documents, cuts = pool.result(future)
            # only now is it known how many of them are empty; behind the last may be the beginning of a long one
            if documents > left or (documents == left and task.spans and not task.spans[-1].last):
                found, documents, cuts = encode.encode(each.job, task, left)
            with writing(self.folder):
                for split, part in found.items():
                    self.writers[split].add(part.ids, part.documents, part.bytes, part.words)
            state = {
                "tasks": state["tasks"] + 1,
                "documents": state["documents"] + documents,
                "size": state["size"] + task.size,
                "done": False,
            }
            self._advance(each.name, state, cuts, task.size)
        for _, future in window:
            future.cancel()
        self._advance(each.name, {**state, "done": True}, 0, 0)

    def _advance(self, name: str, state: dict, cuts: int, size: int) -> None:
        """Note a whole task. In memory; now and then on the disk."""
        shards = sum(len(p["files"]) for p in self.progress["splits"].values())
        self.progress = {
            **self.progress,
            "passes": {**self.progress["passes"], name: state},
            "splits": {split: writer.position() for split, writer in self.writers.items()},
            "cuts": self.progress["cuts"] + cuts,
        }
        now, tokens = time.monotonic(), sum(writer.tokens for writer in self.writers.values())
        self.bar.update(size)
        self.bar.set_postfix_str(f"{tokens:,} tokens, {self._speed(tokens)}", refresh=False)
        if self.bar.disable and now - self.told > LINE_SECONDS:
            self.told = now
            part = done_bytes(self.progress) / max(1, self.plan.size)
            print(f"{self.folder}: {part:.0%}, {tokens:,} tokens, {self._speed(tokens)}", file=sys.stderr, flush=True)
        if now - self.saved > SAVE_SECONDS or shards < sum(len(w.files) for w in self.writers.values()):
            self._save()

    def _speed(self, tokens: int) -> str:
        return f"{(tokens - self.tokens_before) / (time.monotonic() - self.begun) / 1e6:.2f}M tokens/s"

    def _save(self) -> None:
        with writing(self.folder):
            for writer in self.writers.values():
                writer.flush()
            atomic_write(self.folder / PROGRESS, json.dumps(self.progress).encode())
        self.saved = time.monotonic()
