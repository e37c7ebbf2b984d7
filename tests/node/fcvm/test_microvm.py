"""Guests in microVMs: how they start, live and end, and what becomes of everything that can go wrong with them."""

# A test may look at files while nothing else runs.
# ruff: noqa: ASYNC240

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from node.fcvm.rig import MEMORY_MIB, Double, MicroVmRig, microvm_rig
from node.vmm_contract import NOBODY, Greeter, ask
from real_parts import needs
from substrate_node.fcvm import FirecrackerVmm, MicroVmRules, outfitted
from substrate_node.fcvm.jail import user_of
from substrate_node.fcvm.listeners import OPEN_MAX, Listeners
from substrate_node.processes.console import KEPT_BYTES
from substrate_node.ready import Contact, IdentityMint
from substrate_node.vmm import Base, Guest, VmmError
from substrate_seam.invocation import Isolation

BOOT = ["PUT /machine-config", "PUT /boot-source", "PUT /drives/rootfs", "PUT /vsock", "PUT /entropy", "PUT /actions"]
PLACES = ["start", "bound", *BOOT]
WITHIN_S = 10.0


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[MicroVmRig]:
    """The monitor over the double, without a jail."""
    async with microvm_rig(tmp_path) as rig:
        yield rig


@pytest.fixture
async def jailed(tmp_path: Path) -> AsyncIterator[MicroVmRig]:
    """The same with the double of the jailer."""
    async with microvm_rig(tmp_path, jail="on") as rig:
        yield rig


async def captured(rig: MicroVmRig, base_id: str = "b1") -> Base:
    """A base of the rig's workload."""
    source = await rig.vmm.boot(rig.workload, f"{base_id}-source", NOBODY)
    try:
        assert await ask(source, "/") == (200, b"hello")
        return await rig.vmm.capture(rig.workload, source, base_id)
    finally:
        await rig.vmm.discard(f"{base_id}-source")


@asynccontextmanager
async def based(rig: MicroVmRig) -> AsyncIterator[Base]:
    """A base for the length of the block."""
    base = await captured(rig)
    yield base
    rig.double.set()
    await rig.vmm.discard_base(base)


async def boots_again(rig: MicroVmRig) -> None:
    """After whatever went wrong: nothing is in the way of the next guest."""
    rig.double.set()
    guest = await rig.vmm.boot(rig.workload, "again", NOBODY)
    assert await ask(guest, "/") == (200, b"hello")
    await rig.vmm.discard("again")


async def refused(verb: object) -> str:
    """Why a verb of the monitor failed."""
    with pytest.raises(VmmError) as caught:
        await verb
    return str(caught.value)


# How it starts.


async def test_a_boot_records_relative_names_only(rig: MicroVmRig):
    """So that bases can move, and any number of clones live from one."""
    await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert rig.double.calls() == BOOT
    paths = {
        name: value
        for request in rig.double.requests()
        for name, value in request["body"].items()
        if name.endswith(("_path", "_on_host"))
    }
    assert paths == {"kernel_image_path": "kernel", "path_on_host": "rootfs", "uds_path": "v.sock"}
    drive = next(request["body"] for request in rig.double.requests() if request["path"] == "/drives/rootfs")
    assert drive["is_read_only"], "P-16: no clone may write what they all share"
    await rig.vmm.discard("g1")


@pytest.mark.parametrize(
    ("members", "init"),
    [
        ({}, "/.substrate/init"),
        ({"guest": "go-shim"}, "/usr/local/bin/fc-shim-init"),
        ({"guest": "go-shim", "harness_init": "/sbin/mine"}, "/sbin/mine"),
    ],
)
async def test_each_workload_has_its_own_first_process(members: dict, init: str, rig: MicroVmRig):
    """P-29: one for all of them would break the second image."""
    workload = rig.of(rig.double.rootfs(), **members)
    await rig.vmm.boot(workload, "g1", NOBODY)
    source = next(request["body"] for request in rig.double.requests() if request["path"] == "/boot-source")
    assert source["boot_args"].endswith(f" init={init}")
    await rig.vmm.discard("g1")


