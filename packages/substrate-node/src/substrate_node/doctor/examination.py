"""A look at this machine: everything is tried as a daemon would, and nothing of it is changed."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import pwd
import resource
import tempfile
from contextlib import suppress
from pathlib import Path

from substrate_node.doctor.sight import Bounds, ControlGroups, HostFile, Kvm, Processor, Program, Sight, Storage, Tried
from substrate_node.fcvm.jail import readable_by_all, unified_cgroups
from substrate_node.fcvm.outfit import MicroVmRules, answer, jail_objections
from substrate_node.fcvm.release import Release
from substrate_node.fcvm.sparse import settle
from substrate_node.memory import default_memory_mib
from substrate_node.procvm import ProcessVmm
from substrate_node.state import StateRootUnusable, refuse_shared
from substrate_node.vmm import EGRESS_PORT, VmmError

_KVM_GET_API_VERSION, _KVM_CREATE_VM = 0xAE00, 0xAE01
_HEAD_BYTES = 64
_TRIAL_BYTES = 1 << 20
_GUEST_ID_LIKE = "inv-0123456789abcdef"


async def examined(
    rules: MicroVmRules, state_root: Path, *, memory_mib: int | None, prefix: str, guest_argv: tuple[str, ...]
) -> Sight:
    """See what a daemon with these settings would meet; `guest_argv` starts a process guest (see `ProcessVmm`).

    Takes about a second: two process guests are started. Call it on the loop's thread.
    """
    version = await _said(rules.firecracker, "--version")
    cpu = _cpu()
    trial, missing = await _process_trial(guest_argv)
    return Sight(
        prefix=prefix,
        user=_user(),
        host_kernel=platform.release(),
        processor=cpu,
        kvm=_kvm(rules.kvm),
        firecracker=Program(path=str(rules.firecracker), version=version),
        snapshot_format=_first_word(await _said(rules.firecracker, "--snapshot-version")),
        jail=rules.jail,
        jail_objections=tuple(await jail_objections(rules, _release(version.said))) if rules.jail != "off" else (),
        kernel=_file(rules.kernel),
        initrd=_file(rules.initrd) if rules.initrd is not None else None,
        cgroups=_cgroups(rules.cgroup_root or unified_cgroups()),
        storage=_storage(state_root, rules.firecracker.name),
        bounds=Bounds(
            descriptors=_bound(resource.RLIMIT_NOFILE),
            processes=_tasks(),
            guest_memory_mib=default_memory_mib() if memory_mib is None else memory_mib,
        ),
        process_trial=trial,
        missing_measures=missing,
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"


def _cpu() -> Processor:
    about: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        about[name.strip()] = value.strip()
    flags = set(about.get("flags", "").split())
    return Processor(
        arch=platform.machine(),
        name=about.get("model name") or about.get("CPU part") or "an unnamed processor",
        virtualizes=bool(flags & {"vmx", "svm"}),
        emulated="hypervisor" in flags,
    )


def _kvm(path: Path) -> Kvm:
    modules = frozenset(each.name for each in Path("/sys/module").glob("kvm*"))
    api, opened, created = None, Tried(), Tried(why_not="it was not opened")
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        opened = Tried(why_not=_why(error))
    else:
        try:
            api = fcntl.ioctl(device, _KVM_GET_API_VERSION, 0)
            os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
            created = Tried()
        except OSError as error:
            created = Tried(why_not=_why(error))
        finally:
            os.close(device)
    return Kvm(path=str(path), present=path.exists(), opened=opened, api=api, created=created, modules=modules)


async def _said(program: Path, question: str) -> Tried:
    try:
        return Tried(said=await answer(program, question))
    except VmmError as error:
        return Tried(why_not=str(error))


def _first_word(tried: Tried) -> Tried:
    return Tried(said=tried.said.split()[0]) if tried.worked else tried


def _release(said: str) -> Release | None:
    try:
        return Release.parse(said)
    except ValueError:
        return None


def _file(path: Path) -> HostFile:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return HostFile(path=str(path), read=Tried(), head=head, readable_by_all=readable_by_all(path))
    except OSError as error:
        return HostFile(path=str(path), read=Tried(why_not=_why(error)))


def _cgroups(root: Path | None) -> ControlGroups:
    if root is None:
        return ControlGroups(root=None)
    first = not (root / "cgroup.type").exists()  # the machine's own root has no such file, and may have both
    return ControlGroups(
        root=str(root),
        offered=frozenset(_text(root / "cgroup.controllers").split()),
        enabled=frozenset(_text(root / "cgroup.subtree_control").split()),
        writable=os.access(root, os.W_OK) and os.access(root / "cgroup.subtree_control", os.W_OK),
        busy=not first and bool(_text(root / "cgroup.procs")),
    )


def _storage(root: Path, firecracker: str) -> Storage:
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    found = os.statvfs(place)
    longest = root.absolute() / "run" / _GUEST_ID_LIKE / firecracker / _GUEST_ID_LIKE / "root" / f"v.sock_{EGRESS_PORT}"
    return Storage(
        path=str(root),
        usable=_usable(root, place),
        daemon_pid=_holder(root / "lock"),
        filesystem=_filesystem(place),
        free_mib=found.f_bavail * found.f_frsize // 2**20,
        holes=_holes(place),
        longest_socket_bytes=len(os.fsencode(longest)),
    )


def _usable(root: Path, place: Path) -> Tried:
    """Whether the state root is or can be made what a daemon takes; `place` is what there is of its path."""
    if place != root.absolute():
        can = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
        return Tried() if can else Tried(why_not=f"it can't be made in {place}")
    try:
        refuse_shared(root, "the state root")
    except StateRootUnusable as error:
        return Tried(why_not=str(error))
    return Tried()


def _holder(lock: Path) -> int | None:
    """The process that holds the lock of a state root; the lock is not tried, which a starting daemon could meet."""
    with suppress(OSError):
        inode = str(lock.stat().st_ino)
        for fields in map(str.split, _text(Path("/proc/locks")).splitlines()):
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return int(fields[4])
    return None


def _filesystem(place: Path) -> str:
    """The kind of file system that a directory is on, as the table of mounts calls it."""
    kinds: dict[Path, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kinds[Path(before.split()[4])] = after.split()[0]  # of mounts upon each other the last one counts
    place = place.resolve()
    return next(kinds[point] for point in (place, *place.parents) if point in kinds)


def _holes(place: Path) -> Tried:
    """Whether what a file has of zeros can be given back to the disk; the file has no name, and goes at once."""
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(bytes(_TRIAL_BYTES))
            settle(Path(f"/proc/self/fd/{file.fileno()}"))
            taken = os.fstat(file.fileno()).st_blocks * 512
    except OSError as error:
        return Tried(why_not=_why(error))
    return Tried() if taken < _TRIAL_BYTES // 2 else Tried(why_not=f"{_TRIAL_BYTES} zeros took {taken} bytes")


def _bound(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _tasks() -> int | None:
    """The least number of processes that the user and the control group may have; root's user has no bound."""
    bounds = [_bound(resource.RLIMIT_NPROC) if os.geteuid() != 0 else None]
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "pids" in controllers.split(","):
            top = Path("/sys/fs/cgroup") / controllers
            groups = (top / path.lstrip("/"), top)
            bounds += [int(said) for group in groups if (said := _text(group / "pids.max")).isdigit()]
    return min((bound for bound in bounds if bound is not None), default=None)


async def _process_trial(guest_argv: tuple[str, ...]) -> tuple[Tried, tuple[tuple[str, str, str], ...]]:
    """Start the guests that tell what keeps process guests from this machine."""
    with tempfile.TemporaryDirectory(prefix="fc-invoke-doctor-") as run:
        try:
            report = await ProcessVmm(Path(run), guest_argv=guest_argv).probe()
        except VmmError as error:
            return Tried(why_not=str(error)), ()
    return Tried(), tuple((measure.name, measure.why_not, measure.hint) for measure in report.missing)


def _why(error: OSError) -> str:
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
