"""What was seen of a machine, judged: each finding says what is so, what it stops, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum

from msgspec import Struct

from substrate_node.doctor.sight import HostFile, Sight
from substrate_node.fcvm.release import ADVISED, Release

GUEST_MIB_MIN, GUEST_MIB_USUAL = 128, 2048
"""The smallest guest that is worth counting with, and one whose workload says nothing of memory."""
DESCRIPTORS_OF_DAEMON, DESCRIPTORS_OF_GUEST = 128, 8
"""A parked guest costs the daemon five (console, log, process, two listeners), a call another three."""
TASKS_OF_DAEMON, TASKS_OF_GUEST = 64, 3
"""Firecracker has a thread each for the machine, its API and each processor of the guest."""
SPARE_MIB = 64
OLDEST_HOST = (5, 10)
SOCKET_PATH_BYTES_MAX = 107
_ARCHITECTURES = ("x86_64", "aarch64")
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "glusterfs"})
_WANTED_CONTROLLERS = frozenset({"memory", "pids"})


class Kind(StrEnum):
    """What a finding may stop."""

    PROCESS = "process guests"
    MICROVM = "microVMs"


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that was looked at: `says` what is so, `cure` what to do if it is not as it should be."""

    check: str
    says: str
    cure: str = ""
    stops: tuple[Kind, ...] = ()

    @property
    def level(self) -> Level:
        """A problem stops some guests; a warning has a cure all the same."""
        if self.stops:
            return Level.PROBLEM
        return Level.WARNING if self.cure else Level.OK


class Diagnosis(Struct, frozen=True, kw_only=True):
    """All that was found, and whether microVMs, if there can be any, are jailed."""

    findings: tuple[Finding, ...]
    jailed: bool

    def ready_for(self, kind: Kind) -> bool:
        """Whether nothing was found that stops such guests."""
        return not any(kind in finding.stops for finding in self.findings)


def diagnosed(sight: Sight) -> Diagnosis:
    """Judge all of it at once."""
    return Diagnosis(
        findings=tuple(finding for judge in _JUDGES for finding in judge(sight)),
        jailed=_is_jailed(sight),
    )


def _is_jailed(sight: Sight) -> bool:
    return sight.jail != "off" and not sight.jail_objections


def _processor(sight: Sight) -> Iterator[Finding]:
    cpu = sight.processor
    kernel = tuple(int(part) for part in sight.host_kernel.replace("-", ".").split(".")[:2])
    says = f"{cpu.name} ({cpu.arch}), Linux {sight.host_kernel}; bases are restored on the same kind only"
    if cpu.arch not in _ARCHITECTURES:
        yield Finding(
            check="processor",
            says=says,
            cure=f"microVMs need a machine of {' or '.join(_ARCHITECTURES)}",
            stops=(Kind.MICROVM,),
        )
    elif kernel < OLDEST_HOST:
        oldest = ".".join(map(str, OLDEST_HOST))
        yield Finding(check="processor", says=says, cure=f"Firecracker is made for Linux {oldest} or newer: update it")
    else:
        yield Finding(check="processor", says=says)


