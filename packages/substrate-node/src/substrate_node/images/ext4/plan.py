"""Where everything lies in the file system: decided before the first byte is written, and nothing but arithmetic.

All tables lie at the beginning, the blocks of each file follow in one stretch, whatever is free comes last. So the
whole file system is written, and hashed, in one pass from front to back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec import Struct

from substrate_node.images.ext4 import records
from substrate_node.images.ext4.records import BLOCK, BLOCKS_PER_GROUP, Geometry
from substrate_node.images.problems import MIB, EntryUnusable, ImageUnusable, shown
from substrate_node.images.tar import Kind
from substrate_node.images.tree import Node, walk

_BLOCKS_MAX = 2**32 - 1
_INODES_PER_GROUP_MAX = 8 * BLOCK
_BLOCKS_PER_MIB = MIB // BLOCK


class Shape(Struct, frozen=True, eq=False, kw_only=True):
    """How many blocks a node needs for itself, and its attributes: those in the inode, those in a block of their own.

    First lie the blocks of its extent tree, then that of its attributes if there is one, then its data.
    """

    tree_blocks: int
    data_blocks: int
    xattrs: tuple[bytes, bytes]

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.tree_blocks + bool(self.xattrs[1]) + self.data_blocks


class Placed(Struct, frozen=True, eq=False, kw_only=True):
    """A node in its place: its inode number, its (first) directory's, and the first of its own blocks."""

    node: Node
    number: int
    parent: int
    links: int
    at: int
    shape: Shape

    @property
    def xattr_at(self) -> int:
        """Its block of attributes, or 0."""
        return self.at + self.shape.tree_blocks if self.shape.xattrs[1] else 0

    def extents(self) -> list[records.Extent]:
        """Where its data lies."""
        physical = self.at + self.shape.blocks - self.shape.data_blocks
        if self.node.kind is not Kind.FILE:
            return list(records.split_extents(0, self.shape.data_blocks, physical))
        extents: list[records.Extent] = []
        for run in self.node.runs:
            extents += records.split_extents(run.logical, run.blocks, physical)
            physical += run.blocks
        return extents


class Plan(Struct, frozen=True, eq=False, kw_only=True):
    """A whole file system but for the bytes of its files; `placed` is in the order of inode numbers and of blocks."""

    geometry: Geometry
    uuid: bytes
    label: bytes
    placed: Sequence[Placed]
    numbers: dict[int, int]
    """The inode number of each node, by the node's `id`."""

    @property
    def size_bytes(self) -> int:
        """Of the file system."""
        return self.geometry.blocks * BLOCK

    def entries(self, placed: Placed) -> list[tuple[bytes, int, Kind]]:
        """What a directory holds: name, inode number and kind of each, in the order of names."""
        return _entries(placed.node, self.numbers, placed.number, placed.parent)


def plan(root: Node, *, uuid: bytes, label: str, size_bytes: int | None = None) -> Plan:
    """Lay out the tree below `root`. `uuid` is 16 bytes, `label` at most 16; the size fits unless it is given.

    Raises `ImageUnusable` for what ext4 can't hold, and for a size that is too small.
    """
    numbers = {id(root): records.ROOT_INODE}
    links = Counter({id(root): 2})
    drafts = [_Draft(root, b"/", root, _shape(root, b"/"))]
    for path, parent, node in walk(root):
        if id(node) not in numbers:
            numbers[id(node)] = records.FIRST_INODE + len(numbers) - 1
            drafts.append(_Draft(node, path, parent, _shape(node, path)))
        links[id(node)] += 1
        if node.kind is Kind.DIRECTORY:  # its own `.`, and the `..` that names its parent
            links[id(node)] += 1
            links[id(parent)] += 1

    own_blocks = sum(draft.shape.blocks for draft in drafts)
    geometry = _geometry(max(numbers.values()), own_blocks, size_bytes)
    placed = []
    at = geometry.used_blocks - own_blocks
    for draft in drafts:
        placed.append(
            Placed(
                node=draft.node,
                number=numbers[id(draft.node)],
                parent=numbers[id(draft.parent)],
                links=_checked_links(draft, links[id(draft.node)]),
                at=at,
                shape=draft.shape,
            )
        )
        at += draft.shape.blocks
    return Plan(geometry=geometry, uuid=uuid, label=label.encode(), placed=placed, numbers=numbers)


