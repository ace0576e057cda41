"""checkpoint.py: what is on disk is whole, named, verified, or not taken for a checkpoint at all."""

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
from in_process import TINY, train_here
from processes import ROOT, command
from safetensors.torch import load_file

import train
from config import ModelConfig, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.interop import loading
from flatgpt.interop.pretrained import initial_shape
from flatgpt.runs import checkpoint
from model import GPT

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "vocab_size": 257}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE))


def save(run: Path, iteration: int, model: GPT, keep: int = 9, keep_every: int | None = None) -> Path:
    encoding = tokenizer.load("byte")
    state = {
        "iter": iteration,
        "config": SHAPE,
        "tokenizer": {"name": "byte", "ranks_sha256": tokenizer.ranks_hash(encoding)},
    }
    return checkpoint.save(
        run,
        state,
        model.state_dict(),
        {"optimizer": {"step": torch.tensor(3.0)}, "scaler": {}, "row": {"iter": 1}},
        keep,
        keep_every,
    )


def load(folder: Path):
    return loading.load(loading.find(str(folder), print), torch.device("cpu"))


def rewrite(folder: Path, state: dict) -> None:
    state.pop("sha256", None)
    checkpoint.write_state(folder, state)


def test_round_trip(tmp_path, model):
    folder = save(tmp_path / "run", 12, model)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "state.json", "train_state.pt"]
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "colleagues read the weights too"
    loaded, encoding = load(folder)
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
    rewrite(folder, state)
    loaded, _ = load(folder)
    idx = torch.arange(8)[None]
    assert torch.equal(rope.eval()(idx), loaded(idx))


def test_links_are_relative_and_a_run_can_be_moved(tmp_path, model):
    save(tmp_path / "a", 1, model)
    save(tmp_path / "a", 2, model)
    checkpoint.set_link(tmp_path / "a", "best", 1)
    assert os.readlink(tmp_path / "a/ckpt/last") == "iter_000002"
    shutil.move(tmp_path / "a", tmp_path / "b")
    folder, state = checkpoint.find(str(tmp_path / "b"), print)
    assert (folder, state["iter"]) == (tmp_path / "b/ckpt/iter_000001", 1)


