"""Hours of the life of a fleet: steady traffic, nodes that come and go, tables that change; and nothing grows."""

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Iterator
from random import Random
from statistics import median

from simulation import virtual_time
from simulation.callers import Call, Manner, visit
from simulation.fleet import FRONT, Design, Fleet, fleet
from simulation.guests import Wish
from simulation.scenarios import SHORT, TABLE
from simulation.truth import Audit
from substrate_cluster.catalog.holder import MOST_REMEMBERED
from substrate_service.metrics import Metrics
from substrate_service.sinks import fan_out
from substrate_service.stories import Stories

HOURS, HOUR_S = 6, 3600.0
BURST_EVERY_S, RUSH_EVERY_S, TROUBLE_EVERY_S = 60.0, 1200.0, 600.0
STORIES_MAX = 64
NAMES = ("cold", "warm", "pool", "seats")
TROUBLES = ("crashes", "partitions", "drains")
"""What may come over a node; the audit is told."""
OBJECTS_SLACK = 500
"""Of all Python objects; far fewer than calls are made in the hours that are compared."""
SLOTS = 2 * 3
"""Of `cold`, on three nodes."""


def table(generation: int) -> str:
    """The table of a generation: two workloads change with it, and one is gone in the next."""
    entries = {name: SHORT | TABLE[name] | {"startTimeout": "20s", "queue": 64} for name in NAMES}
    for name in ("warm", "cold"):
        entries[name]["env"] = {"GENERATION": str(generation)}
    return json.dumps(entries | {f"now-and-then-{generation % 2}": entries["cold"]})


