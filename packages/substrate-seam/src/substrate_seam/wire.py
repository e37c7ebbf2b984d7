"""The seam spelled in HTTP: paths, headers, codecs and the frames of a reply.

Guest bytes travel only inside `D` frames and as parsed fields of `H`, so a guest cannot forge an answer of ours.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from enum import IntEnum
from struct import Struct as Packing
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from substrate_seam.errors import (
    UNAVAILABLE,
    DuplicateInvocation,
    GuestFailed,
    GuestTimeout,
    GuestUnavailable,
    InternalError,
    InvocationCancelled,
    Ran,
    Reason,
    SubstrateError,
)
from substrate_seam.invocation import (
    Demands,
    GuestRequest,
    Headers,
    Invocation,
    Receipt,
    Started,
    Trace,
    WorkloadRef,
)
from substrate_seam.story import Story

INVOCATIONS: Final = "/v1/invocations"
WORKLOADS: Final = "/v1/workloads"
REPORTS: Final = "/v1/node/reports"
DRAIN: Final = "/v1/node/drain"
LIMITS: Final = "/v1/node/limits"

INVOCATION_HEADER: Final = "substrate-invocation"
BOOT_ID_HEADER: Final = "substrate-boot-id"

BODY_WITHIN_S: Final = 10.0
"""After `100 Continue`, how long the whole body may take before the node calls it off; nothing ran then."""

HEAD_BYTES_MAX: Final = 262_144
"""What a node must take as the head of a request: the 64 KiB that a caller may send, in JSON, in base64."""

DATA_BYTES_MAX: Final = 65_536
_PAYLOAD_BYTES_MAX: Final = 1_048_576
_PREFIX: Final = Packing(">BI")

MISDIRECTED: Final = 421
"""The status for whoever expects another boot id: nothing ran."""

_STATUS: Final = {
    Reason.BAD_REQUEST: 400,
    Reason.UNAUTHENTICATED: 401,
    Reason.FORBIDDEN: 403,
    Reason.NOT_FOUND: 404,
    Reason.BODY_TIMEOUT: 408,
    Reason.DUPLICATE: 409,
    Reason.CANCELLED: 409,
    Reason.BODY_TOO_LARGE: 413,
    Reason.INTERNAL: 500,
    Reason.GUEST_FAILED: 502,
    Reason.GUEST_TIMEOUT: 504,
}

_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET: Final = re.compile(r"/[!-~]*")
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(r"[\t -~\x80-\xff]*")
_TRACE: Final = re.compile(r"[ -~]*")

_Id = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
_Attempt = Annotated[int, Meta(ge=1, le=60)]
_Seconds = Annotated[float, Meta(ge=0.0, le=1e7)]


class WireError(ValueError):
    """The peer did not speak this wire; the message says what was found."""


# An invocation and its answer, as JSON.


class _Request(Struct, frozen=True):
    method: str
    target: str
    headers: list[tuple[str, str]]


class _Invocation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: _Id
    attempt: _Attempt
    workload: WorkloadRef
    request: _Request
    start_within_s: _Seconds
    run_within_s: _Seconds
    caller: str
    session: str | None = None
    demands: Demands = Demands()
    trace: Trace | None = None


class _Head(Struct, frozen=True):
    started: Started
    status: int
    headers: list[tuple[str, str]]


class _Fault(Struct, frozen=True, kw_only=True, omit_defaults=True):
    reason: str
    ran: Ran
    message: str
    hint: str = ""
    retry_after_s: float | None = None
    started: Started | None = None


class _Faulty(Struct, frozen=True):
    error: _Fault


class _End(Struct, frozen=True, kw_only=True, omit_defaults=True):
    receipt: Receipt | None = None
    error: _Fault | None = None


class CancelAnswer(Struct, frozen=True):
    """What `DELETE /v1/invocations/{id}` answers."""

    ran: Ran


class StoryAnswer(Struct, frozen=True):
    """What `GET /v1/invocations/{id}` answers; None when the node keeps nothing of it."""

    story: Story | None


class DrainOrder(Struct, frozen=True):
    """What `PUT /v1/node/drain` carries."""

    within_s: _Seconds


_encode = msgspec.json.Encoder().encode
_invocation = msgspec.json.Decoder(_Invocation)
_head = msgspec.json.Decoder(_Head)
_end = msgspec.json.Decoder(_End)
_faulty = msgspec.json.Decoder(_Faulty)


def encode_invocation(invocation: Invocation) -> bytes:
    """The value of `substrate-invocation`: everything but the body, base64url of JSON."""
    request = invocation.request
    plain = _Invocation(
        id=invocation.id,
        attempt=invocation.attempt,
        workload=invocation.workload,
        session=invocation.session,
        caller=invocation.caller,
        demands=invocation.demands,
        request=_Request(request.method, request.target, _to_text(request.headers)),
        start_within_s=max(0.0, invocation.start_within_s),
        run_within_s=max(0.0, invocation.run_within_s),
        trace=invocation.trace,
    )
    return base64.urlsafe_b64encode(_encode(plain))


def decode_invocation(value: bytes) -> Invocation:
    """Read an invocation whose body is still to come (it is empty here).

    Raises `WireError`, also for what would break out of its line in the guest's request.
    """
    try:
        plain = _invocation.decode(base64.b64decode(value, altchars=b"-_", validate=True))
        _check_lines(plain)
        headers = _to_bytes(plain.request.headers)
    except (binascii.Error, msgspec.DecodeError, UnicodeError) as error:
        raise WireError(f"{INVOCATION_HEADER}: {error}") from error
    return Invocation(
        id=plain.id,
        attempt=plain.attempt,
        workload=plain.workload,
        session=plain.session,
        caller=plain.caller,
        demands=plain.demands,
        request=GuestRequest(plain.request.method, plain.request.target, headers, b""),
        start_within_s=plain.start_within_s,
        run_within_s=plain.run_within_s,
        trace=plain.trace,
    )


def _check_lines(plain: _Invocation) -> None:
    request, trace = plain.request, plain.trace
    if not _METHOD.fullmatch(request.method) or not _TARGET.fullmatch(request.target):
        raise WireError(f"{INVOCATION_HEADER}: its method or target is not one of HTTP")
    for name, value in request.headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise WireError(f"{INVOCATION_HEADER}: the field {name[:64]!r} is not one of HTTP")
    if trace is not None and not (_TRACE.fullmatch(trace.parent) and _TRACE.fullmatch(trace.state)):
        raise WireError(f"{INVOCATION_HEADER}: its trace context is not one line of ASCII")


def encode_error(error: SubstrateError) -> tuple[int, bytes]:
    """Status and JSON body of an error told before the commit."""
    return _STATUS.get(error.reason, 503), _encode(_Faulty(_fault(error)))


def decode_error(body: bytes) -> SubstrateError:
    """The error that a peer told; raises `WireError` when it is none."""
    try:
        return _raised(_faulty.decode(body).error)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise WireError(f"an error without the form of one: {error}") from error


def _fault(error: SubstrateError) -> _Fault:
    message = error.message.encode("utf-8", "replace").decode()  # it may quote what a guest said
    return _Fault(
        reason=error.reason,
        ran=error.ran,
        message=message,
        hint=error.hint,
        retry_after_s=error.retry_after_s,
        started=error.started,
    )


_MAY_HAVE_RUN: Final[dict[str, Callable[..., SubstrateError]]] = {
    Reason.DUPLICATE: DuplicateInvocation,
    Reason.GUEST_TIMEOUT: GuestTimeout,
    Reason.INTERNAL: InternalError,
}
_NO_NODE_WOULD_TAKE_IT: Final = frozenset({Reason.BAD_REQUEST, Reason.BODY_TOO_LARGE})


def _raised(fault: _Fault) -> SubstrateError:
    error = _named(fault)
    error.started = fault.started
    return error


def _named(fault: _Fault) -> SubstrateError:
    """The exception of a fault. What a newer peer calls by a name we don't know keeps its `ran`."""
    if fault.ran is not Ran.NO:
        return _MAY_HAVE_RUN.get(fault.reason, GuestFailed)(fault.message, hint=fault.hint)
    if fault.reason == Reason.CANCELLED:
        return InvocationCancelled(fault.message, hint=fault.hint)
    if fault.reason in _NO_NODE_WOULD_TAKE_IT:
        return SubstrateError(Reason(fault.reason), fault.message, ran=Ran.NO, hint=fault.hint)
    reason = Reason(fault.reason) if fault.reason in UNAVAILABLE else Reason.NODE_UNREACHABLE
    return GuestUnavailable(reason, fault.message, hint=fault.hint, retry_after_s=fault.retry_after_s)


