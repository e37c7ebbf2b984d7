"""The one place where node-daemon is put together: this machine's node, served over the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct

from node_daemon.settings import PREFIX, Settings
from substrate_guest import isolation
from substrate_node.admin import AdminApp
from substrate_node.daemon import NodeDaemon, head_refusal, only
from substrate_node.host import HostedNode, HostRules, hosted_node
from substrate_seam.events import Emit
from substrate_seam.tls import server_context
from substrate_seam.wire import HEAD_BYTES_MAX
from substrate_service.daemon import Duties
from substrate_service.listener import ListenerLimits, strict_config
from substrate_service.observing import Observed
from substrate_service.serving import Listener
from substrate_service.signals import Stopping


class Daemon(Struct, frozen=True, kw_only=True):
    """node-daemon, put together and not yet listening."""

    listeners: list[Listener]
    duties: Duties


@asynccontextmanager
async def daemon(settings: Settings, observed: Observed, *, stopping: Stopping) -> AsyncIterator[Daemon]:
    """Be node-daemon for the length of the block, but for the listening.

    Raises `StateRootUnusable` or `CertificateUnusable`.
    """
    async with hosted_node(_host_rules(settings), emit=observed.emit) as host:
        wire = NodeDaemon(
            host.node,
            emit=observed.emit,
            body_bytes_max=settings.body_limit_bytes,
            allow=only(settings.agents) if settings.agents else None,
        )

        async def drain(within_s: float) -> None:
            """Tell the agents that this node drains, let its calls end, then end the streams of reports."""
            await host.drain(within_s)
            wire.close()

        yield Daemon(
            listeners=_listeners(settings, wire, _admin(observed, host, stopping), emit=observed.emit),
            duties=Duties(reload=_nothing_to_reload, drain=drain),
        )


def _host_rules(settings: Settings) -> HostRules:
    node = settings.node
    return HostRules(
        daemon="node-daemon",
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


def _admin(observed: Observed, host: HostedNode, stopping: Stopping) -> AdminApp:
    def ready() -> list[str]:
        return ["the daemon is stopping"] if stopping.requested.is_set() else []

    return AdminApp(
        ready=ready,
        metrics=observed.metrics.exposition,
        story=observed.stories.story,
        journal=host.journal.entries if host.journal is not None else None,
    )


async def _nothing_to_reload() -> None:
    """A node is told its workloads by agents."""


def _listeners(settings: Settings, wire: NodeDaemon, admin: AdminApp, *, emit: Emit) -> list[Listener]:
    tls = settings.tls
    return [
        Listener(
            setting=f"{PREFIX}LISTEN_ADDR",
            address=settings.listen,
            config=strict_config(
                wire,
                refusal=head_refusal,
                emit=emit,
                limits=ListenerLimits(head_bytes=HEAD_BYTES_MAX),
                tls=server_context(cert=tls.cert, key=tls.key, ca=tls.ca) if tls is not None else None,
            ),
        ),
        Listener(
            setting=f"{PREFIX}ADMIN_LISTEN_ADDR",
            address=settings.admin_listen,
            config=strict_config(admin, refusal=head_refusal, emit=emit),
            outlasts=True,
        ),
    ]
