"""One invocation on a node: whatever happens, and whenever, its caller hears the truth and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fakes.vmm import At
from node.house import SLOW, House, at_pass, busy_for, chatter, simulated, workload
from real_parts import is_full, steps
from substrate_node.node import NodeTimes
from substrate_seam.errors import (
    DuplicateInvocation,
    GuestFailed,
    GuestTimeout,
    GuestUnavailable,
    InvocationCancelled,
    Ran,
    Reason,
    SubstrateError,
)
from substrate_seam.events import (
    CallQueued,
    CleanupFailed,
    CleanupLate,
    ExchangeEnded,
    GuestClaimed,
    GuestGone,
    SlotFreed,
    SlotTaken,
    StartFailed,
)
from substrate_seam.invocation import Demands, Invocation, Isolation, Start
from substrate_seam.workload import Workload

COLD = workload("cold")
WARM = workload("warm", warm_base=True)
POOLED = workload("pooled", pool=1)
OTHER = workload("other")
BIG = workload("big", memory_mib=1000)
ANSWER = b"one two three"


# Scenes: what a call goes through. Each prepares the house and names the workload to call.


async def cold(house: House) -> Workload:
    await house.node.ensure(COLD)
    return COLD


async def warm(house: House) -> Workload:
    await house.warmed(WARM)
    return WARM


async def pooled(house: House) -> Workload:
    await house.warmed(POOLED)
    return POOLED


async def falling_through(house: House) -> Workload:
    """The parked guest cannot be reached, the restore fails, the cold boot serves."""
    every_way = workload("every-way", warm_base=True, pool=1)
    await house.warmed(every_way)
    house.faults.on(At.DIAL, fail="nobody listens")
    house.faults.on(At.RESTORE, fail="out of luck", times=2)
    return every_way


async def hard_to_reach(house: House) -> Workload:
    """Connecting to a guest takes a while."""
    await house.warmed(POOLED)
    house.faults.on(At.DIAL, delay_s=0.01)
    return POOLED


async def behind_another(house: House) -> Workload:
    """The one slot is busy for a while, and meanwhile another guest is parked."""
    await house.warmed(POOLED)
    house.start(house.heard(house.invocation(POOLED, caller="bob")))
    await house.faults.reached(At.BEFORE_HEAD)
    return POOLED


async def short_of_memory(house: House) -> Workload:
    """There is a slot, but another workload has the memory for a while, and a third one's guest is parked."""
    await house.warmed(POOLED)
    await house.node.ensure(OTHER)
    house.start(house.heard(house.invocation(OTHER, caller="bob")))
    await house.faults.reached(At.BEFORE_HEAD)
    await house.node.ensure(BIG)
    return BIG


Scene = Callable[[House], Awaitable[Workload]]
SCENES: dict[str, tuple[Scene, dict[str, Any]]] = {
    "cold": (cold, {}),
    "warm": (warm, {}),
    "pooled": (pooled, {}),
    "falling through": (falling_through, {}),
    "hard to reach": (hard_to_reach, {}),
    "behind another": (behind_another, {"behaviour": busy_for(0.2)}),
    "short of memory": (short_of_memory, {"behaviour": busy_for(0.02)}),
    "streaming": (pooled, {"behaviour": chatter(b"one ", b"two ", b"three", pace_s=0.01)}),
    "giving back slowly": (pooled, {"latencies": SLOW}),
}
every_scene = pytest.mark.parametrize("scene", SCENES)
telling_scenes = pytest.mark.parametrize(
    "scene", ["cold", "hard to reach", "falling through", "short of memory", "streaming"]
)


