"""The monitor in memory fails where it is told to, and only there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from fakes.vmm import At, FakeVmm, Faults
from node.vmm_contract import NOBODY, Answer, ask
from simulation import virtual_time
from simulation.network import Network
from substrate_node.vmm import CONTROL_PORT, DATA_PORT, Base, Guest, VmmError
from substrate_seam.workload import Workload, WorkloadSpec

WORKLOAD = Workload.of(WorkloadSpec(name="echo", command=("echo",)))

EXCHANGE = (At.ACCEPTED, At.CONNECTED, At.REQUEST, At.BEFORE_HEAD, At.WITHIN_HEAD, At.AFTER_HEAD, At.MID_BODY)
JOURNALLED = (At.BEFORE_HEAD, At.WITHIN_HEAD, At.AFTER_HEAD, At.MID_BODY)


def simulated(story: Callable[[FakeVmm], Awaitable[Any]], *, seed: int = 1) -> Any:
    """Run a story on a fresh fake in virtual time, and check that it leaves nothing."""

    async def main(dice: Random) -> Any:
        vmm = FakeVmm(network=Network(dice), faults=Faults(dice))
        result = await story(vmm)
        assert not vmm.alive
        return result

    return virtual_time.run(main, seed=seed).value


@pytest.mark.parametrize("effect", ["fail", "die"])
@pytest.mark.parametrize("at", EXCHANGE)
def test_an_exchange_breaks_where_it_is_told_to(at: At, effect: str):
    """The reply is not whole, and the journal tells whether the workload had begun to act."""

    async def story(vmm: FakeVmm) -> None:
        vmm.faults.on(at, fail="broken") if effect == "fail" else vmm.faults.on(at, die=True)
        guest = await vmm.boot(WORKLOAD, "g1", NOBODY)
        assert await ask(guest, "/") == (0, b"")
        assert guest.exited.done() == (effect == "die")
        assert vmm.journal == ([("", 0)] if at in JOURNALLED else [])
        await vmm.discard("g1")

    simulated(story)


@pytest.mark.parametrize("at", EXCHANGE)
def test_a_hanging_exchange_ends_with_its_guest(at: At):
    """Nothing more is said, until the guest is killed."""

    async def story(vmm: FakeVmm) -> None:
        vmm.faults.on(at, hang=True)
        guest = await vmm.boot(WORKLOAD, "g1", NOBODY)
        answer = await guest.dial(lambda: Answer(DATA_PORT, "/"))
        await vmm.faults.reached(at)
        await asyncio.sleep(3600)
        assert not answer.lost.done()
        guest.kill()
        await answer.lost
        await vmm.discard("g1")

    simulated(story)


def killing(guest: Guest) -> Callable[[], Awaitable[None]]:
    """Kill a guest and wait until it is gone, as the other verbs wait."""

    async def kill() -> None:
        guest.kill()
        await asyncio.wait({guest.gone})

    return kill


@pytest.mark.parametrize("at", [At.BOOT, At.RESTORE, At.CAPTURE, At.ADOPT, At.KILL, At.DISCARD, At.DISCARD_BASE])
def test_a_verb_fails_as_often_as_it_is_told_to(at: At):
    """Once, then all goes well; what was begun stays until it is discarded."""

    async def story(vmm: FakeVmm) -> None:
        vmm.bases["b0"] = Base(base_id="b0", input_key=WORKLOAD.digest)
        guest = await vmm.boot(WORKLOAD, "g1", NOBODY)
        verbs = {
            At.BOOT: lambda: vmm.boot(WORKLOAD, "g2", NOBODY),
            At.RESTORE: lambda: vmm.restore(WORKLOAD, vmm.bases["b0"], "g2", NOBODY),
            At.CAPTURE: lambda: vmm.capture(WORKLOAD, guest, "b1"),
            At.ADOPT: lambda: vmm.adopt(WORKLOAD),
            At.KILL: killing(guest),
            At.DISCARD: lambda: vmm.discard("g1"),
            At.DISCARD_BASE: lambda: vmm.discard_base(vmm.bases["b0"]),
        }
        vmm.faults.on(at, fail="out of luck")
        with pytest.raises(VmmError, match="out of luck"):
            await verbs[at]()
        if at in {At.BOOT, At.RESTORE}:
            assert "g2" in vmm.alive
            await vmm.discard("g2")
        await verbs[at]()
        for guest_id in tuple(vmm.alive):
            await vmm.discard(guest_id)

    simulated(story)


def test_a_dial_can_be_refused_and_control_can_say_not_yet():
    """A refused dial is an `OSError`; a control request that fails is a 503."""

    async def story(vmm: FakeVmm) -> None:
        guest = await vmm.boot(WORKLOAD, "g1", NOBODY)
        vmm.faults.on(At.DIAL, fail="refused")
        vmm.faults.on(At.READY, fail="not yet", times=2)
        with pytest.raises(ConnectionRefusedError):
            await guest.dial(lambda: Answer(DATA_PORT, "/"))
        statuses = [(await ask(guest, "/shim/ready", port=CONTROL_PORT))[0] for _ in range(3)]
        assert statuses == [503, 503, 200]
        await vmm.discard("g1")

    simulated(story)


def test_a_guest_can_say_anything_by_hand():
    """Bytes are said in place of what would have come, or before it."""

    async def story(vmm: FakeVmm) -> None:
        vmm.faults.on(At.BEFORE_HEAD, say=b"HTTP/1.1 999 Nonsense\r\n", close=True, delay_s=2.0)
        guest = await vmm.boot(WORKLOAD, "g1", NOBODY)
        answer = await guest.dial(lambda: Answer(DATA_PORT, "/"))
        await answer.lost
        await vmm.discard("g1")
        assert answer.received == b"OK 1073741824\nHTTP/1.1 999 Nonsense\r\n"

    simulated(story)


def test_random_faults_replay_from_their_seed():
    """The same dice, the same accidents; other dice, others."""

    async def story(vmm: FakeVmm) -> list[int]:
        for at in EXCHANGE:
            vmm.faults.on(at, fail="accident", chance=0.1, times=None)
        guest = await vmm.boot(WORKLOAD, "g1", NOBODY)
        statuses = [(await ask(guest, "/"))[0] for _ in range(30)]
        await vmm.discard("g1")
        return statuses

    first, again, other = (simulated(story, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert {0, 200} == set(first)
