"""What eval.py says to people: figures and their normalisers, the table, smol-GPT's lines, the picture."""

import math

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from flatgpt.evaluation.metrics import Scores
from flatgpt.evaluation.report import ROWS, draw_positions, figures, smol, table, units
from flatgpt.evaluation.text_stats import TextCounts

COUNTS = TextCounts(bytes=20, words=4, lines=1)
FACTS = {
    "model": "out/a",
    "iter": 1500,
    "dtype": "float32",
    "text": "data/x val",
    "protocol": "window",
    "protocol_means": "once",
}


def scored(losses: list[float], T: int = 16, sampled: bool = False) -> Scores:
    """Tokens at places 0, 1, 2, ...; targets are 0 0 0 1, again and again, the likeliest token is 0, a drawn one 1."""
    N = len(losses)
    scores, drawn = Scores(3, T, sampled), {"sampled": np.ones(N, int)} if sampled else {}
    scores.add(
        losses=np.array(losses, np.float32),
        targets=np.arange(N) % 4 // 3,
        positions=np.arange(N) % T,
        in_top5=np.arange(N) % 2 == 0,
        confidences=np.full(N, 0.5, np.float32),
        greedy=np.zeros(N, int),
        **drawn,
    )
    return scores


def reported(scores: Scores, counts: TextCounts = COUNTS, **changes) -> dict:
    """As eval.py puts it together."""
    return {**FACTS, "window": scores.T, **figures(scores, counts), **changes}


# ---------------------------------------------------------------------------------------------------------------------
# figures


def test_figures_by_hand():
    """Two bits a token: 16 bits over 20 bytes and 4 words."""
    got = figures(scored([2 * math.log(2)] * 8), COUNTS)
    assert (got["tokens"], got["bytes"], got["words"], got["lines"]) == (8, 20, 4, 1)
    assert got["loss"] == pytest.approx(2 * math.log(2))
    assert got["perplexity"] == pytest.approx(4)
    assert got["word_perplexity"] == pytest.approx(2 ** (16 / 4))
    assert got["bits_per_byte"] == pytest.approx(16 / 20)
    assert (got["accuracy"], got["top5_accuracy"], got["recall"]) == (0.75, 0.5, 0.75)
    assert got["precision"] == pytest.approx(0.75 * 0.75)
    assert got["f1"] == pytest.approx(0.75 * 2 * 6 / (8 + 6))
    assert got["calibration_error"] == pytest.approx(0.25)
    assert [b["tokens"] for b in got["loss_by_position"]] == [2, 2, 2, 2, 0, 0, 0, 0]
    assert not [key for key in got if key.startswith("sampled")]


def test_figures_of_sampled_tokens():
    got = figures(scored([1] * 8, sampled=True), COUNTS)
    assert (got["sampled_precision"], got["sampled_recall"]) == (0.25 * 0.25, 0.25)
    assert got["sampled_f1"] == pytest.approx(0.25 * 2 * 2 / (8 + 2))
    assert got["recall"] == 0.75


def test_figures_at_the_edge():
    got = figures(scored([800] * 8), TextCounts(bytes=0, words=0, lines=0))
    assert got["perplexity"] == math.inf
    assert got["word_perplexity"] is None
    assert got["bits_per_byte"] is None
    got = figures(scored([699] * 8), COUNTS)
    assert got["perplexity"] == pytest.approx(math.exp(699))
    assert got["word_perplexity"] == math.inf, "1398 nats a word"


def test_a_loss_that_is_no_number_has_no_perplexity():
    got = figures(scored([1, math.nan]), COUNTS)
    assert all(math.isnan(got[key]) for key in ("loss", "perplexity", "word_perplexity", "bits_per_byte"))


def test_units_are_named():
    """Of every figure that has one; `units` of the report is for programs, which know no line above."""
    got = reported(scored([1] * 8, sampled=True), stride=4)
    numbers = {key for key, value in got.items() if isinstance(value, int | float)}
    assert numbers <= set(ROWS), "a figure that the table leaves out"
    for key in numbers - {"iter", "lines"}:
        assert ROWS[key][1], key
    named = units(got)
    assert set(named) <= set(got)
    assert {"window", "stride", "tokens", "bytes", "words", "dtype"} <= set(named)
    assert {"loss", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "top5_accuracy"} <= set(named)
    assert "line ends are not counted" in named["words"]
    assert named["loss"] == "nats per token scored"
    assert "the same" not in named.values()
    assert "" not in named.values()
    assert units({"loss": 1.0, "batch_size": 2}) == {"loss": "nats per token scored"}


