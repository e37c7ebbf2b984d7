"""Images for tests, made by Python's own `tarfile`: layers, OCI layouts, archives of `docker save`."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


class Member(NamedTuple):
    """One entry for an archive."""

    info: tarfile.TarInfo
    data: bytes = b""


def entry(path: str, kind: bytes, *, data: bytes = b"", xattrs: Mapping[str, bytes] | None = None, **attributes):
    """An entry of any kind; `attributes` are those of `TarInfo`. Extended attributes travel as PAX records."""
    info = tarfile.TarInfo(path)
    info.type = kind
    info.size = len(data)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for name, value in attributes.items():
        setattr(info, name, value)
    info.pax_headers |= {
        f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape") for name, value in (xattrs or {}).items()
    }
    return Member(info, data)


def file(path: str, data: bytes = b"", **attributes):
    """A file."""
    return entry(path, tarfile.REGTYPE, data=data, **attributes)


def folder(path: str, **attributes):
    """A directory."""
    return entry(path, tarfile.DIRTYPE, **attributes)


def symlink(path: str, target: str, **attributes):
    """A symbolic link, which always shows all permissions."""
    return entry(path, tarfile.SYMTYPE, linkname=target, mode=0o777, **attributes)


def hardlink(path: str, target: str):
    """Another name of what is at `target`."""
    return entry(path, tarfile.LNKTYPE, linkname=target)


def whiteout(path: str):
    """What hides `path` of the layers below."""
    parent, slash, name = path.rpartition("/")
    return file(f"{parent}{slash}.wh.{name}")


def opaque(path: str):
    """What hides all that the layers below have in a directory."""
    return file(f"{path}/.wh..wh..opq")


def layer(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of these entries, in this order."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=form, errors="surrogateescape") as archive:
        for member in members:
            archive.addfile(member.info, io.BytesIO(member.data))
    return held.getvalue()


def digest_of(data: bytes) -> str:
    """Its digest as images write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def gzipped(data: bytes) -> bytes:
    """The same every time."""
    return gzip.compress(data, compresslevel=1, mtime=0)


class FakeImage:
    """One image as blobs by digest. `stored` are its layers as they lie there, if not as gzip makes them."""

    def __init__(
        self,
        *layers: bytes,
        stored: Sequence[bytes] | None = None,
        layer_type: str = f"{LAYER}+gzip",
        architecture: str = "amd64",
        os: str = "linux",
        process: Mapping[str, object] | None = None,
        diff_ids: Sequence[str] | None = None,
    ) -> None:
        self.layers = layers
        self.stored = [gzipped(layer) for layer in layers] if stored is None else list(stored)
        self.platform = {"architecture": architecture, "os": os}
        self.config = json.dumps(
            {
                **self.platform,
                "config": process,
                "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest_of(layer) for layer in layers]},
            }
        ).encode()
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": descriptor(CONFIG, self.config),
                "layers": [descriptor(layer_type, stored) for stored in self.stored],
            }
        ).encode()
        self.blobs = {digest_of(blob): blob for blob in [self.config, self.manifest, *self.stored]}
        self.digest = digest_of(self.manifest)

    def described(self, name: str | None = None, *, platform: bool = True) -> dict[str, object]:
        """What an index says of it."""
        found = descriptor(MANIFEST, self.manifest)
        if platform:
            found["platform"] = self.platform
        if name is not None:
            found["annotations"] = {"org.opencontainers.image.ref.name": name}
        return found


def descriptor(media_type: str, data: bytes) -> dict[str, object]:
    """What a document says of another."""
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def index_of(*described: Mapping[str, object]) -> bytes:
    """An index of these."""
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": described}).encode()


def write_layout(path: Path, *images: FakeImage, index: bytes | None = None, blobs: Sequence[bytes] = ()) -> Path:
    """An OCI layout in a directory."""
    held = {digest: blob for image in images for digest, blob in image.blobs.items()}
    held |= {digest_of(blob): blob for blob in blobs}
    where = path / "blobs" / "sha256"
    where.mkdir(parents=True)
    for digest, blob in held.items():
        (where / digest.removeprefix("sha256:")).write_bytes(blob)
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_bytes(index or index_of(*(image.described() for image in images)))
    return path


def write_archive(path: Path, layout: Path) -> Path:
    """The same layout as a tar archive."""
    with tarfile.open(path, "w") as archive:
        for found in sorted(layout.rglob("*")):
            archive.add(found, found.relative_to(layout).as_posix(), recursive=False)
    return path


def write_saved(path: Path, image: FakeImage, *tags: str) -> Path:
    """What `docker save` wrote before it wrote OCI layouts: each layer in a directory, a repeated one as a link."""
    name = digest_of(image.config).removeprefix("sha256:")
    paths = [f"layer-{number}/layer.tar" for number in range(len(image.layers))]
    saved = [{"Config": f"{name}.json", "RepoTags": list(tags) or None, "Layers": paths}]
    members = [file(f"{name}.json", image.config)]
    seen: dict[bytes, str] = {}
    for inside, archive in zip(paths, image.layers, strict=True):
        members.append(symlink(inside, f"../{seen[archive]}") if archive in seen else file(inside, archive))
        seen.setdefault(archive, inside)
    path.write_bytes(layer(*members, file("manifest.json", json.dumps(saved).encode())))
    return path
