"""Which header fields pass between a caller and a guest, and what the front itself reads of them.

One pass over a request's fields sorts them into ours and the guest's; names are in lower case already, as ASGI and the
seam promise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from substrate_cluster.ingress.errors import Fields, refused
from substrate_seam.errors import Reason
from substrate_seam.invocation import Demands, Headers, Isolation, Start, Started, Trace

Field = tuple[bytes, bytes]

_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection"}
)
# What the front consumes, or what the node writes anew.
_OURS: Final = _HOP_BY_HOP | {
    b"authorization",
    b"content-length",
    b"expect",
    b"forwarded",
    b"host",
    b"traceparent",
    b"tracestate",
}
_OUR_PREFIXES: Final = (b"fc-", b"proxy-", b"x-forwarded-")
_READ_TOO: Final = frozenset({b"origin", b"sec-fetch-site"})

_NEVER_OUT: Final = _HOP_BY_HOP | {b"server-timing"}
_NEVER_OUT_PREFIXES: Final = (b"fc-", b"x-fc-", b"proxy-")

_TRACEPARENT: Final = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE: Final = re.compile(rb"[ -~]{1,512}")

_NO_DEMANDS: Final = Demands()


class Sorted(NamedTuple):
    """A request's fields: the values of those the front reads or drops, by name, and those meant for the guest."""

    ours: Mapping[bytes, list[bytes]]
    guest: list[Field]


def sort_fields(fields: Iterable[Field]) -> Sorted:
    """Sort a request's fields in one pass."""
    ours: dict[bytes, list[bytes]] = {}
    guest: list[Field] = []
    for field in fields:
        name = field[0]
        if name in _OURS or name.startswith(_OUR_PREFIXES):
            ours.setdefault(name, []).append(field[1])
            continue
        if b"_" in name and _ours_in_disguise(name):
            continue
        guest.append(field)
        if name in _READ_TOO:
            ours.setdefault(name, []).append(field[1])
    return Sorted(ours, guest)


def _ours_in_disguise(name: bytes) -> bool:
    """Whether a guest that treats `_` and `-` alike, as CGI and WSGI do, would take this for a field of ours."""
    plain = name.replace(b"_", b"-")
    return plain in _OURS or plain.startswith(_OUR_PREFIXES)


def to_guest(fields: Sorted, *, host: bytes, authorization_used: bool) -> Headers:
    """The fields a guest gets, `Host` first. The node adds the framing, the ids and the trace context."""
    guest = [(b"host", host), *fields.guest]
    if not authorization_used:
        guest += [(b"authorization", value) for value in fields.ours.get(b"authorization", ())]
    named = _named_by(fields.ours.get(b"connection", ())) - {b"host"}
    return tuple(field for field in guest if field[0] not in named) if named else tuple(guest)


def from_guest(fields: Headers, *, status: int) -> Fields:
    """The fields of a guest's reply that its caller gets."""
    passed = []
    named: frozenset[bytes] = frozenset()
    for field in fields:
        name = field[0]
        if name in _NEVER_OUT or name.startswith(_NEVER_OUT_PREFIXES):
            if name == b"connection":
                named |= _named_by((field[1],))
            continue
        passed.append(field)
    if status in {204, 304}:  # no body follows, whatever length the guest speaks of
        named |= {b"content-length"}
    return [field for field in passed if field[0] not in named] if named else passed


def _named_by(connection: Iterable[bytes]) -> frozenset[bytes]:
    """The fields that `Connection` declares to be hop by hop."""
    names = (token.strip().lower() for value in connection for token in value.split(b","))
    return frozenset(names) - {b"", b"close", b"keep-alive"}


def started_fields(started: Started) -> Fields:
    """What a caller learns of how the guest was claimed, with a reply and with an error in its stead."""
    fields = [
        (b"fc-start", started.start.encode()),
        (b"fc-node", started.node.encode()),
        (b"fc-isolation", started.isolation.encode()),
        (
            b"server-timing",
            b"queue;dur=%.1f, claim;dur=%.1f, ready;dur=%.1f" % (started.queue_ms, started.claim_ms, started.ready_ms),
        ),
        (b"x-fc-queue-wait-ms", b"%d" % round(started.queue_ms)),
    ]
    if started.cpu_ms is not None:
        fields.append((b"x-fc-cpu-ms", b"%d" % round(started.cpu_ms)))
    if started.peak_mib is not None:
        fields.append((b"x-fc-peak-rss-mib", b"%d" % round(started.peak_mib)))
    return fields


def demands_of(ours: Mapping[bytes, list[bytes]]) -> Demands:
    """What the caller insists on; raises `bad-request` for a demand or a value that is not known.

    An unknown demand is refused rather than ignored: whoever makes it would rather have no answer.
    """
    isolation: Isolation | None = None
    start: Start | None = None
    for name, values in ours.items():
        if not name.startswith(b"fc-require-"):
            continue
        if name == b"fc-require-isolation":
            isolation = Isolation(_one_of(name, values, tuple(Isolation)))
        elif name == b"fc-require-start":
            start = Start(_one_of(name, values, tuple(Start)))
        else:
            raise _bad(
                f"the demand {_shown(name)} is not known", "Known are fc-require-isolation and fc-require-start."
            )
    return _NO_DEMANDS if isolation is None and start is None else Demands(isolation, start)


def _one_of(name: bytes, values: list[bytes], accepted: tuple[str, ...]) -> str:
    value = values[0].strip().decode("latin-1")
    if len(values) != 1 or value not in accepted:
        raise _bad(f"{_shown(name)} is {_shown(b', '.join(values))}", f"Accepted is one of {', '.join(accepted)}.")
    return value


def trace_of(ours: Mapping[bytes, list[bytes]]) -> Trace | None:
    """The caller's trace context, if it is well-formed; a broken one is as good as none."""
    parents = ours.get(b"traceparent")
    if parents is None or len(parents) != 1 or not _TRACEPARENT.fullmatch(parents[0]):
        return None
    state = b",".join(ours.get(b"tracestate", ()))
    return Trace(parents[0].decode(), state.decode() if _TRACESTATE.fullmatch(state) else "")


def content_length(ours: Mapping[bytes, list[bytes]]) -> int | None:
    """The body's announced size in bytes, None when it comes without; raises `bad-request`."""
    lengths = ours.get(b"content-length")
    if lengths is None:
        return None
    if len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
        raise _bad("Content-Length is not one number", "")
    return int(lengths[0])


def wants_json(fields: Iterable[Field]) -> bool:
    """Whether the caller asks for errors as JSON."""
    return any(name == b"accept" and b"application/json" in value.lower() for name, value in fields)


def _bad(message: str, hint: str) -> Exception:
    return refused(Reason.BAD_REQUEST, message, hint=hint)


def _shown(raw: bytes) -> str:
    return repr(raw[:100].decode("latin-1"))
