"""Process guests: what they see, how they end, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import uvloop

from node.procvm_rig import GUESTS, ProcessRig, children, clone_rig, process_rig, workload
from node.vmm_contract import NOBODY, PROMISES, Greeter, Promise, ask
from real_parts import is_full, needs
from substrate_guest import confinement
from substrate_node.processes.console import KEPT_BYTES
from substrate_node.procvm import IsolationReport, Measure, ProcessVmm
from substrate_node.procvm.dials import OPEN_MAX
from substrate_node.procvm.launch import Launch
from substrate_node.procvm.probe import MEASURES, MEMORY_BOUND
from substrate_node.vmm import CONTROL_PORT, VmmError
from substrate_seam.invocation import Isolation
from substrate_seam.workload import Workload, WorkloadSpec

TESTS = Path(__file__).parent.parent
SYSTEM_PYTHON = "/usr/bin/python3"
BELOW_TMP = {
    Path(place).parts[2] for place in (GUESTS, sys.prefix, sys.base_prefix) if Path(place).is_relative_to("/tmp")
}
"""What a guest has to see there if these tests were put there."""

RigOf = Callable[[Path], AbstractAsyncContextManager[ProcessRig]]

pytestmark = needs("user-namespaces", "pidfd")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ProcessRig]:
    async with process_rig(tmp_path / "run") as rig:
        yield rig


async def seen_by(rig: ProcessRig, guest_id: str, path: object = "/etc/shadow", **members: object) -> dict[str, Any]:
    """What a fresh guest sees of itself, of the host, and whether it sees `path`."""
    guest = await rig.vmm.boot(workload(**members), guest_id, NOBODY)
    _, seen = await ask(guest, f"/see{path}")
    await rig.vmm.discard(guest_id)
    return json.loads(seen)


# What a guest sees.


async def test_this_host_allows_every_measure_or_the_report_says_what_would_help(rig: ProcessRig):
    """A missing measure has a reason."""
    report = await rig.vmm.probe()
    assert {"no-new-privileges", "resource-limits", "dies-with-daemon"} <= report.applied
    assert all(measure.why_not for measure in report.missing)
    assert all(measure.name in str(report) for measure in report.measures)
    assert "unprivileged-user" in report.applied  # also without root: such a guest never was root


async def test_a_guest_sees_nothing_of_the_hosts_files(rig: ProcessRig, tmp_path: Path):
    """Neither the daemon's state, nor secrets, nor homes, nor what it was not given."""
    planted = tmp_path / "secret"
    planted.write_text("x")
    for path in (rig.run, planted, "/etc/shadow", Path.home() / ".ssh", "/sys", "/dev/kvm", "/dev/tty"):
        assert not (await seen_by(rig, "g1", path))["exists"], path
    seen = await seen_by(rig, "g1", GUESTS / "obedient.py")
    assert seen["exists"]
    assert set(seen["dev"]) == {"fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "urandom", "zero"}


async def test_a_guest_writes_only_to_bounded_memory_of_its_own(rig: ProcessRig):
    """Everything else is read-only, and all that is writable shares one bound."""
    seen = await seen_by(rig, "g1", memory_mib=64)
    read_only = "Read-only file system"
    assert [seen[place] for place in ("write_root", "write_usr", "write_here")] == [read_only] * 3
    assert seen["write_tmp"] == seen["write_home"] == str(len("etc/shadow"))
    assert seen["writable_mib"] == 32
    assert set(seen["tmp"]) - BELOW_TMP == {"planted"}
    assert set((await seen_by(rig, "g1"))["tmp"]) - BELOW_TMP == {"planted"}, "and the next starts with an empty one"


async def test_a_guest_sees_only_its_own_processes(rig: ProcessRig):
    """The first one, the command, and what the command starts."""
    assert (await seen_by(rig, "g1"))["pids"] == ["1", "2"]


async def test_a_guest_has_no_network_but_its_loopback(rig: ProcessRig):
    """It can talk to itself."""
    seen = await seen_by(rig, "g1")
    assert seen["interfaces"] == ["lo"]
    assert seen["loopback"] == "True"
    assert seen["internet"] == "Network is unreachable"


async def test_a_guest_is_nobody_and_stays_nobody(rig: ProcessRig):
    """No capability, no way to one, and no user of the host's."""
    seen = await seen_by(rig, "g1")
    assert (seen["uid"], seen["gid"]) == (confinement.INNER_ID, confinement.INNER_ID)
    assert set(seen["capabilities"]) == {"0" * 16}
    assert seen["no_new_privs"] == "1"
    assert seen["unshare_user"] != 0
    assert seen["unshare_mount"] != 0
    assert seen["core"] == [0, 0]


async def test_a_guest_is_kept_from_the_kernels_darker_corners(rig: ProcessRig):
    """Its sockets were made by the host, and would tell it of the host's network; others have a history of holes."""
    seen = await seen_by(rig, "g1")
    assert [seen[call] for call in ("netdevices", "keys", "io_uring")] == ["PermissionError"] * 3
    assert seen["unix_ioctl"].startswith("b'"), "other ioctls work"


@needs("root")
async def test_guests_of_root_are_other_users_and_different_ones(rig: ProcessRig):
    """What escapes from one is neither root nor the other."""
    one, other = [(await seen_by(rig, guest_id))["outer_uid"] for guest_id in ("g1", "g2")]
    assert one != other
    assert "0" not in {one[1], other[1]}


async def test_nothing_of_the_daemons_environment_or_descriptors_reaches_a_guest(
    rig: ProcessRig, monkeypatch: pytest.MonkeyPatch
):
    """It gets a few variables, its workload's and its sockets."""
    monkeypatch.setenv("FC_INVOKE_SECRET", "s3cret")
    leaked = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    seen = await seen_by(rig, "g1", env={"COLOUR": "green"})
    os.close(leaked)
    env = seen["env"]
    expected = {"PATH", "HOME", "TMPDIR", "LANG", "COLOUR", "SUBSTRATE_LISTEN_FD", "SUBSTRATE_DIAL_FD"}
    assert expected <= env.keys() <= expected | {"LC_CTYPE"}
    assert env["COLOUR"] == "green"
    assert set(seen["descriptors"]) - {"0", "1", "2", "3", "4"} <= {"5", "6", "7", "8"}, "its own connection and look"
    assert seen["stdin"] == "/dev/null"


async def test_two_guests_see_nothing_of_each_other(rig: ProcessRig):
    """Another name, other files, other processes, at the same time."""
    one = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    other = await rig.vmm.boot(rig.workload, "g2", NOBODY)
    first, second = [json.loads((await ask(guest, "/see/tmp/none"))[1]) for guest in (one, other)]
    assert (first["hostname"], second["hostname"]) == ("g1", "g2")
    assert set(first["tmp"]) - BELOW_TMP == set(second["tmp"]) - BELOW_TMP == {"planted"}
    assert first["pids"] == second["pids"] == ["1", "2"]
    for guest_id in ("g1", "g2"):
        await rig.vmm.discard(guest_id)


@needs("root", "system-python")
def test_process_guests_of_an_ordinary_user_keep_the_contract_too():
    """Without any privilege: user namespaces alone give the guest all of this."""
    seen = seen_by_ordinary_users_guest()
    assert set(seen["applied"]) >= MEASURES.keys() - {MEMORY_BOUND}
    assert (seen["uid"], seen["outer_uid"][1]) == (confinement.INNER_ID, "65534")
    assert not seen["exists"]
    assert seen["pids"] == ["1", "2"]
    assert set(seen["capabilities"]) == {"0" * 16}
    assert seen["interfaces"] == ["lo"]
    assert seen["unshare_user"] != 0


@needs("root", "system-python")
def test_process_guests_on_a_host_without_namespaces_keep_the_contract_and_say_what_is_missing():
    """The guest is hardly isolated, and the report says so; it still ends as a whole group, and leaves nothing."""
    seen = seen_by_ordinary_users_guest("bare")
    assert set(seen["applied"]) == {
        *("first-to-die", "resource-limits", "no-capabilities", "no-new-privileges", "dies-with-daemon"),
        *("system-call-filter", "unprivileged-user"),
    }
    assert len(seen["pids"]) > 2
    assert seen["no_new_privs"] == "1"


def seen_by_ordinary_users_guest(*how: str) -> dict[str, Any]:
    """What the probe and a guest of user 65534 say, once it has kept all promises."""
    with TemporaryDirectory() as home:  # not below pytest's, which is root's alone
        command = [sys.executable, "-m", "node.procvm_user", home, SYSTEM_PYTHON, *how]
        done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def test_the_wheel_for_guests_serves_in_one(rig: ProcessRig):
    """The launcher, the view of the interpreter and the shim fit together."""
    command = ("python", "-m", "substrate_guest", "serve", "substrate_guest.workloads.echo:app")
    guest = await rig.vmm.boot(workload(command=command, path=None), "g1", NOBODY)
    assert (await ask(guest, "/shim/healthz", port=CONTROL_PORT))[0] == 200
    await rig.vmm.discard("g1")


# How it ends.


async def test_what_a_guest_left_running_ends_with_it(rig: ProcessRig):
    """Even what left its session and its parent."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, "/orphan/86423")
    (orphan,) = processes(marked="86423")
    await rig.vmm.discard("g1")
    assert not processes(marked="86423"), orphan


@pytest.mark.parametrize(
    ("signal", "words"), [(9, "killed by SIGKILL"), (11, "killed by SIGSEGV"), (40, "killed by signal 40")]
)
async def test_a_command_that_is_killed_is_told_by_its_signal(rig: ProcessRig, signal: int, words: str):
    """Although the first process of a pid namespace cannot end by one."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, f"/kill/{signal}")
    assert (await asyncio.wait_for(asyncio.shield(guest.exited), 10)).words == words
    await rig.vmm.discard("g1")


async def test_a_command_that_ends_at_once_was_up_none_the_less(rig: ProcessRig):
    """Its boot succeeds, whichever of its reports and its end is heard first."""
    brief = Workload.of(WorkloadSpec(name="brief", command=("true",)))
    for _ in range(10):
        guest = await rig.vmm.boot(brief, "g1", NOBODY)
        assert (await asyncio.wait_for(asyncio.shield(guest.exited), 10)).words == "exit status 0"
        await rig.vmm.discard("g1")


async def test_the_last_words_of_a_guest_are_told_without_power_over_the_reader(rig: ProcessRig):
    """Control characters are spelled out."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await ask(guest, "/exit/3")
    assert (await asyncio.wait_for(asyncio.shield(guest.exited), 10)).console == r"leaving with 3\x1b[2J"
    await rig.vmm.discard("g1")


async def test_a_flooded_console_keeps_its_end(rig: ProcessRig):
    """A bounded number of bytes, the last ones."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    assert await ask(guest, "/flood/1000") == (200, b"hello")
    await ask(guest, "/exit/3")
    console = (await asyncio.wait_for(asyncio.shield(guest.exited), 10)).console
    assert KEPT_BYTES // 2 < console.count("x") <= KEPT_BYTES
    assert console.endswith(r"leaving with 3\x1b[2J")
    await rig.vmm.discard("g1")


async def test_a_guest_holds_a_bounded_number_of_connections(rig: ProcessRig):
    """The next one is refused, and so is a flood of questions that nobody answers."""
    guest = await rig.vmm.boot(rig.workload, "g1", {1025: asyncio.Protocol})
    assert await ask(guest, f"/hoard/{OPEN_MAX + 10}") == (200, str(OPEN_MAX).encode())
    assert json.loads((await ask(guest, "/dials/50"))[1]) == ["refused"] * 50
    await rig.vmm.discard("g1")
    again = await rig.vmm.boot(rig.workload, "g2", {1025: Greeter})
    assert json.loads((await ask(again, f"/hoard/{2 * OPEN_MAX}"))[1]) == 2 * OPEN_MAX, "closed ones do not count"
    await rig.vmm.discard("g2")


async def test_a_sample_counts_what_the_guest_used(rig: ProcessRig):
    """Milliseconds of CPU, and MiB of memory."""
    guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
    before = guest.sample()
    await ask(guest, "/spin/200")
    after = guest.sample()
    assert before.cpu_ms is not None
    assert after.cpu_ms is not None
    assert 150 <= after.cpu_ms - before.cpu_ms <= 2000
    assert after.peak_mib is not None
    assert 4 <= after.peak_mib <= 200
    await rig.vmm.discard("g1")


@pytest.mark.parametrize("rig_of", [process_rig, clone_rig], ids=["cold", "clone"])
async def test_what_a_child_took_that_has_ended_is_known_when_its_guest_has(rig_of: RigOf, tmp_path: Path):
    """Nobody can ask the kernel for it while the guest lives. Who took little is not charged with what others did."""
    async with rig_of(tmp_path / "run") as rig:
        for guest_id, feast_mib, told_mib in (("g1", 100, range(100, 160)), ("g2", 1, range(60))):
            guest = await rig.vmm.boot(rig.workload, guest_id, NOBODY)
            assert (await ask(guest, f"/feast/{feast_mib}"))[0] == 200
            living_mib = guest.sample().peak_mib
            assert living_mib is not None
            assert living_mib < 100
            await rig.vmm.discard(guest_id)
            assert int(guest.exited.result().peak_mib or 0) in told_mib


# What cannot be started.


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"command": (), "rootfs_path": "/images/vm.ext4", "path": None}, "Firecracker"),
        ({"isolation": Isolation.MICROVM}, "/dev/kvm"),
        ({"path": "/nowhere"}, "/nowhere is not a directory"),
        ({"path": "/"}, "state of this daemon"),
        ({"python": "/nowhere/python"}, "/nowhere/python is not a program"),
    ],
)
async def test_a_refusal_says_what_would_help(rig: ProcessRig, members: dict[str, Any], says: str):
    """And booting it all the same fails with the same words."""
    refused = workload(**members)
    refusal = rig.vmm.refusal(refused)
    assert refusal is not None
    assert says in refusal
    with pytest.raises(VmmError, match="boot"):
        await rig.vmm.boot(refused, "g1", NOBODY)


