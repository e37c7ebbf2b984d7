"""What the launcher was started for: a first process, and the command in it, watched and heard from the outside."""

from __future__ import annotations

import asyncio
import marshal
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from substrate_node.processes.console import Console
from substrate_node.processes.family import Family, in_words, kill_children
from substrate_node.procvm.group import GuestGroup
from substrate_node.procvm.reports import Ended, Reports
from substrate_node.vmm import VmmError

_FOLLOWS_WITHIN_S = 0.1
"""How long the first process of a guest may take to follow its command."""


class Launch:
    """A launched process. `isolated` brings it up; whoever holds it kills `family` in the end.

    `pid` is its first process, as soon as that is known. `on_child_end` hears of the end of the command; where
    the first process outlives it, also of whatever else ends as a child of that.
    """

    def __init__(
        self,
        guest_id: str,
        launcher: tuple[str, ...],
        plan: Mapping[str, Any],
        sockets: Sequence[int],
        *,
        record: Callable[[int], None],
        group: GuestGroup,
    ) -> None:
        """Start the launcher with a plan and `sockets` as its descriptors from 3 on but 5, which is ours.

        Raises `OSError`, and has left nothing then. Nothing is awaited. Before anything of the guest's runs, `record`
        notes the pid, and `group` takes it in.
        """
        self.group = group
        self.pid: int | None = None
        self.command: int | None = None
        self.end: Ended | None = None
        self.on_child_end: Callable[[Ended], None] = lambda _ended: None
        self._late: asyncio.TimerHandle | None = None
        self._guest_id = guest_id
        self._record = record
        with ExitStack() as theirs, ExitStack() as undo:
            reports, their_reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.callback(their_reports.close)
            self.reports = Reports(reports, on_end=self._child_ended)
            undo.callback(self.reports.close)
            self.console, their_console = console_pair()
            theirs.callback(os.close, their_console)
            undo.callback(self.console.close)
            plan_fd = os.memfd_create("plan", os.MFD_CLOEXEC)
            theirs.callback(os.close, plan_fd)
            os.write(plan_fd, marshal.dumps(dict(plan)))
            os.lseek(plan_fd, 0, os.SEEK_SET)
            listener, dials, *more = sockets
            inherited = (plan_fd, their_console, their_console, listener, dials, their_reports.fileno(), *more)
            self.family = Family(launcher, inherited)
            undo.pop_all()

    async def isolated(self) -> dict[str, str]:
        """See it through its isolation until its command runs; returns why each measure was not applied.

        Raises `VmmError` if it ends before.
        """
        try:
            return await self._isolated()
        except OSError as error:  # it ended between two of our steps
            raise VmmError(f"boot: guest {self._guest_id} ended: {error}{self._last_words()}") from error

    def kill(self) -> None:
        """Kill its command, whose end its first process tells and follows; and all of it, if that takes too long.

        Killed at once, nobody would be left to say what memory the command had taken, with what it had waited for.
        """
        if self.pid is None or self.command is None or self.group.peak_mib is not None:
            self.family.kill()
        elif self._late is None and not self.family.ended.done():
            kill_children(self.pid, spare=set())
            self._late = asyncio.get_running_loop().call_later(_FOLLOWS_WITHIN_S, self.family.kill)

    def hear_no_more(self) -> None:
        """Close what is left of it here once it has ended."""
        self.console.close()
        self.reports.close()

    async def _isolated(self) -> dict[str, str]:
        outcomes: dict[str, str] | None = None
        while True:
            kind, _, rest = (await self._report()).partition("\t")
            if kind == "pid":
                self.pid = int(rest)
                self.family.expect(self.pid)
                self._record(self.pid)
            elif kind == "isolated":
                outcomes = dict(_two_fields(line) for line in rest.splitlines())
            elif kind == "up" and outcomes is not None:
                self.command = int(rest)
                return outcomes
            else:
                what, _, why = rest.partition("\t")
                raise VmmError(f"boot: {what}: {why}{self._last_words()}")
            if outcomes is not None and self.pid is not None:
                await self.group.enter(self.pid)
                self.reports.send(b"go")

    async def _report(self) -> str:
        """What it says next about itself. Raises `VmmError` if it ends instead."""
        message = await self.reports.next()
        if message is None:
            await asyncio.wait({self.family.gone})
            words = in_words(self.family.ended.result())
            raise VmmError(f"boot: guest {self._guest_id} ended: {words}{self._last_words()}")
        return message

    def _last_words(self) -> str:
        text = self.console.text
        return f"; its console ends with:\n{text}" if text else ""

    def _child_ended(self, ended: Ended) -> None:
        if ended.pid == self.command or self.command is None:
            self.end = ended
        self.on_child_end(ended)


def console_pair() -> tuple[Console, int]:
    """A console that we read, and the descriptor to write to it. Raises `OSError`."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ours, False)
    return Console(ours), theirs


def _two_fields(line: str) -> tuple[str, str]:
    first, _, second = line.partition("\t")
    return first, second
