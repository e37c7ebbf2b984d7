"""Cloning this process: a fork into namespaces of its own, which becomes a guest of its own there.

This process is in namespaces, a file tree and a filter already; so little is left to be made for each clone. What that
takes of capabilities comes from the clone's own new user namespace, and is gone when it has become a guest.
"""

from __future__ import annotations

import os
import resource

from substrate_guest import confinement, filetree
from substrate_guest.filetree import Identity
from substrate_guest.seccomp import Filter, clones_filter
from substrate_guest.syscalls import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    CLONE_PARENT,
    CLONE_PIDFD,
    fork,
    write,
)

NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET


class Mould:
    """What all clones of this process have in common, made ready before the first of them is made.

    Each may write `writable_mib` MiB; with `takes_along`, it finds what this process has written. Raises `OSError`.
    """

    def __init__(self, writable_mib: int, *, takes_along: bool = False) -> None:
        self._writable_mib = writable_mib
        self._keep = _mounts() if takes_along else None
        self._directory = os.getcwd()  # noqa: PTH109  # pathlib is slow to import
        self._filter = Filter(clones_filter())
        self._capabilities = _capabilities()

    def fork(self, thread_id: int) -> tuple[int, int]:
        """Make a clone, a child of this one's parent: its pid and a pidfd of it. Returns (0, -1) in the clone.

        `thread_id` is the `thread_id_address` of this process. Raises `OSError`.
        """
        return fork(NAMESPACES | CLONE_PARENT | CLONE_PIDFD, thread_id=thread_id)

    def become_guest(self, identity: Identity) -> None:
        """Make this clone, which has just been forked, a guest; raises `OSError` where it must end instead."""
        os.setpgid(0, 0)  # its signals must not reach those that were forked from the same process
        write("/proc/self/uid_map", f"{confinement.INNER_ID} {confinement.INNER_ID} 1")
        write("/proc/self/gid_map", f"{confinement.INNER_ID} {confinement.INNER_ID} 1")
        bound = confinement.PROCESSES_MAX
        resource.setrlimit(resource.RLIMIT_NPROC, (bound, bound))  # counted in its own user namespace
        filetree.furnish("", identity, self._writable_mib, keep=self._keep)
        filetree.show_processes("")
        filetree.stand_in_for_boot_id("")
        os.chdir(self._directory)  # the same name, but no longer the same directory if it can be written to
        confinement.name_host(identity.hostname)
        confinement.bring_loopback_up()
        confinement.forbid_nested_namespaces()
        confinement.drop_capabilities(self._capabilities)
        confinement.gain_nothing()
        self._filter.install()

    def attempt(self) -> None:
        """Make a clone and see it become a guest and end; raises `OSError` with what went wrong."""
        clone, _ = fork(NAMESPACES)
        if clone == 0:
            try:
                self.become_guest(Identity("attempt", "attempt"))
            except OSError as error:
                os._exit(error.errno or 1)
            os._exit(0)
        _, status = os.waitpid(clone, 0)
        failure = os.waitstatus_to_exitcode(status)
        if failure:
            raise OSError(abs(failure), os.strerror(abs(failure)), "a clone")


def _mounts() -> frozenset[str]:
    """Where something is mounted."""
    with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123
        points = [line.split()[4] for line in file]
    return frozenset(os.fsdecode(point.decode("unicode_escape").encode("latin-1")) for point in points)


def _capabilities() -> range:
    """All that this kernel knows: a new user namespace has every one of them."""
    with open("/proc/sys/kernel/cap_last_cap", "rb") as file:  # noqa: PTH123
        return range(int(file.read()) + 1)
