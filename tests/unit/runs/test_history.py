"""history.py: logs as they are written, cut, damaged or missing; what follows from them."""

import json
import math

import pytest

from config import ModelConfig, UserError
from flatgpt.runs import history
from flatgpt.runs.history import gpt2_parameters
from flatgpt.runs.run_log import RunLog

NAN = math.nan


def test_a_log_comes_back(tmp_path):
    log = RunLog(tmp_path, 0, max_iters=20)
    log.write({"iter": 0, "val_loss": 5.5})
    log.write({"iter": 10, "train_loss": 2.5, "val_loss": 3.0})
    log.write({"iter": 20, "train_loss": float("nan"), "val_loss": float("inf")})
    log.close()
    (tmp_path / "link").symlink_to(".")
    found = history.read(tmp_path / "link")
    assert (found.name, len(found), found["iter"], found.best) == ("link", 3, [0, 10, 20], (10, 3.0))
    assert found["train_loss"] == pytest.approx([math.nan, 2.5, math.nan], nan_ok=True)
    assert all(map(math.isnan, found["loss_scale"] + found["no such key"]))


@pytest.mark.parametrize(
    ("content", "iters"),
    [
        (b"", []),
        (b"iter,val_l", []),
        (b"iter,val_loss\n0,5\n10,4.12345", [0]),
        (b"iter,val_loss\n0,5\n10," + 200_000 * b"4" + b'\n20,"3\n', [0, 10, 20]),
        (b"iter,val_loss\n0,5\n10\n\xff\xfe\0\n20,3,1\nx,1\n30,2\n", [0, 30]),
        (b"\xef\xbb\xbfiter,val_loss\r\n0,5\r\n10,4\r\n", [0, 10]),
        (b"step,val_loss\n0,5\n10,4\n", []),
        (b"val_loss,iter\n5,0\n4,\n,20\n", [0, 20]),
        (b"# mine\niter;val_loss\r\n0;5,5\r\n10;4,5", [0, 10]),
        (b"iter\tval_loss\n0\t5\n10\tgood\n", [0, 10]),
    ],
)
def test_what_a_writer_or_a_crash_leaves(tmp_path, content, iters):
    (tmp_path / "metrics.csv").write_bytes(content)
    found = history.read(tmp_path)
    assert found["iter"] == iters
    assert len(found["val_loss"]) == len(found) == len(iters)


def test_what_is_skipped_is_said(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("iter;val_loss;note\n0;5,5;\n10;4,5;good\n\n# the\x1b end\n20;3,5\n")
    found = history.read(tmp_path)
    assert (found["iter"], found["val_loss"], found.best) == ([0, 10], [5.5, 4.5], (10, 4.5))
    text = f"warning: {tmp_path}/metrics.csv: 3 lines or cells are skipped: 'good' ...\n"
    assert capsys.readouterr().err == text


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        history.read(tmp_path / "none")


def test_settings_are_those_of_the_checkpoint_else_of_the_recipe(tmp_path):
    (tmp_path / "config.toml").write_text("n_layer = 1\nn_embd = 8\nvocab_size = 10\n")
    assert history.read(tmp_path).parameters == gpt2_parameters(ModelConfig(n_layer=1, n_embd=8, vocab_size=10))
    (tmp_path / "ckpt/iter_000001").mkdir(parents=True)
    (tmp_path / "ckpt/last").write_text("iter_000001")  # in place of a symlink
    state = tmp_path / "ckpt/iter_000001/state.json"
    state.write_text('{"config": {"n_embd": 16, "vocab_size": 10}}')
    assert history.read(tmp_path).parameters == gpt2_parameters(ModelConfig(n_embd=16, vocab_size=10))
    state.write_text('{"config": {"n_embd": 16, "vocab_size": 10}, "parameters": 7}')
    assert history.read(tmp_path).parameters == 7
    for wrong in ("x", [1], 1e400):
        state.write_text(json.dumps({"config": {"n_embd": wrong, "vocab_size": 10}, "parameters": wrong}))
        assert history.read(tmp_path).parameters is None
    for broken in ("[", 100_000 * "[", '{"config": 3}'):
        state.write_text(broken)
        assert history.read(tmp_path).settings["n_embd"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# what follows from the log


@pytest.mark.parametrize(
    ("step_ms", "seconds"),
    [
        ([NAN, NAN, 100, NAN, 50], [0, 1, 2, 2.5, 3]),  # as the next one, else the last one
        ([NAN, 100, NAN, NAN, NAN], [0, 1, 2, 3, 4]),
        ([NAN] * 5, [0, NAN, NAN, NAN, NAN]),
    ],
)
def test_time_of_the_updates(step_ms, seconds):
    found = history.History("r", {"iter": [0, 10, 20, 30, 40], "step_ms": step_ms}, {}, {})
    assert found.update_seconds == pytest.approx(seconds, nan_ok=True)
    assert found.seconds == (None if math.isnan(seconds[-1]) else pytest.approx(seconds[-1]))
    assert history.History("r", {}, {}, {}).update_seconds == []


def test_bits_per_byte_follow_from_the_text_of_the_split(tmp_path):
    """Earlier versions did not store its bytes: they are those of meta.json, unless that is of another text."""

    def bits(state: dict, settings: dict, split: str = "val") -> float | None:
        return history.History("r", {}, state, settings).bits_per_byte(2 * math.log(2), split)

    stored = {"data": {"tokens": {"val": 100}, "bytes": {"val": 400}}}
    assert bits(stored, {}) == pytest.approx(0.5)
    assert bits(stored, {}, "train") is None
    assert history.History("r", {}, stored, {}).bits_per_byte(None) is None
    folder, settings = tmp_path / "mine", {"data_dir": str(tmp_path), "dataset": "mine"}
    old = {"data": {"tokens": {"val": 100}, "folder": str(folder)}}
    assert bits(old, {}) is None
    folder.mkdir()
    (folder / "meta.json").write_text('{"splits": {"val": {"tokens": 100, "bytes": 200}}}')
    assert bits(old, {}) == bits({}, settings) == pytest.approx(1)
    old["data"]["tokens"]["val"] = 99
    for broken in (old, {"data": {"tokens": 1, "bytes": 2}}, {"data": []}):
        assert bits(broken, {}) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7, "7"),
        (999, "999"),
        (999.6, "1K"),
        (12_345, "12.3K"),
        (999_499, "999K"),
        (999_500, "1M"),
        (1.2e8, "120M"),
    ],
)
def test_compact_numbers_have_three_digits(number, text):
    assert history.format_compact(number) == text
    assert history.format_compact(1e6 * number)[-1] in "MBT"
