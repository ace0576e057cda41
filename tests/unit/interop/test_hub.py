"""Models from and to the hub: what is asked, what arrives and what never leaves, and what is said when it goes wrong.

The hub is a server on this machine (hub_host.py) that answers huggingface_hub as the real one does.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from conftest import ROOT
from hub_host import READER, WRITER
from huggingface_hub import constants

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
    """(the files of the folder, what was said, the folder)."""
    said = []
    folder = fetch_model(repo, said.append)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}, said, folder


def refusal(repo: str = "user/model") -> str:
    with pytest.raises(UserError) as caught:
        fetch(repo)
    assert "\n" not in str(caught.value)
    assert "{" not in str(caught.value)
    return str(caught.value)


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
    Path("user").touch()  # a file is no folder that the name could be in
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
        # what is here
        *(
            "here/model",
            "here/typo",
            "here/typo@main",
            "distilgpt2",
            "distilgpt2@main",
            "gpt2-xl",
            "file/model@v1",
            "gpt2",
        ),
    ],
)
def test_no_names_of_the_hub(in_tmp, path):
    Path("here/model").mkdir(parents=True)
    Path("distilgpt2").mkdir()
    Path("gpt2-xl").symlink_to("gone")
    Path("file").mkdir()
    Path("file/model@v1").touch()
    Path("gpt2").touch()
    assert hub_name(path) is None


def test_run_in_out_is_none_before_the_first_run(in_tmp):
    assert hub_name("out/shakespeare") is None


def test_names_are_told_with_the_standard_library():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flatgpt.interop import hub\n"
    code += (
        "hub.hub_name('user/model'); unwanted = ('huggingface_hub', 'flatgpt.data.hub', 'numpy', 'torch', 'tiktoken')\n"
    )
    code += "print([m for m in unwanted if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------------------
# from the hub


def test_what_is_fetched(in_tmp, host):
    """Byte for byte, under the commit's name, in the library's cache; and no pickle."""
    commit = publish(host)
    files, said, folder = fetch()
    assert files == WANTED
    assert said == [f"user/model: commit {commit[:7]}, from the hub"]
    assert (folder.name, folder.is_relative_to(constants.HF_HUB_CACHE)) == (commit, True)
    asked = {line.split()[-1] for line in host.asked}
    assert asked == {"revision", *WANTED, "special_tokens_map.json", "added_tokens.json"}


@pytest.mark.parametrize("files", [FILES, SHARDED, {"config.json": b"{}", "model.safetensors": b"no tokenizer"}])
@pytest.mark.parametrize("state", ["moved on", "down", "offline"])
def test_what_is_whole_is_not_asked_again(in_tmp, host, monkeypatch, waits, files, state):
    commit = publish(host, files)
    first, _, folder = fetch()
    host.asked.clear()
    if state == "moved on":
        publish(host, {**files, "config.json": b'{"newer": 1}'})
    if state == "down":
        host.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    assert fetch() == (first, [f"user/model: commit {commit[:7]}, from the cache"], folder)
    assert fetch(f"user/model@{commit}")[2] == folder
    assert (host.asked, waits) == ([], [])


def test_a_newer_commit_is_fetched_by_its_name(in_tmp, host):
    publish(host)
    fetch()
    newer = publish(host, {**FILES, "config.json": b'{"newer": 1}'})
    assert fetch(f"user/model@{newer}")[0]["config.json"] == b'{"newer": 1}'
    assert fetch(f"user/model@{newer[:7]}")[2].name == newer
    assert fetch()[0]["config.json"] == FILES["config.json"]


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1"])
def test_revision(in_tmp, host, monkeypatch, revision):
    publish(host)
    commit = publish(host, {**SHARDED, "config.json": b"2"}, branch=revision)
    files, said, folder = fetch(f"user/model@{revision}")
    assert (files["config.json"], folder.name, said[0].split()[2]) == (b"2", commit, f"{commit[:7]},")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(f"user/model@{revision}")[2] == folder


def test_branch_that_moves_on_in_the_middle(in_tmp, host):
    """All files are of one commit: that of the first."""
    commit = publish(host)
    newer = {name: b"newer " + body for name, body in FILES.items()}
    folder = fetch_model("user/model", lambda line: publish(host, newer))
    assert folder.name == commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == WANTED


def test_bare_names_are_redirected(in_tmp, host):
    commit = publish(host, repo="openai-community/gpt2")
    files, said, folder = fetch("gpt2")
    assert (files, folder.name) == (WANTED, commit)
    assert said == [f"gpt2: commit {commit[:7]}, from the hub"]


def test_shards(in_tmp, host):
    publish(host, {**SHARDED, "model-00003-of-00002.safetensors": b"not named"})
    assert fetch()[0] == SHARDED


def test_private_model(in_tmp, host, monkeypatch):
    """With the token of who may see it."""
    publish(host)
    host.private.add("models/user/model")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert fetch()[0] == WANTED


@pytest.mark.parametrize("state", ["up", "offline"])
def test_cache_that_was_filled_by_hf_download(in_tmp, host, monkeypatch, state):
    """All that there is, but no note of what there is not."""
    publish(host)
    huggingface_hub.snapshot_download("user/model", allow_patterns=["*.json", "*.txt", "*.safetensors"])
    host.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    assert fetch()[0] == WANTED | {"generation_config.json": b"{}"}
    assert host.asked == []


def test_cache_without_a_tokenizer_is_completed(in_tmp, host, monkeypatch):
    """Others fetch the weights alone."""
    publish(host)
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("user/model", name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "while HF_HUB_OFFLINE is set" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    host.asked.clear()
    assert fetch()[0] == WANTED
    assert "GET model.safetensors" not in host.asked


@pytest.mark.parametrize(("files", "last"), [(FILES, "model.safetensors"), (SHARDED, PARTS[1])])
def test_half_a_model_is_not_taken_for_a_whole_one(in_tmp, host, monkeypatch, waits, files, last):
    """The connection breaks for good at the last file: later only that one is fetched; also by the commit's name."""
    commit = publish(host, files)
    host.faults[f"GET {last}"] = itertools.repeat(2)
    assert f"{last} of the hub's model could not be fetched" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for repo in ("user/model", f"user/model@{commit}"):
        assert "or not all of it, while HF_HUB_OFFLINE is set" in refusal(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    host.faults.clear()
    host.asked.clear()
    assert fetch()[0] == {name: body for name, body in files.items() if name in {*WANTED, *SHARDED}}
    assert [line for line in host.asked if line.startswith("GET ")] == ["GET revision", f"GET {last}"]


@pytest.mark.parametrize(
    ("request_", "faults"),
    [
        ("GET revision", ["drop", (503, "")]),
        ("HEAD merges.txt", ["drop", (503, "")]),
        ("GET tokenizer.json", [3]),
        ("GET model.safetensors", [5, "drop"]),
    ],
)
def test_broken_connection_is_taken_up_again(in_tmp, host, waits, request_, faults):
    publish(host)
    host.faults[request_] = iter(faults)
    assert fetch()[0] == WANTED
    assert host.asked.count(request_) == 1 + len(faults)
    assert waits


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("config.json", "pytorch_model.bin"), ["only pytorch_model.bin, which is a pickle", "save_pretrained"]),
        (("config.json", "onnx/model.onnx", "tf_model.h5"), ["only onnx/model.onnx, tf_model.h5:", "save_pretrained"]),
        (("config.json", "README.md"), ["no other weights"]),
        (("README.md", "model.safetensors"), ["no config.json"]),
    ],
)
def test_without_safetensors(in_tmp, host, files, said):
    publish(host, {name: FILES[name] for name in files})
    answer = refusal()
    for part in ("user/model", *said):
        assert part in answer
    assert not any(asked.startswith("GET ") and asked.endswith((".bin", ".h5", ".onnx")) for asked in host.asked)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"{", "is damaged"),
        (b'{"weight_map": ["a"]}', "is damaged"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "pytorch_model.bin is no safetensors file"),
        (b'{"weight_map": {"a": "../../x.safetensors"}}', "../../x.safetensors is no safetensors file"),
        (b'{"weight_map": {"a": 1}}', "1 is no safetensors file"),
        (b'{"weight_map": {"a": "model-3.safetensors"}}', "model-3.safetensors, which is not there"),
    ],
)
def test_index_that_cannot_be_used(in_tmp, host, index, said):
    publish(host, SHARDED | {"model.safetensors.index.json": index, "pytorch_model.bin": b"\x80"})
    assert said in refusal()
    assert said in refusal()  # from the cache too
    assert "GET pytorch_model.bin" not in host.asked


