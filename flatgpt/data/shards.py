"""Write and read shards: files of token ids, and the manifest that describes them.

`<split>_000000.bin`, ... hold little-endian uint16 token ids and nothing else. `meta.json` is written last: a folder
without it is not finished. llm.c's files (a header of 256 int32, then the same ids) are read too.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import re
import weakref
from pathlib import Path

import numpy as np

from config import UserError
from flatgpt.data.tokenizer import to_uint16
from flatgpt.runtime.files import atomic_write

FORMAT = 1
SPLITS = ("train", "val", "test")
OUR_FILES = re.compile(rf"({'|'.join(SPLITS)})_(\d{{6}})\.bin(\.tmp)?")
# llm.c's header: magic, version, number of ids; https://github.com/karpathy/llm.c, dev/data/data_common.py
LLMC_MAGIC, LLMC_LLAMA_MAGIC, LLMC_EVAL_MAGIC, LLMC_HEADER = 20240520, 20240801, 20240522, 1024
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
        self.counts = {"documents": 0, "bytes": 0}
        self.files: list[dict] = []
        self._file, self._digest, self._left = None, None, 0
        if position:
            self._resume(position)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}_{number:06d}.bin"

    def _resume(self, position: dict) -> None:
        self.counts = {key: position[key] for key in self.counts}
        self.files = list(position["files"])
        number, tokens = len(self.files), position["waiting"]
        path = self._path(number)
        if path.exists() and tokens:  # it became full after the position was taken
            os.replace(path, f"{path}.tmp")
        sizes = {self.folder / f["name"]: 2 * f["tokens"] for f in self.files}
        unlike = [p for p, size in sizes.items() if not p.exists() or p.stat().st_size != size]
        partial = Path(f"{path}.tmp")
        if tokens and not (partial.exists() and partial.stat().st_size >= 2 * tokens):
            unlike.append(partial)
        if unlike:
            raise UserError(f"{unlike[0]} is not as it was when the work stopped: move {self.folder} away")
        for later in self.folder.iterdir():
            match = OUR_FILES.fullmatch(later.name)
            if match and match[1] == self.split and int(match[2]) >= number + bool(tokens):
                later.unlink()
        if tokens:
            self._open("r+b")
            while rest := 2 * tokens - self._file.tell():
                self._digest.update(self._file.read(min(rest, 1 << 22)))
            self._file.truncate()
            self._left -= tokens

    def _open(self, mode: str = "wb") -> None:
        self._file = open(f"{self._path(len(self.files))}.tmp", mode)  # noqa: SIM115, _finish closes it
        self._digest, self._left = hashlib.sha256(), self.shard_tokens

    def add(self, ids: np.ndarray, documents: int = 1, text_bytes: int = 0) -> None:
        """Append ids, and add the counts of their text."""
        ids = to_uint16(np.asarray(ids), self.n_vocab)
        self.counts["documents"] += documents
        self.counts["bytes"] += text_bytes
        while ids.size:
            if self._file is None:
                self._open()
            part, ids = ids[: self._left], ids[self._left :]
            self._file.write(part.data)
            self._digest.update(part.data)
            self._left -= part.size
            if not self._left:
                self._finish()

    def _finish(self) -> None:
        path, tokens = self._path(len(self.files)), self.shard_tokens - self._left
        self.flush()
        file, self._file = self._file, None
        file.close()
        os.replace(file.name, path)
        self.files.append({"name": path.name, "tokens": tokens, "sha256": self._digest.hexdigest()})

    def flush(self) -> None:
        """Flush to the disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def position(self) -> dict:
        """Return what an equal writer continues from; after `flush`, the files hold it for good."""
        waiting = self.tokens - sum(f["tokens"] for f in self.files)
        return {"files": list(self.files), "waiting": waiting, **self.counts}

    @property
    def tokens(self) -> int:
        """Ids written so far."""
        return sum(f["tokens"] for f in self.files) + (self.shard_tokens - self._left if self._file else 0)

    def close(self) -> dict:
        """Finish the last file; return the split's entry of meta.json."""
        if self._file:
            self._finish()
        return {"tokens": self.tokens, **self.counts, "files": self.files}


