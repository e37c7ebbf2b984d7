"""Which system calls a guest may make, as programs for the kernel's filter.

A list of what is refused, with a ceiling: what is not named is allowed up to the newest call that was looked at when
the list was written, and everything newer does not exist. An ADR says why it is no list of what is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from substrate_guest.syscalls import call

TYPE_CHECKING = False  # importing `typing` would take as long as the rest
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Instruction = tuple[int, int, int, int]
    Verdict = int | str

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16
"""Where the kernel puts them; an argument has 8 bytes, the lower half first on these machines."""
ALLOW, ERROR = 0x7FFF_0000, 0x5_0000
DENY, UNKNOWN, NO_FAMILY = ERROR | errno.EPERM, ERROR | errno.ENOSYS, ERROR | errno.EAFNOSUPPORT
SET_MODE_FILTER = 1

MACHINES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
CEILING = 467
"""The first call that nobody has looked at."""
X32 = 0x4000_0000
"""x86-64 has another set of calls from here on; the ceiling is far below."""

NUMBERS = {  # x86-64, AArch64 (None: there is no such call)
    "_sysctl": (156, None),
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "create_module": (174, None),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fcntl": (72, 25),
    "finit_module": (313, 273),
    "get_kernel_syms": (177, None),
    "init_module": (175, 105),
    "inotify_add_watch": (254, 27),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "query_module": (178, None),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "sysfs": (139, None),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "ustat": (136, None),
    "vhangup": (153, 58),
    # from 424 on, all machines agree
    "clone3": (435, 435),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "pidfd_getfd": (438, 438),
    "quotactl_fd": (443, 443),
    "seccomp": (317, 277),
}
NAMESPACING = {
    "chroot", "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr", "move_mount", "open_tree",
    "pivot_root", "setdomainname", "sethostname", "setns", "umount2", "unshare",
}  # fmt: skip
"""What making a namespace and furnishing it takes."""
LOOKED_INTO = {"clone", "fcntl", "ioctl", "socket", "socketpair"}
"""Calls whose arguments decide."""
ABSENT = {"clone3", "inotify_add_watch", "inotify_init", "inotify_init1"}
"""As on a kernel without them, so that programs do without: `clone3`, whose arguments are out of a filter's sight (C
libraries then use `clone`), and watching files, which would tell a guest who on the host uses what it may read."""
CORNERS = NUMBERS.keys() - NAMESPACING - LOOKED_INTO - ABSENT - {"seccomp"}
"""Corners of the kernel that no workload needs: other processes' memory, keys, modules, clocks, io_uring, BPF, ..."""

ANY_NAMESPACE = 0x7E02_0000
"""Flags of `clone`: cgroup, UTS, IPC, user, PID, network, mount."""
NETDEVICES, MASK = 0x8900, 0xFFFF_FF00
SET_LEASE, NOTIFY = 1024, 1026
"""Of `fcntl`: to hold up whoever opens a file, and to hear of it."""
FAMILIES = (1, 2, 10)
"""Unix, IPv4 and IPv6. Others have a history of holes, and VSOCK knows no namespaces: it leads to other machines."""
NETLINK, ROUTE = 16, 0


def guests_filter() -> bytes:
    """The filter of a guest: neither the kernel's corners nor any namespace of its own. Raises `OSError`."""
    return _program({**_corners(), **_namespaces()}, whole=True)


def zygotes_filter() -> bytes:
    """The filter of a process that is to be cloned: it, and what inherits it, may still make namespaces.

    Raises `OSError`.
    """
    return _program(_corners(), whole=True)


def clones_filter() -> bytes:
    """What a clone adds to the filter of its zygote, so that both together are a guest's. Raises `OSError`."""
    return _program(_namespaces(), whole=False)


class Filter:
    """A program where the kernel can read it; `install` may be called in any process that was forked since."""

    def __init__(self, program: bytes) -> None:
        self._instructions = ctypes.create_string_buffer(program)
        self._head = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(self._instructions))
        self._call = _numbers()["seccomp"]

    def install(self) -> None:
        """Filter this thread and all that it will start, for good. Raises `OSError`."""
        call("syscall", *map(ctypes.c_long, (self._call, SET_MODE_FILTER, 0)), self._head)


