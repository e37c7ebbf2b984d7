"""The one place where cluster-agent is put together: the control plane, over nodes across the network."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import SystemRandom
from ssl import SSLContext

from msgspec import Struct

from cluster_agent.settings import PREFIX, Settings
from substrate_cluster.catalog import Catalog, TableSource, table_in_file, table_in_text
from substrate_cluster.ingress import Limits, head_refusals
from substrate_cluster.nodes.connections import over_tcp
from substrate_cluster.nodes.discovery import NodeAddress
from substrate_cluster.nodes.remote import RemoteNode
from substrate_cluster.plane import ControlPlane, FrontPlan, Observers, control_plane, mint_id
from substrate_seam.events import Emit
from substrate_seam.tls import client_context
from substrate_service.daemon import Duties
from substrate_service.listener import strict_config
from substrate_service.observing import Observed
from substrate_service.serving import Listener
from substrate_service.signals import Stopping


class Daemon(Struct, frozen=True, kw_only=True):
    """cluster-agent, put together and not yet listening."""

    listeners: list[Listener]
    duties: Duties
    drain_within_s: float


@asynccontextmanager
async def daemon(settings: Settings, observed: Observed, *, stopping: Stopping) -> AsyncIterator[Daemon]:
    """Be cluster-agent for the length of the block, but for the listening.

    Raises `CannotServe`, `TableInvalid`, `TokensRefused` or `CertificateUnusable`.
    """
    emit, tls = observed.emit, settings.tls
    catalog = Catalog.load(_table_source(settings), emit=emit)
    context = client_context(cert=tls.cert, key=tls.key, ca=tls.ca) if tls is not None else None
    async with AsyncExitStack() as stack:
        nodes = {
            address.node_id: await stack.enter_async_context(_remote(address, context))
            for address in settings.nodes.values()
        }
        plane = await stack.enter_async_context(
            control_plane(
                _front_plan(settings),
                catalog,
                nodes,
                observers=Observers(emit=emit, metrics=observed.metrics.exposition, story=observed.stories.story),
                dice=SystemRandom(),
                stopping=stopping.requested.is_set,
            )
        )
        drain_within_s = settings.front.drain_within_s
        yield Daemon(
            listeners=_listeners(settings, plane, emit=emit),
            duties=Duties(reload=plane.reload, drain=_nothing_to_drain),
            drain_within_s=plane.longest_call_s + 30.0 if drain_within_s is None else drain_within_s,
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


def _front_plan(settings: Settings) -> FrontPlan:
    front = settings.front
    return FrontPlan(
        prefix=PREFIX,
        listen=str(front.listen),
        admin_listen=str(front.admin_listen),
        allowed_hosts=front.allowed_hosts,
        tokens_file=front.tokens_file,
        admin_token_file=front.admin_token_file,
        caller_limit=front.caller_limit,
        body_budget_bytes=front.body_budget_bytes,
        limits=Limits(body_bytes_max=front.body_limit_bytes, body_within_s=front.body_within_s),
    )


def _listeners(settings: Settings, plane: ControlPlane, *, emit: Emit) -> list[Listener]:
    refusal = head_refusals(mint_id=mint_id, emit=emit)
    return [
        Listener(
            setting=f"{PREFIX}LISTEN_ADDR",
            address=settings.front.listen,
            config=strict_config(plane.public, refusal=refusal, emit=emit),
        ),
        Listener(
            setting=f"{PREFIX}ADMIN_LISTEN_ADDR",
            address=settings.front.admin_listen,
            config=strict_config(plane.admin, refusal=refusal, emit=emit),
            outlasts=True,
        ),
    ]