async def test_a_command_that_is_not_there_fails_the_boot(rig: ProcessRig):
    """By its name and the kernel's reason."""
    missing = Workload.of(WorkloadSpec(name="missing", command=("no-such-program",)))
    with pytest.raises(VmmError, match="no-such-program: No such file"):
        await rig.vmm.boot(missing, "g1", NOBODY)
    await rig.vmm.discard("g1")


async def test_a_promised_measure_that_fails_fails_the_boot(rig: ProcessRig):
    """Never a silent downgrade."""
    promised = (await rig.vmm.probe()).measures
    rig.vmm._report = IsolationReport((*promised, Measure("own-planet", "a planet of its own")))
    with pytest.raises(VmmError, match="own-planet"):
        await rig.vmm.boot(rig.workload, "g1", NOBODY)
    await rig.vmm.discard("g1")


@pytest.mark.parametrize("guest_id", ["", "../g", ".hidden", "a/b", "x" * 64])
async def test_a_guest_id_is_one_plain_name(rig: ProcessRig, guest_id: str):
    """It names a directory and a host."""
    with pytest.raises(VmmError, match="can't name a guest"):
        await rig.vmm.boot(rig.workload, guest_id, NOBODY)


async def test_a_launcher_that_is_not_there_fails_the_boot_and_leaves_nothing(tmp_path: Path):
    """Before anything is begun."""
    vmm = ProcessVmm(tmp_path, guest_argv=("/nowhere/launcher",))
    with pytest.raises(VmmError, match="cannot start a process"):
        await vmm.probe()
    assert os.listdir(tmp_path) == []  # noqa: PTH208  # a Path's would block, says ASYNC240


