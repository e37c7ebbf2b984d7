"""Puts itself into namespaces with a file tree of its own and no privileges, and runs a command there.

The node starts it with `argv()`. It adds to every cold start, so it imports little and nothing else of this package.
The process that is started unshares and goes; its twin, a child of the node, becomes the first process of the guest:
it isolates itself, starts the command, reaps orphans and ends when the command does.

Descriptors: 0 is a file with the plan, 1 and 2 the console, 3 and 4 the guest's listening and dialling sockets, 5 a
SEQPACKET socket to the node. On it, fields are parted by tabs: `isolated` and a line per measure with why it was not
applied; `failed` with what and why; `up` once the command runs; `ended` with its wait status. After `isolated` the node
says `go`; if it is gone instead, nothing is run.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False  # importing `typing` would take as long as all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

LISTEN_FD, DIAL_FD, REPORT_FD = 3, 4, 5
INNER_ID = 1000
"""User and group of the guest as it sees itself."""
HOME = "/home/guest"

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
SETTINGS = (
    *("alternatives", "ca-certificates", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types"),
    *("os-release", "pki", "protocols", "services", "ssl"),
)
"""What the guest sees of the host's `/etc`."""
DEVICES = ("null", "zero", "full", "random", "urandom")
WRITABLE = ("/tmp", "/var/tmp", "/dev/shm", "/run", HOME)  # noqa: S108  # the guest's own, on a file system of its own
DESCRIPTORS_MAX = 4096
PROCESSES_MAX = 1024
LINKS_MAX = 40

CLONE_PARENT, CLONE_NEWUSER = 0x8000, 0x1000_0000
NAMESPACES = (
    ("cgroup-namespace", 0x0200_0000),
    ("uts-namespace", 0x0400_0000),
    ("ipc-namespace", 0x0800_0000),
    ("pid-namespace", 0x2000_0000),
    ("network-namespace", 0x4000_0000),
    ("mount-namespace", 0x0002_0000),
)
SIGKILL, SIGPIPE, SIGCHLD, SIGXFSZ = 9, 13, 17, 25  # `signal` is slow to import
CAP_SYS_ADMIN = 21
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 4, 23, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
CAPABILITY_VERSION_3 = 0x2008_0522
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
SHOWN = MS_RDONLY | MS_NOSUID | MS_NODEV
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
BPF_LOAD, BPF_AND, BPF_EQUAL, BPF_AT_LEAST, BPF_RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, DENY, UNKNOWN = 0x7FFF_0000, 0x5_0000 | errno.EPERM, 0x5_0000 | errno.ENOSYS

MACHINES = {
    # audit architecture, clone, ioctl, then: add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd
    "x86_64": (0xC000_003E, 56, 16, (248, 249, 250, 298, 321, 323)),
    "aarch64": (0xC000_00B7, 220, 29, (217, 218, 219, 241, 280, 282)),
}
IO_URING = (425, 426, 427)
X32 = 0x4000_0000
"""Numbers of system calls; from 424 on they are the same on every machine. x86-64 has another set from `X32` on."""
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
AF_INET, SOCK_DGRAM, SOCK_CLOEXEC = 2, 2, 0x8_0000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, which a raw clone must not lose


def argv(python: str = sys.executable) -> tuple[str, ...]:
    """The command that starts this module under `python`; the node appends nothing to it and sends a plan.

    No `-m`: importing the package, or the site packages, would double the time.
    """
    directory, name = os.path.split(os.path.splitext(__file__)[0])  # noqa: PTH122  # pathlib is slow to import
    program = f"import sys; sys.path.append({directory!r}); import {name}; {name}.main()"
    return (python, "-I", "-S", "-c", program)


