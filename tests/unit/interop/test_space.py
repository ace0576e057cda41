"""space.py, export.py --space: the folder's files, what they tell, and that nothing else is needed to run them."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import test_house
import torch
from processes import ROOT, SYNTHETIC

import export
from config import ExportConfig, TrainConfig, UserError
from flatgpt.cli import cli
from flatgpt.data import tokenizer
from flatgpt.interop import loading, model_card, space
from flatgpt.runs import checkpoint, history
from model import GPT

GRADIO = "9.8.7"
DESCRIBING = {"README.md", "requirements.txt", ".gitignore", "LICENSE", "model.safetensors"}
OURS = DESCRIBING | {"state.json", "metrics.csv"}
HUGGING_FACE = DESCRIBING | {
    *("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json"),
}
SECRET = "ada_lovelace"


@pytest.fixture(autouse=True)
def gradio(tmp_path_factory, monkeypatch):
    """Gradio of that version is installed, as far as pip's records go."""
    site = tmp_path_factory.mktemp("site")
    (site / f"gradio-{GRADIO}.dist-info").mkdir()
    record = f"Metadata-Version: 2.1\nName: gradio\nVersion: {GRADIO}\n"
    (site / f"gradio-{GRADIO}.dist-info/METADATA").write_text(record)
    monkeypatch.syspath_prepend(site)


def run(*words) -> None:
    """export.py in this process."""
    export.main(cli.parse(ExportConfig, list(map(str, words))))


def save(run_dir: str = "out/r", encoding: str = "byte", changes: dict | None = None, **state) -> GPT:
    """A checkpoint of a tiny model, and the log of its run.

    Args:
        changes: of the config.
        state: what state.json says besides.
    """
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32, "vocab_size": 257, **(changes or {})}
    config = TrainConfig(**{"out_dir": run_dir, **shape})
    model = GPT(config.model()).eval()
    tokens = tokenizer.load(encoding)
    state = {
        "iter": 7,
        "config": dataclasses.asdict(config),
        "tokenizer": {"name": encoding, "ranks_sha256": tokenizer.ranks_hash(tokens)},
        "data": {"folder": "data/tiny", "manifest_sha256": "0" * 64, "end_of_text": False, "tokens": {"train": 99}},
    } | state
    checkpoint.save(Path(run_dir), state, model.state_dict(), {}, keep=1)
    checkpoint.set_link(Path(run_dir), "best", 7)
    Path(run_dir, "metrics.csv").write_text("iter,train_loss,val_loss\n0,,5.5\n7,5.25,5.125\n")
    return model


def listed(folder: str = "s") -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def no_code(folder: str = "s") -> set[str]:
    return {name for name in listed(folder) if not name.endswith(".py")}


def front_matter() -> dict:
    return huggingface_hub.SpaceCard.load("s/README.md").data.to_dict()


# ---------------------------------------------------------------------------------------------------------------------
# what is in it


