"""Every monitor keeps the promises of `vmm_contract`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from random import Random

import pytest

from fakes.vmm import FakeGuest, FakeVmm, GuestAnswer, GuestCall
from node.procvm_rig import ProcessRig, clone_rig, process_rig
from node.vmm_contract import PROMISES, Promise
from real_parts import needs
from simulation import virtual_time
from simulation.network import Network
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload, WorkloadSpec

each_promise = pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)


class FakeRig:
    """The monitor in memory."""

    end_of_exit_3 = "exit status 3"

    def __init__(self, dice: Random) -> None:
        self.vmm = FakeVmm(network=Network(dice), behaviour=obedient)
        self.workload = Workload.of(WorkloadSpec(name="hello", command=("hello",)))
        jailed = WorkloadSpec(name="jailed", command=("hello",), isolation=Isolation.MICROVM_JAILED)
        self.refused = Workload.of(jailed)

    def left(self) -> Collection[str]:
        """Guests and bases."""
        return [*self.vmm.alive, *self.vmm.bases]


async def obedient(guest: FakeGuest, call: GuestCall) -> GuestAnswer:
    """Do what the contract asks of a guest."""
    verb, _, argument = call.target.removeprefix("/").partition("/")
    match verb:
        case "exit":
            guest.die(f"exit status {argument}")
        case "hang":
            await asyncio.Future()
        case "dial":
            return GuestAnswer(chunks=(await dial_out(guest, int(argument)),))
    return GuestAnswer(chunks=(b"hello",))


async def dial_out(guest: FakeGuest, port: int) -> bytes:
    """What the port of the host says first."""
    try:
        reader, writer = await guest.dial_out(port)
    except ConnectionRefusedError:
        return b"refused"
    greeting = await reader.read()
    writer.close()
    return greeting


@each_promise
def test_the_fake_keeps_the_contract(promise: Promise):
    """In virtual time, and nothing is left at its end."""

    async def main(dice: Random) -> Collection[str]:
        rig = FakeRig(dice)
        await promise(rig)
        return rig.left()

    assert not virtual_time.run(main, seed=1).value


RIGS = {"booted": process_rig, "cloned": clone_rig}
"""Guests with a program of their own, and guests that are clones of one on our shim."""


@pytest.fixture(params=RIGS)
async def rig(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[ProcessRig]:
    """The monitor of process guests."""
    async with RIGS[request.param](tmp_path / "run") as rig:
        yield rig


@needs("pidfd", "user-namespaces")
@each_promise
async def test_process_guests_keep_the_contract(promise: Promise, rig: ProcessRig):
    """On this host, with real processes; the rig asserts that nothing is left."""
    async with asyncio.timeout(60):
        await promise(rig)