def at_every_pass(
    scene: str, act: Callable[[House, asyncio.Task[Any], Invocation], object]
) -> list[bytes | SubstrateError | None]:
    """Live through a scene again and again, and do something at a later pass of the loop each time.

    Each time the truth is checked, and that another call is served afterwards. Returns what was heard (None when the
    caller had left).
    """
    prepare, options = SCENES[scene]

    async def story(house: House, number: int) -> tuple[bytes | SubstrateError | None, bool]:
        subject = await prepare(house)
        invocation = house.invocation(subject)
        call = house.start(house.heard(invocation))
        undisturbed = []

        def once() -> None:
            undisturbed.append(call.done())
            if not call.done():
                act(house, call, invocation)

        at_pass(number, once)
        await asyncio.wait({call})
        heard = None if call.cancelled() else call.result()
        await asyncio.sleep(20.0)
        assert undisturbed, "the pass came"
        if isinstance(heard, bytes):
            assert heard in {b"ping", ANSWER}, "what looks whole is whole"
            assert house.journal.count((invocation.id, 1)) == 1
        elif heard is not None:
            house.assert_truth(invocation, heard.ran)
        house.assert_truth(invocation, await house.node.cancel(invocation.id))
        await house.node.resume()
        assert await house.call(subject) in {b"ping", ANSWER}, "the next caller is served"
        return heard, undisturbed[0]

    answers = []
    for number in steps(2):
        heard, undisturbed = simulated(lambda house, number=number: story(house, number), **options)
        if undisturbed:
            assert number > 10
            return answers
        answers.append(heard)
    raise AssertionError


@every_scene
def test_a_caller_may_leave_at_any_moment(scene: str):
    """Nothing of the call is left, and what is said of it is true."""

    def leave(_house: House, call: asyncio.Task[Any], _invocation: Invocation) -> None:
        call.cancel()

    assert None in at_every_pass(scene, leave)


@telling_scenes
@pytest.mark.parametrize("cancels", [2, 5])
def test_a_caller_may_be_cancelled_again_and_again(scene: str, cancels: int):
    """On each of the following passes too, while the guest is given back; nothing is cut short."""

    def leave(_house: House, call: asyncio.Task[Any], _invocation: Invocation) -> None:
        for number in range(1, cancels):
            at_pass(number, call.cancel)
        call.cancel()

    assert None in at_every_pass(scene, leave)


@telling_scenes
def test_a_cancelled_id_ends_at_once_and_its_fate_is_told(scene: str):
    """At any moment: if it is said not to have run, then it has not and never will."""
    told: list[tuple[House, asyncio.Task[Any], asyncio.Task[Ran], Invocation]] = []

    def fence(house: House, call: asyncio.Task[Any], invocation: Invocation) -> None:
        told.append((house, call, house.start(house.node.cancel(invocation.id)), invocation))

    at_every_pass(scene, fence)
    for house, call, fenced, invocation in told:
        house.assert_truth(invocation, fenced.result())
        heard = call.result()
        if fenced.result() is Ran.NO:
            assert isinstance(heard, InvocationCancelled)
        else:
            assert isinstance(heard, bytes | GuestFailed)
    assert {fenced.result() for _, _, fenced, _ in told} == {Ran.NO, Ran.MAYBE}


@telling_scenes
def test_a_drain_that_is_over_ends_calls_and_tells_the_truth(scene: str):
    """At any moment: those that wait have not run, those that run have lost their guest."""

    def drain(house: House, _call: asyncio.Task[Any], _invocation: Invocation) -> None:
        house.start(house.node.drain(within_s=0.0))

    for heard in at_every_pass(scene, drain):
        assert isinstance(heard, bytes | GuestFailed) or heard.reason is Reason.DRAINING


@every_scene
def test_guests_may_die_at_any_moment(scene: str):
    """A call whose request had not been written goes on with another guest; the others hear that it failed."""

    def strike(house: House, _call: asyncio.Task[Any], _invocation: Invocation) -> None:
        for guest in tuple(house.vmm.alive.values()):
            guest.die("exit status 3", "so it goes")

    heard = at_every_pass(scene, strike)
    if scene in {"pooled", "hard to reach", "streaming"}:  # there was a cold boot left to fall back on
        assert all(isinstance(answer, bytes | GuestFailed) for answer in heard)
    assert any(isinstance(answer, GuestFailed) for answer in heard)


@telling_scenes
def test_a_node_may_be_closed_at_any_moment(scene: str):
    """Calls end, guests end, and the node is not left before they have."""
    prepare, options = SCENES[scene]

    async def story(house: House, number: int) -> tuple[asyncio.Task[Any], Invocation, House]:
        subject = await prepare(house)
        invocation = house.invocation(subject)
        call = house.start(house.heard(invocation))
        due = asyncio.Event()
        at_pass(number, due.set)
        await due.wait()
        return call, invocation, house

    for number in steps(2):
        call, invocation, house = simulated(lambda house, number=number: story(house, number), **options)
        heard = call.result()
        if isinstance(heard, bytes):
            break
        assert isinstance(heard, GuestFailed) or heard.reason is Reason.DRAINING
        house.assert_truth(invocation, heard.ran)
    assert number > 10


