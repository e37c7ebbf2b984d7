"""What our own code adds to a restore, and many clones at once, over the double of Firecracker.

The wait for the process and for each answer of its API is taken out: what is left is files, sockets, the start of a
process and the loop.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from bench.results import Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.servers import ROOT
from substrate_node.fcvm.api import Api
from substrate_node.fcvm.launcher import MicroVm
from substrate_node.vmm import Base

sys.path[:0] = [str(ROOT / "tests")]

from node.fcvm.rig import MicroVmRig, microvm_rig  # noqa: E402  # the double is the tests'
from node.vmm_contract import NOBODY  # noqa: E402  # as above

ABOUT = """
Restores one after another, without the time that only Firecracker's speed decides (`ours`) and with that of the double
(`whole`). Then as many at once.
"""
OURS, WHOLE, TOGETHER = "ours, ms", "whole, ms", "all, s"


class Waits:
    """How long the two things took that only Firecracker's speed decides."""

    seconds = 0.0


@contextmanager
def timed_waits() -> Iterator[Waits]:
    """Time them for the length of the block."""
    waits = Waits()
    verbs = [(owner, name, getattr(owner, name)) for owner, name in ((MicroVm, "reach"), (Api, "_answered"))]

    def timed(verb):
        async def timing(*args, **kwargs):
            began_s = time.perf_counter()
            try:
                return await verb(*args, **kwargs)
            finally:
                waits.seconds += time.perf_counter() - began_s

        return timing

    for owner, name, verb in verbs:
        setattr(owner, name, timed(verb))
    try:
        yield waits
    finally:
        for owner, name, verb in verbs:
            setattr(owner, name, verb)


def run(home: Path, size: Size) -> Outcome:
    notes = Notebook()
    uvloop.run(_measured(home, size, notes))
    return Outcome(
        SCENARIO.name,
        ABOUT.strip(),
        notes.rows(),
        [
            notes.figure("one restore: what is ours of it", "one", OURS),
            notes.figure(f"{size.clones} clones at once", "at once", TOGETHER),
        ],
    )


async def _measured(home: Path, size: Size, notes: Notebook) -> None:
    async with microvm_rig(home / "state") as rig:
        rig.workload = rig.of(rig.double.rootfs(argv=None))
        source = await rig.vmm.boot(rig.workload, "source", NOBODY)
        base = await rig.vmm.capture(rig.workload, source, "b1")
        await rig.vmm.discard("source")
        with timed_waits() as waits:
            for n in range(size.clones):
                await _one(rig, base, f"c{n}", waits, notes)
        for _ in range(min(size.repeats, 3)):
            await _at_once(rig, base, size.clones, notes)
        await rig.vmm.discard_base(base)


async def _one(rig: MicroVmRig, base: Base, guest_id: str, waits: Waits, notes: Notebook) -> None:
    waits.seconds, began_s = 0.0, time.perf_counter()
    await rig.vmm.restore(rig.workload, base, guest_id, NOBODY)
    took_s = time.perf_counter() - began_s
    notes.note("one", {OURS: (took_s - waits.seconds) * 1e3, WHOLE: took_s * 1e3})
    await rig.vmm.discard(guest_id)


async def _at_once(rig: MicroVmRig, base: Base, clones: int, notes: Notebook) -> None:
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as restores:
        for n in range(clones):
            restores.create_task(rig.vmm.restore(rig.workload, base, f"m{n}", NOBODY))
    notes.note("at once", {TOGETHER: time.perf_counter() - began_s})
    async with asyncio.TaskGroup() as ends:
        for n in range(clones):
            ends.create_task(rig.vmm.discard(f"m{n}"))


SCENARIO = Scenario("restore-microvm", run)
