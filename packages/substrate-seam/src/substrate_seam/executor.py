"""The seam: what the control plane asks of whoever runs invocations."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from substrate_seam.errors import Ran
from substrate_seam.invocation import Invocation, Reply
from substrate_seam.report import NodeLimits, NodeReport
from substrate_seam.story import Story
from substrate_seam.workload import Workload


class NodeExecutor(Protocol):
    """Runs invocations, each in a guest of its own: one node, or many behind placement."""

    def invoke(self, invocation: Invocation) -> AbstractAsyncContextManager[Reply]:
        """Claim a guest and open its reply; leaving the block gives the guest back.

        Raises `GuestUnavailable` on entry only: nothing ran. `InvocationCancelled` on entry: nothing ran and nothing
        will. `GuestFailed` and `GuestTimeout`, on entry or while the body is read, mean that something may have run.
        Leaving the block raises nothing of ours and hides nothing.
        """
        ...


class Node(NodeExecutor, Protocol):
    """One node, in this process or across the network. Each verb is one call of the wire."""

    @property
    def node_id(self) -> str:
        """The name of the node, stable across restarts."""
        ...

    def reports(self) -> AsyncGenerator[NodeReport, None]:
        """What the node says about itself: a full report at once, then changes, at least one every 2 s.

        Ends when the node can no longer be heard. Whoever stops reading before closes it (`aclosing`).
        """
        ...

    async def ensure(self, workload: Workload) -> None:
        """Make the workload known and warm it in the background. Raises `GuestUnavailable` if it can't be reached."""
        ...

    async def forget(self, digest: str) -> None:
        """Drop this agent's interest in a workload; the node keeps it for a while."""
        ...

    async def cancel(self, invocation_id: str) -> Ran:
        """Stop an invocation and fence its id, so that it never starts later; says whether it may have run."""
        ...

    async def story(self, invocation_id: str) -> Story | None:
        """What the node's own daemon tells of an invocation; None if nothing, or if it is told in this process.

        Raises `GuestUnavailable` if the node can't be asked.
        """
        ...

    async def drain(self, *, within_s: float) -> None:
        """Take no new invocations; those that run have `within_s` seconds. Returns at once."""
        ...

    async def resume(self) -> None:
        """Take invocations again."""
        ...

    async def limit(self, limits: NodeLimits) -> None:
        """Set the node's size. Guests that run are never killed for it: the node takes no more until it fits."""
        ...
