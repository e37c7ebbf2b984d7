"""A node on a fake monitor in virtual time, and what must be true of it whatever a story does to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import Any, TypeVar

from fakes.vmm import Behaviour, FakeVmm, Faults, GuestAnswer, GuestCall, Latencies, echo
from simulation import virtual_time
from simulation.network import Network
from simulation.virtual_time import VirtualLoop
from substrate_node.node import LocalNode, NodeIdentity, NodeTimes
from substrate_node.ready import IdentityMint
from substrate_seam.errors import Ran, SubstrateError
from substrate_seam.events import Event
from substrate_seam.invocation import Demands, GuestRequest, Invocation
from substrate_seam.workload import Workload, WorkloadSpec

T = TypeVar("T")
EventT = TypeVar("EventT", bound=Event)


def workload(name: str = "echo", **fields: Any) -> Workload:
    """A workload of 100 MiB and one slot, unless told otherwise."""
    return Workload.of(
        WorkloadSpec(**{"name": name, "command": ("run",), "memory_mib": 100, "concurrency": 1, **fields})
    )


class House:
    """A node, its monitor, and everything that either of them said."""

    def __init__(self, dice: Random, *, memory_mib: int, times: NodeTimes | None, vmm: dict[str, Any]) -> None:
        self.dice = dice
        self.events: list[Event] = []
        self.faults = Faults(dice)
        self.vmm = FakeVmm(network=Network(dice, latency_s=(0.000_05, 0.000_1)), faults=self.faults, **vmm)
        self.node = LocalNode(
            NodeIdentity(node_id="n1", boot_id="b1", arch="amd64"),
            vmms=[self.vmm],
            memory_mib=memory_mib,
            mint=mint(dice),
            emit=self.events.append,
            times=times,
        )
        self.loop = asyncio.get_running_loop()
        self.overdrawn: list[str] = []
        self._ids = 0
        freed, ledger = self.node._ledger._freed, self.node._ledger

        def audited() -> None:
            running_mib = sum(
                guest.workload.spec.memory_mib for guest in self.vmm.alive.values() if not guest.exited.done()
            )
            if running_mib > ledger.committed_mib:
                self.overdrawn.append(f"{running_mib} MiB run, {ledger.committed_mib} MiB are accounted for")
            freed()

        ledger._freed = audited

    @property
    def journal(self) -> list[tuple[str, int]]:
        """What reached the workload of any guest, in order."""
        return self.vmm.journal

    def said(self, kind: type[EventT]) -> list[EventT]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def invocation(self, workload: Workload, **fields: Any) -> Invocation:
        """A call of a workload; its id is new unless given."""
        self._ids += 1
        request = {"method": "POST", "target": "/invoke", "headers": (), "body": b"ping"}
        request |= {key: fields.pop(key) for key in tuple(fields) if key in request}
        usual = {
            "id": f"{self._ids:032x}",
            "attempt": 1,
            "workload": workload.ref,
            "session": None,
            "caller": "alice",
            "demands": Demands(),
            "request": GuestRequest(**request),
            "start_within_s": 30.0,
            "run_within_s": 30.0,
        }
        return Invocation(**{**usual, **fields})

    async def call(self, workload: Workload, **fields: Any) -> bytes:
        """One whole call; the body of its reply."""
        return await self.run(self.invocation(workload, **fields))

    async def run(self, invocation: Invocation) -> bytes:
        """One whole call; the body of its reply."""
        async with self.node.invoke(invocation) as reply:
            body = b"".join([piece async for piece in reply.body])
            assert reply.receipt is not None
            assert reply.receipt.body_bytes == len(body)
            return body

    async def heard(self, invocation: Invocation) -> bytes | SubstrateError:
        """One whole call; the body of its reply, or what its caller is told instead."""
        try:
            return await self.run(invocation)
        except SubstrateError as error:
            return error

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Let something go on beside the story."""
        return self.loop.create_task(work)

    async def warmed(self, *workloads: Workload) -> None:
        """Ensure workloads and wait until their bases and parked guests are there."""
        for each in workloads:
            await self.node.ensure(each)
        await asyncio.sleep(5.0)
        reported = self.node.report().workloads
        for each in workloads:
            assert reported[each.digest].parked == each.spec.pool
            assert bool(reported[each.digest].base) == each.spec.warm_base

    @property
    def committed_mib(self) -> int:
        """What the ledger has leased."""
        return self.node._ledger.committed_mib

    def assert_truth(self, invocation: Invocation, ran: Ran) -> None:
        """What was told of an invocation agrees with what its guests wrote down."""
        entries = self.journal.count((invocation.id, invocation.attempt))
        assert entries <= 1, "it ran twice"
        assert not (entries and ran is Ran.NO), "it ran, and that was denied"

    def assert_nothing_is_left(self) -> None:
        """No guest, no slot, no MiB, no call."""
        assert not self.vmm.alive
        assert self.committed_mib == 0
        assert not self.overdrawn, "memory was given back before its guest was gone"
        assert self.node.running == 0
        assert not any(hosted.serving for hosted in self.node._hosting.hosted.values())
        assert not self.node._slots._starved
        for name, queue in self.node._slots._queues.items():
            assert (name, queue.busy, queue.waiting) == (name, 0, 0)
            assert not queue.lines
            assert not queue.held_back
            assert not queue.sessions
        assert not self.node._reaper._tasks
        assert self.node._pool._leaving_mib == 0
        assert self.node._pool._stock_mib == 0
        assert not self.node._bases._holds
        assert not self.node._bases.starving


