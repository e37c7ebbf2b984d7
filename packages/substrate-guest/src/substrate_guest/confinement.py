"""What keeps a process from the host, one measure a function; each raises `OSError` where it can't be applied."""

from __future__ import annotations

import os
import resource
import struct

from substrate_guest.syscalls import CLONE_NEWUSER, call, try_call, write

TYPE_CHECKING = False  # importing `typing` would take as long as all that is done here
if TYPE_CHECKING:
    from collections.abc import Iterable

INNER_ID = 1000
"""User and group of the guest as it sees itself."""
DESCRIPTORS_MAX = 4096
PROCESSES_MAX, PROCESSES_OF_CLONES_MAX = 1024, 16_384
"""Of one guest, and of a process that is cloned with all of its clones."""

PR_SET_DUMPABLE, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 23, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPABILITY_VERSION_3 = 0x2008_0522
AF_NETLINK, SOCK_RAW, SOCK_CLOEXEC = 16, 3, 0x8_0000
RTM_NEWLINK, NLM_F_REQUEST, NLM_F_ACK, LOOPBACK, IFF_UP = 16, 1, 4, 1, 1


def volunteer_to_the_oom_killer() -> None:
    """When the host runs out of memory, guests go first."""
    write("/proc/self/oom_score_adj", "1000")


def become(user: int) -> None:
    """Give up root for a user and group that nobody else has."""
    try:
        for capability in bounding_set_now():  # now: it may be that no user namespace follows in which that is allowed
            call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
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


def name_host(name: str) -> None:
    """Have a host name."""
    call("sethostname", name.encode(), len(name.encode()))


def bring_loopback_up() -> None:
    """Let the guest talk to itself; there is no other network. Not by an ioctl, which a filter may refuse already."""
    answer = bytearray(64)
    change = struct.pack(
        "=IHHIIBxHiII", 32, RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0, 0, 0, LOOPBACK, IFF_UP, IFF_UP
    )
    descriptor = call("socket", AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0)
    try:
        os.write(descriptor, change)
        os.readv(descriptor, [answer])
    finally:
        os.close(descriptor)
    (error,) = struct.unpack_from("=i", answer, 16)
    if error:
        raise OSError(-error, os.strerror(-error), "bring lo up")


def limit_resources(processes_max: int | None) -> None:
    """No core dumps, bounded descriptors, and bounded processes; None where others' would count among them."""
    bounds = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: DESCRIPTORS_MAX}
    if processes_max is not None:
        bounds[resource.RLIMIT_NPROC] = processes_max
    for which, most in bounds.items():
        hard = resource.getrlimit(which)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(which, (bound, bound))


def drop_capabilities(bounding_set: Iterable[int] | None = None) -> None:
    """Have none, and never get any; the bounding set is asked for unless it is given."""
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in bounding_set_now() if bounding_set is None else bounding_set:
        call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
    call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))


def bounding_set_now() -> list[int]:
    """The capabilities that a program could still gain."""
    capability, found = 0, []
    while (held := try_call("prctl", PR_CAPBSET_READ, capability, 0, 0, 0)) >= 0:
        if held:
            found.append(capability)
        capability += 1
    return found


def gain_nothing() -> None:
    """Let no program that is started give more privileges than this process has."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def be_opaque() -> None:
    """Let no process of the same user look into this one."""
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
