"""One invocation on this node: claim a guest, exchange with it, give it back, whichever way the block is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from msgspec import structs

from substrate_node.base import Bases
from substrate_node.calls import Call, Calls
from substrate_node.ledger import Lease, Ledger
from substrate_node.pool import Parked, Pool
from substrate_node.ready import IdentityMint
from substrate_node.reaper import Reaper
from substrate_node.slots import Slots, Ticket
from substrate_node.starter import Hosted, Starter, StartFailure
from substrate_node.vmm import DATA_PORT, Exit, Guest, Sample
from substrate_node.vsockhttp import Exchange, request_head
from substrate_seam.errors import (
    GuestFailed,
    GuestUnavailable,
    Ran,
    Reason,
    SubstrateError,
)
from substrate_seam.events import (
    CallQueued,
    Emit,
    ExchangeEnded,
    GuestClaimed,
    GuestGone,
    SlotFreed,
    SlotTaken,
    StartFailed,
)
from substrate_seam.invocation import GuestRequest, Headers, Invocation, Receipt, Reply, Start, Started

DEATH_GRACE_S = 0.1
"""So long after a guest's death its last bytes may still arrive; and so long its cause is waited for."""

Stake = Parked | Lease


class Shop:
    """What the calls of one node share. `changed` hears the digest of which more calls, or fewer, have their guest."""

    def __init__(
        self,
        *,
        node_id: str,
        calls: Calls,
        slots: Slots[Stake],
        ledger: Ledger,
        bases: Bases,
        pool: Pool,
        starter: Starter,
        mint: IdentityMint,
        reaper: Reaper,
        emit: Emit,
        clock: Callable[[], float],
        changed: Callable[[str], None],
    ) -> None:
        self.node_id = node_id
        self.calls = calls
        self.slots = slots
        self.ledger = ledger
        self.bases = bases
        self.pool = pool
        self.starter = starter
        self.mint = mint
        self.reaper = reaper
        self.emit = emit
        self.clock = clock
        self.changed = changed


