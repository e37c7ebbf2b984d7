"""What every `Vmm` promises, as functions to be run on each of them; `PROMISES` lists them.

A `Rig` brings the monitor, and a workload whose guest answers on the data port: `/` with `hello`, `/exit/3` by ending
with that status, `/dial/1025` with what the host's port sent first, or with `refused`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Protocol, cast

import pytest

from substrate_node.vmm import CONTROL_PORT, DATA_PORT, Guest, Inbound, Vmm
from substrate_seam.http1 import ReplyReader
from substrate_seam.workload import Workload

WITHIN_S = 20.0


class Rig(Protocol):
    """A monitor on some host, a workload that it can run, one that it cannot, and how it calls the end of `/exit/3`."""

    vmm: Vmm
    workload: Workload
    refused: Workload
    end_of_exit_3: str

    def left(self) -> Collection[str]:
        """Name everything that is on the host because of this monitor."""
        ...


class Answer(asyncio.Protocol):
    """Sends one request through the hybrid vsock and collects what comes back until the connection is lost."""

    def __init__(self, port: int, target: str) -> None:
        self.received = b""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = f"CONNECT {port}\nGET {target} HTTP/1.1\r\nHost: vsock\r\nConnection: close\r\n\r\n".encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)  # uvloop's transports are asyncio's by duck typing

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, _error: Exception | None) -> None:
        self.lost.set_result(None)


class Greeter(asyncio.Protocol):
    """Greets a guest that dials out."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(b"welcome")
        transport.close()


NOBODY: Inbound = {}


async def ask(guest: Guest, target: str, *, port: int = DATA_PORT) -> tuple[int, bytes]:
    """Make one exchange; (0, b"") when the guest closed without answering CONNECT."""
    async with asyncio.timeout(WITHIN_S):
        answer = await guest.dial(lambda: Answer(port, target))
        await answer.lost
    ok, _, reply = answer.received.partition(b"\n")
    if not ok.startswith(b"OK "):
        return 0, b""
    reader = ReplyReader()
    body = b"".join(reader.feed(reply))
    return (reader.status, body) if reader.complete else (0, b"")


async def until_ready(guest: Guest) -> None:
    """Ask on the control port until the guest says that it is primed."""
    async with asyncio.timeout(WITHIN_S):
        while (await ask(guest, "/shim/ready", port=CONTROL_PORT))[0] != 200:
            await asyncio.wait({guest.exited}, timeout=0.01)


async def it_boots_a_guest_that_serves_control_and_data(rig: Rig) -> None:
    """One connection is one exchange, on either port."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert guest.guest_id == "g1"
    assert (await ask(guest, "/shim/healthz", port=CONTROL_PORT))[0] == 200
    assert await ask(guest, "/") == (200, b"hello")
    await rig.vmm.discard("g1")


async def a_port_that_nobody_serves_is_closed(rig: Rig) -> None:
    """The guest hangs up instead of answering `OK`."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert await ask(guest, "/", port=77) == (0, b"")
    assert await ask(guest, "/") == (200, b"hello")
    await rig.vmm.discard("g1")


async def killing_is_told_and_final(rig: Rig) -> None:
    """`exited` says how it ended, a second kill succeeds, and nobody can connect any more."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert not guest.exited.done()
    guest.kill()
    async with asyncio.timeout(WITHIN_S):
        await asyncio.wait({guest.gone})
    assert guest.exited.result().words == "killed by SIGKILL"
    guest.kill()
    with pytest.raises(OSError):  # noqa: PT011  # which one depends on the host
        await guest.dial(lambda: Answer(DATA_PORT, "/"))
    await rig.vmm.discard("g1")


async def a_guest_that_ends_by_itself_is_told(rig: Rig) -> None:
    """Its waiter hears at once, in words, and its caller loses the connection."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert await ask(guest, "/exit/3") == (0, b"")
    async with asyncio.timeout(WITHIN_S):
        assert (await asyncio.shield(guest.exited)).words == rig.end_of_exit_3
    assert rig.left(), "the remains of a guest stay until it is discarded"
    await rig.vmm.discard("g1")


async def killing_cuts_an_exchange_short(rig: Rig) -> None:
    """The connection to a guest does not outlive it."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    answer = await guest.dial(lambda: Answer(DATA_PORT, "/hang"))
    guest.kill()
    async with asyncio.timeout(WITHIN_S):
        await answer.lost
    await rig.vmm.discard("g1")


async def discarding_is_idempotent(rig: Rig) -> None:
    """Nothing is left after the first time, and discarding what is gone, or never was, succeeds."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert rig.left()
    for guest_id in ("g1", "g1", "never-was"):
        await rig.vmm.discard(guest_id)
    assert not rig.left()
    assert guest.exited.done()


