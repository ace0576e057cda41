"""checkpoint.py: a checkpoint on the disk is whole, found by its names, verified, and never unpickled."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT

from config import ModelConfig, TrainConfig, UserError
from flatgpt.cli.cli import parse
from flatgpt.data import tokenizer
from flatgpt.interop import loading
from flatgpt.interop.pretrained import initial_shape
from flatgpt.runs import checkpoint
from model import GPT

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "vocab_size": 257}
FILES = (checkpoint.WEIGHTS, checkpoint.TRAIN_STATE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE))


def save(run: Path, iteration: int, model: GPT, keep: int = 9, keep_every: int | None = None) -> Path:
    ranks_hash = tokenizer.ranks_hash(tokenizer.load("byte"))
    config = {key: getattr(model.config, key) for key in (*SHAPE, "position")}
    state = {"iter": iteration, "config": config, "tokenizer": {"name": "byte", "ranks_sha256": ranks_hash}}
    train_state = {"optimizer": {"step": torch.tensor(3.0)}, "scaler": {}, "row": {"iter": 1}}
    return checkpoint.save(run, state, model.state_dict(), train_state, keep, keep_every)


def load(folder: Path):
    return loading.load(loading.find(str(folder), print), torch.device("cpu"))


def kept(run: Path) -> list[int]:
    return [checkpoint.read_state(folder)["iter"] for folder in checkpoint.checkpoints(run)]


def rewrite(folder: Path, **changes) -> None:
    """Change state.json and its hash."""
    checkpoint.write_state(folder, checkpoint.read_state(folder) | changes)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_round_trip(tmp_path, position):
    """rope's tables are in no state dict, and a model on the meta device has none."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE, position=position)).eval()
    folder = save(tmp_path / "run", 12, model)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "state.json", "train_state.pt"]
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "others may read the weights too"
    loaded, encoding = load(folder)
    assert encoding.name == "byte"
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    idx = torch.arange(8)[None]
    assert torch.equal(model(idx), loaded(idx))
    assert checkpoint.load_train_state(folder)["row"] == {"iter": 1}


def test_state_describes_the_run(tiny_home):
    state = checkpoint.read_state(tiny_home / "out/quickstart/ckpt/last")
    meta = json.loads((tiny_home / "data/tiny/meta.json").read_text())
    assert (state["iter"], state["tokens"]) == (60, 60 * 4 * 32)
    assert (state["config"]["max_iters"], state["config"]["vocab_size"]) == (60, 257)
    hashed = {"name": "byte", "vocab_size": 257, "ranks_sha256": meta["ranks_sha256"], "eot_id": 256}
    assert state["tokenizer"] == hashed
    assert state["data"]["tokens"] == {split: meta["splits"][split]["tokens"] for split in ("train", "val")}
    assert state["data"]["end_of_text"] is True
    assert (state["command"][0], state["torch"], state["chosen"]["dtype"]) == ("train.py", torch.__version__, "float32")
    assert {"git_commit", "git_dirty", "python", "device", "wandb_id", "val_loss", "best_loss", "epoch"} <= set(state)


# ---------------------------------------------------------------------------------------------------------------------
# which checkpoints are kept, and how they are found


def test_links_are_relative_so_that_a_run_can_be_moved(tmp_path, model):
    for iteration in (1, 2):
        save(tmp_path / "a", iteration, model)
    checkpoint.set_link(tmp_path / "a", "best", 1)
    assert os.readlink(tmp_path / "a/ckpt/last") == "iter_000002"
    shutil.move(tmp_path / "a", tmp_path / "b")
    folder, state = checkpoint.find(str(tmp_path / "b"), print)
    assert (folder, state["iter"]) == (tmp_path / "b/ckpt/iter_000001", 1)


def test_newest_best_and_every_nth_are_kept(tmp_path, model):
    """Folders that are not checkpoints are neither counted nor deleted."""
    (tmp_path / "ckpt/.iter_000004.tmp").mkdir(parents=True)  # of a killed save
    (tmp_path / "ckpt/iter_000009").mkdir()
    (tmp_path / "ckpt/iter_000009/model.safetensors").write_bytes(b"half")
    for iteration in range(10, 90, 10):
        save(tmp_path, iteration, model, keep=3, keep_every=50)
        if iteration == 20:
            checkpoint.set_link(tmp_path, "best", 20)
            shutil.copytree(tmp_path / "ckpt/iter_000020", tmp_path / "ckpt/iter_000020.mine")
    assert kept(tmp_path) == [80, 70, 60, 50, 20]
    assert {p.name for p in (tmp_path / "ckpt").iterdir()} == {
        *("last", "best", "iter_000080", "iter_000070", "iter_000060", "iter_000050", "iter_000020"),
        *(".iter_000004.tmp", "iter_000009", "iter_000020.mine"),
    }
    assert os.readlink(tmp_path / "ckpt/best") == "iter_000020"


