"""Playing a scenario: callers come, troubles happen, all is mended, and then the fleet must be as good as new.

As a program (`python -m simulation.play FIRST END STEP`, from the folder of the tests) it lives through many seeds and
prints what they came to as JSON.
"""

import asyncio
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from simulation import virtual_time
from simulation.callers import Call, Manner, visit
from simulation.fleet import FRONT, Cancelled, Fleet, Machine, fleet
from simulation.scenarios import EVERYBODY, Scenario, Trouble, Visit, draw, table
from simulation.truth import Audit, tally
from substrate_seam.errors import SubstrateError
from substrate_seam.events import Event, InvocationPlaced
from substrate_seam.report import NodeLimits

_DRAW, _PLAY = 1, 2
_LAST_TRIES = 12
_STORIES_MAX = 3
_STORY_EVENTS_MAX = 120


class Lie(AssertionError):
    """Somebody was not told the truth, or something was left behind."""


@dataclass
class Outcome:
    """What a seed came to."""

    seen: Counter[str]
    trace: str


def live(seed: int, *themes: str) -> Outcome:
    """Live through one seed; raises an `AssertionError` that tells how to replay it and what happened."""
    scenario = draw(Random(f"{_DRAW} {seed}"), *themes)
    stage = _Stage(scenario)
    try:
        outcome = virtual_time.run(stage.play, seed=seed)
        audit = stage.audit()
        if lies := list(audit.lies()):
            raise Lie("\n  ".join(lies))
    except BaseException as failure:
        failure.add_note(
            f"replay: SUBSTRATE_SEED={seed} uv run pytest tests/simulation/test_fleet.py\n  {scenario}\n{stage.story()}"
        )
        raise
    seen = tally(audit)
    seen.update(f"theme {theme}" for theme in scenario.themes)
    seen.update(f"trouble {trouble.kind}" for trouble in scenario.troubles)
    seen.update(f"manner {visit.manner.kind}" for visit in scenario.visits)
    seen[f"machines {scenario.design.machines}"] += 1
    return Outcome(seen, outcome.trace)


class Lived(NamedTuple):
    """What many seeds came to: all that was seen, their traces, and the stories of the first few that failed."""

    seen: Counter[str]
    traces: list[str]
    failures: list[str]


def live_through(seeds: Iterable[int]) -> Lived:
    """Live through many seeds."""
    lived = Lived(Counter(), [], [])
    for seed in seeds:
        try:
            outcome = live(seed)
        except Exception as failure:  # noqa: BLE001  # whatever broke, its story is wanted
            lived.failures.append("".join(traceback.format_exception(failure)))
            if len(lived.failures) == _STORIES_MAX:
                break
        else:
            lived.seen.update(outcome.seen)
            lived.traces.append(outcome.trace)
    return lived


