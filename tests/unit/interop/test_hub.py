"""Download models from the hub and upload them: requests, files, the cache, and errors.

The hub is a server in this process (hub_host.py) that huggingface_hub talks to.
"""

import itertools
import json
from pathlib import Path

import huggingface_hub
import pytest
from hub_host import READER, WRITER
from huggingface_hub import constants

from config import UserError
from flatgpt.interop.hub import fetch_model, hub_name, upload

FILES = {
    "README.md": b"# A model\n",
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": b"weights " * 1000,
    "tokenizer.json": b'{"version": "1.0"}',
    "vocab.json": b'{"a": 0}',
    "pytorch_model.bin": b"\x80\x04.",
}
WANTED = {name: FILES[name] for name in FILES if not name.startswith(("README", "pytorch"))}
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": PARTS[1], "b": PARTS[0], "c": PARTS[1]}}).encode()
SHARDED = {name: body for name, body in WANTED.items() if name != "model.safetensors"} | {
    "model.safetensors.index.json": INDEX,
    PARTS[0]: b"one",
    PARTS[1]: b"two",
}


def publish(host, files=FILES, repo="user/model", **where) -> str:
    return host.publish(repo, files, kind="models", **where)


def fetch(repo: str = "user/model") -> tuple[dict[str, bytes], list[str], Path]:
    """Return the folder's files, the logged lines and the folder."""
    lines = []
    folder = fetch_model(repo, lines.append)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}, lines, folder


def refused(parts, call, *args, **keys) -> None:
    """Check that the call raises a UserError of one line that has all these parts."""
    with pytest.raises(UserError) as caught:
        call(*args, **keys)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_names_of_the_hub(in_tmp):
    Path("user").touch()  # a file is not a folder that the name could be in
    with_user = ("User-1/my_model.v2", "u/m", "missing/run", "user/model@main", "user/model@refs/pr/1")
    for path in ("gpt2", "gpt2-xl", "distilgpt2", "gpt2@607a30d", *with_user):
        assert hub_name(path) == path


def test_other_names(in_tmp):
    for folder in ("here/model", "file"):
        Path(folder).mkdir(parents=True)
    Path("gpt2-xl").symlink_to("gone")
    Path("file/model@v1").touch()
    Path("gpt2").touch()
    for path in (
        *("", ".", "bert", "quickstart", "a/b/c", "user/model/", "/user/model", "./model", "../model", "~/model"),
        *("user/.model", "user/mo del", "user/model\n", "user\\model", "user/*", "https://huggingface.co/gpt2"),
        *("gpt2.pt", "user/x.bin", "user/model.SafeTensors", "user/config.json", "user/model.git"),
        *("gpt2@", "user/model@../x", "user/model@a/../b", "user/model@-x", "user@main/model"),
        # local paths
        *("here/model", "here/typo", "here/typo@main", "gpt2-xl", "file/model@v1", "gpt2", "out/gone"),
    ):
        assert hub_name(path) is None, path


# ---------------------------------------------------------------------------------------------------------------------
# download


@pytest.mark.parametrize(("files", "wanted"), [(FILES, WANTED), (SHARDED, SHARDED)])
def test_a_model_is_downloaded_once(in_tmp, host, monkeypatch, files, wanted):
    """Byte for byte, under the commit's name; no pickle is requested. A complete model is not requested again."""
    commit = publish(host, files)
    found, lines, folder = fetch()
    assert (found, lines, folder.name) == (wanted, [f"user/model: commit {commit[:7]}, from the hub"], commit)
    assert set(host.fetched()) == set(wanted)
    host.asked.clear()
    newer = publish(host, {**files, "config.json": b'{"newer": 1}'})
    assert fetch() == (found, [f"user/model: commit {commit[:7]}, from the cache"], folder)
    assert host.asked == []
    assert fetch(f"user/model@{newer[:7]}")[0]["config.json"] == b'{"newer": 1}'
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(f"user/model@{commit}")[2] == folder
    assert fetch()[2] == folder


def test_cache_filled_by_other_programs(in_tmp, host):
    """Weights without a tokenizer are completed."""
    publish(host)
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("user/model", name)
    host.asked.clear()
    assert fetch()[0] == WANTED
    assert "model.safetensors" not in host.fetched()


