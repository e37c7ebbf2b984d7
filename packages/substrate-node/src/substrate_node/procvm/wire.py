"""What the node and a zygote say to each other, one JSON object a message over a SEQPACKET socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
from msgspec import Struct

from substrate_node.processes.procfs import read
from substrate_node.vmm import BaseGone, NotCapturable, VmmError

UNANSWERED_MAX = 8
"""Orders under way: the kernel queues ten messages and a sender that finds no room must not block the loop."""
_ANSWER_BYTES_MAX = 16_384
_DESCRIPTORS_MAX = 4


class Answer(Struct, frozen=True):
    """What a zygote says: one of the four words is set. It has run a workload's code, so nothing of it is believed."""

    captured: bool = False
    refused: str | None = None
    cloned: str | None = None
    failed: str | None = None
    pid: int = 0
    why: str = ""


class Born(Struct, frozen=True):
    """A clone: a pidfd of it, which the holder owns; its pid here, and its pid where its zygote lives."""

    pidfd: int
    pid: int
    inner_pid: int


class ZygoteWire:
    """Our end of the socket to a zygote, or to what may become one.

    Once it is `lost`, which `on_lost` hears, nothing more will be heard: the other end is closed, or has said what
    answers nothing that was asked.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        self.on_lost: Callable[[], None] = lambda: None
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._captured: asyncio.Future[None] = self._loop.create_future()
        self._ordered: dict[str, tuple[asyncio.Future[None], Callable[[Born], None]]] = {}
        self._room = asyncio.Semaphore(UNANSWERED_MAX)
        self.lost = False
        self._loop.add_reader(sock, self._on_readable)

    async def capture(self) -> None:
        """Have the process become a zygote.

        Raises `NotCapturable` with what it holds against that, and `VmmError` if it ends.
        """
        with suppress(OSError):  # it has ended, and we shall hear so
            self._sock.send(b'{"capture": true}')
        await asyncio.shield(self._captured)

    async def order(
        self, guest_id: str, boot_id: str, descriptors: Sequence[int], *, on_born: Callable[[Born], None]
    ) -> asyncio.Future[None]:
        """Order a clone and hand over its descriptors; the answer is done once `on_born` has heard which it is.

        The answer may be a `VmmError`. Raises `VmmError` when there is nobody to order from.
        """
        await self._room.acquire()
        answer: asyncio.Future[None] = self._loop.create_future()
        answer.add_done_callback(lambda _: self._room.release())
        try:
            socket.send_fds(self._sock, [msgspec.json.encode({"clone": guest_id, "boot_id": boot_id})], descriptors)
        except OSError as error:  # it has ended, or its socket is closed
            answer.cancel()
            unheard = isinstance(error, ConnectionError)  # of its end we shall be told a moment from now
            kind = BaseGone if self.lost or unheard else VmmError
            raise kind(f"restore: the zygote takes no orders: {error}") from error
        self._ordered[guest_id] = answer, on_born
        return answer

    def close(self) -> None:
        """Take what was said until now, and hear no more; whoever waits gets an error. May be repeated."""
        if not self.lost:
            with suppress(BlockingIOError):
                while self._read():
                    pass
            self._lose()
        self._sock.close()

    def _on_readable(self) -> None:
        try:
            if not self._read():
                self._lose()
        except BlockingIOError:
            pass

    def _lose(self) -> None:
        self.lost = True
        self._loop.remove_reader(self._sock)
        lost = BaseGone("restore: the zygote ended, or made no sense, before it answered")
        if not self._captured.done():
            self._captured.set_exception(VmmError("capture: the guest ended, or made no sense"))
            self._captured.exception()  # it may be that nobody waits
        for guest_id in list(self._ordered):
            self._settle(guest_id, lost)
        self.on_lost()

    def _read(self) -> bool:
        """Take one message; false when there will be none that is worth hearing. Raises `BlockingIOError`."""
        room = socket.CMSG_LEN(4 * _DESCRIPTORS_MAX)
        try:
            message, ancillary, _, _ = self._sock.recvmsg(_ANSWER_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        descriptors = _descriptors(ancillary)
        makes_sense = bool(message) and self._take(message, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return makes_sense

    def _take(self, message: bytes, descriptors: list[int]) -> bool:
        """Act on an answer; false if it answers nothing that was asked."""
        try:
            answer = msgspec.json.decode(message, type=Answer)
        except msgspec.MsgspecError:
            return False
        if answer.cloned in self._ordered and (born := _born(descriptors, answer.pid)):
            self._settle(answer.cloned, born)
        elif answer.failed in self._ordered:
            self._settle(answer.failed, VmmError(f"restore: the zygote can't be cloned: {answer.why[:512]}"))
        elif answer.refused is not None and not self._captured.done():
            self._captured.set_exception(NotCapturable(f"capture: {answer.refused[:1024]}"))
        elif answer.captured and not self._captured.done():
            self._captured.set_result(None)
        else:
            return False
        return True

    def _settle(self, guest_id: str, outcome: Born | VmmError) -> None:
        answer, on_born = self._ordered.pop(guest_id)
        if isinstance(outcome, VmmError):
            answer.set_exception(outcome)
            answer.exception()  # it may be that nobody waits any more
        else:
            on_born(outcome)
            answer.set_result(None)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found += memoryview(data[: len(data) // 4 * 4]).cast("i")
    return found


def _born(descriptors: list[int], inner_pid: int) -> Born | None:
    """The process that the only one of `descriptors` leads to, if it is a pidfd; it is taken out of them then."""
    if len(descriptors) == 1:
        for line in read(f"/proc/self/fdinfo/{descriptors[0]}").splitlines():
            name, _, value = line.partition(b":")
            if name == b"Pid" and int(value) > 0:
                return Born(descriptors.pop(), int(value), inner_pid)
    return None
