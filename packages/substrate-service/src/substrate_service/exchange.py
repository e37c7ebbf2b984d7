"""One request and its reply, as an ASGI application sees them: `receive`, `send` and the rules of HTTP between."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

from substrate_seam.errors import Reason
from substrate_seam.events import DefectFound, Emit
from substrate_service.bodies import BodyReader
from substrate_service.heads import Head
from substrate_service.replies import reply_head

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

ABORT = "substrate.abort"
"""The message, and the extension, by which an application cuts its connection at once."""
WATCH = "substrate.watch"
"""The extension that has a function called, without arguments, if nobody reads the reply any more: `Exchange.watch`.

A task that awaits `receive` for this would cost as much as the rest of a small exchange.
"""
WHOLE = "substrate.whole"
"""The extension that gives the request body at once, if all of it is here: `Exchange.whole`. Nothing is to be timed."""

ANSWERED = "substrate.answered"
"""Set in the `http.disconnect` of a request that the listener has answered itself, and has told of."""

_TOO_LATE = 408
"""Who was told this is not waited for any longer: its connection closes."""


class Connection(Protocol):
    """What an exchange asks of the connection it is on."""

    congested: bool
    """Whether the peer reads more slowly than the application writes."""

    async def writable(self) -> None:
        """Return once the peer reads fast enough, or is gone."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes, in order."""
        ...

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Fields of every reply."""
        ...

    def refusal(self, status: int, reason: Reason, message: str, *, bodiless: bool = False) -> bytes:
        """A whole reply that says what is wrong, after which the connection closes; only its head if `bodiless`."""
        ...

    def wants_body(self, exchange: Exchange) -> None:
        """Read on: the application waits for the body, or for the peer to leave."""
        ...

    def may_stay(self, exchange: Exchange) -> bool:
        """Whether another request may follow this reply."""
        ...

    def replied(self, exchange: Exchange, *, stay: bool) -> None:
        """The reply is complete."""
        ...

    def abort(self) -> None:
        """Cut the connection at once; nothing that is still unsent goes out."""
        ...


class Exchange:
    """One request and its reply.

    `gone` is true once nobody will read the reply any more; sends are then dropped and `receive` says so.
    """

    __slots__ = (
        *("answered", "body", "gone", "head", "owes_continue", "reader", "replied", "reply_started"),
        *("_chunked", "_connection", "_emit", "_end_told", "_left", "_length_left", "_news", "_stays"),
    )

    def __init__(self, head: Head, body: BodyReader, connection: Connection, emit: Emit) -> None:
        self.head = head
        self.reader = body
        self.replied = False
        self.reply_started = False
        self.gone = False
        self.answered = False  # by the listener
        self.owes_continue = head.expects_continue
        self.body = b""
        self._end_told = False
        self._connection = connection
        self._emit = emit
        self._news: asyncio.Event | None = None  # while the application waits for any
        self._left: Callable[[], None] | None = None
        self._stays = True
        self._chunked = False
        self._length_left: int | None = None  # None when the reply has no body, whatever its fields say

    # What the connection tells.

    def take(self, body: bytes) -> None:
        """Keep bytes of the request body until the application asks for them."""
        self.body = self.body + body if self.body else body
        self._tell()

    def leave(self) -> None:
        """The peer is gone, or has been answered by the listener itself."""
        self.gone = True
        self._tell()
        left, self._left = self._left, None
        if left is not None:
            left()

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None

    # What the application does.

    async def run(self, app: App, scope: Scope) -> None:
        """Run the application; whatever it leaves unfinished, the connection does not wait for."""
        try:
            await app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            if not (self.gone or self.replied):
                self._connection.abort()
            raise
        except Exception as exc:  # noqa: BLE001  # a defect of one call is told, and must not end the listener
            self._broke(f"the application raised {type(exc).__name__}: {exc}", traceback.format_exc())
        else:
            if not (self.replied or self.gone):
                self._broke("the application returned without completing its reply", "")

    def _broke(self, message: str, trace: str) -> None:
        self._emit(DefectFound(message=message, traceback=trace))
        if self.gone or self.replied:
            return
        if self.reply_started:
            self._connection.abort()
        else:
            self.answer(500, Reason.INTERNAL, "a defect of this service stopped the request")

    def answer(self, status: int, reason: Reason, message: str) -> None:
        """Reply in the application's stead, and let nothing of its own reply follow."""
        self.reply_started = self.answered = True
        bodiless = self.head.method == "HEAD"
        self._connection.write(self._connection.refusal(status, reason, message, bodiless=bodiless))
        self.leave()
        self._connection.replied(self, stay=False)

    def watch(self, left: Callable[[], None]) -> None:
        """Have `left` called once if the peer leaves before the reply is complete, or has left already."""
        self._left = left
        if self.gone:
            self.leave()

    def whole(self) -> bytes | None:
        """The request body if all of it is here, and has not been received; None says to `receive`."""
        if self.gone or self.owes_continue or self._end_told or not self.reader.whole:
            return None
        self._end_told = True
        body, self.body = self.body, b""
        return body

    async def receive(self) -> Message:
        """The next piece of the request body; once that is whole, wait for the peer to leave or the reply to end."""
        if self.owes_continue and not self.gone:
            self.owes_continue = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.gone or self.replied or self.body or (self.reader.whole and not self._end_told)):
            self._connection.wants_body(self)
            self._news = self._news or asyncio.Event()
            await self._news.wait()
        if self.gone or self.replied:
            return {"type": "http.disconnect", ANSWERED: True} if self.answered else {"type": "http.disconnect"}
        body, self.body = self.body, b""
        self._end_told = self.reader.whole
        return {"type": "http.request", "body": body, "more_body": not self._end_told}

    async def send(self, message: Message) -> None:
        """Send a piece of the reply, waiting while the peer reads too slowly. Dropped once the peer is gone."""
        kind = message["type"]
        if kind == ABORT:
            self.leave()
            self._connection.abort()
            return
        if self._connection.congested and not self.gone:
            await self._connection.writable()
        if self.gone:
            return
        if self.replied:
            raise RuntimeError(f"{kind} was sent after the reply was complete")
        if not self.reply_started:
            if kind != "http.response.start":
                raise RuntimeError(f"the reply must begin with http.response.start, not {kind}")
            self._begin_reply(message["status"], message.get("headers", ()))
            return
        if kind != "http.response.body":
            raise RuntimeError(f"the reply goes on with http.response.body, not {kind}")
        self._send_body(message.get("body", b""), more=message.get("more_body", False))

    def _begin_reply(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        head = reply_head(
            status,
            [*self._connection.default_headers(), *headers],
            to_head_request=self.head.method == "HEAD",
            may_stay=status != _TOO_LATE and self._connection.may_stay(self),
        )
        self._length_left, self._chunked, self._stays = head.length, head.chunked, head.stays
        self._connection.write(head.data)
        self.reply_started = True
        self.owes_continue = False

    def _send_body(self, body: bytes, *, more: bool) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            data = data if more else data + b"0\r\n\r\n"
        elif self._length_left is None:
            data = b""
        else:
            data = body
            self._length_left -= len(body)
            if self._length_left < 0 or (self._length_left and not more):
                raise RuntimeError("the body of the reply is not as long as its Content-Length")
        if data:
            self._connection.write(data)
        if not more:
            self.replied = True
            self._left = None
            self._tell()
            self._connection.replied(self, stay=self._stays)
