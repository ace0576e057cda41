"""The shard format, written and read, and batches as a pure function of the update.

A dataset is a folder: `<split>_000000.bin`, ... hold little-endian uint16 token ids and nothing else; `meta.json`,
written last, says what they are. A folder without it is not finished. Numpy only: a data worker never loads torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tokenizer
from config import UserError

FORMAT = 1
SPLITS = ("train", "val", "test")
IGNORE = -1  # target of a place that is not scored


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary name, flushed to disk, renamed."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class ShardWriter:
    """Writes one split's documents into shard files of `shard_tokens` ids (the last one shorter).

    Args:
        folder: the dataset's folder; it exists.
        split: `train`, `val` or `test`.
        n_vocab: ids have to be below it.
        shard_tokens: ids per file.
    """

    def __init__(self, folder: Path, split: str, n_vocab: int, shard_tokens: int):
        self.folder, self.split, self.n_vocab, self.shard_tokens = folder, split, n_vocab, shard_tokens
        self.files: list[dict] = []
        self.documents = self.bytes = self.words = 0
        self._waiting: list[np.ndarray] = []
        self._count = 0

    def add(self, ids: list[int] | np.ndarray, text: str) -> None:
        """Append one document: its ids (end-of-text included, if any), and its text, for the counts."""
        ids = np.asarray(ids, dtype=np.int64)
        # astype(uint16) would wrap 70000 to 4464 without a word
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < self.n_vocab), (ids.min(), ids.max(), self.n_vocab)
        self.documents += 1
        self.bytes += len(text.encode())
        self.words += len(text.split())
        self._waiting.append(ids.astype("<u2"))
        self._count += ids.size
        while self._count >= self.shard_tokens:
            self._flush(self.shard_tokens)

    def _flush(self, count: int) -> None:
        waiting = np.concatenate(self._waiting) if self._waiting else np.zeros(0, "<u2")
        content = waiting[:count].tobytes()
        path = self.folder / f"{self.split}_{len(self.files):06d}.bin"
        write_whole(path, content)
        self.files.append({"name": path.name, "tokens": count, "sha256": hashlib.sha256(content).hexdigest()})
        self._waiting, self._count = [waiting[count:]], self._count - count

    def close(self) -> dict:
        """Write what is left; the split's entry in meta.json."""
        if self._count:
            self._flush(self._count)
        return {
            "tokens": sum(f["tokens"] for f in self.files),
            "documents": self.documents,
            "bytes": self.bytes,
            "words": self.words,
            "files": self.files,
        }


