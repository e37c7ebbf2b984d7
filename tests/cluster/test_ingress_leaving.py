"""Callers that leave, daemons that cut calls short, and what is held meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from cluster.asgi import Caller, call, calling
from cluster.fronts import Bench
from fakes.executor import Act, Hold
from substrate_cluster.ingress import Limits
from substrate_seam.errors import GuestFailed, GuestTimeout
from substrate_seam.events import CallRefused, InvocationAccepted

STAGES = ["before the head", "between pieces", "after the last piece"]


def hanging_at(stage: str, *, give_back_passes: int = 0) -> tuple[Act, Hold]:
    """An act that waits at a stage."""
    hold = Hold()
    before, body = ([hold], [b"x"]) if stage == STAGES[0] else ([], [b"first", hold, b"second"])
    if stage == STAGES[2]:
        body = [b"first", b"second", hold]
    return Act(before=before, body=body, give_back_passes=give_back_passes), hold


def tasks_of_ours() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task.get_name() == "hang-up-watch"}


async def settled() -> None:
    """A cancelled task needs a pass of the loop to be gone."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_caller_that_leaves_takes_its_guest_with_it(stage):
    """The executor's block is left at once, while the guest is still silent; nothing more is sent."""
    act, hold = hanging_at(stage, give_back_passes=3)
    with Bench(act) as bench:
        caller = Caller("/invoke/thumb")
        async with calling(bench.app, caller):
            await hold.reached.wait()
            await caller.waited_for.wait()
            caller.leave()
    ended = bench.ended
    assert (ended.client_left, ended.ran, ended.reason) == (True, "maybe", None)
    assert ended.status == (499 if stage == STAGES[0] else 200)
    assert not caller.answer.complete
    await settled()
    assert tasks_of_ours() == set()


async def test_a_caller_that_leaves_while_it_uploads_has_run_nothing():
    with Bench() as bench:
        caller = Caller("/invoke/thumb", body=(b"some", None))
        async with calling(bench.app, caller):
            await caller.waited_for.wait()
            assert bench.admission.body_bytes == 4
            caller.leave()
    assert bench.executor.invocations == []
    assert [event.reason for event in bench.told(CallRefused)] == ["bad-request"]
    assert bench.told(InvocationAccepted) == []


async def test_a_caller_that_reads_nothing_and_then_leaves_frees_what_it_held():
    with Bench(Act(body=(b"first", b"second", b"third"))) as bench:
        caller = Caller("/invoke/thumb")
        caller.stall()
        async with calling(bench.app, caller):
            await caller.waited_for.wait()
            assert bench.executor.given_back == []
            caller.leave()
    assert bench.ended.client_left


async def test_a_whole_answer_is_not_mistaken_for_a_caller_that_left():
    """A server says `disconnect` once an answer is complete, too."""
    with Bench(Act(give_back_passes=5)) as bench:
        answer = await call(bench.app, "/invoke/thumb")
        assert answer.complete
    assert not bench.ended.client_left
    assert tasks_of_ours() == set()


@pytest.mark.parametrize("cancels", [1, 2, 5])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_call_cut_short_by_its_daemon_gives_everything_back(stage, cancels):
    """However often the request's task is cancelled, the guest is given back once and the cancellation goes on."""
    act, hold = hanging_at(stage, give_back_passes=8)
    with Bench(act) as bench:
        caller = Caller("/invoke/thumb")
        async with calling(bench.app, caller) as request:
            await hold.reached.wait()
            for _ in range(cancels):
                request.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await request
    ended = bench.ended
    assert (ended.client_left, ended.ran, ended.reason) == (False, "maybe", "internal")
    assert not caller.answer.complete
    await settled()
    assert tasks_of_ours() == set()


@pytest.mark.parametrize("cancels", [1, 2])
async def test_a_cancellation_is_not_lost_when_the_caller_leaves_at_the_same_moment(cancels):
    act, hold = hanging_at(STAGES[1], give_back_passes=4)
    with Bench(act) as bench:
        caller = Caller("/invoke/thumb")
        async with calling(bench.app, caller) as request:
            await hold.reached.wait()
            await caller.waited_for.wait()
            caller.leave()
            for _ in range(cancels):
                request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request


