"""What tests of scores share: windows as pairs of inputs and targets, a small vocabulary, and questions."""

import numpy as np
import tiktoken

from flatgpt.evaluation.metrics import IGNORE, eval_batches, find_documents
from flatgpt.evaluation.multiple_choice import Question

FIRST = 7  # the id in front of a text
Pairs = list[tuple[list[int], list[int]]]  # of each window its inputs, and those of its last targets that are scored


def read_windows(ids: list[int], T: int, batch_size: int = 3, rolling: bool = False, **options) -> list[Pairs]:
    """The windows of each batch without their padding (no id is 0)."""
    ids, found = np.array(ids, dtype=np.uint16), []
    if rolling:
        options |= {"documents": find_documents(ids, FIRST, options.pop("limit"), T), "first_id": FIRST}
    for x, y in eval_batches(ids, T, batch_size, **options):
        assert x.shape == y.shape == (len(x), (x != 0).sum(1).max() if rolling else T)
        assert x.dtype == y.dtype == np.int64
        found.append([])
        for inputs, targets in zip(x, y, strict=True):
            n, scored = np.count_nonzero(inputs), targets != IGNORE
            assert scored.sum() == scored[n - scored.sum() : n].sum(), "the last ones of a window"
            found[-1].append((inputs[:n].tolist(), targets[scored].tolist()))
    return found


def strided_loop(text: list[int], max_length: int, stride: int) -> Pairs:
    """The loop of transformers' documentation on the perplexity of models with a fixed length.

    A window there has `max_length` ids, whose labels the model shifts by one: its first id is not a target.
    """
    pairs, prev_end = [], 0
    for begin in range(0, len(text), stride):
        end = min(begin + max_length, len(text))
        unscored = prev_end - begin if prev_end else 0  # labels that the loop sets to -100
        pairs.append((text[begin : end - 1], text[begin:end][max(1, unscored) :]))
        prev_end = end
        if end == len(text):
            break
    return [pair for pair in pairs if pair[1]]


def rolling_loop(text: list[int], T: int, first: int = FIRST) -> Pairs:
    """Chunks of T targets of each document, the last one shorter; each has the T inputs before its end, or fewer."""
    pairs, documents = [], [[]]
    for i in text:
        documents.append([]) if i == first else documents[-1].append(i)
    for document in filter(None, documents):
        ids, ends = [first, *document], [*range(T, len(document), T), len(document)]
        pairs += [(ids[max(0, end - T) : end], document[(end - 1) // T * T : end]) for end in ends]
    return pairs


PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's
MERGES = [(b".", b" "), (b"n", b" "), (b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"o", b"n")]
RANKS = {bytes([b]): b for b in range(256)} | {a + b: 256 + n for n, (a, b) in enumerate(MERGES)}
# Bytes, MERGES and end-of-text. In the second a token may hold a word's last character and the space behind it.
ENCODINGS = {
    name: tiktoken.Encoding(
        "tiny", pat_str=pattern, mergeable_ranks=RANKS, special_tokens={"<|endoftext|>": len(RANKS)}
    )
    for name, pattern in (("words", PATTERN), ("no borders", r"[\s\S]+"))
}
CONTEXT = 24
LONG = "the cat sat on the mat. then it slept on and on. "  # longer than CONTEXT
QUESTIONS = [
    Question("the cat sat on", ["the mat.", "a hat", "then", "on on on"], 0),
    Question("the dog ran on.", ["on and on", "then off"], 1),
    Question("", ["no context", "the start", "x"], 1),
    Question(" \n", ["only a space", "x"], 0),
    Question("ends in spaces \t ", ["the end", "none", "on. the"], 2),
    Question(LONG, ["the end", "on and on the end of it", "x"], 1),
    Question(LONG * 3, ["t" * (CONTEXT - 1), "x"], 0),  # with its space an ending of CONTEXT tokens
    Question("naïve 東京 🎈.", ["café 🎈", "on", "é"], 2),
    Question("<|endoftext|>", ["<|endoftext|> x", "y"], 0),
]
