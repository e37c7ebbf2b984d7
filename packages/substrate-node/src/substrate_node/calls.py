"""Which invocations this node has seen: nothing is delivered twice, and a cancelled id never starts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from substrate_seam.errors import DuplicateInvocation, GuestFailed, InvocationCancelled, Ran, SubstrateError

KEPT_S = 900.0
"""So long a finished or fenced id is remembered, in seconds."""
_BUCKETS = 15

_FENCED, _RAN = 1, 2  # bits of a record; attempt n is bit n + 1

Interrupt = Callable[[SubstrateError, SubstrateError], Ran]
"""Ends a live call: with the first error if its request has not been written, else with the second. Says which."""


class Call:
    """One delivery of an invocation, live until `Calls.end`."""

    __slots__ = ("attempt", "id", "interrupt", "ran")

    def __init__(self, invocation_id: str, attempt: int, interrupt: Interrupt) -> None:
        self.id = invocation_id
        self.attempt = attempt
        self.interrupt = interrupt
        self.ran = Ran.NO


class Calls:
    """Live calls, and what is remembered of earlier ones. `clock` gives seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._live: dict[str, Call] = {}
        self._idlers: set[asyncio.Future[None]] = set()
        # Records in buckets of one minute, so that forgetting costs nothing per call.
        self._buckets: deque[dict[bytes, int]] = deque([{}], maxlen=_BUCKETS + 1)
        self._bucket_ends_s = clock() + KEPT_S / _BUCKETS

    @property
    def live(self) -> tuple[Call, ...]:
        """The calls that wait or run now."""
        return tuple(self._live.values())

    def admit(self, invocation_id: str, attempt: int, interrupt: Interrupt) -> Call:
        """Open a call. Raises `InvocationCancelled` if its id is fenced, `DuplicateInvocation` if it came before."""
        record = self._record(invocation_id)
        if record & _FENCED:
            raise InvocationCancelled(f"invocation {invocation_id} was cancelled before it arrived here")
        if record >> (attempt + 1) & 1 or invocation_id in self._live:
            raise DuplicateInvocation(f"attempt {attempt} of invocation {invocation_id} has been delivered here before")
        self._note(invocation_id, 1 << (attempt + 1))
        call = self._live[invocation_id] = Call(invocation_id, attempt, interrupt)
        return call

    def end(self, call: Call) -> None:
        """Close a call; it is remembered. Ending twice is ending once."""
        if self._live.get(call.id) is call:
            del self._live[call.id]
            if call.ran is not Ran.NO:
                self._note(call.id, _RAN)
            if not self._live:
                for idler in self._idlers:
                    if not idler.done():
                        idler.set_result(None)

    async def idle(self) -> None:
        """Wait until no call is live."""
        while self._live:
            idler = asyncio.get_running_loop().create_future()
            self._idlers.add(idler)
            try:
                await idler
            finally:
                self._idlers.discard(idler)

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
        key, record = _key(invocation_id), 0
        for bucket in self._buckets:
            record |= bucket.get(key, 0)
        return record

    def _note(self, invocation_id: str, bits: int) -> None:
        self._turn()
        key, bucket = _key(invocation_id), self._buckets[-1]
        bucket[key] = bucket.get(key, 0) | bits

    def _turn(self) -> None:
        """Open new buckets as time goes by; the oldest fall off."""
        now_s = self._clock()
        while now_s >= self._bucket_ends_s:
            self._buckets.append({})
            self._bucket_ends_s += KEPT_S / _BUCKETS
            if now_s - self._bucket_ends_s > KEPT_S:  # idle for longer than anything is kept
                self._buckets.clear()
                self._buckets.append({})
                self._bucket_ends_s = now_s + KEPT_S / _BUCKETS


def _key(invocation_id: str) -> bytes:
    """Half the memory of the hex string; ids come in by the hundred thousand."""
    return bytes.fromhex(invocation_id) if len(invocation_id) == 32 else invocation_id.encode()
