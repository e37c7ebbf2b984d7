"""The node daemon's admin listener: probes, metrics, the live state and its page, stories, the audit journal."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from substrate_seam.story import Story, told

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Fields = tuple[tuple[bytes, bytes], ...]

_GUARDED = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_TEXT = ((b"content-type", b"text/plain; charset=utf-8"), *_GUARDED)
_JSON = ((b"content-type", b"application/json"), *_GUARDED)
_METRICS = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"), *_GUARDED)
_STORIES = "/v1/invocations/"
_ROUTES = "GET / (a page), /healthz, /readyz, /metrics, /v1/live, /v1/invocations/{id} and /v1/audit"

Page = tuple[Fields, bytes]
"""The fields and the bytes of a document."""
Answer = tuple[int, Fields, bytes]
"""Status, fields, body."""


class AdminApp:
    """An ASGI application for probes, which anybody may ask, and for operators: whoever calls from this machine.

    `ready` says why the node takes no calls (nothing when it does), `metrics` gives the Prometheus text, `story` what
    is known of an invocation or None, `journal` the entries of the audit journal if one is kept. `host` is what guests
    get from this host, in words and as something that can be JSON. `live` is the present in that form, and `page` draws
    it.
    """

    def __init__(
        self,
        *,
        ready: Callable[[], list[str]],
        metrics: Callable[[], bytes],
        story: Callable[[str], Story | None],
        live: Callable[[], object],
        page: Page,
        journal: Callable[[], list[str]] | None,
        host: tuple[str, object] | None = None,
    ) -> None:
        self._host = host
        self._ready = ready
        self._story = story
        self._pages: dict[str, Callable[[], Page]] = {
            "/": lambda: page,
            "/metrics": lambda: (_METRICS, metrics()),
            "/v1/live": lambda: (_JSON, msgspec.json.encode(live())),
        }
        if journal is not None:
            self._pages["/v1/audit"] = lambda: (_JSON, msgspec.json.encode({"entries": journal()}))

    async def __call__(self, scope: Scope, _: object, send: Send) -> None:
        """Answer one request."""
        status, fields, body = self._answer(scope)
        fields = (*fields, (b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _answer(self, scope: Scope) -> Answer:
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

    def _readiness(self, scope: Scope) -> Answer:
        reasons = self._ready()
        status = 503 if reasons else 200
        if any(name == b"accept" and b"application/json" in value for name, value in scope["headers"]):
            facts = {"ready": not reasons, "reasons": reasons}
            return status, _JSON, msgspec.json.encode(facts | ({"isolation": self._host[1]} if self._host else {}))
        text = "\n".join(reasons or ["ok"]) + "\n" + (f"\n{self._host[0]}\n" if self._host else "")
        return status, _TEXT, text.encode()

    def _tell(self, path: str) -> Answer:
        if path in self._pages:
            return 200, *self._pages[path]()
        if path == "/v1/audit":
            return 404, _TEXT, b"no audit journal is kept: set NODE_DAEMON_AUDIT_JOURNAL to a file\n"
        invocation_id = path.removeprefix(_STORIES)
        story = self._story(invocation_id) if path.startswith(_STORIES) else None
        if story is not None:
            return 200, _JSON, msgspec.json.encode(told(invocation_id, story))
        return 404, _TEXT, f"nothing is known under {path[:100]!r}; there is {_ROUTES}\n".encode()


def _is_operator(scope: Scope) -> bool:
    """Whether the request comes from this machine and names it, not from a page of some site, or one DNS rebound."""
    client = scope.get("client")
    if client is not None and not ipaddress.ip_address(client[0]).is_loopback:
        return False
    fields: Mapping[bytes, bytes] = dict(scope["headers"])
    host = fields.get(b"host", b"").decode("latin-1").rpartition(":")[0] or fields.get(b"host", b"").decode("latin-1")
    ours = b"origin" not in fields and fields.get(b"sec-fetch-site", b"none") in {b"none", b"same-origin"}
    return ours and host in {"localhost", "127.0.0.1", "[::1]"}
