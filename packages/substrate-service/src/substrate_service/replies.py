"""Writing the heads of replies: what an application says, put into HTTP/1.1 that cannot be misread."""

from __future__ import annotations

import http
import re
from collections.abc import Iterable
from functools import lru_cache

from msgspec import Struct

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection"})
_BODILESS = frozenset({204, 304})


class ReplyHead(Struct, frozen=True, kw_only=True):
    """The bytes of a head, and what they promise.

    `length` is that of the body in bytes, or None: then it comes in chunks, or not at all if it is not `chunked`.
    `stays` says whether another request may follow.
    """

    data: bytes
    length: int | None
    chunked: bool
    stays: bool


def reply_head(
    status: int, headers: Iterable[tuple[bytes, bytes]], *, to_head_request: bool, may_stay: bool
) -> ReplyHead:
    """The head of a reply. Raises `ValueError` for what cannot be one.

    Its framing is ours: of `headers` only Content-Length counts, and whether Connection asks to close.
    """
    fields, framing = list(headers), dict[bytes, bytes]()
    if _NOT_IN_VALUE.search(b"".join([value for _, value in fields])):
        raise ValueError("the value of a field holds a control character")
    lines = [status_line(status)]
    for field, value in fields:
        name = _field_name(field)
        if name in _FRAMING:
            framing[name] = framing[name] + b"," + value if name in framing else value
        else:
            lines += (name, b": ", value, b"\r\n")
    length = _length(framing)
    if length is not None and status != 204:  # "no content" has no length to tell
        lines.append(b"content-length: %d\r\n" % length)
    bodiless = to_head_request or status in _BODILESS
    if chunked := length is None and not bodiless:
        lines.append(b"transfer-encoding: chunked\r\n")
    if not (stays := may_stay and b"close" not in framing.get(b"connection", b"").lower()):
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    return ReplyHead(data=b"".join(lines), length=None if bodiless else length, chunked=chunked, stays=stays)


@lru_cache(maxsize=600)
def status_line(status: int) -> bytes:
    """The first line of a reply; raises `ValueError` for what cannot be the final status of one."""
    if not 200 <= status <= 599:
        raise ValueError(f"{status} cannot be the status of a reply")
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


@lru_cache(maxsize=1024)
def _field_name(name: bytes) -> bytes:
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a field")
    return name.lower()


def _length(framing: dict[bytes, bytes]) -> int | None:
    value = framing.get(b"content-length")
    if value is None:
        return None
    if b"transfer-encoding" in framing or not value.isdigit():
        raise ValueError("Content-Length must be one decimal number, without Transfer-Encoding")
    return int(value)
