"""Write and read shards: files of token ids, and the manifest that describes them.

`<split>_000000.bin`, ... hold little-endian uint16 token ids and nothing else. `meta.json` is written last: a folder
without it is not finished. llm.c's files (a header of 256 int32, then the same ids) are read too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from config import UserError
from flatgpt.data.tokenizer import to_uint16
from flatgpt.runtime.files import atomic_write

FORMAT = 1
REQUIRED = ("tokenizer", "vocab_size", "ranks_sha256", "eot_id", "end_of_text", "splits")  # keys of meta.json
SPLITS = ("train", "val", "test")
OUR_FILES = re.compile(rf"({'|'.join(SPLITS)})_(\d{{6}})\.bin(\.tmp)?")
# llm.c's header: magic, version, number of ids; https://github.com/karpathy/llm.c, dev/data/data_common.py
LLMC_MAGIC, LLMC_LLAMA_MAGIC, LLMC_HEADER = 20240520, 20240801, 1024
PICKLE = re.compile(rb"\x80[\x04\x05]\x95.{4}\0{4}", re.DOTALL)  # protocols 4 and 5: 8 bytes are a frame's length
HEADER_BYTES = 4096  # read from a file to recognise its format
CHUNK_BYTES = 1 << 23  # read at once where a whole file is read


# ---------------------------------------------------------------------------------------------------------------------
# writing


class ShardWriter:
    """Writes one split's ids into shard files of `shard_tokens` ids (the last one shorter) as they come.

    A file has its name when it is full; until then it ends in `.tmp`.

    Args:
        folder: the dataset's folder; it exists.
        split: `train`, `val` or `test`.
        n_vocab: ids have to be below it.
        shard_tokens: ids per file.
        position: of an earlier writer, as `position()` returned it: continue there, and drop what came after it.

    Raises:
        UserError: the files do not hold what `position` says.
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
        if self.waiting and self._path("").exists():  # it became full after the position was taken
            os.replace(self._path(""), self._path())
        sizes = {self.folder / file["name"]: 2 * file["tokens"] for file in self.files}
        sizes |= {self._path(): 2 * self.waiting} if self.waiting else {}
        for path, size in sizes.items():
            if not path.exists() or path.stat().st_size < size:
                raise UserError(f"{path} is not as it was when the work stopped: move {self.folder} away")
        for path in self.folder.iterdir():
            match = OUR_FILES.fullmatch(path.name)
            if match and match[1] == self.split and path not in sizes:
                path.unlink()
        if self.waiting:
            self._file = open(self._path(), "r+b")  # noqa: SIM115, _finish closes it
            self._file.truncate(2 * self.waiting)
            self._file.seek(0, os.SEEK_END)

    def add(self, ids: np.ndarray, documents: int = 1, text_bytes: int = 0) -> None:
        """Append ids, and add the counts of their text."""
        ids = to_uint16(np.asarray(ids), self.n_vocab)
        self.counts["documents"] += documents
        self.counts["bytes"] += text_bytes
        while ids.size:
            self._file = self._file or open(self._path(), "wb")  # noqa: SIM115, _finish closes it
            part, ids = np.split(ids, [self.shard_tokens - self.waiting])
            self._file.write(part.data)
            self.waiting += part.size
            if self.waiting == self.shard_tokens:
                self._finish()

    def _finish(self) -> None:
        """Give the file its name."""
        self.flush()
        file, self._file = self._file, None
        file.close()
        path = self._path("")
        os.replace(self._path(), path)
        self.files.append({"name": path.name, "tokens": self.waiting, "sha256": file_sha256(path)})
        self.waiting = 0

    def flush(self) -> None:
        """Flush to the disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def position(self) -> dict:
        """Return what an equal writer continues from; after `flush`, the files hold it for good."""
        return {"files": list(self.files), "waiting": self.waiting, **self.counts}

    @property
    def tokens(self) -> int:
        """Ids written so far."""
        return sum(file["tokens"] for file in self.files) + self.waiting

    def close(self) -> dict:
        """Finish the last file; return the split's entry of meta.json."""
        if self._file:
            self._finish()
        return {"tokens": self.tokens, **self.counts, "files": self.files}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_meta(folder: Path, meta: dict) -> None:
    """Write meta.json, which makes the folder a finished dataset."""
    atomic_write(folder / "meta.json", json.dumps({"format": FORMAT, **meta}, indent=1).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_meta(folder: Path) -> dict | None:
    """Return the manifest of a finished dataset; None where there is none.

    Raises:
        UserError: a manifest that is damaged or of another format.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT and set(REQUIRED) <= set(meta):
            return meta
    raise UserError(
        f"{path} is damaged, or of another format than this version's, {FORMAT}: move {folder} away and run "
        "prepare_data.py again"
    )


class Tokens:
    """The ids of one split: its shard files as one sequence, read on demand from files that stay open.

    Args:
        files: (path, ids that the file has to hold; None: whatever it holds) in order.
        n_vocab: ids that are not below it are an error; None: not known. A GPU that looks up a larger id stops with an
            assertion that names neither file nor id.

    Raises:
        UserError: a missing file, a wrong size, no ids at all, or a pickle instead of ids.
    """

    def __init__(self, files: list[tuple[Path, int | None]], n_vocab: int | None = None):
        self.n_vocab = n_vocab
        self.shards = [_Shard(path, count) for path, count in files]
        self.starts = np.cumsum([0, *(shard.count for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        """Ids [start, stop), across files where need be: (stop - start,) uint16, read-only where of one file.

        Raises:
            UserError: an id outside the vocabulary, or a file that was changed in size since it was opened.
        """
        start, stop, _ = span.indices(len(self))
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            begin, end = int(self.starts[first]), min(stop, int(self.starts[first + 1]))
            parts.append(self.shards[first].read(start - begin, end - begin, self.n_vocab))
            start = end
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, "<u2"), *parts])

    def check_ids(self, n_vocab: int) -> None:
        """Raise UserError, naming file and offset, if an id is not below n_vocab. Reads everything, in pieces."""
        for shard in self.shards:
            for start in range(0, shard.count, CHUNK_BYTES // 2):
                shard.read(start, min(start + CHUNK_BYTES // 2, shard.count), n_vocab)


class _Shard:
    """One shard file, open for as long as this object lives.

    Read with pread, because a memory map of a file that is cut off meanwhile kills the process with SIGBUS. It takes as
    long: 4.9 us a window of 1,025 ids, a map 4.7; the look for ids outside the vocabulary takes 1.1 us more.
    """

    def __init__(self, path: Path, count: int | None):
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY)  # not inherited: Python sees to that
            weakref.finalize(self, os.close, self.file)
            size = os.fstat(self.file).st_size
            head = os.pread(self.file, HEADER_BYTES, 0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self.offset = _first_id(path, count, size, head)  # bytes
        self.count = (size - self.offset) // 2

    def read(self, start: int, stop: int, n_vocab: int | None = None) -> np.ndarray:
        """Ids [start, stop) of this file, read-only; UserError where one is not below n_vocab, or the file is cut."""
        begin, size = self.offset + 2 * start, 2 * (stop - start)
        try:
            content = os.pread(self.file, size, begin)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read at byte {begin:,}: {error.strerror}") from None
        if len(content) < size:
            raise UserError(
                f"{self.path}: truncated or replaced while it was in use: put it back, or make the dataset again, then "
                "start again (training: with --resume)"
            )
        ids = np.frombuffer(content, dtype="<u2")
        if n_vocab is not None and ids.size and int(ids.max()) >= n_vocab:
            bad = int(np.argmax(ids >= n_vocab))  # the first
            raise UserError(
                f"{self.path}: id {ids[bad]} at byte {begin + 2 * bad:,} is not in the vocabulary of {n_vocab:,} "
                "ids; these are the shards of another tokenizer, or not shards of uint16 ids"
            )
        return ids


def _first_id(path: Path, count: int | None, size: int, head: bytes) -> int:
    """Return the byte at which a file's ids begin. Raise UserError where it cannot hold what it should.

    Args:
        count: ids that it should hold; None: whatever it holds.
        head: its first HEADER_BYTES bytes (all where it has less).
    """
    magic, tokens = (int.from_bytes(head[n : n + 4], "little") for n in (0, 8))
    start, expected, said_by = 0, size, ""
    if count is not None:
        expected, said_by = 2 * count, "meta.json"
    elif magic == LLMC_MAGIC:  # as an id, its lower half, 55,432, is outside GPT-2's vocabulary
        start, expected, said_by = LLMC_HEADER, LLMC_HEADER + 2 * tokens, "llm.c's header"
    ids = np.frombuffer(head[: len(head) // 2 * 2], dtype="<u2")
    if PICKLE.match(head):
        problem = "is a Python pickle, and unpickling can run anybody's code: make shards from the text"
    elif magic == LLMC_LLAMA_MAGIC and count is None:
        problem = "holds llm.c's uint32 ids of Llama 3's vocabulary, not uint16 ids"
    elif size != expected:
        problem = f"has {size:,} bytes, {said_by} says {expected:,}: truncated, changed, or not uint16 ids"
    elif size <= start or size % 2:
        problem = f"has {size:,} bytes: uint16 ids take a positive even number"
    elif not said_by and size % 4 == 0 and len(ids) >= 16 and ids[::2].any() and not ids[1::2].any():
        problem = "looks like uint32 ids: every second uint16 is 0"  # eight ids have to tell
    else:
        return start
    raise UserError(f"{path} {problem}; move {path.parent} away and run prepare_data.py, or get the files again")
