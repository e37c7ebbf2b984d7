"""A listening socket without a name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from substrate_node.processes.addresses import addressable
from substrate_node.procvm.record import BACKLOG


class Door:
    """Where one guest is connected to, by nobody but the holder of this object; no file is left of it at any time.

    Unlike a directory for each guest it costs no `rmdir`, which can take a disk's file system many milliseconds.
    """

    def __init__(self, place: Path, name: str) -> None:
        """Make `listener`, which is to be handed over; `place` is a directory of ours. Raises `OSError`."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._fd = -1
        try:
            with addressable(place / name) as address:
                self.listener.bind(address)
                try:
                    self._fd = os.open(address, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                finally:
                    os.unlink(address)  # noqa: PTH108  # a name for a moment only
            self.listener.listen(BACKLOG)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Where to connect to. Raises `ConnectionRefusedError` once it is closed."""
        if self._fd < 0:
            raise ConnectionRefusedError("the guest has ended")
        return f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        """Connect no more. Closing twice is closing once."""
        self.listener.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
