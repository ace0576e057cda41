"""docs/changing.md: each diff is applied to a copy of the repository, and the commands below it are run there."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from forked import Result, Scripts
from processes import ROOT
from run_files import assert_same_run, weights
from scripted import save_model, scripted_model, zero_model

import model
from config import ModelConfig
from flatgpt.evaluation.metrics import eval_batches, mean_loss

pytestmark = pytest.mark.slow
DOCUMENT = (ROOT / "docs/changing.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", DOCUMENT, re.M))
# What the commands are given in addition.
TRAIN = (
    "--device cpu --n_layer 1 --n_head 2 --n_embd 16 --context_length 16 --batch_size 2 --warmup_iters 0 --max_iters 2 "
)
TRAIN += "--eval_interval 2 --eval_tokens 64 --log_interval 1 --sample_tokens 4 --schedule constant --dtype float32"
TOY = {
    "train": TRAIN,
    "eval": "--device cpu --eval_tokens 64",
    "infer": "--device cpu --dtype float32 --max_new_tokens 4",
}

MEMORY = ("weights", "optimizer")  # rows of the plan


class Changed(NamedTuple):
    """A changed copy of the repository, and a folder in which its scripts run."""

    scripts: Scripts
    root: Path
    home: Path
    outputs: list[str]  # of the section's commands

    def run(self, line: str, root: Path | None = None) -> Result:
        script = line.split()[0]
        line = f"{script} {TOY.get(script, '')} {line.removeprefix(script)}"
        return self.scripts.run(line, self.home, root=root or self.root)

    def succeed(self, line: str) -> str:
        done = self.run(line)
        assert done.code == 0, done
        return done.stdout

    def refused(self, line: str, root: Path | None = None) -> str:
        done = self.run(line, root)
        assert done.code == 2, done
        return done.stderr


@pytest.fixture
def changed(scripts, run_copy, tmp_path_factory, request) -> Changed:
    """The change of a section, after its commands. The current folder has data/tiny, and the commands' runs in out/."""
    section, root = SECTIONS[request.param], tmp_path_factory.mktemp("changed")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.txt")):
        shutil.copy(path, root)
    for folder in ("flatgpt", "configs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", section, re.M | re.S)
    files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)
    assert len(files) <= 2
    (root / "change.diff").write_text(diff, encoding="utf-8")
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}  # of any repository
    applied = subprocess.run(["git", "apply", "change.diff"], cwd=root, capture_output=True, text=True, env=outside)
    assert applied.returncode == 0, applied.stderr
    assert all((root / file).read_bytes() != (ROOT / file).read_bytes() for file in files)
    here = Changed(scripts, root, Path.cwd(), [])
    for n, line in enumerate(re.findall(r"`python (\w+\.py[^`]*)`", section)):
        script, _, words = line.partition(".py")
        words += f" --out_dir out/{n}" * (script == "train") + " --dataset tiny" * ("--dataset" not in words)
        here.outputs.append(here.succeed(f"{script} {words}" if script == "train" else line.replace(".py", "", 1)))
    return here


def change(title: str):
    return pytest.mark.parametrize("changed", [title], indirect=True)


@change("Another activation")
def test_activation(changed, monkeypatch):
    """The loss is that of the same weights with another implementation. The model cannot be exported."""
    assert "one of gelu_tanh, gelu, relu is" in changed.refused("train --activation relu_squared", ROOT)
    assert "activation = relu_squared" in changed.refused("export --out exported")
    Path("a.txt").write_text("9 green bottles " * 30)
    report = json.loads(changed.succeed("eval --text a.txt --json -"))
    state = json.loads(Path("out/0/ckpt/last/state.json").read_text())
    monkeypatch.setitem(model.ACTIVATIONS, "relu_squared", lambda: lambda x: x.clamp(min=0) * x)
    plain = model.GPT(ModelConfig(**{key: state["config"][key] for key in ModelConfig.__dataclass_fields__}))
    plain.load_state_dict(weights(Path("out/0")), strict=False)  # a tied head is stored once
    batches = eval_batches(np.frombuffer(Path("a.txt").read_bytes(), np.uint8), 16, 4, limit=report["tokens"])
    assert mean_loss(plain, batches, torch.from_numpy) == pytest.approx(report["loss"])


@change("A soft cap on the logits")
def test_soft_cap(changed):
    """A logit of 100 is 15 then, among 256 that are 0: in sampling and in evaluation."""
    path = save_model(scripted_model("abcdefgh"), "out/script")
    expected = pytest.approx(math.log(1 + 256 * math.exp(-15 * math.tanh(100 / 15))), abs=4e-6)
    changed.succeed(f"infer --model_path {path} --prompt p --greedy --logprobs 0 --json a.json")
    (text,) = json.loads(Path("a.json").read_text())["texts"]
    assert text["text"] == "abcd"
    assert [-token["logprob"] for token in text["logprobs"]] == [expected] * 4
    Path("a.txt").write_text("pabcdefgh")
    assert json.loads(changed.succeed(f"eval --model_path {path} --text a.txt --json -"))["loss"] == expected
    assert "logits" in changed.refused(f"export --model_path {path} --out exported")


@change("Another optimizer")
def test_optimizer(changed):
    """A resumed run is the uninterrupted one. The plan counts two moments per weight, in rounded gigabytes."""
    changed.succeed("train --resume out/0 --max_iters 4")
    changed.succeed("train --dataset tiny --optimizer nadam --out_dir out/whole --max_iters 4")
    assert_same_run(Path("out/0"), Path("out/whole"))
    size = {name: float(re.search(rf"^ +{name} +(\S+)$", changed.outputs[1], re.M)[1]) for name in MEMORY}
    assert size["optimizer"] == pytest.approx(2 * size["weights"], rel=0.3)


@change("Another metric")
def test_metric(changed):
    """The entropy of equal probabilities is the logarithm of their number."""
    path = save_model(zero_model(), "out/uniform")
    Path("a.txt").write_text("9 green bottles")
    report = json.loads(changed.succeed(f"eval --model_path {path} --text a.txt --json -"))
    assert report["entropy"] == pytest.approx(math.log(257))
    assert report["units"]["entropy"] == "nats, of the predictions"
    assert re.search(r"^entropy +\d\.\d{4}  nats, of the predictions$", changed.outputs[0], re.M)


@change("Another source of text")
def test_source(changed):
    text = b"".join(Path("data/sums").joinpath(f"{split}_000000.bin").read_bytes()[::2] for split in ("train", "val"))
    lines = text.decode().splitlines()
    assert sorted(lines) == sorted(f"{a}+{b}={a + b}" for a in range(100) for b in range(100))
    shutil.rmtree("data/sums")
    assert "preparing it from all sums" in changed.succeed("train --dataset sums --out_dir out/new")
    assert "--val_fraction applies to source" in changed.refused("prepare_data sums --val_fraction 0.2")
