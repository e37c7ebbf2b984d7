"""One Firecracker process and the guest in it: its birth, the way to its API, its end, the connections to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from substrate_node.fcvm.api import Api, ApiError, Request
from substrate_node.fcvm.cell import API_SOCKET, LOG, VSOCK, Cell
from substrate_node.fcvm.listeners import Listeners
from substrate_node.fcvm.release import Release
from substrate_node.offloop import off_loop
from substrate_node.processes.addresses import peer_address
from substrate_node.processes.console import Console
from substrate_node.processes.family import Family, in_words
from substrate_node.processes.usage import sampled_alone, share_mib
from substrate_node.vmm import Exit, Inbound, P, Sample, VmmError

_MEANINGS = {
    0: "the guest rebooted or shut down",
    1: "Firecracker gave up; its log says why",
    2: "an unexpected error within Firecracker",
    148: "a system call that its filter forbids",
    149: "a page of its memory file is gone: the file was truncated",
    150: "a segmentation fault",
    151: "a file grew over its limit",
    152: "its configuration is wrong",
    153: "its command line is wrong",
    154: "its CPU time is used up",
    156: "it was hung up on",
    157: "an illegal instruction",
}
_PAUSE_S_MIN, _PAUSE_GROWTH = 0.0005, 1 / 16
"""Between two looks for the API's socket passes a sixteenth of the time waited so far, and half a millisecond."""
_END_WITHIN_S = 1.0


class MicroVm:
    """A guest in a microVM. Made half: `reach` waits for the API, `ask` sets it up, `destroy` leaves nothing of it."""

    def __init__(
        self, guest_id: str, cell: Cell, release: Release, *, lent: Mapping[str, Path], inbound: Inbound
    ) -> None:
        """Start Firecracker in `cell`, with the files of `lent` there by name; raises `OSError`, with all undone.

        Nothing is awaited; it takes 1 or 2 ms.
        """
        self.guest_id = guest_id
        self.root = cell.root
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._cell = cell
        self._api = Api(cell.root / API_SOCKET, release)
        with ExitStack() as theirs, ExitStack() as undo:
            cell.directory.mkdir(mode=0o700)  # one that is there already is not ours to undo
            undo.callback(cell.remove)
            cell.build()
            for name, source in lent.items():
                cell.lend(source, name)
            self._listeners = Listeners(cell.root / VSOCK, inbound, hand_over=cell.hand_over)
            undo.callback(self._listeners.close)
            self._log = _open_log(cell)
            undo.callback(self._log.close)
            console, their_console = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, their_console)
            os.set_blocking(console, False)
            self._console = Console(console)
            undo.callback(self._console.close)
            nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            theirs.callback(os.close, nothing)
            descriptors = (nothing, their_console, their_console)
            self._family = Family(cell.argv(), descriptors, own_pids=cell.own_pids)
            undo.pop_all()
        self._family.ended.add_done_callback(self._on_end)

    async def reach(self) -> None:
        """Wait until the API answers the phone. Raises `VmmError` if the process ends before."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while not self.exited.done():
            with suppress(FileNotFoundError, ConnectionRefusedError):  # not there yet, or bound and not yet listening
                await self._api.connect()
                return
            await asyncio.wait({self.exited}, timeout=_PAUSE_S_MIN + (loop.time() - began_s) * _PAUSE_GROWTH)
        raise VmmError(f"Firecracker ended before it could be reached: {self._epitaph()}")

    async def ask(self, *requests: Request) -> None:
        """Make requests of the API, one after another. Raises `VmmError`, which tells of the process's end too."""
        try:
            for request in requests:
                await self._api.send(request)
        except ApiError as error:
            if error.status and not error.going:
                raise
            await asyncio.wait({self.exited}, timeout=_END_WITHIN_S)
            if not self.exited.done():
                raise
            raise VmmError(f"{error}. It ended: {self._epitaph()}") from error

    def hang_up(self) -> None:
        """Close the connection to the API; the next request makes a new one."""
        self._api.close()

    async def dial(self, protocol: Callable[[], P]) -> P:
        """See `Guest.dial`."""
        if self.exited.done():
            raise ConnectionRefusedError(f"guest {self.guest_id} has ended")  # its socket stays when it dies
        with peer_address(self.root / VSOCK) as address:
            return (await asyncio.get_running_loop().create_unix_connection(protocol, address))[1]

    @property
    def console(self) -> str:
        """See `Guest.console`."""
        return self._console.text

    def sample(self) -> Sample:
        """See `Guest.sample`. Peak memory includes the pages of the base that it shares with other guests."""
        return Sample(None, None) if self.exited.done() else sampled_alone(self._family.pid)

    def share_mib(self) -> float | None:
        """What it really costs in memory now (see `usage.share_mib`)."""
        return None if self.exited.done() else share_mib(self._family.pid)

    @property
    def gone(self) -> asyncio.Future[None]:
        """See `Guest.gone`."""
        return self._family.gone

    def kill(self) -> None:
        """See `Guest.kill`."""
        self._family.kill()

    async def destroy(self) -> None:
        """Kill it and leave nothing of it; may be cancelled and begun again."""
        self.kill()
        await asyncio.wait({self.gone})
        await off_loop(self._cell.remove)

    def _epitaph(self) -> str:
        ended = self.exited.result()
        return f"{ended.words}; it said last:\n{ended.console}" if ended.console else ended.words

    def _on_end(self, ended: asyncio.Future[int]) -> None:
        for resource in (self._console, self._log, self._listeners, self._api):
            resource.close()
        said = [self._log.text, self._console.text]  # the end is what is read
        if os.waitstatus_to_exitcode(ended.result()) > 0:  # Firecracker's own doing, and its log says why
            said.reverse()
        self.exited.set_result(Exit(_meaning(ended.result()), "\n".join(filter(None, said))))


def _open_log(cell: Cell) -> Console:
    """A pipe by name for Firecracker's log: bounded, apart from the guest's console, and nothing of it on the disk."""
    path = cell.root / LOG
    os.mkfifo(path, 0o600)
    cell.hand_over(path)
    return Console(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))  # also to write: it never ends then


def _meaning(status: int) -> str:
    """How Firecracker ended, as people say it, with what its exit status means."""
    words = in_words(status)
    meaning = _MEANINGS.get(os.waitstatus_to_exitcode(status))
    return f"{words} ({meaning})" if meaning else words