async def test_our_guests_are_told_to_keep_the_journal_where_one_is_kept(tmp_path: Path):
    """By their environment, which is the kernel's command line; others would not know what it means."""
    double = Double(tmp_path / "bin")
    async with outfitted(double.rules(audited=True)) as outfit:
        rig = MicroVmRig(tmp_path, outfit, double)
        assert " SUBSTRATE_AUDIT=1 init=/.substrate/init" in outfit.boot_args(rig.workload.spec)
        assert "AUDIT" not in outfit.boot_args(rig.of(double.rootfs(), guest="go-shim").spec)


async def test_an_initrd_goes_along_where_one_is_set(tmp_path: Path):
    """By name, as all files do."""
    double = Double(tmp_path / "bin")
    initrd = tmp_path / "initrd.img"
    initrd.touch()
    async with outfitted(double.rules(initrd=initrd)) as outfit:
        rig = MicroVmRig(tmp_path, outfit, double)
        await rig.vmm.boot(rig.workload, "g1", NOBODY)
        source = next(request["body"] for request in double.requests() if request["path"] == "/boot-source")
        assert source["initrd_path"] == "initrd"
        await rig.vmm.discard("g1")


async def test_the_process_volunteers_to_the_oom_killer_and_is_bounded(rig: MicroVmRig):
    """P-33: it dies before the daemon does; and a large table of descriptors would make its restores slow."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    proc = Path(f"/proc/{guest._family.pid}")
    limits = (proc / "limits").read_text().splitlines()
    bounds = {line[:26].strip(): line[26:].split()[:2] for line in limits}
    assert (proc / "oom_score_adj").read_text() == "1000\n"
    assert bounds["Max open files"] == ["2048", "2048"]
    assert bounds["Max core file size"] == ["0", "0"]
    await rig.vmm.discard("g1")


async def test_a_sample_is_of_the_process(rig: MicroVmRig):
    """CPU time and peak; what it costs beside those it shares with comes apart."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, "/")
    sample = guest.sample()
    assert sample.cpu_ms > 0
    assert 4 < sample.peak_mib < 64
    assert 1 < guest.share_mib() < sample.peak_mib
    await rig.vmm.discard("g1")
    assert guest.share_mib() is None


async def test_a_long_path_is_no_obstacle(tmp_path: Path):
    """Socket addresses have 107 bytes, and paths have more."""
    async with microvm_rig(tmp_path / ("x" * 120)) as rig:
        guest = await rig.vmm.boot(rig.workload, "g1", {1025: Greeter})
        assert await ask(guest, "/dial/1025") == (200, b"welcome")
        await rig.vmm.discard("g1")


async def test_what_waits_for_the_guest_to_dial_is_there_before_it_runs(rig: MicroVmRig):
    """A guest that dials the moment it wakes finds somebody: the sockets exist before the process does."""
    rig.double.set({"on": "start", "do": "hang"})
    boot = asyncio.get_running_loop().create_task(rig.vmm.boot(rig.workload, "g1", {1025: Greeter}))
    await asyncio.sleep(0)
    assert (rig.run / "g1" / "v.sock_1025").is_socket()
    boot.cancel()
    await asyncio.wait({boot})
    await rig.vmm.discard("g1")


async def test_connections_of_one_guest_are_bounded(tmp_path: Path):
    """Further ones are closed at once, and room is made by those that end."""

    class Open(asyncio.Protocol):
        now = 0
        changed = asyncio.Event()

        def connection_made(self, _transport: asyncio.BaseTransport) -> None:
            Open.now += 1
            Open.changed.set()

        def connection_lost(self, _error: Exception | None) -> None:
            Open.now -= 1
            Open.changed.set()

    async def until(count: int) -> None:
        async with asyncio.timeout(WITHIN_S):
            while Open.now != count:
                Open.changed.clear()
                await Open.changed.wait()

    listeners = Listeners(tmp_path / "v.sock", {1025: Open}, hand_over=lambda _path: None)
    address = str(tmp_path / "v.sock_1025")
    held = [await asyncio.open_unix_connection(address) for _ in range(OPEN_MAX)]
    await until(OPEN_MAX)
    reader, writer = await asyncio.open_unix_connection(address)
    assert await asyncio.wait_for(reader.read(), WITHIN_S) == b""
    writer.close()
    held.pop()[1].close()
    await until(OPEN_MAX - 1)
    held.append(await asyncio.open_unix_connection(address))
    await until(OPEN_MAX)
    for _, writer in held:
        writer.close()
    await until(0)
    listeners.close()


