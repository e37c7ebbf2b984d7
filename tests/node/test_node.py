"""The node: which workloads it hosts, how big it is, what it says about itself, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise

import pytest

from fakes.vmm import At, FakeVmm
from node.house import SLOW, House, busy_for, mint, simulated, workload
from simulation.network import Network
from substrate_node.node import LocalNode
from substrate_seam.errors import GuestFailed, GuestUnavailable, Ran, Reason, SubstrateError
from substrate_seam.events import (
    CleanupFailed,
    NodeDraining,
    NodeLimited,
    NodeResumed,
    SlotTaken,
    WorkloadDropped,
    WorkloadEnsured,
)
from substrate_seam.invocation import Invocation, Isolation
from substrate_seam.report import NodeLimits, NodeReport

ONE = workload("one")
WARM = workload("warm", warm_base=True)
POOLED = workload("pooled", pool=1, warm_base=True)


@asynccontextmanager
async def heard(house: House) -> AsyncIterator[list[tuple[float, NodeReport]]]:
    """What a reader of reports hears, and when."""
    reports: list[tuple[float, NodeReport]] = []

    async def listen() -> None:
        async with aclosing(house.node.reports()) as stream:
            async for report in stream:
                reports.append((house.loop.time(), report))  # noqa: PERF401  # as they come

    task = house.start(listen())
    await asyncio.sleep(0.001)
    try:
        yield reports
    finally:
        task.cancel()
        await asyncio.wait({task})


# Reports.


def test_the_first_report_is_whole_and_comes_at_once():
    """Who, how big, what it can do, and every workload."""

    async def story(house: House) -> None:
        await house.warmed(ONE, POOLED)
        async with heard(house) as reports:
            ((_, first),) = reports
        assert first.full
        assert (first.node_id, first.boot_id, first.arch) == ("n1", "b1", "amd64")
        assert (first.size_mib, first.free_mib) == (1000, 900)
        assert first.isolation is Isolation.MICROVM
        assert set(first.features) >= {"sessioned", "pool"}
        assert set(first.workloads) == {ONE.digest, POOLED.digest}
        assert (first.workloads[POOLED.digest].parked, bool(first.workloads[POOLED.digest].base)) == (1, True)
        assert first == house.node.report()

    simulated(story)


def test_reports_follow_changes_within_50_ms_and_come_every_2_s():
    """At most one per 50 ms, however much happens; only what changed is in them."""

    async def story(house: House) -> None:
        busy = workload("busy", concurrency=50, memory_mib=1)
        await house.node.ensure(busy)
        await house.node.ensure(ONE)
        async with heard(house) as reports:
            await asyncio.sleep(5.0)
            times = [time_s for time_s, _ in reports]
            assert [round(later - sooner, 3) for sooner, later in pairwise(times)] == [2.0, 2.0]
            reports.clear()
            began_s = house.loop.time()
            async with asyncio.TaskGroup() as callers:
                for _ in range(50):
                    callers.create_task(house.call(busy))
            took_s = house.loop.time() - began_s
            assert 1 <= len(reports) <= took_s / 0.05 + 1
            assert reports[0][0] - began_s <= 0.06
            assert {digest for _, report in reports for digest in report.workloads} == {busy.digest}
            assert not any(report.full for _, report in reports)
            assert reports[0][1].workloads[busy.digest].busy == 50
            await asyncio.sleep(4.0)
            last = reports[-1][1]
            assert (last.free_mib, last.workloads) == (1000, {})
            assert house.node.report().workloads[busy.digest].service_ms == pytest.approx(101.0, abs=5.0)

    simulated(story)


def test_what_a_reader_pieces_together_is_what_the_node_would_say():
    """The first report and all changes since, against a whole one in the very moment of each report."""

    async def story(house: House) -> None:
        known: dict[str, object] = {}
        compared: list[tuple[dict[str, object], object]] = []

        async def piece_together() -> None:
            async with aclosing(house.node.reports()) as stream:
                async for report in stream:
                    known.update(report.workloads)
                    compared.append((dict(known), house.node.report().workloads))

        reader = house.start(piece_together())
        await house.warmed(ONE, WARM, POOLED)
        async with asyncio.TaskGroup() as callers:
            for each in (ONE, ONE, WARM, POOLED):
                callers.create_task(house.call(each))
        await asyncio.sleep(5.0)
        reader.cancel()
        await asyncio.wait({reader})
        assert [pieces for pieces, _ in compared] == [whole for _, whole in compared]
        assert known == house.node.report().workloads, "nothing was left unsaid"
        assert len(compared) > 5

    simulated(story, latencies=SLOW)


def test_a_report_tells_what_each_guest_is_at():
    """Being made ready for the pool, parked, being started for a call, or serving one; and none once it is over."""

    async def story(house: House) -> None:
        house.faults.on(At.BOOT, delay_s=1.0, times=None)
        slow = workload("slow", concurrency=2, pool=1)

        def now() -> tuple[int, int, int, int]:
            told = house.node.report().workloads[slow.digest]
            return told.making, told.parked, told.busy - told.serving, told.serving

        await house.node.ensure(slow)
        assert now() == (1, 0, 0, 0)
        await asyncio.sleep(2.0)
        assert now() == (0, 1, 0, 0)
        async with heard(house) as reports:
            calls = [house.start(house.call(slow)) for _ in range(2)]
            await asyncio.sleep(0.2)
            assert now() == (1, 0, 1, 1)
            await asyncio.sleep(1.8)
            assert now() == (0, 1, 0, 2)
            assert reports[-1][1].workloads[slow.digest].serving == 2, "a reader is told as soon as a guest serves"
            for call in calls:
                await call
        assert now() == (0, 1, 0, 0)
        assert house.node.report().workloads[slow.digest].isolation is Isolation.MICROVM

    simulated(story, behaviour=busy_for(3.0))


def test_a_dropped_workload_is_retracted():
    async def story(house: House) -> None:
        await house.node.ensure(ONE)
        async with heard(house) as reports:
            house.node._hosting._drop(ONE.digest)
            await asyncio.sleep(0.1)
            assert reports[-1][1].workloads == {ONE.digest: None}
        assert house.node.report().workloads == {}

    simulated(story)


def test_reports_end_with_the_node():
    """The reader is not left waiting."""

    async def story(house: House) -> asyncio.Task[list[NodeReport]]:
        async def listen() -> list[NodeReport]:
            return [report async for report in house.node.reports()]

        task = house.start(listen())
        await asyncio.sleep(0.5)
        return task

    assert len(simulated(story).result()) == 1


def test_memory_that_comes_free_is_told():
    """Placement goes by it."""

    async def story(house: House) -> None:
        await house.node.ensure(WARM)
        async with heard(house) as reports:
            await asyncio.sleep(1.0)
            assert reports[0][1].free_mib == 900
            assert reports[-1][1].free_mib == 1000

    simulated(story)


def test_a_reader_that_leaves_leaves_nothing():
    async def story(house: House) -> None:
        async with heard(house), heard(house):
            assert len(house.node._hearers) == 2
        assert not house.node._hearers

    simulated(story)


# Workloads.


def test_a_call_of_an_unknown_version_is_refused_before_anything_happens():
    """Its agent then makes it known."""

    async def story(house: House) -> None:
        refused = await house.heard(house.invocation(ONE))
        assert (refused.reason, refused.ran) == (Reason.UNKNOWN_DIGEST, Ran.NO)
        await house.node.ensure(ONE)
        assert await house.call(ONE) == b"ping"

    simulated(story)


def test_ensuring_twice_is_ensuring_once():
    async def story(house: House) -> None:
        for _ in range(3):
            await house.node.ensure(POOLED)
        await asyncio.sleep(5.0)
        assert len(house.vmm.alive) == 1
        assert len(house.vmm.bases) == 1
        assert len(house.said(WorkloadEnsured)) == 1

    simulated(story)


def test_a_forgotten_workload_goes_after_ten_minutes():
    """With its base and its queue; its parked guests go at once, because they are what costs memory."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        await house.node.forget(POOLED.digest)
        await house.node.forget(POOLED.digest)
        await asyncio.sleep(1.0)
        assert not house.vmm.alive
        assert house.committed_mib == 0
        await asyncio.sleep(598.0)
        assert house.vmm.bases
        await asyncio.sleep(2.0)
        assert not house.vmm.bases
        assert not house.node._slots._queues
        assert len(house.said(WorkloadDropped)) == 1
        assert (await house.heard(house.invocation(POOLED))).reason is Reason.UNKNOWN_DIGEST

    simulated(story)