def test_order_is_by_number(tmp_path, model):
    for iteration in (999_999, 1_000_000, 5):
        save(tmp_path, iteration, model)
    assert kept(tmp_path) == [1_000_000, 999_999, 5]


@pytest.mark.parametrize("path", ["run", "run/ckpt/iter_000001", "run/ckpt/last", "run/ckpt/last/model.safetensors"])
def test_model_path_is_a_run_or_a_checkpoint(tmp_path, model, path):
    (save(tmp_path / "run", 1, model) / "train_state.pt").unlink()  # only training needs it
    assert checkpoint.find(str(tmp_path / path), print)[1]["iter"] == 1


def test_without_model_path_the_newest_run_is_found(in_tmp, model):
    with pytest.raises(UserError, match="train one"):
        checkpoint.find(None, print)
    for seconds, name in enumerate(("a", "c", "b")):
        save(Path("out") / name, 1, model)
        os.utime(Path("out") / name / "ckpt/last", (0, 1000 + seconds), follow_symlinks=False)
    assert checkpoint.find(None, print)[0] == Path("out/b/ckpt/iter_000001")


@pytest.mark.parametrize(("path", "said"), [("absent", "no such folder"), (".", "no usable checkpoint")])
def test_model_path_without_a_checkpoint_is_an_error(in_tmp, path, said):
    with pytest.raises(UserError, match=said):
        checkpoint.find(path, print)


def test_other_format_vocabulary_and_shape_are_refused(tmp_path, model):
    folder = save(tmp_path, 1, model)
    with pytest.raises(UserError, match="does not fit its config"):
        checkpoint.load_weights(GPT(ModelConfig(**{**SHAPE, "n_embd": 16})), folder)
    rewrite(folder, tokenizer={"name": "byte", "ranks_sha256": "0"})
    with pytest.raises(UserError, match="tokenizer byte"):
        load(folder)
    rewrite(folder, format=99)
    with pytest.raises(UserError, match="format 99"):
        checkpoint.verify(folder)


# ---------------------------------------------------------------------------------------------------------------------
# damage


def flip(content: bytes, share: float, bit: int = 0) -> bytes:
    """Flip one bit of the byte at this share of the content."""
    content = bytearray(content)
    content[min(int(share * len(content)), len(content) - 1)] ^= 1 << bit
    return bytes(content)


