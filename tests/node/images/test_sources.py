"""An image is found wherever it lies, only the right one is taken, and only if it is what its digests promise."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from fakes.images import (
    LAYER,
    MANIFEST,
    FakeImage,
    descriptor,
    digest_of,
    file,
    folder,
    gzipped,
    index_of,
    layer,
    write_archive,
    write_layout,
    write_saved,
)
from node.images.rig import LIMITS, built
from substrate_node.images import Image, ImageUnusable, Limits, opened
from substrate_node.images.layers import Verified, unpacked

BASE = layer(folder("etc"), file("etc/os-release", b"ID=test\n"))
TOP = layer(file("app", b"#!/bin/sh\n", mode=0o755))
PROCESS = {"Env": ["A=1"], "Entrypoint": ["/app"], "Cmd": None, "WorkingDir": "/srv", "User": "1000:1000"}


def found_in(path: Path, *, name: str | None = None, architecture: str = "amd64", limits: Limits = LIMITS) -> Image:
    """The image at a path."""
    with opened(path, architecture=architecture, name=name, limits=limits) as image:
        return image


def unpacked_layers(path: Path, name: str | None = None) -> list[bytes]:
    """The archives of the image at a path, lowest first."""
    archives = []
    with opened(path, architecture="amd64", name=name, limits=LIMITS) as image:
        for one in image.layers:
            with one.open() as stored:
                blob = Verified(stored, "blob", digest=one.digest, size=one.size_bytes, size_max=1 << 30)
                with unpacked(blob, "layer", diff_id=one.diff_id, size_max=1 << 30) as archive:
                    archives.append(b"".join(iter(archive.read, b"")))
    return archives


def layout(where: Path, image: FakeImage) -> Path:
    return write_layout(where / "layout", image)


def archived(where: Path, image: FakeImage) -> Path:
    return write_archive(where / "image.tar", layout(where, image))


def saved(where: Path, image: FakeImage) -> Path:
    return write_saved(where / "saved.tar", image, "app:latest")


@pytest.mark.parametrize("stored", [layout, archived, saved])
def test_a_layout_its_archive_and_one_of_docker_save_give_the_same_image(tmp_path, stored):
    path = stored(tmp_path, FakeImage(BASE, TOP, BASE, process=PROCESS))
    assert unpacked_layers(path) == [BASE, TOP, BASE]
    process = found_in(path).process
    assert (process.env, process.entrypoint, process.cmd) == (["A=1"], ["/app"], None)
    assert (process.working_dir, process.user) == ("/srv", "1000:1000")


def test_layers_may_be_plain_or_gzipped_in_one_stream_or_several(tmp_path):
    parts = gzipped(TOP[:700]) + gzipped(TOP[700:])
    image = FakeImage(BASE, TOP, TOP, stored=[BASE, gzipped(TOP), parts])
    assert unpacked_layers(write_layout(tmp_path / "layout", image)) == [BASE, TOP, TOP]


def test_the_image_for_this_machine_is_taken_from_an_index_within_an_index(tmp_path):
    ours, other = FakeImage(BASE), FakeImage(TOP, architecture="arm64")
    attestation = FakeImage(layer(), architecture="unknown", os="unknown")
    inner = index_of(other.described(), attestation.described(), ours.described())
    outer = index_of({"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest_of(inner), "size": 1})
    path = write_layout(tmp_path / "layout", ours, other, attestation, index=outer, blobs=[inner])
    assert found_in(path).digest == ours.digest
    assert found_in(path, architecture="arm64").digest == other.digest


def test_one_of_several_images_is_chosen_by_its_name_or_digest(tmp_path):
    one, two = FakeImage(BASE), FakeImage(TOP)
    index = index_of(one.described("first"), two.described("second"))
    path = write_layout(tmp_path / "layout", one, two, index=index)
    assert found_in(path, name="second").digest == two.digest
    assert found_in(path, name=one.digest).digest == one.digest
    with pytest.raises(ImageUnusable, match=r"has several images: first, second. Choose one with `--name`"):
        found_in(path)
    with pytest.raises(ImageUnusable, match="has no image called 'third'; it has first, second"):
        found_in(path, name="third")


def test_an_image_of_another_machine_is_refused_wherever_it_says_so(tmp_path):
    other = FakeImage(BASE, architecture="s390x")
    with pytest.raises(ImageUnusable, match="has no image for linux/amd64; it has linux/s390x"):
        found_in(write_layout(tmp_path / "said", other))
    silent = index_of(other.described(platform=False))
    with pytest.raises(ImageUnusable, match="is for linux/s390x; accepted is linux/amd64"):
        found_in(write_layout(tmp_path / "silent", other, index=silent))
    with pytest.raises(ImageUnusable, match="is for windows/amd64; accepted is linux/amd64"):
        found_in(write_saved(tmp_path / "saved.tar", FakeImage(BASE, os="windows"), "a:b"))


def test_what_is_no_image_is_refused_with_what_would_be_one(tmp_path):
    with pytest.raises(ImageUnusable, match=r"neither index.json \(an OCI layout\) nor manifest.json"):
        found_in(tmp_path)
    compressed = tmp_path / "image.tar.gz"
    compressed.write_bytes(gzip.compress(BASE))
    with pytest.raises(ImageUnusable, match=r"Decompress it first: `gzip -d image.tar.gz`"):
        found_in(compressed)
    with pytest.raises(ImageUnusable, match="No such file"):
        found_in(tmp_path / "absent")
    (tmp_path / "words").write_text("words")
    with pytest.raises(ImageUnusable, match="cut off after 5 bytes"):
        found_in(tmp_path / "words")


def broken_layout(where: Path, image: FakeImage, *, manifest: bytes) -> Path:
    """A layout whose index names this manifest."""
    index = index_of(descriptor(MANIFEST, manifest))
    return write_layout(where / "layout", image, index=index, blobs=[manifest])


BAD_MANIFESTS = {
    "another kind of artifact": (
        lambda found: found["config"].update(mediaType="application/vnd.cncf.helm.config.v1+json"),
        "is no container image: its configuration is of type 'application/vnd.cncf.helm",
    ),
    "an encrypted layer": (
        lambda found: found["layers"][0].update(mediaType=f"{LAYER}+gzip+encrypted"),
        "layer 1 is of type .*encrypted'; accepted are tar archives",
    ),
    "a digest that is a path": (
        lambda found: found["layers"][0].update(digest="sha256:../../../etc/passwd"),
        "accepted is `sha256:` and 64 hexadecimal digits",
    ),
    "a weak digest": (lambda found: found["config"].update(digest="md5:00"), "accepted is `sha256:`"),
    "too many layers": (lambda found: found.update(layers=found["layers"] * 300), "has 300 layers; accepted are 256"),
    "more layers than digests": (lambda found: found.update(layers=found["layers"] * 2), "2 layers, and digests for 1"),
    "words for layers": (lambda found: found.update(layers="none"), r"Expected `array`, got `str` - at `\$.layers`"),
    "no configuration": (lambda found: found.pop("config"), "missing required field `config`"),
}


@pytest.mark.parametrize("what", BAD_MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, what):
    change, words = BAD_MANIFESTS[what]
    image = FakeImage(BASE)
    manifest = json.loads(image.manifest)
    change(manifest)
    with pytest.raises(ImageUnusable, match=words):
        found_in(broken_layout(tmp_path, image, manifest=json.dumps(manifest).encode()))


def test_a_document_that_is_not_its_digest_is_refused(tmp_path):
    image = FakeImage(BASE)
    path = write_layout(tmp_path / "layout", image)
    config = path / "blobs" / "sha256" / digest_of(image.config).removeprefix("sha256:")
    config.write_bytes(image.config + b" ")
    with pytest.raises(ImageUnusable, match=r"is damaged, or somebody changed it: found sha256:.*, expected sha256:"):
        found_in(path)


def test_a_document_without_end_or_of_endless_depth_is_refused(tmp_path):
    image = FakeImage(BASE)
    path = write_layout(tmp_path / "layout", image, index=b'{"manifests": ' + b"[" * 100_000)
    with pytest.raises(ImageUnusable, match=r"index.json is not what it should be"):
        found_in(path)
    with pytest.raises(ImageUnusable, match=r"index.json is over 100 bytes long"):
        found_in(path, limits=Limits(document_bytes=100))


def test_indexes_that_name_each_other_without_end_are_refused(tmp_path):
    """A digest can't be a loop, so this one is a long chain."""
    inner, blobs = index_of(FakeImage(BASE).described()), []
    for _ in range(9):
        blobs.append(inner)
        inner = index_of(
            {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest_of(inner), "size": 1}
        )
    path = write_layout(tmp_path / "layout", FakeImage(BASE), index=inner, blobs=blobs)
    with pytest.raises(ImageUnusable, match="over 8 deep"):
        found_in(path)