def mint(dice: Random) -> IdentityMint:
    """Identities from the dice and a clock of its own."""
    return IdentityMint(wall_ns=lambda: 1_700_000_000_000_000_000, entropy=dice.randbytes)


@asynccontextmanager
async def house(
    dice: Random, *, memory_mib: int = 1000, times: NodeTimes | None = None, **vmm: Any
) -> AsyncIterator[House]:
    """A node for the length of the block; afterwards nothing of it is left, and nothing ran twice."""
    home = House(dice, memory_mib=memory_mib, times=times, vmm=vmm)
    async with home.node:
        yield home
    home.assert_nothing_is_left()
    assert len(home.journal) == len(set(home.journal)), "something ran twice"


def simulated(story: Callable[[House], Awaitable[T]], *, seed: int = 1, **options: Any) -> T:
    """Live through a story in a house of its own; no task, timer or connection may outlive it."""

    async def main(dice: Random) -> T:
        async with house(dice, **options) as home:
            return await story(home)

    return virtual_time.run(main, seed=seed).value


def at_pass(number: int, act: Callable[[], object]) -> None:
    """Do something between two passes of the loop: the `number`-th from now and the next; nothing else is disturbed.

    It is done when the clock has moved and before anything that is due then.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    wait, due = loop._selector.instead, loop.passes + number

    def counted(timeout_s: float | None) -> None:
        wait(timeout_s)
        if loop.passes == due:
            act()

    loop._selector.instead = counted


def chatter(*chunks: bytes, pace_s: float = 0.0, status: int = 200, chunked: bool = True) -> Behaviour:
    """A guest that answers with these chunks."""

    async def behave(_guest: object, _call: GuestCall) -> GuestAnswer:
        return GuestAnswer(status=status, chunks=chunks, chunked=chunked, pace_s=pace_s)

    return behave


def busy_for(seconds: float) -> Behaviour:
    """A guest that takes its time, then echoes."""

    async def behave(guest: Any, call: GuestCall) -> GuestAnswer:
        await asyncio.sleep(seconds)
        return await echo(guest, call)

    return behave


SLOW = Latencies(boot_s=2.0, restore_s=0.2, kill_s=0.05, discard_s=0.05)