def _kvm(sight: Sight) -> Iterator[Finding]:
    kvm = sight.kvm

    def stopped(says: str, cure: str) -> Finding:
        return Finding(check="kvm", says=says, cure=cure, stops=(Kind.MICROVM,))

    if not kvm.present:
        yield stopped(f"there is no {kvm.path}", _cure_of_no_kvm(sight))
    elif not kvm.opened.worked:
        yield stopped(
            f"{kvm.path} can't be opened by {sight.user}: {kvm.opened.why_not}",
            f"let {sight.user} use it: `usermod -aG kvm {sight.user}` and a new login, or run as root; "
            f"in a container, hand it in with `--device {kvm.path}`",
        )
    elif kvm.api != 12:  # the only version there ever was
        yield stopped(f"{kvm.path} is no KVM: it tells version {kvm.api}, not 12", "put the real device there")
    elif not kvm.created.worked:
        yield stopped(
            f"KVM makes no virtual machine: {kvm.created.why_not}",
            "stop whatever else uses the processor's virtualization, VirtualBox for one; `dmesg | grep -i kvm` tells",
        )
    elif sight.processor.arch == "x86_64" and not kvm.modules & {"kvm_intel", "kvm_amd"}:
        yield Finding(
            check="kvm",
            says=f"{kvm.path} makes virtual machines, but not with the processor's own virtualization: neither "
            f"kvm_intel nor kvm_amd is there ({', '.join(sorted(kvm.modules)) or 'no module'}). "
            "Such a KVM may run only kernels that were made for it",
            cure="call a workload once to know; if its guest says nothing, use a machine with nested virtualization",
        )
    else:
        yield Finding(
            check="kvm",
            says="a virtual machine was made, and nothing was run in it: only the first call proves that guests run",
        )


def _cure_of_no_kvm(sight: Sight) -> str:
    if sight.processor.arch != "x86_64":
        return "use a machine whose kernel has KVM and was started in the processor's hypervisor mode"
    if sight.processor.virtualizes:
        return "`modprobe kvm_intel` or `modprobe kvm_amd`; in a container, hand it in with `--device /dev/kvm`"
    if sight.processor.emulated:
        return "this is a virtual machine without virtualization of its own: have its host allow nested virtualization"
    return "switch virtualization (VT-x, AMD-V) on in the firmware"


def _firecracker(sight: Sight) -> Iterator[Finding]:
    program = sight.firecracker
    install = f"install release {ADVISED}, or name another place with {sight.prefix}FIRECRACKER_BIN"
    release = _release(program.version.said)
    if not program.version.worked or release is None:
        says = program.version.why_not or f"{program.path} names no release"
        yield Finding(check="firecracker", says=says, cure=install, stops=(Kind.MICROVM,))
    elif (fault := release.fault()) is not None:
        yield Finding(check="firecracker", says=fault, cure=install, stops=(Kind.MICROVM,))
    elif not sight.snapshot_format.worked:
        says = f"{program.path} tells no format of its snapshots: {sight.snapshot_format.why_not}"
        yield Finding(check="firecracker", says=says, cure=install, stops=(Kind.MICROVM,))
    else:
        says = f"release {release}, snapshots of format {sight.snapshot_format.said}"
        yield Finding(check="firecracker", says=says)


def _release(said: str) -> Release | None:
    try:
        return Release.parse(said)
    except ValueError:
        return None


def _jail(sight: Sight) -> Iterator[Finding]:
    setting = f"{sight.prefix}JAILER"
    if sight.jail == "off":
        yield Finding(check="jail", says="microVMs are not jailed", cure=f"unset {setting}, which is off")
    elif not sight.jail_objections:
        yield Finding(check="jail", says="each microVM has a root, a user and namespaces of its own")
    for objection in sight.jail_objections if sight.jail != "off" else ():
        what, _, cure = objection.partition(": ")
        yield Finding(
            check="jail",
            says=f"microVMs can't be jailed: {what}",
            cure=cure or f"run the daemon as root, or do without: {setting}=off",
            stops=(Kind.MICROVM,) if sight.jail == "on" else (),
        )


def _kernel(sight: Sight) -> Iterator[Finding]:
    kernel = sight.kernel
    name = "KERNEL_IMAGE"
    unfit = _unfit(kernel, sight, name)
    if unfit is not None:
        yield Finding(check="kernel", says=unfit[0], cure=unfit[1], stops=(Kind.MICROVM,))
    elif not _bootable(kernel.head, sight.processor.arch):
        yield Finding(
            check="kernel",
            says=f"{kernel.path} is no kernel that every Firecracker can boot",
            cure="use an uncompressed one: the file `vmlinux` of its build (on aarch64 `Image`)",
            stops=(Kind.MICROVM,),
        )
    else:
        yield Finding(check="kernel", says=f"{kernel.path} is a kernel for {sight.processor.arch}")
    if sight.initrd is not None and (unfit := _unfit(sight.initrd, sight, "KERNEL_INITRD")) is not None:
        yield Finding(check="initrd", says=unfit[0], cure=unfit[1], stops=(Kind.MICROVM,))


