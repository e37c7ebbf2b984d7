"""What one call holds of its node: a place in the queue, then a slot, memory and a guest; in the end nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from substrate_node import refusals
from substrate_node.ledger import Lease
from substrate_node.pool import Parked
from substrate_node.shop import Shop, Stake
from substrate_node.slots import Ticket
from substrate_node.starter import Hosted, StartFailure
from substrate_node.vmm import Base, Exit, Guest, Sample
from substrate_seam.errors import SubstrateError
from substrate_seam.events import CallQueued, GuestClaimed, GuestGone, SlotFreed, SlotTaken, StartFailed
from substrate_seam.invocation import Invocation, Start, Started

UNTOLD = Sample(None, None)


class Holding:
    """The slot, the memory and the guest of one call.

    It takes them step by step, and gives them back once.
    """

    __slots__ = (
        "_arrived_s",
        "_discarding",
        "_invocation",
        "_killed",
        "_lease",
        "_parked",
        "_queue_ms",
        "_running_s",
        "_serving",
        "_shop",
        "_ticket",
        "_tried",
        "guest",
        "guest_id",
        "hosted",
        "started",
    )

    def __init__(self, shop: Shop, hosted: Hosted, invocation: Invocation) -> None:
        self._shop = shop
        self._invocation = invocation
        self._arrived_s = shop.clock()
        self._ticket: Ticket[Stake] | None = None
        self._lease: Lease | None = None
        self._parked: Parked | None = None
        self._tried: set[Start] = set()
        self._queue_ms = 0.0
        self._running_s = 0.0
        self._serving = False
        self._killed = False
        self._discarding: asyncio.Task[None] | None = None
        self.hosted = hosted
        self.guest_id = ""
        self.guest: Guest | None = None
        self.started: Started | None = None  # the last guest that was ready

    @property
    def has_slot(self) -> bool:
        """Whether it waits in the queue no longer."""
        return self._ticket is not None and self._ticket.stake is not None

    @property
    def end_of_guest(self) -> Exit | None:
        """How its guest ended, if it has."""
        return self.guest.exited.result() if self.guest is not None and self.guest.exited.done() else None

    def sample(self) -> Sample:
        """What the guest has used. A host that does not tell must not keep us from giving it back."""
        try:
            return self.guest.sample() if self.guest is not None else UNTOLD
        except Exception:  # noqa: BLE001  # whatever broke
            return UNTOLD

    # Queue and memory.

    def line_up(self, *, refuse: Callable[[SubstrateError], None]) -> None:
        """Enter the queue. Raises `GuestUnavailable` when that is of no use; `refuse` hears if it is so later."""
        invocation = self._invocation
        self._ticket = self._shop.slots.enter(
            self.hosted.workload.name,
            caller=invocation.caller,
            session=invocation.session,
            within_s=invocation.start_within_s,
            take=partial(self._take_stake, refuse),
            promised=self._make_room,
        )

    def _take_stake(self, refuse: Callable[[SubstrateError], None], *, in_turn: bool) -> Stake | None:
        """A parked guest, which brings its memory; else memory; else the promise of some."""
        ledger, mib = self._shop.ledger, self.hosted.workload.spec.memory_mib
        parked = self._shop.pool.take(self.hosted.workload.digest)
        if parked is not None:
            self._parked, self._lease = parked, parked.lease
            self.guest, self.guest_id = parked.guest, parked.guest.guest_id
            return parked
        if not in_turn:
            return None
        if mib > ledger.size_mib:  # the node has shrunk: waiting is of no use, and holds up the others
            refuse(refusals.too_big(self.hosted, self._shop.node_id, ledger.size_mib))
            return None
        self._lease = ledger.reserve(mib)
        if self._lease is None:
            self._shop.pool.make_room(mib)
        return self._lease

    def _make_room(self, calls: int) -> bool:
        return self._shop.pool.make_room(calls * self.hosted.workload.spec.memory_mib)

    async def _queue(self) -> None:
        """Wait for the turn."""
        ticket, name = self._ticket, self.hosted.workload.name
        assert ticket is not None
        if ticket.stake is None:
            waiting = self._shop.slots.load(name)[1]
            self._shop.emit(CallQueued(invocation_id=self._invocation.id, workload=name, waiting=waiting))
            granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            ticket.on_grant = partial(_resolve, granted)
            await granted

    def _tell_slot(self) -> None:
        invocation, name = self._invocation, self.hosted.workload.name
        self._queue_ms = round((self._shop.clock() - self._arrived_s) * 1e3, 3)
        busy, waiting, _ = self._shop.slots.load(name)
        self._shop.emit(
            SlotTaken(
                invocation_id=invocation.id,
                workload=name,
                busy=busy,
                waiting=waiting,
                free_mib=self._shop.ledger.free_mib,
                queue_ms=self._queue_ms,
                trace=invocation.trace.parent if invocation.trace is not None else "",
            )
        )

    def too_late(self) -> SubstrateError:
        """What a call hears that could not start in time."""
        name, within_s, slots = self.hosted.workload.name, self._invocation.start_within_s, self._shop.slots
        if self.has_slot:
            return refusals.guest_too_late(name, within_s)
        return refusals.slot_too_late(
            self.hosted, within_s, starved=slots.is_starved(name), retry_after_s=slots.retry_after_s(name)
        )

    # The guest.

    def claim_at_once(self) -> bool:
        """Claim the guest that stands ready, if slot and guest are there already."""
        if self._parked is None or self._parked.guest.exited.done():
            return False
        self._tell_slot()
        self._running_s = self._shop.clock()
        self._tried.add(Start.POOL)
        self._claimed(Start.POOL, self._take_parked(), ready_ms=0.0)
        return True

    async def claim(self) -> None:
        """Wait for slot and memory, then for a ready guest. Raises `GuestUnavailable`."""
        await self._queue()
        self._tell_slot()
        await self.start()

    async def start(self, failure: StartFailure | None = None) -> None:
        """Start a guest by the fastest way there is; one that fails falls through to the next."""
        while (start := self._next_way()) is not None:
            self._tried.add(start)
            began_s = self._running_s = self._shop.clock()
            try:
                base_id = self._take_parked() if start is Start.POOL else await self._start_by(start)
            except StartFailure as failed:
                failure = failed
                await self._start_failed(start, str(failed), took_ms=(self._shop.clock() - began_s) * 1e3)
                continue
            self._claimed(start, base_id, ready_ms=round((self._shop.clock() - began_s) * 1e3, 3))
            return
        name = self.hosted.workload.name
        if failure is None:
            raise refusals.no_start_at_hand(name, self._invocation.demands.start)
        raise refusals.no_start_succeeded(name, failure, only_restored=Start.COLD not in self._tried)

    async def start_over(self, why: str) -> None:
        """Start another guest instead of one that can't get the request."""
        assert self.started is not None
        await self._start_failed(self.started.start, why)
        await self.start(StartFailure(why))

    def _next_way(self) -> Start | None:
        least, tried = self._invocation.demands.start, self._tried
        if self._parked is not None and Start.POOL not in tried:
            return Start.POOL
        if Start.WARM not in tried and Start.WARM.satisfies(least) and self._base() is not None:
            return Start.WARM
        if Start.COLD not in tried and Start.COLD.satisfies(least):
            return Start.COLD
        return None

    def _base(self) -> Base | None:
        key = self.hosted.base_key
        return self._shop.bases.current(key) if key is not None else None

    def _take_parked(self) -> str | None:
        """Be served by the parked guest; the id of its base. Raises `StartFailure`."""
        parked, self._parked = self._parked, None
        assert parked is not None
        if parked.guest.exited.done():
            raise StartFailure(f"it ended while parked: {parked.guest.exited.result().words}")
        return parked.base.base_id if parked.base else None

    async def _start_by(self, start: Start) -> str | None:
        """Make a guest and have it ready; the id of its base. Raises `StartFailure`."""
        base = self._base() if start is Start.WARM else None
        self.guest_id = self._shop.mint.guest_id()  # known before it is made, so that it can always be undone
        self.guest = await self._shop.starter.start(self.hosted, base, self.guest_id, running=self._runs)
        return base.base_id if base else None

    def _runs(self) -> None:
        self._running_s = self._shop.clock()

    async def _start_failed(self, start: Start, message: str, *, took_ms: float = 0.0) -> None:
        """Leave nothing of a guest that did not start, so that its memory can serve the next one."""
        self._shop.emit(
            StartFailed(
                invocation_id=self._invocation.id,
                workload=self.hosted.workload.name,
                start=start,
                guest=self.guest_id,
                message=message,
                took_ms=round(took_ms, 3),
            )
        )
        self._serve(serving=False)
        guest_id, self.guest_id, self.guest = self.guest_id, "", None
        self._discarding = self._discard(guest_id)
        await asyncio.shield(self._discarding)  # cancelled or not, giving back waits for it too

    def _claimed(self, start: Start, base_id: str | None, *, ready_ms: float) -> None:
        invocation, now_s = self._invocation, self._shop.clock()
        started = self.started = Started(
            queue_ms=self._queue_ms,
            claim_ms=round((now_s - self._arrived_s) * 1e3 - self._queue_ms, 3),
            ready_ms=ready_ms,
            start=start,
            node=self._shop.node_id,
            guest=self.guest_id,
            isolation=self.hosted.vmm.isolation,
            base=base_id,
        )
        self._serve(serving=True)
        self._shop.emit(
            GuestClaimed(
                invocation_id=invocation.id,
                attempt=invocation.attempt,
                workload=invocation.workload.name,
                guest=self.guest_id,
                start=start,
                isolation=started.isolation,
                queue_ms=started.queue_ms,
                claim_ms=started.claim_ms,
                ready_ms=ready_ms,
                wait_ready_ms=0.0 if start is Start.POOL else round((now_s - self._running_s) * 1e3, 3),
                base=base_id,
            )
        )

    def _serve(self, *, serving: bool) -> None:
        """Count this call among those that have their guest, or no longer."""
        if serving is not self._serving:
            self._serving = serving
            self.hosted.serving += 1 if serving else -1
            self._shop.changed(self.hosted.workload.digest)

    # Giving back.

    def stop_waiting(self) -> None:
        """Leave the queue, if that is where the call is."""
        if self._ticket is not None and self._ticket.stake is None:
            self._shop.slots.leave(self._ticket)

    def end_at_once(self) -> bool:
        """Have the guest end; whether there is nothing of it, or of an earlier one, that must be waited for."""
        if self._discarding is not None and not self._discarding.done():
            return False
        guest = self.guest
        if guest is None:
            return not self.guest_id
        if not self._shop.reaper.attempt(self._kill, what=f"kill {self.guest_id}") or not guest.gone.done():
            return False
        self._discard(self.guest_id)
        return True

    async def end(self) -> None:
        """Have the guest end, however long it takes; the rest of it is seen to in the background."""
        if self._discarding is not None:
            await asyncio.wait({self._discarding})
        if self.guest is not None:
            await self._shop.reaper.insist(self._gone, what=f"kill {self.guest_id}")
            self._discard(self.guest_id)
        elif self.guest_id:  # half made: it may live until it is discarded
            await asyncio.wait({self._discard(self.guest_id)})

    def _kill(self) -> None:
        if self.guest is not None and not self._killed:
            self.guest.kill()
            self._killed = True

    async def _gone(self) -> None:
        self._kill()
        if self.guest is not None:
            await asyncio.wait({self.guest.gone})

    def _discard(self, guest_id: str) -> asyncio.Task[None]:
        reaper, what = self._shop.reaper, f"discard {guest_id}"
        return reaper.spawn(reaper.insist(partial(self.hosted.vmm.discard, guest_id), what=what), what=what)

    def free(self) -> None:
        """Let the next call have memory and slot."""
        if self._lease is not None:
            self._lease.release()
        self._serve(serving=False)
        if self._ticket is not None:
            self._shop.slots.leave(self._ticket)

    def tell_freed(self, died: Exit | None) -> None:
        """Tell that all is given back; `died` is how the guest ended if it did so by itself."""
        invocation_id, name, ticket = self._invocation.id, self.hosted.workload.name, self._ticket
        if self.guest_id:
            ended = self.end_of_guest
            self._shop.emit(
                GuestGone(
                    invocation_id=invocation_id,
                    guest=self.guest_id,
                    workload=name,
                    exit=died.words if died else "",
                    console=ended.console if ended else "",
                )
            )
        if ticket is not None and ticket.granted_s is not None:
            busy, waiting, _ = self._shop.slots.load(name)
            self._shop.emit(
                SlotFreed(
                    invocation_id=invocation_id,
                    workload=name,
                    busy=busy,
                    waiting=waiting,
                    free_mib=self._shop.ledger.free_mib,
                    held_ms=round((self._shop.clock() - ticket.granted_s) * 1e3, 3),
                )
            )


def _resolve(granted: asyncio.Future[None]) -> None:
    if not granted.done():
        granted.set_result(None)