# How it ends.


async def test_the_end_of_a_guest_is_told_with_the_end_of_its_console(rig: MicroVmRig):
    """P-28: what a guest writes never reaches our log, and can't pretend to be a line of it."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, "/exit/3")
    ended = await asyncio.wait_for(asyncio.shield(guest.exited), WITHIN_S)
    assert ended.words == "exit status 0 (the guest rebooted or shut down)"
    assert ended.console == r"leaving with 3\x1b[2J"
    await rig.vmm.discard("g1")


@pytest.mark.parametrize("ends", ["killed", "gave up"])
async def test_the_console_comes_last_unless_firecracker_itself_failed(ends: str, rig: MicroVmRig):
    """The end is what is read: its log has lines of routine, and the reason only where it gave up."""
    rig.double.set({"on": "PATCH /vm", "do": "die", "code": 1})
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, "/flood/1")
    with (rig.run / "g1" / "log").open("w") as log:
        log.write("routine\n")
    assert guest.console
    if ends == "killed":
        guest.kill()
        await asyncio.wait({guest.gone})
    else:
        with pytest.raises(VmmError):
            await rig.vmm.capture(rig.workload, guest, "b1")
        await rig.vmm.discard_base(Base(base_id="b1", input_key=await rig.vmm.input_key(rig.workload)))
    told = (await asyncio.wait_for(asyncio.shield(guest.exited), WITHIN_S)).console.splitlines()
    assert (told[0] if ends == "killed" else told[-1]) == "routine"
    assert len(told) > 1
    await rig.vmm.discard("g1")


async def test_a_flooded_console_keeps_its_end_and_no_more(rig: MicroVmRig):
    """Nothing of it is on the disk."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, "/flood/512")
    await ask(guest, "/exit/3")
    console = (await asyncio.wait_for(asyncio.shield(guest.exited), WITHIN_S)).console
    assert len(console) < KEPT_BYTES + 16, "some bytes take four characters to be shown"
    assert console.endswith(r"leaving with 3\x1b[2J")
    assert sum(path.stat().st_size for path in (rig.run / "g1").iterdir() if not path.is_symlink()) == 0
    await rig.vmm.discard("g1")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"code": 148}, "exit status 148 (a system call that its filter forbids)"),
        ({"code": 149}, "exit status 149 (a page of its memory file is gone: the file was truncated)"),
        ({"code": 77}, "exit status 77"),
        ({"signal": int(signal.SIGABRT)}, "killed by SIGABRT"),
    ],
)
async def test_the_end_of_firecracker_is_told_by_its_meaning(fault: dict, words: str, rig: MicroVmRig):
    """P-22, P-36: at once, and as what it was."""
    rig.double.set({"on": "PUT /actions", "do": "die", **fault})
    assert words in await refused(rig.vmm.boot(rig.workload, "g1", NOBODY))
    await rig.vmm.discard("g1")


@pytest.mark.parametrize("place", PLACES)
async def test_death_at_any_point_of_a_boot_is_noticed_at_once(place: str, rig: MicroVmRig):
    """P-21, P-22: nobody waits for a deadline, nothing is left, and the next boot is not disturbed."""
    rig.double.set({"on": place, "do": "die", "signal": 9})
    began_s = time.monotonic()
    assert "killed by SIGKILL" in await refused(rig.vmm.boot(rig.workload, "g1", NOBODY))
    assert time.monotonic() - began_s < 5
    await rig.vmm.discard("g1")
    await boots_again(rig)


@pytest.mark.parametrize("place", PLACES)
async def test_a_boot_that_hangs_can_be_given_up_at_any_point(place: str, rig: MicroVmRig):
    """By whoever has the deadline."""
    rig.double.set({"on": place, "do": "hang"})
    with suppress(TimeoutError):
        async with asyncio.timeout(0.4):
            await rig.vmm.boot(rig.workload, "g1", NOBODY)
            pytest.fail("it can't have booted")
    await rig.vmm.discard("g1")
    await boots_again(rig)


