"""Verify an exported folder: read it back, and compare its logits with those of the model.

Hugging Face's GPT-2 is computed from the files alone, without model.py, which may have been edited. A Space contains
model.py, and its own code loads it in another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from config import UserError
from flatgpt.interop.hub import CONFIG, WEIGHTS
from model import GPT

MAX_TOKENS, COMPARED = 1024, 64  # length of the input; number of logits at its end, as all would need much memory
TOLERANCE = 1e-4  # of the largest value; float32 sums in another order differ by some 1e-6
ACTIVATIONS = {"gelu_new": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}
# A missing file could be found in an installed flatGPT, which the Space does not have.
SPACE_LOGITS = """\
import os, sys, flatgpt
from flatgpt.interop.verification import model_outputs
outputs = model_outputs(flatgpt.load(".")[0])
for name in ("flatgpt", "config", "model"):
    if not sys.modules[name].__file__.startswith(os.getcwd()):
        raise ModuleNotFoundError(f"No module named {name!r}")
sys.stdout.buffer.write(outputs["logits"].numpy().tobytes())
"""


def random_ids(vocab_size: int, context_length: int) -> Tensor:
    """Return (1, T) token ids, the same for each model of this size."""
    shape, generator = (1, min(context_length, MAX_TOKENS)), torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, shape, generator=generator)


@torch.no_grad()
def model_outputs(model: GPT) -> dict[str, Tensor]:
    """Return the output of each module at the last position, (1, C), and `logits` at the last positions."""
    outputs: dict[str, Tensor] = {}

    def record(name: str, module: torch.nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 3:
            outputs[name] = output[:, -1].clone()

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in model.named_modules()]
    logits = model(random_ids(model.config.vocab_size, model.config.context_length))
    for hook in hooks:
        hook.remove()
    return {**outputs, "logits": logits[:, -COMPARED:].clone()}


@torch.no_grad()
def gpt2_outputs(folder: Path) -> dict[str, Tensor]:
    """Return the same for the GPT-2 in a Hugging Face folder, in the order of computation.

    Raises:
        UserError: tensors are missing or unknown, or their shapes differ from those of config.json.
    """
    config, weights = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    C, V, H, T = (config[key] for key in ("n_embd", "vocab_size", "n_head", "n_positions"))
    outputs: dict[str, Tensor] = {}

    def tensor(name: str, *shape: int) -> Tensor:
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != shape:
            raise UserError(f"{name} is {found}, in GPT-2 it is {shape}")
        return weights.pop(name).float()

    def record(name: str, x: Tensor) -> Tensor:
        outputs[name] = x[:, -1].clone()
        return x

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = tensor(f"{name}.weight", C), tensor(f"{name}.bias", C)
        return record(name, F.layer_norm(x, (C,), weight, bias, config["layer_norm_epsilon"]))

    def linear(name: str, x: Tensor, width: int) -> Tensor:
        return record(name, x @ tensor(f"{name}.weight", x.size(-1), width) + tensor(f"{name}.bias", width))

    ids, embedding = random_ids(V, T), tensor("transformer.wte.weight", V, C)
    x = record("transformer.drop", embedding[ids] + tensor("transformer.wpe.weight", T, C)[: ids.size(1)])  # (1, T, C)
    for block in (f"transformer.h.{n}" for n in range(config["n_layer"])):
        y = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x), 3 * C)
        q, k, v = y.unflatten(2, (3, H, -1)).permute(2, 0, 3, 1, 4)  # (1, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)  # (1, T, C)
        x = x + linear(f"{block}.attn.c_proj", y, C)
        y = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x), config["n_inner"] or 4 * C)
        x = x + linear(f"{block}.mlp.c_proj", ACTIVATIONS[config["activation_function"]](y), C)
    head = embedding if config["tie_word_embeddings"] else tensor("lm_head.weight", V, C)
    logits = norm("transformer.ln_f", x)[:, -COMPARED:] @ head.T
    if weights:
        raise UserError(textwrap.shorten(f"GPT-2 has no {', '.join(sorted(weights))}", 200))
    return outputs | {"logits": logits}


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