class Plan:
    """What the node wants: a marshalled dict of these members.

    `measures` names those that must be applied; None means to try each and tell what came of it. `user` is the outer
    user and group that a guest of root becomes. `visible` are the files and directories that the guest sees besides
    the system's, `base` is any directory to build its file tree on, `writable_mib` bounds what it may write. Without a
    `cwd`, the command starts in the guest's home.
    """

    def __init__(self, members: dict[str, object]) -> None:
        self.argv: list[str] = members["argv"]  # type: ignore[assignment]  # the node wrote it a moment ago
        self.env: dict[str, str] = members["env"]  # type: ignore[assignment]
        self.cwd: str | None = members["cwd"]  # type: ignore[assignment]
        self.hostname: str = members["hostname"]  # type: ignore[assignment]
        self.measures: list[str] | None = members["measures"]  # type: ignore[assignment]
        self.user: int = members["user"]  # type: ignore[assignment]
        self.visible: list[str] = members["visible"]  # type: ignore[assignment]
        self.base: str = members["base"]  # type: ignore[assignment]
        self.writable_mib: int = members["writable_mib"]  # type: ignore[assignment]


class NotIsolated(Exception):
    """A measure that must be applied could not be."""


class Measures:
    """The measures to apply, and for each tried one why it was not applied; an empty reason means that it was."""

    def __init__(self, required: list[str] | None) -> None:
        self.outcomes: dict[str, str] = {}
        self._required = required

    def wants(self, name: str) -> bool:
        """Whether `name` is to be applied, or tried."""
        return self._required is None or name in self._required

    def has(self, name: str) -> bool:
        """Whether `name` was applied."""
        return self.outcomes.get(name) == ""

    def apply(self, name: str, action: Callable[..., object], *arguments: object) -> None:
        """Do `action` for the measure `name` if it is wanted; raises `NotIsolated` if it fails and is required."""
        if not self.wants(name):
            return
        try:
            action(*arguments)
        except OSError as error:
            self.outcomes[name] = f"{error.filename or 'it'}: {error.strerror}"
            if self._required is not None:
                raise NotIsolated(f"{name}\t{self.outcomes[name]}") from error
        else:
            self.outcomes[name] = ""

    def complete(self) -> None:
        """Raise `NotIsolated` if a required measure was not even tried, because what it rests on is missing."""
        for name in self._required or ():
            if name not in self.outcomes:
                raise NotIsolated(f"{name}\twhat it rests on is missing")


def main() -> NoReturn:
    """Become a guest according to the plan on descriptor 0."""
    os.closerange(REPORT_FD + 1, 1 << 20)
    for descriptor in (LISTEN_FD, DIAL_FD, REPORT_FD):
        os.set_inheritable(descriptor, descriptor != REPORT_FD)
    with open(0, "rb", closefd=False) as file:
        plan = Plan(marshal.load(file))  # noqa: S302  # from the node, which started this process
    measures = Measures(plan.measures)
    try:
        administers = may_administer()
        enter_namespaces(plan, measures, administers=administers)
        clone_and_leave()
        isolate(plan, measures, administers=administers)
        measures.complete()
        report("isolated\t" + "\n".join(f"{name}\t{why}" for name, why in measures.outcomes.items()))
        if os.read(REPORT_FD, 16) == b"go":
            run(plan, HOME if measures.has("private-files") else "/tmp")  # noqa: S108  # the host's, for want of its own
    except NotIsolated as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'isolation'}\t{error.strerror}")
    os._exit(1)


def report(message: str) -> None:
    """Tell the node; raises `OSError` when it is gone."""
    os.write(REPORT_FD, message.encode(errors="replace"))


def fail(message: str) -> NoReturn:
    """End, and say why if there still is somebody to hear it."""
    try:
        report(f"failed\t{message}")
    finally:
        os._exit(1)


def enter_namespaces(plan: Plan, measures: Measures, *, administers: bool) -> None:
    """Leave what is shared with the host, as far as that takes effect before the guest's first process is made.

    An administrator of the host makes the namespaces as such, so that nobody in the guest has a say in them; anybody
    else needs a user namespace to make the others.
    """
    measures.apply("first-to-die", volunteer_to_the_oom_killer)
    if not administers:
        if os.geteuid() == 0:
            measures.apply("unprivileged-user", become, plan.user)
        measures.apply("user-namespace", enter_user_namespace)
    for name, flag in NAMESPACES:
        measures.apply(name, call, "unshare", flag)


