"""Write and read shards: files of token ids, and the manifest that describes them.

`<split>_000000.bin`, ... consist of little-endian uint16 token ids. `meta.json`, the manifest, is written last; without
it a dataset is not finished. Shards of llm.c, which have a header of 256 int32 before the ids, can be read too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from config import UserError
from flatgpt.data.tokenizer import to_uint16
from flatgpt.runtime.files import atomic_write, fsync, naming, read_errors

FORMAT = 1
REQUIRED = ("tokenizer", "vocab_size", "ranks_sha256", "eot_id", "end_of_text", "splits")  # keys of meta.json
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of reading damaged JSON, or using it
SPLITS = ("train", "val", "test")
OUR_FILES = re.compile(rf"({'|'.join(SPLITS)})_(\d{{6}})\.bin(\.tmp)?")
# Header of llm.c: magic, version, number of ids; https://github.com/karpathy/llm.c, dev/data/data_common.py
LLMC_MAGIC, LLMC_LLAMA_MAGIC, LLMC_HEADER = 20240520, 20240801, 1024
PICKLE = re.compile(rb"\x80[\x04\x05]\x95(.{8})", re.DOTALL)  # protocols 4 and 5; length of the first frame
HEADER_BYTES = 4096  # read at the start of a file to recognise its format
CHUNK_BYTES = 1 << 23  # read at once when whole files are checked


# ---------------------------------------------------------------------------------------------------------------------
# writing


class ShardWriter:
    """Writes the ids of a split to shard files of `shard_tokens` ids each; the last file may be shorter.

    The name of an incomplete file ends in `.tmp`.

    Args:
        folder: an existing dataset folder.
        split: `train`, `val` or `test`.
        n_vocab: vocabulary size; all ids must be below it.
        shard_tokens: ids per file.
        position: a result of `position()` of an earlier writer. Continue there, and truncate the files to it.

    Raises:
        UserError: a file is missing or shorter than in `position`.
    """

    def __init__(self, folder: Path, split: str, n_vocab: int, shard_tokens: int, position: dict | None = None):
        self.folder, self.split, self.n_vocab, self.shard_tokens = folder, split, n_vocab, shard_tokens
        self.counts, self.files = {"documents": 0, "bytes": 0}, []
        self.waiting, self._file = 0, None  # ids in the unfinished file
        if position:
            self._resume(position)

    def _path(self, suffix: str = ".tmp") -> Path:
        """Return the path of the unfinished file."""
        return self.folder / f"{self.split}_{len(self.files):06d}.bin{suffix}"

    def _resume(self, position: dict) -> None:
        self.counts = {key: position[key] for key in self.counts}
        self.files, self.waiting = list(position["files"]), position["waiting"]
        if self.waiting and self._path("").exists():  # it was completed after position() was called
            os.replace(self._path(""), self._path())
        sizes = {self.folder / file["name"]: 2 * file["tokens"] for file in self.files}
        sizes |= {self._path(): 2 * self.waiting} if self.waiting else {}
        for path, size in sizes.items():
            if not path.exists() or path.stat().st_size < size:
                raise UserError(f"{path} was removed or truncated since the last call: move {self.folder} away")
        for path in self.folder.iterdir():
            match = OUR_FILES.fullmatch(path.name)
            if match and match[1] == self.split and path not in sizes:
                path.unlink()
        if self.waiting:
            self._file = open(self._path(), "r+b")  # noqa: SIM115, _finish closes it
            self._file.truncate(2 * self.waiting)
            self._file.seek(0, os.SEEK_END)

    def add(self, ids: np.ndarray, documents: int = 1, text_bytes: int = 0) -> None:
        """Append ids, and count the documents and bytes of their text."""
        ids = to_uint16(np.asarray(ids), self.n_vocab)
        self.counts["documents"] += documents
        self.counts["bytes"] += text_bytes
        while ids.size:
            part, ids = np.split(ids, [self.shard_tokens - self.waiting])
            with naming(self._path()):
                self._file = self._file or open(self._path(), "wb")  # noqa: SIM115, _finish closes it
                self._file.write(part.data)
            self.waiting += part.size
            if self.waiting == self.shard_tokens:
                self._finish()

    def _finish(self) -> None:
        """Close the file and remove `.tmp` from its name."""
        self.flush()
        file, self._file = self._file, None
        file.close()
        path = self._path("")
        os.replace(self._path(), path)
        self.files.append({"name": path.name, "tokens": self.waiting, "sha256": file_sha256(path)})
        self.waiting = 0

    def flush(self) -> None:
        """Write buffered ids to the disk (fsync)."""
        if self._file:
            with naming(self._path()):
                self._file.flush()
            fsync(self._path())

    def position(self) -> dict:
        """Return the state from which another writer can continue. Call `flush` before saving it."""
        return {"files": list(self.files), "waiting": self.waiting, **self.counts}

    @property
    def tokens(self) -> int:
        """Number of ids written."""
        return sum(file["tokens"] for file in self.files) + self.waiting

    def close(self) -> dict:
        """Finish the last file, and return the split's entry for meta.json."""
        if self._file:
            self._finish()
        return {"tokens": self.tokens, **self.counts, "files": self.files}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_meta(folder: Path, meta: dict) -> None:
    """Write meta.json, which marks the dataset as finished."""
    atomic_write(folder / "meta.json", json.dumps({"format": FORMAT, **meta}, indent=1).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_meta(folder: Path) -> dict | None:
    """Return the manifest of a finished dataset, or None.

    Raises:
        UserError: the manifest is damaged or of another format version.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    with suppress(*DAMAGED):
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
        entries = meta["splits"].values()
        counts = [count_tokens(entry) for entry in entries]
        kinds = [str, int, str, int if meta["eot_id"] is not None else type(None), bool, dict]
        known = meta["format"] == FORMAT and [type(meta[key]) for key in REQUIRED] == kinds
        known &= 0 <= (meta["eot_id"] or 0) < meta["vocab_size"] <= 65536
        if known and any(counts) and counts == [entry["tokens"] for entry in entries]:
            return meta
    problem = f"{path} is damaged, or its format is not {FORMAT}, which this version reads"
    raise UserError(f"{problem}: copy it again, or run prepare_data.py again with --overwrite")


def count_tokens(entry: dict) -> int:
    """Return the number of ids in the files of a split's entry. Raise ValueError if a count or name cannot be one."""
    counts = [file["tokens"] for file in entry["files"] if OUR_FILES.fullmatch(file["name"])]
    others = [entry.get(key, 0) for key in ("tokens", "documents", "bytes")]
    if len(counts) < len(entry["files"]) or not all(map(is_count, (*counts, *others))):
        raise ValueError(f"not the entry of a split: {entry}")
    return sum(counts)


def is_count(value: object) -> bool:
    """Whether this is a number of tokens, documents or bytes."""
    return type(value) is int and 0 <= value <= sys.maxsize


class Tokens:
    """The shards of a split as one sequence of ids, read on demand, indexed like a numpy array. Any thread may read.

    Args:
        files: (path, expected number of ids, or None for any) of each shard, in order.
        n_vocab: vocabulary size; larger ids raise UserError on reading. None: not checked. On a GPU, a larger id would
            fail an assertion in the embedding that names neither file nor id.

    Raises:
        UserError: a file is missing, has a wrong size, or does not consist of uint16 ids.
    """

    def __init__(self, files: list[tuple[Path, int | None]], n_vocab: int | None = None):
        self.n_vocab = n_vocab
        limit = os.sysconf("SC_OPEN_MAX") // 4 if hasattr(os, "sysconf") else 128  # a run can read three splits
        open_file = functools.lru_cache(limit)(_OpenFile)
        self.shards = [_Shard(path, count, open_file) for path, count in files]
        self.starts = np.cumsum([0, *(shard.count for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: int | slice) -> np.ndarray | np.uint16:
        """Return an id, or the ids of a slice: (n,) uint16, read-only if they are all in one file.

        Raises:
            IndexError: the position is not in the sequence.
            UserError: an id is outside the vocabulary, or a file was truncated or replaced after it was first opened.
        """
        span = range(len(self))[key]
        if isinstance(span, int):
            return self[span : span + 1][0]
        if span.step != 1:
            return np.array([self[position] for position in span], "<u2")
        start, stop = span.start, span.stop
        n = int(np.searchsorted(self.starts, start, side="right")) - 1  # index of the shard
        parts = []
        while start < stop:
            shard_start, end = int(self.starts[n]), min(stop, int(self.starts[n + 1]))
            parts.append(self.shards[n].read(start - shard_start, end - shard_start, self.n_vocab))
            start = end
            n += 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, "<u2"), *parts])

    def locate(self, position: int) -> tuple[_Shard, int]:
        """Return the shard that has the id at a position of the sequence, and its index there."""
        n = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[n], position - int(self.starts[n])

    def check_ids(self, n_vocab: int) -> None:
        """Read all ids. Raise UserError with file and offset if an id is not below n_vocab."""
        for shard in self.shards:
            for start in range(0, shard.count, CHUNK_BYTES // 2):
                shard.read(start, min(start + CHUNK_BYTES // 2, shard.count), n_vocab)


class _OpenFile:
    """An open file. It is closed when the object is freed, which is after the last read that uses it."""

    def __init__(self, path: str):
        with read_errors(path):
            self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # close-on-exec is Python's default
            weakref.finalize(self, os.close, self.number)
            status = os.fstat(self.number)
        self.lock = threading.Lock()
        self.path, self.identity = path, (status.st_ino, status.st_mtime_ns, status.st_size)

    def read(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes. pread has no position, so that several threads can read."""
        try:
            if hasattr(os, "pread"):
                return os.pread(self.number, size, offset)
            with self.lock:  # Windows
                os.lseek(self.number, offset, os.SEEK_SET)
                return os.read(self.number, size)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read at byte {offset:,}: {error.strerror}") from None


class _Shard:
    """One shard file. `open_file` returns its _OpenFile, which may have been closed since the last read.

    Reads with pread: if a memory-mapped file is truncated, SIGBUS kills the process. Reading 1,025 ids takes 4.9 us,
    with a memory map 4.7 us; checking them against the vocabulary takes another 1.1 us, opening a closed file 16 us.
    """

    def __init__(self, path: Path, count: int | None, open_file: Callable[[str], _OpenFile]):
        self.path, self.open_file = str(path), open_file  # a str is hashed once
        file = open_file(self.path)
        self.identity, size = file.identity, file.identity[-1]
        self.offset = _id_offset(path, count, size, file.read(HEADER_BYTES, 0), file.read(1, max(0, size - 1)))
        self.count = (size - self.offset) // 2

    def read(self, start: int, stop: int, n_vocab: int | None = None) -> np.ndarray:
        """Return ids [start, stop), read-only. Raise UserError if one is not below n_vocab or the file is truncated."""
        offset, size = self.offset + 2 * start, 2 * (stop - start)
        file = self.open_file(self.path)
        content = file.read(size, offset)
        if len(content) < size or file.identity != self.identity:
            advice = "restore the file, or prepare the dataset again, then run again"
            raise UserError(f"{self.path}: truncated or replaced while it was in use: {advice}")
        ids = np.frombuffer(content, dtype="<u2")
        if n_vocab is not None and ids.size and int(ids.max()) >= n_vocab:
            bad = int(np.argmax(ids >= n_vocab))  # index of the first
            wrong = f"id {ids[bad]} at byte {offset + 2 * bad:,} is not in the vocabulary of {n_vocab:,} ids"
            cause = "the shards are of another tokenizer, or do not consist of uint16 ids"
            raise UserError(f"{self.path}: {wrong}; {cause}")
        return ids


def _id_offset(path: Path, count: int | None, size: int, header: bytes, last: bytes) -> int:
    """Return the offset of the first id in bytes. Raise UserError if the file is not a valid shard.

    Args:
        count: expected number of ids, or None for any.
        header: the first HEADER_BYTES bytes of the file, or all of a shorter one.
        last: its last byte.
    """
    magic, tokens = (int.from_bytes(header[n : n + 4], "little") for n in (0, 8))
    offset, expected, source = 0, size, ""  # `source` of the expected size
    if count is not None:
        expected, source = 2 * count, "meta.json"
    elif magic == LLMC_MAGIC:  # not two ids: its lower half, 55,432, is not a GPT-2 id
        offset, expected, source = LLMC_HEADER, LLMC_HEADER + 2 * tokens, "its llm.c header"
    ids, pickle = np.frombuffer(header[: len(header) // 2 * 2], dtype="<u2"), PICKLE.match(header)
    # ids of another program can begin like a pickle, which also has its frame's length and ends with a STOP opcode
    if count is None and pickle and last == b"." and 11 + int.from_bytes(pickle[1], "little") <= size:
        problem = "is a Python pickle, and unpickling can run arbitrary code: make shards from the text"
    elif magic == LLMC_LLAMA_MAGIC and count is None:
        problem = "has llm.c's uint32 ids of Llama 3's vocabulary, not uint16 ids"
    elif size != expected:
        problem = f"has {size:,} bytes, but {source} says {expected:,}: truncated, changed, or not uint16 ids"
    elif size <= offset or size % 2:
        problem = f"has {size:,} bytes: a shard of uint16 ids has a positive even number"
    elif not source and size % 4 == 0 and len(ids) >= 16 and ids[::2].any() and not ids[1::2].any():
        problem = "looks like uint32 ids: every second uint16 is 0"
    else:
        return offset
    raise UserError(f"{path} {problem}; move {path.parent} away and run prepare_data.py, or copy the files again")
