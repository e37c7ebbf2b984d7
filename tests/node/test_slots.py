"""The one queue: bounded, fair, in order, and it costs the same however many wait."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from real_parts import fuzz_examples
from substrate_node.slots import Slots, Ticket
from substrate_seam.errors import GuestUnavailable, Reason

NAMES = ("a", "b", "c")
NEEDS = {"a": 1, "b": 2, "c": 4}


class Memory:
    """What stakes are made of."""

    def __init__(self, mib: int) -> None:
        self.free = mib
        self.parked: Counter[str] = Counter()

    def take(self, name: str, need: int, *, in_turn: bool) -> str | int | None:
        if self.parked[name]:
            self.parked[name] -= 1
            return f"parked {name}"
        if not in_turn or need > self.free:
            return None
        self.free -= need
        return need


class Queueing(RuleBasedStateMachine):
    """Calls of three workloads come, wait, run and leave while slots, bounds and memory change."""

    waiting_or_running = Bundle("tickets")

    @initialize(mib=st.integers(1, 8))
    def open(self, mib: int) -> None:
        self.now_s = 0.0
        self.memory = Memory(mib)
        self.slots: Slots[Any] = Slots(clock=lambda: self.now_s)
        self.concurrency, self.bound, self.sessioned = {}, {}, {}
        self.entered: list[Ticket[Any]] = []
        self.name_of: dict[Ticket[Any], str] = {}
        self.granted: Counter[Ticket[Any]] = Counter()
        self.running: list[Ticket[Any]] = []
        for name in NAMES:
            self.configure(name, 1, 3, sessioned=name == "b")

    @rule(name=st.sampled_from(NAMES), concurrency=st.integers(1, 4), bound=st.integers(0, 5), sessioned=st.booleans())
    def configure(self, name: str, concurrency: int, bound: int, *, sessioned: bool) -> None:
        self.concurrency[name], self.bound[name], self.sessioned[name] = concurrency, bound, sessioned
        self.slots.configure(name, concurrency=concurrency, queue=bound, sessioned=sessioned)

    @rule(
        target=waiting_or_running,
        name=st.sampled_from(NAMES),
        caller=st.sampled_from("xyz"),
        session=st.sampled_from([None, "s", "t"]),
    )
    def enter(self, name: str, caller: str, session: str | None) -> Ticket[Any] | None:
        waiting = self.slots.load(name)[1]

        def take(*, in_turn: bool) -> Any:
            return self.memory.take(name, NEEDS[name], in_turn=in_turn)

        try:
            ticket = self.slots.enter(name, caller=caller, session=session, within_s=1e9, take=take)
        except GuestUnavailable:
            assert waiting >= self.bound[name], "only a full queue refuses"
            assert self.slots.load(name)[1] == waiting, "a refused call leaves no trace"
            return None
        self.name_of[ticket] = name
        if ticket.stake is None:
            assert waiting < self.bound[name], "the queue is bounded"
            ticket.on_grant = lambda: self.grant(ticket)
            self.entered.append(ticket)
        else:
            self.grant(ticket)
        return ticket

    def grant(self, ticket: Ticket[Any]) -> None:
        name = self.name_of[ticket]
        assert ticket.stake is not None
        before = self.waiting(name, ticket.caller)
        if ticket in before:
            older = before[: before.index(ticket)]
            assert ticket.session not in {other.session for other in older}, "first come, first served"
        self.granted[ticket] += 1
        self.running.append(ticket)
        self.entered = [other for other in self.entered if other is not ticket]

    def waiting(self, name: str, caller: str) -> list[Ticket[Any]]:
        return [ticket for ticket in self.entered if (self.name_of[ticket], ticket.caller) == (name, caller)]

    @rule(ticket=consumes(waiting_or_running), times=st.integers(1, 2))
    def leave(self, ticket: Ticket[Any] | None, times: int) -> None:
        if ticket is None:
            return
        self.now_s += 1.0
        if ticket in self.running:
            self.running.remove(ticket)
            if isinstance(ticket.stake, int):
                self.memory.free += ticket.stake
                self.slots.retry()
        else:
            self.entered.remove(ticket)
        ticket.on_grant = lambda: pytest.fail("a call that has left gets nothing")
        for _ in range(times):
            self.slots.leave(ticket)

    @rule(mib=st.integers(1, 4))
    def grow(self, mib: int) -> None:
        self.memory.free += mib
        self.slots.retry()

    @rule(name=st.sampled_from(NAMES))
    def park(self, name: str) -> None:
        self.memory.parked[name] += 1
        self.slots.offer(name)

    @invariant()
    def the_books_are_right(self) -> None:
        for name in NAMES:
            running = [ticket for ticket in self.running if self.name_of[ticket] == name]
            waiting = [ticket for ticket in self.entered if self.name_of[ticket] == name]
            assert self.slots.load(name)[:2] == (len(running), len(waiting))
        assert all(times == 1 for times in self.granted.values()), "a stake is given once"

    @invariant()
    def sessions_run_one_at_a_time(self) -> None:
        keys = Counter((self.name_of[ticket], ticket.session) for ticket in self.running if ticket.session is not None)
        assert all(number == 1 for number in keys.values())

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        """A call waits for a slot, for its session, for its stake, or behind one that does."""
        lacking = []
        for name in NAMES:
            running_sessions = {
                ticket.session for ticket in self.running if self.name_of[ticket] == name and ticket.session
            }
            free = [
                ticket
                for ticket in self.entered
                if self.name_of[ticket] == name and ticket.session not in running_sessions
            ]
            if free and self.slots.load(name)[0] < self.concurrency[name]:
                assert self.slots.is_starved(name)
                assert not self.memory.parked[name]
                lacking.append(name)
            else:
                assert not self.slots.is_starved(name)
        assert self.slots.starving == bool(lacking)
        if lacking:
            first = next(iter(self.slots._starved))
            assert NEEDS[first] > self.memory.free, "the longest starved could be served"

    def teardown(self) -> None:
        if not hasattr(self, "slots"):
            return
        left = self.entered + self.running
        for ticket in left:
            ticket.on_grant = None
        for ticket in left:
            self.slots.leave(ticket)
        for name in NAMES:
            self.slots.close(name)
        assert not self.slots._queues, "nothing is remembered of a closed queue"
        assert not self.slots.starving


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=fuzz_examples(25), stateful_step_count=30, deadline=None)


class Desk:
    """Slots whose calls all lack nothing but a slot, unless `stakes` says otherwise."""

    def __init__(self, *, concurrency: int = 1, queue: int = 100, sessioned: bool = False) -> None:
        self.now_s = 0.0
        self.changed: list[str] = []
        self.slots: Slots[str] = Slots(clock=lambda: self.now_s, changed=self.changed.append)
        self.slots.configure("w", concurrency=concurrency, queue=queue, sessioned=sessioned)
        self.served: list[str] = []
        self.takes = 0

    def enter(self, label: str, *, session: str | None = None, within_s: float = 1e9, name: str = "w") -> Ticket[str]:
        """A call whose caller is the label's first letter."""

        def take(*, in_turn: bool) -> str | None:
            assert in_turn
            self.takes += 1
            return label

        ticket = self.slots.enter(name, caller=label[0], session=session, within_s=within_s, take=take)
        if ticket.stake is None:
            ticket.on_grant = lambda: self.served.append(label)
        return ticket