def isolate(plan: Plan, measures: Measures, *, administers: bool) -> None:
    """Make the guest's first process what the command shall inherit."""
    if measures.has("uts-namespace"):
        name = plan.hostname.encode()
        call("sethostname", name, len(name))
    if measures.has("network-namespace"):
        bring_loopback_up()
    if measures.has("mount-namespace"):
        measures.apply("private-files", enter_private_files, plan, measures, administers)
    measures.apply("resource-limits", limit_resources, administers or measures.has("user-namespace"))
    if administers:
        measures.apply("unprivileged-user", become, plan.user)
        measures.apply("user-namespace", enter_user_namespace)
    if measures.has("user-namespace"):
        measures.apply("no-nested-namespaces", forbid_nested_namespaces)
    measures.apply("no-capabilities", drop_capabilities)
    measures.apply("no-new-privileges", call, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    measures.apply("system-call-filter", filter_system_calls)
    measures.apply("dies-with-daemon", call, "prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # a change of user resets it


def run(plan: Plan, home: str) -> NoReturn:
    """Start the command, reap whatever ends, and end when the command does."""
    os.chdir(plan.cwd or home)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.environ["PATH"] = plan.env["PATH"]
    sockets = {"SUBSTRATE_LISTEN_FD": str(LISTEN_FD), "SUBSTRATE_DIAL_FD": str(DIAL_FD)}
    env = {"HOME": home, **plan.env, **sockets}
    command = os.posix_spawnp(plan.argv[0], plan.argv, env, setsigmask=[], setsigdef=[SIGPIPE, SIGXFSZ])
    report("up")
    os.closerange(0, REPORT_FD)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # the command has the same user, and no business in here
    ended, status = os.wait()
    while ended != command:
        ended, status = os.wait()
    report(f"ended\t{status}")
    os._exit(max(os.waitstatus_to_exitcode(status), 1) if status else 0)


# Measures.


def volunteer_to_the_oom_killer() -> None:
    """When the host runs out of memory, guests go first."""
    write("/proc/self/oom_score_adj", "1000")


def become(user: int) -> None:
    """Give up root for a user and group that nobody else has."""
    try:  # noqa: SIM105  # contextlib is slow to import
        drop_bounding_set()  # now, as it may be that no user namespace follows in which it could be dropped
    except PermissionError:
        pass  # `no-capabilities` will tell
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self would stay root's, and with it the maps of users


def enter_user_namespace() -> None:
    """Be user `INNER_ID` in a namespace that knows no other."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", CLONE_NEWUSER)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{INNER_ID} {user} 1")
    write("/proc/self/gid_map", f"{INNER_ID} {group} 1")


def forbid_nested_namespaces() -> None:
    """Capabilities in a namespace of its own making are how a guest would reach the kernel's darker corners."""
    write("/proc/sys/user/max_user_namespaces", "0")


def bring_loopback_up() -> None:
    """Let the guest talk to itself; there is no other network."""
    request = struct.pack("16sH22x", b"lo", 0)
    descriptor = call("socket", AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    try:
        (flags,) = struct.unpack_from("H", fcntl.ioctl(descriptor, SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(descriptor, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | IFF_UP))
    finally:
        os.close(descriptor)


def limit_resources(own_user: bool) -> None:  # noqa: FBT001  # via `apply`
    """No core dumps, bounded descriptors; bounded processes too, unless the daemon's would count among them."""
    bounds = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: DESCRIPTORS_MAX}
    if own_user:
        bounds[resource.RLIMIT_NPROC] = PROCESSES_MAX
    for which, most in bounds.items():
        hard = resource.getrlimit(which)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(which, (bound, bound))


def drop_capabilities() -> None:
    """Have none, and never get any."""
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    drop_bounding_set()
    call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))


def drop_bounding_set() -> None:
    """Leave no capability that a program could gain."""
    capability = 0
    while (held := _libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0)) >= 0:
        if held:
            call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1


