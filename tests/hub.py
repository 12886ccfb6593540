"""A small Hugging Face hub on loopback, for the real clients of models, data sets and uploads.

    with Hub() as hub:
        hub.add("models", "org/tiny", folder)       # a commit on main
        subprocess.run(..., env={**os.environ, **hub.env(home)})

It serves what ``huggingface_hub``, transformers, datasets and PEFT ask for: information, lists of
files, files (whole or from a byte on), and commits with their uploads. Repositories may be private
or gated; statuses and headers are those of huggingface.co. Xet is not served.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".parquet", ".png")  # endings of the files that are uploaded as LFS
REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: its commits, and the commit of each branch.

    Attributes:
        private: only accounts of its owner may see it.
        gated: only accounts in ``members``, and those of its owner, may read its files.
        commits: the files of each commit.
        branches: the commit of each branch.
        titles: the summaries of the commits, in order.
    """

    private: bool = False
    gated: bool = False
    members: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], branch: str, title: str) -> str:
        """Adds a commit that holds ``files``; returns its number."""
        text = repr((len(self.titles), title, sorted(files)))
        number = hashlib.sha1(text.encode()).hexdigest()
        self.commits[number] = dict(files)
        self.branches[branch] = number
        self.titles.append(title)
        return number

    def find(self, revision: str) -> str | None:
        """The commit of a revision: a branch, or the commit itself."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The hub, which serves from its beginning to its end.

    Attributes:
        repos: (kind, name) -> repository; the kind is ``models`` or ``datasets``.
        accounts: token -> (name of the account, its role: ``read`` or ``write``). An account owns
            the repositories of the organization ``org``.
        asked: method, path and range of every request, in order.
        breaks: for each of the next downloads of a large file, the number of bytes after which it
            breaks off, and whether the connection is reset; the client gives up after a reset.
        silent: whether requests get no answer, as without a network.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.accounts = {"hf_writer": ("ada", "write"), "hf_reader": ("ben", "read")}
        self.asked: list[tuple[str, str, str | None]] = []
        self.breaks: list[tuple[int, bool]] = []
        self.silent = False
        self.uploads: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a client without a token, whose cache lies in ``home``."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_TOKEN": ""}
        return {**own, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def files(self, kind: str, name: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        repo = self.repos[kind, name]
        return repo.commits[repo.branches[branch]]

    def add(
        self, kind: str, name: str, files: Path | Mapping[str, bytes], branch: str = "main", **how
    ) -> str:
        """Commits files to a repository, which is made if it is new; returns the commit.

        Args:
            kind: ``models`` or ``datasets``.
            name: its name, such as ``org/name``.
            files: a folder, or path -> content.
            branch: the branch.
            **how: ``private``, ``gated`` or ``members`` of a new repository.
        """
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repo = self.repos.setdefault((kind, name), Repo(**how))
        return repo.commit(files, branch, "a commit")


class _Answer(Exception):
    """An answer that ends a request, such as a refusal."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.body, self.headers = status, body, headers


def _refusal(status: int, code: str | None, message: str) -> _Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return _Answer(status, {"error": message}, **headers)