def test_callers_take_turns():
    """However many calls one of them has in the queue; each one's own calls stay in order."""
    desk = Desk()
    running = desk.enter("z")
    tickets = {label: desk.enter(label) for label in ("a1", "a2", "a3", "a4", "b1", "c1", "b2")}
    while len(desk.served) < len(tickets):
        desk.slots.leave(running)
        running = tickets[desk.served[-1]]
    assert desk.served == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_a_caller_who_comes_back_joins_the_end():
    """Having been served, it waits for those who came meanwhile."""
    desk = Desk()
    running = desk.enter("a1")
    desk.enter("b1")
    desk.enter("c1")
    desk.enter("a2")
    desk.slots.leave(running)
    assert desk.served == ["b1"]


def test_calls_of_one_session_run_one_at_a_time_and_hold_up_nobody_else():
    """Neither another session, nor a call without one, of the same caller."""
    desk = Desk(concurrency=3, sessioned=True)
    first = desk.enter("a1", session="s")
    second = desk.enter("a2", session="s")
    third = desk.enter("a3", session="s")
    assert desk.enter("a4", session="t").stake == "a4"
    assert desk.enter("a5").stake == "a5"
    assert (second.stake, third.stake) == (None, None)
    desk.slots.leave(first)
    assert desk.served == ["a2"]
    desk.slots.leave(second)
    assert desk.served == ["a2", "a3"]


def test_a_session_belongs_to_its_caller():
    desk = Desk(concurrency=2, sessioned=True)
    assert desk.enter("a1", session="s").stake
    assert desk.enter("b1", session="s").stake


def test_a_call_held_back_by_its_session_may_leave():
    desk = Desk(concurrency=2, sessioned=True)
    first, second, third = (desk.enter(label, session="s") for label in ("a1", "a2", "a3"))
    desk.slots.leave(second)
    desk.slots.leave(first)
    assert desk.served == ["a3"]
    desk.slots.leave(third)
    assert desk.slots.load("w")[:2] == (0, 0)


