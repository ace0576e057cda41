"""The text that eval.py scores: its token ids, and its length in bytes, words and lines."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from config import EvalConfig, ModelConfig, UserError
from flatgpt.data import tokenizer
from flatgpt.data.dataset import open_dataset
from flatgpt.data.encode import load_encoder
from flatgpt.data.readers import text_chunks
from flatgpt.data.shards import Tokens, read_meta

CHUNK_TOKENS = 1 << 18  # decoded at once


@contextmanager
def open_tokens(
    config: EvalConfig,
    encoding: tiktoken.Encoding,
    model: ModelConfig,
    model_name: str,
    state: dict,
    log: Callable[[str], None],
) -> Iterator[tuple[Tokens, str]]:
    """Open the token ids to score; yields them and their name in the report.

    Args:
        encoding: the model's tokenizer.
        model: the model's shape.
        model_name: as messages name it.
        state: state.json of its checkpoint, which names the dataset it was trained on; {} of other projects' models.

    Raises:
        UserError: nothing to score, or ids of another tokenizer than the model's.
    """
    dataset_tokenizer = None
    with tempfile.TemporaryDirectory(prefix="flatgpt-") as folder:
        if config.text:
            path, name = Path(folder) / "text.bin", config.text
            with open(path, "wb") as file:
                for ids in encode_file("/dev/stdin" if config.text == "-" else config.text, encoding):
                    file.write(ids.tobytes())
            if not path.stat().st_size:
                raise UserError(f"text = {config.text}: it is empty; a text to score is expected")
            tokens = Tokens([(path, None)])
        elif config.test_data_path:
            path, name = Path(config.test_data_path), config.test_data_path
            if path.suffix in (".txt", ".md", ".json", ".jsonl"):
                raise UserError(f"test_data_path = {path}: uint16 ids are expected; a text is scored by --text {path}")
            meta = read_meta(path.parent)
            entries = [entry for split in meta["splits"].values() for entry in split["files"]] if meta else []
            count = next((entry["tokens"] for entry in entries if entry["name"] == path.name), None)
            tokens = Tokens([(path, count)])
            if count is None:
                log(f"{path} is not part of a dataset: taken as ids of the model's tokenizer, {encoding.name}")
            else:
                dataset_tokenizer = meta["tokenizer"]
        else:
            dataset = open_dataset(_dataset_folder(config, model_name, state))
            if dataset.notice:
                log(dataset.notice)
            tokens, name = dataset.tokens(config.split), f"{dataset.folder} {config.split}"
            dataset_tokenizer = dataset.meta["tokenizer"]
        if dataset_tokenizer not in (None, encoding.name):
            raise UserError(
                f"{name} is tokenised with {dataset_tokenizer}, the model {model_name} was trained with "
                f"{encoding.name}: prepare the text with the model's tokenizer, or give the text itself: --text FILE"
            )
        tokens.check_ids(model.vocab_size)
        if len(tokens) < 2 and config.protocol != "rolling":
            raise UserError(f"{name} has {len(tokens)} token: two are needed to score one, or --protocol rolling")
        yield tokens, name


def encode_file(path: str, encoding: tiktoken.Encoding) -> Iterator[np.ndarray]:
    """Tokenise a text file in chunks, with the same ids as prepare_data.py."""
    encode = load_encoder(encoding)
    for chunk, _ in tokenizer.split_text(text_chunks(Path(path)), tokenizer.MAX_ENCODE_CHARS):
        yield tokenizer.to_uint16(encode([chunk], [False]), encoding.n_vocab)


def _dataset_folder(config: EvalConfig, model_name: str, state: dict) -> Path:
    """Return the folder of --dataset, or else of the dataset that the model was trained on, which may have moved."""
    if config.dataset:
        return Path(config.data_dir) / config.dataset
    if not state:
        raise UserError(
            f"{model_name} does not say which dataset it was trained on: give --dataset, --test_data_path or --text"
        )
    folder = Path(state["data"]["folder"])
    return folder if folder.is_dir() else Path(config.data_dir) / folder.name


@dataclass(frozen=True)
class TextCounts:
    """Length of a text.

    Attributes:
        bytes: in UTF-8. Special tokens and ids beyond the tokenizer's have none.
        words: separated by white space (str.split) or special tokens.
        lines: line ends. They are not words.
    """

    bytes: int
    words: int
    lines: int


def count_text(tokens: Tokens, stop: int, encoding: tiktoken.Encoding) -> TextCounts:
    """Count the text of ids [0, stop), decoded in chunks."""
    special = np.zeros(1 << 16, dtype=bool)
    special[encoding.n_vocab :] = True
    special[[encoding.encode_single_token(word) for word in encoding.special_tokens_set]] = True
    space = encoding.encode_single_token(b" ")  # stands for special tokens, which end a word
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    size, words, lines, in_word = 0, 0, 0, False
    for start in range(0, stop, CHUNK_TOKENS):
        ids = tokens[start : min(start + CHUNK_TOKENS, stop)]
        data = encoding.decode_bytes(np.where(special[ids], space, ids).tolist())
        size += len(data) - int(special[ids].sum())
        if text := decoder.decode(data, final=start + CHUNK_TOKENS >= stop):
            words += len(text.split()) - (in_word and not text[0].isspace())
            lines += text.count("\n")
            in_word = not text[-1].isspace()
    return TextCounts(size, words, lines)
