"""What can go wrong with an invocation, and whether anything ran."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from substrate_seam.invocation import Started


class Ran(StrEnum):
    """Whether a workload may have acted on an invocation."""

    NO = "no"
    MAYBE = "maybe"


class Reason(StrEnum):
    """Why a caller got no answer from a guest; the value is what `fc-error` says."""

    BAD_REQUEST = "bad-request"
    BAD_SESSION = "bad-session"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    UNKNOWN_WORKLOAD = "unknown-workload"
    NOT_FOUND = "not-found"
    BODY_TIMEOUT = "body-timeout"
    BODY_TOO_LARGE = "body-too-large"
    CALLER_LIMIT = "caller-limit"
    OVERLOADED = "overloaded"
    CAPACITY = "capacity"
    QUEUE_TIMEOUT = "queue-timeout"
    MEMORY = "memory"
    DRAINING = "draining"
    BOOT_FAILED = "boot-failed"
    RESTORE_FAILED = "restore-failed"
    NOT_READY = "not-ready"
    UNKNOWN_DIGEST = "unknown-digest"
    INCOMPATIBLE = "incompatible"
    NODE_UNREACHABLE = "node-unreachable"
    DUPLICATE = "duplicate"
    CANCELLED = "cancelled"
    GUEST_FAILED = "guest-failed"
    GUEST_TIMEOUT = "guest-timeout"
    DEPENDENCY_UNAVAILABLE = "dependency-unavailable"
    INTERNAL = "internal"


UNAVAILABLE = frozenset(
    {
        Reason.CAPACITY,
        Reason.QUEUE_TIMEOUT,
        Reason.MEMORY,
        Reason.DRAINING,
        Reason.BOOT_FAILED,
        Reason.RESTORE_FAILED,
        Reason.NOT_READY,
        Reason.UNKNOWN_DIGEST,
        Reason.INCOMPATIBLE,
        Reason.NODE_UNREACHABLE,
    }
)
"""The reasons of `GuestUnavailable`: nothing ran, and another node may do better."""


class SubstrateError(Exception):
    """Something went wrong that a caller must hear of.

    `reason` names it, `ran` says whether the workload may have acted, `hint` what to do next, `retry_after_s`
    (seconds, or None) when trying again makes sense. `started` is how the last guest was claimed that was to serve the
    call; None if there was none, or if its reply has told it.
    """

    def __init__(
        self, reason: Reason, message: str, *, ran: Ran, hint: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.ran = ran
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.started: Started | None = None


class GuestUnavailable(SubstrateError):
    """No guest could be claimed. Nothing ran, so placing the invocation again is safe, here or elsewhere."""

    def __init__(self, reason: Reason, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        if reason not in UNAVAILABLE:
            raise ValueError(f"{reason} is no reason of GuestUnavailable; accepted are {sorted(UNAVAILABLE)}")
        super().__init__(reason, message, ran=Ran.NO, hint=hint, retry_after_s=retry_after_s)


class InvocationCancelled(SubstrateError):
    """The invocation was cancelled before it started: nothing ran, and nothing ever will under its id."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(Reason.CANCELLED, message, ran=Ran.NO, hint=hint)


class GuestFailed(SubstrateError):
    """The request reached a guest, or may have, and no whole answer came back. Never run it again unasked."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(Reason.GUEST_FAILED, message, ran=Ran.MAYBE, hint=hint)


class DuplicateInvocation(SubstrateError):
    """This id and attempt was delivered before; the first delivery may have run."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(Reason.DUPLICATE, message, ran=Ran.MAYBE, hint=hint)


class GuestTimeout(SubstrateError):
    """The exchange outlived `run_within_s`; the guest was destroyed, and may have run any part of the request."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(Reason.GUEST_TIMEOUT, message, ran=Ran.MAYBE, hint=hint)


class InternalError(SubstrateError):
    """A defect of ours stopped the invocation; it may have run."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(Reason.INTERNAL, message, ran=Ran.MAYBE, hint=hint)
