"""Nodes are followed, taught and missed."""

import asyncio
from random import Random

from cluster.test_placement_policy import report
from simulation.virtual_time import run
from substrate_cluster.nodes.registry import Registry
from substrate_cluster.placement.index import NodeIndex
from substrate_seam.errors import GuestUnavailable, Reason
from substrate_seam.events import NodeConnected, NodeLost, WarningRaised
from substrate_seam.workload import Workload, WorkloadSpec

FIRST = Workload.of(WorkloadSpec(name="first", command=("serve",)))
SECOND = Workload.of(WorkloadSpec(name="second", command=("serve",)))


class SpeakingNode:
    """A node that says what it is told to, until it falls silent (None) or breaks (an exception)."""

    def __init__(self, node_id="n"):
        self.node_id = node_id
        self.words = asyncio.Queue()
        self.ensured, self.forgotten, self.heard = [], [], 0
        self.refuses = None

    async def reports(self):
        self.heard += 1
        while (word := await self.words.get()) is not None:
            if isinstance(word, Exception):
                raise word
            yield word

    async def ensure(self, workload):
        if self.refuses is not None:
            raise self.refuses
        self.ensured.append(workload.name)

    async def forget(self, digest):
        self.forgotten.append(digest)


async def following(node, scenario, *, workloads=(FIRST,)):
    """Follow one node during a scenario, and give what was told."""
    events, index = [], NodeIndex()
    registry = Registry({node.node_id: node}, index, workloads=lambda: workloads, dice=Random(1), emit=events.append)
    async with asyncio.TaskGroup() as duties:
        task = duties.create_task(registry.run())
        await scenario(registry, index)
        task.cancel()
    return events


def test_a_node_that_is_heard_is_taught_and_takes_calls():
    """On connect it is told every workload."""

    async def main(_):
        node = SpeakingNode()

        async def scenario(registry, index):
            assert registry.reasons() == ["node 'n' can't be heard: it has not been heard yet"]
            node.words.put_nowait(report("n"))
            await registry.heard()
            assert (node.ensured, registry.reasons(), list(index.open)) == (["first"], [], ["n"])

        events = await following(node, scenario)
        assert events[0] == NodeConnected(node="n", boot_id="b")

    run(main, seed=1)


def test_silence_retracts_the_node_and_it_is_tried_again():
    """Its capacity is gone at once; a little later it is asked anew, with growing patience."""

    async def main(_):
        node = SpeakingNode()

        async def scenario(registry, index):
            node.words.put_nowait(report("n"))
            await registry.heard()
            node.words.put_nowait(OSError("the wire broke"))
            await asyncio.sleep(0.01)
            assert registry.reasons() == ["node 'n' can't be heard: the wire broke"]
            assert len(index.open) == 0
            node.words.put_nowait(report("n", boot_id="c"))
            await asyncio.sleep(10)
            assert (node.heard, node.ensured, registry.reasons()) == (2, ["first", "first"], [])

        events = await following(node, scenario)
        assert NodeLost(node="n", message="the wire broke") in events

    run(main, seed=1)


def test_a_node_that_was_never_heard_is_told_of_once_for_each_reason():
    """An operator learns why at once, and not again with each try."""

    async def main(_):
        node = SpeakingNode()

        async def scenario(registry, _):
            for why in ("refused", "refused", "wrong certificate"):
                node.words.put_nowait(OSError(why))
            await asyncio.sleep(10)

        events = await following(node, scenario)
        assert [event.message for event in events if isinstance(event, NodeLost)][:2] == [
            "refused",
            "wrong certificate",
        ]

    run(main, seed=1)


def test_a_node_is_not_lost_when_we_stop_listening():
    """A clean stop raises no alarm."""

    async def main(_):
        node = SpeakingNode()

        async def scenario(registry, _):
            node.words.put_nowait(report("n"))
            await registry.heard()

        events = await following(node, scenario)
        assert not [event for event in events if isinstance(event, NodeLost)]

    run(main, seed=1)


def test_a_restarted_node_is_taught_again_without_a_break():
    """Another boot id means that it has forgotten everything."""

    async def main(_):
        node = SpeakingNode()

        async def scenario(registry, _):
            node.words.put_nowait(report("n", boot_id="one"))
            node.words.put_nowait(report("n", boot_id="two"))
            await asyncio.sleep(1)
            assert node.ensured == ["first", "first"]

        await following(node, scenario)

    run(main, seed=1)


def test_a_reload_reaches_the_nodes_that_can_be_heard():
    """New workloads are made known, old ones forgotten."""

    async def main(_):
        node, deaf = SpeakingNode(), SpeakingNode("deaf")

        async def scenario(registry, _):
            await registry.update(added=[SECOND], removed=[FIRST.digest])
            assert node.ensured == []
            node.words.put_nowait(report("n"))
            await registry.heard()
            await registry.update(added=[SECOND], removed=[FIRST.digest])
            assert (node.ensured, node.forgotten) == (["first", "second"], [FIRST.digest])
            assert deaf.ensured == []

        await following(node, scenario)

    run(main, seed=1)


def test_a_workload_that_a_node_refuses_is_told_to_the_operator():
    """It does not keep the node from running the others."""

    async def main(_):
        node = SpeakingNode()
        node.refuses = GuestUnavailable(Reason.INCOMPATIBLE, "needs a microVM", hint="Install one.")

        async def scenario(registry, _):
            node.words.put_nowait(report("n"))
            await registry.heard()

        events = await following(node, scenario)
        assert WarningRaised(message="node 'n': needs a microVM", hint="Install one.") in events

    run(main, seed=1)


def test_a_draining_node_is_named_as_the_reason():
    """Ready means: at least one node takes calls."""

    async def main(_):
        node = SpeakingNode()

        async def scenario(registry, _):
            node.words.put_nowait(report("n", draining=True))
            await registry.heard()
            assert registry.reasons() == ["node 'n' is draining"]

        await following(node, scenario)

    run(main, seed=1)