def filter_system_calls() -> None:
    """Refuse what the workloads of a guest have no use for, and what the kernel does not keep apart by namespaces.

    The ioctls of network devices are among it: a socket that was made by the host still answers them for the host.
    """
    program = system_call_filter()
    instructions = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, head)


def system_call_filter() -> bytes:
    """The program of the filter; raises `OSError` on a machine whose numbers we do not know.

    Each instruction is (code, jump if true, jump if false, operand); a jump of 0 goes on to the next one.
    """
    try:
        architecture, _, ioctl, denied = MACHINES[os.uname().machine]
    except KeyError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), f"a filter for {error}") from None
    number, machine, second_argument = 0, 4, 24  # where the kernel puts them
    program = [
        *((BPF_LOAD, 0, 0, machine), (BPF_EQUAL, 1, 0, architecture), (BPF_RETURN, 0, 0, UNKNOWN)),
        *((BPF_LOAD, 0, 0, number), (BPF_AT_LEAST, 0, 1, X32), (BPF_RETURN, 0, 0, UNKNOWN)),
    ]
    for refused in (*denied, *IO_URING):
        program += [(BPF_EQUAL, 0, 1, refused), (BPF_RETURN, 0, 0, DENY)]
    program += [
        *((BPF_EQUAL, 0, 3, ioctl), (BPF_LOAD, 0, 0, second_argument), (BPF_AND, 0, 0, 0xFFFF_FF00)),
        *((BPF_EQUAL, 1, 0, 0x8900), (BPF_RETURN, 0, 0, ALLOW), (BPF_RETURN, 0, 0, DENY)),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


# The guest's file tree.


def enter_private_files(plan: Plan, measures: Measures, administers: bool) -> None:  # noqa: FBT001  # via `apply`
    """Build the tree on a file system in memory, make it the root, and let go of the host's."""
    owner = plan.user if administers and measures.wants("unprivileged-user") else os.geteuid()
    inner = INNER_ID if measures.wants("user-namespace") else owner
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("root", plan.base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m,nr_inodes=4096")
    tree = Tree(plan.base)
    for path in ("/dev", "/proc", *WRITABLE):
        tree.make_directory(path)
    make_devices(plan.base)
    make_writable(plan, owner)  # before what is shown, some of which may lie below /tmp
    for path in (*SYSTEM, *(f"/etc/{name}" for name in SETTINGS)):
        if os.path.lexists(path):
            tree.show(path)
    for path in plan.visible:
        tree.show(path)
    tree.write("/etc/passwd", f"guest:x:{inner}:{inner}::{HOME}:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    tree.write("/etc/group", f"guest:x:{inner}:\nnogroup:x:65534:\n")
    tree.write("/etc/hosts", f"127.0.0.1 localhost {plan.hostname}\n::1 localhost\n")
    tree.write("/etc/hostname", f"{plan.hostname}\n")
    tree.write("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
    set_attributes(plan.base, SHOWN, 0)
    if measures.has("pid-namespace"):  # before the root is changed: the kernel wants to see another proc beside it
        measures.apply("own-proc", mount, "proc", f"{plan.base}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(plan.base)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


class Tree:
    """The file tree that the guest will see, while it is being put together at `base`."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._shown: list[str] = []

    def show(self, path: str, links: int = 0) -> None:
        """Let the guest see `path` of the host, and the way there over any symbolic links."""
        way = ""
        names = path.strip("/").split("/")
        for number, name in enumerate(names):
            here = f"{way}/{name}"
            if os.path.islink(here) and links < LINKS_MAX:  # noqa: PTH114  # pathlib is slow to import
                target = os.readlink(here)  # noqa: PTH115
                if not self._is_shown(here) and not os.path.lexists(self._base + here):
                    self.make_directory(way)
                    os.symlink(target, self._base + here)  # noqa: PTH211
                beyond = os.path.join(f"{way}/", target, *names[number + 1 :])  # noqa: PTH118
                self.show(os.path.normpath(beyond), links + 1)
                return
            way = here
        if not self._is_shown(way):
            self._bind(way)

    def _is_shown(self, path: str) -> bool:
        return any(path == shown or path.startswith(shown + "/") for shown in self._shown)

    def _bind(self, path: str) -> None:
        if os.path.isdir(path):  # noqa: PTH112
            self.make_directory(path)
        else:
            self.write(path, "")
        self._shown.append(path)
        mount(path, self._base + path, "", MS_BIND | MS_REC)
        set_attributes(self._base + path, SHOWN, AT_RECURSIVE)

    def make_directory(self, path: str) -> None:
        """Have a directory at `path` of the tree."""
        os.makedirs(self._base + path, exist_ok=True)  # noqa: PTH103

    def write(self, path: str, text: str) -> None:
        """Have a file at `path` of the tree."""
        self.make_directory(path.rpartition("/")[0])
        write(self._base + path, text, os.O_CREAT | os.O_EXCL)


def make_devices(base: str) -> None:
    """The few devices that programs expect, and the links beside them."""
    mount("dev", f"{base}/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k,nr_inodes=64")
    for name in DEVICES:
        write(f"{base}/dev/{name}", "", os.O_CREAT | os.O_EXCL)
        mount(f"/dev/{name}", f"{base}/dev/{name}", "", MS_BIND)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{base}/dev/{name}")  # noqa: PTH211
    os.mkdir(f"{base}/dev/shm")  # noqa: PTH102, S108
    set_attributes(f"{base}/dev", MS_RDONLY, 0)


def make_writable(plan: Plan, owner: int) -> None:
    """One file system in memory behind all places that the guest may write, so that one bound holds for them all."""
    whole = plan.base + WRITABLE[0]
    options = f"mode=755,size={plan.writable_mib}m,nr_inodes={plan.writable_mib * 256}"
    mount("writable", whole, "tmpfs", MS_NOSUID | MS_NODEV, options)
    for number, path in enumerate(WRITABLE):
        os.mkdir(f"{whole}/{number}")  # noqa: PTH102
        os.chown(f"{whole}/{number}", owner, owner)
        os.chmod(f"{whole}/{number}", 0o700 if path == HOME else 0o1777)  # noqa: PTH101
    for number, path in reversed(tuple(enumerate(WRITABLE))):  # the first one last: it hides the whole
        mount(f"{whole}/{number}", plan.base + path, "", MS_BIND)


# System calls.


def call(name: str, *arguments: object) -> int:
    """Call the C library; raises `OSError` with the call's name as its `filename`."""
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    return result


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount; raises `OSError` that names the target."""
    try:
        call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode() or None)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"mount {source} as {target}") from None


def set_attributes(path: str, attributes: int, flags: int) -> None:
    """Add mount attributes (the first four have the values of the MS flags), to all mounts below with AT_RECURSIVE."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    try:
        call("syscall", *map(ctypes.c_long, (SYS_MOUNT_SETATTR, AT_FDCWD)), path.encode(), flags, wanted, len(wanted))
    except OSError as error:
        raise OSError(error.errno, error.strerror, "mount_setattr (Linux 5.12 or later)") from None


def write(path: str, text: str, flags: int = 0) -> None:
    """Write a small file in one call."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def may_administer() -> bool:
    """Whether this process may make namespaces without a user namespace around them."""
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123
        effective = next(line for line in file if line.startswith(b"CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_SYS_ADMIN & 1)


def clone_and_leave() -> None:
    """Return in a twin that is the node's child and, with a pid namespace, its first process; this one exits."""
    number = MACHINES.get(os.uname().machine, MACHINES["aarch64"])[1]  # which newer machines share
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    twin = _libc.syscall(*map(ctypes.c_long, (number, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0)))
    if twin == 0:
        python.PyOS_AfterFork_Child()
        return
    error = ctypes.get_errno()
    python.PyOS_AfterFork_Parent()
    if twin < 0:
        raise OSError(error, os.strerror(error), "clone")
    report(f"pid\t{twin}")
    os._exit(0)
