"""The whole system in virtual time: the real front, placement, wire, nodes and invokers, over guests in memory.

Only the monitor, the network, the clock and the dice are made up. With no machine across the network (`single`) the
front places calls on a node of its own process, as `fc-invoke` does; otherwise every machine runs a node daemon behind
the strict listener, and the front is a `cluster-agent`.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

from msgspec import Struct
from uvicorn.server import ServerState

from fakes.vmm import At, FakeVmm, Faults, Latencies
from simulation.guests import obedient
from simulation.network import Connection, Listener, Network
from substrate_cluster.admission import Admission
from substrate_cluster.auth import bearer_token, rejected
from substrate_cluster.catalog import Catalog, parse_table, table_in_text
from substrate_cluster.ingress import Limits, head_refusals, public_app
from substrate_cluster.nodes.registry import Registry
from substrate_cluster.nodes.remote import Patience, RemoteNode
from substrate_cluster.placement.executor import PlacedExecutor
from substrate_cluster.placement.index import NodeIndex
from substrate_node.daemon import NodeDaemon, head_refusal
from substrate_node.node import LocalNode, NodeIdentity, NodeTimes
from substrate_node.ready import IdentityMint
from substrate_node.vmm import Base
from substrate_seam.errors import Ran, Reason, SubstrateError
from substrate_seam.events import BaseBuilt, DefectFound, Event, GuestParked, SlotTaken
from substrate_seam.executor import Node
from substrate_seam.report import NodeLimits
from substrate_seam.wire import HEAD_BYTES_MAX
from substrate_service import serving
from substrate_service.listener import ListenerLimits, StrictConfig, protocol_factory, strict_config

FRONT = ("front", 8080)
WIRE_PORT = 8443
NAMES = ("anna", "bert", "cleo", "dora")
"""The callers that the front knows; the token of each is its name."""

BODY_BYTES_MAX = 300_000
FRONT_LIMITS = ListenerLimits(head_s=2.0, idle_s=8.0, body_stall_s=3.0, write_stall_s=2.0, linger_s=0.5)
BODY_WITHIN_S = 2.5
PATIENCE = Patience(connect_s=1.0, order_s=2.0, silence_s=5.0, margin_s=0.5, idle_s=4.0, leave_s=0.5)
QUIET_WITHIN_S = 120.0
WARMING_UP = ("build a base of ", "park ")
"""What a node does for no call in particular, perhaps again and again."""

_LAST_GENERATION = 1_000_000

_number: ContextVar[int | None] = ContextVar("number", default=None)


class Fault(Struct, frozen=True):
    """One rule for the guests of every machine (see `Faults.on`)."""

    at: At
    how: tuple[tuple[str, Any], ...]


class Design(Struct, frozen=True, kw_only=True):
    """How a fleet is built. `machines` is 0 for one process; `table` is a workload table in JSON."""

    table: str
    machines: int = 0
    memory_mib: int = 2048
    caller_limit: int = 64
    body_budget_bytes: int = 1 << 22
    faults: tuple[Fault, ...] = ()
    latencies: Latencies = Latencies(boot_s=0.05)
    contact_cap_s: float | None = None
    wire_cuts: float = 0.0
    """The chance that a connection to a node breaks somewhere on its way."""
    front_cuts: float = 0.0
    """The same of a caller's connection."""


class Crashed(Event, frozen=True, kw_only=True, tag="crashed"):
    """A node daemon and all its guests ended, without a word of theirs."""


class Overcommitted(Event, frozen=True, kw_only=True, tag="overcommitted"):
    """The guests that run on a node hold more memory than it has."""

    held_mib: int


class Names:
    """An authenticator whose source of truth may be away."""

    uses_authorization = True

    def __init__(self) -> None:
        self.is_away = False

    async def authenticate(self, authorization: Sequence[bytes]) -> str:
        """The name that the token is."""
        if self.is_away:
            raise SubstrateError(Reason.DEPENDENCY_UNAVAILABLE, "nobody can be asked who this is", ran=Ran.NO)
        name = bearer_token(authorization).decode("latin-1")
        if name not in NAMES:
            raise rejected()
        return name


