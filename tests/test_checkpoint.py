"""checkpoint.py: what is on disk is whole, named, verified, or not taken for a checkpoint at all."""

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command

import checkpoint
from config import ModelConfig, UserError
from model import GPT

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "vocab_size": 257}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE))


def save(run: Path, iteration: int, model: GPT, keep: int = 9) -> Path:
    encoding = checkpoint.tokenizer.load("byte")
    state = {
        "iter": iteration,
        "config": SHAPE,
        "tokenizer": {"name": "byte", "ranks_sha256": checkpoint.tokenizer.ranks_hash(encoding)},
    }
    return checkpoint.save(
        run,
        state,
        model.state_dict(),
        {"optimizer": {"step": torch.tensor(3.0)}, "scaler": {}, "row": {"iter": 1}},
        keep,
    )


def test_round_trip(tmp_path, model):
    folder = save(tmp_path / "run", 12, model)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "state.json", "train_state.pt"]
    state = checkpoint.verify(folder)
    loaded, encoding = checkpoint.load_model(folder, state, torch.device("cpu"))
    assert encoding.name == "byte"
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    idx = torch.arange(8)[None]
    assert torch.equal(model.eval()(idx), loaded(idx))
    assert checkpoint.load_train_state(folder)["row"] == {"iter": 1}


def test_rope_model_loads_with_its_tables(tmp_path):
    """They are in no state dict, and a model on the meta device has none either."""
    rope = GPT(ModelConfig(**SHAPE, position="rope"))
    folder = save(tmp_path, 1, rope)
    state = json.loads((folder / "state.json").read_text())
    state["config"]["position"] = "rope"
    loaded, _ = checkpoint.load_model(folder, state, torch.device("cpu"))
    idx = torch.arange(8)[None]
    assert torch.equal(rope.eval()(idx), loaded(idx))


def test_links_are_relative_and_a_run_can_be_moved(tmp_path, model):
    save(tmp_path / "a", 1, model)
    save(tmp_path / "a", 2, model)
    checkpoint.point(tmp_path / "a", "best", 1)
    assert os.readlink(tmp_path / "a/ckpt/last") == "iter_000002"
    shutil.move(tmp_path / "a", tmp_path / "b")
    folder, state = checkpoint.find(str(tmp_path / "b"), print)
    assert (folder, state["iter"]) == (tmp_path / "b/ckpt/iter_000001", 1)


