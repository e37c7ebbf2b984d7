"""An invocation is placed again only when nothing ran, each node once, three at most."""

import asyncio
from contextlib import asynccontextmanager
from random import Random

import pytest

from cluster.test_placement_policy import report
from simulation.virtual_time import run
from substrate_cluster.placement.executor import PlacedExecutor
from substrate_cluster.placement.index import NodeIndex
from substrate_seam.errors import GuestFailed, GuestUnavailable, InvocationCancelled, Reason
from substrate_seam.events import InvocationPlaced, InvocationRefused
from substrate_seam.invocation import Demands, GuestRequest, Invocation, Isolation, Reply, Start, Started
from substrate_seam.workload import Workload, WorkloadSpec

WORKLOAD = Workload.of(WorkloadSpec(name="w", command=("serve",)))


class ScriptedNode:
    """A node that answers each invocation with the next word of its script: an error to raise, or `ok`."""

    def __init__(self, node_id, *script, takes_s=0.0):
        self.node_id = node_id
        self.script = list(script)
        self.takes_s = takes_s
        self.seen = []
        self.taught = []
        self.given_back = 0

    @asynccontextmanager
    async def invoke(self, invocation):
        self.seen.append(invocation)
        await asyncio.sleep(self.takes_s)
        word = self.script.pop(0) if self.script else "ok"
        if isinstance(word, Exception):
            raise word
        started = Started(
            queue_ms=0,
            claim_ms=0,
            ready_ms=0,
            start=Start.COLD,
            node=self.node_id,
            guest="g",
            isolation=Isolation.PROCESS,
        )
        try:
            yield Reply(started=started, status=200, headers=(), body=None)
        finally:
            self.given_back += 1

    async def ensure(self, workload):
        self.taught.append(workload.digest)


def unavailable(reason=Reason.CAPACITY):
    return GuestUnavailable(reason, "no")


def invocation(**fields):
    given = {
        "id": "0" * 32,
        "attempt": 1,
        "workload": WORKLOAD.ref,
        "session": None,
        "caller": "me",
        "demands": Demands(),
        "request": GuestRequest("POST", "/invoke", (), b""),
        "start_within_s": 5.0,
        "run_within_s": 5.0,
    }
    return Invocation(**(given | fields))


def placed(*nodes, knows=True, events=None):
    """An executor over nodes that have all reported room."""
    index = NodeIndex()
    for node in nodes:
        index.apply(report(node.node_id, known=False))
    return PlacedExecutor(
        {node.node_id: node for node in nodes},
        index,
        workload_of=lambda _: WORKLOAD if knows else None,
        dice=Random(1),
        emit=(events if events is not None else []).append,
    )


async def answer_of(executor, call):
    async with executor.invoke(call) as reply:
        return reply.started.node


def test_a_refusal_tries_the_next_node_under_the_next_attempt():
    """Nothing ran, so it is safe; the attempt tells the two deliveries apart."""

    async def main(_):
        events, full = [], [ScriptedNode(f"n{number}", unavailable()) for number in range(2)]
        nodes = [*full, ScriptedNode("good")]
        assert await answer_of(placed(*nodes, events=events), invocation()) == "good"
        attempts = [seen.attempt for node in nodes for seen in node.seen]
        assert sorted(attempts) == list(range(1, len(attempts) + 1))
        assert all(len(node.seen) <= 1 for node in nodes)
        told = [type(event) for event in events]
        assert told.count(InvocationPlaced) == told.count(InvocationRefused) + 1

    run(main, seed=1)


def test_three_nodes_are_tried_at_most():
    """However many there are; the caller hears the last refusal."""

    async def main(_):
        nodes = [ScriptedNode(f"n{number}", *[unavailable(Reason.MEMORY)] * 9) for number in range(6)]
        with pytest.raises(GuestUnavailable) as refused:
            await answer_of(placed(*nodes), invocation())
        assert refused.value.reason is Reason.MEMORY
        assert sum(len(node.seen) for node in nodes) == 3

    run(main, seed=1)


@pytest.mark.parametrize("draining", [True, False])
def test_who_finds_no_node_hears_whether_there_is_any(draining):
    """One that drains can be reached; whoever is told otherwise looks for a fault in the network."""

    async def main(_):
        executor = placed()
        if draining:
            executor._index.apply(report("n", draining=True))
        with pytest.raises(GuestUnavailable) as refused:
            await answer_of(executor, invocation())
        assert refused.value.reason is (Reason.DRAINING if draining else Reason.NODE_UNREACHABLE)
        assert refused.value.retry_after_s == 1.0

    run(main, seed=1)


def test_a_lone_node_is_not_tried_twice():
    """Its queue has decided."""

    async def main(_):
        node = ScriptedNode("n", *[unavailable()] * 9)
        with pytest.raises(GuestUnavailable):
            await answer_of(placed(node), invocation())
        assert len(node.seen) == 1

    run(main, seed=1)


@pytest.mark.parametrize("error", [GuestFailed("x"), InvocationCancelled("x"), RuntimeError("bug")])
def test_whatever_else_goes_wrong_is_never_run_again(error):
    """Only `GuestUnavailable` says that placing again is safe."""

    async def main(_):
        nodes = [ScriptedNode("a", error), ScriptedNode("b", error)]
        with pytest.raises(type(error)):
            await answer_of(placed(*nodes), invocation())
        assert sum(len(node.seen) for node in nodes) == 1

    run(main, seed=1)


def test_a_node_that_lacks_the_workload_is_told_and_asked_again():
    """The one case in which a node is asked twice: it was not its queue that refused."""

    async def main(_):
        node = ScriptedNode("n", unavailable(Reason.UNKNOWN_DIGEST))
        assert await answer_of(placed(node), invocation()) == "n"
        assert node.taught == [WORKLOAD.digest]
        assert [seen.attempt for seen in node.seen] == [1, 2]

    run(main, seed=1)


def test_a_workload_that_is_gone_from_the_catalog_cannot_be_taught():
    """The refusal says so."""

    async def main(_):
        node = ScriptedNode("n", *[unavailable(Reason.UNKNOWN_DIGEST)] * 9)
        with pytest.raises(GuestUnavailable, match="no longer in the catalog"):
            await answer_of(placed(node, knows=False), invocation())

    run(main, seed=1)


def test_all_tries_share_one_deadline():
    """`start_within_s` bounds the queue, the retries and the claim together."""

    async def main(_):
        nodes = [ScriptedNode(f"n{number}", unavailable(), takes_s=3.0) for number in range(4)]
        with pytest.raises(GuestUnavailable):
            await answer_of(placed(*nodes), invocation(start_within_s=5.0))
        seen = [each for node in nodes for each in node.seen]
        assert sorted(each.start_within_s for each in seen) == [2.0, 5.0]

    run(main, seed=1)


def test_leaving_the_block_gives_the_guest_back_on_the_node_that_had_it():
    """Once, also when the caller breaks off."""

    async def main(_):
        node = ScriptedNode("n")
        with pytest.raises(KeyError):
            async with placed(node).invoke(invocation()):
                raise KeyError
        assert node.given_back == 1

    run(main, seed=1)


def test_without_any_node_the_caller_hears_when_to_come_back():
    """503, and where an operator finds out more."""

    async def main(_):
        with pytest.raises(GuestUnavailable) as refused:
            await answer_of(placed(), invocation())
        assert refused.value.reason is Reason.NODE_UNREACHABLE
        assert refused.value.retry_after_s == 1.0
        assert "/readyz" in refused.value.hint

    run(main, seed=1)
