"""The records of ext4 as bytes: superblock, group descriptors, inodes, extents, directory entries, attributes.

Only what a read-only file system needs: no journal, no checksums, no reserve. Where a field lies and what it means is
written in the kernel's documentation of ext4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from msgspec import Struct

from substrate_node.images.problems import EntryUnusable, shown
from substrate_node.images.tar import Kind
from substrate_node.images.tree import Node

BLOCK = 4096
BLOCKS_PER_GROUP = 8 * BLOCK
INODE = 256
INODES_PER_BLOCK = BLOCK // INODE
DESCRIPTOR = 32
ROOT_INODE = 2
FIRST_INODE = 11
LINKS_MAX = 65_000

_COMPAT = 0x8 | 0x200  # ext_attr, sparse_super2: the only superblock is the first, nothing is written behind it
_INCOMPAT = 0x2 | 0x40 | 0x200  # filetype, extent, flex_bg: the tables of all groups lie together at the beginning
_RO_COMPAT = (
    0x2 | 0x20 | 0x40 | 0x1000
)  # large_file, dir_nlink, extra_isize, read-only: no kernel mounts it for writing
_EXTENTS_FLAG = 0x80000
_EXTENT_MAGIC = 0xF30A
_EXTENTS_IN_INODE = 4
_EXTENTS_IN_BLOCK = (BLOCK - 12) // 12
EXTENT_BLOCKS_MAX = 32768
_SHORT_TARGET_MAX = 59
_XATTR_MAGIC = 0xEA020000
_XATTRS_IN_INODE = INODE - 128 - 32 - 4  # after the classic inode, the extra fields and the magic number
_XATTR_HEADER = 32
_SECONDS_MIN, _SECONDS_MAX = -(2**31), 2**34 - 2**31 - 1

_MODES = {
    Kind.FILE: 0o100000,
    Kind.DIRECTORY: 0o040000,
    Kind.SYMLINK: 0o120000,
    Kind.CHARACTER: 0o020000,
    Kind.BLOCK: 0o060000,
    Kind.FIFO: 0o010000,
}
_FILE_TYPES = {
    Kind.FILE: 1,
    Kind.DIRECTORY: 2,
    Kind.CHARACTER: 3,
    Kind.BLOCK: 4,
    Kind.FIFO: 5,
    Kind.SYMLINK: 7,
}
_XATTR_NAMES = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_XATTR_PREFIXES = {b"user.": 1, b"trusted.": 4, b"security.": 6}


class Extent(Struct, frozen=True):
    """`blocks` blocks of a file, from its block `logical` on, at block `physical` of the file system."""

    logical: int
    blocks: int
    physical: int


class Geometry(Struct, frozen=True, kw_only=True):
    """How large the file system is and how it is divided; `inodes` are per group."""

    blocks: int
    used_blocks: int
    groups: int
    inodes_per_group: int
    used_inodes: int
    bitmaps_at: int
    tables_at: int

    @property
    def table_blocks(self) -> int:
        """Of one group's inode table."""
        return self.inodes_per_group // INODES_PER_BLOCK


def superblock(geometry: Geometry, *, uuid: bytes, label: bytes) -> bytes:
    """The first block: 1024 bytes left to boot loaders, the superblock, nothing."""
    block = bytearray(BLOCK)

    def put(form: str, offset: int, *values: int | bytes) -> None:
        struct.pack_into("<" + form, block, 1024 + offset, *values)

    inodes = geometry.groups * geometry.inodes_per_group
    put("5I", 0x00, inodes, geometry.blocks, 0, geometry.blocks - geometry.used_blocks, inodes - geometry.used_inodes)
    put("3I", 0x14, 0, 2, 2)  # first data block; the block and the cluster size as powers of two KiB
    put("3I", 0x20, BLOCKS_PER_GROUP, BLOCKS_PER_GROUP, geometry.inodes_per_group)
    put("2H", 0x34, 0, 0xFFFF)  # mounts so far; a check is never due
    put("3H", 0x38, 0xEF53, 1, 1)  # magic; clean; go on after errors
    put("I", 0x4C, 1)  # revision
    put("IHH", 0x54, FIRST_INODE, INODE, 0)
    put("3I", 0x5C, _COMPAT, _INCOMPAT, _RO_COMPAT)
    put("16s16s", 0x68, uuid, label)
    put("I", 0x100, 0xC)  # mount with user attributes and access lists
    put("2H", 0x15C, 32, 32)  # bytes of extra fields in an inode
    put("B", 0x174, 4)  # groups in a flex group, as a power of two
    put("I", 0x248, geometry.tables_at + geometry.groups * geometry.table_blocks)  # overhead
    return bytes(block)


