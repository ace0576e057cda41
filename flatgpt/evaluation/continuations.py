"""Prompts taken from a split, continued by a model, and compared with the text that follows them there.

require_packages()
prompts = select_prompts(tokens, 100, prompt_tokens=64, new_tokens=64, end_of_text=encoding.eot_token)
continuations = generate_continuations(decoder, encoding, prompts, 64, SamplingConfig())
figures = score_continuations(encoding, prompts, continuations)
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import tiktoken

from config import SamplingConfig, UserError
from flatgpt.data.shards import Tokens
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate_batch
from flatgpt.inference.writer import Text
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext

PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}  # module -> package


def require_packages() -> None:
    """Raise UserError if a package is missing that score_continuations needs, before hours of work."""
    if missing := [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"BLEU and ROUGE need {' and '.join(missing)}: pip install -r requirements-extra.txt")


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt and of the text that follows it."""

    ids: list[int]
    reference: list[int]


def select_prompts(tokens: Tokens, n: int, prompt_tokens: int, new_tokens: int, end_of_text: int) -> list[Prompt]:
    """Take n prompts at equal distances from a split; in a short split they overlap.

    A prompt may span documents, as the windows of training do. A reference ends before its first end-of-text; a prompt
    whose reference would be empty is left out.

    Raises:
        UserError: the split is shorter than a prompt and its continuation, or no prompt is left.
    """
    span = prompt_tokens + new_tokens
    last = len(tokens) - span
    if last < 0:
        raise UserError(
            f"a prompt of {prompt_tokens:,} tokens and {new_tokens:,} to compare with do not fit into a split of "
            f"{len(tokens):,}: lower --prompt_tokens or --max_new_tokens"
        )
    prompts, n = [], min(n, last + 1)
    for i in range(n):
        start = i * last // max(1, n - 1)
        ids = tokens[start : start + span].tolist()
        reference = ids[prompt_tokens:]
        if end_of_text in reference:
            reference = reference[: reference.index(end_of_text)]
        if reference:
            prompts.append(Prompt(ids[:prompt_tokens], reference))
    if not prompts:
        raise UserError(
            f"after each of the {n:,} prompts comes end-of-text: there is no text to compare with; "
            "take another --prompt_tokens or --generate"
        )
    return prompts


def generate_continuations(
    decoder: Decoder,
    encoding: tiktoken.Encoding,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    options: SamplingConfig,
    batch_size: int = 32,
    ranks: DistributedContext = SINGLE_PROCESS,
    progress: Callable[[list], Iterable] = iter,
) -> list[list[int]]:
    """Return the ids that the model generates after each prompt, up to end-of-text.

    They do not depend on batch_size or on the number of ranks.

    Args:
        ranks: the processes that share the batches.
        progress: wraps the list of batches, as tqdm does.
    """
    generated = []
    for first in progress([*range(0, len(prompts), batch_size)][ranks.rank :: ranks.world]):
        batch = [prompt.ids for prompt in prompts[first : first + batch_size]]
        rows = [[] for _ in batch]
        settings = {"n_vocab": encoding.n_vocab, "stop_ids": (encoding.eot_token,), "first_row": first}
        for tokens in generate_batch(decoder, batch, max_new_tokens, options, **settings):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        generated += enumerate(rows, first)
    return [ids for _, ids in sorted(pair for part in ranks.all_gather(generated) for pair in part)]


def score_continuations(
    encoding: tiktoken.Encoding, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
) -> dict:
    """Return the figures of continuations under the keys of report.ROWS.

    bleu: sacrebleu's corpus BLEU, 0 to 100 (Papineni et al., 2002), with its signature. rouge_l: mean F-measure of
    rouge-score's rougeL without stemming, 0 to 1 (Lin, 2004); its words are runs of a-z and 0-9, so text in other
    scripts has none. distinct_1, distinct_2: Li et al., 2016. repetition: seq-rep-4, Welleck et al., 2020.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    bleu, rouge = BLEU(force=True), RougeScorer(["rougeL"])  # force: no warning about WikiText's " ."
    texts = [text_after(encoding, prompt.ids, ids) for prompt, ids in zip(prompts, continuations, strict=True)]
    references = [text_after(encoding, prompt.ids, prompt.reference) for prompt in prompts]
    rouge_l = [rouge.score(*pair)["rougeL"].fmeasure for pair in zip(references, texts, strict=True)]
    return {
        "prompts": len(prompts),
        "bleu": bleu.corpus_score(texts, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "rouge_l": sum(rouge_l) / len(prompts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": repetition(continuations),
        "reference_distinct_1": distinct(references, 1),
        "reference_distinct_2": distinct(references, 2),
        "reference_repetition": repetition([prompt.reference for prompt in prompts]),
    }


def text_after(encoding: tiktoken.Encoding, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of ids, without a character whose first bytes belong to the prompt."""
    text = Text(encoding)
    for token in prompt:
        text.append(token)
    prompt_characters = len(text.written)
    for token in ids:
        text.append(token)
    text.end()
    return text.written[prompt_characters:]


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the share of distinct n-grams of words (split at white space) in all texts; NaN if there are none."""
    ngrams = [ngram for text in texts for ngram in _ngrams(text.split(), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """Return the share of repeated n-grams of ids, the mean over sequences that have any; NaN if none has."""
    shares = [1 - len(set(ngrams)) / len(ngrams) for ids in sequences if (ngrams := _ngrams(ids, n))]
    return sum(shares) / len(shares) if shares else math.nan


def _ngrams(items: Sequence, n: int) -> list[tuple]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