REFUSALS = [
    ("user/none", {}, ["no such file or folder here", "the hub has none of this name, or it is private", "auth login"]),
    ("user/model@v9", {}, ["user/model has no revision v9", "what follows the @"]),
    ("user/private", {}, ["the hub has none of this name, or it is private", "hf auth login"]),
    ("user/model", {"HEAD config.json": (403, "GatedRepo")}, ["gated", "huggingface.co/user/model,", "HF_TOKEN"]),
    ("user/model", {"HEAD config.json": (401, "GatedRepo")}, ["gated", "accept its terms", "hf auth login"]),
    ("user/model", {"HEAD model.safetensors": (403, "")}, ["refuses access (HTTP 403", "hf auth login"]),
    ("user/model", {"GET model.safetensors": (410, "")}, ["refuses to give model.safetensors (HTTP 410"]),
]


@pytest.mark.parametrize(("repo", "faults", "said"), REFUSALS)
def test_refusals(in_tmp, host, waits, repo, faults, said):
    """At once: what the hub says clearly is not asked again."""
    publish(host)
    publish(host, repo="user/private")
    host.private.add("models/user/private")
    host.publish("user/none", {"config.json": b"a dataset's"})
    host.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    answer = refusal(repo)
    for part in (repo.partition("@")[0], *said):
        assert part in answer
    assert waits == []


