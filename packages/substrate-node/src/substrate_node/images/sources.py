"""Images where they are: in an OCI layout, directory or archive; in an archive of `docker save`; in any other store."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol, cast

from msgspec import Struct

from substrate_node.images import documents
from substrate_node.images.documents import Config, Descriptor, Index, Manifest, Process, Saved
from substrate_node.images.problems import ImageUnusable, Limits, shown
from substrate_node.images.tar import Kind, TarReader

_INDEX = "index.json"
_SAVED = "manifest.json"
_LINKS_FOLLOWED = 8


class Blobs(Protocol):
    """Where the parts of an image are had by digest; what is had is not believed before its digest was compared."""

    def open(self, wanted: Descriptor, /) -> IO[bytes]:
        """The bytes of one part. Raises `ImageUnusable` when there are none, and `OSError`."""
        ...


class Layer(Struct, frozen=True, kw_only=True):
    """One layer: how to open it as it is stored, and what it must be.

    `digest` and `size_bytes` are of the stored bytes and None where nobody promised them; `diff_id` is of the archive.
    """

    open: Callable[[], IO[bytes]]
    digest: str | None
    size_bytes: int | None
    diff_id: str


class Image(Struct, frozen=True, kw_only=True):
    """One image for this machine: its digest, what it wants to run, its layers with the lowest first."""

    digest: str
    name: str
    architecture: str
    process: Process
    layers: tuple[Layer, ...]


@contextmanager
def opened(path: Path, *, architecture: str, name: str | None, limits: Limits) -> Iterator[Image]:
    """The image in a layout or an archive, for the length of the block; `name` chooses among several.

    Raises `ImageUnusable` for anything else, and for an image of another architecture.
    """
    with ExitStack() as files:
        try:
            held = _Directory(path) if path.is_dir() else _Archive(files.enter_context(path.open("rb")), path, limits)
        except OSError as error:
            raise ImageUnusable(f"{path} can't be read: {error.strerror}") from error
        if held.has(_INDEX):
            index = documents.decoded(
                _small(held.open_path(_INDEX), f"{path}: {_INDEX}", limits), Index, f"{path}: {_INDEX}"
            )
            yield image_of(held, index.manifests, str(path), architecture=architecture, name=name, limits=limits)
        elif held.has(_SAVED):
            yield _saved_image(held, path, architecture=architecture, name=name, limits=limits)
        else:
            raise ImageUnusable(
                f"{path} is no image: it has neither {_INDEX} (an OCI layout) nor {_SAVED} (`docker save`)"
            )


def image_of(
    blobs: Blobs,
    found: tuple[Descriptor, ...],
    origin: str,
    *,
    architecture: str,
    name: str | None,
    limits: Limits,
) -> Image:
    """The image for this architecture among those found, indexes within them followed.

    Raises `ImageUnusable` when there is none, or several, or one whose documents are not what they promise.
    """
    for _ in range(_LINKS_FOLLOWED):
        wanted = documents.chosen(found, architecture=architecture, name=name, origin=origin)
        data = _document(blobs, wanted, origin, limits)
        name = None  # it named an index; what is in there is chosen by its platform
        if wanted.media_type in documents.MANIFEST_TYPES:
            return _image(blobs, wanted, data, origin, architecture=architecture, limits=limits)
        found = documents.decoded(data, Index, f"{origin}: index {wanted.digest}").manifests
    raise ImageUnusable(f"{origin} has indexes within indexes over {_LINKS_FOLLOWED} deep")


def _image(blobs: Blobs, wanted: Descriptor, data: bytes, origin: str, *, architecture: str, limits: Limits) -> Image:
    manifest = documents.decoded(data, Manifest, f"{origin}: manifest {wanted.digest}")
    documents.check_manifest(manifest, origin)
    _check_layer_count(len(manifest.layers), origin, limits)
    config = documents.decoded(_document(blobs, manifest.config, origin, limits), Config, f"{origin}: configuration")
    documents.check_config(config, len(manifest.layers), architecture=architecture, origin=origin)
    return Image(
        digest=wanted.digest,
        name=origin,
        architecture=architecture,
        process=config.config or Process(),
        layers=tuple(
            Layer(
                open=_opener(blobs, layer),
                digest=documents.checked_digest(layer.digest, origin),
                size_bytes=layer.size,
                diff_id=diff_id,
            )
            for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True)
        ),
    )


def _opener(blobs: Blobs, layer: Descriptor) -> Callable[[], IO[bytes]]:
    return lambda: blobs.open(layer)


def _document(blobs: Blobs, wanted: Descriptor, origin: str, limits: Limits) -> bytes:
    digest = documents.checked_digest(wanted.digest, origin)
    data = _small(blobs.open(wanted), f"{origin}: {digest}", limits)
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != digest:
        raise ImageUnusable(f"{origin} is damaged, or somebody changed it: found {found}, expected {digest}")
    return data


def _check_layer_count(layers: int, origin: str, limits: Limits) -> None:
    if layers > limits.layers:
        raise ImageUnusable(f"{origin} has {layers} layers; accepted are {limits.layers}")


def _small(file: IO[bytes], origin: str, limits: Limits) -> bytes:
    with file:
        data = file.read(limits.document_bytes + 1)
    if len(data) > limits.document_bytes:
        raise ImageUnusable(f"{origin} is over {limits.document_bytes} bytes long, which is the most accepted")
    return data


def _saved_image(held: _Held, path: Path, *, architecture: str, name: str | None, limits: Limits) -> Image:
    """An image of `docker save`, whose only promises are the digests in its configuration."""
    data = _small(held.open_path(_SAVED), f"{path}: {_SAVED}", limits)
    images = documents.decoded(data, tuple[Saved, ...], f"{path}: {_SAVED}")
    saved = documents.chosen_saved(images, name=name, origin=str(path))
    raw = _small(held.open_path(saved.config), f"{path}: {saved.config[:100]}", limits)
    config = documents.decoded(raw, Config, f"{path}: {saved.config[:100]}")
    _check_layer_count(len(saved.layers), str(path), limits)
    documents.check_config(config, len(saved.layers), architecture=architecture, origin=str(path))
    return Image(
        digest=f"sha256:{hashlib.sha256(raw).hexdigest()}",
        name=str(path),
        architecture=architecture,
        process=config.config or Process(),
        layers=tuple(
            Layer(open=_path_opener(held, inside), digest=None, size_bytes=None, diff_id=diff_id)
            for inside, diff_id in zip(saved.layers, config.rootfs.diff_ids, strict=True)
        ),
    )


def _path_opener(held: _Held, inside: str) -> Callable[[], IO[bytes]]:
    return lambda: held.open_path(inside)


class _Held(Blobs, Protocol):
    """A layout: files by their path in it."""

    def has(self, inside: str, /) -> bool: ...

    def open_path(self, inside: str, /) -> IO[bytes]: ...


class _Directory:
    """A layout in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, inside: str) -> bool:
        return (self._path / inside).is_file()

    def open_path(self, inside: str) -> IO[bytes]:
        path = self._path / inside
        if not path.resolve().is_relative_to(self._path.resolve()):
            raise ImageUnusable(f"{self._path} names {inside[:100]!r}, which lies outside of it")
        try:
            return path.open("rb", buffering=0)
        except OSError as error:
            raise ImageUnusable(f"{path} can't be read: {error.strerror}. The image is not complete.") from error

    def open(self, wanted: Descriptor) -> IO[bytes]:
        return self.open_path(_blob_path(wanted))


