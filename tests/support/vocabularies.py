"""Tokenizers other than GPT-2's, trained by Hugging Face's library, and runs, models and datasets that use them."""

import functools
import pickle
import tempfile
from pathlib import Path

import numpy as np
from exported import save_run
from gpt2_reference import random_gpt2
from transformers import AutoTokenizer

from flatgpt.data import tokenizer, tokenizer_reader
from flatgpt.data.shards import file_sha256, write_meta
from flatgpt.data.tokenizer_files import tokenizer_files, tokenizer_json

HINDI = "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n"
THAI = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ\n"
TEXT = (HINDI + THAI + "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι 🎈👩‍🚀👍🏽\n") * 4
ADDED = ("<|user|>", "<|assistant|>")


@functools.cache
def _trained(size: int):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in tokenizer_files(tokenizer.load("byte"), 64).items():
            Path(folder, name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder).train_new_from_iterator([TEXT], size)


def write_bpe(folder: Path | str, added=ADDED, size: int = 400):
    """Write a tokenizer of TEXT with these added tokens to a folder. Return it as transformers reads it."""
    _trained(size).save_pretrained(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    reference.add_special_tokens({"additional_special_tokens": [*added]})
    reference.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def write_model(folder: Path | str, reference, **changes) -> None:
    """Write a random GPT-2 of transformers with as many ids as a tokenizer has beside it."""
    random_gpt2(**{"vocab_size": len(reference), "eos_token_id": reference.eos_token_id, **changes}).save_pretrained(
        folder
    )


def bpe(folder: Path | str = "bpe", **options) -> tokenizer.FileTokenizer:
    """Write a tokenizer as write_bpe, and return it as flatGPT reads it."""
    write_bpe(folder, **options)
    return tokenizer_reader.read(Path(folder))


def characters(text: str = TEXT) -> tokenizer.CharacterTokenizer:
    """Return nanoGPT's tokenizer of a text."""
    return tokenizer.CharacterTokenizer("letters", {char: n for n, char in enumerate(sorted(set(text)))})


def save_run_of(encoding: tokenizer.FileTokenizer, run_dir="out/r", **settings):
    """Save a run as save_run whose tokenizer is read from the checkpoint."""
    facts = {"name": encoding.name, "vocab_size": encoding.n_vocab, "eot_id": encoding.eot_token}
    state = {"tokenizer": {**facts, "ranks_sha256": tokenizer.ranks_hash(encoding)}}
    settings = {"vocab_size": encoding.n_vocab, **settings}
    return save_run(run_dir, state=state, tokenizer_file=tokenizer_json(encoding), **settings)


def write_dataset(folder: Path | str, encoding, text: str = TEXT, **changes) -> Path:
    """Write shards of a text, the same for training and validation, as prepare_data.py does."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    ids, splits = encoding.encode_ordinary(text), {}
    for split in ("train", "val"):
        path = folder / f"{split}_000000.bin"
        path.write_bytes(np.array(ids, "<u2").tobytes())
        file = {"name": path.name, "tokens": len(ids), "sha256": file_sha256(path)}
        splits[split] = {"tokens": len(ids), "documents": 1, "bytes": len(text.encode()), "files": [file]}
    if isinstance(encoding, tokenizer.FileTokenizer):
        (folder / "tokenizer.json").write_bytes(tokenizer_json(encoding))
    facts = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "ranks_sha256": tokenizer.ranks_hash(encoding)}
    facts |= {"eot_id": encoding.eot_token, "end_of_text": False, "source": "text", "splits": splits}
    write_meta(folder, facts | changes)
    return folder


def write_nanogpt_characters(path: Path | str, ids: dict[str, int]) -> None:
    """Write meta.pkl as nanoGPT's data/shakespeare_char/prepare.py does."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    meta = {"vocab_size": len(ids), "itos": {n: char for char, n in ids.items()}, "stoi": ids}
    Path(path).write_bytes(pickle.dumps(meta))
