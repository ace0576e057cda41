"""Open a dataset folder; make its training batches as a pure function of the update. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import PrepareConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.data.shards import LLMC_LLAMA_MAGIC, LLMC_MAGIC, Tokens, file_sha256, read_meta

PROGRESS = "progress.json"  # in a folder whose dataset is not finished
# What a manifest would say of shards that other programs wrote.
GPT2 = {
    "tokenizer": "gpt2",
    "vocab_size": 50_257,
    "ranks_sha256": tokenizer.GPT2_RANKS,
    "eot_id": 50_256,
    "end_of_text": True,
}
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
        """Raise UserError, naming all of them, where `verify_shards` finds files that are not as they were written."""
        if wrong := [error for _, error in self.verify_shards(full) if error]:
            raise UserError("; ".join(wrong))

    def verify_shards(self, full: bool = True) -> Iterator[tuple[str, str]]:
        """Yield (name, error or "") of each shard file.

        The sizes of all splits, and the ids of train and val where a split has at most CHECKED_AT_START of them;
        with `full` every id and every SHA-256.
        """
        for split, entry in self.meta["splits"].items():
            check_ids = full or (split in ("train", "val") and entry["tokens"] <= CHECKED_AT_START)
            for file in entry["files"]:
                path, error = self.folder / file["name"], ""
                try:
                    tokens = Tokens([(path, None if self.notice else file["tokens"])])
                    if check_ids:
                        tokens.check_ids(self.meta["vocab_size"])
                    if full and "sha256" in file and file_sha256(path) != file["sha256"]:
                        error = f"{path}: its SHA-256 is not meta.json's: move {self.folder} away and make it again"
                except (UserError, OSError) as found:
                    error = str(found)
                yield file["name"], error


def open_dataset(folder: Path) -> Dataset:
    """Open the dataset in a folder, which may also hold shards of nanoGPT (train.bin, val.bin) or llm.c.

    Raises:
        UserError: not there, not finished, or of a tokenizer that this version does not know.
    """
    if meta := read_meta(folder):
        tokenizer.check_name(meta["tokenizer"])
        return Dataset(folder, meta)
    begun = (folder / PROGRESS).exists()
    if not begun and (dataset := _open_external(folder)):
        return dataset
    state = "is not finished" if begun or any(folder.glob("*.bin*")) else "is not there"
    raise UserError(f"dataset {folder} {state}: run {_command(folder)}")


def _command(folder: Path) -> str:
    """Return the command that began the dataset in this folder, else guess it from the folder's name."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["command"]
    source, _, name = folder.name.partition("_")
    words = f"{source} --tokenizer {name}" if name else source
    known = PrepareConfig.__dataclass_fields__["source"].metadata["choices"]
    if source not in known or source in ("hub", "text"):
        words = f"text --input FILES --name {folder.name}"
    if folder.parent != Path("data"):
        words += f" --data_dir {shlex.quote(str(folder.parent))}"
    return f"python prepare_data.py {words}"


def _open_external(folder: Path) -> Dataset | None:
    """Open shards of nanoGPT or llm.c as GPT-2's ids, since they name no tokenizer; None where there are none."""
    maker, splits = "nanoGPT", {}
    files = {split: list(folder.glob(f"{split}.bin")) for split in ("train", "val")}
    if not files["train"]:
        maker, magic = "llm.c", {path: [*np.fromfile(path, "<i4", 1)] for path in sorted(folder.glob("*.bin"))}
        shards = [path for path in magic if magic[path] in ([LLMC_MAGIC], [LLMC_LLAMA_MAGIC])]
        files = {split: [p for p in shards if split in re.split("[^a-z]+", p.stem.lower())] for split in files}
    if not files["train"]:
        return None
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} holds nanoGPT's character ids, whose table is in a pickle (meta.pkl), and unpickling can run "
            "anybody's code: make shards from its text: python prepare_data.py text --input input.txt --tokenizer byte"
        )
    for split, paths in files.items():
        sizes = []
        for path in paths:
            tokens = Tokens([(path, None)])
            tokens.check_ids(GPT2["vocab_size"])  # no manifest says that they are valid
            sizes.append({"name": path.name, "tokens": len(tokens)})
        if sizes:
            splits[split] = {"tokens": sum(file["tokens"] for file in sizes), "files": sizes}
    meta = {"source": maker, **GPT2, "splits": splits}
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


def shuffled(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the windows at these places of an epoch: a bijection on 0 .. n-1 keyed by (seed, epoch), in O(1) memory.

    A balanced Feistel network over the next power of four, walked until the result is below n (cycle walking:
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    digest = hashlib.blake2b(f"flatgpt order {seed} {epoch}".encode(), digest_size=64).digest()
    keys = np.frombuffer(digest, dtype="<u8")  # one for each round
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)  # bits of each of the two halves

    def permute(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in keys:
            mixed = right + key  # splitmix64's finaliser (Steele, Lea, Flood 2014), in wrapping uint64 arithmetic
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << half) | right

    windows = permute(np.asarray(places, dtype=np.uint64))
    while (outside := windows >= n).any():  # the domain is below 4 n, so a few rounds bring all inside
        windows[outside] = permute(windows[outside])
    return windows


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
            parts.append(shuffled(np.arange(place, place + count), W, self.seed, epoch))
            first += count
        return np.concatenate(parts)

    def __call__(self, update: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of that micro-batch: two (batch_size, T) int64 arrays."""
        return self.windows.batch(self.indices(update, micro))
