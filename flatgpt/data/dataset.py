"""Open a dataset folder; make its training batches as a pure function of the update. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import PrepareConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.data.shards import LLMC_EVAL_MAGIC, LLMC_LLAMA_MAGIC, LLMC_MAGIC, Tokens, magic_number, read_meta

PROGRESS = "progress.json"  # in a folder whose dataset is not finished
CHECKED_AT_START = 100_000_000  # ids of a split: 200 MB, 0.01 to 0.04 s in memory, else a read of the disk


@dataclass(frozen=True)
class Dataset:
    """A finished dataset folder: its manifest, and Tokens for each split on request.

    Args:
        notice: a line to print about shards of other programs; empty for flatGPT's.
    """

    folder: Path
    meta: dict
    notice: str = ""

    @property
    def manifest_hash(self) -> str:
        """SHA-256 of meta.json, which holds the hash of every shard: names the data of a run."""
        path = self.folder / "meta.json"
        content = json.dumps(self.meta).encode() if self.notice else path.read_bytes()
        return hashlib.sha256(content).hexdigest()

    def tokens(self, split: str) -> Tokens:
        """The ids of one split; UserError where the dataset has no such split or its files are not as written."""
        entry = self.meta["splits"].get(split)
        if entry is None:
            raise UserError(f"{self.folder} has no split {split}; it has {', '.join(self.meta['splits'])}")
        files = [(self.folder / f["name"], None if self.notice else f["tokens"]) for f in entry["files"]]
        return Tokens(files, self.meta["vocab_size"])

    def check(self, full: bool = False) -> None:
        """Raise UserError, naming all of them, where files are not as they were written.

        The sizes of all splits, and the ids of train and val where a split has at most CHECKED_AT_START of them;
        with `full` every id and every SHA-256.
        """
        wrong = [error for _, error in self.verify_shards(full) if error]
        if wrong:
            remedy = f"; move {self.folder} away and make it again"
            raise UserError("; ".join(wrong) + remedy * ("prepare_data.py" not in "".join(wrong)))

    def verify_shards(self, full: bool = True) -> Iterator[tuple[str, str]]:
        """Yield (name, error or "") of each shard file: size, ids and SHA-256; without `full`, what check reads."""
        for split, entry in self.meta["splits"].items():
            count = sum(file["tokens"] for file in entry["files"])
            ids = full or (split in ("train", "val") and count <= CHECKED_AT_START)
            for file in entry["files"]:
                path, digest = self.folder / file["name"], None
                try:
                    tokens = Tokens([(path, None if self.notice else file["tokens"])])
                    if ids:
                        tokens.check_ids(self.meta["vocab_size"])
                    if full:
                        with open(path, "rb") as content:
                            digest = hashlib.file_digest(content, "sha256").hexdigest()
                except (UserError, OSError) as error:
                    yield file["name"], str(error)
                    continue
                same = digest in (None, file.get("sha256", digest))
                yield file["name"], "" if same else f"{path}: its SHA-256 is not meta.json's: changed since it was made"


def open_dataset(folder: Path) -> Dataset:
    """Open the dataset in a folder, which may also hold shards of nanoGPT (train.bin, val.bin) or llm.c.

    Raises:
        UserError: not there, not finished, or of a tokenizer that this version does not know.
    """
    meta = read_meta(folder)
    if meta is None:
        unfinished = _unfinished(folder)
        if not unfinished and (dataset := _open_external(folder)):
            return dataset
        begun = unfinished or (folder.is_dir() and any(folder.glob("*.bin*")))
        state = "is not finished" if begun else "is not there"
        raise UserError(f"dataset {folder} {state}: run {unfinished or _command(folder)}")
    tokenizer.check_name(meta["tokenizer"])
    return Dataset(folder, meta)


def _unfinished(folder: Path) -> str:
    """Return the command that began the dataset in this folder; empty where there is no unfinished one."""
    try:
        return str(json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["command"]) or _command(folder)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return _command(folder)


def _command(folder: Path) -> str:
    """Guess the command that makes this folder from its name."""
    source, _, name = folder.name.partition("_")
    known = [s for s in PrepareConfig.__dataclass_fields__["source"].metadata["choices"] if s not in ("hub", "text")]
    words = f"{source} --tokenizer {name}" if name else source
    if source == "text":
        words += " --input FILES"
    elif source not in known:
        words = f"text --input FILES --name {folder.name}"
    if folder.parent != Path("data"):
        words += f" --data_dir {shlex.quote(str(folder.parent))}"
    return f"python prepare_data.py {words}"


def _open_external(folder: Path) -> Dataset | None:
    """Open shards of nanoGPT or llm.c as GPT-2's ids, since they name no tokenizer; None where there are none."""
    paths = sorted(path for path in folder.glob("*.bin") if path.is_file())
    maker, files = "nanoGPT", {s: [p for p in paths if p.name == f"{s}.bin"] for s in ("train", "val")}
    magic = {path: magic_number(path) for path in paths}
    if not files["train"] and {LLMC_MAGIC, LLMC_LLAMA_MAGIC} & set(magic.values()):
        maker, paths = "llm.c", [path for path in paths if magic[path] != LLMC_EVAL_MAGIC]
        words = {path: re.split("[^a-z]+", path.stem.lower()) for path in paths}
        files = {s: [path for path in paths if s in words[path]] for s in ("train", "val")}
        ids = (LLMC_MAGIC, LLMC_LLAMA_MAGIC)
        if others := [path for found in files.values() for path in found if magic[path] not in ids]:
            raise UserError(f"{others[0]} lacks the header that the other files of llm.c have: truncated; get it again")
    if not files["train"]:
        return None
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} holds nanoGPT's character ids, whose table is in a pickle (meta.pkl), and unpickling can run "
            "anybody's code: make shards from its text: python prepare_data.py text --input input.txt --tokenizer byte"
        )
    vocab_size, splits = 50_257, {}
    for split, found in files.items():
        each = [Tokens([(path, None)]) for path in found]
        for tokens in each:
            tokens.check_ids(vocab_size)  # no manifest says that they are valid
        entries = [{"name": path.name, "tokens": len(t)} for path, t in zip(found, each, strict=True)]
        splits |= {split: {"tokens": sum(map(len, each)), "files": entries}} if found else {}
    meta = {
        "source": maker,
        "tokenizer": "gpt2",
        "vocab_size": vocab_size,
        "ranks_sha256": tokenizer.GPT2_RANKS,
        "eot_id": 50_256,
        "end_of_text": True,
        "splits": splits,
    }
    return Dataset(folder, meta, f"{folder} has no meta.json: taken as {maker}'s shards of GPT-2's tokens")


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
