"""The bytes of a planned file system, from its first to its last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import IO

from substrate_node.images.ext4 import records
from substrate_node.images.ext4.plan import Placed, Plan
from substrate_node.images.ext4.records import BLOCK
from substrate_node.images.problems import MIB
from substrate_node.images.tar import Kind


def render(plan: Plan, contents: IO[bytes]) -> Iterator[bytes]:
    """All of the file system in pieces of at most a few MiB; the files' blocks are read from `contents`.

    Raises `EOFError` when `contents` are shorter than the runs of the files say.
    """
    yield from _tables(plan)
    yield from _gathered(_inodes(plan))
    for placed in plan.placed:
        yield from _own_blocks(plan, placed, contents)
    yield from _zeros((plan.geometry.blocks - plan.geometry.used_blocks) * BLOCK)


def _tables(plan: Plan) -> Iterator[bytes]:
    geometry = plan.geometry
    yield records.superblock(geometry, uuid=plan.uuid, label=plan.label)
    directories = Counter(
        (placed.number - 1) // geometry.inodes_per_group for placed in plan.placed if placed.node.kind is Kind.DIRECTORY
    )
    descriptors = b"".join(
        records.group_descriptor(geometry, group, directories=directories[group]) for group in range(geometry.groups)
    )
    yield descriptors.ljust((geometry.bitmaps_at - 1) * BLOCK, b"\0")
    for per_group, used, total in (
        (records.BLOCKS_PER_GROUP, geometry.used_blocks, geometry.blocks),
        (geometry.inodes_per_group, geometry.used_inodes, geometry.groups * geometry.inodes_per_group),
    ):
        for group in range(geometry.groups):
            yield records.bitmap(
                records.used_in_group(used, group, per_group), records.used_in_group(total, group, per_group)
            )


def _inodes(plan: Plan) -> Iterator[bytes]:
    """The inode tables of all groups; the reserved inodes but that of the root are empty."""
    reserved = records.FIRST_INODE - 1
    root, *others = plan.placed
    yield b"".join(
        (_inode(root) if number == root.number else bytes(records.INODE)) for number in range(1, reserved + 1)
    )
    for placed in others:
        yield _inode(placed)
    tables = plan.geometry.groups * plan.geometry.inodes_per_group
    yield from _zeros((tables - reserved - len(others)) * records.INODE)


def _inode(placed: Placed) -> bytes:
    node = placed.node
    extended = False
    body, size = b"", node.size
    if node.kind is Kind.SYMLINK:
        size = len(node.target)
    if node.kind in (Kind.CHARACTER, Kind.BLOCK):
        body = records.device_body(node)
    elif node.kind is Kind.SYMLINK and records.is_short_target(node):
        body = node.target
    elif node.kind is not Kind.FIFO:
        extended = True
        body, _ = records.extent_tree(placed.extents(), placed.at)
    if node.kind is Kind.DIRECTORY:
        size = placed.shape.data_blocks * BLOCK
    return records.inode(
        node,
        links=placed.links,
        size=size,
        blocks=placed.shape.blocks,
        body=body,
        extended=extended,
        inline_xattrs=placed.shape.xattrs[0],
        xattr_block=placed.xattr_at,
    )


def _own_blocks(plan: Plan, placed: Placed, contents: IO[bytes]) -> Iterator[bytes]:
    """What follows the tables for one node, in the order of its `Shape`."""
    if placed.shape.tree_blocks:
        yield from records.extent_tree(placed.extents(), placed.at)[1]
    if placed.shape.xattrs[1]:
        yield placed.shape.xattrs[1]
    if placed.node.kind is Kind.DIRECTORY:
        for entries in records.directory_blocks(plan.entries(placed)):
            yield records.directory_block(entries)
    elif placed.node.kind is Kind.SYMLINK and placed.shape.data_blocks:
        yield placed.node.target.ljust(BLOCK, b"\0")
    for run in placed.node.runs:
        contents.seek(run.stored * BLOCK)
        yield from _copied(contents, run.blocks * BLOCK)


def _copied(contents: IO[bytes], left: int) -> Iterator[bytes]:
    while left:
        data = contents.read(min(MIB, left))
        if not data:
            raise EOFError("the contents of the files are shorter than they were when they were kept")
        yield data
        left -= len(data)


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that are worth a system call."""
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= MIB:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _zeros(left: int) -> Iterator[bytes]:
    nothing = bytes(MIB)
    while left:
        yield nothing[: min(MIB, left)]
        left -= min(MIB, left)
