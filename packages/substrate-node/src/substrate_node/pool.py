"""Parked guests: ready ahead of time, so that a call costs one exchange. Refilled within what memory is free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from substrate_node.base import Bases
from substrate_node.ledger import Lease, Ledger
from substrate_node.ready import IdentityMint
from substrate_node.reaper import Reaper
from substrate_node.starter import Hosted, Starter, StartFailure
from substrate_node.vmm import Base, Exit, Guest
from substrate_seam.events import CleanupFailed, Emit, GuestGone, GuestParked, WarningRaised

_MAKING_MAX = 2
"""So many guests of one workload are made ready at once: parking must not crowd out calls."""
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 1.0, 60.0


class Parked:
    """A ready guest with its memory; whoever takes it owns both."""

    __slots__ = ("base", "guest", "lease")

    def __init__(self, guest: Guest, base: Base | None, lease: Lease) -> None:
        self.guest = guest
        self.base = base
        self.lease = lease


class _Bay:
    """The parked guests of one workload, the oldest (of the oldest base) first."""

    def __init__(self, hosted: Hosted) -> None:
        self.hosted = hosted
        self.parked: deque[Parked] = deque()
        self.making = 0
        self.backoff_s = _BACKOFF_S_MIN
        self.retry: asyncio.TimerHandle | None = None

    @property
    def short(self) -> bool:
        return len(self.parked) + self.making < self.hosted.workload.spec.pool and self.making < _MAKING_MAX


class Pool:
    """All parked guests of one node, by digest. `starving` says whether a call lacks memory: then nothing is parked."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        bases: Bases,
        starter: Starter,
        mint: IdentityMint,
        reaper: Reaper,
        emit: Emit,
        starving: Callable[[], bool],
        changed: Callable[[str], None],
    ) -> None:
        self._ledger = ledger
        self._bases = bases
        self._starter = starter
        self._mint = mint
        self._reaper = reaper
        self._emit = emit
        self._starving = starving
        self._changed = changed
        self._bays: dict[str, _Bay] = {}
        self._short: dict[str, None] = {}
        self._stocked: dict[str, _Bay] = {}
        self._closed = False

    def keep(self, hosted: Hosted) -> None:
        """Park guests of a workload from now on, as many as it asks for."""
        if hosted.workload.spec.pool:
            self._bays.setdefault(hosted.workload.digest, _Bay(hosted))
            self.refill(hosted.workload.digest)

    def parked(self, digest: str) -> int:
        """How many guests stand ready."""
        bay = self._bays.get(digest)
        return len(bay.parked) if bay else 0

    def take(self, digest: str) -> Parked | None:
        """Take the guest that was parked first; another is made in the background."""
        bay = self._bays.get(digest)
        if bay is None or not bay.parked:
            return None
        parked = bay.parked.popleft()
        self._restocked(bay)
        self.refill(digest)
        return parked

    def reclaim(self, mib: int) -> None:
        """Give memory back for calls: end parked guests until about `mib` MiB more will be free."""
        while self._stocked and mib > 0:
            digest, bay = next(iter(self._stocked.items()))
            parked = bay.parked.pop()
            mib -= parked.lease.mib
            self._short[digest] = None
            self._end(bay.hosted, parked)
            self._restocked(bay)

    def refill(self, digest: str) -> None:
        """Start making what is missing, as far as memory allows; the rest waits for `freed`."""
        bay = self._bays.get(digest)
        while bay is not None and bay.short and bay.retry is None and not self._closed:
            base = self._bases.current(bay.hosted.base_key) if bay.hosted.base_key is not None else None
            if bay.hosted.base_key is not None and base is None:
                return  # its base is being built, and will say so
            lease = None if self._starving() else self._ledger.reserve(bay.hosted.workload.spec.memory_mib)
            if lease is None:
                self._short[digest] = None
                return
            bay.making += 1
            guest_id = self._mint.guest_id()
            self._reaper.spawn(self._make(bay, base, guest_id, lease), what=f"park {guest_id}")

    def freed(self) -> None:
        """Some memory was freed: go on with the workload that has waited longest for it."""
        digest = next(iter(self._short), None)
        if digest is not None and not self._starving():
            del self._short[digest]
            self.refill(digest)

    def drop(self, digest: str) -> None:
        """End the parked guests of a workload and park no more."""
        bay = self._bays.pop(digest, None)
        self._short.pop(digest, None)
        self._stocked.pop(digest, None)
        if bay is None:
            return
        if bay.retry is not None:
            bay.retry.cancel()
        while bay.parked:
            self._end(bay.hosted, bay.parked.popleft())

    def close(self) -> None:
        """End every parked guest; the reaper knows when they are gone."""
        self._closed = True
        for digest in list(self._bays):
            self.drop(digest)

    async def _make(self, bay: _Bay, base: Base | None, guest_id: str, lease: Lease) -> None:
        digest = bay.hosted.workload.digest
        try:
            guest = await self._starter.start(bay.hosted, base, guest_id)
        except StartFailure as failure:
            await bay.hosted.vmm.discard(guest_id)
            lease.release()
            self._back_off(bay, str(failure))
            return
        finally:
            bay.making -= 1
        parked = Parked(guest, base, lease)
        if self._bays.get(digest) is not bay or guest.exited.done():
            self._end(bay.hosted, parked)
            return
        bay.backoff_s = _BACKOFF_S_MIN
        bay.parked.append(parked)
        guest.exited.add_done_callback(lambda ended: self._died(bay, parked, ended))
        self._emit(GuestParked(guest=guest_id, workload=bay.hosted.workload.name, parked=len(bay.parked)))
        self._restocked(bay)
        self.refill(digest)

    def _back_off(self, bay: _Bay, message: str) -> None:
        """Wait before the next try, ever longer, so that a workload that cannot start costs little."""
        name = bay.hosted.workload.name
        self._emit(
            WarningRaised(
                message=f"a guest of {name!r} could not be parked: {message}",
                hint=f"The next try is in {bay.backoff_s:.0f} s; calls still start their own guests.",
            )
        )
        if not self._closed:
            loop = asyncio.get_running_loop()
            bay.retry = loop.call_later(bay.backoff_s, self._retry, bay)
            bay.backoff_s = min(bay.backoff_s * 2, _BACKOFF_S_MAX)

    def _retry(self, bay: _Bay) -> None:
        bay.retry = None
        self.refill(bay.hosted.workload.digest)

    def _died(self, bay: _Bay, parked: Parked, ended: asyncio.Future[Exit]) -> None:
        """A guest ended by itself while it was parked: clear up and make another."""
        if parked not in bay.parked:
            return
        bay.parked.remove(parked)
        exit_ = ended.result()
        self._emit(
            GuestGone(
                guest=parked.guest.guest_id,
                workload=bay.hosted.workload.name,
                exit=exit_.words,
                console=exit_.console,
            )
        )
        self._end(bay.hosted, parked)
        self._restocked(bay)
        self._back_off(bay, f"it ended while parked: {exit_.words}")

    def _restocked(self, bay: _Bay) -> None:
        """The number of parked guests changed."""
        digest = bay.hosted.workload.digest
        if bay.parked:
            self._stocked[digest] = bay
        else:
            self._stocked.pop(digest, None)
        self._changed(digest)

    def _end(self, hosted: Hosted, parked: Parked) -> None:
        guest_id = parked.guest.guest_id
        self._reaper.spawn(end_guest(hosted, guest_id, parked.lease, emit=self._emit), what=f"discard {guest_id}")


async def end_guest(hosted: Hosted, guest_id: str, lease: Lease, *, emit: Emit) -> None:
    """Discard a guest, then free its memory. A guest that may still live keeps its memory on the account."""
    pause_s = 0.05
    while True:
        try:
            await hosted.vmm.discard(guest_id)
        except Exception as error:  # noqa: BLE001  # whatever broke, the guest may live: go on trying
            emit(CleanupFailed(what=f"discard {guest_id}", message=f"{type(error).__name__}: {error}"))
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)
        else:
            lease.release()
            return
