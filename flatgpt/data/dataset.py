"""Open dataset folders, and compute the training batches of an update from its number. Does not import torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from config import PrepareConfig, TrainConfig, UserError, count_of
from flatgpt.data import tokenizer
from flatgpt.data.shards import DAMAGED, LLMC_LLAMA_MAGIC, LLMC_MAGIC, Tokens, file_sha256, read_meta
from flatgpt.data.tokenizer import TOKENIZER_FILE, FileTokenizer
from flatgpt.data.tokenizer_reader import CHARACTERS, read_characters

PROGRESS = "progress.json"  # exists only in the folder of an unfinished dataset
RAW_HUB = Path("data/raw/hub")  # where prepare_data.py downloads repositories by default
DUMP_NAME = re.compile(r"\d{8}\.[a-z-]+(_|$)")  # of Wikipedia, in the name of a dataset
# The manifest that is assumed for shards of other programs.
EXTERNAL_META = {"tokenizer": "gpt2", "vocab_size": 50_257, "ranks_sha256": tokenizer.GPT2_RANKS}
EXTERNAL_META |= {"eot_id": 50_256, "end_of_text": True}  # manifest_hash depends on the order
MAX_IDS_CHECKED_AT_START = 100_000_000  # per split: 200 MB, read in 0.01 to 0.04 s from the page cache


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: its manifest, and the Tokens of each split.

    Args:
        notice: a line to print about shards of other programs; empty for shards of flatGPT.
    """

    folder: Path
    meta: dict
    notice: str = ""

    def load_tokenizer(self) -> tiktoken.Encoding:
        """Return the tokenizer. Raise UserError if its file is missing, damaged or was changed."""
        if self.notice and (self.folder / CHARACTERS).is_file():
            return read_characters(self.folder / CHARACTERS, self.meta["tokenizer"])
        encoding = tokenizer.load(self.meta["tokenizer"], self.folder, self.meta["eot_id"])
        if isinstance(encoding, FileTokenizer) and tokenizer.ranks_hash(encoding) != self.meta["ranks_sha256"]:
            path = self.folder / TOKENIZER_FILE
            raise UserError(f"{path} was changed: its hash differs from meta.json; restore it, or prepare again")
        return encoding

    @property
    def manifest_hash(self) -> str:
        """SHA-256 of meta.json, which contains the hashes of all shards; identifies the data of a run."""
        path = self.folder / "meta.json"
        content = json.dumps(self.meta).encode() if self.notice else path.read_bytes()
        return hashlib.sha256(content).hexdigest()

    def tokens(self, split: str) -> Tokens:
        """Open the shards of a split. Raise UserError if the split or a file is missing or has another size."""
        entry = self.meta["splits"].get(split)
        if entry is None:
            found = list(self.meta["splits"])
            raise UserError(
                f"{self.folder} has no split {split}; it has {', '.join(found)}: eval.py --split {found[0]}"
            )
        files = [(self.folder / f["name"], None if self.notice else f["tokens"]) for f in entry["files"]]
        return Tokens(files, self.meta["vocab_size"])

    def check(self, full: bool = False) -> None:
        """Raise UserError with the errors of all shards that `verify_shards` finds."""
        if errors := [error for _, error in self.verify_shards(full) if error]:
            raise UserError("; ".join(errors))

    def verify_shards(self, full: bool = True) -> Iterator[tuple[str, str]]:
        """Check the shards, and yield (name, error or "") for each.

        Args:
            full: check sizes, ids and SHA-256. Otherwise check sizes, and the ids of train and val if the split has at
                most MAX_IDS_CHECKED_AT_START.
        """
        for split, entry in self.meta["splits"].items():
            check_ids = full or (split in ("train", "val") and entry["tokens"] <= MAX_IDS_CHECKED_AT_START)
            for file in entry["files"]:
                path, error = self.folder / file["name"], ""
                try:
                    tokens = Tokens([(path, None if self.notice else file["tokens"])])
                    if check_ids:
                        tokens.check_ids(self.meta["vocab_size"])
                    if full and "sha256" in file and file_sha256(path) != file["sha256"]:
                        error = f"{path}: SHA-256 differs from meta.json: move {self.folder} away and prepare it again"
                except (UserError, OSError) as exception:
                    error = str(exception)
                yield file["name"], error


