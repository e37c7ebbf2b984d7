"""What the first process of a guest tells about itself, and what we tell it."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from contextlib import suppress

MESSAGE_BYTES_MAX = 65_536
MESSAGES_MAX = 64
"""A launcher says a handful of things; whoever says more is not heard to the end."""


class Reports:
    """Messages of tab-separated fields over `sock`, a SEQPACKET socket which it owns.

    What was said before the end can still be heard after it, so that a guest that ends at once was up none the less.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        self.status: int | None = None
        """The wait status of the command, which the first process can tell but, as such, not always end with."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._unheard: deque[str] = deque()
        self._count = 0
        self._changed = asyncio.Event()
        self._ended = False
        self._loop.add_reader(sock, self._on_readable)

    def send(self, message: bytes) -> None:
        """Say something; raises `OSError` when nobody is left to hear it."""
        self._sock.send(message)

    async def next(self) -> str | None:
        """What is said next; None when nothing more will be."""
        while not self._unheard and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        return self._unheard.popleft() if self._unheard else None

    def close(self) -> None:
        """Take what was said until now, and hear no more. Closing twice is closing once."""
        if not self._ended:
            with suppress(BlockingIOError):
                while self._read():
                    pass
            self._end()
        self._sock.close()

    def _on_readable(self) -> None:
        try:
            if not self._read():
                self._end()
        except BlockingIOError:
            return
        self._changed.set()

    def _read(self) -> bool:
        """Take one message; false if there will be no more, or too many were said. Raises `BlockingIOError`."""
        try:
            message = self._sock.recv(MESSAGE_BYTES_MAX)
        except ConnectionResetError:  # it ended without hearing us out
            return False
        if not message or self._count >= MESSAGES_MAX:
            return False
        self._count += 1
        self._take(message.decode(errors="replace"))
        return True

    def _end(self) -> None:
        self._ended = True
        self._loop.remove_reader(self._sock)
        self._changed.set()

    def _take(self, message: str) -> None:
        kind, _, rest = message.partition("\t")
        if kind == "ended" and rest.isdigit():
            self.status = int(rest)
        self._unheard.append(message)
