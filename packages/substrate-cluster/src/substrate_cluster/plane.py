"""The control plane put together: a workload table and nodes in, two applications out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, Protocol

from msgspec import Struct
from starlette.types import ASGIApp

from substrate_cluster.admission import Admission
from substrate_cluster.auth import Anonymous, StaticTokens, TokensRefused
from substrate_cluster.catalog import Catalog, Change
from substrate_cluster.ingress import Limits, Page, admin_app, default_hosts, public_app, refuse_open
from substrate_cluster.nodes.registry import Registry
from substrate_cluster.placement.executor import PlacedExecutor
from substrate_cluster.placement.index import NodeIndex
from substrate_cluster.stories import whole_story
from substrate_seam.events import Emit, WarningRaised
from substrate_seam.executor import Node
from substrate_seam.report import NodeReport
from substrate_seam.story import Story
from substrate_seam.tracing import Join, pass_on

_DRAIN_MARGIN_S: Final = 30.0


class CannotServe(Exception):
    """The control plane must not serve as it is configured; the message says why and what to do."""


class FrontSettings(Protocol):
    """What the front is told: addresses (their `str` counts), who may call, what is admitted."""

    @property
    def listen(self) -> object: ...  # noqa: D102
    @property
    def admin_listen(self) -> object: ...  # noqa: D102
    @property
    def allowed_hosts(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def tokens_file(self) -> Path | None: ...  # noqa: D102
    @property
    def admin_token_file(self) -> Path | None: ...  # noqa: D102
    @property
    def caller_limit(self) -> int: ...  # noqa: D102
    @property
    def body_limit_bytes(self) -> int: ...  # noqa: D102
    @property
    def body_budget_bytes(self) -> int: ...  # noqa: D102
    @property
    def body_within_s(self) -> float: ...  # noqa: D102
    @property
    def drain_within_s(self) -> float | None: ...  # noqa: D102


class Live(Protocol):
    """Says what the daemon is at."""

    def __call__(self, *, nodes: Iterable[NodeReport], lost: Mapping[str, str], reasons: Sequence[str]) -> object:
        """The present, as something that can be JSON.

        `nodes` are whole reports of those that are heard, `lost` says of the others why they are not, and `reasons`
        why calls can't be placed.
        """
        ...


class Observers(Struct, frozen=True, kw_only=True):
    """What the daemon around the plane knows.

    Its metrics, the story of an invocation, the present and the page that draws it, the audit journal if kept; `host`
    is what guests get from its host, in words and as something that can be JSON, if it is a node too.
    """

    emit: Emit
    metrics: Callable[[], bytes]
    story: Callable[[str], Story | None]
    live: Live
    page: Page
    journal: Callable[[], list[str]] | None = None
    host: tuple[str, object] | None = None


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
        drain_within_s: float | None,
        emit: Emit,
    ) -> None:
        self.public = public
        self.admin = admin
        self.registry = registry
        self._catalog = catalog
        self._tokens = tokens
        self._drain_within_s = drain_within_s
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
    def drain_within_s(self) -> float:
        """How long calls that run may take to end: as configured, or as the longest of this table may run, and 30 s."""
        longest_s = max((entry.request_timeout_s for entry in self._catalog.entries()), default=0.0)
        return longest_s + _DRAIN_MARGIN_S if self._drain_within_s is None else self._drain_within_s


def mint_id() -> str:
    """A new invocation id: 128 random bits in hex."""
    return os.urandom(16).hex()


def tokens_of(front: FrontSettings, prefix: str, catalog: Catalog) -> tuple[StaticTokens | None, StaticTokens | None]:
    """The tokens of callers and operators. Raises `TokensRefused`, or `CannotServe` for a front open to strangers."""
    callers = StaticTokens(front.tokens_file) if front.tokens_file is not None else None
    operators = StaticTokens(front.admin_token_file) if front.admin_token_file is not None else None
    open_to_all = refuse_open(
        str(front.listen),
        has_auth=callers is not None,
        has_process_workloads=any(workload.spec.command for workload in catalog.workloads()),
    )
    if open_to_all is not None:
        raise CannotServe(f"{prefix}LISTEN_ADDR: {open_to_all} ({prefix}TOKENS_FILE)")
    return callers, operators


@asynccontextmanager
async def control_plane(
    front: FrontSettings,
    catalog: Catalog,
    nodes: Mapping[str, Node],
    *,
    prefix: str,
    observers: Observers,
    dice: Random,
    stopping: Callable[[], bool],
    clock: Callable[[], float] | None = None,
    join: Join = pass_on,
) -> AsyncIterator[ControlPlane]:
    """Follow the nodes and keep them taught for the length of the block.

    `prefix` names settings in errors; `stopping` turns true when the daemon was asked to stop: it is unready then.
    `clock` gives seconds to measure by, finer than an event loop may tell them. `join` says which trace
    context a guest is given. Raises `TokensRefused`, `CannotServe`.
    """
    emit, index = observers.emit, NodeIndex()
    callers, operators = tokens_of(front, prefix, catalog)
    executor = PlacedExecutor(nodes, index, workload_of=catalog.by_digest, dice=dice, emit=emit)
    registry = Registry(nodes, index, workloads=catalog.workloads, dice=dice, emit=emit)

    def ready() -> list[str]:
        return (["the daemon is stopping"] if stopping() else []) + registry.reasons()

    public = public_app(
        catalog=catalog,
        executor=executor,
        authenticator=callers or Anonymous(),
        admission=Admission(caller_limit=front.caller_limit, body_budget_bytes=front.body_budget_bytes),
        allowed_hosts=front.allowed_hosts or default_hosts(str(front.listen)),
        limits=Limits(body_bytes_max=front.body_limit_bytes, body_within_s=front.body_within_s),
        ready=ready,
        mint_id=mint_id,
        emit=emit,
        clock=clock,
        join=join,
        prefix=prefix,
    )
    admin = admin_app(
        ready=ready,
        metrics=observers.metrics,
        story=partial(whole_story, own=observers.story, nodes=nodes),
        live=lambda: observers.live(nodes=registry.reports(), lost=registry.lost, reasons=ready()),
        page=observers.page,
        journal=observers.journal,
        host=observers.host,
        authenticator=operators,
        allowed_hosts=front.allowed_hosts or default_hosts(str(front.admin_listen)),
        mint_id=mint_id,
        emit=emit,
        prefix=prefix,
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
                drain_within_s=front.drain_within_s,
                emit=emit,
            )
        finally:
            following.cancel()
