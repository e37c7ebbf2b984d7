"""Which invocations this node has seen: nothing is delivered twice, and a cancelled id never starts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from substrate_seam.errors import DuplicateInvocation, GuestFailed, InvocationCancelled, Ran, SubstrateError

KEPT_S = 900.0
"""So long an ended or fenced id is remembered, in seconds."""
_BUCKETS = 15
_BUCKET_S = KEPT_S / _BUCKETS

_FENCED, _RAN = 1, 2  # bits of a record; attempt n is bit n + 1

Interrupt = Callable[[SubstrateError, SubstrateError], Ran]
"""Ends a live call: with the first error if its request has not been written, else with the second. Says which."""


class Call:
    """One delivery of an invocation, live until `Calls.end`."""

    __slots__ = ("attempt", "id", "interrupt")

    def __init__(self, invocation_id: str, attempt: int, interrupt: Interrupt) -> None:
        self.id = invocation_id
        self.attempt = attempt
        self.interrupt = interrupt


class Calls:
    """Live calls, and what is remembered of earlier ones. `clock` gives seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._live: dict[str, Call] = {}
        self._idlers: dict[asyncio.Future[None], None] = {}
        # Records in buckets of one minute, so that forgetting costs nothing per call.
        self._buckets: deque[dict[str, int]] = deque([{}], maxlen=_BUCKETS + 1)
        self._bucket_ends_s = clock() + _BUCKET_S

    @property
    def live(self) -> tuple[Call, ...]:
        """The calls that wait or run now."""
        return tuple(self._live.values())

    def admit(self, invocation_id: str, attempt: int, interrupt: Interrupt) -> Call:
        """Open a call.

        Raises `InvocationCancelled` if its id is fenced, `DuplicateInvocation` if this attempt came before, or any
        attempt that lives or may have run.
        """
        record = self._record(invocation_id)
        if record & _FENCED:
            raise InvocationCancelled(f"invocation {invocation_id} was cancelled before it arrived here")
        if invocation_id in self._live or record & (_RAN | 1 << (attempt + 1)):
            raise DuplicateInvocation(f"invocation {invocation_id}, now attempt {attempt}, was delivered here before")
        call = self._live[invocation_id] = Call(invocation_id, attempt, interrupt)
        return call

    def end(self, call: Call, ran: Ran) -> None:
        """Close a call; it is remembered. Ending twice is ending once."""
        if self._live.get(call.id) is not call:
            return
        del self._live[call.id]
        self._note(call.id, 1 << (call.attempt + 1) | (_RAN if ran is not Ran.NO else 0))
        if not self._live:
            for idler in self._idlers:
                if not idler.done():
                    idler.set_result(None)

    async def idle(self) -> None:
        """Wait until no call is live."""
        while self._live:
            idler = asyncio.get_running_loop().create_future()
            self._idlers[idler] = None
            try:
                await idler
            finally:
                del self._idlers[idler]

    def fence(self, invocation_id: str) -> Ran:
        """See to it that an id never starts from now on; a live call of it ends. Says whether it may have run."""
        self._note(invocation_id, _FENCED)
        call = self._live.get(invocation_id)
        if call is not None:
            return call.interrupt(
                InvocationCancelled(f"invocation {invocation_id} was cancelled before it started"),
                GuestFailed("the guest was ended: its caller cancelled it while it ran"),
            )
        return Ran.MAYBE if self._record(invocation_id) & _RAN else Ran.NO

    def _record(self, invocation_id: str) -> int:
        self._turn()
        record = 0
        for bucket in self._buckets:
            record |= bucket.get(invocation_id, 0)
        return record

    def _note(self, invocation_id: str, bits: int) -> None:
        self._turn()
        bucket = self._buckets[-1]
        bucket[invocation_id] = bucket.get(invocation_id, 0) | bits

    def _turn(self) -> None:
        """Open new buckets as time goes by; the oldest fall off."""
        late_s = self._clock() - self._bucket_ends_s
        if late_s >= 0:
            opened = int(late_s / _BUCKET_S) + 1
            self._bucket_ends_s += opened * _BUCKET_S
            self._buckets.extend({} for _ in range(min(opened, _BUCKETS + 1)))
