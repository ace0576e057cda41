"""`auto` on a CPU: what was measured is printed, stored and kept; what the user sets is not measured."""

import json
import re

import pytest
import torch
from in_process import TINY, first_fast, train_here

import infer
import train
from config import BenchConfig, InferConfig, TrainConfig
from flatgpt.benchmarks.nanogpt import peer_settings
from flatgpt.cli import cli
from flatgpt.interop.pretrained import run_settings
from flatgpt.runs import checkpoint
from flatgpt.runtime import choices
from flatgpt.training.setup import build_run

AUTO = ("--dtype", "auto", "--sample_tokens", 0)
DTYPES, PATHS = ("float32", "bfloat16"), ("fused", "plain")
WHY = r" \(.*: 1 ms, .* 2\)"


def printed(text: str) -> list[tuple[str, str, str]]:
    """The dtype, attention and loss of each summary, with the reasons."""
    lines = re.findall(
        r"^machine +cpu \(\d+ threads?\), (.*?), eager.*\nattention (.*)\nloss +(.*)\nfolder", text, re.M
    )
    assert len(lines) == text.count("machine  ")
    return lines


@pytest.mark.parametrize("path", first_fast(PATHS))
def test_a_run_prints_stores_and_keeps_its_choices(tiny_data, measured, capsys, path):
    timed = measured("bfloat16", path)
    run = train_here(*AUTO, "--max_iters", 3)
    assert timed == [DTYPES, PATHS[::-1], PATHS[::-1]]  # the default first
    measured("float32", *({*PATHS} - {path}))
    for iters in (6, 9):
        chosen = checkpoint.read_state(run / "ckpt/last")["chosen"]
        assert (chosen["dtype"], chosen["paths"]) == ("bfloat16", {"attention": path, "loss": path})
        assert chosen["why"].keys() >= {"dtype", "attention", "loss"}
        train_here(*AUTO, "--max_iters", iters, "--resume")
    train.train(cli.parse(TrainConfig, ["--resume", "--max_iters", "10"], None, run_settings))
    lines = printed(capsys.readouterr().out)
    assert len(timed) == 3
    assert lines == [lines[0]] * 4
    for text, name in zip(lines[0], ("bfloat16", path, path), strict=True):
        assert re.fullmatch(name + WHY, text)


def test_a_run_of_an_earlier_version_keeps_its_operators(tiny_data, measured, capsys):
    """It stored its dtype without a reason, and no operators: they depended on dtype and shape."""
    timed = measured("bfloat16", "fused")
    run = train_here(*AUTO, "--max_iters", 3)
    state = json.loads((run / "ckpt/last/state.json").read_text())
    state["chosen"] = {"dtype": "bfloat16", "compile": False}
    del state["sha256"]
    (run / "ckpt/last/state.json").write_text(json.dumps(state))
    capsys.readouterr()
    train_here(*AUTO, "--max_iters", 6, "--resume")
    assert "bfloat16 (chosen when the run started)" in (out := capsys.readouterr().out)
    assert "\nattention " not in out
    assert checkpoint.read_state(run / "ckpt/last")["chosen"]["paths"] == {}
    assert len(timed) == 3
    train_here("--dtype", "float32", "--max_iters", 9, "--resume")  # another dtype is measured anew
    assert timed[3:] == [PATHS, PATHS[::-1]]


@pytest.mark.parametrize("words", [("--deterministic", "true"), ("--compile", "true"), ("--attention", "manual")])
def test_what_excludes_a_measurement(tiny_data, measured, words, monkeypatch):
    """Deterministic runs do not depend on a stopwatch. The compiler fuses plain operators by itself."""
    monkeypatch.setattr("flatgpt.training.setup.compile_forward", lambda model, warn: model)
    timed = measured()
    train_here(*words, "--max_iters", 1, "--eval_interval", 1, "--sample_tokens", 0)
    assert timed == [PATHS[::-1]] * (words[1] == "manual")  # the loss


@pytest.mark.parametrize("path", PATHS)
def test_the_model_computes_with_the_chosen_operators(tiny_data, measured, path):
    """In training. Evaluation does not depend on the choice."""
    measured(path)
    config = cli.parse(TrainConfig, [*TINY, "--dtype", "bfloat16"])
    run = build_run(config)
    x = torch.arange(64).view(2, 32) % 99
    names = []
    with torch.profiler.profile() as profile, run.device_settings.autocast():
        run.forward(x, x)
    names = {event.name for event in profile.events()}
    assert ("aten::scaled_dot_product_attention" in names, "_FusedLoss" in names) == (path == "fused",) * 2
    with torch.profiler.profile() as profile, run.device_settings.autocast(), torch.no_grad():
        run.forward(x, x)
    names = {event.name for event in profile.events()}
    assert not names & {"aten::scaled_dot_product_attention", "_FusedLoss"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_the_user_sets_is_not_measured(tiny_data, measured, dtype):
    timed = measured()
    words = [*TINY, "--dtype", dtype, "--max_iters", "1", "--eval_interval", "1", "--sample_tokens", "0"]
    train.train(cli.parse(TrainConfig, words))
    train.train(cli.parse(TrainConfig, [*words, "--plan"]))
    for more in (["--dtype", dtype], ["--quantize", "int8"]):  # int8's kernel takes bfloat16 only
        infer.main(cli.parse(InferConfig, ["--device", "cpu", "--prompt", "9", "--max_new_tokens", "1", *more]))
    assert DTYPES not in timed


def test_plan_and_nanogpt_take_the_choice_of_training(tiny_data, measured, monkeypatch):
    seen = []
    monkeypatch.setattr("flatgpt.training.plan.matmul_flops", lambda device, dtype: seen.append(dtype) or 1e12)
    for dtype in (torch.bfloat16, torch.float32):
        measured(str(dtype).removeprefix("torch."))
        choices.cache_file().unlink(missing_ok=True)
        train.train(cli.parse(TrainConfig, [*TINY, "--dtype", "auto", "--plan"]))
        assert seen.pop() == dtype
        settings = peer_settings(cli.parse(BenchConfig, ["train", *TINY, "--dtype", "auto"]))
        assert [each.dtype for each in settings.values()] == [torch.float32, dtype]


@pytest.mark.parametrize(("first", "second"), [DTYPES, DTYPES[::-1]])
def test_infer_writes_the_same_text_the_next_time(tiny_home, measured, monkeypatch, capsys, first, second):
    """Also if a second measurement would differ. The machine line has the measured speeds."""
    monkeypatch.chdir(tiny_home)

    def write(*more: str) -> tuple[str, str]:
        words = ["--device", "cpu", "--prompt", "99 green", "--max_new_tokens", "60", "--temperature", "1.5", *more]
        infer.main(cli.parse(InferConfig, words))
        return capsys.readouterr()

    measured(first)
    text, machine = write()
    assert f"on cpu (1 thread), {first} (matmuls of 1 token: 1 ms, {second} 2), eager" in machine
    measured(second)
    again = write()
    assert (again[0], again[1].splitlines()[0]) == (text, machine.splitlines()[0])
    assert write("--dtype", first)[0] == text
