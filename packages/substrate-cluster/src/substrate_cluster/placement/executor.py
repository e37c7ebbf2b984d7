"""PlacedExecutor: one executor over many nodes. A refusal that ran nothing tries the next node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from msgspec import structs

from substrate_cluster.placement.index import NodeIndex
from substrate_cluster.placement.policy import Placed, place
from substrate_seam.errors import GuestUnavailable, Reason
from substrate_seam.events import Emit, InvocationPlaced, InvocationRefused
from substrate_seam.executor import Node, NodeExecutor
from substrate_seam.invocation import Invocation, Reply
from substrate_seam.workload import Workload

if TYPE_CHECKING:
    from random import Random

TRIES_MAX = 3


class PlacedExecutor:
    """Places each invocation on a node, and again elsewhere when nothing ran: each node once, three at most.

    One exception: a node that does not know the workload is told of it (by `workload_of` a digest) and asked again.
    """

    def __init__(
        self,
        nodes: Mapping[str, Node],
        index: NodeIndex,
        *,
        workload_of: Callable[[str], Workload | None],
        dice: Random,
        emit: Emit,
    ) -> None:
        self._nodes = nodes
        self._index = index
        self._workload_of = workload_of
        self._dice = dice
        self._emit = emit

    def invoke(self, invocation: Invocation) -> AbstractAsyncContextManager[Reply]:
        """Run an invocation on whichever node takes it (see `NodeExecutor`)."""
        return _Placing(self, invocation)

    def choose(self, invocation: Invocation, avoid: set[str]) -> tuple[Node, Placed] | None:
        """The node to try next, or None."""
        choice = place(invocation.workload, self._index, self._dice, avoid=avoid)
        return (self._nodes[choice.node_id], choice) if isinstance(choice, Placed) else None

    def nobody(self) -> GuestUnavailable:
        """Why no node could even be tried."""
        if self._index.views:
            return GuestUnavailable(
                Reason.DRAINING,
                "every node that can be reached is draining and takes no new calls",
                hint="Retry; one of them may take calls again, or start anew.",
                retry_after_s=1.0,
            )
        return GuestUnavailable(
            Reason.NODE_UNREACHABLE,
            "no node can be reached",
            hint="See /readyz of the admin listener for the nodes and what is wrong.",
            retry_after_s=1.0,
        )

    def tell_placed(self, invocation: Invocation, attempt: int, choice: Placed) -> None:
        """Say where an attempt goes."""
        self._emit(
            InvocationPlaced(
                invocation_id=invocation.id,
                attempt=attempt,
                node=choice.node_id,
                because=choice.because,
                candidates=choice.candidates,
            )
        )

    def tell_refused(self, invocation: Invocation, attempt: int, node_id: str, error: GuestUnavailable) -> None:
        """Say that an attempt ran nothing."""
        self._emit(
            InvocationRefused(
                invocation_id=invocation.id,
                attempt=attempt,
                node=node_id,
                reason=error.reason,
                message=error.message,
            )
        )

    async def teach(self, node: Node, digest: str) -> GuestUnavailable | None:
        """Make a workload known to a node that lacks it; the error says why that can't be."""
        workload = self._workload_of(digest)
        if workload is None:
            return GuestUnavailable(Reason.UNKNOWN_DIGEST, "this version of the workload is no longer in the catalog")
        try:
            await node.ensure(workload)
        except GuestUnavailable as error:
            return error
        return None


class _Placing:
    """One invocation on its way to a node."""

    def __init__(self, executor: PlacedExecutor, invocation: Invocation) -> None:
        self._executor = executor
        self._invocation = invocation
        self._start_by_s = asyncio.get_running_loop().time() + invocation.start_within_s
        self._block: AbstractAsyncContextManager[Reply] | None = None

    async def __aenter__(self) -> Reply:
        invocation, executor = self._invocation, self._executor
        attempt, avoid, taught = invocation.attempt, set[str](), set[str]()
        refusal: GuestUnavailable | None = None
        while len(avoid) < TRIES_MAX and (choice := executor.choose(invocation, avoid)) is not None:
            node, placed = choice
            left_s = self._start_by_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            executor.tell_placed(invocation, attempt, placed)
            if attempt > invocation.attempt:
                invocation = structs.replace(invocation, attempt=attempt, start_within_s=left_s)
            block = node.invoke(invocation)
            try:
                reply = await block.__aenter__()
            except GuestUnavailable as error:
                refusal = error
            else:
                self._block = block
                return reply
            executor.tell_refused(invocation, attempt, node.node_id, refusal)
            attempt += 1
            if refusal.reason is Reason.UNKNOWN_DIGEST and node.node_id not in taught:
                taught.add(node.node_id)
                unteachable = await executor.teach(node, invocation.workload.digest)
                if unteachable is None:
                    continue
                refusal = unteachable
            avoid.add(node.node_id)
        raise refusal or executor.nobody()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._block is not None:
            await self._block.__aexit__(kind, error, trace)


if TYPE_CHECKING:  # the type checker proves that it fits

    def _fits(executor: PlacedExecutor) -> NodeExecutor:
        return executor
