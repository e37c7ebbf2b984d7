"""One process guest that is a clone: its birth, its end, and the connections to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

from substrate_node.processes.family import in_words
from substrate_node.processes.usage import sampled
from substrate_node.procvm.dials import Dials
from substrate_node.procvm.door import Door
from substrate_node.procvm.group import GuestGroup
from substrate_node.procvm.launch import console_pair
from substrate_node.procvm.reports import Ended
from substrate_node.procvm.wire import Born, ZygoteWire
from substrate_node.vmm import Exit, Inbound, P, Sample, VmmError

_ANSWERS_WITHIN_S = 5.0
"""A zygote that does not answer for so long is stuck."""
_TOLD_WITHIN_S = 0.25
"""How long after a clone's end its status may still be told."""


class Origin(Protocol):
    """What a clone is made of (see `Zygote`)."""

    wire: ZygoteWire
    place: Path

    def adopt(self, clone: Clone) -> None: ...  # noqa: D102
    async def make_room(self) -> None: ...  # noqa: D102
    async def let_go(self, clone: Clone) -> None: ...  # noqa: D102
    def end(self, inner_pid: int) -> asyncio.Future[Ended | None]: ...  # noqa: D102


class Clone:
    """A guest that is a clone. Made half: `begin` brings it up, `destroy` leaves nothing of it at any point."""

    def __init__(self, guest_id: str, origin: Origin, inbound: Inbound, *, group: GuestGroup) -> None:
        """Make what the clone will be handed; raises `OSError`, and has left nothing then. Nothing is awaited."""
        self.guest_id = guest_id
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.pid: int | None = None
        self._origin = origin
        self._group = group
        self._answer: asyncio.Future[None] | None = None
        self._pidfd = -1
        self._told: asyncio.Future[Ended | None] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._theirs = ExitStack()
        with ExitStack() as undo:
            undo.callback(self._theirs.close)
            self._door = Door(origin.place, guest_id)
            undo.callback(self._door.close)
            self._theirs.callback(self._door.listener.close)
            dials, their_dials = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._theirs.callback(their_dials.close)
            self._dials = Dials(dials, inbound)
            undo.callback(self._dials.close)
            self._console, their_console = console_pair()
            self._theirs.callback(os.close, their_console)
            self._descriptors = (self._door.listener.fileno(), their_dials.fileno(), their_console)
            undo.pop_all()
        origin.adopt(self)

    async def begin(self, boot_id: str) -> None:
        """Have it forked. It isolates itself then, and ends where that fails. Raises `VmmError`."""
        try:
            await self._origin.make_room()
            order = self._origin.wire.order(self.guest_id, boot_id, self._descriptors, on_born=self._on_born)
            answer = self._answer = await order
        except OSError as error:
            raise VmmError(f"restore: the zygote's control group has no room for {self.guest_id}: {error}") from error
        finally:
            self._theirs.close()  # kept open, the listening socket would make a connection hang after the guest's death
        await asyncio.shield(answer)
        assert self.pid is not None
        try:
            await self._group.enter(self.pid)
        except OSError as error:
            raise VmmError(f"restore: guest {self.guest_id} can't be held in a control group: {error}") from error

    async def dial(self, protocol: Callable[[], P]) -> P:
        """See `Guest.dial`."""
        return (await asyncio.get_running_loop().create_unix_connection(protocol, self._door.address))[1]

    @property
    def console(self) -> str:
        """See `Guest.console`."""
        return self._console.text

    def sample(self) -> Sample:
        """See `Guest.sample`, and `usage.sampled` for what is counted."""
        if self.pid is None or self.exited.done():
            return Sample(None, None)
        return self._group.sampled(sampled(self.pid, first_is_ours=False), cloned=True)

    @property
    def gone(self) -> asyncio.Future[Exit]:
        """See `Guest.gone`: its end is told when all its processes have ended."""
        return self.exited

    def kill(self) -> None:
        """See `Guest.kill`."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def destroy(self) -> None:
        """Kill it and leave nothing of it; may be cancelled and begun again."""
        if self._answer is not None and not self._answer.done():
            await asyncio.wait({self._answer}, timeout=_ANSWERS_WITHIN_S)
            if not self._answer.done():
                self._origin.wire.close()  # and the zygote is lost, with what it did not tell of
        if self._told is None:
            self._end("it never ran")
        self.kill()
        await asyncio.wait({self.exited})
        await self._group.remove()
        await self._origin.let_go(self)

    def _on_born(self, born: Born) -> None:
        self.pid, self._pidfd = born.pid, born.pidfd
        self._told = self._origin.end(born.inner_pid)
        asyncio.get_running_loop().add_reader(born.pidfd, self._on_death)

    def _on_death(self) -> None:
        """All its processes have ended. How is told by whoever reaps it, a moment before or after."""
        assert self._told is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._told.add_done_callback(lambda told: self._tell_end(told.result()))
        self._patience = loop.call_later(_TOLD_WITHIN_S, self._tell_end, None)

    def _tell_end(self, told: Ended | None) -> None:
        if told is None:
            self._end("an end that nobody was left to see")
        else:
            self._end(in_words(told.status), told.peak_mib)

    def _end(self, words: str, peak_mib: float | None = None) -> None:
        if not self.exited.done():
            if self._patience is not None:
                self._patience.cancel()
            self._console.close()
            self._dials.close()
            self._door.close()
            self.exited.set_result(Exit(words, self._console.text, peak_mib))
