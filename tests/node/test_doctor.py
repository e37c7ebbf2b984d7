"""What is found out about a machine, and what is made of it: every finding names its cure, and all are told at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from node.fcvm.rig import Double
from real_parts import needs
from substrate_guest import isolation
from substrate_node.doctor import Diagnosis, Finding, Kind, Level, Sight, diagnosed, examined
from substrate_node.doctor.sight import (
    Bounds,
    ControlGroups,
    HostFile,
    Kvm,
    Processor,
    Program,
    Storage,
    Tried,
)
from substrate_node.state import locked_state_root

ELF = b"\x7fELF" + bytes(14) + b"\x3e\x00" + bytes(44)
ARM_IMAGE = bytes(56) + b"ARM\x64" + bytes(4)
FAILED = Tried(why_not="Permission denied (EACCES)")

SOUND = Sight(
    prefix="FC_INVOKE_",
    user="root",
    host_kernel="6.12.9+bpo-amd64",
    processor=Processor(arch="x86_64", name="AMD EPYC", virtualizes=True, emulated=False),
    kvm=Kvm(
        path="/dev/kvm", present=True, opened=Tried(), api=12, created=Tried(), modules=frozenset({"kvm", "kvm_amd"})
    ),
    firecracker=Program(path="/opt/fc/firecracker", version=Tried(said="Firecracker v1.17.0\n\nbye")),
    snapshot_format=Tried(said="v12.0.0"),
    jail="auto",
    jail_objections=(),
    kernel=HostFile(path="/opt/fc/vmlinux", read=Tried(), head=ELF, readable_by_all=True),
    initrd=None,
    cgroups=ControlGroups(root="/sys/fs/cgroup", offered=frozenset({"cpu", "memory", "pids"}), writable=True),
    storage=Storage(
        path="/var/lib/fc-invoke",
        usable=Tried(),
        daemon_pid=None,
        filesystem="ext4",
        free_mib=90_000,
        holes=Tried(),
        longest_socket_bytes=93,
    ),
    bounds=Bounds(descriptors=65_536, processes=None, guest_memory_mib=30_000),
    process_trial=Tried(),
    missing_measures=(),
)
"""A machine with nothing to complain of."""


def sight(part: str = "", **members: Any) -> Sight:
    """The sound machine with other members, of itself or of one part."""
    return replace(SOUND, **({part: replace(getattr(SOUND, part), **members)} if part else members))


def of(check: str, diagnosis: Diagnosis) -> list[Finding]:
    """What was found about one thing."""
    return [finding for finding in diagnosis.findings if finding.check == check]


def test_a_sound_machine_is_ready_for_everything():
    """And each thing that was looked at is told with what was seen."""
    diagnosis = diagnosed(SOUND)
    assert {finding.level for finding in diagnosis.findings} == {Level.OK}
    assert diagnosis.jailed
    assert all(diagnosis.ready_for(kind) for kind in Kind)


NO_MICROVMS: list[tuple[Sight, str, str]] = [
    (sight("kvm", present=False), "kvm", "modprobe"),
    (
        sight(kvm=replace(SOUND.kvm, present=False), processor=replace(SOUND.processor, virtualizes=False)),
        "kvm",
        "in the firmware",
    ),
    (
        sight(
            kvm=replace(SOUND.kvm, present=False),
            processor=replace(SOUND.processor, virtualizes=False, emulated=True),
        ),
        "kvm",
        "nested virtualization",
    ),
    (sight("kvm", opened=FAILED), "kvm", "usermod -aG kvm root"),
    (sight("kvm", api=11), "kvm", "the real device"),
    (sight("kvm", created=Tried(why_not="Device or resource busy (EBUSY)")), "kvm", "VirtualBox"),
    (sight("processor", arch="riscv64"), "processor", "x86_64 or aarch64"),
    (sight("firecracker", version=FAILED), "firecracker", "FC_INVOKE_FIRECRACKER_BIN"),
    (sight("firecracker", version=Tried(said="busybox")), "firecracker", "1.16.2"),
    (sight("firecracker", version=Tried(said="Firecracker v1.16.0")), "firecracker", "1.16.2"),
    (sight("firecracker", version=Tried(said="Firecracker v1.13.1")), "firecracker", "1.16.2"),
    (sight(snapshot_format=FAILED), "firecracker", "1.16.2"),
    (sight("kernel", read=FAILED), "kernel", "FC_INVOKE_KERNEL_IMAGE"),
    (sight("kernel", readable_by_all=False), "kernel", "chmod o+r /opt/fc/vmlinux"),
    (sight("kernel", head=b"\x1f\x8b" + bytes(62)), "kernel", "uncompressed"),
    (sight("kernel", head=ARM_IMAGE), "kernel", "uncompressed"),
    (sight(initrd=HostFile(path="/initrd", read=FAILED)), "initrd", "FC_INVOKE_KERNEL_INITRD"),
    (sight(jail="on", jail_objections=("only root can jail them",)), "jail", "FC_INVOKE_JAILER=off"),
]


@pytest.mark.parametrize(("seen", "check", "cure"), NO_MICROVMS)
def test_what_makes_microvms_impossible_is_named_with_its_cure(seen: Sight, check: str, cure: str):
    """And stops nothing else."""
    diagnosis = diagnosed(seen)
    (found,) = of(check, diagnosis)
    assert found.level is Level.PROBLEM
    assert cure in found.cure
    assert not diagnosis.ready_for(Kind.MICROVM)
    assert diagnosis.ready_for(Kind.PROCESS)


WARNINGS: list[tuple[Sight, str, str]] = [
    (sight("kvm", modules=frozenset({"kvm", "kvm_pvm"})), "kvm", "call a workload once"),
    (sight(host_kernel="4.19.0-26-amd64"), "processor", "5.10"),
    (sight(jail="off"), "jail", "unset FC_INVOKE_JAILER"),
    (sight(jail_objections=("there is no /opt/fc/jailer: install it",)), "jail", "install it"),
    (sight(cgroups=ControlGroups(root=None)), "cgroups", "mount -t cgroup2"),
    (sight("cgroups", offered=frozenset({"memory"})), "cgroups", "systemd.unified_cgroup_hierarchy=1"),
    (sight("cgroups", writable=False), "cgroups", "read-write"),
    (sight("cgroups", busy=True), "cgroups", "move its processes"),
    (sight("storage", filesystem="tmpfs"), "disk", "FC_INVOKE_STATE_ROOT"),
    (sight("storage", filesystem="nfs4"), "disk", "FC_INVOKE_STATE_ROOT"),
    (sight("storage", holes=Tried(why_not="1048576 zeros took 1048576 bytes")), "disk", "ext4"),
    (sight("storage", free_mib=2111), "disk", "make room"),
    (sight("bounds", descriptors=1024), "open files", "LimitNOFILE=2000"),
    (sight("bounds", processes=512), "processes", "ulimit -u 766"),
    (sight(missing_measures=(("own-proc", "Operation not permitted", "unmask /proc"),)), "process guests", "unmask"),
    (sight(missing_measures=(("own-proc", "Operation not permitted", ""),)), "process guests", "another host"),
]


@pytest.mark.parametrize(("seen", "check", "cure"), WARNINGS)
def test_what_is_less_than_good_is_a_warning_with_its_cure(seen: Sight, check: str, cure: str):
    """Guests run all the same."""
    diagnosis = diagnosed(seen)
    (found,) = of(check, diagnosis)
    assert found.level is Level.WARNING
    assert cure in found.cure
    assert all(diagnosis.ready_for(kind) for kind in Kind)


@pytest.mark.parametrize(
    ("seen", "check"),
    [
        (sight("storage", usable=Tried(why_not="it belongs to uid 7")), "state root"),
        (sight("bounds", guest_memory_mib=100), "memory"),
    ],
)
def test_what_no_guest_can_do_without_stops_both_kinds(seen: Sight, check: str):
    """A place to be, and memory."""
    diagnosis = diagnosed(seen)
    assert of(check, diagnosis)[0].cure
    assert not any(diagnosis.ready_for(kind) for kind in Kind)


def test_process_guests_can_be_impossible_where_microvms_are_not():
    """The cure names what forbids them most often."""
    diagnosis = diagnosed(sight(process_trial=Tried(why_not="unshare: Operation not permitted")))
    assert "user.max_user_namespaces" in of("process guests", diagnosis)[0].cure
    assert [diagnosis.ready_for(kind) for kind in (Kind.PROCESS, Kind.MICROVM)] == [False, True]


def test_a_known_bad_release_is_called_by_its_name():
    """1.16.0 would lose the vsock of restored guests."""
    (found,) = of("firecracker", diagnosed(sight("firecracker", version=Tried(said="Firecracker v1.16.0"))))
    assert "Firecracker 1.16.0 is broken" in found.says


def test_a_jail_on_a_disk_in_memory_is_warned_of():
    """There a capture counts as the guest's memory, and the kernel ends it."""
    in_memory = sight("storage", filesystem="tmpfs")
    assert "it is killed" in of("disk", diagnosed(in_memory))[0].says
    assert "it is killed" not in of("disk", diagnosed(replace(in_memory, jail="off")))[0].says


