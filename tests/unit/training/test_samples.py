"""samples.py: texts of a model in training, from fixed prompts."""

import unicodedata

import pytest
import torch
from in_process import TINY

from config import SamplingConfig, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate_batch
from flatgpt.training import samples
from flatgpt.training.setup import build_run


def prepared(*words: str):
    return build_run(cli.parse(TrainConfig, [*TINY, *words]))


def test_each_prompt_is_continued_as_infer_would(tiny_data):
    run = prepared("--sample_prompt", "green", "", "東", "--sample_tokens", "12")
    with torch.no_grad():
        for p in run.model.parameters():  # a new model's next token hardly depends on the text before it
            p.mul_(10)
    texts = samples.generate_samples(run, seed=3)
    options, eot = SamplingConfig(temperature=0.8, seed=3), run.encoding.eot_token
    for row, (prompt, start) in enumerate((("green", [*b"green"]), ("", [eot]), ("東", [*"東".encode()]))):
        steps = generate_batch(Decoder(run.model), [start], 12, options, n_vocab=257, stop_ids=[eot], first_row=row)
        alone = prompt + bytes(ids[0] for ids in steps).decode(errors="replace")
        shown = "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in alone)
        assert texts[row] == shown
    assert samples.generate_samples(run, seed=3) == texts
    assert samples.generate_samples(run, seed=4) != texts


def test_no_control_characters(tiny_data):
    """A young model draws them, and the terminal would obey."""
    run = prepared("--sample_tokens", "300")
    text = "".join("".join(samples.generate_samples(run, seed)) for seed in range(30))
    assert len(text) > 1000
    assert {c for c in text if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}


def test_text_ends_at_end_of_text(tiny_data, monkeypatch):
    run = prepared("--sample_prompt", "a")
    monkeypatch.setattr(samples, "generate_batch", lambda *_, **__: iter([[98], [run.encoding.eot_token], [99]]))
    assert samples.generate_samples(run, seed=1) == ["ab"]


def test_other_scripts_stay_as_they_are(tiny_data):
    """Spaces and joiners of Japanese, French and Persian are no control characters."""
    prompt = "東\u3000京 10\u00a0% می\u200cخواهم 👩\u200d🚀"
    (text,) = samples.generate_samples(prepared("--sample_prompt", prompt), seed=1)
    assert text.startswith(prompt)


def test_nothing_to_continue_is_a_mistake(tmp_path):
    recipe = tmp_path / "a.toml"
    recipe.write_text("sample_prompt = []\n")
    with pytest.raises(UserError, match="sample_prompt is empty"):
        cli.parse(TrainConfig, ["--config", str(recipe)])
