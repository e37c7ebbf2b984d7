"""A monitor whose every guest is the same long-lived server: what is left of a call is the substrate's own work.

The product never uses a guest twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from substrate_node.vmm import Base, Exit, Guest, Inbound, P, Sample, Vmm
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload


class SameGuest:
    """One face of the long-lived server."""

    def __init__(self, guest_id: str, server: Path) -> None:
        self.guest_id = guest_id
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._server = str(server)

    async def dial(self, protocol: Callable[[], P]) -> P:
        return (await asyncio.get_running_loop().create_unix_connection(protocol, self._server))[1]

    def sample(self) -> Sample:
        return Sample(None, None)

    @property
    def gone(self) -> asyncio.Future[Exit]:
        return self.exited

    def kill(self) -> None:
        if not self.exited.done():
            self.exited.set_result(Exit("killed by SIGKILL"))


class SameGuestVmm:
    """Makes guests at no cost, but only while its `gate` is open: a closed one leaves the parked guests as they are."""

    isolation = Isolation.PROCESS
    contact_cap_s = None

    def __init__(self, server: Path) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self._server = server

    def refusal(self, workload: Workload) -> str | None:
        return None

    async def input_key(self, workload: Workload) -> str | None:
        return workload.digest

    async def boot(self, workload: Workload, guest_id: str, inbound: Inbound, *, to_capture: bool = False) -> SameGuest:
        return SameGuest(guest_id, self._server)

    async def capture(self, workload: Workload, guest: Guest, base_id: str) -> Base:
        return Base(base_id=base_id, input_key=workload.digest)

    async def adopt(self, workload: Workload) -> Base | None:
        return None

    async def restore(self, workload: Workload, base: Base, guest_id: str, inbound: Inbound) -> SameGuest:
        await self.gate.wait()
        return SameGuest(guest_id, self._server)

    async def discard(self, guest_id: str) -> None:
        """Nothing is left of a face."""

    async def discard_base(self, base: Base) -> None:
        """Nor of its base."""


if TYPE_CHECKING:
    _fits_vmm: type[Vmm] = SameGuestVmm
    _fits_guest: type[Guest] = SameGuest
