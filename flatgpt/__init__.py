"""Modules shared by flatGPT's scripts, in one folder per topic; and `load`, for notebooks and other programs.

model = flatgpt.load("out/shakespeare")
print(model.generate("ROMEO:", max_new_tokens=50))
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from config import UserError as UserError
    from flatgpt.library import LanguageModel

__version__ = "0.1.0"
REPO_ROOT = Path(__file__).resolve().parent.parent


def load(
    name: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    context_length: int | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    compile: bool | None = None,
) -> LanguageModel:
    """Load a model in evaluation mode and its tokenizer. `model, tokenizer = flatgpt.load(...)` gives them as a pair.

    Args:
        name: a run's folder, a checkpoint, a Hugging Face folder, a name on the Hub (gpt2, user/model) or nanoGPT's
            ckpt.pt; None: the newest run in out/.
        device: auto, cuda, cuda:N, mps or cpu.
        context_length: the number of tokens in the model's context; None: as in training.
        dtype, quantize, compile: precision and speed of `generate` and `stream`, as infer.py's flags of these names.
            The model itself and `loss` are in float32.

    Raises:
        UserError: the model is missing, damaged or not supported, or an argument is wrong.
    """
    from flatgpt.library import LanguageModel  # imports torch

    return LanguageModel(name, device, context_length, dtype=dtype, quantize=quantize, compile=compile)


def __getattr__(name: str):
    if name == "UserError":  # raised by `load` and the model; imported late: scripts first set up Ctrl-C
        from config import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