@pytest.mark.parametrize("state", ["down", "offline"])
def test_nothing_there_and_no_network(in_tmp, host, waits, monkeypatch, state):
    host.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    answer = refusal("uot/run")
    words = {"down": ["could not be fetched (", "refused", "network"], "offline": ["HF_HUB_OFFLINE is set", "unset it"]}
    for part in ("uot/run: no such file or folder here", "check the path", *words[state]):
        assert part in answer
    assert waits == ([1, 2, 4] if state == "down" else [])


def test_network_that_is_slow_to_fail_is_asked_once(in_tmp, host, waits, monkeypatch):
    host.stop()
    monkeypatch.setattr(hub, "MAX_RETRY_SECONDS", -1)
    assert "could not be fetched (" in refusal()
    assert waits == []


def test_cache_that_cannot_be_written(in_tmp, host, waits):
    publish(host)
    Path("home").write_text("a file")
    answer = refusal()
    for part in ("config.json of user/model cannot be written into", constants.HF_HUB_CACHE, "HF_HOME"):
        assert part in answer
    assert waits == []


# ---------------------------------------------------------------------------------------------------------------------
# to the hub


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
    """The hub, for somebody who is logged in."""
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
    said = []
    return upload(folder, names, repo, private, said.append), said


def refused(folder: Path, **asked) -> str:
    with pytest.raises(UserError) as caught:
        push(folder, **asked)
    assert "\n" not in str(caught.value)
    assert "{" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("private", [True, False])
