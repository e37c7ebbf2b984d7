"""What stops an image from becoming a root file system, and the bounds that no image may pass."""

from __future__ import annotations

from msgspec import Struct

MIB = 1 << 20
GIB = 1 << 30


class ImageUnusable(Exception):
    """An image can't be used. The message says where, what was found there and what is accepted."""


class EntryUnusable(Exception):
    """One entry can't be used; whoever knows where it stands says so, and makes an `ImageUnusable` of it."""


class Limits(Struct, frozen=True, kw_only=True):
    """The most that one image may ask of us, hidden and removed parts included: it may be made to harm."""

    unpacked_bytes: int = 32 * GIB
    """All layers together, decompressed."""
    entries: int = 1_000_000
    """All layers together."""
    layers: int = 256
    header_bytes: int = MIB
    """The extended headers of one entry."""
    kept_bytes: int = 256 * MIB
    """Names, link targets, extended attributes and maps of holes together: what must stay in memory."""
    path_bytes: int = 4096
    document_bytes: int = 4 * MIB
    """A manifest, an index or a configuration."""


class Progress(Struct, frozen=True, kw_only=True):
    """How far one step of a build is. `total_bytes` None means: not known beforehand."""

    step: str
    """`pull`, `unpack` or `write`."""
    item: str
    """Which layer, as `2/7`; or the file."""
    done_bytes: int
    total_bytes: int | None


def shown(name: bytes) -> str:
    """A name from an image as words may quote it: nothing in it can pass for a line or for a terminal's command."""
    text = name.decode("utf-8", "backslashreplace")
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= 200 else f"{text[:197]}..."