class _Archive:
    """A layout in a tar archive: where each of its files lies, found out once."""

    def __init__(self, file: io.BufferedReader, path: Path, limits: Limits) -> None:
        self._file = file
        self._path = path
        self._members: Mapping[bytes, tuple[int, int] | bytes] = _members(file, path, limits)

    def has(self, inside: str) -> bool:
        return os.fsencode(inside) in self._members

    def open_path(self, inside: str) -> IO[bytes]:
        name = os.path.normpath(os.fsencode(inside))
        for _ in range(_LINKS_FOLLOWED):
            found = self._members.get(name)
            if found is None:
                raise ImageUnusable(f"{self._path} has no {shown(name)!r} in it. The image is not complete.")
            if isinstance(found, tuple):
                return cast("IO[bytes]", _Slice(self._file.fileno(), *found))
            name = os.path.normpath(name.rpartition(b"/")[0] + b"/" + found).lstrip(b"/")
        raise ImageUnusable(f"{self._path}: {inside[:100]!r} is a link that leads nowhere")

    def open(self, wanted: Descriptor) -> IO[bytes]:
        return self.open_path(_blob_path(wanted))


def _blob_path(wanted: Descriptor) -> str:
    return f"blobs/sha256/{wanted.digest.removeprefix('sha256:')}"


def _members(file: io.BufferedReader, path: Path, limits: Limits) -> dict[bytes, tuple[int, int] | bytes]:
    """The files of an archive, as (offset, size), and its links, as their targets."""
    if file.peek(2)[:2] == b"\x1f\x8b":
        raise ImageUnusable(f"{path} is compressed as a whole. Decompress it first: `gzip -d {path.name}`.")
    reader = TarReader(file, str(path), limits, leap=lambda size: file.seek(size, os.SEEK_CUR))
    members: dict[bytes, tuple[int, int] | bytes] = {}
    for entry in reader.entries():
        if len(members) > limits.entries:
            raise ImageUnusable(f"{path} has over {limits.entries} entries, which is the most accepted")
        name = os.path.normpath(entry.path)
        if entry.kind is Kind.FILE:
            members[name] = (reader.offset, entry.size)
        elif entry.kind is Kind.SYMLINK:
            members[name] = entry.link
        elif entry.kind is Kind.HARDLINK:
            members[name] = members.get(os.path.normpath(entry.link), b"")
    return members


class _Slice(io.RawIOBase):
    """A part of a file, read by offset: several can be read at once. It does not own the descriptor."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor = descriptor
        self._at = offset
        self._end = offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # any buffer is given as one
        data = os.pread(self._descriptor, min(len(buffer), self._end - self._at), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
