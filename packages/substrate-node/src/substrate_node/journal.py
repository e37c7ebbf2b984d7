"""The audit journal: in audit mode every guest writes down, outside itself, what it is about to act on.

A guest dials the journal's port, writes `id attempt` and a newline, and acts only after one byte has come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

_LINE_BYTES_MAX = 128

Record = Callable[[str, int], None]
"""Keeps an entry (invocation id, attempt) before it returns; raises `OSError` when it cannot."""


class JournalLine(asyncio.Protocol):
    """One entry from one guest: read, kept, acknowledged."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._line = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Await the line."""
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one but in name

    def data_received(self, data: bytes) -> None:
        """Keep the entry and acknowledge it; close on anything else, so that the guest does not act."""
        assert self._transport is not None
        self._line += data
        line, end, behind = self._line.partition(b"\n")
        if not end and len(line) <= _LINE_BYTES_MAX:
            return
        try:
            if behind or len(line) > _LINE_BYTES_MAX:
                raise ValueError("more than one line")
            invocation_id, attempt = line.decode("ascii").split()
            self._record(invocation_id, int(attempt))
        except (ValueError, OSError):
            self._transport.abort()
            return
        self._transport.write(b"+")
        self._transport.close()
