"""The one place where cluster-agent is put together: the control plane, over nodes across the network."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from random import SystemRandom
from ssl import SSLContext

from cluster_agent.settings import PREFIX, Settings
from substrate_cluster.catalog import Catalog, TableSource, table_in_file, table_in_text
from substrate_cluster.ingress import head_refusals
from substrate_cluster.nodes.connections import over_tcp
from substrate_cluster.nodes.discovery import NodeAddress
from substrate_cluster.nodes.remote import RemoteNode
from substrate_cluster.plane import Observers, control_plane, mint_id
from substrate_seam.events import WarningRaised
from substrate_seam.tls import PLAINTEXT_DANGER, client_context
from substrate_seam.tracing import pass_on
from substrate_service.daemon import Assembled, Duties, two_listeners
from substrate_service.observing import Observed
from substrate_service.page import page
from substrate_service.shared_settings import open_doors
from substrate_service.signals import Stopping


@asynccontextmanager
async def daemon(settings: Settings, observed: Observed, stopping: Stopping) -> AsyncIterator[Assembled]:
    """Be cluster-agent for the length of the block, but for the listening.

    Raises `CannotServe`, `TableInvalid`, `TokensRefused` or `CertificateUnusable`.
    """
    emit, front, tls = observed.emit, settings.front, settings.tls
    catalog = Catalog.load(_table_source(settings), emit=emit)
    for address in settings.nodes.values():
        if not (address.tls or address.loopback):
            words = f"the wire to node {address.node_id!r} is in plain text: {PLAINTEXT_DANGER}"
            emit(WarningRaised(message=words))
    context = client_context(cert=tls.cert, key=tls.key, ca=tls.ca) if tls is not None else None
    async with AsyncExitStack() as stack:
        nodes = {
            address.node_id: await stack.enter_async_context(_remote(address, context))
            for address in settings.nodes.values()
        }
        plane = await stack.enter_async_context(
            control_plane(
                front,
                catalog,
                nodes,
                prefix=PREFIX,
                observers=Observers(
                    emit=emit,
                    metrics=observed.metrics.exposition,
                    story=observed.stories.story,
                    live=partial(observed.live.snapshot, doors=open_doors(front, PREFIX)),
                    page=page(),
                ),
                dice=SystemRandom(),
                stopping=stopping.requested.is_set,
                clock=time.monotonic,  # uvloop's stands still for a millisecond
                join=settings.tracing.join if settings.tracing is not None else pass_on,
            )
        )
        yield Assembled(
            listeners=two_listeners(
                PREFIX,
                (front.listen, front.admin_listen),
                (plane.public, plane.admin),
                refusal=head_refusals(mint_id=mint_id, emit=emit),
                emit=emit,
            ),
            duties=Duties(reload=plane.reload, drain=_nothing_to_drain),
            drain_within_s=plane.drain_within_s,
        )


def _remote(address: NodeAddress, tls: SSLContext | None) -> RemoteNode:
    connect = over_tcp(address.host, address.port, node_id=address.node_id, tls=tls if address.tls else None)
    return RemoteNode(address.node_id, connect)


async def _nothing_to_drain(_: float) -> None:
    """An agent holds no guest: its listener waits for the calls that run."""


def _table_source(settings: Settings) -> TableSource:
    front = settings.front
    if front.workloads_file is not None:
        return table_in_file(front.workloads_file)
    return table_in_text(front.workloads or "", label=f"{PREFIX}WORKLOADS")
