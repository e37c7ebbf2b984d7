"""Control groups of guests, the kernel's own: each bound holds, and of a group nothing is left."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from node.hostile import MEMORY_MIB, WITHIN_S, Attack, Stage, attacked, told, well
from real_parts import needs
from substrate_node.processes import cgroups
from substrate_node.processes.cgroups import ControlGroups
from substrate_node.vmm import Guest

pytestmark = needs("control-groups", "user-namespaces", "pidfd")

TASKS_MAX = 24


def counted(stage: Stage, guest: Guest, file: str) -> dict[str, int]:
    """What the kernel has counted in a file of a guest's group."""
    lines = (stage.rig.groups()[guest.guest_id] / file).read_text().splitlines()
    return {name: int(count) for name, count in map(str.split, lines)}


async def memory(stage: Stage) -> None:
    """A guest that takes more than its workload was given is killed as a whole; its neighbour is not."""
    guest, other = await stage.guest(), await stage.guest()
    group = stage.rig.groups()[guest.guest_id]
    assert int((group / "memory.max").read_text()) == (MEMORY_MIB + cgroups.OVERHEAD_MIB) << 20
    take = f"kept = bytearray({4 * MEMORY_MIB} << 20); kept[::4096] = b'x' * len(kept[::4096])"
    child = f"import subprocess, sys; told = subprocess.call([sys.executable, '-I', '-S', '-c', {take!r}])"
    assert await told(guest, child) is None, "its first process goes with the child that took too much"
    async with asyncio.timeout(WITHIN_S):
        assert (await asyncio.shield(guest.exited)).words == "killed by SIGKILL"
    assert counted(stage, guest, "memory.events")["oom_kill"] >= 1
    assert await well(other)


async def tasks(stage: Stage) -> None:
    """A guest gets no more processes and threads than its group may have."""
    guest = await stage.guest()
    forks = """
        import os, signal
        children = []
        try:
            while len(children) < 1000:
                children.append(os.fork())
                if not children[-1]:
                    signal.pause()
            told = "no bound"
        except BlockingIOError:
            told = len(children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        """
    assert 0 < await told(guest, forks) < TASKS_MAX
    assert counted(stage, guest, "pids.events")["max"] >= 1
    assert await well(guest)


async def processors(stage: Stage) -> None:
    """A guest has no more time of processors than its group may have, however many processes it computes with."""
    guest = await stage.guest()
    group = stage.rig.groups()[guest.guest_id]
    assert (group / "cpu.max").read_text() == f"{stage.rig.workload.spec.vcpus * 100_000} 100000\n"
    (group / "cpu.max").write_text("20000 100000")  # which a machine of one processor can tell from no bound
    before = counted(stage, guest, "cpu.stat")
    took_s = await told(
        guest,
        """
        import os, time
        began = time.monotonic()
        for _ in range(3):
            if not os.fork():
                while time.monotonic() < began + 1:
                    pass
                os._exit(0)
        for _ in range(3):
            os.wait()
        told = time.monotonic() - began
        """,
    )
    after = counted(stage, guest, "cpu.stat")
    used_s = (after["usage_usec"] - before["usage_usec"]) / 1e6
    assert after["nr_throttled"] > before["nr_throttled"]
    assert used_s < 0.2 * took_s + 0.1, (used_s, took_s)


async def peak(stage: Stage) -> None:
    """What a guest says it has used is at least what it began with, and what a process took that has ended."""
    guest = await stage.guest()
    began_with_mib = guest.sample().peak_mib
    assert began_with_mib is not None
    assert began_with_mib > 8, "an interpreter"
    take = "kept = bytearray(40 << 20); kept[::4096] = b'x' * len(kept[::4096])"
    child = f"import subprocess, sys; told = subprocess.call([sys.executable, '-I', '-S', '-c', {take!r}])"
    assert await told(guest, child) == 0
    used_mib = guest.sample().peak_mib
    assert used_mib is not None
    assert 40 < used_mib < MEMORY_MIB + cgroups.OVERHEAD_MIB


@pytest.mark.parametrize("cloned", [False, True], ids=["booted", "cloned"])
@pytest.mark.parametrize("bound", [memory, tasks, processors, peak], ids=lambda bound: bound.__name__)
async def test_each_bound_of_a_guests_group_holds(
    bound: Attack, cloned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of memory, of tasks and of processors; the group is gone with the guest, which its stage and rig see to."""
    monkeypatch.setattr(cgroups, "TASKS_MAX", TASKS_MAX)
    await attacked(bound, tmp_path / "run", cloned=cloned)


async def test_a_base_has_room_for_all_the_clones_that_live(tmp_path: Path):
    """What they take until they are in groups of their own stays in that of their base: it ran over with 24 of them."""

    async def crowd(stage: Stage) -> None:
        guests = [await stage.guest() for _ in range(40)]
        assert counted(stage, guests[0], "memory.events")["oom_kill"] == 0
        assert await well(guests[-1])

    await attacked(crowd, tmp_path / "run", cloned=True)


def test_a_group_is_removed_with_what_still_runs_in_it(tmp_path: Path):
    """What an earlier daemon left has not ended yet when it is killed: the kernel takes its time."""
    groups = ControlGroups.ready(f"fc-invoke-test-{tmp_path.name}")
    sleepers = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]) for _ in range(8)]
    groups.hold("g1", memory_mib=64, cpus=1)
    for sleeper in sleepers:
        groups.enter("g1", sleeper.pid)
    groups.sweep()
    assert [sleeper.wait(WITHIN_S) for sleeper in sleepers] == [-9] * 8
    groups.close()
