"""Addresses of Unix sockets, which may be shorter than the paths of their files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOCKET_PATH_BYTES_MAX = 96


@contextmanager
def peer_address(path: Path) -> Iterator[str]:
    """An address of the socket at `path`, which may lie where others can write, good within the block.

    It is that very socket: a link put there would lead us to another one. Raises `OSError`.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(f"{path} is no socket")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


@contextmanager
def addressable(path: Path) -> Iterator[str]:
    """An address of the socket `path` that fits into a socket address, good within the block. Raises `OSError`."""
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
