"""The one place where fc-invoke is put together: both planes, and an in-process call across the seam."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import SystemRandom

from msgspec import Struct

from fc_invoke import builtin
from fc_invoke.settings import PREFIX, Settings
from substrate_cluster.catalog import Catalog, TableSource, table_in_file, table_in_text
from substrate_cluster.ingress import head_refusals
from substrate_cluster.plane import CannotServe, ControlPlane, Observers, control_plane, mint_id
from substrate_guest import isolation
from substrate_node.host import HostedNode, hosted_node
from substrate_seam.errors import GuestUnavailable
from substrate_seam.events import Emit, WarningRaised
from substrate_seam.tracing import pass_on
from substrate_service.address import Address, UnixAddress
from substrate_service.daemon import Assembled, Duties, two_listeners
from substrate_service.exchange import App
from substrate_service.observing import Observed
from substrate_service.page import page
from substrate_service.shared_settings import open_doors
from substrate_service.signals import Stopping


class BothPlanes(Struct, frozen=True, kw_only=True):
    """What runs in one process: the workloads, the node, and the control plane over it."""

    catalog: Catalog
    host: HostedNode
    plane: ControlPlane


@asynccontextmanager
async def daemon(settings: Settings, observed: Observed, stopping: Stopping) -> AsyncIterator[Assembled]:
    """Be fc-invoke for the length of the block, but for the listening; raises what `both_planes` does."""
    async with both_planes(settings, observed, stopping) as both:
        yield assembled(
            settings, both, public=both.plane.public, announce=_announcer(settings, both.host), emit=observed.emit
        )


def assembled(
    settings: Settings, both: BothPlanes, *, public: App, announce: Callable[[list[Address]], None], emit: Emit
) -> Assembled:
    """The daemon around both planes, with `public` on its public listener."""
    return Assembled(
        listeners=two_listeners(
            PREFIX,
            (settings.front.listen, settings.front.admin_listen),
            (public, both.plane.admin),
            refusal=head_refusals(mint_id=mint_id, emit=emit),
            emit=emit,
        ),
        duties=Duties(reload=both.plane.reload, drain=both.host.drain, announce=announce),
        drain_within_s=both.plane.drain_within_s,
    )


@asynccontextmanager
async def both_planes(settings: Settings, observed: Observed, stopping: Stopping) -> AsyncIterator[BothPlanes]:
    """Run both planes for the length of the block.

    Raises `CannotServe`, `TableInvalid`, `TokensRefused`, `StateRootUnusable` or `VmmError`.
    """
    emit, front = observed.emit, settings.front
    for warning in settings.warnings:
        emit(WarningRaised(message=warning))
    catalog = Catalog.load(table_source(settings), emit=emit)
    async with hosted_node(
        settings.node, daemon="fc-invoke", prefix=PREFIX, guest_argv=isolation.argv(), emit=emit
    ) as host:
        observed.metrics.watch(host.node.report)
        await _refuse_unrunnable(catalog, host)
        async with control_plane(
            front,
            catalog,
            {host.node.node_id: host.node},
            prefix=PREFIX,
            observers=Observers(
                emit=emit,
                metrics=observed.metrics.exposition,
                story=observed.stories.story,
                live=partial(observed.live.snapshot, doors=open_doors(front, PREFIX)),
                page=page(),
                journal=host.journal.entries if host.journal is not None else None,
                host=(str(host.isolation), host.isolation.facts),
            ),
            dice=SystemRandom(),
            stopping=stopping.requested.is_set,
            clock=time.monotonic,  # uvloop's stands still for a millisecond
            join=settings.tracing.join if settings.tracing is not None else pass_on,
        ) as plane:
            await plane.registry.heard()
            yield BothPlanes(catalog=catalog, host=host, plane=plane)


def table_source(settings: Settings) -> TableSource:
    """Where the workload table comes from: a file, the environment, or what is built in."""
    front = settings.front
    if front.workloads_file is not None:
        return table_in_file(front.workloads_file)
    if front.workloads is not None:
        return table_in_text(front.workloads, label=f"{PREFIX}WORKLOADS")
    return table_in_text(builtin.TABLE, label=builtin.SOURCE)


async def _refuse_unrunnable(catalog: Catalog, host: HostedNode) -> None:
    """In one process a workload that this machine can't run could run nowhere: say so before anybody calls it."""
    refusals = []
    for workload in catalog.workloads():
        try:
            await host.node.ensure(workload)
        except GuestUnavailable as error:
            refusals.append(f"{error.message} {error.hint}".strip())
    if refusals:
        raise CannotServe("\n  ".join(["some workloads can't run here:", *refusals]))


def _announcer(settings: Settings, host: HostedNode) -> Callable[[list[Address]], None]:
    """With nothing configured somebody is trying this out: tell them how to call it, and what guests are given here.

    Others find that at `/readyz` of the admin listener.
    """
    trying_out = settings.front.workloads is None and settings.front.workloads_file is None

    def announce(addresses: list[Address]) -> None:
        if trying_out:
            public, admin = addresses
            curl, url = "curl", f"http://{public}"
            if isinstance(public, UnixAddress):
                curl, url = f"curl --unix-socket {public.path}", "http://localhost"
            if settings.front.tokens_file is not None:
                curl += ' -H "Authorization: Bearer $token"'
            print(host.isolation, end="\n\n", file=sys.stderr)
            print(builtin.WELCOME.format(curl=curl, url=url, admin=_to_open(admin)), file=sys.stderr)

    return announce


def _to_open(address: Address) -> str:
    """What a person opens to see a listener."""
    return str(address) if isinstance(address, UnixAddress) else f"http://{address}"
