"""export.py --space: the folder's files, and what they say."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import torch
from exported import HUGGING_FACE_FILES, WEIGHTS_AND_CARD, T, export_here, files_in, refused, save_run, table_rows
from gpt2_reference import nanogpt_checkpoint, random_gpt2
from processes import ROOT, SYNTHETIC, running
from vocabularies import TEXT, bpe, characters, save_run_of, write_nanogpt_characters

from flatgpt.data import tokenizer
from flatgpt.interop import hub, loading
from flatgpt.runs import checkpoint, history

pytestmark = pytest.mark.slow

GRADIO = "9.8.7"
DESCRIPTION = WEIGHTS_AND_CARD | {"requirements.txt", ".gitignore", "LICENSE"}
OURS = DESCRIPTION | {"state.json", "metrics.csv"}
SECRET = "ada_lovelace"


@pytest.fixture(autouse=True)
def gradio(monkeypatch):
    """A version of gradio is installed."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: GRADIO)


def no_code(folder: str = "s") -> set[str]:
    return {name for name in files_in(folder) if not name.endswith(".py")}


def same_logits(model) -> None:
    loaded, ids = loading.load(loading.find("s", pytest.fail), "cpu")[0], torch.arange(T)[None]
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=1e-5)


def same_files(one: str, other: str, names: set[str]) -> bool:
    return all(Path(one, name).read_bytes() == Path(other, name).read_bytes() for name in names)


def test_the_folder_has_the_code_the_run_and_its_log(in_tmp, capsys):
    """Of a model that Hugging Face's GPT-2 does not support. --dry_run prints the same table and writes nothing."""
    model = save_run(position="rope", head_bias=True, tie_weights=False, bias=False)
    export_here("--space", "my s", "--dry_run")
    assert not Path("my s").exists()
    dry = capsys.readouterr().out
    export_here("--space", "my s")
    real = capsys.readouterr().out
    assert table_rows(dry) == table_rows(real)
    assert "  (cd 'my s' && python app.py)\n" in real
    assert "  hf upload user/name 'my s' . --repo-type space --private   # after" in real
    Path("my s").rename("s")
    assert no_code() == OURS
    code = files_in("s") - OURS
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flatgpt").rglob("*.py")}
    assert code == {"app.py", "model.py", "config.py"} | package
    assert same_files("s", ROOT, code)
    assert same_files("s", "out/r/ckpt/best", {"model.safetensors"})
    same_logits(model)
    log = history.read(Path("s"))
    assert (log["val_loss"], log.best, log.parameters) == ([5.5, 5.125], (7, 5.125), model.num_params())


@pytest.mark.parametrize(
    ("edit", "value", "message"),
    [
        ("model.GPT.compute_logits", lambda self, x: self.lm_head(x)[..., :257] / 2, "differ at logits"),
        (
            "flatgpt.interop.export_folder.SPACE_FILES",
            ("app.py", "config.py"),
            "cannot load its model: .* named 'model'",
        ),
    ],
)
def test_a_space_without_the_code_of_the_model_is_refused(in_tmp, monkeypatch, edit, value, message):
    """The files are loaded in a new process. An installed flatGPT does not replace a missing one."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    save_run()
    monkeypatch.setattr(edit, value)
    refused(f"^out/r/ckpt/iter_000007 was not exported.*{message}", "--space", "s")


def test_an_installed_flatgpt_without_its_repository_is_refused(in_tmp, monkeypatch):
    save_run()
    monkeypatch.setattr("flatgpt.interop.export_folder.REPO_ROOT", in_tmp)
    refused("--space requires flatGPT's repository", "--space", "s")


def test_nothing_identifies_the_machine(in_tmp):
    """Paths, wandb's names and ids, and keys that this version does not know. Facts about the model are kept."""
    home = in_tmp / SECRET
    paths = {key: str(home / key) for key in ("config", "data_dir", "resume", "init_from")}
    facts = {"tokens": 99, "epoch": 0.5, "val_loss": 5.5, "torch": "2.13.0", "device": "cpu", "cpu": "AMD EPYC"}
    data = {"folder": str(home / "data/tiny"), "manifest_sha256": "0", "end_of_text": True, "raw": str(home)}
    command = ["train.py", "--data_dir", paths["data_dir"], f"--out_dir={home}/out/my run"]
    hidden = {"chosen": {"why": SECRET}, "wandb_id": SECRET, "hostname": SECRET}
    settings = {**paths, "wandb_project": SECRET, "lr": 0.5}
    save_run(str(home / "out/my run"), **settings, state={"data": data, "command": command, **hidden, **facts})
    export_here("--model_path", home / "out/my run", "--space", "s", "--no-verify")
    for name in files_in("s"):
        for word in (SECRET, str(in_tmp)):
            assert word.encode() not in Path("s", name).read_bytes(), name
    state = checkpoint.read_state(Path("s"))
    assert state["data"] == {"folder": "tiny", "manifest_sha256": "0", "end_of_text": True}
    assert [state["config"][key] for key in ("out_dir", "init_from", "lr")] == ["my run", ".../init_from", 0.5]
    assert not set(state["config"]) & set(hub.LOCAL_SETTINGS) - {"init_from", "out_dir"}
    assert {key: state[key] for key in facts} == facts
    export_here("--model_path", "s", "--space", "again", "--no-verify")  # a Space of a Space has the same files
    assert same_files("s", "again", files_in("s") - {"README.md"})
    assert "# `my run`" in Path("again/README.md").read_text()


