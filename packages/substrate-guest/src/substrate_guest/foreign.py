"""A workload that the image's own Python runs: our shim in it serves the workload, and this one stands before it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

import h11

from substrate_guest.app import Request
from substrate_guest.proxy import Conversation, connected, forward, supervised
from substrate_guest.vsock import CONNECT_BYTES_MAX, CONTROL_PORT, DATA_PORT, LISTEN_VARIABLE

if TYPE_CHECKING:
    from substrate_guest.command import Command
    from substrate_guest.exchange import Exchange
    from substrate_guest.identity import Identity

HEADERS = (("host", "vsock"),)


class ForeignWorkload:
    """A workload in another interpreter, which `command` starts; clock, host name and entropy stay our business."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._path = ""
        self.rests = False

    async def prime(self) -> None:
        """See `Workload.prime`; raises `FileNotFoundError` when there is no such interpreter."""
        self._command.check()

    async def start(self, duties: asyncio.TaskGroup) -> None:
        """See `Workload.start`; returns when the workload is primed, raises `RuntimeError` when it failed."""
        self._path = f"{tempfile.mkdtemp(prefix='substrate-')}/v.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:  # not kept: only the workload shall answer
            listener.bind(self._path)
            listener.listen()
            environ = {LISTEN_VARIABLE: str(listener.fileno())}
            await supervised(self._command, duties, self._primed, environ=environ, descriptors=[listener.fileno()])

    async def restored(self, identity: Identity) -> None:
        """See `Workload.restored`; raises `RuntimeError` when the workload's hooks failed."""
        members = {
            "epoch_ns": identity.epoch_ns,
            "entropy_b64": base64.b64encode(identity.entropy).decode(),
            "guest_id": identity.guest_id,
            "hostname": identity.hostname,
            "boot_id": identity.boot_id,
            "ca_pem": identity.ca_pem,
            "restored": identity.restored,
        }
        request = Request("POST", "/shim/restored", HEADERS, json.dumps(members).encode())
        status, said = await self._ask(request)
        if status != 200:
            raise RuntimeError(f"the workload answered {status}: {said}")

    async def respond(self, request: Request, exchange: Exchange) -> None:
        """See `Workload.respond`."""
        await exchange.while_awaited(forward(request, exchange, self._data))

    async def _primed(self) -> bool:
        with suppress(OSError, h11.ProtocolError):
            status, _ = await self._ask(Request("GET", "/shim/ready", HEADERS))
            return status == 200
        return False

    async def _ask(self, request: Request) -> tuple[int, str]:
        with await self._connection(CONTROL_PORT) as sock:
            conversation = Conversation(sock)
            await conversation.ask(request)
            status, said = 0, b""
            while not isinstance(event := await conversation.event(), h11.EndOfMessage | h11.ConnectionClosed):
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    said += event.data
            return status, said.decode(errors="replace")

    async def _data(self) -> socket.socket:
        return await self._connection(DATA_PORT)

    async def _connection(self, port: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        sock = await connected(socket.AF_UNIX, self._path)
        try:
            await loop.sock_sendall(sock, b"CONNECT %d\n" % port)
            answer = await loop.sock_recv(sock, CONNECT_BYTES_MAX)  # the shim says no more before it is asked
            if not answer.startswith(b"OK "):
                raise ConnectionResetError("the workload's shim refused the connection")
        except BaseException:
            sock.close()
            raise
        return sock
