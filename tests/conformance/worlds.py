"""Where a `Node` is tested: worlds that hold one, with guests that do as their request says.

A world is an async context manager made from dice. It yields a `Bench` and, at its end, insists that nothing is left.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import parse_qs, urlsplit

from uvicorn.server import ServerState

from fakes.vmm import FakeGuest, FakeVmm, Faults, GuestAnswer, GuestCall
from simulation.network import Network
from substrate_cluster.nodes.remote import Patience, RemoteNode
from substrate_node.daemon import NodeDaemon, head_refusal
from substrate_node.node import LocalNode, NodeIdentity, NodeTimes
from substrate_node.ready import IdentityMint
from substrate_seam.errors import GuestFailed, GuestTimeout, Ran, SubstrateError
from substrate_seam.events import DefectFound, Event
from substrate_seam.executor import Node
from substrate_seam.invocation import Demands, GuestRequest, Headers, Invocation, Isolation, Receipt, Started
from substrate_seam.wire import HEAD_BYTES_MAX
from substrate_seam.workload import Workload, WorkloadSpec
from substrate_service.listener import ListenerLimits, protocol_factory, strict_config
from substrate_service.sinks import all_to, fan_out
from substrate_service.stories import Stories

NODE_ID = "node-1"
ADDRESS = (NODE_ID, 8443)
MEMORY_MIB = 4096
GUEST_MIB = 1024
BODY_BYTES_MAX = 1_000_000
SETTLE_S = 30.0
"""Longer than anything of a call may take to go once it is over."""


def workload(name: str = "echo", **fields) -> Workload:
    """A workload whose guests take a quarter of the node's memory."""
    spec = {"command": (name,), "memory_mib": GUEST_MIB, "concurrency": 2} | fields
    return Workload.of(WorkloadSpec(name=name, **spec))


async def obedient(guest: FakeGuest, call: GuestCall) -> GuestAnswer:
    """Do what the query of the target says; without one, answer with the request's body."""
    asked = {name: values[0] for name, values in parse_qs(urlsplit(call.target).query).items()}
    await asyncio.sleep(float(asked.get("after_s", 0)))
    if "die" in asked:
        guest.die(asked["die"], console="last words")
    if "hang" in asked:
        await asyncio.Future()
    if "head" in asked:
        return GuestAnswer(
            headers=tuple((f"heard-{name}", value.encode("latin-1")) for name, value in call.headers.items())
        )
    chunks = (call.body,)
    if "pieces" in asked:
        chunks = (b"x" * int(asked.get("bytes", 1000)),) * int(asked["pieces"])
    return GuestAnswer(
        status=int(asked.get("status", 200)),
        headers=(("content-type", "text/plain"), ("x-twice", "1"), ("x-twice", "2")),
        chunks=chunks,
        chunked="chunked" in asked,
        pace_s=float(asked.get("pace_s", 0)),
    )


@dataclass
class Outcome:
    """What a caller got of one call."""

    invocation: Invocation
    status: int = 0
    headers: Headers = ()
    body: bytes = b""
    started: Started | None = None
    receipt: Receipt | None = None
    error: SubstrateError | None = None
    cancelled: bool = False

    @property
    def whole(self) -> bool:
        """Whether the guest's answer came to its end."""
        return self.receipt is not None