def open_dataset(folder: Path, model_path: Path | None = None) -> Dataset:
    """Open a dataset folder of flatGPT, or a folder with shards of nanoGPT (train.bin, val.bin) or llm.c.

    Args:
        model_path: a checkpoint with the dataset's tokenizer, for the message if the dataset does not exist.

    Raises:
        UserError: the dataset does not exist, is not finished, or has an unknown tokenizer.
    """
    if meta := read_meta(folder):
        if not (folder / TOKENIZER_FILE).is_file():
            if "tokenizer_sha256" in meta or meta["tokenizer"].startswith("bpe:"):
                raise UserError(f"{folder / TOKENIZER_FILE} is missing: copy it from where the dataset was made")
            tokenizer.check_name(meta["tokenizer"])
        return Dataset(folder, meta)
    unfinished = (folder / PROGRESS).exists()
    if not unfinished and (dataset := _open_external(folder)):
        return dataset
    state = "is not finished" if unfinished or any(folder.glob("*.bin*")) else "does not exist"
    raise UserError(f"dataset {folder} {state}: run {_prepare_command(folder, model_path)}")


def _prepare_command(folder: Path, model_path: Path | None) -> str:
    """Return the command that started the dataset in this folder, else guess it from the folder's name."""
    with suppress(OSError, *DAMAGED):
        return "" + json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["command"]  # TypeError unless a str
    name = [f"--name={folder.name}"] if folder.name.startswith("--") else ["--name", folder.name]
    args, choices = {}, PrepareConfig.__dataclass_fields__["source"].metadata["choices"]
    args |= {repo.name: ["hub", "--repo", f"{repo.parent.name}/{repo.name}"] for repo in RAW_HUB.glob("*/*")}
    args |= {source: [source] for source in choices if source not in ("hub", "compare")}
    args["text"] += ["--input", "FILES"]
    beginnings = [key for key in args if f"{folder.name}_".startswith(f"{key}_")]
    base = max(beginnings, key=len, default="text")
    rest = folder.name[len(base) + 1 :] if beginnings else folder.name
    dump = DUMP_NAME.match(rest) if base == "wikipedia" else None
    given = ["--dump", dump[0].rstrip("_")] if dump else []
    rest = rest[dump.end() :] if dump else rest
    if model_path:
        given += ["--tokenizer", str(model_path), *name]
    elif rest == "byte" or rest in tiktoken.list_encoding_names() or re.fullmatch("bpe[0-9]+", rest):
        given += ["--tokenizer", re.sub("^bpe", "bpe:", rest)]
    elif rest:
        given += name
    given += ["--data_dir", str(folder.parent)] if folder.parent != Path("data") else []
    return shlex.join(["python", "prepare_data.py", *args[base], *given])


def _open_external(folder: Path) -> Dataset | None:
    """Open shards of nanoGPT or llm.c. Return None if the folder has no such shards.

    Their tokenizer is that of nanoGPT's meta.pkl, or GPT-2's without it.
    """
    program, splits = "nanoGPT", {}
    files = {split: list(folder.glob(f"{split}.bin")) for split in ("train", "val")}
    if not files["train"]:
        program, magic = "llm.c", {path: [*np.fromfile(path, "<i4", 1)] for path in sorted(folder.glob("*.bin"))}
        shards = [path for path in magic if magic[path] in ([LLMC_MAGIC], [LLMC_LLAMA_MAGIC])]
        files = {split: [p for p in shards if split in re.split("[^a-z]+", p.stem.lower())] for split in files}
    if not files["train"]:
        return None
    facts, kind = EXTERNAL_META, "GPT-2 tokens"
    if (folder / CHARACTERS).exists():
        try:
            encoding = read_characters(folder / CHARACTERS, "characters")
        except UserError as error:
            remedy = "make shards from the text: python prepare_data.py text --input input.txt --tokenizer byte"
            raise UserError(f"{folder} has nanoGPT's character ids. {error}; {remedy}") from None
        facts = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "eot_id": None, "end_of_text": False}
        facts, kind = {**facts, "ranks_sha256": tokenizer.ranks_hash(encoding)}, f"the characters in {CHARACTERS}"
    for split, paths in files.items():
        sizes = []
        for path in paths:
            tokens = Tokens([(path, None)])
            tokens.check_ids(facts["vocab_size"])  # the tokenizer may be only assumed
            sizes.append({"name": path.name, "tokens": len(tokens)})
        if sizes:
            splits[split] = {"tokens": sum(file["tokens"] for file in sizes), "files": sizes}
    meta = {"source": program, **facts, "splits": splits}
    return Dataset(folder, meta, f"{folder} has no meta.json: read as {program} shards of {kind}")