def test_a_layout_can_not_name_files_outside_of_itself(tmp_path):
    (tmp_path / "secret").write_text("{}")
    path = tmp_path / "saved"
    path.mkdir()
    (path / "manifest.json").write_text('[{"Config": "../secret", "Layers": []}]')
    with pytest.raises(ImageUnusable, match="which lies outside of it"):
        found_in(path)


def test_layers_that_are_missing_or_links_to_nowhere_are_named(tmp_path):
    path = tmp_path / "saved.tar"
    write_saved(path, FakeImage(BASE), "a:b")
    with pytest.raises(ImageUnusable, match=r"has no 'layer-0/layer.tar' in it. The image is not complete"):
        unpacked_layers(renamed_in(path, b"layer-0/layer.tar", b"layer-9/layer.tar"))


def renamed_in(path: Path, old: bytes, new: bytes) -> Path:
    """The archive with another name in a header."""
    data = bytearray(path.read_bytes())
    at = data.index(old + b"\0")
    data[at : at + len(old)] = new
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    return path


BAD_LAYERS = {
    "bytes that are not the digest": ({"stored": [gzipped(TOP)]}, "unpacked, is not what its digest promises"),
    "a digest of other bytes": (
        {"diff_ids": [digest_of(TOP)]},
        "layer 1/1, unpacked, is not what its digest promises: found sha256:.* It is damaged",
    ),
    "half a gzip stream": ({"stored": [gzipped(BASE)[:-9]]}, "layer 1/1, unpacked, can't be read: "),
    "a damaged gzip stream": (
        {"stored": [gzipped(BASE)[:-8] + b"\0" * 8]},
        "unpacked, can't be read: CRC check failed",
    ),
    "no archive": ({"stored": [b"words " * 200]}, "layer 1/1: the header at byte 0 has a wrong checksum"),
    "an unknown compression": (
        {"stored": [b"\xfd7zXZ\0" + bytes(600)]},
        "has a wrong checksum: this is no tar archive",
    ),
}