def write_meta(folder: Path, meta: dict) -> None:
    """Write meta.json, which makes the folder a finished dataset."""
    write_whole(folder / "meta.json", json.dumps({"format": FORMAT, **meta}, indent=1).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_meta(folder: Path) -> dict | None:
    """The manifest of a finished dataset, None where there is none.

    Raises:
        UserError: a manifest that is no JSON or of another format.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT:
            taken_for_granted = ("tokenizer", "vocab_size", "ranks_sha256", "eot_id", "end_of_text")
            _ = [meta[key] for key in taken_for_granted], meta["splits"].keys()
            return meta
        raise UserError(f"{path}: format {meta['format']} is not known to this version (it writes {FORMAT})")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: move {folder} away and run prepare_data.py again") from None


class Tokens:
    """The ids of one split: its shard files as one sequence, memory-mapped.

    Args:
        files: (path, ids that the file has to hold; None: whatever it holds) in order.

    Raises:
        UserError: a missing file, a wrong size, no ids at all, or a pickle instead of ids.
    """

    def __init__(self, files: list[tuple[Path, int | None]]):
        self.files = [path for path, _ in files]
        self.maps = [_map(path, count) for path, count in files]
        self.starts = np.cumsum([0, *(len(m) for m in self.maps)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        """Ids [start, stop), across files where need be: (stop - start,) uint16."""
        start, stop, _ = span.indices(len(self))
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin = int(self.starts[first])
            part = self.maps[first][start - begin : stop - begin]
            parts.append(part)
            start += len(part)
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, "<u2"), *parts])

    def check_ids(self, n_vocab: int) -> None:
        """Raise UserError, naming file and offset, if an id is not below n_vocab. Reads everything, in pieces."""
        for path, ids in zip(self.files, self.maps, strict=True):
            for start in range(0, len(ids), 1 << 22):
                bad = np.flatnonzero(ids[start : start + (1 << 22)] >= n_vocab)
                if bad.size:
                    at = start + int(bad[0])
                    raise UserError(
                        f"{path}: id {ids[at]} at byte {2 * at:,} is not in the vocabulary of {n_vocab:,} ids; "
                        "these are the shards of another tokenizer, or not shards of uint16 ids"
                    )


def _map(path: Path, count: int | None) -> np.ndarray:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(11)
            file.seek(max(0, size - 1))
            last = file.read(1)
    except OSError as why:
        raise UserError(f"{path}: cannot be read: {why.strerror}") from None
    if _is_pickle(head, last, size):
        raise UserError(
            f"{path} is a Python pickle (as smol-GPT writes them), not uint16 ids, and unpickling can run anybody's "
            "code; make shards from the text: python prepare_data.py text --input FILE.txt --name NAME"
        )
    if count is not None and size != 2 * count:
        raise UserError(
            f"{path} has {size:,} bytes, meta.json says {2 * count:,}: truncated or changed; "
            f"move {path.parent} away and run prepare_data.py again"
        )
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size:,} bytes: shards of uint16 ids have a positive even number")
    return np.memmap(path, dtype="<u2", mode="r")


def _is_pickle(head: bytes, last: bytes, size: int) -> bool:
    """Whether a file's first 11 bytes and its last are those of a pickle of protocol 2 to 5; executes nothing."""
    if len(head) < 11 or head[0] != 0x80 or head[1] not in range(2, 6) or last != b".":  # . is STOP
        return False
    if head[1] >= 4:  # protocols 4 and 5 open with a frame and its length
        return head[2] == 0x95 and int.from_bytes(head[3:], "little") <= size - 11
    return chr(head[2]) in pickletools.code2op


@dataclass(frozen=True)
class Dataset:
    """A finished dataset folder: its manifest, and Tokens for each split on request."""

    folder: Path
    meta: dict

    @property
    def manifest_hash(self) -> str:
        """SHA-256 of meta.json, which holds the hash of every shard: names the data of a run."""
        return hashlib.sha256((self.folder / "meta.json").read_bytes()).hexdigest()

    def tokens(self, split: str) -> Tokens:
        """The ids of one split; UserError where the dataset has no such split or its files are not as written."""
        entry = self.meta["splits"].get(split)
        if entry is None:
            raise UserError(f"{self.folder} has no split {split}; it has {', '.join(self.meta['splits'])}")
        return Tokens([(self.folder / f["name"], f["tokens"]) for f in entry["files"]])


def open_dataset(folder: Path) -> Dataset:
    """The dataset in a folder.

    Raises:
        UserError: not there, not finished, or of a tokenizer that this version does not know.
    """
    meta = read_meta(folder)
    if meta is None:
        source, _, name = folder.name.partition("_")
        known = source in ("pydoc", "shakespeare")
        command = f"{source} --tokenizer {name}" if name else source
        if source == "text":
            command += " --input FILES"
        elif not known:
            command = f"text --input FILES --name {folder.name}"
        if folder.parent != Path("data"):
            command += f" --data_dir {shlex.quote(str(folder.parent))}"
        state = "is not finished" if folder.is_dir() and any(folder.glob("*.bin*")) else "is not there"
        raise UserError(f"dataset {folder} {state}: run python prepare_data.py {command}")
    tokenizer.check_name(meta["tokenizer"])
    return Dataset(folder, meta)


# ---------------------------------------------------------------------------------------------------------------------
# windows and their order


class Windows:
    """Training windows of a split: window w holds ids [wS, wS + T], T inputs and T targets, S the stride.

    The incomplete window at the end is left out, so that every batch has one shape.
    """

    def __init__(self, tokens: Tokens, context_length: int, stride: int | None = None):
        self.tokens, self.T, self.stride = tokens, context_length, stride or context_length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1 - self.T) // self.stride + 1)

    def batch(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of these windows: two (B, T) int64 arrays, targets one token later."""
        starts = [int(w) * self.stride for w in windows]
        rows = np.stack([self.tokens[s : s + self.T + 1] for s in starts]).astype(np.int64)  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]


def eval_batches(
    tokens: Tokens, context_length: int, batch_size: int, limit: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Non-overlapping windows in order, the incomplete last one too: every token but the first is a target once.

    Args:
        limit: stop after so many batches; 0: go through all of the split.

    Yields:
        inputs and targets, (B, T) int64 each; targets past the end of the split are IGNORE.
    """
    T, last = context_length, len(tokens) - 1
    starts = range(0, last, T)
    for n, first in enumerate(range(0, len(starts), batch_size)):
        if limit and n == limit:
            return
        rows = starts[first : first + batch_size]
        x = np.zeros((len(rows), T), dtype=np.int64)
        y = np.full((len(rows), T), IGNORE, dtype=np.int64)
        for row, start in enumerate(rows):
            ids = tokens[start : min(start + T, last) + 1].astype(np.int64)
            x[row, : len(ids) - 1], y[row, : len(ids) - 1] = ids[:-1], ids[1:]
        yield x, y


class Shuffle:
    """A bijection on 0 .. n-1 keyed by (seed, epoch), in O(1) memory: the order of an epoch's windows.

    A balanced Feistel network over the next power of four, walked until the result is below n (cycle walking:
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    ROUNDS = 8

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits of each of the two halves
        digest = hashlib.blake2b(f"flatgpt order {seed} {epoch}".encode(), digest_size=8 * self.ROUNDS).digest()
        self.keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Window indices at these places of the epoch: (k,) uint64 in, (k,) uint64 out."""
        out = self._permute(np.asarray(places, dtype=np.uint64))
        while (outside := out >= self.n).any():  # the domain is below 4 n, so a few rounds bring all inside
            out[outside] = self._permute(out[outside])
        return out

    def _permute(self, values: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = values >> half, values & mask
        for key in self.keys:
            mixed = right + key  # splitmix64's finaliser (Steele, Lea, Flood 2014), in wrapping uint64 arithmetic
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << half) | right


class TrainingBatches:
    """Micro-batches of a run as a pure function of the update: nothing is stored to resume, every rank count agrees.

    Sequence j of update i is global position p = i * batch_size * grad_accum_steps + j; p // W is its epoch, p mod W
    its place in that epoch's order. A batch may span two epochs.
    """

    def __init__(self, windows: Windows, batch_size: int, grad_accum_steps: int, seed: int):
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.per_update = batch_size * grad_accum_steps  # sequences

    def indices(self, update: int, micro: int) -> np.ndarray:
        """Window indices of micro-batch `micro` (from 0) of update `update` (from 0): (batch_size,) uint64."""
        first, W = update * self.per_update + micro * self.batch_size, len(self.windows)
        parts, stop = [], first + self.batch_size
        while first < stop:
            epoch, place = divmod(first, W)
            count = min(stop - first, W - place)
            parts.append(Shuffle(W, self.seed, epoch)(np.arange(place, place + count)))
            first += count
        return np.concatenate(parts)

    def __call__(self, update: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of that micro-batch: two (batch_size, T) int64 arrays."""
        return self.windows.batch(self.indices(update, micro))
