"""Reports of eval.py: figures and their definitions, the table, smol-GPT's lines, the picture."""

import math

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from flatgpt.evaluation.metrics import Scores
from flatgpt.evaluation.report import ROWS, draw_positions, figures, smol, table, units
from flatgpt.evaluation.text import TextCounts

COUNTS = TextCounts(bytes=20, words=4, lines=1)
FACTS = {"model": "out/a", "iter": 1500, "dtype": "float32", "text": "data/x val"}
FACTS |= {"protocol": "window", "protocol_means": "once"}


def scored(losses: list[float], T: int = 16) -> Scores:
    """Tokens at positions 0, 1, 2, ...; targets are 0 0 0 1, repeated; the most likely token is 0."""
    n = len(losses)
    scores = Scores(3, T)
    scores.add(
        losses=np.array(losses, np.float32),
        targets=np.arange(n) % 4 // 3,
        positions=np.arange(n) % T,
        in_top5=np.arange(n) % 2 == 0,
        confidences=np.full(n, 0.5, np.float32),
        greedy=np.zeros(n, int),
    )
    return scores


def report(losses: list[float], counts: TextCounts = COUNTS, T: int = 16, **changes) -> dict:
    return {**FACTS, "window": T, **figures(scored(losses, T), counts), **changes}


def test_figures_by_hand():
    """Two bits a token: 16 bits over 20 bytes and 4 words."""
    got = figures(scored([2 * math.log(2)] * 8), COUNTS)
    assert (got["tokens"], got["bytes"], got["words"], got["lines"]) == (8, 20, 4, 1)
    assert got["loss"] == pytest.approx(2 * math.log(2))
    assert got["perplexity"] == pytest.approx(4)
    assert got["word_perplexity"] == pytest.approx(2 ** (16 / 4))
    assert got["bits_per_byte"] == pytest.approx(16 / 20)
    assert (got["accuracy"], got["top5_accuracy"], got["recall"]) == (0.75, 0.5, 0.75)
    assert (got["precision"], got["f1"]) == pytest.approx((0.75 * 0.75, 0.75 * 2 * 6 / (8 + 6)))
    assert got["calibration_error"] == pytest.approx(0.25)
    assert [b["tokens"] for b in got["loss_by_position"]] == [2, 2, 2, 2, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("losses", "counts", "expected"),
    [
        ([800] * 8, TextCounts(0, 0, 0), (math.inf, None, None)),
        ([699] * 8, COUNTS, (math.exp(699), math.inf, 699 * 8 / math.log(2) / 20)),  # 1398 nats a word
        ([1, math.nan], COUNTS, (math.nan, math.nan, math.nan)),
    ],
    ids=["nothing to divide by", "beyond float64", "NaN"],
)
def test_figures_without_a_number(losses, counts, expected):
    got = figures(scored(losses), counts)
    for key, value in zip(("perplexity", "word_perplexity", "bits_per_byte"), expected, strict=True):
        assert got[key] == (None if value is None else pytest.approx(value, rel=1e-6, nan_ok=True)), key


def test_every_figure_has_a_row_and_a_unit():
    got = report([1] * 8, stride=4)
    numbers = {key for key, value in got.items() if isinstance(value, int | float)}
    assert numbers <= set(ROWS)
    named = units(got)
    assert numbers - {"iter", "lines"} <= set(named) <= set(got)
    assert "line ends are not counted" in named["words"]
    assert units({"loss": 1.0, "batch_size": 2}) == {"loss": "nats per token scored"}


ONE = """\
model              out/a
iter               1,500
text               data/x val
protocol           window
                   once
window             16  tokens
dtype              float32  of the matrix products
tokens             16  scored
bytes              12,345,678  of text scored
words              4  of the text, with its first token's; split at white space, line ends are not counted
line ends          0
loss               0.5000  nats per token scored
token perplexity   1.6487  exp(loss)
word perplexity    7.3891  exp(sum of losses / words)
bits per byte      0.0000  sum of losses / ln 2 / bytes
top-1 accuracy     0.7500  share of tokens that were the most likely
top-5 accuracy     0.5000  share of tokens among the five most likely
precision          0.5625  of the most likely token, weighted by the targets' classes
recall             0.7500  of the most likely token, weighted by the targets' classes
F1                 0.6429  of the most likely token, weighted by the targets' classes
calibration error  0.2500  expected calibration error, 15 bins
at 0 to 1          0.0000  loss by position in the context
at 2 to 3          0.0000
at 4 to 5          0.0000
at 6 to 7          0.0000
at 8 to 9          1.0000
at 10 to 11        1.0000
at 12 to 13        1.0000
at 14 to 15        1.0000"""


