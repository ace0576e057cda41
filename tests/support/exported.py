"""Checkpoints for export.py, and export.py in the process of the tests."""

from pathlib import Path

import pytest
import torch

import export
from config import ExportConfig, TrainConfig, UserError
from flatgpt.cli.settings import parse
from flatgpt.data import tokenizer
from flatgpt.runs import checkpoint
from model import GPT

T = 32  # context_length of save_run's models
WEIGHTS_AND_CARD = {"README.md", "model.safetensors"}
HUGGING_FACE_FILES = WEIGHTS_AND_CARD | {
    *("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json"),
}


def export_here(*words) -> None:
    """Run export.py with these words."""
    export.main(parse(ExportConfig, list(map(str, words))))


def refused(message: str, *words) -> None:
    """Check that export.py refuses these words with an error that matches, and writes nothing."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=message):
        export_here(*words)
    assert sorted(Path().rglob("*")) == before


def save_run(
    run_dir="out/r",
    encoding="byte",
    alter=lambda model: None,
    state: dict | None = None,
    tokenizer_file: bytes | None = None,
    **settings,
) -> GPT:
    """Save a checkpoint of a tiny model, with large random values in every parameter, and the log of its run.

    Args:
        alter: changes the parameters.
        state: more keys of state.json.
        tokenizer_file: content of the checkpoint's tokenizer.json.
        settings: of TrainConfig.
    """
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": T, "vocab_size": 257}
    config = TrainConfig(**{"out_dir": run_dir, **sizes, **settings})
    model = GPT(config.model()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        alter(model)
    facts = {
        "iter": 7,
        "config": vars(config),
        "tokenizer": {"name": encoding, "ranks_sha256": tokenizer.ranks_hash(tokenizer.load(encoding))},
        "data": {"folder": "data/tiny", "manifest_sha256": "0" * 64, "end_of_text": False, "tokens": {"train": 99}},
    }
    checkpoint.save(Path(run_dir), {**facts, **(state or {})}, model.state_dict(), {}, 1, tokenizer=tokenizer_file)
    checkpoint.set_link(Path(run_dir), "best", 7)
    Path(run_dir, "metrics.csv").write_text("iter,train_loss,val_loss\n0,,5.5\n7,5.25,5.125\n")
    return model


def files_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def table_rows(printed: str) -> dict[str, str]:
    """Return {file: size} from the printed table."""
    lines = [line.split() for line in printed.splitlines() if line.startswith("  ") and line.endswith(("bytes", "MB"))]
    return {name: " ".join(size) for name, *size in lines}
