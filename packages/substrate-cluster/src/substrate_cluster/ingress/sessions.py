"""Which workload a path names, and the session behind it, cut from the bytes as they came.

A server's decoded path merges different bytes, so sessions come from the raw one.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from substrate_cluster.ingress.errors import refused
from substrate_seam.errors import Reason

SESSION_BYTES_MAX: Final = 256

_PLAIN: Final = re.compile(rb"[A-Za-z0-9_~-][A-Za-z0-9._~-]*")
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PRINTABLE: Final = re.compile(rb"[!-~]*")


def cut_workload(raw_path: bytes, prefix: bytes) -> tuple[str, bytes]:
    """The workload's name after `prefix`, and the raw rest after its slash."""
    name, _, rest = raw_path[len(prefix) :].partition(b"/")
    return name.decode("latin-1"), rest


def parse_session(raw: bytes) -> str | None:
    """The session that `raw` spells, each segment percent-encoded with nothing safe; None when it spells none.

    Equal sessions have equal spellings and different ones different spellings. Raises `bad-session`.
    """
    if len(raw) <= SESSION_BYTES_MAX and _PLAIN.fullmatch(raw):
        return raw.decode()  # most sessions are one plain word, which is its own spelling
    if not raw:
        return None
    if _BAD_ESCAPE.search(raw):
        raise _bad("has a `%` without two hex digits")
    # An upper bound before any work: an escape makes at most three bytes of one.
    if len(raw) > 3 * SESSION_BYTES_MAX or len(unquote_to_bytes(raw)) > SESSION_BYTES_MAX:
        raise _bad(f"is over {SESSION_BYTES_MAX} bytes")
    return "/".join(_respelled(segment) for segment in raw.split(b"/"))


def _respelled(raw_segment: bytes) -> str:
    try:
        segment = unquote_to_bytes(raw_segment).decode()
    except UnicodeDecodeError:
        raise _bad("is not UTF-8") from None
    if _CONTROL.search(segment):
        raise _bad("has control characters")
    # An encoded slash hides no dots either: some guests decode before they split.
    if any(part in {".", ".."} for part in segment.split("/")):
        raise _bad("has a `.` or `..` segment")
    return quote(segment, safe="")


def guest_target(path: str, query: bytes) -> str:
    """The request target for a guest in ASCII; raises `bad-request` when the query is not printable ASCII."""
    return path + "?" + printable(query) if query else path


def printable(raw: bytes) -> str:
    """`raw` as text; raises `bad-request` unless all of it is printable ASCII."""
    if not _PRINTABLE.fullmatch(raw):
        raise refused(Reason.BAD_REQUEST, "the request target has bytes that are not printable ASCII")
    return raw.decode()


def _bad(what: str) -> Exception:
    return refused(
        Reason.BAD_SESSION,
        f"the session {what}",
        hint=f"A session is UTF-8 of at most {SESSION_BYTES_MAX} bytes, without control characters or dot segments.",
    )