# ---------------------------------------------------------------------------------------------------------------------
# the table

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
words              4  of the text, its first token's too; split at white space, line ends are not counted
line ends          0
loss               0.5000  nats per token scored
token perplexity   1.6487  exp(loss)
word perplexity    7.3891  exp(sum of losses / words)
bits per byte      0.0000  sum of losses / ln 2 / bytes
top-1 accuracy     0.7500  share of tokens that were the likeliest
top-5 accuracy     0.5000  share of tokens among the five likeliest
precision          0.5625  of the likeliest token, weighted by the targets' classes
recall             0.7500  of the likeliest token, weighted by the targets' classes
F1                 0.6429  of the likeliest token, weighted by the targets' classes
calibration error  0.2500  expected: |accuracy - probability| of the likeliest token, 15 bins
at 0 to 1          0.0000  loss by position in the context
at 2 to 3          0.0000
at 4 to 5          0.0000
at 6 to 7          0.0000
at 8 to 9          1.0000
at 10 to 11        1.0000
at 12 to 13        1.0000
at 14 to 15        1.0000"""


def test_table_of_one_model():
    assert table([reported(scored([0] * 8 + [1] * 8), TextCounts(12_345_678, 4, 0))]) == ONE


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
    """What is text, and the same of all, is there once; figures are below each other."""
    one = {"window": 16, "tokens": 1_234_567, "loss": 0.5, "perplexity": 1.6487, "word_perplexity": 2345678901.5}
    other = {"window": 16, "tokens": 1, "loss": 12.0, "perplexity": None, "word_perplexity": math.inf}
    other |= {"model": "user/large", "iter": None, "bleu": 3.0, "bleu_signature": "tok:13a"}
    places = [{"first": 0, "last": 3999, "tokens": 9}, {"first": 4000, "last": 4095, "tokens": 1}]
    for found, losses in ((one, (1.0, None)), (other, (3.0, 0.5))):
        found["loss_by_position"] = [place | {"loss": loss} for place, loss in zip(places, losses, strict=True)]
    assert table([{**FACTS, **one}, {**FACTS, **other}]) == TWO


def test_positions_of_different_windows_are_not_put_side_by_side():
    one, other = reported(scored([1] * 16)), reported(scored([1] * 16, T=8))
    assert "loss by position" in table([one, one])
    assert "loss by position   the windows differ" in table([one, other])
    assert "at 0 to" not in table([one, other])
    assert "window             16       8        tokens" in table([one, other]).splitlines()


def test_table_without_what_there_is_nothing_to_divide_by():
    """Such a figure is left out; beside a model that has it, and at places that no token had, there is a dash."""
    bare, whole = reported(scored([1] * 4), TextCounts(0, 0, 0)), reported(scored([1] * 16))
    lines = table([bare]).splitlines()
    assert not [line for line in lines if line.startswith(("word perplexity", "bits per byte"))]
    assert "at 14 to 15        -" in lines
    lines = table([bare, whole]).splitlines()
    assert "word perplexity    -       54.5982  exp(sum of losses / words)" in lines
    assert "bits per byte      -       1.1542   sum of losses / ln 2 / bytes" in lines
    assert "at 14 to 15        -       1.0000" in lines


# ---------------------------------------------------------------------------------------------------------------------
# smol-GPT's lines


def test_smols_six_lines():
    got = smol([reported(scored([3.73066] * 8))])
    assert got == (
        "Test loss: 3.7307\nTest perplexity: 41.7066\nTest precision: 0.5625\nTest recall: 0.7500\n"
        "Test f1: 0.6429\nTest accuracy: 0.7500"
    )


def test_smols_lines_are_of_the_sampled_token_where_one_was_scored():
    got = smol([reported(scored([3.73066] * 8, sampled=True))])
    assert got == (
        "Test loss: 3.7307\nTest perplexity: 41.7066\nTest precision: 0.0625\nTest recall: 0.2500\n"
        "Test f1: 0.1000\nTest accuracy: 0.2500"
    )


def test_smols_lines_of_several_models():
    one = reported(scored([1] * 8))
    names = [line for line in smol([one, one | {"model": "b"}]).splitlines() if not line.startswith("Test ")]
    assert names == ["out/a", "", "b"]


def test_smols_lines_of_a_model_that_diverged():
    assert smol([reported(scored([800] * 8))]).splitlines()[1] == "Test perplexity: inf"


# ---------------------------------------------------------------------------------------------------------------------
# the picture


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """What is drawn of reports: matplotlib's figure, and the file's pixels, (height, width, 3), 0 to 1."""
    kept, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **more: kept.append(self) or save(self, *args, **more)
    )

    def draw(*reports: dict):
        (tmp_path / "positions.png").write_bytes(draw_positions(reports))
        return kept[-1], matplotlib.image.imread(tmp_path / "positions.png")[..., :3]

    return draw


def pixels(image: np.ndarray, color: str) -> int:
    return int((np.abs(image - to_rgb(color)).max(-1) < 0.15).sum())


def test_picture_of_losses_by_position(drawn):
    """A line a model, of its colour; as high and as wide as the figures say."""
    one, other = reported(scored(list(range(2, 18)))), reported(scored([5] * 8, T=8), model="gpt2")
    figure, image = drawn(one, other)
    assert image.shape == (480, 840, 3)
    assert pixels(image, "C0") > 1000
    assert pixels(image, "C1") > 300
    assert pixels(drawn(one)[1], "C1") == 0
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["out/a", "gpt2"]
    assert "nats per token" in axes.get_ylabel()
    assert "position" in axes.get_xlabel()
    assert axes.get_title() == "data/x val, protocol window"
    lines = [line.get_data() for line in axes.patches]
    assert [(line.values.tolist(), line.edges.tolist()) for line in lines] == [
        ([2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5, 16.5], [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        ([5.0] * 8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ]
    assert axes.get_ylim()[0] > 0, "no bars down to 0"


def test_places_that_no_token_had_are_not_drawn(drawn):
    """Of a text that is shorter than the context."""
    figure, image = drawn(reported(scored([1, 3, 5])))
    line = figure.axes[0].patches[0].get_data()
    assert (line.values.tolist(), line.edges.tolist()) == ([2.0, 5.0], [0, 2, 4])
    assert pixels(image, "C0") > 1000


def test_nothing_is_cut_off(drawn):
    """With a file's long name: the picture's edge is white."""
    _, image = drawn(reported(scored([1] * 16), text="../texts/of/others/war_and_peace.txt"))
    for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert (edge == 1).all()