def test_who_ensures_it_again_keeps_it():
    async def story(house: House) -> None:
        await house.node.ensure(ONE)
        await house.node.forget(ONE.digest)
        await asyncio.sleep(300.0)
        await house.node.ensure(ONE)
        await asyncio.sleep(3600.0)
        assert await house.call(ONE) == b"ping"

    simulated(story)


def test_who_ensures_it_again_has_its_parked_guests_again():
    async def story(house: House) -> None:
        await house.warmed(POOLED)
        await house.node.forget(POOLED.digest)
        await asyncio.sleep(1.0)
        await house.warmed(POOLED)

    simulated(story)


def test_after_a_reload_the_next_version_has_the_memory_of_the_last():
    """Its base and its parked guests, though the one before filled the node."""

    async def story(house: House) -> None:
        old, new = (workload("one", pool=10, warm_base=True, env={"VERSION": version}) for version in "12")
        await house.warmed(old)
        await house.node.forget(old.digest)
        await house.warmed(new)

    simulated(story)


def test_a_late_call_puts_the_end_off_and_does_not_call_it_off():
    """A forgotten workload must not stay for ever because one straggler named it."""

    async def story(house: House) -> None:
        await house.node.ensure(ONE)
        await house.node.forget(ONE.digest)
        await asyncio.sleep(500.0)
        assert await house.call(ONE) == b"ping"
        await asyncio.sleep(500.0)
        assert await house.call(ONE) == b"ping"
        await asyncio.sleep(601.0)
        assert not house.node._hosting.hosted

    simulated(story)


