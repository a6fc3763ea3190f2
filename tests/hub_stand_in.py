"""A stand-in for the Hugging Face hub: what its library asks for to upload and download, on the loopback address.

It knows repositories, commits, large files and access tokens, and keeps a record of everything that arrives. It can
answer slowly, with errors, or cut the connection before or after it has done what it was asked for.
"""

import base64
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standInSecret0123456789"
OWNER = "owner"
PREFIXES = {"datasets": "dataset", "spaces": "space", "models": "model"}


@dataclass
class Repo:
    """A repository: its files now, and those of every commit."""

    private: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0] if self.commits else "0" * 40

    def at(self, revision: str) -> dict[str, bytes] | None:
        """The files at a revision; None if there is no such revision."""
        if revision == "main":
            return self.files
        return next((files for commit, files in self.commits if commit == revision), None)


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        rate: Part of the requests that fail.
        slow: Part of the requests that are answered late.
        seconds: How late.
        kinds: How requests fail: a status, "cut" before anything is done, or "lost" when all is done.
        fails: Decides by method and path which requests always fail with 503; after ``rate``.
        status: Status given to every request that needs a token.
    """

    rate: float = 0.0
    slow: float = 0.0
    seconds: float = 0.02
    kinds: tuple[str, ...] = ("500", "503", "429", "cut", "lost")
    fails: Callable[[str, str], bool] = staticmethod(lambda method, path: False)
    status: int | None = None


class StandIn:
    """The stand-in, while it runs.

    Attributes:
        faults: What goes wrong; may be changed at any time.
        repos: The repositories by type and name.
        objects: Contents of large files by SHA-256.
        requests: Method and path of every request, in order.
        faulty: Number of requests that were made to fail.
        committed: Path and SHA-256 of every file of every commit, in order.
        acknowledged: Those of commits whose answer was sent.
        sent_again: Those that were committed although a commit of them had been answered.
        stored_again: Large files that were sent although they had been sent and answered.
        role: What the token may do: "write" or "read".
    """

    def __init__(self, faults: Faults | None = None, *, seed: int = 0) -> None:
        self.faults = faults or Faults()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faulty = 0
        self.committed: list[tuple[str, str]] = []
        self.acknowledged: list[tuple[str, str]] = []
        self.sent_again: list[tuple[str, str]] = []
        self.stored: set[str] = set()
        self.stored_again: list[str] = []
        self.role = "write"
        self.chance = random.Random(seed)
        self.lock = threading.RLock()
        self.address = ""

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file of the one repository."""
        assert len(self.repos) == 1, self.repos.keys()
        return {path: _sha256(content) for path, content in next(iter(self.repos.values())).files.items()}


