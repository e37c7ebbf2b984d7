"""Tar archives as layers hold them: a stream in, entries out, every allocation bounded.

Read are the formats that layers and image archives come in: V7, ustar, GNU (long names, large numbers, holes) and PAX
(extended attributes, holes of all three kinds). What is not understood is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Protocol

from msgspec import Struct

from substrate_node.images.problems import ImageUnusable, Limits, shown

BLOCK = 512
CHUNK = 1 << 20
_XATTR = b"SCHILY.xattr."
_SPARSE_FIELDS = 24
_NANOSECONDS = 10**9


class Readable(Protocol):
    """Where an archive comes from; at its end it gives `b""`."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, and none only at the end."""
        ...


class Kind(Enum):
    """What an entry makes."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"


class Entry(Struct, frozen=True, kw_only=True):
    """One entry as the archive says it; nothing about it has been checked but its form.

    `pieces` are the ranges of a file that hold data, as (offset, length) in bytes, ascending; the rest are holes.
    """

    path: bytes
    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()


class Piece(Struct, frozen=True):
    """Data of the entry at hand, `offset` bytes into its file."""

    offset: int
    data: bytes


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


class TarReader:
    """The entries of one archive, in order; the data of each is read, or left, before the next is asked for.

    `origin` names the archive in errors; `leap` moves the source ahead by so many bytes, where that is cheaper than
    reading them. Raises `ImageUnusable` for anything but a well-formed archive within `limits`.
    """

    def __init__(
        self, source: Readable, origin: str, limits: Limits, *, leap: Callable[[int], object] | None = None
    ) -> None:
        self._source = source
        self._leap = leap
        self._origin = origin
        self._limits = limits
        self._left = 0  # bytes of data, padding included, that belong to the entry at hand
        self._global: dict[bytes, bytes] = {}
        self._at: int | bytes = 0  # the header, or the path of the entry, that is being read
        self._read = 0

    @property
    def offset(self) -> int:
        """How many bytes have been read of the archive: right after an entry, where its data begins."""
        return self._read

    def entries(self) -> Iterator[Entry]:
        """Every entry up to the end of the archive."""
        while (found := self._next()) is not None:
            yield found
            self.skip()

    def data(self, entry: Entry) -> Iterator[Piece]:
        """The data of the entry that was yielded last, each byte once, in pieces of at most a MiB."""
        for offset, length in entry.pieces:
            done = 0
            while done < length:
                data = self._exactly(min(CHUNK, length - done))
                self._left -= len(data)
                yield Piece(offset + done, data)
                done += len(data)

    def skip(self) -> None:
        """Go past what is left of the entry at hand."""
        if self._leap is not None:
            self._leap(self._left)
            self._read, self._left = self._read + self._left, 0
        while self._left:
            self._left -= len(self._exactly(min(CHUNK, self._left)))

    def _next(self) -> Entry | None:
        """The next entry, its extended headers taken in."""
        extended: dict[bytes, list[bytes]] = {}
        budget = self._limits.header_bytes
        while (head := self._header()) is not None:
            kind = head[156:157]
            if kind not in b"xgLKX":
                return self._entry(head, extended)
            size = self._positive(self._number(head[124:136], "size"), "size")
            budget -= size
            if budget < 0:
                raise self._wrong(f"has extended headers over the bound of {self._limits.header_bytes} bytes")
            body = self._exactly(_padded(size))[:size]
            if kind == b"L":
                extended.setdefault(b"path", [body.rstrip(b"\0")])
            elif kind == b"K":
                extended.setdefault(b"linkpath", [body.rstrip(b"\0")])
            elif kind == b"g":
                self._global |= {key: values[-1] for key, values in self._records(body).items()}
                if sum(len(key) + len(value) for key, value in self._global.items()) > self._limits.header_bytes:
                    raise self._wrong(f"has global headers over the bound of {self._limits.header_bytes} bytes")
            else:
                extended |= self._records(body)
        if extended:
            raise self._wrong("ends with an extended header that belongs to no entry")
        return None

    def _header(self) -> bytes | None:
        """The next header; None at the end, marked or not."""
        at = self._read
        head = self._some(BLOCK)
        if not head or head == bytes(BLOCK):
            return None
        self._at = at
        if len(head) < BLOCK:
            raise self._wrong(f"is cut off after {len(head)} bytes")
        if not _has_checksum(head):
            raise self._wrong("has a wrong checksum: this is no tar archive, or it is damaged")
        return head

    def _entry(self, head: bytes, extended: dict[bytes, list[bytes]]) -> Entry:
        found = {key: [value] for key, value in self._global.items()} | extended
        pax = {key: values[-1] for key, values in found.items() if values[-1]}
        path = pax.get(b"GNU.sparse.name") or pax.get(b"path") or _name(head)
        self._at = path
        link = pax.get(b"linkpath", _text(head[157:257]))
        self._check_names(path, link)
        kind = self._kind(head, path)
        packed = self._decimal(pax, b"size", self._number(head[124:136], "size")) if kind is Kind.FILE else 0
        self._left = _padded(packed)
        size, pieces = self._extent(head, found, pax, packed)
        return Entry(
            path=path,
            kind=kind,
            mode=self._number(head[100:108], "mode") & 0o7777,
            uid=self._decimal(pax, b"uid", self._number(head[108:116], "uid")),
            gid=self._decimal(pax, b"gid", self._number(head[116:124], "gid")),
            mtime_ns=self._mtime_ns(pax, head),
            size=size,
            link=link if kind in (Kind.SYMLINK, Kind.HARDLINK) else b"",
            device=self._device(head) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0),
            xattrs=tuple(
                sorted((key[len(_XATTR) :], values[-1]) for key, values in found.items() if key.startswith(_XATTR))
            ),
            pieces=pieces,
        )

    def _check_names(self, path: bytes, link: bytes) -> None:
        for name in (path, link):
            if len(name) > self._limits.path_bytes:
                raise self._wrong(f"has a name of {len(name)} bytes; accepted are {self._limits.path_bytes}")
            if b"\0" in name:
                raise self._wrong("has a name with a zero byte in it")

    def _kind(self, head: bytes, path: bytes) -> Kind:
        letter = head[156:157]
        if letter not in _KINDS:
            accepted = "files, directories, links, devices and fifos"
            raise self._wrong(f"is of a type that is not known ({letter!r}); accepted are {accepted}")
        if letter == b"\0" and path.endswith(b"/"):
            return Kind.DIRECTORY
        return _KINDS[letter]

    def _extent(
        self, head: bytes, found: dict[bytes, list[bytes]], pax: dict[bytes, bytes], packed: int
    ) -> tuple[int, tuple[tuple[int, int], ...]]:
        """The size of a file as its reader sees it, and where its data lies in it."""
        if head[156:157] == b"S":
            size, numbers = self._number(head[483:495], "real size"), self._old_map(head)
        elif pax.get(b"GNU.sparse.major") == b"1":
            size, numbers = self._decimal(pax, b"GNU.sparse.realsize", packed), self._leading_map()
        elif b"GNU.sparse.map" in pax:
            size = self._decimal(pax, b"GNU.sparse.size", packed)
            numbers = [self._digits(number) for number in pax[b"GNU.sparse.map"].split(b",")]
        elif b"GNU.sparse.offset" in found:
            size = self._decimal(pax, b"GNU.sparse.size", packed)
            offsets, lengths = found[b"GNU.sparse.offset"], found.get(b"GNU.sparse.numbytes", [])
            numbers = [self._digits(number) for pair in zip(offsets, lengths, strict=False) for number in pair]
        else:
            return packed, ((0, packed),) if packed else ()
        return size, self._checked_map(size, numbers)

    def _checked_map(self, size: int, numbers: list[int]) -> tuple[tuple[int, int], ...]:
        pieces = tuple((offset, length) for offset, length in zip(numbers[::2], numbers[1::2], strict=False) if length)
        end = 0
        for offset, length in pieces:
            if offset < end or offset + length > size:
                raise self._wrong("has a map of holes that overlaps itself or leaves the file")
            end = offset + length
        if len(numbers) % 2 or _padded(sum(length for _, length in pieces)) != self._left:
            raise self._wrong("has a map of holes that does not fit its data")
        return pieces

    def _old_map(self, head: bytes) -> list[int]:
        fields, more = head[386:482], head[482]
        numbers = self._sparse_fields(fields)
        while more:
            block = self._exactly(BLOCK)
            numbers += self._sparse_fields(block[:504])
            self._check_map_size(len(numbers))
            more = block[504]
        return numbers

    def _sparse_fields(self, fields: bytes) -> list[int]:
        pairs = [fields[at : at + _SPARSE_FIELDS] for at in range(0, len(fields), _SPARSE_FIELDS)]
        return [
            self._number(half, "map of holes")
            for pair in pairs
            if len(pair) == _SPARSE_FIELDS and pair[0]
            for half in (pair[:12], pair[12:])
        ]

    def _leading_map(self) -> list[int]:
        """The map that precedes the data: decimal numbers, a line each, the first of them the count of pairs."""
        numbers: list[int] = []
        rest = b""
        while not numbers or len(numbers) <= 2 * numbers[0]:
            if self._left < BLOCK or len(rest) > 20:
                raise self._wrong("has a map of holes that is cut off")
            *lines, rest = (rest + self._exactly(BLOCK)).split(b"\n")
            self._left -= BLOCK
            numbers += [self._digits(line) for line in lines]
            self._check_map_size(max(len(numbers), 2 * numbers[0] if numbers else 0))
        return numbers[1 : 1 + 2 * numbers[0]]

    def _check_map_size(self, numbers: int) -> None:
        if numbers * 8 > self._limits.header_bytes:
            raise self._wrong(f"has a map of holes over the bound of {self._limits.header_bytes} bytes")

    def _records(self, body: bytes) -> dict[bytes, list[bytes]]:
        """PAX records, `length key=value` and a newline each, the length that of the whole record."""
        records: dict[bytes, list[bytes]] = {}
        at = 0
        while at < len(body) and body[at]:
            blank = body.find(b" ", at, at + 20)
            length = self._digits(body[at:blank]) if blank > 0 else 0
            record = body[blank + 1 : at + length]
            key, equals, value = record[:-1].partition(b"=")
            if at + length > len(body) or not record.endswith(b"\n") or not equals or not key:
                raise self._wrong("has a malformed extended header")
            records.setdefault(key, []).append(value)
            at += length
        return records

    def _mtime_ns(self, pax: dict[bytes, bytes], head: bytes) -> int:
        if b"mtime" not in pax:
            return self._number(head[136:148], "mtime") * _NANOSECONDS
        sign = -1 if pax[b"mtime"].startswith(b"-") else 1
        seconds, _, fraction = pax[b"mtime"].removeprefix(b"-").partition(b".")
        nanoseconds = self._digits(fraction[:9].ljust(9, b"0"))
        return sign * (self._digits(seconds or b"0") * _NANOSECONDS + nanoseconds)

    def _device(self, head: bytes) -> tuple[int, int]:
        return self._number(head[329:337], "device number"), self._number(head[337:345], "device number")

    def _decimal(self, pax: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
        return self._digits(pax[key]) if key in pax else self._positive(otherwise, key.decode())

    def _digits(self, text: bytes) -> int:
        if not text.isdigit() or len(text) > 20:
            raise self._wrong(f"has {shown(text)!r} where a decimal number belongs")
        return int(text)

    def _number(self, field: bytes, meaning: str) -> int:
        """A number in octal, or in base 256 when its first bit says so."""
        if field[0] & 0x80:
            value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
            return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
        digits = field.split(b"\0")[0].strip()
        try:
            return int(digits or b"0", 8)
        except ValueError:
            raise self._wrong(f"has a {meaning} that is no octal number: {shown(digits)!r}") from None

    def _positive(self, number: int, meaning: str) -> int:
        if number < 0:
            raise self._wrong(f"has a negative {meaning}: {number}")
        return number

    def _exactly(self, size: int) -> bytes:
        data = self._some(size)
        if len(data) < size:
            raise self._wrong("is cut off: the archive ends too early")
        return data

    def _some(self, size: int) -> bytes:
        """As many bytes as asked for, or all that are left."""
        data = self._source.read(size)
        if 0 < len(data) < size:
            parts = [data]
            missing = size - len(data)
            while missing and (more := self._source.read(missing)):
                parts.append(more)
                missing -= len(more)
            data = b"".join(parts)
        self._read += len(data)
        return data

    def _wrong(self, what: str) -> ImageUnusable:
        where = f"the header at byte {self._at}" if isinstance(self._at, int) else f"the entry {shown(self._at)!r}"
        return ImageUnusable(f"{self._origin}: {where} {what}")


def _has_checksum(head: bytes) -> bool:
    """Whether its bytes add up to what it says; some tars of old took them for signed."""
    try:
        claimed = int(head[148:156].split(b"\0")[0].strip(), 8)
    except ValueError:
        return False
    total = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    return total == claimed or total - 256 * sum(byte > 127 for byte in head[:148] + head[156:]) == claimed


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(field: bytes) -> bytes:
    return field.split(b"\0")[0]


def _name(head: bytes) -> bytes:
    """The name in a header; only POSIX archives have a prefix, where GNU ones keep times and holes."""
    name = _text(head[:100])
    prefix = _text(head[345:500]) if head[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
