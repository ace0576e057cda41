"""Prompts cut from a split, continued by a model, and compared with how the text went on.

require()
places = cut(tokens, 100, prompt_tokens=64, new_tokens=64, end_of_text=encoding.eot_token)
written = continue_all(decoder, encoding, places, 64, SamplingConfig())
scores = compare(encoding, places, written)
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
from flatgpt.inference.sampling import TextStream, generate_batch

EXTRAS = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}  # module -> package


def require() -> None:
    """Raise UserError where a package that `compare` needs is missing: before hours of work, not after."""
    if missing := [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]:
        needs = f"BLEU and ROUGE need {' and '.join(missing)}"
        raise UserError(f"{needs}: pip install -r requirements-extra.txt")


@dataclass(frozen=True)
class Place:
    """A prompt and how the text goes on after it, in ids."""

    prompt: list[int]
    reference: list[int]


def cut(tokens: Tokens, n: int, prompt_tokens: int, new_tokens: int, end_of_text: int) -> list[Place]:
    """n places of a split, from its start to its end at equal distances; in a short one they overlap.

    A prompt may reach over the end of a document, as the windows of training do. A reference ends before its first
    end-of-text; a place that would have an empty one is left out.

    Args:
        tokens: only what is returned is read of it.

    Raises:
        UserError: the split is shorter than one prompt and its continuation, or nothing is left.
    """
    span = prompt_tokens + new_tokens
    room = len(tokens) - span
    if room < 0:
        raise UserError(
            f"a prompt of {prompt_tokens:,} tokens and {new_tokens:,} to compare with do not fit into a split of "
            f"{len(tokens):,}: lower --prompt_tokens or --max_new_tokens"
        )
    places, n = [], min(n, room + 1)
    for i in range(n):
        start = i * room // max(1, n - 1)
        ids = tokens[start : start + span].tolist()
        reference = ids[prompt_tokens:]
        if end_of_text in reference:
            reference = reference[: reference.index(end_of_text)]
        if reference:
            places.append(Place(ids[:prompt_tokens], reference))
    if not places:
        raise UserError(
            f"after each of the {n:,} prompts comes end-of-text: there is no text to compare with; "
            "take another --prompt_tokens or --generate"
        )
    return places


def continue_all(
    decoder: Decoder,
    encoding: tiktoken.Encoding,
    places: Sequence[Place],
    max_new_tokens: int,
    options: SamplingConfig,
    batch_size: int = 32,
    share: tuple[int, int] = (0, 1),
    all_gather: Callable[[list], list[list]] = lambda mine: [mine],
    watch: Callable[[list], Iterable] = iter,
) -> list[list[int]]:
    """The ids that the model writes after each prompt, up to end-of-text; the same for any batch size and ranks.

    Args:
        share: (rank, world): this process writes every world-th batch.
        all_gather: the values that all ranks have here (ranks.DistributedContext.all_gather).
        watch: gives the list of batches, each the number of its first place, and may show how far it is.
    """
    mine = []
    for first in watch([*range(0, len(places), batch_size)][share[0] :: share[1]]):
        prompts = [place.prompt for place in places[first : first + batch_size]]
        written = [[] for _ in prompts]
        settings = {"n_vocab": encoding.n_vocab, "stop_ids": (encoding.eot_token,), "first_row": first}
        for tokens in generate_batch(decoder, prompts, max_new_tokens, options, **settings):
            for ids, token in zip(written, tokens, strict=True):
                if token is not None:
                    ids.append(token)
        mine += enumerate(written, first)
    return [ids for _, ids in sorted(pair for part in all_gather(mine) for pair in part)]


# ---------------------------------------------------------------------------------------------------------------------
# figures


@dataclass(frozen=True)
class ContinuationScores:
    """Figures of continuations; what asks no reference is given for the references too.

    Attributes:
        prompts: how many were continued.
        bleu: of all continuations together, 0 to 100 (sacrebleu's corpus BLEU; Papineni et al., 2002).
        bleu_signature: sacrebleu's, the settings without which BLEU cannot be compared.
        rouge_l: mean F-measure, 0 to 1 (rouge-score's rougeL without stemming; Lin, 2004). Its words are runs of a-z
            and 0-9 in lower case: text in other scripts has none.
        distinct_1, distinct_2: different words, or pairs of words, over all of them, in all continuations together
            (Li et al., 2016); words are what white space separates.
        repetition: share of a continuation's runs of 4 tokens that were there before in it, the mean over those that
            have one (seq-rep-4; Welleck et al., 2020).
    """

    prompts: int
    bleu: float
    bleu_signature: str
    rouge_l: float
    distinct_1: float
    distinct_2: float
    repetition: float
    reference_distinct_1: float
    reference_distinct_2: float
    reference_repetition: float


def compare(
    encoding: tiktoken.Encoding, places: Sequence[Place], continuations: Sequence[Sequence[int]]
) -> ContinuationScores:
    """The figures of continuations, ids after each place's prompt."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    references = [place.reference for place in places]
    theirs = [text_after(encoding, place.prompt, place.reference) for place in places]
    ours = [text_after(encoding, place.prompt, ids) for place, ids in zip(places, continuations, strict=True)]
    bleu = BLEU(force=True)  # force: no advice about WikiText's blanks in front of full stops
    rouge = RougeScorer(["rougeL"])
    return ContinuationScores(
        len(places),
        bleu.corpus_score(ours, [theirs]).score,
        str(bleu.get_signature()),
        sum(rouge.score(*pair)["rougeL"].fmeasure for pair in zip(theirs, ours, strict=True)) / len(places),
        distinct(ours, 1),
        distinct(ours, 2),
        repetition(continuations),
        distinct(theirs, 1),
        distinct(theirs, 2),
        repetition(references),
    )


def text_after(encoding: tiktoken.Encoding, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ids; a character whose first bytes the prompt has belongs to it."""
    stream = TextStream(encoding)
    for token in prompt:
        stream.feed(token)
    return "".join(stream.feed(token) for token in ids) + stream.end()


def distinct(texts: Sequence[str], n: int) -> float:
    """Different runs of n words over all such runs of all texts; nan where there is none."""
    runs = [run for text in texts for run in _runs(text.split(), n)]
    return len(set(runs)) / len(runs) if runs else math.nan


def repetition(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """1 - different runs of n ids / all of them, the mean over the sequences that have one; nan where none has."""
    all_runs = [runs for ids in sequences if (runs := _runs(ids, n))]
    return sum(1 - len(set(runs)) / len(runs) for runs in all_runs) / len(all_runs) if all_runs else math.nan


def _runs(items: Sequence, n: int) -> list[tuple]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
