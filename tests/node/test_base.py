"""Warm bases: built once, beside whatever serves; condemned only by restores in a row; nothing half-made is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from random import Random
from typing import Any

import pytest

from fakes.vmm import At, FakeVmm, Faults, Latencies
from node.house import House, at_pass, busy_for, mint, workload
from node.house import simulated as in_a_house
from simulation import virtual_time
from simulation.network import Network
from substrate_node.base import Bases
from substrate_node.ledger import Ledger
from substrate_node.reaper import Reaper
from substrate_node.vmm import Base
from substrate_seam.events import BaseAdopted, BaseBuilt, BaseCondemned, BaseFailed, Event, GuestParked

WORK = workload("work", warm_base=True, memory_mib=100)
KEY = WORK.digest  # as the fake monitor has it


class Shed:
    """Bases on a fake monitor."""

    def __init__(self, dice: Random, *, memory_mib: int = 1000, **options: Any) -> None:
        self.events: list[Event] = []
        self.faults = Faults(dice)
        self.vmm = FakeVmm(network=Network(dice), faults=self.faults, **options)
        self.reaper = Reaper(emit=self.events.append)
        self.ledger = Ledger(memory_mib)
        self.changed: list[str] = []
        self.bases = Bases(
            ledger=self.ledger,
            mint=mint(dice),
            reaper=self.reaper,
            emit=self.events.append,
            build_within_s=10.0,
            changed=self.changed.append,
        )
        self.loop = asyncio.get_running_loop()

    def said(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def want(self) -> None:
        self.bases.want(KEY, WORK, self.vmm)

    @property
    def current(self) -> Base | None:
        return self.bases.current(KEY)

    async def built(self) -> Base:
        self.want()
        await asyncio.sleep(1.0)
        assert self.current is not None
        return self.current

    def fail(self, base: Base, times: int = 3) -> None:
        for _ in range(times):
            self.bases.failed(base, "it did not wake up")


def simulated(story: Callable[[Shed], Awaitable[Any]], **options: Any) -> Any:
    """Afterwards no guest is left, no memory, no task, and of bases only the current one."""

    async def main(dice: Random) -> Any:
        shed = Shed(dice, **options)
        result = await story(shed)
        shed.bases.stop()
        await shed.reaper.aclose()
        assert not shed.vmm.alive
        assert shed.ledger.committed_mib == 0
        kept = [shed.current.base_id] if shed.current else []
        assert list(shed.vmm.bases) == kept
        assert not shed.bases._leaving
        return result

    return virtual_time.run(main, seed=1).value


def test_a_base_is_built_once_however_many_want_it():
    """It is announced, its guest is gone, and its memory with it."""

    async def story(shed: Shed) -> None:
        for _ in range(5):
            shed.want()
        await asyncio.sleep(0.2)
        assert shed.ledger.committed_mib == 100, "it is counted while it is built"
        for _ in range(5):
            shed.want()
        await asyncio.sleep(1.0)
        shed.want()
        await asyncio.sleep(1.0)
        assert shed.current is not None
        assert shed.changed == [KEY]
        (built,) = shed.said(BaseBuilt)
        assert built.base == shed.current.base_id
        assert (built.build_ms, built.capture_ms) == (round(built.build_ms, 1), round(built.capture_ms, 1))

    simulated(story)


def test_it_is_captured_when_its_guest_is_warm():
    async def story(shed: Shed) -> None:
        shed.want()
        await asyncio.sleep(5.0)
        assert not shed.vmm.bases
        await asyncio.sleep(2.0)
        assert shed.current

    simulated(story, latencies=Latencies(ready_after_s=6.0))


@pytest.mark.parametrize(
    ("at", "fault", "words"),
    [
        (At.BOOT, {"fail": "no kernel"}, "boot: no kernel"),
        (At.CAPTURE, {"fail": "no space"}, "capture: no space"),
        (At.BOOT, {"hang": True}, "it was not ready within 10 s"),
        (At.CAPTURE, {"hang": True}, "it was not ready within 10 s"),
        (At.READY, {"die": True}, "the guest ended before it was ready; it ended with exit status 1"),
    ],
)
def test_a_build_that_fails_is_tried_again_ever_more_patiently(at: At, fault: dict[str, Any], words: str):
    """Each failure says why and when the next try is."""

    async def story(shed: Shed) -> None:
        shed.faults.on(at, **fault, times=3)
        shed.want()
        await asyncio.sleep(60.0)
        assert shed.current
        assert [(event.message, event.retry_in_s) for event in shed.said(BaseFailed)] == [
            (words, 1.0),
            (words, 2.0),
            (words, 4.0),
        ]

    simulated(story)


def test_without_memory_it_waits_and_patience_has_a_bound():
    """Nothing is started; the pauses end at a minute."""

    async def story(shed: Shed) -> None:
        lease = shed.ledger.reserve(1000)
        assert lease is not None
        shed.want()
        await asyncio.sleep(600.0)
        assert not shed.said(BaseBuilt)
        assert [event.retry_in_s for event in shed.said(BaseFailed)][:8] == [1, 2, 4, 8, 16, 32, 60, 60]
        lease.release()
        await asyncio.sleep(61.0)
        assert shed.current

    simulated(story)


def test_no_base_is_begun_while_a_call_lacks_memory():
    """It would take what the call waits for."""

    async def story(house: House) -> None:
        small, big = workload("small", memory_mib=300), workload("big", memory_mib=900)
        await house.node.ensure(small)
        await house.node.ensure(big)
        running = house.start(house.call(small))
        await house.faults.reached(At.BEFORE_HEAD)
        waiting = house.start(house.call(big))
        await asyncio.sleep(0.1)
        await house.node.ensure(WORK)
        await asyncio.sleep(1.0)
        assert house.committed_mib == 300
        assert await running == b"ping"
        assert await waiting == b"ping"
        await asyncio.sleep(60.0)
        assert house.said(BaseBuilt)

    in_a_house(story, behaviour=busy_for(3.0))


def test_parked_guests_make_way_for_a_base_and_come_back_when_it_is_there():
    """It serves every call of its workload; a node full of parked guests would never have one."""

    async def story(house: House) -> None:
        await house.warmed(workload("parked", pool=10))
        await house.node.ensure(WORK)
        await asyncio.sleep(5.0)
        assert house.node.report().workloads[WORK.digest].base
        assert not house.said(BaseFailed)
        assert house.committed_mib == 1000

    in_a_house(story)


def test_a_base_that_cannot_have_its_memory_keeps_nobody_from_being_parked():
    """It waits for what comes free, and not for what calls hold."""

    async def story(house: House) -> None:
        large = workload("large", memory_mib=700, warm_base=True)
        busy, kept = workload("busy", memory_mib=500), workload("kept", pool=4)
        await house.node.ensure(busy)
        running = house.start(house.call(busy))
        await house.faults.reached(At.BEFORE_HEAD)
        await house.node.ensure(kept)
        await house.node.ensure(large)
        await asyncio.sleep(20.0)
        assert house.node.report().workloads[kept.digest].parked == 4
        assert len(house.said(GuestParked)) == 4, "none was ended in vain"
        assert await running == b"ping"
        await asyncio.sleep(60.0)
        assert house.node.report().workloads[large.digest].base

    in_a_house(story, behaviour=busy_for(25.0))


def test_what_an_earlier_daemon_left_is_adopted():
    async def story(shed: Shed) -> None:
        base = await shed.built()
        assert base.base_id == "left"
        assert [event.base for event in shed.said(BaseAdopted)] == ["left"]
        assert not shed.said(BaseBuilt)

    simulated(story, left_bases=[Base(base_id="left", input_key=WORK.digest)])


def test_if_adopting_fails_a_new_one_is_built():
    async def story(shed: Shed) -> None:
        shed.faults.on(At.ADOPT, fail="bad checksum")
        await shed.built()
        assert [event.message for event in shed.said(BaseFailed)] == ["adopt: bad checksum"]

    simulated(story)


def test_three_failed_restores_in_a_row_condemn_a_base():
    """Two do not, nor any number with a success between them."""

    async def story(shed: Shed) -> None:
        base = await shed.built()
        for _ in range(5):
            shed.fail(base, times=2)
            shed.bases.succeeded(base)
        assert not shed.said(BaseCondemned)
        shed.fail(base, times=3)
        assert [event.base for event in shed.said(BaseCondemned)] == [base.base_id]
        await asyncio.sleep(1.0)
        assert shed.current.base_id != base.base_id

    simulated(story)


def test_a_condemned_base_serves_until_its_successor_is_there():
    """However long that takes; it is not adopted again, and it is condemned once."""

    async def story(shed: Shed) -> None:
        base = await shed.built()
        shed.faults.on(At.CAPTURE, fail="no space", times=3)
        shed.fail(base, times=10)
        for _ in range(3):
            await asyncio.sleep(2.0)
            assert shed.current is base
        await asyncio.sleep(10.0)
        assert shed.current is not base
        assert len(shed.said(BaseCondemned)) == 1
        assert not shed.said(BaseAdopted)
        shed.fail(base, times=10)
        assert len(shed.said(BaseCondemned)) == 1, "a late failure of a base that is replaced counts for nothing"
        assert base.base_id not in shed.vmm.bases

    simulated(story)


def test_a_base_is_discarded_with_its_last_holder():
    async def story(shed: Shed) -> None:
        base = await shed.built()
        shed.bases.hold(base)
        shed.bases.hold(base)
        shed.fail(base)
        await asyncio.sleep(1.0)
        for _ in range(2):
            await asyncio.sleep(1.0)
            assert base.base_id in shed.vmm.bases
            shed.bases.release(base)
        await asyncio.sleep(1.0)
        assert base.base_id not in shed.vmm.bases

    simulated(story)


def test_dropping_a_base_leaves_nothing_of_it():
    async def story(shed: Shed) -> None:
        await shed.built()
        shed.bases.drop(KEY)
        await asyncio.sleep(1.0)
        assert not shed.vmm.bases
        shed.bases.drop(KEY)

    simulated(story)


@pytest.mark.parametrize("held", [False, True])
def test_a_base_that_is_on_its_way_out_is_not_adopted(held: bool):
    """Dropped and wanted again at once: another is built, whatever is still there of the first."""

    async def story(shed: Shed) -> None:
        base = await shed.built()
        if held:
            shed.bases.hold(base)
        shed.faults.on(At.DISCARD_BASE, delay_s=5.0)
        shed.bases.drop(KEY)
        second = await shed.built()
        assert second.base_id != base.base_id
        if held:
            shed.bases.release(base)
        await asyncio.sleep(10.0)
        assert shed.current is second
        assert list(shed.vmm.bases) == [second.base_id]

    simulated(story)


@pytest.mark.parametrize("at", [At.DISCARD, At.DISCARD_BASE])
def test_what_cannot_be_discarded_is_tried_again(at: At):
    """And the memory of a guest that may still live is not given to others meanwhile."""

    async def story(shed: Shed) -> None:
        shed.faults.on(at, fail="device busy", times=4)
        base = await shed.built()
        assert base.base_id in shed.vmm.bases
        assert shed.ledger.committed_mib == (100 if at is At.DISCARD else 0)
        shed.bases.drop(KEY)
        await asyncio.sleep(20.0)
        assert not shed.vmm.bases

    simulated(story)


@pytest.mark.parametrize("end", ["drop", "stop", "drop and want"])
def test_a_build_may_be_called_off_at_any_moment(end: str):
    """At every pass of the loop: no guest, no memory and no half a base is left; a whole one stays if it is stopped."""

    async def story(shed: Shed, number: int) -> bool:
        shed.want()
        seen: list[bool] = []

        def call_off() -> None:
            seen.append(shed.current is not None)
            if end == "stop":
                shed.bases.stop()
                return
            shed.bases.drop(KEY)
            if "want" in end:
                shed.want()

        at_pass(number, call_off)
        await asyncio.sleep(20.0)
        assert seen
        assert ("want" in end) == bool(shed.current) or end == "stop"
        if end == "drop":
            assert not shed.vmm.bases
        return seen[0]

    for number in count(1):
        if simulated(lambda shed, number=number: story(shed, number)):
            break
    assert number > 10


def test_nothing_is_built_once_it_is_stopped():
    """Neither a new base nor the successor of a condemned one."""

    async def story(shed: Shed) -> None:
        base = await shed.built()
        shed.bases.stop()
        shed.fail(base)
        shed.bases.want("other", WORK, shed.vmm)
        await asyncio.sleep(10.0)
        assert len(shed.said(BaseBuilt)) == 1
        assert shed.current is base

    simulated(story)


@pytest.mark.parametrize("at", [At.REQUEST, At.BEFORE_HEAD, At.MID_BODY])
def test_what_happens_to_requests_is_not_held_against_a_base(at: At):
    """However many of them fail."""

    async def story(house: House) -> None:
        await house.warmed(WORK)
        house.faults.on(at, die=True, times=None)
        for _ in range(5):
            await house.heard(house.invocation(WORK))
        house.faults.clear()
        assert not house.said(BaseCondemned)

    in_a_house(story)


def test_restores_that_fail_condemn_a_base_while_calls_are_served():
    """By cold boots meanwhile; from the new base as soon as it is there."""

    async def story(house: House) -> None:
        await house.warmed(WORK)
        house.faults.on(At.RESTORE, hang=True, times=3)
        for _ in range(4):
            assert await house.call(WORK) == b"ping"
        assert len(house.said(BaseCondemned)) == 1
        await asyncio.sleep(5.0)
        async with house.node.invoke(house.invocation(WORK)) as reply:
            assert reply.started.start == "warm"
            assert reply.started.base == house.said(BaseBuilt)[-1].base

    in_a_house(story)


def test_a_caller_who_leaves_during_a_restore_is_not_held_against_the_base():
    async def story(house: House) -> None:
        await house.warmed(WORK)
        house.faults.on(At.RESTORED, hang=True, times=5)
        for _ in range(5):
            call = house.start(house.call(WORK))
            await asyncio.sleep(0.5)
            call.cancel()
            await asyncio.wait({call})
        assert not house.said(BaseCondemned)

    in_a_house(story)