class Days:
    """A fleet, its traffic, and how large everything is."""

    def __init__(self, there: Fleet, dice: Random) -> None:
        self.there = there
        self.dice = dice
        self.stories = Stories(clock=lambda: int(there.loop.time() * 1e9), stories_max=STORIES_MAX)
        self.metrics = Metrics()
        there.hearers.append(fan_out(self.stories.sink, self.metrics.sink))
        self.calls: list[Call] = []
        self.told: Counter[str] = Counter()
        self.waits_ms: dict[str, list[float]] = {"flood": [], "modest": []}
        self._made = 0

    def call(self, caller: str, workload: str, wish: Wish, *, session: str = "") -> Call:
        """A call by one of the names."""
        self._made += 1
        path, query = f"/{session}" if session else "", f"?{wish.query}" if wish.query else ""
        made = Call(
            number=self._made,
            workload=workload,
            method="POST",
            target=f"/invoke/{workload}{path}{query}",
            guest_target=f"/invoke{path}{query}",
            fields=(("authorization", f"Bearer {caller}"),),
            body=self.dice.randbytes(self.dice.choice([0, 20, 2000])),
        )
        self.calls.append(made)
        return made

    async def hour(self, number: int) -> None:
        """An hour of traffic and troubles."""
        ends_s = (number + 1) * HOUR_S
        async with asyncio.TaskGroup() as life:
            for every_s, act in (
                (BURST_EVERY_S, self._burst),
                (RUSH_EVERY_S, self._rush),
                (TROUBLE_EVERY_S, self._trouble),
            ):
                life.create_task(self._again(act, every_s, ends_s))
        await self.there.reload(table(number + 1))

    async def _again(self, act, every_s: float, ends_s: float) -> None:
        while self.there.loop.time() + every_s < ends_s:
            await asyncio.sleep(every_s)
            await act()

    async def _burst(self) -> None:
        """A few callers, at about the same time, leaving sometimes."""
        dice = self.dice
        async with asyncio.TaskGroup() as callers:
            for caller in ("anna", "bert", "cleo"):
                name = dice.choice(NAMES)
                wish = Wish(pieces=dice.randrange(3), chunked=dice.randrange(2), after_ms=dice.choice([0, 50, 500]))
                session = f"s{dice.randrange(1000)}" if name == "seats" else ""
                kind = "patient" if dice.random() < 0.9 else dice.choice(["leaver_after", "leaver_at_head"])
                made = self.call(caller, name, wish, session=session)
                callers.create_task(visit(self.there.network, FRONT, [made], Manner(kind)))

    async def _rush(self) -> None:
        """One caller floods all slots and queues; another comes a little later with a few calls."""
        wish = Wish(after_ms=300)
        async with asyncio.TaskGroup() as callers:
            for caller, many in (("dora", 6 * SLOTS), ("anna", 3)):
                kept = self.waits_ms["flood" if caller == "dora" else "modest"]
                for _ in range(many):
                    callers.create_task(self._waited(self.call(caller, "cold", wish), kept))
                await asyncio.sleep(0.01)

    async def _waited(self, call: Call, waits_ms: list[float]) -> None:
        await visit(self.there.network, FRONT, [call], Manner("patient"))
        assert call.status == 200, call.answer
        waits_ms.append(float(call.headers["x-fc-queue-wait-ms"]))

    async def _trouble(self) -> None:
        """A node crashes, falls silent or is drained for a while, and nothing else happens meanwhile."""
        machine = self.dice.choice(self.there.machines)
        kind = self.dice.choice(TROUBLES)
        if kind == "crashes":
            machine.crash()
            await asyncio.sleep(20.0)
            machine.start()
        elif kind == "partitions":
            self.there.network.partition(machine.address)
            await asyncio.sleep(20.0)
            self.there.network.heal(machine.address)
        else:
            node = self.there.nodes[machine.node_id]
            await node.drain(within_s=5.0)
            await asyncio.sleep(20.0)
            await node.resume()

    def settle_accounts(self) -> None:
        """Hold the hour against what guests noted, and forget it."""
        audit = Audit(self.there, self.calls, themes=TROUBLES)
        assert not list(audit.lies())
        for call in self.calls:
            self.told[call.headers.get("fc-error", str(call.status)) if not call.left else "left"] += 1
        self.calls.clear()
        self.there.journal.clear()
        self.there.events.clear()
        for machine in self.there.machines:
            del machine.processes[:-1]
            machine.process.vmm.journal.clear()

    def sizes(self) -> dict[str, int]:
        """How large everything is that could grow, and how many objects there are at all."""
        return dict(self._sizes())

    def _sizes(self) -> Iterator[tuple[str, int]]:
        there, loop = self.there, self.there.loop
        gc.collect()
        yield "objects", len(gc.get_objects())
        yield "tasks", len(asyncio.all_tasks())
        yield "timers", len(loop.timers())
        yield "connections", len(there.network.connections)
        yield "stories", len(self.stories._stories)
        yield "metrics", len(self.metrics.exposition().splitlines())
        yield "digests indexed", len(there.index._knowing)
        for machine in there.machines:
            node = machine.process.node
            yield f"{machine.node_id} workloads", len(node._hosting.hosted)
            yield f"{machine.node_id} records", sum(map(len, node._calls._buckets))
            yield f"{machine.node_id} queues", len(node._slots._queues)
            yield f"{machine.node_id} bases", len(node._bases._shelves) + len(machine.process.vmm.bases)
            yield f"{machine.node_id} hearers", len(node._hearers)
            yield f"{machine.node_id} guests", len(machine.process.vmm.alive)


def test_six_hours_of_a_fleet_leave_it_as_large_as_two_and_fair_to_everybody():
    """What is kept of calls, nodes and tables is bounded; whoever asks for little waits for turns, not for a flood."""

    async def main(dice: Random) -> Days:
        async with fleet(Design(table=table(0), machines=3, memory_mib=8192), dice) as there:
            days = Days(there, dice)
            sizes = []
            for hour in range(HOURS):
                await days.hour(hour)
                await asyncio.sleep(30.0)
                assert not await there.quiet()
                days.settle_accounts()
                sizes.append(days.sizes())
                assert len(there.catalog._remembered) <= MOST_REMEMBERED
            for what, size in sizes[-1].items():
                earlier = max(each[what] for each in sizes[1:3])
                slack = OBJECTS_SLACK if what == "objects" else earlier // 10 + 3
                assert size <= earlier + slack, f"{what} grow: {[each[what] for each in sizes]}"
        return days

    days = virtual_time.run(main, seed=1, passes_max=100_000_000).value
    assert days.told["200"] > 0.9 * (days.told.total() - days.told["left"])
    assert days.told.total() > HOURS * HOUR_S / BURST_EVERY_S * 2
    flood, modest = days.waits_ms["flood"], days.waits_ms["modest"]
    assert median(flood) > 800, "the flood did not fill the queues"
    assert max(modest) < median(flood), "a few calls wait as if they were part of the flood"