def test_making_a_machine_is_not_taken_for_running_one():
    """It says what it does not prove."""
    (found,) = of("kvm", diagnosed(SOUND))
    assert "nothing was run in it" in found.says


def test_an_image_for_arm_boots_there():
    """And an ELF does not."""
    arm = replace(SOUND.processor, arch="aarch64", virtualizes=False)
    assert diagnosed(sight(processor=arm, kernel=replace(SOUND.kernel, head=ARM_IMAGE))).ready_for(Kind.MICROVM)
    assert not diagnosed(sight(processor=arm)).ready_for(Kind.MICROVM)


def test_long_paths_of_sockets_are_told_and_stop_nothing():
    """The daemon reaches them another way; somebody with `curl` does not."""
    (found,) = of("socket paths", diagnosed(sight("storage", longest_socket_bytes=200)))
    assert (found.level, "200 bytes" in found.says) == (Level.OK, True)


def test_everything_that_is_wrong_is_told_at_once():
    """Nobody mends a machine one message at a time."""
    wrong = sight(
        kvm=replace(SOUND.kvm, present=False),
        firecracker=replace(SOUND.firecracker, version=FAILED),
        kernel=replace(SOUND.kernel, read=FAILED),
        storage=replace(SOUND.storage, filesystem="tmpfs"),
        jail_objections=("there is no jailer: install it", "too few users"),
        process_trial=FAILED,
    )
    assert [finding.check for finding in diagnosed(wrong).findings if finding.cure] == [
        *("kvm", "firecracker", "jail", "jail", "kernel", "disk", "process guests")
    ]


