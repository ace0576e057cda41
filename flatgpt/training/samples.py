"""Continue a run's prompts with the model in training."""

from __future__ import annotations

from unicodedata import category

from config import SamplingConfig
from flatgpt.inference.decoder import Decoder
from flatgpt.inference.sampling import generate_batch
from flatgpt.inference.writer import Text
from flatgpt.runtime.device import uncompiled
from flatgpt.training.setup import TrainingRun


def generate_samples(run: TrainingRun, seed: int) -> list[str]:
    """Return a text for each sample_prompt, which it begins with. The random numbers depend on the seed alone."""
    config, encoding = run.config, run.encoding
    prompts = [encoding.encode_ordinary(prompt) or [encoding.eot_token] for prompt in config.sample_prompt]

    def sample_ids() -> list[list[int]]:  # of a fixed length, as sharded models need all ranks at each token
        options = SamplingConfig(temperature=0.8, seed=seed)
        steps = generate_batch(Decoder(run.model), prompts, config.sample_tokens, options, n_vocab=encoding.n_vocab)
        with run.device_settings.autocast(), uncompiled(run.model):
            return [list(row) for row in zip(*steps, strict=True)]

    sampled = sample_ids() if run.model is run.wrapped_model else run.ranks.run_on_rank0(sample_ids)
    texts = []
    for prompt, ids in zip(config.sample_prompt, sampled, strict=True):
        ids = ids[: ids.index(encoding.eot_token)] if encoding.eot_token in ids else ids
        text = Text(encoding)
        for token in ids:
            text.append(token)
        text.end()
        # control characters could change the terminal's state
        shown = (c if category(c) != "Cc" or c in "\n\t" else "\ufffd" for c in prompt + text.written)
        texts.append("".join(shown))
    return texts
