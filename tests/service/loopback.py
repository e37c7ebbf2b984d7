"""A strict listener on a real socket, and a peer that speaks to it in raw bytes."""

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field

from uvicorn.server import ServerState

from substrate_seam.events import Event
from substrate_service.listener import ListenerLimits, protocol_factory, strict_config

PATIENCE_S = 10.0
"""A test that waits longer than this has found a hang."""


def refusal(status, reason, message):
    """An error as these tests want it to look."""
    return [(b"content-type", b"text/plain"), (b"fc-error", reason.encode())], f"refused: {message}\n".encode()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Peer:
    """One connection to the listener."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self, *, to: str = "GET") -> Reply:
        """Read exactly one reply."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status_line, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
            headers = {name: value for name, _, value in (line.partition(": ") for line in lines)}
            assert len(headers) == len(lines), f"a field twice in {lines}"
            version, status, *_ = status_line.split(" ")
            assert version == "HTTP/1.1"
            return Reply(int(status), headers, await self._body(int(status), headers, to=to))

    async def _body(self, status, headers, *, to):
        if status < 200 or status in {204, 304} or to == "HEAD":
            return b""
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        assert headers["transfer-encoding"] == "chunked"
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def rest(self) -> bytes:
        """Whatever comes until the listener closes; a reset ends it too."""
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionResetError):
                while piece := await self.reader.read(65536):
                    data += piece
        return data

    def hang_up(self) -> None:
        self.writer.transport.abort()


@dataclass
class Served:
    """A listener at work: where it is, what it told, and what it still holds."""

    port: int
    state: ServerState
    events: list[Event] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def peer(self, *, tls=None, receive_buffer_bytes=None):
        sock = socket.socket()
        if receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.setblocking(False)  # the name says it
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        name = {"server_hostname": "localhost"} if tls else {}
        reader, writer = await asyncio.open_connection(sock=sock, ssl=tls, **name, limit=2**18)
        try:
            yield Peer(reader, writer)
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def served(app, *, tls=None, **limits):
    """Serve `app` on a free port of the loopback; at the end nothing of it may be left."""
    events = []
    config = strict_config(app, limits=ListenerLimits(**limits), refusal=refusal, emit=events.append, tls=tls)
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        protocol_factory(config, state), "127.0.0.1", 0, ssl=config.ssl
    )
    try:
        yield Served(server.sockets[0].getsockname()[1], state, events)
    finally:
        server.close()
        for connection in list(state.connections):
            connection.abort()
        async with asyncio.timeout(PATIENCE_S):
            for connection in list(state.connections):
                await connection.closed()
            if state.tasks:
                await asyncio.wait(state.tasks)
        assert not state.connections


async def echo(scope, receive, send):
    """Answer with what was asked, once the whole body is here."""
    body = await whole_body(receive)
    about = f"{scope['method']} {scope['raw_path'].decode()} {scope['query_string'].decode()} ".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"echo")]})
    await send({"type": "http.response.body", "body": about + body})


async def whole_body(receive):
    body, more = b"", True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        body, more = body + message["body"], message["more_body"]
    return body


async def answer(send, status=200, body=b"", headers=()):
    """Send a whole reply with a Content-Length."""
    fields = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
