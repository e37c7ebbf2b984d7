"""The one place where errors become statuses and bodies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import Struct

from substrate_seam.errors import UNAVAILABLE, Ran, Reason, SubstrateError
from substrate_seam.events import CallRefused, Emit

Fields = list[tuple[bytes, bytes]]
Refusal = Callable[[int, str, str], tuple[Fields, bytes]]
"""Status, reason and message of a head that the listener refuses; the fields and the body to answer with."""

STATUS: Final[Mapping[Reason, int]] = {
    Reason.BAD_REQUEST: 400,
    Reason.BAD_SESSION: 400,
    Reason.UNAUTHENTICATED: 401,
    Reason.FORBIDDEN: 403,
    Reason.UNKNOWN_WORKLOAD: 404,
    Reason.NOT_FOUND: 404,
    Reason.BODY_TIMEOUT: 408,
    Reason.BODY_TOO_LARGE: 413,
    Reason.CALLER_LIMIT: 429,
    Reason.OVERLOADED: 503,
    Reason.CAPACITY: 503,
    Reason.QUEUE_TIMEOUT: 503,
    Reason.MEMORY: 503,
    Reason.DRAINING: 503,
    Reason.BOOT_FAILED: 503,
    Reason.RESTORE_FAILED: 503,
    Reason.NOT_READY: 503,
    Reason.UNKNOWN_DIGEST: 503,
    Reason.INCOMPATIBLE: 503,
    Reason.NODE_UNREACHABLE: 503,
    Reason.DUPLICATE: 502,
    Reason.CANCELLED: 409,
    Reason.GUEST_FAILED: 502,
    Reason.GUEST_TIMEOUT: 504,
    Reason.DEPENDENCY_UNAVAILABLE: 503,
    Reason.INTERNAL: 500,
}

_PREFIX: Final[Mapping[Reason, str]] = {
    **dict.fromkeys(UNAVAILABLE, "guest unavailable: "),
    **dict.fromkeys((Reason.GUEST_FAILED, Reason.GUEST_TIMEOUT, Reason.CANCELLED, Reason.INTERNAL), "invoke failed: "),
}
_MAY_HAVE_RUN: Final = frozenset({Reason.GUEST_FAILED, Reason.GUEST_TIMEOUT, Reason.INTERNAL})


class _Problem(Struct, frozen=True, omit_defaults=True):
    reason: Reason
    ran: Ran
    message: str
    invocation_id: str
    explain: str
    hint: str = ""
    retry_after_s: float | None = None


class _Body(Struct, frozen=True):
    error: _Problem


def refused(reason: Reason, message: str, *, hint: str = "", retry_after_s: float | None = None) -> SubstrateError:
    """The error of a request that the front turns away: nothing ran."""
    return SubstrateError(reason, message, ran=Ran.NO, hint=hint, retry_after_s=retry_after_s)


def told_reason(reason: Reason) -> Reason:
    """The reason as a caller hears it: a duplicate is the planes' business, to a caller its first delivery is lost."""
    return Reason.GUEST_FAILED if reason is Reason.DUPLICATE else reason


def answer_to(error: SubstrateError, invocation_id: str, *, as_json: bool) -> tuple[int, Fields, bytes]:
    """Status, fields (but for Content-Length) and body that tell a caller of an error."""
    reason = told_reason(error.reason)
    problem = _Problem(
        reason=reason,
        ran=error.ran,
        message=_PREFIX.get(reason, "") + _encodable(error.message),
        invocation_id=invocation_id,
        explain=f"fc-invoke explain {invocation_id}",
        hint=_encodable(error.hint),
        retry_after_s=error.retry_after_s,
    )
    body = msgspec.json.encode(_Body(problem)) if as_json else _text(problem)
    return STATUS[reason], _fields(problem, as_json=as_json), body


def head_refusals(*, mint_id: Callable[[], str], emit: Emit) -> Refusal:
    """What a listener answers, in our words, to heads that it refuses before the application hears of them.

    `reason` should be one of `Reason`; any other word is told as `bad-request`. The listener adds Content-Length.
    """

    def refusal(status: int, reason: str, message: str) -> tuple[Fields, bytes]:
        known = Reason(reason) if reason in set(Reason) else Reason.BAD_REQUEST
        ran = Ran.MAYBE if known in _MAY_HAVE_RUN else Ran.NO
        invocation_id = mint_id()
        emit(CallRefused(invocation_id=invocation_id, reason=known, status=status, message=message))
        _, fields, body = answer_to(SubstrateError(known, message, ran=ran), invocation_id, as_json=False)
        return [*fields, (b"fc-invocation-id", invocation_id.encode())], body

    return refusal


def _text(problem: _Problem) -> bytes:
    hint = f"hint: {problem.hint}\n" if problem.hint else ""
    return f"{problem.message}\n{hint}explain: {problem.explain}\n".encode()


def _fields(problem: _Problem, *, as_json: bool) -> Fields:
    fields = [
        (b"content-type", b"application/json" if as_json else b"text/plain; charset=utf-8"),
        (b"x-content-type-options", b"nosniff"),  # a message may quote what a stranger sent
        (b"fc-error", problem.reason.encode()),
        (b"fc-ran", problem.ran.encode()),
    ]
    if problem.reason is Reason.UNAUTHENTICATED:
        fields.append((b"www-authenticate", b"Bearer"))
    if problem.retry_after_s is not None:
        fields.append((b"retry-after", b"%d" % max(1, math.ceil(problem.retry_after_s))))
    return fields


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