@dataclass
class Bench:
    """A node, the calls made on it, and what can be seen of it from outside.

    `faults` plans what goes wrong with its guests; `journal` is what they wrote down before they acted.
    """

    node: Node
    faults: Faults
    journal: list[tuple[str, int]]
    left: Callable[[], list[str]]
    """Names what is left of calls: guests, slots, memory, places in a queue."""
    background: Callable[[Coroutine[Any, Any, object]], object]
    """Lets something go on beside the story; the world waits for its end."""
    workload: Callable[..., Workload] = workload
    """Makes a workload of a name whose guests do as they are asked."""
    isolation: Isolation = Isolation.MICROVM
    end_of_exit_3: str = "exit status 3"
    """How the end of a guest is told whose first process exits with 3."""
    long_s: float = 5.0
    """Long enough for others to wait for it."""
    going_s: float = 2.0
    """As long as a guest may take to go."""
    outcomes: list[Outcome] = field(default_factory=list)
    _minted: int = 0

    def invocation(self, work: Workload, target: str = "/invoke", **changes) -> Invocation:
        """A new invocation of a workload; `method`, `headers` and `body` are its request's."""
        self._minted += 1
        request = GuestRequest(
            changes.pop("method", "POST"), target, changes.pop("headers", ()), changes.pop("body", b"hello")
        )
        usual = {
            "id": f"{self._minted:032x}",
            "attempt": 1,
            "workload": work.ref,
            "session": None,
            "caller": "anna",
            "demands": Demands(),
            "start_within_s": 30.0,
            "run_within_s": 60.0,
        }
        return Invocation(request=request, **(usual | changes))

    async def call(self, work: Workload | Invocation, target: str = "/invoke", **changes) -> Outcome:
        """Make a call and read its answer to the end."""
        made = work if isinstance(work, Invocation) else self.invocation(work, target, **changes)
        outcome = Outcome(made)
        self.outcomes.append(outcome)
        try:
            async with self.node.invoke(made) as reply:
                outcome.status, outcome.headers, outcome.started = reply.status, reply.headers, reply.started
                async for piece in reply.body:
                    outcome.body += piece
                outcome.receipt = reply.receipt
        except SubstrateError as error:
            outcome.error = error
        except asyncio.CancelledError:
            outcome.cancelled = True
            raise
        return outcome

    async def refusal(self, work: Workload | Invocation, target: str = "/invoke", **changes) -> SubstrateError:
        """Make a call that must fail, and return how it did."""
        outcome = await self.call(work, target, **changes)
        assert outcome.error is not None, f"the call got status {outcome.status}"
        return outcome.error

    def entries(self, invocation_id: str) -> int:
        """How often a guest wrote down that it acts on this invocation."""
        return [noted for noted, _ in self.journal].count(invocation_id)

    async def gone(self, within_s: float) -> None:
        """Wait until nothing of a call is left. Raises `TimeoutError`."""
        async with asyncio.timeout(within_s):
            while self.left():  # noqa: ASYNC110  # what is given back goes behind the caller's back, and tells nobody
                await asyncio.sleep(0.01)

    async def settled(self, within_s: float = SETTLE_S) -> None:
        """Give everything the time to go, and insist that it has gone and that every caller was told the truth."""
        await asyncio.sleep(within_s)
        assert not self.left()
        assert len(self.journal) == len(set(self.journal)), "something ran twice"
        for outcome in self.outcomes:
            self._check_truth(outcome)

    def _check_truth(self, outcome: Outcome) -> None:
        ran, error = self.entries(outcome.invocation.id), outcome.error
        assert ran <= 1, f"{outcome} ran {ran} times"
        if error is not None and error.ran is Ran.NO:
            alike = [other for other in self.outcomes if other.invocation.id == outcome.invocation.id]
            assert not ran or len(alike) > 1, f"{error!r} says that it did not run, and it did"
            assert not outcome.status, f"{error!r} after the head of an answer"
        if outcome.whole:
            assert ran == 1
        if outcome.status and error is not None:
            assert isinstance(error, GuestFailed | GuestTimeout)


World = Callable[[Random], AbstractAsyncContextManager[Bench]]


@asynccontextmanager
async def local_node(dice: Random) -> AsyncIterator[Bench]:
    """A node in this process."""
    async with machine(dice) as there, running(there) as node, asyncio.TaskGroup() as background:
        yield there.bench(node, background)


@asynccontextmanager
async def remote_node(dice: Random) -> AsyncIterator[Bench]:
    """The same node behind the wire: both its ends, the strict listener, and a network between them."""
    async with wired(dice) as wire:
        yield wire.bench


@asynccontextmanager
async def wired(dice: Random, **patience: float) -> AsyncIterator["Wire"]:
    """As `remote_node`, with the wire itself at hand."""
    async with (
        machine(dice) as there,
        running(there) as here,
        served(here, there),
        speaking_to(there.network, **patience) as node,
        asyncio.TaskGroup() as background,
    ):
        yield Wire(there.bench(node, background), node, there)