def test_a_workload_dropped_under_its_calls_lets_them_end():
    """Those that run and those that wait; the queue goes with the last of them."""

    async def story(house: House) -> None:
        await house.warmed(WARM)
        calls = [house.start(house.call(WARM)) for _ in range(3)]
        await asyncio.sleep(0.1)
        house.node._hosting._drop(WARM.digest)
        for call in calls:
            assert await call == b"ping"
        await asyncio.sleep(1.0)
        assert not house.node._slots._queues
        assert not house.vmm.bases

    simulated(story, behaviour=busy_for(1.0))


def test_forgetting_what_is_not_known_is_nothing():
    async def story(house: House) -> None:
        await house.node.forget("0" * 64)

    simulated(story)


def test_versions_of_one_workload_share_its_slots():
    """A reload never doubles what runs: queue, slots and concurrency go by the name, and the last word counts."""

    async def story(house: House) -> None:
        old, new = workload("one", env={"V": "1"}), workload("one", env={"V": "2"}, concurrency=2)
        await house.node.ensure(old)
        await house.node.ensure(new)
        assert old.digest != new.digest
        async with asyncio.TaskGroup() as callers:
            for number in range(6):
                callers.create_task(house.call((old, new)[number % 2]))
            await asyncio.sleep(0.5)
            reports = house.node.report().workloads
            assert (reports[old.digest].busy, reports[new.digest].busy) == (2, 2)
        assert max(event.busy for event in house.said(SlotTaken)) == 2
        house.node._hosting._drop(old.digest)
        assert await house.call(new) == b"ping"

    simulated(story, behaviour=busy_for(1.0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"requires": ("time-travel", "pool")}, "requires time-travel, which node 'n1' does not know"),
        ({"isolation": Isolation.MICROVM_JAILED}, "wants isolation microvm-jailed; this is microvm"),
        ({"name": "barred"}, "no /dev/kvm"),
    ],
)
def test_a_workload_this_node_cannot_run_is_refused_and_leaves_no_trace(fields: dict[str, object], words: str):
    """Not even in the queue of another version of it."""

    async def story(house: House) -> None:
        barred = workload(**{"name": "one", "concurrency": 7, **fields})
        await house.node.ensure(ONE)
        with pytest.raises(GuestUnavailable, match=words) as refused:
            await house.node.ensure(barred)
        assert (refused.value.reason, refused.value.ran) == (Reason.INCOMPATIBLE, Ran.NO)
        assert list(house.node._slots._queues) == ["one"]
        assert house.node._slots._queues["one"].concurrency == 1
        assert set(house.node.report().workloads) == {ONE.digest}

    simulated(story, refuses={"barred": "no /dev/kvm"})