class _Draft(Struct, frozen=True, eq=False):
    """A node on its way to a place."""

    node: Node
    path: bytes
    parent: Node
    shape: Shape


def _checked_links(draft: _Draft, links: int) -> int:
    if links <= records.LINKS_MAX:
        return links
    if draft.node.kind is Kind.DIRECTORY:
        return 1  # which is how ext4 writes "too many to count"
    raise ImageUnusable(f"{shown(draft.path)!r}: has {links} hard links; ext4 holds {records.LINKS_MAX}")


def _shape(node: Node, path: bytes) -> Shape:
    try:
        xattrs = records.packed_xattrs(node.xattrs)
    except EntryUnusable as error:
        raise ImageUnusable(f"{shown(path)!r}: {error}") from error
    if node.kind is Kind.DIRECTORY:
        data = len(records.directory_blocks(_entries(node, None, 0, 0)))
    elif node.kind is Kind.SYMLINK:
        data = 0 if records.is_short_target(node) else 1
    else:
        data = sum(run.blocks for run in node.runs)
    pieces = [(run.logical, run.blocks) for run in node.runs] or [(0, data)]
    extents = sum(-(-blocks // records.EXTENT_BLOCKS_MAX) for _, blocks in pieces)
    return Shape(tree_blocks=records.extent_tree_blocks(extents), data_blocks=data, xattrs=xattrs)


def _entries(node: Node, numbers: Mapping[int, int] | None, number: int, parent: int) -> list[tuple[bytes, int, Kind]]:
    """What a directory holds; without `numbers`, only how long its entries are is right."""
    return [
        (b".", number, Kind.DIRECTORY),
        (b"..", parent, Kind.DIRECTORY),
        *(
            (name, numbers[id(found.node)] if numbers else 0, found.node.kind)
            for name, found in sorted(node.children.items())
        ),
    ]


def _geometry(last_inode: int, own_blocks: int, size_bytes: int | None) -> Geometry:
    """The smallest file system of whole MiB that holds so much, or one of the size given, in whole blocks."""
    wanted = -(-size_bytes // BLOCK) if size_bytes is not None else 0
    groups = max(-(-wanted // BLOCKS_PER_GROUP), -(-last_inode // _INODES_PER_GROUP_MAX), 1)
    while True:
        per_group = -(-last_inode // (groups * records.INODES_PER_BLOCK)) * records.INODES_PER_BLOCK
        bitmaps_at = 1 + -(-groups * records.DESCRIPTOR // BLOCK)
        tables_at = bitmaps_at + 2 * groups
        used = tables_at + groups * per_group // records.INODES_PER_BLOCK + own_blocks
        least = max(used, (groups - 1) * BLOCKS_PER_GROUP + 1)  # the last group holds something
        blocks = max(wanted, least) if wanted else -(-least // _BLOCKS_PER_MIB) * _BLOCKS_PER_MIB
        if blocks <= groups * BLOCKS_PER_GROUP:
            break
        groups += 1
    if wanted and blocks > wanted:
        needed = -(-blocks // _BLOCKS_PER_MIB)
        raise ImageUnusable(f"the image needs {needed} MiB; the size asked for is {size_bytes} bytes. Ask for more.")
    if blocks > _BLOCKS_MAX:
        raise ImageUnusable(f"the image needs {blocks} blocks of {BLOCK} bytes; accepted are {_BLOCKS_MAX}")
    return Geometry(
        blocks=blocks,
        used_blocks=used,
        groups=groups,
        inodes_per_group=per_group,
        used_inodes=last_inode,
        bitmaps_at=bitmaps_at,
        tables_at=tables_at,
    )