def test_upload(folder, writer, private):
    """In one commit of these files, byte for byte; the visibility is said only where it is asked for."""
    url, said = push(folder, private=private)
    assert url == f"{writer.url}/user/new"
    assert writer.created == {"user/new": "private" if private else None}
    assert writer.commits == [EXPORT]
    assert writer.files("user/new") == {".gitattributes": b"", **EXPORT}
    assert list(writer.stored.values()) == [EXPORT["model.safetensors"]]
    commit = writer.branches["models/user/new"]["main"]
    assert said == [f"user/new: commit {commit[:7]}"]


def test_only_what_is_named_leaves(folder, writer):
    push(folder, names=("config.json",))
    assert writer.commits == [{"config.json": EXPORT["config.json"]}]
    assert writer.stored == {}


def test_what_was_uploaded_can_be_fetched(folder, writer):
    push(folder)
    files, _, place = fetch("user/new")
    assert files == {name: EXPORT[name] for name in ("config.json", "model.safetensors", "vocab.json")}
    assert place.name == writer.branches["models/user/new"]["main"]


def test_again(folder, writer):
    """What has changed is sent; with no change there is no commit; what somebody put there stays."""
    push(folder)
    writer.publish("user/new", {**writer.files("user/new"), "notes.md": b"mine"}, kind="models")
    before = writer.branches["models/user/new"]["main"]
    assert push(folder) == (f"{writer.url}/user/new", [f"user/new: commit {before[:7]}"])
    (folder / "model.safetensors").write_bytes(b"better")
    push(folder)
    assert len(writer.commits) == 2
    assert list(writer.stored.values()) == [EXPORT["model.safetensors"], b"better"]
    assert writer.files("user/new") == {
        ".gitattributes": b"",
        "notes.md": b"mine",
        **EXPORT,
        "model.safetensors": b"better",
    }
    assert writer.asked.count("POST create") == 1


@pytest.mark.parametrize("private", [True, False])
def test_a_private_repository_stays_private(folder, writer, private):
    push(folder, private=True)
    (folder / "config.json").write_bytes(b"{}")
    push(folder, private=private)
    assert writer.private == {"models/user/new"}
    assert len(writer.commits) == 2


def test_private_into_a_public_repository_is_refused(folder, writer):
    """Before anything leaves."""
    publish(writer, repo="user/new")
    answer = refused(folder, private=True)
    for part in ("private", "user/new", "https://huggingface.co/user/new/settings"):
        assert part in answer
    assert writer.asked == ["GET model"]


@pytest.mark.parametrize("name", ["link.txt", "gone.txt", "ckpt", "ckpt/best/model.safetensors", "../secret.txt", ""])
def test_other_things_than_files_of_the_folder_are_refused(folder, writer, name):
    (folder.parent / "secret.txt").write_text("SECRET")
    (folder / "link.txt").symlink_to("../secret.txt")
    answer = refused(folder, names=("config.json", name))
    for part in (str(folder / name), "no links"):
        assert part in answer
    assert writer.asked == []


def test_absolute_paths_are_refused(folder, writer):
    assert "config.json" in refused(folder, names=(str(folder / "config.json"),))
    assert writer.asked == []