class Counted(Faults):
    """Faults that count how often each place saw one."""

    def __init__(self, dice: Random, fired: Counter[str]) -> None:
        super().__init__(dice)
        self._fired = fired

    def draw(self, at: At, workload: str) -> Any:
        """Somebody is at `at`."""
        fault = super().draw(at, workload)
        if fault is not None:
            self._fired[f"fault {at}"] += 1
        return fault


class Journal(list[tuple[str, int]]):
    """What the guests of one start of a node wrote down before they acted; says so to the fleet as well."""

    def __init__(self, told: Callable[[str, int], None]) -> None:
        super().__init__()
        self._told = told

    def append(self, entry: tuple[str, int]) -> None:
        """Keep an entry."""
        super().append(entry)
        self._told(*entry)


class Entry(Struct, frozen=True):
    """One entry of the journal, and where it was written: the node and which start of it."""

    invocation: str
    attempt: int
    node: str
    boot_id: str
    at_s: float


class InOrder(dict[object, None]):
    """A set that keeps its order, which one of objects without a hash of their own would not from run to run."""

    def add(self, thing: object) -> None:
        """Put something in."""
        self[thing] = None

    def discard(self, thing: object) -> None:
        """Take something out; it may not be there."""
        self.pop(thing, None)


@dataclass
class Server:
    """What `serving` drains and aborts: something that listens, over the network in memory."""

    server_state: ServerState
    servers: list[Listener]
    started: bool = True


class Cancelled(Struct, frozen=True):
    """What a node, in one of its starts, said when it was told to cancel an invocation."""

    invocation: str
    node: str
    boot_id: str
    ran: Ran


@dataclass
class Process:
    """One start of a node: its monitor, and, across the network, its daemon and listener."""

    boot_id: str
    vmm: FakeVmm
    node: LocalNode
    daemon: NodeDaemon | None = None
    server: Server | None = None
    is_dead: bool = False


