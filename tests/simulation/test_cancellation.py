"""A call may be cut short at any step of the one-process path, front and all, and as often as one likes."""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from real_parts import steps
from simulation import virtual_time
from simulation.callers import MANNERS, Call, Line, Manner
from simulation.fleet import FRONT, Design, Fleet, fleet
from simulation.guests import Wish
from simulation.scenarios import SHORT, TABLE
from simulation.truth import Audit

ANNA = ("authorization", "Bearer anna")
CUT_SHORT = ("front_stops",)
"""What the audit is told of these runs: calls may be cut short by their own daemon."""
STEPS_MAX = 2_000


@dataclass
class Bench:
    """One process, and the calls that were made on it."""

    there: Fleet
    calls: list[Call]
    others: frozenset[str] = frozenset()
    """The names of the front's tasks that belong to other calls than the one that is cut."""

    def call(self, workload: str, wish: Wish = Wish(), *, session: str = "", **changes: Any) -> Call:  # noqa: B008  # frozen
        """A call of anna's."""
        path = f"/{session}" if session else ""
        query = f"?{wish.query}" if wish.query else ""
        usual = {
            "number": len(self.calls) + 1,
            "workload": workload,
            "method": "POST",
            "target": f"/invoke/{workload}{path}{query}",
            "guest_target": f"/invoke{path}{query}",
            "fields": (ANNA,),
            "body": b"some bytes",
        }
        self.calls.append(Call(**(usual | changes)))
        return self.calls[-1]

    def mine(self) -> list[asyncio.Task[None]]:
        """The front's tasks of the call that is cut."""
        assert self.there.front is not None
        return [task for task in self.there.front.server_state.tasks if task.get_name() not in self.others]

    async def line(self, *calls: Call) -> Line:
        """A connection for these calls."""
        return (await self.there.network.connect(FRONT, lambda: Line(list(calls))))[1]


Scene = Callable[[Bench], Awaitable[tuple[Call, Manner]]]


async def cold(bench: Bench) -> tuple[Call, Manner]:
    """A guest boots, answers, is ended."""
    return bench.call("cold"), Manner("patient")


async def warm(bench: Bench) -> tuple[Call, Manner]:
    """A guest is restored."""
    return bench.call("warm"), Manner("patient")


async def pooled(bench: Bench) -> tuple[Call, Manner]:
    """A guest stands ready."""
    return bench.call("pool"), Manner("patient")


async def streaming(bench: Bench) -> tuple[Call, Manner]:
    """The answer comes in pieces, one of them large."""
    return bench.call("pool", Wish(pieces=3, size=70_000, chunked=1, pace_ms=20)), Manner("patient")


async def uploading(bench: Bench) -> tuple[Call, Manner]:
    """The body comes slowly, in parts."""
    fields = (ANNA, ("transfer-encoding", "chunked"))
    return bench.call("pool", body=b"x" * 100_000, fields=fields), Manner("slow_uploader", pause_s=0.05)


async def expecting(bench: Bench) -> tuple[Call, Manner]:
    """The body comes when it is asked for."""
    return bench.call("pool", fields=(ANNA, ("expect", "100-continue"))), Manner("expecter")


async def stalling(bench: Bench) -> tuple[Call, Manner]:
    """The caller reads nothing of a large answer for a while."""
    return bench.call("pool", Wish(pieces=8, size=60_000)), Manner("staller", fraction=0.1, pause_s=0.1)


async def queued(bench: Bench) -> tuple[Call, Manner]:
    """The only slot is taken for a while."""
    await _another(bench, bench.call("tiny", Wish(after_ms=100)))
    return bench.call("tiny"), Manner("patient")


async def held_back(bench: Bench) -> tuple[Call, Manner]:
    """Another call of the same session runs."""
    await _another(bench, bench.call("seats", Wish(after_ms=100), session="s"))
    return bench.call("seats", session="s"), Manner("patient")


