"""From a running guest to a ready one: bounded attempts, no wait for the dead, and words for whoever gives up."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from fakes.vmm import At, FakeVmm, Faults, Latencies
from node.house import mint
from node.house import workload as workload_of
from simulation import virtual_time
from simulation.network import Network
from substrate_node.base import Bases
from substrate_node.ledger import Ledger
from substrate_node.ready import Contact, NotReady
from substrate_node.reaper import Reaper
from substrate_node.starter import Hosted, Starter, StartFailure
from substrate_node.vmm import Base, Guest
from substrate_seam.workload import Workload

OURS = workload_of("ours")
CUSTOM = workload_of("custom", ready_path="/up")
FOREIGN = workload_of("foreign", guest="go-shim")


class Ward:
    """A monitor and the clock."""

    def __init__(self, dice: Random, **options: Any) -> None:
        self.dice = dice
        self.faults = Faults(dice)
        self.vmm = FakeVmm(network=Network(dice), faults=self.faults, **options)
        self.loop = asyncio.get_running_loop()

    async def booted(self, workload: Workload) -> Guest:
        return await self.vmm.boot(workload, "g1", {})

    async def make_ready(self, workload: Workload, *, cap_s: float | None = None, restored: bool = False) -> float:
        """Seconds until the guest was ready."""
        contact = Contact(await self.booted(workload))
        began_s = self.loop.time()
        await contact.make_ready(workload, mint(self.dice), contact_cap_s=cap_s, restored=restored)
        return self.loop.time() - began_s


def simulated(story: Callable[[Ward], Awaitable[Any]], **options: Any) -> Any:
    async def main(dice: Random) -> Any:
        ward = Ward(dice, **options)
        try:
            return await story(ward)
        finally:
            for guest_id in tuple(ward.vmm.alive):
                await ward.vmm.discard(guest_id)

    return virtual_time.run(main, seed=1).value


def test_a_guest_of_ours_is_told_who_it_is():
    """Wall clock, fresh entropy, id, host name, boot id, and whether it is a clone; no two are alike."""

    async def story(ward: Ward) -> None:
        told = []
        for number, restored in enumerate((False, True)):
            guest = await ward.vmm.boot(OURS, f"g{number}", {})
            await Contact(guest).make_ready(OURS, mint(ward.dice), contact_cap_s=None, restored=restored)
            told.append(guest.told)
        first, second = told
        assert first["guest_id"] == first["hostname"] == "g0"
        assert (first["restored"], second["restored"]) == (False, True)
        assert len(base64.b64decode(first["entropy_b64"])) == 64
        assert first["entropy_b64"] != second["entropy_b64"]
        assert first["boot_id"] != second["boot_id"]
        assert first["epoch_ns"] == 1_700_000_000_000_000_000

    simulated(story)


def test_the_first_connection_after_a_restore_may_hang_for_ever():
    """Another one is made; it costs one attempt and a pause (lesson P-01), however the guest is spoken to."""

    async def story(ward: Ward, workload: Workload, cap_s: float | None) -> float:
        ward.faults.on(At.ACCEPTED, hang=True)
        return await ward.make_ready(workload, cap_s=cap_s, restored=True)

    assert simulated(lambda ward: story(ward, OURS, 0.03)) == pytest.approx(0.05, abs=0.02)
    assert simulated(lambda ward: story(ward, FOREIGN, None)) == pytest.approx(0.17, abs=0.02)


def test_a_patient_monitor_needs_one_connection():
    """It waits until the guest serves; nothing is asked before the identity is told."""

    async def story(ward: Ward) -> int:
        await ward.make_ready(OURS)
        return ward.vmm.network.connections_made

    assert simulated(story) == 1


def test_a_guest_that_is_slow_to_answer_is_met_with_patience():
    """Attempts grow longer, so that an endpoint that takes a second for its first answer is heard."""

    async def story(ward: Ward) -> float:
        ward.faults.on(At.READY, delay_s=1.0, times=None)
        return await ward.make_ready(FOREIGN)

    assert 1.0 < simulated(story) < 4.0


@pytest.mark.parametrize("workload", [CUSTOM, FOREIGN])
def test_a_ready_path_of_its_own_is_asked_on_the_data_port(workload: Workload):
    """Until it says 200."""

    async def story(ward: Ward) -> float:
        ward.faults.on(At.READY, fail="not yet", times=10)
        return await ward.make_ready(workload)

    assert 0.2 < simulated(story) < 0.4


@pytest.mark.parametrize("fault", [{"fail": "500"}, {"hang": True}])
def test_a_go_shim_that_cannot_set_its_clock_serves_all_the_same(fault: dict[str, Any]):
    """Best effort, and bounded: the real shim of old has no such endpoint."""

    async def story(ward: Ward) -> float:
        guest = await ward.booted(FOREIGN)
        dial, dials = guest.dial, []

        async def dial_clock_badly(protocol: Any) -> Any:
            dials.append(None)
            if len(dials) == 2:
                if "hang" in fault:
                    await asyncio.Future()
                raise ConnectionRefusedError
            return await dial(protocol)

        guest.dial = dial_clock_badly
        began_s = ward.loop.time()
        await Contact(guest).make_ready(FOREIGN, mint(ward.dice), contact_cap_s=None, restored=True)
        assert len(dials) == 2
        return ward.loop.time() - began_s

    assert simulated(story) < 1.0


@pytest.mark.parametrize("at", [At.ACCEPTED, At.CONNECTED, At.HEALTHZ, At.READY, At.RESTORED])
@pytest.mark.parametrize("workload", [OURS, CUSTOM, FOREIGN])
def test_nobody_waits_for_a_guest_that_has_died(workload: Workload, at: At):
    """Wherever it happens: the wait ends at once, with its end and its last words."""

    async def story(ward: Ward) -> None:
        guest = await ward.booted(workload)
        ward.faults.on(at, hang=True, times=None)
        contact = Contact(guest)
        making = ward.loop.create_task(
            contact.make_ready(workload, mint(ward.dice), contact_cap_s=0.03, restored=False)
        )
        reached = ward.loop.create_task(ward.faults.reached(at))
        await asyncio.wait({making, reached}, return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        if making.done():
            assert making.exception() is None, "this workload does not pass there"
            return
        died_s = ward.loop.time()
        guest.die("exit status 3", "kernel panic")
        with pytest.raises(NotReady):
            await making
        assert ward.loop.time() - died_s < 0.01, "a connect that is under way may end first"
        assert contact.words == "; it ended with exit status 3 after saying: kernel panic"

    simulated(story)


def test_a_guest_that_is_given_up_tells_what_its_console_said_last():
    """Last, where it is read, and the end of it."""

    async def story(ward: Ward) -> str:
        guest = await ward.booted(FOREIGN)
        guest.console = "booting\nno such interpreter\n"
        ward.faults.on(At.READY, fail="not yet", times=None)
        contact = Contact(guest)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await contact.make_ready(FOREIGN, mint(ward.dice), contact_cap_s=None, restored=False)
        return contact.words

    words = simulated(story)
    assert words == "; /shim/ready answered 503 after saying:\nbooting\nno such interpreter"


def started(fault: Callable[[Faults], None], workload: Workload, *, base: bool = False, **options: Any) -> str:
    """What is said of a start that fails."""

    async def story(ward: Ward) -> str:
        fault(ward.faults)
        reaper = Reaper(emit=lambda _: None)
        bases = Bases(
            ledger=Ledger(1000), mint=mint(ward.dice), reaper=reaper, emit=lambda _: None, build_within_s=10.0
        )
        starter = Starter(
            bases=bases, mint=mint(ward.dice), inbound=lambda *_: {}, boot_within_s=10.0, restore_within_s=2.0
        )
        source = Base(base_id="b0", input_key="k") if base else None
        if source:
            ward.vmm.bases["b0"] = source
        with pytest.raises(StartFailure) as failed:
            await starter.start(Hosted(workload, ward.vmm), source, "g1")
        await ward.vmm.discard("g1")
        return str(failed.value)

    return simulated(story, **options)


@pytest.mark.parametrize(
    ("workload", "base", "fault", "words"),
    [
        (OURS, False, lambda on: on(At.BOOT, fail="no /dev/kvm"), "boot: no /dev/kvm"),
        (OURS, True, lambda on: on(At.RESTORE, fail="bad snapshot"), "restore: bad snapshot"),
        (OURS, False, lambda on: on(At.BOOT, hang=True), "it was not ready within 10.0 s"),
        (OURS, True, lambda on: on(At.RESTORED, hang=True), "it was not ready within 2.0 s"),
        (OURS, False, lambda on: on(At.RESTORED, fail="no"), "/shim/restored answered 503: "),
        (OURS, False, lambda on: on(At.DIAL, fail="nobody listens"), "nobody listens"),
        (
            FOREIGN,
            False,
            lambda on: on(At.READY, fail="not yet", times=None),
            "it was not ready within 10.0 s; /shim/ready answered 503",
        ),
        (
            FOREIGN,
            True,
            lambda on: on(At.READY, hang=True, times=None),
            "it was not ready within 2.0 s; /shim/ready did not answer within 0.60 s",
        ),
        (
            FOREIGN,
            False,
            lambda on: on(At.READY, die=True),
            "the guest ended before it was ready; it ended with exit status 1",
        ),
    ],
)
def test_a_start_that_fails_says_how_far_it_came(workload: Workload, base: bool, fault: Any, words: str):
    """The verb that failed, or what the guest last said, or how it ended."""
    assert started(lambda faults: fault(faults.on), workload, base=base) == words


def test_a_guest_that_is_to_be_captured_must_be_warm_first():
    """The first 200 of its ready path, on the port where that is served."""

    async def story(ward: Ward, workload: Workload) -> float:
        began_s = ward.loop.time()
        await Contact(await ward.booted(workload)).wait_primed(workload)
        return ward.loop.time() - began_s

    for workload in (OURS, CUSTOM, FOREIGN):
        waited_s = simulated(lambda ward, it=workload: story(ward, it), latencies=Latencies(ready_after_s=3.0))
        assert 3.0 < waited_s < 3.3


def test_an_answer_without_end_is_not_waited_for():
    """64 KiB are enough for anybody's health."""

    async def story(ward: Ward) -> None:
        flood = b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 200_000
        ward.faults.on(At.RESTORED, say=flood, hang=True)
        contact = Contact(await ward.booted(OURS))
        with pytest.raises(NotReady, match="over 65536 bytes"):
            await contact.make_ready(OURS, mint(ward.dice), contact_cap_s=None, restored=False)

    simulated(story)
