"""One process guest that was started cold: its birth, its end, and the connections to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from substrate_node.offloop import off_loop
from substrate_node.processes.family import in_words
from substrate_node.processes.usage import sampled
from substrate_node.procvm.dials import Dials
from substrate_node.procvm.group import GuestGroup
from substrate_node.procvm.launch import Launch
from substrate_node.procvm.record import RunDirectory
from substrate_node.procvm.reports import Ended
from substrate_node.procvm.wire import ZygoteWire
from substrate_node.vmm import Exit, Inbound, P, Sample, VmmError


class ProcessGuest:
    """A guest that is a process. Made half: `isolated` brings it up, `destroy` leaves nothing of it at any point."""

    def __init__(
        self,
        guest_id: str,
        launcher: tuple[str, ...],
        plan: Mapping[str, Any],
        directory: RunDirectory,
        inbound: Inbound,
        *,
        group: GuestGroup,
        to_capture: bool = False,
    ) -> None:
        """Start the launcher with a plan; raises `OSError`, and has left nothing then.

        Nothing is awaited. The node keeps no copy of what it hands over: kept open, the listening descriptor would make
        a connection hang after the guest's death.
        """
        self.guest_id = guest_id
        self.made_of: str | None = None
        """The input key of the base that it may become."""
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._directory = directory
        self._wire: ZygoteWire | None = None
        with ExitStack() as theirs, ExitStack() as undo:
            undo.callback(directory.remove)
            listener = theirs.enter_context(directory.make())
            dials, their_dials = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sockets = [listener, theirs.enter_context(their_dials)]
            self._dials = Dials(dials, inbound)
            undo.callback(self._dials.close)
            if to_capture:
                wire, their_wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sockets.append(theirs.enter_context(their_wire))
                self._wire = ZygoteWire(wire)
                undo.callback(self._wire.close)
            descriptors = [sock.fileno() for sock in sockets]
            self._launch: Launch | None = Launch(
                guest_id, launcher, plan, descriptors, record=directory.record, group=group
            )
            undo.pop_all()
        self._launch.family.ended.add_done_callback(self._on_end)
        if to_capture:
            self._launch.on_child_end = self._on_child_end

    async def isolated(self) -> dict[str, str]:
        """See `Launch.isolated`."""
        assert self._launch is not None
        return await self._launch.isolated()

    async def captured(self) -> tuple[Launch, ZygoteWire]:
        """Have the process be a zygote and give it away: this guest is an empty shell then. Raises `VmmError`."""
        launch, wire = self._launch, self._wire
        if launch is None or wire is None or self.exited.done():
            raise VmmError(f"capture: guest {self.guest_id} was not started to be captured, or is gone")
        await wire.capture()
        if self.exited.done():
            raise VmmError(f"capture: guest {self.guest_id} ended with {self.exited.result().words}")
        self._launch = self._wire = None
        launch.family.ended.remove_done_callback(self._on_end)
        self._dials.close()
        self.exited.set_result(Exit("became a warm base"))
        return launch, wire

    async def dial(self, protocol: Callable[[], P]) -> P:
        """See `Guest.dial`."""
        with self._directory.address() as address:
            return (await asyncio.get_running_loop().create_unix_connection(protocol, address))[1]

    @property
    def console(self) -> str:
        """See `Guest.console`."""
        return self._launch.console.text if self._launch is not None else ""

    def sample(self) -> Sample:
        """See `Guest.sample`, and `usage.sampled` for what is counted."""
        pid = self._launch.pid if self._launch is not None else None
        if self._launch is None or pid is None or self.exited.done():
            return Sample(None, None)
        return self._launch.group.sampled(sampled(pid))

    @property
    def gone(self) -> asyncio.Future[Exit] | asyncio.Future[None]:
        """See `Guest.gone`."""
        return self._launch.family.gone if self._launch is not None else self.exited

    def kill(self) -> None:
        """See `Guest.kill`."""
        if self._launch is not None:
            self._launch.kill()

    async def destroy(self) -> None:
        """Kill it and leave nothing of it; may be cancelled and begun again."""
        self.kill()
        await asyncio.wait({self.gone})
        if self._launch is not None:
            await self._launch.group.remove()
        await off_loop(self._directory.remove)  # a disk takes its time to remove a directory

    def _on_child_end(self, ended: Ended) -> None:
        """The first process of a zygote outlives it, for the sake of clones, of which there are none yet."""
        if self._launch is not None and self._launch.command in {ended.pid, None}:
            self._launch.family.kill()

    def _on_end(self, ended: asyncio.Future[int]) -> None:
        launch = self._launch
        assert launch is not None
        launch.hear_no_more()
        self._dials.close()
        if self._wire is not None:
            self._wire.close()
        told = launch.end or Ended(launch.family.pid, ended.result(), None)
        self.exited.set_result(Exit(in_words(told.status), launch.console.text, told.peak_mib))