@dataclass
class Machine:
    """A monitor in memory, its network, and the node that runs there just now."""

    network: Network
    vmm: FakeVmm
    events: list[Event] = field(default_factory=list)
    node: LocalNode | None = None

    def bench(self, node: Node, background: asyncio.TaskGroup) -> Bench:
        """A bench for the node of this machine, or for what stands for it."""
        return Bench(node, self.vmm.faults, self.vmm.journal, self.left, background.create_task)

    def left(self) -> list[str]:
        """What calls have left; bases and parked guests are no call's."""
        defects = [f"defect {event.traceback}" for event in self.events if isinstance(event, DefectFound)]
        if self.node is None:
            return defects
        parked = {entry.guest.guest_id for bay in self.node._pool._bays.values() for entry in bay.parked}
        queues = self.node._slots._queues.values()
        mib = self.node._ledger.committed_mib - GUEST_MIB * len(parked)
        return [
            *defects,
            *(f"guest {guest_id}" for guest_id in self.vmm.alive if guest_id not in parked),
            *(f"{queue.busy} busy, {queue.waiting} waiting" for queue in queues if queue.busy or queue.waiting),
            *(f"session {session}" for queue in queues for session in queue.sessions),
            *(f"call {call.id}" for call in self.node._calls.live),
            *([f"{mib} MiB"] if mib else []),
        ]


@dataclass
class Wire:
    """A bench behind a wire that can be cut."""

    bench: Bench
    node: RemoteNode
    there: Machine

    @property
    def network(self) -> Network:
        """What is between the two ends."""
        return self.there.network


@asynccontextmanager
async def machine(dice: Random) -> AsyncIterator[Machine]:
    """A machine that may run a node, and has no guest left in the end."""
    network = Network(dice)
    there = Machine(network, FakeVmm(network=network, behaviour=obedient, faults=Faults(dice)))
    yield there
    assert not there.vmm.alive
    assert not there.left()


@asynccontextmanager
async def running(there: Machine, *, boot_id: str = "boot1") -> AsyncIterator[LocalNode]:
    """A node on that machine; when it ends, its memory is all there."""
    stories = Stories(clock=lambda: round(asyncio.get_running_loop().time() * 1e9))
    node = LocalNode(
        NodeIdentity(node_id=NODE_ID, boot_id=boot_id, arch="amd64"),
        vmms=[there.vmm],
        memory_mib=MEMORY_MIB,
        mint=IdentityMint(wall_ns=lambda: 1, entropy=Random(boot_id).randbytes),
        emit=fan_out(all_to(there.events.append), stories.sink),
        story=stories.story,
        times=NodeTimes(boot_within_s=10.0),
    )
    async with node:
        there.node = node
        yield node
    there.node = None
    assert node._ledger.committed_mib == 0


@asynccontextmanager
async def served(node: LocalNode, there: Machine, **options) -> AsyncIterator[NodeDaemon]:
    """Serve a node at `ADDRESS` by its daemon, over the listener that a node daemon has."""
    daemon = NodeDaemon(node, emit=there.events.append, body_bytes_max=BODY_BYTES_MAX, **options)
    limits = ListenerLimits(head_bytes=HEAD_BYTES_MAX)
    config = strict_config(daemon, refusal=head_refusal, emit=there.events.append, limits=limits)
    state = ServerState()
    listener = there.network.listen(ADDRESS, protocol_factory(config, state))
    try:
        yield daemon
    finally:
        listener.close()
        daemon.close()
        for connection in list(state.connections):
            connection.abort()
        for task in list(state.tasks):
            task.cancel()
        if state.tasks:
            await asyncio.wait(set(state.tasks))


@asynccontextmanager
async def speaking_to(network: Network, **patience: float) -> AsyncIterator[RemoteNode]:
    """An agent's view of the node at `ADDRESS`, heard again and again as a registry would."""
    node = RemoteNode(NODE_ID, lambda protocol: network.connect(ADDRESS, protocol), patience=Patience(**patience))
    async with asyncio.TaskGroup() as duties, node:
        first = asyncio.Event()
        following = duties.create_task(follow(node, first), name="follow")
        await first.wait()
        yield node
        following.cancel()


async def follow(node: Node, heard: asyncio.Event) -> None:
    """Hear a node, for ever."""
    while True:
        with suppress(SubstrateError):
            async with aclosing(node.reports()) as stream:
                async for _ in stream:
                    heard.set()
        await asyncio.sleep(0.5)
