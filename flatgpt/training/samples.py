"""What a model in training makes of the run's fixed prompts, so that one can read how it learns."""

from __future__ import annotations

from unicodedata import category

from config import SamplingConfig
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate_batch
from flatgpt.inference.text_stream import TextStream
from flatgpt.runtime.device import uncompiled
from flatgpt.training.setup import TrainingRun


def generate_samples(run: TrainingRun, seed: int) -> list[str]:
    """A text for each of sample_prompt, which it begins with; with one seed, the same noise whatever the model is."""
    config, encoding = run.config, run.encoding
    prompts = [encoding.encode_ordinary(prompt) or [encoding.eot_token] for prompt in config.sample_prompt]

    def draw_ids() -> list[list[int]]:  # always as many: ranks that hold parts of the model compute together
        options = SamplingConfig(temperature=0.8, seed=seed)
        steps = generate_batch(Decoder(run.model), prompts, config.sample_tokens, options, n_vocab=encoding.n_vocab)
        with run.device_settings.autocast(), uncompiled(run.model):
            return [list(row) for row in zip(*steps, strict=True)]

    drawn = draw_ids() if run.model is run.wrapped_model else run.ranks.run_on_rank0(draw_ids)
    texts = []
    for prompt, ids in zip(config.sample_prompt, drawn, strict=True):
        ids = ids[: ids.index(encoding.eot_token)] if encoding.eot_token in ids else ids
        stream = TextStream(encoding)
        text = prompt + "".join(map(stream.feed, ids)) + stream.end()
        # a young model draws control characters, which could change the terminal's state
        texts.append("".join(c if category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in text))
    return texts