async def an_id_can_be_used_again_after_discarding(rig: Rig) -> None:
    """Nothing of the first guest of that name is in the way of the second."""
    for _ in range(2):
        guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
        assert await ask(guest, "/") == (200, b"hello")
        await rig.vmm.discard("g1")


async def guests_live_and_die_apart(rig: Rig) -> None:
    """The end of one is not the end of another."""
    one = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    other = await rig.vmm.boot(rig.workload, "g2", NOBODY)
    await rig.vmm.discard("g1")
    assert one.exited.done()
    assert await ask(other, "/") == (200, b"hello")
    await rig.vmm.discard("g2")


async def a_guest_reaches_the_hosts_ports_that_answer_and_no_others(rig: Rig) -> None:
    """Dialling out meets the protocol that the owner named for the port; any other port is refused."""
    guest = await rig.vmm.boot(rig.workload, "g1", {1025: Greeter})
    assert await ask(guest, "/dial/1025") == (200, b"welcome")
    assert await ask(guest, "/dial/1026") == (200, b"refused")
    assert await ask(guest, "/dial/1025") == (200, b"welcome")
    await rig.vmm.discard("g1")


async def a_sample_never_waits(rig: Rig) -> None:
    """Numbers or None, of a living guest and of a dead one."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, "/")
    for _ in range(2):
        sample = guest.sample()
        assert sample.cpu_ms is None or sample.cpu_ms >= 0
        assert sample.peak_mib is None or sample.peak_mib > 0
        guest.kill()
        await asyncio.wait({guest.gone})
    await rig.vmm.discard("g1")


async def it_says_why_it_cannot_run_a_workload(rig: Rig) -> None:
    """No word for what it can run."""
    assert rig.vmm.refusal(rig.workload) is None
    assert rig.vmm.refusal(rig.refused)


async def a_base_outlives_its_source_and_its_clones_outlive_it(rig: Rig) -> None:
    """Capturing uses the source up; clones serve, and go on when the base is discarded."""
    if await rig.vmm.input_key(rig.workload) is None:
        assert await rig.vmm.adopt(rig.workload) is None
        return
    source = await rig.vmm.boot(rig.workload, "source", NOBODY, to_capture=True)
    await until_ready(source)
    base = await rig.vmm.capture(rig.workload, source, "b1")
    await rig.vmm.discard("source")
    assert base.input_key == await rig.vmm.input_key(rig.workload)
    assert await rig.vmm.adopt(rig.workload) == base
    clones = [await rig.vmm.restore(rig.workload, base, guest_id, NOBODY) for guest_id in ("c1", "c2")]
    await rig.vmm.discard_base(base)
    for clone in clones:
        assert await ask(clone, "/") == (200, b"hello")
        await rig.vmm.discard(clone.guest_id)
    await rig.vmm.discard_base(base)


def a_boot_given_up_leaves_nothing(*, passes: int, cancels: int) -> Promise:
    """Make the promise for a boot cancelled so many times after so many passes of the loop."""

    async def promise(rig: Rig) -> None:
        """Whenever the owner gives up, and however often, discarding undoes the half-done boot."""
        boot = asyncio.get_running_loop().create_task(rig.vmm.boot(rig.workload, "g1", NOBODY))
        for _ in range(passes):
            await asyncio.sleep(0)
        for _ in range(cancels):
            boot.cancel()
            await asyncio.sleep(0)
        with suppress(asyncio.CancelledError):
            await boot
        await rig.vmm.discard("g1")
        assert not rig.left()

    promise.__name__ = f"a_boot_given_up_after_{passes}_passes_{cancels}_times_leaves_nothing"
    return promise


Promise = Callable[[Rig], Awaitable[None]]

PROMISES: tuple[Promise, ...] = (
    it_boots_a_guest_that_serves_control_and_data,
    a_port_that_nobody_serves_is_closed,
    killing_is_told_and_final,
    a_guest_that_ends_by_itself_is_told,
    killing_cuts_an_exchange_short,
    discarding_is_idempotent,
    an_id_can_be_used_again_after_discarding,
    guests_live_and_die_apart,
    a_guest_reaches_the_hosts_ports_that_answer_and_no_others,
    a_sample_never_waits,
    it_says_why_it_cannot_run_a_workload,
    a_base_outlives_its_source_and_its_clones_outlive_it,
    *(
        a_boot_given_up_leaves_nothing(passes=passes, cancels=cancels)
        for passes in (0, 1, 2, 3, 5, 8, 30)
        for cancels in (1, 2, 5)
    ),
)
