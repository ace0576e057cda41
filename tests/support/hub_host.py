"""A server in this process that replies to huggingface_hub as the Hugging Face hub does, for the fixture `host`."""

import base64
import hashlib
import http.server
import json
import threading
import time
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

LARGE = (".parquet", ".safetensors", ".bin")
WRITER, READER = "hf_writer", "hf_reader"  # tokens


def hashes(path: str, body: bytes) -> dict:
    """Return the hub's hashes of a file: git's, and SHA-256 for a file in the large file storage."""
    sha256 = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return {"oid": blob_id(body), **({"lfs": sha256} if path.endswith(LARGE) else {})}


def blob_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Requests for large files are redirected to another host name."""

    def do_GET(self):
        host, revision, place = self.server, "main", "hub"
        match [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]:
            case ["gpt2", *_] | ["api", "models", "gpt2", *_]:
                return self.reply(307, {"Location": self.path.replace("/gpt2/", "/openai-community/gpt2/", 1)})
            case ["api", "models" as kind, user, name]:
                what = "model"
            case ["api", "models" | "datasets" as kind, user, name, "revision", revision]:
                what = "revision"
            case ["api", "models" | "datasets" as kind, user, name, "tree", revision, *folder]:
                what = "/".join(["tree", *folder])
            case ["storage-token"]:
                expires = int(time.time()) + 3600
                facts = {"Cas-Url": host.storage, "Access-Token": "-", "Token-Expiration": expires}
                return self.reply(200, {f"X-Xet-{key}": value for key, value in facts.items()})
            case ["cdn" as place, kind, user, name, "resolve", revision, *path]:
                what = "/".join(path)
            case ["datasets" as kind, user, name, "resolve", revision, *path]:
                what = "/".join(path)
            case [user, name, "resolve", revision, *path]:
                what, kind = "/".join(path), "models"
            case _:
                return self.reply(404)
        redirect = what.endswith(LARGE) and place == "hub"
        asked = f"{self.command} {what}"
        fault = self.fault(asked) if not redirect or self.command == "HEAD" else None
        if fault == "drop":
            return None
        if isinstance(fault, tuple):
            return self.reply_error(*fault)
        repo = f"{kind}/{user}/{name}"
        if repo not in host.repos or (repo in host.private and place == "hub" and not self.token()):
            return self.reply_error(401, "RepoNotFound")
        commit = host.branches[repo].get(revision, revision)
        if commit not in host.repos[repo]:
            return self.reply_error(404, "RevisionNotFound")
        files = host.repos[repo][commit]
        if what in ("revision", "model"):
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": f"{user}/{name}", "sha": commit, "private": repo in host.private, "siblings": siblings}
            return self.reply_json(facts)
        if what.startswith("tree"):
            start, deep = what[5:] and what[5:] + "/", "recursive=true" in self.path.lower()
            tree = [{"type": "directory", "path": start + "folder", "oid": "0" * 40}] + [
                {"type": "file", "path": path, "size": len(body), **hashes(path, body)}
                for path, body in files.items()
                if path.startswith(start) and (deep or "/" not in path[len(start) :])
            ]
            if len(tree) == 1:
                return self.reply_error(404, "EntryNotFound")
            return self.reply_json(tree)
        if what not in files:
            return self.reply_error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        body = fault if isinstance(fault, bytes) else files[what]
        digest = hashlib.sha256 if what.endswith(LARGE) else hashlib.sha1
        facts = {"X-Repo-Commit": commit, "ETag": f'"{digest(files[what]).hexdigest()}"'}
        if redirect:
            facts |= {"X-Linked-Etag": facts["ETag"], "X-Linked-Size": str(len(body))}
            if host.storage:
                facts |= {"X-Xet-Hash": "c" * 64, "X-Xet-Refresh-Route": f"{host.url}/storage-token"}
            place = f"http://localhost:{host.server_port}/cdn/{repo}/resolve/{commit}/{what}"
            return self.reply(302, {**facts, "Location": place})
        return self.reply(200, facts, body, fault)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        """Requests that write to the models of `user`, with WRITER as the token."""
        host, body = self.server, self.body()
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["api", "validate-yaml"]:
                wrong = b"license: [" in body
                return self.reply_json(
                    {"errors": [{"message": "no YAML"}] * wrong, "warnings": []}, 400 if wrong else 200
                )
            case ["api", "repos", "create" as what]:
                asked = json.loads(body)
                user, name = asked["organization"], asked["name"]
            case ["api", "models", user, name, "preupload" | "commit" as what, "main"]:
                pass
            case [user, name, "info", "lfs", "objects", "batch" as what]:
                name = name.removesuffix(".git")
            case _:
                return self.reply(404)
        match fault := self.fault(f"POST {what}"):
            case "drop":
                return None
            case (status, code):
                return self.reply_error(status, code)
        if self.token() not in (WRITER, READER):
            return self.reply_error(401, "", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.token() == READER or user != "user":
            return self.reply_error(403, "", {"X-Error-Message": f"You don't have the rights to write {user}/{name}"})
        repo = f"models/{user}/{name}"
        if what == "create":
            answer = {"url": f"{host.url}/{user}/{name}"}
            if repo in host.repos:
                return self.reply_json({"error": "You already created this model repo", **answer}, 409)
            assert asked.get("type", "model") == "model"
            host.created[f"{user}/{name}"] = asked.get("visibility") or {True: "private"}.get(asked.get("private"))
            host.publish(f"{user}/{name}", {".gitattributes": b""}, kind="models")
            if host.created[f"{user}/{name}"] == "private":
                host.private.add(repo)
            return None if fault == "lost" else self.reply_json(answer)
        if repo not in host.repos:
            return self.reply_error(404, "RepoNotFound")
        files = host.files(f"{user}/{name}")
        said = {"preupload": self.preupload, "batch": self.batch, "commit": self.commit}[what](body, files)
        return None if fault == "lost" else self.reply_json(said)

    def preupload(self, body: bytes, files: dict) -> dict:
        """Return how each file is to be uploaded, and the hash of the repository's file of this name."""
        answers = []
        for file in json.loads(body)["files"]:
            path, large = file["path"], file["path"].endswith(LARGE)
            found = {}
            if path in files:
                oid = hashlib.sha256(files[path]).hexdigest() if large else blob_id(files[path])
                found = {"oid": oid}
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **found})
        return {"files": answers}

    def batch(self, body: bytes, files: dict) -> dict:
        """Return where to upload large files that are not stored yet."""
        objects = []
        for file in json.loads(body)["objects"]:
            href = f"http://localhost:{self.server.server_port}/storage/{file['oid']}"
            wanted = file["oid"] not in self.server.stored
            objects.append(file | ({"actions": {"upload": {"href": href}}} if wanted else {}))
        return {"transfer": "basic", "objects": objects}

    def commit(self, body: bytes, files: dict) -> dict:
        user, name = self.path.split("/")[3:5]
        added = {}
        for line in body.decode().splitlines():
            match json.loads(line):
                case {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}:
                    added[path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": size}}:
                    added[path] = self.server.stored[oid]
                    assert (len(added[path]), hashlib.sha256(added[path]).hexdigest()) == (size, oid)
                case {"key": key}:
                    assert key == "header", line
        self.server.commits.append(added)
        oid = self.server.publish(f"{user}/{name}", {**files, **added}, kind="models")
        return {"commitUrl": f"{self.server.url}/{user}/{name}/commit/{oid}", "commitOid": oid}

    def do_PUT(self):
        """Large file storage."""
        body, oid = self.body(), self.path.rpartition("/")[2]
        match self.fault("PUT"):
            case "drop":
                return
            case (status, code):
                return self.reply_error(status, code)
        self.server.stored[oid] = body
        self.reply(200)

    # -----------------------------------------------------------------------------------------------------------------

    def fault(self, asked: str):
        """Record a request, and return its fault."""
        self.server.asked.append(asked)
        return next(self.server.faults.get(asked, iter(())), None)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply_json(self, facts, status=200):
        self.reply(status, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def reply_error(self, status, code, facts=None):
        self.reply(status, {"X-Error-Code": code, **(facts or {})})

    def reply(self, status, facts=None, body=b"", fault=None):
        total = len(body)
        if status == 200 and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status, body = 206, body[start:]
            facts = {**facts, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        self.send_response(status)
        for key, value in {**(facts or {}), "Content-Length": len(body)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if callable(fault):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            fault()
        else:
            self.wfile.write(body[:fault] if isinstance(fault, int) else body)

    def log_message(self, *_):
        pass


class Host(http.server.ThreadingHTTPServer):
    """A hub on this machine. A dataset and a model of one name are two repositories.

    Args:
        asked: the requests: `GET revision`, `GET tree/folder`, `HEAD path`, `GET path`, `GET model`, and those that
            write: `POST create`, `POST preupload`, `POST batch`, `PUT`, `POST commit`.
        faults: {request: iterator of faults}. `drop` closes the connection; (status, code) is the reply. For a request
            that reads: the number of bytes to send, other bytes, or a function to call in the middle. For a request
            that writes: `lost` does it without a reply.
        storage: the address of Xet storage for large files.
        private: models/user/name of repositories that need a token.
        created: {repository: visibility, None if the request does not set it}.
        stored, commits: {SHA-256: bytes} of the large file storage; the files of each commit.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.branches, self.faults, self.asked, self.storage = {}, {}, {}, [], None
        self.private, self.created, self.stored, self.commits = set(), {}, {}, []

    def publish(self, repo: str, files: dict, branch="main", commit: str | None = None, kind="datasets") -> str:
        """Make a commit of these files, {path: bytes}, on a branch, and return its hash."""
        commit = commit or hashlib.sha1(f"{repo} {branch} {sorted(files.items())}".encode()).hexdigest()
        self.repos.setdefault(f"{kind}/{repo}", {})[commit] = files
        self.branches.setdefault(f"{kind}/{repo}", {}).update({branch: commit, commit[:7]: commit})
        return commit

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the files of a model on its main branch."""
        return self.repos[f"models/{repo}"][self.branches[f"models/{repo}"]["main"]]

    def fetched(self) -> list[str]:
        """Return the dataset files whose content was requested, once per request."""
        return [
            what[4:] for what in self.asked if what.startswith("GET ") and what.endswith((".parquet", ".jsonl", ".gz"))
        ]

    def stop(self):
        self.shutdown()
        self.server_close()


def serving(monkeypatch, tmp_path):
    """Yield a hub that huggingface_hub uses in this process; hub_environment has the variables for other processes."""
    monkeypatch.setenv("no_proxy", "*")
    host = Host()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, host.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", host.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield host
    host.stop()
    thread.join()
    huggingface_hub.close_session()


def hub_environment(host, **more) -> dict[str, str]:
    home = {"HF_HOME": "home", "HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {"HF_ENDPOINT": host.url, "no_proxy": "*", "HF_HUB_OFFLINE": "0", **home, **more}