def test_files_of_a_run(in_tmp):
    save()
    run("--space", "s")
    assert no_code() == OURS
    code = listed() - OURS
    assert {"app.py", "config.py", "model.py", "flatgpt/cli/cli.py", "flatgpt/data/tokenizer.py"} <= code
    assert not {f"{verb}.py" for verb in ("train", "eval", "export", "prepare_data", "bench", "plot", "space")} & code
    for name in code:
        assert Path("s", name).read_bytes() == (ROOT / name).read_bytes()
    best = Path("out/r/ckpt/best")
    assert Path("s/model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert Path("s/metrics.csv").read_bytes() == Path("out/r/metrics.csv").read_bytes()


def test_model_is_found_there(in_tmp):
    model = save(changes={"position": "rope", "head_bias": True, "tie_weights": False})  # no GPT-2 of Hugging Face's
    run("--space", "s")
    found = loading.find("s", pytest.fail)
    assert (found.path, found.tokenizer, found.state["iter"]) == (Path("s"), "byte", 7)
    loaded, _ = loading.load(found, torch.device("cpu"))
    ids = torch.arange(32)[None]
    assert torch.equal(loaded(ids), model(ids))
    log = history.read(Path("s"))
    assert (log["val_loss"], log.best) == ([5.5, 5.125], (7, 5.125))
    assert log.parameters == model.num_params()
    assert list(found.state["files"]) == ["model.safetensors"]
    Path("s/model.safetensors").write_bytes(Path("s/model.safetensors").read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        loading.find("s", pytest.fail)


def test_nothing_tells_of_the_machine(in_tmp, monkeypatch):
    """Paths, wandb's names and ids, and keys that this version does not know."""
    home = in_tmp / SECRET
    paths = {key: str(home / key) for key in ("config", "data_dir", "out_dir", "resume")}
    save(
        str(home / "out/my run"),
        changes={**paths, "out_dir": str(home / "out/my run"), "init_from": str(home / "old"), "wandb_project": SECRET},
        data={"folder": str(home / "data/tiny"), "manifest_sha256": "0", "end_of_text": True, "raw": str(home)},
        command=["train.py", "--data_dir", paths["data_dir"], f"--out_dir={home}/out/my run"],
        chosen={"why": SECRET},
        wandb_id=SECRET,
        hostname=SECRET,
    )
    run("--model_path", home / "out/my run", "--space", "s")
    assert no_code() == OURS
    for name in listed():
        content = Path("s", name).read_bytes()
        for word in (SECRET, str(in_tmp)):
            assert word.encode() not in content, name
    state = checkpoint.read_state(Path("s"))
    assert (state["data"]["folder"], state["config"]["out_dir"]) == ("tiny", "my run")
    assert state["config"]["init_from"] == ".../old"
    assert front_matter()["title"] == "my run"
    history.read(Path("s"))


def test_state_keeps_what_is_the_models(in_tmp):
    facts = {"tokens": 99, "epoch": 0.5, "val_loss": 5.5, "torch": "2.13.0", "device": "cpu", "cpu": "AMD EPYC"}
    save(changes={"init_from": "user/model", "lr": 0.5, "n_embd": 24}, **facts)
    run("--space", "s")
    state = checkpoint.read_state(Path("s"))
    assert {key: state[key] for key in facts} == facts
    assert state["tokenizer"] == checkpoint.read_state(Path("out/r/ckpt/best"))["tokenizer"]
    assert [state["config"][key] for key in ("init_from", "lr", "n_embd")] == ["user/model", 0.5, 24]
    assert state["data"]["end_of_text"] is False
    assert not set(state["config"]) & set(model_card.LOCAL) - {"init_from", "out_dir"}


def test_a_space_of_a_space(in_tmp):
    """What was published is enough to publish it again."""
    save()
    run("--space", "s")
    run("--model_path", "s", "--space", "again")
    assert listed("again") == listed()
    for name in listed() - {"README.md"}:
        assert Path("again", name).read_bytes() == Path("s", name).read_bytes(), name
    assert "# `r`" in Path("again/README.md").read_text()


def test_a_checkpoint_without_a_log(in_tmp):
    save()
    shutil.copytree("out/r/ckpt/iter_000007", "copied")
    run("--model_path", "copied", "--space", "s")
    assert no_code() == OURS - {"metrics.csv"}


def test_of_a_hugging_face_folder(in_tmp):
    model = save(changes={"bias": False})
    run("--out", "hf")
    run("--model_path", "hf", "--space", "s")
    assert no_code() == HUGGING_FACE
    for name in HUGGING_FACE - DESCRIBING | {"model.safetensors"}:
        assert Path("s", name).read_bytes() == Path("hf", name).read_bytes()
    found = loading.find("s", pytest.fail)
    loaded, encoding = loading.load(found, torch.device("cpu"))
    ids = torch.arange(32)[None]
    assert torch.allclose(loaded(ids), model(ids), atol=1e-5)
    assert (found.state, encoding.name) == ({}, "byte")
    assert front_matter()["title"] == "hf"
    modes = {path.stat().st_mode & 0o777 for path in Path("s").rglob("*") if path.is_file()}
    assert len(modes) == 1  # safetensors makes its file for the owner alone
    assert "models" not in front_matter()
    assert "## Training" not in Path("s/README.md").read_text()


def test_of_a_model_on_the_hub(in_tmp, host):
    save()
    run("--out", "hf")
    host.publish("user/thing", {path.name: path.read_bytes() for path in Path("hf").iterdir()}, kind="models")
    run("--model_path", "user/thing@main", "--space", "s")
    assert no_code() == HUGGING_FACE
    assert front_matter()["models"] == ["user/thing"]


# ---------------------------------------------------------------------------------------------------------------------
# requirements.txt and README.md


def test_requirements_are_what_the_app_needs(in_tmp):
    save()
    run("--space", "s")
    lines = Path("s/requirements.txt").read_text().splitlines()
    packages = {line for line in lines if line[0] not in "#-"}
    reached, waiting, needed = set(), {"app"}, set()
    while waiting:
        file = test_house.MODULES[waiting.pop()]
        reached.add(file)
        assert Path("s", file.relative_to(ROOT)).is_file()
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


def test_front_matter_is_what_spaces_ask_for(in_tmp):
    save('out/"my: run" 🎈', changes={"n_embd": 8})
    run("--model_path", 'out/"my: run" 🎈', "--space", "s")
    data = front_matter()
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", GRADIO, "app.py")
    assert data["python_version"] == ".".join(map(str, sys.version_info[:2]))  # a text: 3.10 is no 3.1
    assert data["title"] == '"my: run" 🎈'
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {data["colorFrom"], data["colorTo"]} <= colors
    assert len(data["emoji"]) == 1
    assert data["emoji"] > "\u2000"
    assert "license" not in data


def test_short_description_fits_the_hub():
    """At the largest model of GPT-2's kind, and far beyond."""
    text = space._metadata("r", 1_557_611_200, None, GRADIO)
    described = json.loads(next(line for line in text.splitlines() if "short_description" in line).partition(": ")[2])
    assert "1,557,611,200" in described
    assert len(described) <= 60


def test_readme_says_what_the_model_is_and_how_to_run_it(in_tmp):
    save(changes={"bias": False, "position": "rope", "head_bias": True, "tie_weights": False}, tokens=448, epoch=0.5)
    run("--space", "s")
    text = Path("s/README.md").read_text()
    assert "# `r`\n" in text
    assert "pip install -r requirements.txt\npython app.py\n" in text
    assert "transformers" not in text
    assert "stored as zeros" not in text  # the weights are as they were trained
    assert "32 tokens, rotary positions (RoPE)" in text
    assert "a matrix of its own, with a bias" in text
    assert "validation loss 5.1250 nats per token" in text
    assert 'position = "rope"' in text


# ---------------------------------------------------------------------------------------------------------------------
# it runs by itself


ALONE = """
import importlib.util, json, os, pathlib, socket, sys
def refuse(*words):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
here = pathlib.Path.cwd()
files = [file for file in sorted(here.glob("*.py")) if file.stem != "app" or importlib.util.find_spec("gradio")]
ours = [importlib.import_module(file.stem) for file in files]
import torch; from flatgpt.interop import loading as trained
found = trained.find(".", print)
model, encoding = trained.load(found, torch.device("cpu"))
print(json.dumps([[str(pathlib.Path(module.__file__).parent) for module in ours], encoding.encode_ordinary("Hello é")]))
"""


def alone(folder: Path, *words, **env) -> subprocess.CompletedProcess:
    """Python in that folder, with nothing of this repository, and a cache of vocabularies that is the folder's."""
    env = {"PYTHONPATH": "", **env, "TIKTOKEN_CACHE_DIR": str(folder / "tiktoken_cache"), "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **env}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_modules_and_model_need_nothing_else(in_tmp):
    save()
    run("--space", "s")
    done = alone(in_tmp / "s", "-c", ALONE)
    assert done.returncode == 0, done.stderr
    where, ids = json.loads(done.stdout)
    assert set(where) == {str(in_tmp / "s")}
    assert ids == list("Hello é".encode())


def test_vocabulary_is_there(in_tmp):
    save(encoding="gpt2", changes={"vocab_size": 50257, "n_embd": 4})
    run("--space", "s")
    vocabulary = {name for name in no_code() if name.startswith("tiktoken_cache/")}
    assert no_code() == OURS | vocabulary
    assert len(vocabulary) == 2  # of GPT-2: merges and ids
    done = alone(in_tmp / "s", "-c", ALONE, **SYNTHETIC)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1] == tokenizer.load("gpt2").encode_ordinary("Hello é")


@pytest.mark.extra
def test_app_starts_from_the_folder_alone(in_tmp):
    if importlib.util.find_spec("gradio") is None:
        reason = "gradio is not installed: pip install -r requirements-extra.txt"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    save()
    run("--space", "s")
    shutil.rmtree("out")
    env = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR" and not k.startswith("GRADIO_SERVER_")}
    env |= {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "app.py"], cwd="s", env=env, **pipes) as app:
        try:
            printed = []  # up to the line that says where it listens, at a port that it found free
            while not (url := re.search(r"http://127\.0\.0\.1:\d+", printed[-1] if printed else "")):
                printed.append(app.stdout.readline())
                assert printed[-1], printed
            with urllib.request.urlopen(f"{url[0]}/config", timeout=60) as response:
                answer = json.load(response)
        finally:
            app.kill()
    assert answer["components"]
    assert str(in_tmp) not in json.dumps(answer)


# ---------------------------------------------------------------------------------------------------------------------
# refusals, and what a fault leaves


def refused(message: str, *words) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=message):
        run(*words)
    assert sorted(Path().rglob("*")) == before


