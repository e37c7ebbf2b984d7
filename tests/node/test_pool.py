"""Parked guests: a call then costs one exchange; they refill by themselves and never stand in the way of a call."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import pytest

from fakes.vmm import At, GuestAnswer, GuestCall, Latencies, echo
from node.house import House, at_pass, busy_for, simulated, workload
from substrate_seam.errors import Reason, SubstrateError
from substrate_seam.events import CleanupFailed, GuestClaimed, GuestGone, GuestParked, WarningRaised
from substrate_seam.invocation import Start
from substrate_seam.report import NodeLimits
from substrate_seam.workload import Workload

POOLED = workload("pooled", pool=2, concurrency=4)
WARM = workload("warm", pool=2, concurrency=4, warm_base=True)
BIG = workload("big", memory_mib=900)


def parked(house: House, of: Workload) -> int:
    return house.node._pool.stock(of.digest)[0]


@pytest.mark.parametrize("kept", [POOLED, WARM])
def test_as_many_guests_are_parked_as_asked_for_and_again_after_each_call(kept: Workload):
    """The memory of every one of them is on the ledger."""

    async def story(house: House) -> None:
        await house.warmed(kept)
        for _ in range(3):
            assert (parked(house, kept), house.committed_mib) == (2, 200)
            assert await house.call(kept) == b"ping"
            await asyncio.sleep(1.0)
        assert {event.start for event in house.said(GuestClaimed)} == {Start.POOL}

    simulated(story)


def test_the_next_guest_is_begun_only_when_a_short_call_is_over():
    """Making it takes processors, and the loop, from the call that has just taken one."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        assert await house.call(POOLED) == b"ping"
        assert house.node._pool.stock(POOLED.digest) == (1, 0)
        await asyncio.sleep(0.021)
        assert house.node._pool.stock(POOLED.digest) == (1, 1)

    simulated(story)


def test_the_guest_that_was_parked_first_serves_first():
    async def story(house: House) -> None:
        await house.warmed(POOLED)
        order = [event.guest for event in house.said(GuestParked)]
        for _ in range(2):
            await house.call(POOLED)
        assert [event.guest for event in house.said(GuestClaimed)] == order

    simulated(story)


def test_two_guests_of_a_workload_are_made_at_a_time():
    """Parking must not crowd out calls."""

    async def story(house: House) -> None:
        many = workload("many", pool=8)
        await house.node.ensure(many)
        most = 0
        while parked(house, many) < 8:
            most = max(most, len(house.vmm.alive) - parked(house, many))
            await asyncio.sleep(0.01)
        assert most == 2

    simulated(story)


def test_a_guest_that_dies_while_parked_is_replaced_and_never_given_to_a_call():
    """Its end is told, and after a second another one stands there."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        victim = house.said(GuestParked)[0].guest
        house.vmm.alive[victim].die("exit status 9", "oops")
        await asyncio.sleep(0.01)
        assert parked(house, POOLED) == 1
        assert [(event.guest, event.exit, event.console) for event in house.said(GuestGone)] == [
            (victim, "exit status 9", "oops")
        ]
        await asyncio.sleep(2.0)
        assert (parked(house, POOLED), house.committed_mib) == (2, 200)

    simulated(story)


def test_a_call_that_takes_a_dying_guest_falls_through():
    """It died in the very moment: the call is served all the same."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        for guest in tuple(house.vmm.alive.values()):
            guest.die("exit status 9")
        assert await house.call(POOLED) == b"ping"

    simulated(story)


@pytest.mark.parametrize("at", [At.BOOT, At.RESTORED])
def test_starts_that_fail_back_off_and_cost_little(at: At):
    """Ever longer pauses, up to a minute; afterwards all is as it should be, and calls were served meanwhile."""

    async def story(house: House) -> None:
        house.faults.on(at, fail="out of luck", times=None)
        await house.node.ensure(POOLED)
        await asyncio.sleep(600.0)
        tries = house.said(WarningRaised)
        assert [event.hint[:25] for event in tries][:3] == [
            "The next try is in 1 s; c",
            "The next try is in 2 s; c",
            "The next try is in 4 s; c",
        ]
        assert 10 <= len(tries) <= 17
        house.faults.clear()
        await asyncio.sleep(70.0)
        assert (parked(house, POOLED), house.committed_mib) == (2, 200)

    simulated(story)


def test_a_guest_that_cannot_be_discarded_keeps_its_memory():
    """It may still live. Once it can, all is as it should be."""

    async def story(house: House) -> None:
        house.faults.on(At.BOOT, fail="out of luck", times=3)
        house.faults.on(At.DISCARD, fail="device busy", times=20)
        await house.node.ensure(POOLED)
        await asyncio.sleep(3.0)
        assert house.committed_mib >= 100 * len(house.vmm.alive) >= 300
        await asyncio.sleep(60.0)
        assert (parked(house, POOLED), house.committed_mib) == (2, 200)

    simulated(story)