def moments_of(scene: str) -> list[float]:
    """Every time, in seconds from its beginning, at which anything happens to a call."""
    prepare, options = SCENES[scene]

    async def story(house: House) -> list[float]:
        subject = await prepare(house)
        began_s, moments = house.loop.time(), []
        call = house.start(house.call(subject))

        def note() -> None:
            moments.append(house.loop.time() - began_s)
            if not call.done():
                at_pass(1, note)

        at_pass(1, note)
        await call
        await asyncio.sleep(0)
        return sorted(set(moments))

    return simulated(story, **options)


@pytest.mark.parametrize("scene", ["warm", "hard to reach", "falling through", "short of memory", "streaming"])
@pytest.mark.parametrize("deadline", ["start_within_s", "run_within_s"])
def test_a_deadline_may_pass_at_any_moment(scene: str, deadline: str):
    """`start_within_s` is over: nothing ran. `run_within_s` is over: it may have. Never anything else."""
    prepare, options = SCENES[scene]

    async def story(house: House, within_s: float) -> bytes | SubstrateError:
        subject = await prepare(house)
        invocation = house.invocation(subject, **{deadline: within_s})
        heard = await house.heard(invocation)
        await asyncio.sleep(20.0)
        if isinstance(heard, SubstrateError):
            house.assert_truth(invocation, heard.ran)
            assert await house.node.cancel(invocation.id) is heard.ran
        assert await house.call(subject) in {b"ping", ANSWER}
        return heard

    for moment in moments_of(scene):
        heard = simulated(lambda house, moment=moment: story(house, moment), **options)
        if isinstance(heard, bytes):
            assert heard in {b"ping", ANSWER}
        elif deadline == "start_within_s":
            assert isinstance(heard, GuestUnavailable)
            assert heard.reason in {Reason.NOT_READY, Reason.QUEUE_TIMEOUT, Reason.MEMORY}
        else:
            assert isinstance(heard, GuestTimeout)


# Faults of the monitor and of guests, at every place and of every kind.

EFFECTS: dict[str, dict[str, Any]] = {
    "fail": {"fail": "out of luck"},
    "hang": {"hang": True},
    "die": {"die": True},
    "delay": {"delay_s": 0.5},
    "close": {"close": True},
}
STARTING = (At.BOOT, At.RESTORE, At.RESTORED, At.DIAL)
RUNNING = (At.ACCEPTED, At.CONNECTED, At.REQUEST, At.BEFORE_HEAD, At.WITHIN_HEAD, At.AFTER_HEAD, At.MID_BODY)
HASTY = NodeTimes(boot_within_s=2.0, restore_within_s=1.0)


@pytest.mark.parametrize("effect", ["fail", "hang", "die", "delay"])
@pytest.mark.parametrize("at", STARTING)
@pytest.mark.parametrize("scene", ["cold", "warm", "pooled", "falling through"])
def test_a_start_that_goes_wrong_is_never_a_call_that_ran(scene: str, at: At, effect: str):
    """Once: the next way serves, or nothing ran. Each time: nothing ran, the reason says so, and nothing is left."""
    prepare, options = SCENES[scene]

    async def story(house: House, times: int | None) -> bytes | SubstrateError:
        subject = await prepare(house)
        house.faults.on(at, **EFFECTS[effect], times=times)
        invocation = house.invocation(subject, start_within_s=8.0)
        heard = await house.heard(invocation)
        house.faults.clear()
        await asyncio.sleep(20.0)
        if isinstance(heard, SubstrateError):
            house.assert_truth(invocation, heard.ran)
        assert await house.node.cancel(invocation.id) is (heard.ran if isinstance(heard, SubstrateError) else Ran.MAYBE)
        assert await house.call(subject) == b"ping"
        return heard

    for times in (1, None):
        heard = simulated(lambda house, times=times: story(house, times), times=HASTY, **options)
        if scene in {"warm", "pooled"} and times == 1:
            assert isinstance(heard, bytes | GuestFailed) or (at is At.DIAL and effect == "hang")
        if isinstance(heard, SubstrateError) and not isinstance(heard, GuestFailed):
            assert isinstance(heard, GuestUnavailable)
            assert heard.reason in {Reason.BOOT_FAILED, Reason.NOT_READY}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("at", RUNNING)