@pytest.mark.parametrize("saved", [None, WRITER])
def test_token(folder, writer, monkeypatch, saved):
    """Of HF_TOKEN, or what `hf auth login` has saved; none at all is said before the hub is asked."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder.parent / "token"))
    if saved:
        Path(constants.HF_TOKEN_PATH).write_text(saved)
        push(folder)
        assert writer.commits == [EXPORT]
    else:
        answer = refused(folder)
        for part in ("user/new", "hf auth login", "HF_TOKEN"):
            assert part in answer
        assert writer.asked == []


WRITING = ["POST create", "POST preupload", "POST batch", "PUT", "POST commit"]


@pytest.mark.parametrize(
    ("asked", "token", "faults", "said"),
    [
        ({}, READER, {}, ["(HTTP 403: You don't have the rights", "a token that may write", "settings/tokens"]),
        ({"repo": "openai-community/gpt2"}, WRITER, {}, ["openai-community/gpt2", "HTTP 403", "a name of your own"]),
        ({"repo": "other/new"}, WRITER, {}, ["other/new", "HTTP 403", "a name of your own"]),
        ({}, "hf_expired", {}, ["HTTP 401: Invalid credentials", "hf auth login"]),
        ({}, WRITER, {"GET model": (403, "")}, ["HTTP 403", "a token that may write"]),
        *(({}, WRITER, {request: (403, "")}, ["HTTP 403", "a token that may write"]) for request in WRITING),
        *(({}, WRITER, {request: (400, "")}, ["HTTP 400", "nothing of it was committed"]) for request in WRITING),
        (
            {},
            WRITER,
            {"POST preupload": (404, "RepoNotFound")},
            ["user/new: the hub refuses (404", "a name of your own"],
        ),
        ({}, WRITER, {"POST preupload": (404, "")}, ["user/new: the hub refuses (", "a name of your own"]),
        ({}, WRITER, {"POST preupload": (403, "GatedRepo")}, ["user/new: the hub refuses (", "a name of your own"]),
        ({"repo": "new"}, WRITER, {}, ["new: the hub's form is user/name"]),
        ({"repo": "a/b/c"}, WRITER, {}, ["a/b/c: the hub's form is user/name"]),
        ({"repo": "user/new.git"}, WRITER, {}, ["user/new.git: the hub's form is user/name"]),
    ],
)
def test_refused_uploads(folder, writer, monkeypatch, waits, asked, token, faults, said):
    """At once, and nothing of it is there."""
    monkeypatch.setenv("HF_TOKEN", token)
    publish(writer, repo="openai-community/gpt2")
    writer.faults = {request: itertools.repeat(fault) for request, fault in faults.items()}
    answer = refused(folder, **asked)
    for part in said:
        assert part in answer
    assert (writer.commits, waits) == ([], [])


def test_card_that_the_hub_does_not_take(folder, writer, waits):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    answer = refused(folder)
    for part in ("user/new", "Invalid metadata in README.md. - no YAML", "nothing of it was committed"):
        assert part in answer
    assert (writer.commits, waits) == ([], [])


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        *itertools.product(["GET model", *WRITING], ["drop", (503, "")]),
        *(("POST commit", (status, "")) for status in (409, 412, 429)),
    ],
)
def test_upload_goes_on_after_a_broken_connection(folder, writer, waits, request_, fault):
    writer.faults[request_] = iter([fault])
    push(folder, private=True)
    assert writer.commits == [EXPORT]
    assert writer.created == {"user/new": "private"}
    assert len(waits) == 1


@pytest.mark.parametrize("request_", ["POST create", "POST commit"])
def test_answer_that_is_lost(folder, writer, waits, request_):
    """What was done is not done twice, and is no mistake the second time."""
    writer.faults[request_] = iter(["lost"])
    _, said = push(folder)
    assert len(waits) == 1
    assert writer.commits == [EXPORT]
    assert said == [f"user/new: commit {writer.branches['models/user/new']['main'][:7]}"]


@pytest.mark.parametrize("request_", WRITING)
def test_upload_into_a_connection_that_stays_broken(folder, writer, waits, capsys, request_):
    """Nothing of it is there; the next upload does it all."""
    writer.faults[request_] = itertools.repeat("drop")
    answer = refused(folder)
    for part in ("user/new could not be uploaded (", "nothing of it was committed", "run again"):
        assert part in answer
    assert capsys.readouterr().err.count("user/new: the connection broke") == 3
    assert writer.commits == []
    writer.faults.clear()
    push(folder)
    assert writer.commits == [EXPORT]


def test_upload_offline(folder, writer, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(folder)
    assert (writer.asked, waits) == ([], [])
