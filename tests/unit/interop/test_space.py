"""export.py --space: the folder's files, what they say, and that an error leaves nothing."""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import test_house
import torch
from conftest import ROOT
from exported import (
    HUGGING_FACE_FILES,
    WEIGHTS_AND_CARD,
    export_here,
    files_in,
    refused,
    save_run,
    table_rows,
)

from config import UserError
from flatgpt.interop import loading, model_card, space
from flatgpt.runs import checkpoint, history

GRADIO = "9.8.7"
DESCRIPTION = WEIGHTS_AND_CARD | {"requirements.txt", ".gitignore", "LICENSE"}
OURS = DESCRIPTION | {"state.json", "metrics.csv"}
SECRET = "ada_lovelace"


@pytest.fixture(autouse=True)
def gradio(tmp_path_factory, monkeypatch):
    """Install the metadata of a gradio package."""
    site = tmp_path_factory.mktemp("site")
    (site / f"gradio-{GRADIO}.dist-info").mkdir()
    record = f"Metadata-Version: 2.1\nName: gradio\nVersion: {GRADIO}\n"
    (site / f"gradio-{GRADIO}.dist-info/METADATA").write_text(record)
    monkeypatch.syspath_prepend(site)


def no_code(folder: str = "s") -> set[str]:
    return {name for name in files_in(folder) if not name.endswith(".py")}


def metadata() -> dict:
    return huggingface_hub.SpaceCard.load("s/README.md").data.to_dict()


