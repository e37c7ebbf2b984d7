"""What a node says about each workload, and when it has something to say."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from substrate_node.shop import Shop
from substrate_node.starter import Hosted
from substrate_seam.report import WorkloadReport

REPORT_GAP_S, REPORT_EVERY_S = 0.05, 2.0


def workload_report(hosted: Hosted, shop: Shop) -> WorkloadReport:
    """How a workload fares on this node now."""
    spec = hosted.workload.spec
    busy, waiting, service_s = shop.slots.load(spec.name)
    parked, making = shop.pool.stock(hosted.workload.digest)
    base = shop.bases.current(hosted.base_key) if hosted.base_key is not None else None
    return WorkloadReport(
        name=spec.name,
        concurrency=spec.concurrency,
        busy=busy,
        serving=hosted.serving,
        waiting=waiting,
        parked=parked,
        making=making,
        isolation=hosted.vmm.isolation,
        base=base.base_id if base else None,
        service_ms=None if service_s is None else round(service_s * 1e3, 3),
    )


class Hearer:
    """One reader of reports: what has changed since it last heard."""

    def __init__(self) -> None:
        self._dirty: dict[str, None] = {}
        self._told = asyncio.Event()

    def tell(self, digest: str | None) -> None:
        """A workload has changed, or (None) the node itself."""
        if digest is not None:
            self._dirty[digest] = None
        self._told.set()

    async def news(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until there is something to say, or it is time to say anything."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(loop.time() + REPORT_EVERY_S):
                await asyncio.sleep(REPORT_GAP_S)
                await self._told.wait()

    def take(self) -> dict[str, None]:
        """The workloads that have changed, in order; from now on, those that change after this."""
        self._told.clear()
        dirty, self._dirty = self._dirty, {}
        return dirty