@pytest.mark.parametrize("place", BOOT)
async def test_a_refusal_of_any_call_of_a_boot_is_told(place: str, rig: MicroVmRig):
    """With the call, the state, and Firecracker's own words."""
    rig.double.set({"on": place, "do": "fail", "message": "no such luck"})
    message = await refused(rig.vmm.boot(rig.workload, "g1", NOBODY))
    assert message.startswith(f"boot: {place}")
    assert "(Not started) answered 400: no such luck" in message
    await rig.vmm.discard("g1")
    await boots_again(rig)


async def test_a_program_that_is_none_is_told(rig: MicroVmRig):
    """The shell that would become it says why."""
    rig.double.firecracker.unlink()
    message = await refused(rig.vmm.boot(rig.workload, "g1", NOBODY))
    assert "exit status 127" in message
    assert "not found" in message
    await rig.vmm.discard("g1")


async def test_sockets_that_something_left_are_no_obstacle(rig: MicroVmRig):
    """P-02: every guest has a directory of its own, and one that is there already is swept, not reused."""
    stale = rig.run / "g1"
    stale.mkdir()
    (stale / "api.sock").touch()
    assert "File exists" in await refused(rig.vmm.boot(rig.workload, "g1", NOBODY))
    shutil.rmtree(stale)
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    guest.kill()
    await asyncio.wait({guest.gone})
    assert (rig.run / "g1" / "v.sock").is_socket(), "Firecracker leaves its sockets behind"
    await rig.vmm.discard("g1")
    await boots_again(rig)


@pytest.mark.parametrize("guest_id", ["", "a.b", "a_b", "../x", "x" * 61])
async def test_an_id_that_firecracker_would_not_take_is_refused(guest_id: str, rig: MicroVmRig):
    """It would end in a panic."""
    assert "can't name a new guest" in await refused(rig.vmm.boot(rig.workload, guest_id, NOBODY))


# Bases and clones.


async def test_the_source_of_a_base_is_never_resumed(rig: MicroVmRig):
    """Two would go on with one memory, and two releases of Firecracker would hang."""
    async with based(rig):
        calls = rig.double.calls()
        assert calls[len(BOOT) :] == ["PATCH /vm", "PUT /snapshot/create"]
        states = [request["body"]["state"] for request in rig.double.requests() if request["path"] == "/vm"]
        assert states == ["Paused"]


async def test_clones_of_one_base_live_at_once_each_with_its_own_sockets(rig: MicroVmRig):
    """P-20: nothing of one is in another's way; and one load is all that a restore asks."""
    async with based(rig) as base:
        before = len(rig.double.calls())
        clones = [await rig.vmm.restore(rig.workload, base, f"c{n}", {1025: Greeter}) for n in range(3)]
        assert rig.double.calls()[before:] == ["PUT /snapshot/load"] * 3
        for clone in clones:
            assert await ask(clone, "/dial/1025") == (200, b"welcome")
        for clone in clones:
            await rig.vmm.discard(clone.guest_id)


async def test_a_base_can_move_with_its_directory(rig: MicroVmRig, tmp_path: Path):
    """No recorded path leads anywhere but beside the guest."""
    base = await captured(rig)
    moved = tmp_path / "elsewhere"
    rig.bases.rename(moved)
    rig.bases.mkdir()
    vmm = FirecrackerVmm(rig.outfit, run=rig.run, bases=moved)
    adopted = await vmm.adopt(rig.workload)
    assert adopted.base_id == base.base_id
    clone = await vmm.restore(rig.workload, adopted, "c1", NOBODY)
    assert await ask(clone, "/") == (200, b"hello")
    await vmm.discard("c1")


async def test_a_clone_on_the_go_shim_has_its_clock_moved_on_where_firecracker_can(tmp_path: Path):
    """P-09: ours are told the time; such a guest may know no way to be told."""
    for version, expected in (("1.17.0", platform.machine() == "x86_64"), ("1.15.0", False)):
        root = tmp_path / version
        async with microvm_rig(root, double=Double(root / "bin", version=version)) as rig:
            rig.workload = rig.of(rig.double.rootfs(), guest="go-shim")
            async with based(rig) as base:
                await rig.vmm.restore(rig.workload, base, "c1", NOBODY)
                assert rig.double.requests()[-1]["body"].get("clock_realtime", False) is expected
                await rig.vmm.discard("c1")