@pytest.mark.parametrize(("files", "last"), [(FILES, "model.safetensors"), (SHARDED, PARTS[1])])
def test_an_interrupted_download_is_continued(in_tmp, host, monkeypatch, waits, files, last):
    """An incomplete model is never used; later only the missing file is requested."""
    publish(host, files)
    host.faults[f"GET {last}"] = itertools.repeat((503, ""))
    refused(["user/model", "503", "run again"], fetch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(["it is not completely on this machine, and HF_HUB_OFFLINE is set"], fetch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    host.faults.clear()
    host.asked.clear()
    assert fetch()[0] == {name: body for name, body in files.items() if name in {*WANTED, *SHARDED}}
    assert host.fetched() == [last]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": None}, "user/model has no config.json and model.safetensors on the hub"),
        ({"model.safetensors.index.json": None}, "has no config.json and model.safetensors"),
        ({"model.safetensors.index.json": b"{"}, "is damaged"),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "is damaged: it lists no file"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../x"}}'}, "'../../x' is not a safetensors file"),
        ({PARTS[1]: None}, "has no config.json and model.safetensors"),
    ],
)
def test_models_without_safetensors(in_tmp, host, files, said):
    """Twice, as what was downloaded is in the cache then. A pickle is not requested."""
    files = {**SHARDED, "pytorch_model.bin": b"\x80\x04.", **files}
    publish(host, {name: body for name, body in files.items() if body})
    for _ in range(2):
        refused([said], fetch)
    assert "pytorch_model.bin" not in host.fetched()


@pytest.mark.parametrize(
    ("repo", "parts"),
    [
        ("user/none", ["no such file or folder", "does not exist on the hub, or it is private", "hf auth login"]),
        ("user/model@v9", ["user/model@v9", "no such revision"]),
        ("user/mo--del", ["user/mo--del", "a repository name has the form user/name"]),
        ("user/down", ["refused", "check the network"]),
        ("user/offline", ["no such file or folder", "HF_HUB_OFFLINE is set"]),
        ("user/model", ["Not a directory", "check the network and the disk"]),
    ],
)
def test_download_errors(in_tmp, host, monkeypatch, repo, parts):
    publish(host)
    Path("home").write_text("a file in the place of the cache's folder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", repo == "user/offline")
    if repo == "user/down":
        host.stop()
    refused([repo, *parts], fetch, repo)


# ---------------------------------------------------------------------------------------------------------------------
# upload


EXPORT = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": b"weights " * 5000,
    "vocab.json": '{"ä": 0}'.encode(),
}
SECRETS = {"train_state.pt": b"SECRET moments", ".env": b"SECRET key", "ckpt/best/model.safetensors": b"SECRET best"}


@pytest.fixture
def folder(in_tmp, monkeypatch):
    """A folder to upload from, and the token of a user who may write."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    for name, body in {**EXPORT, **SECRETS}.items():
        file = in_tmp / "export" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
    return in_tmp / "export"


def push(folder: Path, repo="user/new", private=False) -> tuple[str, list[str]]:
    """Return the URL and the logged lines."""
    lines = []
    return upload(folder, tuple(EXPORT), repo, private, lines.append), lines


@pytest.mark.parametrize("private", [True, False])
def test_upload(folder, host, private):
    """One commit of the named files; the visibility is set only for --private. Other files are kept by the next one."""
    url, lines = push(folder, private=private)
    assert (url, lines) == (
        f"{host.url}/user/new",
        [f"user/new: commit {host.branches['models/user/new']['main'][:7]}"],
    )
    assert (host.created, host.commits) == ({"user/new": "private" if private else None}, [EXPORT])
    host.publish("user/new", {**host.files("user/new"), "notes.md": b"mine"}, kind="models")
    (folder / "vocab.json").write_bytes(b"better")
    push(folder)
    assert host.files("user/new") == {".gitattributes": b"", "notes.md": b"mine", **EXPORT, "vocab.json": b"better"}
    assert host.private == ({"models/user/new"} if private else set())


@pytest.mark.parametrize(
    ("keys", "token", "faults", "parts"),
    [
        ({}, READER, {}, ["user/new", "You don't have the rights", "hf auth login"]),
        ({"repo": "other/new"}, WRITER, {}, ["other/new", "You don't have the rights"]),
        ({}, None, {}, ["user/new", "a token with write access", "hf auth login", "HF_TOKEN"]),
        ({}, WRITER, {"POST commit": (400, "")}, ["user/new", "Bad request"]),
        ({}, WRITER, {"POST create": "drop"}, ["user/new", "Server disconnected", "run again"]),
        ({"repo": "user/public", "private": True}, WRITER, {}, ["user/public already exists", "public", "/settings"]),
    ],
)
def test_upload_errors(folder, host, monkeypatch, waits, keys, token, faults, parts):
    """Nothing is committed."""
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no token")
    publish(host, repo="user/public")
    host.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    refused(parts, push, folder, **keys)
    assert host.commits == []
