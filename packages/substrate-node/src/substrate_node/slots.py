"""The one queue: per workload name, bounded, fair between callers, aware of deadlines. It decides and does no I/O.

A call starts when a slot of its workload is free and its `take` gives it what else it needs (its stake: memory, or a
parked guest that has some). Every step costs the same however many workloads, callers and waiters there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from substrate_seam.errors import GuestUnavailable, Reason

S = TypeVar("S")

_SMOOTHING = 0.2
_RETRY_AFTER_S_MIN, _RETRY_AFTER_S_MAX = 1.0, 60.0


class Ticket(Generic[S]):
    """One call at the queue: waiting until `stake` is there, then holding a slot until it leaves."""

    __slots__ = ("_queue", "caller", "entered_s", "granted_s", "on_grant", "session", "stake", "take")

    def __init__(
        self,
        queue: _Queue[S],
        caller: str,
        session: tuple[str, str] | None,
        take: Callable[[], S | None],
        entered_s: float,
    ) -> None:
        self._queue: _Queue[S] | None = queue
        self.caller = caller
        self.session = session
        self.take = take
        self.stake: S | None = None
        self.on_grant: Callable[[], None] | None = None
        self.entered_s = entered_s
        self.granted_s: float | None = None


class _Queue(Generic[S]):
    """One workload name."""

    __slots__ = (
        "busy",
        "concurrency",
        "held_back",
        "limit",
        "lines",
        "name",
        "service_s",
        "sessioned",
        "sessions",
        "waiting",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.concurrency = 1
        self.limit = 0
        self.sessioned = False
        self.busy = 0
        self.waiting = 0
        self.service_s: float | None = None
        # Callers in turn, each with its calls in order. Dicts, because a call may leave from the middle.
        self.lines: dict[str, dict[Ticket[S], None]] = {}
        # Of each session one call is in line or running; the others are held back, in order.
        self.sessions: set[tuple[str, str]] = set()
        self.held_back: dict[tuple[str, str], dict[Ticket[S], None]] = {}

    def expected_wait_s(self) -> float | None:
        """How long a call that joins now would wait, as measured; None before anything was measured."""
        return None if self.service_s is None else self.service_s * (self.waiting + 1) / self.concurrency


class Slots(Generic[S]):
    """The queues of all workloads of one node. `clock` gives seconds; `changed` hears the name of a changed queue."""

    def __init__(self, *, clock: Callable[[], float], changed: Callable[[str], None] = lambda _: None) -> None:
        self._clock = clock
        self._changed = changed
        self._queues: dict[str, _Queue[S]] = {}
        self._starved: dict[str, None] = {}

    def configure(self, name: str, *, concurrency: int, queue: int, sessioned: bool) -> None:
        """Open a queue or change it; calls that wait or run are not disturbed."""
        line = self._queues.setdefault(name, _Queue(name))
        line.concurrency, line.limit, line.sessioned = concurrency, queue, sessioned
        self._dispatch(line)

    def close(self, name: str) -> None:
        """Forget a queue nobody is in; one that is in use stays."""
        queue = self._queues.get(name)
        if queue is not None and not queue.busy and not queue.waiting:
            del self._queues[name]

    def load(self, name: str) -> tuple[int, int, float | None]:
        """Calls that hold a slot, calls that wait, and the measured seconds a slot is held."""
        queue = self._queues.get(name)
        return (queue.busy, queue.waiting, queue.service_s) if queue else (0, 0, None)

    @property
    def starving(self) -> bool:
        """Whether some call has a free slot and lacks only its stake."""
        return bool(self._starved)

    def is_starved(self, name: str) -> bool:
        """Whether the calls of `name` wait for their stake rather than for a slot."""
        return name in self._starved

    def enter(
        self, name: str, *, caller: str, session: str | None, within_s: float, take: Callable[[], S | None]
    ) -> Ticket[S]:
        """Join the queue; the ticket has its stake at once if nothing is in the way.

        Raises `GuestUnavailable`: `capacity` when the queue is full, `queue-timeout` when, as far as measured, its
        turn would come after `within_s`.
        """
        queue = self._queues[name]
        key = (caller, session) if queue.sessioned and session is not None else None
        ticket = Ticket(queue, caller, key, take, self._clock())
        if not queue.lines:
            self._line_up(queue, ticket)
            self._dispatch(queue)
            if ticket.stake is not None:
                return ticket
            self._withdraw(queue, ticket)
        self._refuse_hopeless(queue, within_s)
        self._line_up(queue, ticket)
        self._changed(name)
        return ticket

    def leave(self, ticket: Ticket[S]) -> None:
        """Stop waiting, or free the slot for the next call. Leaving twice is leaving once. The stake stays yours."""
        queue, ticket._queue = ticket._queue, None  # noqa: SLF001  # the ticket is ours
        if queue is None:
            return
        if ticket.granted_s is None:
            self._withdraw(queue, ticket)
        else:
            queue.busy -= 1
            self._measure(queue, self._clock() - ticket.granted_s)
            self._end_session(queue, ticket)
            self._dispatch(queue)
        self._changed(queue.name)

    def retry(self) -> None:
        """Something that stakes are made of was freed: serve those that lack only it, the longest starved first."""
        for name in list(self._starved):
            del self._starved[name]
            self._dispatch(self._queues[name])
            if name in self._starved:
                break

    def _dispatch(self, queue: _Queue[S]) -> None:
        while queue.lines and queue.busy < queue.concurrency:
            caller = next(iter(queue.lines))
            ticket = next(iter(queue.lines[caller]))
            stake = ticket.take()
            if stake is None:
                self._starved[queue.name] = None
                return
            self._remove_from_line(queue, ticket)
            if caller in queue.lines:  # whoever was served goes to the end
                queue.lines[caller] = queue.lines.pop(caller)
            queue.busy += 1
            ticket.stake, ticket.granted_s = stake, self._clock()
            if ticket.on_grant is not None:
                ticket.on_grant()
        if not queue.lines:
            self._starved.pop(queue.name, None)

    def _line_up(self, queue: _Queue[S], ticket: Ticket[S]) -> None:
        queue.waiting += 1
        session = ticket.session
        if session is not None and session in queue.sessions:
            queue.held_back.setdefault(session, {})[ticket] = None
            return
        if session is not None:
            queue.sessions.add(session)
        queue.lines.setdefault(ticket.caller, {})[ticket] = None

    def _withdraw(self, queue: _Queue[S], ticket: Ticket[S]) -> None:
        session = ticket.session
        held = queue.held_back.get(session) if session is not None else None
        if session is not None and held is not None and ticket in held:
            del held[ticket]
            if not held:
                del queue.held_back[session]
            queue.waiting -= 1
            return
        self._remove_from_line(queue, ticket)
        self._end_session(queue, ticket)
        if not queue.lines:
            self._starved.pop(queue.name, None)

    def _remove_from_line(self, queue: _Queue[S], ticket: Ticket[S]) -> None:
        line = queue.lines[ticket.caller]
        del line[ticket]
        if not line:
            del queue.lines[ticket.caller]
        queue.waiting -= 1

    def _end_session(self, queue: _Queue[S], ticket: Ticket[S]) -> None:
        """Let the next call of the same session into the line."""
        session = ticket.session
        if session is None or session not in queue.sessions:
            return
        held = queue.held_back.get(session)
        if not held:
            queue.sessions.discard(session)
            return
        following = next(iter(held))
        del held[following]
        if not held:
            del queue.held_back[session]
        queue.lines.setdefault(following.caller, {})[following] = None

    def _refuse_hopeless(self, queue: _Queue[S], within_s: float) -> None:
        expected_s = queue.expected_wait_s()
        retry_after_s = self.retry_after_s(queue.name)
        if queue.waiting >= queue.limit and queue.busy < queue.concurrency and queue.lines:
            raise GuestUnavailable(
                Reason.MEMORY,
                f"a slot of {queue.name!r} is free, but the node has no memory for its guest now",
                hint=f"Retry in {retry_after_s:.0f} s, or give the node more memory.",
                retry_after_s=retry_after_s,
            )
        if queue.waiting >= queue.limit:
            raise GuestUnavailable(
                Reason.CAPACITY,
                f"{queue.busy} of {queue.concurrency} slots of {queue.name!r} are busy and "
                f"{queue.waiting} calls wait, which is all its queue holds",
                hint=f"Retry in {retry_after_s:.0f} s, or raise `concurrency` or `queue` of {queue.name!r}.",
                retry_after_s=retry_after_s,
            )
        if expected_s is not None and expected_s > within_s:
            raise GuestUnavailable(
                Reason.QUEUE_TIMEOUT,
                f"a slot of {queue.name!r} is expected in {expected_s:.1f} s, after the {within_s:.1f} s "
                "in which this call must start",
                hint=f"Retry in {retry_after_s:.0f} s, or raise `concurrency` or `startTimeout` of {queue.name!r}.",
                retry_after_s=retry_after_s,
            )

    def _measure(self, queue: _Queue[S], held_s: float) -> None:
        known = queue.service_s
        queue.service_s = held_s if known is None else known + _SMOOTHING * (held_s - known)

    def retry_after_s(self, name: str) -> float:
        """When a call of `name` that is refused now may hope for a slot, in seconds from 1 to 60."""
        queue = self._queues.get(name)
        expected_s = queue.expected_wait_s() if queue else None
        return min(max(expected_s or 0.0, _RETRY_AFTER_S_MIN), _RETRY_AFTER_S_MAX)
