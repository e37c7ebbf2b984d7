"""Layers upon layers, as one tree: what a container made of the image would see, in memory, with no file touched.

Names, links and devices of a layer are only data here. Symbolic links are resolved within this tree, so that there is
nothing outside of it that an entry could reach; `..` in a name is refused all the same, since no honest tool writes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from msgspec import Struct, field

from substrate_node.images.problems import EntryUnusable, Limits, shown
from substrate_node.images.tar import Entry, Kind

_WHITEOUT = b".wh."
_RESERVED = b".wh..wh."
_OPAQUE = b".wh..wh..opq"
_NAME_BYTES_MAX = 255
_TARGET_BYTES_MAX = 4095
_DEPTH_MAX = 256
"""Directories within directories. No honest image comes near, and whatever walks the tree may recurse."""
_STEPS_MAX = 1000
_ID_MAX = 2**32 - 2
_MAJOR_MAX, _MINOR_MAX = 2**12 - 1, 2**20 - 1


class Run(Struct, frozen=True):
    """`blocks` blocks of a file from its block `logical` on; they are stored from block `stored` of the contents on."""

    logical: int
    blocks: int
    stored: int


class Node(Struct, eq=False, kw_only=True):
    """One inode of the tree. Names that are hard links of each other share it."""

    kind: Kind
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    size: int = 0
    runs: tuple[Run, ...] = ()
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    children: dict[bytes, Name] = field(default_factory=dict)


class Name(Struct, frozen=True, eq=False):
    """A name in a directory: what it stands for, and the layer that gave it."""

    node: Node
    layer: int


def directory(mode: int = 0o755) -> Node:
    """A directory of root's that holds nothing yet."""
    return Node(kind=Kind.DIRECTORY, mode=mode)


class Tree:
    """The file tree that grows entry by entry; `root` is what there is so far.

    Within a layer the last entry of a name wins; whiteouts hide what lower layers gave, whatever their place in the
    archive. Raises `EntryUnusable` for an entry that no file system could hold, or that only makes sense as an attack.
    """

    def __init__(self, limits: Limits) -> None:
        self.root = directory()
        self._limits = limits
        self._layer = 0
        self._entries = 0
        self._kept_bytes = 0
        self._cleared: set[int] = set()

    def begin_layer(self) -> None:
        """What comes now lies above what came so far."""
        self._layer += 1
        self._cleared.clear()

    def add(self, entry: Entry, runs: tuple[Run, ...] = ()) -> None:
        """Take an entry in. `runs` say where the contents of a file are kept."""
        self._count(entry)
        parts = _parts(entry.path, "name")
        if not parts:
            self._add_root(entry)
        elif parts[-1].startswith(_WHITEOUT):
            self._hide(parts)
        elif entry.kind is Kind.HARDLINK:
            self._link(parts, _parts(entry.link, "link target"))
        else:
            self._place(parts, _node(entry, runs))

    def _count(self, entry: Entry) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise EntryUnusable(
                f"with it the image has over {self._limits.entries} entries, which is the most accepted"
            )
        self._kept_bytes += len(entry.path) + len(entry.link) + 16 * len(entry.pieces)
        self._kept_bytes += sum(len(name) + len(value) for name, value in entry.xattrs)
        if self._kept_bytes > self._limits.kept_bytes:
            raise EntryUnusable(
                f"with it names, links and attributes exceed the {self._limits.kept_bytes} bytes accepted"
            )

    def _add_root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise EntryUnusable(f"the root of the image is a {entry.kind.value}; accepted is a directory")
        _take_attributes(self.root, _node(entry, ()))

    def _place(self, parts: list[bytes], node: Node) -> None:
        parent = self._descend(parts[:-1], create=True)
        assert parent is not None  # it would have been made
        there = parent.children.get(parts[-1])
        if there is not None and there.node.kind is node.kind is Kind.DIRECTORY:
            _take_attributes(there.node, node)
            node = there.node
        self._put(parent, parts[-1], node)

    def _link(self, parts: list[bytes], target: list[bytes]) -> None:
        holder = self._descend(target[:-1], create=False) if target else None
        found = holder.children.get(target[-1]) if holder is not None else None
        if found is None:
            raise EntryUnusable(f"it is a hard link to {_joined(target)!r}, which is not in the image so far")
        if found.node.kind is Kind.DIRECTORY:
            raise EntryUnusable(f"it is a hard link to {_joined(target)!r}, a directory; accepted are links to files")
        parent = self._descend(parts[:-1], create=True)
        assert parent is not None  # it would have been made
        self._put(parent, parts[-1], found.node)

    def _put(self, parent: Node, name: bytes, node: Node) -> None:
        """Give a node a name, in place of what had it."""
        parent.children[name] = Name(node, self._layer)

    def _hide(self, parts: list[bytes]) -> None:
        """Hide what lower layers gave; what this layer gives stays, be it named before or after.

        It hides in the directory of this very path: what lies behind a symbolic link is not meant.
        """
        parent = self._real(parts[:-1])
        name = parts[-1].removeprefix(_WHITEOUT)
        if parts[-1].startswith(_RESERVED):
            if parent is not None and parts[-1] == _OPAQUE:
                self._clear(parent)
        elif name in (b"", b".", b".."):
            raise EntryUnusable("it is a whiteout that names no file")
        elif parent is not None and name in parent.children:
            self._drop(parent, name)

    def _real(self, parts: list[bytes]) -> Node | None:
        """The directory of this path if it is one from end to end, without a symbolic link."""
        node = self.root
        for part in parts:
            found = node.children.get(part)
            if found is None or found.node.kind is not Kind.DIRECTORY:
                return None
            node = found.node
        return node

    def _drop(self, parent: Node, name: bytes) -> None:
        """Remove a name unless this layer gave it; if it gave something below, a plain directory takes its place."""
        found = parent.children[name]
        if found.node.kind is Kind.DIRECTORY:
            self._clear(found.node)
        if found.layer == self._layer:
            return
        if found.node.children:
            _take_attributes(found.node, directory())
            self._put(parent, name, found.node)
        else:
            del parent.children[name]

    def _clear(self, node: Node) -> None:
        """Remove every name that lower layers gave from a directory and from all below it, once in each layer."""
        if id(node) in self._cleared:
            return
        self._cleared.add(id(node))
        for name in list(node.children):
            self._drop(node, name)

    def _descend(self, parts: list[bytes], *, create: bool) -> Node | None:
        """The directory of this path, symbolic links followed within the tree; missing ones are made, or None is given.

        Raises `EntryUnusable` where something on the way is no directory, or where links lead nowhere.
        """
        way = [self.root]
        left = deque(parts)
        for _ in range(_STEPS_MAX):
            if len(way) > _DEPTH_MAX:
                raise EntryUnusable(f"it lies more than {_DEPTH_MAX} directories deep, which is the most accepted")
            if not left:
                return way[-1]
            part = left.popleft()
            if part == b"..":
                if len(way) > 1:
                    way.pop()
                continue
            found = way[-1].children.get(part)
            if found is None:
                if not create:
                    return None
                made = directory()
                self._put(way[-1], part, made)
                way.append(made)
            elif found.node.kind is Kind.DIRECTORY:
                way.append(found.node)
            elif found.node.kind is Kind.SYMLINK:
                if found.node.target.startswith(b"/"):
                    way = [self.root]
                left.extendleft(reversed([step for step in found.node.target.split(b"/") if step not in (b"", b".")]))
            elif create:
                raise EntryUnusable(
                    f"it lies below {shown(part)!r}, which is a {found.node.kind.value} and no directory"
                )
            else:
                return None
        raise EntryUnusable(f"it lies below symbolic links that lead on for over {_STEPS_MAX} steps")


