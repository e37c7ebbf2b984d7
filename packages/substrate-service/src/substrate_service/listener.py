"""The strict listener: the HTTP/1.1 protocol that uvicorn serves our applications with.

uvicorn's own protocol bounds neither heads nor slow peers, answers malformed requests in words of its own and has no
way to cut a connection. This one does all of that, and asks of its surroundings only an event loop's clock and a
transport, so that it runs unchanged in virtual time over transports in memory.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import ssl
import urllib.parse
from collections.abc import Callable
from typing import Any, Final, cast

import uvicorn
from msgspec import Struct
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from substrate_seam.errors import Reason
from substrate_seam.events import Emit
from substrate_service.bodies import BodyReader, BodyRefused, ChunkedBody, SizedBody
from substrate_service.exchange import ABORT, WATCH, WHOLE, App, Exchange
from substrate_service.heads import Head, HeadReader, HeadRefused
from substrate_service.replies import reply_head

Headers = list[tuple[bytes, bytes]]
Refusal = Callable[[int, str, str], tuple[Headers, bytes]]
"""How an error of the listener looks: (status, `fc-error` reason, message) to fields and body. The listener itself
adds Content-Length and `Connection: close`."""

PEERCERT: Final = "substrate.peercert"
"""The extension that names a client whose certificate was verified: `{"names": [...]}`, common name and DNS names."""

_BUFFERED_MAX: Final = 65536
"""Bytes of a request body, or of requests sent ahead, that are held before reading stops."""


class ListenerLimits(Struct, frozen=True, kw_only=True):
    """How large a head may be, and how slow a peer.

    `head_s` runs from the first byte of a head, `idle_s` without any request, `body_stall_s` while the application
    waits for a body that does not come, `write_stall_s` without the peer reading anything; `discard_bytes` and
    `linger_s` bound what is read and thrown away after a request was refused.
    """

    head_bytes: int = 65536
    head_fields: int = 100
    head_s: float = 10.0
    idle_s: float = 75.0
    body_stall_s: float = 60.0
    write_stall_s: float = 30.0
    discard_bytes: int = 65536
    linger_s: float = 2.0


class StrictConfig(uvicorn.Config):
    """A uvicorn configuration that serves with `StrictProtocol`, and reads nothing from the environment."""

    def __init__(
        self, app: App, *, limits: ListenerLimits, refusal: Refusal, emit: Emit, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(
            cast(Any, app),  # uvicorn names the messages one by one; ours are more
            http=StrictProtocol,
            interface="asgi3",
            ws="none",
            lifespan="off",  # what an application needs is opened and closed by whoever wires it
            workers=1,
            proxy_headers=False,
            forwarded_allow_ips=[],
            server_header=False,
            log_config=None,
            ssl_context_factory=(lambda _config, _default: tls) if tls is not None else None,
        )
        self.limits = limits
        self.refusal = refusal
        self.emit = emit


def strict_config(
    app: App,
    *,
    refusal: Refusal,
    emit: Emit,
    limits: ListenerLimits | None = None,
    tls: ssl.SSLContext | None = None,
) -> StrictConfig:
    """A loaded configuration for `uvicorn.Server`, or for `protocol_factory`."""
    config = StrictConfig(app, limits=limits or ListenerLimits(), refusal=refusal, emit=emit, tls=tls)
    config.load()
    return config


def protocol_factory(
    config: StrictConfig, state: ServerState, *, loop: asyncio.AbstractEventLoop | None = None
) -> Callable[[], StrictProtocol]:
    """What a loop's `create_server`, or a simulated network, makes its connections with."""
    return functools.partial(StrictProtocol, config, state, {}, loop)


