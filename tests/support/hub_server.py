"""A stand-in for the Hub: an HTTP server on the loopback to which the real client of ``huggingface_hub`` talks.

It speaks what creating, uploading to, describing and downloading from model repositories needs, without xet. Large
files live under another host name, as on the Hub, where the token must not go.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_cards import card_problems
from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_the_right_one"
USER = "tester"


@dataclass
class File:
    """A file of a repository; ``oid`` is what the client compares its own copies with."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else git_hash(self.content)


@dataclass
class Repo:
    """A repository: its commits, the newest last, each with all files."""

    private: bool = False
    commits: list[tuple[str, dict[str, File]]] = field(default_factory=lambda: [(_commit_id(0), {})])

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, File]:
        return self.commits[-1][1]

    def commit(self, files: dict[str, File]) -> None:
        self.commits.append((_commit_id(len(self.commits)), files))


class Refused(Exception):
    """An answer other than the one hoped for."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer(ThreadingHTTPServer):
    """The Hub, with its state in memory; a context manager that serves from a thread."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}/storage"
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []  # method and path

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none of the server's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, headers, content = self._answer(path)
        except Refused as refused:
            status, content = refused.status, json.dumps({"error": refused.message}).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for methods, pattern, answer in _ROUTES:
            if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                return answer(self, **match.groupdict())
        raise Refused(404, message=f"the stand-in has no {self.command} {path}")

    # What each endpoint does.

    def whoami(self) -> tuple:
        self._check_token(write=True)
        return _json({"type": "user", "name": USER, "orgs": []})

    def create(self) -> tuple:
        self._check_token(write=True)
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if name in self.server.repos else 200
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repos.setdefault(name, Repo(bool(private)))
        return _json({"url": f"{self.server.url}/{name}", "id": name}, status)

    def info(self, name: str, revision: str = "main") -> tuple:
        repo = self._repo(name)
        commit, files = _at(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        return _json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str | None) -> tuple:
        _, files = _at(self._repo(name), revision)
        inside = {path: file for path, file in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return _json([{"type": "file", "path": p, "size": len(f.content), "oid": f.oid} for p, f in inside.items()])

    def refs(self, name: str) -> tuple:
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": self._repo(name).head}
        return _json({"branches": [branch], "converts": [], "tags": []})

    def validate(self) -> tuple:
        problems = card_problems(json.loads(self.body)["content"])
        status = 400 if problems else 200
        if self.headers.get("Accept") == "text/plain":
            return status, {"Content-Type": "text/plain"}, "\n".join(problems).encode()
        return _json({"errors": [{"message": problem} for problem in problems], "warnings": []}, status)

    def preupload(self, name: str, revision: str) -> tuple:
        files = self._repo(name, write=True).files
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].oid if file["path"] in files else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return _json({"files": modes})

    def batch(self, name: str) -> tuple:
        self._repo(name, write=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.storage:
                verify = f"{self.server.url}/{name}.git/info/lfs/objects/verify"
                upload = f"{self.server.storage_url}/{entry['oid']}"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return _json({"transfer": "basic", "objects": objects})

    def verify(self, name: str) -> tuple:
        self._repo(name, write=True)
        stated = json.loads(self.body)
        if len(self.server.storage.get(stated["oid"], b"")) != stated["size"]:
            raise Refused(404, message=f"{stated['oid']} was not uploaded")
        return _json({})

    def store(self, oid: str) -> tuple:
        self._check_no_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="the content has another hash")
        self.server.storage[oid] = self.body
        return _json({})

    def fetch(self, oid: str) -> tuple:
        self._check_no_token()
        return 200, {"ETag": f'"{oid}"'}, self.server.storage[oid]

    def commit(self, name: str, revision: str) -> tuple:
        repo = self._repo(name, write=True)
        files = dict(repo.files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and value["oid"] in self.server.storage:
                files[value["path"]] = File(self.server.storage[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise Refused(400, message=f"cannot commit {value}")
        repo.commit(files)
        url = f"{self.server.url}/{name}/commit/{repo.head}"
        return _json({"commitUrl": url, "commitOid": repo.head})

    def resolve(self, name: str, revision: str, path: str) -> tuple:
        commit, files = _at(self._repo(name), revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        file = files[path]
        if not file.lfs:
            return 200, {**headers, "ETag": f'"{file.oid}"'}, file.content
        headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        return 302, {**headers, "Location": f"{self.server.storage_url}/{file.oid}"}, b""

    def _repo(self, name: str, write: bool = False) -> Repo:
        known = self._check_token(write)
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        return repo

    def _check_token(self, write: bool = False) -> bool:
        """Whether the client has a token; a wrong one is refused, and so is none where there is something to write."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}") or (write and given is None):
            raise Refused(401, message="Invalid credentials in Authorization header")
        return given is not None

    def _check_no_token(self) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, message="the token was sent to the storage, which is another host")


_NAME = r"(?P<name>[^/]+/[^/]+?)"
_ROUTES: list[tuple[str, str, Callable[..., tuple]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", _Handler.verify),
    ("PUT", r"/storage/(?P<oid>\w+)", _Handler.store),
    ("GET HEAD", r"/storage/(?P<oid>\w+)", _Handler.fetch),
    ("GET HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


def _at(repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
    for commit, files in repo.commits:
        if revision in (commit, "main") and (revision != "main" or commit == repo.head):
            return commit, files
    raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")


def _json(content: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _commit_id(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()
