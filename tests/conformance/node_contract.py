"""What every `Node` promises, as functions to be run in each world; `PROMISES` lists them.

They speak of a node only through its verbs, of guests through what a request asks of them, and plan accidents with
`Bench.faults`. `settled` ends each of them: nothing is left, nothing ran twice, every caller was told the truth.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from conformance.worlds import GUEST_MIB, MEMORY_MIB, NODE_ID, Bench, Outcome, workload
from fakes.vmm import At
from substrate_seam.errors import (
    DuplicateInvocation,
    GuestFailed,
    GuestTimeout,
    GuestUnavailable,
    InvocationCancelled,
    Ran,
    Reason,
)
from substrate_seam.invocation import Demands, Invocation, Isolation, Start, Trace
from substrate_seam.report import NodeLimits, NodeReport
from substrate_seam.workload import Workload

Promise = Callable[[Bench], Awaitable[None]]
PROMISES: list[Promise] = []


def promise(story: Promise) -> Promise:
    """List a promise."""
    PROMISES.append(story)
    return story


def promise_for(*cases: object) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """List a promise for each of some cases; its function takes the case last."""

    def listed(story: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        for case in cases:
            values = case if isinstance(case, tuple) else (case,)

            async def kept(bench: Bench, values: tuple[object, ...] = values) -> None:
                await story(bench, *values)

            words = "-".join(str(value)[:24] for value in values)
            kept.__name__ = f"{story.__name__}[{words}]"
            PROMISES.append(kept)
        return story

    return listed


async def known(bench: Bench, name: str = "echo", **fields) -> Workload:
    """A workload that the node knows."""
    work = bench.workload(name, **fields)
    await bench.node.ensure(work)
    return work


@asynccontextmanager
async def going_on(bench: Bench, *calls: Invocation):
    """Make calls in the background for the length of the block, and wait for their ends; yields their tasks.

    They arrive in this order, though each may come on a connection of its own.
    """
    async with asyncio.TaskGroup() as callers:
        tasks: list[asyncio.Task[Outcome]] = []
        for call in calls:
            tasks.append(callers.create_task(bench.call(call)))
            await asyncio.sleep(0.02)
        yield tasks


def said(task: asyncio.Task[Outcome]) -> Outcome:
    """The outcome of a call that has ended."""
    return task.result()


async def until(bench: Bench, at: At) -> None:
    """Wait until a guest has been there."""
    async with asyncio.timeout(20.0):
        await bench.faults.reached(at)


def plan(bench: Bench, at: At, **accident) -> None:
    """Plan an accident of the exchange with a guest that is about to start cold."""
    if at in {At.DIAL, At.ACCEPTED, At.CONNECTED}:
        bench.faults.on(at)  # let the one that makes it ready go well
    bench.faults.on(at, **accident)


async def latest(bench: Bench) -> NodeReport:
    """A full report of now."""
    async with aclosing(bench.node.reports()) as reports:
        return await anext(reports)


# A guest answers.


@promise
async def a_guest_gets_the_request_and_its_answer_comes_back(bench: Bench) -> None:
    """Status, fields in order and twice if need be, every byte, how it started and what it used."""
    outcome = await bench.call(await known(bench), body=b"some bytes")
    assert outcome.error is None
    assert (outcome.status, outcome.body) == (200, b"some bytes")
    assert [value for name, value in outcome.headers if name == b"x-twice"] == [b"1", b"2"]
    started, receipt = outcome.started, outcome.receipt
    assert (started.start, started.node, started.isolation) == (Start.COLD, NODE_ID, bench.isolation)
    assert started.claim_ms >= started.ready_ms > 0
    assert receipt.body_bytes == 10
    assert receipt.guest_ms > 0
    assert bench.entries(outcome.invocation.id) == 1


@promise
async def a_guest_hears_who_asks_and_no_more_than_it_should(bench: Bench) -> None:
    """Target, fields, length, id, attempt and trace; Host only if the caller gave none."""
    work = await known(bench)
    trace = Trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "a=b")
    fields = ((b"accept", b"*/*"), (b"x-odd", b"caf\xe9"))
    outcome = await bench.call(work, "/path/%2F?head=1", headers=fields, body=b"12345", trace=trace, attempt=3)
    heard = {name.removeprefix(b"heard-"): value for name, value in outcome.headers}
    assert (heard[b"accept"], heard[b"x-odd"]) == (b"*/*", b"caf\xe9")
    assert heard[b"host"] == b"vsock"
    assert heard[b"fc-invocation-id"] == outcome.invocation.id.encode()
    assert heard[b"fc-attempt"] == b"3"
    assert (heard[b"traceparent"], heard[b"tracestate"]) == (trace.parent.encode(), b"a=b")
    named = await bench.call(work, "/?head=1", headers=((b"host", b"example.org"),))
    assert dict(named.headers)[b"heard-host"] == b"example.org"


@promise_for(200, 201, 299, 301, 404, 418, 500, 503, 599)
async def a_status_of_the_guest_is_an_answer(bench: Bench, status: int) -> None:
    """Whatever it is: the guest has answered, and nobody asks again."""
    outcome = await bench.call(await known(bench), f"/invoke?status={status}")
    assert (outcome.status, outcome.body, outcome.error) == (status, b"hello", None)


@promise_for(204, 304)
async def a_status_without_a_body_is_whole(bench: Bench, status: int) -> None:
    """Its end is its head."""
    outcome = await bench.call(await known(bench), f"/invoke?status={status}&pieces=0")
    assert (outcome.status, outcome.body, outcome.whole) == (status, b"", True)


@promise
async def an_answer_to_head_is_whole_without_its_body(bench: Bench) -> None:
    """Its Content-Length speaks of a body that never comes."""
    outcome = await bench.call(await known(bench), "/invoke?pieces=3&bytes=1000", method="HEAD", body=b"")
    assert (outcome.status, outcome.body, outcome.whole) == (200, b"", True)
    assert dict(outcome.headers)[b"content-length"] == b"3000"


@promise_for("GET", "PUT", "DELETE", "PATCH", "OPTIONS")
async def any_method_reaches_the_guest(bench: Bench, method: str) -> None:
    """With its body."""
    outcome = await bench.call(await known(bench), method=method)
    assert (outcome.status, outcome.body) == (200, b"hello")


@promise_for(0, 1, 65_535, 65_536, 65_537, 131_072, 999_999)
async def a_body_of_any_size_goes_there_and_back(bench: Bench, size: int) -> None:
    """Around every place where it is cut into chunks or frames."""
    body = bytes(range(251)) * (size // 251 + 1)
    outcome = await bench.call(await known(bench), body=body[:size])
    assert outcome.error is None
    assert outcome.body == body[:size]


@promise_for("chunked=1", "pieces=40&bytes=100000", "pieces=40&bytes=100000&chunked=1&pace_s=0.01")
async def an_answer_is_streamed_whole(bench: Bench, how: str) -> None:
    """However long it is and however it is framed."""
    outcome = await bench.call(await known(bench), f"/invoke?{how}")
    assert outcome.error is None
    assert outcome.receipt.body_bytes == len(outcome.body) == (4_000_000 if "pieces" in how else 5)


@promise
async def the_head_and_every_piece_come_as_soon_as_the_guest_says_them(bench: Bench) -> None:
    """Nothing is held back until there is more of it."""
    loop, work = asyncio.get_running_loop(), await known(bench)
    call = bench.invocation(work, "/invoke?pieces=5&bytes=10&chunked=1&pace_s=3")
    async with bench.node.invoke(call) as reply:
        headed_s, size = loop.time(), 0
        async for piece in reply.body:
            due_s, size = 3 * (size // 10), size + len(piece)
            assert due_s - 0.1 < loop.time() - headed_s < due_s + 0.1
    assert size == 50


@promise
async def a_slow_reader_slows_the_guest_and_loses_nothing(bench: Bench) -> None:
    """No more than a bounded part of a long answer is ever under way."""
    work = await known(bench)
    call = bench.invocation(work, "/invoke?pieces=60&bytes=100000&chunked=1", run_within_s=600.0)
    async with bench.node.invoke(call) as reply:
        await asyncio.sleep(20.0)
        size = 0
        async for piece in reply.body:
            size += len(piece)
            await asyncio.sleep(0.05)
    assert (size, reply.receipt.body_bytes) == (6_000_000, 6_000_000)


@promise
async def a_body_may_be_asked_again_for_its_end(bench: Bench) -> None:
    """It says again that it is over, or how it broke."""
    work = await known(bench)
    async with bench.node.invoke(bench.invocation(work)) as reply:
        assert b"".join([piece async for piece in reply.body]) == b"hello"
        assert [piece async for piece in reply.body] == []
    bench.faults.on(At.MID_BODY, die=True, delay_s=0.5)
    async with bench.node.invoke(bench.invocation(work, "/?pieces=2&chunked=1")) as reply:
        for _ in range(2):
            with pytest.raises(GuestFailed):
                [piece async for piece in reply.body]


@promise
async def a_block_may_be_left_before_the_answer_was_read(bench: Bench) -> None:
    """The guest goes at once, and nothing is raised."""
    work = await known(bench)
    for target in ("/invoke", "/invoke?pieces=50&bytes=100000&chunked=1", "/invoke?pieces=9&pace_s=9&chunked=1"):
        async with bench.node.invoke(bench.invocation(work, target)) as reply:
            assert reply.status == 200
        with pytest.raises(ZeroDivisionError):
            await _stumble(bench, bench.invocation(work, target))
        await asyncio.sleep(1.0)
        assert not (await latest(bench)).workloads[work.digest].busy


async def _stumble(bench: Bench, call: Invocation) -> None:
    async with bench.node.invoke(call) as reply:
        await anext(aiter(reply.body))
        raise ZeroDivisionError


@promise
async def calls_run_side_by_side_as_far_as_there_are_slots(bench: Bench) -> None:
    """Two at a time take half as long as one after the other."""
    loop, work = asyncio.get_running_loop(), await known(bench, concurrency=2)
    began_s = loop.time()
    async with going_on(bench, *(bench.invocation(work, "/?after_s=5") for _ in range(6))) as calls:
        pass
    assert all(said(call).whole for call in calls)
    assert 15 < loop.time() - began_s < 17


# A guest starts.


@promise
async def a_warm_base_and_a_pool_make_starts_faster(bench: Bench) -> None:
    """Cold at first, then from the base, then a guest that stood ready; each says which it was."""
    work = await known(bench, warm_base=True, pool=1)
    first = await bench.call(work)
    await asyncio.sleep(5.0)
    second = await bench.call(work)
    assert (first.started.start, second.started.start) == (Start.COLD, Start.POOL)
    assert second.started.base is not None
    assert second.started.claim_ms < first.started.claim_ms
    plain = await known(bench, "plain", warm_base=True)
    await asyncio.sleep(5.0)
    assert (await bench.call(plain)).started.start is Start.WARM
    await bench.node.limit(NodeLimits(generation=1, memory_mib=0))


@promise_for(At.RESTORE, At.RESTORED)
async def a_start_that_fails_falls_through_to_a_slower_one(bench: Bench, at: At) -> None:
    """The caller sees a cold start and nothing else."""
    work = await known(bench, warm_base=True)
    await asyncio.sleep(5.0)
    bench.faults.on(at, fail="out of luck")
    outcome = await bench.call(work)
    assert (outcome.status, outcome.started.start) == (200, Start.COLD)


@promise
async def a_guest_that_died_while_it_was_parked_is_not_used(bench: Bench) -> None:
    """Nor does its death cost a call."""
    work = await known(bench, pool=1)
    await asyncio.sleep(5.0)
    bench.faults.on(At.DIAL, fail="gone")
    outcome = await bench.call(work)
    assert (outcome.status, outcome.started.start) == (200, Start.COLD)
    await bench.node.limit(NodeLimits(generation=1, memory_mib=0))


@promise
async def a_guest_that_cannot_be_started_is_told(bench: Bench) -> None:
    """Nothing ran; the message says why."""
    work = await known(bench)
    bench.faults.on(At.BOOT, fail="no such kernel", times=None)
    error = await bench.refusal(work)
    assert (error.reason, error.ran) == (Reason.BOOT_FAILED, Ran.NO)
    assert "no such kernel" in error.message


@promise
async def a_guest_that_cannot_be_restored_is_told_to_who_wants_no_other(bench: Bench) -> None:
    """A demand for a warm start is not met by a cold one."""
    work = await known(bench, warm_base=True)
    await asyncio.sleep(5.0)
    bench.faults.on(At.RESTORE, fail="torn", times=None)
    error = await bench.refusal(work, demands=Demands(start=Start.WARM))
    assert (error.reason, error.ran) == (Reason.RESTORE_FAILED, Ran.NO)


@promise_for(At.BOOT, At.RESTORED)
async def a_guest_that_is_not_ready_in_time_is_told(bench: Bench, at: At) -> None:
    """As soon as `start_within_s` has passed."""
    work = await known(bench)
    bench.faults.on(at, hang=True)
    loop, began_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    error = await bench.refusal(work, start_within_s=2.0)
    assert (error.reason, error.ran) == (Reason.NOT_READY, Ran.NO)
    assert loop.time() - began_s < 2.2


# A node refuses.


@promise
async def a_full_queue_refuses_at_once(bench: Bench) -> None:
    """With the time after which to try again."""
    work = await known(bench, concurrency=1, queue=1)
    async with going_on(bench, *(bench.invocation(work, f"/?after_s={bench.long_s}") for _ in range(2))) as calls:
        await until(bench, At.REQUEST)
        error = await bench.refusal(work)
        assert (error.reason, error.ran) == (Reason.CAPACITY, Ran.NO)
        assert error.retry_after_s >= 1
        assert error.hint
    assert all(said(call).whole for call in calls)


@promise
async def a_call_that_waited_too_long_is_told(bench: Bench) -> None:
    """As soon as `start_within_s` has passed; those before and after it are served."""
    work = await known(bench, concurrency=1)
    calls = [
        bench.invocation(work, "/?after_s=5"),
        bench.invocation(work, start_within_s=1.0),
        bench.invocation(work),
    ]
    async with going_on(bench, *calls) as tasks:
        pass
    first, second, third = map(said, tasks)
    assert (second.error.reason, second.error.ran) == (Reason.QUEUE_TIMEOUT, Ran.NO)
    assert second.error.retry_after_s >= 1
    assert first.whole
    assert third.whole


@promise
async def a_call_that_cannot_start_in_time_is_told_at_once(bench: Bench) -> None:
    """As far as the node has measured how long others take."""
    work = await known(bench, concurrency=1)
    await bench.call(work, "/?after_s=10")
    async with going_on(bench, bench.invocation(work, "/?after_s=5")):
        await asyncio.sleep(1.0)
        loop, began_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        error = await bench.refusal(work, start_within_s=3.0)
        assert (error.reason, error.ran) == (Reason.QUEUE_TIMEOUT, Ran.NO)
        assert loop.time() - began_s < 0.1


@promise
async def a_guest_larger_than_the_node_is_refused(bench: Bench) -> None:
    """It would never fit."""
    error = await bench.refusal(await known(bench, memory_mib=MEMORY_MIB + 1))
    assert (error.reason, error.ran) == (Reason.MEMORY, Ran.NO)


@promise
async def a_call_waits_for_memory_and_is_told_when_there_was_none_in_time(bench: Bench) -> None:
    """A slot is free, memory is not: until another workload gives some back."""
    hog, work = await known(bench, "hog", memory_mib=MEMORY_MIB), await known(bench)
    calls = [
        bench.invocation(hog, f"/?after_s={bench.long_s}"),
        bench.invocation(work, start_within_s=0.4 * bench.long_s),
        bench.invocation(work),
    ]
    async with going_on(bench, calls[0]) as hogs:
        await until(bench, At.REQUEST)
        async with going_on(bench, *calls[1:]) as tasks:
            pass
    early, late = map(said, tasks)
    assert (early.error.reason, early.error.ran) == (Reason.MEMORY, Ran.NO)
    assert late.whole
    assert late.started.queue_ms > 600 * bench.long_s
    assert said(hogs[0]).whole


@promise
async def no_queue_and_no_memory_is_told_as_no_memory(bench: Bench) -> None:
    """Raising `concurrency` or `queue` would not help."""
    hog, work = await known(bench, "hog", memory_mib=MEMORY_MIB), await known(bench, queue=0)
    async with going_on(bench, bench.invocation(hog, "/?after_s=5")):
        await until(bench, At.REQUEST)
        error = await bench.refusal(work)
        assert (error.reason, error.ran) == (Reason.MEMORY, Ran.NO)


@promise
async def an_unknown_digest_is_refused(bench: Bench) -> None:
    """The agent will tell the node, and try again."""
    error = await bench.refusal(workload("stranger"))
    assert (error.reason, error.ran) == (Reason.UNKNOWN_DIGEST, Ran.NO)


@promise_for(
    ("isolation", Demands(isolation=Isolation.MICROVM_JAILED)),
    ("start", Demands(start=Start.POOL)),
    ("both", Demands(isolation=Isolation.MICROVM, start=Start.WARM)),
)
async def a_demand_that_cannot_be_met_is_refused(bench: Bench, _: str, demands: Demands) -> None:
    """Rather an error than less."""
    error = await bench.refusal(await known(bench), demands=demands)
    assert (error.reason, error.ran) == (Reason.INCOMPATIBLE, Ran.NO)
    assert error.hint


@promise
async def a_demand_that_is_met_is_no_hindrance(bench: Bench) -> None:
    """At least as much is enough."""
    work = await known(bench, warm_base=True)
    await asyncio.sleep(5.0)
    for demands in (Demands(isolation=Isolation.PROCESS), Demands(Isolation.MICROVM, Start.WARM), Demands(None, None)):
        assert (await bench.call(work, demands=demands)).whole


@promise_for(
    ("feature", {"requires": ("time-travel",)}),
    ("isolation", {"isolation": Isolation.MICROVM_JAILED}),
)
async def a_workload_that_the_node_cannot_run_is_refused(bench: Bench, _: str, fields: dict) -> None:
    """When it is made known, and when it is called all the same."""
    work = workload("odd", **fields)
    with pytest.raises(GuestUnavailable) as refused:
        await bench.node.ensure(work)
    assert refused.value.reason is Reason.INCOMPATIBLE
    assert (await bench.refusal(work)).ran is Ran.NO


# A guest fails.


BROKEN = [
    (at, how)
    for at in (At.ACCEPTED, At.CONNECTED, At.REQUEST, At.BEFORE_HEAD, At.WITHIN_HEAD, At.AFTER_HEAD, At.MID_BODY)
    for how in ("die", "fail", "close", "nonsense")
]


@promise_for(*BROKEN)
async def a_guest_that_breaks_is_told_and_never_asked_again(bench: Bench, at: At, how: str) -> None:
    """At every stage of the exchange: something may have run, and no truncated answer looks whole."""
    work = await known(bench, concurrency=1)
    accident = {
        "die": {"die": True},
        "fail": {"fail": "reset"},
        "close": {"close": True},
        "nonsense": {"say": b"\0nonsense\r\n\r\n", "close": True},
    }
    plan(bench, at, **accident[how])
    outcome = await bench.call(work, "/?pieces=3&chunked=1&pace_s=0.1")
    assert isinstance(outcome.error, GuestFailed)
    assert outcome.error.ran is Ran.MAYBE
    assert not outcome.whole
    assert len(bench.journal) <= 1
    assert (await bench.call(work)).whole, "the next guest is another one"


@promise
async def a_guest_that_dies_is_told_with_its_last_words(bench: Bench) -> None:
    """How it ended, and what its console said."""
    error = await bench.refusal(await known(bench), "/?die=exit+status+3")
    assert isinstance(error, GuestFailed)
    assert bench.end_of_exit_3 in error.message
    assert "last words" in error.message


@promise_for(
    ("/?die=exit+status+3", Reason.GUEST_FAILED),
    ("/?hang=1", Reason.GUEST_TIMEOUT),
    ("/out-of-reach", Reason.BOOT_FAILED),
)
async def an_error_tells_of_the_guest_that_was_claimed(bench: Bench, target: str, reason: Reason) -> None:
    """As its reply would have, whether it ran or not; who never had a guest is told of none."""
    work = await known(bench)
    if reason is Reason.BOOT_FAILED:  # it was ready, could not be reached, and no other can be started
        plan(bench, At.DIAL, fail="gone")
    error = await bench.refusal(work, target, run_within_s=3.0)
    assert error.reason is reason
    assert error.started is not None
    assert (error.started.start, error.started.node) == (Start.COLD, NODE_ID)
    assert error.started.isolation is bench.isolation
    assert error.started.guest
    assert error.started.claim_ms >= error.started.ready_ms >= 0
    refused = await bench.refusal(work, demands=Demands(start=Start.POOL))
    assert (refused.reason, refused.started) == (Reason.INCOMPATIBLE, None)


@promise_for(
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    b"HTTP/1.1 999 Nonsense\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil close",
    b"HTTP/1.1 200 OK\r\nx: " + b"x" * 70_000 + b"\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20,
    b"SSH-2.0-OpenSSH_9.2\r\n",
)
async def an_answer_that_is_no_http_as_accepted_is_a_failure(bench: Bench, answer: bytes) -> None:
    """Whatever it pretends to be."""
    bench.faults.on(At.BEFORE_HEAD, say=answer, hang=True)
    error = await bench.refusal(await known(bench))
    assert isinstance(error, GuestFailed)
    assert bench.journal


@promise_for(At.ACCEPTED, At.REQUEST, At.BEFORE_HEAD, At.WITHIN_HEAD)
async def a_guest_that_takes_too_long_is_told(bench: Bench, at: At) -> None:
    """As soon as `run_within_s` has passed, and its guest is gone."""
    work = await known(bench)
    plan(bench, at, hang=True)
    loop, began_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    error = await bench.refusal(work, run_within_s=3.0)
    assert isinstance(error, GuestTimeout)
    assert error.ran is Ran.MAYBE
    assert 3.0 <= loop.time() - began_s < 3.5
    await asyncio.sleep(1.0)
    assert not bench.left()


@promise
async def a_stream_that_takes_too_long_is_cut_and_never_looks_whole(bench: Bench) -> None:
    """What came until then was passed on."""
    outcome = await bench.call(await known(bench), "/?pieces=100&chunked=1&pace_s=1", run_within_s=3.5)
    assert isinstance(outcome.error, GuestTimeout)
    assert (outcome.status, len(outcome.body)) == (200, 4000)


@promise
async def no_readers_pace_owns_a_guest(bench: Bench) -> None:
    """After `run_within_s` the guest is gone, though its answer has not been read."""
    work = await known(bench)
    run_within_s = 0.6 * bench.long_s
    call = bench.invocation(work, "/?pieces=100&bytes=100000&chunked=1", run_within_s=run_within_s)
    async with bench.node.invoke(call) as reply:
        await bench.gone(within_s=run_within_s + bench.going_s)
        with pytest.raises(GuestTimeout):
            [piece async for piece in reply.body]


@promise
async def an_answer_that_was_whole_in_time_may_be_read_late(bench: Bench) -> None:
    """Its guest is gone by then."""
    work = await known(bench)
    async with bench.node.invoke(bench.invocation(work, run_within_s=1.0)) as reply:
        await asyncio.sleep(5.0)
        assert not bench.left()
        assert b"".join([piece async for piece in reply.body]) == b"hello"
    assert reply.receipt.body_bytes == 5


# Delivered twice, cancelled.


@promise
async def a_second_delivery_is_told_apart_and_does_not_run(bench: Bench) -> None:
    """While the first one waits, runs, and after it has ended."""
    work = await known(bench)
    call = bench.invocation(work, f"/?after_s={bench.long_s}")
    async with going_on(bench, call) as [first]:
        for at in (None, At.REQUEST):
            if at is not None:
                await until(bench, at)
            else:
                await asyncio.sleep(0.05)
            assert isinstance(await bench.refusal(call), DuplicateInvocation)
    assert said(first).whole
    error = await bench.refusal(call)
    assert isinstance(error, DuplicateInvocation)
    assert error.ran is Ran.MAYBE
    assert bench.entries(call.id) == 1


@promise
async def another_attempt_is_no_second_delivery(bench: Bench) -> None:
    """What was refused may be tried again under the next number, and under no other twice."""
    work = bench.workload()
    call = bench.invocation(work)
    assert (await bench.refusal(call)).reason is Reason.UNKNOWN_DIGEST
    await bench.node.ensure(work)
    assert isinstance(await bench.refusal(call), DuplicateInvocation)
    again = bench.invocation(work, id=call.id, attempt=2)
    assert (await bench.call(again)).whole
    assert bench.journal == [(call.id, 2)]


@promise
async def a_delivery_is_remembered_for_a_quarter_of_an_hour(bench: Bench) -> None:
    """And a fence as well."""
    work = await known(bench)
    call, fenced = bench.invocation(work), bench.invocation(work)
    await bench.call(call)
    await bench.node.cancel(fenced.id)
    await asyncio.sleep(14 * 60)
    assert isinstance(await bench.refusal(call), DuplicateInvocation)
    assert isinstance(await bench.refusal(fenced), InvocationCancelled)


@promise
async def a_cancelled_id_never_starts(bench: Bench) -> None:
    """Whether its call arrives before or after, or with another attempt."""
    work = await known(bench)
    call = bench.invocation(work)
    assert await bench.node.cancel(call.id) is Ran.NO
    for attempt in (1, 2):
        error = await bench.refusal(bench.invocation(work, id=call.id, attempt=attempt))
        assert isinstance(error, InvocationCancelled)
        assert error.ran is Ran.NO
    assert await bench.node.cancel(call.id) is Ran.NO
    assert not bench.journal


@promise
async def a_call_that_is_cancelled_while_it_waits_never_starts(bench: Bench) -> None:
    """It is told so at once, and the next in line moves up."""
    work = await known(bench, concurrency=1)
    calls = [bench.invocation(work, f"/?after_s={bench.long_s}"), bench.invocation(work), bench.invocation(work)]
    async with going_on(bench, *calls) as tasks:
        await until(bench, At.REQUEST)
        assert await bench.node.cancel(calls[1].id) is Ran.NO
        await asyncio.sleep(0.1)
        assert isinstance(said(tasks[1]).error, InvocationCancelled)
    assert said(tasks[0]).whole
    assert said(tasks[2]).whole


@promise_for(At.BOOT, At.RESTORED, At.DIAL)
async def a_call_that_is_cancelled_while_its_guest_starts_never_runs(bench: Bench, at: At) -> None:
    """At every stage before the request is written."""
    work = await known(bench)
    plan(bench, at, hang=True)
    call = bench.invocation(work)
    async with going_on(bench, call) as [task]:
        await asyncio.sleep(1.0)
        assert await bench.node.cancel(call.id) is Ran.NO
        await asyncio.sleep(0.1)
        assert isinstance(said(task).error, InvocationCancelled)


@promise_for(At.REQUEST, At.BEFORE_HEAD, At.MID_BODY)
async def a_call_that_is_cancelled_while_it_runs_loses_its_guest(bench: Bench, at: At) -> None:
    """Something may have run; its caller and whoever cancelled it are both told."""
    work = await known(bench)
    bench.faults.on(at, hang=True)
    call = bench.invocation(work, "/?pieces=3&chunked=1")
    async with going_on(bench, call) as [task]:
        await until(bench, at)
        await asyncio.sleep(0.1)
        assert await bench.node.cancel(call.id) is Ran.MAYBE
        await asyncio.sleep(0.1)
        assert isinstance(said(task).error, GuestFailed)
    assert await bench.node.cancel(call.id) is Ran.MAYBE


@promise
async def cancelling_what_has_ended_says_whether_it_may_have_run(bench: Bench) -> None:
    """And disturbs nobody."""
    work = await known(bench)
    ran = await bench.call(work)
    refused = await bench.call(workload("stranger"))
    assert await bench.node.cancel(ran.invocation.id) is Ran.MAYBE
    assert await bench.node.cancel(refused.invocation.id) is Ran.NO


@promise
async def what_is_kept_of_a_call_can_be_asked_for(bench: Bench) -> None:
    """By its id, also when it is over; of what never came nothing is kept."""
    outcome = await bench.call(await known(bench))
    await asyncio.sleep(0.1)
    story = await bench.node.story(outcome.invocation.id)
    names = [happened.event["event"] for happened in story.events]
    assert names == ["slot.taken", "guest.claimed", "exchange.ended", "guest.gone", "slot.freed"]
    assert story.events[-1].at_ns <= story.now_ns
    assert await bench.node.story("f" * 32) is None


# Sessions.


@promise
async def calls_of_one_session_run_one_at_a_time(bench: Bench) -> None:
    """Others do not wait for them; the same word of another caller is another session."""
    loop, work = asyncio.get_running_loop(), await known(bench, sessioned=True, concurrency=4)
    began_s = loop.time()
    ends_s: dict[str, float] = {}

    async def one(name: str, session: str | None, caller: str) -> None:
        await bench.call(work, "/?after_s=5", session=session, caller=caller)
        ends_s[name] = loop.time() - began_s

    async with asyncio.TaskGroup() as callers:
        callers.create_task(one("a1", "a", "anna"))
        callers.create_task(one("a2", "a", "anna"))
        callers.create_task(one("a of bert", "a", "bert"))
        callers.create_task(one("none", None, "anna"))
    assert max(ends_s["a1"], ends_s["a2"]) > 10
    assert max(ends_s["a of bert"], ends_s["none"]) < 6


# Workloads.


@promise
async def ensuring_twice_is_ensuring_once(bench: Bench) -> None:
    """And a new version lives beside the old one."""
    work = await known(bench)
    await bench.node.ensure(work)
    newer = await known(bench, env={"version": "2"})
    assert (await bench.call(work)).whole
    assert (await bench.call(newer)).whole
    assert set((await latest(bench)).workloads) == {work.digest, newer.digest}


@promise
async def a_forgotten_workload_stays_for_ten_minutes(bench: Bench) -> None:
    """Unless it is ensured or called meanwhile; forgetting what nobody knows is no error."""
    gone, kept, called = await known(bench), await known(bench, "kept"), await known(bench, "called")
    for work in (gone, kept, called, workload("stranger")):
        await bench.node.forget(work.digest)
    await asyncio.sleep(300)
    await bench.node.ensure(kept)
    assert (await bench.call(called)).whole
    await asyncio.sleep(299)
    assert set((await latest(bench)).workloads) == {gone.digest, kept.digest, called.digest}
    await asyncio.sleep(2)
    assert (await bench.refusal(gone)).reason is Reason.UNKNOWN_DIGEST
    assert (await bench.call(kept)).whole
    assert (await bench.call(called)).whole


@promise
async def what_a_newer_agent_says_of_a_workload_is_kept(bench: Bench) -> None:
    """Its digest is that of the bytes as they came."""
    work = Workload.parse(b'{"colour":"blue","command":["echo"],"memory_mib":1024,"name":"echo"}')
    await bench.node.ensure(work)
    assert (await bench.call(work)).whole
    assert work.digest in (await latest(bench)).workloads


# Size and drain.


@promise
async def a_draining_node_takes_no_calls_and_ends_those_that_run(bench: Bench) -> None:
    """Those that finish in time are whole; the others are told the truth when the time is over."""
    work = await known(bench, concurrency=2)
    calls = [
        bench.invocation(work, "/?after_s=2"),
        bench.invocation(work, "/?after_s=50"),
        bench.invocation(work, "/?after_s=50"),
        bench.invocation(work),
    ]
    async with going_on(bench, *calls) as tasks:
        await asyncio.sleep(1.0)
        await bench.node.drain(within_s=5.0)
        error = await bench.refusal(work)
        assert (error.reason, error.ran) == (Reason.DRAINING, Ran.NO)
        report = await latest(bench)
        assert report.draining
        assert 4.5 < report.drain_within_s <= 5.0
        await asyncio.sleep(5.1)
        quick, cut, also_cut, waiting = map(said, tasks)
    assert quick.whole
    assert isinstance(cut.error, GuestFailed)
    assert isinstance(also_cut.error, GuestFailed)
    assert waiting.error.reason is Reason.DRAINING
    await bench.node.resume()
    assert not (await latest(bench)).draining
    assert (await bench.call(work)).whole


@promise
async def resuming_in_time_spares_the_calls(bench: Bench) -> None:
    """And a second order to drain replaces the first."""
    work = await known(bench)
    async with going_on(bench, bench.invocation(work, "/?after_s=10")) as [task]:
        await asyncio.sleep(1.0)
        await bench.node.drain(within_s=2.0)
        await bench.node.drain(within_s=100.0)
        await asyncio.sleep(3.0)
        await bench.node.drain(within_s=2.0)
        await bench.node.resume()
    assert said(task).whole


@promise
async def limits_are_echoed_and_an_older_generation_changes_nothing(bench: Bench) -> None:
    """Lowered below what runs, they end nothing, and let nothing in until it fits."""
    work = await known(bench, concurrency=4)
    async with going_on(bench, *(bench.invocation(work, "/?after_s=10") for _ in range(2))) as tasks:
        await until(bench, At.REQUEST)
        await asyncio.sleep(1.0)
        await bench.node.limit(NodeLimits(generation=7, memory_mib=GUEST_MIB))
        await bench.node.limit(NodeLimits(generation=6, memory_mib=100 * GUEST_MIB))
        report = await latest(bench)
        assert (report.limits_generation, report.size_mib, report.free_mib) == (7, GUEST_MIB, 0)
        error = await bench.refusal(work, start_within_s=1.0)
        assert (error.reason, error.ran) == (Reason.MEMORY, Ran.NO)
    assert all(said(task).whole for task in tasks)
    assert (await bench.call(work)).whole
    await bench.node.limit(NodeLimits(generation=8, memory_mib=0))
    assert (await bench.refusal(work)).reason is Reason.MEMORY


# Reports.


@promise
async def the_first_report_is_whole_and_the_others_say_what_changed(bench: Bench) -> None:
    """Soon, but not for every little thing."""
    work, other = await known(bench, concurrency=1), await known(bench, "other")
    loop = asyncio.get_running_loop()
    async with aclosing(bench.node.reports()) as reports:
        first = await anext(reports)
        assert first.full
        assert (first.node_id, first.size_mib, first.free_mib) == (NODE_ID, MEMORY_MIB, MEMORY_MIB)
        assert first.boot_id
        assert set(first.workloads) == {work.digest, other.digest}
        calls = [bench.invocation(work, "/?after_s=1") for _ in range(2)]
        seen: list[tuple[float, NodeReport]] = []
        async with going_on(bench, *calls):
            while not seen or seen[-1][1].workloads.get(work.digest) is None or seen[-1][1].workloads[work.digest].busy:
                seen.append(((await _next(reports)), loop.time())[::-1])
    assert not any(report.full or other.digest in report.workloads for _, report in seen)
    photographs = [report.workloads[work.digest] for _, report in seen if work.digest in report.workloads]
    assert max(photograph.waiting for photograph in photographs) == 1
    assert max(photograph.busy for photograph in photographs) == 1
    assert photographs[-1].service_ms > 1000
    assert len(seen) < 20


async def _next(reports) -> NodeReport:
    async with asyncio.timeout(2.5):
        return await anext(reports)


@promise
async def a_node_with_no_news_is_heard_every_two_seconds(bench: Bench) -> None:
    """So that silence means something."""
    loop = asyncio.get_running_loop()
    async with aclosing(bench.node.reports()) as reports:
        await anext(reports)
        for _ in range(5):
            began_s = loop.time()
            assert not (await _next(reports)).full
            assert 1.9 < loop.time() - began_s < 2.1


@promise
async def a_workload_that_is_gone_is_retracted(bench: Bench) -> None:
    """Ten minutes after it was forgotten."""
    work = await known(bench)
    async with aclosing(bench.node.reports()) as reports:
        assert (await anext(reports)).workloads[work.digest].name == "echo"
        await bench.node.forget(work.digest)
        async with asyncio.timeout(700):
            async for report in reports:
                if work.digest in report.workloads:
                    break
        assert report.workloads == {work.digest: None}


@promise
async def many_may_listen(bench: Bench) -> None:
    """Each hears it all, and leaving is nobody else's business."""
    work = await known(bench)
    async with aclosing(bench.node.reports()) as one:
        await anext(one)
        async with aclosing(bench.node.reports()) as other:
            await anext(other)
        async with going_on(bench, bench.invocation(work, "/?after_s=1")):
            async with asyncio.timeout(1.0):
                while (await anext(one)).workloads.get(work.digest) is None:
                    pass


# Callers leave.


@promise_for(
    ("waiting", "", 0.5),
    ("starting", "", 0.05),
    ("running", "/?after_s=5", 1.0),
    ("streaming", "/?pieces=9&chunked=1&pace_s=1", 3.0),
)
async def a_caller_that_leaves_takes_everything_with_it(bench: Bench, when: str, target: str, after_s: float) -> None:
    """Guest, slot, memory and place in the queue are free within a moment."""
    work = await known(bench, concurrency=1)
    blocker = bench.invocation(work, "/?after_s=20")
    async with asyncio.TaskGroup() as callers:
        if when == "waiting":
            callers.create_task(bench.call(blocker))
            await until(bench, At.REQUEST)
        task = callers.create_task(bench.call(work, target or "/"))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.sleep(0.5)
        report = await latest(bench)
        assert report.workloads[work.digest].waiting == 0
        assert report.workloads[work.digest].busy == (1 if when == "waiting" else 0)
    if when in {"waiting", "starting"}:
        assert not bench.entries(task_id(bench))


def task_id(bench: Bench) -> str:
    """The id of the call that was left."""
    [left] = [outcome for outcome in bench.outcomes if outcome.cancelled]
    return left.invocation.id