@pytest.mark.parametrize("what", BAD_LAYERS)
def test_a_layer_that_is_not_what_it_promises_is_refused_and_nothing_is_left(tmp_path, what):
    described, words = BAD_LAYERS[what]
    with pytest.raises(ImageUnusable, match=words):
        built(tmp_path, image=FakeImage(BASE, **described))
    assert list((tmp_path / "images").iterdir()) == []


def test_a_blob_that_is_longer_or_shorter_than_promised_is_refused(tmp_path):
    image = FakeImage(BASE)
    path = write_layout(tmp_path / f"layout-{image.digest[7:19]}", image)
    blob = path / "blobs" / "sha256" / digest_of(gzipped(BASE)).removeprefix("sha256:")
    blob.write_bytes(gzipped(BASE) + b"more")
    with pytest.raises(ImageUnusable, match=r"is longer than the .* bytes promised"):
        built(tmp_path, image=image)
    blob.write_bytes(gzipped(BASE)[:50])
    with pytest.raises(ImageUnusable, match="has 50 bytes; promised were"):
        built(tmp_path, image=image)


def test_a_small_blob_that_unpacks_without_end_is_refused_before_it_has(tmp_path):
    bomb = layer(file("zeros", bytes(64 << 20)))
    with pytest.raises(ImageUnusable, match="unpacked, is longer than the 1048576 bytes accepted"):
        built(tmp_path, bomb, limits=Limits(unpacked_bytes=1 << 20))


def test_the_bound_on_what_layers_unpack_to_is_one_for_all_of_them(tmp_path):
    big = layer(file("zeros", bytes(600_000)))
    with pytest.raises(ImageUnusable, match="layer 2/2, unpacked, is longer than the"):
        built(tmp_path, big, big, limits=Limits(unpacked_bytes=1 << 20))


def test_a_hostile_entry_is_named_with_its_layer_and_its_path(tmp_path):
    with pytest.raises(ImageUnusable, match=r"layer 2/2: 'a/../../b': its name has `..` in it"):
        built(tmp_path, BASE, layer(file("a/../../b")))
    with pytest.raises(ImageUnusable, match=r"'f': it has an extended attribute 'com.apple.x'; accepted are user"):
        built(tmp_path, layer(file("f", xattrs={"com.apple.x": b"1"})))
    with pytest.raises(ImageUnusable, match="'f': its extended attributes take 5024 bytes; ext4 holds 4064"):
        built(tmp_path, layer(file("f", xattrs={"user.x": b"1" * 5000})))


def test_memory_does_not_grow_with_what_is_read(tmp_path):
    """A file of 200 MiB passes in pieces of a MiB."""
    archive = layer(file("zeros", bytes(200 << 20)))
    image = FakeImage(archive)
    del archive
    path = write_layout(tmp_path / f"layout-{image.digest[7:19]}", image)
    assert path.exists()
    tracemalloc.start()
    try:
        built(tmp_path, image=image)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 << 20


def test_layers_may_be_compressed_with_zstd_in_one_frame_or_several(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    image = FakeImage(BASE, TOP, stored=[compress(BASE), compress(TOP[:700]) + compress(TOP[700:])])
    assert unpacked_layers(write_layout(tmp_path / "layout", image)) == [BASE, TOP]


def test_a_damaged_zstd_stream_is_refused(tmp_path):
    stored = zstandard.ZstdCompressor().compress(BASE)
    with pytest.raises(ImageUnusable, match=r"layer 1/1, unpacked, "):
        built(tmp_path, image=FakeImage(BASE, stored=[stored[:20] + b"\xff" * 20]))


def test_a_zstd_bomb_is_refused_before_it_has_unpacked(tmp_path):
    bomb = layer(file("zeros", bytes(64 << 20)))
    image = FakeImage(bomb, stored=[zstandard.ZstdCompressor().compress(bomb)])
    with pytest.raises(ImageUnusable, match=r"unpacked, is longer than the 1048576 bytes accepted"):
        built(tmp_path, image=image, limits=Limits(unpacked_bytes=1 << 20))


def test_where_zstd_can_not_be_read_it_is_refused_with_what_to_install(tmp_path, monkeypatch):
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImageUnusable, match=r"compressed with zstd.*Install the package `zstandard`"):
        built(tmp_path, image=FakeImage(BASE, stored=[b"\x28\xb5\x2f\xfd" + bytes(100)]))