def test_the_first_monitor_that_can_runs_a_workload():
    """Nobody is given less isolation than asked for; the node reports the best it has."""

    async def story(house: House) -> None:
        lesser = FakeVmm(network=Network(house.dice), isolation=Isolation.PROCESS, root="/other")
        both = LocalNode(
            house.node._identity, vmms=[lesser, house.vmm], memory_mib=1000, mint=mint(house.dice), emit=print
        )
        alone, house.node = house.node, both
        async with both:
            strict = workload("strict", isolation=Isolation.MICROVM)
            for subject, isolation in ((ONE, Isolation.PROCESS), (strict, Isolation.MICROVM)):
                await both.ensure(subject)
                async with both.invoke(house.invocation(subject)) as reply:
                    assert reply.started.isolation is isolation
            assert both.report().isolation is Isolation.MICROVM
        house.node = alone

    simulated(story)


# Size.


def test_a_guest_that_would_never_fit_is_refused_at_once():
    async def story(house: House) -> None:
        giant = workload("giant", memory_mib=1001)
        await house.node.ensure(giant)
        refused = await house.heard(house.invocation(giant))
        assert refused.reason is Reason.MEMORY
        assert "needs 1001 MiB, and node 'n1' has 1000 MiB in all" in refused.message

    simulated(story)


def test_limits_are_echoed_and_an_older_generation_is_ignored():
    async def story(house: House) -> None:
        await house.node.limit(NodeLimits(generation=5, memory_mib=700))
        await house.node.limit(NodeLimits(generation=4, memory_mib=9000))
        report = house.node.report()
        assert (report.limits_generation, report.size_mib) == (5, 700)
        await house.node.limit(NodeLimits(generation=5, memory_mib=800))
        assert house.node.report().size_mib == 800
        assert [event.generation for event in house.said(NodeLimited)] == [5, 5]

    simulated(story)


def test_a_node_that_shrinks_ends_no_call():
    """It takes no more until it fits; one that no longer can ever fit hears that at once and holds up nobody."""

    async def story(house: House) -> None:
        big, small = workload("big", memory_mib=600, concurrency=2), workload("small", memory_mib=300)
        await house.node.ensure(big)
        await house.node.ensure(small)
        running = house.start(house.call(big))
        await asyncio.sleep(0.5)
        too_big = house.start(house.heard(house.invocation(big)))
        await asyncio.sleep(0.1)
        fits = house.start(house.heard(house.invocation(small)))
        await house.node.limit(NodeLimits(generation=1, memory_mib=400))
        refused = await too_big
        assert (refused.reason, refused.ran) == (Reason.MEMORY, Ran.NO)
        assert "has 400 MiB in all" in refused.message
        assert not fits.done()
        assert await running == b"ping"
        assert await fits == b"ping"

    simulated(story, behaviour=busy_for(2.0))