def test_newest_and_best_are_kept(tmp_path, model):
    for iteration in range(1, 7):
        save(tmp_path, iteration, model, keep=2)
        if iteration == 2:
            checkpoint.point(tmp_path, "best", 2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["iter_000006", "iter_000005", "iter_000002"]


def test_order_is_by_number(tmp_path, model):
    for iteration in (999_999, 1_000_000, 5):
        save(tmp_path, iteration, model)
    assert [checkpoint.read_state(p)["iter"] for p in checkpoint.checkpoints(tmp_path)] == [1_000_000, 999_999, 5]


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "empty", "half", "all but one", "zero tail", "missing"])
def test_damage_is_noticed_and_the_one_before_it_is_used(tmp_path, model, name, damage):
    save(tmp_path, 1, model)
    path = save(tmp_path, 2, model) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        if name == "state.json":  # a flipped bit in text can be a valid other text: flip one of the hash's digits
            at = content.index(b'"sha256": "') + 12
            content[at] = ord("0") if content[at] != ord("0") else ord("1")
    cut = {"empty": 0, "half": len(content) // 2, "all but one": len(content) - (2 if name == "state.json" else 1)}
    content = content[: cut.get(damage, len(content))]
    if damage == "zero tail":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.unlink()
    if damage != "missing":
        path.write_bytes(content)
    said = []
    found = checkpoint.first_good([tmp_path / "ckpt/iter_000002", tmp_path / "ckpt/iter_000001"], NAMES, said.append)
    assert found[1]["iter"] == 1
    (warning,) = said
    assert str(tmp_path / "ckpt/iter_000002") in warning


NAMES = (checkpoint.WEIGHTS, checkpoint.TRAIN_STATE)


def test_inference_does_not_need_the_train_state(tmp_path, model):
    (save(tmp_path, 1, model) / "train_state.pt").unlink()
    assert checkpoint.find(str(tmp_path), print)[1]["iter"] == 1


def test_folder_without_state_does_not_exist_and_makes_way(tmp_path, model):
    folder = tmp_path / "ckpt/iter_000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    assert checkpoint.checkpoints(tmp_path) == []
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoint.find(str(tmp_path), print)
    save(tmp_path, 3, model)
    assert checkpoint.verify(folder)["iter"] == 3


@pytest.mark.parametrize("what", ["run", "run/ckpt/iter_000001", "run/ckpt/last", "run/ckpt/last/model.safetensors"])
def test_what_model_path_may_be(tmp_path, model, what):
    save(tmp_path / "run", 1, model)
    assert checkpoint.find(str(tmp_path / what), print)[1]["iter"] == 1


def test_without_model_path_the_newest_run(in_tmp, model):
    with pytest.raises(UserError, match="train one"):
        checkpoint.find(None, print)
    for seconds, name in enumerate(("a", "c", "b")):
        save(Path("out") / name, 1, model)
        os.utime(Path("out") / name / "ckpt/last", (0, 1000 + seconds), follow_symlinks=False)
    assert checkpoint.find(None, print)[0] == Path("out/b/ckpt/iter_000001")


@pytest.mark.parametrize(("path", "part"), [("absent", "no such folder"), (".", "no usable checkpoint")])
def test_nothing_there_is_one_clear_error(in_tmp, path, part):
    with pytest.raises(UserError, match=part):
        checkpoint.find(path, print)


def test_other_format_and_other_vocabulary_are_refused(tmp_path, model):
    folder = save(tmp_path, 1, model)
    state = json.loads((folder / "state.json").read_text())
    state["tokenizer"]["ranks_sha256"] = "0"
    with pytest.raises(UserError, match="tokenizer byte"):
        checkpoint.load_model(folder, state, torch.device("cpu"))
    state["format"] = 99
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.verify(folder)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


def test_planted_pickle_does_not_run(in_tmp, model):
    folder = save(in_tmp, 1, model)
    torch.save({"optimizer": Bomb()}, folder / "train_state.pt")
    with pytest.raises(UserError, match="could run anybody's code"):
        checkpoint.load_train_state(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="does not fit"):
        checkpoint.load_weights(model, folder)
    assert not Path("canary").exists()


def test_weights_of_another_shape_are_refused(tmp_path, model):
    folder = save(tmp_path, 1, model)
    with pytest.raises(UserError, match="does not fit its config"):
        checkpoint.load_weights(GPT(ModelConfig(**{**SHAPE, "n_embd": 16})), folder)


def test_disk_that_fills_leaves_the_old_checkpoint(tmp_path):
    """A file-size limit stands in for the full disk, in a process of its own."""
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_checkpoint import GPT, SHAPE, ModelConfig, UserError, checkpoint, save
run, model = Path({str(tmp_path)!r}), GPT(ModelConfig(**SHAPE))
save(run, 1, model)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    save(run, 2, model)
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(checkpoint.verify(run / "ckpt/last")["iter"], sorted(p.name for p in run.glob("ckpt/*")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    error, state = done.stdout.strip().splitlines()
    assert "iter_000002 could not be written: model.safetensors: " in error
    assert "File too large" in error
    assert "0.0 MB are needed" in error
    assert "Still there: iter 1. Make room, then --resume" in error
    assert state == "1 ['iter_000001', 'last']"


def test_state_says_what_made_it(tiny_home):
    state = checkpoint.read_state(tiny_home / "out/quickstart/ckpt/last")
    meta = json.loads((tiny_home / "data/tiny/meta.json").read_text())
    assert state["iter"] == 60
    assert state["tokens"] == 60 * 4 * 32
    assert state["config"]["max_iters"] == 60
    assert state["config"]["vocab_size"] == 257
    assert state["tokenizer"] == {
        "name": "byte",
        "vocab_size": 257,
        "ranks_sha256": meta["ranks_sha256"],
        "eot_id": 256,
    }
    assert state["data"]["tokens"] == {
        "train": meta["splits"]["train"]["tokens"],
        "val": meta["splits"]["val"]["tokens"],
    }
    assert state["data"]["end_of_text"] is True
    assert state["command"][0] == "train.py"
    assert state["torch"] == torch.__version__
    assert state["chosen"]["dtype"] == "float32"
    assert {"git_commit", "git_dirty", "python", "device", "wandb_id", "val_loss", "best_loss", "epoch"} <= set(state)


def test_killed_while_saving_all_the_time(tiny_home, tmp_path):
    """kill -9 at any moment leaves a run that resumes."""
    shutil.copytree(tiny_home / "data", tmp_path / "data")
    words = shlex.split(
        "--dataset tiny --n_layer 1 --n_head 1 --n_embd 8 --context_length 16 --batch_size 2 --device cpu "
        "--save_interval 1 --eval_interval 100000 --eval_batches 1 --sample_tokens 0 --log_interval 1 --resume auto"
    )
    started = [sys.executable, str(ROOT / "train.py"), *words, "--max_iters", "1000000"]
    for goal in (7, 19, 31):
        process = subprocess.Popen(started, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("iter ") and int(line.split()[1]) >= goal:
                process.kill()
                break
        process.wait()
    state = checkpoint.verify(tmp_path / "out/quickstart/ckpt/last")
    assert state["iter"] >= 30
    done = command("train", *words, "--max_iters", state["iter"] + 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/quickstart/metrics.csv") as file:
        iters = [int(line.split(",")[0]) for line in file.readlines()[1:]]
    assert iters == list(range(state["iter"] + 4))
