"""What an earlier daemon left of its microVMs: found, proven to be its own, killed and removed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from substrate_node.fcvm.cell import MARK, remove_cell
from substrate_node.fcvm.jail import Cgroups, mounts_below, unmount
from substrate_node.offloop import off_loop
from substrate_node.processes.family import readable
from substrate_node.vmm import Orphan

_DIES_WITHIN_S = 5.0


async def sweep(run: Path, cgroups: Cgroups | None) -> tuple[Orphan, ...]:
    """Kill the machines of an earlier daemon and remove their directories. Raises `OSError`.

    For the start of a daemon that holds the lock of the state root. A process is ours if it works in the directory of
    a guest, where nobody else can go, and was started with that guest's id; no record of it could come too late.
    """
    guests = sorted(path.name for path in run.iterdir() if _is_cell(path))  # noqa: ASYNC240  # nothing else runs yet
    orphans = []
    for guest_id in guests:
        pids = [pid for pid in _processes(run, guest_id) if await _killed(run, guest_id, pid)]
        await off_loop(_remove, run / guest_id)
        orphans.append(Orphan(guest_id, pids[0] if pids else None))
    if cgroups is not None:
        cgroups.remove_all()
    return tuple(orphans)


def _is_cell(directory: Path) -> bool:
    return (directory / MARK).exists() or not any(directory.iterdir())  # begun, and not yet marked


def _processes(run: Path, guest_id: str) -> Iterator[int]:
    for name in os.listdir("/proc"):  # noqa: PTH208  # names are all that is wanted
        if name.isdigit() and _is_ours(run, guest_id, int(name)):
            yield int(name)


def _is_ours(run: Path, guest_id: str, pid: int) -> bool:
    home = run / guest_id
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if (b"--id", guest_id.encode()) not in pairwise(arguments):
            return False
        works_in = os.stat(f"/proc/{pid}/cwd")  # noqa: PTH116  # followed by the kernel, also into a jail
        places = (home, *home.glob(f"*/{guest_id}/root"))
        return any(os.path.samestat(works_in, place.stat()) for place in places)
    except OSError:  # it has ended, or is somebody else's
        return False


async def _killed(run: Path, guest_id: str, pid: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not _is_ours(run, guest_id, pid):  # asked again: from here on the number can't come to mean another process
            return False
        with suppress(ProcessLookupError, TimeoutError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await asyncio.wait_for(readable(pidfd), _DIES_WITHIN_S)
        return True
    finally:
        os.close(pidfd)


def _remove(directory: Path) -> None:
    for mount in mounts_below(directory):
        unmount(mount)
    remove_cell(directory)
