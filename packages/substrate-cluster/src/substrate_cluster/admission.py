"""What the front takes on: so many calls at once per caller, and so many bytes of bodies in memory."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

from substrate_seam.errors import Ran, Reason, SubstrateError

_RETRY_AFTER_S: Final = 1.0


class Admission:
    """The caps, and what is held against them. `body_bytes` are reserved now, `in_flight` has a caller's calls."""

    def __init__(self, *, caller_limit: int, body_budget_bytes: int) -> None:
        self._caller_limit = caller_limit
        self._body_budget_bytes = body_budget_bytes
        self.in_flight: dict[str, int] = {}
        self.body_bytes = 0

    def admit(self, caller: str) -> Hold:
        """A place among the caller's calls for the length of a `with` block.

        Entering raises `caller-limit`; leaving gives back the place and every byte, once.
        """
        return Hold(self, caller)

    def _enter(self, caller: str) -> None:
        count = self.in_flight.get(caller, 0)
        if count >= self._caller_limit:
            raise SubstrateError(
                Reason.CALLER_LIMIT,
                f"caller {caller!r} has {count} calls in flight, which is its limit",
                ran=Ran.NO,
                hint="Wait until one of them has ended.",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.in_flight[caller] = count + 1

    def _leave(self, caller: str, body_bytes: int) -> None:
        self.body_bytes -= body_bytes
        count = self.in_flight[caller] - 1
        if count:
            self.in_flight[caller] = count
        else:
            del self.in_flight[caller]

    def _reserve(self, more_bytes: int) -> None:
        if self.body_bytes + more_bytes > self._body_budget_bytes:
            raise SubstrateError(
                Reason.OVERLOADED,
                f"the bodies of calls in flight would be over {self._body_budget_bytes} bytes",
                ran=Ran.NO,
                hint="Try again when others have ended, or send less at a time.",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.body_bytes += more_bytes


class Hold:
    """One admitted call: its place, and the bytes that `cover` reserved."""

    __slots__ = ("_admission", "_body_bytes", "_caller")

    def __init__(self, admission: Admission, caller: str) -> None:
        self._admission = admission
        self._caller = caller
        self._body_bytes = 0

    def cover(self, body_bytes: int) -> None:
        """Reserve up to `body_bytes` in all for this call's body; raises `overloaded` and then reserves no more."""
        more_bytes = body_bytes - self._body_bytes
        if more_bytes > 0:
            self._admission._reserve(more_bytes)  # noqa: SLF001  # a hold is the admission's other half
            self._body_bytes = body_bytes

    def __enter__(self) -> Self:
        self._admission._enter(self._caller)  # noqa: SLF001  # as above
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admission._leave(self._caller, self._body_bytes)  # noqa: SLF001  # as above
        self._body_bytes = 0