def test_a_node_that_grows_serves_those_that_wait():
    async def story(house: House) -> None:
        subject = workload("one", memory_mib=600, concurrency=2)
        await house.node.ensure(subject)
        calls = [house.start(house.call(subject)) for _ in range(2)]
        await asyncio.sleep(1.0)
        assert len(house.vmm.alive) == 1
        await house.node.limit(NodeLimits(generation=1, memory_mib=2000))
        await asyncio.sleep(0.5)
        assert len(house.vmm.alive) == 2
        for call in calls:
            await call

    simulated(story, behaviour=busy_for(5.0))


# Drain.


def test_a_draining_node_takes_no_new_calls_and_lets_the_others_end():
    """It says so in its reports, and by when; after `resume` it takes calls again."""

    async def story(house: House) -> None:
        await house.node.ensure(ONE)
        running = house.start(house.call(ONE))
        waiting = house.start(house.call(ONE))
        await asyncio.sleep(0.5)
        await house.node.drain(within_s=60.0)
        refused = await house.heard(house.invocation(ONE))
        assert (refused.reason, refused.ran, refused.retry_after_s) == (Reason.DRAINING, Ran.NO, 1.0)
        report = house.node.report()
        assert (report.draining, report.drain_within_s) == (True, 60.0)
        assert await running == b"ping"
        assert await waiting == b"ping"
        await house.node.idle()
        await house.node.resume()
        report = house.node.report()
        assert (report.draining, report.drain_within_s) == (False, None)
        assert await house.call(ONE) == b"ping"
        assert [event.running for event in house.said(NodeDraining)] == [2]
        assert len(house.said(NodeResumed)) == 1
        await asyncio.sleep(120.0)
        assert await house.call(ONE) == b"ping", "a drain that was called off ends nothing later"

    simulated(story, behaviour=busy_for(2.0))


def test_a_drain_that_is_over_ends_what_is_left():
    """Those that waited did not run, those that ran may have."""

    async def story(house: House) -> None:
        await house.node.ensure(ONE)
        running, waiting = (house.start(house.heard(house.invocation(ONE))) for _ in range(2))
        await asyncio.sleep(0.5)
        await house.node.drain(within_s=100.0)
        await house.node.drain(within_s=1.0)
        ended = house.loop.time()
        failed, refused = await running, await waiting
        assert isinstance(failed, GuestFailed)
        assert "had to stop" in failed.message
        assert refused.reason is Reason.DRAINING
        await house.node.idle()
        assert house.loop.time() - ended == pytest.approx(1.0, abs=0.1)
        assert house.node.report().drain_within_s == 0.0

    simulated(story, behaviour=busy_for(1000.0))


# The end.


def test_closing_under_load_ends_everything():
    """Calls that wait, start, run, stream and end; pools and bases in the making; bases stay for the next daemon."""

    async def story(house: House) -> list[asyncio.Task[bytes | SubstrateError]]:
        await house.warmed(WARM)
        for each in (ONE, POOLED, workload("late", warm_base=True, pool=3)):
            await house.node.ensure(each)
        house.faults.on(At.KILL, fail="busy", times=3)
        house.faults.on(At.DISCARD, fail="busy", times=3)
        calls = []
        for number in range(60):
            calls.append(house.start(house.heard(house.invocation((ONE, WARM, POOLED)[number % 3]))))
            await asyncio.sleep(0.01)
        return calls

    for heard_ in (call.result() for call in simulated(story, behaviour=busy_for(0.05))):
        assert isinstance(heard_, bytes | GuestFailed) or heard_.reason is Reason.DRAINING


