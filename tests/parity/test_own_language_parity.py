"""The whole road in another script: text, tokenizer, training, evaluation, generation, export, transformers."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import SCRIPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from flatgpt.data.dataset import open_dataset
from flatgpt.data.tokenizer import TOKENIZER_FILE

pytestmark = pytest.mark.slow

T = 32
CPU = ("--device", "cpu", "--dtype", "float32")
TINY = (*CPU, "--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--context_length", T, "--batch_size", 4)
SHORT = ("--max_iters", 6, "--eval_interval", 3, "--warmup_iters", 2, "--sample_tokens", 4, "--config", "none")


def write_hindi(folder: Path) -> None:
    words, rng = SCRIPTS["Devanagari"].split(), random.Random(1)
    folder.mkdir()
    for n in range(3):
        lines = (" ".join(rng.choices(words, k=12)) for _ in range(200))
        (folder / f"{n}.txt").write_text("\n".join(lines), encoding="utf-8")


def test_from_hindi_text_to_transformers(cli, in_tmp):
    """Everything after prepare_data.py's shards works without the folder of the data, and the losses are equal."""
    write_hindi(Path("hindi"))
    command = ("text", "--input", "hindi", "--name", "hindi", "--tokenizer", "bpe:400", "--special_tokens", "<|user|>")
    prepared = cli("prepare_data", *command)
    assert (prepared.code, "bpe:400 (400 ids)" in prepared.out) == (0, True)
    trained = cli("train", *TINY, *SHORT, "--dataset", "hindi", "--out_dir", "out/hindi", "--sample_prompt", "सभी ")
    assert (trained.code, trained.err.count("Traceback")) == (0, 0)
    samples = Path("out/hindi/samples.txt").read_text(encoding="utf-8")
    assert "सभी " in samples
    ids = open_dataset(Path("data/hindi")).tokens("val")[:]
    source = Path("data/hindi", TOKENIZER_FILE).read_bytes()
    shutil.move("data", "elsewhere")  # the run's folder is enough

    report = cli(
        "eval", *CPU, "--model_path", "out/hindi", "--test_data_path", "elsewhere/hindi/val_000000.bin", "--json", "-"
    )
    assert report.code == 0
    ours = json.loads(report.out)
    written = cli(
        "infer", *CPU, "--model_path", "out/hindi", "--prompt", "<|user|>सभी", "--parse_special", "--max_new_tokens", 8
    )
    assert (written.code, written.out.startswith("<|user|>सभी")) == (0, True)
    assert cli("export", "--model_path", "out/hindi", "--out", "exported", "--dtype", "float32").code == 0
    assert Path("exported", TOKENIZER_FILE).read_bytes() == source

    reference = AutoTokenizer.from_pretrained("exported", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained("exported", local_files_only=True).eval()
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(Path("hindi").iterdir()))
    decoded = reference.decode([n for n in ids.tolist() if n != reference.eos_token_id])
    assert decoded in text
    assert reference.encode("<|user|>" + decoded)[1:] == [n for n in ids.tolist() if n != reference.eos_token_id]
    windows = [ids[n : n + T + 1].astype(np.int64) for n in range(0, len(ids) - 1, T)]
    total = 0.0
    for window in windows:  # eval.py's protocol `window`
        x = torch.from_numpy(window)[None]
        with torch.no_grad():
            logits = model(x[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
    assert ours["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-4)