class Machine:
    """Where a node runs, stops, crashes and starts again; its disk, which holds the bases, outlives each start."""

    def __init__(self, fleet: "Fleet", node_id: str, *, networked: bool) -> None:
        self.fleet = fleet
        self.node_id = node_id
        self.address = (node_id, WIRE_PORT)
        self.networked = networked
        self.process: Process | None = None
        self.processes: list[Process] = []
        self._disk: tuple[Base, ...] = ()

    def start(self) -> Process:
        """Start the node anew."""
        fleet, design = self.fleet, self.fleet.design
        boot_id = f"{self.node_id.replace('-', '')}boot{len(self.processes) + 1}"
        faults = Counted(fleet.dice, fleet.fired)
        for fault in design.faults:
            faults.on(fault.at, **dict(fault.how))
        vmm = FakeVmm(
            network=fleet.network,
            root=f"/run/{boot_id}",
            behaviour=obedient,
            faults=faults,
            latencies=design.latencies,
            journal=Journal(lambda invocation, attempt: fleet.noted(invocation, attempt, self.node_id, boot_id)),
            contact_cap_s=design.contact_cap_s,
            refuses={"sealed": "its kernel is not here"},
            left_bases=self._disk,
        )
        process: Process

        def emit(event: Event) -> None:
            if not process.is_dead or isinstance(event, DefectFound):
                fleet.tell(self.node_id, event)
            if isinstance(event, SlotTaken | GuestParked | BaseBuilt):
                running = (guest for guest in vmm.alive.values() if not guest.exited.done())
                held_mib = sum(guest.workload.spec.memory_mib for guest in running)
                if held_mib > design.memory_mib:
                    fleet.tell(self.node_id, Overcommitted(held_mib=held_mib))

        node = LocalNode(
            NodeIdentity(node_id=self.node_id, boot_id=boot_id, arch="amd64"),
            vmms=[vmm],
            memory_mib=design.memory_mib,
            mint=IdentityMint(wall_ns=lambda: int(fleet.loop.time() * 1e9), entropy=fleet.dice.randbytes),
            emit=emit,
            times=NodeTimes(boot_within_s=2.0, restore_within_s=0.5),
        )
        process = self.process = Process(boot_id, vmm, node)
        self.processes.append(process)
        if self.networked:
            process.daemon = NodeDaemon(node, emit=emit, body_bytes_max=BODY_BYTES_MAX)
            limits = ListenerLimits(head_bytes=HEAD_BYTES_MAX)
            config = strict_config(process.daemon, refusal=head_refusal, emit=emit, limits=limits)
            process.server = fleet.serve(self.address, config)
        return process

    async def stop(self, within_s: float) -> None:
        """Stop in good order, as a daemon does when it is asked to."""
        process, self.process = self.process, None
        if process is None:
            return
        await process.node.drain(within_s=within_s)
        await process.node.idle()
        if process.daemon is not None and process.server is not None:
            process.daemon.close()
            await serving._drain([process.server], within_s=2.0, forced=asyncio.Event())
            await serving._abort([process.server])
        await process.node.__aexit__()
        self._disk = tuple(process.vmm.bases.values())

    def crash(self) -> None:
        """End the daemon and its guests between two instructions, as SIGKILL does.

        What is left of the dead process in ours can reach nothing any more, and is seen off in the background.
        """
        process, self.process = self.process, None
        if process is None:
            return
        assert process.server is not None, "only a machine across the network can crash"
        process.is_dead = True
        self.fleet.tell(self.node_id, Crashed())
        self._disk = tuple(process.vmm.bases.values())
        process.vmm.faults = dead = Faults()
        for at in (At.BOOT, At.RESTORE, At.CAPTURE, At.ADOPT, At.DIAL):
            dead.on(at, fail="its daemon is dead", times=None)
        for guest in process.vmm.alive.values():
            guest.die("killed with its daemon")
        for listener in process.server.servers:
            listener.close()
        self.fleet.network.cut(self.address)
        self.fleet.background(self._see_off(process))

    async def _see_off(self, process: Process) -> None:
        assert process.server is not None
        await serving._abort([process.server])
        await process.node.__aexit__()


