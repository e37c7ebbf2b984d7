"""The one place where fc-invoke is put together: both planes, and an in-process call across the seam."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import SystemRandom

from msgspec import Struct

from fc_invoke import builtin
from fc_invoke.settings import PREFIX, Settings
from substrate_cluster.catalog import Catalog, TableSource, table_in_file, table_in_text
from substrate_cluster.ingress import Limits, head_refusals
from substrate_cluster.plane import CannotServe, ControlPlane, FrontPlan, Observers, control_plane, mint_id
from substrate_guest import isolation
from substrate_node.host import HostedNode, HostRules, hosted_node
from substrate_seam.errors import GuestUnavailable
from substrate_seam.events import Emit
from substrate_service.daemon import Duties
from substrate_service.listener import strict_config
from substrate_service.observing import Observed
from substrate_service.serving import Listener


class Daemon(Struct, frozen=True, kw_only=True):
    """fc-invoke, put together and not yet listening."""

    listeners: list[Listener]
    duties: Duties
    drain_within_s: float


def table_source(settings: Settings) -> TableSource:
    """Where the workload table comes from: a file, the environment, or what is built in."""
    front = settings.front
    if front.workloads_file is not None:
        return table_in_file(front.workloads_file)
    if front.workloads is not None:
        return table_in_text(front.workloads, label=f"{PREFIX}WORKLOADS")
    return table_in_text(builtin.TABLE, label=builtin.SOURCE)


def host_rules(settings: Settings) -> HostRules:
    """What this machine is as a node."""
    node = settings.node
    return HostRules(
        daemon="fc-invoke",
        node_id=node.node_id,
        arch=node.arch,
        pod_uid=node.pod_uid,
        state_root=node.state_root,
        state_setting=f"{PREFIX}STATE_ROOT",
        memory_mib=node.memory_mib,
        boot_within_s=node.boot_within_s,
        guest_argv=isolation.argv(),
        audit_journal=node.audit_journal,
    )


@asynccontextmanager
async def daemon(
    settings: Settings, observed: Observed, *, stopping: Callable[[], bool], announce: Callable[[str, str], None]
) -> AsyncIterator[Daemon]:
    """Be fc-invoke for the length of the block, but for the listening. `announce` gets the two addresses.

    Raises `CannotServe`, `TableInvalid`, `TokensRefused` or `StateRootUnusable`.
    """
    catalog = Catalog.load(table_source(settings), emit=observed.emit)
    async with hosted_node(host_rules(settings), emit=observed.emit) as host:
        await _refuse_unrunnable(catalog, host)
        async with control_plane(
            _front_plan(settings),
            catalog,
            {host.node.node_id: host.node},
            observers=_observers(observed, host),
            dice=SystemRandom(),
            stopping=stopping,
        ) as plane:
            await plane.registry.heard()
            drain_within_s = settings.front.drain_within_s
            yield Daemon(
                listeners=_listeners(settings, plane, emit=observed.emit),
                duties=Duties(
                    reload=plane.reload,
                    drain=host.drain,
                    announce=lambda addresses: announce(str(addresses[0]), str(addresses[1])),
                ),
                drain_within_s=plane.longest_call_s + 30.0 if drain_within_s is None else drain_within_s,
            )


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


def _observers(observed: Observed, host: HostedNode) -> Observers:
    return Observers(
        emit=observed.emit,
        metrics=observed.metrics.exposition,
        story=observed.stories.story,
        journal=host.journal.entries if host.journal is not None else None,
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