def test_a_closed_node_takes_nothing_on():
    """Not even if it is told to resume while it ends its last calls."""

    async def story(house: House) -> asyncio.Task[bytes | SubstrateError]:
        await house.warmed(POOLED)
        house.start(house.heard(house.invocation(POOLED)))
        await house.faults.reached(At.BEFORE_HEAD)
        house.faults.on(At.KILL, delay_s=5.0, times=None)

        async def late() -> bytes | SubstrateError:
            await asyncio.sleep(1.0)
            await house.node.resume()
            await house.node.ensure(workload("new", warm_base=True, pool=1))
            return await house.heard(house.invocation(POOLED))

        return house.start(late())

    assert simulated(story, behaviour=busy_for(60.0)).result().reason is Reason.DRAINING


@pytest.mark.parametrize("at", [At.KILL, At.DISCARD])
def test_what_cannot_be_ended_keeps_no_daemon_from_its_end_and_is_named(at: At):
    """A guest that nothing kills, parked or running, is left to the next daemon, and whoever reads the log knows."""

    async def story(house: House) -> None:
        node = LocalNode(
            house.node._identity, vmms=[house.vmm], memory_mib=1000, mint=mint(house.dice), emit=house.events.append
        )
        async with node:
            await node.ensure(POOLED)
            await asyncio.sleep(5.0)
            call = house.start(_failed(node, house.invocation(POOLED)))
            await house.faults.reached(At.BEFORE_HEAD)
            house.faults.on(at, fail="it is stuck", times=None)
            began_s = house.loop.time()
        assert house.loop.time() - began_s == pytest.approx(20.0, abs=0.1)
        assert await call
        told = [event.what for event in house.said(CleanupFailed) if "given up after 20 s" in event.message]
        for guest in house.vmm.alive:
            assert any(guest in what for what in told), f"{guest} in {told}"
        assert house.vmm.alive
        house.faults.clear()
        for guest in tuple(house.vmm.alive):
            await house.vmm.discard(guest)
        house.vmm.bases.clear()

    async def _failed(node: LocalNode, invocation: Invocation) -> bool:
        try:
            async with node.invoke(invocation):
                return False
        except GuestFailed:
            return True

    simulated(story, behaviour=busy_for(600.0))


@pytest.mark.parametrize("cancels", [1, 3])
def test_closing_is_not_cut_short(cancels: int):
    """Cancelled meanwhile, it still waits until the last guest is gone."""

    async def story(house: House) -> None:
        node = LocalNode(
            house.node._identity,
            vmms=[house.vmm],
            memory_mib=1000,
            mint=mint(house.dice),
            emit=house.events.append,
        )

        async def life() -> None:
            async with node:
                await node.ensure(POOLED)
                await node.ensure(ONE)
                await asyncio.sleep(5.0)
                house.start(_ignored(node, house))
                await asyncio.sleep(0.2)
                house.faults.on(At.KILL, delay_s=2.0, times=None)
                house.faults.on(At.DISCARD, delay_s=2.0, times=None)

        living = house.start(life())
        await asyncio.sleep(5.5)
        for _ in range(cancels):
            living.cancel()
            await asyncio.sleep(0.1)
        await asyncio.wait({living})
        assert living.cancelled()
        assert not house.vmm.alive
        house.vmm.bases.clear()

    async def _ignored(node: LocalNode, house: House) -> None:
        with pytest.raises(GuestFailed):
            async with node.invoke(house.invocation(ONE)):
                pass

    simulated(story, behaviour=busy_for(60.0))


def test_the_next_daemon_adopts_the_bases_of_the_last():
    async def story(house: House) -> None:
        await house.warmed(WARM)
        base = house.node.report().workloads[WARM.digest].base
        await house.node.__aexit__()
        house.node = LocalNode(
            house.node._identity,
            vmms=[house.vmm],
            memory_mib=1000,
            mint=mint(house.dice),
            emit=house.events.append,
        )
        async with house.node:
            await house.warmed(WARM)
            assert house.node.report().workloads[WARM.digest].base == base

    simulated(story)
