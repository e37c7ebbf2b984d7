"""The one place where node-daemon is put together: this machine's node, served over the wire."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node_daemon.settings import PREFIX, Settings
from substrate_guest import isolation
from substrate_node.admin import AdminApp
from substrate_node.daemon import NodeDaemon, head_refusal, only
from substrate_node.host import HostedNode, hosted_node
from substrate_seam.events import WarningRaised
from substrate_seam.tls import PLAINTEXT_DANGER, server_context
from substrate_service.daemon import Assembled, Duties, two_listeners
from substrate_service.observing import Observed
from substrate_service.page import page
from substrate_service.signals import Stopping


@asynccontextmanager
async def daemon(settings: Settings, observed: Observed, stopping: Stopping) -> AsyncIterator[Assembled]:
    """Be node-daemon for the length of the block, but for the listening.

    Raises `StateRootUnusable`, `CertificateUnusable` or `VmmError`.
    """
    emit, tls = observed.emit, settings.tls
    if tls is None and not settings.listen.loopback:
        emit(WarningRaised(message=f"the wire is in plain text on {settings.listen}: {PLAINTEXT_DANGER}"))
    context = server_context(cert=tls.cert, key=tls.key, ca=tls.ca) if tls is not None else None
    async with hosted_node(
        settings.node,
        daemon="node-daemon",
        prefix=PREFIX,
        guest_argv=isolation.argv(),
        emit=emit,
        story=observed.stories.story,
    ) as host:
        wire = NodeDaemon(
            host.node,
            emit=emit,
            body_bytes_max=settings.body_limit_bytes,
            allow=only(settings.agents) if settings.agents else None,
        )

        async def drain(within_s: float) -> None:
            """Tell the agents that this node drains, let its calls end, then end the streams of reports."""
            await host.drain(within_s)
            wire.close()

        yield Assembled(
            listeners=two_listeners(
                PREFIX,
                (settings.listen, settings.admin_listen),
                (wire, _admin(observed, host, stopping)),
                refusal=head_refusal,
                emit=emit,
                tls=context,
            ),
            duties=Duties(reload=_nothing_to_reload, drain=drain, announce=lambda _: _tell_person(host)),
            drain_within_s=settings.drain_within_s,
        )


def _admin(observed: Observed, host: HostedNode, stopping: Stopping) -> AdminApp:
    def ready() -> list[str]:
        return ["the daemon is stopping"] if stopping.requested.is_set() else []

    def live() -> object:
        return observed.live.snapshot(nodes=[host.node.report()], lost={}, reasons=ready())

    observed.metrics.watch(host.node.report)
    return AdminApp(
        ready=ready,
        metrics=observed.metrics.exposition,
        story=observed.stories.story,
        live=live,
        page=page(),
        journal=host.journal.entries if host.journal is not None else None,
        host=(str(host.isolation), host.isolation.facts),
    )


def _tell_person(host: HostedNode) -> None:
    """Whoever starts it by hand sees what guests are given here; others find it at the admin listener's `/readyz`."""
    if sys.stderr.isatty():
        print(host.isolation, file=sys.stderr)


async def _nothing_to_reload() -> None:
    """A node is told its workloads by agents."""
