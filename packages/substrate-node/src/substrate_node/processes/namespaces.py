"""Namespaces for the processes that are started here; each function needs CAP_SYS_ADMIN and raises `OSError` without.

They change the calling thread for a moment, and nothing else of this process.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def children_with_own_pids() -> Iterator[None]:
    """Whatever is started within the block is the first process of a new pid namespace; start one process at most."""
    with _unshared("pid", _CLONE_NEWPID):
        yield


def empty_network() -> int:
    """A descriptor of a new network namespace, in which nothing can be reached."""
    with _unshared("net", _CLONE_NEWNET):
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _unshared(name: str, flag: int) -> Iterator[None]:
    own = os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.unshare(flag), f"unshare {name}")
        try:
            yield
        finally:
            _checked(_libc.setns(own, flag), f"return to {name}")
    finally:
        os.close(own)


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {what}")
