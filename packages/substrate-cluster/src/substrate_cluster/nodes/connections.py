"""Keep-alive connections to one node: each carries one exchange at a time, the idle ones wait to be used again."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, cast

from substrate_seam.http1 import BadReply, ReplyReader

_BUFFERED_BYTES_MAX: Final = 262_144
_CHUNK_BYTES_MAX: Final = 65_536
_LAST_CHUNK: Final = b"0\r\n\r\n"


class Broken(Exception):
    """The connection ended, or its peer did not speak as agreed, before the exchange was over."""


class Overdue(Broken):
    """The peer said nothing for longer than the exchange may take."""


class Connection(asyncio.Protocol):
    """One connection: `begin` an exchange, read its reply, `finish` it, and begin the next.

    Once it is broken, `failure` says how; what arrived before can still be read.
    """

    def __init__(self, home: Connections) -> None:
        self._home = home
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self._reader: ReplyReader | None = None  # while an exchange goes on
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._read_paused = False
        self._write_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since_s = 0.0
        self._overdue_at_s: float | None = None  # while an exchange goes on
        self._timer: asyncio.TimerHandle | None = None
        self._used = False
        self.idle_since_s = 0.0
        self.stale = False
        """Whether it was used before, and broke in this exchange before a byte of a reply had come."""
        self.failure: Broken | None = None

    # One exchange.

    def begin(self, request: bytes, *, within_s: float) -> None:
        """Send a request; its reply may take so many seconds, as far as they are spent waiting for the peer."""
        self._reader = ReplyReader()
        self.stale = self._used
        self._used = True
        self.bound(within_s)
        self._transport.write(request)

    def bound(self, within_s: float) -> None:
        """Let what is still to come take so many seconds from now.

        A timer that runs out earlier is kept and set anew then: most bounds are kept, and timers cost more than them.
        """
        self._overdue_at_s = at_s = self._loop.time() + within_s
        if self._timer is not None and self._timer.when() > at_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(at_s, self._check_time)

    async def go_ahead(self) -> int:
        """Wait until the peer wants the body (100) or has answered without it (its status). Raises `Broken`."""
        while not (self._now.continues or self._now.status):
            await self._news()
        return self._now.status or 100

    def commit(self, body: bytes) -> int:
        """Send the first chunk of the body, which is the last one if it is empty; returns how many bytes that was.

        Raises `Broken` when nothing can have been sent.
        """
        if self.failure is not None:
            raise self.failure
        if len(body) <= _CHUNK_BYTES_MAX:
            self._transport.write(_chunk(body) + _LAST_CHUNK)
        else:
            self._transport.write(_chunk(body[:_CHUNK_BYTES_MAX]))
        return min(len(body), _CHUNK_BYTES_MAX)

    async def send_rest(self, body: bytes, sent: int) -> None:
        """Send what `commit` has left over, no faster than the peer reads, and no more once it has answered.

        Raises `Broken`.
        """
        if sent == len(body):
            return
        for at in range(sent, len(body), _CHUNK_BYTES_MAX):
            while self._write_paused and not self._now.status:
                await self._news()
            if self._now.status:
                break
            self._transport.write(_chunk(body[at : at + _CHUNK_BYTES_MAX]))
        self._transport.write(_LAST_CHUNK)

    def send_no_body(self) -> None:
        """End a body that the peer has answered without wanting it, so that the connection can be used again."""
        self._transport.write(_LAST_CHUNK)

    async def status(self) -> int:
        """Wait for the status of the reply. Raises `Broken`."""
        while not self._now.status:
            await self._news()
        return self._now.status

    async def piece(self) -> bytes | None:
        """The next piece of the reply's body, None at its end. Raises `Broken`."""
        while not self._pieces:
            if self._now.complete:
                return None
            await self._news()
        piece = self._pieces.popleft()
        self._took(len(piece))
        return piece

    async def body(self, *, bytes_max: int) -> bytes:
        """The whole body of the reply. Raises `Broken`."""
        body = b""
        while (piece := await self.piece()) is not None:
            body += piece
            if len(body) > bytes_max:
                raise Broken(f"its answer is over {bytes_max} bytes")
        return body

    async def settle(self, *, within_s: float) -> None:
        """Let the last bytes of a reply that has said all come in, so that the connection can be used again."""
        if not self._now.complete:
            self.bound(within_s)
        with suppress(Broken):
            while not self._now.complete:
                await self._news()

    def finish(self) -> None:
        """End the exchange: keep the connection if it can carry another, else cut it."""
        reader, self._reader = self._reader, None
        self._overdue_at_s = None
        if self.failure is None and reader is not None and reader.complete and reader.keep_alive:
            self._pieces.clear()
            self._took(self._buffered)
            self._home.keep(self)
        else:
            self.fail(Broken("this end has left"))

    def fail(self, failure: Broken) -> None:
        """Cut the connection."""
        if self.failure is None:
            self.failure = failure
            self._home.drop(self)
        self._transport.abort()
        self._wake()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Belong to those that are open."""
        self._transport = cast(asyncio.Transport, transport)
        self._home.opened(self)

    def data_received(self, data: bytes) -> None:
        """Read on in the reply; between two exchanges a peer has nothing to say."""
        self.stale = False
        if self._reader is None or self.failure is not None:
            self.fail(Broken("it spoke without being asked"))
            return
        try:
            pieces = self._reader.feed(data)
        except BadReply as wrong:
            self.fail(Broken(f"its reply is not HTTP as accepted here: {wrong}"))
            return
        self._pieces.extend(pieces)
        self._buffered += sum(map(len, pieces))
        if self._buffered > _BUFFERED_BYTES_MAX and not self._read_paused:
            self._read_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """A peer that stops sending has left."""
        self.fail(Broken("it closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Belong to nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        self.fail(Broken(f"the connection broke ({exc})" if exc else "it closed the connection"))
        self._home.closed(self)

    def pause_writing(self) -> None:
        """Send no more for now."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """Go on sending."""
        self._write_paused = False
        self._wake()

    # Within.

    @property
    def _now(self) -> ReplyReader:
        assert self._reader is not None, "no exchange goes on"
        return self._reader

    def _took(self, count: int) -> None:
        """So many bytes are buffered no more."""
        self._buffered -= count
        if self._read_paused and self._buffered <= _BUFFERED_BYTES_MAX // 2:
            self._read_paused = False
            self._transport.resume_reading()

    async def _news(self) -> None:
        """Wait until something has changed. Raises `Broken` when nothing will."""
        if self.failure is not None:
            raise self.failure
        self._waiter = self._loop.create_future()
        self._waiting_since_s = self._loop.time()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check_time(self) -> None:
        """The time is up; but a slow reader of ours is no fault of the peer's, which has `grace_s` from its asking."""
        self._timer = None
        if self._overdue_at_s is None:
            return
        now_s = self._loop.time()
        waited_s = now_s - self._waiting_since_s if self._waiter is not None else 0.0
        left_s = max(self._overdue_at_s - now_s, self._home.grace_s - waited_s)
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_time)
        else:
            self.stale = False  # it stands; it is only silent
            self.fail(Overdue("it said nothing for too long"))