def test_an_exchange_that_goes_wrong_may_have_run(at: At, effect: str):
    """The caller hears that, and what is written down agrees; a delay alone harms nothing."""

    async def story(house: House) -> bytes | SubstrateError:
        subject = await pooled(house)
        house.faults.on(at, **EFFECTS[effect])
        invocation = house.invocation(subject, run_within_s=3.0)
        heard = await house.heard(invocation)
        assert await house.node.cancel(invocation.id) is Ran.MAYBE
        assert house.journal in ([], [(invocation.id, 1)])
        assert await house.call(subject) == ANSWER
        return heard

    heard = simulated(story, behaviour=chatter(b"one ", b"two ", b"three"))
    expected = {"delay": bytes, "hang": GuestTimeout}.get(effect, GuestFailed)
    assert isinstance(heard, expected)


@pytest.mark.parametrize("effect", ["fail", "hang", "die"])
def test_a_reply_that_is_whole_stays_whole(effect: str):
    """What happens to the guest after its last byte is of no concern to the caller."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        house.faults.on(At.AFTER_BODY, delay_s=0.5, **EFFECTS[effect])
        async with house.node.invoke(house.invocation(POOLED)) as reply:
            await asyncio.sleep(1.0)
            assert [piece async for piece in reply.body] == [b"ping"]
        assert house.said(ExchangeEnded)[0].reason is None

    simulated(story)


@pytest.mark.parametrize("at", [At.KILL, At.DISCARD])
@pytest.mark.parametrize("scene", ["cold", "pooled", "falling through"])
def test_a_guest_that_cannot_be_ended_keeps_what_it_has_until_it_is(scene: str, at: At):
    """Ending it is tried again and again; its slot and its memory serve nobody else meanwhile."""
    prepare, options = SCENES[scene]

    async def story(house: House) -> None:
        subject = await prepare(house)
        house.faults.on(at, fail="device busy", times=5)
        assert await house.call(subject) == b"ping"
        tries = [event for event in house.said(CleanupFailed) if "device busy" in event.message]
        await asyncio.sleep(20.0)
        tries = [event for event in house.said(CleanupFailed) if "device busy" in event.message]
        assert len(tries) == 5
        assert await house.call(subject) == b"ping"

    simulated(story, **options)


def test_leaving_while_a_failed_start_is_cleared_away_frees_nothing_early():
    """The guest that did not start may still live: its memory and the slot are free when it is gone."""

    async def story(house: House) -> None:
        subject = await cold(house)
        house.faults.on(At.RESTORED, fail="not me")
        house.faults.on(At.DISCARD, delay_s=2.0)
        call = house.start(house.call(subject))
        await asyncio.sleep(1.0)
        call.cancel()
        await asyncio.sleep(0.5)
        assert house.committed_mib == 100
        assert house.node.report().workloads[subject.digest].busy == 1
        await asyncio.wait({call})
        assert house.committed_mib == 0

    simulated(story)


def test_a_kill_that_hangs_holds_up_its_caller_for_ten_seconds_and_its_slot_until_it_is_done():
    """The caller is let go, the reaper goes on, and the next call waits for the slot."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        house.faults.on(At.KILL, delay_s=60.0)
        began_s = house.loop.time()
        assert await house.call(POOLED) == b"ping"
        assert house.loop.time() - began_s == pytest.approx(10.0, abs=0.1)
        assert [event.waited_s for event in house.said(CleanupLate)] == [10.0]
        refused = await house.heard(house.invocation(POOLED, start_within_s=10.0))
        assert isinstance(refused, GuestUnavailable)
        assert refused.reason is Reason.QUEUE_TIMEOUT
        assert await house.call(POOLED, start_within_s=60.0) == b"ping"
        assert house.loop.time() - began_s >= 60.0

    simulated(story)


