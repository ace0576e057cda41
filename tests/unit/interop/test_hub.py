"""Download models from the hub and upload them: requests, files, the cache, and errors.

The hub is a server in this process (hub_host.py) that huggingface_hub talks to.
"""

import ast
import itertools
import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_host import READER, WRITER
from huggingface_hub import constants
from processes import ROOT

from config import UserError
from flatgpt.data import hub
from flatgpt.interop.hub import fetch_model, hub_name, upload

FILES = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": b"# A model\n",
    "config.json": b'{"model_type": "gpt2"}',
    "generation_config.json": b"{}",
    "model.safetensors": b"weights " * 1000,
    "tokenizer.json": b'{"version": "1.0"}',
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2\n",
    "tokenizer_config.json": b'{"add_prefix_space": false}',
    "pytorch_model.bin": b"\x80\x04.",
    "tf_model.h5": b"\x89HDF",
    "onnx/model.onnx": b"onnx",
}
UNWANTED = (".gitattributes", "README.md", "generation_config.json", "pytorch_model.bin", "tf_model.h5", "onnx")
WANTED = {name: body for name, body in FILES.items() if not name.startswith(UNWANTED)}
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
    assert "{" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    "path",
    [
        *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "user/model", "User-1/my_model.v2", "u/m"),
        *("gpt2@607a30d", "user/model@main", "user/model@refs/pr/1", "missing/run", f"{'u' * 96}/{'m' * 96}"),
    ],
)
def test_names_of_the_hub(in_tmp, path):
    Path("user").touch()  # a file is not a folder that the name could be in
    assert hub_name(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "/", "bert", "gpt3", "quickstart", "a/b/c", "user/model/", "/user/model", "//", "user//model"),
        *("./model", "../model", "~/model", "~user/model", ".user/model", "user/.model", "user/model.", "-u/model"),
        *("user/mo del", "user/mödel", "user/model\n", "user\\model", "user/mo--del", "user/mo..del", "user/*"),
        *("gpt2.pt", "user/ckpt.pt", "user/x.bin", "user/model.SafeTensors", "user/config.json", "user/model.git"),
        *("gpt2@", "user/model@", "user/model@../x", "user/model@a/../b", "user/model@-x", "user/model@a b"),
        *("user@main/model", "https://huggingface.co/gpt2", "u/" + "m" * 97, "u" * 97 + "/m"),
        # local paths
        *("here/model", "here/typo", "here/typo@main", "distilgpt2", "distilgpt2@main", "gpt2-xl", "file/model@v1"),
        *("gpt2", "out/shakespeare"),
    ],
)
def test_other_names(in_tmp, path):
    for folder in ("here/model", "distilgpt2", "file"):
        Path(folder).mkdir(parents=True)
    Path("gpt2-xl").symlink_to("gone")
    Path("file/model@v1").touch()
    Path("gpt2").touch()
    assert hub_name(path) is None


def test_the_module_imports_the_standard_library_only():
    tree = ast.parse((ROOT / "flatgpt/interop/hub.py").read_text())
    names = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"config"}


# ---------------------------------------------------------------------------------------------------------------------
# download


@pytest.mark.parametrize(
    ("repo", "asked", "files", "expected"),
    [
        ("user/model", "user/model", FILES, WANTED),
        ("openai-community/gpt2", "gpt2", FILES, WANTED),
        ("user/model", "user/model", SHARDED | {"model-00003-of-00002.safetensors": b"not in the index"}, SHARDED),
    ],
)
def test_downloaded_files(in_tmp, host, repo, asked, files, expected):
    """Byte for byte, in huggingface_hub's cache under the commit's name; no pickle is requested."""
    commit = publish(host, files, repo)
    found, lines, folder = fetch(asked)
    assert found == expected
    assert lines == [f"{asked}: commit {commit[:7]}, from the hub"]
    assert (folder.name, folder.is_relative_to(constants.HF_HUB_CACHE)) == (commit, True)
    requested = {line.split()[-1] for line in host.asked}
    assert requested == {"revision", *expected, "special_tokens_map.json", "added_tokens.json"}


@pytest.mark.parametrize("files", [FILES, SHARDED, {"config.json": b"{}", "model.safetensors": b"no tokenizer"}])
@pytest.mark.parametrize("state", ["newer commit", "down", "offline"])
def test_a_complete_model_is_not_requested_again(in_tmp, host, monkeypatch, waits, files, state):
    commit = publish(host, files)
    first, _, folder = fetch()
    host.asked.clear()
    if state == "newer commit":
        publish(host, {**files, "config.json": b'{"newer": 1}'})
    if state == "down":
        host.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    assert fetch() == (first, [f"user/model: commit {commit[:7]}, from the cache"], folder)
    assert fetch(f"user/model@{commit}")[2] == folder
    assert (host.asked, waits) == ([], [])


