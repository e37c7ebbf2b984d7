"""The control plane put together: a workload table and nodes in, two applications out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from msgspec import Struct
from starlette.types import ASGIApp

from substrate_cluster.admission import Admission
from substrate_cluster.auth import Anonymous, StaticTokens, TokensRefused
from substrate_cluster.catalog import Catalog, Change
from substrate_cluster.ingress import Limits, admin_app, default_hosts, public_app, refuse_open
from substrate_cluster.nodes.registry import Registry
from substrate_cluster.placement.executor import PlacedExecutor
from substrate_cluster.placement.index import NodeIndex
from substrate_seam.events import Emit, WarningRaised
from substrate_seam.executor import Node


class CannotServe(Exception):
    """The control plane must not serve as it is configured; the message says why and what to do."""


class FrontPlan(Struct, frozen=True, kw_only=True):
    """What the front is to be: addresses as text, who may call, what is admitted. `prefix` names settings in errors."""

    prefix: str
    listen: str
    admin_listen: str
    allowed_hosts: tuple[str, ...] = ()
    tokens_file: Path | None = None
    admin_token_file: Path | None = None
    caller_limit: int = 64
    body_budget_bytes: int = 268_435_456
    limits: Limits = Limits()


class Observers(Struct, frozen=True, kw_only=True):
    """What the daemon around the plane knows: its metrics, the story of an invocation, the audit journal if kept."""

    emit: Emit
    metrics: Callable[[], bytes]
    story: Callable[[str], object | None]
    journal: Callable[[], list[str]] | None = None


class ControlPlane:
    """The two applications of a control plane, and what keeps them current."""

    def __init__(
        self,
        *,
        public: ASGIApp,
        admin: ASGIApp,
        catalog: Catalog,
        registry: Registry,
        tokens: tuple[StaticTokens, ...],
        emit: Emit,
    ) -> None:
        self.public = public
        self.admin = admin
        self.registry = registry
        self._catalog = catalog
        self._tokens = tokens
        self._emit = emit
        self._changes: list[Change] = []
        catalog.on_change(self._changes.append)

    async def reload(self) -> None:
        """Read table and tokens again. What can't be used is refused whole and told; new calls see the rest."""
        for tokens in self._tokens:
            try:
                tokens.reload()
            except TokensRefused as error:
                hint = "The tokens read before stay in force."
                self._emit(WarningRaised(message=str(error), hint=hint))
        await self._catalog.reload()
        while self._changes:
            change = self._changes.pop(0)
            await self.registry.update(added=change.added, removed=change.removed)

    @property
    def longest_call_s(self) -> float:
        """The longest that a call of this table may run, in seconds; 0 for an empty table."""
        return max((entry.request_timeout_s for entry in self._catalog.entries()), default=0.0)


def mint_id() -> str:
    """A new invocation id: 128 random bits in hex."""
    return os.urandom(16).hex()


def tokens_of(plan: FrontPlan, catalog: Catalog) -> tuple[StaticTokens | None, StaticTokens | None]:
    """The tokens of callers and operators. Raises `TokensRefused`, or `CannotServe` for a front open to strangers."""
    callers = StaticTokens(plan.tokens_file) if plan.tokens_file is not None else None
    operators = StaticTokens(plan.admin_token_file) if plan.admin_token_file is not None else None
    open_to_all = refuse_open(
        plan.listen,
        has_auth=callers is not None,
        has_process_workloads=any(workload.spec.command for workload in catalog.workloads()),
    )
    if open_to_all is not None:
        raise CannotServe(f"{plan.prefix}LISTEN_ADDR: {open_to_all} ({plan.prefix}TOKENS_FILE)")
    return callers, operators


@asynccontextmanager
async def control_plane(
    plan: FrontPlan,
    catalog: Catalog,
    nodes: Mapping[str, Node],
    *,
    observers: Observers,
    dice: Random,
    stopping: Callable[[], bool],
) -> AsyncIterator[ControlPlane]:
    """Follow the nodes and keep them taught for the length of the block.

    `stopping` turns true when the daemon was asked to stop; it is unready then. Raises `TokensRefused`, `CannotServe`.
    """
    emit, index = observers.emit, NodeIndex()
    callers, operators = tokens_of(plan, catalog)
    executor = PlacedExecutor(nodes, index, workload_of=catalog.by_digest, dice=dice, emit=emit)
    registry = Registry(nodes, index, workloads=catalog.workloads, dice=dice, emit=emit)

    def ready() -> list[str]:
        return (["the daemon is stopping"] if stopping() else []) + registry.reasons()

    public = public_app(
        catalog=catalog,
        executor=executor,
        authenticator=callers or Anonymous(),
        admission=Admission(caller_limit=plan.caller_limit, body_budget_bytes=plan.body_budget_bytes),
        allowed_hosts=plan.allowed_hosts or default_hosts(plan.listen),
        limits=plan.limits,
        ready=ready,
        mint_id=mint_id,
        emit=emit,
    )
    admin = admin_app(
        ready=ready,
        metrics=observers.metrics,
        story=observers.story,
        journal=observers.journal,
        authenticator=operators,
        allowed_hosts=plan.allowed_hosts or default_hosts(plan.admin_listen),
        mint_id=mint_id,
        emit=emit,
    )
    async with asyncio.TaskGroup() as duties:
        following = duties.create_task(registry.run(), name="follow the nodes")
        try:
            yield ControlPlane(
                public=public,
                admin=admin,
                catalog=catalog,
                registry=registry,
                tokens=tuple(tokens for tokens in (callers, operators) if tokens is not None),
                emit=emit,
            )
        finally:
            following.cancel()