def test_a_guest_whose_use_cannot_be_read_is_given_back_all_the_same():
    """The host does not tell; a number that could not be measured is None."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)

        def untold() -> None:
            raise OSError("no such cgroup")

        for guest in house.vmm.alive.values():
            guest.sample = untold
        async with house.node.invoke(house.invocation(POOLED)) as reply:
            assert [piece async for piece in reply.body] == [b"ping"]
            assert reply.receipt.cpu_ms is reply.started.cpu_ms is None

    simulated(story)


# How a guest is come by.


def test_the_fastest_start_there_is_serves():
    """A parked guest, else the base, else a cold boot; the reply says which."""

    async def story(house: House) -> list[Start]:
        every_way = workload("every-way", warm_base=True, pool=1, concurrency=3)
        await house.node.ensure(every_way)
        starts = []

        async def start() -> None:
            async with house.node.invoke(house.invocation(every_way)) as reply:
                assert reply.started.isolation is Isolation.MICROVM
                starts.append(reply.started.start)

        await start()
        await house.warmed(every_way)
        async with asyncio.TaskGroup() as callers:
            callers.create_task(start())
            callers.create_task(start())
        return starts

    assert simulated(story) == [Start.COLD, Start.POOL, Start.WARM]


def test_a_start_that_fails_falls_through_and_is_told():
    """Every failure with its cause; the call that succeeds in the end says how."""

    async def story(house: House) -> None:
        subject = await falling_through(house)
        assert await house.call(subject) == b"ping"
        assert [(event.start, event.message) for event in house.said(StartFailed)] == [
            (Start.POOL, "it could not be reached: nobody listens"),
            (Start.WARM, "restore: out of luck"),
        ]
        assert [event.start for event in house.said(GuestClaimed)][-1] is Start.COLD

    simulated(story)


@pytest.mark.parametrize(
    ("at", "reason", "words"),
    [
        (At.BOOT, Reason.BOOT_FAILED, "no guest of 'cold' could be started: boot: out of luck"),
        (At.DIAL, Reason.BOOT_FAILED, "no guest of 'cold' could be started: out of luck"),
        (At.RESTORED, Reason.BOOT_FAILED, "no guest of 'cold' could be started: /shim/restored answered 503: "),
    ],
)
def test_a_call_that_no_start_can_serve_says_why(at: At, reason: Reason, words: str):
    async def story(house: House) -> None:
        house.faults.on(at, fail="out of luck", times=None)
        refused = await house.heard(house.invocation(await cold(house)))
        assert (refused.reason, refused.ran, refused.message) == (reason, Ran.NO, words)
        house.faults.clear()

    simulated(story)


def test_a_ready_guest_that_cannot_be_reached_is_a_start_that_failed():
    """When it was the last way there is, the call says so."""

    async def story(house: House) -> None:
        subject = await cold(house)
        house.faults.on(At.DIAL)  # the one that makes it ready
        house.faults.on(At.DIAL, fail="nobody listens")
        refused = await house.heard(house.invocation(subject))
        assert (refused.reason, refused.ran) == (Reason.BOOT_FAILED, Ran.NO)
        assert refused.message == "no guest of 'cold' could be started: it could not be reached: nobody listens"

    simulated(story)


def test_a_guest_that_dies_between_its_readiness_and_the_request_is_replaced():
    """Its death is not laid at the door of the one that takes over."""

    async def story(house: House) -> None:
        every_way = workload("every-way", warm_base=True, pool=1)
        await house.warmed(every_way)
        house.faults.on(At.DIAL, die=True, fail="it is dead")
        assert await house.call(every_way, run_within_s=1.0) == b"ping"
        assert [event.message for event in house.said(StartFailed)] == ["it could not be reached: it is dead"]

    simulated(story, behaviour=busy_for(0.3))


def test_nothing_is_written_to_a_guest_that_is_dead():
    """It died while the request was on its way to the node, and its socket still takes connections."""

    async def story(house: House) -> None:
        invocation = house.invocation(await pooled(house))
        (guest,) = house.vmm.alive.values()
        async with house.node.claim(invocation) as claim:
            guest._listeners.clear()  # they stay open
            guest.die("exit status 9")
            await asyncio.sleep(1.0)
            reply = await claim.exchange(invocation.request)
            assert reply.started.start is Start.COLD
            assert [piece async for piece in reply.body] == [b"ping"]
        assert house.said(StartFailed)[0].message == "it could not be reached: it ended with exit status 9"
        house.vmm.network._listeners.pop(guest.address)

    simulated(story)


def test_a_death_that_was_noticed_is_forgotten_with_its_guest():
    """It died while it was connected to; the one that takes over has the time it needs."""

    async def story(house: House) -> None:
        every_way = workload("every-way", warm_base=True, pool=1)
        await house.warmed(every_way)
        house.faults.on(At.DIAL, delay_s=0.05, fail="it is dead")
        call = house.start(house.call(every_way))
        await asyncio.sleep(0.01)
        for guest in tuple(house.vmm.alive.values()):
            guest.die()
        assert await call == b"ping"

    simulated(story, behaviour=busy_for(0.3))


def test_a_connect_that_times_out_by_itself_is_no_deadline_of_ours():
    """A `TimeoutError` is an `OSError` too: the next way is tried."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        (parked,) = house.vmm.alive.values()

        async def dial(_protocol: object) -> None:
            raise TimeoutError("timed out in the kernel")

        parked.dial = dial
        assert await house.call(POOLED) == b"ping"

    simulated(story)