class Claim:
    """A guest held for one invocation: an async context manager, entered when the guest is ready for the request.

    Entering raises `GuestUnavailable`, `InvocationCancelled` or `DuplicateInvocation`. Leaving kills the guest and
    frees slot and memory, once, also under any number of cancellations.
    """

    def __init__(self, shop: Shop, host_of: Callable[[Invocation], Hosted], invocation: Invocation) -> None:
        self._shop = shop
        self._host_of = host_of
        self._hosted: Hosted
        self._invocation = invocation
        self._loop = asyncio.get_running_loop()
        self._arrived_s = shop.clock()
        self._start_by_s = self._loop.time() + invocation.start_within_s
        self._start_bound: asyncio.Timeout | None = None
        self._interruption: SubstrateError | None = None
        self._call: Call | None = None
        self._ticket: Ticket[Stake] | None = None
        self._lease: Lease | None = None
        self._parked: Parked | None = None
        self._tried: set[Start] = set()
        self._guest_id = ""
        self._guest: Guest | None = None
        self._serving = False
        self._discarding: asyncio.Task[None] | None = None
        self._exchange: Exchange | None = None
        self._death_timer: asyncio.TimerHandle | None = None
        self._sample: Sample | None = None
        self._returning: asyncio.Task[None] | None = None
        self._given_up = False
        self._entered_s = 0.0
        self._queue_ms = 0.0
        self._running_s = 0.0
        self._started: Started | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole reply is here, so that reading it waits for nobody."""
        return self._exchange is not None and self._exchange.whole

    # The block.

    async def __aenter__(self) -> Claim:
        """Wait for a slot, memory and a ready guest."""
        invocation = self._invocation
        self._call = self._shop.calls.admit(invocation.id, invocation.attempt, self._interrupt)
        try:
            self._hosted = self._host_of(invocation)
            self._line_up()
            # With a slot and a guest that stands ready there is nothing to wait for, and no deadline to set.
            await (self._claim() if self._stands_ready() else self._within_start(self._claim))
        except BaseException as error:
            self._mark(error)
            await self.give_back()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give the guest back."""
        await self.give_back()

    async def exchange(self, request: GuestRequest) -> Reply:
        """Write the request and wait for the head of the reply.

        Raises `GuestUnavailable` or `InvocationCancelled` if the request was never written, otherwise `GuestFailed`
        or `GuestTimeout`; the same two while the body is read.
        """
        try:
            return await self._opened(request)
        except SubstrateError as error:
            self._mark(error)
            raise

    async def _opened(self, request: GuestRequest) -> Reply:
        exchange = await self._send(request)
        try:
            await exchange.head()
        except SubstrateError as error:
            raise await self._explained(error) from None
        started = self._started
        assert started is not None
        if exchange.whole:
            self._sample = self._sampled()
            started = structs.replace(started, cpu_ms=self._sample.cpu_ms, peak_mib=self._sample.peak_mib)
        body = _Body(self, exchange)
        reply = Reply(started=started, status=exchange.status, headers=exchange.headers, body=body)
        body.reply = reply
        return reply

    async def give_back(self) -> None:
        """Kill the guest, free slot and memory; waits until that is done, or for 10 s (then the reaper goes on)."""
        if self._returning is None and self._ticket is None:
            self._end_call()
            return
        await self._shop.reaper.join(self._begin_return())

    def _mark(self, error: BaseException) -> None:
        """Have an error say what guest there was, as the reply does that now won't come."""
        if isinstance(error, SubstrateError):
            error.started = self._started

    # Claiming.

    async def _within_start(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a step that must end before `start_within_s` has passed, and that an interruption ends at once."""
        if self._interruption is not None:
            raise self._interruption
        try:
            async with asyncio.timeout_at(self._start_by_s) as bound:
                self._start_bound = bound
                await step()
        except TimeoutError:
            if not bound.expired():
                raise  # it is an `OSError` too, of a dial for example
            raise self._interruption or self._too_late() from None
        finally:
            self._start_bound = None
        if self._interruption is not None:
            raise self._interruption

    def _line_up(self) -> None:
        """Enter the queue. Raises `GuestUnavailable` when that is of no use."""
        invocation = self._invocation
        self._entered_s = self._shop.clock()
        self._ticket = self._shop.slots.enter(
            self._hosted.workload.name,
            caller=invocation.caller,
            session=invocation.session,
            within_s=invocation.start_within_s,
            take=self._take_stake,
            promised=lambda calls: self._shop.pool.make_room(calls * self._hosted.workload.spec.memory_mib),
        )

    def _stands_ready(self) -> bool:
        """Whether slot and guest are there already."""
        return self._parked is not None and not self._parked.guest.exited.done()

    async def _claim(self) -> None:
        await self._queue()
        await self._start()

    async def _queue(self) -> None:
        """Wait for the turn, and tell of it."""
        invocation, slots, ticket = self._invocation, self._shop.slots, self._ticket
        name, entered_s = self._hosted.workload.name, self._entered_s
        assert ticket is not None
        if ticket.stake is None:
            self._shop.emit(CallQueued(invocation_id=invocation.id, workload=name, waiting=slots.load(name)[1]))
            granted: asyncio.Future[None] = self._loop.create_future()
            ticket.on_grant = partial(_resolve, granted)
            await granted
        self._queue_ms = round((self._shop.clock() - entered_s) * 1e3, 3)
        busy, waiting, _ = slots.load(name)
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

    def _take_stake(self, *, in_turn: bool) -> Stake | None:
        """A parked guest, which brings its memory; else memory; else the promise of some."""
        ledger, mib = self._shop.ledger, self._hosted.workload.spec.memory_mib
        parked = self._shop.pool.take(self._hosted.workload.digest)
        if parked is not None:
            self._parked, self._lease = parked, parked.lease
            self._guest, self._guest_id = parked.guest, parked.guest.guest_id
            return parked
        if not in_turn:
            return None
        if mib > ledger.size_mib:  # the node has shrunk: waiting is of no use, and holds up the others
            self._interrupt_unwritten(too_big(self._hosted, self._shop.node_id, ledger.size_mib))
            return None
        self._lease = ledger.reserve(mib)
        if self._lease is None:
            self._shop.pool.make_room(mib)
        return self._lease

    async def _start(self, failure: StartFailure | None = None) -> None:
        """Start a guest by the fastest way there is; one that fails falls through to the next."""
        while (start := self._next_way()) is not None:
            self._tried.add(start)
            began_s = self._running_s = self._shop.clock()
            try:
                base = await self._start_by(start)
            except StartFailure as failed:
                failure = failed
                await self._start_failed(start, str(failed), took_ms=(self._shop.clock() - began_s) * 1e3)
                continue
            self._claimed(start, base, ready_ms=(self._shop.clock() - began_s) * 1e3)
            return
        raise self._no_way(failure)

    def _next_way(self) -> Start | None:
        least, tried = self._invocation.demands.start, self._tried
        if self._parked is not None and Start.POOL not in tried:
            return Start.POOL
        if Start.WARM not in tried and Start.WARM.satisfies(least) and self._base() is not None:
            return Start.WARM
        if Start.COLD not in tried and Start.COLD.satisfies(least):
            return Start.COLD
        return None

    def _base(self) -> object | None:
        key = self._hosted.base_key
        return self._shop.bases.current(key) if key is not None else None

    async def _start_by(self, start: Start) -> str | None:
        """Leave a ready guest in `_guest` and return the id of its base. Raises `StartFailure`."""
        if start is Start.POOL:
            parked, self._parked = self._parked, None
            assert parked is not None
            if parked.guest.exited.done():
                raise StartFailure(f"it ended while parked: {parked.guest.exited.result().words}")
            return parked.base.base_id if parked.base else None
        key = self._hosted.base_key
        base = self._shop.bases.current(key) if start is Start.WARM and key is not None else None
        self._guest_id = self._shop.mint.guest_id()  # known before it is made, so that it can always be undone
        self._guest = await self._shop.starter.start(self._hosted, base, self._guest_id, running=self._runs)
        return base.base_id if base else None

    def _runs(self) -> None:
        self._running_s = self._shop.clock()

    async def _start_failed(self, start: Start, message: str, *, took_ms: float = 0.0) -> None:
        """Leave nothing of a guest that did not start, so that its memory can serve the next one."""
        self._shop.emit(
            StartFailed(
                invocation_id=self._invocation.id,
                workload=self._hosted.workload.name,
                start=start,
                guest=self._guest_id,
                message=message,
                took_ms=round(took_ms, 3),
            )
        )
        self._serve(serving=False)
        guest_id, self._guest_id, self._guest = self._guest_id, "", None
        self._discarding = self._shop.reaper.spawn(self._ended(guest_id), what=f"discard {guest_id}")
        await asyncio.shield(self._discarding)  # cancelled or not, giving back waits for it too

    def _claimed(self, start: Start, base: str | None, *, ready_ms: float) -> None:
        guest, invocation = self._guest, self._invocation
        assert guest is not None
        now_s = self._shop.clock()
        claim_ms = (now_s - self._arrived_s) * 1e3 - self._queue_ms
        self._started = Started(
            queue_ms=self._queue_ms,
            claim_ms=round(claim_ms, 3),
            ready_ms=round(ready_ms, 3),
            start=start,
            node=self._shop.node_id,
            guest=self._guest_id,
            isolation=self._hosted.vmm.isolation,
            base=base,
        )
        guest.exited.add_done_callback(self._guest_died)
        self._serve(serving=True)
        self._shop.emit(
            GuestClaimed(
                invocation_id=invocation.id,
                attempt=invocation.attempt,
                workload=invocation.workload.name,
                guest=self._guest_id,
                start=start,
                isolation=self._started.isolation,
                queue_ms=self._started.queue_ms,
                claim_ms=self._started.claim_ms,
                ready_ms=self._started.ready_ms,
                wait_ready_ms=0.0 if start is Start.POOL else round((now_s - self._running_s) * 1e3, 3),
                base=base,
            )
        )

    def _serve(self, *, serving: bool) -> None:
        """Count this call among those that have their guest, or no longer."""
        if serving is not self._serving:
            self._serving = serving
            self._hosted.serving += 1 if serving else -1
            self._shop.changed(self._hosted.workload.digest)

    def _too_late(self) -> SubstrateError:
        name, within_s = self._hosted.workload.name, self._invocation.start_within_s
        if self._ticket is not None and self._ticket.stake is not None:
            return GuestUnavailable(
                Reason.NOT_READY,
                f"no guest of {name!r} was ready within {within_s:.1f} s",
                hint=f"Raise `startTimeout` of {name!r} if it starts that slowly.",
            )
        retry_after_s = self._shop.slots.retry_after_s(name)
        starved = self._shop.slots.is_starved(name)
        what = f"the {self._hosted.workload.spec.memory_mib} MiB of a guest of" if starved else "a slot of"
        return GuestUnavailable(
            Reason.MEMORY if starved else Reason.QUEUE_TIMEOUT,
            f"{what} {name!r} did not come free within {within_s:.1f} s",
            hint=f"Retry in {retry_after_s:.0f} s.",
            retry_after_s=retry_after_s,
        )

    def _no_way(self, failure: StartFailure | None) -> GuestUnavailable:
        name, least = self._hosted.workload.name, self._invocation.demands.start
        if failure is None:
            return GuestUnavailable(
                Reason.INCOMPATIBLE,
                f"no {least} start of {name!r} is at hand",
                hint="Ask again without `fc-require-start`, or give the workload `warmBase` or a `pool`.",
            )
        only_restored = Start.COLD not in self._tried
        return GuestUnavailable(
            Reason.RESTORE_FAILED if only_restored else Reason.BOOT_FAILED,
            f"no guest of {name!r} could be started: {failure}",
        )

    # The exchange.

    async def _send(self, request: GuestRequest) -> Exchange:
        """Write the request to a guest. One that died since it was ready has seen nothing: the next way is tried."""
        invocation = self._invocation
        try:
            head = request_head(request.method, request.target, _for_guest(invocation, request), len(request.body))
        except ValueError as error:
            message = f"the request cannot be written: {error}"
            raise SubstrateError(Reason.BAD_REQUEST, message, ran=Ran.NO) from error
        while True:
            exchange = self._exchange = Exchange(
                DATA_PORT, head, request.body, head_request=request.method == "HEAD", clock=self._shop.clock
            )
            exchange.bound(invocation.run_within_s, on_expiry=self._expired)
            why = "it died while it was connected to"
            try:
                await self._within_start(partial(self._dial, exchange))
            except GuestUnavailable:
                if not exchange.written:
                    raise
            except OSError as error:
                why = f"it could not be reached: {error}"
            finally:
                if not exchange.written:  # then it must never be, whatever becomes of the connection
                    exchange.close()
            if exchange.written:  # if only in the last moment: `run_within_s` bounds it from here
                return exchange
            await self._within_start(partial(self._start_over, why))

    async def _dial(self, exchange: Exchange) -> None:
        assert self._guest is not None
        if self._guest.exited.done():  # whatever still listens there, nobody would act on the request
            raise ConnectionResetError(f"it ended with {self._guest.exited.result().words}")
        await self._guest.dial(lambda: exchange)

    async def _start_over(self, why: str) -> None:
        started = self._started
        assert started is not None
        self._stop_death_timer()
        await self._start_failed(started.start, why)
        await self._start(StartFailure(why))

    def _guest_died(self, exited: asyncio.Future[Exit]) -> None:
        if self._returning is not None or self._guest is None or self._guest.exited is not exited:
            return  # it was to end, and may have been replaced
        self._death_timer = self._loop.call_later(DEATH_GRACE_S, self._fail_dead)

    def _fail_dead(self) -> None:
        if self._exchange is not None:
            self._exchange.fail(GuestFailed("the guest died"))

    def _stop_death_timer(self) -> None:
        if self._death_timer is not None:
            self._death_timer.cancel()

    async def _explained(self, error: SubstrateError) -> SubstrateError:
        """The same error with the cause of the guest's death, if it died."""
        guest = self._guest
        if guest is None or not isinstance(error, GuestFailed) or self._returning is not None:
            return error
        await asyncio.wait({guest.exited}, timeout=DEATH_GRACE_S)
        if not guest.exited.done() or self._returning is not None:  # or it was us who ended it
            return error
        return GuestFailed(f"{error.message}: it ended with {guest.exited.result().told}", hint=error.hint)

    def _sampled(self) -> Sample:
        """What the guest has used. A host that does not tell must not keep us from giving it back."""
        with suppress(Exception):
            if self._guest is not None:
                return self._guest.sample()
        return Sample(None, None)

    def _receipt(self) -> Receipt:
        exchange, started = self._exchange, self._started
        assert exchange is not None
        assert started is not None
        if self._sample is None and self._returning is None:  # else it was taken when the whole reply was there
            self._sample = self._sampled()
        sample = self._sample or Sample(None, None)
        return Receipt(
            guest_ms=round(_guest_ms(exchange, self._shop.clock()), 3),
            body_bytes=exchange.body_bytes,
            cpu_ms=sample.cpu_ms,
            peak_mib=sample.peak_mib,
            base=started.base,
        )

    # Interruption and giving back.

    def _interrupt(self, unwritten: SubstrateError, written: SubstrateError) -> Ran:
        """End this call now: with `unwritten` if no byte of the request has left, and then none will."""
        if self._exchange is not None and self._exchange.written:
            self._exchange.fail(written)
            self._begin_return()
            return Ran.MAYBE
        self._interrupt_unwritten(unwritten)
        return Ran.NO

    def _interrupt_unwritten(self, unwritten: SubstrateError) -> None:
        self._interruption = unwritten
        if self._exchange is not None:
            self._exchange.fail(unwritten)
        if self._start_bound is None:
            self._begin_return()  # nobody waits in here: the request is still on its way to us
        elif not self._start_bound.expired():
            self._start_bound.reschedule(self._loop.time())

    def _expired(self) -> None:
        self._begin_return()

    def _begin_return(self) -> asyncio.Task[None]:
        """Stop the exchange and stop waiting at once; the rest is the reaper's, whatever becomes of us."""
        if self._returning is None:
            exchange, ticket = self._exchange, self._ticket
            self._stop_death_timer()
            if exchange is not None:
                self._given_up = exchange.error is None and not exchange.whole
                exchange.close()
            if ticket is not None and ticket.stake is None:
                self._shop.slots.leave(ticket)
            what = f"give back {self._guest_id or self._invocation.id}"
            self._returning = self._shop.reaper.spawn(self._return(), what=what)
        return self._returning

    async def _return(self) -> None:
        """The one way back: read what was used, kill and reap, free, clean up in the background."""
        guest = self._guest
        if guest is not None:
            self._sample = self._sample or self._sampled()
        died = guest.exited.result() if guest is not None and guest.exited.done() else None
        if self._discarding is not None:
            await asyncio.wait({self._discarding})
        if self._guest_id:
            await self._ended(self._guest_id, guest)
        if self._lease is not None:
            self._lease.release()
        self._serve(serving=False)
        if self._ticket is not None:
            self._shop.slots.leave(self._ticket)
        self._end_call()
        self._tell(died, guest.exited.result() if guest is not None and guest.exited.done() else None)

    async def _ended(self, guest_id: str, guest: Guest | None = None) -> None:
        """Kill a guest and see to the rest of it in the background. It may still live while this has not returned."""
        reaper, what = self._shop.reaper, f"discard {guest_id}"
        discard = partial(self._hosted.vmm.discard, guest_id)
        if guest is None:
            await reaper.insist(discard, what=what)
        else:
            await reaper.insist(partial(_killed, guest), what=f"kill {guest_id}")
            reaper.spawn(reaper.insist(discard, what=what), what=what)

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            written = self._exchange is not None and self._exchange.written
            self._shop.calls.end(call, Ran.MAYBE if written else Ran.NO)

    def _tell(self, died: Exit | None, ended: Exit | None) -> None:
        invocation, exchange, ticket = self._invocation, self._exchange, self._ticket
        name, now_s = self._hosted.workload.name, self._shop.clock()
        if exchange is not None and exchange.written:
            sample, error = self._sample or Sample(None, None), exchange.error
            peaks_mib = [mib for mib in (sample.peak_mib, ended.peak_mib if ended else None) if mib is not None]
            reason, message = (error.reason, error.message) if error is not None else (None, "")
            if self._given_up:  # by its caller: no fault of the guest
                reason, message = Reason.CANCELLED, "its caller left before the reply was whole"
            self._shop.emit(
                ExchangeEnded(
                    invocation_id=invocation.id,
                    attempt=invocation.attempt,
                    workload=name,
                    guest=self._guest_id,
                    guest_ms=round(_guest_ms(exchange, now_s), 3),
                    body_bytes=exchange.body_bytes,
                    status=exchange.status,
                    reason=reason,
                    message=message,
                    cpu_ms=sample.cpu_ms,
                    peak_mib=max(peaks_mib, default=None),
                    head_ms=None if exchange.head_s is None else round((exchange.head_s - exchange.started_s) * 1e3, 3),
                    release_ms=0.0 if exchange.ended_s is None else round((now_s - exchange.ended_s) * 1e3, 3),
                )
            )
        if self._guest_id:
            self._shop.emit(
                GuestGone(
                    invocation_id=invocation.id,
                    guest=self._guest_id,
                    workload=name,
                    exit=died.words if died else "",
                    console=ended.console if ended else "",
                )
            )
        if ticket is not None and ticket.granted_s is not None:
            busy, waiting, _ = self._shop.slots.load(name)
            self._shop.emit(
                SlotFreed(
                    invocation_id=invocation.id,
                    workload=name,
                    busy=busy,
                    waiting=waiting,
                    free_mib=self._shop.ledger.free_mib,
                    held_ms=round((now_s - ticket.granted_s) * 1e3, 3),
                )
            )


class Invoking:
    """`NodeExecutor.invoke` on this node: a claim and its exchange in one block."""

    def __init__(self, claim: Claim, request: GuestRequest) -> None:
        self._claim = claim
        self._request = request

    async def __aenter__(self) -> Reply:
        """Claim a guest and open its reply."""
        await self._claim.__aenter__()
        try:
            return await self._claim.exchange(self._request)
        except BaseException:
            await self._claim.give_back()
            raise

    async def __aexit__(self, *_: object) -> None:
        """Give the guest back."""
        await self._claim.give_back()


class _Body:
    """The pieces of a reply's body; at its end the reply gets its receipt."""

    __slots__ = ("_claim", "_exchange", "reply")

    def __init__(self, claim: Claim, exchange: Exchange) -> None:
        self._claim = claim
        self._exchange = exchange
        self.reply: Reply | None = None

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._exchange.__anext__()
        except StopAsyncIteration:
            reply, self.reply = self.reply, None  # it refers back to us: no garbage is left for the collector
            if reply is not None:
                reply.receipt = self._claim._receipt()  # noqa: SLF001  # the two halves of one exchange
            raise
        except SubstrateError as error:
            raise await self._claim._explained(error) from None  # noqa: SLF001  # as above


def too_big(hosted: Hosted, node_id: str, size_mib: int) -> GuestUnavailable:
    """What a call hears whose guest would not fit this node even if it were empty."""
    spec = hosted.workload.spec
    return GuestUnavailable(
        Reason.MEMORY,
        f"a guest of {spec.name!r} needs {spec.memory_mib} MiB, and node {node_id!r} has {size_mib} MiB in all",
        hint="Give the node more memory, or lower `memMib` of the workload.",
    )


def _for_guest(invocation: Invocation, request: GuestRequest) -> Headers:
    """The fields a guest gets: the caller's that ingress let through, and ours."""
    ours: Headers = (
        (b"fc-invocation-id", invocation.id.encode()),
        (b"fc-attempt", str(invocation.attempt).encode()),
    )
    if invocation.trace is not None:
        ours += ((b"traceparent", invocation.trace.parent.encode()),)
        if invocation.trace.state:
            ours += ((b"tracestate", invocation.trace.state.encode()),)
    if not any(name == b"host" for name, _ in request.headers):
        ours = ((b"host", b"vsock"), *ours)
    return (*request.headers, *ours)


def _guest_ms(exchange: Exchange, now_s: float) -> float:
    return ((exchange.ended_s or now_s) - exchange.started_s) * 1e3 if exchange.written else 0.0


async def _killed(guest: Guest) -> None:
    guest.kill()
    await asyncio.wait({guest.gone})


def _resolve(granted: asyncio.Future[None]) -> None:
    if not granted.done():
        granted.set_result(None)