def group_descriptor(geometry: Geometry, group: int, *, directories: int) -> bytes:
    """Where one group's tables are, and what is free in it."""
    blocks = min(BLOCKS_PER_GROUP, geometry.blocks - group * BLOCKS_PER_GROUP)
    return struct.pack(
        "<3I4H3I",
        geometry.bitmaps_at + group,
        geometry.bitmaps_at + geometry.groups + group,
        geometry.tables_at + group * geometry.table_blocks,
        blocks - used_in_group(geometry.used_blocks, group, BLOCKS_PER_GROUP),
        geometry.inodes_per_group - used_in_group(geometry.used_inodes, group, geometry.inodes_per_group),
        directories,
        0,
        0,
        0,
        0,
    )


def used_in_group(used: int, group: int, per_group: int) -> int:
    """How many of a group's are among the first `used` of all."""
    return max(0, min(per_group, used - group * per_group))


def bitmap(used: int, present: int) -> bytes:
    """A block of bits: the first `used` are taken, those from `present` on do not exist and are taken as well."""
    return ((1 << used) - 1 | (1 << 8 * BLOCK) - (1 << present)).to_bytes(BLOCK, "little")


def inode(
    node: Node,
    *,
    links: int,
    size: int,
    blocks: int,
    body: bytes,
    extended: bool,
    inline_xattrs: bytes,
    xattr_block: int,
) -> bytes:
    """An inode. `body` are its 60 bytes of extents, target or device; `blocks` counts all that are its own."""
    seconds, extra = _time(node.mtime_ns)
    return (
        struct.pack(
            "<HHIIIIIHHIII60sIIII",
            _MODES[node.kind] | node.mode,
            node.uid & 0xFFFF,
            size & 0xFFFFFFFF,
            seconds,
            seconds,
            seconds,
            0,
            node.gid & 0xFFFF,
            links,
            blocks * (BLOCK // 512),
            _EXTENTS_FLAG if extended else 0,
            0,
            body,
            0,
            xattr_block,
            size >> 32,
            0,
        )
        + struct.pack("<HHHHHH", 0, 0, node.uid >> 16, node.gid >> 16, 0, 0)
        + struct.pack("<HHIIIIIII", 32, 0, extra, extra, extra, seconds, extra, 0, 0)
        + inline_xattrs
    ).ljust(INODE, b"\0")


def _time(mtime_ns: int) -> tuple[int, int]:
    """The classic 32 bits of a time and its extra ones; times that ext4 can't hold become the nearest that it can."""
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    seconds = max(_SECONDS_MIN, min(_SECONDS_MAX, seconds))
    classic = seconds & 0xFFFFFFFF
    signed = classic - (1 << 32) if classic & 0x80000000 else classic
    return classic, nanoseconds << 2 | (seconds - signed) >> 32 & 3


def device_body(node: Node) -> bytes:
    """The device number in the place of a file's blocks: short where both halves are, long otherwise."""
    major, minor = node.device
    if major < 256 and minor < 256:
        return struct.pack("<I", major << 8 | minor)
    return struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


def is_short_target(node: Node) -> bool:
    """Whether a symbolic link fits into its inode."""
    return len(node.target) <= _SHORT_TARGET_MAX


def split_extents(logical: int, blocks: int, physical: int) -> Iterator[Extent]:
    """A contiguous stretch as extents, none longer than ext4 allows."""
    for done in range(0, blocks, EXTENT_BLOCKS_MAX):
        yield Extent(logical + done, min(EXTENT_BLOCKS_MAX, blocks - done), physical + done)


def extent_tree_blocks(extents: int) -> int:
    """How many blocks of their own so many extents need, beside the inode."""
    total = 0
    while extents > _EXTENTS_IN_INODE:
        extents = -(-extents // _EXTENTS_IN_BLOCK)
        total += extents
    return total


def extent_tree(extents: Sequence[Extent], at: int) -> tuple[bytes, list[bytes]]:
    """The root of a file's extent tree, for the inode, and the tree's blocks, which lie from block `at` on."""
    entries = [
        (extent.logical, struct.pack("<IHHI", extent.logical, extent.blocks, 0, extent.physical)) for extent in extents
    ]
    blocks: list[bytes] = []
    depth = 0
    while len(entries) > _EXTENTS_IN_INODE:
        above = []
        for start in range(0, len(entries), _EXTENTS_IN_BLOCK):
            held = entries[start : start + _EXTENTS_IN_BLOCK]
            above.append((held[0][0], struct.pack("<IIHH", held[0][0], at + len(blocks), 0, 0)))
            blocks.append(_extent_node(held, _EXTENTS_IN_BLOCK, depth).ljust(BLOCK, b"\0"))
        entries, depth = above, depth + 1
    return _extent_node(entries, _EXTENTS_IN_INODE, depth), blocks


def _extent_node(entries: Sequence[tuple[int, bytes]], room: int, depth: int) -> bytes:
    header = struct.pack("<4HI", _EXTENT_MAGIC, len(entries), room, depth, 0)
    return header + b"".join(entry for _, entry in entries)


def directory_blocks(entries: Sequence[tuple[bytes, int, Kind]]) -> list[list[tuple[bytes, int, Kind]]]:
    """The entries of a directory, (name, inode, kind), as they are spread over its blocks."""
    blocks: list[list[tuple[bytes, int, Kind]]] = [[]]
    room = BLOCK
    for entry in entries:
        length = _entry_length(entry[0])
        if length > room:
            blocks.append([])
            room = BLOCK
        blocks[-1].append(entry)
        room -= length
    return blocks


def directory_block(entries: Sequence[tuple[bytes, int, Kind]]) -> bytes:
    """One block of a directory; the last entry takes all the room that is left."""
    packed = bytearray()
    for place, (name, number, kind) in enumerate(entries, start=1):
        length = _entry_length(name) if place < len(entries) else BLOCK - len(packed)
        packed += struct.pack("<IHBB", number, length, len(name), _FILE_TYPES[kind]) + name
        packed += bytes(-len(packed) % 4)
    return bytes(packed.ljust(BLOCK, b"\0"))


def _entry_length(name: bytes) -> int:
    return 8 + _rounded(len(name))


def packed_xattrs(xattrs: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Extended attributes for the inode, or, if they don't fit there, for a block of their own; the other is empty.

    Raises `EntryUnusable` for attributes that ext4 can't hold.
    """
    if not xattrs:
        return b"", b""
    named = sorted((_xattr_name(name) + (_xattr_value(name, value),) for name, value in xattrs), key=_xattr_order)
    needed = sum(16 + _rounded(len(name)) + _rounded(len(value)) for _, name, value in named) + 4
    if needed <= _XATTRS_IN_INODE:
        return struct.pack("<I", _XATTR_MAGIC) + _xattr_area(named, _XATTRS_IN_INODE, start=0, hashed=False), b""
    if needed > BLOCK - _XATTR_HEADER:
        raise EntryUnusable(f"its extended attributes take {needed} bytes; ext4 holds {BLOCK - _XATTR_HEADER}")
    header = struct.pack("<4I", _XATTR_MAGIC, 1, 1, 0).ljust(_XATTR_HEADER, b"\0")
    return b"", header + _xattr_area(named, BLOCK - _XATTR_HEADER, start=_XATTR_HEADER, hashed=True)


def _xattr_order(named: tuple[int, bytes, bytes]) -> tuple[int, int, bytes]:
    return named[0], len(named[1]), named[1]  # the kernel gives up a search where a later one would stand


def _xattr_area(named: Sequence[tuple[int, bytes, bytes]], room: int, *, start: int, hashed: bool) -> bytes:
    """Entries from the front, values from the back; their offsets count from `start` bytes before the area."""
    front, back = bytearray(), bytearray()
    for index, name, value in named:
        back[:0] = value.ljust(_rounded(len(value)), b"\0")
        at = start + room - len(back) if value else 0
        digest = _xattr_hash(name, value) if hashed else 0
        front += struct.pack("<BBHIII", len(name), index, at, 0, len(value), digest) + name
        front += bytes(-len(front) % 4)
    return bytes(front.ljust(room - len(back), b"\0") + back)


def _xattr_hash(name: bytes, value: bytes) -> int:
    digest = 0
    for byte in name:
        digest = (digest << 5 ^ digest >> 27 ^ byte) & 0xFFFFFFFF
    for (word,) in struct.iter_unpack("<I", value.ljust(_rounded(len(value)), b"\0")):
        digest = (digest << 16 ^ digest >> 16 ^ word) & 0xFFFFFFFF
    return digest


def _xattr_name(name: bytes) -> tuple[int, bytes]:
    if name in _XATTR_NAMES:
        return _XATTR_NAMES[name], b""
    for prefix, index in _XATTR_PREFIXES.items():
        if name.startswith(prefix) and len(prefix) < len(name) <= 255:
            return index, name.removeprefix(prefix)
    accepted = ", ".join(name.decode() for name in [*(prefix + b"*" for prefix in _XATTR_PREFIXES), *_XATTR_NAMES])
    raise EntryUnusable(f"it has an extended attribute {shown(name)!r}; accepted are {accepted}")


def _xattr_value(name: bytes, value: bytes) -> bytes:
    """As ext4 keeps it: the same bytes, but access lists in a shorter form."""
    if name not in _XATTR_NAMES:
        return value
    if len(value) % 8 != 4 or value[:4] != struct.pack("<I", 2):
        raise EntryUnusable(f"it has an access list of {len(value)} bytes that is malformed")
    short = bytearray(struct.pack("<I", 1))
    for tag, permissions, owner in struct.iter_unpack("<HHI", value[4:]):
        short += struct.pack("<HH", tag, permissions)
        if tag in (0x02, 0x08):  # a named user, a named group
            short += struct.pack("<I", owner)
    return bytes(short)


def _rounded(length: int) -> int:
    return -(-length // 4) * 4