def test_a_full_queue_refuses_and_says_what_would_help():
    desk = Desk(queue=1)
    desk.enter("a1")
    desk.enter("a2")
    with pytest.raises(GuestUnavailable, match="1 of 1 slots of 'w' are busy and 1 calls wait") as refused:
        desk.enter("a3")
    assert refused.value.reason is Reason.CAPACITY
    assert refused.value.retry_after_s == 1.0
    assert "raise `concurrency` or `queue`" in refused.value.hint


def test_a_call_that_cannot_start_in_time_is_refused_now():
    """As far as measured: two seconds a call, one slot, one call before it."""
    desk = Desk()
    ticket = desk.enter("a0")
    desk.now_s = 2.0
    desk.slots.leave(ticket)
    desk.enter("a1")
    desk.enter("a2", within_s=2.0)
    with pytest.raises(GuestUnavailable, match=r"expected in 4\.0 s, after the 3\.0 s") as refused:
        desk.enter("a3", within_s=3.0)
    assert refused.value.reason is Reason.QUEUE_TIMEOUT
    assert refused.value.retry_after_s == 4.0
    desk.enter("a3", within_s=4.0)


def test_a_session_waits_for_its_own_calls_and_is_told_so():
    """Free slots are of no use to it."""
    desk = Desk(concurrency=10, sessioned=True)
    ticket = desk.enter("a0")
    desk.now_s = 2.0
    desk.slots.leave(ticket)
    desk.enter("a1", session="s")
    desk.enter("a2", session="s", within_s=2.0)
    with pytest.raises(GuestUnavailable, match=r"expected in 4\.0 s"):
        desk.enter("a3", session="s", within_s=3.0)


def test_a_slow_call_in_the_past_refuses_nobody_who_finds_a_slot():
    """Even with no queue at all: an estimate of an hour is no reason to be idle."""
    desk = Desk(queue=0)
    for label in ("a1", "a2"):
        ticket = desk.enter(label, within_s=1.0)
        assert ticket.stake == label
        desk.now_s += 3600.0
        desk.slots.leave(ticket)


@pytest.mark.parametrize("queue", [0, 1])
def test_without_memory_the_reason_is_memory(queue: int):
    """A slot is free, and still the queue is full."""
    desk = Desk(queue=queue)
    for _ in range(queue):
        desk.slots.enter("w", caller="a", session=None, within_s=1e9, take=lambda in_turn: None)
    with pytest.raises(GuestUnavailable) as refused:
        desk.slots.enter("w", caller="a", session=None, within_s=1e9, take=lambda in_turn: None)
    assert refused.value.reason is Reason.MEMORY


class Shortage:
    """Workloads of one slot each that share some memory."""

    def __init__(self, needs: dict[str, int], free: int) -> None:
        self.free, self.needs = free, needs
        self.slots: Slots[int] = Slots(clock=lambda: 0.0)
        self.served: list[str] = []
        self.takes: list[str] = []
        for name in needs:
            self.slots.configure(name, concurrency=10, queue=100, sessioned=False)

    def enter(self, name: str) -> Ticket[int]:
        def take(*, in_turn: bool) -> int | None:
            self.takes.append(name)
            if not in_turn or self.needs[name] > self.free:
                return None
            self.free -= self.needs[name]
            self.served.append(name)
            return self.needs[name]

        return self.slots.enter(name, caller="x", session=None, within_s=1e9, take=take)

    def free_some(self, mib: int) -> None:
        self.free += mib
        self.slots.retry()


def test_a_call_that_was_first_and_lacked_memory_is_served_when_there_is_some():
    short = Shortage({"a": 4}, free=0)
    ticket = short.enter("a")
    assert ticket.stake is None
    assert short.slots.starving
    short.free_some(4)
    assert ticket.stake == 4
    assert not short.slots.starving


def test_small_calls_do_not_starve_a_big_one():
    """Neither those that wait behind it nor those that come later get ahead, though they would fit."""
    short = Shortage({"big": 8, "small": 1}, free=2)
    big = short.enter("big")
    for _ in range(3):
        short.enter("small")
    short.free_some(3)
    assert short.served == []
    short.free_some(3)
    assert short.served == ["big"]
    short.free_some(2)
    assert short.served == ["big", "small", "small"]
    assert big.stake == 8


def test_the_starved_take_turns_by_workload():
    """One with a long queue does not keep the others waiting until it is through."""
    short = Shortage({"a": 1, "b": 1}, free=0)
    for _ in range(3):
        short.enter("a")
    for _ in range(2):
        short.enter("b")
    for _ in range(5):
        short.free_some(1)
    assert short.served == ["a", "b", "a", "b", "a"]


