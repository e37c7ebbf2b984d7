"""The node daemon's admin listener: probes, metrics, the story of an invocation, the audit journal."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_TEXT, _JSON = b"text/plain; charset=utf-8", b"application/json"
_STORIES = "/v1/invocations/"
_ROUTES = "GET /healthz, /readyz, /metrics, /v1/invocations/{id} and /v1/audit"


class AdminApp:
    """An ASGI application for probes, which anybody may ask, and for operators: whoever calls from this machine.

    `ready` says why the node takes no calls (nothing when it does), `metrics` gives the Prometheus text, `story` what
    is known of an invocation or None, `journal` the entries of the audit journal if one is kept. `host` is what guests
    get from this host, in words and as something that can be JSON.
    """

    def __init__(
        self,
        *,
        ready: Callable[[], list[str]],
        metrics: Callable[[], bytes],
        story: Callable[[str], object | None],
        journal: Callable[[], list[str]] | None,
        host: tuple[str, object] | None = None,
    ) -> None:
        self._host = host
        self._ready = ready
        self._story = story
        self._journal = journal
        self._metrics = metrics

    async def __call__(self, scope: Scope, _: object, send: Send) -> None:
        """Answer one request."""
        status, kind, body = self._answer(scope)
        fields = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _answer(self, scope: Scope) -> tuple[int, bytes, bytes]:
        path = scope["path"]
        if scope["method"] not in {"GET", "HEAD"}:
            return 404, _TEXT, f"there is {_ROUTES}\n".encode()
        if path == "/healthz":
            return 200, _TEXT, b"ok\n"
        if path == "/readyz":
            return self._readiness(scope)
        if not _is_operator(scope):
            return 403, _TEXT, b"forbidden: this is for callers on this machine, under its own name\n"
        return self._tell(path)

    def _readiness(self, scope: Scope) -> tuple[int, bytes, bytes]:
        reasons = self._ready()
        status = 503 if reasons else 200
        if any(name == b"accept" and b"application/json" in value for name, value in scope["headers"]):
            facts = {"ready": not reasons, "reasons": reasons}
            return status, _JSON, msgspec.json.encode(facts | ({"isolation": self._host[1]} if self._host else {}))
        text = "\n".join(reasons or ["ok"]) + "\n" + (f"\n{self._host[0]}\n" if self._host else "")
        return status, _TEXT, text.encode()

    def _tell(self, path: str) -> tuple[int, bytes, bytes]:
        if path == "/metrics":
            return 200, b"text/plain; version=0.0.4; charset=utf-8", self._metrics()
        if path == "/v1/audit" and self._journal is not None:
            return 200, _JSON, msgspec.json.encode({"entries": self._journal()})
        if path == "/v1/audit":
            return 404, _TEXT, b"no audit journal is kept: set NODE_DAEMON_AUDIT_JOURNAL to a file\n"
        story = self._story(path.removeprefix(_STORIES)) if path.startswith(_STORIES) else None
        if story is not None:
            return 200, _JSON, msgspec.json.encode(story)
        return 404, _TEXT, f"nothing is known under {path[:100]!r}; there is {_ROUTES}\n".encode()


def _is_operator(scope: Scope) -> bool:
    """Whether the request comes from this machine and names it, not some site that DNS was rebound to."""
    client = scope.get("client")
    if client is not None and not ipaddress.ip_address(client[0]).is_loopback:
        return False
    fields: Mapping[bytes, bytes] = dict(scope["headers"])
    host = fields.get(b"host", b"").decode("latin-1").rpartition(":")[0] or fields.get(b"host", b"").decode("latin-1")
    return host in {"localhost", "127.0.0.1", "[::1]"} and b"origin" not in fields
