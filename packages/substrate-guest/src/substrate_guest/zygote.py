"""A primed process that is cloned for every guest: the warm base of process guests.

It primes its workload, lets the node capture it, and forks a clone whenever the node asks for one. `node` is a
SEQPACKET socket with one JSON object a message: `{"capture": true}` is answered by `{"captured": true}` or `{"refused":
why}`; `{"clone": guest id, "boot_id": …}`, which carries the clone's listening socket, its way to dial and its console,
by `{"cloned": guest id, "pid": …}` with a pidfd, or by `{"failed": guest id, "why": …}`. The pid is one of this
namespace.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import stat
import sys
import threading
from typing import TYPE_CHECKING

from substrate_guest import shim
from substrate_guest.cloning import Mould
from substrate_guest.control import Control, Readiness
from substrate_guest.exchange import Exchange, Refused
from substrate_guest.failure import describe
from substrate_guest.filetree import WRITABLE, Identity
from substrate_guest.identity import ENTROPY_BYTES_MIN, Identities, reseed
from substrate_guest.newborn import ClonedLoop, rehearse_birth
from substrate_guest.syscalls import thread_id_address
from substrate_guest.vsock import CONTROL_PORT, DATA_PORT, HybridVsock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from substrate_guest.app import Request
    from substrate_guest.vsock import Vsock
    from substrate_guest.workload import Workload

WRITABLE_VARIABLE = "SUBSTRATE_WRITABLE_MIB"
MESSAGE_BYTES_MAX = 4096
HANDED_OVER = 3
"""Descriptors that come with the order for a clone."""
EXIT_REFUSED, EXIT_NOT_ISOLATED = 3, 4
SHOWN_MAX = 5


def be_cloned(workload: Workload, vsock: Vsock, node: socket.socket) -> tuple[HybridVsock, ClonedLoop]:
    """Prime `workload`, and fork a clone whenever `node` asks; returns in each clone, with the clone's sockets.

    Ends the process when it can't be cloned, when priming fails, and when the node lets go of it.
    """
    writable_mib = int(os.environ.pop(WRITABLE_VARIABLE))
    asyncio.run(_until_captured(workload, vsock, node))
    assert isinstance(vsock, HybridVsock)
    vsock.close()
    _import_what_the_first_request_needs()
    shim.end_on_sigterm(first=True)  # which each of its clones is
    loop = ClonedLoop()
    rehearse_birth(loop)
    gc.collect()
    objections = [*_threads(), *_children(), *_descriptors(spare=node.fileno()), *_shared_memory()]
    if objections:
        _say(node, {"refused": "after priming it holds what clones would share: " + "; ".join(objections)})
        os._exit(EXIT_REFUSED)
    try:
        mould = Mould(writable_mib, takes_along=any(os.listdir(path) for path in WRITABLE))  # noqa: PTH208
        thread_id = thread_id_address()
    except OSError as error:
        _say(node, {"refused": f"it can't be cloned: {describe(error)}"})
        os._exit(EXIT_REFUSED)
    files = [*_open_files(spare=node.fileno())]
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # or the first collection in each clone would copy every page with an object on it
    _say(node, {"captured": True})
    while True:
        order, descriptors = _order(node)
        try:
            clone, pidfd = mould.fork(thread_id)
        except OSError as error:
            _say(node, {"failed": order["clone"], "why": describe(error)})
        else:
            if clone == 0:
                node.close()
                guests_vsock = _guest(mould, order, descriptors, files)
                loop.be_ones_own()
                return guests_vsock, loop
            _say(node, {"cloned": order["clone"], "pid": clone}, pidfd)
            os.close(pidfd)
        for descriptor in descriptors:
            os.close(descriptor)


async def _until_captured(workload: Workload, vsock: Vsock, node: socket.socket) -> None:
    """Prime, say when that is done to whoever asks, and return when the node captures this process."""
    readiness = Readiness()
    control = Control(workload, Identities(None, os.environ), readiness)

    async def refuse(_: Request, __: Exchange) -> None:
        raise Refused(503, "this guest serves nobody: it waits to be captured")

    answers = {DATA_PORT: shim.answering(refuse), CONTROL_PORT: shim.answering(control.respond)}
    node.settimeout(0)
    async with asyncio.TaskGroup() as duties:
        serving = duties.create_task(vsock.serve(answers), name="vsock")
        await shim.get_ready(readiness, workload.prime())
        if not await asyncio.get_running_loop().sock_recv(node, MESSAGE_BYTES_MAX):
            os._exit(0)  # the node is gone
        serving.cancel()
    node.settimeout(None)


def _guest(mould: Mould, order: dict[str, str], descriptors: list[int], files: list[tuple[int, int]]) -> HybridVsock:
    """Become the guest of an order; the process ends where that fails."""
    listener, dialer, console = descriptors
    for standard in (1, 2):
        os.dup2(console, standard)
    os.close(console)
    try:
        mould.become_guest(Identity(order["clone"], order["boot_id"]))
        for descriptor, position in files:
            _open_anew(descriptor, position)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        os.write(2, f"substrate-guest: the clone can't be isolated{where}: {describe(error)}\n".encode())
        os._exit(EXIT_NOT_ISOLATED)
    if "numpy.random" in sys.modules:  # before the node's entropy comes; Python and OpenSSL know of forks, it does not
        reseed(os.urandom(ENTROPY_BYTES_MIN))
    return HybridVsock(socket.socket(fileno=listener), socket.socket(fileno=dialer))


def _import_what_the_first_request_needs() -> None:
    """Import it once, for all clones."""
    import binascii
    import concurrent.futures.thread
    import random
    import tempfile

    random.seed(0)
    if tls := sys.modules.get("ssl"):
        tls.RAND_add(b"", 0.0)  # it reads its configuration, once
    # Named, so that nobody takes them for needless.
    assert binascii
    assert concurrent.futures.thread
    assert random
    assert tempfile


# What the node says and hears.


def _order(node: socket.socket) -> tuple[dict[str, str], list[int]]:
    """The next order and its descriptors; the process ends when there will be none."""
    room = socket.CMSG_LEN(HANDED_OVER * 4)
    message, ancillary, _, _ = node.recvmsg(MESSAGE_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    if not message:
        os._exit(0)
    descriptors: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += memoryview(data[: len(data) // 4 * 4]).cast("i")
    return json.loads(message), descriptors


def _say(node: socket.socket, answer: dict[str, object], *descriptors: int) -> None:
    """Answer; the process ends when nobody is left to hear it."""
    try:
        socket.send_fds(node, [json.dumps(answer).encode()], descriptors)
    except OSError:
        os._exit(0)


# What clones would share with each other, or lose.


def _threads() -> Iterator[str]:
    tasks = os.listdir("/proc/self/task")  # noqa: PTH208  # pathlib is slow to import
    if len(tasks) > 1:
        known = {str(thread.native_id): thread.name for thread in threading.enumerate()}
        names = [known.get(task) or _read(f"/proc/self/task/{task}/comm").strip() for task in tasks]
        yield f"{len(tasks)} threads ({_some(names)}), of which a clone would have one"


def _children() -> Iterator[str]:
    children = _read(f"/proc/self/task/{os.getpid()}/children").split()
    if children:
        names = [_read(f"/proc/{child}/comm").strip() for child in children]
        yield f"{len(children)} child processes ({_some(names)})"


def _descriptors(*, spare: int) -> Iterator[str]:
    """What is neither a file to read nor a device: written to or read by one clone, it would change for all."""
    shared = [f"{fd} {target}" for fd, target, mode in _opened(spare) if not _can_be_opened_anew(fd, mode)]
    if shared:
        yield f"{len(shared)} open descriptors ({_some(shared)}): have them closed when priming ends"


def _open_files(*, spare: int) -> Iterator[tuple[int, int]]:
    """Files that are open to read, and where each stands."""
    for descriptor, _, mode in _opened(spare):
        if stat.S_ISREG(mode):
            yield descriptor, os.lseek(descriptor, 0, os.SEEK_CUR)


def _opened(spare: int) -> Iterator[tuple[int, str, int]]:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        descriptor = int(name)
        if descriptor > 2 and descriptor != spare:
            try:
                yield descriptor, os.readlink(f"/proc/self/fd/{name}"), os.fstat(descriptor).st_mode  # noqa: PTH115
            except OSError:  # the one that listed the directory
                continue


def _can_be_opened_anew(descriptor: int, mode: int) -> bool:
    if stat.S_ISCHR(mode):
        return True
    # A file that could be written to could be opened for that too, whatever it is open for now.
    return stat.S_ISREG(mode) and bool(os.fstatvfs(descriptor).f_flag & os.ST_RDONLY)


def _open_anew(descriptor: int, position: int) -> None:
    """Have a position of its own in a file: what was open before a fork is shared after it."""
    fresh = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    os.lseek(fresh, position, os.SEEK_SET)
    os.dup2(fresh, descriptor, inheritable=os.get_inheritable(descriptor))
    os.close(fresh)


def _shared_memory() -> Iterator[str]:
    maps = [line.split(maxsplit=5) for line in _read("/proc/self/maps").splitlines()]
    shared = [fields[5] if len(fields) > 5 else "anonymous" for fields in maps if fields[1].startswith("rw-s")]
    if shared:
        yield f"{len(shared)} pieces of shared memory ({_some(shared)})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_MAX]) + (", …" if len(names) > SHOWN_MAX else "")


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123  # pathlib is slow to import
        return file.read()