def test_refusals(in_tmp):
    save()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    refused("space = full is there already: .* give another --space", "--space", "full")
    refused("space = full is there already", "--space", "full", "--dry_run")
    refused("space = file is there already", "--space", "file")
    refused("space = file/s: cannot be written: Not a directory", "--space", "file/s")
    remedy = "hf upload user/name 'my s' . --repo-type space --private"
    for words, key in (
        (("--out", "o"), "out"),
        (("--push", "user/name"), "push"),
        (("--dtype", "bfloat16"), "dtype"),
        (("--context_length", "8"), "context_length"),
    ):
        refused(f"space = my s is a folder of its own, .*: leave out {key}; .*{remedy}", "--space", "my s", *words)
    refused("leave out out and dtype;", "--space", "s", "--out", "o", "--dtype", "float16")


def test_weights_that_are_no_numbers(in_tmp):
    model = save()
    state = checkpoint.read_state(Path("out/r/ckpt/best"))
    model.transformer.wte.weight.data[0] = float("nan")
    state.pop("files")
    shutil.rmtree("out/r/ckpt")
    checkpoint.save(Path("out/r"), state, model.state_dict(), {}, keep=1)
    refused("wte.weight has nan or inf in float32: the run diverged; take an earlier checkpoint$", "--space", "s")