def test_a_defect_while_parking_leaks_nothing():
    """Whatever the monitor raises."""

    async def story(house: House) -> None:
        boot = house.vmm.boot

        async def broken(*arguments: object) -> None:
            await boot(*arguments)
            raise KeyError("a bug")

        house.vmm.boot = broken
        await house.node.ensure(POOLED)
        await asyncio.sleep(1.0)
        assert any("a bug" in event.message for event in house.said(CleanupFailed))
        del house.vmm.boot
        await asyncio.sleep(10.0)
        assert (parked(house, POOLED), len(house.vmm.alive), house.committed_mib) == (2, 2, 200)

    simulated(story)


# Memory.


def test_parked_guests_give_way_to_a_call():
    """As many as it needs, and no more; they come back when it is over."""

    async def story(house: House) -> None:
        small = workload("small", pool=4, memory_mib=100)
        await house.warmed(small)
        await house.node.ensure(BIG)
        big = house.start(house.call(BIG))
        await house.faults.reached(At.BEFORE_HEAD)
        assert parked(house, small) == 1
        assert await big == b"ping"
        await asyncio.sleep(2.0)
        assert parked(house, small) == 4

    simulated(story, behaviour=busy_for(0.5))


@pytest.mark.parametrize("callers", [1, 3])
def test_parked_guests_give_way_to_callers_who_may_not_queue(callers: int):
    """`queue: 0` bounds waiting for a slot; with a slot of its own a call waits for memory that is coming free."""

    async def story(house: House) -> None:
        small = workload("small", pool=10, memory_mib=100)
        await house.warmed(small)
        unqueued = workload("unqueued", memory_mib=300, concurrency=3, queue=0)
        await house.node.ensure(unqueued)
        calls = [house.start(house.heard(house.invocation(unqueued))) for _ in range(callers)]
        assert [await call for call in calls] == [b"ping"] * callers

    simulated(story, behaviour=busy_for(0.5))


def test_callers_who_may_not_queue_wait_for_nothing_that_is_not_coming():
    """Slots are free, and what runs will not make room soon: they hear so at once."""

    async def story(house: House) -> None:
        unqueued = workload("unqueued", memory_mib=300, concurrency=3, queue=0)
        await house.warmed(workload("small", pool=1, memory_mib=100), unqueued)
        await house.node.ensure(BIG)
        big = house.start(house.call(BIG))
        await house.faults.reached(At.BEFORE_HEAD)
        began_s = house.loop.time()
        refused = await house.heard(house.invocation(unqueued))
        assert isinstance(refused, SubstrateError)
        assert (refused.reason, house.loop.time()) == (Reason.MEMORY, began_s)
        assert await big == b"ping"

    simulated(story, behaviour=busy_for(5.0))


def test_guests_in_the_making_give_way_too():
    """A call does not wait for a slow boot that nobody needs, nor for one that hangs."""

    async def story(house: House) -> None:
        await house.node.ensure(POOLED)
        house.faults.on(At.BOOT, hang=True, times=2)
        await asyncio.sleep(0)
        await house.node.ensure(BIG)
        began_s = house.loop.time()
        assert await house.call(BIG) == b"ping"
        assert house.loop.time() - began_s < 5.0
        await asyncio.sleep(70.0)
        assert parked(house, POOLED) == 2

    simulated(story, latencies=Latencies(boot_s=2.0))


def test_a_second_call_for_memory_ends_no_more_guests_than_are_needed():
    """What is being ended already counts."""

    async def story(house: House) -> None:
        small = workload("small", pool=8, memory_mib=100)
        await house.warmed(small)
        house.faults.on(At.DISCARD, delay_s=1.0, times=2)
        middle = workload("middle", memory_mib=300)
        other = workload("other", memory_mib=100)
        await house.node.ensure(middle)
        await house.node.ensure(other)
        calls = [house.start(house.call(middle))]
        await asyncio.sleep(0.1)
        assert parked(house, small) == 7
        calls.append(house.start(house.call(other)))
        await asyncio.sleep(0.1)
        assert parked(house, small) == 7, "the others take their turn behind the first"
        for call in calls:
            assert await call == b"ping"

    simulated(story)


def test_a_starving_call_takes_the_guest_that_is_parked_for_it():
    """It was in the making while there was no memory for another one."""

    async def story(house: House) -> None:
        await house.node.ensure(POOLED)
        await house.node.ensure(BIG)
        await asyncio.sleep(0.05)
        big = house.start(house.heard(house.invocation(BIG, start_within_s=20.0)))
        small = house.start(house.heard(house.invocation(POOLED, start_within_s=20.0)))
        for heard in (await big, await small):
            assert heard == b"ping"

    simulated(story, memory_mib=1000, latencies=Latencies(boot_s=2.0))


