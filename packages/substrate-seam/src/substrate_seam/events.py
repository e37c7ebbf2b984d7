"""What happens, as data: one event per state change, tagged `noun.verb`. The apps decide what becomes of them.

Events of one invocation carry its `invocation_id`, so that a bounded ring can tell its whole story.
Durations are in milliseconds, sizes in MiB unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from substrate_seam.errors import Ran, Reason
from substrate_seam.invocation import Isolation, Start


class Event(Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True, gc=False):
    """Something happened. It holds plain values alone, so the collector of cycles need not look at it."""


Emit = Callable[[Event], None]
"""Where events go; never raises and never waits."""


# One invocation, at the front.


class InvocationAccepted(Event, frozen=True, kw_only=True, tag="invocation.accepted"):
    """The request is whole and may be placed.

    `trace` is the `traceparent` that its guest is given, `parent` the one that its caller gave.
    """

    invocation_id: str
    workload: str
    caller: str
    body_bytes: int
    session: str | None = None
    trace: str = ""
    parent: str = ""


class InvocationPlaced(Event, frozen=True, kw_only=True, tag="invocation.placed"):
    """Placement sent an attempt to a node; `because` says why there, of `candidates` nodes."""

    invocation_id: str
    attempt: int
    node: str
    because: str
    candidates: int


class InvocationRefused(Event, frozen=True, kw_only=True, tag="invocation.refused"):
    """A node, or placement itself (`node` empty), could not start this attempt. Nothing ran."""

    invocation_id: str
    attempt: int
    node: str
    reason: Reason
    message: str


class InvocationEnded(Event, frozen=True, kw_only=True, tag="invocation.ended"):
    """The caller has its answer, or is gone. `reason` is None when the guest answered.

    Where a guest was claimed, the times of its phases are here again, so that this event alone tells of a whole call.
    """

    invocation_id: str
    workload: str
    caller: str
    status: int
    ran: Ran
    total_ms: float
    reason: Reason | None = None
    message: str = ""
    start: Start | None = None
    node: str | None = None
    guest: str | None = None
    queue_ms: float | None = None
    claim_ms: float | None = None
    ready_ms: float | None = None
    guest_ms: float | None = None
    client_left: bool = False
    body_bytes: int = 0


class CallRefused(Event, frozen=True, kw_only=True, tag="call.refused"):
    """A request was turned away at the front before it became an invocation."""

    invocation_id: str
    reason: Reason
    status: int
    message: str


# One invocation, on its node.


class CallQueued(Event, frozen=True, kw_only=True, tag="call.queued"):
    """A call waits for a slot, as the `waiting`-th of its workload."""

    invocation_id: str
    workload: str
    waiting: int


class SlotTaken(Event, frozen=True, kw_only=True, tag="slot.taken"):
    """A call has a slot and its memory; `trace` is the `traceparent` that its guest is given."""

    workload: str
    busy: int
    waiting: int
    free_mib: int
    invocation_id: str | None = None
    queue_ms: float = 0.0
    trace: str = ""


class SlotFreed(Event, frozen=True, kw_only=True, tag="slot.freed"):
    """A slot and its memory are free again."""

    workload: str
    busy: int
    waiting: int
    free_mib: int
    invocation_id: str | None = None
    held_ms: float = 0.0


class StartFailed(Event, frozen=True, kw_only=True, tag="start.failed"):
    """One way of starting a guest failed before the request was written; the next one is tried."""

    invocation_id: str
    workload: str
    start: Start
    guest: str
    message: str
    took_ms: float = 0.0


class GuestClaimed(Event, frozen=True, kw_only=True, tag="guest.claimed"):
    """A ready guest stands for the invocation; the request is about to be written.

    Of `ready_ms`, a guest that was already running took `wait_ready_ms` to be ready.
    """

    invocation_id: str
    attempt: int
    workload: str
    guest: str
    start: Start
    isolation: Isolation
    queue_ms: float
    claim_ms: float
    ready_ms: float
    wait_ready_ms: float = 0.0
    base: str | None = None


class ExchangeEnded(Event, frozen=True, kw_only=True, tag="exchange.ended"):
    """The exchange with the guest is over, and the guest gone; `reason` is None when its reply was whole.

    Of `guest_ms`, the head of the reply took `head_ms`; then ending the guest took `release_ms`.
    """

    invocation_id: str
    attempt: int
    workload: str
    guest: str
    guest_ms: float
    body_bytes: int
    status: int = 0
    reason: Reason | None = None
    message: str = ""
    cpu_ms: float | None = None
    peak_mib: float | None = None
    head_ms: float | None = None
    release_ms: float = 0.0


class InvocationFenced(Event, frozen=True, kw_only=True, tag="invocation.fenced"):
    """A node was told to stop an invocation; its id is fenced."""

    invocation_id: str
    ran: Ran


# Guests, bases, the pool.


class GuestGone(Event, frozen=True, kw_only=True, tag="guest.gone"):
    """A guest and all of it is gone. `exit` is set when it ended by itself, `console` is the end of what it wrote."""

    guest: str
    workload: str
    exit: str = ""
    console: str = ""
    invocation_id: str | None = None

    @property
    def ended_by(self) -> str:
        """`itself` or `node`."""
        return "itself" if self.exit else "node"


class GuestParked(Event, frozen=True, kw_only=True, tag="guest.parked"):
    """A ready guest waits in the pool, as one of `parked`."""

    guest: str
    workload: str
    parked: int


class BaseBuilt(Event, frozen=True, kw_only=True, tag="base.built"):
    """A warm base is published: restores use it from now on. Of `build_ms`, the capture took `capture_ms`."""

    workload: str
    base: str
    build_ms: float
    capture_ms: float = 0.0


class BaseAdopted(Event, frozen=True, kw_only=True, tag="base.adopted"):
    """A base of an earlier run still matches and is used."""

    workload: str
    base: str


class BaseFailed(Event, frozen=True, kw_only=True, tag="base.failed"):
    """Building a base failed; the next try is at least `retry_in_s` seconds away."""

    workload: str
    message: str
    retry_in_s: float


class BaseCondemned(Event, frozen=True, kw_only=True, tag="base.condemned"):
    """Restores from a base failed too often in a row; a replacement is built beside it."""

    workload: str
    base: str
    message: str


# Workloads and nodes.


class WorkloadEnsured(Event, frozen=True, kw_only=True, tag="workload.ensured"):
    """A node knows a workload."""

    workload: str
    digest: str


class WorkloadDropped(Event, frozen=True, kw_only=True, tag="workload.dropped"):
    """Nobody refers to a workload any more; the node has forgotten it."""

    workload: str
    digest: str


class NodeDraining(Event, frozen=True, kw_only=True, tag="node.draining"):
    """A node takes no new invocations."""

    node: str
    within_s: float
    running: int


class NodeResumed(Event, frozen=True, kw_only=True, tag="node.resumed"):
    """A node takes invocations again."""

    node: str


class NodeLimited(Event, frozen=True, kw_only=True, tag="node.limited"):
    """A node has a new size."""

    node: str
    generation: int
    memory_mib: int


class NodeConnected(Event, frozen=True, kw_only=True, tag="node.connected"):
    """An agent hears a node."""

    node: str
    boot_id: str


class NodeLost(Event, frozen=True, kw_only=True, tag="node.lost"):
    """An agent no longer hears a node: its capacity is retracted, its guests are not presumed dead."""

    node: str
    message: str


# Daemons.


class DaemonStarted(Event, frozen=True, kw_only=True, tag="daemon.started"):
    """A daemon serves."""

    daemon: str
    version: str
    listen: str
    admin: str


class DaemonStopping(Event, frozen=True, kw_only=True, tag="daemon.stopping"):
    """A daemon was asked to stop: unready, no new calls, `within_s` seconds for those that run."""

    daemon: str
    signal: str
    within_s: float


class DaemonStopped(Event, frozen=True, kw_only=True, tag="daemon.stopped"):
    """A daemon has left nothing behind; `clean` is false when calls were cut short."""

    daemon: str
    clean: bool


class CatalogLoaded(Event, frozen=True, kw_only=True, tag="catalog.loaded"):
    """A workload table is in force for new calls."""

    source: str
    workloads: int


class CatalogRefused(Event, frozen=True, kw_only=True, tag="catalog.refused"):
    """A reload was refused whole; the table before it stays in force."""

    source: str
    message: str


class OrphanRemoved(Event, frozen=True, kw_only=True, tag="orphan.removed"):
    """Something that an earlier daemon left was provably ours and is gone."""

    guest: str
    pid: int | None = None


class WarningRaised(Event, frozen=True, kw_only=True, tag="warning.raised"):
    """An operator should know; `hint` says what to do."""

    message: str
    hint: str = ""


class CleanupLate(Event, frozen=True, kw_only=True, tag="cleanup.late"):
    """Undoing `what` takes longer than it should; it goes on, owned by the reaper."""

    what: str
    waited_s: float


class CleanupFailed(Event, frozen=True, kw_only=True, tag="cleanup.failed"):
    """Undoing `what` failed; something of it may be left."""

    what: str
    message: str


class DefectFound(Event, frozen=True, kw_only=True, tag="defect.found"):
    """Code of ours broke; `traceback` is for its maintainers."""

    message: str
    traceback: str
    invocation_id: str | None = None