def _corners() -> dict[str, Verdict]:
    return {
        **dict.fromkeys(CORNERS, DENY),
        **dict.fromkeys(ABSENT, UNKNOWN),
        "fcntl": "fcntl",
        "ioctl": "ioctl",
        "socket": "socket",
        "socketpair": "socket",
    }


def _namespaces() -> dict[str, Verdict]:
    return {**dict.fromkeys(NAMESPACING, DENY), "clone": "clone"}


def _numbers() -> dict[str, int]:
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), f"a filter for {machine}")
    column = list(MACHINES).index(machine)
    return {name: number for name, both in NUMBERS.items() if (number := both[column]) is not None}


def _program(verdicts: Mapping[str, Verdict], *, whole: bool) -> bytes:
    """Each instruction is (code, jump if true, jump if false, operand); a jump of 0 goes on to the next one.

    Only a `whole` one asks for the machine: another filter of this process has.
    """
    numbers = _numbers()
    singles = sorted((numbers[name], verdict) for name, verdict in verdicts.items() if name in numbers)
    program = _tree(_ranges(singles))
    if whole:
        machine = MACHINES[os.uname().machine]
        program = [
            (LOAD, 0, 0, MACHINE),
            (EQUAL, 1, 0, machine),
            (RETURN, 0, 0, UNKNOWN),
            (LOAD, 0, 0, NUMBER),
            *program,
        ]
    else:
        program = [(LOAD, 0, 0, NUMBER), *program]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _ranges(singles: Iterable[tuple[int, Verdict]]) -> list[tuple[int, Verdict]]:
    """Where each verdict begins to hold, from 0 on."""
    found: list[tuple[int, Verdict]] = [(0, ALLOW)]
    for number, verdict in [*singles, (CEILING, UNKNOWN)]:
        if found[-1][0] == number:
            found.pop()
        if not found or found[-1][1] != verdict:
            found.append((number, verdict))
        if number < CEILING:
            found.append((number + 1, ALLOW))
    return found


def _tree(ranges: Sequence[tuple[int, Verdict]]) -> list[Instruction]:
    """Search for the range of the number that is loaded: half of what is left with each step."""
    if len(ranges) == 1:
        return _leaf(ranges[0][1])
    middle = len(ranges) // 2
    below, above = _tree(ranges[:middle]), _tree(ranges[middle:])
    return [(AT_LEAST, len(below), 0, ranges[middle][0]), *below, *above]


def _leaf(verdict: Verdict) -> list[Instruction]:
    """The end of the search; a call whose arguments decide has them looked into."""
    allow, deny, no_family = [(RETURN, 0, 0, ALLOW)], [(RETURN, 0, 0, DENY)], [(RETURN, 0, 0, NO_FAMILY)]
    if verdict == "clone":
        return [(LOAD, 0, 0, ARGUMENTS), (AND, 0, 0, ANY_NAMESPACE), (EQUAL, 0, 1, 0), *allow, *deny]
    if verdict == "fcntl":
        return [(LOAD, 0, 0, ARGUMENTS + 8), (EQUAL, 2, 0, SET_LEASE), (EQUAL, 1, 0, NOTIFY), *allow, *deny]
    if verdict == "ioctl":  # a socket that was made by the host still answers these for the host
        return [(LOAD, 0, 0, ARGUMENTS + 8), (AND, 0, 0, MASK), (EQUAL, 0, 1, NETDEVICES), *deny, *allow]
    if verdict == "socket":
        families = [(EQUAL, len(FAMILIES) - number + 3, 0, family) for number, family in enumerate(FAMILIES)]
        netlink = [(EQUAL, 0, 2, NETLINK), (LOAD, 0, 0, ARGUMENTS + 16), (EQUAL, 1, 0, ROUTE)]
        return [(LOAD, 0, 0, ARGUMENTS), *families, *netlink, *no_family, *allow]
    assert isinstance(verdict, int)
    return [(RETURN, 0, 0, verdict)]
