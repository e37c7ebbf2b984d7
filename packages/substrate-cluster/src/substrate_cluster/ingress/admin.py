"""The admin listener's application: reasons, metrics, the live state and its page, the story of each invocation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Final

import msgspec
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from substrate_cluster.auth import Authenticator
from substrate_cluster.ingress.app import TEXT, ReadyReasons, healthz, probe, routed
from substrate_cluster.ingress.errors import refused
from substrate_cluster.ingress.exchange import Endpoint, Exchange, Handler
from substrate_cluster.ingress.headers import sort_fields, wants_json
from substrate_cluster.ingress.hosts import HostRule, is_loopback
from substrate_seam.errors import Reason
from substrate_seam.events import Emit

_JSON: Final = (
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_METRICS: Final = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)
_STORIES: Final = "/v1/invocations/"
_ROUTES: Final = "GET / (a page), /healthz, /readyz, /metrics, /v1/live, /v1/invocations/{id} and /v1/audit"

Page = tuple[tuple[tuple[bytes, bytes], ...], bytes]
"""The fields and the bytes of a document."""


def admin_app(
    *,
    ready: ReadyReasons,
    metrics: Callable[[], bytes],
    story: Callable[[str], Awaitable[object | None]],
    live: Callable[[], object],
    page: Page,
    journal: Callable[[], list[str]] | None = None,
    host: tuple[str, object] | None = None,
    authenticator: Authenticator | None,
    allowed_hosts: Collection[str],
    mint_id: Callable[[], str],
    emit: Emit,
    prefix: str = "",
) -> ASGIApp:
    """Probes for whoever reaches the listener; the rest for operators.

    Without an `authenticator` an operator is whoever calls from this machine. `metrics` gives the Prometheus text,
    `story` what is known of an invocation as something that can be JSON, or None; `journal` the lines `id attempt` that
    guests wrote before they acted, where a journal is kept; `host` what guests get from this host, in words and as
    something that can be JSON, where it has guests. `live` is the present as something that can be JSON, and `page`
    draws it: the page itself knows nothing, so it is served without a token and asks its reader for one. `prefix` is
    how the names of the daemon's settings begin.
    """
    hosts = HostRule(allowed_hosts, prefix=prefix)

    def check_place(exchange: Exchange) -> list[bytes]:
        """Refuse foreign pages, and without tokens other machines; the values of `Authorization`."""
        fields = sort_fields(exchange.scope["headers"])
        hosts.check(fields.ours)
        client = exchange.scope.get("client")  # a Unix socket has no client address
        if authenticator is None and client is not None and not is_loopback(client[0]):
            hint = f"From another machine this takes a token: see the setting {prefix}ADMIN_TOKEN_FILE."
            raise refused(Reason.FORBIDDEN, "forbidden", hint=hint)
        return fields.ours.get(b"authorization", [])

    def for_operators(handler: Handler) -> Handler:
        async def checked(exchange: Exchange) -> None:
            authorization = check_place(exchange)
            if authenticator is not None:
                await authenticator.authenticate(authorization)
            await handler(exchange)

        return checked

    async def paged(exchange: Exchange) -> None:
        check_place(exchange)
        await exchange.answer(200, *page)

    async def lived(exchange: Exchange) -> None:
        await exchange.answer(200, _JSON, msgspec.json.encode(live()))

    async def readyz(exchange: Exchange) -> None:
        reasons = ready()
        status = 503 if reasons else 200
        if wants_json(exchange.scope["headers"]):
            facts = {"ready": not reasons, "reasons": reasons} | ({"isolation": host[1]} if host else {})
            await exchange.answer(status, _JSON, msgspec.json.encode(facts))
        else:
            text = "\n".join(reasons or ["ok"]) + "\n" + (f"\n{host[0]}\n" if host else "")
            await exchange.answer(status, TEXT, text.encode())

    async def told_story(exchange: Exchange) -> None:
        invocation_id = exchange.scope["path"].removeprefix(_STORIES)
        found = await story(invocation_id)
        if found is None:
            raise refused(
                Reason.NOT_FOUND,
                f"nothing is known of invocation {invocation_id[:100]!r}",
                hint="The ring keeps the latest ones; the logs may have it.",
            )
        await exchange.answer(200, _JSON, msgspec.json.encode(found))

    async def audited(exchange: Exchange) -> None:
        if journal is None:
            raise refused(
                Reason.NOT_FOUND,
                "no journal is kept",
                hint="Daemons that run guests keep it: fc-invoke with FC_INVOKE_AUDIT_JOURNAL=<file>; behind a "
                "cluster-agent each node-daemon with NODE_DAEMON_AUDIT_JOURNAL=<file>, and `--journal` names its "
                "admin listener.",
            )
        await exchange.answer(200, _JSON, msgspec.json.encode({"entries": journal()}))

    async def exposed(exchange: Exchange) -> None:
        await exchange.answer(200, _METRICS, metrics())

    async def nothing(exchange: Exchange) -> None:
        method, path = exchange.scope["method"], exchange.scope["path"]
        raise refused(Reason.NOT_FOUND, f"there is no {method} {path[:100]!r} here", hint=f"There is {_ROUTES}.")

    def endpoint(handler: Handler) -> Endpoint:
        return Endpoint(handler, mint_id=mint_id, emit=emit)

    not_found = for_operators(nothing)
    routes = [
        Route("/", endpoint(probe(paged, otherwise=not_found))),
        Route("/healthz", endpoint(probe(healthz, otherwise=not_found))),
        Route("/readyz", endpoint(probe(readyz, otherwise=not_found))),
        Route("/metrics", endpoint(probe(for_operators(exposed), otherwise=not_found))),
        Route("/v1/live", endpoint(probe(for_operators(lived), otherwise=not_found))),
        Route("/v1/audit", endpoint(probe(for_operators(audited), otherwise=not_found))),
        Mount(_STORIES, endpoint(probe(for_operators(told_story), otherwise=not_found))),
    ]
    return routed(routes, otherwise=endpoint(not_found))