@pytest.mark.parametrize(
    ("least", "reason"), [(Start.POOL, Reason.INCOMPATIBLE), (Start.WARM, Reason.INCOMPATIBLE), (Start.COLD, None)]
)
def test_a_caller_may_insist_on_a_fast_start(least: Start, reason: Reason | None):
    """An error rather than less."""

    async def story(house: House) -> None:
        subject = await cold(house)
        heard = await house.heard(house.invocation(subject, demands=Demands(start=least)))
        assert (heard.reason if isinstance(heard, SubstrateError) else None) is reason

    simulated(story)


def test_a_caller_may_insist_on_isolation():
    async def story(house: House) -> None:
        subject = await cold(house)
        demands = Demands(isolation=Isolation.MICROVM_JAILED)
        heard = await house.heard(house.invocation(subject, demands=demands))
        assert (heard.reason, heard.ran) == (Reason.INCOMPATIBLE, Ran.NO)

    simulated(story)


# Deliveries.


def test_an_invocation_is_delivered_once():
    """While the first delivery waits or runs, and after it has ended; another attempt too, once one may have run."""

    async def story(house: House) -> None:
        subject = await cold(house)
        invocation = house.invocation(subject)
        first = house.start(house.run(invocation))
        for moment in (asyncio.sleep(0), house.faults.reached(At.BEFORE_HEAD), first):
            await moment
            for attempt in (1, 2):
                again = await house.heard(house.invocation(subject, id=invocation.id, attempt=attempt))
                assert isinstance(again, DuplicateInvocation)
        assert house.journal == [(invocation.id, 1)]

    simulated(story)


def test_an_attempt_that_did_not_run_may_be_followed_by_another():
    async def story(house: House) -> None:
        subject = await cold(house)
        house.faults.on(At.BOOT, fail="out of luck")
        invocation = house.invocation(subject)
        assert (await house.heard(invocation)).ran is Ran.NO
        assert isinstance(await house.heard(invocation), DuplicateInvocation)
        assert await house.heard(house.invocation(subject, id=invocation.id, attempt=2)) == b"ping"

    simulated(story)


def test_a_call_cancelled_before_it_arrives_never_starts():
    async def story(house: House) -> None:
        invocation = house.invocation(await cold(house))
        assert await house.node.cancel(invocation.id) is Ran.NO
        assert isinstance(await house.heard(invocation), InvocationCancelled)
        assert not house.journal

    simulated(story)


def test_a_guest_is_ready_before_the_request_is_there_and_gone_if_it_never_comes():
    """As the wire needs it: a claim, then the body. A fence in between is final."""

    async def story(house: House) -> None:
        subject = await pooled(house)
        invocation = house.invocation(subject)
        async with house.node.claim(invocation):
            await asyncio.sleep(1.0)
        assert await house.node.cancel(invocation.id) is Ran.NO
        invocation = house.invocation(subject)
        async with house.node.claim(invocation) as claim:
            assert await house.node.cancel(invocation.id) is Ran.NO
            with pytest.raises(InvocationCancelled):
                await claim.exchange(invocation.request)
        assert not house.journal

    simulated(story)


