"""Clean-up survives cancellation, has an owner, and is not given up because it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from node.house import at_pass
from simulation import virtual_time
from substrate_node.reaper import Reaper
from substrate_seam.events import CleanupFailed, CleanupLate, Event


class Yard:
    """A reaper, what it told, and some clean-up that notes when it is done."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reaper = Reaper(emit=self.events.append)
        self.done: list[float] = []

    async def cleanup(self, seconds: float = 1.0) -> None:
        await asyncio.sleep(seconds)
        self.done.append(asyncio.get_running_loop().time())


def simulated(story: Callable[[Yard], Awaitable[Any]]) -> Any:
    async def main(_dice: Random) -> Any:
        return await story(Yard())

    return virtual_time.run(main, seed=1).value


@pytest.mark.parametrize("cancels", [0, 1, 2, 5])
@pytest.mark.parametrize("verb", ["finish", "aclose"])
def test_cancelled_however_often_the_clean_up_is_done_first(verb: str, cancels: int):
    """And then the cancellation goes on; without one, nothing is raised."""

    async def story(yard: Yard) -> None:
        async def block() -> None:
            if verb == "finish":
                await yard.reaper.finish(yard.cleanup(), what="it")
            else:
                yard.reaper.spawn(yard.cleanup(), what="it")
                await yard.reaper.aclose()

        task = asyncio.get_running_loop().create_task(block())
        for number in range(cancels):
            await asyncio.sleep(0.1 * number)
            task.cancel()
            task.cancel()
        await asyncio.wait({task})
        assert yard.done == [1.0]
        assert task.cancelled() == bool(cancels)

    simulated(story)


async def test_a_cancellation_on_every_turn_of_the_loop_does_not_cut_it_short():
    """As anyio's scopes do it, and so some HTTP servers with a request whose client is gone; real time passes then."""
    yard, loop = Yard(), asyncio.get_running_loop()

    async def block() -> None:
        await yard.reaper.finish(yard.cleanup(0.01), what="it")

    def cancel_again() -> None:
        if task.cancel():
            loop.call_soon(cancel_again)

    task = loop.create_task(block())
    await asyncio.sleep(0)
    cancel_again()
    await asyncio.wait({task})
    assert task.cancelled()
    assert len(yard.done) == 1


def test_a_deadline_around_it_stays_a_deadline():
    """The time is up while something is undone: it is undone, and then the time is up."""

    async def story(yard: Yard) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await yard.reaper.finish(yard.cleanup(), what="it")
        assert yard.done == [1.0]
        assert asyncio.current_task().cancelling() == 0

    simulated(story)


def test_late_clean_up_is_told_and_goes_on_without_us():
    async def story(yard: Yard) -> None:
        await yard.reaper.finish(yard.cleanup(30.0), what="undo it", within_s=10.0)
        assert yard.events == [CleanupLate(what="undo it", waited_s=10.0)]
        assert not yard.done
        await yard.reaper.aclose()
        assert yard.done == [30.0]

    simulated(story)


def test_a_failure_is_told_and_not_raised():
    async def story(yard: Yard) -> None:
        async def break_() -> None:
            raise RuntimeError("the disk is full")

        await yard.reaper.finish(break_(), what="undo it")
        assert yard.events == [CleanupFailed(what="undo it", message="RuntimeError: the disk is full")]

    simulated(story)


def test_closing_waits_for_what_is_added_meanwhile():
    async def story(yard: Yard) -> None:
        async def more() -> None:
            await yard.cleanup()
            yard.reaper.spawn(yard.cleanup(), what="the rest")

        yard.reaper.spawn(more(), what="it")
        await yard.reaper.aclose()
        assert yard.done == [1.0, 2.0]

    simulated(story)


def test_a_step_is_taken_until_it_succeeds():
    """Each failure is told; the pauses grow to five seconds."""

    async def story(yard: Yard) -> None:
        tries: list[float] = []

        async def step() -> None:
            tries.append(asyncio.get_running_loop().time())
            if len(tries) < 12:
                raise OSError("device busy")

        await yard.reaper.insist(step, what="unmount it")
        assert yard.events == [CleanupFailed(what="unmount it", message="OSError: device busy")] * 11
        pauses = [later - sooner for sooner, later in pairwise(tries)]
        assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0])

    simulated(story)


@pytest.mark.parametrize("number", range(1, 8))
def test_at_whatever_pass_the_cancellation_comes_the_clean_up_is_whole(number: int):
    async def story(yard: Yard) -> None:
        async def undo() -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            yard.done.append(0.0)

        async def block() -> None:
            try:
                await asyncio.sleep(0)
            finally:
                await yard.reaper.finish(undo(), what="it")

        task = asyncio.get_running_loop().create_task(block())
        await asyncio.sleep(0)
        at_pass(number, task.cancel)
        await asyncio.wait({task})
        assert yard.done == [0.0]

    simulated(story)
