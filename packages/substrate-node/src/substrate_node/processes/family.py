"""The processes of one guest, from the outside: started as a process group, watched by pidfds, reaped together."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from substrate_node.processes.namespaces import children_with_own_pids
from substrate_node.processes.procfs import read

_RETRY_S = 0.002
_PATIENCE_S = 5.0
"""How long to wait for the rest of a group: once we have reaped our part, its number may come to mean another one."""


class Family:
    """One process and the twin that it leaves, both children of this one and in a process group of their own.

    `ended` is done with the wait status of the twin (or of the first process, if there never was a twin) as soon as it
    has ended; `gone` when both are reaped and the rest of the group is dead too. With a pid namespace, nothing of the
    guest runs by then; without one, what left the group may.

    Start it on the loop's thread: the kernel counts the end of that thread as the end of the daemon.
    """

    def __init__(self, argv: tuple[str, ...], descriptors: Sequence[int], *, own_pids: bool = False) -> None:
        """Start `argv` with an empty environment and `descriptors` as its first ones, from 0.

        With `own_pids` it is the first process of a new namespace, which needs CAP_SYS_ADMIN. Raises `OSError`. No
        thread is used; the call blocks until the new process has its program (about 1 ms).
        """
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self._pidfds: dict[int, int] = {}  # of those alive, by pid
        self._dead: set[int] = set()
        self._patient_until_s: float | None = None
        self.pid = _spawned(argv, descriptors, own_pids=own_pids)
        self._watch(self.pid)

    def expect(self, twin: int) -> None:
        """Hear from the first process that it has left a twin, which this process has not reaped unknowingly."""
        if twin not in self._dead:
            self._watch(twin)

    def kill(self) -> None:
        """Send SIGKILL to all of it. The group's number cannot mean anybody else before both are reaped."""
        if self._patient_until_s is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _watch(self, pid: int) -> None:
        self._pidfds[pid] = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfds[pid], self._reap)

    def _reap(self) -> None:
        """Reap whoever has ended; again soon if somebody is left whose end we would not hear of."""
        try:
            while (reaped := os.waitpid(-self.pid, os.WNOHANG)) != (0, 0):
                self._bury(*reaped)
        except ChildProcessError:
            self.kill()  # what is left of the group in the very moment its last child of ours is reaped
            self._patient_until_s = self._loop.time() + _PATIENCE_S
            self._outlive()
        else:
            if not self._pidfds:
                self._loop.call_later(_RETRY_S, self._reap)

    def _outlive(self) -> None:
        """Be done when the rest of the group is dead: without a pid namespace it dies after the twin."""
        assert self._patient_until_s is not None
        if self._loop.time() < self._patient_until_s and self._somebody_is_left():
            self._loop.call_later(_RETRY_S, self._outlive)
        else:
            self.gone.set_result(None)

    def _somebody_is_left(self) -> bool:
        """Whether the group has living members; those that only wait to be reaped are nobody's concern."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return any(map(self._is_alive_member, Path("/proc").glob("[0-9]*/stat")))

    def _is_alive_member(self, stat: Path) -> bool:
        try:
            state, _, group = stat.read_bytes().rpartition(b")")[2].split()[:3]
        except OSError:
            return False
        return state not in {b"Z", b"X"} and int(group) == self.pid

    def _bury(self, pid: int, status: int) -> None:
        self._dead.add(pid)
        pidfd = self._pidfds.pop(pid, None)
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        if not self.ended.done() and (pid != self.pid or not self._leaves_a_twin()):
            self.ended.set_result(status)

    def _leaves_a_twin(self) -> bool:
        """Whether another child of the group is there, or was."""
        if len(self._dead) > 1:
            return True
        try:
            os.waitid(os.P_PGID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True


def kill_children(parent: int, *, spare: Collection[int | None]) -> None:
    """Kill the children that a process has now, but for some. Raises nothing, also when it is gone."""
    with suppress(OSError):
        for child in map(int, read(f"/proc/{parent}/task/{parent}/children").split()):
            if child not in spare:
                _kill_child(child, parent)


def _kill_child(pid: int, parent: int) -> None:
    """Kill a process if it is a child of `parent`, and not another that has got its number."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if int(read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1]) == parent:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


async def readable(descriptor: int | socket.socket) -> None:
    """Return when there is something to read, or, of a pidfd, when the process has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _spawned(argv: tuple[str, ...], descriptors: Sequence[int], *, own_pids: bool) -> int:
    with ExitStack() as lifted:
        actions = []
        for number, fd in enumerate(descriptors):  # lifted first, so that none is overwritten by one before it
            high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(descriptors))
            lifted.callback(os.close, high)
            actions.append((os.POSIX_SPAWN_DUP2, high, number))
        defaults = (signal.SIGPIPE, signal.SIGXFSZ)  # which Python ignores, and a program inherits that
        if own_pids:
            lifted.enter_context(children_with_own_pids())
        return os.posix_spawn(argv[0], argv, {}, file_actions=actions, setsid=True, setsigmask=(), setsigdef=defaults)


def in_words(status: int) -> str:
    """A wait status as people say it: `exit status 3`, `killed by SIGKILL`."""
    return exit_in_words(os.waitstatus_to_exitcode(status))


def exit_in_words(code: int) -> str:
    """An exit code as people say it; a negative one is the number of the signal that killed the process."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # the real-time signals between the first and the last have no name
        return f"killed by signal {-code}"
