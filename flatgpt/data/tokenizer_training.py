"""Make tokenizers: train a byte-level BPE on the training split, and add special tokens to a tokenizer.

train(texts, "bpe:8192", ["<|user|>"])  # its last ids: <|endoftext|>, <|user|>

The same text gives the same ids, whatever the number of threads. The tokenizers library (an extra) counts words and
merges them; what it returns is written in the form of tokenizer_files.py, as of any other tokenizer.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import tiktoken

from config import PrepareConfig, UserError
from flatgpt.data.chunks import split_text
from flatgpt.data.readers import Corpus
from flatgpt.data.sources import Plan, split_tasks
from flatgpt.data.splits import chunks_by_split
from flatgpt.data.text_files import TYPICAL_RATIO, file_format, suffixes
from flatgpt.data.tokenizer import MARKS_PATTERN, PATTERN, CharacterTokenizer, FileTokenizer
from flatgpt.data.tokenizer_files import CHAR_TO_BYTE, END_OF_TEXT, FLAGS, tokenizer_json
from flatgpt.data.tokenizer_reader import MAX_IDS

TRAINED = re.compile("bpe:(.*)")
PIECE_CHARS = 2_000  # the library takes about 100 bytes a character of each text that it splits into words
MIN_COUNT = 2  # a pair that occurs once is not merged
MAX_TOKEN_BYTES = 128  # a line of a million hyphens would give tokens of any length


def trained_size(name: str, special_tokens: Sequence[str] = ()) -> int | None:
    """Return N of the name bpe:N; None if it is another tokenizer's name.

    Raises:
        UserError: N is not a number from 257, with special tokens more, to 65,536; the tokenizers library is missing;
            or a special token is empty or given twice.
    """
    match = TRAINED.fullmatch(name)
    if not match:
        return None
    low = 257 + len(special_tokens)
    if not re.fullmatch("[0-9]{1,9}", match[1]) or not low <= int(match[1]) <= MAX_IDS:
        parts = "256 bytes, <|endoftext|>" + f" and {len(special_tokens)} special tokens" * bool(special_tokens)
        raise UserError(f"tokenizer {name}: bpe:N needs a number of ids from {low} ({parts}) to {MAX_IDS:,}")
    try:
        import tokenizers  # noqa: F401 - before the text is read
    except ImportError:
        raise UserError("--tokenizer bpe:N: pip install -r requirements-extra.txt (tokenizers)") from None
    _check_special(name, {END_OF_TEXT}, special_tokens)
    return int(match[1])


def split_texts(config: PrepareConfig, corpus: Corpus, plan: Plan, split: str, limit: int) -> Iterator[str]:
    """Yield texts of a split, of at most `limit` bytes together.

    If the files of the training split are larger, the tasks that are read are spread evenly over them.
    """
    origin = split if split in corpus.files else "train"  # the source's split that it is made of
    files, borders, taken, tasks = corpus.files[origin], plan.borders if origin == "train" else None, 0, 0
    packed = (file_format(file.name) == "parquet" or suffixes(file.name)[1] for file in files)
    size = sum(file.size * (TYPICAL_RATIO if each else 1) for file, each in zip(files, packed, strict=True))
    share = 1 if config.sample_size or split != "train" else min(1, limit / max(1, size))
    for n, task in enumerate(split_tasks(config, files, borders)):
        if n * share >= tasks:
            tasks += 1
            for chunk in chunks_by_split(borders, task._replace(split=origin)).get(split, ()):
                yield chunk.text[: limit - taken]
                taken += len(chunk.text.encode())
                if taken >= limit:
                    return


def train(
    texts: Iterable[str], name: str, special_tokens: Sequence[str] = (), size: int | None = None
) -> FileTokenizer:
    """Return a byte-level BPE of N ids that is trained on the texts, with MARKS_PATTERN.

    The first ids are the bytes, the last ones end-of-text and the special tokens.

    Args:
        name: bpe:N.
        size: bytes of the texts, for the progress bar.

    Raises:
        UserError: as trained_size; or the texts have too few repeated words for N ids.
    """
    ids = trained_size(name, special_tokens)
    from tokenizers import Regex, Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tqdm import tqdm

    special = [END_OF_TEXT, *special_tokens]
    counted = Tokenizer(models.BPE())
    words = Split(Regex(MARKS_PATTERN), "isolated")
    counted.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=ids - len(special),
        min_frequency=MIN_COUNT,
        show_progress=False,
        initial_alphabet=sorted(CHAR_TO_BYTE),
        max_token_length=MAX_TOKEN_BYTES,
    )
    seconds = 0.1 if sys.stderr.isatty() else 60  # between updates of the progress bar
    bar = tqdm(None, name, size, unit="B", unit_scale=True, delay=seconds, mininterval=seconds)

    def pieces() -> Iterator[str]:
        for text in texts:
            for piece in split_text([text], PIECE_CHARS):
                if done.cancelled():
                    raise InterruptedError  # ends the library's call
                yield piece
            bar.update(len(text.encode()))
        bar.set_postfix_str("merging", refresh=sys.stderr.isatty())

    def count_and_merge() -> None:
        try:
            counted.train_from_iterator(pieces(), trainer)
        except BaseException as error:  # of reading the texts
            done.cancelled() or done.set_exception(error)
        else:
            done.cancelled() or done.set_result(None)

    # The library calls pieces() in threads of its own, and returns when it is done: in the main thread, a signal would
    # have no effect until then.
    done, thread = Future(), threading.Thread(target=count_and_merge, daemon=True)
    try:
        with bar:
            thread.start()
            done.result()
    finally:
        done.cancel()
        thread.join(timeout=5)  # a thread that is in pieces() when Python exits would abort the process
    vocab = counted.get_vocab(with_added_tokens=False)
    ranks = {bytes(map(CHAR_TO_BYTE.get, token)): n for token, n in vocab.items()}
    if len(ranks) < ids - len(special):
        found = len(ranks) + len(special)
        problem = f"tokenizer {name}: the training split gives only {found:,} ids"
        raise UserError(f"{problem}: choose a smaller N or more text")
    _check_special(name, {*ranks}, special_tokens)
    return FileTokenizer(
        name, MARKS_PATTERN, ranks, dict(zip(special, range(len(ranks), ids), strict=True)), END_OF_TEXT
    )


def add_special_tokens(encoding: tiktoken.Encoding, special_tokens: Sequence[str]) -> FileTokenizer:
    """Return a tokenizer with more added tokens, whose ids follow its last id.

    Raises:
        UserError: a token is empty, given twice or present; the ids exceed 65,536; or it is a tokenizer of characters.
    """
    if isinstance(encoding, CharacterTokenizer):
        raise UserError(f"--special_tokens: tokenizer {encoding.name} has characters only; choose another tokenizer")
    _check_special(encoding.name, {*encoding.special_tokens_set, *encoding._mergeable_ranks}, special_tokens)
    first = encoding.n_vocab
    if first + len(special_tokens) > MAX_IDS:
        raise UserError(f"--special_tokens: tokenizer {encoding.name} would have more than {MAX_IDS:,} ids")
    new = dict(zip(special_tokens, range(first, MAX_IDS), strict=False))
    flags = {**dict.fromkeys(FLAGS, False), "special": True}
    data = json.loads(tokenizer_json(encoding))
    data["added_tokens"] = [
        *(data.get("added_tokens") or ()),
        *({"id": n, "content": t, **flags} for t, n in new.items()),
    ]
    content = (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode()
    name, pattern, end, rules = f"{encoding.name}_special", PATTERN, END_OF_TEXT, {}
    if isinstance(encoding, FileTokenizer):
        name, end, rules = encoding.name, encoding.end_of_text, encoding.rules
    if encoding.name != "byte" or isinstance(encoding, FileTokenizer):
        pattern = encoding._pat_str  # any pattern gives the ids of `byte`
    return FileTokenizer(name, pattern, encoding._mergeable_ranks, encoding._special_tokens | new, end, rules, content)


def _check_special(name: str, present: set[str | bytes], special_tokens: Sequence[str]) -> None:
    """Raise UserError unless these tokens can be added to those that are present."""
    for n, token in enumerate(special_tokens):
        if not token.strip():
            raise UserError(f"--special_tokens {token!r}: it has only white space; choose another token")
        if token in special_tokens[:n]:
            raise UserError(f"--special_tokens {token}: given twice")
        if {token, token.encode()} & present:
            raise UserError(f"--special_tokens {token}: tokenizer {name} has this token already; leave it out")
