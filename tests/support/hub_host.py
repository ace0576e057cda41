"""A server in this process that replies to huggingface_hub as the Hugging Face hub does, for the fixture `host`."""

import base64
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

WRITER, READER = "hf_writer", "hf_reader"  # tokens


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        host, revision = self.server, "main"
        match [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]:
            case ["api", "models" as kind, user, name]:
                what = "model"
            case ["api", "models" | "datasets" as kind, user, name, "revision", revision]:
                what = "revision"
            case ["api", "models" | "datasets" as kind, user, name, "tree", revision]:
                what = "tree"
            case ["datasets" as kind, user, name, "resolve", revision, *path]:
                what = "/".join(path)
            case [user, name, "resolve", revision, *path]:
                what, kind = "/".join(path), "models"
            case _:
                return self.reply(404)
        repo = f"{kind}/{user}/{name}"
        fault = self.fault(f"{self.command} {what}")
        if fault and not callable(fault):
            return self.fail(fault)
        if repo not in host.repos:
            return self.reply(401, {"X-Error-Code": "RepoNotFound"})
        commit = host.branches[repo].get(revision, revision)
        if commit not in host.repos[repo]:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        files = host.repos[repo][commit]
        if what in ("revision", "model"):
            facts = {"id": f"{user}/{name}", "sha": commit, "private": repo in host.private}
            return self.reply_json({**facts, "cardData": host.cards.get(f"{user}/{name}")})
        if what == "tree":
            tree = [{"type": "directory", "path": "folder", "oid": "0" * 40}]
            for path, body in files.items():
                sha256 = hashlib.sha256(body).hexdigest()
                lfs = {"oid": sha256, "size": len(body), "pointerSize": 134}
                tree.append({"type": "file", "path": path, "size": len(body), "oid": sha256[:40], "lfs": lfs})
            return self.reply_json(tree)
        if what not in files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        facts = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(files[what]).hexdigest()}"'}
        return self.reply(200, facts, files[what], fault)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        """Requests that write to the models of `user`, with WRITER as the token."""
        host, body = self.server, self.body()
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["api", "validate-yaml"]:
                return self.reply_json({"errors": [], "warnings": []})
            case ["api", "repos", "create" as what]:
                asked = json.loads(body)
                user, name = asked["organization"], asked["name"]
            case ["api", "models", user, name, "preupload" | "commit" as what, "main"]:
                pass
        if fault := self.fault(f"POST {what}"):
            return self.fail(fault)
        if self.headers.get("Authorization") != f"Bearer {WRITER}" or user != "user":
            return self.reply(403, {"X-Error-Message": f"You don't have the rights to write {user}/{name}"})
        repo = f"{user}/{name}"
        if what == "create":
            answer = {"url": f"{host.url}/{repo}"}
            if f"models/{repo}" in host.repos:
                return self.reply_json({"error": "You already created this model repo", **answer}, 409)
            host.created[repo] = asked.get("visibility")
            host.publish(repo, {".gitattributes": b""}, kind="models")
            host.private |= {f"models/{repo}"} if asked.get("visibility") == "private" else set()
            return self.reply_json(answer)
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.reply_json(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
            )
        lines = [json.loads(line) for line in body.decode().splitlines()]
        added = [line["value"] for line in lines if line["key"] == "file"]
        host.commits.append({file["path"]: base64.b64decode(file["content"]) for file in added})
        oid = host.publish(repo, {**host.files(repo), **host.commits[-1]}, kind="models")
        return self.reply_json({"commitUrl": f"{host.url}/{repo}/commit/{oid}", "commitOid": oid})

    # -----------------------------------------------------------------------------------------------------------------

    def fault(self, asked: str):
        """Record a request, and return its fault."""
        self.server.asked.append(asked)
        return next(self.server.faults.get(asked, iter(())), None)

    def fail(self, fault):
        if fault != "drop":
            status, code = fault
            self.reply(status, {"X-Error-Code": code})

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

    def reply(self, status, facts=None, body=b"", interrupt=None):
        self.send_response(status)
        for key, value in {**(facts or {}), "Content-Length": len(body)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            half = len(body) // 2
            self.wfile.write(body[:half])
            if interrupt:
                self.wfile.flush()
                interrupt()
            self.wfile.write(body[half:])

    def log_message(self, *_):
        pass


class Host(http.server.ThreadingHTTPServer):
    """A hub on this machine. A dataset and a model of one name are two repositories.

    Args:
        asked: the requests: `GET revision`, `GET tree`, `HEAD path`, `GET path`, `GET model`, and those that write:
            `POST create`, `POST preupload`, `POST commit`.
        faults: {request: iterator of faults}. `drop` closes the connection; (status, code) is the reply; a function is
            called in the middle of a file.
        private: models/user/name of private repositories.
        created: {repository: visibility, None if the request does not set it}.
        commits: the files of each commit.
        cards: {user/name: YAML of the dataset's card}.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.branches, self.faults, self.asked = {}, {}, {}, []
        self.private, self.created, self.commits, self.cards = set(), {}, [], {}

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
        """Return the files whose content was requested, once per request."""
        return [what[4:] for what in self.asked if what.startswith("GET ") and "." in what]

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
