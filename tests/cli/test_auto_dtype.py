"""--dtype auto on a CPU: what was measured is printed, stored and kept; what the user sets is not measured."""

import json
import re

import pytest
import torch
from in_process import TINY, train_here

import infer
import train
from config import BenchConfig, InferConfig, TrainConfig
from flatgpt.benchmarks.nanogpt import peer_settings
from flatgpt.cli import cli
from flatgpt.interop.pretrained import run_settings
from flatgpt.runs import checkpoint

FLOAT32, BFLOAT16 = ("float32", "as measured: 7 GFLOP/s"), ("bfloat16", "as measured: 9 GFLOP/s")
AUTO = ("--dtype", "auto", "--sample_tokens", 0)


def printed_dtypes(text: str) -> list[str]:
    return re.findall(r"^machine +cpu \(\d+ threads?\), (.*?), eager", text, re.M)


def test_a_run_prints_stores_and_keeps_its_choice(tiny_data, measured, capsys):
    """Also a run of an earlier version, which stored no reason."""
    measured(BFLOAT16)
    run = train_here(*AUTO, "--max_iters", 3)
    assert measured(None) == ["matmul 128 x 32 x 128"]
    for iters in (6, 9):
        chosen = checkpoint.read_state(run / "ckpt/last")["chosen"]
        assert chosen["dtype"] == "bfloat16"
        assert chosen["why"]["dtype"].endswith("as measured: 9 GFLOP/s")
        train_here(*AUTO, "--max_iters", iters, "--resume")
    train.train(cli.parse(TrainConfig, ["--resume", "--max_iters", "10"], None, run_settings))
    assert printed_dtypes(capsys.readouterr().out) == ["bfloat16 (as measured: 9 GFLOP/s)"] * 4
    state = json.loads((run / "ckpt/last/state.json").read_text())
    state["chosen"]["why"] = {}
    del state["sha256"]
    (run / "ckpt/last/state.json").write_text(json.dumps(state))
    train_here(*AUTO, "--max_iters", 12, "--resume")
    assert printed_dtypes(capsys.readouterr().out) == ["bfloat16 (chosen when the run started)"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_the_user_sets_is_not_measured(tiny_data, measured, dtype):
    measured(None)
    words = [*TINY, "--dtype", dtype, "--max_iters", "1", "--eval_interval", "1", "--sample_tokens", "0"]
    train.train(cli.parse(TrainConfig, words))
    train.train(cli.parse(TrainConfig, [*words, "--plan"]))
    for more in (["--dtype", dtype], ["--quantize", "int8"]):  # int8's kernel takes bfloat16 only
        infer.main(cli.parse(InferConfig, ["--device", "cpu", "--prompt", "9", "--max_new_tokens", "1", *more]))


def test_plan_and_nanogpt_take_the_choice_of_training(tiny_data, measured, monkeypatch):
    seen = []
    monkeypatch.setattr("flatgpt.training.plan.matmul_flops", lambda device, dtype: seen.append(dtype) or 1e12)
    for choice, dtype in ((BFLOAT16, torch.bfloat16), (FLOAT32, torch.float32)):
        measured(choice)
        train.train(cli.parse(TrainConfig, [*TINY, "--dtype", "auto", "--plan"]))
        assert seen.pop() == dtype
        settings = peer_settings(cli.parse(BenchConfig, ["train", *TINY, "--dtype", "auto"]))
        assert [each.dtype for each in settings.values()] == [torch.float32, dtype]


@pytest.mark.parametrize(("first", "second"), [(BFLOAT16, FLOAT32), (FLOAT32, BFLOAT16)])
def test_infer_writes_the_same_text_the_next_time(tiny_home, measured, monkeypatch, capsys, first, second):
    """Also if a second measurement would differ. The machine line has the measured speeds."""
    monkeypatch.chdir(tiny_home)

    def write(*more: str) -> tuple[str, str]:
        words = ["--device", "cpu", "--prompt", "99 green", "--max_new_tokens", "60", "--temperature", "1.5", *more]
        infer.main(cli.parse(InferConfig, words))
        return capsys.readouterr()

    measured(first)
    text, machine = write()
    assert f"on cpu (1 thread), {first[0]} ({first[1]}), eager" in machine
    measured(second)
    again = write()
    assert (again[0], again[1].splitlines()[0]) == (text, machine.splitlines()[0])
    assert write("--dtype", first[0])[0] == text
