"""Where a request body ends: by its length, or by its chunks. No I/O; bytes in, the body's bytes and the rest out."""

from __future__ import annotations

import re
from typing import Final, Protocol

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED: Final = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;%b(?:=(?:%b|%b))?)*" % (_TOKEN, _TOKEN, _QUOTED))
_TRAILER = re.compile(rb"%b:[\t -~\x80-\xff]*" % _TOKEN)
_LINE_MAX: Final = 4096
_WASTE_MAX: Final = 16384


class BodyRefused(Exception):
    """The body is not framed as HTTP asks; where it ends is unknown, so its connection must end."""


class BodyReader(Protocol):
    """Cuts one body out of the bytes of a connection."""

    whole: bool

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """The bytes of the body in `data`, and what follows the body. Raises `BodyRefused`."""
        ...

    def left(self) -> int | None:
        """How many bytes of the body are still to come; None when only its end will tell."""
        ...


class SizedBody:
    """A body of a known number of bytes."""

    __slots__ = ("_left", "whole")

    def __init__(self, length: int) -> None:
        self._left = length
        self.whole = length == 0

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """The bytes of the body in `data`, and what follows the body."""
        body = data[: self._left]
        self._left -= len(body)
        self.whole = self._left == 0
        return body, data[len(body) :]

    def left(self) -> int:
        """How many bytes of the body are still to come."""
        return self._left


class ChunkedBody:
    """A chunked body. Trailers are checked and dropped; extensions and tiny chunks may waste only so much."""

    def __init__(self) -> None:
        self._line = b""  # of a line that has not ended yet
        self._chunk_left = 0
        self._due = self._size
        self._waste = 0
        self.whole = False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """The bytes of the body in `data`, and what follows the body. Raises `BodyRefused`."""
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.whole:
            if self._chunk_left:
                piece = data[at : at + self._chunk_left]
                self._chunk_left -= len(piece)
                at += len(piece)
                pieces.append(piece)
                continue
            end = data.find(b"\n", at)
            self._line += data[at : end + 1 if end >= 0 else len(data)]
            if len(self._line) > _LINE_MAX:
                raise BodyRefused("a line of the chunked body is too long")
            if end < 0:
                return b"".join(pieces), b""
            at = end + 1
            self._take_line()
        return b"".join(pieces), data[at:]

    def left(self) -> None:
        """Unknown: only the last chunk tells."""

    def _take_line(self) -> None:
        line, self._line = self._line, b""
        if not line.endswith(b"\r\n"):
            raise BodyRefused("a line of the chunked body does not end with CRLF")
        self._due(line[:-2])
        if self._waste > _WASTE_MAX:
            raise BodyRefused("the chunked body is mostly framing")

    def _size(self, line: bytes) -> None:
        match = _SIZE.fullmatch(line)
        if match is None:
            raise BodyRefused("a chunk does not begin with its size")
        self._chunk_left = int(match[1], 16)
        self._due = self._end_of_chunk if self._chunk_left else self._trailer
        # A chunk may cost its sender sixteen bytes and as much again as it carries (Go's reader asks the same).
        self._waste = max(0, self._waste + len(line) - 16 - self._chunk_left)

    def _end_of_chunk(self, line: bytes) -> None:
        if line:
            raise BodyRefused("a chunk is longer than its size")
        self._due = self._size

    def _trailer(self, line: bytes) -> None:
        self._waste += len(line) + 2
        if not line:
            self.whole = True
        elif not _TRAILER.fullmatch(line):
            raise BodyRefused("a trailer of the chunked body is malformed")
