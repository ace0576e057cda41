"""Modules shared by flatGPT's scripts, in one folder per topic.

In a notebook: `model, tokenizer = flatgpt.load("gpt2")`.
"""

from pathlib import Path

__version__ = "0.1.0"
REPO_ROOT = Path(__file__).resolve().parent.parent


def load(name: str | None = None, device: str = "cpu", context_length: int | None = None):
    """Load a model in evaluation mode and its tokenizer, a tiktoken.Encoding.

    Args:
        name: a run's folder, a checkpoint, a Hugging Face folder, a name on the Hub (gpt2, user/model) or nanoGPT's
            ckpt.pt; None: the newest run in out/.
        context_length: the number of tokens in the model's context; None: as in training.

    Raises:
        config.UserError: the model is missing, damaged or not supported.
    """
    from flatgpt.interop import loading  # imports torch

    return loading.load(loading.find(name), device, context_length)
