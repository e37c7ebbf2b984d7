"""HTTP over hybrid vsock: the CONNECT line, one exchange, and nothing more on that connection.

The CONNECT line and the request leave in one write; whatever follows the `OK` line belongs to HTTP.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterable
from typing import cast

from substrate_seam.errors import GuestFailed, GuestTimeout, SubstrateError
from substrate_seam.http1 import BadReply, ReplyReader
from substrate_seam.invocation import Headers

_GREETING = re.compile(rb"OK [0-9]{1,10}\r?")
_GREETING_BYTES_MAX = 32
_BUFFERED_BYTES_MAX = 262_144
_PIECE_BYTES = 128
"""What a piece of the body costs beside its bytes: a guest that dribbles must not fill the memory either."""
_ONE_WRITE_BYTES_MAX = 65_536


def request_head(method: str, target: str, headers: Iterable[tuple[bytes, bytes]], body_bytes: int) -> bytes:
    """The bytes of a request's head. Raises `ValueError` if a field would break out of its line."""
    lines = [f"{method} {target} HTTP/1.1".encode("latin-1")]
    lines += [name + b": " + value for name, value in headers]
    lines += [b"content-length: %d" % body_bytes, b"connection: close", b"", b""]
    head = b"\r\n".join(lines)
    breaks = len(lines) - 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head or target.count(" "):
        raise ValueError("a line break, a NUL or a blank where HTTP allows none")
    return head


class Exchange(asyncio.Protocol):
    """One request and its reply on one connection to a guest.

    `written` turns true when the first byte of the request may have left: from then on the guest may have acted. An
    exchange that has failed or was closed before that never writes. Iterating it gives the pieces of the body; it ends
    without an error only when the reply is whole.
    """

    __slots__ = (
        "_buffered",
        "_clock",
        "_greeting",
        "_loop",
        "_on_expiry",
        "_paused",
        "_pieces",
        "_port",
        "_reader",
        "_request",
        "_run_within_s",
        "_timer",
        "_transport",
        "_waiter",
        "body_bytes",
        "ended_s",
        "error",
        "head_s",
        "started_s",
        "written",
    )

    def __init__(
        self,
        port: int,
        head: bytes,
        body: bytes = b"",
        *,
        head_request: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._request = [b"CONNECT %d\n" % port + head, body]
        self._port = port
        self._reader = ReplyReader(head_request=head_request)
        self._greeting: bytes | None = b""
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._run_within_s: float | None = None
        self._on_expiry: Callable[[], None] = _nothing
        self.error: SubstrateError | None = None
        self.written = False
        self.started_s = 0.0
        self.head_s: float | None = None
        self.ended_s: float | None = None
        self.body_bytes = 0

    # What the caller sees.

    @property
    def status(self) -> int:
        """The status, once `head` has returned."""
        return self._reader.status

    @property
    def headers(self) -> Headers:
        """The fields of the head, once `head` has returned."""
        return self._reader.headers

    @property
    def whole(self) -> bool:
        """Whether the last byte of the reply has arrived."""
        return self._reader.complete

    async def head(self) -> None:
        """Wait for the head of the reply. Raises `GuestFailed` or `GuestTimeout`."""
        while not self._reader.status:
            if self.error is not None:
                raise self.error
            await self._wait()

    def __aiter__(self) -> Exchange:
        """Iterate over the pieces of the body."""
        return self

    async def __anext__(self) -> bytes:
        """Give the next piece. Raises `GuestFailed` or `GuestTimeout` when the guest does not finish."""
        while True:
            if self._pieces:
                return self._take()
            if self._reader.complete:
                raise StopAsyncIteration
            if self.error is not None:
                raise self.error
            await self._wait()

    def bound(self, run_within_s: float, *, on_expiry: Callable[[], None]) -> None:
        """Let the exchange take at most this long from its first byte on; `on_expiry` then ends the guest.

        It does so even if the reply is whole by then and only its reader is slow: no client's pace owns a guest.
        """
        self._run_within_s, self._on_expiry = run_within_s, on_expiry

    def fail(self, error: SubstrateError) -> None:
        """End the exchange with `error`, unless its reply is whole already."""
        if self.error is None and not self._reader.complete:
            self.error = error
            self._end()

    def close(self) -> None:
        """Drop the connection, or never make use of it; nothing is left on the loop. A whole reply stays readable."""
        self._on_expiry = _nothing
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.error is None and not self._reader.complete:
            self.fail(GuestFailed("it was given up before its reply was whole"))

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send everything at once."""
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one but in name
        if self.error is not None:  # ended while it connected: the guest must not get the request any more
            transport.abort()
            return
        self.written = True
        self.started_s = self._clock()
        if self._run_within_s is not None:
            self._timer = self._loop.call_later(self._run_within_s, self._expire, self._run_within_s)
        head, body = self._request
        self._request = []
        if len(body) <= _ONE_WRITE_BYTES_MAX:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the guest: first its `OK` line, then HTTP."""
        if self.error is not None or self._reader.complete:
            return
        if self._greeting is not None:
            rest = self._greet(data)
            if rest is None:
                return
            data = rest
        try:
            piece = b"".join(self._reader.feed(data))
        except BadReply as wrong:
            self.fail(GuestFailed(f"the guest's reply is not HTTP as accepted here: {wrong}"))
            return
        if self.head_s is None and self._reader.status:
            self.head_s = self._clock()
        if piece:
            self._pieces.append(piece)
            self._buffered += len(piece) + _PIECE_BYTES
            self.body_bytes += len(piece)
        if self._reader.complete:
            self._end()
            return
        if self._buffered > _BUFFERED_BYTES_MAX and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail, unless the reply was whole."""
        self._transport = None
        if self._reader.complete:
            return
        if self._greeting is not None:
            said = "before it answered CONNECT"
        elif not self._reader.status:
            said = "before the head of its reply"
        else:
            said = f"after {self.body_bytes} bytes of its reply's body, before the end"
        self.fail(GuestFailed(f"the guest closed the connection {said}" + (f" ({exc})" if exc else "")))

    # Within.

    def _greet(self, data: bytes) -> bytes | None:
        assert self._greeting is not None
        self._greeting += data
        line, newline, rest = self._greeting.partition(b"\n")
        if newline and _GREETING.fullmatch(line):
            self._greeting = None
            return rest
        if newline or len(line) > _GREETING_BYTES_MAX:
            self.fail(GuestFailed(f"the guest answered CONNECT {self._port} with {line[:32]!r}, not with OK"))
        return None

    def _take(self) -> bytes:
        piece = self._pieces.popleft()
        self._buffered -= len(piece) + _PIECE_BYTES
        if self._paused and self._buffered <= _BUFFERED_BYTES_MAX // 2 and self._transport is not None:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return piece

    def _expire(self, run_within_s: float) -> None:
        self.fail(
            GuestTimeout(
                f"the guest did not finish within {run_within_s:.1f} s",
                hint="Raise `requestTimeout` of the workload if it needs longer.",
            )
        )
        self._on_expiry()

    def _end(self) -> None:
        """No byte is awaited any more."""
        self.ended_s = self._clock()
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    async def _wait(self) -> None:
        waiter = self._waiter = self._loop.create_future()
        await waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _nothing() -> None:
    """What expires when there is nothing to end."""