# The frames of a reply.


class FrameType(IntEnum):
    """The first byte of a frame."""

    HEAD = ord("H")
    DATA = ord("D")
    END = ord("E")


def head_frame(started: Started, status: int, headers: Headers) -> bytes:
    """The guest's head; comes first and once."""
    return _frame(FrameType.HEAD, _encode(_Head(started, status, _to_text(headers))))


def data_frames(chunk: bytes) -> list[bytes]:
    """A piece of the guest's body, in frames of at most 64 KiB. No bytes, no frame."""
    if len(chunk) <= DATA_BYTES_MAX:
        return [_frame(FrameType.DATA, chunk)] if chunk else []
    pieces = (chunk[at : at + DATA_BYTES_MAX] for at in range(0, len(chunk), DATA_BYTES_MAX))
    return [_frame(FrameType.DATA, piece) for piece in pieces]


def receipt_frame(receipt: Receipt) -> bytes:
    """The end of a whole reply."""
    return _frame(FrameType.END, _encode(_End(receipt=receipt)))


def error_frame(error: SubstrateError) -> bytes:
    """The end of a reply that is not whole, or that never began."""
    return _frame(FrameType.END, _encode(_End(error=_fault(error))))


def _frame(kind: FrameType, payload: bytes) -> bytes:
    return _PREFIX.pack(kind, len(payload)) + payload