# ---------------------------------------------------------------------------------------------------------------------
# training windows


class Windows:
    """Training windows of a split. Window w with stride S is ids [wS, wS + T], both ends included: T inputs, T targets.

    The incomplete window at the end is dropped, so that all batches have the same shape.
    """

    def __init__(self, tokens: Tokens, context_length: int, stride: int | None = None):
        self.tokens, self.T, self.stride = tokens, context_length, stride or context_length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1 - self.T) // self.stride + 1)

    def batch(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, shifted by one token, of these windows: two (B, T) int64 arrays."""
        starts = [int(w) * self.stride for w in windows]
        rows = np.stack([self.tokens[s : s + self.T + 1] for s in starts]).astype(np.int64)  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]


def shuffled(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the windows at these positions of an epoch: a permutation of 0 .. n-1 keyed by (seed, epoch).

    A balanced Feistel network over the next power of four, applied until the result is below n (cycle walking: Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002). Memory does not depend on n.
    """
    digest = hashlib.blake2b(f"flatgpt order {seed} {epoch}".encode(), digest_size=64).digest()
    keys = np.frombuffer(digest, dtype="<u8")  # one per round
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)  # each half has `bits` bits

    def permute(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in keys:
            mixed = right + key  # splitmix64's finaliser (Steele, Lea, Flood 2014), in wrapping uint64 arithmetic
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << half) | right

    windows = permute(np.asarray(positions, dtype=np.uint64))
    while (outside := windows >= n).any():  # the domain is below 4 n, so few repetitions are needed
        windows[outside] = permute(windows[outside])
    return windows


class TrainingBatches:
    """Micro-batches as a pure function of the update, independent of earlier updates and of the number of ranks.

    Sequence j of update i has global position p = i * batch_size * grad_accum_steps + j. With W windows, its epoch is
    p // W and its position in the epoch p % W. A batch may span two epochs.
    """

    def __init__(self, windows: Windows, batch_size: int, grad_accum_steps: int, seed: int):
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.per_update = batch_size * grad_accum_steps  # sequences

    def indices(self, update: int, micro: int) -> np.ndarray:
        """Return the windows of a micro-batch, (batch_size,) uint64. Updates and micro-batches count from 0."""
        first, W = update * self.per_update + micro * self.batch_size, len(self.windows)
        parts, stop = [], first + self.batch_size
        while first < stop:
            epoch, position = divmod(first, W)
            count = min(stop - first, W - position)
            parts.append(shuffled(np.arange(position, position + count), W, self.seed, epoch))
            first += count
        return np.concatenate(parts)

    def __call__(self, update: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a micro-batch: two (batch_size, T) int64 arrays."""
        return self.windows.batch(self.indices(update, micro))


def resolve_data_settings(config: TrainConfig, dataset: Dataset) -> tuple[TrainConfig, Windows]:
    """Return the config with vocab_size, max_iters and stride set from the dataset and `epochs`, and the windows.

    Raises:
        UserError: the dataset has more ids than vocab_size, a split has no window, or patience needs a val split.
    """
    meta, folder, T = dataset.meta, dataset.folder, config.context_length
    vocab_size = config.vocab_size or meta["vocab_size"]
    if vocab_size < meta["vocab_size"]:
        raise UserError(
            f"vocab_size = {vocab_size:,}: {folder} is tokenised with {meta['tokenizer']}, which has "
            f"{meta['vocab_size']:,} ids; remove vocab_size, or set it to at least that number"
        )
    windows = Windows(dataset.tokens("train"), T, config.stride)
    has_val = "val" in meta["splits"]
    if config.patience is not None and not has_val:
        raise UserError(f"patience = {config.patience}: {folder} has no val split; leave out patience, or prepare one")
    for split, tokens in (("train", windows.tokens), *([("val", dataset.tokens("val"))] if has_val else [])):
        if len(tokens) <= T:
            raise UserError(
                f"too little text: the {split} split of {folder} has {count_of(len(tokens), 'token')}, one window "
                f"needs context_length + 1 = {T + 1:,}; add text, or lower --context_length"
            )
    per_update = config.batch_size * config.grad_accum_steps
    max_iters = config.max_iters or math.ceil(config.epochs * len(windows) / per_update)
    return dataclasses.replace(config, vocab_size=vocab_size, max_iters=max_iters, stride=windows.stride), windows
