"""LocalNode: the node of this machine. Which workloads it hosts, how big it is, what it says about itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct

from substrate_node import refusals
from substrate_node.base import Bases
from substrate_node.calls import Calls
from substrate_node.hosting import Hosting
from substrate_node.invoker import Claim, Invoking
from substrate_node.journal import JournalLine, Record
from substrate_node.ledger import Ledger
from substrate_node.pool import Pool
from substrate_node.ready import IdentityMint
from substrate_node.reaper import Reaper
from substrate_node.reporting import Hearer, workload_report
from substrate_node.shop import Shop, Stake
from substrate_node.slots import Slots
from substrate_node.starter import Hosted, Starter, StartFailure
from substrate_node.vmm import JOURNAL_PORT, Guest, Inbound, Vmm
from substrate_seam.errors import GuestFailed, Ran
from substrate_seam.events import (
    Emit,
    InvocationFenced,
    NodeDraining,
    NodeLimited,
    NodeResumed,
)
from substrate_seam.executor import Node
from substrate_seam.invocation import Invocation
from substrate_seam.report import NodeLimits, NodeReport, WorkloadReport
from substrate_seam.story import Story
from substrate_seam.workload import FEATURES, Workload


class NodeIdentity(Struct, frozen=True, kw_only=True):
    """Who this node is; `boot_id` is new at every start of the daemon, `arch` is in Go's spelling."""

    node_id: str
    boot_id: str
    arch: str
    pod_uid: str | None = None


class NodeTimes(Struct, frozen=True, kw_only=True):
    """How long starting a guest may take, in seconds, cold and from a base; and how long ending all of them may.

    `leave_within_s` is less than the 30 s that a pod has beyond its drain.
    """

    boot_within_s: float = 60.0
    restore_within_s: float = 2.0
    leave_within_s: float = 20.0


