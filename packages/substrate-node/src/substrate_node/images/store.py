"""Root file systems by content: built once, published whole or not at all, found again by what went into them."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from substrate_node.images import ext4
from substrate_node.images.assembly import Report, assembled, tree_digest
from substrate_node.images.contents import Contents
from substrate_node.images.problems import MIB, Limits, Progress
from substrate_node.images.sources import Image

BUILDER = 1
"""Raised whenever the same image would give other bytes than before."""
LABEL = "substrate"
ROOTFS = "rootfs.ext4"
MANIFEST = "manifest.json"
_BUILDING = ".building-"
_LOCK = ".lock-"
_NOTHING = bytes(MIB)


class BuiltImage(Struct, frozen=True, kw_only=True):
    """What lies beside a root file system and says what it is; `init` is the digest of what we added."""

    key: str
    image: str
    name: str
    architecture: str
    init: str
    builder: int
    size_bytes: int
    rootfs: str
    uuid: str


class Built(Struct, frozen=True, kw_only=True):
    """A root file system that is there, and whether it was there before."""

    rootfs: Path
    manifest: BuiltImage
    reused: bool


class ImageStore:
    """The directory `images/sha256` of a state root, shared by any number of processes.

    An entry is `<key>/rootfs.ext4` and `<key>/manifest.json`; it appears by one rename and never changes.
    The same image, init and size always have the same key and, bit for bit, the same file system.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def build(
        self, image: Image, *, extra: Path | None, size_bytes: int | None, limits: Limits, report: Report
    ) -> Built:
        """The root file system of the image with the tree of `extra` below `/.substrate`; built unless it is there.

        `size_bytes` None means: as large as it must be. Who asks for what another is building waits for that.
        Raises `ImageUnusable`, and `OSError`; nothing is left behind then.
        """
        init = tree_digest(extra)
        key = _key(image, init, size_bytes)
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sweep()
        with locked(self._path / f"{_LOCK}{key}", waiting=lambda: report(_waiting(key))):
            there = self.find(key)
            if there is not None:
                return there
            with self._scratch(key) as scratch:
                uuid = _uuid(key)
                plan, rootfs = _written(
                    scratch, image, extra, uuid=uuid, size_bytes=size_bytes, limits=limits, report=report
                )
                manifest = BuiltImage(
                    key=key,
                    image=image.digest,
                    name=image.name,
                    architecture=image.architecture,
                    init=init,
                    builder=BUILDER,
                    size_bytes=plan.size_bytes,
                    rootfs=rootfs,
                    uuid=uuid.hex(),
                )
                _write_manifest(scratch / MANIFEST, manifest)
                self._publish(scratch, key)
        return Built(rootfs=self._path / key / ROOTFS, manifest=manifest, reused=False)

    def find(self, key: str) -> Built | None:
        """The root file system of this key, if it is there and whole as far as its size tells."""
        rootfs = self._path / key / ROOTFS
        try:
            manifest = msgspec.json.decode((self._path / key / MANIFEST).read_bytes(), type=BuiltImage)
            whole = manifest.key == key and rootfs.stat().st_size == manifest.size_bytes
        except (OSError, msgspec.DecodeError):
            return None
        return Built(rootfs=rootfs, manifest=manifest, reused=True) if whole else None

    def sweep(self) -> None:
        """Remove what builds have left that ended without a chance to clean up."""
        for scratch in self._path.glob(f"{_BUILDING}*"):
            key = scratch.name.removeprefix(_BUILDING)
            with locked(self._path / f"{_LOCK}{key}", waiting=None) as ours:
                if ours:
                    shutil.rmtree(scratch, ignore_errors=True)

    @contextmanager
    def _scratch(self, key: str) -> Iterator[Path]:
        scratch = self._path / f"{_BUILDING}{key}"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(mode=0o700)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, scratch: Path, key: str) -> None:
        _sync(scratch)
        shutil.rmtree(self._path / key, ignore_errors=True)  # one that `find` would not have
        scratch.rename(self._path / key)
        _sync(self._path)


@contextmanager
def locked(path: Path, *, waiting: Callable[[], object] | None) -> Iterator[bool]:
    """Hold a lock file, gone afterwards. `waiting` is called before a wait; None means: don't wait, yield False."""
    descriptor = _lock(path, waiting)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # while it is still ours, so that nobody's else is removed
        os.close(descriptor)


def _lock(path: Path, waiting: Callable[[], object] | None) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is None:
                    os.close(descriptor)
                    return None
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it while we waited: it locks nothing any more


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _key(image: Image, init: str, size_bytes: int | None) -> str:
    parts = [BUILDER, LABEL, image.digest, init, size_bytes]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _waiting(key: str) -> Progress:
    return Progress(step="wait", item=f"for another build of {key[:12]}", done_bytes=0, total_bytes=None)


def _written(
    scratch: Path,
    image: Image,
    extra: Path | None,
    *,
    uuid: bytes,
    size_bytes: int | None,
    limits: Limits,
    report: Report,
) -> tuple[ext4.Plan, str]:
    """Write the file system; where it lies in it, and the digest of it all."""
    with tempfile.TemporaryFile(dir=scratch, buffering=0) as file:  # read here and there: a buffer would read too much
        contents = Contents(io.BufferedWriter(file, MIB))
        root = assembled(image, extra, contents, limits=limits, report=report)
        contents.seal()
        plan = ext4.plan(root, uuid=uuid, label=LABEL, size_bytes=size_bytes)
        return plan, _write(scratch / ROOTFS, ext4.render(plan, file), plan.size_bytes, report)


def _write_manifest(path: Path, manifest: BuiltImage) -> None:
    with path.open("xb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _uuid(key: str) -> bytes:
    """Sixteen bytes of the key, marked as a UUID whose meaning is its maker's own (version 8)."""
    uuid = bytearray.fromhex(key[:32])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


def _write(path: Path, pieces: Iterable[bytes], size_bytes: int, report: Report) -> str:
    """Write a file, what is all zeros as holes; it is readable by whoever can reach it. The digest is of all of it."""
    digest = hashlib.sha256()
    done = 0
    with path.open("xb", buffering=MIB) as file:
        for piece in pieces:
            digest.update(piece)
            if _NOTHING.startswith(piece):
                file.seek(len(piece), os.SEEK_CUR)
            else:
                file.write(piece)
            done += len(piece)
            report(Progress(step="write", item=ROOTFS, done_bytes=done, total_bytes=size_bytes))
        file.truncate(size_bytes)
        file.flush()
        os.fchmod(file.fileno(), 0o444)  # a jail's user reads it through a link of its own
        os.fsync(file.fileno())
    return f"sha256:{digest.hexdigest()}"


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