DAMAGES = {
    "first bit": lambda c: flip(c, 0),
    "bit at 0.25": lambda c: flip(c, 0.25, 2),
    "bit at 0.5": lambda c: flip(c, 0.5),
    "bit at 0.75": lambda c: flip(c, 0.75, 1),
    "last byte": lambda c: flip(c, 1),
    "empty": lambda c: b"",
    "cut to a half": lambda c: c[: len(c) // 2],
    "cut by a byte": lambda c: c[:-1],
    "zero tail": lambda c: c[: len(c) // 2] + bytes(len(c) - len(c) // 2),
    "missing": lambda c: None,
}


@pytest.mark.parametrize("name", [*FILES, "state.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_the_one_before_it_is_used(tmp_path, model, name, damage):
    save(tmp_path, 1, model)
    path = save(tmp_path, 2, model) / name
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    printed = []
    assert checkpoint.first_valid(checkpoint.folders(tmp_path), FILES, printed.append)[1]["iter"] == 1
    (warning,) = printed
    assert f"warning: {path} is " in warning


def test_each_byte_of_the_state_counts(tmp_path, model):
    """A flipped bit in text often gives another valid text: another seed or format. Only the name of the state's own
    hash may change; then the file is like one of an earlier version."""
    path = save(tmp_path, 1, model) / "state.json"
    written, content = checkpoint.read_state(path.parent), path.read_bytes()
    unnoticed = set()
    for at in range(len(content)):
        path.write_bytes(flip(content, at / len(content) + 1e-9, bit=at % 7))
        if state := checkpoint.read_state(path.parent):
            assert {key: state[key] for key in written} == written
            unnoticed.add(at)
    name = content.rindex(b"sha256")
    assert unnoticed <= set(range(name, name + 6))


def test_file_that_cannot_be_read_is_damaged(tmp_path, model, monkeypatch):
    """A bad sector used to end the run, although the checkpoint before it was good."""
    save(tmp_path, 1, model)
    bad, real = save(tmp_path, 2, model) / "train_state.pt", checkpoint.fingerprint

    def fingerprint(path):
        if path == bad:
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "fingerprint", fingerprint)
    printed = []
    assert checkpoint.first_valid(checkpoint.checkpoints(tmp_path), FILES, printed.append)[1]["iter"] == 1
    assert "train_state.pt is missing or cannot be read: Input/output error" in printed[0]


def test_damaged_checkpoint_of_the_same_iteration_is_moved_aside(tmp_path, model):
    """Nothing is deleted. A folder without state.json is none, and makes way too."""
    folder = save(tmp_path, 2, model)
    (folder / "model.safetensors").write_bytes(b"damaged")
    half = tmp_path / "ckpt/iter_000003"
    half.mkdir()
    assert kept(tmp_path) == [2]
    for iteration in (2, 3):
        save(tmp_path, iteration, model)
    assert (checkpoint.verify(folder)["iter"], checkpoint.verify(half)["iter"]) == (2, 3)
    (lost,) = tmp_path.glob("ckpt/lost-*/iter_000002")
    assert {p.name for p in lost.iterdir()} == {"model.safetensors", "train_state.pt", "state.json"}
    assert (lost / "model.safetensors").read_bytes() == b"damaged"


def test_process_killed_while_an_old_checkpoint_is_deleted(tmp_path, model, monkeypatch):
    """What is left of it does not look like a checkpoint, and is removed by the next save."""
    real = shutil.rmtree

    def killed(folder, **options):
        if options:
            return real(folder, **options)
        (folder / "model.safetensors").unlink()
        raise SystemExit

    save(tmp_path, 1, model, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            save(tmp_path, 2, model, keep=1)
    assert kept(tmp_path) == [2]
    assert {p.name for p in (tmp_path / "ckpt").iterdir()} == {"last", "iter_000002", ".iter_000002.tmp"}
    save(tmp_path, 2, model, keep=1)
    assert not (tmp_path / "ckpt/.iter_000002.tmp").exists()


# ---------------------------------------------------------------------------------------------------------------------
# disks


def test_disk_that_fills_leaves_the_old_checkpoint(tmp_path):
    """A limit of file sizes, in a process of its own, stands in for the full disk. Each of the files meets it."""
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/support")!r}, {str(Path(__file__).parent)!r}]
from test_checkpoint import *
run = Path({str(tmp_path)!r})
save(run, 1, GPT(ModelConfig(**SHAPE)))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {{"iter": 2, "config": {{}}}}
moments = {{"optimizer": [torch.zeros(100_000)]}}
for limit, state, train_state in (
    (4_096, state, {{}}),
    (200_000, state, moments),
    (20_000, state | {{"long": "x" * 100_000}}, {{}}),
):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(run, state, {{"w": torch.zeros(1_200)}}, train_state, keep=1)
    except UserError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(checkpoint.verify(run / "ckpt/last")["iter"], sorted(p.name for p in run.glob("ckpt/*")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *errors, state = done.stdout.strip().splitlines()
    expected = (
        ("model.safetensors: ", "File too large", "0.0 MB are needed, 0.0 MB were written, "),
        ("train_state.pt: ", "only a part of it was taken: a full disk, ", "0.4 MB are needed, 0.2 MB were written, "),
        ("state.json: ", "File too large", "0.0 MB are needed, 0.0 MB were written, "),
    )
    for error, (name, *parts) in zip(errors, expected, strict=True):
        assert f"iter_000002 could not be written: {name}" in error
        assert all(part in error for part in parts), error
        assert "MB are free now. Still there: iter 1. Make room; a run that ended goes on with --resume" in error
    assert state == "1 ['iter_000001', 'last']"


@pytest.mark.parametrize("reason", ["Not a directory", "No space left on device"])
def test_folder_that_cannot_be_made_is_an_error(tmp_path, model, monkeypatch, reason):
    if reason == "Not a directory":
        (tmp_path / "ckpt").write_text("")
    else:

        def full(*args, **kwargs):
            raise OSError(28, reason)

        monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match=rf"iter_000001 could not be written: .*: {reason}\. .* Still there: none"):
        save(tmp_path, 1, model)


def test_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, model, monkeypatch, capsys):
    save(tmp_path, 1, model)

    def busy(path, **options):
        if not options:
            raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    save(tmp_path, 2, model, keep=1)
    said = f"warning: {tmp_path}/ckpt/iter_000001 is no longer needed but cannot be deleted: Device or resource busy\n"
    assert capsys.readouterr().err == said
    assert kept(tmp_path) == [2]


# ---------------------------------------------------------------------------------------------------------------------
# planted pickles


class Bomb:
    """Leaves a file behind when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


def zipped(legacy: bool, bare: bool) -> bytes:
    file = io.BytesIO()
    trap = Bomb() if bare else {"optimizer": {"state": {0: Bomb()}}, "scaler": {}, "row": {"iter": 1}}
    torch.save(trap, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


TRAPS = {f"protocol {n}": pickle.dumps(Bomb(), n) for n in range(6)}
TRAPS |= {f"torch.save{' legacy' * old}{' bare' * bare}": zipped(old, bare) for old in (0, 1) for bare in (0, 1)}


def plant(file: Path, trap: bytes) -> None:
    """Replace a file of a checkpoint, and its hash in state.json."""
    file.write_bytes(trap)
    if file.name != "state.json":
        files = checkpoint.read_state(file.parent)["files"] | {file.name: checkpoint.fingerprint(file)}
        rewrite(file.parent, files=files)
        checkpoint.verify(file.parent)


def refusal(function, *args, **kwargs) -> str:
    """Return the one line of a UserError. Nothing was executed, and it does not tell how to do so."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert not Path("canary").exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, before it refuses
@pytest.mark.parametrize("trap", TRAPS)
def test_planted_pickle_does_not_run(in_tmp, model, trap):
    folder = save(in_tmp, 1, model)
    for name in FILES:
        plant(folder / name, TRAPS[trap])
    for mmap in (False, True):
        said = refusal(checkpoint.load_train_state, folder, mmap=mmap)
        assert said.startswith(f"{folder / 'train_state.pt'} is not ")
    assert "does not fit" in refusal(checkpoint.load_weights, model, folder)
    plant(folder / "state.json", TRAPS[trap])
    assert f"{folder / 'state.json'} is missing or damaged" in refusal(checkpoint.find, str(folder), print)
    Path("mine.toml").write_bytes(TRAPS[trap])
    assert refusal(parse, TrainConfig, ["--config", "mine.toml"]).startswith("mine.toml: not valid TOML")
    # the traps do work
    torch.load(io.BytesIO(TRAPS[trap]), weights_only=False) if "save" in trap else pickle.loads(TRAPS[trap])
    Path("canary").unlink()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_planted_pickle_ends_train_with_an_error_line(cli, run_copy, name):
    folder = run_copy / "ckpt/iter_000060"
    for damaged in run_copy.glob("ckpt/iter_*"):
        plant(damaged / name, TRAPS["torch.save"])
    shutil.copy(folder / name, "ckpt.pt")
    calls = [["--resume", folder], ["--resume", "latest"], ["--resume", "ckpt.pt", "--out_dir", "out/other"]]
    calls += [["--init_from", folder, "--out_dir", "out/other"]] * (name != "train_state.pt")  # else it is not read
    for words in calls:
        config = [] if "--init_from" in words else ["--config", run_copy / "config.toml"]
        said = cli("train", *config, "--dataset", "tiny", "--max_iters", 70, *words).error
        assert not Path("canary").exists()
        assert str(folder) in said or "ckpt.pt" in said or "every checkpoint there is damaged" in said, said
    assert not Path("out/other").exists()


@pytest.mark.parametrize("described", [True, False])
def test_planted_pickle_as_weights_from_elsewhere(in_tmp, described):
    folder = Path("gpt2")
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(TRAPS["torch.save"])
    if described:
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for path in (folder, folder / "pytorch_model.bin"):
        said = refusal(parse, TrainConfig, ["--init_from", str(path)], initial_shape)
        assert said.startswith(f"init_from = {path}: pytorch_model.bin is a pickle")
