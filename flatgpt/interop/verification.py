"""Verify an exported folder: read it back, and compare its logits with those of the model.

The model in a Hugging Face folder is computed by GPT2, which does not depend on model.py: that may have been edited. A
Space contains model.py, and its own code loads it in another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from config import UserError
from flatgpt.interop.hub import CONFIG, WEIGHTS

MAX_TOKENS, COMPARED = 1024, 64  # length of the input; number of logits at its end, as all would need much memory
TOLERANCE = 1e-4  # of the largest value; float32 sums in another order differ by some 1e-6
ACTIVATIONS = {"gelu_new": partial(nn.GELU, approximate="tanh"), "gelu": nn.GELU, "relu": nn.ReLU}
SPACE_LOGITS = """\
import sys, flatgpt
from flatgpt.interop.verification import model_outputs
model, _ = flatgpt.load(".")
logits = model_outputs(model, model.config.vocab_size, model.config.context_length)["logits"]
sys.stdout.buffer.write(logits.numpy().tobytes())
"""


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out). Not initialised: random numbers on the meta device take a second."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(rows, columns)), nn.Parameter(torch.empty(columns))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2Block(nn.Module):
    """A block of GPT2."""

    def __init__(self, config: dict):
        super().__init__()
        C, self.n_head = config["n_embd"], config["n_head"]
        hidden, activation = config["n_inner"] or 4 * C, ACTIVATIONS[config["activation_function"]]()
        self.ln_1, self.ln_2 = (nn.LayerNorm(C, config["layer_norm_epsilon"]) for _ in range(2))
        self.attn = nn.ModuleDict({"c_attn": Conv1D(C, 3 * C), "c_proj": Conv1D(C, C)})
        layers = {"c_fc": Conv1D(C, hidden), "activation": activation, "c_proj": Conv1D(hidden, C)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.c_attn(self.ln_1(x)).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (1, H, T, D)
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Hugging Face's GPT2LMHeadModel of a config.json that export.py writes: its tensors, and its last logits."""

    def __init__(self, config: dict):
        super().__init__()
        C, V, table = config["n_embd"], config["vocab_size"], nn.Embedding.from_pretrained  # not initialised
        layers = {"wte": table(torch.empty(V, C)), "wpe": table(torch.empty(config["n_positions"], C))}
        layers |= {"drop": nn.Identity(), "h": nn.Sequential(*(GPT2Block(config) for _ in range(config["n_layer"])))}
        self.transformer = nn.ModuleDict(layers | {"ln_f": nn.LayerNorm(C, config["layer_norm_epsilon"])})
        self.lm_head = None if config["tie_word_embeddings"] else table(torch.empty(V, C))

    def forward(self, ids: Tensor) -> Tensor:
        parts = self.transformer
        x = parts.h(parts.drop(parts.wte(ids) + parts.wpe.weight[: ids.size(1)]))
        return F.linear(parts.ln_f(x)[:, -COMPARED:], (self.lm_head or parts.wte).weight)


@torch.no_grad()
def model_outputs(model: nn.Module, vocab_size: int, context_length: int) -> dict[str, Tensor]:
    """Return the outputs of a model for random token ids, which are the same for each model of this size.

    Returns:
        in the order of computation, each module's output at the last position, (1, C); and `logits` at the last
        positions.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 3:
            outputs[name] = output[:, -1].clone()

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in model.named_modules() if name]
    shape, generator = (1, min(context_length, MAX_TOKENS)), torch.Generator().manual_seed(0)
    logits = model(torch.randint(vocab_size, shape, generator=generator))
    for hook in hooks:
        hook.remove()
    return {**outputs, "logits": logits[:, -COMPARED:].clone()}


def gpt2_outputs(folder: Path) -> dict[str, Tensor]:
    """Return the outputs of the GPT-2 in a Hugging Face folder.

    Raises:
        UserError: tensors are missing or unknown, or their shapes differ from those of config.json.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = GPT2(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except RuntimeError as error:
        raise UserError(textwrap.shorten(str(error), 400)) from None
    return model_outputs(model.float(), config["vocab_size"], config["n_positions"])


def space_outputs(folder: Path) -> dict[str, Tensor]:
    """Return the logits of the model in a Space, computed in a new process by the Space's own code.

    Raises:
        UserError: the model cannot be loaded there.
    """
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": "tiktoken_cache"}
    # -B: no __pycache__, which would contain local paths
    done = subprocess.run([sys.executable, "-B", "-c", SPACE_LOGITS], cwd=folder, env=environment, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"the Space cannot load its model: {lines[-1]}")
    return {"logits": torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)}


def verify(source: Path, expected: dict[str, Tensor], space: bool, folder: Path) -> None:
    """Compare a written folder with the model.

    Args:
        source: path of the model, for the message.
        expected: model_outputs of the model, with its weights rounded to the folder's dtype.
        space: whether the folder is a Space.

    Raises:
        UserError: the folder does not give the model's logits. The first module whose output differs is named.
    """

    def differs(name: str) -> bool:
        theirs = outputs[name].flatten()
        ours = expected.get(name, theirs).flatten()  # an edited model may have no module of this name
        scale = theirs.nan_to_num(0, 0, 0).abs().max().item()  # weights so large that logits are NaN may be right
        return ours.shape != theirs.shape or not ours.allclose(theirs, 0, TOLERANCE * scale, equal_nan=True)

    try:
        outputs = space_outputs(folder) if space else gpt2_outputs(folder)
        if differs("logits"):
            raise UserError(f"the outputs first differ at {next(filter(differs, outputs))}")
    except UserError as error:
        cause = "its code is not in model.py or flatgpt/" if space else "model.py is no longer GPT-2"
        raise UserError(
            f"{source} was not exported, because the written model is not the same: {error}; {cause}: undo the change, "
            "or export without this comparison (--no-verify)"
        ) from None