class StrictProtocol(asyncio.Protocol):
    """One connection: reads a request at a time, hands it to the application, and outwaits nobody."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        assert isinstance(config, StrictConfig)
        self._config = config
        self._limits = config.limits
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self._context = contextvars.copy_context()
        self._head: HeadReader | None = None  # while the next request is being read
        self._exchange: Exchange | None = None  # from a whole head until the reply is complete
        self._unread: BodyReader | None = None  # of an answered request, while its body is thrown away
        self._discarded = 0
        self._ahead = b""  # sent before the reply to the request before
        self._ending = False
        self._stopping = False
        self._late: Callable[[], object] | None = None  # what to do at the deadline, if there is one
        self._late_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._flush_check: asyncio.TimerHandle | None = None
        self._written = 0
        self._flushed = 0
        self._read_paused = False
        self.congested = False
        self._may_write = asyncio.Event()
        self._closed: asyncio.Future[None] | None = None

    # The connection comes and goes.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(cast(Any, self))
        self._about = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": get_local_addr(self._transport),
            "client": get_remote_addr(self._transport),
            "scheme": "https" if is_ssl(self._transport) else "http",
            "root_path": "",
        }
        self._extensions: dict[str, Any] = {ABORT: {}}
        if names := _verified_names(transport.get_extra_info("peercert")):
            self._extensions[PEERCERT] = {"names": names}
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application, if one is at work, and stop every timer."""
        self._ending = True
        self._late = None
        for timer in (self._timer, self._flush_check):
            if timer is not None:
                timer.cancel()
        if self._exchange is not None:
            self._exchange.leave()
        self.resume_writing()
        self._state.connections.discard(cast(Any, self))
        if self._closed is not None:
            self._closed.set_result(None)

    def eof_received(self) -> bool | None:
        """A peer that stops sending has left: the transport closes as soon as it has written what it holds."""
        self._watch_flush()
        return None

    def shutdown(self) -> None:
        """Serve no further request: close now if none is at work (uvicorn calls this, and so may anyone)."""
        self._stopping = True
        if self._exchange is None and not self._ending:
            self._close()

    def abort(self) -> None:
        """Cut the connection at once; nothing that is still unsent goes out."""
        self._ending = True
        self._transport.abort()

    async def closed(self) -> None:
        """Return once the connection is gone."""
        if self in cast(set[object], self._state.connections):
            self._closed = self._closed or self._loop.create_future()
            await asyncio.shield(self._closed)

    # Bytes come in.

    def data_received(self, data: bytes) -> None:
        """Take bytes through head, body, and whatever the peer sent ahead."""
        if self._ahead:
            data, self._ahead = self._ahead + data, b""
        while data and not self._ending:
            if self._head is not None:
                data = self._read_head(self._head, data)
            elif self._exchange is not None and not self._exchange.reader.whole:
                data = self._read_body(self._exchange, data)
            elif self._exchange is not None:
                self._ahead = data
                if len(data) > _BUFFERED_MAX:
                    self._pause_reading()
                return
            else:
                data = self._discard(data)

    def _read_head(self, reader: HeadReader, data: bytes) -> bytes:
        began = reader.began
        try:
            head, rest = reader.feed(data)
        except HeadRefused as refused:
            self._refuse(refused.status, refused.message)
            return b""
        if head is not None:
            self._begin(head)
        elif not began:
            self._set_deadline(self._limits.head_s, self._head_is_late)
        return rest

    def _begin(self, head: Head) -> None:
        self._late = None
        self._head = None
        body = ChunkedBody() if head.content_length is None else SizedBody(head.content_length)
        raw_path, _, query = head.target.partition(b"?")
        path = raw_path.decode("ascii")
        exchange = self._exchange = Exchange(head, body, self, self._config.emit)
        scope = {
            **self._about,
            "method": head.method,
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": head.headers,
            "state": self._app_state.copy(),
            "extensions": {**self._extensions, WATCH: exchange.watch, WHOLE: exchange.whole},
        }
        # Every request starts from the connection's context, not from that of the request before it.
        task = self._loop.create_task(exchange.run(self._config.loaded_app, scope), context=self._context.copy())
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _read_body(self, exchange: Exchange, data: bytes) -> bytes:
        self._late = None
        try:
            body, rest = exchange.reader.take(data)
        except BodyRefused as refused:
            self._fail(exchange, 400, Reason.BAD_REQUEST, f"the request body is malformed: {refused}")
            return b""
        exchange.take(body)
        if len(exchange.body) > _BUFFERED_MAX:
            self._pause_reading()
        return rest

    def _discard(self, data: bytes) -> bytes:
        """Throw away the body of an answered request, within bounds, to come to the next request."""
        assert self._unread is not None
        try:
            _, rest = self._unread.take(data)
        except BodyRefused:
            self._close()
            return b""
        self._discarded += len(data) - len(rest)
        if self._discarded > self._limits.discard_bytes:
            self._linger()
        elif self._unread.whole:
            self._await_request()
        return rest

    # Peers that are late.

    def _head_is_late(self) -> None:
        self._refuse(408, f"the request head did not arrive within {self._limits.head_s:g} s")

    def _body_is_late(self, exchange: Exchange) -> None:
        message = f"nothing of the request body arrived for {self._limits.body_stall_s:g} s"
        self._fail(exchange, 408, Reason.BODY_TIMEOUT, message)

    def _set_deadline(self, delay_s: float, late: Callable[[], object]) -> None:
        """Call `late` in `delay_s` seconds, instead of what was to be called before.

        A timer that runs out earlier is kept and set anew then: most deadlines are met, and timers cost more than them.
        """
        self._late, self._late_at_s = late, self._loop.time() + delay_s
        if self._timer is not None and self._timer.when() > self._late_at_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._late_at_s, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        if self._late is None:
            return
        if self._loop.time() < self._late_at_s:
            self._timer = self._loop.call_at(self._late_at_s, self._time_is_up)
            return
        late, self._late = self._late, None
        late()

    def _watch_flush(self) -> None:
        """See to it that a peer which reads nothing of what is still unsent is cut off."""
        if self._flush_check is None:
            self._flushed = self._written - self._transport.get_write_buffer_size()
            self._flush_check = self._loop.call_later(self._limits.write_stall_s, self._check_flush)

    def _check_flush(self) -> None:
        self._flush_check = None
        unsent = self._transport.get_write_buffer_size()
        stuck = self._written - unsent <= self._flushed
        if stuck and (unsent or self._transport.is_closing()):
            self.abort()
        elif unsent or self._transport.is_closing():
            self._watch_flush()

    def pause_writing(self) -> None:
        """Let the application wait: the peer reads more slowly than it writes."""
        self.congested = True
        self._may_write.clear()
        self._watch_flush()

    def resume_writing(self) -> None:
        """Let the application go on."""
        self.congested = False
        self._may_write.set()

    # What an exchange asks of its connection.

    async def writable(self) -> None:
        """Return once the peer reads fast enough, or is gone."""
        await self._may_write.wait()

    def write(self, data: bytes) -> None:
        """Send bytes, in order."""
        self._written += len(data)
        self._transport.write(data)

    def default_headers(self) -> Headers:
        """Fields of every reply."""
        return self._state.default_headers

    def wants_body(self, exchange: Exchange) -> None:
        """Read on: the application waits for the body, or for the peer to leave."""
        if exchange.reader.whole:
            return  # what is sent ahead of its time stays bounded, and a hang-up is seen without reading on
        self._resume_reading()
        if not exchange.reply_started and self._late is None:
            self._set_deadline(self._limits.body_stall_s, functools.partial(self._body_is_late, exchange))

    def may_stay(self, exchange: Exchange) -> bool:
        """Whether another request may follow this reply."""
        if self._stopping or not exchange.head.keep_alive:
            return False
        if exchange.reader.whole or (left := exchange.reader.left()) is None:
            return True
        # A peer that was told to wait for 100 may now send the body or not: only chunks would tell which.
        return not exchange.owes_continue and left <= self._limits.discard_bytes

    def replied(self, exchange: Exchange, *, stay: bool) -> None:
        """The reply is complete: go on to the next request, or end the connection."""
        self._exchange = None
        self._state.total_requests += 1
        self._late = None
        if self._ending:
            return
        self._resume_reading()
        if not stay or self._stopping:
            if exchange.reader.whole and not self._ahead:
                self._close()
            else:
                self._linger()
        elif not exchange.reader.whole:
            self._unread, self._discarded = exchange.reader, 0
            self._set_deadline(self._limits.idle_s, self._close)
        else:
            self._await_request()
            if self._ahead:
                self.data_received(b"")

    def refusal(self, status: int, reason: Reason, message: str, *, bodiless: bool = False) -> bytes:
        """A whole reply that says what is wrong, after which the connection closes; only its head if `bodiless`."""
        headers, body = self._config.refusal(status, reason, message)
        fields = [*self._state.default_headers, *headers, (b"content-length", b"%d" % len(body))]
        head = reply_head(status, fields, to_head_request=bodiless, may_stay=False)
        return head.data if bodiless else head.data + body

    # Ends.

    def _await_request(self) -> None:
        self._head = HeadReader(bytes_max=self._limits.head_bytes, fields_max=self._limits.head_fields)
        self._unread = None
        self._set_deadline(self._limits.idle_s, self._close)

    def _refuse(self, status: int, message: str) -> None:
        """Answer a head that became no request; where the next one would begin is anybody's guess."""
        self._head = None
        self.write(self.refusal(status, Reason.BAD_REQUEST, message))
        self._linger()

    def _fail(self, exchange: Exchange, status: int, reason: Reason, message: str) -> None:
        """End an exchange whose body went wrong: with an answer if none has begun, else at once."""
        if exchange.reply_started:
            exchange.leave()
            self.abort()
        else:
            exchange.answer(status, reason, message)

    def _linger(self) -> None:
        """Close, but first read on for a moment: a reset could destroy the reply before the peer has seen it."""
        self._ending = True
        self._head = None
        self._resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._set_deadline(self._limits.linger_s, self._close)

    def _close(self) -> None:
        """Close once everything is sent; a peer that does not read it is cut off."""
        self._ending = True
        self._late = None
        self._transport.close()
        self._watch_flush()

    def _pause_reading(self) -> None:
        if not self._read_paused:
            self._read_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()


def _verified_names(certificate: dict[str, Any] | None) -> list[str]:
    """Common name and DNS names of a certificate that TLS has verified; empty when there is none."""
    if not certificate:  # ssl gives an empty one when it did not verify
        return []
    common = [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName"]
    alternative = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    return list(dict.fromkeys([*common, *alternative]))