@contextmanager
def running(faults: Faults | None = None, *, seed: int = 0) -> Iterator[StandIn]:
    """Serve a stand-in inside the block."""
    stand_in = StandIn(faults, seed=seed)
    handler = type("Handler", (_Handler,), {"hub": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    stand_in.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def used_by_this_process(stand_in: StandIn, cache: str) -> Iterator[None]:
    """Let the hub's library use the stand-in inside the block; its own short waits are left out."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    changed = {
        "ENDPOINT": stand_in.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": stand_in.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": cache,
        "HF_TOKEN_PATH": f"{cache}/token",
    }
    former = {name: getattr(constants, name) for name in changed}
    clock = _http.time
    try:
        for name, value in changed.items():
            setattr(constants, name, value)
        _http.time = SimpleNamespace(sleep=lambda seconds: None)  # type: ignore[assignment]
        yield
    finally:
        for name, value in former.items():
            setattr(constants, name, value)
        _http.time = clock


class _Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[StandIn]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        path = unquote(url.path)
        with hub.lock:
            hub.requests.append((self.command, path))
            fails, late = hub.chance.random() < hub.faults.rate, hub.chance.random() < hub.faults.slow
            kind = hub.chance.choice(hub.faults.kinds) if fails else ""
            if hub.faults.fails(self.command, path):
                kind = "503"
            hub.faulty += bool(kind)
        if late:
            time.sleep(hub.faults.seconds)
        try:
            if kind == "cut":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                raise _Cut
            body = self._body()
            if kind and kind != "lost":
                self._answer(int(kind), {"error": "injected"}, {"Retry-After": "0"} if kind == "429" else {})
                return
            status, content, headers, answered = self._do(path, parse_qs(url.query), body)
            if kind == "lost":
                raise _Cut
            # Before the answer: the client may act on it before this thread goes on.
            answered()
            self._answer(status, content, headers)
        except (_Cut, ConnectionError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        length = headers.pop("Content-Length", str(len(data)))
        for name, value in {"Content-Type": "application/json", "Content-Length": length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _do(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str], Any]:
        """Status, content and headers of the answer, and what to note once it is given."""
        hub = self.hub
        note: list[Callable[[], None]] = []
        with hub.lock:
            status, content, headers = self._route(path, body, note)

        def answered() -> None:
            with hub.lock:
                for one in note:
                    one()

        return status, content, headers, answered

    def _route(self, path: str, body: bytes, note: list[Callable[[], None]]) -> tuple[int, Any, dict[str, str]]:
        hub = self.hub
        if path.startswith("/objects/"):
            return self._store(path.removeprefix("/objects/"), body, note)
        if hub.faults.status is not None:
            return hub.faults.status, {"error": "no"}, {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}, {}
        if path == "/api/whoami-v2":
            account = {"type": "user", "name": OWNER, "orgs": [{"name": "group"}]}
            return 200, {**account, "auth": {"accessToken": {"role": hub.role}}}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if "/resolve/" in path:
            return self._download(path)
        parts = path.strip("/").split("/")
        if len(parts) < 4 or parts[0] != "api" or parts[1] not in PREFIXES:
            return 404, {"error": "unknown address"}, {}
        repo = hub.repos.get((PREFIXES[parts[1]], f"{parts[2]}/{parts[3]}"))
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self._of_repo(repo, parts[4:], f"{parts[2]}/{parts[3]}", body, note)

    def _of_repo(
        self, repo: Repo, what: list[str], name: str, body: bytes, note: list[Callable[[], None]]
    ) -> tuple[int, Any, dict[str, str]]:
        if not what or what[0] == "revision":
            if what and repo.at(what[1]) is None:
                return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
            sha = what[1] if what and len(what[1]) == 40 else repo.head
            siblings = [{"rfilename": path} for path in repo.files]
            return 200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}, {}
        if what[0] == "auth-check":
            return (403, {"error": "no"}, {}) if self.hub.role == "read" else (200, {}, {})
        if what[0] == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [self._mode(repo, one["path"], one["size"]) for one in asked]}, {}
        if what[0] == "commit":
            return self._commit(repo, name, body, note)
        if what[0] == "paths-info":
            paths = parse_qs(body.decode())["paths"]
            return 200, [self._facts(repo, path) for path in paths if path in repo.files], {}
        if what[0] == "tree":
            return 200, [self._facts(repo, path) for path in repo.files], {}
        return 404, {"error": "unknown address"}, {}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        owner = asked.get("organization") or OWNER
        name = (asked.get("type") or "model", f"{owner}/{asked['name']}")
        address = {"url": f"{self.hub.address}/{name[1]}"}
        if name in self.hub.repos:
            return 409, {"error": "You already created this repo", **address}, {}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private=private)
        return 200, {**address, "name": name[1]}, {}

    def _mode(self, repo: Repo, path: str, size: int) -> dict[str, Any]:
        # The library commits empty files in the commit itself, whatever the hub says.
        mode = _mode_of(path) if size else "regular"
        content = repo.files.get(path)
        oid = None if content is None else _sha256(content) if mode == "lfs" else _git_hash(content)
        return {"path": path, "uploadMode": mode, "shouldIgnore": path.endswith(".ignored"), "oid": oid}

    def _facts(self, repo: Repo, path: str) -> dict[str, Any]:
        content = repo.files[path]
        facts = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
        large = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
        return {**facts, "lfs": large} if _mode_of(path) == "lfs" else facts

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        answer = []
        for one in asked["objects"]:
            facts = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                facts["actions"] = {"upload": {"href": f"{self.hub.address}/objects/{one['oid']}?signature=sealed"}}
            answer.append(facts)
        return 200, {"transfer": "basic", "objects": answer}, {}

    def _store(self, oid: str, body: bytes, note: list[Callable[[], None]]) -> tuple[int, Any, dict[str, str]]:
        hub = self.hub
        if _sha256(body) != oid:
            return 400, {"error": "the content is not what was promised"}, {}
        if oid in hub.stored:
            hub.stored_again.append(oid)
        hub.objects[oid] = body
        note.append(lambda: hub.stored.add(oid))
        return 200, {}, {}

    def _commit(
        self, repo: Repo, name: str, body: bytes, note: list[Callable[[], None]]
    ) -> tuple[int, Any, dict[str, str]]:
        hub = self.hub
        new: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in hub.objects:
                    return 422, {"error": "a large file has not been uploaded"}, {}
                new[value["path"]] = hub.objects[value["oid"]]
        for path, content in new.items():
            facts = (path, _sha256(content))
            hub.committed.append(facts)
            if facts in hub.acknowledged:
                hub.sent_again.append(facts)
            note.append(lambda facts=facts: hub.acknowledged.append(facts))
        repo.files = {**repo.files, **new}
        commit = hashlib.sha1(f"{len(repo.commits)}".encode() + body).hexdigest()
        repo.commits.append((commit, repo.files))
        return 200, {"commitUrl": f"{hub.address}/{name}/commit/{commit}", "commitOid": commit}, {}

    def _download(self, path: str) -> tuple[int, Any, dict[str, str]]:
        name, _, rest = path.strip("/").partition("/resolve/")
        first = name.split("/")[0]
        kind = PREFIXES.get(first, "model")
        repo = self.hub.repos.get((kind, name.removeprefix(f"{first}/") if first in PREFIXES else name))
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        revision, _, file = rest.partition("/")
        content = (repo.at(revision) or {}).get(file)
        if content is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.head}
        commit = repo.head if revision == "main" else revision
        headers = {"ETag": f'"{_sha256(content)}"', "X-Repo-Commit": commit, "Content-Length": str(len(content))}
        return 200, content, headers


def _mode_of(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".bin", ".pt")) else "regular"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
