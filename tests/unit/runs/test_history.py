"""history.py: a log as it is written, cut, damaged or missing; what is known of a run without torch."""

import json
import math
import os

import pytest

from config import ModelConfig, UserError
from flatgpt.runs import history
from flatgpt.runs.run_log import RunLog
from model import GPT


def test_a_log_comes_back(tmp_path):
    run = tmp_path / "small"
    run.mkdir()
    log = RunLog(run, 0, max_iters=20)
    log.write({"iter": 0, "val_loss": 5.5})
    log.write({"iter": 10, "train_loss": 2.5, "val_loss": 3.0})
    log.write({"iter": 20, "train_loss": float("nan"), "val_loss": float("inf")})
    log.close()
    found = history.read(run)
    assert (found.name, len(found), found["iter"], found.best) == ("small", 3, [0, 10, 20], (10, 3.0))
    assert found["train_loss"][1] == 2.5
    assert math.isnan(found["train_loss"][0])
    assert math.isnan(found["train_loss"][2])
    assert all(map(math.isnan, found["loss_scale"] + found["no such key"]))


@pytest.mark.parametrize(
    ("content", "iters"),
    [
        (b"", []),
        (b"iter,val_l", []),
        (b"iter,val_loss\n", []),
        (b"iter,val_loss\n0,5", []),
        (b"iter,val_loss\n0,5\n10,4.12345", [0]),
        (b"iter,val_loss\n0,5\n10," + 200_000 * b"4" + b'\n20,"3\n', [0, 10, 20]),
        (b"iter,val_loss\n0,5\n10\n\xff\xfe\0\n20,3,1\nx,1\n30,2\n", [0, 30]),
        (b"\xef\xbb\xbfiter,val_loss\r\n0,5\r\n10,4\r\n", [0, 10]),
        (b"step,val_loss\n0,5\n10,4\n", []),
        (b"val_loss,iter\n5,0\n4,\n,20\n", [0, 20]),
    ],
)
def test_what_a_writer_or_a_crash_leaves(tmp_path, content, iters):
    (tmp_path / "metrics.csv").write_bytes(content)
    found = history.read(tmp_path)
    assert found["iter"] == iters
    assert len(found["val_loss"]) == len(found) == len(iters)


def test_an_empty_folder_and_none(tmp_path):
    found = history.read(tmp_path)
    assert (len(found), found.best, found.parameters, found.device) == (0, None, None, None)
    with pytest.raises(UserError, match="no such folder"):
        history.read(tmp_path / "none")
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        history.read(tmp_path)


def test_a_link_has_its_own_name(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "newest").symlink_to("run")
    assert history.read(tmp_path / "newest").name == "newest"


def test_facts_of_a_checkpoint_else_of_the_recipe(tmp_path):
    (tmp_path / "config.toml").write_text("n_layer = 1\nn_embd = 8\nvocab_size = 10\n")
    assert history.read(tmp_path).parameters == ModelConfig(n_layer=1, n_embd=8, vocab_size=10).num_params()
    state = {"config": {"n_embd": 16, "vocab_size": 10}, "device": "cpu", "cpu": "Abacus", "ranks": 2}
    last = tmp_path / "ckpt" / "last"
    last.mkdir(parents=True)
    (last / "state.json").write_text(json.dumps(state))
    found = history.read(tmp_path)
    assert found.parameters == ModelConfig(n_embd=16, vocab_size=10).num_params()
    assert found.device == "2 x Abacus"
    for broken in ("[", "[]", 100_000 * "[", '{"config": [1]}'):
        (last / "state.json").write_text(broken)
        assert history.read(tmp_path).settings["n_embd"] == 8
    (last / "state.json").write_text('{"config": {"n_embd": "16", "vocab_size": 10}}')
    assert history.read(tmp_path).parameters is None


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"bias": False},
        {"bias": False, "attn_bias": True},
        {"attn_bias": False, "tie_weights": False, "head_bias": True},
        {"position": "rope", "mlp_ratio": 2.7},
    ],
)
def test_parameters_are_the_models(shape):
    config = ModelConfig(n_layer=3, n_head=2, n_embd=20, context_length=12, vocab_size=71, **shape)
    assert config.num_params() == GPT(config).num_params()


def test_gpt2_has_as_many_as_published():
    assert ModelConfig(12, 12, 768, 1024, 50257).num_params() == 124_439_808


def of(**columns) -> history.History:
    return history.History("r", columns, {}, {})


def test_seconds_of_the_updates():
    """10 updates of 100 ms, 10 of the same as nobody says, 20 of 50 ms."""
    nan = math.nan
    run = of(iter=[0.0, 10.0, 20.0, 40.0], step_ms=[nan, 100.0, nan, 50.0], tokens=[0.0, 5.0, 10.0, 20.0])
    assert run.seconds == pytest.approx([0, 1, 2, 3])
    assert run.x_values("time") == run.seconds
    assert run.x_values("tokens") == run["tokens"]
    assert run.x_values("iter") == run["iter"]
    late = of(iter=[5.0, 10.0], step_ms=[nan, 200.0])
    assert late.seconds == pytest.approx([1, 2])


def test_seconds_that_nobody_knows():
    assert of(iter=[0.0]).seconds == [0.0]
    assert math.isnan(of(iter=[0.0, 10.0]).seconds[1])
    assert of().seconds == []


def test_newest_run(tmp_path):
    with pytest.raises(UserError, match=r"no run in .* yet: train one"):
        history.newest(tmp_path)
    for age, name in ((30, "a"), (10, "b"), (20, "c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").touch()
        os.utime(tmp_path / name / "metrics.csv", (1e9 - age, 1e9 - age))
    (tmp_path / "d").mkdir()
    assert history.newest(tmp_path) == tmp_path / "b"
