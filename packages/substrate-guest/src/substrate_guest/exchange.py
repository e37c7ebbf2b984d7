"""One HTTP/1.1 exchange on a connected socket: a whole request in, a framed reply out, then the connection is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11

from substrate_guest.app import Request
from substrate_guest.heads import is_plain_response, plain_request, response_head

if TYPE_CHECKING:
    import socket

HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 64 * 1024 * 1024
REQUEST_S = 60.0
LINGER_S = 1.0
RECEIVE_BYTES = 256 * 1024
JOINED_BYTES_MAX = 64 * 1024

RawHeaders = Iterable[tuple[bytes, bytes]]
# These say how a reply is framed and how long its connection lives, which is ours to say.
FRAMING = {b"connection", b"keep-alive", b"transfer-encoding", b"trailer", b"upgrade"}
WITHOUT_BODY = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}


class Refused(Exception):
    """The request is answered without asking the workload; `status` and `text` are the answer."""

    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text
        super().__init__(text)


class Exchange:
    """The request and the reply of one connection; the socket stays its owner's."""

    def __init__(self, sock: socket.socket, received: bytes = b"") -> None:
        sock.settimeout(0)
        self.began_ns = time.monotonic_ns()
        """When the connection was made, by the monotonic clock."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._received = received
        self._http: h11.Connection | None = None  # until something is not plain
        self._method = b""
        self._head: tuple[int, list[tuple[bytes, bytes]]] | None = None  # said by the workload, not sent yet
        self._plain = False  # what it said
        self.bodiless = False
        """Whether HTTP gives this reply no body: pieces are then dropped."""
        self._left: asyncio.Event | None = None
        self._unread = True
        self.started = False
        """Whether bytes of the reply have gone out: from then on it can only be completed or cut."""
        self.ended = False
        """Whether the reply is complete."""

    async def request(self) -> Request:
        """The request, whole.

        Raises `Refused` when it is malformed, too big or too slow, and `ConnectionError` when the peer leaves first.
        """
        request = self._request_at_hand()
        if request is not None:
            return request
        try:
            async with asyncio.timeout(REQUEST_S):
                return await self._read_request()
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, f"not an HTTP request: {error}") from error
        except TimeoutError as error:
            raise Refused(408, f"the request was not complete after {REQUEST_S:.0f} s") from error

    def _request_at_hand(self) -> Request | None:
        """A request that is there already, whole and plain."""
        with suppress(BlockingIOError):
            self._received = self._received or self._sock.recv(RECEIVE_BYTES)
        head = plain_request(self._received)
        if head is None or len(self._received) < head.at_byte + head.length_bytes:
            return None
        self._method, self._unread = head.method.encode(), False
        body = self._received[head.at_byte : head.at_byte + head.length_bytes]
        return Request(head.method, head.target, head.headers, body)

    async def _read_request(self) -> Request:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        if self._received:  # nothing at all would mean the end to h11
            self._http.receive_data(self._received)
        head = await self._event()
        if isinstance(head, h11.ConnectionClosed):
            raise ConnectionResetError("the peer left before it sent a request")
        assert isinstance(head, h11.Request)
        self._method = head.method
        if head.method == b"CONNECT":
            raise Refused(501, "CONNECT is not supported")
        declared = next((int(value) for name, value in head.headers if name == b"content-length"), 0)
        if declared > BODY_BYTES_MAX:
            raise Refused(413, f"the body has {declared} bytes, accepted are {BODY_BYTES_MAX}")
        if self._http.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            await self._loop.sock_sendall(self._sock, self._http.send(go_on) or b"")
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers)
        body = await self._read_body()
        self._unread = False
        return Request(head.method.decode("ascii"), head.target.decode("latin-1"), headers, body)

    async def _read_body(self) -> bytes:
        pieces: list[bytes] = []
        size_bytes = 0
        while isinstance(event := await self._event(), h11.Data):
            pieces.append(event.data)
            size_bytes += len(event.data)
            if size_bytes > BODY_BYTES_MAX:
                raise Refused(413, f"the body has more than {BODY_BYTES_MAX} bytes")
        return b"".join(pieces)

    async def _event(self) -> h11.Event:
        assert self._http is not None
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._loop.sock_recv(self._sock, RECEIVE_BYTES))
        assert not isinstance(event, type)
        return event

    def begin(self, status: int, headers: RawHeaders) -> None:
        """Say the head of the reply; it goes out with the first piece, so until then it can still be replaced.

        Raises `ValueError` when it is not a head that HTTP knows.
        """
        if self._head is not None or self.started:
            raise ValueError("the reply has a head already")
        dropped = FRAMING | {b"content-length"} if status == HTTPStatus.NO_CONTENT else FRAMING
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        self._plain = is_plain_response(status, kept)
        if not self._plain:
            try:
                _response(status, kept)
            except h11.LocalProtocolError as error:
                raise ValueError(f"not an HTTP response: {error}") from error
        self.bodiless = self._method == b"HEAD" or status in WITHOUT_BODY
        self._head = status, kept

    async def write(self, piece: bytes) -> None:
        """Send a piece of the body, at once; raises `OSError` when the peer has left, `ValueError` for one too many."""
        if piece:
            await self._send(self._framed(piece, last=False))

    async def end(self, last: bytes = b"") -> None:
        """Send the rest of the reply; without an earlier piece its length is known, and told.

        Raises like `write`, and `ValueError` when less was sent than the head declared.
        """
        if self._head is not None and self._plain and not self.bodiless:
            (status, headers), self._head = self._head, None
            frames = [response_head(status, headers, len(last)), last]
        else:
            frames = self._framed(last, last=True)
        await self._send(frames)
        self.ended = True
        if self._left is not None:
            self._left.set()

    async def reply(self, status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> None:
        """Answer with `text` and nothing else, whatever state the exchange is in; nothing when bytes have gone out."""
        if self.started:
            return
        self._head = None
        await self._send([plain_reply(status, text, content_type, with_body=self._method != b"HEAD")])
        self.ended = True

    async def refuse(self, refused: Refused) -> None:
        """Answer with the refusal, so that the peer can read it even while it is still sending; never raises."""
        with suppress(OSError):
            await self.reply(refused.status, f"{refused.text}\n")
            # Closing a socket with unread bytes resets it, and the peer would lose the answer.
            async with asyncio.timeout(LINGER_S):
                while self._unread and await self._loop.sock_recv(self._sock, RECEIVE_BYTES):
                    pass

    async def while_awaited(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, and stop when the peer hangs up; what goes wrong comes as an `ExceptionGroup`."""
        async with asyncio.TaskGroup() as tasks:
            leaving = tasks.create_task(self._leave())
            await work
            leaving.cancel()

    async def _leave(self) -> None:
        await self.peer_left()
        if not self.ended:
            raise ConnectionResetError("the peer left before the reply was complete")

    async def peer_left(self) -> None:
        """Return when the peer has hung up or the reply is complete."""
        if self._left is None:
            self._left = asyncio.Event()
            if self.ended:
                self._left.set()
            self._loop.add_reader(self._sock, self._on_readable, self._left)
        await self._left.wait()

    def _on_readable(self, left: asyncio.Event) -> None:
        self._loop.remove_reader(self._sock)
        left.set()  # the request is complete, so there is nothing to read but the end

    def close(self) -> None:
        """Stop watching the socket."""
        if self._left is not None:
            self._loop.remove_reader(self._sock)

    def _framed(self, piece: bytes, *, last: bool) -> list[bytes]:
        http = self._http = self._http or _asked(self._method)
        try:
            frames = self._head_frames(http, len(piece) if last else None)
            if piece and not self.bodiless:
                frames.append(http.send(h11.Data(data=piece)) or b"")
            if last:
                frames.append(http.send(h11.EndOfMessage()) or b"")
        except h11.LocalProtocolError as error:
            raise ValueError(f"the reply breaks HTTP: {error}") from error
        return frames

    def _head_frames(self, http: h11.Connection, length_bytes: int | None) -> list[bytes]:
        if self._head is None:
            return []
        (status, headers), self._head = self._head, None
        if length_bytes is not None and status not in WITHOUT_BODY and not _declares_length(headers):
            headers = [*headers, (b"content-length", b"%d" % length_bytes)]
        return [http.send(_response(status, headers)) or b""]

    async def _send(self, frames: list[bytes]) -> None:
        self.started = True
        if sum(map(len, frames)) <= JOINED_BYTES_MAX:
            frames = [b"".join(frames)]
        for frame in filter(None, frames):  # the end may be no bytes at all, and its reader gone
            await self._loop.sock_sendall(self._sock, frame)


def plain_reply(status: int, text: str, content_type: str, *, with_body: bool = True) -> bytes:
    """A whole reply; made by hand, because it must be possible in any state of the exchange."""
    body = text.encode(errors="replace")
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {content_type}\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")


def _asked(method: bytes) -> h11.Connection:
    """A connection of h11's that has had a request with this method, of which only the answer matters now."""
    http = h11.Connection(h11.SERVER)
    http.receive_data((method or b"GET") + b" / HTTP/1.1\r\nhost: vsock\r\n\r\n")
    while not isinstance(http.next_event(), h11.EndOfMessage):
        pass
    return http


def _response(status: int, headers: list[tuple[bytes, bytes]]) -> h11.Response:
    return h11.Response(status_code=status, headers=[*headers, (b"connection", b"close")])


def _declares_length(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-length" for name, _ in headers)