def walk(root: Node) -> Iterator[tuple[bytes, Node, Node]]:
    """Every name below `root`: its path, its directory, its node. Parents come first, siblings by name.

    A node with several names comes once for each.
    """
    waiting = [(b"", root, root)]
    while waiting:
        path, parent, node = waiting.pop()
        if path:
            yield path, parent, node
        prefix = path + b"/" if path else b""
        waiting += [(prefix + name, node, node.children[name].node) for name in sorted(node.children, reverse=True)]


def _take_attributes(node: Node, other: Node) -> None:
    node.mode, node.uid, node.gid = other.mode, other.uid, other.gid
    node.mtime_ns, node.xattrs = other.mtime_ns, other.xattrs


def _node(entry: Entry, runs: tuple[Run, ...]) -> Node:
    for owner, number in (("uid", entry.uid), ("gid", entry.gid)):
        if number > _ID_MAX:
            raise EntryUnusable(f"it belongs to {owner} {number}; accepted are 0 to {_ID_MAX}")
    if entry.kind is Kind.SYMLINK and not entry.link:
        raise EntryUnusable("it is a symbolic link to nothing")
    if len(entry.link) > _TARGET_BYTES_MAX:
        raise EntryUnusable(f"it links to a name of {len(entry.link)} bytes; accepted are {_TARGET_BYTES_MAX}")
    major, minor = entry.device
    if not (0 <= major <= _MAJOR_MAX and 0 <= minor <= _MINOR_MAX):
        raise EntryUnusable(f"it is device {major}:{minor}; accepted are up to {_MAJOR_MAX}:{_MINOR_MAX}")
    return Node(
        kind=entry.kind,
        mode=0o777 if entry.kind is Kind.SYMLINK else entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_ns,
        xattrs=entry.xattrs,
        size=entry.size,
        runs=runs,
        target=entry.link if entry.kind is Kind.SYMLINK else b"",
        device=entry.device,
    )


def _parts(path: bytes, what: str) -> list[bytes]:
    """A path in its parts, taken from the root whether or not it says so."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    for part in parts:
        if part == b"..":
            raise EntryUnusable(f"its {what} has `..` in it; accepted are paths from the root of the image")
        if len(part) > _NAME_BYTES_MAX:
            raise EntryUnusable(f"its {what} has a part of {len(part)} bytes; accepted are {_NAME_BYTES_MAX}")
    return parts


def _joined(parts: list[bytes]) -> str:
    return shown(b"/".join(parts))
