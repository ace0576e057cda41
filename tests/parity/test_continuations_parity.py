"""Figures of continuations against sacrebleu and rouge-score, called directly."""

import numpy as np
import pytest
from test_continuations import BYTES, EOT, cyclic_model

from config import SamplingConfig
from flatgpt.evaluation.continuations import (
    Prompt,
    distinct,
    generate_continuations,
    repetition,
    require_packages,
    score_continuations,
    select_prompts,
    text_after,
)
from flatgpt.inference.decoder import Decoder

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
    prompts = [Prompt([*f"p{n} ".encode()], [*text.encode()]) for n, text in enumerate(references)] * 30
    got = score_continuations(BYTES, prompts, [[*text.encode()] for text in texts] * 30)
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


def test_a_model_that_knows_the_text():
    """It repeats the references: BLEU 100 and ROUGE-L 1."""
    cycle = [*b"abcd efg\nhij\tklmno\rpqrst\x0buvwxyz"]
    prompts = select_prompts(np.array(cycle * 40, dtype=np.uint16), 9, 5, 60, EOT)
    model = Decoder(cyclic_model(cycle))
    written = generate_continuations(model, BYTES, prompts, 60, SamplingConfig(greedy=True), batch_size=4)
    assert written == [prompt.reference for prompt in prompts]
    got = score_continuations(BYTES, prompts, written)
    assert (got["bleu"], got["rouge_l"]) == (pytest.approx(100), 1)
    for key in ("distinct_1", "distinct_2", "repetition"):
        assert 0 < got[key] == got[f"reference_{key}"] < 1


def test_prompts_that_split_characters():
    """Prompts that begin and end within emoji of four bytes: no text begins with half a character."""
    split = np.frombuffer(("🎈 one two three four five six 🚀 " * 60).encode(), np.uint8).astype(np.uint16)
    prompts = select_prompts(split, 50, 10, 62, EOT)
    assert len({prompt.ids[0] & 0xC0 == 0x80 for prompt in prompts}) == 2
    got = score_continuations(BYTES, prompts, [prompt.reference for prompt in prompts])
    assert (got["bleu"], got["rouge_l"]) == (pytest.approx(100), 1)
    assert not any(text_after(BYTES, prompt.ids, prompt.reference).startswith("\ufffd") for prompt in prompts)