def test_a_checkpoint_without_a_log_and_another_projects_model(in_tmp):
    """The folder has GPT-2's vocabulary as tiktoken's cache has it."""
    model = save_run(encoding="gpt2", vocab_size=50257, bias=False, init_from="user/model")
    shutil.copytree("out/r/ckpt/iter_000007", "copied")
    state = json.loads(Path("copied/state.json").read_text())
    del state["data"]["folder"], state["sha256"]  # as in earlier versions
    Path("copied/state.json").write_text(json.dumps(state))
    export_here("--model_path", "copied", "--space", "copied_space", "--no-verify")
    vocabulary = set(tokenizer.vocabulary_files("gpt2"))
    assert no_code("copied_space") == OURS - {"metrics.csv"} | {f"tiktoken_cache/{name}" for name in vocabulary}
    assert len(vocabulary) == 2
    assert checkpoint.read_state(Path("copied_space"))["config"]["init_from"] == "user/model"
    export_here("--out", "hf")
    export_here("--model_path", "hf", "--space", "s", "--no-verify")
    assert no_code() > HUGGING_FACE_FILES | DESCRIPTION
    assert same_files("s", "hf", HUGGING_FACE_FILES - {"README.md"})
    same_logits(model)
    assert len({path.stat().st_mode & 0o777 for path in Path("s").glob("*.*")}) == 1  # not for the owner alone


def test_readme_and_requirements(in_tmp):
    """Metadata as the documentation of Spaces requires it, and the model card with the weights as they are."""
    save_run('out/"my: run" 🎈', n_embd=8, bias=False, position="rope", head_bias=True, tie_weights=False)
    export_here("--model_path", 'out/"my: run" 🎈', "--space", "s", "--no-verify")
    data, text = huggingface_hub.SpaceCard.load("s/README.md").data, Path("s/README.md").read_text()
    assert (data.sdk, data.sdk_version, data.app_file, data.title) == ("gradio", GRADIO, "app.py", '"my: run" 🎈')
    assert data.python_version == ".".join(map(str, sys.version_info[:2]))  # a string: 3.10 is not 3.1
    assert len(data.short_description.replace("3,265", "1,557,611,200")) <= 60  # the hub's limit
    for part in ("pip install -r requirements.txt\npython app.py\n", "- val_loss: `5.1250`", 'position = "rope"'):
        assert part in text
    packages = Path("s/requirements.txt").read_text()
    assert packages.endswith((ROOT / "requirements.txt").read_text() + f"gradio=={GRADIO}\n")
    assert "\n--extra-index-url https://download.pytorch.org/whl/cpu\n" in packages.partition("torch==")[0]


@pytest.mark.extra("gradio")
def test_app_starts_in_the_folder(in_tmp):
    """It needs nothing else but the packages that it requires."""
    save_run(encoding="gpt2", n_embd=4, vocab_size=50257)
    export_here("--space", "s", "--no-verify")
    shutil.rmtree("out")
    env = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR" and not k.startswith("GRADIO_SERVER_")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with running([sys.executable, "app.py"], cwd="s", env=env | SYNTHETIC | {"HF_HUB_OFFLINE": "1"}, **pipes) as app:
        urls = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in app.stdout)
        with urllib.request.urlopen(f"{next(filter(None, urls))[0]}/config", timeout=60) as response:
            answer = json.load(response)
    assert answer["components"]
    assert str(in_tmp) not in json.dumps(answer)


def test_refusals(in_tmp, monkeypatch):
    save_run()
    Path("full/file").mkdir(parents=True)
    refused("full already exists", "--space", "full")
    options = ["--out", "o", "--push", "user/name", "--dtype", "float16", "--context_length", 8]
    remedy = "hf upload user/name 'my s' . --repo-type space --private"
    refused(f"leave out out and push and context_length and dtype; .*{remedy}", "--space", "my s", *options)

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    refused("pip install -r requirements-extra.txt", "--space", "s")


@pytest.mark.parametrize("make", [characters, bpe])
def test_a_space_contains_its_tokenizer(in_tmp, make):
    """It is loaded without the run, in a new process with the Space's own code too."""
    encoding = make()
    model = save_run_of(encoding)
    export_here("--space", "s")
    shutil.rmtree("out")
    assert no_code() == OURS | {"tokenizer.json"}
    same_logits(model)
    assert loading.find("s").encoding.encode_ordinary(TEXT) == encoding.encode_ordinary(TEXT)


def test_a_space_of_nanogpts_characters(in_tmp):
    letters = characters()
    write_nanogpt_characters("nano/meta.pkl", letters.ids)
    torch.save(nanogpt_checkpoint(random_gpt2(vocab_size=letters.n_vocab)), "nano/ckpt.pt")
    export_here("--model_path", "nano/ckpt.pt", "--space", "s")
    shutil.rmtree("nano")
    assert loading.find("s").encoding.encode_ordinary(TEXT) == letters.encode_ordinary(TEXT)
