"""The modules that flatGPT's scripts share, in a folder for each concern.

In a notebook: `model, tokenizer = flatgpt.load("gpt2")`.
"""

from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent


def load(name: str | None = None, device: str = "cpu", context_length: int | None = None):
    """Load a model, in evaluation mode, and its tokenizer, a tiktoken.Encoding.

    Args:
        name: a run's folder, a checkpoint, a Hugging Face folder, a name on the hub (gpt2, user/model) or nanoGPT's
            ckpt.pt; None: the newest run in out/.
        context_length: the number of tokens that the model sees at once; None: as many as it was trained with.

    Raises:
        config.UserError: the model is missing or damaged, or does not fit.
    """
    from flatgpt.interop import loading  # imports torch

    return loading.load(loading.find(name), device, context_length)