@pytest.mark.parametrize("fault", [{"do": "die"}, {"do": "fail", "message": "no"}, {"do": "close"}, {"do": "hang"}])
@pytest.mark.parametrize("place", ["PATCH /vm", "PUT /snapshot/create"])
async def test_a_capture_that_fails_leaves_no_base(fault: dict, place: str, rig: MicroVmRig):
    """Wherever, and however."""
    rig.double.set({"on": place, **fault})
    source = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    named = Base(base_id="b1", input_key=await rig.vmm.input_key(rig.workload))
    with pytest.raises((VmmError, TimeoutError)):
        async with asyncio.timeout(0.3 if fault["do"] == "hang" else WITHIN_S):
            await rig.vmm.capture(rig.workload, source, "b1")
    assert await rig.vmm.adopt(rig.workload) is None
    await rig.vmm.discard("g1")
    await rig.vmm.discard_base(named)
    assert not rig.left()


async def test_a_full_disk_is_told_before_and_during_a_capture(rig: MicroVmRig, monkeypatch: pytest.MonkeyPatch):
    """Before: as what is needed and what there is. During: in Firecracker's words."""
    rig.double.set({"on": "create", "do": "fill-disk"})
    source = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    message = await refused(rig.vmm.capture(rig.workload, source, "b1"))
    assert "No space left on device (os error 28) The disk is full: free some space" in message
    await rig.vmm.discard("g1")
    await rig.vmm.discard_base(Base(base_id="b1", input_key=await rig.vmm.input_key(rig.workload)))
    rig.double.set()
    source = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    usage = shutil.disk_usage(rig.run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=8 * 2**20))
    message = await refused(rig.vmm.capture(rig.workload, source, "b1"))
    assert f"a base of {MEMORY_MIB} MiB needs as much disk, and 8 MiB are free" in message
    await rig.vmm.discard("g1")


async def test_a_memory_that_is_cut_short_is_no_base(rig: MicroVmRig):
    """Whatever Firecracker said of it."""
    rig.double.set({"on": "create", "do": "truncate"})
    source = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    message = await refused(rig.vmm.capture(rig.workload, source, "b1"))
    assert f"Firecracker left {MEMORY_MIB * 2**19} bytes of a memory of {MEMORY_MIB} MiB" in message
    await rig.vmm.discard("g1")
    await rig.vmm.discard_base(Base(base_id="b1", input_key=await rig.vmm.input_key(rig.workload)))


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("name", ["state", "memory"])
async def test_a_link_in_place_of_a_snapshot_is_never_followed(make, name: str, rig: MicroVmRig, tmp_path: Path):
    """Who has taken Firecracker over must not make the daemon change other files for him."""
    other = tmp_path / "other"
    other.write_bytes(bytes(MEMORY_MIB * 2**20))
    other.chmod(0o640)
    source = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    make(rig.run / "g1" / name, other)
    rig.double.set()
    message = await refused(rig.vmm.capture(rig.workload, source, "b1"))
    assert f"Firecracker left no file of its own as {name}" in message
    await rig.vmm.discard("g1")
    await rig.vmm.discard_base(Base(base_id="b1", input_key=await rig.vmm.input_key(rig.workload)))
    assert other.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["api.sock", "v.sock"])
async def test_a_link_in_place_of_a_socket_is_never_followed(name: str, rig: MicroVmRig, tmp_path: Path):
    """Or the daemon would speak to sockets that the guest's process can't reach itself."""
    reached: list[object] = []
    async with await asyncio.start_unix_server(lambda *streams: reached.append(streams), tmp_path / "other.sock"):
        guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
        (rig.run / "g1" / name).unlink()
        (rig.run / "g1" / name).symlink_to(tmp_path / "other.sock")
        with pytest.raises(OSError, match="is no socket"):
            await (guest.dial(asyncio.Protocol) if name == "v.sock" else guest._api.connect())
        await rig.vmm.discard("g1")
    assert reached == []


