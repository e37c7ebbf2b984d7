"""What the first process of a guest tells about itself, and what we tell it."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

MESSAGE_BYTES_MAX = 65_536
BATCH = 32
PAUSE_S = 0.001
"""The loop's rest after `BATCH` messages: whoever floods us with them waits, not the daemon."""
MESSAGES_MAX = 64
"""A launcher says a handful of things; of whoever says more, no more is kept."""


class Ended(NamedTuple):
    """The end of a child of a guest's first process: its pid, as the guest counts, and its wait status.

    `peak_mib` is what the largest process took at once of it and those whose end it has waited for; None if untold.
    """

    pid: int
    status: int
    peak_mib: float | None


class Reports:
    """Messages of tab-separated fields over `sock`, a SEQPACKET socket which it owns.

    What was said before the end can still be heard after it, so that a guest that ends at once was up none the less.
    `on_end` hears, at once, of whatever the first process has reaped and tells of.
    """

    def __init__(self, sock: socket.socket, *, on_end: Callable[[Ended], None]) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._unheard: deque[str] = deque()
        self._kept = 0
        self._changed = asyncio.Event()
        self._ended = False
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

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

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._on_readable)

    def _on_readable(self) -> None:
        try:
            for _ in range(BATCH):
                if not self._read():
                    self._end()
                    return
        except BlockingIOError:
            return
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(PAUSE_S, self._listen)

    def _read(self) -> bool:
        """Take one message; false if there will be no more. Raises `BlockingIOError`."""
        try:
            message = self._sock.recv(MESSAGE_BYTES_MAX)
        except ConnectionResetError:  # it ended without hearing us out
            return False
        if message:
            self._take(message.decode(errors="replace"))
        return bool(message)

    def _end(self) -> None:
        self._ended = True
        self._loop.remove_reader(self._sock)
        if self._pause is not None:
            self._pause.cancel()
        self._changed.set()

    def _take(self, message: str) -> None:
        kind, _, rest = message.partition("\t")
        if kind == "ended":
            with suppress(ValueError):
                status, pid, peak_kib = map(int, rest.split("\t"))
                self._on_end(Ended(pid, status, peak_kib / 1024 or None))
        elif self._kept < MESSAGES_MAX:
            self._kept += 1
            self._unheard.append(message)
            self._changed.set()