async def test_the_socket_of_a_guest_deep_down_can_still_be_reached(tmp_path: Path):
    """A socket's address has room for 108 bytes, a path for more."""
    async with process_rig(tmp_path / ("deep" * 30) / "run") as rig:
        guest = await rig.vmm.boot(rig.workload, "g1", NOBODY)
        assert await ask(guest, "/") == (200, b"hello")
        await rig.vmm.discard("g1")


# Nothing is left.


@pytest.mark.parametrize("cancels", [1, 2, 5])
@pytest.mark.parametrize("stage", ["started", "isolated", "up"])
async def test_a_boot_given_up_at_a_stage_leaves_nothing(
    rig: ProcessRig, monkeypatch: pytest.MonkeyPatch, stage: str, cancels: int
):
    """Whenever its owner gives up, and however often."""
    reached = asyncio.Event()
    report = Launch._report

    async def hanging(launch: Launch) -> str:
        message = await report(launch)
        if stage == "started" or message.startswith(stage):
            reached.set()
            await asyncio.Future()
        return message

    monkeypatch.setattr(Launch, "_report", hanging)
    boot = asyncio.get_running_loop().create_task(rig.vmm.boot(rig.workload, "g1", NOBODY))
    await reached.wait()
    for _ in range(cancels):
        boot.cancel()
        await asyncio.sleep(0)
    with suppress(asyncio.CancelledError):
        await boot
    await rig.vmm.discard("g1")
    assert not rig.left()