def test_when_the_one_in_front_gives_up_the_others_are_served():
    """Nothing needs to be freed for that."""
    short = Shortage({"big": 8, "small": 1}, free=2)
    big = short.enter("big")
    short.enter("small")
    short.slots.leave(big)
    assert short.served == ["small"]
    assert not short.slots.starving


def test_when_a_big_version_gives_up_a_small_one_of_the_same_workload_is_served():
    """Versions share a queue, and may need more or less."""
    short = Shortage({"w": 8}, free=2)
    big = short.enter("w")
    short.needs["w"] = 1
    needs = {"big": 8}
    big.take = lambda in_turn: None if needs["big"] > short.free else 8
    small = short.enter("w")
    assert small.stake is None
    short.slots.leave(big)
    assert small.stake == 1


def test_a_queue_that_loses_its_slot_starves_no_longer():
    """Lowering `concurrency` under it makes room for those behind."""
    short = Shortage({"big": 8, "small": 1}, free=9)
    short.enter("big")
    short.enter("big")
    short.enter("small")
    assert short.served == ["big"]
    short.slots.configure("big", concurrency=1, queue=100, sessioned=False)
    assert short.served == ["big", "small"]


def test_more_concurrency_serves_those_that_wait():
    desk = Desk()
    for label in ("a1", "a2", "a3"):
        desk.enter(label)
    desk.slots.configure("w", concurrency=3, queue=100, sessioned=False)
    assert desk.served == ["a2", "a3"]


def test_a_closed_queue_is_forgotten_with_its_last_call():
    """Not before, and not if it was opened again meanwhile."""
    desk = Desk()
    first = desk.enter("a1")
    second = desk.enter("a2")
    desk.slots.close("w")
    desk.slots.leave(first)
    assert desk.served == ["a2"]
    desk.slots.leave(second)
    assert not desk.slots._queues
    desk.slots.configure("w", concurrency=1, queue=1, sessioned=False)
    ticket = desk.enter("a3")
    desk.slots.close("w")
    desk.slots.configure("w", concurrency=1, queue=1, sessioned=False)
    desk.slots.leave(ticket)
    assert desk.enter("a4").stake == "a4"


def test_every_change_of_a_queue_is_told():
    """A call that starts at once, one that waits, its grant, and every leave."""
    desk = Desk()
    desk.changed.clear()
    first = desk.enter("a1")
    assert desk.changed == ["w"]
    second = desk.enter("a2")
    assert desk.changed == ["w"] * 2
    desk.slots.leave(first)
    desk.slots.leave(second)
    assert len(desk.changed) >= 4


class Counted(dict):
    """A dict that counts how often it is walked or asked."""

    steps = 0

    def __iter__(self):
        for key in super().__iter__():
            Counted.steps += 1
            yield key


@pytest.mark.parametrize("crowd", [10, 1000])
def test_a_step_costs_the_same_however_many_wait(crowd: int):
    """No step walks the queues, the callers or the calls: at most the head of each is looked at."""
    desk = Desk(queue=10 * crowd)
    slots = desk.slots
    for number in range(crowd):
        slots.configure(f"other-{number}", concurrency=1, queue=1, sessioned=False)
    running = desk.enter("a")
    callers = [
        slots.enter(
            "w",
            caller=f"caller-{number}",
            session=None,
            within_s=1e9,
            take=lambda in_turn: "stake",
        )
        for number in range(crowd)
    ]
    queue = slots._queues["w"]
    slots._queues, slots._starved = Counted(slots._queues), Counted(slots._starved)
    queue.lines = Counted({caller: Counted(line) for caller, line in queue.lines.items()})
    Counted.steps = 0
    last = desk.enter("b")
    slots.leave(last)
    slots.leave(callers[crowd // 2])
    slots.leave(running)
    slots.retry()
    slots.load("w")
    assert callers[0].stake == "stake"
    assert Counted.steps <= 4


def test_estimates_follow_what_is_measured():
    """Recent calls weigh more; the advice stays between a second and a minute."""
    desk = Desk()
    held = deque([10.0] + [1.0] * 20)
    for held_s in held:
        ticket = desk.enter("a")
        desk.now_s += held_s
        desk.slots.leave(ticket)
    service_s = desk.slots.load("w")[2]
    assert service_s == pytest.approx(1.1, abs=0.1)
    assert desk.slots.retry_after_s("w") == pytest.approx(service_s)
    assert desk.slots.retry_after_s("unknown") == 1.0
