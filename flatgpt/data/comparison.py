"""Compare tokenizers on a text: how many tokens it has with each, and how many of their ids it uses."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator

import numpy as np

from config import SOURCE_SETTINGS, PrepareConfig, UserError, tokenizer_names
from flatgpt.data import tokenizer
from flatgpt.data.chunks import Chunk
from flatgpt.data.encode import encode_chunks, load_encoder
from flatgpt.data.sources import make_plan, open_text
from flatgpt.data.tokenizer_names import find as find_tokenizer
from flatgpt.data.tokenizer_training import split_texts, train, trained_size


def compare(config: PrepareConfig, log: Callable[[str], None] = print) -> list[tuple[str, ...]]:
    """Return the rows of a table: for each tokenizer its ids, bytes per token, tokens per word and unused ids.

    Tokens are counted on the validation split, on which bpe:N is not trained. An id is unused if it occurs neither
    there nor in the training split. At most tokenizer_sample_mb of each split are read.

    Args:
        log: called with a line that says what was measured.

    Raises:
        UserError: as prepare.
    """
    names = tokenizer_names(config.tokenizer or SOURCE_SETTINGS["compare"].tokenizer)
    config = dataclasses.replace(config, source="text", tokenizer=None, splits=("train", "val"))
    encodings = {}
    for name in names:  # raise errors before the text is read
        encodings[name] = None if trained_size(name) else find_tokenizer(name, config.data_dir) or tokenizer.load(name)
    corpus = open_text(config)
    if corpus.notice:
        log(corpus.notice)
    plan, limit = make_plan(config, corpus), config.tokenizer_sample_mb * 10**6
    texts = functools.partial(split_texts, config, corpus, plan, limit=limit)
    words, val_bytes = 0, 0
    for text in texts("val"):
        words += len(text.split())
        val_bytes += len(text.encode())
    if not words:
        raise UserError("too little text: the validation split has no word; change --val_fraction")
    rows, trained, train_bytes = [("tokenizer", "ids", "bytes/token", "tokens/word", "unused ids")], False, 0
    for name, encoding in encodings.items():
        trained |= encoding is None
        try:
            encoding = encoding or train(texts("train"), name, size=min(plan.size, limit))
            used, tokens, train_bytes = np.zeros(encoding.n_vocab, bool), 0, 0
            for split in ("val", "train"):
                for ids, size in _encode(encoding, texts(split)):
                    used[ids] = True
                    tokens += len(ids) if split == "val" else 0
                    train_bytes += size if split == "train" else 0
        except UserError as error:  # too little text for N ids, or a character that a tokenizer lacks
            log(str(error))
            rows.append((name, *[""] * 4))
            continue
        unused = int((~used).sum())
        ratios = f"{val_bytes / tokens:.2f}", f"{tokens / words:.2f}"
        rows.append((name, f"{encoding.n_vocab:,}", *ratios, f"{unused:,} ({unused / encoding.n_vocab:.0%})"))
    text = f"tokens of the validation split ({val_bytes:,} bytes, {words:,} words between white space)"
    log(f"{text}; unused: ids that neither it nor {train_bytes:,} bytes of the training split have")
    if trained:
        log("bpe:N is trained on the training split only")
    return rows


def _encode(encoding, texts: Iterator[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield ids and bytes of each text, with a progress bar on a terminal."""
    from tqdm import tqdm

    encode = load_encoder(encoding)
    with tqdm(None, encoding.name, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for text in texts:
            ids, _, size = encode_chunks(encoding, encode, [Chunk(text)], False)
            bar.update(size)
            yield ids, size