@pytest.mark.parametrize("moment_s", [0.0, 0.001, 0.005, 0.02, 0.05])
async def test_a_capture_given_up_leaves_nothing(moment_s: float, rig: MicroVmRig):
    """Whenever: the work in threads ends before its owner does."""
    source = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    named = Base(base_id="b1", input_key=await rig.vmm.input_key(rig.workload))
    with suppress(TimeoutError):
        async with asyncio.timeout(moment_s):
            await rig.vmm.capture(rig.workload, source, "b1")
    await rig.vmm.discard("g1")
    await rig.vmm.discard_base(named)
    assert not rig.left()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"do": "die", "code": 150}, "exit status 150 (a segmentation fault)"),
        ({"do": "fail", "message": "Load snapshot error: odd"}, "answered 400: Load snapshot error: odd"),
        ({"do": "close"}, "closed the connection"),
    ],
)
async def test_a_restore_that_fails_is_told_and_costs_the_base_nothing(fault: dict, words: str, rig: MicroVmRig):
    """The next one from it succeeds."""
    async with based(rig) as base:
        rig.double.set({"on": "PUT /snapshot/load", **fault})
        assert words in await refused(rig.vmm.restore(rig.workload, base, "c1", NOBODY))
        await rig.vmm.discard("c1")
        rig.double.set()
        clone = await rig.vmm.restore(rig.workload, base, "c2", NOBODY)
        assert await ask(clone, "/") == (200, b"hello")
        await rig.vmm.discard("c2")


async def test_a_restore_from_a_base_that_is_cut_short_says_so(rig: MicroVmRig):
    """With the end of the process that it meant."""
    async with based(rig) as base:
        (base.directory / "memory").chmod(0o600)
        os.truncate(base.directory / "memory", 2**20)
        message = await refused(rig.vmm.restore(rig.workload, base, "c1", NOBODY))
        assert "PUT /snapshot/load (Not started) answered 400: Load snapshot error: Failed to restore" in message
        assert "It ended: exit status 1" in message
        await rig.vmm.discard("c1")
        assert "its memory has 1048576 bytes" in await refused(rig.vmm.adopt(rig.workload))
        assert await rig.vmm.adopt(rig.workload) is None, "it is removed, and will be built again"


async def test_a_base_of_another_release_is_not_adopted(tmp_path: Path):
    """P-13: the sweep at the start says why it goes, and the key of the workload is another one."""
    double = Double(tmp_path / "bin")
    async with microvm_rig(tmp_path, double=double) as rig:
        await captured(rig)
        for changes, why in (
            ({"version": "1.17.1"}, "it was made with 1.17.0, here is 1.17.1"),
            ({"snapshot_version": "13.0.0"}, "it was made with v12.0.0, here is v13.0.0"),
        ):
            double.set(**{"version": "1.17.0", "snapshot_version": "12.0.0"} | changes)
            async with outfitted(rig.outfit.rules) as outfit:
                newer = FirecrackerVmm(outfit, run=rig.run, bases=rig.bases)
                assert await newer.adopt(rig.workload) is None
                reasons = await newer.sweep_bases(now_s=time.time())
                assert reasons == [f"base b1 is removed: {why}"]
            double.set(version="1.17.0", snapshot_version="12.0.0")
            await captured(rig)
        Path(rig.workload.spec.rootfs_path).write_text("{}")
        (reason,) = await rig.vmm.sweep_bases(now_s=time.time())
        assert "of workload 'obedient' is another file now, or gone" in reason


async def test_a_base_of_a_broken_release_is_refused_by_name(tmp_path: Path):
    """And so is every workload: no guest of ours runs on it."""
    double = Double(tmp_path / "bin", version="1.16.0")
    async with microvm_rig(tmp_path, double=double) as rig:
        assert "Firecracker 1.16.0 is broken" in rig.vmm.refusal(rig.workload)
        assert "Firecracker 1.16.0 is broken" in await refused(rig.vmm.boot(rig.workload, "g1", NOBODY))
        assert not rig.left()


# Readiness after a restore.


def mint() -> IdentityMint:
    """Of identities."""
    return IdentityMint(wall_ns=time.time_ns, entropy=os.urandom)


