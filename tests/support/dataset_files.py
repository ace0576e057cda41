"""Raw files, datasets and shards for tests: written by hand, prepared in this process, and read without Dataset."""

import gzip
import itertools
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from prepared import prepare, texts

from flatgpt.data.shards import ShardWriter, Tokens, write_meta
from flatgpt.data.splits import choose_split

# 160 documents, with an empty one before each two
WRITTEN = [f"{n} na\u00efve caf\u00e9s \U0001f388" * (1 + n % 5) if n % 3 else (None, "")[n % 2] for n in range(240)]
LONG = "".join(f"{n} bottles on the wall,\r\n{n % 7 * ' '}na\u00efve caf\u00e9s \U0001f388\n\n" for n in range(90))


# ---------------------------------------------------------------------------------------------------------------------
# raw files


def write(path: Path, written: list[str | None]) -> None:
    """Write the texts as documents of a file, in the format of its suffix; of .txt, one file each in a folder."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(written)).encode()
    if path.suffix == ".parquet":
        table = pyarrow.table({"n": range(len(written)), "text": pyarrow.array(written, pyarrow.string())})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".txt":
        path.with_suffix("").mkdir()
        for n, text in enumerate(written):
            (path.with_suffix("") / f"{n:04d}.txt").write_bytes((text or "").encode())
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def mixed() -> list[str]:
    """Write files of all formats to in/; return their documents in order."""
    odd = [" \n", "<|endoftext|>", "a<|endoftext|>b\n", "x" * 2000, "\u3000\u6771\u4eac\u3000", "\r\n", LONG]
    parts = [WRITTEN[:80], [*WRITTEN[80:150], *odd], WRITTEN[150:200], [*odd, *WRITTEN[200:]]]
    for name, part in zip(("a.parquet", "b.jsonl", "c.txt", "d.jsonl.gz"), parts, strict=True):
        write(Path("in", name), part)
    Path("in/c/long.md").write_bytes(b"\xef\xbb\xbf" + LONG.encode())
    return [text for part in (*parts[:3], [LONG], parts[3]) for text in part if text]


# ---------------------------------------------------------------------------------------------------------------------
# datasets


def hub_data(written: dict[str, list[str | None]], **keys):
    """A dataset of user/data's files, {name: texts}, put into raw_dir by hand; in bytes."""
    for name, parts in written.items():
        write(Path("raw/hub/user/data", name), parts)
    return prepare("hub", **{"repo": "user/data", "raw_dir": "raw", "tokenizer": "byte", "val_fraction": 0.1, **keys})


def texts_by_split(data) -> dict[str, list[str]]:
    return {split: texts(data, split) for split in data.meta["splits"]}


def by_hash(written, val=0.1, test=0.0) -> dict[str, list[str]]:
    """What each split holds of 100 documents or more."""
    found = {"train": [], "val": [], "test": []}
    for text in filter(None, written):
        found[choose_split({"test": test, "val": test + val}, [text])].append(text)
    return found


def by_characters(written, val=0.1, test=0.0) -> dict[str, list[str]]:
    """What each split holds of fewer: each different text counts once, and a border is moved to a start or a space."""
    kept = [*filter(None, written)]
    starts, total = {}, 0
    for text in kept:
        if text not in starts:
            starts[text] = total
            total += len(text)
    borders = 0, int(total * (1 - val - test)), int(total * (1 - test)), total
    shift = min(200, *(size // 2 for size in (b - a for a, b in itertools.pairwise(borders)) if size))
    found = {"train": [], "val": [], "test": []}

    def moved(text: str, border: int) -> int:
        places = range(max(0, border - shift), border + 1) if 0 < border < len(text) and len(kept) > 1 else ()
        for wanted in (lambda place: place == 0, lambda n: text[n - 1] == "\n", lambda n: text[n - 1] == " "):
            if good := [place for place in places if wanted(place)]:
                return good[-1]
        return max(0, border)

    for text in kept:
        for split, ends in zip(found, itertools.pairwise(borders), strict=True):
            start, stop = (moved(text, end - starts[text]) for end in ends)
            if part := text[start:stop]:
                found[split].append(part)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# shards

# What a manifest says of the tokenizer, where only ids are read.
FACTS = {"tokenizer": "byte", "vocab_size": 257, "ranks_sha256": "", "eot_id": 256, "end_of_text": True}


def shard(path: Path, ids) -> tuple[Path, int]:
    ids = np.asarray(ids, dtype="<u2")
    path.write_bytes(ids.tobytes())
    return path, ids.size


def tokens(folder: Path, *parts) -> Tokens:
    """Tokens over one shard file per part."""
    return Tokens([shard(folder / f"train_{n:06d}.bin", part) for n, part in enumerate(parts)])


def llmc(path: Path, ids, magic=20240520, count=None, dtype="<u2") -> Path:
    """A file as llm.c's data scripts and modded-nanogpt's write it."""
    ids = np.asarray(ids, dtype=dtype)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, count or ids.size
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


def nanogpt(folder: Path, **splits) -> Path:
    """A folder as nanoGPT's data/*/prepare.py leave it."""
    folder.mkdir(exist_ok=True)
    for split, ids in splits.items():
        shard(folder / f"{split}.bin", ids)
    return folder


def finished(folder: Path, splits: dict, shard_tokens=10**6, n_vocab=257, **meta) -> Path:
    """A finished dataset of {split: lists of ids}."""
    folder.mkdir()
    entries = {}
    for split, documents in splits.items():
        writer = ShardWriter(folder, split, n_vocab, shard_tokens)
        for ids in documents:
            writer.add(ids)
        entries[split] = writer.close()
    write_meta(folder, {**FACTS, "vocab_size": n_vocab, "splits": entries, **meta})
    return folder


def cut(path: Path) -> None:
    """Take the last id away."""
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    """Change one bit of the last id's lower byte."""
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def wrong_id(path: Path) -> None:
    """Make the last id 257, which byte's vocabulary does not have."""
    path.write_bytes(path.read_bytes()[:-2] + (257).to_bytes(2, "little"))


@contextmanager
def limit(name: str, value: int):
    """Set a soft limit of this process, a name in `resource`."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(getattr(resource, name))
    resource.setrlimit(getattr(resource, name), (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(getattr(resource, name), before)


def full_disk(room: int):
    """No file can grow past `room` bytes: a real write error in the middle of a file."""
    return limit("RLIMIT_FSIZE", room)