async def look(root: Path, double: Double, **changes: Any) -> Sight:
    """See this very machine, with the double in Firecracker's place."""
    rules = replace(double.rules(), **changes)
    return await examined(rules, root, memory_mib=1000, prefix="FC_INVOKE_", guest_argv=isolation.argv())


@needs("user-namespaces")
async def test_this_very_machine_is_seen_as_a_daemon_would_meet_it(tmp_path: Path):
    """Nothing of it is changed: the state root is not even made."""
    double = Double(tmp_path / "bin")
    seen = await look(tmp_path / "a" / "state", double)
    assert seen.firecracker.version.said.startswith("Firecracker v1.17.0")
    assert seen.snapshot_format == Tried(said="v12.0.0")
    assert seen.kernel.head == b"a kernel"
    assert seen.storage.usable == Tried()
    assert seen.storage.free_mib > 0
    assert seen.storage.longest_socket_bytes > len(str(tmp_path))
    assert seen.bounds.guest_memory_mib == 1000
    assert seen.process_trial == Tried()
    assert seen.processor.name
    assert os.listdir(tmp_path) == ["bin"]  # noqa: PTH208  # names are all that is wanted
    assert of("kernel", diagnosed(seen))[0].level is Level.PROBLEM


async def test_a_device_that_is_no_kvm_and_programs_that_are_missing_are_seen(tmp_path: Path):
    """Each attempt has its own outcome; none ends the look."""
    double = Double(tmp_path / "bin")
    seen = await look(tmp_path, double, firecracker=Path("/nowhere"), kvm=Path(os.devnull), initrd=Path("/no/initrd"))
    assert "No such file" in seen.firecracker.version.why_not
    assert not seen.snapshot_format.worked
    assert (seen.kvm.present, seen.kvm.opened.worked, seen.kvm.created.worked) == (True, True, False)
    assert "ENOENT" in seen.initrd.read.why_not
    gone = await look(tmp_path, double, kvm=tmp_path / "kvm")
    assert (gone.kvm.present, gone.kvm.opened.worked) == (False, False)


async def test_a_state_root_is_seen_for_what_it_is(tmp_path: Path):
    """Open to others, held by a daemon, or impossible to make."""
    double, root = Double(tmp_path / "bin"), tmp_path / "state"
    root.mkdir(mode=0o755)
    assert "chmod 700" in (await look(root, double)).storage.usable.why_not
    root.chmod(0o700)
    with locked_state_root(root, boot_id="b", setting="S"):
        assert (await look(root, double)).storage.daemon_pid == os.getpid()
    assert (await look(root, double)).storage.daemon_pid is None
    (tmp_path / "file").touch()
    assert "can't be made" in (await look(tmp_path / "file" / "state", double)).storage.usable.why_not


@needs("root")
async def test_every_reason_against_a_jail_is_told_at_once(tmp_path: Path):
    """The jailer that is missing, and the one of another release."""
    double = Double(tmp_path / "bin")
    assert (await look(tmp_path, double, jail="on")).jail_objections == ()
    double.jailer.write_text("#!/bin/sh\necho Jailer v1.2.3\n")
    assert "release 1.2.3" in "".join((await look(tmp_path, double, jail="on")).jail_objections)
    double.jailer.unlink()
    assert "there is no" in "".join((await look(tmp_path, double, jail="on")).jail_objections)