Connect = Callable[[Callable[[], Connection]], Awaitable[tuple[asyncio.BaseTransport, Connection]]]
"""Opens a connection for the protocol that a factory makes, as `loop.create_connection` does. Raises `OSError`."""


class Connections:
    """All connections to one node. At most `idle_max` wait for use, each for at most `idle_s` seconds.

    `idle_s` is less than the node's own patience with idle connections. Those used last are used first, so that what
    is not needed becomes idle and goes. `grace_s` is what a peer has when its time is up but it was not waited for.
    """

    def __init__(
        self, connect: Connect, *, idle_max: int, idle_s: float, connect_within_s: float, grace_s: float
    ) -> None:
        self.grace_s = grace_s
        self._connect = connect
        self._idle_max = idle_max
        self._idle_s = idle_s
        self._connect_within_s = connect_within_s
        self._loop = asyncio.get_running_loop()
        self._open: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._all_closed: asyncio.Future[None] | None = None
        self._ended = False

    async def take(self, *, within_s: float, fresh: bool = False) -> Connection:
        """A connection for one exchange: an idle one, unless it must be `fresh`, else a new one. Raises `Broken`."""
        if self._ended:
            raise Broken("this agent is stopping")
        if self._idle and not fresh:
            return self._idle.popitem()[0]
        within_s = min(within_s, self._connect_within_s)
        try:
            async with asyncio.timeout(within_s):
                _, connection = await self._connect(lambda: Connection(self))
        except TimeoutError as error:
            raise Broken(f"it could not be connected to within {within_s:g} s") from error
        except OSError as error:
            raise Broken(f"it could not be connected to: {error}") from error
        if self._ended:
            connection.fail(Broken("this agent is stopping"))
        if connection.failure is not None:
            raise connection.failure
        return connection

    async def aclose(self) -> None:
        """Cut every connection and wait until all are gone, even if cancelled."""
        self._ended = True
        cancelled: asyncio.CancelledError | None = None
        while self._open:
            for connection in tuple(self._open):
                connection.fail(Broken("this agent is stopping"))
            self._all_closed = self._loop.create_future()
            try:
                await self._all_closed
            except asyncio.CancelledError as again:
                cancelled = again
        if cancelled is not None:
            raise cancelled

    # What a connection tells.

    def opened(self, connection: Connection) -> None:
        """It stands."""
        self._open[connection] = None

    def keep(self, connection: Connection) -> None:
        """It is idle."""
        if self._ended:
            connection.fail(Broken("this agent is stopping"))
            return
        if len(self._idle) >= self._idle_max:
            next(iter(self._idle)).fail(Broken("enough others are idle"))
        connection.idle_since_s = self._loop.time()
        self._idle[connection] = None
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._idle_s, self._sweep)

    def drop(self, connection: Connection) -> None:
        """It must not be used any more."""
        self._idle.pop(connection, None)
        if not self._idle and self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def closed(self, connection: Connection) -> None:
        """It is gone."""
        self._open.pop(connection, None)
        if not self._open and self._all_closed is not None and not self._all_closed.done():
            self._all_closed.set_result(None)

    def _sweep(self) -> None:
        """Close what has been idle for too long; look again when the next one will have been."""
        self._sweeper = None
        while self._idle:
            oldest = next(iter(self._idle))
            left_s = oldest.idle_since_s + self._idle_s - self._loop.time()
            if left_s > 0:
                self._sweeper = self._loop.call_later(left_s, self._sweep)
                return
            oldest.fail(Broken("it was idle for long"))


def over_tcp(host: str, port: int, *, node_id: str, tls: ssl.SSLContext | None) -> Connect:
    """Connect to a host and port; with `tls`, only to who proves to be `node_id`."""

    async def connect(protocol: Callable[[], Connection]) -> tuple[asyncio.BaseTransport, Connection]:
        name = node_id if tls is not None else None
        return await asyncio.get_running_loop().create_connection(protocol, host, port, ssl=tls, server_hostname=name)

    return connect


def over_unix(path: str) -> Connect:
    """Connect to a socket of this machine."""

    async def connect(protocol: Callable[[], Connection]) -> tuple[asyncio.BaseTransport, Connection]:
        return await asyncio.get_running_loop().create_unix_connection(protocol, path)

    return connect


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
