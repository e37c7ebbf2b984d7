"""System calls that Python has no function for. It imports little: every cold start waits for it."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442

CLONE_PIDFD, CLONE_PARENT, CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID = 0x1000, 0x8000, 0x20_0000, 0x100_0000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
SYS_CLONE = {"x86_64": 56, "aarch64": 220}
"""From number 424 on, all machines agree; the numbers before are the machine's own."""
SIGCHLD = 17

PR_GET_TID_ADDRESS = 40

_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, which a raw clone must not lose


def call(name: str, *arguments: object) -> int:
    """Call the C library; raises `OSError` with the call's name as its `filename`."""
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    return result


def try_call(name: str, *arguments: object) -> int:
    """Call the C library; a failure is a negative result."""
    return int(getattr(_libc, name)(*arguments))


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


def fork(flags: int, *, thread_id: int = 0) -> tuple[int, int]:
    """Fork this process, which has one thread, with clone's `flags`: the child's pid (0 in it), a pidfd if asked for.

    `thread_id` is where the C library keeps the id of this thread, for the kernel to correct it in the child (see
    `thread_id_address`); without it the child must not start threads. Raises `OSError`.
    """
    pidfd = ctypes.c_int(-1)
    if thread_id:
        flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID
    machine = os.uname().machine
    tail = (thread_id, 0) if machine == "x86_64" else (0, thread_id)
    number = SYS_CLONE.get(machine, SYS_CLONE["aarch64"])  # which newer machines share
    words = (number, flags | SIGCHLD, 0, ctypes.addressof(pidfd), *tail)
    ctypes.pythonapi.PyOS_BeforeFork()
    child = _libc.syscall(*map(ctypes.c_long, words))
    if child == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    error = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if child < 0:
        raise OSError(error, os.strerror(error), "clone")
    return child, pidfd.value


def thread_id_address() -> int:
    """Where the C library keeps the id of the main thread, which is this one; raises `OSError` if it can't be found.

    A fork of the C library's own corrects it in the child; after a raw clone a second thread could get the id that is
    still noted for the first, and both would own the same locks.
    """
    address = ctypes.c_void_p()
    if _libc.prctl(PR_GET_TID_ADDRESS, ctypes.byref(address), 0, 0, 0) < 0 or not address.value:
        address.value = _told_to_debuggers()
    if not address.value or ctypes.c_int.from_address(address.value).value != os.getpid():
        raise OSError(
            errno.ENOTSUP, os.strerror(errno.ENOTSUP), "the C library does not tell where it keeps a thread's id"
        )
    return address.value


def _told_to_debuggers() -> int | None:
    try:
        _, _, offset = (ctypes.c_uint32 * 3).in_dll(_libc, "_thread_db_pthread_tid")
        here = _libc.pthread_self
    except (AttributeError, ValueError):
        return None
    here.restype = ctypes.c_void_p
    return int(here()) + offset
