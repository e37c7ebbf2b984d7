"""The process behind a warm base, and the clones that were made of it."""

from __future__ import annotations

import asyncio

from substrate_node.offloop import off_loop
from substrate_node.processes.family import kill_children
from substrate_node.procvm.clone import Clone
from substrate_node.procvm.launch import Launch
from substrate_node.procvm.record import RunDirectory
from substrate_node.procvm.reports import Ended
from substrate_node.procvm.wire import ZygoteWire

_EARLY_MAX = 64


class Zygote:
    """A captured process that is cloned on demand. Its clones are its siblings: they outlive it, not the daemon.

    Once its `wire` is lost, it can't be cloned any more. `retire` ends it; with the last clone, nothing of it is left.
    """

    def __init__(self, launch: Launch, wire: ZygoteWire, directory: RunDirectory) -> None:
        self.wire = wire
        self.place = directory.path
        self._launch = launch
        self._directory = directory
        self._retired = False
        self._clones: set[Clone] = set()
        self._ends: dict[int, asyncio.Future[Ended | None]] = {}  # of living clones, by the pid that the zygote knows
        self._early: dict[int, Ended] = {}  # the last that ended before they were known
        wire.on_lost = self._lose
        launch.on_child_end = self._on_child_end
        launch.family.ended.add_done_callback(self._on_end)
        if wire.lost:
            self._lose()

    def record(self) -> None:
        """Note which process it is, for a later daemon. Raises `OSError`."""
        assert self._launch.pid is not None
        self._directory.make_without_socket()
        self._directory.record(self._launch.pid)

    def adopt(self, clone: Clone) -> None:
        """Answer for a clone from before it is made until it is let go."""
        self._clones.add(clone)

    async def make_room(self) -> None:
        """Have its control group hold what its clones leave there. Raises `OSError`."""
        await self._launch.group.make_room(len(self._clones))

    async def let_go(self, clone: Clone) -> None:
        """Hear that nothing is left of a clone; may be repeated."""
        self._clones.discard(clone)
        await self._leave_nothing_unless_needed()

    async def retire(self) -> None:
        """Make no more clones, and leave nothing of it; while clones live, that is left to the last of them."""
        self._retired = True
        self.wire.close()
        await self._leave_nothing_unless_needed()

    def end(self, inner_pid: int) -> asyncio.Future[Ended | None]:
        """The end of a clone, once it is told; None if it won't be."""
        ended: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()
        if inner_pid in self._early:
            ended.set_result(self._early.pop(inner_pid))
        elif self._launch.family.ended.done():
            ended.set_result(None)
        else:
            self._ends[inner_pid] = ended
        return ended

    async def _leave_nothing_unless_needed(self) -> None:
        if self._retired and not self._clones:
            self._launch.family.kill()
            await asyncio.wait({self._launch.family.gone})
            await self._launch.group.remove()
            await off_loop(self._directory.remove)  # a disk takes its time to remove a directory

    def _on_child_end(self, end: Ended) -> None:
        if end.pid == self._launch.command:
            self.wire.close()  # a child of the zygote may hold the other end open
            return
        ended = self._ends.pop(end.pid, None)
        if ended is not None:
            ended.set_result(end)
            return
        self._early[end.pid] = end
        if len(self._early) > _EARLY_MAX:
            del self._early[next(iter(self._early))]

    def _on_end(self, _: asyncio.Future[int]) -> None:
        """Even its first process is dead, and with it all of its clones."""
        self._launch.hear_no_more()
        self.wire.close()
        for ended in self._ends.values():
            ended.set_result(None)
        self._ends.clear()

    def _lose(self) -> None:
        """Kill the zygote, what its workload started, and clones that it made and had no time to tell of."""
        first = self._launch.pid
        if first is None or self._launch.family.ended.done():
            return
        kill_children(first, spare={clone.pid for clone in self._clones})
