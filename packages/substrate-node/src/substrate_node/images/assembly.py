"""An image's tree put together: its layers, one upon the other, and below `/.substrate` what we add to each image."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from substrate_node.images.contents import Contents
from substrate_node.images.documents import Process
from substrate_node.images.layers import Verified, unpacked
from substrate_node.images.problems import EntryUnusable, ImageUnusable, Limits, Progress, shown
from substrate_node.images.sources import Image, Layer
from substrate_node.images.tar import Kind, TarReader
from substrate_node.images.tree import Name, Node, Tree, directory

OURS = b".substrate"
PROCESS = b"image.json"
MOUNT_POINTS = {b"dev": 0o755, b"proc": 0o555, b"run": 0o755, b"sys": 0o555, b"tmp": 0o1777}
"""Directories that an init must find, since it can't make them: the file system is read-only."""
FILES = {b"hosts": b"127.0.0.1 localhost\n::1 localhost\n", b"machine-id": b""}
"""What `/etc` has of it, unless the image has more: names that must resolve, a place for each clone's own identity."""
_LOST_AND_FOUND = b"lost+found"
_NOT_A_LAYER = 0

Report = Callable[[Progress], None]


def assembled(image: Image, extra: Path | None, contents: Contents, *, limits: Limits, report: Report) -> Node:
    """The root of the image's tree; the bytes of its files are in `contents`.

    Raises `ImageUnusable` for a layer that is not what it promises, holds what no file system could, or goes over the
    limits; and `OSError`.
    """
    tree = Tree(limits)
    left = limits.unpacked_bytes
    for number, layer in enumerate(image.layers, start=1):
        item = f"{number}/{len(image.layers)}"
        left -= _lay(
            tree,
            layer,
            contents,
            origin=f"{image.name}, layer {item}",
            item=item,
            left=left,
            limits=limits,
            report=report,
        )
    _add_ours(tree.root, image.process, extra, contents)
    return tree.root


def tree_digest(extra: Path | None) -> str:
    """The digest of all that a file system made of the directory can show. Raises `ImageUnusable` and `OSError`."""
    digest = hashlib.sha256()
    for path, found in _listed(extra) if extra is not None else ():
        shown_as = [os.fsencode(os.path.relpath(path, extra)), oct(stat.S_IFMT(found.st_mode) | _mode(found)).encode()]
        if stat.S_ISLNK(found.st_mode):
            shown_as.append(os.fsencode(path.readlink()))
        elif stat.S_ISREG(found.st_mode):
            with path.open("rb") as file:
                shown_as.append(hashlib.file_digest(file, "sha256").digest())
        for part in shown_as:
            digest.update(len(part).to_bytes(8, "big") + part)
    return f"sha256:{digest.hexdigest()}"


def _lay(
    tree: Tree, layer: Layer, contents: Contents, *, origin: str, item: str, left: int, limits: Limits, report: Report
) -> int:
    """Put one layer upon what there is; the bytes of its archive are returned, of which `left` are accepted."""
    tree.begin_layer()
    with layer.open() as stored:
        blob = Verified(stored, origin, digest=layer.digest, size=layer.size_bytes, size_max=limits.unpacked_bytes)
        with unpacked(blob, origin, diff_id=layer.diff_id, size_max=left) as archive:
            reader = TarReader(archive, origin, limits)
            for entry in reader.entries():
                try:
                    tree.add(entry, contents.keep(entry.size, entry.pieces, reader.data(entry)))
                except EntryUnusable as error:
                    raise ImageUnusable(f"{origin}: {shown(entry.path)!r}: {error}") from error
                report(Progress(step="unpack", item=item, done_bytes=blob.done_bytes, total_bytes=layer.size_bytes))
    return archive.done_bytes


def _add_ours(root: Node, process: Process, extra: Path | None, contents: Contents) -> None:
    """Lay in what an init needs, and what programs expect that no layer has since container engines provide it."""
    ours = _read_directory(extra, contents) if extra is not None else directory()
    told = msgspec.json.encode(
        Process(
            env=process.env or [],
            entrypoint=process.entrypoint or [],
            cmd=process.cmd or [],
            working_dir=process.working_dir or "",
            user=process.user or "",
        )
    )
    ours.children[PROCESS] = Name(_file(io.BytesIO(told), len(told), 0o644, contents), _NOT_A_LAYER)
    root.children[OURS] = Name(ours, _NOT_A_LAYER)
    for name, mode in {**MOUNT_POINTS, _LOST_AND_FOUND: 0o700}.items():
        found = root.children.get(name)
        if found is None or found.node.kind not in (Kind.DIRECTORY, Kind.SYMLINK):
            root.children[name] = Name(directory(mode), _NOT_A_LAYER)
    etc = root.children.setdefault(b"etc", Name(directory(), _NOT_A_LAYER)).node
    for name, text in FILES.items() if etc.kind is Kind.DIRECTORY else ():
        found = etc.children.get(name)
        if found is None or (found.node.kind is Kind.FILE and found.node.size == 0):
            etc.children[name] = Name(_file(io.BytesIO(text), len(text), 0o644, contents), _NOT_A_LAYER)


def _read_directory(extra: Path, contents: Contents) -> Node:
    """The directory as a tree of root's, without times; of the modes only what may be executed counts."""
    nodes = {extra: directory()}
    for path, found in _listed(extra):
        if stat.S_ISDIR(found.st_mode):
            node = directory()
        elif stat.S_ISLNK(found.st_mode):
            node = Node(kind=Kind.SYMLINK, mode=0o777, target=os.fsencode(path.readlink()))
        else:
            with path.open("rb") as file:
                node = _file(file, found.st_size, _mode(found), contents)
        nodes[path] = node
        nodes[path.parent].children[os.fsencode(path.name)] = Name(node, _NOT_A_LAYER)
    return nodes[extra]


def _file(source: IO[bytes], size: int, mode: int, contents: Contents) -> Node:
    return Node(kind=Kind.FILE, mode=mode, size=size, runs=contents.keep_file(source, size))


def _listed(extra: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below, parents first, always in the same order. Raises `ImageUnusable` for what is no plain file."""
    for path in sorted(extra.iterdir()):
        found = path.lstat()
        if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            raise ImageUnusable(f"{path} can't be laid into an image; accepted are files, directories and links")
        yield path, found
        if stat.S_ISDIR(found.st_mode):
            yield from _listed(path)


def _mode(found: os.stat_result) -> int:
    return 0o755 if found.st_mode & stat.S_IXUSR else 0o644
