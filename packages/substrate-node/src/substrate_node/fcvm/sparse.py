"""Large files that are mostly zeros: their holes, and a checksum that does not depend on where the holes are."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

_CHUNK_BYTES = 2 * 1024 * 1024
_PAGE_BYTES = 4096
_ZERO_CHUNK, _ZERO_PAGE = bytes(_CHUNK_BYTES), bytes(_PAGE_BYTES)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Sum(Struct, frozen=True):
    """What a file holds: its size, and the SHA-256 over (offset, bytes) of each 2 MiB that are not all zero."""

    size_bytes: int
    sha256: str


def checksum(path: Path) -> Sum:
    """Read a file whole, but for its holes; what was read is in the page cache then. Raises `OSError`."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.sha256()
        for offset, chunk in _chunks(file.fileno()):
            _count(digest, offset, chunk)
        return Sum(os.fstat(file.fileno()).st_size, digest.hexdigest())


def settle(path: Path) -> Sum:
    """Give back the pages of a file that hold only zeros, write the rest to the disk, and sum it. Raises `OSError`."""
    with path.open("r+b", buffering=0) as file:
        digest = hashlib.sha256()
        for offset, chunk in _chunks(file.fileno()):
            _count(digest, offset, chunk)
            for start, stop in _zeros(chunk):
                _punch(file.fileno(), offset + start, stop - start)
        os.fsync(file.fileno())
        return Sum(os.fstat(file.fileno()).st_size, digest.hexdigest())


def _chunks(fd: int) -> Iterator[tuple[int, bytes]]:
    """The chunks that hold data, with their offsets."""
    end, offset = os.fstat(fd).st_size, 0
    while offset < end:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA) // _CHUNK_BYTES * _CHUNK_BYTES
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        yield offset, os.pread(fd, _CHUNK_BYTES, offset)
        offset += _CHUNK_BYTES


def _count(digest: hashlib._Hash, offset: int, chunk: bytes) -> None:
    if chunk != _ZERO_CHUNK[: len(chunk)]:
        digest.update(offset.to_bytes(8))
        digest.update(chunk)


def _zeros(chunk: bytes) -> Iterator[tuple[int, int]]:
    """The runs of pages that hold only zeros."""
    start: int | None = None
    for offset in range(0, len(chunk), _PAGE_BYTES):
        page = chunk[offset : offset + _PAGE_BYTES]
        if page != _ZERO_PAGE[: len(page)]:
            if start is not None:
                yield start, offset
            start = None
        elif start is None:
            start = offset
    if start is not None:
        yield start, len(chunk)


def _punch(fd: int, offset: int, length: int) -> None:
    where, size = ctypes.c_int64(offset), ctypes.c_int64(length)
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, where, size) != 0:
        failed = ctypes.get_errno()
        if failed != errno.EOPNOTSUPP:  # a file system without holes keeps its zeros
            raise OSError(failed, os.strerror(failed))
