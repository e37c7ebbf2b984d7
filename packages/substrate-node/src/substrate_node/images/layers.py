"""Layers as they are stored: compressed or not, read as a stream whose bytes are what their digests promise."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import IO, cast

from substrate_node.images.problems import ImageUnusable
from substrate_node.images.tar import Readable

CHUNK = 1 << 18
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_LIBRARIES = ("compression.zstd", "backports.zstd", "zstandard")
"""In the order of preference; the first is part of Python from 3.14 on."""


class Verified:
    """A stream that, read to its end, has had this digest and this size in bytes; None promises nothing.

    `broken` are the errors by which the source says that its bytes make no sense.
    Raises `ImageUnusable` from a read: at such an error, at the first byte too many, or at the end.
    """

    def __init__(
        self,
        source: Readable,
        origin: str,
        *,
        digest: str | None,
        size: int | None,
        size_max: int,
        broken: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        self._source = source
        self._broken = broken
        self._origin = origin
        self._digest = digest
        self._size = size
        self._size_max = size_max if size is None else min(size, size_max)
        self._hash = hashlib.sha256()
        self._ahead = b""
        self.done_bytes = 0

    def read(self, size: int = CHUNK, /) -> bytes:
        """At most `size` bytes; none means that all have been read and are what was promised."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        return self._fetch(size) if size else b""

    def peek(self, size: int) -> bytes:
        """The first bytes of what will be read next, fewer only at the end."""
        while len(self._ahead) < size and (more := self._fetch(CHUNK)):
            self._ahead += more
        return self._ahead[:size]

    def drain(self) -> None:
        """Read to the end, where size and digest are compared."""
        while self.read():
            pass

    def _fetch(self, size: int) -> bytes:
        try:
            data = self._source.read(min(size, CHUNK))
        except self._broken as error:
            raise ImageUnusable(f"{self._origin} can't be read: {error or type(error).__name__}") from error
        self.done_bytes += len(data)
        self._hash.update(data)
        if self.done_bytes > self._size_max:
            promised = "promised" if self._size_max == self._size else "accepted"
            raise ImageUnusable(f"{self._origin} is longer than the {self._size_max} bytes {promised}")
        if not data:
            self._compare()
        return data

    def _compare(self) -> None:
        found = f"sha256:{self._hash.hexdigest()}"
        if self._size is not None and self.done_bytes != self._size:
            raise ImageUnusable(f"{self._origin} has {self.done_bytes} bytes; promised were {self._size}")
        if self._digest is not None and found != self._digest:
            raise ImageUnusable(
                f"{self._origin} is not what its digest promises: found {found}, expected {self._digest}. "
                "It is damaged, or somebody changed it: fetch it again."
            )


@contextmanager
def unpacked(blob: Verified, origin: str, *, diff_id: str, size_max: int) -> Iterator[Verified]:
    """A layer's archive, decompressed if need be. When the block has ended, it and the blob are what was promised.

    Raises `ImageUnusable` for a compression that is not known here, and for more than `size_max` bytes.
    """
    plain, broken = _decompressed(blob, origin)
    archive = Verified(plain, f"{origin}, unpacked,", digest=diff_id, size=None, size_max=size_max, broken=broken)
    yield archive
    archive.drain()
    blob.drain()  # what follows the last compressed byte belongs to the digest, too


def _decompressed(blob: Verified, origin: str) -> tuple[Readable, tuple[type[Exception], ...]]:
    """The plain stream, and what it raises on broken bytes.

    The first bytes say what it is: media types lie more often, and archives of `docker save` have none.
    """
    magic = blob.peek(4)
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=cast("IO[bytes]", blob), mode="rb"), (OSError, EOFError, zlib.error)
    if magic == _ZSTD:
        return _unzstd(blob, origin)
    return blob, ()


def _unzstd(blob: Verified, origin: str) -> tuple[Readable, tuple[type[Exception], ...]]:
    for name in _ZSTD_LIBRARIES:
        try:
            library = import_module(name)
        except ImportError:
            continue
        if name == "zstandard":
            stream = library.ZstdDecompressor().stream_reader(blob, read_across_frames=True)
        else:
            stream = library.ZstdFile(blob)
        return stream, (OSError, EOFError, library.ZstdError)
    raise ImageUnusable(
        f"{origin} is compressed with zstd, which Python reads from 3.14 on. "
        "Install the package `zstandard`, or save the image with gzip."
    )
