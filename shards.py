"""The shard format, written and read: token ids in files, and the manifest that says what they are.

`<split>_000000.bin`, ... hold little-endian uint16 token ids and nothing else; `meta.json`, written last, says what
they are: a folder without it is not finished. llm.c's files (256 int32, then the same ids) are read too.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import re
from pathlib import Path

import numpy as np

from config import UserError
from tokenizer import narrow

FORMAT = 1
SPLITS = ("train", "val", "test")
OUR_FILES = re.compile(rf"({'|'.join(SPLITS)})_(\d{{6}})\.bin(\.tmp)?")
# llm.c's header: magic, version, number of ids; https://github.com/karpathy/llm.c, dev/data/data_common.py
LLMC_MAGIC, LLMC_LLAMA_MAGIC, LLMC_EVAL_MAGIC, LLMC_HEADER = 20240520, 20240801, 20240522, 1024


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
    """Writes one split's ids into shard files of `shard_tokens` ids (the last one shorter) as they come.

    A file has its name when it is full; until then it ends in `.tmp`.

    Args:
        folder: the dataset's folder; it exists.
        split: `train`, `val` or `test`.
        n_vocab: ids have to be below it.
        shard_tokens: ids per file.
        position: what `position()` of an earlier writer said: go on from there, and drop what came after it.

    Raises:
        UserError: the files do not hold what `position` says.
    """

    def __init__(self, folder: Path, split: str, n_vocab: int, shard_tokens: int, position: dict | None = None):
        self.folder, self.split, self.n_vocab, self.shard_tokens = folder, split, n_vocab, shard_tokens
        self.counts = {"documents": 0, "bytes": 0, "words": 0}
        self.files: list[dict] = []
        self._file, self._digest, self._room = None, None, 0
        if position:
            self._go_on(position)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}_{number:06d}.bin"

    def _go_on(self, position: dict) -> None:
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
            self._room -= tokens

    def _open(self, mode: str = "wb") -> None:
        self._file = open(f"{self._path(len(self.files))}.tmp", mode)  # noqa: SIM115, _finish closes it
        self._digest, self._room = hashlib.sha256(), self.shard_tokens

    def add(self, ids: np.ndarray, documents: int = 1, text_bytes: int = 0, words: int = 0) -> None:
        """Append ids, and add to the counts of the text that they stand for."""
        ids = narrow(np.asarray(ids), self.n_vocab)
        for key, more in (("documents", documents), ("bytes", text_bytes), ("words", words)):
            self.counts[key] += more
        while ids.size:
            if self._file is None:
                self._open()
            part, ids = ids[: self._room], ids[self._room :]
            self._file.write(part.data)
            self._digest.update(part.data)
            self._room -= part.size
            if not self._room:
                self._finish()

    def _finish(self) -> None:
        path, tokens = self._path(len(self.files)), self.shard_tokens - self._room
        self.flush()
        file, self._file = self._file, None
        file.close()
        os.replace(file.name, path)
        self.files.append({"name": path.name, "tokens": tokens, "sha256": self._digest.hexdigest()})

    def flush(self) -> None:
        """Bring what was added to the disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def position(self) -> dict:
        """Where the writer is; after `flush`, what the files hold for good."""
        waiting = self.tokens - sum(f["tokens"] for f in self.files)
        return {"files": list(self.files), "waiting": waiting, **self.counts}

    @property
    def tokens(self) -> int:
        """Ids written so far."""
        return sum(f["tokens"] for f in self.files) + (self.shard_tokens - self._room if self._file else 0)

    def close(self) -> dict:
        """Finish the last file; the split's entry in meta.json."""
        if self._file:
            self._finish()
        return {"tokens": self.tokens, **self.counts, "files": self.files}


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
                        f"{path}: id {ids[at]} at byte {ids.offset + 2 * at:,} is not in the vocabulary of {n_vocab:,} "
                        "ids; these are the shards of another tokenizer, or not shards of uint16 ids"
                    )


def _map(path: Path, count: int | None) -> np.ndarray:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(12)
            file.seek(max(0, size - 1))
            last = file.read(1)
    except OSError as why:
        raise UserError(f"{path}: cannot be read: {why.strerror}") from None
    if _is_pickle(head[:11], last, size):
        raise UserError(
            f"{path} is a Python pickle (as smol-GPT writes them), not uint16 ids, and unpickling can run anybody's "
            "code; make shards from the text: python prepare_data.py text --input FILE.txt --name NAME"
        )
    start = 0 if count is not None else _header(path, head, size)
    if count is not None and size != start + 2 * count:
        raise UserError(
            f"{path} has {size:,} bytes, meta.json says {2 * count:,}: truncated or changed; "
            f"move {path.parent} away and run prepare_data.py again"
        )
    if start and size == start:
        raise UserError(f"{path} has llm.c's header and no ids")
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size:,} bytes: shards of uint16 ids have a positive even number")
    return np.memmap(path, dtype="<u2", mode="r", offset=start)


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