def test_a_guest_that_is_parked_goes_to_a_waiting_call_of_its_workload_whoever_else_starves():
    """The one in front has been promised other memory."""

    async def story(house: House) -> None:
        holder, big = workload("holder", memory_mib=500), workload("big", memory_mib=400)
        slow = workload("slow", pool=1)
        await house.warmed(workload("small", pool=1))
        for each in (holder, big):
            await house.node.ensure(each)
        holding = house.start(house.call(holder))
        await house.faults.reached(At.BEFORE_HEAD)
        house.faults.on(At.BOOT, delay_s=1.0)
        await house.node.ensure(slow)
        house.faults.on(At.DISCARD, delay_s=5.0)
        first = house.start(house.call(big))
        second = house.start(house.call(slow))
        await asyncio.sleep(3.0)
        assert second.done()
        for call in (first, second, holding):
            assert await call == b"ping"

    async def behave(guest: Any, call: GuestCall) -> GuestAnswer:
        await asyncio.sleep(20.0 if guest.workload.name == "holder" else 0.1)
        return await echo(guest, call)

    simulated(story, behaviour=behave)


def test_nothing_is_parked_while_a_call_lacks_memory():
    """The pool comes last; it does come, as soon as nobody starves, though nothing was freed then."""

    async def story(house: House) -> None:
        other = workload("other", memory_mib=300)
        await house.node.ensure(other)
        holding = house.start(house.call(other))
        await house.faults.reached(At.BEFORE_HEAD)
        await house.node.ensure(BIG)
        starving = house.start(house.heard(house.invocation(BIG, start_within_s=2.0)))
        await asyncio.sleep(0.1)
        await house.node.ensure(POOLED)
        await asyncio.sleep(1.0)
        assert parked(house, POOLED) == 0
        assert isinstance(await starving, SubstrateError)
        await asyncio.sleep(1.0)
        assert parked(house, POOLED) == 2
        await holding

    simulated(story, behaviour=busy_for(10.0))


def test_all_pools_refill_once_there_is_memory():
    """Not only the one that waited longest."""

    async def story(house: House) -> None:
        several = [workload(f"w{number}", pool=1) for number in range(5)]
        for each in several:
            await house.node.ensure(each)
        await asyncio.sleep(5.0)
        assert [parked(house, each) for each in several] == [1, 0, 0, 0, 0]
        await house.node.limit(NodeLimits(generation=1, memory_mib=1000))
        await asyncio.sleep(1.0)
        assert [parked(house, each) for each in several] == [1, 1, 1, 1, 1]

    simulated(story, memory_mib=100)


def test_a_node_that_shrinks_ends_parked_guests_until_it_fits():
    """And no call."""

    async def story(house: House) -> None:
        await house.warmed(workload("small", pool=4))
        await house.node.limit(NodeLimits(generation=1, memory_mib=250))
        await asyncio.sleep(1.0)
        assert house.committed_mib == 200
        await house.node.limit(NodeLimits(generation=2, memory_mib=1000))
        await asyncio.sleep(1.0)
        assert house.committed_mib == 400

    simulated(story)


# The end.


@pytest.mark.parametrize("kept", [POOLED, WARM])
@pytest.mark.parametrize("end", ["drop", "drop and keep", "close"])
def test_a_pool_may_be_dropped_or_closed_at_any_moment(kept: Workload, end: str):
    """At every pass of the loop: every guest of it goes, and its memory; a new one may follow at once."""

    async def story(house: House, number: int) -> bool:
        await house.node.ensure(kept)
        due = asyncio.Event()
        at_pass(number, due.set)
        await due.wait()
        full = parked(house, kept) == 2
        if end != "close":
            house.node._hosting._drop(kept.digest)
        if end == "drop and keep":
            await house.node.ensure(kept)
        if end != "close":
            await asyncio.sleep(20.0)
            assert house.committed_mib == (200 if "keep" in end else 0)
        return full

    for number in count(1):
        if simulated(lambda house, number=number: story(house, number)):
            break
    assert number > 10


def test_parked_guests_of_a_base_that_was_replaced_serve_first():
    """They go while they are good; the ones made later come from the new base."""

    async def story(house: House) -> None:
        await house.warmed(WARM)
        old = house.node.report().workloads[WARM.digest].base
        base = house.node._bases.current(WARM.digest)
        for _ in range(3):
            house.node._bases.failed(base, "it did not wake up")
        await asyncio.sleep(5.0)
        new = house.node.report().workloads[WARM.digest].base
        for _ in range(4):
            await house.call(WARM)
            await asyncio.sleep(1.0)
        assert [event.base for event in house.said(GuestClaimed)] == [old, old, new, new]
        assert new != old

    simulated(story)
