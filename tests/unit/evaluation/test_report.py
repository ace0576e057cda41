"""Reports of eval.py: the table, and smol-GPT's lines."""

import math

from flatgpt.evaluation.report import draw_positions, smol, table

FACTS = {"model": "out/a", "iter": 1500, "dtype": "float32", "text": "data/x val", "window": 16}
FACTS |= {"protocol": "window", "protocol_means": "once"}
TWO = """\
model              out/a      user/large
iter               1,500      -
text               data/x val
protocol           window
                   once
window             16         16          tokens
dtype              float32  of the matrix products
tokens             1,234,567  1           scored
loss               0.5000     12.0000     nats per scored token
token perplexity   1.6487     -           exp(loss)
word perplexity    2.346e+09  inf         exp(sum of losses / words)
BLEU               -          3.0000      0 to 100, of all continuations
  sacrebleu        -          tok:13a
at 0 to 3,999      1.0000     3.0000      loss by position in the context
at 4,000 to 4,095  -          0.5000"""


def reports() -> list[dict]:
    one = {"tokens": 1_234_567, "loss": 0.5, "perplexity": 1.6487, "word_perplexity": 2345678901.5}
    other = {"tokens": 1, "loss": 12.0, "perplexity": None, "word_perplexity": math.inf}
    other |= {"model": "user/large", "iter": None, "bleu": 3.0, "bleu_signature": "tok:13a"}
    buckets = [{"first": 0, "last": 3999}, {"first": 4000, "last": 4095}]
    for found, losses in ((one, (1.0, None)), (other, (3.0, 0.5))):
        each = zip(buckets, losses, strict=True)
        found["loss_by_position"] = [bucket | {"loss": loss, "tokens": loss or 0} for bucket, loss in each]
    return [FACTS | one, FACTS | other]


def test_table():
    """Texts that all share are written once; figures are aligned; different windows have no common positions."""
    one, two = reports()
    assert table([one, two]) == TWO
    lines = table([one]).splitlines()
    assert {"window             16  tokens", "loss               0.5000  nats per scored token"} < set(lines)
    lines = table([one, two | {"window": 8}]).splitlines()
    assert lines[-1] == "loss by position  the windows differ: see --json or --plot"
    assert "window            16         8           tokens" in lines
    assert len(lines) == len(TWO.splitlines()) - 1


def test_plot_shows_any_name(recwarn):
    """Dollar signs were mathematics, and ended in a traceback; a font lacks some characters."""
    one, two = reports()
    image = draw_positions([one | {"model": "out/$\\frac$", "text": "a$_\x1b東.txt"}, two])
    assert image.startswith(b"\x89PNG")
    assert not recwarn.list


def test_smols_six_lines_and_the_names_of_several_models():
    values = {"loss": 3.73066, "perplexity": math.inf, "precision": 0.5625, "recall": 0.75, "f1": 0.64286}
    one = FACTS | values | {"accuracy": 0.75}
    expected = (
        "Test loss: 3.7307\nTest perplexity: inf\nTest precision: 0.5625\nTest recall: 0.7500\n"
        "Test f1: 0.6429\nTest accuracy: 0.7500"
    )
    assert smol([one]) == expected
    assert smol([one, one | {"model": "b"}]) == f"out/a\n{expected}\n\nb\n{expected}"
