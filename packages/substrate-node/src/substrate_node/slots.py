"""The one queue: per workload name, bounded, fair between callers, aware of deadlines. It decides and does no I/O.

A call starts when a slot of its workload is free and its `take` gives it what else it needs (its stake: memory, or a
parked guest that has some). Who lacks only the stake starves; the starved are served in turn, one call of each
workload, and nobody overtakes them. Every step costs the same however many workloads, callers and waiters there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from substrate_seam.errors import GuestUnavailable, Reason

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)

_SMOOTHING = 0.2
_RETRY_AFTER_S_MIN, _RETRY_AFTER_S_MAX = 1.0, 60.0


class Take(Protocol[S_co]):
    """Gives a call its stake, or None if there is none now.

    While calls of other workloads have starved for longer, it is not `in_turn` and may take only what they can't use.
    """

    def __call__(self, *, in_turn: bool) -> S_co | None:
        """Take it, if it is there."""
        ...


class Ticket(Generic[S]):
    """One call at the queue: waiting until `stake` is there, then holding a slot until it leaves."""

    __slots__ = ("_queue", "caller", "granted_s", "on_grant", "session", "stake", "take")

    def __init__(self, queue: _Queue[S], caller: str, session: tuple[str, str] | None, take: Take[S]) -> None:
        self._queue: _Queue[S] | None = queue
        self.caller = caller
        self.session = session
        self.take = take
        self.stake: S | None = None
        self.on_grant: Callable[[], None] | None = None
        self.granted_s: float | None = None


class _Queue(Generic[S]):
    """One workload name."""

    __slots__ = (
        "busy",
        "closed",
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
        self.closed = False
        self.busy = 0
        self.waiting = 0
        self.service_s: float | None = None
        # Callers in turn, each with its calls in order. Dicts, because a call may leave from the middle.
        self.lines: dict[str, dict[Ticket[S], None]] = {}
        # Of each session one call is in line or running; the others are held back, in order.
        self.sessions: set[tuple[str, str]] = set()
        self.held_back: dict[tuple[str, str], dict[Ticket[S], None]] = {}

    @property
    def startable(self) -> bool:
        """Whether some call has a slot and lacks only its stake."""
        return bool(self.lines) and self.busy < self.concurrency

    def expected_wait_s(self, waiting: int, before_it: int = 0) -> float:
        """How long the last of `waiting` calls waits, `before_it` of them for one another, as far as measured."""
        return (self.service_s or 0.0) * max(waiting / self.concurrency, before_it)


class Slots(Generic[S]):
    """The queues of all workloads of one node. `clock` gives seconds; `changed` hears the name of a changed queue."""

    def __init__(self, *, clock: Callable[[], float], changed: Callable[[str], None] = lambda _: None) -> None:
        self._clock = clock
        self._changed = changed
        self._queues: dict[str, _Queue[S]] = {}
        self._starved: dict[str, None] = {}  # the longest starved first

    def configure(self, name: str, *, concurrency: int, queue: int, sessioned: bool) -> None:
        """Open a queue or change it; calls that wait or run are not disturbed."""
        line = self._queues.setdefault(name, _Queue(name))
        line.concurrency, line.limit, line.sessioned, line.closed = concurrency, queue, sessioned, False
        self._dispatch(line)

    def close(self, name: str) -> None:
        """Forget a queue as soon as nobody is in it."""
        queue = self._queues.get(name)
        if queue is not None:
            queue.closed = True
            self._forget_closed(queue)

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

    def retry_after_s(self, name: str) -> float:
        """When a call of `name` that is refused now may hope for a slot, in seconds from 1 to 60."""
        queue = self._queues.get(name)
        return _advice_s(queue.expected_wait_s(queue.waiting + 1) if queue else 0.0)

    def enter(
        self,
        name: str,
        *,
        caller: str,
        session: str | None,
        within_s: float,
        take: Take[S],
        promised: Callable[[int], bool] = lambda _: False,
    ) -> Ticket[S]:
        """Join the queue; the ticket has its stake at once if nothing is in the way.

        `promised` says whether stakes for so many calls are about to be there: calls with a slot of their own that lack
        only such a stake may wait for it however short the queue is. Raises `GuestUnavailable`: `capacity` or `memory`
        when the queue is full, `queue-timeout` when, as far as measured, its turn would come after `within_s`.
        """
        queue = self._queues[name]
        key = (caller, session) if queue.sessioned and session is not None else None
        ticket = Ticket(queue, caller, key, take)
        self._line_up(queue, ticket)
        self._dispatch(queue)
        if ticket.granted_s is None:
            refusal = self._refusal(queue, ticket, within_s, promised)
            if refusal is not None:
                self.leave(ticket)
                raise refusal
        self._changed(name)
        return ticket

    def leave(self, ticket: Ticket[S]) -> None:
        """Stop waiting, or free the slot for the next call. Leaving twice is leaving once. The stake stays yours."""
        queue, ticket._queue = ticket._queue, None  # noqa: SLF001  # the ticket is ours
        if queue is None:
            return
        if ticket.granted_s is None:
            self._withdraw(queue, ticket)
            self._dispatch(queue)
            self.retry()  # it may have been the one that all the starved waited for
        else:
            queue.busy -= 1
            self._measure(queue, self._clock() - ticket.granted_s)
            self._end_session(queue, ticket)
            self._dispatch(queue)
        self._forget_closed(queue)
        self._changed(queue.name)

    def retry(self) -> None:
        """Something that stakes are made of was freed: serve those that lack only it, in turn."""
        while self._starved:
            queue = self._queues[next(iter(self._starved))]
            if queue.startable and not self._serve(queue, in_turn=True):
                return
            del self._starved[queue.name]
            if queue.startable:
                self._starved[queue.name] = None

    def offer(self, name: str) -> None:
        """There is a stake that only calls of `name` can use: it goes to one of them, whoever else starves."""
        queue = self._queues.get(name)
        if queue is not None:
            self._dispatch(queue)

    def _dispatch(self, queue: _Queue[S]) -> None:
        """Serve a queue as far as its slots and stakes go."""
        while queue.startable:
            if not self._serve(queue, in_turn=not self._starved):
                self._starved.setdefault(queue.name)
                return
        if queue.name in self._starved:
            del self._starved[queue.name]
            self.retry()

    def _serve(self, queue: _Queue[S], *, in_turn: bool) -> bool:
        """Grant a slot to the call whose turn it is, if its stake can be had."""
        caller = next(iter(queue.lines))
        ticket = next(iter(queue.lines[caller]))
        stake = ticket.take(in_turn=in_turn)
        if stake is None:
            return False
        self._remove_from_line(queue, ticket)
        if caller in queue.lines:  # whoever was served goes to the end
            queue.lines[caller] = queue.lines.pop(caller)
        queue.busy += 1
        ticket.stake, ticket.granted_s = stake, self._clock()
        ticket.take = _taken  # the call refers to its ticket: no garbage is left for the collector
        if ticket.on_grant is not None:
            ticket.on_grant()
            self._changed(queue.name)
        return True

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
        held = self._held_with(queue, ticket)
        if ticket not in held:
            self._remove_from_line(queue, ticket)
            self._end_session(queue, ticket)
            return
        assert ticket.session is not None
        queue.waiting -= 1
        del held[ticket]
        if not held:
            del queue.held_back[ticket.session]

    def _remove_from_line(self, queue: _Queue[S], ticket: Ticket[S]) -> None:
        line = queue.lines[ticket.caller]
        del line[ticket]
        if not line:
            del queue.lines[ticket.caller]
        queue.waiting -= 1

    def _held_with(self, queue: _Queue[S], ticket: Ticket[S]) -> dict[Ticket[S], None]:
        """The calls held back until the one of the same session that is in line or runs has ended."""
        return queue.held_back.get(ticket.session, {}) if ticket.session is not None else {}

    def _end_session(self, queue: _Queue[S], ticket: Ticket[S]) -> None:
        """Let the next call of the same session into the line."""
        session = ticket.session
        if session is None:
            return
        held = self._held_with(queue, ticket)
        if not held:
            queue.sessions.discard(session)
            return
        following = next(iter(held))
        del held[following]
        if not held:
            del queue.held_back[session]
        queue.lines.setdefault(following.caller, {})[following] = None

    def _forget_closed(self, queue: _Queue[S]) -> None:
        if queue.closed and not queue.busy and not queue.waiting:
            self._queues.pop(queue.name, None)

    def _refusal(
        self, queue: _Queue[S], ticket: Ticket[S], within_s: float, promised: Callable[[int], bool]
    ) -> GuestUnavailable | None:
        """Why a call that has just lined up had better not wait, if so."""
        name, before_it = queue.name, len(self._held_with(queue, ticket))
        retry_after_s = _advice_s(queue.expected_wait_s(queue.waiting))
        over, free = queue.waiting - queue.limit, queue.concurrency - queue.busy
        if over > 0 and (before_it or over > free or not promised(min(queue.waiting, free))):
            if queue.startable and not before_it:
                return GuestUnavailable(
                    Reason.MEMORY,
                    f"a slot of {name!r} is free, but the node has no memory for its guest now",
                    hint=f"Retry in {retry_after_s:.0f} s, or give the node more memory.",
                    retry_after_s=retry_after_s,
                )
            return GuestUnavailable(
                Reason.CAPACITY,
                f"{queue.busy} of {queue.concurrency} slots of {name!r} are busy and "
                f"{queue.waiting - 1} calls wait, which is all its queue holds",
                hint=f"Retry in {retry_after_s:.0f} s, or raise `concurrency` or `queue` of {name!r}.",
                retry_after_s=retry_after_s,
            )
        # What is measured says how soon slots come free; about memory it says nothing.
        expected_s = queue.expected_wait_s(0 if queue.startable else queue.waiting, before_it)
        if expected_s > within_s:
            return GuestUnavailable(
                Reason.QUEUE_TIMEOUT,
                f"a slot of {name!r} is expected in {expected_s:.1f} s, after the {within_s:.1f} s "
                "in which this call must start",
                hint=f"Retry in {retry_after_s:.0f} s, or raise `concurrency` or `startTimeout` of {name!r}.",
                retry_after_s=retry_after_s,
            )
        return None

    def _measure(self, queue: _Queue[S], held_s: float) -> None:
        known = queue.service_s
        queue.service_s = held_s if known is None else known + _SMOOTHING * (held_s - known)


def _taken(*, in_turn: bool) -> None:  # the form of `Take`
    """A ticket gets its stake once."""


def _advice_s(expected_s: float) -> float:
    return min(max(expected_s, _RETRY_AFTER_S_MIN), _RETRY_AFTER_S_MAX)