def test_what_was_not_written_when_its_end_was_told_is_never_written():
    """Fenced or too late, at any moment: the holder of a claim may take its time to leave, the guest gets nothing."""

    async def story(house: House, fenced_at: int | None, start_within_s: float) -> None:
        invocation = house.invocation(await hard_to_reach(house), start_within_s=start_within_s)
        if fenced_at is not None:
            at_pass(fenced_at, lambda: house.start(house.node.cancel(invocation.id)))
        try:
            async with house.node.claim(invocation) as claim:
                try:
                    await claim.exchange(invocation.request)
                except SubstrateError as error:
                    await asyncio.sleep(1.0)
                    house.assert_truth(invocation, error.ran)
        except SubstrateError as error:
            house.assert_truth(invocation, error.ran)

    for number in range(1, 30):
        simulated(lambda house, number=number: story(house, number, 30.0))
    for moment in moments_of("hard to reach"):
        simulated(lambda house, moment=moment: story(house, None, moment))


def test_a_request_that_left_in_the_last_moment_has_left():
    """The time to start is over while the connect returns: from here on `run_within_s` counts, and it may have run."""

    async def story(house: House, *, fate: type[bytes | SubstrateError]) -> None:
        invocation = house.invocation(await pooled(house), start_within_s=0.2, run_within_s=2.0)
        (guest,) = house.vmm.alive.values()
        dial = guest.dial

        async def dial_slowly(protocol: Callable[[], Any]) -> None:
            await dial(protocol)
            await asyncio.sleep(0.5)
            if fate is GuestFailed:
                raise ConnectionResetError("too late")

        guest.dial = dial_slowly
        if fate is not bytes:
            house.faults.on(At.BEFORE_HEAD, hang=True)
        if fate is GuestFailed:
            house.loop.call_later(0.1, guest.die)
        heard = await house.heard(invocation)
        assert isinstance(heard, fate)
        assert house.journal == [(invocation.id, 1)]

    for fate in (bytes, GuestTimeout, GuestFailed):
        simulated(lambda house, fate=fate: story(house, fate=fate))


def test_a_connection_that_comes_about_behind_our_back_carries_nothing():
    """A monitor connects although its dial was given up: no request may follow an answer of `ran = no`."""

    async def story(house: House) -> None:
        invocation = house.invocation(await pooled(house), start_within_s=0.5)
        (guest,) = house.vmm.alive.values()
        dial, connecting = guest.dial, []

        async def dial_anyway(protocol: Callable[[], Any]) -> None:
            connecting.append(house.start(dial(protocol)))
            await asyncio.sleep(60.0)

        guest.dial = dial_anyway
        house.faults.on(At.DIAL, delay_s=1.0)
        async with house.node.claim(invocation) as claim:
            with pytest.raises(GuestUnavailable):
                await claim.exchange(invocation.request)
            await asyncio.wait(connecting)
            await asyncio.sleep(1.0)
        assert not house.journal

    simulated(story)


# The exchange.


def test_a_guest_is_told_whom_it_serves_and_how_long_the_body_is():
    """Besides what ingress let through; a host of the caller's is kept."""
    seen = []

    async def note(_guest: object, call: Any) -> Any:
        seen.append(call)
        return await chatter(b"ok")(_guest, call)

    async def story(house: House) -> None:
        subject = await cold(house)
        await house.call(subject, headers=((b"x-mine", b"1"), (b"host", b"example.org")), body=b"abc")
        await house.call(subject)
        assert seen[0].headers == {
            "x-mine": "1",
            "host": "example.org",
            "fc-invocation-id": f"{1:032x}",
            "fc-attempt": "1",
            "content-length": "3",
            "connection": "close",
        }
        assert seen[0].body == b"abc"
        assert seen[1].headers["host"] == "vsock"

    simulated(story, behaviour=note)


@pytest.mark.parametrize(
    "crooked", [{"target": "/a b"}, {"headers": ((b"x", b"1\r\ny: 2"),)}, {"method": "GET\n"}, {"target": "/\u20ac"}]
)
def test_a_request_that_would_break_out_of_its_line_is_refused(crooked: dict[str, Any]):
    async def story(house: House) -> None:
        heard = await house.heard(house.invocation(await cold(house), **crooked))
        assert (heard.reason, heard.ran) == (Reason.BAD_REQUEST, Ran.NO)
        assert not house.journal

    simulated(story)