def test_without_gradio(in_tmp, monkeypatch):
    save()

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    refused("pip install -r requirements-extra.txt", "--space", "s")


def test_into_an_empty_folder_and_over_what_a_killed_call_left(in_tmp):
    save()
    Path("s").mkdir()
    Path(".s.partial").mkdir()
    Path(".s.partial/train_state.pt").write_text("half")
    run("--space", "s")
    assert no_code() == OURS
    assert not Path(".s.partial").exists()


def test_a_full_disk_leaves_nothing(in_tmp):
    """A limit of file sizes stands in for it; the weights are a copied file."""
    save()
    before, limits = sorted(in_tmp.rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        said = r"s.partial could not be written: File too large; .*, [\d.,]+ MB are free; nothing of it is kept"
        with pytest.raises(UserError, match=said):
            run("--space", "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(in_tmp.rglob("*")) == before


@pytest.mark.parametrize("last", ["tokenizer.py", "requirements.txt"])
def test_a_fault_leaves_nothing(in_tmp, monkeypatch, last):
    save()
    before, real = sorted(in_tmp.rglob("*")), {"copy": shutil.copyfile, "write": Path.write_bytes}

    def fault(target):
        assert not Path("s").exists()  # whoever is killed here leaves no half folder of that name
        if Path(target).name == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", lambda source, target: (fault(target), real["copy"](source, target)))
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (fault(path), real["write"](path, data)))
    with pytest.raises(KeyboardInterrupt):
        run("--space", "s")
    assert sorted(in_tmp.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------------------
# what is printed


def sizes(printed: str) -> dict[str, str]:
    lines = [line.split() for line in printed.splitlines() if line.startswith("  ") and line.endswith(("bytes", "MB"))]
    return {name: " ".join(size) for name, *size in lines}


def test_table_dry_run_and_next_steps(in_tmp, capsys):
    save(encoding="gpt2", changes={"vocab_size": 50257, "n_embd": 4})
    before = sorted(in_tmp.rglob("*"))
    run("--space", "my s", "--dry_run")
    assert sorted(in_tmp.rglob("*")) == before
    dry = capsys.readouterr().out
    assert dry.startswith("would go to my s:\n")
    run("--space", "my s")
    real = capsys.readouterr().out
    assert sizes(dry) == sizes(real)
    assert set(sizes(real)) == listed("my s") | {"together"}
    table = [line for line in real.splitlines() if line.endswith(("bytes", "MB"))]
    assert len({len(line) for line in table}) == 1, "columns"
    total = sum(path.stat().st_size for path in Path("my s").rglob("*") if path.is_file())
    assert sizes(real)["together"] == f"{total / 1e6:,.2f} MB"
    assert "  (cd 'my s' && python app.py)\n" in real
    assert "  hf upload user/name 'my s' . --repo-type space --private   # after" in real