def test_revisions(in_tmp, host, monkeypatch):
    """Commits, branches and pull requests; the model without a revision stays what it was."""
    publish(host)
    fetch()
    newer = publish(host, {**FILES, "config.json": b'{"newer": 1}'})
    pull = publish(host, {**SHARDED, "config.json": b"2"}, branch="refs/pr/1")
    assert fetch(f"user/model@{newer}")[0]["config.json"] == b'{"newer": 1}'
    assert fetch(f"user/model@{newer[:7]}")[2].name == newer
    assert fetch("user/model@refs/pr/1")[1] == [f"user/model@refs/pr/1: commit {pull[:7]}, from the hub"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("user/model@refs/pr/1")[2].name == pull
    assert fetch()[0]["config.json"] == FILES["config.json"]


def test_all_files_are_of_one_commit(in_tmp, host):
    """The branch moves during the download."""
    commit = publish(host)
    newer = {name: b"newer " + body for name, body in FILES.items()}
    folder = fetch_model("user/model", lambda line: publish(host, newer))
    assert folder.name == commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == WANTED


def test_private_model_with_a_token(in_tmp, host, monkeypatch):
    publish(host)
    host.private.add("models/user/model")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert fetch()[0] == WANTED


def test_cache_filled_by_other_programs(in_tmp, host, monkeypatch):
    """Weights without a tokenizer are completed; what `hf download` stored is taken without a request."""
    publish(host)
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("user/model", name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(["while HF_HUB_OFFLINE is set"], fetch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    host.asked.clear()
    assert fetch()[0] == WANTED
    assert "GET model.safetensors" not in host.asked
    publish(host, repo="user/other")
    huggingface_hub.snapshot_download("user/other", allow_patterns=["*.json", "*.txt", "*.safetensors"])
    host.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("user/other")[0] == WANTED | {"generation_config.json": b"{}"}
    assert host.asked == []


@pytest.mark.parametrize(("files", "last"), [(FILES, "model.safetensors"), (SHARDED, PARTS[1])])
def test_an_interrupted_download_is_continued(in_tmp, host, monkeypatch, waits, files, last):
    """An incomplete model is never used; later only the missing file is requested."""
    commit = publish(host, files)
    host.faults[f"GET {last}"] = itertools.repeat(2)
    refused([f"{last} of the hub's model could not be downloaded"], fetch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for repo in ("user/model", f"user/model@{commit}"):
        refused(["or not completely, while HF_HUB_OFFLINE is set"], fetch, repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    host.faults.clear()
    host.asked.clear()
    assert fetch()[0] == {name: body for name, body in files.items() if name in {*WANTED, *SHARDED}}
    assert [line for line in host.asked if line.startswith("GET ")] == ["GET revision", f"GET {last}"]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (("config.json", "pytorch_model.bin"), ["only pytorch_model.bin, a pickle", "save_pretrained"]),
        (("config.json", "onnx/model.onnx", "tf_model.h5"), ["only onnx/model.onnx, tf_model.h5:", "save_pretrained"]),
        (("config.json", "README.md"), ["no other weights"]),
        (("README.md", "model.safetensors"), ["no config.json"]),
    ],
)
def test_models_without_safetensors(in_tmp, host, files, parts):
    publish(host, {name: FILES[name] for name in files})
    refused(["user/model", *parts], fetch)
    assert not any(asked.startswith("GET ") and asked.endswith((".bin", ".h5", ".onnx")) for asked in host.asked)


@pytest.mark.parametrize(
    ("index", "part"),
    [
        (b"{", "is damaged"),
        (b'{"weight_map": ["a"]}', "is damaged"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "pytorch_model.bin is not a safetensors file"),
        (b'{"weight_map": {"a": "../../x.safetensors"}}', "../../x.safetensors is not a safetensors file"),
        (b'{"weight_map": {"a": 1}}', "1 is not a safetensors file"),
        (b'{"weight_map": {"a": "model-3.safetensors"}}', "model-3.safetensors, which does not exist"),
    ],
)
def test_invalid_index(in_tmp, host, index, part):
    publish(host, SHARDED | {"model.safetensors.index.json": index, "pytorch_model.bin": b"\x80"})
    refused([part], fetch)
    refused([part], fetch)  # from the cache too
    assert "GET pytorch_model.bin" not in host.asked


@pytest.mark.parametrize(
    ("repo", "faults", "parts"),
    [
        ("user/none", {}, ["no such file or folder", "no such model on the hub, or it is private", "auth login"]),
        ("user/model@v9", {}, ["user/model has no revision v9", "after the @"]),
        ("user/private", {}, ["no such model on the hub, or it is private", "hf auth login"]),
        ("user/model", {"HEAD config.json": (403, "GatedRepo")}, ["gated", "huggingface.co/user/model,", "HF_TOKEN"]),
        ("user/model", {"HEAD config.json": (401, "GatedRepo")}, ["gated", "accept its terms", "hf auth login"]),
        ("user/model", {"HEAD model.safetensors": (403, "")}, ["denies access (HTTP 403", "hf auth login"]),
        ("user/model", {"GET model.safetensors": (410, "")}, ["refuses the request for model.safetensors (HTTP 410"]),
    ],
)
def test_download_errors(in_tmp, host, waits, repo, faults, parts):
    """A clear answer of the hub is not requested again."""
    publish(host)
    publish(host, repo="user/private")
    host.private.add("models/user/private")
    host.publish("user/none", {"config.json": b"a dataset's"})
    host.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    refused([repo.partition("@")[0], *parts], fetch, repo)
    assert waits == []


@pytest.mark.parametrize(
    ("state", "parts", "waited"),
    [
        ("down", ["could not be downloaded (", "refused", "network"], [1, 2, 4]),
        ("slow", ["could not be downloaded ("], []),
        ("offline", ["HF_HUB_OFFLINE is set", "unset it"], []),
    ],
)
def test_no_network(in_tmp, host, waits, monkeypatch, state, parts, waited):
    """A hub that is slow to fail is asked once."""
    host.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    if state == "slow":
        monkeypatch.setattr(hub, "MAX_RETRY_SECONDS", -1)
    refused(["uot/run: no such file or folder", "check the path", *parts], fetch, "uot/run")
    assert waits == waited


def test_cache_that_cannot_be_written(in_tmp, host, waits):
    publish(host)
    Path("home").write_text("a file")
    refused(["config.json of user/model cannot be written to", constants.HF_HUB_CACHE, "HF_HOME"], fetch)
    assert waits == []


# ---------------------------------------------------------------------------------------------------------------------
# upload


EXPORT = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": b"weights " * 5000,
    "vocab.json": '{"ä": 0}'.encode(),
    "empty.txt": b"",
}
SECRETS = {"train_state.pt": b"SECRET moments", ".env": b"SECRET key", "ckpt/best/model.safetensors": b"SECRET best"}


@pytest.fixture
def writer(host, monkeypatch):
    """The hub, with the token of a user who may write."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return host


@pytest.fixture
def folder(in_tmp):
    for name, body in {**EXPORT, **SECRETS}.items():
        file = in_tmp / "export" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
    return in_tmp / "export"


def push(folder: Path, repo="user/new", private=False, names=tuple(EXPORT)) -> tuple[str, list[str]]:
    """Return the URL and the logged lines."""
    lines = []
    return upload(folder, names, repo, private, lines.append), lines


def head(writer) -> str:
    return writer.branches["models/user/new"]["main"]


@pytest.mark.parametrize("private", [True, False])
def test_upload(folder, writer, private):
    """One commit of the named files, byte for byte; the visibility is set only for --private. They can be fetched."""
    assert push(folder, private=private) == (f"{writer.url}/user/new", [f"user/new: commit {head(writer)[:7]}"])
    assert writer.created == {"user/new": "private" if private else None}
    assert writer.commits == [EXPORT]
    assert writer.files("user/new") == {".gitattributes": b"", **EXPORT}
    assert list(writer.stored.values()) == [EXPORT["model.safetensors"]]
    writer.private.clear()
    files, _, place = fetch("user/new")
    assert files == {name: EXPORT[name] for name in ("config.json", "model.safetensors", "vocab.json")}
    assert place.name == head(writer)


@pytest.mark.parametrize("private", [True, False])
def test_second_upload(folder, writer, private):
    """Changed files are sent; without a change there is no commit; other files and the visibility are kept."""
    push(folder, private=private)
    writer.publish("user/new", {**writer.files("user/new"), "notes.md": b"mine"}, kind="models")
    before = head(writer)
    assert push(folder)[1] == [f"user/new: commit {before[:7]}"]
    (folder / "model.safetensors").write_bytes(b"better")
    push(folder)
    expected = {".gitattributes": b"", "notes.md": b"mine", **EXPORT, "model.safetensors": b"better"}
    assert writer.files("user/new") == expected
    assert (len(writer.commits), writer.asked.count("POST create")) == (2, 1)
    assert list(writer.stored.values()) == [EXPORT["model.safetensors"], b"better"]
    assert writer.private == ({"models/user/new"} if private else set())


def test_private_upload_to_a_public_repository(folder, writer):
    """Refused before anything is sent."""
    publish(writer, repo="user/new")
    refused(["private", "user/new", "https://huggingface.co/user/new/settings"], push, folder, private=True)
    assert writer.asked == ["GET model"]


@pytest.mark.parametrize(
    "name", ["link.txt", "gone.txt", "ckpt", "ckpt/best/model.safetensors", "../secret.txt", "", "/etc/hostname"]
)
def test_only_files_in_the_folder_are_uploaded(folder, writer, name):
    (folder.parent / "secret.txt").write_text("SECRET")
    (folder / "link.txt").symlink_to("../secret.txt")
    refused([str(folder / name), "no links"], push, folder, names=("config.json", name))
    assert writer.asked == []


@pytest.mark.parametrize("saved", [None, WRITER])
def test_token(folder, writer, monkeypatch, saved):
    """From HF_TOKEN or `hf auth login`; without one the hub is not asked."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder.parent / "token"))
    if saved:
        Path(constants.HF_TOKEN_PATH).write_text(saved)
        push(folder)
        assert writer.commits == [EXPORT]
    else:
        refused(["user/new", "hf auth login", "HF_TOKEN"], push, folder)
        assert writer.asked == []


WRITING = ["POST create", "POST preupload", "POST batch", "PUT", "POST commit"]
NAME = "your own name"


@pytest.mark.parametrize(
    ("repo", "token", "faults", "parts"),
    [
        ("user/new", READER, {}, ["(HTTP 403: You don't have the rights", "write access", "settings/tokens"]),
        ("openai-community/gpt2", WRITER, {}, ["openai-community/gpt2", "HTTP 403", NAME]),
        ("other/new", WRITER, {}, ["other/new", "HTTP 403", NAME]),
        ("user/new", "hf_expired", {}, ["HTTP 401: Invalid credentials", "hf auth login"]),
        *(("user/new", WRITER, {r: (403, "")}, ["HTTP 403", "write access"]) for r in ["GET model", *WRITING]),
        *(("user/new", WRITER, {r: (400, "")}, ["HTTP 400", "nothing was committed"]) for r in WRITING),
        *(
            ("user/new", WRITER, {"POST preupload": fault}, ["user/new: the hub refuses the upload (", NAME])
            for fault in ((404, "RepoNotFound"), (404, ""), (403, "GatedRepo"))
        ),
        *((name, WRITER, {}, [f"{name}: a repository is named user/name"]) for name in ("new", "a/b/c", "u/new.git")),
    ],
)
def test_upload_errors(folder, writer, monkeypatch, waits, repo, token, faults, parts):
    """Without further attempts, and nothing is committed."""
    monkeypatch.setenv("HF_TOKEN", token)
    publish(writer, repo="openai-community/gpt2")
    writer.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    refused(parts, push, folder, repo=repo)
    assert (writer.commits, waits) == ([], [])


def test_upload_of_an_invalid_card(folder, writer, waits):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    refused(["user/new", "Invalid metadata in README.md. - no YAML", "nothing was committed"], push, folder)
    assert (writer.commits, waits) == ([], [])


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        *itertools.product(["GET model", *WRITING], ["drop", (503, "")]),
        *(("POST commit", (status, "")) for status in (409, 412, 429)),
        *(("POST create", "lost"), ("POST commit", "lost")),  # done, but the answer is lost
    ],
)
def test_upload_after_a_broken_connection(folder, writer, waits, request_, fault):
    writer.faults[request_] = iter([fault])
    assert push(folder, private=True)[1] == [f"user/new: commit {head(writer)[:7]}"]
    assert writer.commits == [EXPORT]
    assert writer.created == {"user/new": "private"}
    assert len(waits) == 1


@pytest.mark.parametrize("request_", WRITING)
def test_upload_while_the_connection_stays_broken(folder, writer, waits, capsys, request_):
    """Nothing is committed; the next upload sends everything."""
    writer.faults[request_] = itertools.repeat("drop")
    refused(["user/new could not be uploaded (", "nothing was committed", "run again"], push, folder)
    assert capsys.readouterr().err.count("user/new: the connection broke") == 3
    assert writer.commits == []
    writer.faults.clear()
    push(folder)
    assert writer.commits == [EXPORT]


def test_upload_offline(folder, writer, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(["HF_HUB_OFFLINE is set"], push, folder)
    assert (writer.asked, waits) == ([], [])