def test_table_of_one_model():
    assert table([report([0] * 8 + [1] * 8, TextCounts(12_345_678, 4, 0))]) == ONE


TWO = """\
model              out/a      user/large
iter               1,500      -
text               data/x val
protocol           window
                   once
window             16         16          tokens
dtype              float32  of the matrix products
tokens             1,234,567  1           scored
loss               0.5000     12.0000     nats per token scored
token perplexity   1.6487     -           exp(loss)
word perplexity    2.346e+09  inf         exp(sum of losses / words)
BLEU               -          3.0000      0 to 100, of all continuations
  sacrebleu        -          tok:13a
at 0 to 3,999      1.0000     3.0000      loss by position in the context
at 4,000 to 4,095  -          0.5000"""


def test_table_of_several_models():
    """Texts that all share are written once; figures are aligned."""
    one = {"window": 16, "tokens": 1_234_567, "loss": 0.5, "perplexity": 1.6487, "word_perplexity": 2345678901.5}
    other = {"window": 16, "tokens": 1, "loss": 12.0, "perplexity": None, "word_perplexity": math.inf}
    other |= {"model": "user/large", "iter": None, "bleu": 3.0, "bleu_signature": "tok:13a"}
    buckets = [{"first": 0, "last": 3999, "tokens": 9}, {"first": 4000, "last": 4095, "tokens": 1}]
    for found, losses in ((one, (1.0, None)), (other, (3.0, 0.5))):
        found["loss_by_position"] = [bucket | {"loss": loss} for bucket, loss in zip(buckets, losses, strict=True)]
    assert table([{**FACTS, **one}, {**FACTS, **other}]) == TWO


def test_positions_of_different_windows_are_not_put_side_by_side():
    lines = table([report([1] * 16), report([1] * 16, T=8)])
    assert "loss by position   the windows differ" in lines
    assert "at 0 to" not in lines
    assert "window             16       8        tokens" in lines.splitlines()


def test_smols_six_lines_and_the_names_of_several_models():
    one = report([3.73066] * 8)
    expected = (
        "Test loss: 3.7307\nTest perplexity: 41.7066\nTest precision: 0.5625\nTest recall: 0.7500\n"
        "Test f1: 0.6429\nTest accuracy: 0.7500"
    )
    assert smol([one]) == expected
    assert smol([one, one | {"model": "b"}]) == f"out/a\n{expected}\n\nb\n{expected}"
    assert smol([report([800] * 8)]).splitlines()[1] == "Test perplexity: inf"


def test_picture_of_losses_by_position(tmp_path, monkeypatch):
    """A line for each model; positions without a token are not drawn, and nothing is cut off at the edges."""
    kept, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **more: kept.append(self) or save(self, *args, **more)
    )
    reports = [
        report(list(range(2, 18)), text="../texts/of/others/war_and_peace.txt"),
        report([5] * 8, T=8, model="gpt2"),
        report([1, 3, 5], model="short"),
    ]
    (tmp_path / "positions.png").write_bytes(draw_positions(reports))
    image = matplotlib.image.imread(tmp_path / "positions.png")[..., :3]
    assert image.shape == (480, 840, 3)
    for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert (edge == 1).all()
    (axes,) = kept[-1].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["out/a", "gpt2", "short"]
    assert "nats per token" in axes.get_ylabel()
    assert "position" in axes.get_xlabel()
    assert axes.get_title() == "../texts/of/others/war_and_peace.txt, protocol window"
    lines = [line.get_data() for line in axes.patches]
    assert [(line.values.tolist(), line.edges.tolist()) for line in lines] == [
        ([2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5, 16.5], [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        ([5.0] * 8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([2.0, 5.0], [0, 2, 4]),
    ]
    assert axes.get_ylim()[0] > 0, "no bars down to 0"
