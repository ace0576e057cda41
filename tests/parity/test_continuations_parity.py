"""Figures of continuations against sacrebleu and rouge-score, called directly."""

import numpy as np
import pytest

from flatgpt.data import tokenizer
from flatgpt.evaluation.continuations import distinct, repetition, require_packages, score_continuations

pytestmark = pytest.mark.extra("sacrebleu", "rouge_score")


def test_figures_equal_the_libraries(caplog):
    """Also of empty continuations, lower case, other scripts, and WikiText's " .", of which sacrebleu would warn."""
    import sacrebleu
    from rouge_score import rouge_scorer

    require_packages()
    references = [
        "the cat sat on the mat .",
        "it slept , and SLEPT on .",
        "naïve café 🎈",
        "東京 is a city of cities .",
    ]
    texts = ["the cat slept on the mat .", "it slept on and on .", "", "東京 is the city of a city ."]
    prompts = [([*f"p{n} ".encode()], [*text.encode()]) for n, text in enumerate(references)] * 30
    got = score_continuations(tokenizer.load("byte"), prompts, [[*text.encode()] for text in texts] * 30)
    bleu = sacrebleu.corpus_bleu(texts * 30, [references * 30], force=True)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    each = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, texts, strict=True)]
    assert 10 < bleu.score < 90
    assert got == {
        "prompts": 120,
        "bleu": pytest.approx(bleu.score),
        "bleu_signature": f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}",
        "rouge_l": pytest.approx(np.mean(each)),
        "distinct_1": distinct(texts * 30, 1),
        "distinct_2": distinct(texts * 30, 2),
        "repetition": pytest.approx(repetition([[*text.encode()] for text in texts])),
        "reference_distinct_1": distinct(references * 30, 1),
        "reference_distinct_2": distinct(references * 30, 2),
        "reference_repetition": pytest.approx(repetition([[*text.encode()] for text in references])),
    }
    assert not caplog.records