@pytest.mark.parametrize("fault", ["hang", "reset", "close", "split", "join"])
async def test_the_first_connection_after_a_restore_may_do_what_it_likes(fault: str, rig: MicroVmRig):
    """P-01, P-18: it may hang for ever, break, or come in odd pieces; the guest is ready all the same, and soon."""
    async with based(rig) as base:
        rig.double.set({"on": "restored-connect", "do": fault, "times": 1})
        began_s = time.monotonic()
        async with asyncio.timeout(WITHIN_S):
            clone = await rig.vmm.restore(rig.workload, base, "c1", NOBODY)
            await Contact(clone).make_ready(rig.workload, mint(), contact_cap_s=rig.vmm.contact_cap_s, restored=True)
        assert time.monotonic() - began_s < 5
        assert await ask(clone, "/") == (200, b"hello")
        await rig.vmm.discard("c1")


async def test_a_dead_vsock_is_given_up_by_whoever_has_the_deadline(rig: MicroVmRig):
    """The defect of release 1.16.0: no connection is ever answered."""
    async with based(rig) as base:
        rig.double.set({"on": "restored-connect", "do": "hang"})
        clone = await rig.vmm.restore(rig.workload, base, "c1", NOBODY)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await Contact(clone).make_ready(
                    rig.workload, mint(), contact_cap_s=rig.vmm.contact_cap_s, restored=True
                )
        await rig.vmm.discard("c1")


# Refusals.


async def test_a_workload_that_it_cannot_run_is_refused_with_the_cure(rig: MicroVmRig):
    """Isolation is never less than what was asked for."""
    for members, words in (
        ({"isolation": Isolation.MICROVM_JAILED}, "run the daemon as root, with Firecracker's jailer installed"),
        ({"vcpus": 33}, "a microVM has 32 at most"),
    ):
        assert words in rig.vmm.refusal(rig.of(rig.double.rootfs(), **members))
    assert "nowhere can't be read" in rig.vmm.refusal(rig.of(Path("/nowhere")))
    assert await rig.vmm.input_key(rig.of(Path("/nowhere"))) is None
    rig.outfit.rules.kernel.unlink()
    assert "vmlinux can't be read" in rig.vmm.refusal(rig.workload)


async def test_microvms_are_possible_only_with_firecracker_and_kvm(tmp_path: Path):
    """Both are looked at."""
    rules = Double(tmp_path / "bin").rules()
    assert rules.possible()
    assert not MicroVmRules(firecracker=Path("/nowhere"), kernel=rules.kernel, kvm=rules.kvm).possible()
    assert not MicroVmRules(firecracker=rules.firecracker, kernel=rules.kernel, kvm=Path("/nowhere")).possible()


@pytest.mark.parametrize(
    ("script", "words"),
    [("#!/bin/sh\nexit 3\n", "ended with status 3: it is no Firecracker"), ("\x7fELF", "can't be run")],
)
async def test_a_program_that_is_not_firecracker_is_told_at_the_start(script: str, words: str, tmp_path: Path):
    """Before anything is called with it."""
    double = Double(tmp_path / "bin")
    rules = double.rules()
    double.firecracker.write_text(script)
    with pytest.raises(VmmError, match=words):
        async with outfitted(rules):
            pytest.fail("there is nothing to be had")


# The jail.


@needs("root")
async def test_each_jailed_guest_is_a_user_of_its_own_in_namespaces_of_its_own(jailed: MicroVmRig):
    """And its files are its, but for those it is lent."""
    guests = [await jailed.vmm.boot(jailed.workload, f"g{n}", {1025: Greeter}) for n in (1, 2)]
    roots = [guest.root for guest in guests]
    users = [root.stat().st_uid for root in roots]
    assert users == [user_of("g1"), user_of("g2")]
    assert len(set(users)) == 2
    for guest, root, user in zip(guests, roots, users, strict=True):
        proc = Path(f"/proc/{guest._family.pid}")
        assert (root / "v.sock_1025").stat().st_uid == (root / "log").stat().st_uid == user
        assert (root / "rootfs").stat().st_uid == os.geteuid(), "a link is the same file: it keeps its owner"
        assert (root / "rootfs").samefile(jailed.workload.spec.rootfs_path)
        assert f"NSpid:\t{guest._family.pid}\t1\n" in (proc / "status").read_text()
        assert await ask(guest, "/dial/1025") == (200, b"welcome")
        await jailed.vmm.discard(guest.guest_id)


