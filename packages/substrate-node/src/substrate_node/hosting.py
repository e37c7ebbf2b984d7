"""Which workloads a node hosts: made known, kept warm, and dropped some time after the last agent forgot them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from substrate_node.base import Bases
from substrate_node.pool import Pool
from substrate_node.shop import Stake
from substrate_node.slots import Slots
from substrate_node.starter import Hosted
from substrate_node.vmm import Vmm
from substrate_seam.errors import GuestUnavailable, Reason
from substrate_seam.events import Emit, WorkloadDropped, WorkloadEnsured
from substrate_seam.invocation import WorkloadRef
from substrate_seam.workload import FEATURES, Workload

FORGOTTEN_KEPT_S = 600.0
"""So long a workload stays after the last agent forgot it, unless someone ensures or calls it meanwhile."""


class Hosting:
    """The workloads of one node, by digest. `changed` hears the digest of one that came or went."""

    def __init__(
        self,
        *,
        node_id: str,
        vmms: Sequence[Vmm],
        slots: Slots[Stake],
        bases: Bases,
        pool: Pool,
        emit: Emit,
        changed: Callable[[str], None],
    ) -> None:
        self._node_id = node_id
        self._vmms = vmms
        self._slots = slots
        self._bases = bases
        self._pool = pool
        self._emit = emit
        self._changed = changed
        self.hosted: dict[str, Hosted] = {}
        # Dicts that only have keys are sets in order, which makes a run repeatable.
        self._digests_of: dict[str, dict[str, None]] = {}
        self._digests_on: dict[str, dict[str, None]] = {}  # of each base key
        self._forgotten: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    def called(self, ref: WorkloadRef) -> Hosted:
        """The workload of a call; one that was forgotten stays the longer for it. Raises `GuestUnavailable`."""
        hosted = self.hosted.get(ref.digest)
        if hosted is None:
            raise GuestUnavailable(
                Reason.UNKNOWN_DIGEST,
                f"node {self._node_id!r} does not know this version of {ref.name!r} yet",
                hint="Its agent will tell it; try again.",
            )
        if ref.digest in self._forgotten:
            self._forgotten.pop(ref.digest).cancel()
            self._drop_later(ref.digest)
        return hosted

    def digests_of(self, name: str) -> Collection[str]:
        """The versions of a workload that are hosted."""
        return self._digests_of.get(name, ())

    def digests_on(self, base_key: str) -> Collection[str]:
        """The workloads that start from one base."""
        return self._digests_on.get(base_key, ())

    async def ensure(self, workload: Workload) -> None:
        """Make a workload known and warm it in the background. Raises `GuestUnavailable` if this node can't run it.

        One that is known is warmed anew if what its base is made of has changed.
        """
        spec, digest = workload.spec, workload.digest
        vmm = self.hosted[digest].vmm if digest in self.hosted else self._vmm_for(workload)
        base_key = await vmm.input_key(workload) if spec.warm_base else None
        if digest in self._forgotten:
            self._forgotten.pop(digest).cancel()
        self._slots.configure(spec.name, concurrency=spec.concurrency, queue=spec.queue, sessioned=spec.sessioned)
        hosted = self.hosted.get(digest)
        if hosted is None:
            hosted = self.hosted[digest] = Hosted(workload, vmm)
            self._digests_of.setdefault(spec.name, {})[digest] = None
            self._emit(WorkloadEnsured(workload=spec.name, digest=digest))
        elif hosted.base_key == base_key:
            self._pool.keep(hosted)  # it was dropped if the workload was forgotten
            return
        self._pool.drop(digest)
        self._rebase(hosted, base_key)
        self._pool.keep(hosted)
        self._changed(digest)

    def forget(self, digest: str) -> None:
        """Drop a workload some time from now, or from the last call of it, unless someone ensures it meanwhile.

        Its parked guests go at once, so that its successor has their memory.
        """
        if digest in self.hosted and digest not in self._forgotten and not self._closed:
            self._pool.drop(digest)
            self._drop_later(digest)

    def close(self) -> None:
        """Drop nothing any more."""
        self._closed = True
        for timer in self._forgotten.values():
            timer.cancel()

    def _drop_later(self, digest: str) -> None:
        loop = asyncio.get_running_loop()
        self._forgotten[digest] = loop.call_later(FORGOTTEN_KEPT_S, self._drop, digest)

    def _drop(self, digest: str) -> None:
        self._forgotten.pop(digest, None)
        hosted = self.hosted.pop(digest)
        name = hosted.workload.name
        self._pool.drop(digest)
        del self._digests_of[name][digest]
        if not self._digests_of[name]:
            del self._digests_of[name]
            self._slots.close(name)
        self._rebase(hosted, None)
        self._emit(WorkloadDropped(workload=name, digest=digest))
        self._changed(digest)

    def _rebase(self, hosted: Hosted, base_key: str | None) -> None:
        """Start guests of a workload from another base, or none; one that no workload needs any more goes."""
        digest, old = hosted.workload.digest, hosted.base_key
        hosted.base_key = base_key
        if base_key is not None:
            self._digests_on.setdefault(base_key, {})[digest] = None
            self._bases.want(base_key, hosted.workload, hosted.vmm)
        if old is not None:
            del self._digests_on[old][digest]
            if not self._digests_on[old]:
                del self._digests_on[old]
                self._bases.drop(old)

    def _vmm_for(self, workload: Workload) -> Vmm:
        unknown = sorted(set(workload.spec.requires) - FEATURES)
        if unknown:
            raise GuestUnavailable(
                Reason.INCOMPATIBLE,
                f"{workload.name!r} requires {', '.join(unknown)}, which node {self._node_id!r} does not know",
                hint="Upgrade the node, or do without.",
            )
        refusals = []
        for vmm in self._vmms:
            refusal = vmm.refusal(workload)
            if refusal is None and vmm.isolation.satisfies(workload.spec.isolation):
                return vmm
            refusals.append(refusal or f"it asks for {workload.spec.isolation}, and this gives {vmm.isolation}")
        raise GuestUnavailable(
            Reason.INCOMPATIBLE,
            f"node {self._node_id!r} can't run {workload.name!r}: {'; '.join(refusals)}",
        )
