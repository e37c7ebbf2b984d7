"""The documents of an image, typed: index, manifest, configuration; and the choice of one image among several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from substrate_node.images.problems import ImageUnusable

ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
"""What machines call themselves, and what images call them. There are no others."""
REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"

INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
MANIFEST_TYPES = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
_CONFIG_TYPES = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)
_LAYER_TYPE = re.compile(
    r"application/vnd\.oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+gzip|\+zstd)?"
    r"|application/vnd\.docker\.image\.rootfs\.(diff|foreign\.diff)\.tar(\.gzip|\.zstd)?"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

Document = TypeVar("Document")


class Platform(Struct, frozen=True):
    """What an image runs on."""

    architecture: str = ""
    os: str = ""


class Descriptor(Struct, frozen=True, rename="camel"):
    """What another document, or a layer, must be: its kind, its digest, its size in bytes."""

    media_type: str = ""
    digest: str = ""
    size: int = -1
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Index(Struct, frozen=True):
    """Several images under one name, or in one layout."""

    manifests: tuple[Descriptor, ...]


class Manifest(Struct, frozen=True):
    """One image: its configuration and its layers, lowest first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class Process(Struct, frozen=True, rename="pascal", omit_defaults=True):
    """What the image wants to be run, and how. Absent and null mean the same."""

    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None


class RootFs(Struct, frozen=True):
    """The digests of the layers, unpacked."""

    diff_ids: tuple[str, ...]


class Config(Struct, frozen=True):
    """The configuration of an image."""

    architecture: str
    os: str
    rootfs: RootFs
    config: Process | None = None


class Saved(Struct, frozen=True, rename="pascal"):
    """One image in the `manifest.json` of `docker save`: paths in the archive."""

    config: str
    layers: tuple[str, ...]
    repo_tags: tuple[str, ...] | None = None


def decoded(data: bytes, kind: type[Document], origin: str) -> Document:
    """A document of this kind. Raises `ImageUnusable` with the path of the first thing wrong with it."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ImageUnusable(f"{origin} is not what it should be: {error}") from error


def checked_digest(digest: str, origin: str) -> str:
    """The digest, if it is one. Raises `ImageUnusable`."""
    if not _DIGEST.fullmatch(digest):
        raise ImageUnusable(
            f"{origin} has the digest {digest[:100]!r}; accepted is `sha256:` and 64 hexadecimal digits"
        )
    return digest


def chosen(descriptors: Sequence[Descriptor], *, architecture: str, name: str | None, origin: str) -> Descriptor:
    """The one image for linux on this architecture, of this name unless that is None.

    Raises `ImageUnusable`, with what there is, when it is none or more than one.
    """
    images = [one for one in descriptors if one.media_type in INDEX_TYPES | MANIFEST_TYPES]
    named = [one for one in images if name is None or name in _names(one) | {one.digest}]
    fitting = [one for one in named if _fits(one.platform, architecture)]
    if len({one.digest for one in fitting}) == 1:
        return fitting[0]
    if not named and images:
        raise ImageUnusable(f"{origin} has no image called {name!r}; it has {_listed(_shown_names(images))}")
    if not fitting:
        there = _listed({_shown_platform(one.platform) for one in named})
        raise ImageUnusable(f"{origin} has no image for linux/{architecture}; it has {there}")
    raise ImageUnusable(f"{origin} has several images: {_listed(_shown_names(fitting))}. Choose one with `--name`.")


def check_manifest(manifest: Manifest, origin: str) -> None:
    """See that it is an image for containers. Raises `ImageUnusable` for anything else that registries keep."""
    if manifest.config.media_type not in _CONFIG_TYPES:
        raise ImageUnusable(
            f"{origin} is no container image: its configuration is of type {manifest.config.media_type[:100]!r}; "
            f"accepted are {_listed(_CONFIG_TYPES)}"
        )
    if min(part.size for part in (manifest.config, *manifest.layers)) < 0:
        raise ImageUnusable(f"{origin} does not say how long each of its parts is")
    for number, layer in enumerate(manifest.layers, start=1):
        if not _LAYER_TYPE.fullmatch(layer.media_type):
            raise ImageUnusable(
                f"{origin}, layer {number} is of type {layer.media_type[:100]!r}; accepted are tar archives, plain or "
                "compressed with gzip or zstd, and not encrypted"
            )


def check_config(config: Config, layers: int, *, architecture: str, origin: str) -> None:
    """See that it runs here, and that each layer has the digest of its archive. Raises `ImageUnusable`."""
    if not _fits(Platform(config.architecture, config.os), architecture):
        found = f"{config.os}/{config.architecture}"
        raise ImageUnusable(f"{origin} is for {found[:100]}; accepted is linux/{architecture}, which is this machine")
    if len(config.rootfs.diff_ids) != layers:
        raise ImageUnusable(
            f"{origin} has {layers} layers, and digests for {len(config.rootfs.diff_ids)}; they must be as many"
        )
    for digest in config.rootfs.diff_ids:
        checked_digest(digest, origin)


def chosen_saved(images: Sequence[Saved], *, name: str | None, origin: str) -> Saved:
    """The one image of `docker save`, of this tag unless that is None. Raises `ImageUnusable`."""
    named = [one for one in images if name is None or name in (one.repo_tags or ())]
    if len({one.config for one in named}) == 1:
        return named[0]
    tags = _listed({tag for one in images for tag in one.repo_tags or ("an image without a tag",)})
    if not named:
        raise ImageUnusable(f"{origin} has no image called {name!r}; it has {tags}")
    raise ImageUnusable(f"{origin} has several images: {tags}. Choose one with `--name`.")


def _fits(platform: Platform | None, architecture: str) -> bool:
    """Whether it is for linux on this architecture; who names no platform is asked again by its configuration."""
    if platform is None or not platform.architecture:
        return True
    return platform.os == "linux" and ARCHITECTURES.get(platform.architecture) == architecture


def _names(descriptor: Descriptor) -> set[str]:
    annotations = descriptor.annotations or {}
    return {annotations[key] for key in (REF_NAME, _FULL_NAME) if key in annotations}


def _shown_names(descriptors: Iterable[Descriptor]) -> set[str]:
    return {name for one in descriptors for name in (_names(one) or {one.digest})}


def _shown_platform(platform: Platform | None) -> str:
    return f"{platform.os}/{platform.architecture}" if platform else "an image without a platform"


def _listed(words: Iterable[str]) -> str:
    found = sorted(word[:100] for word in words)
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "") or "none"
