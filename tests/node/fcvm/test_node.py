"""A whole node over microVMs: cold, warm and parked starts, the truth about failures, and what a killed daemon left."""

# A test may start a process while nothing else runs.
# ruff: noqa: ASYNC220

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from random import Random

import pytest

from node.fcvm.rig import Double, MicroVmRig, microvm_rig
from node.vmm_contract import NOBODY, ask
from real_parts import is_full, needs
from substrate_node.clones import CLOCK_MS_MAX, verify_clones
from substrate_node.fcvm import outfitted
from substrate_node.node import LocalNode, NodeIdentity, NodeTimes
from substrate_node.ready import IdentityMint
from substrate_seam.errors import GuestFailed, GuestUnavailable, Ran
from substrate_seam.events import BaseAdopted, BaseBuilt, BaseCondemned, Event, GuestParked, StartFailed
from substrate_seam.invocation import Demands, GuestRequest, Invocation, Isolation, Reply, Start
from substrate_seam.workload import Workload

TESTS = Path(__file__).parents[2]
WITHIN_S = 30.0


class Bench:
    """A node, what it told, and calls of it."""

    node: LocalNode

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ids = count(1)
        self._told = asyncio.Event()

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self._told.set()

    def invocation(self, work: Workload, body: bytes, demands: Demands | None = None) -> Invocation:
        return Invocation(
            id=f"{next(self._ids):032x}",
            attempt=1,
            workload=work.ref,
            session=None,
            caller="anna",
            demands=demands or Demands(),
            request=GuestRequest("POST", "/invoke", (), body),
            start_within_s=WITHIN_S,
            run_within_s=WITHIN_S,
        )

    async def call(self, work: Workload, body: bytes = b"hi", *, start: Start | None = None) -> tuple[Reply, bytes]:
        """Make a call and read all of its answer."""
        demands = Demands(start=start) if start else None
        async with asyncio.timeout(WITHIN_S), self.node.invoke(self.invocation(work, body, demands)) as reply:
            return reply, b"".join([piece async for piece in reply.body])

    async def until(self, kind: type[Event]) -> None:
        """Wait until an event of a kind was told."""
        async with asyncio.timeout(WITHIN_S):
            while not any(isinstance(event, kind) for event in self.events):
                self._told.clear()
                await self._told.wait()


@asynccontextmanager
async def bench(rig: MicroVmRig) -> AsyncIterator[Bench]:
    """A node for the length of the block; bases stay, as they do when a daemon ends."""
    here = Bench()
    async with LocalNode(
        NodeIdentity(node_id="n1", boot_id="b1", arch="amd64"),
        vmms=[rig.vmm],
        memory_mib=4096,
        mint=IdentityMint(wall_ns=time.time_ns, entropy=os.urandom),
        emit=here.emit,
        times=NodeTimes(boot_within_s=WITHIN_S, restore_within_s=WITHIN_S),
    ) as here.node:
        yield here
    assert not list(rig.run.iterdir())


def shim(rig: MicroVmRig, **members: object) -> Workload:
    """A workload whose guest is our shim with the echo workload."""
    argv = [sys.executable, "-m", "substrate_guest", "serve", "substrate_guest.workloads.echo:app"]
    return rig.of(rig.double.rootfs("echo.ext4", argv=argv, cwd="/"), name="echo", **members)


async def forget_bases(rig: MicroVmRig) -> None:
    """Remove them, so that a rig finds nothing left."""
    await rig.vmm.sweep_bases(now_s=time.time() + 1e9)


@pytest.mark.parametrize("jail", ["off", pytest.param("on", marks=needs("root"))])
async def test_a_workload_starts_cold_then_warm_then_parked(jail: str, tmp_path: Path):
    """Each faster than the one before, and each said to be what it was."""
    async with microvm_rig(tmp_path, jail=jail) as rig:
        async with bench(rig) as here:
            work = shim(rig)
            await here.node.ensure(work)
            reply, body = await here.call(work)
            assert (reply.status, body, reply.started.start) == (200, b"hi", Start.COLD)
            assert reply.started.isolation is (Isolation.MICROVM_JAILED if jail == "on" else Isolation.MICROVM)
            assert reply.receipt.cpu_ms > 0
            await here.until(BaseBuilt)
            reply, body = await here.call(work)
            assert (body, reply.started.start) == (b"hi", Start.WARM)
            assert reply.started.base
            parked = shim(rig, pool=1)
            await here.node.ensure(parked)
            await here.until(GuestParked)
            reply, body = await here.call(parked, start=Start.POOL)
            assert (body, reply.started.start) == (b"hi", Start.POOL)
        await forget_bases(rig)


