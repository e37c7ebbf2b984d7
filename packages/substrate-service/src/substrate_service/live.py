"""The live state of a daemon: what its events told lately, and what its nodes say of themselves when somebody asks.

An event costs the same however many workloads, guests and callers there are; everything kept is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec import structs

from substrate_seam import events as e
from substrate_seam.errors import Ran, Reason
from substrate_seam.events import Emit, Event
from substrate_seam.invocation import Isolation
from substrate_seam.report import NodeReport, WorkloadReport
from substrate_service.snapshot import Failure, Guests, NodeNow, Snapshot, Trouble, WorkloadNow
from substrate_service.traffic import Window, class_of, together

WINDOW_S: Final = 60
WORKLOADS_SHOWN: Final = 50
FAILURES_KEPT, TROUBLES_KEPT = 20, 10
_SLOT_S: Final = 5.0  # of the calls of one workload: coarser than of all calls, because there are many workloads
_WORKLOADS_MAX: Final = 1000
_LEFT_OFF: Final = "other"
_MESSAGE_CHARS: Final = 300

_TROUBLES: Final[Mapping[type[Event], Callable[[Any], tuple[str, str]]]] = {
    e.WarningRaised: lambda x: (x.message, x.hint),
    e.BaseFailed: lambda x: (f"the warm base of {x.workload!r} could not be built: {x.message}", ""),
    e.BaseCondemned: lambda x: (f"a warm base of {x.workload!r} was given up: {x.message}", ""),
    e.CatalogRefused: lambda x: (f"the table of {x.source} was refused: {x.message}", "The one before is in force."),
    e.NodeLost: lambda x: (f"node {x.node!r} can't be heard: {x.message}", ""),
    e.CleanupFailed: lambda x: (f"{x.what} failed: {x.message}", "Something of it may be left."),
    e.DefectFound: lambda x: (
        f"a defect of this software: {x.message}",
        "The log has the traceback.",
    ),
}


class Live:
    """Keeps what happened lately. `clock` gives seconds, `wall_ms` milliseconds since the epoch.

    Calls are counted by what their callers were told; in a daemon without a front, by their exchanges with guests. A
    start counts once a guest was claimed; where that is told elsewhere, once its reply or its error is here.
    """

    def __init__(self, *, clock: Callable[[], float], wall_ms: Callable[[], int]) -> None:
        self._clock = clock
        self._wall_ms = wall_ms
        self._daemon, self._version, self._started_s = "", "", clock()
        self._has_front = False
        self._all = Window(slots=WINDOW_S, slot_s=1.0)
        self._by_workload: dict[str, Window] = {}
        self._turned_away: deque[tuple[int, dict[str, int]]] = deque(maxlen=WINDOW_S)
        self._open: dict[str, str | None] = {}  # how the guest of each call at the front was started, if it has one
        self._claimed: dict[str, tuple[str, float]] = {}
        self._failures: deque[Failure] = deque(maxlen=FAILURES_KEPT)
        self._troubles: dict[str, Trouble] = {}
        self._rules: Mapping[type[Event], Callable[[Any], None]] = {
            e.DaemonStarted: self._started,
            e.InvocationAccepted: self._accepted,
            e.InvocationEnded: self._ended,
            e.CallRefused: self._refused,
            e.GuestClaimed: self._guest_claimed,
            e.ExchangeEnded: self._exchange_ended,
            e.SlotFreed: self._slot_freed,
            **dict.fromkeys(_TROUBLES, self._troubled),
        }

    def sink(self, kind: type[Event]) -> Emit | None:
        """What is done with events of a kind."""
        return self._rules.get(kind)

    def snapshot(
        self,
        *,
        nodes: Iterable[NodeReport],
        lost: Mapping[str, str],
        reasons: Sequence[str],
        doors: Sequence[str] = (),
    ) -> Snapshot:
        """This moment. `nodes` are whole reports, `lost` says of other nodes why they can't be heard."""
        now_s, reports = self._clock(), list(nodes)
        views = [(report, _by_name(report)) for report in reports]
        ended = self._ended_lately(now_s)
        workloads = _workloads([each for _, by_name in views for each in by_name.values()], ended)
        shown = sorted(workloads, key=lambda x: (-ended.get(x.workload, 0), -x.busy - x.waiting, x.workload))
        shown = [self._with_traffic(each, now_s) for each in shown[:WORKLOADS_SHOWN]]
        weak = sorted(each.workload for each in workloads if each.isolation is Isolation.PROCESS)
        return Snapshot(
            daemon=self._daemon,
            version=self._version,
            at_ms=self._wall_ms(),
            up_s=round(now_s - self._started_s, 1),
            reasons=list(reasons),
            doors=[*doors, *_weakness(weak)],
            window_s=WINDOW_S,
            slots=sum(each.slots for each in workloads),
            busy=sum(each.busy for each in workloads),
            waiting=sum(each.waiting for each in workloads),
            guests=_sum_guests(each.guests for each in workloads),
            traffic=together(self._all.tallies(now_s)).traffic(),
            seconds=[tally.second() for tally in self._all.each(now_s)],
            turned_away=self._turned_away_lately(now_s),
            nodes=[*map(_node, reports, (by_name for _, by_name in views)), *_lost(lost)],
            workloads=shown,
            workloads_left_off=len(workloads) - len(shown),
            failures=list(reversed(self._failures)),
            troubles=list(reversed(self._troubles.values())),
        )

    # What events mean.

    def _started(self, event: e.DaemonStarted) -> None:
        self._daemon, self._version, self._started_s = event.daemon, event.version, self._clock()

    def _accepted(self, event: e.InvocationAccepted) -> None:
        self._has_front = True
        self._open[event.invocation_id] = None

    def _ended(self, event: e.InvocationEnded) -> None:
        failed = (event.reason is not None or event.status >= 500) and not event.client_left
        start = self._open.pop(event.invocation_id, None) or event.start
        self._count(event.workload, start, event.total_ms, failed=failed)
        if failed:
            self._fail(event, event.ran)

    def _refused(self, event: e.CallRefused) -> None:
        second = int(self._clock())
        if not self._turned_away or self._turned_away[-1][0] != second:
            self._turned_away.append((second, {}))
        counts = self._turned_away[-1][1]
        counts[event.reason] = counts.get(event.reason, 0) + 1

    def _guest_claimed(self, event: e.GuestClaimed) -> None:
        if event.invocation_id in self._open:
            self._open[event.invocation_id] = event.start
        elif not self._has_front:
            self._claimed[event.invocation_id] = (event.start, event.queue_ms + event.claim_ms)

    def _exchange_ended(self, event: e.ExchangeEnded) -> None:
        claimed = self._claimed.pop(event.invocation_id, None)
        if claimed is None:
            return
        start, before_ms = claimed
        failed = event.reason not in (None, Reason.CANCELLED) or event.status >= 500
        self._count(event.workload, start, before_ms + event.guest_ms, failed=failed)
        if failed:
            self._fail(event, Ran.MAYBE)

    def _slot_freed(self, event: e.SlotFreed) -> None:
        if event.invocation_id is not None:
            self._claimed.pop(event.invocation_id, None)

    def _troubled(self, event: Event) -> None:
        message, hint = _TROUBLES[type(event)](event)
        self._troubles.pop(message, None)  # told again, it is news again
        self._troubles[message] = Trouble(at_ms=self._wall_ms(), message=message[:_MESSAGE_CHARS], hint=hint)
        if len(self._troubles) > TROUBLES_KEPT:
            del self._troubles[next(iter(self._troubles))]

    def _count(self, workload: str, start: str | None, total_ms: float, *, failed: bool) -> None:
        now_s, class_ = self._clock(), class_of(total_ms)
        self._all.at(now_s).add(start, class_, failed=failed)
        if workload not in self._by_workload and len(self._by_workload) >= _WORKLOADS_MAX:
            workload = _LEFT_OFF
        window = self._by_workload.get(workload)
        if window is None:
            window = self._by_workload[workload] = Window(slots=int(WINDOW_S / _SLOT_S), slot_s=_SLOT_S)
        window.at(now_s).add(start, class_, failed=failed)

    def _fail(self, event: e.InvocationEnded | e.ExchangeEnded, ran: Ran) -> None:
        self._failures.append(
            Failure(
                at_ms=self._wall_ms(),
                invocation_id=event.invocation_id,
                workload=event.workload,
                status=event.status,
                reason=event.reason or "",
                ran=ran if event.reason else "",
                message=event.message[:_MESSAGE_CHARS],
            )
        )

    # What is told.

    def _turned_away_lately(self, now_s: float) -> dict[str, int]:
        counts: dict[str, int] = {}
        for second, reasons in self._turned_away:
            if second > now_s - WINDOW_S:
                for reason, count in reasons.items():
                    counts[reason] = counts.get(reason, 0) + count
        return counts

    def _ended_lately(self, now_s: float) -> dict[str, int]:
        """How many calls of each workload ended; a window in which there was none goes."""
        counts = {name: sum(each.ended for each in window.tallies(now_s)) for name, window in self._by_workload.items()}
        for name in [name for name, count in counts.items() if not count]:
            del self._by_workload[name], counts[name]
        return counts

    def _with_traffic(self, workload: WorkloadNow, now_s: float) -> WorkloadNow:
        window = self._by_workload.get(workload.workload)
        tallies = window.tallies(now_s) if window is not None else ()
        return structs.replace(workload, traffic=together(tallies).traffic())


