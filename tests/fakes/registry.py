"""A registry on loopback that speaks the distribution API over real HTTP, and misbehaves on demand."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from fakes.images import INDEX, MANIFEST, FakeImage


class Request(NamedTuple):
    """What was asked, and how."""

    method: str
    path: str
    headers: Mapping[str, str]


class FakeRegistry:
    """What the registry holds, whom it lets in, and how it misbehaves; `requests` is what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.auth: str | None = None
        """None, `basic`, or `bearer`."""
        self.users: dict[str, str] = {}
        self.refresh_tokens: set[str] = set()
        self.anonymous = True
        """Whether a token is given to everybody."""
        self.tokens: set[str] = set()
        self.cuts: dict[str, list[int]] = {}
        """For each blob after how many bytes the next answers break off."""
        self.lies: dict[str, list[bytes]] = {}
        """For each blob or manifest what the next answers hold instead."""
        self.statuses: dict[str, list[int]] = {}
        """For each path the statuses of the next answers."""
        self.ranges = True
        self.storage: str | None = None
        """Where blobs are really kept: another registry, to which callers are redirected."""
        self.address = ""

    def put(self, image: FakeImage, *names: str) -> None:
        """Hold an image under these tags."""
        self.blobs |= image.blobs
        for name in (*names, image.digest):
            self.manifests[name] = (MANIFEST, image.manifest)

    def put_index(self, data: bytes, *names: str) -> None:
        """Hold an index under these tags."""
        for name in (*names, f"sha256:{hashlib.sha256(data).hexdigest()}"):
            self.manifests[name] = (INDEX, data)

    def asked(self, part: str) -> list[Request]:
        """The requests whose path has this in it."""
        return [request for request in self.requests if part in request.path]


@contextmanager
def serving(registry: FakeRegistry) -> Iterator[FakeRegistry]:
    """The registry at `registry.address`, as `127.0.0.1:port`, for the length of the block."""

    class Handler(_Handler):
        fake = registry

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        registry.address = f"127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One connection to the registry."""

    fake: FakeRegistry
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:  # the name is the server's
        self._note()
        url = urlsplit(self.path)
        statuses = self.fake.statuses.get(url.path)
        if statuses:
            self._answer(statuses.pop(0), b"", **{"Retry-After": "7"})
        elif url.path == "/token":
            self._give_token(parse_qs(url.query), self._basic_user() is not None or self.fake.anonymous)
        elif not url.path.startswith("/v2/"):
            self._error(404, "NOT_FOUND", "no such thing")
        elif not self._is_let_in():
            self._challenge()
        elif "/manifests/" in url.path:
            self._give_manifest(url.path.rpartition("/")[2])
        else:
            self._give_blob(url.path, url.path.rpartition("/")[2])

    def do_POST(self) -> None:  # the name is the server's
        self._note()
        form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        self._give_token(form, bool(set(form.get("refresh_token", [])) & self.fake.refresh_tokens))

    def _note(self) -> None:
        self.fake.requests.append(Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))

    def _basic_user(self) -> str | None:
        kind, _, told = self.headers.get("authorization", "").partition(" ")
        user, _, password = base64.b64decode(told).decode().partition(":") if kind == "Basic" else ("", "", "")
        return user if user and self.fake.users.get(user) == password else None

    def _is_let_in(self) -> bool:
        if self.fake.auth == "basic":
            return self._basic_user() is not None
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return self.fake.auth is None or (kind == "Bearer" and token in self.fake.tokens)

    def _challenge(self) -> None:
        realm = f"http://{self.fake.address}/token"
        challenge = f'Bearer realm="{realm}",service="fake",scope="repository:team/app:pull"'
        if self.fake.auth == "basic":
            challenge = 'Basic realm="fake"'
        self._error(401, "UNAUTHORIZED", "authentication required", **{"WWW-Authenticate": challenge})

    def _give_token(self, asked: Mapping[str, list[str]], allowed: bool) -> None:
        if not allowed or asked.get("scope") != ["repository:team/app:pull"] or asked.get("service") != ["fake"]:
            self._error(401, "UNAUTHORIZED", "incorrect username or password")
            return
        token = f"token-{len(self.fake.tokens)}"
        self.fake.tokens.add(token)
        self._answer(200, json.dumps({"token": token}).encode())

    def _give_manifest(self, name: str) -> None:
        if name not in self.fake.manifests:
            self._error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            return
        media_type, data = self.fake.manifests[name]
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        data = self._or_lie(name, data)
        self._answer(200, data, **{"Content-Type": media_type, "Docker-Content-Digest": digest})

    def _give_blob(self, path: str, digest: str) -> None:
        if self.fake.storage is not None:
            self._answer(307, b"", Location=f"http://{self.fake.storage}{path}?signature=secret")
            return
        if digest not in self.fake.blobs:
            self._error(404, "BLOB_UNKNOWN", "blob unknown to registry")
            return
        data = self._or_lie(digest, self.fake.blobs[digest])
        wanted = self.headers.get("range", "")
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.fake.ranges else 0
        headers = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
        cut = self.fake.cuts[digest].pop(0) if self.fake.cuts.get(digest) else None
        self._answer(206 if first else 200, data[first:], cut=cut, **headers)

    def _or_lie(self, name: str, data: bytes) -> bytes:
        return self.fake.lies[name].pop(0) if self.fake.lies.get(name) else data

    def _error(self, status: int, code: str, message: str, **headers: str) -> None:
        self._answer(status, json.dumps({"errors": [{"code": code, "message": message}]}).encode(), **headers)

    def _answer(self, status: int, data: bytes, *, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if cut is None else data[:cut])
        self.close_connection = cut is not None
