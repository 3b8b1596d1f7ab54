"""A server on this machine that answers as the model hub does, and can be told to fail.

It speaks what `huggingface_hub` asks for: what a repository holds at a revision, with sizes and hashes; and its files,
small ones from itself, large ones (kept in LFS) by a redirect to a store on another port, as on the real hub. Ranges
are served, every byte of a file is counted, and errors carry the hub's `X-Error-Code`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 20_000  # bytes; files above it are kept in LFS


@dataclass
class Hub:
    """One repository at one commit, and how its two servers are to behave."""

    id: str
    revision: str
    files: dict[str, bytes]
    private_token: str | None = None  # who may read it; others are told that it is not there
    gated: bool = False  # listed for all, its files for nobody
    cut: dict[str, int] = field(default_factory=dict)  # file -> how many bytes of an answer are sent, once
    stall: dict[str, int] = field(default_factory=dict)  # the same, but the connection stays open
    corrupt: set[str] = field(default_factory=set)  # files sent with one bit changed
    leave: bool = False  # after the first cut, be `down`
    down: bool = False  # every connection is closed without an answer
    failing: int | None = None  # every request is answered with this status
    served: Counter[str] = field(default_factory=Counter)  # file -> bytes sent
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # server, path, Authorization
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), self._handler(name)) for name in ("hub", "store")
        ]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.endpoint, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def close(self) -> None:
        """End both servers."""
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def asked(self) -> set[str]:
        """Names of the files of which anything was asked."""
        return {path.rpartition("/")[2] for _, path, _ in self.requests if "/resolve/" in path}

    def _handler(self, name: str) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Nothing is logged."""

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.requests.append((name, unquote(urlsplit(self.path).path), self.headers["Authorization"]))
                if hub.down:
                    self.close_connection = True
                elif hub.failing:
                    self._refuse(hub.failing)
                elif name == "store":
                    (digest,) = parse_qs(urlsplit(self.path).query)["X-Signature"]
                    file = next(one for one, data in hub.files.items() if _sha256(data) == digest)
                    self._send_file(file)
                else:
                    self._answer(unquote(urlsplit(self.path).path))

            def _answer(self, path: str) -> None:
                if hub.private_token:
                    sent = self.headers["Authorization"]
                    if sent and sent != f"Bearer {hub.private_token}":
                        return self._refuse(401, message="Invalid credentials in Authorization header")
                    if not sent:
                        return self._refuse(401, "RepoNotFound")
                if api := re.fullmatch(r"/api/models/(.+)/revision/([^/]+)", path):
                    if problem := self._problem(api[1], api[2]):
                        return self._refuse(404, problem)
                    return self._send(
                        json.dumps(hub._listing()).encode(), {"Content-Type": "application/json"}
                    )
                id, _, rest = path.lstrip("/").partition("/resolve/")
                revision, _, file = rest.partition("/")
                if problem := self._problem(id, revision):
                    return self._refuse(404, problem)
                if hub.gated:
                    return self._refuse(403, "GatedRepo")
                if file not in hub.files:
                    return self._refuse(404, "EntryNotFound")
                data = hub.files[file]
                if len(data) <= LARGE:
                    return self._send_file(file)
                linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{_sha256(data)}"'}
                where = f"{hub.store}/object?X-Signature={_sha256(data)}"
                return self._send(b"", {**linked, "Location": where, "X-Repo-Commit": hub.revision}, 302)

            def _problem(self, id: str, revision: str) -> str | None:
                if id != hub.id:
                    return "RepoNotFound"
                return None if revision in (hub.revision, "main") else "RevisionNotFound"

            def _send_file(self, file: str) -> None:
                data = hub.files[file]
                whole, start = len(data), 0
                status, head = 200, {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": hub.revision}
                if wanted := self.headers["Range"]:
                    start = int(wanted.removeprefix("bytes=").partition("-")[0])
                    status, head["Content-Range"] = 206, f"bytes {start}-{whole - 1}/{whole}"
                if file in hub.corrupt:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                self._send(data[start:], head, status, file)

            def _refuse(self, status: int, code: str | None = None, message: str = "") -> None:
                head = {"X-Error-Code": code} if code else {}
                self._send(b"", head | ({"X-Error-Message": message} if message else {}), status)

            def _send(self, body: bytes, head: dict[str, str], status: int = 200, file: str = "") -> None:
                self.send_response(status)
                for key, value in {**head, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                limit = hub.cut.pop(file, None)
                pause = hub.stall.pop(file, None)
                part = body[: min(len(body), *(n for n in (limit, pause) if n is not None), len(body))]
                hub.served[file] += len(part)
                hub.down = hub.down or (hub.leave and limit is not None)
                self.wfile.write(part)
                self.wfile.flush()
                if pause is not None:
                    hub.stalled.set()
                    hub.released.wait(60)
                if len(part) < len(body):
                    self.close_connection = True

        return Handler

    def _listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            one = {"rfilename": name, "size": len(data), "blobId": _git_sha1(data)}
            if len(data) > LARGE:
                one["lfs"] = {"size": len(data), "sha256": _sha256(data), "pointerSize": 134}
            siblings.append(one)
        about = {"private": bool(self.private_token), "gated": "manual" if self.gated else False}
        return {"id": self.id, "modelId": self.id, "sha": self.revision, "siblings": siblings, **about}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _digest(data: bytes) -> str:
    return _sha256(data) if len(data) > LARGE else _git_sha1(data)