class Fleet:
    """A front, its nodes, and everything that any of them said or noted."""

    def __init__(self, design: Design, dice: Random, duties: asyncio.TaskGroup) -> None:
        self.design = design
        self.dice = dice
        self.loop = asyncio.get_running_loop()
        self.network = Network(dice)
        self.events: list[tuple[float, str, Event]] = []
        self.journal: list[Entry] = []
        self.hearers: list[Callable[[Event], None]] = []
        self.doomed: dict[Connection, None] = {}
        """Connections that the network has broken, or is going to."""
        self.cancels: list[Cancelled] = []
        self.fired: Counter[str] = Counter()
        self.names = Names()
        self.front: Server | None = None
        self.is_stopping = False
        self._duties = duties
        self._strays = count(1 << 64)
        names = [f"node-{number}" for number in range(1, max(1, design.machines) + 1)]
        self.machines = [Machine(self, name, networked=bool(design.machines)) for name in names]

    # How it is put together.

    def open(self, nodes: dict[str, Node]) -> None:
        """Build the control plane over these nodes and let it serve."""
        self.nodes = nodes
        self.index = NodeIndex()
        self.catalog = Catalog.load(table_in_text(self.design.table, label="table"), emit=self.emit)
        self.registry = Registry(nodes, self.index, workloads=self.catalog.workloads, dice=self.dice, emit=self.emit)
        self.executor = PlacedExecutor(
            nodes, self.index, workload_of=self.catalog.by_digest, dice=self.dice, emit=self.emit
        )
        self.admission = Admission(
            caller_limit=self.design.caller_limit, body_budget_bytes=self.design.body_budget_bytes
        )
        public = public_app(
            catalog=self.catalog,
            executor=self.executor,
            authenticator=self.names,
            admission=self.admission,
            allowed_hosts=[FRONT[0]],
            limits=Limits(body_bytes_max=BODY_BYTES_MAX, body_within_s=BODY_WITHIN_S),
            ready=self.registry.reasons,
            mint_id=self._mint_id,
            emit=self.emit,
        )

        async def numbered(scope: Any, receive: Any, send: Any) -> None:
            """Let the front's mint know which of our calls this is."""
            _number.set(next((int(value) for name, value in scope["headers"] if name == b"x-number"), None))
            await public(scope, receive, send)

        refusal = head_refusals(mint_id=self._mint_id, emit=self.emit)
        self.front = self.serve(FRONT, strict_config(numbered, refusal=refusal, emit=self.emit, limits=FRONT_LIMITS))
        self._following = self._duties.create_task(self.registry.run(), name="follow the nodes")

    def serve(self, address: tuple[str, int], config: StrictConfig) -> Server:
        """Listen on the network as a daemon listens on a socket; some connections will break."""
        chance = self.design.front_cuts if address == FRONT else self.design.wire_cuts
        if chance:
            self.network.on_connect(address, lambda connection: self._maybe_doom(connection, chance))
        state = ServerState()
        state.connections = InOrder()  # type: ignore[assignment]
        return Server(state, [self.network.listen(address, protocol_factory(config, state))])

    def _maybe_doom(self, connection: Connection, chance: float) -> None:
        if self.dice.random() < chance:
            self.doomed[connection] = None
            direction = self.dice.choice([connection.to_server, connection.to_client])
            direction.cut_after(self.dice.choice([0, 1, self.dice.randrange(400), self.dice.randrange(4000)]))

    def _mint_id(self) -> str:
        """The number of the call as an id, so that a story can be followed; a fresh one for a head that has none."""
        number = _number.get()
        return f"{next(self._strays) if number is None else number:032x}"

    # What it tells.

    def emit(self, event: Event) -> None:
        """Hear an event of the front."""
        self.tell("front", event)

    def tell(self, source: str, event: Event) -> None:
        """Hear an event."""
        self.events.append((self.loop.time(), source, event))
        for hearer in self.hearers:
            hearer(event)

    def noted(self, invocation: str, attempt: int, node: str, boot_id: str) -> None:
        """A guest is about to act."""
        self.journal.append(Entry(invocation, attempt, node, boot_id, self.loop.time()))

    # What is done to it.

    def background(self, work: Coroutine[Any, Any, object]) -> None:
        """Let something go on until the end of the fleet."""
        self._duties.create_task(work)

    async def reload(self, table: str) -> None:
        """Put another table in force, as SIGHUP does; only the thread that reads the file is left out."""
        change = self.catalog.replace(parse_table(table.encode(), source="table"))
        await self.registry.update(added=change.added, removed=change.removed)

    async def stop_front(self, drain_s: float) -> None:
        """Stop the front as SIGTERM does; in one process its node stops with it."""
        if self.is_stopping:
            return
        self.is_stopping = True
        assert self.front is not None
        async with asyncio.TaskGroup() as stopping:
            if not self.design.machines:
                stopping.create_task(self._drain_node(drain_s))
            await serving._drain([self.front], within_s=drain_s + 0.5, forced=asyncio.Event())
        await serving._abort([self.front])
        self._following.cancel()
        await asyncio.wait({self._following})

    async def _drain_node(self, drain_s: float) -> None:
        process = self.machines[0].process
        assert process is not None
        await process.node.drain(within_s=drain_s)
        await process.node.idle()

    async def calm(self) -> None:
        """From now on everything goes well; what had gone wrong is mended, also where nobody could be told before."""
        self.names.is_away = False
        for machine in self.machines:
            self.network.heal(machine.address)
            self.network.on_connect(machine.address, None)
            process = machine.process or machine.start()
            process.vmm.faults.clear()
            if process.node.report().draining:
                await process.node.resume()
            await process.node.limit(NodeLimits(generation=_LAST_GENERATION, memory_mib=self.design.memory_mib))
        self.network.on_connect(FRONT, None)

    # What is left of it.

    async def quiet(self) -> list[str]:
        """Wait until nothing of any call is left, and name what does not go."""
        deadline_s = self.loop.time() + QUIET_WITHIN_S
        while (left := self.left()) and self.loop.time() < deadline_s:  # noqa: ASYNC110  # nobody tells of it
            await asyncio.sleep(0.5)
        return left

    def left(self) -> list[str]:
        """Name what calls have left: guests, slots, memory, places in a queue, admissions, connections.

        Parked guests and bases are nobody's call's.
        """
        left = [f"{count} calls of {name} admitted" for name, count in self.admission.in_flight.items()]
        if self.admission.body_bytes:
            left.append(f"{self.admission.body_bytes} bytes of bodies")
        if self.front is not None:
            left += [f"task {task.get_name()} of the front" for task in self.front.server_state.tasks]
        for machine in self.machines:
            if machine.process is not None:
                left += [f"{machine.node_id}: {what}" for what in _left_on(machine.process)]
        return left