async def test_clones_of_a_microvm_are_compared_too(tmp_path: Path):
    """The double has each draw for itself, and no kernel of its own: what all have of the host's is found."""
    async with microvm_rig(tmp_path) as rig:
        async with bench(rig) as here:
            report = await verify_clones(here.node, shim(rig, warm_base=False), clones=5, wall_ns=time.time_ns)
        shared = {fact: count for fact, count in report.shared.items() if count and fact != "machine_id"}
        assert shared == {"hostname": 4, "boot_id": 4}
        assert report.clock_ms <= CLOCK_MS_MAX
        assert not report.good
        await forget_bases(rig)


async def test_a_second_daemon_adopts_the_base_of_the_first_without_a_boot(tmp_path: Path):
    """Its first call is a warm one."""
    async with microvm_rig(tmp_path) as rig:
        async with bench(rig) as first:
            await first.node.ensure(shim(rig))
            await first.until(BaseBuilt)
        boots = rig.double.calls().count("PUT /boot-source")
        async with bench(rig) as second:
            work = shim_again(rig)
            await second.node.ensure(work)
            await second.until(BaseAdopted)
            reply, _ = await second.call(work, start=Start.WARM)
            assert reply.started.start is Start.WARM
        assert rig.double.calls().count("PUT /boot-source") == boots
        await forget_bases(rig)


def shim_again(rig: MicroVmRig) -> Workload:
    """The same workload, whose root file system is there already."""
    return rig.of(rig.double.root / "echo.ext4", name="echo")


async def test_bases_are_condemned_by_restores_that_fail_and_callers_notice_nothing(tmp_path: Path):
    """P-05, P-12: each falls through to a cold boot, nothing runs twice, and the base is built anew beside."""
    async with microvm_rig(tmp_path) as rig:
        async with bench(rig) as here:
            work = shim(rig)
            await here.node.ensure(work)
            await here.until(BaseBuilt)
            rig.double.set({"on": "PUT /snapshot/load", "do": "die", "code": 1, "times": 3})
            here.events.clear()
            for _ in range(3):
                reply, body = await here.call(work)
                assert (body, reply.started.start) == (b"hi", Start.COLD)
            assert sum(isinstance(event, StartFailed) for event in here.events) == 3
            await here.until(BaseCondemned)
            await here.until(BaseBuilt)
            reply, _ = await here.call(work)
            assert reply.started.start is Start.WARM
        await forget_bases(rig)


async def test_a_machine_that_dies_under_a_call_is_the_calls_end_and_not_the_bases(tmp_path: Path):
    """P-03, P-05, P-06: it may have run, so nobody runs it again; the base goes on serving."""
    async with microvm_rig(tmp_path) as rig:
        async with bench(rig) as here:
            work = rig.of(rig.double.rootfs("dies.ext4"), name="dies", guest="go-shim", ready_path="/")
            await here.node.ensure(work)
            await here.until(BaseBuilt)
            invocation = here.invocation(work, b"")
            deadly = Invocation(
                **{
                    **{name: getattr(invocation, name) for name in invocation.__struct_fields__},
                    "request": GuestRequest("POST", "/exit/3", (), b""),
                }
            )
            with pytest.raises(GuestFailed) as caught:
                async with here.node.invoke(deadly):
                    pytest.fail("there is no reply")
            assert caught.value.ran is Ran.MAYBE
            assert "the guest rebooted or shut down" in caught.value.message
            reply, _ = await here.call(work)
            assert reply.started.start is Start.WARM
        await forget_bases(rig)


async def test_a_boot_that_cannot_be_is_the_truth_to_the_caller(tmp_path: Path):
    """Nothing ran, and why."""
    async with microvm_rig(tmp_path) as rig:
        rig.double.set({"on": "PUT /actions", "do": "fail", "message": "Start microvm error: no"})
        async with bench(rig) as here:
            work = shim(rig, warm_base=False)
            await here.node.ensure(work)
            with pytest.raises(GuestUnavailable) as caught:
                await here.call(work)
            assert caught.value.ran is Ran.NO
            assert "Start microvm error: no" in caught.value.message


