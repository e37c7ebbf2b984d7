"""How a daemon is asked to stop: SIGTERM or SIGINT once, and once more to hurry."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Generator
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Whether the daemon was asked to stop (`requested`), and whether to do so at once (`forced`).

    `by` is what asked first, such as "SIGTERM".
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.by = ""

    def ask(self, by: str) -> None:
        """Ask to stop; asking again forces it."""
        if self.requested.is_set():
            self.forced.set()
        else:
            self.by = by
            self.requested.set()


@contextlib.contextmanager
def stop_on_signals(stopping: Stopping) -> Generator[None]:
    """Turn SIGTERM and SIGINT into `stopping.ask` for the length of the block, on the running loop's main thread."""
    loop = asyncio.get_running_loop()
    for sig in _SIGNALS:
        loop.add_signal_handler(sig, stopping.ask, sig.name)
    try:
        yield
    finally:
        for sig in _SIGNALS:
            loop.remove_signal_handler(sig)
