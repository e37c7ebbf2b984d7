"""What a node remembers of invocations: nothing is delivered twice, and a cancelled id never starts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from real_parts import fuzz_examples
from substrate_node.calls import KEPT_S, Call, Calls
from substrate_seam.errors import DuplicateInvocation, GuestFailed, InvocationCancelled, Ran, SubstrateError

IDS = [f"{number:032x}" for number in range(4)]


class Memory(RuleBasedStateMachine):
    """Calls come, end and are fenced while time goes by; a model that forgets nothing knows what must be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.calls = Calls(clock=lambda: self.now_s)
        self.live: dict[str, tuple[Call, Ran]] = {}
        self.ended: dict[tuple[str, int], float] = {}
        self.ran: dict[str, float] = {}
        self.fenced: dict[str, float] = {}
        self.interrupted: list[str] = []

    def fresh(self, since_s: float | None) -> bool | None:
        """Whether it must be remembered; None when it need not be, but may."""
        if since_s is None:
            return False
        age_s = self.now_s - since_s
        return True if age_s <= KEPT_S else None if age_s <= KEPT_S * 16 / 15 else False

    @rule(invocation_id=st.sampled_from(IDS), attempt=st.integers(1, 3), runs=st.booleans())
    def admit(self, invocation_id: str, attempt: int, *, runs: bool) -> None:
        fenced = self.fresh(self.fenced.get(invocation_id))
        came = (
            True
            if invocation_id in self.live
            else max(
                (self.fresh(self.ended.get((invocation_id, attempt))), self.fresh(self.ran.get(invocation_id))),
                key=(False, None, True).index,
            )
        )
        ran = Ran.MAYBE if runs else Ran.NO

        def interrupt(unwritten: SubstrateError, written: SubstrateError) -> Ran:
            assert isinstance(unwritten, InvocationCancelled)
            assert isinstance(written, GuestFailed)
            self.interrupted.append(invocation_id)
            return ran

        try:
            call = self.calls.admit(invocation_id, attempt, interrupt)
        except InvocationCancelled:
            assert fenced is not False
        except DuplicateInvocation:
            assert fenced is not True
            assert came is not False
        else:
            assert fenced is not True
            assert came is not True
            self.live[invocation_id] = (call, ran)

    @rule(invocation_id=st.sampled_from(IDS), times=st.integers(1, 2))
    def end(self, invocation_id: str, times: int) -> None:
        if invocation_id not in self.live:
            return
        call, ran = self.live.pop(invocation_id)
        for _ in range(times):
            self.calls.end(call, ran)
        self.ended[invocation_id, call.attempt] = self.now_s
        if ran is Ran.MAYBE:
            self.ran[invocation_id] = self.now_s

    @rule(invocation_id=st.sampled_from(IDS))
    def fence(self, invocation_id: str) -> None:
        said = self.calls.fence(invocation_id)
        self.fenced[invocation_id] = self.now_s
        if invocation_id in self.live:
            assert self.interrupted.pop() == invocation_id, "a live call ends"
            assert said is self.live[invocation_id][1]
        else:
            ran = self.fresh(self.ran.get(invocation_id))
            assert ran is None or (said is Ran.MAYBE) == ran
        assert not self.interrupted

    @rule(seconds=st.sampled_from([1.0, 59.0, 600.0, 900.0, 1e6]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.calls._buckets) <= 16
        assert {call.id for call in self.calls.live} == set(self.live)


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=fuzz_examples(20), stateful_step_count=30, deadline=None)


class Clock:
    now_s = 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def calls(clock: Clock) -> Calls:
    return Calls(clock=lambda: clock.now_s)


def unheard(_unwritten: SubstrateError, _written: SubstrateError) -> Ran:
    raise AssertionError("nobody was to be interrupted")


def test_a_call_of_an_hour_is_remembered_for_a_quarter_of_one_after_its_end(calls: Calls, clock: Clock):
    """Not only from its beginning on."""
    call = calls.admit("a", 1, unheard)
    clock.now_s = 3600.0
    calls.end(call, Ran.MAYBE)
    clock.now_s += KEPT_S
    with pytest.raises(DuplicateInvocation) as refused:
        calls.admit("a", 1, unheard)
    assert refused.value.ran is Ran.MAYBE
    assert calls.fence("a") is Ran.MAYBE


def test_a_fence_says_what_any_attempt_did(calls: Calls):
    """The first did not run and may be followed by another; that one may have run."""
    calls.end(calls.admit("a", 1, unheard), Ran.NO)
    calls.end(calls.admit("a", 2, unheard), Ran.MAYBE)
    with pytest.raises(DuplicateInvocation):
        calls.admit("a", 3, unheard)
    assert calls.fence("a") is Ran.MAYBE


def test_ids_of_any_form_are_told_apart(calls: Calls):
    """Agents mint 32 hex digits, but whoever fences may ask for anything."""
    for odd in ("", "x" * 32, "ab" * 16, "AB" * 16, " " * 32, "ü" * 32):
        assert calls.fence(odd) is Ran.NO
        with pytest.raises(InvocationCancelled):
            calls.admit(odd, 1, unheard)
    calls.admit("Ab" * 16, 1, unheard)


def test_memory_does_not_grow_with_time(calls: Calls, clock: Clock):
    """A hundred ids a minute for hours: those of the last quarter of an hour are there, and no others."""
    for minute in range(200):
        for number in range(100):
            calls.end(calls.admit(f"{minute}-{number}", 1, unheard), Ran.MAYBE)
        clock.now_s += 60.0
    assert sum(map(len, calls._buckets)) <= 16 * 100
    clock.now_s += 1e9
    assert calls.fence("0-0") is Ran.NO
    assert sum(map(len, calls._buckets)) == 1


async def test_idle_comes_when_the_last_call_has_ended(calls: Calls):
    """For everyone who waits; at once when there is none; not if another came meanwhile."""
    await calls.idle()
    first = calls.admit("a", 1, unheard)
    order: list[Any] = []

    async def wait() -> None:
        await calls.idle()
        order.append("idle")

    async with asyncio.TaskGroup() as waiters:
        waiters.create_task(wait())
        waiters.create_task(wait())
        given_up = waiters.create_task(wait())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        calls.end(first, Ran.NO)
        second = calls.admit("b", 1, unheard)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == []
        calls.end(second, Ran.NO)
    assert order == ["idle", "idle"]
    assert not calls._idlers
