"""What the scripts refuse: one `error:` line, exit code 2, and what the line must contain. Nothing is written.

A row is a script, its words, and parts of the line: the key or file, the value, what to do. Several problems are one
error with numbered lines. Refusals that depend on data or a trained model are in the file of their script.
"""

import os
import re
from pathlib import Path

import pytest

REFUSALS = [
    # prepare_data.py
    ("prepare_data", "", "source: missing", "pydoc", "text"),
    ("prepare_data", "pydocs", "source = pydocs", "did you mean pydoc?"),
    ("prepare_data", "pydoc more", "more: not expected"),
    ("prepare_data", "text --input", "--input: a value is missing"),
    ("prepare_data", "text", "--input"),
    ("prepare_data", "pydoc --input a.txt", "--input", "pydoc"),
    ("prepare_data", "shakespeare --val_fraction 0.2", "--val_fraction", "shakespeare"),
    ("prepare_data", "shakespeare --val_fraction 0", "--val_fraction", "shakespeare"),
    ("prepare_data", "text --input a --val_input b --val_fraction 0.1", "--val_input and --val_fraction exclude"),
    ("prepare_data", "text --input a --test_input b --test_fraction 0", "--test_input and --test_fraction exclude"),
    ("prepare_data", "wikipedia --subset 20231101.hi", "--subset applies to source hub", "its subsets are --dump"),
    ("prepare_data", "hub --repo a/b --subset c --files d", "--subset and --files exclude each other"),
    ("prepare_data", "text --input a --refresh", "--refresh applies to source wikitext103, wikipedia, fineweb, hub"),
    ("prepare_data", "wikipedia --val_input a", "--val_input applies to source text, compare, not to wikipedia"),
    ("prepare_data", "compare --input a --val_fraction 0", "val_fraction = 0: compare counts"),
    ("prepare_data", "pydoc --name a/b", "'a/b'", "folder name"),
    ("prepare_data", "pydoc --info data/x", "--info", "leave out pydoc"),
    ("prepare_data", "hub", "--repo USER/NAME"),
    ("prepare_data", "hub --repo a", "repo = a", "user/name"),
    ("prepare_data", "pydoc --column body", "--column", "pydoc"),
    # train.py
    ("train", "--config /proc/self/mem", "/proc/self/mem: cannot be read", "Input/output error"),
    ("train", "stray", "stray: not expected"),
    ("train", "--n_layer", "--n_layer: a value is missing"),
    ("train", "--config= --resume=", "--config = : it is empty", "--resume = : it is empty; give a value, or none"),
    ("train", "--no-n_layer", "--no-n_layer", "no such key"),
    ("train", "--seed -1", "--seed = -1", "at least 0"),
    ("train", "--n_layer x", "--n_layer = x", "a whole number"),
    ("train", "--n_layer 2.5", "--n_layer = 2.5", "a whole number"),
    ("train", "--vocab_size 65537", "--vocab_size = 65537", "at most 65536"),
    ("train", "--lr fast", "--lr = fast", "a number"),
    ("train", "--lr 0", "--lr = 0", "more than 0"),
    ("train", "--lr nan", "--lr = nan", "a number"),
    ("train", "--dropout 1", "--dropout = 1", "less than 1"),
    ("train", "--beta2 1", "--beta2 = 1", "less than 1"),
    ("train", "--seed 9223372036854775808", "--seed = 9223372036854775808", "less than"),
    ("train", "--activation gelu_tan", "--activation = gelu_tan", "gelu_tanh, gelu, relu"),
    ("train", "--bias=maybe", "--bias = maybe", "true or false"),
    ("train", "--n_embd 190", "n_embd = 190", "n_head = 4"),
    ("train", "--position rope --n_head 4 --n_embd 12", "rope", "even", "3"),
    ("train", "--head_bias", "head_bias", "--no-tie_weights"),
    ("train", "--lr 1e-6", "min_lr = 1e-05", "lr = 1e-06"),
    ("train", "--resume --overwrite", "resume", "overwrite"),
    ("train", "--max_iters none", "max_iters", "epochs"),
    ("train", "--warmup_iters none", "warmup_iters", "warmup_fraction"),
    ("train", "--lr 1e-6 --min_lr 2e-6", "min_lr = 2e-06 is larger than lr = 1e-06", "with --min_lr 1e-07"),
    ("train", "--device cuda:x", "--device = cuda:x: one of auto, cuda, cuda:N, mps, cpu is expected"),
    ("train", "--device cuda:N", "--device = cuda:N: one of auto, cuda, cuda:N"),
    ("infer", "--device cuda:", "--device = cuda:: one of auto, cuda, cuda:N, mps, cpu is expected"),
    ("eval", "--device gpu", "--device = gpu: one of auto, cuda, cuda:N, mps, cpu is expected"),
    ("train", "--optimizer muon --fsdp", "muon", "fsdp"),
    ("train", "--mlp_ratio 0.001", "mlp_ratio = 0.001", "n_embd = 128"),
    ("train", "--n_embd 190 --head_bias --lr 1e-6", "3 problems", "n_embd", "head_bias", "min_lr"),
    ("train", "--out_dir a/metrics.csv", "out_dir = a/metrics.csv", "is a file; choose another --out_dir"),
    ("train", "--out_dir a/metrics.csv/b --resume auto", "a/metrics.csv is a file; choose another --out_dir"),
    ("train", "config/train_shakespeare_char.py --lr 1", "write --config shakespeare_char_cpu"),
    ("train", "config/train_gpt2.py", "write --config gpt2_124m"),
    ("train", "--config gpt2", "did you mean gpt2_124m?"),
    ("train", "--config runs/a/config.toml --resume", "error: config = runs/a/config.toml: no such file"),
    ("train", "lr 1e-3", "error: lr: write --lr"),
    ("train", "--name quick", "--name: use --out_dir out/NAME"),
    ("train", "--wandb_log=False", "otherwise leave it out"),
    ("train", "--tracker trackio --wandb offline", "tracker = trackio excludes wandb = offline: leave out one of them"),
    ("train", "--tracker mlflow", "--tracker = mlflow: one of wandb, tensorboard, trackio is expected"),
    ("train", "--resume a", "nothing to resume in a: there is no checkpoint", "python train.py --config a/config.toml"),
    # eval.py
    ("eval", "--dataset pydoc --test_data_path x.bin", "dataset", "test_data_path"),
    # infer.py
    ("infer", "--greedy --temperature 0.5", "greedy chooses the most likely token", "leave out temperature"),
    ("infer", "--greedy --top_k 5", "greedy", "leave out top_k"),
    ("infer", "--temperature 0 --top_p 0.9", "temperature = 0 chooses the most likely token", "leave out top_p"),
    ("infer", "--greedy --top_k 5 --top_p 0.9 --min_p 0.1", "3 problems", "top_k", "top_p", "min_p"),
    ("infer", "--top_p 1.5", "--top_p = 1.5", "at most 1"),
    ("infer", "--stop= --stop x", "stop = ''"),
    ("infer", "--quantize int8 --dtype float32", "quantize = int8", "leave out dtype"),
    ("infer", "--quantize int4", "--quantize = int4", "int8"),
    ("eval", "--eval_tokens 5 --eval_epochs 2", "eval_batches and eval_tokens exclude each other"),
    ("infer", "- --interactive", "- and --interactive exclude each other"),
    ("infer", "--prompt p --prompts_file x --json y", "--prompt and --prompts_file exclude each other"),
    ("infer", "--interactive --json x", "--interactive generates one text per prompt"),
    ("infer", "--interactive --num_samples 2", "leave out json and num_samples"),
    ("infer", "out/q", "out/q: write --model_path out/q"),
    ("infer", "--logprobs 3", "logprobs = 3", "add --json FILE"),
    ("infer", "--logprobs -1 --json x", "--logprobs = -1", "at least 0"),
    # bench.py
    ("bench", "--list", "list applies to train.py"),
    ("bench", "--tracker tensorboard", "tracker applies to train.py"),
    ("bench", "--wandb offline", "tracker applies to train.py"),
    ("bench", "train --plot a.png", "plot applies to bench.py loss, not to train"),
    ("bench", "loss --target 1 --plot a.pdf", "plot = a.pdf: a name that ends in .png is expected"),
    # plot.py
    ("plot", "none", "none: no such folder; a run's folder is expected, out/NAME"),
    ("plot", "a/metrics.csv", "a/metrics.csv: a file; a run's folder is expected"),
    ("infer", "--json a", "json = a cannot be written, because it is a folder; choose another"),
    ("plot", "none --watch", "none: no such folder"),
    ("plot", "empty", "empty: metrics.csv has no values to plot over iter; choose another run, or wait"),
    ("plot", "empty empty2", "empty, empty2: metrics.csv has no values"),
    ("plot", "a --x tokens", "a: metrics.csv has no values to plot over tokens;"),
    ("plot", "a --out a.pdf", "out = a.pdf: a name that ends in .png or .svg is expected"),
    ("plot", "a --out a.png --svg", "out = a.png: a name that ends in .svg is expected"),
    ("plot", "a --out no/a.png", "out = no/a.png cannot be written, because there is no folder no"),
    ("plot", "a --x epoch", "--x = epoch: one of iter, tokens, time is expected"),
    ("plot", "", "no run in out/ yet: train one (python train.py), or give the folder of a run"),
]


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: f"{row[0]} {row[1]}")
def test_refusal(cli, in_tmp, row):
    script, words, *parts = row
    for name in ("a", "empty", "empty2"):
        Path(name).mkdir()
    Path("a/metrics.csv").write_text("iter,val_loss\n1,5\n")
    Path("a/config.toml").write_text("n_layer = 1\n")
    done = cli(script, *words.split())
    for part in parts:
        assert part in done.err
    lines = len(re.findall("^  [0-9]+[.] ", done.err, re.M)) + 1
    assert (done.code, done.out, done.err.count("error: "), done.err.count("\n")) == (2, "", 1, lines)
    assert sorted(os.listdir()) == ["a", "empty", "empty2"]