class LocalNode:
    """Runs invocations on this machine. An async context manager: leaving it ends every guest.

    `vmms` are asked in order which of them runs a workload. `record`, if given, keeps the audit journal, and
    `story` tells what is kept of an invocation. `clock` gives
    seconds to measure by, finer than an event loop may tell them; without it the loop's own do.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        *,
        vmms: Sequence[Vmm],
        memory_mib: int,
        mint: IdentityMint,
        emit: Emit,
        times: NodeTimes | None = None,
        record: Record | None = None,
        story: Callable[[str], Story | None] = lambda _: None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        times = times or NodeTimes()
        self._identity = identity
        self._vmms = vmms
        self._emit = emit
        self._mint = mint
        self._leave_within_s = times.leave_within_s
        self._record = record
        self._story = story
        self._loop = loop = asyncio.get_running_loop()
        self._hearers: dict[Hearer, None] = {}  # in order, which makes a run repeatable
        self._limits_generation = 0
        self._draining_until_s: float | None = None
        self._closing = False
        self._drain_timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()  # set for a moment when there is a base, or can be none, or some memory
        self._reaper = Reaper(emit=emit)
        self._ledger = Ledger(memory_mib, freed=self._memory_freed)
        clock = clock or loop.time
        self._slots: Slots[Stake] = Slots(clock=clock, changed=self._queue_changed)
        self._calls = Calls(clock=loop.time)
        self._bases = Bases(
            ledger=self._ledger,
            mint=mint,
            reaper=self._reaper,
            emit=emit,
            build_within_s=times.boot_within_s,
            starving=lambda: self._slots.starving,
            make_room=self._make_room,
            eased=self._base_eased,
            changed=self._base_changed,
        )
        starter = self._starter = Starter(
            bases=self._bases,
            mint=mint,
            inbound=self._inbound,
            boot_within_s=times.boot_within_s,
            restore_within_s=times.restore_within_s,
        )
        self._pool = Pool(
            ledger=self._ledger,
            bases=self._bases,
            starter=starter,
            mint=mint,
            reaper=self._reaper,
            emit=emit,
            starving=lambda: self._slots.starving or self._bases.starving,
            offer=self._slots.offer,
            changed=self._changed,
        )
        self._hosting = Hosting(
            node_id=identity.node_id,
            vmms=vmms,
            slots=self._slots,
            bases=self._bases,
            pool=self._pool,
            emit=emit,
            changed=self._changed,
        )
        self._shop = Shop(
            node_id=identity.node_id,
            calls=self._calls,
            slots=self._slots,
            ledger=self._ledger,
            bases=self._bases,
            pool=self._pool,
            starter=starter,
            mint=mint,
            reaper=self._reaper,
            emit=emit,
            clock=clock,
            changed=self._changed,
        )

    @property
    def node_id(self) -> str:
        """The name of the node."""
        return self._identity.node_id

    @property
    def boot_id(self) -> str:
        """New at every start of the daemon."""
        return self._identity.boot_id

    @property
    def running(self) -> int:
        """How many invocations wait or run."""
        return len(self._calls.live)

    async def __aenter__(self) -> LocalNode:
        """Be a node; nothing is started before a workload is ensured."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every call and every guest, and wait until nothing of them is left. Bases stay for the next daemon.

        What can't be ended within `leave_within_s` seconds is told of, as a failed clean-up, and left to that daemon.
        """
        self._closing = True
        self._draining_until_s = self._loop.time()
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._hosting.close()
        self._changed(None)
        self._end_calls()
        self._bases.stop()
        self._pool.close()
        self._reaper.spawn(self._calls.idle(), what="end the last calls")
        await self._reaper.aclose(within_s=self._leave_within_s)

    async def idle(self) -> None:
        """Wait until no invocation waits or runs."""
        await self._calls.idle()

    # Invocations.

    def invoke(self, invocation: Invocation) -> Invoking:
        """Claim a guest and open its reply; leaving the block gives the guest back (see `NodeExecutor`)."""
        return Invoking(self.claim(invocation), invocation.request)

    def claim(self, invocation: Invocation) -> Claim:
        """Hold a ready guest for an invocation whose request body may still be on its way."""
        return Claim(self._shop, self._host_of, invocation)

    async def cancel(self, invocation_id: str) -> Ran:
        """Fence an id; a call that waits is refused, one that runs loses its guest."""
        ran = self._calls.fence(invocation_id)
        self._emit(InvocationFenced(invocation_id=invocation_id, ran=ran))
        return ran

    async def story(self, invocation_id: str) -> Story | None:
        """What is kept of an invocation, by a daemon that is a node and no more."""
        return self._story(invocation_id)

    def _host_of(self, invocation: Invocation) -> Hosted:
        if self._draining_until_s is not None:
            raise refusals.draining(self.node_id)
        hosted = self._hosting.called(invocation.workload)
        self._check_demands(invocation, hosted)
        return hosted

    def _check_demands(self, invocation: Invocation, hosted: Hosted) -> None:
        spec, isolation = hosted.workload.spec, hosted.vmm.isolation
        if not isolation.satisfies(invocation.demands.isolation):
            raise refusals.too_little_isolation(hosted, self.node_id, invocation.demands.isolation)
        if spec.memory_mib > self._ledger.size_mib:
            raise refusals.too_big(hosted, self.node_id, self._ledger.size_mib)

    # Workloads.

    async def ensure(self, workload: Workload) -> None:
        """Make a workload known and warm it in the background. Raises `GuestUnavailable` if this node can't run it.

        One that is known is warmed anew if what its base is made of has changed.
        """
        await self._hosting.ensure(workload)

    async def warmed(self, digest: str) -> None:
        """Wait until guests of a workload start warm, or a first attempt at that has failed."""
        hosted = self._hosting.hosted
        while (key := hosted[digest].base_key) and self._bases.expected(key) and not self._bases.why_not(key):
            await self._news.wait()

    @asynccontextmanager
    async def restored(self, digest: str) -> AsyncIterator[Guest]:
        """Hold a clone of a workload for the length of the block, outside of any call: to look at it, say.

        Waits for the base, and for memory. Raises `StartFailure`, also when there is no base and the first attempt at
        one has failed.
        """
        await self.warmed(digest)
        hosted = self._hosting.hosted[digest]
        guest_id, mib, key = self._mint.guest_id(), hosted.workload.spec.memory_mib, hosted.base_key or ""
        base = self._bases.current(key)
        if base is None:
            why_not = self._bases.why_not(key) or "its monitor makes no bases of it"
            raise StartFailure(f"there is no warm start: {why_not}")
        while self._slots.starving or (lease := self._ledger.reserve(mib)) is None:  # calls go first
            await self._news.wait()
        try:
            yield await self._starter.start(hosted, base, guest_id)
        finally:
            discard = partial(hosted.vmm.discard, guest_id)
            undo = self._reaper.insist(discard, what=f"discard {guest_id}")
            await self._reaper.finish(undo, what=f"discard {guest_id}", within_s=math.inf)
            lease.release()

    async def forget(self, digest: str) -> None:
        """Drop a workload ten minutes from now, or from the last call of it, unless someone ensures it meanwhile.

        Its parked guests go at once, so that its successor has their memory. An agent that still needs it after that
        hears `unknown-digest` and ensures it again.
        """
        self._hosting.forget(digest)

    def _inbound(self, _: Workload, __: str) -> Inbound:
        """Who answers a guest that dials out."""
        if self._record is None:
            return {}
        return {JOURNAL_PORT: partial(JournalLine, self._record)}

    # Size and drain.

    async def drain(self, *, within_s: float) -> None:
        """Take no new invocations. Those that wait or run have `within_s` seconds, then they are ended."""
        if self._closing:
            return
        self._draining_until_s = self._loop.time() + within_s
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._drain_timer = self._loop.call_later(within_s, self._end_calls)
        self._emit(NodeDraining(node=self.node_id, within_s=within_s, running=self.running))
        self._changed(None)

    async def resume(self) -> None:
        """Take invocations again."""
        if self._closing:
            return
        self._draining_until_s = None
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None
        self._emit(NodeResumed(node=self.node_id))
        self._changed(None)

    async def limit(self, limits: NodeLimits) -> None:
        """Set the node's size, unless a later generation is in force. Nothing that runs is ended for it."""
        if limits.generation < self._limits_generation:
            return
        self._limits_generation = limits.generation
        self._ledger.resize(limits.memory_mib)
        self._pool.fit()
        self._emit(NodeLimited(node=self.node_id, generation=limits.generation, memory_mib=limits.memory_mib))
        self._changed(None)

    def _end_calls(self) -> None:
        for call in self._calls.live:
            cut = GuestFailed(f"the guest was ended: node {self.node_id!r} had to stop before it finished")
            call.interrupt(refusals.draining(self.node_id), cut)

    # Reports.

    async def reports(self) -> AsyncGenerator[NodeReport, None]:
        """A full report at once, then what changed: at most one per 50 ms, at least one per 2 s."""
        hearer = Hearer()
        self._hearers[hearer] = None
        try:
            yield self.report()
            while True:
                await hearer.news(self._loop)
                if self._closing:
                    return
                yield self._report(hearer.take(), full=False)
        finally:
            del self._hearers[hearer]

    def report(self) -> NodeReport:
        """What the node says about itself now, in full."""
        return self._report(self._hosting.hosted, full=True)

    def _report(self, digests: Iterable[str], *, full: bool) -> NodeReport:
        draining_until_s = self._draining_until_s
        left_s = None if draining_until_s is None else max(0.0, draining_until_s - self._loop.time())
        return NodeReport(
            node_id=self.node_id,
            boot_id=self.boot_id,
            pod_uid=self._identity.pod_uid,
            arch=self._identity.arch,
            size_mib=self._ledger.size_mib,
            free_mib=self._ledger.free_mib,
            isolation=max((vmm.isolation for vmm in self._vmms), key=lambda isolation: isolation.strength),
            features=tuple(sorted(FEATURES)),
            workloads={digest: self._workload_report(digest) for digest in digests},
            full=full,
            limits_generation=self._limits_generation,
            draining=draining_until_s is not None,
            drain_within_s=left_s,
        )

    def _workload_report(self, digest: str) -> WorkloadReport | None:
        hosted = self._hosting.hosted.get(digest)
        return workload_report(hosted, self._shop) if hosted is not None else None

    # What the parts tell.

    def _changed(self, digest: str | None) -> None:
        for hearer in self._hearers:
            hearer.tell(digest)

    def _queue_changed(self, name: str) -> None:
        self._pool.freed()  # perhaps nobody starves any more
        if self._hearers:
            for digest in self._hosting.digests_of(name):
                self._changed(digest)

    def _base_changed(self, key: str) -> None:
        for digest in self._hosting.digests_on(key):
            self._pool.refill(digest)
            self._changed(digest)
        self._tell_news()

    def _make_room(self, mib: int) -> bool:
        return self._pool.make_room(mib)

    def _base_eased(self) -> None:
        self._pool.freed()

    def _memory_freed(self) -> None:
        self._slots.retry()
        self._bases.freed()
        self._pool.freed()
        self._tell_news()

    def _tell_news(self) -> None:
        self._news.set()
        self._news.clear()
        self._changed(None)


if TYPE_CHECKING:  # the type checker proves that it fits

    def _fits(node: LocalNode) -> Node:
        return node
