"""Bases on disk: `<bases>/<input key>/<capture id>/`, with `current` naming the one that counts.

A base is published whole or not at all: it is made beside, under a name that starts with a dot, written to the disk,
and then two renames make it count.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from substrate_node.fcvm.sparse import Sum, checksum, settle

STATE, MEMORY = "state", "memory"
_MANIFEST, _CURRENT = "manifest.json", "current"
_HEAD_BYTES = 8192
"""So much of a file tells it from others of its size and date: the super block of an ext4 is in it."""
UNUSED_KEPT_S = 14 * 86_400.0


class BadBase(Exception):
    """A base can't be used; the message says why."""


class Fingerprint(Struct, frozen=True):
    """What tells a file from every other, and from itself before it was changed."""

    size_bytes: int
    inode: int
    mtime_ns: int
    head_sha256: str

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """Look at a file; reads a little of it. Raises `OSError`."""
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
        return cls(found.st_size, found.st_ino, found.st_mtime_ns, head)


class Inputs(Struct, frozen=True, kw_only=True):
    """All that a base is made of. Two bases with equal inputs may stand for each other."""

    firecracker: str
    snapshot_format: str
    cpu: str
    arch: str
    host_kernel: str
    kernel: Fingerprint
    initrd: Fingerprint | None
    boot_args: str
    rootfs: Fingerprint
    vcpus: int
    memory_mib: int

    @property
    def key(self) -> str:
        """Their digest, in hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def differences(self, now: Inputs) -> str:
        """What was otherwise then, in words; empty if nothing was."""
        return "; ".join(
            f"its {field.replace('_', ' ')} was {was}, now it is {then}"
            for field in self.__struct_fields__
            if (was := getattr(self, field)) != (then := getattr(now, field))
        )


class Manifest(Struct, frozen=True, kw_only=True):
    """What a base says of itself: what it was made of, where that was found, and what its files hold."""

    base_id: str
    workload: str
    inputs: Inputs
    kernel_path: str
    initrd_path: str | None
    rootfs_path: str
    state: Sum
    memory: Sum


class Bundles:
    """The bases below one directory. Its methods block; those that say so for long."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def draft(self, key: str, base_id: str) -> Path:
        """An empty directory in which a base can be made. Raises `OSError`."""
        draft = self._root / key / f".{base_id}"
        draft.mkdir(mode=0o700, parents=True)
        return draft

    def publish(self, draft: Path, describe: Callable[[Sum, Sum], Manifest]) -> Path:
        """Make the base in `draft` count; returns where it is from now on. Raises `OSError`. Takes long."""
        files = (draft / STATE, draft / MEMORY)
        sums = [settle(file) for file in files]
        for file in files:
            os.chown(file, os.geteuid(), os.getegid())  # a jail's user must not be able to change it any more
            file.chmod(0o444)
        manifest = describe(*sums)
        _write(draft / _MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
        _sync_directory(draft)
        final = draft.with_name(manifest.base_id)
        draft.rename(final)
        pointer = final.with_name(f".{_CURRENT}")
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(final.name)
        pointer.rename(final.with_name(_CURRENT))
        _sync_directory(final.parent)
        return final

    def current(self, key: str) -> Path | None:
        """The base of a key that counts, if there is one."""
        pointer = self._root / key / _CURRENT
        try:
            return pointer.with_name(str(pointer.readlink()))
        except OSError:
            return None

    def discard(self, key: str, base_id: str) -> None:
        """Leave nothing of a base, published or not; what was restored from it keeps its files. Raises `OSError`."""
        shelf = self._root / key
        current = self.current(key)
        if current is not None and current.name == base_id:
            (shelf / _CURRENT).unlink(missing_ok=True)
        for name in (base_id, f".{base_id}"):
            with suppress(FileNotFoundError):
                shutil.rmtree(shelf / name)
        with suppress(OSError):  # another base is there
            shelf.rmdir()

    def sweep(self, objection: Callable[[Manifest], str | None], *, now_s: float) -> list[str]:
        """Remove what no restore can use any more: half-made and replaced bases silently, others with a reason.

        Returns the reasons. For the start of a daemon, at `now_s` seconds since 1970; raises `OSError`.
        """
        reasons = []
        for shelf in sorted(self._root.iterdir()):
            current = self.current(shelf.name)
            for entry in sorted(shelf.iterdir()):
                if entry.is_dir() and not entry.is_symlink() and entry != current:
                    shutil.rmtree(entry)
            reason = None if current is None else _reason(current, objection, now_s)
            if current is not None and reason is not None:
                reasons.append(f"base {current.name} is removed: {reason}")
                self.discard(shelf.name, current.name)
            if current is None:
                shutil.rmtree(shelf)
        return reasons


def read_manifest(base: Path) -> Manifest:
    """What a base says of itself. Raises `BadBase`."""
    try:
        return msgspec.json.decode((base / _MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise BadBase(f"its manifest can't be read: {error}") from error


def verify(base: Path, inputs: Inputs) -> Manifest:
    """Read a base whole and see that it is what it was, and made of `inputs`. Raises `BadBase`. Takes long.

    Its memory is in the page cache afterwards.
    """
    manifest = read_manifest(base)
    differences = manifest.inputs.differences(inputs)
    if differences:
        raise BadBase(differences)
    for name, summed in ((STATE, manifest.state), (MEMORY, manifest.memory)):
        try:
            found = checksum(base / name)
        except OSError as error:
            raise BadBase(f"its {name} can't be read: {error}") from error
        if found.size_bytes != summed.size_bytes:
            raise BadBase(f"its {name} has {found.size_bytes} bytes, {summed.size_bytes} were written")
        if found != summed:
            raise BadBase(f"its {name} is damaged: the checksum differs")
    os.utime(base)  # it is used
    return manifest


def _reason(base: Path, objection: Callable[[Manifest], str | None], now_s: float) -> str | None:
    try:
        manifest = read_manifest(base)
        unused_s = now_s - base.stat().st_mtime
    except (OSError, BadBase) as error:
        return str(error)
    if unused_s > UNUSED_KEPT_S:
        return f"nobody used it for {unused_s / 86_400:.0f} days"
    return objection(manifest)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