class _Handler(BaseHTTPRequestHandler):
    """One connection. ``routes`` maps methods and patterns of paths to the methods below."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        self.hub: Hub = self.server.hub
        if self.hub.silent:
            self.close_connection = True
            return None
        path, self.query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        self.sent = self._content()
        try:
            for methods, pattern, act in self.routes:
                if self.command in methods and (found := re.fullmatch(pattern, path)):
                    return self._send(*act(self, *found.groups()))
            raise _refusal(404, None, "Not Found")
        except _Answer as answer:
            self._send(answer.status, answer.body, answer.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks and body is content and len(content) > self.hub.breaks[0][0]:
            size, reset = self.hub.breaks.pop(0)
            self.wfile.write(content[:size])
            if reset:
                now = struct.pack("ii", 1, 0)  # close() then resets the connection
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
                socket.close(self.connection.detach())
            self.close_connection = True
            return
        self.wfile.write(content)

    # Who asks, and what an account may do

    def _account(self) -> tuple[str, str] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise _refusal(401, None, "Invalid credentials in Authorization header")
        return self.hub.accounts.get(token)

    def _repo(self, kind: str, name: str, *, files: bool = False, writes: bool = False) -> Repo:
        account = self._account()
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not account):
            if account is None:
                raise _refusal(401, "RepoNotFound", "Invalid username or password.")
            raise _refusal(404, "RepoNotFound", "Repository not found")
        if files and repo.gated and (not account or account[0] not in repo.members):
            text = f"Access to {kind[:-1]} {name} is restricted"
            if account is None:
                text += ". You must have access to it and be authenticated to access it."
                raise _refusal(401, "GatedRepo", f"{text} Please log in.")
            raise _refusal(403, "GatedRepo", f"{text} and you are not in the authorized list.")
        if writes and (account is None or account[1] != "write"):
            raise _refusal(403, None, "Forbidden: pass a token with write access")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        if (found := repo.find(revision)) is None:
            raise _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # Reading

    def whoami(self):
        account = self._account()
        if account is None:
            raise _refusal(401, None, "Invalid username or password.")
        name, role = account
        token = {"displayName": "a token", "role": role}
        about = {"type": "user", "name": name, "orgs": [{"type": "org", "name": "org"}]}
        return 200, {**about, "auth": {"type": "access_token", "accessToken": token}}

    def info(self, kind, name, revision="main"):
        repo = self._repo(kind, name)
        number = self._commit(repo, revision or "main")
        files = [{"rfilename": path} for path in sorted(repo.commits[number])]
        state = {"private": repo.private, "gated": "auto" if repo.gated else False}
        return 200, {"id": name, "sha": number, "siblings": files, "tags": [], **state}

    def tree(self, kind, name, revision, path):
        repo = self._repo(kind, name)
        files = repo.commits[self._commit(repo, revision)]
        inside = f"{path}/" if path else ""
        below = [each for each in files if each.startswith(inside)]
        if not below:
            raise _refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        everything = parse_qs(self.query).get("recursive", [""])[0].lower() == "true"
        found: dict[str, Any] = {}
        for each in sorted(below):
            parts = each[len(inside) :].split("/")
            for depth in range(1, len(parts)):
                folder = inside + "/".join(parts[:depth])
                if everything or depth == 1:
                    found[folder] = _entry(folder, None)
            if everything or len(parts) == 1:
                found[each] = _entry(each, files[each])
        return 200, list(found.values())

    def paths_info(self, kind, name, revision):
        repo = self._repo(kind, name)
        files = repo.commits[self._commit(repo, revision)]
        if self.headers["Content-Type"].startswith("application/json"):
            asked = json.loads(self.sent)["paths"]
        else:
            asked = parse_qs(self.sent.decode()).get("paths", [])
        found = [_entry(path, files[path]) for path in asked if path in files]
        folders = [p for p in asked if any(each.startswith(f"{p}/") for each in files)]
        return 200, [*found, *(_entry(path, None) for path in folders)]

    def resolve(self, kind, name, revision, path):
        kind = (kind or "models/").rstrip("/")
        repo = self._repo(kind, name, files=True)
        number = self._commit(repo, revision)
        headers = {"X-Repo-Commit": number, "Accept-Ranges": "bytes"}
        if (content := repo.commits[number].get(path)) is None:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            raise _Answer(404, b"", **headers, **message)
        headers["ETag"] = f'"{_oid(path, content)}"'
        if path.endswith(LARGE):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not start:
            return 200, content, headers
        first, size = int(start[1]), len(content)
        headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        return 206, content[first:], headers

    # Writing

    def create(self):
        asked = json.loads(self.sent)
        account = self._account()
        if account is None:
            raise _refusal(401, None, "Invalid username or password.")
        owner = asked.get("organization") or account[0]
        if account[1] != "write" or owner not in (account[0], "org"):
            text = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise _refusal(403, None, text)
        key = (f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}")
        url = f"{self.hub.address}/{key[1]}"
        if key in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.hub.repos[key] = Repo(private=private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main", "initial commit")
        return 200, {"url": url, "name": key[1], "id": key[1], "private": private}

    def validate(self):
        head = yaml.safe_load(json.loads(self.sent)["content"].split("---")[1])
        base = head.get("base_model")
        if base is None or re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return 200, {"errors": [], "warnings": []}
        return 400, {"errors": [{"message": '"base_model" is no name'}], "warnings": []}

    def branch(self, kind, name, branch):
        repo = self._repo(kind, name, writes=True)
        if branch in repo.branches:
            return 409, {"error": f"Reference already exists: {branch}"}
        repo.branches[branch] = repo.branches["main"]
        return 200, {}

    def preupload(self, kind, name, revision):
        repo = self._repo(kind, name, writes=True)
        self._commit(repo, revision)
        paths = [file["path"] for file in json.loads(self.sent)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        told = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]
        return 200, {"files": told}

    def batch(self, kind, name):
        self._repo((kind or "models/").rstrip("/"), name, writes=True)
        told = []
        for each in json.loads(self.sent)["objects"]:
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}
            told.append(each if each["oid"] in self.hub.uploads else {**each, "actions": upload})
        return 200, {"transfer": "basic", "objects": told}

    def upload(self, oid):
        if hashlib.sha256(self.sent).hexdigest() != oid:
            return 400, {"error": "the content has another SHA-256"}
        self.hub.uploads[oid] = self.sent
        return 200, b""

    def commit(self, kind, name, revision):
        repo = self._repo(kind, name, writes=True)
        files = dict(repo.commits[self._commit(repo, revision)])
        title = ""
        for line in self.sent.splitlines():
            key, value = (step := json.loads(line))["key"], step["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                raise _refusal(400, None, f"this hub has no operation '{key}'")
        number = repo.commit(files, revision, title)
        url = f"{self.hub.address}/{name}/commit/{number}"
        return 200, {"success": True, "commitOid": number, "commitUrl": url}

    routes = (
        (("GET",), r"/api/whoami-v2", whoami),
        (("GET",), REPO, info),
        (("GET",), REPO + r"/revision/(.+)", info),
        (("GET",), REPO + r"/tree/([^/]+)/?(.*)", tree),
        (("POST",), REPO + r"/paths-info/(.+)", paths_info),
        (("GET", "HEAD"), r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
        (("POST",), r"/api/repos/create", create),
        (("POST",), r"/api/validate-yaml", validate),
        (("POST",), REPO + r"/branch/(.+)", branch),
        (("POST",), REPO + r"/preupload/(.+)", preupload),
        (("POST",), r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        (("PUT",), r"/lfs/([0-9a-f]{64})", upload),
        (("POST",), REPO + r"/commit/(.+)", commit),
    )


def _oid(path: str, content: bytes) -> str:
    """The identity of a file: its SHA-256 if it is large, else that of git."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes | None) -> dict[str, Any]:
    """A file, or a folder (no content), in a list of files."""
    if content is None:
        return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
    found = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if path.endswith(LARGE):
        found["oid"] = hashlib.sha1(content).hexdigest()
        found["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
    return found
