"""What our own code adds to a restore, and a hundred clones at once, over the double of Firecracker.

`uv run python bench/restore_microvm.py [ROUNDS] [CLONES]`. The wait for the process and for each answer of its API is
taken out: what is left is files, sockets, the start of a process and the loop.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from substrate_node.fcvm.api import Api
from substrate_node.fcvm.launcher import MicroVm
from substrate_node.vmm import Base

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from node.fcvm.rig import MicroVmRig, microvm_rig  # noqa: E402  # the double is the tests'
from node.vmm_contract import NOBODY  # noqa: E402  # as above


class Waits:
    """Times the two things that only Firecracker's speed decides."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, name in ((MicroVm, "reach"), (Api, "_answered")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, verb):
        async def timed(*args, **kwargs):
            began_s = time.perf_counter()
            try:
                return await verb(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began_s

        return timed


async def one_after_another(rig: MicroVmRig, base: Base, rounds: int, waits: Waits) -> None:
    """The overhead of single restores."""
    overheads_ms, whole_ms = [], []
    for n in range(rounds):
        waits.seconds, began_s = 0.0, time.perf_counter()
        await rig.vmm.restore(rig.workload, base, f"c{n}", NOBODY)
        took_s = time.perf_counter() - began_s
        overheads_ms.append((took_s - waits.seconds) * 1e3)
        whole_ms.append(took_s * 1e3)
        await rig.vmm.discard(f"c{n}")
    for what, values in (("ours", overheads_ms), ("whole", whole_ms)):
        p90 = statistics.quantiles(values, n=10)[8]
        print(f"restore, {what:5}: p50 {statistics.median(values):6.2f} ms  p90 {p90:6.2f} ms  ({rounds} rounds)")


async def at_once(rig: MicroVmRig, base: Base, clones: int) -> None:
    """Many restores together."""
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as restores:
        for n in range(clones):
            restores.create_task(rig.vmm.restore(rig.workload, base, f"m{n}", NOBODY))
    print(f"{clones} clones at once: {time.perf_counter() - began_s:.2f} s")
    async with asyncio.TaskGroup() as ends:
        for n in range(clones):
            ends.create_task(rig.vmm.discard(f"m{n}"))


async def main(rounds: int, clones: int) -> None:
    """Measure both."""
    with tempfile.TemporaryDirectory() as root:
        async with microvm_rig(Path(root) / "state") as rig:
            rig.workload = rig.of(rig.double.rootfs(argv=None))
            source = await rig.vmm.boot(rig.workload, "source", NOBODY)
            base = await rig.vmm.capture(rig.workload, source, "b1")
            await rig.vmm.discard("source")
            await one_after_another(rig, base, rounds, Waits())
            await at_once(rig, base, clones)
            await rig.vmm.discard_base(base)


if __name__ == "__main__":
    rounds, clones = [*map(int, sys.argv[1:]), *(50, 100)[len(sys.argv) - 1 :]]
    uvloop.run(main(rounds, clones))
