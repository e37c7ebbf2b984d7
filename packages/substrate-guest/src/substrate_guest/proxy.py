"""Any HTTP server as a workload: it runs in the guest, and requests are handed to it one connection each."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import h11

from substrate_guest.command import Command, ended, words
from substrate_guest.exchange import FRAMING, HEAD_BYTES_MAX, RECEIVE_BYTES

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from substrate_guest.app import Request
    from substrate_guest.exchange import Exchange
    from substrate_guest.identity import Identity

PAUSE_S = 0.02
"""Between two looks at a server that is starting."""


class HttpWorkload:
    """A server that listens on `port` of the loopback; it is told the number in `PORT`, and need not know of us."""

    def __init__(self, command: Command, port: int) -> None:
        self._command = command
        self.rests = False
        self._port = port

    async def prime(self) -> None:
        """See `Workload.prime`; raises `FileNotFoundError` when there is no such program."""
        self._command.check()

    async def start(self, duties: asyncio.TaskGroup) -> None:
        """See `Workload.start`; returns when the server accepts connections, raises `RuntimeError` when it ended."""
        await supervised(self._command, duties, self._listens, environ={"PORT": str(self._port)})

    async def restored(self, identity: Identity) -> None:
        """See `Workload.restored`; the server knows nothing of it."""

    async def respond(self, request: Request, exchange: Exchange) -> None:
        """See `Workload.respond`; raises `OSError` or `h11.RemoteProtocolError` for a server that does not answer."""
        await exchange.while_awaited(forward(request, exchange, self._connection))

    async def _listens(self) -> bool:
        with suppress(OSError):
            (await self._connection()).close()
            return True
        return False

    async def _connection(self) -> socket.socket:
        return await connected(socket.AF_INET, ("127.0.0.1", self._port))


async def supervised(
    command: Command,
    duties: asyncio.TaskGroup,
    serves: Callable[[], Awaitable[bool]],
    *,
    environ: Mapping[str, str],
    descriptors: Iterable[int] = (),
) -> None:
    """Run a server for as long as `duties` last, and let them fail when it ends; returns when it serves.

    Raises `OSError` or `RuntimeError` when it does not come up.
    """
    up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        try:
            async with command.running(environ=environ, descriptors=descriptors) as process:
                if await _came_up(process, serves):
                    up.set_result(None)
                await ended(process)
                raise RuntimeError(f"the server ended with {words(await process.wait())}")
        except (OSError, RuntimeError) as error:
            if up.done():
                raise
            up.set_exception(error)

    duties.create_task(run(), name="server")
    await up


async def _came_up(process: Process, serves: Callable[[], Awaitable[bool]]) -> bool:
    async def serving() -> None:
        while not await serves():  # noqa: ASYNC110  # a server of any kind, which knows nobody to tell
            await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as race:
        up, end = race.create_task(serving()), race.create_task(ended(process))
        await asyncio.wait({up, end}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        end.cancel()
    return not up.cancelled()


async def connected(family: socket.AddressFamily, address: object) -> socket.socket:
    """A connection to a server in this guest. Raises `OSError`."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]  # any family's
    except BaseException:
        sock.close()
        raise
    return sock


async def forward(request: Request, exchange: Exchange, connect: Callable[[], Awaitable[socket.socket]]) -> None:
    """Have a server answer `request`, and pass its reply on piece by piece.

    Raises `OSError` when it can't be reached or leaves, and `h11.ProtocolError` when it breaks HTTP.
    """
    with await connect() as sock:
        server = Conversation(sock)
        await server.ask(request)
        while True:
            event = await server.event()
            if isinstance(event, h11.Response):
                exchange.begin(event.status_code, event.headers)
            elif isinstance(event, h11.Data):
                await exchange.write(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("the server closed the connection without a reply")
    await exchange.end()


class Conversation:
    """One request to a server, and the events of its reply."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def ask(self, request: Request) -> None:
        """Send the request, whole."""
        given = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers]
        headers = [(name, value) for name, value in given if name not in FRAMING | {b"content-length", b"expect"}]
        headers += [(b"content-length", b"%d" % len(request.body)), (b"connection", b"close")]
        head = h11.Request(method=request.method, target=request.target.encode("latin-1"), headers=headers)
        frames = [self._http.send(event) for event in (head, h11.Data(data=request.body), h11.EndOfMessage())]
        with suppress(ConnectionError):  # it may answer, and leave, before it has read all
            await self._loop.sock_sendall(self._sock, b"".join(frame or b"" for frame in frames))

    async def event(self) -> h11.Event:
        """The next event of the reply. Raises `h11.RemoteProtocolError` and `OSError`."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._loop.sock_recv(self._sock, RECEIVE_BYTES))
        assert not isinstance(event, type)
        return event
