"""export.py --space: the folder's files, what they say, and that an error leaves nothing."""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from exported import HUGGING_FACE_FILES, WEIGHTS_AND_CARD, T, export_here, files_in, refused, save_run, table_rows
from processes import ROOT

from flatgpt.interop import loading, model_card
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


def same_logits(model) -> None:
    loaded, ids = loading.load(loading.find("s", pytest.fail), "cpu")[0], torch.arange(T)[None]
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=1e-5)


def test_the_folder_has_the_code_the_run_and_its_log(in_tmp, capsys):
    """Of a model that Hugging Face's GPT-2 does not support. --dry_run prints the same table and writes nothing."""
    model = save_run(position="rope", head_bias=True, tie_weights=False, bias=False)
    export_here("--space", "my s", "--dry_run")
    assert not Path("my s").exists()
    dry = capsys.readouterr().out
    assert dry.startswith("would be written to my s:\n")
    export_here("--space", "my s")
    real = capsys.readouterr().out
    assert table_rows(dry) == table_rows(real)
    assert set(table_rows(real)) == files_in("my s") | {"together"}
    assert "  (cd 'my s' && python app.py)\n" in real
    assert "  hf upload user/name 'my s' . --repo-type space --private   # after" in real
    Path("my s").rename("s")
    assert no_code() == OURS
    code = files_in("s") - OURS
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flatgpt").rglob("*.py")}
    assert code == {"app.py", "model.py", "config.py"} | package
    for name in code:
        assert Path("s", name).read_bytes() == (ROOT / name).read_bytes()
    for name, origin in (("model.safetensors", "out/r/ckpt/best"), ("metrics.csv", "out/r")):
        assert Path("s", name).read_bytes() == Path(origin, name).read_bytes()
    same_logits(model)
    log = history.read(Path("s"))
    assert (log["val_loss"], log.best, log.parameters) == ([5.5, 5.125], (7, 5.125), model.num_params())


def test_nothing_identifies_the_machine(in_tmp):
    """Paths, wandb's names and ids, and keys that this version does not know. Facts about the model are kept."""
    home = in_tmp / SECRET
    paths = {key: str(home / key) for key in ("config", "data_dir", "resume")}
    facts = {"tokens": 99, "epoch": 0.5, "val_loss": 5.5, "torch": "2.13.0", "device": "cpu", "cpu": "AMD EPYC"}
    data = {"folder": str(home / "data/tiny"), "manifest_sha256": "0", "end_of_text": True, "raw": str(home)}
    save_run(
        str(home / "out/my run"),
        **{**paths, "init_from": str(home / "old"), "wandb_project": SECRET, "lr": 0.5},
        state={
            "data": data,
            "command": ["train.py", "--data_dir", paths["data_dir"], f"--out_dir={home}/out/my run"],
            **{"chosen": {"why": SECRET}, "wandb_id": SECRET, "hostname": SECRET, **facts},
        },
    )
    export_here("--model_path", home / "out/my run", "--space", "s")
    assert no_code() == OURS
    for name in files_in("s"):
        for word in (SECRET, str(in_tmp)):
            assert word.encode() not in Path("s", name).read_bytes(), name
    state = checkpoint.read_state(Path("s"))
    assert state["data"] == {"folder": "tiny", "manifest_sha256": "0", "end_of_text": True}
    assert [state["config"][key] for key in ("out_dir", "init_from", "lr")] == ["my run", ".../old", 0.5]
    assert not set(state["config"]) & set(model_card.LOCAL) - {"init_from", "out_dir"}
    assert {key: state[key] for key in facts} == facts
    assert list(state["files"]) == ["model.safetensors"]
    export_here("--model_path", "s", "--space", "again")  # a Space of a Space has the same files
    assert files_in("again") == files_in("s")
    for name in files_in("s") - {"README.md"}:
        assert Path("again", name).read_bytes() == Path("s", name).read_bytes(), name
    assert "# `my run`" in Path("again/README.md").read_text()


def test_a_checkpoint_without_a_log_and_another_projects_model(in_tmp):
    model = save_run(bias=False, init_from="user/model")
    shutil.copytree("out/r/ckpt/iter_000007", "copied")
    export_here("--model_path", "copied", "--space", "s")
    assert no_code() == OURS - {"metrics.csv"}
    assert checkpoint.read_state(Path("s"))["config"]["init_from"] == "user/model"
    shutil.rmtree("s")
    export_here("--out", "hf")
    export_here("--model_path", "hf", "--space", "s")
    assert no_code() == HUGGING_FACE_FILES | DESCRIPTION
    for name in HUGGING_FACE_FILES - {"README.md"}:
        assert Path("s", name).read_bytes() == Path("hf", name).read_bytes()
    same_logits(model)
    modes = {path.stat().st_mode & 0o777 for path in Path("s").rglob("*") if path.is_file()}
    assert len(modes) == 1  # safetensors gives its file to the owner alone
    assert "Its training and its data are not known here" in Path("s/README.md").read_text()


def test_readme_and_requirements(in_tmp):
    """Metadata as the documentation of Spaces requires it, and the model card with the weights as they are."""
    run = 'out/"my: run" 🎈'
    save_run(run, n_embd=8, bias=False, position="rope", head_bias=True, tie_weights=False)
    export_here("--model_path", run, "--space", "s")
    data, text = huggingface_hub.SpaceCard.load("s/README.md").data, Path("s/README.md").read_text()
    assert (data.sdk, data.sdk_version, data.app_file, data.title) == ("gradio", GRADIO, "app.py", '"my: run" 🎈')
    assert data.python_version == ".".join(map(str, sys.version_info[:2]))  # a string: 3.10 is not 3.1
    assert {data.colorFrom, data.colorTo} <= {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert len(data.short_description.replace("3,265", "1,557,611,200")) <= 60  # the hub's limit
    assert "license" not in data.to_dict()
    for part in ("pip install -r requirements.txt\npython app.py\n", "- val_loss: `5.1250`", 'position = "rope"'):
        assert part in text
    assert "transformers" not in text
    packages = Path("s/requirements.txt").read_text()
    assert packages.endswith((ROOT / "requirements.txt").read_text() + f"gradio=={GRADIO}\n")
    assert "\n--extra-index-url https://download.pytorch.org/whl/cpu\n" in packages.partition("torch==")[0]


def test_refusals(in_tmp, monkeypatch):
    save_run()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    refused("full already exists", "--space", "full")
    refused("full/mine.txt/s cannot be written: Not a directory", "--space", "full/mine.txt/s")
    remedy = "hf upload user/name 'my s' . --repo-type space --private"
    options = ["--out", "o", "--push", "user/name", "--dtype", "float16", "--context_length", 8]
    refused(f"leave out out and push and context_length and dtype; .*{remedy}", "--space", "my s", *options)

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    refused("pip install -r requirements-extra.txt", "--space", "s")