def _unfit(file: HostFile, sight: Sight, name: str) -> tuple[str, str] | None:
    """What keeps a file from being lent to guests, and what would help."""
    if not file.read.worked:
        return (
            f"{file.path} can't be read: {file.read.why_not}",
            f"put it there, or name another with {sight.prefix}{name}",
        )
    if _is_jailed(sight) and not file.readable_by_all:
        return f"a jailed Firecracker can't read {file.path}", f"`chmod o+r {file.path}`"
    return None


def _bootable(head: bytes, arch: str) -> bool:
    if arch == "aarch64":
        return head[56:60] == b"ARM\x64"
    return head[:4] == b"\x7fELF" and head[18:20] == b"\x3e\x00"


def _cgroups(sight: Sight) -> Iterator[Finding]:
    if not _is_jailed(sight):
        return  # only jailed guests have groups of their own
    found, without = sight.cgroups, "what guests use counts as the daemon's"
    if found.root is None:
        yield Finding(
            check="cgroups",
            says=f"version 2 of control groups is not mounted: {without}",
            cure="start the machine with `systemd.unified_cgroup_hierarchy=1`, or mount it: "
            "`mount -t cgroup2 none /sys/fs/cgroup`",
        )
        return
    missing = _WANTED_CONTROLLERS - found.enabled
    if missing - found.offered:
        yield Finding(
            check="cgroups",
            says=f"{found.root} has no controller for {_listed(missing - found.offered)}: {without}",
            cure="start the machine with `systemd.unified_cgroup_hierarchy=1`; in a container, have them delegated",
        )
    elif not found.writable:
        yield Finding(
            check="cgroups",
            says=f"{found.root} can't be written to: {without}",
            cure="mount it read-write; in a container, run it privileged or have control groups delegated",
        )
    elif missing and found.busy:
        yield Finding(
            check="cgroups",
            says=f"{found.root} has processes of its own, and so no groups with bounds below it: {without}",
            cure=f"before the daemon starts, make a group below {found.root} and move its processes there",
        )
    else:
        yield Finding(check="cgroups", says="memory and tasks of each jailed guest are bounded")


def _storage(sight: Sight) -> Iterator[Finding]:
    found, setting = sight.storage, f"{sight.prefix}STATE_ROOT"
    if not found.usable.worked:
        yield Finding(
            check="state root",
            says=f"{found.path}: {found.usable.why_not}",
            cure=f"mend that, or choose another with {setting}",
            stops=(Kind.PROCESS, Kind.MICROVM),
        )
    elif found.daemon_pid is not None:
        yield Finding(check="state root", says=f"{found.path}, where a daemon runs (pid {found.daemon_pid})")
    else:
        yield Finding(check="state root", says=found.path)
    place = f"{found.path} is on {found.filesystem} with {found.free_mib} MiB free"
    if found.filesystem in _IN_MEMORY:
        jailed = ", where the base of a jailed guest counts as its own, and it is killed" if _is_jailed(sight) else ""
        yield Finding(
            check="disk",
            says=f"{place}: bases and images are kept in memory{jailed}",
            cure=f"name a directory on a disk with {setting}",
        )
    elif found.filesystem in _REMOTE:
        yield Finding(
            check="disk", says=f"{place}, which is another machine's", cure=f"name a local directory with {setting}"
        )
    elif not found.holes.worked:
        yield Finding(
            check="disk",
            says=f"{place}, and keeps no holes ({found.holes.why_not}): a base takes all of its guest's memory",
            cure=f"name a directory on ext4, xfs or btrfs with {setting}",
        )
    elif found.free_mib < GUEST_MIB_USUAL + SPARE_MIB:
        yield Finding(
            check="disk",
            says=f"{place}; a base takes all of its guest's memory while it is made, usually {GUEST_MIB_USUAL} MiB",
            cure=f"make room, or name a larger disk with {setting}",
        )
    else:
        yield Finding(check="disk", says=f"{place}, and it keeps holes")
    if found.longest_socket_bytes > SOCKET_PATH_BYTES_MAX:
        yield Finding(
            check="socket paths",
            says=f"up to {found.longest_socket_bytes} bytes, more than the {SOCKET_PATH_BYTES_MAX} that other programs "
            "can connect to; the daemon takes a shorter way",
        )
    else:
        yield Finding(check="socket paths", says=f"up to {found.longest_socket_bytes} bytes")


