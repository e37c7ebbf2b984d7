"""Reading request heads: llhttp judges their syntax, this module their size and their sense.

Nothing here does I/O. Bytes go in as they arrive; a `Head` comes out, or `HeadRefused` says what is wrong.
"""

from __future__ import annotations

import re

import httptools
from msgspec import Struct

_TARGET = re.compile(rb'/[!"$-~]*')
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]+")
_JUDGED = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect", b"connection"})


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
    """Reads one request head of at most `bytes_max` bytes and `fields_max` fields."""

    def __init__(self, *, bytes_max: int, fields_max: int) -> None:
        self._room = bytes_max
        self._bytes_max = bytes_max
        self._fields_max = fields_max
        self._parser = httptools.HttpRequestParser(self)
        self._tail = b""
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._judged: dict[bytes, list[bytes]] = {}
        self._past_blanks = False
        self._ended = False
        self.began = False

    def feed(self, data: bytes) -> tuple[Head | None, bytes]:
        """Take bytes of the head; return it once it is whole, and the bytes that follow it.

        Raises `HeadRefused`; the reader is of no use afterwards.
        """
        self.began = True
        if not self._past_blanks:
            stripped = data.lstrip(b"\r\n")  # left over from sloppy senders; it counts, and nothing else is forgiven
            self._spend(len(data) - len(stripped))
            data = stripped
            if not data:
                return None, b""
            self._past_blanks = True
        end = self._end_in(data)
        self._parse(data[: min(end or len(data), self._room)])
        self._spend(end or len(data))
        if len(self._headers) > self._fields_max:
            raise HeadRefused(431, f"the request head has more than {self._fields_max} fields")
        if self._ended:
            return self._judge(), data[end:] if end else b""
        if end:
            raise HeadRefused(400, "the request head is malformed: an empty line where a field was due")
        return None, b""

    def _end_in(self, data: bytes) -> int:
        """Where the head ends in `data`, or 0: the empty line may have begun in the bytes before."""
        seen = len(self._tail)
        joined = self._tail + data if seen else data
        found = joined.find(b"\r\n\r\n")
        self._tail = joined[-3:]
        return found + 4 - seen if found >= 0 else 0

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
            raise HeadRefused(431, f"the request head is larger than {self._bytes_max} bytes")

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target (llhttp calls this)."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one field (llhttp calls this)."""
        name, value = name.lower(), value.strip(b" \t")
        self._headers.append((name, value))
        if name in _JUDGED:
            self._judged.setdefault(name, []).append(value)

    def on_headers_complete(self) -> None:
        """Note that the head is whole (llhttp calls this)."""
        self._ended = True

    def _judge(self) -> Head:
        if (version := self._parser.get_http_version()) != "1.1":
            # A reply to HTTP/1.0 would end with its connection, and a truncated one would look complete.
            raise HeadRefused(505, f"HTTP/{version} is not served; speak HTTP/1.1 (nginx: proxy_http_version 1.1)")
        if not _TARGET.fullmatch(self._url):
            raise HeadRefused(400, "the request target must begin with / and hold no fragment")
        hosts = self._judged.get(b"host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            raise HeadRefused(400, "exactly one valid Host field is required")
        expects = self._judged.get(b"expect", [])
        if expects and (len(expects) > 1 or expects[0].lower() != b"100-continue"):
            raise HeadRefused(417, "the only expectation that can be met is 100-continue")
        length = self._content_length()
        connection = b",".join(self._judged.get(b"connection", ()))
        return Head(
            method=self._parser.get_method().decode("ascii"),
            target=self._url,
            headers=self._headers,
            content_length=length,
            expects_continue=bool(expects) and length != 0,
            keep_alive=b"close" not in (connection.lower().replace(b" ", b"").split(b",") if connection else ()),
        )

    def _content_length(self) -> int | None:
        codings, lengths = self._judged.get(b"transfer-encoding"), self._judged.get(b"content-length", [])
        if codings:
            if lengths or len(codings) > 1 or codings[0].lower() != b"chunked":
                raise HeadRefused(501, "the only transfer coding that is served is one chunked, without Content-Length")
            return None
        if len(lengths) > 1 or (lengths and not lengths[0].isdigit()):
            raise HeadRefused(400, "Content-Length must be one decimal number")
        return int(lengths[0]) if lengths else 0
