"""The public listener's application."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from substrate_cluster.admission import Admission
from substrate_cluster.auth import Authenticator
from substrate_cluster.ingress.errors import refused
from substrate_cluster.ingress.exchange import Endpoint, Exchange, Handler
from substrate_cluster.ingress.hosts import HostRule
from substrate_cluster.ingress.invocations import Catalog, Front, Limits
from substrate_seam.errors import Reason
from substrate_seam.events import Emit
from substrate_seam.executor import NodeExecutor
from substrate_seam.tracing import Join, pass_on

TEXT: Final = ((b"content-type", b"text/plain; charset=utf-8"),)

ReadyReasons = Callable[[], list[str]]
"""Why the daemon is not ready; empty when it is."""


def public_app(
    *,
    catalog: Catalog,
    executor: NodeExecutor,
    authenticator: Authenticator,
    admission: Admission,
    allowed_hosts: Collection[str],
    limits: Limits,
    ready: ReadyReasons,
    mint_id: Callable[[], str],
    emit: Emit,
    clock: Callable[[], float] | None = None,
    join: Join = pass_on,
    prefix: str = "",
) -> ASGIApp:
    """Invocations, `/healthz` and a `/readyz` that says no more than yes or no.

    `mint_id` gives 32 hex digits, new each time; `allowed_hosts` are names and addresses without port
    (`default_hosts` has those of an address). `clock` gives seconds to measure by; without it the event loop's own do.
    `join` says which trace context a guest is given, `prefix` how the names of the daemon's settings begin.
    """
    front = Front(
        catalog=catalog,
        executor=executor,
        authenticator=authenticator,
        admission=admission,
        hosts=HostRule(allowed_hosts, prefix=prefix),
        limits=limits,
        emit=emit,
        join=join,
    )

    async def readyz(exchange: Exchange) -> None:
        if ready():
            raise refused(Reason.NOT_READY, "not ready", hint="The admin listener's /readyz says why.")
        await exchange.answer(200, TEXT, b"ok\n")

    def endpoint(handler: Handler) -> Endpoint:
        return Endpoint(handler, mint_id=mint_id, emit=emit, clock=clock)

    routes = [
        Mount("/invoke", endpoint(front.invoke)),
        Mount("/http", endpoint(front.http)),
        Route("/healthz", endpoint(probe(healthz, otherwise=front.not_found))),
        Route("/readyz", endpoint(probe(readyz, otherwise=front.not_found))),
    ]
    return routed(routes, otherwise=endpoint(front.not_found))


async def healthz(exchange: Exchange) -> None:
    """The process serves; it says nothing else."""
    await exchange.answer(200, TEXT, b"ok\n")


def probe(handler: Handler, *, otherwise: Handler) -> Handler:
    """A page for GET and HEAD alone, open to whoever reaches the listener; other methods find nothing there."""

    async def probed(exchange: Exchange) -> None:
        await (handler if exchange.scope["method"] in {"GET", "HEAD"} else otherwise)(exchange)

    return probed


def routed(routes: Sequence[BaseRoute], *, otherwise: Endpoint) -> ASGIApp:
    """An application that routes by the path as it came, byte for byte, and knows nothing but HTTP."""
    router = Router(routes, redirect_slashes=False, default=otherwise)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Decoded, `/%69nvoke` and a session with a line break would be routed as what they are not.
            scope["path"] = scope["raw_path"].decode("latin-1")
            await router(scope, receive, send)
        elif scope["type"] == "lifespan":
            await router(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    return app