def _workloads(parts: Iterable[WorkloadNow], called: Iterable[str]) -> list[WorkloadNow]:
    """The workloads of all nodes by name, and those that were called lately although no node knows them any more."""
    known: dict[str, WorkloadNow] = {}
    for part in parts:
        known[part.workload] = _both(known[part.workload], part) if part.workload in known else part
    for name in called:
        known.setdefault(name, WorkloadNow(workload=name))
    return list(known.values())


def _by_name(report: NodeReport) -> dict[str, WorkloadNow]:
    """The workloads of one node by name. Several versions of one share its slots; each has guests of its own."""
    found: dict[str, WorkloadNow] = {}
    for each in report.workloads.values():
        if each is None:
            continue
        guests = Guests(serving=each.serving, parked=each.parked, making=each.making)
        if (other := found.get(each.name)) is not None:
            guests = _sum_guests((other.guests, guests))
        found[each.name] = _with_starting(each, guests, other)
    return found


def _with_starting(report: WorkloadReport, guests: Guests, other: WorkloadNow | None) -> WorkloadNow:
    return WorkloadNow(
        workload=report.name,
        isolation=_weaker(report.isolation, other.isolation if other else None),
        slots=report.concurrency,
        busy=report.busy,
        waiting=report.waiting,
        guests=structs.replace(guests, starting=max(0, report.busy - guests.serving)),
        warm_on=1 if report.base or (other and other.warm_on) else 0,
    )


