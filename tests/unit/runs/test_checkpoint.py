"""checkpoint.py: a checkpoint on the disk is whole, found by its names, verified, and never unpickled."""

import builtins
import errno
import functools
import io
import itertools
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from dataset_files import full_disk
from run_files import saved_iters

from config import ModelConfig, TrainConfig, UserError
from flatgpt.cli.settings import parse
from flatgpt.interop.pretrained import initial_shape
from flatgpt.runs import checkpoint
from flatgpt.runs.history import follow
from flatgpt.runtime.files import atomic_write
from model import GPT

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "vocab_size": 257}
FILES = (checkpoint.WEIGHTS, checkpoint.TRAIN_STATE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE))


def save(run: Path, iteration: int, model: GPT, keep: int = 9, keep_every: int | None = None) -> Path:
    train_state = {"optimizer": {"step": torch.tensor(3.0)}, "scaler": {}, "row": {"iter": 1}}
    return checkpoint.save(run, {"iter": iteration, "config": SHAPE}, model.state_dict(), train_state, keep, keep_every)


def rewrite(folder: Path, **changes) -> None:
    """Change state.json and its hash."""
    atomic_write(folder / "state.json", checkpoint.state_file(checkpoint.read_state(folder) | changes))


def test_round_trip(tmp_path, model):
    folder = save(tmp_path / "run", 12, model)
    assert {path.name for path in folder.iterdir()} == {*FILES, "state.json"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "others may read the weights too"
    loaded = GPT(ModelConfig(**SHAPE))
    checkpoint.load_weights(loaded, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert checkpoint.load_train_state(folder)["row"] == {"iter": 1}


# ---------------------------------------------------------------------------------------------------------------------
# which checkpoints are kept, and how they are found


@pytest.mark.parametrize("symlinks", [True, False])
def test_links_work_in_a_run_that_was_moved_and_without_symlinks(tmp_path, model, monkeypatch, symlinks):
    """A disk such as exFAT, or Google's in a notebook, has no symlinks: files name the folders."""

    def refuse(*words, **settings):
        raise OSError(95, "Operation not supported")

    if not symlinks:
        monkeypatch.setattr(os, "symlink", refuse)
    for iteration in (1, 2):
        save(tmp_path / "a", iteration, model)
        checkpoint.set_link(tmp_path / "a", "best", 1)
    save(tmp_path / "a", 3, model, keep=1)
    shutil.move(tmp_path / "a", tmp_path / "b")
    checkpoint.mark_finished(tmp_path / "b/ckpt/last", {})
    assert saved_iters(tmp_path / "b") == [3, 1]
    assert (tmp_path / "b/ckpt/last").is_symlink() == symlinks
    for path, iteration in (("b", 1), ("b/ckpt/best", 1), ("b/ckpt/last", 3), ("b/ckpt/iter_000003", 3)):
        folder, state = checkpoint.find(str(tmp_path / path), print)
        assert (folder.resolve().name, state["iter"]) == (f"iter_00000{iteration}", iteration)
        assert state.get("finished") == (True if iteration == 3 else None)


def test_newest_best_and_every_nth_are_kept(tmp_path, model):
    """Folders that are not checkpoints are neither counted nor deleted, and the order is by number."""
    for name in (".iter_000004.tmp", "iter_000009", "iter_000020.mine"):
        (tmp_path / "ckpt" / name).mkdir(parents=True)
    for iteration in (*range(10, 80, 10), 999_999, 1_000_000):
        save(tmp_path, iteration, model, keep=3, keep_every=50)
        if iteration == 20:
            checkpoint.set_link(tmp_path, "best", 20)
    assert saved_iters(tmp_path) == [1_000_000, 999_999, 70, 50, 20]
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {
        *("last", "best", "iter_1000000", "iter_999999", "iter_000070", "iter_000050", "iter_000020"),
        *(".iter_000004.tmp", "iter_000009", "iter_000020.mine"),
    }


def test_model_path_is_a_run_or_a_checkpoint(in_tmp, model):
    with pytest.raises(UserError, match="train one"):
        checkpoint.find(None, print)
    for seconds, name in enumerate(("a", "c", "b")):
        folder = save(Path("out") / name, 1, model)
        (folder / "train_state.pt").unlink()  # only training needs it
        os.utime(folder / "state.json", (0, 1000 + seconds))
        (folder.parent / "last").unlink()  # a copy of a run may have lost its links
    assert checkpoint.find(None, print)[0] == Path("out/b/ckpt/iter_000001")
    for path in ("out/a", "out/a/ckpt/iter_000001", "out/a/ckpt/last", "out/a/ckpt/last/model.safetensors"):
        assert checkpoint.find(path, print)[1]["iter"] == 1
    Path("begun/ckpt").mkdir(parents=True)
    for path, said in (("absent", "no usable"), ("out", "no usable"), ("begun", "no usable")):
        with pytest.raises(UserError, match=f"model_path = {path}.* {said}"):
            checkpoint.find(path, print)


def test_other_format_and_shape_are_refused(tmp_path, model):
    folder = save(tmp_path, 1, model)
    with pytest.raises(UserError, match="does not fit its config"):
        checkpoint.load_weights(GPT(ModelConfig(**{**SHAPE, "n_embd": 16})), folder)
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
    "bit at 0.75": lambda c: flip(c, 0.75, 1),
    "last byte": lambda c: flip(c, 1),
    "empty": lambda c: b"",
    "cut to a half": lambda c: c[: len(c) // 2],
    "cut by a byte": lambda c: c[:-1],
    "zero tail": lambda c: c[: len(c) // 2] + bytes(len(c) - len(c) // 2),
    "missing": lambda c: None,
    "unreadable": lambda c: "folder",
}


@pytest.mark.parametrize("name", [*FILES, "state.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_the_one_before_it_is_used(tmp_path, model, name, damage):
    save(tmp_path, 1, model)
    path = save(tmp_path, 2, model) / name
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    printed = []
    assert checkpoint.first_valid(checkpoint.folders(tmp_path), checkpoint.verify, printed.append)[1]["iter"] == 1
    (warning,) = printed
    assert f"warning: {path} " in warning


def test_damaged_checkpoint_of_the_same_iteration_is_moved_aside(tmp_path, model):
    folder = save(tmp_path, 2, model)
    (folder / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 2, model)
    assert checkpoint.verify(folder)["iter"] == 2
    (lost,) = tmp_path.glob("ckpt/lost-*/iter_000002")
    assert (lost / "model.safetensors").read_bytes() == b"damaged"


# ---------------------------------------------------------------------------------------------------------------------
# disks


@pytest.mark.parametrize(
    ("room", "file"), [(4_096, "model.safetensors"), (200_000, "train_state.pt"), (1_500_000, "state.json")]
)
def test_disk_that_fills_leaves_the_old_checkpoint(tmp_path, model, room, file):
    save(tmp_path, 1, model)
    state, train_state = {"iter": 2, "config": {}, "long": "x" * 2_000_000}, {"optimizer": [torch.zeros(300_000)]}
    message = rf"iter_000002 \(1.2 MB\) could not be written: {file}: .*File too large.*ulimit -f.* iter_000001$"
    with full_disk(room), pytest.raises(UserError, match=message):
        checkpoint.save(tmp_path, state, {"w": torch.zeros(12_000)}, train_state, keep=1)
    assert checkpoint.verify(follow(tmp_path / "ckpt/last"))["iter"] == 1
    assert sorted(path.name for path in tmp_path.glob("ckpt/*")) == ["iter_000001", "last"]


CALLS = [(os, name) for name in ("chmod", "fsync", "lstat", "mkdir", "open", "rename", "replace", "rmdir", "scandir")]
CALLS += [(os, name) for name in ("stat", "symlink", "unlink")]
CALLS += [(builtins, "open"), (io, "open"), (checkpoint, "save_file"), (torch, "save")]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "Free disk space"),
        (errno.EACCES, "Make the folder writable"),
        (errno.EROFS, "Make the folder writable"),
        (errno.EIO, "Check the disk"),
        (errno.ENAMETOOLONG, "Choose a shorter --out_dir"),
    ],
    ids=lambda value: errno.errorcode.get(value, ""),
)
def test_failed_save_says_why_and_what_to_do(tmp_path, model, monkeypatch, code, remedy):
    def fail(*args, **settings):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        UserError, match=rf"iter_000001 .* could not be written: train_state.pt: {os.strerror(code)}.*\. {remedy};"
    ):
        save(tmp_path, 1, model)


@pytest.mark.parametrize(("code", "failures"), [(errno.ENOSPC, 1), (errno.EIO, 10**9), (errno.EINVAL, 1)])
def test_any_call_of_a_save_can_fail(tmp_path, model, monkeypatch, capsys, code, failures):
    """The message names file and cause. What was saved is valid, `last` names one of it, and the next save works."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a slow disk shall not make slow tests
    for number in itertools.count():
        run, calls = tmp_path / str(number), []
        for iteration in (1, 2):
            save(run, iteration, model)
        checkpoint.set_link(run, "best", 1)

        def failing(*args, real, calls=calls, number=number, **settings):
            calls.append(real)
            if number < len(calls) <= number + failures:
                raise OSError(code, os.strerror(code), "a path")
            return real(*args, **settings)

        with monkeypatch.context() as patch:
            for owner, name in CALLS:
                patch.setattr(owner, name, functools.partial(failing, real=getattr(owner, name)))
            try:
                said = save(run, 3, model, keep=1) and capsys.readouterr().err
            except UserError as error:
                said = str(error)
        if len(calls) <= number:
            break
        if said:
            what = r"iter_000003 .* could|ckpt/last could|old checkpoints are not deleted"
            assert re.search(rf"({what}).*{os.strerror(code)}", said), calls[number]
        for folder in checkpoint.checkpoints(run):
            checkpoint.verify(folder)
        kept, last = saved_iters(run), checkpoint.verify(follow(run / "ckpt/last"))["iter"]
        assert kept[-1] == 1, "the best"
        assert said or (kept[0], last) == (3, 3), calls[number]
        save(run, 4, model, keep=1)
        assert saved_iters(run) == [4, 1]
        assert os.readlink(run / "ckpt/last") == "iter_000004"
    assert number > 20


def test_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, model, monkeypatch, capsys):
    """What is left of it does not look like a checkpoint, and is removed by the next save of its iteration."""
    save(tmp_path, 1, model)

    def busy(path, **options):
        if not options:
            raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 2, model, keep=1)
    said = f"warning: old checkpoints are not deleted: {tmp_path}/ckpt/iter_000001: Device or resource busy\n"
    assert capsys.readouterr().err == said
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"last", "iter_000002", ".iter_000002.tmp"}
    save(tmp_path, 2, model, keep=1)
    assert not (tmp_path / "ckpt/.iter_000002.tmp").exists()


# ---------------------------------------------------------------------------------------------------------------------
# planted pickles


class Bomb:
    """Leaves a file behind when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


def zipped(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(
        {"optimizer": {"state": {0: Bomb()}}, "scaler": {}, "row": {"iter": 1}},
        file,
        _use_new_zipfile_serialization=not legacy,
    )
    return file.getvalue()


TRAPS = {f"protocol {n}": pickle.dumps(Bomb(), n) for n in (0, 2, 5)}
TRAPS |= {"torch.save": zipped(legacy=False), "torch.save legacy": zipped(legacy=True)}


def plant(file: Path, trap: bytes) -> None:
    """Replace a file of a checkpoint, and its hash in state.json."""
    file.write_bytes(trap)
    if file.name != "state.json":
        files = checkpoint.read_state(file.parent)["files"] | {file.name: checkpoint.fingerprint(file)}
        rewrite(file.parent, files=files)
        checkpoint.verify(file.parent)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, before it refuses
@pytest.mark.parametrize("trap", TRAPS)
def test_planted_pickle_does_not_run(in_tmp, model, trap):
    """Each file that may hold one is refused in one line, which does not tell how to unpickle it."""
    folder, elsewhere = save(in_tmp, 1, model), Path("gpt2/pytorch_model.bin")
    for name in FILES:
        plant(folder / name, TRAPS[trap])
    elsewhere.parent.mkdir()
    for path in (Path("mine.toml"), elsewhere):
        path.write_bytes(TRAPS[trap])
    calls = [
        (lambda: checkpoint.load_train_state(folder), "train_state.pt is not loaded"),
        (lambda: checkpoint.load_weights(model, folder), "does not fit"),
        (lambda: parse(TrainConfig, ["--config", "mine.toml"]), "mine.toml: not valid TOML"),
        (lambda: parse(TrainConfig, ["--init_from", str(elsewhere)], initial_shape), "pytorch_model.bin is a pickle"),
        (lambda: parse(TrainConfig, ["--init_from", "gpt2"], initial_shape), "pytorch_model.bin is a pickle"),
        (lambda: plant(folder / "state.json", TRAPS[trap]) or checkpoint.find(str(folder), print), "no usable"),
    ]
    for call, said in calls:
        with pytest.raises(UserError, match=said) as caught:
            call()
        assert not Path("canary").exists()
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    torch.load(io.BytesIO(TRAPS[trap]), weights_only=False) if "save" in trap else pickle.loads(TRAPS[trap])
    assert Path("canary").exists(), "the trap does work"


def test_checkpoint_is_renamed_after_it_was_flushed(tmp_path, model, monkeypatch):
    """`last` points to it only once the rename is on the disk, too."""
    on_disk, names, rename = [], {}, os.rename

    def renamed(old, new):
        inside = [path.stat().st_ino for path in Path(old).rglob("*")]
        assert {*inside, Path(old).stat().st_ino} <= set(on_disk), "flushed before it is renamed"
        names[Path(new).name] = len(on_disk)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", renamed)
    folder = save(tmp_path, 5, model)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "train_state.pt", "state.json"}
    assert folder.parent.stat().st_ino in on_disk[names["iter_000005"] :]


def test_state_and_links_of_another_kind_are_passed_over(tmp_path, model):
    """With a valid hash: a config that is not a table. A file in place of a symlink that names no checkpoint."""
    save(tmp_path, 1, model)
    newest = save(tmp_path, 2, model)
    state = checkpoint.read_state(newest) | {"config": 3}
    (newest / "state.json").write_bytes(checkpoint.state_file(state))
    for name, content in (("last", b"../../x\n"), ("best", b"\xff")):
        (tmp_path / "ckpt" / name).unlink(missing_ok=True)
        (tmp_path / "ckpt" / name).write_bytes(content)
    assert checkpoint.find(str(tmp_path), lambda line: None)[1]["iter"] == 1
