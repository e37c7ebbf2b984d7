"""Connections that a guest asks for: it names a port of the host, and gets one end of a new pair of sockets."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from substrate_node.vmm import Inbound

OPEN_MAX = 64
"""Connections of one guest that may be open at once."""
PAUSE_S = 0.001
"""The loop's rest between two questions: a guest that floods us with them waits, not the daemon."""
QUESTION_BYTES_MAX = 32


class Dials:
    """Answers the questions that arrive on `sock`, a SEQPACKET socket which it owns, until the guest is gone.

    A question is a port in decimal; the answer is a message with a descriptor, or one without that says why not.
    """

    def __init__(self, sock: socket.socket, inbound: Inbound) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._inbound = inbound
        self._transports: list[asyncio.BaseTransport] = []
        self._attaching: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Answer no more. Connections already made are their protocols' to close. Closing twice is closing once."""
        if self._sock.fileno() >= 0:
            self._stop_listening()
            self._sock.close()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._on_question)

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._sock)
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    def _on_question(self) -> None:
        self._stop_listening()
        try:
            question = self._sock.recv(QUESTION_BYTES_MAX)
            if not question:
                return
            self._answer(question)
        except OSError:  # the guest is gone, or asks without reading our answers: then it gets no more of them
            return
        self._pause = self._loop.call_later(PAUSE_S, self._listen)

    def _answer(self, question: bytes) -> None:
        port = int(question) if question.isdigit() else -1
        if port not in self._inbound:
            self._sock.send(b"nobody answers there")
            return
        self._transports = [transport for transport in self._transports if not transport.is_closing()]
        if len(self._attaching) + len(self._transports) >= OPEN_MAX:
            self._sock.send(b"too many connections are open")
            return
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                ours.settimeout(0)
                socket.send_fds(self._sock, [b"ok"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        task = self._loop.create_task(self._attach(ours, port), name=f"attach-{port}")
        self._attaching.add(task)
        task.add_done_callback(self._attaching.discard)

    async def _attach(self, ours: socket.socket, port: int) -> None:
        with suppress(OSError):  # the guest left again
            transport, _ = await self._loop.connect_accepted_socket(self._inbound[port], ours)
            self._transports.append(transport)
