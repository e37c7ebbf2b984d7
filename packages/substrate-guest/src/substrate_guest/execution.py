"""Any program as a workload: it is run once for each request, which it reads from its standard input."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from substrate_guest.command import Command, end_group, ended, words

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    from substrate_guest.app import Request
    from substrate_guest.exchange import Exchange
    from substrate_guest.identity import Identity

HELD_BYTES = 64 * 1024
"""So much output is held back, because until then the program may still turn out to have failed."""
COMPLAINT_BYTES_MAX = 64 * 1024
PIECE_BYTES = 64 * 1024


class ExecWorkload:
    """Answers with what the program writes: 200 if it succeeds, 500 with its complaint if it fails.

    A program that fails after its first `HELD_BYTES` cuts the reply.
    """

    def __init__(self, command: Command) -> None:
        self._command = command
        self.rests = True

    async def prime(self) -> None:
        """See `Workload.prime`; raises `FileNotFoundError` when there is no such program."""
        self._command.check()

    async def start(self, duties: asyncio.TaskGroup) -> None:
        """See `Workload.start`; nothing runs between requests."""

    async def restored(self, identity: Identity) -> None:
        """See `Workload.restored`; a program that is started afterwards has nothing to forget."""

    async def respond(self, request: Request, exchange: Exchange) -> None:
        """See `Workload.respond`."""
        pipe = asyncio.subprocess.PIPE
        async with self._command.running(environ=told(request), stdin=pipe, output=pipe) as process:
            await exchange.while_awaited(_answer(process, request.body, exchange))


async def _answer(process: Process, body: bytes, exchange: Exchange) -> None:
    assert process.stdout is not None
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_feed(process, body))
        tasks.create_task(_clear_up(process))
        complaint = tasks.create_task(_complaint(process))
        held = b""
        while len(held) < HELD_BYTES and (piece := await process.stdout.read(PIECE_BYTES)):
            held += piece
        if len(held) >= HELD_BYTES:
            exchange.begin(200, [(b"content-type", b"application/octet-stream")])
            await exchange.write(held)
            while piece := await process.stdout.read(PIECE_BYTES):
                await exchange.write(piece)
        status = await process.wait()
    if status != 0 and not exchange.started:
        await exchange.reply(500, f"{words(status)}\n{complaint.result().decode(errors='replace')}")
    elif status != 0:
        sys.stderr.write(complaint.result().decode(errors="replace"))
        raise RuntimeError(f"the program ended with {words(status)} in the middle of its output")
    elif exchange.started:
        await exchange.end()
    else:
        exchange.begin(200, [(b"content-type", b"application/octet-stream")])
        await exchange.end(held)


def told(request: Request) -> dict[str, str]:
    """What the program finds in its environment about the request."""
    about = {"SUBSTRATE_METHOD": request.method, "SUBSTRATE_TARGET": request.target}
    if request.session is not None:
        about["SUBSTRATE_SESSION"] = request.session.replace("\0", "")
    return about


async def _feed(process: Process, body: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(body)
        await process.stdin.drain()
    except ConnectionError:  # it does not want to read all of it
        pass
    finally:
        process.stdin.close()


async def _clear_up(process: Process) -> None:
    """What outlives the program must not keep its output open: the reply would never end."""
    await ended(process)
    end_group(process.pid)


async def _complaint(process: Process) -> bytes:
    """The end of what it writes to its standard error."""
    assert process.stderr is not None
    kept = b""
    while piece := await process.stderr.read(PIECE_BYTES):
        kept = (kept + piece)[-COMPLAINT_BYTES_MAX:]
    return kept
