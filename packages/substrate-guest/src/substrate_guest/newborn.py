"""A clone from its birth to its first request: it waits for that without an event loop, where its workload allows it.

A clone serves one request, and pays for every page of memory that it is the first to write to. So its loop is made
before it is, all has been rehearsed by then, and nothing is prepared for a second connection before the first is
answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import socket
from binascii import b2a_base64
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from substrate_guest import shim
from substrate_guest.app import App
from substrate_guest.callables import CallableWorkload
from substrate_guest.control import Readiness
from substrate_guest.identity import ENTROPY_BYTES_MIN
from substrate_guest.vsock import CONTROL_PORT, DATA_PORT, HybridVsock

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping

    from substrate_guest.app import Request
    from substrate_guest.vsock import Answer
    from substrate_guest.workload import Workload

ROUNDS = 16
"""Python 3.11 specialises a function once it was called eight times, and an instruction some time after that."""
IDLE_S = 0.05
"""A clone that nobody needed for so long is parked, and rehearses once more, now in memory of its own."""


class ClonedLoop(asyncio.SelectorEventLoop):
    """An event loop without a descriptor: it can be made, and have run, before its process is cloned."""

    def __init__(self) -> None:
        super().__init__(selectors.PollSelector())

    def _make_self_pipe(self) -> None:
        """Not yet: all clones would share it."""

    def be_ones_own(self) -> None:
        """Have what lets other threads wake it; once in each clone. Raises `OSError`."""
        super()._make_self_pipe()  # type: ignore[misc]  # of the standard library, not of its stubs


def serve(workload: Workload, vsock: HybridVsock, loop: ClonedLoop, *, audit: bool) -> NoReturn:
    """Serve a workload that was primed before this process was cloned, until the process ends."""
    if not workload.rests:
        loop.run_until_complete(shim.serve(workload, vsock, primed=True, audit=audit))
    answers = shim.answers(workload, vsock, _ready(), audit=audit)
    wait_s: float | None = IDLE_S
    while True:
        connection = vsock.accept(answers, within_s=wait_s)
        if connection is None:
            wait_s = None
            rehearse(loop, [_request()])
        else:
            port, sock, received = connection
            answer = _answered(answers[port], sock, received)
            loop.run_until_complete(answer if port == CONTROL_PORT else _served(answer, vsock, answers))


def rehearse_birth(loop: ClonedLoop) -> None:
    """Be told an identity and answer a request, some times over."""
    rehearse(loop, [_identity(), _request()] * ROUNDS)


def rehearse(loop: ClonedLoop, messages: Iterable[bytes]) -> None:
    """Answer what nobody sent, so that whatever the answers make or touch is there. No workload is asked."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel finds a name
        listener.listen()
        vsock = HybridVsock(listener)
        answers = shim.answers(CallableWorkload(App(_repeat)), vsock, _ready())
        for message in messages:
            with socket.socket(socket.AF_UNIX) as peer, suppress(ExceptionGroup):
                peer.connect(listener.getsockname())
                peer.sendall(message)
                connection = vsock.accept(answers, within_s=None)
                assert connection is not None
                port, sock, received = connection
                answer = _answered(answers[port], sock, received)
                loop.run_until_complete(answer if port == CONTROL_PORT else _served(_once(answer), vsock, answers))


class _Rehearsed(Exception):
    """There will be no second request."""


async def _once(answer: Coroutine[None, None, None]) -> None:
    await answer
    raise _Rehearsed


async def _served(first: Coroutine[None, None, None], vsock: HybridVsock, answers: Mapping[int, Answer]) -> None:
    """Answer a first connection; once that is done, or has to wait for something, all others too."""
    async with asyncio.TaskGroup() as duties:
        duties.create_task(first, name="first")
        await asyncio.sleep(0)
        await vsock.serve(answers)


async def _answered(answer: Answer, sock: socket.socket, received: bytes) -> None:
    with sock:
        await answer(sock, received)


def _ready() -> Readiness:
    readiness = Readiness()
    readiness.settle()
    return readiness


async def _repeat(request: Request) -> bytes:
    return request.body


def _request() -> bytes:
    return _message(DATA_PORT, "/invoke/rehearsal", b"." * 64)


def _identity() -> bytes:
    entropy = b2a_base64(os.urandom(ENTROPY_BYTES_MIN), newline=False).decode()
    names = dict.fromkeys(("guest_id", "hostname", "boot_id"), "rehearsal")
    members = {"epoch_ns": 0, "entropy_b64": entropy, "ca_pem": None, "restored": True, **names}
    return _message(CONTROL_PORT, "/shim/restored", json.dumps(members).encode())


def _message(port: int, target: str, body: bytes) -> bytes:
    head = f"POST {target} HTTP/1.1\r\nhost: vsock\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return f"CONNECT {port}\n{head}".encode() + body
