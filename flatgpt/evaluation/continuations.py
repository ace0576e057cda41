"""Take prompts from a split, generate continuations, and compare them with the text that follows in the split.

require_packages()
prompts = select_prompts(tokens, 100, prompt_tokens=64, new_tokens=64, end_of_text=encoding.eot_token)
continuations = generate_continuations(decoder, encoding, prompts, 64, SamplingConfig())
metrics = score_continuations(encoding, prompts, continuations)
"""

from __future__ import annotations

import codecs
import dataclasses
import importlib.util
from collections.abc import Sequence

import numpy as np
import tiktoken

from config import SamplingConfig, UserError
from flatgpt.data.shards import Tokens
from flatgpt.evaluation.metrics import progress_bar
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import NonFiniteLogitsError, generate_batch
from flatgpt.runtime.distributed import SINGLE_PROCESS, DistributedContext

Prompt = tuple[list[int], list[int]]  # token ids of a prompt, and of its reference: the text that follows it


def require_packages() -> None:
    """Raise UserError if a package that score_continuations needs is missing."""
    if missing := [name for name in ("sacrebleu", "rouge_score") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--generate needs {' and '.join(missing)}: pip install -r requirements-extra.txt, or "
            f"pip install {' '.join(missing).replace('_', '-')}"
        )


def select_prompts(
    tokens: Tokens | np.ndarray, n: int, prompt_tokens: int, new_tokens: int, end_of_text: int | None
) -> list[Prompt]:
    """Take n equally spaced prompts from a split; in a short split they overlap.

    A prompt may span documents, as training windows do. A reference ends before its first end-of-text. Prompts with an
    empty reference are omitted.

    Raises:
        UserError: no prompt is left, or the split is shorter than a prompt and its continuation.
    """
    last = len(tokens) - prompt_tokens - new_tokens
    prompts, n = [], min(n, last + 1)
    for i in range(n):
        start = i * last // max(1, n - 1)
        ids = tokens[start : start + prompt_tokens + new_tokens].tolist()
        reference = ids[prompt_tokens:]
        if end_of_text in reference:
            reference = reference[: reference.index(end_of_text)]
        if reference:
            prompts.append((ids[:prompt_tokens], reference))
    if not prompts:
        raise UserError(
            f"found no prompt of {prompt_tokens:,} tokens followed by a text of {new_tokens:,} tokens in a split of "
            f"{len(tokens):,} tokens: lower --prompt_tokens or --max_new_tokens, or raise --generate"
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
) -> list[list[int]] | None:
    """Return the ids that the model generates after each prompt, up to end-of-text. None if its logits are not finite.

    The result does not depend on batch_size or on the number of ranks.

    Args:
        ranks: the processes that share the batches.
    """
    generated = {}
    for first in progress_bar(range(0, len(prompts), batch_size)[ranks.rank :: ranks.world], ranks):
        batch = [ids for ids, _ in prompts[first : first + batch_size]]
        settings = {"n_vocab": encoding.n_vocab, "stop_ids": (encoding.eot_token,), "first_row": first}
        try:
            steps = [*generate_batch(decoder, batch, max_new_tokens, options, **settings)]
        except NonFiniteLogitsError:
            generated = None
            break
        for row in range(len(batch)):
            generated[first + row] = [step[row] for step in steps if step[row] is not None]
    parts = ranks.all_gather(generated)
    if None in parts:
        return None
    merged = {row: ids for part in parts for row, ids in part.items()}
    return [ids for _, ids in sorted(merged.items())]


def score_continuations(
    encoding: tiktoken.Encoding, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
) -> dict:
    """Return the metrics of continuations, with the keys of report.ROWS.

    bleu: sacrebleu's corpus BLEU, 0 to 100 (Papineni et al., 2002), with its signature. rouge_l: mean F-measure of
    rouge-score's rougeL without stemming, 0 to 1 (Lin, 2004); its words are runs of a-z and 0-9, so text in other
    scripts has no words. distinct_1, distinct_2: Li et al., 2016. repetition: seq-rep-4, Welleck et al., 2020.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    bleu, rouge = BLEU(force=True), RougeScorer(["rougeL"])  # force: no warning about WikiText's " ."
    texts = [text_after(encoding, ids, new) for (ids, _), new in zip(prompts, continuations, strict=True)]
    references = [text_after(encoding, *prompt) for prompt in prompts]
    rouge_l = [rouge.score(*pair)["rougeL"].fmeasure for pair in zip(references, texts, strict=True)]
    metrics = {
        "prompts": len(prompts),
        "bleu": bleu.corpus_score(texts, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "rouge_l": sum(rouge_l) / len(prompts),
    }
    reference_data = references, [reference for _, reference in prompts]
    for prefix, (strings, ids) in {"": (texts, continuations), "reference_": reference_data}.items():
        metrics |= {f"{prefix}distinct_{n}": distinct(strings, n) for n in (1, 2)}
        metrics[f"{prefix}repetition"] = repetition(ids)
    return metrics


def text_after(encoding: tiktoken.Encoding, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of ids. A character that starts in the prompt and ends in ids is included."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(encoding.decode_bytes(prompt))
    return decoder.decode(encoding.decode_bytes(ids), final=True)


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Return the share of distinct n-grams of words (split at white space) in all texts; None without n-grams."""
    ngrams = [ngram for text in texts for ngram in _ngrams(text.split(), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def repetition(sequences: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Return the share of repeated n-grams of ids, averaged over sequences that have n-grams; None without n-grams."""
    shares = [1 - len(set(ngrams)) / len(ngrams) for ids in sequences if (ngrams := _ngrams(ids, n))]
    return sum(shares) / len(shares) if shares else None


def _ngrams(items: Sequence, n: int) -> list[tuple]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def describe_sampling(config: SamplingConfig) -> str:
    """Describe temperature, seed, and the sampling settings that differ from their defaults."""
    found = {"temperature": f"{config.effective_temperature:g}", "seed": config.seed}
    for field in dataclasses.fields(SamplingConfig):
        if field.name != "greedy" and getattr(config, field.name) != field.default:
            found.setdefault(field.name, getattr(config, field.name))
    return ", ".join(f"{key} {value}" for key, value in found.items())