async def _another(bench: Bench, call: Call) -> None:
    line = await bench.line(call)

    async def made() -> None:
        await MANNERS["patient"](line, Manner("patient"))
        await line.gone()

    bench.there.background(made())
    await asyncio.sleep(0.1)


SCENES: tuple[Scene, ...] = (cold, warm, pooled, streaming, uploading, expecting, stalling, queued, held_back)


def cut_by_its_daemon(times: int) -> Callable[[Bench, Call, Line], None]:
    """Cancel the front's task of the call, at this step of the loop and the next ones."""

    def act(bench: Bench, call: Call, _: Line) -> None:
        # A task that has not begun can't clean up. Who cancels those of a front also cuts its connections.
        begun = (task for task in bench.mine() if inspect.getcoroutinestate(task.get_coro()) != inspect.CORO_CREATED)
        for task in begun:
            for later in range(1, times):
                bench.there.loop.at_pass(later, task.cancel)
            task.cancel()
            call.left = call.left or not call.over  # it may hear nothing, or half

    return act


def left_by_its_caller(*, rudely: bool) -> Callable[[Bench, Call, Line], None]:
    """Close the caller's connection, or reset it."""

    def act(_: Bench, __: Call, line: Line) -> None:
        line.leave(rudely=rudely)

    return act


ACTS = {
    **{f"cut by its daemon {times} times": cut_by_its_daemon(times) for times in (1, 2, 5)},
    "left by its caller": left_by_its_caller(rudely=False),
    "reset by its caller": left_by_its_caller(rudely=True),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_a_call_may_be_cut_short_at_any_step_of_the_one_process(scene: Scene, act: str):
    """Afterwards nothing of it is left, nothing ran twice, and the next caller is served."""

    async def main(dice: Random) -> None:
        table = json.dumps({name: SHORT | TABLE[name] for name in ("cold", "warm", "pool", "tiny", "seats")})
        async with fleet(Design(table=table), dice) as there:
            bench = Bench(there, [])
            await asyncio.sleep(5.0)  # until bases and parked guests are there
            for step in steps(3):
                assert step < STEPS_MAX
                if await _over_before(bench, scene, ACTS[act], step):
                    break
            assert step > 20, "there was nothing to cut"
            await _serves(bench)
        audit = Audit(there, bench.calls, themes=CUT_SHORT)
        assert not list(audit.lies())
        assert any(call.left and not call.whole for call in bench.calls)

    virtual_time.run(main, seed=1, passes_max=10_000_000)


async def _over_before(bench: Bench, scene: Scene, act: Callable[[Bench, Call, Line], None], step: int) -> bool:
    """Make a call and do something to it at a step of the loop; says whether it was over by then, for the front too."""
    bench.others = frozenset()
    call, manner = await scene(bench)
    bench.others = frozenset(task.get_name() for task in bench.mine())
    line = await bench.line(call)
    over, came = False, asyncio.Event()

    def once() -> None:
        nonlocal over
        over = call.over and not bench.mine()
        came.set()
        if not over:
            act(bench, call, line)

    bench.there.loop.at_pass(step, once)
    await MANNERS[manner.kind](line, manner)
    await line.gone()
    assert not await bench.there.quiet()
    await came.wait()
    return over


async def _serves(bench: Bench) -> None:
    """As many calls as there are slots run at once, at once."""
    for name in ("cold", "warm", "pool", "tiny", "seats"):
        calls = [bench.call(name) for _ in range(TABLE[name]["concurrency"])]
        lines = [await bench.line(call) for call in calls]
        async with asyncio.TaskGroup() as callers:
            for line in lines:
                callers.create_task(MANNERS["patient"](line, Manner("patient")))
        for line in lines:
            await line.gone()
        assert all(call.whole and call.status == 200 for call in calls), [call.answer for call in calls]
        assert all(float(call.headers["x-fc-queue-wait-ms"]) == 0 for call in calls)
