"""One invocation on this node: claim a guest, exchange with it, give it back, whichever way the block is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from msgspec import structs

from substrate_node.calls import Call
from substrate_node.holding import UNTOLD, Holding
from substrate_node.shop import Shop
from substrate_node.starter import Hosted
from substrate_node.vmm import DATA_PORT, Exit, Sample
from substrate_node.vsockhttp import Exchange, request_head
from substrate_seam.errors import GuestFailed, GuestUnavailable, Ran, Reason, SubstrateError
from substrate_seam.events import ExchangeEnded
from substrate_seam.invocation import GuestRequest, Invocation, Receipt, Reply

DEATH_GRACE_S = 0.1
"""So long after a guest's death its last bytes may still arrive; and so long its cause is waited for."""


class Claim:
    """A guest held for one invocation: an async context manager, entered when the guest is ready for the request.

    Entering raises `GuestUnavailable`, `InvocationCancelled` or `DuplicateInvocation`. Leaving kills the guest and
    frees slot and memory, once, also under any number of cancellations.
    """

    __slots__ = (
        "_call",
        "_death_timer",
        "_ending",
        "_exchange",
        "_given_up",
        "_held",
        "_host_of",
        "_interruption",
        "_invocation",
        "_loop",
        "_returning",
        "_sample",
        "_shop",
        "_start_bound",
        "_start_by_s",
    )

    def __init__(self, shop: Shop, host_of: Callable[[Invocation], Hosted], invocation: Invocation) -> None:
        self._shop = shop
        self._host_of = host_of
        self._invocation = invocation
        self._loop = asyncio.get_running_loop()
        self._start_by_s = self._loop.time() + invocation.start_within_s
        self._start_bound: asyncio.Timeout | None = None
        self._interruption: SubstrateError | None = None
        self._call: Call | None = None
        self._held: Holding | None = None
        self._exchange: Exchange | None = None
        self._death_timer: asyncio.TimerHandle | None = None
        self._sample: Sample | None = None
        self._given_up = False
        self._ending = False
        self._returning: asyncio.Task[None] | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole reply is here, so that reading it waits for nobody."""
        return self._exchange is not None and self._exchange.whole

    # The block.

    async def __aenter__(self) -> Claim:
        """Wait for a slot, memory and a ready guest."""
        invocation, shop = self._invocation, self._shop
        self._call = shop.calls.admit(invocation.id, invocation.attempt, self._interrupt)
        try:
            held = self._held = Holding(shop, self._host_of(invocation), invocation)
            held.line_up(refuse=self._interrupt_unwritten)
            if not held.claim_at_once():  # else there is nothing to wait for, and no deadline to set
                await self._within_start(held.claim)
            self._watch_for_death(held)
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
        held = self._held
        assert held is not None
        try:
            exchange = await self._send(held, request)
            try:
                await exchange.head()
            except SubstrateError as error:
                raise await self._explained(error) from None
        except SubstrateError as error:
            self._mark(error)
            raise
        started = held.started
        assert started is not None
        if exchange.whole:
            sample = self._sample = held.sample()
            started = structs.replace(started, cpu_ms=sample.cpu_ms, peak_mib=sample.peak_mib)
        body = _Body(self, exchange)
        reply = body.reply = Reply(started=started, status=exchange.status, headers=exchange.headers, body=body)
        return reply

    async def give_back(self) -> None:
        """Kill the guest, free slot and memory; waits until that is done, or for 10 s (then the reaper goes on)."""
        if self._held is None:
            self._end_call()
            return
        self._begin_return(self._held)
        if self._returning is not None:
            await self._shop.reaper.join(self._returning)

    def _mark(self, error: BaseException) -> None:
        """Have an error say what guest there was, as the reply does that now won't come."""
        if isinstance(error, SubstrateError) and self._held is not None:
            error.started = self._held.started

    # Until the request is written.

    async def _within_start(self, step: Callable[[], Awaitable[None]]) -> None:
        """Take a step that must end before `start_within_s` has passed, and that an interruption ends at once."""
        if self._interruption is not None:
            raise self._interruption
        try:
            async with asyncio.timeout_at(self._start_by_s) as bound:
                self._start_bound = bound
                await step()
        except TimeoutError:
            if not bound.expired():
                raise  # it is an `OSError` too, of a dial for example
            assert self._held is not None
            raise self._interruption or self._held.too_late() from None
        finally:
            self._start_bound = None
        if self._interruption is not None:
            raise self._interruption

    async def _send(self, held: Holding, request: GuestRequest) -> Exchange:
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
                await self._within_start(self._dial)
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
            self._stop_death_timer()
            await self._within_start(partial(held.start_over, why))
            self._watch_for_death(held)

    async def _dial(self) -> None:
        exchange, held = self._exchange, self._held
        assert exchange is not None
        assert held is not None
        assert held.guest is not None
        if held.guest.exited.done():  # whatever still listens there, nobody would act on the request
            raise ConnectionResetError(f"it ended with {held.guest.exited.result().words}")
        await held.guest.dial(lambda: exchange)

    # While the guest answers.

    def _watch_for_death(self, held: Holding) -> None:
        assert held.guest is not None
        held.guest.exited.add_done_callback(self._guest_died)

    def _guest_died(self, exited: asyncio.Future[Exit]) -> None:
        guest = self._held.guest if self._held is not None else None
        if self._ending or guest is None or guest.exited is not exited:
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
        guest = self._held.guest if self._held is not None else None
        if guest is None or not isinstance(error, GuestFailed) or self._ending:
            return error
        await asyncio.wait({guest.exited}, timeout=DEATH_GRACE_S)
        if not guest.exited.done() or self._ending:  # or it was us who ended it
            return error
        return GuestFailed(f"{error.message}: it ended with {guest.exited.result().told}", hint=error.hint)

    def _receipt(self) -> Receipt:
        exchange, held = self._exchange, self._held
        assert exchange is not None
        assert held is not None
        if self._sample is None and not self._ending:  # else it was taken when the whole reply was there
            self._sample = held.sample()
        sample = self._sample or UNTOLD
        return Receipt(
            guest_ms=_guest_ms(exchange, self._shop.clock()),
            body_bytes=exchange.body_bytes,
            cpu_ms=sample.cpu_ms,
            peak_mib=sample.peak_mib,
            base=held.started.base if held.started is not None else None,
        )

    # Interruption and giving back.

    def _interrupt(self, unwritten: SubstrateError, written: SubstrateError) -> Ran:
        """End this call now: with `unwritten` if no byte of the request has left, and then none will."""
        if self._exchange is not None and self._exchange.written:
            self._exchange.fail(written)
            self._expired()
            return Ran.MAYBE
        self._interrupt_unwritten(unwritten)
        return Ran.NO

    def _interrupt_unwritten(self, unwritten: SubstrateError) -> None:
        self._interruption = unwritten
        if self._exchange is not None:
            self._exchange.fail(unwritten)
        if self._start_bound is None:
            self._expired()  # nobody waits in here: the request is still on its way to us
        elif not self._start_bound.expired():
            self._start_bound.reschedule(self._loop.time())

    def _expired(self) -> None:
        if self._held is not None:
            self._begin_return(self._held)

    def _begin_return(self, held: Holding) -> None:
        """Stop the exchange and have the guest end, now; what takes time is the reaper's, whatever becomes of us."""
        if self._ending:
            return
        self._ending = True
        self._stop_death_timer()
        exchange, guest = self._exchange, held.guest
        if exchange is not None:
            self._given_up = exchange.error is None and not exchange.whole
            exchange.close()
        held.stop_waiting()
        if guest is not None:
            guest.exited.remove_done_callback(self._guest_died)
            self._sample = self._sample or held.sample()
        died = held.end_of_guest
        if held.end_at_once():
            self._returned(held, died)
        else:
            what = f"give back {held.guest_id or self._invocation.id}"
            self._returning = self._shop.reaper.spawn(self._return(held, died), what=what)

    async def _return(self, held: Holding, died: Exit | None) -> None:
        await held.end()
        self._returned(held, died)

    def _returned(self, held: Holding, died: Exit | None) -> None:
        """The guest is gone: free what it had, and tell."""
        held.free()
        self._end_call()
        if self._exchange is not None and self._exchange.written:
            self._tell_exchange(held, self._exchange)
        held.tell_freed(died)

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            written = self._exchange is not None and self._exchange.written
            self._shop.calls.end(call, Ran.MAYBE if written else Ran.NO)

    def _tell_exchange(self, held: Holding, exchange: Exchange) -> None:
        invocation, now_s = self._invocation, self._shop.clock()
        sample, error, ended = self._sample or UNTOLD, exchange.error, held.end_of_guest
        peaks_mib = [mib for mib in (sample.peak_mib, ended.peak_mib if ended else None) if mib is not None]
        reason, message = (error.reason, error.message) if error is not None else (None, "")
        if self._given_up:  # by its caller: no fault of the guest
            reason, message = Reason.CANCELLED, "its caller left before the reply was whole"
        self._shop.emit(
            ExchangeEnded(
                invocation_id=invocation.id,
                attempt=invocation.attempt,
                workload=held.hosted.workload.name,
                guest=held.guest_id,
                guest_ms=_guest_ms(exchange, now_s),
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


class Invoking:
    """`NodeExecutor.invoke` on this node: a claim and its exchange in one block."""

    __slots__ = ("_claim", "_request")

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


def _for_guest(invocation: Invocation, request: GuestRequest) -> list[tuple[bytes, bytes]]:
    """The fields a guest gets: the caller's that ingress let through, and ours."""
    fields = [*request.headers]
    if not any(name == b"host" for name, _ in fields):
        fields.append((b"host", b"vsock"))
    fields.append((b"fc-invocation-id", invocation.id.encode()))
    fields.append((b"fc-attempt", b"%d" % invocation.attempt))
    if invocation.trace is not None:
        fields.append((b"traceparent", invocation.trace.parent.encode()))
        if invocation.trace.state:
            fields.append((b"tracestate", invocation.trace.state.encode()))
    return fields


def _guest_ms(exchange: Exchange, now_s: float) -> float:
    return round(((exchange.ended_s or now_s) - exchange.started_s) * 1e3, 3)
