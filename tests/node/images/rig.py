"""From archives to a file system in one call, for tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from fakes.images import FakeImage, write_layout
from substrate_node.images import Built, ImageStore, Limits, Progress, ext4, opened
from substrate_node.images.contents import Contents
from substrate_node.images.tar import TarReader
from substrate_node.images.tree import Name, Node, Tree, directory

LIMITS = Limits()


def ignored(_: Progress) -> None:
    """Nobody watches."""


def built(
    where: Path,
    *layers: bytes,
    extra: Path | None = None,
    size_bytes: int | None = None,
    limits: Limits = LIMITS,
    image: FakeImage | None = None,
) -> Built:
    """Build these layers by way of a layout; `where` is a directory that may exist, used as far as it must."""
    made = image or FakeImage(*layers)
    layout = where / f"layout-{made.digest[7:19]}"
    if not layout.exists():
        write_layout(layout, made)
    with opened(layout, architecture="amd64", name=None, limits=limits) as found:
        return ImageStore(where / "images").build(
            found, extra=extra, size_bytes=size_bytes, limits=limits, report=ignored
        )


def merged(layers: Sequence[bytes], limits: Limits = LIMITS) -> tuple[Node, Contents]:
    """The tree of these archives, and the contents of its files."""
    tree, contents = Tree(limits), Contents(io.BytesIO())
    for number, archive in enumerate(layers, start=1):
        tree.begin_layer()
        reader = TarReader(io.BytesIO(archive), f"layer {number}", limits)
        for entry in reader.entries():
            tree.add(entry, contents.keep(entry.size, entry.pieces, reader.data(entry)))
    contents.seal()
    return tree.root, contents


def bytes_of(node: Node, contents: Contents) -> bytes:
    """What a file holds."""
    held = bytearray(node.size)
    for run in node.runs:
        contents.file.seek(run.stored * 4096)
        start = run.logical * 4096
        data = contents.file.read(run.blocks * 4096)[: node.size - start]
        held[start : start + len(data)] = data
    return bytes(held)


def rendered(root: Node, contents: Contents, path: Path) -> Path:
    """A file system of this tree; it has what e2fsck wants every one to have."""
    root.children.setdefault(b"lost+found", Name(directory(0o700), 0))
    plan = ext4.plan(root, uuid=bytes(16), label="test")
    path.write_bytes(b"".join(ext4.render(plan, contents.file)))
    return path