def test_newest_and_best_are_kept(tmp_path, model):
    for iteration in range(1, 7):
        save(tmp_path, iteration, model, keep=2)
        if iteration == 2:
            checkpoint.set_link(tmp_path, "best", 2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["iter_000006", "iter_000005", "iter_000002"]


def test_order_is_by_number(tmp_path, model):
    for iteration in (999_999, 1_000_000, 5):
        save(tmp_path, iteration, model)
    assert [checkpoint.read_state(p)["iter"] for p in checkpoint.checkpoints(tmp_path)] == [1_000_000, 999_999, 5]


def test_more_saves_than_are_kept(tmp_path, model):
    """Best is early, every fifth stays, and what is not whole neither counts among the newest nor goes."""
    (tmp_path / "ckpt/.iter_000004.tmp").mkdir(parents=True)  # a killed save's
    (tmp_path / "ckpt/iter_000009").mkdir()  # a folder without a state
    (tmp_path / "ckpt/iter_000009/model.safetensors").write_bytes(b"half")
    keep = 3
    for iteration in range(10, 10 * (keep + 4), 10):
        save(tmp_path, iteration, model, keep, keep_every=50)
        if iteration == 20:
            checkpoint.set_link(tmp_path, "best", 20)
            shutil.copytree(tmp_path / "ckpt/iter_000020", tmp_path / "ckpt/iter_000020.mine")
    kept = [checkpoint.read_state(folder)["iter"] for folder in checkpoint.checkpoints(tmp_path)]
    assert kept == [60, 50, 40, 20]
    save(tmp_path, 70, model, keep, keep_every=50)
    save(tmp_path, 80, model, keep, keep_every=50)
    assert {p.name for p in (tmp_path / "ckpt").iterdir()} == {
        *("last", "best", "iter_000080", "iter_000070", "iter_000060", "iter_000050", "iter_000020"),
        *(".iter_000004.tmp", "iter_000009", "iter_000020.mine"),
    }
    assert os.readlink(tmp_path / "ckpt/best") == "iter_000020"


def test_damaged_one_of_the_same_iteration_moves_aside(tmp_path, model):
    """Nothing is deleted: somebody may still want to look at it."""
    save(tmp_path, 1, model)
    folder = save(tmp_path, 2, model)
    (folder / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 2, model)
    assert checkpoint.verify(folder)["iter"] == 2
    (lost,) = tmp_path.glob("ckpt/lost-*")
    assert {p.name for p in (lost / "iter_000002").iterdir()} == {"model.safetensors", "train_state.pt", "state.json"}
    assert (lost / "iter_000002/model.safetensors").read_bytes() == b"damaged"
    assert [checkpoint.read_state(p)["iter"] for p in checkpoint.checkpoints(tmp_path)] == [2, 1]


def test_half_pruned_one_is_none(tmp_path, model, monkeypatch):
    """The process ends while an old checkpoint's files go, its state.json last."""
    real = shutil.rmtree

    def killed(folder, **how):
        if how:
            return real(folder, **how)
        (folder / "model.safetensors").unlink()
        raise SystemExit

    save(tmp_path, 1, model, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            save(tmp_path, 2, model, keep=1)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["iter_000002"]
    assert {p.name for p in (tmp_path / "ckpt").iterdir()} == {"last", "iter_000002", ".iter_000002.tmp"}
    assert checkpoint.find(str(tmp_path), print)[1]["iter"] == 2
    save(tmp_path, 2, model, keep=1)
    assert not (tmp_path / "ckpt/.iter_000002.tmp").exists()


def flip(content: bytes, share: float, bit: int = 0) -> bytes:
    """One bit of the byte that lies so far into it."""
    content = bytearray(content)
    content[min(int(share * len(content)), len(content) - 1)] ^= 1 << bit
    return bytes(content)


DAMAGES = {
    **{
        f"bit {bit} at {share}": lambda c, s=share, b=bit: flip(c, s, b) for share, bit in ((0, 0), (0.25, 2), (0.5, 0))
    },
    **{f"bit {bit} at {share}": lambda c, s=share, b=bit: flip(c, s, b) for share, bit in ((0.75, 1), (1, 0))},
    **{f"cut to {share}": lambda c, s=share: c[: int(s * len(c))] for share in (0, 0.1, 0.5)},
    "all but one": lambda c: c[:-1],
    "zero tail": lambda c: c[: len(c) // 2] + bytes(len(c) - len(c) // 2),
    "missing": lambda c: None,
}


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "state.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_the_one_before_it_is_used(tmp_path, model, name, damage):
    save(tmp_path, 1, model)
    path = save(tmp_path, 2, model) / name
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    said = []
    found = checkpoint.first_valid([tmp_path / "ckpt/iter_000002", tmp_path / "ckpt/iter_000001"], NAMES, said.append)
    assert found[1]["iter"] == 1
    (warning,) = said
    assert f"warning: {path} is " in warning


def test_each_byte_of_the_state_counts(tmp_path, model):
    """A flipped bit in text is often a valid other text: another seed, another best loss, another format, which was
    even an error instead of a step back. Only the name of its hash may change: then it is as an older version's."""
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
    """A disk with a bad sector: the run ended with an error, where the checkpoint before it was good."""
    save(tmp_path, 1, model)
    save(tmp_path, 2, model)
    real = checkpoint.fingerprint

    def bad_sector(path):
        if path == tmp_path / "ckpt/iter_000002/train_state.pt":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "fingerprint", bad_sector)
    said = []
    assert checkpoint.first_valid(checkpoint.checkpoints(tmp_path), NAMES, said.append)[1]["iter"] == 1
    assert "train_state.pt is missing or cannot be read: Input/output error" in said[0]


def test_flipped_bit_in_the_state_and_a_resume(tiny_data, capsys):
    """The seed in it became another one, and the resume was refused as one of another run."""
    run = train_here()
    reference = load_file(run / "ckpt/last/model.safetensors")
    path = run / "ckpt/iter_000006/state.json"
    content = path.read_bytes()
    damaged = content.replace(b'"seed": 1337', b'"seed": 1336')
    assert damaged != content
    path.write_bytes(damaged)
    train_here("--resume", "latest")
    assert "resuming from out/quickstart/ckpt/iter_000003" in capsys.readouterr().out
    for name, tensor in load_file(run / "ckpt/iter_000006/model.safetensors").items():
        assert torch.equal(tensor, reference[name])
    (lost,) = run.glob("ckpt/lost-*/iter_000006/state.json")
    assert lost.read_bytes() == damaged


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
    rewrite(folder, state)
    with pytest.raises(UserError, match="tokenizer byte"):
        load(folder)
    rewrite(folder, state | {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        checkpoint.verify(folder)


# ---------------------------------------------------------------------------------------------------------------------
# planted pickles


class Bomb:
    """Unpickled, it leaves a file behind."""

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
    """Put it there, and have state.json agree: it is no damage that is noticed."""
    file.write_bytes(trap)
    if file.name != "state.json":
        state = checkpoint.read_state(file.parent)
        state["files"][file.name] = checkpoint.fingerprint(file)
        checkpoint.write_state(file.parent, state)
        checkpoint.verify(file.parent)


def refused(work, *args, **kwargs) -> str:
    """The one line that a call refuses with; nothing has run, and nobody is told how to run it after all."""
    with pytest.raises(UserError) as caught:
        work(*args, **kwargs)
    said = str(caught.value)
    assert not Path("canary").exists()
    assert "\n" not in said
    assert "weights_only" not in said
    return said


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, before it refuses
@pytest.mark.parametrize("trap", TRAPS)
def test_planted_pickle_does_not_run(in_tmp, model, trap):
    folder = save(in_tmp, 1, model)
    for name in NAMES:
        plant(folder / name, TRAPS[trap])
    for mmap in (False, True):
        assert refused(checkpoint.load_train_state, folder, mmap=mmap).startswith(
            f"{folder / 'train_state.pt'} is not "
        )
    assert "does not fit" in refused(checkpoint.load_weights, model, folder)
    plant(folder / "state.json", TRAPS[trap])
    assert f"{folder / 'state.json'} is missing or damaged" in refused(checkpoint.find, str(folder), print)


def test_the_traps_do_work(in_tmp):
    for name, trap in TRAPS.items():
        if name.startswith("torch.save"):
            torch.load(io.BytesIO(trap), weights_only=False)
        else:
            pickle.loads(trap)
        Path("canary").unlink()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["train_state.pt", "model.safetensors", "state.json"])
def test_planted_pickle_and_what_a_user_types(tiny_data, name, monkeypatch):
    run = train_here("--max_iters", 3)
    folder = run / "ckpt/iter_000003"
    for trap in ("torch.save", "protocol 0", "protocol 4"):
        plant(folder / name, TRAPS[trap])
        assert str(folder) in refused(train_here, "--resume", folder, "--max_iters", 4)
        if name != "train_state.pt":  # else it is not read
            words = [word for word in TINY if word not in ("--dtype", "float32", "--device", "cpu")]
            words += ["--init_from", str(folder)]
            refused(lambda words=words: train.train(cli.parse(TrainConfig, words, initial_shape)))
            refused(load, folder)
        if name == "state.json":
            assert "every checkpoint there is damaged" in refused(train_here, "--resume", "latest")
        else:
            assert "is not loaded" in (said := refused(train_here, "--resume", "latest")) or "does not fit" in said
        shutil.copy(folder / name, "ckpt.pt")
        assert "ckpt.pt" in refused(train_here, "--resume", "ckpt.pt", "--out_dir", "out/other")
    assert not Path("out/other").exists()


def test_planted_pickle_as_a_recipe(in_tmp):
    for name, trap in TRAPS.items():
        Path("mine.toml").write_bytes(trap)
        said = refused(cli.parse, TrainConfig, ["--config", "mine.toml"])
        assert said.startswith("mine.toml: not valid TOML"), name


@pytest.mark.parametrize("described", [True, False])
def test_planted_pickle_as_weights_of_others(in_tmp, described):
    folder = Path("gpt2")
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(TRAPS["torch.save"])
    if described:
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for path in (folder, folder / "pytorch_model.bin"):
        said = refused(cli.parse, TrainConfig, ["--init_from", str(path)], initial_shape)
        assert said.startswith(f"init_from = {path}: pytorch_model.bin is a pickle")


def test_planted_pickle_ends_the_command_with_one_line(tiny_data):
    folder = train_here("--max_iters", 3) / "ckpt/iter_000003"
    plant(folder / "train_state.pt", TRAPS["torch.save"])
    done = command("train", *TINY, "--max_iters", 4, "--resume", folder, cwd=tiny_data)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder.resolve()}/train_state.pt is not loaded: it holds more than tensors")
    assert done.stderr.count("\n") == 1
    assert not Path("canary").exists()


def test_weights_of_another_shape_are_refused(tmp_path, model):
    folder = save(tmp_path, 1, model)
    with pytest.raises(UserError, match="does not fit its config"):
        checkpoint.load_weights(GPT(ModelConfig(**{**SHAPE, "n_embd": 16})), folder)


def test_disk_that_fills_leaves_the_old_checkpoint(tmp_path):
    """A file-size limit stands in for the full disk, in a process of its own; it is met in each of the files."""
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/support")!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_checkpoint import GPT, SHAPE, ModelConfig, UserError, checkpoint, save, torch
run, model = Path({str(tmp_path)!r}), GPT(ModelConfig(**SHAPE))
save(run, 1, model)
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
    said = (
        ("model.safetensors: ", "File too large", "0.0 MB are needed, 0.0 MB were written, "),
        ("train_state.pt: ", "only a part of it was taken: a full disk, ", "0.4 MB are needed, 0.2 MB were written, "),
        ("state.json: ", "File too large", "0.0 MB are needed, 0.0 MB were written, "),
    )
    for error, (name, *parts) in zip(errors, said, strict=True):
        assert f"iter_000002 could not be written: {name}" in error
        assert all(part in error for part in parts), error
        assert "MB are free now. Still there: iter 1. Make room; a run that ended goes on with --resume" in error
    assert state == "1 ['iter_000001', 'last']"


@pytest.mark.parametrize("there", ["a file", "a full disk"])
def test_folder_that_cannot_be_made_is_said_too(tmp_path, model, monkeypatch, there):
    """Of the two ways that a save began, this one ended in a traceback: no file of it had a name yet."""
    if there == "a file":
        (tmp_path / "ckpt").write_text("")
    else:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "mkdir", full)
    said = "Not a directory" if there == "a file" else "No space left on device"
    with pytest.raises(UserError, match=rf"iter_000001 could not be written: .*: {said}\. .* Still there: none"):
        save(tmp_path, 1, model)


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


def test_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, model, monkeypatch, capsys):
    """On a network's disk somebody may read it; the new one is whole, and training goes on."""
    save(tmp_path, 1, model)

    def busy(path, **how):
        if not how:
            raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    save(tmp_path, 2, model, keep=1)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/ckpt/iter_000001 is no longer needed but cannot be deleted: Device or resource busy\n"
    )
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["iter_000002"]
