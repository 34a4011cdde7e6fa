"""A hub of a test's own, on a free port of 127.0.0.1: the part of the real one's API that a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCH = "main"


@dataclass
class FakeHub:
    """repositories: files by path. What it does wrong is set on it."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    corrupt: str | None = None  # a file that is sent with another content than its hash
    cut_after: dict[str, int] = field(default_factory=dict)  # files that end after so many bytes of an answer
    cuts: int = 0  # how many answers are cut
    gated: bool = False
    broken: bool = False
    elsewhere: str = ""  # another server that has the weights
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    authorized: list[str | None] = field(default_factory=list)  # each with this
    url: str = ""

    def answer(self, method: str, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes, int]:
        """(status, headers, body, how many bytes of it to send)."""
        self.asked.append((method, path, wanted))
        parts = urlsplit(path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            del parts[:2]
        name, rest = "/".join(parts[:2]), parts[2:]
        if self.broken:
            return 503, {}, b"{}", 2
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}", 2
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}", 2
        revision = unquote(rest[1]) if len(rest) > 1 else BRANCH
        if revision not in (COMMIT, BRANCH):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}", 2
        if api:
            body = json.dumps(self._info(name)).encode()
            return 200, {"Content-Type": "application/json"}, body, len(body)
        file = unquote("/".join(rest[2:]))
        if self.elsewhere and file.endswith(".safetensors"):
            return 302, {"Location": self.elsewhere + path}, b"", 0
        return self._file(name, file, wanted)

    def _file(self, repository: str, file: str, wanted: str | None) -> tuple[int, dict[str, str], bytes, int]:
        content = self.repositories[repository].get(file)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"", 0
        headers = {"ETag": f'"{_digest(file, content)}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        if file == self.corrupt:
            content = bytes(byte ^ 1 for byte in content)
        status = 200
        if wanted:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        sent = len(content)
        if self.cuts and file in self.cut_after:
            self.cuts -= 1
            sent = self.cut_after[file]
        return status, headers, content, sent

    def _info(self, name: str) -> dict[str, Any]:
        siblings = []
        for file, content in self.repositories[name].items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": _git(content)}
            if file.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


@contextmanager
def served(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.authorized.append(self.headers.get("Authorization"))
            status, headers, body, sent = hub.answer(self.command, self.path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:sent])
            if sent < len(body):
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _digest(file: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if file.endswith(".safetensors") else _git(content)


def _git(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