def _bounds(sight: Sight) -> Iterator[Finding]:
    bounds = sight.bounds
    by_memory = bounds.guest_memory_mib // GUEST_MIB_MIN
    if by_memory == 0:
        yield Finding(
            check="memory",
            says=f"{bounds.guest_memory_mib} MiB for guests, and a small one has {GUEST_MIB_MIN}",
            cure=f"use a larger machine or container, or say what guests may have with {sight.prefix}MEMORY_MIB",
            stops=(Kind.PROCESS, Kind.MICROVM),
        )
    else:
        yield Finding(
            check="memory", says=f"{bounds.guest_memory_mib} MiB for guests: {by_memory} of {GUEST_MIB_MIN} MiB"
        )
    yield _bound(
        "open files",
        bounds.descriptors,
        (DESCRIPTORS_OF_DAEMON, DESCRIPTORS_OF_GUEST),
        by_memory,
        "`ulimit -n {wanted}` before it, or `LimitNOFILE={wanted}` in its unit",
    )
    yield _bound(
        "processes",
        bounds.processes,
        (TASKS_OF_DAEMON, TASKS_OF_GUEST),
        by_memory,
        "`ulimit -u {wanted}` before it, `TasksMax={wanted}` in its unit, or a larger `--pids-limit` of its container",
    )


def _bound(check: str, bound: int | None, costs: tuple[int, int], by_memory: int, cure: str) -> Finding:
    of_daemon, of_guest = costs
    if bound is None:
        return Finding(check=check, says="no bound")
    guests = max(0, (bound - of_daemon) // of_guest)
    says = f"{bound}: enough for {guests} guests at once"
    if guests >= by_memory:
        return Finding(check=check, says=says)
    return Finding(
        check=check,
        says=f"{says}, and memory is there for {by_memory}",
        cure=cure.format(wanted=of_daemon + of_guest * by_memory),
    )


def _processes(sight: Sight) -> Iterator[Finding]:
    trial = sight.process_trial
    if not trial.worked:
        yield Finding(
            check="process guests",
            says=f"none can be started: {trial.why_not}",
            cure="allow user namespaces: `sysctl user.max_user_namespaces=10000`, and on Ubuntu "
            "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
            stops=(Kind.PROCESS,),
        )
    elif not sight.missing_measures:
        yield Finding(
            check="process guests", says="they get every measure that there is; it is no wall against hostile code"
        )
    for name, why_not, hint in sight.missing_measures:
        yield Finding(
            check="process guests",
            says=f"they lack {name}: {why_not}",
            cure=hint or "what it rests on is named above, or run the daemon on another host",
        )


def _listed(words: frozenset[str]) -> str:
    return " and ".join(sorted(words))


_JUDGES: tuple[Callable[[Sight], Iterator[Finding]], ...] = (
    _processor,
    _kvm,
    _firecracker,
    _jail,
    _kernel,
    _cgroups,
    _storage,
    _bounds,
    _processes,
)
