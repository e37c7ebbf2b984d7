"""The directory of one guest under `run/`, and how a later daemon proves that what it finds there is its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from substrate_node.processes.addresses import addressable
from substrate_node.processes.family import readable
from substrate_node.vmm import Orphan

BACKLOG = 128
_DIES_WITHIN_S = 5.0


class Record(Struct, frozen=True):
    """The first process of a guest; pid and start time (clock ticks after boot) together name one process for ever."""

    pid: int
    start_ticks: int
    run: str


class RunDirectory:
    """`<run>/<guest id>/`: the guest's socket and its record."""

    def __init__(self, run: Path, guest_id: str) -> None:
        self.path = run / guest_id
        self._run = run

    def make(self) -> socket.socket:
        """Make the directory (0700) and listen on `v.sock` (0600) in it. Raises `OSError`."""
        self.make_without_socket()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self.address() as address:
                listener.bind(address)
            (self.path / "v.sock").chmod(0o600)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def make_without_socket(self) -> None:
        """Make the directory (0700), for a process that nobody connects to. Raises `OSError`."""
        self.path.mkdir(mode=0o700)

    def address(self) -> AbstractContextManager[str]:
        """An address of `v.sock` that fits into a socket address, good within the block."""
        return addressable(self.path / "v.sock")

    def record(self, pid: int) -> None:
        """Note which process the guest is. Raises `OSError` if there is no such process."""
        noted = Record(pid, _start_ticks(pid), str(self._run))
        (self.path / "guest.json").write_bytes(msgspec.json.encode(noted))

    def remove(self) -> None:
        """Leave nothing of it; removing what is not there succeeds."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path)

    async def kill_orphan(self) -> int | None:
        """Kill the recorded process if it still runs and is provably ours; returns its pid then."""
        try:
            record = msgspec.json.decode((self.path / "guest.json").read_bytes(), type=Record)
            pidfd = os.pidfd_open(record.pid)
        except (OSError, msgspec.MsgspecError):
            return None
        try:
            # Compared after the pidfd was opened: from here on the number cannot come to mean another process.
            if record != Record(record.pid, _start_ticks(record.pid), str(self._run)):
                return None
            await _kill_group(record.pid, pidfd)
        except (FileNotFoundError, ProcessLookupError):
            return None
        finally:
            os.close(pidfd)
        return record.pid


async def sweep(run: Path) -> tuple[Orphan, ...]:
    """Kill the guests that an earlier daemon left in `run`, and remove their directories.

    For the start of a daemon that holds the lock of the state root; waits some seconds for each process at most.
    """
    orphans = []
    with os.scandir(run) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    for name in names:
        directory = RunDirectory(run, name)
        orphans.append(Orphan(name, await directory.kill_orphan()))
        directory.remove()
    return tuple(orphans)


async def _kill_group(pid: int, pidfd: int) -> None:
    group = os.getpgid(pid)
    if group not in {0, os.getpgrp()}:  # a guest has one of its own, and 0 is one of another pid namespace
        os.killpg(group, signal.SIGKILL)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    with suppress(TimeoutError):
        await asyncio.wait_for(readable(pidfd), _DIES_WITHIN_S)


def _start_ticks(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat.rpartition(b")")[2].split()[19])  # the name may have spaces and brackets in it
