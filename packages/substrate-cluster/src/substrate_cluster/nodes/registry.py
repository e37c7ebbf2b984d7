"""The live views of the nodes: hear each one, tell each one what there is to run, notice silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from msgspec import structs

from substrate_cluster.placement.index import NodeIndex
from substrate_seam.errors import SubstrateError
from substrate_seam.events import Emit, NodeConnected, NodeLost, WarningRaised
from substrate_seam.executor import Node
from substrate_seam.report import NodeReport
from substrate_seam.workload import Workload

if TYPE_CHECKING:
    from random import Random

_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.1, 5.0


class Registry:
    """Follows nodes for as long as `run` runs. `workloads` gives what every node should know."""

    def __init__(
        self,
        nodes: Mapping[str, Node],
        index: NodeIndex,
        *,
        workloads: Callable[[], Iterable[Workload]],
        dice: Random,
        emit: Emit,
    ) -> None:
        self._nodes = nodes
        self._index = index
        self._workloads = workloads
        self._dice = dice
        self._emit = emit
        self._lost: dict[str, str] = dict.fromkeys(nodes, "it has not been heard yet")
        self._heard = asyncio.Event()

    async def run(self) -> None:
        """Follow every node, until cancelled."""
        async with asyncio.TaskGroup() as duties:
            for node in self._nodes.values():
                duties.create_task(self._follow(node), name=f"follow {node.node_id}")

    async def heard(self) -> None:
        """Wait until at least one node can be heard and knows the workloads."""
        await self._heard.wait()

    def reasons(self) -> list[str]:
        """Why calls can't be placed now; empty when at least one node takes them."""
        if len(self._index.open):
            return []
        draining = [f"node {node_id!r} is draining" for node_id in self._index.views]
        return [f"node {node_id!r} can't be heard: {why}" for node_id, why in self._lost.items()] + draining

    @property
    def lost(self) -> Mapping[str, str]:
        """The nodes that can't be heard, and why."""
        return self._lost

    def reports(self) -> Iterator[NodeReport]:
        """What each node that can be heard says of itself, put together from all its reports; good until the next."""
        for view in self._index.views.values():
            yield structs.replace(view.report, workloads=view.workloads, full=True)

    async def update(self, *, added: Iterable[Workload], removed: Iterable[str]) -> None:
        """Tell every node that can be heard of workloads (`added`) and digests (`removed`) of a new table."""
        added, removed = tuple(added), tuple(removed)
        for node in self._nodes.values():
            if self._index.view(node.node_id) is not None:
                await self._ensure(node, added)
                for digest in removed:
                    await self._forget(node, digest)

    async def _follow(self, node: Node) -> None:
        backoff_s = _BACKOFF_S_MIN
        while True:
            why = "it stopped reporting"
            try:
                async with aclosing(node.reports()) as reports:
                    async for report in reports:
                        await self._hear(node, report)
                        backoff_s = _BACKOFF_S_MIN
            except (SubstrateError, OSError) as error:
                why = str(error)
            except asyncio.CancelledError:  # we stop listening: the node is not lost
                self._index.retract(node.node_id)
                raise
            self._lose(node, why)
            await asyncio.sleep(backoff_s * (0.5 + self._dice.random()))
            backoff_s = min(backoff_s * 2, _BACKOFF_S_MAX)

    async def _hear(self, node: Node, report: NodeReport) -> None:
        known = self._index.view(node.node_id)
        self._index.apply(report)
        if known is None or known.report.boot_id != report.boot_id:
            self._lost.pop(node.node_id, None)
            self._emit(NodeConnected(node=node.node_id, boot_id=report.boot_id))
            await self._ensure(node, self._workloads())
            self._heard.set()

    def _lose(self, node: Node, why: str) -> None:
        """Retract its capacity; tell of the loss, or of a new reason why a node can't be heard."""
        news = self._index.view(node.node_id) is not None or self._lost.get(node.node_id) != why
        self._lost[node.node_id] = why
        self._index.retract(node.node_id)
        if news:
            self._emit(NodeLost(node=node.node_id, message=why))

    async def _ensure(self, node: Node, workloads: Iterable[Workload]) -> None:
        for workload in workloads:
            try:
                await node.ensure(workload)
            except SubstrateError as error:
                self._emit(WarningRaised(message=f"node {node.node_id!r}: {error}", hint=error.hint))

    async def _forget(self, node: Node, digest: str) -> None:
        try:
            await node.forget(digest)
        except SubstrateError as error:
            self._emit(WarningRaised(message=f"node {node.node_id!r}: {error}", hint=error.hint))
