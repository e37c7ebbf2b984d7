"""Reading request heads: llhttp judges their syntax, this module their size and their sense.

Nothing here does I/O. Bytes go in as they arrive; a `Head` comes out, or `HeadRefused` says what is wrong.
"""

from __future__ import annotations

import re
from typing import Final

import httptools
from msgspec import Struct

_TARGET = re.compile(rb'/[!"$-~]*')
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]+")
_SINGLE: Final = (b"host", b"content-length", b"transfer-encoding", b"expect")


class HeadRefused(Exception):
    """A request head that is not served; `status` is what its sender is told. Nothing ran."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Head(Struct, frozen=True, kw_only=True):
    """One request head that makes sense: names in lower case, values without surrounding blanks.

    `content_length` is the size of the body in bytes, or None when the body is chunked.
    """

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    content_length: int | None
    expects_continue: bool
    keep_alive: bool


class HeadReader:
    """Reads one request head of at most `bytes_max` bytes and `fields_max` fields; `began` once it has any byte."""

    __slots__ = ("_ended", "_fields_max", "_headers", "_parser", "_past_blanks", "_room", "_tail", "_url", "began")

    def __init__(self, *, bytes_max: int, fields_max: int) -> None:
        self.began = False
        self._room = bytes_max
        self._fields_max = fields_max
        self._past_blanks = False
        self._tail = b""  # the last bytes, in which the empty line at the end may have begun
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._ended = False
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> tuple[Head | None, bytes]:
        """Take bytes of the head; return it once it is whole, and the bytes that follow it.

        Raises `HeadRefused`; the reader is of no use afterwards.
        """
        self.began = True
        if not self._past_blanks:
            stripped = data.lstrip(b"\r\n")  # left over from sloppy senders; it counts, and nothing else is forgiven
            self._spend(len(data) - len(stripped))
            if not stripped:
                return None, b""
            self._past_blanks, data = True, stripped
        joined = self._tail + data
        found = joined.find(b"\r\n\r\n")
        end = found + 4 - len(self._tail) if found >= 0 else len(data)
        self._parse(data[: min(end, self._room)])
        self._spend(end)
        if len(self._headers) > self._fields_max:
            raise HeadRefused(431, f"the request head has more than {self._fields_max} fields")
        if self._ended:
            return self._judge(), data[end:]
        if found >= 0:
            raise HeadRefused(400, "the request head is malformed: an empty line where a field was due")
        self._tail = joined[-3:]
        return None, b""

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # an Upgrade may be ignored, and is; the target of a CONNECT is refused below
        except httptools.HttpParserError as exc:
            raise HeadRefused(400, f"the request head is malformed: {exc}") from exc

    def _spend(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise HeadRefused(431, "the request head is too large")

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target (llhttp calls this)."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one field (llhttp calls this)."""
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Note that the head is whole (llhttp calls this)."""
        self._ended = True

    def _judge(self) -> Head:
        parser = self._parser
        del self._parser  # it refers back to this reader: no garbage is left for the collector
        if (version := parser.get_http_version()) != "1.1":
            # A reply to HTTP/1.0 would end with its connection, and a truncated one would look complete.
            raise HeadRefused(505, f"HTTP/{version} is not served; speak HTTP/1.1 (nginx: proxy_http_version 1.1)")
        return judge(parser.get_method().decode("ascii"), self._url, self._headers)


def judge(method: str, target: bytes, headers: list[tuple[bytes, bytes]]) -> Head:
    """The head, if it makes sense as HTTP/1.1. Raises `HeadRefused`."""
    if not _TARGET.fullmatch(target):
        raise HeadRefused(400, "the request target must begin with / and hold no fragment")
    fields = dict(headers)
    if len(fields) < len(headers):
        _refuse_duplicates([name for name, _ in headers])
    if not _HOST.fullmatch(fields.get(b"host", b"")):
        raise HeadRefused(400, "exactly one valid Host field is required")
    expect = fields.get(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        raise HeadRefused(417, "the only expectation that can be met is 100-continue")
    length = _content_length(fields.get(b"content-length"), fields.get(b"transfer-encoding"))
    return Head(
        method=method,
        target=target,
        headers=headers,
        content_length=length,
        expects_continue=expect is not None and length != 0,
        keep_alive=b"connection" not in fields or not _asks_to_close(headers),
    )


def _refuse_duplicates(names: list[bytes]) -> None:
    for name in _SINGLE:
        if names.count(name) > 1:
            raise HeadRefused(400, f"there is more than one field {name.decode()}")


def _content_length(length: bytes | None, coding: bytes | None) -> int | None:
    if coding is not None:
        if length is not None or coding.lower() != b"chunked":
            raise HeadRefused(501, "the only transfer coding that is served is chunked, without Content-Length")
        return None
    if length is None:
        return 0
    if not length.isdigit():
        raise HeadRefused(400, "Content-Length must be a decimal number")
    return int(length)


def _asks_to_close(headers: list[tuple[bytes, bytes]]) -> bool:
    tokens = b",".join(value for name, value in headers if name == b"connection").lower().split(b",")
    return b"close" in (token.strip() for token in tokens)
