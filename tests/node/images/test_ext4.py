"""The file system says of every file what the layer's archive says, whoever is asked: e2fsck, debugfs, the kernel."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from fakes.images import Member, entry, file, folder, hardlink, layer, symlink
from node.images.disk import (
    attributes_of,
    checked,
    content_of,
    debugfs,
    mounted,
    names_in,
    seen_by_kernel,
    stat_of,
)
from node.images.rig import built
from real_parts import needs
from substrate_node.images import ImageUnusable, ext4
from substrate_node.images.tar import Kind
from substrate_node.images.tree import Name, Node, directory

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
ACCESS_LIST = bytes.fromhex(
    "02000000 01000600ffffffff 02000600e8030000 04000400ffffffff 10000600ffffffff 20000400ffffffff"
)

MEMBERS = [
    folder("bin", mode=0o755),
    file("bin/ping", b"\x7fELF" * 3000, mode=0o4755, xattrs={"security.capability": CAPABILITY}),
    hardlink("bin/ping6", "bin/ping"),
    hardlink("bin/traceroute", "./bin/ping6"),
    symlink("sh", "bin/ping"),
    symlink("exactly-59", "x" * 59),
    symlink("exactly-60", "y" * 60),
    symlink("long", "z/" * 2000),
    folder("tmp", mode=0o1777, uid=0, gid=0),
    folder("home/worker", mode=0o2750, uid=1000, gid=1000, mtime=1_700_000_000),
    file("home/worker/notes", b"hello\n", uid=100_000, gid=4_294_967_290, mtime=1_700_000_000),
    file("old", b"", mtime=-1),
    file("far", b"", mtime=9_000_000_000),
    file("precise", b"x", pax_headers={"mtime": "1700000000.123456789"}),
    file("name with blanks", b"1"),
    file("ümläut-日本", b"2"),
    file("n" * 255, b"3"),
    file("/".join(["deep" * 10] * 20), b"4"),
    entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    entry("disk", tarfile.BLKTYPE, devmajor=259, devminor=70_000, mode=0o660, gid=6),
    entry("pipe", tarfile.FIFOTYPE, mode=0o600),
    file("marked", b"x", xattrs={"user.short": b"v", "trusted.overlay.opaque": b"y"}),
    file("much-marked", b"x", xattrs={"user.long": b"v" * 3000, "user.empty": b"", "security.selinux": b"system_u\0"}),
    file("listed", b"x", xattrs={"system.posix_acl_access": ACCESS_LIST}),
    folder("marked-folder", xattrs={"user.colour": bytes(range(1, 256))}),
    file("large", os.urandom(3_000_001)),
]


@pytest.fixture(scope="module")
def archive() -> bytes:
    """A layer with an example of everything."""
    return layer(*MEMBERS)


@pytest.fixture(scope="module")
def rootfs(archive, tmp_path_factory) -> Path:
    """The file system of that layer."""
    return built(tmp_path_factory.mktemp("everything"), archive).rootfs


def first_names(archive: bytes) -> dict[str, tarfile.TarInfo]:
    """For each name the entry that describes its inode, hard links followed."""
    with tarfile.open(fileobj=io.BytesIO(archive), errors="surrogateescape") as read:
        infos = {info.name: info for info in read}
    found = {}
    for name, info in infos.items():
        described = info
        while described.islnk():
            described = infos[described.linkname.removeprefix("./")]
        found[name] = described
    return found


def promised(info: tarfile.TarInfo) -> tuple[int, int, int, int, int]:
    """Kind and mode, owner, group, size and time of an entry."""
    kind = {
        tarfile.REGTYPE: 0o100000,
        tarfile.DIRTYPE: 0o040000,
        tarfile.SYMTYPE: 0o120000,
        tarfile.CHRTYPE: 0o020000,
        tarfile.BLKTYPE: 0o060000,
        tarfile.FIFOTYPE: 0o010000,
    }[info.type]
    size = len(info.linkname) if info.issym() else info.size
    mtime_ns = 1_700_000_000_123_456_789 if info.name == "precise" else int(info.mtime) * 10**9
    return kind | info.mode, info.uid, info.gid, 0 if info.isdir() else size, mtime_ns


def promised_attributes(info: tarfile.TarInfo) -> dict[str, bytes]:
    """The extended attributes of an entry."""
    prefix = "SCHILY.xattr."
    return {
        key.removeprefix(prefix): value.encode("utf-8", "surrogateescape")
        for key, value in info.pax_headers.items()
        if key.startswith(prefix)
    }


@needs("e2fsck")
def test_e2fsck_finds_nothing_to_mend(rootfs):
    checked(rootfs)


@needs("debugfs")
def test_debugfs_shows_for_every_name_what_the_archive_says(archive, rootfs):
    for name, info in first_names(archive).items():
        found = stat_of(rootfs, f"/{name}")
        size = 0 if info.isdir() else found.size
        assert (found.mode, found.uid, found.gid, size, found.mtime_ns) == promised(info), name


@needs("debugfs")
def test_debugfs_finds_one_inode_behind_all_names_of_a_file(rootfs):
    found = [stat_of(rootfs, f"/bin/{name}") for name in ("ping", "ping6", "traceroute")]
    assert {one.inode for one in found} == {found[0].inode}
    assert {one.links for one in found} == {3}
    assert stat_of(rootfs, "/bin").links == 2
    assert stat_of(rootfs, "/home").links == 3


@needs("debugfs")
def test_debugfs_reads_every_extended_attribute_as_the_archive_has_it(archive, rootfs):
    for name, info in first_names(archive).items():
        expected = promised_attributes(info)
        if "system.posix_acl_access" not in expected:  # debugfs shows access lists in the form they have on disk
            assert attributes_of(rootfs, f"/{name}") == expected, name


@needs("debugfs")
def test_debugfs_reads_every_byte_and_every_target(archive, rootfs):
    with tarfile.open(fileobj=io.BytesIO(archive), errors="surrogateescape") as read:
        for name, info in first_names(archive).items():
            if info.isreg():
                assert content_of(rootfs, f"/{name}") == read.extractfile(info).read(), name
    for name in ("exactly-59", "sh"):
        assert f'Fast link dest: "{first_names(archive)[name].linkname}"' in debugfs(rootfs, f"stat /{name}")
    for name, info in first_names(archive).items():
        if info.ischr() or info.isblk():
            assert f"{info.devmajor}:{info.devminor:02}" in debugfs(rootfs, f"stat /{name}").replace("01:03", "1:03")


@needs("loop-mount")
def test_the_kernel_shows_for_every_name_what_the_archive_says(archive, rootfs, tmp_path):
    with mounted(rootfs, tmp_path / "mnt") as root, tarfile.open(fileobj=io.BytesIO(archive)) as read:
        for name, info in first_names(archive).items():
            path = root / name
            found = seen_by_kernel(path)
            assert (found.mode, found.uid, found.gid, found.size, found.mtime_ns) == promised(info), name
            held = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            assert held == promised_attributes(info), name
            if info.isreg():
                assert path.read_bytes() == read.extractfile(info).read(), name
            if info.issym():
                assert os.readlink(path) == info.linkname  # noqa: PTH115  # a Path would tidy it up
            if info.ischr() or info.isblk():
                assert path.lstat().st_rdev == os.makedev(info.devmajor, info.devminor)


@needs("loop-mount")
def test_nobody_can_mount_it_for_writing(rootfs, tmp_path):
    with mounted(rootfs, tmp_path / "mnt") as root, pytest.raises(OSError, match="Read-only file system"):
        (root / "new").touch()


def test_the_same_image_gives_the_same_bytes(archive, rootfs, tmp_path):
    again = built(tmp_path, archive)
    assert not again.reused
    assert again.rootfs.read_bytes() == rootfs.read_bytes()
    assert again.manifest.rootfs == f"sha256:{hashlib.sha256(rootfs.read_bytes()).hexdigest()}"


@needs("e2fsck", "debugfs")
def test_a_directory_of_many_names_holds_them_all(tmp_path):
    names = {f"{number:05}{'x' * (number % 200)}" for number in range(3000)}
    rootfs = checked(built(tmp_path, layer(*(file(f"many/{name}") for name in names))).rootfs)
    assert names_in(rootfs, "/many") == names


def test_a_directory_of_more_directories_than_ext4_counts_says_so():
    root = directory()
    root.children |= {b"%d" % number: Name(directory(), 0) for number in range(65_000)}
    assert ext4.plan(root, uuid=bytes(16), label="").placed[0].links == 1  # which is how ext4 says "too many"


def test_a_file_of_more_names_than_ext4_counts_is_refused():
    root, node = directory(), Node(kind=Kind.FILE, mode=0o644)
    root.children |= {b"%d" % number: Name(node, 0) for number in range(65_001)}
    with pytest.raises(ImageUnusable, match="'0': has 65001 hard links; ext4 holds 65000"):
        ext4.plan(root, uuid=bytes(16), label="")


@needs("e2fsck", "debugfs")
def test_a_file_of_many_holes_keeps_them(tmp_path):
    rootfs = checked(built(tmp_path, sparse("image", pieces=3000, stride=3 * 4096)).rootfs)
    data = content_of(rootfs, "/image")
    assert len(data) == 3000 * 3 * 4096
    assert all(data[at * 3 * 4096 : at * 3 * 4096 + 5] == b"piece" for at in range(3000))
    assert data.count(0) == len(data) - 3000 * 5
    assert rootfs.stat().st_size < len(data)  # the holes are holes there, too


@needs("e2fsck")
@pytest.mark.parametrize("mib", [16, 128, 129, 1024])
def test_a_size_that_was_asked_for_is_had(tmp_path, mib):
    found = built(tmp_path, layer(file("a", b"x")), size_bytes=mib << 20)
    assert found.manifest.size_bytes == checked(found.rootfs).stat().st_size == mib << 20
    assert found.rootfs.stat().st_blocks * 512 < 2 << 20  # what is free takes no room


def test_a_size_that_is_too_small_is_refused_with_the_one_that_is_needed(tmp_path):
    with pytest.raises(ImageUnusable, match=r"needs 4 MiB; the size asked for is 1048576 bytes"):
        built(tmp_path, layer(file("a", os.urandom(3 << 20))), size_bytes=1 << 20)


@needs("e2fsck")
def test_more_files_than_one_group_can_number_make_the_file_system_larger(tmp_path):
    root = directory()
    root.children |= {b"%d" % number: Name(Node(kind=Kind.FILE, mode=0o644), 0) for number in range(33_000)}
    path = tmp_path / "rootfs.ext4"
    path.write_bytes(b"".join(ext4.render(ext4.plan(root, uuid=bytes(16), label=""), io.BytesIO())))
    assert checked(path).stat().st_size > 128 << 20


def sparse(name: str, *, pieces: int, stride: int) -> bytes:
    """An archive with one file that has data, five bytes of it, only at every multiple of `stride`."""
    ranges = "".join(f"{number * stride}\n5\n" for number in range(pieces)).encode()
    head = f"{pieces}\n".encode() + ranges
    head += bytes(-len(head) % 512)
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    pax["GNU.sparse.realsize"] = str(pieces * stride)
    info = tarfile.TarInfo(f"GNUSparseFile.0/{name}")
    info.pax_headers = pax
    info.size = len(head) + 5 * pieces
    return layer(Member(info, head + b"piece" * pieces))
