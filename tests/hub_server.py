"""
A Hub on loopback: the HTTP interface that the real client of `huggingface_hub` meets, in memory.

It knows accounts by their tokens, repositories with branches and commits, preupload, the LFS protocol, resolve with
ETags and a redirect to the storage, and the check of a card's metadata. [`HubServer.fail`] injects failures.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


# Token -> may it write?
TOKENS = {"hf_writer": True, "hf_reader": False}
USER = "me"
LFS_SUFFIXES = (".safetensors", ".bin")


def digest(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """
    Attributes:
        branches (`dict[str, str]`): branch -> id of its last commit.
        commits (`dict[str, dict[str, bytes]]`): id -> the files of that commit.
        messages (`list[str]`): of all commits.
    """

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(f"{len(self.messages)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Failure:
    """`times` requests that fit are answered with `status`, or with none: the connection is cut."""

    method: str
    path: str
    status: int | None
    times: int


class HubServer:
    """
    The server, running as long as the `with` block.

    Attributes:
        url (`str`): for `HF_ENDPOINT`.
        repositories (`dict[str, Repository]`): by `"user/name"`.
        blobs (`dict[str, bytes]`): what LFS stores, by SHA-256.
        log (`list[tuple[str, str, int | None]]`): method, path and status of every request; None where it was cut.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int | None]] = []
        self.failures: list[Failure] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(Request):
            server_state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int | None, times: int = 1) -> None:
        """Lets the next requests whose method and path (a regular expression) fit fail; `None` cuts the connection."""
        self.failures.append(Failure(method, path, status, times))

    def count(self, method: str, path: str) -> int:
        """Number of requests, failed ones included."""
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.log)

    def failure(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and failure.method == method and re.search(failure.path, path):
                    failure.times -= 1
                    return failure
        return None


Answer = tuple[int, Any, dict[str, str]]


def not_found(what: str) -> Answer:
    return 404, {"error": f"{what} not found"}, {"X-Error-Code": what, "X-Error-Message": f"{what} not found"}


class Request(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        hub = self.server_state
        url = urlsplit(self.path)
        failure = hub.failure(self.command, url.path)
        if failure is not None and failure.status is None:
            hub.log.append((self.command, url.path, None))
            # Half of the body is read, and then no answer comes.
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.body()
        if failure is not None:
            assert failure.status is not None
            status, content, headers = failure.status, {"error": "A commit has happened since."}, {}
        else:
            with hub.lock:
                status, content, headers = self.answer(unquote(url.path), body)
        hub.log.append((self.command, url.path, status))
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def refusal(self) -> Answer | None:
        """What those get who may not write."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            return 401, {"error": "Invalid username or password."}, {}
        return None if TOKENS[token] else (403, {"error": "You don't have the rights to do so."}, {})

    def answer(self, path: str, body: bytes) -> Answer:
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/validate-yaml", self.validate),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self.store),
            ("POST", r"/lfs/([0-9a-f]{64})/verify", self.verify),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", self.tree),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            ("GET|HEAD", r"/storage/([0-9a-f]{64})", self.storage),
        ]
        for methods, pattern, route in routes:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split("|"):
                return route(body, *found.groups())
        return not_found("EntryNotFound")

    def whoami(self, body: bytes) -> Answer:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            return 401, {"error": "Invalid username or password."}, {}
        return 200, {"name": USER, "type": "user", "orgs": []}, {}

    def validate(self, body: bytes) -> Answer:
        """The checks of the Hub that a card of ours could fail."""
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else None
        errors = [] if isinstance(metadata, dict) else ["there is no metadata"]
        for result in [entry for model in (metadata or {}).get("model-index", []) for entry in model["results"]]:
            errors += [f"result without {key}" for key in ("task", "dataset", "metrics") if not result.get(key)]
            for metric in result["metrics"]:
                errors += [f"metric without {key}" for key in ("type", "value") if key not in metric]
            errors += [] if result["dataset"].get("name") else ["dataset without name"]
        base = (metadata or {}).get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            errors.append(f"base_model {base!r} is no repository")
        return (400, "\n".join(errors).encode(), {}) if errors else (200, {"errors": [], "warnings": []}, {})

    def create(self, body: bytes) -> Answer:
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        about = {"url": f"{self.server_state.url}/{name}", "name": name, "id": name}
        if name in self.server_state.repositories:
            return 409, {"error": "You already created this model repo", **about}, {}
        repository = self.server_state.repositories[name] = Repository()
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, about, {}

    def branch(self, body: bytes, name: str, branch: str) -> Answer:
        repository = self.server_state.repositories.get(name)
        refusal = self.refusal() or (not_found("RepoNotFound") if repository is None else None)
        if refusal is not None or repository is None:
            return refusal or not_found("RepoNotFound")
        if branch in repository.branches:
            return 409, {"error": "Reference already exists"}, {}
        repository.branches[branch] = repository.branches["main"]
        return 200, {}, {}

    def found(self, name: str, revision: str | None) -> Repository | Answer:
        repository = self.server_state.repositories.get(name)
        if repository is None:
            return not_found("RepoNotFound")
        revision = revision or "main"
        known = revision in repository.branches or revision in repository.commits
        return repository if known else not_found("RevisionNotFound")

    def preupload(self, body: bytes, name: str, revision: str) -> Answer:
        repository = self.refusal() or self.found(name, revision)
        if not isinstance(repository, Repository):
            return repository
        files = repository.files(revision)

        def about(path: str) -> dict[str, Any]:
            is_large = path.endswith(LFS_SUFFIXES)
            content = files.get(path)
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if is_large else digest(content)
            return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

        return 200, {"files": [about(file["path"]) for file in json.loads(body)["files"]]}, {}

    def batch(self, body: bytes, name: str) -> Answer:
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        objects = []
        for asked in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server_state.blobs:
                href = f"{self.server_state.url}/lfs/{asked['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def store(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content does not have this SHA-256"}, {}
        self.server_state.blobs[oid] = body
        return 200, {}, {}

    def verify(self, body: bytes, oid: str) -> Answer:
        size = json.loads(body)["size"]
        is_there = len(self.server_state.blobs.get(oid, b"")) == size
        return (200, {}, {}) if is_there else (404, {"error": "the object is not there"}, {})

    def commit(self, body: bytes, name: str, branch: str) -> Answer:
        repository = self.refusal() or self.found(name, branch)
        if not isinstance(repository, Repository):
            return repository
        files, message = dict(repository.files(branch)), ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
                    return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server_state.blobs:
                    return 400, {"error": f"LFS object {value['oid']} was not uploaded"}, {}
                files[value["path"]] = self.server_state.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        sha = repository.commit(branch, files, message)
        url = f"{self.server_state.url}/{name}/commit/{sha}"
        return 200, {"success": True, "commitOid": sha, "commitUrl": url}, {}

    def tree(self, body: bytes, name: str, revision: str) -> Answer:
        repository = self.found(name, revision)
        if not isinstance(repository, Repository):
            return repository
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
            for path, content in repository.files(revision).items()
        ]
        return 200, entries, {}

    def info(self, body: bytes, name: str, revision: str | None = None) -> Answer:
        repository = self.found(name, revision)
        if not isinstance(repository, Repository):
            return repository
        revision = revision or "main"
        siblings = [{"rfilename": path} for path in repository.files(revision)]
        sha = repository.branches.get(revision, revision)
        about = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False}
        return 200, about, {}

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> Answer:
        repository = self.found(name, revision)
        if not isinstance(repository, Repository):
            return repository
        content = repository.files(revision).get(path)
        if content is None:
            return not_found("EntryNotFound")
        headers = {"X-Repo-Commit": repository.branches.get(revision, revision)}
        if not path.endswith(LFS_SUFFIXES):
            return 200, content, {**headers, "ETag": f'"{digest(content)}"'}
        oid = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        # Another host name: the client must not follow it for the metadata, nor send its token there.
        port = self.server_state.server.server_address[1]
        return 302, b"", {**headers, "Location": f"http://localhost:{port}/storage/{oid}"}

    def storage(self, body: bytes, oid: str) -> Answer:
        return 200, self.server_state.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