async def test_a_discard_given_up_is_taken_up_again(rig: ProcessRig):
    """Cancelled in the middle, then done."""
    await rig.vmm.boot(rig.workload, "g1", NOBODY)
    discard = asyncio.get_running_loop().create_task(rig.vmm.discard("g1"))
    await asyncio.sleep(0)
    discard.cancel()
    with suppress(asyncio.CancelledError):
        await discard
    await rig.vmm.discard("g1")
    assert not rig.left()


@pytest.mark.parametrize("seed", range(20 if is_full() else 4))
@pytest.mark.parametrize(("how", "steps_max"), [("cold", 1), ("warm", 3)])
def test_a_daemon_killed_at_any_time_leaves_no_guest(tmp_path: Path, how: str, steps_max: int, seed: int):
    """SIGKILL gives it no chance to clean up, so the kernel does: while it boots, captures and clones, and later."""
    mark = f"mark-{os.getpid()}-{tmp_path.name}"
    command = [sys.executable, "-m", "node.procvm_daemon", str(tmp_path), mark, how]
    dice = Random(seed)
    with subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        steps = [daemon.stdout.readline() for _ in range(seed % (steps_max + 1))]
        assert not steps or len(processes(marked=mark)) >= 2, "the daemon and its guest"
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(dice.random() * (0.1 if steps else 0.5))
        daemon.kill()
    assert_all_end(lambda: processes(marked=mark))


@pytest.mark.parametrize("promise", PROMISES[:12], ids=lambda promise: promise.__name__)
def test_process_guests_keep_the_contract_on_uvloop(tmp_path: Path, promise: Promise):
    """The loop of production watches descriptors and makes transports in its own way."""

    async def main() -> None:
        async with process_rig(tmp_path / "run") as rig:
            await asyncio.wait_for(promise(rig), 60)

    before = children()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert not children() - before


def processes(*, marked: str) -> list[int]:
    """The pids of all processes of this host that have `marked` as an argument, and are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if marked.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def assert_all_end(those: Callable[[], list[int]], *, within_s: float = 10.0) -> None:
    """Wait for the end of each, and of those that they start meanwhile."""
    while pids := those():
        for pid in pids:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                ended, _, _ = select.select([pidfd], [], [], within_s)
                os.close(pidfd)
                assert ended, f"process {pid} outlives its daemon"