async def test_clones_of_one_base_differ(tmp_path: Path):
    """P-10: each is told who it is before any caller's byte reaches it."""
    async with microvm_rig(tmp_path) as rig:
        async with bench(rig) as here:
            probe = tmp_path / "probe.py"
            probe.write_text(PROBE)
            argv = [sys.executable, "-m", "substrate_guest", "serve", "probe:app", "--chdir", str(tmp_path)]
            rootfs = rig.double.rootfs("probe.ext4", argv=argv, cwd="/")
            work = rig.of(rootfs, name="probe", concurrency=4)
            await here.node.ensure(work)
            await here.until(BaseBuilt)
            async with asyncio.TaskGroup() as callers:
                calls = [callers.create_task(here.call(work)) for _ in range(8)]
            seen = [json.loads(call.result()[1]) for call in calls]
            assert {call.result()[0].started.start for call in calls} == {Start.WARM}
            for what in ("random", "urandom", "uuid4", "hostname", "boot_id"):
                assert len({clone[what] for clone in seen}) == len(seen), what
            for clone in seen:
                assert abs(clone["epoch_ns"] - time.time_ns()) < 60e9
        await forget_bases(rig)


PROBE = """
import os, random, time, uuid
from substrate_guest import App
told = {}
random.random()  # what a clone would share
def probe(request):
    return {
        "random": random.random(), "urandom": os.urandom(8).hex(), "uuid4": str(uuid.uuid4()),
        "hostname": told["identity"].hostname, "boot_id": told["identity"].boot_id,
        "epoch_ns": told["identity"].epoch_ns,
    }
app = App(probe, restored=[lambda identity: told.update(identity=identity)])
"""


# What a killed daemon left.


@pytest.mark.parametrize("jail", ["off", pytest.param("on", marks=needs("root"))])
@pytest.mark.parametrize("seed", range(20 if is_full() else 2))
async def test_a_daemon_killed_anywhere_leaves_nothing_that_the_next_does_not_clear(
    seed: int, jail: str, tmp_path: Path
):
    """P-14, P-27: machines of it are gone, half-made bases too, and a base that was finished is adopted as it is."""
    dice = Random(seed)
    (tmp_path / "state").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "node.fcvm.daemon", tmp_path / "state", tmp_path / "bin", jail],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    )
    said = [process.stdout.readline().strip() for _ in range(dice.randint(1, 6))]
    await asyncio.sleep(dice.uniform(0, 0.15))
    process.kill()
    said += process.communicate()[0].split()
    assert "booted" in said
    double = Double(tmp_path / "bin")
    async with outfitted(double.rules(jail=jail)) as outfit:
        rig = MicroVmRig(tmp_path / "state", outfit, double)
        orphans = await rig.vmm.sweep()
        assert await rig.vmm.sweep_bases(now_s=time.time()) == []
        assert not processes_of(tmp_path / "bin")
        assert not list(rig.run.iterdir())
        assert not [path for path in double.cgroups.glob("*/*") if path.is_dir()]
        assert any(orphan.pid for orphan in orphans) or "restored" not in said
        base = await rig.vmm.adopt(rig.workload)
        assert base is not None or "captured" not in said
        if base is not None:
            boots = double.calls().count("PUT /boot-source")
            clone = await rig.vmm.restore(rig.workload, base, "c", NOBODY)
            assert await ask(clone, "/") == (200, b"hello")
            await rig.vmm.discard("c")
            assert double.calls().count("PUT /boot-source") == boots


def processes_of(doubles: Path) -> list[str]:
    """The processes of these doubles that still run."""
    found = []
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit():
            try:
                command = (proc / "cmdline").read_bytes()
            except OSError:
                continue
            if str(doubles).encode() in command:
                found.append(f"{proc.name} {command!r}")
    return found


async def test_a_process_that_only_looks_like_one_of_ours_is_left_alone(tmp_path: Path):
    """Ours is what works in a guest's directory and was started with that guest's id: both."""
    async with microvm_rig(tmp_path) as rig:
        home = rig.run / "g1"
        home.mkdir()
        (home / "microvm").touch()
        argv = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
        with (
            subprocess.Popen([*argv], cwd=home, stdin=-1, stdout=-1) as visitor,
            subprocess.Popen([*argv, "--id", "g1"], cwd=tmp_path, stdin=-1, stdout=-1) as namesake,
        ):
            for process in (visitor, namesake):
                assert process.stdout.readline() == b"up\n"
            (orphan,) = await rig.vmm.sweep()
            assert (orphan.guest_id, orphan.pid) == ("g1", None)
            for process in (visitor, namesake):
                process.communicate()
                assert process.returncode == 0
        assert not home.exists()
