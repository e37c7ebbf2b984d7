"""A caller may leave at any moment, and as often as it likes: nothing stays, nothing runs twice, the truth holds."""

import asyncio
from collections.abc import Callable
from random import Random

import pytest

from conformance.node_contract import known, plan
from conformance.worlds import MEMORY_MIB, Bench, World, local_node, remote_node
from fakes.vmm import At
from real_parts import is_full
from simulation import virtual_time
from simulation.virtual_time import VirtualLoop
from substrate_seam.invocation import Invocation

GONE_WITHIN_S = 3.0
"""So soon after its caller nothing is left of a call, whatever it was doing."""


async def cold(bench: Bench) -> Invocation:
    """A guest boots, answers, is given back."""
    return bench.invocation(await known(bench))


async def from_a_base(bench: Bench) -> Invocation:
    """A restore fails, and a cold start takes its place."""
    work = await known(bench, warm_base=True)
    await asyncio.sleep(5.0)
    bench.faults.on(At.RESTORED, fail="out of luck")
    return bench.invocation(work)


async def parked(bench: Bench) -> Invocation:
    """A guest stands ready, but has died unnoticed."""
    work = await known(bench, pool=1)
    await asyncio.sleep(5.0)
    bench.faults.on(At.DIAL, fail="gone")
    return bench.invocation(work)


async def queued(bench: Bench) -> Invocation:
    """The only slot is taken for a while; then there is a parked guest."""
    work = await known(bench, concurrency=1, pool=1)
    await asyncio.sleep(5.0)
    bench.background(bench.call(work, "/?after_s=0.5"))
    await bench.faults.reached(At.REQUEST)
    return bench.invocation(work)


async def starved(bench: Bench) -> Invocation:
    """There is no memory for a while."""
    bench.background(bench.call(await known(bench, "hog", memory_mib=MEMORY_MIB), "/?after_s=0.5"))
    await bench.faults.reached(At.REQUEST)
    return bench.invocation(await known(bench))


async def large(bench: Bench) -> Invocation:
    """The body takes a while to go there, and to come back."""
    return bench.invocation(await known(bench), "/?chunked=1", body=b"x" * 300_000)


async def streaming(bench: Bench) -> Invocation:
    """The answer comes in pieces."""
    return bench.invocation(await known(bench), "/?pieces=4&chunked=1&pace_s=0.5")


async def dying(bench: Bench) -> Invocation:
    """The guest dies in the middle of its answer."""
    plan(bench, At.MID_BODY, die=True, delay_s=0.2)
    return bench.invocation(await known(bench), "/?pieces=4&chunked=1")


async def hard_to_kill(bench: Bench) -> Invocation:
    """Ending the guest fails at first."""
    bench.faults.on(At.KILL, fail="busy")
    bench.faults.on(At.DISCARD, fail="busy")
    return bench.invocation(await known(bench))


STAGES = (cold, from_a_base, parked, queued, starved, large, streaming, dying, hard_to_kill)


@pytest.mark.parametrize("cancels", [1, 2, 5])
@pytest.mark.parametrize("world", [local_node, remote_node], ids=lambda world: world.__name__)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_caller_may_leave_at_any_step_of_the_loop(stage: Callable, world: World, cancels: int):
    """Cancelled at the n-th step for every n, until the call is over by then; a plain run skips some."""
    stride = 1 if is_full() else 8 if world is remote_node else 5
    step, over = cancels % stride, False
    while not over:
        over = virtual_time.run(leaving(stage, world, step, cancels), seed=1).value
        step += stride
    assert step > 20


def leaving(stage: Callable, world: World, step: int, cancels: int):
    """A run in which the caller leaves at that step; its value says whether the call was over before."""

    async def main(dice: Random) -> bool:
        async with world(dice) as bench:
            call = await stage(bench)
            async with asyncio.TaskGroup() as callers:
                caller = callers.create_task(bench.call(call))
                leave = Leaving(caller, step, cancels)
                await asyncio.wait({caller})
            await bench.settled(GONE_WITHIN_S)
            bench.faults.clear()
            another = await bench.call(bench.invocation(await known(bench, "another")))
            assert another.whole, "what comes after is served"
            await bench.settled()
            return leave.came_late

    return main


class Leaving:
    """Cancels a task at the n-th step of the loop from now, and at the steps after it."""

    def __init__(self, task: asyncio.Task, step: int, times: int) -> None:
        self.came_late = False
        self._task = task
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        self._steps = range(loop.passes + step, loop.passes + step + times)
        self._advance, loop._selector.instead = loop._selector.instead, self._instead

    def _instead(self, timeout_s: float | None) -> None:
        self._advance(timeout_s)
        if self._loop.passes == self._steps.start:
            self.came_late = self._task.done()
        if self._loop.passes in self._steps:
            self._task.cancel()
