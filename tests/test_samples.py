"""samples.py: texts of a model in training, from fixed prompts."""

import unicodedata

import pytest
from conftest import TINY

import cli
import samples
from config import TrainConfig, UserError
from decoder import Decoder
from reader_config import SamplingConfig
from run import setup
from sampling import generate, stream_text


def prepared(*words: str):
    return setup(cli.parse(TrainConfig, [*TINY, *words]))


def test_each_prompt_is_continued_as_infer_would(tiny_data):
    run = prepared("--sample_prompt", "green", "", "東", "--sample_tokens", "12")
    texts = samples.draw(run, seed=3)
    assert [text[:5] for text in texts[::2]] == ["green", texts[2][:5]]
    assert texts[2].startswith("東")
    ids = generate(
        Decoder(run.model),
        run.encoding.encode_ordinary("green"),
        12,
        SamplingConfig(temperature=0.8, seed=3),
        n_vocab=run.encoding.n_vocab,
    )
    alone = "green" + "".join(stream_text(ids, run.encoding))
    assert texts[0] == "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in alone)
    assert samples.draw(run, seed=3) == texts
    assert samples.draw(run, seed=4) != texts


def test_no_control_characters(tiny_data):
    """A young model draws them, and the terminal would obey."""
    run = prepared("--sample_tokens", "300")
    text = "".join("".join(samples.draw(run, seed)) for seed in range(30))
    assert len(text) > 1000
    assert {c for c in text if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}


def test_other_scripts_stay_as_they_are(tiny_data):
    """Spaces and joiners of Japanese, French and Persian are no control characters."""
    prompt = "東\u3000京 10\u00a0% می\u200cخواهم 👩\u200d🚀"
    (text,) = samples.draw(prepared("--sample_prompt", prompt), seed=1)
    assert text.startswith(prompt)


def test_nothing_to_continue_is_a_mistake(tmp_path):
    recipe = tmp_path / "a.toml"
    recipe.write_text("sample_prompt = []\n")
    with pytest.raises(UserError, match="sample_prompt is empty"):
        cli.parse(TrainConfig, ["--config", str(recipe)])
