"""What a guest finds when it dials out: for each port that somebody answers, a socket beside the guest's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from substrate_node.processes.addresses import addressable
from substrate_node.vmm import Inbound

BACKLOG = 4096
"""Firecracker connects on its main thread: with the queue full, the whole machine would stand still until we accept."""
ACCEPTED_AT_ONCE = 64
OPEN_MAX = 64
"""Connections of one guest that may be open at once; further ones are closed at once."""
PAUSE_S = 0.001
"""The loop's rest between two rounds: a guest that floods us with connections waits, not the daemon."""


class Listeners:
    """Listens on `<uds>_<port>` for each port of `inbound`, from before the guest runs until `close`."""

    def __init__(self, uds: Path, inbound: Inbound, *, hand_over: Callable[[Path], None]) -> None:
        """Bind and listen; `hand_over` lets the machine's process use a socket file. Raises `OSError`."""
        self._loop = asyncio.get_running_loop()
        self._inbound = inbound
        self._sockets: dict[int, socket.socket] = {}
        self._pauses: dict[int, asyncio.TimerHandle] = {}
        self._attaching: set[asyncio.Task[None]] = set()
        self._transports: list[asyncio.BaseTransport] = []
        try:
            for port in inbound:
                self._bind(port, uds.with_name(f"{uds.name}_{port}"), hand_over)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Listen no more. Connections already made are their protocols' to close. Closing twice is closing once."""
        for port, sock in self._sockets.items():
            self._rest(port)
            sock.close()
        self._sockets.clear()

    def _bind(self, port: int, path: Path, hand_over: Callable[[Path], None]) -> None:
        sock = self._sockets[port] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with addressable(path) as address:
            sock.bind(address)
        path.chmod(0o600)
        hand_over(path)
        sock.listen(BACKLOG)
        self._listen(port)

    def _listen(self, port: int) -> None:
        self._pauses.pop(port, None)
        self._loop.add_reader(self._sockets[port], self._accept, port)

    def _rest(self, port: int) -> None:
        self._loop.remove_reader(self._sockets[port])
        pause = self._pauses.pop(port, None)
        if pause is not None:
            pause.cancel()

    def _accept(self, port: int) -> None:
        self._rest(port)
        self._transports = [transport for transport in self._transports if not transport.is_closing()]
        with suppress(OSError):  # nobody waits any more, or descriptors are short: the rest helps against that too
            for _ in range(ACCEPTED_AT_ONCE):
                sock, _address = self._sockets[port].accept()
                if len(self._attaching) + len(self._transports) >= OPEN_MAX:
                    sock.close()
                    continue
                sock.setblocking(False)  # noqa: FBT003  # it takes no keyword
                task = self._loop.create_task(self._attach(sock, port), name=f"attach-{port}")
                self._attaching.add(task)
                task.add_done_callback(self._attaching.discard)
        self._pauses[port] = self._loop.call_later(PAUSE_S, self._listen, port)

    async def _attach(self, sock: socket.socket, port: int) -> None:
        with suppress(OSError):  # the guest left again
            transport, _ = await self._loop.connect_accepted_socket(self._inbound[port], sock)
            self._transports.append(transport)
        task = asyncio.current_task()
        assert task is not None
        self._attaching.discard(task)  # now, and not when its end is told: it would count twice until then
