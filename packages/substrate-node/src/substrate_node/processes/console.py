"""What a guest writes to its console: the end of it is kept, and it is shown without any power over the reader."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

KEPT_BYTES = 8192
READ_BYTES = 65_536
PAUSE_S = 0.001
"""The loop's rest between two reads: a guest that floods its console waits, not the daemon."""


class Console:
    """Reads a console from the non-blocking descriptor `fd`, which it owns, and keeps the last `KEPT_BYTES`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept = b""
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Take what is there, and hear no more. Closing twice is closing once."""
        if self._fd >= 0:
            self._stop_listening()
            self._read()
            os.close(self._fd)
            self._fd = -1

    @property
    def text(self) -> str:
        """The end of the console, whole lines where there are any, with control characters spelled out."""
        return shown(self._kept)

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._fd, self._on_readable)

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    def _on_readable(self) -> None:
        self._stop_listening()
        if self._read():
            self._pause = self._loop.call_later(PAUSE_S, self._listen)

    def _read(self) -> bool:
        """Keep what can be read now; false when nobody will write any more."""
        data = b""
        with suppress(BlockingIOError):
            data = os.read(self._fd, READ_BYTES)
            if not data:
                return False
        self._kept = (self._kept + data)[-KEPT_BYTES:]
        return True


def shown(data: bytes) -> str:
    """Text from a guest that can neither move a cursor, nor forge a line of a log, nor hide what it says."""
    text = data.decode(errors="backslashreplace").strip("\r\n")
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