@needs("root")
async def test_each_jailed_guest_has_a_control_group_and_limits(jailed: MicroVmRig):
    """P-33: what it may use is bounded, and the daemon is not in there with it."""
    guest = await jailed.vmm.boot(jailed.workload, "g1", NOBODY)
    groups = jailed.double.cgroups / "fc-invoke"
    assert [path.name for path in groups.iterdir() if path.is_dir()] == ["g1"]
    bounds = json.loads((jailed.double.root / "double.json.cgroup-g1").read_text())
    assert bounds == {"memory.max": str((MEMORY_MIB + 64) * 2**20), "pids.max": "17"}
    limits = Path(f"/proc/{guest._family.pid}/limits").read_text()
    assert f"Max file size             {(MEMORY_MIB + 64) * 2**20}" in limits
    await jailed.vmm.discard("g1")
    assert not [path for path in groups.iterdir() if path.is_dir()]


@needs("root")
async def test_a_file_from_another_file_system_is_mounted_and_unmounted(jailed: MicroVmRig):
    """Where it can't be linked; nobody's file is ever removed with a jail."""
    elsewhere = Path("/dev/shm") / f"substrate-{os.getpid()}.ext4"
    shutil.copy(jailed.workload.spec.rootfs_path, elsewhere)
    try:
        workload = jailed.of(elsewhere)
        guest = await jailed.vmm.boot(workload, "g1", NOBODY)
        assert await ask(guest, "/") == (200, b"hello")
        assert str(guest.root / "rootfs") in Path("/proc/self/mountinfo").read_text()
        with pytest.raises(OSError, match="Read-only"):
            (guest.root / "rootfs").write_text("x")
        await jailed.vmm.discard("g1")
        assert str(jailed.run) not in Path("/proc/self/mountinfo").read_text()
        assert elsewhere.exists()
    finally:
        elsewhere.unlink()


@needs("root")
async def test_a_file_that_the_jails_user_cannot_read_is_told(jailed: MicroVmRig):
    """With the command that helps; its owner is never changed."""
    rootfs = Path(jailed.workload.spec.rootfs_path)
    rootfs.chmod(0o600)
    message = await refused(jailed.vmm.boot(jailed.workload, "g1", NOBODY))
    assert f"run `chmod o+r {rootfs}`" in message
    assert not jailed.left()


@needs("root")
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda double: double.jailer.unlink(), "install the jailer of Firecracker 1.17.0"),
        (
            lambda double: double.jailer.write_text("#!/bin/sh\necho Jailer v1.16.2\n"),
            "the jailer is of release 1.16.2",
        ),
    ],
)
async def test_a_jail_that_cannot_be_had_is_told(spoil: Callable[[Double], None], why: str, tmp_path: Path):
    """By a refusal where it was asked for, by a warning and a lesser isolation where it was not."""
    double = Double(tmp_path / "bin")
    spoil(double)
    with pytest.raises(VmmError, match=why):
        async with outfitted(double.rules(jail="on")):
            pytest.fail("there is no jail to be had")
    async with outfitted(double.rules(jail="auto")) as outfit:
        assert why in outfit.warnings[0]
        assert FirecrackerVmm(outfit, run=tmp_path, bases=tmp_path).isolation is Isolation.MICROVM


@needs("root")
async def test_control_groups_that_cannot_be_had_are_a_warning(tmp_path: Path):
    """The jail is one without them; P-33 is told instead of met."""
    double = Double(tmp_path / "bin")
    rules = double.rules(jail="on")
    shutil.rmtree(double.cgroups)
    async with outfitted(rules) as outfit:
        (warning,) = outfit.warnings
        assert "what they use counts as this daemon's" in warning
        rig = MicroVmRig(tmp_path, outfit, double)
        guest: Guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
        assert await ask(guest, "/") == (200, b"hello")
        await rig.vmm.discard("g1")