def _both(one: WorkloadNow, other: WorkloadNow) -> WorkloadNow:
    """A workload on some nodes, and on another one."""
    return WorkloadNow(
        workload=one.workload,
        isolation=_weaker(one.isolation, other.isolation),
        slots=one.slots + other.slots,
        busy=one.busy + other.busy,
        waiting=one.waiting + other.waiting,
        guests=_sum_guests((one.guests, other.guests)),
        warm_on=one.warm_on + other.warm_on,
    )


def _weaker(one: Isolation | None, other: Isolation | None) -> Isolation | None:
    return min((each for each in (one, other) if each), key=lambda each: each.strength, default=None)


def _sum_guests(guests: Iterable[Guests]) -> Guests:
    all_ = list(guests)
    return Guests(
        starting=sum(each.starting for each in all_),
        serving=sum(each.serving for each in all_),
        parked=sum(each.parked for each in all_),
        making=sum(each.making for each in all_),
    )


def _node(report: NodeReport, by_name: Mapping[str, WorkloadNow]) -> NodeNow:
    return NodeNow(
        node=report.node_id,
        isolation=report.isolation,
        arch=report.arch,
        size_mib=report.size_mib,
        free_mib=report.free_mib,
        draining=report.draining,
        waiting=sum(each.waiting for each in by_name.values()),
        guests=_sum_guests(each.guests for each in by_name.values()),
    )


def _lost(lost: Mapping[str, str]) -> Iterator[NodeNow]:
    return (NodeNow(node=node, lost=why or "it can't be heard") for node, why in lost.items())


def _weakness(workloads: Sequence[str]) -> Iterator[str]:
    if workloads:
        names = ", ".join(map(repr, workloads[:3])) + (f" and {len(workloads) - 3} more" if len(workloads) > 3 else "")
        yield f"Guests of {names} are processes of their host. That keeps calls apart; it is no security boundary."
