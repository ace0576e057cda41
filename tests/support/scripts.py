"""Text in many scripts, and byte-pair vocabularies that the `tokenizers` library trains on it."""

import functools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from flatgpt.data.tokenizer import MARKS_PATTERN, TOKENIZER_FILE, FileTokenizer
from flatgpt.data.tokenizer_reader import read_json

# Article 1 of the Universal Declaration of Human Rights: {script: text}
LINES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
SCRIPTS = dict(line.split(": ", 1) for line in LINES)
# GPT-4's, which most trained vocabularies copy
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(regex: bool = False) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level()])


PRE_TOKENIZERS = {
    "marks": split(MARKS_PATTERN),
    "GPT-2": byte_level(regex=True),
    "cl100k": split(CL100K_PATTERN),
    "single digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(regex=True)]),
    "letters only": split(r"\p{L}+"),  # what is between them is a piece, too
}


def train(texts, how: str = "marks", size: int = 1500, special: tuple[str, ...] = ("<|endoftext|>",)) -> Tokenizer:
    """Return a byte-level BPE; the first ids are those of the special tokens."""
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer, reference.decoder = PRE_TOKENIZERS[how], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator(texts, trainer)
    return reference


@functools.cache
def trained(how: str = "marks") -> str:
    """Return the tokenizer.json of a vocabulary trained on all scripts."""
    return train(SCRIPTS.values(), how).to_str()


def saved(folder: Path, content: str | dict, **files: dict) -> Path:
    """Return a folder with a tokenizer.json, and with other JSON files: tokenizer_config={...}."""
    folder.mkdir(exist_ok=True)
    for name, data in {Path(TOKENIZER_FILE).stem: content, **files}.items():
        text = data if isinstance(data, str) else json.dumps(data)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def without_content(encoding: FileTokenizer) -> FileTokenizer:
    """Return the same tokenizer as if it had not been read from a tokenizer.json."""
    return FileTokenizer(*(*encoding.__getstate__()[:-1], b""))


def read_text(folder: Path, content: str | dict) -> FileTokenizer:
    """Return the tokenizer of a tokenizer.json with this content."""
    return read_json(saved(folder, content) / TOKENIZER_FILE, "trained")
