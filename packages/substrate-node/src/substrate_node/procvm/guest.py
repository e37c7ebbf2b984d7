"""One process guest: its birth, its end, and the connections to it."""

from __future__ import annotations

import asyncio
import marshal
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from substrate_node.processes.console import Console
from substrate_node.processes.family import Family, in_words
from substrate_node.processes.usage import sampled
from substrate_node.procvm.dials import Dials
from substrate_node.procvm.record import RunDirectory
from substrate_node.procvm.reports import Reports
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
    ) -> None:
        """Start the launcher with a plan; raises `OSError`, and has left nothing then.

        Nothing is awaited. The node keeps no copy of what it hands over: kept open, the listening descriptor would make
        a connection hang after the guest's death.
        """
        self.guest_id = guest_id
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._directory = directory
        self._pid: int | None = None
        with ExitStack() as theirs, ExitStack() as undo:
            undo.callback(directory.remove)
            listener = theirs.enter_context(directory.make())
            reports, their_reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            dials, their_dials = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            console, their_console = os.pipe2(os.O_CLOEXEC)
            for sock in (their_reports, their_dials):
                theirs.callback(sock.close)
            os.set_blocking(console, False)
            theirs.callback(os.close, their_console)
            self._reports = Reports(reports)
            undo.callback(self._reports.close)
            self._dials = Dials(dials, inbound)
            undo.callback(self._dials.close)
            self._console = Console(console)
            undo.callback(self._console.close)
            plan_fd = os.memfd_create("plan", os.MFD_CLOEXEC)
            theirs.callback(os.close, plan_fd)
            os.write(plan_fd, marshal.dumps(dict(plan)))
            os.lseek(plan_fd, 0, os.SEEK_SET)
            sockets = (listener.fileno(), their_dials.fileno(), their_reports.fileno())
            self._family = Family(launcher, (plan_fd, their_console, their_console, *sockets))
            undo.pop_all()
        self._family.ended.add_done_callback(self._on_end)

    async def isolated(self) -> dict[str, str]:
        """See the guest through its isolation until its command runs; returns why each measure was not applied.

        Raises `VmmError` if it ends before.
        """
        try:
            return await self._isolated()
        except OSError as error:  # it ended between two of our steps
            raise VmmError(f"boot: guest {self.guest_id} ended: {error}{self._last_words()}") from error

    async def _isolated(self) -> dict[str, str]:
        outcomes: dict[str, str] | None = None
        while True:
            kind, _, rest = (await self._report()).partition("\t")
            if kind == "pid":
                self._pid = int(rest)
                self._family.expect(self._pid)
                self._directory.record(self._pid)
            elif kind == "isolated":
                outcomes = dict(_two_fields(line) for line in rest.splitlines())
            elif kind == "up" and outcomes is not None:
                return outcomes
            else:
                what, _, why = rest.partition("\t")
                raise VmmError(f"boot: {what}: {why}{self._last_words()}")
            if outcomes is not None and self._pid is not None:
                self._reports.send(b"go")

    async def dial(self, protocol: Callable[[], P]) -> P:
        """See `Guest.dial`."""
        with self._directory.address() as address:
            return (await asyncio.get_running_loop().create_unix_connection(protocol, address))[1]

    def sample(self) -> Sample:
        """See `Guest.sample`, and `usage.sampled` for what is counted."""
        return Sample(None, None) if self._pid is None or self.exited.done() else sampled(self._pid)

    async def kill(self) -> None:
        """See `Guest.kill`."""
        self._family.kill()
        await asyncio.wait({self._family.gone})

    async def destroy(self) -> None:
        """Kill it and leave nothing of it; may be cancelled and begun again."""
        await self.kill()
        self._directory.remove()

    async def _report(self) -> str:
        """What the guest says next about itself. Raises `VmmError` if it ends instead."""
        message = await self._reports.next()
        if message is None:
            await asyncio.wait({self._family.gone})
            words = in_words(self._family.ended.result())
            raise VmmError(f"boot: guest {self.guest_id} ended: {words}{self._last_words()}")
        return message

    def _last_words(self) -> str:
        text = self._console.text
        return f"; its console ends with:\n{text}" if text else ""

    def _on_end(self, ended: asyncio.Future[int]) -> None:
        self._console.close()
        self._dials.close()
        self._reports.close()
        status = ended.result() if self._reports.status is None else self._reports.status
        self.exited.set_result(Exit(in_words(status), self._console.text))


def _two_fields(line: str) -> tuple[str, str]:
    first, _, second = line.partition("\t")
    return first, second