def write_meta(folder: Path, meta: dict) -> None:
    """Write meta.json, which makes the folder a finished dataset."""
    atomic_write(folder / "meta.json", json.dumps({"format": FORMAT, **meta}, indent=1).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_meta(folder: Path) -> dict | None:
    """Return the manifest of a finished dataset; None where there is none.

    Raises:
        UserError: a manifest that is no JSON or of another format.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT:
            required_keys = ("tokenizer", "vocab_size", "ranks_sha256", "eot_id", "end_of_text")
            _ = [meta[key] for key in required_keys], meta["splits"].keys()
            return meta
        raise UserError(f"{path}: format {meta['format']} is not known to this version (it writes {FORMAT})")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: move {folder} away and run prepare_data.py again") from None


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
            head, last = os.pread(self.file, HEADER_BYTES, 0), os.pread(self.file, 1, max(0, size - 1))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self.offset = _first_id(path, count, size, head, last)  # bytes
        self.count = (size - self.offset) // 2

    def read(self, start: int, stop: int, n_vocab: int | None = None) -> np.ndarray:
        """Ids [start, stop) of this file, read-only; UserError where one is not below n_vocab, or the file is cut."""
        begin, at, end = (self.offset + 2 * n for n in (start, start, stop))
        parts = []
        while at < end:
            try:
                part = os.pread(self.file, min(end - at, 1 << 30), at)  # 2 GB and more at once are too much for macOS
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read at byte {at:,}: {error.strerror}") from None
            if not part:
                raise UserError(
                    f"{self.path}: truncated or replaced while it was in use: it now ends at byte "
                    f"{os.fstat(self.file).st_size:,}, had {self.offset + 2 * self.count:,}; put it back, or move "
                    f"{self.path.parent} away and run prepare_data.py again, then start again (training: with --resume)"
                )
            parts.append(part)
            at += len(part)
        ids = np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype="<u2")
        if n_vocab is not None and ids.size and int(ids.max()) >= n_vocab:
            bad = int(np.argmax(ids >= n_vocab))  # the first
            raise UserError(
                f"{self.path}: id {ids[bad]} at byte {begin + 2 * bad:,} is not in the vocabulary of {n_vocab:,} "
                "ids; these are the shards of another tokenizer, or not shards of uint16 ids"
            )
        return ids


def _first_id(path: Path, count: int | None, size: int, head: bytes, last: bytes) -> int:
    """The byte at which a file's ids begin; UserError where it cannot hold what it should.

    Args:
        count: ids that it should hold; None: whatever it holds.
        head, last: its first HEADER_BYTES bytes (all where it has less), its last byte.
    """
    if _is_pickle(head[:11], last, size):
        raise UserError(
            f"{path} is a Python pickle (as smol-GPT writes them), not uint16 ids, and unpickling can run anybody's "
            "code; make shards from the text: python prepare_data.py text --input FILE.txt --name NAME"
        )
    start = 0 if count is not None else _header(path, head, size)
    if count is not None and size != 2 * count:
        what = "looks like uint32 ids" if size == 4 * count else "truncated or changed"
        raise UserError(
            f"{path} has {size:,} bytes, meta.json says {2 * count:,}: {what}; "
            f"move {path.parent} away and run prepare_data.py again"
        )
    if start and size == start:
        raise UserError(f"{path} has llm.c's header and no ids")
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size:,} bytes: shards of uint16 ids have a positive even number")
    if count is None and start == 0 and _is_uint32(head, size):
        raise UserError(
            f"{path} looks like uint32 ids, not uint16 ids: every second uint16 of its first {len(head):,} bytes is 0; "
            "write the ids again with dtype uint16"
        )
    return start


def magic_number(path: Path) -> int:
    """The first int32 of a file: one of llm.c's, or whatever its ids begin with."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little")


def _header(path: Path, head: bytes, size: int) -> int:
    """Bytes before the first id. As an id, the lower half of llm.c's magic, 55,432, is outside GPT-2's vocabulary."""
    magic, version, tokens = (int.from_bytes(head[n : n + 4], "little") for n in (0, 4, 8))
    if magic == LLMC_LLAMA_MAGIC:
        raise UserError(f"{path} holds llm.c's uint32 ids of Llama 3's vocabulary, which do not fit uint16")
    if magic != LLMC_MAGIC:
        return 0
    if version != 1 or size != LLMC_HEADER + 2 * tokens:
        raise UserError(
            f"{path} has llm.c's header (version {version}, {tokens:,} ids) and {size:,} bytes, which do not fit: "
            "truncated; get it again"
        )
    return LLMC_HEADER


def _is_pickle(head: bytes, last: bytes, size: int) -> bool:
    """Whether a file's first 11 bytes and its last are those of a pickle of protocol 2 to 5; executes nothing."""
    if len(head) < 11 or head[0] != 0x80 or head[1] not in range(2, 6) or last != b".":  # . is STOP
        return False
    if head[1] >= 4:  # protocols 4 and 5 open with a frame and its length
        return head[2] == 0x95 and int.from_bytes(head[3:], "little") <= size - 11
    return chr(head[2]) in pickletools.code2op


def _is_uint32(head: bytes, size: int) -> bool:
    """Whether a file's first bytes are ids below 65,536 in four bytes (or eight) each. Eight of them have to tell."""
    ids = np.frombuffer(head[: len(head) // 2 * 2], dtype="<u2")
    return size % 4 == 0 and len(ids) >= 16 and bool(ids[::2].any()) and not ids[1::2].any()
