"""Heads of HTTP/1.1 as nodes and workloads plainly spell them. What is spelled otherwise is for h11 to judge.

h11 parses and writes in many small steps, and a guest that was cloned a moment ago pays for the first use of each.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/1\.1\r\n((?:%s:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n" % (_TOKEN, _TOKEN))
_FIELD = re.compile(rb"%s:(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?" % _TOKEN)
_STATUSES = range(200, 1000)
_LENGTH_DIGITS_MAX = 18


class RequestHead(NamedTuple):
    """The head of a request; its body has `length_bytes` bytes, and begins `at_byte` of what was received."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    length_bytes: int
    at_byte: int


def plain_request(received: bytes) -> RequestHead | None:
    """The head that `received` begins with; None for one that is not whole, or not plain."""
    found = _REQUEST.match(received)
    if found is None:
        return None
    method, target, lines = found[1].decode("ascii"), found[2].decode("ascii"), found[3].decode("latin-1")
    headers = []
    hosts, length = 0, ""
    for line in lines.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in ("transfer-encoding", "expect") or (name == "content-length" and (length or not _is_length(value))):
            return None
        if name == "content-length":
            length = value
        hosts += name == "host"
        headers.append((name, value))
    if hosts != 1 or method == "CONNECT":
        return None
    return RequestHead(method, target, tuple(headers), int(length or 0), found.end())


def is_plain_response(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether this is a head that HTTP knows, without a length of its own; false also where it takes h11 to tell."""
    return status in _STATUSES and all(_is_plain(name, value) for name, value in headers)


def response_head(status: int, headers: Iterable[tuple[bytes, bytes]], length_bytes: int) -> bytes:
    """The bytes of a plain head with a body of that length, after which the connection ends."""
    lines = [b"HTTP/1.1 %d " % status]
    lines += [name + b": " + value for name, value in headers]
    lines += [b"content-length: %d" % length_bytes, b"connection: close", b"", b""]
    return b"\r\n".join(lines)


def _is_plain(name: bytes, value: bytes) -> bool:
    if type(name) is not bytes or type(value) is not bytes:  # nothing promises that a workload keeps to it
        return False
    return name.lower() != b"content-length" and _FIELD.fullmatch(name + b":" + value) is not None


def _is_length(value: str) -> bool:
    return value.isdecimal() and value.isascii() and len(value) <= _LENGTH_DIGITS_MAX
