"""The same promises, kept by real microVMs: `pytest -m firecracker`."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from node.fcvm.real import BOOTS_WITHIN_S, guest_rootfs, jails, real_rig, rules
from node.vmm_contract import NOBODY, PROMISES, Greeter, Promise, ask
from substrate_node.node import LocalNode, NodeIdentity, NodeTimes
from substrate_node.ready import Contact, IdentityMint
from substrate_seam.events import BaseBuilt, Event
from substrate_seam.invocation import Demands, GuestRequest, Invocation, Start

LOST_NS_MAX = 1.5e9
"""So long an emulated guest may take to read what it is told. A clone that was not told lost 2 s."""

pytestmark = pytest.mark.firecracker


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guest's, made once."""
    rules()
    return guest_rootfs(tmp_path_factory.mktemp("rootfs"))


@pytest.mark.parametrize("jail", jails())
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
async def test_real_microvms_keep_the_contract(promise: Promise, jail: Literal["on", "off"], rootfs, tmp_path: Path):
    """Jailed too, for root."""
    async with real_rig(tmp_path, rootfs, jail=jail) as rig, asyncio.timeout(BOOTS_WITHIN_S):
        await promise(rig)


@pytest.mark.parametrize("jail", jails())
async def test_clones_of_one_base_are_told_apart_in_every_way(jail: Literal["on", "off"], rootfs, tmp_path: Path):
    """P-09, P-10: entropy, name and clock are each clone's own before it is asked for anything."""
    async with real_rig(tmp_path, rootfs, jail=jail) as rig, asyncio.timeout(BOOTS_WITHIN_S):
        source = await rig.vmm.boot(rig.workload, "source", NOBODY)
        base = await rig.vmm.capture(rig.workload, source, "b1")
        await rig.vmm.discard("source")
        await asyncio.sleep(2)  # which the clones must not have missed
        seen = []
        for n in range(4):
            clone = await rig.plain_vmm.restore(rig.workload, base, f"c{n}", {1025: Greeter})
            mint = IdentityMint(wall_ns=time.time_ns, entropy=os.urandom)
            await Contact(clone).make_ready(rig.workload, mint, contact_cap_s=rig.vmm.contact_cap_s, restored=True)
            asked_ns = time.time_ns()
            _, said = await ask(clone, "/see/")
            seen.append(json.loads(said))
            assert asked_ns - LOST_NS_MAX < seen[-1]["epoch_ns"] < time.time_ns() + LOST_NS_MAX
            assert await ask(clone, "/dial/1025") == (200, b"welcome")
        assert len({clone["urandom"] for clone in seen}) == 4
        assert {clone["hostname"] for clone in seen} == {f"c{n}" for n in range(4)}
        assert all(clone["root"] for clone in seen), "P-16: the root is read-only"
        for n in range(4):
            await rig.vmm.discard(f"c{n}")
        await rig.vmm.discard_base(base)


async def test_a_node_starts_real_guests_cold_and_warm(rootfs, tmp_path: Path):
    """From the first call to a base that a second daemon could adopt."""
    events: list[Event] = []
    built = asyncio.Event()

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, BaseBuilt):
            built.set()

    async with real_rig(tmp_path, rootfs, jail=jails()[-1]) as rig, asyncio.timeout(BOOTS_WITHIN_S):
        async with LocalNode(
            NodeIdentity(node_id="n1", boot_id="b1", arch="amd64"),
            vmms=[rig.plain_vmm],
            memory_mib=2048,
            mint=IdentityMint(wall_ns=time.time_ns, entropy=os.urandom),
            emit=emit,
            times=NodeTimes(boot_within_s=BOOTS_WITHIN_S, restore_within_s=60.0),
        ) as node:
            await node.ensure(rig.workload)
            await built.wait()
            call = Invocation(
                id=f"{1:032x}",
                attempt=1,
                workload=rig.workload.ref,
                session=None,
                caller="anna",
                demands=Demands(start=Start.WARM),
                request=GuestRequest("POST", "/invoke", (), b"x" * 100_000),
                start_within_s=60.0,
                run_within_s=60.0,
            )
            async with node.invoke(call) as reply:
                assert b"".join([piece async for piece in reply.body]) == b"hello"
            assert reply.started.start is Start.WARM
            assert reply.receipt.peak_mib > 0
        base = await rig.vmm.adopt(rig.workload)
        assert base is not None
        await rig.vmm.discard_base(base)