_KINDS: Final = {int(kind): kind for kind in FrameType}


class FrameReader:
    """Cuts a stream of bytes into frames and keeps their order: `H`, any `D`, one `E`; or a single `E`."""

    __slots__ = ("_buffer", "ended", "headed")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.headed = False
        self.ended = False

    def feed(self, data: bytes) -> list[tuple[FrameType, bytes]]:
        """Take bytes and return the frames they complete; raises `WireError`."""
        buffer = self._buffer
        if buffer:
            buffer += data
        source = memoryview(buffer if buffer else data)  # whole frames are mostly cut out of what has just arrived
        frames: list[tuple[FrameType, bytes]] = []
        at = 0
        while len(source) - at >= _PREFIX.size:
            code, size = _PREFIX.unpack_from(source, at)
            kind = self._expected(code, size)
            end = at + _PREFIX.size + size
            if len(source) < end:
                break
            frames.append((kind, source[at + _PREFIX.size : end].tobytes()))
            self.headed = self.headed or kind is FrameType.HEAD
            self.ended = kind is FrameType.END
            at = end
        if self.ended and len(source) > at:
            raise WireError("bytes after the end frame")
        source.release()
        if buffer:
            del buffer[:at]
        else:
            buffer += data[at:]
        return frames

    def _expected(self, code: int, size: int) -> FrameType:
        if self.ended:
            raise WireError("a frame after the end frame")
        kind = _KINDS.get(code)
        if kind is None:
            raise WireError(f"a frame of unknown type {code}")
        if kind is FrameType.HEAD and self.headed:
            raise WireError("a second head frame")
        if kind is FrameType.DATA and not self.headed:
            raise WireError("a data frame before the head")
        if size > (DATA_BYTES_MAX if kind is FrameType.DATA else _PAYLOAD_BYTES_MAX):
            raise WireError(f"a frame of type {chr(code)} with {size} bytes")
        return kind


def decode_head(payload: bytes) -> tuple[Started, int, Headers]:
    """What an `H` frame says; raises `WireError`."""
    try:
        head = _head.decode(payload)
        return head.started, head.status, _to_bytes(head.headers)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise WireError(f"a head frame that cannot be read: {error}") from error


def decode_end(payload: bytes) -> Receipt | SubstrateError:
    """What an `E` frame says; raises `WireError`."""
    try:
        end = _end.decode(payload)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise WireError(f"an end frame that cannot be read: {error}") from error
    if end.error is not None and end.receipt is None:
        return _raised(end.error)
    if end.receipt is not None and end.error is None:
        return end.receipt
    raise WireError("an end frame without exactly one of receipt and error")


def _to_text(headers: Headers) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _to_bytes(headers: list[tuple[str, str]]) -> Headers:
    return tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)