async def test_a_cancelled_upload_holds_nothing():
    with Bench() as bench:
        caller = Caller("/invoke/thumb", fields=[("content-length", "9")], body=(b"some", None))
        async with calling(bench.app, caller) as request:
            await caller.waited_for.wait()
            assert (bench.admission.in_flight, bench.admission.body_bytes) == ({"anonymous": 1}, 9)
            request.cancel()
    assert bench.executor.invocations == []


@pytest.mark.parametrize("error", [GuestFailed("it died"), GuestTimeout("too long")])
async def test_a_guest_that_fails_while_its_caller_is_slow_breaks_the_connection(error):
    rest = Hold()
    with Bench(Act(body=(b"first", rest, error))) as bench:
        caller = Caller("/invoke/thumb")
        async with calling(bench.app, caller) as request:
            await rest.reached.wait()
            rest.release.set()
            answer = await request
    assert (answer.complete, answer.aborted) == (False, True)
    assert bench.ended.reason == error.reason


async def test_a_body_in_pieces_counts_against_the_budget_as_it_arrives():
    with Bench(body_budget_bytes=10) as bench:
        slow = Caller("/invoke/thumb", body=(b"12345678", None))
        async with calling(bench.app, slow):
            await slow.waited_for.wait()
            assert bench.admission.body_bytes == 8
            answer = await call(bench.app, "/invoke/thumb", body=(b"123",))
            assert (answer.status, answer["fc-error"]) == (503, "overloaded")
            assert (await call(bench.app, "/invoke/thumb", body=(b"12",))).status == 200
            assert bench.admission.body_bytes == 8
            slow.leave()


async def test_the_budget_is_held_for_as_long_as_the_body_is_in_memory():
    hold = Hold()
    with Bench(Act(before=[hold])) as bench:
        async with calling(bench.app, Caller("/invoke/thumb", body=(b"123",))):
            await hold.reached.wait()
            assert bench.admission.body_bytes == 3
            hold.release.set()
        assert bench.admission.body_bytes == 0


async def test_a_caller_at_its_limit_waits_for_none_of_its_own_calls_and_hinders_nobody_else():
    hold = Hold()
    with Bench(Act(before=[hold]), Act(), caller_limit=1) as bench:
        async with calling(bench.app, Caller("/invoke/thumb")):
            await hold.reached.wait()
            second = Caller("/invoke/thumb", body=(b"never read",))
            answer = await second.run(bench.app)
            assert (answer.status, second.pieces_taken) == (429, 0)
            hold.release.set()
        assert (await call(bench.app, "/invoke/thumb")).status == 200


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/invoke/nothing", []),
        ("/invoke/thumb/..", []),
        ("/invoke/thumb", [("fc-require-start", "hot")]),
        ("/invoke/thumb", [("content-length", "1001")]),
        ("/elsewhere", []),
    ],
)
async def test_a_refusal_reads_no_body(target, fields):
    with Bench() as bench:
        caller = Caller(target, fields=fields, body=(b"never read",))
        await caller.run(bench.app)
    assert caller.pieces_taken == 0


async def test_an_upload_that_trickles_is_ended_by_its_deadline():
    with Bench(limits=Limits(body_bytes_max=1000, body_within_s=0.01)) as bench:
        answer = await call(bench.app, "/invoke/thumb", body=(b"a", b"b", None))
    assert (answer.status, answer["fc-error"], answer.complete) == (408, "body-timeout", True)


async def test_a_body_at_its_bound_is_taken_whole():
    with Bench() as bench:
        await call(bench.app, "/invoke/thumb", fields=[("content-length", "1000")], body=(b"x" * 400, b"x" * 600))
    assert bench.executor.invocations[0].request.body == b"x" * 1000