def test_the_pace_of_a_reader_does_not_own_a_guest():
    """After `run_within_s` the guest is gone; what it had said whole can still be read."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        async with house.node.invoke(house.invocation(POOLED, run_within_s=1.0)) as reply:
            await asyncio.sleep(2.0)
            assert house.said(SlotFreed)
            assert [piece async for piece in reply.body] == [b"ping"]

    simulated(story)


def test_a_body_that_is_cut_short_says_so():
    """With the guest's end and its last words, if it died."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        async with house.node.invoke(house.invocation(POOLED)) as reply:
            assert await anext(reply.body) == b"one "
            for guest in tuple(house.vmm.alive.values()):
                guest.die("killed by SIGKILL", "out of memory")
            with pytest.raises(GuestFailed, match=r"killed by SIGKILL after saying: out of memory"):
                await anext(reply.body)
            assert reply.receipt is None

    simulated(story, behaviour=chatter(b"one ", b"two", pace_s=1.0))


def test_a_caller_that_leaves_is_no_fault_of_the_guest():
    """The events tell the two apart."""

    async def story(house: House) -> None:
        await house.warmed(POOLED)
        async with house.node.invoke(house.invocation(POOLED)):
            pass
        (ended,) = house.said(ExchangeEnded)
        assert ended.reason is Reason.CANCELLED
        assert house.said(GuestGone)[-1].exit == ""

    simulated(story, behaviour=chatter(b"one ", b"two", pace_s=1.0))


def test_a_call_tells_its_whole_story():
    async def story(house: House) -> None:
        subject = await cold(house)
        house.events.clear()
        async with asyncio.TaskGroup() as callers:
            callers.create_task(house.call(subject))
            callers.create_task(house.call(subject))
        kinds = {number: [] for number in (1, 2)}
        for event in house.events:
            kinds[int(event.invocation_id, 16)].append(type(event))
        served = [SlotTaken, GuestClaimed, ExchangeEnded, GuestGone, SlotFreed]
        assert kinds == {1: served, 2: [CallQueued, *served]}
        first, second = house.said(SlotTaken)
        assert first.queue_ms == 0.0
        assert second.queue_ms == pytest.approx(102, abs=5)

    simulated(story)


# Many at once.


@pytest.mark.parametrize("seed", range(20 if is_full() else 2))
def test_two_hundred_callers_on_four_slots(seed: int):
    """Some leave, some are fenced, guests die and monitors fail at random: all hear the truth, and nothing is left."""

    async def story(house: House) -> None:
        dice = house.dice
        subjects = [
            workload("echo", concurrency=2, queue=500, warm_base=True, pool=1),
            workload("chat", concurrency=2, queue=500, sessioned=True, memory_mib=300),
        ]
        for subject in subjects:
            await house.node.ensure(subject)
        for at in (At.BOOT, At.RESTORE, At.DIAL, At.KILL, At.DISCARD, At.CAPTURE, At.RESTORED):
            house.faults.on(at, fail="accident", chance=0.05, times=None)
        for at in (At.REQUEST, At.BEFORE_HEAD, At.AFTER_HEAD, At.MID_BODY):
            house.faults.on(at, die=True, chance=0.02, times=None)
            house.faults.on(at, fail="accident", chance=0.02, times=None)

        async def call(number: int) -> None:
            await asyncio.sleep(dice.uniform(0, 10))
            invocation = house.invocation(
                dice.choice(subjects),
                caller=f"caller-{number % 7}",
                session=dice.choice([None, "s1", "s2"]),
                start_within_s=dice.choice([1.0, 60.0]),
                run_within_s=dice.choice([0.01, 10.0]),
            )
            heard = house.start(house.heard(invocation))
            fate = dice.random()
            await asyncio.wait({heard}, timeout=dice.uniform(0, 2) if fate < 0.4 else None)
            if fate < 0.2:
                heard.cancel()
            elif fate < 0.4:
                house.assert_truth(invocation, await house.node.cancel(invocation.id))
            await asyncio.wait({heard})
            if not heard.cancelled():
                said = heard.result()
                house.assert_truth(invocation, said.ran if isinstance(said, SubstrateError) else Ran.MAYBE)
                assert isinstance(said, SubstrateError) or said == b"ping"
            house.assert_truth(invocation, await house.node.cancel(invocation.id))

        async with asyncio.TaskGroup() as callers:
            for number in range(200):
                callers.create_task(call(number))
        house.faults.clear()
        await asyncio.sleep(60.0)
        for subject in subjects:
            assert await house.call(subject) == b"ping"

    simulated(story, seed=seed, memory_mib=800, behaviour=busy_for(0.05))