class _Stage:
    """One scenario being played."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.calls = scenario.calls
        self.fleet: Fleet | None = None
        self._limits = 0

    def audit(self) -> Audit:
        """Hold everything against everything."""
        assert self.fleet is not None
        return Audit(self.fleet, self.calls, themes=self.scenario.themes)

    async def play(self, dice: Random) -> None:
        """Live through it."""
        async with fleet(self.scenario.design, dice) as there:
            self.fleet = there
            async with asyncio.TaskGroup() as everybody:
                for each in self.scenario.visits:
                    everybody.create_task(self._come(each))
                for trouble in self.scenario.troubles:
                    everybody.create_task(self._trouble(trouble))
            await there.calm()
            if left := await there.quiet():
                raise Lie("\n  ".join(["left of calls that are over:", *left]))
            if not there.is_stopping:
                await self._last_call(there)

    async def _come(self, arrival: Visit) -> None:
        assert self.fleet is not None
        await asyncio.sleep(arrival.at_s)
        connection = await visit(self.fleet.network, FRONT, arrival.calls, arrival.manner)
        if connection is None:
            assert self.fleet.is_stopping, "nobody listens"
        elif connection in self.fleet.doomed or self.fleet.is_stopping:
            for call in arrival.calls:
                call.left = call.left or not call.whole

    async def _last_call(self, there: Fleet) -> None:
        """After all that, the fleet serves as on its first day."""
        name = next((name for name in EVERYBODY if there.catalog.get(name) is not None), None)
        if name is None:
            return
        for number in range(_LAST_TRIES):
            call = Call(
                number=1_000_000 + number,
                workload=name,
                method="POST",
                target=f"/invoke/{name}",
                guest_target="/invoke",
                fields=(("authorization", "Bearer anna"),),
                body=b"are you well?",
            )
            self.calls.append(call)
            await visit(there.network, FRONT, [call], Manner("patient"))
            if call.status == 200:
                return
            await asyncio.sleep(1.0)
        raise Lie(f"the fleet does not recover: {call.status} {call.headers} {call.answer!r}")

    # Troubles.

    async def _trouble(self, trouble: Trouble) -> None:
        assert self.fleet is not None
        await asyncio.sleep(trouble.at_s)
        with suppress(SubstrateError):  # a node that can't be reached can't be told either
            await getattr(self, "_" + trouble.kind.replace("-", "_"))(
                self.fleet, self.fleet.machines[trouble.node % len(self.fleet.machines)], trouble
            )

    async def _cut(self, there: Fleet, machine: Machine, _: Trouble) -> None:
        there.network.cut(machine.address)

    async def _silence(self, there: Fleet, machine: Machine, trouble: Trouble, *, refuse: bool = False) -> None:
        there.network.partition(machine.address, refuse=refuse)
        await asyncio.sleep(trouble.for_s)
        there.network.heal(machine.address)

    async def _refuse(self, there: Fleet, machine: Machine, trouble: Trouble) -> None:
        await self._silence(there, machine, trouble, refuse=True)

    async def _crash(self, _: Fleet, machine: Machine, trouble: Trouble) -> None:
        machine.crash()
        await asyncio.sleep(trouble.for_s)
        if machine.process is None:
            machine.start()

    async def _kill_guest(self, there: Fleet, machine: Machine, _: Trouble) -> None:
        if machine.process is not None and machine.process.vmm.alive:
            there.dice.choice(list(machine.process.vmm.alive.values())).die("killed by SIGKILL", "out of memory")

    async def _drain(self, there: Fleet, machine: Machine, trouble: Trouble) -> None:
        node = there.nodes[machine.node_id]
        await node.drain(within_s=trouble.for_s)
        await asyncio.sleep(trouble.for_s + 1.0)
        await node.resume()

    async def _limit(self, there: Fleet, machine: Machine, trouble: Trouble) -> None:
        node = there.nodes[machine.node_id]
        for size_mib in (min(trouble.size, there.design.memory_mib), there.design.memory_mib):
            self._limits += 1
            await node.limit(NodeLimits(generation=self._limits, memory_mib=size_mib))
            await asyncio.sleep(trouble.for_s)

    async def _reload(self, there: Fleet, _: Machine, trouble: Trouble) -> None:
        await there.reload(table(Random(trouble.size), self.scenario.names))

    async def _forget(self, there: Fleet, _: Machine, trouble: Trouble) -> None:
        dice = Random(trouble.size)
        kept = dice.sample(self.scenario.names, len(self.scenario.names) - 1)
        await there.reload(table(dice, kept))

    async def _cancel(self, there: Fleet, machine: Machine, trouble: Trouble) -> None:
        """Cancel a call: one that was just placed where it was placed, or any, perhaps before it comes."""
        dice = Random(trouble.size)
        invocation, node_id = dice.choice(self.calls).invocation, machine.node_id
        if dice.random() < 0.8 and (placed := await self._next_placed(there)) is not None:
            invocation, node_id = placed.invocation_id, placed.node
        await asyncio.sleep(trouble.for_s)
        process = next(machine.process for machine in there.machines if machine.node_id == node_id)
        ran = await there.nodes[node_id].cancel(invocation)
        if process is not None:
            there.cancels.append(Cancelled(invocation, node_id, process.boot_id, ran))

    async def _next_placed(self, there: Fleet) -> InvocationPlaced | None:
        placed: asyncio.Future[InvocationPlaced] = there.loop.create_future()

        def hear(event: Event) -> None:
            if isinstance(event, InvocationPlaced) and not placed.done():
                placed.set_result(event)

        there.hearers.append(hear)
        try:
            async with asyncio.timeout(2.0):
                return await placed
        except TimeoutError:
            return None
        finally:
            there.hearers.remove(hear)

    async def _stop(self, there: Fleet, _: Machine, trouble: Trouble) -> None:
        await there.stop_front(trouble.for_s)

    async def _away(self, there: Fleet, _: Machine, trouble: Trouble) -> None:
        there.names.is_away = True
        await asyncio.sleep(trouble.for_s)
        there.names.is_away = False

    # For whoever reads of a failure.

    def story(self) -> str:
        """The last events, and what each caller was told."""
        if self.fleet is None:
            return "  it never began"
        told = [
            f"  call {call.number}: {call.status} {call.headers.get('fc-error', '')} "
            f"{len(call.answer)} bytes{', whole' if call.whole else ''}{', left' if call.left else ''} {call.broken}"
            for call in self.calls
        ]
        events = [f"  {at_s:.6f} {source}: {event}" for at_s, source, event in self.fleet.events[-_STORY_EVENTS_MAX:]]
        return "\n".join([*told, *events])


if __name__ == "__main__":
    print(json.dumps(live_through(range(*map(int, sys.argv[1:])))))  # noqa: T201  # its reader is a script
