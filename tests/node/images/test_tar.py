"""The reader understands what layers are written in, and what it does not understand it refuses in clear words."""

from __future__ import annotations

import io
import tarfile
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.images import entry, file, folder, hardlink, layer, symlink
from node.images.rig import LIMITS
from real_parts import fuzz_examples
from substrate_node.images import ImageUnusable, Limits
from substrate_node.images.tar import Entry, Kind, TarReader

FORMATS = {"PAX": tarfile.PAX_FORMAT, "GNU": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.BLKTYPE: Kind.BLOCK,
    tarfile.FIFOTYPE: Kind.FIFO,
}


def read(archive: bytes, limits: Limits = LIMITS) -> list[tuple[Entry, bytes]]:
    """Every entry with its data, holes filled with zeros."""
    reader = TarReader(io.BytesIO(archive), "layer", limits)
    found = []
    for one in reader.entries():
        data = bytearray(one.size)
        for piece in reader.data(one):
            data[piece.offset : piece.offset + len(piece.data)] = piece.data
        found.append((one, bytes(data)))
    return found


def header(name: bytes = b"a", kind: bytes = b"0", size: int = 0, **fields: bytes) -> bytes:
    """A header made by hand; `fields` are put at `at<offset>`."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108] = head[108:116] = head[116:124] = b"0000644\0"
    head[124:136] = b"%011o\0" % size
    head[136:148] = b"00000000000\0"
    head[156:157] = kind
    head[257:265] = b"ustar\x0000"
    for place, data in fields.items():
        at = int(place.removeprefix("at"))
        head[at : at + len(data)] = data
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: tuple[str, str]) -> bytes:
    """An extended header with these records."""
    body = b""
    for key, value in records:
        text = f"{key}={value}\n".encode()
        length = len(text) + 2
        while len(b"%d %s" % (length, text)) != length:
            length += 1
        body += b"%d %s" % (length, text)
    return header(b"pax", b"x", len(body)) + padded(body)


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_gives_what_was_put_in(form):
    members = [
        file("a/file", b"hello", mode=0o4711, uid=7, gid=8, mtime=1_700_000_000),
        folder("a/folder", mode=0o1777),
        symlink("a/link", "file"),
        hardlink("a/again", "a/file"),
        entry("a/null", tarfile.CHRTYPE, devmajor=1, devminor=3),
        file("l" * 90 + "/" + "m" * 90, b"long"),
    ]
    for member, (found, data) in zip(members, read(layer(*members, form=FORMATS[form])), strict=True):
        info = member.info
        assert found.kind is KINDS[info.type]
        assert found.path.rstrip(b"/").decode() == info.name
        assert (found.mode, found.uid, found.gid) == (info.mode, info.uid, info.gid)
        assert (found.link.decode(), data) == (info.linkname, member.data)
        assert found.mtime_ns == info.mtime * 10**9
        assert found.device == (info.devmajor, info.devminor)


@pytest.mark.parametrize("form", ["PAX", "GNU"])
def test_long_names_and_large_numbers_are_read(form):
    members = [
        file("d/" * 500 + "f", b"x", uid=3_000_000, gid=2**31, mtime=2**34),
        symlink("s", "t/" * 700),
        hardlink("h/" * 300 + "h", "d/" * 500 + "f"),
    ]
    for member, (found, _) in zip(members, read(layer(*members, form=FORMATS[form])), strict=True):
        assert found.path.decode() == member.info.name
        assert found.link.decode() == member.info.linkname
        assert (found.uid, found.gid, found.mtime_ns) == (member.info.uid, member.info.gid, member.info.mtime * 10**9)


@given(
    st.lists(
        st.builds(
            file,
            st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=1).map("p/".__add__),
            st.binary(max_size=2000),
            mode=st.integers(0, 0o7777),
            uid=st.integers(0, 2**32),
            mtime=st.integers(0, 2**35),
            xattrs=st.dictionaries(st.sampled_from(["user.a", "user.b"]), st.binary(min_size=1, max_size=300)),
        ),
        max_size=5,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_whatever_another_program_writes_is_read_as_it_was_meant(members, form):
    for member, (found, data) in zip(members, read(layer(*members, form=form)), strict=True):
        info = member.info
        assert found.path == info.name.encode()
        assert (found.mode, found.uid, found.mtime_ns, data) == (info.mode, info.uid, info.mtime * 10**9, member.data)
        if form == tarfile.PAX_FORMAT:
            held = {name.decode(): value.decode("utf-8", "surrogateescape") for name, value in found.xattrs}
            assert held == {name.removeprefix("SCHILY.xattr."): value for name, value in info.pax_headers.items()}


def test_a_header_for_all_that_follows_counts_until_an_entry_says_otherwise():
    body = b"12 uid=1234\n"
    archive = (
        header(b"all", b"g", len(body)) + padded(body) + header(b"a") + pax(("uid", "5")) + header(b"b") + header(b"c")
    )
    assert [found.uid for found, _ in read(archive)] == [1234, 5, 1234]


def test_an_archive_may_end_without_saying_so():
    assert [found.path for found, _ in read(header(b"a") + header(b"b"))] == [b"a", b"b"]


def test_what_follows_the_end_is_not_read():
    assert [found.path for found, _ in read(header(b"a") + bytes(1024) + b"anything")] == [b"a"]


def test_a_link_has_no_data_whatever_its_size_says():
    archive = header(b"l", b"1", 5000, at157=b"a") + header(b"b")
    assert [found.path for found, _ in read(archive)] == [b"l", b"b"]


HOLES = {
    "old GNU": header(
        b"f", b"S", 8, at386=b"%011o\0%011o\0" % (512, 4) + b"%011o\0%011o\0" % (5000, 4), at483=b"%011o\0" % 6000
    )
    + padded(b"datamore"),
    "old GNU, more of them": header(
        b"f", b"S", 8, at386=b"%011o\0%011o\0" % (512, 4), at482=b"\1", at483=b"%011o\0" % 6000
    )
    + (b"%011o\0%011o\0" % (5000, 4)).ljust(512, b"\0")
    + padded(b"datamore"),
    "PAX 0.0": pax(
        ("GNU.sparse.size", "6000"),
        ("GNU.sparse.offset", "512"),
        ("GNU.sparse.numbytes", "4"),
        ("GNU.sparse.offset", "5000"),
        ("GNU.sparse.numbytes", "4"),
        ("GNU.sparse.name", "f"),
    )
    + header(b"x", size=8)
    + padded(b"datamore"),
    "PAX 0.1": pax(("GNU.sparse.size", "6000"), ("GNU.sparse.map", "512,4,5000,4"), ("GNU.sparse.name", "f"))
    + header(b"x", size=8)
    + padded(b"datamore"),
    "PAX 1.0": pax(
        ("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "f"), ("GNU.sparse.realsize", "6000")
    )
    + header(b"x", size=520)
    + padded(b"2\n512\n4\n5000\n4\n")
    + padded(b"datamore"),
}


@pytest.mark.parametrize("how", HOLES)
def test_every_way_to_write_holes_is_understood(how):
    ((found, data), (after, _)) = read(HOLES[how] + header(b"after"))
    assert (found.path, found.size, found.pieces) == (b"f", 6000, ((512, 4), (5000, 4)))
    assert data == bytes(512) + b"data" + bytes(4484) + b"more" + bytes(996)
    assert after.path == b"after"


REFUSED = {
    "no archive at all": (b"#!/bin/sh\n" * 100, "wrong checksum: this is no tar archive"),
    "a header that is cut off": (header()[:300], "the header at byte 0 is cut off after 300 bytes"),
    "data that is cut off": (header(b"f", size=1000) + b"x" * 600, "'f' is cut off: the archive ends too early"),
    "an unknown type": (header(b"f", b"M"), r"'f' is of a type that is not known \(b'M'\); accepted are files"),
    "a size that is no number": (header(b"f", at124=b"99999999999\0"), "a size that is no octal number: '99999999999'"),
    "a negative size": (header(b"f", at124=b"\xff" * 12), "'f' has a negative size: -1"),
    "a negative owner": (header(b"f", at108=b"\xff" * 8), "'f' has a negative uid: -1"),
    "an extended header for nothing": (pax(("path", "f")), "belongs to no entry"),
    "a record without its end": (header(b"p", b"x", 8) + padded(b"99 a=b\n\n") + header(), "malformed extended header"),
    "a record of no length": (header(b"p", b"x", 8) + padded(b"0 a=bcd\n") + header(), "malformed extended header"),
    "a record of a word's length": (
        header(b"p", b"x", 8) + padded(b"xx a=bc\n") + header(),
        "'xx' where a decimal number",
    ),
    "a size in words": (pax(("size", "many")) + header(), "'many' where a decimal number belongs"),
    "a name with a zero": (pax(("path", "a\0b")) + header(), "name with a zero byte"),
    "a name without end": (pax(("path", "a" * 5000)) + header(), "name of 5000 bytes; accepted are 4096"),
    "an extended header without end": (header(b"p", b"x", 2 << 20), "over the bound of 1048576 bytes"),
    "extended headers without end": (
        pax(("comment", "x" * 1_000_000)) * 2 + header(),
        "over the bound of 1048576 bytes",
    ),
    "a negative extended header": (header(b"p", b"x", at124=b"\xff" * 12), "negative size"),
    "holes that overlap": (
        pax(("GNU.sparse.size", "9"), ("GNU.sparse.map", "0,4,2,4")) + header(b"f", size=8) + bytes(512),
        "overlaps itself or leaves the file",
    ),
    "holes beyond the end": (
        pax(("GNU.sparse.size", "9"), ("GNU.sparse.map", "0,4,8,4")) + header(b"f", size=8) + bytes(512),
        "overlaps itself or leaves the file",
    ),
    "holes that don't fit": (
        pax(("GNU.sparse.size", "9000"), ("GNU.sparse.map", "0,4")) + header(b"f", size=5000) + bytes(5120),
        "does not fit its data",
    ),
    "half a map of holes": (
        pax(("GNU.sparse.size", "9"), ("GNU.sparse.map", "0,4,8")) + header(b"f", size=4) + bytes(512),
        "does not fit its data",
    ),
    "a map of too many holes": (
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "9")) + header(b"f", size=512) + padded(b"99999999\n"),
        "map of holes over the bound",
    ),
    "a map of holes without end": (
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "9")) + header(b"f", size=4096) + b"1" * 4096,
        "map of holes that is cut off",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_malformed_is_refused_with_the_place_and_the_reason(what):
    archive, words = REFUSED[what]
    with pytest.raises(ImageUnusable, match=words) as refused:
        read(archive)
    assert str(refused.value).startswith("layer: ")


def test_a_name_can_not_write_to_the_terminal():
    with pytest.raises(ImageUnusable) as refused:
        read(header(b"\x1b[2Jnice\nlayer: all is well", b"M"))
    assert "\x1b" not in str(refused.value)
    assert "\n" not in str(refused.value)


@settings(max_examples=fuzz_examples(120))
@given(st.data())
def test_no_bytes_make_the_reader_fail_in_any_other_way_or_take_long(data):
    """Valid archives with bytes changed, cut or repeated: they are read, or refused, in bounded time."""
    archive = bytearray(data.draw(st.sampled_from([*HOLES.values(), BUSY])))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(archive) - 1), st.integers(0, 255)), max_size=8)):
        archive[at] = byte
    cut = data.draw(st.integers(0, len(archive)))
    if data.draw(st.booleans()):
        archive = mended(archive)
    began_s = time.process_time()
    reader = TarReader(io.BytesIO(archive[:cut]), "layer", Limits(header_bytes=10_000))
    with suppress(ImageUnusable):
        for one in reader.entries():
            assert sum(len(piece.data) for piece in reader.data(one)) <= len(archive)
    assert time.process_time() - began_s < 2


def mended(archive: bytearray) -> bytearray:
    """The archive with a right checksum in each block that looks like a header, so that what follows it is read."""
    for at in range(0, len(archive) - 511, 512):
        if archive[at + 257 : at + 262] == b"ustar":
            archive[at + 148 : at + 156] = b" " * 8
            archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + 512])
    return archive


BUSY = layer(
    file("a/file", b"hello" * 300, xattrs={"user.a": b"b"}),
    symlink("s", "t/" * 200),
    hardlink("h", "a/file"),
    file("z" * 200, b"x"),
)
