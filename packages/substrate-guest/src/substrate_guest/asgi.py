"""Any ASGI 3 application as a workload: HTTP and lifespan, no WebSockets."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from substrate_guest.failure import describe, log

if TYPE_CHECKING:
    from substrate_guest.app import Request
    from substrate_guest.exchange import Exchange
    from substrate_guest.identity import Identity

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

VERSIONS = {"version": "3.0", "spec_version": "2.4"}


class AsgiWorkload:
    """Runs an ASGI application; its startup is part of becoming ready, and its shutdown never comes."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self.rests = False
        self._state: dict[str, Any] = {}

    async def prime(self) -> None:
        """See `Workload.prime`; startup belongs to the loop that serves, so it is part of `start`."""

    async def start(self, duties: asyncio.TaskGroup) -> None:
        """See `Workload.start`; raises `RuntimeError` when the application says that its startup failed."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        duties.create_task(self._lifespan(started), name="lifespan")
        await started

    async def _lifespan(self, started: asyncio.Future[None]) -> None:
        told = False

        async def receive() -> Message:
            nonlocal told
            if told:  # the machine ends without a word, so there is no shutdown to wait for
                await asyncio.get_running_loop().create_future()
            told = True
            return {"type": "lifespan.startup"}

        async def send(message: Message) -> None:
            if started.done():
                return
            if message["type"] == "lifespan.startup.complete":
                started.set_result(None)
            elif message["type"] == "lifespan.startup.failed":
                started.set_exception(RuntimeError(f"the application's startup failed: {message.get('message', '')}"))

        try:
            await self._app({"type": "lifespan", "asgi": VERSIONS, "state": self._state}, receive, send)
        except Exception as error:  # noqa: BLE001  # the specification: an application may refuse this scope
            if started.done():
                log(error)
            else:
                print(f"substrate-guest: no lifespan: {describe(error)}", file=sys.stderr)  # noqa: T201  # the guest's console
        if not started.done():
            started.set_result(None)

    async def restored(self, identity: Identity) -> None:
        """See `Workload.restored`; ASGI has no word for it."""

    async def respond(self, request: Request, exchange: Exchange) -> None:
        """See `Workload.respond`; raises what the application raises, or `RuntimeError` for half a reply."""
        unread = True

        async def receive() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": request.body, "more_body": False}
            await exchange.peer_left()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.begin(message["status"], message.get("headers", ()))
            elif message["type"] == "http.response.body":
                body = bytes(message.get("body", b""))
                await (exchange.write(body) if message.get("more_body", False) else exchange.end(body))
            else:
                raise ValueError(f"found message {message['type']!r}, accepted are http.response.start and .body")

        await self._app(http_scope(request, self._state), receive, send)
        if not exchange.ended:
            raise RuntimeError("the application returned before its reply was complete")


def http_scope(request: Request, state: dict[str, Any]) -> Scope:
    """The ASGI scope of `request`; each gets a copy of the lifespan's `state`."""
    raw_path = request.target.partition("?")[0].encode("latin-1")
    return {
        "type": "http",
        "asgi": VERSIONS,
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": raw_path,
        "query_string": request.query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers],
        "client": None,
        "server": None,
        "state": state.copy(),
    }
