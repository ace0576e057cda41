"""Make datasets in the process of the tests, and read them back."""

from pathlib import Path

import pytest

from config import PrepareConfig, UserError
from flatgpt.data import prepare as preparation


def prepare(source, log=lambda line: None, **keys):
    """Make the dataset of a source in data/."""
    return preparation.prepare(PrepareConfig(source=source, **keys), log)


def from_text(*inputs, log=lambda line: None, **keys):
    """Make data/text_byte of the user's files."""
    return prepare("text", log, **{"input": tuple(map(str, inputs)), "tokenizer": "byte", **keys})


def refusal(*args, **keys) -> str:
    """Return the error of `from_text`."""
    with pytest.raises(UserError) as caught:
        from_text(*args, **keys)
    return str(caught.value)


def texts(data, split) -> list[str]:
    """Return the documents of a split over bytes, which end-of-text ids separate."""
    ids = data.tokens(split)[:].tolist()
    if not data.meta["end_of_text"]:
        return [bytes(ids).decode()]
    assert ids[-1] == 256
    ends = [n for n, i in enumerate(ids) if i == 256]
    return [bytes(ids[a + 1 : b]).decode() for a, b in zip([-1, *ends], ends, strict=False)]


def content(folder: Path) -> dict[str, bytes]:
    """The files of a dataset. A process that was killed leaves its lock, which blocks nobody."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def files(folder: Path, **named) -> None:
    """Write `a="..."` to a.txt, with its newlines as they are."""
    for name, text in named.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
