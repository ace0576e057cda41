"""A folder that looks like a checkout of nanoGPT: a model of two tables, and a train.py that records its arguments."""

import json
from pathlib import Path

MODEL = """
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

SEEN = []  # (idx, targets, whether autocast was on) of each forward
print("parameters: two tables")  # on standard output, as nanoGPT does
if "SAY_THP" in os.environ:
    raise SystemExit("THP " + os.environ.get("THP_MEM_ALLOC_ENABLE", "is not set"))


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        self.optimizer_words = (weight_decay, learning_rate, betas, device_type)
        GPT.made = self
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def forward(self, idx, targets=None):
        if not torch.compiler.is_compiling():
            SEEN.append((idx.clone(), targets.clone(), torch.is_autocast_enabled(idx.device.type)))
        logits = self.head(self.wte(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
TRAIN = """
import json, pickle, sys
from pathlib import Path

assert Path("configurator.py").exists(), "it reads files of its current folder"
words = [word for word in sys.argv[1:] if not word.startswith(("--dataset=", "--out_dir="))]
(data,) = [Path(word.partition("=")[2]) for word in sys.argv if word.startswith("--dataset=")]
said = {"words": words, "train": (data / "train.bin").stat().st_size, "val": (data / "val.bin").stat().st_size}
said |= {"meta": pickle.loads((data / "meta.pkl").read_bytes())}
with open("said.jsonl", "a") as file:
    file.write(json.dumps(said) + "\\n")
print("step 0: train loss 4.1000, val loss 4.2000")
print("iter 0: loss 4.1234, time 12.00ms, mfu -100.00%")
print("step 250: train loss 2.0000, val loss 2.1000")
"""


def nanogpt_checkout(folder: Path) -> Path:
    """Make the folder."""
    (folder / "config").mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    (folder / "train.py").write_text(TRAIN)
    (folder / "configurator.py").write_text("")
    (folder / "config" / "train_shakespeare_char.py").write_text("")
    return folder


def bench_here(*words) -> dict:
    """Run bench.py in this process and the current folder. Returns its figures.

    Functions of bench.py can be replaced, which `cli` does not allow: it runs a fresh copy of the script.
    """
    import bench
    from config import BenchConfig
    from flatgpt.cli import cli

    bench.main(cli.parse(BenchConfig, [*map(str, words), "--json", "figures.json"]))
    return json.loads(Path("figures.json").read_text())