def test_files_of_a_run(in_tmp):
    save_run()
    export_here("--space", "s")
    assert no_code() == OURS
    code = files_in("s") - OURS
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flatgpt").rglob("*.py")}
    assert code == {"app.py", "model.py", "config.py"} | package
    for name in code:
        assert Path("s", name).read_bytes() == (ROOT / name).read_bytes()
    best = Path("out/r/ckpt/best")
    assert Path("s/model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert Path("s/metrics.csv").read_bytes() == Path("out/r/metrics.csv").read_bytes()


def test_the_folder_loads_like_the_run(in_tmp):
    """Also a model that Hugging Face's GPT-2 does not support; damage is found."""
    model = save_run(position="rope", head_bias=True, tie_weights=False)
    export_here("--space", "s")
    source = loading.find("s", pytest.fail)
    assert (source.path, source.tokenizer, source.state["iter"]) == (Path("s"), "byte", 7)
    loaded, _ = loading.load(source, torch.device("cpu"))
    ids = torch.arange(32)[None]
    assert torch.equal(loaded(ids), model(ids))
    log = history.read(Path("s"))
    assert (log["val_loss"], log.best, log.parameters) == ([5.5, 5.125], (7, 5.125), model.num_params())
    assert list(source.state["files"]) == ["model.safetensors"]
    Path("s/model.safetensors").write_bytes(Path("s/model.safetensors").read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        loading.find("s", pytest.fail)


def test_nothing_identifies_the_machine(in_tmp):
    """Paths, wandb's names and ids, and keys that this version does not know."""
    home = in_tmp / SECRET
    paths = {key: str(home / key) for key in ("config", "data_dir", "resume")}
    save_run(
        str(home / "out/my run"),
        **{**paths, "init_from": str(home / "old"), "wandb_project": SECRET},
        state={
            "data": {"folder": str(home / "data/tiny"), "manifest_sha256": "0", "end_of_text": True, "raw": str(home)},
            "command": ["train.py", "--data_dir", paths["data_dir"], f"--out_dir={home}/out/my run"],
            **{"chosen": {"why": SECRET}, "wandb_id": SECRET, "hostname": SECRET},
        },
    )
    export_here("--model_path", home / "out/my run", "--space", "s")
    assert no_code() == OURS
    for name in files_in("s"):
        for word in (SECRET, str(in_tmp)):
            assert word.encode() not in Path("s", name).read_bytes(), name
    state = checkpoint.read_state(Path("s"))
    assert (state["data"]["folder"], state["config"]["out_dir"]) == ("tiny", "my run")
    assert state["config"]["init_from"] == ".../old"
    assert metadata()["title"] == "my run"


def test_published_state(in_tmp):
    """Facts about the model are kept. A Space made from a Space has the same files."""
    facts = {"tokens": 99, "epoch": 0.5, "val_loss": 5.5, "torch": "2.13.0", "device": "cpu", "cpu": "AMD EPYC"}
    save_run(init_from="user/model", lr=0.5, n_embd=24, state=facts)
    export_here("--space", "s")
    state = checkpoint.read_state(Path("s"))
    assert {key: state[key] for key in facts} == facts
    assert state["tokenizer"] == checkpoint.read_state(Path("out/r/ckpt/best"))["tokenizer"]
    assert [state["config"][key] for key in ("init_from", "lr", "n_embd")] == ["user/model", 0.5, 24]
    assert state["data"]["end_of_text"] is False
    assert not set(state["config"]) & set(model_card.LOCAL) - {"init_from", "out_dir"}
    export_here("--model_path", "s", "--space", "again")
    assert files_in("again") == files_in("s")
    for name in files_in("s") - {"README.md"}:
        assert Path("again", name).read_bytes() == Path("s", name).read_bytes(), name
    assert "# `r`" in Path("again/README.md").read_text()


def test_a_checkpoint_without_a_log(in_tmp):
    save_run()
    shutil.copytree("out/r/ckpt/iter_000007", "copied")
    export_here("--model_path", "copied", "--space", "s")
    assert no_code() == OURS - {"metrics.csv"}


@pytest.mark.parametrize("given", ["hf", "user/thing@main"])
def test_other_models(in_tmp, host, given):
    """A Hugging Face folder, also from the hub, which the metadata then names."""
    model = save_run(bias=False)
    export_here("--out", "hf")
    host.publish("user/thing", {path.name: path.read_bytes() for path in Path("hf").iterdir()}, kind="models")
    export_here("--model_path", given, "--space", "s")
    assert no_code() == HUGGING_FACE_FILES | DESCRIPTION
    for name in HUGGING_FACE_FILES - {"README.md"}:
        assert Path("s", name).read_bytes() == Path("hf", name).read_bytes()
    source = loading.find("s", pytest.fail)
    loaded, encoding = loading.load(source, torch.device("cpu"))
    ids = torch.arange(32)[None]
    assert torch.allclose(loaded(ids), model(ids), atol=1e-5)
    assert (source.state, encoding.name) == ({}, "byte")
    modes = {path.stat().st_mode & 0o777 for path in Path("s").rglob("*") if path.is_file()}
    assert len(modes) == 1  # safetensors gives its file to the owner alone
    assert metadata().get("models") == (["user/thing"] if "@" in given else None)
    assert "Its training and its data are not known here" in Path("s/README.md").read_text()


def test_requirements_are_what_the_app_imports(in_tmp):
    lines = space.requirements(GRADIO).splitlines()
    packages = {line for line in lines if line[0] not in "#-"}
    reached, waiting, needed = set(), {"app"}, set()
    while waiting:
        file = test_house.MODULES[waiting.pop()]
        reached.add(file)
        assert file.parent != ROOT or file.name in space.SCRIPTS
        names = test_house.imported(file)
        ours = {each for name in names for each in (name, name.rpartition(".")[0]) if each in test_house.MODULES}
        waiting |= {name for name in ours if test_house.MODULES[name] not in reached}
        needed |= test_house.third_party(test_house.packages(file))
    assert {package.split("=")[0].rstrip("<>") for package in packages} == needed
    declared = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert packages - set(declared) == {f"gradio=={GRADIO}"}
    torch_at, index_at = (next(n for n, line in enumerate(lines) if word in line) for word in ("torch==", "--extra-"))
    assert lines[index_at] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert index_at < torch_at


def test_readme(in_tmp):
    """Metadata as the documentation of Spaces requires it, and the model card with the weights as they are."""
    run = 'out/"my: run" 🎈'
    shape = {"n_embd": 8, "bias": False, "position": "rope", "head_bias": True, "tie_weights": False}
    save_run(run, **shape, state={"tokens": 448, "epoch": 0.5})
    export_here("--model_path", run, "--space", "s")
    data, text = metadata(), Path("s/README.md").read_text()
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", GRADIO, "app.py")
    assert data["python_version"] == ".".join(map(str, sys.version_info[:2]))  # a string: 3.10 is not 3.1
    assert data["title"] == '"my: run" 🎈'
    assert {data["colorFrom"], data["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert len(data["emoji"]) == 1
    assert data["emoji"] > "\u2000"
    assert "license" not in data
    largest = space.space_metadata("r", 1_557_611_200, None, GRADIO)["short_description"]
    assert "1,557,611,200" in largest
    assert len(largest) <= 60  # the hub's limit
    for part in (
        "pip install -r requirements.txt\npython app.py\n",
        "- position: `rope`",
        "- head_bias: `True`",
        "- val_loss: `5.1250`",
        'position = "rope"',
    ):
        assert part in text
    assert "transformers" not in text


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--out", "o"], "out"),
        (["--push", "user/name"], "push"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--context_length", "8"], "context_length"),
        (["--out", "o", "--dtype", "float16"], "out and dtype"),
    ],
)
def test_options_that_a_space_does_not_have(in_tmp, words, option):
    remedy = "hf upload user/name 'my s' . --repo-type space --private"
    refused(f"space = my s .*: leave out {option}; .*{remedy}", "--space", "my s", *words)


def test_existing_folders_and_missing_gradio(in_tmp, monkeypatch):
    save_run()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    refused("space = full already exists.* another --space", "--space", "full")
    refused("space = full already exists", "--space", "full", "--dry_run")
    refused("space = full/mine.txt/s: cannot be written: Not a directory", "--space", "full/mine.txt/s")

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    refused("pip install -r requirements-extra.txt", "--space", "s")


def test_weights_that_are_not_finite(in_tmp):
    save_run(alter=lambda model: model.transformer.wte.weight[0].fill_(float("nan")))
    message = "wte.weight has NaN or infinite values in float32: the run diverged; choose an earlier checkpoint$"
    refused(message, "--space", "s")


def test_printed_table_and_next_steps(in_tmp, capsys):
    save_run()
    export_here("--space", "my s", "--dry_run")
    dry = capsys.readouterr().out
    assert dry.startswith("would be written to my s:\n")
    assert not Path("my s").exists()
    export_here("--space", "my s")
    real = capsys.readouterr().out
    assert table_rows(dry) == table_rows(real)
    assert set(table_rows(real)) == files_in("my s") | {"together"}
    assert len({len(line) for line in real.splitlines() if line.endswith(("bytes", "MB"))}) == 1, "columns"
    assert "  (cd 'my s' && python app.py)\n" in real
    assert "  hf upload user/name 'my s' . --repo-type space --private   # after" in real
