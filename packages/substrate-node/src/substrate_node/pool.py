"""Parked guests: ready ahead of time, so that a call costs one exchange. Refilled within what memory is free."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from substrate_node.base import Bases
from substrate_node.ledger import Lease, Ledger
from substrate_node.ready import IdentityMint
from substrate_node.reaper import Reaper
from substrate_node.starter import Hosted, Starter, StartFailure
from substrate_node.vmm import Base, Exit, Guest
from substrate_seam.events import Emit, GuestGone, GuestParked, WarningRaised

_MAKING_MAX = 2
"""So many guests of one workload are made ready at once: parking must not crowd out calls."""
_AFTER_S = 0.02
"""So long after a guest was taken the next one is begun: making it must not delay the call that took it."""
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 1.0, 60.0


class Parked:
    """A ready guest with its memory; whoever takes it owns both."""

    __slots__ = ("base", "guest", "lease", "on_death")

    def __init__(self, guest: Guest, base: Base | None, lease: Lease) -> None:
        self.guest = guest
        self.base = base
        self.lease = lease
        self.on_death: Callable[[asyncio.Future[Exit]], None] = _unheard


Making = asyncio.Task[Parked | StartFailure]


class _Bay:
    """The parked guests of one workload, the oldest (of the oldest base) first, and those being made ready."""

    def __init__(self, hosted: Hosted) -> None:
        self.hosted = hosted
        self.parked: OrderedDict[Parked, None] = OrderedDict()  # from which any can be removed
        self.making: dict[Making, Lease] = {}
        self.backoff_s = _BACKOFF_S_MIN
        self.retry: asyncio.TimerHandle | None = None
        self.later: asyncio.TimerHandle | None = None

    @property
    def short(self) -> bool:
        making = len(self.making)
        return making < _MAKING_MAX and len(self.parked) + making < self.hosted.workload.spec.pool


class Pool:
    """All parked guests of one node, by digest.

    `starving` says whether a call or a base lacks memory: then nothing new is made. `offer` hears the name of a
    workload of which a guest was parked, `changed` the digest of which more guests, or fewer, are parked or in the
    making.
    """

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
        offer: Callable[[str], None],
        changed: Callable[[str], None],
    ) -> None:
        self._ledger = ledger
        self._bases = bases
        self._starter = starter
        self._mint = mint
        self._reaper = reaper
        self._emit = emit
        self._starving = starving
        self._offer = offer
        self._changed = changed
        self._bays: dict[str, _Bay] = {}
        self._short: dict[str, None] = {}  # lack memory, the longest first
        self._stocked: dict[str, _Bay] = {}  # have something that may be ended
        self._stock_mib = 0  # of guests that stand ready or are in the making
        self._leaving: set[Lease] = set()  # of guests that are being ended
        self._leaving_mib = 0
        self._resuming: asyncio.Handle | None = None
        self._closed = False

    def keep(self, hosted: Hosted) -> None:
        """Park guests of a workload from now on, as many as it asks for."""
        if hosted.workload.spec.pool and not self._closed:
            self._bays.setdefault(hosted.workload.digest, _Bay(hosted))
            self.refill(hosted.workload.digest)

    def stock(self, digest: str) -> tuple[int, int]:
        """How many guests stand ready, and how many more are being made so."""
        bay = self._bays.get(digest)
        return (len(bay.parked), len(bay.making)) if bay else (0, 0)

    def take(self, digest: str) -> Parked | None:
        """Take the guest that was parked first; another is made in the background, a moment later."""
        bay = self._bays.get(digest)
        if bay is None or not bay.parked:
            return None
        parked, _ = bay.parked.popitem(last=False)
        parked.guest.exited.remove_done_callback(parked.on_death)
        parked.on_death = _unheard  # it refers back to the guest: no garbage is left for the collector
        self._stock_mib -= parked.lease.mib
        self._restocked(bay)
        if bay.later is None:
            bay.later = asyncio.get_running_loop().call_later(_AFTER_S, self._refill_after, bay)
        return parked

    def make_room(self, mib: int) -> bool:
        """See to it that `mib` MiB are free or about to be, and end guests for that; false if it would not do."""
        lacking_mib = self._lacking_mib + mib
        if lacking_mib > self._stock_mib:
            return False
        self._end_stock(lacking_mib)
        return True

    def fit(self) -> None:
        """End guests until the node fits its size, as far as they go."""
        self._end_stock(self._lacking_mib)

    @property
    def _lacking_mib(self) -> int:
        """What will be committed over the node's size when those that are being ended are gone; less than 0 is room."""
        return self._ledger.committed_mib - self._leaving_mib - self._ledger.size_mib

    def _end_stock(self, mib: int) -> None:
        """End parked guests, and then those in the making, until they leave so many MiB."""
        left_mib = max(0, self._stock_mib - mib)
        while self._stock_mib > left_mib:
            digest, bay = next(iter(self._stocked.items()))
            self._short[digest] = None
            if bay.parked:
                parked, _ = bay.parked.popitem(last=False)
                self._end(bay.hosted, parked.guest.guest_id, parked.lease)
            else:
                self._call_off(bay)
            self._restocked(bay)

    def refill(self, digest: str) -> None:
        """Start making what is missing, as far as memory allows; the rest waits for `freed`."""
        bay = self._bays.get(digest)
        while bay is not None and bay.short and bay.retry is None:
            if bay.hosted.base_key is not None and self._bases.expected(bay.hosted.base_key):
                return  # its base is being built, and will say so
            lease = None if self._starving() else self._ledger.reserve(bay.hosted.workload.spec.memory_mib)
            if lease is None:
                self._short[digest] = None
                return
            guest_id = self._mint.guest_id()
            task = self._reaper.spawn(self._make(bay.hosted, guest_id, lease), what=f"park {guest_id}")
            task.add_done_callback(partial(self._made, bay, guest_id, lease))
            bay.making[task] = lease
            self._stock_mib += lease.mib
            self._stocked[digest] = bay
            self._changed(digest)

    def freed(self) -> None:
        """Some memory may be free: go on with those that lack it, after the calls that now want it."""
        if self._short and self._resuming is None:
            self._resuming = asyncio.get_running_loop().call_soon(self._resume)

    def drop(self, digest: str) -> None:
        """End the parked guests of a workload and park no more."""
        bay = self._bays.pop(digest, None)
        if bay is None:
            return
        for timer in (bay.retry, bay.later):
            if timer is not None:
                timer.cancel()
        while bay.making:
            self._call_off(bay)
        while bay.parked:
            parked, _ = bay.parked.popitem(last=False)
            self._end(bay.hosted, parked.guest.guest_id, parked.lease)
        self._short.pop(digest, None)
        self._stocked.pop(digest, None)

    def close(self) -> None:
        """End every parked guest; the reaper knows when they are gone."""
        self._closed = True
        for digest in list(self._bays):
            self.drop(digest)

    def _resume(self) -> None:
        self._resuming = None
        while self._short and not self._starving():
            digest = next(iter(self._short))
            del self._short[digest]
            self.refill(digest)
            if digest in self._short:
                return

    async def _make(self, hosted: Hosted, guest_id: str, lease: Lease) -> Parked | StartFailure:
        base = self._bases.current(hosted.base_key) if hosted.base_key is not None else None
        try:
            return Parked(await self._starter.start(hosted, base, guest_id), base, lease)
        except StartFailure as failure:
            return failure

    def _made(self, bay: _Bay, guest_id: str, lease: Lease, task: Making) -> None:
        """Park a guest that became ready and is still wanted; else leave nothing of it."""
        wanted = bay.making.pop(task, None) is not None
        made = None if task.cancelled() or task.exception() is not None else task.result()
        if not wanted or not isinstance(made, Parked) or made.guest.exited.done():
            self._end(bay.hosted, guest_id, lease)
            self._restocked(bay)
            if wanted:
                self._back_off(bay, str(made) if isinstance(made, StartFailure) else "it did not last")
            return
        bay.backoff_s = _BACKOFF_S_MIN
        bay.parked[made] = None
        made.on_death = partial(self._died, bay, made)
        made.guest.exited.add_done_callback(made.on_death)
        self._emit(GuestParked(guest=guest_id, workload=bay.hosted.workload.name, parked=len(bay.parked)))
        self._restocked(bay)
        self._offer(bay.hosted.workload.name)
        self.refill(bay.hosted.workload.digest)

    def _back_off(self, bay: _Bay, message: str) -> None:
        """Wait before the next try, ever longer, so that a workload that cannot start costs little."""
        name = bay.hosted.workload.name
        if self._bays.get(bay.hosted.workload.digest) is not bay or bay.retry is not None:
            return
        self._emit(
            WarningRaised(
                message=f"a guest of {name!r} could not be parked: {message}",
                hint=f"The next try is in {bay.backoff_s:.0f} s; calls still start their own guests.",
            )
        )
        bay.retry = asyncio.get_running_loop().call_later(bay.backoff_s, self._retry, bay)
        bay.backoff_s = min(bay.backoff_s * 2, _BACKOFF_S_MAX)

    def _refill_after(self, bay: _Bay) -> None:
        bay.later = None
        self.refill(bay.hosted.workload.digest)

    def _retry(self, bay: _Bay) -> None:
        bay.retry = None
        self.refill(bay.hosted.workload.digest)

    def _died(self, bay: _Bay, parked: Parked, ended: asyncio.Future[Exit]) -> None:
        """A guest ended by itself while it was parked: clear up and make another."""
        if parked not in bay.parked:
            return
        del bay.parked[parked]
        exit_, guest_id = ended.result(), parked.guest.guest_id
        self._emit(
            GuestGone(guest=guest_id, workload=bay.hosted.workload.name, exit=exit_.words, console=exit_.console)
        )
        self._end(bay.hosted, guest_id, parked.lease)
        self._restocked(bay)
        self._back_off(bay, f"it ended while parked: {exit_.words}")

    def _restocked(self, bay: _Bay) -> None:
        """What stands ready or is in the making changed, unless the workload was dropped meanwhile."""
        digest = bay.hosted.workload.digest
        if self._bays.get(digest) is not bay:
            return
        if bay.parked or bay.making:
            self._stocked[digest] = bay
        else:
            self._stocked.pop(digest, None)
        self._changed(digest)

    def _call_off(self, bay: _Bay) -> None:
        """Stop making the guest that was begun last; `_made` then ends it."""
        task, lease = bay.making.popitem()
        self._leave(lease)
        task.cancel()

    def _leave(self, lease: Lease) -> None:
        if lease not in self._leaving:
            self._leaving.add(lease)
            self._leaving_mib += lease.mib
            self._stock_mib -= lease.mib

    def _end(self, hosted: Hosted, guest_id: str, lease: Lease) -> None:
        self._leave(lease)
        self._reaper.spawn(self._ended(hosted, guest_id, lease), what=f"discard {guest_id}")

    async def _ended(self, hosted: Hosted, guest_id: str, lease: Lease) -> None:
        """Discard a guest, then free its memory: one that may still live keeps it on the account."""
        await self._reaper.insist(partial(hosted.vmm.discard, guest_id), what=f"discard {guest_id}")
        self._leaving.discard(lease)
        self._leaving_mib -= lease.mib
        lease.release()


def _unheard(_: asyncio.Future[Exit]) -> None:
    """Whoever took a guest hears of its death for itself."""
