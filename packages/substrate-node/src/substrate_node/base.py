"""Warm bases: one per content, built beside whatever serves meanwhile, condemned only when restores from it fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from substrate_node.ledger import Lease, Ledger
from substrate_node.ready import Contact, IdentityMint, NotReady
from substrate_node.reaper import Reaper
from substrate_node.vmm import Base, NotCapturable, Vmm, VmmError
from substrate_seam.events import BaseAdopted, BaseBuilt, BaseCondemned, BaseFailed, Emit, WarningRaised
from substrate_seam.workload import Workload

FAILURES_MAX = 3
"""So many restores in a row may fail before a base is replaced."""
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 1.0, 60.0
_HOPELESS_HINT = "Have its prime hook leave nothing of the kind behind, or do without `warmBase`. Nothing else changes."


class _Shelf:
    """What is known of one input key."""

    def __init__(self, vmm: Vmm, workload: Workload) -> None:
        self.vmm = vmm
        self.workload = workload
        self.base: Base | None = None
        self.failures = 0
        self.condemned = False
        self.hopeless = False
        self.why_not = ""  # what the last attempt at a base came to
        self.backoff_s = _BACKOFF_S_MIN
        self.builder: asyncio.Task[object] | None = None


class Bases:
    """All warm bases of one node, by input key. `changed` hears the key whose base is new.

    A base that restores are using is not discarded until the last `release`. `starving` says whether a call lacks
    memory: then none is begun. `make_room` says whether so many MiB are about to be free, having seen to it;
    `eased` hears that no builder waits for it any more.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        mint: IdentityMint,
        reaper: Reaper,
        emit: Emit,
        build_within_s: float,
        starving: Callable[[], bool] = lambda: False,
        make_room: Callable[[int], bool] = lambda _: False,
        eased: Callable[[], None] = lambda: None,
        changed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._ledger = ledger
        self._mint = mint
        self._reaper = reaper
        self._emit = emit
        self._build_within_s = build_within_s
        self._call_starves = starving
        self._make_room = make_room
        self._eased = eased
        self._changed = changed
        self._shelves: dict[str, _Shelf] = {}
        self._holds: dict[str, int] = {}
        self._retired: dict[str, tuple[Vmm, Base]] = {}  # by id, until the last holder lets go
        self._leaving: set[str] = set()  # ids of the retired and of those being discarded: nobody adopts one
        self._short: dict[asyncio.Future[None], None] = {}  # builders whose memory is coming free
        self._stopped = False

    @property
    def starving(self) -> bool:
        """Whether a builder waits for memory that is coming free."""
        return bool(self._short)

    def freed(self) -> None:
        """Some memory may be free."""
        for waiter in self._short:
            if not waiter.done():
                waiter.set_result(None)

    def current(self, key: str) -> Base | None:
        """The base that restores should use now, if there is one."""
        shelf = self._shelves.get(key)
        return shelf.base if shelf else None

    def expected(self, key: str) -> bool:
        """Whether there is no base yet, and one may still come."""
        shelf = self._shelves.get(key)
        return shelf is not None and shelf.base is None and not shelf.hopeless

    def why_not(self, key: str) -> str:
        """Why there is no base yet, in the words of the last attempt; nothing before one has failed."""
        shelf = self._shelves.get(key)
        return shelf.why_not if shelf is not None and shelf.base is None else ""

    def want(self, key: str, workload: Workload, vmm: Vmm) -> None:
        """See to it that there is a good base for `key`: adopt one that an earlier daemon left, or build one."""
        shelf = self._shelves.setdefault(key, _Shelf(vmm, workload))
        self._start_builder(key, shelf)

    def hold(self, base: Base) -> None:
        """Keep a base from being discarded."""
        self._holds[base.base_id] = self._holds.get(base.base_id, 0) + 1

    def release(self, base: Base) -> None:
        """Let go of a base; a replaced one is discarded with its last holder."""
        left = self._holds.get(base.base_id, 0) - 1
        if left > 0:
            self._holds[base.base_id] = left
            return
        self._holds.pop(base.base_id, None)
        retired = self._retired.pop(base.base_id, None)
        if retired is not None:
            self._discard(*retired)

    def succeeded(self, base: Base) -> None:
        """A restore from it became ready."""
        shelf = self._shelves.get(base.input_key)
        if shelf is not None and shelf.base is base:
            shelf.failures = 0

    def failed(self, base: Base, message: str, *, for_good: bool = False) -> None:
        """A restore from it failed before any request was written. Enough in a row condemn it, or one `for_good`.

        It keeps serving while its replacement is built beside it.
        """
        shelf = self._shelves.get(base.input_key)
        if shelf is None or shelf.base is not base:
            return  # a late failure of a base that is replaced already
        shelf.failures += FAILURES_MAX if for_good else 1
        if shelf.failures >= FAILURES_MAX and not shelf.condemned:
            shelf.condemned = True
            self._emit(BaseCondemned(workload=shelf.workload.name, base=base.base_id, message=message))
            self._start_builder(base.input_key, shelf)

    def drop(self, key: str) -> None:
        """Nothing refers to this content any more."""
        shelf = self._shelves.pop(key, None)
        if shelf is None:
            return
        if shelf.builder is not None:
            shelf.builder.cancel()
        if shelf.base is not None:
            self._retire(shelf.vmm, shelf.base)

    def stop(self) -> None:
        """Build no more. The bases stay, for the next daemon to adopt."""
        self._stopped = True
        for shelf in self._shelves.values():
            if shelf.builder is not None:
                shelf.builder.cancel()

    def _start_builder(self, key: str, shelf: _Shelf) -> None:
        needed = (shelf.base is None or shelf.condemned) and not shelf.hopeless
        if needed and shelf.builder is None and not self._stopped:
            shelf.builder = self._reaper.spawn(self._keep_building(key, shelf), what=f"build a base of {key[:12]}")

    async def _keep_building(self, key: str, shelf: _Shelf) -> None:
        """Try until there is a base, ever more patiently. Only `drop` and `stop` cancel it."""
        try:
            base = None if shelf.condemned else await self._adopt(shelf)
            while base is None:
                base = await self._build(key, shelf)
                if base is None:
                    self._changed(key)
                    if shelf.hopeless:
                        return
                    await asyncio.sleep(shelf.backoff_s)
                    shelf.backoff_s = min(shelf.backoff_s * 2, _BACKOFF_S_MAX)
        finally:
            shelf.builder = None
        if self._shelves.get(key) is not shelf:  # dropped, and the cancellation did not come through
            self._retire(shelf.vmm, base)
            return
        old, shelf.base = shelf.base, base
        shelf.failures, shelf.condemned, shelf.backoff_s = 0, False, _BACKOFF_S_MIN
        if old is not None:
            self._retire(shelf.vmm, old)
        self._changed(key)

    async def _adopt(self, shelf: _Shelf) -> Base | None:
        try:
            base = await shelf.vmm.adopt(shelf.workload)
        except VmmError as error:
            self._emit(BaseFailed(workload=shelf.workload.name, message=str(error), retry_in_s=0.0))
            return None
        if base is None or base.base_id in self._leaving:
            return None
        self._emit(BaseAdopted(workload=shelf.workload.name, base=base.base_id))
        return base

    async def _build(self, key: str, shelf: _Shelf) -> Base | None:
        """Boot a guest, wait until it is warm, capture it. Its memory is on the ledger until it is gone.

        Nothing is awaited once the base is there, so that no cancellation can come between it and its shelf.
        """
        loop, workload = asyncio.get_running_loop(), shelf.workload
        lease = await self._lease(workload.spec.memory_mib)
        if lease is None:
            self._told_failure(shelf, f"no {workload.spec.memory_mib} MiB of memory are free to build it in")
            return None
        began_s, guest_id = loop.time(), self._mint.guest_id()
        half_made = Base(base_id="base-" + guest_id.removeprefix("inv-"), input_key=key)
        base: Base | None = None
        contact: Contact | None = None
        try:
            async with asyncio.timeout(self._build_within_s):
                guest = await shelf.vmm.boot(workload, guest_id, {}, to_capture=True)
                contact = Contact(guest)
                await contact.wait_primed(workload)
                primed_s = loop.time()
                base = await shelf.vmm.capture(workload, guest, half_made.base_id)
            if base.input_key != key:
                half_made, base = base, None
                raise VmmError("what it is made of is not what it was when it was ensured")
        except NotCapturable as refusal:
            shelf.hopeless, shelf.why_not = True, str(refusal)
            self._emit(WarningRaised(message=str(refusal), hint=_HOPELESS_HINT))
            return None
        except (VmmError, NotReady, OSError) as error:
            why = str(error) or f"it was not ready within {self._build_within_s:.0f} s"
            self._told_failure(shelf, why + (await contact.last_words() if contact else ""))
            return None
        finally:
            undo = self._undo(shelf.vmm, guest_id, lease, half_made if base is None else None)
            self._reaper.spawn(undo, what=f"discard {guest_id}")
        built_s = loop.time()
        self._emit(
            BaseBuilt(
                workload=workload.name,
                base=base.base_id,
                build_ms=round((built_s - began_s) * 1e3, 1),
                capture_ms=round((built_s - primed_s) * 1e3, 1),
            )
        )
        return base

    async def _lease(self, mib: int) -> Lease | None:
        """Memory to build in, if it is free, or as soon as what makes way for it is gone. Calls come first."""
        while not self._call_starves():
            lease = self._ledger.reserve(mib)
            if lease is not None or not self._make_room(mib):
                return lease
            waiter = asyncio.get_running_loop().create_future()
            self._short[waiter] = None
            try:
                await waiter
            finally:
                del self._short[waiter]
                if not self._short:
                    self._eased()
        return None

    async def _undo(self, vmm: Vmm, guest_id: str, lease: Lease, half_made: Base | None) -> None:
        """Leave nothing of a build but its base, and not even that when a cancellation hid its success from us."""
        await self._reaper.insist(partial(vmm.discard, guest_id), what=f"discard {guest_id}")
        lease.release()
        if half_made is not None:
            await self._discarded(vmm, half_made)

    def _told_failure(self, shelf: _Shelf, message: str) -> None:
        shelf.why_not = message
        self._emit(BaseFailed(workload=shelf.workload.name, message=message, retry_in_s=shelf.backoff_s))

    def _retire(self, vmm: Vmm, base: Base) -> None:
        self._leaving.add(base.base_id)
        if self._holds.get(base.base_id):
            self._retired[base.base_id] = (vmm, base)
        else:
            self._discard(vmm, base)

    def _discard(self, vmm: Vmm, base: Base) -> None:
        self._reaper.spawn(self._discarded(vmm, base), what=f"discard {base.base_id}")

    async def _discarded(self, vmm: Vmm, base: Base) -> None:
        await self._reaper.insist(partial(vmm.discard_base, base), what=f"discard {base.base_id}")
        self._leaving.discard(base.base_id)