def _left_on(process: Process) -> Iterable[str]:
    node = process.node
    parked = [parked for bay in node._pool._bays.values() for parked in bay.parked]
    ids = {entry.guest.guest_id for entry in parked}
    mib = node._ledger.committed_mib - sum(entry.lease.mib for entry in parked)
    yield from (f"guest {guest_id}" for guest_id in process.vmm.alive if guest_id not in ids)
    yield from (f"call {call.id}" for call in node._calls.live)
    names = (task.get_name() for task in node._reaper._tasks)
    yield from (f"cleaning up: {name}" for name in names if not name.startswith(WARMING_UP))
    if mib:
        yield f"{mib} MiB"
    if node._slots._starved:
        yield f"starved {list(node._slots._starved)}"
    if node._bases._holds:
        yield f"bases held {node._bases._holds}"
    for name, queue in node._slots._queues.items():
        if queue.busy or queue.waiting or queue.lines or queue.sessions or queue.held_back:
            yield f"{name}: {queue.busy} busy, {queue.waiting} waiting, sessions {queue.sessions}"


@asynccontextmanager
async def fleet(design: Design, dice: Random) -> AsyncIterator[Fleet]:
    """A fleet for the length of the block; afterwards no guest of it lives, and its memory is all there."""
    async with asyncio.TaskGroup() as duties:
        there = Fleet(design, dice, duties)
        processes = [machine.start() for machine in there.machines]
        nodes: dict[str, Node] = {}
        remotes = []
        for machine, process in zip(there.machines, processes, strict=True):
            nodes[machine.node_id] = process.node
            if machine.networked:
                remote = RemoteNode(
                    machine.node_id,
                    lambda protocol, address=machine.address: there.network.connect(address, protocol),
                    patience=PATIENCE,
                )
                nodes[machine.node_id] = remote
                remotes.append(remote)
        there.open(nodes)
        await there.registry.heard()
        yield there
        await there.calm()
        await there.stop_front(1.0)
        for remote in remotes:
            await remote.__aexit__()
        for machine in there.machines:
            await machine.stop(1.0)
    for machine in there.machines:
        for process in machine.processes:
            assert not process.vmm.alive, f"guests of {process.boot_id} left behind: {list(process.vmm.alive)}"
            assert process.node._ledger.committed_mib == 0, f"memory of {process.boot_id} left behind"
            assert process.node.running == 0
