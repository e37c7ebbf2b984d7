"""The wire breaks at every byte, in either direction: what ran and what did not is known, and nothing is left."""

import asyncio
from random import Random

import pytest

from conformance.node_contract import known
from conformance.worlds import NODE_ID, Wire, wired, workload
from real_parts import is_full
from simulation import virtual_time
from simulation.network import Connection, End
from substrate_seam.errors import GuestFailed, GuestUnavailable, Ran, Reason

CONTINUE = len(b"HTTP/1.1 100 Continue\r\n\r\n")
BODY = b"hello"
COMMIT = len(b"5\r\nhello\r\n0\r\n\r\n")
STREAM = "/?pieces=3&bytes=70000&chunked=1&pace_s=0.1"


def run(story, *, seed=1):
    """Tell a story on a wire; in the end nothing is left and everybody was told the truth."""

    async def main(dice: Random):
        async with wired(dice) as wire:
            told = await story(wire)
            wire.network.on_connect(("node-1", 8443), None)
            await wire.bench.settled()
            assert (await wire.bench.call(await known(wire.bench, "another"))).whole, "what comes after is served"
            await wire.bench.settled()
            return told

    return virtual_time.run(main, seed=seed).value


async def call_on_a_fresh_connection(wire: Wire, target: str, body: bytes, meddle=lambda connection: None):
    """Make a call for which there is no idle connection; returns its outcome and that connection."""
    work = workload()
    await wire.there.node.ensure(work)
    made: list[Connection] = []

    def watch(connection: Connection) -> None:
        made.append(connection)
        if len(made) == 1:
            meddle(connection)

    wire.network.on_connect((NODE_ID, 8443), watch)
    return await wire.bench.call(work, target, body=body), made[0]


def lengths(target: str, body: bytes) -> tuple[int, int]:
    """How many bytes a call takes to the node, and back."""

    async def story(wire: Wire):
        outcome, connection = await call_on_a_fresh_connection(wire, target, body)
        assert outcome.whole
        await asyncio.sleep(1.0)
        return connection.to_server.arrived_bytes, connection.to_client.arrived_bytes

    return run(story)


def places(total: int, *boundaries: int) -> list[int]:
    """Where to cut `total` bytes: everywhere, or in a plain run here and there and around the boundaries."""
    if is_full() and total < 5000:
        return list(range(total + 1))
    near = {boundary + off for boundary in (0, total, *boundaries) for off in (-2, -1, 0, 1, 2)}
    return sorted(at for at in {*near, *range(0, total, total // 11)} if 0 <= at <= total)


@pytest.mark.parametrize("seen_as", End)
def test_a_wire_cut_on_the_way_to_the_node_before_the_commit_ran_nothing(seen_as):
    """Every byte of the head: provably nothing ran. Every byte behind it: something may have."""
    there, _ = lengths("/", BODY)
    commit = there - COMMIT
    for at in places(there, commit):

        async def story(wire: Wire, at=at):
            outcome, _ = await call_on_a_fresh_connection(
                wire, "/", BODY, lambda connection: connection.to_server.cut_after(at, seen_as=seen_as)
            )
            return outcome, len(wire.bench.journal)

        outcome, ran = run(story)
        error = outcome.error
        if at <= commit:
            assert isinstance(error, GuestUnavailable)
            assert error.reason is Reason.NODE_UNREACHABLE
        else:
            assert isinstance(error, GuestFailed), at
        assert not ran or at == there


@pytest.mark.parametrize("seen_as", End)
@pytest.mark.parametrize("target", ["/", STREAM])
def test_a_wire_cut_on_the_way_back_never_makes_an_answer_look_whole(target, seen_as):
    """Without the last frame an answer is broken; with it, it is whole, whatever becomes of the bytes behind it."""
    _, back = lengths(target, BODY)
    end = back - len(b"\r\n0\r\n\r\n")
    verdicts = []
    for at in places(back, CONTINUE, end):

        async def story(wire: Wire, at=at):
            outcome, _ = await call_on_a_fresh_connection(
                wire, target, BODY, lambda connection: connection.to_client.cut_after(at, seen_as=seen_as)
            )
            return outcome

        outcome = run(story)
        verdicts.append(outcome.whole)
        if at < CONTINUE or (at == CONTINUE and seen_as is End.EOF):  # the end is seen before anybody could commit
            assert isinstance(outcome.error, GuestUnavailable)
        elif not outcome.whole:
            assert isinstance(outcome.error, GuestFailed)
        assert at < end or outcome.whole
    assert verdicts == sorted(verdicts), "from some byte on it is whole"
    assert verdicts.count(True) >= 3


def test_a_wire_cut_within_a_large_body_is_after_the_commit():
    there, _ = lengths("/", b"x" * 300_000)
    for at in places(there):

        async def story(wire: Wire, at=at):
            outcome, _ = await call_on_a_fresh_connection(
                wire, "/", b"x" * 300_000, lambda connection: connection.to_server.cut_after(at)
            )
            return outcome.error

        error = run(story)
        assert error.ran is (Ran.NO if at < 500 else Ran.MAYBE)


@pytest.mark.parametrize("seen_as", End)
def test_an_idle_connection_that_breaks_costs_nothing_and_runs_nothing_twice(seen_as):
    """It may break at every byte of the next call, which is then placed again if its node cannot have begun it."""
    there, back = lengths("/", BODY)
    heard = 0
    for direction, total in (("to_server", there), ("to_client", back)):
        for at in places(total, there - COMMIT, CONTINUE):

            async def story(wire: Wire, direction=direction, at=at):
                work = await known(wire.bench)
                await asyncio.sleep(1.0)
                idle = list(wire.network.connections)[-1]
                stream = getattr(idle, direction)
                stream.cut_after(stream.arrived_bytes + at + 1, seen_as=seen_as)
                return await wire.bench.call(work)

            outcome = run(story)
            heard += outcome.whole
            if direction == "to_server" and at + 1 < there - COMMIT:
                assert outcome.whole, "the node has not seen the whole of it, and a fresh connection was tried"
            elif direction == "to_client" and 0 < at + 1 < CONTINUE:
                assert outcome.error.ran is Ran.NO
    assert heard > 10
